"""Intervals for a split of the field's size: 1000 block-bootstrap replicates of every headline number at three ratios

python benchmarks/bootstrap.py [tiles] [replicates]     wall clock

20,000 tiles in 2,000 blocks, two labels of some thousand scores a tile. The peer is a plain loop: for each replicate it
adds the histograms of the drawn tiles with their weights, and scikit-learn computes the whole curve, with the number of
pixels as sample weights. It gives PR-AUC at one ratio only. It does one replicate a round; its time is scaled to all.
"""
import resource
import sys

import numpy as np
from sklearn.metrics import average_precision_score

from common import emit, timed
from rtsseg.bootstrap import draw_groups
from rtsseg.evidence import Evidence, tile_evidence
from rtsseg.intervals import bootstrap, resample
from rtsseg.scores import CODES, decode
from rtsseg.toy import scored_tile

RATIOS = [200, 500, 1000]
GOAL_SECONDS = 20

def shifted(codes, shift):
    "Codes of other scores, in range"
    return np.clip(codes.astype(int) + shift, 1, CODES - 1).astype(np.uint16)

def split(tiles, blocks=2000, positive_share=.05, kinds=200):
    "Evidence of a split: some hundred kinds of 512² tiles, each taken many times with other scores"
    rng = np.random.default_rng(0)
    thresholds = np.arange(1, 20)/20
    parts = []
    for kind in range(kinds):
        positive = kind < int(kinds*positive_share)
        parts.append((positive, tile_evidence(*scored_tile(rng, positive, 512, .3), thresholds)))
    rows = []
    for i in range(tiles):
        positive, part = parts[i*7919 % kinds]
        shift = int(rng.integers(-400, 400))
        moved = {name: shifted(codes, shift) for name, codes in part.items() if name.endswith('codes')}
        row = {'tile_id': f't{i:06}', 'split': 'test', 'region': 'ABCD'[i % 4], 'block': f'b{i % blocks:05}'}
        rows.append(row | {'positive': positive, 'pixel_size': 3.} | part | moved)
    return Evidence.from_rows(rows, thresholds=thresholds)

def plain(evidence, ratio, draw, block):
    "PR-AUC of one replicate by scikit-learn"
    times = draw[block]
    positive = evidence['positive']
    weights = times*np.where(positive, 1., ratio*times[positive].sum()/times[~positive].sum())
    counts = np.zeros((2, CODES))
    for label, name in enumerate(('neg', 'pos')):
        for codes, count, tile in evidence.histograms(name):
            np.add.at(counts[label], codes, weights[tile]*count)
    used = np.flatnonzero(counts.sum(0))
    scores = np.tile(decode(evidence.bins)[used], 2)
    return average_precision_score(np.repeat([0, 1], len(used)), scores, sample_weight=counts[:, used].ravel())

def main(tiles=20_000, replicates=1000, rounds=3):
    evidence = split(tiles)
    scores = sum(len(codes) for name in ('pos', 'neg') for codes, *_ in evidence.histograms(name))
    draws, block = draw_groups(evidence['block'], replicates)
    value = resample(evidence, [200], ious=(), replicates=replicates)[200]['pr_auc'][0]
    error = abs(value - plain(evidence, 200, draws[0], block))
    assert error < 1e-4, error

    ours, peer = [], []
    for i in range(rounds):
        # its caches are empty
        fresh = Evidence(evidence.groups, **evidence.meta)
        ours.append(timed(lambda evidence: bootstrap(evidence, RATIOS, replicates=replicates), fresh))
        peer.append(timed(plain, fresh, 200, draws[i], block)*replicates)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
    emit(f'{replicates} replicates of all headline numbers at three ratios; peer: of PR-AUC at one ratio', ours, peer,
         limit_ms=1000*GOAL_SECONDS, limit_met=max(ours) < GOAL_SECONDS, tiles=tiles, blocks=draws.shape[1],
         scores_a_tile=round(scores/tiles), error=float(f'{error:.1e}'), peak_gb=round(memory, 2))

if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
