"Previews: what the page holds, what it must not hold, and where polygons lie"
import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import geopandas as gpd
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shapely import MultiPolygon, box
from shapely.affinity import rotate

from helpers.browser import accessibility, in_browser, opened
from helpers.maps import CRS, GRID, write_map
from rtsseg.config import ConfigError
from rtsseg.console import DataError
from rtsseg.ground import transformer
from rtsseg.preview import preview, round_length

EVIL = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', '</script><b>', "' onload='x", '&amp;\x1b[31m',
        '--></style><iframe src="http://x.example">']

class Page(HTMLParser):
    "Tags with their attributes, and the texts of scripts"

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self._in_script = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in_script = tag == 'script'
        if self._in_script:
            self.scripts.append('')

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self._in_script = False

    def handle_data(self, data):
        if self._in_script:
            self.scripts[-1] += data

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def data(self):
        return json.loads(self.scripts[0])

def squares(n, seed=0, names=None, **columns):
    "Squares of different sizes on the map's ground"
    rng = np.random.default_rng(seed)
    shapes = []
    for k in range(n):
        x, y = rng.uniform(10, 250, 2)
        shapes.append(box(GRID.c + x, GRID.f - y - 3 - k / 10, GRID.c + x + 3 + k / 10, GRID.f - y))
    table = dict(name=names or [f'slump {k}' for k in range(n)], **columns)
    return gpd.GeoDataFrame(table, geometry=shapes, crs=CRS)

@pytest.fixture
def map_file(tmp_path):
    probability = np.tile(np.linspace(0, 1, 100), (90, 1))
    valid = np.arange(9000).reshape(90, 100) >= 1500
    return write_map(tmp_path/'map.tif', probability, valid)

def made(map_file, frame=None, **arguments):
    "The page of a map with polygons, parsed, and what `preview` returns"
    folder = map_file.parent
    if frame is not None:
        frame.to_file(folder/'polygons.gpkg')
        arguments['polygons'] = folder/'polygons.gpkg'
    found = preview(map_file, folder/'page.html', force=True, **arguments)
    text = (folder/'page.html').read_text()
    return text, Page(text), found

# ---------------------------------------------------------------- nothing is loaded, nothing runs

def assert_closed(text, page):
    "No address but those that hold their content; one script that runs, allowed by its hash"
    for tag, attrs in page.tags:
        for name in ('src', 'href', 'xlink:href', 'action', 'data', 'srcset', 'poster'):
            assert attrs.get(name, 'data:').startswith('data:image/png;base64,') or name not in attrs, (tag, attrs)
        assert not [name for name in attrs if name.startswith('on')], (tag, attrs)
    assert {tag for tag, _ in page.tags}.isdisjoint({'iframe', 'link', 'object', 'embed', 'img', 'form', 'base', 'a'})
    without_data = re.sub(r'<script type="application/json".*?</script>', '', text, flags=re.DOTALL)
    assert not re.search(r'https?:|//[a-z]|url\(|@import', without_data.replace(page.of('image')[0]['href'], ''))
    kinds = [attrs.get('type') for attrs in page.of('script')]
    assert kinds == ['application/json', None]
    policy = next(attrs['content'] for attrs in page.of('meta') if 'http-equiv' in attrs)
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy == ("default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
                      f"script-src 'sha256-{digest}'")

def test_texts_from_files_stay_texts(map_file, tmp_path):
    "Names of columns, values, and the name of the map"
    frame = squares(len(EVIL), names=EVIL)
    frame['<i>probability</i>'] = .5
    map_file = map_file.rename(tmp_path/'<b>&"map.tif')
    text, page, found = made(map_file, frame)
    assert found['polygons'] == len(EVIL)
    assert_closed(text, page)
    assert {tag for tag, _ in page.tags}.isdisjoint({'b', 'i'})
    values = {row[0] for row in page.data['rows']}
    assert {'<script>alert(1)</script>', '</script><b>', '&amp;\\x1b[31m'} <= values
    assert '<i>probability</i>' in page.data['columns']

@settings(max_examples=15, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_stays_a_text(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp('p')
    path = write_map(folder/'map.tif', np.full((100, 100), .2))
    frame = squares(1)
    frame['name'] = [text.replace('\0', '')]
    frame.to_parquet(folder/'p.parquet')
    preview(path, folder/'page.html', folder/'p.parquet')
    page = (folder/'page.html').read_text()
    assert_closed(page, Page(page))
    assert len(Page(page).data['rows']) == 1

def test_a_map_alone(map_file):
    text, page, found = made(map_file)
    assert found == dict(polygons=0, left_out={}, bytes=len(text.encode()))
    assert_closed(text, page)
    assert not page.of('path')
    assert 'id="least"' not in text

# ---------------------------------------------------------------- polygons

def test_the_largest_polygons_are_kept_and_the_others_counted(map_file, capsys):
    frame = squares(40, area_rank=list(range(40)))
    text, page, found = made(map_file, frame, most=15)
    assert len(page.of('path')) == found['polygons'] == 15
    # squares grow with their number
    assert [row[1] for row in page.data['rows']] == [str(k) for k in range(39, 24, -1)]
    assert found['left_out'] == {'smaller than the 15 largest': 25}
    assert 'polygons left out: 25 smaller than the 15 largest' in capsys.readouterr().err
    assert '25 left out: smaller than the 15 largest' in text

@pytest.mark.parametrize('crs', ['EPSG:3413', 'EPSG:4326', 'EPSG:3857'])
@pytest.mark.parametrize('side', [100, 50])
def test_polygons_lie_where_they_are(map_file, crs, side):
    "In the pixels of the picture, whatever the CRS of the file"
    shape = box(GRID.c + 30, GRID.f - 240, GRID.c + 150, GRID.f - 60)
    frame = gpd.GeoDataFrame(dict(a=[1]), geometry=[shape], crs=CRS).to_crs(crs)
    _, page, _ = made(map_file, frame, side=side)
    scale = side / 100
    numbers = np.array(re.findall(r'[-\d.]+', page.of('path')[0]['d']), float).reshape(-1, 2)
    assert np.allclose(numbers.min(0), np.array([10, 20]) * scale, atol=.35)
    assert np.allclose(numbers.max(0), np.array([50, 80]) * scale, atol=.35)
    assert page.of('svg')[0]['viewbox'] == f'0 0 {side} {round(.9 * side)}'

def test_holes_and_parts_are_rings_of_one_path(map_file):
    first = box(GRID.c + 30, GRID.f - 90, GRID.c + 90, GRID.f - 30)
    shape = MultiPolygon([first.difference(box(*rotate(first, 0).buffer(-15).bounds)),
                          box(GRID.c + 120, GRID.f - 90, GRID.c + 150, GRID.f - 30)])
    frame = gpd.GeoDataFrame(dict(a=[1]), geometry=[shape], crs=CRS)
    _, page, _ = made(map_file, frame)
    assert page.of('path')[0]['d'].count('M') == page.of('path')[0]['d'].count('Z') == 3

def test_what_is_no_polygon_or_lies_elsewhere_is_counted(map_file):
    frame = squares(5)
    frame.loc[1, 'geometry'] = frame.geometry[1].centroid
    frame.loc[2, 'geometry'] = None
    frame.loc[3, 'geometry'] = box(0, 0, 10, 10)
    _, page, found = made(map_file, frame)
    assert found['left_out'] == {'no polygon': 2, 'beside the map': 1}
    assert len(page.of('path')) == len(page.data['rows']) == 2

@pytest.mark.parametrize('columns, asked, want', [
    (dict(mean_prob=[.1, .9, None]), '', [None, .9, .1]),
    (dict(Score=[.1, .9, .4], confidence=[1., 0., 1.]), 'confidence', [1., 0., 1.]),
    (dict(area=[.1, .2, .3]), '', []),
    (dict(score=[1., 2., 3.]), '', []),
])
def test_polygons_are_filtered_by_a_column_of_probabilities(map_file, columns, asked, want):
    text, page, _ = made(map_file, squares(3, **columns), column=asked)
    # largest first: the last square
    assert page.data['probability'] == want
    assert ('id="least"' in text) == bool(want)

# ---------------------------------------------------------------- the picture and the scale

def test_the_picture_is_the_map(map_file):
    "Averages of the map in a palette; transparent without data"
    _, page, _ = made(map_file, side=50)
    picture = Image.open(io.BytesIO(base64.b64decode(page.of('image')[0]['href'].split(',')[1])))
    assert picture.size == (50, 45)
    index = np.array(picture)
    alpha = np.array(picture.convert('RGBA'))[..., 3]
    assert (alpha[:7] == 0).all()
    assert (alpha[8:] == 255).all()
    want = 254 * np.linspace(0, 1, 100).reshape(50, 2).mean(1)
    assert np.abs(index[20] - want).max() <= 1

@given(st.floats(1e-3, 1e7))
def test_lengths_of_scale_bars_are_round(metres):
    found = round_length(metres)
    assert metres / 2.5 * (1 - 1e-9) <= found <= metres * (1 + 1e-9)
    digits = f'{found:e}'.split('e')[0].strip('0').strip('.')
    assert digits in ('1', '2', '5')

def test_coordinates_of_the_page_are_those_of_the_map(map_file):
    "Places between the nodes, as the script interpolates them"
    _, page, _ = made(map_file)
    data = page.data
    a, b, c, d, e, f = data['transform']
    lon, lat = transformer(CRS).transform(a * 50 + b * 45 + c, d * 50 + e * 45 + f)
    middle = (np.array(data['places'][name])[4, 4] for name in ('lon', 'lat'))
    assert np.allclose([*middle], [lon, lat], atol=1e-5)

def test_a_map_without_a_crs_has_no_scale(tmp_path):
    path = write_map(tmp_path/'map.tif', np.full((100, 100), .2), crs=None)
    text, page, _ = made(path)
    assert [rect.get('id') for rect in page.of('rect')] == ['nothing']
    assert page.data['places'] is None
    with pytest.raises(DataError, match='the map has no CRS'):
        made(path, squares(2))
    frame = gpd.GeoDataFrame(dict(a=[1, 2]), geometry=squares(2).geometry.to_numpy())
    assert made(path, frame)[2]['polygons'] == 2

# ---------------------------------------------------------------- what is refused

def test_what_cannot_be_shown_is_refused(map_file, tmp_path):
    "And a page that exists stays"
    text, _, _ = made(map_file)
    (tmp_path/'broken.gpkg').write_bytes(b'nothing')
    for arguments, words in (
        (dict(polygons=tmp_path/'none.gpkg'), 'no such file'),
        (dict(polygons=tmp_path/'broken.gpkg'), 'cannot be read as a layer of polygons'),
    ):
        with pytest.raises(DataError, match=words):
            preview(map_file, tmp_path/'page.html', force=True, **arguments)
    squares(3, score=[.1, .2, .3]).to_file(tmp_path/'p.gpkg')
    with pytest.raises(ConfigError, match="'scores' is not a column .*did you mean 'score'"):
        preview(map_file, tmp_path/'page.html', tmp_path/'p.gpkg', 'scores', force=True)
    with pytest.raises(ConfigError, match='is a .html'):
        preview(map_file, tmp_path/'page.png')
    with pytest.raises(ConfigError, match='page.html exists.*--force'):
        preview(map_file, tmp_path/'page.html')
    with pytest.raises(ConfigError, match='1 or more'):
        preview(map_file, tmp_path/'page.html', most=0)
    assert (tmp_path/'page.html').read_text() == text

# ---------------------------------------------------------------- in a browser

@in_browser
def test_the_page_works_in_a_browser(map_file, chromium, tmp_path):
    "The filter counts, a click shows attributes, names that pretend to be code are text, and nothing is asked for"
    made(map_file, squares(4, names=EVIL[:4], score=[.1, .4, .6, .9]))
    with opened(chromium, tmp_path/'page.html') as page:
        assert page.locator('path').count() == 4
        page.locator('#least').fill('0.5')
        assert page.locator('#shown').text_content() == '2'
        assert page.locator('path:visible').count() == 2
        page.locator('path:visible').first.click()
        shown = page.locator('#details td').all_text_contents()
        assert shown[1] in EVIL[2:4]
        assert page.errors == page.asked == []

@in_browser
@pytest.mark.parametrize('width', [400, 1280])
def test_everybody_can_use_the_page(map_file, chromium, tmp_path, width):
    "Nothing scrolls sideways, and axe-core finds nothing grave"
    made(map_file, squares(4, names=EVIL[:4], score=[.1, .4, .6, .9]))
    with opened(chromium, tmp_path/'page.html', width) as page:
        assert page.evaluate('document.documentElement.scrollWidth') == width
        assert accessibility(page) == []
