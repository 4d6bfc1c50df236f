"""What only a GPU shows: the baseline model at its real size, through `fit` and through a bare loop, and fed by the real loader.

    python benchmarks/gpu.py [--encoder efficientnet-b5] [--size 512] [--batch 32] [--steps 40] [--epochs 4]

UNet++ in fp16 with a gradient scaler, channels-last, focal loss, AdamW, clipping and EMA on both sides; batches lie in memory, and both sides
take turns, an epoch each. Then deterministic mode against the other, the compiled model against the plain one, and an epoch of real tiles through the
loader with augmentation, while nvidia-smi is asked how busy the GPU is. On a CPU (--encoder resnet18 --size 64 --batch 2 --steps 2) it only shows that it runs."""
import argparse, copy, json, os, statistics, subprocess, threading, time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.utils.data import DataLoader

from common import emit
from rtsseg.config import RtsConfig, ToySource
from rtsseg.loop import fit
from rtsseg.losses import focal
from rtsseg.models import build
from rtsseg.prepare import prepare
from rtsseg.tiles import loaders
from rtsseg.segment import SegmentTask
from rtsseg.toy import make_toy

CUDA = torch.cuda.is_available()

def sync():
    if CUDA: torch.cuda.synchronize()

class Plain(SegmentTask):
    "The task as it is, training IoU and all, but without a judge"
    def __init__(self, cfg): super().__init__(cfg, None); self.monitor, self.mode = 'loss', 'min'
    def meter(self): return Nothing()

class Nothing:
    def update(self, out, batch): pass
    def compute(self): return {}

class Bare:
    "What one would write by hand"
    def __init__(self, loader, model):
        self.loader, self.device = loader, torch.device('cuda' if CUDA else 'cpu')
        self.model = model.to(self.device, memory_format=torch.channels_last); self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer, self.scaler = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=1e-2, fused=True), torch.amp.GradScaler(self.device.type, enabled=CUDA)
        self.to, self.of = ([*m.parameters(), *(b for b in m.buffers() if b.is_floating_point())] for m in (self.average, self.model))
    def epoch(self):
        self.model.train(); total = 0.
        for batch in self.loader:
            image, target = (batch[k].to(self.device, non_blocking=True) for k in ('image', 'target'))
            with torch.autocast(self.device.type, torch.float16, enabled=CUDA): out = self.model(image)[:, 0]
            loss = focal(out, target); self.scaler.scale(loss).backward(); self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.); self.scaler.step(self.optimizer); self.scaler.update(); self.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad(): torch._foreach_lerp_(self.to, self.of, 1e-3)
            total += loss.detach()
        return float(total)

class Turns:
    "After each epoch of ours, one of the bare loop; the first of each warms up"
    def __init__(self, bare=None): self.bare, self.ours, self.theirs = bare, [], []
    def on_epoch(self, run):
        sync(); self.ours.append(run.history[-1]['seconds'])
        if self.bare: t = time.perf_counter(); self.bare.epoch(); sync(); self.theirs.append(time.perf_counter() - t)

def peak(): return round(torch.cuda.max_memory_allocated() / 2**30, 2) if CUDA else None

class Busy:
    "How busy nvidia-smi says that the GPU is, asked twice a second"
    def __enter__(self): self.seen, self.on = [], CUDA; self.thread = threading.Thread(target=self.ask, daemon=True); self.thread.start(); return self
    def ask(self):
        while self.on:
            self.seen.append(float(subprocess.run(['nvidia-smi', '--query-gpu=utilization.gpu', '--format=csv,noheader,nounits'], capture_output=True, text=True).stdout.split()[0])); time.sleep(.5)
    def __exit__(self, *_): self.on = False; self.thread.join()
    @property
    def median(self): return statistics.median(self.seen) if self.seen else None

def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(encoder='efficientnet-b5', size=512, batch=32, steps=40, epochs=4).items(): a.add_argument(f'--{name}', type=type(default), default=default)
    a = a.parse_args(); name = torch.cuda.get_device_name() if CUDA else f'{os.cpu_count()} CPU cores'
    one = dict(image=torch.randn(3, a.size, a.size), target=(torch.rand(a.size, a.size) > .999).float())
    batch = {k: torch.stack([v] * a.batch) for k, v in one.items()}; batch = {k: v.pin_memory() for k, v in batch.items()} if CUDA else batch
    loader = lambda: DataLoader([0] * (a.batch * a.steps), a.batch, collate_fn=lambda _: batch)      # made once: nothing hides what the loop costs
    def config(**kw):
        return RtsConfig(precision='fp16', epochs=a.epochs + 1, batch_size=a.batch, val_frequency=a.epochs + 1, freeze_backbone_epochs=0, checkpoint=dict(every=10**6, resume_minutes=1e6),
                      model=dict(encoder=a.encoder, weights=None), data=dict(tile_size=a.size), tracker=dict(kind='none'), **kw)
    def ours(bare=None, compiled=False, **kw):
        torch.manual_seed(0); cfg = config(**kw); model = build(cfg.model); turns = Turns(bare)
        if compiled: model.compile()
        if CUDA: torch.cuda.reset_peak_memory_stats()
        with TemporaryDirectory() as d: fit(cfg, Plain(cfg), model, loader(), DataLoader([one], 1), d, [turns])
        return turns
    speed = lambda seconds: round(a.batch * a.steps / statistics.median(seconds), 1)
    note = dict(device=name, encoder=a.encoder, size=a.size, batch=a.batch)

    torch.manual_seed(0); bare = Bare(loader(), build(config().model)); turns = ours(bare, deterministic=False)
    emit('an epoch: fit / bare loop', turns.ours[1:], turns.theirs[1:], 1 / .98, ours_images_per_second=speed(turns.ours[1:]), bare_images_per_second=speed(turns.theirs[1:]), **note); del bare
    plain = ours(deterministic=False); memory = peak()
    emit('an epoch: deterministic / not', ours(deterministic=True).ours[1:], plain.ours[1:], peak_gib=memory, **note)
    emit('an epoch: compiled / not', ours(compiled=True, deterministic=False).ours[1:], plain.ours[1:], peak_gib=peak(), **note)

    with TemporaryDirectory() as d:
        make_toy(ToySource(regions=2, scene_size=8 * a.size, tile_size=a.size, block_size=6. * a.size, prevalence=.02), Path(d)/'manifest.csv', show=lambda line: None)
        cfg = config(deterministic=False, runs=d, sampler=dict(curriculum=[dict(first=1, last=1, ratio=1)])).model_copy(update=dict(epochs=3, val_frequency=3), deep=True)
        cfg.data.manifest, cfg.data.split_check, cfg.loader.num_workers = Path(d)/'manifest.csv', 'warn', min(cfg.loader.num_workers, os.cpu_count())
        manifest = prepare(cfg); feed = loaders(cfg, manifest); feed.train.batch_sampler.cfg.curriculum[0].ratio = 3
        class Live:
            def on_epoch(self, run): self.row = run.history[-1]
        live = Live()
        torch.manual_seed(0)
        with Busy() as busy: fit(cfg, SegmentTask(cfg, manifest.of('val').table), build(cfg.model), feed.train, feed.val, Path(d)/'run', [live])
        print(json.dumps(dict(what='real loader, guide 9.2', images_per_second=round(live.row['images_per_second'], 1), wait=round(live.row['wait'], 3), gpu_busy_percent=busy.median, workers=cfg.loader.num_workers, goal='busy > 90', **note)))

if __name__ == '__main__': main()
