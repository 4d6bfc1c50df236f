"Faults 40 to 42: incomplete models, scenes with little data, interrupted predictions"
import hashlib
import json
import os
import random
import re
import shutil
import signal
from contextlib import contextmanager

import numpy as np
import pytest
import rasterio
import torch
from safetensors.torch import load_file, save

import rtsseg.prediction
from helpers.children import (
    count_calls,
    full_disk,
    in_child,
    killed_at_call,
    killed_at_file_event,
    killed_while_writing,
    never_opened_for_writing,
)
from helpers.hostile import change_json
from helpers.maps import CRS, GRID, map_bytes, noise, untrained_model, write_scene
from helpers.record import note
from helpers.runs import guard, in_time, run
from rtsseg.cli import rtsseg_evaluate, rtsseg_predict
from rtsseg.console import DataError
from rtsseg.files import FileError, seal_model
from rtsseg.infer import load_model
from rtsseg.prediction import NODATA, FinishedRows, WindowRows, predict, window_starts
from rtsseg.runs import RunError

FAULTS = {
    40: (
        'a model directory with a missing or an extra weight, without normalization_stats.json, with a standard '
        'deviation of 0, weights that are NaN or infinite, or bands in another order',
        'refused',
    ),
    41: (
        'a scene that is smaller than a tile, holds no data at all, or holds it in parts',
        'a valid map, with no data where the scene has none; counted',
    ),
    42: (
        'a prediction is killed in its middle',
        'the same command resumes from the finished rows, to the same bytes',
    ),
}

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "Small models are faster so, and a process of one thread may be forked"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "A model directory of an untrained network whose scores spread"
    return untrained_model(tmp_path_factory.mktemp('model')/'model')

def scene(path, height, width, *holes):
    "Write a scene of noise with rectangles without data (top, bottom, left, right); its path, and where it holds data"
    image = noise(height, width)
    for top, bottom, left, right in holes:
        image[:, top:bottom, left:right] = 0
    write_scene(path, image)
    return path, image.any(0)

def parts_folder(out):
    "Where the finished rows of a map are"
    return out.with_name(f'{out.name}.parts')

def finished(out):
    "The files of finished rows"
    return list(parts_folder(out).glob('0*'))

# ---------------------------------------------------------------- 40: models

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run folder that is never changed"
    return run(tmp_path_factory.mktemp('whole'))

@pytest.fixture
def folder(whole, tmp_path):
    "A copy of the run, to be damaged"
    root = whole.parents[2]
    return shutil.copytree(root, tmp_path/'runs')/whole.relative_to(root)

def change_weights(folder, change):
    "Other weights, and a list of digests that agrees"
    path = folder/'model'/'model.safetensors'
    weights = load_file(path)
    change(weights)
    path.write_bytes(save(weights))
    seal_model(folder/'model')

def change_statistics(folder, **fields):
    "Other statistics, and a list of digests that agrees"
    change_json(folder/'model'/'normalization_stats.json', **fields)
    seal_model(folder/'model')

@pytest.fixture
def refused(folder, tmp_path, capsys):
    "Evaluation and prediction exit with code 2 and a message that names file and field; nothing is written or opened"
    path, _ = scene(tmp_path/'scene.tif', 70, 70)
    commands = [
        (rtsseg_evaluate, dict(run=str(folder), split='test')),
        (rtsseg_predict, dict(model=str(folder/'model'), scene=str(path), out=str(tmp_path/'map.tif'))),
    ]

    def check(why):
        for command, given in commands:
            with guard(), pytest.raises(SystemExit) as error:
                command(**given)
            printed = capsys.readouterr()
            assert error.value.code == 2
            assert printed.err.startswith('error: ')
            assert re.search(why, printed.err), printed.err
            assert not printed.out

    return check

def test_40_a_missing_weight(folder, refused):
    "Weights of another architecture, or cut by hand, are not filled up with random ones"
    change_weights(folder, lambda weights: weights.pop('segmentation_head.0.bias'))
    refused(r"model.safetensors does not fit config.yaml: 1 weights missing \['segmentation_head.0.bias'\], 0 extra")

def test_40_an_extra_weight(folder, refused):
    "A weight that the config does not build is not silently ignored"
    change_weights(folder, lambda weights: weights.update(more=torch.zeros(2)))
    refused(r"model.safetensors does not fit config.yaml: 0 weights missing \[\], 1 extra \['more'\]")

@pytest.mark.parametrize('sealed, why', [
    (False, ' is missing, and SHA256SUMS lists it'),
    (True, ' is missing: the model cannot be used without it'),
])
def test_40_without_statistics(folder, refused, sealed, why):
    "A model without the statistics of its training data would give wrong maps without an error"
    (folder/'model'/'normalization_stats.json').unlink()
    if sealed:
        seal_model(folder/'model')
    refused(f'normalization_stats.json{why}')

def test_40_a_standard_deviation_of_zero(folder, refused):
    "It is never a divisor"
    change_statistics(folder, std=[.1, 0., .1])
    refused('normalization_stats.json: .*standard deviation of 0')

@pytest.mark.parametrize('number', [float('nan'), float('inf')])
def test_40_weights_that_are_not_finite(folder, refused, number):
    "One such weight makes every map empty"
    name = 'decoder.blocks.0.conv1.0.weight'

    def change(weights):
        weights[name][0, 0, 0, 0] = number

    change_weights(folder, change)
    refused(rf"model.safetensors holds numbers that are not finite: \['{name}'\]")

@pytest.mark.parametrize('fields', [
    dict(channels=['B', 'G', 'R']),
    dict(channels=['R', 'G', 'B', 'ndvi'], mean=[.3] * 4, std=[.1] * 4),
    dict(channels=['R', 'G', 'G']),
    dict(channels='RGB'),
])
def test_40_bands_in_another_order(folder, refused, fields):
    "The statistics name the bands, and the config their order: a model that saw others is not used"
    change_statistics(folder, **fields)
    refused('normalization_stats.json.*(bands|channels)')

# ---------------------------------------------------------------- 41: little to see

def check(out, made, valid):
    "Data where the scene has some, the right numbers in both places, and nothing left behind; the pixels"
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    with rasterio.open(out) as dataset:
        found = dataset.read(1)
        assert (dataset.nodata, dataset.crs, dataset.transform) == (NODATA, CRS, GRID)
        decided = json.loads(dataset.tags()['RTSSEG']) | dict(sha256=digest)
    about_scene = {name: made[name] for name in ('scene_name', 'scene_date', 'input', 'findings')}
    assert made == decided | about_scene
    assert about_scene['input']['valid'] == valid.sum()
    assert made == json.loads(out.with_name(f'{out.name}.json').read_text())
    assert not parts_folder(out).exists()
    assert ((found != NODATA) == valid).all()
    rows, columns = (window_starts(side, 64) for side in valid.shape)
    seen = [valid[y:y + 64, x:x + 64].any() for y in rows for x in columns]
    assert (made['pixels'], made['valid']) == (valid.size, valid.sum())
    assert (made['windows'], made['empty']) == (sum(seen), len(seen) - sum(seen))
    return found

@pytest.mark.parametrize('height, width', [(1, 1), (63, 64), (20, 200), (200, 20)])
def test_41_a_scene_smaller_than_a_tile(model, tmp_path, height, width):
    "It is filled up as tiles at the edge of the data are in training; the map has the size of the scene"
    path, valid = scene(tmp_path/'scene.tif', height, width)
    out = tmp_path/'map.tif'
    found = check(out, predict(model, path, out), valid)
    assert found.size == 1 or np.ptp(found) > 5000

@pytest.mark.parametrize('height, width', [(30, 30), (150, 200)])
def test_41_a_scene_without_any_data(model, tmp_path, monkeypatch, height, width):
    "The map holds no data and says so in numbers, and the model is not run at all"
    monkeypatch.setattr(rtsseg.prediction, 'window_logits', None)
    path, valid = scene(tmp_path/'scene.tif', height, width, (0, height, 0, width))
    out = tmp_path/'map.tif'
    made = predict(model, path, out)
    check(out, made, valid)
    assert made['valid'] == made['windows'] == 0

def test_41_a_scene_with_data_in_parts(model, tmp_path):
    """Pixels without data get no value; windows wholly without data are left out and counted; others see the mean
    there, as in training"""
    path, valid = scene(tmp_path/'scene.tif', 250, 310, (0, 250, 0, 130), (100, 101, 200, 300))
    out = tmp_path/'map.tif'
    made = predict(model, path, out)
    found = check(out, made, valid)
    assert made['empty'] >= 15
    assert np.ptp(found[valid]) > 5000

# ---------------------------------------------------------------- 42: cut off

@pytest.fixture
def ready(model, monkeypatch):
    """The model, loaded once: what is killed many times is what follows. And files are not flushed to the disk, which
    matters when the power fails and not when a process does"""
    loaded = load_model(model)
    monkeypatch.setattr(rtsseg.prediction, 'load_model', lambda folder, device: loaded)
    monkeypatch.setattr(os, 'fsync', lambda file: None)
    return model

def remove_maps(folder):
    "Remove map.tif and its note"
    for file in folder.glob('map.tif*'):
        file.unlink()

def test_42_killed_at_every_step_on_disk(ready, tmp_path):
    """Whichever file was opened, renamed or removed last: a file named as a map is complete, and the same command
    ends in the same bytes"""
    path, valid = scene(tmp_path/'scene.tif', 100, 64, (0, 20, 0, 30))
    predict(ready, path, tmp_path/'undisturbed.tif')
    want, out = map_bytes(tmp_path/'undisturbed.tif'), tmp_path/'map.tif'

    def killed(k):
        def prepare():
            never_opened_for_writing(out)()
            killed_at_file_event(k)()
        code = in_child(lambda: predict(ready, path, out), prepare)
        assert code in (0, -signal.SIGKILL)
        return code != 0

    kept = k = 0
    while killed(k := k + 1):
        kept += parts_folder(out).exists()
        if out.exists():
            assert out.read_bytes() == want[0]
        check(out, predict(ready, path, out), valid)
        assert map_bytes(out) == want
        remove_maps(tmp_path)
    assert k > 40
    assert kept > 20

def test_42_killed_at_random_points(ready, tmp_path):
    "Again and again, until it finishes; a point is a call of a function, so the speed of the machine does not matter"
    path, valid = scene(tmp_path/'scene.tif', 500, 300, (0, 90, 0, 200))
    calls = count_calls(lambda: predict(ready, path, tmp_path/'undisturbed.tif'))
    out, dice = tmp_path/'map.tif', random.Random(0)
    kills = int(os.environ.get('RTSSEG_KILLS', 12))
    killed = 0
    while killed < kills:
        while killed < kills and in_child(lambda: predict(ready, path, out), killed_at_call(dice.randrange(calls))):
            killed += 1
        check(out, predict(ready, path, out), valid)
        assert map_bytes(out) == map_bytes(tmp_path/'undisturbed.tif')
        remove_maps(tmp_path)
    note('kills', 'prediction, at any call', killed, kills)

@pytest.mark.parametrize('share', [.1, .5, .9])
def test_42_killed_while_a_file_is_written(ready, tmp_path, share):
    "In the middle of writing the map: it has no name yet, and the same command ends in the same bytes"
    path, valid = scene(tmp_path/'scene.tif', 300, 300)
    predict(ready, path, tmp_path/'undisturbed.tif')
    out = tmp_path/'map.tif'
    size = int(share * (tmp_path/'undisturbed.tif').stat().st_size)
    assert in_child(lambda: predict(ready, path, out), killed_while_writing(size)) == -signal.SIGXFSZ
    assert not out.exists()
    assert finished(out)
    check(out, predict(ready, path, out), valid)
    assert map_bytes(out) == map_bytes(tmp_path/'undisturbed.tif')

def cut_off(model, path, out, monkeypatch, after, **more):
    "Leave a prediction after some rows of windows; the folder of its finished rows"
    write, written = FinishedRows.write, 0

    def stops(self, *args):
        nonlocal written
        if written == after:
            raise KeyboardInterrupt
        write(self, *args)
        written += 1

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FinishedRows, 'write', stops)
        predict(model, path, out, **more)
    return parts_folder(out)

@pytest.fixture
def rows_run(monkeypatch):
    "Counts the rows of windows that are run by some work"
    move_to, tops = WindowRows.move_to, []

    def counting(self, top):
        tops.append(top)
        return move_to(self, top)

    monkeypatch.setattr(WindowRows, 'move_to', counting)

    def count(work):
        tops.clear()
        work()
        return len(tops)

    return count

def test_42_finished_rows_are_not_made_again(model, tmp_path, monkeypatch, rows_run):
    "Of what is finished, only the windows that reach into the rest are run again"
    path, _ = scene(tmp_path/'scene.tif', 64 + 9 * 32, 70)
    assert rows_run(lambda: predict(model, path, tmp_path/'undisturbed.tif')) == 10
    out = tmp_path/'map.tif'
    cut_off(model, path, out, monkeypatch, 7)
    assert len(finished(out)) == 7
    assert not out.exists()
    assert rows_run(lambda: predict(model, path, out)) == 3 + 1
    assert map_bytes(out) == map_bytes(tmp_path/'undisturbed.tif')
    # and a finished map not at all
    assert rows_run(lambda: predict(model, path, out)) == 0

# case: what becomes of the content of a row's file
DAMAGE = {
    'flipped': lambda data: data[:90] + bytes([data[90] ^ 4]) + data[91:],
    'truncated': lambda data: data[:-9],
    'empty': lambda data: b'',
}

@pytest.mark.parametrize('damage', [*DAMAGE, 'swapped'])
def test_42_rows_that_are_damaged(model, tmp_path, monkeypatch, damage, rows_run, capfd):
    "They are reported and made again, and no others: the map is the same bytes"
    path, _ = scene(tmp_path/'scene.tif', 64 + 9 * 32, 70)
    predict(model, path, tmp_path/'undisturbed.tif')
    out = tmp_path/'map.tif'
    parts = cut_off(model, path, out, monkeypatch, 9)
    part = parts/'000004'
    if damage == 'swapped':
        part.write_bytes((parts/'000005').read_bytes())
    else:
        part.write_bytes(DAMAGE[damage](part.read_bytes()))
    capfd.readouterr()
    # the damaged row and the last one, each with the row of windows above it
    assert rows_run(lambda: predict(model, path, out)) == 4
    assert capfd.readouterr().err.count('is damaged or was left by another run') == 1
    assert map_bytes(out) == map_bytes(tmp_path/'undisturbed.tif')

def test_42_rows_whose_settings_are_lost(model, tmp_path, monkeypatch, rows_run, capfd):
    "Each row is still judged by its own hash, and none is made again"
    path, _ = scene(tmp_path/'scene.tif', 64 + 9 * 32, 70)
    predict(model, path, tmp_path/'undisturbed.tif')
    out = tmp_path/'map.tif'
    (cut_off(model, path, out, monkeypatch, 9)/'made.json').unlink()
    capfd.readouterr()
    assert rows_run(lambda: predict(model, path, out)) == 2
    assert 'is damaged' not in capfd.readouterr().err
    assert map_bytes(out) == map_bytes(tmp_path/'undisturbed.tif')

def other_model(model, folder):
    "A copy of a model directory with other statistics"
    copy = shutil.copytree(model, folder)
    path = copy/'normalization_stats.json'
    path.write_text(path.read_text().replace('0.35', '0.36'))
    seal_model(copy)
    return copy

@pytest.mark.parametrize('other', ['model', 'views', 'batch', 'scene'])
def test_42_rows_that_were_begun_otherwise_are_kept(model, tmp_path, monkeypatch, other, rows_run):
    """A command with another setting, or of another model or scene, does not throw finished rows away, also where the
    map exists as it asks for it: it names what differs and is refused; --force starts again"""
    path, _ = scene(tmp_path/'scene.tif', 64 + 4 * 32, 70)
    out = tmp_path/'map.tif'
    mine = dict(model_dir=model, scene=path, out=out)
    changes = dict(
        model=lambda: dict(model_dir=other_model(model, tmp_path/'model')),
        views=lambda: dict(views='minimal'),
        batch=lambda: dict(batch=3),
        scene=lambda: dict(scene=scene(tmp_path/'other.tif', 64 + 9 * 32, 64)[0]),
    )
    theirs = mine | changes[other]()
    predict(**mine | dict(out=tmp_path/'undisturbed.tif'))
    predict(**theirs)
    their_map = map_bytes(out)
    parts = cut_off(model, path, out, monkeypatch, 3, force=True)
    before = {file: file.read_bytes() for file in parts.iterdir()}
    assert len(finished(out)) == 3
    why = fr'map.tif.parts holds finished rows of a map that was begun with other settings \({other}\)'
    with pytest.raises(DataError, match=why):
        predict(**theirs)
    assert {file: file.read_bytes() for file in parts.iterdir()} == before
    assert map_bytes(out) == their_map
    # mine resumes from them
    assert rows_run(lambda: predict(**mine, force=True)) == 5 - 3 + 1
    assert map_bytes(out) == map_bytes(tmp_path/'undisturbed.tif')
    # theirs starts again if it is forced
    new = tmp_path/'new.tif'
    cut_off(model, path, new, monkeypatch, 3)
    predict(**theirs | dict(out=new, force=True))
    assert map_bytes(new) == their_map

@pytest.mark.parametrize('name', ['000001', 'made.json', 'whole.tif'])
def test_42_no_row_is_waited_for(ready, tmp_path, monkeypatch, name):
    "A pipe in the place of a finished row, or of another file in the folder"
    path, _ = scene(tmp_path/'scene.tif', 200, 70)
    out = tmp_path/'map.tif'
    pipe = cut_off(ready, path, out, monkeypatch, 3)/name
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    with in_time():
        if name == '000001':
            with pytest.raises(FileError, match='000001 is .*regular file'):
                predict(ready, path, out)
            return
        predict(ready, path, tmp_path/'undisturbed.tif')
        predict(ready, path, out)
    assert map_bytes(out) == map_bytes(tmp_path/'undisturbed.tif')

@pytest.mark.parametrize('damage', ['cut off', 'flipped', 'its note is lost'])
def test_42_a_finished_map_that_was_damaged(model, tmp_path, damage, capfd):
    "It is not taken for finished: it is made again, to the same bytes"
    path, _ = scene(tmp_path/'scene.tif', 100, 70)
    out = tmp_path/'map.tif'
    predict(model, path, out)
    good = map_bytes(out)
    capfd.readouterr()
    predict(model, path, out)
    assert 'exists already' in capfd.readouterr().err
    assert map_bytes(out) == good
    content = good[0]
    if damage == 'its note is lost':
        out.with_name('map.tif.json').unlink()
    elif damage == 'cut off':
        out.write_bytes(content[:-50])
    else:
        out.write_bytes(content[:-50] + bytes([content[-50] ^ 1]) + content[-49:])
    predict(model, path, out)
    assert 'the map is made again' in capfd.readouterr().err
    assert map_bytes(out) == good

def test_42_a_map_of_other_settings_is_kept(model, tmp_path):
    """Another scene, model or setting is refused while the old map exists, and the message names what differs; --force
    replaces it"""
    path, _ = scene(tmp_path/'scene.tif', 70, 70)
    other, _ = scene(tmp_path/'other.tif', 70, 71)
    out = tmp_path/'map.tif'
    predict(model, path, out)
    old = map_bytes(out)
    with pytest.raises(DataError, match=r'map.tif exists and was made with other settings \(scene\)'):
        predict(model, other, out)
    with pytest.raises(DataError, match=r'made with other settings \(views\)'):
        predict(model, path, out, views='minimal')
    assert map_bytes(out) == old
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {'scene.tif', 'other.tif', 'map.tif', 'map.tif.json', 'map.qml'}
    assert predict(model, other, out, force=True)['pixels'] == 70 * 71
    assert map_bytes(out) != old

def test_42_a_raster_of_others_is_kept(model, tmp_path):
    "A file that this library did not make is not replaced"
    path, _ = scene(tmp_path/'scene.tif', 70, 70)
    mine, _ = scene(tmp_path/'mine.tif', 9, 9)
    before = mine.read_bytes()
    with pytest.raises(DataError, match='not made by this library'):
        predict(model, path, mine)
    assert mine.read_bytes() == before

@pytest.mark.usefixtures('default_signals')
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_42_asked_to_stop(model, tmp_path, capsys, monkeypatch, number):
    "A signal ends the command after the current batch of windows, with exit code 3, and the same command resumes"
    path, _ = scene(tmp_path/'scene.tif', 300, 100)
    out = tmp_path/'map.tif'
    predict(model, path, tmp_path/'undisturbed.tif')
    write, given = FinishedRows.write, dict(model=str(model), scene=str(path), out=str(out))

    def ask_at_the_second(self, i, *args):
        write(self, i, *args)
        if i == 1:
            os.kill(os.getpid(), number)

    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as error:
        patch.setattr(FinishedRows, 'write', ask_at_the_second)
        rtsseg_predict(**given)
    printed = capsys.readouterr().err
    assert error.value.code == 3
    assert 'stopped; the same command resumes' in printed
    assert 'Traceback' not in printed
    assert not out.exists()
    # the third row may have been done when the signal came
    assert len(finished(out)) in (2, 3)
    rtsseg_predict(**given)
    done = capsys.readouterr()
    assert 'rows of windows are done already' in done.err
    assert map_bytes(out) == map_bytes(tmp_path/'undisturbed.tif')
    note = json.loads(map_bytes(out)[1])
    assert f"{out}: {note['valid']} of {note['pixels']} pixels have data" in done.out

def test_42_wrong_arguments_are_named_together(model, tmp_path, capsys):
    "Exit code 2, and every argument that is wrong"
    path, _ = scene(tmp_path/'scene.tif', 70, 70)
    with pytest.raises(SystemExit) as error:
        rtsseg_predict(model=str(model), scene=str(path), out=str(tmp_path/'map.tif'), views='all', batch=0)
    assert error.value.code == 2
    assert re.match("error: views: 'all' is not one of .*\nbatch: 0", capsys.readouterr().err)

def test_42_a_scene_with_a_damaged_block(model, tmp_path):
    "The message names the block; rows that were finished before it are kept, and exit code 3 says so"
    path, _ = scene(tmp_path/'scene.tif', 400, 70)
    damage_block(path, .7)
    out = tmp_path/'map.tif'
    why = r'rows \d+ to \d+: image .*scene.tif, band 1: IReadBlock failed at X offset 0, Y offset \d+.*rows are kept'
    with pytest.raises(RunError, match=why) as error:
        predict(model, path, out)
    assert error.value.code == 3
    assert not out.exists()
    assert len(finished(out)) > 3

def test_42_a_scene_whose_first_block_is_damaged(model, tmp_path):
    "Nothing was finished: exit code 2, and nothing is left beside the map"
    path, _ = scene(tmp_path/'scene.tif', 400, 70)
    damage_block(path, .1)
    out = tmp_path/'map.tif'
    with pytest.raises(DataError, match='IReadBlock failed at X offset 0, Y offset 0') as error:
        predict(model, path, out)
    assert error.value.code == 2
    assert [file.name for file in tmp_path.iterdir()] == ['scene.tif']

def damage_block(path, share):
    "Overwrite some bytes of a file with zeros, at a share of its length"
    content = bytearray(path.read_bytes())
    at = int(len(content) * share)
    content[at:at + 400] = bytes(400)
    path.write_bytes(content)

@pytest.mark.parametrize('crs, kind', [
    ('LOCAL_CS["plot",UNIT["metre",1],AXIS["x",EAST],AXIS["y",NORTH]]', 'Engineering CRS'),
    ('EPSG:26910+5703', 'Compound CRS'),
    ('EPSG:4979', 'Geographic 3D CRS'),
])
@pytest.mark.parametrize('given', ['', 'none'])
def test_42_a_scene_whose_crs_is_not_that_of_a_map(model, tmp_path, crs, kind, given):
    "As a tile, it is refused by the name of its file, whatever --crs says; nothing is written"
    path = write_scene(tmp_path/'scene.tif', noise(70, 70), crs=crs)
    with pytest.raises(DataError, match=f"crs: scene.tif: .* is not a map's .*{kind}.*gdalwarp"):
        predict(model, path, tmp_path/'map.tif', crs=given)
    assert [file.name for file in tmp_path.iterdir()] == ['scene.tif']

def test_42_a_map_of_many_windows_says_how_long_it_takes(model, tmp_path, monkeypatch, caplog):
    "Before the first window, and again less for what is left; a short map says nothing of it"
    path, _ = scene(tmp_path/'scene.tif', 200, 200)
    with caplog.at_level('INFO'):
        predict(model, path, tmp_path/'short.tif')
        assert 'by the speed of one batch' not in caplog.text
        monkeypatch.setattr(rtsseg.prediction, 'MANY_WINDOWS', 30)
        predict(model, path, tmp_path/'long.tif')
    assert '36 windows of 64 × 64 pixels: about ' in caplog.text

@pytest.mark.parametrize('share', [.3, .6, .9, .999])
def test_42_a_full_disk_under_the_map(model, tmp_path, share):
    """The rows are finished, and the map does not fit beside them: no map, and the same command makes it when there is
    room"""
    path, valid = scene(tmp_path/'scene.tif', 300, 300)
    predict(model, path, tmp_path/'undisturbed.tif')
    out = tmp_path/'map.tif'
    size = int(share * (tmp_path/'undisturbed.tif').stat().st_size)
    assert in_child(lambda: predict(model, path, out), full_disk(size)) == 3
    assert not out.exists()
    assert len(finished(out)) == len(window_starts(300, 64))
    check(out, predict(model, path, out), valid)
    assert map_bytes(out) == map_bytes(tmp_path/'undisturbed.tif')

@pytest.mark.parametrize('n', range(8))
def test_42_a_full_disk(model, tmp_path, monkeypatch, n):
    "A disk that is full at the n-th file: no map, and finished rows from which the same command resumes"
    path, valid = scene(tmp_path/'scene.tif', 200, 70)
    predict(model, path, tmp_path/'undisturbed.tif')
    out, write, written = tmp_path/'map.tif', rtsseg.files.atomic_file, 0

    @contextmanager
    def full(path):
        nonlocal written
        if written == n:
            raise OSError(28, 'No space left on device')
        with write(path) as file:
            yield file
        written += 1

    with monkeypatch.context() as patch:
        # of finished rows, and of whole files
        for module in (rtsseg.prediction, rtsseg.files):
            patch.setattr(module, 'atomic_file', full)
        with pytest.raises(RunError, match='No space left on device.*the same command resumes') as error:
            predict(model, path, out)
    assert error.value.code == 3
    # the last of the files is the note beside the map
    assert out.exists() == (n == 7)
    assert parts_folder(out).exists() == (n > 0)
    check(out, predict(model, path, out), valid)
    assert map_bytes(out) == map_bytes(tmp_path/'undisturbed.tif')
