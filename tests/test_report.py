"The report: its numbers by other libraries, its page in a browser, its errors from a shell"
import base64, hashlib, html, json, os, re, shutil, subprocess, sys
from html.parser import HTMLParser
from urllib.parse import unquote
from pathlib import Path

import cv2, mistune, numpy as np, pandas as pd, pytest
from PIL import Image
from scipy import ndimage
from scipy.special import expit, logit
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, jaccard_score, log_loss, precision_recall_curve, precision_score, recall_score

from rtsseg.bootstrap import Estimate
from rtsseg.calibration import calibrate_evidence
from rtsseg.cli import rtsseg_report
from rtsseg.config import CurriculumRow, load, to_yaml
from rtsseg.evidence import Meter, evidence_path
from rtsseg.figures import gallery, training_figure
from rtsseg.files import write_atomic
from rtsseg.intervals import summary
from rtsseg.manifest import read_manifest, write_manifest
from rtsseg.metrics import informative_tiles
from rtsseg.page import Bullets, Reasons, Table, Text
from rtsseg.reporting import plain, report, tables
from rtsseg.results import ReportError, read_results, read_run
from rtsseg.runs import run_folder
from rtsseg.tables import METRICS, Several, region_table, threshold
from rtsseg.tiles import read_tile
from rtsseg.toy import tiny_toy
from helpers.runs import toy_world
from helpers.shell import shell

HOSTILE = '<script>alert(1)</script>&"\''

def predict(mask, key, skill=7):
    "Half-precision logits that know a little"
    rng = np.random.default_rng(key); noise = ndimage.gaussian_filter(rng.normal(size=mask.shape), 5) * 17
    return (-5 + skill * ndimage.gaussian_filter((mask == 1).astype(float), 1.5) + 2 * noise).astype(np.float16)

def make_run(cfg, world, shift=0, skill=7):
    "What train, evaluate and calibrate leave behind; and the scores and masks of the test split. A shift is added to all scores"
    folder, pixels = run_folder(cfg, world.hash), {}
    write_atomic(folder/'config.yaml', to_yaml(cfg))
    write_atomic(folder/'environment.json', json.dumps(dict(manifest_hash=world.hash, git_commit='a' * 40, git_clean=False, system='<b>Linux', python='3.11', rtsseg='0', processor='x', cpus=2, versions={'torch': '2'})))
    for split in ('val', 'test'):
        part = world.of(split); masks = np.stack([read_tile(part, i)[2] for i in range(len(part))])
        logits = np.stack([predict(m, [cfg.seed, i, len(split)], skill) + np.float16(shift) for i, m in enumerate(masks)])
        cuts = [p.raw_threshold for p in found.thresholds.values()] if split == 'test' else []
        meter = Meter(part.table, sorted({.25, .5, .75, *cuts})); meter.update(logits, masks, np.arange(len(part)))
        evidence = meter.evidence(); evidence.write(path := evidence_path(folder, split)); pixels[split] = logits.astype(float), masks, part.table.positive.to_numpy()
        kept = {evidence['tile_id'][i] for t in evidence.thresholds for rows in informative_tiles(evidence, t).values() for i in rows}
        np.savez_compressed(path.with_suffix('.npz'), **{tile: z for tile, z in zip(part.table.tile_id, logits) if tile in kept})
        if split == 'val':
            found = calibrate_evidence(evidence, cfg.calibrate, cfg.metrics); found.save(folder/'model'/'calibration.json')
            value = summary(evidence, [200], ious=())[200]['pr_auc']
            write_atomic(folder/'model'/'metrics.json', json.dumps(dict(epoch=2, step=20, value=value, metrics={'pr_auc@200': value})))
            write_atomic(folder/'model'/'model.safetensors', b'')                 # the mark of a run that is done
    lines = [dict(event='start', epoch=1, step=0, device='cpu', processes=1), dict(event='epoch', epoch=1, step=10, seconds=1., **{'lr/encoder': 1e-3, 'train/loss/focal': .1}),
             dict(event='epoch', epoch=2, step=20, seconds=1., **{'lr/encoder': 1e-4, 'train/loss/focal': .05, 'val/loss': .06, 'val/pr_auc@200': value}), dict(event='end', reason='all epochs done', epoch=2, step=20, best=2)]
    write_atomic(folder/'log.jsonl', ''.join(json.dumps(l) + '\n' for l in lines))
    return folder, pixels, found

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp('report')
    table = read_manifest(toy_world(root)).table; table['region'] = table.region.where(table.region != table.region[0], HOSTILE)
    world = read_manifest(write_manifest(table, root/'hostile.csv'))
    cfg = load(name='r', runs=root/'runs', data=dict(manifest=world.path, tile_size=64), epochs=2, metrics=dict(ratios=[1, 200], replicates=50), calibrate=dict(ratio=1, target_precision=.5))
    return [make_run(cfg.model_copy(update=dict(seed=s)), world) for s in (42, 43)], cfg

@pytest.fixture(scope='module')
def reported(runs):
    "The report of the first run and that of both, for those who only look at them"
    folders = [f for f, *_ in runs[0]]; return report(folders[0]), report(folders)

class Split:
    "Pixels of a split, and what other libraries make of them at a ratio"
    def __init__(self, made, ratio, split='test'):
        folder, pixels, self.calibration = made; self.ratio, table = ratio, read_run(folder).manifest.of(split).table
        self.z, self.masks, self.positive = pixels[split]; self.region, self.metres = table.region.to_numpy(), table.pixel_size.to_numpy()
        self.w = ratio * self.positive.sum() / (~self.positive).sum(); self.tile = np.where(self.positive, 1., self.w)
        valid = self.masks != 255; self.of = np.broadcast_to(np.arange(len(self.z))[:, None, None], valid.shape)[valid]
        self.y, self.s, self.each = self.masks[valid] == 1, self.z[valid], self.tile[self.of]
        self.cut, self.grid = self.calibration.thresholds[ratio].logit, min(read_run(folder).evidence[split].thresholds, key=lambda t: abs(t - self.calibration.thresholds[ratio].raw_threshold))
    def pixels(self, cut, keep=slice(None)):
        scores = {'IoU_RTS': jaccard_score, 'F1_RTS': f1_score, 'precision': precision_score, 'recall': recall_score}
        return {k: f(self.y[keep], self.s[keep] >= cut, sample_weight=self.each[keep]) for k, f in scores.items()}
    def objects(self, raw, iou=.3, floor=0): return np.array([match_by_hand(expit(a), b, raw - 1e-9, iou, floor) for a, b in zip(self.z, self.masks)])

def match_by_hand(prob, mask, cut, iou, floor=0):
    "Guide 6.2, the five steps, with SciPy's labels: tp, fp, fn"
    def label(m):
        l, n = ndimage.label(m, np.ones((3, 3))); keep = [i for i in range(1, n + 1) if (l == i).sum() >= floor]
        return [l == i for i in keep]
    prob = np.where(mask == 255, 0, prob); p, g, taken, tp = label(prob >= cut), label(mask == 1), set(), 0
    for a in sorted(p, key=lambda a: -prob[a].mean()):
        best, j = max(((np.sum(a & b) / np.sum(a | b), -j) for j, b in enumerate(g)), default=(0, 0))
        if best >= iou and best > 0 and j not in taken: taken.add(j); tp += 1
    return tp, len(p) - tp, len(g) - tp

def band_iou(split, width):
    "Boundary IoU (Cheng et al. 2021) by Euclidean distances to the background"
    def band(m, valid): inside = ndimage.distance_transform_edt(m | ~valid) if (valid & ~m).any() else np.full(m.shape, np.inf); return m & (inside <= width)
    both = [(band((expit(z) >= split.grid) & (m != 255), m != 255), band(m == 1, m != 255)) for z, m in zip(split.z, split.masks)]
    i, u = (sum(w * f(p, g).sum() for w, (p, g) in zip(split.tile, both)) for f in (np.logical_and, np.logical_or))
    return i / u

def agree(frame, want, w):
    "Values of a table's column and what others found; blank only where the split cannot support a number"
    assert set(want) <= set(frame.index)
    assert sum(frame[k] is not None for k in want) >= (len(want) if w <= 1 else sum('recall' in k for k in want))
    for k, v in want.items():
        if frame[k] is not None: assert frame[k] == pytest.approx(v, abs=1e-9), k

@pytest.mark.parametrize('ratio', [1, 200])
def test_headline_by_other_libraries(runs, ratio):
    made = runs[0][0]; s, found = Split(made, ratio), tables(made[0]); head, loose = found['Headline']; name = '1:1 (balanced)' if ratio == 1 else f'1:{ratio}'
    want = {'PR-AUC': average_precision_score(s.y, s.s, sample_weight=s.each), **s.pixels(s.cut), **{f'boundary IoU, {d} px': band_iou(s, d) for d in (2, 3)}}
    for iou in (.1, .3, .5):
        tp, fp, fn = s.tile @ s.objects(s.grid, iou)
        objects = {f'object {k} (IoU {iou:g})': v for k, v in {'precision': tp / (tp + fp), 'recall': tp / (tp + fn), 'F1': 2 * tp / (2 * tp + fp + fn)}.items()}
        if iou == .3: want |= objects
        else: agree(loose.frame[name], objects, s.w)
    agree(head.frame[name], want, s.w)
    rest = head.frame[name].drop(list(want)); assert len(want) == len(METRICS) + 5
    assert rest['weight w of a tile without'] == pytest.approx(s.w) and rest['slump pixels at this ratio'] == pytest.approx(100 * np.average(s.y, weights=s.each)) and rest['probability threshold'] == pytest.approx(expit(s.cut * s.calibration.slope + s.calibration.intercept))
    blank = [c for r in head.rows for c in r if getattr(c, 'value', 0) is None]
    assert all('of the 30 negative tiles' in c.why for c in blank) and (s.w <= 1 or blank)

def test_bounds_hold(runs, reported):
    "What stands in a blank cell is not below the number that it withholds"
    s = Split(runs[0][0], 200); found = reported[0].results[0].found['test'][200]
    want = dict(pr_auc=average_precision_score(s.y, s.s, sample_weight=s.each)) | {k.lower().removesuffix('_rts'): v for k, v in s.pixels(s.cut).items()}
    for k, v in want.items(): assert v == pytest.approx(found[k].value) if found[k].value is not None else found[k].high >= v

def test_where_it_fails_by_other_libraries(runs):
    "Regions, sizes, misses and false alarms at the threshold of the fit, from the pixels"
    made = runs[0][0]; s, found = Split(made, 1), tables(made[0]); region, = found['Regions']; sizes, missed, false = found['Objects']; counts = s.objects(s.grid)
    for name, row in region.frame.iterrows():
        here, pixels = s.region == name, (s.region == name)[s.of]; w = s.positive[here].sum() / (~s.positive[here]).sum(); s.each = np.where(s.positive, 1., w)[s.of]
        want = {'w': w} | {k: v for k, v in s.pixels(s.cut, pixels).items() if k in ('precision', 'recall')} | {'PR-AUC': average_precision_score(s.y[pixels], s.s[pixels], sample_weight=s.each[pixels])}
        assert {k: row[k] for k in want} == pytest.approx(want)
        assert [row[k] for k in ('slumps found', 'false objects', 'missed')] == list(counts[here].sum(0)) and (row['tiles with'], row['without']) == (s.positive[here].sum(), (~s.positive[here]).sum())
    assert set(region.frame.index) == set(s.region)
    length = []
    for mask, metre in zip(s.masks, s.metres):
        l, n = ndimage.label(mask == 1, np.ones((3, 3)))
        for i in range(1, n + 1): y, x = np.nonzero(l == i); length.append(metre * max(cv2.minAreaRect(np.float32([(a + da, b + db) for a, b in zip(x, y) for da in (0, 1) for db in (0, 1)]))[1]))
    assert list(sizes.frame.slumps) == list(np.histogram(length, [0, 50, 200, 1000, np.inf])[0]) and sizes.frame.found.sum() == counts[:, 0].sum()
    assert missed.frame.slumps.sum() == counts[:, 2].sum() == missed.frame[list(sizes.frame.index)].to_numpy().sum()
    total = [counts[s.positive, 1].sum(), counts[~s.positive, 1].sum()]; blocks = [r for r in false.rows if len(r) > 1]
    assert blocks[-1][1:3] == total and blocks[-1][3].value == pytest.approx(s.tile @ counts[:, 1])
    for name in set(s.region): assert [r[1] + r[2] for r in blocks if r[0] == name] == [counts[s.region == name, 1].sum()]
    assert sum(r[1] + r[2] for r in blocks) == 4 * sum(total)                                  # by size, by region, by confidence, and all

def test_regions_are_at_the_ratio_too(runs):
    "At 1:200 each of a region's few empty tiles counts often: what rests on fewer than 30 of them is a bound, and the bound holds; recall is a number"
    made = runs[0][0]; run, s = read_run(made[0]), Split(made, 200); run.calibration = run.calibration.model_copy(update=dict(ratio=200))
    for name, n_pos, n_neg, w, ap, precision, recall, *_ in region_table(run, 'test').rows:
        pixels = (s.region == name)[s.of]; s.each = np.where(s.positive, 1., w.value)[s.of]; want = s.pixels(s.cut, pixels)
        assert w.value == pytest.approx(200 * n_pos / n_neg) and w.value > 1 and n_neg < 30 and recall.value == pytest.approx(want['recall'])
        for cell, value in ((ap, average_precision_score(s.y[pixels], s.s[pixels], sample_weight=s.each[pixels])), (precision, want['precision'])):
            assert cell.value is None and 'of the 30 negative tiles that are needed' in cell.why and cell.high >= value - 1e-12

def test_operating_points_of_objects_by_hand(runs):
    "On validation and on test: precision, and the share that is found of all slumps, small ones too"
    made = runs[0][0]; c, run = made[2], read_run(made[0]); frame = tables(made[0])['Operating point'][1].frame
    for ratio, name in ((1, '1:1 (balanced)'), (200, '1:200')):
        for label, point in (('best floor', c.objects[ratio]), ('floor of the tables', c.object_thresholds[ratio])):
            row = frame.loc[f'{name}, {label}']
            for split, share, precision in (('val', 'of all', 'object precision'), ('test', 'of all on test', 'precision on test')):
                s = Split(made, ratio, split); near = min(run.evidence[split].thresholds, key=lambda t: abs(t - point.raw_threshold))
                tp, fp, fn = s.tile @ s.objects(near, .3, point.min_area); every = s.objects(near)[:, [0, 2]].sum()
                assert row[share] == pytest.approx(tp / every) and (s.w > 1 if pd.isna(row[precision]) else row[precision] == pytest.approx(tp / (tp + fp)))
    assert c.objects[1].min_area > 0 and frame['of all'].iloc[0] <= frame['object recall'].iloc[0]

def test_regions_have_their_thresholds_or_a_reason(runs, tmp_path):
    folder = shutil.copytree(runs[0][0][0], tmp_path/'r'/'h'/'seed42'); run = read_run(folder); few = tables(folder)['Operating point'][2]
    assert set(few.frame.index) == set(run.evidence['val']['region']) and all('30 are needed: global thresholds' in r[2].why and r[2].value is None for r in few.rows)
    found = calibrate_evidence(run.evidence['val'], run.cfg.calibrate.model_copy(update=dict(min_region_positives=1)), run.cfg.metrics); found.save(folder/'model'/'calibration.json'); own = tables(folder)['Operating point'][2]
    want = [[name, p.threshold, p.precision.value, p.recall.value, o.threshold, o.min_area, o.share.value] for name, x in found.regions.items() for r, p in x.thresholds.items() for o in [x.objects[r]]]
    assert [[r[0], r[2].value, r[3].value, r[4].value, r[5].value, r[6], r[8].value] for r in own.rows if r[2].value is not None] == want != []
    missing = {name: x.why for name, x in found.regions.items() if len(x.thresholds) < 2}
    assert {r[0]: r[2].why for r in own.rows if r[2].value is None} == missing

def test_the_headline_in_plain_words(runs):
    "Bounds are called so, what was not reached is not called chosen, and scores that are no probabilities not probabilities"
    results = read_results([f for f, *_ in runs[0]])[0]; row = results.found[results.split][1]
    said = plain(results); assert f'of 100 objects that are predicted about {100 * row["object_precision_30"].value:.0f} are slumps' in said[0] and f'of 100 slumps about {100 * row["object_recall_30"].value:.0f} are found' in said[0]
    row['object_precision_30'] = Estimate(None, high=.004); results.runs[1].calibration.thresholds[1] = results.runs[1].calibration.thresholds[1].model_copy(update=dict(reached=False))
    results.first.calibration = results.first.calibration.model_copy(update=dict(temperature_enough='temperature alone is not enough: so'))
    said = plain(results); assert 'predicted at most 1 are slumps' in said[0]
    assert 'no threshold reached it on validation (seed 43)' in said[1] and 'the right order only: temperature alone is not enough: so' in said[2]

def test_what_is_used_instead(runs):
    "A target that is not reached is missed on validation, by a seed; several seeds are named each, and numbers stay with their ratio"
    both = [read_run(f) for f, *_ in runs[0]]
    for x, best in zip(both, ('0.3', '0.2')):
        for r in (1, 200): x.calibration.thresholds[r] = x.calibration.thresholds[r].model_copy(update=dict(reached=False, raw_threshold=.5, logit=0., why=f'not reached on validation at 1:{r}: the best is {best if r == 1 else best + "5"}; the uncalibrated 0.5 is used'))
    cells = [Several([threshold(x, r) for x in both]) for r in (200, 1)]
    assert cells[1].why == 'seed 42: not reached on validation at 1:1: the best is 0.3; the uncalibrated 0.5 is used; seed 43: not reached on validation at 1:1: the best is 0.2; the uncalibrated 0.5 is used'
    assert 'seed 42: not reached on validation at 1:200, 1:1: the best is 0.35, 0.3; ' in str(Table(['a', 'b'], [['x', c] for c in cells]))
    many = Reasons(); marks = [many.mark('x' * i) for i in range(1, 80)]; assert marks[25:28] == [' (z)', ' (aa)', ' (ab)'] and marks[52] == ' (ba)' and many.lines()[27] == f'(ab) {"x" * 28}'

@pytest.mark.parametrize('looks, says', [([], 'knows of no look'), ([(43, False)], 'knows of no look'), ([(42, False)], ''), ([(42, True)], 'was FORCED (seed 42)'), ([(42, False), (42, True)], 'was FORCED (seed 42)')])
@pytest.mark.parametrize('beside', [True, False])
def test_the_head_tells_of_doubtful_looks(runs, tmp_path, looks, says, beside):
    "Lead and headline say where the ledger, beside the run or where its config says, does not bear out that nothing was chosen on test"
    folder = shutil.copytree(runs[0][0][0], tmp_path/'r'/'h'/'seed42'); path = folder/'config.yaml'; path.write_text(path.read_text().replace(str(runs[1].runs), str(tmp_path/'elsewhere')))
    ledger = dict(config='h', rule='', looks=[dict(config='h', rule='', when='', seed=s, forced=f) for s, f in looks])
    write_atomic((tmp_path if beside else tmp_path/'elsewhere')/'test_ledger.json', json.dumps({read_run(folder).environment['manifest_hash']: ledger}))
    done = report(folder); head = done.path.read_text().partition('<table>')[0]
    assert ('on which nothing was chosen' in head) == (not says) == done.results[0].allowed and ('<p class="hint">' in head) == bool(says)
    assert not says or head.count(says) == 2 and says in str(done)

@pytest.mark.parametrize('bins', ['float16', (-400, 400)])
def test_rounded_scores_have_bounds(runs, tmp_path, bins):
    "Scores that the grid does not hold: the report gives bounds, which hold scikit-learn's value, and names the grid"
    folder = shutil.copytree(runs[0][0][0], tmp_path/'r'/'h'/'seed42'); run, s = read_run(folder), Split(runs[0][0], 1); z = s.z / 40 + 100
    meter = Meter(run.manifest.of('test').table, run.evidence['test'].thresholds, bins); meter.update(z, s.masks, np.arange(len(z))); meter.evidence().write(evidence_path(folder, 'test'))
    low, high = map(float, re.findall(r'[\d.]+', tables(folder)['Headline'][0].frame.loc['PR-AUC, bounds by rounding', '1:1 (balanced)']))
    assert low - 5e-5 <= average_precision_score(s.y, z[s.masks != 255], sample_weight=s.each) <= high + 5e-5 and high - low > 1e-4
    page = report(folder).path.read_text(); assert ('rounded to half precision' in page) == (bins == 'float16') and ('65535 values from -400 to 400' in page) == (bins != 'float16')
    assert 'bounds by rounding' not in str(tables(runs[0][0][0])['Headline'][0])

def test_calibration_by_other_libraries(runs):
    made = runs[0][0]; c = made[2]; frame = tables(made[0])['Calibration'][1].rows; ratio = None
    ways = {'scores as they are': (1, 0, 0), 'temperature': (1 / c.temperature, 0, 0), 'slope and intercept': (c.fits['slope_intercept'].slope.value, c.fits['slope_intercept'].intercept.value, 0), 'the used one, shifted': (c.slope, c.intercept, 1)}
    for row in frame:
        if len(row) == 1: ratio = int(row[0].split()[0].split(':')[1]); s = Split(made, ratio, 'val'); continue
        a, b, shift = ways[row[0]]; mass = [np.average(x, weights=e) for x, e in ((s.y, s.each), (s.y, Split(made, c.ratio, 'val').each))]
        p = expit(a * s.s + b + shift * (logit(mass[0]) - logit(mass[1])))
        gap = sum(abs((s.each * (p - s.y))[here].sum()) for i in range(15) for here in [np.minimum((p * 15).astype(int), 14) == i]) / s.each.sum()
        assert [x.value for x in row[2:]] == pytest.approx([log_loss(s.y, p, sample_weight=s.each), gap, brier_score_loss(s.y, p, sample_weight=s.each)], abs=1e-9), (ratio, row[0])

def test_every_stop_of_the_slider(runs):
    made = runs[0][0]; run = read_run(made[0]); numbers = tables(made[0]); _, pixels, objects = numbers['Threshold']
    for ratio, name in ((1, '1:1 (balanced)'), (200, '1:200')):
        s = Split(made, ratio); rows = [r for r in pixels.rows if r[0] == name]; assert len(rows) > 100
        for _, score, p, near, precision, recall in rows[::20] + [r for r in rows if r[1].value == s.cut]:
            want = s.pixels(score.value)
            assert p.value == pytest.approx(s.calibration.probability(score.value)) and recall.value == pytest.approx(want['recall']) and (precision.value is None or precision.value == pytest.approx(want['precision']))
            assert near.value == min(run.evidence['test'].thresholds, key=lambda t: abs(t - expit(score.value)))
        for _, floor, raw, p, precision, recall, tp, fp, fn in [r for r in objects.rows if r[0] == name and r[1] in (0, 40)][::3]:
            want = s.tile @ s.objects(raw.value, .3, floor)
            assert [tp.value, fp.value, fn.value] == pytest.approx(want) and (np.isnan(recall.value) or recall.value == pytest.approx(want[0] / (want[0] + want[2])))
            assert precision.value is None or precision.value == pytest.approx(want[0] / (want[0] + want[1]))
        curve, = numbers['Precision and recall']; precision, recall, _ = precision_recall_curve(s.y, s.s, sample_weight=s.each)
        steps = np.unique(-np.sort(-s.s[s.y])[np.ceil(np.arange(1, 201) / 200 * s.y.sum() - 1e-6).astype(int) - 1])        # the curve is read where another half per cent is found
        for r in curve.rows:
            at = s.pixels(max(t for t in steps if np.mean(s.s[s.y] >= t) >= r[0].value - 1e-9))['precision']; cell = r[curve.head.index(name)]
            assert at == pytest.approx(cell.value) if cell.value is not None else cell.high >= at - 1e-9

def test_mean_and_spread(runs, reported):
    both, _ = runs
    several, single = reported[1], [reported[0], report(both[1][0])]
    assert several.path == both[0][0].parent/'report.html' and single[0].path == both[0][0]/'report.html'
    for k in METRICS:
        values = [s.results[0].found['test'][1][k].value for s in single]; cell = several.results[0].found['test'][1][k]
        assert (cell.value, cell.std) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
        assert f'{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}' in str(several)
        each = several.tables['Headline'][2].rows; assert [c.value for c in next(r for r in each if r[0] == METRICS[k])[1:]] == pytest.approx(values)
    assert 'one seed (42)' in str(single[0]) and 'blocks hold positives, 10 are needed' in str(single[0])
    assert os.path.relpath(several.path) in str(several) and all(os.path.relpath(f) in str(several) for f, *_ in both)

def test_configurations_are_compared(runs, tmp_path):
    "Two configurations, two seeds each: the page opens with both, on validation, and the difference is that of scikit-learn's means"
    both, cfg = runs; cfg = cfg.model_copy(update=dict(runs=tmp_path)); world = read_manifest(cfg.data.manifest)
    made = [[make_run(cfg.model_copy(update=dict(seed=s) | more), world, skill=skill) for s in (42, 43)] for more, skill in (({}, 7), (dict(epochs=3), 4))]
    done = report([f for group in made for f, *_ in group]); (headline,), (paired,) = (done.tables[k] for k in ('Comparison', 'Paired differences'))
    ap = [[average_precision_score(s.y, s.s, sample_weight=s.each) for m in group for s in [Split(m, 1, 'val')]] for group in made]
    mine = [[r for r in rows if len(r) > 1] for rows in (headline.rows, paired.rows)]
    assert [r[1].value for r in mine[0][:2]] == pytest.approx([np.mean(a) for a in ap]) and mine[1][0][1].value == pytest.approx(np.mean(ap[1]) - np.mean(ap[0]))
    assert mine[1][0][1].std == pytest.approx(np.std(np.subtract(ap[1], ap[0]), ddof=1))
    want = [', '.join(dict.fromkeys(str(threshold(read_run(f), 1)) for f, *_ in group)) for group in made]; assert [str(r[1]) for r in mine[0][-2:]] == want
    assert [r[:3] for r in done.tables['Settings that differ'][0].rows] == [['epochs', '2', '3']]
    page = done.path.read_text(); label = [x.label for x in done.results]
    assert done.path == (tmp_path/'r'/'report.html').resolve() and done.split == 'val' and 'would make it a second validation split' in page
    assert page.index('Paired differences') < page.index('<details class="part">') and page.count('<details class="part">') == 2 and page.count('class="slider"') == 2
    for x, group in zip(label, made): assert done.tables[f'{x}: Headline'][0].frame.loc['recall'].to_list() == tables([f for f, *_ in group])['Headline'][0].frame.loc['recall'].to_list()
    ledger = tmp_path/'test_ledger.json'; looks = [dict(config=m[0][0].parent.name, seed=s, when='', forced=False, rule='') for m in made for s in (42, 43)]
    for forced in (False, True):
        looks[-1]['forced'] = looks[-2]['forced'] = forced; ledger.write_text(json.dumps({world.hash: dict(config=looks[0]['config'], rule='', looks=looks)}))
        assert report([m[0][0] for m in made]).split == ('val' if forced else 'test')

def test_the_page_holds_the_tables_and_nothing_else(runs, reported):
    "Every cell of the page is a cell of `tables`, which the code on the page calls; the slider holds the two long ones"
    both, cfg = runs; folders = [f for f, *_ in both]; text = reported[1].path.read_text(); numbers = tables(folders)
    shown = [t for section, found in numbers.items() for t in (found[:1] if section == 'Threshold' else found)]
    assert sorted(Cells(text).found) == sorted(c for t in shown for r in [t.head, *t.texts()[0]] for c in r)
    data = json.loads(scripts(text)[0][1]); assert list(data) == ['42', '43']
    for pixels, objects, d in zip(numbers['Threshold'][1::2], numbers['Threshold'][2::2], data.values()):
        assert [c for ratio in d['pixels'] for row in ratio for c in row] == [str(c) for r in pixels.rows for c in r[4:]]
        assert sorted(c for area in d['objects'].values() for ratio in area for row in ratio for c in row) == sorted(str(c) for r in objects.rows for c in r[4:])
    code = html.unescape(re.search(r'<pre[^>]*>(from rtsseg.reporting.*?)</pre>', text, re.S)[1])
    done = subprocess.run([sys.executable, '-c', code], cwd=cfg.runs.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and str(numbers['Headline'][0].frame) in done.stdout, done.stderr

def test_training_is_drawn_with_its_phases(runs):
    run = read_run(runs[0][0][0]); run.events.append(dict(event='stage', epoch=1, first=1, last=1, frozen=['encoder']))
    run.cfg = run.cfg.model_copy(update=dict(sampler=run.cfg.sampler.model_copy(update=dict(curriculum=[CurriculumRow(first=1, last=1, ratio=1), CurriculumRow(first=2, last=2, ratio=5)]))))
    for ax in training_figure([run]).axes:
        assert any(p.get_x() == .5 and p.get_width() == 1 for p in ax.patches) and any(line.get_linestyle() == ':' and list(line.get_xdata()) == [1.5, 1.5] for line in ax.lines)
    assert {t.get_text() for t in training_figure([run]).axes[0].texts} == {'1:1', '1:5'}

def test_augmented_views_have_a_table(runs, tmp_path):
    "Gain and cost of test-time augmentation where validation was seen in two ways, and no table where not"
    folder = shutil.copytree(runs[0][0][0], tmp_path/'r'/'h'/'seed42'); split = Split(runs[0][0], 1, 'val')
    (folder/'config.yaml').write_text((folder/'config.yaml').read_text().replace('monitor: pr_auc@200', 'monitor: pr_auc@1')); made = read_run(folder); assert made.cfg.metrics.monitor == 'pr_auc@1'
    assert [t.title for t in tables(folder)['Validation'][2:]] == []
    z, masks, _ = runs[0][0][1]['val']; better = (z + masks * (masks == 1)).astype(np.float16)
    meter = Meter(made.manifest.of('val').table, (.5,), views='minimal'); meter.update(better, masks, np.arange(len(z))); meter.evidence().write(evidence_path(folder, 'val', 'minimal'))
    with open(folder/'log.jsonl', 'a') as log:
        for views, seconds in (('none', 10.), ('minimal', 20.)): log.write(json.dumps(dict(event='evaluate', split='val', views=views, tiles=len(z), seconds=seconds)) + '\n')
    table, = tables(folder)['Validation'][2:]; frame = table.frame
    gain = np.diff([average_precision_score(split.y, s, sample_weight=split.each) for s in (split.s, better.astype(float)[masks != 255])])[0]
    assert frame.gain['minimal'] == pytest.approx(gain) and gain > 0 and frame['seconds a tile'].to_list() == pytest.approx([10 / len(z), 20 / len(z)])
    assert 'test-time augmentation' in table.notes[-1] and '<h3>Test-time augmentation</h3>' in report(folder).path.read_text()

@pytest.mark.parametrize('kind', ['no slump', 'slumps only', 'one tile'])
def test_a_split_that_supports_little(runs, tmp_path, kind):
    "A test split without positive tiles, without negative ones, or of one tile alone has a report too, with blanks"
    folder = shutil.copytree(runs[0][0][0], tmp_path/'r'/'h'/'seed42'); e = read_run(folder).evidence['test']
    e.select({'no slump': ~e['positive'], 'slumps only': e['positive'], 'one tile': np.flatnonzero(e['positive'])[:1]}[kind]).write(evidence_path(folder, 'test'))
    with np.errstate(all='raise', under='ignore'): done = report(folder)
    frame = done.headline.frame
    if kind == 'no slump': assert frame.loc[['PR-AUC', 'recall']].isna().all(axis=None)
    else: assert (frame.loc['weight w of a tile without'] == 1).all() and frame.loc['recall'].notna().all()
    assert 'nan' not in re.sub(r'base64,[^"]*', '', done.path.read_text()).replace('nano', '')

def test_scores_that_are_no_numbers(runs, tmp_path):
    "One of them leaves every pixel number of the split blank, and says why"
    folder = shutil.copytree(runs[0][0][0], tmp_path/'r'/'h'/'seed42'); run = read_run(folder); z, masks, _ = runs[0][0][1]['test']
    z = z.astype(np.float16); z[0].flat[np.argmin(masks[0])] = np.nan          # of a valid pixel
    meter = Meter(run.manifest.of('test').table, run.evidence['test'].thresholds); meter.update(z, masks, np.arange(len(z))); meter.evidence().write(evidence_path(folder, 'test'))
    numbers = tables(folder)
    assert numbers['Headline'][0].frame.loc[['PR-AUC', 'IoU_RTS', 'precision', 'recall']].isna().all(axis=None) and numbers['Precision and recall'][0].frame.isna().all(axis=None)
    assert 'scores that are no numbers' in str(numbers['Headline'][0]) and all(r[4].value is None and np.isnan(r[5].value) for r in numbers['Threshold'][1].rows); report(folder)

def test_other_tiles_are_not_compared(runs, tmp_path):
    both, cfg = runs; (tmp_path/'w').mkdir(); world = read_manifest(tiny_toy(tmp_path/'w', regions=1))
    other, *_ = make_run(cfg.model_copy(update=dict(runs=tmp_path, data=cfg.data.model_copy(update=dict(manifest=world.path)))), world)
    with pytest.raises(ReportError, match=f'evaluated on different tiles.*{world.hash}'): report([both[0][0], other])
    with pytest.raises(ReportError, match='named twice'): report([both[0][0]] * 2)
    again = shutil.copytree(both[0][0], both[0][0].parent/'seed42-before')
    try:
        with pytest.raises(ReportError, match='seed42 and .*seed42-before are both of seed 42'): report([both[0][0], again])
    finally: shutil.rmtree(again)

def test_gallery_shows_what_the_report_counts(runs, reported):
    "The tiles that tell most of all at the calibrated threshold, each once; beside each the calibrated probability of its own scores, on a scale with the threshold"
    folder, pixels, found = runs[0][0]; run, point = read_run(folder), found.thresholds[1]
    scores, masks, _ = pixels['test']; part = run.manifest.of('test'); hit = scores >= point.logit
    counts = np.stack([(hit & (masks == 1)).sum((1, 2)), (hit & (masks == 0)).sum((1, 2)), (~hit & (masks == 1)).sum((1, 2))], 1)
    tp, fp, fn = counts.T; score = dict(false_alarms=fp, misses=fn, finds=tp - fp - fn); shown = []
    for kind, items in gallery(run, 'test').items():
        own = [i for i in range(len(part)) if score[kind][i] == max(s[i] for s in score.values()) > 0]
        assert len(items) == min(4, len(own)) > 0
        for (figure, caption), want in zip(items, sorted((score[kind][i] for i in own), reverse=True)):
            i = list(part.table.tile_id).index(caption.split()[0]); shown.append(i)
            assert i in own and score[kind][i] == want and caption.endswith('): {} pixels found, {} false, {} missed'.format(*counts[i]))
            left, middle, right, scale = figure.axes; image, = right.images; assert len(left.images) == len(middle.images) == 1
            np.testing.assert_allclose(image.get_array(), found.probability(scores[i])); assert image.get_clim() == (0, 1)
            assert scale.lines[-1].get_ydata()[0] == pytest.approx(point.threshold)
    assert len(set(shown)) == len(shown)
    assert f'what has at least {point.threshold:.3f}, the threshold of 1:1' in reported[0].path.read_text()

def test_validation_pictures_come_before_its_calibration(runs):
    "The threshold is chosen after the maps were kept: each picture is still whole, and of a tile that counts"
    run = read_run(runs[0][0][0]); pictures = gallery(run, 'val')
    assert all(pictures.values()) and all(len(figure.axes) == 4 for items in pictures.values() for figure, _ in items)
    evidence_path(run.folder, 'val').with_suffix('.npz').rename(run.folder/'elsewhere.npz')
    try: assert gallery(run, 'val') == {}
    finally: (run.folder/'elsewhere.npz').rename(evidence_path(run.folder, 'val').with_suffix('.npz'))

def test_estimators_are_of_one_seed(reported):
    "What is counted w times stands beside what is drawn: both are of the seed that is shown, not of the mean"
    text = reported[1].path.read_text()
    for k in ('pr_auc', 'iou'):
        row = re.search(rf'<td>{METRICS[k]}</td><td>1:1 \(balanced\)</td><td>[^<]*</td><td>[^<]*</td><td>([^<]*)</td>', text)
        assert float(row[1]) == pytest.approx(reported[0].results[0].found['val'][1][k].value, abs=5.1e-4)

@pytest.mark.parametrize('shift', [20, 60])
def test_thresholds_close_to_one(runs, tmp_path, shift):
    "A threshold of 1 − 1e-10 is printed as such; one whose probability is rounded to 1 is no threshold, and the page says so; so does it of a temperature that cannot help"
    cfg = runs[1].model_copy(update=dict(runs=tmp_path)); folder, _, found = make_run(cfg, read_manifest(cfg.data.manifest), shift); point = found.thresholds[1]
    made = report([folder]); text, row = made.path.read_text(), made.tables['Operating point'][0].rows[0]
    assert html.escape(found.temperature_why) in text and '<td>100.000 (' in text and 'a larger one always fits better' in text
    if shift == 20: assert point.reached and point.logit > 15 and str(row[1]) == f'{expit(point.logit / 100):.3f}' and str(row[2]) == f'1 − {expit(-point.logit):.2g}' and f'<td>{row[2]}</td>' in text
    else: assert not point.reached and str(row[1]) == '0.500' and 'where neighbouring probabilities are rounded to the same number' in text

def scripts(text): return re.findall(r'<script([^>]*)>(.*?)</script>', text, re.S)

def test_page_escapes_and_fetches_nothing(reported):
    text = reported[0].path.read_text()
    assert '&lt;script&gt;alert(1)&lt;/script&gt;&amp;&quot;&#x27;' in text and '<b>Linux' not in text and '<script>alert' not in text
    assert not re.search(r'(?:src|href|action|data|url|@import)\s*[=(]?\s*["\']?\s*(?:https?:)?//', text) and not re.search(r'<(?:link|iframe|object|embed|base)\b', text)
    data, (kind, script) = scripts(text); assert data[0] == ' type="application/json"' and kind == '' and list(json.loads(data[1])) == ['42']
    assert f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in text and 'with uncommitted changes' in text
    assert not re.search(r'fetch|XMLHttp|import|innerHTML|eval|document\.write', script)

class Cells(HTMLParser):
    "Texts of table cells in order; of a slider none, since Markdown has none"
    def __init__(self, text): super().__init__(); self.found, self.open, self.skip = [], False, 0; self.feed(text)
    def handle_starttag(self, tag, attrs):
        if self.skip or ('class', 'slider') in attrs: self.skip += tag == 'div'
        elif tag in ('td', 'th'): self.open = True; self.found.append('')
    def handle_endtag(self, tag):
        if self.skip: self.skip -= tag == 'div'
        elif tag in ('td', 'th'): self.open = False
    def handle_data(self, data):
        if self.open and not self.skip: self.found[-1] += data

def test_markdown_says_the_same(runs, reported):
    "Rendered by another library, the appendix has the cells, the headings and the pictures of the page, and a hostile name is text in it"
    made = reported[0]; page, text = made.path.read_text(), made.path.with_suffix('.md').read_text()
    shown = mistune.create_markdown(escape=False, plugins=['table'])(text); full = lambda cells: [' '.join(c.split()) for c in cells if c]
    assert full(Cells(shown).found) == full(Cells(page).found) and '<script' not in shown and HOSTILE in Cells(shown).found
    assert [h for h in re.findall('<h2>(.*?)</h2>', shown)] == re.findall('<h2>(.*?)</h2>', page)
    files = re.findall(r'<img src="(.*?)"', shown); assert len(files) == page.count('<img ') and all(Image.open(made.path.parent/f).size[0] > 300 for f in files)
    (made.path.parent/'report_files'/'figure-999.png').write_bytes(b''); report([runs[0][0][0]]); assert not (made.path.parent/'report_files'/'figure-999.png').exists()     # of an older report

@pytest.mark.parametrize('text', ['a|b', '*a* _b_ `c`', '[a](b)', '<b>', 'a\nb', '# a', '\\', '$a$', '~~a~~', '&amp;', '- a', '+ a', '---', '- - -', '===', '![a](b)', '1. a', '1) a', '12.', '-0.3', 'https://a.b'])
def test_markdown_shows_every_letter(text):
    render = mistune.create_markdown(escape=False, plugins=['table', 'strikethrough', 'math'])
    for block in (Table(['a', 'b'], [[text, 'x']]), Text(text), Bullets([text]), Bullets([(text, text)]), Text(text, 'hint')): assert ' '.join(text.split()) in html.unescape(re.sub(r'<[^>]*>', '', render(block.markdown(str))))

def test_pictures_are_found_where_names_have_spaces(runs, tmp_path):
    "Beside a page with any name, by another library's links"
    done = report([runs[0][0][0]], tmp_path/'my report (1).html'); shown = mistune.create_markdown(plugins=['table'])(done.path.with_suffix('.md').read_text())
    files = [unquote(html.unescape(f)) for f in re.findall(r'<img src="(.*?)"', shown)]; assert len(files) > 3 and all((tmp_path/f).is_file() and f.startswith('my report (1)_files/') for f in files)

browser = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome') or shutil.which('chrome')
in_browser = pytest.mark.skipif(not browser, reason='no Chromium here: the page was not looked at in a browser (.ci/run installs one where it can)')

def chromium(tmp_path, *args):
    flags = '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-extensions --hide-scrollbars'.split()
    return subprocess.run([browser, *flags, '--host-resolver-rules=MAP * ~NOTFOUND', f'--user-data-dir={tmp_path/"profile"}', *map(str, args)], check=True, timeout=120, capture_output=True, text=True).stdout

def asked_for(tmp_path, url):
    "What a page is, and the addresses that it (not the browser on its own account) asked for"
    log = tmp_path/'net.json'; dom = chromium(tmp_path, '--dump-dom', f'--log-net-log={log}', url); net = json.loads(log.read_text()); start = net['constants']['logEventTypes']['URL_REQUEST_START_JOB']
    asked = [e['params'] for e in net['events'] if e['type'] == start and 'url' in e.get('params', {})]
    return dom, [p['url'] for p in asked if p['initiator'] != 'not an origin' and not p['url'].startswith(('file:', 'data:'))]

@in_browser
@pytest.mark.parametrize('width', [400, 1200])
def test_page_in_a_browser(reported, tmp_path, width):
    made, shot = reported[0], tmp_path/'page.png'
    chromium(tmp_path, f'--window-size={width},3000', f'--screenshot={shot}', made.path.as_uri())
    image = np.asarray(Image.open(shot).convert('L'))
    assert (image < 100).mean() > .005 and image[:200].std() > 5                              # there is ink, and a heading at the top

@in_browser
def test_nothing_is_fetched(reported, tmp_path):
    made, other = reported[0], tmp_path/'other.html'; other.write_text('<img src="http://elsewhere.invalid/a.png">')
    assert asked_for(tmp_path, other.as_uri())[1] == ['http://elsewhere.invalid/a.png']       # such a page would be found out
    dom, asked = asked_for(tmp_path, made.path.as_uri())
    assert '<h1>r: Test-Realistic</h1>' in dom and str(made.results[0].found['test'][1]['iou']) in dom and asked == []
    injected = tmp_path/'injected.html'; injected.write_text(made.path.read_text().replace('</main>', '<script>document.title = "ran"</script><img src="http://elsewhere.invalid/b.png"></main>'))
    dom, asked = asked_for(tmp_path, injected.as_uri()); assert '<title>ran' not in dom and asked == []        # the policy holds even where something got in

@in_browser
def test_the_slider_in_a_browser(runs, reported, tmp_path):
    "It starts at the chosen threshold with the numbers of the headline, and a link to another threshold shows what scikit-learn finds there"
    made, done = runs[0][0], reported[0]; point = done.results[0].first.calibration.thresholds[1]; s = Split(made, 1); stops = [r for r in done.tables['Threshold'][1].rows if r[0] == '1:1 (balanced)']
    def shown(fragment):
        box = re.search(r'<div class="slider">.*?</table>', chromium(tmp_path, '--dump-dom', done.path.as_uri() + fragment), re.S)[0]              # it is no longer hidden
        rows = [[c for c in re.findall(r'<td>(.*?)</td>', r)] for r in re.findall(r'<tr[^>]*>(.*?)</tr>', box) if '<td>' in r]
        return re.search(r'<output class="now"[^>]*>(.*?)</output>', box)[1], 'class="chosen"' in box, rows
    now, chosen, rows = shown('')
    head = done.tables['Headline'][0].frame['1:1 (balanced)']; assert now == f'{point.threshold:.3f}' and chosen
    assert rows[0][:5] == ['1:1 (balanced)'] + [f'{head[k]:.3f}' for k in ('precision', 'recall', 'object precision (IoU 0.3)', 'object recall (IoU 0.3)')]
    assert rows[0][5:] == [f'{n:.0f}' for n in (s.tile @ s.objects(s.grid))]
    for wanted in (.2, .9):
        now, _, rows = shown(f'#threshold={wanted}'); stop = min(stops, key=lambda r: abs(r[2].value - wanted)); want = s.pixels(stop[1].value); near = min(done.results[0].first.evidence['test'].thresholds, key=lambda t: abs(t - expit(stop[1].value)))
        assert now == f'{stop[2].value:.3f}' and abs(stop[2].value - wanted) < .05 and rows[0][1:3] == [f'{want[k]:.3f}' for k in ('precision', 'recall')]
        assert rows[0][5:] == [f'{n:.0f}' for n in (s.tile @ s.objects(near))]

def test_other_weights_are_an_error(runs, tmp_path):
    folder = shutil.copytree(runs[0][0][0], tmp_path/'r'/'h'/'seed42'); best = folder/'model'/'metrics.json'; chosen = json.loads(best.read_text())
    def tell(name, off): best.write_text(json.dumps(chosen | dict(metrics=chosen['metrics'] | {name: chosen['metrics'][name] - off})))
    for name, value in chosen['metrics'].items():
        if '@' not in name or value != value: continue
        tell(name, 2e-6)
        with pytest.raises(ReportError, match=f'{name} is {value:.8f}.*{value - 2e-6:.8f}'): report([folder])
    tell(name, 5e-7); report([folder])    # within rounding

def test_damaged_evidence_is_an_error(runs, tmp_path):
    folder = shutil.copytree(runs[0][0][0], tmp_path/'r'/'h'/'seed42'); path = folder/'evidence'/'val.parquet'
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ReportError, match=f'val.parquet.*rtsseg-evaluate --run {os.path.relpath(folder)} --split val'): report([folder])

@pytest.mark.parametrize('name', ['environment.json', 'model/metrics.json', 'model/calibration.json', 'log.jsonl', 'evidence/test.parquet', '../../../test_ledger.json'])
@pytest.mark.parametrize('damage', [lambda old: old[:len(old) // 3], lambda old: b'[1]\n' + old[:5], lambda old: b'\xff\xfe' + old])
def test_damaged_files_are_named(runs, tmp_path, name, damage):
    folder = shutil.copytree(runs[0][0][0], tmp_path/'r'/'h'/'seed42'); path = folder/name; old = path.read_bytes() if path.exists() else b'{"a": {"looks": []}}'
    path.write_bytes(damage(old) if name != 'log.jsonl' else damage(old.splitlines()[0]) + b'\n' + old)
    with pytest.raises(ReportError, match=f'{path.name}.*(anew|copy)'): tables(folder)

def test_a_killed_run_has_a_report(runs, tmp_path):
    "Its log's last line is not whole, and is left out; pictures that are not whole are said to be damaged"
    folder = shutil.copytree(runs[0][0][0], tmp_path/'r'/'h'/'seed42'); log = folder/'log.jsonl'; whole = len(read_run(folder).epochs)
    log.write_text(log.read_text() + '{"event": "epoch", "epoch": 3, "los'); assert len(read_run(folder).epochs) == whole == 2
    maps = evidence_path(folder, 'test').with_suffix('.npz'); data = maps.read_bytes()
    flipped = np.frombuffer(data, np.uint8).copy(); flipped[300::997] ^= 1                    # in every picture
    for broken in (data[:len(data) // 2], b'', flipped.tobytes()):
        maps.write_bytes(broken); page = report(folder).path.read_text()
        assert 'The scores for the pictures are damaged' in page and 'seed42 --split test makes them anew' in page and 'image/jpeg' not in page

def test_where_the_page_goes(runs, tmp_path):
    folder = runs[0][0][0]; (tmp_path/'file').write_text('')
    assert report(folder, tmp_path).path == tmp_path/'report.html' and report(folder, str(tmp_path/'new'/'x.html')).path == tmp_path/'new'/'x.html'
    for name in ('x.md', 'x', 'x.htm'):
        with pytest.raises(ReportError, match=re.escape(f'{tmp_path/name}: a page is written to a file that ends in .html')): report(folder, tmp_path/name)
        assert not (tmp_path/name).exists()
    with pytest.raises(ReportError, match='x.html cannot be written'): report(folder, tmp_path/'file'/'x.html')

@pytest.mark.parametrize('out', ['x' * 300, 'x' * 300 + '.html', 'file/x.html', 'a\0.html'])
def test_a_place_that_cannot_be_written(runs, tmp_path, capsys, out):
    "is told in a line, as any error of the disk"
    (tmp_path/'file').write_text('')
    with pytest.raises(SystemExit) as left: rtsseg_report(run=[str(runs[0][0][0])], out=str(tmp_path/out))
    assert left.value.code == 2 and re.match('error: .*(too long|Not a directory|null byte|x.html cannot be written)', capsys.readouterr().err)

def test_command(runs):
    both, cfg = runs
    call = lambda *a: shell('rtsseg-report', *a)
    usage = call('--help').stdout
    for name in ('--run', '--config', '--manifest', '--name', '--epochs', '--seed', '--seeds', '--overrides', '--out'): assert re.search(rf'^ *{name}\b.*\w+ \w+', usage, re.M), name
    named = call('--run', *[f for f, *_ in both])
    assert named.returncode == 0 and '1:200' in named.stdout and os.path.relpath(both[0][0].parent/'report.html') in named.stdout
    config = cfg.runs/'c.yaml'; config.write_text(to_yaml(cfg))
    found = call('--config', config, '--seeds', '42,43'); assert found.stdout == named.stdout
    missing = call('--config', config, '--seed', '7'); assert missing.returncode == 2 and 'no run yet' in missing.stderr and 'Traceback' not in missing.stderr
    both_said = call('--run', both[0][0], '--seed', '7', '--name', 'z'); assert both_said.returncode == 2 and 'a run folder has its own config: leave out name, seed' in both_said.stderr and not both_said.stdout
