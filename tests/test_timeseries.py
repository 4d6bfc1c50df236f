"""The system of time series from its config alone: trained, killed and resumed to the same bytes, evaluated, reported,
searched and tested in one command; weights that open without the library; padding that changes no bit"""
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rtsseg.tuning
from helpers.shell import ONE_THREAD, Program, held, running, shell
from helpers.waiting import wait_for
from rtsseg.checkpoint import load_state
from rtsseg.class_export import CLASS_FORMATS, LOGITS, SERIES_INPUTS, export_any, runner_of, session_runner
from rtsseg.config import ConfigError, find_system, load, to_yaml
from rtsseg.console import DataError
from rtsseg.evaluation import evaluate
from rtsseg.noise import measure_noise
from rtsseg.reporting import report
from rtsseg.runs import read_log, run_folder
from rtsseg.season import SeasonWorld, make_season
from rtsseg.series_models import INPUTS, DualStreamUNET3D, DualUNet3D, padded_series, random_series
from rtsseg.systems.timeseries import SeriesTask
from rtsseg.training import train
from rtsseg.tuning import judge_best, search
from rtsseg.variants import Range, read_axes
from rtsseg.weights import ModelError

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT/'configs'/'timeseries'
SMALL = dict(side=32, train=4, val=2, test=2, dates1=(5, 7), dates2=(4, 6))

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "As the trainers that a test starts"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

@pytest.fixture(scope='module')
def season(tmp_path_factory):
    return make_season(tmp_path_factory.mktemp('world')/'season', SeasonWorld(**SMALL))

def paths(season):
    return {f'base_{split}_path': season/split for split in ('train', 'val', 'test')}

def config(season, runs, data=(), **more):
    "configs/timeseries/toy.yaml on a smaller season"
    small = dict(runs=runs, epochs=4, batch_size=4, tracker=dict(kind='none'), early_stopping=dict(patience=3),
                 data=paths(season) | dict(patch=16, made=None) | dict(data), lr=dict(base_lr=5e-3, min_lr=1e-4),
                 model=dict(depth=2, filters=4, dropout=.1))
    return load(CONFIGS/'toy.yaml', **small | more)

@pytest.fixture(scope='module')
def undisturbed(season, tmp_path_factory):
    return train(config(season, tmp_path_factory.mktemp('runs')))

def weights_of(folder):
    return (folder/'model'/'model.safetensors').read_bytes()

# ---------------------------------------------------------------- training

def test_it_trains_on_the_validation_loss(undisturbed):
    rows = read_log(undisturbed)
    losses = [row['val/loss'] for row in rows]
    assert min(losses) < losses[0] and rows[-1]['train/loss/cross_entropy'] < rows[0]['train/loss/cross_entropy']
    best = json.loads((undisturbed/'model'/'metrics.json').read_text())
    assert best['value'] == min(losses) and best['epoch'] == 1 + int(np.argmin(losses))
    assert all(0 <= row['train/accuracy'] <= 1 and 0 <= row['val/miou'] <= 1 for row in rows)

def test_killed_it_ends_in_the_same_bytes(season, undisturbed, tmp_path):
    "kill -9 after an epoch; weights and best_model.pth are those of a run that nothing disturbed"
    cfg = config(season, tmp_path/'runs', checkpoint=dict(resume_minutes=1e-6))
    (tmp_path/'cfg.yaml').write_text(to_yaml(cfg))
    folder = run_folder(cfg, find_system('timeseries').feed(cfg).hash)
    program = ['rtsseg-train', '--config', tmp_path/'cfg.yaml', '--inline']
    with running(Program(*program, env=held(folder, 2))) as process:
        wait_for(lambda: 'epoch   2/4' in process.printed() or process.poll() is not None)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert train(cfg) == folder
    assert weights_of(folder) == weights_of(undisturbed)
    assert (folder/'best_model.pth').read_bytes() == (undisturbed/'best_model.pth').read_bytes()

@pytest.mark.parametrize('more', [dict(loader=dict(num_workers=2)), dict(data=dict(budget_mb=0))],
                         ids=['workers', 'disk'])
def test_results_depend_neither_on_workers_nor_on_memory(season, undisturbed, tmp_path, more):
    folder = train(config(season, tmp_path, **more))
    assert weights_of(folder) == weights_of(undisturbed)

@pytest.mark.slow
def test_two_processes_equal_one(season, tmp_path):
    "The same micro-batches, by accumulation in one process and by the launcher of rtsseg-train in two: gloo"
    runs = {}
    for processes in (1, 2):
        cfg = config(season, tmp_path/f'runs{processes}', batch_size=2, accumulate=2 // processes, epochs=2,
                     model=dict(depth=2, filters=4, dropout=0))
        (tmp_path/'cfg.yaml').write_text(to_yaml(cfg))
        done = shell('rtsseg-train', '--config', tmp_path/'cfg.yaml', '--processes', processes, env=ONE_THREAD)
        assert done.returncode == 0, done.stdout + done.stderr
        runs[processes] = run_folder(cfg, find_system('timeseries').feed(cfg).hash)
    one, two = (load_state(folder/'checkpoints'/'best.ckpt')['model'] for folder in runs.values())
    for name, tensor in one.items():
        assert (tensor - two[name]).abs().max() < 2e-6, name
    rows = [read_log(folder) for folder in runs.values()]
    for a, b in zip(*rows, strict=True):
        assert a['step'] == b['step']
        for name in ('val/loss', 'val/accuracy', 'train/loss/cross_entropy', 'train/accuracy'):
            assert a[name] == pytest.approx(b[name], abs=1e-5), name

def test_it_stops_early_and_clips(season, tmp_path):
    "Patience counts epochs without a lower validation loss; the rate of 0.3 lets it rise"
    cfg = config(season, tmp_path, epochs=12, early_stopping=dict(patience=1, min_delta=10.),
                 optimizer=dict(clip_norm=.01))
    rows = read_log(train(cfg))
    assert len(rows) == 2 and rows[0]['grad_norm/max'] > .01

@pytest.mark.parametrize('more', [dict(s1=[]), dict(s2=[]), dict(static=[])], ids=['s2', 's1', 'no_static'])
def test_a_stream_may_be_left_out(season, tmp_path, more):
    folder = train(config(season, tmp_path, more, epochs=1))
    assert math.isfinite(read_log(folder)[0]['val/loss'])
    assert len(evaluate(folder, 'val').read_bytes())

def test_the_placeholder_trains(season, tmp_path):
    cfg = load(CONFIGS/'toy.yaml', CONFIGS/'placeholder.yaml', runs=tmp_path, epochs=2, batch_size=4,
               tracker=dict(kind='none'), early_stopping=dict(patience=2),
               data=paths(season) | dict(patch=16, made=None), model=dict(depth=4, filters=32, dropout=.1))
    rows = read_log(train(cfg))
    assert rows[1]['train/loss/cross_entropy'] < rows[0]['train/loss/cross_entropy']
    assert [line for line in cfg.doubtful_settings() if 'model' in line] == []

class OwnModel(nn.Module):
    "A model of a user: the mean of the optical stream, and one convolution"
    def __init__(self, s1, s2, static, classes, size=1):
        super().__init__()
        self.head = nn.Conv2d(s2, classes, size, padding=size // 2)

    def forward(self, s1, s2, static, present1, present2, valid1, valid2, day1, day2):
        return self.head(s2.sum(2) / valid2.sum(1, keepdim=True).clamp_min(1))

def test_a_model_of_a_user_takes_its_place(season, tmp_path):
    own = dict(name='test_timeseries:OwnModel', options=dict(size=3), depth=4, filters=32, dropout=.1)
    folder = train(config(season, tmp_path, epochs=1, model=own))
    assert find_system('timeseries').unpack(folder/'model').model.head.kernel_size == (3, 3)

# ---------------------------------------------------------------- padding

SMALLEST = dict(depth=2, filters=4)
MODELS = [lambda: DualStreamUNET3D(2, 3, 1, 4), lambda: DualUNet3D(2, 3, 1, 4, fusion='concat', **SMALLEST),
          lambda: DualUNet3D(2, 3, 1, 4, fusion='attention', **SMALLEST)]
PAIRS = st.tuples(st.integers(1, 9), st.integers(1, 9))
MORE = st.tuples(st.integers(0, 19), st.integers(0, 19))

@pytest.mark.parametrize('build', MODELS, ids=['placeholder', 'concat', 'attention'])
@settings(deadline=None, max_examples=25)
@given(PAIRS, MORE, st.integers(0, 99))
def test_padding_changes_no_bit_of_a_logit(build, times, more, seed):
    torch.manual_seed(seed)
    model, batch = build().eval(), random_series((2, 3, 1), times, 8, seed=seed)
    # the second sample is shorter than the first
    short = seed % times[0]
    for name in ('present1', 'valid1'):
        batch[name][1, times[0] - short:] = False
    padded = padded_series(batch, more)
    padded['s1'][1, :, times[0] - short:] = math.nan
    with torch.no_grad():
        assert model(**batch).equal(model(**padded))

@settings(deadline=None, max_examples=15)
@given(st.integers(1, 6), st.integers(0, 12), st.integers(0, 99))
def test_a_short_series_among_long_ones_gives_what_it_gives_alone(length, more, seed):
    torch.manual_seed(seed)
    model = DualUNet3D(2, 3, 1, 4, **SMALLEST).eval()
    batch = random_series((2, 3, 1), (4, length + more), 8, seed=seed)
    for name in ('present2', 'valid2'):
        batch[name][1, length:] = False
    with torch.no_grad():
        both, alone = model(**batch)[1:], model(**{name: tensor[1:] for name, tensor in batch.items()})
    assert (both - alone).abs().max() < 1e-5

def test_a_gradient_never_comes_from_padding():
    batch = padded_series(random_series((2, 3, 1), (4, 5), 8), (3, 2))
    for name in ('s1', 's2'):
        batch[name].requires_grad_()
    DualUNet3D(2, 3, 1, 4, **SMALLEST)(**batch).square().sum().backward()
    assert not batch['s1'].grad[:, :, 4:].any() and not batch['s2'].grad[:, :, 5:].any()
    assert batch['s1'].grad.any() and batch['s2'].grad.any()

# ---------------------------------------------------------------- loss

def test_class_weights_follow_their_formulas(season, tmp_path):
    "One over the pixels of a class, or over (1 − βⁿ) / (1 − β); mean 1 over the classes that occur"
    counts = find_system('timeseries').feed(config(season, tmp_path)).classes_of('train').astype(float)
    occurs = counts > 0
    for kind, raw in (('inverse', 1 / counts[occurs]), ('effective', (1 - .999) / (1 - .999**counts[occurs]))):
        cfg = config(season, tmp_path, loss=dict(class_weights=kind, beta=.999))
        found = np.array(find_system('timeseries').feed(cfg).weights)[occurs]
        assert found == pytest.approx(raw / raw.mean(), rel=1e-6)
    alike = config(season, tmp_path, loss=dict(class_weights='none'))
    assert set(find_system('timeseries').feed(alike).weights) == {1.}

def test_ignored_pixels_do_not_count(season, tmp_path):
    cfg = config(season, tmp_path)
    task, logits = SeriesTask(cfg, [2., 1, 1, 1, 1, 1]), torch.randn(1, 6, 4, 4)
    target = torch.full((1, 4, 4), 255)
    target[0, 0, 0] = 0
    other = logits.clone()
    other[..., 1:, :] = 99.
    assert task.loss(logits, dict(target=target)) == task.loss(other, dict(target=target))
    assert float(task.count(dict(target=target))['cross_entropy']) == 2.
    assert float(task.loss(logits, dict(target=torch.full_like(target, 255)))['cross_entropy']) == 0.

# ---------------------------------------------------------------- evaluation and report

def test_evaluation_finds_the_numbers_of_training_again(undisturbed):
    cfg, system = load(undisturbed/'config.yaml'), find_system('timeseries')
    found = system.metrics(system.read_table(evaluate(undisturbed, 'val')), cfg)
    best = json.loads((undisturbed/'model'/'metrics.json').read_text())
    assert found == pytest.approx({name: best['metrics'][name] for name in found}, abs=1e-9, nan_ok=True)
    assert best['metrics']['loss'] == pytest.approx(best['metrics']['loss/cross_entropy'], rel=1e-5)

def test_weighted_rows_are_the_same_as_repeated_rows(undisturbed):
    "What intervals and the noise floor rest on"
    cfg, system = load(undisturbed/'config.yaml'), find_system('timeseries')
    table = system.read_table(evaluate(undisturbed, 'val'))
    alone = type(table)(table.frame.iloc[:1])
    found = system.metrics(table, cfg, np.array([3., 0.]))
    assert found == pytest.approx(system.metrics(alone, cfg), nan_ok=True)

def test_the_noise_of_a_loss_is_measured(undisturbed):
    lines = measure_noise(undisturbed, replicates=20)
    assert lines[0].startswith('loss: σ = ')

def test_tiles_in_blocks_give_the_numbers_of_whole_tiles(season, undisturbed):
    "With a budget of nothing each window is a block of its own"
    cfg, system = load(undisturbed/'config.yaml'), find_system('timeseries')
    packed = system.unpack(undisturbed/'model')
    tables = []
    for budget in (1024, 0):
        feed = system.feed(load(undisturbed/'config.yaml', data=dict(budget_mb=budget)))
        task = SeriesTask(cfg, packed.weights)
        meter = task.meter()
        with torch.no_grad():
            for batch in feed.split('val', packed):
                meter.update(task.forward(packed.model, batch), batch)
        tables.append(meter.table())
    assert len(tables[1]) > len(tables[0])
    assert system.metrics(tables[0], cfg) == pytest.approx(system.metrics(tables[1], cfg), abs=1e-6, nan_ok=True)

@pytest.mark.slow
def test_commands_serve_it(season, tmp_path):
    "Trained, evaluated and reported from a file; the report shows classes and curves"
    (tmp_path/'cfg.yaml').write_text(to_yaml(config(season, tmp_path/'runs', epochs=2)))
    for command in ('check', 'train', 'evaluate', 'report'):
        done = shell(f'rtsseg-{command}', '--config', tmp_path/'cfg.yaml')
        assert done.returncode == 0, done.stdout + done.stderr
    page, = tmp_path.glob('runs/timeseries_toy/*/seed42/report.html')
    text = page.read_text()
    assert all(word in text for word in ('miou', 'iou_rice', 'most often taken for', 'Training', 'loss'))

def test_runs_are_compared(season, undisturbed, tmp_path):
    other = train(config(season, undisturbed.parents[2], lr=dict(base_lr=1e-3, min_lr=1e-4), epochs=1))
    for folder in (undisturbed, other):
        evaluate(folder, 'val')
    text = str(report([undisturbed, other], out=tmp_path/'page.html'))
    assert 'lr.base_lr' in text or 'lr.base_lr' in (tmp_path/'page.html').read_text()

WITHOUT_THE_LIBRARY = '''
import sys
sys.modules['rtsseg'] = None
import torch
found = torch.load(sys.argv[1], weights_only=True)
assert all(isinstance(tensor, torch.Tensor) for tensor in found.values())
torch.save(found, sys.argv[2])
'''

def test_best_model_opens_with_pytorch_alone(undisturbed, tmp_path):
    "And holds the weights of the model directory"
    command = [sys.executable, '-c', WITHOUT_THE_LIBRARY, undisturbed/'best_model.pth', tmp_path/'copy.pth']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path/'copy.pth', weights_only=True)
    packed = find_system('timeseries').unpack(undisturbed/'model')
    assert found.keys() == packed.model.state_dict().keys()
    assert all(tensor.equal(found[name]) for name, tensor in packed.model.state_dict().items())

@pytest.mark.parametrize('formats', [['onnx'], ['torchscript']], ids=lambda formats: formats[0])
def test_its_model_is_exported(season, undisturbed, tmp_path, formats):
    "The file takes the values of stores; it gives the logits that an evaluation sees"
    found = export_any(undisturbed/'model', tmp_path/'out', formats)
    assert max(parity.difference for parity in found.values()) < 1e-4
    system = find_system('timeseries')
    packed, feed = system.unpack(undisturbed/'model'), system.feed(load(undisturbed/'config.yaml'))
    batch = next(iter(feed.split('val', packed)))
    tile = next(tile for tile in feed.tiles if tile.split == 'val')
    top, left = batch['corner'][0].tolist()
    place = slice(top, top + 16), slice(left, left + 16)
    inputs = {name: batch[name][:1].numpy() for name in ('present1', 'present2', 'day1', 'day2')}
    for name, layers in (('s1', tile.s1), ('s2', tile.s2), ('static', tile.static)):
        values = tile.read(layers, *place)
        if name == 'static':
            inputs[name] = values[None, :, 0]
            continue
        inputs[name] = np.full(batch[name][:1].shape, -9999., np.float32)
        inputs[name][0, :, :values.shape[1]] = values
    path = tmp_path/'out'/CLASS_FORMATS[formats[0]]
    if formats == ['onnx']:
        run = session_runner(path, LOGITS)
    else:
        run = runner_of(torch.jit.load(path), SERIES_INPUTS)
    with torch.no_grad():
        wanted = packed.model(**{name: batch[name][:1] for name in INPUTS})
    assert np.abs(run(inputs) - wanted.numpy()).max() < 1e-4

def test_an_export_that_cannot_be_leaves_nothing_behind(undisturbed, tmp_path):
    for asked in (dict(formats=['int8']), dict(images='somewhere')):
        with pytest.raises(ConfigError, match='onnx and torchscript'):
            export_any(undisturbed/'model', tmp_path/'out', **asked)
    assert not (tmp_path/'out').exists()

# ---------------------------------------------------------------- search

def test_a_search_ends_in_the_test(season, tmp_path, capsys):
    "One command: study.db, study.pkl, the best model, results.json; both studies are read back"
    cfg = config(season, tmp_path/'runs', epochs=2)
    (tmp_path/'cfg.yaml').write_text(to_yaml(cfg))
    (tmp_path/'space.yaml').write_text('model.depth: {low: 2, high: 3}\nmodel.fusion: [attention, concat]\n'
                                       'lr.base_lr: {low: 1e-3, high: 1e-1, log: true}\n')
    done = shell('rtsseg', 'search', '--config', tmp_path/'cfg.yaml', '--space', tmp_path/'space.yaml', '--trials', 3,
                 '--then', 'test')
    assert done.returncode == 0, done.stdout + done.stderr
    folder, = tmp_path.glob('runs/search/*')
    found = json.loads((folder/'results.json').read_text())
    assert set(found['best_hyperparameters']) == {'model.depth', 'model.fusion', 'lr.base_lr'}
    assert f"{found['test_metrics']['loss']:.4f}" in done.stdout and 0 <= found['test_metrics']['accuracy'] <= 1
    stored = optuna.load_study(study_name=folder.name, storage=f'sqlite:///{folder}/study.db')
    (folder/'study.db').rename(tmp_path/'elsewhere.db')
    kept = pickle.loads((folder/'study.pkl').read_bytes())
    assert kept.direction == optuna.study.StudyDirection.MINIMIZE
    values = [trial.value for trial in kept.trials]
    assert len(values) == 3 and kept.best_value == min(value for value in values if value is not None) == found['value']
    (tmp_path/'elsewhere.db').rename(folder/'study.db')
    assert [trial.params for trial in stored.trials] == [trial.params for trial in kept.trials]
    run = tmp_path/'runs'/found['run']
    assert found['config']['model']['depth'] == found['best_hyperparameters']['model.depth']
    assert (folder/'best_model.pth').read_bytes() == (run/'best_model.pth').read_bytes()
    assert found['value'] == json.loads((run/'model'/'metrics.json').read_text())['value']
    assert json.loads((tmp_path/'runs'/'test_ledger.json').read_text())

def test_a_hopeless_trial_is_pruned(season, tmp_path):
    "Judged by the smallest loss"
    (tmp_path/'space.yaml').write_text('lr.base_lr: [0.02, 0.01, 1.0e-8]')
    worst = optuna.pruners.ThresholdPruner(upper=0.)
    study = search(config(season, tmp_path/'runs', epochs=2), tmp_path/'space.yaml', 1, pruner=worst)
    assert [trial.state.name for trial in study.trials] == ['PRUNED']

@pytest.mark.slow
def test_a_trial_trains_in_two_processes(season, tmp_path, monkeypatch):
    "And Optuna hears of each of its validations"
    monkeypatch.setattr(rtsseg.tuning, 'POLL', .2)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    (tmp_path/'space.yaml').write_text('lr.base_lr: [0.02, 0.01]')
    cfg = config(season, tmp_path/'runs', epochs=2, batch_size=2)
    study = search(cfg, tmp_path/'space.yaml', 1, processes=2)
    trial, = study.trials
    assert trial.state.name == 'COMPLETE' and sorted(trial.intermediate_values) == [1, 2]
    log = (cfg.runs/trial.user_attrs['run']/'log.jsonl').read_text()
    assert '"processes": 2' in log
    hopeless = optuna.pruners.ThresholdPruner(upper=0.)
    cfg = cfg.model_copy(update=dict(seed=1, epochs=30))
    study = search(cfg, tmp_path/'space.yaml', 1, name='pruned', pruner=hopeless, processes=2)
    assert [trial.state.name for trial in study.trials] == ['PRUNED']

def test_nothing_is_tested_where_no_trial_ended(season, tmp_path):
    study = optuna.create_study(study_name='none')
    with pytest.raises(Exception, match='no trial came to its end'):
        judge_best(study, config(season, tmp_path), CONFIGS/'search.yaml')

def test_ranges_are_those_of_the_published_work():
    axes = read_axes(CONFIGS/'search.yaml', find_system('timeseries').Config)
    def ends(name):
        axis = axes[name]
        if isinstance(axis, Range):
            return axis.low, axis.high
        values = [next(iter(fields.values())) for fields in axis.values()]
        return min(values), max(values)
    expected = {'model.depth': (3, 5), 'model.filters': (32, 128), 'data.patch': (32, 256), 'lr.base_lr': (1e-5, 1e-2),
                'optimizer.clip_norm': (.1, 3), 'early_stopping.patience': (5, 15)}
    assert {name: ends(name) for name in expected} == expected
    assert set(axes['model.fusion']) == {'concat', 'attention'} and {'batch_size', 'model.dropout'} < set(axes)
    assert load(CONFIGS/'base.yaml').search.trials == 100

@pytest.mark.slow
def test_main_is_the_command_of_the_guide(season, tmp_path):
    "python main.py, with another config: prints the metrics of the test"
    (tmp_path/'cfg.yaml').write_text(to_yaml(config(season, tmp_path/'runs', epochs=1)))
    (tmp_path/'space.yaml').write_text('lr.base_lr: [0.02, 0.01]')
    command = [sys.executable, CONFIGS/'main.py', '--config', tmp_path/'cfg.yaml', '--space', tmp_path/'space.yaml',
               '--trials', '1']
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True,
                          env=os.environ | dict(OMP_NUM_THREADS='1', PYTHONHASHSEED='42'))
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'accuracy' in done.stdout and 'results.json' in done.stdout and 'best_model.pth' in {
        path.name for path in tmp_path.glob('runs/search/*/*')}

# ---------------------------------------------------------------- mistakes

@pytest.mark.parametrize('more, why', [
    (dict(model=dict(name='DualUnet3D')), "mean 'DualUNet3D'"),
    (dict(model=dict(name='no.such:Model')), 'cannot be imported'),
    (dict(model=dict(filters=10)), 'multiple of model.heads'),
    (dict(model=dict(depth=6, filters=4), data=dict(patch=16)), 'patches of 16 × 16'),
    (dict(metrics=dict(monitor='mIoU')), "mean 'miou'"),
    (dict(loss_weights=dict(dice=1.)), 'one part'),
    (dict(loss=dict(class_weights='balanced')), 'class_weights'),
])
def test_a_mistake_in_a_config_is_named(season, tmp_path, more, why):
    with pytest.raises(ConfigError, match=why):
        train(config(season, tmp_path/'runs', **more))
    assert not (tmp_path/'runs').exists()

def test_both_streams_left_out_is_a_mistake(season, tmp_path):
    with pytest.raises((ConfigError, DataError), match='s1'):
        train(config(season, tmp_path/'runs', dict(s1=[], s2=[])))

def test_a_damaged_model_is_refused(undisturbed, tmp_path):
    shutil.copytree(undisturbed/'model', tmp_path/'model')
    (tmp_path/'model'/'normalization_stats.json').write_text('{}')
    with pytest.raises(ModelError, match='normalization_stats.json'):
        find_system('timeseries').unpack(tmp_path/'model')

def test_a_season_is_made_where_the_config_says_so(tmp_path):
    data = paths(tmp_path/'season') | dict(made=SMALL | dict(train=1, val=1, test=1))
    feed = find_system('timeseries').feed(config(tmp_path, tmp_path/'runs', data), prepare=True)
    assert [feed.size(split) for split in ('train', 'val', 'test')] == [1, 1, 1]
    data['base_test_path'] = tmp_path/'other'
    with pytest.raises(ConfigError, match='base_test_path'):
        find_system('timeseries').feed(config(tmp_path, tmp_path/'runs', data), prepare=True)
