"A training step of a tiny model: `fit` against a bare PyTorch loop with the same EMA, clipping and loss read-out. An epoch of each in turn"
import copy, sys, time
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.utils.data import DataLoader

from common import emit
from rtsseg.config import LoopConfig
from rtsseg.loop import Task, fit

F = nn.functional

class Tiny(Task):
    def forward(self, model, batch): return model(batch['image'])
    def count(self, batch): return dict(bce=batch['target'].numel())
    def loss(self, out, batch): return dict(bce=F.binary_cross_entropy_with_logits(out, batch['target']))
    def meter(self): return Nothing()

class Nothing:
    def update(self, out, batch): pass
    def compute(self): return {}

def net():
    torch.manual_seed(0); block = lambda i: [nn.Conv2d(i, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*block(3), *block(8), nn.Conv2d(8, 1, 1))

class Bare:
    "What one would write by hand"
    def __init__(self, loader):
        self.loader, self.model = loader, net(); self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=1e-2, fused=True)
        self.to, self.of = ([*m.parameters(), *(b for b in m.buffers() if b.is_floating_point())] for m in (self.average, self.model))
    def epoch(self):
        self.model.train(); total = 0.
        for batch in self.loader:
            loss = F.binary_cross_entropy_with_logits(self.model(batch['image']), batch['target']); loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.); self.optimizer.step(); self.optimizer.zero_grad()
            with torch.no_grad(): torch._foreach_lerp_(self.to, self.of, 1e-3)
            total += loss.item()
        return total / len(self.loader)

class Turns:
    "After each epoch of ours, one of the bare loop"
    def __init__(self, bare): self.bare, self.ours, self.theirs = bare, [], []
    def on_epoch(self, run):
        row, t = run.history[-1], time.perf_counter()
        self.bare.epoch(); self.theirs.append((time.perf_counter() - t) / row['batches']); self.ours.append(row['seconds'] / row['batches'])

def main(epochs=150, steps=16, warm=10):
    torch.set_num_threads(1)
    data = [dict(image=torch.randn(3, 32, 32), target=(torch.rand(1, 32, 32) > .5).float()) for _ in range(8 * steps)]
    loader = DataLoader(data, 8); turns = Turns(Bare(loader))
    cfg = LoopConfig(device='cpu', epochs=epochs, val_frequency=epochs, freeze_backbone_epochs=0, deterministic=False, checkpoint=dict(every=10 * epochs))
    with TemporaryDirectory() as d: fit(cfg, Tiny(), net(), loader, DataLoader(data[:8], 8), d, [turns])
    emit('training step, tiny model: fit / bare loop', turns.ours[warm:], turns.theirs[warm:], goal=1.25, threads=1)

if __name__ == '__main__': main(*map(int, sys.argv[1:]))
