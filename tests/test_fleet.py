"Maps of many scenes: the bytes do not depend on who made which part, or on who died"
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rasterio.transform import from_origin

from rtsseg.config import ToySource, load
from rtsseg.fleet import cut_shards, map_scenes
from rtsseg.infer import save_model
from rtsseg.models import build
from rtsseg.prediction import predict
from rtsseg.raster import write_raster
from rtsseg.runs import RunError
from rtsseg.stats import Stats
from rtsseg.toy import CRS, METRES, scene

CORNER = -3_000_000, 900_000
MAP = Path(sys.executable).parent/'rtsseg-map'

def write_scene(path, side, seed=0, pixel=METRES):
    world = scene(ToySource(scene_size=side, tile_size=64, prevalence=.02, seed=seed), 0)
    write_raster(path, world.image.transpose(2, 0, 1), from_origin(*CORNER, pixel, pixel), CRS, nodata=0)

@pytest.fixture(scope='module')
def fleet(tmp_path_factory):
    "A folder with a model, two scenes, and the maps that `predict` makes of them"
    home = tmp_path_factory.mktemp('fleet')
    cfg = load('tiny', overrides=['model.encoder=tu-test_efficientnet', 'model.weights=null', 'device=cpu'])
    stats = Stats(['R', 'G', 'B'], 'uint8', 255., [.3] * 3, [.1] * 3, 1, '', pixel_size=[2.8, 3.1])
    torch.manual_seed(0)
    save_model(home/'model', build(cfg.model), cfg, stats, dict(epoch=1, step=1, value=0., metrics={}), {})
    (home/'scenes').mkdir()
    for k, side in enumerate((420, 200)):
        write_scene(home/f'scenes/{k}.tif', side, k)
        predict(home/'model', home/f'scenes/{k}.tif', home/f'{k}.tif', device='cpu')
    return home

def check_maps(fleet, job):
    for k in range(2):
        assert (job/f'maps/{k}.tif').read_bytes() == (fleet/f'{k}.tif').read_bytes()
    assert json.loads((job/'report.json').read_text()) == dict(maps=['0.tif', '1.tif'], failed=[])
    assert not any((job/'shards').iterdir())
    assert not any((job/'claims').iterdir())

ONE_THREAD = os.environ | dict(OMP_NUM_THREADS='1')

def command(fleet, job, expiry):
    return [MAP, '--model', fleet/'model', '--scenes', fleet/'scenes', '--out', job, '--device', 'cpu',
            '--windows', '20', '--expiry', str(expiry)]

def begun(fleet, job, expiry):
    "A worker in a process of its own that has made a shard and works on the next"
    worker = subprocess.Popen(command(fleet, job, expiry), env=ONE_THREAD, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    while not list((job/'shards').glob('s*')):
        assert worker.poll() is None, 'it ended before it could be stopped'
        time.sleep(.01)
    return worker

@given(sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=8), windows=st.integers(1, 100))
def test_shards_hold_each_row_once(sizes, windows):
    shards = cut_shards(sizes, windows)
    rows = [(k, row) for shard in shards for k, first, end in shard for row in range(first, end)]
    assert rows == [(k, row) for k, (count, _) in enumerate(sizes) for row in range(count)]
    for shard in shards:
        filled = sum((end - first) * sizes[k][1] for k, first, end in shard)
        assert filled <= windows or (len(shard) == 1 and shard[0][2] - shard[0][1] == 1)

@pytest.mark.slow
def test_two_processes_make_the_same_bytes(fleet, tmp_path):
    map_scenes(fleet/'model', fleet/'scenes', tmp_path/'job', workers=2, device='cpu', windows=20)
    check_maps(fleet, tmp_path/'job')

@pytest.mark.slow
def test_a_worker_that_is_killed_costs_nothing(fleet, tmp_path):
    "SIGKILL in the middle: its claim expires, and another worker ends with the same bytes"
    job = tmp_path/'job'
    worker = begun(fleet, job, 3)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    left = list((job/'claims').iterdir())
    assert len(left) == 1 and not (job/'report.json').exists()
    done = subprocess.run(command(fleet, job, 3), env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '2 maps' in done.stdout
    check_maps(fleet, job)

@pytest.mark.slow
def test_a_worker_that_is_asked_to_stop_gives_its_claim_back(fleet, tmp_path):
    job = tmp_path/'job'
    worker = begun(fleet, job, 600)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait() == 3
    assert not any((job/'claims').iterdir())
    # so nobody has to wait for it
    map_scenes(fleet/'model', fleet/'scenes', job, device='cpu', windows=20, expiry=600.)
    check_maps(fleet, job)

def test_scenes_that_do_not_fit_cost_only_themselves(fleet, tmp_path):
    "Another resolution, a missing file, text under a .tif name: listed, with what is wrong, and exit code 3"
    write_scene(tmp_path/'coarse.tif', 200, pixel=10)
    (tmp_path/'text.tif').write_text('no raster')
    names = ['coarse.tif', 'text.tif', 'missing.tif', str(fleet/'scenes'/'1.tif')]
    pd.DataFrame(dict(scene=names)).to_csv(tmp_path/'list.csv', index=False)
    with pytest.raises(RunError) as caught:
        map_scenes(fleet/'model', tmp_path/'list.csv', tmp_path/'job', device='cpu')
    message = str(caught.value)
    assert caught.value.code == 3
    assert '3 of 4 scenes failed' in message
    for words in ('coarse: coarse.tif has pixels of 9.', 'text: text.tif is not a GeoTIFF', 'missing: missing.tif'):
        assert words in message
    assert (tmp_path/'job/maps/1.tif').read_bytes() == (fleet/'1.tif').read_bytes()
    again = pd.read_csv(tmp_path/'job'/'retry.csv')
    assert sorted(again.name) == ['coarse', 'missing', 'text']
    # those that are there now are mapped
    made = map_scenes(fleet/'model', tmp_path/'coarse.tif', tmp_path/'resampled', device='cpu', resample=True)
    assert made['maps'] == ['coarse.tif']

@pytest.mark.parametrize('change', ['gone', 'another'])
def test_a_scene_that_changes_before_its_map_is_joined(fleet, tmp_path, change):
    "It is listed as failed, and the other scene is mapped"
    scenes = tmp_path/'scenes'
    scenes.mkdir()
    for k in range(2):
        write_scene(scenes/f'{k}.tif', 200, 1 - k)
    for share in ('1/2', '2/2'):
        map_scenes(fleet/'model', scenes, tmp_path/'job', share=share, device='cpu')
    (scenes/'1.tif').unlink()
    if change == 'another':
        write_scene(scenes/'1.tif', 200, seed=7)
    # the list still names both
    pd.DataFrame(dict(scene=[str(scenes/'0.tif'), str(scenes/'1.tif')])).to_csv(tmp_path/'list.csv', index=False)
    with pytest.raises(RunError, match='1 of 2 scenes failed'):
        map_scenes(fleet/'model', tmp_path/'list.csv', tmp_path/'job', device='cpu')
    assert (tmp_path/'job/maps/0.tif').exists()
    assert not (tmp_path/'job/maps/1.tif').exists()
