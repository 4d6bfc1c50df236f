"Faults 31 to 38: what can happen to a run while it trains"
import errno
import fcntl
import gc
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import Dataset

import rtsseg.checkpoint
import rtsseg.loop
import rtsseg.runs
import rtsseg.segment
import rtsseg.training
from helpers.children import in_child, killed_after, killed_at_write_step
from helpers.commands import freeze_trainer, wait_a_second
from helpers.loop import At, Nothing, Points, Scripted, equal, net, points, run
from helpers.pair import run_pair
from helpers.record import note
from helpers.runs import MODEL, in_time, tiny
from helpers.shell import Program, fork_trainers, held, running, shell
from helpers.waiting import wait_for
from rtsseg.checkpoint import UnsavedError, load_state, newest_state, wait_for_writers
from rtsseg.config import ConfigError, Loader, to_yaml
from rtsseg.launch import StopSignals
from rtsseg.log import Log
from rtsseg.loop import TrainingState
from rtsseg.prepare import prepare, statistics
from rtsseg.runs import Busy, RunError, Stopped, run_folder, run_lock
from rtsseg.system import System
from rtsseg.tiles import loaders
from rtsseg.training import prepare_run, train
from rtsseg.workers import WorkerError

FAULTS = {
    31: ('the run is killed: in a step, before or during a write, one of two processes',
         'the same command resumes and ends in the same bits'),
    32: ('the run is asked to stop (SIGTERM, Ctrl-C): in training, in validation, while saving, twice',
         'it stops within a step; the same command resumes'),
    33: ('the disk is full',
         'the older file stays complete and the run continues; a run whose last state cannot be written stops, '
         'and the same command resumes'),
    34: ('a loss is NaN',
         'that step is skipped; ten in a row stop the run. An overflow of the fp16 scaler does not count'),
    35: ('a validation gives NaN', 'it is never the best'),
    36: ('the memory of the GPU is full', 'the run stops, and the message names a batch size that fits'),
    37: ('a process that prepares batches dies or freezes',
         'the run stops within the time limit; the same command resumes'),
    38: ('two runs in one folder', 'the second is refused'),
}

# 10 batches and 5 steps an epoch
CFG = dict(data=points(76), accumulate=2, epochs=4, checkpoint=dict(every=2), loader=dict(shuffle=True))

SAVED_EACH_STEP = dict(every=2, resume_minutes=1e-9)

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "Toys are faster with one thread, and a process of one thread may be forked"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

def start(folder=None, **cfg):
    "The run of these tests, from its first weights"
    return run(folder, model=net(norm=True), **CFG | cfg)

def resume(folder, **cfg):
    "The same run, resumed: the weights that it is called with are others"
    return run(folder, model=net(seed=9, norm=True), **CFG | cfg)

def start_or_resume(folder, **cfg):
    "The same run, resumed where there is a checkpoint"
    begin = resume if newest_state(folder/'checkpoints') else start
    return begin(folder, **cfg)

@pytest.fixture(scope='module')
def undisturbed():
    return start()

def same(a, b):
    "Whether two states agree to the bit; NaN agrees with NaN"
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if torch.is_tensor(a):
        return torch.equal(a, b)
    return a == b or (a != a and b != b)

def state_in(folder, name='resume'):
    "The state in a checkpoint of a run folder"
    return load_state(folder/'checkpoints'/f'{name}.ckpt')

def model_bytes(folder):
    return (folder/'model'/'model.safetensors').read_bytes()

def terminate(run=None):
    "Send SIGTERM to this process"
    os.kill(os.getpid(), signal.SIGTERM)

# ---------------------------------------------------------------- 31: killed at any point

def contents(folder):
    "Names and contents of all files below a folder"
    files = [path for path in sorted(folder.rglob('*')) if path.is_file()]
    return tuple((path.relative_to(folder), path.read_bytes()) for path in files)

def write_contents(folder, files):
    for name, data in files:
        path = folder/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

class DyingSaver:
    """In place of TrainingState.save: before a checkpoint is written, it is written in copies of the run folder by
    processes that die, one at each step of the work. `left` holds what they left behind"""
    def __init__(self, trial):
        self.trial, self.save = trial, TrainingState.save
        self.deaths, self.left = 0, set()

    def __call__(self, state, *args, **options):
        wait_for_writers()
        for k in itertools.count(1):
            if not self.dies(k, state, args, options):
                break
            self.deaths += 1
        return self.save(state, *args, **options)

    def dies(self, k, state, args, options):
        "Whether the process that dies at step k did not finish its work before"
        def work():
            state.folder = self.trial
            self.save(state, *args, **options)
            wait_for_writers()

        if state.folder.exists():
            shutil.copytree(state.folder, self.trial)
        else:
            self.trial.mkdir()
        code = in_child(work, killed_at_write_step(k))
        assert code in (0, -signal.SIGKILL)
        self.left.add(contents(self.trial))
        shutil.rmtree(self.trial)
        return code != 0

@pytest.mark.slow
def test_31_the_writer_dies_at_every_step_of_every_checkpoint(tmp_path, monkeypatch):
    "Whichever I/O step is the last one: each checkpoint can be read, and the resumed run ends in the same bits"
    # two steps per epoch
    cfg = dict(epochs=2, accumulate=5, checkpoint=dict(every=1, keep_last=1, resume_minutes=1e-9))
    undisturbed = start(**cfg)
    saver = DyingSaver(tmp_path/'trial')
    with monkeypatch.context() as patch:
        # a function, because only functions are bound as methods
        patch.setattr(TrainingState, 'save', lambda state, *args, **options: saver(state, *args, **options))
        equal(undisturbed, start(tmp_path/'whole', **cfg))

    # many deaths leave the same files
    for k, files in enumerate(saver.left):
        folder = tmp_path/f'{k}'
        write_contents(folder, files)
        for path in folder.glob('checkpoints/*.ckpt'):
            load_state(path)
        equal(undisturbed, start_or_resume(folder, **cfg))
        assert not list(folder.rglob('.*.tmp')), 'a file of the dead writer is still there'
        shutil.rmtree(folder)
    assert saver.deaths > 50 and len(saver.left) > 25

def cpu_seconds(work):
    "CPU time of work in a forked process"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert in_child(work) == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

def result_of_soak(cfg):
    "What must be equal: two checkpoints and the model"
    folder, = cfg.runs.glob('soak/*/seed42')
    return state_in(folder), state_in(folder, 'best'), model_bytes(folder)

def train_until_killed(cfg, seconds=0):
    "Train in a forked process that is killed after some CPU time, 0: never; whether it was killed"
    code = in_child(lambda: train(cfg), killed_after(seconds))
    assert code in (0, -signal.SIGPROF)
    for path in cfg.runs.rglob('*.ckpt'):
        load_state(path)
    return code != 0

@pytest.mark.slow
def test_31_killed_at_random_points(tmp_path):
    "A real run whose process is killed 25 times and started again ends in the same bits as one that is never killed"
    kills = int(os.environ.get('RTSSEG_KILLS', 25))
    dice = random.Random(0)
    frequent = dict(every=2, keep_last=2, resume_minutes=1e-6)
    cfg = tiny(tmp_path, name='soak', runs=tmp_path/'whole', epochs=2, batch_size=4, checkpoint=frequent)
    # what is read once is cached from here on
    prepare(cfg)
    whole = cpu_seconds(lambda: train(cfg))

    expected = result_of_soak(cfg)

    killed = runs = 0
    while killed < kills:
        runs += 1
        other = cfg.model_copy(update=dict(runs=tmp_path/f'killed{runs}'))
        while killed < kills and train_until_killed(other, dice.uniform(.1, .5) * whole):
            killed += 1
        train_until_killed(other)
        assert same(result_of_soak(other), expected)
        shutil.rmtree(other.runs)
    note('kills', 'training, in one process', killed, kills)

def test_31_a_line_of_the_log_that_was_cut_off(tmp_path):
    "The next line replaces the half line that a kill left"
    log = tmp_path/'log.jsonl'
    log.write_text('{"event": "start"}\n{"event": "ep')
    Log(tmp_path, System()).write('start', epoch=1)
    assert [json.loads(line)['event'] for line in log.read_text().splitlines()] == ['start', 'start']

# ---------------------------------------------------------------- 32: asked to stop

class TerminatingMeter(Nothing):
    "Sends SIGTERM to its own process at the first batch"
    is_sent = False

    def update(self, out, batch):
        if not self.is_sent:
            terminate()
        self.is_sent = True

class TerminatedInValidation(Points):
    "Sends SIGTERM in validation, and counts its batches"
    validated = 0

    def meter(self):
        return TerminatingMeter()

    def forward(self, model, batch):
        if not model.training:
            self.validated += 1
        return super().forward(model, batch)

def test_32_sigterm_in_validation(undisturbed, tmp_path):
    "It stops before the next batch, and validates again when it resumes"
    task = TerminatedInValidation()
    with StopSignals() as signals:
        half = start(tmp_path, task=task, observers=[signals])
    assert half.reason == 'SIGTERM'
    assert task.validated == 1
    assert half.batch == 10 and not half.history
    equal(undisturbed, resume(tmp_path))

def terminate_twice(run):
    terminate()
    terminate()

def interrupt(run=None):
    "Send SIGINT to this process, as Ctrl-C does"
    os.kill(os.getpid(), signal.SIGINT)

@pytest.mark.usefixtures('default_signals')
@pytest.mark.parametrize('ask', [terminate, terminate_twice, interrupt])
def test_32_sigterm_in_training(undisturbed, tmp_path, ask):
    "Asked once or twice: the present step is the last one, and the run resumes from there to the same bits"
    with StopSignals() as signals:
        half = start(tmp_path, observers=[At(7, ask), signals])
    assert half.step == 7 and not half.finished
    equal(undisturbed, resume(tmp_path))

@pytest.mark.usefixtures('default_signals')
def test_32_the_second_interrupt_does_not_wait(undisturbed, tmp_path):
    "Ctrl-C twice interrupts at once; the run resumes from its last checkpoint"
    def interrupt_twice(run):
        interrupt()
        interrupt()
        pytest.fail('the step continued')

    with StopSignals() as signals, pytest.raises(KeyboardInterrupt):
        start(tmp_path, observers=[At(7, interrupt_twice), signals], checkpoint=SAVED_EACH_STEP)
    equal(undisturbed, resume(tmp_path))

def test_32_sigterm_while_saving(undisturbed, tmp_path, monkeypatch):
    "A thread writes the file to its end; the present step is the last one"
    write_atomic, asked = rtsseg.checkpoint.write_atomic, threading.Event()

    def interrupted_write(path, data):
        if not asked.is_set():
            terminate()
            terminate()
            asked.set()
        return write_atomic(path, data)

    with monkeypatch.context() as patch, StopSignals() as signals:
        patch.setattr(rtsseg.checkpoint, 'write_atomic', interrupted_write)
        observers = [At(2, lambda run: asked.wait(300)), signals]
        half = start(tmp_path, observers=observers, checkpoint=SAVED_EACH_STEP)
    assert half.step == 2
    steps = {path.stem: load_state(path)['step'] for path in (tmp_path/'checkpoints').iterdir()}
    assert steps == dict(resume=2, before=1)
    equal(undisturbed, resume(tmp_path))

def test_32_sigterm_before_the_first_step(undisturbed, tmp_path):
    "Asked before training begins, it stops after one step"
    with StopSignals() as signals:
        terminate()
        half = start(tmp_path, observers=[signals])
    assert half.step == 1
    equal(undisturbed, resume(tmp_path))

# ---------------------------------------------------------------- 31, 32: two processes

def train_pair(folder, begin, task=lambda rank: None, at_step=None, act=None):
    "Two processes train the run of these tests; after step `at_step` each calls act(rank). Their exit codes"
    def work(rank):
        observers = []
        if at_step:
            observers.append(At(at_step, lambda run: act(rank)))
        with StopSignals() as signals:
            begin(folder, task=task(rank), observers=[*observers, signals], checkpoint=SAVED_EACH_STEP)
    return run_pair(work, folder)

def pair_states(folder):
    return {name: state_in(folder, name) for name in ('resume', 'best', 'epoch-0002', 'epoch-0004')}

@pytest.fixture(scope='module')
def undisturbed_pair(tmp_path_factory):
    "The states of an undisturbed run of two processes: 5 micro-batches each, 3 steps an epoch"
    folder = tmp_path_factory.mktemp('two')/'run'
    assert train_pair(folder, start) == [0, 0]
    return pair_states(folder)

def send(signal_number, ranks):
    "For train_pair: these ranks send a signal to themselves"
    def act(rank):
        if rank in ranks:
            os.kill(os.getpid(), signal_number)
    return act

@pytest.mark.parametrize('ranks', [(0,), (1,), (0, 1)])
def test_32_sigterm_to_one_of_two_processes_or_both(undisturbed_pair, tmp_path, ranks):
    "Both stop after the same step, and resume to the same bits"
    folder = tmp_path/'run'
    assert train_pair(folder, start, at_step=5, act=send(signal.SIGTERM, ranks)) == [0, 0]
    half = state_in(folder)
    assert half['step'] == 5 and not half['finished']
    assert train_pair(folder, resume) == [0, 0]
    assert same(pair_states(folder), undisturbed_pair)

@pytest.mark.parametrize('asked', [0, 1])
def test_32_sigterm_in_validation_of_two_processes(undisturbed_pair, tmp_path, asked):
    "Whichever is asked, both leave the validation, and repeat it when they resume"
    folder = tmp_path/'run'

    def task(rank):
        return TerminatedInValidation() if rank == asked else Points()

    assert train_pair(folder, start, task) == [0, 0]
    half = state_in(folder)
    assert (half['step'], half['batch'], half['history'], half['best']) == (3, 5, [], {})
    assert train_pair(folder, resume) == [0, 0]
    assert same(pair_states(folder), undisturbed_pair)

@pytest.mark.parametrize('rank', [0, 1])
@pytest.mark.parametrize('step', [4, 9])
def test_31_one_of_two_processes_is_killed(undisturbed_pair, tmp_path, rank, step):
    "The other one ends with an error; started again, both resume from the last checkpoint to the same bits"
    folder = tmp_path/'run'
    codes = train_pair(folder, start, at_step=step, act=send(signal.SIGKILL, [rank]))
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 1
    # the thread that writes a checkpoint may have been killed too
    assert state_in(folder)['step'] in (step - 2, step - 1)
    assert train_pair(folder, resume) == [0, 0]
    assert same(pair_states(folder), undisturbed_pair)

def complete_events(runs):
    "The complete lines of log.jsonl of the only run in a runs folder"
    texts = [path.read_text() for path in runs.glob('*/*/seed42/log.jsonl')]
    return [json.loads(line) for text in texts for line in text.splitlines() if line.endswith('}')]

def has_done_epoch(runs, epoch):
    return any(event['event'] == 'epoch' and event['epoch'] == epoch for event in complete_events(runs))

def children_of(pid):
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]

@pytest.mark.slow
def test_32_sigterm_to_the_launcher_of_two_processes(tmp_path):
    "rtsseg-train --processes 2 passes SIGTERM on: both processes save and end; the run resumes to the same model"
    half_cfg = tiny(tmp_path, name='two', runs=tmp_path/'half', epochs=3, batch_size=4)
    whole_cfg = half_cfg.model_copy(update=dict(runs=tmp_path/'whole'))
    (tmp_path/'half.yaml').write_text(to_yaml(half_cfg))

    command = ['rtsseg-train', '--config', tmp_path/'half.yaml', '--processes', '2']
    folder = run_folder(half_cfg, prepare(half_cfg).hash)
    with running(Program(*command, env=held(folder, 2), prepare=fork_trainers)) as launcher:
        wait_for(lambda: launcher.poll() is not None or has_done_epoch(half_cfg.runs, 2))
        assert launcher.poll() is None, launcher.printed()
        trainers = children_of(launcher.pid)
        launcher.send_signal(signal.SIGTERM)
        code, output = launcher.wait(), launcher.printed()

    assert len(trainers) == 2, output
    assert not any(Path(f'/proc/{pid}').exists() for pid in trainers), output
    assert code == 3, output
    half, = half_cfg.runs.glob('two/*/seed42')
    end = complete_events(half_cfg.runs)[-1]
    assert (end['event'], end['reason']) == ('end', 'SIGTERM')
    assert state_in(half)['step'] == end['step']
    assert not (half/'model').exists()

    for cfg in (half_cfg, whole_cfg):
        assert run_pair(lambda rank, cfg=cfg: train(cfg), cfg.runs) == [0, 0]
    whole, = whole_cfg.runs.glob('two/*/seed42')
    assert same(state_in(half), state_in(whole))
    assert model_bytes(half) == model_bytes(whole)

# ---------------------------------------------------------------- 33: a full disk

def fill_disk(patch, refuse):
    "The disk is full at each write for which `refuse(number, name)` holds"
    fsync, numbers = os.fsync, itertools.count(1)

    def fsync_or_fail(descriptor):
        path = Path(os.readlink(f'/proc/self/fd/{descriptor}'))
        if path.suffix == '.tmp' and refuse(next(numbers), path.name):
            raise OSError(errno.ENOSPC, 'No space left on device', str(path))
        return fsync(descriptor)

    patch.setattr(os, 'fsync', fsync_or_fail)

def is_resume(number, name):
    return 'resume' in name

EACH_WRITE = [(k, 5) for k in range(1, 7)]
WRITES_IN_A_THREAD = [(k, 1e-9) for k in (1, 2, 5, 6, 14)]

@pytest.mark.parametrize('k,minutes', EACH_WRITE + WRITES_IN_A_THREAD)
def test_33_disk_full_at_a_write(undisturbed, tmp_path, monkeypatch, capsys, k, minutes):
    "One write fails, at once or in a thread, the old file stays complete, and the run ends in the same weights"
    with monkeypatch.context() as patch:
        fill_disk(patch, lambda number, name: number == k)
        done = start(tmp_path, checkpoint=dict(every=1, keep_last=9, resume_minutes=minutes))
    assert 'was not written (No space left on device)' in capsys.readouterr().err
    assert done.finished
    for path in (tmp_path/'checkpoints').iterdir():
        load_state(path)
    # never a best that no file holds
    assert done.best == state_in(tmp_path, 'best')['best']
    if done.best == undisturbed.best:
        equal(undisturbed, done)

def test_33_disk_full_at_the_end(undisturbed, tmp_path, monkeypatch):
    "The run stops with an error that names the cause; once there is room it resumes"
    with monkeypatch.context() as patch:
        fill_disk(patch, is_resume)
        with pytest.raises(UnsavedError, match='could not be written; make room'):
            start(tmp_path)
    equal(undisturbed, resume(tmp_path))

ONLY_BEST = ('note: best.ckpt is the only checkpoint, and it holds no state to resume from: '
             'the run starts from the beginning')

def test_33_a_disk_that_was_full_from_the_beginning(undisturbed, tmp_path, monkeypatch, capsys):
    "Without any checkpoint the message does not promise to resume: the run starts from the beginning, with a note"
    rare = dict(every=9)
    with monkeypatch.context() as patch:
        fill_disk(patch, lambda number, name: 'best' not in name)
        with pytest.raises(UnsavedError, match='starts from the beginning, because it has no checkpoint before it'):
            start(tmp_path, checkpoint=rare)
    equal(undisturbed, start(tmp_path, checkpoint=rare))
    assert ONLY_BEST in capsys.readouterr().err

def test_33_disk_full_at_the_end_of_two_processes(undisturbed_pair, tmp_path, monkeypatch):
    "The first cannot write, and ends; the second does not wait for it"
    folder = tmp_path/'run'
    with monkeypatch.context() as patch:
        fill_disk(patch, is_resume)
        assert train_pair(folder, start) == [1, 1]
    assert not (folder/'checkpoints'/'resume.ckpt').exists()
    assert 'could not be written; make room' in Path(f'{folder}-0.txt').read_text()
    assert train_pair(folder, resume) == [0, 0]
    assert same(pair_states(folder), undisturbed_pair)

def test_33_a_command_whose_last_state_finds_no_room(tmp_path, monkeypatch):
    "It stops with code 3; once there is room the same command resumes, and makes the model"
    cfg = tiny(tmp_path)
    with monkeypatch.context() as patch:
        fill_disk(patch, is_resume)
        with pytest.raises(RunError, match='make room') as caught:
            train(cfg)
    assert caught.value.code == 3
    assert not list(tmp_path.glob('runs/tiny/*/seed42/model'))
    assert (train(cfg)/'model'/'model.safetensors').exists()

# ---------------------------------------------------------------- 34, 35: NaN

class NanLoss(Points):
    "The training loss is NaN at these calls, counted from 1"
    def __init__(self, calls):
        self.calls, self.n = calls, 0

    def loss(self, out, batch):
        parts = super().loss(out, batch)
        if not out.requires_grad:
            return parts
        self.n += 1
        if self.n not in self.calls:
            return parts
        return {name: value * math.nan for name, value in parts.items()}

def copy_of_state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}

def all_finite(module):
    "Whether all weights and statistics of a module are finite"
    values = [value for value in module.state_dict().values() if value.is_floating_point()]
    return all(value.isfinite().all() for value in values)

def test_34_one_bad_loss_changes_nothing(tmp_path):
    "Weights, batch statistics and their average stay as they were; the run continues and counts the step"
    states, counts = [], []

    def look(run):
        states.append([copy_of_state(run.model), copy_of_state(run.average.module)])
        counts.append((run.skipped, run.bad))

    # the first half of the third step
    done = start(tmp_path, task=NanLoss([5]), observers=[SimpleNamespace(on_step=look)])
    assert same(states[1], states[2])
    assert counts[1:4] == [(0, 0), (1, 1), (1, 0)]
    assert done.finished
    assert all_finite(done.model) and all_finite(done.judged)

def test_34_ten_in_a_row_stop_the_run(tmp_path):
    "A run that does not learn any more stops, names the command that finds the cause, and keeps the count"
    done = start(tmp_path, task=NanLoss(range(9, 999)))
    assert done.step == 4 + 10 and not done.finished
    assert done.reason.startswith('10 steps in a row without a finite loss')
    assert 'rtsseg-check' in done.reason
    # the count is kept: one more is enough
    assert resume(tmp_path, task=NanLoss([1])).step == 15
    # the first good step resets it
    assert resume(tmp_path).finished

class NanFromTheFourthStep(rtsseg.segment.SegmentTask):
    "The training loss is NaN from the fourth step on"
    steps = 0

    def loss(self, out, batch):
        parts = super().loss(out, batch)
        if not out.requires_grad:
            return parts
        self.steps += 1
        if self.steps <= 3:
            return parts
        return {name: value * math.nan for name, value in parts.items()}

def test_34_a_real_run_of_short_epochs(tmp_path, monkeypatch):
    "Epochs in which every loss is NaN are reported too, and the run stops in a state from which it can resume"
    cfg = tiny(tmp_path, epochs=15, val_frequency=5, early_stopping=dict(patience=None))
    monkeypatch.setattr(rtsseg.segment, 'SegmentTask', NanFromTheFourthStep)
    with pytest.raises(Stopped, match='10 steps in a row without a finite loss'):
        train(cfg)
    folder, = tmp_path.glob('runs/tiny/*/seed42')
    assert newest_state(folder/'checkpoints')['step'] == 13
    epochs = [event['epoch'] for event in complete_events(tmp_path/'runs') if event['event'] == 'epoch']
    assert epochs == list(range(1, len(epochs) + 1)) and len(epochs) > 3

def accelerator_with_large_scale(cfg):
    "An accelerator whose fp16 scaler overflows until its scale has come down"
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler('cpu', init_scale=2.**127, growth_interval=10**6)
    return accelerator

def test_34_an_overflow_of_the_scaler_does_not_count(monkeypatch):
    "Far more than ten in a row, until the scale fits: the run continues"
    monkeypatch.setattr(rtsseg.loop, 'make_accelerator', accelerator_with_large_scale)
    done = start(epochs=6, loss_weights=dict(bce=1e6, square=1e6))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert done.skipped > rtsseg.loop.MAX_BAD_STEPS
    assert done.bad == 0
    assert done.finished and all_finite(done.judged)

def test_35_a_metric_that_is_nan_is_never_the_best(tmp_path):
    "Neither at the first validation nor later: the best weights are those of the best number"
    done = start(tmp_path, task=Scripted([math.nan, .2, math.nan, .1]))
    assert (done.best['epoch'], done.best['value']) == (2, .2)
    assert state_in(tmp_path, 'best')['best']['value'] == .2

# ---------------------------------------------------------------- 36: memory

def advised_settings(error):
    "The batch size and the accumulation that a message about memory names"
    batch_size, = re.findall(r'"batch_size=(\d+)"', str(error))
    accumulate, = re.findall(r'"accumulate=(\d+)"', str(error))
    return int(batch_size), int(accumulate)

def test_36_out_of_memory_says_what_fits(tmp_path, monkeypatch):
    "The batch size stays as the user set it; the message names one that fits"
    cfg, take_step = tiny(tmp_path), rtsseg.loop.take_step

    def step_with_little_memory(run, group, *more):
        if len(group[0]['tile']) > 3:
            raise torch.OutOfMemoryError('CUDA out of memory.')
        return take_step(run, group, *more)

    monkeypatch.setattr(rtsseg.loop, 'take_step', step_with_little_memory)
    with pytest.raises(RunError, match='out of memory with batch_size 8[.] ') as caught:
        train(cfg)
    assert caught.value.code == 3
    batch_size, accumulate = advised_settings(caught.value)
    assert batch_size <= 3
    assert batch_size * accumulate >= 8
    folder, = tmp_path.glob('runs/tiny/*/seed42')
    assert not (folder/'model').exists()

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')

def empty_gpu():
    gc.collect()
    torch.cuda.empty_cache()

@contextmanager
def small_gpu(monkeypatch, room):
    "A GPU with this many bytes"
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda *device: (room, room))
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.)

@pytest.mark.gpu
@on_a_gpu
def test_36_a_gpu_that_is_full(tmp_path, monkeypatch):
    "With 70% of the memory that the run needs, the batch size that the message names fits"
    large = MODEL | dict(options=dict(decoder_channels=[128] * 5))
    rows = [dict(first=1, last=1, ratio=5)]
    cfg = tiny(tmp_path, device='cuda', precision='fp32', batch_size=32, sampler=dict(curriculum=rows), model=large)
    empty_gpu()
    torch.cuda.reset_peak_memory_stats()
    train(cfg.model_copy(update=dict(runs=tmp_path/'whole')))
    room = torch.cuda.max_memory_allocated() * 7 // 10
    empty_gpu()
    with small_gpu(monkeypatch, room):
        with pytest.raises(RunError, match='out of memory with batch_size 32') as caught:
            train(cfg)
        assert caught.value.code == 3
        batch_size, accumulate = advised_settings(caught.value)
        assert batch_size < 32 <= batch_size * accumulate
        folder = train(cfg.model_copy(update=dict(batch_size=batch_size, accumulate=accumulate)))
        assert (folder/'model'/'model.safetensors').exists()

@pytest.mark.gpu
@on_a_gpu
def test_31_two_runs_on_a_gpu(tmp_path):
    "With `deterministic` two runs of a few steps, from the same seed, end in the same bits"
    first = train(tiny(tmp_path/'a', device='cuda', epochs=3, deterministic=True))
    second = train(tiny(tmp_path/'b', device='cuda', epochs=3, deterministic=True))
    a, b = state_in(first), state_in(second)
    for part in ('model', 'average', 'optimizer'):
        assert same(a[part], b[part]), part
    assert model_bytes(first) == model_bytes(second)

# ---------------------------------------------------------------- 37: workers

class DeadlyPoints(Dataset):
    "Points; the worker process that reads the 41st gets a signal"
    def __init__(self, signal_number):
        self.signal_number, self.data = signal_number, points(76)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        if i == 40 and multiprocessing.parent_process():
            os.kill(os.getpid(), self.signal_number)
        return self.data[i]

@pytest.mark.parametrize('signal_number', [signal.SIGKILL, signal.SIGSTOP])
def test_37_a_worker_dies_or_freezes(undisturbed, tmp_path, signal_number):
    "The run stops at the time limit, its workers have ended, and it resumes from the last checkpoint"
    two_workers = dict(shuffle=True, num_workers=2, timeout=3)
    message = '(have died|no batch came within 3 seconds).*resumes from the last checkpoint'
    # commands of earlier tests may not have been collected yet
    before = set(multiprocessing.active_children())
    with in_time(), pytest.raises(WorkerError, match=message):
        start(tmp_path, data=DeadlyPoints(signal_number), loader=two_workers, checkpoint=SAVED_EACH_STEP)
    assert set(multiprocessing.active_children()) <= before
    # the worker may have ended before the first step
    equal(undisturbed, start_or_resume(tmp_path, checkpoint=SAVED_EACH_STEP))

@pytest.mark.parametrize('workers,limit', [(0, 0), (2, 7)])
def test_37_real_loaders_have_the_time_limit(tmp_path, workers, limit):
    "loader.timeout applies to training and validation, where workers are used"
    cfg = tiny(tmp_path)
    cfg.loader = Loader(num_workers=workers, timeout=7)
    feed = loaders(cfg, prepare(cfg))
    assert feed.train.timeout == limit
    assert feed.val.timeout == limit

def test_37_a_frozen_worker_outlives_its_trainer(tmp_path):
    "It keeps the pipe to the command open, and the command ends all the same when the trainer was killed"
    config = tmp_path/'tiny.yaml'
    config.write_text(to_yaml(tiny(tmp_path)))
    done = shell('rtsseg-train', '--config', config, prepare=freeze_trainer)
    trainer = int(done.stdout.splitlines()[-1])
    os.killpg(trainer, signal.SIGKILL)
    assert done.returncode == 3
    assert done.stderr == (f'error: the trainer was ended by SIGKILL; its last line: {trainer}. '
                           'The same command resumes from the last checkpoint\n')

# ---------------------------------------------------------------- 38: two at once

def all_contents(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}

def test_38_two_runs_in_one_folder(tmp_path):
    "The second waits for the given time, and is refused with code 2"
    message = rf'another process \(pid {os.getpid()}\) trains in this run folder'
    with run_lock(tmp_path):
        with pytest.raises(Busy, match=message) as caught:
            with run_lock(tmp_path, wait=.5):
                pass
    assert caught.value.code == 2
    with run_lock(tmp_path, wait=0):
        pass

def write_other_config(folder, cfg):
    "config.yaml of a run of seven epochs"
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'config.yaml').write_text(to_yaml(cfg.model_copy(update=dict(epochs=7))))

@pytest.mark.parametrize('option', ['', '--fresh', '--force'])
def test_38_the_command_in_a_folder_that_is_in_use(tmp_path, option):
    "Exit code 2, one line that names the process, and nothing is written"
    cfg = tiny(tmp_path)
    manifest = prepare(cfg)
    statistics(cfg, manifest)
    folder = run_folder(cfg, manifest.hash)
    config = tmp_path/'tiny.yaml'
    config.write_text(to_yaml(cfg))
    if option == '--force':
        write_other_config(folder, cfg)
    options = [option] if option else []

    with run_lock(folder):
        before = all_contents(tmp_path)
        done = shell('rtsseg-train', '--config', config, *options, prepare=wait_a_second)
        assert all_contents(tmp_path) == before

    *notes, last = done.stderr.splitlines()
    assert done.returncode == 2
    assert last == (f'error: {folder.parent.name}/seed42: another process (pid {os.getpid()}) trains in this run '
                    'folder; wait for it or stop it')
    printed = [line for line in done.stdout.splitlines() if not line.endswith('reading the data')]
    assert all(line.startswith(('note: ', 'warning: ')) for line in notes + printed)
    is_waiting = 'waiting for it, 1 s at most' in done.stderr
    assert is_waiting == (not option)

def test_38_another_process_finishes_this_run_while_two_begin(tmp_path):
    "The first of the two finds the model when it has the lock, and tells the second, which had looked before"
    cfg = tiny(tmp_path)
    model, aside, looked = train(cfg)/'model', tmp_path/'aside', tmp_path/'looked'
    model.rename(aside)

    @contextmanager
    def lock_and_find_a_model(folder):
        with run_lock(folder):
            wait_for(looked.exists)
            aside.rename(model)
            yield

    def prepare_and_report(cfg):
        run = prepare_run(cfg)
        looked.touch()
        return run

    # the patches are made in forked processes
    def begin(rank):
        if rank == 0:
            rtsseg.training.run_lock = lock_and_find_a_model
        else:
            rtsseg.training.prepare_run = prepare_and_report
        train(cfg)

    assert run_pair(begin, tmp_path/'output') == [0, 0]
    assert (tmp_path/'output-0.txt').read_text().count('trained already') == 1
    assert 'trained already' not in (tmp_path/'output-1.txt').read_text()

def assert_both_refused(cfg, error, message, change=lambda: None):
    "Two processes that begin a run end with the same error"
    # the change is made in forked processes
    def begin(rank):
        change()
        with pytest.raises(error, match=message):
            train(cfg)
    assert run_pair(begin, cfg.runs.parent/'output') == [0, 0]

def test_38_both_are_refused_where_the_folder_is_in_use(tmp_path):
    "The first does not get the lock, and the second does not wait for the first"
    def busy(folder):
        raise Busy('another process', 2)

    def change():
        rtsseg.training.run_lock = busy

    assert_both_refused(tiny(tmp_path), Busy, 'another process', change)

def test_38_both_are_refused_where_the_config_was_changed(tmp_path):
    "Neither waits for the other"
    cfg = tiny(tmp_path)
    write_other_config(run_folder(cfg, prepare(cfg).hash), cfg)
    assert_both_refused(cfg, ConfigError, r'epochs 7 → 1.*--force')

def test_38_both_are_refused_where_the_model_is_damaged(tmp_path):
    "Without a checkpoint to export it from; neither waits for the other"
    cfg = tiny(tmp_path)
    folder = train(cfg)
    (folder/'model'/'model.safetensors').write_bytes(b'')
    shutil.rmtree(folder/'checkpoints')
    assert_both_refused(cfg, RunError, 'No checkpoint is left')

def test_38_a_folder_that_was_moved_meanwhile(tmp_path, monkeypatch):
    "A process that waited for the lock holds the new folder, not the old one under another name"
    folder = tmp_path/'seed42'
    folder.mkdir()
    waits, locked, done = threading.Event(), threading.Event(), threading.Event()

    def describe_and_report(folder):
        waits.set()
        return 'in use'

    def wait_for_lock():
        with run_lock(folder, wait=300):
            locked.set()
            assert done.wait(300)

    monkeypatch.setattr(rtsseg.runs, 'describe_holder', describe_and_report)
    with open(folder/'.lock', 'a') as old:
        fcntl.flock(old, fcntl.LOCK_EX)
        waiter = threading.Thread(target=wait_for_lock)
        waiter.start()
        assert waits.wait(300)
        folder.rename(tmp_path/'aside')
    assert locked.wait(300)
    with pytest.raises(Busy):
        with run_lock(folder, wait=0):
            pass
    done.set()
    waiter.join()
