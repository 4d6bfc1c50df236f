"""Augmented 512² tiles: guide 9.2 as one map and one pass of light, beside the same list written plainly with albumentations at its defaults.

python benchmarks/augment.py [rounds]      CPU time of one thread; a round is 50 tiles of each, every one a draw of its own

Both sides end with a float32 tile in [0, 1]. The first case starts from one, as training does. In the second a uint8 tile comes in: ours scales it to float32
first, the library works on the bytes, rounds to 8 bits after each line, and its result is scaled last; 16-bit imagery has no such way.
"""
import math, os, sys, time

os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')
import albumentations as A
import cv2
import numpy as np

from common import emit, turns
from rtsseg.augment import Augmenter
from rtsseg.config import Augment

SIDE, TILES = 512, 50

def plain():
    "Every line of the guide with its probability, as the library's manual would have it"
    return A.Compose([
        A.RandomRotate90(p=.5), A.HorizontalFlip(p=.5), A.VerticalFlip(p=.5),
        A.Affine(translate_percent=(-.1, .1), scale=(.8, 1.2), rotate=(-45, 45), p=.5), A.ElasticTransform(alpha=120, sigma=6, p=.3), A.Affine(shear=(-10, 10), p=.3),
        A.RandomBrightnessContrast(brightness_limit=.2, contrast_limit=0, p=.5), A.RandomBrightnessContrast(brightness_limit=0, contrast_limit=.2, p=.5),
        A.ColorJitter(brightness=0, contrast=0, saturation=.2, hue=0, p=.5), A.GaussNoise(std_range=(math.sqrt(10)/255, math.sqrt(50)/255), p=.3),
        A.CLAHE(clip_limit=4., tile_grid_size=(8, 8), p=.2), A.RandomScale(scale_limit=(-.5, 0), p=.3), A.PadIfNeeded(SIDE, SIDE)], seed=42)

def main(rounds=30):
    rng = np.random.default_rng(0)
    image = (255*np.clip(.5 + cv2.GaussianBlur(rng.standard_normal((SIDE, SIDE, 3)), (0, 0), 4), 0, 1)).astype(np.uint8)
    mask = (cv2.GaussianBlur(rng.standard_normal((SIDE, SIDE)), (0, 0), 20) > .03).astype(np.uint8)
    scaled, unit, library, augment, key = image*np.float32(1/255), np.float32(1/255), plain(), Augmenter(Augment(), [.5]*3), iter(range(10**9))

    def ours(tile):
        for _ in range(TILES): out = augment(tile(), mask, (42, 1, 0, next(key)))[0]
        assert out.dtype == np.float32 and out.shape == scaled.shape
    def peer(tile, after):
        for _ in range(TILES): out = after(library(image=tile, mask=mask)['image'])
        assert out.dtype == np.float32 and out.shape == scaled.shape
    for what, ours_tile, peer_tile, after, goal in (('float32 tiles', lambda: scaled, scaled, lambda x: x, .4), ('uint8 tiles', lambda: image*unit, image, lambda x: x*unit, None)):
        a, b = turns(lambda: ours(ours_tile), lambda: peer(peer_tile, after), rounds, clock=time.process_time)
        a, b = ([s/TILES for s in c] for c in (a, b))
        rate = lambda c: round(1/np.median(c))
        emit(f'augmentation of {what}, {SIDE}² × 3', a, b, goal=goal, tiles_a_second=[rate(a), rate(b)], times_as_many=round(np.median(b)/np.median(a), 2), threads=1)

if __name__ == '__main__': main(*map(int, sys.argv[1:]))
