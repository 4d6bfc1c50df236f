"Two processes equal one with the same global batch. As a script, this file is what each of the two processes runs"
import math
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import rtsseg.checkpoint
from rtsseg.checkpoint import load_state
from rtsseg.config import CurriculumRow, LoopConfig, Sampler
from rtsseg.loop import Task, TrainingState, fit, validate
from rtsseg.sampler import Batches

# ---------------------------------------------------------------- what both sides run
F, B = nn.functional, 4

def images(n=48, seed=0):
    """Small images with a bright square; each micro-batch of 4 has another number of valid pixels, the third and the
    fifth to eighth none"""
    generator, rows = torch.Generator().manual_seed(seed), []
    for i in range(n):
        y = torch.zeros(8, 8)
        y[2:2 + i % 5, 1:7] = 1
        x = torch.stack([y + torch.randn(8, 8, generator=generator), torch.randn(8, 8, generator=generator)])
        y[torch.rand(8, 8, generator=generator) < (i // B % 8) / 8] = 255
        if i // B in (2, 4, 5, 6, 7):
            y[:] = 255
        kind = (i // 8 + (i if i > 36 else 0)) % 2
        rows.append(dict(x=x, y=y, kind=torch.tensor(kind)))
    return rows

def group_norm():
    return nn.GroupNorm(2, 8)

class Net(nn.Module):
    "An image goes to the head of its kind: often a head sees none"
    def __init__(self, norm=group_norm):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), norm(), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.head, self.other = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 1, 1)

    def forward(self, x, kind):
        features, heads = self.encoder(x), {}
        for k, head in enumerate((self.head, self.other)):
            chosen = kind == k
            if chosen.any():
                heads[k] = (head(features[chosen])[:, 0], chosen)
        return features, heads

class Squares(Task):
    "Mean cross-entropy over valid pixels for each kind of image; a helper learns the mean brightness from the features"
    monitor, mode = 'accuracy', 'max'

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.helper = nn.Linear(8, 1)

    def parts(self, model):
        return dict(encoder=[model.encoder], decoder=[model.head, model.other])

    def modules(self):
        return self.helper

    def forward(self, model, batch):
        return model(batch['x'], batch['kind'])

    @staticmethod
    def lit(batch):
        return (batch['y'] != 255).any(2).any(1).float()

    def count(self, batch):
        valid = {f'bce{k}': float((batch['y'][batch['kind'] == k] != 255).sum()) for k in (0, 1)}
        return valid | dict(light=float(self.lit(batch).sum()))

    def loss(self, out, batch):
        (features, heads), lit = out, self.lit(batch)
        light = (self.helper(features.mean((2, 3)))[:, 0] - batch['x'].mean((1, 2, 3)))**2
        values = dict(light=(light * lit).sum() / lit.sum().clamp(min=1))
        for k in (0, 1):
            if k not in heads:
                values[f'bce{k}'] = features.sum() * 0
                continue
            logits, chosen = heads[k]
            y = batch['y'][chosen]
            valid = y != 255
            total = F.binary_cross_entropy_with_logits(logits, y * valid, weight=valid.float(), reduction='sum')
            values[f'bce{k}'] = total / valid.sum().clamp(min=1)
        return values

    def tally(self, out, batch):
        found = Accuracy()
        found.update(out, batch)
        return {k: torch.tensor(float(v)) for k, v in vars(found).items()}

    def summary(self, sums):
        return sums | dict(accuracy=sums['right'] / max(sums['n'], 1))

    def meter(self):
        return Accuracy()

    def train_meter(self):
        return Rows()

class Weighed(Squares):
    "Says how hard each image is, whichever head it goes to"
    def difficulty(self, out, batch):
        losses = torch.full(batch['kind'].shape, math.nan)
        for logits, chosen in out[1].values():
            y = batch['y'][chosen]
            valid = (y != 255).float()
            each = F.binary_cross_entropy_with_logits(logits, y.clamp(max=1), weight=valid, reduction='none')
            losses[chosen] = each.mean((1, 2))
        return batch['tile'], losses

class Keyed:
    "The images, read by the sampler's keys; 12 of 48 count as positive. Keeps what was read"
    def __init__(self):
        self.rows, self.read = images(), []

    def __getitem__(self, key):
        self.read.append(key)
        return self.rows[key[2]] | dict(tile=key[2])

class Accuracy:
    "Share of valid pixels on the right side"
    def __init__(self):
        self.right, self.n = 0, 0

    def update(self, out, batch):
        for logits, chosen in out[1].values():
            y = batch['y'][chosen]
            valid = y != 255
            self.right += int(((logits > 0) == (y == 1))[valid].sum())
            self.n += int(valid.sum())

    def state(self):
        return self.right, self.n

    def merge(self, states):
        self.right, self.n = map(sum, zip(*states))

    def compute(self):
        return dict(accuracy=self.right / max(self.n, 1))

class Rows:
    "The median brightness of the images that were seen, which no sum over batches gives, and their number"
    def __init__(self):
        self.rows = []

    def update(self, out, batch):
        self.rows += batch['x'].mean((1, 2, 3)).tolist()

    def state(self):
        return self.rows

    def merge(self, states):
        self.rows = [row for rows in states for row in rows]

    def compute(self):
        return dict(median=float(np.median(self.rows)), seen=len(self.rows))

class Watch:
    "Keeps a frozen weight of each epoch"
    def __init__(self):
        self.weights = {}

    def on_epoch(self, run):
        self.weights[run.epoch] = run.model.encoder[0].weight.detach().clone()

class Stop:
    "Asks once, on one process only"
    def __init__(self, rank, hook, when):
        self.rank, self.when = rank, when
        setattr(self, hook, self.ask)

    def ask(self, run, *_):
        if run.processes.rank == self.rank and run.step == self.when:
            run.stop('as asked')

def train(folder, accumulate=1, observers=(), norm=group_norm, seed=0, data=None, task=Squares, **settings):
    torch.manual_seed(seed)
    model = Net(norm)
    defaults = dict(device='cpu', epochs=4, accumulate=accumulate, batch_size=B, freeze_backbone_epochs=0,
                    val_frequency=1, ema=dict(decay=.9),
                    lr=dict(base_lr=.01, backbone_lr_multiplier=.5, warmup_epochs=1, frozen_lr=.02))
    data = data or DataLoader(images(), batch_size=B, shuffle=False)
    val = DataLoader(images(12, seed=1), batch_size=B)
    return fit(LoopConfig(**defaults | settings), task(seed), model, data, val, folder, observers)

def result(run):
    "What is compared: all but times"
    history = [{k: v for k, v in row.items() if k not in TrainingState.MEASURED} for row in run.history]
    return dict(best_file=load_state(run.folder/'checkpoints'/'best.ckpt'), model=run.model.state_dict(),
                judged=run.judged.state_dict(), helper=run.task.helper.state_dict(), history=history, best=run.best,
                step=run.step, skipped=run.skipped, reason=run.reason, epoch=run.epoch, finished=run.finished)

# A scenario gets a folder and the number of processes that share it.
# Accumulation makes the global batch the same
def plain(folder, world):
    return result(train(folder, accumulate=2 // world))

def accumulated(folder, world):
    return result(train(folder, accumulate=4 // world))

def frozen(folder, world):
    watch = Watch()
    run = train(folder, accumulate=2 // world, freeze_backbone_epochs=2, observers=[watch])
    return dict(result(run), frozen_weights=watch.weights)

def only_helper(folder, world):
    stages = [dict(first=1, last=1, frozen=['encoder', 'decoder'], rates=dict(modules=.01)),
              dict(first=2, last=2, rates=dict(encoder=.01, decoder=.01, modules=.01))]
    return result(train(folder, accumulate=2 // world, epochs=2, stages=stages))

def early(folder, world):
    stopping = dict(patience=2, window=1, min_delta=.5, start_epoch=3)
    return result(train(folder, accumulate=2 // world, epochs=30, early_stopping=stopping))

def own_start(folder, world):
    "The first process decides"
    return result(train(folder, accumulate=2 // world, seed=int(os.environ.get('RANK', 0))))

def batch_norm(folder, world):
    return result(train(folder, norm=lambda: nn.BatchNorm2d(8)))

def stopped(folder, world, hook='on_step', when=8, **settings):
    half = result(train(folder, accumulate=2 // world, observers=[Stop(world - 1, hook, when)], **settings))
    return dict(half=half, rest=result(train(folder, accumulate=2 // world, seed=7, **settings)))

def stopped_at_epoch_end(folder, world):
    return stopped(folder, world, when=12)

def stopped_in_validation(folder, world):
    return stopped(folder, world, 'on_validation', 12)

def stopped_batch_norm(folder, world):
    return stopped(folder, world, norm=lambda: nn.BatchNorm2d(8))

def hard(folder, world, observers=(), **settings):
    draws = Sampler(hard_negatives=.9, curriculum=[CurriculumRow(first=1, last=1, ratio=2)])
    sampler, data = Batches(np.arange(48) % 4 == 0, draws, B, seed=3), Keyed()
    loader = DataLoader(data, batch_sampler=sampler)
    run = train(folder, accumulate=2 // world, task=Weighed, data=loader, observers=observers, **settings)
    learnt = run.sampler.state()
    sampler.set_epoch(run.epoch + 1)
    return dict(result(run), learnt=learnt, read=data.read, next=list(sampler))

def stopped_hard(folder, world):
    return dict(half=hard(folder, world, [Stop(world - 1, 'on_step', 8)]), rest=hard(folder, world, seed=7))

EQUAL = [plain, accumulated, frozen, only_helper, early]
STOPPED = [stopped, stopped_at_epoch_end, stopped_in_validation]
SCENARIOS = [*EQUAL, own_start, batch_norm, *STOPPED, stopped_batch_norm, hard, stopped_hard]

def run_scenarios(here, rank):
    "What each process does: run all scenarios and keep their results"
    torch.set_num_threads(1)
    written, write = [], rtsseg.checkpoint.write_atomic

    def noting(path, content):
        written.append(Path(path).name)
        return write(path, content)

    rtsseg.checkpoint.write_atomic = noting
    for scenario in SCENARIOS:
        print(f'process {rank}: {scenario.__name__}', flush=True)
        written.clear()
        found = scenario(here/scenario.__name__, 2)
        torch.save(dict(found, written=list(written)), here/f'{scenario.__name__}-{rank}.pt')

if __name__ == '__main__':
    run_scenarios(Path(sys.argv[1]), int(os.environ['RANK']))
    sys.exit()

# ---------------------------------------------------------------- what is asked of them
# a deadlock ends here, and nothing else: one process takes seconds for it all
DEADLOCK_SECONDS = 900

def start_pair(folder, log):
    "Start both processes"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = os.environ | dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port),
                            OMP_NUM_THREADS='1')
    return [subprocess.Popen([sys.executable, __file__, folder], stdout=log, stderr=log,
                             env=env | dict(RANK=str(rank), LOCAL_RANK=str(rank))) for rank in (0, 1)]

def wait_for_pair(pair):
    "Exit codes of both; as soon as one fails, the other is killed, since it would wait for it"
    def watch(process):
        if process.wait():
            for other in pair:
                other.kill()

    threads = [threading.Thread(target=watch, args=[process], daemon=True) for process in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLOCK_SECONDS)
    codes = [process.poll() for process in pair]
    for process in pair:
        process.kill()
        process.wait()
    return codes

@pytest.fixture(scope='module')
def two():
    "The results of both processes: two(scenario) → [of the first, of the second]"
    with TemporaryDirectory() as d:
        with open(f'{d}/log', 'w') as log:
            codes = wait_for_pair(start_pair(d, log))
        assert codes == [0, 0], f'exit codes {codes} (None: a deadlock)\n' + Path(f'{d}/log').read_text()[-4000:]
        yield lambda scenario: [torch.load(f'{d}/{scenario.__name__}-{rank}.pt') for rank in (0, 1)]

def close(a, b, tolerance=2e-6):
    "Nested results agree: numbers and tensors to a tolerance, all else exactly"
    if isinstance(a, torch.Tensor):
        assert a.shape == b.shape
        if a.is_floating_point():
            assert (a - b).abs().max() <= tolerance
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            close(a[key], b[key], tolerance)
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            close(x, y, tolerance)
    elif isinstance(a, float):
        assert a == pytest.approx(b, abs=tolerance)
    else:
        assert a == b

def without(result, *names):
    return {k: v for k, v in result.items() if k not in ('written', *names)}

@pytest.mark.parametrize('scenario', EQUAL, ids=lambda f: f.__name__)
def test_equals_one_process(two, scenario, tmp_path):
    """Weights, averages, helpers, learning rates, training loss, gradient norms, the meter over training, every
    validation, the best epoch and the skipped steps"""
    one, (first, second) = scenario(tmp_path, 1), two(scenario)
    close(without(first), without(second), 0.)
    close(without(first), one)
    assert one['skipped'] and one['step'] > 4

def test_frozen_weights_keep_still(two):
    "What the comparison above would not notice if it were wrong on both sides"
    for r in two(frozen):
        seen = r['frozen_weights']
        assert torch.equal(seen[1], seen[2]) and not torch.equal(seen[2], seen[3])

def test_early_stopping_stops_both(two):
    first, _ = two(early)
    assert first['finished'] and 'early stopping' in first['reason'] and first['epoch'] == 6

def test_every_weight_trains(two):
    first, _ = two(plain)
    torch.manual_seed(0)
    model, helper = Net(), Squares(0).helper
    for name, value in model.state_dict().items():
        assert not torch.equal(value, first['model'][name])
    assert not torch.equal(helper.weight, first['helper']['weight'])

def test_tallies_are_those_of_one_process(two, tmp_path):
    "The epoch's counts are whole numbers, the same on either side"
    def counts(result):
        return [(row['train/right'], row['train/n']) for row in result['history']]

    one, (first, second) = plain(tmp_path, 1), two(plain)
    assert counts(one) == counts(first) == counts(second)
    assert all(n > 0 and n == int(n) for row in counts(one) for n in row)

def test_a_meter_over_training_is_merged(two):
    "Each epoch's meter has seen the images of both processes, but for steps that were skipped"
    for r in two(plain):
        skipped = np.diff([0, *(row['skipped'] for row in r['history'])])
        assert [row['train/seen'] for row in r['history']] == [48 - 8 * n for n in skipped]

def batches_of(keys):
    return [keys[i:i + B] for i in range(0, len(keys), B)]

def test_hard_negatives_are_learnt_by_all(two, tmp_path):
    """Each process knows the losses that all saw, so each draws the stream of one process with the same global batch;
    together they read it"""
    one, (first, second) = hard(tmp_path, 1), two(hard)
    close(without(first, 'read'), without(second, 'read'), 0.)
    close(without(first, 'read', 'next'), without(one, 'read', 'next'), 1e-5)
    assert first['next'] == one['next'] and one['learnt']['losses'] and one['learnt']['learnt']
    pairs = zip(batches_of(first['read']), batches_of(second['read']), strict=True)
    assert [batch for pair in pairs for batch in pair] == batches_of(one['read'])
    assert first['written'] and second['written'] == []

def test_hard_negatives_over_a_stop(two):
    "What the main process saved is what both knew"
    for r, whole in zip(two(stopped_hard), two(hard)):
        half, rest = r['half'], r['rest']
        assert half['step'] == 8 and half['learnt']['learnt']
        close(without(rest, 'read'), without(whole, 'read'), 0.)
        assert half['read'] + rest['read'] == whole['read']

def test_first_process_decides_the_start(two):
    "Processes that begin with weights of their own, in model and helper, train the first one's"
    first, second = two(own_start)
    close(without(first), without(two(plain)[0]), 0.)
    close(without(first), without(second), 0.)

@pytest.mark.parametrize('scenario', [*EQUAL, own_start, batch_norm], ids=lambda f: f.__name__)
def test_only_the_main_process_writes(two, scenario):
    first, second = two(scenario)
    assert 'best.ckpt' in first['written'] and 'resume.ckpt' in first['written'] and second['written'] == []

@pytest.mark.parametrize('scenario', STOPPED, ids=lambda f: f.__name__)
def test_one_asks_both_stop_and_resume(two, scenario):
    "The second process alone asks: both stop after the same step, and the resumed run equals the undisturbed one"
    step = 8 if scenario is stopped else 12
    for r, whole in zip(two(scenario), two(plain)):
        half = r['half']
        assert (half['reason'], half['finished'], half['step']) == ('as asked', False, step)
        close(without(r['rest']), without(whole), 0.)

def test_batch_statistics(two):
    "The first process's are judged and saved: best.ckpt, evaluated alone, gives the best validation again"
    first, second = two(batch_norm)
    name = 'encoder.1.running_mean'
    close(without(first, 'model'), without(second, 'model'), 0.)
    assert not torch.equal(first['model'][name], second['model'][name])
    net = Net(lambda: nn.BatchNorm2d(8))
    net.load_state_dict(first['best_file']['model'])
    metrics, _ = validate(Squares(), net, DataLoader(images(12, seed=1), batch_size=B))
    # the brightness needs the helper
    expected = {k: v for k, v in first['best']['metrics'].items() if k not in ('loss', 'loss/light')}
    assert {'accuracy', 'loss/bce0'} <= expected.keys()
    close({k: metrics[k] for k in expected}, expected)
    for r, whole in zip(two(stopped_batch_norm), two(batch_norm)):
        close(without(r['rest'], 'model'), without(whole, 'model'), 0.)
