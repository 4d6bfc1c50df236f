"The land-cover system from its config alone: it learns, resumes to the same bytes, is evaluated, reported and compared"
import json
import shutil
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from helpers.refiners import KnowsTruth
from helpers.shell import Program, held, running, shell
from helpers.waiting import wait_for
from rtsseg.ablation import ablate
from rtsseg.checkpoint import load_state
from rtsseg.class_export import export_classes, other_images, session_of, write_class_onnx
from rtsseg.class_metrics import sum_counts
from rtsseg.class_tiles import ClassSamples
from rtsseg.class_world import make_class_world
from rtsseg.config import ConfigError, find_system, load, to_yaml
from rtsseg.console import DataError
from rtsseg.distil import Teacher
from rtsseg.evaluation import evaluate
from rtsseg.results import read_results
from rtsseg.runs import judge_run, keep_post_hoc, read_log, run_config, run_folder
from rtsseg.systems.landcover import LandcoverTask
from rtsseg.training import train
from rtsseg.weights import ModelError

ROOT = Path(__file__).resolve().parent.parent
OWN_PARTS = ['cross_entropy', 'dice', 'lovasz', 'boundary', 'edge']
PARTS = [*OWN_PARTS, 'teacher_features', 'teacher_logits']
LIVELY = dict(mixing=dict(mixup=dict(p=.3), cutmix=dict(p=.3), same='group'),
              unfreeze=dict(share=.5, groups=2, every=1),
              loss=dict(parts=OWN_PARTS, hardest=.4, label_smoothing=.1, edge=dict(target='distance', loss='dice')),
              loss_weights=dict(boundary=.01))

@pytest.fixture(scope='module')
def land(tmp_path_factory):
    return make_class_world(tmp_path_factory.mktemp('land')/'land', side=96, images=12)

def config(land, runs, **more):
    "configs/landcover/toy.yaml on a smaller land"
    small = dict(runs=runs, epochs=3, tracker=dict(kind='none'), windows=dict(side=64, stride=48),
                 data=dict(source=land, sides=[64], made=None))
    return load(ROOT/'configs'/'landcover'/'toy.yaml', **small | more)

@pytest.fixture(scope='module')
def teacher(land, tmp_path_factory):
    "The model directory of a short run"
    return train(config(land, tmp_path_factory.mktemp('teacher'), epochs=1, seed=7))/'model'

def taught_by(teacher):
    return dict(teacher=str(teacher), compares=['features', 'logits'])

@pytest.fixture(scope='module')
def lively(land, teacher, tmp_path_factory):
    "A run with everything that draws at random or changes with time, and with all that training alone has"
    return train(config(land, tmp_path_factory.mktemp('runs'), distil=taught_by(teacher), **LIVELY))

def test_it_learns(land, tmp_path):
    "More than the largest class everywhere would give: its share of the pixels, over seven classes"
    cfg = config(land, tmp_path, epochs=10, batch_size=2)
    folder = train(cfg)
    rows = read_log(folder)
    assert len(rows) == 10 and rows[-1]['train/loss/cross_entropy'] < .8*rows[0]['train/loss/cross_entropy']
    system = find_system('landcover')
    true = sum_counts(system.read_table(evaluate(folder, 'val')).frame).confusion.sum(1)
    assert rows[-1]['val/miou'] > 1.5*true.max()/true.sum()/7

def test_killed_and_started_again_it_ends_in_the_same_bytes(land, teacher, lively, tmp_path):
    "kill -9 after the first epoch: crops, mixing, unfreezing, helpers and weights are those of the undisturbed run"
    cfg = config(land, tmp_path/'runs', checkpoint=dict(resume_minutes=1e-6), distil=taught_by(teacher), **LIVELY)
    (tmp_path/'cfg.yaml').write_text(to_yaml(cfg))
    folder = run_folder(cfg, find_system('landcover').feed(cfg).hash)
    with running(Program('rtsseg-train', '--config', tmp_path/'cfg.yaml', '--inline', env=held(folder, 1))) as process:
        wait_for(lambda: 'epoch   1/3' in process.printed() or process.poll() is not None)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert train(cfg) == folder
    weights = [(f/'model'/'model.safetensors').read_bytes() for f in (folder, lively)]
    assert weights[0] == weights[1]

def test_helpers_train_and_are_left_behind(lively, teacher):
    "Edge head and projection are in the training state, and neither they nor the teacher are in the model"
    state = load_state(lively/'checkpoints'/'resume.ckpt')
    assert set(state['modules']) == {'edge.weight', 'edge.bias', 'project.weight', 'project.bias'}
    rows = read_log(lively)
    assert {name.removeprefix('train/loss/') for name in rows[-1] if name.startswith('train/loss/')} == set(PARTS)
    assert {name.removeprefix('val/loss/') for name in rows[-1] if name.startswith('val/loss/')} == set(PARTS[:3])
    packed, other = (find_system('landcover').unpack(folder) for folder in (lively/'model', teacher))
    assert packed.model.state_dict().keys() == other.model.state_dict().keys()
    assert str(teacher) not in (lively/'model'/'config.yaml').read_text()

def test_a_teacher_that_is_gone_is_named(land, tmp_path):
    lost = dict(distil=dict(teacher=str(tmp_path/'gone')))
    with pytest.raises(ConfigError, match='no such model directory or checkpoint'):
        train(config(land, tmp_path/'runs', **lost))
    assert not (tmp_path/'runs').exists()

def test_a_teacher_is_shown_images_of_every_side(land, tmp_path, monkeypatch):
    "A vision transformer of fixed positions takes one side alone"
    vit = timm.create_model('test_vit', img_size=64, dynamic_img_size=False)
    monkeypatch.setattr('rtsseg.systems.landcover.load_teacher', lambda distil: Teacher(vit, [.5] * 3, [.5] * 3))

    def task(*sides):
        data = dict(source=land, sides=sides, made=None)
        return LandcoverTask(config(land, tmp_path, data=data, distil=dict(teacher='some/teacher')), None)

    assert task(64).teacher
    with pytest.raises(ConfigError, match='no images of 96 pixels'):
        task(64, 96).teacher  # noqa: B018

def test_evaluation_finds_the_numbers_of_training_again(lively):
    "Check 6 of guide 002: the same windows in both"
    cfg, system = load(lively/'config.yaml'), find_system('landcover')
    found = system.metrics(system.read_table(evaluate(lively, 'val')), cfg)
    best = json.loads((lively/'model'/'metrics.json').read_text())
    assert found == pytest.approx({name: best['metrics'][name] for name in found}, abs=1e-9, nan_ok=True)

def test_views_and_clean_up_are_compared(lively):
    "Each way of looking has a table; the report says what it gains, and which one is in use"
    clean = dict(min_area=dict(building=6), min_width=dict(road=2), otsu=['water'])
    judge_run(lively, [f'clean_up={json.dumps(clean)}'])
    system, names = find_system('landcover'), ('none', 'scales', 'none-clean')
    tables = {views: system.read_table(evaluate(lively, 'val', views)) for views in names}
    maps = [sum_counts(table.frame).confusion for table in tables.values()]
    assert not (maps[0] == maps[1]).all() and not (maps[0] == maps[2]).all()
    results, = read_results(lively)
    blocks = system.sections(results)['Views and clean-up']
    table = blocks[0].frame
    assert list(table.index) == ['none (in use)', 'scales', 'none-clean']
    cfg = load(lively/'config.yaml')
    miou = [100*system.metrics(table, cfg)['miou'] for table in tables.values()]
    assert list(table['miou, %']) == pytest.approx(miou)
    assert table.loc['scales', 'gain, points'] == pytest.approx(miou[1] - miou[0])
    assert 'were not compared' in system.missing_before_test(lively, 'flips')
    assert not system.missing_before_test(lively, 'scales')

def test_outlines_are_drawn_again_where_a_trial_says_so(lively, tmp_path, monkeypatch):
    "One that knows the truth gains, and only after its trial may it change every map, as it was tried"
    refiner = tmp_path/'sam.ts'
    refiner.write_text('one')
    system, cfg = find_system('landcover'), load(lively/'config.yaml')
    feed = system.feed(cfg)
    knows = KnowsTruth(feed.samples, cfg.data.values)
    monkeypatch.setattr('rtsseg.systems.landcover.load_refiner', lambda cfg, device: knows)
    judge_run(lively, ['refine.where=all', 'refine.min_area=4', f'refine.model={refiner}'])
    with pytest.raises(ConfigError, match='needs a trial on validation'):
        evaluate(lively, 'val', 'none-refined')
    trial = system.refine(lively, run_config(lively))
    assert trial.passes and trial.gain > .01 and 'refine.where: all may be used' in trial.text
    found = json.loads((lively/'evidence'/'refinement.json').read_text())
    assert trial.gain == pytest.approx(found['arms']['sam']['boundary'] - found['arms']['none']['boundary'])
    assert found['arms']['sam']['miou'] > found['arms']['none']['miou']
    evaluated = system.metrics(system.read_table(evaluate(lively, 'val', 'none-refined')), cfg)
    assert evaluated['miou'] == pytest.approx(found['arms']['sam']['miou'])
    # what was tried is not tried again, and nothing else is allowed by it
    with monkeypatch.context() as closed:
        closed.setattr('rtsseg.systems.landcover.refinement_arms', None)
        assert system.refine(lively, run_config(lively)) == trial
    others = {'refine.band=3': 'other band', 'refine.classes=[road]': 'other classes',
              'refine.points=2': 'other points', 'refine.crf_iterations=5': 'needs a trial',
              'refine.least_gain=0.9': 'More than 90 points'}
    for override, why in others.items():
        usual = run_config(lively)
        judge_run(lively, [override])
        with pytest.raises(ConfigError, match=why):
            evaluate(lively, 'val', 'none-refined')
        keep_post_hoc(lively, usual)
    with pytest.raises(ConfigError, match='other views'):
        evaluate(lively, 'val', 'flips-refined')
    refiner.write_text('another')
    with pytest.raises(ConfigError, match='other refiner'):
        evaluate(lively, 'val', 'none-refined')
    refiner.write_text('one')
    path = lively/'evidence'/'refinement.json'
    path.write_text(path.read_text().replace(found['tried']['weights'], 64 * '0'))
    with pytest.raises(ConfigError, match='other weights'):
        evaluate(lively, 'val', 'none-refined')
    # an image that is not named stays as it is
    judge_run(lively, ['refine.where=regions', 'refine.regions=[nowhere]'])
    tables = [system.read_table(evaluate(lively, 'val', views)) for views in ('none', 'none-refined')]
    assert tables[0].frame.equals(tables[1].frame)
    results, = read_results(lively)
    assert 'points of boundary IoU' in system.sections(results)['Refinement'][0].text
    judge_run(lively, ['refine.where=off', 'refine.model=null'])

def test_a_refiner_that_is_not_there_is_named(lively):
    done = shell('rtsseg-refine', '--run', lively)
    assert done.returncode == 2 and 'refine.model: nothing is named' in done.stderr

def test_two_models_become_one(land, lively, tmp_path):
    "Its weights are fitted on validation, where it is at least as good as either; then it is a run like any other"
    other = train(config(land, tmp_path/'runs', epochs=2, seed=44))
    done = shell('rtsseg-ensemble', '--models', other, lively, '--weights', 'fit')
    assert done.returncode == 0, done.stdout + done.stderr
    folder, = other.parents[1].glob('*/ensemble-44-42')
    system, cfg = find_system('landcover'), load(folder/'config.yaml')
    scores = [system.metrics(system.read_table(evaluate(run, 'val')), cfg)['miou'] for run in (folder, other, lively)]
    assert scores[0] >= max(scores[1:])
    assert sum(member.share for member in cfg.members) == pytest.approx(1)
    done = shell('rtsseg-report', '--run', folder)
    assert done.returncode == 0 and f'{cfg.members[0].share:.2f} × seed 44' in (folder/'report.html').read_text()

def test_commands_serve_it(land, tmp_path):
    "Trained, evaluated and reported from a file; the page shows the classes"
    (tmp_path/'cfg.yaml').write_text(to_yaml(config(land, tmp_path/'runs', epochs=1)))
    for command in ('train', 'evaluate', 'report'):
        done = shell(f'rtsseg-{command}', '--config', tmp_path/'cfg.yaml')
        assert done.returncode == 0, done.stdout + done.stderr
    page, = tmp_path.glob('runs/landcover_toy/*/seed42/report.html')
    text = page.read_text()
    assert all(word in text for word in ('most often taken for', 'agriculture', 'biou', 'miou', 'What next',
                                         '--split test', 'lowest share of right pixels'))
    assert text.count('data:image/png') >= 3

def test_it_labels_a_folder_of_images(lively, land, tmp_path):
    "The maps of an evaluation, from a model directory and files alone; what cannot be read is named"
    images = shutil.copytree(land/'Val'/'Urban'/'images_png', tmp_path/'images')
    (images/'broken.png').write_bytes(b'no image')
    given = '--model', lively/'model', '--scene', images, '--out', tmp_path/'labels'
    done = shell('rtsseg-predict', *given)
    assert done.returncode == 0 and 'broken.png' in done.stdout + done.stderr
    evaluate(lively, 'val')
    names = {path.stem for path in images.glob('*.png')} - {'broken'}
    with zipfile.ZipFile(lively/'evidence'/'val.worst.zip') as archive:
        kept = {Path(name).stem: archive.read(name) for name in archive.namelist() if 'Urban' in name}
    assert kept and {path.stem for path in (tmp_path/'labels').glob('*.png')} == names
    for name, found in kept.items():
        assert (tmp_path/'labels'/f'{name}.png').read_bytes() == found
    # what is there is kept, and other views need another folder
    first = (tmp_path/'labels'/f'{min(names)}.png').stat().st_mtime_ns
    assert shell('rtsseg-predict', *given).returncode == 0
    assert (tmp_path/'labels'/f'{min(names)}.png').stat().st_mtime_ns == first
    refused = shell('rtsseg-predict', *given, '--views', 'flips')
    assert refused.returncode == 2 and 'made with other views' in refused.stderr

def test_its_model_is_exported(lively, tmp_path):
    "By the command of all systems: every file agrees with the library as far as its precision lets it"
    done = shell('rtsseg-export', '--model', lively/'model', '--out', tmp_path/'out')
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path/'out'/'export.json').read_text())
    shares = {name: parity['agreement'] for name, parity in found['files'].items()}
    assert set(shares) == {'model.onnx', 'model.torchscript.pt', 'model_fp16.onnx', 'model_int8.onnx'}
    splits = find_system('landcover').feed(run_config(lively)).samples.table.set_index('sample').split
    assert [{*splits[found[what]]} for what in ('compared_on', 'calibrated_on')] == [{'val'}, {'train'}]
    assert found['takes'] == dict(images='any number', side='a multiple of 32 pixels')
    assert shares['model.onnx'] == shares['model.torchscript.pt'] == 1 and min(shares.values()) > .7
    assert all(parity['milliseconds'] > 0 for parity in found['files'].values())
    refused = shell('rtsseg-export', '--model', lively/'model', '--out', tmp_path/'two', '--formats', 'qgis')
    assert refused.returncode == 2 and "'qgis' is not one of onnx" in refused.stderr

def packaged(cfg, folder, **network):
    "The model directory of an untrained network"
    system = find_system('landcover')
    cfg, feed = cfg.model_copy(update=dict(model=cfg.model.model_copy(update=network))), system.feed(cfg)
    folder.mkdir()
    system.package(folder, system.model(cfg, feed), cfg, feed, dict(epoch=1, step=1, value=.5, metrics={}), {})
    return folder

def test_a_network_of_one_size_is_exported_at_the_size_of_a_window(land, tmp_path):
    "The positions of a vision transformer are those of the image that an exporter follows"
    cfg = config(land, tmp_path)
    model = packaged(cfg, tmp_path/'vit', architecture='dpt', encoder='tu-test_vit.r160_in1k')
    found = export_classes(model, tmp_path/'out', ['onnx', 'fp16', 'torchscript'], land)
    assert json.loads((tmp_path/'out'/'export.json').read_text())['takes'] == dict(images=1, side=64)
    assert found['model.onnx'].agreement == found['model.torchscript.pt'].agreement == 1
    run, packed = session_of(tmp_path/'out'/'model.onnx'), find_system('landcover').unpack(model)
    with pytest.raises(Exception, match='(?i)dimension'):
        run(other_images(packed, 64))

def test_images_smaller_than_a_window_are_compared_too(land, tmp_path):
    cfg = config(land, tmp_path, windows=dict(side=128, stride=128))
    found = export_classes(packaged(cfg, tmp_path/'small'), tmp_path/'out', ['torchscript'], land)
    assert found['model.torchscript.pt'].agreement == 1

def test_a_table_without_validation_images_is_refused(land, tmp_path):
    root = shutil.copytree(land, tmp_path/'land')
    table = ClassSamples.read(root).table
    table[table.split == 'train'][['image', 'mask', 'split']].to_csv(root/'list.csv', index=False)
    model = packaged(config(land, tmp_path), tmp_path/'model')
    with pytest.raises(DataError, match='no image in val: files are compared'):
        export_classes(model, tmp_path/'out', ['torchscript'], root/'list.csv')
    assert not (tmp_path/'out').exists()

class Odd(nn.Module):
    "A network with an operator that ONNX does not have"

    def forward(self, x):
        return torch.linalg.eigvals(x @ x.transpose(2, 3)).real[..., None] + x

def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    with pytest.raises(ModelError, match='cannot be exported to ONNX') as failed:
        write_class_onnx(Odd(), torch.rand(1, 3, 32, 32), tmp_path/'odd.onnx')
    assert 'linalg_eigvals' in str(failed.value)

def test_a_land_is_made_where_the_config_says_so(tmp_path):
    data = dict(source=tmp_path/'new', sides=[64], made=dict(side=64, images=8))
    cfg = config(tmp_path/'new', tmp_path/'runs', data=data)
    assert find_system('landcover').feed(cfg, prepare=True).size('train') == 8

def test_a_grid_compares_losses(land, tmp_path):
    (tmp_path/'grid.yaml').write_text('loss.parts: [[cross_entropy], [cross_entropy, lovasz]]')
    found = ablate(config(land, tmp_path/'runs', epochs=1), tmp_path/'grid.yaml', [42, 43])
    assert found.monitor == 'miou' and np.isfinite(found.values).all() and not found.failed

def test_a_search_tries_its_settings(land, tmp_path):
    "By the command of all systems; its overlay holds the settings of the best trial"
    (tmp_path/'cfg.yaml').write_text(to_yaml(config(land, tmp_path/'runs', epochs=1)))
    (tmp_path/'space.yaml').write_text('lr.base_lr: {low: 1e-4, high: 1e-2, log: true}\nloss.hardest: [1, 0.4]\n')
    done = shell('rtsseg-search', '--config', tmp_path/'cfg.yaml', '--space', tmp_path/'space.yaml', '--trials', '2')
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [path.parents[1] for path in tmp_path.glob('runs/landcover_toy/*/seed42/model/metrics.json')]
    values = [json.loads((run/'model'/'metrics.json').read_text())['value'] for run in runs]
    assert len(runs) == 2 and f'miou {max(values):.4f}' in done.stdout
    overlay, = tmp_path.glob('runs/search/*/best.yaml')
    best, chosen = run_config(runs[values.index(max(values))]), load(tmp_path/'cfg.yaml', overlay)
    assert (chosen.lr.base_lr, chosen.loss.hardest) == (best.lr.base_lr, best.loss.hardest)

def test_baseline_is_that_of_the_guide():
    "Guide 002, 1.2, number for number"
    cfg = load(ROOT/'configs'/'landcover'/'baseline.yaml')
    assert (cfg.model.architecture, cfg.model.encoder, cfg.model.weights) == ('segformer', 'mit_b2', 'imagenet')
    assert (cfg.data.sides, cfg.epochs, cfg.loss_weights) == ([512], 50, dict(cross_entropy=.7, dice=.3))
    assert (cfg.lr.base_lr, cfg.lr.backbone_lr_multiplier, cfg.optimizer.weight_decay) == (6e-5, .65, .01)
    assert (cfg.optimizer.clip_norm, cfg.ema.decay, cfg.batch_size) == (1., .999, 8)
    assert 2 <= cfg.accumulate <= 4 and 10 <= cfg.early_stopping.patience <= 15
    assert (cfg.windows.side, cfg.windows.stride) == (1024, 768)

def test_a_monitor_that_no_metric_has_is_refused(land, tmp_path):
    with pytest.raises(ConfigError, match="validation gives no 'iou_river'"):
        train(config(land, tmp_path, epochs=1, metrics=dict(monitor='iou_river')))

def test_what_a_run_logs(land, tmp_path):
    "Guide 002, monitoring: losses, rates, time, norm of the gradient, and mIoU of the average and of the raw weights"
    folder = train(config(land, tmp_path, epochs=1, ema=dict(compare=True)))
    row, = read_log(folder)
    for name in ('train/loss/cross_entropy', 'train/loss/dice', 'val/loss', 'lr/encoder', 'lr/decoder', 'seconds',
                 'images_per_second', 'grad_norm/mean', 'grad_norm/max', 'val/miou', 'val/raw/miou', 'val/macc',
                 'val/accuracy', 'val/biou_2', 'val/biou_3', 'val/iou_road'):
        assert name in row, name
