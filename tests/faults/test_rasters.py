"Faults 8 to 14: rasters that cannot be read, or not as they are meant"
import itertools, re, shutil, struct, warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings as examples, strategies as st

from rtsseg.cli import rtsseg_check
from rtsseg.config import TableSource, to_yaml
from rtsseg.console import DataError
from rtsseg.columns import complete_table
from rtsseg.manifest import Manifest, add_hashes, read_manifest, write_manifest
from rtsseg.stats import compute_stats
from rtsseg.filecheck import check_files
from rtsseg.importers import import_table
from rtsseg.tiles import read_tile
from rtsseg.loop import fit
from rtsseg.models import build
from rtsseg.prepare import check_all_tiles, statistics
from rtsseg.tiles import UnreadableTiles, loaders
from rtsseg.segment import SegmentTask
from helpers.tiles import CFG, PLACE, change, extra, files, nobody_calls, refused, rewrite, settings, tile, world, wrong

FAULTS = {8: ('a truncated or otherwise unreadable tile', 'refused by the check; a run that meets one leaves it out and counts it, up to 0.1% of the tiles of a split, then stops, to be resumed'),
          9: ('a flipped byte in an uncompressed raster', 'refused where the manifest holds the SHA-256 of the file'),
          10: ('blocks that were never written, and would be read as 0', 'refused, with their share, unless nodata or a mask band declares them'),
          11: ('a file of a few kilobytes that claims 200000 × 200000 pixels, or a block of gigabytes', 'refused before a pixel is read'),
          12: ('a VRT or an MRF under the name of a GeoTIFF', 'refused; no file is made, no connection opened'),
          13: ('a wrong CRS or none, a wrong size, type or number of bands', 'refused'),
          14: ('NaN or infinity that no nodata declares; a band that is constant over a split', 'refused')}

def truncate(file): content = file.read_bytes(); file.write_bytes(content[:len(content) // 2])

# ---------------------------------------------------------------- 8: unreadable tiles
def test_08_every_unreadable_tile_is_listed(world):
    "Tile, field, file and what is wrong, for each of them; exit code 2, and nothing is written"
    for f in ('t0.tif', 't2_m.tif', 't5.tif'): truncate(world/f)
    said = refused('rtsseg-check', world)
    for i, what, f, word in ((0, 'image', 't0.tif', 't0.tif cannot be read'), (2, 'mask', 't2_m.tif', 't2_m.tif cannot be read'), (5, 'image', 't5.tif', 't5.tif cannot be read')):
        assert f"files: tile 't{i}', {what} '{f}': {word}" in said

def test_08_no_list_is_endless(tmp_path):
    rows = [tile(tmp_path, f't{i:03}', x=96 * i) | dict(n_positive=36, xmin=i, xmax=i + 1, ymin=0, ymax=1, crs='EPSG:3413', pixel_size=3) for i in range(60)]
    for f in tmp_path.glob('*[0-9].tif'): truncate(f)
    pd.DataFrame(rows).to_csv(tmp_path/'full.csv', index=False); told = wrong(tmp_path)
    assert len([l for l in told if 'cannot be read' in l]) == 50 and '… and 10 more' in told

@pytest.fixture
def many(world):
    "1001 training tiles, five of them positive, all of them two files; positives are drawn in every epoch. Damage comes later, in files of their own"
    t = read_manifest(world/'full.csv').table.drop(columns='positive'); first = t[t.split == 'train'].iloc[[0]]
    shutil.copy(world/'t0_m.tif', world/'zero.tif'); rewrite(world/'zero.tif', lambda a: a * 0)
    train = pd.concat([first] * 1001, ignore_index=True); train['tile_id'] = [f'n{i:04}' for i in range(1001)]
    train.loc[5:, ['mask', 'n_positive']] = ['zero.tif', 0]; train[['xmin', 'xmax']] += 96 * (10 + np.arange(1001)[:, None])      # beside each other, as far as the table knows
    for i in range(5): shutil.copy(world/'t0.tif', world/f'p{i}.tif'); train.loc[i, 'image'] = f'p{i}.tif'
    write_manifest(pd.concat([train, t[t.split != 'train']]), world/'many.csv')
    return world

def trained(world, workers=0, **more):
    "A run over these tiles, without its notebook"
    cfg = settings(world, 'many.csv', **more); cfg.loader.num_workers = workers; feed = loaders(cfg)
    task = SegmentTask(cfg, feed.manifest.of('val').table, 100.); model = build(cfg.model)
    return fit(cfg, task, model, feed.train, feed.val, world.parent/'run', [UnreadableTiles(feed)])

@pytest.mark.parametrize('workers', [0, 2])
def test_08_one_tile_of_a_thousand_is_left_out(many, workers, capsys):
    "The statistics and the run do without it, whichever process read it; it is said once, and counted at the end"
    truncate(many/'p3.tif'); done = trained(many, workers, epochs=2); said = capsys.readouterr(); line = "tile 'n0003', image 'p3.tif': p3.tif cannot be read"
    assert done.finished and done.skipped == 0
    assert f'note: statistics: left out: {line}' in said.err
    assert said.out.count(f'training: {line}') == 1 and 'note: 1 of 1001 training tiles could not be read, and counted as 255' in said.out

@pytest.mark.parametrize('workers', [0, 2])
def test_08_more_than_that_stop_the_run(many, workers):
    "It says which tiles and files, and goes on when they are whole again"
    cfg = settings(many, 'many.csv', epochs=2); statistics(cfg, read_manifest(many/'many.csv')); whole = (many/'p1.tif').read_bytes()
    for i in (1, 2): truncate(many/f'p{i}.tif')
    half = trained(many, workers, epochs=2)
    assert not half.finished and re.match("training: 2 of 1001 tiles cannot be read, which is more than 0.1%: tile 'n000[12]', image 'p[12].tif': p[12].tif cannot be read.*; tile 'n000[12]', image", half.reason)
    again = trained(many, workers, epochs=2); assert not again.finished and again.step == half.step + 1      # what stopped it stops it again
    for i in (1, 2): (many/f'p{i}.tif').write_bytes(whole)
    assert trained(many, workers, epochs=2).finished

def test_08_processes_count_together(many, tmp_path):
    "Each reads tiles of its own; before a validation is kept, and at the end of an epoch, they know them all, and stop together"
    cfg = settings(many, 'many.csv'); feed = loaders(cfg); tiles, why = feed.train.dataset, []
    for i in (1, 2): truncate(many/f'p{i}.tif')
    def reduce(flags):      # the other process met tile 2
        found = flags.clone()
        if len(found) == 1001: found[2] += 1
        return found
    run = SimpleNamespace(folder=tmp_path, stop=why.append, accelerator=SimpleNamespace(num_processes=2, is_main_process=True, device='cpu', reduce=reduce)); watch = UnreadableTiles(feed)
    assert tiles[1]['target'].eq(255).all(); watch.on_step(run); assert not why
    watch.on_judged(run); assert why and why[0].startswith('training: 2 of 1001 tiles cannot be read')

def test_08_validation_looks_too(many):
    "Nothing is kept of a validation that had too few tiles, be it the last one: the run stops until they are mended, and then ends as if nothing had been"
    whole = (many/'t3_m.tif').read_bytes(); truncate(many/'t3_m.tif')
    for _ in range(2):
        done = trained(many, epochs=1)
        assert not done.finished and not done.history and not done.best and done.reason.startswith("validation: 1 of 2 tiles cannot be read, which is more than 0.1%: tile 't3', mask 't3_m.tif'")
    (many/'t3_m.tif').write_bytes(whole)
    assert trained(many, epochs=1).finished

def test_08_statistics_of_too_few_tiles_are_refused(many):
    "All that is wrong with the training files in one answer, and no statistics are written"
    for i in (1, 2): truncate(many/f'p{i}.tif')
    rewrite(many/'p4.tif', lambda a: a.astype('uint16')); cfg = settings(many, 'many.csv')
    with pytest.raises(DataError) as e: loaders(cfg)
    for word in ('2 of 1001 tiles cannot be read, which is more than 0.1%', "tile 'n0001', image 'p1.tif'", "tile 'n0002', image 'p2.tif'", "tile 'n0004', image 'p4.tif': uint16, and 998 tiles are uint8"): assert f'statistics: {word}' in str(e.value)
    assert not (many.parent/'runs').exists()

# ---------------------------------------------------------------- 9: hashes
@pytest.mark.parametrize('field', ['image', 'mask', 'extra'])
def test_09_a_flipped_byte(world, field):
    "Without a hash nobody can tell; with one, whoever reads the tile can"
    extra(world, 0, np.random.default_rng(0).normal(size=(1, 32, 32)), names=['ndvi'])
    for f in ('t0.tif', 't0_m.tif', 't0_e.tif'):
        with rasterio.open(world/f) as ds: a, names, profile = ds.read(), ds.descriptions, {k: v for k, v in ds.profile.items() if k != 'compress'}
        with rasterio.open(world/f, 'w', **profile) as ds:
            ds.write(a)
            for i, n in enumerate(names): ds.set_band_description(i + 1, n or '')
    sealed = read_manifest(write_manifest(add_hashes(read_manifest(world/'full.csv')), world/'sealed.csv')); bands = ['ndvi']; read_tile(sealed, 0, bands)
    file = world/sealed.table[field][0]; content = bytearray(file.read_bytes()); content[len(content) // 2] ^= 1; file.write_bytes(content)
    read_tile(read_manifest(world/'full.csv'), 0, bands)
    word = f"tile 't0', {field} '{file.name}': its SHA-256 is .*… in the manifest: the file is not what it was"
    with pytest.raises(DataError, match=word): read_tile(sealed, 0, bands)
    with pytest.raises(DataError, match=word): compute_stats(sealed.of('train'), bands)
    cfg = CFG.model_copy(deep=True); cfg.data.extra_bands = bands
    assert any(re.search(word, l) for l in wrong(world, 'sealed.csv', cfg))

@pytest.mark.parametrize('value', ['abc', 'g' * 64, '0' * 63, '0' * 65])
@pytest.mark.parametrize('field', ['sha256', 'mask_sha256', 'extra_sha256'])
def test_09_no_hash_at_all(world, field, value):
    change(world, **{field: (1, value)})
    with pytest.raises(DataError, match=rf"row 2 \(tile_id 't1'\), {field}: not a SHA-256"): read_manifest(world/'m.csv')

def test_09_hashes_are_part_of_the_manifest_where_they_are(world):
    "Empty columns change no manifest; filled ones do, in every format"
    plain = read_manifest(world/'full.csv'); change(world, 'm.csv', sha256=(0, '')); assert read_manifest(world/'m.csv').hash == plain.hash
    sealed = {read_manifest(write_manifest(add_hashes(plain), world/f's.{suffix}')).hash for suffix in ('csv', 'parquet', 'geoparquet', 'gpkg')}
    assert len(sealed) == 1 and plain.hash not in sealed

# ---------------------------------------------------------------- 10: blocks that were never written
def holes(file, part=1, count=3, dtype='uint8', mask=None, **kw):
    "A raster of 32 × 32 pixels in blocks of 16, of which the first 4·part were written"
    a = np.random.default_rng(0).integers(1, 200, (count, 32, 32)).astype(dtype)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(file, 'w', **dict(driver='GTiff', width=32, height=32, count=count, dtype=dtype, crs='EPSG:3413', transform=PLACE, tiled=True,
                                                                                      blockxsize=16, blockysize=16, SPARSE_OK=True) | kw) as ds:
        for y, x in list(itertools.product((0, 16), (0, 16)))[:round(4 * part)]: ds.write(a[:, y:y + 16, x:x + 16], window=((y, y + 16), (x, x + 16)))
        if mask is not None: ds.write_mask(mask)
        if kw.get('interleave') == 'band' and part < 1: ds.write(a[:2], [1, 2])                  # one band alone has holes
        if dtype == 'float32': ds.set_band_description(1, 'ndvi')

@pytest.mark.parametrize('kw', [{}, dict(compress='deflate'), dict(interleave='band'), dict(part=0), dict(part=.75)])
def test_10_blocks_that_were_never_written(world, kw):
    "They would be black ground to a model; the tile and its share of them are named"
    holes(world/'t0.tif', **dict(part=.25) | kw); share = {0: '100.0', .75: '25.0'}.get(kw.get('part'), '75.0')
    assert f"files: tile 't0', image 't0.tif': {share}% of its pixels lie in blocks that were never written, and no nodata declares them: they would be read as 0" in wrong(world)
    with pytest.raises(DataError, match='never written'): read_tile(read_manifest(world/'full.csv'), 0)

def test_10_declared_blocks_may_be_missing(world):
    "By nodata or a mask band; and 0 is what a mask has there anyway"
    valid = np.zeros((32, 32), bool); valid[:16, :16] = True
    for kw in (dict(nodata=0), dict(mask=valid)):
        holes(world/'t0.tif', .25, **kw); assert ((read_tile(read_manifest(world/'full.csv'), 0)[2] != 255) == valid).all()
    shutil.copy(world/'t1.tif', world/'t0.tif'); m = np.zeros((1, 32, 32), 'uint8'); rewrite(world/'t0.tif', shift=(-32, 0))
    with rasterio.open(world/'t0_m.tif', 'w', driver='GTiff', width=32, height=32, count=1, dtype='uint8', crs='EPSG:3413', transform=PLACE, SPARSE_OK=True): pass
    assert (read_tile(read_manifest(world/'full.csv'), 0)[2] == 0).all()

def test_10_in_an_extra_band(world):
    holes(world/'t0_e.tif', .25, 1, 'float32'); change(world, 'full.csv', extra=(0, 't0_e.tif'))
    with pytest.raises(DataError, match="extra 't0_e.tif': 75.0% of its pixels lie in blocks"): read_tile(read_manifest(world/'full.csv'), 0, ['ndvi'])

# ---------------------------------------------------------------- 11, 12: what a file claims to be
@pytest.mark.parametrize('claim', [dict(width=200_000, height=200_000, blockxsize=16384, blockysize=16384), dict(width=32, height=32, blockxsize=32768, blockysize=32768)])
def test_11_a_huge_claim(world, claim):
    "200000 × 200000 pixels, or a block of gigabytes, in a file of next to nothing"
    with rasterio.open(world/'t0.tif', 'w', driver='GTiff', count=3, dtype='uint8', crs='EPSG:3413', transform=PLACE, tiled=True, SPARSE_OK=True, compress='deflate', bigtiff='YES', **claim): pass
    assert (world/'t0.tif').stat().st_size < 10**6
    for name in ('m.csv', 'full.csv'):
        with pytest.raises(DataError, match='claims (200000 × 200000 pixels|blocks of 32768 × 32768 pixels) in 3 bands'): read_tile(read_manifest(world/name), 0)

def test_11_a_huge_number_of_blocks(tmp_path):
    "A hundred thousand strips of a row each, one of them there"
    with rasterio.open(tmp_path/'a.tif', 'w', driver='GTiff', width=30, height=100_000, count=3, dtype='uint8', blockysize=1, SPARSE_OK=True) as ds: ds.write(np.ones((3, 1, 30), 'uint8'), window=((0, 1), (0, 30)))
    with pytest.raises(DataError, match='a.tif claims 100000 blocks: more than 65536'): complete_table(pd.DataFrame([dict(tile_id='a', image='a.tif', mask='', region='r', split='train', crs='none', block='b')]), tmp_path)

@pytest.mark.parametrize('content', ['<VRTDataset rasterXSize="32" rasterYSize="32">{}</VRTDataset>', '<MRF_META><Raster><Size x="32" y="32" c="3"/></Raster><CachedSource><Source>{}</Source></CachedSource></MRF_META>',
                                     '<GDAL_WMS><Service name="TMS"><ServerUrl>{}</ServerUrl></Service></GDAL_WMS>', '', 'II*\0', '{}'])
def test_12_only_a_geotiff_is_opened(world, content):
    "Whatever else stands in a file of that name: no file is made beside it, and nobody is called"
    with nobody_calls() as port:
        source = f'/vsicurl/http://127.0.0.1:{port}/x.tif'
        (world/'t1.tif').write_text(content.format(f'<VRTRasterBand dataType="Byte" band="1"><SimpleSource><SourceFilename>{source}</SourceFilename></SimpleSource></VRTRasterBand>' if 'VRT' in content else source))
        before = files(world)
        with pytest.raises(DataError, match=r"row 2 .*t1.tif (is not a GeoTIFF: it (begins with|is empty)|cannot be read)"): read_manifest(world/'m.csv')
        assert any(re.search("tile 't1', image 't1.tif': t1.tif (is not a GeoTIFF|cannot be read)", l) for l in wrong(world))
        assert files(world) == before

# ---------------------------------------------------------------- 13, 14: what does not fit
NO_MAP = ['EPSG:5773', 'EPSG:4978', 'EPSG:4979', 'EPSG:32661+5773', 'LOCAL_CS["x",UNIT["metre",1]]']      # heights, space, a globe with heights, a map with heights, a drawing

ODD = {'another size': (lambda w: [rewrite(w/f, lambda a: a[:, :-4]) for f in ('t0.tif', 't0_m.tif')], "tile size: tile 't0', image 't0.tif': 28 × 32 pixels"),
       'another type than the others': (lambda w: rewrite(w/'t0.tif', lambda a: a.astype('uint16')), "dtype: tile 't0', image 't0.tif': uint16, and 5 tiles are uint8"),
       'a type that is none of ours': (lambda w: rewrite(w/'t0.tif', lambda a: a.astype('float32')), "files: tile 't0', image 't0.tif': an image is uint8 or uint16, this one is float32"),
       'one band': (lambda w: rewrite(w/'t0.tif', lambda a: a[:1]), "files: tile 't0', image 't0.tif': an image has 3 bands, this one has 1"),
       'five bands': (lambda w: rewrite(w/'t0.tif', lambda a: np.concatenate([a, a[:2]])), "files: tile 't0', image 't0.tif': an image has 3 bands, this one has 5"),
       'another CRS': (lambda w: [rewrite(w/f, crs='EPSG:32610') for f in ('t0.tif', 't0_m.tif')], "grid: tile 't0', image 't0.tif': lies elsewhere than the manifest says (CRS EPSG:32610 and EPSG:3413)"),
       'no CRS': (lambda w: [rewrite(w/f, crs=None) for f in ('t0.tif', 't0_m.tif')], "grid: tile 't0', image 't0.tif': the manifest says CRS EPSG:3413, the raster None"),
       'another place': (lambda w: [rewrite(w/f, shift=(7, 0)) for f in ('t0.tif', 't0_m.tif')], "grid: tile 't0', image 't0.tif': lies elsewhere than the manifest says"),
       'an image without the CRS of its mask': (lambda w: rewrite(w/'t0.tif', crs=None), "files: tile 't0', mask 't0_m.tif': the mask has another CRS than its image (EPSG:3413, None)"),
       'a band without content': (lambda w: [rewrite(w/f't{i}.tif', lambda a: a * np.array([1, 0, 1], 'uint8')[:, None, None]) for i in (2, 3)], 'constant bands val: G')}

@pytest.mark.parametrize('what', ODD)
def test_13_14_what_does_not_fit(world, what):
    "Each is an error that names tile and file (or split and band)"
    damage, word = ODD[what]; assert not any(l.split(':')[0] == word.split(':')[0] for l in wrong(world)); damage(world)
    assert any(l.startswith(word) for l in wrong(world)), wrong(world)

@pytest.mark.parametrize('spoil,word', [(lambda w: rewrite(w/'t3_m.tif', lambda a: a * 2), "t3', mask 't3_m.tif': values 0, 2"), (lambda w: rewrite(w/'t2.tif', lambda a: a[:2]), "t2', image 't2.tif': an image has 3 bands"),
                                        (lambda w: rewrite(w/'t2.tif', lambda a: a.astype('uint16')), "t2', image 't2.tif': uint16, and 5 tiles are uint8"), (lambda w: rewrite(w/'t3_m.tif', lambda a: a * 0), "t3', mask 't3_m.tif': n_positive is 36"),
                                        (lambda w: rewrite(w/'t4.tif', crs='EPSG:3031'), "t4', (image|mask) 't4.*(CRS|elsewhere)"), (lambda w: truncate(w/'t5.tif'), "t5', image 't5.tif': t5.tif cannot be read")])
def test_13_15_17_in_validation_and_test(world, spoil, word):
    "Not found when the first validation comes, days later: a run reads every tile of its data once before it begins, and is refused; a second config on the same data need not"
    cfg = settings(world); spoil(world)
    with pytest.raises(DataError, match=word): check_all_tiles(cfg, read_manifest(world/'full.csv'))
    assert not cfg.runs.exists()

def test_13_data_that_was_looked_at(world):
    "A run's statistics tell that its data were: another config on them is not made to wait"
    manifest = read_manifest(world/'full.csv'); statistics(settings(world), manifest); truncate(world/'t5.tif'); check_all_tiles(settings(world, epochs=2), manifest)
    with pytest.raises(DataError): check_all_tiles(settings(world, data=dict(manifest=world/'full.csv', tile_size=32, extra_bands=['x'], split_check='warn'), model=dict(in_channels=4)), manifest)

@pytest.mark.parametrize('content', ['{', '[]', '{"training": 5}', '{"training": [1]}', '\0'])
def test_08_a_note_of_lost_tiles_that_is_damaged(many, content, capsys):
    "It is left aside, and said"
    (many.parent/'run').mkdir(); (many.parent/'run'/'unread.json').write_text(content)
    assert trained(many, epochs=1).finished and 'note: unread.json' in capsys.readouterr().out

def test_13_through_the_check(world):
    "Several at once, all in one answer"
    for i, what in enumerate(('one band', 'another size')): ODD[what][0](world) if not i else [rewrite(world/f, lambda a: a[:, :-4]) for f in ('t1.tif', 't1_m.tif')]
    said = refused('rtsseg-check', world); assert "tile 't0', image 't0.tif': an image has 3 bands" in said and "tile 't1', image 't1.tif': 28 × 32 pixels" in said

@pytest.mark.parametrize('crs', NO_MAP)
@pytest.mark.parametrize('block', [True, False])
def test_13_a_crs_of_no_map(world, crs, block):
    "Heights, space or a drawing in the manifest: the row is named"
    change(world, 'full.csv', crs=(0, crs), **({} if block else dict(block=(0, ''))))
    with pytest.raises(DataError, match=r"row 1 \(tile_id 't0'\), crs: .* is not a map's coordinate reference system"): read_manifest(world/'full.csv')

@pytest.mark.parametrize('crs', NO_MAP)
def test_13_a_raster_of_no_map(world, crs):
    "The same in a raster, whether the manifest knows its place or asks it"
    for f in ('t0.tif', 't0_m.tif'): rewrite(world/f, crs=crs)
    assert any(re.match("grid: tile 't0', image 't0.tif': its footprint .*is not a map's coordinate reference system", l) for l in wrong(world)), wrong(world)
    with pytest.raises(DataError, match=r"row 1 \(tile_id 't0'\), image 't0.tif': .* is not a map's coordinate reference system"): read_manifest(world/'m.csv')

@pytest.mark.parametrize('crs', ['+proj=ob_tran +o_proj=longlat +o_lon_p=0 +o_lat_p=39 +lon_0=18', '+proj=ob_tran +o_proj=merc +o_lat_p=39 +o_lon_p=0', '+proj=gnom +lat_0=-90'])
def test_13_a_crs_that_tears_the_ground(world, crs):
    "Whatever becomes of a footprint there, the tile is told with all else"
    change(world, 'full.csv', crs=(0, crs)); truncate(world/'t5.tif'); told = wrong(world)
    for word in ("grid: tile 't0', image 't0.tif': ", "files: tile 't5', image 't5.tif': "): assert any(l.startswith(word) for l in told), told

@pytest.mark.parametrize('odd', ['t1', 't3', 't4'])
def test_13_a_wrong_tile_size_before_training(world, odd):
    "A tile of another size, of any split, ends a run before anything is written; statistics of another data.tile_size do not hide it"
    statistics(settings(world), read_manifest(world/'full.csv')); cfg = settings(world, data=dict(manifest=world/'full.csv', tile_size=64, split_check='warn'))
    with pytest.raises(DataError) as e: loaders(cfg)
    assert str(e.value).splitlines() == [f"full.csv: tile 't{i}', image 't{i}.tif': 32 × 32 pixels, and data.tile_size is 64" for i in range(6)]
    shutil.rmtree(world.parent/'runs'); rewrite(world/f'{odd}.tif', lambda a: a[:, :-4])
    with pytest.raises(DataError, match=f"^full.csv: tile '{odd}', image '{odd}.tif': 28 × 32 pixels, and data.tile_size is 32(\\n|$)"): loaders(settings(world))
    assert not (world.parent/'runs').exists()

@pytest.mark.parametrize('picture,word', [('nowhere/check.png', 'No such file'), ('check.nothing', 'picture: ')])
def test_13_a_check_that_cannot_write(world, picture, word, monkeypatch, capsys):
    "One line and exit code 2 where the picture cannot be written"
    (world.parent/'small.yaml').write_text(to_yaml(settings(world))); monkeypatch.setattr('rtsseg.check.check', lambda *a: None)
    with pytest.raises(SystemExit) as e: rtsseg_check(config=str(world.parent/'small.yaml'), picture=str(world.parent/picture))
    said = capsys.readouterr().err.strip(); assert e.value.code == 2 and said.startswith('error: ') and word in said and '\n' not in said

def test_13_an_undeclared_crs(tmp_path):
    pd.DataFrame([tile(tmp_path, 'a', crs=None)]).to_csv(tmp_path/'m.csv', index=False)
    with pytest.raises(DataError, match="row 1.*image 'a.tif': the raster has no CRS"): read_manifest(tmp_path/'m.csv')
    pd.DataFrame([tile(tmp_path, 'a', crs=None) | {'crs': 'none', 'block': 'scan'}]).to_csv(tmp_path/'m.csv', index=False)
    assert np.isnan(read_manifest(tmp_path/'m.csv').table.pixel_size[0])

@pytest.mark.parametrize('nodata', [None, -9999, np.nan])
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_14_nan_and_infinity(world, value, nodata):
    "Nodata where they are declared as nodata; else it is not guessed at what they are"
    e = np.random.default_rng(0).normal(size=(2, 32, 32)); e[0, 3, 4] = value; extra(world, 0, e, names=['ndvi', 'dem'], nodata=nodata)
    m = read_manifest(world/'full.csv'); read_tile(m, 0, ['dem'])                    # a band that nobody asks for may hold what it likes
    if np.isnan(value) and nodata is np.nan: assert np.argwhere(read_tile(m, 0, ['ndvi'])[2] == 255).tolist() == [[3, 4]]; return
    cfg = CFG.model_copy(deep=True); cfg.data.extra_bands = ['ndvi']
    word = f"tile 't0', extra 't0_e.tif': 1 pixels of ndvi are NaN or infinite, and the nodata that is declared is {None if nodata is None else float(nodata)}"
    assert f'files: {word}' in wrong(world, cfg=cfg)
    with pytest.raises(DataError, match=re.escape(word)): compute_stats(m.of('train'), ['ndvi'])

def test_14_a_constant_band_in_training(world):
    "The statistics refuse it, before anything could be divided by 0"
    for i in (0, 1): rewrite(world/f't{i}.tif', lambda a: a * np.array([1, 1, 0], 'uint8')[:, None, None])
    with pytest.raises(DataError, match='channel B is constant over the training split'): compute_stats(read_manifest(world/'full.csv').of('train'))

# ---------------------------------------------------------------- whatever else a file may be
HOSTILE = ['6band_wrong_number_extrasamples', 'GTModelTypeGeoKey_only', 'all-nodata', 'byte_truncated', 'byte_zstd_corrupted', 'corrupted_deflate_singlestrip', 'gtiff_lzw_corrupted', 'huge-number-strips', 'hugeblocksize', 'rotated']

@pytest.mark.parametrize('name', HOSTILE)
@pytest.mark.parametrize('bands', [[1, 1, 1], [3, 2, 1]])
def test_08_hostile_geotiff(tmp_path, data_dir, name, bands):
    "Files that were made to break readers: an error that names the row, or a clean tile; as a manifest, in a run and through the importer"
    shutil.copyfile(data_dir/'hostile_geotiff'/f'{name}.tif', tmp_path/'a.tif')
    row = dict(tile_id='a', image='a.tif', mask='', region='r', split='train'); pd.DataFrame([row]).to_csv(tmp_path/'m.csv', index=False)
    with pytest.raises(DataError, match="row 1.*a.tif"): read_manifest(tmp_path/'m.csv')
    full = row | dict(n_positive=0, xmin=0, ymin=0, xmax=9, ymax=9, crs='EPSG:3413', pixel_size=3); pd.DataFrame([full]).to_csv(tmp_path/'full.csv', index=False)
    assert any("tile 'a', image 'a.tif'" in l for l in wrong(tmp_path))
    with rasterio.open(tmp_path/'zero.tif', 'w', driver='GTiff', width=71, height=2475, count=1, dtype='uint8', crs='EPSG:32628',
                       transform=rasterio.Affine(3, 0, 341970, 0, -3, 1603902)) as ds: ds.write(np.zeros((1, 2475, 71), 'uint8'))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: m = import_table(TableSource(path=tmp_path/'m.csv', image='a.tif', mask='zero.tif', bands=bands), tmp_path/'out'/'m.csv')
        except DataError as e: assert "row 1 (tile_id 'a')" in str(e) and not list((tmp_path/'out').iterdir()); return
    assert name == 'all-nodata' and (read_tile(m, 0)[2] == 255).all()

def test_08_no_hostile_file_is_left_out(data_dir): assert {p.stem for p in (data_dir/'hostile_geotiff').glob('*.tif')} == set(HOSTILE)

def entries(data):
    "Where the twelve bytes of each tag of the first directory stand"
    at = struct.unpack('<I', data[4:8])[0]
    return [at + 2 + 12*i for i in range(struct.unpack('<H', data[at:at + 2])[0])]

damage = st.one_of(st.tuples(st.just('flip'), st.floats(0, 1), st.integers(0, 255)), st.tuples(st.just('cut'), st.floats(0, 1), st.just(0)),
                   *(st.tuples(st.just(k), st.floats(0, 1), st.sampled_from([0, 1, 2, 16, 255, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1])) for k in ('count', 'value')))

@examples(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(what=st.sampled_from(['image', 'mask', 'extra']), tiled=st.booleans(), compress=st.sampled_from(['none', 'deflate', 'lzw', 'zstd']), harm=st.lists(damage, min_size=1, max_size=4))
def test_08_any_damage_is_an_error_or_a_tile(tmp_path_factory, what, tiled, compress, harm):
    "Bytes flipped, cut off, tags that claim the impossible: never anything else than a tile or a message"
    folder = tmp_path_factory.getbasetemp()/'fuzz'; folder.mkdir(exist_ok=True)
    for name, count, dtype in (('image', 3, 'uint8'), ('mask', 1, 'uint8'), ('extra', 1, 'float32')):
        (folder/f'{name}.tif').unlink(missing_ok=True); holes(folder/f'{name}.tif', 1, count, dtype, compress=compress, tiled=tiled)
    rewrite(folder/'mask.tif', lambda a: (a > 100).astype('uint8'))
    file = folder/f'{what}.tif'; data = bytearray(file.read_bytes()); tags = entries(data)
    for kind, where, value in harm:
        if kind == 'flip': data[int(where * (len(data) - 1))] = value
        if kind == 'cut': del data[int(where * len(data)) + 1:]
        if kind in ('count', 'value') and (at := tags[int(where * (len(tags) - 1))] + (4 if kind == 'count' else 8)) + 4 <= len(data): struct.pack_into('<I', data, at, value)
    file.write_bytes(data); row = dict(tile_id='a', image='image.tif', mask='mask.tif', extra='extra.tif', region='r', split='train')
    cfg = CFG.model_copy(deep=True); cfg.data.extra_bands = ['ndvi']
    for more in ({}, dict(n_positive=5, xmin=5e5, ymin=-2000096., xmax=500096., ymax=-2e6, crs='EPSG:3413', pixel_size=3.)):
        try: check_files(Manifest(complete_table(pd.DataFrame([row | more]), folder), folder, folder/'m.csv'), cfg.data)
        except DataError as e: assert 'row 1' in str(e) and re.search('(image|mask).tif', str(e))      # a mask may be shifted against an image that lies
