"Maps are checked: seams of real windows, holes, overlaps on other grids, and drift that is and that is not"
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.transform import from_origin
from scipy import ndimage
from scipy.special import expit

import rtsseg.mapcheck
import rtsseg.prediction
from helpers import maps
from helpers.maps import CRS, GRID, noise, read_map, statistics, untrained_model, write_scene
from rtsseg.config import ConfigError, ImagesSource, ToySource
from rtsseg.console import DataError
from rtsseg.files import FileError
from rtsseg.mapcheck import compare_maps, map_check, scene_baseline
from rtsseg.prediction import STEPS, ground_side, predict
from rtsseg.raster import Grid
from rtsseg.scenestats import ObjectCount, SceneTally, input_summary, scene_statistics
from rtsseg.toy import scene

# maps of a calibrated model
write_map = partial(maps.write_map, calibration=dict(ratio='1:200', thresholds={'1:20': .3, '1:200': .5}))

def levels(found, start=''):
    "{what: level} of the findings whose name begins so"
    return {f.what: f.level for f in found.findings if f.what.startswith(start)}

def smooth(shape, sigma=8, seed=0):
    "Probabilities of smooth noise"
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma)
    return expit(2 * field / field.std() - 3)

# ---------------------------------------------------------------- statistics of a scene

@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), strip=st.integers(1, 41), share=st.floats(0, 1),
       seed=st.integers(0, 99))
def test_objects_are_counted_in_any_strips(height, width, strip, share, seed):
    mask = np.random.default_rng(seed).random((height, width)) < share
    found = ObjectCount()
    for top in range(0, height, strip):
        found.add(mask[top:top + strip])
    assert found.count == ndimage.label(mask, np.ones((3, 3)))[1]

@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), strip=st.integers(1, 91), columns=st.integers(1, 91),
       seed=st.integers(0, 99))
def test_a_summary_does_not_depend_on_the_pieces(height, width, strip, columns, seed):
    "And its means are those of NumPy; the noise is that of a hand-made ratio estimator"
    rng = np.random.default_rng(seed)
    planes, valid = rng.normal(50, 9, (2, height, width)), rng.random((height, width)) < .8
    probability = np.where(valid, rng.random((height, width)), np.nan)
    tally = SceneTally(['a', 'b'], (height, width))
    for top in range(0, height, strip):
        for left in range(0, width, columns):
            part = np.s_[top:top + strip, left:left + columns]
            tally.add(top, planes[:, *part], valid[part], probability[part], left)
    found = input_summary(tally)
    assert tally.objects.count == ndimage.label(np.nan_to_num(probability) >= .5, np.ones((3, 3)))[1]
    json.dumps(found, allow_nan=False)
    if not valid.any():
        assert (found['valid'], found['channels']['a']['mean']) == (0, None)
        return
    for k, name in enumerate('ab'):
        assert found['channels'][name]['mean'] == pytest.approx(planes[k][valid].mean())
        assert found['channels'][name]['std'] == pytest.approx(planes[k][valid].std(), abs=1e-5)
    side = -(-max(height, width) // 8)
    x, n, error = planes[0], valid.sum(), []
    for r in range(0, height, side):
        for c in range(0, width, side):
            seen = valid[r:r + side, c:c + side]
            if seen.any():
                mean = x[r:r + side, c:c + side][seen].mean()
                error.append((seen.sum() / n * (mean - x[valid].mean()))**2)
    if len(error) > 1:
        want = np.sqrt(np.sum(error) * len(error) / (len(error) - 1))
        assert found['channels']['a']['noise'] == pytest.approx(want)
    else:
        assert found['channels']['a']['noise'] is None
    assert found['probability']['mean'] == pytest.approx(np.nanmean(probability))
    assert sum(found['scores']) == valid.sum()

def test_the_noise_covers_the_means_of_independent_blocks():
    "In simulated scenes whose blocks are independent, the mean lies within two noises of the truth 95 times in 100"
    rng, inside = np.random.default_rng(0), 0
    for _ in range(400):
        tally = SceneTally(['a'], (64, 64))
        image = np.kron(rng.normal(size=(8, 8)), np.ones((8, 8)))
        tally.add(0, image[None], np.ones((64, 64), bool))
        own = input_summary(tally)['channels']['a']
        inside += abs(own['mean']) < 2 * own['noise']
    assert .91 < inside / 400 < .98

# ---------------------------------------------------------------- seams

def test_real_windows_leave_no_seams_and_flat_weights_do(tmp_path, capsys, monkeypatch):
    "The library's window fades out; a weight that does not leaves seams, and the check sees them"
    folder = untrained_model(tmp_path/'model')
    image = noise(420, 420)
    image = np.clip(ndimage.gaussian_filter(image.astype(float), (0, 3, 3)) * 3 - 250, 1, 255).astype('uint8')
    write_scene(tmp_path/'scene.tif', image)
    predict(folder, tmp_path/'scene.tif', tmp_path/'faded.tif')
    monkeypatch.setattr(rtsseg.prediction, 'window_weight', lambda tile: np.ones((tile, tile)))
    predict(folder, tmp_path/'scene.tif', tmp_path/'flat.tif')
    faded = map_check([tmp_path/'faded.tif'], [tmp_path/'scene.tif'], threshold=.5)
    flat = map_check([tmp_path/'flat.tif'], [tmp_path/'scene.tif'], threshold=.5)
    assert set(levels(faded, 'seams').values()) == {'ok'}
    assert set(levels(flat, 'seams').values()) == {'warning'}
    assert 'falls to zero' in capsys.readouterr().out

@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_smooth_maps_raise_no_seam_alarm(tmp_path_factory, seed):
    folder = tmp_path_factory.mktemp('s')
    found = map_check([write_map(folder/'map.tif', smooth((300, 400), 6, seed))])
    assert set(levels(found, 'seams').values()) == {'ok'}

def test_a_map_of_another_program_is_checked_without_seams(tmp_path):
    "It does not say how large its windows were"
    path = write_map(tmp_path/'map.tif', smooth((80, 90)), tile=None)
    assert levels(map_check([path]), 'seams') == {'seams': 'note'}

# ---------------------------------------------------------------- coverage and values

def test_holes_are_errors_and_the_scene_s_own_gaps_are_not(tmp_path, capsys):
    image = noise(100, 120)
    image[:, :30] = 0
    write_scene(tmp_path/'scene.tif', image)
    valid = image.any(0)
    whole = map_check([write_map(tmp_path/'whole.tif', smooth((100, 120)), valid)], [tmp_path/'scene.tif'])
    assert levels(whole, 'coverage') == {'coverage': 'ok'}
    valid[50:60, 50:80] = False
    holes = map_check([write_map(tmp_path/'holes.tif', smooth((100, 120)), valid)], [tmp_path/'scene.tif'],
                      figure=tmp_path/'check.png')
    assert levels(holes, 'coverage') == {'coverage': 'error'}
    assert f'{1 - 300 / 8400:.3%}' in next(f.value for f in holes.findings if f.what == 'coverage')
    assert holes.verdict.startswith('NOT READY: 1 error')
    assert holes.verdict in capsys.readouterr().out
    assert (tmp_path/'check.png').read_bytes().startswith(b'\x89PNG')

@pytest.mark.parametrize('probability, valid, what, level', [
    (np.full((40, 50), .3), None, 'values', 'error'),
    (smooth((40, 50)), np.zeros((40, 50), bool), 'no data', 'error'),
    (smooth((40, 50)), np.arange(2000).reshape(40, 50) < 99, 'no data', 'warning'),
])
def test_maps_that_say_nothing(tmp_path, probability, valid, what, level):
    assert levels(map_check([write_map(tmp_path/'map.tif', probability, valid)]))[what] == level

def test_a_map_lies_on_the_grid_of_its_scene(tmp_path):
    write_scene(tmp_path/'scene.tif', noise(40, 51))
    path = write_map(tmp_path/'map.tif', smooth((40, 50)))
    with pytest.raises(DataError, match='50 × 40 pixels, its image 51 × 40'):
        map_check([path], [tmp_path/'scene.tif'])
    with pytest.raises(DataError, match='is not a map'):
        map_check([tmp_path/'scene.tif'])

# ---------------------------------------------------------------- overlaps

def test_overlaps_are_compared_pixel_by_pixel(tmp_path):
    "Shifted by whole pixels: the sums are those of the arrays"
    p, q = smooth((100, 140)), smooth((100, 140), seed=1)
    first = write_map(tmp_path/'a.tif', p)
    second = write_map(tmp_path/'b.tif', q, transform=from_origin(GRID.c + 50 * 3, GRID.f - 20 * 3, 3, 3))
    found = compare_maps(first, second)
    a, b = read_map(first)[20:, 50:] / STEPS, read_map(second)[:80, :90] / STEPS
    assert found.pixels == 80 * 90
    assert found.difference == pytest.approx(np.abs(a - b).sum() / (a + b).sum())
    assert (found.first, found.second) == pytest.approx((a.mean(), b.mean()))
    checked = map_check([first, second])
    assert levels(checked, 'a.tif and b.tif') == {'a.tif and b.tif': 'warning'}

def test_what_lies_elsewhere_or_is_the_same(tmp_path):
    p = smooth((60, 70))
    first = write_map(tmp_path/'a.tif', p)
    far = write_map(tmp_path/'far.tif', p, transform=from_origin(GRID.c + 70 * 3, GRID.f, 3, 3))
    nowhere = write_map(tmp_path/'nowhere.tif', p, crs=None)
    assert compare_maps(first, far) is None
    assert compare_maps(first, nowhere) is None
    assert levels(map_check([first, far]), 'overlaps') == {'overlaps': 'ok'}
    copy = tmp_path/'copy.tif'
    copy.write_bytes(first.read_bytes())
    assert levels(map_check([first, copy]))['a.tif and copy.tif'] == 'warning'

def test_maps_in_another_crs_are_compared_too(tmp_path):
    "The same land in EPSG:3413 and in EPSG:3995, which is turned by 45 degrees"
    from rasterio.warp import calculate_default_transform, reproject
    p = smooth((200, 200), 12)
    first = write_map(tmp_path/'a.tif', p)
    bounds = (GRID.c, GRID.f - 600, GRID.c + 600, GRID.f)
    transform, width, height = calculate_default_transform('EPSG:3413', 'EPSG:3995', 200, 200, *bounds, resolution=3)
    turned = np.full((height, width), np.nan)
    reproject(p, turned, src_transform=GRID, src_crs='EPSG:3413', dst_transform=transform, dst_crs='EPSG:3995',
              src_nodata=np.nan, dst_nodata=np.nan)
    second = write_map(tmp_path/'b.tif', np.nan_to_num(turned), ~np.isnan(turned), transform=transform,
                       crs='EPSG:3995')
    found = compare_maps(first, second)
    assert found.pixels > .95 * 200 * 200
    assert found.difference < .08

# ---------------------------------------------------------------- batches

@pytest.fixture(scope='module')
def mapped(tmp_path_factory):
    "A model directory, a scene with a gap, and its map"
    folder = tmp_path_factory.mktemp('mapped')
    image = noise(200, 330)
    image[:, :90, :120] = 0
    write_scene(folder/'scene.tif', image)
    predict(untrained_model(folder/'model'), folder/'scene.tif', folder/'map.tif', batch=3)
    return folder

def jitter_of(folder, **arguments):
    found = map_check([folder/'map.tif'], [folder/'scene.tif'], model=folder/'model', threshold=.5, **arguments)
    return levels(found, 'batch'), found

def test_batches_do_not_decide_what_a_map_holds(mapped, tmp_path):
    found, check = jitter_of(mapped, figure=tmp_path/'check.png')
    assert found == {'batch place': 'ok', 'batch size': 'ok'}
    assert len(check.figure.axes) == 3

def test_a_network_that_looks_at_its_batch_is_found(mapped, monkeypatch):
    "Its scores depend on the mean of all windows that are run together"
    usual = rtsseg.prediction.mean_logits
    monkeypatch.setattr(rtsseg.prediction, 'mean_logits',
                        lambda model, x, views: usual(model, x, views) + 50 * x.mean())
    found, _ = jitter_of(mapped)
    assert found['batch size'] == 'warning'

def test_a_network_that_knows_its_place_is_found(mapped, monkeypatch):
    usual = rtsseg.prediction.mean_logits
    def by_place(model, x, views):
        return usual(model, x, views) + .01 * torch.arange(len(x)).view(-1, 1, 1)
    monkeypatch.setattr(rtsseg.prediction, 'mean_logits', by_place)
    found, _ = jitter_of(mapped)
    assert found['batch place'] == 'warning'

def test_jitter_is_that_of_the_model_and_the_scene_of_a_map(mapped, tmp_path):
    other = untrained_model(tmp_path/'other', tile=32)
    with pytest.raises(DataError, match='was not made from other as it is now: name its model'):
        map_check([mapped/'map.tif'], [mapped/'scene.tif'], model=other)
    changed = write_scene(tmp_path/'scene.tif', noise(200, 330)[::-1])
    with pytest.raises(DataError, match='name its scene'):
        map_check([mapped/'map.tif'], [changed], model=mapped/'model')
    with pytest.raises(ConfigError, match='model: what it is for needs scenes'):
        map_check([mapped/'map.tif'], model=mapped/'model')

def test_a_map_of_another_program_cannot_be_predicted_again(mapped, tmp_path):
    path = write_map(tmp_path/'map.tif', smooth((200, 330)))
    found = map_check([path], [mapped/'scene.tif'], model=mapped/'model')
    assert levels(found, 'batch') == {'batch jitter': 'note'}

def test_the_threshold_is_that_of_the_calibration(mapped, tmp_path):
    "As polygons and masks take it; a map of raw scores has none"
    probability = smooth((200, 330))
    path, scene = write_map(tmp_path/'map.tif', probability), mapped/'scene.tif'
    for arguments, threshold in ((dict(), .5), (dict(ratio='1:20'), .3), (dict(threshold=.2), .2)):
        checked = map_check([path], [scene], **arguments).summaries['map.tif']
        known = scene_baseline([scene], [path], **arguments)['scenes']['scene.tif']
        for found in (checked, known):
            assert found['threshold'] == threshold
            assert found['predicted']['share'] == pytest.approx((probability >= threshold).mean(), abs=1e-3)
    raw = mapped/'map.tif'
    for refused in (partial(map_check, [raw], [scene]), partial(scene_baseline, [scene], [raw])):
        with pytest.raises(DataError, match='name one with --threshold'):
            refused()
    with pytest.raises(ConfigError, match='ratio'):
        map_check([path], [scene], ratio='often')

# ---------------------------------------------------------------- maps on another grid

def sharp_model(folder, **arguments):
    "A model that knows the resolution of its tiles: twice that of the scenes here"
    with rasterio.open(write_scene(folder/'place.tif', noise(150, 150))) as ds:
        side = ground_side(Grid(ds.shape, ds.crs, ds.transform))
    return untrained_model(folder/'model', replace(statistics(), pixel_size=[2 * side, 2 * side]), **arguments)

def check_all(model, scene, out, **arguments):
    "What the check says of a map with its scene and its model"
    made = predict(model, scene, out, batch=3, **arguments)
    found = map_check([out], [scene], model=model, threshold=.5)
    assert levels(found, 'batch') == {'batch place': 'ok', 'batch size': 'ok'}
    assert levels(found)['coverage'] == 'ok'
    assert found.summaries[out.name]['mapped'] == made['valid']
    return made, found.summaries[out.name]

@pytest.mark.parametrize('views', ['none', 'none@0.5'])
def test_a_resampled_map_is_checked(tmp_path, views):
    "Its statistics are those of the note: the pixels that the model saw"
    model = sharp_model(tmp_path)
    scene = write_scene(tmp_path/'scene.tif', noise(300, 301))
    made, summary = check_all(model, scene, tmp_path/'map.tif', views=views, resample=True)
    assert summary['channels'] == made['input']['channels']
    assert made['pixels'] < 300 * 301 / 3.9

def test_a_map_at_half_the_scale_is_checked(tmp_path):
    "Also of a model that knows no resolution, and of a scene without a place"
    model = untrained_model(tmp_path/'model')
    scene = write_scene(tmp_path/'scene.tif', noise(300, 301))
    check_all(model, scene, tmp_path/'map.tif', views='none@0.5')

def test_a_map_with_a_named_crs_is_checked(tmp_path):
    scene = write_scene(tmp_path/'scene.tif', noise(150, 140), crs=None)
    for crs in (CRS, 'none'):
        check_all(untrained_model(tmp_path/f'model {crs}'), scene, tmp_path/f'{crs[:4]}.tif', crs=crs)

@pytest.mark.parametrize('downscale', [1, 2])
def test_a_map_of_a_file_of_the_source_is_checked(tmp_path, downscale):
    "In the bands, the scale and the pixels of the model; the nodata of the source is not declared in the file"
    source = ImagesSource(path=tmp_path, bands=[3, 2, 1], nodata=7, downscale=downscale)
    image = noise(150, 140)
    image[:, :40, :50] = 7
    scene = write_scene(tmp_path/'scene.tif', image, nodata=None)
    model = untrained_model(tmp_path/'model', source=source)
    made, summary = check_all(model, scene, tmp_path/'map.tif', form='source')
    assert summary['channels'] == made['input']['channels']

# ---------------------------------------------------------------- drift

@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    "Folder of five toy scenes of one landscape, a brighter copy of the last, and maps of all of them"
    folder = tmp_path_factory.mktemp('toy')
    for seed in range(5):
        image = scene(ToySource(scene_size=512, tile_size=64, prevalence=.02, seed=seed), 0).image
        put(folder, f's{seed}', image)
    brighter = np.where(image.any(2)[..., None], np.clip(image * 1.5 + 40, 1, 255), 0).astype('uint8')
    put(folder, 'bright', brighter)
    return folder

def put(folder, name, image):
    "A scene and its map, by a model that takes bright ground for slumps"
    write_scene(folder/f'{name}.tif', image.transpose(2, 0, 1))
    bright = ndimage.gaussian_filter(image.astype(float).mean(2), 2)
    write_map(folder/f'{name}_map.tif', expit((bright - 150) / 12), image.any(2))

def pairs(folder, names):
    return [folder/f'{name}.tif' for name in names], [folder/f'{name}_map.tif' for name in names]

def test_pixels_are_counted_as_polygons_are_cut(tmp_path):
    "A pixel of just the threshold counts, however a map has rounded it: for half of all thresholds it is rounded down"
    write_scene(tmp_path/'scene.tif', noise(20, 20))
    found = []
    for k, threshold in enumerate(np.random.default_rng(0).uniform(.01, .99, 20)):
        path = write_map(tmp_path/f'{k}.tif', np.full((20, 20), threshold))
        summary = input_summary(scene_statistics(tmp_path/'scene.tif', path, threshold))
        assert summary['predicted']['share'] == 1
        assert summary['objects'] == 1
        found.append(read_map(path)[0, 0] / STEPS < threshold)
    assert {*found} == {True, False}

@pytest.mark.parametrize('known', [['s0'], ['s0', 's1'], ['s0', 's1', 's2', 's3']], ids=len)
def test_brightness_is_flagged_and_another_scene_is_not(toy, tmp_path, known):
    "×1.5 + 40 against one, two and four earlier scenes"
    scene_baseline(*pairs(toy, known), tmp_path/'baseline.json')
    images, maps = pairs(toy, ['s4', 'bright'])
    usual = map_check(maps[:1], images[:1], tmp_path/'baseline.json')
    assert set(levels(usual, 'channel').values()) == {'ok'}
    assert not [f for f in usual.findings if f.level in ('warning', 'error')]
    bright = map_check(maps[1:], images[1:], tmp_path/'baseline.json')
    assert set(levels(bright, 'channel').values()) == {'warning'}
    assert levels(bright)['predicted share'] == 'warning'

def altered(folder, tmp_path, change):
    "What the check says of the last scene after a change of its pixels, against four scenes as they were"
    scene_baseline(*pairs(folder, ['s0', 's1', 's2', 's3']), tmp_path/'baseline.json')
    image = read_rgb(folder/'s4.tif')
    changed = np.where(image.any(2)[..., None], np.clip(change(image.astype(float)), 1, 255), 0).astype('uint8')
    put(tmp_path, 'later', changed)
    return map_check([tmp_path/'later_map.tif'], [tmp_path/'later.tif'], tmp_path/'baseline.json')

def read_rgb(path):
    with rasterio.open(path) as dataset:
        return dataset.read().transpose(1, 2, 0)

@pytest.mark.parametrize('band, name', list(enumerate('RGB')))
def test_a_shift_of_one_band_is_flagged_and_named(toy, tmp_path, band, name):
    "Imagery of another year (guide 4): one band of the later scene is 1.2 standard deviations higher"
    def higher(image):
        image[..., band] += 1.2 * image[..., band][image.any(2)].std()
        return image
    found = levels(altered(toy, tmp_path, higher), 'channel')
    assert found == {f'channel {other}': 'warning' if other == name else 'ok' for other in 'RGB'}

def test_less_contrast_is_flagged_by_quantiles(toy, tmp_path):
    "Haze: the same mean, a third of the spread"
    def hazy(image):
        middle = image[image.any(2)].mean(0)
        return middle + (image - middle) / 3
    found = altered(toy, tmp_path, hazy)
    assert 'warning' in levels(found, 'channel').values()
    assert any('quantile' in f.value for f in found.findings if f.level == 'warning')

def test_a_small_shift_of_one_band_is_no_alarm(toy, tmp_path):
    "A quarter of a standard deviation of blue raised false alarms in the field, held against curated tiles"
    def bluer(image):
        image[..., 2] += .256 * image[..., 2][image.any(2)].std()
        return image
    assert set(levels(altered(toy, tmp_path, bluer), 'channel').values()) == {'ok'}

def test_each_scene_of_a_kind_passes_against_the_others(toy, tmp_path):
    "Leave one out: no alarm about the input"
    names = [f's{seed}' for seed in range(5)]
    for name in names:
        scene_baseline(*pairs(toy, [other for other in names if other != name]), tmp_path/'baseline.json')
        images, maps = pairs(toy, [name])
        found = map_check(maps, images, tmp_path/'baseline.json')
        assert set(levels(found, 'channel').values()) == {'ok'}, name

def test_a_baseline_of_scenes_alone_checks_the_input(toy, tmp_path):
    images, maps = pairs(toy, ['s0', 's1'])
    scene_baseline(images, out=tmp_path/'baseline.json')
    found = map_check(maps[:1], images[:1], tmp_path/'baseline.json')
    assert set(levels(found, 'channel')) == {'channel R', 'channel G', 'channel B'}
    assert 'predicted share' not in levels(found)

def test_what_does_not_fit_a_baseline(toy, tmp_path):
    images, maps = pairs(toy, ['s0', 's1'])
    path = tmp_path/'baseline.json'
    baseline = scene_baseline(images, maps, path)
    assert json.loads(path.read_text()) == baseline
    for arguments in (dict(threshold=.3), dict(ratio='1:20')):
        with pytest.raises(DataError, match='threshold is 0.5, and 0.3'):
            map_check(maps[:1], images[:1], path, **arguments)
    other = {'format': 1, 'scenes': {'x.tif': baseline['scenes']['s0.tif'] | dict(channels={'NIR': {}})}}
    path.write_text(json.dumps(other))
    with pytest.raises(DataError, match='x.tif has the channels NIR'):
        map_check(maps[:1], images[:1], path)
    path.write_text('{"format": 2}')
    with pytest.raises(DataError, match='not a baseline of scenes'):
        map_check(maps[:1], images[:1], path)
    with pytest.raises(FileError, match='missing'):
        map_check(maps[:1], images[:1], tmp_path/'none.json')
    with pytest.raises(ConfigError, match='the same file name'):
        scene_baseline([images[0], images[0]], out=path)
    assert path.read_text() == '{"format": 2}'

def test_a_summary_of_a_scene_without_a_map(toy):
    found = input_summary(scene_statistics(toy/'s0.tif'))
    assert 'probability' not in found
    assert list(found['channels']) == ['R', 'G', 'B']
