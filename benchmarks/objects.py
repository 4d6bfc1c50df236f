"""Objects of guide 6.2: components, overlaps and the greedy matching, and a scene beside the thresholding of it.

python benchmarks/objects.py [rounds]     CPU time of one thread; before it, tp, fp and fn of each tile are asserted to be the same

Tiles of 512² pixels with 0 to 30 true blobs and about as many predicted ones. Two peers: scikit-image (`label`, `regionprops`, and the IoU of every pair of
objects whose boxes meet), and the double loop over all pairs of labels. Neither takes the size of the smallest rotated rectangle, which ours does. The scene has
4096² pixels and 3000 blobs; its peer is `scores >= t` alone, in the scores' own precision.
"""
import sys, time

import cv2, numpy as np
from skimage.measure import label, regionprops

from common import emit, turns
from rtsseg.evidence import Evidence, tile_bands, tile_histograms, tile_objects
from rtsseg.objects import match_objects

IOU, LOGIT = 0.3, 0.5                                                   # a logit of 0.5 is a half-precision number
THRESHOLD = 1 / (1 + np.exp(-LOGIT))
EIGHT = 2                                                               # scikit-image's name for it

def blobs(rng, side, n):
    "Logits and mask of a square with n true blobs; some are predicted elsewhere, some not at all, and some predictions are false"
    mask, predicted = np.zeros((2, side, side), np.uint8)
    def draw(image, at, axes, angle): cv2.ellipse(image, tuple(map(int, at)), tuple(map(int, axes)), angle, 0, 360, 1, -1)
    for _ in range(n):
        at, axes, angle = rng.integers(0, side, 2), rng.integers(3, 14, 2), int(rng.integers(180))
        draw(mask, at, axes, angle)
        if rng.random() < 0.9: draw(predicted, at + rng.integers(-5, 6, 2) if rng.random() < 0.9 else rng.integers(0, side, 2), axes, angle)
    logits = 8 * cv2.GaussianBlur(predicted.astype(np.float32), (0, 0), 1) - 4 + 0.5 * rng.normal(size=mask.shape)
    return logits.astype(np.float16), mask

def greedy(scores, iou):
    "Steps 3 to 5: (tp, fp, fn) of one tile from the scores of predictions and the IoU of each pair"
    taken = set()
    for i in np.argsort(-np.asarray(scores), kind='stable'):
        if iou.shape[1] and iou[i].max() >= IOU and (best := int(iou[i].argmax())) not in taken: taken.add(best)
    return len(taken), len(scores) - len(taken), iou.shape[1] - len(taken)

def by_regionprops(logits, mask):
    probability = 1 / (1 + np.exp(-logits.astype(np.float32)))
    predicted, true = regionprops(label(logits >= LOGIT, connectivity=EIGHT), probability), regionprops(label(mask == 1, connectivity=EIGHT))
    iou = np.zeros((len(predicted), len(true)))
    for i, p in enumerate(predicted):
        for j, t in enumerate(true):
            top, left, bottom, right = *np.maximum(p.bbox[:2], t.bbox[:2]), *np.minimum(p.bbox[2:], t.bbox[2:])
            if top >= bottom or left >= right: continue
            cut = lambda x: x.image[top - x.bbox[0]:bottom - x.bbox[0], left - x.bbox[1]:right - x.bbox[1]]
            common = (cut(p) & cut(t)).sum(); iou[i, j] = common / (p.area + t.area - common)
    return greedy([p.intensity_mean for p in predicted], iou)

def by_double_loop(logits, mask):
    probability = 1 / (1 + np.exp(-logits.astype(np.float32)))
    (p, n), (t, k) = (label(x, connectivity=EIGHT, return_num=True) for x in (logits >= LOGIT, mask == 1))
    iou = np.zeros((n, k)); scores = [probability[p == i + 1].mean() for i in range(n)]
    for i in range(n):
        for j in range(k): a, b = p == i + 1, t == j + 1; iou[i, j] = (a & b).sum() / (a | b).sum()
    return greedy(scores, iou)

def main(rounds=5):
    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    tiles = [blobs(rng, 512, n) for n in range(31)]
    known = [dict(tile_id=f'{i:02}', split='val', region='', block='', positive=i > 0, pixel_size=3.) | tile_histograms(*t) | tile_bands(*t, ()) for i, t in enumerate(tiles)]
    def ours():
        m = match_objects(Evidence.from_rows([k | tile_objects(*t, (THRESHOLD,)) for k, t in zip(known, tiles)], thresholds=(THRESHOLD,)), THRESHOLD, IOU)
        return list(zip(m.tp, m.fp, m.fn))
    for name, peer, goal, n in (('scikit-image regionprops', by_regionprops, 1/5, rounds), ('a double loop', by_double_loop, 1/30, max(2, rounds // 2))):
        theirs = lambda: [peer(*t) for t in tiles]
        assert ours() == theirs()
        a, b = ([s / len(tiles) for s in x] for x in turns(ours, theirs, n, warm=1, clock=time.process_time))
        emit(f'objects and matching of a 512² tile, beside {name}', a, b, goal=goal, tiles=len(tiles))
    logits, mask = blobs(rng, 4096, 3000)
    for dtype in (np.float32, np.float16):
        scores = logits.astype(dtype); found = tile_objects(scores, mask, (THRESHOLD,))
        assert found['predicted']['area'].sum() == (scores >= LOGIT).sum() and len(found['truth']['id']) == label(mask, connectivity=EIGHT).max()
        a, b = turns(lambda: tile_objects(scores, mask, (THRESHOLD,)), lambda: scores >= dtype(LOGIT), 4 * rounds, clock=time.process_time)
        emit(f'a scene of 4096² and 3000 blobs, {np.dtype(dtype)}, beside its thresholding', a, b, goal=10, predicted=len(found['predicted']['id']), true=len(found['truth']['id']))

if __name__ == '__main__': main(*map(int, sys.argv[1:]))
