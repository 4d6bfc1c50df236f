"Searches and grids as users start them: refused early, pruned, killed and started again, and mirrored to a tracker"
import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from scipy.stats import ttest_rel

import rtsseg.ablation
import rtsseg.tuning
from helpers.runs import MODEL
from helpers.runs import tiny as tiny_run
from helpers.shell import processes
from rtsseg.ablation import MIN_DIFFERENCE, Ablation, ablate, compare_seeds
from rtsseg.cli import rtsseg_ablate, rtsseg_search
from rtsseg.config import BUILT_IN_SYSTEMS, ConfigError, find_config, find_system, load, to_yaml
from rtsseg.prepare import prepare
from rtsseg.runs import Busy, RunError, Stopped, config_hash, read_log
from rtsseg.tuning import search
from rtsseg.variants import Range, check_variants, combinations, read_axes, set_fields, with_fields

ROOT = Path(__file__).parents[1]
READY = sorted((ROOT/'configs'/'search').glob('*.yaml'))

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "A config of a second a run, and the file that holds it"
    folder = tmp_path_factory.mktemp('world')
    cfg = tiny_run(
        folder,
        epochs=2,
        batch_size=2,
        lr=dict(base_lr=1e-3, backbone_lr_multiplier=1., warmup_epochs=0),
        sampler=dict(curriculum=[dict(first=1, last=2, ratio=1)]),
        metrics=dict(monitor='pr_auc@native'),
        # a resume checkpoint after every step
        checkpoint=dict(resume_minutes=1e-4),
        model=MODEL | dict(encoder='tu-test_resnet'),
    )
    (folder/'tiny.yaml').write_text(to_yaml(cfg))
    return cfg, folder/'tiny.yaml'

@pytest.fixture
def cfg(tiny, tmp_path):
    "The config with a runs folder of its own"
    return tiny[0].model_copy(update=dict(runs=tmp_path/'runs'))

def write_axes(folder, text, name='axes.yaml'):
    "A file of what to try"
    (folder/name).write_text(text)
    return folder/name

def rts_axes(path):
    return read_axes(path, find_system('rts').Config)

def data_hash(cfg):
    "Hash of the data of a config"
    return prepare(cfg).hash

def states(study):
    return [trial.state.name for trial in study.trials]

def raises(error):
    "A function that raises, whatever it is called with"
    def fail(*arguments):
        raise error
    return fail

# ---------------------------------------------------------------- the rule

def paired(numbers):
    "Baseline and variant as a row each; multiples of 1/1024 are exact in binary, and so are their differences"
    return np.array(numbers).T / 1024

SCORES = st.lists(st.tuples(st.integers(0, 1024), st.integers(0, 1024)), min_size=2, max_size=9).map(paired)

@given(SCORES, st.integers(-4096, 4096))
def test_what_a_seed_does_to_both_does_not_count(scores, shift):
    assert compare_seeds(*(scores + shift / 1024)) == compare_seeds(*scores)

@given(SCORES)
def test_a_loss_is_a_gain_seen_from_the_other_side(scores):
    there, back = compare_seeds(*scores), compare_seeds(*scores[::-1])
    mirrored = {'gain': 'loss', 'loss': 'gain', 'noise': 'noise'}
    assert (there.mean, there.std) == (-back.mean, back.std)
    assert there.verdict == mirrored[back.verdict]

@given(SCORES)
def test_where_small_values_are_good_gain_and_loss_change_places(scores):
    assert compare_seeds(*scores, mode='min').verdict == compare_seeds(*scores[::-1]).verdict

@given(SCORES)
def test_a_gain_is_significant_by_another_library(scores):
    "d > 2σ is t > 2√n in a paired t-test"
    baseline, variant = scores
    if compare_seeds(baseline, variant).verdict != 'gain':
        return
    assert (variant > baseline).all()
    assert variant.mean() - baseline.mean() > MIN_DIFFERENCE
    if np.ptp(variant - baseline) > 0:
        assert ttest_rel(variant, baseline).statistic > 2 * math.sqrt(len(variant)) * (1 - 1e-9)

@pytest.mark.parametrize('baseline, variant, verdict', [
    # mean 0.04, 2σ = 0.02
    ([.50, .50, .50], [.53, .54, .55], 'gain'),
    # every seed agrees, and it is too little
    ([.50, .50, .50], [.509, .509, .509], 'noise'),
    ([.50, .50, .50], [.511, .511, .511], 'gain'),
    # seeds move the score by 0.2, and both alike
    ([.80, .60, .70], [.83, .64, .75], 'gain'),
    # the same six numbers, paired otherwise
    ([.80, .60, .70], [.75, .64, .83], 'noise'),
    # mean 0.089 > 2σ = 0.067, and one seed against
    ([.50] * 9, [.60] * 8 + [.4999], 'noise'),
    # a run that failed is left out with its pair
    ([.50, math.nan, .50], [.53, .54, .55], 'gain'),
    ([.50, math.nan], [.53, .54], 'no verdict: 1 paired seed'),
    ([math.nan], [.5], 'no verdict: 0 paired seeds'),
])
def test_verdicts_by_hand(baseline, variant, verdict):
    assert compare_seeds(baseline, variant).verdict == verdict

def test_a_table_says_what_it_rests_on():
    text = str(Ablation(
        monitor='pr_auc@200',
        variants=['a', 'b', 'c'],
        seeds=[42, 43],
        values=np.array([[.50, .52], [.58, .60], [.50, math.nan]]),
        failed=['seed 43, c failed: no memory'],
    ))
    assert '| b | 0.5800 | 0.6000 | 0.5900 ± 0.0141 | +0.0800 ± 0.0000 | gain |' in text
    assert '| c | 0.5000 | – | 0.5000 | +0.0000 | no verdict: 1 paired seed |' in text
    assert '2 comparisons with the baseline (a): 1 gain, 1 no verdict' in text
    for words in ('pr_auc@200', 'test split was never touched', 'no memory', 'exceeds max(2σ, 0.01)'):
        assert words in text

def test_a_table_of_one_seed_has_no_verdict():
    text = str(Ablation('pr_auc@200', ['a', 'b'], [42], np.array([[.5], [.9]])))
    assert 'A single seed gives no verdict' in text

@pytest.mark.parametrize('variant, words', [
    ([.6, .61, .6], 'With 3 seeds at most one in 27'),
    ([.6, .61, math.nan], 'With 2 seeds at most one in 9'),
])
def test_the_chance_is_that_of_the_pairs_there_are(variant, words):
    assert words in str(Ablation('pr_auc@200', ['a', 'b'], [42, 43, 44], np.array([[.5, .5, .5], variant])))

# ---------------------------------------------------------------- files of what to try

@pytest.mark.parametrize('text, why', [
    ('loss.gama: [1, 2]', "axes.yaml: loss.gama=1: loss.gama: no such setting (did you mean 'gamma'?)"),
    ('loss: {a: {}, b: {loss.parts: [dcie]}}', 'axes.yaml: loss=b: loss.parts'),
    ('loss: {a: {}, b: {loss: {pats: [dice]}}}', "loss=b: loss.pats: no such setting (did you mean 'parts'?)"),
    ('loss.alpha: [0.25, 7]', 'loss.alpha=7: loss.alpha'),
    ('model.encoder: [tu-test_resnet, resnet81]', "model.encoder=resnet81: model.encoder: "),
    ('model.in_channels: [3, 4]', 'model.in_channels=4: model.in_channels is 4, but RGB'),
    ('b: {none: {}, snow: {data.extra_bands: [snow], model.in_channels: 4}}', "described as 'snow'"),
    ('seed: [42, 43]', 'seed=43: is the same run as seed=42'),
    ('loss.gamma: [2, 2.0]', 'loss.gamma=2.0: is the same run as loss.gamma=2'),
    ('metrics.monitor: [pr_auc@native, pr_auc@200]', 'cannot vary'),
    ('loss.gamma: [1, 1]', 'twice'),
    ('loss.gamma: 3', 'not 3'),
    ('loss.gamma: []', 'not []'),
    ('loss: {a: 1, b: {}}', 'no such setting of a range'),
    ('', 'nothing to try'),
    ('- 1', 'a mapping was expected'),
    ('loss.gamma: [1, 2]\nloss.gamma: [3]', 'loss.gamma'),
])
@pytest.mark.parametrize('command', [
    lambda cfg, path: search(cfg, path, 1),
    lambda cfg, path: ablate(cfg, path),
], ids=['search', 'ablate'])
def test_nothing_is_trained_or_written_where_something_is_wrong(cfg, tmp_path, text, why, command):
    with pytest.raises(ConfigError) as error:
        command(cfg, write_axes(tmp_path, text))
    assert why in str(error.value)
    assert 'axes.yaml' in str(error.value)
    assert not cfg.runs.exists()

@pytest.mark.parametrize('text, why', [
    ('lr.base_lr: {low: 1, high: 2, lg: true}', "'log'"),
    ('lr.base_lr: {low: 0, high: 1, log: true}', 'above 0'),
    ('lr.base_lr: {low: 1}', 'high: Field required'),
    ('lr.base_lr: {low: -1, high: 1}', 'lr.base_lr=-1: lr.base_lr'),
    ('accumulate: {low: 1, high: 2.5}', 'accumulate=2.5'),
    ('name: {low: 1, high: 2}', 'name=1: name'),
])
def test_ranges_are_checked_at_both_ends(cfg, tmp_path, text, why):
    with pytest.raises(ConfigError, match='axes.yaml') as error:
        search(cfg, write_axes(tmp_path, text), 1)
    assert why in str(error.value)

@pytest.mark.parametrize('text, why', [
    ('lr.base_lr: {low: 1, high: 2}', 'a range is for rtsseg-search'),
    ('loss.gamma: [2]', 'nothing to be compared with'),
    ('loss.gamma: [1, 2]\nloss: {a: {}, b: {loss.gamma: 3}}', 'loss.gamma is set by two axes'),
])
def test_grids_have_an_end_and_a_baseline(cfg, tmp_path, text, why):
    with pytest.raises(ConfigError, match='axes.yaml') as error:
        ablate(cfg, write_axes(tmp_path, text))
    assert why in str(error.value)

def test_a_path_is_relative_to_its_file(tmp_path):
    text = 'model.weights: [imagenet, weights/a.pt]\nw: {b: {model: {weights: weights/b.pt}}}'
    axes = rts_axes(write_axes(tmp_path, text))
    first = [fields['model.weights'] for fields in axes['model.weights'].values()]
    assert first == ['imagenet', str(tmp_path/'weights'/'a.pt')]
    assert axes['w']['b'] == {'model.weights': str(tmp_path/'weights'/'b.pt')}

@pytest.mark.parametrize('fields', [
    {},
    {'model.architecture': 'fpn'},
    {'model.options': {}},
    {'loss_weights.dice': 2., 'loss.gamma': 3},
    {'model.architecture': 'unet', 'model.options': {'encoder_depth': 4}},
])
def test_an_overlay_of_fields_is_the_trial(tiny, tmp_path, fields):
    """best.yaml, laid over the config, gives what was trained: there too, another architecture drops the options of the
    old one"""
    overlay = tmp_path/'best.yaml'
    overlay.write_text(json.dumps(set_fields({}, fields)))
    assert load(tiny[1], overlay) == with_fields(load(tiny[1]), fields)

# ---------------------------------------------------------------- the files in configs/search

def base_of(path):
    "The config that a ready file is made for"
    if path.stem == 'plan':
        # as the first lines of the file say
        return load(ROOT/'configs'/'toy.yaml', overrides=['budget_minutes=null', 'steps_per_epoch=200'])
    return load(ROOT/'configs'/('toy.yaml' if path.stem == 'extra' else 'rts_baseline.yaml'))

def is_space(path):
    "Whether a ready file holds a range"
    return any(isinstance(axis, Range) for axis in rts_axes(path).values())

def test_ready_files_begin_with_a_comment():
    assert READY
    for path in READY:
        assert path.read_text().startswith('# ')

@pytest.mark.parametrize('path', [path for path in READY if is_space(path)], ids=lambda path: path.stem)
def test_ready_spaces_fit_the_configs(path):
    base = base_of(path)
    for name, axis in rts_axes(path).items():
        if isinstance(axis, Range):
            for value in (axis.low, axis.high):
                with_fields(base, {name: value})
        else:
            for fields in axis.values():
                with_fields(base, fields)

@pytest.mark.parametrize('path', [path for path in READY if not is_space(path)], ids=lambda path: path.stem)
def test_ready_grids_fit_the_configs(path):
    base = base_of(path)
    found = [with_fields(base, fields) for fields in combinations(rts_axes(path), path).values()]
    assert len({config_hash(cfg) for cfg in found}) == len(found)
    # the others begin with another loss, or with RGB alone
    if path.stem not in ('tversky', 'focal_dice', 'extra'):
        assert found[0] == base

@pytest.mark.parametrize('name, field, values', [
    ('focal', 'loss.gamma', {1, 2, 3, 5}),
    ('focal', 'loss.alpha', {.1, .25, .5, .75}),
    ('tversky', 'loss.tversky_alpha', {.3, .5, .7}),
    ('tversky', 'loss.tversky_beta', {.3, .5, .7}),
    ('focal_dice', 'loss_weights.focal', {.5, 1, 2}),
    ('focal_dice', 'loss_weights.dice', {.5, 1, 2}),
    ('encoders', 'model.encoder', {'efficientnet-b3', 'efficientnet-b5', 'efficientnet-b7'}),
])
def test_ready_files_have_the_ranges_of_the_guide(name, field, values):
    axes = rts_axes(ROOT/'configs'/'search'/f'{name}.yaml')
    assert {fields[field] for fields in axes[field].values()} == values

def test_the_sweep_of_extra_channels_sets_bands_and_channels_together(cfg):
    "Models are built, and bands are read"
    path = ROOT/'configs'/'search'/'extra.yaml'
    found = list(check_variants(cfg, combinations(rts_axes(path), path), path).values())
    both = ['ndvi', 'relative_elevation']
    assert [new.data.extra_bands for new in found] == [[], both[:1], both[1:], both, both]
    assert [new.model.in_channels for new in found] == [3, 4, 4, 5, 5]
    assert [new.model.fusion for new in found] == ['early'] * 4 + ['late']

# ---------------------------------------------------------------- grids

def with_mlflow(cfg, **fields):
    "The config with a tracker, and other fields"
    tracker = cfg.tracker.model_copy(update=dict(kind='mlflow'))
    return cfg.model_copy(update=dict(tracker=tracker, **fields))

def check_tracker(cfg, found, runs):
    "The tracker has the grid's run with its files, and the other runs below it"
    client = MlflowClient(f"sqlite:///{cfg.runs/'mlflow.db'}")
    parent = json.loads((found.folder/'tracker.json').read_text())['run_id']
    tracked = client.search_runs([client.get_experiment_by_name('rtsseg').experiment_id])
    assert len(tracked) == runs + 1
    for run in tracked:
        assert run.info.status == 'FINISHED'
        if run.info.run_id == parent:
            assert run.info.run_name == found.folder.name
        else:
            assert run.data.tags['mlflow.parentRunId'] == parent
    files = {file.path for file in client.list_artifacts(parent)}
    assert files == {'table.md', 'table.csv', 'differences.png'}

def test_a_grid_is_trained_nested_and_resumed(cfg, tmp_path, capfd):
    cfg = with_mlflow(cfg, epochs=1)
    grid = write_axes(tmp_path, 'loss.gamma: [2, 0]', 'gamma.yaml')
    first = ablate(cfg, grid, [42])
    assert first.comparisons[0].verdict == 'no verdict: 1 paired seed'
    found = ablate(cfg, grid, [42, 43])
    assert capfd.readouterr().out.count('trained already') == 2
    assert np.isfinite(found.values).all()
    assert found.values[:, 0].tolist() == first.values[:, 0].tolist()
    for gamma, values in zip([2, 0], found.values):
        name = config_hash(with_fields(cfg, {'loss.gamma': gamma}), data_hash(cfg))
        for seed, value in zip([42, 43], values):
            run = cfg.runs/'tiny'/name/f'seed{seed}'
            assert load(run/'config.yaml').loss.gamma == gamma
            assert max(row['val/pr_auc@native'] for row in read_log(run)) == value
    assert found.folder == first.folder
    assert found.folder.parent == cfg.runs/'ablation'
    table = pd.read_csv(found.folder/'table.csv')
    assert table['seed 43'].to_list() == found.values[:, 1].tolist()
    assert table['verdict'].to_list() == ['baseline', found.comparisons[0].verdict]
    assert (found.folder/'table.md').read_text() == f'{found}\n'
    assert (found.folder/'differences.png').stat().st_size > 5000
    check_tracker(cfg, found, runs=4)

def test_a_failed_run_is_a_hole_in_the_table(cfg, tmp_path, monkeypatch):
    def train_and_score(cfg, *_):
        if cfg.loss.gamma == 0 and cfg.seed == 43:
            raise RunError('the GPU is on fire')
        return .6 if cfg.loss.gamma == 0 else .5

    monkeypatch.setattr(rtsseg.ablation, 'train_and_score', train_and_score)
    found = ablate(cfg, write_axes(tmp_path, 'loss.gamma: [2, 0]'), [42, 43, 44])
    assert found.comparisons[0].verdict == 'gain'
    assert math.isnan(found.values[1, 1])
    assert 'seed 43, loss.gamma=0 failed: the GPU is on fire' in str(found)

def test_a_grid_that_is_asked_to_stop_stops(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(rtsseg.ablation, 'train_and_score', raises(Stopped('SIGTERM')))
    with pytest.raises(Stopped):
        ablate(cfg, write_axes(tmp_path, 'loss.gamma: [2, 0]'))

# ---------------------------------------------------------------- searches

SPACE = '''
lr.base_lr: {low: 1e-4, high: 1e-2, log: true}
loss.gamma: [2, 0, 5]
accumulate: {low: 1, high: 2}
'''

class AfterFirst(optuna.pruners.BasePruner):
    "Prunes every trial but the first, at its first validation"

    def prune(self, study, trial):
        return trial.number > 0

class SignalAt(optuna.pruners.BasePruner):
    "Sends a signal to this process at the first validation of a trial, and prunes nothing"

    def __init__(self, number, trial):
        self.number, self.trial = number, trial

    def prune(self, study, trial):
        if trial.number == self.trial:
            os.kill(os.getpid(), self.number)
        return False

def values_by_epoch(log):
    return {row['epoch']: row['val/pr_auc@native'] for row in log}

def test_a_search_prunes_and_leaves_an_overlay(cfg, tiny, tmp_path, capsys):
    space = write_axes(tmp_path, SPACE, 'space.yaml')
    study = search(cfg, space, 3, pruner=AfterFirst())
    printed = capsys.readouterr().out
    assert states(study) == ['COMPLETE', 'PRUNED', 'PRUNED']
    # a pruned trial stops at the validation that prunes it
    logs = [read_log(cfg.runs/trial.user_attrs['run']) for trial in study.trials]
    assert [len(log) for log in logs] == [2, 1, 1]
    assert [trial.intermediate_values for trial in study.trials] == [values_by_epoch(log) for log in logs]
    assert study.best_value == max(values_by_epoch(logs[0]).values())
    assert 'trial 1: pruned at epoch 1' in printed
    assert str(tmp_path) not in printed
    folder = cfg.runs/'search'/'tiny-space'
    # importances need two finished trials
    names = {path.name for path in folder.iterdir()}
    assert names == {'study.db', 'study.pkl', 'trials.csv', 'best.yaml', 'history.png'}
    assert pd.read_csv(folder/'trials.csv')['note'].to_list()[1:] == ['pruned at epoch 1'] * 2
    best = load(tiny[1], folder/'best.yaml', runs=cfg.runs)
    assert best == load(cfg.runs/study.trials[0].user_attrs['run']/'config.yaml')
    assert isinstance(study.best_params['accumulate'], int)

def test_a_search_that_has_its_trials_does_nothing(cfg, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rtsseg.tuning, 'train_and_score', lambda cfg, *_: cfg.lr.base_lr)
    space = write_axes(tmp_path, SPACE)
    search(cfg, space, 3)
    capsys.readouterr()
    assert len(search(cfg, space, 3).trials) == 3
    assert capsys.readouterr().out == ''

def test_another_search_needs_another_name(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(rtsseg.tuning, 'train_and_score', lambda cfg, *_: cfg.lr.base_lr)
    space = write_axes(tmp_path, SPACE)
    search(cfg, space, 1)
    with pytest.raises(ConfigError, match='another config'):
        search(cfg.model_copy(update=dict(epochs=3)), space, 2)
    with pytest.raises(ConfigError, match='another space'):
        search(cfg, write_axes(tmp_path, 'loss.gamma: [2, 0]'), 2)

def test_files_that_a_finished_search_lacks_are_written(cfg, tmp_path):
    "As where it was killed between its last trial and its files"
    space = write_axes(tmp_path, SPACE)
    folder = cfg.runs/'search'/search(cfg, space, 1).study_name
    written = (folder/'trials.csv').read_bytes()
    (folder/'trials.csv').unlink()
    search(cfg, space, 1)
    assert (folder/'trials.csv').read_bytes() == written

def search_and_die(config, space):
    "In a process of its own: kill -9 at the first validation of the second trial"
    search(load(config), space, 3, pruner=SignalAt(signal.SIGKILL, trial=1))

def test_a_killed_search_resumes_with_the_same_parameters(cfg, tmp_path, monkeypatch):
    "The killed trial is tried again, from its checkpoint, and the search ends as it would have ended"
    space = write_axes(tmp_path, SPACE)
    undisturbed = search(cfg.model_copy(update=dict(runs=tmp_path/'undisturbed')), space, 3)
    (tmp_path/'tiny.yaml').write_text(to_yaml(cfg))
    victim = processes.Process(target=search_and_die, args=[tmp_path/'tiny.yaml', space])
    victim.start()
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    monkeypatch.setattr(rtsseg.tuning, 'HEARTBEAT', 1)
    study = search(cfg, space, 3)
    assert sorted(states(study)) == ['COMPLETE', 'COMPLETE', 'COMPLETE', 'FAIL']
    repeat, = [trial for trial in study.trials if 'again' in trial.user_attrs]
    killed = undisturbed.trials[1]
    assert repeat.user_attrs['again'] == 1
    assert repeat.params == study.trials[1].params == killed.params
    assert repeat.user_attrs['run'] == killed.user_attrs['run']
    # it resumed, and did not start over
    log = (cfg.runs/killed.user_attrs['run']/'log.jsonl').read_text().splitlines()
    starts = [json.loads(line) for line in log if '"start"' in line]
    assert len(starts) == 2
    assert starts[1]['step'] > 0
    assert results(study) == results(undisturbed)

def results(study):
    "Parameters, value and validations of each finished trial"
    done = [trial for trial in study.trials if trial.state.name == 'COMPLETE']
    return {str(trial.params): (trial.value, trial.intermediate_values) for trial in done}

def search_by_rate(config, space):
    "A search whose trials are not trained: their value is their rate"
    rtsseg.tuning.train_and_score = lambda cfg, *_: cfg.lr.base_lr
    rtsseg.tuning.HEARTBEAT = 1
    return search(load(config), space, 3)

def killed_at_call(count, step):
    "A step; the call of this number kills the process"
    calls = iter(range(1, count))

    def begin(*args):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args)
    return begin

OWNERS = dict(sampler=rtsseg.tuning.KeyedSampler, module=rtsseg.tuning)

def search_until(owner, step, count, config, space):
    "In a process of its own: kill -9 before a step"
    owner = OWNERS[owner]
    setattr(owner, step, killed_at_call(count, getattr(owner, step)))
    search_by_rate(config, space)

BETWEEN_STEPS = {
    'created': [('sampler', 'send_heartbeat', 2)],
    'drawn, and not drawn again': [('module', 'run_folder', 2), ('module', 'suggest_fields', 1)],
    'failed, not queued': [('module', 'suggest_fields', 2), ('module', 'queue_again', 1)],
}

@pytest.mark.parametrize('kills', BETWEEN_STEPS.values(), ids=BETWEEN_STEPS)
def test_a_search_killed_between_two_steps_of_a_trial_tries_the_same_parameters(kills, cfg, tmp_path):
    space = write_axes(tmp_path, SPACE)
    configs = tmp_path/'undisturbed.yaml', tmp_path/'tiny.yaml'
    configs[0].write_text(to_yaml(cfg.model_copy(update=dict(runs=tmp_path/'undisturbed'))))
    configs[1].write_text(to_yaml(cfg))
    for kill in kills:
        victim = processes.Process(target=search_until, args=[*kill, configs[1], space])
        victim.start()
        victim.join()
        assert victim.exitcode == -signal.SIGKILL
    with processes.Pool(1) as pool:
        expected, found = (results(pool.apply(search_by_rate, [config, space])) for config in configs)
    assert len(expected) == 3
    assert found == expected

def test_a_terminated_search_stops_and_resumes(cfg, tmp_path):
    space = write_axes(tmp_path, SPACE)
    with pytest.raises(Stopped, match='SIGTERM'):
        search(cfg, space, 1, pruner=SignalAt(signal.SIGTERM, trial=0))
    study = search(cfg, space, 1)
    assert states(study) == ['FAIL', 'COMPLETE']
    first, second = study.trials
    assert second.params == first.params
    assert second.user_attrs['again'] == 0
    # the validation before the stop included
    assert list(second.intermediate_values) == [1, 2]

def test_a_failing_trial_costs_no_more_than_itself(cfg, tmp_path, monkeypatch, capsys):
    rates = []

    def train_and_score(cfg, parent, observers):
        rates.append(cfg.lr.base_lr)
        if len(rates) in (1, 4):
            raise ConfigError('contradiction')
        if len(rates) == 2:
            observers[0].on_end(SimpleNamespace(finished=True, best={}))
            raise RunError('no validation gave a number')
        return cfg.lr.base_lr

    monkeypatch.setattr(rtsseg.tuning, 'train_and_score', train_and_score)
    space = write_axes(tmp_path, 'lr.base_lr: {low: 1e-4, high: 1e-2, log: true}\nloss.gamma: [2, 0]')
    study = search(cfg, space, 5)
    assert states(study) == ['FAIL', 'PRUNED', 'COMPLETE', 'FAIL', 'COMPLETE', 'COMPLETE', 'COMPLETE']
    notes = [trial.user_attrs.get('note') for trial in study.trials]
    assert notes[:2] == ['contradiction', 'pruned: no validation gave a number']
    assert 'trial 0: contradiction' in capsys.readouterr().out
    assert study.best_value == max(rates[2:3] + rates[4:])
    assert len(set(rates)) == 7
    assert (cfg.runs/'search'/'tiny-axes'/'importance.png').stat().st_size > 3000
    # three in a row end the search
    monkeypatch.setattr(rtsseg.tuning, 'train_and_score', raises(RunError('no GPU')))
    with pytest.raises(RunError, match='three trials in a row failed, the last one with: no GPU'):
        search(cfg, space, 20)
    assert len(study.trials) == 10

def test_settings_that_another_process_trains_are_not_a_failure(cfg, tmp_path, monkeypatch):
    "Two searchers may draw the same settings: the later one leaves them, however often"
    monkeypatch.setattr(rtsseg.tuning, 'train_and_score', raises(Busy('another process trains in this run folder')))
    study = search(cfg, write_axes(tmp_path, 'loss.gamma: [2, 0]'), 4)
    assert states(study) == ['PRUNED'] * 4
    assert all('drawn twice' in trial.user_attrs['note'] for trial in study.trials)

# ---------------------------------------------------------------- commands

def score(cfg, *_):
    "A made-up value: deterministic runs have a negative one"
    return .5 + cfg.loss.gamma / 10 + cfg.seed / 1000 - cfg.deterministic

@pytest.fixture
def commands(tiny, tmp_path, monkeypatch):
    "A config, a file of what to try, and overrides, for commands that train nothing"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rtsseg.ablation, 'train_and_score', score)
    monkeypatch.setattr(rtsseg.tuning, 'train_and_score', score)
    axes = write_axes(tmp_path, 'loss.gamma: [2, 0]')
    return SimpleNamespace(config=str(tiny[1]), axes=str(axes), runs=f'runs={tmp_path}/runs')

def test_the_ablate_command(commands, capsys):
    rtsseg_ablate(config=commands.config, grid=commands.axes, overrides=json.dumps([commands.runs]))
    printed = capsys.readouterr().out
    assert '1 comparison with the baseline (loss.gamma=2): 1 loss.' in printed
    assert printed.splitlines()[-1].startswith('runs/ablation/tiny-axes-')

def test_the_search_command(commands, tmp_path, capsys):
    given = dict(config=commands.config, space=commands.axes)
    rtsseg_search(**given, trials=4, study='mine', overrides=json.dumps([commands.runs]))
    printed = capsys.readouterr().out
    assert 'deterministic kernels are off' in printed
    assert 'best of 4 finished trials: pr_auc@native 0.7420 with loss.gamma=2' in printed
    assert 'runs/search/mine/best.yaml' in printed
    slow = json.dumps([commands.runs, 'deterministic=true'])
    rtsseg_search(**given, trials=1, study='slow', overrides=slow)
    assert 'deterministic' not in capsys.readouterr().out
    storage = f"sqlite:///{tmp_path/'runs'/'search'/'slow'/'study.db'}"
    trial, = optuna.load_study(study_name='slow', storage=storage).trials
    assert trial.value < 0

@pytest.mark.parametrize('name', BUILT_IN_SYSTEMS)
def test_what_a_search_tries_by_itself_fits_its_system(name):
    "Every field is one of its config; a system without such a file says so"
    system = find_system(name)
    space, trials = system.search_plan(system.Config())
    assert trials > 0 and (space or name in ('classify', 'landcover', 'plants'))
    if space:
        read_axes(find_config(space)[0], system.Config)

def test_a_search_that_is_not_said_to_try_anything_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        rtsseg_search(config=str(ROOT/'configs'/'classify.yaml'), override=[f'runs={tmp_path}'])
    said = capsys.readouterr().err
    assert said.startswith("error: system 'classify'") and '--space' in said
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('command, given', [
    (rtsseg_ablate, dict(grid='none.yaml')),
    (rtsseg_ablate, dict(seeds='a')),
    (rtsseg_search, dict(storage='oracle://user:canary@nowhere/x')),
])
def test_commands_refuse_in_one_message_without_a_password(commands, capsys, command, given):
    axes = dict(grid=commands.axes) if command is rtsseg_ablate else dict(space=commands.axes)
    with pytest.raises(SystemExit) as error:
        command(**dict(config=commands.config, overrides=json.dumps([commands.runs])) | axes | given)
    printed = capsys.readouterr()
    assert error.value.code == 2
    assert printed.err.startswith('error: ')
    assert 'canary' not in printed.out + printed.err
