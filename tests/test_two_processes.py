"""Two processes equal one with the same global batch. Called as a script, this file is what each of the two processes runs"""
import math, os, socket, subprocess, sys, time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np, pytest, torch
from torch import nn
from torch.utils.data import DataLoader

import rtsseg.loop
from rtsseg.config import CurriculumRow, LoopConfig, Sampler
from rtsseg.checkpoint import load_state
from rtsseg.loop import Task, TrainingState, fit, validate
from rtsseg.sampler import Batches

# ---------------------------------------------------------------- what both sides run
F, B, LIMIT = nn.functional, 4, 90     # LIMIT: seconds after which the two processes count as deadlocked

def images(n=48, seed=0):
    "Small images with a bright square; each micro-batch of 4 has another number of valid pixels, the third and the fifth to eighth none"
    g, out = torch.Generator().manual_seed(seed), []
    for i in range(n):
        y = torch.zeros(8, 8); y[2:2 + i % 5, 1:7] = 1
        x = torch.stack([y + torch.randn(8, 8, generator=g), torch.randn(8, 8, generator=g)])
        y[torch.rand(8, 8, generator=g) < (i // B % 8) / 8] = 255
        if i // B in (2, 4, 5, 6, 7): y[:] = 255
        out.append(dict(x=x, y=y, kind=torch.tensor((i // 8 + (i > 36) * i) % 2)))
    return out

class Net(nn.Module):
    def __init__(self, norm=lambda: nn.GroupNorm(2, 8)):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), norm(), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.head, self.other = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 1, 1)
    def forward(self, x, kind):
        f = self.encoder(x); heads = {}
        for k, head in enumerate((self.head, self.other)):      # an image goes to the head of its kind: often a head sees none
            if (kind == k).any(): heads[k] = (head(f[kind == k])[:, 0], kind == k)
        return f, heads

class Squares(Task):
    "Mean cross-entropy over valid pixels for each kind of image; a helper learns the mean brightness from the features"
    monitor, mode = 'accuracy', 'max'
    def __init__(self, seed=0): torch.manual_seed(seed); self.helper = nn.Linear(8, 1)
    def parts(self, model): return dict(encoder=[model.encoder], decoder=[model.head, model.other])
    def modules(self): return self.helper
    def forward(self, model, batch): return model(batch['x'], batch['kind'])
    def count(self, batch): return {**{f'bce{k}': float((batch['y'][batch['kind'] == k] != 255).sum()) for k in (0, 1)}, 'light': float(self.lit(batch).sum())}
    @staticmethod
    def lit(batch): return (batch['y'] != 255).any(2).any(1).float()
    def loss(self, out, batch):
        (features, heads), lit = out, self.lit(batch)
        light = (self.helper(features.mean((2, 3)))[:, 0] - batch['x'].mean((1, 2, 3)))**2
        values = dict(light=(light * lit).sum() / lit.sum().clamp(min=1))
        for k in (0, 1):
            if k not in heads: values[f'bce{k}'] = features.sum() * 0; continue
            z, y = heads[k][0], batch['y'][heads[k][1]]; valid = y != 255
            values[f'bce{k}'] = F.binary_cross_entropy_with_logits(z, y * valid, weight=valid.float(), reduction='sum') / valid.sum().clamp(min=1)
        return values
    def tally(self, out, batch):
        found = Accuracy(); found.update(out, batch)
        return {k: torch.tensor(float(v)) for k, v in vars(found).items()}
    def summary(self, sums): return sums | dict(accuracy=sums['right'] / max(sums['n'], 1))
    def meter(self): return Accuracy()

class Weighed(Squares):
    "Says how hard each image is, whichever head it goes to"
    def difficulty(self, out, batch):
        losses = torch.full(batch['kind'].shape, math.nan)
        for z, of in out[1].values():
            y = batch['y'][of]; losses[of] = F.binary_cross_entropy_with_logits(z, y.clamp(max=1), weight=(y != 255).float(), reduction='none').mean((1, 2))
        return batch['tile'], losses

class Keyed:
    "The images, read by the sampler's keys; 12 of 48 count as positive. Keeps what was read"
    def __init__(self): self.rows, self.read = images(), []
    def __getitem__(self, key): self.read.append(key); return self.rows[key[2]] | dict(tile=key[2])

class Accuracy:
    def __init__(self): self.right, self.n = 0, 0
    def update(self, out, batch):
        for z, of in out[1].values():
            ok = batch['y'][of] != 255; self.right += int(((z > 0) == (batch['y'][of] == 1))[ok].sum()); self.n += int(ok.sum())
    def state(self): return self.right, self.n
    def merge(self, states): self.right, self.n = map(sum, zip(*states))
    def compute(self): return dict(accuracy=self.right / max(self.n, 1))

class Watch:
    "Keeps a frozen weight of each epoch"
    def on_epoch(self, run): run.__dict__.setdefault('seen', {})[run.epoch] = run.model.encoder[0].weight.detach().clone()

class Stop:
    "Asks once, on one process only"
    def __init__(self, rank, hook, when): setattr(self, hook, self.ask); self.rank, self.when = rank, when
    def ask(self, run, *_):
        if run.accelerator.process_index == self.rank and run.step == self.when: run.stop('as asked')

def train(folder, accumulate=1, observers=(), norm=lambda: nn.GroupNorm(2, 8), seed=0, data=None, task=Squares, **settings):
    torch.manual_seed(seed); model = Net(norm)
    cfg = LoopConfig(**dict(device='cpu', epochs=4, accumulate=accumulate, batch_size=B, freeze_backbone_epochs=0, val_frequency=1, ema=dict(decay=.9),
                            lr=dict(base_lr=.01, backbone_lr_multiplier=.5, warmup_epochs=1, frozen_lr=.02)) | settings)
    return fit(cfg, task(seed), model, data or DataLoader(images(), batch_size=B, shuffle=False), DataLoader(images(12, seed=1), batch_size=B), folder, observers)

def result(run):
    drop = lambda row: {k: v for k, v in row.items() if k not in TrainingState.MEASURED}
    return dict(seen=run.__dict__.get('seen'), best_file=load_state(run.folder/'checkpoints'/'best.ckpt'), model=run.model.state_dict(),
                judged=run.judged.state_dict(), helper=run.task.helper.state_dict(), history=[drop(r) for r in run.history],
                best=run.best, step=run.step, skipped=run.skipped, reason=run.reason, epoch=run.epoch, finished=run.finished)

# A scenario gets a folder, and the number of processes that share it; accumulation makes the global batch the same
def plain(d, world): return result(train(d, accumulate=2 // world))
def accumulated(d, world): return result(train(d, accumulate=4 // world))
def frozen(d, world): return result(train(d, accumulate=2 // world, freeze_backbone_epochs=2, observers=[Watch()]))
def only_helper(d, world):
    stages = [dict(first=1, last=1, frozen=['encoder', 'decoder'], rates=dict(modules=.01)),
              dict(first=2, last=2, rates=dict(encoder=.01, decoder=.01, modules=.01))]
    return result(train(d, accumulate=2 // world, epochs=2, stages=stages))
def early(d, world): return result(train(d, accumulate=2 // world, epochs=30, early_stopping=dict(patience=2, window=1, min_delta=.5, start_epoch=3)))
def own_start(d, world): return result(train(d, accumulate=2 // world, seed=int(os.environ.get('RANK', 0))))     # the first process decides
def batch_norm(d, world): return result(train(d, norm=lambda: nn.BatchNorm2d(8)))
def stopped(d, world, hook='on_step', when=8, **kw):
    half = result(train(d, accumulate=2 // world, observers=[Stop(world - 1, hook, when)], **kw))
    return dict(half=half, rest=result(train(d, accumulate=2 // world, seed=7, **kw)))
def hard(d, world, observers=(), **kw):
    sampler = Batches(np.arange(48) % 4 == 0, Sampler(hard_negatives=.9, curriculum=[CurriculumRow(first=1, last=1, ratio=2)]), B, seed=3)
    run = train(d, accumulate=2 // world, task=Weighed, data=DataLoader(data := Keyed(), batch_sampler=sampler), observers=observers, **kw)
    told = run.sampler.state(); sampler.set_epoch(run.epoch + 1)
    return dict(result(run), told=told, read=data.read, next=list(sampler))
def stopped_hard(d, world): return dict(half=hard(d, world, [Stop(world - 1, 'on_step', 8)]), rest=hard(d, world, seed=7))
def stopped_at_epoch_end(d, world): return stopped(d, world, when=12)
def stopped_in_validation(d, world): return stopped(d, world, 'on_validation', 12)
def stopped_batch_norm(d, world): return stopped(d, world, norm=lambda: nn.BatchNorm2d(8))

EQUAL = [plain, accumulated, frozen, only_helper, early]
STOPPED = [stopped, stopped_at_epoch_end, stopped_in_validation]
SCENARIOS = [*EQUAL, own_start, batch_norm, *STOPPED, stopped_batch_norm, hard, stopped_hard]

if __name__ == '__main__':
    torch.set_num_threads(1)
    here, rank, written, write = Path(sys.argv[1]), int(os.environ['RANK']), [], rtsseg.loop.write_atomic
    rtsseg.loop.write_atomic = lambda path, content: (written.append(Path(path).name), write(path, content))[1]
    for scenario in SCENARIOS:
        print(f'process {rank}: {scenario.__name__}', flush=True); written.clear()
        torch.save(dict(scenario(here/scenario.__name__, 2), written=list(written)), here/f'{scenario.__name__}-{rank}.pt')
    sys.exit()

# ---------------------------------------------------------------- what is asked of them
@pytest.fixture(scope='module')
def two():
    "The results of both processes: two(scenario) → [of the first, of the second]"
    with TemporaryDirectory() as d, socket.socket() as s:
        s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]; s.close()
        env = os.environ | dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), OMP_NUM_THREADS='1')
        with open(f'{d}/log', 'w') as log:
            both = [subprocess.Popen([sys.executable, __file__, d], env=env | dict(RANK=str(r), LOCAL_RANK=str(r)), stdout=log, stderr=log) for r in (0, 1)]
            end = time.monotonic() + LIMIT
            while time.monotonic() < end and any(p.poll() is None for p in both) and not any(p.poll() for p in both): time.sleep(.05)
            codes = [p.poll() for p in both]
            for p in both: p.kill(); p.wait()
        why = f'exit codes {codes} (None: still running after {LIMIT} s, a deadlock, or the other failed)\n'
        assert codes == [0, 0], why + Path(f'{d}/log').read_text()[-4000:]
        yield lambda scenario: [torch.load(f'{d}/{scenario.__name__}-{r}.pt') for r in (0, 1)]

def close(a, b, tolerance=2e-6):
    "Nested results agree: numbers and tensors to a tolerance, all else exactly"
    if isinstance(a, torch.Tensor): assert a.shape == b.shape and (not a.is_floating_point() or (a - b).abs().max() <= tolerance), (a - b).abs().max()
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a: close(a[k], b[k], tolerance)
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b): close(x, y, tolerance)
    elif isinstance(a, float): assert a == pytest.approx(b, abs=tolerance)
    else: assert a == b

def without(result, *names): return {k: v for k, v in result.items() if k not in ('written', *names)}

@pytest.mark.parametrize('scenario', EQUAL, ids=lambda f: f.__name__)
def test_equals_one_process(two, scenario, tmp_path):
    "Weights, averages, helpers, learning rates, training loss, every validation, the best epoch and the skipped steps"
    one, (first, second) = scenario(tmp_path, 1), two(scenario)
    close(without(first), without(second), 0.)
    close(without(first), one)
    assert one['skipped'] and one['step'] > 4

def test_facts(two):
    "What the comparison above would not notice, were it wrong in both"
    for r in two(frozen):
        assert torch.equal(r['seen'][1], r['seen'][2]) and not torch.equal(r['seen'][2], r['seen'][3])
    first, second = two(early)
    assert first['finished'] and 'early stopping' in first['reason'] and first['epoch'] == 6
    first, _ = two(plain)
    torch.manual_seed(0); start = Net(), Squares(0).helper
    for k, v in [*start[0].state_dict().items()]: assert not torch.equal(v, first['model'][k])
    assert not torch.equal(start[1].weight, first['helper']['weight'])

def test_tallies_are_those_of_one_process(two, tmp_path):
    "The epoch's counts are whole numbers, the same on either side; `test_equals_one_process` compares the rest of the row"
    one, (first, second) = plain(tmp_path, 1), two(plain)
    count = lambda r: [(row['train/right'], row['train/n']) for row in r['history']]
    assert count(one) == count(first) == count(second) and all(n > 0 and n == int(n) for row in count(one) for n in row)

def test_hard_negatives_are_learnt_by_all(two, tmp_path):
    "Each process knows the losses that all saw, so each draws the stream of one process with the same global batch; together they read it"
    one, (first, second) = hard(tmp_path, 1), two(hard)
    names = 'read', 'next'
    close(without(first, 'read'), without(second, 'read'), 0.); close(without(first, *names), without(one, *names), 1e-5)
    assert first['next'] == one['next'] and one['told']['losses'] and one['told']['learnt']
    turns = lambda keys: [keys[i:i + B] for i in range(0, len(keys), B)]
    assert [b for pair in zip(turns(first['read']), turns(second['read']), strict=True) for b in pair] == turns(one['read'])
    assert first['written'] and second['written'] == []

def test_hard_negatives_over_a_stop(two):
    "What the main process saved is what both knew"
    for r, whole in zip(two(stopped_hard), two(hard)):
        assert r['half']['step'] == 8 and r['half']['told']['learnt']
        close(without(r['rest'], 'read'), without(whole, 'read'), 0.); assert r['half']['read'] + r['rest']['read'] == whole['read']

def test_first_process_decides_the_start(two):
    "Processes that begin with weights of their own, in model and helper, train the first one's"
    first, second = two(own_start)
    close(without(first), without(two(plain)[0]), 0.); close(without(first), without(second), 0.)

@pytest.mark.parametrize('scenario', [*EQUAL, own_start, batch_norm], ids=lambda f: f.__name__)
def test_only_the_main_process_writes(two, scenario):
    first, second = two(scenario)
    assert 'best.ckpt' in first['written'] and 'resume.ckpt' in first['written'] and second['written'] == []

@pytest.mark.parametrize('scenario', STOPPED, ids=lambda f: f.__name__)
def test_one_asks_both_stop_and_go_on(two, scenario):
    "The second process alone asks: both stop after the same step, and the resumed run equals the undisturbed one to the bit"
    for r, whole in zip(two(scenario), two(plain)):
        half = r['half']
        assert (half['reason'], half['finished'], half['step']) == ('as asked', False, 8 if scenario is stopped else 12)
        close(without(r['rest']), without(whole), 0.)

def test_batch_statistics(two, tmp_path):
    "With batch statistics the first process's are judged and saved: best.ckpt, evaluated alone, gives the best validation again"
    first, second = two(batch_norm)
    close(without(first, 'model'), without(second, 'model'), 0.)
    assert not torch.equal(first['model']['encoder.1.running_mean'], second['model']['encoder.1.running_mean'])
    net = Net(lambda: nn.BatchNorm2d(8)); net.load_state_dict(first['best_file']['model'])
    metrics, _ = validate(Squares(), net, DataLoader(images(12, seed=1), batch_size=B))
    plain = lambda m: {k: v for k, v in m.items() if k in ('accuracy', 'loss/bce0', 'loss/bce1')}      # the others need the helper
    close(plain(metrics), plain(first['best']['metrics']))
    for r, whole in zip(two(stopped_batch_norm), two(batch_norm)): close(without(r['rest'], 'model'), without(whole, 'model'), 0.)
