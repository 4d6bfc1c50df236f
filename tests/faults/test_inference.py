"Faults 40 to 42: models that are not whole, scenes that hold little, predictions that are cut off"
import hashlib, json, os, random, re, resource, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, pytest, rasterio, torch
from rasterio.transform import from_origin
from safetensors.torch import load_file, save

import rtsseg.prediction
from rtsseg.cli import rtsseg_evaluate, rtsseg_predict
from rtsseg.config import RtsConfig
from rtsseg.console import DataError
from rtsseg.raster import write_raster
from rtsseg.stats import Stats
from rtsseg.files import FileError, seal_model
from rtsseg.infer import load_model, save_model
from rtsseg.models import build
from rtsseg.prediction import NODATA, Stopped, predict, starts
from helpers.runs import guard, in_time, run

FAULTS = {40: ('a model directory with a missing or an extra weight, without normalization_stats.json, with a standard deviation of 0, weights that are no numbers, or bands in another order', 'refused'),
          41: ('a scene that is smaller than a tile, holds no data at all, or holds it in parts', 'a valid map, with no data where the scene has none; counted'),
          42: ('a prediction is killed in its middle', 'the same command goes on from the rows that are finished, to the same bytes')}

# ---------------------------------------------------------------- 40: models
@pytest.fixture(scope='module')
def whole(tmp_path_factory): return run(tmp_path_factory.mktemp('whole'))

@pytest.fixture
def folder(whole, tmp_path):
    "A copy of the run, to be damaged"
    return shutil.copytree(whole.parents[2], tmp_path/'runs')/whole.relative_to(whole.parents[2])

def weights(folder, change):
    "Other weights, and a list of digests that agrees"
    path = folder/'model'/'model.safetensors'; found = load_file(path); change(found); path.write_bytes(save(found)); seal_model(folder/'model')

def stats(folder, **change):
    path = folder/'model'/'normalization_stats.json'; path.write_text(json.dumps(json.loads(path.read_text()) | change)); seal_model(folder/'model')

@pytest.fixture
def refused(folder, tmp_path, capsys):
    "By evaluation and by prediction: exit code 2, a message that names file and field, nothing written, no socket opened"
    path, _ = scene(tmp_path/'scene.tif', 70, 70); out = tmp_path/'map.tif'
    def check(why):
        for command, given in ((rtsseg_evaluate, dict(run=str(folder), split='test')), (rtsseg_predict, dict(model=str(folder/'model'), scene=str(path), out=str(out)))):
            with guard(), pytest.raises(SystemExit) as left: command(**given)
            said = capsys.readouterr(); assert left.value.code == 2 and said.err.startswith('error: ') and not said.out and re.search(why, said.err), said.err
    return check

def test_40_a_missing_weight(folder, refused):
    "Weights of another architecture, or cut by hand, are not filled up with random ones"
    weights(folder, lambda w: w.pop('segmentation_head.0.bias')); refused(r"model.safetensors does not fit config.yaml: 1 weights missing \['segmentation_head.0.bias'\], 0 extra")

def test_40_an_extra_weight(folder, refused):
    "What the config does not build is not left aside in silence"
    weights(folder, lambda w: w.update(more=torch.zeros(2))); refused(r"model.safetensors does not fit config.yaml: 0 weights missing \[\], 1 extra \['more'\]")

@pytest.mark.parametrize('sealed, why', [(False, ' is missing, and SHA256SUMS lists it'), (True, ' is missing: the model cannot be used without it')])
def test_40_without_statistics(folder, refused, sealed, why):
    "A model without the statistics of its training data would give quietly wrong maps"
    (folder/'model'/'normalization_stats.json').unlink()
    if sealed: seal_model(folder/'model')
    refused(f'normalization_stats.json{why}')

def test_40_a_standard_deviation_of_zero(folder, refused):
    "Nothing is divided by 0"
    stats(folder, std=[.1, 0., .1]); refused('normalization_stats.json: .*standard deviation of 0')

@pytest.mark.parametrize('number', [float('nan'), float('inf')])
def test_40_weights_that_are_no_numbers(folder, refused, number):
    "One of them makes every map empty"
    def change(w): w['decoder.blocks.0.conv1.0.weight'][0, 0, 0, 0] = number
    weights(folder, change); refused(r"model.safetensors holds numbers that are not finite: \['decoder.blocks.0.conv1.0.weight'\]")

@pytest.mark.parametrize('bands', [['B', 'G', 'R'], ['R', 'G', 'B', 'ndvi'], ['R', 'G', 'G'], 'RGB'])
def test_40_bands_in_another_order(folder, refused, bands):
    "The statistics say which bands there are, and the config in which order: a model that saw others is not used"
    stats(folder, channels=bands, **({} if len(bands) == 3 else dict(mean=[.3] * 4, std=[.1] * 4))); refused('normalization_stats.json.*(bands|channels)')

GRID, CRS = from_origin(-2_500_000, 700_000, 3, 3), 'EPSG:3413'

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "Toys are faster so, and a process of one thread may be forked"
    before = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(before)

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "A model directory of an untrained network whose scores spread"
    torch.manual_seed(0)
    cfg = RtsConfig(batch_size=8, data=dict(tile_size=64), model=dict(architecture='unet', encoder='tu-test_efficientnet', weights=None, options=dict(decoder_channels=[16, 8, 8, 8, 8])))
    net = build(cfg.model); stats = Stats(channels=['R', 'G', 'B'], dtype='uint8', scale=255., mean=[.4, .35, .3], std=[.2, .2, .2], pixels=1, manifest_hash='none')
    with torch.no_grad(): net.segmentation_head[0].weight *= 30
    return save_model(tmp_path_factory.mktemp('model')/'model', net, cfg, stats, dict(epoch=1, value=0., metrics={}), {})

def scene(path, h, w, *holes):
    "A scene of noise with rectangles without data: (top, bottom, left, right)"
    image = np.random.default_rng(0).integers(1, 256, (3, h, w), 'uint8')
    for top, bottom, left, right in holes: image[:, top:bottom, left:right] = 0
    write_raster(path, image, GRID, CRS, nodata=0)
    return path, image.any(0)

def check(out, told, valid):
    "Data where the scene has some, the right numbers in both places, and nothing left behind"
    with rasterio.open(out) as ds: found = ds.read(1); assert ds.nodata == NODATA and ds.crs == CRS and ds.transform == GRID and told == json.loads(ds.tags()['RTSSEG']) | dict(sha256=hashlib.sha256(out.read_bytes()).hexdigest())
    assert ((found != NODATA) == valid).all() and told == json.loads(out.with_name(f'{out.name}.json').read_text()) and not out.with_name(f'{out.name}.parts').exists()
    seen = [valid[y:y + 64, x:x + 64].any() for y in starts(valid.shape[0], 64) for x in starts(valid.shape[1], 64)]
    assert {k: told[k] for k in ('pixels', 'valid', 'windows', 'empty')} == dict(pixels=valid.size, valid=valid.sum(), windows=sum(seen), empty=len(seen) - sum(seen))
    return found

# ---------------------------------------------------------------- 41: little to see
@pytest.mark.parametrize('h, w', [(1, 1), (63, 64), (20, 200), (200, 20)])
def test_41_a_scene_smaller_than_a_tile(model, tmp_path, h, w):
    "It is filled up as tiles at the edge of the data are in training; the map has the size of the scene"
    path, valid = scene(tmp_path/'scene.tif', h, w); found = check(tmp_path/'map.tif', predict(model, path, tmp_path/'map.tif'), valid)
    assert h * w == 1 or np.ptp(found) > 5000

@pytest.mark.parametrize('h, w', [(30, 30), (150, 200)])
def test_41_a_scene_without_any_data(model, tmp_path, monkeypatch, h, w):
    "The map holds no data, says so in numbers, and the model is not asked at all"
    monkeypatch.setattr(rtsseg.prediction, '_probabilities', None)
    path, valid = scene(tmp_path/'scene.tif', h, w, (0, h, 0, w)); told = predict(model, path, tmp_path/'map.tif')
    check(tmp_path/'map.tif', told, valid); assert told['valid'] == told['windows'] == 0

def test_41_a_scene_with_data_in_parts(model, tmp_path):
    "Nothing is told of pixels without data; windows wholly without it are skipped and counted; others see the mean there, as in training"
    path, valid = scene(tmp_path/'scene.tif', 250, 310, (0, 250, 0, 130), (100, 101, 200, 300)); told = predict(model, path, tmp_path/'map.tif')
    found = check(tmp_path/'map.tif', told, valid); assert told['empty'] >= 15 and np.ptp(found[valid]) > 5000

# ---------------------------------------------------------------- 42: cut off
@pytest.fixture
def ready(model, monkeypatch):
    "The model, loaded once: what is killed many times is what comes after. And nothing is pressed onto the disk, which matters when the power fails and not when a process does"
    loaded = load_model(model); monkeypatch.setattr(rtsseg.prediction, 'load_model', lambda folder, device: loaded); monkeypatch.setattr(os, 'fsync', lambda file: None)
    return model

class Kill:
    "In a forked process: do the work, and be killed at the k-th file that is opened, renamed or removed once it has begun to write, or after some seconds; the map itself is never opened for writing"
    def __init__(self, work, out): self.work, self.out = work, str(out)
    def __call__(self, k=None, seconds=None):
        "Whether it was killed"
        if not (child := os.fork()):
            null = os.open(os.devnull, os.O_WRONLY); os.dup2(null, 1); os.dup2(null, 2); seen = [0]
            def event(name, args):
                if name == 'open' and str(args[0]) == self.out and args[2] & (os.O_WRONLY | os.O_RDWR): os._exit(1)
                if name == 'os.mkdir' or seen[0] and name in ('open', 'os.rename', 'os.remove', 'os.rmdir', 'shutil.rmtree'):
                    seen[0] += 1
                    if seen[0] == k: os.kill(os.getpid(), signal.SIGKILL)
            if k: sys.addaudithook(event)
            try: self.work()
            except BaseException: os._exit(1)
            os._exit(0)
        if seconds is not None: time.sleep(seconds); os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]); assert code in (0, -signal.SIGKILL), code
        return code != 0

def files(out): return [f.read_bytes() for f in (out, out.with_name(f'{out.name}.json'))]

def test_42_killed_at_every_step_on_disk(ready, tmp_path):
    "Whichever file is opened, renamed or removed last: what is called a map is one, and the same command ends in the same bytes"
    path, valid = scene(tmp_path/'scene.tif', 100, 64, (0, 20, 0, 30)); predict(ready, path, tmp_path/'undisturbed.tif'); want, out = files(tmp_path/'undisturbed.tif'), tmp_path/'map.tif'
    kill, kept = Kill(lambda: predict(ready, path, out), out), 0
    for k in range(1, 1000):
        if not kill(k): break
        kept += out.with_name('map.tif.parts').exists()
        if out.exists(): assert out.read_bytes() == want[0]
        check(out, predict(ready, path, out), valid); assert files(out) == want
        for f in tmp_path.glob('map.tif*'): f.unlink()
    assert k > 40 and kept > 20

def test_42_killed_at_random_points(ready, tmp_path):
    "Again and again, until it is through"
    model = ready; path, valid = scene(tmp_path/'scene.tif', 500, 300, (0, 90, 0, 200)); predict(model, path, tmp_path/'undisturbed.tif'); begun = time.monotonic(); predict(model, path, tmp_path/'again.tif'); whole = time.monotonic() - begun
    out, dice, kills, killed = tmp_path/'map.tif', random.Random(0), int(os.environ.get('RTSSEG_KILLS', 12)), 0; kill = Kill(lambda: predict(model, path, out), out)
    while killed < kills:
        while kill(seconds=dice.uniform(.05, .7) * whole if killed < kills else None): killed += 1
        check(out, predict(model, path, out), valid); assert files(out) == files(tmp_path/'undisturbed.tif')
        for f in tmp_path.glob('map.tif*'): f.unlink()

def finished(parts): return list(parts.glob('0*'))

def cut_off(model, path, out, monkeypatch, after, **more):
    "Leave a prediction after some rows of windows"
    real, put = rtsseg.prediction._Parts.put, []
    def stops(self, *args):
        if len(put) == after: raise KeyboardInterrupt
        put.append(real(self, *args))
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt): m.setattr(rtsseg.prediction._Parts, 'put', stops); predict(model, path, out, **more)
    return out.with_name(f'{out.name}.parts')

@pytest.fixture
def rows(monkeypatch):
    "How many rows of windows were run"
    real, run = rtsseg.prediction._Scene.band, []
    monkeypatch.setattr(rtsseg.prediction._Scene, 'band', lambda self, top: run.append(top) or real(self, top))
    def count(work): run.clear(); work(); return len(run) - 1      # one is read when a scene is opened
    return count

def test_42_finished_rows_are_not_made_again(model, tmp_path, monkeypatch, rows):
    "Of what is finished, only the windows that reach into the rest are run again"
    path, _ = scene(tmp_path/'scene.tif', 64 + 9 * 32, 70); assert rows(lambda: predict(model, path, tmp_path/'undisturbed.tif')) == 10; out = tmp_path/'map.tif'
    assert len(finished(cut_off(model, path, out, monkeypatch, 7))) == 7 and not out.exists()
    assert rows(lambda: predict(model, path, out)) == 3 + 1 and files(out) == files(tmp_path/'undisturbed.tif')
    assert rows(lambda: predict(model, path, out)) == 0      # and a finished map not at all

@pytest.mark.parametrize('damage', ['flipped', 'truncated', 'empty', 'swapped', 'the note of the settings is lost'])
def test_42_rows_that_are_damaged(model, tmp_path, monkeypatch, damage, rows, capfd):
    "They are told, and made again, and no others: the map is the same bytes"
    path, _ = scene(tmp_path/'scene.tif', 64 + 9 * 32, 70); predict(model, path, tmp_path/'undisturbed.tif'); out = tmp_path/'map.tif'
    parts = cut_off(model, path, out, monkeypatch, 10 - 1); part = parts/'000004'; data = part.read_bytes(); lost = 'note' in damage
    if lost: (parts/'made.json').unlink()
    elif damage == 'swapped': part.write_bytes((parts/'000005').read_bytes())
    else: part.write_bytes(dict(flipped=data[:90] + bytes([data[90] ^ 4]) + data[91:], truncated=data[:-9], empty=b'')[damage])
    capfd.readouterr(); made = rows(lambda: predict(model, path, out)); said = capfd.readouterr().err
    assert files(out) == files(tmp_path/'undisturbed.tif') and said.count('is damaged or was left by another run') == (0 if lost else 1) and made == (2 if lost else 4)

@pytest.mark.parametrize('other', ['model', 'views', 'batch', 'scene'])
def test_42_rows_that_were_begun_otherwise_are_kept(model, tmp_path, monkeypatch, other, rows):
    "A command with another setting, or of another model or scene, does not throw finished rows away, also where the map is there as it asks for it: it names what differs and is refused; --force begins anew"
    path, _ = scene(tmp_path/'scene.tif', 64 + 4 * 32, 70); out = tmp_path/'map.tif'; mine = dict(model_dir=model, scene=path, out=out); theirs = dict(mine)
    if other == 'model':
        theirs['model_dir'] = at = shutil.copytree(model, tmp_path/'model'); text = (at/'normalization_stats.json').read_text(); (at/'normalization_stats.json').write_text(text.replace('0.35', '0.36')); seal_model(at)
    else: theirs[other] = dict(views='minimal', batch=3, scene=scene(tmp_path/'other.tif', 64 + 9 * 32, 64)[0])[other]
    predict(**mine | dict(out=tmp_path/'undisturbed.tif')); predict(**theirs); held = files(out)
    parts = cut_off(model, path, out, monkeypatch, 3, force=True); before = {f: f.read_bytes() for f in parts.iterdir()}; assert len(finished(parts)) == 3
    with pytest.raises(DataError, match=fr'map.tif.parts holds finished rows of a map that was begun otherwise \({other}\)'): predict(**theirs)
    assert {f: f.read_bytes() for f in parts.iterdir()} == before and files(out) == held
    assert rows(lambda: predict(**mine, force=True)) == 5 - 3 + 1 and files(out) == files(tmp_path/'undisturbed.tif')
    cut_off(model, path, tmp_path/'new.tif', monkeypatch, 3); predict(**theirs | dict(out=tmp_path/'new.tif', force=True)); assert files(tmp_path/'new.tif') == held

@pytest.mark.parametrize('name', ['000001', 'made.json', 'whole.tif'])
def test_42_no_row_is_waited_for(ready, tmp_path, monkeypatch, name):
    "A pipe in the place of a finished row, or of the note beside it"
    path, _ = scene(tmp_path/'scene.tif', 200, 70); out = tmp_path/'map.tif'; part = cut_off(ready, path, out, monkeypatch, 3)/name; part.unlink(missing_ok=True); os.mkfifo(part)
    with in_time():
        if name == '000001':
            with pytest.raises(FileError, match='000001 is no regular file'): predict(ready, path, out)
        else: predict(ready, path, tmp_path/'undisturbed.tif'); predict(ready, path, out); assert files(out) == files(tmp_path/'undisturbed.tif')

@pytest.mark.parametrize('damage', ['cut off', 'flipped', 'its note is lost'])
def test_42_a_finished_map_that_was_damaged(model, tmp_path, damage, capfd):
    "It is not taken for done: it is made again, to the same bytes"
    path, _ = scene(tmp_path/'scene.tif', 100, 70); out = tmp_path/'map.tif'; predict(model, path, out); good = files(out); capfd.readouterr()
    predict(model, path, out); assert 'is there already' in capfd.readouterr().err and files(out) == good
    if damage == 'its note is lost': out.with_name('map.tif.json').unlink()
    else: out.write_bytes(good[0][:-50] if damage == 'cut off' else good[0][:-50] + bytes([good[0][-50] ^ 1]) + good[0][-49:])
    predict(model, path, out); assert 'the map is made again' in capfd.readouterr().err and files(out) == good

def test_42_a_map_of_other_settings_is_kept(model, tmp_path):
    "Another scene, model or setting is refused while the old map stands there, and names what differs; --force replaces it"
    path, _ = scene(tmp_path/'scene.tif', 70, 70); other, _ = scene(tmp_path/'other.tif', 70, 71); out = tmp_path/'map.tif'; predict(model, path, out); old = files(out)
    with pytest.raises(DataError, match=r'map.tif is there and was made otherwise \(scene\)'): predict(model, other, out)
    with pytest.raises(DataError, match=r'made otherwise \(views\)'): predict(model, path, out, views='minimal')
    assert files(out) == old and len(list(tmp_path.iterdir())) == 4
    assert predict(model, other, out, force=True)['pixels'] == 70 * 71 and files(out) != old
    mine, _ = scene(tmp_path/'mine.tif', 9, 9); held = mine.read_bytes()
    with pytest.raises(DataError, match='not by this library'): predict(model, path, mine)
    assert mine.read_bytes() == held

def test_42_asked_to_stop(model, tmp_path, capsys):
    "SIGTERM ends the command after the windows in hand, with exit code 3; the same command goes on. Wrong settings end it with 2, all of them named"
    path, _ = scene(tmp_path/'scene.tif', 1500, 300); out = tmp_path/'map.tif'; predict(model, path, tmp_path/'undisturbed.tif'); given = dict(model=str(model), scene=str(path), out=str(out))
    call = [Path(sys.executable).parent/'rtsseg-predict', *(x for k, v in given.items() for x in (f'--{k}', v))]; env = os.environ | dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')      # another number of threads gives other last digits
    with subprocess.Popen(call, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        until = time.monotonic() + 200
        while p.poll() is None and time.monotonic() < until and not (tmp_path/'map.tif.parts'/'000001').exists(): time.sleep(.005)
        p.terminate(); said = p.communicate(timeout=60)
    assert p.returncode == 3 and 'stopped; the same command goes on' in said[1] and 'Traceback' not in said[1] and not out.exists() and len(finished(tmp_path/'map.tif.parts')) >= 2
    capsys.readouterr(); rtsseg_predict(**given); done = capsys.readouterr()
    assert 'rows of windows are done already' in done.err and files(out) == files(tmp_path/'undisturbed.tif') and json.loads(done.out) == json.loads(files(out)[1])
    with pytest.raises(SystemExit) as left: rtsseg_predict(**given, views='all', batch=0)
    assert left.value.code == 2 and re.match("error: views: 'all' is none of .*\nbatch: 0", capsys.readouterr().err)

def test_42_a_scene_with_a_damaged_block(model, tmp_path):
    "The message names the block; rows that were finished before it are kept"
    path, _ = scene(tmp_path/'scene.tif', 400, 70); data = bytearray(path.read_bytes()); at = int(len(data) * .7); data[at:at + 400] = bytes(400); path.write_bytes(data)
    with pytest.raises(DataError, match=r"rows \d+ to \d+: image .*scene.tif, band 1: IReadBlock failed at X offset 0, Y offset \d+"): predict(model, path, tmp_path/'map.tif')
    assert not (tmp_path/'map.tif').exists() and len(finished(tmp_path/'map.tif.parts')) > 3

def test_42_a_full_disk_under_the_map(model, tmp_path):
    "The rows are finished, and the map does not fit beside them: no map, and the same command makes it once there is room"
    path, valid = scene(tmp_path/'scene.tif', 300, 300); predict(model, path, tmp_path/'undisturbed.tif'); out = tmp_path/'map.tif'; parts = tmp_path/'map.tif.parts'
    for share in (.3, .6, .9, .999):
        if not (child := os.fork()):
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * (tmp_path/'undisturbed.tif').stat().st_size),) * 2); null = os.open(os.devnull, os.O_WRONLY); os.dup2(null, 1); os.dup2(null, 2)
            try: predict(model, path, out)
            except Stopped: os._exit(3)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3 and not out.exists() and len(list(parts.glob('0*'))) == len(starts(300, 64))
    check(out, predict(model, path, out), valid); assert files(out) == files(tmp_path/'undisturbed.tif')

def test_42_a_full_disk(model, tmp_path, monkeypatch):
    "A disk that fills up leaves no map behind, and finished rows that the same command goes on from"
    path, valid = scene(tmp_path/'scene.tif', 200, 70); predict(model, path, tmp_path/'undisturbed.tif'); out = tmp_path/'map.tif'; real = rtsseg.prediction.write_atomic
    for n in range(7):
        wrote = []
        def full(*args):
            if len(wrote) == n: raise OSError(28, 'No space left on device')
            wrote.append(real(*args))
        with monkeypatch.context() as m, pytest.raises(Stopped, match='No space left on device.*the same command goes on'): m.setattr(rtsseg.prediction, 'write_atomic', full); predict(model, path, out)
        assert not out.exists() or n == 6
        for f in tmp_path.glob('map.tif.parts'): assert n > 0
        check(out, predict(model, path, out), valid); assert files(out) == files(tmp_path/'undisturbed.tif')
        for f in tmp_path.glob('map.tif*'): f.unlink()
