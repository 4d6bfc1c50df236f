"Real data, which this project did not make: skipped where it is missing"
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio

from rtsseg.config import load
from rtsseg.ground import overlaps
from rtsseg.splits import thin_splits
from rtsseg.stats import compute_stats
from rtsseg.filecheck import check_files
from rtsseg.findings import has_errors
from rtsseg.importers import import_table
from rtsseg.tiles import read_tile

PROJECT = Path(__file__).parents[1]; REAL = PROJECT.parent/'shared'/'data'
def real(name): return pytest.mark.skipif(not (REAL/name).is_dir(), reason=f'{name} is not here')

@real('s2_landslide_bd')
def test_s2_landslide(tmp_path):
    cfg = load(PROJECT/'configs'/'s2_landslide.yaml'); theirs = pd.read_csv(REAL/'s2_landslide_bd'/'manifest.csv', dtype={'tile_id': str}).set_index('tile_id')
    m = import_table(cfg.data.source, tmp_path/'manifest.csv', cfg.data.block_size); t = m.table.set_index('tile_id')
    assert t.n_positive.max() > 0 and (t.n_positive <= theirs.pos_px.loc[t.index]).all() and (t.split == theirs.split.loc[t.index]).all()
    np.testing.assert_allclose(t[['xmin', 'ymin', 'xmax', 'ymax']], theirs.loc[t.index, ['left', 'bottom', 'right', 'top']], atol=1e-9)
    assert t.pixel_size.between(9, 10.1).all()                                           # Sentinel-2, geodesic
    left, bottom, right, top = (theirs[c].to_numpy() for c in ('left', 'bottom', 'right', 'top'))
    wide, high = np.minimum.outer(right, right) - np.maximum.outer(left, left), np.minimum.outer(top, top) - np.maximum.outer(bottom, bottom)
    assert len(overlaps(m.table)) == (np.triu((wide > 1e-6) & (high > 1e-6), 1)).sum()       # in degrees, by brute force
    found = {f.what: f for f in check_files(m, cfg.data)}
    assert not has_errors(found.values()) and found['leak: footprints'].level == 'ok'
    assert 'sparse points' in found['label shape'].note and found['nodata test'].level == 'note' and found['overlap inside splits'].level == 'note'
    assert len(thin_splits(m.table)) == 3
    stats = compute_stats(m.of('train'), ['nir']); image, extra, mask = read_tile(m, 0, ['nir'], stats)
    with rasterio.open(REAL/'s2_landslide_bd'/'images'/f'{m.table.tile_id[0]}.tif') as ds: a = ds.read()
    np.testing.assert_allclose(image[mask != 255] * stats.scale, np.minimum(a[:3].transpose(1, 2, 0)[mask != 255], stats.scale), rtol=1e-5)      # clipped at mean + 4 std; np.testing.assert_array_equal(extra[mask != 255][:, 0], a[3][mask != 255])
    assert (mask[(a[:3] == 0).all(0)] == 255).all()

@real('dubai_landcover')
def test_dubai(tmp_path):
    cfg = load(PROJECT/'configs'/'dubai_building.yaml', overrides=['data.source.stride=null']); theirs = pd.read_csv(REAL/'dubai_landcover'/'manifest.csv').set_index('tile_id')
    val = pd.read_csv(REAL/'dubai_landcover'/'manifest.csv').query("region in ('Tile 6', 'Tile 2')")
    folder = tmp_path/'in'; folder.mkdir(); val.to_csv(folder/'manifest.csv', index=False)
    for sub in ('images', 'masks'): shutil.copytree(REAL/'dubai_landcover'/sub, folder/sub)
    m = import_table(cfg.data.source.model_copy(update={'path': folder/'manifest.csv'}), tmp_path/'out'/'manifest.csv')
    assert set(m.table.crs) == {'none'} and set(m.table.block) == set(val.tile_id)
    by = m.table.groupby('block').n_positive.sum(); size = (theirs.width // 2) * (theirs.height // 2)
    np.testing.assert_allclose(by / size.loc[by.index] * 100, theirs.building_pct.loc[by.index], atol=.6)     # their share of buildings, at half resolution
    found = check_files(m, cfg.data); assert not has_errors(found)
    pixels = next(f.value for f in found if f.what == 'split val'); assert '1.8' in pixels
