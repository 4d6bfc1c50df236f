"""A scene of 8192² through two workers of a fleet, one of which is killed: the bytes of `predict`, and what it takes

    python benchmarks/fleet.py [side] [tiles]

The second part maps a list of small tiles, and tells what a tile costs beside its forward pass."""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rasterio.transform import from_origin

from common import emit_value, short, timed
from rtsseg.claims import Store
from rtsseg.config import ToySource, load
from rtsseg.fleet import MapOptions, Mapper, begin_job, work_of
from rtsseg.infer import save_model
from rtsseg.launch import StopSignals
from rtsseg.models import build
from rtsseg.prediction import predict, window_logits
from rtsseg.raster import write_raster
from rtsseg.scenelist import read_scenes
from rtsseg.stats import Stats
from rtsseg.toy import CRS, METRES, scene

TILE = 512
EXPIRY = 10
WORK = 'import json, sys; from rtsseg.fleet import map_scenes; map_scenes(**json.loads(sys.argv[1]))'

def write_model(folder):
    "A small network of random weights"
    settings = ['model.encoder=tu-test_efficientnet', 'model.weights=null', 'device=cpu', f'data.tile_size={TILE}']
    cfg = load('tiny', overrides=settings)
    stats = Stats(['R', 'G', 'B'], 'uint8', 255., [.3] * 3, [.1] * 3, 1, '')
    torch.manual_seed(0)
    save_model(folder, build(cfg.model), cfg, stats, dict(epoch=1, step=1, value=0., metrics={}), {})

def toy_image(side):
    "A toy scene (3, side, side), repeated where it is larger than 2048"
    part = scene(ToySource(scene_size=min(side, 2048), tile_size=64, prevalence=.02, seed=0), 0).image
    times = -(-side // len(part))
    return np.tile(part.transpose(2, 0, 1), (1, times, times))[:, :side, :side]

def start(options):
    return subprocess.Popen([sys.executable, '-c', WORK, json.dumps(options)], stderr=subprocess.DEVNULL,
                            env=os.environ | dict(OMP_NUM_THREADS='1'))

def claims_of(job, process):
    return [file.name for file in (job/'claims').glob('*') if f'-{process.pid}-' in file.read_text()]

def with_a_killed_worker(options):
    "Seconds of a job of two workers, the first of which is killed while it works on its second shard or a later one"
    job, begin = Path(options['out']), time.perf_counter()
    killed, other = start(options), start(options)
    while not [*(job/'shards').glob('s*')] or not any(name[0] == 's' for name in claims_of(job, killed)):
        assert killed.poll() is None, 'it ended before it was killed'
        time.sleep(.01)
    killed.kill()
    killed.wait()
    assert other.wait() == 0
    return time.perf_counter() - begin

def large_scene(home, side):
    write_raster(home/'scene.tif', toy_image(side), from_origin(-3_000_000, 900_000, METRES, METRES), CRS, nodata=0,
                 inner=512)
    alone = timed(predict, home/'model', home/'scene.tif', home/'map.tif', '', '', '', 'cpu')
    options = dict(model=f'{home}/model', scenes=f'{home}/scene.tif', out=f'{home}/job', device='cpu', windows=100,
                   expiry=EXPIRY)
    seconds = with_a_killed_worker(options)
    assert (home/'job/maps/scene.tif').read_bytes() == (home/'map.tif').read_bytes()
    emit_value(f'a scene of {side}² by two workers, one killed: the bytes of predict', short(seconds), short(alone),
               's', expiry=EXPIRY)

def small_tiles(home, count):
    (home/'tiles').mkdir()
    image = toy_image(2048)
    for k in range(count):
        top, left = 128 * (k // 12 % 12), 128 * (k % 12)
        write_raster(home/f'tiles/{k}.tif', image[:, top:top + TILE, left:left + TILE],
                     from_origin(-3_000_000 + 2000 * k, 900_000, METRES, METRES), CRS, nodata=0)
    pd.DataFrame(dict(scene=[f'tiles/{k}.tif' for k in range(count)])).to_parquet(home/'list.parquet')
    store, options = Store(home/'tiled'), MapOptions(f'{home}/model', device='cpu', tiles=True, windows=count)
    mapper, windows = Mapper(options), torch.zeros(1, 3, TILE, TILE)
    job = begin_job(store, options, read_scenes(home/'list.parquet'))
    with StopSignals() as signals:
        seconds = timed(work_of(store, job, mapper, signals).do, 't000000', clock=time.process_time)
    forward = timed(lambda: [window_logits(mapper.model, windows, 'none') for _ in range(count)],
                    clock=time.process_time)
    archive = home/'tiled/maps/t000000.zip'
    emit_value(f'a tile of {TILE}² in a list, beside its forward pass', short(1000 * seconds / count),
               short(1000 * forward / count), 'ms', bytes=archive.stat().st_size // count, files_per_shard=2)

def main(side=8192, tiles=100):
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_model(home/'model')
        small_tiles(home, tiles)
        large_scene(home, side)

if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
