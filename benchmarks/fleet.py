"""A scene of 8192² through two workers of a fleet, one of which is killed: the bytes of `predict`, and what it takes

    python benchmarks/fleet.py [side] [tiles]

The workers are processes of this machine, and then actors of Ray, which starts the killed one again; its start counts.
The other part maps a list of small tiles, and tells what a tile costs beside its forward pass."""
import contextlib
import json
import os
import signal
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
from rtsseg.prediction import predict, window_logits, window_starts
from rtsseg.raster import write_raster
from rtsseg.scenelist import read_scenes
from rtsseg.stats import Stats
from rtsseg.toy import CRS, METRES, scene

TILE = 512
EXPIRY = 10
WORK = """
import json, sys
from rtsseg.fleet import map_scenes
from rtsseg.rayengine import find_engine
map_scenes(**json.loads(sys.argv[1]), run=find_engine(sys.argv[2]))
"""
# Ray gives its workers the lowest priority but one
ENVIRONMENT = dict(OMP_NUM_THREADS='1', NO_ALBUMENTATIONS_UPDATE='1', RAY_worker_niceness='0')
WORKERS = dict(local='workers', ray='actors of Ray')

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

def start(options, engine):
    return subprocess.Popen([sys.executable, '-c', WORK, json.dumps(options), engine], stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL, env=os.environ | ENVIRONMENT)

def at_work(job):
    "Processes that work on shards, once a shard is finished"
    found = []
    if any((job/'shards').glob('s*')):
        for claim in (job/'claims').glob('s*'):
            with contextlib.suppress(FileNotFoundError, ValueError):
                found.append(int(json.loads(claim.read_text())['worker'].split('-')[-2]))
    return found

def with_a_killed_worker(job, processes):
    "Seconds of a job, one of whose workers is killed while it works on a shard; the first one is finished by then"
    begin = time.perf_counter()
    while not (workers := at_work(job)):
        assert all(process.poll() is None for process in processes), 'it ended before a worker could be killed'
        time.sleep(.01)
    os.kill(workers[0], signal.SIGKILL)
    codes = {process.pid: process.wait() for process in processes}
    # an actor of Ray is another process than those that were started here
    assert codes.pop(workers[0], -signal.SIGKILL) == -signal.SIGKILL
    assert not any(codes.values()), codes
    return time.perf_counter() - begin

def large_scene(home, side):
    write_raster(home/'scene.tif', toy_image(side), from_origin(-3_000_000, 900_000, METRES, METRES), CRS, nodata=0,
                 inner=512)
    alone = timed(predict, home/'model', home/'scene.tif', home/'map.tif', '', '', '', 'cpu')
    # about ten shards: one that is finished, one that is begun and lost, and others
    windows = max(len(window_starts(side, TILE))**2 // 10, 1)
    # both have two workers: as processes that know nothing of each other, and as actors of one
    for engine, count, workers in (('local', 2, 1), ('ray', 1, 2)):
        job = home/engine
        options = dict(model=f'{home}/model', scenes=f'{home}/scene.tif', out=f'{job}', device='cpu', windows=windows,
                       expiry=EXPIRY, workers=workers)
        seconds = with_a_killed_worker(job, [start(options, engine) for _ in range(count)])
        assert (job/'maps/scene.tif').read_bytes() == (home/'map.tif').read_bytes()
        emit_value(f'a scene of {side}² by two {WORKERS[engine]}, one killed: the bytes of predict', short(seconds),
                   short(alone), 's', expiry=EXPIRY)

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
