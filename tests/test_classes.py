"Boundary IoU against its definition written plainly, and many classes against scikit-learn and torchmetrics"
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.special import expit
from sklearn.metrics import confusion_matrix, jaccard_score
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

from rtsseg.evidence import Evidence, tile_evidence
from rtsseg.metrics import boundary_counts, boundary_metrics, class_iou, confusion, mean_iou
from rtsseg.shapes import boundary_iou, tile_bands

THRESHOLDS = (.2, .35, .5, .9)
quick = settings(max_examples=40, deadline=None)
any_seed = st.integers(0, 10_000)


def slow_band(mask, valid, width):
    "Pixels of the mask that have a valid background pixel within the width: one distance after the other"
    band = np.zeros_like(mask)
    background = np.argwhere(valid & ~mask)
    for y, x in np.argwhere(valid & mask):
        distances = np.hypot(*(background - [y, x]).T)
        band[y, x] = (distances <= width).any()
    return band


def iou_of(a, b):
    return (a & b).sum() / (a | b).sum() if (a | b).any() else np.nan


def blobs(seed, side=18):
    "Two masks and the pixels that count"
    rng = np.random.default_rng(seed)
    shape = side, side + 3
    one, other = (ndimage.gaussian_filter(rng.normal(size=shape), 1.5) > rng.uniform(-.2, .3) for _ in range(2))
    return one, other, rng.random(shape) >= rng.choice([0, .1, .5])


# ------------------------------------------------ boundaries of two masks

@quick
@given(any_seed, st.sampled_from([1, 2, 3, 5]))
def test_boundary_iou_is_its_definition(seed, width):
    predicted, true, valid = blobs(seed)
    expected = iou_of(slow_band(predicted, valid, width), slow_band(true, valid, width))
    assert boundary_iou(predicted, true, [width], valid)[width] == pytest.approx(expected, nan_ok=True)


@quick
@given(any_seed, st.sampled_from([1, 2, 3]))
def test_boundary_iou_beside_erosion(seed, width):
    """The reference erodes a padded mask by a square, so the tile's edge is an outline

    Inside a wall of background ours is the same, but for the disc in place of the square."""
    predicted, true, _ = (np.pad(mask, 4) for mask in blobs(seed))
    disc = np.hypot(*np.ogrid[-width:width + 1, -width:width + 1]) <= width

    def eroded(mask):
        return mask & ~ndimage.binary_erosion(mask, disc)

    def near(mask):
        return mask & (ndimage.distance_transform_edt(mask) <= width)

    ours = boundary_iou(predicted, true, [width])[width]
    for band in (eroded, near):
        assert ours == pytest.approx(iou_of(band(predicted), band(true)), nan_ok=True)


def test_no_boundary_where_nothing_is_known():
    whole, half = np.ones((9, 9), bool), np.zeros((9, 9), bool)
    half[:, :5] = True
    assert np.isnan(boundary_iou(whole, whole)[2]), 'the edge of the tile is not an outline'
    assert np.isnan(boundary_iou(half, half, valid=half)[2]), 'nor is that of ignored pixels'
    assert boundary_iou(half, half)[2] == 1
    assert boundary_iou(half, whole)[2] == 0


# ------------------------------------------------ boundaries of evidence

def make_tile(seed):
    _, true, valid = blobs(seed)
    mask = np.where(valid, true if seed % 4 else False, 255).astype(np.uint8)
    noise = np.random.default_rng([seed, 1]).normal(size=true.shape)
    logits = 4 * ndimage.gaussian_filter(true + noise - .5, 1)
    return logits.astype([np.float16, np.float32][seed % 2]), mask


def make_row(i, tile, widths):
    logits, mask = tile
    identity = dict(tile_id=f't{i}', split='val', region='', block='', pixel_size=3.)
    positive = bool((mask == 1).any())
    return identity | dict(positive=positive) | tile_evidence(logits, mask, THRESHOLDS, widths=widths)


@quick
@given(
    st.lists(any_seed, min_size=1, max_size=4),
    st.sampled_from(['native', 1, 50]),
    st.sampled_from(THRESHOLDS),
    st.sampled_from([(2, 3), (1,)])
)
def test_evidence_holds_the_boundaries_of_every_threshold(seeds, ratio, threshold, widths):
    tiles = [make_tile(seed) for seed in seeds]
    rows = [make_row(i, tile, widths) for i, tile in enumerate(tiles)]
    # one tile with a slump and a prediction, so that there is a boundary
    slump = np.pad(np.ones((6, 6), np.uint8), 4)
    tiles.append((np.where(slump, 9, -9).astype(np.float16), slump))
    rows.append(make_row(len(rows), tiles[-1], widths))
    evidence = Evidence.from_rows(rows, thresholds=THRESHOLDS)
    positive = evidence['positive']
    w = 1 if ratio == 'native' or positive.all() else ratio * positive.sum() / (~positive).sum()
    for width in widths:
        both = either = 0
        for (logits, mask), is_positive in zip(tiles, positive):
            valid = mask != 255
            # scores are rounded to half precision
            predicted = (expit(logits.astype(np.float16).astype(float)) >= threshold) & valid
            a, b = slow_band(predicted, valid, width), slow_band(mask == 1, valid, width)
            weight = 1 if is_positive else w
            both += (a & b).sum() * weight
            either += (a | b).sum() * weight
        assert boundary_metrics(evidence, ratio, threshold)[width] == pytest.approx(both / either)
        assert boundary_counts(evidence, threshold)[width].shape == (len(tiles), 3)


def rows_of(bands):
    return list(zip(*bands.values()))


def test_bands_of_little():
    "No prediction, a missed slump, scores that are NaN, no threshold"
    low, slump = np.full((8, 8), -9.), np.eye(8, dtype=np.uint8)
    assert rows_of(tile_bands(low, np.zeros((8, 8), np.uint8), THRESHOLDS)['bands']) == []
    assert rows_of(tile_bands(np.zeros((8, 8)), slump, ())['bands']) == []

    missed = tile_bands(low, slump, THRESHOLDS)['bands']
    cells = sorted(set(zip(missed['threshold'], missed['width'])))
    assert cells == [(threshold, width) for threshold in THRESHOLDS for width in (2, 3)]
    assert set(missed['truth']) == {8}
    assert not missed['predicted'].any()

    not_a_number = tile_bands(np.full((8, 8), np.nan), slump, THRESHOLDS)['bands']
    assert not not_a_number['predicted'].any()


def test_boundaries_of_no_evidence():
    found = boundary_metrics(Evidence.from_rows([], thresholds=THRESHOLDS))
    assert list(found) == [2, 3]
    assert np.isnan(list(found.values())).all()


# ------------------------------------------------ many classes

def labels(seed, classes, ignore):
    "Target and prediction; some classes are nowhere"
    rng = np.random.default_rng(seed)
    used = rng.choice(classes, rng.integers(1, classes + 1), replace=False)
    target, predicted = rng.choice(used, (2, 3, 9, 9))
    target[rng.random(target.shape) < .3] = ignore
    return target, predicted


@quick
@given(any_seed, st.integers(2, 7), st.sampled_from([255, -1, 0]))
def test_classes_are_sklearns_and_torchmetrics(seed, classes, ignore):
    target, predicted = labels(seed, classes, ignore)
    valid = target != ignore
    counts = confusion(predicted, target, classes, ignore)
    if not valid.any():
        assert counts.sum() == 0 and np.isnan(mean_iou(counts))
        return
    assert counts.dtype == np.int64
    assert (counts == confusion_matrix(target[valid], predicted[valid], labels=range(classes))).all()
    torch_labels = torch.tensor(predicted), torch.tensor(target)
    assert (counts == MulticlassConfusionMatrix(classes, ignore_index=ignore)(*torch_labels).numpy()).all()
    assert (counts == sum(confusion(p, t, classes, ignore) for p, t in zip(predicted, target))).all(), 'batches add up'

    present = np.flatnonzero(counts.sum(0) + counts.sum(1))
    each = jaccard_score(target[valid], predicted[valid], labels=range(classes), average=None, zero_division=0)
    assert class_iou(counts)[present] == pytest.approx(each[present])
    assert np.isnan(np.delete(class_iou(counts), present)).all()
    assert mean_iou(counts) == pytest.approx(each[present].mean())
    if ignore not in range(classes):
        # torchmetrics leaves an ignored class out of the mean, even where it was predicted
        theirs = MulticlassJaccardIndex(classes, average='macro', ignore_index=ignore)(*torch_labels)
        assert mean_iou(counts) == pytest.approx(float(theirs), abs=1e-6)


def test_ignored_pixels_are_in_no_cell():
    counts = confusion(torch.tensor([[1, 0]]), torch.tensor([[1, 255]]), 2)
    assert counts.tolist() == [[0, 0], [0, 1]]
    assert confusion([9], [255], 2).sum() == 0, 'what is predicted on an ignored pixel does not matter'
    assert np.isnan(mean_iou(confusion([0], [255], 2)))


@pytest.mark.parametrize('prediction, target, word', [
    ([2], [0], 'prediction holds 2'),
    ([0], [2], 'target holds 2'),
    ([0], [-1], 'target holds -1'),
    ([[0.1, 0.9]], [1], 'differ in shape'),
])
def test_labels_that_are_no_class_are_refused(prediction, target, word):
    with pytest.raises(ValueError, match=word):
        confusion(prediction, target, 2)
