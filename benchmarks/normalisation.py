"""Channel statistics of 512² tiles: one pass with merged moments, beside a float64 NumPy pass per tile

python benchmarks/normalisation.py [tiles]
"""
import sys

import cv2
import numpy as np

from common import emit, per_item, turns
from rtsseg.stats import Moments, merge_moments, moments

def by_moments(tiles):
    total = Moments()
    for planes, valid in tiles:
        total = merge_moments(total, moments(planes, valid))
    return total.mean, total.std

def by_numpy(tiles):
    count = total = squares = 0
    for planes, valid in tiles:
        values = planes.astype(np.float64)[:, valid]
        count += values.shape[1]
        total += values.sum(1)
        squares += (values**2).sum(1)
    return total / count, np.sqrt(squares / count - (total / count)**2)

def random_tiles(rng, count, dtype, valid_share):
    "Three channels and a mask of valid pixels each"
    high = {'uint8': 256, 'uint16': 6000}[dtype]
    tiles = []
    for _ in range(count):
        planes = rng.integers(0, high, (3, 512, 512)).astype(dtype)
        tiles.append((planes, rng.random((512, 512)) < valid_share))
    return tiles

def case(tiles, what):
    "Compare results and times on some tiles"
    for ours, peer in zip(by_moments(tiles), by_numpy(tiles), strict=True):
        np.testing.assert_allclose(ours, peer, rtol=1e-9)
    times = turns(lambda: by_moments(tiles), lambda: by_numpy(tiles), 5, warm=1)
    emit(what, *per_item(times, len(tiles)), goal=1/15)

def main(count=32):
    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    for dtype in ('uint8', 'uint16'):
        for share in (1., .9):
            tiles = random_tiles(rng, count, dtype, share)
            case(tiles, f'statistics of a 512² × 3 tile, {dtype}, {share:.0%} of the pixels valid')

if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
