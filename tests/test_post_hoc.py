"Another way to judge a trained model does not make another run: ratios, targets, views and thresholds"
import hashlib
import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.maps import noise, write_scene
from helpers.runs import run, tiny
from rtsseg.calibration import calibrate, calibrate_evidence, show_calibration
from rtsseg.cli import main, rtsseg_calibrate, rtsseg_evaluate, rtsseg_report
from rtsseg.config import Calibrate, ConfigError, Metrics, load, post_hoc_settings
from rtsseg.console import DataError
from rtsseg.evaluation import Locked, evaluate
from rtsseg.evidence import Evidence, Meter, evidence_path
from rtsseg.invented import invent_ledger, invent_run
from rtsseg.manifest import read_manifest
from rtsseg.prediction import predict
from rtsseg.reporting import report
from rtsseg.results import ReportError, read_results
from rtsseg.runs import config_hash, read_log, run_config
from rtsseg.system import find_run
from rtsseg.toy import scored_tiles
from rtsseg.training import train

# ---------------------------------------------------------------- the hash

ratio = st.one_of(st.just('native'), st.integers(1, 10**6))
share = st.floats(.01, .99)
widths = st.lists(st.integers(1, 9), max_size=4)

POST_HOC_VALUES = {
    'metrics.ratios': st.lists(ratio, min_size=1, max_size=5),
    'metrics.object_thresholds': st.lists(share, max_size=5),
    'metrics.boundary_widths': widths,
    'metrics.min_area': st.integers(0, 999),
    'metrics.replicates': st.integers(1, 999),
    'metrics.draws': st.integers(1, 99),
    'calibrate.ratio': ratio,
    'calibrate.method': st.sampled_from(['temperature', 'slope_intercept']),
    'calibrate.target_precision': share,
    'calibrate.min_areas': st.lists(st.integers(0, 999), min_size=1, max_size=5),
    'calibrate.min_recall': share,
    'calibrate.min_region_positives': st.integers(1, 99),
    'infer.views': st.sampled_from(['none', 'minimal', 'standard', 'full']),
    'card.intended_use': st.text('abc ', max_size=9),
    'card.sensor': st.text('abc ', max_size=9),
    'card.years': st.lists(st.integers(1, 3000), max_size=3),
    'data.object': st.sampled_from(['slump', 'building', 'solar panel']),
    'card.limits': st.lists(st.text('abc ', max_size=9), max_size=3),
}

DECIDING = ['metrics.monitor=pr_auc@native', 'metrics.reference_threshold=0.4', 'loss.gamma=1', 'epochs=7',
            'lr.base_lr=1', 'data.tile_size=256', 'sampler.hard_negatives=0.5', 'model.encoder=resnet18']

BASE = load()

def overrides(values):
    return [f'{name}={json.dumps(value)}' for name, value in values.items()]

@settings(max_examples=40, deadline=None)
@given(st.fixed_dictionaries({}, optional=POST_HOC_VALUES), st.one_of(st.none(), st.sampled_from(DECIDING)))
def test_what_is_post_hoc_leaves_the_hash_and_what_trains_changes_it(values, deciding):
    cfg = load(overrides=[*overrides(values), *([deciding] if deciding else [])])
    assert (config_hash(cfg, 'data') == config_hash(BASE, 'data')) == (deciding is None)
    # each value was read as it was written
    for name, value in values.items():
        section, field = name.split('.')
        assert getattr(getattr(cfg, section), field) == value

def test_every_post_hoc_setting_is_among_them():
    named = {f'{section}.{name}' for section, fields in post_hoc_settings(BASE).items() for name in fields}
    assert named == set(POST_HOC_VALUES)

# ---------------------------------------------------------------- native

def test_native_is_the_ratio_of_the_split():
    "40 positive and 400 negative tiles are 1:10, so each number at native is that at 1:10"
    logits, masks, table = scored_tiles(40, 400)
    meter = Meter(table, (.3, .5, .7))
    meter.update(logits.astype(np.float16), masks, np.arange(len(table)))
    metrics = Metrics(ratios=['native', 10], replicates=50)
    found, same = (calibrate_evidence(meter.evidence(), Calibrate(ratio=r, target_precision=.5), metrics)
                   for r in ('native', 10))
    assert found.ratio == 'native'
    assert found.temperature == pytest.approx(same.temperature)
    for points in (found.thresholds, found.objects, found.object_thresholds):
        native, ten = (points[r].model_dump(exclude={'why'}) for r in ('native', 10))
        assert str(native) == str(ten)
    assert found.shifts == pytest.approx({'native': 0, 10: 0})
    assert found.quality['native'].shifted.nll.value == pytest.approx(found.quality[10].shifted.nll.value)
    text = show_calibration(found)
    assert 'probabilities at native' in text and '1:10' in text
    assert '1:native' not in text + repr(found) + found._repr_html_()

def test_native_is_stored_and_read_again(tmp_path):
    logits, masks, table = scored_tiles(20, 100)
    meter = Meter(table)
    meter.update(logits.astype(np.float16), masks, np.arange(len(table)))
    metrics = Metrics(ratios=[2, 'native'], replicates=20)
    found = calibrate_evidence(meter.evidence(), Calibrate(ratio='native'), metrics)
    path = found.save(tmp_path/'calibration.json')
    assert set(json.loads(path.read_text())['none']['thresholds']) == {'2', 'native'}
    assert type(found).load(path) == found
    assert found.point('native') == found.thresholds['native']
    with pytest.raises(KeyError, match='there are 1:2, native'):
        found.point(7)

@pytest.fixture(scope='module')
def native_cfg(tmp_path_factory):
    root = tmp_path_factory.mktemp('native')
    small = tiny(root)
    judged = dict(ratios=['native', 2], replicates=20, object_thresholds=[.25, .5, .75])
    return load(name='r', runs=root/'runs', data=small.data.model_dump(), epochs=2, metrics=judged,
                calibrate=dict(ratio='native', target_precision=.5))

def test_a_report_at_the_native_ratio(native_cfg):
    world = read_manifest(native_cfg.data.manifest)
    folder = invent_run(native_cfg, world).folder
    invent_ledger(native_cfg, world, seeds=(42,))
    done = report(folder)
    assert list(done.headline.head) == ['metric', 'native (as in the split)', '1:2']
    results = read_results(folder)[0]
    assert not results.doubt
    for text in (done.path.read_text(), done.path.with_suffix('.md').read_text(), str(done)):
        assert 'native' in text and '1:native' not in text
    assert ': native; ' not in results.forced

# ---------------------------------------------------------------- a run that was trained before

def digests(folder):
    "What training and evaluation wrote"
    names = ['config.yaml', 'model/model.safetensors', 'model/config.yaml', 'evidence/val.parquet']
    return [hashlib.sha256((folder/name).read_bytes()).hexdigest() for name in names]

def test_another_prevalence_needs_no_training(tmp_path):
    cfg = tiny(tmp_path, metrics=dict(replicates=20))
    folder = train(cfg)
    evaluate(folder)
    calibrate(folder)
    before, log = digests(folder), (folder/'log.jsonl').read_bytes()
    given = ['metrics.ratios=[100, native]', 'calibrate.target_precision=0.9']
    config = str(folder/'config.yaml')
    rtsseg_calibrate(config=config, override=given)
    stored = json.loads((folder/'model'/'calibration.json').read_text())['none']
    assert list(stored['thresholds']) == ['100', 'native']
    assert stored['target_precision'] == .9
    # what was given is kept for later commands
    assert calibrate(folder).target_precision == .9
    assert digests(folder) == before and (folder/'log.jsonl').read_bytes() == log
    # training again with it finds the run, and trains nothing
    assert train(load(config, overrides=given)) == folder
    assert digests(folder) == before and len(read_log(folder)) == cfg.epochs
    # without it, the run is judged as before
    assert find_run(cfg) == folder
    assert not (folder/'post_hoc.yaml').exists() and calibrate(folder).target_precision == .8

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    return run(tmp_path_factory.mktemp('made'))

@pytest.fixture
def folder(made, tmp_path):
    "A run that was evaluated, calibrated at 1:1 and tested; what a test does to it is undone"
    root = made.parents[2]
    shutil.copytree(root, tmp_path/'kept')
    yield made
    shutil.rmtree(root)
    shutil.copytree(tmp_path/'kept', root)

def test_a_named_run_is_judged_otherwise_and_not_trained_otherwise(folder, capsys):
    rtsseg_calibrate(run=str(folder), override=['metrics.ratios=[native]'])
    assert run_config(folder).metrics.ratios == ['native']
    with pytest.raises(SystemExit) as stopped:
        rtsseg_calibrate(run=str(folder), override=['metrics.ratios=[2]', 'lr.base_lr=1'])
    assert stopped.value.code == 2
    assert 'a run folder has its own config: leave out lr.base_lr' in capsys.readouterr().err
    assert run_config(folder).metrics.ratios == ['native']

def test_a_report_says_which_settings_the_calibration_lacks(folder):
    with pytest.raises(SystemExit):
        rtsseg_report(run=[str(folder)], override=['calibrate.min_areas=[3]'])
    with pytest.raises(ReportError, match=r'calibrate.min_areas .* → \[3\]\): rtsseg-calibrate --run '):
        report(folder)
    assert calibrate(folder).min_areas == [3]
    report(folder)

@pytest.mark.parametrize('given', ['metrics.object_thresholds=[0.2, 0.4]', 'metrics.boundary_widths=[1]'])
def test_what_evidence_does_not_hold_needs_a_pass(folder, given):
    asked = load(folder/'config.yaml', overrides=[given])
    assert find_run(asked) == folder
    with pytest.raises(DataError, match='rtsseg-evaluate --run .* --split val --views none makes it again'):
        calibrate(folder)
    rtsseg_evaluate(run=str(folder))
    calibrate(folder)
    evidence = Evidence.read(evidence_path(folder, 'val'))
    assert set(evidence.thresholds) == {*asked.metrics.object_thresholds, .5}
    assert set(evidence.nested('bands').width) == set(asked.metrics.boundary_widths)

def test_other_views_need_a_pass(folder):
    find_run(load(folder/'config.yaml', overrides=['infer.views=minimal']))
    with pytest.raises(DataError, match='rtsseg-evaluate --run .* --split val --views minimal makes it'):
        calibrate(folder)
    evaluate(folder)
    assert calibrate(folder).views == 'minimal'

def test_a_map_is_made_through_the_views_that_were_calibrated(folder, tmp_path):
    "The model directory says so itself: a copy of it answers as the one in the run folder, and then as it was trained"
    scene = write_scene(tmp_path/'scene.tif', noise(64, 64))

    def views_of(model):
        return predict(model, scene, tmp_path/'map.tif', force=True)['views']

    assert views_of(folder/'model') == 'none'
    rtsseg_evaluate(run=str(folder), override=['infer.views=minimal'])
    rtsseg_calibrate(run=str(folder))
    copied = shutil.copytree(folder/'model', tmp_path/'model')
    assert views_of(folder/'model') == views_of(copied) == 'minimal'
    rtsseg_calibrate(run=str(folder), override=['infer.views=none'])
    assert views_of(folder/'model') == 'none'

def test_a_rule_that_was_changed_after_the_look_is_noticed(folder):
    assert not read_results(folder)[0].doubt
    find_run(load(folder/'config.yaml', overrides=['calibrate.target_precision=0.6']))
    calibrate(folder)
    with pytest.raises(Locked, match='precision ≥ 0.3 .* with precision ≥ 0.6'):
        evaluate(folder, 'test')
    doubt = read_results(folder)[0].doubt
    assert 'precision ≥ 0.3' in doubt and 'became precision ≥ 0.6' in doubt
    assert doubt in report(folder).path.with_suffix('.md').read_text()

def contents(root):
    "The bytes of all files below a folder"
    return {path: path.read_bytes() for path in root.rglob('*') if path.is_file()}

def test_a_job_that_may_not_read_the_test_split_changes_nothing(folder, capsys):
    "Nor does it train; what it says is a remedy that exists"
    before = contents(folder.parents[2])
    assert main(['run', '--config', str(folder/'config.yaml'), '--override', 'metrics.ratios=[1, native]']) == 2
    said = capsys.readouterr().err
    assert 'at 1:1; reading it again with precision' in said and 'at 1:1, native would' in said
    assert 'rtsseg-evaluate --split test --force' in said
    assert contents(folder.parents[2]) == before

def test_the_best_validation_is_confirmed_as_it_was_measured(tmp_path):
    "Objects of the best validation were counted at the area floor of the training"
    folder = train(tiny(tmp_path, metrics=dict(replicates=20)))
    find_run(load(folder/'config.yaml', overrides=['metrics.min_area=30']))
    evaluate(folder)
    calibrate(folder)
    assert 'min_area' in (folder/'post_hoc.yaml').read_text()
    report(folder)

def test_a_damaged_overlay_is_named(folder):
    (folder/'post_hoc.yaml').write_text('metrics: {ratios: [0]}')
    with pytest.raises(ConfigError, match='post_hoc.yaml: metrics.ratios.0: a ratio is a positive whole number'):
        calibrate(folder)
