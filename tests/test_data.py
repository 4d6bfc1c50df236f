"The data room across files and formats: manifests, splits, statistics, importers. What cannot be meant is in faults/test_manifest.py, test_rasters.py and test_masks.py"
import json, shutil

import cv2
import numpy as np
import pandas as pd
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings, strategies as st
from rasterio.transform import Affine

from rtsseg.config import TableSource
from rtsseg.console import DataError
from rtsseg.ground import BOX, grid_blocks, overlaps
from rtsseg.raster import write_raster
from rtsseg.rawtile import shrink
from rtsseg.manifest import (
    Manifest, read_manifest, write_manifest
)
from rtsseg.columns import COLUMNS, complete_table
from rtsseg.splits import make_splits
from rtsseg.stats import Stats, compute_stats, merge_moments, moments
from rtsseg.audit import audit
from rtsseg.filecheck import balanced_correlation
from rtsseg.findings import has_errors
from rtsseg.importers import import_table
from rtsseg.tiles import neighbours, read_coarse, read_tile
from helpers.tiles import extra, rewrite, seen, tile, world

quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

# --- manifests ---

words = st.text(st.characters(codec='utf-8', exclude_categories=('C', 'Z')), min_size=1, max_size=8)
number = st.floats(-1e7, 1e7, allow_nan=False)
row = st.tuples(words, st.sampled_from(['train', 'val', 'test', 'buffer']), words, words, st.integers(0, 2**28), number, number, st.floats(1, 1e4),
                st.sampled_from(['EPSG:3413', 'EPSG:32610', 'none']), st.floats(.1, 100))

@quick
@given(rows=st.lists(row, min_size=1, max_size=6, unique_by=lambda r: r[0]), seed=st.integers(0, 99))
def test_manifest_survives_every_format(tmp_path_factory, rows, seed):
    folder = tmp_path_factory.mktemp('m'); [(folder/f'{i}.tif').write_text('') for i in range(6)]
    t = pd.DataFrame([dict(tile_id=i, image=f'{k}.tif', mask='0.tif', split=s, region=r, block=b, n_positive=n, crs=c, pixel_size=p if c != 'none' else np.nan,
                           **dict(zip(BOX, (x, y, x + w, y + w) if c != 'none' else [np.nan] * 4))) for k, (i, s, r, b, n, x, y, w, c, p) in enumerate(rows)])
    want = complete_table(t, folder)
    for suffix in ('csv', 'parquet', 'geoparquet', 'gpkg'):
        got = read_manifest(write_manifest(want.sample(frac=1, random_state=seed), folder/f'm.{suffix}'))
        pd.testing.assert_frame_equal(got.table[COLUMNS], want[COLUMNS])
        assert got.hash == Manifest(want, folder, folder).hash
    changed = want.copy(); changed.loc[0, 'n_positive'] += 1
    assert Manifest(changed, folder, folder).hash != got.hash

def test_geometry_alone_is_a_footprint(world):
    import geopandas as gpd
    full = read_manifest(world/'m.csv')
    write_manifest(full, world/'m.gpkg')
    gpd.read_file(world/'m.gpkg').drop(columns=[*BOX, 'crs', 'pixel_size', 'block']).to_file(world/'bare.gpkg', driver='GPKG')
    assert read_manifest(world/'bare.gpkg').hash == full.hash

def test_manifest_is_computed_not_written(world):
    before = (world/'m.csv').read_bytes(); m = read_manifest(world/'m.csv')
    assert (world/'m.csv').read_bytes() == before
    assert (m.table.n_positive == 36).all() and m.of('val').table.tile_id.tolist() == ['t2', 't3']
    shutil.copytree(world, world/'moved'); assert read_manifest(world/'moved'/'m.csv').hash == m.hash

@pytest.mark.parametrize('box,crs,word', [((1e12, 1e12, 1e12 + 1, 1e12 + 1), 'EPSG:32610', 'outside of its CRS'), ((0, 0, 0, 1), 'EPSG:3413', 'not a footprint'), ((0, 0, 1, 'inf'), 'EPSG:3413', 'not a footprint'),
                                          ((0, 0, 1, 'a'), 'EPSG:3413', "'a' is not a number"), ((0, 0, 1, 1), 'EPSG:99999', 'not a coordinate reference system')])
def test_impossible_footprints(world, box, crs, word):
    pd.read_csv(world/'m.csv').assign(**dict(zip(BOX, box)), crs=crs, pixel_size=3).to_csv(world/'m.csv', index=False)
    with pytest.raises(DataError, match=word): read_manifest(world/'m.csv')

# --- geometry, blocks, splits ---

boxes = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=30)

@quick
@given(boxes=boxes, crs=st.sampled_from(['EPSG:3413', 'EPSG:32610']))
def test_overlaps_equal_brute_force(boxes, crs):
    x, y, w, h = (np.array(v, float) * 1000 for v in zip(*boxes))
    t = pd.DataFrame({'tile_id': range(len(x)), 'xmin': x, 'ymin': y, 'xmax': x + w, 'ymax': y + h, 'crs': crs})
    side = lambda a, wa: np.minimum.outer(a + wa, a + wa) - np.maximum.outer(a, a)
    brute = {(i, j) for i, j in zip(*np.nonzero((side(x, w) > 0) & (side(y, h) > 0))) if i < j}
    assert set(map(tuple, overlaps(t).tolist())) == brute

def test_overlap_at_the_date_line_and_across_projections():
    def one(name, box, crs): return dict(tile_id=name, **dict(zip(BOX, box)), crs=crs)
    east, west = one('a', (179.99, 70., 180.01, 70.01), 'EPSG:4326'), one('b', (-180.01, 70., -179.99, 70.01), 'EPSG:4326')
    apart = one('c', (-179.98, 70., -179.97, 70.01), 'EPSG:4326')
    assert overlaps(pd.DataFrame([east, west, apart])).tolist() == [[0, 1]]
    from pyproj import Transformer
    x, y = Transformer.from_crs('EPSG:4326', 'EPSG:3413', always_xy=True).transform(180., 70.005)
    assert overlaps(pd.DataFrame([east, one('d', (x - 50, y - 50, x + 50, y + 50), 'EPSG:3413'), apart])).tolist() == [[0, 1]]

worlds = st.builds(lambda n, m, step, rare, seed: (n, m, step, rare, seed), st.integers(2, 12), st.integers(2, 12), st.sampled_from([500., 1000.]), st.floats(0, 1), st.integers(0, 10**6))

def grid(n, m, step, rare, seed):
    "n × m tiles of 1 km, in steps of 500 m (they overlap) or 1 km"
    rng = np.random.default_rng(seed); x, y = (a.ravel() for a in np.meshgrid(np.arange(n) * step, np.arange(m) * step))
    t = pd.DataFrame({'tile_id': [f'{i:04d}' for i in range(x.size)], 'xmin': x, 'ymin': y, 'xmax': x + 1000, 'ymax': y + 1000, 'crs': 'EPSG:3413', 'pixel_size': 3.,
                      'region': np.where(x < 3000, 'west', 'east'), 'n_positive': rng.poisson(100, x.size) * (rng.random(x.size) < rare)})
    return t.assign(block=grid_blocks(t, 2000.))

@quick
@given(worlds)
@pytest.mark.filterwarnings('ignore:splits')
def test_splits_keep_blocks_whole_and_apart(world):
    t = grid(*world); s = make_splits(t, seed=world[-1], check='warn'); used = s[s.split != 'buffer']
    assert used.groupby('block').split.nunique().max() == 1
    o = overlaps(used); assert (used.split.to_numpy()[o[:, 0]] == used.split.to_numpy()[o[:, 1]]).all()
    pd.testing.assert_frame_equal(make_splits(t.sample(frac=1, random_state=1), seed=world[-1], check='warn'), s)
    if world[2] == 1000.: assert 'buffer' not in set(s.split)          # tiles that do not overlap are all kept
    assert (t.groupby('block').region.nunique() == 1).all()

def test_shares_are_met_where_blocks_are_many():
    t = grid(60, 60, 1000., .5, 0); s = make_splits(t, {'train': .76, 'val': .12, 'test': .12})
    area = s.groupby('split').n_positive.sum() / s.n_positive.sum()
    assert area.to_dict() == pytest.approx({'train': .76, 'val': .12, 'test': .12}, abs=.01)
    for _, g in s.groupby('region'): assert set(g.split) == {'train', 'val', 'test'}

@quick
@given(st.integers(-80, 80), st.integers(-180, 179), st.sampled_from(['EPSG:4326', 'EPSG:3857']))
def test_blocks_are_square_metres_anywhere(lat, lon, crs):
    from pyproj import Geod, Transformer
    f = Transformer.from_crs('EPSG:4326', crs, always_xy=True)
    lons, lats, _ = Geod(ellps='WGS84').fwd([lon] * 2, [lat] * 2, [90, 90], [0, 3100])                  # two places 3.1 km apart
    x, y = f.transform(lons, lats); d = 1e-6 if crs == 'EPSG:4326' else .1
    t = pd.DataFrame({'tile_id': ['a', 'b'], 'region': 'r', 'xmin': x, 'xmax': np.add(x, d), 'ymin': y, 'ymax': np.add(y, d), 'crs': crs})
    column = grid_blocks(t, 1000.).str.extract(r'/(-?\d+)_(-?\d+)').astype(int)
    cells = np.hypot(*(column.iloc[1] - column.iloc[0]))
    if abs(lons[0] - lons[1]) < 180: assert 1.7 <= cells <= 4.6                                         # 3.1 ± a diagonal of a cell

# --- statistics ---

@quick
@given(st.integers(0, 10**6), st.sampled_from(['uint8', 'uint16', 'float32']), st.lists(st.integers(1, 20), min_size=1, max_size=6), st.floats(0, 1))
def test_moments_merge_to_the_whole(seed, dtype, widths, share):
    rng = np.random.default_rng(seed)
    parts = [(rng.normal(40_000, 30, (3, 8, w)).astype(dtype) if dtype != 'uint8' else rng.integers(0, 256, (3, 8, w)).astype(dtype), rng.random((8, w)) < share) for w in widths]
    total = moments(*parts[0])
    for p in parts[1:]: total = merge_moments(total, moments(*p))
    flat = np.concatenate([a[:, k] for a, k in parts], 1).astype('float64')
    assert total.n == flat.shape[1]
    if total.n: np.testing.assert_allclose(total.mean, flat.mean(1), rtol=1e-9); np.testing.assert_allclose(total.std, flat.std(1), rtol=1e-6, atol=1e-6)

def test_uint16_scale_and_nodata(tmp_path):
    valid = np.ones((32, 32), bool); valid[:, :10] = False
    pd.DataFrame([tile(tmp_path, 'a', dtype='uint16', valid=valid), tile(tmp_path, 'b', x=96, dtype='uint16')]).to_csv(tmp_path/'m.csv', index=False)
    m = read_manifest(tmp_path/'m.csv'); s = compute_stats(m)
    a = np.concatenate([rasterio.open(tmp_path/'a.tif').read()[:, valid], rasterio.open(tmp_path/'b.tif').read().reshape(3, -1)], 1).astype('float64')
    assert s.scale == pytest.approx((a.mean(1) + 4 * a.std(1)).max()) and s.pixels == a.shape[1]
    np.testing.assert_allclose(s.mean, (a / s.scale).mean(1)); np.testing.assert_allclose(s.std, (a / s.scale).std(1))
    image, _, mask = read_tile(m, 0, stats=s)
    assert (mask[:, :10] == 255).all() and (mask[:, 10:] != 255).all()
    np.testing.assert_allclose(s.normalise(image)[:, :10], 0, atol=1e-6)

@pytest.mark.parametrize('change', [{'std': [0, 1, 1]}, {'mean': [1, 1]}, {'scale': float('nan')}, {'more': 1}, {'std': 'abc'}, {'mean': [None] * 3}])
def test_bad_statistics_do_not_load(tmp_path, change):
    good = dict(channels=['R', 'G', 'B'], dtype='uint8', scale=255., mean=[.5] * 3, std=[.1] * 3, pixels=9, manifest_hash='x', background=8, positive=1)
    (tmp_path/'s.json').write_text(json.dumps(good)); assert Stats.load(tmp_path/'s.json').scale == 255
    (tmp_path/'s.json').write_text(json.dumps(good | change))
    with pytest.raises(DataError): Stats.load(tmp_path/'s.json')

def test_nodata_of_extra_is_left_out(world):
    "In labels and in statistics; a band that holds nothing else is constant"
    e = np.ones((2, 32, 32)); e[0, 3, 4] = e[1, 5, 6] = -9999; e[0, 0, 0] = 2
    for i in (0, 1): extra(world, i, e, names=['ndvi', 'dem'], nodata=-9999)
    m = read_manifest(world/'full.csv').of('train')
    assert np.argwhere(read_tile(m, 0, ['ndvi', 'dem'])[2] == 255).tolist() == [[3, 4], [5, 6]]
    assert compute_stats(m, ['ndvi']).mean[3] == pytest.approx((2 + 1022) / 1023)
    with pytest.raises(DataError, match='dem is constant'): compute_stats(m, ['dem'])
    with pytest.raises(DataError, match="tile 't0', extra 't0_e.tif': .*did you mean 'ndvi'"): read_tile(m, 0, ['nvdi'])

def test_the_mask_band_of_extra_counts(world):
    valid = np.ones((32, 32), bool); valid[20:] = False; e = np.ones((1, 32, 32)); e[0, 25] = np.nan
    extra(world, 0, e, names=['ndvi'], valid=valid); assert ((read_tile(read_manifest(world/'full.csv'), 0, ['ndvi'])[2] != 255) == valid).all()

def test_black_tiles_are_a_warning(world):
    assert seen(world)['black tiles'].level == 'ok'
    rewrite(world/'t0.tif', lambda a: a * (np.arange(32) < 8).astype('uint8')); found = seen(world)['black tiles']
    assert found.level == 'warning' and found.value == "tile 't0', image 't0.tif'"

def test_sidecar_mask_is_not_ignored_silently(world):
    (world/'t0.tif.msk').write_text('x')
    with pytest.raises(DataError, match='sidecar .msk'): read_manifest(world/'m.csv')

# --- importers ---

def test_import_georeferenced_and_shrunk(tmp_path):
    src = tmp_path/'src'; src.mkdir(); rng = np.random.default_rng(0)
    a = rng.integers(1, 4000, (4, 101, 70)).astype('uint16'); a[:, :20, :20] = 0; m = (rng.random((101, 70)) < .4).astype('uint8')
    place = Affine.translation(500_000, -2_000_000) @ Affine.scale(3, -3)
    write_raster(src/'s.tif', a, place, 'EPSG:3413'); write_raster(src/'s_m.tif', m[None], place, 'EPSG:3413')
    pd.DataFrame({'id': ['s'], 'split': 'val', 'region': 'r'}).to_parquet(src/'t.parquet')
    how = TableSource(path=src/'t.parquet', columns={'tile_id': 'id'}, image='{id}.tif', mask='{id}_m.tif', bands=[3, 2, 1], extra_bands={'nir': 4}, nodata=0, downscale=2, tile_size=32, stride=16)
    got = import_table(how, tmp_path/'out'/'m.csv', block_size=100.)
    t = got.table.set_index('tile_id'); assert list(t.index) == ['s_00000_00000', 's_00000_00032', 's_00032_00000', 's_00032_00032']
    assert (t.pixel_size.between(5.8, 6.2)).all() and not has_errors(audit(got)) and t.block.nunique() == 4
    small, ok, lab = shrink(a[[2, 1, 0]], a[:3].any(0), m, 2)
    image, extra, mask = read_tile(got, 2, ['nir'])
    assert np.array_equal(image[:18], small[:, 32:50, :32].transpose(1, 2, 0)) and (mask[18:] == 255).all()
    assert np.array_equal(mask[:18], lab[32:50, :32]) and np.allclose(extra[:18, :, 0], cv2.resize(a[3].astype('float32')[:100], (35, 50), interpolation=cv2.INTER_AREA)[32:50, :32])
    assert (read_tile(got, 0, ['nir'])[2][:10, :10] == 255).all()
    with rasterio.open(tmp_path/'out'/t.image['s_00032_00032']) as ds: assert (ds.transform.c, ds.transform.f) == (500_000 + 32 * 6, -2_000_000 - 32 * 6)

@pytest.mark.parametrize('change,word', [(dict(columns={'tile_id': 'nam'}), "did you mean 'name'"), (dict(columns={'tile': 'name'}), "did you mean 'tile_id'"), (dict(image='../{name}.png'), 'leaves'),
                                         (dict(mask='{nam}.png'), "column 'nam'"), (dict(bands=[1, 2, 9]), 'band 9 is asked for'), (dict(classes={0: 0, 1: 7}), 'something else than')])
def test_import_says_what_is_wrong_and_leaves_nothing(tmp_path, change, word):
    for n in 'ab': cv2.imwrite(str(tmp_path/f'{n}.png'), np.full((40, 40, 3), 9, 'uint8')); cv2.imwrite(str(tmp_path/f'{n}_m.png'), np.zeros((40, 40), 'uint8'))
    pd.DataFrame({'name': list('ab')}).to_csv(tmp_path/'t.csv', index=False)
    how = TableSource(path=tmp_path/'t.csv', columns={'tile_id': 'name'}, image='{name}.png', mask='{name}_m.png').model_copy(update=change)
    with pytest.raises(DataError, match=word): import_table(how, tmp_path/'out'/'m.csv')
    assert not (tmp_path/'out').exists() or not list((tmp_path/'out').iterdir())

@pytest.mark.filterwarnings('ignore:splits')
def test_import_without_splits_makes_them(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12): cv2.imwrite(str(tmp_path/f'{i}.jpg'), rng.integers(0, 255, (40, 40, 3)).astype('uint8')); cv2.imwrite(str(tmp_path/f'{i}_m.png'), (rng.random((40, 40)) < .2).astype('uint8'))
    pd.DataFrame({'tile_id': range(12)}).to_csv(tmp_path/'t.csv', index=False)
    got = import_table(TableSource(path=tmp_path/'t.csv', image='{tile_id}.jpg', mask='{tile_id}_m.png', tile_size=20), tmp_path/'out'/'m.csv', split_check='warn').table
    assert set(got.split) == {'train', 'val', 'test'} and got.groupby('block').split.nunique().max() == 1 and got.block.nunique() == 12

def test_a_copied_label_is_found_by_any_scale():
    rng = np.random.default_rng(0); label = rng.random((200, 200)) < .001
    for scale, noise in ((1, 0), (1000, 60), (-.01, .0005)):
        band = (label * scale + rng.normal(0, noise, label.shape))[None].astype('float32')
        assert abs(balanced_correlation(moments(band, ~label), moments(band, label))[0]) > .95

@quick
@given(st.sets(st.integers(0, 127), min_size=1), st.integers(2, 4))
def test_neighbours_by_brute_force(tiny_world, kept, k):
    "Whichever tiles there are, the ones around a tile lie whole sides away, and none is left out"
    table = read_manifest(tiny_world).table.iloc[sorted(kept)].reset_index(drop=True)
    around = neighbours(Manifest(table, tiny_world.parent, tiny_world), k)
    place = {(c, x, y): i for i, (c, x, y) in enumerate(zip(table.crs, table.xmin, table.ymin))}
    side = (table.xmax - table.xmin).to_numpy()
    for i, t in enumerate(table.itertuples()):
        for r, c in np.ndindex(2*k - 1, 2*k - 1):
            assert around[i, r, c] == place.get((t.crs, t.xmin + (c - k + 1)*side[i], t.ymin - (r - k + 1)*side[i]), -1)

def test_a_coarse_view_is_made_of_its_tiles(tiny_world):
    "Area means and majorities of four tiles, laid out north up; where there is no tile there is no label"
    manifest = read_manifest(tiny_world).of('train'); stats = compute_stats(manifest)
    around = neighbours(manifest, 2)
    i = int(np.flatnonzero((around[:, :2, 1:] >= 0).sum((1, 2)) == 4)[0]); rows = around[i, :2, 1:]
    image, _, mask = read_coarse(manifest, rows, stats=stats)
    whole = [np.concatenate([np.concatenate([read_tile(manifest, j, stats=stats)[p] for j in row], 1) for row in rows.tolist()], 0) for p in (0, 2)]
    box = lambda a: a.reshape(64, 2, 64, 2, *a.shape[2:])
    known = (box(whole[1]) != 255).all((1, 3))
    np.testing.assert_allclose(image[known], box(whole[0]).mean((1, 3))[known], atol=.51/255)
    assert ((mask == 1) == (box(whole[1] == 1).sum((1, 3)) >= 2))[known].all()
    rows[0, 0] = -1
    assert (read_coarse(manifest, rows, stats=stats)[2][:32, :32] == 255).all()

