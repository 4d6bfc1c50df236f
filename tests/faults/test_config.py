"Faults 19 to 25: settings that cannot be meant"
import json, os, subprocess, sys, time
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import create_model
from helpers import runs as small_run
from hypothesis import given, settings, strategies as st

from rtsseg.config import ConfigError, RtsConfig, Since, Stage, check_parameters, load, to_yaml
from rtsseg.runs import config_hash, run_folder
from rtsseg.console import DataError
from rtsseg.manifest import read_manifest, write_manifest
from rtsseg.evaluation import evaluate
from rtsseg.prepare import prepare
from rtsseg.check import check
from rtsseg.runs import Busy, run_lock
from rtsseg.resume import move_aside
from rtsseg.training import train
from helpers.shell import CLEAN, shell

FAULTS = {
    19: ('`lr: 1e-3`, which YAML 1.1 reads as a text', 'it is a number'),
    20: ('`ratio: 1:20` without quotes, which YAML 1.1 reads as 80', 'it means 1:20'),
    21: ('a key that stands twice, a misspelt key', 'refused, with the nearest name'),
    22: ('a curriculum with a gap or an overlap; rows that are never reached, a backbone that never trains', 'refused; said before the run'),
    23: ('a run folder whose config or data are not those that it was begun with', 'refused; with --force it goes on, and that is recorded; --fresh puts the folder aside'),
    24: ('a config that would run code, or fill the memory', 'refused within a second'),
    25: ('a parameter that the notebook does not have', 'refused; what papermill itself only warns of'),
}

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]

def written(folder, text):
    path = folder/'c.yaml'; path.write_text(text); return path

def refused(command, *args):
    "What a command says that ends with code 2, and without a traceback"
    done = shell(command, *args)
    assert done.returncode == 2 and 'Traceback' not in done.stdout + done.stderr, done.stdout + done.stderr
    return done.stderr

@pytest.fixture
def tiny(tmp_path): return small_run.tiny(tmp_path)

# ---------------------------------------------------------------- 19, 20: numbers
@pytest.mark.parametrize('text', ['1e-3', '1E-3', '1.e-3', '0.001', '.001', '+1e-3', '1e-03'])
def test_19_a_number_with_an_exponent(tmp_path, text):
    assert load(written(tmp_path, f'lr: {{base_lr: {text}}}')).lr.base_lr == load(overrides=[f'lr.base_lr={text}']).lr.base_lr == 1e-3

@pytest.mark.parametrize('text', ['1:20', '"1:20"', '20'])
def test_20_a_ratio(tmp_path, text):
    cfg = load(written(tmp_path, f'sampler:\n  curriculum:\n  - first: 1\n    last: 300\n    ratio: {text}\n'))
    assert cfg.sampler.curriculum[0].ratio == 20

@pytest.mark.parametrize('text', ['2:20', '1:20:3', '1:', '1:x', '0', '1:0', '-20', '1.5', 'yes'])
def test_20_what_is_no_ratio(tmp_path, text):
    with pytest.raises(ConfigError, match='sampler.curriculum.0.ratio'): load(written(tmp_path, f'sampler: {{curriculum: [{{first: 1, last: 300, ratio: "{text}"}}]}}'))

@pytest.mark.parametrize('text', ['metrics.monitor=pr_auc@0200', 'metrics.monitor="pr_auc@\u0663"', 'metrics.monitor="pr_auc@\u00b2"', 'metrics.ratios=["1:\u00b2"]', 'seed=4294967296', 'data.source={kind: toy, scene_size: 10, tile_size: 64}'])
def test_20_numbers_that_only_look_like_some(text):
    "They would end a run at its first validation, or its process at once: the field is named"
    with pytest.raises(ConfigError, match=text.partition('=')[0].partition('.')[0]): load(overrides=[text])

# ---------------------------------------------------------------- 21, 22: keys, rows
def test_21_a_key_that_stands_twice(tmp_path):
    for text in ('epochs: 1\nepochs: 2', 'lr: {base_lr: 1.0, base_lr: 2.0}'):
        with pytest.raises(ConfigError, match=r'c.yaml: .*duplicate key'): load(written(tmp_path, text))

def test_21_all_mistakes_at_once(tmp_path):
    "Each with its place and the nearest name, and what sound settings say against each other; nothing is written"
    path = written(tmp_path, 'epoch: 3\nlr: {bse_lr: 1e-3}\nbatch_size: many\nsampler: {positive_fraction: 3}\nloss: {gama: 1}\nmodel: {in_channels: 4, extra_encoder: resnet18}\n')
    said = refused('rtsseg-train', '--config', path)
    for part in ("epoch: no such setting (did you mean 'epochs'?)", "lr.bse_lr: no such setting (did you mean 'base_lr'?)", 'batch_size: ', 'sampler.positive_fraction: ', "loss.gama: no such setting (did you mean 'gamma'?)", 'model.in_channels is 4', "model.extra_encoder 'resnet18' has no use"):
        assert part in said
    assert len(said.splitlines()) == 7
    assert str(path) in said and os.listdir(tmp_path) == ['c.yaml']

@pytest.mark.parametrize('command', ['rtsseg-check', 'rtsseg-evaluate', 'rtsseg-calibrate', 'rtsseg-report', 'rtsseg-search'])
def test_21_every_command_refuses_it(tmp_path, command):
    assert "did you mean 'epochs'" in refused(command, '--config', written(tmp_path, 'epoch: 3')) and os.listdir(tmp_path) == ['c.yaml']

@pytest.mark.parametrize('rows,word', [([(1, 10), (12, 20), (20, 30)], 'epoch 12 where 11 was due .gap.*\n.*epoch 20 where 21 was due .overlap'), ([(1, 10), (10, 20)], 'epoch 10 where 11 was due .overlap'), ([(2, 10)], 'gap'), ([], 'at least 1 item')])
def test_22_a_curriculum_with_a_hole(rows, word):
    with pytest.raises(ConfigError, match=word): load(sampler=dict(curriculum=[dict(first=a, last=b, ratio=1) for a, b in rows]))

def test_22_what_is_never_reached_is_said(tiny, capfd):
    "Rows past the last epoch, and a backbone that stays frozen to the end; the run goes on"
    cfg = tiny.model_copy(update=dict(freeze_backbone_epochs=1, sampler=tiny.sampler.model_copy(update=dict(curriculum=RtsConfig().sampler.curriculum))))
    told = cfg.doubtful_settings()
    assert any('rows from epoch 11 on begin after the last epoch, 1' in t for t in told) and any('the backbone never trains' in t for t in told)
    with pytest.warns(UserWarning) as seen: train(cfg)
    assert set(told) <= {str(w.message) for w in seen}
    assert {f.value for f in check(cfg, batches=1) if f.what == 'doubtful setting'} == set(told)

# ---------------------------------------------------------------- 23: a folder of another config
def files(folder): return {f: f.stat().st_mtime_ns for f in folder.rglob('*') if f.is_file() and f.name != '.lock'}

def test_23_a_run_folder_whose_config_was_changed(tiny):
    "It is refused, and nothing in it is touched"
    folder = train(tiny); path = folder/'config.yaml'; path.write_text(path.read_text().replace('weight_decay: 0.01', 'weight_decay: 0.02'))
    before = files(folder)
    with pytest.raises(ConfigError, match='config.yaml has been changed since the run began.*--fresh'): train(tiny)
    assert files(folder) == before

def test_23_fresh_puts_the_old_folder_aside(tiny, tmp_path):
    "Whole, under another name; the same command trains anew and ends in the same bytes"
    folder = train(tiny); model = (folder/'model'/'model.safetensors').read_bytes(); held = {f.relative_to(folder) for f in folder.rglob('*')}
    (tmp_path/'tiny.yaml').write_text(to_yaml(tiny))
    done = shell('rtsseg-train', '--config', tmp_path/'tiny.yaml', '--inline', '--fresh')
    assert done.returncode == 0 and 'moved to: ' in done.stdout, done.stderr
    aside, = folder.parent.glob('old-seed42-*')
    assert {f.relative_to(aside) for f in aside.rglob('*')} == held and (aside/'model'/'model.safetensors').read_bytes() == model == (folder/'model'/'model.safetensors').read_bytes()
    assert len([l for l in (folder/'log.jsonl').read_text().splitlines() if json.loads(l)['event'] == 'start']) == 1

def test_23_a_run_under_way_is_not_put_aside(tiny):
    folder = run_folder(tiny, prepare(tiny).hash); assert move_aside(folder) is None
    with run_lock(folder), pytest.raises(Busy): move_aside(folder)
    assert folder.is_dir()

def test_23_force_goes_on_and_is_recorded(tiny, tmp_path):
    "With the config of the command; the log keeps what differed, and the report tells"
    folder = train(tiny); path = folder/'config.yaml'; good = path.read_text(); path.write_text(good.replace('weight_decay: 0.01', 'weight_decay: 0.02'))
    (tmp_path/'tiny.yaml').write_text(to_yaml(tiny))
    assert '--force' in refused('rtsseg-train', '--config', tmp_path/'tiny.yaml')
    done = shell('rtsseg-train', '--config', tmp_path/'tiny.yaml', '--inline', '--force')
    assert done.returncode == 0 and 'optimizer.weight_decay 0.02 → 0.01' in done.stdout, done.stderr
    forced = [l for l in map(json.loads, (folder/'log.jsonl').read_text().splitlines()) if l['event'] == 'forced']
    assert [l['differs'] for l in forced] == [{'optimizer.weight_decay': [0.02, 0.01]}] and path.read_text() == good

def test_23_data_that_was_changed_since(tiny):
    "A run is evaluated on the data that it was trained on, or by force, and then each pass records it"
    folder = train(tiny); t = read_manifest(tiny.data.manifest).table; t.loc[0, 'region'] = 'elsewhere'; write_manifest(t, tiny.data.manifest); before = files(folder)
    with pytest.raises(DataError, match='manifest.csv.*: this is a config or data that make .*--force'): evaluate(folder, 'val')
    assert files(folder) == before
    evaluate(folder, 'val', force=True)
    done = [l for l in map(json.loads, (folder/'log.jsonl').read_text().splitlines()) if l['event'] == 'evaluate']
    assert done and all(folder.parent.name in l['forced'] for l in done)

# ---------------------------------------------------------------- 24: hostile text
BOMBS = {'code': '!!python/object/apply:os.system ["touch made"]', 'an object': 'a: !!python/object:os.stat_result {}', 'a tag of its own': 'a: !x 1', 'aliases': 'a: &a [x, x]\n' + ''.join(f'b{i}: &b{i} [*a, *a]\n' for i in range(30)),
         'an alias of itself': 'a: &a [*a]', 'merged aliases': 'a: &a {b: 1}\nc: {<<: *a}', 'depth': '[' * 30_000, 'depth of mappings': '{a: ' * 8_000, 'depth by keys': '? ' * 15_000, 'depth by dashes': '- ' * 15_000,
         'length': 'a: 1\n' * 10**6, 'a long number': 'epochs: ' + '9' * 30_000, 'a zero byte': 'name: a\0b', 'no text': '\ud800', 'another version': '%YAML 1.1\n---\nepochs: 1', 'two documents': 'epochs: 1\n---\nepochs: 2', 'a list': '- 1', 'a number': '1', 'a stray tab': 'a:\n\t- 1'}

@pytest.mark.parametrize('what', BOMBS)
def test_24_hostile_text(tmp_path, monkeypatch, what):
    "Code, objects, aliases, depth, length: refused within a second, before anything is built of it"
    monkeypatch.chdir(tmp_path); path = tmp_path/'c.yaml'; path.write_bytes(BOMBS[what].encode('utf-8', 'surrogatepass'))
    for files, text, word in (([path], [], 'c.yaml'), ([], ['name=' + BOMBS[what]], 'override|name: ')):
        began = time.process_time()
        with pytest.raises(ConfigError, match=word): load(*files, overrides=text)
        assert time.process_time() - began < 1
    assert os.listdir(tmp_path) == ['c.yaml']

ODD = ['1: 2', '? [a]\n: 1', 'name: 2001-99-99', '<<: 1', 'a: !!binary x', '? {a: b}', '= : 1', '- ? a', 'null: 1', 'model: {options: {a: .nan}}', 'lr: {base_lr: .inf}', 'seed: 0x2a', 'runs: "~"', 'runs: "a\\0b"', 'data: {manifest: 3}']

@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ODD) | st.text(st.characters(codec='utf-8'), max_size=60) | st.text('{}[]:,-&*!?|>#%@`"\' \n\tab1e.<~', max_size=40))
def test_24_any_text(tmp_path_factory, text):
    "Whatever stands in the file: a config, or an error that names it"
    path = tmp_path_factory.getbasetemp()/'any.yaml'; path.write_text(text, encoding='utf-8')
    try: assert isinstance(load(path), RtsConfig)
    except ConfigError as e: assert 'any.yaml' in str(e)

def test_24_what_does_not_print(tmp_path):
    "An escape or a zero byte in a key or a value is named by its place, and reaches no terminal; nor does a password"
    path = written(tmp_path, 'lr: {"\\e[2Jx": 1}\nname: "a\\0b"\ntracker: {"http://u:canary@h": 3}\nmodel: {weights: "https://u:canary@h/x.pt"}\n'); said = refused('rtsseg-train', '--config', path)
    assert r'lr.\x1b[2Jx: holds characters that do not print' in said and 'name: holds characters that do not print' in said and '\x1b' not in said and 'canary' not in said

def test_24_through_a_command(tmp_path):
    for what in ('code', 'aliases'): refused('rtsseg-train', '--config', written(tmp_path, BOMBS[what]))
    assert os.listdir(tmp_path) == ['c.yaml']

# ---------------------------------------------------------------- what a hash covers
def with_a_field_more(name, where):
    "A config tree of a later version: one more field at the top, in a section or in a stage"
    later = (Annotated[int, Since('9.9')], 7)
    if where == 'top':
        return create_model('Later', __base__=RtsConfig, **{name: later})
    section = create_model('LaterSection', __base__=RtsConfig.model_fields[where].annotation, **{name: later})
    return create_model('Later', __base__=RtsConfig, **{where: (section, section())})

@settings(max_examples=30, deadline=None)
@given(st.from_regex('[a-z]{1,8}_later', fullmatch=True), st.sampled_from(['top', 'lr', 'loss', 'model', 'data']), st.integers(0, 99))
def test_a_later_field_at_its_default_keeps_the_hash(name, where, value):
    "The run folders of an older version are found again; another value is another run"
    cls = with_a_field_more(name, where)
    assert config_hash(cls()) == config_hash(RtsConfig())
    given = {name: value} if where == 'top' else {where: {name: value}}
    assert (config_hash(cls.model_validate(given)) == config_hash(RtsConfig())) == (value == 7)

def test_a_later_field_of_a_stage_keeps_the_hash():
    stage = dict(first=1, last=3, rates=dict(encoder=1e-3))
    later = create_model('LaterStage', __base__=Stage, more=(Annotated[int, Since('9.9')], 7))
    cls = create_model('Later', __base__=RtsConfig, stages=(list[later], []))
    assert config_hash(cls.model_validate(dict(stages=[stage]))) == config_hash(RtsConfig(stages=[stage]))
    assert config_hash(cls.model_validate(dict(stages=[stage | dict(more=8)]))) != config_hash(RtsConfig(stages=[stage]))

def test_the_hash_of_the_baseline_is_that_of_the_first_version():
    "A run folder that was made by version 0.1.0 is found again"
    assert config_hash(RtsConfig()) == 'df5ce022de70'

# ---------------------------------------------------------------- 25: parameters
def test_25_all_unknown_parameters_at_once():
    with pytest.raises(ConfigError) as e: check_parameters(['seed', 'epochs', 'config'], ['seed', 'sed', 'epoch'])
    assert str(e.value).splitlines() == ["no such parameter: 'epoch' (did you mean 'epochs'?)", "no such parameter: 'sed' (did you mean 'seed'?)"]

@pytest.mark.parametrize('parameter,hint', [(('sed', '43'), "'seed'"), (('overrides', '["lr.bas_lr=1"]'), "'base_lr'")])
def test_25_a_notebook_refuses_it(tmp_path, parameter, hint):
    "Through papermill, before anything is read or written"
    done = subprocess.run([BIN/'papermill', '05_train.ipynb', os.devnull, '-p', 'config', str(written(tmp_path, 'name: x')), '-p', *parameter], cwd=ROOT/'nbs', env=CLEAN, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0 and f'did you mean {hint}' in done.stderr and os.listdir(tmp_path) == ['c.yaml']
