"Evidence and what is computed from it, against scikit-learn and against loops, on inputs that hypothesis makes up"
import errno
import json
import pickle
from io import BytesIO
from itertools import permutations
from tempfile import gettempdir

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from scipy.special import expit
from sklearn.metrics import average_precision_score, f1_score, jaccard_score, precision_score, recall_score

from helpers.evidence import (
    THRESHOLDS,
    evidence_of,
    in_small_groups,
    make_evidence,
    make_row,
    make_tile,
    quick,
    seeds,
)
from rtsseg.console import DataError
from rtsseg.evidence import FORMAT, HISTOGRAMS, IDENTITY, NESTED, Evidence, Meter, tile_evidence
from rtsseg.intervals import bootstrap, resample, summary
from rtsseg.metrics import (
    ap_bounds,
    average_precision,
    histogram,
    is_resolved,
    negative_weight,
    pixel_metrics,
    tile_counts,
    tile_weights,
)
from rtsseg.objects import grid_counts, informative_at
from rtsseg.operating import Replicates
from rtsseg.scores import CODES, decode, encode, first_code, tile_histograms

ratios = st.sampled_from(['native', 1, 3, 200, 1000])


def valid_pixels(seeds, evidence, ratio):
    "Truth, scores and weights of all valid pixels"
    tiles = [make_tile(seed) for seed in seeds]
    valid = [mask != 255 for _, mask in tiles]
    truth = np.concatenate([mask[v] == 1 for (_, mask), v in zip(tiles, valid)])
    scores = np.concatenate([logits[v] for (logits, _), v in zip(tiles, valid)]).astype(float)
    return truth, scores, np.repeat(tile_weights(evidence, ratio), [v.sum() for v in valid])


# ------------------------------------------------ pixels

@quick
@given(seeds, ratios)
def test_pixel_metrics_are_sklearns(seeds, ratio):
    evidence = make_evidence(seeds)
    truth, scores, weight = valid_pixels(seeds, evidence, ratio)
    hist = histogram(evidence, ratio)
    if not truth.any():
        assert np.isnan(average_precision(hist))
        assert np.isnan(summary(evidence, [ratio])[ratio]['pr_auc'])
        return
    theirs = average_precision_score(truth, scores, sample_weight=weight)
    assert average_precision(hist) == pytest.approx(theirs, abs=1e-9)
    metrics = dict(precision=precision_score, recall=recall_score, f1=f1_score, iou=jaccard_score)
    for threshold in (0.1, 0.5, 0.8):
        predicted = expit(scores) >= threshold
        ours = pixel_metrics(evidence, ratio, threshold)
        for name, metric in metrics.items():
            if name == 'precision' and not predicted.any():
                assert np.isnan(ours[name])
                continue
            theirs = metric(truth, predicted, sample_weight=weight, zero_division=0)
            assert ours[name] == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize('seed', range(12))
def test_shuffled_pixels_leave_the_same_histograms(seed):
    "Memory follows the number of codes, not that of pixels"
    logits, mask = make_tile(seed)
    order = np.random.default_rng(seed).permutation(mask.size)
    one = tile_histograms(logits, mask)
    shuffled = tile_histograms(logits.ravel()[order].reshape(mask.shape), mask.ravel()[order].reshape(mask.shape))
    large = tile_histograms(np.tile(logits, (5, 5)), np.tile(mask, (5, 5)))
    for sign in ('pos', 'neg'):
        codes, counts = one[f'{sign}_codes'], one[f'{sign}_counts']
        for other in (shuffled, large):
            assert np.array_equal(codes, other[f'{sign}_codes'])
        assert np.array_equal(counts, shuffled[f'{sign}_counts'])
        assert np.array_equal(25 * counts, large[f'{sign}_counts'])
        assert counts.nbytes == large[f'{sign}_counts'].nbytes


@quick
@given(seeds, ratios)
def test_pixels_know_no_place_and_tiles_no_number(seeds, ratio):
    "A region is its tiles alone; a tile that occurs twice is one that weighs 2"
    evidence = make_evidence(seeds)
    here = evidence['region'] == 'A'
    part = evidence.select(here)
    weight = here * np.where(evidence['positive'], 1, negative_weight(part, ratio))
    assert np.allclose(histogram(part, ratio), histogram(evidence, weight), rtol=1e-12, atol=0)
    twice = make_evidence(seeds + seeds)
    assert np.array_equal(histogram(twice), histogram(evidence, np.full(len(evidence), 2)))
    assert np.allclose(histogram(twice, ratio), 2 * histogram(evidence, ratio))


# ------------------------------------------------ merging

@quick
@given(seeds, st.randoms(use_true_random=False), st.integers(0, 7))
def test_merging_knows_no_order_and_no_repeats(seeds, random, cut):
    rows = [make_row(i, seed) for i, seed in enumerate(seeds)]
    whole = evidence_of(rows)
    parts = rows + rows[:2]
    random.shuffle(parts)
    a, b = evidence_of(parts[:cut]), evidence_of(parts[cut:])
    assert a + b == b + a == whole
    assert (a + b).hash == whole.hash
    assert a + a == a
    assert repr(summary(a + b, ['native', 200])) == repr(summary(whole, ['native', 200]))


def test_repeats_that_differ_in_the_last_bit_do_not_depend_on_order():
    one = make_row(0, 1)
    two = make_row(0, 2, positive=one['positive'])
    a, b = evidence_of([one, two]), evidence_of([two, one])
    assert len(a) == 1 and a == b
    with pytest.raises(ValueError, match='occurs twice'):
        evidence_of([one, one | dict(region='Z')])


# ------------------------------------------------ codes

half_precision = st.integers(0, CODES - 1).map(lambda bits: np.uint16(bits).view(np.float16))


@quick
@given(st.lists(half_precision, min_size=1, max_size=40))
def test_codes_keep_order_and_value(scores):
    "For every bit pattern: numbers, infinities, both zeros and all NaN"
    scores = np.array(scores)
    codes, numbers = encode(scores), scores[~np.isnan(scores)]
    assert np.array_equal(decode()[codes], scores.astype(float), equal_nan=True)
    lower = encode(numbers)[:, None] < encode(numbers)
    assert ((numbers[:, None] < numbers) == lower).all()
    assert (codes[np.isnan(scores)] == 0).all()


@quick
@given(st.floats(1e-6, 1 - 1e-6), st.sampled_from(['float16', (-9., 9.)]))
def test_a_threshold_is_the_first_score_at_or_above_it(threshold, bins):
    code, values = first_code(threshold, bins), decode(bins)
    assert code == CODES or expit(values[code]) >= threshold
    assert not (expit(values[1:code]) >= threshold).any()


# ------------------------------------------------ rounded scores

KINDS = dict(
    wide=lambda z: z,
    narrow=lambda z: -4.095 + 0.001 * np.tanh(z),
    near_zero=lambda z: 1e-9 * z,
    saturated=lambda z: 40 * np.tanh(z),
    ties=lambda z: np.round(z, 1)
)
kinds = st.sampled_from(list(KINDS))


@quick
@given(st.integers(0, 10_000), kinds, st.sampled_from(['float16', (-4., 4.), (-50., 50.)]))
def test_bounds_hold_for_single_precision(seed, kind, bins):
    rng = np.random.default_rng(seed)
    truth = rng.random(800) < rng.uniform(0.01, 0.5)
    truth[0] = True
    scores = KINDS[kind](rng.normal(size=800) + truth * rng.uniform(0, 2)).astype(np.float32)
    hist = np.stack([np.bincount(encode(scores[truth == label], bins), minlength=CODES) for label in (0, 1)])
    low, high = ap_bounds(hist)
    true, mixed = average_precision_score(truth, scores), average_precision(hist, exact=False)
    assert low - 1e-9 <= true <= high + 1e-9
    assert low <= average_precision(hist) + 1e-12
    assert low - 1e-12 <= mixed <= high + 1e-12
    if high - low <= 1e-4:
        assert mixed == pytest.approx(true, abs=1e-4)


def single_precision(seed, kind):
    "Scores of a made-up tile that half precision would round, and its mask"
    logits, mask = make_tile(seed)
    noise = np.random.default_rng(seed).normal(0, 0.1, logits.shape)
    return KINDS[kind](logits.astype(float) + noise).astype(np.float32), mask


@quick
@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=6), kinds, ratios)
def test_single_precision_is_within_its_bounds_and_another_pass_resolves_what_collapsed(seeds, kind, ratio):
    tiles = [single_precision(seed, kind) for seed in seeds]

    def seen(bins='float16'):
        rows = [make_row(i, seed) | tile_histograms(*tile, bins) for i, (seed, tile) in enumerate(zip(seeds, tiles))]
        return evidence_of(rows, bins=bins)

    first = seen()
    truth, _, weight = valid_pixels(seeds, first, ratio)
    if not truth.any():
        assert is_resolved(first, [ratio])
        return
    scores = np.concatenate([scores[mask != 255] for scores, mask in tiles])
    true = average_precision_score(truth, scores, sample_weight=weight)
    again = seen(first.score_range)
    for evidence in (first, again):
        hist = histogram(evidence, ratio)
        (low, high), value = ap_bounds(hist, evidence.exact), average_precision(hist, evidence.exact)
        assert low - 1e-9 <= min(true, value) and max(true, value) <= high + 1e-9
        resolved = is_resolved(evidence, [ratio])
        assert resolved == (evidence.exact or high - low <= 1e-4)
        if resolved:
            assert value == pytest.approx(true, abs=1e-4)
        assert evidence.score_range[0] <= scores.min() <= scores.max() <= evidence.score_range[1]
    if kind == 'narrow':
        assert not first.exact and again.exact
        assert value == pytest.approx(true, abs=1e-9)


@pytest.mark.parametrize('kind, bounded', [('wide', True), ('narrow', True), ('saturated', False)])
def test_a_million_single_precision_scores(kind, bounded):
    "Two passes bring PR-AUC within 1e-4, and its bounds where scores do not pile up at the ends of a wide range"
    rng, bins = np.random.default_rng(5), 'float16'
    truth = (rng.random((4, 500, 500)) < 0.01).astype(np.uint8)
    scores = KINDS[kind](rng.normal(size=truth.shape) + 2.5 * truth).astype(np.float32)
    true = average_precision_score(truth.ravel(), scores.ravel())
    for _ in range(2):
        rows = [make_row(i, 0) | tile_histograms(*tile, bins) for i, tile in enumerate(zip(scores, truth))]
        evidence = evidence_of(rows, bins=bins)
        low, high = ap_bounds(histogram(evidence), evidence.exact)
        assert low - 1e-9 <= true <= high + 1e-9
        bins = evidence.score_range
    assert is_resolved(evidence) == bounded
    assert average_precision(histogram(evidence), evidence.exact) == pytest.approx(true, abs=1e-4)


def test_all_orders_within_a_bin_lie_between_the_bounds_and_reach_them():
    "A bin of two positives and two negatives below a bin of one each"
    low, high = ap_bounds(np.array([[0, 2, 1], [0, 2, 1]]))
    orders = [order + top for order in set(permutations([0, 0, 1, 1])) for top in ((0, 1), (1, 0))]
    found = [average_precision_score(np.array(order), np.arange(6)) for order in orders]
    assert min(found) == pytest.approx(low)
    assert max(found) <= high
    positives_first_together = average_precision_score([0, 0, 1, 1, 0, 1], [0, 1, 2, 2, 4, 5])
    assert high == pytest.approx(positives_first_together)


# ------------------------------------------------ little, nothing, NaN

def test_empty_tiles_and_empty_evidence():
    empty = evidence_of([])
    assert len(empty) == 0 and empty + empty == empty
    assert np.isnan(summary(empty)[200]['pr_auc'])
    assert bootstrap(empty, replicates=5)[200]['iou'].value is None
    assert np.isnan(resample(empty, [200], replicates=3)[200]['pr_auc']).all()
    nothing = tile_evidence(np.zeros((4, 4)), np.full((4, 4), 255, np.uint8), THRESHOLDS)
    ignored = evidence_of([make_row(0, 1, positive=False) | nothing])
    assert ignored.top_code.tolist() == [0]
    assert negative_weight(ignored, 200) == 0
    assert histogram(ignored).sum() == 0
    assert make_evidence([1]) + empty == make_evidence([1])


def test_no_number_makes_every_metric_no_number():
    logits, mask = make_tile(1)
    logits[0, 0] = np.nan
    mask[0, 0] = 0
    evidence = evidence_of([make_row(0, 1) | tile_evidence(logits, mask, THRESHOLDS), make_row(1, 3)])
    for row in summary(evidence, ['native', 200]).values():
        assert all(np.isnan(row[name]) for name in ('pr_auc', 'pr_auc_low', 'iou', 'f1', 'precision', 'recall'))
    assert np.isnan(resample(evidence, [200], replicates=3)[200]['pr_auc']).all()


def test_no_pixel_size_is_equal_to_itself():
    rows = [make_row(i, i, pixel_size=float('nan')) for i in range(2)]
    a, b = evidence_of(rows), evidence_of(rows[::-1])
    assert a == b
    assert np.isnan(a['pixel_size']).all()


# ------------------------------------------------ the file

def as_stored(name, value):
    "A value of a row as Parquet gives it back"
    if name in NESTED:
        columns = {field: np.asarray(value[field], dtype).tolist() for field, dtype in NESTED[name].items()}
        return [dict(zip(columns, row)) for row in zip(*columns.values())]
    return np.asarray(value).tolist()


def test_file(tmp_path):
    evidence = make_evidence(range(6))
    path = evidence.write(tmp_path/'val.parquet')
    again = Evidence.read(path)
    assert again == evidence and again.hash == evidence.hash
    assert [p.name for p in tmp_path.iterdir()] == ['val.parquet']
    more = evidence_of([make_row(9, 9)])
    appended = (Evidence.read(path) + more).write(path)
    assert Evidence.read(appended) == evidence + more


def test_file_holds_what_was_seen(tmp_path):
    "For PyArrow and for pandas"
    path = make_evidence(range(6)).write(tmp_path/'val.parquet')
    table, frame = pq.read_table(path), pd.read_parquet(path).set_index('tile_id')
    for i in range(6):
        row = make_row(i, i)
        for name in [*IDENTITY, 'n_valid', *HISTOGRAMS, *NESTED]:
            want = as_stored(name, row[name])
            assert table[name][i].as_py() == want
            if name != 'tile_id':
                cell = frame.loc[f't{i:03}', name]
                assert (list(cell) if isinstance(want, list) else cell) == want


def test_another_format_is_refused(tmp_path):
    path = make_evidence(range(2)).write(tmp_path/'val.parquet')
    table = pq.read_table(path)
    old = json.loads(table.schema.metadata[b'rtsseg']) | dict(format=1)
    pq.write_table(table.replace_schema_metadata({b'rtsseg': json.dumps(old)}), path)
    with pytest.raises(ValueError, match=f'val.parquet holds no evidence of format {FORMAT}: 1'):
        Evidence.read(path)


def test_file_keeps_bins(tmp_path):
    path = evidence_of([make_row(0, 1)], bins=(-3., 3.)).write(tmp_path/'val.parquet')
    assert Evidence.read(path).bins == (-3., 3.)


@pytest.mark.parametrize('noise, level', [((0.7, 0.3), -6), ((1.5, 1.0), -5)], ids=['confident', 'speckled'])
def test_twenty_thousand_tiles_stay_under_200_MB(tmp_path, noise, level):
    "With objects at 19 thresholds: a few a tile, or as of a badly trained model some 2,500 specks"
    rng, thresholds, rows = np.random.default_rng(0), np.arange(1, 20) / 20, []

    def field(scale):
        return ndimage.zoom(rng.normal(size=(512 // scale, 512 // scale)), scale, order=1)

    for i in range(20):
        mask = np.zeros((512, 512), np.uint8)
        if i % 10 == 0:
            mask[100:180, 200:300] = 1
        slumps = 9 * ndimage.gaussian_filter(mask.astype(float), 4)
        logits = (slumps + noise[0] * field(8) + noise[1] * field(2) + level).astype(np.float16)
        identity = dict(tile_id=str(i), split='val', region='', block='', positive=i % 10 == 0, pixel_size=3.)
        rows.append(identity | tile_evidence(logits, mask, thresholds))
    evidence = evidence_of(rows, thresholds=thresholds)
    many = len(evidence.nested('predicted')) > 2000 * len(evidence)
    assert many == (level == -5)
    bytes_a_tile = evidence.write(tmp_path/'evidence').stat().st_size / len(evidence)
    assert bytes_a_tile * 20_000 < 200e6


# ------------------------------------------------ row groups

def all_answers(evidence):
    "What metrics, objects, thresholds and intervals read of evidence"
    areas = [0, 5]
    return [
        evidence.hash,
        evidence.pooled,
        evidence.top_code,
        tile_counts(evidence, 0.5),
        histogram(evidence, np.linspace(0, 1, len(evidence))),
        *[evidence.nested(name).to_numpy(float) for name in NESTED],
        evidence.nested('predicted', [0.5]).to_numpy(float),
        grid_counts(evidence, 0.3, areas),
        *[rows for found in informative_at(evidence, THRESHOLDS) for rows in found.values()],
        *[counts.toarray() for counts in Replicates(evidence, 10).counts],
        *resample(evidence, ['native', 2], replicates=20)[2].values(),
    ]

@quick
@given(seeds, st.integers(1, 3))
def test_evidence_in_a_file_answers_as_evidence_in_memory(seeds, rows):
    evidence = make_evidence(seeds + list(range(5)))
    filed = in_small_groups(evidence, rows)
    for found, expected in zip(all_answers(filed), all_answers(evidence), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert filed == evidence
    chosen = evidence['region'] == 'A'
    assert filed.select(chosen) == evidence.select(chosen)
    assert filed.select(~chosen) + filed.select(chosen) == evidence

def test_a_file_does_not_depend_on_the_groups_in_memory(tmp_path):
    evidence = make_evidence(range(20))
    paths = [found.write(tmp_path/f'{k}.parquet') for k, found in enumerate((evidence, in_small_groups(evidence)))]
    assert paths[0].read_bytes() == paths[1].read_bytes()

def many_tiles(n):
    "Evidence of so many tiles, made from seven seeds"
    rows = [make_row(0, seed) for seed in range(7)]
    return evidence_of([rows[i % 7] | dict(tile_id=f't{i:05}') for i in range(n)])

def test_a_large_file_is_read_group_by_group(tmp_path):
    evidence = many_tiles(1500)
    path = evidence.write(tmp_path/'val.parquet')
    found = Evidence.read(path)
    path.unlink()
    assert found == evidence
    assert found.hash == evidence.hash
    # an id that stands twice is found where its rows lie in different groups
    rows = evidence.table
    twice = pa.concat_tables([rows.slice(0, 1400), rows.slice(0, 10)])
    meta = pq.read_schema(many_tiles(3).write(tmp_path/'few.parquet')).metadata
    pq.write_table(twice.replace_schema_metadata(meta), path, row_group_size=256)
    with pytest.raises(DataError, match='stands twice'):
        Evidence.read(path)

def test_a_column_that_stands_twice_is_refused(tmp_path):
    table = pq.read_table(make_evidence(range(6)).write(tmp_path/'val.parquet'))
    pq.write_table(table.append_column('tile_id', table['tile_id']), tmp_path/'val.parquet')
    with pytest.raises(DataError, match="no column 'tile_id', or two"):
        Evidence.read(tmp_path/'val.parquet')

def test_columns_may_stand_in_another_order(tmp_path):
    evidence = make_evidence(range(6))
    table = pq.read_table(evidence.write(tmp_path/'val.parquet'))
    pq.write_table(table.select(table.column_names[::-1]), tmp_path/'val.parquet')
    assert Evidence.read(tmp_path/'val.parquet') == evidence

def test_a_row_beyond_the_last_one_is_not_selected():
    evidence = make_evidence(range(6))
    with pytest.raises(IndexError):
        evidence.select([6])
    assert evidence.select([-1])['tile_id'].tolist() == ['t005']

def test_a_full_folder_of_temporary_files_is_named(monkeypatch):
    class Full(BytesIO):
        def write(self, content):
            raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr('rtsseg.rowgroups.TemporaryFile', Full)
    with pytest.raises(OSError, match='No space left on device') as error:
        in_small_groups(make_evidence(range(20)))
    assert gettempdir() in str(error.value)
    assert 'TMPDIR' in str(error.value)

# ------------------------------------------------ the meter

def test_a_meter_of_many_tiles_keeps_them_in_a_file(monkeypatch):
    monkeypatch.setattr('rtsseg.evidence.GROUP_ROWS', 3)
    table = pd.DataFrame([make_row(i, i) for i in range(40)])[list(IDENTITY)]
    meters = [Meter(table, THRESHOLDS) for _ in range(2)]
    for i in range(40):
        logits, mask = make_tile(i)
        # two processes take turns
        meters[i % 2].update(logits[None], mask[None], [i])
    sent = pickle.loads(pickle.dumps(meters[1].state()))
    assert meters[0].merge([sent]).evidence() == make_evidence(range(40))

def test_meter_takes_every_float_and_any_process():
    evidence = make_evidence(range(4))
    table = pd.DataFrame({name: evidence[name] for name in IDENTITY})
    logits, masks = (torch.tensor(np.stack(x)) for x in zip(*map(make_tile, range(4))))
    for dtype in (torch.float16, torch.float32):
        meters = [Meter(table, THRESHOLDS) for _ in range(2)]
        for i in range(4):
            meters[i % 2].update(logits[i:i + 1, None].to(dtype), masks[i:i + 1].float(), torch.tensor([i]))
        assert meters[0].merge([meters[1].state()]).evidence() == evidence


@pytest.mark.parametrize('scores, exact', [
    (lambda logits: logits.bfloat16(), True),
    (lambda logits: logits.float() + 1e-4, False)
], ids=['bfloat16', 'single precision between halves'])
def test_meter_says_whether_scores_were_rounded(scores, exact):
    table = pd.DataFrame({name: make_evidence(range(4))[name] for name in IDENTITY})
    logits, masks = (torch.tensor(np.stack(x)) for x in zip(*map(make_tile, range(4))))
    meter = Meter(table)
    meter.update(scores(logits[:, None]), masks, torch.arange(4))
    assert meter.evidence().exact == exact


# ------------------------------------------------ how evidence shows itself

def test_evidence_shows_itself():
    evidence = make_evidence(range(1, 7))
    positive = evidence['positive'].sum()
    text = repr(evidence)
    assert f'{positive} positive and {6 - positive} negative tiles' in text
    assert f'{evidence["n_valid"].sum()} pixels' in text
    page = evidence._repr_html_()
    for name in ('A', 'B', 'all'):
        assert f'<th>{name}</th>' in page
    assert '<svg' in page


def test_evidence_of_nothing_shows_itself():
    assert 'no tile: 0 positive and 0 negative tiles' in repr(evidence_of([]))
    assert '<svg' not in evidence_of([])._repr_html_()


def test_names_in_evidence_are_not_markup():
    page = evidence_of([make_row(0, 1, region='<script>', split='<b>')])._repr_html_()
    assert '<script>' not in page and '<b>' not in page
