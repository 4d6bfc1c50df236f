"Estimates from stratified samples: published examples, all samples of small populations, coverage by simulation"
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm
from sklearn.metrics import cohen_kappa_score

from rtsseg.estimates import (
    allocate,
    cohen_kappa,
    prediction_powered_mean,
    stratified_mean,
    stratified_ratio,
    stratified_recall,
    units_needed,
    wilson,
)

# ---------------------------------------------------------------- published examples

# rows: map classes, which are the strata; columns: reference classes (Olofsson et al. 2014)
OLOFSSON = np.array([[66, 0, 5, 4], [0, 55, 8, 12], [1, 0, 153, 11], [2, 1, 9, 313]])
OLOFSSON_SIZES = dict(deforestation=200_000, gain=150_000, forest=3_200_000, other=6_450_000)

def olofsson_sample():
    "Stratum and reference class of each unit"
    pairs = [(i, j) for i, j in np.ndindex(4, 4) for _ in range(OLOFSSON[i, j])]
    names = list(OLOFSSON_SIZES)
    return [names[i] for i, _ in pairs], np.array([names[j] for _, j in pairs])

def test_area_of_olofsson():
    "Deforestation: 21,158 ha, and 1.96 standard errors are 6158 ha; pixels of 30 m"
    stratum, truth = olofsson_sample()
    hectares = stratified_mean(truth == 'deforestation', stratum, OLOFSSON_SIZES).times(10_000_000 * .09)
    assert hectares.value == pytest.approx(21_158, abs=1)
    assert 1.96 * hectares.se == pytest.approx(6158, rel=1e-3)

def test_recall_of_olofsson():
    "Producer's accuracy of deforestation: 0.75 ± 0.21"
    stratum, truth = olofsson_sample()
    predicted = {name: name == 'deforestation' for name in OLOFSSON_SIZES}
    recall = stratified_recall(truth == 'deforestation', stratum, OLOFSSON_SIZES, predicted)
    assert recall.value == pytest.approx(.75, abs=.005)
    assert 1.96 * recall.se == pytest.approx(.21, abs=.005)

def test_sample_size_of_olofsson():
    "A standard error of 0.01 takes 641 units (eq. 13)"
    shares = dict(deforestation=.7, gain=.6, forest=.9, other=.95)
    spreads = {name: np.sqrt(share * (1 - share)) for name, share in shares.items()}
    everywhere = dict.fromkeys(shares, True)
    # whole units of each stratum
    assert abs(units_needed(OLOFSSON_SIZES, shares, everywhere, spreads, .01 * norm.ppf(.975)) - 641) <= 1

def test_an_interval_without_width_takes_all_units():
    assert units_needed(dict(a=300), dict(a=.5), dict(a=True), dict(a=.5), 0) == 300

# ---------------------------------------------------------------- all samples of a small population

values = st.lists(st.floats(0, 1), min_size=2, max_size=4)

@given(st.lists(values, min_size=1, max_size=3), st.data())
@settings(max_examples=25, deadline=None)
def test_unbiased_over_all_samples(world, data):
    "Mean of the estimates = truth; mean of the estimated variances = variance; for any predictions"
    population = {f's{i}': np.array(each) for i, each in enumerate(world)}
    drawn = {name: data.draw(st.integers(2, len(each))) for name, each in population.items()}
    guesses = {name: np.array(data.draw(st.lists(st.floats(0, 1), min_size=len(each), max_size=len(each))))
               for name, each in population.items()}
    sizes = {name: len(each) for name, each in population.items()}
    known = {name: each.mean() for name, each in guesses.items()}
    plain, powered = [], []
    for rows in product(*(combinations(range(sizes[name]), drawn[name]) for name in sizes)):
        picked = list(zip(sizes, map(list, rows)))
        y, f = (np.concatenate([source[name][row] for name, row in picked]) for source in (population, guesses))
        where = np.repeat(list(sizes), [drawn[name] for name in sizes])
        plain.append(stratified_mean(y, where, sizes))
        powered.append(prediction_powered_mean(y, f, where, sizes, known))
    truth = np.concatenate(list(population.values())).mean()
    for found in (plain, powered):
        means = np.array([each.value for each in found])
        assert means.mean() == pytest.approx(truth, abs=1e-9)
        assert np.mean([each.se**2 for each in found]) == pytest.approx(means.var(), abs=1e-9)

@given(st.lists(st.lists(st.booleans(), min_size=2, max_size=6), min_size=2, max_size=4))
@settings(max_examples=50, deadline=None)
def test_a_census_is_the_truth(world):
    sizes = {f's{i}': len(each) for i, each in enumerate(world)}
    truth = np.concatenate(world)
    where = np.repeat(list(sizes), list(sizes.values()))
    mean = stratified_mean(truth, where, sizes)
    assert mean.low == pytest.approx(truth.mean())
    assert mean.high == pytest.approx(truth.mean())
    predicted = {name: name == 's0' for name in sizes}
    recall = stratified_recall(truth, where, sizes, predicted)
    if truth.any():
        assert [recall.value, recall.low, recall.high] == pytest.approx([truth[where == 's0'].sum() / truth.sum()] * 3)
    else:
        assert recall.value is None

# ---------------------------------------------------------------- parts

@given(st.integers(1, 500), st.data(), st.sampled_from([.8, .9, .95, .99]))
def test_wilson_is_that_of_scipy(n, data, level):
    positives = data.draw(st.integers(0, n))
    theirs = binomtest(positives, n).proportion_ci(level, 'wilson')
    assert np.array(wilson(positives / n, n, level)) == pytest.approx(np.array(theirs), abs=1e-9)

samples = st.lists(st.tuples(st.integers(2, 40), st.integers(0, 40), st.integers(0, 500)), min_size=2, max_size=5)

@given(samples)
@settings(deadline=None)
def test_intervals_hold_their_value(strata):
    "Recall lies in its interval, and that between 0 and 1"
    names = [f's{i}' for i in range(len(strata))]
    sizes = {name: n + more for name, (n, _, more) in zip(names, strata)}
    truth = np.concatenate([np.arange(n) < positives for n, positives, _ in strata])
    where = np.repeat(names, [n for n, _, _ in strata])
    recall = stratified_recall(truth, where, sizes, {name: i % 2 == 0 for i, name in enumerate(names)})
    mean = stratified_mean(truth, where, sizes)
    assert mean.low - 1e-12 <= mean.value <= mean.high + 1e-12
    if recall.value is not None:
        assert 0 <= recall.low <= recall.value + 1e-12
        assert recall.value - 1e-12 <= recall.high <= 1

@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.data())
def test_allocation_keeps_its_bounds(counts, data):
    "Inclusion probabilities n_h/N_h of all units add up to n"
    sizes = {f's{i}': n for i, n in enumerate(counts)}
    spreads = {name: data.draw(st.floats(0, 1)) for name in sizes}
    least = data.draw(st.integers(0, 30))
    floor = {name: min(least, n) for name, n in sizes.items()}
    n = data.draw(st.integers(max(sum(floor.values()), 1), sum(counts)))
    drawn = allocate(n, sizes, spreads, least)
    assert sum(sizes[name] * (drawn[name] / sizes[name]) for name in sizes) == pytest.approx(n)
    assert all(floor[name] <= drawn[name] <= sizes[name] for name in sizes)

def test_neyman_is_the_best_allocation():
    "No other allocation of 12 units to three strata has a smaller variance"
    sizes, spreads = dict(a=60, b=40, c=20), dict(a=.1, b=.3, c=.5)

    def variance(drawn):
        return sum(sizes[name]**2 * (1 / drawn[name] - 1 / sizes[name]) * spreads[name]**2 for name in sizes)

    ours = allocate(12, sizes, spreads, 1)
    others = [dict(a=a, b=b, c=12 - a - b) for a in range(1, 11) for b in range(1, 12 - a)]
    assert variance(ours) <= min(map(variance, others)) * 1.02

@given(st.lists(st.tuples(st.sampled_from('yn'), st.sampled_from('ynu')), min_size=2, max_size=60))
def test_kappa_is_that_of_scikit_learn(pairs):
    first, second = zip(*pairs)
    found = cohen_kappa(first, second)
    if found.value is None:
        assert len({*first, *second}) == 1
    else:
        assert found.value == pytest.approx(cohen_kappa_score(first, second), abs=1e-9)
        assert found.low <= found.value <= found.high

def test_stratum_with_one_rated_unit():
    found = stratified_mean([1, 0, 1], ['a', 'a', 'b'], dict(a=5, b=5))
    assert found.value is None
    assert found.why == 'no value: fewer than 2 rated units in b'

def test_ratio_without_denominator():
    assert 'denominator' in stratified_ratio([0, 0], [0, 0], ['a', 'a'], dict(a=5)).why

# ---------------------------------------------------------------- coverage

def covers(estimate, truth):
    "Where nothing is left to chance an interval ends at the truth but for the last digits"
    return estimate.low - 1e-12 <= truth <= estimate.high + 1e-12

# chance moves a share of reviews by 0.6% (one standard deviation)
# intervals for rare classes come close to 95%, not to it (Brown, Cai and DasGupta 2001)
REVIEWS, LEAST, MOST = 1500, .915, .99

@pytest.mark.parametrize('rate', [.0005, .003, .02])
def test_intervals_of_rare_classes_cover_the_truth(rate):
    rng = np.random.default_rng(1)
    names, sizes, drawn = ['deep', 'near', 'high'], [20_000, 800, 300], [200, 100, 100]
    truth = {name: np.arange(size) < round(size * share)
             for name, size, share in zip(names, sizes, [rate, .06, .7])}
    size_of, where = dict(zip(names, sizes)), np.repeat(names, drawn)
    positives = {name: each.sum() for name, each in truth.items()}
    prevalence = sum(positives.values()) / sum(sizes)
    recall = positives['high'] / sum(positives.values())
    counts = np.zeros(2)
    for _ in range(REVIEWS):
        y = np.concatenate([rng.choice(truth[name], n, replace=False) for name, n in zip(names, drawn)])
        counts += [covers(stratified_mean(y, where, size_of), prevalence),
                   covers(stratified_recall(y, where, size_of, dict(deep=False, near=False, high=True)), recall)]
    assert (LEAST <= counts / REVIEWS).all() and (counts / REVIEWS <= MOST).all(), counts / REVIEWS

@pytest.mark.parametrize('rate', [.002, .02])
def test_intervals_of_covered_shares_cover_the_truth(rate):
    "With predictions that know a little, and without"
    rng = np.random.default_rng(2)
    names, sizes, drawn = ['deep', 'near', 'high'], [9000, 600, 300], [150, 100, 100]
    holds = {name: np.arange(size) < round(size * share)
             for name, size, share in zip(names, sizes, [rate, .08, .7])}
    share = {name: each * rng.beta(2, 4, len(each)) for name, each in holds.items()}
    guess = {name: .7 * each + rng.uniform(0, .02, len(each)) for name, each in share.items()}
    size_of, where = dict(zip(names, sizes)), np.repeat(names, drawn)
    known = {name: each.mean() for name, each in guess.items()}
    truth = np.concatenate(list(share.values())).mean()
    counts, widths = np.zeros(2), np.zeros(2)
    for _ in range(REVIEWS):
        rows = {name: rng.choice(size_of[name], n, replace=False) for name, n in zip(names, drawn)}
        y, f = (np.concatenate([source[name][rows[name]] for name in names]) for source in (share, guess))
        both = stratified_mean(y, where, size_of), prediction_powered_mean(y, f, where, size_of, known)
        counts += [covers(each, truth) for each in both]
        widths += [each.high - each.low for each in both]
    plain, powered = counts / REVIEWS
    assert LEAST <= plain <= MOST
    # it allows for what no sample showed, and is narrower than the plain one all the same
    assert powered >= LEAST
    assert widths[1] < widths[0]

def test_predictions_with_a_heavy_tail_cover_less():
    "What the docstring warns of: of 2000 units 1% have a prediction of 0.9, and nothing is there"
    rng = np.random.default_rng(3)
    guess = np.where(np.arange(2000) < 20, .9, .001)
    nothing, where, sizes = np.zeros(60), np.repeat('deep', 60), dict(deep=2000)
    samples = [rng.choice(guess, 60, replace=False) for _ in range(REVIEWS)]
    found = [prediction_powered_mean(nothing, f, where, sizes, dict(deep=guess.mean())) for f in samples]
    assert np.mean([covers(each, 0) for each in found]) < LEAST
    # in strata of like predictions all is well
    sizes, where = dict(low=1980, high=20), np.repeat(['low', 'high'], [50, 10])
    like = prediction_powered_mean(nothing, np.repeat([.001, .9], [50, 10]), where, sizes, dict(low=.001, high=.9))
    assert covers(like, 0)

def test_the_interval_of_kappa_covers_the_truth():
    table = np.array([[.3, .05, .03], [.04, .4, .02], [.02, .04, .1]])
    chance = table.sum(1) @ table.sum(0)
    truth = (np.trace(table) - chance) / (1 - chance)
    rng, count = np.random.default_rng(0), 0
    for _ in range(REVIEWS):
        cells = rng.choice(9, 150, p=table.ravel())
        count += covers(cohen_kappa(cells // 3, cells % 3), truth)
    assert LEAST <= count / REVIEWS <= MOST
