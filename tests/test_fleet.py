"Maps of many scenes: the bytes do not depend on who made which part, or on who died"
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock
from zipfile import ZipFile

import geopandas as gpd
import numpy as np
import pandas as pd
import pyproj
import pytest
import rasterio
import shapely
import torch
from geopandas.testing import assert_geodataframe_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.transform import Affine, from_origin

import rtsseg.fleet
import rtsseg.prediction
from helpers.maps import noise, read_map, untrained_model
from rtsseg.areas import expected_area
from rtsseg.calibration import calibrate_evidence
from rtsseg.claims import Store
from rtsseg.config import ConfigError, Metrics, ToySource, load
from rtsseg.console import DataError
from rtsseg.evidence import Meter
from rtsseg.fleet import FleetJob, MapOptions, Worker, cut_shards, map_scenes, work_of
from rtsseg.infer import load_model, save_model
from rtsseg.launch import StopSignals
from rtsseg.mapcheck import map_check
from rtsseg.mapfile import NODATA, STEPS
from rtsseg.models import build
from rtsseg.mosaic import write_mosaic
from rtsseg.polygons import map_polygons
from rtsseg.prediction import DeviceError, predict
from rtsseg.raster import write_raster
from rtsseg.runs import RunError
from rtsseg.scenelist import SCENE_COLUMNS
from rtsseg.stats import Stats
from rtsseg.toy import CRS, METRES, scene, scored_tiles
from rtsseg.vrt import Vrt, VrtBand, VrtSource, raster_digest, vrt_xml

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
    assert json.loads((job/'report.json').read_text()) == dict(maps=['0.tif', '1.tif'], failed=[], warnings=[])
    assert not any((job/'shards').iterdir())
    assert not any((job/'claims').iterdir())

ONE_THREAD = os.environ | dict(OMP_NUM_THREADS='1')

def command(fleet, job, expiry):
    return [MAP, '--model', fleet/'model', '--scenes', fleet/'scenes', '--out', job, '--device', 'cpu',
            '--windows', '20', '--expiry', str(expiry)]

def works_on_the_next(job):
    "Whether a shard is made, and another one is claimed"
    made = {file.name for file in (job/'shards').glob('s*')}
    claimed = {file.stem for file in (job/'claims').glob('s*')}
    return bool(made and claimed - made)

def begun(fleet, job, expiry):
    "A worker in a process of its own that has made a shard and works on the next"
    worker = subprocess.Popen(command(fleet, job, expiry), env=ONE_THREAD, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    while not works_on_the_next(job):
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

def write_mosaic_of_scenes(fleet, folder):
    "The left and the right part of a scene, each a file, and the VRT that shows both"
    with rasterio.open(fleet/'scenes/1.tif') as ds:
        planes, place, crs = ds.read(), ds.transform, ds.crs
    sources = []
    for number, (left, right) in enumerate([(0, 90), (90, planes.shape[2])]):
        file = folder/f'part{number}.tif'
        write_raster(file, planes[..., left:right], place @ Affine.translation(left, 0), crs, nodata=0)
        sources.append((file, (0, 0, right - left, planes.shape[1]), (left, 0)))
    bands = [VrtBand('Byte', '', '0', '', '1', '0',
                     [VrtSource(file, band, part, corner, '0', False) for file, part, corner in sources])
             for band in (1, 2, 3)]
    vrt = Vrt(planes.shape[2], planes.shape[1], crs.to_wkt(), place, bands, {})
    (folder/'1.vrt').write_bytes(vrt_xml(vrt, folder))

def test_a_mosaic_is_a_scene(fleet, tmp_path):
    "Named alone or in a list: the map is that of one file; one that lost a part, and a mosaic of maps, are refused"
    write_mosaic_of_scenes(fleet, tmp_path)
    map_scenes(fleet/'model', tmp_path/'1.vrt', tmp_path/'job', device='cpu')
    np.testing.assert_array_equal(read_map(tmp_path/'job/maps/1.tif'), read_map(fleet/'1.tif'))
    write_mosaic([fleet/'1.tif'], tmp_path/'maps.vrt', 'last')
    (tmp_path/'lost.vrt').write_text((tmp_path/'1.vrt').read_text().replace('part1.tif', 'part2.tif'))
    (tmp_path/'list.csv').write_text('scene\nlost.vrt\n1.vrt\nmaps.vrt\n')
    with pytest.raises(RunError, match='2 of 3 scenes failed'):
        map_scenes(fleet/'model', tmp_path/'list.csv', tmp_path/'many', device='cpu')
    assert (tmp_path/'many/maps/1.tif').read_bytes() == (tmp_path/'job/maps/1.tif').read_bytes()
    retry = pd.read_csv(tmp_path/'many/retry.csv').set_index('name').error
    assert 'part2.tif' in retry.lost and 'no such file' in retry.lost
    assert 'an image has 3 bands, this one has 1' in retry.maps

def map_content(job, name, suffix='.tif'):
    "The bytes of a map of a job, or of its note, as a file or as a member of an archive"
    file = job/f'maps/{name}{suffix}'
    if file.exists():
        return file.read_bytes()
    row = pd.read_parquet(job/'index.parquet').set_index('name').loc[name]
    with ZipFile(job/row.archive) as archive:
        return archive.read(f'{name}{suffix}')

def bad_scenes(folder):
    "{name: what the report says of it}; the scenes are written, but for one"
    write_scene(folder/'coarse.tif', 200, pixel=10)
    write_scene(folder/'whole.tif', 200)
    content = (folder/'whole.tif').read_bytes()
    (folder/'cut.tif').write_bytes(content[:len(content) // 2])
    (folder/'text.tif').write_text('no raster')
    image = noise(70, 70)
    write_raster(folder/'turned.tif', image, from_origin(*CORNER, 3, 3) @ Affine.rotation(30), CRS, nodata=0)
    # metres, where the CRS counts in degrees
    write_raster(folder/'swapped.tif', image, from_origin(*CORNER, 3, 3), 'EPSG:4326', nodata=0)
    return dict(coarse='coarse.tif has pixels of 9.', cut='cut.tif cannot be read', text='text.tif is not a GeoTIFF',
                missing='missing.tif: no such file', turned='a rotated grid',
                swapped='its coordinates do not fit its CRS')

@pytest.mark.parametrize('tiles', [False, True])
def test_scenes_that_do_not_fit_cost_only_themselves(fleet, tmp_path, tiles):
    "In the middle of a list: each is reported with what is wrong with it, exit code 3, and a list to try again"
    problems = bad_scenes(tmp_path)
    names = [str(fleet/'scenes/0.tif'), *(f'{name}.tif' for name in problems), str(fleet/'scenes/1.tif')]
    pd.DataFrame(dict(scene=names, region='north')).to_csv(tmp_path/'list.csv', index=False)
    job = tmp_path/'job'
    with pytest.raises(RunError) as caught:
        map_scenes(fleet/'model', tmp_path/'list.csv', job, device='cpu', tiles=tiles, windows=40)
    assert caught.value.code == 3
    lines = str(caught.value).splitlines()
    assert '6 of 8 scenes failed' in lines[0] and 'another --out' in lines[-1]
    for line, (name, words) in zip(lines[1:-1], problems.items(), strict=True):
        assert line.startswith(f'{name}: ')
        assert words in line
    for k in range(2):
        assert map_content(job, str(k)) == (fleet/f'{k}.tif').read_bytes()
    again = pd.read_csv(job/'retry.csv')
    assert again.name.tolist() == list(problems)
    assert set(again.region) == {'north'}
    # the list is taken as it is; what was wrong with one is not wrong any more
    shutil.copy(tmp_path/'whole.tif', tmp_path/'missing.tif')
    with pytest.raises(RunError, match='4 of 6 scenes failed'):
        map_scenes(fleet/'model', job/'retry.csv', tmp_path/'second', device='cpu', resample=True, tiles=tiles)
    assert map_content(tmp_path/'second', 'missing')
    assert map_content(tmp_path/'second', 'coarse')

@pytest.mark.parametrize('tiles', [False, True])
def test_maps_unlike_validation_are_reported(fleet, tmp_path, caplog, tiles):
    "With a model directory alone; each scene, and all tiles of a list together"
    model = shutil.copytree(fleet/'model', tmp_path/'model')
    logits, masks, table = scored_tiles()
    meter = Meter(table)
    meter.update(torch.from_numpy(logits), torch.from_numpy(masks), torch.arange(len(table)))
    calibration = calibrate_evidence(meter.evidence(), metrics=Metrics(replicates=20))
    calibration.save(model/'calibration.json')
    made = map_scenes(model, fleet/'scenes', tmp_path/'job', device='cpu', tiles=tiles, windows=40)
    single = predict(model, fleet/'scenes/0.tif', tmp_path/'0.tif', device='cpu')
    assert {'warning'} <= {found['level'] for found in single['findings']}
    names = ['all tiles'] if tiles else ['0.tif', '1.tif']
    for line in made['warnings']:
        assert re.match(f'({"|".join(names)}): (predicted share|scores), against validation: ', line)
        assert line in caplog.text
    assert {line.split(':')[0] for line in made['warnings']} == set(names)
    assert json.loads((tmp_path/'job/report.json').read_text()) == made
    assert json.loads(map_content(tmp_path/'job', '0', '.tif.json'))['findings'] == single['findings']

@pytest.mark.parametrize('tiles', [False, True])
def test_what_holds_for_all_scenes_is_said_once(fleet, tmp_path, caplog, tiles):
    "and not again for each part of a scene, or for each tile"
    model = untrained_model(tmp_path/'model')
    map_scenes(model, fleet/'scenes', tmp_path/'job', device='cpu', tiles=tiles, windows=20)
    assert caplog.text.count('the model does not know the resolution of its tiles') == 1
    caplog.clear()
    predict(model, fleet/'scenes/1.tif', tmp_path/'1.tif', device='cpu')
    assert caplog.text.count('the model does not know the resolution of its tiles') == 1

FAR = dict(
    pole=('EPSG:3413', (-200, 150), 3),
    date_line_mercator=('EPSG:3857', (20037508.34 - 570, 11068716), 8.77),
    date_line_utm=('EPSG:32601', (213_000, 7_800_000), 3),
    date_line_polar=('EPSG:3413', (-1_900_000, 1_900_000), 3),
)

@pytest.mark.parametrize('place', FAR)
def test_scenes_at_the_pole_and_at_the_antimeridian(fleet, tmp_path, place):
    "The map lies on the grid of its scene, and its object has the area that it has in an equal-area projection"
    crs, corner, pixel = FAR[place]
    image = np.full((3, 130, 130), 102, 'uint8')
    write_raster(tmp_path/'scene.tif', image, from_origin(*corner, pixel, pixel), crs, nodata=0)
    map_scenes(fleet/'model', tmp_path/'scene.tif', tmp_path/'job', device='cpu')
    map_polygons([tmp_path/'job/maps/scene.tif'], tmp_path/'objects.gpkg', 1e-4)
    objects = gpd.read_file(tmp_path/'objects.gpkg')
    assert len(objects) == 1
    assert objects.crs == crs
    square = shapely.box(corner[0], corner[1] - 130 * pixel, corner[0] + 130 * pixel, corner[1])
    assert objects.total_bounds == pytest.approx(square.bounds)
    longitude, latitude = pyproj.Proj(crs)(square.centroid.x, square.centroid.y, inverse=True)
    plane = pyproj.CRS(f'+proj=laea +datum=WGS84 +lat_0={latitude} +lon_0={longitude}')
    project = pyproj.Transformer.from_crs(crs, plane, always_xy=True).transform
    assert objects.Area.sum() == pytest.approx(shapely.transform(square, project, interleaved=False).area, rel=1e-3)

@pytest.mark.parametrize('tiles', [False, True])
def test_a_finished_part_is_not_done_twice(fleet, tmp_path, tiles):
    "A worker that claims a part which another has done in the meantime leaves it"
    store = Store(tmp_path/'job')
    listed = pd.DataFrame(dict.fromkeys(SCENE_COLUMNS, ['x']))
    with StopSignals() as signals:
        worker = Worker(store, None, FleetJob(MapOptions('model', tiles=tiles), listed), 60, signals)
        (part,), _ = worker.work.parts((0, 1))
        store.write(worker.work.result(part), b'done')
        # without a mapper, doing it would fail
        assert worker.do_one([part])
    assert store.read(worker.work.result(part)) == b'done'
    assert store.names('claims') == []

@pytest.mark.parametrize('is_done', [False, True])
def test_a_slow_worker_whose_shards_were_removed(tmp_path, monkeypatch, is_done):
    "Others took its part over and ended the job: nothing is wrong; a file that is missing otherwise is an error"
    store = Store(tmp_path/'job')
    listed = pd.DataFrame(dict.fromkeys(SCENE_COLUMNS, ['x']))
    with StopSignals() as signals:
        worker = Worker(store, None, FleetJob(MapOptions('model'), listed), 60, signals)
        part = 'm000000'

        def overtaken(part):
            if is_done:
                store.write(worker.work.result(part), b'done')
            store.read('shards/s000000-0000')

        monkeypatch.setattr(worker.work, 'do', overtaken)
        if is_done:
            assert worker.do_one([part])
        else:
            with pytest.raises(FileNotFoundError):
                worker.do_one([part])
    assert store.names('claims') == []

SIZES = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=12)

@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, count=st.integers(2, 4), windows=st.integers(1, 60))
def test_shares_hold_each_shard_once(sizes, count, windows):
    "Plans of three scenes each, in any order; the maps wait for all shards of their scenes"
    store = Store('memory://shares')
    if store.fs.exists(store.root):
        store.fs.rm(store.root, recursive=True)
    listed = pd.DataFrame({name: [f'{name}{k}' for k in range(len(sizes))] for name in SCENE_COLUMNS})
    job = FleetJob(MapOptions('model', windows=windows), listed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rtsseg.fleet, 'PLANNED', 3)
        work = work_of(store, job)
        plans, later = work.parts((0, 1))
        assert later
        assert plans == [f'p{k:06}' for k in range((len(sizes) + 2) // 3)]
        for part in reversed(plans):
            found = [dict(k=k, count=sizes[k][0], columns=sizes[k][1]) for k in job.stretch(int(part[1:]), 3)]
            store.write(f'plans/{part}', json.dumps(found).encode())
        shards, later = work_of(store, job).parts((0, 1))
        assert later
        shared = [work_of(store, job).parts((i, count)) for i in range(count)]
        assert sorted(part for parts, _ in shared for part in parts) == shards
        assert not any(later for _, later in shared)
        work.read_plans()
        rows = sorted((k, row) for items in work.shards.values() for k, first, end in items
                      for row in range(first, end))
        assert rows == [(k, row) for k, (height, _) in enumerate(sizes) for row in range(height)]
        for part in shards:
            store.write(f'shards/{part}', b'')
        assert work.parts((0, 1)) == ([f'm{k:06}' for k in range(len(sizes))], False)

@pytest.fixture
def read_files(monkeypatch):
    "Names of the files that are read as a whole for their digests"
    names = []

    def counted(path):
        names.append(Path(path).name)
        return raster_digest(path)

    for module in (rtsseg.fleet, rtsseg.prediction):
        monkeypatch.setattr(module, 'raster_digest', counted, raising=False)
    return names

def test_a_scene_is_read_as_a_whole_once(fleet, tmp_path, read_files):
    "Not for each of its shards; and once more where its time differs, as that of a copy does"
    scenes = shutil.copytree(fleet/'scenes', tmp_path/'scenes')
    for share in ('1/2', '2/2'):
        map_scenes(fleet/'model', scenes, tmp_path/'job', share=share, device='cpu', windows=20)
    assert len([*(tmp_path/'job/shards').iterdir()]) > 6
    assert sorted(read_files) == ['0.tif', '1.tif']
    os.utime(scenes/'1.tif', ns=(0, 0))
    map_scenes(fleet/'model', scenes, tmp_path/'job', device='cpu', windows=20)
    assert sorted(read_files) == ['0.tif', '1.tif', '1.tif']
    check_maps(fleet, tmp_path/'job')

@pytest.fixture
def server(fleet):
    "The scenes over HTTP, on this machine; the address, and the paths that were asked for"
    asked = []

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *words):
            pass

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

    served = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=fleet/'scenes'))
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{served.server_port}', asked
    served.shutdown()
    served.server_close()

def test_files_elsewhere_are_fetched_where_they_are_wanted(fleet, tmp_path, server):
    "STAC items with references over HTTP: the same bytes; one that is not there costs only itself"
    address, asked = server
    items = []
    for k in range(3):
        assets = dict(visual=dict(href=f'{address}/{k}.tif'), thumbnail=dict(href='small.png'))
        properties = dict(datetime='2023-08-01T12:00:00Z')
        items.append(dict(type='Feature', id=str(k), geometry=None, properties=properties, assets=assets))
    (tmp_path/'items.json').write_text(json.dumps(dict(type='FeatureCollection', features=items)))
    arguments = fleet/'model', tmp_path/'items.json', tmp_path/'job'
    named = dict(device='cpu', asset=['image=visual'], windows=20)
    with pytest.raises(DataError, match='only with --remote'):
        map_scenes(*arguments, **named)
    assert not (tmp_path/'job').exists()
    with pytest.raises(RunError, match=f'1 of 3 scenes failed.*\n2: {address}/2.tif cannot be fetched'):
        map_scenes(*arguments, **named, remote=True)
    # one worker plans a scene, runs its shards and joins its map with one copy
    assert asked == [f'/{k}.tif' for k in range(3)]
    for k in range(2):
        assert (tmp_path/f'job/maps/{k}.tif').read_bytes() == (fleet/f'{k}.tif').read_bytes()
        note = json.loads((tmp_path/f'job/maps/{k}.tif.json').read_text())
        assert (note['scene_name'], note['scene_date']) == (f'{k}.tif', '2023-08-01')

def write_bands(fleet, folder):
    "A scene as files of one band each; the item that names them, and another one with a band that lies elsewhere"
    with rasterio.open(fleet/'scenes/1.tif') as ds:
        planes, place, crs = ds.read(), ds.transform, ds.crs
    for name, plane in zip(('B04', 'B03', 'B02'), planes, strict=True):
        write_raster(folder/f'{name}.tif', plane[None], place, crs, nodata=0)
    write_raster(folder/'shifted.tif', planes[:1], place @ Affine.translation(9, 0), crs, nodata=0)
    items = []
    for name, blue in dict(good='B02', bad='shifted').items():
        assets = {band: dict(href=f'{file}.tif') for band, file in dict(B04='B04', B03='B03', B02=blue).items()}
        items.append(dict(type='Feature', id=name, geometry=None, properties={}, assets=assets))
    return dict(type='FeatureCollection', features=items)

def test_bands_that_are_files(fleet, tmp_path):
    "The map is that of one file with three bands; others cost only their scene, which can be tried again"
    (tmp_path/'items.json').write_text(json.dumps(write_bands(fleet, tmp_path)))
    named = dict(device='cpu', windows=20)
    with pytest.raises(RunError, match='1 of 2 scenes failed.*\nbad: shifted.tif is shifted against its image'):
        map_scenes(fleet/'model', tmp_path/'items.json', tmp_path/'job', asset=['R=B04', 'G=B03', 'B=B02'], **named)
    np.testing.assert_array_equal(read_map(tmp_path/'job/maps/good.tif'), read_map(fleet/'1.tif'))
    assert json.loads((tmp_path/'job/maps/good.tif.json').read_text())['scene_name'] == 'good.vrt'
    shutil.copy(tmp_path/'B02.tif', tmp_path/'shifted.tif')
    map_scenes(fleet/'model', tmp_path/'job/retry.csv', tmp_path/'second', **named)
    # the same bytes, wherever the files lie
    assert (tmp_path/'second/maps/bad.tif').read_bytes() == (tmp_path/'job/maps/good.tif').read_bytes()

def test_a_kind_of_storage_without_its_package(fleet, tmp_path, monkeypatch):
    "Said before a job begins"
    (tmp_path/'list.csv').write_text('scene\ngs://bucket/a.tif\n')
    monkeypatch.setitem(sys.modules, 'gcsfs', None)
    with pytest.raises(ConfigError, match='gs:// needs a package'):
        map_scenes(fleet/'model', tmp_path/'list.csv', tmp_path/'job', remote=True)
    (tmp_path/'list.csv').write_text('scene\nftp://host/a.tif\n')
    with pytest.raises(DataError, match='ftp:// is not one of http'):
        map_scenes(fleet/'model', tmp_path/'list.csv', tmp_path/'job', remote=True)

def test_form_and_registry_are_those_of_predict(fleet, tmp_path):
    "Bands of EXTRA rasters by number; a form that a model cannot read fails"
    stats = Stats(['R', 'G', 'B', 'NIR'], 'uint8', 255., [.3] * 4, [.1] * 4, 1, '', pixel_size=[2.8, 3.1])
    model = untrained_model(tmp_path/'model', stats)
    place = from_origin(*CORNER, METRES, METRES), CRS
    write_raster(tmp_path/'a.tif', noise(100, 80), *place, nodata=0)
    write_raster(tmp_path/'extra.tif', noise(100, 80)[:2].astype('float32'), *place)
    (tmp_path/'bands.yaml').write_text('NIR: 2\n')
    (tmp_path/'list.csv').write_text('scene,extra\na.tif,extra.tif\n')
    settings = dict(device='cpu', registry=tmp_path/'bands.yaml', form='manifest')
    predict(model, tmp_path/'a.tif', tmp_path/'map.tif', tmp_path/'extra.tif', **settings)
    map_scenes(model, tmp_path/'list.csv', tmp_path/'job', **settings)
    assert (tmp_path/'job/maps/a.tif').read_bytes() == (tmp_path/'map.tif').read_bytes()
    with pytest.raises(ConfigError, match='registry: it numbers the bands of the column extra'):
        map_scenes(fleet/'model', fleet/'scenes', tmp_path/'none', **settings)
    with pytest.raises(RunError, match='form: model keeps no source.json'):
        map_scenes(fleet/'model', fleet/'scenes', tmp_path/'source', device='cpu', form='source')

def test_a_full_gpu_stops_its_worker_and_no_scene_fails_for_it(fleet, tmp_path):
    "What was claimed is free at once, and the same command ends the job"
    job = tmp_path/'job'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rtsseg.prediction, 'mean_logits', Mock(side_effect=torch.OutOfMemoryError('CUDA out of memory.')))
        with pytest.raises(DeviceError, match='do not fit into the GPU: take a smaller --batch') as caught:
            map_scenes(fleet/'model', fleet/'scenes', job, device='cpu', windows=20)
    assert caught.value.code == 3
    assert not (job/'failed').exists()
    assert not any((job/'claims').iterdir())
    map_scenes(fleet/'model', fleet/'scenes', job, device='cpu', windows=20)
    check_maps(fleet, job)

class SeenGpu:
    "A process that only notes which GPU it would see"
    exitcode = 0

    def __init__(self, seen):
        self.seen = seen

    def start(self):
        self.seen.append(os.environ.get('CUDA_VISIBLE_DEVICES'))

    def join(self):
        pass

@pytest.mark.parametrize('visible, device, workers, expected', [
    (None, 'auto', 3, ['0', '1', '0']),
    ('GPU-a,GPU-b', 'cuda', 2, ['GPU-a', 'GPU-b']),
    ('5', 'cpu', 2, ['5', '5']),
])
def test_each_worker_sees_one_gpu(fleet, tmp_path, monkeypatch, visible, device, workers, expected):
    "Of two that are not there; and the process that starts the workers holds none"
    seen, loaded = [], []

    def load_here(folder, device):
        loaded.append(device)
        return load_model(folder, 'cpu')

    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(multiprocessing.get_context('spawn'), 'Process', lambda **_: SeenGpu(seen))
    monkeypatch.setattr(rtsseg.fleet, 'load_model', load_here)
    monkeypatch.setattr(rtsseg.fleet, 'finish_job', lambda *_: dict(maps=[], failed=[]))
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if visible:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    map_scenes(fleet/'model', fleet/'scenes', tmp_path/'job', workers=workers, device=device)
    assert seen == expected
    assert loaded == ['cpu']
    assert os.environ.get('CUDA_VISIBLE_DEVICES') == visible

@pytest.mark.slow
def test_shares_in_processes_of_their_own_and_a_last_one_that_joins(fleet, tmp_path):
    "A loop over shares, all at once"
    job = tmp_path/'job'
    shares = [[*command(fleet, job, 60), '--share', f'{i}/3'] for i in (1, 2, 3)]
    running = [subprocess.Popen(share, env=ONE_THREAD, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
               for share in shares]
    assert [process.wait() for process in running] == [0, 0, 0]
    done = len([*(job/'shards').iterdir()])
    assert done > 3
    # all shards are there: the last command only joins
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rtsseg.fleet.SceneWork, 'make_shard', None)
        map_scenes(fleet/'model', fleet/'scenes', job, device='cpu', windows=20)
    check_maps(fleet, job)

@pytest.fixture(scope='module')
def archives(fleet, tmp_path_factory):
    "A scene cut into two tiles, each of which is the map of an archive; the archives, and the folder of their maps"
    home = tmp_path_factory.mktemp('archives')
    write_mosaic_of_scenes(fleet, home)
    (home/'list.csv').write_text('scene,date\npart0.tif,2023-07-01\npart1.tif,2024-07-01\n')
    map_scenes(fleet/'model', home/'list.csv', home/'job', device='cpu', tiles=True, windows=1)
    found = sorted((home/'job/maps').glob('*.zip'))
    for archive in found:
        with ZipFile(archive) as members:
            members.extractall(home/'maps')
    return found, home/'maps'

def test_objects_are_joined_across_archives(archives, tmp_path):
    "One command makes the polygons of a list of tiles: those of its maps, by name, date and shape"
    found, maps = archives
    assert [archive.name for archive in found] == ['t000000.zip', 't000001.zip']
    # half of the pixels are objects
    codes = read_map(maps/'part0.tif')
    cut = float(np.median(codes[codes != NODATA])) / STEPS
    map_polygons(found, tmp_path/'archives.gpkg', cut)
    map_polygons([maps/'part0.tif', maps/'part1.tif'], tmp_path/'maps.gpkg', cut)
    ours, want = (gpd.read_parquet(tmp_path/f'{name}.parquet') for name in ('archives', 'maps'))
    assert_geodataframe_equal(ours, want)
    both = ours[ours.map_file.str.contains(',')]
    assert len(both)
    assert both.BaseMapDate.unique().tolist() == ['2023-07-01,2024-07-01']

def test_archives_that_cannot_be_read(archives, tmp_path):
    found, _ = archives
    content = found[0].read_bytes()
    cases = dict(cut=content[:-30], changed=content.replace(b'RTSSEG', b'RTSSEH'), text=b'no archive')
    for name, data in cases.items():
        (tmp_path/f'{name}.zip').write_bytes(data)
    with ZipFile(tmp_path/'empty.zip', 'w'):
        pass
    names = [tmp_path/f'{name}.zip' for name in (*cases, 'empty')]
    with pytest.raises(DataError) as caught:
        map_polygons(names, tmp_path/'objects.gpkg', .5)
    lines = str(caught.value).splitlines()
    words = ['cut.zip cannot be read as an archive', 'part0.tif in changed.zip cannot be read',
             'text.zip cannot be read as an archive', 'empty.zip holds no maps']
    for line, expected in zip(lines, words, strict=True):
        assert expected in line

def test_an_archive_of_maps_is_unpacked_as_the_error_says(archives, tmp_path):
    found, maps = archives
    commands = (
        partial(write_mosaic, out=tmp_path/'zip.vrt'),
        lambda paths: expected_area(paths[0], tmp_path/'area.tif'),
        map_check,
    )
    for command in commands:
        with pytest.raises(DataError, match=r't000000.zip is an archive.*\(unzip t000000.zip -d maps\).*rtsseg-mosaic'):
            command(found)
    write_mosaic(sorted(maps.glob('*.tif')), tmp_path/'maps.vrt', 'last')
    made = map_polygons(tmp_path/'maps.vrt', tmp_path/'found.gpkg', .5)
    assert made['polygons'] == map_polygons(found, tmp_path/'zip.gpkg', .5)['polygons']

TILES = 'import json, sys; from rtsseg.fleet import map_scenes; map_scenes(**json.loads(sys.argv[1]))'

@pytest.mark.slow
def test_a_worker_that_is_killed_in_a_list_of_tiles_costs_nothing(fleet, tmp_path):
    "The same archives and index as of a job that was not interrupted"
    tiles = tmp_path/'tiles'
    tiles.mkdir()
    for k in range(30):
        write_scene(tiles/f'{k:02}.tif', 64, k)
    made = map_scenes(fleet/'model', tiles, tmp_path/'whole', device='cpu', tiles=True, windows=5)
    assert made['maps'] == [f't{k:06}.zip' for k in range(6)]
    options = dict(model=f'{fleet}/model', scenes=str(tiles), out=f'{tmp_path}/job', device='cpu', tiles=True,
                   windows=5, expiry=3)
    worker = subprocess.Popen([sys.executable, '-c', TILES, json.dumps(options)], env=ONE_THREAD,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not [*(tmp_path/'job/index').glob('t*')]:
        assert worker.poll() is None, 'it ended before it could be stopped'
        time.sleep(.01)
    worker.kill()
    worker.wait()
    assert not (tmp_path/'job/report.json').exists()
    assert map_scenes(**options) == made
    for name in ('index.parquet', 'report.json', *(f'maps/{archive}' for archive in made['maps'])):
        assert (tmp_path/'job'/name).read_bytes() == (tmp_path/'whole'/name).read_bytes()
    predict(fleet/'model', tiles/'07.tif', tmp_path/'07.tif', device='cpu')
    assert map_content(tmp_path/'job', '07') == (tmp_path/'07.tif').read_bytes()

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
