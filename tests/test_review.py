"Reviews of maps: units against plain arithmetic, the draw, pages, ratings that come back, and whether intervals hold"
import base64
import json
import re
import shutil
import subprocess

import cv2
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.transform import Affine, from_origin
from scipy.ndimage import gaussian_filter, label
from scipy.stats import binom

from helpers.browser import accessibility, in_browser, kept_browser
from helpers.maps import CRS, GRID
from rtsseg.config import ConfigError, ToySource
from rtsseg.console import DataError
from rtsseg.estimates import allocate
from rtsseg.files import FileError
from rtsseg.ground import transformer
from rtsseg.prediction import STEPS
from rtsseg.raster import write_raster
from rtsseg.regions import read_region_layer
from rtsseg.review import (
    REVIEW_SCRIPT,
    Rated,
    describe_strata,
    draw_units,
    estimate_review,
    map_cells,
    name_strata,
    read_ratings,
    review_page,
    review_read,
    review_sample,
    scene_factor,
)
from rtsseg.toy import scene

SIDE = 16

CALIBRATION = dict(thresholds={'1:200': .5})

def write_map(path, probability, valid=None, crs=CRS, transform=GRID, calibration=None):
    "A map as `rtsseg predict` writes it; `calibration` replaces parts of its tag; the path"
    valid = np.ones(probability.shape, bool) if valid is None else valid
    stored = np.where(valid, np.rint(STEPS * probability), 65535).astype('uint16')
    write_raster(path, stored[None], nodata=65535, crs=crs, transform=transform)
    with rasterio.open(path, 'r+') as ds:
        ds.scales = (1 / STEPS,)
        ds.update_tags(RTSSEG=json.dumps(dict(calibration=CALIBRATION | (calibration or {}))))
    return path

class World:
    "A toy scene, its truth, and a map with misses and false alarms"

    def __init__(self, folder, size=768):
        toy = scene(ToySource(regions=1, scene_size=size, prevalence=.03), 0)
        self.truth = toy.mask == 1
        noise = gaussian_filter(np.random.default_rng(0).normal(size=self.truth.shape), 10)
        logit = 10 * gaussian_filter(self.truth.astype(float), 2) - 5.5 + 2 * noise / noise.std()
        self.probability = 1 / (1 + np.exp(-logit))
        self.valid = toy.image.any(2)
        self.map = write_map(folder/'map.tif', self.probability, self.valid)
        self.scene = folder/'scene.tif'
        write_raster(self.scene, toy.image.transpose(2, 0, 1), crs=CRS, transform=GRID, nodata=0)

    def share(self, unit):
        "Share of a cell that the class covers"
        return float(self.truth[int(unit.row):int(unit.row + unit.height),
                                int(unit.column):int(unit.column + unit.width)].mean())

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp('world'))

@pytest.fixture
def sample(world, tmp_path):
    "A sample for two raters"
    review_sample(world.map, tmp_path/'review', world.scene, n=120, side=SIDE, least=8, raters=['ana', 'bo'], twice=.3)
    return tmp_path/'review'

def units_of(folder):
    return pd.read_csv(folder/'units.csv')

def truthful(world, folder, rater):
    "What a rater who knows the truth answers"
    answers = {}
    for unit in units_of(folder).itertuples():
        if rater in unit.raters.split():
            share = world.share(unit)
            answers[unit.unit] = dict(answer='yes', share=share, outline=False) if share else dict(
                answer='no', outline=False)
    return answers

def write_ratings(folder, rater, ratings, name=None, **changes):
    "A rater's file; the path"
    settings = json.loads((folder/'sample.json').read_text())
    content = dict(sample=settings['units_sha256'], rater=rater, made='2026-02-03T04:05:06Z', ratings=ratings) | changes
    path = folder/(name or f'ratings_{rater}.json')
    path.write_text(json.dumps(content))
    return path

def all_ratings(world, folder):
    return [write_ratings(folder, rater, truthful(world, folder, rater)) for rater in ('ana', 'bo')]

# ---------------------------------------------------------------- units

@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 17), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_cells_are_those_of_plain_arithmetic(tmp_path_factory, height, width, side, seed):
    rng = np.random.default_rng(seed)
    probability = np.clip(gaussian_filter(rng.normal(.4, 1, (height, width)), 1), 0, 1)
    valid = rng.random((height, width)) < .8
    path = write_map(tmp_path_factory.mktemp('cells')/'map.tif', probability, valid)
    shown = np.where(valid, np.rint(STEPS * probability) / STEPS, 0)
    objects, _ = label(valid & (shown >= .5), np.ones((3, 3)))
    sizes = np.bincount(objects.ravel())
    sizes[0] = 0
    expected = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            at = slice(top, top + side), slice(left, left + side)
            if valid[at].any():
                expected.append([top, left, *shown[at].shape, valid[at].sum(), shown[at].max(),
                                 shown[at].sum() / valid[at].sum(), sizes[objects[at]].max()])
    if not expected:
        return
    cells = map_cells(path, side, [.5])
    found = cells[['row', 'column', 'height', 'width', 'pixels', 'highest', 'mean', 'object']].to_numpy()
    np.testing.assert_allclose(found, np.array(expected), atol=1e-9)

def test_area_is_measured_on_the_ground(tmp_path):
    "EPSG:3857 is stretched by 1/cos(latitude) along both axes, but for the flattening of the earth"
    x, y = -15_000_000, 12_500_000
    path = write_map(tmp_path/'map.tif', np.zeros((8, 8)), crs='EPSG:3857', transform=from_origin(x, y, 10, 10))
    cells = map_cells(path, 4, [.5])
    latitude = 2 * np.arctan(np.exp(y / 6378137)) - np.pi / 2
    assert cells.pixel_area.to_numpy() == pytest.approx(100 * np.cos(latitude)**2, rel=.01)
    bare = write_map(tmp_path/'bare.tif', np.zeros((8, 8)), crs=None)
    assert (map_cells(bare, 4, [.5]).pixel_area == 1).all()

def test_what_is_no_map_is_refused(tmp_path):
    image = np.full((1, 8, 8), 9, 'uint8')
    for nodata, words in ((None, 'image.tif is not a map of probabilities: it declares no nodata value'),
                          (0, 'image.tif holds values outside of 0 to 1')):
        write_raster(tmp_path/'image.tif', image, transform=GRID, crs=CRS, nodata=nodata)
        with pytest.raises(DataError, match=words):
            review_sample(tmp_path/'image.tif', tmp_path/'out', threshold=.5)
    write_map(tmp_path/'empty.tif', np.zeros((8, 8)), np.zeros((8, 8), bool))
    with pytest.raises(DataError, match='empty.tif holds no data'):
        review_sample(tmp_path/'empty.tif', tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_regions_are_strata(world, tmp_path):
    "The left half of the map is west, the rest is outside"
    height, width = world.truth.shape
    west = shapely.box(*(GRID @ (0, height)), *(GRID @ (width / 2, 0)))
    layer = gpd.GeoDataFrame(dict(region=['west']), geometry=[west], crs=CRS)
    layer.to_crs('EPSG:4326').to_file(tmp_path/'regions.gpkg')
    review_sample(world.map, tmp_path/'review', n=200, side=SIDE, threshold=.5, least=4,
                  regions=tmp_path/'regions.gpkg')
    units = units_of(tmp_path/'review')
    assert set(units.stratum.str.split(', ').str[-1]) == {'west', 'outside'}
    assert (units.stratum.str.endswith('west') == (units.column + SIDE / 2 < width / 2)).all()
    assert not (tmp_path/'review/pages').exists()

def test_long_edges_of_regions_are_parallels(tmp_path):
    "On a polar grid the corners of a box of longitudes and latitudes are not its border"
    path = write_map(tmp_path/'map.tif', np.zeros((20, 20)), crs='EPSG:3413',
                     transform=from_origin(-2_000_000, 2_000_000, 200_000, 200_000))
    boxes = [shapely.box(-180, 80, 180, 90), shapely.box(-180, 70, 180, 80)]
    gpd.GeoDataFrame(dict(NAME=['pole', 'ring']), geometry=boxes, crs='EPSG:4326').to_file(tmp_path/'layer.gpkg')
    layer = read_region_layer(tmp_path/'layer.gpkg', 'NAME', 'EPSG:3413')
    cells = map_cells(path, 1, [.5] * 3, layer)
    latitude = transformer('EPSG:3413').transform(cells.x, cells.y)[1]
    assert cells.region.tolist() == np.select([latitude > 80, latitude > 70], ['pole', 'ring'], 'outside').tolist()
    review_sample(path, tmp_path/'review', n=60, side=1, threshold=.5, least=2, regions=tmp_path/'layer.gpkg',
                  region_column='NAME')
    strata = pd.read_csv(tmp_path/'review/strata.csv')
    assert strata.N.sum() == 400
    assert {name.split(', ')[-1] for name in strata.stratum} == {'pole', 'ring', 'outside'}
    with pytest.raises(DataError, match="no column 'region'"):
        review_sample(path, tmp_path/'other', n=60, side=1, threshold=.5, least=2, regions=tmp_path/'layer.gpkg')

def test_predicted_cells_are_those_that_polygons_meet(tmp_path):
    "By the calibration of the map; with a layer of regions by that of each region. A named threshold is for all"
    probability = np.zeros((64, 96))
    for column in range(0, 96, 16):
        probability[::16, column] = .25 + .1 * (column // 16 % 3)
    stored = {name: dict(thresholds={'1:200': value}) for name, value in dict(west=.3, east=.4).items()}
    path = write_map(tmp_path/'map.tif', probability, calibration=dict(thresholds={'1:200': .34, '1:20': .2},
                                                                       regions=stored))
    corners = [GRID @ (column, row) for column, row in ((0, 64), (48, 0), (48, 64), (96, 0))]
    boxes = [shapely.box(*corners[0], *corners[1]), shapely.box(*corners[2], *corners[3])]
    gpd.GeoDataFrame(dict(name=['west', 'east']), geometry=boxes, crs=CRS).to_file(tmp_path/'regions.gpkg')
    regions = dict(regions=tmp_path/'regions.gpkg', region_column='name')
    cases = [(dict(), [.34] * 6), (regions, [.3] * 3 + [.4] * 3), (dict(ratio='1:20'), [.2] * 6),
             (regions | dict(threshold=.42), [.42] * 6)]
    for number, (arguments, limits) in enumerate(cases):
        made = review_sample(path, tmp_path/f'{number}', n=24, side=16, sizes=[], least=2, **arguments)
        units = units_of(tmp_path/f'{number}').sort_values(['row', 'column'])
        strata = pd.read_csv(tmp_path/f'{number}/strata.csv', index_col='stratum')
        assert units.threshold.tolist() == limits * 4
        assert set(made['thresholds'].values()) >= set(limits)
        expected = probability[::16, ::16].ravel() >= np.array(limits * 4)
        assert units.stratum.map(strata.predicted).tolist() == expected.tolist()
    raw = write_map(tmp_path/'raw.tif', probability, calibration=dict(thresholds={}))
    with pytest.raises(DataError, match='name one with --threshold'):
        review_sample(raw, tmp_path/'raw')

# ---------------------------------------------------------------- the draw

@given(st.integers(1, 60), st.integers(1, 60), st.data())
@settings(max_examples=40, deadline=None)
def test_inclusion_probabilities_add_up_to_the_sample(a, b, data):
    cells = pd.DataFrame(dict(stratum=['a'] * a + ['b'] * b, row=range(a + b)))
    n = data.draw(st.integers(1, a + b))
    counts = allocate(n, dict(a=a, b=b), dict(a=.3, b=.5), 0)
    units = draw_units(cells, counts, data.draw(st.integers(0, 99)))
    assert len(units) == n == units.row.nunique()
    assert units.unit.is_unique
    # each unit of a stratum has the probability of those that were drawn
    per_stratum = units.groupby('stratum').agg(p=('probability', 'first'), N=('N', 'first'), n=('n', 'first'))
    assert (per_stratum.p * per_stratum.N).sum() == pytest.approx(n)
    assert units.groupby('stratum').size().to_dict() == per_stratum.n.to_dict()

def test_each_unit_of_a_stratum_is_drawn_as_often():
    cells = pd.DataFrame(dict(stratum=['a'] * 10 + ['b'] * 5, row=range(15)))
    draws = 300
    rows = np.concatenate([draw_units(cells, dict(a=4, b=1), seed).row for seed in range(draws)])
    counts = np.bincount(rows, minlength=15)
    for i, p in enumerate([.4] * 10 + [.2] * 5):
        assert binom.ppf(1e-5, draws, p) <= counts[i] <= binom.ppf(1 - 1e-5, draws, p)

@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 9), st.integers(2, 60), st.integers(2, 4),
       st.lists(st.floats(.01, .99), max_size=4), st.lists(st.integers(1, 50), max_size=2),
       st.sampled_from(['neyman', 'proportional']), st.integers(0, 99))
def test_each_valid_pixel_can_be_drawn(tmp_path_factory, height, width, side, n, least, cuts, sizes, allocation, seed):
    "Also far below the threshold: each pixel lies in one cell, of a stratum that is drawn from at least once"
    rng = np.random.default_rng(seed)
    probability = np.clip(gaussian_filter(rng.normal(.2, .8, (height, width)), 1), 0, 1)**2
    valid = rng.random((height, width)) < .7
    folder = tmp_path_factory.mktemp('draw')
    path = write_map(folder/'map.tif', probability, valid)
    try:
        made = review_sample(path, folder/'out', n=n, side=side, cuts=cuts, sizes=sizes, least=least,
                             allocation=allocation, seed=seed)
    except ConfigError as error:
        # said, where so few units cannot give each stratum its least
        assert 'cannot be drawn' in str(error)
        return
    except DataError:
        assert not valid.any()
        return
    strata = pd.read_csv(folder/'out/strata.csv', index_col='stratum')
    assert (strata.n >= np.minimum(least, strata.N)).all()
    cells = map_cells(path, side, [.5])
    chance = pd.Series(name_strata(cells, made['cuts'], made['sizes'])).map(strata.n / strata.N)
    covered = np.zeros((height, width))
    for cell, p in zip(cells.itertuples(), chance):
        covered[cell.row:cell.row + cell.height, cell.column:cell.column + cell.width] += p
    assert (covered[valid] > 0).all()
    assert chance.max() <= 1
    assert chance.sum() == pytest.approx(made['n'])
    # what is drawn carries its own chance
    units = pd.read_csv(folder/'out/units.csv')
    assert np.allclose(units.probability, units.n / units.N)

def test_a_wanted_interval_decides_the_number_of_units(world, tmp_path, caplog):
    "Half as wide takes more units, and what is expected is said"
    made = [review_sample(world.map, tmp_path/f'{half}', half_width=half, least=5, side=SIDE) for half in (.2, .1)]
    for found, half in zip(made, (.2, .1)):
        widths = found['expected_half_widths']
        assert max(widths.values()) <= half
        assert max(widths.values()) > .9 * half
        assert f'{found["n"]} of ' in caplog.text
    assert made[1]['n'] > 1.5 * made[0]['n']

def test_arguments_are_checked_together(world, tmp_path):
    with pytest.raises(ConfigError) as error:
        review_sample(world.map, tmp_path/'out', n=1, side=0, threshold=1.5, sizes=[0], least=0, allocation='neymann',
                      raters=['a b', 'c', 'c'], twice=2, half_width=.7)
    for words in ('n: 1', 'half_width: 0.7', 'least: 0', 'side: 0', 'threshold', 'sizes: 0', "did you mean 'neyman'",
                  "'a b'", 'twice: 2'):
        assert words in str(error.value)
    assert not (tmp_path/'out').exists()

# ---------------------------------------------------------------- pictures and pages

def test_a_finer_scene_is_shown_at_its_place(tmp_path):
    "The scene of 16 bits has four pixels under each of the map; the middle cell is bright"
    probability = np.zeros((48, 48))
    image = np.full((3, 96, 96), 100, 'uint16')
    image[:, 32:64, 32:64] = 5000
    path = write_map(tmp_path/'map.tif', probability)
    write_raster(tmp_path/'scene.tif', image, crs=CRS, transform=GRID @ Affine.scale(.5))
    assert scene_factor(path, tmp_path/'scene.tif') == 2
    review_sample(path, tmp_path/'review', tmp_path/'scene.tif', n=9, side=16, least=2)
    units = units_of(tmp_path/'review').set_index('unit')
    page = (tmp_path/'review/pages/rater.html').read_text()
    for shown in json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])['units']:
        data = np.frombuffer(base64.b64decode(shown['src'].split(',')[1]), np.uint8)
        picture = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)
        zoom = len(picture) / shown['height']
        x, y, width, height = (round(length * zoom) for length in shown['frame'])
        inside = picture[y + 9:y + height - 9, x + 9:x + width - 9]
        is_middle = (units.loc[shown['id'], ['row', 'column']] == 16).all()
        assert inside.mean() > 200 if is_middle else inside.mean() < 50

def test_pictures_show_the_bands_that_the_model_reads(tmp_path):
    "R, G and B are bands 4, 2 and 1 of the source that the model was trained from"
    image = np.stack([np.full((32, 32), value, 'uint8') for value in (30, 90, 250, 200)])
    write_raster(tmp_path/'scene.tif', image, crs=CRS, transform=GRID)
    for bands, colour in (([4, 2, 1], (200, 90, 30)), (None, (30, 90, 250))):
        path = write_map(tmp_path/'map.tif', np.zeros((32, 32)))
        with rasterio.open(path, 'r+') as ds:
            source = dict(bands=bands) if bands else None
            ds.update_tags(RTSSEG=json.dumps(dict(calibration=CALIBRATION, source=source)))
        out = tmp_path/f'{colour[0]}'
        review_sample(path, out, tmp_path/'scene.tif', n=4, side=16, least=2)
        page = (out/'pages/rater.html').read_text()
        shown = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])['units'][0]
        data = np.frombuffer(base64.b64decode(shown['src'].split(',')[1]), np.uint8)
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]
        inside = picture[len(picture) // 2, picture.shape[1] // 2].astype(int)
        # as JPEG keeps colours
        assert np.abs(inside - colour).max() < 6
    write_raster(tmp_path/'scene.tif', image[:3], crs=CRS, transform=GRID)
    with rasterio.open(path, 'r+') as ds:
        ds.update_tags(RTSSEG=json.dumps(dict(calibration=CALIBRATION, source=dict(bands=[4, 2, 1]))))
    with pytest.raises(DataError, match='reads band 4, the image has 3'):
        review_sample(path, tmp_path/'few', tmp_path/'scene.tif', n=4, side=16, least=2)

def test_another_scene_is_refused(world, tmp_path):
    write_raster(tmp_path/'other.tif', np.ones((3, *world.truth.shape), 'uint8'), crs=CRS,
                 transform=GRID @ Affine.translation(50, 0))
    with pytest.raises(DataError, match='shifted'):
        review_sample(world.map, tmp_path/'out', tmp_path/'other.tif')

HOSTILE = '</script><script>alert(1)</script><img src=x onerror=alert(2)>'

def test_a_page_escapes_what_it_shows():
    page = review_page(HOSTILE, 'ana', 'f' * 64, [dict(id=HOSTILE, src='data:,', path='', frame=[0] * 4, width=1,
                                                      height=1)])
    assert page.count('<script') == 2
    assert '<img' not in page
    assert "default-src 'none'" in page

def test_a_page_holds_no_probability(sample):
    page = (sample/'pages/ana.html').read_text()
    text = re.sub(r'<style>.*?</style>|base64,[^"]*', '', page, flags=re.S)
    for unit in units_of(sample).itertuples():
        assert f'{unit.highest:.6f}' not in text
        assert unit.stratum not in text

def test_each_rater_has_an_order(sample):
    "Units that both rate do not follow each other alike"
    orders = [re.findall(r'"id":"(u\d+)"', (sample/f'pages/{rater}.html').read_text()) for rater in ('ana', 'bo')]
    both = set(orders[0]) & set(orders[1])
    assert len(both) == 36
    assert [u for u in orders[0] if u in both] != [u for u in orders[1] if u in both]

# a document of the few elements and methods that the script uses
DOCUMENT = """
const kept = {}, elements = {}, handlers = {};
const element = () => ({
  attributes: {}, textContent: '', value: 0,
  setAttribute(name, value) { this.attributes[name] = String(value); },
  addEventListener(name, handler) { this.click = handler; },
});
globalThis.localStorage = {getItem: name => kept[name] ?? null, setItem: (name, value) => { kept[name] = value; }};
globalThis.document = {
  getElementById: id => elements[id] ??= element(),
  addEventListener: (name, handler) => { handlers[name] = handler; },
};
document.getElementById('data').textContent = JSON.stringify(PAGE);
const press = key => handlers.keydown({key, preventDefault() {}});
const answers = () => JSON.parse(Object.values(kept)[0]);
"""

@pytest.mark.skipif(not shutil.which('node'), reason='no node here: the script of the page was not run')
def test_the_script_of_a_page():
    "Answers, shares, undo and the outline, with keys and buttons, in a document that is a stub"
    units = [dict(id=f'u{i}', src='data:,', path='', frame=[0] * 4, width=1, height=1) for i in range(4)]
    steps = """
    press('y'); press('3'); press('o'); press('n'); press('u');
    const first = answers();
    press('z'); press('z');
    const second = answers();
    elements.unsure.click(); press('ArrowLeft'); press('ArrowLeft'); press('0');
    console.log(JSON.stringify([first, second, answers(), elements.count.textContent]));
    """
    page = json.dumps(dict(sample='s', rater='ana', units=units))
    program = f'const PAGE = {page};\n{DOCUMENT}\n(() => {{{REVIEW_SCRIPT}}})();\n{steps}'
    done = subprocess.run(['node', '-e', program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, second, third, count = json.loads(done.stdout)
    assert first == dict(u0=dict(answer='yes', outline=False), u1=dict(answer='yes', outline=False, share=.3),
                         u2=dict(answer='no', outline=True), u3=dict(answer='unsure', outline=False))
    assert set(second) == {'u0', 'u1'}
    # the outline of u2 was shown before its button; two steps back from u3 lies u1
    assert third['u2'] == dict(answer='unsure', outline=True)
    assert third['u1'] == dict(answer='yes', outline=False, share=1)
    assert '3 rated' in count

def key_of(rating):
    "The key that gives an answer; a share in tenths"
    return str(max(round(10 * rating['share']), 1) % 10) if rating['answer'] == 'yes' else 'n'

@in_browser
def test_a_rater_uses_the_page_in_a_browser(world, tmp_path):
    "Keys, buttons, undo, a browser that is closed in between, and a file that is read back"
    sample = tmp_path/'review'
    review_sample(world.map, sample, world.scene, n=24, side=32, least=2, sizes=[], raters=['ana'])
    address, truth = (sample/'pages/ana.html').as_uri(), truthful(world, sample, 'ana')
    with kept_browser(tmp_path) as page:
        page.goto(address)
        order = page.evaluate('units.map(unit => unit.id)')
        assert set(order) == set(truth)
        for key in ('y', '4', 'z', 'n', 'o'):
            page.keyboard.press(key)
        assert page.locator('#count').text_content() == f'unit 3 of {len(order)}; 2 rated'
        outline = page.locator('#outline')
        assert outline.get_attribute('visibility') == 'visible'
        # what was shown stays known
        page.locator('#right').click()
        page.locator('#left').click()
        assert outline.get_attribute('visibility') == 'hidden'
        page.locator('#unsure').click()
        # all that a rater needs is in the window, at a size of common screens
        boxes = [part.bounding_box() for part in page.locator('button, svg').all()]
        assert max(box['y'] + box['height'] for box in boxes) <= page.viewport_size['height']
        assert max(box['x'] + box['width'] for box in boxes) <= page.viewport_size['width']
        assert accessibility(page) == []
    with kept_browser(tmp_path) as page:
        page.goto(address)
        assert page.locator('#count').text_content() == f'unit 4 of {len(order)}; 3 rated'
        for unit in order[3:]:
            page.keyboard.press(key_of(truth[unit]))
        assert 'all done' in page.locator('#count').text_content()
        with page.expect_download() as download:
            page.keyboard.press('d')
        assert download.value.suggested_filename == 'ratings_ana.json'
        download.value.save_as(tmp_path/'ratings_ana.json')
    ratings = json.loads((tmp_path/'ratings_ana.json').read_text())['ratings']
    assert [ratings[unit] for unit in order[:3]] == [
        dict(answer='yes', outline=False), dict(answer='no', outline=False), dict(answer='unsure', outline=True)]
    for unit in order[3:]:
        assert ratings[unit]['answer'] == truth[unit]['answer']
        assert abs(ratings[unit].get('share', 0) - truth[unit].get('share', 0)) <= .1
    assert len(read_ratings(sample, [tmp_path/'ratings_ana.json']).units) == len(order)

# ---------------------------------------------------------------- ratings come back

def test_ratings_become_estimates(world, sample):
    table = review_read(sample, all_ratings(world, sample))
    content = json.loads((sample/'estimates.json').read_text())
    assert content['estimates']['kappa']['value'] == 1
    assert content['raters'] == dict(ana='2026-02-03T04:05:06Z', bo='2026-02-03T04:05:06Z')
    assert f"{content['estimates']['recall']['value']:.3g}" in str(table)
    assert '| recall (cells) |' in (sample/'estimates.md').read_text()

def test_raters_who_differ_count_as_unsure(world, sample):
    units = units_of(sample)
    both = units.unit[units.raters.str.contains(' ')].tolist()
    answers = truthful(world, sample, 'bo')
    for unit in both[:3]:
        other = 'no' if answers[unit]['answer'] == 'yes' else 'yes'
        answers[unit] = dict(answer=other, outline=True)
    files = [write_ratings(sample, 'ana', truthful(world, sample, 'ana')), write_ratings(sample, 'bo', answers)]
    rated = read_ratings(sample, files)
    verdicts = rated.units.set_index('unit').verdict
    assert (verdicts == 'unsure').sum() == 3
    assert (verdicts[both[:3]] == 'unsure').all()
    found = estimate_review(rated)
    assert found['kappa'].n == len(both)
    assert found['kappa'].value < 1
    assert found['unsure'].value > 0

def test_a_yes_without_a_share_leaves_no_area(world, sample):
    answers = {rater: truthful(world, sample, rater) for rater in ('ana', 'bo')}
    for given_by in answers.values():
        for rating in given_by.values():
            rating.pop('share', None)
    files = [write_ratings(sample, rater, given_by) for rater, given_by in answers.items()]
    found = estimate_review(read_ratings(sample, files))
    assert found['area'].value is None
    assert 'without a share' in found['area'].why
    assert found['recall'].value is not None

@pytest.mark.parametrize('change, why', [
    (dict(raters='ana'), 'raters: Input should be a valid list'),
    (dict(raters=['ana']), 'lacks raters of units.csv: bo'),
    (dict(largest=0), 'largest is 0, less than the area of a drawn cell'),
    (dict(largest=None), 'largest: Input should be a valid number'),
])
def test_notes_of_a_sample_that_were_changed(world, sample, change, why):
    settings = json.loads((sample/'sample.json').read_text())
    (sample/'sample.json').write_text(json.dumps(settings | change))
    with pytest.raises((DataError, FileError), match=why):
        review_read(sample, [])

def test_all_problems_of_ratings_are_one_error(world, sample):
    ana = truthful(world, sample, 'ana')
    first, second, *_ = ana
    others = set(truthful(world, sample, 'bo')) - set(ana)
    broken = ana | {min(others): dict(answer='no', outline=False), first: dict(answer='no', outline=False, share=.5)}
    del broken[second]
    (sample/'cut.json').write_text('{"sample": ')
    files = [
        write_ratings(sample, 'ana', broken),
        write_ratings(sample, 'ana', ana, 'twice.json'),
        write_ratings(sample, 'cy', {}, 'cy.json'),
        write_ratings(sample, 'bo', {first: dict(answer='maybe', outline=False)}, 'word.json'),
        write_ratings(sample, 'bo', {}, 'other.json', sample='0' * 64),
        sample/'cut.json',
        sample/'none.json',
    ]
    with pytest.raises(DataError) as error:
        review_read(sample, files)
    for words in (f'{min(others)!r} was not given to ana', 'goes with yes', '1 of', 'has another file already', "'cy'",
                  "'yes', 'no' or 'unsure'", 'other.json: ratings of another sample', 'cut.json',
                  'none.json is missing'):
        assert words in str(error.value), words
    assert not (sample/'estimates.json').exists()

@pytest.mark.parametrize('name', ['units.csv', 'strata.csv'])
def test_a_changed_table_is_refused(world, sample, name):
    files = all_ratings(world, sample)
    path = sample/name
    path.write_text(path.read_text().replace('0.', '1.', 1))
    with pytest.raises(DataError, match=f'{name} is not the table that was drawn'):
        review_read(sample, files)

# ---------------------------------------------------------------- whether intervals hold

@pytest.mark.slow
def test_intervals_of_many_reviews_cover_the_truth(world):
    "Samples of one map, rated by one who knows the truth; chance moves a share by 0.7% (one standard deviation)"
    cells = map_cells(world.map, SIDE, [.5])
    cells['stratum'] = name_strata(cells, [.02, .1, .8], [])
    cells['share'] = [world.share(cell) for cell in cells.itertuples()]
    cells['area'] = cells.height * cells.width * cells.pixel_area
    cells['expected'] = cells['mean'] * cells.pixels * cells.pixel_area
    strata = describe_strata(cells)
    spread = np.sqrt(strata.share.clip(.02, .98) * (1 - strata.share.clip(.02, .98)))
    counts = allocate(250, strata.N.to_dict(), spread.to_dict(), 20)
    is_class, is_found = cells.share > 0, cells.highest >= .5
    assert (is_class & ~is_found).sum() > 5
    area = (cells.share * cells.area).sum()
    truth = dict(precision=is_class[is_found].mean(), recall=is_found[is_class].mean(), cells=is_class.sum(), area=area,
                 area_with_probabilities=area)
    covered, widths, reviews = dict.fromkeys(truth, 0), dict.fromkeys(truth, 0.), 1000
    for seed in range(reviews):
        units = draw_units(cells, counts, seed)
        units = units.assign(verdict=np.where(units.share > 0, 'yes', 'no'), answers=[['no']] * len(units))
        found = estimate_review(Rated(dict(largest=cells.area.max()), strata, units, {}))
        for name, value in truth.items():
            covered[name] += found[name].low <= value <= found[name].high
            widths[name] += found[name].high - found[name].low
    shares = {name: count / reviews for name, count in covered.items()}
    # narrower by the map's probabilities, at the price that `prediction_powered_mean` names
    powered = shares.pop('area_with_probabilities')
    assert min(shares.values()) >= .92, shares
    assert max(shares.values()) <= .995, shares
    assert powered >= .88
    assert widths['area_with_probabilities'] < widths['area']
