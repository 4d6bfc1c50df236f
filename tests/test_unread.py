"Settings that change nothing are named: each choice of the tables, and that the settings do nothing under it"
import numpy as np
import pytest
import torch

from rtsseg.augment import Augmenter, boundary
from rtsseg.config import RTS_UNREAD, Loss, RtsConfig, differing_settings
from rtsseg.losses import make_loss
from rtsseg.schedule import learning_rate, plan_stages

STAGE = dict(first=1, last=300, rates=dict(encoder=1e-4, decoder=1e-3))

# another value for each setting of the tables
OTHER = {
    'freeze_backbone_epochs': 3,
    'lr': dict(frozen_lr=.1, base_lr=.2, backbone_lr_multiplier=.3, schedule='constant', min_lr=1e-5, warmup_epochs=7,
               warmup_start_lr=1e-5, plateau_factor=.1, plateau_patience=9),
    'ema': dict(decay=.5),
    'early_stopping': dict(patience=7, window=4, start_epoch=9),
    'loader': dict(prefetch_factor=7, persistent_workers=False, timeout=7),
    'loss': dict(gamma=3, alpha=.5, tversky_alpha=.6, tversky_beta=.4, smooth=2, region_pool='image', balance='log',
                 class_ratio=9, boundary_ignore_width=5, boundary_soft_width=4, soft_label_value=.2,
                 soft_label_profile='distance'),
}

def names(choice, section=''):
    "The settings that a config of this choice names as unread"
    lines = [line for line in RtsConfig(**choice).doubtful_settings() if ': not read, because' in line]
    found = {name for line in lines for name in line.partition(': ')[0].split(', ')}
    return {name for name in found if name.startswith(section)}

def merged(section, **choice):
    "The other values of a section, with a choice"
    return {section: OTHER[section] | choice}

def of(section, settings):
    return {f'{section}.{name}' for name in settings.split()}

LOSS = 'loss.'

@pytest.mark.parametrize('choice, section, expected', [
    (merged('loss', parts=['dice']), LOSS, of('loss', 'gamma alpha tversky_alpha tversky_beta balance class_ratio '
     'boundary_ignore_width boundary_soft_width soft_label_value soft_label_profile')),
    (merged('loss', parts=['tversky', 'cross_entropy'], balance='none', boundary_handling='ignore'), LOSS,
     of('loss', 'gamma alpha class_ratio boundary_soft_width soft_label_value soft_label_profile')),
    (merged('loss', parts=['focal'], boundary_handling='soft_labels'), LOSS,
     of('loss', 'tversky_alpha tversky_beta smooth region_pool balance class_ratio boundary_ignore_width '
        'soft_label_value')),
    (dict(ema=dict(decay=.5, enabled=False)), '', {'ema.decay'}),
    (dict(early_stopping=dict(patience=None, window=4, start_epoch=9)), '', of('early_stopping', 'window start_epoch')),
    (dict(epochs=40, early_stopping=dict(start_epoch=60)), '', {'early_stopping.start_epoch'}),
    (dict(epochs=40, early_stopping=dict(start_epoch=9)), '', set()),
    (dict(lr=OTHER['lr'], freeze_backbone_epochs=3, stages=[STAGE]), 'lr.', of('lr', 'frozen_lr base_lr '
     'backbone_lr_multiplier schedule min_lr warmup_epochs warmup_start_lr plateau_factor plateau_patience')),
    (dict(freeze_backbone_epochs=3, stages=[STAGE]), '', {'freeze_backbone_epochs'}),
    (dict(lr=dict(plateau_factor=.1), stages=[STAGE | dict(schedule='plateau')]), '', set()),
    (dict(lr=dict(frozen_lr=.1), freeze_backbone_epochs=0), '', {'lr.frozen_lr'}),
    (dict(lr=dict(warmup_epochs=0, warmup_start_lr=1e-5)), '', {'lr.warmup_start_lr'}),
    (merged('loader', num_workers=0), '', of('loader', 'prefetch_factor persistent_workers timeout')),
    (dict(augment=dict(enabled=False, border='reflect', hflip=dict(p=.1))), '', of('augment', 'border hflip.p')),
    (dict(augment=dict(pipeline='own.yaml', border='reflect', clahe=dict(p=0, clip_limit=2))), '',
     of('augment', 'border clahe.p clahe.clip_limit')),
    (dict(augment=dict(clahe=dict(p=0, clip_limit=2, tile_grid_size=4))), '',
     of('augment', 'clahe.clip_limit clahe.tile_grid_size')),
    (dict(augment=dict(border='reflect')), '', set()),
    (dict(data=dict(multi_resolution=dict(factor=4))), '', {'data.multi_resolution.factor'}),
    (dict(data=dict(crops=dict(area_power=-.5, jitter=.5))), '', of('data', 'crops.area_power crops.jitter')),
    (dict(augment=dict(copy_paste=dict(blend_sigma=2))), '', {'augment.copy_paste.blend_sigma'}),
])
def test_what_is_not_read_is_named(choice, section, expected):
    assert names(choice, section) == expected

def test_defaults_are_never_named():
    "Whatever is chosen, a setting at its default is not a mistake"
    none = {name: dict(p=0) for name in ('shift_scale_rotate', 'elastic', 'affine', 'random_scale')}
    assert not names(dict(loss=dict(parts=['dice']), ema=dict(enabled=False), stages=[STAGE], augment=none, epochs=300,
                          early_stopping=dict(patience=None)))

def test_a_setting_is_named_once():
    lines = RtsConfig(augment=dict(enabled=False, clahe=dict(p=0, clip_limit=2))).doubtful_settings()
    assert [line.count('augment.clahe.clip_limit') for line in lines] == [1]

def test_the_tables_name_settings_that_exist():
    cfg = RtsConfig()
    for setting in {name for rule in RTS_UNREAD for name in rule.settings}:
        node = cfg
        for part in setting.split('.'):
            assert part in type(node).model_fields, setting
            node = getattr(node, part)
    assert list(differing_settings(cfg, RtsConfig())) == []

def training_loss(settings):
    "Each part of the loss on one batch, its targets made by the boundary settings"
    cfg = Loss(**settings)
    rng = np.random.default_rng(0)
    masks = np.zeros((2, 40, 40), np.uint8)
    masks[:, 8:32, 8:28] = 1
    target = torch.from_numpy(np.stack([boundary(mask, cfg) for mask in masks]))
    logits = torch.from_numpy(rng.standard_normal((2, 1, 40, 40), dtype=np.float32))
    return {name: float(part.value(logits, target)) for name, part in make_loss(cfg, 50).items()}

@pytest.mark.parametrize('choice', [
    dict(parts=['focal']), dict(parts=['dice']), dict(parts=['tversky'], boundary_handling='ignore'),
    dict(parts=['cross_entropy'], balance='none'), dict(parts=['cross_entropy', 'dice'], balance='log'),
    dict(parts=['focal'], boundary_handling='soft_labels', soft_label_profile='distance'),
    dict(parts=['focal'], boundary_handling='soft_labels'),
], ids=str)
def test_a_setting_of_the_loss_is_named_exactly_where_it_changes_nothing(choice):
    expected, same = training_loss(choice), set()
    tried = {name: value for name, value in OTHER['loss'].items() if name not in choice}
    for name, value in tried.items():
        if training_loss(choice | {name: value}) == expected:
            same.add(f'loss.{name}')
    assert set.union(*(names(dict(loss=choice | {name: value})) for name, value in tried.items())) == same

@pytest.mark.parametrize('choice', [
    dict(), dict(freeze_backbone_epochs=0), dict(lr=dict(schedule='constant')), dict(lr=dict(warmup_epochs=0)),
    dict(stages=[STAGE | dict(schedule='cosine', warmup_epochs=2)]),
], ids=str)
def test_a_rate_is_named_exactly_where_it_changes_nothing(choice):
    "The rates of both parts, in every phase"
    def rates(**settings):
        cfg = RtsConfig(**settings)
        stages = plan_stages(cfg, ('encoder', 'decoder'))
        return [stage_rates(stages, epoch) for epoch in np.arange(0, 300, .5)]

    def stage_rates(stages, epoch):
        stage = next(planned for planned in stages if epoch < planned.stage.last)
        return {part: learning_rate(stage, part, epoch, 0) for part in stage.stage.rates}

    chosen = choice.get('lr', {})
    tried = {name: value for name, value in OTHER['lr'].items() if name not in {*chosen, 'schedule'}}
    tried = {name: value for name, value in tried.items() if not name.startswith('plateau')}
    for name, value in tried.items():
        settings = choice | dict(lr=chosen | {name: value})
        assert names(settings) == ({f'lr.{name}'} if rates(**settings) == rates(**choice) else set()), name

def test_draws_do_not_read_what_is_named():
    image, mask = np.random.default_rng(0).random((32, 32, 3), dtype=np.float32), np.zeros((32, 32), np.uint8)

    def draws(**settings):
        augment = Augmenter(RtsConfig(augment=settings).augment, [0.]*3)
        return np.stack([augment(image, mask, (0, 1, 0, n))[0] for n in range(20)])

    never = {name: dict(p=0) for name in ('elastic', 'affine', 'shift_scale_rotate', 'random_scale')}
    idle = never | dict(elastic=dict(p=0, sigma=3), border='reflect')
    assert names(dict(augment=idle)) == {'augment.elastic.sigma', 'augment.border'}
    np.testing.assert_array_equal(draws(**idle), draws(**never))
