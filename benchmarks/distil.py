"A step of SegFormer-B2 with a frozen teacher: an epoch of `fit` and an epoch of a bare PyTorch loop take turns"
import copy
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, kl_div, mse_loss
from torch.utils.data import DataLoader

from common import emit
from rtsseg.loop import fit
from rtsseg.models import build
from rtsseg.systems.landcover import Landcover, LandcoverConfig, LandcoverTask
from rtsseg.weights import place_model
from step import float_tensors

CLASSES, TEMPERATURE = 7, 3.
STATISTICS = [.485, .456, .406], [.229, .224, .225]
COMPARES = ['features', 'logits']
WEIGHTS = dict(cross_entropy=.7, dice=.3, teacher_features=.5, teacher_logits=.5)

def config(encoder, **more):
    "A run of SegFormer from random weights"
    model = dict(architecture='segformer', encoder=encoder, weights=None, normalisation='dataset')
    return LandcoverConfig(model=model, device='cpu', deterministic=False, **more)

class Bare:
    "The loop that one would write by hand, with the same losses, EMA, clipping and loss read-out"
    def __init__(self, loader, model, teacher):
        self.loader, self.model, self.teacher = loader, place_model(model, 'cpu'), place_model(teacher, 'cpu').eval()
        self.project = nn.Conv2d(512, 256, 1)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.trained = [*self.model.parameters(), *self.project.parameters()]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=1e-2, fused=True)
        self.averaged, self.live = float_tensors(self.average), float_tensors(self.model)
        self.dice = smp.losses.DiceLoss('multiclass', ignore_index=255)

    def loss(self, image, target):
        features = self.model.encoder(image)
        logits = self.model.segmentation_head(self.model.decoder(features))
        with torch.no_grad():
            taught = self.teacher.encoder(image)
            wanted = self.teacher.segmentation_head(self.teacher.decoder(taught))
        soft, softer = (logits / TEMPERATURE).log_softmax(1), (wanted / TEMPERATURE).log_softmax(1)
        kl = TEMPERATURE**2 * kl_div(soft, softer, reduction='none', log_target=True).sum(1).mean()
        distance = mse_loss(self.project(features[-1]), adaptive_avg_pool2d(taught[-1], features[-1].shape[2:]))
        labels = .7 * cross_entropy(logits, target, ignore_index=255) + .3 * self.dice(logits, target)
        return labels + .5 * distance + .5 * kl

    def epoch(self):
        self.model.train()
        total = 0.
        for batch in self.loader:
            loss = self.loss(batch['image'], batch['target'].long())
            loss.backward()
            nn.utils.clip_grad_norm_(self.trained, 1.)
            self.optimizer.step()
            self.optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(self.averaged, self.live, 1e-3)
            total += loss.item()
        return total / len(self.loader)

class Turns:
    "After each epoch of ours, one of the bare loop; CPU seconds per step of both"
    def __init__(self, bare):
        self.bare, self.ours, self.theirs = bare, [], []
        self.began = time.process_time()

    def on_epoch(self, run):
        steps = run.history[-1]['batches']
        self.ours.append((time.process_time() - self.began) / steps)
        start = time.process_time()
        self.bare.epoch()
        self.theirs.append((time.process_time() - start) / steps)
        self.began = time.process_time()

def main(epochs=8, steps=4, side=64, warm=2):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = []
    for _ in range(2 * steps):
        target = torch.randint(0, CLASSES, (side // 8, side // 8)).repeat_interleave(8, 0).repeat_interleave(8, 1)
        data.append(dict(image=torch.randn(3, side, side), target=target.float(), sample='a', group='a'))
    loader = DataLoader(data, 2)
    with TemporaryDirectory() as folder:
        home, feed = Path(folder), SimpleNamespace(statistics=STATISTICS)
        small, teacher_dir = config('mit_b0'), home/'teacher'
        teacher_dir.mkdir()
        teacher = build(small.model, CLASSES)
        best = dict(epoch=1, step=1, value=0., metrics={})
        Landcover().package(teacher_dir, teacher, small, feed, best, {})
        cfg = config('mit_b2', epochs=epochs, val_frequency=epochs, checkpoint={'every': 10 * epochs}, batch_size=2,
                     loss_weights=WEIGHTS, distil=dict(teacher=str(teacher_dir), compares=COMPARES),
                     data=dict(sides=[side]), windows=dict(side=64, stride=64))
        model = build(cfg.model, CLASSES)
        turns = Turns(Bare(loader, copy.deepcopy(model), teacher))
        fit(cfg, LandcoverTask(cfg, feed), model, loader, DataLoader(data[:1], 1), home/'run', [turns])
    # the last epoch holds a validation
    ours, theirs = turns.ours[warm:-1], turns.theirs[warm:-1]
    emit('a step of SegFormer-B2 with a teacher: fit / bare loop', ours, theirs, goal=1.05, side=side, batch=2,
         threads=1, note='CPU time')

if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
