"A training step of a tiny model: an epoch of `fit` and an epoch of a bare PyTorch loop take turns"
import copy
import sys
import time
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader

from common import emit
from rtsseg.config import LoopConfig
from rtsseg.loop import Task, fit

class NoMeter:
    def update(self, out, batch): pass
    def compute(self): return {}

class Tiny(Task):
    def forward(self, model, batch): return model(batch['image'])
    def count(self, batch): return {'bce': batch['target'].numel()}
    def loss(self, out, batch): return {'bce': binary_cross_entropy_with_logits(out, batch['target'])}
    def meter(self): return NoMeter()

def network():
    torch.manual_seed(0)
    layers = []
    for channels in (3, 8):
        layers += [nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(8, 1, 1))

def float_tensors(model):
    "Parameters and buffers that are averaged"
    return [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]

class Bare:
    "The loop that one would write by hand, with the same EMA, clipping and loss read-out"
    def __init__(self, loader):
        self.loader = loader
        self.model = network()
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=1e-2, fused=True)
        self.averaged, self.live = float_tensors(self.average), float_tensors(self.model)

    def epoch(self):
        self.model.train()
        total = 0.
        for batch in self.loader:
            loss = binary_cross_entropy_with_logits(self.model(batch['image']), batch['target'])
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.)
            self.optimizer.step()
            self.optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(self.averaged, self.live, 1e-3)
            total += loss.item()
        return total / len(self.loader)

class Turns:
    "After each epoch of ours, one of the bare loop; seconds per step of both"
    def __init__(self, bare):
        self.bare = bare
        self.ours, self.theirs = [], []

    def on_epoch(self, run):
        row = run.history[-1]
        start = time.perf_counter()
        self.bare.epoch()
        self.theirs.append((time.perf_counter() - start) / row['batches'])
        self.ours.append(row['seconds'] / row['batches'])

def main(epochs=150, steps=16, warm=10):
    torch.set_num_threads(1)
    data = []
    for _ in range(8 * steps):
        data.append({'image': torch.randn(3, 32, 32), 'target': (torch.rand(1, 32, 32) > .5).float()})
    loader = DataLoader(data, 8)
    turns = Turns(Bare(loader))
    cfg = LoopConfig(device='cpu', epochs=epochs, val_frequency=epochs, freeze_backbone_epochs=0,
                     deterministic=False, checkpoint={'every': 10 * epochs})
    with TemporaryDirectory() as folder:
        fit(cfg, Tiny(), network(), loader, DataLoader(data[:8], 8), folder, [turns])
    emit('training step of a tiny model: fit / bare loop', turns.ours[warm:], turns.theirs[warm:], goal=1.25, threads=1)

if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
