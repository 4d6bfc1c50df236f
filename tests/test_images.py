"Folders of images and masks: every pixel arrives, and what cannot be taken is said once with what to do"
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError
from pydantic import ValidationError
from rasterio.transform import from_origin

from rtsseg.config import ConfigError, ImagesSource, TableSource, load, parse_override
from rtsseg.console import DataError
from rtsseg.evaluation import evaluate
from rtsseg.evidence import Evidence
from rtsseg.folders import find_pairs, guess_source, import_images
from rtsseg.importers import import_table
from rtsseg.prediction import predict
from rtsseg.prepare import prepare
from rtsseg.rawtile import read_row
from rtsseg.training import train

DUBAI = Path(__file__).parents[2]/'shared'/'data'/'dubai_landcover'

def write_tiff(path, planes, crs=None, left=0., **options):
    "A GeoTIFF by rasterio alone"
    count, height, width = planes.shape
    place = dict(crs=crs, transform=from_origin(left, 0, 10, 10)) if crs else {}
    with rasterio.open(path, 'w', driver='GTiff', count=count, height=height, width=width, dtype=planes.dtype,
                       **place, **options) as ds:
        ds.write(planes)

def save(path, array):
    "An array (H × W, or H × W × bands) in the format that the suffix says"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)

def spot(shape, value=255):
    "A mask with a square"
    mask = np.zeros(shape, np.uint8)
    mask[2:9, 3:12] = value
    return mask

def picture(mask, seed=0):
    "An image whose objects are bright"
    noise = np.random.default_rng(seed).normal(90, 8, (*mask.shape, 3))
    return (noise + 70 * (mask > 0)[..., None]).clip(1, 255).astype(np.uint8)

def make_folder(folder, names='abcdef', shape=(40, 50), value=255, suffix='png'):
    "Pairs of one size"
    for seed, name in enumerate(names):
        save(folder/f'images/{name}.{suffix}', picture(spot(shape), seed))
        save(folder/f'masks/{name}.png', spot(shape, value))
    return folder

def source_of(folder, **settings):
    return ImagesSource(path=folder, **dict(classes={0: 0, 255: 1}) | settings)

SPLITS = dict(train=['a', 'b', 'c', 'd'], val=['e'], test=['f'])

def advised(message):
    "The settings of data.source that a message tells to override, as the command line reads them"
    overrides = re.findall("--override '(.*?)'", message)
    return {name: value for text in overrides for name, value in parse_override(text)['data']['source'].items()}

# ---------------------------------------------------------------- every pixel arrives
@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), suffix=st.sampled_from(['png', 'PNG', 'tif', 'tiff', 'TIF']), wide=st.booleans(),
       inverted=st.booleans())
def test_every_pixel_arrives(tmp_path_factory, seed, suffix, wide, inverted):
    "As an independent reader sees it, whatever the format, the type, the size and the values of the masks"
    rng, root = np.random.default_rng(seed), tmp_path_factory.mktemp('folder')
    (root/'images').mkdir()
    # 16-bit RGB is beyond Pillow: a TIFF by rasterio
    wide = wide and suffix.lower() != 'png'
    values = rng.choice(256, 3, replace=False)
    truth = {}
    for k in range(4):
        shape = tuple(rng.integers(20, 300, 2))
        image = rng.integers(1, 65536 if wide else 256, (*shape, 3)).astype('uint16' if wide else 'uint8')
        code = rng.integers(0, 3, shape)
        if wide:
            write_tiff(root/f'images/im {k}.{suffix}', image.transpose(2, 0, 1))
        else:
            save(root/f'images/im {k}.{suffix}', image)
        save(root/f'masks/im {k}.png', values[code].astype('uint8'))
        truth[f'im_{k}'] = image, np.array([1, 0, 255] if inverted else [0, 1, 255])[code]
    ours = [1, 0, 255] if inverted else [0, 1, 255]
    source = ImagesSource(path=root, classes=dict(zip(values.tolist(), ours)))
    manifest = import_images(source, root/'out'/'manifest.csv', split_check='warn')
    assert set(manifest.table.tile_id) == set(truth)
    for row in manifest.table.to_dict('records'):
        image, label = truth[row['tile_id']]
        with rasterio.open(manifest.root/row['image']) as ds:
            np.testing.assert_array_equal(ds.read().transpose(1, 2, 0), image)
            assert ds.block_shapes == [(256, 256)] * 3
        np.testing.assert_array_equal(read_row(manifest.root, row).label, label)
        assert row['n_positive'] == (label == 1).sum() and row['block'] == row['tile_id']
    assert set(manifest.table.split) == {'train', 'val', 'test'}

def test_jpeg_images(tmp_path):
    "Within the rounding of two decoders"
    folder = make_folder(tmp_path/'in', suffix='JPG')
    manifest = import_images(source_of(folder, splits=SPLITS), tmp_path/'out'/'m.csv')
    for row in manifest.table.to_dict('records'):
        theirs = np.asarray(Image.open(folder/f"images/{row['tile_id']}.JPG")).astype(int)
        assert np.abs(read_row(manifest.root, row).rgb.transpose(1, 2, 0) - theirs).mean() < 2

@pytest.mark.parametrize('form', ['palette', 'one bit', 'grey as RGB', 'grey with alpha', '16 bit'])
def test_masks_as_people_save_them(tmp_path, form):
    "The index of a palette is the value, whatever its colour"
    folder, mask = make_folder(tmp_path/'in'), spot((40, 50), 1)
    for name in 'abcdef':
        path = folder/f'masks/{name}.png'
        if form == 'palette':
            shown = Image.fromarray(mask, 'P')
            shown.putpalette([0, 0, 0, 200, 30, 60])
            shown.save(path)
        elif form == '16 bit':
            Image.fromarray(mask.astype('uint16') * 1000).save(path)
        elif form == 'one bit':
            Image.fromarray(mask.astype(bool)).save(path)
        elif form == 'grey as RGB':
            save(path, np.stack([mask * 255] * 3, -1))
        else:
            save(path, np.stack([mask * 255, np.full_like(mask, 255)], -1))
    source = guess_source(folder)
    source.splits = SPLITS
    manifest = import_images(source, tmp_path/'out'/'m.csv')
    for row in manifest.table.to_dict('records'):
        np.testing.assert_array_equal(read_row(manifest.root, row).label, mask)

def float_folder(folder):
    "Seven bands of float32 reflectance with NaN, on a map, with masks as PNG"
    (folder/'images').mkdir(parents=True)
    rng, planes = np.random.default_rng(0), {}
    for k, name in enumerate('abcdef'):
        planes[name] = rng.uniform(-.01, .62, (7, 40, 50)).astype('float32')
        planes[name][:, :3, :4] = np.nan
        write_tiff(folder/f'images/{name}.tif', planes[name], 'EPSG:32640', left=500_000 + 20_000 * k)
        save(folder/f'masks/{name}.png', spot((40, 50), 1))
    return planes

def test_float_rasters_of_seven_bands(tmp_path):
    "RGB on the stated scale within half a step of it, the other bands as they are, NaN as nodata, the place kept"
    planes = float_folder(tmp_path/'in')
    low, high = -.1, .5
    source = ImagesSource(path=tmp_path/'in', bands=[3, 2, 1], extra_bands={'nir': 4, 'swir': 7}, splits=SPLITS,
                          value_range=(low, high))
    manifest = import_images(source, tmp_path/'out'/'m.csv')
    step = (high - low) / 65534
    for row in manifest.table.to_dict('records'):
        theirs = planes[row['tile_id']]
        tile = read_row(manifest.root, row, ['nir', 'swir'])
        valid = np.isfinite(theirs).all(0)
        np.testing.assert_array_equal(tile.valid, valid)
        found = low + (tile.rgb.astype(float) - 1) * step
        expected = theirs[[2, 1, 0]].astype(float).clip(low, high)
        assert tile.rgb.dtype == np.uint16 and np.abs(found - expected)[:, valid].max() <= step / 2 + 1e-9
        np.testing.assert_array_equal(tile.extra[:, valid], theirs[[3, 6]][:, valid])
        assert (tile.label[~valid] == 255).all() and row['crs'] == 'EPSG:32640'

def test_float_rasters_are_refused_once_with_the_range(tmp_path):
    "The range that the message names is that of the values"
    planes = float_folder(tmp_path/'in')
    rgb = np.stack([p[:3] for p in planes.values()])
    with pytest.raises(DataError) as caught:
        import_images(ImagesSource(path=tmp_path/'in'), tmp_path/'out'/'m.csv')
    line, = str(caught.value).splitlines()
    assert 'images of type float32: 6 (a.tif, b.tif, c.tif and 3 more)' in line
    assert f"--override 'data.source.value_range=[{np.nanmin(rgb):.6g}, {np.nanmax(rgb):.6g}]'" in line
    guessed = guess_source(tmp_path/'in')
    assert guessed.value_range == pytest.approx((np.nanmin(rgb), np.nanmax(rgb)))
    assert guessed.extra_bands == {f'band{k}': k for k in (4, 5, 6, 7)}
    guessed.splits = SPLITS
    assert len(import_images(guessed, tmp_path/'out'/'m.csv')) == 6

def test_a_table_of_float_rasters(tmp_path):
    "One line for all of them; with a range they go in"
    float_folder(tmp_path/'in')
    pd.DataFrame({'tile_id': list('abcdef'), 'split': ['train'] * 4 + ['val', 'test']}).to_csv(tmp_path/'in'/'t.csv')
    source = TableSource(path=tmp_path/'in'/'t.csv', image='images/{tile_id}.tif', mask='masks/{tile_id}.png')
    with pytest.raises(DataError) as caught:
        import_table(source, tmp_path/'out'/'m.csv')
    line, = str(caught.value).splitlines()
    assert 'float32' in line and 'value_range' in line and 'and 3 more' in line
    ranged = source.model_copy(update=dict(value_range=(0., .5)))
    assert len(import_table(ranged, tmp_path/'out'/'m.csv')) == 6

# ---------------------------------------------------------------- splits
def by_split(manifest):
    return manifest.table.groupby('split').tile_id.agg(list).to_dict()

EXPECTED = dict(train=list('abcd'), val=['e'], test=['f'])

def test_splits_by_list_and_by_file(tmp_path):
    folder = make_folder(tmp_path/'in')
    (folder/'train.txt').write_text('images/a.png\nb.png\nc\n\nd\n')
    splits = dict(train='train.txt', val=['e.png'], test=['f'])
    assert by_split(import_images(source_of(folder, splits=splits), tmp_path/'out'/'m.csv')) == EXPECTED

def test_splits_and_regions_by_column(tmp_path):
    folder = make_folder(tmp_path/'in')
    pd.DataFrame({'file': [f'{name}.png' for name in 'abcdef'], 'subset': ['Training'] * 4 + ['valid', 'test'],
                  'region': list('xxyyzz')}).to_csv(folder/'list.csv', index=False)
    source = source_of(folder, table='list.csv', columns={'stem': 'file', 'split': 'subset'})
    manifest = import_images(source, tmp_path/'out'/'m.csv')
    assert by_split(manifest) == EXPECTED
    assert manifest.table.region.tolist() == list('xxyyzz')

@pytest.mark.parametrize('images, masks', [('{split}/images', '{split}/masks'), ('images/{split}', 'masks/{split}')])
def test_splits_by_folder(tmp_path, images, masks):
    "Names may be the same in two folders"
    for split, names in dict(train='ab', valid='a', test='b').items():
        for name in names:
            save(tmp_path/'in'/images.format(split=split)/f'{name}.png', picture(spot((40, 50))))
            save(tmp_path/'in'/masks.format(split=split)/f'{name}.png', spot((40, 50)))
    source = guess_source(tmp_path/'in')
    assert (source.images, source.masks) == (f'{images}/{{stem}}', f'{masks}/{{stem}}')
    found = by_split(import_images(source, tmp_path/'out'/'m.csv'))
    assert found == dict(train=['train_a', 'train_b'], val=['val_a'], test=['test_b'])

def test_blocks_of_images(tmp_path):
    "Images on a map are dealt by the blocks of their grid"
    for k, name in enumerate('abcdefghij'):
        (tmp_path/'in'/'images').mkdir(parents=True, exist_ok=True)
        planes = picture(spot((40, 50)), k).transpose(2, 0, 1)
        # two images in each block of 10 km
        write_tiff(tmp_path/'in'/f'images/{name}.tif', planes, 'EPSG:32640', left=502_000 + 5_000 * k)
        save(tmp_path/'in'/f'masks/{name}.png', spot((40, 50)))
    table = import_images(source_of(tmp_path/'in'), tmp_path/'out'/'m.csv', 10_000., 'warn').table
    assert table.block.nunique() < 10 and table.groupby('block').split.nunique().max() == 1
    assert set(table.split) == {'train', 'val', 'test'}

def test_thin_splits_name_the_setting(tmp_path):
    with pytest.raises(DataError, match='data.split_check: warn'):
        import_images(source_of(make_folder(tmp_path/'in')), tmp_path/'out'/'m.csv')
    assert not list((tmp_path/'out').glob('*'))

def test_masks_beside_their_images(tmp_path):
    for name in 'abc':
        save(tmp_path/f'{name}.jpg', picture(spot((40, 50))))
        save(tmp_path/f'{name}_mask.png', spot((40, 50)))
    source = guess_source(tmp_path)
    assert (source.images, source.masks) == ('{stem}', '{stem}_mask')
    assert [pair.stem for pair in find_pairs(source)[0]] == list('abc')

# ---------------------------------------------------------------- bad input
def refusal(folder, out, **settings):
    "What an import says; it leaves nothing"
    with pytest.raises(DataError) as caught:
        import_images(source_of(folder, **dict(splits=SPLITS) | settings), out/'m.csv')
    assert not out.exists() or not list(out.iterdir())
    return str(caught.value)

def rotate(folder, subfolder='images'):
    for name in 'ab':
        path = folder/f'{subfolder}/{name}.png'
        shown = Image.open(path)
        exif = shown.getexif()
        exif[274] = 6
        shown.save(path, exif=exif)

def as_jpeg(folder, names='abcdef', quality=60):
    "Masks as JPEG, which makes new values at edges"
    for name in names:
        path = folder/f'masks/{name}.png'
        Image.open(path).save(path.with_suffix('.jpg'), quality=quality)
        path.unlink()

def palette(folder):
    Image.open(folder/'images/a.png').convert('P').save(folder/'images/a.png')

def truncate(folder):
    for name in 'ab':
        (folder/f'images/{name}.png').write_bytes(b'no picture')

def all_masks(folder, mask):
    for name in 'abcdef':
        save(folder/f'masks/{name}.png', mask)

DAMAGE = {
    'no mask': (lambda folder: (folder/'masks/b.png').unlink(),
                ['images without a mask at masks/{stem}: 1 (b.png)', "--override 'data.source.unmasked=negative'"]),
    'no image': (lambda folder: (folder/'images/b.png').unlink(), ['masks without an image', '1 (b.png)']),
    'size': (lambda folder: save(folder/'masks/b.png', spot((30, 20))),
             ['masks of another size', 'b.png: 20 × 30, its image 50 × 40']),
    'one stem': (lambda folder: save(folder/'images/a.jpg', picture(spot((40, 50)))),
                 ['files with one stem: 1 (images/a.jpg, images/a.png)']),
    'exif': (rotate, ['images that EXIF', '2 (a.png, b.png)', 'exif_transpose']),
    'exif of masks': (lambda folder: rotate(folder, 'masks'), ['masks that EXIF', '2 (a.png, b.png)', 'upright']),
    'palette': (palette, ['images with a palette: 1 (a.png): save them as RGB']),
    'unreadable': (truncate, ['a.png, b.png: is not a GeoTIFF']),
    'values': (lambda folder: save(folder/'masks/a.png', spot((40, 50), 7)),
               ['masks with values 7, which are not in classes [0, 255]: 1 (a.png)', 'data.source.classes']),
    'colours': (lambda folder: save(folder/'masks/a.png', picture(spot((40, 50)))),
                ['a.png: a mask has one band, this one has 3']),
    'jpeg': (as_jpeg, ['saved as JPEG', '6 (a.jpg, b.jpg, c.jpg and 3 more)', 'PNG']),
    'no object': (lambda folder: all_masks(folder, spot((40, 50), 0)), ['no mask holds an object', 'are 0']),
    'no background': (lambda folder: all_masks(folder, np.full((40, 50), 255, np.uint8)),
                      ['no mask holds background', 'are 255']),
    'grey': (lambda folder: save(folder/'images/c.png', spot((40, 50), 9)),
             ['images without band 3 (bands: 1, 3): 1 (c.png)', '[1, 1, 1]']),
}

@pytest.mark.parametrize('kind', DAMAGE)
def test_what_is_wrong_is_said_once(tmp_path, kind):
    "In one line"
    damage, said = DAMAGE[kind]
    damage(make_folder(tmp_path/'in'))
    more = dict(splits={**SPLITS, 'train': ['a', 'c', 'd']}) if kind == 'no image' else {}
    message = refusal(tmp_path/'in', tmp_path/'out', **more)
    assert len(message.splitlines()) == 1
    for text in said:
        assert text in message

def test_several_kinds_are_said_together(tmp_path):
    folder = make_folder(tmp_path/'in')
    for kind in ('no mask', 'exif', 'values'):
        DAMAGE[kind][0](folder)
    assert len(refusal(folder, tmp_path/'out').splitlines()) == 3

def test_0_and_255_name_the_mapping(tmp_path):
    "With the default classes 255 is ignored, so there would be no object"
    message = refusal(make_folder(tmp_path/'in'), tmp_path/'out', classes={0: 0, 1: 1, 255: 255})
    assert "if 255 marks the objects, --override 'data.source.classes={0: 0, 255: 1}'" in message

def test_unmasked_images_as_negatives(tmp_path):
    folder = make_folder(tmp_path/'in')
    (folder/'masks/b.png').unlink()
    source = source_of(folder, splits=SPLITS, unmasked='negative')
    positive = import_images(source, tmp_path/'out'/'m.csv').table.set_index('tile_id').n_positive
    assert positive['b'] == 0 and (positive.drop('b') == 63).all()

def test_two_images(tmp_path):
    "They cannot be dealt; named they can train and validate"
    folder = make_folder(tmp_path/'in', 'ab')
    message = refusal(folder, tmp_path/'out', splits=None)
    assert '2 images cannot be dealt' in message
    manifest = import_images(source_of(folder, **advised(message)), tmp_path/'out'/'m.csv')
    assert by_split(manifest) == dict(train=['a'], val=['b'])

@pytest.mark.parametrize('splits, said', [
    (dict(train=['a', 'b', 'c', 'd', 'g'], val=['e'], test=['f']), 'without an image: 1 (g)'),
    (dict(train=['a', 'b', 'c'], val=['e'], test=['f']), 'that are not in data.source.splits: 1 (d)'),
    (dict(train=['a', 'b', 'c', 'd'], val=['e', 'a'], test=['f']), 'images in two splits: 1 (a: train and val)'),
    (dict(train='none.txt', val=['e'], test=['f']), 'a text file with a name on each line was expected')])
def test_wrong_lists(tmp_path, splits, said):
    assert said in refusal(make_folder(tmp_path/'in'), tmp_path/'out', splits=splits)

@pytest.mark.parametrize('settings, said', [
    (dict(images='../images/{stem}'), 'inside of the folder'),
    (dict(images='images/{name}'), '{stem} once'),
    (dict(images='{split}/images/{stem}'), 'in one of them'),
    (dict(value_range=(1., 1.)), 'must be below the second'),
    (dict(bands=[1, 2]), 'at least 3'),
    (dict(images='{split}/{stem}', masks='{split}_m/{stem}', splits=SPLITS), 'leave out one of them')])
def test_wrong_settings(tmp_path, settings, said):
    with pytest.raises(ValidationError, match=said):
        ImagesSource(path=tmp_path, **settings)

# ---------------------------------------------------------------- a guess
@pytest.mark.parametrize('change, said', [
    (lambda folder: (folder/'masks').rename(folder/'other'), 'no folder masks'),
    (lambda folder: (folder/'images').rename(folder/'other'), 'no folder images'),
    (lambda folder: [path.rename(path.with_stem(f'{path.stem}9')) for path in sorted((folder/'masks').iterdir())],
     'no file of masks has the name of one of images'),
    (lambda folder: save(folder/'masks/a.png', spot((40, 50), 7)),
     r'the masks hold 0 \(.*, 7 \(.*, 255 \([\d,]+ pixels\): say which')])
def test_a_guess_says_what_is_missing(tmp_path, change, said):
    change(make_folder(tmp_path/'in'))
    with pytest.raises(DataError, match=said):
        guess_source(tmp_path/'in')

def test_a_guess_from_grey_images(tmp_path):
    "And masks of another name"
    for name in 'abc':
        save(tmp_path/f'Images/{name}.png', spot((40, 50), 90))
        save(tmp_path/f'labels/{name}_mask.png', spot((40, 50), 4))
    source = guess_source(tmp_path)
    assert (source.bands, source.classes) == ([1, 1, 1], {0: 0, 4: 1})
    assert (source.images, source.masks) == ('Images/{stem}', 'labels/{stem}_mask')

def write_masks(folder, values):
    "Stripes of each value, in all masks"
    for name in 'abcdef':
        save(folder/f'masks/{name}.png', np.repeat(np.uint8(values), 5)[:, None].repeat(50, 1))

def test_three_values_are_counted_and_not_guessed(tmp_path):
    "Nothing says whether 128 is an object, a border or background, so all is asked for, with how much there is of it"
    folder = make_folder(tmp_path/'in', shape=(15, 50))
    write_masks(folder, [0, 128, 255])
    # six masks of five rows of each value
    counted = ', '.join(f'{value} (1,500 pixels)' for value in (0, 128, 255))
    with pytest.raises(DataError, match=re.escape(f'the masks hold {counted}: say which are objects; if 255 alone')):
        guess_source(folder)

@pytest.mark.parametrize('values', [[0, 1, 2], [3, 7, 9], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 255]])
def test_a_guess_names_an_override_that_works(tmp_path, values):
    "Every value is in it, and a guess with it is one that an import takes"
    folder = make_folder(tmp_path/'in', shape=(5 * len(values), 50))
    write_masks(folder, values)
    with pytest.raises(DataError, match='say which are objects') as caught:
        guess_source(folder)
    given = advised(str(caught.value))
    assert set(given['classes']) == set(values)
    source = guess_source(folder, **given, splits=SPLITS)
    assert source.classes == given['classes']
    assert import_images(source, tmp_path/'out'/'m.csv').table.n_positive.gt(0).all()

GIVEN = {
    'classes': {0: 1, 255: 0},
    'unmasked': 'negative',
    'value_range': (0., .25),
    'nodata': .125,
    'splits': SPLITS,
    'bands': [3, 2, 1],
    'extra_bands': {'nir': 5},
    'downscale': 2,
    'images': 'images/{stem}',
    'masks': 'masks/{stem}',
}

@settings(max_examples=10)
@given(names=st.sets(st.sampled_from(sorted(GIVEN))))
def test_what_is_given_is_taken(tmp_path_factory, names):
    "As it is, whatever else is given; the rest is what is guessed without it"
    folder = tmp_path_factory.getbasetemp()/'floats'
    if not folder.exists():
        float_folder(folder)
    given = {name: GIVEN[name] for name in names}
    source = guess_source(folder, **given)
    alone = guess_source(folder)
    # the values depend on bands and nodata
    depends = {'value_range'} if names & {'bands', 'nodata'} else set()
    for name in ImagesSource.model_fields:
        if name not in depends - names:
            assert getattr(source, name) == given.get(name, getattr(alone, name)), name

def test_bands_that_are_given_are_not_extra(tmp_path):
    float_folder(tmp_path)
    assert guess_source(tmp_path, bands=[5, 4, 3]).extra_bands == {'band6': 6, 'band7': 7}

@pytest.mark.parametrize('wrong, said', [
    (dict(nodat=-9999), "data.source: nodat: no such setting (did you mean 'nodata'?)"),
    (dict(classes={0: 0, 1: 7}), 'data.source: classes.1: Input should be 0, 1 or 255'),
    (dict(value_range=[1, 0]), 'must be below the second')])
def test_given_settings_are_checked(tmp_path, wrong, said):
    with pytest.raises(ConfigError) as caught:
        guess_source(make_folder(tmp_path/'in'), **wrong)
    assert said in str(caught.value)

def test_lists_beside_folders_of_splits(tmp_path):
    "Names would be of several images"
    for split in ('train', 'val'):
        make_folder(tmp_path/split, 'ab')
    with pytest.raises(ConfigError, match='leave out one of them'):
        guess_source(tmp_path, splits=dict(train=['a'], val=['b']))

@pytest.mark.parametrize('name', ['c.jpg', 'c.png', 'c.tif'])
def test_a_guess_says_that_masks_are_lossy(tmp_path, name):
    "By the content of the file, once, and with no classes for what JPEG made"
    folder = make_folder(tmp_path/'in')
    mask = folder/'masks'/'c.png'
    pixels = np.asarray(Image.open(mask))
    mask.unlink()
    if name.endswith('tif'):
        write_tiff(folder/'masks'/name, pixels[None], compress='jpeg', jpeg_quality=60)
    else:
        Image.fromarray(pixels).save(folder/'masks'/name, 'JPEG', quality=60)
    with pytest.raises(DataError) as caught:
        guess_source(folder)
    line, = str(caught.value).splitlines()
    assert f'saved as JPEG, which blurs values at every edge: 1 ({name})' in line and 'classes=' not in line

# ---------------------------------------------------------------- fills
FLOAT_MAX = -3.4028234663852886e+38

def write_floats(folder, planes, **options):
    "Float images by name, with masks"
    (folder/'images').mkdir(parents=True)
    for name, values in planes.items():
        write_tiff(folder/f'images/{name}.tif', values, **options)
        save(folder/f'masks/{name}.png', spot(values.shape[1:], 1))

def reflectance(shape=(3, 40, 50), low=0., high=.8):
    rng = np.random.default_rng(0)
    return {name: rng.uniform(low, high, shape).astype('float32') for name in 'abcdef'}

@settings(max_examples=10)
@given(fill=st.sampled_from([-9999., -32768., FLOAT_MAX, float(np.float32(1e20)), 65535.]), border=st.integers(1, 8),
       framed=st.sets(st.sampled_from('abcdef'), min_size=1), one_band=st.booleans())
def test_a_border_that_is_not_declared(tmp_path_factory, fill, border, framed, one_band):
    "Is nodata, and said; the scale is that of the measured values, and what the message of an import names is the same"
    folder, planes = tmp_path_factory.mktemp('fill'), reflectance()
    for name in framed:
        planes[name][:, :border] = fill
        # a sensor of which one band failed
        planes[name][0, border, :5 * one_band] = fill
    write_floats(folder, planes)
    kept = np.concatenate([values[values != fill] for values in planes.values()])
    source = guess_source(folder, splits=SPLITS)
    assert source.nodata == fill
    assert source.value_range == (kept.min(), kept.max())
    manifest = import_images(source, folder/'out'/'m.csv')
    for row in manifest.table.to_dict('records'):
        top = border if row['tile_id'] in framed else 0
        tile = read_row(manifest.root, row)
        assert not tile.valid[:top].any() and tile.valid[top:].all() and (tile.label[:top] == 255).all()
        assert np.ptp(tile.rgb[:, tile.valid].astype(int)) > 60_000
    with pytest.raises(DataError) as caught:
        import_images(ImagesSource(path=folder), folder/'other'/'m.csv')
    said = advised(str(caught.value))
    assert said['nodata'] == fill and said['value_range'] == pytest.approx(source.value_range, rel=1e-5)

@settings(max_examples=20)
@given(share=st.floats(0, .99), low=st.sampled_from([0., .01, .2, -.3]), high=st.floats(.4, 1.),
       value=st.sampled_from([0., 'highest']))
def test_values_that_are_measured_are_kept(tmp_path_factory, share, low, high, value):
    "Many zeros, of shadow or water, and many values at the upper end, of clouds"
    folder, planes = tmp_path_factory.mktemp('zeros'), reflectance(low=low, high=high)
    for values in planes.values():
        values[:, np.random.default_rng(1).random((40, 50)) < share] = high if value == 'highest' else value
    write_floats(folder, planes)
    source = guess_source(folder)
    whole = np.stack(list(planes.values()))
    assert source.nodata is None and source.value_range == (whole.min(), whole.max())

def test_two_values_are_kept(tmp_path):
    "An image of zeros and ones has no fill"
    planes = {name: (values > .7).astype('float32') for name, values in reflectance().items()}
    write_floats(tmp_path, planes)
    assert guess_source(tmp_path).value_range == (0, 1)

@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_no_end(tmp_path, bad):
    planes = reflectance()
    for values in planes.values():
        values[:, :5] = bad
    write_floats(tmp_path, planes)
    source, kept = guess_source(tmp_path), np.stack(list(planes.values()))[:, :, 5:]
    assert source.nodata is None and source.value_range == (kept.min(), kept.max())

def test_a_fill_of_extra_bands_alone(tmp_path):
    "Would be in their statistics"
    planes = {name: np.concatenate([values, values[:1]]) for name, values in reflectance().items()}
    for values in planes.values():
        values[3, :4] = -9999
    write_floats(tmp_path, planes)
    assert guess_source(tmp_path).nodata == -9999

def test_a_fill_that_is_declared(tmp_path):
    "Is left to the files, also where one band alone holds it"
    planes = reflectance()
    for values in planes.values():
        values[:, :4], values[1, 4, :5] = -9999, -9999
    write_floats(tmp_path, planes, nodata=-9999)
    source = guess_source(tmp_path)
    assert source.nodata is None and source.value_range[0] >= 0

@pytest.mark.parametrize('declared', [True, False])
def test_several_fills(tmp_path, declared):
    "One setting does not name two values"
    planes = reflectance()
    planes['a'][:, :4], planes['b'][:, :4] = -9999, -1e30
    write_floats(tmp_path, planes)
    if declared:
        with rasterio.open(tmp_path/'images'/'b.tif', 'r+') as ds:
            ds.nodata = float(np.float32(-1e30))
    with pytest.raises(DataError, match=r'several values stand for nodata \(-1.*e\+30, -9999.0\).*into each image'):
        guess_source(tmp_path)

def test_a_value_that_may_be_a_fill(tmp_path, caplog):
    "Is taken as a value, and asked about; what is answered ends the question"
    planes = {name: values.round().astype('int16') for name, values in reflectance(high=3000.).items()}
    for values in planes.values():
        values[:, :4] = -9999
    write_floats(tmp_path, planes)
    source = guess_source(tmp_path)
    warning, = [record.message for record in caplog.records if record.levelname == 'WARNING']
    assert source.nodata is None and source.value_range[0] == -9999
    assert "-9999 may stand for nodata (10.0% of the values" in warning
    assert "--override 'data.source.nodata=-9999.0'; else --override 'data.source.nodata=null'" in warning
    caplog.clear()
    assert guess_source(tmp_path, nodata=-9999).value_range[0] == 0
    assert guess_source(tmp_path, nodata=None).value_range[0] == -9999
    assert not [record for record in caplog.records if record.levelname == 'WARNING']

def test_a_fill_is_said(tmp_path, caplog):
    planes = reflectance()
    for values in planes.values():
        values[:, :4] = -9999
    write_floats(tmp_path, planes)
    with caplog.at_level('INFO', 'rtsseg'):
        guess_source(tmp_path)
    assert '-9999 is taken as nodata (10.0% of the values of a band' in caplog.text
    assert "--override 'data.source.nodata=null' takes it as a value" in caplog.text

# ---------------------------------------------------------------- what is said
def test_pillow_is_silent_about_many_bands(tmp_path, caplog):
    "And no longer than it is asked"
    float_folder(tmp_path)
    guess_source(tmp_path)
    assert not [record for record in caplog.records if record.name.startswith('PIL')]
    with pytest.raises(UnidentifiedImageError):
        Image.open(tmp_path/'images'/'a.tif')
    assert 'More samples per pixel' in caplog.text

@pytest.mark.parametrize('classes, splits, is_said', [
    ({0: 0, 255: 1}, SPLITS, False),
    ({0: 1, 255: 0}, SPLITS, True),
    ({0: 255, 255: 1}, SPLITS, True),
    ({0: 1, 255: 0}, None, True)])
def test_inverted_masks(tmp_path, caplog, classes, splits, is_said):
    "More than half of what is labelled for training is positive"
    folder = make_folder(tmp_path/'in')
    if splits is None:
        # background is needed to deal images
        save(folder/'masks'/'a.png', np.full((40, 50), 255, np.uint8))
    # an object beside a background of one row
    if classes[0] == 255:
        for name in 'abcdef':
            mask = spot((40, 50))
            mask[0] = 100
            save(folder/f'masks/{name}.png', mask)
        classes = classes | {100: 0}
    import_images(source_of(folder, classes=classes, splits=splits), tmp_path/'out'/'m.csv', split_check='warn')
    said = [record.message for record in caplog.records if 'objects are meant to be rare' in record.message]
    assert len(said) == is_said
    if is_said:
        inverted = {value: {0: 1, 1: 0, 255: 255}[ours] for value, ours in classes.items()}
        assert advised(said[0])['classes'] == inverted

def test_large_objects_outside_of_training_are_not_said(tmp_path, caplog):
    folder = make_folder(tmp_path/'in')
    for name in 'bcdef':
        save(folder/f'masks/{name}.png', np.full((40, 50), 255, np.uint8))
    import_images(source_of(folder, splits=dict(train=['a'], val=['e'], test=['f'], buffer=['b', 'c', 'd'])),
                  tmp_path/'out'/'m.csv', split_check='warn')
    assert 'objects are meant to be rare' not in caplog.text

# ---------------------------------------------------------------- a run
def test_from_a_folder_to_evidence(tmp_path):
    "A config that names the folder alone"
    make_folder(tmp_path/'in', shape=(70, 90))
    cfg = load(overrides=['loader.num_workers=0', 'tracker.kind=none'],
               name='images', runs=tmp_path/'runs', device='cpu', epochs=2, batch_size=8, val_frequency=1,
               freeze_backbone_epochs=0, steps_per_epoch=4, metrics=dict(monitor='pr_auc@native'),
               lr=dict(base_lr=1e-3, backbone_lr_multiplier=1., warmup_epochs=0),
               data=dict(manifest=tmp_path/'data'/'manifest.csv', tile_size=32, split_check='warn',
                         source=dict(kind='images', path=tmp_path/'in', classes={0: 0, 255: 1}),
                         crops=dict(enabled=True)),
               sampler=dict(curriculum=[dict(first=1, last=2, ratio=1)]),
               model=dict(architecture='unet', encoder='tu-test_efficientnet', weights=None,
                          options=dict(encoder_depth=4, decoder_channels=[16, 8, 8, 8])))
    manifest = prepare(cfg)
    assert manifest.whole.table.tile_id.tolist() == list('abcdef')
    folder = train(cfg)
    evidence = Evidence.read(evaluate(folder, 'test'))
    positive = manifest.of('test').table.n_positive.sum()
    assert len(evidence) == len(manifest.of('test')) and positive == 63 * len(manifest.of('test').whole)
    # further files as those of the folder
    made = predict(folder/'model', tmp_path/'in/images/a.png', tmp_path/'map.tif', crs='none')
    assert made['pixels'] == 70 * 90 and made['source']['bands'] == [1, 2, 3]
    # another scale would be another set of tiles
    cfg.data.source.downscale = 2
    with pytest.raises(DataError, match='downscale 1 .asked for: 2'):
        prepare(cfg)

@pytest.mark.real
@pytest.mark.skipif(not DUBAI.is_dir(), reason='dubai_landcover is not on this machine')
def test_dubai_as_it_is(tmp_path):
    "54 JPEG images with PNG masks of five classes: a person says which, the rest is found"
    with pytest.raises(DataError, match=r'the masks hold 0 \([\d,]+ pixels\), .* 255 \([\d,]+ pixels\): say which'):
        guess_source(DUBAI)
    source = guess_source(DUBAI, classes={0: 1, 1: 0, 2: 0, 3: 0, 4: 0, 255: 255})
    source.table, source.columns = 'manifest.csv', {'stem': 'tile_id'}
    manifest = import_images(source, tmp_path/'m.csv')
    theirs = pd.read_csv(DUBAI/'manifest.csv').set_index('tile_id').loc[manifest.table.tile_id]
    assert manifest.table.split.tolist() == theirs.split.tolist()
    share = manifest.table.n_positive.to_numpy() / (theirs.width * theirs.height) * 100
    np.testing.assert_allclose(share, theirs.building_pct, atol=.001)
