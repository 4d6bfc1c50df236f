"""Two processes equal one with the same global batch. Called as a script, this file is what each of the two processes runs"""
import os, signal, subprocess, sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest, torch
from torch import nn
from torch.utils.data import DataLoader

import rtsseg.loop
from rtsseg.config import LoopConfig
from rtsseg.loop import Task, evaluate, fit, load_state

# ---------------------------------------------------------------- what both sides run
F, B, LIMIT = nn.functional, 4, 120     # LIMIT: seconds after which the two processes count as deadlocked

def images(n=32, seed=0):
    "Small images with a bright square; each micro-batch of 4 has another number of valid pixels, the third none at all, nor the whole of the third group of 8"
    g, out = torch.Generator().manual_seed(seed), []
    for i in range(n):
        y = torch.zeros(8, 8); y[2:2 + i % 5, 1:7] = 1
        x = torch.stack([y + torch.randn(8, 8, generator=g), torch.randn(8, 8, generator=g)])
        y[torch.rand(8, 8, generator=g) < (i // B % 8) / 8] = 255
        if i // B in (2, 4, 5): y[:] = 255
        out.append(dict(x=x, y=y, kind=torch.tensor(i // 16)))
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
    def count(self, batch): return {**{f'bce{k}': float((batch['y'][batch['kind'] == k] != 255).sum()) for k in (0, 1)}, 'light': len(batch['x'])}
    def loss(self, out, batch):
        features, heads = out
        values = dict(light=F.mse_loss(self.helper(features.mean((2, 3)))[:, 0], batch['x'].mean((1, 2, 3))))
        for k in (0, 1):
            if k not in heads: values[f'bce{k}'] = features.sum() * 0; continue
            z, y = heads[k][0], batch['y'][heads[k][1]]; valid = y != 255
            values[f'bce{k}'] = F.binary_cross_entropy_with_logits(z, y * valid, weight=valid.float(), reduction='sum') / valid.sum().clamp(min=1)
        return values
    def meter(self): return Accuracy()

class Accuracy:
    def __init__(self): self.right, self.n = 0, 0
    def update(self, out, batch):
        for z, of in out[1].values():
            ok = batch['y'][of] != 255; self.right += int(((z > 0) == (batch['y'][of] == 1))[ok].sum()); self.n += int(ok.sum())
    def state(self): return self.right, self.n
    def merge(self, states): self.right, self.n = map(sum, zip(*states))
    def compute(self): return dict(accuracy=self.right / max(self.n, 1))

class Stop:
    "Asks once, on one process only"
    def __init__(self, rank, hook, when): setattr(self, hook, self.ask); self.rank, self.when = rank, when
    def ask(self, run, *_):
        if run.accelerator.process_index == self.rank and run.step == self.when: run.stop('as asked')

def train(folder, accumulate=1, observers=(), norm=lambda: nn.GroupNorm(2, 8), seed=0, **settings):
    torch.manual_seed(seed); model = Net(norm)
    cfg = LoopConfig(**dict(device='cpu', epochs=4, accumulate=accumulate, batch_size=B, freeze_backbone_epochs=0, val_frequency=1, ema=dict(decay=.9),
                            lr=dict(base_lr=.01, backbone_lr_multiplier=.5, warmup_epochs=1, frozen_lr=.02)) | settings)
    return fit(cfg, Squares(seed), model, DataLoader(images(), batch_size=B, shuffle=False), DataLoader(images(12, seed=1), batch_size=B), folder, observers)

def result(run):
    drop = lambda row: {k: v for k, v in row.items() if k not in ('seconds', 'batches') and not k.startswith('train/')}
    return dict(model=run.model.state_dict(), judged=run.judged.state_dict(), helper=run.task.helper.state_dict(), history=[drop(r) for r in run.history],
                best=run.best, step=run.step, skipped=run.skipped, reason=run.reason, epoch=run.epoch, finished=run.finished)

# A scenario gets a folder that both processes share and the number of processes; accumulation makes the global batch the same
def plain(d, world): return result(train(d, accumulate=2 // world))
def accumulated(d, world): return result(train(d, accumulate=4 // world))
def frozen(d, world): return result(train(d, accumulate=2 // world, freeze_backbone_epochs=2))
def only_helper(d, world):
    stages = [dict(first=1, last=1, frozen=['encoder', 'decoder'], rates=dict(modules=.01)), dict(first=2, last=2, rates=dict(encoder=.01, decoder=.01, modules=.01))]
    return result(train(d, accumulate=2 // world, epochs=2, stages=stages))
def own_start(d, world): return result(train(d, accumulate=2 // world, seed=int(os.environ.get('RANK', 0))))     # the first process decides
def batch_norm(d, world): return result(train(d, accumulate=2 // world, norm=lambda: nn.BatchNorm2d(8)))
def stopped(d, world, hook='on_step', when=6):
    half = result(train(d, accumulate=2 // world, observers=[Stop(world - 1, hook, when)]))
    return dict(half=half, rest=result(train(d, accumulate=2 // world, seed=7)))
def stopped_at_epoch_end(d, world): return stopped(d, world, when=8)
def stopped_in_validation(d, world): return stopped(d, world, 'on_validation', 8)
def early(d, world): return result(train(d, accumulate=2 // world, epochs=30, early_stopping=dict(patience=2, window=1, min_delta=.5, start_epoch=3)))

SCENARIOS = [plain, accumulated, frozen, only_helper, own_start, batch_norm, early, stopped, stopped_at_epoch_end, stopped_in_validation]

if __name__ == '__main__':
    torch.set_num_threads(1)
    here, rank, written = Path(sys.argv[1]), int(os.environ['RANK']), []
    write = rtsseg.loop.write_atomic
    rtsseg.loop.write_atomic = lambda path, content: (written.append(str(path)), write(path, content))[1]
    for scenario in SCENARIOS:
        print(f'rank {rank}: {scenario.__name__}', flush=True); written.clear()
        torch.save(dict(scenario(here/scenario.__name__, 2), written=list(written)), here/f'{scenario.__name__}-{rank}.pt')
    sys.exit()
