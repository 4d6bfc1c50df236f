"""Augmented 512² tiles: guide 9.2 as one map and one pass of light, beside the same list in albumentations

python benchmarks/augment.py [rounds]      CPU time of one thread; a round is 50 tiles of each, every one drawn afresh

Both sides end with a float32 tile in [0, 1]. The first case starts from one, as training does. In the second case a
uint8 tile comes in. Ours scales it to float32 first. The library works on the bytes, rounds to 8 bits after each line,
and its result is scaled last; 16-bit imagery cannot be handled this way.
"""
import math
import os
import sys
import time
from itertools import count

os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')
import albumentations as A
import cv2
import numpy as np

from common import emit, per_item, turns
from rtsseg.augment import Augmenter
from rtsseg.config import Augment

SIDE, TILES = 512, 50
UNIT = np.float32(1/255)

def plain_list():
    "Every line of the guide with its probability, at the defaults of the library"
    noise = (math.sqrt(10)/255, math.sqrt(50)/255)
    return A.Compose([
        A.RandomRotate90(p=.5),
        A.HorizontalFlip(p=.5),
        A.VerticalFlip(p=.5),
        A.Affine(translate_percent=(-.1, .1), scale=(.8, 1.2), rotate=(-45, 45), p=.5),
        A.ElasticTransform(alpha=120, sigma=6, p=.3),
        A.Affine(shear=(-10, 10), p=.3),
        A.RandomBrightnessContrast(brightness_limit=.2, contrast_limit=0, p=.5),
        A.RandomBrightnessContrast(brightness_limit=0, contrast_limit=.2, p=.5),
        A.ColorJitter(brightness=0, contrast=0, saturation=.2, hue=0, p=.5),
        A.GaussNoise(std_range=noise, p=.3),
        A.CLAHE(clip_limit=4., tile_grid_size=(8, 8), p=.2),
        A.RandomScale(scale_limit=(-.5, 0), p=.3),
        A.PadIfNeeded(SIDE, SIDE),
    ], seed=42)

def draw_tile():
    "A cloudy uint8 image, and a mask"
    rng = np.random.default_rng(0)
    noise = cv2.GaussianBlur(rng.standard_normal((SIDE, SIDE, 3)), (0, 0), 4)
    image = (255*np.clip(.5 + noise, 0, 1)).astype(np.uint8)
    mask = (cv2.GaussianBlur(rng.standard_normal((SIDE, SIDE)), (0, 0), 20) > .03).astype(np.uint8)
    return image, mask

class Case:
    "Both sides, on one kind of input"
    def __init__(self, image, mask):
        self.image, self.mask = image, mask
        self.bytes = image.dtype == np.uint8
        self.augment, self.library = Augmenter(Augment(), [.5]*3), plain_list()
        self.numbers = count()

    def ours(self):
        for _ in range(TILES):
            image = self.image*UNIT if self.bytes else self.image
            out = self.augment(image, self.mask, (42, 1, 0, next(self.numbers)))[0]
        assert out.dtype == np.float32 and out.shape == self.image.shape

    def peer(self):
        for _ in range(TILES):
            out = self.library(image=self.image, mask=self.mask)['image']
            if self.bytes:
                out = out*UNIT
        assert out.dtype == np.float32 and out.shape == self.image.shape

def main(rounds=30):
    image, mask = draw_tile()
    for what, tile, goal in (('float32', image*UNIT, .4), ('uint8', image, None)):
        case = Case(tile, mask)
        ours, peer = per_item(turns(case.ours, case.peer, rounds, clock=time.process_time), TILES)
        rates = [round(1/np.median(seconds)) for seconds in (ours, peer)]
        emit(f'augmentation of a 512² × 3 tile, {what}', ours, peer, goal=goal, tiles_a_second=rates, threads=1)

if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
