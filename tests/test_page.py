"The page of a report as a person uses it in a browser: verdict, map, slider, small and large windows"
import re

import geopandas as gpd
import pytest
import shapely

from helpers.browser import accessibility, in_browser, opened
from helpers.by_hand import Split, read_pixel_run
from helpers.runs import toy_world
from rtsseg.config import load
from rtsseg.invented import invent_run
from rtsseg.manifest import read_manifest
from rtsseg.reporting import report

RATIOS = {1: '1:1 (balanced)', 200: '1:200'}

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "An invented run"
    root = tmp_path_factory.mktemp('page')
    world = read_manifest(toy_world(root))
    metrics = dict(ratios=list(RATIOS), replicates=50, object_thresholds=[.25, .5, .75])
    cfg = load(name='r', runs=root/'runs', data=dict(manifest=world.path, tile_size=64), epochs=2, metrics=metrics,
               calibrate=dict(ratio=1, target_precision=.5))
    return invent_run(cfg, world)

@pytest.fixture(scope='module')
def single(made):
    "Its report"
    return report(made.folder)

@pytest.fixture
def tab(single, chromium):
    "It in a browser; its script runs without an error and without a network"
    with opened(chromium, single.path) as tab:
        yield tab
        assert tab.errors == []
        assert tab.asked == []

@in_browser
@pytest.mark.parametrize('width', [400, 1280])
def test_nothing_scrolls_sideways(tab, width):
    "With all that opens opened; wide tables and pictures scroll in boxes of their own"
    tab.set_viewport_size(dict(width=width, height=900))
    tab.evaluate('document.querySelectorAll("details").forEach(each => { each.open = true })')
    assert tab.evaluate('document.documentElement.scrollWidth') == width
    wide = """[...document.querySelectorAll("main *")].filter(each => !each.closest(".scroll, .tiles, pre, svg")
              && each.getBoundingClientRect().right > innerWidth + 1).map(each => each.outerHTML.slice(0, 80))"""
    assert tab.evaluate(wide) == []
    # such a check would notice a line that does not fit
    tab.evaluate('document.querySelector("h1").style.width = "3000px"')
    assert tab.evaluate('document.documentElement.scrollWidth') > width

@in_browser
def test_everybody_can_use_the_page(tab):
    "By the rules of axe-core, with all that opens opened"
    tab.evaluate('document.querySelectorAll("details").forEach(each => { each.open = true })')
    assert accessibility(tab) == []
    # such a check would notice text that is hardly darker than its ground
    tab.evaluate('document.querySelector("h1").style.color = "#ddd"')
    assert [rule for rule, *_ in accessibility(tab)] == ['color-contrast']

@in_browser
def test_the_verdict_is_what_the_tables_say(tab):
    "The first box of the page; its numbers are those of the headline table on the same page"
    texts = tab.locator('.verdict .ratios li').all_text_contents()
    rows = tab.locator('#headline .scroll').first.locator('tr').evaluate_all(
        'rows => rows.map(row => [...row.cells].map(cell => cell.textContent))')
    head, table = rows[0], {row[0]: row for row in rows[1:]}
    assert len(texts) == len(RATIOS)
    for text, name in zip(texts, RATIOS.values(), strict=True):
        for metric, noun in (('object precision (IoU 0.3)', 'slumps'), ('object recall (IoU 0.3)', 'found')):
            cell = table[metric][head.index(name)]
            # of a range, its upper end
            value = 100 * float(re.findall(r'\d\.\d+', cell)[-1])
            said = int(re.search(rf'(\d+) (?:is|are) (?:a )?{noun.rstrip("s")}', text)[1])
            if 'fewer than' not in text:
                # rounded in one way, whether number or bound
                assert abs(said - value) <= .55
        assert name.split()[0] in text
    assert tab.locator('.verdict').bounding_box()['y'] < tab.locator('.cards').first.bounding_box()['y']

@in_browser
def test_a_click_on_the_map_opens_the_tile(tab):
    "The picture of the gallery, enlarged; a line says what the tile holds"
    tile = tab.locator('.map a .tile').first
    about = tile.locator('title').text_content()
    link = tab.locator('.map a').first.get_attribute('href')
    tile.click()
    shown = tab.locator('dialog[open] img')
    assert shown.get_attribute('src') == tab.locator(f'{link} img').get_attribute('src')
    assert tab.locator('dialog').get_attribute('aria-label').startswith(about.split()[0])
    assert tab.locator('.map .about').text_content() == about
    tab.keyboard.press('Escape')
    shown.wait_for(state='detached')
    # by keyboard too
    tab.locator('.map a').first.focus()
    tab.keyboard.press('Enter')
    assert shown.count() == 1
    tab.keyboard.press('Escape')
    # a tile without a picture is drawn with the outlines of its objects
    other = tab.locator('svg > .tile.false').first
    other.click()
    drawn = tab.locator('dialog[open] svg')
    assert tab.locator('dialog').get_attribute('aria-label').startswith(other.locator('title').text_content())
    assert drawn.locator('.object').count() == other.locator('xpath=..').locator('.object').count() > 0
    side = re.search(r'(\d+) m wide', tab.locator('dialog').text_content())[1]
    # tiles of 64 pixels of 3 m
    assert float(side) == pytest.approx(192, rel=.1)
    tab.keyboard.press('Escape')
    # every tile of the gallery is on the map; a tile that stands twice has its name once
    pictures = tab.locator('.tiles figure[id]').evaluate_all('all => all.map(each => "#" + each.id)')
    assert len(set(pictures)) == len(pictures)
    links = tab.locator('.map a').evaluate_all('all => all.map(each => each.getAttribute("href"))')
    assert set(links) == set(pictures)

@in_browser
def test_the_legend_has_the_colours_of_the_map(tab):
    "As the browser computes them, for tiles and for outlines; no two keys look alike"
    colours = """name => {
        const colour = (each, property) => getComputedStyle(each)[property];
        const kind = each => [...each.classList].find(word => !['key', 'tile', 'object'].includes(word));
        const of = (selector, property) => Object.fromEntries([...document.querySelectorAll(selector)]
            .filter(each => kind(each) !== 'ignored').map(each => [kind(each), colour(each, property)]));
        return [of(`.map svg .${name}`, 'fill'), of(`.legend .${name}`, 'backgroundColor')];
    }"""
    for name in ('tile', 'object'):
        drawn, legend = tab.evaluate(colours, name)
        assert len(drawn) > 1
        assert drawn.items() <= legend.items()
        assert len(set(legend.values())) == len(legend)
    # what is hatched on the map is hatched in the legend
    hatched = tab.locator('.map svg .tile.ignored').first.evaluate('each => getComputedStyle(each).fill')
    assert hatched.startswith('url(')
    assert 'gradient' in tab.locator('.legend .ignored').evaluate('each => getComputedStyle(each).backgroundImage')

@in_browser
def test_who_reads_five_minutes_sees_objects_first(made, tab):
    "Objects and regions come before operating points, and the last line says what the page is of"
    order = tab.locator('section').evaluate_all('all => all.map(each => each.id)')
    assert order.index('objects') < order.index('regions') < order.index('threshold') < order.index('operating-point')
    cards = tab.locator('.card span:first-child').all_text_contents()
    assert [' of pixels' in card for card in cards] == sorted(' of pixels' in card for card in cards)
    assert all(' of pixels' in card or card.startswith('object') for card in cards)
    last = tab.locator('main').evaluate('main => main.lastElementChild.textContent')
    for said in ('synthetic', 'Configuration r', made.folder.parent.name, 'seed 42'):
        assert said in last

@in_browser
def test_threshold_and_floor_move_the_numbers_of_the_tables(made, single, tab):
    "All stops and floors: the cells are those of the long tables, pixels and objects at the same threshold"
    shown = tab.evaluate("""() => {
        const one = name => document.querySelector(".slider " + name), seen = [];
        for (let a = 0; a <= +one(".area").max; a++) for (let i = 0; i <= +one(".threshold").max; i++) {
            one(".area").value = a;
            one(".threshold").value = i;
            one(".threshold").dispatchEvent(new Event("input"));
            for (const row of document.querySelectorAll(".slider tbody tr"))
                seen.push([one(".pixels").textContent, one(".now").textContent,
                           ...[...row.cells].map(cell => cell.textContent)]);
        }
        return seen;
    }""")
    _, pixels, objects = single.tables['Threshold']
    of_pixels = {}
    for ratio, _, p, *metrics in pixels.rows:
        of_pixels.setdefault(ratio, []).append([str(p), *map(str, metrics)])
    thresholds = read_pixel_run(made.folder).evidence['test'].thresholds
    want = []
    for ratio, area, raw, _, *numbers in objects.rows:
        threshold, *metrics = of_pixels[ratio][thresholds.index(raw.value)]
        want.append([str(area), threshold, ratio, *metrics, *map(str, numbers)])
    assert sorted(shown) == sorted(want)

def test_polygons_beside_the_page_are_the_objects_that_others_count(made, single):
    "By SciPy, at the threshold of the tables: found and false predictions, missed slumps"
    layer = gpd.read_file(single.path.with_name('errors.gpkg'))
    assert layer.is_valid.all() and layer.crs is not None
    assert single.path.with_name('errors.qml').is_file()
    split = Split(made, 1)
    found, false, missed = split.objects(split.grid).sum(0)
    assert layer.error.value_counts().to_dict() == dict(found=found, false=false, missed=missed)
    table = read_pixel_run(made.folder).manifest.of('test').table.set_index('tile_id')
    boxes = shapely.box(*table.loc[layer.tile_id, ['xmin', 'ymin', 'xmax', 'ymax']].to_numpy().T)
    assert layer.within(gpd.GeoSeries(boxes, crs=layer.crs)).all()
    # each holds as many pixels as it says
    corners = table.loc[layer.tile_id]
    pixel = ((corners.xmax - corners.xmin) / 64).to_numpy()
    area = layer.area / pixel**2
    assert area.to_numpy() == pytest.approx(layer.area_px.to_numpy())
