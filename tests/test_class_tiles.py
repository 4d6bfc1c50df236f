"Images with a class for each pixel: real LoveDA tiles, files as people have them, and draws that only the key decides"
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rasterio.enums import ColorInterp
from torch.utils.data import DataLoader

from rtsseg.class_tiles import (
    NO_CLASS,
    ClassBatches,
    ClassData,
    ClassSamples,
    ClassTiles,
    check_pairs,
    crop_at_scale,
    cut_padded,
    image_weights,
    read_colours,
    read_pair,
)
from rtsseg.config import Augment
from rtsseg.console import DataError
from rtsseg.mixing import KeyedSamples, Mixing, MixingCollate
from rtsseg.raster import write_raster
from rtsseg.scenestats import channel_names

LOVEDA = Path(__file__).resolve().parents[2]/'shared'/'data'/'loveda_three'
quick = settings(max_examples=60, deadline=None)
NAMES = ['field', 'road', 'wood']

RED, GREEN, BLUE = ColorInterp.red, ColorInterp.green, ColorInterp.blue

@pytest.mark.parametrize('order', [(BLUE, GREEN, RED), (GREEN, RED, BLUE)])
def test_colours_are_read_by_what_the_file_declares(tmp_path, order):
    planes = np.arange(3 * 16 * 16).reshape(3, 16, 16).astype(np.uint8)
    write_raster(tmp_path/'image.tif', planes)
    with rasterio.open(tmp_path/'image.tif', 'r+') as ds:
        ds.colorinterp = order
    places = [order.index(colour) for colour in (RED, GREEN, BLUE)]
    np.testing.assert_array_equal(read_colours(tmp_path/'image.tif'), planes[places].transpose(1, 2, 0))
    with rasterio.open(tmp_path/'image.tif') as ds:
        assert channel_names(ds) == [colour.name[0].upper() for colour in order]

def write_set(root, n=6, side=40, masks=None):
    "A table of pictures whose red says the class, and their masks"
    rng = np.random.default_rng(0)
    rows = []
    for k in range(n):
        mask = rng.integers(0, 3, (side // 8, side // 8)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        image = np.zeros((side, side, 3), np.uint8)
        image[..., 2] = 100 * mask
        cv2.imwrite(str(root/f'{k}.png'), image)
        cv2.imwrite(str(root/f'{k}_mask.png'), mask if masks is None else masks(mask))
        split = 'val' if k >= n - 2 else 'train'
        rows.append(dict(image=f'{k}.png', mask=f'{k}_mask.png', split=split, scene=f'city{k % 2}'))
    pd.DataFrame(rows).to_csv(root/'list.csv', index=False)
    return root/'list.csv'

def data_of(source):
    return ClassData(source=source, names=NAMES, values={0: 0, 1: 1, 2: 2}, sides=[32])

@pytest.mark.skipif(not LOVEDA.exists(), reason='the real tiles are not beside the project')
def test_real_tiles_of_loveda(tmp_path):
    "Raw values 1 to 7 become 0 to 6; whole tiles are 1024 pixels wide"
    for split, folder in (('Train', 'Urban'), ('Val', 'Rural')):
        for kind in ('images_png', 'masks_png'):
            shutil.copytree(next(LOVEDA.rglob(kind)), tmp_path/split/folder/kind)
    samples = ClassSamples.read(tmp_path)
    assert len(samples) == 6 and set(samples.table.scene) == {'Urban', 'Rural'}
    for row in range(len(samples)):
        pair = read_pair(samples, row, ClassData().values)
        raw = cv2.imread(str(samples.root/samples.table['mask'][row]), cv2.IMREAD_UNCHANGED)
        assert pair.image.shape == (1024, 1024, 3) and pair.mask.shape == (1024, 1024)
        assert (pair.mask == np.where(raw == 0, NO_CLASS, raw.astype(int) - 1)).all()

def palette(mask):
    picture = Image.fromarray(mask, 'P')
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    return picture

@pytest.mark.parametrize('kind', ['grey saved as RGB', 'palette'])
def test_masks_as_people_have_them(kind, tmp_path):
    "Grey that was saved with three bands, and indices of a palette"
    samples = ClassSamples.read(write_set(tmp_path))
    expected = [read_pair(samples, row, data_of(tmp_path).values).mask for row in range(6)]
    for row in range(6):
        path = tmp_path/samples.table['mask'][row]
        if kind == 'palette':
            palette(expected[row]).save(path)
        else:
            cv2.imwrite(str(path), expected[row][..., None].repeat(3, 2))
    for row in range(6):
        assert (read_pair(samples, row, data_of(tmp_path).values).mask == expected[row]).all()

BAD_MASKS = {
    'has three bands that differ': (lambda mask: np.stack([mask, mask, 2 - mask], 2), 'write classes as numbers'),
    'has an unknown value': (lambda mask: mask + 5, 'mean nothing in data.values'),
    'has another size': (lambda mask: mask[:-8], '32 × 40 pixels, its image has 40 × 40'),
    'has 16 bits': (lambda mask: mask.astype(np.uint16), 'a mask is uint8'),
}

@pytest.mark.parametrize('what', BAD_MASKS)
def test_a_mask_that_cannot_be_taken(what, tmp_path):
    masks, words = BAD_MASKS[what]
    source = write_set(tmp_path, masks=masks)
    with pytest.raises(DataError, match=words):
        check_pairs(ClassSamples.read(source), data_of(source))

def test_all_problems_of_a_table_at_once(tmp_path):
    source = write_set(tmp_path)
    table = pd.read_csv(source)
    table.loc[0, 'image'] = 'lost.png'
    table.loc[1, 'split'] = 'trian'
    table.loc[2, 'mask'] = '../elsewhere.png'
    table.loc[3, 'mask'] = ''
    table.to_csv(source, index=False)
    with pytest.raises(DataError) as caught:
        ClassSamples.read(source)
    message = str(caught.value)
    for words in ("lost.png: no such file", "split 'trian'", 'leads out of the folder', '3.png: no mask'):
        assert words in message

def test_a_value_beyond_the_names(tmp_path):
    source = write_set(tmp_path)
    data = data_of(source).model_copy(update=dict(values={0: 0, 1: 1, 2: 3}))
    with pytest.raises(DataError, match='2 becomes 3, and there are 3 names'):
        check_pairs(ClassSamples.read(source), data)

@quick
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 80), st.integers(-30, 50), st.integers(-30, 50))
def test_a_cut_holds_the_image_and_nothing_else(height, width, length, top, left):
    "Each pixel of a square is the image's, or the fill with 255 in the mask"
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 5, (height, width)).astype(np.uint8)
    image = mask[..., None].repeat(3, 2).astype(np.float32)
    top, left = min(top, height - 1), min(left, width - 1)
    top, left = max(top, 1 - length), max(left, 1 - length)
    cut, labels = cut_padded(image, mask, top, left, length, [9., 9., 9.])
    assert cut.shape == (length, length, 3) and labels.shape == (length, length)
    for y, x in np.ndindex(length, length):
        inside = 0 <= top + y < height and 0 <= left + x < width
        assert labels[y, x] == (mask[top + y, left + x] if inside else NO_CLASS)
        assert cut[y, x, 0] == (labels[y, x] if inside else 9)

@quick
@given(st.integers(20, 90), st.integers(20, 90), st.integers(16, 64), st.integers(0, 10**6))
def test_a_crop_at_scale_one_lies_in_the_image(height, width, side, seed):
    "Where the image is larger than the crop nothing is padded; where it is smaller, all of it is in the crop"
    image, mask = np.zeros((height, width, 3), np.float32), np.zeros((height, width), np.uint8)
    _, labels = crop_at_scale(image, mask, side, (1., 1.), np.random.default_rng(seed), [0.] * 3)
    assert (labels == 0).sum() == min(side, height) * min(side, width)

def test_classes_in_a_crop_are_those_of_the_image():
    "Over many draws each pixel of an image as small as its crops is as likely as any other"
    mask = np.arange(100, dtype=np.uint8).reshape(10, 10)
    image, seen = np.zeros((10, 10, 3), np.float32), np.zeros(100)
    for seed in range(4000):
        labels = crop_at_scale(image, mask, 1, (1., 1.), np.random.default_rng(seed), [0.] * 3)[1]
        seen[labels[0, 0]] += 1
    # 40 each; binomial, so beyond 5 standard deviations once in a million
    assert (abs(seen - 40) < 5 * 40**.5).all()

@pytest.mark.parametrize('mixing', [Mixing(), Mixing(mixup=dict(p=.5), cutmix=dict(p=.5), same='group')])
def test_workers_change_nothing(mixing, tmp_path):
    "Order, crops, augmentation and mixing: the same bits without workers and with two"
    source = write_set(tmp_path, n=10)
    samples, data = ClassSamples.read(source), data_of(source).model_copy(update=dict(sides=[16, 32]))
    tiles = KeyedSamples(ClassTiles(samples.of('train'), data, Augment(), [.3] * 3, [.2] * 3))
    counts = check_pairs(samples, data)[(samples.table.split == 'train').to_numpy()]
    seen = []
    for workers in (0, 2):
        batches = ClassBatches(8, 2, 42, data.sides, image_weights(counts, .5))
        collate = MixingCollate(mixing, group='scene')
        loader = DataLoader(tiles, batch_sampler=batches, num_workers=workers, collate_fn=collate)
        seen.append([batch for epoch in (1, 2) for batch in (batches.set_epoch(epoch), *loader)[1:]])
    assert len(seen[0]) == 8 and {batch['image'].shape[-1] for batch in seen[0]} == {16, 32}
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one['image'], other['image']) and torch.equal(one['target'], other['target'])
        assert str(one.get('mix')) == str(other.get('mix'))
    assert any('mix' in batch for batch in seen[0]) == mixing.is_on
