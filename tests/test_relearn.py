"Reviews become training tiles: what is labelled is true, what is held out stays so, and the next manifest is whole"
import json

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
from rasterio.features import shapes
from rasterio.transform import Affine
from rasterio.windows import Window
from scipy.ndimage import gaussian_filter
from shapely.geometry import box, shape

from helpers.maps import write_map, write_scene
from rtsseg.config import ConfigError, ToySource, load, to_yaml
from rtsseg.console import DataError
from rtsseg.filecheck import check_files
from rtsseg.findings import error_lines
from rtsseg.manifest import read_manifest, write_manifest
from rtsseg.prepare import prepare
from rtsseg.raster import write_raster
from rtsseg.relearn import review_tiles
from rtsseg.review import review_sample
from rtsseg.runs import read_reviews, run_folder
from rtsseg.toy import CRS, LANDSCAPES, METRES, scene, scene_corner, tiny_toy
from rtsseg.vrt import Vrt, VrtBand, VrtSource, vrt_xml

TOY = dict(regions=1, scene_size=384, tile_size=64, block_size=192, prevalence=.03)

class Reviewed:
    "A run folder, a map of its ground and of ground beside it, and the ratings of one who knows the truth"

    def __init__(self, home):
        self.home, toy = home, ToySource(**TOY)
        tiny_toy(home/'data', **TOY)
        data = dict(manifest=home/'data/manifest.csv', tile_size=64, block_size=192, split_check='warn')
        self.old = read_manifest(home/'data/manifest.csv', 192)
        cfg = load(name='toy', runs=home/'runs', data=data)
        self.run = run_folder(cfg, self.old.hash)
        self.run.mkdir(parents=True)
        (self.run/'config.yaml').write_text(to_yaml(cfg))
        parts = scene(toy, 0), scene(ToySource(**TOY | dict(seed=5)), 0)
        image, mask = (np.concatenate([getattr(part, name) for part in parts], 1) for name in ('image', 'mask'))
        self.truth = mask == 1
        left, top = scene_corner(toy, 0, LANDSCAPES[0])
        self.grid = Affine(METRES, 0, left, 0, -METRES, top)
        noise = gaussian_filter(np.random.default_rng(1).normal(size=mask.shape), 8)
        logit = 10 * gaussian_filter(self.truth.astype(float), 2) - 5.5 + 2.2 * noise / noise.std()
        self.probability = 1 / (1 + np.exp(-logit))
        self.valid = image.any(2)
        self.scene = write_scene(home/'scene.tif', image.transpose(2, 0, 1), transform=self.grid)
        self.map = write_map(home/'map.tif', self.probability, self.valid, transform=self.grid)
        self.settings = review_sample(self.map, home/'review', n=300, side=16, threshold=.5, least=20, raters=['ana'])
        self.units = pd.read_csv(home/'review/units.csv')
        self.ratings = self.rate('ana.json')
        found = shapes(self.truth.astype('uint8'), transform=self.grid)
        drawn = [shape(geometry) for geometry, value in found if value]
        self.outlines = home/'drawn.gpkg'
        gpd.GeoDataFrame(geometry=drawn, crs=CRS).to_file(self.outlines)

    def part(self, unit):
        return slice(unit.row, unit.row + unit.height), slice(unit.column, unit.column + unit.width)

    def rate(self, name, **changes):
        "The file of a rater who knows the truth; `changes` are other answers"
        answers = {}
        for unit in self.units.itertuples():
            share = float(self.truth[self.part(unit)].mean())
            says = dict(answer='yes', share=share) if share else dict(answer='no')
            answers[unit.unit] = says | dict(outline=True)
        content = dict(sample=self.settings['units_sha256'], rater='ana', made='2026-02-03T04:05:06Z',
                       ratings=answers | changes)
        (self.home/name).write_text(json.dumps(content))
        return self.home/name

    def tiles(self, out, **arguments):
        "What `review_tiles` returns for this review"
        arguments = dict(run=self.run, map=self.map, scene=self.scene) | arguments
        return review_tiles(self.home/'review', [arguments.pop('ratings', self.ratings)], out=out, **arguments)

    def at(self, path):
        "Rows and columns of the scene that a tile shows"
        with rasterio.open(path) as tile:
            column, row = (round(x) for x in ~self.grid @ (tile.transform.c, tile.transform.f))
            return slice(row, row + tile.height), slice(column, column + tile.width)

@pytest.fixture(scope='module')
def reviewed(tmp_path_factory):
    return Reviewed(tmp_path_factory.mktemp('reviewed'))

@pytest.fixture(scope='module')
def outlined(reviewed):
    "The folder of tiles with outlines, and the counts"
    return reviewed.home/'outlined', reviewed.tiles(reviewed.home/'outlined', outlines=reviewed.outlines)

def new_tiles(folder):
    table = pd.read_csv(folder/'manifest.csv', keep_default_na=False)
    return table[table.tile_id.str.startswith('rated_')]

def read(path):
    with rasterio.open(path) as ds:
        return ds.read()

def cells_in(reviewed, at):
    "Rated cells that lie wholly in a tile"
    rows, columns = at
    units = reviewed.units
    return units[(units.row >= rows.start) & (units.row + units.height <= rows.stop) &
                 (units.column >= columns.start) & (units.column + units.width <= columns.stop)]

# ---------------------------------------------------------------- what is labelled

def test_what_is_labelled_is_true(reviewed, outlined):
    "Of a rater and an outline that tell the truth, no pixel is labelled wrongly, and all rated cells are labelled"
    folder, found = outlined
    assert found['positive'] > 3
    assert found['hard_negative'] > 3
    for row in new_tiles(folder).itertuples():
        at = reviewed.at(folder.parent/row.image)
        mask, truth = read(folder.parent/row.mask)[0], reviewed.truth[at]
        assert (mask == truth)[mask != 255].all()
        assert (mask == 1).sum() == int(float(row.n_positive)) == truth.sum()
        for cell in cells_in(reviewed, at).itertuples():
            inside = np.zeros_like(reviewed.truth)
            inside[reviewed.part(cell)] = True
            assert (mask != 255)[inside[at]].all()

def test_tiles_are_cut_as_they_are(reviewed, outlined):
    folder, _ = outlined
    whole = read(reviewed.scene)
    for row in new_tiles(folder).itertuples():
        rows, columns = reviewed.at(folder.parent/row.image)
        assert (read(folder.parent/row.image) == whole[:, rows, columns]).all()

def test_each_false_alarm_is_in_a_tile_or_left_out(reviewed, outlined):
    folder, found = outlined
    alarms = reviewed.units[[(unit.highest >= .5) and not reviewed.truth[reviewed.part(unit)].any()
                             for unit in reviewed.units.itertuples()]]
    shown = {name for names in new_tiles(folder).units for name in names.split()}
    left_out = pd.read_csv(folder/'left_out.csv')
    assert set(alarms.unit) <= shown | set(left_out.unit)
    assert found['held_out'] == len(left_out)

def test_new_finds_without_an_outline_are_listed(reviewed, tmp_path):
    found = reviewed.tiles(tmp_path/'next')
    assert found['positive'] == 0
    listed = gpd.read_file(tmp_path/'next/to_outline.gpkg')
    wanted = [unit.unit for unit in reviewed.units.itertuples()
              if unit.highest < .5 and reviewed.truth[reviewed.part(unit)].any()]
    assert sorted(listed.unit) == sorted(wanted)
    assert found['without_outline'] == len(wanted) > 0
    # the cells lie where the units do
    units = reviewed.units.set_index('unit').loc[listed.unit]
    assert np.allclose(listed.geometry.centroid.x, units.x)
    assert np.allclose(listed.geometry.centroid.y, units.y)

def test_confirmed_cells_take_the_outline_of_the_map(reviewed, tmp_path):
    "Marked as provisional; what is not predicted in them stays unknown"
    reviewed.tiles(tmp_path/'next', accept=True)
    table = new_tiles(tmp_path/'next')
    root = read_root(tmp_path/'next')
    taken = table[table.mask_from.str.contains('provisional')]
    assert len(taken)
    for row in taken.itertuples():
        at = reviewed.at(root/row.image)
        mask = read(root/row.mask)[0]
        assert (reviewed.probability[at][mask == 1] >= .5 - 1e-5).all()
        for cell in cells_in(reviewed, at).itertuples():
            inside = np.zeros_like(reviewed.truth)
            inside[reviewed.part(cell)] = True
            inside = inside[at]
            if reviewed.truth[at][inside].any() and (mask == 1)[inside].any():
                assert not (mask == 0)[inside].any()

def in_halves(path):
    "A mosaic of the left and the right half of a raster"
    with rasterio.open(path) as ds:
        half, kinds = ds.width // 2, dict(uint8='Byte', uint16='UInt16')
        places = ((0, half), (half, ds.width - half))
        parts = [path.with_name(f'{path.stem}_{left}.tif') for left, _ in places]
        for part, (left, width) in zip(parts, places):
            window = Window(left, 0, width, ds.height)
            write_raster(part, ds.read(window=window), ds.window_transform(window), ds.crs, nodata=ds.nodata)
        bands = []
        for band in ds.indexes:
            sources = [VrtSource(part, band, (0, 0, width, ds.height), (left, 0), f'{ds.nodata:g}', False)
                       for part, (left, width) in zip(parts, places)]
            bands.append(VrtBand(kinds[ds.dtypes[0]], '', f'{ds.nodata:g}', ds.colorinterp[band - 1].name.capitalize(),
                                 repr(ds.scales[0]), '0', sources))
        tags = {key: text for key, text in ds.tags().items() if key == 'RTSSEG'}
        vrt = Vrt(ds.width, ds.height, ds.crs.to_wkt(), ds.transform, bands, tags)
    path.with_suffix('.vrt').write_bytes(vrt_xml(vrt))
    return path.with_suffix('.vrt')

def test_tiles_of_a_mosaic_are_those_of_the_whole_scene(reviewed, outlined, tmp_path):
    "Map and scene in halves, drawn from and cut by the mosaics that name them"
    mosaics = dict(map=in_halves(reviewed.map), scene=in_halves(reviewed.scene))
    made = review_sample(mosaics['map'], tmp_path/'review', mosaics['scene'], n=300, side=16, threshold=.5, least=20,
                         raters=['ana'])
    # the same draw, so that the same ratings hold
    assert made['units_sha256'] == reviewed.settings['units_sha256']
    found = review_tiles(tmp_path/'review', [reviewed.ratings], run=reviewed.run, out=tmp_path/'next',
                         outlines=reviewed.outlines, **mosaics)
    folder, whole = outlined
    assert found == whole
    roots = read_root(tmp_path/'next'), read_root(folder)
    for one, other in zip(new_tiles(tmp_path/'next').itertuples(), new_tiles(folder).itertuples(), strict=True):
        for name in ('image', 'mask'):
            assert (read(roots[0]/getattr(one, name)) == read(roots[1]/getattr(other, name))).all()
    with pytest.raises(ConfigError, match='is not the scene that the sample was drawn from'):
        review_tiles(tmp_path/'review', [reviewed.ratings], run=reviewed.run, out=tmp_path/'other',
                     **mosaics | dict(scene=reviewed.scene))

def test_ratings_and_outlines_that_disagree_are_ignored(reviewed, tmp_path):
    "Somebody drew outlines where the rater saw nothing: their pixels teach nothing"
    no = {unit: dict(answer='no', outline=False) for unit in reviewed.units.unit}
    reviewed.tiles(tmp_path/'next', ratings=reviewed.rate('no.json', **no), outlines=reviewed.outlines)
    root = read_root(tmp_path/'next')
    disagree = 0
    for row in new_tiles(tmp_path/'next').itertuples():
        at = reviewed.at(root/row.image)
        mask = read(root/row.mask)[0]
        for cell in cells_in(reviewed, at).itertuples():
            inside = np.zeros_like(reviewed.truth)
            inside[reviewed.part(cell)] = True
            inside = inside[at]
            assert (mask[inside] == np.where(reviewed.truth[at][inside], 255, 0)).all()
            disagree += reviewed.truth[at][inside].sum()
    assert disagree

# ---------------------------------------------------------------- what is held out

def read_root(folder):
    "The folder that the paths of a new manifest start at"
    return load(folder/'data.yaml').data.tiles_root

def boxes(table):
    return [box(*map(float, (row.xmin, row.ymin, row.xmax, row.ymax))) for row in table.itertuples()]

def test_no_tile_shares_ground_or_a_block_with_val_or_test(reviewed, outlined):
    folder, found = outlined
    assert found['held_out'] > 10
    held = reviewed.old.table[reviewed.old.table.split.isin(['val', 'test'])]
    new = new_tiles(folder)
    for tile in boxes(new):
        assert max(tile.intersection(other).area for other in boxes(held)) == 0
        # a cell of the grid of blocks, which starts at 0 in this CRS
        block = np.floor([tile.centroid.x / 192, tile.centroid.y / 192])
        assert not any((np.floor([other.centroid.x / 192, other.centroid.y / 192]) == block).all()
                       for other in boxes(held))

def test_the_runs_folder_knows_what_was_rated(reviewed, outlined):
    folder, found = outlined
    test = reviewed.old.of('test').table
    cells = [box(unit.x - 8 * METRES, unit.y - 8 * METRES, unit.x + 8 * METRES, unit.y + 8 * METRES)
             for unit in reviewed.units.itertuples()]
    wanted = [tile_id for tile_id, tile in zip(test.tile_id, boxes(test))
              if max(tile.intersection(cell).area for cell in cells) > 1]
    reviews = read_reviews(reviewed.home/'runs')
    merged = read_manifest(folder/'manifest.csv', 192, read_root(folder))
    for name in (reviewed.old.hash, merged.hash):
        assert [review['tiles'] for review in reviews[name]] == [wanted]
    assert found['test_tiles_rated'] == len(wanted) > 0

# ---------------------------------------------------------------- the next manifest

def test_the_next_manifest_passes_the_checks_of_the_library(reviewed, outlined):
    "As a config of the same run with the settings beside it"
    folder, found = outlined
    cfg = load(reviewed.run/'config.yaml', folder/'data.yaml')
    manifest = prepare(cfg)
    assert len(manifest) == len(reviewed.old) + found['tiles']
    assert not error_lines(check_files(manifest, cfg.data))
    for split in ('val', 'test', 'buffer'):
        assert manifest.of(split).table.tile_id.tolist() == reviewed.old.of(split).table.tile_id.tolist()
    old = manifest.table[~manifest.table.tile_id.str.startswith('rated_')].reset_index(drop=True)
    same = [name for name in reviewed.old.table if name not in ('image', 'mask', 'extra')]
    pd.testing.assert_frame_equal(old[same], reviewed.old.table[same])

def test_what_cannot_become_tiles_is_refused(reviewed, tmp_path):
    out = tmp_path/'next'
    other = write_scene(tmp_path/'other.tif', read(reviewed.scene)[:, ::-1], transform=reviewed.grid)
    with pytest.raises(ConfigError) as error:
        reviewed.tiles(out, map=other, extra=other)
    assert 'other.tif is not the map that the sample was drawn from' in str(error.value)
    assert 'the model sees R, G and B alone' in str(error.value)
    with pytest.raises(ConfigError, match='stays as it is'):
        reviewed.tiles(reviewed.home/'data/next')
    with pytest.raises(DataError, match='no such run folder'):
        reviewed.tiles(out, run=tmp_path/'none')
    assert not out.exists()

def test_tiles_without_a_place_cannot_be_held_out(reviewed, tmp_path):
    table = reviewed.old.table.assign(crs='none').drop(columns=['xmin', 'ymin', 'xmax', 'ymax'])
    write_manifest(table, tmp_path/'manifest.csv')
    cfg = load(reviewed.run/'config.yaml', overrides=[f'data.manifest={tmp_path}/manifest.csv',
                                                      f'data.root={reviewed.home}/data'])
    (tmp_path/'run').mkdir()
    (tmp_path/'run/config.yaml').write_text(to_yaml(cfg))
    with pytest.raises(DataError, match='have no place on the map'):
        reviewed.tiles(tmp_path/'next', run=tmp_path/'run')
