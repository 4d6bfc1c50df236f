"Evaluation on a CPU in single precision, beside bare forward passes over the same tiles, which are loaded beforehand"
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from common import emit, per_item, turns
from rtsseg.config import load
from rtsseg.infer import Predictor
from rtsseg.manifest import read_manifest
from rtsseg.models import build
from rtsseg.observe import observe_tiles, why_unresolved
from rtsseg.processes import make_accelerator
from rtsseg.stats import compute_stats
from rtsseg.system import Pass
from rtsseg.tiles import eval_loader
from rtsseg.toy import tiny_toy

NETWORK = dict(architecture='unet', encoder='efficientnet-b0', weights=None)

def settings(folder, side):
    "A toy world of 50 tiles, and a config that reads it"
    manifest = tiny_toy(folder, regions=2, scene_size=5 * side, tile_size=side, block_size=3 * side)
    return load(device='cpu', batch_size=4, loader=dict(num_workers=0), data=dict(manifest=manifest, tile_size=side),
                model=NETWORK)

def main(side=256, rounds=2):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        cfg = settings(folder, side)
        part = read_manifest(cfg.data.manifest, cfg.data.block_size).of('train')
        stats = compute_stats(part)
        model = build(cfg.model).eval().to(memory_format=torch.channels_last)
        # as a trained network: most pixels are background, so that predicted objects are few
        model.segmentation_head[0].bias.data.fill_(-4.)
        loader = eval_loader(part, stats, cfg)
        batches = [batch['image'] for batch in loader]
        ask = Pass('train', 'none', Path(folder), make_accelerator(cfg))
        packed = Predictor(Path(folder), cfg, model, stats, {}, conversion=None)
        reasons = []

        def ours():
            reasons.append(why_unresolved(observe_tiles(packed, loader, part, cfg, ask), cfg.metrics.ratios))

        @torch.inference_mode()
        def peer():
            for images in batches:
                model(images)

        times = per_item(turns(ours, peer, rounds, warm=1, clock=time.process_time), len(part))
    emit('evaluation of a tile in single precision / bare forward pass', *times, goal=1.3, tiles=len(part), side=side,
         network='U-Net, EfficientNet-B0', threads=1, passes=2 if any(reasons) else 1,
         note='CPU time')

if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
