"Maps in a notebook: what is handed to lonboard"
import numpy as np
import pytest

from rtsseg.explore import column_colours
from rtsseg.ground import lonlat_centres
from rtsseg.manifest import read_manifest

pytest.importorskip('lonboard', reason='the extra map is not installed')

@pytest.fixture(scope='module')
def manifest(tiny_world):
    return read_manifest(tiny_world)

def test_footprints_lie_where_their_tiles_lie(manifest):
    "In degrees, each with the colour of its split, without a base map"
    shown = manifest.explore()
    assert shown.basemap is None
    layer, = shown.layers
    assert [value.as_py() for value in layer.get_line_color] == column_colours(manifest.table.split).tolist()
    rings = [np.array(shape.as_py()[0]) for shape in layer.table['geometry']]
    middles = [(ring.max(0) + ring.min(0)) / 2 for ring in rings]
    assert np.array(middles) == pytest.approx(np.stack(lonlat_centres(manifest.table), 1), abs=1e-4)

def test_numbers_have_a_ramp(manifest):
    layer, = manifest.explore('n_positive').layers
    colours = np.array([value.as_py() for value in layer.get_fill_color])
    most = manifest.table.n_positive.argmax()
    # the bright end of viridis, through which one sees
    assert colours[most].tolist() == [253, 231, 37, 110]
