"""Channel statistics of 512² tiles: one streaming pass with merged moments, beside a float64 numpy pass per tile.

python benchmarks/normalisation.py [tiles]      prints one JSON line for each case; goal: ratio of at least 15
"""
import json, sys, time

import cv2
import numpy as np

from rtsseg.stats import Moments, merge_moments, moments

def ours(tiles):
    total = Moments()
    for planes, valid in tiles: total = merge_moments(total, moments(planes, valid))
    return total.mean, total.std

def peer(tiles):
    n = total = squares = 0
    for planes, valid in tiles:
        x = planes.astype(np.float64)[:, valid]
        n, total, squares = n + x.shape[1], total + x.sum(1), squares + (x**2).sum(1)
    return total / n, np.sqrt(squares / n - (total / n)**2)

def seconds(f, tiles, repeats=5):
    f(tiles[:2]); times = []
    for _ in range(repeats): start = time.perf_counter(); f(tiles); times.append(time.perf_counter() - start)
    return min(times)

if __name__ == '__main__':
    count, rng = int(sys.argv[1]) if len(sys.argv) > 1 else 32, np.random.default_rng(0)
    cv2.setNumThreads(1)
    for dtype, high in (('uint8', 256), ('uint16', 6000)):
        for share in (1., .9):
            tiles = [(rng.integers(0, high, (3, 512, 512)).astype(dtype), rng.random((512, 512)) < share) for _ in range(count)]
            for a, b in zip(ours(tiles), peer(tiles)): np.testing.assert_allclose(a, b, rtol=1e-9)
            a, b = seconds(ours, tiles), seconds(peer, tiles)
            print(json.dumps(dict(benchmark='statistics', dtype=dtype, valid=share, tiles=count, ours_ms=round(a / count * 1e3, 3), numpy_ms=round(b / count * 1e3, 3), ratio=round(b / a, 1))))
