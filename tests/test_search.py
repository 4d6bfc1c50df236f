"Searches and grids as their users start them: refused early, pruned, killed and started again, and mirrored to a tracker"
import json, math, os, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np, optuna, pandas as pd, pytest
from hypothesis import given, strategies as st
from scipy.stats import ttest_rel

import rtsseg.tuning as module
from rtsseg.cli import rtsseg_ablate, rtsseg_search
from rtsseg.config import ConfigError, load, to_yaml
from rtsseg.runs import config_hash
from rtsseg.tuning import (
    Ablation, FLOOR, Range, ablate, check_variants, combinations, lay, put, read_axes, search, verdict
)
from rtsseg.prepare import prepare
from rtsseg.runs import Busy, RunError, Stopped, read_log
from helpers.runs import MODEL, tiny as tiny_run

ROOT = Path(__file__).parents[1]
READY = sorted((ROOT/'configs'/'search').glob('*.yaml'))

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "A config of a second a run, and the file that holds it"
    folder = tmp_path_factory.mktemp('world')
    cfg = tiny_run(folder, epochs=2, batch_size=2, lr=dict(base_lr=1e-3, backbone_lr_multiplier=1., warmup_epochs=0), sampler=dict(curriculum=[dict(first=1, last=2, ratio=1)]), metrics=dict(monitor='pr_auc@native'),
                   checkpoint=dict(resume_minutes=1e-4), model=MODEL | dict(encoder='tu-test_resnet'))
    (folder/'tiny.yaml').write_text(to_yaml(cfg))
    return cfg, folder/'tiny.yaml'

@pytest.fixture
def cfg(tiny, tmp_path): return tiny[0].model_copy(update=dict(runs=tmp_path/'runs'))

def file(folder, text, name='axes.yaml'):
    (folder/name).write_text(text); return folder/name

def states(study): return [t.state.name for t in study.trials]

# --- the rule

scores = st.lists(st.tuples(st.integers(0, 1024), st.integers(0, 1024)), min_size=2, max_size=9).map(lambda v: np.array(v).T / 1024)      # exact in binary, and so are their differences

@given(scores, st.integers(-4096, 4096))
def test_what_a_seed_does_to_both_does_not_count(v, shift): assert verdict(*(v + shift / 1024)) == verdict(*v)

@given(scores)
def test_a_loss_is_a_gain_seen_from_the_other_side(v):
    there, back = verdict(*v), verdict(*v[::-1])
    assert (there.mean, there.std) == (-back.mean, back.std)
    assert there.word == {'gain': 'loss', 'loss': 'gain', 'noise': 'noise'}[back.word]

@given(scores)
def test_a_gain_is_significant_by_another_library(v):
    "d > 2σ is t > 2√n in a paired t-test"
    if verdict(*v).word != 'gain': return
    assert (v[1] > v[0]).all() and v[1].mean() - v[0].mean() > FLOOR
    assert np.ptp(v[1] - v[0]) == 0 or ttest_rel(v[1], v[0]).statistic > 2 * math.sqrt(v.shape[1]) * (1 - 1e-9)

@pytest.mark.parametrize('baseline, variant, word', [
    ([.50, .50, .50], [.53, .54, .55], 'gain'),             # mean 0.04, 2σ = 0.02
    ([.50, .50, .50], [.509, .509, .509], 'noise'),         # as even as can be, and too little
    ([.50, .50, .50], [.511, .511, .511], 'gain'),
    ([.80, .60, .70], [.83, .64, .75], 'gain'),             # seeds move the score by 0.2, and both alike
    ([.80, .60, .70], [.75, .64, .83], 'noise'),            # the same six numbers, paired otherwise
    ([.50] * 9, [.60] * 8 + [.4999], 'noise'),              # mean 0.089 > 2σ = 0.067, and one seed against
    ([.50, math.nan, .50], [.53, .54, .55], 'gain'),        # a run that failed is left out with its pair
    ([.50, math.nan], [.53, .54], 'no verdict: 1 paired seed'), ([math.nan], [.5], 'no verdict: 0 paired seeds')])
def test_verdicts_by_hand(baseline, variant, word): assert verdict(baseline, variant).word == word

def test_a_table_says_what_it_rests_on():
    many = str(Ablation('pr_auc@200', ['a', 'b', 'c'], [42, 43], np.array([[.50, .52], [.58, .60], [.50, math.nan]]), failed=['seed 43, c failed: no memory']))
    assert '| b | 0.5800 | 0.6000 | 0.5900 ± 0.0141 | +0.0800 ± 0.0000 | gain |' in many and '| c | 0.5000 | – | 0.5000 | +0.0000 | no verdict: 1 paired seed |' in many
    assert '2 comparisons with the baseline (a): 1 gain, 1 no verdict' in many and 'pr_auc@200' in many and 'test split was never touched' in many and 'no memory' in many and 'exceeds max(2σ, 0.01)' in many
    assert 'There is no verdict from a single seed' in str(Ablation('pr_auc@200', ['a', 'b'], [42], np.array([[.5], [.9]])))

# --- files of what to try

@pytest.mark.parametrize('text, why', [
    ('loss.gama: [1, 2]', "axes.yaml: loss.gama=1: loss.gama: no such setting (did you mean 'gamma'?)"),
    ('loss: {a: {}, b: {loss.parts: [dcie]}}', 'axes.yaml: loss=b: loss.parts'),
    ('loss: {a: {}, b: {loss: {pats: [dice]}}}', "loss=b: loss.pats: no such setting (did you mean 'parts'?)"),
    ('loss.alpha: [0.25, 7]', 'loss.alpha=7: loss.alpha'),
    ('model.encoder: [tu-test_resnet, resnet81]', "model.encoder=resnet81: model.encoder: there is no 'resnet81'"),
    ('model.in_channels: [3, 4]', 'model.in_channels=4: model.in_channels is 4, but RGB'),
    ('b: {none: {}, snow: {data.extra_bands: [snow], model.in_channels: 4}}', "no band is described as 'snow'"),
    ('seed: [42, 43]', 'seed=43: is the same run as seed=42'),
    ('loss.gamma: [2, 2.0]', 'loss.gamma=2.0: is the same run as loss.gamma=2'),
    ('metrics.monitor: [pr_auc@native, pr_auc@200]', 'cannot vary'),
    ('loss.gamma: [1, 1]', 'twice'), ('loss.gamma: 3', 'not 3'), ('loss.gamma: []', 'not []'), ('loss: {a: 1, b: {}}', 'no such setting of a range'), ('', 'nothing to try'), ('- 1', 'a mapping was expected'),
    ('loss.gamma: [1, 2]\nloss.gamma: [3]', 'loss.gamma')])
@pytest.mark.parametrize('command', [search, ablate])
def test_nothing_is_trained_or_written_where_something_is_wrong(cfg, tmp_path, text, why, command):
    with pytest.raises(ConfigError) as e: command(cfg, file(tmp_path, text), *([1] if command is search else []))
    assert why in str(e.value) and 'axes.yaml' in str(e.value) and not cfg.runs.exists()

@pytest.mark.parametrize('text, why', [('lr.base_lr: {low: 1, high: 2, lg: true}', "'log'"), ('lr.base_lr: {low: 0, high: 1, log: true}', 'above 0'), ('lr.base_lr: {low: 1}', 'high: Field required'),
                                       ('lr.base_lr: {low: -1, high: 1}', 'lr.base_lr=-1: lr.base_lr'), ('accumulate: {low: 1, high: 2.5}', 'accumulate=2.5'), ('name: {low: 1, high: 2}', 'name=1: name')])
def test_ranges_are_checked_at_both_ends(cfg, tmp_path, text, why):
    with pytest.raises(ConfigError, match='axes.yaml') as e: search(cfg, file(tmp_path, text), 1)
    assert why in str(e.value)

@pytest.mark.parametrize('text, why', [('lr.base_lr: {low: 1, high: 2}', 'that is for rtsseg-search'), ('loss.gamma: [2]', 'nothing to be compared with'),
                                       ('loss.gamma: [1, 2]\nloss: {a: {}, b: {loss.gamma: 3}}', 'loss.gamma is set by two axes')])
def test_grids_have_an_end_and_a_baseline(cfg, tmp_path, text, why):
    with pytest.raises(ConfigError, match='axes.yaml') as e: ablate(cfg, file(tmp_path, text))
    assert why in str(e.value)

def test_a_path_is_relative_to_its_file(tmp_path):
    axes = read_axes(file(tmp_path, 'model.weights: [imagenet, weights/a.pt]\nw: {b: {model: {weights: weights/b.pt}}}'))
    assert [f['model.weights'] for f in axes['model.weights'].values()] == ['imagenet', str(tmp_path/'weights/a.pt')] and axes['w']['b'] == {'model.weights': str(tmp_path/'weights/b.pt')}

@pytest.mark.parametrize('path', READY, ids=lambda p: p.stem)
def test_ready_files_fit_the_configs(path):
    axes = read_axes(path); base = load(ROOT/'configs'/('toy.yaml' if path.stem == 'extra' else 'rts_baseline.yaml'))
    assert path.read_text().startswith('# ')
    if any(isinstance(a, Range) for a in axes.values()):
        for name, a in axes.items():
            for f in ({name: a.low}, {name: a.high}) if isinstance(a, Range) else a.values(): lay(base, f)
        return
    found = [lay(base, f) for f in combinations(axes, path).values()]
    assert len({config_hash(c) for c in found}) == len(found)
    if path.stem not in ('tversky', 'focal_dice', 'extra'): assert found[0] == base      # these begin with another loss, and with RGB alone

@pytest.mark.parametrize('name, field, values', [('focal', 'loss.gamma', {1, 2, 3, 5}), ('focal', 'loss.alpha', {.1, .25, .5, .75}), ('tversky', 'loss.tversky_alpha', {.3, .5, .7}), ('tversky', 'loss.tversky_beta', {.3, .5, .7}),
                                                 ('focal_dice', 'loss_weights.focal', {.5, 1, 2}), ('focal_dice', 'loss_weights.dice', {.5, 1, 2}), ('encoders', 'model.encoder', {f'efficientnet-b{i}' for i in (3, 5, 7)})])
def test_ready_files_have_the_ranges_of_the_guide(name, field, values):
    assert {f[field] for f in read_axes(ROOT/f'configs/search/{name}.yaml')[field].values()} == values

def test_the_sweep_of_extra_channels_sets_bands_and_channels_together(cfg):
    found = check_variants(cfg, combinations(read_axes(ROOT/'configs/search/extra.yaml'), 'extra.yaml'), 'extra.yaml')      # models are built, bands are read
    assert [c.data.extra_bands for c in found.values()] == [[], ['ndvi'], ['relative_elevation'], ['ndvi', 'relative_elevation'], ['ndvi', 'relative_elevation']]
    assert [c.model.in_channels for c in found.values()] == [3, 4, 4, 5, 5] and [c.model.fusion for c in found.values()] == ['early'] * 4 + ['late']

# --- grids

def test_a_grid_is_trained_nested_and_gone_on_with(cfg, tmp_path, capfd):
    from mlflow import MlflowClient
    cfg = cfg.model_copy(update=dict(tracker=cfg.tracker.model_copy(update=dict(kind='mlflow')), epochs=1))
    grid = file(tmp_path, 'loss.gamma: [2, 0]', 'gamma.yaml')
    first = ablate(cfg, grid, [42]); assert first.verdicts[0].word == 'no verdict: 1 paired seed'
    found = ablate(cfg, grid, [42, 43]); said = capfd.readouterr().out
    assert said.count('trained already') == 2 and np.isfinite(found.values).all() and found.values[:, 0].tolist() == first.values[:, 0].tolist()
    for gamma, values in zip([2, 0], found.values):
        for seed, value in zip([42, 43], values):
            run = cfg.runs/'tiny'/config_hash(lay(cfg, {'loss.gamma': gamma}), prepare(cfg).hash)/f'seed{seed}'
            assert load(run/'config.yaml').loss.gamma == gamma and max(r['val/pr_auc@native'] for r in read_log(run)) == value
    folder = found.folder; assert folder == first.folder and folder.parent == cfg.runs/'ablation'
    table = pd.read_csv(folder/'table.csv'); assert table['seed 43'].to_list() == found.values[:, 1].tolist() and table['verdict'].to_list() == ['baseline', found.verdicts[0].word]
    assert (folder/'table.md').read_text() == f'{found}\n' and (folder/'differences.png').stat().st_size > 5000
    client = MlflowClient(f"sqlite:///{cfg.runs/'mlflow.db'}"); parent = json.loads((folder/'tracker.json').read_text())['run_id']
    runs = client.search_runs([client.get_experiment_by_name('rtsseg').experiment_id])
    assert [r.info.run_name for r in runs if r.info.run_id == parent] == [folder.name] and len(runs) == 5
    assert {r.data.tags.get('mlflow.parentRunId') for r in runs if r.info.run_id != parent} == {parent} and {r.info.status for r in runs} == {'FINISHED'}
    assert {f.path for f in client.list_artifacts(parent)} == {'table.md', 'table.csv', 'differences.png'}

def test_a_failed_run_is_a_hole_in_the_table(cfg, tmp_path, monkeypatch):
    def fake(c, *_):
        if c.loss.gamma == 0 and c.seed == 43: raise RunError('the GPU is on fire')
        return .5 + .1 * (c.loss.gamma == 0)
    monkeypatch.setattr(module, 'trained', fake)
    found = ablate(cfg, file(tmp_path, 'loss.gamma: [2, 0]'), [42, 43, 44])
    assert found.verdicts[0].word == 'gain' and math.isnan(found.values[1, 1]) and 'seed 43, loss.gamma=0 failed: the GPU is on fire' in str(found)
    monkeypatch.setattr(module, 'trained', lambda *_: (_ for _ in ()).throw(Stopped('SIGTERM')))
    with pytest.raises(Stopped): ablate(cfg, file(tmp_path, 'loss.gamma: [2, 0]'))

# --- searches

SPACE = 'lr.base_lr: {low: 1e-4, high: 1e-2, log: true}\nloss.gamma: [2, 0, 5]\naccumulate: {low: 1, high: 2}'

class AfterFirst(optuna.pruners.BasePruner):
    "Prunes every trial but the first, at its first validation"
    def prune(self, study, trial): return trial.number > 0

def test_a_search_prunes_and_leaves_an_overlay(cfg, tiny, tmp_path, capsys):
    study = search(cfg, file(tmp_path, SPACE, 'space.yaml'), 3, pruner=AfterFirst())
    assert states(study) == ['COMPLETE', 'PRUNED', 'PRUNED']
    logs = [read_log(cfg.runs/t.user_attrs['run']) for t in study.trials]
    assert [len(l) for l in logs] == [2, 1, 1]                                                        # a pruned trial stops where it was told to
    assert [t.intermediate_values for t in study.trials] == [{r['epoch']: r['val/pr_auc@native'] for r in l} for l in logs]
    assert study.best_value == max(r['val/pr_auc@native'] for r in logs[0])
    folder = cfg.runs/'search'/'tiny-space'
    assert {p.name for p in folder.iterdir()} == {'study.db', 'trials.csv', 'best.yaml', 'history.png'}      # importances want two finished trials
    assert pd.read_csv(folder/'trials.csv')['note'].to_list()[1:] == ['pruned at epoch 1'] * 2
    best = load(tiny[1], folder/'best.yaml', runs=cfg.runs)
    assert best == load(cfg.runs/study.trials[0].user_attrs['run']/'config.yaml') and isinstance(study.best_params['accumulate'], int)
    said = capsys.readouterr().out
    search(cfg, tmp_path/'space.yaml', 3); assert capsys.readouterr().out == '' and 'trial 1: pruned at epoch 1' in said and str(tmp_path) not in said
    with pytest.raises(ConfigError, match='another config'): search(cfg.model_copy(update=dict(epochs=3)), tmp_path/'space.yaml', 4)
    with pytest.raises(ConfigError, match='another space'): search(cfg, file(tmp_path, 'loss.gamma: [2, 0]', 'space.yaml'), 4)

def test_a_killed_search_goes_on_with_the_same_parameters(cfg, tmp_path, monkeypatch):
    "kill -9 in the second trial: it is tried again, from its checkpoint, and the search ends as it would have ended"
    space = file(tmp_path, SPACE); whole = search(cfg.model_copy(update=dict(runs=tmp_path/'whole')), space, 3)
    (tmp_path/'tiny.yaml').write_text(to_yaml(cfg))
    victim = subprocess.Popen([sys.executable, '-c', f"from rtsseg.config import load\nfrom rtsseg.tuning import search\nsearch(load({str(tmp_path/'tiny.yaml')!r}), {str(space)!r}, 3)"],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={k: v for k, v in os.environ.items() if k != 'IN_TEST'})
    second = cfg.runs/whole.trials[1].user_attrs['run']; until = time.monotonic() + 90
    while not list(second.glob('checkpoints/resume.ckpt')): assert time.monotonic() < until, 'waited too long'; time.sleep(.01)
    victim.send_signal(signal.SIGKILL); victim.wait()
    monkeypatch.setattr(module, 'HEARTBEAT', 1)
    study = search(cfg, space, 3)
    assert states(study).count('FAIL') == 1 and states(study).count('COMPLETE') == 3 and len(study.trials) == 4
    repeat = next(t for t in study.trials if 'again' in t.user_attrs)
    assert repeat.user_attrs['again'] == 1 and repeat.params == study.trials[1].params and repeat.user_attrs['run'] == whole.trials[1].user_attrs['run']
    starts = [json.loads(l) for l in (second/'log.jsonl').read_text().splitlines() if '"start"' in l]
    assert len(starts) == 2 and starts[1]['step'] > 0                                                 # it went on, it did not start over
    ended = {str(t.params): (t.value, t.intermediate_values) for t in study.trials if t.state.name == 'COMPLETE'}
    assert ended == {str(t.params): (t.value, t.intermediate_values) for t in whole.trials}

class Terminating(optuna.pruners.BasePruner):
    "Sends SIGTERM at the first validation of the first trial"
    def prune(self, study, trial):
        if trial.number == 0: os.kill(os.getpid(), signal.SIGTERM)
        return False

def test_a_terminated_search_stops_and_goes_on(cfg, tmp_path):
    space = file(tmp_path, SPACE)
    with pytest.raises(Stopped, match='SIGTERM'): search(cfg, space, 1, pruner=Terminating())
    study = search(cfg, space, 1)
    assert states(study) == ['FAIL', 'COMPLETE'] and study.trials[1].params == study.trials[0].params and study.trials[1].user_attrs['again'] == 0
    assert list(study.trials[1].intermediate_values) == [1, 2]                                        # the validation before the stop included

def test_a_failing_trial_costs_no_more_than_itself(cfg, tmp_path, monkeypatch, capsys):
    calls = []
    def fake(c, parent, observers):
        calls.append(c)
        if len(calls) in (1, 4): raise ConfigError('contradiction')
        if len(calls) == 2: observers[0].on_end(SimpleNamespace(finished=True, best={})); raise RunError('no validation gave a number')
        return c.lr.base_lr
    monkeypatch.setattr(module, 'trained', fake)
    study = search(cfg, file(tmp_path, 'lr.base_lr: {low: 1e-4, high: 1e-2, log: true}\nloss.gamma: [2, 0]'), 5)
    assert states(study) == ['FAIL', 'PRUNED', 'COMPLETE', 'FAIL'] + ['COMPLETE'] * 3
    assert [study.trials[i].user_attrs['note'] for i in (0, 1)] == ['contradiction', 'pruned: no validation gave a number'] and 'trial 0: contradiction' in capsys.readouterr().out
    assert study.best_value == max(c.lr.base_lr for i, c in enumerate(calls) if i not in (0, 1, 3)) and len({c.lr.base_lr for c in calls}) == 7
    assert (cfg.runs/'search/tiny-axes/importance.png').stat().st_size > 3000
    def broken(*_): raise RunError('no GPU')
    monkeypatch.setattr(module, 'trained', broken)
    with pytest.raises(RunError, match='three trials in a row failed, the last one with: no GPU'): search(cfg, tmp_path/'axes.yaml', 20)
    assert len(study.trials) == 10

def test_settings_that_another_process_has_in_hand_are_no_failure(cfg, tmp_path, monkeypatch):
    "Two searchers may draw the same point: the later one leaves it, however often"
    def busy(c, parent, observers): raise Busy('another process trains in this run folder')
    monkeypatch.setattr(module, 'trained', busy)
    study = search(cfg, file(tmp_path, 'loss.gamma: [2, 0]'), 4)
    assert states(study) == ['PRUNED'] * 4 and all('drawn twice' in t.user_attrs['note'] for t in study.trials)

@pytest.mark.parametrize('fields', [{}, {'model.architecture': 'fpn'}, {'model.options': {}}, {'loss_weights.dice': 2., 'loss.gamma': 3}, {'model.architecture': 'unet', 'model.options': {'encoder_depth': 4}}])
def test_an_overlay_of_fields_is_the_trial(tiny, tmp_path, fields):
    "What best.yaml holds, laid over the config, is what was trained: another architecture drops the options of the old one there, too"
    overlay = tmp_path/'best.yaml'; overlay.write_text(json.dumps(put({}, fields)))
    assert load(tiny[1], overlay) == lay(load(tiny[1]), fields)

def test_the_chance_is_that_of_the_pairs_there_are():
    whole, holed = ([[.5, .5, .5], [.6, .61, .6]], [[.5, .5, .5], [.6, .61, math.nan]])
    assert 'With 3 seeds at most one in 27' in str(Ablation('pr_auc@200', ['a', 'b'], [42, 43, 44], np.array(whole)))
    assert 'With 2 seeds at most one in 9' in str(Ablation('pr_auc@200', ['a', 'b'], [42, 43, 44], np.array(holed)))

# --- commands

def test_commands(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path); monkeypatch.setattr(module, 'trained', lambda c, *_: .5 + c.loss.gamma / 10 + c.seed / 1000 - c.deterministic)
    config, grid, there = str(tiny[1]), str(file(tmp_path, 'loss.gamma: [2, 0]')), json.dumps([f'runs={tmp_path}/runs'])
    rtsseg_ablate(config=config, grid=grid, overrides=there); said = capsys.readouterr().out
    assert '1 comparison with the baseline (loss.gamma=2): 1 loss.' in said and said.splitlines()[-1].startswith('runs/ablation/tiny-axes-')
    rtsseg_search(config=config, space=grid, trials=4, study='mine', overrides=there); said = capsys.readouterr().out
    assert 'deterministic kernels are off' in said and 'best of 4 finished trials: pr_auc@native 0.7420 with loss.gamma=2' in said and 'runs/search/mine/best.yaml' in said
    rtsseg_search(config=config, space=grid, trials=1, study='slow', overrides=json.dumps([*json.loads(there), 'deterministic=true'])); assert 'deterministic' not in capsys.readouterr().out
    assert [t.value < 0 for t in optuna.load_study(study_name='slow', storage=f'sqlite:///{tmp_path}/runs/search/slow/study.db').trials] == [True]
    for bad in (lambda: rtsseg_ablate(config=config, grid='none.yaml'), lambda: rtsseg_ablate(config=config, grid=grid, seeds='a'), lambda: rtsseg_search(config=config, space=grid, storage='oracle://user:canary@nowhere/x', overrides=there)):
        with pytest.raises(SystemExit) as e: bad()
        said = capsys.readouterr(); assert e.value.code == 2 and said.err.startswith('error: ') and 'canary' not in said.out + said.err
