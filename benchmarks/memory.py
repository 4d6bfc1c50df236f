"""Peak memory of a large case beside a small one: it must not grow with the scene, the split, the list or the search

    python benchmarks/memory.py [case=small,large …]      as predict=1024,4096 map=10,100; none: all, at full size

predict: side of the scene; evaluate: tiles of the split; map: scenes of the list; search: trials. Each runs in a
process of its own. Full size takes hours on a few cores; a row says which sizes it is of."""
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import rasterio
import torch
from rasterio.transform import from_origin

from common import emit_value, peak_mb, short
from rtsseg.config import load, to_yaml
from rtsseg.evaluation import evaluate
from rtsseg.fleet import map_scenes
from rtsseg.infer import save_model
from rtsseg.manifest import read_manifest
from rtsseg.models import build
from rtsseg.prediction import predict
from rtsseg.raster import write_raster
from rtsseg.runs import run_folder
from rtsseg.stats import Stats
from rtsseg.toy import tiny_toy
from rtsseg.tuning import search

SIZES = dict(predict=(4096, 32768), evaluate=(1000, 20_000), map=(10, 1000), search=(2, 200))
MOST = 1.1
NET = dict(architecture='unet', encoder='tu-test_efficientnet', weights=None, options=dict(decoder_channels=[8] * 5))
PLACE = dict(transform=from_origin(-2_500_000, 700_000, 3, 3), crs='EPSG:3413')

def config(tile, **more):
    "Settings of a small network on the CPU"
    settings = dict(device='cpu', batch_size=8, model=NET, data=dict(tile_size=tile), loader=dict(num_workers=0),
                    tracker=dict(kind='none'))
    return load(**settings | more)

def write_model(folder, cfg, manifest_hash=''):
    "A model directory of random weights"
    torch.manual_seed(0)
    stats = Stats(['R', 'G', 'B'], 'uint8', 255., [.3] * 3, [.1] * 3, 1, manifest_hash, pixel_size=[3., 3.])
    best = dict(epoch=1, step=1, value=0., metrics={})
    return save_model(folder, build(cfg.model).eval(), cfg, stats, best, {})

def write_scene(path, side):
    "A scene of noise, written in strips"
    rng = np.random.default_rng(0)
    layout = dict(driver='GTiff', height=side, width=side, count=3, dtype='uint8', nodata=0, tiled=True, blockxsize=512,
                  blockysize=512)
    with rasterio.open(path, 'w', **layout, **PLACE) as target:
        for top in range(0, side, 512):
            rows = min(512, side - top)
            strip = rng.integers(1, 256, (3, rows, side), 'uint8')
            target.write(strip, window=rasterio.windows.Window(0, top, side, rows))

# ---------------------------------------------------------------- what is measured

def make_predict(home, side):
    write_model(home/'model', config(512))
    write_scene(home/'scene.tif', side)

def run_predict(home, side):
    predict(home/'model', home/'scene.tif', home/'map.tif', device='cpu')

def make_evaluate(home, tiles):
    "A run folder whose validation split has so many tiles, which share a hundred files"
    rng, rows = np.random.default_rng(0), []
    mask = np.zeros((1, 64, 64), 'uint8')
    mask[0, 20:30, 20:30] = 1
    # the last two are those of the other splits
    for k in range(102):
        write_raster(home/f'{k}.tif', rng.integers(1, 256, (3, 64, 64), 'uint8'), **PLACE)
        write_raster(home/f'{k}_m.tif', mask * (k % 4 == 0), **PLACE)
    for k in range(tiles + 2):
        split = 'val' if k < tiles else ('train', 'test')[k - tiles]
        file = k % 100 if k < tiles else 100 + k - tiles
        x, y = k % 200 * 192., k // 200 * 192.
        rows.append(dict(tile_id=f't{k}', image=f'{file}.tif', mask=f'{file}_m.tif', split=split, region='r',
                         block=f'b{k % 50}', n_positive=100 * (file % 4 == 0), xmin=x, ymin=y, xmax=x + 192,
                         ymax=y + 192, crs='EPSG:3413'))
    pd.DataFrame(rows).to_csv(home/'manifest.csv', index=False)
    data = dict(manifest=home/'manifest.csv', tile_size=64, split_check='warn')
    cfg = config(64, name='memory', runs=home/'runs', data=data, metrics=dict(ratios=[1], monitor='pr_auc@1'))
    world = read_manifest(cfg.data.manifest)
    folder = run_folder(cfg, world.hash)
    write_model(folder/'model', cfg, world.hash)
    (folder/'config.yaml').write_text(to_yaml(cfg))

def run_evaluate(home, tiles):
    folder, = home.glob('runs/memory/*/seed42')
    evaluate(folder, force=True)

def make_map(home, scenes):
    write_model(home/'model', config(64))
    rng = np.random.default_rng(0)
    names = [f'{k}.tif' for k in range(scenes)]
    for name in names:
        write_raster(home/name, rng.integers(1, 256, (3, 96, 96), 'uint8'), **PLACE, nodata=0)
    pd.DataFrame(dict(scene=names)).to_csv(home/'scenes.csv', index=False)

def run_map(home, scenes):
    map_scenes(home/'model', home/'scenes.csv', home/'job', device='cpu', windows=50)

def make_search(home, trials):
    tiny_toy(home, regions=1, scene_size=384, block_size=192)
    cfg = config(64, name='memory', runs=home/'runs', epochs=1, val_frequency=1, freeze_backbone_epochs=0,
                 data=dict(manifest=home/'manifest.csv', tile_size=64, split_check='warn'),
                 sampler=dict(curriculum=[dict(first=1, last=1, ratio=1)]), augment=dict(enabled=False))
    (home/'memory.yaml').write_text(to_yaml(cfg))
    (home/'space.yaml').write_text('lr.base_lr: {low: 1.0e-4, high: 1.0e-2, log: true}\n')

def run_search(home, trials):
    search(load(home/'memory.yaml'), home/'space.yaml', trials)

# ---------------------------------------------------------------- processes

def in_a_process(step, case, home, size):
    "Run a step of a case in a process of its own; the last line that it prints"
    command = [sys.executable, __file__, '--', step, case, home, str(size)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f'{step} {case} {size}:\n{done.stdout}{done.stderr}')
    return done.stdout.splitlines()[-1]

def peak_of(case, size):
    "Megabytes of the process that runs a case"
    with tempfile.TemporaryDirectory() as home:
        in_a_process('make', case, home, size)
        return float(in_a_process('run', case, home, size))

def step(name, case, home, size):
    "In a process of its own: make what a case needs, or run it; prints its peak"
    torch.set_num_threads(1)
    globals()[f'{name}_{case}'](Path(home), int(size))
    print(peak_mb())

def main(texts):
    asked = [text.partition('=')[::2] for text in texts] or [(case, '') for case in SIZES]
    for case, sizes in asked:
        small, large = map(int, sizes.split(',')) if sizes else SIZES[case]
        peaks = [peak_of(case, size) for size in (small, large)]
        ratio = peaks[1] / peaks[0]
        emit_value(f'peak memory of {case}: {large:,} beside {small:,}', round(peaks[1]), unit='MB',
                   small=f'{peaks[0]:.0f} MB', ratio=short(ratio), goal=f'≤ {MOST} × small', met=ratio <= MOST)

if __name__ == '__main__':
    if sys.argv[1:2] == ['--']:
        step(*sys.argv[2:])
    else:
        main(sys.argv[1:])
