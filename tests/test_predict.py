"Scenes become maps: seams, edges, grids, what is refused, what it costs"
import hashlib
import json
import re
import threading
import time
import tracemalloc
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rasterio.transform import Affine
from rasterio.windows import Window
from scipy.special import expit, logit
from torch import nn

import rtsseg.prediction
from helpers.maps import CRS, GRID, map_bytes, noise, read_map, statistics, untrained_model, write_scene
from rtsseg.bootstrap import Estimate
from rtsseg.calibration import HeldOut, calibrate_evidence
from rtsseg.config import Calibrate, ConfigError, ImagesSource, Metrics
from rtsseg.console import DataError
from rtsseg.evidence import Meter
from rtsseg.folders import ORIENTATION, import_images
from rtsseg.importers import Conversion
from rtsseg.infer import load_model, predict_logits
from rtsseg.manifest import read_manifest
from rtsseg.prediction import (
    NODATA,
    STEPS,
    FinishedRows,
    Scene,
    map_lock,
    map_strips,
    predict,
    window_starts,
)
from rtsseg.raster import write_raster
from rtsseg.runs import RunError
from rtsseg.stats import compute_stats
from rtsseg.tiles import TileDataset
from rtsseg.toy import BANDS, scored_tiles
from rtsseg.weights import ModelError

def use_network(patch, loaded, network):
    "Let `predict` load another network than the model's"
    stub = replace(loaded, model=network.eval())
    patch.setattr(rtsseg.prediction, 'load_model', lambda folder, device: stub)

@pytest.fixture
def stub(monkeypatch, loaded):
    "Replaces the network of the model directory, and returns the directory"
    def put(network):
        use_network(monkeypatch, loaded, network)
        return loaded.folder
    return put

class Pointwise(nn.Module):
    "Scores each pixel by itself: what a window sees around it does not matter"

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 1, 1)
        nn.init.constant_(self.mix.weight, 1.3)
        nn.init.constant_(self.mix.bias, -.5)

    def forward(self, x):
        return self.mix(x)

def pointwise(image):
    "The probabilities that `Pointwise` gives to an image (3, H, W)"
    mean = np.array(statistics().mean)[:, None, None]
    return expit(1.3 * ((image / 255 - mean) / .2).sum(0) - .5)

class Whole(nn.Module):
    "One score for a whole window, from its brightness: the hardest seams possible"

    def __init__(self, scale=400.):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x):
        return (self.scale * x.mean((1, 2, 3), keepdim=True)).expand(-1, 1, *x.shape[2:])

# ---------------------------------------------------------------- the map is what the model says

def tile_with_a_gap(manifest):
    "The first tile of a manifest that has pixels without data"
    return next(i for i, name in enumerate(manifest.table.image) if (read_map(manifest.root/name) == 0).any())

@pytest.mark.parametrize('views', ['none', 'full'])
@pytest.mark.parametrize('bands', [[], BANDS])
def test_a_scene_of_one_tile_is_what_validation_would_see(tiny_world, tmp_path, bands, views):
    """Read, scaled, normalised, filled and scored as the loader's tile is. Sums in single precision are off by less
    than a hundredth of a step of the map, so a value differs where it lies that near to the middle between two"""
    manifest = read_manifest(tiny_world)
    table = manifest.table
    folder = untrained_model(tmp_path/'model', compute_stats(manifest.of('train'), bands))
    loaded = load_model(folder)
    for i in (0, tile_with_a_gap(manifest)):
        image = manifest.root/table.image[i]
        extra = manifest.root/table.extra[i] if bands else ''
        tile = TileDataset(manifest, loaded.stats, loaded.cfg)[i]
        with torch.no_grad():
            want = predict_logits(loaded.model, tile['image'][None], views)[0].double().sigmoid().numpy()
        made = predict(folder, image, tmp_path/f'{i}.tif', extra, views)
        found = read_map(tmp_path/f'{i}.tif')
        valid = found != NODATA
        with rasterio.open(image) as dataset:
            assert (valid == (dataset.read() != 0).any(0)).all()
        assert made['valid'] == valid.sum() > 0
        assert np.abs(found - STEPS * want)[valid].max() <= .51
        assert np.ptp(found[valid]) > 5000

@pytest.fixture(scope='module')
def calibration():
    "A calibration whose slope and intercept change scores"
    logits, masks, table = scored_tiles()
    meter = Meter(table)
    meter.update(torch.from_numpy(logits), torch.from_numpy(masks), torch.arange(len(table)))
    found = calibrate_evidence(meter.evidence(), Calibrate(method='slope_intercept'), Metrics(replicates=20))
    assert abs(found.intercept) > .1
    assert abs(found.slope - 1) > .1
    return found

def test_scores_become_probabilities(calibration, tmp_path):
    "By the calibration of the views that were asked for; what it promises is recorded in the map"
    folder = untrained_model(tmp_path/'model')
    scene = write_scene(tmp_path/'scene.tif', noise(100, 90))
    raw = predict(folder, scene, tmp_path/'raw.tif')
    assert raw['calibration'] is None
    calibration.save(folder/'calibration.json')
    made = predict(folder, scene, tmp_path/'map.tif')
    score = read_map(tmp_path/'raw.tif') / STEPS
    want = expit(calibration.slope * logit(score) + calibration.intercept)
    found = read_map(tmp_path/'map.tif') / STEPS
    assert np.abs(found - want).max() < 2 * max(calibration.slope, 1) / STEPS
    def by_ratio(points, get):
        return {f'1:{ratio}': get(point) if point.reached else None for ratio, point in points.items()}
    def thresholds_and_floors(found):
        return dict(thresholds=by_ratio(found.thresholds, lambda point: point.threshold),
                    objects=by_ratio(found.objects, lambda point: point.model_dump(include={'threshold', 'min_area'})))
    assert made['calibration'] == dict(
        promise=calibration.promise,
        excess=calibration.remaining.value,
        method='slope_intercept',
        ratio='1:200',
        slope=calibration.slope,
        intercept=calibration.intercept,
        regions={name: thresholds_and_floors(region) for name, region in calibration.regions.items()},
        **thresholds_and_floors(calibration),
    )
    with pytest.raises(ValueError, match="no calibration for views 'minimal'"):
        predict(folder, scene, tmp_path/'m.tif', views='minimal')

def calibrated_at(ratio):
    "A calibration whose probabilities are those at a ratio, with thresholds at the usual ratios"
    logits, masks, table = scored_tiles()
    meter = Meter(table)
    meter.update(torch.from_numpy(logits), torch.from_numpy(masks), torch.arange(len(table)))
    return calibrate_evidence(meter.evidence(), Calibrate(ratio=ratio), Metrics(replicates=20))

@pytest.mark.parametrize('ratio', [50, 200])
def test_a_note_counts_from_the_threshold_of_the_calibration(tmp_path, ratio):
    "At its own ratio; at the first of metrics.ratios where its own is not one of them"
    folder = untrained_model(tmp_path/'model')
    scene = write_scene(tmp_path/'scene.tif', noise(100, 90))
    found = calibrated_at(ratio)
    found.save(folder/'calibration.json')
    assert found.thresholds[200].reached
    made = predict(folder, scene, tmp_path/'map.tif')
    assert made['input']['threshold'] == found.thresholds[200].threshold

def test_a_note_counts_from_a_half_where_calibration_found_no_threshold(tmp_path):
    folder = untrained_model(tmp_path/'model')
    scene = write_scene(tmp_path/'scene.tif', noise(100, 90))
    found = calibrated_at(200)
    found.thresholds[200] = found.thresholds[200].model_copy(update=dict(reached=False))
    found.save(folder/'calibration.json')
    assert predict(folder, scene, tmp_path/'map.tif')['input']['threshold'] == .5

def test_a_note_describes_the_pixels_that_the_model_sees(model, tmp_path):
    "At half the scale, the means over four pixels"
    image = noise(128, 96)
    scene = write_scene(tmp_path/'scene.tif', image)
    seen = predict(model, scene, tmp_path/'map.tif', views='none@0.5')['input']
    assert seen['pixels'] == 64 * 48
    assert seen['valid'] == seen['mapped'] == 64 * 48
    means = image.reshape(3, 64, 2, 48, 2).mean((2, 4))
    for name, plane in zip('RGB', means, strict=True):
        # the means are rounded to whole numbers
        assert abs(seen['channels'][name]['mean'] - plane.mean()) < .5
        assert seen['channels'][name]['std'] == pytest.approx(plane.std(), rel=.02)

def test_what_does_not_add_up_is_not_called_calibrated(calibration, tmp_path, capsys):
    "The command and the note beside the map repeat what probabilities add up to on validation"
    folder = untrained_model(tmp_path/'model')
    scene = write_scene(tmp_path/'scene.tif', noise(100, 90))
    for excess, start in ((105., 'not calibrated'), (1.02, 'calibrated by slope and intercept')):
        held_out = {name: HeldOut(nll=Estimate(.1), excess=Estimate(excess)) for name in calibration.fits}
        calibration.model_copy(update=dict(held_out=held_out)).save(folder/'calibration.json')
        out = tmp_path/f'{excess:.0f}.tif'
        predict(folder, scene, out)
        said = f'probabilities at 1:200 add up to {excess:.3f} times the positive pixels of held-out validation blocks'
        found = json.loads(out.with_name(f'{out.name}.json').read_text())['calibration']
        assert found['promise'].startswith(start)
        assert said in found['promise']
        assert found['excess'] == excess
        printed = ' '.join(capsys.readouterr().err.split())
        assert start in printed and said in printed

def test_a_model_that_overflows_is_not_mapped(stub, tmp_path):
    write_scene(tmp_path/'scene.tif', np.full((3, 70, 64), 102, 'uint8'))
    with pytest.raises(ModelError, match='not finite in the window at row 0, column 0'):
        predict(stub(Whole(float('nan'))), tmp_path/'scene.tif', tmp_path/'map.tif')
    assert not (tmp_path/'map.tif').exists()

# ---------------------------------------------------------------- seams and edges

def holes():
    "Two pairs of sorted numbers: rows and columns of a rectangle"
    span = st.lists(st.integers(0, 300), min_size=2, max_size=2).map(sorted)
    return st.tuples(span, span)

@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300), batch=st.integers(1, 9), hole=holes())
def test_windows_leave_no_trace(loaded, tmp_path_factory, height, width, batch, hole):
    "Any size, any hole: a model of single pixels gives the map that it gives pixel by pixel, on the scene's grid"
    folder = tmp_path_factory.mktemp('s')
    image = noise(height, width)
    (top, bottom), (left, right) = hole
    image[:, top:bottom, left:right] = 0
    write_scene(folder/'scene.tif', image)
    with pytest.MonkeyPatch.context() as patch:
        use_network(patch, loaded, Pointwise())
        made = predict(loaded.folder, folder/'scene.tif', folder/'map.tif', batch=batch)
    with rasterio.open(folder/'map.tif') as dataset, rasterio.open(folder/'scene.tif') as scene:
        found = dataset.read(1)
        assert (dataset.shape, dataset.crs, dataset.transform) == (scene.shape, scene.crs, scene.transform)
        assert (dataset.nodata, dataset.dtypes, dataset.scales) == (NODATA, ('uint16',), (1 / STEPS,))
    valid = image.any(0)
    assert ((found != NODATA) == valid).all()
    assert np.abs(found - STEPS * pointwise(image))[valid].max(initial=0) < 1
    rows, columns = window_starts(height, 64), window_starts(width, 64)
    seen = [valid[y:y + 64, x:x + 64].any() for y in rows for x in columns]
    assert (made['pixels'], made['valid']) == (valid.size, valid.sum())
    assert (made['windows'], made['empty']) == (sum(seen), len(seen) - sum(seen))

@given(side=st.integers(1, 2000), tile=st.integers(2, 600))
def test_windows_cover_a_side_and_stay_inside(side, tile):
    "At least half of every window lies on its neighbour, and none but the only one reaches beyond the edge"
    starts = window_starts(side, tile)
    steps = np.diff(starts)
    assert starts[0] == 0
    assert starts[-1] == max(side - tile, 0)
    assert (steps > 0).all()
    assert steps.max(initial=0) <= tile / 2

@pytest.mark.parametrize('views', ['none', 'none-max'])
@pytest.mark.parametrize('seed', range(6))
def test_a_map_in_strips_is_the_map(stub, tmp_path, seed, views):
    "Windows that reach into two strips are run for both and counted once; every byte is the same"
    rng = np.random.default_rng(seed)
    height, width, most, batch = (int(rng.integers(*pair)) for pair in ((40, 200), (65, 420), (64, 300), (1, 5)))
    folder, model, image = tmp_path, stub(Whole()), noise(height, width)
    image[:, rng.random((height, width)) < .3] = 0
    image[:, :, width // 3:width // 2] = 0
    write_scene(folder/'scene.tif', image)
    whole = predict(model, folder/'scene.tif', folder/'whole.tif', views=views, batch=batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rtsseg.prediction, 'map_strips', partial(map_strips, most=most))
        parts = predict(model, folder/'scene.tif', folder/'parts.tif', views=views, batch=batch)
    assert parts == whole
    assert (folder/'parts.tif').read_bytes() == (folder/'whole.tif').read_bytes()

def test_no_seam_is_steeper_than_the_fading(stub, tmp_path):
    """Windows that disagree most: from a pixel to the next the map moves by at most sin(π / tile), the steepest slope
    of a squared sine"""
    blocks = noise(9, 9).repeat(32, 1).repeat(32, 2)
    write_scene(tmp_path/'scene.tif', blocks)
    predict(stub(Whole()), tmp_path/'scene.tif', tmp_path/'map.tif')
    probability = read_map(tmp_path/'map.tif') / STEPS
    # they do disagree
    assert np.ptp(probability) > .9
    for axis in (0, 1):
        assert np.abs(np.diff(probability, axis=axis)).max() <= np.sin(np.pi / 64) + 1.5 / STEPS

def test_a_turned_scene_gives_a_turned_map(model, tmp_path):
    "With all eight views, and windows that lie alike from every side"
    image = noise(96, 96)
    maps = []
    for k in range(4):
        scene = write_scene(tmp_path/f'{k}.tif', np.ascontiguousarray(np.rot90(image, k, (1, 2))))
        predict(model, scene, tmp_path/f'map{k}.tif', views='full')
        maps.append(read_map(tmp_path/f'map{k}.tif').astype(int))
    assert np.ptp(maps[0]) > 5000
    for k in range(1, 4):
        assert np.abs(np.rot90(maps[0], k) - maps[k]).max() <= 1

# ---------------------------------------------------------------- the file

def test_the_map_is_cloud_optimized_and_its_overviews_are_means(stub, tmp_path):
    "of the pixels that hold data"
    image = noise(600, 1100)
    image[:, :101, :301] = 0
    write_scene(tmp_path/'scene.tif', image)
    predict(stub(Pointwise()), tmp_path/'scene.tif', tmp_path/'map.tif')
    with rasterio.open(tmp_path/'map.tif') as dataset:
        assert dataset.tags(ns='IMAGE_STRUCTURE')['LAYOUT'] == 'COG'
        assert dataset.block_shapes == [(512, 512)]
        assert dataset.overviews(1) == [2, 4]
        assert dataset.descriptions == ('probability',)
        full = dataset.read(1, masked=True).astype(float)
    with rasterio.open(tmp_path/'map.tif', overview_level=0) as dataset:
        half = dataset.read(1, masked=True)
    means = full.reshape(300, 2, 550, 2).mean((1, 3))
    assert (half.mask == means.mask).all()
    assert np.abs(half - means).max() <= .5
    assert half.mask.sum() == 50 * 150

def test_the_same_model_and_scene_give_the_same_bytes(tmp_path):
    "Wherever they lie; the map and the file beside it agree, and neither holds a path"
    folders = [tmp_path/'a', tmp_path/'b'/'c']
    for folder in folders:
        folder.mkdir(parents=True)
        scene = write_scene(folder/f'{folder.name}_scene.tif', noise(90, 150))
        predict(untrained_model(folder/'model'), scene, folder/'map.tif')
    first, second = [(folder/'map.tif').read_bytes() for folder in folders]
    assert first == second
    with rasterio.open(tmp_path/'a'/'map.tif') as dataset:
        tags = dataset.tags()
    assert set(tags) == {'RTSSEG', 'AREA_OR_POINT'}
    digest = dict(sha256=hashlib.sha256(first).hexdigest())
    note = json.loads((tmp_path/'a'/'map.tif.json').read_text())
    assert note.pop('scene_name') == 'a_scene.tif'
    assert set(note.pop('input')['channels']) == {'R', 'G', 'B'}
    assert note.pop('findings') == []
    assert json.loads(tags['RTSSEG']) | digest | dict(scene_date='') == note
    for trace in (str(tmp_path), 'scene.tif', '.parts'):
        assert trace.encode() not in first
    names = {path.name for path in (tmp_path/'a').iterdir()}
    assert names == {'a_scene.tif', 'map.qml', 'map.tif', 'map.tif.json', 'model'}

@pytest.mark.parametrize(('bands', 'conversion'), [(3, None), (7, Conversion(bands=[7, 2, 1], downscale=2))],
                         ids=['tile', 'source'])
def test_memory_grows_with_the_width_of_a_scene_and_not_with_its_height(monkeypatch, loaded, tmp_path, bands,
                                                                        conversion):
    use_network(monkeypatch, replace(loaded, conversion=conversion), Pointwise())
    peaks = []
    # from the size on at which the statistics of the scene take no more of its pixels
    for height in (1024, 2048):
        planes = np.repeat(noise(height, 100), 3, 0)[:bands]
        scene = write_scene(tmp_path/f'{height}.tif', planes)
        del planes
        tracemalloc.start()
        predict(loaded.folder, scene, tmp_path/f'map{height}.tif')
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # rows may wait for a thread; the scene itself would add more than half
    assert peaks[1] < 1.5 * peaks[0]

# ---------------------------------------------------------------- threads beside the model

def delayed(patch, owner, name):
    "Let a function wait a little before each call; the threads that called it"
    function, threads = getattr(owner, name), set()

    def waits(*arguments):
        threads.add(threading.current_thread())
        time.sleep(.01)
        return function(*arguments)

    patch.setattr(owner, name, waits)
    return threads

SLOW = {'reader': (Scene, 'window'), 'model': (rtsseg.prediction, 'window_logits'), 'writer': (FinishedRows, 'write')}

@pytest.mark.parametrize('slow', SLOW)
def test_a_map_does_not_depend_on_which_thread_waits(model, tmp_path, monkeypatch, slow):
    "Batches are filled again only when the model has seen them; reader and writer have threads, which end"
    scene = write_scene(tmp_path/'scene.tif', noise(200, 210))
    predict(model, scene, tmp_path/'map.tif', batch=2)
    threads = delayed(monkeypatch, *SLOW[slow])
    predict(model, scene, tmp_path/'slow.tif', batch=2)
    assert (tmp_path/'slow.tif').read_bytes() == (tmp_path/'map.tif').read_bytes()
    assert (threading.main_thread() in threads) == (slow == 'model')
    assert len(threads) == 1
    assert threads.isdisjoint(threading.enumerate()) or slow == 'model'

@pytest.mark.parametrize('of', ['image', 'windows', 'rows'])
def test_an_error_beside_the_model_ends_the_command(model, tmp_path, monkeypatch, of):
    "With its own message, from whichever thread; no thread is left, and the same command resumes"
    scene = write_scene(tmp_path/'scene.tif', noise(64 + 9 * 32, 70))
    predict(model, scene, tmp_path/'map.tif')
    owner, name, error = dict(
        image=(Scene, 'read_rows', DataError('rows 128 to 191: damaged')),
        windows=(Scene, 'window', OSError(5, 'Input/output error')),
        rows=(FinishedRows, 'write', OSError(28, 'No space left on device')),
    )[of]
    function, calls, before = getattr(owner, name), [], threading.active_count()

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise error
        return function(*arguments)

    out = tmp_path/'again.tif'
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        with pytest.raises(RunError, match='(damaged|Input/output error|No space left on device).*resumes'):
            predict(model, scene, out)
    assert threading.active_count() == before
    rows = sorted(file.name for file in tmp_path.glob('again.tif.parts/0*'))
    assert rows == [f'{i:06}' for i in range(len(rows))]
    assert 0 < len(rows) < 5
    predict(model, scene, out)
    assert out.read_bytes() == (tmp_path/'map.tif').read_bytes()

# ---------------------------------------------------------------- what is refused

def good(folder):
    write_scene(folder/'scene.tif', noise(64, 64))

def rotated(folder):
    write_scene(folder/'scene.tif', noise(64, 64), transform=GRID @ Affine.rotation(3))

def four_bands(folder):
    write_scene(folder/'scene.tif', np.ones((4, 64, 64), 'uint8'))

def sixteen_bits(folder):
    write_scene(folder/'scene.tif', noise(64, 64).astype('uint16'))

def without_crs(folder):
    write_scene(folder/'scene.tif', noise(64, 64), crs=None)

def virtual(folder):
    band = '<VRTRasterBand dataType="Byte" band="1"/>'
    (folder/'scene.tif').write_text(f'<VRTDataset rasterXSize="64" rasterYSize="64">{band}</VRTDataset>')

def missing(folder):
    pass

def sparse(folder, width, height, **blocks):
    "A small file that claims many pixels, none of which were written"
    layout = dict(driver='GTiff', width=width, height=height, count=3, dtype='uint8', sparse_ok=True, tiled=True)
    with rasterio.open(folder/'scene.tif', 'w', crs=CRS, transform=GRID, **layout, **blocks):
        pass

def very_wide(folder):
    sparse(folder, 3_000_000, 64)

def one_large_block(folder):
    sparse(folder, 20_000, 20_000, blockxsize=20_480, blockysize=20_480)

def many_small_blocks(folder):
    sparse(folder, 300_000, 64, blockxsize=16, blockysize=16)

@pytest.mark.parametrize('scene, arguments, error, why', [
    (rotated, {}, DataError, 'rotated grid'),
    (four_bands, {}, DataError, 'has 3 bands, this one has 4'),
    (sixteen_bits, {}, DataError, 'is uint16, but the model was trained on uint8'),
    (without_crs, {}, DataError, 'names no CRS: give it as --crs'),
    (virtual, {}, DataError, 'GeoTIFF'),
    (missing, {}, DataError, 'no such file'),
    (very_wide, {}, DataError, 'claims 3000000 × 64 .*64 rows of it are more than'),
    (one_large_block, {}, DataError, 'blocks of 20480 × 20480 pixels in 3 bands: more than'),
    (many_small_blocks, {}, DataError, 'claims 75000 blocks in 64 rows: more than'),
    (good, dict(crs='EPSG:3413'), ConfigError, 'names its CRS, EPSG:3413: leave --crs out'),
    (without_crs, dict(crs='EPSG:nonsense'), DataError, 'coordinate reference system'),
    (good, dict(extra='extra.tif'), ConfigError, 'the model sees RGB only'),
    (good, dict(views='ful'), ConfigError, "'ful' is not one of .*did you mean 'full'"),
    (good, dict(device='tpu', batch=0), ConfigError, "device: 'tpu' .*\nbatch: 0"),
], ids=lambda value: getattr(value, '__name__', None))
def test_scenes_and_arguments_that_are_refused(model, tmp_path, scene, arguments, error, why):
    "before anything is written"
    scene(tmp_path)
    before = set(tmp_path.iterdir())
    with pytest.raises(error, match=why):
        predict(model, tmp_path/'scene.tif', tmp_path/'map.tif', **arguments)
    assert set(tmp_path.iterdir()) == before

def write_extra(path, planes, **profile):
    "Write EXTRA bands on the grid of the scenes"
    write_raster(path, planes, **dict(transform=GRID, crs=CRS, names=BANDS) | profile)
    return path

@pytest.fixture
def with_extra(tmp_path):
    "A model of EXTRA bands, a scene, and EXTRA planes that fit it"
    folder = untrained_model(tmp_path/'model', statistics(BANDS))
    scene = write_scene(tmp_path/'scene.tif', noise(70, 70))
    return folder, scene, np.random.default_rng(0).normal(size=(2, 70, 70)).astype('float32')

@pytest.mark.parametrize('profile, why', [
    (dict(names=['ndvi', 'slope']), "'relative_elevation'"),
    (dict(transform=GRID @ Affine.translation(1, 0)), 'shifted against its image'),
    (dict(crs='EPSG:32608'), 'another CRS'),
])
def test_extra_bands_of_another_grid_or_name_are_refused(with_extra, tmp_path, profile, why):
    folder, scene, planes = with_extra
    extra = write_extra(tmp_path/'extra.tif', planes, **profile)
    with pytest.raises(DataError, match=why):
        predict(folder, scene, tmp_path/'map.tif', extra)

def test_extra_bands_that_are_missing_are_asked_for(with_extra, tmp_path):
    folder, scene, _ = with_extra
    with pytest.raises(ConfigError, match='extra: the model also sees ndvi, relative_elevation'):
        predict(folder, scene, tmp_path/'map.tif')

def test_extra_bands_are_found_by_name(with_extra, tmp_path):
    "In whatever order the raster holds them; and what has no data in one of them has none in the map"
    folder, scene, planes = with_extra
    planes[0, 60:, :5] = np.nan
    extra = write_extra(tmp_path/'extra.tif', planes, nodata=np.nan)
    reversed_extra = write_extra(tmp_path/'reversed.tif', planes[::-1], names=BANDS[::-1], nodata=np.nan)
    predict(folder, scene, tmp_path/'a.tif', extra)
    predict(folder, scene, tmp_path/'b.tif', reversed_extra)
    found = read_map(tmp_path/'a.tif')
    assert (found == read_map(tmp_path/'b.tif')).all()
    assert ((found == NODATA) == np.isnan(planes[0])).all()

@pytest.mark.parametrize('views', ['none', 'none@0.5'])
def test_bands_of_a_scene_are_found_by_name(model, tmp_path, views):
    "The map of blue, green and red is that of red, green and blue, also where the scene is resampled"
    image = noise(128, 96)
    write_scene(tmp_path/'usual.tif', image)
    write_scene(tmp_path/'turned.tif', image[::-1], names=['B', 'G', 'R'])
    predict(model, tmp_path/'usual.tif', tmp_path/'a.tif', views=views)
    predict(model, tmp_path/'turned.tif', tmp_path/'b.tif', views=views)
    assert (read_map(tmp_path/'a.tif') == read_map(tmp_path/'b.tif')).all()

def test_a_scene_of_other_bands_is_refused(model, tmp_path):
    write_scene(tmp_path/'scene.tif', noise(90, 80), names=['nir', 'red', 'green'])
    with pytest.raises(DataError, match="described as 'nir', 'red', 'green', and an image has R, G and B"):
        predict(model, tmp_path/'scene.tif', tmp_path/'map.tif')
    assert not (tmp_path/'map.tif').exists()

def test_extra_bands_are_found_by_a_registry(with_extra, tmp_path):
    "The same map as by description; a registry that does not fit is an error"
    folder, scene, planes = with_extra
    described = write_extra(tmp_path/'described.tif', planes)
    plain = write_extra(tmp_path/'plain.tif', planes[::-1], names=[])
    (tmp_path/'bands.yaml').write_text('relative_elevation: 1\nndvi: 2\n')
    by_name = predict(folder, scene, tmp_path/'a.tif', described)
    by_number = predict(folder, scene, tmp_path/'b.tif', plain, registry=tmp_path/'bands.yaml')
    assert (read_map(tmp_path/'a.tif') == read_map(tmp_path/'b.tif')).all()
    assert by_number['extra_bands'] == 'relative_elevation=1 ndvi=2'
    assert 'extra_bands' not in by_name
    with pytest.raises(DataError, match="no band is described as 'ndvi'"):
        predict(folder, scene, tmp_path/'c.tif', plain)
    (tmp_path/'bands.yaml').write_text('relative_elevation: 1\nndvi: 3\n')
    with pytest.raises(DataError, match='ndvi is band 3, and the raster has 2'):
        predict(folder, scene, tmp_path/'c.tif', plain, registry=tmp_path/'bands.yaml')
    with pytest.raises(ConfigError, match='registry: it numbers the bands of --extra, which is not given'):
        predict(folder, scene, tmp_path/'c.tif', registry=tmp_path/'bands.yaml')

def test_a_scene_without_a_grid_makes_a_map_without(model, tmp_path):
    scene = write_scene(tmp_path/'scene.tif', noise(64, 64), crs=None, transform=None)
    predict(model, scene, tmp_path/'none.tif', crs='none')
    predict(model, scene, tmp_path/'given.tif', crs=CRS)
    with rasterio.open(tmp_path/'none.tif') as without, rasterio.open(tmp_path/'given.tif') as placed:
        assert without.crs is None
        assert placed.crs == CRS
        assert (without.read() == placed.read()).all()

def test_a_row_that_is_damaged_late_is_named(tmp_path):
    "Between the check of the rows and their joining"
    finished = FinishedRows(tmp_path, {}, [Window(0, 2 * i, 5, 2) for i in range(3)])
    for i in range(3):
        finished.write(i, {}, np.full((2, 5), i, 'uint16'))
    assert [values[0, 0] for _, values, _ in finished.blocks()] == [0, 1, 2]
    for damage in (lambda path: path.write_bytes(b'cut off'), lambda path: path.unlink()):
        damage(tmp_path/'000001')
        with pytest.raises(OSError, match='part 000001 of the map is missing or was damaged'):
            list(finished.blocks())

def test_a_map_is_made_by_one_process_at_a_time(model, tmp_path):
    good(tmp_path)
    with map_lock(tmp_path/'map.tif.parts'), pytest.raises(DataError, match='another process makes this map'):
        predict(model, tmp_path/'scene.tif', tmp_path/'map.tif')

# ---------------------------------------------------------------- a scene as people have it

def source_folder(folder, write, count=3):
    "A folder of images, as `write(path without suffix, number)` makes them, and of masks"
    for name in ('images', 'masks'):
        (folder/name).mkdir(parents=True)
    for k in range(count):
        write(folder/f'images/s{k}', k)
        mask = np.zeros((150, 118), 'uint8')
        mask[20:60, 30:70] = 1
        Image.fromarray(mask).save(folder/f'masks/s{k}.png')
    return folder

def seven_bands(path, k, scale=.6, dtype='float32'):
    "A raster of seven bands with a corner of nodata and a pixel that is not a number"
    planes = (np.random.default_rng(k).uniform(-.05, 1.1, (7, 150, 118)) * scale).astype(dtype)
    planes[:, :9, :40] = -9999
    if dtype == 'float32':
        planes[5, 77, 60] = np.nan
    write_raster(path.with_suffix('.tif'), planes, GRID, CRS, nodata=-9999)

def png(path, k):
    "A picture with an alpha band"
    planes = np.random.default_rng(k).integers(0, 256, (150, 118, 4), 'uint8')
    planes[..., 3] = 255 * (planes[..., 3] > 9)
    Image.fromarray(planes).save(path.with_suffix('.png'))

def jpeg(path, k):
    Image.fromarray(noise(150, 118).transpose(1, 2, 0)).save(path.with_suffix('.jpg'))

SCALED = dict(bands=[3, 2, 1], extra_bands=dict(slope=7, ndvi=6), value_range=[0, .6])

def imported_model(tmp_path, write, extra=(), **settings):
    "Source folder, its manifest, and a model directory that was made of them"
    folder = source_folder(tmp_path/'in', write)
    source = ImagesSource(path=folder, **settings)
    manifest = import_images(source, tmp_path/'out'/'manifest.csv', split_check='warn')
    stats = compute_stats(manifest, list(extra))
    return folder, manifest, untrained_model(tmp_path/'model', stats, source=source)

def window(scene, rows, left):
    "What the model sees of a window"
    x = torch.full((len(scene.stats.channels), scene.tile, scene.tile), torch.nan)
    scene.window(rows, left, x.numpy())
    return x

@pytest.mark.parametrize(('write', 'extra', 'crs', 'settings'), [
    (seven_bands, ['ndvi', 'slope'], '', SCALED),
    (seven_bands, ['ndvi'], '', SCALED | dict(downscale=2)),
    (seven_bands, [], '', SCALED | dict(extra_bands={})),
    (png, [], 'none', {}),
    (png, [], 'none', dict(bands=[2, 2, 3], downscale=2, nodata=0)),
    (jpeg, [], 'none', {}),
], ids=['float32', 'shrunk', 'float32 as RGB', 'png', 'png otherwise', 'jpeg'])
def test_a_file_of_the_source_gives_the_map_of_its_tile(tmp_path, caplog, write, extra, crs, settings):
    "What the model sees is the same to the last bit, in every window"
    folder, manifest, model = imported_model(tmp_path, write, extra, **settings)
    loaded = load_model(model)
    file = next((folder/'images').glob('s1.*'))
    row = manifest.table.set_index('tile_id').loc['s1']
    tile, raster = manifest.root/row.image, manifest.root/row.extra if extra else ''
    form = '' if extra or settings == {} else 'manifest'
    ours, theirs = Scene(tile, raster, crs, loaded, form=form), Scene(file, '', crs, loaded)
    assert (ours.height, ours.width, ours.crs, ours.transform) == (theirs.height, theirs.width, theirs.crs,
                                                                   theirs.transform)
    for top in window_starts(ours.height, 64):
        found, want = theirs.read_rows(top), ours.read_rows(top)
        np.testing.assert_array_equal(found.valid, want.valid)
        for left in window_starts(ours.width, 64):
            assert torch.equal(window(theirs, found, left), window(ours, want, left))
    made = predict(model, file, tmp_path/'theirs.tif', crs=crs)
    usual = predict(model, tile, tmp_path/'ours.tif', raster, crs=crs, form=form)
    assert made['input'] == usual['input']
    assert list(made['input']['channels']) == ['R', 'G', 'B', *extra]
    np.testing.assert_array_equal(read_map(tmp_path/'theirs.tif'), read_map(tmp_path/'ours.tif'))
    assert made['source']['value_range'] == settings.get('value_range')
    assert 0 < made['valid'] <= made['pixels'] == ours.height * ours.width
    assert np.ptp(read_map(tmp_path/'theirs.tif')) > 1000
    assert 'samples per pixel' not in caplog.text

def test_a_scene_of_neither_form_is_refused(tmp_path):
    "Both forms are named"
    folder, manifest, model = imported_model(tmp_path, seven_bands, ['ndvi'], **SCALED)
    row = manifest.table.iloc[0]
    both = (r'in no form .*R, G and B as uint16 in a GeoTIFF, with ndvi in a raster that --extra names.*'
            r'R, G and B in bands 3, 2, 1, slope in band 7, ndvi in band 6, of any type with values from 0 to 0\.6')
    few = write_scene(tmp_path/'few.tif', noise(90, 80))
    png(tmp_path/'few', 0)
    file = next((folder/'images').glob('s0.*'))
    for scene, extra in [(few, ''), (tmp_path/'few.png', ''), (manifest.root/row.image, ''),
                         (file, manifest.root/row.extra)]:
        with pytest.raises(DataError, match=both):
            predict(model, scene, tmp_path/'map.tif', extra, crs='')
    with pytest.raises(ConfigError, match='leave out --extra'):
        predict(model, file, tmp_path/'map.tif', manifest.root/row.extra, form='source')
    with pytest.raises(ConfigError, match="form: 'sauce' is not one of manifest, source"):
        predict(model, file, tmp_path/'map.tif', form='sauce')
    assert not list(tmp_path.glob('map*'))

def test_a_scene_that_could_be_either_is_asked_for(tmp_path):
    "Values on another scale do not pass in silence"
    def write(path, k):
        seven_bands(path, k, 3000, 'int16')
    folder, manifest, model = imported_model(tmp_path, write, value_range=[0, 3000])
    scaled, unscaled = manifest.root/manifest.table.image[0], tmp_path/'unscaled.tif'
    with rasterio.open(next((folder/'images').glob('s0.*'))) as ds:
        planes = ds.read([1, 2, 3])
    planes[planes < 0] = 0
    write_raster(unscaled, planes.astype('uint16'), GRID, CRS)
    for scene in (scaled, unscaled):
        with pytest.raises(ConfigError, match='say --form manifest or --form source'):
            predict(model, scene, tmp_path/'map.tif')
    predict(model, scaled, tmp_path/'map.tif', form='manifest')
    predict(model, unscaled, tmp_path/'other.tif', form='source')
    valid = read_map(tmp_path/'map.tif') != NODATA
    assert valid.any()
    inner = np.s_[80:140, :]
    np.testing.assert_array_equal(read_map(tmp_path/'map.tif')[inner], read_map(tmp_path/'other.tif')[inner])
    # the same file in another form is another map
    with pytest.raises(DataError, match=r'other settings \(source\)'):
        predict(model, unscaled, tmp_path/'other.tif', form='manifest')
    with pytest.raises(DataError, match='the model was trained on values of 0 to 3000'):
        predict(model, scaled, tmp_path/'map.tif', form='source')

def test_values_on_another_scale_are_not_clipped_in_silence(tmp_path, caplog):
    "Percent, or numbers to 10,000, for reflectances: both figures are named"
    *_, model = imported_model(tmp_path, seven_bands, ['ndvi'], **SCALED)
    loaded = load_model(model)
    for scale in (60, 6000, 6e-4):
        seven_bands(tmp_path/'other', 0, scale)
        with pytest.raises(DataError, match=r'other.tif has values of .* trained on values of 0 to 0.6 with a mean of '
                                            r'0.\d+: bring the scene to that scale'):
            Scene(tmp_path/'other.tif', '', '', loaded)
    # what is clipped of a scene of training, and of one that is twice as bright
    caplog.clear()
    for scale in (.6, 1.2):
        seven_bands(tmp_path/'other', 0, scale)
        Scene(tmp_path/'other.tif', '', '', loaded)
    shares = [float(share) for share in re.findall(r'(\d+)% of its values are clipped', caplog.text)]
    # values are uniform between -.05 and 1.1 times the scale
    assert shares == pytest.approx([100 * .15 / 1.15, 100 * .65 / 1.15], abs=2)
    assert 'ndvi has a median' not in caplog.text
    with rasterio.open(tmp_path/'other.tif', 'r+') as ds:
        planes = ds.read()
        planes[5][planes[5] != -9999] *= 1e4
        ds.write(planes)
    Scene(tmp_path/'other.tif', '', '', loaded)
    assert 'other.tif: ndvi has a median' in caplog.text

def test_pictures_that_an_import_refuses(tmp_path):
    "Predict refuses them too: turned by EXIF, or with a palette"
    def grey(path, k):
        Image.fromarray(noise(150, 118)[0]).save(path.with_suffix('.png'))
    *_, model = imported_model(tmp_path, grey, bands=[1, 1, 1])
    picture = Image.fromarray(noise(70, 80)[0])
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture.save(tmp_path/'turned.png', exif=exif)
    picture.convert('P').save(tmp_path/'palette.png')
    picture.save(tmp_path/'grey.png')
    for name, why in dict(turned='by its EXIF', palette='has a palette').items():
        with pytest.raises(DataError, match=why):
            predict(model, tmp_path/f'{name}.png', tmp_path/'map.tif', crs='none')
    # as the images of training, so its CRS need not be named; the map is the same where it is
    assert predict(model, tmp_path/'grey.png', tmp_path/'map.tif')['valid'] == 70 * 80
    made = map_bytes(tmp_path/'map.tif')
    predict(model, tmp_path/'grey.png', tmp_path/'map.tif', crs='none')
    assert map_bytes(tmp_path/'map.tif') == made

def test_a_scene_without_a_crs_is_asked_for_it_where_training_had_one(model, tmp_path):
    "So does a model directory of an older version, which does not say what training had"
    scene = write_scene(tmp_path/'scene.tif', noise(70, 80), crs=None)
    assert not load_model(model).stats.without_crs
    with pytest.raises(DataError, match='names no CRS: .*--crs none'):
        predict(model, scene, tmp_path/'map.tif')

def test_a_picture_without_a_record(model, tmp_path):
    "A model directory of an older version loads, and says what to do about a picture"
    png(tmp_path/'scene', 0)
    assert load_model(model).conversion is None
    with pytest.raises(DataError, match=r'scene.png is not a GeoTIFF: .* save it as a GeoTIFF of uint8'):
        predict(model, tmp_path/'scene.png', tmp_path/'map.tif', crs='none')
    with pytest.raises(ConfigError, match='keeps no source.json'):
        predict(model, tmp_path/'scene.png', tmp_path/'map.tif', form='source')
