"A training run of milliseconds, for tests of the loop: a task, its data, its model, and ways to stop it"
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.utils.data import DataLoader

from rtsseg.config import LoopConfig
from rtsseg.loop import Task, TrainingState, fit

F = nn.functional

class Points(Task):
    "Two parts of a loss, each a mean over samples of its own: y = 255 counts in neither, and only positive x[0] counts in the second"
    monitor, mode = 'loss', 'min'
    def parts(self, model): return dict(encoder=[model[0], model[1]], decoder=[model[2:]])
    def forward(self, model, batch): return model(batch['x'])[:, 0]
    def masks(self, batch): ok = batch['y'] != 255; return dict(bce=ok, square=ok & (batch['x'][:, 0] > 0))
    def count(self, batch): return {p: m.sum() for p, m in self.masks(batch).items()}
    def loss(self, out, batch):
        each = dict(bce=F.binary_cross_entropy_with_logits(out, batch['y'].clamp(max=1), reduction='none'), square=(out - batch['x'][:, 1])**2)
        return {p: (each[p] * m).sum() / m.sum().clamp(min=1) for p, m in self.masks(batch).items()}
    def tally(self, out, batch): ok = batch['y'] != 255; return dict(right=((out > 0) == (batch['y'] > 0))[ok].sum(), n=ok.sum())
    def summary(self, sums): return dict(right=sums['right'] / sums['n'])
    def meter(self): return Nothing()

class Nothing:
    def update(self, out, batch): pass
    def state(self): return None
    def merge(self, states): pass
    def compute(self): return {}

class Scripted(Points):
    "Validations give the values that are written here"
    def __init__(self, values, mode='max'): self.monitor, self.mode, self.values = 'score', mode, list(values)
    def meter(self):
        meter = Nothing(); meter.compute = lambda: dict(score=self.values.pop(0)); return meter

def points(n=48, ignored=5, seed=0):
    g = torch.Generator().manual_seed(seed); x = torch.randn(n, 2, generator=g)
    return [dict(x=a, y=torch.tensor(255. if i % ignored == 0 else float(a[0] * a[1] > 0))) for i, a in enumerate(x)]

def net(seed=0, norm=False):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.Dropout(.3) if norm else nn.Identity(), nn.Linear(8, 1))

quick = dict(device='cpu', freeze_backbone_epochs=0, val_frequency=1, ema=dict(decay=.9), early_stopping=dict(patience=None),
             lr=dict(base_lr=.05, backbone_lr_multiplier=1., warmup_epochs=0, schedule='constant'))

def run(folder=None, task=None, model=None, data=None, batch=8, observers=(), loader={}, **cfg):
    "Fit the small world; without a folder it leaves nothing behind"
    if folder is None:
        with TemporaryDirectory() as d: return run(d, task, model, data, batch, observers, loader, **cfg)
    loader = DataLoader(points() if data is None else data, batch, **dict(shuffle=False) | loader)
    return fit(LoopConfig(**quick | dict(epochs=2) | cfg), task or Points(), model or net(), loader, DataLoader(points(20, seed=1), 7), folder, observers)

def gradient(r): return torch.cat([r.optimizer.state[p]['exp_avg'].flatten() / .1 for p in r.model.parameters()])    # Adam's first moment after one step
def weights(module): return torch.cat([t.double().flatten() for t in module.state_dict().values()])
def equal(a, b):
    "Two runs ended in the same state, to the bit"
    clean = lambda h: [{k: v for k, v in r.items() if k not in TrainingState.MEASURED} for r in h]
    assert torch.equal(weights(a.model), weights(b.model)) and torch.equal(weights(a.judged), weights(b.judged))
    for p, q in zip(a.optimizer.state.values(), b.optimizer.state.values(), strict=True): assert all(torch.equal(p[k], q[k]) for k in p)
    assert clean(a.history) == clean(b.history) and a.best == b.best and a.step == b.step and a.skipped == b.skipped

class At:
    "Does something at an optimizer step"
    def __init__(self, step, what): self.step, self.what = step, what
    def on_step(self, run):
        if run.step == self.step: self.what(run)
def stop(run): run.stop('as asked')
class Crash(Exception): pass
def crash(run): raise Crash
