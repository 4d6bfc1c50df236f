"""Maps of scenes beside MONAI's sliding windows and beside bare forward passes, on one thread of a CPU

python benchmarks/inference.py [side] [rounds]     for MONAI, pip install --no-deps monai==1.6.1

A model that costs nothing, one 1 × 1 convolution, shows what a window of 512² costs around the model: the time of all
windows, less that of the model alone on as many. Ours normalises the pixels of a scene, blends probabilities, and
overlaps windows by half, which is the only overlap that it has. MONAI's `sliding_window_inference` gets a normalised
scene in memory, overlaps by a quarter or by half, and blends logits: it takes no sigmoid. Both blend in single
precision, and run 4 windows at once. Ours is also measured from the file of the scene to finished rows on the disk,
which the peer has no part for.
Memory is the peak of one call in a process of its own, above what a call on a small scene has left in memory and, for
MONAI, the scene.
A U-Net with EfficientNet-B0 shows the rate of `predict`, from the file of a scene to finished rows on the disk, beside
bare forward passes over the same windows in memory. Time is that of the CPU, all threads together: on one core reading
and writing beside the model hide nothing.
"""
import importlib
import json
import statistics
import sys
import time
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rasterio.transform import from_origin
from torch import nn

from common import emit, emit_value, memory_in_process, memory_mb, peak_mb, short, timed, turns
from rtsseg.config import load
from rtsseg.infer import Predictor
from rtsseg.launch import StopSignals
from rtsseg.models import build
from rtsseg.prediction import (
    FinishedRows,
    MapJob,
    Scene,
    WindowReader,
    finish_rows,
    map_parts,
    map_strips,
    predict_rows,
    window_starts,
)
from rtsseg.raster import write_raster
from rtsseg.rawtile import RawTile
from rtsseg.stats import Stats

TILE, BATCH = 512, 4
NETWORK = dict(architecture='unet', encoder='efficientnet-b0', weights=None)
STATS = Stats(channels=['R', 'G', 'B'], dtype='uint8', scale=255., mean=[.4, .35, .3], std=[.2, .2, .2], pixels=1,
              manifest_hash='')

def write_scene(folder, height, width):
    "A scene of smooth noise; its path"
    path = Path(folder)/f'{height}x{width}.tif'
    rng = np.random.default_rng(0)
    coarse = rng.integers(1, 200, (3, -(-height // 64), -(-width // 64)), 'uint8')
    planes = coarse.repeat(64, 1).repeat(64, 2)[:, :height, :width]
    planes += rng.integers(0, 8, (height, width), 'uint8')
    write_raster(path, planes, from_origin(-2_500_000, 700_000, 3, 3), 'EPSG:3413', inner=TILE)
    return path

def cheap():
    "A model that costs nothing"
    torch.manual_seed(0)
    return nn.Conv2d(3, 1, 1).eval()

def open_job(path, model, views='none'):
    "A map of a scene by this model"
    cfg = load(device='cpu', data=dict(tile_size=TILE), model=NETWORK)
    predictor = Predictor(Path('none'), cfg, model, STATS, {}, None)
    with redirect_stderr(StringIO()):
        scene = Scene(path, '', '', predictor)
    return MapJob(predictor, scene, None, views, BATCH)

def parts_of(job):
    return map_parts(job.scene.height, job.scene.width, TILE)

def count_windows(job):
    return len(window_starts(job.scene.height, TILE))*len(window_starts(job.scene.width, TILE))

def blend(job):
    "Read a scene, run its windows and blend them"
    with redirect_stderr(StringIO()):
        for _ in predict_rows(job, {*range(len(parts_of(job)))}, StopSignals()):
            pass

def write_rows(job):
    "The same, and write the finished rows"
    with redirect_stderr(StringIO()), TemporaryDirectory() as folder:
        finished = FinishedRows(Path(folder), {}, parts_of(job))
        finish_rows(job, finished, {*range(len(finished.parts))}, StopSignals())

def slide(image, model, overlap):
    "MONAI over a scene in memory"
    from monai.inferers import sliding_window_inference
    with torch.inference_mode():
        return sliding_window_inference(image, (TILE, TILE), BATCH, model, overlap=overlap, mode='gaussian')

def scene_in_memory(side):
    return torch.randn(1, 3, side, side)

def windows_of_monai(side, overlap):
    return (-(-(side - TILE) // int(TILE*(1 - overlap))) + 1)**2

def seconds_of_model(model, rounds):
    "Seconds that a model alone takes for each window"
    x = torch.randn(BATCH, 3, TILE, TILE)
    with torch.inference_mode():
        times = [timed(model, x, clock=time.process_time) for _ in range(rounds + 3)]
    return statistics.median(times[3:])/BATCH

def keep_in_memory(job):
    "Read a scene once and for all"
    whole = job.scene.read_rows(0, job.scene.height)
    def read_rows(top, count, left, width):
        return RawTile(*(plane[..., top:top + count, left:left + width].copy() for plane in whole))
    job.scene.read_rows = read_rows

def overhead_beside(folder, side, rounds):
    "What a window costs around the model"
    model, image = cheap(), scene_in_memory(side)
    path = write_scene(folder, side, side)
    on_disk, in_memory = open_job(path, model), open_job(path, model)
    keep_in_memory(in_memory)

    def compare(what, work, job, overlap):
        times = turns(lambda: work(job), lambda: slide(image, model, overlap), rounds, warm=1, clock=time.process_time)
        alone = seconds_of_model(model, 20)
        counts = count_windows(job), windows_of_monai(side, overlap)
        ours, peer = (1000*(statistics.median(calls)/count - alone) for calls, count in zip(times, counts, strict=True))
        emit_value(f'{what}: overhead of a window / MONAI in memory, overlap {overlap}', short(ours), short(peer), 'ms',
                   ratio=short(ours/peer), goal='≤ 1.5 ms', met=ours <= 1.5, scene=f'{side}²', windows=counts,
                   model=f'1 × 1 convolution, {short(1000*alone)} ms a window', rounds=rounds, threads=1,
                   note='CPU time')

    compare('in memory, blended', blend, in_memory, .25)
    compare('in memory, blended', blend, in_memory, .5)
    compare('from file to finished rows', write_rows, on_disk, .25)

def map_scene(path, model):
    "Open a scene, run its windows and write the finished rows"
    write_rows(open_job(path, model))

def show_memory(who, place):
    "Print the megabytes that one call adds to what a first, small one has loaded"
    torch.set_num_threads(1)
    model = cheap()
    with TemporaryDirectory() as folder:
        if who == 'peer':
            importlib.import_module('monai.inferers')
            slide(scene_in_memory(TILE + 1), model, .25)
            scene = scene_in_memory(int(place))
            before = memory_mb()
            slide(scene, model, .25)
        else:
            map_scene(write_scene(folder, TILE + 1, TILE + 1), model)
            before = memory_mb()
            map_scene(Path(place), model)
    print(json.dumps(peak_mb() - before))

def memory_beside(folder, side):
    "Peaks of memory for scenes of several shapes"
    peer = memory_in_process(__file__, 'peer', side)
    for height, width in ((side, side), (8*side, side), (side, 8*side)):
        path = write_scene(folder, height, width)
        ours, is_square = memory_in_process(__file__, 'ours', path), height == width
        about = dict(goal='≤ 80 MB', met=ours <= 80) if is_square else {}
        emit_value(f'peak of memory beside a scene of {height} × {width}', ours, peer if is_square else None, 'MB',
                   **about)
        path.unlink()

def rate_beside(folder, rounds, height, width, views, passes, goal):
    "Seconds of a real network from file to finished rows, beside its bare forward passes"
    torch.manual_seed(0)
    model = build(load(model=NETWORK).model).eval().to(memory_format=torch.channels_last)
    job = open_job(write_scene(folder, height, width), model, views)
    count = count_windows(job)
    assert count % BATCH == 0
    rows = {*range(len(window_starts(height, TILE)))}
    windows = [batch.x.clone() for batch in WindowReader(job, map_strips(width, TILE)).read({0: rows})]
    assert len(windows) == count // BATCH

    @torch.inference_mode()
    def bare():
        for x in windows*passes:
            model(x)

    times = turns(lambda: write_rows(job), bare, rounds, warm=1, clock=time.process_time)
    emit(f'{count} windows from file to finished rows, views {views} / {passes} bare forward passes', *times, goal=goal,
         network='U-Net, EfficientNet-B0', threads=1, note='CPU time')

def main(side=4096, rounds=5):
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        overhead_beside(folder, side, rounds)
        memory_beside(folder, side)
        rate_beside(folder, rounds, 1280, 1280, 'none', 1, 1/.98)
        rate_beside(folder, 2, 512, 1280, 'full', 8, 1.02)

if __name__ == '__main__':
    if sys.argv[1:2] in (['ours'], ['peer']):
        show_memory(*sys.argv[1:])
    else:
        main(*map(int, sys.argv[1:]))
