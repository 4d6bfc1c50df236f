"""The boundary band of guide 5.5 on real masks at 512², beside SciPy's dilation of the mask and of its background, band = both.

python benchmarks/boundary.py [rounds]     CPU time of one thread, on data that lies beside the project; the targets are compared where they should be equal

Two peers: dilation by a disc of the width, which gives the same band to the pixel, and by the cross that is SciPy's default, once for each pixel of the width,
which gives the same band at width 1 only. Outlines: thaw slumps drawn on the ground (tiles of 3 m pixels around every thirtieth slump), buildings (cut into
tiles), landslides (256² tiles, each pixel doubled).
"""
import math, sys, time, warnings
from pathlib import Path

import geopandas, numpy as np, rasterio
from rasterio.features import rasterize
from scipy.ndimage import binary_dilation
from shapely.affinity import affine_transform

from common import emit, turns
from rtsseg.augment import boundary
from rtsseg.config import Loss

DATA, SIDE, METRES = Path(__file__).resolve().parents[2]/'shared'/'data', 512, 3

def read(path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path) as f: return f.read(1)

def slumps(every=30):
    "Slumps as labels of 3 m pixels, each in the middle of its tile, with its neighbours"
    shapes = geopandas.read_file(next((DATA/'rts_polygons').glob('*.geojson'))).geometry
    for middle in (s.centroid for s in shapes.iloc[::every]):
        per_degree = 111_320/METRES                                     # pixels
        x, y = per_degree*math.cos(math.radians(middle.y)), per_degree
        near = shapes.cx[middle.x - SIDE/2/x:middle.x + SIDE/2/x, middle.y - SIDE/2/y:middle.y + SIDE/2/y]
        placed = [affine_transform(s, [x, 0, 0, -y, SIDE/2 - x*middle.x, SIDE/2 + y*middle.y]) for s in near]
        yield rasterize(placed, (SIDE, SIDE), dtype='uint8')

def buildings():
    for path in sorted((DATA/'dubai_landcover'/'masks').iterdir()):
        mask = read(path); mask = np.where(mask == 255, 255, mask == 0).astype(np.uint8)
        for y in range(0, len(mask) - SIDE + 1, SIDE):
            for x in range(0, mask.shape[1] - SIDE + 1, SIDE): yield np.ascontiguousarray(mask[y:y+SIDE, x:x+SIDE])

def landslides():
    for path in sorted((DATA/'s2_landslide_bd'/'masks').iterdir()): yield read(path).repeat(2, 0).repeat(2, 1)

def by_scipy(mask, cfg, width, **dilation):
    band = binary_dilation(mask == 1, **dilation) & binary_dilation(mask == 0, **dilation)
    target = mask.astype(np.float32)
    if cfg.boundary_handling == 'ignore': target[band] = 255
    else:
        band &= mask != 255
        target[band] = np.abs(target[band] - cfg.soft_label_value)
    return target

def main(rounds=3):
    if not DATA.exists(): return print(f'skipped: the masks belong into {DATA}')
    sets = dict(slumps=list(slumps()), buildings=list(buildings()), landslides=list(landslides()))
    masks = [m for s in sets.values() for m in s]
    held = {n: [len(s), sum(bool((m == 1).any() and (m == 0).any()) for m in s)] for n, s in sets.items()}
    for width in (1, 2, 3):
        disc = np.hypot(*np.ogrid[-width:width+1, -width:width+1]) <= width
        for handling in ('ignore', 'soft_labels'):
            cfg = Loss(boundary_handling=handling, boundary_ignore_width=width, boundary_soft_width=width)
            for name, dilation in (('disc', dict(structure=disc)), ('cross', dict(iterations=width))):
                if name == 'disc' or width == 1:
                    for m in masks: np.testing.assert_array_equal(boundary(m, cfg), by_scipy(m, cfg, width, **dilation))
                def ours():
                    for m in masks: boundary(m, cfg)
                def peer():
                    for m in masks: by_scipy(m, cfg, width, **dilation)
                a, b = ([s/len(masks) for s in c] for c in turns(ours, peer, rounds, warm=1, clock=time.process_time))
                emit(f'{handling}, {width} pixels, beside a {name}', a, b, goal=.1, tiles_and_those_with_a_boundary=held)

if __name__ == '__main__': main(*map(int, sys.argv[1:]))
