"""Objects of guide 6.2: components, overlaps and the greedy matching; and a scene beside the thresholding of it

python benchmarks/objects.py [rounds]     CPU time of one thread

Tiles of 512² pixels with 0 to 30 true blobs and about as many predicted ones. Two peers: scikit-image (`label`,
`regionprops`, and the IoU of every pair of objects whose boxes meet), and a double loop over all pairs of labels. All
find the same tp, fp and fn in each tile. Neither peer measures the smallest rotated rectangle, which ours does.
The scene has 4096² pixels and 3000 blobs. Its peer is `scores >= t` alone, in the precision of the scores.
"""
import sys
import time

import cv2
import numpy as np
from skimage.measure import label, regionprops

from common import emit, per_item, turns
from rtsseg.evidence import Evidence
from rtsseg.objects import match_objects
from rtsseg.scores import tile_histograms
from rtsseg.shapes import tile_bands, tile_objects

IOU = 0.3
# exact in half precision
LOGIT = 0.5
THRESHOLD = 1/(1 + np.exp(-LOGIT))
# scikit-image's name for 8-connectivity
EIGHT = 2

def draw(image, centre, axes, angle):
    "Fill an ellipse with ones"
    cv2.ellipse(image, [int(v) for v in centre], [int(v) for v in axes], angle, 0, 360, 1, -1)

def blobs(rng, side, count):
    "Logits and mask of a square with so many true blobs; some are predicted elsewhere, some missed, some found falsely"
    mask, predicted = np.zeros((2, side, side), np.uint8)
    for _ in range(count):
        centre, axes, angle = rng.integers(0, side, 2), rng.integers(3, 14, 2), int(rng.integers(180))
        draw(mask, centre, axes, angle)
        if rng.random() < 0.9:
            if rng.random() < 0.9:
                centre = centre + rng.integers(-5, 6, 2)
            else:
                centre = rng.integers(0, side, 2)
            draw(predicted, centre, axes, angle)
    smooth = cv2.GaussianBlur(predicted.astype(np.float32), (0, 0), 1)
    logits = 8*smooth - 4 + 0.5*rng.normal(size=mask.shape)
    return logits.astype(np.float16), mask

def greedy(scores, iou):
    "(tp, fp, fn) of one tile, from the scores of predictions and the IoU of each pair"
    taken = set()
    for i in np.argsort(-np.asarray(scores), kind='stable'):
        if iou.shape[1] and iou[i].max() >= IOU:
            taken.add(int(iou[i].argmax()))
    return len(taken), len(scores) - len(taken), iou.shape[1] - len(taken)

def probability(logits):
    return 1/(1 + np.exp(-logits.astype(np.float32)))

def pair_iou(first, second):
    "IoU of two regions, 0 where their boxes do not meet"
    top, left = np.maximum(first.bbox[:2], second.bbox[:2])
    bottom, right = np.minimum(first.bbox[2:], second.bbox[2:])
    if top >= bottom or left >= right:
        return 0.
    parts = []
    for region in (first, second):
        y, x = region.bbox[:2]
        parts.append(region.image[top - y:bottom - y, left - x:right - x])
    common = (parts[0] & parts[1]).sum()
    return common/(first.area + second.area - common)

def by_regionprops(logits, mask):
    predicted = regionprops(label(logits >= LOGIT, connectivity=EIGHT), probability(logits))
    true = regionprops(label(mask == 1, connectivity=EIGHT))
    iou = np.array([[pair_iou(p, t) for t in true] for p in predicted]).reshape(len(predicted), len(true))
    return greedy([region.intensity_mean for region in predicted], iou)

def by_double_loop(logits, mask):
    scores = probability(logits)
    predicted, n_predicted = label(logits >= LOGIT, connectivity=EIGHT, return_num=True)
    true, n_true = label(mask == 1, connectivity=EIGHT, return_num=True)
    iou = np.zeros((n_predicted, n_true))
    for i in range(n_predicted):
        for j in range(n_true):
            a, b = predicted == i + 1, true == j + 1
            iou[i, j] = (a & b).sum()/(a | b).sum()
    return greedy([scores[predicted == i + 1].mean() for i in range(n_predicted)], iou)

def tiles_beside(rng, rounds):
    "512² tiles beside both peers"
    tiles = [blobs(rng, 512, count) for count in range(31)]
    known = []
    for i, tile in enumerate(tiles):
        row = {'tile_id': f'{i:02}', 'split': 'val', 'region': '', 'block': '', 'positive': i > 0, 'pixel_size': 3.}
        known.append(row | tile_histograms(*tile) | tile_bands(*tile, ()))

    def ours():
        rows = [row | tile_objects(*tile, (THRESHOLD,)) for row, tile in zip(known, tiles, strict=True)]
        found = match_objects(Evidence.from_rows(rows, thresholds=(THRESHOLD,)), THRESHOLD, IOU)
        return list(zip(found.tp, found.fp, found.fn, strict=True))

    def regionprops_peer():
        return [by_regionprops(*tile) for tile in tiles]

    def double_loop_peer():
        return [by_double_loop(*tile) for tile in tiles]

    peers = [('scikit-image', regionprops_peer, 1/5, rounds),
             ('a double loop', double_loop_peer, 1/30, max(2, rounds//2))]
    for name, peer, goal, peer_rounds in peers:
        assert ours() == peer()
        times = per_item(turns(ours, peer, peer_rounds, warm=1, clock=time.process_time), len(tiles))
        emit(f'objects and matching of a 512² tile, beside {name}', *times, goal=goal, tiles=len(tiles))

def scene_beside(scores, mask, rounds):
    "One scene beside its thresholding"
    def ours():
        return tile_objects(scores, mask, (THRESHOLD,))

    found = ours()
    assert found['predicted']['area'].sum() == (scores >= LOGIT).sum()
    assert len(found['truth']['id']) == label(mask, connectivity=EIGHT).max()
    threshold = scores.dtype.type(LOGIT)
    times = turns(ours, lambda: scores >= threshold, rounds, clock=time.process_time)
    emit(f'objects of a 4096² scene, {scores.dtype}, beside its thresholding', *times, goal=10,
         predicted=len(found['predicted']['id']), true=len(found['truth']['id']))

def main(rounds=5):
    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    tiles_beside(rng, rounds)
    logits, mask = blobs(rng, 4096, 3000)
    for dtype in (np.float32, np.float16):
        scene_beside(logits.astype(dtype), mask, 4*rounds)

if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
