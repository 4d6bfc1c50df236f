"""The seven health checks of land cover (guide 002, 1.0): all pass on a sound set, and each is made to fail by the
mistake that it is there for"""
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from helpers.shell import shell
from rtsseg import class_tiles
from rtsseg.augment import Augmenter
from rtsseg.class_checks import (
    agreement,
    data_findings,
    hand_finding,
    hand_mistakes,
    ignoring_finding,
    measured_statistics,
    moving_finding,
    normalisation_finding,
    seven_checks,
    split_of_path,
    survey_class_files,
)
from rtsseg.class_tiles import ClassSamples, read_colours, read_pair
from rtsseg.class_world import make_class_world
from rtsseg.config import Augment, find_system, load, to_yaml
from rtsseg.console import DataError
from rtsseg.systems import landcover
from rtsseg.systems.landcover import Landcover, LandcoverFeed, LandcoverTask

ROOT = Path(__file__).resolve().parent.parent
SYSTEM = find_system('landcover')

@pytest.fixture(scope='module')
def land(tmp_path_factory):
    return make_class_world(tmp_path_factory.mktemp('land')/'land', side=96, images=12)

@pytest.fixture
def own_land(land, tmp_path):
    "A copy that a test may spoil"
    return shutil.copytree(land, tmp_path/'land')

def config(land, **more):
    small = dict(tracker=dict(kind='none'), windows=dict(side=64, stride=48),
                 data=dict(source=land, sides=[64], made=None))
    return load(ROOT/'configs'/'landcover'/'toy.yaml', **small | more)

def checked(cfg, system=SYSTEM, images=3):
    "{what: finding}"
    return {finding.what: finding for finding in seven_checks(system, cfg, system.feed(cfg), images)}

def data_checked(land):
    cfg = config(land)
    feed = SYSTEM.feed(cfg)
    return {finding.what: finding for finding in data_findings(feed, SYSTEM.task(cfg, feed), cfg)}

def errors(found):
    return {what for what, finding in found.items() if finding.level == 'error'}

@pytest.mark.parametrize('more', [{}, dict(loss=dict(parts=['boundary', 'edge']), freeze_backbone_epochs=5)],
                         ids=['toy', 'without a loss of labels'])
def test_all_seven_pass_and_have_figures(more, land):
    found = checked(config(land, **more))
    assert not errors(found)
    assert {what[0] for what in found} == set('1234567')
    assert all(finding.value for finding in found.values())
    assert 'boundary at 2 px' in found['2 IoU of each class'].value
    assert all(name in found['2 IoU of each class'].value for name in config(land).data.names)

def test_the_command_ends_in_a_verdict(land, tmp_path):
    (tmp_path/'cfg.yaml').write_text(to_yaml(config(land, runs=tmp_path/'runs')))
    done = shell('rtsseg-check', '--config', tmp_path/'cfg.yaml', '--batches', '2')
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith('READY') and '7 mean IoU by hand' in done.stdout
    assert not (tmp_path/'runs').exists()

def test_the_command_refuses(own_land, tmp_path):
    shutil.copy(own_land/'Val'/'Urban'/'images_png'/'0.png', own_land/'Train'/'Urban'/'images_png'/'0.png')
    (tmp_path/'cfg.yaml').write_text(to_yaml(config(own_land)))
    done = shell('rtsseg-check', '--config', tmp_path/'cfg.yaml')
    assert done.returncode == 2 and 'val: Val/Urban/images_png/0.png' in done.stderr

# ------------------------------------------------ 1 classes and the ignore index

def facts_of(land):
    return survey_class_files(ClassSamples.read(land))

def test_1_a_loss_that_learns_from_ignored_pixels(land, monkeypatch):
    cfg = config(land)
    task = LandcoverTask(cfg, None)
    monkeypatch.setattr(task, 'loss', lambda out, batch: LandcoverTask(cfg, None).loss(
        out, batch | dict(target=torch.where(batch['target'] == 255, 0, batch['target']))))
    finding = ignoring_finding(task, cfg.data, facts_of(land))
    assert finding.level == 'error' and 'the loss learns from ignored pixels' in finding.each[0]

def test_1_a_metric_that_counts_ignored_pixels(land, monkeypatch):
    cfg = config(land)
    task = LandcoverTask(cfg, None)
    rows = task.rows
    monkeypatch.setattr(task, 'rows', lambda out, batch: rows(
        out, batch | dict(target=torch.where(batch['target'] == 255, 0, batch['target']))))
    finding = ignoring_finding(task, cfg.data, facts_of(land))
    assert finding.level == 'error' and 'the metric counts ignored pixels' in finding.each[0]

ALL_PARTS = ['cross_entropy', 'dice', 'lovasz', 'boundary', 'edge']

@pytest.mark.parametrize('parts', [ALL_PARTS, ['boundary'], ['edge']], ids=['all', 'boundary', 'edge'])
@pytest.mark.parametrize('compares', [[], ['features'], ['features', 'logits']], ids=len)
def test_1_every_loss_is_asked(parts, compares, land):
    "One that compares features knows no labels, and is not asked"
    distil = dict(teacher='some/teacher', compares=compares) if compares else {}
    cfg = config(land, loss=dict(parts=parts), distil=distil)
    finding = ignoring_finding(LandcoverTask(cfg, None), cfg.data, facts_of(land))
    assert finding.level == 'ok'
    asked = [*parts, *(['teacher_logits'] if 'logits' in compares else [])]
    assert f'ignored by losses ({", ".join(asked)})' in finding.value

def counts_ignored(function):
    "A target that takes ignored pixels for the first class"
    return lambda target, *more: function(np.where(target == 255, 0, target), *more)

def test_1_a_loss_of_boundaries_or_of_a_teacher_that_learns_from_ignored_pixels(land, monkeypatch):
    cfg = config(land, loss=dict(parts=['boundary', 'edge']), distil=dict(teacher='some/teacher', compares=['logits']))
    monkeypatch.setattr(landcover, 'signed_distance', counts_ignored(landcover.signed_distance))
    monkeypatch.setattr(landcover, 'edge_target', counts_ignored(landcover.edge_target))
    divergence = landcover.softened_divergence
    monkeypatch.setattr(landcover, 'softened_divergence', lambda ours, theirs, target, T: divergence(
        ours, theirs, torch.zeros_like(target), T))
    finding = ignoring_finding(LandcoverTask(cfg, None), cfg.data, facts_of(land))
    assert finding.level == 'error'
    for line, name in zip(finding.each, ('boundary', 'edge', 'teacher_logits'), strict=True):
        assert f'the gradient of {name} there' in line

COLOURED = {
    'greys of a palette': (lambda mask: mask * 30, 'does not know'),
    'colours of a palette': (lambda mask: np.stack([mask, 7 - mask, mask], 2), 'write classes as numbers'),
}

@pytest.mark.parametrize('what', COLOURED)
def test_1_masks_in_colours(what, own_land):
    change, words = COLOURED[what]
    path = own_land/'Train'/'Urban'/'masks_png'/'0.png'
    cv2.imwrite(str(path), change(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)))
    found = data_checked(own_land)
    assert any(words in line for line in found['1 classes and ignore index'].each)

# ------------------------------------------------ 2 an IoU for each class

def test_2_no_boundary_of_two_or_three_pixels(land):
    found = checked(config(land, metrics=dict(boundary_widths=[5])))
    assert errors(found) == {'2 IoU of each class'}

def test_2_a_class_without_its_number(land):
    class Forgetful(Landcover):
        def metrics(self, table, cfg, weights=None):
            return {name: value for name, value in super().metrics(table, cfg, weights).items() if name != 'iou_road'}

    found = checked(config(land), Forgetful())
    assert found['2 IoU of each class'].each == ['no IoU of class road']

# ---------------------------- 3 normalisation, and a batch learnt by heart

def test_3_other_statistics_than_those_of_the_weights():
    "ImageNet's are asked for, and those of the data set were taken"
    cfg = load(ROOT/'configs'/'landcover'/'toy.yaml')
    model = cfg.model.model_copy(update=dict(encoder='tu-resnet18', weights='imagenet'))
    cfg = cfg.model_copy(update=dict(model=model))
    imagenet = [.485, .456, .406], [.229, .224, .225]
    assert normalisation_finding(cfg, dict(train=imagenet, val=imagenet)).level == 'ok'
    halves = [.5] * 3, [.5] * 3
    finding = normalisation_finding(cfg, dict(train=imagenet, val=halves))
    assert finding.level == 'error' and '0.485' in finding.note

@pytest.mark.parametrize('mistake', ['', 'another order of channels', 'another order of the statistics',
                                     'other statistics in training'])
def test_3_normalisation_is_measured_on_images(mistake, land, monkeypatch):
    "Whatever the statistics say, it is the images that are looked at"
    feed = LandcoverFeed(config(land, augment=dict(enabled=True), mixing=dict(mixup=dict(p=1)), batch_size=4))
    imagenet = feed.statistics = [.485, .456, .406], [.229, .224, .225]
    tiles = LandcoverFeed.tiles
    if mistake == 'another order of channels':
        monkeypatch.setattr(class_tiles, 'read_colours', lambda path: read_colours(path)[..., ::-1])
    if mistake == 'another order of the statistics':
        monkeypatch.setattr(LandcoverFeed, 'tiles', lambda self, split, mean, std: tiles(
            self, split, mean[::-1], std[::-1]))
    if mistake == 'other statistics in training':
        monkeypatch.setattr(LandcoverFeed, 'tiles', lambda self, split, mean, std: tiles(
            self, split, [.5] * 3 if split == 'train' else mean, std))
    measured = measured_statistics(feed.few(1))
    apart = max(np.abs(np.subtract(found, imagenet)).max() for found in measured.values())
    assert apart > .01 if mistake else apart < 1e-6

def test_3_a_model_that_does_not_learn(land):
    "Its head is frozen, and gives the same logits to all"
    class Frozen(Landcover):
        def model(self, cfg, feed):
            model = super().model(cfg, feed).requires_grad_(False)
            for parameter in model.segmentation_head.parameters():
                parameter.zero_()
            return model

    found = checked(config(land), Frozen())
    assert errors(found) == {'3 learns a small batch'}
    # ln 7
    assert '1.95 → 1.946' in found['3 learns a small batch'].value

# ------------------------------------------------ 4 image and mask move together

def masks_of(land):
    samples = ClassSamples.read(land).of('train').few(3)
    return [read_pair(samples, row, config(land).data.values).mask for row in range(3)]

LIVELY = Augment(elastic=dict(p=0))

def test_4_all_moves_of_a_lively_augmentation(land):
    data = config(land).data.model_copy(update=dict(scales=(.5, 2.), sides=[64, 96]))
    assert moving_finding(masks_of(land), data, LIVELY, 0).level == 'ok'

def shifted_crop(crop):
    def shifted(*args):
        image, mask = crop(*args)
        return image, np.roll(mask, 4, 1)
    return shifted

def flipped_mask(augment):
    def flipped(self, image, mask, key, *rest):
        image, mask = augment(self, image, mask, key, *rest)
        return image, np.ascontiguousarray(mask[:, ::-1])
    return flipped

@pytest.mark.parametrize('what', ['crop', 'flip'])
def test_4_a_mask_that_moves_otherwise(what, land, monkeypatch):
    if what == 'crop':
        monkeypatch.setattr(class_tiles, 'crop_at_scale', shifted_crop(class_tiles.crop_at_scale))
    else:
        monkeypatch.setattr(Augmenter, '__call__', flipped_mask(Augmenter.__call__))
    finding = moving_finding(masks_of(land), config(land).data, Augment(), 0)
    assert finding.level == 'error' and 'moves of image and mask differ' in finding.note

def test_4_agreement_is_counted_away_from_outlines():
    "Two halves of 8 × 16 pixels, the outline 2 pixels wide on either side; a colour change keeps the order of greys"
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 1
    drawn = .2 + .5 * mask.astype(np.float32)
    assert agreement(drawn, mask) == (16 * 12, 16 * 12)
    drawn[0, 0] = .7
    assert agreement(drawn, mask) == (16 * 12 - 1, 16 * 12)
    assert agreement(drawn, np.zeros_like(mask)) == (0, 0)

# ------------------------------------------------ 5 splits

def test_5_an_image_of_validation_in_training(own_land):
    "The same pixels in a file of other bytes"
    pixels = cv2.imread(str(own_land/'Val'/'Urban'/'images_png'/'0.png'))
    cv2.imwrite(str(own_land/'Train'/'Rural'/'images_png'/'1.png'), pixels, [cv2.IMWRITE_PNG_COMPRESSION, 0])
    found = data_checked(own_land)
    assert errors(found) == {'5 splits'}
    assert 'train: Train/Rural/images_png/1.png' in found['5 splits'].each[0]

def test_5_an_image_twice_in_training_is_a_warning(own_land):
    for kind in ('images_png', 'masks_png'):
        folder = own_land/'Train'/'Urban'/kind
        shutil.copy(folder/'0.png', folder/'other_set_0.png')
    found = data_checked(own_land)
    assert found['5 images once'].level == 'warning' and 'other_set_0.png' in found['5 images once'].each[0]

def test_5_a_table_that_deals_official_images_again(own_land):
    table = ClassSamples.read(own_land).table[['image', 'mask', 'split']]
    table.loc[table.split == 'val', 'split'] = ['train', 'val', 'val']
    table.to_csv(own_land/'list.csv', index=False)
    found = data_checked(own_land/'list.csv')
    assert errors(found) == {'5 splits as published'}
    assert len(found['5 splits as published'].each) == 1

@pytest.mark.parametrize('path, split', [('Train/Urban/images_png/1.png', 'train'), ('images/1.png', None),
                                         ('train/area/validation/x.png', 'val'), ('train.png', None)])
def test_5_the_split_that_a_folder_names(path, split):
    assert split_of_path(path) == split

# ------------------------------------------------ 6 evaluation equals validation

class OtherWindows(Landcover):
    def unpack(self, folder):
        packed = super().unpack(folder)
        packed.cfg.windows.stride = 32
        return packed

class OtherNormalisation(Landcover):
    def unpack(self, folder):
        packed = super().unpack(folder)
        packed.mean = [value + .2 for value in packed.mean]
        return packed

@pytest.mark.parametrize('system', [OtherWindows(), OtherNormalisation()], ids=lambda system: type(system).__name__)
def test_6_an_evaluation_of_another_kind(system, land):
    assert '6 evaluation equals validation' in errors(checked(config(land), system))

# ------------------------------------------------ 7 the mean by hand

class BackgroundTwice(Landcover):
    def metrics(self, table, cfg, weights=None):
        found = super().metrics(table, cfg, weights)
        ious = [found[f'iou_{name}'] for name in cfg.data.names]
        known = [iou for iou in [ious[0], *ious] if iou == iou]
        return found | dict(miou=sum(known) / len(known))

class AbsentAsZero(Landcover):
    def metrics(self, table, cfg, weights=None):
        found = super().metrics(table, cfg, weights)
        return found | dict(miou=np.nan_to_num([found[f'iou_{name}'] for name in cfg.data.names]).mean())

@pytest.mark.parametrize('system, why', [(BackgroundTwice(), 'class 0 counts twice'),
                                         (AbsentAsZero(), 'classes that do not occur count as 0')],
                         ids=['twice', 'zero'])
def test_7_a_mean_of_another_kind(system, why, land):
    cfg = config(land)
    finding = hand_finding(system, LandcoverTask(cfg, None), cfg, 7)
    assert finding.level == 'error' and why in finding.note

class_counts = landcover.count_image

def count_ignored(prediction, target, classes, widths):
    return class_counts(prediction, np.where(target == 255, 0, target), classes, widths)

def test_7_a_mean_that_counts_ignored_pixels(land, monkeypatch):
    "As background, as a metric without an ignore index does"
    cfg = config(land)
    monkeypatch.setattr(landcover, 'count_image', count_ignored)
    finding = hand_finding(SYSTEM, LandcoverTask(cfg, None), cfg, 7)
    assert 'ignored pixels count as class 0' in finding.note


def test_7_the_mistakes_by_an_independent_library():
    "torchmetrics, told to make each of them"
    from torchmetrics.functional.classification import multiclass_jaccard_index

    from rtsseg.class_checks import HAND_IOU, HAND_PREDICTED, HAND_TRUE
    true, predicted = torch.tensor(HAND_TRUE), torch.tensor(HAND_PREDICTED)
    by_class = multiclass_jaccard_index(predicted, true, 2, average='none', ignore_index=255)
    assert by_class.tolist() == pytest.approx([float(iou) for iou in HAND_IOU])
    as_background = multiclass_jaccard_index(predicted, torch.where(true == 255, 0, true), 2, average='none').mean()
    assert float(as_background) == pytest.approx(float(hand_mistakes(7)['ignored pixels count as class 0']))

# ------------------------------------------------ what stands in the way of all of them

def test_files_that_cannot_be_read_are_listed_with_the_others(own_land):
    path = own_land/'Train'/'Urban'/'masks_png'/'0.png'
    cv2.imwrite(str(path), cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[:-8])
    (own_land/'Val'/'Rural'/'images_png'/'1.png').write_bytes(b'nothing')
    cfg = config(own_land)
    with pytest.raises(DataError) as caught:
        SYSTEM.check(cfg)
    assert 'its image has 96' in str(caught.value) and '1.png' in str(caught.value)
    # no model was built for it
    assert 'learns a small batch' not in str(caught.value)

def test_the_statistics_of_few_images_are_those_of_all(land):
    feed = LandcoverFeed(config(land))
    assert feed.few(2).statistics == feed.statistics and feed.few(2).size('train') == 2
