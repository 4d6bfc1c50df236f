"""A job of a fleet on two workers: actors of Ray beside processes of this machine

python benchmarks/fleet_ray.py [side] [rounds]     wall clock, one thread in each worker

A scene of side² pixels, and one of twice its side, are mapped with a tiny model (windows of 64 pixels) in shards of 100
windows. Both ways make the same bytes. A job includes the start of Ray or of the processes, each of which imports
PyTorch. What four times the windows take more is the time without the start. Ray gives its workers the lowest priority
but one; here they have that of other processes, so that both meet the same load.
"""
import os

os.environ |= dict(OMP_NUM_THREADS='1', RAY_worker_niceness='0', NO_ALBUMENTATIONS_UPDATE='1')

import contextlib
import io
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from rasterio.transform import from_origin

from common import emit, emit_value, short, turns
from rtsseg.config import load
from rtsseg.fleet import map_scenes
from rtsseg.infer import save_model
from rtsseg.models import build
from rtsseg.raster import write_raster
from rtsseg.rayengine import find_engine
from rtsseg.stats import Stats

def write_model(folder):
    "A model directory of random weights"
    cfg = load('tiny', overrides=['model.encoder=tu-test_efficientnet', 'model.weights=null', 'device=cpu'])
    stats = Stats(['R', 'G', 'B'], 'uint8', 255., [.3] * 3, [.1] * 3, 1, '')
    torch.manual_seed(0)
    save_model(folder, build(cfg.model), cfg, stats, dict(epoch=1, step=1, value=0., metrics={}), {})

def jobs_of(home, side, rounds):
    "Seconds of Ray and of processes for a scene of one side"
    scene = home/f'{side}.tif'
    pixels = np.random.default_rng(0).integers(1, 255, (3, side, side), 'uint8')
    write_raster(scene, pixels, from_origin(-3_000_000, 900_000, 3, 3), 'EPSG:3413')
    maps = {}

    def job(engine):
        # each job in a folder of its own: nothing is finished when it begins
        out = Path(tempfile.mkdtemp(dir=home))
        with contextlib.redirect_stderr(io.StringIO()):
            map_scenes(home/'model', scene, out, workers=2, device='cpu', windows=100, run=find_engine(engine))
        maps[engine] = (out/'maps'/scene.name).read_bytes()

    times = turns(lambda: job('ray'), lambda: job('local'), rounds, warm=0)
    assert maps['ray'] == maps['local']
    return times

def main(side=640, rounds=3):
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        write_model(home/'model')
        small, large = (jobs_of(home, each, rounds) for each in (side, 2 * side))
    for each, times in ((side, small), (2 * side, large)):
        emit(f'a map of {each}² pixels by two actors of Ray, beside two processes', *times)
    # without the start
    ray, local = (statistics.median(more) - statistics.median(less) for less, more in zip(small, large, strict=True))
    emit_value('what four times the windows take more: Ray, beside processes', short(1000 * ray), short(1000 * local),
               'ms', ratio=short(ray / local), rounds=rounds)

if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
