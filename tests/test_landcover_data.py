"Data of land cover: bad files are refused, all of them named; a test split without masks becomes maps to send in"
import io
import shutil
from pathlib import Path
from zipfile import ZipFile

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from helpers.shell import shell
from rtsseg.class_tiles import ClassSamples
from rtsseg.class_world import make_class_world
from rtsseg.config import ConfigError, find_system, load
from rtsseg.console import DataError
from rtsseg.evaluation import evaluate
from rtsseg.processes import make_accelerator
from rtsseg.system import Pass
from rtsseg.systems.landcover import LandcoverFeed, map_names, task_of_pass
from rtsseg.training import train

ROOT = Path(__file__).resolve().parent.parent

@pytest.fixture(scope='module')
def land(tmp_path_factory):
    return make_class_world(tmp_path_factory.mktemp('land')/'land', side=96, images=8)

@pytest.fixture
def own_land(land, tmp_path):
    "A copy that a test may spoil"
    return shutil.copytree(land, tmp_path/'land')

def config(land, **more):
    small = dict(epochs=1, batch_size=2, tracker=dict(kind='none'), windows=dict(side=64, stride=48),
                 data=dict(source=land, sides=[64], made=None))
    return load(ROOT/'configs'/'landcover'/'toy.yaml', **small | more)

# ------------------------------------------------ bad input

def change_mask(land, change, split='Train', number=0):
    path = land/split/('Urban', 'Rural')[number % 2]/'masks_png'/f'{number}.png'
    cv2.imwrite(str(path), change(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)))
    return path

def paletted(land):
    "A palette whose colours are not its indices: the indices are the classes"
    path = land/'Train'/'Urban'/'masks_png'/'0.png'
    picture = Image.fromarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), 'P')
    picture.putpalette([value for index in range(8) for value in (255 - 30 * index, 7 * index, 90)])
    picture.save(path)

def test_indices_of_a_palette_are_classes(own_land):
    before = LandcoverFeed(config(own_land)).counts
    paletted(own_land)
    assert (LandcoverFeed(config(own_land)).counts == before).all()

BAD = {
    'an unknown value': (lambda mask: np.where(mask == mask[0, 0], 9, mask).astype(np.uint8), r'mask values \[9\]'),
    'colours': (lambda mask: np.stack([mask, 7 - mask, mask], 2), 'write classes as numbers'),
    'another size': (lambda mask: mask[:-8], 'its image has 96 × 96'),
    '16 bits': (lambda mask: mask.astype(np.uint16), 'a mask is uint8'),
}

@pytest.mark.parametrize('what', BAD)
def test_a_bad_mask_is_refused_before_a_run_begins(what, own_land, tmp_path):
    change, words = BAD[what]
    change_mask(own_land, change)
    with pytest.raises(DataError, match=words):
        train(config(own_land, runs=tmp_path/'runs'))
    assert not (tmp_path/'runs').exists()

def test_all_bad_masks_are_named_at_once(own_land):
    for number, (change, _) in enumerate(BAD.values()):
        change_mask(own_land, change, number=number)
    with pytest.raises(DataError) as caught:
        LandcoverFeed(config(own_land)).check()
    assert all(f'{number}.png' in str(caught.value) for number in range(len(BAD)))

def without(label):
    "Masks in which pixels of a class are ignored"
    return lambda mask: np.where(mask == label + 1, 0, mask).astype(np.uint8)

def test_a_class_without_pixels_in_training_is_an_error(own_land):
    for number in range(8):
        change_mask(own_land, without(3), number=number)
    with pytest.raises(DataError, match="class 'water': no pixel of the training split"):
        LandcoverFeed(config(own_land)).check()

def test_a_class_without_pixels_in_validation_is_said(own_land, tmp_path, caplog):
    "The run goes through; the class has no IoU, and the mean is over the others"
    for number in range(2):
        change_mask(own_land, without(3), 'Val', number)
    cfg = config(own_land, runs=tmp_path/'runs')
    assert any('no pixel of the val split is water' in line for line in LandcoverFeed(cfg).warnings())
    system = find_system('landcover')
    scores = system.metrics(system.read_table(evaluate(train(cfg), 'val')), cfg)
    others = [value for name, value in scores.items() if name.startswith('iou_') and name != 'iou_water']
    assert np.isnan(scores['iou_water']) or scores['iou_water'] == 0
    assert scores['miou'] == pytest.approx(np.nanmean([*others, scores['iou_water']]))

def test_a_training_image_without_its_mask(own_land):
    (own_land/'Train'/'Urban'/'masks_png'/'0.png').unlink()
    with pytest.raises(DataError, match='Train/Urban/images_png/0.png: no mask'):
        ClassSamples.read(own_land)

@pytest.mark.parametrize('folder', ['Trian', 'EarthVQA'])
def test_a_folder_that_is_not_an_official_split(folder, own_land):
    shutil.copytree(own_land/'Train', own_land/folder)
    with pytest.raises(DataError, match=f'{folder}: not the name of a split'):
        ClassSamples.read(own_land)

# ------------------------------------------------ the test split

@pytest.fixture(scope='module')
def unlabelled(land, tmp_path_factory):
    "A finished run on a land whose test split has no masks"
    home = tmp_path_factory.mktemp('unlabelled')
    shutil.copytree(land, home/'land')
    for folder in (home/'land'/'Test').glob('*/masks_png'):
        shutil.rmtree(folder)
    return train(config(home/'land', runs=home/'runs'))

def read_maps(folder, name='test.maps.zip'):
    with ZipFile(folder/'evidence'/name) as archive:
        return {entry: np.array(Image.open(io.BytesIO(archive.read(entry)))) for entry in archive.namelist()}

def predicted(folder, views):
    "The maps of the test split by the task itself"
    system, cfg = find_system('landcover'), load(folder/'config.yaml')
    packed, feed = system.unpack(folder/'model'), system.feed(cfg)
    task = task_of_pass(packed, feed, Pass('test', views, folder, make_accelerator(cfg)))
    with torch.inference_mode():
        found = [task.maps(task.forward(packed.model, batch), batch) for batch in feed.split('test', packed)]
    return [labels for maps in found for labels in maps]

@pytest.mark.parametrize('views, name', [('none', 'test.maps.zip'), ('flips-clean', 'test-flips-clean.maps.zip')])
def test_maps_are_uint8_pngs_named_as_the_images(unlabelled, views, name):
    evaluate(unlabelled, 'test', views, force=True)
    maps = read_maps(unlabelled, name)
    cfg = load(unlabelled/'config.yaml')
    assert sorted(maps) == sorted(path.name for path in (cfg.data.source/'Test').glob('*/images_png/*.png'))
    for labels in maps.values():
        assert labels.dtype == np.uint8 and labels.shape == (96, 96) and labels.max() <= 6
    for found, expected in zip(maps.values(), predicted(unlabelled, views), strict=True):
        np.testing.assert_array_equal(found, expected)

def test_the_command_makes_them_and_repeats_them(unlabelled):
    archive = unlabelled/'evidence'/'test.maps.zip'
    contents = []
    for _ in range(2):
        done = shell('rtsseg-evaluate', '--run', unlabelled, '--split', 'test', '--force')
        assert done.returncode == 0, done.stdout + done.stderr
        contents.append(archive.read_bytes())
    assert contents[0] == contents[1]

def test_a_split_with_masks_needs_no_maps(unlabelled):
    evaluate(unlabelled, 'val')
    assert not (unlabelled/'evidence'/'val.maps.zip').exists()

def test_images_of_one_name_keep_their_folders():
    assert map_names(['Test/Urban/images_png/1.png', 'Test/Rural/images_png/2.png']) == ['1.png', '2.png']
    assert map_names(['a/1.jpg', 'b/1.jpg']) == ['a/1.png', 'b/1.png']

# ------------------------------------------------ a model from elsewhere

@pytest.fixture
def theirs(land, tmp_path):
    "A model with statistics of its own"
    cfg, system = config(land), find_system('landcover')
    feed = LandcoverFeed(cfg)
    feed.statistics = [.2, .3, .4], [.5, .6, .7]
    (tmp_path/'theirs').mkdir()
    best = dict(epoch=1, step=1, value=.5, metrics={})
    system.package(tmp_path/'theirs', system.model(cfg, feed), cfg, feed, best, {})
    return system.unpack(tmp_path/'theirs')

def test_a_refiner_sees_images_as_they_are(land, theirs, tmp_path):
    "Whatever a model was normalised by"
    feed = LandcoverFeed(config(land))
    task = task_of_pass(theirs, feed, Pass('val', 'none', tmp_path, make_accelerator(feed.cfg)))
    samples = feed.samples.of('val')
    for row, batch in enumerate(feed.split('val', theirs)):
        stored = cv2.imread(str(samples.root/samples.table.image[row]))[..., ::-1]
        assert (task.pixels(batch, 0) == stored).all()

def test_a_model_of_other_classes_is_not_judged(land, theirs):
    "The same names in another order are other classes"
    data = config(land).data
    turned = config(land, data=dict(source=land, sides=[64], made=None, names=data.names[::-1]))
    with pytest.raises(DataError, match='theirs on land: the model has the classes background, building'):
        LandcoverFeed(turned).split('val', theirs)

@pytest.mark.parametrize('more, words', [(dict(windows=dict(side=32, stride=32)), 'in windows of the model, side=64'),
                                         (dict(metrics=dict(boundary_widths=[5])), r'widths of the model, [2, 3]')])
def test_a_model_of_other_windows_or_boundaries_is_judged_and_named(more, words, land, theirs, caplog):
    with caplog.at_level('WARNING', logger='rtsseg'):
        LandcoverFeed(config(land)).split('val', theirs)
        assert not caplog.records
        LandcoverFeed(config(land, **more)).split('val', theirs)
    assert words in caplog.text

def test_a_run_starts_from_a_model_and_normalises_as_it_did(land, theirs):
    model = theirs.cfg.model.model_dump() | dict(weights=str(theirs.folder), normalisation='pretrained')
    cfg, system = config(land, model=model), find_system('landcover')
    feed = LandcoverFeed(cfg)
    assert feed.statistics == ([.2, .3, .4], [.5, .6, .7])
    begun, trained = system.model(cfg, feed).state_dict(), theirs.model.state_dict()
    assert all(torch.equal(begun[name], tensor) for name, tensor in trained.items())

@pytest.mark.parametrize('facts', ['{"classes": ["a", "b"]}', '{"mean": "grey", "std": [1, 1, 1]}', '{'])
def test_a_model_that_does_not_say_how_it_normalises(facts, land, tmp_path):
    (tmp_path/'classes.json').write_text(facts)
    model = dict(weights=str(tmp_path), normalisation='pretrained')
    with pytest.raises(ConfigError, match=f'model.weights: {tmp_path}: .*classes.json'):
        LandcoverFeed(config(land, model=model)).statistics  # noqa: B018
