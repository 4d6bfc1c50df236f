"""What only a GPU shows: the baseline model at its real size, through `fit` and through a bare loop, and real tiles

    python benchmarks/gpu.py [--encoder efficientnet-b5] [--size 512] [--batch 32] [--steps 40] [--epochs 4]

UNet++ in fp16 with a gradient scaler, channels-last, focal loss, AdamW, clipping and EMA on both sides. Batches lie in
memory, and both sides take turns, an epoch each. Then: deterministic mode beside the default, the compiled model beside
the plain one, and an epoch of real tiles through the loader with augmentation, while nvidia-smi tells how busy the GPU
is. On a CPU, small sizes show that the script runs: --encoder resnet18 --size 64 --batch 2 --steps 2
"""
import argparse
import copy
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.utils.data import DataLoader

from common import emit, emit_value
from rtsseg.config import RtsConfig, ToySource
from rtsseg.loop import fit
from rtsseg.losses import focal
from rtsseg.models import build
from rtsseg.prepare import prepare
from rtsseg.segment import SegmentTask
from rtsseg.tiles import loaders
from rtsseg.toy import make_toy

CUDA = torch.cuda.is_available()

def synchronise():
    if CUDA:
        torch.cuda.synchronize()

def peak_memory():
    "GiB, or None without a GPU"
    if not CUDA:
        return None
    return round(torch.cuda.max_memory_allocated()/2**30, 2)

class NoMeter:
    def update(self, out, batch): pass
    def compute(self): return {}

class WithoutValidation(SegmentTask):
    "The task as it is, with its training IoU, but without metrics of a validation"
    def __init__(self, cfg):
        super().__init__(cfg, None)
        self.monitor, self.mode = 'loss', 'min'

    def meter(self): return NoMeter()

def float_tensors(model):
    "Parameters and buffers that are averaged"
    return [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]

class Bare:
    "The loop that one would write by hand"
    def __init__(self, loader, model):
        self.loader = loader
        self.device = torch.device('cuda' if CUDA else 'cpu')
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=1e-2, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=CUDA)
        self.averaged, self.live = float_tensors(self.average), float_tensors(self.model)

    def step(self, batch):
        image = batch['image'].to(self.device, non_blocking=True)
        target = batch['target'].to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.float16, enabled=CUDA):
            out = self.model(image)[:, 0]
        loss = focal(out, target)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.averaged, self.live, 1e-3)
        return loss.detach()

    def epoch(self):
        self.model.train()
        return float(sum(self.step(batch) for batch in self.loader))

class Turns:
    "Seconds of our epochs, after each of which the bare loop may do one"
    def __init__(self, bare=None):
        self.bare = bare
        self.ours, self.theirs = [], []

    def on_epoch(self, run):
        synchronise()
        self.ours.append(run.history[-1]['seconds'])
        if self.bare:
            start = time.perf_counter()
            self.bare.epoch()
            synchronise()
            self.theirs.append(time.perf_counter() - start)

class Busy:
    "How busy nvidia-smi says that the GPU is, in percent, asked twice a second"
    QUERY = ['nvidia-smi', '--query-gpu=utilization.gpu', '--format=csv,noheader,nounits']

    def __enter__(self):
        self.seen, self.running = [], CUDA
        self.thread = threading.Thread(target=self.ask, daemon=True)
        self.thread.start()
        return self

    def ask(self):
        while self.running:
            answer = subprocess.run(self.QUERY, capture_output=True, text=True)
            self.seen.append(float(answer.stdout.split()[0]))
            time.sleep(.5)

    def __exit__(self, *error):
        self.running = False
        self.thread.join()

    def median(self):
        return statistics.median(self.seen) if self.seen else None

class Benchmark:
    "Everything at one size of model, tile and batch"
    def __init__(self, options):
        self.options = options
        self.note = {'encoder': options.encoder, 'size': options.size, 'batch': options.batch}
        size = options.size
        self.tile = {'image': torch.randn(3, size, size), 'target': (torch.rand(size, size) > .999).float()}
        self.batch = {name: torch.stack([tensor]*options.batch) for name, tensor in self.tile.items()}
        if CUDA:
            self.batch = {name: tensor.pin_memory() for name, tensor in self.batch.items()}

    def loader(self):
        "The same batch again and again: what the loop costs shows"
        items = [0]*(self.options.batch*self.options.steps)
        return DataLoader(items, self.options.batch, collate_fn=lambda _: self.batch)

    def config(self, **settings):
        epochs = self.options.epochs + 1
        return RtsConfig(precision='fp16', epochs=epochs, batch_size=self.options.batch, val_frequency=epochs,
                         freeze_backbone_epochs=0, checkpoint={'every': 10**6, 'resume_minutes': 1e6},
                         model={'encoder': self.options.encoder, 'weights': None},
                         data={'tile_size': self.options.size}, tracker={'kind': 'none'}, **settings)

    def epochs(self, bare=None, compiled=False, **settings):
        "Turns of a training run; the first epoch of each side warms up and is left out"
        torch.manual_seed(0)
        cfg = self.config(**settings)
        model = build(cfg.model)
        if compiled:
            model.compile()
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        turns = Turns(bare)
        with TemporaryDirectory() as folder:
            fit(cfg, WithoutValidation(cfg), model, self.loader(), DataLoader([self.tile], 1), folder, [turns])
        turns.ours, turns.theirs = turns.ours[1:], turns.theirs[1:]
        return turns

    def speed(self, seconds):
        "Images a second"
        return round(self.options.batch*self.options.steps/statistics.median(seconds), 1)

    def beside_bare_loop(self):
        torch.manual_seed(0)
        bare = Bare(self.loader(), build(self.config().model))
        turns = self.epochs(bare, deterministic=False)
        emit('an epoch: fit / bare loop', turns.ours, turns.theirs, 1/.98, images_per_second=self.speed(turns.ours),
             peer_images_per_second=self.speed(turns.theirs), **self.note)

    def modes(self):
        plain = self.epochs(deterministic=False)
        memory = peak_memory()
        deterministic = self.epochs(deterministic=True)
        emit('an epoch: deterministic / not', deterministic.ours, plain.ours, peak_gib=memory, **self.note)
        compiled = self.epochs(compiled=True, deterministic=False)
        emit('an epoch: compiled / not', compiled.ours, plain.ours, peak_gib=peak_memory(), **self.note)

    def real_loader(self):
        "Real tiles with augmentation: how busy the GPU is, and how long it waits for a batch"
        size = self.options.size
        world = ToySource(regions=2, scene_size=8*size, tile_size=size, block_size=6.*size, prevalence=.02)
        with TemporaryDirectory() as folder:
            manifest_path = Path(folder)/'manifest.csv'
            make_toy(world, manifest_path, show=lambda line: None)
            cfg = self.config(deterministic=False, runs=folder,
                              sampler={'curriculum': [{'first': 1, 'last': 1, 'ratio': 1}]})
            cfg = cfg.model_copy(update={'epochs': 3, 'val_frequency': 3}, deep=True)
            cfg.data.manifest, cfg.data.split_check = manifest_path, 'warn'
            cfg.loader.num_workers = min(cfg.loader.num_workers, os.cpu_count())
            manifest = prepare(cfg)
            feed = loaders(cfg, manifest)
            feed.train.batch_sampler.cfg.curriculum[0].ratio = 3
            rows = LastRow()
            torch.manual_seed(0)
            task = SegmentTask(cfg, manifest.of('val').table)
            with Busy() as busy:
                fit(cfg, task, build(cfg.model), feed.train, feed.val, Path(folder)/'run', [rows])
        emit_value('real tiles with augmentation', round(rows.last['images_per_second'], 1), unit='images a second',
                   goal='GPU busy > 90%', gpu_busy_percent=busy.median(), wait=round(rows.last['wait'], 3),
                   workers=cfg.loader.num_workers, **self.note)

class LastRow:
    def on_epoch(self, run):
        self.last = run.history[-1]

def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--encoder', default='efficientnet-b5')
    parser.add_argument('--size', type=int, default=512, help='side of a tile, pixels')
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--steps', type=int, default=40, help='of an epoch')
    parser.add_argument('--epochs', type=int, default=4)
    return parser.parse_args()

def main():
    options = arguments()
    if not CUDA and options.size > 128:
        sys.exit('skipped: no GPU')
    benchmark = Benchmark(options)
    benchmark.beside_bare_loop()
    benchmark.modes()
    benchmark.real_loader()

if __name__ == '__main__':
    main()
