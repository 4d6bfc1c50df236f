"""The boundary band of guide 5.5 on real masks at 512², beside SciPy's dilation of the mask and of its background

python benchmarks/boundary.py [rounds]     CPU time of one thread; needs the real data sets beside the project

Two peers. Dilation by a disc of the width gives the same band to the pixel. Dilation by a cross, the default of SciPy,
once for each pixel of the width, gives the same band at width 1 only. Where bands are the same, targets are compared.
Outlines: thaw slumps (tiles of 3 m pixels around every thirtieth slump), buildings (images cut into tiles), landslides
(256² tiles, each pixel doubled).
"""
import math
import sys
import time
import warnings
from pathlib import Path

import geopandas
import numpy as np
import rasterio
from rasterio.features import rasterize
from scipy.ndimage import binary_dilation
from shapely.affinity import affine_transform

from common import emit, per_item, turns
from rtsseg.augment import boundary
from rtsseg.config import Loss

DATA = Path(__file__).resolve().parents[2]/'shared'/'data'
SIDE, METRES = 512, 3

def read(path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path) as file:
            return file.read(1)

def slumps(every=30):
    "Slumps as labels of 3 m pixels, each in the middle of its tile, with its neighbours"
    shapes = geopandas.read_file(next((DATA/'rts_polygons').glob('*.geojson'))).geometry
    for middle in (shape.centroid for shape in shapes.iloc[::every]):
        # pixels in a degree
        y = 111_320/METRES
        x = y*math.cos(math.radians(middle.y))
        near = shapes.cx[middle.x - SIDE/2/x:middle.x + SIDE/2/x, middle.y - SIDE/2/y:middle.y + SIDE/2/y]
        to_pixels = [x, 0, 0, -y, SIDE/2 - x*middle.x, SIDE/2 + y*middle.y]
        yield rasterize([affine_transform(shape, to_pixels) for shape in near], (SIDE, SIDE), dtype='uint8')

def buildings():
    for path in sorted((DATA/'dubai_landcover'/'masks').iterdir()):
        classes = read(path)
        mask = np.where(classes == 255, 255, classes == 0).astype(np.uint8)
        for y in range(0, len(mask) - SIDE + 1, SIDE):
            for x in range(0, mask.shape[1] - SIDE + 1, SIDE):
                yield np.ascontiguousarray(mask[y:y + SIDE, x:x + SIDE])

def landslides():
    for path in sorted((DATA/'s2_landslide_bd'/'masks').iterdir()):
        yield read(path).repeat(2, 0).repeat(2, 1)

def by_scipy(mask, cfg, dilation):
    "The target, with the band between the dilated mask and its dilated background"
    band = binary_dilation(mask == 1, **dilation) & binary_dilation(mask == 0, **dilation)
    target = mask.astype(np.float32)
    if cfg.boundary_handling == 'ignore':
        target[band] = 255
        return target
    band &= mask != 255
    target[band] = np.abs(target[band] - cfg.soft_label_value)
    return target

def compare(masks, cfg, dilation, same_band, rounds):
    "Seconds a mask, of ours and of SciPy"
    def ours():
        for mask in masks:
            boundary(mask, cfg)

    def peer():
        for mask in masks:
            by_scipy(mask, cfg, dilation)

    if same_band:
        for mask in masks:
            np.testing.assert_array_equal(boundary(mask, cfg), by_scipy(mask, cfg, dilation))
    return per_item(turns(ours, peer, rounds, warm=1, clock=time.process_time), len(masks))

def has_boundary(mask):
    return bool((mask == 1).any() and (mask == 0).any())

def main(rounds=3):
    if not DATA.exists():
        sys.exit('skipped: the real data sets are not beside the project')
    sets = {'slumps': list(slumps()), 'buildings': list(buildings()), 'landslides': list(landslides())}
    masks = [mask for tiles in sets.values() for mask in tiles]
    held = {name: [len(tiles), sum(map(has_boundary, tiles))] for name, tiles in sets.items()}
    for width in (1, 2, 3):
        disc = np.hypot(*np.ogrid[-width:width + 1, -width:width + 1]) <= width
        for handling in ('ignore', 'soft_labels'):
            cfg = Loss(boundary_handling=handling, boundary_ignore_width=width, boundary_soft_width=width)
            for name, dilation in (('disc', {'structure': disc}), ('cross', {'iterations': width})):
                times = compare(masks, cfg, dilation, name == 'disc' or width == 1, rounds)
                what = f'boundary band, {handling}, {width} pixels, beside a {name}'
                emit(what, *times, goal=.1, tiles_and_those_with_a_boundary=held)

if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
