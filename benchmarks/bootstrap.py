"""Intervals for a split of the field's size: 1000 block-bootstrap replicates of every headline number at three ratios, 20,000 tiles in 2,000 blocks, two labels of some thousand scores a tile.

python benchmarks/bootstrap.py [tiles] [replicates]     wall clock; the peer does one replicate a round, and its time is scaled to all of them

The peer is the plain loop: for each replicate the drawn tiles' histograms are added up with their weights, and the whole curve is computed anew by scikit-learn, with the number of pixels as
sample weights. It knows PR-AUC and the pixel metrics only, at one ratio: objects and boundaries are left to us.
"""
import resource, sys

import numpy as np
from sklearn.metrics import average_precision_score

from common import emit, timed
from rtsseg.bootstrap import draw_groups
from rtsseg.evidence import Evidence, tile_evidence
from rtsseg.intervals import bootstrap, resample
from rtsseg.scores import CODES, decode
from rtsseg.toy import scored_tile

RATIOS, GOAL = [200, 500, 1000], 20

def split(tiles, n_blocks=2000, share=.05, kinds=200):
    "Evidence of a split: a few hundred kinds of 512² tiles, each taken many times with other counts"
    rng, rows, thresholds = np.random.default_rng(0), [], np.arange(1, 20) / 20
    shape = dict(split='test', pixel_size=3.)
    parts = [(p, tile_evidence(*scored_tile(rng, p, 512, .3), thresholds)) for p in [True] * int(kinds * share) + [False] * (kinds - int(kinds * share))]
    for i in range(tiles):
        positive, part = parts[i * 7919 % kinds]
        shift = int(rng.integers(-400, 400))                        # no two tiles have the same scores
        moved = {k: np.clip(v.astype(int) + shift, 1, CODES - 1).astype(np.uint16) for k, v in part.items() if k.endswith('codes')}
        rows.append(shape | dict(tile_id=f't{i:06}', region='ABCD'[i % 4], block=f'b{i % n_blocks:05}', positive=positive) | part | moved)
    return Evidence.from_rows(rows, thresholds=thresholds)

def plain(evidence, ratio, draw, block):
    "PR-AUC of one replicate by scikit-learn"
    times = draw[block]; positive = evidence['positive']
    w = times * np.where(positive, 1., ratio * times[positive].sum() / times[~positive].sum())
    hist = np.zeros((2, CODES))
    for sign, name in enumerate(('neg', 'pos')):
        for i in np.flatnonzero(w):
            np.add.at(hist[sign], evidence.table[f'{name}_codes'][i].values.to_numpy(), w[i] * evidence.table[f'{name}_counts'][i].values.to_numpy())
    code = np.flatnonzero(hist.sum(0)); scores = decode(evidence.bins)[code]
    return average_precision_score(np.repeat([0, 1], len(code)), np.tile(scores, 2), sample_weight=hist[:, code].ravel())

def main(tiles=20_000, replicates=1000, rounds=3):
    evidence = split(tiles)
    counts = sum(len(evidence.table[f'{k}_codes'].combine_chunks().values) for k in ('pos', 'neg'))
    draws, block = draw_groups(evidence['block'], replicates)
    test, value = plain(evidence, 200, draws[0], block), resample(evidence, [200], ious=(), replicates=replicates)[200]['pr_auc'][0]
    assert abs(value - test) < 1e-4, (value, test)
    ours, peer = [], []
    for i in range(rounds):
        fresh = Evidence(evidence.table, **evidence.meta)           # nothing counted before
        ours.append(timed(lambda: bootstrap(fresh, RATIOS, replicates=replicates)))
        peer.append(timed(plain, fresh, 200, draws[i], block) * replicates)
    emit(f'{replicates} replicates of all headline numbers at {len(RATIOS)} ratios; the peer: of PR-AUC at one ratio, scaled from one', ours, peer, goal_ms=1e3 * GOAL, goal_met=max(ours) < GOAL,
         tiles=tiles, blocks=draws.shape[1], scores_a_tile=round(counts / tiles), off=float(f'{value - test:.1e}'), peak_GB=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2))

if __name__ == '__main__': main(*map(int, sys.argv[1:]))
