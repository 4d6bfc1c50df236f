"The main job through its notebooks, as `make demo` runs it, on a world of a few seconds; and through the commands, on real Sentinel-2 tiles"
import json, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch
from sklearn.metrics import average_precision_score

from rtsseg.config import load, to_yaml
from rtsseg.manifest import read_manifest
from rtsseg.system import find_run
from rtsseg.infer import load_model, predict_logits
from rtsseg.intervals import summary
from rtsseg.evidence import Evidence
from rtsseg.tiles import eval_loader
from helpers.runs import MODEL, toy_world
from helpers.shell import CLEAN, shell

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
STAGES = [('04i_check',), ('05_train',), ('05a_evaluate', '-p', 'split', 'val'), ('06_calibrate',), ('05a_evaluate', '-p', 'split', 'test'), ('07_report',)]

@pytest.fixture(scope='module')
def job(tmp_path_factory):
    "Every stage through papermill, and what the last one printed"
    folder = tmp_path_factory.mktemp('job')
    cfg = load(overrides=['loader.num_workers=0'], name='job', runs=folder/'runs', device='cpu', epochs=3, batch_size=8, val_frequency=1, freeze_backbone_epochs=0,
               lr=dict(base_lr=1e-3, backbone_lr_multiplier=1.), data=dict(manifest=toy_world(folder), tile_size=64, split_check='warn'),
               sampler=dict(curriculum=[dict(first=1, last=3, ratio=1)]), model=MODEL)
    (folder/'job.yaml').write_text(to_yaml(cfg))
    for notebook, *more in STAGES:
        done = subprocess.run([BIN/'papermill', f'{notebook}.ipynb', folder/'out.ipynb', '-p', 'config', folder/'job.yaml', *more], cwd=ROOT/'nbs', env=CLEAN, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, f'{notebook}: {done.stderr[-3000:]}'
    return find_run(cfg), (folder/'out.ipynb').read_text()

def test_the_run_folder_is_whole(job):
    folder, _ = job
    assert {p.name for p in folder.iterdir()} >= {'config.yaml', 'environment.json', 'checkpoints', 'evidence', 'model', 'report.html', 'log.jsonl'}
    assert {p.name for p in (folder/'model').iterdir()} == {'model.safetensors', 'config.yaml', 'normalization_stats.json', 'calibration.json', 'metrics.json', 'README.md', 'SHA256SUMS'}
    assert {p.name for p in (folder/'evidence').iterdir()} >= {'val.parquet', 'test.parquet'}
    looks = json.loads((folder.parents[2]/'test_ledger.json').read_text())
    assert [l['seed'] for e in looks.values() for l in e['looks']] == [42]

def test_the_report_says_the_headline(job):
    folder, printed = job
    for word in ('PR-AUC', '1:200', '1:500', '1:1000', 'report.html'): assert word in printed
    page = (folder/'report.html').read_text()
    assert '1:1000' in page and 'src="http' not in page

def test_scikit_learn_agrees_on_the_exported_model(job):
    "The monitored value of the best validation, and that of the evidence, from the scores of the exported model by another library (guide 10.4, step 1)"
    folder, _ = job; cfg, model = load(folder/'config.yaml'), load_model(folder/'model'); part = read_manifest(cfg.data.manifest).of('val'); scores, truth, tiles = [], [], []
    for batch in eval_loader(part, model.stats, cfg):
        with torch.inference_mode(): z = predict_logits(model.model, batch['image'])
        for row, logits, target in zip(batch['tile'].tolist(), z.reshape(batch['target'].shape).numpy(), batch['target'].numpy()):
            scores.append(logits[target != 255]); truth.append(target[target != 255] == 1); tiles.append(np.full(len(scores[-1]), part.table.positive.iloc[row]))
    positive = part.table.positive; each = np.where(np.concatenate(tiles), 1., 200 * positive.sum() / (~positive).sum())
    ap = average_precision_score(np.concatenate(truth), np.concatenate(scores), sample_weight=each)
    assert summary(Evidence.read(folder/'evidence'/'val.parquet'), [200])[200]['pr_auc'] == pytest.approx(ap, abs=1e-4)
    assert json.loads((folder/'model'/'metrics.json').read_text())['value'] == pytest.approx(ap, abs=1e-4)

def test_real_sentinel_tiles_from_check_to_report(data_dir, tmp_path):
    "configs/s2_landslide.yaml end to end, at two epochs: its labels are sparse points, so only that it is stable is asked"
    common = ['--config', ROOT/'configs'/'s2_landslide.yaml', '--manifest', tmp_path/'s2'/'manifest.csv', '--epochs', '2',
              '--overrides', json.dumps([f'runs={tmp_path}/runs', 'tracker.kind=none', 'val_frequency=1', 'batch_size=4'])]
    def call(command, *more):
        done = shell(command, *common, *more, cwd=tmp_path, timeout=400)
        assert done.returncode == 0, f'{command}: {done.stdout[-1500:]} {done.stderr[-1500:]}'
        return done.stdout
    said = call('rtsseg-check', '--batches', '2', '--picture', '')
    assert 'specks' in said or 'sparse' in said                    # the check says what is odd about the data
    call('rtsseg-train', '--inline'); call('rtsseg-evaluate', '--split', 'val'); call('rtsseg-calibrate'); call('rtsseg-evaluate', '--split', 'test')
    assert 'report.html' in call('rtsseg-report')
    rows = [json.loads(l) for l in next((tmp_path/'runs').rglob('log.jsonl')).read_text().splitlines() if '"event": "epoch"' in l]
    assert len(rows) == 2 and rows[-1]['skipped'] == 0 and rows[-1]['train/loss/focal'] < rows[0]['train/loss/focal']
