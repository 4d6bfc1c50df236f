"""Manifests, splits, statistics and importers across files and formats. Wrong ones are in faults/test_manifest.py,
test_rasters.py and test_masks.py"""
import itertools
import json
import re
import shutil

import cv2
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyproj import Geod, Transformer
from rasterio.transform import Affine

from helpers.tiles import findings, rewrite, set_cells, write_extra, write_tile
from rtsseg.audit import audit
from rtsseg.cli import main
from rtsseg.columns import COLUMNS, NO_REGION, complete_table
from rtsseg.config import RtsConfig, TableSource, hashed_settings
from rtsseg.console import DataError
from rtsseg.filecheck import balanced_correlation
from rtsseg.findings import has_errors
from rtsseg.ground import BOX, grid_blocks, overlaps
from rtsseg.importers import import_table
from rtsseg.manifest import FORMATS, Manifest, read_manifest, write_manifest
from rtsseg.raster import write_raster
from rtsseg.rawtile import ImageCache, shrink
from rtsseg.runs import config_hash
from rtsseg.splits import deal_splits, make_splits, thin_splits
from rtsseg.stats import Stats, code_values, compute_stats, merge_moments, moments, ordered_codes
from rtsseg.tiles import neighbours, read_coarse, read_tile

quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

def cells(array):
    "… × H // 2 × 2 × W // 2 × 2 …: the four pixels under each pixel of a coarser array"
    height, width = array.shape[:2]
    return array.reshape(height // 2, 2, width // 2, 2, *array.shape[2:])

# --- manifests ---

WORDS = st.text(st.characters(codec='utf-8', exclude_categories=('C', 'Z')), min_size=1, max_size=8)
NUMBER = st.floats(-1e7, 1e7, allow_nan=False)

@st.composite
def manifest_rows(draw):
    "A row of a manifest, with or without a place on the map"
    row = dict(tile_id=draw(WORDS), split=draw(st.sampled_from(['train', 'val', 'test', 'buffer'])), region=draw(WORDS),
               block=draw(WORDS), n_positive=draw(st.integers(0, 2**28)), mask='0.tif')
    crs = draw(st.sampled_from(['EPSG:3413', 'EPSG:32610', 'none']))
    if crs == 'none':
        return row | dict.fromkeys([*BOX, 'pixel_size'], np.nan) | dict(crs=crs)
    x, y, width = draw(NUMBER), draw(NUMBER), draw(st.floats(1, 1e4))
    box = dict(xmin=x, ymin=y, xmax=x + width, ymax=y + width)
    return row | box | dict(crs=crs, pixel_size=draw(st.floats(.1, 100)))

@quick
@given(rows=st.lists(manifest_rows(), min_size=1, max_size=6, unique_by=lambda row: row['tile_id']),
       seed=st.integers(0, 99))
def test_manifest_survives_every_format(tmp_path_factory, rows, seed):
    folder = tmp_path_factory.mktemp('m')
    for i in range(6):
        (folder/f'{i}.tif').write_text('')
    table = pd.DataFrame([row | dict(image=f'{i}.tif') for i, row in enumerate(rows)])
    expected = complete_table(table, folder)
    for suffix in ('csv', 'parquet', 'geoparquet', 'gpkg'):
        shuffled = expected.sample(frac=1, random_state=seed)
        got = read_manifest(write_manifest(shuffled, folder/f'm.{suffix}'))
        pd.testing.assert_frame_equal(got.table[COLUMNS], expected[COLUMNS])
        assert got.hash == Manifest(expected, folder, folder).hash
    changed = expected.copy()
    changed.loc[0, 'n_positive'] += 1
    assert Manifest(changed, folder, folder).hash != got.hash

def test_geometry_alone_is_a_footprint(world):
    full = read_manifest(world/'m.csv')
    write_manifest(full, world/'m.gpkg')
    computed = [*BOX, 'crs', 'pixel_size', 'block']
    gpd.read_file(world/'m.gpkg').drop(columns=computed).to_file(world/'bare.gpkg', driver='GPKG')
    assert read_manifest(world/'bare.gpkg').hash == full.hash

def test_manifest_is_computed_not_written(world):
    before = (world/'m.csv').read_bytes()
    manifest = read_manifest(world/'m.csv')
    assert (world/'m.csv').read_bytes() == before
    assert (manifest.table.n_positive == 36).all()
    assert manifest.of('val').table.tile_id.tolist() == ['t2', 't3']
    shutil.copytree(world, world/'moved')
    assert read_manifest(world/'moved'/'m.csv').hash == manifest.hash

@pytest.mark.parametrize('dtype', ['uint8', 'uint16'])
def test_clipped_statistics_equal_numpy(tmp_path, dtype):
    "Outliers count as the percentile; RGB exactly, EXTRA to a hundredth of the value"
    rng = np.random.default_rng(0)
    place, planes, extras, rows = Affine(3, 0, 0, 0, -3, 0), [], [], []
    for k in range(3):
        plane = rng.integers(60, 90, (3, 32, 32)).astype(dtype)
        plane[:, :2, :4] = 255
        extra = rng.normal(-5, 2, (1, 32, 32)).astype('float32')
        extra[:, :1, :3] = 1e6
        write_raster(tmp_path/f'{k}.tif', plane, place, 'EPSG:3413')
        write_raster(tmp_path/f'{k}_e.tif', extra, place, 'EPSG:3413', names=['ndvi'])
        rows.append(dict(tile_id=str(k), image=f'{k}.tif', mask='', extra=f'{k}_e.tif', region='r', split='train'))
        planes, extras = [*planes, plane.reshape(3, -1)], [*extras, extra.reshape(1, -1)]
    pd.DataFrame(rows).to_csv(tmp_path/'m.csv', index=False)
    manifest = read_manifest(tmp_path/'m.csv').of('train')
    values = np.concatenate([np.concatenate(planes, 1), np.concatenate(extras, 1)]).astype('float64')
    low, high = np.percentile(values, [1, 99], axis=1, method='inverted_cdf')
    want = np.clip(values, low[:, None], high[:, None])
    plain, clipped = (compute_stats(manifest, ['ndvi'], clip) for clip in (None, (1, 99)))
    divisor = np.array([clipped.scale] * 3 + [1])
    np.testing.assert_allclose(np.array(clipped.mean) * divisor, want.mean(1), rtol=.01)
    np.testing.assert_allclose(np.array(clipped.std) * divisor, want.std(1), rtol=.01)
    np.testing.assert_allclose(np.array(clipped.mean[:3]) * clipped.scale, want.mean(1)[:3], rtol=1e-6)
    np.testing.assert_allclose(np.array(clipped.std[:3]) * clipped.scale, want.std(1)[:3], rtol=1e-6)
    assert plain.std[3] > 1e4 > 10 > clipped.std[3]
    assert (plain.clip_percentiles, clipped.clip_percentiles) == ([], [1, 99])

@quick
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
def test_codes_keep_the_order_of_floats(values):
    "A larger value has no smaller code, and a code stands for the value to a hundredth"
    values = np.sort(np.array(values, 'float32'))
    codes = ordered_codes(values)
    assert (np.diff(codes) >= 0).all()
    np.testing.assert_allclose(code_values('float32')[codes], values, rtol=.01, atol=1e-38)

def test_version_and_clipping_are_settings(tiny_world):
    "At their defaults they leave hash and file of older runs; each makes another run"
    def cfg(**data):
        return RtsConfig(data=dict(manifest=tiny_world, **data))
    hashes = {config_hash(cfg(**data)) for data in ({}, dict(version='2.0'), dict(clip_percentiles=[1, 99]))}
    assert len(hashes) == 3
    settings = hashed_settings(cfg())['data']
    assert not {'version', 'clip_percentiles', 'root'} & set(settings)
    for wrong in ([99, 1], [1, 1], [-1, 99], [1, 101], [1]):
        with pytest.raises(ValueError, match='clip_percentiles'):
            cfg(clip_percentiles=wrong)

@pytest.mark.parametrize('box, crs, message', [
    ((1e12, 1e12, 1e12 + 1, 1e12 + 1), 'EPSG:32610', 'outside of its CRS'),
    ((0, 0, 0, 1), 'EPSG:3413', 'not a footprint'),
    ((0, 0, 1, 'inf'), 'EPSG:3413', 'not a footprint'),
    ((0, 0, 1, 'a'), 'EPSG:3413', "'a' is not a number"),
    ((0, 0, 1, 1), 'EPSG:99999', 'not a coordinate reference system')])
def test_impossible_footprints(world, box, crs, message):
    table = pd.read_csv(world/'m.csv').assign(**dict(zip(BOX, box)), crs=crs, pixel_size=3)
    table.to_csv(world/'m.csv', index=False)
    with pytest.raises(DataError, match=message):
        read_manifest(world/'m.csv')

# --- geometry, blocks, splits ---

BOXES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 12), st.integers(1, 12)),
                 min_size=1, max_size=30)

def shared_length(start, length):
    "Length that each pair of intervals has in common"
    end = start + length
    return np.minimum.outer(end, end) - np.maximum.outer(start, start)

@quick
@given(boxes=BOXES, crs=st.sampled_from(['EPSG:3413', 'EPSG:32610']))
def test_overlaps_equal_brute_force(boxes, crs):
    x, y, width, height = 1000. * np.array(boxes).T
    table = pd.DataFrame({'tile_id': range(len(x)), 'xmin': x, 'ymin': y, 'xmax': x + width, 'ymax': y + height,
                          'crs': crs})
    shared = (shared_length(x, width) > 0) & (shared_length(y, height) > 0)
    brute = np.argwhere(np.triu(shared, 1))
    assert sorted(overlaps(table).tolist()) == brute.tolist()

def one_tile(name, box, crs):
    return dict(tile_id=name, **dict(zip(BOX, box)), crs=crs)

def test_overlap_at_the_date_line_and_across_projections():
    east = one_tile('a', (179.99, 70., 180.01, 70.01), 'EPSG:4326')
    west = one_tile('b', (-180.01, 70., -179.99, 70.01), 'EPSG:4326')
    apart = one_tile('c', (-179.98, 70., -179.97, 70.01), 'EPSG:4326')
    assert overlaps(pd.DataFrame([east, west, apart])).tolist() == [[0, 1]]
    x, y = Transformer.from_crs('EPSG:4326', 'EPSG:3413', always_xy=True).transform(180., 70.005)
    polar = one_tile('d', (x - 50, y - 50, x + 50, y + 50), 'EPSG:3413')
    assert overlaps(pd.DataFrame([east, polar, apart])).tolist() == [[0, 1]]

def grid(columns, rows, step, share, seed):
    "A table of tiles of 1 km in steps of 500 m (they overlap) or 1 km; `share` of them are positive"
    rng = np.random.default_rng(seed)
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(columns) * step, np.arange(rows) * step))
    n_positive = rng.poisson(100, x.size) * (rng.random(x.size) < share)
    table = pd.DataFrame({'tile_id': [f'{i:04d}' for i in range(x.size)], 'xmin': x, 'ymin': y, 'xmax': x + 1000,
                          'ymax': y + 1000, 'crs': 'EPSG:3413', 'pixel_size': 3.,
                          'region': np.where(x < 3000, 'west', 'east'), 'n_positive': n_positive})
    return table.assign(block=grid_blocks(table, 2000.))

@quick
@given(columns=st.integers(2, 12), rows=st.integers(2, 12), step=st.sampled_from([500., 1000.]), share=st.floats(0, 1),
       seed=st.integers(0, 10**6))
def test_splits_keep_blocks_whole_and_apart(columns, rows, step, share, seed):
    table = grid(columns, rows, step, share, seed)
    dealt = deal_splits(table, seed=seed)
    used = dealt[dealt.split != 'buffer']
    assert used.groupby('block').split.nunique().max() == 1
    split, pairs = used.split.to_numpy(), overlaps(used)
    assert (split[pairs[:, 0]] == split[pairs[:, 1]]).all()
    shuffled = table.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(deal_splits(shuffled, seed=seed), dealt)
    # tiles that do not overlap are all kept
    if step == 1000.:
        assert 'buffer' not in set(dealt.split)
    assert (table.groupby('block').region.nunique() == 1).all()

def test_shares_are_met_where_blocks_are_many():
    shares = {'train': .76, 'val': .12, 'test': .12}
    dealt = make_splits(grid(60, 60, 1000., .5, 0), shares)
    area = dealt.groupby('split').n_positive.sum() / dealt.n_positive.sum()
    assert area.to_dict() == pytest.approx(shares, abs=.01)
    for _, tiles in dealt.groupby('region'):
        assert set(tiles.split) == {'train', 'val', 'test'}

def test_thin_splits_are_a_warning_or_an_error(caplog):
    table = grid(6, 6, 1000., .5, 0)
    with pytest.raises(DataError, match='splits: test holds .* positive tiles, fewer than 100'):
        make_splits(table)
    dealt = make_splits(table, check='warn')
    assert caplog.messages == ['splits: ' + '; '.join(thin_splits(dealt))]

def test_regions_are_missed_only_where_any_are_named():
    "An import that finds no regions calls all tiles alike"
    dealt = deal_splits(grid(6, 6, 1000., .5, 0))
    one, none = (thin_splits(dealt.assign(region=name)) for name in ('north', NO_REGION))
    assert [line for line in one if line not in none] == ['val holds 1 region, fewer than 2']

@quick
@given(lat=st.integers(-80, 80), lon=st.integers(-179, 178), crs=st.sampled_from(['EPSG:4326', 'EPSG:3857']))
def test_blocks_are_square_metres_anywhere(lat, lon, crs):
    "Two places 3.1 km apart are 3.1 cells of 1 km apart, give or take a diagonal"
    lons, lats, _ = Geod(ellps='WGS84').fwd([lon] * 2, [lat] * 2, [90, 90], [0, 3100])
    x, y = Transformer.from_crs('EPSG:4326', crs, always_xy=True).transform(lons, lats)
    side = 1e-6 if crs == 'EPSG:4326' else .1
    table = pd.DataFrame({'tile_id': ['a', 'b'], 'region': 'r', 'xmin': x, 'xmax': np.add(x, side), 'ymin': y,
                          'ymax': np.add(y, side), 'crs': crs})
    places = grid_blocks(table, 1000.).str.extract(r'/(-?\d+)_(-?\d+)').astype(int)
    assert 1.7 <= np.hypot(*(places.iloc[1] - places.iloc[0])) <= 4.6

# --- statistics ---

@quick
@given(seed=st.integers(0, 10**6), dtype=st.sampled_from(['uint8', 'uint16', 'float32']),
       widths=st.lists(st.integers(1, 20), min_size=1, max_size=6), share=st.floats(0, 1))
def test_moments_merge_to_the_whole(seed, dtype, widths, share):
    rng = np.random.default_rng(seed)
    centre, spread = (128, 20) if dtype == 'uint8' else (40_000, 30)
    parts = [rng.normal(centre, spread, (3, 8, width)).clip(0, 65535).astype(dtype) for width in widths]
    kept = [rng.random((8, width)) < share for width in widths]
    total = moments(parts[0], kept[0])
    for part, keep in zip(parts[1:], kept[1:]):
        total = merge_moments(total, moments(part, keep))
    values = np.concatenate([part[:, keep] for part, keep in zip(parts, kept)], 1).astype('float64')
    assert total.n == values.shape[1]
    if total.n:
        np.testing.assert_allclose(total.mean, values.mean(1), rtol=1e-9)
        np.testing.assert_allclose(total.std, values.std(1), rtol=1e-6, atol=1e-6)

def test_uint16_scale_and_nodata(tmp_path):
    valid = np.ones((32, 32), bool)
    valid[:, :10] = False
    rows = [write_tile(tmp_path, 'a', dtype='uint16', valid=valid), write_tile(tmp_path, 'b', x=96, dtype='uint16')]
    pd.DataFrame(rows).to_csv(tmp_path/'m.csv', index=False)
    manifest = read_manifest(tmp_path/'m.csv')
    stats = compute_stats(manifest)
    with rasterio.open(tmp_path/'a.tif') as a, rasterio.open(tmp_path/'b.tif') as b:
        values = np.concatenate([a.read()[:, valid], b.read().reshape(3, -1)], 1).astype('float64')
    assert stats.scale == pytest.approx((values.mean(1) + 4 * values.std(1)).max())
    assert stats.pixels == values.shape[1]
    np.testing.assert_allclose(stats.mean, (values / stats.scale).mean(1))
    np.testing.assert_allclose(stats.std, (values / stats.scale).std(1))
    image, _, mask = read_tile(manifest, 0, stats=stats)
    assert (mask[:, :10] == 255).all() and (mask[:, 10:] != 255).all()
    np.testing.assert_allclose(stats.normalise(image)[:, :10], 0, atol=1e-6)

GOOD_STATS = dict(channels=['R', 'G', 'B'], dtype='uint8', scale=255., mean=[.5] * 3, std=[.1] * 3, pixels=9,
                  manifest_hash='x', background=8, positive=1)

@pytest.mark.parametrize('change', [{'std': [0, 1, 1]}, {'mean': [1, 1]}, {'scale': float('nan')}, {'more': 1},
                                    {'std': 'abc'}, {'mean': [None] * 3}])
def test_bad_statistics_do_not_load(tmp_path, change):
    file = tmp_path/'s.json'
    file.write_text(json.dumps(GOOD_STATS))
    assert Stats.load(file).scale == 255
    file.write_text(json.dumps(GOOD_STATS | change))
    with pytest.raises(DataError):
        Stats.load(file)

def test_nodata_of_extra_is_left_out(world):
    "In labels and in statistics; a band that holds nothing else is constant"
    planes = np.ones((2, 32, 32))
    planes[0, 3, 4] = planes[1, 5, 6] = -9999
    planes[0, 0, 0] = 2
    for i in (0, 1):
        write_extra(world, i, planes, names=['ndvi', 'dem'], nodata=-9999)
    train = read_manifest(world/'full.csv').of('train')
    assert np.argwhere(read_tile(train, 0, ['ndvi', 'dem'])[2] == 255).tolist() == [[3, 4], [5, 6]]
    assert compute_stats(train, ['ndvi']).mean[3] == pytest.approx((2 + 1022) / 1023)
    with pytest.raises(DataError, match='dem is constant'):
        compute_stats(train, ['dem'])
    with pytest.raises(DataError, match="tile 't0', extra 't0_e.tif': .*did you mean 'ndvi'"):
        read_tile(train, 0, ['nvdi'])

def test_the_mask_band_of_extra_counts(world):
    valid = np.ones((32, 32), bool)
    valid[20:] = False
    planes = np.ones((1, 32, 32))
    planes[0, 25] = np.nan
    write_extra(world, 0, planes, names=['ndvi'], valid=valid)
    mask = read_tile(read_manifest(world/'full.csv'), 0, ['ndvi'])[2]
    assert ((mask != 255) == valid).all()

def test_black_tiles_are_a_warning(world):
    assert findings(world)['black tiles'].level == 'ok'
    rewrite(world/'t0.tif', lambda planes: planes * (np.arange(32) < 8).astype('uint8'))
    found = findings(world)['black tiles']
    assert found.level == 'warning' and found.value == "tile 't0', image 't0.tif'"

def test_a_partial_target_leaves_something_out(world):
    "Each tile that the manifest calls partial has 255 in its mask beyond the pixels without data"
    assert 'partial targets' not in findings(world)
    for row, said in enumerate(('headwall', 'yes', 'floor', 'no', '', '0')):
        set_cells(world, 'full.csv', partial=(row, said))

    def ignore_a_corner(planes):
        planes[0, :3, :3] = 255
        return planes

    rewrite(world/'t1_m.tif', ignore_a_corner)
    found = findings(world)['partial targets']
    assert found.level == 'error'
    assert [name in str(found.each) for name in ('t0', 't1', 't2', 't3')] == [True, False, True, False]
    for name in ('t0', 't2'):
        rewrite(world/f'{name}_m.tif', ignore_a_corner)
    found = findings(world)['partial targets']
    assert found.level == 'ok' and found.value == '255 in the mask of each of 3'

def test_a_sidecar_mask_is_not_ignored_silently(world):
    (world/'t0.tif.msk').write_text('x')
    with pytest.raises(DataError, match='sidecar .msk'):
        read_manifest(world/'m.csv')

def test_a_copied_label_is_found_by_any_scale():
    rng = np.random.default_rng(0)
    label = rng.random((200, 200)) < .001
    for scale, noise in ((1, 0), (1000, 60), (-.01, .0005)):
        band = (label * scale + rng.normal(0, noise, label.shape))[None].astype('float32')
        correlation, = balanced_correlation(moments(band, ~label), moments(band, label))
        assert abs(correlation) > .95

# --- importers ---

SCENE = Affine(3, 0, 500_000, 0, -3, -2_000_000)

@pytest.fixture
def scene(tmp_path):
    "A source of one scene of four bands with a corner of zeros, and its table: folder, planes, mask"
    rng = np.random.default_rng(0)
    folder = tmp_path/'source'
    folder.mkdir()
    planes = rng.integers(1, 4000, (4, 101, 70)).astype('uint16')
    planes[:, :20, :20] = 0
    mask = (rng.random((101, 70)) < .4).astype('uint8')
    write_raster(folder/'s.tif', planes, SCENE, 'EPSG:3413')
    write_raster(folder/'s_m.tif', mask[None], SCENE, 'EPSG:3413')
    pd.DataFrame({'id': ['s'], 'split': 'val', 'region': 'r'}).to_parquet(folder/'t.parquet')
    return folder, planes, mask

def import_scene(folder, out):
    "In other bands, at half the resolution, in tiles of 32 pixels"
    source = TableSource(path=folder/'t.parquet', columns={'tile_id': 'id'}, image='{id}.tif', mask='{id}_m.tif',
                         bands=[3, 2, 1], extra_bands={'nir': 4}, nodata=0, downscale=2, tile_size=32, stride=16)
    return import_table(source, out/'m.csv', block_size=100.)

def test_import_georeferenced_and_shrunk(tmp_path, scene):
    folder, planes, mask = scene
    manifest = import_scene(folder, tmp_path/'out')
    table = manifest.table.set_index('tile_id')
    assert list(table.index) == ['s_00000_00000', 's_00000_00032', 's_00032_00000', 's_00032_00032']
    assert table.pixel_size.between(5.8, 6.2).all() and table.block.nunique() == 4
    assert not has_errors(audit(manifest))
    with rasterio.open(tmp_path/'out'/table.image['s_00032_00032']) as ds:
        assert (ds.transform.c, ds.transform.f) == (500_000 + 32 * 6, -2_000_000 - 32 * 6)

def test_import_keeps_the_pixels(tmp_path, scene):
    folder, planes, mask = scene
    manifest = import_scene(folder, tmp_path/'out')
    small, _, small_mask = shrink(planes[[2, 1, 0]], planes[:3].any(0), mask, 2)
    nir = cv2.resize(planes[3].astype('float32')[:100], (35, 50), interpolation=cv2.INTER_AREA)
    # the third tile: its lower part reaches beyond the scene
    image, extra, label = read_tile(manifest, 2, ['nir'])
    assert np.array_equal(image[:18], small[:, 32:50, :32].transpose(1, 2, 0)) and (label[18:] == 255).all()
    assert np.array_equal(label[:18], small_mask[32:50, :32])
    assert np.allclose(extra[:18, :, 0], nir[32:50, :32])
    # the first: its corner is nodata
    assert (read_tile(manifest, 0, ['nir'])[2][:10, :10] == 255).all()

@pytest.mark.parametrize('change, message', [
    (dict(columns={'tile_id': 'nam'}), "did you mean 'name'"),
    (dict(columns={'tile': 'name'}), "did you mean 'tile_id'"),
    (dict(image='../{name}.png'), 'leaves'),
    (dict(mask='{nam}.png'), "column 'nam'"),
    (dict(bands=[1, 2, 9]), 'band 9 is asked for'),
    (dict(classes={0: 0, 1: 7}), 'something else than')])
def test_import_says_what_is_wrong_and_leaves_nothing(tmp_path, change, message):
    for name in 'ab':
        cv2.imwrite(str(tmp_path/f'{name}.png'), np.full((40, 40, 3), 9, 'uint8'))
        cv2.imwrite(str(tmp_path/f'{name}_m.png'), np.zeros((40, 40), 'uint8'))
    pd.DataFrame({'name': list('ab')}).to_csv(tmp_path/'t.csv', index=False)
    source = TableSource(path=tmp_path/'t.csv', columns={'tile_id': 'name'}, image='{name}.png', mask='{name}_m.png')
    with pytest.raises(DataError, match=message):
        import_table(source.model_copy(update=change), tmp_path/'out'/'m.csv')
    assert not (tmp_path/'out').exists() or not list((tmp_path/'out').iterdir())

def test_import_without_splits_makes_them(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        cv2.imwrite(str(tmp_path/f'{i}.jpg'), rng.integers(0, 255, (40, 40, 3)).astype('uint8'))
        cv2.imwrite(str(tmp_path/f'{i}_m.png'), (rng.random((40, 40)) < .2).astype('uint8'))
    pd.DataFrame({'tile_id': range(12)}).to_csv(tmp_path/'t.csv', index=False)
    source = TableSource(path=tmp_path/'t.csv', image='{tile_id}.jpg', mask='{tile_id}_m.png', tile_size=20)
    table = import_table(source, tmp_path/'out'/'m.csv', split_check='warn').table
    assert set(table.split) == {'train', 'val', 'test'}
    assert table.groupby('block').split.nunique().max() == 1 and table.block.nunique() == 12

# --- views of several tiles ---

@quick
@given(kept=st.sets(st.integers(0, 127), min_size=1), k=st.integers(2, 4))
def test_neighbours_by_brute_force(tiny_world, kept, k):
    "Whichever tiles there are, the ones around a tile lie whole sides away, and none is left out"
    table = read_manifest(tiny_world).table.iloc[sorted(kept)].reset_index(drop=True)
    around = neighbours(Manifest(table, tiny_world.parent, tiny_world), k)
    at = {(row.crs, row.xmin, row.ymin): row.Index for row in table.itertuples()}
    for row in table.itertuples():
        side = row.xmax - row.xmin
        for y, x in np.ndindex(2*k - 1, 2*k - 1):
            place = (row.crs, row.xmin + (x - k + 1)*side, row.ymin - (y - k + 1)*side)
            assert around[row.Index, y, x] == at.get(place, -1)

def test_a_coarse_view_is_made_of_its_tiles(tiny_world):
    "Area means and majorities of four tiles, laid out north up; a missing tile has no labels"
    manifest = read_manifest(tiny_world).of('train')
    stats = compute_stats(manifest)
    views = neighbours(manifest, 2)[:, :2, 1:]
    rows = views[np.argmax((views >= 0).all((1, 2)))]
    images = ImageCache(manifest.root, [], georeference=True, megabytes=0)
    image, _, mask = read_coarse(manifest.table, rows, images, stats)

    tiles = [[read_tile(manifest, int(i), stats=stats) for i in line] for line in rows]
    whole_image = np.concatenate([np.concatenate([tile[0] for tile in line], 1) for line in tiles])
    whole_mask = np.concatenate([np.concatenate([tile[2] for tile in line], 1) for line in tiles])
    known = (cells(whole_mask) != 255).all((1, 3))
    np.testing.assert_allclose(image[known], cells(whole_image).mean((1, 3))[known], atol=.51/255)
    majority = cells(whole_mask == 1).sum((1, 3)) >= 2
    assert ((mask == 1) == majority)[known].all()

    rows[0, 0] = -1
    assert (read_coarse(manifest.table, rows, images, stats)[2][:32, :32] == 255).all()

# ---------------------------------------------------------------- rtsseg split
@pytest.fixture
def unsplit(world):
    "The six tiles in three regions, without splits"
    table = pd.read_csv(world/'m.csv').drop(columns='split').assign(region=list('aabbcc'), block=list('xxyyzz'))
    table.to_csv(world/'t.csv', index=False)
    return world

def split_command(capsys, **arguments):
    "Exit code and what was printed"
    code = main(['split', *itertools.chain(*((f'--{name}', str(value)) for name, value in arguments.items()))])
    printed = capsys.readouterr()
    return code, printed.out + printed.err

@pytest.mark.parametrize('suffix', FORMATS)
@pytest.mark.parametrize('by', ['block', 'region'])
def test_split_of_any_table(unsplit, capsys, suffix, by):
    "Whole blocks or regions, in whatever format; what is written is a manifest with these tiles"
    table = complete_table(pd.read_csv(unsplit/'t.csv'), unsplit)
    source = write_manifest(table, unsplit/f'source{suffix}')
    before = source.read_bytes()
    code, printed = split_command(capsys, table=source, out=unsplit/f'new{suffix}', by=by,
                                  shares='train=1 val=1 test=1')
    assert code == 0, printed
    made = read_manifest(unsplit/f'new{suffix}').table
    assert made.groupby(by).split.nunique().max() == 1
    # three regions or blocks of the same area, three equal shares
    assert made.groupby('split').size().to_dict() == dict(test=2, train=2, val=2)
    assert made.tile_id.tolist() == table.tile_id.tolist()
    assert re.search(r'train +2 +2 +72 +1 +1\n', printed), printed
    assert 'thin: test holds 2 positive tiles, fewer than 100' in printed
    assert source.read_bytes() == before

@pytest.mark.parametrize('renamed', [{}, dict(region='place')], ids=['beside regions', 'instead of regions'])
def test_split_by_another_column(unsplit, capsys, renamed):
    "Equal values stay together, numbers too; a table without regions has these"
    years = [2019, 2019, 2019, 2020, 2020, 2021]
    column = renamed.get('region', 'year')
    table = pd.read_csv(unsplit/'t.csv').drop(columns=list(renamed)).assign(**{column: years})
    table.to_csv(unsplit/'years.csv', index=False)
    code, printed = split_command(capsys, table=unsplit/'years.csv', out=unsplit/'new.csv', by=column)
    assert code == 0, printed
    made = read_manifest(unsplit/'new.csv').table
    # the most tiles train, and three values fill three splits
    assert made.groupby(column).split.unique().map(list).to_dict() == {
        '2019': ['train'], '2020': ['val'], '2021': ['test']}
    assert made.region.tolist() == (made[column].tolist() if renamed else table.region.tolist())

def test_each_split_gets_a_region_while_there_are_enough(unsplit, capsys):
    "Three equal regions, of which two would come nearer to the share of train"
    code, printed = split_command(capsys, table=unsplit/'t.csv', out=unsplit/'new.csv', by='region')
    assert code == 0, printed
    made = read_manifest(unsplit/'new.csv').table
    assert made.groupby('region').split.first().value_counts().to_dict() == dict(train=1, val=1, test=1)

def test_split_by_named_regions(unsplit, capsys, tmp_path):
    "As splits.yaml names them; the rest trains. Elsewhere, the folder of the tiles is said"
    (tmp_path/'s.yaml').write_text('val: [b]\ntest: [c]\n')
    code, printed = split_command(capsys, table=unsplit/'t.csv', out=tmp_path/'else'/'new.csv',
                                  regions=tmp_path/'s.yaml')
    assert code == 0, printed
    made = read_manifest(tmp_path/'else'/'new.csv', root=unsplit).table
    assert made.groupby('region').split.first().to_dict() == dict(a='train', b='val', c='test')
    assert f'relative to {unsplit}' in printed and 'data.root' in printed

@pytest.mark.parametrize('change, message', [
    (dict(by='blocks'), r"by: 'blocks' is not block, region or a column \(did you mean 'block'\?\)"),
    (dict(by='zone'), r"by: 'zone' is not block, region or a column \(.*tile_id"),
    (dict(by='zone', table='z.csv'), r'by zone: val, test would hold no tile: 3 splits need at least 3 .*has 1, 1 of'),
    (dict(by='region', table='z.csv'), 'by region: test would hold no tile: 3 splits need.*has 3, 2 of.*--by block'),
    (dict(by='region', table='two.csv'), 'by region: test would hold no tile: .*has 2, 2 of'),
    (dict(shares='train=1 vall=2'), r"'vall' is not a split \(did you mean 'val'\?\)"),
    (dict(shares='train=x'), "'train=x': a share above 0 was expected"),
    (dict(shares='train=nan'), 'a share above 0 was expected'),
    (dict(regions='s.yaml'), r"regions: 'd' is not a region.*\n.*'a' is in val and in test"),
    (dict(regions='s.yaml', shares='train=1'), 'one of them decides'),
    (dict(out='t.csv'), 't.csv is there already: name another file'),
    (dict(out='new.xlsx'), 'new.xlsx: a manifest is .csv'),
    (dict(table='none.csv'), 'none.csv: no such file'),
    (dict(out=''), '--out is not given'),
])
def test_split_says_what_is_wrong_and_writes_nothing(unsplit, capsys, monkeypatch, change, message):
    (unsplit/'s.yaml').write_text('val: [a, d]\ntest: [a]\n')
    table = pd.read_csv(unsplit/'t.csv')
    table.assign(zone='z', n_positive=[3, 3, 3, 3, 0, 0], mask=[*table['mask'][:4], '', '']).to_csv(
        unsplit/'z.csv', index=False)
    table.assign(region=list('aabbbb')).to_csv(unsplit/'two.csv', index=False)
    monkeypatch.chdir(unsplit)
    before = sorted(unsplit.rglob('*'))
    code, printed = split_command(capsys, **(dict(table='t.csv', out='new.csv') | change))
    assert code == 2 and re.search(message, printed), printed
    assert sorted(unsplit.rglob('*')) == before
