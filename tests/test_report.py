"The report: its numbers by other libraries, its page in a browser, its errors from a shell"
import base64
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
from urllib.parse import unquote

import cv2
import mistune
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from matplotlib.figure import Figure
from PIL import Image
from scipy import ndimage
from scipy.special import expit, logit
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, precision_recall_curve

import rtsseg.figures
from helpers.browser import Cells, in_browser, opened
from helpers.by_hand import Split, band_iou, nearest, read_pixel_run
from helpers.runs import toy_world
from helpers.shell import shell
from rtsseg.bootstrap import Estimate
from rtsseg.calibration import HeldOut, calibrate_evidence, show_calibration
from rtsseg.cli import rtsseg_report
from rtsseg.config import CurriculumRow, load, to_yaml
from rtsseg.evidence import Evidence, Meter, evidence_path
from rtsseg.figures import gallery
from rtsseg.files import check_seal, seal_model, write_atomic
from rtsseg.invented import invent_run
from rtsseg.manifest import read_manifest, write_manifest
from rtsseg.objects import PIXEL_CLASSES, match_objects
from rtsseg.operating import selection_rule
from rtsseg.page import BLANK, Bullets, Letters, Table, Text, markdown_text
from rtsseg.pixel_report import headline_warnings
from rtsseg.pixel_results import pixel_results
from rtsseg.reporting import card_results, collect, report, tables
from rtsseg.results import ReportError, read_results, read_run
from rtsseg.runs import judge_run, run_config
from rtsseg.shared import training_figure
from rtsseg.tables import (
    METRICS,
    Several,
    false_alarms_table,
    match_settings,
    misses_table,
    region_table,
    size_table,
    slumps_tables,
    threshold_cell,
)
from rtsseg.toy import tiny_toy
from rtsseg.verdict import KINDS, Findings, findings, mapping_verdict

HOSTILE = '<script>alert(1)</script>&"\''

RATIOS = {1: '1:1 (balanced)', 200: '1:200'}

# a PNG of one pixel
EMPTY_PICTURE = cv2.imencode('.png', np.zeros((1, 1), np.uint8))[1].tobytes()

# ---------------------------------------------------------------- invented runs

@pytest.fixture(scope='module')
def cfg(tmp_path_factory):
    "A config for a world in which a region has a hostile name"
    root = tmp_path_factory.mktemp('report')
    table = read_manifest(toy_world(root)).table
    table['region'] = table.region.where(table.region != table.region[0], HOSTILE)
    world = read_manifest(write_manifest(table, root/'hostile.csv'))
    metrics = dict(ratios=list(RATIOS), replicates=50, object_thresholds=[.25, .5, .75])
    return load(name='r', runs=root/'runs', data=dict(manifest=world.path, tile_size=64), epochs=2, metrics=metrics,
                calibrate=dict(ratio=1, target_precision=.5))

def make_run(cfg, **more):
    "An invented run whose environment is hostile too"
    made = invent_run(cfg, read_manifest(cfg.data.manifest), **more)
    path = made.folder/'environment.json'
    environment = json.loads(path.read_text()) | dict(system='<b>Linux', git_clean=False)
    write_atomic(path, json.dumps(environment))
    return made

def of_seed(cfg, seed, **more):
    return cfg.model_copy(update=dict(seed=seed) | more)

@pytest.fixture(scope='module')
def runs(cfg):
    "Two seeds"
    return [make_run(of_seed(cfg, seed)) for seed in (42, 43)]

@pytest.fixture(scope='module')
def folders(runs):
    return [made.folder for made in runs]

@pytest.fixture(scope='module')
def single(folders):
    "The report of the first run, for tests that only read it"
    return report(folders[0])

@pytest.fixture(scope='module')
def both(folders, single):
    "The report of both seeds"
    return report(folders)

@pytest.fixture
def folder(folders, tmp_path):
    "A copy of the first run folder, to change"
    return shutil.copytree(folders[0], tmp_path/'r'/'h'/'seed42')

@pytest.fixture
def undrawn(monkeypatch):
    "Pages of this test have empty pictures: they are made in a third of the time"
    monkeypatch.setattr(rtsseg.figures, 'tile_figure', lambda *arguments: Figure((1, 1)))
    monkeypatch.setattr(Figure, 'savefig', lambda self, out, **options: out.write(EMPTY_PICTURE))

def pixel_numbers(*folders):
    "Results of one configuration, with evidence"
    results, = read_results(folders)
    return pixel_results(results)

def rewrite(path, change):
    "Change the text of a file"
    path.write_text(change(path.read_text()))

# ---------------------------------------------------------------- numbers by other libraries

def agree(frame, want, w):
    "A column of a table and what others found; blank only where the split cannot support a number"
    assert set(want) <= set(frame.index)
    must_show = want if w <= 1 else [name for name in want if 'recall' in name]
    assert sum(frame[name] is not None for name in want) >= len(must_show)
    for name, value in want.items():
        if frame[name] is not None:
            assert frame[name] == pytest.approx(value, abs=1e-9), name

def object_metrics(split, iou):
    "Metrics of objects at the threshold of the split's ratio"
    tp, fp, fn = split.tile @ split.objects(split.grid, iou)
    values = dict(precision=tp / (tp + fp), recall=tp / (tp + fn), F1=2 * tp / (2 * tp + fp + fn))
    return {f'object {name} (IoU {iou:g})': value for name, value in values.items()}

@pytest.mark.parametrize('ratio', RATIOS)
def test_headline_by_other_libraries(runs, single, ratio):
    split = Split(runs[0], ratio)
    head, loose = single.tables['Headline']
    frame, w = head.frame[RATIOS[ratio]], split.w
    want = {'PR-AUC': split.average_precision(), **split.pixels(split.cut), **object_metrics(split, .3)}
    want |= {f'boundary IoU, {width} px': band_iou(split, width) for width in (2, 3)}
    assert len(want) == len(METRICS) + 5
    agree(frame, want, w)
    for iou in (.1, .5):
        agree(loose.frame[RATIOS[ratio]], object_metrics(split, iou), w)
    assert frame['weight w of a tile without'] == pytest.approx(w)
    assert frame['slump pixels at this ratio'] == pytest.approx(100 * np.average(split.y, weights=split.each))
    probability = expit(split.cut * split.calibration.slope + split.calibration.intercept)
    assert frame['probability threshold'] == pytest.approx(probability)
    blank = [cell for row in head.rows for cell in row if getattr(cell, 'value', 0) is None]
    assert all('of the 30 negative tiles' in cell.why for cell in blank)
    assert w <= 1 or blank

def test_bounds_hold(runs):
    "The bound in a blank cell is not below the number that it replaces"
    split = Split(runs[0], 200)
    found = pixel_numbers(runs[0].folder).headline[200]
    want = dict(pr_auc=split.average_precision())
    want |= {name.lower().removesuffix('_rts'): value for name, value in split.pixels(split.cut).items()}
    for name, value in want.items():
        if found[name].value is None:
            assert found[name].high >= value
        else:
            assert value == pytest.approx(found[name].value)

def object_lengths(split):
    "Longest sides of the true objects, metres"
    lengths = []
    for mask, metres in zip(split.masks, split.metres, strict=True):
        labels, n = ndimage.label(mask == 1, np.ones((3, 3)))
        for i in range(1, n + 1):
            y, x = np.nonzero(labels == i)
            corners = [(a + dx, b + dy) for a, b in zip(x, y, strict=True) for dx in (0, 1) for dy in (0, 1)]
            sides = cv2.minAreaRect(np.float32(corners))[1]
            lengths.append(metres * max(sides))
    return lengths

def test_regions_by_other_libraries(runs, single):
    "At the threshold of the fit, from the pixels"
    split = Split(runs[0], 1)
    region, = single.tables['Regions']
    counts = split.objects(split.grid)
    assert set(region.frame.index) == set(split.region)
    for name, row in region.frame.iterrows():
        here = split.region == name
        pixels = here[split.of]
        n_pos, n_neg = split.positive[here].sum(), (~split.positive[here]).sum()
        split.weigh(n_pos / n_neg)
        found = split.pixels(split.cut, pixels)
        want = {'w': n_pos / n_neg, 'PR-AUC': split.average_precision(pixels), 'precision': found['precision'],
                'recall': found['recall']}
        assert {key: row[key] for key in want} == pytest.approx(want)
        assert [row[key] for key in ('slumps found', 'false objects', 'missed')] == list(counts[here].sum(0))
        assert (row['tiles with'], row['without']) == (n_pos, n_neg)

def test_objects_by_other_libraries(runs, single):
    "Sizes, misses and false alarms at the threshold of the fit"
    split = Split(runs[0], 1)
    sizes, missed, false = single.tables['Objects']
    counts = split.objects(split.grid)
    by_length = np.histogram(object_lengths(split), [0, 50, 200, 1000, np.inf])[0]
    assert list(sizes.frame.slumps) == list(by_length)
    assert sizes.frame.found.sum() == counts[:, 0].sum()
    assert missed.frame.slumps.sum() == counts[:, 2].sum()
    assert missed.frame[list(sizes.frame.index)].to_numpy().sum() == counts[:, 2].sum()
    rows = [row for row in false.rows if len(row) > 1]
    in_positive, in_negative = counts[split.positive, 1].sum(), counts[~split.positive, 1].sum()
    assert rows[-1][1:3] == [in_positive, in_negative]
    assert rows[-1][3].value == pytest.approx(split.tile @ counts[:, 1])
    for name in set(split.region):
        assert [row[1] + row[2] for row in rows if row[0] == name] == [counts[split.region == name, 1].sum()]
    # by size, by region, by confidence, and all
    assert sum(row[1] + row[2] for row in rows) == 4 * (in_positive + in_negative)

def test_sizes_are_in_pixels_where_nothing_is_known_of_the_ground(runs):
    "Without a CRS no metre is made up: classes, notes and findings are of pixels, and nothing is of unknown size"
    run, split = read_pixel_run(runs[0].folder), Split(runs[0], 1)
    seen = run.evidence['test']
    nowhere = pa.array(np.full(len(seen), np.nan))
    at = seen.table.column_names.index('pixel_size')
    run.evidence['test'] = Evidence(seen.table.set_column(at, 'pixel_size', nowhere), **seen.meta)
    sizes, missed, false = (table(run, 'test') for table in (size_table, misses_table, false_alarms_table))
    split.metres = np.ones(len(seen))
    edges = [0, *(high for _, high in PIXEL_CLASSES.values())]
    assert list(sizes.frame.slumps) == list(np.histogram(object_lengths(split), edges)[0])
    assert list(sizes.frame.index) == list(PIXEL_CLASSES) == missed.head[2:6]
    said = f'{sizes}{missed}{false}{findings(run, "test").markdown(str)}'
    assert 'in pixels (px)' in said
    assert not re.search(r'\d k?m\b|unknown', said)

def test_regions_are_at_the_ratio_too(runs):
    "At 1:200 a number that rests on fewer than 30 negative tiles is a bound, and the bound holds; recall is a number"
    run, split = read_pixel_run(runs[0].folder), Split(runs[0], 200)
    run.calibration = run.calibration.model_copy(update=dict(ratio=200))
    for name, n_pos, n_neg, w, pr_auc, precision, recall, *_ in region_table(run, 'test').rows:
        pixels = (split.region == name)[split.of]
        split.weigh(w.value)
        want = split.pixels(split.cut, pixels)
        assert w.value == pytest.approx(200 * n_pos / n_neg)
        assert w.value > 1 and n_neg < 30
        assert recall.value == pytest.approx(want['recall'])
        for cell, value in ((pr_auc, split.average_precision(pixels)), (precision, want['precision'])):
            assert cell.value is None
            assert 'of the 30 negative tiles that are needed' in cell.why
            assert cell.high >= value - 1e-12

@pytest.mark.parametrize('ratio', RATIOS)
def test_operating_points_of_objects_by_hand(runs, single, ratio):
    "On validation and on test: precision, and the share that is found of all slumps, small ones too"
    run, calibration = read_pixel_run(runs[0].folder), runs[0].calibration
    frame = single.tables['Operating point'][1].frame
    points = {'best floor': calibration.objects[ratio], 'floor of the tables': calibration.object_thresholds[ratio]}
    columns = dict(val=('of all', 'object precision'), test=('of all on test', 'precision on test'))
    for label, point in points.items():
        row = frame.loc[f'{RATIOS[ratio]}, {label}']
        for name, (share, precision) in columns.items():
            split = Split(runs[0], ratio, name)
            threshold = nearest(run.evidence[name].thresholds, point.raw_threshold)
            tp, fp, _ = split.tile @ split.objects(threshold, .3, point.min_area)
            slumps = split.objects(threshold)[:, [0, 2]].sum()
            assert row[share] == pytest.approx(tp / slumps)
            if pd.isna(row[precision]):
                assert split.w > 1
            else:
                assert row[precision] == pytest.approx(tp / (tp + fp))
    assert calibration.objects[1].min_area > 0
    assert frame['of all'].iloc[0] <= frame['object recall'].iloc[0]

def test_regions_have_their_thresholds_or_a_reason(folder):
    run = read_pixel_run(folder)
    few = tables(folder)['Operating point'][2]
    assert set(few.frame.index) == set(run.evidence['val']['region'])
    assert all('30 are needed: global thresholds' in row[2].why and row[2].value is None for row in few.rows)

    judge_run(folder, ['calibrate.min_region_positives=1'])
    calibration = calibrate_evidence(run.evidence['val'], run_config(folder).calibrate, run.cfg.metrics)
    calibration.save(folder/'model'/'calibration.json')
    own = tables(folder)['Operating point'][2]
    want, missing = [], {}
    for name, region in calibration.regions.items():
        if len(region.thresholds) < 2:
            missing[name] = region.why
        for ratio, point in region.thresholds.items():
            objects = region.objects[ratio]
            want.append([name, point.threshold, point.precision.value, point.recall.value, objects.threshold,
                         objects.min_area, objects.share.value])
    found = [row for row in own.rows if row[2].value is not None]
    columns = [[row[0], *(row[i].value for i in (2, 3, 4, 5)), row[6], row[8].value] for row in found]
    assert columns == want != []
    assert {row[0]: row[2].why for row in own.rows if row[2].value is None} == missing

def test_calibration_by_other_libraries(runs, single):
    made, c = runs[0], runs[0].calibration
    both_fits, prior = c.fits['slope_intercept'], c.fits['temperature_intercept']
    ways = {'scores as they are': (1, 0, 0), 'temperature': (1 / c.temperature, 0, 0),
            'slope and intercept': (both_fits.slope.value, both_fits.intercept.value, 0),
            'temperature and intercept': (prior.slope.value, prior.intercept.value, 0),
            'the used one, shifted': (c.slope, c.intercept, 1)}
    fitted = Split(made, c.ratio, 'val')
    there = logit(np.average(fitted.y, weights=fitted.each))
    split, seen = None, 0
    for row in single.tables['Calibration'][1].rows:
        if len(row) == 1:
            split = Split(made, int(row[0].split()[0].removeprefix('1:')), 'val')
            continue
        slope, intercept, shift = ways[row[0]]
        here = logit(np.average(split.y, weights=split.each))
        p = expit(slope * split.s + intercept + shift * (here - there))
        which = np.minimum((p * 15).astype(int), 14)
        gaps = [abs((split.each * (p - split.y))[which == i].sum()) for i in range(15)]
        want = [split.each @ p / (split.each @ split.y), log_loss(split.y, p, sample_weight=split.each),
                sum(gaps) / split.each.sum(),
                brier_score_loss(split.y, p, sample_weight=split.each)]
        assert [cell.value for cell in row[2:]] == pytest.approx(want, abs=1e-9), row[0]
        seen += 1
    assert seen == len(ways) * len(RATIOS)

@pytest.mark.parametrize('ratio', RATIOS)
def test_every_stop_of_the_slider(runs, single, ratio):
    run, split = read_pixel_run(runs[0].folder), Split(runs[0], ratio)
    _, pixels, objects = single.tables['Threshold']
    rows = [row for row in pixels.rows if row[0] == RATIOS[ratio]]
    assert [row[1].value for row in rows] == pytest.approx(logit(run.evidence['test'].thresholds), abs=.01)
    for _, score, p, precision, recall in rows:
        want = split.pixels(score.value)
        assert p.value == pytest.approx(split.calibration.probability(score.value))
        assert recall.value == pytest.approx(want['recall'])
        assert precision.value is None or precision.value == pytest.approx(want['precision'])
    rows = [row for row in objects.rows if row[0] == RATIOS[ratio] and row[1] in (0, 40)]
    for _, floor, raw, _, precision, recall, *counts in rows[::3]:
        tp, fp, fn = split.tile @ split.objects(raw.value, .3, floor)
        assert [cell.value for cell in counts] == pytest.approx([tp, fp, fn])
        assert np.isnan(recall.value) or recall.value == pytest.approx(tp / (tp + fn))
        assert precision.value is None or precision.value == pytest.approx(tp / (tp + fp))

@pytest.mark.parametrize('ratio', RATIOS)
def test_the_curve_by_another_library(runs, single, ratio):
    "It is read where another half per cent of the slump pixels is found"
    split = Split(runs[0], ratio)
    curve, = single.tables['Precision and recall']
    column = curve.head.index(RATIOS[ratio])
    positive = -np.sort(-split.s[split.y])
    steps = np.unique(positive[np.ceil(np.arange(1, 201) / 200 * len(positive) - 1e-6).astype(int) - 1])
    found = {step: np.mean(positive >= step) for step in steps}
    for row in curve.rows:
        score = max(step for step, recall in found.items() if recall >= row[0].value - 1e-9)
        precision, cell = split.pixels(score)['precision'], row[column]
        if cell.value is None:
            assert cell.high >= precision - 1e-9
        else:
            assert cell.value == pytest.approx(precision)
    best = precision_recall_curve(split.y, split.s, sample_weight=split.each)[0].max()
    assert all(row[column].value is None or row[column].value <= best + 1e-9 for row in curve.rows)

def test_estimators_are_of_one_seed(single, both):
    "What is counted w times and what is drawn are both of the seed that is shown, not of the mean"
    text = both.path.read_text()
    frame = single.tables['Validation'][0].frame['1:1 (balanced)']
    for name in ('pr_auc', 'iou'):
        label = METRICS[name]
        other_cells = '<td>[^<]*</td>' * 2
        shown = re.search(rf'<td>{label}</td><td>1:1 \(balanced\)</td>{other_cells}<td>([^<]*)</td>', text)
        assert float(shown[1]) == pytest.approx(frame[label], abs=5.1e-4)

def test_the_gap_between_ratios_by_another_library(runs, single):
    """What prevalence alone explains: scikit-learn at 1:1, each negative pixel weighed so often that the prevalence is
    that of 1:200"""
    table = next(t for t in single.tables['Validation'] if t.title.startswith('The gap'))
    balanced, rare = (Split(runs[0], 1, 'val'), Split(runs[0], 200, 'val'))
    row = table.rows[[row[0] for row in table.rows].index('1:200')]
    seen = dict(zip(table.head[1:], (cell.value for cell in row[1:])))
    assert seen['PR-AUC at 1:1'] == pytest.approx(balanced.average_precision(), abs=1e-9)
    often = rare.each[~rare.y].sum() / balanced.each[~balanced.y].sum()
    each = balanced.each * np.where(balanced.y, 1, often)
    expected = average_precision_score(balanced.y, balanced.s, sample_weight=each)
    assert np.average(balanced.y, weights=each) == pytest.approx(np.average(rare.y, weights=rare.each))
    assert seen['expected from it at this ratio'] == pytest.approx(expected, abs=1e-9)
    assert seen['by prevalence alone'] == pytest.approx(balanced.average_precision() - expected, abs=1e-9)
    # on so few tiles a number at 1:200 is blank
    assert (seen['rest'] is None) == (seen['PR-AUC'] is None) == (seen['gap'] is None)
    if seen['PR-AUC'] is not None:
        assert seen['rest'] == pytest.approx(expected - rare.average_precision(), abs=1e-9)

# ---------------------------------------------------------------- what a number rests on

def test_mean_and_spread(folders, single, both):
    each = [pixel_numbers(folder).headline[1] for folder in folders]
    found = pixel_numbers(*folders).headline[1]
    assert both.path == folders[0].parent/'report.html'
    assert single.path == folders[0]/'report.html'
    by_seed = [row for row in both.tables['Headline'][2].rows if len(row) > 1]
    for name, label in METRICS.items():
        values = [numbers[name].value for numbers in each]
        mean, std = np.mean(values), np.std(values, ddof=1)
        assert (found[name].value, found[name].std) == pytest.approx((mean, std))
        assert f'{mean:.3f} ± {std:.3f}' in str(both.headline)
        row = next(row for row in by_seed if row[0] == label)
        assert [cell.value for cell in row[1:]] == pytest.approx(values)
    assert 'one seed (42)' in str(single.headline)
    assert 'blocks hold positives, 10 are needed' in str(single.headline)
    for path in (both.path, *folders):
        assert os.path.relpath(path) in str(both)

def test_the_verdict_in_plain_words(folders):
    "A bound is called a bound, and what missed its target is not called chosen, nor a score a probability"
    results = pixel_numbers(*folders)
    row = results.headline[1]
    meaning = mapping_verdict(results).rows[0].meaning
    precision, recall = (100 * row[f'object_{name}_30'].value for name in ('precision', 'recall'))
    assert f'Of 100 predicted objects about {precision:.0f} are slumps' in meaning
    assert f'of 100 slumps about {recall:.0f} are found' in meaning
    row['object_precision_30'] = Estimate(None, high=.004)
    points = results.runs[1].calibration.thresholds
    points[1] = points[1].model_copy(update=dict(reached=False))
    held_out = {name: HeldOut(nll=Estimate(.1), excess=Estimate(105.)) for name in results.first.calibration.fits}
    results.first.calibration = results.first.calibration.model_copy(update=dict(held_out=held_out))
    assert 'predicted objects at most 1 is a slump' in mapping_verdict(results).rows[0].meaning
    missed, probability = headline_warnings(results)
    assert 'No threshold reached the target precision of 0.5 on validation (seed 43)' in missed
    assert 'not calibrated: they rank pixels, but sum to about 105 times the true area' in probability

@pytest.mark.parametrize('precision, recall, kind', [(.8, .6, 'fit'), (.8, .4, 'review'), (.3, .9, 'review'),
                                                     (.004, .9, 'unfit'), (None, .9, 'unfit')])
def test_the_verdict_follows_from_the_numbers(folders, precision, recall, kind):
    results = pixel_numbers(folders[0])
    bound = Estimate(None, high=.004) if precision is None else Estimate(precision)
    results.headline[200] |= dict(object_precision_30=bound, object_recall_30=Estimate(recall))
    results.first.calibration = results.first.calibration.model_copy(update=dict(n_neg_tiles=30))
    row = mapping_verdict(results).rows[list(RATIOS).index(200)]
    assert row.kind == kind
    assert row.words == f'{KINDS[kind]} at 1:200.'
    # one tile without a slump in validation chooses no threshold, and so makes nothing unusable
    results.first.calibration = results.first.calibration.model_copy(update=dict(n_neg_tiles=1))
    box = mapping_verdict(results)
    row = box.rows[list(RATIOS).index(200)]
    assert row.kind == ('unknown' if kind == 'unfit' else kind)
    if kind == 'unfit':
        assert '1 of the 30 tiles without a slump' in str(box)
        assert re.search(r'validation has \d+ and needs about 30', str(box))

def test_what_is_used_instead(folders):
    "A target that is missed on validation is named with its seed, and numbers stay with their ratio"
    missed = 'not reached on validation at 1:{ratio}: the best is {best}; the uncalibrated 0.5 is used'
    runs = [read_pixel_run(folder) for folder in folders]
    for run, best in zip(runs, ({1: '0.3', 200: '0.35'}, {1: '0.2', 200: '0.25'}), strict=True):
        points = run.calibration.thresholds
        for ratio in RATIOS:
            why = missed.format(ratio=ratio, best=best[ratio])
            points[ratio] = points[ratio].model_copy(update=dict(reached=False, raw_threshold=.5, logit=0., why=why))
    cells = [Several([threshold_cell(run, ratio) for run in runs]) for ratio in (200, 1)]
    own = [f'seed {run.seed}: {missed.format(ratio=1, best=best)}' for run, best in zip(runs, (0.3, 0.2), strict=True)]
    assert cells[1].why == '; '.join(own)
    table = str(Table(['a', 'b'], [['x', cell] for cell in cells]))
    assert 'seed 42: not reached on validation at 1:200, 1:1: the best is 0.35, 0.3; ' in table

def test_letters_of_footnotes():
    letters = Letters()
    found = [letters.of('x' * i) for i in range(1, 80)]
    assert found[25:28] == ['z', 'aa', 'ab']
    assert found[52] == 'ba'
    assert letters.line('x' * 28) == f'(ab) {"x" * 28}'

@pytest.mark.usefixtures('undrawn')
def test_a_footnote_with_a_letter_stands_once(folder):
    "On the page and in the Markdown; every mark has its footnote on the page, and the model card has all of its own"
    done = report(folder)
    page, text = done.path.read_text(), done.path.with_suffix('.md').read_text()
    notes = re.findall(r'<li id="(note-\d+-[a-z]+)">(.*?)</li>', page)
    assert len(dict(notes)) == len({note.split(' ', 1)[1] for _, note in notes}) == len(notes) > 1
    marks = re.findall(r'<a href="#(note-[^"]*)" title="([^"]*)">\(([a-z]+)\)</a>', page)
    assert len(marks) > len(notes)
    for name, title, letter in marks:
        assert dict(notes)[name] == f'({letter}) {title}'
    in_markdown = re.findall(r'^- (\([a-z]+\) .*)', text, re.M)
    assert in_markdown == [markdown_text(html.unescape(note)) for _, note in notes]
    for card in card_results(done.results[0], done.content.sections[0]).values():
        for letter in set(re.findall(r'\(([a-z])\) \|', card)):
            assert f'- ({letter}) ' in card

LOOKS = [
    ([], 'has no look'),
    ([(43, False)], 'has no look'),
    ([(42, False)], ''),
    ([(42, True)], 'was FORCED (seed 42)'),
    ([(42, False), (42, True)], 'was FORCED (seed 42)'),
]

@pytest.mark.usefixtures('undrawn')
@pytest.mark.parametrize('looks, says', LOOKS)
@pytest.mark.parametrize('beside', [True, False])
def test_the_head_tells_of_doubtful_looks(folder, cfg, tmp_path, looks, says, beside):
    "Lead and headline warn where the ledger, beside the run or where its config says, does not confirm a single look"
    rewrite(folder/'config.yaml', lambda text: text.replace(str(cfg.runs), str(tmp_path/'elsewhere')))
    rule = dict(config='h', rule=selection_rule(cfg, cfg.infer.views))
    ledger = dict(rule, looks=[dict(rule, when='', seed=seed, forced=forced) for seed, forced in looks])
    root = tmp_path if beside else tmp_path/'elsewhere'
    data = read_run(folder).environment['manifest_hash']
    write_atomic(root/'test_ledger.json', json.dumps({data: ledger}))
    done = report(folder)
    head = done.path.read_text().partition('<table>')[0]
    undoubted = not says
    assert ('on which nothing was chosen' in head) == undoubted == done.results[0].may_use_test
    assert ('<p class="hint">' in head) == (not undoubted)
    if says:
        assert head.count(says) == 2
        assert says in str(done)

def evidence_of(split, table, scores, bins='float16', views='none', thresholds=(.5,)):
    "Evidence of other scores on the tiles of a split"
    meter = Meter(table, thresholds, bins, views)
    meter.update(scores, split.masks, np.arange(len(scores)))
    return meter.evidence()

@pytest.mark.usefixtures('undrawn')
@pytest.mark.parametrize('bins', ['float16', (-400, 400)])
def test_rounded_scores_have_bounds(runs, single, folder, bins):
    "Scores off the grid: the report gives bounds, which hold scikit-learn's value, and names the grid"
    run, split = read_pixel_run(folder), Split(runs[0], 1)
    z = split.z / 40 + 100
    table, thresholds = run.manifest.of('test').table, run.evidence['test'].thresholds
    evidence_of(split, table, z, bins, thresholds=thresholds).write(evidence_path(folder, 'test'))
    shown = tables(folder)['Headline'][0].frame.loc['PR-AUC, bounds by rounding', '1:1 (balanced)']
    low, high = map(float, re.findall(r'[\d.]+', shown))
    exact = average_precision_score(split.y, z[split.masks != 255], sample_weight=split.each)
    assert low - 5e-5 <= exact <= high + 5e-5
    assert high - low > 1e-4
    page = report(folder).path.read_text()
    assert ('rounded to half precision' in page) == (bins == 'float16')
    assert ('65535 values from -400 to 400' in page) == (bins != 'float16')
    assert 'bounds by rounding' not in str(single.tables['Headline'][0])

@pytest.mark.usefixtures('undrawn')
def test_augmented_views_have_a_table(runs, folder):
    "Gain and cost of test-time augmentation where validation was evaluated in two ways, and no table where not"
    split = Split(runs[0], 1, 'val')
    rewrite(folder/'config.yaml', lambda text: text.replace('monitor: pr_auc@200', 'monitor: pr_auc@1'))
    run = read_pixel_run(folder)
    assert run.monitor == 'pr_auc@1'
    assert len(tables(folder)['Validation']) == 3
    better = (split.z + split.masks * (split.masks == 1)).astype(np.float16)
    evidence = evidence_of(split, run.manifest.of('val').table, better, views='minimal')
    evidence.write(evidence_path(folder, 'val', 'minimal'))
    n = len(better)
    with open(folder/'log.jsonl', 'a') as log:
        for views, seconds in (('none', 10.), ('minimal', 20.)):
            event = dict(event='evaluate', split='val', views=views, tiles=n, seconds=seconds)
            log.write(json.dumps(event) + '\n')
    table, = tables(folder)['Validation'][3:]
    one, many = (average_precision_score(split.y, s, sample_weight=split.each)
                 for s in (split.s, better.astype(float)[split.masks != 255]))
    assert table.frame.gain['minimal'] == pytest.approx(many - one)
    assert many > one
    assert table.frame['seconds per tile'].to_list() == pytest.approx([10 / n, 20 / n])
    assert 'test-time augmentation' in table.notes[-1]
    assert '<h3>Test-time augmentation</h3>' in report(folder).path.read_text()

@pytest.mark.usefixtures('undrawn')
@pytest.mark.parametrize('kind', ['no slump', 'slumps only', 'one tile'])
def test_a_split_that_supports_little(folder, kind):
    "A test split without positive tiles, without negative ones, or of one tile alone has a report with blanks"
    evidence = read_pixel_run(folder).evidence['test']
    rows = {'no slump': ~evidence['positive'], 'slumps only': evidence['positive'],
            'one tile': np.flatnonzero(evidence['positive'])[:1]}[kind]
    evidence.select(rows).write(evidence_path(folder, 'test'))
    with np.errstate(all='raise', under='ignore'):
        done = report(folder)
    frame = done.headline.frame
    if kind == 'no slump':
        assert frame.loc[['PR-AUC', 'recall']].isna().all(axis=None)
    else:
        assert (frame.loc['weight w of a tile without'] == 1).all()
        assert frame.loc['recall'].notna().all()
    text = re.sub(r'base64,[^"]*', '', done.path.read_text())
    assert 'nan' not in text.replace('nano', '')

@pytest.mark.usefixtures('undrawn')
def test_a_slump_in_several_tiles_is_counted_once(cfg, tmp_path):
    "Every positive tile of the split names the same slump and one of its own; without names nothing is shown"
    world = read_manifest(cfg.data.manifest)
    table = world.table
    table['uids'] = [f'one, {tile}' if positive else '' for tile, positive in zip(table.tile_id, table.positive)]
    named = read_manifest(write_manifest(table, cfg.data.manifest.with_name('named.csv')))
    # names are not among the content of the tiles
    assert named.hash == world.hash
    data = cfg.data.model_copy(update=dict(manifest=named.path))
    made = invent_run(cfg.model_copy(update=dict(runs=tmp_path, data=data)), named)
    run = read_pixel_run(made.folder)
    shown, = slumps_tables(run, 'test')
    truth = match_objects(run.evidence['test'], **match_settings(run)).truth
    tiles = truth.groupby('tile').match.agg(['size', lambda match: (match > 0).sum()]).to_numpy()
    alone = tiles[:, 1].clip(max=1)
    several, found = (tiles[:, 1] == 0) | (tiles[:, 1] == tiles[:, 0]), (alone > 0).any()
    frame = shown.frame
    assert frame.number['all'] == len(tiles) + 1
    assert frame.missed['in one tile'] == (alone == 0).sum()
    assert frame.found['in one tile'] + frame.unclear['in one tile'] == alone.sum()
    assert frame.unclear['in one tile'] == (~several).sum()
    assert frame.number['in several tiles'] == 1 and found
    assert frame['recall, at least']['all'] == pytest.approx(frame.found['all'] / frame.number['all'])
    assert frame['recall, at most']['all'] == pytest.approx(1 - frame.missed['all'] / frame.number['all'])
    assert 'counted once' in report(made.folder).path.read_text()
    assert slumps_tables(read_pixel_run(invent_run(of_seed(cfg, 46), world).folder), 'test') == []

@pytest.mark.usefixtures('undrawn')
def test_the_model_card_gets_the_results(folder):
    "Both splits, each cell as the report has it; a second report changes nothing, and a changed card stays"
    card = folder/'model'/'README.md'
    card.write_text('# r\n')
    seal_model(folder/'model')
    done = report(folder)
    check_seal(folder/'model')
    _, on_test, on_validation = card.read_text().split('## Results: ')
    assert on_test.startswith('test split\n\nSystem rts; seed 42;') and on_validation.startswith('validation split\n')
    assert 'on which nothing was chosen' in on_test or done.results[0].doubt
    for text, table in ((on_test, done.headline), (on_validation, done.tables['Validation'][0])):
        # a card has letters of its own
        for row in table.alone().texts()[0]:
            assert f'| {" | ".join(map(markdown_text, row))} |' in text
    once = card.read_text()
    report(folder)
    assert card.read_text() == once
    card.write_text('mine')
    report(folder)
    assert card.read_text() == 'mine'

@pytest.mark.usefixtures('undrawn')
def test_a_nan_score(runs, folder):
    "One NaN score leaves every pixel number of the split blank, and says why"
    run, split = read_pixel_run(folder), Split(runs[0], 1)
    z = split.z.astype(np.float16)
    z[0].flat[np.argmin(split.masks[0])] = np.nan
    table, thresholds = run.manifest.of('test').table, run.evidence['test'].thresholds
    evidence_of(split, table, z, thresholds=thresholds).write(evidence_path(folder, 'test'))
    done = report(folder)
    headline, pixels = done.headline, done.tables['Threshold'][1]
    assert headline.frame.loc[['PR-AUC', 'IoU_RTS', 'precision', 'recall']].isna().all(axis=None)
    assert done.tables['Precision and recall'][0].frame.isna().all(axis=None)
    assert 'undefined' in str(headline)
    assert {str(cell) for row in pixels.rows for cell in row[3:]} == {'–'}

@pytest.mark.usefixtures('undrawn')
@pytest.mark.parametrize('shift', [20, 60])
def test_thresholds_close_to_one(cfg, tmp_path, shift):
    """A threshold of 1 − 1e-10 is printed as such. One whose probability is rounded to 1 is not a threshold, and the
    page says so, as it does of a temperature that cannot help"""
    by_temperature = cfg.calibrate.model_copy(update=dict(method='temperature'))
    made = make_run(cfg.model_copy(update=dict(runs=tmp_path, calibrate=by_temperature)), shift=shift)
    point = made.calibration.thresholds[1]
    done = report(made.folder)
    text, row = done.path.read_text(), done.tables['Operating point'][0].rows[0]
    assert html.escape(made.calibration.temperature_why) in text
    assert re.search(r'<td>100\.000 <a [^>]*>\(', text)
    assert 'a larger one always fits better' in text
    if shift == 20:
        assert point.reached and point.logit > 15
        assert str(row[1]) == f'{expit(point.logit / 100):.3f}'
        assert str(row[2]) == f'1 − {expit(-point.logit):.2g}'
        assert f'<td>{row[2]}</td>' in text
    else:
        assert not point.reached
        assert str(row[1]) == '0.500'
        assert 'neighbouring probabilities are rounded to the same number' in text

# ---------------------------------------------------------------- several configurations

@pytest.fixture(scope='module')
def configurations(cfg, tmp_path_factory):
    "Two configurations with two seeds each; the second has less skill"
    root = tmp_path_factory.mktemp('compared')
    settings = [(dict(runs=root), 7.), (dict(runs=root, epochs=3), 4.)]
    return [[make_run(of_seed(cfg, seed, **more), skill=skill) for seed in (42, 43)] for more, skill in settings]

@pytest.mark.usefixtures('undrawn')
def test_configurations_are_compared(configurations, cfg):
    "The page opens with both, on validation, and the difference is that of scikit-learn's means"
    groups = [[made.folder for made in group] for group in configurations]
    done = report([folder for group in groups for folder in group])
    (headline,), (paired,) = done.tables['Comparison'], done.tables['Paired differences']
    pr_auc = [[Split(made, 1, 'val').average_precision() for made in group] for group in configurations]
    shown, difference = ([row for row in table.rows if len(row) > 1] for table in (headline, paired))
    assert [row[1].value for row in shown[:2]] == pytest.approx([np.mean(values) for values in pr_auc])
    assert difference[0][1].value == pytest.approx(np.mean(pr_auc[1]) - np.mean(pr_auc[0]))
    assert difference[0][1].std == pytest.approx(np.std(np.subtract(pr_auc[1], pr_auc[0]), ddof=1))
    thresholds = [dict.fromkeys(str(threshold_cell(read_pixel_run(f), 1)) for f in group) for group in groups]
    assert [str(row[1]) for row in shown[-2:]] == [', '.join(texts) for texts in thresholds]
    assert done.tables['Settings that differ'][0].rows == [['epochs', '2', '3']]
    page = done.path.read_text()
    assert done.path == groups[0][0].parents[1]/'report.html'
    assert done.split == 'val'
    assert 'would make it a second validation split' in page
    assert page.index('Paired differences') < page.index('<details class="part">')
    assert page.count('<details class="part">') == page.count('class="slider"') == 2
    for found, group in zip(done.results, groups, strict=True):
        own = done.tables[f'{found.label}: Headline'][0].frame.loc['recall']
        assert own.to_list() == tables(group)['Headline'][0].frame.loc['recall'].to_list()

@pytest.mark.usefixtures('undrawn')
@pytest.mark.parametrize('forced', [False, True])
def test_a_comparison_on_the_test_split(configurations, cfg, forced):
    "Only where the ledger allowed every configuration to look at it"
    first = [group[0].folder for group in configurations]
    rule = dict(config=first[0].parent.name, rule=selection_rule(cfg, cfg.infer.views))
    looks = [dict(rule, config=folder.parent.name, seed=42, when='', forced=False) for folder in first]
    looks[-1]['forced'] = forced
    data = read_run(first[0]).environment['manifest_hash']
    ledger = first[0].parents[2]/'test_ledger.json'
    ledger.write_text(json.dumps({data: dict(rule, looks=looks)}))
    try:
        assert report(first).split == ('val' if forced else 'test')
    finally:
        ledger.unlink()

@pytest.fixture(scope='module')
def one_region(cfg, tmp_path_factory):
    "A run on a world of a single region"
    root = tmp_path_factory.mktemp('one')
    world = read_manifest(tiny_toy(root, regions=1))
    return make_run(cfg.model_copy(update=dict(runs=root, data=cfg.data.model_copy(update=dict(manifest=world.path)))))

def test_other_tiles_are_not_compared(folders, one_region):
    other = one_region.folder
    data = read_run(other).environment['manifest_hash']
    with pytest.raises(ReportError, match=f'evaluated on different tiles.*{data}'):
        report([folders[0], other])
    with pytest.raises(ReportError, match='named twice'):
        report([folders[0]] * 2)

def test_one_region_is_not_compared_with_itself(one_region, single):
    "Neither a section, nor thresholds, nor a warning, nor a finding by region; where there are two, all of them"
    content = collect(read_results(one_region.folder))
    assert 'Regions' in single.tables and 'Regions' not in content.tables
    assert len(single.tables['Operating point']) == 3
    assert len(content.tables['Operating point']) == 2
    false, there = content.tables['Objects'][2], single.tables['Objects'][2]
    assert ['by region'] in there.rows and ['by region'] not in false.rows
    shown, = (block for block in content.sections[0]['Findings'] if isinstance(block, Findings))
    assert 'region' not in shown.markdown(str)
    assert 'Region' in show_calibration(read_pixel_run(single.results[0].first.folder).calibration)
    assert 'Region' not in show_calibration(one_region.calibration)

# ---------------------------------------------------------------- figures

def test_training_is_drawn_with_its_phases(folders):
    run = read_run(folders[0])
    steps = [CurriculumRow(first=1, last=1, ratio=1), CurriculumRow(first=2, last=2, ratio=5)]
    run.cfg = run.cfg.model_copy(update=dict(sampler=run.cfg.sampler.model_copy(update=dict(curriculum=steps))))
    figure = training_figure([run])
    for ax in figure.axes:
        assert [(patch.get_x(), patch.get_width()) for patch in ax.patches] == [(.5, 1)]
        dotted = [list(line.get_xdata()) for line in ax.lines if line.get_linestyle() == ':']
        assert dotted == [[1.5, 1.5]]
    assert {text.get_text() for text in figure.axes[0].texts} == {'1:1', '1:5'}

def test_gallery_shows_what_the_report_counts(runs, single):
    """Tiles with false objects, missed and found slumps, as SciPy counts them at the threshold of the tables; beside
    each the calibrated probability of its own scores, on a scale with the threshold"""
    run, point = read_pixel_run(runs[0].folder), runs[0].calibration.thresholds[1]
    part, split = run.manifest.of('test'), Split(runs[0], 1)
    scores = runs[0].splits['test'].logits.astype(float)
    counts = split.objects(split.grid)
    columns = dict(false_alarms=1, misses=2, finds=0)
    alarmed = []
    for kind, items in gallery(run, 'test').items():
        assert len(items) == min(4, (counts[:, columns[kind]] > 0).sum()) > 0
        for item in items:
            i = list(part.table.tile_id).index(item.tile)
            found, false, missed = counts[i]
            assert counts[i, columns[kind]] > 0
            assert item.caption.endswith(f'): slumps: {found} found, {missed} missed; false objects: {false}')
            alarmed += [split.positive[i]] if kind == 'false_alarms' else []
            left, middle, right, scale = item.figure.axes
            image, = right.images
            assert len(left.images) == len(middle.images) == 1
            np.testing.assert_allclose(image.get_array(), runs[0].calibration.probability(scores[i]))
            assert image.get_clim() == (0, 1)
            assert scale.lines[-1].get_ydata()[0] == pytest.approx(point.threshold)
    # false alarms beside a slump too
    assert any(alarmed)
    assert f'pixels of at least {point.threshold:.3f}, the threshold of 1:1' in single.path.read_text()

def test_validation_pictures_come_before_its_calibration(folder):
    "The threshold is chosen after the scores were kept: each picture is still complete, and of a tile that counts"
    run = read_pixel_run(folder)
    pictures = gallery(run, 'val')
    assert all(pictures.values())
    assert all(len(item.figure.axes) == 4 for items in pictures.values() for item in items)
    evidence_path(folder, 'val').with_suffix('.npz').unlink()
    assert gallery(run, 'val') == {}

# ---------------------------------------------------------------- the page

def scripts(text):
    "(attributes, content) of the script elements"
    return re.findall(r'<script([^>]*)>(.*?)</script>', text, re.S)

def test_page_escapes_and_fetches_nothing(single):
    text = single.path.read_text()
    assert '&lt;script&gt;alert(1)&lt;/script&gt;&amp;&quot;&#x27;' in text
    assert '<b>Linux' not in text and '<script>alert' not in text
    assert not re.search(r'(?:src|href|action|data|url|@import)\s*[=(]?\s*["\']?\s*(?:https?:)?//', text)
    assert not re.search(r'<(?:link|iframe|object|embed|base)\b', text)
    (data_kind, data), (kind, script) = scripts(text)
    assert data_kind == ' type="application/json"' and kind == ''
    assert list(json.loads(data)) == ['42']
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    assert policy in text
    assert 'with uncommitted changes' in text
    assert not re.search(r'fetch|XMLHttp|import|innerHTML|eval|document\.write', script)

def slider_cells(seed):
    "The texts that the slider holds of a seed: of pixels, and of objects"
    pixels = [cell for ratio in seed['pixels'] for row in ratio for cell in row]
    objects = [cell for area in seed['objects'] for ratio in area for row in ratio for cell in row]
    return pixels, objects

def without_marks(cells):
    "Texts of cells without the letters of footnotes, which a table by itself begins at a"
    return sorted(re.sub(r' \([a-z]\)$', '', cell) for cell in cells)

def test_the_page_holds_the_tables_and_nothing_else(folders, both, cfg):
    "Every cell of the page is a cell of `tables`, which the code on the page calls; the slider holds the long ones"
    text, numbers = both.path.read_text(), tables(folders)
    shown, *behind_slider = numbers['Threshold']
    on_page = [table for section, found in numbers.items() if section != 'Threshold' for table in found]
    # a sentence stands in the place of a table without a number
    blank = [table for table in on_page if table.is_blank]
    assert blank and all(BLANK.format(title=table.title) in html.unescape(text) for table in blank)
    full = [shown, *(table for table in on_page if not table.is_blank)]
    cells = [cell for table in full for row in [table.head, *table.texts()[0]] for cell in row]
    assert without_marks(Cells(text).found) == without_marks(cells)
    data = json.loads(scripts(text)[0][1])
    assert list(data) == ['42', '43']
    for pixels, objects, seed in zip(behind_slider[::2], behind_slider[1::2], data.values(), strict=True):
        of_pixels, of_objects = slider_cells(seed)
        assert of_pixels == [str(cell) for row in pixels.rows for cell in row[3:]]
        assert sorted(of_objects) == sorted(str(cell) for row in objects.rows for cell in row[4:])
    code = html.unescape(re.search(r'<pre[^>]*>(from rtsseg.reporting.*?)</pre>', text, re.S)[1])
    command = [sys.executable, '-c', code]
    done = subprocess.run(command, cwd=cfg.runs.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert str(numbers['Headline'][0].frame) in done.stdout

def without_spaces(cells):
    "Cells with text, with single spaces"
    return [' '.join(cell.split()) for cell in cells if cell]

def test_markdown_says_the_same(folder):
    "Rendered by another library, the appendix has the cells, headings and pictures of the page; a hostile name is text"
    done = report(folder)
    page, text = done.path.read_text(), done.path.with_suffix('.md').read_text()
    shown = mistune.create_markdown(escape=False, plugins=['table'])(text)
    assert without_spaces(Cells(shown).found) == without_spaces(Cells(page).found)
    assert '<script' not in shown
    assert HOSTILE in Cells(shown).found
    assert re.findall('<h2>(.*?)</h2>', shown) == re.findall('<h2>(.*?)</h2>', page)
    files = re.findall(r'<img src="(.*?)"', shown)
    assert len(files) == page.count('<img ')
    assert all(Image.open(folder/f).size[0] > 300 for f in files)
    # a picture of an earlier report is deleted
    old = folder/'report_files'/'figure-999.png'
    old.write_bytes(b'')
    report(folder)
    assert not old.exists()

LETTERS = [
    'a|b', '*a* _b_ `c`', '[a](b)', '<b>', 'a\nb', '# a', '\\', '$a$', '~~a~~', '&amp;', '- a', '+ a', '---', '- - -',
    '===', '![a](b)', '1. a', '1) a', '12.', '-0.3', 'https://a.b',
]

@pytest.mark.parametrize('text', LETTERS)
def test_markdown_shows_every_letter(text):
    render = mistune.create_markdown(escape=False, plugins=['table', 'strikethrough', 'math'])
    table = Table(['a', 'b'], [[text, 'x']])
    blocks = [table, Text(text), Text(text, 'hint'), Bullets([text]), Bullets([(text, text)])]
    for block in blocks:
        shown = html.unescape(re.sub(r'<[^>]*>', '', render(block.markdown(str))))
        assert ' '.join(text.split()) in shown

def test_pictures_are_found_where_names_have_spaces(folders, tmp_path):
    "Beside a page with any name, by another library's links"
    done = report(folders[0], tmp_path/'my report (1).html')
    shown = mistune.create_markdown(plugins=['table'])(done.path.with_suffix('.md').read_text())
    files = [unquote(html.unescape(f)) for f in re.findall(r'<img src="(.*?)"', shown)]
    assert len(files) > 3
    assert all((tmp_path/f).is_file() and f.startswith('my report (1)_files/') for f in files)

# ---------------------------------------------------------------- the page in a browser

@in_browser
def test_nothing_is_fetched(single, chromium, tmp_path):
    other = tmp_path/'other.html'
    other.write_text('<img src="http://elsewhere.invalid/a.png">')
    with opened(chromium, other) as page:
        # such a page would be noticed
        assert page.asked == ['http://elsewhere.invalid/a.png']
    with opened(chromium, single.path) as page:
        assert page.locator('h1').text_content() == 'r: test split'
        assert str(single.headline.rows[1][1]) in page.content()
        assert page.asked == page.errors == []

@in_browser
def test_the_policy_stops_what_was_put_in(single, chromium, tmp_path):
    hostile = '<script>document.title = "ran"</script><img src="http://elsewhere.invalid/b.png"></main>'
    injected = tmp_path/'injected.html'
    injected.write_text(single.path.read_text().replace('</main>', hostile))
    with opened(chromium, injected) as page:
        assert page.title() == single.title
        assert page.locator('img[src^="http:"]').count() == 1
        assert page.asked == []

def slider_in_browser(chromium, path, anchor=''):
    "What the slider shows: the threshold, whether a row is bold, and the rows"
    with opened(chromium, path, anchor=anchor) as page:
        slider = page.locator('.slider').first
        rows = [row.locator('td').all_text_contents() for row in slider.locator('tbody tr').all()]
        return slider.locator('.now').text_content(), slider.locator('.chosen').count() > 0, rows

@in_browser
def test_the_slider_in_a_browser(runs, single, chromium):
    """It starts at the chosen threshold with the numbers of the headline, and a link to another threshold shows what
    scikit-learn finds there"""
    run, split = read_pixel_run(runs[0].folder), Split(runs[0], 1)
    stops = [row for row in single.tables['Threshold'][1].rows if row[0] == RATIOS[1]]
    thresholds = run.evidence['test'].thresholds
    now, chosen, rows = slider_in_browser(chromium, single.path)
    assert chosen
    assert float(now) == pytest.approx(split.calibration.probability(logit(split.grid)), abs=6e-4)
    assert rows[0][5:] == [f'{n:.0f}' for n in split.tile @ split.objects(split.grid)]
    for wanted, floor in ((.2, 0), (.9, 40)):
        now, _, rows = slider_in_browser(chromium, single.path, f'#threshold={wanted}&floor={floor}')
        at = min(range(len(stops)), key=lambda i: abs(stops[i][2].value - wanted))
        want = split.pixels(stops[at][1].value)
        assert now == f'{stops[at][2].value:.3f}'
        shown = [cell.split()[0] for cell in rows[0][1:3]]
        assert shown == [f'{want[name]:.3f}' for name in ('precision', 'recall')]
        # pixels and objects are at one threshold
        assert rows[0][5:] == [f'{n:.0f}' for n in split.tile @ split.objects(thresholds[at], floor=floor)]

# ---------------------------------------------------------------- errors

@pytest.mark.usefixtures('undrawn')
def test_other_weights_are_an_error(folder):
    best = folder/'model'/'metrics.json'
    chosen = json.loads(best.read_text())
    known = {name: value for name, value in chosen['metrics'].items() if '@' in name and value == value}

    def lower(name, by):
        metrics = chosen['metrics'] | {name: known[name] - by}
        best.write_text(json.dumps(chosen | dict(metrics=metrics)))

    for name, value in known.items():
        lower(name, 2e-6)
        with pytest.raises(ReportError, match=f'{name} is {value:.8f}.*{value - 2e-6:.8f}'):
            report(folder)
    # within rounding
    lower(name, 5e-7)
    tables(folder)

def test_damaged_evidence_is_an_error(folder):
    path = folder/'evidence'/'val.parquet'
    path.write_bytes(path.read_bytes()[:-100])
    command = f'rtsseg-evaluate --run {os.path.relpath(folder)} --split val'
    with pytest.raises(ReportError, match=f'val.parquet.*{command}'):
        report(folder)

NAMES = [
    'environment.json', 'model/metrics.json', 'model/calibration.json', 'log.jsonl', 'evidence/test.parquet',
    '../../../test_ledger.json',
]
DAMAGES = [
    lambda old: old[:len(old) // 3],
    lambda old: b'[1]\n' + old[:5],
    lambda old: b'\xff\xfe' + old,
]

@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_files_are_named(folder, name, damage):
    path = folder/name
    old = path.read_bytes() if path.exists() else b'{"a": {"looks": []}}'
    if name == 'log.jsonl':
        path.write_bytes(damage(old.splitlines()[0]) + b'\n' + old)
    else:
        path.write_bytes(damage(old))
    with pytest.raises(ReportError, match=f'{path.name}.*(again|copy)'):
        tables(folder)

@pytest.mark.usefixtures('undrawn')
def test_a_killed_run_has_a_report(folder):
    "The incomplete last line of its log is left out; damaged pictures are named"
    log = folder/'log.jsonl'
    rewrite(log, lambda text: text + '{"event": "epoch", "epoch": 3, "los')
    assert len(read_run(folder).epochs) == 2
    scores = evidence_path(folder, 'test').with_suffix('.npz')
    data = scores.read_bytes()
    # in every picture
    flipped = np.frombuffer(data, np.uint8).copy()
    flipped[300::997] ^= 1
    for broken in (data[:len(data) // 2], b'', flipped.tobytes()):
        scores.write_bytes(broken)
        page = report(folder).path.read_text()
        assert 'The scores for the pictures are damaged' in page
        assert 'seed42 --split test makes them again' in page
        assert 'image/jpeg' not in page

# ---------------------------------------------------------------- places and commands

@pytest.mark.usefixtures('undrawn')
def test_where_the_page_goes(folders, tmp_path):
    (tmp_path/'file').write_text('')
    assert report(folders[0], tmp_path).path == tmp_path/'report.html'
    assert report(folders[0], str(tmp_path/'new'/'x.html')).path == tmp_path/'new'/'x.html'
    for name in ('x.md', 'x', 'x.htm'):
        message = f'{tmp_path/name}: a page is written to a file that ends in .html'
        with pytest.raises(ReportError, match=re.escape(message)):
            report(folders[0], tmp_path/name)
        assert not (tmp_path/name).exists()
    with pytest.raises(ReportError, match='x.html cannot be written'):
        report(folders[0], tmp_path/'file'/'x.html')

@pytest.mark.parametrize('out', ['x' * 300, 'x' * 300 + '.html', 'file/x.html', 'a\0.html'])
def test_a_place_that_cannot_be_written(folders, tmp_path, capsys, out):
    "is named in one line"
    (tmp_path/'file').write_text('')
    with pytest.raises(SystemExit) as left:
        rtsseg_report(run=[str(folders[0])], out=str(tmp_path/out))
    assert left.value.code == 2
    reasons = 'too long|Not a directory|null byte|x.html cannot be written'
    assert re.match(f'error: .*({reasons})', capsys.readouterr().err)

def test_the_command_explains_itself():
    usage = shell('rtsseg-report', '--help').stdout
    for name in ('run', 'config', 'manifest', 'name', 'epochs', 'seed', 'seeds', 'overrides', 'out'):
        assert re.search(rf'^ *--{name}\b[^\n]*?\s+\w+ \w+', usage, re.M), name

def test_the_command_finds_the_runs_of_a_config(folders, cfg):
    named = shell('rtsseg-report', '--run', *folders)
    assert named.returncode == 0
    assert 'PR-AUC of pixels at 1:1 ' in named.stdout
    assert os.path.relpath(folders[0].parent/'report.html') in named.stdout
    config = cfg.runs/'c.yaml'
    config.write_text(to_yaml(cfg))
    found = shell('rtsseg-report', '--config', config, '--seeds', '42,43')
    assert found.stdout == named.stdout
    missing = shell('rtsseg-report', '--config', config, '--seed', '7')
    assert missing.returncode == 2
    assert 'no run yet' in missing.stderr and 'Traceback' not in missing.stderr

def test_a_run_folder_has_its_own_config(folders):
    refused = shell('rtsseg-report', '--run', folders[0], '--seed', '7', '--name', 'z')
    assert refused.returncode == 2
    assert 'a run folder has its own config: leave out name, seed' in refused.stderr
    assert not refused.stdout
