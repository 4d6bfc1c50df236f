"Scenes of noise, model directories of untrained networks whose scores spread, and what is left of a map"
import json

import numpy as np
import rasterio
import torch
from rasterio.transform import from_origin

from helpers.runs import MODEL
from rtsseg.config import load
from rtsseg.infer import save_model
from rtsseg.models import build
from rtsseg.prediction import NODATA, STEPS, probability_to_uint16
from rtsseg.raster import write_raster
from rtsseg.stats import Stats

GRID = from_origin(-2_500_000, 700_000, 3, 3)
CRS = 'EPSG:3413'

def statistics(bands=()):
    "Statistics of uint8 tiles with these EXTRA bands"
    return Stats(
        channels=['R', 'G', 'B', *bands],
        dtype='uint8',
        scale=255.,
        mean=[.4, .35, .3] + [0.] * len(bands),
        std=[.2, .2, .2] + [1.] * len(bands),
        pixels=1,
        manifest_hash='none',
    )

def untrained_model(folder, stats=None, tile=64, source=None, draw=0, **network):
    """A model directory of an untrained network whose scores spread; `source` is what its data came from

    Other draws are other seeds; `network` replaces settings of the model."""
    stats = stats or statistics()
    bands = stats.channels[3:]
    torch.manual_seed(draw)
    data = dict(tile_size=tile, extra_bands=bands, source=source)
    cfg = load(seed=42 + draw, batch_size=8, data=data, model=MODEL | dict(in_channels=3 + len(bands)) | network)
    model = build(cfg.model)
    with torch.no_grad():
        model.segmentation_head[0].weight *= 30
    return save_model(folder, model, cfg, stats, dict(epoch=1, value=0., metrics={}), {})

def noise(height, width):
    "An image (3, height, width) without a pixel of 0"
    return np.random.default_rng(0).integers(1, 256, (3, height, width), 'uint8')

def write_scene(path, image, **profile):
    "Write an image as a scene with 0 as nodata; `profile` replaces its grid, CRS or nodata; the path"
    write_raster(path, image, **dict(transform=GRID, crs=CRS, nodata=0) | profile)
    return path

def read_map(path):
    "The pixels of a map, or the first band of any raster"
    with rasterio.open(path) as dataset:
        return dataset.read(1)

def map_bytes(out):
    "The bytes of a map and of its note"
    return [path.read_bytes() for path in (out, out.with_name(f'{out.name}.json'))]

def write_map(path, probability, valid=None, calibration=None, tile=64, **profile):
    "A map as `predict` writes it, of probabilities (H, W); `profile` replaces its grid or CRS; the path"
    valid = np.ones(probability.shape, bool) if valid is None else valid
    height, width = probability.shape
    layout = dict(driver='GTiff', height=height, width=width, count=1, dtype='uint16', nodata=NODATA)
    place = dict(compress='deflate', transform=GRID, crs=CRS) | profile
    with rasterio.open(path, 'w', **layout, **place) as dataset:
        dataset.write(probability_to_uint16(probability, valid), 1)
        dataset.scales = (1 / STEPS,)
        dataset.update_tags(RTSSEG=json.dumps(dict(tile=tile, views='none', calibration=calibration)))
    return path

def write_probability(path, values, settings=(), **place):
    "Write uint16 values as a map of rtsseg-predict; `settings` are further ones of its tag, `place` is its grid"
    write_raster(path, values[None], **dict(transform=GRID, crs=CRS, nodata=NODATA) | place)
    thresholds = {'1:20': .3, '1:200': .5, '1:1000': None}
    tag = dict(model='0' * 64, calibration=dict(ratio='1:200', thresholds=thresholds)) | dict(settings)
    with rasterio.open(path, 'r+') as ds:
        ds.scales = (1 / STEPS,)
        ds.update_tags(RTSSEG=json.dumps(tag))
    return path
