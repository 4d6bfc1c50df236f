"Real data sets of other people, where they are on this machine"
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio

from rtsseg.config import load
from rtsseg.filecheck import check_files
from rtsseg.findings import has_errors
from rtsseg.ground import overlaps
from rtsseg.importers import import_table
from rtsseg.splits import thin_splits
from rtsseg.stats import compute_stats
from rtsseg.tiles import read_tile

PROJECT = Path(__file__).parents[1]
REAL = PROJECT.parent/'shared'/'data'
LANDSLIDES, DUBAI = REAL/'s2_landslide_bd', REAL/'dubai_landcover'

def needs(folder):
    "Skip a test where a data set is missing"
    return pytest.mark.skipif(not folder.is_dir(), reason=f'{folder.name} is not on this machine')

@pytest.fixture(scope='module')
def landslides(tmp_path_factory):
    "Config, imported manifest, and the table that the data set came with"
    cfg = load(PROJECT/'configs'/'s2_landslide.yaml')
    manifest = import_table(cfg.data.source, tmp_path_factory.mktemp('s2')/'manifest.csv', cfg.data.block_size)
    theirs = pd.read_csv(LANDSLIDES/'manifest.csv', dtype={'tile_id': str}).set_index('tile_id')
    return cfg, manifest, theirs.loc[manifest.table.tile_id]

@pytest.mark.real
@needs(LANDSLIDES)
def test_s2_landslide_table(landslides):
    _, manifest, theirs = landslides
    ours = manifest.table.set_index('tile_id')
    assert ours.n_positive.max() > 0 and (ours.n_positive <= theirs.pos_px).all() and (ours.split == theirs.split).all()
    their_boxes = theirs[['left', 'bottom', 'right', 'top']]
    np.testing.assert_allclose(ours[['xmin', 'ymin', 'xmax', 'ymax']], their_boxes, atol=1e-9)
    # Sentinel-2, on the ground
    assert ours.pixel_size.between(9, 10.1).all()

@pytest.mark.real
@needs(LANDSLIDES)
def test_s2_landslide_overlaps_by_brute_force(landslides):
    "In degrees"
    _, manifest, theirs = landslides
    width = np.minimum.outer(*[theirs.right.to_numpy()] * 2) - np.maximum.outer(*[theirs.left.to_numpy()] * 2)
    height = np.minimum.outer(*[theirs.top.to_numpy()] * 2) - np.maximum.outer(*[theirs.bottom.to_numpy()] * 2)
    assert len(overlaps(manifest.table)) == np.triu((width > 1e-6) & (height > 1e-6), 1).sum()

@pytest.mark.real
@needs(LANDSLIDES)
def test_s2_landslide_check(landslides):
    cfg, manifest, _ = landslides
    found = {finding.what: finding for finding in check_files(manifest, cfg.data)}
    assert not has_errors(found.values()) and found['leak: footprints'].level == 'ok'
    assert 'sparse points' in found['label shape'].note
    assert found['nodata test'].level == 'note' and found['overlap inside splits'].level == 'note'
    assert len(thin_splits(manifest.table)) == 3

@pytest.mark.real
@needs(LANDSLIDES)
def test_s2_landslide_pixels(landslides):
    _, manifest, _ = landslides
    stats = compute_stats(manifest.of('train'), ['nir'])
    image, extra, mask = read_tile(manifest, 0, ['nir'], stats)
    with rasterio.open(LANDSLIDES/'images'/f'{manifest.table.tile_id[0]}.tif') as ds:
        theirs = ds.read()
    known = mask != 255
    # images are clipped at mean + 4 std
    clipped = np.minimum(theirs[:3].transpose(1, 2, 0)[known], stats.scale)
    np.testing.assert_allclose(image[known] * stats.scale, clipped, rtol=1e-5)
    np.testing.assert_array_equal(extra[known][:, 0], theirs[3][known])
    assert (mask[(theirs[:3] == 0).all(0)] == 255).all()

@pytest.mark.real
@needs(DUBAI)
def test_dubai(tmp_path):
    "Images without a place on the map, two of them, at half the resolution"
    cfg = load(PROJECT/'configs'/'dubai_building.yaml', overrides=['data.source.stride=null'])
    theirs = pd.read_csv(DUBAI/'manifest.csv').query("region in ('Tile 6', 'Tile 2')")
    folder = tmp_path/'in'
    folder.mkdir()
    theirs.to_csv(folder/'manifest.csv', index=False)
    for subfolder in ('images', 'masks'):
        shutil.copytree(DUBAI/subfolder, folder/subfolder)
    source = cfg.data.source.model_copy(update={'path': folder/'manifest.csv'})
    manifest = import_table(source, tmp_path/'out'/'manifest.csv')
    assert set(manifest.table.crs) == {'none'} and set(manifest.table.block) == set(theirs.tile_id)
    positive = manifest.table.groupby('block').n_positive.sum()
    theirs = theirs.set_index('tile_id').loc[positive.index]
    pixels = (theirs.width // 2) * (theirs.height // 2)
    np.testing.assert_allclose(positive / pixels * 100, theirs.building_pct, atol=.6)
    found = {finding.what: finding for finding in check_files(manifest, cfg.data)}
    assert not has_errors(found.values()) and '1.8' in found['split val'].value
