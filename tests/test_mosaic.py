"Mosaics: a map that is cut apart is itself again, VRTs come back as they were written, and hostile ones are refused"
import json
import shutil

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.transform import Affine

from helpers.maps import CRS, GRID, noise, read_map, untrained_model, write_probability, write_scene
from rtsseg.areas import expected_area
from rtsseg.config import ConfigError
from rtsseg.console import DataError
from rtsseg.mapcheck import map_check
from rtsseg.mapfile import NODATA, STEPS, lowest_value, note_path, open_map
from rtsseg.mosaic import write_mask, write_mosaic
from rtsseg.polygons import map_polygons
from rtsseg.prediction import predict
from rtsseg.preview import preview, read_overview
from rtsseg.raster import open_raster, write_raster
from rtsseg.vrt import Vrt, VrtBand, VrtSource, open_named, parse_vrt, raster_digest, read_vrt, vrt_xml

CALIBRATION = dict(promise='calibrated', ratio='1:200', method='temperature', slope=1., intercept=0.,
                   thresholds={'1:200': .5}, objects={}, regions={})

def draw_values(seed, height, width):
    "Random values, a quarter of them nodata"
    rng = np.random.default_rng(seed)
    values = rng.integers(0, STEPS + 1, (height, width)).astype('uint16')
    values[rng.random((height, width)) < .25] = NODATA
    return values

values_of_maps = st.builds(draw_values, st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(2, 40))

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('mosaic')

def write_dated(path, values, date='', **place):
    "A map with a calibration, and a note with the date of its scene"
    write_probability(path, values, dict(calibration=CALIBRATION), **place)
    note_path(path).write_text(json.dumps(dict(scene_name=path.stem, scene_date=date)))
    return path

def cut_apart(folder, values, row, column, extra=0):
    "Four maps of a map, which overlap by some pixels"
    height, width = values.shape
    paths = []
    for i, (top, bottom) in enumerate([(0, row), (max(row - extra, 0), height)]):
        for j, (left, right) in enumerate([(0, column), (max(column - extra, 0), width)]):
            place = GRID @ Affine.translation(left, top)
            paths.append(write_dated(folder/f'part{i}{j}.tif', values[top:bottom, left:right], transform=place))
    return paths

def read_whole(path):
    "The values of a map"
    with open_map(path, 512) as one:
        return np.concatenate([one.codes(strip) for strip in one.strips(7)])

@given(values_of_maps, st.data())
@settings(max_examples=20)
def test_a_map_that_is_cut_apart_is_itself_again(folder, values, data):
    height, width = values.shape
    row, column = data.draw(st.integers(1, height - 1)), data.draw(st.integers(1, width - 1))
    paths = data.draw(st.permutations(cut_apart(folder, values, row, column, data.draw(st.integers(0, 4)))))
    made = write_mosaic(paths, folder/'region.vrt', overlap='last')
    assert (made['height'], made['width']) == (height, width)
    assert (read_whole(folder/'region.vrt') == values).all()
    with rasterio.open(folder/'region.vrt') as ds:
        # without this library
        assert (ds.read(1) == values).all()
        assert (ds.nodata, ds.crs, ds.scales) == (NODATA, CRS, (1 / STEPS,))
        assert ds.transform.almost_equals(GRID, 1e-6)
    whole = write_dated(folder/'whole.tif', values)
    for path in (whole, folder/'region.vrt'):
        map_polygons(path, folder/f'{path.stem}.gpkg', force=True)
    first, second = (gpd.read_file(folder/f'{name}.gpkg') for name in ('whole', 'region'))
    assert shapely.equals_exact(first.geometry.to_numpy(), second.geometry.to_numpy(), 1e-6).all()
    for name in ('mean_probability', 'max_probability', 'nodata_share', 'at_edge'):
        assert first[name].tolist() == second[name].tolist()

@given(values_of_maps, values_of_maps, st.integers(-50, 50), st.integers(-50, 50), st.booleans())
@settings(max_examples=20)
def test_the_later_date_lies_on_top(folder, old, new, across, down, swapped):
    "In whichever order maps are named; nodata where neither has data"
    paths = [write_dated(folder/'old.tif', old, '2024-07-01'),
             write_dated(folder/'new.tif', new, '2025-07-01', transform=GRID @ Affine.translation(across, down))]
    write_mosaic(paths[::-1] if swapped else paths, folder/'dated.vrt')
    top, left = min(down, 0), min(across, 0)
    expected = np.full((max(len(old), len(new) + down) - top, max(old.shape[1], new.shape[1] + across) - left), NODATA,
                       'uint16')
    for values, (y, x) in ((old, (-top, -left)), (new, (down - top, across - left))):
        part = expected[y:y + len(values), x:x + values.shape[1]]
        np.copyto(part, values, where=values != NODATA)
    assert (read_whole(folder/'dated.vrt') == expected).all()

def test_a_mosaic_moves_with_its_maps(tmp_path):
    values = draw_values(0, 20, 20)
    (tmp_path/'a'/'maps').mkdir(parents=True)
    paths = cut_apart(tmp_path/'a'/'maps', values, 9, 12)
    write_mosaic(paths, tmp_path/'a'/'region.vrt', overlap='last')
    before = raster_digest(tmp_path/'a'/'region.vrt')
    shutil.move(tmp_path/'a', tmp_path/'b')
    assert (read_whole(tmp_path/'b'/'region.vrt') == values).all()
    assert raster_digest(tmp_path/'b'/'region.vrt') == before
    write_dated(tmp_path/'b'/'maps'/'part11.tif', draw_values(1, 11, 8), transform=GRID @ Affine.translation(12, 9))
    assert raster_digest(tmp_path/'b'/'region.vrt') != before

def test_rooms_take_a_mosaic_as_a_map(tmp_path, capsys):
    "Areas, preview, check and mask of a mosaic are those of the whole map"
    values = draw_values(0, 64, 64)
    write_mosaic(cut_apart(tmp_path, values, 32, 32), tmp_path/'region.vrt', overlap='last')
    whole = write_dated(tmp_path/'whole.tif', values)
    found = {path.stem: expected_area(path, tmp_path/f'{path.stem}_area.tif', cell=30) for path in
             (whole, tmp_path/'region.vrt')}
    assert found['region']['expected_km2'] == pytest.approx(found['whole']['expected_km2'], rel=1e-9)
    overviews = [read_overview(path, 64).probability for path in (whole, tmp_path/'region.vrt')]
    np.testing.assert_array_equal(*overviews)
    assert preview(tmp_path/'region.vrt', tmp_path/'region.html')['polygons'] == 0
    checked = map_check([tmp_path/'region.vrt'])
    assert checked.verdict
    # windows begin elsewhere in each map
    assert [one.value for one in checked.findings if one.what == 'seams'] == ['not checked']
    masks = [write_mask(path, tmp_path/f'{path.stem}_mask.tif') for path in (whole, tmp_path/'region.vrt')]
    assert (read_map(tmp_path/'region_mask.tif') == read_map(tmp_path/'whole_mask.tif')).all()
    assert masks[0]['predicted'] == masks[1]['predicted']

@given(values_of_maps, st.floats(.01, .99))
@settings(max_examples=20)
def test_a_mask_is_the_comparison(folder, values, threshold):
    path = write_dated(folder/'masked.tif', values)
    made = write_mask(path, folder/'mask.tif', threshold)
    mask = read_map(folder/'mask.tif')
    expected = np.where(values == NODATA, 255, values >= lowest_value(threshold))
    assert (mask == expected).all()
    assert [made[name] for name in ('predicted', 'other', 'nodata')] == [(expected == k).sum() for k in (1, 0, 255)]

def test_overviews_of_a_mask_hold_its_values(tmp_path):
    values = np.repeat(np.repeat(draw_values(0, 80, 80), 16, 0), 16, 1)
    write_mask(write_dated(tmp_path/'map.tif', values), tmp_path/'mask.tif')
    with rasterio.open(tmp_path/'mask.tif') as ds:
        assert ds.overviews(1)
        small = ds.read(1, out_shape=(ds.height // 2, ds.width // 2))
    assert (small == read_map(tmp_path/'mask.tif')[::2, ::2]).all()

def test_what_is_no_mosaic_is_refused(tmp_path):
    values = draw_values(0, 20, 20)
    good = write_dated(tmp_path/'good.tif', values)
    model = write_probability(tmp_path/'model.tif', values, dict(model='1' * 64, calibration=CALIBRATION))
    shifted = write_dated(tmp_path/'shifted.tif', values, transform=GRID @ Affine.translation(.3, 0))
    other = write_dated(tmp_path/'crs.tif', values, crs='EPSG:3857')
    out = tmp_path/'out.vrt'
    for maps, words in [([good, model], 'model.tif was made with another model than good.tif'),
                        ([good, shifted], 'shifted.tif lies on another grid'),
                        ([good, other], 'crs.tif has CRS EPSG:3857'),
                        ([good, good], 'good.tif is named twice'),
                        ([good, tmp_path/'missing.tif'], 'missing.tif: no such file')]:
        with pytest.raises(DataError, match=words):
            write_mosaic(maps, out, overlap='last')
    undated = write_dated(tmp_path/'undated.tif', values)
    with pytest.raises(DataError, match='undated.tif: the date of the scene is not known'):
        write_mosaic([good, undated], out)
    with pytest.raises(ConfigError, match='overlap'):
        write_mosaic([good], out, overlap='highest')
    assert not out.exists()
    out.write_text('mine')
    with pytest.raises(DataError, match='out.vrt exists'):
        write_mosaic([good], out, overlap='last')
    assert out.read_text() == 'mine'
    assert write_mosaic([good], out, overlap='last', force=True)['maps'] == 1

# ---------------------------------------------------------------- VRTs of others
names = st.sampled_from(['a.tif', 'b.tif', 'sub/c.tif', "odd & <name> 'x'.tif"])
small = st.integers(0, 1000)
sources = st.builds(lambda name, band, part, place, nodata, masked: (name, band, part, place, nodata, masked), names,
                    st.integers(1, 4), st.tuples(small, small, small, small), st.tuples(small, small),
                    st.sampled_from([None, '0', '65535', 'nan']), st.booleans())
numbers = st.floats(-1e7, 1e7).filter(lambda x: x == 0 or abs(x) > 1e-9)
text = st.text(st.characters(codec='utf-8', categories=['L', 'N', 'P', 'S']), max_size=8)
bands = st.builds(lambda dtype, name, nodata, colour, found: (dtype, name, nodata, colour, found),
                  st.sampled_from(['Byte', 'UInt16', 'Float32']), text, st.sampled_from([None, '0', '255']),
                  st.sampled_from(['', 'Red', 'Alpha']), st.lists(sources, min_size=1, max_size=3))

@given(st.integers(1, 10**6), st.integers(1, 10**6), st.tuples(*[numbers] * 6), st.lists(bands, min_size=1, max_size=4),
       st.dictionaries(text.filter(bool), text, max_size=3), st.booleans())
@settings(max_examples=30)
def test_a_vrt_comes_back_as_it_was_written(folder, width, height, transform, bands, tags, relative):
    home = folder/'home'
    (home/'sub').mkdir(parents=True, exist_ok=True)
    found = []
    for dtype, name, nodata, colour, parts in bands:
        for file, *_ in parts:
            (home/file).touch()
        found.append(VrtBand(dtype, name, nodata, colour, '1', '0',
                             [VrtSource(home/file, *rest) for file, *rest in parts]))
    crs = rasterio.crs.CRS.from_string(CRS).to_wkt()
    vrt = Vrt(width, height, crs, Affine(*transform), found, tags)
    data = vrt_xml(vrt, home if relative else None)
    assert parse_vrt(data, home if relative else folder) == vrt

def scene_parts(folder, image):
    "Two overlapping halves of an image as GeoTIFFs, and a mosaic of them"
    halves = [write_scene(folder/'left.tif', image[:, :, :80]),
              write_scene(folder/'right.tif', image[:, :, 60:], transform=GRID @ Affine.translation(60, 0))]
    height, width = image.shape[1:]
    bands = []
    for band, colour in enumerate(['Red', 'Green', 'Blue'], 1):
        parts = [VrtSource(halves[0], band, (0, 0, 80, height), (0, 0), '0', False),
                 VrtSource(halves[1], band, (0, 0, width - 60, height), (60, 0), '0', False)]
        bands.append(VrtBand('Byte', '', '0', colour, '1', '0', parts))
    vrt = Vrt(width, height, rasterio.crs.CRS.from_string(CRS).to_wkt(), GRID, bands, {})
    (folder/'scene.vrt').write_bytes(vrt_xml(vrt, folder))
    return folder/'scene.vrt'

def test_a_scene_may_be_a_vrt_that_the_user_names(tmp_path):
    "Its map has the pixels of that of the whole scene, and is made again where a file changed"
    image = noise(100, 130)
    model, scene = untrained_model(tmp_path/'model'), scene_parts(tmp_path, image)
    write_scene(tmp_path/'scene.tif', image)
    for name in ('scene.tif', 'scene.vrt'):
        predict(model, tmp_path/name, tmp_path/f'map_{name[-3:]}.tif', device='cpu')
    assert (read_map(tmp_path/'map_tif.tif') == read_map(tmp_path/'map_vrt.tif')).all()
    note = json.loads(note_path(tmp_path/'map_vrt.tif').read_text())
    assert note['scene'] == raster_digest(scene)
    assert note['input']['valid'] == image[0].size
    write_scene(tmp_path/'left.tif', image[:, :, :80][:, ::-1])
    with pytest.raises(DataError, match=r'made with other settings \(scene\)'):
        predict(model, scene, tmp_path/'map_vrt.tif', device='cpu')
    with pytest.raises(DataError, match='is not a GeoTIFF'):
        with open_raster(scene):
            pass

@pytest.fixture(scope='module')
def hostile_home(tmp_path_factory):
    home = tmp_path_factory.mktemp('hostile')
    scene_parts(home, noise(20, 100))
    (home/'secret.txt').write_text('secret')
    (home/'inner.vrt').write_bytes((home/'scene.vrt').read_bytes())
    write_raster(home/'wide.tif', noise(20, 100).astype('uint16'), GRID, CRS, nodata=0)
    write_raster(home/'bare.tif', noise(20, 80), GRID, CRS)
    return home

PYTHON = '<PixelFunctionType>f</PixelFunctionType><PixelFunctionLanguage>Python</PixelFunctionLanguage>'

@pytest.mark.parametrize('old, new, words', [
    ('>left.tif<', '>/vsicurl/http://127.0.0.1:9/left.tif<', 'network path'),
    ('>left.tif<', '>http://127.0.0.1:9/left.tif<', 'network path'),
    ('>left.tif<', '>/vsizip/left.zip/left.tif<', 'network path or one of GDAL'),
    ('>left.tif<', '>/vsimem/left.tif<', 'network path or one of GDAL'),
    ('>left.tif<', '>GTIFF_DIR:1:left.tif<', 'no such file'),
    ('>left.tif<', '>NETCDF:"left.tif":x<', 'no such file'),
    ('>left.tif<', '>secret.txt<', 'secret.txt is not a GeoTIFF'),
    ('>left.tif<', '>inner.vrt<', 'inner.vrt is not a GeoTIFF'),
    ('>left.tif<', '>wide.tif<', 'wide.tif is UInt16, and the mosaic Byte'),
    ('>left.tif<', '>missing.tif<', 'no such file'),
    ('>left.tif<', '>.<', 'no such file'),
    ('<SourceBand>3<', '<SourceBand>9<', 'less than the mosaic takes of it'),
    ('<SourceBand>3<', '<SourceBand>mask,1<', 'whole numbers were expected'),
    ('<ColorInterp>Red', PYTHON + '<ColorInterp>Red', 'it holds PixelFunctionLanguage, PixelFunctionType'),
    ('dataType="Byte" band="1"', 'dataType="Byte" band="1" subClass="VRTRawRasterBand"', 'it holds subClass'),
    ('dataType="Byte" band="1"', 'dataType="Byte" band="1" subClass="VRTDerivedRasterBand"', 'it holds subClass'),
    ('rasterXSize="100"', 'rasterXSize="100" subClass="VRTWarpedDataset"', 'it holds subClass in VRTDataset'),
    ('<NODATA>0<', '<OpenOptions><OOI key="a">b</OOI></OpenOptions><NODATA>0<', 'it holds OpenOptions'),
    ('<NODATA>0<', '<LUT>0:9</LUT><NODATA>0<', 'it holds LUT'),
    ('<DstRect xOff="60"', '<DstRect xOff="90"', 'reaches beyond the mosaic'),
    ('<DstRect xOff="60"', '<DstRect xOff="-60"', 'whole numbers were expected'),
    ('<DstRect xOff="60"', '<DstRect xOff="nan"', 'whole numbers were expected'),
    ('<SRS>', '<SRS>/etc/hostname', 'EPSG:number or WKT'),
    ('rasterXSize="100"', 'rasterXSize="1000000000"', 'claims'),
    ('<VRTDataset', '<!DOCTYPE a [<!ENTITY b SYSTEM "secret.txt">]><VRTDataset', 'document type'),
    ('</VRTDataset>', '', 'is not XML'),
    ('VRTDataset', 'OGRVRTDataSource', 'and not a VRTDataset'),
    ('<NoDataValue>0</NoDataValue>', '', 'declares nodata 0, and the mosaic declares none'),
])
def test_hostile_vrts_are_refused(hostile_home, old, new, words):
    "No file is read but GeoTIFFs, no socket is opened, and nothing of GDAL's other powers is reached"
    text = (hostile_home/'inner.vrt').read_text()
    assert old in text
    path = hostile_home/'scene.vrt'
    path.write_text(text.replace(old, new))
    with pytest.raises(DataError, match=words):
        with open_named(path, rows=None if words == 'claims' else 10) as ds:
            ds.read(1)

def test_black_ground_is_not_made_up(hostile_home):
    "Pixels that no file has would be read as 0"
    text = (hostile_home/'inner.vrt').read_text().replace('<NoDataValue>0</NoDataValue>', '')
    path = hostile_home/'bare.vrt'
    bare = text.replace('left.tif', 'bare.tif').replace('right.tif', 'bare.tif').replace('xSize="40"', 'xSize="30"')
    path.write_text(bare)
    with pytest.raises(DataError, match='band 1 declares no nodata, and no file covers all of it'):
        read_vrt(path)
    path.write_text(bare.replace('xSize="30"', 'xSize="40"'))
    with open_named(path, rows=10) as ds:
        assert ds.read().shape == (3, 20, 100)

@given(st.binary(max_size=200), st.integers(0, 2000), st.integers(0, 40))
@settings(max_examples=60)
def test_damaged_xml_is_an_error_and_no_crash(hostile_home, junk, at, gone):
    data = (hostile_home/'inner.vrt').read_bytes()
    path = hostile_home/'damaged.vrt'
    path.write_bytes(data[:at] + junk + data[at + gone:])
    try:
        with open_named(path, rows=10) as ds:
            ds.read(1)
    except DataError:
        pass
