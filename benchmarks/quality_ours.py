"""A cell of quality.py: this library, as `rtsseg plan` and `rtsseg train` run it

    python benchmarks/quality_ours.py plan SET MINUTES FILE             once for all seeds
    python benchmarks/quality_ours.py train SET FILE SEED FOLDER        train by that plan and predict
"""
import json
import sys
import time
from pathlib import Path

import numpy as np

from quality_data import prepared, rows_of, write_facts, write_scores
from rtsseg.config import load
from rtsseg.infer import load_model
from rtsseg.launch import StopSignals
from rtsseg.plan import write_plan
from rtsseg.prediction import MapJob, Scene, map_parts, predict_rows
from rtsseg.rawtile import BAND_COLUMN
from rtsseg.runs import read_log
from rtsseg.training import prepare_run, train

def predict(model, manifest, row, signals):
    "Log-odds of a whole image, by the windows of a map"
    path, extra = manifest.root/row['image'], row['extra'] and manifest.root/row['extra']
    crs = 'none' if row['crs'] == 'none' else ''
    scene = Scene(path, extra, crs, model, row.get(BAND_COLUMN, ''))
    job = MapJob(model, scene, None, model.cfg.infer.views, 8)
    parts, logits = map_parts(scene.height, scene.width, scene.tile), np.empty((scene.height, scene.width), 'float32')
    for found in predict_rows(job, set(range(len(parts))), signals):
        logits[parts[found.index].toslices()] = found.logits
    return logits

def curve(folder, monitor):
    "[steps, value] of each validation"
    found, steps = [], 0
    for row in read_log(folder):
        steps += row['batches']
        if f'val/{monitor}' in row:
            found.append([steps, round(row[f'val/{monitor}'], 4)])
    return found, steps

def plan(name, minutes, file):
    "Write the plan, and beside it the seconds that it took"
    file = Path(file)
    manifest = prepared(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    write_plan(file, manifest=str(manifest.path), minutes=float(minutes), device='cpu')
    seconds_file(file).write_text(json.dumps(round(time.monotonic() - began, 1)))

def seconds_file(plan_file):
    return plan_file.with_suffix('.json')

def train_cell(name, file, seed, out):
    out = Path(out)
    manifest = prepared(name)
    cfg = load(file, overrides=[f'seed={seed}', f'runs={out}/runs', 'tracker.kind=none'])
    # reads all images and takes their statistics: preparation, which does not count
    prepare_run(cfg)
    began = time.monotonic()
    folder = train(cfg)
    seconds = time.monotonic() - began
    model = load_model(folder/'model')
    with StopSignals() as signals:
        for row in rows_of(manifest, 'test'):
            write_scores(out, row['tile_id'], predict(model, manifest, row, signals))
    validations, steps = curve(folder, cfg.metrics.monitor)
    write_facts(out, seconds=round(seconds, 1), steps=steps, planning=json.loads(seconds_file(Path(file)).read_text()),
                encoder=cfg.model.encoder, tile_size=cfg.data.tile_size, batch=cfg.batch_size,
                monitor=cfg.metrics.monitor, validations=validations)

if __name__ == '__main__':
    {'plan': plan, 'train': train_cell}[sys.argv[1]](*sys.argv[2:])
