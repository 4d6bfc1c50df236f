"Tiles of 32 pixels in three splits, ways to spoil them, and what the commands say of them"
import socket
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import rasterio
from rasterio.transform import Affine

from rtsseg.config import RtsConfig, load, to_yaml
from rtsseg.raster import write_raster
from rtsseg.manifest import read_manifest, write_manifest
from rtsseg.filecheck import check_files
from rtsseg.findings import error_lines
from helpers.runs import MODEL
from helpers.shell import shell

PLACE = Affine.translation(500_000, -2_000_000) @ Affine.scale(3, -3)
CFG = RtsConfig.model_validate({'data': {'tile_size': 32, 'split_check': 'warn'}})

def tile(folder, name, x=0, y=0, crs='EPSG:3413', size=32, seed=0, positive=True, dtype='uint8', valid=None):
    "One tile with a mask; its row"
    rng = np.random.default_rng([seed, abs(x), abs(y)])
    place = Affine.translation(x, -y) @ PLACE if crs else Affine.identity()
    mask = np.zeros((size, size), 'uint8'); mask[8:14, 8:14] = positive
    write_raster(folder/f'{name}.tif', rng.integers(1, 255, (3, size, size)).astype(dtype), place, crs, valid)
    write_raster(folder/f'{name}_m.tif', mask[None], place, crs)
    return dict(tile_id=name, image=f'{name}.tif', mask=f'{name}_m.tif', region='r', split='train')

@pytest.fixture
def world(tmp_path):
    "Six tiles in three splits, m.csv as a person writes it and full.csv as the library completes it, which then opens no raster"
    world = tmp_path/'world'; world.mkdir()
    rows = [tile(world, f't{i}', x=i * 96) | {'split': s} for i, s in enumerate(('train', 'train', 'val', 'val', 'test', 'test'))]
    pd.DataFrame(rows).to_csv(world/'m.csv', index=False); write_manifest(read_manifest(world/'m.csv'), world/'full.csv')
    return world

def change(file, name='m.csv', **fields):
    "Set fields of a manifest: field=(row, value)"
    t = pd.read_csv(file/name, dtype=str, keep_default_na=False)
    for c, (i, v) in fields.items():
        if c not in t: t[c] = ''
        t.loc[i, c] = v
    t.to_csv(file/name, index=False)

def rewrite(file, change=lambda a: a, shift=(0, 0), **profile):
    with rasterio.open(file) as ds: a, t, crs = ds.read(), ds.transform, ds.crs
    write_raster(file, change(a), t @ Affine.translation(*shift), profile.pop('crs', crs), **profile)

def extra(world, i, planes, **kw):
    "Give tile i an EXTRA raster"
    write_raster(world/f't{i}_e.tif', planes.astype('float32'), Affine.translation(96 * i, 0) @ PLACE, 'EPSG:3413', **kw)
    for name in ('m.csv', 'full.csv'): change(world, name, extra=(i, f't{i}_e.tif'))

def seen(world, name='full.csv', cfg=CFG): return {f.what: f for f in check_files(read_manifest(world/name), cfg.data)}
def wrong(world, name='full.csv', cfg=CFG): return error_lines(check_files(read_manifest(world/name), cfg.data))

def settings(world, name='full.csv', **more):
    "A run of a second on these tiles"
    tree = dict(name='small', runs=world.parent/'runs', device='cpu', epochs=1, batch_size=2, val_frequency=1, freeze_backbone_epochs=0, data=dict(manifest=world/name, tile_size=32, split_check='warn'),
                sampler=dict(curriculum=[dict(first=1, last=1, ratio=1)], positive_fraction=None), model=MODEL)
    return load(overrides=['augment.enabled=false', 'loader.num_workers=0', 'tracker.kind=none'], **tree | more)

def files(folder): return {f: f.read_bytes() for f in folder.rglob('*') if f.is_file()}

def refused(command, world, name='full.csv', *overlays):
    "What a command says on stderr; it ends with code 2, without a traceback, and leaves everything as it was"
    (world.parent/'small.yaml').write_text(to_yaml(settings(world, name))); before = files(world.parent)
    done = shell(command, '--config', ','.join(str(world.parent/f) for f in ('small.yaml', *overlays)))
    assert done.returncode == 2 and done.stderr.startswith('error: ') and 'Traceback' not in done.stderr + done.stdout, done.stderr[-3000:]
    assert files(world.parent) == before
    return done.stderr

@contextmanager
def nobody_calls():
    "A port of this machine that nobody may open meanwhile"
    with socket.create_server(('127.0.0.1', 0)) as server:
        server.setblocking(False); yield server.getsockname()[1]
        with pytest.raises(BlockingIOError): server.accept()
