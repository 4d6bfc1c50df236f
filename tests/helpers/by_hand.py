"What other libraries make of the pixels of a split: the expected values of reports"
import numpy as np
from scipy import ndimage
from scipy.special import expit
from sklearn.metrics import average_precision_score, f1_score, jaccard_score, precision_score, recall_score

from rtsseg.pixel_results import pixel_run
from rtsseg.results import read_run

SCORES = {
    'IoU_RTS': jaccard_score,
    'F1_RTS': f1_score,
    'precision': precision_score,
    'recall': recall_score,
}

def read_pixel_run(folder):
    "A run folder with its evidence and calibration"
    return pixel_run(read_run(folder))

def nearest(thresholds, wanted):
    return min(thresholds, key=lambda t: abs(t - wanted))

class Split:
    "Pixels of a split of an invented run, with negative tiles weighted for a ratio"

    def __init__(self, made, ratio, split='test'):
        run = read_pixel_run(made.folder)
        table = run.manifest.of(split).table
        found = made.splits[split]
        self.calibration, self.ratio = made.calibration, ratio
        self.z, self.masks = found.logits.astype(float), found.masks
        self.positive = table.positive.to_numpy()
        self.region, self.metres = table.region.to_numpy(), table.pixel_size.to_numpy()
        self.w = ratio * self.positive.sum() / (~self.positive).sum()
        # weight of each tile, and for each valid pixel its tile, label, score and weight
        self.tile = np.where(self.positive, 1., self.w)
        valid = self.masks != 255
        self.of = np.broadcast_to(np.arange(len(self.z))[:, None, None], valid.shape)[valid]
        self.y, self.s = self.masks[valid] == 1, self.z[valid]
        self.each = self.tile[self.of]
        point = self.calibration.thresholds[ratio]
        self.cut = point.logit
        self.grid = nearest(run.evidence[split].thresholds, point.raw_threshold)

    def weigh(self, w):
        "Count each pixel of a negative tile w times"
        self.each = np.where(self.positive, 1., w)[self.of]

    def average_precision(self, keep=slice(None)):
        return average_precision_score(self.y[keep], self.s[keep], sample_weight=self.each[keep])

    def pixels(self, cut, keep=slice(None)):
        "Metrics of pixels with a score of at least `cut`"
        predicted = self.s[keep] >= cut
        return {name: f(self.y[keep], predicted, sample_weight=self.each[keep]) for name, f in SCORES.items()}

    def objects(self, threshold, iou=.3, floor=0):
        "True positives, false positives and false negatives of each tile, at an uncalibrated probability"
        pairs = zip(self.z, self.masks, strict=True)
        return np.array([match_by_hand(expit(z), mask, threshold - 1e-9, iou, floor) for z, mask in pairs])

def connected(mask, floor):
    "Masks of the 8-connected objects with at least `floor` pixels"
    labels, n = ndimage.label(mask, np.ones((3, 3)))
    return [labels == i for i in range(1, n + 1) if (labels == i).sum() >= floor]

def match_by_hand(probability, mask, cut, iou, floor=0):
    "Guide 6.2, the five steps: true positives, false positives, false negatives"
    probability = np.where(mask == 255, 0, probability)
    predicted, true = connected(probability >= cut, floor), connected(mask == 1, floor)
    taken = set()
    for p in sorted(predicted, key=lambda p: -probability[p].mean()):
        overlaps = [np.sum(p & t) / np.sum(p | t) for t in true]
        if not overlaps:
            continue
        best = int(np.argmax(overlaps))
        if overlaps[best] >= iou and overlaps[best] > 0 and best not in taken:
            taken.add(best)
    return len(taken), len(predicted) - len(taken), len(true) - len(taken)

def band(mask, valid, width):
    "Pixels of a mask that are within `width` of a valid pixel outside it"
    if not (valid & ~mask).any():
        return np.zeros_like(mask)
    return mask & (ndimage.distance_transform_edt(mask | ~valid) <= width)

def band_iou(split, width):
    "Boundary IoU (Cheng et al. 2021) by Euclidean distances to the background"
    intersection = union = 0
    for w, z, mask in zip(split.tile, split.z, split.masks, strict=True):
        valid = mask != 255
        predicted = band((expit(z) >= split.grid) & valid, valid, width)
        true = band(mask == 1, valid, width)
        intersection += w * (predicted & true).sum()
        union += w * (predicted | true).sum()
    return intersection / union
