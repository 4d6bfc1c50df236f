"What training draws beside the guide: weights of objects and regions, objects pasted onto negative tiles"
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from scipy.stats import binomtest, chisquare

from rtsseg.augment import Augmenter, boundary, paste_objects
from rtsseg.config import TRANSFORMS, Augment, ConfigError, CurriculumRow, RtsConfig, Sampler
from rtsseg.console import DataError
from rtsseg.manifest import read_manifest
from rtsseg.prepare import prepare, statistics
from rtsseg.runs import Stopped
from rtsseg.sampler import Batches
from rtsseg.segment import SegmentTask
from rtsseg.tiles import TileDataset, draw_weights, make_loader
from rtsseg.training import train
from rtsseg.windows import draw_crop, label_windows, object_weights
from test_windows import SHAPES, blobs, image_run, write_images

# ---------------------------------------------------------------- crops by the area of objects
EIGHT = np.ones((3, 3))

@given(height=st.integers(1, 200), width=st.integers(1, 200), seed=st.integers(0, 999), power=st.floats(-2, 2))
def test_an_object_has_its_weight_once(height, width, seed, power):
    "However many windows it lies in, and however often: by scikit-image's peer, SciPy"
    label = blobs(height, width, seed)
    objects, n = ndimage.label(label == 1, EIGHT)
    summed = np.zeros(n + 1)
    for row in label_windows(label, 32):
        for point, weight, area in zip(row['points'], object_weights(row, power), row['areas'], strict=True):
            summed[objects[point]] += weight
            assert area == (objects == objects[point]).sum()
    areas = ndimage.sum_labels(label == 1, objects, np.arange(1, n + 1))
    np.testing.assert_allclose(summed[1:], areas**power, rtol=1e-9)

def three_objects():
    "One object in nine windows of 32 pixels, and two small ones in a window together"
    label = np.zeros((128, 160), np.uint8)
    label[20:75, 20:75] = 1
    label[110:113, 100:104] = 1
    label[120:122, 120:125] = 1
    return label

@pytest.mark.parametrize('power', [-.5, 0, 1])
def test_objects_are_drawn_by_their_area(power):
    "Sampler and crop together: the share of draws of each object is its area to the power, over the sum of all"
    table = pd.DataFrame(label_windows(three_objects(), 32)).assign(region='all')
    table['positive'] = table.n_positive > 0
    cfg = RtsConfig(data=dict(crops=dict(enabled=True, area_power=power)))
    one = Sampler(curriculum=[CurriculumRow(first=1, last=1, ratio=2)])
    batches = Batches(table.positive, one, 4, seed=0, weights=draw_weights(table, cfg))
    objects, n = ndimage.label(three_objects(), EIGHT)
    drawn = Counter()
    for epoch in range(1, 400):
        batches.set_epoch(epoch)
        for key in (key for batch in batches for key in batch):
            row = table.loc[key[2]]
            if row.positive:
                # without jitter the object's point is the middle, where the image is large enough
                weights = object_weights(row, power)
                rng = np.random.default_rng((*key, 2))
                found = rng.choice(len(weights), p=weights / weights.sum())
                drawn[objects[row.points[found]]] += 1
                crop = draw_crop(row, np.random.default_rng((*key, 2)), 0., power)
                y, x = row.points[found]
                assert crop.top <= y < crop.top + 32 and crop.left <= x < crop.left + 32
    areas = np.bincount(objects.ravel())[1:].astype(float)
    expected = areas**power / (areas**power).sum()
    found = np.array([drawn[i] for i in range(1, n + 1)])
    # the number of draws of a window is even more regular than chance
    np.testing.assert_allclose(found / found.sum(), expected, atol=4 * .5 / found.sum()**.5)

# ---------------------------------------------------------------- weights in the sampler
def weighed(n_pos, n_neg, ratio, fraction, size, seed, weights):
    "A sampler with weights, and the same without; None where no batch is full"
    positive = np.random.default_rng(n_pos + n_neg).permutation([True] * n_pos + [False] * n_neg)
    cfg = Sampler(positive_fraction=fraction, curriculum=[CurriculumRow(first=1, last=9, ratio=ratio)])
    try:
        return [Batches(positive, cfg, size, seed, weights=w) for w in (weights, None)]
    except ValueError:
        return None

@given(n_pos=st.integers(1, 40), n_neg=st.integers(1, 200), ratio=st.integers(1, 8), size=st.integers(2, 20),
       fraction=st.sampled_from([.5, .3, None]), seed=st.integers(0, 999), number=st.integers(0, 2))
def test_weights_change_which_tiles_come_and_nothing_else(n_pos, n_neg, ratio, size, fraction, seed, number):
    """As many batches and as many positives in each; no negative twice, no key twice in an epoch of several passes; in
    a pass a positive tile comes as often as its weight says, rounded up or down"""
    weights = np.random.default_rng(seed).uniform(.1, 5, n_pos + n_neg)
    made = weighed(n_pos, n_neg, ratio, fraction, size, seed, weights)
    if made is None:
        return
    heavy, even = made
    streams = []
    for batches in made:
        batches.set_epoch(3)
        batches.set_pass(number)
        streams.append(list(batches))
    shapes = [[(len(batch), sum(heavy.is_positive[k[2]] for k in batch)) for batch in stream] for stream in streams]
    assert len(shapes[0]) == len(shapes[1])
    if fraction is not None:
        assert shapes[0] == shapes[1]
    keys = [key for batch in streams[0] for key in batch]
    heavy.set_pass(number + 1)
    later = [key for batch in heavy for key in batch]
    assert len(set(keys + later)) == len(keys + later)
    negatives = [key[2] for key in keys if not heavy.is_positive[key[2]]]
    assert len(set(negatives)) == len(negatives)
    expected = n_pos * weights[heavy.positive] / weights[heavy.positive].sum()
    drawn = [key[2] for key in keys if heavy.is_positive[key[2]]]
    for first in range(0, len(drawn) - n_pos + 1, n_pos):
        count = Counter(drawn[first:first + n_pos])
        found = np.array([count[t] for t in heavy.positive])
        assert (np.floor(expected - 1e-9) <= found).all() and (found <= np.ceil(expected + 1e-9)).all()

@pytest.mark.parametrize('fraction', [.5, None])
def test_halves_of_a_weighed_batch_are_its_batches(fraction):
    "Two processes that take turns see what one process sees"
    weights = np.random.default_rng(0).uniform(.1, 5, 130)
    one, two = (list(weighed(10, 120, 10, fraction, size, 4, weights)[0]) for size in (20, 10))
    assert [set(batch) for batch in one] == [set(a + b) for a, b in zip(two[::2], two[1::2])]

def test_alike_weights_are_none():
    heavy, even = weighed(10, 120, 5, .5, 10, 4, np.full(130, 3.))
    assert list(heavy) == list(even)

def test_losses_multiply_weights():
    positive = [True] + [False] * 4
    batches = Batches(positive, Sampler(hard_negatives=.5), 2, seed=0, weights=[1, 1, 2, 3, 4])
    batches.learn([1, 2], [3., 1.])
    batches.set_epoch(2)
    np.testing.assert_allclose(batches.weights(), [1.25, 1.5, 3, 4])

def test_negatives_of_a_weight_come_as_often_as_it_says():
    "One of three for each epoch: χ²"
    one = Sampler(positive_fraction=None, curriculum=[CurriculumRow(first=1, last=1, ratio=1)])
    batches = Batches([True, False, False, False], one, 2, seed=0, weights=[1, 1, 2, 5])
    drawn = Counter()
    for epoch in range(1, 2001):
        batches.set_epoch(epoch)
        drawn.update(key[2] for batch in batches for key in batch)
    assert chisquare([drawn[t] for t in (1, 2, 3)], [250, 500, 1250]).pvalue > .01

def test_a_region_that_does_not_exist(tiny_world):
    table = read_manifest(tiny_world).of('train').table
    known = table.region.iloc[0]
    weights = draw_weights(table, RtsConfig(sampler=dict(region_weights={known: 2.5})))
    assert (weights == np.where(table.region == known, 2.5, 1)).all()
    with pytest.raises(ConfigError, match=f"no training tile lies in region '{known}x'.*{known}"):
        draw_weights(table, RtsConfig(sampler=dict(region_weights={f'{known}x': 2})))

# ---------------------------------------------------------------- pasted objects
labels = arrays(np.uint8, (12, 9), elements=st.sampled_from([0, 1, 255]))

@given(mask=labels, source_mask=labels, sigma=st.sampled_from([0, .8, 3]), channels=st.integers(3, 6))
def test_pasting_by_its_definition(mask, source_mask, sigma, channels):
    "Objects whole, with their label; nothing of an ignored pixel, and nothing onto one; without blending nothing else"
    rng = np.random.default_rng(0)
    image, source = rng.random((2, 12, 9, channels), dtype=np.float32)
    out, out_mask = image.copy(), mask.copy()
    before = source.copy(), source_mask.copy()
    paste_objects(out, out_mask, source, source_mask, sigma)
    taken = (source_mask == 1) & (mask != 255)
    assert (out_mask == np.where(taken, 1, mask)).all()
    np.testing.assert_allclose(out[taken], source[taken], atol=1e-6)
    kept = (source_mask == 255) | (mask == 255)
    assert (out[kept] == image[kept]).all()
    if not sigma:
        assert (out[~taken] == image[~taken]).all()
    else:
        blurred = ndimage.gaussian_filter(taken.astype(np.float32), sigma, mode='mirror', radius=round(4 * sigma))
        share = np.where(kept, 0, np.maximum(taken, blurred))[..., None]
        np.testing.assert_allclose(out, image + share * (source - image), atol=1e-5)
    assert all((a == b).all() for a, b in zip(before, (source, source_mask)))

def test_light_falls_on_pasted_objects_too():
    "Moves are drawn for each tile, colours once: a grey object on grey ground stays invisible"
    colours = {name: dict(p=1) for name in ('brightness', 'contrast')}
    still = {name: dict(p=0) for name in TRANSFORMS if name not in colours}
    augment = Augmenter(Augment(**still, **colours), [.5] * 3)
    grey, ground = np.full((16, 16, 3), .5, np.float32), np.zeros((16, 16), np.uint8)
    label = ground.copy()
    label[4:9, 4:9] = 1
    moved = augment.moved(grey, label, (1, 1, 0, 0))
    assert (moved[0] == grey).all()
    image, mask = augment(grey, ground, (2, 1, 0, 0), pasted=moved)
    assert (mask == label).all() and np.ptp(image) < 1e-6 and abs(image[0, 0, 0] - .5) > 1e-3

def pasting(tiny_world, tmp_path, **more):
    "The config of a run on the toy world whose negative draws often get objects"
    augment = dict(copy_paste=dict(p=.5)) | more.pop('augment', {})
    settings = dict(data=dict(manifest=tiny_world, tile_size=64, split_check='warn'), runs=tmp_path/'runs',
                    batch_size=8, device='cpu', loader=dict(num_workers=0), augment=augment)
    return RtsConfig(**settings | more)

def datasets(cfg):
    "The training tiles, and the same without pasting"
    manifest = prepare(cfg)
    part, stats = manifest.of('train'), statistics(cfg, manifest)
    without = cfg.model_copy(deep=True)
    without.augment.copy_paste.p = 0
    return TileDataset(part, stats, cfg), TileDataset(part, stats, without)

def negative_keys(tiles, n):
    negative = np.flatnonzero(~tiles.manifest.table.positive)
    return [(42, 1, int(negative[i % len(negative)]), i // len(negative)) for i in range(n)]

def test_who_gets_objects_of_whom(tiny_world, tmp_path):
    "A share p of the negative draws, no positive one; sources come as the sampler would draw them, with their own keys"
    heavy = 'Banks Island'
    cfg = pasting(tiny_world, tmp_path, sampler=dict(region_weights={heavy: 3}), augment=dict(copy_paste=dict(p=.3)))
    tiles, without = datasets(cfg)
    table = tiles.manifest.table
    keys = [(seed, 1 + i % 3, row, k) for i, (seed, _, row, k) in enumerate(negative_keys(tiles, 3000))]
    sources = [tiles.source(key) for key in keys]
    found = [source for source in sources if source]
    assert binomtest(len(found), len(keys), .3).pvalue > .01
    assert all(table.positive[source[2]] for source in found)
    assert sources == [tiles.source(key) for key in keys]
    assert len(set(found)) == len(found) and not {source[0] for source in found} & {42}
    weights = draw_weights(table, cfg)[table.positive]
    assert 1 in weights and 3 in weights
    drawn = Counter(source[2] for source in found)
    expected = len(found) * weights / weights.sum()
    assert chisquare([drawn[i] for i in np.flatnonzero(table.positive)], expected).pvalue > .01
    assert not any(tiles.source((42, 1, int(i), k)) for i in np.flatnonzero(table.positive) for k in range(9))
    assert not any(map(without.source, keys))
    # epoch and place in the epoch are those of the draw
    assert all(source[1] == key[1] and source[3] == key[3] for key, source in zip(keys, sources) if source)
    tiles.cfg.augment.enabled = False
    assert not any(map(tiles.source, keys))

STILL = {name: dict(p=0) for name in TRANSFORMS}

@pytest.mark.parametrize('loss', [{}, dict(boundary_handling='ignore', boundary_ignore_width=2)])
def test_a_draw_with_objects_is_two_tiles(loss, tiny_world, tmp_path):
    "Image and mask of the negative tile with the pixels of a positive one; the band lies along pasted outlines"
    tiles, without = datasets(pasting(tiny_world, tmp_path, augment=STILL | dict(copy_paste=dict(p=.5)), loss=loss))
    changed = 0
    for key in negative_keys(tiles, 60):
        source, sample, plain = tiles.source(key), tiles[key], without[key]
        if source is None:
            assert all(torch.equal(sample[k], plain[k]) for k in ('image', 'target'))
            continue
        (image, mask), (of, of_mask) = ((without[i]['image'], without[i]['target']) for i in (key[2], source[2]))
        taken = (of_mask == 1) & (mask != 255)
        assert torch.equal(sample['image'], torch.where(taken, of, image))
        label = torch.where(taken, 1, mask).numpy().astype(np.uint8)
        assert (sample['target'].numpy() == boundary(label, tiles.cfg.loss)).all()
        changed += taken.any().item()
    assert changed > 15

def test_validation_and_evaluation_get_no_objects(tiny_world, tmp_path):
    tiles, without = datasets(pasting(tiny_world, tmp_path, augment=dict(copy_paste=dict(p=1))))
    for i in range(len(tiles)):
        assert torch.equal(tiles[i]['image'], without[i]['image'])

def test_pasting_does_not_depend_on_workers(tiny_world, tmp_path):
    cfg = pasting(tiny_world, tmp_path)
    tiles = datasets(cfg)[0]
    batches = Batches(tiles.manifest.table.positive, cfg.sampler, 8, seed=1)
    epochs = []
    for workers in (0, 2):
        loader = make_loader(tiles, cfg.loader.model_copy(update=dict(num_workers=workers)), batch_sampler=batches)
        epochs.append([torch.cat([b['image'].flatten(), b['target'].flatten()]) for b in loader])
    assert all(map(torch.equal, *epochs))

def test_a_source_that_cannot_be_read(tiny_world, tmp_path):
    "The draw is the negative tile itself, and the source is noted"
    tiles, without = datasets(pasting(tiny_world, tmp_path, augment=dict(copy_paste=dict(p=1))))
    key = negative_keys(tiles, 1)[0]
    load_tile, lost = tiles._load, tiles.source(key)[2]

    def load_others(tile, *given):
        if tile == lost:
            raise DataError('damaged')
        return load_tile(tile, *given)

    tiles._load = load_others
    assert all(torch.equal(tiles[key][name], without[key][name]) for name in ('image', 'target'))
    assert tiles.unread.nonzero().tolist() == [[lost]]

def test_a_pasted_object_is_no_false_alarm(tiny_world, tmp_path):
    "A tile with an object has no loss that hard negatives could learn, pasted or not"
    cfg = pasting(tiny_world, tmp_path)
    target = torch.zeros(3, 8, 8)
    target[1, 2:4, 2:4] = 1
    target[2] = 255
    task = SegmentTask(cfg, None)
    rows, losses = task.difficulty(torch.zeros(3, 8, 8), dict(target=target, tile=torch.arange(3)))
    assert rows.tolist() == [0, 1, 2] and losses.isnan().tolist() == [False, True, True]

# ---------------------------------------------------------------- a run with all of it
@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images')/'data', SHAPES)

def full_run(images, runs):
    cfg = image_run(images, runs, epochs=3, sampler=dict(
        hard_negatives=.5, region_weights=dict(all=2), curriculum=[dict(first=1, last=3, ratio=1)]))
    cfg.data.crops.area_power = -.5
    cfg.augment.copy_paste.p, cfg.augment.copy_paste.blend_sigma = .5, 1
    return cfg

class StopAt:
    "Asks a run to stop at a step"
    def __init__(self, step):
        self.step = step

    def on_step(self, run):
        if run.step == self.step:
            run.stop('the test asks')

@pytest.fixture(scope='module')
def whole_run(images, tmp_path_factory):
    folder = train(full_run(images, tmp_path_factory.mktemp('runs')))
    return (folder/'model'/'model.safetensors').read_bytes()

def test_all_options_train_and_repeat(whole_run, images, tmp_path):
    "Stopped in an epoch and resumed, with workers: the same bytes"
    cfg = full_run(images, tmp_path)
    cfg.loader.num_workers = 2
    with pytest.raises(Stopped):
        train(cfg, observers=[StopAt(6)])
    folder = train(cfg)
    assert (folder/'model'/'model.safetensors').read_bytes() == whole_run

@pytest.mark.parametrize('switch', ['area_power', 'copy_paste', 'hard_negatives'])
def test_each_option_changes_what_is_learnt(switch, whole_run, images, tmp_path):
    cfg = full_run(images, tmp_path)
    if switch == 'area_power':
        cfg.data.crops.area_power = None
    elif switch == 'copy_paste':
        cfg.augment.copy_paste.p = 0
    else:
        cfg.sampler.hard_negatives = 0
    assert (train(cfg)/'model'/'model.safetensors').read_bytes() != whole_run
