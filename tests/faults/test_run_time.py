"Faults 31 to 38: what a run meets on its way"
import errno, fcntl, gc, itertools, json, math, multiprocessing, os, random, shutil, signal, socket, subprocess, sys, threading, time, traceback
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest, torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import Dataset

import rtsseg.checkpoint, rtsseg.config, rtsseg.loop, rtsseg.runs, rtsseg.segment, rtsseg.training
from rtsseg.config import ConfigError, Loader, to_yaml
from rtsseg.runs import run_folder
from rtsseg.checkpoint import UnsavedError, load_state, newest_state, wait_for_writers
from rtsseg.workers import WorkerError
from rtsseg.loop import TrainingState
from rtsseg.prepare import prepare, statistics
from rtsseg.tiles import loaders
from rtsseg.runs import Busy, RunError, Stopped, run_lock
from rtsseg.launch import StopSignals
from rtsseg.log import Log
from rtsseg.system import System
from helpers.runs import MODEL, tiny, toy_world
from helpers.loop import At, Nothing, Points, equal, net, points, quick, run

FAULTS = {31: ('the run is killed, anywhere: in a step, in a write, in its middle, one of two processes', 'the same command goes on and ends in the same bits'),
          32: ('the run is asked to stop (SIGTERM): in training, in validation, while saving, twice', 'it stops within a step; the same command goes on'),
          33: ('the disk is full', 'the older file stays whole and the run goes on; where its last state cannot be written it stops, and can be gone on from'),
          34: ('a loss is no number', 'the step leaves no trace; ten in a row stop the run. An overflow of the fp16 scaler is none of them'),
          35: ('a validation gives no number', 'it is never the best'),
          36: ('the memory of the GPU is full', 'it stops, and says which batch size would fit'),
          37: ('a process that prepares batches dies or freezes', 'it stops within the time limit, and can be gone on from'),
          38: ('two runs in one folder', 'the second is refused')}

CFG = dict(data=points(76), accumulate=2, epochs=4, checkpoint=dict(every=2), loader=dict(shuffle=True))      # 10 batches, 5 steps an epoch

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "Toys are faster so, and a process of one thread may be forked"
    before = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(before)

@pytest.fixture(scope='module')
def undisturbed(): return run(model=net(norm=True), **CFG)

def again(folder, seed=9, **cfg): return run(folder, model=net(seed, norm=True), **CFG | cfg)

def same(a, b):
    "States agree to the bit"
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b or (a != a and b != b)

# ---------------------------------------------------------------- 31: killed anywhere
CALLS = ['open', 'fsync', 'link', 'replace', 'unlink', 'close']      # of os: what a write consists of

def dies_at(k, work):
    "Fork, do the work, and leave without a word at the k-th I/O step of it; whether it came that far"
    if not (child := os.fork()):
        count = [0]
        def counted(f):
            def call(*a, **kw):
                count[0] += 1
                if count[0] == k: os._exit(77)
                return f(*a, **kw)
            return call
        for name in CALLS: setattr(os, name, counted(getattr(os, name)))
        class Half:                                             # a write that stops in its middle is a step of its own
            def __init__(self, *a, **kw): self.file = open(*a, **kw)
            def __enter__(self): return self
            def __exit__(self, *a): self.file.close()
            def write(self, data):
                count[0] += 1
                if count[0] == k: self.file.write(data[:len(data) // 2]); self.file.flush(); os._exit(77)
                return self.file.write(data)
            def __getattr__(self, name): return getattr(self.file, name)
        rtsseg.config.open = Half
        try: work()
        except BaseException: os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 77), code
    return code == 77

def lies(folder): return tuple((f.relative_to(folder), f.read_bytes()) for f in sorted(folder.rglob('*')) if f.is_file())

def test_31_the_writer_dies_at_every_step_of_every_checkpoint(undisturbed, tmp_path, monkeypatch):
    "Whichever I/O step is the last one, what lies there can be read, and the run that goes on from it ends in the same bits"
    often, save, trial, left, deaths = dict(checkpoint=dict(every=2, keep_last=1, resume_minutes=1e-9)), TrainingState.save, tmp_path/'trial', {}, 0
    def dies(run, *a, **kw):
        "From the state before a checkpoint, in a copy of its folder, a process for each step that it could die at; then it is written"
        nonlocal deaths
        def work(): run.folder = trial; save(run, *a, **kw); wait_for_writers()
        wait_for_writers()
        for k in itertools.count(1):
            shutil.copytree(run.folder, trial) if run.folder.exists() else trial.mkdir()
            died = dies_at(k, work); left[lies(trial)] = None; shutil.rmtree(trial)
            if not died: break
            deaths += 1
        return save(run, *a, **kw)
    with monkeypatch.context() as m: m.setattr(TrainingState, 'save', dies); equal(undisturbed, again(tmp_path/'whole', 0, **often))
    for k, files in enumerate(left):                            # many deaths leave the same behind
        folder = tmp_path/f'{k}'
        for name, data in files: (folder/name).parent.mkdir(parents=True, exist_ok=True); (folder/name).write_bytes(data)
        for f in folder.glob('checkpoints/*.ckpt'): load_state(f)
        equal(undisturbed, again(folder, 9 if newest_state(folder/'checkpoints') else 0, **often))
        assert not list(folder.rglob('.*.tmp'))                 # what the dead writer left is gone
    assert deaths > 100 and len(left) > 50

def test_31_killed_at_random_points(tmp_path):
    "A real run, its process killed 50 times; in between it goes on, and it ends in the same bits as one that was left alone"
    kills, dice = int(os.environ.get('RTSSEG_KILLS', 50)), random.Random(0)
    cfg = tiny(tmp_path, name='soak', runs=tmp_path/'a', epochs=3, batch_size=2, checkpoint=dict(every=2, keep_last=2, resume_minutes=1e-6))
    def life(cfg, seconds=None):
        "Whether it was killed"
        if not (child := os.fork()):
            null = os.open(os.devnull, os.O_WRONLY); os.dup2(null, 1); os.dup2(null, 2)
            try: rtsseg.training.train(cfg)
            except BaseException: os._exit(1)
            os._exit(0)
        if seconds is not None: time.sleep(seconds); os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL), code
        return code != 0
    assert not life(cfg)
    twin = cfg.model_copy(update=dict(runs=tmp_path/'twin')); began = time.monotonic(); assert not life(twin); whole = time.monotonic() - began      # what is read once is in the cache by now
    def result(cfg):
        folder, = cfg.runs.glob('soak/*/seed42'); states = [load_state(folder/'checkpoints'/f'{n}.ckpt') for n in ('resume', 'best')]
        return *states, (folder/'model'/'model.safetensors').read_bytes()
    one, killed, runs = result(cfg), 0, 0
    while killed < kills:
        other = cfg.model_copy(update=dict(runs=tmp_path/'b')); runs += 1
        while life(other, dice.uniform(.1, .7) * whole if killed < kills else None):
            killed += 1
            for f in other.runs.rglob('*.ckpt'): load_state(f)
        assert same(one, result(other)); shutil.rmtree(other.runs)
    print(f'{killed} of {killed} kills survived, in {runs} runs')

def test_31_a_line_of_the_log_that_was_cut_off(tmp_path):
    "A kill in the middle of a line of the log leaves no half line for those that follow"
    (tmp_path/'log.jsonl').write_text('{"event": "start"}\n{"event": "ep')
    Log(tmp_path, System()).write('start', epoch=1)
    assert [json.loads(l)['event'] for l in (tmp_path/'log.jsonl').read_text().splitlines()] == ['start', 'start']

# ---------------------------------------------------------------- 32: asked to stop
class Asks(Nothing):
    "A meter that sends SIGTERM to its own process, at the n-th batch"
    def __init__(self, n): self.n = n
    def update(self, out, batch):
        self.n -= 1
        if not self.n: os.kill(os.getpid(), signal.SIGTERM)

def test_32_sigterm_in_validation(undisturbed, tmp_path):
    "It stops before the next batch, and validates anew when it goes on"
    class Task(Points):
        seen = 0
        def meter(self): return Asks(1)
        def forward(self, model, batch): self.seen += not model.training; return model(batch['x'])[:, 0]
    with StopSignals() as t:
        half = again(tmp_path, 0, task=(task := Task()), observers=[t])
    assert half.reason == 'SIGTERM' and task.seen == 1 and not half.history and half.batch == 10
    equal(undisturbed, again(tmp_path))

@pytest.mark.parametrize('times', [1, 2])
def test_32_sigterm_in_training(undisturbed, tmp_path, times):
    "Asked once or twice: the step under way is the last, and the run goes on from there to the same bits"
    with StopSignals() as t:
        half = again(tmp_path, 0, observers=[At(7, lambda run: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(times)]), t])
    assert half.step == 7 and not half.finished
    equal(undisturbed, again(tmp_path))

def test_32_sigterm_while_saving(undisturbed, tmp_path, monkeypatch):
    "The file is written to its end, by a thread; the step that is under way is the last"
    write, asked = rtsseg.checkpoint.write_atomic, threading.Event()
    def slow(path, data):
        if not asked.is_set(): os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM); asked.set()
        return write(path, data)
    monkeypatch.setattr(rtsseg.checkpoint, 'write_atomic', slow)
    with StopSignals() as t: half = again(tmp_path, 0, observers=[At(2, lambda run: asked.wait(60)), t], checkpoint=dict(every=2, resume_minutes=1e-9))
    monkeypatch.undo()
    assert half.step == 2 and {f.stem: load_state(f)['step'] for f in (tmp_path/'checkpoints').iterdir()} == dict(resume=2, before=1)
    equal(undisturbed, again(tmp_path))

def test_32_sigterm_before_the_first_step(undisturbed, tmp_path):
    "Asked for before there is anything to stop: it stops after one step"
    with StopSignals() as t:
        os.kill(os.getpid(), signal.SIGTERM)
        half = again(tmp_path, 0, observers=[t])
    assert half.step == 1
    equal(undisturbed, again(tmp_path))

# ---------------------------------------------------------------- 31, 32: two processes
def two(work, said, limit=60):
    "Fork two processes of one run, which call work(rank), and say what they say to the files <said>-<rank>.txt; their exit codes"
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    pids = []
    for rank in (0, 1):
        if not (child := os.fork()):
            try:
                sys.stdout = sys.stderr = open(f'{said}-{rank}.txt', 'a', buffering=1)
                os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port)); work(rank); os._exit(0)
            except BaseException: traceback.print_exc(); os._exit(1)
        pids.append(child)
    codes, end = {}, time.monotonic() + limit
    while len(codes) < 2 and time.monotonic() < end:
        for p in set(pids) - codes.keys():
            if (found := os.waitpid(p, os.WNOHANG))[0]: codes[p] = os.waitstatus_to_exitcode(found[1])
        time.sleep(.01)
    for p in set(pids) - codes.keys(): os.kill(p, signal.SIGKILL); os.waitpid(p, 0)
    assert len(codes) == 2, f'a process still waited for the other after {limit} seconds'
    return [codes[p] for p in pids]

def pair(folder, hurt=lambda rank, run: None, seed=9, task=lambda rank: None):
    "Two processes train in the small world, and meet `hurt(rank, run)` after every step"
    def work(rank):
        with StopSignals() as t: again(folder, seed, task=task(rank), observers=[SimpleNamespace(on_step=lambda run: hurt(rank, run)), t], checkpoint=dict(every=2, resume_minutes=1e-9))
    return two(work, folder)

def files(folder): return {n: load_state(folder/'checkpoints'/f'{n}.ckpt') for n in ('resume', 'best', 'epoch-0002', 'epoch-0004')}

@pytest.fixture(scope='module')
def undisturbed_two(tmp_path_factory):
    "What two processes leave behind that nobody disturbed: 5 micro-batches each, 3 steps an epoch"
    folder = tmp_path_factory.mktemp('two')/'run'; assert pair(folder, seed=0) == [0, 0]
    return files(folder)

def signals(sign, ranks, step):
    def hurt(rank, run):
        if run.step == step and rank in ranks: os.kill(os.getpid(), sign)
    return hurt

@pytest.mark.parametrize('ranks', [(0,), (1,), (0, 1)])
def test_32_sigterm_to_one_of_two_processes_or_both(undisturbed_two, tmp_path, ranks):
    "Both stop after the same step, and go on to the same bits"
    folder = tmp_path/'run'
    assert pair(folder, signals(signal.SIGTERM, ranks, 5), seed=0) == [0, 0]
    half = load_state(folder/'checkpoints'/'resume.ckpt'); assert half['step'] == 5 and not half['finished']
    assert pair(folder) == [0, 0] and same(files(folder), undisturbed_two)

@pytest.mark.parametrize('ranks', [(0,), (1,)])
def test_32_sigterm_in_validation_of_two_processes(undisturbed_two, tmp_path, ranks):
    "Whichever is asked, the validation is left by both, and done anew"
    class Task(Points):
        def __init__(self, rank): self.rank = rank
        def meter(self): return Asks(1) if self.rank in ranks else Nothing()
    folder = tmp_path/'run'
    assert pair(folder, seed=0, task=Task) == [0, 0]
    half = load_state(folder/'checkpoints'/'resume.ckpt'); assert (half['step'], half['batch'], half['history'], half['best']) == (3, 5, [], {})
    assert pair(folder) == [0, 0] and same(files(folder), undisturbed_two)

@pytest.mark.parametrize('rank', [0, 1])
@pytest.mark.parametrize('step', [4, 9])
def test_31_one_of_two_processes_is_killed(undisturbed_two, tmp_path, rank, step):
    "The other does not wait for it for ever; started again, both go on from the last checkpoint to the same bits"
    folder = tmp_path/'run'; codes = pair(folder, signals(signal.SIGKILL, (rank,), step), seed=0)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1
    assert load_state(folder/'checkpoints'/'resume.ckpt')['step'] in (step - 2, step - 1)      # the thread may have been killed too
    assert pair(folder) == [0, 0] and same(files(folder), undisturbed_two)

def children(pid): return [int(p) for p in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]

def test_32_sigterm_to_the_launcher_of_two_processes(tmp_path):
    "rtsseg-train --processes 2 whose launcher is told to end: both stop, save and are gone; the run goes on to the same model, byte for byte"
    cfg = {name: tiny(tmp_path, name='two', runs=tmp_path/name, epochs=12, batch_size=4, data=dict(manifest=toy_world(tmp_path/'world'), tile_size=64, split_check='warn')) for name in ('half', 'whole')}      # before processes read it
    (tmp_path/'half.yaml').write_text(to_yaml(cfg['half'])); log = lambda: [json.loads(l) for f in tmp_path.glob('half/*/*/seed42/log.jsonl') for l in f.read_text().splitlines() if l.endswith('}')]
    trainer = subprocess.Popen([Path(sys.executable).with_name('rtsseg-train'), '--config', tmp_path/'half.yaml', '--processes', '2'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1'))
    while not any(l['event'] == 'epoch' and l['epoch'] == 2 for l in log()): assert trainer.poll() is None, trainer.stdout.read(); time.sleep(.02)
    workers = children(trainer.pid); trainer.terminate(); out, _ = trainer.communicate(timeout=200)
    assert len(workers) == 2 and not any(Path(f'/proc/{p}').exists() for p in workers) and trainer.returncode == 3, out
    half, = tmp_path.glob('half/two/*/seed42'); end = log()[-1]
    assert (end['event'], end['reason']) == ('end', 'SIGTERM') and load_state(half/'checkpoints'/'resume.ckpt')['step'] == end['step'] and not (half/'model').exists()
    for name in ('half', 'whole'): assert two(lambda rank: rtsseg.training.train(cfg[name]), tmp_path/name, 200) == [0, 0]
    whole, = tmp_path.glob('whole/two/*/seed42')
    assert same(load_state(half/'checkpoints'/'resume.ckpt'), load_state(whole/'checkpoints'/'resume.ckpt')) and (half/'model'/'model.safetensors').read_bytes() == (whole/'model'/'model.safetensors').read_bytes()

# ---------------------------------------------------------------- 33: no room
def full_disk(monkeypatch, refuse):
    "Writes for which `refuse(number, name)` holds meet a full disk half-way"
    count, real = [0], os.fsync
    def fsync(fd):
        name = os.readlink(f'/proc/self/fd/{fd}')
        if name.endswith('.tmp'):
            count[0] += 1
            if refuse(count[0], Path(name).name): raise OSError(errno.ENOSPC, 'No space left on device', name)
        return real(fd)
    monkeypatch.setattr(rtsseg.config.os, 'fsync', fsync)

@pytest.mark.parametrize('k,minutes', [*((k, 5) for k in range(1, 7)), *((k, 1e-9) for k in (1, 2, 5, 6, 14))])
def test_33_disk_full_at_a_write(undisturbed, tmp_path, monkeypatch, capsys, k, minutes):
    "One write fails, at once or in a thread, its old file stays whole, and the run ends in the same weights"
    full_disk(monkeypatch, lambda i, name: i == k)
    done = again(tmp_path, 0, checkpoint=dict(every=1, keep_last=9, resume_minutes=minutes)); monkeypatch.undo()
    assert 'was not written (No space left on device)' in capsys.readouterr().err and done.finished
    for f in (tmp_path/'checkpoints').iterdir(): load_state(f)
    assert done.best == load_state(tmp_path/'checkpoints'/'best.ckpt')['best']           # never a best that no file holds
    if done.best == undisturbed.best: equal(undisturbed, done)

def test_33_disk_full_at_the_end(undisturbed, tmp_path, monkeypatch):
    "The run stops with an error that says so; once there is room it goes on"
    full_disk(monkeypatch, lambda i, name: 'resume' in name)
    with pytest.raises(UnsavedError, match='could not be written; make room'): again(tmp_path, 0)
    monkeypatch.undo()
    equal(undisturbed, again(tmp_path))

def test_33_a_disk_that_was_full_from_the_beginning(undisturbed, tmp_path, monkeypatch, capsys):
    "Nothing is promised that is not there: the run begins anew, and says so"
    full_disk(monkeypatch, lambda i, name: 'best' not in name); rare = dict(checkpoint=dict(every=9))
    with pytest.raises(UnsavedError, match='starts from the beginning, because it has no checkpoint before it'): again(tmp_path, 0, **rare)
    monkeypatch.undo(); equal(undisturbed, again(tmp_path, 0, **rare))
    assert 'note: best.ckpt is the only checkpoint, and it holds no state to resume from: the run starts from the beginning' in capsys.readouterr().err

def test_33_disk_full_at_the_end_of_two_processes(undisturbed_two, tmp_path, monkeypatch):
    "The first cannot write, and ends; the second does not wait for it"
    folder = tmp_path/'run'; full_disk(monkeypatch, lambda i, name: 'resume' in name)
    assert pair(folder, seed=0) == [1, 1] and not (folder/'checkpoints'/'resume.ckpt').exists(); monkeypatch.undo()
    assert 'could not be written; make room' in Path(f'{folder}-0.txt').read_text() and pair(folder) == [0, 0] and same(files(folder), undisturbed_two)

# ---------------------------------------------------------------- 34, 35: no numbers
class Bad(Points):
    "The loss is no number where it is asked for the n-th time"
    def __init__(self, *at): self.at, self.n = at, 0
    def loss(self, out, batch):
        found = super().loss(out, batch)
        if out.requires_grad:
            self.n += 1
            if self.n in self.at: found = {k: v * math.nan for k, v in found.items()}
        return found

def state_of(model): return {k: v.clone() for k, v in model.state_dict().items()}

def test_34_one_bad_loss_changes_nothing(tmp_path):
    "Weights, batch statistics and their average are those of before; the run goes on and counts it"
    seen = []
    look = SimpleNamespace(on_step=lambda r: seen.append((state_of(r.model), state_of(r.average.module), r.skipped, r.bad)))
    done = again(tmp_path, 0, task=Bad(5), observers=[look])           # the first half of the third step
    assert all(torch.equal(seen[1][i][k], seen[2][i][k]) for i in (0, 1) for k in seen[1][i]) and [s[2:] for s in seen[1:4]] == [(0, 0), (1, 1), (1, 0)]
    assert done.finished and all(v.isfinite().all() for s in (done.model, done.judged) for v in s.state_dict().values() if v.is_floating_point())

def test_34_ten_in_a_row_stop_the_run(tmp_path):
    "A run that can learn nothing any more stops, says where to look, and remembers how many there were"
    done = again(tmp_path, 0, task=Bad(*range(9, 999)))
    assert done.step == 4 + 10 and not done.finished and done.reason.startswith('10 steps in a row without a finite loss') and 'rtsseg-check' in done.reason
    assert again(tmp_path, task=Bad(1)).step == 15                      # it remembers: one more is enough
    assert again(tmp_path).finished                                     # and the count begins anew with the first good step

def test_34_a_real_run_of_short_epochs(tmp_path, monkeypatch):
    "Whole epochs without a finite loss are none the less told, and the run stops in a state that can be gone on from"
    cfg, bad = tiny(tmp_path, epochs=15, early_stopping=dict(patience=None)), [0]
    class Task(rtsseg.segment.SegmentTask):
        def loss(self, out, batch):
            bad[0] += out.requires_grad
            return {k: v * (math.nan if bad[0] > 3 and out.requires_grad else 1) for k, v in super().loss(out, batch).items()}
    monkeypatch.setattr(rtsseg.segment, 'SegmentTask', Task)
    with pytest.raises(Stopped, match='10 steps in a row without a finite loss'): rtsseg.training.train(cfg)
    assert newest_state(next(tmp_path.glob('runs/tiny/*/seed42/checkpoints')))['step'] == 13

def test_34_an_overflow_of_the_scaler_does_not_count(monkeypatch):
    "Far more than ten in a row, until the scale fits: the run goes on"
    def scaled(cfg):
        AcceleratorState._reset_state(reset_partial_state=True); acc = Accelerator(cpu=True)
        acc.scaler = torch.amp.GradScaler('cpu', init_scale=2.**127, growth_interval=10**6); return acc
    monkeypatch.setattr(rtsseg.loop, 'make_accelerator', scaled)
    done = again(None, 0, epochs=6, loss_weights=dict(bce=1e6, square=1e6)); AcceleratorState._reset_state(reset_partial_state=True)
    assert done.skipped > rtsseg.loop.MAX_BAD_STEPS and done.bad == 0 and done.finished and all(v.isfinite().all() for v in done.judged.state_dict().values())

def test_35_a_metric_that_is_no_number_is_never_best(tmp_path):
    "Neither first nor later: the best weights are those of the best number"
    class Blind(Points):
        monitor, values = 'score', [math.nan, .2, math.nan, .1]
        mode = 'max'
        def meter(self): m = Nothing(); m.compute = lambda: dict(score=self.values.pop(0)); return m
    done = again(tmp_path, 0, task=Blind())
    assert (done.best['epoch'], done.best['value']) == (2, .2) and load_state(tmp_path/'checkpoints'/'best.ckpt')['best']['value'] == .2

# ---------------------------------------------------------------- 36: memory
def test_36_out_of_memory_says_what_fits(tmp_path, monkeypatch):
    "The batch is not made smaller behind anybody's back"
    cfg, real = tiny(tmp_path), rtsseg.loop.take_step
    def step(run, group, *a):
        if len(group[0]['tile']) > 3: raise torch.OutOfMemoryError('CUDA out of memory.')
        return real(run, group, *a)
    monkeypatch.setattr(rtsseg.loop, 'take_step', step)
    with pytest.raises(RunError) as e: rtsseg.training.train(cfg)
    assert e.value.code == 3 and 'out of memory with batch_size 8. ' in str(e.value)
    fits, n = (int(str(e.value).split(f'"{k}=')[1].split('"')[0]) for k in ('batch_size', 'accumulate'))
    assert fits <= 3 and fits * n >= 8
    assert not (next(tmp_path.glob('runs/tiny/*/seed42'))/'model').exists()

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')

@on_a_gpu
def test_36_a_gpu_that_is_full(tmp_path, monkeypatch):
    "Of a GPU as small as that: the batch that the message names is one that runs"
    cfg = tiny(tmp_path, device='cuda', precision='fp32', batch_size=32, sampler=dict(curriculum=[dict(first=1, last=1, ratio=5)]), model=MODEL | dict(options=dict(decoder_channels=[128] * 5)))
    gc.collect(); torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats(); rtsseg.training.train(cfg.model_copy(update=dict(runs=tmp_path/'whole')))
    room = torch.cuda.max_memory_allocated() * 7 // 10; gc.collect(); torch.cuda.empty_cache(); monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda *a: (room, room))
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(RunError, match='out of memory with batch_size 32') as e: rtsseg.training.train(cfg)
        fits, n = (int(str(e.value).split(f'"{k}=')[1].split('"')[0]) for k in ('batch_size', 'accumulate'))
        assert e.value.code == 3 and fits < 32 <= fits * n
        assert (rtsseg.training.train(cfg.model_copy(update=dict(batch_size=fits, accumulate=n)))/'model'/'model.safetensors').exists()
    finally: torch.cuda.set_per_process_memory_fraction(1.)

@on_a_gpu
def test_31_two_runs_on_a_gpu(tmp_path):
    "With `deterministic` two runs of a few steps, from the same seed, end in the same bits"
    runs = [rtsseg.training.train(tiny(tmp_path/name, device='cuda', epochs=3, deterministic=True)) for name in 'ab']
    a, b = (load_state(f/'checkpoints'/'resume.ckpt') for f in runs)
    assert same(*({k: s[k] for k in ('model', 'average', 'optimizer')} for s in (a, b))) and len({(f/'model'/'model.safetensors').read_bytes() for f in runs}) == 1

def test_33_a_command_whose_last_state_finds_no_room(tmp_path, monkeypatch):
    "It stops with code 3; once there is room the same command goes on, and makes the model"
    cfg = tiny(tmp_path); full_disk(monkeypatch, lambda i, name: 'resume' in name)
    with pytest.raises(RunError, match='make room') as e: rtsseg.training.train(cfg)
    assert e.value.code == 3 and not list(tmp_path.glob('runs/tiny/*/seed42/model')); monkeypatch.undo()
    assert (rtsseg.training.train(cfg)/'model'/'model.safetensors').exists()

# ---------------------------------------------------------------- 37: workers
class Dies(Dataset):
    "A sample at which the process that reads it meets its end"
    def __init__(self, how): self.how, self.data = how, points(76)
    def __len__(self): return 76
    def __getitem__(self, i):
        if i == 40 and multiprocessing.parent_process(): os.kill(os.getpid(), self.how)
        return self.data[i]

@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGSTOP])
def test_37_a_worker_dies_or_freezes(undisturbed, tmp_path, how):
    "Within the time limit the run stops, its workers are gone, and it goes on from the last checkpoint"
    often = dict(checkpoint=dict(every=2, resume_minutes=1e-9)); began = time.monotonic()
    with pytest.raises(WorkerError, match='(have died|no batch came within 3 seconds).*resumes from the last checkpoint'):
        again(tmp_path, 0, data=Dies(how), loader=dict(shuffle=True, num_workers=2, timeout=3), **often)
    assert time.monotonic() - began < 30 and not multiprocessing.active_children()
    equal(undisturbed, again(tmp_path, 9 if newest_state(tmp_path/'checkpoints') else 0, **often))       # it may have been lost before the first step

def test_37_real_loaders_have_the_time_limit(tmp_path):
    "loader.timeout holds for training and validation, wherever workers are used"
    cfg = tiny(tmp_path); manifest = prepare(cfg)
    for n, want in ((0, 0), (2, 7)):
        cfg.loader = Loader(num_workers=n, timeout=7); feed = loaders(cfg, manifest)
        assert feed.train.timeout == feed.val.timeout == want

FROZEN = """
import subprocess, rtsseg.launch as t
from rtsseg.cli import rtsseg_train
def start(program, n, env, **streams): return [subprocess.Popen(['sh', '-c', 'echo $$; sleep 500 & kill -9 $$'], start_new_session=True, **streams)], None
t.start_processes, t.GRACE_SECONDS = start, 1; rtsseg_train()
"""

def test_37_a_frozen_worker_outlives_its_trainer(tmp_path):
    "It holds the pipe to the command, which ends all the same when the trainer was killed"
    (tmp_path/'tiny.yaml').write_text(to_yaml(tiny(tmp_path))); (tmp_path/'frozen.py').write_text(FROZEN); trainer = None
    command = subprocess.Popen([sys.executable, tmp_path/'frozen.py', '--config', tmp_path/'tiny.yaml'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try: trainer = int(command.stdout.readline()); out, said = command.communicate(timeout=100)
    finally: command.kill(); trainer and os.killpg(trainer, signal.SIGKILL)
    assert command.returncode == 3 and said == f'error: the trainer was ended by SIGKILL; its last line: {trainer}. The same command resumes from the last checkpoint\n'

# ---------------------------------------------------------------- 38: two at once
def test_38_two_runs_in_one_folder(tmp_path):
    "The second waits for a while, and is refused with code 2"
    with run_lock(tmp_path), pytest.raises(Busy, match=rf'another process \(pid {os.getpid()}\) trains in this run folder') as e:
        with run_lock(tmp_path, wait=.5): pass
    assert e.value.code == 2
    with run_lock(tmp_path, wait=0): pass

PROGRAM = 'import rtsseg.training as t; from rtsseg.cli import rtsseg_train; t.run_lock.__wrapped__.__defaults__ = (1,); rtsseg_train()'      # the command, but that it waits a second, and not a minute

@pytest.mark.parametrize('more', [[], ['--fresh'], ['--force']])
def test_38_the_command_in_a_folder_that_is_taken(tmp_path, more):
    "Exit 2, one line that names the process, and nothing is written"
    cfg = tiny(tmp_path); (tmp_path/'tiny.yaml').write_text(to_yaml(cfg)); (tmp_path/'soon.py').write_text(PROGRAM); folder = run_folder(cfg, prepare(cfg).hash); statistics(cfg, prepare(cfg))
    command = [Path(sys.executable).with_name('rtsseg-train')] if more else [sys.executable, tmp_path/'soon.py']
    if more == ['--force']: folder.mkdir(parents=True); (folder/'config.yaml').write_text(to_yaml(cfg.model_copy(update=dict(epochs=7))))
    with run_lock(folder):
        before = {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()}
        done = subprocess.run([*command, '--config', tmp_path/'tiny.yaml', *more], capture_output=True, text=True, timeout=100)
        assert {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()} == before
    assert done.returncode == 2 and done.stderr.splitlines()[-1:] == [f'error: {folder.parent.name}/seed42: another process (pid {os.getpid()}) trains in this run folder; wait for it or stop it']
    assert all(l.startswith(('note: ', 'warning: ')) for l in [*done.stderr.splitlines()[:-1], *done.stdout.splitlines()]) and ('waiting for it, 1 s at most' in done.stderr) == (not more)

def test_38_another_process_ends_this_run_while_two_begin(tmp_path):
    "The first of the two finds under the lock that nothing is left to do, and says so to the second, which had looked before"
    cfg = tiny(tmp_path); model, aside = rtsseg.training.train(cfg)/'model', tmp_path/'aside'; model.rename(aside)
    def begin(rank):
        @contextmanager
        def late(folder):
            with run_lock(folder): time.sleep(3); aside.rename(model); yield          # meanwhile the second comes as far as it comes alone
        rtsseg.training.run_lock = late; rtsseg.training.train(cfg)
    assert two(begin, tmp_path/'said') == [0, 0]
    assert [Path(f'{tmp_path}/said-{r}.txt').read_text().count('trained already') for r in (0, 1)] == [1, 0]

@pytest.mark.parametrize('what', ['busy', 'changed', 'damaged'])
def test_38_what_refuses_the_first_of_two_refuses_both(tmp_path, what):
    "Neither waits for the other"
    cfg = tiny(tmp_path); folder = run_folder(cfg, prepare(cfg).hash); folder.mkdir(parents=True)
    error, words = dict(busy=(Busy, 'another process'), changed=(ConfigError, r'epochs 7 → 1.*--force'), damaged=(RunError, 'No checkpoint is left'))[what]
    if what == 'changed': (folder/'config.yaml').write_text(to_yaml(cfg.model_copy(update=dict(epochs=7))))
    if what == 'damaged': rtsseg.training.train(cfg); (folder/'model'/'model.safetensors').write_bytes(b''); shutil.rmtree(folder/'checkpoints')
    def begin(rank):
        def taken(folder): raise Busy('another process', 2)
        if what == 'busy': rtsseg.training.run_lock = taken
        with pytest.raises(error, match=words): rtsseg.training.train(cfg)
    assert two(begin, tmp_path/'said') == [0, 0]

def test_38_a_folder_that_was_put_aside_meanwhile(tmp_path):
    "Whoever waited for it holds the new one, not the old one under another name"
    folder = tmp_path/'seed42'; folder.mkdir(); got = threading.Event(); old = open(folder/'.lock', 'a'); fcntl.flock(old, fcntl.LOCK_EX)
    def wait():
        with run_lock(folder, wait=20): got.set(); time.sleep(1)
    waiter = threading.Thread(target=wait); waiter.start(); time.sleep(.5); folder.rename(tmp_path/'aside'); old.close()
    assert got.wait(20)
    with pytest.raises(Busy), run_lock(folder, wait=0): pass
    waiter.join()
