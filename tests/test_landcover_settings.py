"Settings of land cover: what changes nothing is named, augmentation comes from the config, a budget of minutes is kept"
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from rtsseg.budget import fit_to_minutes, read_budget
from rtsseg.class_tiles import ClassBatches, ClassSamples, ClassTiles, image_weights
from rtsseg.class_world import make_class_world
from rtsseg.config import Augment, load
from rtsseg.runs import read_log
from rtsseg.systems.landcover import LANDCOVER_UNREAD, LandcoverConfig, class_loss_parts
from rtsseg.training import train

ROOT = Path(__file__).resolve().parent.parent

@pytest.fixture(scope='module')
def land(tmp_path_factory):
    return make_class_world(tmp_path_factory.mktemp('land')/'land', side=64, images=6)

def unread(choice):
    "The settings that a config of this choice names as unread"
    lines = [line for line in LandcoverConfig(**choice).doubtful_settings() if ': not read, because' in line]
    return {name for line in lines for name in line.partition(': ')[0].split(', ')}

OTHER_LOSS = dict(class_weights=[1, 2, 3, 4, 5, 6, 7], label_smoothing=.1, hardest=.5, smooth=9)

@pytest.mark.parametrize('choice, expected', [
    (dict(augment=dict(copy_paste=dict(p=.5, blend_sigma=2))),
     ['augment.copy_paste.blend_sigma', 'augment.copy_paste.p']),
    (dict(augment=dict(hue=dict(limit=.1))), ['augment.hue.limit']),
    (dict(augment=dict(hue=dict(p=.5, limit=.1))), []),
    (dict(loss=OTHER_LOSS | dict(parts=['dice'])), ['loss.class_weights', 'loss.hardest', 'loss.label_smoothing']),
    (dict(loss=OTHER_LOSS | dict(parts=['cross_entropy'])), ['loss.smooth']),
    (dict(mixing=dict(mixup=dict(alpha=1), cutmix=dict(alpha=2), same='group')),
     ['mixing.cutmix.alpha', 'mixing.mixup.alpha', 'mixing.same']),
    (dict(mixing=dict(mixup=dict(p=.1, alpha=1), cutmix=dict(alpha=2), same='group')), ['mixing.cutmix.alpha']),
    (dict(loader=dict(cache_mb=100)), ['loader.cache_mb']),
    (dict(loss=dict(edge=dict(width=3))), ['loss.edge.width']),
    (dict(loss=dict(parts=['cross_entropy', 'edge'], smooth=9, edge=dict(loss='dice'))), []),
    (dict(distil=dict(temperature=2, features='attention')), ['distil.features', 'distil.temperature']),
    (dict(distil=dict(teacher='t', temperature=2, features='attention')), ['distil.temperature']),
    (dict(distil=dict(teacher='t', compares=['logits'], temperature=2, features='attention')), ['distil.features']),
    (dict(ema=dict(enabled=False, decay=.5)), ['ema.decay']),
    (dict(), []),
], ids=str)
def test_what_is_not_read_is_named(choice, expected):
    assert unread(choice) == set(expected)

def test_the_table_names_settings_that_exist():
    cfg = LandcoverConfig()
    for setting in {name for rule in LANDCOVER_UNREAD for name in rule.settings}:
        node = cfg
        for part in setting.split('.'):
            assert part in type(node).model_fields, setting
            node = getattr(node, part)

def test_a_weight_of_a_loss_that_is_not_there():
    said = LandcoverConfig(loss_weights=dict(lovasz=.3)).doubtful_settings()
    assert any('loss_weights names lovasz' in line for line in said)
    assert not LandcoverConfig(loss=dict(parts=['cross_entropy', 'lovasz'])).doubtful_settings()

@pytest.mark.parametrize('parts', [['dice'], ['cross_entropy'], ['lovasz'], ['cross_entropy', 'dice']], ids=str)
def test_a_setting_of_the_loss_is_named_exactly_where_it_changes_nothing(parts):
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.standard_normal((2, 7, 16, 16), np.float32))
    target = torch.from_numpy(rng.integers(0, 7, (2, 16, 16)).astype(np.float32))

    def losses(**settings):
        made = class_loss_parts(LandcoverConfig(loss=dict(parts=parts) | settings).loss)
        return {name: float(part.value(logits, target)) for name, part in made.items()}

    same = {f'loss.{name}' for name, value in OTHER_LOSS.items() if losses(**{name: value}) == losses()}
    assert unread(dict(loss=OTHER_LOSS | dict(parts=parts))) == same

def crops(land, augment):
    samples = ClassSamples.read(land).of('train')
    data = LandcoverConfig(data=dict(source=land, sides=[64])).data
    tiles = ClassTiles(samples, data, augment, [.5] * 3, [.2] * 3)
    return torch.stack([tiles[0, 1, row, n, 64]['image'] for row in range(len(samples)) for n in range(3)])

def test_objects_are_never_pasted(land):
    assert torch.equal(crops(land, Augment()), crops(land, Augment(copy_paste=dict(p=1))))

NOTHING = {name: dict(p=0) for name in ('rotate90', 'hflip', 'vflip', 'shift_scale_rotate', 'elastic', 'affine',
                                        'brightness', 'contrast', 'saturation', 'gaussian_noise', 'clahe',
                                        'random_scale')}
GUIDE = dict(hflip=dict(p=1), shift_scale_rotate=dict(p=1, shift=0, scale=0, rotate=10), brightness=dict(p=1, limit=.1),
             contrast=dict(p=1, limit=.1), saturation=dict(p=1, limit=.1), hue=dict(p=1, limit=.05))

@pytest.mark.parametrize('name', GUIDE)
def test_each_line_of_the_guides_augmentation_changes_crops(name, land):
    plain = crops(land, Augment(**NOTHING))
    assert not torch.equal(crops(land, Augment(**NOTHING | {name: GUIDE[name]})), plain)

def test_hue_turns_by_what_the_config_says(land):
    "Of saturated pixels, measured by OpenCV on the augmented crops: at most 0.05 of 360°, once more than half of it"
    def hues(augment):
        image = (crops(land, augment) * .2 + .5).numpy().transpose(0, 2, 3, 1)
        return [cv2.cvtColor(np.ascontiguousarray(one), cv2.COLOR_RGB2HSV) for one in image]

    moved = []
    for before, after in zip(hues(Augment(**NOTHING)), hues(Augment(**NOTHING | dict(hue=GUIDE['hue']))), strict=True):
        apart = (after[..., 0] - before[..., 0] + 180) % 360 - 180
        moved.append(np.median(apart[before[..., 1] > .3]))
    assert np.abs(moved).max() <= 18.1 and np.abs(moved).max() > 9

def test_only_the_hardest_pixels_count():
    "30% of 100 valid pixels: the mean of the 30 largest losses, sorted by NumPy"
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.standard_normal((1, 7, 10, 11), np.float32))
    target = torch.from_numpy(rng.integers(0, 7, (1, 10, 11)).astype(np.float32))
    target[..., 10] = 255
    losses = -logits.log_softmax(1).numpy()[0, target[0, :, :10].long().numpy(), np.arange(10)[:, None], np.arange(10)]
    made = class_loss_parts(LandcoverConfig(loss=dict(parts=['cross_entropy'], hardest=.3)).loss)['cross_entropy']
    assert float(made.value(logits, target)) == pytest.approx(np.sort(losses.ravel())[-30:].mean(), rel=1e-5)

@pytest.mark.parametrize('share', [0., .5, 1.])
def test_images_of_rare_classes_are_drawn_more_often(share):
    "Class 1 covers a tenth of the set and lies in image 0 alone; shares of draws within three standard errors"
    counts = np.array([[60, 40], [100, 0], [100, 0], [100, 0]])
    # Σ over classes of the share in the image over the share in the set
    rarity = np.array([.6 / .9 + .4 / .1, 1 / .9, 1 / .9, 1 / .9])
    expected = (1 - share) / 4 + share * rarity / rarity.sum()
    weights = image_weights(counts, share)
    assert weights / weights.sum() == pytest.approx(expected)
    batches = ClassBatches(4, 4, 0, [64], weights)
    drawn = np.zeros(4)
    for epoch in range(1, 1001):
        batches.set_epoch(epoch)
        np.add.at(drawn, [key[2] for batch in batches for key in batch], 1)
    assert np.abs(drawn / drawn.sum() - expected).max() < 3 * (.25 / drawn.sum())**.5

def test_a_budget_of_minutes_is_kept(land, tmp_path):
    "The length of epochs is fitted; the run ends with all its epochs"
    cfg = load(ROOT/'configs'/'landcover'/'toy.yaml', runs=tmp_path, epochs=3, budget_minutes=.15, batch_size=2,
               tracker=dict(kind='none'), windows=dict(side=64, stride=64),
               data=dict(source=land, sides=[64], made=None))
    folder = train(cfg)
    found = read_budget(folder)
    rows = read_log(folder)
    assert found.minutes == .15 and len(rows) == 3
    done = np.diff([0, *(row['step'] for row in rows)]).tolist()
    assert done == found.steps
    assert fit_to_minutes(cfg, found.pace, found.began[0]).steps == done[:1]
