"Summary, intervals and comparison against loops over replicates, and against a population that is known"
import cv2, numpy as np, pytest
from hypothesis import given, settings, strategies as st
from scipy import ndimage
from scipy.stats import binom
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import average_precision_score
from threadpoolctl import threadpool_limits

from rtsseg.bootstrap import Estimate, draw_groups
from rtsseg.config import ToySource
from rtsseg.evidence import Evidence, tile_evidence
from rtsseg.intervals import MAX_BINS, Difference, bootstrap, compare, resample, subsample, summary
from rtsseg.metrics import boundary_metrics, pixel_metrics
from rtsseg.objects import object_metrics
from rtsseg.scores import CODES, decode
from rtsseg.toy import scene

THRESHOLDS = (0.25, 0.5, 0.8)
quick = settings(max_examples=15, deadline=None)

def tile(seed, side=14):
    rng = np.random.default_rng(seed)
    mask = (ndimage.gaussian_filter(rng.normal(size=(side, side)), 1.2) > rng.uniform(0.05, 0.4)).astype(np.uint8)
    if seed % 3 == 0: mask[:] = 0
    mask[rng.random(mask.shape) < 0.05] = 255
    return (3 * ndimage.gaussian_filter((mask == 1) + rng.normal(size=mask.shape), 1) + rng.normal(-1, 1)), mask

def row(i, seed, shift=0., dtype=np.float16, n_blocks=5, **more):
    logits, mask = tile(seed)
    return (dict(tile_id=f't{i:03}', split='val', region='AB'[i % 2], block=f'b{i % n_blocks}', positive=bool((mask == 1).any()), pixel_size=3.)
            | tile_evidence((logits + shift * (2 * (mask == 1) - 1)).astype(dtype), mask, THRESHOLDS) | more)

SEEDS = [3 * i + 1 + i % 2 for i in range(48)] + [3 * i for i in range(24)]      # positive tiles, and then negative ones

def make(seeds, **kw): return Evidence.from_rows([row(i, s, **kw) for i, s in enumerate(seeds)], thresholds=THRESHOLDS)

def scores(evidence, sign):
    codes, tile = evidence.flat(f'{sign}_codes')
    return decode(evidence.bins)[codes], evidence.flat(f'{sign}_counts')[0], tile

@quick
@given(st.lists(st.integers(0, 10_000), min_size=4, max_size=14), st.sampled_from([1, 7, 200]), st.sampled_from(THRESHOLDS), st.sampled_from(['block', 'region']))
def test_a_replicate_is_its_tiles_counted_again(seeds, ratio, threshold, unit):
    e = make(seeds); found = resample(e, [ratio, 'native'], threshold, (0.1, 0.5), replicates=6, seed=3, unit=unit)
    draws, block = draw_groups(e[unit], 6, seed=3)
    assert (draws.sum(1) == len(set(e[unit]))).all() and len(set(zip(e[unit], block))) == len(set(e[unit]))
    positive, (z1, n1, t1), (z0, n0, t0) = e['positive'], scores(e, 'pos'), scores(e, 'neg')
    for i, times in enumerate(draws[:, block]):
        for r in (ratio, 'native'):
            got = {k: v[i] for k, v in found[r].items()}
            if not times[positive].sum() or (~positive).any() and not times[~positive].sum():
                assert all(np.isnan(v) for v in got.values()); continue
            w = 1. if r == 'native' or positive.all() else ratio * times[positive].sum() / times[~positive].sum()
            weight = times * np.where(positive, 1, w)
            theirs = average_precision_score(np.repeat([1, 0], [len(z1), len(z0)]), np.r_[z1, z0], sample_weight=np.r_[n1 * weight[t1], n0 * weight[t0]])
            assert got['pr_auc'] == pytest.approx(theirs, abs=1e-9)
            for k, v in pixel_metrics(e, weight, threshold).items(): assert got[k] == pytest.approx(v, abs=1e-9, nan_ok=True)
            for d, v in boundary_metrics(e, weight, threshold).items(): assert got[f'boundary_iou_{d}'] == pytest.approx(v, abs=1e-9, nan_ok=True)
            for iou in (0.1, 0.5):
                theirs = object_metrics(e, weight, threshold, iou)
                for k in ('precision', 'recall', 'f1'): assert got[f'object_{k}_{100 * iou:.0f}'] == pytest.approx(theirs[k], abs=1e-9, nan_ok=True)

@pytest.mark.parametrize('dtype', [np.float16, np.float32])
def test_more_scores_than_bins(dtype):
    "Tens of thousands of different scores are joined to 4096 bins; the curve of every replicate is still that of its pixels"
    rng, rows = np.random.default_rng(0), []
    for i in range(40):
        mask = (rng.random((96, 96)) < 0.3).astype(np.uint8)
        rows.append(row(i, 1, n_blocks=20) | tile_evidence((rng.normal(size=mask.shape) * 3 + 2 * mask).astype(dtype), mask, ()))
    e = Evidence.from_rows(rows, thresholds=())
    assert (e.pooled[:, 1].sum(0) > 0).sum() > MAX_BINS and e.exact == (dtype == np.float16)
    (z1, n1, t1), (z0, n0, t0), (draws, block) = scores(e, 'pos'), scores(e, 'neg'), draw_groups(e['block'], 8)
    for ap, times in zip(resample(e, ['native'], ious=(), replicates=8)['native']['pr_auc'], draws[:, block]):
        theirs = average_precision_score(np.repeat([1, 0], [len(z1), len(z0)]), np.r_[z1, z0], sample_weight=np.r_[n1 * times[t1], n0 * times[t0]])
        assert ap == pytest.approx(theirs, abs=1e-4)

def test_threads_change_no_bit():
    e, found = make(range(40), n_blocks=12), []
    for threads in (1, 2):
        with threadpool_limits(threads): found.append(resample(e, [200], replicates=64)[200])
    assert all(np.array_equal(found[0][k], found[1][k], equal_nan=True) for k in found[0])

def test_replicates_without_a_class_are_left_out_and_counted():
    rows = [row(i, 1 if i < 12 else 3, block=f'b{min(i, 11)}') for i in range(16)]       # all negative tiles lie in the last block
    e = Evidence.from_rows(rows, thresholds=THRESHOLDS)
    lost = np.isnan(resample(e, [5], replicates=400)[5]['recall']).sum()
    assert abs(lost / 400 - (1 - 1 / 12) ** 12) < 0.1
    assert f'{lost} of 400 replicates left out' in bootstrap(e, [5], replicates=400)[5]['recall'].why

def test_a_cell_that_the_split_cannot_support_is_blank_with_a_bound():
    e = make(range(60), n_blocks=20); n_neg = (~e['positive']).sum()
    assert n_neg < 30
    for name, cell in bootstrap(e, [200], replicates=20)[200].items():
        if 'recall' in name: assert cell.value is not None and cell.low <= cell.value <= cell.high
        else:
            assert cell.value is None and cell.low is None and cell.why.startswith('rests on') and cell.high == pytest.approx(summary(e, ['native'])['native'][name])
            assert cell.high >= summary(e, [200])[200][name]                            # it is a bound
    assert all(c.value is not None for c in bootstrap(e, ['native'], replicates=20)['native'].values())          # nothing is weighted: every number is what was seen

def test_any_iou_of_a_match():
    "Each cell is that of its own IoU, also where its name has one digit or three"
    e, ious = make(SEEDS, n_blocks=16), (.05, .5, 1.); got, want = (f(e, ['native'], .5, ious)['native'] for f in (lambda *a: bootstrap(*a, replicates=20), summary))
    for name in ('5', '50', '100'): assert got[f'object_f1_{name}'].value == want[f'object_f1_{name}'] or got[f'object_f1_{name}'].value is None and np.isnan(want[f'object_f1_{name}'])
    assert want['object_f1_5'] > want['object_f1_50'] > 0

def test_no_interval_without_ten_blocks_that_hold_positives():
    few, enough = (bootstrap(make(SEEDS, n_blocks=n), ['native'], replicates=50)['native']['iou'] for n in (9, 10))
    assert few.low is None and '9 blocks hold positives' in few.why and enough.low < enough.value < enough.high and few.value == enough.value

def population(scenes, side=512, tile=32, block=4):
    "A toy world as a trained scorer sees it: evidence of all its tiles"
    def features(s): x = np.concatenate([s.image / np.float32(255), s.extra], -1); return np.concatenate([x, cv2.blur(x, (15, 15))], -1).reshape(-1, 10)
    world = ToySource(scene_size=side, tile_size=tile, prevalence=.03, regions=scenes, seed=7)
    lessons = [scene(world.model_copy(update=dict(seed=8)), r) for r in range(5)]
    x, y = np.concatenate([features(s) for s in lessons]), np.concatenate([s.mask.ravel() for s in lessons]); some = np.flatnonzero(y != 255)[::10]
    scorer, rows = HistGradientBoostingClassifier(max_iter=12, learning_rate=.4, max_leaf_nodes=10, random_state=0).fit(x[some], y[some]), []
    for r in range(scenes):
        land = scene(world, r); z = cv2.blur(scorer.decision_function(features(land)).reshape(side, side), (3, 3)).astype(np.float16)
        for i, j in np.ndindex(side // tile, side // tile):
            at = slice(i * tile, i * tile + tile), slice(j * tile, j * tile + tile)
            rows.append(dict(tile_id=f'{r:02}-{i:02}-{j:02}', split='test', region=land.look.name, block=f'{r:02}-{i // block}-{j // block}', positive=bool((land.mask[at] == 1).any()), pixel_size=3.)
                        | tile_evidence(z[at], land.mask[at], (.3,)))
    return Evidence.from_rows(rows, thresholds=(.3,))

def test_intervals_hold_the_truth_of_a_toy_world():
    "100 splits of 28 blocks: 95% intervals hold what is true of all 256 blocks as often as a method of 90% or better does, for every headline number; intervals over tiles do not"
    world = population(16); truth = summary(world, [5], .3, (.3,))[5]
    names, block = np.unique(world['block'], return_inverse=True); rng, inside, naive = np.random.default_rng(0), {}, []
    for i in range(100):
        split = world.select(np.isin(block, rng.choice(len(names), 28, replace=False)))
        for name, e in bootstrap(split, [5], .3, replicates=200)[5].items():
            if e.low is not None: inside.setdefault(name, []).append(e.low <= truth[name] <= e.high)
        if i % 4: continue
        tiles = bootstrap(split, [5], .3, (), replicates=200, unit='tile_id')[5]
        naive.append([tiles[k].low <= truth[k] <= tiles[k].high for k in ('pr_auc', 'iou', 'precision', 'f1')])
    assert set(inside) == {'pr_auc', 'precision', 'recall', 'f1', 'iou', 'boundary_iou_2', 'boundary_iou_3', 'object_precision_30', 'object_recall_30', 'object_f1_30'}
    for name, hits in inside.items(): assert len(hits) >= 85 and sum(hits) >= binom.ppf(.01, len(hits), .9), f'{name}: {sum(hits)} of {len(hits)}'
    assert np.mean(naive) < np.mean([np.mean(inside[k]) for k in ('pr_auc', 'iou', 'precision', 'f1')]) - .05

def test_intervals_cover_the_truth():
    "Blocks that differ, tiles of a block alike: 95% intervals hold the population's recall in at least 85% of worlds, intervals over tiles would not"
    rng, hits, naive = np.random.default_rng(0), 0, 0
    shape = dict(tile_id='', split='', region='', pixel_size=1., positive=True)
    for world in range(40):
        rows = []
        for b, share in enumerate(rng.beta(2, 2, 30)):                                    # population mean 0.5
            for t in range(4):
                found = rng.binomial(50, share)
                rows.append(shape | dict(tile_id=f'{b}-{t}', block=str(b)) | tile_evidence(np.where(np.arange(50) < found, 2, -2)[None].astype(np.float16), np.ones((1, 50), np.uint8)))
        e = Evidence.from_rows(rows)
        inside = lambda x: x['recall'].low <= 0.5 <= x['recall'].high
        hits += inside(bootstrap(e, ['native'], replicates=200)['native'])
        naive += inside(bootstrap(e, ['native'], replicates=200, unit='tile_id')['native'])
    assert hits >= 0.85 * 40 and naive < hits

def test_estimates_as_text():
    assert str(Estimate(0.7231, 0.701, 0.744)) == '0.723 [0.701, 0.744]' and str(Estimate(0.5)) == '0.500'
    assert str(Estimate(0.7231, std=0.0119)) == '0.723 ± 0.012'                            # the guide's format (13)
    assert str(Estimate(None)) == '–' and str(Estimate(None, None, 0.25)) == '≤ 0.250'

def run(shift): return make(SEEDS, shift=shift, n_blocks=16)

def test_seeds_give_a_mean_and_two_kinds_of_spread():
    runs = [run(s) for s in (0., .1, .3)]
    cuts = [{'native': .25}, {'native': .5}, {'native': .5}]
    got = bootstrap(runs, ['native'], cuts, replicates=100)['native']
    each = [summary(e, ['native'], t, (.3,))['native'] for e, t in zip(runs, cuts)]
    for k, e in got.items():
        assert (e.value, e.std) == pytest.approx((np.mean([x[k] for x in each]), np.std([x[k] for x in each], ddof=1)))
        assert e.low <= e.value <= e.high and f'{e.value:.3f} ± {e.std:.3f} [' in str(e)
    one = bootstrap(runs[0], ['native'], cuts[0], replicates=100)['native']
    assert one == bootstrap(runs[:1], ['native'], cuts[:1], replicates=100)['native'] and all(e.std is None for e in one.values())
    same = bootstrap([runs[0]] * 2, ['native'], cuts[0], replicates=100)['native']
    assert all((e.value, e.low, e.high, e.std) == (o.value, o.low, o.high, 0.) for e, o in zip(same.values(), one.values()))
    with pytest.raises(ValueError, match='2 thresholds for 3'): bootstrap(runs, ['native'], [.5, .5])

def test_runs_are_compared_on_the_same_tiles():
    old, new = run(0.), run(.15)
    got = compare(old, new, ['native'], replicates=200)['native']
    a, b = (resample(e, ['native'], replicates=200)['native'] for e in (old, new)); before, after = (summary(e, ['native'], ious=(.3,))['native'] for e in (old, new))
    for k, d in got.items():
        assert d.value == pytest.approx(after[k] - before[k]) and d.sigma == pytest.approx(np.nanstd(b[k] - a[k], ddof=1))
        assert d.verdict == ('noise' if abs(d.value) <= 2 * d.sigma else 'gain' if d.value > 0 else 'loss')
    assert got['pr_auc'].verdict == 'gain' and compare(new, old, ['native'], replicates=200)['native']['pr_auc'].verdict == 'loss'
    assert got['pr_auc'].high - got['pr_auc'].low < .5 * (lambda e: e.high - e.low)(bootstrap(old, ['native'], replicates=200)['native']['pr_auc'])     # what paired draws are for

def test_seeds_that_scatter_turn_a_gain_into_noise():
    old, new = [run(0.), run(0.)], [run(-.6), run(.9)]
    alone, both = compare(old[1], new[1], ['native'], replicates=100)['native']['iou'], compare(old, new, ['native'], replicates=100)['native']['iou']
    assert alone.verdict == 'gain' and both.value > 0 and both.verdict == 'noise' and both.std > abs(both.value)
    assert 'one seed' in alone.why and not both.why
    x = [summary(e, ['native'], ious=())['native']['iou'] for e in new]
    assert both.std == pytest.approx(np.std(x, ddof=1))                                # old ones are equal
    assert compare(old, new + [new[1]], ['native'], replicates=100)['native']['iou'].std == pytest.approx(np.std(x + x[1:], ddof=1))        # no pairs: both spreads, of which one is 0

@pytest.mark.parametrize('change', [dict(block='elsewhere'), dict(positive=False), dict(tile_id='another')])
def test_other_tiles_are_not_compared(change):
    a = make(range(12)); b = Evidence.from_rows([row(i, i) | (change if i == 4 else {}) for i in range(12)], thresholds=THRESHOLDS)
    n, of = (2, 13) if 'tile_id' in change else (1, 12)
    for f in (lambda: compare(a, b), lambda: compare([a, a], [a, b]), lambda: bootstrap([a, b])):
        with pytest.raises(ValueError, match=f'{n} of {of} tiles.*evaluate both on the same split'): f()

def test_what_cannot_be_said_is_no_difference():
    e = make(range(60), n_blocks=20)
    d = compare(e, e, [200], replicates=20)[200]
    assert d['iou'].value is None and d['iou'].verdict == 'unknown' and d['iou'].why.startswith('rests on') and str(d['iou']) == '–' and d['recall'].value == 0
    few = compare(make(range(12)), make(range(12), shift=1.), ['native'])['native']['iou']
    assert few.value > 0 and few.low is None and few.verdict == 'unknown' and '10 are needed' in few.why
    assert Difference(.03, .01, .05, .005, .01).verdict == 'gain' and str(Difference(.03, .01, .05, .005, .01)) == '+0.030 ± 0.010 [+0.010, +0.050] gain'

@quick
@given(st.integers(0, 10_000), st.sampled_from(THRESHOLDS))
def test_a_subsample_is_its_tiles_alone(seed, threshold):
    e = make([3 * i + 1 for i in range(4)] + [3 * i for i in range(14)]); positive = e['positive']
    rng, found = np.random.default_rng(seed), []
    for _ in range(3):
        part = e.select(np.sort(np.r_[np.flatnonzero(positive), rng.choice(np.flatnonzero(~positive), 2 * positive.sum(), replace=False)]))
        found.append(summary(part, ['native'], threshold, (.3,))['native'])
    got = subsample(e, 2, threshold, draws=3, seed=seed)
    for k, (mean, std) in got.items(): assert (mean, std) == pytest.approx((np.mean([f[k] for f in found]), np.std([f[k] for f in found], ddof=1)), abs=1e-9, nan_ok=True)
    assert {'pr_auc', 'iou', 'boundary_iou_2', 'object_f1_30'} <= set(got) and subsample(e, 4) is None
