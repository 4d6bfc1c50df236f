"""Buildings on real aerial images: this library beside a plain recipe in equal time, and boosting on pixel colours

    python benchmarks/dubai.py [--seconds 300] [--seeds 42 43 44]

All three see the same images at half resolution, and are evaluated on the same validation tiles by native average
precision (scikit-learn's, over every labelled pixel). The plain recipe: U-Net with resnet18 from random weights, BCE,
AdamW 1e-3, flips, 128² crops of which half hold a building. Ours: configs/dubai_building.yaml, with as many epochs as
take about that many seconds. The plain recipe then gets exactly the seconds that ours took, validation included. Ours
is evaluated at its last epoch, since the exported one was chosen on these tiles. Needs the real data sets beside the
project.
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
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import average_precision_score
from torch.nn.functional import binary_cross_entropy_with_logits

from common import emit_value
from rtsseg.config import load
from rtsseg.infer import load_model
from rtsseg.prepare import prepare
from rtsseg.runs import read_log
from rtsseg.tiles import eval_loader, read_tile
from rtsseg.training import train

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT.parent/'shared'/'data'/'dubai_landcover'
CROP, BATCH = 128, 16
IMAGENET_MEAN, IMAGENET_STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

def training_images():
    "Training images and building masks at half resolution, whole"
    manifest = pd.read_csv(SOURCE/'manifest.csv')
    for tile in manifest[manifest.split == 'train'].tile_id:
        image = cv2.cvtColor(cv2.imread(str(SOURCE/'images'/f'{tile}.jpg')), cv2.COLOR_BGR2RGB)
        classes = cv2.imread(str(SOURCE/'masks'/f'{tile}.png'), cv2.IMREAD_GRAYSCALE)
        mask = np.where(classes == 255, 255, classes == 0).astype(np.uint8)
        half = (mask.shape[1]//2, mask.shape[0]//2)
        yield (cv2.resize(image, half, interpolation=cv2.INTER_AREA),
               cv2.resize(mask, half, interpolation=cv2.INTER_NEAREST))

def native_ap(score, part):
    "Average precision over the labelled pixels of a split; `score(i)` are the scores of tile i"
    truth = np.concatenate([read_tile(part, i)[2].ravel() for i in range(len(part))])
    scores = np.concatenate([score(i).ravel() for i in range(len(part))])
    return float(average_precision_score(truth[truth != 255], scores[truth != 255]))

def boosting(images, part):
    "Average precision of gradient boosting on the colours of single pixels"
    rng = np.random.default_rng(0)
    colours, labels = [], []
    for image, mask in images:
        chosen = rng.choice(mask.size, 20_000)
        colours.append(image.reshape(-1, 3)[chosen])
        labels.append(mask.ravel()[chosen])
    colours, labels = np.concatenate(colours), np.concatenate(labels)
    model = HistGradientBoostingClassifier(random_state=0).fit(colours[labels != 255], labels[labels != 255])

    def score(i):
        return model.predict_proba(read_tile(part, i)[0].reshape(-1, 3))[:, 1]

    return native_ap(score, part)

class Crops:
    "Random crops with flips"
    def __init__(self, images, rng):
        self.images, self.rng = images, rng
        self.buildings = [np.argwhere(mask == 1) for _, mask in images]
        self.holding = [k for k, places in enumerate(self.buildings) if len(places)]

    def corner(self, k, positive):
        "Top left corner of a crop of image k, around a building pixel or anywhere"
        height, width = self.images[k][1].shape
        if positive:
            places = self.buildings[k]
            y, x = places[self.rng.integers(len(places))] - self.rng.integers(0, CROP, 2)
        else:
            y, x = self.rng.integers(0, height - CROP + 1), self.rng.integers(0, width - CROP + 1)
        return np.clip(y, 0, height - CROP), np.clip(x, 0, width - CROP)

    def draw(self, positive):
        if positive:
            k = self.holding[self.rng.integers(len(self.holding))]
        else:
            k = self.rng.integers(len(self.images))
        y, x = self.corner(k, positive)
        image, mask = (array[y:y + CROP, x:x + CROP] for array in self.images[k])
        for axis in (0, 1):
            if self.rng.random() < 0.5:
                image, mask = np.flip(image, axis), np.flip(mask, axis)
        return image, mask

    def batch(self):
        "Images and masks, half of them around a building"
        images, masks = zip(*[self.draw(i % 2 == 0) for i in range(BATCH)], strict=True)
        return scaled(np.stack(images)), torch.from_numpy(np.stack(masks).astype(np.float32))

def scaled(images):
    "uint8 images as the tensors that ImageNet models take"
    return torch.from_numpy(((images/255 - IMAGENET_MEAN)/IMAGENET_STD).transpose(0, 3, 1, 2).astype(np.float32))

def plain_recipe(images, part, seconds, seed):
    "Average precision and steps of the plain recipe after so many seconds of training"
    torch.manual_seed(seed)
    crops = Crops(images, np.random.default_rng(seed))
    model = smp.Unet('resnet18', encoder_weights=None, classes=1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    start, steps = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        batch, target = crops.batch()
        valid = (target != 255).float()
        losses = binary_cross_entropy_with_logits(model(batch)[:, 0], target*valid, reduction='none')
        optimizer.zero_grad()
        ((losses*valid).sum()/valid.sum()).backward()
        optimizer.step()
        steps += 1
    model.eval()

    def score(i):
        return model(scaled(read_tile(part, i)[0][None]))[0, 0].numpy()

    with torch.inference_mode():
        return native_ap(score, part), steps

def this_library(cfg):
    "Seconds of a run, average precision of its exported model and of its last epoch, and its steps"
    start = time.monotonic()
    folder = train(cfg)
    seconds = time.monotonic() - start
    model = load_model(folder/'model')
    part = prepare(cfg).of('val')
    with torch.inference_mode():
        logits = [model.model(batch['image'])[:, 0] for batch in eval_loader(part, model.stats, cfg)]
    logits = torch.cat(logits).numpy()
    rows = read_log(folder)
    steps = sum(row['batches'] for row in rows)
    return seconds, native_ap(lambda i: logits[i], part), rows[-1]['val/pr_auc@native'], steps

def epochs_in(cfg, seconds):
    "How many epochs take about that many seconds, from a run of one"
    start = time.monotonic()
    train(cfg.model_copy(update={'epochs': 1, 'name': 'one_epoch'}))
    return max(2, round(seconds/(time.monotonic() - start)))

def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seconds', type=float, default=300, help='training time of each run')
    parser.add_argument('--seeds', type=int, nargs='+', default=[42, 43, 44])
    parser.add_argument('--overrides', nargs='*', default=[], help='of configs/dubai_building.yaml')
    return parser.parse_args()

def compare(cfg, images, part, seeds, seconds):
    "All seeds, and their medians"
    epochs = epochs_in(cfg, seconds)
    ours, plain = [], []
    for seed in seeds:
        taken, exported, last, steps = this_library(cfg.model_copy(update={'seed': seed, 'epochs': epochs}))
        plain_ap, plain_steps = plain_recipe(images, part, taken, seed)
        ours.append(last)
        plain.append(plain_ap)
        emit_value(f'buildings, seed {seed}', round(last, 4), round(plain_ap, 4), 'native average precision',
                   exported=round(exported, 4), seconds=round(taken), epochs=epochs, steps=steps,
                   peer_steps=plain_steps)
    spread = statistics.stdev(plain) if len(seeds) > 1 else 0.
    ours_median, plain_median = statistics.median(ours), statistics.median(plain)
    emit_value('buildings, median of seeds', round(ours_median, 4), round(plain_median, 4), 'native average precision',
               peer_spread=round(spread, 4), goal="at least the peer's less its spread",
               met=ours_median >= plain_median - spread)

def main():
    options = arguments()
    if not SOURCE.exists():
        sys.exit('skipped: the real data sets are not beside the project')
    with TemporaryDirectory() as folder:
        cfg = load(ROOT/'configs'/'dubai_building.yaml', overrides=options.overrides, runs=f'{folder}/runs',
                   tracker={'kind': 'none'})
        part, images = prepare(cfg).of('val'), list(training_images())
        floor = boosting(images, part)
        emit_value('buildings, boosting on pixel colours', None, round(floor, 4), 'native average precision')
        compare(cfg, images, part, options.seeds, options.seconds)

if __name__ == '__main__':
    main()
