"Scales and the maximum over windows, from a tile to a joined map, and when a second scale is worth it"
import json
import signal
from dataclasses import replace

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rtsseg.joins
import rtsseg.prediction
from helpers.maps import (
    CRS,
    GRID,
    map_bytes,
    noise,
    read_map,
    statistics,
    untrained_model,
    write_probability,
    write_scene,
)
from rtsseg.calibration import calibrate
from rtsseg.config import SYMMETRIES, ConfigError, Views, load, parse_views, to_yaml
from rtsseg.console import DataError
from rtsseg.evidence import Meter, evidence_path
from rtsseg.export import export_model
from rtsseg.files import write_atomic
from rtsseg.fleet import map_scenes
from rtsseg.infer import load_model, mean_logits, predict_logits
from rtsseg.joins import JOIN_RULES, join_maps, scale_gain, show_scales
from rtsseg.mapfile import NODATA, STEPS
from rtsseg.polygons import map_polygons
from rtsseg.prediction import BlendedRows, Scene, predict, window_starts
from rtsseg.runs import Stopped, config_hash
from rtsseg.toy import scored_tiles

# ---------------------------------------------------------------- views
scales = st.integers(5, 100).map(lambda percent: percent / 100)

@given(st.builds(Views, st.sampled_from(SYMMETRIES), scales, st.sampled_from(['mean', 'max'])))
def test_views_are_read_as_they_are_written(views):
    assert parse_views(str(views)) == views
    assert evidence_path('run', 'val', str(views)).parent.name == 'evidence'

@given(st.text('none@0.5-max1full', max_size=12))
def test_each_views_have_one_text(text):
    try:
        found = parse_views(text)
    except ValueError as error:
        assert repr(text) in str(error)
    else:
        assert str(found) == text

def test_old_views_are_as_they_were(loaded):
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for views in SYMMETRIES:
            assert torch.equal(predict_logits(loaded.model, x, views), mean_logits(loaded.model, x, views))
    assert evidence_path('run', 'val').name == 'val.parquet'
    assert evidence_path('run', 'val', 'minimal').name == 'val-minimal.parquet'
    assert evidence_path('run', 'val', 'none@0.5-max').name == 'val-none@0.5-max.parquet'

@settings(max_examples=8, deadline=None)
@given(height=st.integers(3, 40), width=st.integers(3, 40), scale=st.sampled_from([.25, .3, .5]))
def test_a_tile_of_any_size_has_scales(loaded, height, width, scale):
    "Also where the smaller tile is not what the encoder takes; a constant image stays constant"
    x = torch.randn(1, 3, height, width)
    with torch.no_grad():
        for views in (f'none@{scale:g}', f'none@{scale:g}-max'):
            logits = predict_logits(loaded.model, x, views)
            assert logits.shape == (1, height, width)
            assert torch.isfinite(logits).all()

# ---------------------------------------------------------------- scenes
def whole_means(height, width):
    "An image (3, height, width) of even sides in which the mean of every 2 × 2 pixels is a whole number; and the means"
    means = np.random.default_rng(1).integers(20, 236, (3, height // 2, width // 2))
    image = means.repeat(2, 1).repeat(2, 2)
    spread = np.random.default_rng(2).integers(0, 20, means.shape)
    for rows, columns, sign in ((0, 0, 1), (1, 1, -1)):
        image[:, rows::2, columns::2] += sign * spread
    return image.astype('uint8'), means.astype('uint8')

@settings(max_examples=5, deadline=None)
@given(height=st.integers(1, 120), width=st.integers(1, 120), views=st.sampled_from(['none', 'none-max']))
def test_a_scale_is_the_scene_made_smaller_beforehand(model, tmp_path_factory, height, width, views):
    folder = tmp_path_factory.mktemp('s')
    image, means = whole_means(2 * height, 2 * width)
    # a hole of whole pixels of the smaller scene
    image[:, :2 * (height // 3)], means[:, :height // 3] = 0, 0
    write_scene(folder/'scene.tif', image)
    write_scene(folder/'small.tif', means, transform=GRID @ rasterio.Affine.scale(2))
    scaled = 'none@0.5' + views.removeprefix('none')
    made = predict(model, folder/'scene.tif', folder/'map.tif', views=scaled)
    predict(model, folder/'small.tif', folder/'small_map.tif', views=views)
    with rasterio.open(folder/'map.tif') as one, rasterio.open(folder/'small_map.tif') as other:
        assert (one.transform, one.crs, one.shape) == (other.transform, other.crs, other.shape)
        assert (one.read() == other.read()).all()
    assert made['views'] == scaled

def test_a_scene_without_a_grid_has_scales(model, tmp_path):
    image, means = whole_means(100, 90)
    write_scene(tmp_path/'scene.tif', image, crs=None, transform=None)
    write_scene(tmp_path/'small.tif', means)
    predict(model, tmp_path/'scene.tif', tmp_path/'map.tif', crs='none', views='none@0.5')
    predict(model, tmp_path/'small.tif', tmp_path/'small_map.tif')
    assert (read_map(tmp_path/'map.tif') == read_map(tmp_path/'small_map.tif')).all()

@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 50), width=st.integers(1, 50), tile=st.integers(2, 20), seed=st.integers(0, 9))
def test_the_maximum_over_windows(height, width, tile, seed):
    "As a loop over all windows finds it"
    rng = np.random.default_rng(seed)
    tops, lefts = window_starts(height, tile), window_starts(width, tile)
    windows = rng.normal(size=(len(tops), len(lefts), tile, tile)).astype('float32')
    want = np.full((max(height, tile), max(width, tile)), -np.inf)
    for i, top in enumerate(tops):
        for j, left in enumerate(lefts):
            part = want[top:top + tile, left:left + tile]
            np.maximum(part, windows[i, j], out=part)
    rows, blended = [], BlendedRows(tile, width, merging='max')
    for i, (top, end) in enumerate(zip(tops, [*tops[1:], height], strict=True)):
        blended.move_to(top)
        for j, left in enumerate(lefts):
            blended.add(left, torch.from_numpy(windows[i, j]))
        rows.append(blended.merged(np.ones((end - top, width), bool)))
    np.testing.assert_array_equal(np.concatenate(rows), want[:height, :width])

def test_the_maximum_is_never_lower(model, tmp_path):
    write_scene(tmp_path/'scene.tif', noise(150, 130))
    predict(model, tmp_path/'scene.tif', tmp_path/'mean.tif')
    predict(model, tmp_path/'scene.tif', tmp_path/'max.tif', views='none-max')
    higher = read_map(tmp_path/'max.tif').astype(int) - read_map(tmp_path/'mean.tif')
    assert higher.min() >= 0
    assert higher.max() > 1000

@pytest.mark.parametrize('views', ['none-max', 'none@0.5-max'])
def test_a_map_of_the_maximum_that_was_stopped_ends_in_the_same_bytes(model, tmp_path, monkeypatch, views):
    write_scene(tmp_path/'scene.tif', noise(260, 150))
    predict(model, tmp_path/'scene.tif', tmp_path/'whole.tif', views=views)
    write, written = rtsseg.prediction.FinishedRows.write, []
    def stop_after_two(self, i, counts, values):
        write(self, i, counts, values)
        written.append(i)
        if len(written) == 2:
            signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(rtsseg.prediction.FinishedRows, 'write', stop_after_two)
    with pytest.raises(Stopped):
        predict(model, tmp_path/'scene.tif', tmp_path/'map.tif', views=views)
    predict(model, tmp_path/'scene.tif', tmp_path/'map.tif', views=views)
    assert sorted(written) == list(range(len(written)))
    assert map_bytes(tmp_path/'map.tif') == map_bytes(tmp_path/'whole.tif')

def test_a_fleet_maps_at_a_scale(model, tmp_path):
    (tmp_path/'scenes').mkdir()
    write_scene(tmp_path/'scenes'/'a.tif', noise(300, 200))
    map_scenes(model, tmp_path/'scenes', tmp_path/'job', views='none@0.5-max', device='cpu', windows=6)
    predict(model, tmp_path/'scenes'/'a.tif', tmp_path/'a.tif', views='none@0.5-max', device='cpu')
    assert (tmp_path/'job'/'maps'/'a.tif').read_bytes() == (tmp_path/'a.tif').read_bytes()
    with pytest.raises(ConfigError, match='views: .*none@2'):
        map_scenes(model, tmp_path/'scenes', tmp_path/'other', views='none@2')

def test_an_exported_file_has_no_scale(model, tmp_path):
    for views in ('none@0.5', 'full-max'):
        with pytest.raises(ConfigError, match='scales and the maximum over windows are of maps'):
            export_model(model, tmp_path/'out', views=views)

def test_the_guard_on_resolution_is_about_the_scene(tmp_path):
    "Not about the pixels that a scale makes of it"
    folder = untrained_model(tmp_path/'model', replace(statistics(), pixel_size=[2.8, 3.2]))
    write_scene(tmp_path/'scene.tif', noise(80, 80))
    assert Scene(tmp_path/'scene.tif', '', '', load_model(folder), scale=.5).longer == 2
    write_scene(tmp_path/'six.tif', noise(80, 80), transform=GRID @ rasterio.Affine.scale(2))
    with pytest.raises(DataError, match='say --resample'):
        predict(folder, tmp_path/'six.tif', tmp_path/'map.tif', views='none@0.5')

# ---------------------------------------------------------------- joins
def values_of(seed, height, width, holes=True):
    "Values of a map, some of them nodata"
    rng = np.random.default_rng(seed)
    values = rng.integers(0, STEPS + 1, (height, width), 'uint16')
    if holes:
        values[rng.random(values.shape) < .1] = NODATA
    return values

@settings(max_examples=6, deadline=None)
@given(height=st.integers(1, 60), width=st.integers(1, 60), strip=st.integers(100, 2000),
       rule=st.sampled_from(JOIN_RULES))
def test_a_map_joined_with_itself_is_itself(tmp_path_factory, height, width, strip, rule):
    folder = tmp_path_factory.mktemp('j')
    values = values_of(0, height, width)
    one = write_probability(folder/'one.tif', values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rtsseg.joins, 'STRIP_PIXELS', strip)
        made = join_maps([one, one], folder/'joined.tif', rule)
    with rasterio.open(one) as before, rasterio.open(folder/'joined.tif') as dataset:
        assert (dataset.read(1) == values).all()
        assert (dataset.transform, dataset.crs, dataset.nodata) == (before.transform, before.crs, NODATA)
    assert (made['pixels'], made['valid']) == (values.size, (values != NODATA).sum())

def by_hand(coarse, y, x, height, width):
    "The bilinear value of a coarse map in a pixel of the fine grid; None where all neighbours have no data"
    rows, columns = coarse.shape
    row = min(max((y + .5) * rows / height - .5, 0), rows - 1)
    column = min(max((x + .5) * columns / width - .5, 0), columns - 1)
    total, weight = 0., 0.
    for i in range(rows):
        for j in range(columns):
            w = max(0, 1 - abs(i - row)) * max(0, 1 - abs(j - column))
            if w > 0 and coarse[i, j] != NODATA:
                total, weight = total + w * coarse[i, j], weight + w
    return total / weight if weight else None

@settings(max_examples=8, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), seed=st.integers(0, 99),
       rule=st.sampled_from(['max', 'mean']), strip=st.integers(12, 60))
def test_a_coarser_map_comes_to_the_finest_grid(tmp_path_factory, rows, columns, seed, rule, strip):
    "Pixel by pixel; nodata is that of the finest map, and nodata of the coarser one takes no part"
    folder = tmp_path_factory.mktemp('j')
    height, width = 2 * rows, 2 * columns
    fine, coarse = values_of(seed, height, width), values_of(seed + 1, rows, columns)
    twice = GRID @ rasterio.Affine.scale(2)
    maps = [write_probability(folder/'coarse.tif', coarse, transform=twice), write_probability(folder/'fine.tif', fine)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rtsseg.joins, 'STRIP_PIXELS', strip)
        join_maps(maps, folder/'joined.tif', rule)
    joined = read_map(folder/'joined.tif')
    for (y, x), value in np.ndenumerate(fine):
        other = by_hand(coarse, y, x, height, width)
        if value == NODATA:
            assert joined[y, x] == NODATA
        else:
            known = [float(value)] if other is None else [float(value), other]
            want = max(known) if rule == 'max' else sum(known) / len(known)
            assert abs(joined[y, x] - want) <= .501

def two_blocks():
    "A coarse map (30, 40) with a block of 20 × 6 pixels and one of 3 × 3"
    coarse = np.zeros((30, 40))
    coarse[4:10, 5:25] = .8
    coarse[20:23, 30:33] = .8
    return coarse

@pytest.mark.parametrize('least, kept', [(100, 1), (0, 2), (200, 0)])
def test_large_objects_come_from_the_coarse_map(tmp_path, least, kept):
    "By the length on the ground: blocks of 20 × 6 m = 120 m and 3 × 6 m = 18 m; EPSG:3413 is true to length at 70°N"
    fine = np.full((60, 80), .1)
    coarse = two_blocks()
    twice = GRID @ rasterio.Affine.scale(2)
    maps = [write_probability(tmp_path/'fine.tif', np.rint(STEPS * fine).astype('uint16')),
            write_probability(tmp_path/'coarse.tif', np.rint(STEPS * coarse).astype('uint16'), transform=twice)]
    join_maps(maps, tmp_path/'size.tif', 'size', least=least)
    joined = read_map(tmp_path/'size.tif') / STEPS
    large, small = np.s_[9:19, 11:49], np.s_[41:45, 61:65]
    assert (joined[large] > .5).all() == (kept >= 1)
    assert (joined[small] > .5).all() == (kept == 2)
    elsewhere = np.kron(coarse, np.ones((2, 2))) == 0
    assert np.abs(joined[elsewhere] - .1).max() < 1e-4

def test_a_joined_map_says_what_it_is(tmp_path):
    "And polygons are made from it, at the largest threshold of its maps"
    values = np.rint(STEPS * two_blocks()).astype('uint16')
    other = dict(calibration=dict(promise='', ratio='1:200', thresholds={'1:20': .2, '1:200': .75, '1:1000': .9}))
    first = dict(calibration=dict(promise='', ratio='1:200', thresholds={'1:20': .3, '1:200': .5, '1:1000': None}))
    maps = [write_probability(tmp_path/'a.tif', values, dict(views='none', scene='s', **first)),
            write_probability(tmp_path/'b.tif', values, dict(views='none@0.5', scene='s', **other))]
    before = [path.read_bytes() for path in maps]
    made = join_maps(maps, tmp_path/'joined.tif')
    assert made['calibration']['thresholds'] == {'1:20': .3, '1:200': .75, '1:1000': None}
    assert made['calibration']['promise'].startswith('not calibrated: joined')
    assert [source['views'] for source in made['joined']['maps']] == ['none', 'none@0.5']
    assert [path.read_bytes() for path in maps] == before
    found = map_polygons(tmp_path/'joined.tif', tmp_path/'joined.gpkg')
    assert (found['threshold'], found['polygons']) == (.75, 2)
    assert json.loads((tmp_path/'joined.tif.json').read_text()) == made
    # another calibration of the model would not help
    with pytest.raises(DataError, match='joined of several maps.*take --points pixels'):
        map_polygons(tmp_path/'joined.tif', tmp_path/'other.gpkg', points='objects')
    height, width = values.shape
    ground = shapely.box(*(GRID @ (0, height)), *(GRID @ (width, 0)))
    gpd.GeoDataFrame(dict(region=['west']), geometry=[ground], crs=CRS).to_file(tmp_path/'layer.gpkg')
    with pytest.raises(DataError, match='joined of several maps.*leave --regions out'):
        map_polygons(tmp_path/'joined.tif', tmp_path/'other.gpkg', regions=tmp_path/'layer.gpkg')
    # the same again makes nothing
    stamp = (tmp_path/'joined.tif').stat().st_mtime_ns
    assert join_maps(maps, tmp_path/'joined.tif') == made
    assert (tmp_path/'joined.tif').stat().st_mtime_ns == stamp

@pytest.mark.parametrize('change, why', [
    (dict(settings=dict(scene='other')), 'different scenes'),
    (dict(transform=GRID @ rasterio.Affine.scale(1.5)), 'do not cover the same ground'),
    (dict(crs='EPSG:3857'), 'different CRSs'),
])
def test_maps_that_do_not_belong_together(tmp_path, change, why):
    values = values_of(0, 20, 30)
    one = write_probability(tmp_path/'one.tif', values)
    other = write_probability(tmp_path/'other.tif', values, **change)
    with pytest.raises(DataError, match=why):
        join_maps([one, other], tmp_path/'joined.tif')
    assert {path.name for path in tmp_path.iterdir()} == {'one.tif', 'other.tif'}

def test_a_join_that_was_stopped_ends_in_the_same_bytes(tmp_path, monkeypatch):
    maps = [write_probability(tmp_path/f'{k}.tif', values_of(k, 90, 50)) for k in range(2)]
    monkeypatch.setattr(rtsseg.joins, 'STRIP_PIXELS', 500)
    join_maps(maps, tmp_path/'whole.tif')
    rows, done = rtsseg.joins.Join.rows, []
    def stop_after_two(self, top, bottom):
        done.append(top)
        if len(done) == 2:
            signal.raise_signal(signal.SIGTERM)
        return rows(self, top, bottom)
    monkeypatch.setattr(rtsseg.joins.Join, 'rows', stop_after_two)
    with pytest.raises(Stopped):
        join_maps(maps, tmp_path/'map.tif')
    join_maps(maps, tmp_path/'map.tif')
    assert done == list(range(0, 90, 10))
    assert map_bytes(tmp_path/'map.tif') == map_bytes(tmp_path/'whole.tif')

# ---------------------------------------------------------------- whether a scale is worth it
@pytest.fixture
def seen_twice(tmp_path):
    "A run; `seen_twice(shift)` lowers the scores of true pixels of the fine scale, and 0 makes both scales one"
    def make(shift):
        metrics = dict(ratios=[5], monitor='pr_auc@5', replicates=100, object_thresholds=[.3, .5, .7])
        cfg = load(runs=tmp_path, metrics=metrics, calibrate=dict(ratio=5, target_precision=.5))
        folder = tmp_path/'toy'/config_hash(cfg)/'seed42'
        write_atomic(folder/'config.yaml', to_yaml(cfg))
        write_atomic(folder/'model'/'model.safetensors', b'')
        logits, masks, table = scored_tiles(40, 200)
        # objects of these tiles are some pixels long
        table = table.assign(pixel_size=400.)
        noisy = np.random.default_rng(0).normal(0, 1, logits.shape)
        fine = logits + shift * (masks == 1) + noisy
        for views, z in {'none': fine, 'none@0.5': logits if shift else fine}.items():
            meter = Meter(table, (.3, .5, .7), views=views)
            meter.update(z.astype(np.float16), masks, np.arange(len(table)))
            meter.evidence().write(evidence_path(folder, 'val', views))
        return folder
    return make

@pytest.mark.parametrize('shift', [-3., 0.])
def test_a_second_scale_is_judged_against_a_lower_threshold(seen_twice, shift):
    folder = seen_twice(shift)
    for views in ('none', 'none@0.5'):
        calibrate(folder, views)
    found = scale_gain(folder, ratio='1:5')
    table, alarms = found.table, found.false_objects
    has = table[table.objects > 0]
    assert (has.either >= has[['fine', 'coarse']].max(axis=1)).all()
    assert (has.either <= has.fine + has.coarse + 1e-12).all()
    assert alarms['both'] == alarms['fine'] + alarms['coarse'] >= alarms['lowered']
    assert found.thresholds['lowered'] <= found.thresholds['fine']
    assert table.objects['all'] == table.objects.drop('all').sum()
    gain = has.either['over 1 km'] - has.lowered['over 1 km']
    assert has.gain['over 1 km'].startswith(f'{gain:.3f}')
    assert found.verdict in ' '.join(show_scales(found).split())
    assert max(map(len, show_scales(found).splitlines())) <= 100
    assert found.verdict.startswith('worth a try') == (shift < 0)

def test_what_is_missing_for_the_comparison_is_named(seen_twice):
    folder = seen_twice(0.)
    calibrate(folder, 'none')
    with pytest.raises(DataError, match=r"no calibration for views 'none@0.5'.*rtsseg-calibrate .*--views none@0.5"):
        scale_gain(folder, ratio='1:5')
    with pytest.raises(DataError, match=r'val-full-max.parquet.*rtsseg-evaluate .*--views full-max'):
        scale_gain(folder, coarse='full-max', ratio='1:5')
    with pytest.raises(ConfigError, match='none@7'):
        scale_gain(folder, coarse='none@7')
