"Thresholds by region, parts and overlaps of maps: objects are those of the plain computation on whole arrays"
import json
from unittest import mock

import geopandas as gpd
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.transform import Affine
from scipy import ndimage

import rtsseg.polygons
from helpers.maps import CRS, GRID, read_map, write_probability
from rtsseg.config import ConfigError
from rtsseg.console import DataError
from rtsseg.mapfile import NODATA, STEPS, lowest_value
from rtsseg.mosaic import ObjectPixels, write_mask
from rtsseg.polygons import Search, find_objects, map_polygons, read_maps, read_probability_map, rule_columns
from rtsseg.regions import RegionLayer, Rule, read_region_layer

EIGHT = np.ones((3, 3))

def draw_values(seed, height, width):
    "Random blobs and nodata"
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(height, width)), 1.5)
    ranks = smooth.ravel().argsort().argsort().reshape(height, width) / smooth.size
    values = np.rint(STEPS * ranks).astype('uint16')
    values[ndimage.gaussian_filter(rng.normal(size=(height, width)), 2) > .25] = NODATA
    return values

maps_of_values = st.builds(draw_values, st.integers(0, 2**32 - 1), st.integers(1, 50), st.integers(1, 50))
rules_of_regions = st.lists(st.builds(Rule, st.sampled_from([.5, .6, .7, .8]), st.integers(0, 12), st.just('region')),
                            min_size=3, max_size=3)

def corners(*places):
    "A polygon in pixels of GRID, in its CRS"
    return shapely.Polygon([GRID @ place for place in places])

# two regions that share a slanted border, and a corner of none
LAYER = RegionLayer(['', 'west', 'east'], np.array([corners((0, 0), (30, 0), (15, 50), (0, 50)),
                                                    corners((30, 0), (50, 0), (50, 40), (18, 40))]), np.array([1, 2]))

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('regions')

def plain_objects(values, rules, codes):
    "Masks of objects, by whole arrays: [(first pixel, mask, region)]"
    is_data = values != NODATA
    low = is_data & (values >= lowest_value(min(rule.threshold for rule in rules)))
    labels, count = ndimage.label(low, EIGHT)
    found = []
    for number in range(1, count + 1):
        own = labels == number
        region = np.bincount(codes[own], minlength=len(rules)).argmax()
        kept, parts = ndimage.label(own & (values >= lowest_value(rules[region].threshold)), EIGHT)
        for part in range(1, parts + 1):
            mask = kept == part
            if mask.sum() >= rules[region].floor:
                found.append((tuple(np.argwhere(mask)[0]), mask, region))
    return sorted(found, key=lambda one: one[0])

@given(maps_of_values, rules_of_regions, st.integers(1, 60), st.integers(0, 4))
@settings(max_examples=30)
def test_thresholds_by_region_are_those_of_whole_arrays(folder, values, rules, rows, cut):
    "In strips of any height, in one map or two"
    paths = [write_probability(folder/'whole.tif', values)]
    if cut and cut < values.shape[1]:
        place = GRID @ Affine.translation(cut, 0)
        paths = [write_probability(folder/'left.tif', values[:, :cut + 3]),
                 write_probability(folder/'right.tif', values[:, cut:], transform=place)]
    search = Search(rules, LAYER)
    lowest = min(rule.threshold for rule in rules)
    found = rule_columns(find_objects(read_maps(paths), [lowest, .9, .95], rows, search), search)
    expected = plain_objects(values, rules, LAYER.codes_of(GRID, values.shape))
    assert list(zip(found.top, found.left)) == [first for first, _, _ in expected]
    assert found.pixels.tolist() == [mask.sum() for _, mask, _ in expected]
    assert found.total.tolist() == [values[mask].sum(dtype=int) for _, mask, _ in expected]
    assert found.region.tolist() == [LAYER.names[region] for _, _, region in expected]
    assert found.threshold.tolist() == [rules[region].threshold for _, _, region in expected]
    assert shapely.is_valid(found.outline.to_numpy()).all()
    assert shapely.area(found.outline.to_numpy()).tolist() == found.pixels.tolist()

@pytest.mark.parametrize('views, smallest', [('none', 80), ('none@0.5', 20), ('full@0.5-max', 20), ('none@0.1', 1)])
def test_floors_are_ground_of_the_tiles(tmp_path, views, smallest):
    "The floor of 80 pixels of a tile covers 80 · scale² pixels of a map at a scale; polygons and mask agree"
    values = np.zeros((40, 100), 'uint16')
    for column, pixels in ((0, smallest - 1), (50, smallest)):
        rows, columns = np.divmod(np.arange(pixels), 20)
        values[2 + rows, 2 + column + columns] = STEPS
    stored = dict(objects={'1:200': dict(threshold=.5, min_area=80)})
    path = write_probability(tmp_path/'map.tif', values, dict(views=views, calibration=stored))
    found = map_polygons(path, tmp_path/'objects.gpkg', points='objects')
    mask = write_mask(path, tmp_path/'mask.tif', points='objects')
    assert (found['polygons'], mask['predicted']) == (1, smallest)

@given(maps_of_values, st.sampled_from([.5, .8]))
@settings(max_examples=20)
def test_equal_rules_are_one_threshold(folder, values, threshold):
    maps = read_maps([write_probability(folder/'equal.tif', values)])
    cuts = [threshold, .9, .95]
    alone = find_objects(maps, cuts)
    found = find_objects(maps, cuts, search=Search([Rule(threshold)] * 3, LAYER))
    assert shapely.equals_exact(found.outline.to_numpy(), alone.outline.to_numpy()).all()
    assert found.drop(columns=['outline', 'rule']).equals(alone.drop(columns=['outline', 'rule']))

@given(maps_of_values, maps_of_values, st.sampled_from([.3, .6]), st.integers(1, 60), st.integers(-7, 7),
       st.sampled_from([1, 2, 3]))
@settings(max_examples=30)
def test_parts_are_sampled_at_the_centres_of_pixels(folder, values, other, threshold, rows, shift, factor):
    "On a grid that is moved, and of pixels that are longer"
    place = GRID @ Affine.translation(shift, shift) @ Affine.scale(factor)
    maps = read_maps([write_probability(folder/'map.tif', values)])
    parts = read_maps([write_probability(folder/'part.tif', other, transform=place)])
    search = Search([Rule(.5)], None, parts, [[Rule(threshold)]])
    found = rule_columns(find_objects(maps, [.5, .9, .95], rows, search), search)
    y, x = np.indices(values.shape)
    row, column = (y + .5 - shift) // factor, (x + .5 - shift) // factor
    row, column = row.astype(int), column.astype(int)
    on_part = (row >= 0) & (column >= 0) & (row < other.shape[0]) & (column < other.shape[1])
    sampled = np.full(values.shape, NODATA, 'uint16')
    sampled[on_part] = other[row[on_part], column[on_part]]
    sampled = np.where(sampled == NODATA, -1, sampled.astype(int))
    expected = plain_objects(values, [Rule(.5)], np.zeros(values.shape, int))
    highest = [sampled[mask].max() for _, mask, _ in expected]
    assert found.parts_seen.tolist() == [int(value >= 0) for value in highest]
    assert found.parts_agree.tolist() == [int(value >= lowest_value(threshold)) for value in highest]
    assert found.found_by.tolist() == ['part' if value >= lowest_value(threshold) else '' for value in highest]

@given(maps_of_values, maps_of_values, st.integers(-9, 9), st.integers(-9, 9), st.sampled_from([0., 2.]))
@settings(max_examples=25)
def test_overlaps_are_what_the_option_says(folder, first, second, across, down, simplify):
    place = GRID @ Affine.translation(across, down)
    paths = [write_probability(folder/'first.tif', first, dict(scene_date='2026-07-01')),
             write_probability(folder/'second.tif', second, dict(scene_date='2025-07-01'), transform=place)]
    top, left = min(down, 0), min(across, 0)
    shape = (max(len(first), len(second) + down) - top, max(first.shape[1], second.shape[1] + across) - left)
    planes = np.full((2, *shape), -1)
    for plane, values, (y, x) in zip(planes, (first, second), ((0, 0), (down, across))):
        plane[y - top:y - top + len(values), x - left:x - left + values.shape[1]] = np.where(
            values == NODATA, -1, values.astype(int))
    wanted = dict(
        last=np.where(planes[1] >= 0, planes[1], planes[0]),
        later=np.where(planes[0] >= 0, planes[0], planes[1]),
        highest=planes.max(0),
    )
    low = lowest_value(.6)
    for overlap, joined in wanted.items():
        found = find_objects(read_maps(paths, overlap), [.6, .8, .9], overlap=overlap)
        labels, _ = ndimage.label(joined >= low, EIGHT)
        totals = np.bincount(labels.ravel(), joined.ravel())[1:]
        assert sorted(found.total) == sorted(totals)
    made = map_polygons(paths, folder/'both.gpkg', .6, overlap='both', simplify=simplify, force=True)
    alone = [map_polygons(path, folder/'one.gpkg', .6, simplify=simplify, force=True) for path in paths]
    assert made['polygons'] == sum(one['polygons'] for one in alone)
    assert made['area'] == pytest.approx(sum(one['area'] for one in alone), rel=1e-9)
    if made['polygons']:
        found = gpd.read_file(folder/'both.gpkg')
        assert set(found.map_file) <= {'first.tif', 'second.tif'}
        assert set(found.BaseMapDate) <= {'2026-07-01', '2025-07-01'}

CALIBRATION = dict(
    thresholds={'1:200': .6},
    objects={'1:200': dict(threshold=.7, min_area=9)},
    regions=dict(west=dict(thresholds={'1:200': .5}, objects={'1:200': dict(threshold=.5, min_area=3)}),
                 east=dict(thresholds={'1:200': None}, objects={})),
)

def layer_file(path, names=('west', 'east')):
    "Regions of LAYER as a file in another CRS"
    frame = gpd.GeoDataFrame(dict(name=list(names)), geometry=list(LAYER.polygons), crs=CRS)
    frame.to_crs('EPSG:4326').to_file(path)
    return path

@pytest.mark.parametrize('points', ['pixels', 'objects'])
def test_each_polygon_says_where_its_threshold_is_from(tmp_path, points):
    values = draw_values(3, 50, 50)
    path = write_probability(tmp_path/'map.tif', values, dict(calibration=CALIBRATION))
    layer = layer_file(tmp_path/'layer.gpkg')
    made = map_polygons(path, tmp_path/'out.gpkg', regions=layer, region_column='name', points=points)
    overall = Rule(.6, 0) if points == 'pixels' else Rule(.7, 9)
    west = Rule(.5, 0) if points == 'pixels' else Rule(.5, 3)
    expected = plain_objects(values, [overall, west, overall], LAYER.codes_of(GRID, values.shape))
    found = gpd.read_file(tmp_path/'out.gpkg')
    assert found.region.fillna('').tolist() == [LAYER.names[region] for _, _, region in expected]
    assert set(found.region.dropna()) >= {'west', 'east'}
    own = found.region == 'west'
    assert found.threshold.tolist() == np.where(own, west.threshold, overall.threshold).tolist()
    assert found.threshold_from.tolist() == np.where(own, 'region', 'overall').tolist()
    assert [row['polygons'] for row in made['regions']] == [found.region.fillna('').eq(name).sum()
                                                            for name in LAYER.names]
    assert 'area_m2_threshold' in found
    assert json.dumps(made)
    write_mask(path, tmp_path/'mask.tif', regions=layer, region_column='name', points=points)
    whole = np.any([mask for _, mask, _ in expected], 0)
    np.testing.assert_array_equal(read_map(tmp_path/'mask.tif'), np.where(values == NODATA, 255, whole))

@given(maps_of_values, st.integers(1, 60))
@settings(max_examples=20)
def test_a_mask_does_not_depend_on_strips(folder, values, rows):
    "Nor do objects that end in an order of their own"
    rules = [Rule(.5), Rule(.6), Rule(.7, 4)]
    path = write_probability(folder/'strips.tif', values)
    one, search = read_probability_map(path), Search(rules, LAYER)
    with mock.patch.object(rtsseg.polygons, 'STRIP', rows * values.shape[1]):
        pixels = ObjectPixels(one, search)
    expected = np.zeros(values.shape, bool)
    for _, mask, _ in plain_objects(values, rules, LAYER.codes_of(GRID, values.shape)):
        expected |= mask
    found = [pixels.of_rows(top, values[top:top + 7]) for top in range(0, len(values), 7)]
    np.testing.assert_array_equal(np.concatenate(found), expected)

def test_parts_stand_in_the_files(tmp_path):
    "Each part is held against the threshold of its own calibration"
    values = np.zeros((20, 30), 'uint16')
    values[3:8, 3:8], values[10:15, 10:20] = round(.55 * STEPS), round(.9 * STEPS)
    paths = [write_probability(tmp_path/f'{name}.tif', plane) for name, plane in
             dict(map=values, same=values, half=values // 2, bare=np.full_like(values, NODATA)).items()]
    wanted = {'1:200': (['same', 'same'], [1, 1]), '1:20': (['same', 'same,half'], [1, 2])}
    for ratio, (names, counts) in wanted.items():
        map_polygons(paths[0], tmp_path/'out.gpkg', ratio=ratio, parts=paths[1:], force=True)
        found = gpd.read_file(tmp_path/'out.gpkg')
        assert found.found_by.tolist() == names
        assert found.parts_agree.tolist() == counts
        assert found.parts_seen.tolist() == [2, 2]

def test_what_is_refused(tmp_path):
    values = draw_values(3, 30, 30)
    path = write_probability(tmp_path/'map.tif', values, dict(calibration=CALIBRATION))
    plain = write_probability(tmp_path/'plain.tif', values)
    layer, out = layer_file(tmp_path/'layer.gpkg'), tmp_path/'out.gpkg'
    strange = layer_file(tmp_path/'strange.gpkg', ['north', 'south'])
    for arguments, error, words in [
            (dict(regions=layer), DataError, "no column 'region'"),
            (dict(regions=strange, region_column='name'), DataError, 'the layer has the regions north, south'),
            (dict(regions=layer, region_column='name', threshold=.5), ConfigError, 'leave one of them out'),
            (dict(points='object'), ConfigError, "did you mean 'objects'"),
            (dict(overlap='newest'), ConfigError, 'last, later, highest, both'),
            (dict(parts=['a/x.tif', 'b/x.tif']), ConfigError, 'x names two of them'),
    ]:
        with pytest.raises(error, match=words):
            map_polygons(path, out, **arguments)
    with pytest.raises(DataError, match='plain.tif says nothing of regions'):
        map_polygons(plain, out, regions=layer, region_column='name')
    with pytest.raises(DataError, match='plain.tif: the date of the scene is not known'):
        map_polygons([path, plain], out, overlap='later')
    with pytest.raises(DataError, match='several thresholds'):
        map_polygons([path, plain], out)
    bare = write_probability(tmp_path/'bare.tif', values, crs=None)
    with pytest.raises(DataError, match='no CRS'):
        map_polygons(bare, out, parts=[plain])
    assert not out.exists()

def test_a_layer_of_parallels_is_drawn_on_a_polar_grid(tmp_path):
    "A region whose border is a parallel ends there, also between its corners"
    box = gpd.GeoDataFrame(dict(region=['ring']), geometry=[shapely.box(-180, 70, 180, 75)], crs='EPSG:4326')
    box.to_parquet(tmp_path/'ring.parquet')
    layer = read_region_layer(tmp_path/'ring.parquet', 'region', 'EPSG:3413')
    area = shapely.area(layer.polygons).sum()
    radius = [np.hypot(*point) for point in shapely.get_coordinates(layer.polygons)]
    assert area == pytest.approx(np.pi * (max(radius)**2 - min(radius)**2), rel=1e-3)
