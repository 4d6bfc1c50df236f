"An ensemble is the mean of its members, and a model like any other: whole, evaluated, calibrated, mapped, exported"
import json
import os
import shutil

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.special import expit
from torch import nn

from helpers.maps import map_bytes, noise, read_map, statistics, untrained_model, write_scene
from helpers.runs import trained
from rtsseg.calibration import Calibration, calibrate
from rtsseg.cli import rtsseg_predict
from rtsseg.config import ConfigError, RtsConfig, find_system, hashed_settings, load
from rtsseg.ensemble import ensemble, model_of_several
from rtsseg.evaluation import Locked, evaluate
from rtsseg.evidence import Evidence
from rtsseg.export import MOST_DIFFERENCE, export_model, inspect_model, show_model, verify_model
from rtsseg.files import SEAL, digest, seal_model
from rtsseg.infer import STATS, VIEWS, Ensemble, load_model, predict_logits
from rtsseg.mapfile import NODATA, STEPS
from rtsseg.prediction import calibration_settings, predict
from rtsseg.reporting import report
from rtsseg.results import read_results, read_run
from rtsseg.weights import WEIGHTS, ModelError

# ---------------------------------------------------------------- the mean

class Random(nn.Module):
    "A convolution of random weights"
    def __init__(self, draw, scale):
        super().__init__()
        generator = torch.Generator().manual_seed(draw)
        self.kernel = scale * torch.randn(1, 3, 3, 3, generator=generator)

    def forward(self, x):
        return nn.functional.conv2d(x, self.kernel, padding=1)

@settings(max_examples=30)
@given(draws=st.lists(st.integers(0, 99), min_size=2, max_size=6), views=st.sampled_from(sorted(VIEWS)),
       scale=st.sampled_from([.1, 1, 10]))
def test_the_probability_is_the_mean_over_members_and_views(draws, views, scale):
    members = [Random(draw, scale) for draw in draws]
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    alone = [expit(predict_logits(member, x, views).double().numpy()) for member in members]
    together = expit(predict_logits(Ensemble(members), x, views).double().numpy())
    np.testing.assert_allclose(together, np.mean(alone, axis=0), rtol=1e-5, atol=1e-7)

# ---------------------------------------------------------------- model directories alone

@pytest.fixture(scope='module')
def models(tmp_path_factory):
    "Model directories of three networks, one of them of another architecture"
    root = tmp_path_factory.mktemp('models')
    small = dict(decoder_pyramid_channels=64, decoder_segmentation_channels=32)
    return [untrained_model(root/'a'), untrained_model(root/'b', draw=1),
            untrained_model(root/'c', draw=2, architecture='fpn', options=small)]

@pytest.fixture(scope='module')
def together(tmp_path_factory, models):
    return ensemble(models, tmp_path_factory.mktemp('ensemble')/'model')

@pytest.fixture(scope='module')
def scene(tmp_path_factory):
    return write_scene(tmp_path_factory.mktemp('scene')/'scene.tif', noise(100, 130))

def test_a_map_is_the_mean_of_the_maps_of_its_members(models, together, scene, tmp_path):
    "Up to the rounding of each map to half a step"
    alone = []
    for number, model in enumerate(models):
        predict(model, scene, out=tmp_path/f'{number}.tif')
        alone.append(read_map(tmp_path/f'{number}.tif').astype(float))
    predict(together, scene, out=tmp_path/'mean.tif')
    found = read_map(tmp_path/'mean.tif').astype(float)
    valid = found != NODATA
    assert valid.any() and np.ptp(found[valid]) > STEPS / 10
    np.testing.assert_allclose(found[valid], np.mean(alone, axis=0)[valid], atol=1.01)

def test_neither_the_order_of_members_nor_a_move_changes_a_byte_of_a_map(models, together, scene, tmp_path):
    "The weights are the same file, and the note of the map names the same model"
    other = ensemble(models[::-1], tmp_path/'made'/'model')
    assert {path.name: digest(path) for path in other.iterdir()} == {p.name: digest(p) for p in together.iterdir()}
    moved = shutil.move(other, tmp_path/'moved')
    pair = ensemble(models[:2], tmp_path/'pair')
    maps = {}
    for name, model in dict(first=together, second=moved, other=pair).items():
        predict(model, scene, out=tmp_path/name/'map.tif')
        maps[name] = map_bytes(tmp_path/name/'map.tif')
    assert maps['first'] == maps['second']
    # the digest of the model covers every member
    assert json.loads(maps['first'][1])['model'] != json.loads(maps['other'][1])['model']

@pytest.mark.parametrize('name', [WEIGHTS, STATS, 'config.yaml', 'metrics.json'])
@pytest.mark.parametrize('damage', ['changed', 'missing'])
def test_a_damaged_ensemble_does_not_load(together, tmp_path, name, damage):
    folder = shutil.copytree(together, tmp_path/'model')
    if damage == 'missing':
        (folder/name).unlink()
    else:
        data = bytearray((folder/name).read_bytes())
        data[-1] ^= 1
        (folder/name).write_bytes(data)
    with pytest.raises(ModelError, match=f'{name} (is|cannot)'):
        load_model(folder)

def test_weights_of_a_member_that_are_missing_are_named(together, tmp_path):
    "Also where the list of digests was made again"
    folder = shutil.copytree(together, tmp_path/'model')
    kept = {name: t for name, t in load_file(folder/WEIGHTS).items() if not name.startswith('members.1.')}
    save_file(kept, folder/WEIGHTS)
    seal_model(folder)
    with pytest.raises(ModelError, match=r"weights missing \['members\.1\."):
        load_model(folder)

def test_an_ensemble_is_inspected_and_verified(together, models):
    found = inspect_model(together)
    assert len(found['members']) == 3 and found['validation']['epoch'] is None
    assert found['network']['weights'] == sum(inspect_model(model)['network']['weights'] for model in models)
    shown = show_model(found)
    assert 'the mean of 3 models (unet with tu-test_efficientnet and fpn with tu-test_efficientnet)' in shown
    assert all(f'seed {seed}: ' in shown and digest(model/WEIGHTS)[:12] in shown
               for seed, model in zip((42, 43, 44), models, strict=True))
    assert set(verify_model(together)) == {path.name for path in together.iterdir()} - {SEAL}

def test_the_onnx_file_of_an_ensemble_holds_all_members(models, tmp_path):
    "The export holds it against the library, on tiles of two sizes and through several views"
    pair = ensemble(models[1:], tmp_path/'pair')
    assert export_model(pair, tmp_path/'out', ('onnx',), 'minimal')['model.onnx'] <= MOST_DIFFERENCE
    network = onnx.load(tmp_path/'out'/'model.onnx')
    numbers = sum(np.prod(each.dims, dtype=int) for each in network.graph.initializer)
    weights = [sum(p.numel() for p in load_model(model).model.parameters()) for model in models[1:]]
    # batch normalisation is folded into convolutions
    assert numbers > .9 * sum(weights)
    own = json.loads({each.key: each.value for each in network.metadata_props}['rtsseg'])
    assert [member[:8] for member in own['members']] == ['seed 43:', 'seed 44:']

# ---------------------------------------------------------------- a run folder

@pytest.fixture(scope='module')
def members(tmp_path_factory):
    "Run folders of two seeds, evaluated on validation"
    root = tmp_path_factory.mktemp('runs')
    folders = [trained(root, draw, seed=seed)[0] for draw, seed in enumerate((43, 42))]
    for folder in folders:
        evaluate(folder)
        calibrate(folder)
    return folders

@pytest.fixture(scope='module')
def judged(members):
    "Their ensemble: evaluated, calibrated and tested"
    folder = ensemble(members)
    evaluate(folder)
    calibrate(folder)
    evaluate(folder, 'test')
    return folder

def test_an_ensemble_lies_beside_its_members(members, judged):
    assert judged.name == 'ensemble-42-43'
    assert judged.parent.parent == members[0].parent.parent and judged.parent != members[0].parent
    card = (judged/'model'/'README.md').read_text()
    assert all(f'Member: seed {seed}: ' in card and digest(folder/'model'/WEIGHTS)[:12] in card
               for seed, folder in zip((43, 42), members, strict=True))

def test_the_evidence_of_an_ensemble_is_of_the_mean(members, judged):
    "The scores of tiles that it keeps, in half precision"
    assert Evidence.read(judged/'evidence'/'val.parquet').model == digest(judged/'model'/WEIGHTS)[:12]
    together, *alone = [np.load(folder/'evidence'/'val.npz') for folder in (judged, *members)]
    tiles = set(together.files).intersection(*(each.files for each in alone))
    assert tiles
    for tile in tiles:
        mean = np.mean([expit(each[tile].astype(float)) for each in alone], axis=0)
        np.testing.assert_allclose(expit(together[tile].astype(float)), mean, atol=1e-3)

def test_an_ensemble_is_calibrated_as_one(members, judged, scene, tmp_path):
    "By its own evidence, and a map takes it"
    found, *alone = [Calibration.load(folder/'model'/'calibration.json', 'none') for folder in (judged, *members)]
    assert found.evidence == Evidence.read(judged/'evidence'/'val.parquet').hash
    assert found.evidence not in {each.evidence for each in alone}
    predict(judged/'model', scene, out=tmp_path/'map.tif')
    note = json.loads((tmp_path/'map.tif.json').read_text())
    assert note['calibration'] == calibration_settings(found)

def test_models_named_together_are_their_ensemble(members, judged, scene, tmp_path, capsys):
    "The run folder that is there, with its calibration; once that is gone, a map says so"
    named = [str(members[0]), str(members[1]/'model')]
    rtsseg_predict(model=named, scene=str(scene), out=str(tmp_path/'named.tif'))
    predict(judged/'model', scene, out=tmp_path/'one.tif')
    assert (tmp_path/'named.tif').read_bytes() == (tmp_path/'one.tif').read_bytes()
    assert 'not calibrated' not in capsys.readouterr().err
    hidden = (judged/'model'/'calibration.json').rename(tmp_path/'calibration.json')
    try:
        assert model_of_several(named) == judged/'model'
    finally:
        hidden.rename(judged/'model'/'calibration.json')
    assert f'rtsseg calibrate --run {os.path.relpath(judged)}' in capsys.readouterr().err

def test_a_report_says_what_an_ensemble_is(judged, tmp_path):
    made = report(judged, tmp_path/'report.html')
    page = (tmp_path/'report.md').read_text()
    assert made.split == 'test' and not made.results[0].doubt
    for expected in ('ensemble of seeds 42, 43', 'is not trained: its members are', 'rtsseg-ensemble --models small/'):
        assert expected in page.replace('runs/small', 'small')
    assert 'rtsseg-train' not in page and 'seed 42' not in page.replace('seed 42: unet', '')

def test_seeds_are_not_joined_by_their_ensemble(members, judged):
    "A report over all of them compares two configurations"
    groups = read_results([*members, judged])
    assert [group.seeds for group in groups] == [[42, 43], [42]]
    assert [run.title for group in groups for run in group.runs] == ['seed 42', 'seed 43', 'ensemble of seeds 42, 43']

def test_a_look_of_the_ensemble_is_its_own(members, judged):
    "Its members would look a second time at the test split"
    assert [look['config'] for look in read_run(judged).test_looks] == [judged.parent.name]
    with pytest.raises(Locked):
        evaluate(members[0], 'test')

def test_the_same_ensemble_is_not_made_twice(members, judged):
    with pytest.raises(ConfigError, match='exists'):
        ensemble(members[::-1])

# ---------------------------------------------------------------- what is refused

def test_all_that_stands_against_an_ensemble_is_said_at_once(models, members, tmp_path):
    larger = untrained_model(tmp_path/'larger', tile=96, draw=5)
    wider = untrained_model(tmp_path/'wider', statistics(['ndvi']), draw=6)
    unfinished = shutil.copytree(members[0], tmp_path/'unfinished', ignore=shutil.ignore_patterns('model'))
    with pytest.raises(ConfigError) as error:
        ensemble([models[0], larger, wider, unfinished, models[0]], tmp_path/'new')
    said = str(error.value)
    for expected in ('data.tile_size is 96, and 64', "bands is ['R', 'G', 'B', 'ndvi'], and ['R', 'G', 'B']",
                     'the run is not trained', 'the same weights as'):
        assert expected in said
    assert not (tmp_path/'new').exists()

def test_an_ensemble_is_not_trained(together):
    cfg = load(together/'config.yaml')
    with pytest.raises(ConfigError, match='an ensemble is not trained'):
        find_system('rts').model(cfg, None)

def test_a_config_without_members_keeps_its_hash():
    assert 'members' not in hashed_settings(RtsConfig())
