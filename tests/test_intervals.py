"Summary, intervals and comparison against loops over replicates, and against a population that is known"
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.stats import binom
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import average_precision_score
from threadpoolctl import threadpool_limits

from helpers.evidence import counted_codes
from rtsseg.bootstrap import Estimate, draw_groups
from rtsseg.config import ToySource
from rtsseg.evidence import Evidence, tile_evidence
from rtsseg.intervals import MAX_BINS, Difference, bootstrap, compare, resample, subsample, summary
from rtsseg.metrics import boundary_metrics, pixel_metrics
from rtsseg.objects import object_metrics
from rtsseg.scores import decode
from rtsseg.toy import scene

THRESHOLDS = (0.25, 0.5, 0.8)
quick = settings(max_examples=15, deadline=None)
seed_lists = st.lists(st.integers(0, 10_000), min_size=4, max_size=14)

# tiles with slumps, and then tiles without
SEEDS = [3 * i + 1 + i % 2 for i in range(48)] + [3 * i for i in range(24)]


def make_tile(seed, side=14):
    "Scores and mask of a small tile; every third seed has no slump"
    rng = np.random.default_rng(seed)
    mask = (ndimage.gaussian_filter(rng.normal(size=(side, side)), 1.2) > rng.uniform(0.05, 0.4)).astype(np.uint8)
    if seed % 3 == 0:
        mask[:] = 0
    mask[rng.random(mask.shape) < 0.05] = 255
    scores = 3 * ndimage.gaussian_filter((mask == 1) + rng.normal(size=mask.shape), 1) + rng.normal(-1, 1)
    return scores, mask


def make_row(i, seed, shift=0., n_blocks=5, **changes):
    "A row of evidence; `shift` moves the scores of slumps up and those of background down"
    scores, mask = make_tile(seed)
    scores = (scores + shift * (2 * (mask == 1) - 1)).astype(np.float16)
    identity = dict(tile_id=f't{i:03}', split='val', region='AB'[i % 2], block=f'b{i % n_blocks}', pixel_size=3.)
    positive = bool((mask == 1).any())
    return identity | dict(positive=positive) | tile_evidence(scores, mask, THRESHOLDS) | changes


def evidence_of(rows, thresholds=THRESHOLDS):
    return Evidence.from_rows(rows, thresholds=thresholds)


def make_evidence(seeds, **settings):
    return evidence_of([make_row(i, seed, **settings) for i, seed in enumerate(seeds)])


def make_run(shift):
    "Evidence of one run; a larger shift is a better model"
    return make_evidence(SEEDS, shift=shift, n_blocks=16)


# ------------------------------------------------ replicates

def counted_scores(evidence, sign):
    "Score, number of pixels and tile of each code"
    codes, counts, tile = counted_codes(evidence, sign)
    return decode(evidence.bins)[codes], counts, tile


def sklearn_ap(evidence, weight):
    "Average precision by scikit-learn, with a weight for each tile"
    pos, pos_counts, pos_tile = counted_scores(evidence, 'pos')
    neg, neg_counts, neg_tile = counted_scores(evidence, 'neg')
    truth = np.repeat([1, 0], [len(pos), len(neg)])
    pixels = np.concatenate([pos_counts * weight[pos_tile], neg_counts * weight[neg_tile]])
    return average_precision_score(truth, np.concatenate([pos, neg]), sample_weight=pixels)


def metrics_of_tiles(evidence, weight, threshold, ious):
    "What a replicate has to be: all metrics of the tiles with their weights"
    found = dict(pr_auc=sklearn_ap(evidence, weight)) | pixel_metrics(evidence, weight, threshold)
    for width, value in boundary_metrics(evidence, weight, threshold).items():
        found[f'boundary_iou_{width}'] = value
    for iou in ious:
        objects = object_metrics(evidence, weight, threshold, iou)
        found |= {f'object_{name}_{100 * iou:.0f}': objects[name] for name in ('precision', 'recall', 'f1')}
    return found


@quick
@given(seed_lists, st.sampled_from([1, 7, 200]), st.sampled_from(THRESHOLDS), st.sampled_from(['block', 'region']))
def test_a_replicate_is_its_tiles_counted_again(seeds, ratio, threshold, unit):
    evidence, ious = make_evidence(seeds), (0.1, 0.5)
    found = resample(evidence, [ratio, 'native'], threshold, ious, replicates=6, seed=3, unit=unit)
    draws, block = draw_groups(evidence[unit], 6, seed=3)
    assert (draws.sum(1) == len(set(evidence[unit]))).all()
    assert len(set(zip(evidence[unit], block))) == len(set(evidence[unit]))

    positive = evidence['positive']
    for i, times in enumerate(draws[:, block]):
        n_pos, n_neg = times[positive].sum(), times[~positive].sum()
        for r in (ratio, 'native'):
            got = {name: values[i] for name, values in found[r].items()}
            if not n_pos or not n_neg and not positive.all():
                assert all(np.isnan(value) for value in got.values()), 'a class was not drawn'
                continue
            w = 1. if r == 'native' or positive.all() else r * n_pos / n_neg
            want = metrics_of_tiles(evidence, times * np.where(positive, 1, w), threshold, ious)
            assert got == pytest.approx(want, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize('dtype', [np.float16, np.float32])
def test_more_scores_than_bins(dtype):
    "Tens of thousands of scores are joined to 4096 bins; the curve of every replicate is still that of its pixels"
    rng, rows = np.random.default_rng(0), []
    for i in range(40):
        mask = (rng.random((96, 96)) < 0.3).astype(np.uint8)
        scores = (rng.normal(size=mask.shape) * 3 + 2 * mask).astype(dtype)
        rows.append(make_row(i, 1, n_blocks=20) | tile_evidence(scores, mask, ()))
    evidence = evidence_of(rows, thresholds=())
    assert (evidence.pooled[:, 1].sum(0) > 0).sum() > MAX_BINS
    assert evidence.exact == (dtype == np.float16)
    draws, block = draw_groups(evidence['block'], 8)
    found = resample(evidence, ['native'], ious=(), replicates=8)['native']['pr_auc']
    for value, times in zip(found, draws[:, block]):
        assert value == pytest.approx(sklearn_ap(evidence, times), abs=1e-4)


def test_threads_change_no_bit():
    evidence, found = make_evidence(range(40), n_blocks=12), []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.append(resample(evidence, [200], replicates=64)[200])
    one, two = found
    assert all(np.array_equal(one[name], two[name], equal_nan=True) for name in one)


def test_replicates_without_a_class_are_left_out_and_counted():
    "All negative tiles lie in the last of 12 blocks"
    rows = [make_row(i, 1 if i < 12 else 3, block=f'b{min(i, 11)}') for i in range(16)]
    evidence = evidence_of(rows)
    lost = np.isnan(resample(evidence, [5], replicates=400)[5]['recall']).sum()
    never_drawn = (1 - 1 / 12)**12
    assert abs(lost / 400 - never_drawn) < 0.1
    recall = bootstrap(evidence, [5], replicates=400)[5]['recall']
    assert f'{lost} of 400 replicates left out' in recall.why


# ------------------------------------------------ cells

def test_a_cell_that_the_split_cannot_support_is_blank_with_a_bound():
    evidence = make_evidence(range(60), n_blocks=20)
    assert (~evidence['positive']).sum() < 30
    native, reweighted = (summary(evidence, [ratio])[ratio] for ratio in ('native', 200))
    for name, cell in bootstrap(evidence, [200], replicates=20)[200].items():
        if 'recall' in name:
            assert cell.value is not None
            assert cell.low <= cell.value <= cell.high
            continue
        assert cell.value is None and cell.low is None
        assert cell.why.startswith('rests on')
        assert cell.high == pytest.approx(native[name])
        assert cell.high >= reweighted[name], 'it is a bound'
    at_its_own_ratio = bootstrap(evidence, ['native'], replicates=20)['native']
    assert all(cell.value is not None for cell in at_its_own_ratio.values()), 'nothing is weighted'


def test_any_iou_of_a_match():
    "Each cell is that of its own IoU, also where its name has one digit or three"
    evidence, ious = make_evidence(SEEDS, n_blocks=16), (.05, .5, 1.)
    got = bootstrap(evidence, ['native'], .5, ious, replicates=20)['native']
    want = summary(evidence, ['native'], .5, ious)['native']
    for iou in ('5', '50', '100'):
        value = want[f'object_f1_{iou}']
        assert got[f'object_f1_{iou}'].value == (None if np.isnan(value) else value)
    assert want['object_f1_5'] > want['object_f1_50'] > 0


def test_no_interval_without_ten_blocks_that_hold_positives():
    nine, ten = (make_evidence(SEEDS, n_blocks=n) for n in (9, 10))
    few, enough = (bootstrap(evidence, ['native'], replicates=50)['native']['iou'] for evidence in (nine, ten))
    assert few.low is None and '9 blocks hold positives' in few.why
    assert enough.low < enough.value < enough.high
    assert few.value == enough.value


# ------------------------------------------------ coverage

def features(land):
    "Bands of each pixel and their means over 15 × 15 pixels, (pixels, 10)"
    bands = np.concatenate([land.image / np.float32(255), land.extra], -1)
    return np.concatenate([bands, cv2.blur(bands, (15, 15))], -1).reshape(-1, 10)


def trained_scorer(world):
    "Small boosted trees, trained on scenes of another seed"
    lessons = [scene(world.model_copy(update=dict(seed=8)), region) for region in range(5)]
    x = np.concatenate([features(land) for land in lessons])
    y = np.concatenate([land.mask.ravel() for land in lessons])
    some = np.flatnonzero(y != 255)[::10]
    scorer = HistGradientBoostingClassifier(max_iter=12, learning_rate=.4, max_leaf_nodes=10, random_state=0)
    return scorer.fit(x[some], y[some])


def population(scenes, side=512, tile=32, block=4):
    "A toy world as a trained scorer sees it: evidence of all its tiles"
    world = ToySource(scene_size=side, tile_size=tile, prevalence=.03, regions=scenes, seed=7)
    scorer, rows = trained_scorer(world), []
    for region in range(scenes):
        land = scene(world, region)
        scores = scorer.decision_function(features(land)).reshape(side, side)
        scores = cv2.blur(scores, (3, 3)).astype(np.float16)
        for i, j in np.ndindex(side // tile, side // tile):
            part = slice(i * tile, i * tile + tile), slice(j * tile, j * tile + tile)
            identity = dict(
                tile_id=f'{region:02}-{i:02}-{j:02}',
                split='test',
                region=land.landscape.name,
                block=f'{region:02}-{i // block}-{j // block}',
                positive=bool((land.mask[part] == 1).any()),
                pixel_size=3.
            )
            rows.append(identity | tile_evidence(scores[part], land.mask[part], (.3,)))
    return Evidence.from_rows(rows, thresholds=(.3,))


HEADLINE = {
    'pr_auc', 'precision', 'recall', 'f1', 'iou', 'boundary_iou_2', 'boundary_iou_3',
    'object_precision_30', 'object_recall_30', 'object_f1_30'
}


def test_intervals_hold_the_truth_of_a_toy_world():
    """60 splits of 28 blocks out of 256: 95% intervals hold the truth as often as a method of 90% or better does

    For every headline number. Intervals over tiles do not."""
    world = population(16)
    truth = summary(world, [5], .3, (.3,))[5]
    names, block = np.unique(world['block'], return_inverse=True)
    rng, inside, over_tiles = np.random.default_rng(0), {}, []
    compared = ('pr_auc', 'iou', 'precision', 'f1')
    for i in range(60):
        split = world.select(np.isin(block, rng.choice(len(names), 28, replace=False)))
        for name, estimate in bootstrap(split, [5], .3, replicates=200)[5].items():
            if estimate.low is not None:
                inside.setdefault(name, []).append(estimate.low <= truth[name] <= estimate.high)
        if i % 3 == 0:
            tiles = bootstrap(split, [5], .3, (), replicates=200, unit='tile_id')[5]
            over_tiles.append([tiles[name].low <= truth[name] <= tiles[name].high for name in compared])
    assert set(inside) == HEADLINE
    for name, hits in inside.items():
        assert len(hits) >= 50
        assert sum(hits) >= binom.ppf(.01, len(hits), .9), f'{name}: {sum(hits)} of {len(hits)}'
    over_blocks = np.mean([np.mean(inside[name]) for name in compared])
    assert np.mean(over_tiles) < over_blocks - .05


def world_of_blocks(rng):
    "Evidence of 30 blocks of 4 tiles; tiles of a block are alike, and the recall of the population is 0.5"
    rows = []
    for block, share in enumerate(rng.beta(2, 2, 30)):
        for tile in range(4):
            found = np.arange(50) < rng.binomial(50, share)
            scores = np.where(found, 2, -2)[None].astype(np.float16)
            place = dict(tile_id=f'{block}-{tile}', split='', region='', block=str(block), pixel_size=1.)
            rows.append(place | dict(positive=True) | tile_evidence(scores, np.ones((1, 50), np.uint8)))
    return Evidence.from_rows(rows)


def test_intervals_cover_the_truth():
    "95% intervals hold the population's recall in at least 85% of 20 worlds, intervals over tiles in fewer"
    rng = np.random.default_rng(0)
    worlds = [world_of_blocks(rng) for _ in range(20)]
    hits = {}
    for unit in ('block', 'tile_id'):
        recalls = [bootstrap(world, ['native'], replicates=200, unit=unit)['native']['recall'] for world in worlds]
        hits[unit] = sum(recall.low <= 0.5 <= recall.high for recall in recalls)
    assert hits['block'] >= 0.85 * 20
    assert hits['tile_id'] < hits['block']


# ------------------------------------------------ seeds

def test_estimates_as_text():
    assert str(Estimate(0.7231, 0.701, 0.744)) == '0.723 [0.701, 0.744]'
    assert str(Estimate(0.5)) == '0.500'
    assert str(Estimate(0.7231, std=0.0119)) == '0.723 ± 0.012', "the guide's format (13)"
    assert str(Estimate(None)) == '–'
    assert str(Estimate(None, None, 0.25)) == '≤ 0.250'


def test_seeds_give_a_mean_and_two_kinds_of_spread():
    runs = [make_run(shift) for shift in (0., .1, .3)]
    thresholds = [{'native': .25}, {'native': .5}, {'native': .5}]
    got = bootstrap(runs, ['native'], thresholds, replicates=100)['native']
    each = [summary(run, ['native'], t, (.3,))['native'] for run, t in zip(runs, thresholds)]
    for name, estimate in got.items():
        values = [row[name] for row in each]
        assert (estimate.value, estimate.std) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
        assert estimate.low <= estimate.value <= estimate.high
        assert f'{estimate.value:.3f} ± {estimate.std:.3f} [' in str(estimate)


def test_one_seed_has_no_spread_and_two_equal_ones_none_of_theirs():
    run, threshold = make_run(0.), {'native': .25}
    one = bootstrap(run, ['native'], threshold, replicates=100)['native']
    assert one == bootstrap([run], ['native'], [threshold], replicates=100)['native']
    assert all(estimate.std is None for estimate in one.values())
    same = bootstrap([run, run], ['native'], threshold, replicates=100)['native']
    for name, estimate in same.items():
        alone = one[name]
        assert (estimate.value, estimate.low, estimate.high) == (alone.value, alone.low, alone.high)
        assert estimate.std == 0.


def test_a_threshold_for_each_seed():
    runs = [make_run(0.)] * 3
    with pytest.raises(ValueError, match='2 thresholds for 3'):
        bootstrap(runs, ['native'], [.5, .5])


# ------------------------------------------------ comparison

def test_runs_are_compared_on_the_same_tiles():
    old, new = make_run(0.), make_run(.15)
    got = compare(old, new, ['native'], replicates=200)['native']
    a, b = (resample(run, ['native'], replicates=200)['native'] for run in (old, new))
    before, after = (summary(run, ['native'], ious=(.3,))['native'] for run in (old, new))
    for name, difference in got.items():
        assert difference.value == pytest.approx(after[name] - before[name])
        assert difference.sigma == pytest.approx(np.nanstd(b[name] - a[name], ddof=1))
        direction = 'gain' if difference.value > 0 else 'loss'
        is_noise = abs(difference.value) <= 2 * difference.sigma
        assert difference.verdict == ('noise' if is_noise else direction)


def test_a_better_run_is_a_gain_and_the_worse_one_a_loss():
    "The interval of the paired difference is less than half as wide as that of one run"
    old, new = make_run(0.), make_run(.15)
    gain = compare(old, new, ['native'], replicates=200)['native']['pr_auc']
    assert gain.verdict == 'gain'
    assert compare(new, old, ['native'], replicates=200)['native']['pr_auc'].verdict == 'loss'
    alone = bootstrap(old, ['native'], replicates=200)['native']['pr_auc']
    assert gain.high - gain.low < .5 * (alone.high - alone.low)


def iou_difference(a, b):
    return compare(a, b, ['native'], replicates=100)['native']['iou']


def test_seeds_that_scatter_turn_a_gain_into_noise():
    old, new = [make_run(0.)] * 2, [make_run(-.6), make_run(.9)]
    alone, both = iou_difference(old[1], new[1]), iou_difference(old, new)
    assert alone.verdict == 'gain' and 'one seed' in alone.why
    assert both.value > 0 and both.verdict == 'noise' and not both.why
    assert both.std > abs(both.value)
    # the old seeds are equal, so all of the spread is that of the new ones
    values = [summary(run, ['native'], ious=())['native']['iou'] for run in new]
    assert both.std == pytest.approx(np.std(values, ddof=1))
    unpaired = iou_difference(old, new + [new[1]])
    assert unpaired.std == pytest.approx(np.std(values + values[1:], ddof=1))


@pytest.mark.parametrize('change', [dict(block='elsewhere'), dict(positive=False), dict(tile_id='another')])
def test_other_tiles_are_not_compared(change):
    rows = [make_row(i, i) for i in range(12)]
    a = evidence_of(rows)
    b = evidence_of([row | change if i == 4 else row for i, row in enumerate(rows)])
    n, of = (2, 13) if 'tile_id' in change else (1, 12)
    for refused in (lambda: compare(a, b), lambda: compare([a, a], [a, b]), lambda: bootstrap([a, b])):
        with pytest.raises(ValueError, match=f'{n} of {of} tiles.*evaluate both on the same split'):
            refused()


def test_what_cannot_be_said_is_no_difference():
    evidence = make_evidence(range(60), n_blocks=20)
    unsupported = compare(evidence, evidence, [200], replicates=20)[200]
    iou = unsupported['iou']
    assert iou.value is None and iou.verdict == 'unknown' and str(iou) == '–'
    assert iou.why.startswith('rests on')
    assert unsupported['recall'].value == 0

    few_blocks = compare(make_evidence(range(12)), make_evidence(range(12), shift=1.), ['native'])['native']['iou']
    assert few_blocks.value > 0 and few_blocks.low is None and few_blocks.verdict == 'unknown'
    assert '10 are needed' in few_blocks.why


def test_differences_as_text():
    gain = Difference(.03, .01, .05, .005, .01)
    assert gain.verdict == 'gain'
    assert str(gain) == '+0.030 ± 0.010 [+0.010, +0.050] gain'


# ------------------------------------------------ the guide's own estimator

@quick
@given(st.integers(0, 10_000), st.sampled_from(THRESHOLDS))
def test_a_subsample_is_its_tiles_alone(seed, threshold):
    evidence = make_evidence([3 * i + 1 for i in range(4)] + [3 * i for i in range(14)])
    positive, negative = np.flatnonzero(evidence['positive']), np.flatnonzero(~evidence['positive'])
    rng, found = np.random.default_rng(seed), []
    for _ in range(3):
        drawn = rng.choice(negative, 2 * len(positive), replace=False)
        part = evidence.select(np.sort(np.concatenate([positive, drawn])))
        found.append(summary(part, ['native'], threshold, (.3,))['native'])
    got = subsample(evidence, 2, threshold, draws=3, seed=seed)
    assert {'pr_auc', 'iou', 'boundary_iou_2', 'object_f1_30'} <= set(got)
    for name, (mean, std) in got.items():
        values = [row[name] for row in found]
        assert (mean, std) == pytest.approx((np.mean(values), np.std(values, ddof=1)), abs=1e-9, nan_ok=True)
    assert subsample(evidence, 4) is None, 'the split has too few negative tiles'
