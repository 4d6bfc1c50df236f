"Expected areas: against geodesic polygons, against sums over pixels, and intervals against full refits"
import json

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import Geod
from rasterio.transform import from_origin
from scipy.optimize import minimize
from scipy.special import expit
from shapely import Polygon

import rtsseg.areas
from helpers.evidence import counted_codes
from helpers.maps import read_map, write_map
from rtsseg.areas import PixelAreas, cell_grid, draw_calibrations, expected_area
from rtsseg.bootstrap import draw_groups, expanded_interval
from rtsseg.calibration import calibrate_evidence
from rtsseg.config import Calibrate, ConfigError, Metrics, load, to_yaml
from rtsseg.console import DataError
from rtsseg.evidence import Meter, evidence_path
from rtsseg.files import write_atomic
from rtsseg.ground import transformer
from rtsseg.prediction import STEPS, calibration_settings
from rtsseg.raster import Grid
from rtsseg.scores import clipped_scores
from rtsseg.toy import scored_tiles

# ---------------------------------------------------------------- ground areas

def outline(grid, points=200):
    "The outline of a grid as a polygon of longitude and latitude"
    height, width = grid.shape
    side = np.linspace(0, 1, points)
    column = width * np.concatenate([side, np.ones(points), 1 - side, np.zeros(points)])
    row = height * np.concatenate([np.zeros(points), side, np.ones(points), 1 - side])
    return Polygon(np.stack(transformer(grid.crs).transform(*(grid.transform @ (column, row))), 1))

CRSS = st.sampled_from([('EPSG:3413', 3.), ('EPSG:3857', 4.777), ('EPSG:32608', 10.), ('EPSG:4326', 1e-4),
                        ('EPSG:3995', 30.), ('EPSG:3574', 3.)])

@settings(max_examples=40, deadline=None)
@given(place=CRSS, lon=st.floats(-140, -130), lat=st.floats(60, 80), height=st.integers(1, 400),
       width=st.integers(1, 400))
def test_pixels_add_up_to_the_geodesic_polygon(place, lon, lat, height, width):
    "In any CRS, for any size: GeographicLib, which knows nothing of projections, is the judge"
    crs, pixel = place
    x, y = transformer('EPSG:4326', crs).transform(lon, lat)
    grid = Grid((height, width), crs, from_origin(x, y, pixel, pixel))
    area, _ = Geod(ellps='WGS84').geometry_area_perimeter(outline(grid))
    found = PixelAreas(grid).of_rows(0, height)
    # GeographicLib is good to about 0.1 m² per polygon of this size
    assert abs(found.sum() - abs(area)) < 1e-5 * abs(area) + 1
    assert found.shape == grid.shape

def test_rows_may_be_asked_for_in_any_parts():
    grid = Grid((130, 70), 'EPSG:3857', from_origin(-14e6, 12.5e6, 5, 5))
    areas = PixelAreas(grid)
    whole = areas.of_rows(0, 130)
    parts = [areas.of_rows(top, min(17, 130 - top)) for top in range(0, 130, 17)]
    assert np.array_equal(np.concatenate(parts), whole)

def test_web_mercator_inflates_thirteen_times():
    x, y = transformer('EPSG:4326', 'EPSG:3857').transform(-120, 74)
    areas = PixelAreas(Grid((10, 10), 'EPSG:3857', from_origin(x, y, 4.777, 4.777))).of_rows(0, 10)
    assert 13 < 4.777**2 / areas.mean() < 13.3

# ---------------------------------------------------------------- sums

@pytest.fixture(scope='module')
def evidence():
    logits, masks, table = scored_tiles(40, 120)
    meter = Meter(table)
    meter.update(logits, masks, np.arange(len(table)))
    return meter.evidence()

@pytest.fixture(scope='module')
def calibrations(evidence):
    "Tags of a map, by method"
    found = {}
    for method in ('temperature', 'slope_intercept'):
        calibration = calibrate_evidence(evidence, Calibrate(method=method), Metrics(replicates=20))
        found[method] = calibration_settings(calibration)
    return found

@pytest.fixture
def run(tmp_path, evidence):
    "A run folder with validation evidence"
    write_atomic(tmp_path/'run'/'config.yaml', to_yaml(load(name='example')))
    evidence.write(evidence_path(tmp_path/'run', 'val'))
    return tmp_path/'run'

def scores(shape=(150, 220)):
    rng = np.random.default_rng(4)
    return rng.normal(-4, 2, shape)

@pytest.mark.parametrize('transform', [from_origin(-2_500_123, 700_077, 3, 3), rasterio.Affine(3, 0, 55, 0, 3, 900)])
@pytest.mark.parametrize('cell', [50., 100., 10_000.])
def test_cells_hold_the_sums_of_their_pixels(tmp_path, calibrations, capsys, monkeypatch, transform, cell):
    "Pixel by pixel, in a loop; on grids that count rows down and up; whatever is read at once"
    probability = expit(scores())
    valid = np.add.outer(np.arange(150), np.arange(220)) > 120
    path = write_map(tmp_path/'map.tif', probability, valid, calibrations['slope_intercept'], transform=transform)
    made = expected_area(path, tmp_path/'areas.tif', cell=cell)
    area = PixelAreas(Grid((150, 220), 'EPSG:3413', transform)).of_rows(0, 150)
    stored = read_map(path) / STEPS
    with rasterio.open(tmp_path/'areas.tif') as dataset:
        planes, grid = dataset.read(), dataset.transform
    want = np.full(planes.shape[1:], np.nan)
    for row, column in np.argwhere(valid):
        x, y = transform @ (column + .5, row + .5)
        i, j = int(np.floor((grid.f - y) / cell)), int(np.floor((x - grid.c) / cell))
        want[i, j] = np.nan_to_num(want[i, j]) + stored[row, column] * area[row, column] / 1e6
    np.testing.assert_allclose(planes[0], want, rtol=1e-5)
    assert np.isnan(planes[1:]).all()
    assert (grid.c % cell, grid.f % cell) == (0, 0)
    assert made['expected_km2'] == pytest.approx(np.nansum(want), rel=1e-9)
    assert made['valid_km2'] == pytest.approx(area[valid].sum() / 1e6, rel=1e-9)
    assert made['low'] is None
    assert 'no interval: no run was named' in capsys.readouterr().err
    monkeypatch.setattr(rtsseg.areas, 'PIXELS_AT_ONCE', 999)
    again = expected_area(path, tmp_path/'again.tif', cell=cell)
    assert again['expected_km2'] == pytest.approx(made['expected_km2'], rel=1e-12)
    np.testing.assert_allclose(read_map(tmp_path/'again.tif'), planes[0], rtol=1e-6)

@settings(max_examples=50, deadline=None)
@given(left=st.floats(-1e6, 1e6), top=st.floats(-1e6, 1e6), cell=st.floats(10, 1e4), height=st.integers(1, 90),
       width=st.integers(1, 90))
def test_cells_cover_the_map(left, top, cell, height, width):
    "And none of them lies outside"
    cells = cell_grid(Grid((height, width), None, from_origin(left, top, 7, 7)), cell)
    (x0, y0), (x1, y1) = cells.transform @ (0, 0), cells.transform @ cells.shape[::-1]
    # of rounding
    slack = 1e-6 * cell
    assert -slack <= left - x0 <= cell + slack
    assert -slack <= x1 - (left + 7 * width) <= cell + slack
    assert -slack <= y0 - top <= cell + slack
    assert -slack <= top - 7 * height - y1 <= cell + slack

# ---------------------------------------------------------------- the interval

def refit(neg, pos, z, free_intercept):
    "Slope and intercept of least negative log-likelihood, by an optimiser that does not know the library's"
    def loss(theta):
        s = theta[0] * z + free_intercept * theta[1]
        return (pos @ np.logaddexp(0, -s) + neg @ np.logaddexp(0, s)) / (pos.sum() + neg.sum()) * 1e3
    slope, intercept = minimize(loss, [1., 0.], method='BFGS').x
    return slope, intercept * free_intercept

@pytest.mark.parametrize('method', ['temperature', 'slope_intercept'])
def test_the_interval_is_that_of_full_refits(tmp_path, evidence, calibrations, run, method):
    "Each replicate: blocks drawn, calibration fitted again, all pixels calculated again, and summed"
    tag = calibrations[method]
    probability = expit(tag['slope'] * scores() + tag['intercept'])
    path = write_map(tmp_path/'map.tif', probability, calibration=tag)
    made = expected_area(path, tmp_path/'areas.tif', run, replicates=60)
    area = PixelAreas(Grid(probability.shape, 'EPSG:3413', rasterio.open(path).transform)).of_rows(0, 150)
    z = clipped_scores(evidence.bins)
    draws, block = draw_groups(evidence['block'], 60)
    totals = []
    for draw in draws:
        times, positive = draw[block], evidence['positive']
        weight = np.where(positive, 1, 200 * times[positive].sum() / times[~positive].sum()) * times
        neg, pos = np.zeros(len(z)), np.zeros(len(z))
        for sign, mass in (('neg', neg), ('pos', pos)):
            code, count, tile = counted_codes(evidence, sign)
            np.add.at(mass, code, weight[tile] * count)
        seen = (neg + pos) > 0
        slope, intercept = refit(neg[seen], pos[seen], z[seen], method == 'slope_intercept')
        totals.append((expit(slope * scores() + intercept) * area).sum() / 1e6)
    low, high, _ = expanded_interval(np.array(totals), 40)
    # the map holds sixteen bits of each probability
    assert made['low'] == pytest.approx(low, rel=.01)
    assert made['high'] == pytest.approx(high, rel=.01)
    assert made['low'] < made['expected_km2'] < made['high']
    assert json.loads((tmp_path/'areas.tif.json').read_text()) == made

def test_without_a_change_of_calibration_the_interval_is_the_area(tmp_path, calibrations, run, monkeypatch):
    "Replicates that all are the calibration itself give the area back, cell by cell"
    tag = calibrations['slope_intercept']
    path = write_map(tmp_path/'map.tif', expit(scores()), calibration=tag)
    same = np.repeat([[tag['slope'], tag['intercept']]], 20, 0)
    draws = rtsseg.areas.CalibrationDraws(same, 40, '')
    monkeypatch.setattr(rtsseg.areas, 'draw_calibrations', lambda *_: draws)
    made = expected_area(path, tmp_path/'areas.tif', run, cell=60)
    assert made['low'] == pytest.approx(made['expected_km2'], rel=2e-4)
    assert made['low'] == pytest.approx(made['high'])
    with rasterio.open(tmp_path/'areas.tif') as dataset:
        expected, low, _ = dataset.read()
    np.testing.assert_allclose(low, expected, rtol=5e-4)

def test_another_run_is_refused(evidence, calibrations):
    half = evidence.select(evidence['block'] < 'b25')
    with pytest.raises(DataError, match='name the run that made the map'):
        draw_calibrations(half, calibrations['temperature'], 1, 20)

def test_a_run_without_evidence_gives_no_interval(tmp_path, calibrations, run, capsys):
    path = write_map(tmp_path/'map.tif', expit(scores()), calibration=calibrations['temperature'])
    evidence_path(run, 'val').unlink()
    made = expected_area(path, tmp_path/'areas.tif', run)
    assert (made['low'], made['high'], made['blocks']) == (None, None, 0)
    assert 'no interval: val.parquet is not in the run: rtsseg-evaluate' in capsys.readouterr().err

# ---------------------------------------------------------------- what is refused

def test_what_cannot_be_summed_is_refused(tmp_path, calibrations):
    "A raw map, one without a CRS, another raster; all problems at once; nothing is written"
    out = tmp_path/'areas.tif'
    raw = write_map(tmp_path/'raw.tif', expit(scores()), crs=None)
    with pytest.raises(DataError, match='rtsseg-calibrate') as raised:
        expected_area(raw, out)
    assert 'it has no CRS' in str(raised.value)
    good = write_map(tmp_path/'map.tif', expit(scores()), calibration=calibrations['temperature'])
    for cell in (-1, 0, 2, float('nan')):
        with pytest.raises(ConfigError, match='smaller than a pixel'):
            expected_area(good, out, cell=cell)
    before = good.read_bytes()
    with pytest.raises(DataError, match='not an area raster'):
        expected_area(good, good)
    assert good.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ['map.tif', 'raw.tif']

def test_a_map_that_is_not_calibrated_well_is_summed_with_a_warning(tmp_path, calibrations, capsys):
    tag = calibrations['temperature'] | dict(promise='not calibrated: probabilities add up to 105 times …')
    path = write_map(tmp_path/'map.tif', expit(scores()), calibration=tag)
    made = expected_area(path, tmp_path/'areas.tif')
    assert 'wrong by about the same factor' in capsys.readouterr().err
    assert made['promise'] == tag['promise']

def test_a_failed_write_leaves_the_old_raster(tmp_path, calibrations, monkeypatch):
    path = write_map(tmp_path/'map.tif', expit(scores()), calibration=calibrations['temperature'])
    out = tmp_path/'areas.tif'
    expected_area(path, out)
    before = out.read_bytes()
    monkeypatch.setattr(rtsseg.areas.os, 'replace', lambda *_: (_ for _ in ()).throw(OSError('no space left')))
    with pytest.raises(OSError, match='no space'):
        expected_area(path, out, cell=300)
    assert out.read_bytes() == before
    assert not list(tmp_path.glob('.*tmp'))

