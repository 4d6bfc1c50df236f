"The report: its numbers by other libraries, its page in a browser, its errors from a shell"
import json, os, re, shutil, subprocess, sys
from pathlib import Path

import numpy as np, pytest
from PIL import Image
from scipy import ndimage
from scipy.special import expit
from sklearn.metrics import average_precision_score, f1_score, jaccard_score, precision_score, recall_score

from rtsseg.calibrate import calibrate
from rtsseg.config import load, run_folder, to_yaml, write_atomic
from rtsseg.data import read_manifest, read_tile, write_manifest
from rtsseg.intervals import summary
from rtsseg.metrics import Meter, evidence_path, telling_tiles
from rtsseg.report import METRICS, ReportError, gallery, read_run, report
from rtsseg.toy import tiny_toy

HOSTILE = '<script>alert(1)</script>&"\''

def predict(mask, key):
    "Half-precision logits that know a little"
    rng = np.random.default_rng(key); noise = ndimage.gaussian_filter(rng.normal(size=mask.shape), 5) * 17
    return (-5 + 7 * ndimage.gaussian_filter((mask == 1).astype(float), 1.5) + 2 * noise).astype(np.float16)

def make_run(cfg, world, shift=0):
    "What train, evaluate and calibrate leave behind; and the scores and masks of the test split. A shift is added to all scores"
    folder, pixels = run_folder(cfg, world.hash), {}
    write_atomic(folder/'config.yaml', to_yaml(cfg))
    write_atomic(folder/'environment.json', json.dumps(dict(manifest_hash=world.hash, git_commit='a' * 40, git_clean=False, system='<b>Linux', python='3.11', rtsseg='0', processor='x', cpus=2, versions={'torch': '2'})))
    for split in ('val', 'test'):
        part = world.of(split); masks = np.stack([read_tile(part, i)[2] for i in range(len(part))])
        logits = np.stack([predict(m, [cfg.seed, i, len(split)]) + np.float16(shift) for i, m in enumerate(masks)])
        cuts = [p.raw_threshold for p in found.thresholds.values()] if split == 'test' else []
        meter = Meter(part.table, sorted({.25, .5, .75, *cuts})); meter.update(logits, masks, np.arange(len(part)))
        evidence = meter.evidence(); evidence.write(path := evidence_path(folder, split)); pixels[split] = logits.astype(float), masks, part.table.positive.to_numpy()
        kept = {evidence['tile_id'][i] for t in evidence.thresholds for rows in telling_tiles(evidence, t).values() for i in rows}
        np.savez_compressed(path.with_suffix('.npz'), **{tile: z for tile, z in zip(part.table.tile_id, logits) if tile in kept})
        if split == 'val':
            found = calibrate(evidence, cfg.calibrate, cfg.metrics); found.save(folder/'model'/'calibration.json')
            value = summary(evidence, [200], ious=())[200]['pr_auc']
            write_atomic(folder/'model'/'metrics.json', json.dumps(dict(epoch=2, step=20, value=value, metrics={'pr_auc@200': value})))
    lines = [dict(event='start', epoch=1, step=0, device='cpu', processes=1), dict(event='epoch', epoch=1, step=10, seconds=1., **{'lr/encoder': 1e-3, 'train/loss/focal': .1}),
             dict(event='epoch', epoch=2, step=20, seconds=1., **{'lr/encoder': 1e-4, 'train/loss/focal': .05, 'val/loss': .06, 'val/pr_auc@200': value}), dict(event='end', reason='all epochs done', epoch=2, step=20, best=2)]
    write_atomic(folder/'log.jsonl', ''.join(json.dumps(l) + '\n' for l in lines))
    return folder, pixels, found

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp('report')
    table = read_manifest(tiny_toy(root)).table; table['region'] = table.region.where(table.region != table.region[0], HOSTILE)
    world = read_manifest(write_manifest(table, root/'hostile.csv'))
    cfg = load(name='r', runs=root/'runs', data=dict(manifest=world.path, tile_size=64), epochs=2, metrics=dict(ratios=[1, 200], replicates=50), calibrate=dict(ratio=1, target_precision=.5))
    return [make_run(cfg.model_copy(update=dict(seed=s)), world) for s in (42, 43)], cfg

def match_by_hand(prob, mask, cut, iou):
    "Guide 6.2, the five steps, with SciPy's labels: tp, fp, fn"
    prob = np.where(mask == 255, 0, prob); full = np.ones((3, 3)); p, n = ndimage.label(prob >= cut, full); g, m = ndimage.label(mask == 1, full); taken, tp = set(), 0
    for i in sorted(range(1, n + 1), key=lambda i: -prob[p == i].mean()):
        ious = [(np.sum((p == i) & (g == j)) / np.sum((p == i) | (g == j)), -j) for j in range(1, m + 1)]
        best, j = max(ious, default=(0, 0))
        if best >= iou and j not in taken: taken.add(j); tp += 1
    return tp, n - tp, m - tp

@pytest.mark.parametrize('ratio', [1, 200])
def test_headline_by_other_libraries(runs, ratio):
    (folder, pixels, calibration), _ = runs[0]
    made = report([folder]).found['test'][ratio]; z, masks, positive = pixels['test']
    w = ratio * positive.sum() / (~positive).sum(); weight = np.where(positive, 1., w)
    valid, point = masks != 255, calibration.thresholds[ratio]
    each = np.broadcast_to(weight[:, None, None], z.shape)[valid]; y, s = masks[valid] == 1, z[valid]
    scores = dict(iou=jaccard_score, f1=f1_score, precision=precision_score, recall=recall_score)
    want = dict(pr_auc=average_precision_score(y, s, sample_weight=each), **{k: f(y, s >= point.logit, sample_weight=each) for k, f in scores.items()})
    for iou in (.1, .3, .5):
        tp, fp, fn = weight @ np.array([match_by_hand(1 / (1 + np.exp(-a)), b, point.raw_threshold - 1e-9, iou) for a, b in zip(z, masks)])
        want |= {f'object_{k}_{100 * iou:.0f}': v for k, v in dict(precision=tp / (tp + fp), recall=tp / (tp + fn), f1=2 * tp / (2 * tp + fp + fn)).items()}
    assert set(want) == set(made)
    assert sum(c.value is not None for c in made.values()) >= (len(made) if w <= 1 else 4)        # blank only where a split cannot support it
    for k, v in want.items():
        if made[k].value is None: assert 'of the 30 negative tiles' in made[k].why and made[k].high >= v
        else: assert made[k].value == pytest.approx(v, abs=1e-9), k

def test_mean_and_spread(runs):
    both, _ = runs
    several, single = report([f for f, *_ in both]), [report([f]) for f, *_ in both]
    assert several.path == both[0][0].parent/'report.html' and single[0].path == both[0][0]/'report.html'
    for k in METRICS:
        values = [s.found['test'][1][k].value for s in single]; cell = several.found['test'][1][k]
        assert (cell.value, cell.std) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
        assert f'{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}' in str(several)
    assert 'one seed (42)' in str(single[0]) and 'blocks hold positives, 10 are needed' in str(single[0])
    assert os.path.relpath(several.path) in str(several) and all(os.path.relpath(f) in str(several) for f, *_ in both)

def test_gallery_shows_what_the_report_counts(runs):
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
            _, right, scale = figure.axes; image, = right.images
            np.testing.assert_allclose(image.get_array(), expit(scores[i] / found.temperature)); assert image.get_clim() == (0, 1)
            assert scale.lines[-1].get_ydata()[0] == pytest.approx(point.threshold)
    assert len(set(shown)) == len(shown)
    assert f'what has at least {point.threshold:.3f}, the threshold of 1:1' in report([folder]).path.read_text()

def test_validation_pictures_come_before_its_calibration(runs):
    "The threshold is chosen after the maps were kept: each picture is still whole, and of a tile that counts"
    run = read_run(runs[0][0][0]); pictures = gallery(run, 'val')
    assert all(pictures.values()) and all(len(figure.axes) == 3 for items in pictures.values() for figure, _ in items)
    evidence_path(run.folder, 'val').with_suffix('.npz').rename(run.folder/'elsewhere.npz')
    try: assert gallery(run, 'val') == {}
    finally: (run.folder/'elsewhere.npz').rename(evidence_path(run.folder, 'val').with_suffix('.npz'))

def test_estimators_are_of_one_seed(runs):
    "What is counted w times stands beside what is drawn: both are of the seed that is shown, not of the mean"
    both, _ = runs; folders = [f for f, *_ in both]; text = report(folders).path.read_text()
    for k in ('pr_auc', 'iou'):
        row = re.search(rf'<td>{METRICS[k]}</td><td>1:1 \(balanced\)</td><td>[^<]*</td><td>([^<]*)</td>', text)
        assert float(row[1]) == pytest.approx(report(folders[:1]).found['val'][1][k].value, abs=5.1e-4)

@pytest.mark.parametrize('shift', [20, 60])
def test_thresholds_close_to_one(runs, tmp_path, shift):
    "A threshold of 1 − 1e-10 is printed as such; one whose probability is rounded to 1 is no threshold, and the page says so; so does it of a temperature that cannot help"
    cfg = runs[1].model_copy(update=dict(runs=tmp_path)); folder, _, found = make_run(cfg, read_manifest(cfg.data.manifest), shift); point = found.thresholds[1]
    text = report([folder]).path.read_text(); row = re.search(r'<tr><td>1:1</td><td>100.000 \(\w\)</td>(.*?)</tr>', text)[1]
    assert 'no best temperature between 0.01 and 100: a larger one always fits better' in text and 'The scores do rank slumps above background (PR-AUC 0.' in text
    if shift == 20:
        assert point.reached and point.logit > 15 and f'<td>{expit(point.logit / 100):.3f}' in row and f'<td>1 − {expit(-point.logit):.2g}</td>' in row
    else: assert not point.reached and '<td>0.5, not reached' in row and 'where neighbouring probabilities are rounded to the same number' in text

def test_page_escapes_and_fetches_nothing(runs):
    text = report([runs[0][0][0]]).path.read_text()
    assert '<script' not in text and '&lt;script&gt;alert(1)&lt;/script&gt;&amp;&quot;&#x27;' in text and '<b>Linux' not in text
    assert not re.search(r'(?:src|href|action|data|url|@import)\s*[=(]?\s*["\']?\s*(?:https?:)?//', text) and not re.search(r'<(?:link|iframe|object|embed|script|base)\b', text)
    assert "default-src 'none'" in text and 'with uncommitted changes' in text

@pytest.mark.skipif(not (browser := shutil.which('chromium') or shutil.which('chromium-browser')), reason='no Chromium here')
@pytest.mark.parametrize('width', [400, 1200])
def test_page_in_a_browser(runs, tmp_path, width):
    made, shot = report([runs[0][0][0]]), tmp_path/'page.png'
    flags = '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --hide-scrollbars'.split()
    subprocess.run([browser, *flags, f'--user-data-dir={tmp_path/"profile"}', f'--window-size={width},3000', f'--screenshot={shot}', made.path.as_uri()], check=True, timeout=120, capture_output=True)
    image = np.asarray(Image.open(shot).convert('L'))
    assert (image < 100).mean() > .005 and image[:200].std() > 5                              # there is ink, and a heading at the top
    dom = subprocess.run([browser, *flags, f'--user-data-dir={tmp_path/"profile"}', '--dump-dom', made.path.as_uri()], check=True, timeout=120, capture_output=True, text=True).stdout
    assert '<h1>r: Test-Realistic</h1>' in dom and str(made.found['test'][1]['iou']) in dom

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
    with pytest.raises(ReportError, match='val.parquet.*rtsseg-evaluate makes it anew'): report([folder])

def test_command(runs):
    both, cfg = runs
    command = str(Path(sys.executable).with_name('rtsseg-report')); call = lambda *a: subprocess.run([command, *map(str, a)], capture_output=True, text=True, timeout=120)
    usage = call('--help').stdout
    for name in ('runs', '--config', '--manifest', '--name', '--epochs', '--seed', '--seeds', '--overrides', '--out'): assert re.search(rf'^ *{name}\b.*\w+ \w+', usage, re.M), name
    named = call(*[f for f, *_ in both])
    assert named.returncode == 0 and '1:200' in named.stdout and os.path.relpath(both[0][0].parent/'report.html') in named.stdout
    config = cfg.runs/'c.yaml'; config.write_text(to_yaml(cfg))
    found = call('--config', config, '--seeds', '42,43'); assert found.stdout == named.stdout
    missing = call('--config', config, '--seed', '7'); assert missing.returncode == 2 and 'no run yet' in missing.stderr and 'Traceback' not in missing.stderr
    assert call('nowhere/x/seed1').returncode == 2
