"""Maps as polygons: geodesic areas of many polygons, and outlines of a large map in strips

python benchmarks/polygons.py [polygons] [side] [rounds]     CPU time of one thread

Areas and perimeters of 100,000 polygons of about 30 corners, 50 m to 5 km wide, between 60 and 80°N, beside a plain
loop over `Geod.geometry_area_perimeter`. Both agree within a millionth.
A map of 16384² pixels with 20,000 objects, and one of a quarter of its height, become outlines. Ours reads strips, and
also sums up the probabilities of each object. Its peer is plainly written: the whole array is read, thresholded and
given to `rasterio.features.shapes`. Both find as many objects of the same area. The peak of memory is that of one call
in a process of its own, above the imports.
"""
import json
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import rasterio
import rasterio.features
import shapely
from rasterio.transform import from_origin

from common import emit, emit_value, memory_in_process, peak_mb, turns
from rtsseg.ground import GEOD
from rtsseg.polygons import find_objects, geodesic_measures, read_maps
from rtsseg.prediction import NODATA, STEPS
from rtsseg.raster import write_raster

THRESHOLD = .5

def stars(count, rng):
    "Star-shaped polygons in longitude and latitude"
    found = []
    for _ in range(count):
        corners = int(rng.integers(5, 60))
        lon, lat, radius = rng.uniform(-180, 180), rng.uniform(60, 80), 25*100**rng.random()
        angle = 2*np.pi*np.arange(corners)/corners
        reach = np.degrees(radius*rng.uniform(.5, 1, corners)/6_371_000)
        x = lon + reach*np.cos(angle)/np.cos(np.radians(lat))
        found.append(shapely.Polygon(np.stack([x, lat + reach*np.sin(angle)], 1)))
    return np.array(found)

def areas_beside(count, rounds):
    "Areas and perimeters of many polygons"
    polygons = stars(count, np.random.default_rng(0))

    def ours():
        return geodesic_measures(polygons)

    def loop():
        return np.array([GEOD.geometry_area_perimeter(one) for one in polygons]).T

    expected = loop()
    errors = [float(np.abs(a/b - 1).max()) for a, b in zip(ours(), expected, strict=True)]
    assert max(errors) < 1e-6
    times = turns(ours, loop, rounds, warm=1, clock=time.process_time)
    emit(f'geodesic areas and perimeters of {count:,} polygons, beside a loop over Geod', *times, goal=1/10,
         corners=round(float(shapely.get_num_coordinates(polygons).mean()), 1),
         largest_error=f'{max(errors):.0e}')

def write_map(path, height, width, count):
    "A map of so many objects, some of which overlap, with a corner of nodata"
    rng = np.random.default_rng(0)
    values = np.full((height, width), STEPS//50, 'uint16')
    for _ in range(count):
        centre = [int(rng.integers(side)) for side in (width, height)]
        axes = [int(v) for v in rng.integers(4, 24, 2)]
        cv2.ellipse(values, centre, axes, int(rng.integers(180)), 0, 360, int(rng.integers(STEPS//2 + 9, STEPS)), -1)
    values[:height//8, :width//8] = NODATA
    grid = from_origin(-2_500_000, 700_000, 3, 3)
    write_raster(path, values[None], grid, 'EPSG:3413', nodata=NODATA, inner=512)
    with rasterio.open(path, 'r+') as ds:
        ds.scales = (1/STEPS,)
        ds.update_tags(RTSSEG=json.dumps(dict(model='none')))

def in_strips(path):
    found = find_objects(read_maps([path]), [THRESHOLD, .7, .9])
    return len(found), shapely.area(found.outline.to_numpy()).sum()

def whole_array(path):
    with rasterio.open(path) as ds:
        values = ds.read(1)
    mask = (values >= STEPS*THRESHOLD) & (values != NODATA)
    found = rasterio.features.shapes(mask.astype('uint8'), mask=mask, connectivity=8)
    polygons = [shapely.geometry.shape(one) for one, _ in found]
    return len(polygons), shapely.area(polygons).sum()

SIDES = dict(ours=in_strips, peer=whole_array)

def show_memory(side, path):
    "Print the megabytes that one call adds"
    before = peak_mb()
    SIDES[side](path)
    print(json.dumps(peak_mb() - before))

def outlines_beside(path, size, rounds):
    "Time and memory of the outlines of a map of this size"
    found = in_strips(path)
    assert found == whole_array(path)
    times = turns(lambda: in_strips(path), lambda: whole_array(path), rounds, warm=0, clock=time.process_time)
    what = f'outlines of {found[0]:,} objects on {size} pixels'
    emit(f'{what}, beside rasterio.features.shapes', *times, goal=1)
    ours, peer = (memory_in_process(__file__, side, path) for side in ('ours', 'peer'))
    emit_value(f'{what}: peak of memory', ours, peer, 'MB')

def map_beside(side, rounds):
    "A large map, and one of a quarter of its height"
    count = round(20_000*(side/16384)**2)
    with tempfile.TemporaryDirectory() as folder:
        for height in (side//4, side):
            path = Path(folder)/f'{height}.tif'
            write_map(path, height, side, count*height//side)
            outlines_beside(path, f'{height} × {side}', rounds)

def main(polygons=100_000, side=16384, rounds=3):
    areas_beside(polygons, rounds)
    map_beside(side, rounds)

if __name__ == '__main__':
    if sys.argv[1:2] in (['ours'], ['peer']):
        show_memory(*sys.argv[1:])
    else:
        main(*map(int, sys.argv[1:]))
