"""A cell of quality.py: the plain recipe, as many a script has it

    python benchmarks/quality_plain.py SET MINUTES SEED FOLDER

U-Net with resnet18 from random weights, all bands, BCE, AdamW at one rate, flips, crops of which half hold an object.
"""
import sys
import time
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, pad

from quality_data import SETS, band_statistics, pixels, prepared, rows_of, write_facts, write_scores

RECIPE = dict(encoder='resnet18', crop=128, batch=16, rate=1e-3)

class Images:
    "Images in standard units of the training bands; nodata is the mean"
    def __init__(self, manifest, bands):
        self.manifest, self.bands = manifest, bands
        self.train = [pixels(manifest, row, bands) for row in rows_of(manifest, 'train')]
        self.mean, self.std = band_statistics([planes for planes, _ in self.train])
        self.train = [(self.scaled(planes), label) for planes, label in self.train]

    def scaled(self, planes):
        return np.nan_to_num((planes - self.mean)/self.std).astype(np.float32)

    def test(self):
        "Name and bands of each test image"
        for row in rows_of(self.manifest, 'test'):
            yield row['tile_id'], self.scaled(pixels(self.manifest, row, self.bands)[0])

class Crops:
    "Random crops with flips"
    def __init__(self, images, rng):
        self.images, self.rng = images, rng
        self.side = min(RECIPE['crop'], *(min(label.shape) for _, label in images))
        self.objects = [np.argwhere(label == 1) for _, label in images]
        self.holding = [k for k, places in enumerate(self.objects) if len(places)]

    def corner(self, k, positive):
        "Top left corner of a crop of image k, around a pixel of an object or anywhere"
        height, width = self.images[k][1].shape
        if positive:
            places = self.objects[k]
            y, x = places[self.rng.integers(len(places))] - self.rng.integers(0, self.side, 2)
        else:
            y, x = self.rng.integers(0, height - self.side + 1), self.rng.integers(0, width - self.side + 1)
        return np.clip(y, 0, height - self.side), np.clip(x, 0, width - self.side)

    def draw(self, positive):
        if positive:
            k = self.holding[self.rng.integers(len(self.holding))]
        else:
            k = self.rng.integers(len(self.images))
        y, x = self.corner(k, positive)
        planes, label = (array[..., y:y + self.side, x:x + self.side] for array in self.images[k])
        for axis in (-1, -2):
            if self.rng.random() < 0.5:
                planes, label = np.flip(planes, axis), np.flip(label, axis)
        return planes, label

    def batch(self):
        "Images and labels, half of them around an object"
        planes, labels = zip(*[self.draw(i % 2 == 0) for i in range(RECIPE['batch'])], strict=True)
        return torch.from_numpy(np.stack(planes)), torch.from_numpy(np.stack(labels).astype(np.float32))

def train(model, crops, seconds):
    "Train for so many seconds; the steps"
    optimizer = torch.optim.AdamW(model.parameters(), RECIPE['rate'])
    start, steps = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        batch, target = crops.batch()
        valid = (target != 255).float()
        losses = binary_cross_entropy_with_logits(model(batch)[:, 0], target*valid, reduction='none')
        optimizer.zero_grad()
        # a batch may lie wholly on ignored pixels
        ((losses*valid).sum()/valid.sum().clamp(min=1)).backward()
        optimizer.step()
        steps += 1
    return steps

def predict(model, planes):
    "Logits of a whole image, padded to sides that the network takes"
    height, width = planes.shape[1:]
    padded = pad(torch.from_numpy(planes)[None], (0, -width % 32, 0, -height % 32), mode='reflect')
    return model(padded)[0, 0, :height, :width].numpy()

def main(name, minutes, seed, out):
    out, seed, seconds = Path(out), int(seed), 60*float(minutes)
    bands = SETS[name].bands
    images = Images(prepared(name), bands)
    torch.manual_seed(seed)
    crops = Crops(images.train, np.random.default_rng(seed))
    model = smp.Unet(RECIPE['encoder'], encoder_weights=None, in_channels=3 + len(bands), classes=1)
    steps = train(model, crops, seconds)
    model.eval()
    with torch.inference_mode():
        for tile, planes in images.test():
            write_scores(out, tile, predict(model, planes))
    write_facts(out, seconds=seconds, steps=steps)

if __name__ == '__main__':
    main(*sys.argv[1:])
