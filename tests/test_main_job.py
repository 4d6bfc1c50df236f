"""The main job through its notebooks, on a world of a few seconds; and through the commands, on
real Sentinel-2 tiles"""
import json
import subprocess
import sys
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import torch
from sklearn.metrics import average_precision_score

from helpers.runs import MODEL, tiny
from helpers.shell import CLEAN, shell
from rtsseg.config import load, to_yaml
from rtsseg.evidence import Evidence
from rtsseg.infer import load_model, predict_logits
from rtsseg.intervals import summary
from rtsseg.manifest import read_manifest
from rtsseg.runs import read_log
from rtsseg.system import find_run
from rtsseg.tiles import eval_loader

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
BEFORE_THE_TEST = [('04i_check',), ('05_train',), ('05a_evaluate', '-p', 'split', 'val'), ('06_calibrate',)]

# each notebook starts a kernel, which imports torch: six starts with that of the trainer
pytestmark = pytest.mark.slow

def papermill(notebook, out, *parameters):
    "Execute a chapter"
    command = [BIN/'papermill', f'{notebook}.ipynb', out, *parameters]
    done = subprocess.run(command, cwd=ROOT/'nbs', env=CLEAN, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f'{notebook}: {done.stderr[-3000:]}'

@pytest.fixture(scope='module')
def job(tmp_path_factory):
    """The run folder after every stage through papermill, and what the last stage printed. The test split is evaluated
    by the command, because the chapter evaluated the other split"""
    folder = tmp_path_factory.mktemp('job')
    cfg = tiny(folder, name='job', epochs=2)
    (folder/'job.yaml').write_text(to_yaml(cfg))
    out = folder/'out.ipynb'
    given = '-p', 'config', folder/'job.yaml'
    for notebook, *more in BEFORE_THE_TEST:
        papermill(notebook, out, *given, *more)
    done = shell('rtsseg-evaluate', '--config', folder/'job.yaml', '--split', 'test')
    assert done.returncode == 0, done.stderr
    papermill('07_report', out, *given)
    return find_run(cfg), out.read_text()

def names(folder):
    return {path.name for path in folder.iterdir()}

def test_the_run_folder_is_whole(job):
    folder, _ = job
    expected = {'config.yaml', 'environment.json', 'checkpoints', 'evidence', 'model', 'report.html', 'log.jsonl'}
    assert names(folder) >= expected
    assert names(folder/'model') == {
        'model.safetensors',
        'config.yaml',
        'normalization_stats.json',
        'calibration.json',
        'metrics.json',
        'README.md',
        'SHA256SUMS',
    }
    assert names(folder/'evidence') >= {'val.parquet', 'test.parquet'}
    ledger = json.loads((folder.parents[2]/'test_ledger.json').read_text())
    assert [look['seed'] for entry in ledger.values() for look in entry['looks']] == [42]

def test_the_report_says_the_headline(job):
    folder, printed = job
    for word in ('PR-AUC of pixels at 1:200', 'object recall at 1:200', 'report.html', 'report_files'):
        assert word in printed
    page = (folder/'report.html').read_text()
    assert '1:1000' in page
    assert 'src="http' not in page

def test_the_map_of_the_test_region_is_whole(job, tmp_path):
    "All products, which other libraries open; the map lies on the grid of the tiles"
    folder, _ = job
    papermill('08z_map', tmp_path/'map.ipynb', '-p', 'config', folder.parents[3]/'job.yaml')
    printed, made = (tmp_path/'map.ipynb').read_text(), folder/'map-test'
    for word in ('objects: ', 'area: ', 'precision of cells', 'recall of cells', 'preview.html'):
        assert word in printed
    with rasterio.open(made/'map.tif') as mapped, rasterio.open(made/'source'/'scene.tif') as scene:
        assert mapped.tags(ns='IMAGE_STRUCTURE')['LAYOUT'] == 'COG'
        assert (mapped.crs, mapped.transform, mapped.shape) == (scene.crs, scene.transform, scene.shape)
    summary = json.loads((made/'summary.json').read_text())
    objects, same = gpd.read_file(made/'objects.gpkg'), gpd.read_parquet(made/'objects.parquet')
    assert len(objects) == len(same) == summary['polygons']
    assert len(gpd.read_file(made/'source'/'known.gpkg')) == summary['known']

def valid_pixels(model, part, cfg):
    "Scores, labels and tile rows of all valid pixels of a split, each in one array"
    scores, truth, rows = [], [], []
    for batch in eval_loader(part, model.stats, cfg):
        with torch.inference_mode():
            logits = predict_logits(model.model, batch['image']).reshape(batch['target'].shape)
        valid = batch['target'] != 255
        scores.append(logits[valid].numpy())
        truth.append((batch['target'] == 1)[valid].numpy())
        rows.append(np.repeat(batch['tile'].numpy(), valid.sum((1, 2)).numpy()))
    return np.concatenate(scores), np.concatenate(truth), np.concatenate(rows)

def test_scikit_learn_agrees_on_the_exported_model(job):
    """The monitored value of the best validation, and that of the evidence, from the scores of the exported model by
    another library (guide 10.4, step 1)"""
    folder, _ = job
    cfg, model = load(folder/'config.yaml'), load_model(folder/'model')
    part = read_manifest(cfg.data.manifest).of('val')
    scores, truth, rows = valid_pixels(model, part, cfg)
    positive = part.table.positive.to_numpy()
    tile_weight = np.where(positive, 1., 200 * positive.sum() / (~positive).sum())
    ap = average_precision_score(truth, scores, sample_weight=tile_weight[rows])
    evidence = Evidence.read(folder/'evidence'/'val.parquet')
    assert summary(evidence, [200])[200]['pr_auc'] == pytest.approx(ap, abs=1e-4)
    exported = json.loads((folder/'model'/'metrics.json').read_text())
    assert exported['value'] == pytest.approx(ap, abs=1e-4)

@pytest.mark.real
def test_real_sentinel_tiles_from_check_to_report(data_dir, tmp_path):
    """configs/s2_landslide.yaml end to end, with a small model and two epochs. Its labels are sparse points, so quality
    is not asserted"""
    overrides = [f'runs={tmp_path}/runs', 'tracker.kind=none', 'val_frequency=1', 'batch_size=4']
    overrides += [f'model.encoder={MODEL["encoder"]}', f'model.options={json.dumps(MODEL["options"])}']
    common = [
        *('--config', ROOT/'configs'/'s2_landslide.yaml'),
        *('--manifest', tmp_path/'s2'/'manifest.csv'),
        *('--epochs', '2'),
        *('--overrides', json.dumps(overrides)),
    ]

    def call(command, *more):
        done = shell(command, *common, *more, cwd=tmp_path, timeout=400)
        assert done.returncode == 0, f'{command}: {done.stdout[-1500:]} {done.stderr[-1500:]}'
        return done.stdout

    printed = call('rtsseg-check', '--batches', '2', '--picture', '')
    # the check says what is odd about the data
    assert 'specks' in printed or 'sparse' in printed
    call('rtsseg-train', '--inline')
    call('rtsseg-evaluate', '--split', 'val')
    call('rtsseg-calibrate')
    call('rtsseg-evaluate', '--split', 'test')
    assert 'report.html' in call('rtsseg-report')
    first, second = read_log(next((tmp_path/'runs').rglob('log.jsonl')).parent)
    assert second['skipped'] == 0
    assert second['train/loss/focal'] < first['train/loss/focal']
