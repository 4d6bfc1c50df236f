"Boundary IoU against its definition written plainly, and many classes against scikit-learn and torchmetrics"
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy import ndimage
from scipy.special import expit
from sklearn.metrics import confusion_matrix, jaccard_score
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

from rtsseg.evidence import Evidence, tile_evidence
from rtsseg.metrics import boundary_counts, boundary_metrics, class_iou, confusion, mean_iou
from rtsseg.shapes import boundary_iou, tile_bands

quick = settings(max_examples=40, deadline=None)

def band(mask, valid, width):
    "Pixels of the mask that have a valid background pixel within the width: one distance after the other"
    rim, ground, there = np.zeros_like(mask), np.argwhere(valid & ~mask), np.argwhere(valid & mask)
    for y, x in there: rim[y, x] = len(ground) > 0 and (np.hypot(*(ground - [y, x]).T) <= width).any()
    return rim

def iou(a, b): return (a & b).sum() / (a | b).sum() if (a | b).any() else np.nan

def blobs(seed, side=18):
    rng = np.random.default_rng(seed)
    make = lambda: ndimage.gaussian_filter(rng.normal(size=(side, side + 3)), 1.5) > rng.uniform(-.2, .3)
    return make(), make(), rng.random((side, side + 3)) >= rng.choice([0, .1, .5])

@quick
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 3, 5]))
def test_boundary_iou_is_its_definition(seed, width):
    p, g, valid = blobs(seed)
    assert boundary_iou(p, g, [width], valid)[width] == pytest.approx(iou(band(p, valid, width), band(g, valid, width)), nan_ok=True)

@quick
@given(st.integers(0, 10_000))
def test_boundary_iou_beside_erosion(seed):
    "The reference erodes a padded mask by a square, so the tile's edge is an outline: inside a wall of background it is ours, but for the disc"
    p, g, _ = (np.pad(m, 4) for m in blobs(seed))
    for d, disc in {1: ndimage.generate_binary_structure(2, 1), 2: np.hypot(*np.ogrid[-2:3, -2:3]) <= 2, 3: np.hypot(*np.ogrid[-3:4, -3:4]) <= 3}.items():
        rim = lambda m: m & ~ndimage.binary_erosion(m, disc)
        distance = lambda m: m & (ndimage.distance_transform_edt(m) <= d)
        ours = boundary_iou(p, g, [d])[d]
        assert ours == pytest.approx(iou(rim(p), rim(g)), nan_ok=True) and ours == pytest.approx(iou(distance(p), distance(g)), nan_ok=True)

def test_no_boundary_where_nothing_is_known():
    whole, half = np.ones((9, 9), bool), np.zeros((9, 9), bool); half[:, :5] = True
    assert np.isnan(boundary_iou(whole, whole)[2])                                        # the tile's edge is none
    assert np.isnan(boundary_iou(half, half, valid=half)[2])                              # nor is that of ignored pixels
    assert boundary_iou(half, half)[2] == 1 and boundary_iou(half, whole)[2] == 0

THRESHOLDS = (.2, .35, .5, .9)
def tile(seed):
    p, g, valid = blobs(seed); rng = np.random.default_rng([seed, 1])
    mask = np.where(valid, g if seed % 4 else False, 255).astype(np.uint8)
    return (4 * ndimage.gaussian_filter(g + rng.normal(size=g.shape) - .5, 1)).astype([np.float16, np.float32][seed % 2]), mask

@quick
@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=4), st.sampled_from(['native', 1, 50]), st.sampled_from(THRESHOLDS), st.sampled_from([(2, 3), (1,)]))
def test_evidence_holds_the_boundaries_of_every_threshold(seeds, ratio, threshold, widths):
    identity = lambda i, m: dict(tile_id=f't{i}', split='val', region='', block='', positive=bool((m == 1).any()), pixel_size=3.)
    tiles = [tile(s) for s in seeds]
    e = Evidence.from_rows([identity(i, m) | tile_evidence(*t, THRESHOLDS, widths=widths) for i, t in enumerate(tiles) for m in [t[1]]], thresholds=THRESHOLDS)
    positive = e['positive']; w = 1 if ratio == 'native' or positive.all() else ratio * positive.sum() / (~positive).sum()
    if not (positive.any() or len(e.nested('bands'))): return
    for d in widths:
        both = either = 0
        for (z, m), p in zip(tiles, positive):
            valid = m != 255; a, b = band((expit(z.astype(np.float16).astype(float)) >= threshold) & valid, valid, d), band(m == 1, valid, d)
            both += (a & b).sum() * (1 if p else w); either += (a | b).sum() * (1 if p else w)
        assert boundary_metrics(e, ratio, threshold)[d] == pytest.approx(both / either if either else np.nan, nan_ok=True)
        assert boundary_counts(e, threshold)[d].shape == (len(seeds), 3)

def test_bands_of_little():
    nothing = tile_bands(np.full((8, 8), -9.), np.zeros((8, 8), np.uint8), THRESHOLDS)['bands']
    assert all(len(v) == 0 for v in nothing.values())
    missed = tile_bands(np.full((8, 8), -9.), np.eye(8, dtype=np.uint8), THRESHOLDS)['bands']
    assert sorted(set(zip(missed['threshold'], missed['width']))) == [(t, d) for t in THRESHOLDS for d in (2, 3)] and set(missed['truth']) == {8} and not missed['predicted'].any()
    no_number = tile_bands(np.full((8, 8), np.nan), np.eye(8, dtype=np.uint8), THRESHOLDS)['bands']
    assert not no_number['predicted'].any()
    assert all(len(v) == 0 for v in tile_bands(np.zeros((8, 8)), np.eye(8, dtype=np.uint8), ())['bands'].values())
    empty = Evidence.from_rows([], thresholds=THRESHOLDS)
    assert {d: np.isnan(v) for d, v in boundary_metrics(empty).items()} == {2: True, 3: True}

@quick
@given(st.integers(0, 10_000), st.integers(2, 7), st.sampled_from([255, -1, 0]))
def test_classes_are_sklearns_and_torchmetrics(seed, classes, ignore):
    rng = np.random.default_rng(seed)
    used = rng.choice(classes, rng.integers(1, classes + 1), replace=False)               # some classes are nowhere
    target, guess = rng.choice(used, (3, 9, 9)), rng.choice(used, (3, 9, 9))
    target[rng.random(target.shape) < .3] = ignore
    valid = target != ignore; table = confusion(guess, target, classes, ignore)
    if not valid.any():
        assert table.sum() == 0 and np.isnan(mean_iou(table)); return
    assert table.dtype == np.int64 and (table == confusion_matrix(target[valid], guess[valid], labels=range(classes))).all()
    assert (table == MulticlassConfusionMatrix(classes, ignore_index=ignore)(torch.tensor(guess), torch.tensor(target)).numpy()).all()
    assert (sum(confusion(g, t, classes, ignore) for g, t in zip(guess, target)) == table).all()
    present = np.flatnonzero(table.sum(0) + table.sum(1))
    each = jaccard_score(target[valid], guess[valid], labels=range(classes), average=None, zero_division=0)
    assert class_iou(table)[present] == pytest.approx(each[present]) and np.isnan(np.delete(class_iou(table), present)).all()
    assert mean_iou(table) == pytest.approx(each[present].mean())
    if ignore not in range(classes):                                                      # torchmetrics leaves an ignored class out of the mean, even where it was predicted
        assert mean_iou(table) == pytest.approx(float(MulticlassJaccardIndex(classes, average='macro', ignore_index=ignore)(torch.tensor(guess), torch.tensor(target))), abs=1e-6)

def test_labels_that_are_no_class_are_refused():
    assert confusion(torch.tensor([[1, 0]]), torch.tensor([[1, 255]]), 2).tolist() == [[0, 0], [0, 1]]
    assert confusion([9], [255], 2).sum() == 0                                            # what is predicted on an ignored pixel is of no matter
    assert np.isnan(mean_iou(confusion([0], [255], 2)))
    for prediction, target, word in (([2], [0], 'prediction holds 2'), ([0], [2], 'target holds 2'), ([0], [-1], 'target holds -1'), ([[0.1, 0.9]], [1], 'differ in shape')):
        with pytest.raises(ValueError, match=word): confusion(prediction, target, 2)
