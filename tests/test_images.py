"Folders of images and masks: every pixel arrives, and what cannot be taken is said once with what to do"
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from rasterio.transform import from_origin

from rtsseg.config import ImagesSource, TableSource, load
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
    assert f'value_range: [{np.nanmin(rgb):.6g}, {np.nanmax(rgb):.6g}]' in line
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

def rotate(folder):
    for name in 'ab':
        shown = Image.open(folder/f'images/{name}.png')
        exif = shown.getexif()
        exif[274] = 6
        shown.save(folder/f'images/{name}.png', exif=exif)

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
                ['images without a mask at masks/{stem}: 1 (b.png)', 'unmasked: negative']),
    'no image': (lambda folder: (folder/'images/b.png').unlink(), ['masks without an image', '1 (b.png)']),
    'size': (lambda folder: save(folder/'masks/b.png', spot((30, 20))),
             ['masks of another size', 'b.png: 20 × 30, its image 50 × 40']),
    'one stem': (lambda folder: save(folder/'images/a.jpg', picture(spot((40, 50)))),
                 ['files with one stem: 1 (images/a.jpg, images/a.png)']),
    'exif': (rotate, ['EXIF', '2 (a.png, b.png)', 'exif_transpose']),
    'palette': (palette, ['images with a palette: 1 (a.png): save them as RGB']),
    'unreadable': (truncate, ['a.png, b.png: is not a GeoTIFF']),
    'values': (lambda folder: save(folder/'masks/a.png', spot((40, 50), 7)),
               ['masks with values 7, which are not in classes [0, 255]: 1 (a.png)', 'data.source.classes']),
    'colours': (lambda folder: save(folder/'masks/a.png', picture(spot((40, 50)))),
                ['a.png: a mask has one band, this one has 3']),
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
    assert 'data.source.classes: {0: 0, 255: 1}' in message

def test_unmasked_images_as_negatives(tmp_path):
    folder = make_folder(tmp_path/'in')
    (folder/'masks/b.png').unlink()
    source = source_of(folder, splits=SPLITS, unmasked='negative')
    positive = import_images(source, tmp_path/'out'/'m.csv').table.set_index('tile_id').n_positive
    assert positive['b'] == 0 and (positive.drop('b') == 63).all()

def test_two_images(tmp_path):
    "They cannot be dealt; named they can train and validate"
    folder = make_folder(tmp_path/'in', 'ab')
    assert '2 images cannot be dealt' in refusal(folder, tmp_path/'out', splits=None)
    manifest = import_images(source_of(folder, splits=dict(train=['a'], val=['b'])), tmp_path/'out'/'m.csv')
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
    (lambda folder: save(folder/'masks/a.png', spot((40, 50), 7)), 'the masks hold 0, 7, 255: say which are objects')])
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
    with pytest.raises(DataError, match='the masks hold 0, 1, 2, 3, 4, 255: say which are objects'):
        guess_source(DUBAI)
    source = guess_source(DUBAI, classes={0: 1, 1: 0, 2: 0, 3: 0, 4: 0, 255: 255})
    source.table, source.columns = 'manifest.csv', {'stem': 'tile_id'}
    manifest = import_images(source, tmp_path/'m.csv')
    theirs = pd.read_csv(DUBAI/'manifest.csv').set_index('tile_id').loc[manifest.table.tile_id]
    assert manifest.table.split.tolist() == theirs.split.tolist()
    share = manifest.table.n_positive.to_numpy() / (theirs.width * theirs.height) * 100
    np.testing.assert_allclose(share, theirs.building_pct, atol=.001)
