"mIoU and boundary IoU of maps of classes, from counts of each image, beside torchmetrics and the published definition"
import sys
import time

import cv2
import numpy as np
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from common import emit, per_item, turns
from rtsseg.class_metrics import ClassCounts, boundary_counts_of, count_image, scores_of_counts

SIDE, CLASSES, WIDTHS = 1024, 7, [2, 3]
NAMES = [str(c) for c in range(CLASSES)]

def land(rng):
    "A map of patches, as the largest of smooth heights"
    heights = [cv2.GaussianBlur(rng.standard_normal((SIDE, SIDE), np.float32), (0, 0), 12) for _ in range(CLASSES)]
    return np.argmax(heights, 0).astype(np.uint8)

def pairs(count, rng):
    "Maps, some of whose truth is ignored, and predictions of them that are moved and speckled"
    for _ in range(count):
        true = land(rng)
        predicted = np.roll(true, rng.integers(-3, 4, 2), (0, 1))
        specks = rng.random(true.shape) < .01
        predicted[specks] = rng.integers(0, CLASSES, specks.sum())
        yield predicted, true

def ours(maps):
    "Scores of all maps"
    total = None
    for predicted, true in maps:
        counts = count_image(predicted, true, CLASSES, WIDTHS)
        total = counts if total is None else ClassCounts(
            total.confusion + counts.confusion,
            {width: total.boundary[width] + counts.boundary[width] for width in WIDTHS})
    return scores_of_counts(total, NAMES)

def region_part(maps):
    "Only mIoU, by ours"
    total = sum(count_image(predicted, true, CLASSES).confusion for predicted, true in maps)
    return scores_of_counts(ClassCounts(total, {}), NAMES)['miou']

def boundary_part(maps):
    "Only boundary IoU, by ours"
    found = [boundary_counts_of(p, t, CLASSES, WIDTHS) for p, t in maps]
    bands = {width: sum(each[width] for each in found) for width in WIDTHS}
    scores = scores_of_counts(ClassCounts(np.eye(CLASSES), bands), NAMES)
    return [scores[f'biou_{width}'] for width in WIDTHS]

def torchmetrics_part(maps):
    "mIoU by torchmetrics"
    metric = MulticlassJaccardIndex(CLASSES)
    for predicted, true in maps:
        metric.update(torch.from_numpy(predicted).long()[None], torch.from_numpy(true).long()[None])
    return metric.compute().item()

def published_boundary(mask, width):
    "What an erosion with a 3 × 3 square, repeated, takes away from a mask (Cheng et al. 2021)"
    padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)
    return mask - eroded[1:-1, 1:-1]

def published_part(maps):
    "Boundary IoU, one class and width after the other"
    both, either = (np.zeros((len(WIDTHS), CLASSES)) for _ in range(2))
    for predicted, true in maps:
        for i, width in enumerate(WIDTHS):
            for c in range(CLASSES):
                masks = [(labels == c).astype(np.uint8) for labels in (predicted, true)]
                found, wanted = (published_boundary(mask, width) for mask in masks)
                both[i, c] += ((found * wanted) > 0).sum()
                either[i, c] += ((found + wanted) > 0).sum()
    return (both / either).mean(1).tolist()

def compare(what, mine, peer, maps, rounds, **details):
    "Equal numbers first, then CPU time of both in turns"
    found, wanted = mine(maps), peer(maps)
    assert np.allclose(found, wanted, atol=1e-6), (found, wanted)
    times = turns(lambda: mine(maps), lambda: peer(maps), rounds, warm=1, clock=time.process_time)
    emit(what, *per_item(times, len(maps)), goal=.1, maps=len(maps), side=SIDE, classes=CLASSES, note='CPU time',
         **details)

def main(count=8, rounds=3):
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    maps = list(pairs(count, np.random.default_rng(0)))
    compare('mIoU of a map / torchmetrics', region_part, torchmetrics_part, maps, rounds)
    compare('boundary IoU of a map, 2 and 3 pixels / published', boundary_part, published_part, maps, rounds)

    def both_by_peers(maps):
        return [torchmetrics_part(maps), *published_part(maps)]

    def both_by_ours(maps):
        scores = ours(maps)
        return [scores['miou'], *(scores[f'biou_{width}'] for width in WIDTHS)]

    compare('mIoU and boundary IoU of a map / both', both_by_ours, both_by_peers, maps, rounds)

if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
