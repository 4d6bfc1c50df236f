"Evidence and what is computed from it, against scikit-learn and against loops, on inputs that hypothesis makes up"
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from scipy.special import expit
from sklearn.metrics import average_precision_score, f1_score, jaccard_score, precision_score, recall_score

from rtsseg import evidence as evidence_room
from rtsseg.evidence import Evidence, Meter, tile_evidence
from rtsseg.intervals import bootstrap, resample, summary
from rtsseg.scores import CODES, decode, encode, first_code, tile_histograms
from rtsseg.metrics import (
    ap_bounds, average_precision, histogram, informative_tiles, is_resolved, pixel_metrics, negative_weight, tile_weights
)

THRESHOLDS = (0.25, 0.5, 0.8)
quick = settings(max_examples=25, deadline=None)

def tile(seed, side=14, ignore=True):
    "A small tile whose scores have ties, whose objects touch edges and each other's corners"
    rng = np.random.default_rng(seed)
    mask = (ndimage.gaussian_filter(rng.normal(size=(side, side)), 1.2) > rng.uniform(0.05, 0.6)).astype(np.uint8)
    if seed % 3 == 0: mask[:] = 0
    logits = np.round(3 * ndimage.gaussian_filter(mask + rng.normal(size=mask.shape), 1) + rng.normal(-1, 1), 1)
    if ignore: mask[rng.random(mask.shape) < rng.choice([0, 0.1, 1], p=[.5, .4, .1])] = 255
    return logits.astype(np.float16), mask

def row(i, seed, **kw):
    logits, mask = tile(seed)
    return dict(tile_id=f't{i:03}', split='val', region='AB'[i % 2], block=f'b{i % 5}', positive=bool((mask == 1).any()), pixel_size=3.) | tile_evidence(logits, mask, THRESHOLDS) | kw

def make(seeds): return Evidence.from_rows([row(i, s) for i, s in enumerate(seeds)], thresholds=THRESHOLDS)

seeds = st.lists(st.integers(0, 10_000), min_size=1, max_size=8)
ratios = st.sampled_from(['native', 1, 3, 200, 1000])

def pixels(seeds, evidence, ratio):
    tiles = [tile(s) for s in seeds]
    valid = [m != 255 for _, m in tiles]
    return (np.concatenate([m[v] == 1 for (_, m), v in zip(tiles, valid)]), np.concatenate([l[v] for (l, _), v in zip(tiles, valid)]).astype(float),
            np.repeat(tile_weights(evidence, ratio), [v.sum() for v in valid]))

@quick
@given(seeds, st.integers(1, 3))
def test_telling_tiles_are_told_again_by_those_that_were_kept(seeds, n):
    "Evaluation keeps the tiles of several thresholds; at each of these the kept ones alone give the same choice, none twice"
    evidence = make(seeds); tell = lambda e, t: {k: list(e['tile_id'][rows]) for k, rows in informative_tiles(e, t, n).items()}
    whole = {t: tell(evidence, t) for t in THRESHOLDS}; kept = {i for found in whole.values() for ids in found.values() for i in ids}
    for t, found in whole.items():
        assert tell(evidence.select(np.array([i in kept for i in evidence['tile_id']], bool)), t) == found
        ids = sum(found.values(), []); assert len(set(ids)) == len(ids) and all(len(x) <= n for x in found.values())

@quick
@given(seeds, ratios)
def test_pixel_metrics_are_sklearns(seeds, ratio):
    e = make(seeds); y, z, w = pixels(seeds, e, ratio)
    hist = histogram(e, ratio)
    if not y.any():
        assert np.isnan(average_precision(hist)) and np.isnan(summary(e, [ratio])[ratio]['pr_auc'])
        return
    assert average_precision(hist) == pytest.approx(average_precision_score(y, z, sample_weight=w), abs=1e-9)
    for t in (0.1, 0.5, 0.8):
        guess = expit(z) >= t
        for k, f in dict(precision=precision_score, recall=recall_score, f1=f1_score, iou=jaccard_score).items():
            ours = pixel_metrics(e, ratio, t)[k]
            if k == 'precision' and not guess.any(): assert np.isnan(ours)
            else: assert ours == pytest.approx(f(y, guess, sample_weight=w, zero_division=0), abs=1e-9)

@quick
@given(seeds, ratios)
def test_pixels_know_no_place_and_tiles_no_number(seeds, ratio):
    "Shuffled pixels leave the same histograms; a region is its tiles alone; a tile that occurs twice is one that weighs 2; memory follows the codes"
    e = make(seeds)
    for s in seeds:
        logits, mask = tile(s); order = np.random.default_rng(s).permutation(mask.size)
        one, other, many = (tile_histograms(*x) for x in ((logits, mask), (logits.ravel()[order].reshape(mask.shape), mask.ravel()[order].reshape(mask.shape)), (np.tile(logits, (5, 5)), np.tile(mask, (5, 5)))))
        for k in ('pos_codes', 'neg_codes'): assert np.array_equal(one[k], other[k]) and np.array_equal(one[k], many[k])
        for k in ('pos_counts', 'neg_counts'): assert np.array_equal(one[k], other[k]) and np.array_equal(25 * one[k], many[k]) and one[k].nbytes == many[k].nbytes
    part, here = e.select(e['region'] == 'A'), e['region'] == 'A'
    assert np.allclose(histogram(part, ratio), histogram(e, np.where(here, np.where(e['positive'], 1, negative_weight(part, ratio)), 0)), rtol=1e-12, atol=0)
    twice = Evidence.from_rows([row(i, s) for i, s in enumerate(seeds + seeds)], thresholds=THRESHOLDS)
    assert np.array_equal(histogram(twice), histogram(e, np.full(len(e), 2))) and np.allclose(histogram(twice, ratio), 2 * histogram(e, ratio))

@quick
@given(seeds, st.randoms(use_true_random=False), st.integers(0, 7))
def test_merging_knows_no_order_and_no_repeats(seeds, random, cut):
    whole, rows = make(seeds), [row(i, s) for i, s in enumerate(seeds)]
    parts = rows + rows[:2]; random.shuffle(parts)
    a, b = (Evidence.from_rows(p, thresholds=THRESHOLDS) for p in (parts[:cut], parts[cut:]))
    assert a + b == b + a == whole and (a + b).hash == whole.hash and (a + a) == a
    assert summary(a + b, ['native', 200])[200].items() >= {k: v for k, v in summary(whole, [200])[200].items() if v == v}.items()

def test_repeats_that_differ_in_the_last_bit_do_not_depend_on_order():
    one, two = row(0, 1), row(0, 2, positive=row(0, 1)['positive'])
    a, b = (Evidence.from_rows(r, thresholds=THRESHOLDS) for r in ([one, two], [two, one]))
    assert len(a) == 1 and a == b
    with pytest.raises(ValueError, match='occurs twice'): Evidence.from_rows([one, one | dict(region='Z')])

@quick
@given(arrays(np.float16, 40, elements=st.floats(width=16, allow_nan=True, allow_infinity=True)))
def test_codes_keep_order_and_value(scores):
    codes, numbers = encode(scores), scores[~np.isnan(scores)]
    assert np.array_equal(decode()[codes], scores.astype(float), equal_nan=True)
    assert ((numbers[:, None] < numbers) == (encode(numbers)[:, None] < encode(numbers))).all()
    assert (codes[np.isnan(scores)] == 0).all()

KINDS = dict(wide=lambda z: z, narrow=lambda z: -4.095 + 0.001 * np.tanh(z), near_zero=lambda z: 1e-9 * z, saturated=lambda z: 40 * np.tanh(z), ties=lambda z: np.round(z, 1))

@quick
@given(st.integers(0, 10_000), st.sampled_from(list(KINDS)), st.sampled_from(['float16', (-4., 4.), (-50., 50.)]))
def test_bounds_hold_for_single_precision(seed, kind, bins):
    rng = np.random.default_rng(seed)
    y = rng.random(800) < rng.uniform(0.01, 0.5); y[0] = True
    z = KINDS[kind](rng.normal(size=800) + y * rng.uniform(0, 2)).astype(np.float32)
    hist = np.stack([np.bincount(encode(z[y == c], bins), minlength=CODES) for c in (0, 1)])
    low, high = ap_bounds(hist); true, mixed = average_precision_score(y, z), average_precision(hist, exact=False)
    assert low - 1e-9 <= true <= high + 1e-9 and low <= average_precision(hist) + 1e-12 and low - 1e-12 <= mixed <= high + 1e-12
    if high - low <= 1e-4: assert mixed == pytest.approx(true, abs=1e-4)

@quick
@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=6), st.sampled_from(list(KINDS)), ratios)
def test_single_precision_is_within_its_bounds_and_another_pass_resolves_what_collapsed(seeds, kind, ratio):
    def see(bins='float16'):
        return Evidence.from_rows([row(i, s) | tile_histograms(z, m, bins) for i, (s, z, m) in enumerate(tiles)], thresholds=THRESHOLDS, bins=bins)
    tiles = [(s, KINDS[kind](l.astype(float) + np.random.default_rng(s).normal(0, 0.1, l.shape)).astype(np.float32), m) for s in seeds for l, m in [tile(s)]]
    first = see()
    if not any((m == 1).any() for _, _, m in tiles): assert is_resolved(first, [ratio]); return
    again = see(first.score_range)
    y, _, w = pixels(seeds, first, ratio); z = np.concatenate([z[m != 255] for _, z, m in tiles]); true = average_precision_score(y, z, sample_weight=w)
    for e in (first, again):
        (low, high), value = ap_bounds(histogram(e, ratio), e.exact), average_precision(histogram(e, ratio), e.exact)
        assert low - 1e-9 <= min(true, value) and max(true, value) <= high + 1e-9 and is_resolved(e, [ratio]) == (e.exact or high - low <= 1e-4)
        if is_resolved(e, [ratio]): assert value == pytest.approx(true, abs=1e-4)
        assert e.score_range[0] <= z.min() <= z.max() <= e.score_range[1]
    if kind == 'narrow': assert not first.exact and again.exact and value == pytest.approx(true, abs=1e-9)

@pytest.mark.parametrize('kind, bounded', [('wide', True), ('narrow', True), ('saturated', False)])
def test_a_million_single_precision_scores(kind, bounded):
    "Two passes bring PR-AUC within 1e-4, and where scores do not pile up at the ends of a wide range its bounds too"
    rng, bins = np.random.default_rng(5), 'float16'
    y = (rng.random((4, 500, 500)) < 0.01).astype(np.uint8)
    z = KINDS[kind](rng.normal(size=y.shape) + 2.5 * y).astype(np.float32)
    for _ in range(2):
        e = Evidence.from_rows([row(i, 0) | tile_histograms(*t, bins) for i, t in enumerate(zip(z, y))], thresholds=THRESHOLDS, bins=bins)
        bins, true = e.score_range, average_precision_score(y.ravel(), z.ravel())
        low, high = ap_bounds(histogram(e), e.exact)
        assert low - 1e-9 <= true <= high + 1e-9
    assert is_resolved(e) == bounded and average_precision(histogram(e), e.exact) == pytest.approx(true, abs=1e-4)

def test_all_orders_within_a_bin_lie_between_the_bounds_and_reach_them():
    from itertools import permutations
    hist, found = np.array([[0, 2, 1], [0, 2, 1]]), []
    for order in set(permutations([0, 0, 1, 1])):
        for top in ((0, 1), (1, 0)):
            y = np.array(order + top)
            found.append(average_precision_score(y, np.arange(6)))
    low, high = ap_bounds(hist)
    assert min(found) == pytest.approx(low) and max(found) <= high
    assert high == pytest.approx(average_precision_score([0, 0, 1, 1, 0, 1], [0, 1, 2, 2, 4, 5]))

def test_empty_tiles_and_empty_evidence():
    e = Evidence.from_rows([], thresholds=THRESHOLDS)
    assert len(e) == 0 and e + e == e and np.isnan(summary(e)[200]['pr_auc']) and bootstrap(e, replicates=5)[200]['iou'].value is None
    assert np.isnan(resample(e, [200], replicates=3)[200]['pr_auc']).all()
    ignored = Evidence.from_rows([row(0, 1) | tile_evidence(np.zeros((4, 4)), np.full((4, 4), 255, np.uint8), THRESHOLDS) | dict(positive=False)], thresholds=THRESHOLDS)
    assert ignored.top_code.tolist() == [0] and negative_weight(ignored, 200) == 0 and histogram(ignored).sum() == 0
    assert make([1]) + e == make([1])

def test_no_number_makes_every_metric_no_number():
    logits, mask = tile(1); logits[0, 0] = np.nan; mask[0, 0] = 0
    e = Evidence.from_rows([row(0, 1) | tile_evidence(logits, mask, THRESHOLDS), row(1, 3)], thresholds=THRESHOLDS)
    s = summary(e, ['native', 200])
    assert all(np.isnan(s[r][k]) for r in s for k in ('pr_auc', 'pr_auc_low', 'iou', 'f1', 'precision', 'recall'))
    assert np.isnan(resample(e, [200], replicates=3)[200]['pr_auc']).all()

def test_no_pixel_size_is_equal_to_itself():
    rows = [row(i, i, pixel_size=float('nan')) for i in range(2)]
    a, b = (Evidence.from_rows(r, thresholds=THRESHOLDS) for r in (rows, rows[::-1]))
    assert a == b and np.isnan(a['pixel_size']).all()

def test_file(tmp_path):
    import json, pandas as pd, pyarrow.parquet as pq
    e = make(range(6)); path = e.write(tmp_path/'val.parquet')
    again = Evidence.read(path)
    assert again == e and again.hash == e.hash and [p.name for p in tmp_path.iterdir()] == ['val.parquet']
    more = Evidence.from_rows([row(9, 9)], thresholds=THRESHOLDS)
    assert Evidence.read((Evidence.read(path) + more).write(path)) == e + more                       # appended
    frame, table = pd.read_parquet(e.write(path)).set_index('tile_id'), pq.read_table(path)
    for i in range(6):
        seen = row(i, i)
        for k, v in seen.items():
            if k in evidence_room.NESTED: want = [dict(zip(v, x)) for x in zip(*(np.asarray(c, evidence_room.NESTED[k][f]).tolist() for f, c in v.items()))]
            elif k in ('exact', 'tile_id'): continue
            else: want = np.asarray(v).tolist()
            assert table[k][i].as_py() == want and (list(frame.loc[f't{i:03}', k]) if isinstance(want, list) else frame.loc[f't{i:03}', k]) == want
    old = json.loads(table.schema.metadata[b'rtsseg']) | dict(format=1)
    pq.write_table(table.replace_schema_metadata({b'rtsseg': json.dumps(old)}), path)
    with pytest.raises(ValueError, match=f'val.parquet holds no evidence of format {evidence_room.FORMAT}: 1'): Evidence.read(path)
    assert Evidence.from_rows([row(0, 1)], thresholds=THRESHOLDS, bins=(-3., 3.)).write(path) and Evidence.read(path).bins == (-3., 3.)

@pytest.mark.parametrize('noise, level', [((0.7, 0.3), -6), ((1.5, 1.0), -5)], ids=['confident', 'speckled'])
def test_twenty_thousand_tiles_stay_under_200_MB(tmp_path, noise, level):
    "With objects at 19 thresholds: a few a tile, or as of a badly trained model some 2,500 specks"
    rng, rows = np.random.default_rng(0), []
    for i in range(20):
        field = lambda k: ndimage.zoom(rng.normal(size=(512 // k, 512 // k)), k, order=1)
        mask = np.zeros((512, 512), np.uint8)
        if i % 10 == 0: mask[100:180, 200:300] = 1
        logits = (9 * ndimage.gaussian_filter(mask.astype(float), 4) + noise[0] * field(8) + noise[1] * field(2) + level).astype(np.float16)
        rows.append(dict(tile_id=str(i), split='val', region='', block='', positive=i % 10 == 0, pixel_size=3.) | tile_evidence(logits, mask, np.arange(1, 20) / 20))
    e = Evidence.from_rows(rows, thresholds=np.arange(1, 20) / 20)
    assert (len(e.nested('predicted')) > 2000 * len(e)) == (level == -5)
    assert e.write(tmp_path/'e').stat().st_size / 20 * 20_000 < 200e6

def test_meter_takes_every_float_and_any_process(tmp_path):
    import pandas as pd, torch
    e = make(range(4)); table = pd.DataFrame({k: e[k] for k in evidence_room.IDENTITY})
    logits, masks = (np.stack(x) for x in zip(*map(tile, range(4))))
    for kind in (torch.float16, torch.float32):
        meters = [Meter(table, THRESHOLDS) for _ in range(2)]
        for i in range(4): meters[i % 2].update(torch.tensor(logits[i:i + 1, None]).to(kind), torch.tensor(masks[i:i + 1]).float(), torch.tensor([i]))
        assert meters[0].merge(meters[1].state()).evidence() == e
    m = Meter(table); m.update(torch.tensor(logits[:, None]).bfloat16(), torch.tensor(masks), torch.arange(4)); assert m.evidence().exact
    m = Meter(table); m.update(torch.tensor(logits[:, None]).float() + 1e-4, torch.tensor(masks), torch.arange(4)); assert not m.evidence().exact

@quick
@given(st.floats(1e-6, 1 - 1e-6), st.sampled_from(['float16', (-9., 9.)]))
def test_a_threshold_is_the_first_score_at_or_above_it(p, bins):
    c = first_code(p, bins); values = decode(bins)
    assert (c == CODES or expit(values[c]) >= p) and not (expit(values[1:c]) >= p).any()
