"Each experiment file trains, through everything that the guide's run has, on a world of a second"
import json
import math
import shutil
from pathlib import Path

import pytest

from rtsseg.config import load, read_yaml
from rtsseg.runs import flatten, read_log
from rtsseg.training import train

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT/'configs'
EXPERIMENTS = sorted((CONFIGS/'experiments').glob('*.yaml'))
BASES = [CONFIGS/'rts_baseline.yaml', CONFIGS/'rts_field.yaml']

# ---------------------------------------------------------------- the experiment files

# written although they are the default, where an experiment is about them
MAY_EQUAL_THE_BASE = {
    'loss.boundary_ignore_width',
    'loss.boundary_soft_width',
    'loss.soft_label_value',
    'loss.tversky_alpha',
    'loss.tversky_beta',
    'loss.balance',
    'data.extra_bands',
    'data.multi_resolution.factor',
    'model.fusion',
    'model.extra_encoder',
    'model.in_channels',
}

def value_at(cfg, path):
    "The value of a dotted field"
    for part in path.split('.'):
        cfg = cfg[part] if isinstance(cfg, dict) else getattr(cfg, part)
    return cfg

@pytest.mark.parametrize('file', EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_names_only_what_differs(file):
    tree = read_yaml(file)
    assert tree.pop('name') == file.stem
    base, cfg = load(BASES[0]), load(BASES[0], file)
    named = [path for path in flatten(tree) if not path.startswith('loss_weights.')]
    same = {path for path in named if value_at(cfg, path) == value_at(base, path)}
    assert same <= MAY_EQUAL_THE_BASE, same - MAY_EQUAL_THE_BASE

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder for the world that the first run draws and checks, and for the runs"
    return tmp_path_factory.mktemp('experiments')

def base_of(file):
    "An experiment that names no model takes the small one of the toy config"
    return BASES[0] if file in BASES or 'model' in read_yaml(file) else CONFIGS/'toy.yaml'

# The same code in seconds: tests/test_models.py trains each candidate itself
SMALL_SIBLINGS = {
    'efficientnet-b3': 'efficientnet-b0',
    'efficientnet-b7': 'efficientnet-b0',
    'mit_b5': 'mit_b0',
    'tu-vit_large_patch16_dinov3.sat493m': 'tu-vit_small_patch16_dinov3.lvd1689m',
}

def must_be_finite(name, monitor):
    "Whether a number of an epoch is a loss or the monitored value"
    return name.startswith(('train/loss', 'val/loss')) or name == f'val/{monitor}'

@pytest.mark.parametrize('file', [*BASES, *EXPERIMENTS], ids=lambda path: path.stem)
def test_it_trains(file, home):
    "Two epochs, the first with a frozen backbone"
    # a block of 2 × 2 tiles: a coarse view needs neighbours
    source = dict(regions=1, block_size=384)
    settings = dict(batch_size=6, runs=home/'runs', data=dict(manifest=home/'world'/'manifest.csv', source=source))
    cfg = load(base_of(file), file, CONFIGS/'test.yaml', **settings)
    cfg.model.encoder = SMALL_SIBLINGS.get(cfg.model.encoder, cfg.model.encoder)
    folder = train(cfg)
    first, last = read_log(folder)
    assert (first['epoch'], last['epoch']) == (1, 2)
    assert last['skipped'] == 0
    for row in (first, last):
        for name, value in row.items():
            assert not must_be_finite(name, cfg.metrics.monitor) or math.isfinite(value), name
    parts = {name.removeprefix('train/loss/') for name in first if name.startswith('train/loss/')}
    assert parts == set(cfg.loss.parts)
    lines = [json.loads(line) for line in (folder/'log.jsonl').read_text().splitlines()]
    assert [line['frozen'] for line in lines if line['event'] == 'stage'] == [['encoder'], []]
    assert first['lr/encoder'] == 0 < last['lr/encoder']
    # all run folders together would fill a small disk
    shutil.rmtree(folder)

def test_the_grid_of_models_builds_the_models_of_their_experiments():
    "Memory included: an entry keeps what its experiment sets"
    entries = read_yaml(CONFIGS/'search'/'models.yaml')['model'].values()
    by_encoder = {entry['model.encoder']: entry for entry in entries}
    for experiment in ('segformer_b5', 'dinov3'):
        model = read_yaml(CONFIGS/'experiments'/f'{experiment}.yaml')['model']
        assert by_encoder[model['encoder']] == {f'model.{name}': value for name, value in model.items()}
