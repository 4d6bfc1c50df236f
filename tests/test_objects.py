"Objects: matched by hand and by brute force, on any masks"
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial import ConvexHull
from scipy.special import expit
from skimage.measure import label, regionprops

from helpers.evidence import THRESHOLDS, components, evidence_of, make_evidence, make_row, make_tile, quick, seeds
from rtsseg.evidence import Evidence, tile_evidence
from rtsseg.metrics import rates, tile_weights
from rtsseg.objects import (
    MISS_KINDS,
    SIZE_CLASSES,
    false_alarms,
    found_slumps,
    grid_counts,
    informative_tiles,
    match_objects,
    misses,
    object_grid,
    object_metrics,
    recall_by_size,
    slump_bounds,
)
from rtsseg.shapes import label_objects, tile_objects

ious = st.sampled_from([0.1, 0.3, 0.5])
floors = st.sampled_from([0, 3])
thresholds = st.sampled_from(THRESHOLDS)
masks = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(lambda shape: arrays(bool, shape))


def probability_of(logits):
    return expit(logits.astype(float))


def iou_of(a, b):
    return (a & b).sum() / (a | b).sum()


# ------------------------------------------------ components

def painted(runs, objects, number, shape):
    "Labels of one of the masks, from its runs"
    labels = np.zeros(shape, int)
    for mask, y, left, right, i in zip(*(runs[name] for name in ('mask', 'y', 'left', 'right', 'object'))):
        if mask == number:
            labels[y, left:right] = objects['id'][i]
    return labels


@settings(max_examples=300, deadline=None)
@given(masks)
def test_components_are_scikit_images(mask):
    "The same numbers too, by their first pixels; several masks at once are each alone"
    height, width = mask.shape
    several = [mask, ~mask, mask]
    runs, objects = label_objects([np.flatnonzero(m) for m in several], mask.shape)
    for number, m in enumerate(several):
        theirs = label(m, connectivity=2)
        regions = regionprops(theirs)
        assert (painted(runs, objects, number, m.shape) == theirs).all()
        here = objects['mask'] == number
        assert objects['id'][here].tolist() == [region.label for region in regions]
        assert objects['area'][here].tolist() == [region.num_pixels for region in regions]
        boxes = [region.bbox for region in regions]
        at_edge = [top == 0 or left == 0 or bottom == height or right == width for top, left, bottom, right in boxes]
        assert objects['edge'][here].tolist() == at_edge


@quick
@given(masks)
def test_size_is_that_of_a_smallest_rectangle(mask):
    "Over all rectangles along an edge of the hull, one of the smallest has our longest side"
    _, objects = label_objects([np.flatnonzero(mask)], mask.shape)
    regions = regionprops(label(mask, connectivity=2))
    for region, size in zip(regions, objects['size'], strict=True):
        corners = [region.coords + shift for shift in ((0, 0), (0, 1), (1, 0), (1, 1))]
        corners = np.concatenate(corners).astype(float)
        hull = corners[ConvexHull(corners).vertices]
        along = np.diff(hull, axis=0, append=hull[:1])
        along /= np.linalg.norm(along, axis=1)[:, None]
        across = np.stack([-along[:, 1], along[:, 0]], 1)
        sides = np.stack([np.ptp(hull @ direction.T, axis=0) for direction in (along, across)])
        area = sides.prod(0)
        longest = sides.max(0)[area < area.min() + 1e-3]
        assert abs(longest - size).min() < 1e-4 * size


# ------------------------------------------------ matching

def five_steps(predicted, true, probability, iou):
    "The guide's matching of two lists of masks: tp, fp, fn"
    taken = set()
    for one in sorted(predicted, key=lambda one: -probability[one].mean()):
        overlaps = [iou_of(one, other) for other in true]
        best = int(np.argmax(overlaps)) if true else None
        if true and overlaps[best] >= iou and best not in taken:
            taken.add(best)
    return len(taken), len(predicted) - len(taken), len(true) - len(taken)


def touches_edge(one):
    inner = np.pad(one[1:-1, 1:-1], 1)
    return bool(inner.sum() < one.sum())


@quick
@given(seeds, ious, floors, thresholds)
def test_objects_are_the_five_steps(seeds, iou, min_area, threshold):
    matches = match_objects(make_evidence(seeds), threshold, iou, min_area)
    for i, seed in enumerate(seeds):
        logits, mask = make_tile(seed)
        probability = probability_of(logits)
        predicted = components((probability >= threshold) & (mask != 255), min_area)
        true = components(mask == 1, min_area)
        assert (matches.tp[i], matches.fp[i], matches.fn[i]) == five_steps(predicted, true, probability, iou)
        at_edge = sum(touches_edge(one) for one in predicted)
        assert at_edge == matches.edge['tp'][i] + matches.edge['fp'][i]


@quick
@given(st.integers(0, 10_000), st.sampled_from(['float16', (-6., 6.)]), st.sampled_from([np.float16, np.float32]))
def test_overlaps_and_scores_are_those_of_the_pixels(seed, bins, dtype):
    logits, mask = make_tile(seed)
    logits = logits.astype(dtype)
    probability = probability_of(logits)
    found = tile_objects(logits, mask, THRESHOLDS, bins)
    predicted, pairs = found['predicted'], found['pairs']
    true = label(mask == 1, connectivity=2)
    for threshold in THRESHOLDS:
        labels = label((probability >= threshold) & (mask != 255), connectivity=2)
        regions = regionprops(labels, probability)
        here, pair = predicted['threshold'] == threshold, pairs['threshold'] == threshold
        area, score = predicted['area'][here], predicted['score'][here]
        assert predicted['id'][here].tolist() == list(range(1, len(regions) + 1))
        assert (np.diff(score) <= 0).all(), 'the most confident first'
        assert sorted(area) == sorted(region.num_pixels for region in regions)
        assert sorted(score) == pytest.approx(sorted(region.intensity_mean for region in regions), abs=2e-3)

        both = (labels > 0) & (true > 0)
        (i, j), shared = np.unique(np.stack([labels[both], true[both]]), axis=1, return_counts=True)
        # numbers of predictions differ, areas do not
        theirs = sorted(zip(np.bincount(labels.ravel())[i], j, shared))
        ours = sorted(zip(area[pairs['predicted'][pair] - 1], pairs['truth'][pair], pairs['intersection'][pair]))
        assert theirs == ours


@pytest.mark.parametrize('right_is_higher', [False, True])
def test_scores_are_rounded_but_their_order_is_not(right_is_higher):
    "Two predictions on one slump, closer than the rounding: the more confident one is the match, wherever it lies"
    low, high = 2, 2 + 2**-9
    logits = np.full((3, 9), -5, np.float16)
    logits[1, 1:4], logits[1, 5:8] = (low, high) if right_is_higher else (high, low)
    mask = np.zeros((3, 9), np.uint8)
    mask[1, 1:8] = 1
    evidence = Evidence.from_rows([make_row(0, 1) | tile_evidence(logits, mask)])
    scores = evidence.nested('predicted').score
    assert scores[0] == scores[1]
    assert match_objects(evidence).truth.match.tolist() == [1]
    assert evidence.nested('pairs').intersection.tolist() == [3, 3]
    only_left_is_true = tile_objects(logits, np.where(np.arange(9) < 4, mask, 0), (0.5,))
    assert only_left_is_true['pairs']['predicted'].tolist() == [1 + right_is_higher]


def test_scores_close_to_one_stay_apart():
    "Raw scores of a weighted loss: calibration still tells them apart"
    logits = np.full((3, 9), -5, np.float16)
    logits[1, 1:4], logits[1, 5:8] = 8, 11
    evidence = Evidence.from_rows([make_row(0, 1) | tile_evidence(logits, np.zeros((3, 9), np.uint8))])
    score = evidence.nested('predicted').score.astype(float)
    assert np.log(score / (1 - score)).tolist() == pytest.approx([11, 8], abs=.02)


def test_a_score_that_is_no_number_is_no_object_and_the_lowest_threshold_takes_all_others():
    logits = np.array([[np.nan, -np.inf, -60000, 0, np.inf]], np.float16)
    background, ignored = np.zeros((1, 5), np.uint8), np.full((1, 5), 255, np.uint8)
    for threshold, areas in {0: [4], 0.5: [2], 1: [1]}.items():
        assert tile_objects(logits, background, (threshold,))['predicted']['area'].tolist() == areas
    assert tile_objects(logits, ignored, (0,))['predicted']['area'].tolist() == []


# ------------------------------------------------ the grid

several_floors = st.lists(st.sampled_from([0, 2, 3, 8, 40]), min_size=1, max_size=3, unique=True)


@quick
@given(seeds, ious, several_floors, st.sampled_from(['native', 1, 200]))
def test_the_grid_is_match_in_every_cell(seeds, iou, floors, ratio):
    evidence = make_evidence(seeds)
    negative = ~evidence['positive']
    grid, counts = object_grid(evidence, ratio, iou, floors), grid_counts(evidence, iou, floors)
    assert counts.shape == (len(THRESHOLDS) * len(floors), len(evidence), 3)
    cells = [(row.threshold, row.min_area) for row in grid.itertuples()]
    assert cells == [(threshold, floor) for threshold in evidence.thresholds for floor in floors]
    for (_, row), count in zip(grid.iterrows(), counts, strict=True):
        matches = match_objects(evidence, row.threshold, iou, row.min_area)
        assert np.array_equal(count, np.stack([matches.tp, matches.fp, matches.fn], 1))
        single = object_metrics(evidence, ratio, row.threshold, iou, row.min_area)
        for name in ('tp', 'fp', 'fn', 'precision', 'recall', 'f1'):
            assert np.array_equal(row[name], single[name], equal_nan=True)
        assert row.fp_positive == matches.fp[~negative].sum()
        assert row.fp_negative == matches.fp[negative].sum()
        assert row.support == (matches.fp[negative] > 0).sum()
    near = object_grid(evidence, ratio, iou, floors, [0.79])
    assert near.equals(grid[grid.threshold == 0.8].reset_index(drop=True))


# ------------------------------------------------ misses and false alarms

def kind_of_miss(one, true, predicted, iou, min_area):
    "The kind of a missed object by its pixels, and the IoU of the prediction that fits it best"
    touching = [p for p in predicted if (p & one).any()]
    large = [p for p in touching if p.sum() >= min_area]
    best = max(large, key=lambda p: iou_of(p, one), default=None)
    best_iou = iou_of(best, one) if large else 0

    def chosen_by(p):
        return true[int(np.argmax([iou_of(p, other) for other in true]))]

    if not touching:
        return 'unseen', best_iou
    if sum((p & one).sum() for p in large) < iou * one.sum():
        return 'too small', best_iou
    if chosen_by(best) is not one:
        return 'merged', best_iou
    together = np.any([p for p in large if chosen_by(p) is one], axis=0)
    return ('split' if iou_of(together, one) >= iou else 'shifted'), best_iou


@quick
@given(seeds, ious, floors, thresholds)
def test_misses_are_told_apart_by_pixels(seeds, iou, min_area, threshold):
    evidence = make_evidence(seeds)
    truth = match_objects(evidence, threshold, iou, min_area).truth
    expected = []
    for i, seed in enumerate(seeds):
        logits, mask = make_tile(seed)
        probability = probability_of(logits)
        every_true = components(mask == 1)
        here = truth[truth.tile == i]
        true = [every_true[k - 1] for k in here.id]
        predicted = components((probability >= threshold) & (mask != 255))
        # the most confident one first: of equal fits it is the best
        predicted = sorted(predicted, key=lambda one: -probability[one].mean())
        for one, matched in zip(true, here.match):
            if not matched:
                expected.append((f't{i:03}', one.sum(), *kind_of_miss(one, true, predicted, iou, min_area)))
    found = misses(evidence, threshold, iou, min_area)
    for row, (tile, area, kind, best_iou) in zip(found.itertuples(), expected, strict=True):
        assert (row.tile_id, row.area, row.kind) == (tile, area, kind)
        assert row.iou == pytest.approx(best_iou)


def test_every_kind_of_miss_occurs_in_these_tests():
    assert set(misses(make_evidence(range(400)), 0.5, 0.5).kind) == set(MISS_KINDS)


@quick
@given(seeds, ious, floors, thresholds)
def test_false_alarms_and_sizes_add_up(seeds, iou, min_area, threshold):
    evidence = make_evidence(seeds)
    settings = threshold, iou, min_area
    matches, false, sizes = (f(evidence, *settings) for f in (match_objects, false_alarms, recall_by_size))
    by_tile = false.groupby('tile_id').size().reindex(evidence['tile_id'], fill_value=0)
    assert by_tile.tolist() == matches.fp.tolist()
    assert (false.area >= min_area).all()
    positive = dict(zip(evidence['tile_id'], evidence['positive']))
    assert (false.positive == false.tile_id.map(positive)).all()

    assert sizes.found.sum() == matches.tp.sum()
    assert sizes.objects.sum() == matches.tp.sum() + matches.fn.sum()
    assert sizes.edge.sum() == matches.truth.edge.sum()
    # the pixel size of these tiles is 3 m
    metres = 3 * matches.truth['size']
    expected = [((metres >= low) & (metres < high)).sum() for low, high in SIZE_CLASSES.values()]
    assert sizes.objects.tolist() == expected


def test_an_object_without_a_pixel_size_is_of_unknown_size():
    rows = [make_row(i, i + 1, pixel_size=[3., float('nan')][i % 2]) for i in range(8)]
    evidence = evidence_of(rows)
    sizes, truth = recall_by_size(evidence), evidence.nested('truth')
    assert sizes.objects['unknown'] == (truth.tile % 2 == 1).sum() > 0
    assert sizes.objects.sum() == len(truth)
    assert misses(evidence)['size'].isna().any()
    known = evidence.select(np.arange(0, 8, 2))
    assert 'unknown' not in recall_by_size(known).index


# ------------------------------------------------ informative tiles

@quick
@given(seeds, st.integers(1, 3))
def test_telling_tiles_are_told_again_by_those_that_were_kept(seeds, n):
    "Evaluation keeps the tiles of several thresholds; at each of these the kept ones alone give the same choice"
    def chosen(evidence, threshold):
        rows = informative_tiles(evidence, threshold, n)
        return {kind: list(evidence['tile_id'][row]) for kind, row in rows.items()}

    evidence = make_evidence(seeds)
    whole = {t: chosen(evidence, t) for t in THRESHOLDS}
    kept = {tile for kinds in whole.values() for tiles in kinds.values() for tile in tiles}
    part = evidence.select(np.isin(evidence['tile_id'], list(kept)))
    for t, kinds in whole.items():
        assert chosen(part, t) == kinds
        assert all(len(set(tiles)) == len(tiles) <= n for tiles in kinds.values())


# ------------------------------------------------ order, ratio, nothing

@quick
@given(seeds, st.randoms(use_true_random=False), ious)
def test_the_order_of_tiles_does_not_matter(seeds, random, iou):
    rows = [make_row(i, seed) for i, seed in enumerate(seeds)]
    shuffled = rows[:]
    random.shuffle(shuffled)
    a, b = evidence_of(rows), evidence_of(shuffled)
    assert object_grid(a, 200, iou, (0, 3)).equals(object_grid(b, 200, iou, (0, 3)))
    assert misses(a, iou=iou).equals(misses(b, iou=iou))
    assert false_alarms(a).equals(false_alarms(b))


@quick
@given(seeds, st.integers(1, 1000))
def test_a_ratio_weighs_false_objects_of_negative_tiles_and_nothing_else(seeds, ratio):
    evidence = make_evidence(seeds)
    native, grid = (object_grid(evidence, r, min_areas=(0, 3)) for r in ('native', ratio))
    for name in ('tp', 'fn', 'recall'):
        assert native[name].equals(grid[name])
    of_negative = tile_weights(evidence, ratio)[~evidence['positive']]
    w = of_negative[0] if len(of_negative) else 1
    assert grid.fp.to_numpy() == pytest.approx((grid.fp_positive + w * grid.fp_negative).to_numpy())
    assert np.allclose(grid.precision, rates(grid.tp, grid.fp, grid.fn)['precision'], equal_nan=True)


NOTHING = tile_evidence(np.full((4, 4), -9, np.float16), np.zeros((4, 4), np.uint8), THRESHOLDS)


@pytest.mark.parametrize('rows', [[], [make_row(0, 1) | NOTHING | dict(positive=False)]], ids=['no tile', 'empty tile'])
def test_nothing_predicted_and_nothing_true(rows):
    evidence = evidence_of(rows)
    grid = object_grid(evidence, 200, 0.3, (0, 5))
    assert len(grid) == 6
    assert (grid[['tp', 'fp', 'fn', 'support']] == 0).all(axis=None)
    assert grid[['precision', 'recall', 'f1']].isna().all(axis=None)
    assert len(misses(evidence)) == len(false_alarms(evidence)) == 0
    sizes = recall_by_size(evidence)
    assert sizes.objects.sum() == 0 and sizes.recall.isna().all()


def test_evidence_without_thresholds_has_no_objects():
    with pytest.raises(ValueError, match='without thresholds'):
        misses(evidence_of([], thresholds=()))


# ------------------------------------------------ slumps that lie in several tiles

def tile_of_pieces(pieces):
    "Logits and mask of squares in a row; a piece is found or not"
    mask = np.zeros((10, 10 * max(len(pieces), 1)), np.uint8)
    logits = np.full(mask.shape, -5, np.float16)
    for i, found in enumerate(pieces):
        place = np.s_[2:8, 10 * i + 2:10 * i + 8]
        mask[place] = 1
        logits[place] = 5 if found else -5
    return logits, mask


def slumps_of(world):
    "What `found_slumps` says of a world {tile: [(slump, whether this piece is found)]}"
    rows = []
    for tile, pieces in world.items():
        identity = dict(tile_id=tile, split='val', region='r', block=tile, positive=bool(pieces), pixel_size=3.)
        rows.append(identity | tile_evidence(*tile_of_pieces([found for _, found in pieces]), THRESHOLDS))
    named = {tile: sorted({uid for uid, _ in pieces}) for tile, pieces in world.items()}
    return found_slumps(evidence_of(rows), named, list(world)).set_index('uid')


def test_slumps_of_tiles_by_hand():
    "One tile is enough to be found, the lower and the upper bound are each the best of any tile"
    each = slumps_of({
        # the second tile may have found a, and the first did not
        't1': [('a', False)], 't2': [('a', True), ('f', False)],
        't3': [('b', True), ('c', False)],
        't4': [('d', True), ('d', False), ('e', False)],
        't5': [('g', True), ('g', False)],
        't6': [('h', True)], 't7': [('h', False)], 't8': [('i', False)], 't9': [('i', True)]})
    expected = dict(a=(2, 0, 1, 't1'), b=(1, .5, .5, 't3'), c=(1, .5, .5, 't3'), d=(1, 0, 1, 't4'), e=(1, 0, 1, 't4'),
                    f=(1, 0, 1, 't2'), g=(1, 1, 1, 't5'), h=(2, 1, 1, 't6'), i=(2, 1, 1, 't8'))
    assert dict(zip(each.index, each.itertuples(index=False, name=None))) == expected
    # fewer objects than slumps
    assert slump_bounds(2, 1, 3, True) == (0, 1)
    assert slump_bounds(2, 2, 3, False) == (1, 1)


def test_slumps_of_the_windows_of_an_image():
    "The objects of all windows count together, the block is that of the first, and the settings of a match hold"
    rows = []
    for i, pieces in enumerate([[True, True], [False], [True]]):
        logits, mask = tile_of_pieces(pieces)
        identity = dict(tile_id=f'w{i}', split='val', region='r', block=f'b{i}', positive=True, pixel_size=3.)
        rows.append(identity | tile_evidence(logits / 5, mask, THRESHOLDS))

    def found(**settings):
        each = found_slumps(evidence_of(rows), dict(x=['a', 'b', 'c']), ['x', 'x', 'unnamed'], **settings)
        return list(each.itertuples(index=False, name=None))

    assert found() == [(uid, 1, 2/3, 2/3, 'b0') for uid in 'abc']
    assert found(iou=1.1) == [(uid, 1, 0, 0, 'b0') for uid in 'abc']
    # each piece has 36 pixels
    assert found(min_area=37) == []
    assert found(min_area=36) == found()
    # the score of a piece is sigmoid(1), 0.73
    assert found(threshold=.9) == found(iou=1.1)


piece = st.tuples(st.sampled_from('abcde'), st.booleans())
worlds = st.lists(st.lists(piece, max_size=4), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(worlds)
def test_the_truth_lies_between_the_bounds_of_slumps(tiles):
    """Who knows which object is which slump counts each once, found where a piece of it is: that number is between the
    sums of the bounds, and where each tile has one slump it is both"""
    world = {f't{i}': pieces for i, pieces in enumerate(tiles)}
    each = slumps_of(world)
    pieces = [one for tile in tiles for one in tile]
    truth = {uid: any(found for other, found in pieces if other == uid) for uid, _ in pieces}
    assert set(each.index) == set(truth)
    assert each.low.sum() <= sum(truth.values()) + 1e-9 and sum(truth.values()) <= each.high.sum() + 1e-9
    for uid, found in truth.items():
        assert each.tiles[uid] == sum(any(other == uid for other, _ in tile) for tile in tiles)
        # a bound is the truth, or both are the share that some slumps of a tile have in common
        if each.low[uid] != each.high[uid]:
            assert (each.low[uid], each.high[uid]) == (0, 1)
        elif each.low[uid] in (0, 1):
            assert each.low[uid] == found
    for tile in tiles:
        if tile and (all(found for _, found in tile) or len({uid for uid, _ in tile}) == 1 and any(f for _, f in tile)):
            assert all(each.low[uid] == 1 for uid, _ in tile), 'found in one tile is found'
    if all(len({uid for uid, _ in tile}) <= 1 for tile in tiles):
        assert each.low.to_dict() == each.high.to_dict() == truth
