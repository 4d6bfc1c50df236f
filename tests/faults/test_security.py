"What is handed over by others: models and runs are data, and nothing in them is executed. Pinned installs are in test_house.py, rasters in test_rasters.py, YAML tags in test_config.py, credentials in test_tracker.py"
import base64, hashlib, html, io, json, os, pickle, re, shutil, struct, subprocess, sys, time, zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save

from helpers import runs as small_run
from rtsseg.cli import rtsseg_calibrate, rtsseg_evaluate, rtsseg_predict, rtsseg_report, rtsseg_track
from rtsseg.calibration import Calibration, calibrate
from rtsseg.config import ConfigError, load
from rtsseg.console import DataError
from rtsseg.raster import write_raster
from rtsseg.evaluation import evaluate
from rtsseg.files import FileError, SEAL, SEALED, seal_model
from rtsseg.infer import ModelError, load_model, predict_logits
from rtsseg.evidence import Evidence, evidence_path
from rtsseg.results import ReportError
from rtsseg.reporting import report, tables
from rtsseg.toy import tiny_toy
from rtsseg.track import deliver, left
from rtsseg.training import force_config, launch, train

FAULTS = {'S1': ('a model directory with a file that was changed, exchanged, added or lost', 'refused, every such file named'),
          'S2': ('weights, statistics or notes of a model that lie: broken tables, other types and shapes, numbers that are none', 'refused'),
          'S3': ('a config.yaml of a model that would build a giant, fetch weights or read other files', 'refused, in time'),
          'S4': ('links out of the folder, pipes and folders in the place of files', 'refused before they are opened'),
          'S5': ('a pickle in the place of weights, scores or evidence', 'refused, nothing is executed'),
          'S6': ('a run folder whose notes or evidence lie', 'refused'),
          'S7': ('a run folder that would have other files written or sent: links, another ledger, a spool with paths and a tracker of its own', 'refused, or kept inside'),
          'S8': ('evidence of other weights than those of the model', 'refused'),
          'S9': ('markup, or signs that steer a terminal, in any text of a run', 'escaped wherever it is shown, and nothing is fetched'),
          'S10': ('any byte of a model or a run flipped, or a file cut anywhere', 'the same result, or an error that names the file')}
KNOWN = ModelError, DataError, ConfigError, ReportError, FileError

@pytest.fixture(scope='module')
def whole(tmp_path_factory): return small_run.run(tmp_path_factory.mktemp('whole'))

@pytest.fixture
def folder(whole, tmp_path): return shutil.copytree(whole.parents[2], tmp_path/'runs')/whole.relative_to(whole.parents[2])

@pytest.fixture
def model(whole, tmp_path): return shutil.copytree(whole/'model', tmp_path/'model')

def refused(model, why, quick=10):
    "A model directory is not loaded, and while that is found out nothing happens elsewhere"
    began = time.monotonic()
    with small_run.guard(), pytest.raises(ModelError, match=why) as e: load_model(model)
    assert time.monotonic() - began < quick, 'it took too long'
    return str(e.value)

def put(model, name, content):
    (model/name).write_bytes(content if isinstance(content, bytes) else content.encode()); seal_model(model, name)

def told(capsys, command, *args, **kw):
    "What a command says when it refuses: exit code 2, and no traceback"
    with pytest.raises(SystemExit) as e: command(*args, **kw)
    said = capsys.readouterr().err; assert e.value.code == 2 and said.startswith('error: ') and 'Traceback' not in said
    return said

def notes(path, **change): path.write_text(json.dumps(json.loads(path.read_text()) | change))

# ---------------------------------------------------------------- the model directory
def test_S1_the_list_is_that_of_sha256sum(model):
    "Another program finds the directory whole, and finds out the same damage"
    check = lambda: subprocess.run(['sha256sum', '--strict', '-c', SEAL], cwd=model, capture_output=True, text=True)
    assert check().returncode == 0 and len((model/SEAL).read_text().splitlines()) == len(SEALED) == len(check().stdout.splitlines())
    (model/'README.md').write_text('mine'); assert check().returncode == 1 and 'README.md: FAILED' in check().stdout
    assert 'README.md is not the file' in refused(model, 'README.md')

def test_S1_every_file_that_was_changed_is_named(model):
    "All in one message"
    (model/'metrics.json').write_text('{}'); (model/'calibration.json').unlink(); (model/'config.yaml').open('a').write('\n')
    said = refused(model, 'metrics.json is not the file that SHA256SUMS lists')
    assert 'config.yaml is not the file' in said and 'calibration.json is missing' in said

def test_S1_a_file_that_was_added(model):
    "A calibration of another model is not taken for its own; what is none of a model's files is not read at all"
    seal_model(model); (model/'evil.pkl').write_bytes(b'x'); load_model(model)
    other = (model/'calibration.json').read_bytes(); (model/'calibration.json').unlink(); seal_model(model); load_model(model)
    (model/'calibration.json').write_bytes(other); refused(model, 'calibration.json is not in SHA256SUMS')

def test_S1_a_directory_without_a_list(model):
    "One of an older version is told how to get one, in a line that can be copied"
    (model/SEAL).unlink(); said = refused(model, 'SHA256SUMS is missing')
    command = re.search(r'python -c (.*)$', said)[1]; done = subprocess.run(f'{sys.executable} -c {command}', shell=True, capture_output=True, text=True); assert done.returncode == 0, done.stderr
    load_model(model)

def test_S1_a_new_calibration_seals_nothing_else(whole, folder):
    "Calibrating again lists the new file, and does not hide that another one was changed"
    (folder/'model'/'config.yaml').open('a').write('\n'); calibrate(folder); said = refused(folder/'model', 'config.yaml is not the file')
    assert 'calibration.json' not in said
    shutil.copy(whole/'model'/'config.yaml', folder/'model'/'config.yaml'); load_model(folder/'model')

def test_S1_a_run_that_was_killed_before_its_list(tmp_path):
    "The list is written last: without it a run is not done, and the same command mends it, to the same bytes"
    cfg = load(overrides=['augment.enabled=false'], name='killed', runs=tmp_path/'runs', device='cpu', epochs=1, batch_size=8, val_frequency=1, freeze_backbone_epochs=0, loader=dict(num_workers=0), tracker=dict(kind='none'), data=dict(manifest=tiny_toy(tmp_path), tile_size=64, split_check='warn'),
               sampler=dict(curriculum=[dict(first=1, last=1, ratio=1)]), model=dict(architecture='unet', encoder='tu-test_efficientnet', weights=None, options=dict(decoder_channels=[16, 8, 8, 8, 8])))
    model = train(cfg)/'model'; before = {f.name: f.read_bytes() for f in model.iterdir()}; (model/SEAL).unlink(); refused(model, 'the command that made it, run again, mends it')
    train(cfg); assert {f.name: f.read_bytes() for f in model.iterdir()} == before; load_model(model)

TABLES = {'longer than the file': (struct.pack('<Q', 1 << 63) + b'{}', 'a table of 9223372036854775808 bytes'), 'of a million weights': (b'', 'a table of'), 'empty': (b'', 'a table of 0 bytes'), 'no JSON': (struct.pack('<Q', 4) + b'{"a"', 'cannot be read'),
          'of UTF-16': (struct.pack('<Q', 6) + '{}'.encode('utf-16'), 'cannot be read'), 'nested deeply': (struct.pack('<Q', 20000) + b'[' * 20000, 'recursion'), 'a list': (struct.pack('<Q', 2) + b'[]', 'no object')}

@pytest.mark.parametrize('kind', TABLES)
def test_S2_a_table_of_weights_that_is_none(model, kind):
    "The table at the head of the weights is read before a single weight is"
    content, why = TABLES[kind]
    if 'million' in kind: table = ('{' + ','.join(f'"w{i}":{{"dtype":"F32","shape":[],"data_offsets":[0,4]}}' for i in range(10**6)) + '}').encode(); content = struct.pack('<Q', len(table)) + table + bytes(4)
    put(model, 'model.safetensors', content); refused(model, why)

def headed(model, change):
    "The weights, behind a table that was changed"
    data = (model/'model.safetensors').read_bytes(); n = int.from_bytes(data[:8], 'little'); table = json.loads(data[8:8 + n]); text = change(table)
    text = (text if isinstance(text, str) else json.dumps(table)).encode(); put(model, 'model.safetensors', struct.pack('<Q', len(text)) + text + data[8 + n:])

def lie(name, **change): return lambda table: table[name].update(change)
B = 'segmentation_head.0.bias'
LIES = {'offsets outside': (lie(B, data_offsets=[1 << 40, (1 << 40) + 4]), 'cannot be read'), 'offsets that overlap': (lie(B, data_offsets=[0, 4]), 'cannot be read'), 'negative offsets': (lie(B, data_offsets=[-4, 0]), 'cannot be read'), 'another type': (lie(B, dtype='F64'), "'F64'"),
        'half precision': (lie(B, dtype='F16', shape=[2]), "'F16'"), 'a giant shape': (lie(B, shape=[1 << 62]), 'another type or shape'), 'an unknown type': (lie(B, dtype='PICKLE'), 'another type or shape'), 'a shape of texts': (lie(B, shape=['1']), f'{B}.shape.0'), 'a further field': (lie(B, code='x'), f'{B}.code'),
        'a name twice': (lambda t: json.dumps(t)[:-1] + f', "{B}": {json.dumps(t[B])}}}', 'stands twice'), 'numbers that are none': (lambda t: json.dumps(t).replace('[1]', '[NaN]'), 'NaN is no number')}

@pytest.mark.parametrize('kind', LIES)
def test_S2_a_table_of_weights_that_lies(model, kind):
    "It has to fit the model that the config builds, name by name, shape by shape, type by type"
    change, why = LIES[kind]; headed(model, change); refused(model, why)

NOTES = {'a text for a number': ('metrics.json', '{"epoch": 1, "step": 1, "value": "0.5", "metrics": {}}', 'metrics.json: value'), 'a further field': ('metrics.json', '{"epoch": 1, "value": 0.5, "metrics": {}, "run": "x"}', 'metrics.json: run'), 'a list': ('metrics.json', '[]', 'no object'),
         'null': ('metrics.json', 'null', 'no object'), 'no best value': ('metrics.json', '{"epoch": 1, "value": NaN, "metrics": {}}', 'metrics.json: value'), 'a number of 5000 digits': ('metrics.json', '{"epoch": %s}' % ('9' * 5000), 'metrics.json cannot be read'),
         'a number of 400 digits': ('metrics.json', '{"epoch": 1, "value": %s, "metrics": {}}' % ('9' * 400), 'metrics.json: value'), 'UTF-16': ('metrics.json', '{}'.encode('utf-16'), 'metrics.json cannot be read'), 'a byte order mark': ('metrics.json', b'\xef\xbb\xbf{}', 'metrics.json cannot be read'),
         'nested deeply': ('metrics.json', '{"a":' * 10**5, 'recursion'), 'no text': ('normalization_stats.json', b'\xff\x00', 'normalization_stats.json cannot be read'), 'statistics in texts': ('normalization_stats.json', dict(mean=['a', 'b', 'c']), 'mean.0'), 'nested statistics': ('normalization_stats.json', dict(std=[.1, [.1], .1]), 'std.1'),
         'a number of bands': ('normalization_stats.json', dict(channels=3), 'channels'), 'a scale of 0': ('normalization_stats.json', dict(scale=0.), 'normalization_stats.json'), 'a mean that single precision cannot hold': ('normalization_stats.json', dict(mean=[.1, 1e300, .1]), 'too large or too small'),
         'a deviation of almost 0': ('normalization_stats.json', dict(std=[.1, 1e-300, .1]), 'too large or too small'), 'a further statistic': ('normalization_stats.json', dict(code='x'), 'code'), 'no YAML': ('config.yaml', b'\xff\xfe\x00', 'config.yaml'), 'an unknown setting': ('config.yaml', 'model: {encodr: resnet18}', "did you mean 'encoder'"),
         'a tag': ('config.yaml', '!!python/object/apply:os.system [id]', 'config.yaml'), 'a list of settings': ('config.yaml', '[1]', 'a mapping was expected'), 'settings nested deeply': ('config.yaml', '[' * 1000, 'config.yaml')}

@pytest.mark.parametrize('kind', NOTES)
def test_S2_notes_of_a_model_that_lie(model, kind):
    "Fields, types and numbers are looked at before they are used"
    name, content, why = NOTES[kind]; put(model, name, json.dumps(json.loads((model/name).read_text()) | content) if isinstance(content, dict) else content); refused(model, why)

CONFIGS = {'a decoder of 10¹¹ weights': (dict(options=dict(decoder_channels=[10**5] * 5)), 'builds a model larger than'), 'one that no machine holds': (dict(options=dict(decoder_channels=[10**9] * 5)), 'builds a model larger than'), 'a billion bands': (dict(in_channels=10**9), 'in_channels'),
           'an encoder of a hub': (dict(encoder='tu-hf-hub:somebody/model'), 'no .tu-hf-hub'), 'an encoder by path': (dict(encoder='tu-local-dir:/etc'), 'no .tu-local-dir'), 'an unknown encoder': (dict(encoder='os.system'), "there is no 'os.system'"), 'an unknown option': (dict(architecture='unet', encoder='resnet18', options=dict(__class__='x')), 'no such option'),
           'weights of a path': (dict(options=dict(checkpoint_path='/etc/passwd')), 'model.options.checkpoint_path: no such option'), 'weights of an address': (dict(options=dict(pretrained_cfg_overlay=dict(url='http://elsewhere.invalid/x.pth'), pretrained=True)), 'no such option'), 'a cache elsewhere': (dict(options=dict(cache_dir='/')), 'no such option'),
           'another machine part': (dict(options=dict(device='cuda')), 'no such option'), 'texts for numbers': (dict(options=dict(decoder_channels='abcde')), 'config.yaml'), 'nothing for numbers': (dict(options=dict(decoder_channels=[0] * 5)), 'config.yaml'), 'negative ones': (dict(options=dict(decoder_channels=[-8] * 5)), 'config.yaml'),
           'an endless depth': (dict(options=dict(encoder_depth=10**9)), 'config.yaml'), 'options for timm': (dict(options=dict(act_layer='os.system')), 'config.yaml'), 'a giant of timm': (dict(options=dict(channel_multiplier=1e6)), 'config.yaml')}

@pytest.mark.parametrize('kind', CONFIGS)
def test_S3_a_config_that_would_build_something_else(model, kind, whole):
    "Memory, network and other files stay untouched; the message names what is wrong with the config"
    change, why = CONFIGS[kind]; cfg = load(whole/'config.yaml'); tree = json.loads(cfg.model_dump_json())['model']
    put(model, 'config.yaml', json.dumps(dict(model=tree | change, data=dict(tile_size=64))))
    refused(model, why, 30)

@pytest.mark.parametrize('weights', ['imagenet', '/etc/passwd', '../../evil.pt', 'https://elsewhere.invalid/weights.pt', 'evil.safetensors'])
def test_S3_the_first_weights_are_not_asked_for(model, whole, weights):
    "Where a model's encoder once came from is a note: it is neither fetched nor opened"
    tree = json.loads(load(whole/'config.yaml').model_dump_json())['model']; put(model, 'config.yaml', json.dumps(dict(model=tree | dict(weights=weights), data=dict(tile_size=64))))
    x = torch.randn(1, 3, 64, 64)
    with small_run.guard(), torch.no_grad(): assert torch.equal(predict_logits(load_model(model).model, x), predict_logits(load_model(whole/'model').model, x))

@pytest.mark.parametrize('name', [SEAL, 'config.yaml', 'model.safetensors', 'normalization_stats.json', 'metrics.json', 'README.md'])
@pytest.mark.parametrize('kind', ['link out', 'pipe', 'folder', 'link to itself', 'device'])
def test_S4_what_is_no_file_of_the_model(model, tmp_path, name, kind):
    "A link out of the directory is not followed, and nobody waits for a pipe"
    path = model/name; content = path.read_bytes(); path.unlink()
    if kind == 'link out': (tmp_path/'outside').write_bytes(content); path.symlink_to(tmp_path/'outside')
    elif kind == 'pipe': os.mkfifo(path)
    elif kind == 'folder': path.mkdir()
    elif kind == 'link to itself': path.symlink_to(path)
    else: path.symlink_to('/dev/zero')
    refused(model, 'leads out of model|no regular file|cannot be reached')

@pytest.mark.parametrize('field', ['scene', 'extra', 'out'])
@pytest.mark.parametrize('kind', ['pipe', 'folder', 'device'])
def test_S4_no_regular_file_for_a_map(model, tmp_path, capsys, kind, field):
    "A scene, an EXTRA raster or a map that is none: refused before it is opened"
    path = tmp_path/f'{field}.tif'; write_raster(good := tmp_path/'good.tif', np.ones((3, 64, 64), 'uint8'), crs='EPSG:3413')
    if kind == 'pipe': os.mkfifo(path)
    elif kind == 'folder': path.mkdir()
    else: path.symlink_to('/dev/zero')
    with small_run.guard(), small_run.in_time(): said = told(capsys, rtsseg_predict, **dict(model=str(model), scene=str(good), out=str(tmp_path/'map.tif')) | {field: str(path)})
    assert f'{field}: {path} is no regular file' in said

# ---------------------------------------------------------------- nothing is executed
class Payload:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open, (self.path, 'w')

def test_S5_the_guard_sees_what_it_is_there_for(tmp_path):
    "Unpickling such an object writes a file, and the guard of these tests notices"
    with pytest.raises(AssertionError, match='canary'):
        with small_run.guard(): pickle.loads(pickle.dumps(Payload(tmp_path/'canary'))).close()
    for act in (lambda: subprocess.run(['true']), lambda: os.mkdir(tmp_path/'new'), lambda: os.system('true'), lambda: (tmp_path/'canary').unlink()):
        with pytest.raises(AssertionError):
            with small_run.guard(): act()

@pytest.mark.parametrize('protocol', [0, 4])
@pytest.mark.parametrize('name', ['model/model.safetensors', 'model/metrics.json', 'model/config.yaml', 'model/SHA256SUMS', 'evidence/val.parquet', 'evidence/test.npz', 'environment.json', 'log.jsonl', 'config.yaml'])
def test_S5_a_pickle_is_only_bytes(folder, tmp_path, name, protocol):
    "In no file of a run is it unpickled"
    (folder/name).write_bytes(pickle.dumps(Payload(tmp_path/'canary'), protocol))
    if name.startswith('model/') and SEAL not in name: seal_model(folder/'model', Path(name).name)
    with small_run.guard(folder.parents[2]):
        for act in (lambda: load_model(folder/'model'), lambda: calibrate(folder), lambda: report(folder)):
            try: act()
            except (*KNOWN, ValueError): pass
    assert not (tmp_path/'canary').exists()

def test_S5_scores_of_objects(folder, tmp_path):
    "A file of scores can hold pickled objects: it is said to be damaged"
    path = folder/'evidence'/'test.npz'; names = np.load(path).files; payload = np.empty(1, object); payload[0] = Payload(tmp_path/'canary')
    np.savez(path, **{n: payload for n in names})
    with small_run.guard(folder): page = report(folder).path.read_text()
    assert 'The scores for the pictures are damaged' in page and not (tmp_path/'canary').exists()

@pytest.mark.parametrize('kind', ['giant', 'bomb', 'type', 'short', 'paths'])
def test_S5_scores_that_unfold_to_something_else(folder, kind):
    "A header that promises a terabyte, megabytes in a kilobyte, another type, fewer bytes, names that are paths: damaged, and quickly said"
    path = folder/'evidence'/'test.npz'; names = np.load(path).files; out = io.BytesIO()
    def member(shape, dtype, data): f = io.BytesIO(); np.lib.format.write_array_header_1_0(f, dict(shape=shape, fortran_order=False, descr=dtype)); return f.getvalue() + data
    data = {'giant': member((10**6, 10**6), '<f2', b'x'), 'bomb': member((64, 64), '<f2', bytes(10**7)), 'type': member((64, 64), '<U9', bytes(64 * 64 * 36)), 'short': member((64, 64), '<f2', b'xx'), 'paths': b''}[kind]
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as z:
        for n in names: z.writestr(f'{n}.npy' if kind != 'paths' else f'../../{n}.npy', data)
    path.write_bytes(out.getvalue()); began = time.monotonic()
    with small_run.guard(folder): page = report(folder).path.read_text()
    assert ('The scores for the pictures are damaged' in page) == (kind != 'paths') and 'image/jpeg' not in page and time.monotonic() - began < 60

def test_S5_weights_to_start_from(tmp_path):
    "A local file of pretrained weights is read without pickle's dangers"
    from rtsseg.config import Model
    from rtsseg.models import build
    file = tmp_path/'w.pt'
    for content in (pickle.dumps(Payload(tmp_path/'canary')), None):
        if content: file.write_bytes(content)
        else: torch.save(dict(state_dict=Payload(tmp_path/'canary')), file)
        with pytest.raises(ConfigError, match='cannot be read'), small_run.guard(): build(Model(architecture='unet', encoder='resnet18', weights=str(file)))
    assert not (tmp_path/'canary').exists()

# ---------------------------------------------------------------- the run folder
E1 = dict(event='epoch', epoch=3, step=30, seconds=1.)
RUNS = {'ledger of a list': ('../../../test_ledger.json', '[]', 'test_ledger.json'), 'ledger of texts': ('../../../test_ledger.json', '{"x": {"config": 1, "rule": null, "looks": "many"}}', 'test_ledger.json'), 'ledger cut off': ('../../../test_ledger.json', '{"x": ', 'test_ledger.json'),
        'environment of a list': ('environment.json', '[]', 'environment.json'), 'versions of a list': ('environment.json', dict(versions=[1]), 'environment.json'), 'manifest of a list': ('environment.json', dict(manifest_hash=[1]), 'environment.json'),
        'a commit that is a command': ('environment.json', dict(git_commit='x; rm -rf ~'), 'git_commit'), 'metrics of texts': ('model/metrics.json', dict(metrics={'pr_auc@1': '0.5'}), 'metrics.json'), 'metrics at no ratio': ('model/metrics.json', dict(metrics={'pr_auc@x': .5}), 'metrics.json'),
        'metrics that are none': ('model/metrics.json', dict(metrics={'magic@1': .5}), 'magic@1'), 'calibration of a list': ('model/calibration.json', '[]', 'calibration.json'), 'calibration of null': ('model/calibration.json', '{"none": null}', 'calibration.json'), 'no calibration of these views': ('model/calibration.json', '{}', 'calibration.json'),
        'a log without an epoch': ('log.jsonl', '{"event": "start", "device": "cpu"}\n', 'holds no epoch'), 'a log of lists': ('log.jsonl', '[]\n', 'log.jsonl'), 'an epoch in words': ('log.jsonl', json.dumps(E1 | dict(epoch='three')) + '\n', 'log.jsonl'), 'a giant epoch': ('log.jsonl', json.dumps(E1 | dict(epoch=10**30)) + '\n', 'log.jsonl'),
        'a formula in a legend': ('log.jsonl', json.dumps(E1 | {'train/loss/$\\frac{$': 1.}) + '\n', 'log.jsonl'), 'a number that no figure holds': ('log.jsonl', json.dumps(E1 | {'train/loss/focal': 1e308}) + '\n', 'log.jsonl'), 'frozen parts of numbers': ('log.jsonl', json.dumps(E1) + '\n' + json.dumps(dict(event='stage', first=1, last=2, frozen=[1])) + '\n', 'log.jsonl'),
        'a log of bytes': ('log.jsonl', b'\xff\xfe\x00\n', 'log.jsonl'), 'a config of tags': ('config.yaml', '!!python/object/apply:os.system [id]', 'config.yaml'), 'a config of aliases': ('config.yaml', 'a: &a [1]\nb: [*a, *a]\n', 'aliases')}

@pytest.mark.parametrize('kind', RUNS)
def test_S6_notes_of_a_run_that_lie(folder, capsys, kind):
    "The report names the file and exits with 2"
    name, content, why = RUNS[kind]; path = folder/name
    if isinstance(content, dict): notes(path, **content)
    else: path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if name.startswith('model/'): seal_model(folder/'model')                          # the list agrees with the lie
    with small_run.guard(): said = told(capsys, rtsseg_report, run=str(folder))
    assert why in said and not (folder/'report.html').exists()

@pytest.mark.parametrize('change, why', [(dict(slope='1.0'), 'slope'), (dict(slope=0.), 'slope'), (dict(slope=-1.), 'slope'), (dict(intercept=None), 'intercept'), (dict(ratio=1.5), 'ratio'), (dict(fits={}), 'fits'), (dict(shifts={}), 'ratios of its parts differ'), (dict(quality={}), 'ratios of its parts differ'),
                                         (dict(method='magic'), 'fits'), (dict(views='full'), "of views 'full' as that of 'none'"), (dict(code='x'), 'code'), (dict(temperature=10**400), 'temperature'), (dict(thresholds={'1': {}}), 'thresholds.1')])
def test_S6_a_calibration_that_lies(folder, capsys, change, why):
    "Fields, types, ranges, and parts that belong together"
    path = folder/'model'/'calibration.json'; known = json.loads(path.read_text()); known['none'] |= change; path.write_text(json.dumps(known)); seal_model(folder/'model')
    with small_run.guard(): said = told(capsys, rtsseg_report, run=str(folder))
    assert why in said and 'rtsseg-calibrate' in said
    with small_run.guard(folder.parents[2]): rtsseg_calibrate(run=str(folder))
    assert Calibration.load(path).slope > 0 and load_model(folder/'model')                  # made anew

def lying(folder, change, split='val'):
    "Evidence whose table, or description, is another"
    path = evidence_path(folder, split); table = pq.read_table(path); meta = json.loads(table.schema.metadata[b'rtsseg']); table, meta = change(table, meta)
    pq.write_table(table.replace_schema_metadata({b'rtsseg': meta if isinstance(meta, bytes) else json.dumps(meta).encode()}), path)

def column(name, change):
    def make(table, meta): i = table.column_names.index(name); return table.set_column(i, name, change(table[name])), meta
    return make

def rows(change):
    "A list column with the lists of each tile changed"
    return lambda c: pa.array([change(list(v), i) for i, v in enumerate(c.to_pylist())], c.type)

def first(change, of=dict):
    "The first element of the first list that has one, changed"
    def make(c):
        values = c.to_pylist(); v = next(v for v in values if v); v[0] = v[0] | change if isinstance(change, dict) else change
        return pa.array(values, c.type)
    return make

def about(**change): return lambda table, meta: (table, meta | change)

EVIDENCE = {'a column missing': (lambda t, m: (t.drop_columns('region'), m), "no column 'region'"), 'a column of another type': (column('region', lambda c: pa.array([1] * len(c))), 'region is int64'), 'negative counts': (column('pos_counts', lambda c: pa.array([[-1] * len(v) for v in c.to_pylist()], pa.list_(pa.int32()))), 'pos_counts is'),
            'counts that overflow': (column('neg_counts', rows(lambda v, i: [2**32 - 1] * len(v))), 'n_valid is not'), 'empty cells': (column('positive', lambda c: pa.array([None] * len(c), pa.bool_())), 'positive has empty cells'), 'lists of unequal length': (column('neg_counts', rows(lambda v, i: v + [1])), 'differ in length'),
            'codes out of order': (column('neg_codes', rows(lambda v, i: v[::-1])), 'do not ascend'), 'fewer pixels than said': (column('n_valid', lambda c: pa.array([7] * len(c))), 'n_valid is not'), 'a threshold of another grid': (column('predicted', first(dict(threshold=.123))), 'predicted.threshold'), 'an object of no area': (column('truth', first(dict(area=0))), 'truth: an id'),
            'a score that is none': (column('predicted', first(dict(score=float('nan')))), 'score'), 'an object without end': (column('predicted', first(dict(size=float('inf')))), 'predicted: an id'), 'a pair of nobody': (column('pairs', first(dict(truth=99))), 'not there'), 'a pair larger than its objects': (column('pairs', first(dict(intersection=10**6))), 'larger than its objects'),
            'bands that do not fit': (column('bands', first(dict(intersection=10**6))), 'bands'), 'a tile twice': (lambda t, m: (pa.concat_tables([t, t.slice(0, 1)]), m), 'twice'), 'thresholds in words': (about(thresholds=['0.5']), 'thresholds'), 'thresholds beyond 1': (about(thresholds=[.5, 7.]), 'thresholds'), 'bins backwards': (about(bins=[3., -3.]), 'bins'),
            'bins of nothing': (about(bins=None), 'bins'), 'views of a number': (about(views=3), 'views'), 'other views': (about(views='full'), 'views full'), 'exact in words': (about(exact='yes'), 'exact'), 'another format': (about(format=1), 'format'), 'a description that is none': (lambda t, m: (t, b'[1]'), 'format'), 'a description cut off': (lambda t, m: (t, b'{"for'), 'no evidence file'),
            'nothing': (lambda t, m: (t.slice(0, 0), m), ''), 'another split': (column('split', lambda c: pa.array(['train'] * len(c))), 'evidence of train')}

@pytest.mark.parametrize('kind', EVIDENCE)
def test_S6_evidence_that_lies(folder, capsys, kind):
    "Calibration and report refuse it alike, and say how it is made anew"
    change, why = EVIDENCE[kind]; lying(folder, change); kept = (folder/'model'/'calibration.json').read_bytes()
    with small_run.guard():
        for command, given in ((rtsseg_calibrate, dict(run=str(folder))), (rtsseg_report, dict(run=str(folder)))):
            said = told(capsys, command, **given); assert why in said and (not why or 'val.parquet' in said and 'rtsseg-evaluate --run' in said)
    assert (folder/'model'/'calibration.json').read_bytes() == kept

def test_S6_evidence_that_unfolds_without_end(folder):
    "A file of some kilobytes that says that it holds a billion values is not unfolded"
    path = evidence_path(folder, 'val'); table = pq.read_table(path); n = 3 * 10**6
    pq.write_table(pa.table({'region': pa.array(['x'] * n)}).replace_schema_metadata(table.schema.metadata), path); assert path.stat().st_size < 20_000
    with pytest.raises(ValueError, match='more than a pass can have seen'): Evidence.read(path)

@pytest.mark.parametrize('name', ['config.yaml', 'model/calibration.json', 'evidence/val.parquet', 'environment.json', 'log.jsonl'])
@pytest.mark.parametrize('kind', ['pipe', 'folder', 'link out'])
def test_S6_no_regular_file(folder, capsys, tmp_path, name, kind):
    "Nobody waits for a pipe, and a link out of the run is not followed"
    path = folder/name; content = path.read_bytes(); path.unlink()
    if kind == 'pipe': os.mkfifo(path)
    elif kind == 'folder': path.mkdir()
    else: (tmp_path/'outside').write_bytes(content); path.symlink_to(tmp_path/'outside')
    with small_run.guard(): assert path.name in told(capsys, rtsseg_report, run=str(folder))

# ---------------------------------------------------------------- writing stays inside
@pytest.mark.parametrize('name', ['log.jsonl', 'evidence', 'model', 'report_files', '../../../.test_ledger.lock', '../../../test_ledger.json'])
def test_S7_links_that_lead_writers_out(folder, tmp_path, capsys, name):
    "Every command that writes refuses, and what the link leads to is as it was"
    outside, path = tmp_path/'outside', folder/name
    if path.is_dir(): shutil.move(path, outside)
    elif name == 'report_files': outside.mkdir(); (outside/'figure-1.png').write_text('mine')
    else: outside.write_text(path.read_text() if path.exists() else 'mine'); path.unlink(missing_ok=True)
    path.symlink_to(outside); held = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in ([outside] if outside.is_file() else outside.rglob('*')) if f.is_file()}; failed = 0
    with small_run.guard(folder.parents[2]):
        for command, given in ((rtsseg_evaluate, dict(run=str(folder), split='test')), (rtsseg_calibrate, dict(run=str(folder))), (rtsseg_report, dict(run=str(folder)))):
            try: command(**given)
            except SystemExit as e: assert e.code == 2; failed += 1
    assert failed and 'leads out of' in capsys.readouterr().err and held == {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in held}

@pytest.mark.parametrize('name', ['.lock', 'log.jsonl', 'config.yaml', 'launch.yaml', 'environment.json', 'tracker.jsonl', 'tracker.json', 'unread.json', 'checkpoints', 'evidence', 'model'])
def test_S7_links_that_lead_training_out(folder, tmp_path, name):
    "A run is not begun, gone on with or put aside in a folder that writes elsewhere"
    outside, path, cfg = tmp_path/'outside', folder/name, load(folder/'config.yaml').model_copy(update=dict(runs=folder.parents[2]))
    if path.is_dir(): shutil.move(path, outside)
    elif name in ('checkpoints', 'evidence', 'model'): outside.mkdir(); (outside/'x').write_text('mine')
    else: outside.write_text(path.read_text() if path.exists() else 'mine\nhalf'); path.unlink(missing_ok=True)
    path.symlink_to(outside); held = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in ([outside] if outside.is_file() else outside.rglob('*')) if f.is_file()}
    for command in (train, launch, force_config):
        with pytest.raises(FileError, match=f'{name} leads out of'): command(cfg)
    assert held == {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in held}

def test_S7_a_spool_that_would_send_other_files(folder, tmp_path):
    "What is delivered lies in the folder, and where to is not for the folder to say"
    uri = f"sqlite:///{folder.parents[2]/'mlflow.db'}"; (secret := folder.parents[2]/'secret').write_text('mine'); note = dict(time=1, tags={}, params={}, key='k', name='n', experiment='e', parent='', runs='../../..', uri='http://127.0.0.1:9')
    def spool(*rows): (folder/'tracker.json').unlink(missing_ok=True); (folder/'tracker.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    begin, end = dict(event='begin', **note), dict(event='end', time=2, status='FINISHED')
    for odd in (dict(runs='../../../..'), dict(runs='../../elsewhere'), dict(runs='/tmp'), dict(key=1), dict(tags=[])): spool(begin | odd); assert deliver(folder, uri) == 0
    for files in (['../../../secret'], ['../secret'], [str(secret)], ['..'], 'log.jsonl'): spool(end | dict(files=files)); assert left(folder, 'x') == 0
    (folder/'linked').symlink_to(secret); spool(begin, end | dict(files=['linked']))
    with pytest.raises(FileError, match='leads out'): deliver(folder, uri)
    (folder/'linked').unlink(); spool(begin, end | dict(files=['log.jsonl'])); rtsseg_track(str(folder))
    assert not list(tmp_path.rglob('**/artifacts/secret')) and not list(tmp_path.rglob('**/artifacts/linked')) and list(tmp_path.rglob('**/artifacts/log.jsonl'))

def test_S7_the_ledger_is_that_above_the_run(folder, tmp_path):
    "A config that names other runs does not have a look noted there"
    path, other = folder/'config.yaml', tmp_path/'elsewhere'; path.write_text(re.sub('(?m)^runs: .*$', f'runs: {other}', path.read_text())); assert load(path).runs == other
    before = len(json.loads((folder.parents[2]/'test_ledger.json').read_text()).popitem()[1]['looks'])
    with small_run.guard(folder.parents[2]): evaluate(folder, 'test')
    assert not other.exists() and len(json.loads((folder.parents[2]/'test_ledger.json').read_text()).popitem()[1]['looks']) == before + 1

@pytest.mark.parametrize('content', ['[]', '{', 'null', '{"x": []}', '\x80'])
def test_S7_nobody_looks_past_a_broken_ledger(folder, capsys, content):
    "Who has seen the test split is not known then: it is not read, and the ledger is not written over"
    path = folder.parents[2]/'test_ledger.json'; path.write_bytes(content.encode('latin1')); log = (folder/'log.jsonl').read_text()
    assert 'test_ledger.json' in (said := told(capsys, rtsseg_evaluate, run=str(folder), split='test')) and 'bring it back from a copy' in said
    assert path.read_bytes() == content.encode('latin1') and (folder/'log.jsonl').read_text() == log

# ---------------------------------------------------------------- other weights
@pytest.mark.parametrize('split', ['val', 'test'])
def test_S8_evidence_of_other_weights(folder, capsys, split):
    "After another training under the same name, numbers of the old weights are not reported as those of the new"
    path = folder/'model'/'model.safetensors'; weights = load_file(path); weights[B] += 1e-3; path.write_bytes(save(weights)); seal_model(folder/'model')
    if split == 'test': evaluate(folder); notes(folder/'model'/'metrics.json', metrics={}); seal_model(folder/'model'); calibrate(folder)
    else: assert 'was made by other weights' in told(capsys, rtsseg_calibrate, run=str(folder))
    said = told(capsys, rtsseg_report, run=str(folder)); assert f'{split}.parquet was made by other weights' in said and f'rtsseg-evaluate --run' in said and f'--split {split}' in said

def test_S8_evidence_says_whose_it_is(folder):
    "By the digest that the model's list has; it does not count as content"
    listed = dict(l.split('  ')[::-1] for l in (folder/'model'/SEAL).read_text().splitlines())['model.safetensors']; e = Evidence.read(evidence_path(folder, 'val'))
    assert e.model == listed[:12] == e.select([0, 1]).model and (e + e).model == e.model
    before = e.hash; e.model = ''; assert e.hash == before and (e + Evidence.read(evidence_path(folder, 'val'))).model == ''

# ---------------------------------------------------------------- markup
class Page(HTMLParser):
    "What a browser would execute or fetch"
    def __init__(self, text): super().__init__(); self.tags, self.attributes = [], []; self.feed(text)
    def handle_starttag(self, tag, attrs): self.tags.append(tag); self.attributes += [(tag, *a) for a in attrs]

EVIL = '<img src=x onerror=alert(1)></script><script>alert(1)</script>&"\'`${1}[x](javascript:alert(1))\n# h'

def test_S9_markup_in_every_text(folder):
    "Region, tile, block, reasons, device, versions: each is shown as it is written, and the page has no element, no handler and no address more than without"
    plain = Page(report(folder).path.read_text())
    for split in ('val', 'test'):
        def change(t, m):
            for name in ('tile_id', 'region', 'block'): t = t.set_column(t.column_names.index(name), name, pa.array([f'{EVIL}{v}' for v in t[name].to_pylist()]))
            return t, m
        lying(folder, change, split)
    calibrate(folder); path = folder/'model'/'calibration.json'; known = json.loads(path.read_text())
    def evil(x): return {k: EVIL if k in ('why', 'temperature_why', 'temperature_enough', 'monotone_why') else evil(v) for k, v in x.items()} if isinstance(x, dict) else x
    path.write_text(json.dumps(evil(known))); seal_model(folder/'model'); notes(folder/'environment.json', versions={EVIL: EVIL}, system=EVIL, python=EVIL, rtsseg=EVIL, processor=EVIL, cpus=EVIL)
    with open(folder/'log.jsonl', 'a') as f: f.write(json.dumps(dict(event='end', reason=EVIL, epoch=2, step=20, best=2)) + '\n')
    ledger = folder.parents[2]/'test_ledger.json'; known = json.loads(ledger.read_text())
    for x in known.values(): x.update(config=EVIL, rule=EVIL); x['looks'].append(dict(config=EVIL, rule=EVIL, when=EVIL, seed=1, forced=True))
    ledger.write_text(json.dumps(known)); done = report(folder); text, said = done.path.read_text(), done.path.with_suffix('.md').read_text()
    page = Page(text); assert page.tags.count('script') == plain.tags.count('script') == 2 and set(page.tags) <= set(plain.tags) | {'details', 'summary', 'ul', 'li', 'p'}
    assert not [a for a in page.attributes if a[1].startswith('on') or a[1] in ('src', 'href') and not re.match(r'#|data:image/(png|jpeg);base64,', a[2])]
    script, = re.findall('<script>(.*?)</script>', text, re.S); policy = re.search('Content-Security-Policy" content="([^"]+)"', text)[1]
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    assert '<img src=x' not in text and html.escape('<img src=x onerror=alert(1)>') in text and text.count('onerror') > 10
    import mistune
    shown = Page(mistune.create_markdown(escape=False, plugins=['table'])(said)); assert 'script' not in shown.tags and not [a for a in shown.attributes if a[1].startswith('on') or a[1] in ('src', 'href') and not (a[2] or '').startswith('report_files/')]

HIDDEN = '\x1b[2J\x9b1m\x85\r\u2028\u202egnihton\u2066\u200bä'      # clear the screen, in two ways, write over the line, read backwards, take no space

def test_S9_signs_that_hide_what_is_there(folder, capsys):
    "On the page, in the appendix and in the terminal each stands as Python writes it, so that nothing is steered or turned around"
    def seen(text): assert all(c.isprintable() or c == '\n' for c in text); return text
    for split in ('val', 'test'): lying(folder, lambda t, m: (t.set_column(t.column_names.index('region'), 'region', pa.array([HIDDEN + v for v in t['region'].to_pylist()])).set_column(t.column_names.index('tile_id'), 'tile_id', pa.array([HIDDEN + v for v in t['tile_id'].to_pylist()])), m), split)
    rtsseg_calibrate(run=str(folder)); shown = r'\u202egnihton\u2066\u200bä'; assert f'Region \\x1b[2J' in (said := seen(capsys.readouterr().out)) and shown in said
    notes(folder/'environment.json', versions={HIDDEN: HIDDEN}, system=HIDDEN)
    with open(folder/'log.jsonl', 'a') as f: f.write(json.dumps(dict(event='end', reason=HIDDEN, epoch=2, step=20, best=2)) + '\n')
    rtsseg_report(run=str(folder)); seen(capsys.readouterr().out); assert min(seen((folder/n).read_text()).count(r'u202egnihton') for n in ('report.html', 'report.md')) > 5
    notes(folder/'model'/'metrics.json', **{HIDDEN: 1}); seal_model(folder/'model'); assert shown in seen(told(capsys, rtsseg_report, run=str(folder)))

# ---------------------------------------------------------------- any byte
FILES = [*(f'model/{n}' for n in (SEAL, *SEALED)), 'config.yaml', 'environment.json', 'log.jsonl', 'evidence/val.parquet', 'evidence/test.parquet', 'evidence/test.npz', '../../../test_ledger.json']

@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), flip=st.integers(0, 8), relist=st.booleans())
def test_S10_any_byte(made, name, where, flip, relist):
    "Whether the list of digests notices or has been written anew over the damage"
    folder, x, want = made; path = folder/name; before, listed = path.read_bytes(), (folder/'model'/SEAL).read_bytes(); at = int(where * len(before))
    path.write_bytes(before[:at] if flip == 8 else before[:at] + bytes([before[at] ^ 1 << flip]) + before[at + 1:])
    if relist and name.startswith('model/') and SEAL not in name: seal_model(folder/'model', path.name)
    try:
        with small_run.guard(folder.parents[2]):
            try:
                with torch.no_grad(): got = predict_logits(load_model(folder/'model').model, x)
                assert relist or name == f'model/{SEAL}' or not name.startswith('model/'), f'{name} was changed, and nobody noticed'
                assert torch.equal(got, want) or relist
            except ModelError: assert name.startswith('model/')
            try: tables(folder)
            except KNOWN as e: assert path.name in str(e) or path.suffix in ('.yaml', '.json') or 'evidence is of other weights' in str(e) or 'different tiles' in str(e), e
    finally: (folder/'model'/SEAL).write_bytes(listed); path.write_bytes(before)

@pytest.fixture(scope='module')
def made(whole, tmp_path_factory):
    "A copy, an image, its logits"
    folder = shutil.copytree(whole.parents[2], tmp_path_factory.mktemp('fuzz')/'runs')/whole.relative_to(whole.parents[2]); x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): return folder, x, predict_logits(load_model(folder/'model').model, x)
