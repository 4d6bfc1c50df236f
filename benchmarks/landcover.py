"""Five classes of land cover in real aerial images: this library beside a plain recipe in equal time

    python benchmarks/landcover.py [--seconds 300] [--seeds 42 43 44]

Both see the same training images at half resolution, and are judged by mIoU over whole validation images, through the
same windows. The plain recipe: U-Net with resnet18 from random weights, cross-entropy, AdamW at 1e-3, flips, 128²
crops. Ours: configs/landcover/dubai.yaml with a budget of so many seconds. The plain recipe then gets exactly the
seconds that ours took, validation included. Ours is judged at its last epoch, since the exported one was chosen on
these images. Needs the real data sets beside the project.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import pandas as pd
import segmentation_models_pytorch as smp
import torch
from torch.nn.functional import cross_entropy

from common import emit_value
from rtsseg.class_metrics import count_image, counts_to_row, scores_of_counts, sum_counts
from rtsseg.class_tiles import ClassSamples, read_pair
from rtsseg.config import load
from rtsseg.runs import read_log
from rtsseg.sliding import sliding_logits
from rtsseg.training import train

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT.parent/'shared'/'data'/'dubai_landcover'
CROP, BATCH = 128, 16
IMAGENET_MEAN, IMAGENET_STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

def halved(folder):
    "Images and masks at half resolution, with a table that names them; its path"
    rows = []
    for row in pd.read_csv(SOURCE/'manifest.csv').itertuples():
        image = cv2.imread(str(SOURCE/'images'/f'{row.tile_id}.jpg'))
        mask = cv2.imread(str(SOURCE/'masks'/f'{row.tile_id}.png'), cv2.IMREAD_GRAYSCALE)
        half = (mask.shape[1]//2, mask.shape[0]//2)
        named = dict(image=f'{row.tile_id}_image.png', mask=f'{row.tile_id}_mask.png')
        cv2.imwrite(str(folder/named['image']), cv2.resize(image, half, interpolation=cv2.INTER_AREA))
        cv2.imwrite(str(folder/named['mask']), cv2.resize(mask, half, interpolation=cv2.INTER_NEAREST))
        rows.append(named | dict(split=row.split))
    pd.DataFrame(rows).to_csv(folder/'images.csv', index=False)
    return folder/'images.csv'

def read_split(cfg, split):
    "Images and masks of a split"
    samples = ClassSamples.read(cfg.data.source).of(split)
    return [read_pair(samples, row, cfg.data.values) for row in range(len(samples))]

def scaled(images):
    "uint8 images as the tensors that ImageNet models take"
    return torch.from_numpy(((images/255 - IMAGENET_MEAN)/IMAGENET_STD).transpose(0, 3, 1, 2).astype(np.float32))

def batch_of(pairs, rng):
    "Random crops with flips"
    images, masks = [], []
    for k in rng.integers(len(pairs), size=BATCH):
        height, width = pairs[k].mask.shape
        y, x = rng.integers(height - CROP + 1), rng.integers(width - CROP + 1)
        image, mask = (array[y:y + CROP, x:x + CROP] for array in pairs[k])
        for axis in (0, 1):
            if rng.random() < .5:
                image, mask = np.flip(image, axis), np.flip(mask, axis)
        images.append(image)
        masks.append(mask)
    return scaled(np.stack(images)), torch.from_numpy(np.stack(masks).astype(np.int64))

def mean_iou_of(model, pairs, cfg):
    "mIoU over whole images"
    rows = []
    for pair in pairs:
        logits = sliding_logits(model, scaled(pair.image[None]), cfg.windows.side, cfg.windows.stride)
        labels = logits.argmax(1)[0].to(torch.uint8).numpy()
        rows.append(counts_to_row(count_image(labels, pair.mask, len(cfg.data.names))))
    return scores_of_counts(sum_counts(pd.DataFrame(rows)), cfg.data.names)['miou']

def plain_recipe(cfg, train_pairs, val_pairs, seconds, seed):
    "mIoU and steps of the plain recipe after so many seconds of training"
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = smp.Unet('resnet18', encoder_weights=None, classes=len(cfg.data.names))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    start, steps = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        images, target = batch_of(train_pairs, rng)
        loss = cross_entropy(model(images), target, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    model.eval()
    with torch.inference_mode():
        return mean_iou_of(model, val_pairs, cfg), steps

def this_library(cfg):
    "Seconds of a run, mIoU of its best and of its last epoch, and its steps"
    start = time.monotonic()
    rows = read_log(train(cfg))
    seconds, scores = time.monotonic() - start, [row['val/miou'] for row in rows if 'val/miou' in row]
    return seconds, max(scores), scores[-1], sum(row['batches'] for row in rows)

def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seconds', type=float, default=300, help='training time of each run')
    parser.add_argument('--seeds', type=int, nargs='+', default=[42, 43, 44])
    parser.add_argument('--overrides', nargs='*', default=[], help='of configs/landcover/dubai.yaml')
    return parser.parse_args()

def compare(cfg, seeds):
    "All seeds, and their medians"
    pairs, ours, plain = [read_split(cfg, split) for split in ('train', 'val')], [], []
    for seed in seeds:
        taken, best, last, steps = this_library(cfg.model_copy(update=dict(seed=seed)))
        found, plain_steps = plain_recipe(cfg, *pairs, taken, seed)
        ours.append(last)
        plain.append(found)
        emit_value(f'land cover, seed {seed}', round(last, 4), round(found, 4), 'mIoU', best=round(best, 4),
                   seconds=round(taken), steps=steps, peer_steps=plain_steps)
    spread = statistics.stdev(plain) if len(seeds) > 1 else 0.
    ours_median, plain_median = statistics.median(ours), statistics.median(plain)
    emit_value('land cover, median of seeds', round(ours_median, 4), round(plain_median, 4), 'mIoU',
               peer_spread=round(spread, 4), goal="at least the peer's less its spread",
               met=ours_median >= plain_median - spread)

def main():
    options = arguments()
    if not SOURCE.exists():
        sys.exit('skipped: the real data sets are not beside the project')
    with TemporaryDirectory() as folder:
        data = Path(folder)/'data'
        data.mkdir()
        cfg = load(ROOT/'configs'/'landcover'/'dubai.yaml', overrides=options.overrides, runs=f'{folder}/runs',
                   tracker={'kind': 'none'}, budget_minutes=options.seconds/60, data=dict(source=halved(data)))
        compare(cfg, options.seeds)

if __name__ == '__main__':
    main()
