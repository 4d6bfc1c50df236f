"Fault 48: pages whose names come from somebody else, in a browser, under their own policy"
import json

import geopandas as gpd
import numpy as np
import shapely

from helpers.browser import in_browser, opened
from helpers.hostile import change_evidence, prefixed
from helpers.maps import GRID, noise, write_map, write_scene
from helpers.runs import run
from rtsseg.calibration import calibrate
from rtsseg.preview import preview
from rtsseg.reporting import report
from rtsseg.review import review_page, review_sample

FAULTS = {
    48: (
        'scripts, ends of scripts, quotes, direction overrides and 10,000 characters in the names that a report, a '
        'page of a review or a preview shows',
        'shown as text, in their place; no script runs but that of the page, and nothing is fetched',
    ),
}

SCRIPT = '<script>window.pwned = 1</script>'
HOSTILE = {
    'script': SCRIPT,
    'end of script': f'</script></title></style>{SCRIPT}',
    'attribute': '" onload="window.pwned = 1" x=\'<img src=x onerror=window.pwned=1>\'',
    'address': 'javascript:window.pwned=1//{{7*7}}${7*7}](javascript:window.pwned=1)',
    'direction': 'a\u202egnp.exe\u2066\u200e\u061c',
    'long': 'w' * 10_000,
}

# elements that fetch or run something, and attributes that do
LOUD = """[...document.querySelectorAll('*')].filter(each =>
  ['IFRAME', 'OBJECT', 'EMBED', 'LINK', 'BASE', 'FORM', 'FRAME'].includes(each.tagName)
  || [...each.attributes].some(a => a.name.startsWith('on')
     || (['src', 'href', 'action', 'srcset', 'xlink:href'].includes(a.name) && !/^(#|data:image\\/)/.test(a.value)))
).map(each => each.outerHTML.slice(0, 200))"""
TURNED = r'/[\u202a-\u202e\u2066-\u2069\u200e\u200f\u061c]/.test(document.documentElement.outerHTML)'
INJECT = """(() => {
  const script = document.createElement('script');
  script.textContent = 'window.pwned = 2';
  document.body.append(script);
  document.body.insertAdjacentHTML('beforeend', '<img src=x onerror="window.pwned = 3">');
})()"""

def assert_harmless(tab, scripts, names):
    "A page shows these names as text, runs its own scripts alone, fetches nothing and stays within the window"
    assert tab.evaluate('document.scripts.length') == scripts
    assert tab.evaluate(LOUD) == []
    assert tab.evaluate(TURNED) is False
    assert tab.evaluate('document.documentElement.scrollWidth') <= 1280
    # scripts hold no text that is shown
    text = tab.evaluate('document.title + document.body.textContent')
    for name in names:
        assert name in text
    assert tab.evaluate('performance.getEntriesByType("resource").filter(e => !/^data:/.test(e.name)).length') == 0
    assert tab.asked == []
    # what would be put in, would not run
    tab.evaluate(INJECT)
    tab.evaluate('new Promise(resolve => setTimeout(resolve, 50))')
    assert tab.evaluate('window.pwned') is None

# ---------------------------------------------------------------- report

@in_browser
def test_48_a_report(chromium, tmp_path):
    "Names of regions, blocks and tiles"
    folder = run(tmp_path)
    hostile = '|'.join(HOSTILE.values())
    for split in ('val', 'test'):
        change_evidence(folder, prefixed(hostile, 'tile_id', 'region', 'block'), split)
    calibrate(folder)
    with opened(chromium, report([folder]).path) as tab:
        assert_harmless(tab, 2, [SCRIPT, HOSTILE['end of script'], r'\u202egnp.exe\u2066'])

# ---------------------------------------------------------------- review

@in_browser
def test_48_a_page_of_a_review(chromium, tmp_path):
    "The question, the rater, the units"
    write_map(tmp_path/'map.tif', np.random.default_rng(0).random((128, 128))**4)
    write_scene(tmp_path/'scene.tif', noise(128, 128))
    sample = tmp_path/'sample'
    review_sample(tmp_path/'map.tif', sample, tmp_path/'scene.tif', n=12, side=16, threshold=.5, least=2)
    page = (sample/'pages'/'rater.html').read_text()
    data = json.loads(page.split('id="data">')[1].split('</script>')[0])
    everything = ' '.join(HOSTILE.values())
    units = [unit | dict(id=f"{unit['id']}{everything}") for unit in data['units']]
    path = tmp_path/'hostile.html'
    path.write_text(review_page(everything, everything, everything, units))
    with opened(chromium, path) as tab:
        assert_harmless(tab, 2, [SCRIPT, HOSTILE['end of script']])
        tab.keyboard.press('y')
        assert tab.evaluate('window.pwned') is None

# ---------------------------------------------------------------- preview

@in_browser
def test_48_a_preview(chromium, tmp_path):
    "The name of the map, the columns and values of polygons; a polygon is clicked, so that they are shown"
    out = write_map(tmp_path/f'{HOSTILE["script"].replace("/", "")}\u202egnp.tif',
                    np.random.default_rng(0).random((64, 64)))
    left, top = GRID.c, GRID.f
    outlines = [shapely.box(left + 30 * k, top - 60, left + 30 * k + 20, top - 30) for k in range(len(HOSTILE))]
    columns = {f'{name} {number}': list(HOSTILE.values()) for number, name in enumerate(HOSTILE.values())
               if len(name) < 100}
    gpd.GeoDataFrame(columns, geometry=outlines, crs='EPSG:3413').to_parquet(tmp_path/'polygons.parquet')
    preview(out, tmp_path/'preview.html', tmp_path/'polygons.parquet')
    with opened(chromium, tmp_path/'preview.html') as tab:
        assert_harmless(tab, 2, [])
        for number, text in enumerate(HOSTILE.values()):
            click = 'new Event("click", {bubbles: true})'
            tab.evaluate(f'document.querySelectorAll("path")[{number}].dispatchEvent({click})')
            assert text.split('\u202e')[0][:50] in tab.evaluate('document.getElementById("details").textContent')
            assert tab.evaluate('document.documentElement.scrollWidth') <= 1280
        assert tab.evaluate('window.pwned') is None
        assert tab.evaluate(TURNED) is False
