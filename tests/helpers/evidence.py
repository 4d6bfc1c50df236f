"Evidence of small made-up tiles, for tests of metrics and objects"
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from scipy import ndimage

from rtsseg.evidence import SCHEMA, Evidence, tile_evidence
from rtsseg.rowgroups import GroupKeeper, in_groups

THRESHOLDS = (0.25, 0.5, 0.8)

quick = settings(max_examples=25, deadline=None)

# each seed is a tile of `make_evidence`
seeds = st.lists(st.integers(0, 10_000), min_size=1, max_size=8)


def make_tile(seed, side=14):
    "Logits and mask of a small tile whose scores have ties, whose objects touch edges and each other's corners"
    rng = np.random.default_rng(seed)
    mask = (ndimage.gaussian_filter(rng.normal(size=(side, side)), 1.2) > rng.uniform(0.05, 0.6)).astype(np.uint8)
    if seed % 3 == 0:
        mask[:] = 0
    logits = np.round(3 * ndimage.gaussian_filter(mask + rng.normal(size=mask.shape), 1) + rng.normal(-1, 1), 1)
    share_ignored = rng.choice([0, 0.1, 1], p=[.5, .4, .1])
    mask[rng.random(mask.shape) < share_ignored] = 255
    return logits.astype(np.float16), mask


def make_row(i, seed, **changes):
    "A row of evidence: tile number i, made from a seed"
    logits, mask = make_tile(seed)
    identity = dict(tile_id=f't{i:03}', split='val', region='AB'[i % 2], block=f'b{i % 5}', pixel_size=3.)
    positive = bool((mask == 1).any())
    return identity | dict(positive=positive) | tile_evidence(logits, mask, THRESHOLDS) | changes


def counted_codes(evidence, sign):
    "Codes of all tiles, their counts, and the row of the tile of each; sign: pos or neg"
    return tuple(map(np.concatenate, zip(*evidence.histograms(sign), strict=True)))


def evidence_of(rows, **meta):
    return Evidence.from_rows(rows, **dict(thresholds=THRESHOLDS) | meta)


def make_evidence(seeds):
    return evidence_of([make_row(i, seed) for i, seed in enumerate(seeds)])


def components(mask, min_area=0):
    "The 8-connected objects of a mask, by SciPy, as masks"
    labels, n = ndimage.label(mask, np.ones((3, 3)))
    objects = [labels == k for k in range(1, n + 1)]
    return [one for one in objects if one.sum() >= min_area]


def in_small_groups(evidence, rows=3):
    "The same evidence in row groups of so many tiles, of which the first ones are in memory and the others in a file"
    keeper = GroupKeeper(SCHEMA)
    for table in in_groups(evidence.groups.tables(), rows):
        keeper.add(table)
    return Evidence(keeper.kept(), **evidence.meta)
