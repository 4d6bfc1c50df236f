"Files far away: each is opened once for a tile, and `rtsseg stage` copies them to a local disk"
import builtins
import errno
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, namedtuple
from pathlib import Path

import pandas as pd
import pytest
import rasterio

import rtsseg.stage as stage_module
from rtsseg.cli import main
from rtsseg.config import load
from rtsseg.console import DataError
from rtsseg.evaluation import evaluate
from rtsseg.files import SEAL, digest
from rtsseg.manifest import read_manifest, write_manifest
from rtsseg.rawtile import example_tiles
from rtsseg.stage import Original, copy_whole, read_list, stage
from rtsseg.stats import compute_stats
from rtsseg.tiles import TileDataset
from rtsseg.training import train
from rtsseg.windows import cut_windows

@pytest.fixture(scope='module')
def source(tmp_path_factory):
    "24 tiles of 64 pixels with EXTRA bands in two regions: the manifest. Tests read it and write elsewhere"
    folder = tmp_path_factory.mktemp('far')
    write_manifest(example_tiles(folder), folder/'raw.csv')
    return write_manifest(read_manifest(folder/'raw.csv'), folder/'tiles.csv')

# ---------------------------------------------------------------- one open for a file
class Looks:
    "What Python asks of the files of a folder, and which of them GDAL opens"

    def __init__(self, folder, monkeypatch):
        self.folder, self.opened, self.asked = str(folder), [], []
        for owner, name in ((builtins, 'open'), (os, 'open'), (rasterio, 'open')):
            self.note(monkeypatch, owner, name, self.opened)
        for name in ('stat', 'lstat', 'scandir', 'listdir', 'readlink', 'access'):
            self.note(monkeypatch, os, name, self.asked)

    def note(self, monkeypatch, owner, name, found):
        original = getattr(owner, name)

        def noted(path, *args, **options):
            if str(path).startswith(self.folder):
                found.append(os.path.relpath(path, self.folder))
            return original(path, *args, **options)
        monkeypatch.setattr(owner, name, noted)

    def of(self, work):
        "(opened how often, asked) during some work"
        self.opened.clear()
        self.asked.clear()
        work()
        return Counter(self.opened), list(self.asked)

@pytest.fixture
def looks(source, monkeypatch):
    return Looks(source.parent, monkeypatch)

def dataset(source, windows=False, georeference=False, **data):
    "The training split, its files checked or not"
    cfg = load(data=dict(manifest=source, tile_size=32 if windows else 64, extra_bands=['ndvi'],
                         crops=dict(enabled=windows)) | data, model=dict(in_channels=4))
    whole = read_manifest(source)
    train = (cut_windows(whole, 32) if windows else whole).of('train')
    return TileDataset(train, compute_stats(whole.of('train'), ['ndvi']), cfg, georeference)

def draw_of_a_positive(tiles):
    "A draw of a tile with an image, a mask and EXTRA bands, and its files"
    row = tiles.manifest.table.positive.to_numpy().nonzero()[0][0]
    files = tiles.manifest.table.loc[row, ['image', 'mask', 'extra']]
    return lambda: tiles[(42, 1, int(row), 0)], Counter(files.tolist())

def test_a_draw_opens_each_file_once_and_asks_nothing(source, looks):
    "A round trip for each file, where a look at the file system is one. The folders were looked at before"
    tiles = dataset(source)
    draw, files = draw_of_a_positive(tiles)
    draw()
    assert looks.of(draw) == (files, [])

def test_files_that_were_not_checked_are_opened_once_too(source, looks):
    tiles = dataset(source, georeference=True)
    draw, files = draw_of_a_positive(tiles)
    opened, asked = looks.of(draw)
    assert opened == files
    assert f'{Path(tiles.manifest.table.image[0]).parent}/' in ' '.join(asked)

@pytest.mark.parametrize('georeference', [False, True])
def test_a_crop_opens_each_file_once(source, looks, georeference):
    draw, files = draw_of_a_positive(dataset(source, windows=True, georeference=georeference))
    assert looks.of(draw)[0] == files

def test_a_coarser_view_opens_the_files_of_its_tiles_once(source, looks):
    tiles = dataset(source, multi_resolution=dict(p=1, factor=2))
    table = tiles.manifest.table
    views = {i: tiles.view((42, 1, i, 0)) for i in range(len(table))}
    found = {i: view for i, view in views.items() if view is not None}
    i, view = max(found.items(), key=lambda item: (item[1] >= 0).sum())
    shown = table.loc[view[view >= 0]]
    files = [name for field in ('image', 'mask', 'extra') for name in shown[field] if name]
    assert len(shown) > 1
    assert looks.of(lambda: tiles[(42, 1, i, 0)])[0] == Counter(files)

# ---------------------------------------------------------------- rtsseg stage
def contents(folder):
    "{place: bytes} of all files but the lock and the list"
    files = [path for path in folder.rglob('*') if path.is_file() and path.name not in ('.lock', SEAL)]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

def originals(source):
    "What a copy is to hold"
    return {place: data for place, data in contents(source.parent).items() if place != 'raw.csv'}

def list_is_true(out):
    "Each line of the list is of a copy that is whole"
    return all(digest(out/place) == sha256 for place, sha256 in read_list(out).items())

# slow enough to be killed in the middle of a file
SLOWLY = """
import sys, time
from rtsseg import stage
pieces = stage._pieces
def slow(original):
    sys.stdout.write('copying ')
    sys.stdout.flush()
    for piece in pieces(original):
        time.sleep(.005)
        yield piece
stage.PIECE, stage._pieces = 2000, slow
stage.stage(sys.argv[1], sys.argv[2], threads=3)
"""

def test_killed_anywhere_it_continues(source, tmp_path):
    "No half file under its own name, no manifest before the end, and what was finished is not copied again"
    out, begun = tmp_path/'copy', 0
    for seconds in (.05, .1, .15, .2, .1):
        child = subprocess.Popen([sys.executable, '-c', SLOWLY, source, out], stdout=subprocess.PIPE)
        assert child.stdout.read(1)
        time.sleep(seconds)
        child.kill()
        child.communicate()
        found = contents(out)
        assert source.name not in found and list_is_true(out)
        whole = {place: data for place, data in found.items() if not place.endswith('.part')}
        assert whole.items() <= originals(source).items()
        begun = len(read_list(out))
    assert 0 < begun < len(originals(source))
    done = stage(source, out)
    assert contents(out) == originals(source)
    assert done.files - done.copied == begun
    assert read_manifest(out/source.name).hash == read_manifest(source).hash

def test_a_line_that_was_cut_off_does_not_count(source, tmp_path):
    stage(source, tmp_path/'copy')
    text = (tmp_path/'copy'/SEAL).read_text()
    (tmp_path/'copy'/SEAL).write_text(text[:-10])
    places = read_list(tmp_path/'copy')
    stage(source, tmp_path/'copy')
    assert len(places) < len(read_list(tmp_path/'copy')) and (tmp_path/'copy'/SEAL).read_text() == text

def test_a_full_disk_is_seen_before(source, tmp_path, monkeypatch, capsys):
    free = namedtuple('Free', 'total used free')(10, 10, 1000)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: free)
    assert main(['stage', '--manifest', str(source), '--out', str(tmp_path/'copy')]) == 2
    assert re.search('copy: .* GB are to be copied, and 1e-06 GB are free', capsys.readouterr().err)

def test_a_disk_that_fills_up_stops_it_and_it_resumes(source, tmp_path, monkeypatch, capsys):
    replace, names = os.replace, []

    def full(old, new):
        names.append(new)
        if len(names) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(old, new)
    out = tmp_path/'copy'
    with monkeypatch.context() as patch:
        patch.setattr('rtsseg.stage.os.replace', full)
        assert main(['stage', '--manifest', str(source), '--out', str(out), '--threads', '2']) == 3
    printed = capsys.readouterr().err
    assert 'No space left on device' in printed and 'the same command resumes' in printed
    assert list_is_true(out) and not list(out.rglob('*.part'))
    assert main(['stage', '--manifest', str(source), '--out', str(out)]) == 0
    assert contents(out) == originals(source)

def test_what_cannot_be_read_is_named_and_the_rest_is_copied(source, tmp_path, monkeypatch):
    "Also a file that becomes shorter while it is read"
    table = read_manifest(source).table
    broken, shorter = source.parent/table.image[0], source.parent/table.image[1]
    pieces = stage_module._pieces

    def failing(original):
        if original.file == broken.resolve():
            raise DataError(f'{original.place}: cannot be read: {os.strerror(errno.EIO)}')
        data = b''.join(pieces(original))
        yield data[:-1] if original.file == shorter.resolve() else data
    monkeypatch.setattr(stage_module, '_pieces', failing)
    with pytest.raises(DataError) as e:
        stage(source, tmp_path/'copy')
    assert [line.split(': ')[1] for line in str(e.value).splitlines()] == [table.image[0], table.image[1]]
    assert len(read_list(tmp_path/'copy')) == len(originals(source)) - 3
    assert not (tmp_path/'copy'/source.name).exists()

def test_a_file_without_permission_is_named(source, tmp_path):
    "Root may read it all the same, so a folder stands for it"
    original = Original('images', source.parent/'images', 0, 0, '')
    with pytest.raises(DataError, match='images: cannot be read: Is a directory'):
        copy_whole(original, tmp_path)

def some_rows(source, folder, rows, name='some.csv'):
    "A manifest of some of the tiles, beside them"
    table = pd.read_csv(source, dtype=str, keep_default_na=False)
    table[rows].to_csv(folder/name, index=False)
    return folder/name

@pytest.fixture
def far(source, tmp_path):
    "A folder of the tiles that may be written to"
    return shutil.copytree(source.parent, tmp_path/'far')

def test_another_manifest_is_refused_and_nothing_changes(source, far, tmp_path, capsys):
    "Of the same name with other tiles, with fewer, of another name, and of another folder with files of the same names"
    out = tmp_path/'copy'
    stage(some_rows(source, far, slice(8)), out)
    again = shutil.copytree(far, tmp_path/'again', copy_function=shutil.copyfile)
    before = contents(out), (out/SEAL).read_bytes()
    for folder, rows, name in ((far, slice(8, None), 'some.csv'), (far, slice(7), 'some.csv'),
                               (far, slice(9), 'other.csv'), (again, slice(9), 'some.csv')):
        other = some_rows(source, folder, rows, name)
        assert main(['stage', '--manifest', str(other), '--out', str(out)]) == 2
        assert 'those of another manifest: name a new folder' in capsys.readouterr().err
        assert (contents(out), (out/SEAL).read_bytes()) == before

def test_a_manifest_that_has_grown_copies_only_what_is_new(source, far, tmp_path):
    "So does one whose cells alone were changed: nothing"
    out = tmp_path/'copy'
    first = stage(some_rows(source, far, slice(8)), out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob('*.tif')}
    whole = some_rows(source, far, slice(None))
    done = stage(whole, out)
    assert done.copied == done.files - first.files > 0
    assert times.items() <= {path: path.stat().st_mtime_ns for path in out.rglob('*.tif')}.items()
    assert (out/whole.name).read_bytes() == whole.read_bytes() and list_is_true(out)
    whole.write_text(whole.read_text().replace('train', 'buffer'))
    assert stage(whole, out).copied == 0 and (out/whole.name).read_bytes() == whole.read_bytes()

def test_interrupted_it_continues_with_its_own_manifest_only(source, far, tmp_path, monkeypatch):
    "Neither another manifest nor a file that was lost meanwhile: the list decides, also before the end"
    out, pieces, read = tmp_path/'copy', stage_module._pieces, []

    def failing(original):
        read.append(original)
        if len(read) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pieces(original)
    manifest, other = some_rows(source, far, slice(8)), some_rows(source, far, slice(8, None), 'other.csv')
    with monkeypatch.context() as patch, pytest.raises(OSError, match='No space'):
        patch.setattr(stage_module, '_pieces', failing)
        stage(manifest, out, threads=1)
    with pytest.raises(DataError, match='those of another manifest'):
        stage(other, out)
    done = stage(manifest, out)
    assert done.files - done.copied == 5
    (out/read[0].place).unlink()
    assert stage(some_rows(source, far, slice(9)), out).copied > 1
    assert list_is_true(out)

def test_two_names_of_one_file_stay_one(source, tmp_path):
    "So an image in two splits is found on the copy as on the original"
    far = shutil.copytree(source.parent, tmp_path/'far')
    table = pd.read_csv(far/'raw.csv', keep_default_na=False)
    of_train, of_test = (table.index[table.split == split][0] for split in ('train', 'test'))
    (far/'again.tif').symlink_to(table.image[of_train])
    table.loc[of_test, 'image'] = 'again.tif'
    table.to_csv(far/'leak.csv', index=False)
    stage(far/'leak.csv', tmp_path/'copy')
    assert stage(far/'leak.csv', tmp_path/'copy').copied == 0
    for folder in (far, tmp_path/'copy'):
        with pytest.raises(DataError, match="image: one file, '.*', is in test, train"):
            read_manifest(folder/'leak.csv')

def test_a_sidecar_is_refused_as_on_the_original(source, tmp_path):
    far = shutil.copytree(source.parent, tmp_path/'far')
    (far/f'{read_manifest(source).table.image[0]}.msk').write_text('x')
    with pytest.raises(DataError, match='sidecar .msk'):
        stage(far/source.name, tmp_path/'copy')

def run_on(manifest, folder, **data):
    "A run of seconds; its folder"
    cfg = load(
        overrides=['loader.num_workers=0', 'tracker.kind=none'], runs=folder, device='cpu', epochs=1, batch_size=4,
        val_frequency=1, freeze_backbone_epochs=0, steps_per_epoch=2, lr=dict(warmup_epochs=0),
        data=dict(manifest=manifest, tile_size=64, split_check='warn') | data,
        sampler=dict(curriculum=[dict(first=1, last=1, ratio=1)]), metrics=dict(monitor='pr_auc@native'),
        model=dict(architecture='unet', encoder='tu-test_efficientnet', weights=None,
                   options=dict(encoder_depth=4, decoder_channels=[16, 8, 8, 8])))
    run = train(cfg)
    evaluate(run, 'val')
    return run

def test_a_run_on_the_copy_is_that_on_the_original(source, tmp_path, capsys):
    "Same hash, same weights, same evidence; here the manifest lies apart from its files"
    (tmp_path/'tables').mkdir()
    manifest = shutil.copy(source, tmp_path/'tables')
    arguments = ['--override', f'data.root={source.parent}', '--out', str(tmp_path/'copy')]
    assert main(['stage', '--manifest', str(manifest), '--override', 'data.source=null', *arguments]) == 0
    assert '--override data.root=null' in capsys.readouterr().out
    far = run_on(manifest, tmp_path/'far', root=source.parent)
    near = run_on(tmp_path/'copy'/source.name, tmp_path/'near')
    assert far.relative_to(tmp_path/'far') == near.relative_to(tmp_path/'near')
    for name in ('model/model.safetensors', 'evidence/val.parquet'):
        assert (far/name).read_bytes() == (near/name).read_bytes()

@pytest.mark.parametrize('line, words', [
    (['--config', 'classify'], "system 'classify' has no manifest"), ([], '--out is not given'),
    (['--out', '../x', '--manifest', 'none.csv'], 'none.csv: no such file')])
def test_commands_that_are_refused(line, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['stage', *line]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
