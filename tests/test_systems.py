"A second system trains, resumes, evaluates and is measured on the shared rooms; a third comes from outside"
import ast
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from helpers.shell import CLEAN, Program, held, running, shell
from helpers.waiting import wait_for
from rtsseg.ablation import ablate
from rtsseg.config import ConfigError, find_system, load, to_yaml
from rtsseg.evaluation import Locked, TestLedger, evaluate, look_of
from rtsseg.log import kept_validations
from rtsseg.noise import measure_noise
from rtsseg.prediction import predict
from rtsseg.runs import read_lines, read_log, run_folder
from rtsseg.system import SampleTable, find_run
from rtsseg.training import train
from rtsseg.tuning import search
from rtsseg.weights import ModelError

ROOT = Path(__file__).parents[1]
# rooms that only a segmentation of tiles needs
RTS_ROOMS = {'audit', 'augment', 'check', 'columns', 'evidence', 'filecheck', 'findings', 'importers', 'infer',
             'losses', 'manifest', 'metrics', 'models', 'objects', 'observe', 'prepare', 'raster', 'rawtile', 'sampler',
             'scores', 'segment', 'shapes', 'splits', 'stats', 'tiles', 'toy', 'calibration', 'figures', 'ground',
             'intervals', 'invented', 'operating', 'pixel_report', 'pixel_results', 'prediction', 'pretrained',
             'tables'}

def imported_rooms(module):
    "Rooms that a module of the library imports, anywhere in it"
    tree = ast.parse((ROOT/'rtsseg'/f'{module}.py').read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            name = (node.module or '').removeprefix('rtsseg.')
            found.add(name.split('.')[0])
    return found

SHARED = ['training', 'evaluation', 'system', 'log', 'noise', 'resume', 'launch', 'track', 'reporting', 'results',
          'shared', 'variants', 'ablation', 'tuning']

@pytest.mark.parametrize('module', SHARED)
def test_shared_rooms_know_no_system(module):
    assert not imported_rooms(module) & (RTS_ROOMS | {'systems'})

def raises_at_once(function):
    "Whether a method of the protocol has no default"
    *_, last = function.body
    return isinstance(last, ast.Raise) and 'NotImplementedError' in ast.unparse(last)

def test_the_page_names_every_method_that_a_system_needs():
    tree = ast.parse((ROOT/'rtsseg'/'system.py').read_text())
    system, = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == 'System')
    needed = {method.name for method in system.body if isinstance(method, ast.FunctionDef) and raises_at_once(method)}
    page = (ROOT/'nbs'/'add_a_system.qmd').read_text()
    table = '\n'.join(line for line in page.splitlines() if line.startswith('| `'))
    assert needed == set(re.findall(r'(\w+)\(', table.split('rtsseg.shared')[0]))

def test_a_config_is_read_without_torch():
    code = "import sys; from rtsseg.config import load; load(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0

def shape(kind, rng):
    "A bright square or a bright disc on noise"
    image = rng.integers(0, 90, (32, 32, 3), dtype=np.uint8)
    x, y = (int(v) for v in rng.integers(11, 21, 2))
    if kind == 'disc':
        cv2.circle(image, (x, y), 9, (230, 230, 230), -1)
    else:
        cv2.rectangle(image, (x - 9, y - 9), (x + 9, y + 9), (60, 220, 60), -1)
    return image

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "A folder of images in three splits"
    root = tmp_path_factory.mktemp('images')/'images'
    rng = np.random.default_rng(0)
    for split, n in (('train', 24), ('val', 12), ('test', 12)):
        for kind in ('disc', 'square'):
            folder = root/split/kind
            folder.mkdir(parents=True)
            for i in range(n):
                cv2.imwrite(str(folder/f'{i:02}.png'), shape(kind, rng))
    return root

def config(images, runs, **more):
    "configs/classify.yaml on these images"
    small = dict(runs=runs, device='cpu', epochs=4, batch_size=8, data=dict(source=images),
                 model=dict(name='test_efficientnet'), tracker=dict(kind='none'))
    return load(ROOT/'configs'/'classify.yaml', **small | more)

@pytest.fixture(scope='module')
def undisturbed(images, tmp_path_factory):
    return train(config(images, tmp_path_factory.mktemp('runs')))

def test_it_trains_and_learns(undisturbed):
    rows = read_log(undisturbed)
    assert len(rows) == 4 and rows[-1]['train/loss/cross_entropy'] < rows[0]['train/loss/cross_entropy']
    names = {path.name for path in (undisturbed/'model').iterdir()}
    assert names == {'README.md', 'SHA256SUMS', 'classes.json', 'config.yaml', 'metrics.json', 'model.safetensors'}
    assert len(kept_validations(undisturbed)) == 2

def test_killed_and_started_again_it_ends_in_the_same_bytes(images, undisturbed, tmp_path):
    "kill -9 of the command and its trainer, after the first epoch"
    cfg = config(images, tmp_path/'runs', checkpoint=dict(resume_minutes=1e-6))
    (tmp_path/'cfg.yaml').write_text(to_yaml(cfg))
    folder = run_folder(cfg, find_system('classify').feed(cfg).hash)
    program = ['rtsseg-train', '--config', tmp_path/'cfg.yaml', '--inline']
    with running(Program(*program, env=held(folder, 1))) as process:
        # the trainer waits after its first epoch
        wait_for(lambda: 'epoch   1/4' in process.printed() or process.poll() is not None)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert train(cfg) == folder
    starts = [event for event, _ in read_lines(folder/'log.jsonl') if event['event'] == 'start']
    assert len(starts) == 2 and starts[1]['step'] > 0
    assert folder.parent.name == undisturbed.parent.name
    weights = [(f/'model'/'model.safetensors').read_bytes() for f in (folder, undisturbed)]
    assert weights[0] == weights[1]

def test_results_do_not_depend_on_workers(images, undisturbed, tmp_path):
    folder = train(config(images, tmp_path, loader=dict(num_workers=2)))
    assert (folder/'model'/'model.safetensors').read_bytes() == (undisturbed/'model'/'model.safetensors').read_bytes()

def test_it_is_evaluated_under_the_ledger(images, undisturbed):
    cfg = load(undisturbed/'config.yaml')
    system = find_system('classify')
    found = system.metrics(system.read_table(evaluate(undisturbed, 'val')), cfg)
    best = json.loads((undisturbed/'model'/'metrics.json').read_text())
    assert found == pytest.approx({name: best['metrics'][name] for name in found}, abs=1e-9)
    evaluate(undisturbed, 'test')
    data = system.feed(cfg).hash
    ledger = TestLedger(cfg.runs, data)
    ledger.check(look_of(cfg, data))
    with pytest.raises(Locked):
        ledger.check(look_of(cfg.model_copy(update=dict(epochs=9)), data))
    assert find_run(cfg) == undisturbed

def test_its_noise_floor_is_measured(undisturbed, tmp_path):
    "From the spread of the difference over drawn groups, by hand"
    cfg, system = load(undisturbed/'config.yaml'), find_system('classify')
    folder = tmp_path/'run'
    (folder/'evidence').mkdir(parents=True)
    shutil.copy(undisturbed/'config.yaml', folder)
    rng, names, label = np.random.default_rng(0), [f'{i:02}' for i in range(24)], np.arange(24) % 2
    for epoch, right in ((1, .6), (2, .8)):
        predicted = np.where(rng.random(24) < right, label, 1 - label)
        frame = pd.DataFrame(dict(sample=names, group=names, label=label, predicted=predicted))
        SampleTable(frame).write(folder/'evidence'/f'epoch-000{epoch}.parquet')
    before, after = (system.read_table(path) for path in kept_validations(folder))
    draws = np.random.default_rng(0).multinomial(24, [1 / 24] * 24, 50)
    changes = [system.metrics(after, cfg, draw)['macro_f1'] - system.metrics(before, cfg, draw)['macro_f1']
               for draw in draws]
    sigma = np.std(changes, ddof=1)
    lines = measure_noise(folder, 50, str(tmp_path/'noise.yaml'))
    assert lines[0].startswith(f'macro_f1: σ = {sigma:.4f}, over 50 paired bootstrap replicates')

def test_an_albumentations_pipeline_replaces_the_mirroring(images, tmp_path):
    "Of keyed images alone; each key has one draw"
    path = tmp_path/'flip.yaml'
    A.save(A.Compose([A.VerticalFlip(p=1), A.RandomBrightnessContrast((.1, .1), 0, p=1)]), path, data_format='yaml')
    system, cfg = find_system('classify'), config(images, tmp_path/'runs')
    plain = system.feed(cfg).images('train')
    cfg.data.pipeline = path
    changed = system.feed(cfg).images('train')
    assert torch.equal(plain[0]['image'], changed[0]['image'])
    found = changed[42, 1, 0]['image']
    assert torch.equal(found, changed[42, 1, 0]['image'])
    expected = (plain[0]['image'].flip(1) + .2).clamp(max=1)
    torch.testing.assert_close(found, expected, atol=.01, rtol=0)

def test_commands_serve_it(images, tmp_path):
    (tmp_path/'cfg.yaml').write_text(to_yaml(config(images, tmp_path/'runs', epochs=1)))
    said = {}
    for command in ('rtsseg-train', 'rtsseg-evaluate', 'rtsseg-report'):
        done = shell(command, '--config', tmp_path/'cfg.yaml')
        assert done.returncode == 0, done.stdout + done.stderr
        said[command] = done.stdout
    assert all(word in said['rtsseg-evaluate'] for word in ('val.parquet', 'accuracy', 'macro_f1'))
    assert 'macro_f1' in said['rtsseg-report'] and '[' in said['rtsseg-report']
    page, = tmp_path.glob('runs/classify/*/seed42/report.html')
    assert 'macro_f1' in page.read_text()

def test_a_grid_compares_its_variants(images, tmp_path):
    "Every combination is trained, and named by its verdict; the metric cannot vary"
    (tmp_path/'grid.yaml').write_text('data.flip: [0.5, 0.0]')
    cfg = config(images, tmp_path/'runs', epochs=1)
    found = ablate(cfg, tmp_path/'grid.yaml', [42, 43])
    assert found.monitor == 'macro_f1' and np.isfinite(found.values).all() and not found.failed
    (tmp_path/'grid.yaml').write_text('metrics.monitor: [macro_f1, accuracy]')
    with pytest.raises(ConfigError, match='cannot vary'):
        ablate(cfg, tmp_path/'grid.yaml', [42])

OUTSIDE = '''
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from rtsseg.loop import Task
from rtsseg.system import Feed, SampleMeter, System
from rtsseg.config import RunConfig
from rtsseg.weights import save_weights

class OutsideConfig(RunConfig):
    system: str = 'outside'

class Numbers(Feed):
    source, hash = 'numbers', 'f' * 16
    def loaders(self):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(40, 2, generator=g)
        data = [dict(x=a, y=a.sum()[None], sample=str(i), group=str(i)) for i, a in enumerate(x)]
        return DataLoader(data, batch_size=8, shuffle=True), DataLoader(data, batch_size=8)
    def size(self, split):
        return 40

class Sum(Task):
    monitor, mode = 'error', 'min'
    def forward(self, model, batch):
        return model(batch['x'])
    def count(self, batch):
        return dict(square=len(batch['y']))
    def loss(self, out, batch):
        return dict(square=F.mse_loss(out, batch['y']))
    def meter(self):
        def rows(out, batch):
            return dict(sample=batch['sample'], group=batch['group'], error=(out - batch['y']).abs()[:, 0].cpu())
        return SampleMeter(rows, lambda table: dict(error=float(table['error'].mean())))

class Outside(System):
    name, Config = 'outside', OutsideConfig
    def feed(self, cfg, prepare=False):
        return Numbers()
    def model(self, cfg, feed):
        return torch.nn.Linear(2, 1)
    def task(self, cfg, feed):
        return Sum()
    def monitor(self, cfg):
        return 'error', 'min'
    def package(self, folder, model, cfg, feed, best, environment):
        save_weights(folder, model, cfg, best)
'''

def test_a_system_from_outside_the_project(tmp_path):
    "A package that registers itself by an entry point trains with the command"
    package = tmp_path/'site'
    (package/'outside-1.0.dist-info').mkdir(parents=True)
    (package/'outside.py').write_text(OUTSIDE)
    (package/'outside-1.0.dist-info'/'METADATA').write_text('Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n')
    (package/'outside-1.0.dist-info'/'entry_points.txt').write_text('[rtsseg.systems]\noutside = outside:Outside\n')
    (tmp_path/'cfg.yaml').write_text(
        'system: outside\nname: outside\nruns: runs\ndevice: cpu\nepochs: 2\nbatch_size: 8\nval_frequency: 1\n'
        'freeze_backbone_epochs: 0\ntracker: {kind: none}\n')
    env = CLEAN | dict(PYTHONPATH=f'{package}:{ROOT}')
    program = [Path(sys.executable).with_name('rtsseg-train'), '--config', tmp_path/'cfg.yaml', '--inline']
    done = subprocess.run(program, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.glob('runs/outside/*/seed42/model/model.safetensors'))
    (tmp_path/'cfg.yaml').write_text('system: outsied\n')
    done = subprocess.run(program, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "did you mean 'outside'" in done.stderr, done.stderr

def test_a_search_tries_its_settings(images, tmp_path):
    (tmp_path/'space.yaml').write_text('lr.base_lr: {low: 1e-4, high: 1e-2, log: true}')
    study = search(config(images, tmp_path/'runs', epochs=1), tmp_path/'space.yaml', trials=2)
    values = [trial.value for trial in study.trials]
    assert len(values) == 2 and np.isfinite(values).all()
    exported = tmp_path.glob('runs/classify/*/seed42/model/metrics.json')
    scores = [json.loads(path.read_text())['value'] for path in exported]
    assert sorted(scores) == sorted(values)

def test_its_model_makes_no_map(undisturbed, tmp_path):
    with pytest.raises(ModelError, match="a model of the system 'classify', which gives no scores of pixels"):
        predict(undisturbed/'model', tmp_path/'scene.tif', tmp_path/'map.tif')
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('command, words', [
    ('calibrate', 'system classify has no calibration'),
    ('probe', 'system classify has no probe'),
])
def test_what_a_system_lacks_is_refused_by_its_name(undisturbed, command, words):
    "The commands ask the system, and none of them knows what an RTS run is"
    evaluate(undisturbed, 'val')
    run = ['--run', undisturbed] if command == 'calibrate' else ['--config', undisturbed/'config.yaml']
    done = shell(f'rtsseg-{command}', *run)
    assert done.returncode == 2 and words in done.stderr, done.stdout + done.stderr

def test_the_check_of_a_system_reads_its_samples(images, undisturbed, tmp_path):
    done = shell('rtsseg-check', '--config', undisturbed/'config.yaml')
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r'all samples can be read: \d+ in train, \d+ in val', done.stdout), done.stdout
    broken = tmp_path/'images'
    shutil.copytree(images, broken)
    (broken/'train'/'disc'/'00.png').write_bytes(b'')
    cfg = config(broken, tmp_path/'runs')
    (tmp_path/'cfg.yaml').write_text(to_yaml(cfg))
    done = shell('rtsseg-check', '--config', tmp_path/'cfg.yaml')
    assert done.returncode == 2 and '00.png' in done.stderr, done.stdout + done.stderr

def test_an_image_that_changes_at_equal_size_is_other_data(images, undisturbed, tmp_path):
    copy = tmp_path/'images'
    shutil.copytree(images, copy)
    before = find_system('classify').feed(config(copy, tmp_path)).hash
    image = copy/'train'/'disc'/'00.png'
    content = bytearray(image.read_bytes())
    content[-20] ^= 1
    image.write_bytes(content)
    assert find_system('classify').feed(config(copy, tmp_path)).hash != before
