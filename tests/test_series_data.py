"""Time series in zarr stores: what is wrong with them is named, statistics and patches are what plain arrays give"""
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

from rtsseg.config import Loader
from rtsseg.console import DataError
from rtsseg.season import SeasonWorld, draw_season_tile, make_season
from rtsseg.series import SeriesLayout, open_tile
from rtsseg.series_feed import (
    SeriesAugment,
    SeriesData,
    SeriesPatches,
    SeriesReader,
    SeriesTiles,
    patch_places,
    series_in_order,
    tile_blocks,
    train_series,
)
from rtsseg.series_stats import (
    SeriesStats,
    check_series,
    known_moments,
    series_class_weights,
    series_stats,
    survey_tiles,
    upload_with,
)
from rtsseg.stats import merge_moments

SPLITS = 'train', 'val', 'test'

@pytest.fixture(scope='module')
def season(tmp_path_factory):
    "A small season; tests read it, or change a copy"
    return make_season(tmp_path_factory.mktemp('season'), SeasonWorld(side=40, train=3, val=1, test=1, seed=4))

@pytest.fixture
def copied(season, tmp_path):
    "A copy of the season that a test may damage"
    return shutil.copytree(season, tmp_path/'season')

def data_of(root, **more):
    folders = {f'base_{split}_path': root/split for split in SPLITS}
    return SeriesData(**folders | dict(patch=16, statistics_on='cpu') | more)

def store(root, split, tile, name):
    return root/split/f'{tile}_{name}.zarr'

def rewritten(path, values, **attributes):
    "Another array at the place of a store"
    shutil.rmtree(path)
    array = zarr.create_array(path, shape=values.shape, dtype=values.dtype, fill_value=0, attributes=attributes)
    array[:] = values

def values_of(path):
    array = zarr.open(path, mode='r')
    return array[:], dict(array.attrs)

def problems_of(root, *also, **more):
    "What opening, and then reading, finds"
    data = data_of(root, **more)
    with pytest.raises(DataError) as caught:
        check_series(data.tiles(), 'cpu')
    return str(caught.value).splitlines()

def only_problem(root, *words, **more):
    "The one problem, which holds all of the words"
    line, = problems_of(root, **more)
    for word in words:
        assert word in line
    return line

# ---------------------------------------------------------------- bad input
def test_a_variable_that_is_missing(copied):
    shutil.rmtree(store(copied, 'train', 'train01', 'B08'))
    only_problem(copied, "tile 'train01'", 'B08', 'train01_B08.zarr does not exist')

def test_a_variable_with_a_wrong_name_has_a_hint(copied):
    lines = problems_of(copied, s1=['VV', 'HV'])
    assert len(lines) == 5 and all("HV" in line and "did you mean" in line for line in lines)

def test_a_label_that_is_missing(copied):
    shutil.rmtree(store(copied, 'val', 'val00', 'label'))
    only_problem(copied, "tile 'val00'", 'label', 'val00_label.zarr does not exist')

def test_a_grid_of_its_own(copied):
    path = store(copied, 'test', 'test00', 'VH')
    values, attributes = values_of(path)
    rewritten(path, values[:, :, :-1], **attributes)
    only_problem(copied, "tile 'test00'", 'VH', 'test00_VH.zarr', '40 × 39 pixels', '40 × 40')

def test_steps_that_differ_within_a_series(copied):
    path = store(copied, 'train', 'train00', 'B04')
    values, attributes = values_of(path)
    rewritten(path, values[:-1], dates=attributes['dates'][:-1])
    steps = len(values)
    only_problem(copied, "tile 'train00'", 'B04', f'{steps - 1} dates, and B02 has {steps}')

def test_dates_that_go_back(copied):
    path = store(copied, 'train', 'train02', 'VV')
    values, attributes = values_of(path)
    dates = attributes['dates']
    dates[3], dates[4] = dates[4], dates[3]
    for name in ('VV', 'VH', 'ANGLE'):
        path = store(copied, 'train', 'train02', name)
        rewritten(path, values_of(path)[0], dates=dates)
    lines = problems_of(copied)
    assert len(lines) == 3
    for line, name in zip(lines, ('VV', 'VH', 'ANGLE')):
        assert "tile 'train02'" in line and f'{name} (train02_{name}.zarr): dates go back at step 4' in line

def test_dates_that_differ_between_variables(copied):
    path = store(copied, 'train', 'train00', 'B11')
    values, attributes = values_of(path)
    rewritten(path, values, dates=['2021-01-01', *attributes['dates'][1:]])
    only_problem(copied, "tile 'train00'", 'B11', 'step 0 is of 2021-01-01')

def test_as_many_dates_as_steps(copied):
    path = store(copied, 'train', 'train00', 'B11')
    values, attributes = values_of(path)
    rewritten(path, values, dates=attributes['dates'][1:])
    only_problem(copied, 'B11', f'{len(values) - 1} dates for {len(values)} steps')

@pytest.mark.parametrize('dates', [['soon'] * 3, [1, 2, 3], 'x', None])
def test_dates_that_are_none(copied, dates):
    path = store(copied, 'train', 'train00', 'B11')
    rewritten(path, values_of(path)[0], dates=dates)
    only_problem(copied, "tile 'train00'", 'B11', 'dates')

def test_labels_that_are_no_class(copied):
    path = store(copied, 'train', 'train01', 'label')
    label = values_of(path)[0]
    label[2, 3], label[5, 5] = 6, 77
    rewritten(path, label)
    only_problem(copied, "tile 'train01'", 'train01_label.zarr', '6, 77 where 0 to 5, or 255 for ignore')

def test_labels_that_are_no_integers(copied):
    path = store(copied, 'train', 'train01', 'label')
    rewritten(path, values_of(path)[0].astype('float32'))
    only_problem(copied, "tile 'train01'", 'label', 'float32')

@pytest.mark.parametrize('fill', [-9999., np.nan])
def test_a_variable_of_nothing_but_fill(copied, fill):
    path = store(copied, 'val', 'val00', 'NDVI')
    values, attributes = values_of(path)
    rewritten(path, np.full_like(values, fill), **attributes)
    only_problem(copied, "tile 'val00'", 'NDVI (val00_NDVI.zarr): nothing but fill')

def test_infinite_values(copied):
    path = store(copied, 'val', 'val00', 'NDVI')
    values, attributes = values_of(path)
    values[0, 3, 3] = np.inf
    rewritten(path, values, **attributes)
    only_problem(copied, "tile 'val00'", 'NDVI (val00_NDVI.zarr): holds infinite values')

@pytest.mark.parametrize('content', [b'', b'{', b'[]', b'{"zarr_format": 3, "node_type": "array"}', b'\xff\xfe'])
def test_a_store_whose_metadata_is_damaged(copied, content):
    (store(copied, 'train', 'train01', 'VH')/'zarr.json').write_bytes(content)
    only_problem(copied, "tile 'train01'", 'VH', 'zarr')

def test_a_store_that_is_a_file(copied):
    path = store(copied, 'train', 'train01', 'VH')
    shutil.rmtree(path)
    path.write_bytes(b'not a store')
    only_problem(copied, "tile 'train01'", 'VH', 'not a zarr store that can be opened')

def test_a_chunk_that_is_damaged(copied):
    chunk = next(path for path in sorted(store(copied, 'train', 'train01', 'VH').rglob('c/*/*/*')) if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:100])
    only_problem(copied, "tile 'train01'", 'VH (train01_VH.zarr): cannot be read')

def test_values_that_are_texts(copied):
    path = store(copied, 'train', 'train01', 'DEM')
    shutil.rmtree(path)
    zarr.create_array(path, shape=(40, 40), dtype='complex64')
    only_problem(copied, "tile 'train01'", 'DEM', 'complex64')

def test_a_store_of_two_dimensions_for_a_series(copied):
    path = store(copied, 'train', 'train01', 'VV')
    rewritten(path, values_of(path)[0][0])
    only_problem(copied, "tile 'train01'", 'VV', 'dimensions')

def test_a_tile_that_does_not_exist(season):
    only_problem(season, "train_tiles: tile 'train07': no store in train", train_tiles=['train00', 'train07'])

def test_a_tile_in_two_splits(copied):
    for path in sorted((copied/'train').glob('train00_*')):
        shutil.copytree(path, copied/'val'/path.name)
    only_problem(copied, "tile 'train00': in train and in val: a tile belongs to one split")

def test_the_same_tile_under_two_names(copied):
    for path in sorted((copied/'train').glob('train00_*')):
        shutil.copytree(path, copied/'test'/path.name.replace('train00', 'other'))
    only_problem(copied, "tile 'other' in test has the same content as 'train00' in train")

def test_training_tiles_without_any_label(copied):
    for path in sorted((copied/'train').glob('*_label.zarr')):
        rewritten(path, np.full_like(values_of(path)[0], 255))
    only_problem(copied, 'no pixel of the training tiles has a class')

def test_a_folder_that_does_not_exist_or_holds_nothing(copied, tmp_path):
    (tmp_path/'empty').mkdir()
    lines = problems_of(copied, base_val_path=tmp_path/'none', base_test_path=tmp_path/'empty')
    assert len(lines) == 2 and 'no such folder' in lines[0] and 'no tile' in lines[1]

def test_all_problems_are_said_at_once(copied):
    shutil.rmtree(store(copied, 'train', 'train01', 'B08'))
    path = store(copied, 'val', 'val00', 'DEM')
    rewritten(path, values_of(path)[0][:30])
    lines = problems_of(copied, test_tiles=['test05'])
    assert len(lines) == 3
    for line, words in zip(lines, ("tile 'train01', B08", "tile 'val00', DEM", "tile 'test05'")):
        assert words in line

def test_names_are_given_once():
    for field in ('s1', 's2', 'static', 'train_tiles', 'class_names'):
        with pytest.raises(ValueError, match='named twice'):
            SeriesData(**{field: ['a', 'b', 'a']})

def test_one_series_may_be_empty_and_both_not():
    assert SeriesData(s1=[]).layout.s1 == ()
    with pytest.raises(ValueError, match='both empty'):
        SeriesData(s1=[], s2=[])

def test_a_constant_variable_has_no_scale(copied):
    for tile in ('train00', 'train01', 'train02'):
        path = store(copied, 'train', tile, 'ANGLE')
        values, attributes = values_of(path)
        rewritten(path, np.full_like(values, 38.), **attributes)
    tiles = data_of(copied).tiles()
    with pytest.raises(DataError, match='ANGLE: .*the variable is constant'):
        series_stats(tiles, survey_tiles(tiles, 'cpu'))

class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)

@pytest.mark.parametrize('dtype', ['<f4', '|O'])
@pytest.mark.parametrize('place', ['compressor', 'filters'])
def test_a_pickle_is_not_read(copied, tmp_path, place, dtype):
    path, sign = store(copied, 'train', 'train01', 'DEM'), tmp_path/'sign'
    shutil.rmtree(path)
    path.mkdir()
    metadata = dict(zarr_format=2, shape=[40, 40], chunks=[40, 40], dtype=dtype, order='C', fill_value=0, filters=None,
                    compressor=None)
    metadata[place] = dict(id='pickle') if place == 'compressor' else [dict(id='pickle')]
    (path/'.zarray').write_text(json.dumps(metadata))
    (path/'0.0').write_bytes(pickle.dumps(Canary(sign)))
    only_problem(copied, "tile 'train01'", 'DEM')
    assert not sign.exists()
    # unpacked, it would run
    pickle.loads((path/'0.0').read_bytes())
    assert sign.exists()

def test_without_zarr_the_extra_is_named(season):
    code = ("import sys; sys.modules['zarr'] = None\n"
            'from pathlib import Path\n'
            'from rtsseg.series_feed import SeriesData\n'
            'data = SeriesData(**{f"base_{s}_path": Path(sys.argv[1])/s for s in ("train", "val", "test")})\n'
            'try:\n    data.tiles()\nexcept Exception as e:\n    print(e)')
    done = subprocess.run([sys.executable, '-c', code, str(season)], capture_output=True, text=True)
    assert "pip install 'rtsseg[series]'" in done.stdout, done.stderr

# ---------------------------------------------------------------- forms of stores
def test_both_versions_hold_the_same(tmp_path):
    worlds = [make_season(tmp_path/f'v{version}', SeasonWorld(side=24, train=2, val=1, test=1, zarr_format=version))
              for version in (2, 3)]
    old, new = (data_of(root).tiles() for root in worlds)
    assert [one.name for one in old] == [one.name for one in new]
    for ours, theirs in zip(old, new):
        everywhere = slice(None), slice(None)
        for stream in ('s1', 's2', 'static'):
            assert np.array_equal(ours.read(getattr(ours, stream), *everywhere),
                                  theirs.read(getattr(theirs, stream), *everywhere))
        assert np.array_equal(ours.read_label(), theirs.read_label())
        assert all(np.array_equal(a, b) for a, b in zip(ours.days, theirs.days))

def test_dates_beside_the_stores(copied):
    for name in ('VV', 'VH', 'ANGLE'):
        path = store(copied, 'train', 'train00', name)
        values, attributes = values_of(path)
        rewritten(path, values)
        days = (np.array(attributes['dates'], 'datetime64[D]') - np.datetime64('2021-01-01')).astype('int64')
        beside = zarr.create_array(copied/'train'/f'train00_{name}_time.zarr', shape=days.shape, dtype=days.dtype,
                                   attributes=dict(units='days since 2021-01-01 00:00:00'))
        beside[:] = days
    tile = data_of(copied).tiles()[0]
    assert np.array_equal(tile.days[0], days)

def test_series_without_dates_count_their_steps(copied):
    for name in ('VV', 'VH', 'ANGLE'):
        path = store(copied, 'train', 'train00', name)
        rewritten(path, values_of(path)[0])
    tile = data_of(copied).tiles()[0]
    assert np.array_equal(tile.days[0], np.arange(tile.steps[0]))
    # the other series still has dates
    assert tile.days[1][-1] > 200

def test_a_store_as_xarray_writes_it(copied):
    "A group with the array, its coordinates and their names"
    path = store(copied, 'train', 'train00', 'VV')
    values, attributes = values_of(path)
    before = data_of(copied).tiles()[0]
    shutil.rmtree(path)
    group = zarr.open_group(path, mode='w', zarr_format=2)
    days = before.days[0].astype('int64')
    group.create_array('VV', data=values, attributes=dict(_ARRAY_DIMENSIONS=['time', 'y', 'x']))
    group.create_array('time', data=days, attributes=dict(_ARRAY_DIMENSIONS=['time'], units='days since 2021-01-01'))
    for name in ('y', 'x'):
        group.create_array(name, data=np.arange(40.), attributes=dict(_ARRAY_DIMENSIONS=[name]))
    after = data_of(copied).tiles()[0]
    assert np.array_equal(after.days[0], before.days[0])
    assert np.array_equal(after.read(after.s1, slice(2, 9), slice(3, 5))[0], values[:, 2:9, 3:5])

def test_axes_in_any_order(copied):
    "Named dimensions decide"
    path = store(copied, 'train', 'train00', 'B08')
    values, attributes = values_of(path)
    shutil.rmtree(path)
    zarr.create_array(path, data=values.transpose(2, 0, 1).copy(), dimension_names=['x', 'time', 'y'],
                      attributes=attributes)
    tile = data_of(copied).tiles()[0]
    assert np.array_equal(tile.read(tile.s2, slice(1, 7), slice(20, 33))[3], values[:, 1:7, 20:33])

@pytest.mark.real
def test_a_cube_of_both_sensors(data_dir):
    folder = data_dir/'timeseries_zarr'
    layout = SeriesLayout(('VV', 'VH'), ('B2', 'B4', 'B8'), ('elevation',), 2, dims=('time', 'band', 'y', 'x'))
    tile = open_tile(folder, 'togo_s1_s2_era5', 'train', layout, is_labelled=False)
    cube = zarr.open(folder/'togo_s1_s2_era5.zarr', mode='r')
    assert (tile.steps, tile.grid) == ((12, 12), (17, 17))
    part = slice(2, 9), slice(0, 4)
    assert np.array_equal(tile.read(tile.s2, *part), cube['s2'][:, [1, 3, 7], *part].transpose(1, 0, 2, 3))
    assert np.array_equal(tile.read(tile.static, *part)[0, 0], cube['static'][0, *part])

@pytest.mark.real
def test_a_cube_with_dates_and_labels(data_dir):
    layout = SeriesLayout(('NDVI',), ('NDVI', 'cloud_probability'), ('dem',), 10, dims=('time', 'band', 'y', 'x'))
    tile = open_tile(data_dir/'timeseries_zarr', 'eolearn_s2_derived', 'train', layout)
    assert (tile.steps, tile.grid) == ((68, 68), (101, 100))
    assert (np.diff(tile.days[0]) >= 0).all()
    # the first picture is of 11 July 2015, the last of 22 December 2017
    assert (int(tile.days[0][0]), int(tile.days[0][-1])) == (191, 365 + 366 + 355)
    assert set(np.unique(tile.read_label())) <= set(range(10))

# ---------------------------------------------------------------- statistics
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=40), st.integers(0, 39), st.floats(-1e7, 1e7))
def test_parts_merge_to_the_whole(values, cut, offset):
    values = np.array(values) + offset
    values = np.r_[values, -9999., np.nan]
    kept = values[np.isfinite(values) & (values != -9999.)]
    merged = merge_moments(known_moments(values[:cut], -9999.), known_moments(values[cut:], -9999.))
    assert merged.n == len(kept)
    if len(kept):
        spread = max(np.abs(kept).max(), 1.)
        assert abs(merged.mean - kept.mean()) <= 1e-12 * spread
        assert abs(merged.std - kept.std()) <= 1e-7 * spread

def test_the_device_does_not_matter(season):
    tiles = data_of(season).tiles()
    by_numpy, by_torch = (series_stats(tiles, survey_tiles(tiles, device)) for device in ('cpu', 'torch'))
    assert by_numpy.values == by_torch.values
    np.testing.assert_allclose(by_numpy.mean, by_torch.mean, rtol=1e-6)
    np.testing.assert_allclose(by_numpy.std, by_torch.std, rtol=1e-6)

@pytest.mark.gpu
def test_a_gpu_gives_the_same_statistics(season):
    if not torch.cuda.is_available():
        pytest.skip('no GPU')
    assert upload_with('torch')(np.ones(2, np.float32)).is_cuda
    tiles = data_of(season).tiles()
    found = {device: series_stats(tiles, survey_tiles(tiles, device)) for device in ('cpu', 'torch', 'auto')}
    for device in ('torch', 'auto'):
        np.testing.assert_allclose(found[device].mean, found['cpu'].mean, rtol=1e-6)
        np.testing.assert_allclose(found[device].std, found['cpu'].std, rtol=1e-6)

def test_cupy_is_named_where_it_is_missing():
    pytest.importorskip('torch')
    try:
        import cupy
        pytest.skip(f'cupy {cupy.__version__} is here')
    except ImportError:
        pass
    with pytest.raises(DataError, match=r"rtsseg\[cupy\]"):
        upload_with('cupy')

def test_statistics_come_from_the_training_tiles_alone(copied):
    before = series_stats(data_of(copied).tiles(), survey_tiles(data_of(copied).tiles(), 'cpu'))
    for split, tile in (('val', 'val00'), ('test', 'test00')):
        path = store(copied, split, tile, 'B08')
        values, attributes = values_of(path)
        rewritten(path, np.where(values == -9999, values, 5 * values), **attributes)
    tiles = data_of(copied).tiles()
    after = series_stats(tiles, survey_tiles(tiles, 'cpu'))
    assert after.to_json() == before.to_json()

def test_what_is_saved_is_what_is_read(season, tmp_path):
    tiles = data_of(season).tiles()
    stats = series_stats(tiles, survey_tiles(tiles, 'cpu'))
    path = stats.save(tmp_path/'normalization_stats.json')
    assert SeriesStats.read(path) == stats
    tree = json.loads(path.read_text())
    for wrong in (tree | dict(more=1), {k: v for k, v in tree.items() if k != 'std'}, tree | dict(std=tree['std'][1:]),
                  tree | dict(std=[0.] * len(tree['std'])), tree | dict(mean='x')):
        path.write_text(json.dumps(wrong))
        with pytest.raises(DataError, match='normalization_stats.json'):
            SeriesStats.read(path)

@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=8).filter(any))
def test_weights_fall_with_the_number_of_pixels(counts):
    counts = np.array(counts)
    assert (series_class_weights(counts, 'none') == 1).all()
    for kind in ('inverse', 'effective'):
        weights = series_class_weights(counts, kind)
        occurs = counts > 0
        assert np.isclose(weights[occurs].mean(), 1) and (weights > 0).all()
        order = np.argsort(counts[occurs], kind='stable')
        assert (np.diff(weights[occurs][order]) <= 1e-9).all()
        assert (weights[~occurs] == weights[occurs].max()).all()

# ---------------------------------------------------------------- batches
@pytest.fixture(scope='module')
def parts(season):
    data = data_of(season)
    tiles = data.tiles()
    return data, tiles, series_stats(tiles, survey_tiles(tiles, 'cpu'))

def patches_of(parts, budget_mb=100, split='train', augment=None, **more):
    data, tiles, stats = parts
    data = data.model_copy(update=more)
    return SeriesPatches(SeriesReader(tiles, stats, budget_mb), split, data, augment or SeriesAugment())

def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        for name, value in first.items())

def test_the_budget_changes_no_bit(parts):
    data, tiles, _ = parts
    kept, mixed, read = (patches_of(parts, budget) for budget in (100, 3, 0))
    for row in range(len(kept)):
        for key in (row, (42, 3, row, 1)):
            assert same(kept[key], read[key]) and same(kept[key], mixed[key])
    assert len(kept.reader.kept) == 3 and not read.reader.kept
    assert len(mixed.reader.kept) in (1, 2)
    held = sum(array.nbytes for part in mixed.reader.kept.values() for array in part)
    assert held <= 3 * 2**20

def test_a_sample_is_the_stores_scaled(parts, season):
    data, tiles, stats = parts
    patches = patches_of(parts)
    row = 4
    number, top, left = patches.places[row]
    name, sample = tiles[number].name, patches[row]
    where = slice(None), slice(top, top + 16), slice(left, left + 16)
    for stream, variables in (('s1', data.s1), ('s2', data.s2)):
        arrays = [values_of(store(season, 'train', name, one))[0][where] for one in variables]
        steps = len(arrays[0])
        seen = np.any([array != -9999 for array in arrays], 0)
        assert np.array_equal(sample[f'valid{stream[1]}'][:steps], seen)
        assert sample[f'present{stream[1]}'].sum() == steps
        for plane, raw, one in zip(sample[stream].numpy(), arrays, variables):
            mean, std = stats.of(one)
            expected = np.where(raw == -9999, 0, (raw - mean) / std)
            np.testing.assert_allclose(plane[:steps], expected, atol=2e-5)
            assert not plane[steps:].any()
    label = values_of(store(season, 'train', name, 'label'))[0][where[1:]]
    assert np.array_equal(sample['target'], label)

def test_a_key_decides_a_draw(parts):
    patches = patches_of(parts)
    assert same(patches[(1, 2, 3, 0)], patches[(1, 2, 3, 0)])
    others = [patches[key] for key in ((1, 2, 3, 1), (1, 3, 3, 0), (2, 2, 3, 0))]
    assert not any(same(patches[(1, 2, 3, 0)], other) for other in others)
    still = patches_of(parts, augment=SeriesAugment(enabled=False))
    assert same(still[(1, 2, 3, 0)], still[3])

def test_a_draw_changes_all_planes_alike(parts):
    "A plane that holds the number of each pixel shows where it went"
    patches = patches_of(parts)
    data, tiles, stats = parts
    numbers = np.arange(40 * 40, dtype=np.float32).reshape(40, 40)
    part = patches.reader.part(0, slice(0, 40), slice(0, 40))
    for array in (part.s1, part.s2, part.static):
        array[:] = numbers
    part.target[:] = numbers.astype(np.uint8)
    for occurrence in range(12):
        sample = patches[(7, 1, 0, occurrence)]
        plane = sample['static'][0]
        for series, present in ((sample['s1'], sample['present1']), (sample['s2'], sample['present2'])):
            assert (series[:, present] == plane).all()
        assert torch.equal(sample['target'], plane.to(torch.uint8).long() if plane.max() < 256 else
                           torch.from_numpy(plane.numpy().astype(np.int64).astype(np.uint8).astype(np.int64)))
        top, left = sample['corner'].tolist()
        assert plane.min() == numbers[top, left] and len(plane.unique()) == 16 * 16

def test_shifts_stay_near_and_inside(parts):
    patches = patches_of(parts, overlap=0.)
    distance = np.diff(patch_places(40, 16, 0.)).max() // 2
    corners = {}
    for row, (_, top, left) in enumerate(patches.places):
        for occurrence in range(20):
            (y, x), _ = patches.drawn((5, 1, row, occurrence))
            assert abs(y - top) <= distance and abs(x - left) <= distance
            assert 0 <= y <= 24 and 0 <= x <= 24
            corners[y, x] = True
    assert len(corners) > 100

def test_workers_change_no_bit(parts):
    data, tiles, stats = parts
    batches = []
    for workers in (0, 2):
        reader = SeriesReader(tiles, stats, budget_mb=3)
        loader = train_series(reader, data, SeriesAugment(), Loader(num_workers=workers), 5, seed=3)
        loader.batch_sampler.set_epoch(2)
        batches.append(list(loader))
    assert len(batches[0]) == len(batches[1]) > 3
    for first, second in zip(*batches):
        assert same(first, second)

def test_an_epoch_holds_each_patch_once(parts):
    data, tiles, stats = parts
    loader = train_series(SeriesReader(tiles, stats, 100), data, SeriesAugment(), Loader(num_workers=0), 1, seed=3)
    orders = []
    for epoch in (1, 2):
        loader.batch_sampler.set_epoch(epoch)
        orders.append([name for batch in loader for name in batch['sample']])
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(loader.dataset.names)
    assert orders[0] != orders[1]

def test_too_few_patches_for_a_batch(parts):
    data, tiles, stats = parts
    with pytest.raises(DataError, match='make no batch of 1000'):
        train_series(SeriesReader(tiles, stats, 100), data, SeriesAugment(), Loader(num_workers=0), 1000, seed=3)

def test_patches_without_a_label_are_left_out(copied):
    path = store(copied, 'train', 'train00', 'label')
    label = np.full_like(values_of(path)[0], 255)
    label[3, 3] = 1
    rewritten(path, label)
    data = data_of(copied, overlap=0.)
    tiles = data.tiles()
    stats = series_stats(tiles, survey_tiles(tiles, 'cpu'))
    patches = SeriesPatches(SeriesReader(tiles, stats, 0), 'train', data, SeriesAugment())
    assert [place[1:] for place in patches.places if place[0] == 0] == [(0, 0)]

def test_a_label_of_nodata_is_unknown(copied):
    path = store(copied, 'train', 'train00', 'label')
    label = values_of(path)[0].astype(np.int16)
    label[:5] = -9999
    rewritten(path, label)
    tile = data_of(copied).tiles()[0]
    assert (tile.read_label()[:5] == 255).all()

def test_a_tile_that_is_smaller_than_a_patch(parts):
    patches = patches_of(parts, patch=64)
    sample, drawn = patches[0], patches[(1, 1, 0, 0)]
    assert sample['s1'].shape[-2:] == (64, 64)
    assert (sample['target'][40:] == 255).all() and (sample['target'][:, 40:] == 255).all()
    assert not sample['valid2'][:, 40:].any() and not sample['s2'][..., 40:].any()
    assert (sample['target'] != 255).sum() == (drawn['target'] != 255).sum()

@pytest.mark.parametrize('empty', ['s1', 's2', 'static'])
def test_variables_of_one_kind_may_be_left_out(parts, season, empty):
    "The others are as they were"
    data = data_of(season, **{empty: []})
    tiles = data.tiles()
    stats = series_stats(tiles, survey_tiles(tiles, 'cpu'))
    patches, whole = patches_of((data, tiles, stats)), patches_of(parts)
    for key in (2, (1, 1, 2, 0)):
        sample, expected = patches[key], whole[key]
        for name, value in sample.items():
            if name in ('row', 'sample', 'tile', 'group') or name[-1] != empty[-1]:
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected[name])) if not isinstance(
                    value, str) else value == expected[name]
        assert sample[empty].numel() == 0 and sample[empty].shape[-2:] == (16, 16)
    if empty != 'static':
        number = empty[1]
        assert sample[f'present{number}'].shape == (0,) and sample[f'day{number}'].shape == (0,)
        assert sample[empty].shape == (0, 0, 16, 16) and sample[f'valid{number}'].shape == (0, 16, 16)
    batch = next(iter(series_in_order(patches.reader, data, 'val', Loader(num_workers=0))))
    assert batch[empty].numel() == 0 and len(batch[empty]) == len(batch['corner'])

def test_an_unreadable_patch_is_noted(copied):
    data = data_of(copied)
    tiles = data.tiles()
    stats = series_stats(tiles, survey_tiles(tiles, 'cpu'))
    for split in ('train', 'val'):
        for chunk in store(copied, split, f'{split}00', 'VH').rglob('c/*/*/*'):
            chunk.write_bytes(b'damaged')
    patches = SeriesPatches(SeriesReader(tiles, stats, 0), 'train', data, SeriesAugment())
    blocks = SeriesTiles(SeriesReader(tiles, stats, 0), 'val', data)
    sample = patches[0]
    assert (sample['target'] == 255).all() and not sample['valid1'].any() and not sample['s2'].any()
    assert patches.unread[0] and not patches.unread[1:].any()
    assert "tile 'train00', VH (train00_VH.zarr): cannot be read" in patches.problem(0)
    batch = blocks[0]
    assert (batch['whole'] == 255).all() and blocks.unread[0] and 'val00_VH.zarr' in blocks.problem(0)
    assert patches[(1, 1, 0, 0)]['s1'].shape == patches[len(patches) - 1]['s1'].shape

# ---------------------------------------------------------------- whole tiles
@given(st.integers(1, 200), st.integers(1, 64), st.floats(0, .9))
def test_places_cover_an_axis(length, side, overlap):
    places = patch_places(length, side, overlap)
    assert places == sorted(set(places)) and places[0] == 0 and places[-1] == max(length - side, 0)
    assert all(step <= max(round(side * (1 - overlap)), 1) for step in np.diff(places))

@given(st.tuples(st.integers(1, 90), st.integers(1, 90)), st.integers(4, 40), st.floats(0, .8), st.integers(1, 9))
def test_blocks_cover_a_tile_once(grid, side, overlap, most):
    count = np.zeros(grid, int)
    for block in tile_blocks(0, grid, side, overlap, most):
        count[slice(*block.rows), slice(*block.columns)] += 1
        covered = np.zeros(grid, bool)
        for top, left in block.windows:
            covered[top:top + side, left:left + side] = True
        assert covered[slice(*block.rows), slice(*block.columns)].all()
    assert (count == 1).all()

def test_blocks_give_what_a_whole_tile_gives(parts):
    "Blended scores of any function of the windows, whatever the budget"
    data, tiles, stats = parts
    found = {}
    for budget in (0, 2, 100):
        small = data.model_copy(update=dict(budget_mb=budget))
        total = np.zeros((2, 40, 40))
        for batch in series_in_order(SeriesReader(tiles, stats, budget), small, 'val', Loader(num_workers=0)):
            scores = (batch['s2'].sum((1, 2)) + batch['static'].sum(1)).numpy()
            (height, width), (y, x) = batch['whole'].shape, batch['place'].tolist()
            own = np.zeros((2, 40, 40))
            for score, (top, left) in zip(scores, batch['corner'].tolist()):
                own[0, top:top + 16, left:left + 16] += score
                own[1, top:top + 16, left:left + 16] += 1
            total[:, y:y + height, x:x + width] += own[:, y:y + height, x:x + width]
            assert np.array_equal(batch['whole'], tiles[3].read_label(slice(y, y + height), slice(x, x + width)))
            assert batch['tile'] == ['val00'] and len(batch['s1']) == len(batch['corner'])
        found[budget] = total
    assert np.array_equal(found[0], found[100]) and np.array_equal(found[2], found[100])

# ---------------------------------------------------------------- the made-up season
def test_the_season_is_a_function_of_its_seed(tmp_path):
    small = SeasonWorld(side=16, train=1, val=1, test=1)
    worlds = [make_season(tmp_path/name, small.model_copy(update=dict(seed=seed)))
              for name, seed in (('a', 1), ('b', 1), ('c', 2))]
    first, again, other = ([tile.digest for tile in data_of(root).tiles()] for root in worlds)
    assert first == again and len(set(first) | set(other)) == 6

def test_a_season_that_was_cut_short_is_made_whole(tmp_path):
    small = SeasonWorld(side=16, train=2, val=1, test=1)
    whole = make_season(tmp_path/'whole', small)
    shutil.copytree(whole/'test', tmp_path/'cut'/'test')
    shutil.copytree(whole/'val', tmp_path/'cut'/'.val.part')
    shutil.rmtree(tmp_path/'cut'/'.val.part'/'val00_VV.zarr')
    cut = make_season(tmp_path/'cut', small)
    found, expected = ([tile.digest for tile in data_of(root).tiles()] for root in (cut, whole))
    assert found == expected
    assert not (cut/'.val.part').exists()

def test_tiles_differ_in_length_and_have_gaps():
    tiles = [draw_season_tile(SeasonWorld(side=16), np.random.default_rng((3, k))) for k in range(12)]
    assert len({len(tile.dates1) for tile in tiles}) > 3 and len({len(tile.dates2) for tile in tiles}) > 3
    ratios = []
    for tile in tiles:
        steps = np.diff(tile.dates2).astype(int)
        assert (steps > 0).all()
        ratios.append(steps.max() / np.median(steps))
    # most have a gap of more than twice the usual distance, which differs
    assert np.median(ratios) > 2 and np.std(ratios) > .3
