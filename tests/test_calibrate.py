"Calibration: its fits by other libraries, its points by hand, what it refuses, and what averaging over views is worth"

import hashlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss
from sklearn.model_selection import LeaveOneGroupOut
from torch.utils.data import DataLoader

from helpers.runs import MODEL, toy_world
from rtsseg.bootstrap import Estimate, draw_groups
from rtsseg.calibration import (
    Calibration,
    Fit,
    adds_up,
    calibrate,
    calibrate_evidence,
    choose_fit,
    choose_method,
    cross_validate,
    fit_slope_intercept,
    fit_temperature,
    fits,
    nll,
    prior_shift,
    recommend,
    show_calibration,
    show_reliability,
    temperature_verdict,
    training_ratio,
    views_gain,
)
from rtsseg.cli import rtsseg_calibrate, rtsseg_evaluate
from rtsseg.config import Calibrate, ConfigError, Metrics, RtsConfig, load, to_yaml
from rtsseg.console import DataError
from rtsseg.evaluation import Locked, TestLedger, evaluate, look_of, prepare_evaluation
from rtsseg.evidence import Evidence, Meter, evidence_path, tile_evidence
from rtsseg.files import FileError, check_seal, seal_model, write_atomic
from rtsseg.infer import VIEWS, apply_view, predict_logits, save_model, undo_view
from rtsseg.manifest import read_manifest
from rtsseg.metrics import ap_bounds, average_precision, histogram
from rtsseg.models import build
from rtsseg.objects import object_metrics
from rtsseg.observe import next_bins, object_thresholds, observe_tiles, probe_tiles
from rtsseg.operating import Replicates, object_operating_points
from rtsseg.runs import config_hash, judge_run, run_folder
from rtsseg.scores import decode
from rtsseg.stats import compute_stats
from rtsseg.tiles import eval_loader
from rtsseg.toy import scored_tiles
from rtsseg.weights import ModelError

THRESHOLDS = [round(0.1 * i, 1) for i in range(1, 10)]
CFG, METRICS = Calibrate(ratio=20, target_precision=0.5, min_areas=[0, 10, 40], min_region_positives=20), Metrics(
    ratios=[5, 20], replicates=200
)


def tiles(logits, masks, blocks=20, thresholds=(), region='A'):
    "Evidence of tiles that lie in blocks in turn"
    rows = [
        dict(
            tile_id=f't{i:04}',
            split='val',
            region=region,
            block=f'b{i % blocks}',
            positive=bool((m == 1).any()),
            pixel_size=3.0,
        )
        | tile_evidence(np.asarray(z, np.float16), m.astype(np.uint8), thresholds)
        for i, (z, m) in enumerate(zip(logits, masks))
    ]
    return Evidence.from_rows(rows, thresholds=thresholds)


def drawn(seed, scale=1.0, offset=0.0, n=200, side=24):
    "Labels drawn from the probabilities of true scores; the scores are then spoilt"
    rng = np.random.default_rng(seed)
    z = rng.normal(rng.normal(-4, 1.5, (n, 1, 1)), 1.5, (n, side, side)).astype(np.float16).astype(float)
    return tiles(z * scale + offset, rng.random(z.shape) < expit(z))


@pytest.fixture(scope='module')
def toy():
    logits, masks, table = scored_tiles(40, 400)
    meter = Meter(table, THRESHOLDS)
    meter.update(logits, masks, np.arange(len(table)))
    return meter.evidence()


def pixels(evidence, ratio):
    neg, pos = histogram(evidence, ratio)
    seen = neg + pos > 0
    z = decode(evidence.bins)[seen]
    return np.append(z, z), np.repeat([0, 1], len(z)), np.append(neg[seen], pos[seen])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.3, 3), st.floats(-4, 4), st.sampled_from(['native', 1, 50]))
def test_slope_and_intercept_as_scikit_learn(seed, scale, offset, ratio):
    e = drawn(seed, scale, offset, n=40)
    a, b, why = fit_slope_intercept(e, ratio)
    z, y, w = pixels(e, ratio)
    theirs = LogisticRegression(C=np.inf, tol=1e-12, max_iter=100_000).fit(
        z[:, None], y, sample_weight=w / w[y == 1].sum()
    )
    assert not why and nll(e, a, b, ratio) <= log_loss(y, theirs.predict_proba(z[:, None]), sample_weight=w) + 1e-9
    assert (a, b) == pytest.approx((theirs.coef_[0, 0], theirs.intercept_[0]), rel=5e-3, abs=5e-3)
    mean = np.average(expit(a * z + b), weights=w)
    # an intercept makes probabilities add up
    assert mean == pytest.approx(np.average(y, weights=w), rel=1e-6)


@pytest.mark.parametrize(
    'scale, offset, word',
    [
        (1, 0, 'is enough'),
        (0.4, 0, 'is enough'),
        (3, 0, 'is enough'),
        (1, 2, 'is not enough'),
        (0.4, -1.5, 'is not enough'),
    ],
)
def test_when_a_temperature_is_enough(scale, offset, word):
    "Scores that were scaled need no intercept, whatever the draw; scores that were moved do"
    said = [
        temperature_verdict(fits(e, Replicates(e, 200))) for e in (drawn(seed, scale, offset) for seed in range(6))
    ]
    assert all(f'temperature alone {word}' in s for s in said)


@pytest.mark.parametrize(
    'excess, word',
    [
        ((1.3, 0.9, 1.8), 'is enough'),
        ((1.05, 1.02, 1.08), 'is enough'),
        ((1.3, 1.1, 1.5), 'is not enough'),
        ((0.6, 0.5, 0.7), 'is not enough'),
    ],
)
def test_enough_is_within_noise_or_a_tenth(excess, word):
    one = Estimate(1.0, 0.9, 1.1)
    t, both = (Fit(slope=one, intercept=one, excess=Estimate(*x), why='') for x in (excess, (1.0, 1.0, 1.0)))
    assert f'temperature alone {word}: its probabilities add up to {Estimate(*excess)} times' in temperature_verdict(
        dict(temperature=t, slope_intercept=both)
    )


def test_the_excess_is_what_probabilities_add_up_to():
    e = drawn(1, 1, 2)
    found = fits(e, Replicates(e, 100))
    z, y, w = pixels(e, 'native')
    T, _ = fit_temperature(e)
    assert found['temperature'].excess.value == pytest.approx((w * expit(z / T)).sum() / (w * y).sum(), rel=1e-6)
    assert found['slope_intercept'].excess.value == pytest.approx(1, abs=1e-6)
    for f in found.values():
        assert f.slope.low < f.slope.value < f.slope.high
    few = drawn(1, 1, 0.5).select(np.isin(np.arange(200) % 20, range(5)))
    said = temperature_verdict(fits(few, Replicates(few, 100)))
    assert 'is not known' in said and '5 blocks hold positives, 10 are needed' in said
    # nearly three times too many need no interval
    few = drawn(1, 1, 2).select(np.isin(np.arange(200) % 20, range(5)))
    assert 'is not enough' in temperature_verdict(fits(few, Replicates(few, 100)))


@pytest.mark.parametrize(
    'excess, is_right',
    [
        ((1.0, None, None), True),
        ((1.09, 1.05, 1.2), True),
        ((1.5, 0.9, 2.8), True),
        ((1.5, 1.1, 2.8), False),
        ((1.5, None, None), False),
        ((105.0, 0.5, 300.0), False),
        ((0.3, 0.1, 1.2), False),
    ],
)
def test_no_noise_excuses_a_factor_of_two(excess, is_right):
    assert adds_up(Estimate(*excess)) == is_right


def of_balanced_training(seed, trained=1, blocks=20, scale=1.0, n=300, side=48):
    """Scores of a perfect model that was trained at 1:trained: x has densities of unit width at -3 and 0, so its
    log-odds are 3x + 4.5 + logit(share of positives); a third of the tiles have one pixel in a hundred positive"""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(-3, 1, (n, side, side)), np.zeros((n, side, side))
    y[: n // 3] = rng.random((n // 3, side, side)) < 0.01
    z = 3 * (x + 3 * y) + 4.5 + logit(share_of_positives(trained))
    return tiles(scale * z, y, blocks)


def share_of_positives(ratio):
    return 0.01 / (1 + ratio)


@pytest.mark.parametrize('trained', [1, 5])
@pytest.mark.parametrize('ratio', [50, 200, 1000])
def test_the_prior_of_training_is_corrected(trained, ratio):
    "The intercept is the log of the ratio of both prior odds; probabilities add up where those of a temperature do not"
    cfg, metrics = Calibrate(ratio=ratio), Metrics(ratios=[ratio], replicates=100)
    found = [calibrate_evidence(of_balanced_training(seed, trained), cfg, metrics, trained) for seed in range(3)]
    want = logit(share_of_positives(ratio)) - logit(share_of_positives(trained))
    for c in found:
        assert c.method == 'temperature_intercept'
        assert c.slope == pytest.approx(1, abs=0.05)
        assert c.intercept == pytest.approx(want, abs=0.3)
        assert c.quality[ratio].shifted.excess.value == pytest.approx(1, abs=1e-6)
        assert c.remaining == c.held_out['temperature_intercept'].excess
        assert c.remaining.value == pytest.approx(1, abs=0.1)
        assert c.promise.startswith('calibrated by temperature and intercept') and c.promise in said(c)
        assert c.raw_excess == c.quality[ratio].before.excess
        assert f'raw scores to {c.raw_excess}' in said(c)
    # over draws of the pixels
    assert np.mean([c.intercept for c in found]) == pytest.approx(want, abs=0.15)


def said(c):
    return ' '.join(show_calibration(c).split())


def test_temperature_alone_is_not_called_calibrated():
    c = calibrate_evidence(of_balanced_training(0), Calibrate(method='temperature'), Metrics(replicates=100))
    assert c.method == 'temperature' and c.method_why == 'asked for by calibrate.method'
    assert c.remaining.value > 2 and not c.is_calibrated
    assert c.promise.startswith('not calibrated: ') and 'a factor of 2' in c.promise


@pytest.mark.parametrize('scale', [0.4, 1, 3])
def test_auto_keeps_a_temperature_that_is_enough(scale):
    "Scores that were only scaled; one draw in twenty lies beyond two sigma"
    methods = [choose_fit(Replicates(drawn(seed, scale), 200)).method for seed in range(6)]
    assert methods.count('temperature') >= 5


def test_auto_takes_slope_and_intercept_where_they_gain():
    "Scores that were shifted by more than training says: no temperature at the ratio of training is right"
    for seed in range(4):
        found = choose_fit(Replicates(drawn(seed, 0.4, -1.5), 200))
        assert found.method == 'slope_intercept' and 'they gain' in found.why
        assert found.held_out['slope_intercept'].nll.value < found.held_out['temperature_intercept'].nll.value


def losses(gains, sigma=0.01):
    "Held-out NLL of methods that gain so many sigma over temperature; sigma is that of a step from one to the next"
    # the value itself, and two replicates whose standard deviation is 1
    noise = np.array([0, -1, 1]) / np.sqrt(2)
    noise_of = dict(temperature=0, temperature_intercept=1, slope_intercept=2)
    return {name: np.stack([1 - sigma * (gain + noise_of[name] * noise), np.ones(3)]) for name, gain in gains.items()}


@pytest.mark.parametrize(
    'prior, both, excess, chosen',
    [
        # a gain within two sigma changes nothing where temperature adds up
        (1.9, 1.9, 1, 'temperature'),
        (-9, -9, 1, 'temperature'),
        # one beyond them does, and the next step is held against it, not against temperature
        (2.1, 2.1, 1, 'temperature_intercept'),
        (2.1, 2.1 + 1.9, 1, 'temperature_intercept'),
        (2.1, 2.1 + 2.1, 1, 'slope_intercept'),
        # where temperature does not add up, the corrected prior is what has to be beaten
        (-9, -9 + 1.9, 3, 'temperature_intercept'),
        (-9, -9 + 2.1, 3, 'slope_intercept'),
        # both steps against temperature
        (1.9, 2 * 1.9, 1, 'temperature'),
        (1.9, 2 * 2.1, 1, 'slope_intercept'),
    ],
)
def test_a_method_is_changed_for_a_gain_beyond_two_sigma(prior, both, excess, chosen):
    held_out = losses(dict(temperature=0, temperature_intercept=prior, slope_intercept=both))
    one = Estimate(1.0, 0.9, 1.1)
    found = {name: Fit(slope=one, intercept=one, excess=Estimate(excess), why='') for name in held_out}
    fitted = dict(temperature=1.0, temperature_intercept=0.9, slope_intercept=0.8)
    assert choose_method(found, fitted, held_out, '')[0] == chosen


def test_with_few_blocks_the_prior_is_corrected():
    "Nine blocks with positives tell nothing of noise"
    e = of_balanced_training(0, blocks=9)
    c = calibrate_evidence(e, Calibrate(), Metrics(replicates=50))
    assert c.method == 'temperature_intercept' and c.held_out == {}
    assert 'cannot be told: 9 blocks hold positives, 10 are needed' in c.method_why
    assert c.remaining == c.fits['temperature_intercept'].excess and 'none held out' in c.promise
    enough = calibrate_evidence(of_balanced_training(0, blocks=10), Calibrate(), Metrics(replicates=50))
    assert set(enough.held_out) == {'temperature', 'temperature_intercept', 'slope_intercept'}


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(0.3, 3),
    st.floats(-4, 4),
    st.sampled_from([1, 20, 500]),
    st.sampled_from([1, 5, 100]),
    st.sampled_from([3, 12]),
)
def test_auto_never_fits_worse_than_temperature_alone(seed, scale, offset, ratio, trained, blocks):
    rng = np.random.default_rng(seed)
    z = rng.normal(-3, 2, (60, 12, 12))
    y = rng.random(z.shape) < expit(z - 1)
    y[20:] = False
    e = tiles(scale * z + offset, y, blocks)
    chosen = choose_fit(Replicates(e, 30), 'auto', ratio, trained)
    fit = chosen.fits[chosen.method]
    alone = nll(e, 1 / fit_temperature(e, ratio)[0], 0, ratio)
    assert nll(e, fit.slope.value, fit.intercept.value, ratio) <= alone * (1 + 1e-9)


def weighted(e, tile_of, y, ratio):
    "Weight of each pixel where negative tiles count w = r·n₊/n₋ times"
    positive = e['positive']
    used = np.unique(tile_of)
    n_pos, n_neg = positive[used].sum(), (~positive[used]).sum()
    return np.where(positive[tile_of], 1, ratio * n_pos / n_neg)


def test_cross_validation_as_scikit_learn():
    "Ten blocks are ten folds: each block is judged by fits on the other nine, each with its own weight of negatives"
    ratio, trained = 20, 2
    rng = np.random.default_rng(3)
    z = rng.normal(-2, 2, (80, 10, 10)).astype(np.float16).astype(float)
    y = rng.random(z.shape) < expit(z / 2 - 1)
    y[40:] = False
    e = tiles(z, y, 10)
    tile_of = np.repeat(np.arange(80), 100)
    z, y, block = z.ravel(), y.ravel().astype(int), tile_of % 10

    def regression(x, label, weight, intercept):
        made = LogisticRegression(C=np.inf, fit_intercept=intercept, tol=1e-12, max_iter=100_000)
        made.fit(x[:, None], label, sample_weight=weight)
        return made.coef_[0, 0], float(made.intercept_[0]) if intercept else 0.0

    def surplus(b, score, label, weight):
        return weight @ (expit(score + b) - label)

    held_out = np.zeros((3, len(z)))
    for train, test in LeaveOneGroupOut().split(z, y, block):
        x, label = z[train], y[train]
        at_ratio, at_training = (weighted(e, tile_of[train], label, r) for r in (ratio, trained))
        slope, _ = regression(x, label, at_training, False)
        prior = brentq(surplus, -50, 50, args=(slope * x, label, at_ratio))
        lines = regression(x, label, at_ratio, False), (slope, prior), regression(x, label, at_ratio, True)
        for i, (a, b) in enumerate(lines):
            held_out[i, test] = expit(a * z[test] + b)

    found = cross_validate(Replicates(e, 5), ratio, trained)
    draws, _ = draw_groups(e['block'], 5, 0)
    for row, times in enumerate([np.ones(10), *draws]):
        positive = e['positive'][tile_of]
        pixels_drawn = times[block]
        w = np.where(positive, 1, ratio * pixels_drawn[positive].sum() / pixels_drawn[~positive].sum()) * pixels_drawn
        for name, p in zip(('temperature', 'temperature_intercept', 'slope_intercept'), held_out):
            want = log_loss(y, p, sample_weight=w), (w @ p) / (w @ y)
            np.testing.assert_allclose(found[name][:, row], want, rtol=1e-4)


@pytest.mark.parametrize(
    'change, ratio',
    [
        ([], 1),
        (['sampler.positive_fraction=0.25'], 3),
        (['sampler.positive_fraction=null'], 20),
        (['sampler.positive_fraction=null', 'epochs=10'], 1),
    ],
)
def test_the_ratio_of_the_training_batches(change, ratio):
    assert training_ratio(load(overrides=change)) == ratio


def test_what_has_no_fit():
    z = np.zeros((12, 4, 4))
    y = np.zeros_like(z)
    y[:, 0] = 1
    assert fit_temperature(tiles(z, y)) == (
        1,
        'every pixel has the score 0, so no temperature makes probabilities of them; T is left at 1',
    )
    e = tiles(z + 8 * y - 2, y)
    T, _ = fit_temperature(e)
    assert (
        fit_slope_intercept(e)[:2] == (1 / T, 0) and 'a single score divides the pixels' in fit_slope_intercept(e)[2]
    )
    c = calibrate_evidence(e, Calibrate(method='slope_intercept'), Metrics(ratios=[1], replicates=50))
    assert (c.slope, c.intercept) == (1 / T, 0) and 'a single score' in show_calibration(c).replace('\n', ' ')
    with pytest.raises(ValueError, match='no positive pixel'):
        fit_slope_intercept(tiles(z, z))


def test_the_prior_shift_is_bayes(toy):
    "Twice the odds of a slump are twice the odds of every pixel: what is added is the change of the prior's log-odds"
    pos, n_pos = toy.pooled[:, 1].sum(), int(toy['positive'].sum())
    own, other = toy.pooled[1, 0].sum(), toy.pooled[0, 0].sum()

    def prior(ratio):
        "Share of positive pixels with `ratio` negative tiles for each positive one"
        return pos / (pos + own + ratio * n_pos / (len(toy) - n_pos) * other)

    assert (
        prior_shift(toy, 20, 5)
        == pytest.approx(logit(prior(5)) - logit(prior(20)))
        == pytest.approx(-prior_shift(toy, 5, 20))
    )


@pytest.mark.parametrize('method', ['temperature', 'slope_intercept'])
def test_a_calibration(toy, method, tmp_path):
    c = calibrate_evidence(toy, CFG.model_copy(update=dict(method=method)), METRICS)
    plain = calibrate_evidence(toy, CFG, METRICS)
    want = (1 / fit_temperature(toy, 20)[0], 0) if method == 'temperature' else fit_slope_intercept(toy, 20)[:2]
    z = np.linspace(-9, 9, 7)
    np.testing.assert_allclose(c.probability(z), expit(want[0] * z + want[1]))
    np.testing.assert_allclose(c.score(z, 5), want[0] * z + want[1] + prior_shift(toy, 20, 5))
    np.testing.assert_allclose(c.probability(logit(c.raw(np.array([0.1, 0.5, 0.9])))), [0.1, 0.5, 0.9])
    for r in (5, 20):
        p, q = c.thresholds[r], plain.thresholds[r]
        assert (p.logit, p.raw_threshold, p.precision, p.recall) == (
            q.logit,
            q.raw_threshold,
            q.precision,
            q.recall,
        ) and p.threshold == pytest.approx(c.probability(p.logit))
        for points, others in ((c.objects, plain.objects), (c.object_thresholds, plain.object_thresholds)):
            assert (points[r].raw_threshold, points[r].min_area) == (
                others[r].raw_threshold,
                others[r].min_area,
            ) and points[r].threshold == pytest.approx(c.probability(logit(points[r].raw_threshold)))
        s, y, w = pixels(toy, r)
        for name, (a, b) in dict(before=(1, 0), shifted=(want[0], want[1] + c.shifts[r])).items():
            q = getattr(c.quality[r], name)
            prob = expit(a * s + b)
            assert (q.nll.value, q.brier.value) == pytest.approx(
                (log_loss(y, prob, sample_weight=w), brier_score_loss(y, prob, sample_weight=w))
            ) and q.brier.low <= q.brier.value <= q.brier.high
        assert f'Reliability at 1:{r}' in show_reliability(toy, c, r).get_title()
    assert c.shifts[20] == 0 and Calibration.load(c.save(tmp_path / 'calibration.json')) == c
    # with 20 positive tiles a region has its own points, except where too few tiles support one
    for region in c.regions.values():
        assert (
            region.thresholds
            and region.objects
            and all(
                p.support >= 30 or p.w <= 1 or not p.reached
                for p in [*region.thresholds.values(), *region.objects.values()]
            )
        )
    assert max(map(len, show_calibration(c).splitlines())) <= 100


def test_a_threshold_on_few_tiles_is_reported(toy):
    "At 1:200 eleven negative tiles decide: the global point says so, and a region uses the global point of that ratio"
    c = calibrate_evidence(toy, CFG, Metrics(ratios=[5, 200], replicates=50))
    point = c.thresholds[200]
    assert (
        point.reached
        and point.support < 30
        and point.why == f'rests on {point.support} of the 30 negative tiles that are needed where each counts 20 times'
        and not c.thresholds[5].why
    )
    for name, region in c.regions.items():
        assert (
            set(region.thresholds) == {5}
            and c.point(200, name) == point
            and c.point(5, name) == region.thresholds[5] != c.thresholds[5]
        )
        assert (
            'global threshold of pixels at 1:200, since its own rests on' in region.why
            and f'Region {name}: global' in (said := show_calibration(c))
            and f'Region {name}: pixels' in said
        )


def test_an_old_file_is_refused(toy, tmp_path):
    path = calibrate_evidence(toy, CFG, METRICS).save(tmp_path / 'calibration.json')
    old = json.loads(path.read_text())
    for name in ('slope', 'objects'):
        del old['none'][name]
    path.write_text(json.dumps(old))
    with pytest.raises(
        ValueError, match=r'calibration.json was written by another version.*slope.*rtsseg-calibrate makes it again'
    ):
        Calibration.load(path)
    # of a version that chose no method
    path = calibrate_evidence(toy, CFG, METRICS).save(tmp_path / 'earlier.json')
    old = json.loads(path.read_text())
    for name in ('method_why', 'held_out', 'raw_excess'):
        del old['none'][name]
    path.write_text(json.dumps(old))
    with pytest.raises(ValueError, match='earlier.json was written by another version.*method_why.*makes it again'):
        Calibration.load(path)


@pytest.mark.parametrize('broken', ['{"none": {', '', '[]', '\x80'])
def test_a_broken_file_is_reported_and_replaced(toy, tmp_path, capsys, broken):
    path = tmp_path / 'calibration.json'
    path.write_bytes(broken.encode('latin1'))
    c = calibrate_evidence(toy, CFG, METRICS)
    with pytest.raises(ValueError, match=r'calibration.json cannot be read .*rtsseg-calibrate makes it again'):
        Calibration.load(path)
    assert Calibration.load(c.save(path)) == c and 'calibration.json cannot be read' in capsys.readouterr().err
    c.save(path)
    assert not capsys.readouterr().err


def cells(evidence, ratio, areas):
    return {(t, a): object_metrics(evidence, ratio, t, 0.3, a) for t in evidence.thresholds for a in areas}


@pytest.mark.parametrize('target', [0.3, 0.5, 0.7, 0.99])
def test_object_points_by_hand(toy, target):
    operating, alone = object_operating_points(
        toy, Replicates(toy, 200), float, CFG.model_copy(update=dict(target_precision=target)), METRICS
    )
    for r in METRICS.ratios:
        every = cells(toy, r, CFG.min_areas)
        n = len(toy.nested('truth'))
        good = [m['tp'] for m in every.values() if m['precision'] >= target and m['tp'] >= 0.05 * n]
        p = operating[r]
        m = every[p.raw_threshold, p.min_area]
        assert p.reached == bool(good) and (
            p.precision.value,
            p.recall.value,
            p.share.value,
            p.f1.value,
        ) == pytest.approx((m['precision'], m['recall'], m['tp'] / n, m['f1']))
        assert (
            p.share.value * n == pytest.approx(max(good))
            if good
            else (p.raw_threshold, p.min_area) == (0.5, 0)
            and f'object precision {target} is not reached on validation at 1:{r}' in p.why
            and p.why.endswith('; the uncalibrated 0.5 is used')
        )
        assert p.best_precision == pytest.approx(max(m['precision'] for m in every.values() if m['tp'] >= 0.05 * n))
        assert p.recall.low <= p.recall.value <= p.recall.high
        if p.w > 1 and p.support < 30:
            assert p.precision.low is None and 'of the 30 negative tiles' in p.precision.why
        p, down = alone[r], [t for t in THRESHOLDS[::-1] if every[t, 0]['recall'] >= 0.05]
        held = []
        for t in down:
            if not every[t, 0]['precision'] >= target:
                break
            held.append(t)
        assert (p.reached, p.raw_threshold) == ((True, held[-1]) if held else (False, 0.5))


def test_a_floor_is_not_chosen_for_what_it_hides():
    "Recall of the one large slump is 1 at any floor; without a floor more slumps are found at the same precision"
    z, y = np.full((24, 24), -6.0), np.zeros((24, 24))
    for at in (1, 9, 17):
        y[1:5, at : at + 4] = 1
    y[10:22, 2:14] = 1
    z[y == 1] = 3
    # one of three small objects is missed
    z[1:5, 1:5] = -6
    e = tiles([z] * 12, [y] * 12, blocks=12, thresholds=(0.5,))
    p = object_operating_points(e, Replicates(e, 50), float, Calibrate(min_areas=[0, 40]), Metrics(ratios=[1]))[0][1]
    assert (p.min_area, p.precision.value, p.recall.value, p.share.value) == (0, 1, 0.75, 0.75)


def bridged(high, low, speck):
    "An object of two halves with a bridge between them, and a speck beside it, by their logits"
    z, y = np.full((24, 24), -6.0), np.zeros((24, 24))
    y[4:10, 2:18] = 1
    z[4:10, 2:9] = z[4:10, 11:18] = high
    z[4:10, 9:11] = low
    z[16:18, 4:6] = speck
    return z, y


def test_precision_that_falls_is_reported():
    "Above the bridge's score one object is two, one of them a false alarm; a speck makes it rise before it falls"
    case = bridged(3, 0, -1)
    e = tiles(*zip(*[case] * 24), blocks=12, thresholds=THRESHOLDS)
    alone = object_operating_points(
        e, Replicates(e, 100), float, Calibrate(min_areas=[0]), Metrics(ratios=[1], replicates=100)
    )[1][1]
    assert (
        'falls from 1.000 at 0.300 to 0.500 at 0.600' in alone.monotone_why
        and not alone.reached
        and 'lower again above that' in alone.why
    )
    case = bridged(3, 2.9, -1)
    e = tiles(*zip(*[case] * 24), blocks=12, thresholds=THRESHOLDS)
    alone = object_operating_points(
        e, Replicates(e, 100), float, Calibrate(min_areas=[0]), Metrics(ratios=[1], replicates=100)
    )[1][1]
    assert not alone.monotone_why and alone.reached and alone.raw_threshold == 0.3


def test_precision_that_falls_within_its_noise_is_not_reported():
    "One tile of forty is split: in a replicate it may well not be there"
    cases = [bridged(3, 2.9, -6)] * 39 + [bridged(3, 0, -6)]
    e = tiles(*zip(*cases), blocks=40, thresholds=THRESHOLDS)
    alone = object_operating_points(
        e, Replicates(e, 300), float, Calibrate(min_areas=[0]), Metrics(ratios=[1], replicates=300)
    )[1][1]
    assert alone.reached and not alone.monotone_why


def record_test_access(cfg, data, views='none'):
    TestLedger(cfg.runs, data).record(look_of(cfg, data, views))


@pytest.mark.parametrize(
    'change',
    [
        'calibrate.method=slope_intercept',
        'calibrate.min_areas=[0]',
        'calibrate.ratio=500',
        'calibrate.target_precision=0.7',
        'calibrate.min_recall=0.1',
        'calibrate.min_region_positives=5',
        'metrics.min_area=10',
        'metrics.monitor=pr_auc@500',
        'metrics.ratios=[200]',
        'loss.gamma=1',
        'epochs=7',
    ],
)
def test_the_lock(tmp_path, change):
    "Three seeds are one look; another way to train or to choose is another configuration"
    cfg = RtsConfig(runs=tmp_path)
    for seed in (42, 43, 44, 42):
        record_test_access(cfg.model_copy(update=dict(seed=seed)), 'data')
    ledger = json.loads((tmp_path / 'test_ledger.json').read_text())['data']
    assert [look['seed'] for look in ledger['looks']] == [42, 43, 44, 42]
    assert not any(look['forced'] for look in ledger['looks'])
    with pytest.raises(Locked, match='second validation split'):
        record_test_access(load(overrides=[change], runs=tmp_path), 'data')
    with pytest.raises(Locked, match='views full'):
        record_test_access(cfg, 'data', 'full')


def test_the_rule_names_what_decides(tmp_path):
    "A rule that changed under one config hash, as by other code, is refused too"
    record_test_access(RtsConfig(runs=tmp_path), 'data')
    path = tmp_path / 'test_ledger.json'
    ledger = json.loads(path.read_text())
    for word in (
        'pr_auc@200',
        'auto at 1:200',
        'precision ≥ 0.8',
        'recall 0.05',
        '1:1000',
        '0, 5, 10, 20, 40, 80, 160, 320 pixels',
        '30 positive tiles',
        'views none',
    ):
        assert word in ledger['data']['rule']
    ledger['data']['rule'] = ledger['data']['rule'].replace('0.05', '0.10')
    path.write_text(json.dumps(ledger))
    with pytest.raises(
        Locked,
        match=r'evaluated with precision ≥ 0.8 up to recall 0.10 at 1:200, 1:500, 1:1000; '
        r'reading it again with precision ≥ 0.8 up to recall 0.05 at 1:200, 1:500, 1:1000 would',
    ):
        record_test_access(RtsConfig(runs=tmp_path), 'data')


def test_every_view_comes_back():
    "The eight symmetries by NumPy, on an image without any: its letters stay where they were"
    image = np.arange(35).reshape(5, 7)
    turned = set()
    for k, flip in VIEWS['full']:
        want = np.rot90(np.fliplr(image) if flip else image, k)
        got = apply_view(torch.tensor(image), k, flip)
        assert np.array_equal(got, want) and torch.equal(undo_view(got, k, flip), torch.tensor(image))
        turned.add(tuple(np.pad(want, ((0, 7 - want.shape[0]), (0, 7 - want.shape[1]))).ravel()))
    assert len(turned) == 8 and all(set(map(tuple, VIEWS[v])) <= set(VIEWS['full']) for v in VIEWS)


@pytest.fixture
def folder(tmp_path):
    "A run whose validation was seen in four ways: minimal is as noisy as none, standard is less so, full not at all"
    cfg = load(
        runs=tmp_path,
        metrics=dict(ratios=[5, 20], monitor='pr_auc@5', replicates=200, object_thresholds=[0.3, 0.5, 0.7]),
        calibrate=dict(ratio=5, target_precision=0.5),
    )
    folder = tmp_path / 'toy' / config_hash(cfg) / 'seed42'
    write_atomic(folder / 'config.yaml', to_yaml(cfg))
    logits, masks, table = scored_tiles(40, 400)
    rng = np.random.default_rng(5)
    log = []
    for views, noise in dict(none=2.5, minimal=2.5, standard=1, full=0).items():
        z = logits + rng.normal(0, 1, logits.shape) * noise
        meter = Meter(table, (0.3, 0.5, 0.7), views=views)
        meter.update(z.astype(np.float16), masks, np.arange(len(table)))
        meter.evidence().write(evidence_path(folder, 'val', views))
        log += [
            dict(event='evaluate', split='val', views=views, tiles=440, seconds=s, device='cpu')
            for s in (99.0, 44.0 * len(VIEWS[views]))
        ]
    # calibration does not open the weights
    write_atomic(folder / 'model' / 'model.safetensors', b'')
    write_atomic(folder / 'log.jsonl', ''.join(json.dumps(line) + '\n' for line in [dict(event='start'), *log]))
    return folder


def test_views_by_their_gain_and_cost(folder, capsys):
    gains = views_gain(folder)
    assert list(gains.index) == ['none', 'minimal', 'standard', 'full'] and gains[
        'seconds per tile'
    ].tolist() == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert gains.gain['full'] == pytest.approx(
        gains['PR-AUC 1:5']['full'] - gains['PR-AUC 1:5']['none']
    ) and gains.verdict.tolist()[1:] == ['noise', 'gain', 'gain']
    assert abs(gains.gain['minimal']) <= gains.noise['minimal'] and gains.gain['full'] > gains.noise['full']
    # the cheapest, not the best
    assert (
        gains.gain['full'] > gains.gain['standard']
        and 'standard is recommended' in recommend(gains)
        and '4.0 times the time' in recommend(gains)
    )
    assert 'not recommended: no gain beyond the noise' in recommend(
        gains.loc[['none', 'minimal']]
    ) and 'nothing to compare' in recommend(views_gain(folder).loc[['none'], ['PR-AUC 1:5']])
    rtsseg_calibrate(run=str(folder))
    said = capsys.readouterr().out
    assert 'standard is recommended' in said and 'temperature' in said and max(map(len, said.splitlines())) <= 100


def test_the_model_card_says_what_probabilities_add_up_to(folder):
    "A section for each setting of views, sealed; a card that was changed by hand stays as it is"
    model = folder / 'model'
    write_atomic(model / 'README.md', '# toy\n\n- Of slumps.\n')
    seal_model(model)
    found = {views: calibrate(folder, views) for views in ('none', 'full')}
    calibrate(folder, 'none')
    check_seal(model, ['README.md', 'calibration.json'])
    text = (model / 'README.md').read_text()
    assert text.startswith('# toy\n\n- Of slumps.\n\n## Intended use\n\nNot stated')
    for views, calibration in found.items():
        assert text.count(f'## Probabilities, views {views}\n\nOn validation: {calibration.promise}.\n') == 1
        for ratio, point in calibration.thresholds.items():
            assert point.precision.low is not None
            assert f'- 1:{ratio}: threshold ' in text
            assert f'precision {point.precision}, recall {point.recall}' in text
    judge_run(folder, ['card={sensor: a camera, years: [2019, 2021], limits: [blind at night]}'])
    calibrate(folder, 'none')
    text = (model / 'README.md').read_text()
    assert '- Sensor: a camera\n- Years: 2019, 2021\n' in text and '\n- blind at night\n' in text
    assert text.count('## ') == 5
    changed = '# mine\n'
    write_atomic(model / 'README.md', changed)
    calibrate(folder, 'none')
    assert (model / 'README.md').read_text() == changed
    with pytest.raises(FileError, match='README.md is not the file'):
        check_seal(model, ['README.md'])


def test_views_of_few_blocks_cannot_be_told_apart(folder):
    for v in VIEWS:
        e = Evidence.read(path := evidence_path(folder, 'val', v))
        e.select(np.isin(e['block'], np.unique(e['block'][e['positive']])[:9])).write(path)
    gains = views_gain(folder)
    assert gains.verdict.tolist()[1:] == ['unknown'] * 3 and gains.gain.notna().sum() == 3
    assert (
        recommend(gains)
        == 'whether test-time augmentation is worth it is not known: '
        'no interval: 9 blocks hold positives, 10 are needed'
    )


def test_scales_and_maxima_that_were_evaluated_are_listed(folder):
    for views, other in {'none@0.5': 'full', 'minimal-max': 'none', 'none@0.25': 'none'}.items():
        evidence = Evidence.read(evidence_path(folder, 'val', other))
        evidence.views = views
        evidence.write(evidence_path(folder, 'val', views))
    (folder / 'evidence' / 'val-notes.parquet').touch()
    line = dict(event='evaluate', split='val', views='none@0.5', tiles=440, seconds=11.0, device='cpu')
    with open(folder / 'log.jsonl', 'a') as f:
        f.write(json.dumps(line) + '\n')
    gains = views_gain(folder)
    assert list(gains.index) == ['none', 'minimal', 'standard', 'full', 'none@0.5', 'none@0.25', 'minimal-max']
    assert gains.gain['none@0.5'] == gains.gain['full'] and gains.gain['minimal-max'] == 0
    # the cheapest, wherever it stands
    assert 'none@0.5 is recommended' in recommend(gains) and '0.2 times the time' in recommend(gains)


def test_a_log_that_was_cut_off(folder):
    before = views_gain(folder)
    with open(folder / 'log.jsonl', 'a') as f:
        f.write('{"event": "evaluate", "spl')
    assert views_gain(folder).equals(before)


def test_advice_can_be_typed(folder):
    with pytest.raises(
        ConfigError, match="views: 'ful' is not one of none, minimal, standard, full.*did you mean 'full'"
    ):
        calibrate(folder, 'ful')
    (folder / 'model' / 'model.safetensors').unlink()
    (folder / 'model').rmdir()
    with pytest.raises(
        DataError, match='model/model.safetensors is missing, so the run is not trained: rtsseg-train'
    ):
        calibrate(folder)
    # no folder is made that looks like a model
    assert not (folder / 'model').exists()
    write_atomic(folder / 'model' / 'model.safetensors', b'')
    evidence_path(folder, 'val', 'standard').unlink()
    with pytest.raises(
        DataError,
        match=r'val-standard.parquet: .*rtsseg-evaluate --run \S+seed42 --split val --views standard makes it',
    ):
        calibrate(folder, 'standard')


@pytest.fixture(scope='module')
def untrained(tmp_path_factory):
    "A run whose model was never trained, and whose scores lie within a hair of each other"
    root = tmp_path_factory.mktemp('untrained')
    torch.manual_seed(0)
    cfg = load(
        runs=root / 'runs',
        device='cpu',
        batch_size=8,
        loader=dict(num_workers=0),
        data=dict(manifest=toy_world(root), tile_size=64),
        metrics=dict(ratios=[1]),
        model=MODEL,
    )
    manifest = read_manifest(cfg.data.manifest, cfg.data.block_size)
    folder = run_folder(cfg, manifest.hash)
    write_atomic(folder / 'config.yaml', to_yaml(cfg))
    model = build(cfg.model).eval()
    head = next(m for m in model.segmentation_head.modules() if isinstance(m, torch.nn.Conv2d))
    with torch.no_grad():
        head.weight.mul_(1e-3)
        head.bias.fill_(-4.0)
    stats = compute_stats(manifest.of('train'))
    save_model(folder / 'model', model, cfg, stats, dict(epoch=1, value=0.0, metrics={}), {})
    return folder, cfg, manifest.of('val'), model, stats


def test_scores_too_close_together_are_counted_finer_in_the_same_pass(untrained, capsys):
    folder, cfg, part, model, stats = untrained
    evidence = Evidence.read(evaluate(folder))
    said = capsys.readouterr().out
    assert (
        'another pass' not in said
        and 'stays uncertain' not in said
        and evidence.bins != 'float16'
    )
    with torch.inference_mode():
        z, y = (
            np.concatenate(x)
            for x in zip(
                *(
                    (
                        predict_logits(model.to(memory_format=torch.channels_last), b['image']).numpy(),
                        b['target'].numpy(),
                    )
                    for b in eval_loader(part, stats, cfg)
                )
            )
        )
    positive = part.table.positive.to_numpy()
    w = np.broadcast_to(np.where(positive, 1, positive.sum() / (~positive).sum())[:, None, None], y.shape)
    seen = y != 255
    half, true = (
        average_precision_score(y[seen] == 1, x[seen], sample_weight=w[seen]) for x in (z.astype(np.float16), z)
    )
    assert (
        average_precision(histogram(evidence, 1), evidence.exact) == pytest.approx(true, abs=1e-4)
        and abs(half - true) > 1e-3
    )
    passes = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    expected = dict(event='evaluate', split='val', views='none', tiles=len(part), device='cpu')
    assert [{name: line[name] for name in expected} for line in passes] == [expected]
    assert all(line['seconds'] > 0 for line in passes)
    assert {line['model'] for line in passes} == {
        hashlib.sha256((folder / 'model' / 'model.safetensors').read_bytes()).hexdigest()[:12]
    }


def seen(folder, backwards=False, **more):
    "The evidence of a pass over validation, in another order and in other batches where it runs backwards"
    job = prepare_evaluation(folder, 'val', 'none', False)
    part, loader = job.feed.manifest.of('val'), job.feed.split('val', job.packed)
    if backwards:
        loader = DataLoader(loader.dataset, batch_size=5, sampler=list(range(len(part)))[::-1])
    return observe_tiles(job.packed, loader, part, job.cfg, job.ask, **more)


def of_pixel(net, image, views):
    "Scores that depend on the pixel alone, within a hair of each other"
    return 1e-3 * image.mean(1) - 4


def test_the_order_of_batches_leaves_the_evidence_as_it_is(untrained, monkeypatch):
    folder, *_ = untrained
    monkeypatch.setattr('rtsseg.observe.predict_logits', of_pixel)
    forwards = seen(folder)
    assert forwards.bins != 'float16' and forwards == seen(folder, backwards=True)


def test_scores_outside_of_the_finer_grid_need_a_second_pass(untrained, monkeypatch, capsys):
    "Tiles beside those of the probe had other scores: one pass in half precision finds the range, and one counts there"
    folder, *_ = untrained
    monkeypatch.setattr('rtsseg.observe.predict_logits', of_pixel)
    monkeypatch.setattr('rtsseg.observe.finer_bins', lambda *_: (-4.0005, -3.9995))
    half = seen(folder, bins='float16')
    found = Evidence.read(evaluate(folder))
    said = capsys.readouterr().out
    assert said.index('the range that a few tiles suggested') < said.index('on a finer grid')
    assert found == seen(folder, bins=next_bins(half))


def test_half_precision_stays_where_it_suffices(untrained, monkeypatch):
    "Scores that half precision holds need no finer grid"
    folder, *_ = untrained
    monkeypatch.setattr('rtsseg.observe.predict_logits', lambda *a: of_pixel(*a).half().float())
    assert seen(folder) == seen(folder, bins='float16')
    assert seen(folder).exact


@given(st.lists(st.booleans(), min_size=1, max_size=400))
def test_the_probe_is_small_and_holds_both_kinds(positive):
    positive = np.array(positive)
    rows = probe_tiles(positive)
    assert len(set(rows)) == len(rows) <= max(4, min(8, len(positive) / 16))
    assert set(positive[rows]) == set(positive)


def test_what_further_passes_leave_uncertain_is_reported(untrained, capsys, monkeypatch):
    "Scores that lie within a step of the finer grid too, since the other half lies far away"
    folder, *_ = untrained

    def far(net, image, views):
        z = 1e-3 * predict_logits(net, image, views)
        z[..., ::2] += 1000
        return z

    monkeypatch.setattr('rtsseg.observe.predict_logits', far)
    evidence = Evidence.read(evaluate(folder))
    out, said = capsys.readouterr()
    # once, after the passes, each of which says why it is made
    assert (out + said).count('PR-AUC stays uncertain by more than 1e-4') == 1
    low, high = ap_bounds(histogram(evidence, 1), evidence.exact)
    assert (
        evidence.bins != 'float16'
        and high - low > 1e-4
        and f'PR-AUC stays uncertain by more than 1e-4: between {low:.5f} and {high:.5f} at 1:1' in said
    )


def test_validation_does_not_depend_on_its_calibration(untrained, toy):
    "On validation, where thresholds are chosen, the grid of objects is the config's; elsewhere it adds the chosen ones"
    folder, cfg, *_ = untrained
    point = calibrate_evidence(toy, CFG, METRICS)
    point.save(folder / 'model' / 'calibration.json')
    try:
        val, test = (object_thresholds(cfg.metrics, folder, split, 'none') for split in ('val', 'test'))
    finally:
        (folder / 'model' / 'calibration.json').unlink()
        seal_model(folder / 'model')
    assert (
        set(val) == {*cfg.metrics.object_thresholds, 0.5}
        and set(test) - set(val) == {p.raw_threshold for p in point.thresholds.values()} - set(val) != set()
    )


def test_the_test_split_before_calibration_is_reported(untrained, toy, capsys):
    folder, *_ = untrained
    path = folder / 'model' / 'calibration.json'
    evaluate(folder, 'test')
    assert (
        'views none are not calibrated yet, so no threshold was chosen before the test split is read: '
        'rtsseg-calibrate --run'
        in capsys.readouterr().err
    )
    try:
        calibrate_evidence(toy, CFG, METRICS).save(path)
        evaluate(folder, 'test')
        assert 'not calibrated' not in capsys.readouterr().err
        path.write_text('{')
        looks = (folder.parents[2] / 'test_ledger.json').read_text()
        with pytest.raises(
            ModelError,
            match='calibration.json is not the file that SHA256SUMS lists.*rtsseg-calibrate makes it again',
        ):
            evaluate(folder, 'test')
        seal_model(folder / 'model')
        with pytest.raises(DataError, match='calibration.json cannot be read .*rtsseg-calibrate --run'):
            evaluate(folder, 'test')
        # nobody looked
        assert (folder.parents[2] / 'test_ledger.json').read_text() == looks
    finally:
        path.unlink()
        seal_model(folder / 'model')
    evaluate(folder)
    assert 'not calibrated' not in capsys.readouterr().err


def test_several_views_from_a_shell(untrained, capsys):
    folder, cfg, part, *_ = untrained
    rtsseg_evaluate(run=str(folder), views='minimal, none')
    said = capsys.readouterr().out
    assert (
        'val-minimal.parquet\nviews minimal' in said
        and 'val.parquet\nviews none' in said
        and '1:1 ' in said
        and 'PR-AUC' in said
    )
    before = (folder / 'log.jsonl').read_text()
    with pytest.raises(SystemExit):
        rtsseg_evaluate(run=str(folder), views='none,stanard')
    assert (
        "views: 'stanard' is not one of none, minimal, standard, full" in (message := capsys.readouterr().err)
        and "did you mean 'standard'" in message
        and (folder / 'log.jsonl').read_text() == before
    )
