"Faults 19 to 25: invalid settings"
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import create_model

from helpers import runs as small_run
from helpers.children import count_calls
from helpers.shell import CLEAN, shell
from rtsseg.check import check
from rtsseg.cli import rtsseg_check
from rtsseg.config import ConfigError, RtsConfig, Since, Stage, check_parameters, load, to_yaml
from rtsseg.console import DataError
from rtsseg.evaluation import evaluate
from rtsseg.manifest import read_manifest, write_manifest
from rtsseg.prepare import prepare
from rtsseg.resume import move_aside
from rtsseg.runs import Busy, config_hash, run_folder, run_lock
from rtsseg.training import train

FAULTS = {
    19: ('`lr: 1e-3`, which YAML 1.1 reads as text', 'it is a number'),
    20: ('`ratio: 1:20` without quotes, which YAML 1.1 reads as 80', 'it means 1:20'),
    21: ('a key that occurs twice, a misspelt key', 'refused, with the nearest valid name'),
    22: ('a curriculum with a gap or an overlap; rows that are never reached, a backbone that never trains',
         'a gap or an overlap is refused; the others are warned of before the run'),
    23: ('a run folder whose config or data were changed since the run began',
         'refused; --force continues the run and logs what differed; --fresh moves the folder aside'),
    24: ('a config that would run code, or fill the memory', 'refused within a second'),
    25: ('a parameter that the notebook does not have', 'refused, where papermill itself only prints a warning'),
}

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]

def write_config(folder, text):
    path = folder/'c.yaml'
    path.write_text(text)
    return path

def refused(command, *args):
    "What a command prints on stderr when it ends with code 2 and without a traceback"
    done = shell(command, *args)
    output = done.stdout + done.stderr
    assert done.returncode == 2 and 'Traceback' not in output, output
    return done.stderr

@pytest.fixture
def tiny(tmp_path):
    "The config of a run of a second"
    return small_run.tiny(tmp_path)

# ---------------------------------------------------------------- 19, 20: numbers

@pytest.mark.parametrize('text', ['1e-3', '1E-3', '1.e-3', '0.001', '.001', '+1e-3', '1e-03'])
def test_19_a_number_with_an_exponent(tmp_path, text):
    in_a_file = load(write_config(tmp_path, f'lr: {{base_lr: {text}}}'))
    in_an_override = load(overrides=[f'lr.base_lr={text}'])
    assert in_a_file.lr.base_lr == 1e-3
    assert in_an_override.lr.base_lr == 1e-3

def with_ratio(ratio):
    "The text of a config whose curriculum has one row"
    return f'sampler: {{curriculum: [{{first: 1, last: 300, ratio: {ratio}}}]}}'

@pytest.mark.parametrize('text', ['1:20', '"1:20"', '20'])
def test_20_a_ratio(tmp_path, text):
    cfg = load(write_config(tmp_path, f'sampler:\n  curriculum:\n  - first: 1\n    last: 300\n    ratio: {text}\n'))
    assert cfg.sampler.curriculum[0].ratio == 20

@pytest.mark.parametrize('text', ['2:20', '1:20:3', '1:', '1:x', '0', '1:0', '-20', '1.5', 'yes'])
def test_20_not_a_ratio(tmp_path, text):
    path = write_config(tmp_path, with_ratio(f'"{text}"'))
    with pytest.raises(ConfigError, match='sampler.curriculum.0.ratio'):
        load(path)

@pytest.mark.parametrize('section,override', [
    ('metrics', 'metrics.monitor=pr_auc@0200'),
    ('metrics', 'metrics.monitor="pr_auc@\u0663"'),
    ('metrics', 'metrics.monitor="pr_auc@\u00b2"'),
    ('metrics', 'metrics.ratios=["1:\u00b2"]'),
    ('seed', 'seed=4294967296'),
    ('data', 'data.source={kind: toy, scene_size: 10, tile_size: 64}'),
])
def test_20_numbers_that_only_look_valid(section, override):
    "They would end a run at its first validation, or crash its process: the message names the field"
    with pytest.raises(ConfigError, match=section):
        load(overrides=[override])

# ---------------------------------------------------------------- 21, 22: keys, rows

@pytest.mark.parametrize('text', ['epochs: 1\nepochs: 2', 'lr: {base_lr: 1.0, base_lr: 2.0}'])
def test_21_a_key_that_occurs_twice(tmp_path, text):
    path = write_config(tmp_path, text)
    with pytest.raises(ConfigError, match=r'c.yaml: .*duplicate key'):
        load(path)

MISTAKES = """\
epoch: 3
lr: {bse_lr: 1e-3}
batch_size: many
sampler: {positive_fraction: 3}
loss: {gama: 1}
model: {in_channels: 4, extra_encoder: resnet18}
"""

def test_21_all_mistakes_at_once(tmp_path):
    "Each with its field and the nearest name, also valid settings that contradict each other; nothing is written"
    path = write_config(tmp_path, MISTAKES)
    message = refused('rtsseg-train', '--config', path)
    assert "epoch: no such setting (did you mean 'epochs'?)" in message
    assert "lr.bse_lr: no such setting (did you mean 'base_lr'?)" in message
    assert 'batch_size: ' in message
    assert 'sampler.positive_fraction: ' in message
    assert "loss.gama: no such setting (did you mean 'gamma'?)" in message
    assert 'model.in_channels is 4' in message
    assert "model.extra_encoder 'resnet18' has no use" in message
    assert len(message.splitlines()) == 7
    assert str(path) in message
    assert os.listdir(tmp_path) == ['c.yaml']

COMMANDS = ['rtsseg-check', 'rtsseg-evaluate', 'rtsseg-calibrate', 'rtsseg-report', 'rtsseg-search']

@pytest.mark.parametrize('command', COMMANDS)
def test_21_every_command_refuses_it(tmp_path, command):
    path = write_config(tmp_path, 'epoch: 3')
    assert "did you mean 'epochs'" in refused(command, '--config', path)
    assert os.listdir(tmp_path) == ['c.yaml']

GAP = 'epoch 12 where 11 was due .gap.*\n.*epoch 20 where 21 was due .overlap'
OVERLAP = 'epoch 10 where 11 was due .overlap'

@pytest.mark.parametrize('rows,message', [
    ([(1, 10), (12, 20), (20, 30)], GAP),
    ([(1, 10), (10, 20)], OVERLAP),
    ([(2, 10)], 'gap'),
    ([], 'at least 1 item'),
])
def test_22_a_curriculum_with_a_hole(rows, message):
    curriculum = [dict(first=first, last=last, ratio=1) for first, last in rows]
    with pytest.raises(ConfigError, match=message):
        load(sampler=dict(curriculum=curriculum))

def test_22_what_is_never_reached_is_warned_of(tiny, caplog):
    "Rows after the last epoch, and a backbone that stays frozen to the end; the run still trains"
    sampler = tiny.sampler.model_copy(update=dict(curriculum=RtsConfig().sampler.curriculum))
    cfg = tiny.model_copy(update=dict(freeze_backbone_epochs=1, sampler=sampler))
    problems = cfg.doubtful_settings()
    assert any('rows from epoch 11 on begin after the last epoch, 1' in problem for problem in problems)
    assert any('the backbone never trains' in problem for problem in problems)

    folder = train(cfg)
    warnings = {record.getMessage() for record in caplog.records if record.levelname == 'WARNING'}
    assert set(problems) <= warnings
    assert (folder/'model'/'model.safetensors').exists()

    findings = [finding for finding in check(cfg, batches=1) if finding.what == 'doubtful setting']
    assert {finding.value for finding in findings} == set(problems)

# ---------------------------------------------------------------- 23: a folder of another config

@pytest.fixture(scope='module')
def finished_run(tmp_path_factory):
    "A finished run, trained once for all tests of this file"
    return train(small_run.tiny(tmp_path_factory.mktemp('finished')))

@pytest.fixture
def trained(tiny, finished_run):
    "The run folder of `tiny`, as if it had been trained here"
    folder = run_folder(tiny, prepare(tiny).hash)
    shutil.copytree(finished_run, folder)
    (folder/'config.yaml').write_text(to_yaml(tiny))
    return folder

def change_config(folder):
    "Edit config.yaml of a run folder by hand; its text before"
    path = folder/'config.yaml'
    text = path.read_text()
    path.write_text(text.replace('weight_decay: 0.01', 'weight_decay: 0.02'))
    return text

def modification_times(folder):
    "When each file of a run folder was last written, except its lock"
    return {file: file.stat().st_mtime_ns for file in folder.rglob('*') if file.is_file() and file.name != '.lock'}

def names(folder):
    "All files and folders below a folder"
    return {path.relative_to(folder) for path in folder.rglob('*')}

def events(folder, kind):
    "The events of one kind in log.jsonl"
    lines = [json.loads(line) for line in (folder/'log.jsonl').read_text().splitlines()]
    return [line for line in lines if line['event'] == kind]

def write_tiny(tiny, folder):
    "The config as a file for a command"
    path = folder/'tiny.yaml'
    path.write_text(to_yaml(tiny))
    return path

def test_23_a_run_folder_whose_config_was_changed(tiny, trained):
    "It is refused, and no file in it is written"
    change_config(trained)
    before = modification_times(trained)
    with pytest.raises(ConfigError, match='config.yaml has been changed since the run began.*--fresh'):
        train(tiny)
    assert modification_times(trained) == before

def test_23_fresh_moves_the_old_folder_aside(tiny, trained, tmp_path):
    "Complete, under another name; the same command trains from the start and ends in the same bytes"
    model = (trained/'model'/'model.safetensors').read_bytes()
    content = names(trained)
    done = shell('rtsseg-train', '--config', write_tiny(tiny, tmp_path), '--inline', '--fresh')
    assert done.returncode == 0 and 'moved to: ' in done.stdout, done.stderr
    aside, = trained.parent.glob('old-seed42-*')
    assert names(aside) == content
    assert (aside/'model'/'model.safetensors').read_bytes() == model
    assert (trained/'model'/'model.safetensors').read_bytes() == model
    assert len(events(trained, 'start')) == 1

def test_23_a_folder_that_is_trained_in_is_not_moved(tiny):
    folder = run_folder(tiny, prepare(tiny).hash)
    assert move_aside(folder) is None
    with run_lock(folder):
        with pytest.raises(Busy):
            move_aside(folder)
    assert folder.is_dir()

def test_23_force_continues_and_is_logged(tiny, trained, tmp_path):
    "The run has the config of the command again; the log holds what differed, and the report mentions it"
    config = write_tiny(tiny, tmp_path)
    original = change_config(trained)
    assert '--force' in refused('rtsseg-train', '--config', config)
    done = shell('rtsseg-train', '--config', config, '--inline', '--force')
    assert done.returncode == 0 and 'optimizer.weight_decay 0.02 → 0.01' in done.stdout, done.stderr
    forced, = events(trained, 'forced')
    assert forced['differs'] == {'optimizer.weight_decay': [0.02, 0.01]}
    assert (trained/'config.yaml').read_text() == original

def test_23_data_that_was_changed_since(tiny, trained):
    "A run is evaluated on the data that it was trained on; --force allows other data, and each evaluation logs it"
    table = read_manifest(tiny.data.manifest).table
    table.loc[0, 'region'] = 'elsewhere'
    write_manifest(table, tiny.data.manifest)
    before = modification_times(trained)
    with pytest.raises(DataError, match='manifest.csv.*: this is a config or data that make .*--force'):
        evaluate(trained, 'val')
    assert modification_times(trained) == before
    evaluate(trained, 'val', force=True)
    evaluations = events(trained, 'evaluate')
    assert evaluations
    assert all(trained.parent.name in event['forced'] for event in evaluations)

# ---------------------------------------------------------------- 24: hostile text

HOSTILE = {
    'code': '!!python/object/apply:os.system ["touch made"]',
    'an object': 'a: !!python/object:os.stat_result {}',
    'a tag of its own': 'a: !x 1',
    'aliases': 'a: &a [x, x]\n' + ''.join(f'b{i}: &b{i} [*a, *a]\n' for i in range(30)),
    'an alias of itself': 'a: &a [*a]',
    'merged aliases': 'a: &a {b: 1}\nc: {<<: *a}',
    'depth': '[' * 30_000,
    'depth of mappings': '{a: ' * 8_000,
    'depth by keys': '? ' * 15_000,
    'depth by dashes': '- ' * 15_000,
    'length': 'a: 1\n' * 10**6,
    'a long number': 'epochs: ' + '9' * 30_000,
    'a zero byte': 'name: a\0b',
    'no text': '\ud800',
    'another version': '%YAML 1.1\n---\nepochs: 1',
    'two documents': 'epochs: 1\n---\nepochs: 2',
    'a list': '- 1',
    'a number': '1',
    'a stray tab': 'a:\n\t- 1',
}

# a measure of work that does not depend on the machine: Python makes more of them in a second
MOST_CALLS = 20_000_000

def assert_refused_in_time(message, files=(), overrides=()):
    "`load` refuses with this message, after little work"
    def attempt():
        with pytest.raises(ConfigError, match=message):
            load(*files, overrides=overrides)
    assert count_calls(attempt) < MOST_CALLS

@pytest.mark.parametrize('what', HOSTILE)
def test_24_hostile_text(tmp_path, monkeypatch, what):
    "Code, objects, aliases, depth, length: refused after little work, before anything is built from it"
    monkeypatch.chdir(tmp_path)
    path = tmp_path/'c.yaml'
    path.write_bytes(HOSTILE[what].encode('utf-8', 'surrogatepass'))
    assert_refused_in_time('c.yaml', files=[path])
    assert_refused_in_time('override|name: ', overrides=['name=' + HOSTILE[what]])
    assert os.listdir(tmp_path) == ['c.yaml']

ODD_TEXTS = [
    '1: 2', '? [a]\n: 1', 'name: 2001-99-99', '<<: 1', 'a: !!binary x', '? {a: b}', '= : 1', '- ? a', 'null: 1',
    'model: {options: {a: .nan}}', 'lr: {base_lr: .inf}', 'seed: 0x2a', 'runs: "~"', 'runs: "a\\0b"',
    'data: {manifest: 3}',
]
any_text = st.text(st.characters(codec='utf-8'), max_size=60)
text_like_yaml = st.text('{}[]:,-&*!?|>#%@`"\' \n\tab1e.<~', max_size=40)

@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ODD_TEXTS) | any_text | text_like_yaml)
def test_24_any_text(tmp_path_factory, text):
    "Any text in the file gives a config, or an error that names the file"
    path = tmp_path_factory.getbasetemp()/'any.yaml'
    path.write_text(text, encoding='utf-8')
    try:
        assert isinstance(load(path), RtsConfig)
    except ConfigError as error:
        assert 'any.yaml' in str(error)

UNPRINTABLE = r"""
lr: {"\e[2Jx": 1}
name: "a\0b"
tracker: {"http://u:canary@h": 3}
model: {weights: "https://u:canary@h/x.pt"}
"""

def test_24_characters_that_do_not_print(tmp_path):
    "An escape or a zero byte in a key or a value is escaped in the message, which shows no password either"
    message = refused('rtsseg-train', '--config', write_config(tmp_path, UNPRINTABLE))
    assert r'lr.\x1b[2Jx: holds characters that do not print' in message
    assert 'name: holds characters that do not print' in message
    assert '\x1b' not in message
    assert 'canary' not in message

@pytest.mark.parametrize('what', ['code', 'aliases'])
def test_24_through_a_command(tmp_path, what):
    refused('rtsseg-train', '--config', write_config(tmp_path, HOSTILE[what]))
    assert os.listdir(tmp_path) == ['c.yaml']

# ---------------------------------------------------------------- what a hash covers

LATER_FIELD = (Annotated[int, Since('9.9')], 7)

def with_a_later_field(name, where):
    "A config tree of a later version, with one more field at the top or in a section"
    if where == 'top':
        return create_model('Later', __base__=RtsConfig, **{name: LATER_FIELD})
    section = RtsConfig.model_fields[where].annotation
    later_section = create_model('LaterSection', __base__=section, **{name: LATER_FIELD})
    return create_model('Later', __base__=RtsConfig, **{where: (later_section, later_section())})

places = st.sampled_from(['top', 'lr', 'loss', 'model', 'data'])

@settings(max_examples=30, deadline=None)
@given(st.from_regex('[a-z]{1,8}_later', fullmatch=True), places, st.integers(0, 99))
def test_a_later_field_at_its_default_keeps_the_hash(name, where, value):
    "A later version finds the run folders of an older one; another value is another run"
    later = with_a_later_field(name, where)
    assert config_hash(later()) == config_hash(RtsConfig())
    tree = {name: value} if where == 'top' else {where: {name: value}}
    is_equal = config_hash(later.model_validate(tree)) == config_hash(RtsConfig())
    assert is_equal == (value == 7)

def test_a_later_field_of_a_stage_keeps_the_hash():
    stage = dict(first=1, last=3, rates=dict(encoder=1e-3))
    later_stage = create_model('LaterStage', __base__=Stage, more=LATER_FIELD)
    later = create_model('Later', __base__=RtsConfig, stages=(list[later_stage], []))
    before = config_hash(RtsConfig(stages=[stage]))
    assert config_hash(later.model_validate(dict(stages=[stage]))) == before
    assert config_hash(later.model_validate(dict(stages=[stage | dict(more=8)]))) != before

def test_the_hash_of_the_baseline_is_that_of_the_first_version():
    "A run folder that was made by version 0.1.0 is found again"
    assert config_hash(RtsConfig()) == 'df5ce022de70'

# ---------------------------------------------------------------- 25: parameters

def test_25_all_unknown_parameters_at_once():
    with pytest.raises(ConfigError) as caught:
        check_parameters(['seed', 'epochs', 'config'], ['seed', 'sed', 'epoch'])
    assert str(caught.value).splitlines() == [
        "no such parameter: 'epoch' (did you mean 'epochs'?)",
        "no such parameter: 'sed' (did you mean 'seed'?)",
    ]

@pytest.mark.parametrize('name,value,hint', [
    ('sed', '43', "'seed'"),
    ('overrides', '["lr.bas_lr=1"]', "'base_lr'"),
])
def test_25_a_notebook_refuses_it(tmp_path, name, value, hint):
    "Through papermill, before anything is read or written"
    config = write_config(tmp_path, 'name: x')
    command = [BIN/'papermill', '05_train.ipynb', os.devnull, '-p', 'config', str(config), '-p', name, value]
    done = subprocess.run(command, cwd=ROOT/'nbs', env=CLEAN, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert f'did you mean {hint}' in done.stderr
    assert os.listdir(tmp_path) == ['c.yaml']

def test_a_pipe_in_place_of_a_config(tmp_path, capsys):
    "It is refused before it is opened: nobody would ever write into it"
    os.mkfifo(tmp_path/'run.yaml')
    with small_run.in_time(), pytest.raises(SystemExit) as error:
        rtsseg_check(config=str(tmp_path/'run.yaml'))
    assert error.value.code == 2
    assert 'run.yaml: not a regular file' in capsys.readouterr().err
