"Metrics of survival at 100,000 patients beside scikit-survival's concordance, whose cost grows with the square"
import sys
import time

import numpy as np
from sksurv.metrics import concordance_index_censored

from common import emit_value, short, timed
from rtsseg.survival_metrics import concordance, survival_scores

def patients(n, seed=0):
    "Years, events and a risk that says something of them; few have an event, as in screening"
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=n)
    event = rng.random(n) < 1 / (1 + np.exp(4 - risk))
    return rng.integers(1, 2000, n).astype(float), event, risk

def main(n=100_000, rounds=3):
    "Both count the same pairs in turns; then all metrics of a table"
    years, event, risk = patients(n)
    ours, theirs = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        found = concordance(years, event, risk)
        middle = time.perf_counter()
        expected = concordance_index_censored(event, years, risk)[0]
        theirs.append(time.perf_counter() - middle)
        ours.append(middle - start)
        assert abs(found - expected) < 1e-10, (found, expected)
    ratios = sorted(mine / other for mine, other in zip(ours, theirs))
    ratio = ratios[len(ratios) // 2]
    emit_value(f"Harrell's C of {n:,} patients, {event.sum():,} events", short(1000 * sorted(ours)[rounds // 2]),
               short(1000 * sorted(theirs)[rounds // 2]), 'ms', ratio=short(ratio), goal='≤ 0.1', met=ratio <= .1,
               rounds=rounds)
    import pandas as pd
    from scipy.special import expit
    table = pd.DataFrame({f'risk_{k}': expit(risk - 5 + k / 2) for k in range(1, 6)})
    table = table.assign(time=np.ceil(years / 400).astype(int), event=event)
    emit_value(f'all metrics of guide 004 of {n:,} patients', short(timed(survival_scores, table)), unit='s')

if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
