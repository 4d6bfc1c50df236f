"Models that leave the library: files that stand alone, what other programs read in them, what is refused"
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import rasterio
import torch
from jsonschema import Draft7Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7
from safetensors.torch import load_file, save_file

import rtsseg.export
from helpers.maps import read_map, statistics, untrained_model
from helpers.runs import MODEL
from rtsseg.calibration import calibrate_evidence
from rtsseg.class_world import make_class_world
from rtsseg.cli import rtsseg_model_inspect, rtsseg_model_verify
from rtsseg.config import Calibrate, ConfigError, Metrics, find_system, load
from rtsseg.evidence import Meter
from rtsseg.export import (
    MLM,
    ExportJob,
    deepness_metadata,
    export_model,
    inspect_model,
    show_model,
    size_step,
    verify_model,
)
from rtsseg.files import check_seal, digest, seal_model
from rtsseg.infer import load_model, save_model
from rtsseg.manifest import read_manifest
from rtsseg.models import build
from rtsseg.prediction import NODATA, STEPS, predict
from rtsseg.stats import compute_stats
from rtsseg.systems.landcover import LandcoverConfig
from rtsseg.toy import BANDS, scored_tiles
from rtsseg.weights import ModelError

SCHEMAS = Path(__file__).parent/'schemas'

@pytest.fixture(scope='module')
def calibration():
    "A calibration whose slope and intercept change scores"
    logits, masks, table = scored_tiles()
    meter = Meter(table)
    meter.update(torch.from_numpy(logits), torch.from_numpy(masks), torch.arange(len(table)))
    return calibrate_evidence(meter.evidence(), Calibrate(method='slope_intercept'), Metrics(replicates=20))

@pytest.fixture(scope='module')
def model(tmp_path_factory, tiny_world, calibration):
    "A calibrated model of RGB and EXTRA bands"
    folder = tmp_path_factory.mktemp('calibrated')/'model'
    untrained_model(folder, compute_stats(read_manifest(tiny_world).of('train'), BANDS))
    calibration.save(folder/'calibration.json')
    calibration.model_copy(update=dict(views='full')).save(folder/'calibration.json')
    return folder

@pytest.fixture(scope='module')
def exported(tmp_path_factory, model):
    "All files of its export, and how far each is from the library"
    out = tmp_path_factory.mktemp('exported')/'out'
    return out, export_model(model, out)

def session(path):
    return onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])

# ---------------------------------------------------------------- the files stand alone

def test_an_export_is_complete(model, exported):
    out, differences = exported
    names = {'README.md', 'SHA256SUMS', 'item.json', 'model.onnx', 'model.pt2', 'qgis.onnx'}
    assert {path.name for path in out.iterdir()} == names
    assert set(check_seal(out, names - {'SHA256SUMS'})) == names - {'SHA256SUMS'}
    assert set(differences) == {'model.onnx', 'model.pt2', 'qgis.onnx'}
    assert 0 < max(differences.values()) <= 1e-4
    assert (out/'README.md').read_text() == (model/'README.md').read_text()
    assert not [path for path in out.parent.iterdir() if path != out]

ALONE = """
import sys
import numpy as np
import onnxruntime
model, pixels, out = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=['CPUExecutionProvider'])
np.save(out, session.run(None, {'pixels': np.load(pixels)})[0])
assert not {'torch', 'rtsseg'} & set(sys.modules)
"""

def test_the_file_alone_gives_the_map(tiny_world, model, exported, tmp_path):
    "In a Python that imports numpy and onnxruntime only, a tile gives the pixels that `predict` writes"
    manifest = read_manifest(tiny_world)
    i = next(i for i, name in enumerate(manifest.table.image) if (read_map(manifest.root/name) == 0).any())
    image, extra = (manifest.root/manifest.table[column][i] for column in ('image', 'extra'))
    predict(model, image, tmp_path/'map.tif', extra, 'none')
    wanted = read_map(tmp_path/'map.tif')
    with rasterio.open(image) as rgb, rasterio.open(extra) as more:
        bands = [more.descriptions.index(name) + 1 for name in BANDS]
        pixels = np.concatenate([rgb.read(), more.read(bands)]).astype('float32')
    valid = wanted != NODATA
    assert 0 < valid.mean() < 1
    pixels[:, ~valid] = np.nan
    np.save(tmp_path/'pixels.npy', pixels[None])
    files = [exported[0]/'model.onnx', tmp_path/'pixels.npy', tmp_path/'found.npy']
    subprocess.run([sys.executable, '-c', ALONE, *files], check=True, cwd=tmp_path)
    found = np.load(tmp_path/'found.npy')
    assert found.shape == (1, 1, *wanted.shape)
    assert np.abs(STEPS * found[0, 0] - wanted)[valid].max() <= 1e-4 * STEPS
    assert np.ptp(found) > .1

def test_the_program_takes_other_sizes(exported):
    program = torch.export.load(exported[0]/'model.pt2').module()
    pixels = torch.rand(3, 3 + len(BANDS), 96, 64)
    pixels[:, :3] *= 200
    with torch.no_grad():
        found = program(pixels)
    wanted = session(exported[0]/'model.onnx').run(None, {'pixels': pixels.numpy()})[0]
    assert found.shape == (3, 1, 96, 64)
    assert np.abs(found.numpy() - wanted).max() < 1e-4

# ---------------------------------------------------------------- what other programs read

def test_deepness_reads_what_is_meant(exported, model, calibration):
    "As its source does: `ModelBase.preprocessing`, `Segmentor` and `MapProcessorSegmentation`"
    run = session(exported[0]/'qgis.onnx')
    shape = run.get_inputs()[0].shape
    # a text here is an error in its dialog
    assert shape[1:] == [3 + len(BANDS), 64, 64]
    assert isinstance(shape[0], str)
    # one channel: a sigmoid
    assert run.get_outputs()[0].shape[-3] == 1
    found = {name: json.loads(text) for name, text in run.get_modelmeta().custom_metadata_map.items()}
    assert found['model_type'] == 'Segmentor'
    assert found['class_names'] == [{'0': 'background', '1': 'object'}]
    assert (found['tile_size'], found['tiles_overlap']) == (64, 50)
    # centimetres on the ground
    smallest, largest = load_model(model).stats.pixel_size
    assert 100 * smallest <= found['resolution'] <= 100 * largest
    threshold = calibration.thresholds[calibration.ratio].threshold
    assert found['seg_thresh'] == pytest.approx(min(max(threshold, .01), .99))
    tile = np.random.default_rng(0).uniform(0, 1, (1, 64, 64, shape[1])).astype('float32')
    tile[..., :3] = np.rint(255 * tile[..., :3])
    mean, std = (np.float32(found[f'standardization_{name}']) for name in ('mean', 'std'))
    given = ((np.float32(tile * 1. / 255.) - mean) / std).transpose(0, 3, 1, 2)
    pixels = tile.transpose(0, 3, 1, 2)
    whole = session(exported[0]/'model.onnx').run(None, {'pixels': pixels})[0]
    assert np.abs(run.run(None, {'pixels': given})[0] - whole).max() < 1e-4

def test_a_threshold_that_misses_its_target_is_not_exported(model, calibration):
    "Deepness then takes its own"
    missed = calibration.thresholds[200].model_copy(update=dict(reached=False))
    unreached = calibration.model_copy(update=dict(thresholds=calibration.thresholds | {200: missed}))
    assert 'seg_thresh' in deepness_metadata(ExportJob(load_model(model), 'none', calibration))
    assert 'seg_thresh' not in deepness_metadata(ExportJob(load_model(model), 'none', unreached))

def test_a_file_says_what_is_in_it(model, exported, calibration):
    for name in ('model.onnx', 'qgis.onnx'):
        found = json.loads(session(exported[0]/name).get_modelmeta().custom_metadata_map['rtsseg'])
        assert found['weights'] == digest(model/'model.safetensors')
        assert found['calibration']['promise'] == calibration.promise
        assert found['channels'] == ['R', 'G', 'B', *BANDS]

def validator(name):
    "Of a schema, with those that it refers to"
    uris = {f'https://stac-extensions.github.io/{kind}/v1.1.0/schema.json': f'{kind}-1.1.0.json'
            for kind in ('classification', 'processing', 'raster')}
    resources = [(uri, Resource.from_contents(json.loads((SCHEMAS/file).read_text()), DRAFT7))
                 for uri, file in uris.items()]
    return Draft7Validator(json.loads((SCHEMAS/name).read_text()), registry=Registry().with_resources(resources))

def test_the_item_is_a_stac_item_with_mlm(exported):
    "By the JSON schema of the extension; the fields of the core that it does not look at, by the specification"
    item, check = json.loads((exported[0]/'item.json').read_text()), validator('mlm-1.5.2.json')
    assert check.schema['$id'] == MLM
    assert not list(check.iter_errors(item))
    assert {'type', 'stac_version', 'id', 'geometry', 'properties', 'links', 'assets'} <= set(item)
    assert (item['type'], item['stac_version']) == ('Feature', '1.1.0')
    assert item['properties']['datetime'].endswith('Z')
    for asset in item['assets'].values():
        assert (exported[0]/asset['href']).is_file()
    for field in ('mlm:input', 'mlm:name', 'bands'):
        lacking = item | dict(properties={name: value for name, value in item['properties'].items() if name != field})
        assert list(check.iter_errors(lacking)), field

# ---------------------------------------------------------------- networks

def untrained(folder, bands=(), **network):
    "A model directory of a network with random weights, for tiles of 64 pixels"
    torch.manual_seed(0)
    network = dict(weights=None, in_channels=3 + len(bands)) | network
    cfg = load(batch_size=8, data=dict(tile_size=64, extra_bands=list(bands)), model=network)
    best = dict(epoch=1, value=0., metrics={})
    return save_model(folder, build(cfg.model), cfg, statistics(bands), best, {})

@pytest.mark.parametrize('network', [
    dict(architecture='unet', encoder='resnet18'),
    dict(architecture='unetplusplus', encoder='efficientnet-b0'),
    dict(architecture='segformer', encoder='mit_b0'),
    MODEL | dict(fusion='late', bands=['ndvi', 'slope']),
], ids=['unet', 'unetplusplus', 'segformer', 'late'])
def test_networks_are_exported_for_any_size(tmp_path, network):
    folder = untrained(tmp_path/'model', **network)
    differences = export_model(folder, tmp_path/'out', ['onnx'])
    assert differences['model.onnx'] < 1e-4
    run = session(tmp_path/'out'/'model.onnx')
    channels = run.get_inputs()[0].shape[1]
    found = run.run(None, {'pixels': np.full((1, channels, 32, 96), 100, 'float32')})[0]
    assert found.shape == (1, 1, 32, 96)

def test_views_are_in_the_graph(model, tmp_path):
    "The gate compares with predict's views; those of another setting are not calibrated"
    assert export_model(model, tmp_path/'out', ['onnx'], 'full')['model.onnx'] < 1e-4
    with pytest.raises(ModelError, match="no calibration for views 'minimal'"):
        export_model(model, tmp_path/'new', ['onnx'], 'minimal')

def test_a_network_of_one_size(model, tmp_path, monkeypatch):
    assert size_step(load_model(model)) == 32
    monkeypatch.setattr(rtsseg.export, 'size_step', lambda model: 0)
    export_model(model, tmp_path/'out', ['onnx', 'stac'])
    assert session(tmp_path/'out'/'model.onnx').get_inputs()[0].shape == ['batch', 3 + len(BANDS), 64, 64]
    item = json.loads((tmp_path/'out'/'item.json').read_text())
    assert item['properties']['mlm:input'][0]['input']['shape'] == [-1, 3 + len(BANDS), 64, 64]

def fail(*_):
    raise RuntimeError('an operator that it does not know')

@pytest.mark.slow
def test_the_newer_exporter_takes_over(model, tmp_path, monkeypatch):
    monkeypatch.setattr(rtsseg.export, 'ONNX_EXPORTERS', (fail, rtsseg.export.translated_onnx))
    assert export_model(model, tmp_path/'out', ['onnx', 'qgis'])['qgis.onnx'] < 1e-4
    assert session(tmp_path/'out'/'model.onnx').get_inputs()[0].shape[1] == 3 + len(BANDS)

# ---------------------------------------------------------------- what is refused

def test_a_file_that_differs_is_not_exported(model, tmp_path, monkeypatch):
    monkeypatch.setattr(rtsseg.export, 'MOST_DIFFERENCE', 1e-12)
    monkeypatch.setattr(rtsseg.export, 'ONNX_EXPORTERS', (rtsseg.export.traced_onnx, fail))
    with pytest.raises(ModelError) as raised:
        export_model(model, tmp_path/'out')
    assert 'traced_onnx: model.onnx gives other probabilities than the library' in str(raised.value)
    assert 'fail: an operator that it does not know' in str(raised.value)
    assert not list(tmp_path.iterdir())

def test_a_missing_extra_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr(rtsseg.export, 'find_spec', lambda name: None)
    with pytest.raises(ConfigError, match=r"onnxscript: pip install 'rtsseg\[export\]'"):
        export_model(model, tmp_path/'out')
    assert not list(tmp_path.iterdir())

def test_wrong_arguments_are_named_together(model, tmp_path):
    with pytest.raises(ConfigError) as raised:
        export_model(model, tmp_path, ['stac', 'tensorflow'], 'all')
    assert [line.split(':')[0] for line in str(raised.value).splitlines()] == [
        'out', 'formats', 'formats', 'views']

# ---------------------------------------------------------------- inspect and verify

def test_a_model_directory_is_described(model, calibration):
    found = inspect_model(model)
    assert found['bands'] == ['R', 'G', 'B', *BANDS]
    assert set(found['calibration']) == {'none', 'full'}
    assert found['bytes'] == sum(path.stat().st_size for path in model.iterdir())
    assert found['weights_sha256'] == digest(model/'model.safetensors')
    assert calibration.promise in show_model(found)

def test_a_whole_model_directory_passes(model):
    names = {path.name for path in model.iterdir()} - {'SHA256SUMS'}
    assert verify_model(model) == {name: digest(model/name) for name in names}

def spoil(folder, change):
    "Change the weights of a model directory, and list them as they are then"
    weights = load_file(folder/'model.safetensors')
    change(weights)
    save_file(weights, folder/'model.safetensors')
    seal_model(folder)

def put_nan(weights):
    weights['segmentation_head.0.weight'][0, 0, 0, 0] = torch.nan

@pytest.mark.parametrize('change, words', [
    (put_nan, r"model.safetensors holds numbers that are not finite: \['segmentation_head.0.weight'\]"),
    (lambda weights: weights.pop('segmentation_head.0.bias'), 'model.safetensors does not fit config.yaml: 1 weights'),
    (lambda weights: weights.update(more=torch.zeros(1)), r"0 weights missing \[\], 1 extra \['more'\]"),
])
def test_weights_that_do_not_fit(tmp_path, change, words):
    folder = untrained_model(tmp_path/'model')
    spoil(folder, change)
    with pytest.raises(ModelError, match=words):
        verify_model(folder)

@pytest.mark.parametrize('name', ['README.md', 'config.yaml', 'model.safetensors', 'normalization_stats.json'])
def test_a_changed_file_is_named(tmp_path, name):
    folder = untrained_model(tmp_path/'model')
    with open(folder/name, 'ab') as file:
        file.write(b' ')
    with pytest.raises(ModelError, match=f'^model: {name} is not the file that SHA256SUMS lists'):
        verify_model(folder)

def test_a_model_of_another_system_is_described_and_verified(tmp_path, capsys):
    "By its card, and by loading it"
    make_class_world(tmp_path/'land', side=64, images=4)
    cfg = LandcoverConfig(
        data=dict(source=tmp_path/'land', sides=[64]),
        windows=dict(side=64, stride=48),
        model=dict(architecture='unet', encoder='tu-test_efficientnet', weights=None, normalisation='dataset'),
    )
    system = find_system('landcover')
    feed = system.feed(cfg)
    (tmp_path/'model').mkdir()
    best = dict(epoch=1, step=1, value=.5, metrics={})
    system.package(tmp_path/'model', system.model(cfg, feed), cfg, feed, best, {})
    rtsseg_model_inspect(str(tmp_path/'model'))
    assert 'Labels each pixel of an image with one of 7 classes' in capsys.readouterr().out
    rtsseg_model_verify(str(tmp_path/'model'))
    assert 'files are what was written' in capsys.readouterr().out
    with open(tmp_path/'model'/'classes.json', 'a') as file:
        file.write(' ')
    with pytest.raises(SystemExit):
        rtsseg_model_verify(str(tmp_path/'model'))
    assert 'classes.json' in capsys.readouterr().err
