"A training run of milliseconds, for tests of the loop: a task, its data, its model, and ways to stop it"
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.utils.data import DataLoader

from rtsseg.config import LoopConfig
from rtsseg.loop import Task, TrainingState, fit

F = nn.functional

class Points(Task):
    "Two parts of a loss, each a mean over samples of its own: y = 255 counts in neither, x[0] <= 0 not in the second"
    monitor, mode = 'loss', 'min'

    def parts(self, model):
        return dict(encoder=[model[0], model[1]], decoder=[model[2:]])

    def forward(self, model, batch):
        return model(batch['x'])[:, 0]

    def masks(self, batch):
        valid = batch['y'] != 255
        return dict(bce=valid, square=valid & (batch['x'][:, 0] > 0))

    def count(self, batch):
        return {part: mask.sum() for part, mask in self.masks(batch).items()}

    def loss(self, out, batch):
        target = batch['y'].clamp(max=1)
        each = dict(bce=F.binary_cross_entropy_with_logits(out, target, reduction='none'),
                    square=(out - batch['x'][:, 1])**2)
        return {part: (each[part] * mask).sum() / mask.sum().clamp(min=1) for part, mask in self.masks(batch).items()}

    def tally(self, out, batch):
        valid = batch['y'] != 255
        return dict(right=((out > 0) == (batch['y'] > 0))[valid].sum(), n=valid.sum())

    def summary(self, sums):
        return dict(right=sums['right'] / sums['n'])

    def meter(self):
        return Nothing()

class Nothing:
    "A meter that computes nothing"
    def update(self, out, batch):
        pass

    def state(self):
        return None

    def merge(self, states):
        pass

    def compute(self):
        return {}

class Scripted(Points):
    "Validations give the values that are written here"
    def __init__(self, values, mode='max'):
        self.monitor, self.mode, self.values = 'score', mode, list(values)

    def meter(self):
        meter = Nothing()
        meter.compute = lambda: dict(score=self.values.pop(0))
        return meter

def points(n=48, ignored=5, seed=0):
    "Points of two classes; one in `ignored` has no label"
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator)
    labels = [255. if i % ignored == 0 else float(a[0] * a[1] > 0) for i, a in enumerate(x)]
    return [dict(x=a, y=torch.tensor(label)) for a, label in zip(x, labels)]

def net(seed=0, norm=False):
    "A small model; with `norm` it has batch statistics and dropout"
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(8), nn.Dropout(.3)] if norm else [nn.Tanh(), nn.Identity()]
    return nn.Sequential(nn.Linear(2, 8), *middle, nn.Linear(8, 1))

quick = dict(device='cpu', freeze_backbone_epochs=0, val_frequency=1, ema=dict(decay=.9),
             early_stopping=dict(patience=None),
             lr=dict(base_lr=.05, backbone_lr_multiplier=1., warmup_epochs=0, schedule='constant'))

def run(folder=None, task=None, model=None, data=None, batch=8, observers=(), loader=None, **cfg):
    "Fit the small world; without a folder it leaves nothing behind"
    if folder is None:
        with TemporaryDirectory() as d:
            return run(d, task, model, data, batch, observers, loader, **cfg)
    options = dict(shuffle=False) | (loader or {})
    train = DataLoader(points() if data is None else data, batch, **options)
    val = DataLoader(points(20, seed=1), 7)
    cfg = LoopConfig(**quick | dict(epochs=2) | cfg)
    return fit(cfg, task or Points(), model or net(), train, val, folder, observers)

def all_weights(r):
    "The trained weights of a run, in one vector"
    return torch.cat([p.detach().flatten() for p in r.model.parameters()])

def gradient(r):
    "The gradient of a run's only step: Adam's first moment is a tenth of it"
    return torch.cat([r.optimizer.state[p]['exp_avg'].flatten() / .1 for p in r.model.parameters()])

def flat(state):
    "All tensors of a state dict, one after the other"
    return torch.cat([t.double().flatten() for t in state.values()])

def weights(module):
    "All weights and buffers of a module"
    return flat(module.state_dict())

def unmeasured(history):
    "The rows of a history without what was measured"
    return [{k: v for k, v in row.items() if k not in TrainingState.MEASURED} for row in history]

def equal(a, b):
    "Assert that two runs ended in the same state, to the bit"
    assert torch.equal(weights(a.model), weights(b.model)) and torch.equal(weights(a.judged), weights(b.judged))
    for p, q in zip(a.optimizer.state.values(), b.optimizer.state.values(), strict=True):
        assert all(torch.equal(p[k], q[k]) for k in p)
    assert unmeasured(a.history) == unmeasured(b.history)
    assert (a.best, a.step, a.skipped) == (b.best, b.step, b.skipped)
    assert (a.stopper, a.plateau) == (b.stopper, b.plateau)

class At:
    "Does something at an optimizer step"
    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_step(self, run):
        if run.step == self.step:
            self.what(run)

def stop(run):
    run.stop('as asked')

class Crash(Exception):
    "A process that ends without last words"

def crash(run):
    raise Crash

class EachStep:
    "Keeps what a function says of the run after each optimizer step"
    def __init__(self, what):
        self.what, self.seen = what, []

    def on_step(self, run):
        self.seen.append(self.what(run))
