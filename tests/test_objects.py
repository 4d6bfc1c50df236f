"Objects, their matching and what is read from it, against SciPy, scikit-image and loops, on inputs that hypothesis makes up"
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from scipy.special import expit
from skimage.measure import label, regionprops

from rtsseg.evidence import Evidence, tile_evidence
from rtsseg.metrics import rates, tile_weights
from rtsseg.shapes import label_objects, tile_objects
from rtsseg.objects import (
    MISS_KINDS, SIZE_CLASSES, false_alarms, grid_counts, match_objects, misses, object_grid, object_metrics, recall_by_size
)
from test_metrics import THRESHOLDS, make, quick, row, seeds, tile

IOUS, FLOORS = st.sampled_from([0.1, 0.3, 0.5]), st.sampled_from([0, 3])
masks = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(lambda shape: arrays(bool, shape))

@settings(max_examples=300, deadline=None)
@given(masks)
def test_components_are_scikit_images(mask):
    "The same numbers too, by their first pixels; several masks at once are each alone"
    (height, width), both = mask.shape, [mask, ~mask, mask]
    runs, found = label_objects([np.flatnonzero(m) for m in both], mask.shape)
    for k, m in enumerate(both):
        ours, theirs = np.zeros(m.shape, int), label(m, connectivity=2); props, here = regionprops(theirs), found['mask'] == k
        for at, y, left, right, i in zip(*(runs[k] for k in ('mask', 'y', 'left', 'right', 'object'))):
            if at == k: ours[y, left:right] = found['id'][i]
        assert (ours == theirs).all() and found['id'][here].tolist() == [p.label for p in props] and found['area'][here].tolist() == [p.num_pixels for p in props]
        assert found['edge'][here].tolist() == [p.bbox[0] == 0 or p.bbox[1] == 0 or p.bbox[2] == height or p.bbox[3] == width for p in props]

@quick
@given(masks)
def test_size_is_that_of_a_smallest_rectangle(mask):
    "Over all rectangles along an edge of the hull, one of the smallest has our longest side"
    from scipy.spatial import ConvexHull
    found = label_objects([np.flatnonzero(mask)], mask.shape)[1]
    for p, size in zip(regionprops(label(mask, connectivity=2)), found['size']):
        corners = np.concatenate([p.coords + d for d in ((0, 0), (0, 1), (1, 0), (1, 1))]).astype(float)
        hull = corners[ConvexHull(corners).vertices]
        along = np.diff(hull, axis=0, append=hull[:1]); along /= np.linalg.norm(along, axis=1)[:, None]
        sides = np.stack([np.ptp(hull @ along.T, axis=0), np.ptp(hull @ np.stack([-along[:, 1], along[:, 0]]), axis=0)])
        area = sides.prod(0); smallest = sides.max(0)[area < area.min() + 1e-3]
        assert abs(smallest - size).min() < 1e-4 * size

@quick
@given(seeds, IOUS, FLOORS, st.sampled_from(THRESHOLDS))
def test_objects_are_the_five_steps(seeds, iou, floor, threshold):
    e = make(seeds); m = match_objects(e, threshold, iou, floor)
    for i, s in enumerate(seeds):
        logits, mask = tile(s); probability = expit(logits.astype(float))
        blobs = lambda x: [b for lab, n in [ndimage.label(x, np.ones((3, 3)))] for b in (lab == k for k in range(1, n + 1)) if b.sum() >= floor]
        predicted, true, taken = blobs((probability >= threshold) & (mask != 255)), blobs(mask == 1), set()
        for p in sorted(predicted, key=lambda p: -probability[p].mean()):
            overlap = [(p & t).sum() / (p | t).sum() for t in true]
            if true and max(overlap) >= iou and (best := int(np.argmax(overlap))) not in taken: taken.add(best)
        assert (m.tp[i], m.fp[i], m.fn[i]) == (len(taken), len(predicted) - len(taken), len(true) - len(taken))
        on_edge = lambda b: bool(np.pad(b[1:-1, 1:-1], 1).sum() < b.sum())
        assert sum(on_edge(p) for p in predicted) == m.edge['tp'][i] + m.edge['fp'][i]

@quick
@given(st.integers(0, 10_000), st.sampled_from(['float16', (-6., 6.)]), st.sampled_from([np.float16, np.float32]))
def test_overlaps_and_scores_are_those_of_the_pixels(seed, bins, dtype):
    logits, mask = tile(seed); logits = logits.astype(dtype); found = tile_objects(logits, mask, THRESHOLDS, bins)
    true, predicted, pairs = label(mask == 1, connectivity=2), found['predicted'], found['pairs']
    for t in THRESHOLDS:
        p = label((expit(logits.astype(float)) >= t) & (mask != 255), connectivity=2); props = regionprops(p, expit(logits.astype(float)))
        at, pair = predicted['threshold'] == t, pairs['threshold'] == t; area, score = predicted['area'][at], predicted['score'][at]
        assert predicted['id'][at].tolist() == list(range(1, len(props) + 1)) and (np.diff(score) <= 0).all()                    # the most confident first
        assert sorted(area) == sorted(x.num_pixels for x in props) and sorted(score) == pytest.approx(sorted(x.intensity_mean for x in props), abs=2e-3)
        both = (p > 0) & (true > 0); (i, j), n = np.unique(np.stack([p[both], true[both]]), axis=1, return_counts=True)
        assert sorted(zip(np.bincount(p.ravel())[i], j, n)) == sorted(zip(area[pairs['predicted'][pair] - 1], pairs['truth'][pair], pairs['intersection'][pair]))

@quick
@given(seeds)
def test_scores_are_rounded_but_their_order_is_not(seeds):
    "Two predictions on one slump, closer to each other than the rounding: the more confident one is the match, wherever it lies"
    for s in seeds:
        high = np.random.default_rng(s).permutation([2, 2 + 2 ** -9]); logits = np.full((3, 9), -5, np.float16); logits[1, 1:4], logits[1, 5:8] = high
        mask = np.zeros((3, 9), np.uint8); mask[1, 1:8] = 1
        e = Evidence.from_rows([row(0, 1) | tile_evidence(logits, mask)]); scores = e.nested('predicted').score
        assert scores[0] == scores[1] and match_objects(e).truth.match.tolist() == [1] and e.nested('pairs').intersection.tolist() == [3, 3]
        runs = tile_objects(logits, np.where(np.arange(9) < 4, mask, 0), (0.5,))
        assert runs['pairs']['predicted'].tolist() == [1 + int(high[0] < high[1])]                 # the left one's number

def test_a_score_that_is_no_number_is_no_object_and_the_lowest_threshold_takes_all_others():
    logits = np.array([[np.nan, -np.inf, -60000, 0, np.inf]], np.float16); mask = np.zeros((1, 5), np.uint8)
    areas = {t: tile_objects(logits, mask, (t,))['predicted']['area'].tolist() for t in (0, 0.5, 1)}
    assert areas == {0: [4], 0.5: [2], 1: [1]}
    assert tile_objects(logits, np.full((1, 5), 255, np.uint8), (0,))['predicted']['area'].tolist() == []

@quick
@given(seeds, IOUS, st.lists(st.sampled_from([0, 2, 3, 8, 40]), min_size=1, max_size=3, unique=True), st.sampled_from(['native', 1, 200]))
def test_the_grid_is_match_in_every_cell(seeds, iou, floors, ratio):
    e = make(seeds); grid, counts = object_grid(e, ratio, iou, floors), grid_counts(e, iou, floors)
    assert counts.shape == (len(THRESHOLDS) * len(floors), len(e), 3) and len(grid) == len(counts)
    for (_, x), n in zip(grid.iterrows(), counts):
        m, one = match_objects(e, x.threshold, iou, x.min_area), object_metrics(e, ratio, x.threshold, iou, x.min_area)
        assert np.array_equal(n, np.stack([m.tp, m.fp, m.fn], 1))
        assert all(np.array_equal(x[k], one[k], equal_nan=True) for k in ('tp', 'fp', 'fn', 'precision', 'recall', 'f1'))
        negative = ~e['positive']
        assert (x.fp_positive, x.fp_negative, x.support) == (m.fp[~negative].sum(), m.fp[negative].sum(), (m.fp[negative] > 0).sum())
    assert [(x.threshold, x.min_area) for x in grid.itertuples()] == [(t, a) for t in e.thresholds for a in floors]
    assert object_grid(e, ratio, iou, floors, [0.79]).equals(grid[grid.threshold == 0.8].reset_index(drop=True))

@quick
@given(seeds, IOUS, FLOORS, st.sampled_from(THRESHOLDS))
def test_misses_are_told_apart_by_pixels(seeds, iou, floor, threshold):
    e = make(seeds); found = misses(e, threshold, iou, floor); m = match_objects(e, threshold, iou, floor); rows = iter(found.itertuples())
    for i, s in enumerate(seeds):
        logits, mask = tile(s); true = [ndimage.label(mask == 1, np.ones((3, 3)))[0] == k for k in m.truth.id[m.truth.tile == i]]
        lab, n = ndimage.label((expit(logits.astype(float)) >= threshold) & (mask != 255), np.ones((3, 3)))
        every = sorted((lab == k for k in range(1, n + 1)), key=lambda p: -expit(logits.astype(float))[p].mean()); large = [p for p in every if p.sum() >= floor]
        fits = lambda p, t: (p & t).sum() / (p | t).sum()
        for t, matched in zip(true, m.truth.match[m.truth.tile == i]):
            if matched: continue
            x = next(rows); seen = [p for p in large if (p & t).any()]; best = max(seen, key=lambda p: fits(p, t), default=None)
            first = lambda p: true[int(np.argmax([fits(p, g) for g in true]))]
            own = [p for p in seen if first(p) is t]
            if not any((p & t).any() for p in every): kind = 'unseen'
            elif sum((p & t).sum() for p in seen) < iou * t.sum(): kind = 'too small'
            elif first(best) is not t: kind = 'merged'
            elif fits(np.any(own, axis=0), t) >= iou: kind = 'split'
            else: kind = 'shifted'
            assert (x.tile_id, x.kind, x.area) == (f't{i:03}', kind, t.sum()) and x.iou == pytest.approx(fits(best, t) if seen else 0)
    assert next(rows, None) is None

def test_every_kind_of_miss_occurs_in_these_tests():
    assert set(misses(make(range(400)), 0.5, 0.5).kind) == set(MISS_KINDS)

@quick
@given(seeds, IOUS, FLOORS, st.sampled_from(THRESHOLDS))
def test_false_alarms_and_sizes_add_up(seeds, iou, floor, threshold):
    e = make(seeds); m = match_objects(e, threshold, iou, floor); false = false_alarms(e, threshold, iou, floor); sizes = recall_by_size(e, threshold, iou, floor)
    assert false.groupby('tile_id').size().reindex(e['tile_id'], fill_value=0).tolist() == m.fp.tolist() and (false.area >= floor).all()
    assert (false.positive == false.tile_id.map(dict(zip(e['tile_id'], e['positive'])))).all()
    assert (sizes.found.sum(), sizes.objects.sum()) == (m.tp.sum(), m.tp.sum() + m.fn.sum()) and sizes.edge.sum() == m.truth.edge.sum()
    metres = 3 * m.truth['size']                                                           # the pixel size of these tiles
    assert sizes.objects.tolist() == [((metres >= low) & (metres < high)).sum() for low, high in SIZE_CLASSES.values()]

def test_an_object_without_a_pixel_size_is_of_unknown_size():
    e = Evidence.from_rows([row(i, s, pixel_size=[3., float('nan')][i % 2]) for i, s in enumerate(range(1, 9))], thresholds=THRESHOLDS)
    sizes, truth = recall_by_size(e), e.nested('truth')
    assert sizes.objects['unknown'] == (truth.tile % 2 == 1).sum() > 0 and sizes.objects.sum() == len(truth)
    assert 'unknown' not in recall_by_size(e.select(np.arange(0, 8, 2))).index and misses(e)['size'].isna().any()

@quick
@given(seeds, st.randoms(use_true_random=False), IOUS)
def test_the_order_of_tiles_does_not_matter(seeds, random, iou):
    rows = [row(i, s) for i, s in enumerate(seeds)]; order = rows[:]; random.shuffle(order)
    a, b = (Evidence.from_rows(r, thresholds=THRESHOLDS) for r in (rows, order))
    assert object_grid(a, 200, iou, (0, 3)).equals(object_grid(b, 200, iou, (0, 3))) and misses(a, iou=iou).equals(misses(b, iou=iou)) and false_alarms(a).equals(false_alarms(b))

@quick
@given(seeds, st.integers(1, 1000))
def test_a_ratio_weighs_false_objects_of_negative_tiles_and_nothing_else(seeds, r):
    e = make(seeds); native, grid = object_grid(e, min_areas=(0, 3)), object_grid(e, r, min_areas=(0, 3)); negative = tile_weights(e, r)[~e['positive']]
    w = negative[0] if len(negative) else 1
    assert native.tp.equals(grid.tp) and native.fn.equals(grid.fn) and native.recall.equals(grid.recall)
    assert grid.fp.to_numpy() == pytest.approx((grid.fp_positive + w * grid.fp_negative).to_numpy())
    assert np.allclose(grid.precision, rates(grid.tp, grid.fp, grid.fn)['precision'], equal_nan=True)

def test_nothing_predicted_and_nothing_true():
    nothing = tile_evidence(np.full((4, 4), -9, np.float16), np.zeros((4, 4), np.uint8), THRESHOLDS)
    for e in (Evidence.from_rows([], thresholds=THRESHOLDS), Evidence.from_rows([row(0, 1) | nothing | dict(positive=False)], thresholds=THRESHOLDS)):
        grid = object_grid(e, 200, 0.3, (0, 5))
        assert len(grid) == 6 and (grid[['tp', 'fp', 'fn', 'support']] == 0).all(axis=None) and grid[['precision', 'recall', 'f1']].isna().all(axis=None)
        assert len(misses(e)) == len(false_alarms(e)) == 0 and recall_by_size(e).objects.sum() == 0 and recall_by_size(e).recall.isna().all()
    with pytest.raises(ValueError, match='without thresholds'): misses(Evidence.from_rows([], thresholds=()))
