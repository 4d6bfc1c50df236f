"Segmenters that stand in for SAM"
import numpy as np

from rtsseg.class_tiles import read_pair

class KnowsTruth:
    "Gives, for an image of some land, the true class that most positive points lie in"

    def __init__(self, samples, values):
        pairs = [read_pair(samples, row, values) for row in range(len(samples))]
        self.truth = {pair.image.tobytes(): pair.mask for pair in pairs}

    def refine(self, image, points, labels):
        truth = self.truth[image.tobytes()]
        columns, rows = points[labels == 1].astype(int).T
        return truth == np.bincount(truth[rows, columns]).argmax()

class FindsNothing:
    "Every object loses its outline"

    def refine(self, image, points, labels):
        return np.zeros(image.shape[:2], bool)
