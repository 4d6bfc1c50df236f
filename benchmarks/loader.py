"""512² tiles from GeoTIFFs to a normalised, augmented tensor: our dataset beside torchgeo's with albumentations

python benchmarks/loader.py [rounds]      CPU time of one thread; a round is 25 tiles of each, every one drawn afresh

A tile is an image (R, G, B), a raster with two EXTRA bands and a mask, all uint8; the script writes them. Ours is the
dataset of a run whose files were checked, with the baseline's augmentation. The peer is torchgeo: three `RasterDataset`
and their intersection, `PreChippedGeoSampler`, and the same list of transforms in albumentations at its defaults. It
gets what is fastest for it: tiles that do not touch, so that a query meets one file, and bytes to transform.
"""
import os
import sys
import time
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')
import albumentations as A
import cv2
import numpy as np
import torch
from rasterio.transform import Affine

try:
    from torchgeo.datasets import RasterDataset
    from torchgeo.samplers import PreChippedGeoSampler
except ImportError:
    sys.exit('skipped: pip install torchgeo')

from augment import plain_list
from common import emit, per_item, turns
from rtsseg.config import load
from rtsseg.manifest import read_manifest
from rtsseg.raster import write_raster
from rtsseg.stats import compute_stats
from rtsseg.tiles import TileDataset

# more files than torchgeo keeps open
SIDE, TILES, ROUND = 512, 100, 25
BANDS = ['ndvi', 'relief']

def cloudy(rng, bands):
    "Smooth uint8 planes with noise, (bands, SIDE, SIDE)"
    ground = cv2.GaussianBlur(rng.standard_normal((SIDE, SIDE)), (0, 0), 6) * 400 + 110
    noise = rng.normal(0, 4, (bands, SIDE, SIDE))
    return (ground + noise).clip(1, 254).astype('uint8')

def write_tiles(folder):
    "All tiles and their manifest; they do not touch each other"
    for name in ('images', 'extra', 'masks'):
        (folder/name).mkdir()
    rng, lines = np.random.default_rng(0), ['tile_id,image,mask,extra,split,region']
    for i in range(TILES):
        column, row = i % 10, i // 10
        place = Affine(3, 0, 500_000 + column * 4 * SIDE, 0, -3, 8_100_000 - row * 4 * SIDE)
        mask = (cv2.GaussianBlur(rng.standard_normal((SIDE, SIDE)), (0, 0), 20) > .03).astype('uint8')
        for name, planes, described in (('images', cloudy(rng, 3), ()), ('extra', cloudy(rng, 2), BANDS),
                                        ('masks', mask[None], ())):
            write_raster(folder/name/f't{i:03}.tif', planes, place, 'EPSG:32610', names=described)
        lines.append(f't{i:03},images/t{i:03}.tif,masks/t{i:03}.tif,extra/t{i:03}.tif,train,here')
    (folder/'manifest.csv').write_text('\n'.join(lines) + '\n')

def our_dataset(folder):
    "Tiles of a run whose files were checked, and the statistics"
    here = Path(__file__).resolve().parent
    bands = f'data.extra_bands={BANDS}'.replace("'", '"')
    cfg = load(here.parent/'configs/rts_baseline.yaml', overrides=[bands, 'model.in_channels=5'])
    manifest = read_manifest(folder/'manifest.csv')
    stats = compute_stats(manifest, BANDS)
    return TileDataset(manifest, stats, cfg, georeference=False), stats

class Transforms:
    "A sample of torchgeo, augmented and normalised"
    def __init__(self, stats):
        lines = [*plain_list().transforms, A.Normalize(stats.mean[:3], stats.std[:3]), A.ToTensorV2()]
        self.compose = A.Compose(lines, additional_targets={'extra': 'mask'}, seed=42)
        self.mean, self.std = (torch.tensor(values[3:])[:, None, None] for values in (stats.mean, stats.std))

    def __call__(self, sample):
        planes = sample['image'].byte().permute(1, 2, 0).numpy()
        mask = sample['mask'].byte().numpy()
        out = self.compose(image=np.ascontiguousarray(planes[..., :3]), extra=np.ascontiguousarray(planes[..., 3:]),
                           mask=mask)
        extra = (out['extra'].permute(2, 0, 1) - self.mean) / self.std
        return dict(image=torch.cat([out['image'], extra]), target=out['mask'].float())

def their_dataset(folder, stats):
    "The intersection of images, EXTRA rasters and masks"
    class Masks(RasterDataset):
        is_image = False
    parts = RasterDataset(folder/'images') & RasterDataset(folder/'extra')
    both = parts & Masks(folder/'masks')
    both.transforms = Transforms(stats)
    return both

class Case:
    "Both sides on the same files"
    def __init__(self, folder):
        self.tiles, stats = our_dataset(folder)
        self.queries = their_dataset(folder, stats)
        self.numbers, self.places = count(), self.forever()

    def forever(self):
        sampler = PreChippedGeoSampler(self.queries, shuffle=True)
        while True:
            yield from sampler

    def ours(self):
        for _ in range(ROUND):
            n = next(self.numbers)
            out = self.tiles[(42, 1, 37 * n % TILES, n)]
        self.check(out)

    def peer(self):
        for _ in range(ROUND):
            out = self.queries[next(self.places)]
        self.check(out)

    def check(self, out):
        assert out['image'].shape == (5, SIDE, SIDE) and out['image'].dtype == torch.float32
        assert out['target'].shape == (SIDE, SIDE) and out['target'].dtype == torch.float32

def main(rounds=8):
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with TemporaryDirectory() as folder:
        write_tiles(Path(folder))
        case = Case(Path(folder))
        ours, peer = per_item(turns(case.ours, case.peer, rounds, clock=time.process_time), ROUND)
        rates = [round(1/np.median(seconds), 1) for seconds in (ours, peer)]
        emit('512² tile of image, EXTRA and mask, from GeoTIFFs to a tensor: ours / torchgeo and albumentations',
             ours, peer, goal=1/1.5, tiles_a_second=rates, threads=1)

if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
