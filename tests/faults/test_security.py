"""Files from others: models and runs are data, and nothing in them is executed. Pinned installs are in
test_house.py, rasters in test_rasters.py, YAML tags in test_config.py, credentials in test_tracker.py"""
import base64
import hashlib
import html
import io
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import mistune
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

import rtsseg.calibration
from helpers import runs as small_run
from helpers.children import in_child, killed_at_write_step
from helpers.hostile import (
    Payload,
    as_bytes,
    change_evidence,
    change_json,
    change_weight_table,
    column,
    constant,
    described,
    first_item,
    lists,
    prefixed,
    replace_by_no_file,
    replace_sealed,
    weight_file,
)
from rtsseg.calibration import Calibration, calibrate, calibrate_evidence
from rtsseg.cli import error_outcome, rtsseg_calibrate, rtsseg_evaluate, rtsseg_predict, rtsseg_report, rtsseg_track
from rtsseg.config import ConfigError, Model, load
from rtsseg.console import DataError, RtssegError
from rtsseg.evaluation import evaluate
from rtsseg.evidence import Evidence, evidence_path
from rtsseg.files import SEAL, SEALED, FileError, digest, seal_model
from rtsseg.importers import Conversion
from rtsseg.infer import load_model, predict_logits
from rtsseg.models import build
from rtsseg.raster import write_raster
from rtsseg.regions import read_features
from rtsseg.reporting import report, tables
from rtsseg.results import ReportError
from rtsseg.runs import judge_run, run_config
from rtsseg.scenelist import read_scenes
from rtsseg.styles import mask_style, write_style
from rtsseg.track import deliver, left
from rtsseg.training import force_config, launch, train
from rtsseg.weights import ModelError

FAULTS = {
    'S1': (
        'a model directory with a file that was changed, exchanged, added or lost',
        'refused, every such file named',
    ),
    'S2': (
        'weights, statistics or notes of a model that lie: broken tables, other types and shapes, NaN for numbers',
        'refused',
    ),
    'S3': (
        'a config.yaml of a model that would build a giant, fetch weights or read other files',
        'refused, in time',
    ),
    'S4': (
        'links out of the folder, pipes and folders in the place of files',
        'refused before they are opened',
    ),
    'S5': (
        'a pickle in the place of weights, scores or evidence',
        'refused, nothing is executed',
    ),
    'S6': (
        'a run folder whose notes or evidence lie',
        'refused',
    ),
    'S7': (
        'a run folder that would have other files written or sent: links, another ledger, a spool with paths and a '
        'tracker of its own',
        'refused, or kept inside',
    ),
    'S8': (
        'evidence of other weights than those of the model',
        'refused',
    ),
    'S9': (
        'markup, or control characters for a terminal, in any text of a run',
        'escaped wherever it is shown, and nothing is fetched',
    ),
    'S10': (
        'any byte of a model or a run flipped, or a file cut anywhere',
        'the same result, or an error that names the file',
    ),
}
KNOWN = ModelError, DataError, ConfigError, ReportError, FileError
BIAS = 'segmentation_head.0.bias'

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run folder that is never changed"
    return small_run.run(tmp_path_factory.mktemp('whole'))

def copy_runs(whole, to):
    "Copy the runs folder that holds a run; the run folder in the copy"
    root = whole.parents[2]
    return shutil.copytree(root, to)/whole.relative_to(root)

@pytest.fixture
def folder(whole, tmp_path):
    "A copy of the run folder"
    return copy_runs(whole, tmp_path/'runs')

@pytest.fixture
def model(whole, tmp_path):
    "A copy of the model directory"
    return shutil.copytree(whole/'model', tmp_path/'model')

def refused(model, why):
    "Loading a model directory fails with this message, in time, and does nothing elsewhere; the message"
    with small_run.guard(), small_run.in_time(), pytest.raises(ModelError, match=why) as error:
        load_model(model)
    return str(error.value)

def command_error(capsys, command, *args, **options):
    "What a command prints when it refuses: exit code 2, and no traceback"
    with pytest.raises(SystemExit) as error:
        command(*args, **options)
    printed = capsys.readouterr().err
    assert error.value.code == 2
    assert printed.startswith('error: ')
    assert 'Traceback' not in printed
    return printed

def model_settings(run):
    "The `model` section of a run's config, as JSON holds it"
    return json.loads(load(run/'config.yaml').model_dump_json())['model']

def contents(path):
    "Content and time of change of a file, or of each file below a folder"
    files = [path] if path.is_file() else [f for f in path.rglob('*') if f.is_file()]
    return {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in files}

# ---------------------------------------------------------------- S1: the model directory

def test_S1_the_list_is_that_of_sha256sum(model):
    "Another program finds the directory intact, and finds the same damage"
    def sha256sum():
        return subprocess.run(['sha256sum', '--strict', '-c', SEAL], cwd=model, capture_output=True, text=True)

    done = sha256sum()
    assert done.returncode == 0
    listed = len((model/SEAL).read_text().splitlines())
    # post-hoc settings are those of the training here, and its tiles were not converted
    there = [name for name in SEALED if name not in ('post_hoc.yaml', 'source.json')]
    assert listed == len(there) == len(done.stdout.splitlines())
    (model/'README.md').write_text('mine')
    done = sha256sum()
    assert done.returncode == 1
    assert 'README.md: FAILED' in done.stdout
    assert 'README.md is not the file' in refused(model, 'README.md')

def test_S1_every_file_that_was_changed_is_named(model):
    "All in one message"
    (model/'metrics.json').write_text('{}')
    (model/'calibration.json').unlink()
    with (model/'config.yaml').open('a') as file:
        file.write('\n')
    message = refused(model, 'metrics.json is not the file that SHA256SUMS lists')
    assert 'config.yaml is not the file' in message
    assert 'calibration.json is missing' in message

def test_S1_a_file_that_was_added(model):
    "A calibration of another model is refused; a file that does not belong to a model directory is not read at all"
    seal_model(model)
    (model/'evil.pkl').write_bytes(b'x')
    load_model(model)
    calibration = (model/'calibration.json').read_bytes()
    (model/'calibration.json').unlink()
    seal_model(model)
    load_model(model)
    (model/'calibration.json').write_bytes(calibration)
    refused(model, 'calibration.json is not in SHA256SUMS')

def test_S1_a_directory_without_a_list(model):
    "The message for a directory of an older version holds a command that makes the list and can be copied"
    (model/SEAL).unlink()
    message = refused(model, 'SHA256SUMS is missing')
    command = re.search(r'python -c (.*)$', message)[1]
    done = subprocess.run(f'{sys.executable} -c {command}', shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    load_model(model)

def test_S1_a_new_calibration_seals_nothing_else(whole, folder):
    "Calibrating again lists the new file, and does not hide that another file was changed"
    with (folder/'model'/'config.yaml').open('a') as file:
        file.write('\n')
    calibrate(folder)
    message = refused(folder/'model', 'config.yaml is not the file')
    assert 'calibration.json' not in message
    shutil.copy(whole/'model'/'config.yaml', folder/'model'/'config.yaml')
    load_model(folder/'model')

@pytest.mark.parametrize('first', [True, False])
def test_S1_a_calibration_that_is_killed(folder, monkeypatch, first):
    "At each step of writing: the model loads, and calibration, settings and card are each the old or the new ones"
    model = folder/'model'
    if first:
        (model/'calibration.json').unlink()
        seal_model(model)
    start = shutil.copytree(model, folder/'start')
    judge_run(folder, ['calibrate.target_precision=0.4', 'card.sensor=a camera'])
    evidence, cfg = Evidence.read(evidence_path(folder, 'val')), run_config(folder)
    found = calibrate_evidence(evidence, cfg.calibrate, cfg.metrics)
    monkeypatch.setattr(rtsseg.calibration, 'calibrate_evidence', lambda *_: found)
    calibrate(folder)
    names = ('README.md', 'calibration.json', 'post_hoc.yaml')
    old, new = ({n: (f/n).read_bytes() if (f/n).exists() else b'' for n in names} for f in (start, model))
    assert all(old[name] != new[name] for name in names)
    seen = {name: set() for name in names}
    for step in itertools.count(1):
        shutil.rmtree(model)
        shutil.copytree(start, model)
        code = in_child(lambda: calibrate(folder), killed_at_write_step(step))
        load_model(model)
        for name in names:
            content = (model/name).read_bytes() if (model/name).exists() else b''
            assert content in (old[name], new[name])
            seen[name].add(content)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    # each file was caught in both states, and what is neither is still refused
    assert all(len(contents) == 2 for contents in seen.values()) and step > 50
    (model/'README.md').write_text('damaged')
    refused(model, 'README.md is not the file')

def test_S1_a_run_that_was_killed_before_its_list(tmp_path):
    "The list is written last: without it a run is not finished, and the same command mends it, to the same bytes"
    cfg = small_run.tiny(tmp_path, name='killed')
    model = train(cfg)/'model'
    before = {f.name: f.read_bytes() for f in model.iterdir()}
    (model/SEAL).unlink()
    refused(model, 'the command that made it, run again, mends it')
    train(cfg)
    assert {f.name: f.read_bytes() for f in model.iterdir()} == before
    load_model(model)

# ---------------------------------------------------------------- S2: weights, statistics and notes

def million_weights():
    "A table that names a million weights"
    row = '"w{}":{{"dtype":"F32","shape":[],"data_offsets":[0,4]}}'
    return weight_file('{' + ','.join(row.format(i) for i in range(10**6)) + '}', bytes(4))

# case: (the whole file, or a function that makes it; part of the message)
WEIGHT_FILES = {
    'longer than the file': (struct.pack('<Q', 1 << 63) + b'{}', 'a table of 9223372036854775808 bytes'),
    'of a million weights': (million_weights, 'a table of'),
    'empty': (b'', 'a table of 0 bytes'),
    'not JSON': (weight_file('{"a"'), 'cannot be read'),
    'UTF-16': (weight_file('{}'.encode('utf-16')), 'cannot be read'),
    'nested deeply': (weight_file('[' * 20000), 'recursion'),
    'a list': (weight_file('[]'), 'object'),
}

@pytest.mark.parametrize('kind', WEIGHT_FILES)
def test_S2_a_broken_table_of_weights(model, kind):
    "The table at the head of the weights is read before any weight is"
    content, why = WEIGHT_FILES[kind]
    replace_sealed(model, 'model.safetensors', content() if callable(content) else content)
    refused(model, why)

def bias(**fields):
    "A change of the table: other fields of one weight"
    return lambda table: table[BIAS].update(fields)

def bias_twice(table):
    "The text of a table that names a weight twice"
    return json.dumps(table)[:-1] + f', "{BIAS}": {json.dumps(table[BIAS])}}}'

def nan_shape(table):
    "The text of a table with NaN in a shape"
    return json.dumps(table).replace('[1]', '[NaN]')

# case: (change of the table, part of the message)
WEIGHT_TABLES = {
    'offsets outside': (bias(data_offsets=[1 << 40, (1 << 40) + 4]), 'cannot be read'),
    'offsets that overlap': (bias(data_offsets=[0, 4]), 'cannot be read'),
    'negative offsets': (bias(data_offsets=[-4, 0]), 'cannot be read'),
    'another type': (bias(dtype='F64'), "'F64'"),
    'half precision': (bias(dtype='F16', shape=[2]), "'F16'"),
    'a giant shape': (bias(shape=[1 << 62]), 'another type or shape'),
    'an unknown type': (bias(dtype='PICKLE'), 'another type or shape'),
    'a shape of texts': (bias(shape=['1']), f'{BIAS}.shape.0'),
    'a further field': (bias(code='x'), f'{BIAS}.code'),
    'a name twice': (bias_twice, 'occurs twice'),
    'NaN in a shape': (nan_shape, 'NaN is'),
}

@pytest.mark.parametrize('kind', WEIGHT_TABLES)
def test_S2_a_table_of_weights_that_lies(model, kind):
    "It has to fit the model that the config builds: name by name, shape by shape, type by type"
    change, why = WEIGHT_TABLES[kind]
    change_weight_table(model, change)
    refused(model, why)

METRICS, STATS, CONFIG = 'metrics.json', 'normalization_stats.json', 'config.yaml'
NINES = '9' * 400

# case: (file; its content, or fields of its JSON; part of the message)
MODEL_FILES = {
    'a text for a number': (METRICS, '{"epoch": 1, "step": 1, "value": "0.5", "metrics": {}}', 'metrics.json: value'),
    'a further field': (METRICS, '{"epoch": 1, "value": 0.5, "metrics": {}, "run": "x"}', 'metrics.json: run'),
    'a list': (METRICS, '[]', 'object'),
    'null': (METRICS, 'null', 'object'),
    'no best value': (METRICS, '{"epoch": 1, "value": NaN, "metrics": {}}', 'metrics.json: value'),
    'a number of 5000 digits': (METRICS, '{"epoch": ' + '9' * 5000 + '}', 'metrics.json cannot be read'),
    'a number of 400 digits': (METRICS, '{"epoch": 1, "value": ' + NINES + ', "metrics": {}}', 'metrics.json: value'),
    'UTF-16': (METRICS, '{}'.encode('utf-16'), 'metrics.json cannot be read'),
    'a byte order mark': (METRICS, b'\xef\xbb\xbf{}', 'metrics.json cannot be read'),
    'nested deeply': (METRICS, '{"a":' * 10**5, 'recursion'),
    'not text': (STATS, b'\xff\x00', 'normalization_stats.json cannot be read'),
    'statistics in texts': (STATS, dict(mean=['a', 'b', 'c']), 'mean.0'),
    'nested statistics': (STATS, dict(std=[.1, [.1], .1]), 'std.1'),
    'a number of bands': (STATS, dict(channels=3), 'channels'),
    'a scale of 0': (STATS, dict(scale=0.), 'normalization_stats.json'),
    'a mean that single precision cannot hold': (STATS, dict(mean=[.1, 1e300, .1]), 'too large or too small'),
    'a deviation of almost 0': (STATS, dict(std=[.1, 1e-300, .1]), 'too large or too small'),
    'a further statistic': (STATS, dict(code='x'), 'code'),
    'not YAML': (CONFIG, b'\xff\xfe\x00', 'config.yaml'),
    'an unknown setting': (CONFIG, 'model: {encodr: resnet18}', "did you mean 'encoder'"),
    'a tag': (CONFIG, '!!python/object/apply:os.system [id]', 'config.yaml'),
    'a list of settings': (CONFIG, '[1]', 'a mapping was expected'),
    'settings nested deeply': (CONFIG, '[' * 1000, 'config.yaml'),
}

@pytest.mark.parametrize('kind', MODEL_FILES)
def test_S2_notes_of_a_model_that_lie(model, kind):
    "Fields, types and numbers are checked before they are used"
    name, content, why = MODEL_FILES[kind]
    if isinstance(content, dict):
        content = json.dumps(json.loads((model/name).read_text()) | content)
    replace_sealed(model, name, content)
    refused(model, why)

# ---------------------------------------------------------------- S3: the config

def options(**values):
    "The model's options"
    return dict(options=values)

# case: (fields of the config's `model`, part of the message)
MODEL_CONFIGS = {
    'a decoder of 10¹¹ weights': (options(decoder_channels=[10**5] * 5), 'builds a model larger than'),
    'larger than any memory': (options(decoder_channels=[10**9] * 5), 'builds a model larger than'),
    'a billion bands': (dict(in_channels=10**9), 'in_channels'),
    'an encoder of a hub': (dict(encoder='tu-hf-hub:somebody/model'), 'no such encoder: .tu-hf-hub'),
    'an encoder by path': (dict(encoder='tu-local-dir:/etc'), 'no such encoder: .tu-local-dir'),
    'an unknown encoder': (dict(encoder='os.system'), "no such encoder: 'os.system'"),
    'an unknown option': (dict(architecture='unet', encoder='resnet18') | options(__class__='x'), 'no such option'),
    'weights of a path': (options(checkpoint_path='/etc/passwd'), 'model.options.checkpoint_path: no such option'),
    'weights of an address': (
        options(pretrained_cfg_overlay=dict(url='http://elsewhere.invalid/x.pth'), pretrained=True),
        'no such option',
    ),
    'a cache elsewhere': (options(cache_dir='/'), 'no such option'),
    'another device': (options(device='cuda'), 'no such option'),
    'texts for numbers': (options(decoder_channels='abcde'), 'config.yaml'),
    'zeros for numbers': (options(decoder_channels=[0] * 5), 'config.yaml'),
    'negative numbers': (options(decoder_channels=[-8] * 5), 'config.yaml'),
    'a depth of a billion': (options(encoder_depth=10**9), 'config.yaml'),
    'options for timm': (options(act_layer='os.system'), 'config.yaml'),
    'a giant of timm': (options(channel_multiplier=1e6), 'config.yaml'),
}

@pytest.mark.parametrize('kind', MODEL_CONFIGS)
def test_S3_a_config_that_would_build_something_else(model, kind, whole):
    "Memory, network and other files stay untouched; the message names what is wrong with the config"
    change, why = MODEL_CONFIGS[kind]
    replace_sealed(model, CONFIG, json.dumps(dict(model=model_settings(whole) | change, data=dict(tile_size=64))))
    refused(model, why)

@pytest.mark.parametrize('weights', [
    'imagenet',
    '/etc/passwd',
    '../../evil.pt',
    'https://elsewhere.invalid/weights.pt',
    'evil.safetensors',
])
def test_S3_the_first_weights_are_not_asked_for(model, whole, weights):
    "The source of an encoder's first weights is a note: it is neither fetched nor opened"
    changed = model_settings(whole) | dict(weights=weights)
    replace_sealed(model, CONFIG, json.dumps(dict(model=changed, data=dict(tile_size=64))))
    x = torch.randn(1, 3, 64, 64)
    with small_run.guard(), torch.no_grad():
        found = predict_logits(load_model(model).model, x)
        want = predict_logits(load_model(whole/'model').model, x)
    assert torch.equal(found, want)

# ---------------------------------------------------------------- S4: not regular files

@pytest.mark.parametrize('name', [SEAL, CONFIG, 'model.safetensors', STATS, METRICS, 'README.md'])
@pytest.mark.parametrize('kind', ['link out', 'pipe', 'folder', 'link to itself', 'device'])
def test_S4_not_a_file_of_the_model(model, tmp_path, name, kind):
    "A link out of the directory is not followed, and loading does not wait for a pipe"
    replace_by_no_file(model/name, kind, tmp_path/'outside')
    refused(model, 'leads out of model|regular file|cannot be reached')

@pytest.mark.parametrize('field', ['scene', 'extra', 'out'])
@pytest.mark.parametrize('kind', ['pipe', 'folder', 'device'])
def test_S4_no_regular_file_for_a_map(model, tmp_path, capsys, kind, field):
    "A scene, an EXTRA raster or a map that is not a regular file is refused before it is opened"
    path = tmp_path/f'{field}.tif'
    good = tmp_path/'good.tif'
    write_raster(good, np.ones((3, 64, 64), 'uint8'), crs='EPSG:3413')
    replace_by_no_file(path, kind, None)
    given = dict(model=str(model), scene=str(good), out=str(tmp_path/'map.tif')) | {field: str(path)}
    with small_run.guard(), small_run.in_time():
        message = command_error(capsys, rtsseg_predict, **given)
    assert re.search(f'{field}: {path} is .*regular file', message)

# ---------------------------------------------------------------- S5: nothing is executed

def test_S5_the_guard_sees_what_it_is_there_for(tmp_path):
    "Unpickling a payload writes a file, and the guard of these tests notices"
    with pytest.raises(AssertionError, match='canary'):
        with small_run.guard():
            pickle.loads(pickle.dumps(Payload(tmp_path/'canary'))).close()
    forbidden = [
        lambda: subprocess.run(['true']),
        lambda: os.mkdir(tmp_path/'new'),
        lambda: os.system('true'),
        lambda: (tmp_path/'canary').unlink(),
    ]
    for act in forbidden:
        with pytest.raises(AssertionError):
            with small_run.guard():
                act()

@pytest.mark.parametrize('protocol', [0, 4])
@pytest.mark.parametrize('name', [
    'model/model.safetensors',
    'model/metrics.json',
    'model/config.yaml',
    'model/SHA256SUMS',
    'evidence/val.parquet',
    'evidence/test.npz',
    'environment.json',
    'log.jsonl',
    'config.yaml',
])
def test_S5_a_pickle_is_only_bytes(folder, tmp_path, name, protocol):
    "It is not unpickled in any file of a run"
    (folder/name).write_bytes(pickle.dumps(Payload(tmp_path/'canary'), protocol))
    if name.startswith('model/') and SEAL not in name:
        seal_model(folder/'model', Path(name).name)
    readers = [
        lambda: load_model(folder/'model'),
        lambda: calibrate(folder),
        lambda: report(folder),
    ]
    with small_run.guard(folder.parents[2]):
        for read in readers:
            try:
                read()
            except (*KNOWN, ValueError):
                pass
    assert not (tmp_path/'canary').exists()

def test_S5_scores_of_objects(folder, tmp_path):
    "A file of scores can hold pickled objects: it is reported as damaged"
    path = folder/'evidence'/'test.npz'
    payload = np.empty(1, object)
    payload[0] = Payload(tmp_path/'canary')
    np.savez(path, **{name: payload for name in np.load(path).files})
    with small_run.guard(folder):
        page = report(folder).path.read_text()
    assert 'The scores for the pictures are damaged' in page
    assert not (tmp_path/'canary').exists()

def npy(shape, dtype, data):
    "A .npy file whose header and data need not agree"
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, dict(shape=shape, fortran_order=False, descr=dtype))
    return file.getvalue() + data

# case: (name of the members of the archive, their content, whether the report calls them damaged)
SCORES = {
    'giant': ('{}.npy', npy((10**6, 10**6), '<f2', b'x'), True),
    'bomb': ('{}.npy', npy((64, 64), '<f2', bytes(10**7)), True),
    'type': ('{}.npy', npy((64, 64), '<U9', bytes(64 * 64 * 36)), True),
    'short': ('{}.npy', npy((64, 64), '<f2', b'xx'), True),
    'paths': ('../../{}.npy', b'', False),
}

@pytest.mark.parametrize('kind', SCORES)
def test_S5_scores_that_unfold_to_something_else(folder, kind):
    """A header that promises a terabyte, megabytes in a kilobyte, another type, too few bytes: damaged. Names that are
    paths: ignored"""
    member, data, damaged = SCORES[kind]
    path = folder/'evidence'/'test.npz'
    names = np.load(path).files
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(member.format(name), data)
    with small_run.guard(folder), small_run.in_time():
        page = report(folder).path.read_text()
    assert ('The scores for the pictures are damaged' in page) == damaged
    assert 'image/jpeg' not in page

@pytest.mark.parametrize('kind', ['a pickle', "torch's archive of one"])
def test_S5_weights_to_start_from(tmp_path, kind):
    "A local file of pretrained weights is read without unpickling"
    file = tmp_path/'w.pt'
    payload = Payload(tmp_path/'canary')
    if kind == 'a pickle':
        file.write_bytes(pickle.dumps(payload))
    else:
        torch.save(dict(state_dict=payload), file)
    with small_run.guard(), pytest.raises(ConfigError, match='cannot be read'):
        build(Model(architecture='unet', encoder='resnet18', weights=str(file)))
    assert not (tmp_path/'canary').exists()

# ---------------------------------------------------------------- S6: the run folder

LEDGER, ENVIRONMENT, LOG = '../../../test_ledger.json', 'environment.json', 'log.jsonl'
BEST, CALIBRATION = 'model/metrics.json', 'model/calibration.json'

def log_line(**fields):
    "A line of a log: an epoch"
    epoch = dict(event='epoch', epoch=3, step=30, seconds=1.)
    return json.dumps(epoch | fields) + '\n'

STAGE_OF_NUMBERS = json.dumps(dict(event='stage', first=1, last=2, frozen=[1])) + '\n'

# case: (file; its content, or fields of its JSON; part of the message)
RUN_FILES = {
    'ledger of a list': (LEDGER, '[]', 'test_ledger.json'),
    'ledger of texts': (LEDGER, '{"x": {"config": 1, "rule": null, "looks": "many"}}', 'test_ledger.json'),
    'ledger cut off': (LEDGER, '{"x": ', 'test_ledger.json'),
    'environment of a list': (ENVIRONMENT, '[]', 'environment.json'),
    'versions of a list': (ENVIRONMENT, dict(versions=[1]), 'environment.json'),
    'manifest of a list': (ENVIRONMENT, dict(manifest_hash=[1]), 'environment.json'),
    'a commit that is a command': (ENVIRONMENT, dict(git_commit='x; rm -rf ~'), 'git_commit'),
    'metrics of texts': (BEST, dict(metrics={'pr_auc@1': '0.5'}), 'metrics.json'),
    'metrics at no ratio': (BEST, dict(metrics={'pr_auc@x': .5}), 'metrics.json'),
    'unknown metrics': (BEST, dict(metrics={'magic@1': .5}), 'magic@1'),
    'calibration of a list': (CALIBRATION, '[]', 'calibration.json'),
    'calibration of null': (CALIBRATION, '{"none": null}', 'calibration.json'),
    'no calibration of these views': (CALIBRATION, '{}', 'calibration.json'),
    'a log without an epoch': (LOG, '{"event": "start", "device": "cpu"}\n', 'holds no epoch'),
    'a log of lists': (LOG, '[]\n', 'log.jsonl'),
    'an epoch in words': (LOG, log_line(epoch='three'), 'log.jsonl'),
    'a giant epoch': (LOG, log_line(epoch=10**30), 'log.jsonl'),
    'a formula in a legend': (LOG, log_line(**{'train/loss/$\\frac{$': 1.}), 'log.jsonl'),
    'a number that no figure holds': (LOG, log_line(**{'train/loss/focal': 1e308}), 'log.jsonl'),
    'frozen parts of numbers': (LOG, log_line() + STAGE_OF_NUMBERS, 'log.jsonl'),
    'a log of bytes': (LOG, b'\xff\xfe\x00\n', 'log.jsonl'),
    'a config of tags': (CONFIG, '!!python/object/apply:os.system [id]', 'config.yaml'),
    'a config of aliases': (CONFIG, 'a: &a [1]\nb: [*a, *a]\n', 'aliases'),
}

@pytest.mark.parametrize('kind', RUN_FILES)
def test_S6_notes_of_a_run_that_lie(folder, capsys, kind):
    "The report names the file and exits with 2"
    name, content, why = RUN_FILES[kind]
    path = folder/name
    if isinstance(content, dict):
        change_json(path, **content)
    else:
        path.write_bytes(as_bytes(content))
    if name.startswith('model/'):
        # the list of digests agrees with the lie
        seal_model(folder/'model')
    with small_run.guard():
        message = command_error(capsys, rtsseg_report, run=str(folder))
    assert why in message
    assert not (folder/'report.html').exists()

@pytest.mark.parametrize('change, why', [
    (dict(slope='1.0'), 'slope'),
    (dict(slope=0.), 'slope'),
    (dict(slope=-1.), 'slope'),
    (dict(intercept=None), 'intercept'),
    (dict(ratio=1.5), 'ratio'),
    (dict(fits={}), 'fits'),
    (dict(shifts={}), 'ratios of its parts differ'),
    (dict(quality={}), 'ratios of its parts differ'),
    (dict(method='magic'), 'fits'),
    (dict(held_out={'temperature': None}), 'held_out'),
    (dict(views='full'), "of views 'full' as that of 'none'"),
    (dict(code='x'), 'code'),
    (dict(temperature=10**400), 'temperature'),
    (dict(thresholds={'1': {}}), 'thresholds.1'),
])
def test_S6_a_calibration_that_lies(folder, capsys, change, why):
    "Fields, types, ranges, and parts that belong together"
    path = folder/'model'/'calibration.json'
    known = json.loads(path.read_text())
    known['none'] |= change
    path.write_text(json.dumps(known))
    seal_model(folder/'model')
    with small_run.guard():
        message = command_error(capsys, rtsseg_report, run=str(folder))
    assert why in message
    assert 'rtsseg-calibrate' in message
    # and the command that the message names makes it again
    with small_run.guard(folder.parents[2]):
        rtsseg_calibrate(run=str(folder))
    assert Calibration.load(path).slope > 0
    assert load_model(folder/'model')

def without_region(table, description):
    return table.drop_columns('region'), description

def first_tile_twice(table, description):
    return pa.concat_tables([table, table.slice(0, 1)]), description

def without_rows(table, description):
    return table.slice(0, 0), description

def text_description(text):
    return lambda table, description: (table, text)

# case: (change of table and description, part of the message)
EVIDENCE = {
    'a column missing': (without_region, "no column 'region'"),
    'a column of another type': (column('region', constant(1)), 'region is int64'),
    'negative counts': (
        column('pos_counts', lambda old: pa.array([[-1] * len(v) for v in old.to_pylist()], pa.list_(pa.int32()))),
        'pos_counts is',
    ),
    'counts that overflow': (column('neg_counts', lists(lambda v: [2**32 - 1] * len(v))), 'n_valid is not'),
    'empty cells': (column('positive', constant(None, pa.bool_())), 'positive has empty cells'),
    'lists of unequal length': (column('neg_counts', lists(lambda v: v + [1])), 'differ in length'),
    'codes out of order': (column('neg_codes', lists(lambda v: v[::-1])), 'do not ascend'),
    'another number of pixels': (column('n_valid', constant(7)), 'n_valid is not'),
    'a threshold of another grid': (column('predicted', first_item(threshold=.123)), 'predicted.threshold'),
    'an object without area': (column('truth', first_item(area=0)), 'truth: an id'),
    'a score that is NaN': (column('predicted', first_item(score=float('nan'))), 'score'),
    'an infinite object': (column('predicted', first_item(size=float('inf'))), 'predicted: an id'),
    'a pair without its object': (column('pairs', first_item(truth=99)), 'not there'),
    'a pair larger than its objects': (column('pairs', first_item(intersection=10**6)), 'larger than its objects'),
    'bands that do not fit': (column('bands', first_item(intersection=10**6)), 'bands'),
    'a tile twice': (first_tile_twice, 'twice'),
    'thresholds in words': (described(thresholds=['0.5']), 'thresholds'),
    'thresholds beyond 1': (described(thresholds=[.5, 7.]), 'thresholds'),
    'bins backwards': (described(bins=[3., -3.]), 'bins'),
    'bins of null': (described(bins=None), 'bins'),
    'views of a number': (described(views=3), 'views'),
    'other views': (described(views='full'), 'views full'),
    'exact in words': (described(exact='yes'), 'exact'),
    'another format': (described(format=1), 'format'),
    'a description that is a list': (text_description(b'[1]'), 'format'),
    'a description cut off': (text_description(b'{"for'), 'is not an evidence file'),
    'no rows': (without_rows, ''),
    'another split': (column('split', constant('train')), 'evidence of train'),
}

@pytest.mark.parametrize('kind', EVIDENCE)
def test_S6_evidence_that_lies(folder, capsys, kind):
    "Calibration and report both refuse it, and name the command that makes it again"
    change, why = EVIDENCE[kind]
    change_evidence(folder, change)
    kept = (folder/'model'/'calibration.json').read_bytes()
    with small_run.guard():
        for command in (rtsseg_calibrate, rtsseg_report):
            message = command_error(capsys, command, run=str(folder))
            assert why in message
            if why:
                assert 'val.parquet' in message
                assert 'rtsseg-evaluate --run' in message
    assert (folder/'model'/'calibration.json').read_bytes() == kept

def test_S6_evidence_that_unfolds_without_end(folder):
    "A file of some kilobytes that claims millions of values is not unfolded"
    path = evidence_path(folder, 'val')
    metadata = pq.read_table(path).schema.metadata
    rows = pa.table({'region': pa.array(['x'] * 3_000_000)})
    pq.write_table(rows.replace_schema_metadata(metadata), path)
    assert path.stat().st_size < 20_000
    with pytest.raises(ValueError, match='would unpack to far more'):
        Evidence.read(path)

# a reader of files that a user names, and the endings that it knows
READERS = {
    read_scenes: ['.csv', '.parquet', '.geoparquet', '.gpkg', '.json', '.geojson', '.ndjson'],
    read_features: ['.gpkg', '.parquet', '.geojson'],
    digest: ['.csv'],
    Evidence.read: ['.parquet'],
}

@pytest.mark.parametrize('read, suffix', [(read, suffix) for read, suffixes in READERS.items() for suffix in suffixes])
def test_S6_no_reader_waits_for_a_pipe(tmp_path, read, suffix):
    path = tmp_path/f'pipe{suffix}'
    os.mkfifo(path)
    with small_run.in_time(), pytest.raises(RtssegError, match=f'pipe{suffix}'):
        read(path)

def test_S6_a_link_to_itself_is_a_message(tmp_path):
    loop = tmp_path/'scene.tif'
    loop.symlink_to(loop)
    with pytest.raises((RuntimeError, OSError)) as error:
        loop.resolve(strict=True)
    code, message = error_outcome(error.value, resumes=False)
    assert code == 2
    assert 'scene.tif' in message

def test_S6_a_pipe_in_the_place_of_a_style_stays(tmp_path):
    os.mkfifo(tmp_path/'map.qml')
    with small_run.in_time():
        write_style(tmp_path/'map.tif', mask_style())
    assert (tmp_path/'map.qml').is_fifo()

@pytest.mark.parametrize('name', [CONFIG, CALIBRATION, 'evidence/val.parquet', ENVIRONMENT, LOG])
@pytest.mark.parametrize('kind', ['pipe', 'folder', 'link out'])
def test_S6_no_regular_file(folder, capsys, tmp_path, name, kind):
    "The report does not wait for a pipe, and does not follow a link out of the run"
    path = folder/name
    replace_by_no_file(path, kind, tmp_path/'outside')
    with small_run.guard(), small_run.in_time():
        message = command_error(capsys, rtsseg_report, run=str(folder))
    assert path.name in message

# ---------------------------------------------------------------- S7: writing stays inside

def lead_out(path, outside, content):
    "Replace a file or folder by a link to its content elsewhere; one that is missing, by a link to something of others"
    if path.is_dir():
        shutil.move(path, outside)
    elif path.exists():
        outside.write_bytes(path.read_bytes())
        path.unlink()
    elif content is None:
        outside.mkdir()
        (outside/'figure-1.png').write_text('mine')
    else:
        outside.write_text(content)
    path.symlink_to(outside)

@pytest.mark.parametrize('name', [
    'log.jsonl',
    'evidence',
    'model',
    'report_files',
    '../../../.test_ledger.lock',
    '../../../test_ledger.json',
])
def test_S7_links_that_lead_writers_out(folder, tmp_path, capsys, name):
    "Every command that writes refuses, and the target of the link is unchanged"
    outside = tmp_path/'outside'
    lead_out(folder/name, outside, None if name == 'report_files' else 'mine')
    before = contents(outside)
    commands = [
        (rtsseg_evaluate, dict(run=str(folder), split='test')),
        (rtsseg_calibrate, dict(run=str(folder))),
        (rtsseg_report, dict(run=str(folder))),
    ]
    failed = 0
    with small_run.guard(folder.parents[2]):
        for command, given in commands:
            try:
                command(**given)
            except SystemExit as error:
                assert error.code == 2
                failed += 1
    assert failed
    assert 'leads out of' in capsys.readouterr().err
    assert contents(outside) == before

@pytest.mark.parametrize('name', [
    '.lock',
    'log.jsonl',
    'config.yaml',
    'launch.yaml',
    'environment.json',
    'tracker.jsonl',
    'tracker.json',
    'unread.json',
    'checkpoints',
    'evidence',
    'model',
])
def test_S7_links_that_lead_training_out(folder, tmp_path, name):
    "A run is not started, resumed or moved in a folder that writes elsewhere"
    outside = tmp_path/'outside'
    lead_out(folder/name, outside, None if name == 'checkpoints' else 'mine\nhalf')
    before = contents(outside)
    cfg = load(folder/'config.yaml').model_copy(update=dict(runs=folder.parents[2]))
    for command in (train, launch, force_config):
        with pytest.raises(FileError, match=f'{name} leads out of'):
            command(cfg)
    assert contents(outside) == before

SPOOL = dict(
    event='begin',
    time=1,
    tags={},
    params={},
    key='k',
    name='n',
    experiment='e',
    parent='',
    runs='../../..',
    uri='http://127.0.0.1:9',
)
SPOOL_END = dict(event='end', time=2, status='FINISHED')

def write_spool(folder, *events):
    "Events for a tracker that has got none of them"
    (folder/'tracker.json').unlink(missing_ok=True)
    (folder/'tracker.jsonl').write_text(''.join(json.dumps(event) + '\n' for event in events))

def test_S7_a_spool_that_would_send_other_files(folder, tmp_path):
    "Only files of the folder are delivered, and the folder does not decide to which address"
    root = folder.parents[2]
    uri = f"sqlite:///{root/'mlflow.db'}"
    secret = root/'secret'
    secret.write_text('mine')
    elsewhere = [dict(runs='../../../..'), dict(runs='../../elsewhere'), dict(runs='/tmp')]
    for change in (*elsewhere, dict(key=1), dict(tags=[])):
        write_spool(folder, SPOOL | change)
        assert deliver(folder, uri) == 0
    for files in (['../../../secret'], ['../secret'], [str(secret)], ['..'], 'log.jsonl'):
        write_spool(folder, SPOOL_END | dict(files=files))
        assert left(folder, 'x') == 0
    (folder/'linked').symlink_to(secret)
    write_spool(folder, SPOOL, SPOOL_END | dict(files=['linked']))
    with pytest.raises(FileError, match='leads out'):
        deliver(folder, uri)
    (folder/'linked').unlink()
    write_spool(folder, SPOOL, SPOOL_END | dict(files=['log.jsonl']))
    rtsseg_track(str(folder))
    sent = {path.name for path in tmp_path.rglob('**/artifacts/*')}
    assert 'log.jsonl' in sent
    assert not sent & {'secret', 'linked'}

def looks(root):
    "The looks at the test split of the only data in a ledger"
    entry, = json.loads((root/'test_ledger.json').read_text()).values()
    return entry['looks']

def test_S7_the_ledger_is_that_above_the_run(folder, tmp_path):
    "A config that names another runs folder does not have a look recorded there"
    root, other = folder.parents[2], tmp_path/'elsewhere'
    path = folder/'config.yaml'
    path.write_text(re.sub('(?m)^runs: .*$', f'runs: {other}', path.read_text()))
    assert load(path).runs == other
    before = len(looks(root))
    with small_run.guard(root):
        evaluate(folder, 'test')
    assert not other.exists()
    assert len(looks(root)) == before + 1

@pytest.mark.parametrize('content', [b'[]', b'{', b'null', b'{"x": []}', b'\x80'])
def test_S7_nobody_looks_past_a_broken_ledger(folder, capsys, content):
    "It is not known then who has seen the test split: the split is not read, and the ledger is not overwritten"
    path = folder.parents[2]/'test_ledger.json'
    path.write_bytes(content)
    log = (folder/'log.jsonl').read_text()
    message = command_error(capsys, rtsseg_evaluate, run=str(folder), split='test')
    assert 'test_ledger.json' in message
    assert 'bring it back from a copy' in message
    assert path.read_bytes() == content
    assert (folder/'log.jsonl').read_text() == log

# ---------------------------------------------------------------- S8: other weights

@pytest.mark.parametrize('split', ['val', 'test'])
def test_S8_evidence_of_other_weights(folder, capsys, split):
    "After another training under the same name, numbers of the old weights are not reported as those of the new ones"
    path = folder/'model'/'model.safetensors'
    weights = load_file(path)
    weights[BIAS] += 1e-3
    path.write_bytes(save(weights))
    seal_model(folder/'model')
    if split == 'test':
        # the evidence of validation is that of the new weights
        evaluate(folder)
        change_json(folder/'model'/'metrics.json', metrics={})
        seal_model(folder/'model')
        calibrate(folder)
    else:
        assert 'was made by other weights' in command_error(capsys, rtsseg_calibrate, run=str(folder))
    message = command_error(capsys, rtsseg_report, run=str(folder))
    assert f'{split}.parquet was made by other weights' in message
    assert 'rtsseg-evaluate --run' in message
    assert f'--split {split}' in message

def test_S8_evidence_names_its_model(folder):
    "By the digest in the model's list; it does not count as content"
    digests = dict(line.split('  ')[::-1] for line in (folder/'model'/SEAL).read_text().splitlines())
    path = evidence_path(folder, 'val')
    evidence = Evidence.read(path)
    assert evidence.model == digests['model.safetensors'][:12]
    assert evidence.select([0, 1]).model == evidence.model
    assert (evidence + evidence).model == evidence.model
    before = evidence.hash
    evidence.model = ''
    assert evidence.hash == before
    assert (evidence + Evidence.read(path)).model == ''

# ---------------------------------------------------------------- S9: markup

class Page(HTMLParser):
    "What a browser would execute or fetch"

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.attributes = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(name, value or '') for name, value in attributes]

    def handlers(self):
        "Attributes that run code"
        return [name for name, _ in self.attributes if name.startswith('on')]

    def addresses(self):
        "What is linked or fetched"
        return [value for name, value in self.attributes if name in ('src', 'href')]

EVIL = '<img src=x onerror=alert(1)></script><script>alert(1)</script>&"\'`${1}[x](javascript:alert(1))\n# h'
REASONS = 'why', 'method_why', 'temperature_why', 'temperature_enough', 'monotone_why'

def evil_reasons(tree):
    "A calibration with markup in each of its texts"
    if not isinstance(tree, dict):
        return tree
    return {key: EVIL if key in REASONS else evil_reasons(value) for key, value in tree.items()}

def append_reason(folder, reason):
    "Add the end of a run, with its reason, to the log"
    with open(folder/'log.jsonl', 'a') as file:
        file.write(json.dumps(dict(event='end', reason=reason, epoch=2, step=20, best=2)) + '\n')

def spoil_with_markup(folder):
    "Markup in region, tile, block, reasons, environment and ledger of a run"
    for split in ('val', 'test'):
        change_evidence(folder, prefixed(EVIL, 'tile_id', 'region', 'block'), split)
    calibrate(folder)
    path = folder/'model'/'calibration.json'
    path.write_text(json.dumps(evil_reasons(json.loads(path.read_text()))))
    seal_model(folder/'model')
    machine = dict(system=EVIL, python=EVIL, rtsseg=EVIL, processor=EVIL, cpus=EVIL)
    change_json(folder/'environment.json', versions={EVIL: EVIL}, **machine)
    append_reason(folder, EVIL)
    ledger = folder.parents[2]/'test_ledger.json'
    entries = json.loads(ledger.read_text())
    for entry in entries.values():
        entry.update(config=EVIL, rule=EVIL)
        entry['looks'].append(dict(config=EVIL, rule=EVIL, when=EVIL, seed=1, forced=True))
    ledger.write_text(json.dumps(entries))

def test_S9_markup_in_every_text(folder):
    """Region, tile, block, reasons, device, versions: each is shown as it is written, and the page gets no further
    element, handler or address"""
    plain = Page(report(folder).path.read_text())
    spoil_with_markup(folder)
    path = report(folder).path
    text = path.read_text()
    page = Page(text)
    assert page.tags.count('script') == plain.tags.count('script') == 2
    assert set(page.tags) <= set(plain.tags) | {'details', 'summary', 'ul', 'li', 'p'}
    assert not page.handlers()
    assert all(re.match(r'#|data:image/(png|jpeg);base64,', address) for address in page.addresses())
    # the only script that may run is the page's own, by its digest
    script, = re.findall('<script>(.*?)</script>', text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search('Content-Security-Policy" content="([^"]+)"', text)[1]
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    assert '<img src=x' not in text
    assert html.escape('<img src=x onerror=alert(1)>') in text
    assert text.count('onerror') > 10
    # the Markdown, as a renderer that lets HTML through shows it
    markdown = mistune.create_markdown(escape=False, plugins=['table'])
    shown = Page(markdown(path.with_suffix('.md').read_text()))
    assert 'script' not in shown.tags
    assert not shown.handlers()
    assert all(address.startswith('report_files/') for address in shown.addresses())

# clear the screen, in two ways, overwrite the line, read backwards, take no space
HIDDEN = '\x1b[2J\x9b1m\x85\r\u2028\u202egnihton\u2066\u200bä'
SHOWN = r'\u202egnihton\u2066\u200bä'

def printable(text):
    "The text, which holds no character that steers a terminal"
    assert all(c.isprintable() or c == '\n' for c in text)
    return text

def test_S9_control_characters_are_escaped(folder, capsys):
    """On the page, in the appendix and in the terminal each is written as Python writes it, so that nothing is steered
    or turned around"""
    for split in ('val', 'test'):
        change_evidence(folder, prefixed(HIDDEN, 'region', 'tile_id'), split)
    rtsseg_calibrate(run=str(folder))
    printed = printable(capsys.readouterr().out)
    assert 'Region \\x1b[2J' in printed
    assert SHOWN in printed
    change_json(folder/'environment.json', versions={HIDDEN: HIDDEN}, system=HIDDEN)
    append_reason(folder, HIDDEN)
    rtsseg_report(run=str(folder))
    printable(capsys.readouterr().out)
    for name in ('report.html', 'report.md'):
        assert printable((folder/name).read_text()).count('u202egnihton') > 5
    change_json(folder/'model'/'metrics.json', **{HIDDEN: 1})
    seal_model(folder/'model')
    assert SHOWN in printable(command_error(capsys, rtsseg_report, run=str(folder)))

# ---------------------------------------------------------------- S10: any byte

DAMAGED = [
    *(f'model/{name}' for name in (SEAL, *SEALED) if name != 'post_hoc.yaml'),
    CONFIG,
    ENVIRONMENT,
    LOG,
    'evidence/val.parquet',
    'evidence/test.parquet',
    'evidence/test.npz',
    LEDGER,
]

@pytest.fixture(scope='module')
def example(whole, tmp_path_factory):
    "A copy of the run, an image, and its logits"
    folder = copy_runs(whole, tmp_path_factory.mktemp('fuzz')/'runs')
    # as a model has it whose images were converted
    (folder/'model'/'source.json').write_text(Conversion().model_dump_json())
    seal_model(folder/'model', 'source.json')
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return folder, x, predict_logits(load_model(folder/'model').model, x)

def damage(content, where, bit):
    "Flip a bit of a byte, or (bit 8) cut the content there"
    at = int(where * len(content))
    if bit == 8:
        return content[:at]
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1:]

def check_loads_the_same(example, name, resealed):
    "The model gives the same logits, or loading it fails; a change that the list of digests covers is noticed"
    folder, x, want = example
    try:
        with torch.no_grad():
            found = predict_logits(load_model(folder/'model').model, x)
    except ModelError:
        return
    is_listed = name != f'model/{SEAL}'
    assert resealed or not is_listed, f'{name} was changed, and nobody noticed'
    assert resealed or torch.equal(found, want)

def check_tables_name_the_file(folder, path):
    "The report's tables are made, or the error names the file"
    try:
        tables(folder)
    except KNOWN as error:
        message = str(error)
        of_two_files = 'evidence is of other weights' in message or 'different tiles' in message
        assert path.name in message or path.suffix in ('.yaml', '.json') or of_two_files, error

@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    name=st.sampled_from(DAMAGED),
    where=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 8),
    reseal=st.booleans(),
)
def test_S10_any_byte(example, name, where, bit, reseal):
    "Whether the list of digests notices the damage, or was written again over it"
    folder = example[0]
    path = folder/name
    before, seal = path.read_bytes(), (folder/'model'/SEAL).read_bytes()
    path.write_bytes(damage(before, where, bit))
    if reseal and name.startswith('model/') and SEAL not in name:
        seal_model(folder/'model', path.name)
    try:
        with small_run.guard(folder.parents[2]):
            if name.startswith('model/'):
                check_loads_the_same(example, name, reseal)
            check_tables_name_the_file(folder, path)
    finally:
        (folder/'model'/SEAL).write_bytes(seal)
        path.write_bytes(before)
