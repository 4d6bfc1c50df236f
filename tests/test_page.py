"The page of a report as a person uses it in a browser: verdict, map, slider, small and large windows"
import re

import geopandas as gpd
import pytest
import shapely

from helpers.browser import driven_browser, in_browser
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

@pytest.fixture(scope='module')
def tab(tmp_path_factory):
    "A tab of a browser"
    with driven_browser(tmp_path_factory.mktemp('tab')) as tab:
        yield tab

def open_page(tab, page, width=1280):
    "Open a report in a window of a width"
    tab.ask('Emulation.setDeviceMetricsOverride', width=width, height=900, deviceScaleFactor=1, mobile=False)
    tab.open(page.path, '!document.querySelector(".slider").hidden')

@in_browser
@pytest.mark.parametrize('width', [400, 1280])
def test_nothing_scrolls_sideways(single, tab, width):
    "With all that opens opened; wide tables and pictures scroll in boxes of their own"
    open_page(tab, single, width)
    tab.value('document.querySelectorAll("details").forEach(each => { each.open = true })')
    assert tab.value('document.documentElement.scrollWidth') == width
    wide = """[...document.querySelectorAll("main *")].filter(each => !each.closest(".scroll, .tiles, pre, svg")
              && each.getBoundingClientRect().right > innerWidth + 1).map(each => each.outerHTML.slice(0, 80))"""
    assert tab.value(wide) == []
    # such a check would notice a line that does not fit
    tab.value('document.querySelector("h1").style.width = "3000px"')
    assert tab.value('document.documentElement.scrollWidth') > width

@in_browser
def test_the_verdict_is_what_the_tables_say(single, tab):
    "The first box of the page; its numbers are those of the headline table on the same page"
    open_page(tab, single)
    texts = tab.value('[...document.querySelectorAll(".verdict .ratios li")].map(each => each.textContent)')
    rows = tab.value("""[...document.querySelector("#headline .scroll").querySelectorAll("tr")]
                        .map(row => [...row.cells].map(cell => cell.textContent))""")
    head, table = rows[0], {row[0]: row for row in rows[1:]}
    assert len(texts) == len(RATIOS)
    for text, name in zip(texts, RATIOS.values(), strict=True):
        for metric, noun in (('object precision (IoU 0.3)', 'slumps'), ('object recall (IoU 0.3)', 'found')):
            cell = table[metric][head.index(name)]
            value = 100 * float(re.search(r'\d\.\d+', cell)[0])
            said = int(re.search(rf'(\d+) (?:is|are) (?:a )?{noun.rstrip("s")}', text)[1])
            assert ('at most' in text or 'fewer than' in text) or abs(said - value) <= .55
        assert name.split()[0] in text
    place = 'document.querySelector("{}").getBoundingClientRect().top'
    assert tab.value(place.format('.verdict')) < tab.value(place.format('.cards'))

@in_browser
def test_a_click_on_the_map_opens_the_tile(single, tab):
    "The picture of the gallery, enlarged; a line says what the tile holds"
    open_page(tab, single)
    tab.value("""const tile = document.querySelector(".map a .tile"); tile.id = "clicked";
                 tile.scrollIntoView({block: "center"})""")
    tile, link = tab.value('[document.querySelector("#clicked title").textContent, '
                           'document.querySelector("#clicked").closest("a").getAttribute("href")]')
    tab.click('clicked')
    tab.wait(lambda: tab.value('Boolean(document.querySelector("dialog[open] img"))'))
    same = f'document.querySelector("dialog img").src === document.querySelector("{link} img").src'
    assert tab.value(same)
    name = tile.split()[0]
    assert tab.value('document.querySelector("dialog").getAttribute("aria-label")').startswith(name)
    assert tab.value('document.querySelector(".map .about").textContent') == tile
    # every picture of the gallery has its tile on the map
    pictures = set(tab.value('[...document.querySelectorAll(".tiles figure")].map(each => "#" + each.id)'))
    assert set(tab.value('[...document.querySelectorAll(".map a")].map(each => each.getAttribute("href"))')) == pictures

@in_browser
def test_threshold_and_floor_move_the_numbers_of_the_tables(made, single, tab):
    "All stops and floors: the cells are those of the long tables, pixels and objects at the same threshold"
    open_page(tab, single)
    shown = tab.value("""(() => {
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
    })()""")
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
