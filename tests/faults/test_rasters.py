"Faults 8 to 14: rasters that cannot be read, or are not what they should be"
import re
import shutil
import struct
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import rasterio
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from helpers.tiles import (
    PLACE,
    errors,
    files,
    make_world,
    no_connection,
    refused,
    rewrite,
    set_cells,
    settings,
    truncate,
    with_extra,
    write_extra,
    write_tile,
)
from rtsseg.cli import rtsseg_check
from rtsseg.columns import complete_table
from rtsseg.config import TableSource, to_yaml
from rtsseg.console import DataError
from rtsseg.filecheck import check_files
from rtsseg.importers import import_table
from rtsseg.loop import fit
from rtsseg.manifest import Manifest, add_hashes, read_manifest, write_manifest
from rtsseg.models import build
from rtsseg.prepare import check_all_tiles, statistics, stats_path
from rtsseg.segment import SegmentTask
from rtsseg.stats import compute_stats
from rtsseg.tiles import UnreadableTiles, loaders, read_tile

FAULTS = {8: ('a truncated or otherwise unreadable tile',
              'refused by the check; a run that meets one leaves it out and counts it, up to 0.1% of the tiles of a '
              'split, then stops, to be resumed'),
          9: ('a flipped byte in an uncompressed raster', 'refused where the manifest holds the SHA-256 of the file'),
          10: ('blocks that were never written, and would be read as 0',
               'refused, with their share, unless nodata or a mask band declares them'),
          11: ('a file of a few kilobytes that claims 200000 × 200000 pixels, or a block of gigabytes',
               'refused before a pixel is read'),
          12: ('a VRT or an MRF under the name of a GeoTIFF', 'refused; no file is made, no connection opened'),
          13: ('a wrong CRS or none, a wrong size, type or number of bands', 'refused'),
          14: ('NaN or infinity that no nodata declares; a band that is constant over a split', 'refused')}

# ---------------------------------------------------------------- 8: unreadable tiles
def test_08_every_unreadable_tile_is_listed(world):
    "Tile, field, file and what is wrong, for each of them; exit code 2, and nothing is written"
    for name in ('t0.tif', 't2_m.tif', 't5.tif'):
        truncate(world/name)
    printed = refused('rtsseg-check', world)
    for i, field, name in ((0, 'image', 't0.tif'), (2, 'mask', 't2_m.tif'), (5, 'image', 't5.tif')):
        assert f"files: tile 't{i}', {field} '{name}': {name} cannot be read" in printed

def test_08_no_list_is_endless(tmp_path):
    place = dict(n_positive=36, ymin=0, ymax=1, crs='EPSG:3413', pixel_size=3)
    rows = [write_tile(tmp_path, f't{i:03}', x=96 * i) | place | dict(xmin=i, xmax=i + 1) for i in range(60)]
    for file in tmp_path.glob('*[0-9].tif'):
        truncate(file)
    pd.DataFrame(rows).to_csv(tmp_path/'full.csv', index=False)
    found = errors(tmp_path)
    assert len([line for line in found if 'cannot be read' in line]) == 50 and '… and 10 more' in found

@pytest.fixture(scope='module')
def many_made(tmp_path_factory):
    "The world of `many`, made once"
    world = make_world(tmp_path_factory.mktemp('many')/'world')
    table = read_manifest(world/'full.csv').table.drop(columns='positive')
    shutil.copy(world/'t0_m.tif', world/'zero.tif')
    rewrite(world/'zero.tif', lambda mask: mask * 0)
    first = table[table.split == 'train'].iloc[[0]]
    train = pd.concat([first] * 1001, ignore_index=True)
    train['tile_id'] = [f'n{i:04}' for i in range(1001)]
    train.loc[5:, ['mask', 'n_positive']] = ['zero.tif', 0]
    # side by side, as far as the table knows
    train[['xmin', 'xmax']] += 96 * (10 + np.arange(1001)[:, None])
    for i in range(5):
        shutil.copy(world/'t0.tif', world/f'p{i}.tif')
        train.loc[i, 'image'] = f'p{i}.tif'
    write_manifest(pd.concat([train, table[table.split != 'train']]), world/'many.csv')
    return world

@pytest.fixture
def many(many_made, tmp_path):
    """many.csv: 1001 training tiles, five of them positive and drawn in every epoch. All others are one file; the
    positive ones have files of their own, which a test may damage"""
    return shutil.copytree(many_made, tmp_path/'world')

@pytest.fixture(scope='module')
def statistics_made(many_made):
    "The folder with the statistics of `many`, for runs of one and of two epochs"
    manifest = read_manifest(many_made/'many.csv')
    stats = statistics(settings(many_made, 'many.csv'), manifest)
    stats.save(stats_path(settings(many_made, 'many.csv', epochs=2), manifest))
    return many_made.parent/'runs'

@pytest.fixture
def counted(many, statistics_made):
    "`many`, whose statistics exist"
    shutil.copytree(statistics_made, many.parent/'runs')
    return many

def train_on(world, workers=0, **more):
    "A run on these tiles, without its notebook"
    cfg = settings(world, 'many.csv', **more)
    cfg.loader.num_workers = workers
    feed = loaders(cfg)
    task = SegmentTask(cfg, feed.manifest.of('val').table, 100.)
    watch = UnreadableTiles(feed.train.dataset, feed.val.dataset)
    return fit(cfg, task, build(cfg.model), feed.train, feed.val, world.parent/'run', [watch])

@pytest.mark.parametrize('workers', [0, 2])
def test_08_one_tile_of_a_thousand_is_left_out(many, workers, capsys):
    "Statistics and run do without it, whichever process read it; it is named once, and counted at the end"
    truncate(many/'p3.tif')
    done = train_on(many, workers, epochs=2)
    printed = capsys.readouterr()
    message = "tile 'n0003', image 'p3.tif': p3.tif cannot be read"
    assert done.finished and done.skipped == 0
    assert f'note: statistics: left out: {message}' in printed.err
    assert printed.out.count(f'training: {message}') == 1
    assert 'note: 1 of 1001 training tiles could not be read, and counted as 255' in printed.out

@pytest.mark.parametrize('workers', [0, 2])
def test_08_more_than_that_stop_the_run(counted, workers):
    "It says which tiles and files, and resumes when they are whole again"
    whole = (counted/'p1.tif').read_bytes()
    for i in (1, 2):
        truncate(counted/f'p{i}.tif')
    first = train_on(counted, workers, epochs=2)
    assert not first.finished
    assert re.match(r"training: 2 of 1001 tiles cannot be read, which is more than 0.1%: tile 'n000[12]', "
                    r"image 'p[12].tif': p[12].tif cannot be read.*; tile 'n000[12]', image", first.reason)
    # what stopped the run stops it again
    second = train_on(counted, workers, epochs=2)
    assert not second.finished and second.step == first.step + 1
    for i in (1, 2):
        (counted/f'p{i}.tif').write_bytes(whole)
    assert train_on(counted, workers, epochs=2).finished

def test_08_processes_count_together(counted, tmp_path):
    """Each process reads other tiles. Before a validation is kept, and at the end of an epoch, all know the unreadable
    ones of all, and stop together"""
    feed = loaders(settings(counted, 'many.csv'))
    for i in (1, 2):
        truncate(counted/f'p{i}.tif')
    def reduce(flags):
        "The other process has found tile 2"
        found = flags.clone()
        if len(found) == 1001:
            found[2] += 1
        return found
    reasons = []
    accelerator = SimpleNamespace(num_processes=2, is_main_process=True, device='cpu', reduce=reduce)
    run = SimpleNamespace(folder=tmp_path, stop=reasons.append, accelerator=accelerator)
    watch = UnreadableTiles(feed.train.dataset, feed.val.dataset)
    assert feed.train.dataset[1]['target'].eq(255).all()
    watch.on_step(run)
    assert not reasons
    watch.on_judged(run)
    assert reasons and reasons[0].startswith('training: 2 of 1001 tiles cannot be read')

def test_08_unreadable_tiles_in_validation(counted):
    """Nothing is kept of a validation that lacked tiles, even the last one: the run stops until they are mended, and
    then ends as if nothing had happened"""
    whole = (counted/'t3_m.tif').read_bytes()
    truncate(counted/'t3_m.tif')
    for _ in range(2):
        done = train_on(counted, epochs=1)
        assert not done.finished and not done.history and not done.best
        assert done.reason.startswith('validation: 1 of 2 tiles cannot be read, which is more than 0.1%: '
                                      "tile 't3', mask 't3_m.tif'")
    (counted/'t3_m.tif').write_bytes(whole)
    assert train_on(counted, epochs=1).finished

def test_08_statistics_of_too_few_tiles_are_refused(many):
    "All that is wrong with the training files in one answer, and no statistics are written"
    for i in (1, 2):
        truncate(many/f'p{i}.tif')
    rewrite(many/'p4.tif', lambda planes: planes.astype('uint16'))
    with pytest.raises(DataError) as error:
        loaders(settings(many, 'many.csv'))
    for message in ('2 of 1001 tiles cannot be read, which is more than 0.1%', "tile 'n0001', image 'p1.tif'",
                    "tile 'n0002', image 'p2.tif'", "tile 'n0004', image 'p4.tif': uint16, and 998 tiles are uint8"):
        assert f'statistics: {message}' in str(error.value)
    assert not (many.parent/'runs').exists()

@pytest.mark.parametrize('content', ['{', '[]', '{"training": 5}', '{"training": [1]}', '\0'])
def test_08_a_damaged_list_of_lost_tiles(counted, tmp_path, content, capsys):
    "It is not used, a note says so, and the run begins"
    (tmp_path/'unread.json').write_text(content)
    feed = loaders(settings(counted, 'many.csv'))
    watch = UnreadableTiles(feed.train.dataset, feed.val.dataset)
    # it does not ask the run to stop
    watch.on_start(SimpleNamespace(folder=tmp_path))
    printed = capsys.readouterr()
    assert 'note: unread.json' in printed.out + printed.err

# ---------------------------------------------------------------- 9: hashes

def write_uncompressed(file):
    "Write a raster again without compression, so that a flipped byte is a changed pixel"
    with rasterio.open(file) as ds:
        planes, names, profile = ds.read(), ds.descriptions, dict(ds.profile)
    del profile['compress']
    with rasterio.open(file, 'w', **profile) as ds:
        ds.write(planes)
        for band, name in enumerate(names, 1):
            ds.set_band_description(band, name or '')

@pytest.mark.parametrize('field', ['image', 'mask', 'extra'])
def test_09_a_flipped_byte(world, field):
    "Without a hash it is not seen; with one, each reading of the tile sees it"
    write_extra(world, 0, np.random.default_rng(0).normal(size=(1, 32, 32)), names=['ndvi'])
    for name in ('t0.tif', 't0_m.tif', 't0_e.tif'):
        write_uncompressed(world/name)
    sealed = read_manifest(write_manifest(add_hashes(read_manifest(world/'full.csv')), world/'sealed.csv'))
    read_tile(sealed, 0, ['ndvi'])
    file = world/sealed.table[field][0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    read_tile(read_manifest(world/'full.csv'), 0, ['ndvi'])
    message = f"tile 't0', {field} '{file.name}': its SHA-256 is .*… in the manifest: the file is not what it was"
    with pytest.raises(DataError, match=message):
        read_tile(sealed, 0, ['ndvi'])
    with pytest.raises(DataError, match=message):
        compute_stats(sealed.of('train'), ['ndvi'])
    assert any(re.search(message, line) for line in errors(world, 'sealed.csv', with_extra('ndvi')))

@pytest.mark.parametrize('value', ['abc', 'g' * 64, '0' * 63, '0' * 65])
@pytest.mark.parametrize('field', ['sha256', 'mask_sha256', 'extra_sha256'])
def test_09_not_a_hash(world, field, value):
    set_cells(world, **{field: (1, value)})
    with pytest.raises(DataError, match=rf"row 2 \(tile_id 't1'\), {field}: not a SHA-256"):
        read_manifest(world/'m.csv')

def test_09_hashes_are_part_of_the_manifest_where_they_are(world):
    "Empty columns change no manifest; filled ones do, in every format"
    plain = read_manifest(world/'full.csv')
    set_cells(world, 'm.csv', sha256=(0, ''))
    assert read_manifest(world/'m.csv').hash == plain.hash
    sealed = add_hashes(plain)
    hashes = {read_manifest(write_manifest(sealed, world/f's.{suffix}')).hash
              for suffix in ('csv', 'parquet', 'geoparquet', 'gpkg')}
    assert len(hashes) == 1 and plain.hash not in hashes

# ------------------------------------------------------- 10: blocks that were never written
QUARTERS = [(y, y + 16, x, x + 16) for y in (0, 16) for x in (0, 16)]
TILED = dict(driver='GTiff', width=32, height=32, dtype='uint8', crs='EPSG:3413', transform=PLACE, tiled=True,
             blockxsize=16, blockysize=16, SPARSE_OK=True)

def write_with_holes(file, quarters=1, count=3, valid=None, whole_bands=(), names=(), **profile):
    "A raster of 32 × 32 pixels in four blocks, of which the first `quarters` are written"
    profile = TILED | profile
    planes = np.random.default_rng(0).integers(1, 200, (count, 32, 32)).astype(profile['dtype'])
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(file, 'w', count=count, **profile) as ds:
        for top, bottom, left, right in QUARTERS[:quarters]:
            ds.write(planes[:, top:bottom, left:right], window=((top, bottom), (left, right)))
        for band in whole_bands:
            ds.write(planes[band - 1], band)
        if valid is not None:
            ds.write_mask(valid)
        for band, name in enumerate(names, 1):
            ds.set_band_description(band, name)

HOLES = {'three of four': ('75.0', dict(quarters=1)),
         'compressed': ('75.0', dict(quarters=1, compress='deflate')),
         'in one band alone': ('75.0', dict(quarters=1, interleave='band', whole_bands=[1, 2])),
         'all': ('100.0', dict(quarters=0)),
         'one of four': ('25.0', dict(quarters=3))}

@pytest.mark.parametrize('holes', HOLES)
def test_10_blocks_that_were_never_written(world, holes):
    "They would be black ground to a model; the tile and its share of them are named"
    share, options = HOLES[holes]
    write_with_holes(world/'t0.tif', **options)
    assert (f"files: tile 't0', image 't0.tif': {share}% of its pixels lie in blocks that were never written, "
            'and no nodata declares them: they would be read as 0') in errors(world)
    with pytest.raises(DataError, match='never written'):
        read_tile(read_manifest(world/'full.csv'), 0)

def test_10_declared_blocks_may_be_missing(world):
    "A nodata value or a mask band declares them"
    valid = np.zeros((32, 32), bool)
    valid[:16, :16] = True
    for options in (dict(nodata=0), dict(valid=valid)):
        write_with_holes(world/'t0.tif', **options)
        mask = read_tile(read_manifest(world/'full.csv'), 0)[2]
        assert ((mask != 255) == valid).all()

def test_10_a_mask_may_be_unwritten(world):
    "It is read as 0, which is background"
    with rasterio.open(world/'t0_m.tif', 'w', count=1, **TILED):
        pass
    assert (read_tile(read_manifest(world/'full.csv'), 0)[2] == 0).all()

def test_10_in_an_extra_band(world):
    write_with_holes(world/'t0_e.tif', count=1, dtype='float32', names=['ndvi'])
    set_cells(world, 'full.csv', extra=(0, 't0_e.tif'))
    with pytest.raises(DataError, match="extra 't0_e.tif': 75.0% of its pixels lie in blocks"):
        read_tile(read_manifest(world/'full.csv'), 0, ['ndvi'])

# ---------------------------------------------------------------- 11, 12: what a file claims to be
CLAIMS = {'200000 × 200000 pixels': dict(width=200_000, height=200_000, blockxsize=16384, blockysize=16384),
          'blocks of 32768 × 32768 pixels': dict(blockxsize=32768, blockysize=32768)}

@pytest.mark.parametrize('claim', CLAIMS)
def test_11_a_huge_claim(world, claim):
    "200000 × 200000 pixels, or a block of gigabytes, in a small file"
    profile = TILED | dict(count=3, compress='deflate', bigtiff='YES') | CLAIMS[claim]
    with rasterio.open(world/'t0.tif', 'w', **profile):
        pass
    assert (world/'t0.tif').stat().st_size < 10**6
    with pytest.raises(DataError, match=f'claims {claim} in 3 bands'):
        read_manifest(world/'m.csv')
    with pytest.raises(DataError, match=f'claims {claim} in 3 bands'):
        read_tile(read_manifest(world/'full.csv'), 0)

def test_11_a_huge_number_of_blocks(tmp_path):
    "A hundred thousand strips of one row each, one of them written"
    with rasterio.open(tmp_path/'a.tif', 'w', driver='GTiff', width=30, height=100_000, count=3, dtype='uint8',
                       blockysize=1, SPARSE_OK=True) as ds:
        ds.write(np.ones((3, 1, 30), 'uint8'), window=((0, 1), (0, 30)))
    row = dict(tile_id='a', image='a.tif', mask='', region='r', split='train', crs='none', block='b')
    with pytest.raises(DataError, match='a.tif claims 100000 blocks: more than 65536'):
        complete_table(pd.DataFrame([row]), tmp_path)

DISGUISES = {
    'VRT': ('<VRTDataset rasterXSize="32" rasterYSize="32"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
            '<SourceFilename>{}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>'),
    'MRF': ('<MRF_META><Raster><Size x="32" y="32" c="3"/></Raster><CachedSource><Source>{}</Source></CachedSource>'
            '</MRF_META>'),
    'WMS': '<GDAL_WMS><Service name="TMS"><ServerUrl>{}</ServerUrl></Service></GDAL_WMS>',
    'nothing': '',
    'the first bytes of a TIFF': 'II*\0',
    'an address': '{}'}

@pytest.mark.parametrize('disguise', DISGUISES)
def test_12_only_a_geotiff_is_opened(world, disguise):
    "Whatever else a file of that name holds: no file is made beside it, and no connection is opened"
    with no_connection() as port:
        (world/'t1.tif').write_text(DISGUISES[disguise].format(f'/vsicurl/http://127.0.0.1:{port}/x.tif'))
        before = files(world)
        reason = 't1.tif (is not a GeoTIFF: it (begins with|is empty)|cannot be read)'
        with pytest.raises(DataError, match=f'row 2 .*{reason}'):
            read_manifest(world/'m.csv')
        assert any(re.search(f"tile 't1', image 't1.tif': {reason}", line) for line in errors(world))
        assert files(world) == before

# ---------------------------------------------------------------- 13, 14: what does not fit
PAIR = ('t0.tif', 't0_m.tif')

def rewrite_all(world, names, change=lambda planes: planes, **how):
    for name in names:
        rewrite(world/name, change, **how)

def cut_columns(planes):
    return planes[:, :-4]

def without_green(planes):
    return planes * np.array([1, 0, 1], 'uint8')[:, None, None]

MISFITS = {
    'another size': (lambda world: rewrite_all(world, PAIR, cut_columns),
                     "tile size: tile 't0', image 't0.tif': 28 × 32 pixels"),
    'another type than the others': (lambda world: rewrite(world/'t0.tif', lambda planes: planes.astype('uint16')),
                                     "dtype: tile 't0', image 't0.tif': uint16, and 5 tiles are uint8"),
    'an unknown type': (lambda world: rewrite(world/'t0.tif', lambda planes: planes.astype('float32')),
                        "files: tile 't0', image 't0.tif': an image is uint8 or uint16, this one is float32"),
    'one band': (lambda world: rewrite(world/'t0.tif', lambda planes: planes[:1]),
                 "files: tile 't0', image 't0.tif': an image has 3 bands, this one has 1"),
    'five bands': (lambda world: rewrite(world/'t0.tif', lambda planes: np.concatenate([planes, planes[:2]])),
                   "files: tile 't0', image 't0.tif': an image has 3 bands, this one has 5"),
    'another CRS': (lambda world: rewrite_all(world, PAIR, crs='EPSG:32610'),
                    "grid: tile 't0', image 't0.tif': lies elsewhere than the manifest says "
                    '(CRS EPSG:32610 and EPSG:3413)'),
    'no CRS': (lambda world: rewrite_all(world, PAIR, crs=None),
               "grid: tile 't0', image 't0.tif': the manifest says CRS EPSG:3413, the raster None"),
    'another place': (lambda world: rewrite_all(world, PAIR, shift=(7, 0)),
                      "grid: tile 't0', image 't0.tif': lies elsewhere than the manifest says"),
    'an image without the CRS of its mask': (lambda world: rewrite(world/'t0.tif', crs=None),
                                             "files: tile 't0', mask 't0_m.tif': the mask has another CRS than its "
                                             'image (EPSG:3413, None)'),
    'a band without content': (lambda world: rewrite_all(world, ('t2.tif', 't3.tif'), without_green),
                               'constant bands val: G')}

@pytest.mark.parametrize('misfit', MISFITS)
def test_13_14_what_does_not_fit(world, misfit):
    "Each is an error that names tile and file (or split and band)"
    damage, message = MISFITS[misfit]
    what = message.split(':')[0]
    assert not any(line.startswith(f'{what}:') for line in errors(world))
    damage(world)
    found = errors(world)
    assert any(line.startswith(message) for line in found), found

LATE = {
    "t3', mask 't3_m.tif': values 0, 2": lambda world: rewrite(world/'t3_m.tif', lambda mask: mask * 2),
    "t2', image 't2.tif': an image has 3 bands": lambda world: rewrite(world/'t2.tif', lambda planes: planes[:2]),
    "t2', image 't2.tif': uint16, and 5 tiles are uint8":
        lambda world: rewrite(world/'t2.tif', lambda planes: planes.astype('uint16')),
    "t3', mask 't3_m.tif': n_positive is 36": lambda world: rewrite(world/'t3_m.tif', lambda mask: mask * 0),
    "t4', (image|mask) 't4.*(CRS|elsewhere)": lambda world: rewrite(world/'t4.tif', crs='EPSG:3031'),
    "t5', image 't5.tif': t5.tif cannot be read": lambda world: truncate(world/'t5.tif')}

@pytest.mark.parametrize('message', LATE)
def test_13_15_17_in_validation_and_test(world, message):
    """Not found when the first validation comes, days later: a run reads every tile of its data once before it begins,
    and is refused; a second config on the same data need not"""
    cfg = settings(world)
    LATE[message](world)
    with pytest.raises(DataError, match=message):
        check_all_tiles(cfg, read_manifest(world/'full.csv'))
    assert not cfg.runs.exists()

def test_13_data_that_was_read_before(world):
    "The statistics of a run prove that its data were read: another config on them need not wait"
    manifest = read_manifest(world/'full.csv')
    statistics(settings(world), manifest)
    truncate(world/'t5.tif')
    check_all_tiles(settings(world, epochs=2), manifest)
    data = dict(manifest=world/'full.csv', tile_size=32, extra_bands=['x'], split_check='warn')
    with pytest.raises(DataError):
        check_all_tiles(settings(world, data=data, model=dict(in_channels=4)), manifest)

def test_13_through_the_check(world):
    "Several at once, all in one answer"
    MISFITS['one band'][0](world)
    rewrite_all(world, ('t1.tif', 't1_m.tif'), cut_columns)
    printed = refused('rtsseg-check', world)
    assert "tile 't0', image 't0.tif': an image has 3 bands" in printed
    assert "tile 't1', image 't1.tif': 28 × 32 pixels" in printed

# heights, space, a globe with heights, a map with heights, a drawing
NOT_A_MAP = ['EPSG:5773', 'EPSG:4978', 'EPSG:4979', 'EPSG:32661+5773', 'LOCAL_CS["x",UNIT["metre",1]]']

@pytest.mark.parametrize('crs', NOT_A_MAP)
@pytest.mark.parametrize('with_block', [True, False])
def test_13_a_crs_of_no_map(world, crs, with_block):
    "Heights, space or a drawing in the manifest: the row is named"
    set_cells(world, 'full.csv', crs=(0, crs))
    if not with_block:
        set_cells(world, 'full.csv', block=(0, ''))
    with pytest.raises(DataError, match=r"row 1 \(tile_id 't0'\), crs: .* is not a map's coordinate reference system"):
        read_manifest(world/'full.csv')

@pytest.mark.parametrize('crs', NOT_A_MAP)
def test_13_a_raster_of_no_map(world, crs):
    "The same in a raster, whether the manifest knows its place or asks it"
    rewrite_all(world, PAIR, crs=crs)
    message = "grid: tile 't0', image 't0.tif': its footprint .*is not a map's coordinate reference system"
    found = errors(world)
    assert any(re.match(message, line) for line in found), found
    message = r"row 1 \(tile_id 't0'\), image 't0.tif': .* is not a map's coordinate reference system"
    with pytest.raises(DataError, match=message):
        read_manifest(world/'m.csv')

@pytest.mark.parametrize('crs', ['+proj=ob_tran +o_proj=longlat +o_lon_p=0 +o_lat_p=39 +lon_0=18',
                                 '+proj=ob_tran +o_proj=merc +o_lat_p=39 +o_lon_p=0', '+proj=gnom +lat_0=-90'])
def test_13_a_crs_that_tears_the_ground(world, crs):
    "Whatever becomes of a footprint there, the tile is listed with all other problems"
    set_cells(world, 'full.csv', crs=(0, crs))
    truncate(world/'t5.tif')
    found = errors(world)
    for start in ("grid: tile 't0', image 't0.tif': ", "files: tile 't5', image 't5.tif': "):
        assert any(line.startswith(start) for line in found), found

@pytest.mark.parametrize('odd', ['t1', 't3', 't4'])
def test_13_a_wrong_tile_size_before_training(world, odd):
    """A tile of another size, of any split, ends a run before anything is written; statistics of another data.tile_size
    do not hide it"""
    statistics(settings(world), read_manifest(world/'full.csv'))
    data = dict(manifest=world/'full.csv', tile_size=64, split_check='warn')
    with pytest.raises(DataError) as error:
        loaders(settings(world, data=data))
    expected = [f"full.csv: tile 't{i}', image 't{i}.tif': 32 × 32 pixels, and data.tile_size is 64" for i in range(6)]
    assert str(error.value).splitlines() == expected
    shutil.rmtree(world.parent/'runs')
    rewrite(world/f'{odd}.tif', cut_columns)
    message = f"^full.csv: tile '{odd}', image '{odd}.tif': 28 × 32 pixels, and data.tile_size is 32(\\n|$)"
    with pytest.raises(DataError, match=message):
        loaders(settings(world))
    assert not (world.parent/'runs').exists()

@pytest.mark.parametrize('picture, message', [('nowhere/check.png', 'No such file'), ('check.nothing', 'picture: ')])
def test_13_a_check_that_cannot_write(world, picture, message, monkeypatch, capsys):
    "One line and exit code 2 where the picture cannot be written"
    (world.parent/'small.yaml').write_text(to_yaml(settings(world)))
    monkeypatch.setattr('rtsseg.check.check', lambda *_: None)
    with pytest.raises(SystemExit) as left:
        rtsseg_check(config=str(world.parent/'small.yaml'), picture=str(world.parent/picture))
    # the sampler warns of the few negative tiles
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith('warning: ')]
    assert left.value.code == 2 and len(lines) == 1
    assert lines[0].startswith('error: ') and message in lines[0]

def test_13_an_undeclared_crs(tmp_path):
    row = write_tile(tmp_path, 'a', crs=None)
    pd.DataFrame([row]).to_csv(tmp_path/'m.csv', index=False)
    with pytest.raises(DataError, match="row 1.*image 'a.tif': the raster has no CRS"):
        read_manifest(tmp_path/'m.csv')
    pd.DataFrame([row | {'crs': 'none', 'block': 'scan'}]).to_csv(tmp_path/'m.csv', index=False)
    assert np.isnan(read_manifest(tmp_path/'m.csv').table.pixel_size[0])

def write_stray_value(world, value, nodata):
    "An EXTRA raster with one odd value in its first band"
    planes = np.random.default_rng(0).normal(size=(2, 32, 32))
    planes[0, 3, 4] = value
    write_extra(world, 0, planes, names=['ndvi', 'dem'], nodata=nodata)
    return read_manifest(world/'full.csv')

@pytest.mark.parametrize('value, nodata', [(value, nodata) for value in (np.nan, np.inf, -np.inf)
                                           for nodata in (None, -9999., np.nan)
                                           if not (np.isnan(value) and nodata is np.nan)])
def test_14_nan_and_infinity(world, value, nodata):
    "What no nodata value declares is an error and not a guess; a band that is not asked for may hold anything"
    manifest = write_stray_value(world, value, nodata)
    read_tile(manifest, 0, ['dem'])
    message = (f"tile 't0', extra 't0_e.tif': 1 pixels of ndvi are NaN or infinite, "
               f'and the nodata that is declared is {nodata}')
    assert f'files: {message}' in errors(world, cfg=with_extra('ndvi'))
    with pytest.raises(DataError, match=re.escape(message)):
        compute_stats(manifest.of('train'), ['ndvi'])

def test_14_nan_that_is_declared(world):
    manifest = write_stray_value(world, np.nan, np.nan)
    assert np.argwhere(read_tile(manifest, 0, ['ndvi'])[2] == 255).tolist() == [[3, 4]]

def test_14_a_constant_band_in_training(world):
    "The statistics refuse it, before anything could be divided by 0"
    for i in (0, 1):
        rewrite(world/f't{i}.tif', lambda planes: planes * np.array([1, 1, 0], 'uint8')[:, None, None])
    with pytest.raises(DataError, match='channel B is constant over the training split'):
        compute_stats(read_manifest(world/'full.csv').of('train'))

# ---------------------------------------------------------------- 8 again: hostile files
HOSTILE = ['6band_wrong_number_extrasamples', 'GTModelTypeGeoKey_only', 'all-nodata', 'byte_truncated',
           'byte_zstd_corrupted', 'corrupted_deflate_singlestrip', 'gtiff_lzw_corrupted', 'huge-number-strips',
           'hugeblocksize', 'rotated']

def import_hostile(folder, bands):
    "Import a.tif of a folder with an empty mask on the grid of the one file that can be imported"
    place = rasterio.Affine(3, 0, 341970, 0, -3, 1603902)
    with rasterio.open(folder/'zero.tif', 'w', driver='GTiff', width=71, height=2475, count=1, dtype='uint8',
                       crs='EPSG:32628', transform=place) as ds:
        ds.write(np.zeros((1, 2475, 71), 'uint8'))
    source = TableSource(path=folder/'m.csv', image='a.tif', mask='zero.tif', bands=bands)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return import_table(source, folder/'out'/'m.csv')

@pytest.mark.parametrize('name', HOSTILE)
@pytest.mark.parametrize('bands', [[1, 1, 1], [3, 2, 1]])
def test_08_hostile_geotiff(tmp_path, data_dir, name, bands):
    """Files that were made to break readers: an error that names the row, or a clean tile; as a manifest, in a run and
    through the importer"""
    shutil.copyfile(data_dir/'hostile_geotiff'/f'{name}.tif', tmp_path/'a.tif')
    row = dict(tile_id='a', image='a.tif', mask='', region='r', split='train')
    pd.DataFrame([row]).to_csv(tmp_path/'m.csv', index=False)
    with pytest.raises(DataError, match='row 1.*a.tif'):
        read_manifest(tmp_path/'m.csv')
    full = row | dict(n_positive=0, xmin=0, ymin=0, xmax=9, ymax=9, crs='EPSG:3413', pixel_size=3)
    pd.DataFrame([full]).to_csv(tmp_path/'full.csv', index=False)
    assert any("tile 'a', image 'a.tif'" in line for line in errors(tmp_path))
    try:
        manifest = import_hostile(tmp_path, bands)
    except DataError as e:
        assert "row 1 (tile_id 'a')" in str(e) and not list((tmp_path/'out').iterdir())
    else:
        assert name == 'all-nodata' and (read_tile(manifest, 0)[2] == 255).all()

def test_08_no_hostile_file_is_left_out(data_dir):
    assert {file.stem for file in (data_dir/'hostile_geotiff').glob('*.tif')} == set(HOSTILE)

def tag_positions(data):
    "Where the twelve bytes of each tag of the first directory begin"
    directory = struct.unpack('<I', data[4:8])[0]
    count = struct.unpack('<H', data[directory:directory + 2])[0]
    return [directory + 2 + 12*i for i in range(count)]

def spoil(data, tags, kind, where, value):
    "Flip a byte, cut the file, or change count or value of a tag, at a place from 0 (first) to 1 (last)"
    if kind == 'flip':
        data[int(where * (len(data) - 1))] = value
    elif kind == 'cut':
        del data[int(where * len(data)) + 1:]
    else:
        at = tags[int(where * (len(tags) - 1))] + {'count': 4, 'value': 8}[kind]
        if at + 4 <= len(data):
            struct.pack_into('<I', data, at, value)

NUMBERS = st.sampled_from([0, 1, 2, 16, 255, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1])
HARM = st.one_of(st.tuples(st.just('flip'), st.floats(0, 1), st.integers(0, 255)),
                 st.tuples(st.just('cut'), st.floats(0, 1), st.just(0)),
                 st.tuples(st.sampled_from(['count', 'value']), st.floats(0, 1), NUMBERS))
PLACED = dict(n_positive=5, xmin=5e5, ymin=-2000096., xmax=500096., ymax=-2e6, crs='EPSG:3413', pixel_size=3.)

@examples(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(field=st.sampled_from(['image', 'mask', 'extra']), tiled=st.booleans(),
       compress=st.sampled_from(['none', 'deflate', 'lzw', 'zstd']), harm=st.lists(HARM, min_size=1, max_size=4))
def test_08_any_damage_is_an_error_or_a_tile(tmp_path_factory, field, tiled, compress, harm):
    "Bytes flipped, cut off, tags that claim the impossible: always a tile or a message"
    folder = tmp_path_factory.getbasetemp()/'fuzz'
    folder.mkdir(exist_ok=True)
    for name, count, dtype in (('image', 3, 'uint8'), ('mask', 1, 'uint8'), ('extra', 1, 'float32')):
        (folder/f'{name}.tif').unlink(missing_ok=True)
        write_with_holes(folder/f'{name}.tif', 4, count, dtype=dtype, compress=compress, tiled=tiled,
                         names=['ndvi'] if name == 'extra' else [])
    rewrite(folder/'mask.tif', lambda mask: (mask > 100).astype('uint8'))
    file = folder/f'{field}.tif'
    data = bytearray(file.read_bytes())
    tags = tag_positions(data)
    for kind, where, value in harm:
        spoil(data, tags, kind, where, value)
    file.write_bytes(data)
    row = dict(tile_id='a', image='image.tif', mask='mask.tif', extra='extra.tif', region='r', split='train')
    for known in ({}, PLACED):
        try:
            table = complete_table(pd.DataFrame([row | known]), folder)
            check_files(Manifest(table, folder, folder/'m.csv'), with_extra('ndvi').data)
        except DataError as e:
            # a mask may be shifted against an image that is placed wrongly
            assert 'row 1' in str(e) and re.search('(image|mask).tif', str(e))
