"Tiles of 32 pixels in three splits, ways to damage them, and what the checks and commands say about them"
import socket
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import rasterio
from rasterio.transform import Affine

from helpers.runs import MODEL
from helpers.shell import shell
from rtsseg.config import RtsConfig, load, to_yaml
from rtsseg.filecheck import check_files
from rtsseg.findings import error_lines
from rtsseg.manifest import read_manifest, write_manifest
from rtsseg.raster import write_raster

PLACE = Affine(3, 0, 500_000, 0, -3, -2_000_000)
CFG = RtsConfig.model_validate({'data': {'tile_size': 32, 'split_check': 'warn'}})

def write_tile(folder, name, x=0, y=0, crs='EPSG:3413', size=32, positive=True, dtype='uint8', valid=None):
    "Write an image and its mask with a square of 36 positive pixels, x metres east and y metres south; its row"
    rng = np.random.default_rng([0, abs(x), abs(y)])
    place = Affine.translation(x, -y) @ PLACE if crs else Affine.identity()
    mask = np.zeros((size, size), 'uint8')
    mask[8:14, 8:14] = positive
    write_raster(folder/f'{name}.tif', rng.integers(1, 255, (3, size, size)).astype(dtype), place, crs, valid)
    write_raster(folder/f'{name}_m.tif', mask[None], place, crs)
    return dict(tile_id=name, image=f'{name}.tif', mask=f'{name}_m.tif', region='r', split='train')

def make_world(folder):
    """Six tiles, two in each split. `m.csv` is written as a person does it; `full.csv` holds all columns,
    so that reading it opens no raster"""
    folder.mkdir()
    splits = ('train', 'train', 'val', 'val', 'test', 'test')
    rows = [write_tile(folder, f't{i}', x=96 * i) | {'split': split} for i, split in enumerate(splits)]
    pd.DataFrame(rows).to_csv(folder/'m.csv', index=False)
    write_manifest(read_manifest(folder/'m.csv'), folder/'full.csv')
    return folder

def set_cells(world, name='m.csv', **cells):
    "Change cells of a manifest: column=(row, value)"
    table = pd.read_csv(world/name, dtype=str, keep_default_na=False)
    for column, (row, value) in cells.items():
        if column not in table:
            table[column] = ''
        table.loc[row, column] = value
    table.to_csv(world/name, index=False)

def rewrite(file, change=lambda planes: planes, shift=(0, 0), **profile):
    "Change the pixels of a raster, move it by some pixels, or give it another CRS"
    with rasterio.open(file) as ds:
        planes, transform, crs = ds.read(), ds.transform, ds.crs
    crs = profile.pop('crs', crs)
    write_raster(file, change(planes), transform @ Affine.translation(*shift), crs, **profile)

def truncate(file):
    "Keep the first half of a file"
    content = file.read_bytes()
    file.write_bytes(content[:len(content) // 2])

def write_extra(world, i, planes, **options):
    "Give tile i an EXTRA raster"
    place = Affine.translation(96 * i, 0) @ PLACE
    write_raster(world/f't{i}_e.tif', planes.astype('float32'), place, 'EPSG:3413', **options)
    for name in ('m.csv', 'full.csv'):
        set_cells(world, name, extra=(i, f't{i}_e.tif'))

def findings(world, name='full.csv', cfg=CFG):
    "What the check of the files sees: {what: finding}"
    return {finding.what: finding for finding in check_files(read_manifest(world/name), cfg.data)}

def errors(world, name='full.csv', cfg=CFG):
    "The lines of all errors that the check of the files finds"
    return error_lines(check_files(read_manifest(world/name), cfg.data))

def with_extra(*bands):
    "The config of the check, with EXTRA bands"
    cfg = CFG.model_copy(deep=True)
    cfg.data.extra_bands = list(bands)
    return cfg

def settings(world, name='full.csv', **more):
    "The config of a run of a second on these tiles"
    tree = dict(name='small', runs=world.parent/'runs', device='cpu', epochs=1, batch_size=2, val_frequency=1,
                freeze_backbone_epochs=0, data=dict(manifest=world/name, tile_size=32, split_check='warn'),
                sampler=dict(curriculum=[dict(first=1, last=1, ratio=1)], positive_fraction=None), model=MODEL)
    overrides = ['augment.enabled=false', 'loader.num_workers=0', 'tracker.kind=none']
    return load(overrides=overrides, **tree | more)

def files(folder):
    "The content of all files below a folder"
    return {file: file.read_bytes() for file in folder.rglob('*') if file.is_file()}

def refused(command, world, name='full.csv', *overlays):
    "What a command says on stderr when it refuses: exit code 2, no traceback, and nothing is written"
    (world.parent/'small.yaml').write_text(to_yaml(settings(world, name)))
    before = files(world.parent)
    configs = [str(world.parent/file) for file in ('small.yaml', *overlays)]
    done = shell(command, '--config', ','.join(configs))
    assert done.returncode == 2 and done.stderr.startswith('error: '), done.stderr[-3000:]
    assert 'Traceback' not in done.stderr + done.stdout, done.stderr[-3000:]
    assert files(world.parent) == before
    return done.stderr

@contextmanager
def no_connection():
    "A port of this machine that must not be opened meanwhile"
    with socket.create_server(('127.0.0.1', 0)) as server:
        server.setblocking(False)
        yield server.getsockname()[1]
        with pytest.raises(BlockingIOError):
            server.accept()
