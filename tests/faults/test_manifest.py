"Faults 1 to 7: manifests that cannot be meant"
import os, re, shutil

import pandas as pd
import pytest

from rtsseg.console import DataError
from rtsseg.manifest import add_hashes, read_manifest, write_manifest
from rtsseg.audit import leaks
from rtsseg.filecheck import check_files
from rtsseg.findings import show_findings
from rtsseg.config import RtsConfig
from rtsseg.prepare import prepare
from rtsseg.training import train
from helpers.tiles import CFG, change, nobody_calls, refused, rewrite, seen, settings, tile, world, wrong

STRICT = 'data: {split_check: error}'

FAULTS = {1: ("a path that leaves the manifest's folder: ../.., absolute, or through a link", 'refused, with row and field'),
          2: ('a path on a network, or a table that only points to one', 'refused; no connection is opened'),
          3: ('a missing column, an empty file; a byte-order mark or Windows line ends', 'refused; the latter read as any other table'),
          4: ('one tile, or one file, in two splits', 'refused, with both rows'),
          5: ('tiles of two splits that overlap on the ground', 'refused'),
          6: ('no slump in training or validation', 'refused'),
          7: ('HTML in a name', 'shown as text')}

def at(world, field, value, name='m.csv', row=2): change(world, name, **{field: (row, value)})

@pytest.mark.parametrize('path,word', [('../x.tif', 'leaves'), ('a/../../x.tif', 'leaves'), ('link.tif', 'leaves'), ('/etc/hostname', 'absolute'), ('C:\\x.tif', 'absolute'), ('\\\\host\\x.tif', 'absolute'),
                                       ('none.tif', 'no such file'), ('.', 'no such file'), ('loop.tif', 'no such file'), ('x' * 5000, 'no such file')])
@pytest.mark.parametrize('field', ['image', 'mask', 'extra'])
def test_01_a_path_that_leaves_the_folder(world, path, word, field):
    "The row and the field are named; nothing outside of the manifest's folder is looked at"
    (world.parent/'x.tif').write_text('x'); os.symlink(world.parent/'x.tif', world/'link.tif'); os.symlink('loop.tif', world/'loop.tif')
    at(world, field, path)
    with pytest.raises(DataError, match=rf"m.csv: row 3 \(tile_id 't2'\), {field}: .*{word}"): read_manifest(world/'m.csv')

def test_01_a_link_that_was_put_there_later(world):
    "The path is followed anew each time that a tile is read"
    m = read_manifest(world/'full.csv'); shutil.move(world/'t0.tif', world.parent/'t0.tif'); os.symlink(world.parent/'t0.tif', world/'t0.tif')
    assert "tile 't0', image 't0.tif': 't0.tif' leaves the manifest's folder" in next(f.note for f in check_files(m, CFG.data) if f.what == 'files')

@pytest.mark.parametrize('path', ['/vsicurl/http://127.0.0.1:{}/x.tif', 'http://127.0.0.1:{}/x.tif', 's3://127.0.0.1:{}/x.tif', '/vsizip//vsicurl/http://127.0.0.1:{}/x.zip/x.tif'])
def test_02_a_network_path(world, path):
    with nobody_calls() as port:
        at(world, 'image', path.format(port))
        with pytest.raises(DataError, match=r"row 3 \(tile_id 't2'\), image: .* is a network path"): read_manifest(world/'m.csv')

@pytest.mark.parametrize('name', ['v.gpkg', 'v.parquet', 'v.geoparquet', 'v.xlsx', 'v.vrt'])
def test_02_a_table_that_points_elsewhere(world, name):
    "A virtual table under the name of a real one"
    with nobody_calls() as port:
        (world/name).write_text(f'<OGRVRTDataSource><OGRVRTLayer name="x"><SrcDataSource>/vsicurl/http://127.0.0.1:{port}/x</SrcDataSource></OGRVRTLayer></OGRVRTDataSource>')
        with pytest.raises(DataError, match=name): read_manifest(world/name)

@pytest.mark.parametrize('command', ['rtsseg-check', 'rtsseg-train'])
def test_03_all_that_is_wrong_is_told_at_once(world, command):
    "Paths, names, files that cannot be read, rasters that do not fit, image and mask of one tile; of the other rows sizes and shared ground: one answer, exit code 2, nothing written, no connection opened"
    with nobody_calls() as port:
        t = pd.read_csv(world/'m.csv'); more = [tile(world, 't6', x=960) | dict(split='val'), tile(world, 't7', x=990), tile(world, 't8', x=2000, size=16)]
        pd.concat([t, pd.DataFrame(more)]).to_csv(world/'m.csv', index=False)
        at(world, 'image', '../x.tif', row=0); at(world, 'split', 'vall', row=1); at(world, 'image', f'/vsicurl/http://127.0.0.1:{port}/x.tif', row=2)
        (world/'t3.tif').write_text(f'<VRTDataset rasterXSize="32" rasterYSize="32"><VRTRasterBand dataType="Byte" band="1"><SimpleSource><SourceFilename>/vsicurl/http://127.0.0.1:{port}/x.tif</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>')
        (world/'t4.tif').write_bytes((world/'t4.tif').read_bytes()[:1500]); rewrite(world/'t4_m.tif', lambda a: a * 3); rewrite(world/'t5_m.tif', lambda a: a * 2)
        (world.parent/'strict.yaml').write_text(STRICT); said = refused(command, world, 'm.csv', 'strict.yaml')
    for word in (r"row 1 \(tile_id 't0'\), image: '../x.tif' leaves", r"row 2 \(tile_id 't1'\), split: 'vall' is not a split \(did you mean 'val'", r"row 3 \(tile_id 't2'\), image: '/vsicurl.* is a network path",
                 r"row 4 \(tile_id 't3'\), image 't3.tif': t3.tif is not a GeoTIFF: it begins with b'<VRTData", r"row 5 \(tile_id 't4'\), image 't4.tif': t4.tif cannot be read", r"row 5 \(tile_id 't4'\), mask 't4_m.tif': values 0, 3",
                 r"row 6 \(tile_id 't5'\), mask 't5_m.tif': values 0, 2", r"leak: footprints: t6 \(val\) and t7 \(train\)", r"tile size: tile 't8', image 't8.tif': 16 × 16 pixels"):
        assert re.search(word, said), (word, said)
    assert len(said.splitlines()) == 9

@pytest.mark.parametrize('command', ['rtsseg-check', 'rtsseg-train'])
def test_03_all_that_is_wrong_with_a_table_that_is_clean(world, command):
    "Splits that share ground, one without positives, a tile of another size, another that cannot be read: at once"
    t = read_manifest(world/'full.csv').table; more = [tile(world, 't6', x=960) | dict(split='val'), tile(world, 't7', x=990), tile(world, 't8', x=2000, size=16)]
    t = pd.concat([t[t.split != 'val'].drop(columns=['positive']), pd.DataFrame(more)]); t.loc[t.tile_id == 't6', 'n_positive'] = 0
    t.to_csv(world/'m.csv', index=False); write_manifest(read_manifest(world/'m.csv'), world/'full.csv'); (world/'t1.tif').write_bytes((world/'t1.tif').read_bytes()[:1500])
    (world.parent/'strict.yaml').write_text(STRICT); said = refused(command, world, 'full.csv', 'strict.yaml')
    for word in (r"splits share ground|leak: footprints", r"t6 \(val\) and t7 \(train\)", r"tile size: tile 't8', image 't8.tif': 16 × 16 pixels", r"tile 't1', image 't1.tif': t1.tif cannot be read"): assert re.search(word, said), (word, said)

@pytest.mark.parametrize('content,word', [('', 'empty file'), ('tile_id,image,mask,split,region\n', 'no rows'), ('tile_id,image,masks,split,region\n1,a,b,train,r\n', r"'mask' is missing \(did you mean 'masks'"),
                                          ('a,b\n1', "'tile_id' is missing(.|\n)*'image' is(.|\n)*'mask' is(.|\n)*'split' is(.|\n)*'region' is"), ('\x00\x01', 'm2.csv'), ('tile_id,image\n1,2,3,4\n1,2', 'm2.csv')])
def test_03_broken_tables(world, content, word):
    "All columns that are missing are named, with the nearest name that is there"
    (world/'m2.csv').write_text(content)
    with pytest.raises(DataError, match=word): read_manifest(world/'m2.csv')

def test_03_a_table_out_of_a_spreadsheet(world):
    "A byte-order mark, Windows line ends and spaces around names change nothing"
    text = (world/'m.csv').read_text()
    (world/'excel.csv').write_bytes(b'\xef\xbb\xbf' + text.replace('tile_id,', 'tile_id ,').replace('\n', '\r\n').encode())
    assert read_manifest(world/'excel.csv').hash == read_manifest(world/'m.csv').hash

def test_03_one_column_twice(world):
    text = (world/'m.csv').read_text().splitlines(); (world/'m2.csv').write_text('\n'.join(f'{l},{l.split(",")[4]}' for l in text))
    with pytest.raises(DataError, match="m2.csv: column 'split' appears more than once"): read_manifest(world/'m2.csv')

@pytest.mark.parametrize('content,word', [('tile_id;image;mask\n1;2;3\n', "a comma was expected between cells, not ';'"), ('tile_id,image\n'.encode('utf-16'), 'is not UTF-8 text')])
def test_03_a_table_of_another_kind(world, content, word):
    "What a spreadsheet makes of it in some countries: said as that"
    (world/'m2.csv').write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=f'm2.csv: {word}'): read_manifest(world/'m2.csv')

@pytest.mark.parametrize('pattern', ['{tile_id', '{}', '{tile_id.x}', '{tile_id:>99999999}', '{tile_id!r}', '{tile}.tif'])
def test_03_patterns_of_an_import(world, pattern):
    "A pattern names columns, and does nothing else with them; nothing is left of an import that is refused"
    source = dict(kind='table', path=str(world/'m.csv'), image='{tile_id}.tif', mask=pattern)
    with pytest.raises(DataError, match="mask: '.*(is not a pattern|asks for a column)"): prepare(RtsConfig(data=dict(manifest=world/'new'/'m.csv', source=source)))
    assert not (world/'new').exists()

def test_03_names_that_are_one(world):
    "Column names that differ by a space only"
    (world/'m.csv').write_text((world/'m.csv').read_text().replace('split', 'split,split ', 1).replace(',train', ',train,train').replace(',val', ',val,val').replace(',test', ',test,test'))
    with pytest.raises(DataError, match="m.csv: column 'split' appears more than once"): read_manifest(world/'m.csv')

def test_03_lists_and_gaps_in_a_parquet(world):
    "A list is no text; what is missing is empty, however the table writes it"
    t = pd.read_csv(world/'full.csv', keep_default_na=False); t['extra'] = pd.array([pd.NA] * len(t), 'string'); t['pixel_size'] = t.pixel_size.astype('Float64')
    t.loc[0, 'pixel_size'] = pd.NA; t.to_parquet(world/'m.parquet'); assert read_manifest(world/'m.parquet').hash == read_manifest(world/'full.csv').hash
    t['tile_id'] = [[i] for i in t.tile_id]; t.to_parquet(world/'m.parquet')
    with pytest.raises(DataError, match="m.parquet: column 'tile_id' holds lists"): read_manifest(world/'m.parquet')

@pytest.mark.parametrize('count', ['1e30', 'inf', '-1', '1.5'])
def test_03_no_count(world, count):
    at(world, 'n_positive', count, 'full.csv')
    with pytest.raises(DataError, match=r"row 3 \(tile_id 't2'\), n_positive: not a count"): read_manifest(world/'full.csv')

def test_04_one_tile_in_two_splits(world):
    at(world, 'tile_id', 't0', row=5)
    with pytest.raises(DataError, match=r"rows 1, 6 \(tile_id 't0'\), tile_id: appears 2 times, in test, train"): read_manifest(world/'m.csv')

@pytest.mark.parametrize('path', ['t0.tif', './t0.tif', 'sub/../t0.tif', 'link.tif'])
def test_04_one_file_in_two_splits(world, path):
    "However its path is written"
    (world/'sub').mkdir(); os.symlink('t0.tif', world/'link.tif'); at(world, 'image', path, 'full.csv', row=5)
    for use in (lambda: read_manifest(world/'full.csv'), lambda: train(settings(world))):
        with pytest.raises(DataError, match=r"rows 1, 6 \(tile_id 't0', 't5'\), image: one file, 't0.tif', is in test, train"): use()

def test_04_one_content_in_two_splits(world):
    "Copies are found by the check, and at once where the manifest holds hashes"
    shutil.copy(world/'t0.tif', world/'t5.tif')
    assert "leak: equal files: t0 (train, t0.tif) = t5 (test, t5.tif)" in wrong(world)
    write_manifest(add_hashes(read_manifest(world/'full.csv')), world/'sealed.csv')
    with pytest.raises(DataError, match=r"rows 1, 6 \(tile_id 't0', 't5'\), sha256: one file, 't0.tif', is in test, train"): read_manifest(world/'sealed.csv')

def test_04_copies_inside_a_split_are_a_warning(world):
    shutil.copy(world/'t0.tif', world/'t1.tif'); found = seen(world)['duplicates']
    assert found.level == 'warning' and found.note == 't0 (train, t0.tif) = t1 (train, t1.tif)'

def shared_ground(world):
    for f in ('t1.tif', 't1_m.tif'): rewrite(world/f, shift=(16, 0))
    write_manifest(read_manifest(world/'m.csv'), world/'full.csv')

def test_05_splits_that_share_ground(world):
    "Not the check alone: whoever never called it is stopped, too, before anything is written"
    shared_ground(world); assert [f.level for f in leaks(read_manifest(world/'m.csv')) if f.what == 'leak: footprints'] == ['error']
    cfg = settings(world); cfg.data.split_check = 'error'
    with pytest.raises(DataError, match=r'splits share ground(.|\n)*t1 \(train\) and t2 \(val\)'): train(cfg)
    assert not (world.parent/'runs').exists()

def test_05_shared_ground_that_was_allowed(world):
    "With data.split_check: warn the check warns of it, as training does"
    shared_ground(world); assert [f.level for f in check_files(read_manifest(world/'full.csv'), settings(world).data) if f.what == 'leak: footprints'] == ['warning']
    with pytest.warns(UserWarning, match=r'validation would flatter: .*t1 \(train\) and t2 \(val\)'): prepare(settings(world))

def test_05_through_the_check(world):
    shared_ground(world); (world.parent/'strict.yaml').write_text(STRICT); assert 'leak: footprints: t1 (train) and t2 (val)' in refused('rtsseg-check', world, 'full.csv', 'strict.yaml')

@pytest.mark.parametrize('split', ['train', 'val'])
def test_06_a_split_without_slumps(world, split):
    "There is nothing to learn from, or nothing to be judged by: refused before anything is written"
    m = read_manifest(world/'full.csv'); at_split = m.table.split == split
    for f in m.table['mask'][at_split]: rewrite(world/f, lambda a: a * 0)
    write_manifest(m.table.assign(n_positive=m.table.n_positive.where(~at_split, 0)), world/'full.csv')
    for use in (prepare, train):
        with pytest.raises(DataError, match=f"full.csv: split '{split}': 2 tiles, and none of them is positive"): use(settings(world))
    assert not (world.parent/'runs').exists()
    assert any(l.startswith(f'split {split}: 0 of 2 tiles positive') and 'no positive tile' in l for l in wrong(world))

def test_06_through_the_commands(world):
    m = read_manifest(world/'full.csv'); write_manifest(m.table.assign(n_positive=0, mask=''), world/'full.csv')
    said = refused('rtsseg-train', world); assert all(f"split '{s}': 2 tiles, and none of them is positive" in said for s in ('train', 'val'))
    said = refused('rtsseg-check', world); assert all(f'split {s}: 0 of 2 tiles positive' in said for s in ('train', 'val'))

EVIL = '<script>alert(1)</script>'

def test_07_html_in_names(world):
    "Names of regions, tiles and files stand in the table of the check as text, whoever shows it; the report has a test of its own"
    for f in ('t0.tif', 't0_m.tif'): (world/f).rename(world/f.replace('t0', '<b>t0'))
    t = pd.read_csv(world/'m.csv'); t['region'] = [EVIL, 'a'] * 3; t.loc[0, ['tile_id', 'image', 'mask']] = ['<img src=x>', '<b>t0.tif', '<b>t0_m.tif']
    t.to_csv(world/'m.csv', index=False); rewrite(world/'<b>t0_m.tif', lambda a: a * 0 + 255)
    found = check_files(read_manifest(world/'m.csv'), CFG.data); page = show_findings(found)._repr_html_()
    assert '&lt;script&gt;' in page and '&lt;img' in page and not re.search('<(script|img|b)\\b', page)
    assert EVIL in repr(show_findings(found))                     # a terminal shows it as it is

@pytest.mark.parametrize('field', ['tile_id', 'region', 'block'])
def test_07_control_characters_in_names(world, field):
    "They could clear a terminal or forge a line of a log"
    at(world, field, 'x\x1b[2J')
    with pytest.raises(DataError, match=rf'row 3 .*{field}: holds control characters'): read_manifest(world/'m.csv')
