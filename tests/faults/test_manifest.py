"Faults 1 to 7: wrong manifests"
import os
import re
import shutil

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.tiles import CFG, errors, findings, no_connection, refused, rewrite, set_cells, settings, write_tile
from rtsseg.audit import leaks
from rtsseg.config import RtsConfig, find_system
from rtsseg.console import DataError
from rtsseg.filecheck import check_files
from rtsseg.findings import FindingTable
from rtsseg.manifest import add_hashes, read_manifest, write_manifest
from rtsseg.prepare import prepare
from rtsseg.training import train

FAULTS = {1: ("a path that leaves the folder of the tiles: ../.., absolute, or through a link",
              'refused, with row and field'),
          2: ('a path on a network, or a table that only points to one', 'refused; no connection is opened'),
          3: ('a missing column, an empty file; a byte-order mark or Windows line ends',
              'refused; the latter read as any other table'),
          4: ('one tile, or one file, in two splits', 'refused, with both rows'),
          5: ('tiles of two splits that overlap on the ground', 'refused'),
          6: ('no slump in training or validation', 'refused'),
          7: ('HTML in a name', 'shown as text')}

def strict_config(world):
    "A config to lay over another: shared ground is an error"
    (world.parent/'strict.yaml').write_text('data: {split_check: error}')
    return 'strict.yaml'

# ---------------------------------------------------------------- 1: paths
PATHS = [('../x.tif', 'leaves'), ('a/../../x.tif', 'leaves'), ('link.tif', 'leaves'), ('/etc/hostname', 'absolute'),
         ('C:\\x.tif', 'absolute'), ('\\\\host\\x.tif', 'absolute'), ('none.tif', 'no such file'),
         ('.', 'no such file'), ('loop.tif', 'no such file'), ('x' * 5000, 'no such file')]

@pytest.mark.parametrize('path, message', PATHS, ids=lambda text: text[:20])
@pytest.mark.parametrize('field', ['image', 'mask', 'extra'])
def test_01_a_path_that_leaves_the_folder(world, path, message, field):
    "Row and field are named; nothing outside of the folder of the tiles is opened"
    (world.parent/'x.tif').write_text('x')
    os.symlink(world.parent/'x.tif', world/'link.tif')
    os.symlink('loop.tif', world/'loop.tif')
    set_cells(world, **{field: (2, path)})
    with pytest.raises(DataError, match=rf"m.csv: row 3 \(tile_id 't2'\), {field}: .*{message}"):
        read_manifest(world/'m.csv')

def test_01_a_link_that_was_placed_later(world):
    "The path is followed again each time that a tile is read"
    manifest = read_manifest(world/'full.csv')
    shutil.move(world/'t0.tif', world.parent/'t0.tif')
    os.symlink(world.parent/'t0.tif', world/'t0.tif')
    note = next(finding.note for finding in check_files(manifest, CFG.data) if finding.what == 'files')
    assert "tile 't0', image 't0.tif': 't0.tif' leaves the folder of the tiles" in note

# ---------------------------------------------------------------- 2: networks
ADDRESSES = ['/vsicurl/http://127.0.0.1:{}/x.tif', 'http://127.0.0.1:{}/x.tif', 's3://127.0.0.1:{}/x.tif',
             '/vsizip//vsicurl/http://127.0.0.1:{}/x.zip/x.tif']
VRT_TABLE = ('<OGRVRTDataSource><OGRVRTLayer name="x"><SrcDataSource>/vsicurl/http://127.0.0.1:{}/x</SrcDataSource>'
             '</OGRVRTLayer></OGRVRTDataSource>')

@pytest.mark.parametrize('path', ADDRESSES)
def test_02_a_network_path(world, path):
    with no_connection() as port:
        set_cells(world, image=(2, path.format(port)))
        with pytest.raises(DataError, match=r"row 3 \(tile_id 't2'\), image: .* is a network path"):
            read_manifest(world/'m.csv')

@pytest.mark.parametrize('name', ['v.gpkg', 'v.parquet', 'v.geoparquet', 'v.xlsx', 'v.vrt'])
def test_02_a_table_that_points_elsewhere(world, name):
    "A virtual table under the name of a real one"
    with no_connection() as port:
        (world/name).write_text(VRT_TABLE.format(port))
        with pytest.raises(DataError, match=name):
            read_manifest(world/name)

# ---------------------------------------------------------------- 3: broken tables
VRT_RASTER = ('<VRTDataset rasterXSize="32" rasterYSize="32"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
              '<SourceFilename>/vsicurl/http://127.0.0.1:{}/x.tif</SourceFilename></SimpleSource></VRTRasterBand>'
              '</VRTDataset>')

def three_more_tiles(world):
    "Two that overlap, the first of them in val, and one that is smaller"
    return [write_tile(world, 't6', x=960) | dict(split='val'), write_tile(world, 't7', x=990),
            write_tile(world, 't8', x=2000, size=16)]

def spoil_all_rows(world, port):
    "A problem of another kind in each row of m.csv"
    table = pd.concat([pd.read_csv(world/'m.csv'), pd.DataFrame(three_more_tiles(world))])
    table.to_csv(world/'m.csv', index=False)
    set_cells(world, image=(0, '../x.tif'))
    set_cells(world, split=(1, 'vall'))
    set_cells(world, image=(2, f'/vsicurl/http://127.0.0.1:{port}/x.tif'))
    (world/'t3.tif').write_text(VRT_RASTER.format(port))
    (world/'t4.tif').write_bytes((world/'t4.tif').read_bytes()[:1500])
    rewrite(world/'t4_m.tif', lambda mask: mask * 3)
    rewrite(world/'t5_m.tif', lambda mask: mask * 2)

@pytest.mark.parametrize('command', ['rtsseg-check', 'rtsseg-train'])
def test_03_all_problems_in_one_answer(world, command):
    """Paths, names, unreadable files, wrong rasters, image and mask of one tile; for the other rows sizes and shared
    ground: one answer, exit code 2, nothing written, no connection opened"""
    with no_connection() as port:
        spoil_all_rows(world, port)
        printed = refused(command, world, 'm.csv', strict_config(world))
    expected = [r"row 1 \(tile_id 't0'\), image: '../x.tif' leaves",
                r"row 2 \(tile_id 't1'\), split: 'vall' is not a split \(did you mean 'val'",
                r"row 3 \(tile_id 't2'\), image: '/vsicurl.* is a network path",
                r"row 4 \(tile_id 't3'\), image 't3.tif': t3.tif is not a GeoTIFF: it begins with b'<VRTData",
                r"row 5 \(tile_id 't4'\), image 't4.tif': t4.tif cannot be read",
                r"row 5 \(tile_id 't4'\), mask 't4_m.tif': values 0, 3",
                r"row 6 \(tile_id 't5'\), mask 't5_m.tif': values 0, 2",
                r'leak: footprints: t6 \(val\) and t7 \(train\)',
                r"tile size: tile 't8', image 't8.tif': 16 × 16 pixels",
                r'tile size: data.tile_size is \d+; data.crops.enabled=true takes images of any size']
    for message in expected:
        assert re.search(message, printed), (message, printed)
    assert len(printed.splitlines()) == len(expected)

@pytest.mark.parametrize('command', ['rtsseg-check', 'rtsseg-train'])
def test_03_all_problems_of_a_complete_table(world, command):
    "Splits that share ground, one without positives, a tile of another size, another that cannot be read: at once"
    table = read_manifest(world/'full.csv').table
    others = table[table.split != 'val'].drop(columns=['positive'])
    table = pd.concat([others, pd.DataFrame(three_more_tiles(world))])
    table.loc[table.tile_id == 't6', 'n_positive'] = 0
    table.to_csv(world/'m.csv', index=False)
    write_manifest(read_manifest(world/'m.csv'), world/'full.csv')
    (world/'t1.tif').write_bytes((world/'t1.tif').read_bytes()[:1500])
    printed = refused(command, world, 'full.csv', strict_config(world))
    for message in (r'splits share ground|leak: footprints', r't6 \(val\) and t7 \(train\)',
                    r"tile size: tile 't8', image 't8.tif': 16 × 16 pixels",
                    r"tile 't1', image 't1.tif': t1.tif cannot be read"):
        assert re.search(message, printed), (message, printed)

ALL_MISSING = r"'tile_id' is missing(.|\n)*'image' is(.|\n)*'mask' is(.|\n)*'split' is(.|\n)*'region' is"

@pytest.mark.parametrize('content, message', [
    ('', 'empty file'),
    ('tile_id,image,mask,split,region\n', 'no rows'),
    ('tile_id,image,masks,split,region\n1,a,b,train,r\n', r"'mask' is missing \(did you mean 'masks'"),
    ('a,b\n1', ALL_MISSING),
    ('\x00\x01', 'm2.csv'),
    ('tile_id,image\n1,2,3,4\n1,2', 'm2.csv')])
def test_03_broken_tables(world, content, message):
    "All missing columns are named, with the nearest name that is there"
    (world/'m2.csv').write_text(content)
    with pytest.raises(DataError, match=message):
        read_manifest(world/'m2.csv')

def test_03_a_table_out_of_a_spreadsheet(world):
    "A byte-order mark, Windows line ends and spaces around names change nothing"
    text = (world/'m.csv').read_text().replace('tile_id,', 'tile_id ,').replace('\n', '\r\n')
    (world/'excel.csv').write_bytes(b'\xef\xbb\xbf' + text.encode())
    assert read_manifest(world/'excel.csv').hash == read_manifest(world/'m.csv').hash

@pytest.mark.parametrize('name', ['split', 'split '], ids=['equal', 'but for a space'])
def test_03_one_column_twice(world, name):
    table = pd.read_csv(world/'m.csv')
    table.insert(len(table.columns), name, table.split, allow_duplicates=True)
    table.to_csv(world/'m2.csv', index=False)
    with pytest.raises(DataError, match="m2.csv: column 'split' appears more than once"):
        read_manifest(world/'m2.csv')

@pytest.mark.parametrize('content, message', [
    (b'tile_id;image;mask\n1;2;3\n', "a comma was expected between cells, not ';'"),
    ('tile_id,image\n'.encode('utf-16'), 'is not UTF-8 text')])
def test_03_a_table_of_another_kind(world, content, message):
    "What spreadsheets write in some countries: the message says so"
    (world/'m2.csv').write_bytes(content)
    with pytest.raises(DataError, match=f'm2.csv: {message}'):
        read_manifest(world/'m2.csv')

PATTERNS = ['{tile_id', '{}', '{tile_id.x}', '{tile_id:>99999999}', '{tile_id!r}', '{tile}.tif']

@pytest.mark.parametrize('pattern', PATTERNS)
def test_03_patterns_of_an_import(world, pattern):
    "A pattern names columns and does nothing else with them; nothing is left of an import that is refused"
    source = dict(kind='table', path=str(world/'m.csv'), image='{tile_id}.tif', mask=pattern)
    cfg = RtsConfig(data=dict(manifest=world/'new'/'m.csv', source=source))
    with pytest.raises(DataError, match="mask: '.*(is not a pattern|asks for a column)"):
        prepare(cfg)
    assert not (world/'new').exists()

def test_03_lists_and_gaps_in_a_parquet(world):
    "A list is not text; a missing value is empty, however the table writes it"
    table = pd.read_csv(world/'full.csv', keep_default_na=False)
    table['extra'] = pd.array([pd.NA] * len(table), 'string')
    table['pixel_size'] = table.pixel_size.astype('Float64')
    table.loc[0, 'pixel_size'] = pd.NA
    table.to_parquet(world/'m.parquet')
    assert read_manifest(world/'m.parquet').hash == read_manifest(world/'full.csv').hash
    table['tile_id'] = [[tile_id] for tile_id in table.tile_id]
    table.to_parquet(world/'m.parquet')
    with pytest.raises(DataError, match="m.parquet: column 'tile_id' holds lists"):
        read_manifest(world/'m.parquet')

def test_03_columns_of_categories_in_a_parquet(world):
    "As pandas writes them, texts or not: read as any other, and what is wrong is named"
    table = pd.read_csv(world/'full.csv')
    table.assign(**{name: table[name].astype('category') for name in ('tile_id', 'split', 'region')}).to_parquet(
        world/'m.parquet')
    assert read_manifest(world/'m.parquet').hash == read_manifest(world/'full.csv').hash
    table.assign(tile_id=pd.Categorical([None] * len(table), ['a'])).to_parquet(world/'m.parquet')
    with pytest.raises(DataError, match='tile_id'):
        read_manifest(world/'m.parquet')

@pytest.mark.parametrize('count', ['1e30', 'inf', '-1', '1.5'])
def test_03_not_a_count(world, count):
    set_cells(world, 'full.csv', n_positive=(2, count))
    with pytest.raises(DataError, match=r"row 3 \(tile_id 't2'\), n_positive: not a count"):
        read_manifest(world/'full.csv')

# ---------------------------------------------------------------- 4: twice in two splits
def test_04_one_tile_in_two_splits(world):
    set_cells(world, tile_id=(5, 't0'))
    with pytest.raises(DataError, match=r"rows 1, 6 \(tile_id 't0'\), tile_id: appears 2 times, in test, train"):
        read_manifest(world/'m.csv')

@pytest.mark.parametrize('path', ['t0.tif', './t0.tif', 'sub/../t0.tif', 'link.tif'])
def test_04_one_file_in_two_splits(world, path):
    "However its path is written"
    (world/'sub').mkdir()
    os.symlink('t0.tif', world/'link.tif')
    set_cells(world, 'full.csv', image=(5, path))
    message = r"rows 1, 6 \(tile_id 't0', 't5'\), image: one file, 't0.tif', is in test, train"
    with pytest.raises(DataError, match=message):
        read_manifest(world/'full.csv')
    with pytest.raises(DataError, match=message):
        train(settings(world))

def test_04_one_content_in_two_splits(world):
    "Copies are found by the check, and at once where the manifest holds hashes"
    shutil.copy(world/'t0.tif', world/'t5.tif')
    assert 'leak: equal files: t0 (train, t0.tif) = t5 (test, t5.tif)' in errors(world)
    write_manifest(add_hashes(read_manifest(world/'full.csv')), world/'sealed.csv')
    with pytest.raises(DataError, match=r"rows 1, 6 \(tile_id 't0', 't5'\), sha256: one file, 't0.tif', is in test,"):
        read_manifest(world/'sealed.csv')

def test_04_copies_in_one_split_are_a_warning(world):
    shutil.copy(world/'t0.tif', world/'t1.tif')
    found = findings(world)['duplicates']
    assert found.level == 'warning' and found.note == 't0 (train, t0.tif) = t1 (train, t1.tif)'

# ---------------------------------------------------------------- 5: shared ground
def share_ground(world):
    "Move a training tile onto its neighbour in val"
    for name in ('t1.tif', 't1_m.tif'):
        rewrite(world/name, shift=(16, 0))
    write_manifest(read_manifest(world/'m.csv'), world/'full.csv')

def levels(found):
    return [finding.level for finding in found if finding.what == 'leak: footprints']

def test_05_splits_that_share_ground(world):
    "Not only the check: a run is stopped too, before anything is written"
    share_ground(world)
    assert levels(leaks(read_manifest(world/'m.csv'))) == ['error']
    cfg = settings(world)
    cfg.data.split_check = 'error'
    with pytest.raises(DataError, match=r'splits share ground(.|\n)*t1 \(train\) and t2 \(val\)'):
        train(cfg)
    assert not (world.parent/'runs').exists()

def test_05_shared_ground_that_was_allowed(world):
    "With data.split_check: warn the check warns of it, as training does"
    share_ground(world)
    assert levels(check_files(read_manifest(world/'full.csv'), settings(world).data)) == ['warning']
    said = find_system('rts').feed(settings(world), prepare=True).warnings()
    assert re.search(r'validation would be optimistic: .*t1 \(train\) and t2 \(val\)', said[0])

def test_05_through_the_check(world):
    share_ground(world)
    printed = refused('rtsseg-check', world, 'full.csv', strict_config(world))
    assert 'leak: footprints: t1 (train) and t2 (val)' in printed

# ---------------------------------------------------------------- 6: no slumps
@pytest.mark.parametrize('split', ['train', 'val'])
def test_06_a_split_without_slumps(world, split):
    "Nothing to learn from, or nothing to be judged by: refused before anything is written"
    manifest = read_manifest(world/'full.csv')
    in_split = manifest.table.split == split
    for mask in manifest.table['mask'][in_split]:
        rewrite(world/mask, lambda planes: planes * 0)
    table = manifest.table.assign(n_positive=manifest.table.n_positive.where(~in_split, 0))
    write_manifest(table, world/'full.csv')
    for use in (prepare, train):
        with pytest.raises(DataError, match=f"full.csv: split '{split}': 2 tiles, and none of them is positive"):
            use(settings(world))
    assert not (world.parent/'runs').exists()
    found = [line for line in errors(world) if line.startswith(f'split {split}: 0 of 2 tiles positive')]
    assert found and 'no positive tile' in found[0]

def test_06_through_the_commands(world):
    manifest = read_manifest(world/'full.csv')
    write_manifest(manifest.table.assign(n_positive=0, mask=''), world/'full.csv')
    trained, checked = refused('rtsseg-train', world), refused('rtsseg-check', world)
    for split in ('train', 'val'):
        assert f"split '{split}': 2 tiles, and none of them is positive" in trained
        assert f'split {split}: 0 of 2 tiles positive' in checked

# ---------------------------------------------------------------- 7: names
SCRIPT = '<script>alert(1)</script>'

def test_07_html_in_names(world):
    "Names of regions, tiles and files are shown as text in the table of the check; the report has its own test"
    for name in ('t0.tif', 't0_m.tif'):
        (world/name).rename(world/f'<b>{name}')
    table = pd.read_csv(world/'m.csv')
    table['region'] = [SCRIPT, 'a'] * 3
    table.loc[0, ['tile_id', 'image', 'mask']] = ['<img src=x>', '<b>t0.tif', '<b>t0_m.tif']
    table.to_csv(world/'m.csv', index=False)
    rewrite(world/'<b>t0_m.tif', lambda mask: mask * 0 + 255)
    shown = FindingTable(check_files(read_manifest(world/'m.csv'), CFG.data))
    page = shown._repr_html_()
    assert '&lt;script&gt;' in page and '&lt;img' in page
    assert not re.search('<(script|img|b)\\b', page)
    # a terminal shows it as it is
    assert SCRIPT in repr(shown)

@pytest.mark.parametrize('field', ['tile_id', 'region', 'block'])
def test_07_control_characters_in_names(world, field):
    "They could clear a terminal or forge a line of a log"
    set_cells(world, **{field: (2, 'x\x1b[2J')})
    with pytest.raises(DataError, match=rf'row 3 .*{field}: holds control characters'):
        read_manifest(world/'m.csv')

def test_07_html_in_the_name_of_a_manifest(world):
    shutil.copy(world/'full.csv', world/'<b>.csv')
    page = read_manifest(world/'<b>.csv')._repr_html_()
    assert '&lt;b&gt;.csv' in page and page.count('<b>') == 1

@pytest.mark.parametrize('kind', ['texts', 'maps'])
def test_03_a_parquet_that_unpacks_to_gigabytes(world, kind):
    "A file of kilobytes, whose texts are one text a million times, is not unpacked"
    count, text = 50_000, 'x' * 100_000
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * count, 'int32'), pa.array([text]))
    if kind == 'maps':
        keys = pa.array(['k'] * count)
        texts = pa.MapArray.from_arrays(pa.array(range(count + 1), 'int32'), keys, texts)
    pq.write_table(pa.table(dict(tile_id=texts)), world/'m.parquet')
    assert (world/'m.parquet').stat().st_size < 1_000_000
    with pytest.raises(DataError, match='m.parquet would unpack to far more'):
        read_manifest(world/'m.parquet')

def test_03_a_parquet_of_values_of_one_long_width(world):
    "Each of 20,000 values is the same one of 400,000 bytes"
    column = pa.array([b'x' * 400_000] * 500, pa.binary(400_000))
    with pq.ParquetWriter(world/'m.parquet', pa.schema([('tile_id', column.type)]), compression='zstd') as writer:
        for _ in range(40):
            writer.write_table(pa.table(dict(tile_id=column)))
    assert (world/'m.parquet').stat().st_size < 100_000
    with pytest.raises(DataError, match='m.parquet would unpack to far more'):
        read_manifest(world/'m.parquet')
