"Metrics of survival against pairs written out, scikit-survival and published numbers"
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sksurv.datasets import load_gbsg2, load_veterans_lung_cancer, load_whas500
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.metrics import concordance_index_censored, concordance_index_ipcw
from sksurv.preprocessing import OneHotEncoder

from rtsseg.survival_metrics import concordance, kaplan_meier, risk_columns, survival_scores, uno_concordance, year_auc

def by_pairs(time, event, risk, weights):
    "Harrell's C as a double loop over pairs"
    right = total = 0.
    for i in range(len(time)):
        for j in range(len(time)):
            outlives = time[j] > time[i] or (time[j] == time[i] and not event[j])
            if event[i] and outlives and i != j:
                pair = weights[i] * weights[j]
                total += pair
                right += pair * (np.sign(risk[i] - risk[j]) + 1) / 2
    return right / total if total else np.nan

patients = st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.integers(0, 5), st.integers(0, 3)), min_size=1,
                    max_size=25)

@given(patients)
def test_concordance_counts_pairs(rows):
    "With ties of time and of risk, and weights that say how often a row counts"
    time, event, risk, weights = map(np.array, zip(*rows))
    found = concordance(time, event.astype(bool), risk.astype(float), weights)
    np.testing.assert_allclose(found, by_pairs(time, event, risk, weights), rtol=1e-12)

@given(patients)
def test_weights_are_repeated_rows(rows):
    "In every metric of a table"
    time, event, risk, weights = map(np.array, zip(*rows))
    risks = np.cumsum(np.tile(risk[:, None] / 40, 5), 1)
    table = pd.DataFrame(risks, columns=risk_columns(5)).assign(time=time.clip(max=5), event=event.astype(bool))
    repeated = table.loc[table.index.repeat(weights)].reset_index(drop=True)
    if not len(repeated):
        return
    found, expected = survival_scores(table, weights), survival_scores(repeated)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-12, err_msg=name)

@given(patients)
def test_only_the_order_of_risks_counts(rows):
    time, event, risk, _ = map(np.array, zip(*rows))
    event = event.astype(bool)
    np.testing.assert_equal(concordance(time, event, risk.astype(float)), concordance(time, event, np.exp(risk / 2)))

DATA_SETS = {'gbsg2': (load_gbsg2, None), 'whas500': (load_whas500, .78422),
             'veteran': (load_veterans_lung_cancer, .73626)}

@pytest.mark.parametrize('name', DATA_SETS)
def test_concordance_of_public_data(name):
    "Harrell's and Uno's C of a Cox model: scikit-survival's to 1e-10, and a known number where there is one"
    read, known = DATA_SETS[name]
    features, outcome = read()
    features = OneHotEncoder().fit_transform(features)
    risk = CoxPHSurvivalAnalysis().fit(features, outcome).predict(features)
    event, time = (outcome[field] for field in outcome.dtype.names)
    found = concordance(time, event, risk)
    assert found == pytest.approx(concordance_index_censored(event, time, risk)[0], abs=1e-10)
    assert known is None or found == pytest.approx(known, abs=1e-4)
    tau = np.quantile(time[~event], .8)
    expected = concordance_index_ipcw(outcome, outcome, risk, tau)[0]
    assert uno_concordance(time, event, time, event, risk, tau) == pytest.approx(expected, abs=1e-10)

@pytest.mark.real
def test_concordance_of_rossi(data_dir):
    "lifelines' number for its own model"
    rossi = pd.read_csv(data_dir/'survival/rossi_risk.csv')
    found = concordance(rossi.week.to_numpy(), rossi.arrest.to_numpy() == 1, rossi.risk.to_numpy())
    assert found == pytest.approx(.64033, abs=1e-5)

@pytest.mark.real
def test_survival_of_lung_patients(data_dir):
    "Median survival of the lung data, 310 days (Loprinzi et al. 1994, as R's survival prints it)"
    lung = pd.read_csv(data_dir/'survival/lung.csv')
    event = lung.status.to_numpy() == lung.status.max()
    curve = kaplan_meier(lung.time.to_numpy(), event)
    assert curve.times[curve.shares <= .5][0] == 310

def test_what_says_nothing_scores_a_half():
    "Constant risks exactly, and noise nearly: time as it is coded gives no hint of who falls ill"
    rng = np.random.default_rng(0)
    time, event = rng.integers(1, 6, 4000), rng.random(4000) < .3
    for constant in (0., .2, .5, .9, 1.):
        assert concordance(time, event, np.full(4000, constant)) == .5
    noise = rng.random(4000)
    assert concordance(time, event, noise) == pytest.approx(.5, abs=.03)
    for year in range(1, 6):
        assert year_auc(time, event, noise, year) == pytest.approx(.5, abs=.06)
