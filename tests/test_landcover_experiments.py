"""The config files of land cover: the guide's template number for number, and experiments that name only what
differs from the baseline"""
import math
import shutil
from pathlib import Path

import pytest

from rtsseg.ablation import combinations
from rtsseg.class_world import make_class_world
from rtsseg.config import TRANSFORMS, load, read_yaml
from rtsseg.runs import flatten, read_log
from rtsseg.schedule import LossGate, count_frozen_layers, plan_stages
from rtsseg.training import train
from rtsseg.variants import read_axes, with_fields

LANDCOVER = Path(__file__).resolve().parents[1]/'configs'/'landcover'
BASELINE, TEMPLATE = LANDCOVER/'baseline.yaml', LANDCOVER/'template.yaml'
EXPERIMENTS = sorted((LANDCOVER/'experiments').glob('*.yaml'))
by_stem = dict(ids=lambda path: path.stem)

# written although they are the default, because the experiment is about them
MAY_EQUAL_THE_BASE = {'unfreeze.groups', 'unfreeze.every'}

def value_at(cfg, path):
    for part in path.split('.'):
        cfg = cfg.get(part) if isinstance(cfg, dict) else getattr(cfg, part)
    return cfg

def test_the_template_is_that_of_the_guide():
    "Every number of its three boxes"
    cfg = load(TEMPLATE)
    expected = {
        'model.architecture': 'segformer', 'model.encoder': 'mit_b2', 'batch_size': 8, 'optimizer.name': 'adamw',
        'lr.base_lr': 6e-5, 'optimizer.weight_decay': .01, 'lr.schedule': 'cosine', 'epochs': 100,
        'optimizer.clip_norm': 1., 'ema.enabled': True, 'ema.decay': .999, 'precision': 'fp16',
        'lr.backbone_lr_multiplier': .65,
        'loss_weights': dict(cross_entropy=.5, dice=.3, lovasz=.2),
        'loss.class_weights': [.1, 2., 1.5, 3., 2.5, 1.2, 1.], 'loss.hardest': .3,
        'data.sides': [512, 640, 768], 'data.scales': (.5, 2.), 'data.class_aware': 1.,
        'mixing.mixup.alpha': .2, 'mixing.cutmix.alpha': 1., 'mixing.cutmix.p': .2, 'mixing.same': 'group',
        'augment.shift_scale_rotate.rotate': 10, 'augment.brightness.limit': .1, 'augment.contrast.limit': .1,
        'augment.saturation.limit': .1, 'augment.hue.limit': .05,
    }
    assert {path: value_at(cfg, path) for path in expected} == expected
    assert cfg.lr.warmup_epochs > 0 and 2 <= cfg.accumulate <= 4 and 10 <= cfg.early_stopping.patience <= 15
    drawn = ('hflip', 'vflip', 'shift_scale_rotate', 'brightness', 'contrast', 'saturation', 'hue')
    # nothing else is drawn
    others = {name for name in TRANSFORMS if getattr(cfg.augment, name).p > 0} - set(drawn)
    assert all(getattr(cfg.augment, name).p > 0 for name in drawn) and cfg.mixing.mixup.p > 0 and not others
    assert set(cfg.loss.parts) == set(cfg.loss_weights)

@pytest.mark.parametrize('file', EXPERIMENTS, **by_stem)
def test_an_experiment_names_only_what_differs(file):
    tree = read_yaml(file)
    assert tree.pop('name') == file.stem
    base, cfg = load(BASELINE), load(BASELINE, file)
    same = {path for path in flatten(tree) if value_at(cfg, path) == value_at(base, path)}
    assert same <= MAY_EQUAL_THE_BASE

@pytest.mark.parametrize('file', [BASELINE, TEMPLATE, *EXPERIMENTS], **by_stem)
def test_nothing_in_it_is_without_effect(file):
    "No setting is unread, but for the two phases that stages of their own replace"
    lines = load(BASELINE, file).doubtful_settings()
    assert all('stages has a schedule of its own' in line for line in lines), lines

def test_experiments_keep_the_batch_of_a_step():
    "Smaller batches are accumulated to the same number of images"
    steps = {load(BASELINE, file).batch_size * load(BASELINE, file).accumulate for file in [BASELINE, *EXPERIMENTS]}
    assert steps == {16}

def test_rates_of_the_gated_experiment_are_those_of_the_baseline():
    base, gated = load(BASELINE), load(BASELINE, LANDCOVER/'experiments'/'gated_lovasz.yaml')
    usual = plan_stages(base, ('encoder', 'decoder'))[-1]
    for planned in plan_stages(gated, ('encoder', 'decoder')):
        assert planned.stage.rates == pytest.approx(usual.stage.rates)
        assert planned.head.min_lr == usual.head.min_lr and planned.head.warmup_epochs == usual.head.warmup_epochs

@pytest.mark.parametrize('newest, expected', [(.51, 21), (.5, 21), (.49, 31)])
def test_lovasz_waits_for_the_milestone_of_epoch_ten(newest, expected):
    "Best value .5 at the gate of epoch 11; at epoch 21 the newest one decides, else that of epoch 31"
    _, second, third = load(BASELINE, LANDCOVER/'experiments'/'gated_lovasz.yaml').stages
    gate, wait = LossGate(), load(BASELINE).gate_epochs
    assert gate.ask(second, 11, .48, .5, 'max', wait)
    value = newest
    for epoch in range(21, 51):
        if gate.is_due(third, epoch):
            gate.ask(third, epoch, value, .52, 'max', wait)
            value = .6
    assert [epoch for epoch in range(21, 51) if gate.holds(third, epoch)][0] == expected

@pytest.mark.parametrize('name, epochs, frozen', [
    ('earthvqa_frozen', (1, 50), (10, 10)), ('earthvqa', (1, 50), (0, 0)),
    ('gradual_unfreezing', (1, 10, 11, 21, 31, 41), (10, 10, 8, 5, 2, 0))])
def test_lower_layers_are_frozen_as_the_guide_says(name, epochs, frozen):
    "60% of the 16 blocks of MiT-B2, which is 10"
    settings = load(BASELINE, LANDCOVER/'experiments'/f'{name}.yaml').unfreeze
    assert tuple(count_frozen_layers(settings, 16, epoch) for epoch in epochs) == frozen

def test_the_ablation_takes_the_stronger_augmentation_apart():
    "Its last variant is the experiment, the first one the baseline"
    base = load(BASELINE)
    axes = read_axes(LANDCOVER/'ablation.yaml', type(base))
    variants = [with_fields(base, fields) for fields in combinations(axes, 'ablation.yaml').values()]
    strong = load(BASELINE, LANDCOVER/'experiments'/'strong_augmentation.yaml')
    sections = ('data', 'augment', 'mixing')
    assert [getattr(variants[-1], name) for name in sections] == [getattr(strong, name) for name in sections]
    assert variants[0] == base
    parts = set().union(*(differing(variant, base) for variant in variants[1:-1]))
    assert parts == differing(variants[-1], base)

def differing(cfg, base):
    "Dotted settings that differ"
    found, usual = flatten(cfg.model_dump()), flatten(base.model_dump())
    return {name for name in found if found[name] != usual[name]}

# ------------------------------------------------ they train

SMALL = {'tu-vit_large_patch16_dinov3.sat493m': 'tu-vit_small_patch16_dinov3.lvd1689m'}
TRAINED = ['gated_lovasz', 'strong_augmentation', 'gradual_unfreezing', 'layer_decay', 'segformer_b5', 'dinov3']

@pytest.fixture(scope='module')
def land(tmp_path_factory):
    return make_class_world(tmp_path_factory.mktemp('land')/'land', side=96, images=4)

def in_seconds(file, land, runs):
    "An experiment on small crops with the smallest network of its kind"
    cfg = load(BASELINE, file, runs=runs, device='cpu', epochs=2, batch_size=2, accumulate=1,
               loader=dict(num_workers=0), tracker=dict(kind='none'), windows=dict(side=64, stride=48))
    sides = sorted({32 * number for number in range(1, len(cfg.data.sides) + 1)})
    data = cfg.data.model_copy(update=dict(source=land, sides=sides))
    encoder = SMALL.get(cfg.model.encoder, 'mit_b0')
    model = cfg.model.model_copy(update=dict(encoder=encoder, weights=None, normalisation='dataset'))
    last_two = enumerate(cfg.stages[-2:], 1)
    stages = [stage.model_copy(update=dict(first=number, last=number)) for number, stage in last_two]
    if stages:
        stages[0] = stages[0].model_copy(update=dict(continues=False))
    return cfg.model_copy(update=dict(data=data, model=model, stages=stages))

@pytest.mark.parametrize('file', [TEMPLATE, *(LANDCOVER/'experiments'/f'{name}.yaml' for name in TRAINED)], **by_stem)
def test_it_trains(file, land, tmp_path):
    cfg = in_seconds(file, land, tmp_path)
    folder = train(cfg)
    rows = read_log(folder)
    assert [row['epoch'] for row in rows] == [1, 2]
    for row in rows:
        assert all(math.isfinite(value) for name, value in row.items() if name.startswith('train/loss')), row
        assert math.isfinite(row['val/miou'])
    shutil.rmtree(folder)
