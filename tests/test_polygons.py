"Maps become polygons: strips and borders leave no trace, areas are those on the ground, what is refused"
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import fromstring

import geopandas as gpd
import numpy as np
import pyarrow.parquet
import pytest
import rasterio
import rasterio.features
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.transform import Affine
from scipy import ndimage

from helpers.maps import CRS, GRID, untrained_model, write_probability, write_scene
from helpers.maps import noise as noise_image
from rtsseg.config import ConfigError
from rtsseg.console import DataError
from rtsseg.ground import GEOD
from rtsseg.mapfile import NODATA, STEPS, lowest_value
from rtsseg.polygons import (
    NEAR,
    Mosaic,
    ProbabilityMap,
    compare_known,
    find_mosaics,
    find_objects,
    geodesic_measures,
    map_polygons,
    read_maps,
    scene_texts,
    simplify_outlines,
)
from rtsseg.prediction import predict
from rtsseg.raster import Grid
from rtsseg.styles import ramp_style, write_style

CUTS = [.5, .6, .8]
LOW = lowest_value(CUTS[0])
EIGHT = np.ones((3, 3))

def draw_values(seed, height, width, sigma, share):
    "Random blobs, holes, specks and nodata"
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(height, width)), sigma)
    ranks = smooth.ravel().argsort().argsort().reshape(height, width) / smooth.size
    values = np.rint(STEPS * np.clip(ranks - .5 + share, 0, 1)).astype('uint16')
    values[ndimage.gaussian_filter(rng.normal(size=(height, width)), 2) > .25] = NODATA
    return values

values_of_maps = st.builds(draw_values, st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 60),
                           st.sampled_from([0., .7, 2.]), st.floats(.1, .8))

def whole_map(values):
    "Objects as rasterio finds them on the whole array, each dissolved"
    mask = (values >= LOW) & (values != NODATA)
    found = rasterio.features.shapes(mask.astype('uint8'), mask=mask, connectivity=8)
    return [shapely.make_valid(shapely.geometry.shape(one)) for one, _ in found]

def same_tables(one, other):
    "Whether two tables of objects hold the same, to the last bit"
    assert shapely.equals_exact(one.outline.to_numpy(), other.outline.to_numpy()).all()
    assert one.drop(columns=['outline', 'maps']).equals(other.drop(columns=['outline', 'maps']))

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('maps')

@given(values_of_maps, st.integers(1, 64))
@settings(max_examples=50)
def test_strips_leave_no_trace(folder, values, rows):
    "Geometry and numbers are those of the whole array"
    maps = read_maps([write_probability(folder/'strips.tif', values)])
    found = find_objects(maps, CUTS, rows)
    expected = whole_map(values)
    assert len(found) == len(expected)
    if not expected:
        return
    outlines = found.outline.to_numpy()
    assert shapely.is_valid(outlines).all()
    assert (shapely.equals(outlines[:, None], np.array(expected)[None]).sum(1) == 1).all()
    same_tables(found, find_objects(maps, CUTS, len(values)))

@given(values_of_maps, st.integers(1, 64))
def test_numbers_are_those_of_scipy(folder, values, rows):
    found = find_objects(read_maps([write_probability(folder/'numbers.tif', values)]), CUTS, rows)
    labels, count = ndimage.label((values >= LOW) & (values != NODATA), EIGHT)
    index = range(1, count + 1)
    assert len(found) == count
    assert found.pixels.tolist() == np.bincount(labels.ravel())[1:].tolist()
    if not count:
        return
    assert found.total.tolist() == ndimage.sum(values.astype(float), labels, index).tolist()
    assert found.peak.tolist() == ndimage.maximum(values, labels, index).tolist()
    reached = values >= lowest_value(CUTS[2])
    assert found.reached_2.tolist() == ndimage.sum(reached, labels, index).tolist()
    bare = np.pad(values == NODATA, NEAR, constant_values=True)
    edge = np.pad(np.zeros_like(labels, bool), NEAR, constant_values=True)
    labels = np.pad(labels, NEAR)
    for number, row in enumerate(found.itertuples(), 1):
        own = labels == number
        ring = ndimage.binary_dilation(own, EIGHT, NEAR) & ~own
        assert row.nodata_share == (bare & ring).sum() / ring.sum()
        assert row.at_edge == (ndimage.binary_dilation(own, EIGHT) & edge).any()

@given(values_of_maps, st.data())
@settings(max_examples=50)
def test_maps_that_are_cut_apart_are_joined(folder, values, data):
    "With any overlap, in any order"
    height, width = values.shape
    row, column = data.draw(st.integers(1, max(height - 1, 1))), data.draw(st.integers(1, max(width - 1, 1)))
    extra = data.draw(st.integers(0, 5))
    paths = []
    for i, (top, bottom) in enumerate([(0, row), (max(row - extra, 0), height)]):
        for j, (left, right) in enumerate([(0, column), (max(column - extra, 0), width)]):
            if top < bottom and left < right:
                path = folder/f'part{i}{j}.tif'
                place = GRID @ Affine.translation(left, top)
                paths.append(write_probability(path, values[top:bottom, left:right], transform=place))
    # the grid counts from the first map
    others = data.draw(st.permutations(paths[1:]))
    joined = find_objects(read_maps([paths[0], *others]), CUTS, data.draw(st.integers(1, 64)))
    same_tables(joined, find_objects(read_maps([write_probability(folder/'all.tif', values)]), CUTS))

def test_the_last_map_with_data_counts(tmp_path):
    first, last = np.full((2, 10, 10), round(.9 * STEPS), 'uint16')
    last[:, :5], last[:, 5:] = NODATA, round(.6 * STEPS)
    paths = [write_probability(tmp_path/'first.tif', first, dict(model='a', scene_name='one', scene_date='2026-07-01')),
             write_probability(tmp_path/'last.tif', last, dict(model='b', scene_name='two', scene_date='2025-07-01'))]
    for order, mean in ((paths, .75), (paths[::-1], .9)):
        map_polygons(order, tmp_path/'out.gpkg', force=True)
        (row,) = gpd.read_file(tmp_path/'out.gpkg').itertuples()
        assert row.mean_probability == pytest.approx(mean, abs=1e-4)
        # names and dates pair, the earlier scene first
        assert row.BaseMapID == ('two,one' if mean == .75 else 'one')
        assert row.BaseMapDate == ('2025-07-01,2026-07-01' if mean == .75 else '2026-07-01')

def test_maps_far_apart_are_read_by_themselves(tmp_path):
    "The ground between them is never read, and objects are numbered over all"
    values = draw_values(0, 40, 40, 2., .3)
    near = write_probability(tmp_path/'near.tif', values)
    far = write_probability(tmp_path/'far.tif', values, transform=GRID @ Affine.translation(10**6, 10**6))
    found = find_objects(read_maps([near, far]), CUTS)
    alone = find_objects(read_maps([near]), CUTS)
    assert found.pixels.tolist() == 2 * alone.pixels.tolist()

@given(values_of_maps, st.floats(.1, 20))
@settings(max_examples=50)
def test_simplified_borders_do_not_cross(folder, values, simplify):
    outlines = np.array(whole_map(values), object)
    found = find_objects(read_maps([write_probability(folder/'simple.tif', values)]), CUTS)
    simple = simplify_outlines(found.outline.to_numpy(), simplify)
    assert len(simple) == len(outlines)
    if len(simple):
        assert shapely.is_valid(simple).all()
        assert shapely.area(shapely.union_all(simple)) == pytest.approx(shapely.area(simple).sum(), abs=1e-6)
        rings = [shapely.get_num_interior_rings(shapely.get_parts(some)).sum() for some in (found.outline, simple)]
        assert rings[0] == rings[1]

@given(st.floats(60, 80), st.floats(-180, 180), st.floats(25, 2500), st.integers(3, 40), st.integers(0, 2**32 - 1))
def test_areas_are_those_of_geographiclib(lat, lon, radius, corners, seed):
    "From 50 m to 5 km, within a millionth"
    rng = np.random.default_rng(seed)
    angle = 2 * np.pi * (np.arange(corners) + rng.uniform(0, .7, corners)) / corners
    reach = np.degrees(radius * rng.uniform(.5, 1, corners) / 6_371_000)
    points = np.stack([lon + reach * np.cos(angle) / np.cos(np.radians(lat)), lat + reach * np.sin(angle)], 1)
    polygon = shapely.Polygon(points)
    np.testing.assert_allclose(np.concatenate(geodesic_measures([polygon])), GEOD.geometry_area_perimeter(polygon),
                               rtol=1e-6)

def test_a_predicted_map_becomes_polygons(tmp_path):
    "What rtsseg-predict writes is read; files are what other libraries expect"
    scene, out = write_scene(tmp_path/'scene.tif', noise_image(100, 130)), tmp_path/'slumps.gpkg'
    note = predict(untrained_model(tmp_path/'model'), scene, tmp_path/'map.tif', device='cpu')
    with pytest.raises(DataError, match='raw scores'):
        map_polygons(tmp_path/'map.tif', out)
    assert not out.exists()
    made = map_polygons(tmp_path/'map.tif', out, threshold=.5)
    with rasterio.open(tmp_path/'map.tif') as ds:
        count = len(whole_map(ds.read(1)))
    assert made['polygons'] == count > 0
    polygons = gpd.read_file(out)
    assert set(polygons.model) == {note['model']}
    assert (polygons.geom_type == 'MultiPolygon').all()
    metadata = json.loads(pyarrow.parquet.read_metadata(tmp_path/'slumps.parquet').metadata[b'geo'])
    assert metadata['version'] == '1.1.0'
    assert 'bbox' in metadata['columns']['geometry']['covering']
    box = polygons.geometry.iloc[0].bounds
    part = gpd.read_parquet(tmp_path/'slumps.parquet', bbox=box)
    assert 0 < len(part) == polygons.intersects(shapely.box(*box)).sum()

def test_a_style_colours_each_polygon_of_its_files(tmp_path):
    """As QGIS reads a graduated renderer: the column is in the file, each class takes a symbol of its own, and what
    lies in none of them is not drawn; an object of the lowest value that counts as well"""
    # rounded up to the threshold, which it does not reach
    lowest = lowest_value(.3)
    assert lowest / STEPS < .3
    values = np.zeros((20, 30), 'uint16')
    values[2:6, 2:6], values[2:6, 10:14], values[2:6, 20:24] = lowest, 40_000, STEPS
    out = tmp_path/'objects.gpkg'
    map_polygons(write_probability(tmp_path/'map.tif', values), out, .3)
    root = fromstring(out.with_suffix('.qml').read_text())
    assert (root.tag, root.get('styleCategories')) == ('qgis', 'Symbology')
    renderer = root.find('renderer-v2')
    assert (renderer.get('type'), renderer.get('graduatedMethod')) == ('graduatedSymbol', 'GraduatedColor')
    classes, symbols = renderer.findall('ranges/range'), renderer.findall('symbols/symbol')
    assert [one.get('symbol') for one in classes] == [symbol.get('name') for symbol in symbols]
    limits = [(float(one.get('lower')), float(one.get('upper'))) for one in classes]
    assert [low for low, _ in limits[1:]] == [high for _, high in limits[:-1]]
    assert {symbol.get('type') for symbol in symbols} == {'fill'}
    assert {symbol.find('layer').get('class') for symbol in symbols} == {'SimpleFill'}
    assert gpd.list_layers(out).name.tolist() == [out.stem]
    for polygons in (gpd.read_file(out), gpd.read_parquet(out.with_suffix('.parquet'))):
        assert len(polygons) == 3
        drawn = [any(low <= value <= high for low, high in limits) for value in polygons[renderer.get('attr')]]
        assert all(drawn)

def test_an_empty_map_gives_valid_empty_files(tmp_path):
    for name, values in (('zero', np.zeros((20, 30), 'uint16')), ('nodata', np.full((20, 30), NODATA, 'uint16'))):
        path, out = write_probability(tmp_path/f'{name}.tif', values), tmp_path/f'{name}.gpkg'
        assert map_polygons(path, out, simplify=1.)['polygons'] == 0
        for again in (gpd.read_file(out), gpd.read_parquet(out.with_suffix('.parquet'))):
            assert len(again) == 0
            assert again.crs == 'EPSG:3413'
            assert {'UID', 'Area', 'mean_probability'} <= set(again.columns)

def test_all_that_is_wrong_with_maps_is_said_once(tmp_path):
    values = draw_values(0, 20, 20, 2., .3)
    good = write_probability(tmp_path/'good.tif', values)
    bad = [
        write_probability(tmp_path/'shifted.tif', values, transform=GRID @ Affine.translation(.3, 0)),
        write_probability(tmp_path/'coarse.tif', values, transform=GRID @ Affine.scale(1.001)),
        write_probability(tmp_path/'other.tif', values, crs='EPSG:3857'),
        write_probability(tmp_path/'unnamed.tif', values, crs=None),
        write_scene(tmp_path/'scene.tif', noise_image(9, 9)),
        tmp_path/'missing.tif',
    ]
    with pytest.raises(DataError) as caught:
        map_polygons([good, *bad], tmp_path/'out.gpkg')
    for path in bad:
        assert path.name in str(caught.value)
    assert list(tmp_path.glob('out*')) == []

def test_files_that_exist_are_kept(tmp_path):
    path = write_probability(tmp_path/'map.tif', draw_values(0, 20, 20, 2., .3))
    (tmp_path/'out.qml').write_text('mine')
    with pytest.raises(ConfigError, match='out.qml exists'):
        map_polygons(path, tmp_path/'out.gpkg')
    assert (tmp_path/'out.qml').read_text() == 'mine'
    assert map_polygons(path, tmp_path/'out.gpkg', force=True)['polygons'] > 0
    # a map keeps the style that QGIS finds for both
    write_style(path, ramp_style(1))
    before = (tmp_path/'map.qml').read_text()
    for force in (False, True):
        assert map_polygons(path, tmp_path/'map.gpkg', force=force)['files'] == ['map.gpkg', 'map.parquet']
    assert (tmp_path/'map.qml').read_text() == before

@pytest.mark.parametrize('damage, words', [
    (lambda layer: layer.set_crs(None, allow_override=True), 'names no CRS'),
    (lambda layer: layer.set_geometry(layer.centroid), 'not polygons alone'),
    (lambda layer: layer.rename(columns=dict(region='Region')), "did you mean 'Region'"),
])
def test_a_layer_of_known_objects_is_checked(tmp_path, damage, words):
    path = write_probability(tmp_path/'map.tif', draw_values(0, 20, 20, 2., .3))
    layer = gpd.GeoDataFrame(dict(region=['a']), geometry=[shapely.box(0, 0, 9, 9)], crs='EPSG:3413')
    damage(layer).to_parquet(tmp_path/'known.parquet')
    with pytest.raises(DataError, match=words):
        map_polygons(path, tmp_path/'out.gpkg', known=tmp_path/'known.parquet', region='region')

def test_a_map_knows_all_of_its_own_polygons(tmp_path):
    path = write_probability(tmp_path/'map.tif', draw_values(1, 60, 60, 2., .3))
    count = map_polygons(path, tmp_path/'known.gpkg')['polygons']
    known = gpd.read_file(tmp_path/'known.gpkg')
    table = compare_known(known, known.to_crs('EPSG:4326'))
    assert table.set_index('size').loc['all', ['known', 'found', 'missed', 'new']].tolist() == [count, count, 0, 0]
    half = known.iloc[::2]
    table = compare_known(half, known).set_index('size')
    assert table.loc['all', ['found', 'missed']].tolist() == [len(half), count - len(half)]

def test_known_objects_without_data_are_unseen(tmp_path):
    "In a gap, beside the map, at the edge of a gap, smaller than a pixel, and all over"
    values = np.full((40, 60), 100, 'uint16')
    values[:, 20:40] = NODATA
    values[10:20, 45:55] = STEPS
    boxes = dict(gap=(22, 5, 38, 30), beside=(70, 5, 80, 20), edge=(19.5, 5, 30, 10), speck=(5.2, 5.2, 5.4, 5.4),
                 lost=(30.2, 5.2, 30.4, 5.4), found=(46, 12, 50, 15), over=(-9, 25, 90, 70))
    pixels = [shapely.box(*corners) for corners in boxes.values()]
    outlines = [shapely.affinity.affine_transform(box, GRID.to_shapely()) for box in pixels]
    gpd.GeoDataFrame(geometry=outlines, crs=CRS).to_file(tmp_path/'known.gpkg')
    whole = write_probability(tmp_path/'whole.tif', values)
    parts = [write_probability(tmp_path/f'{left}.tif', values[:, left:left + 30],
                               transform=GRID @ Affine.translation(left, 0)) for left in (0, 30)]
    for maps in ([whole], parts):
        made = map_polygons(maps, tmp_path/'out.gpkg', .5, known=tmp_path/'known.gpkg', force=True)
        row = made['known'][-1]
        # beside the map there is nothing to see or to miss
        assert [row[name] for name in ('known', 'found', 'missed', 'new', 'unseen')] == [4, 1, 3, 0, 2]

def test_scenes_and_dates_pair():
    "Also where one date, or one name, is that of several scenes"
    def scenes(*pairs):
        maps = placed_maps([(0, 0)] * len(pairs), [(1, 1)] * len(pairs))
        return scene_texts([replace(one, date=date, settings=dict(scene_name=name))
                            for one, (name, date) in zip(maps, pairs, strict=True)])
    assert scenes(('a', '2026-07-01'), ('b', '2025-07-01'), ('a', '2026-07-01')) == ('b,a', '2025-07-01,2026-07-01')
    assert scenes(('b', '2025-07-01'), ('a', '2025-07-01')) == ('a,b', '2025-07-01,2025-07-01')
    assert scenes(('a', '2026-07-01'), ('', '2025-07-01')) == (',a', '2025-07-01,2026-07-01')
    assert scenes(('a', ''), ('b', '')) == ('a,b', '')

def placed_maps(corners, sizes):
    "Maps without files, at these left and upper corners, of these heights and widths"
    return [ProbabilityMap(Path(f'{i}.tif'), Grid(size, None, GRID), 1 / STEPS, NODATA, {}, '', *corner)
            for i, (corner, size) in enumerate(zip(corners, sizes, strict=True))]

sides = st.tuples(st.integers(1, 30), st.integers(1, 30))

@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200), sides), min_size=1, max_size=40))
def test_maps_that_reach_each_other_are_read_together(places):
    "The groups of a plain search over all pairs: at most `NEAR` columns, and rows, lie between two maps"
    maps = placed_maps([place[:2] for place in places], [place[2] for place in places])
    def gap(a, b):
        return max(b.left - a.left - a.grid.shape[1], b.top - a.top - a.grid.shape[0])
    group = list(range(len(maps)))
    for i, a in enumerate(maps):
        for j, b in enumerate(maps[:i]):
            if max(gap(a, b), gap(b, a)) <= NEAR:
                group = [group[j] if number == group[i] else number for number in group]
    expected = {frozenset(i for i, number in enumerate(group) if number == own) for own in group}
    assert {frozenset(mosaic.maps) for mosaic in find_mosaics(maps)} == expected

def test_as_many_maps_as_the_arctic_has():
    "70,000 maps in a grid are one mosaic; of maps that lie apart each is its own"
    rows, columns = np.divmod(np.arange(70_000), 280)
    for step, count in ((20, 1), (30, 70_000)):
        maps = placed_maps(zip((step * columns).tolist(), (step * rows).tolist()), [(20, 20)] * 70_000)
        tracemalloc.start()
        assert len(find_mosaics(maps)) == count
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # a byte for each pair would be 4.9 GB
        assert peak < 500e6

def test_the_number_of_a_map_may_be_large(tmp_path):
    "Two maps beside each other that are the last of 70,000"
    pair = read_maps([write_probability(tmp_path/'left.tif', np.full((4, 5), 7, 'uint16')),
                      write_probability(tmp_path/'right.tif', np.full((4, 5), 8, 'uint16'),
                                        transform=GRID @ Affine.translation(5, 0))])
    mosaic = Mosaic(placed_maps([(0, 0)] * 69_998, [(1, 1)] * 69_998) + pair, [69_998, 69_999])
    values, origin, _ = mosaic.read(0, 4)
    assert (origin == np.where(values == 7, 69_998, 69_999)).all()

def test_memory_does_not_grow_with_the_height(tmp_path):
    "A map four times as high, with objects in its first rows only"
    peaks = []
    for height in (2000, 8000):
        values = np.zeros((height, 500), 'uint16')
        values[:200] = draw_values(0, 200, 500, 3., .2)
        maps = read_maps([write_probability(tmp_path/f'{height}.tif', values)])
        tracemalloc.start()
        find_objects(maps, CUTS, 250)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.05 * peaks[0]
