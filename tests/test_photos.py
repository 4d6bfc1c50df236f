"Photographs of plants: lists as people make them, files that are damaged, and draws that only the key decides"
import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rtsseg.config import ConfigError, Loader, LoopConfig
from rtsseg.console import DataError
from rtsseg.leaf_world import make_leaf_world
from rtsseg.loop import check_samplers
from rtsseg.mixing import Mixing
from rtsseg.photo_feed import (
    NO_LABEL,
    PhotoAugment,
    PhotoData,
    PhotoDataset,
    draw_photo_crop,
    photos_in_order,
    train_photos,
)
from rtsseg.photos import Photo, PhotoDeal, PhotoTable, Taxonomy, check_photos, deal_photos, jpeg_header
from rtsseg.shards import read_photos, write_shards
from rtsseg.tiles import UnreadableTiles

quick = settings(max_examples=60, deadline=None)

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A small world: two species with six and three classes"
    return make_leaf_world(tmp_path_factory.mktemp('leaves')/'world', side=48, images=6, species=2)

@pytest.fixture
def world(made, tmp_path):
    "A copy of it that a test may damage"
    return Path(shutil.copytree(made, tmp_path/'world'))

def read(root):
    return PhotoTable.read(root/'photos.csv', root/'taxonomy.json')

def problems(root, change=None, taxonomy=True):
    "What is said of a list that was changed"
    table = pd.read_csv(root/'photos.csv', dtype=str)
    if change:
        table = change(table)
    table.to_csv(root/'photos.csv', index=False)
    with pytest.raises(DataError) as caught:
        PhotoTable.read(root/'photos.csv', root/'taxonomy.json' if taxonomy else None)
    return str(caught.value)

def setting(row, **cells):
    "A change of some cells of a row, counted from 1"
    def change(table):
        for name, value in cells.items():
            table.loc[row - 1, name] = value
        return table
    return change

# ---------------------------------------------------------------- names
names = st.text(st.characters(categories=('L', 'N')), min_size=1, max_size=4)
trees = st.dictionaries(names, st.lists(names, min_size=1, max_size=4, unique=True), min_size=1, max_size=5)

@quick
@given(trees)
def test_a_taxonomy_survives_json(tree):
    "Names, order and places are those that were written"
    taxonomy = Taxonomy(tree)
    again = Taxonomy.from_json(taxonomy.to_json())
    assert again == taxonomy and again.classes == taxonomy.classes
    assert [again.index(*pair) for pair in again.classes] == list(range(taxonomy.offsets[-1]))
    for species, start, stop in zip(taxonomy.species, taxonomy.offsets, taxonomy.offsets[1:]):
        assert [disease for _, disease in taxonomy.classes[start:stop]] == tree[species]

@quick
@given(trees, st.randoms(use_true_random=False))
def test_two_taxonomies_are_equal_only_with_every_name_in_place(tree, random):
    "A name that is lacking, and another order, are named"
    items = list(tree.items())
    random.shuffle(items)
    taxonomy, other = Taxonomy(tree), Taxonomy(dict(items))
    assert (taxonomy == other) == (list(tree) == [species for species, _ in items])
    more = Taxonomy(tree | {'another': ['x']})
    with pytest.raises(DataError, match="species 'another' is in list.csv alone"):
        taxonomy.check_same(more, 'the checkpoint', 'list.csv')

@pytest.mark.parametrize('text, words', [
    ('{"oak": []}', "'oak': without diseases"),
    ('{"oak": ["rust", "rust"]}', "'rust' is listed twice"),
    ('{"oak": "rust"}', 'a list of names of diseases was expected'),
    ('{"oak": [3]}', 'a list of names of diseases was expected'),
    ('{"oak": ["rust"], "oak": ["scab"]}', 'a key occurs twice'),
    ('{" ": ["rust"]}', 'a species without a name'),
    ('[]', 'not an object'),
    ('{}', 'no species'),
    ('{', 'cannot be read'),
])
def test_a_taxonomy_that_cannot_be_taken(text, words, tmp_path):
    (tmp_path/'taxonomy.json').write_text(text)
    with pytest.raises(DataError, match='taxonomy.json.*' + re.escape(words)):
        Taxonomy.read(tmp_path/'taxonomy.json')

# ---------------------------------------------------------------- lists
def without(column):
    return lambda table: table.drop(columns=column)

BAD_LISTS = {
    'an empty cell': (setting(3, disease=''), 'row 3, disease: empty'),
    'an empty path': (setting(3, path=''), 'row 3, path: empty'),
    'no split': (setting(5, split=''), 'row 5, split: empty'),
    'an unknown split': (setting(3, split='trian'),
                         "row 3, split 'trian': not the name of a split (did you mean 'train'?)"),
    'a file that is not there': (setting(2, path='photos/lost.jpg'), "row 2, path 'photos/lost.jpg': no such file"),
    'a path that leads out': (setting(2, path='../elsewhere.jpg'), 'leads out of'),
    'an absolute path': (setting(2, path='/etc/hostname'), 'leads out of'),
    'an unknown species': (setting(1, species='ovel'),
                           "row 1, species 'ovel' is not in the taxonomy (did you mean 'oval'?)"),
    'a disease of another species': (setting(1, disease='heart rust'),
                                     "row 1, disease 'heart rust' is listed under heart, not under 'oval'"),
    'a disease of no species': (setting(1, disease='oval rsut'),
                                "row 1, disease 'oval rsut' is listed under no species (did you mean 'oval rust'?)"),
    'no column of that name': (lambda table: table.rename(columns=dict(disease='desease')),
                               "no column 'disease' (did you mean 'desease'?)"),
    'a class without training': (lambda table: table[(table.disease != 'oval rust') | (table.split != 'train')],
                                 "species 'oval', disease 'oval rust': no image in train"),
    'a species without validation': (lambda table: table[(table.species != 'heart') | (table.split != 'val')],
                                     "species 'heart': no image in val"),
    'no validation': (lambda table: table[table.split != 'val'], "split 'val': no image"),
    'a path twice': (lambda table: pd.concat([table, table.iloc[:1]]), 'row 1 has it too'),
    'no row': (lambda table: table[:0], 'no photograph'),
}

@pytest.mark.parametrize('what', BAD_LISTS)
def test_a_list_that_cannot_be_taken(what, world):
    "The message names row and field"
    change, words = BAD_LISTS[what]
    assert words in problems(world, change)

def test_all_problems_of_a_list_at_once(world):
    def change(table):
        for row, cells in ((1, dict(path='lost.jpg')), (2, dict(split='trian')), (3, dict(species=''))):
            table = setting(row, **cells)(table)
        return setting(4, disease='heart rust')(table)
    message = problems(world, change)
    for words in ('row 1, path', 'row 2, split', 'row 3, species: empty', "row 4, disease 'heart rust'"):
        assert words in message

def test_a_plant_in_two_splits(world):
    "Photographs of one plant in training and validation would measure memory"
    table = pd.read_csv(world/'photos.csv')
    plant = table.plant[table.split == 'train'].iloc[0]
    first = int(np.flatnonzero(table.split == 'val')[0]) + 1
    message = problems(world, setting(first, plant=plant))
    assert f'plant {plant!r}: in train (row 1) and in val (row {first})' in message

def test_the_names_of_splits_as_people_write_them(world):
    table = pd.read_csv(world/'photos.csv')
    table['split'] = table.split.map(dict(train='Training', val='validation', test='TEST'))
    table.assign(path=table.path + ' ').to_csv(world/'other.csv', index=False)
    other = PhotoTable.read(world/'other.csv', world/'taxonomy.json')
    assert other.table.equals(read(world).table)

def test_without_a_taxonomy_names_are_sorted(world):
    "A disease of two species, as healthy, is a class of each"
    taxonomy = PhotoTable.read(world/'photos.csv').taxonomy
    assert taxonomy.species == sorted(taxonomy.species)
    assert all(diseases == sorted(diseases) for diseases in taxonomy.diseases.values())
    assert ('heart', 'healthy') in taxonomy.classes and ('oval', 'healthy') in taxonomy.classes

# ---------------------------------------------------------------- folders
def test_folders_without_splits_are_dealt(world, tmp_path):
    "By plant, the same for the same seed; each class is in training"
    for path in (world/'photos').glob('*/*/*/*.jpg'):
        target = tmp_path/'flat'/path.parts[-3]/path.parts[-2]/path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    deal = PhotoDeal(val=.3, test=.2, seed=3, plants=r'(.+)-\d')
    photos = PhotoTable.read(tmp_path/'flat', None, deal)
    assert photos.table.groupby('plant').split.nunique().max() == 1
    assert photos.table.equals(PhotoTable.read(tmp_path/'flat', None, deal).table)
    assert (photos.of('train').counts > 0).all()
    other = PhotoTable.read(tmp_path/'flat', None, PhotoDeal(val=.3, test=.2, seed=4, plants=r'(.+)-\d'))
    assert not photos.table.split.equals(other.table.split)
    with pytest.raises(DataError, match=re.escape("plants: '([x]+)' names no plant in heart")):
        PhotoTable.read(tmp_path/'flat', None, PhotoDeal(plants='([x]+)'))

@quick
@given(st.lists(st.tuples(st.sampled_from('abc'), st.integers(0, 30)), min_size=1, max_size=80),
       st.floats(0, .4), st.floats(0, .4), st.integers(0, 9))
def test_dealing_keeps_plants_together_and_classes_in_training(rows, val, test, seed):
    table = pd.DataFrame([dict(path=str(k), species='s', disease=disease, plant=f'{disease}{plant}')
                          for k, (disease, plant) in enumerate(rows)])
    table['split'] = deal_photos(table, PhotoDeal(val, test, seed))
    assert table.groupby('plant').split.nunique().max() == 1
    assert (table[table.split == 'train'].groupby('disease').size().reindex(table.disease.unique()) > 0).all()
    # no split has more than its share and the plant that exceeds it, but training
    for name, share in (('val', val), ('test', test)):
        for _, of_class in table.groupby('disease'):
            largest = of_class.plant.value_counts().max()
            assert (of_class.split == name).sum() < share * len(of_class) + largest

def test_folders_that_are_no_classes(world):
    photos = world/'photos'
    (photos/'train'/'oval'/'stray.jpg').write_bytes((world/read(world).paths[0]).read_bytes())
    (photos/'train'/'elm').mkdir()
    (photos/'trian'/'oval'/'healthy').mkdir(parents=True)
    shutil.copy(world/read(world).paths[0], photos/'trian'/'oval'/'healthy'/'x.jpg')
    with pytest.raises(DataError) as caught:
        PhotoTable.read(photos)
    message = str(caught.value)
    assert 'train/oval/stray.jpg: does not lie in a folder of a species and one of a disease in it' in message
    assert "species 'elm': without diseases: train/elm has no folders" in message
    assert "trian: not the name of a split (did you mean 'train'?)" in message

def test_the_hash_knows_labels_and_contents(world):
    before, table = read(world).hash, pd.read_csv(world/'photos.csv')
    assert read(world).hash == before
    path = world/table.path[0]
    path.write_bytes(path.read_bytes() + b' ')
    changed = read(world).hash
    assert changed != before
    tree = json.loads((world/'taxonomy.json').read_text())
    (world/'taxonomy.json').write_text(json.dumps(dict(reversed(tree.items()))))
    assert read(world).hash not in (before, changed)

# ---------------------------------------------------------------- files
def many(world, n=1001):
    "A list of so many training rows, files of the world copied"
    table = pd.read_csv(world/'photos.csv')
    train, rest = table[table.split == 'train'], table[table.split != 'train']
    rows = [train.iloc[k % len(train)] for k in range(n)]
    copies = []
    for k, row in enumerate(rows):
        path = f'photos/copy{k}.jpg'
        (world/path).hardlink_to(world/row.path)
        copies.append(row.to_dict() | dict(path=path))
    pd.concat([pd.DataFrame(copies), rest]).to_csv(world/'photos.csv', index=False)
    return read(world)

def damage(photos, *rows):
    "Cut files off"
    for row in rows:
        path = photos.root/photos.paths[row]
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data[:len(data) // 2])

def test_one_photograph_of_a_thousand_is_left_out(world, capsys):
    "It is named; more than that are refused, and all are named"
    photos = many(world, 1001)
    damage(photos, 5)
    assert check_photos(photos) == [5]
    assert f'left out: {photos.paths[5]}: not an image that can be read: the file is cut off' in capsys.readouterr().err
    damage(photos, 9)
    with pytest.raises(DataError) as caught:
        check_photos(read(world))
    assert f'2 of {len(photos)} photographs cannot be read, which is more than 0.1%' in str(caught.value)
    assert photos.paths[5] in str(caught.value) and photos.paths[9] in str(caught.value)

def test_a_file_in_two_splits(world):
    photos = read(world)
    val, train = photos.of('val').paths[0], photos.of('train').paths[0]
    shutil.copy(world/train, world/val)
    with pytest.raises(DataError, match='is the same file as'):
        check_photos(read(world))

@pytest.mark.parametrize('workers', [0, 2])
def test_a_lost_photograph_costs_itself(workers, world, tmp_path, capsys):
    "Whichever process reads it, the observer names it once; the second one stops the run"
    photos = many(world, 1001)
    damage(photos, 5)
    train, val = (PhotoDataset(photos.of(split), PhotoData(side=16), PhotoAugment()) for split in ('train', 'val'))
    row = photos.of('train').paths.index(photos.paths[5])
    keys = [[(42, 1, k, 0) for k in (row - 1, row, row + 1)]]
    batch, = torch.utils.data.DataLoader(train, batch_sampler=keys, num_workers=workers)
    assert (batch['disease'] == NO_LABEL).tolist() == [False, True, False]
    assert batch['image'][1].abs().max() == 0 and batch['image'][0].abs().max() > 0
    reasons, process = [], SimpleNamespace(is_main_process=True, num_processes=1)
    run = SimpleNamespace(folder=tmp_path, stop=reasons.append, accelerator=process)
    watch = UnreadableTiles(train, val)
    watch.on_start(run)
    watch.on_step(run)
    assert not reasons
    damage(photos, 7)
    train.read(photos.of('train').paths.index(photos.paths[7]))
    watch.on_step(run)
    watch.on_end(run)
    printed = capsys.readouterr().out
    assert printed.count(f'training: {photos.paths[5]}: not an image that can be read') == 1
    assert 'it counts as without a label' in printed
    assert '2 of 1001 training photographs could not be read' in printed
    assert reasons[0].startswith('training: 2 of 1001 photographs cannot be read, which is more than 0.1%')
    # a process that begins later reads them again
    later = PhotoDataset(photos.of('train'), PhotoData(side=16), PhotoAugment())
    UnreadableTiles(later, val).on_start(run)
    assert later.unread.sum() == 2

def as_bytes(kind, size=(40, 30), mode='RGB', **more):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, kind, **more)
    return file.getvalue()

@pytest.mark.parametrize('kind, mode', [('JPEG', 'RGB'), ('JPEG', 'L'), ('JPEG', 'CMYK'), ('PNG', 'RGBA'), ('PNG', 'P'),
                                        ('PNG', '1'), ('TIFF', 'RGB'), ('BMP', 'RGB'), ('WEBP', 'RGB')])
def test_kinds_of_images(kind, mode):
    "All become three bytes a pixel, as Pillow reads them"
    data = as_bytes(kind, mode=mode)
    found = Photo(data, 'x').pixels()
    expected = np.asarray(Image.open(io.BytesIO(data)).convert('RGB')).astype(int)
    assert found.shape == (30, 40, 3) and found.dtype == np.uint8
    # decoders of JPEG round differently, and CMYK has no exact meaning in RGB
    assert np.abs(found - expected).mean() < (12 if mode == 'CMYK' else 2)

@quick
@given(st.binary(max_size=400))
def test_bytes_that_are_no_image(data):
    with pytest.raises(DataError, match='odd.jpg: not an image that can be read'):
        Photo(data, 'odd.jpg').pixels()

JPEG = as_bytes('JPEG', quality=80, exif=b'Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0')

@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(JPEG) - 1), st.integers(0, 255))
def test_a_changed_byte(place, value):
    "A photograph with one byte changed is decoded, or it is a DataError: never another kind of error"
    data = bytearray(JPEG)
    data[place] = value
    try:
        photo = Photo(bytes(data), 'x')
        assert photo.pixels().shape == (*photo.size, 3)
    except DataError:
        pass

@pytest.mark.parametrize('length', [0, 2, 3, 20, 100, len(JPEG) // 2, len(JPEG) - 2])
def test_a_jpeg_that_is_cut_off(length):
    with pytest.raises(DataError, match='x: not an image that can be read'):
        Photo(JPEG[:length], 'x').pixels()

@quick
@given(st.integers(8, 90), st.integers(8, 90), st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8]), st.booleans())
def test_the_header_is_that_of_pillow(width, height, orientation, progressive):
    "Size and orientation, read without a decoder; at any fraction the decoded size agrees"
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = as_bytes('JPEG', (width, height), exif=exif, progressive=progressive)
    header = jpeg_header(data)
    assert (header.height, header.width, header.orientation) == (height, width, orientation)
    photo = Photo(data, 'x')
    assert photo.size == ((width, height) if orientation > 4 else (height, width))
    for shrink in (1, 2, 4, 8):
        assert photo.pixels(shrink).shape == (*(-(-side // shrink) for side in photo.size), 3)

# ---------------------------------------------------------------- the feed
@quick
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 10**6))
def test_a_crop_lies_in_the_photograph(height, width, seed):
    top, left, h, w = draw_photo_crop(PhotoAugment().crop, np.random.default_rng(seed), (height, width))
    assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width and h > 0 and w > 0

def batches(photos, workers, augment, mixing, epochs=(1, 2)):
    "All training batches of some epochs, the second one weighted"
    loader = Loader(num_workers=workers, persistent_workers=False)
    feed = train_photos(photos.of('train'), PhotoData(side=32), augment, mixing, loader, 8, 42)
    found = []
    for epoch in epochs:
        feed.batch_sampler.set_epoch(epoch)
        feed.batch_sampler.choose('weighted' if epoch == 2 else '')
        found += list(feed)
    return found

def assert_equal(one, other):
    assert len(one) == len(other) > 2
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a['image'], b['image']) and torch.equal(a['disease'], b['disease'])
        assert (a['sample'], a['group'], str(a.get('mix'))) == (b['sample'], b['group'], str(b.get('mix')))

ALL_ON = PhotoAugment(rand_augment=dict(enabled=True), degrade=dict(p=1.), compression=dict(p=1.), shadow=dict(p=1.))
HALF = Mixing(mixup=dict(p=.25), cutmix=dict(p=.25))

@pytest.mark.parametrize('augment', [PhotoAugment(), ALL_ON], ids=['guide', 'all'])
def test_workers_change_nothing(augment, made):
    "Order, crops, augmentation and mixing: the same bits without workers and with two"
    photos = read(made)
    assert_equal(batches(photos, 0, augment, HALF), batches(photos, 2, augment, HALF))

def test_shards_change_nothing(made, tmp_path):
    "Order and draws of tar files are those of loose files, and so is the hash by which a run is found"
    photos = read(made)
    sharded = read_photos(write_shards(photos, tmp_path/'shards', megabytes=.01))
    assert len(list((tmp_path/'shards'/'train').glob('*.tar'))) > 3
    assert sharded.hash == photos.hash
    assert_equal(batches(photos, 0, ALL_ON, HALF), batches(sharded, 2, ALL_ON, HALF))

def test_a_run_can_begin_with_files_and_continue_with_shards(made, tmp_path):
    "The second epoch alone, from shards, is the second epoch after the first"
    photos = read(made)
    both = batches(photos, 0, PhotoAugment(), HALF)
    sharded = read_photos(write_shards(photos, tmp_path/'shards'))
    assert_equal(both[len(both) // 2:], batches(sharded, 0, PhotoAugment(), HALF, epochs=(2,)))

def test_a_stage_names_a_sampler_that_is_not_there(made):
    "Said before training, and not when its epoch comes"
    feed = train_photos(read(made).of('train'), PhotoData(), PhotoAugment(), HALF, Loader(num_workers=0), 8, 42)
    stages = [dict(first=1, last=2, rates=dict(encoder=1e-3), sampler='wieghted')]
    with pytest.raises(ConfigError, match="sampler 'wieghted' .did you mean 'weighted'"):
        check_samplers(LoopConfig(epochs=2, freeze_backbone_epochs=0, stages=stages), feed.batch_sampler)

def test_half_of_the_batches_are_mixed(made):
    found = batches(read(made), 0, PhotoAugment(enabled=False), HALF, epochs=range(1, 41))
    mixed = sum('mix' in batch for batch in found)
    # binomial, four standard deviations
    assert abs(mixed / len(found) - .5) < 2 / len(found)**.5

def test_validation_is_the_whole_photograph(made):
    "Resized, without a crop, whatever augmentation training has"
    photos, data = read(made).of('val'), PhotoData(side=48, draft=0)
    for batch in photos_in_order(photos, data, Loader(num_workers=0), 7):
        for image, row in zip(batch['image'], batch['row'].tolist()):
            mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
            bytes_seen = ((image * std + mean) * 255).round().byte().permute(1, 2, 0).numpy()
            assert (bytes_seen == photos.photo(row).pixels()).all()

# ---------------------------------------------------------------- shards
CUTS = ['in the first sample', 'in a header', 'in a photograph', 'between two samples', 'empty']

@pytest.mark.parametrize('where', CUTS)
def test_a_shard_that_is_cut_off(where, made, tmp_path):
    "It is named, wherever it ends; cut off between two samples it would be a good tar file with fewer of them"
    folder = write_shards(read(made), tmp_path/'shards')
    place = read_photos(folder).of('train').places.loc[7]
    # a header of 512 bytes stands before its file
    ends = {'in the first sample': 700, 'in a header': place.offset - 100, 'in a photograph': place.offset + 100,
            'between two samples': place.offset - 512, 'empty': 0}
    shard = folder/place.shard
    shard.write_bytes(shard.read_bytes()[:ends[where]])
    with pytest.raises(DataError, match='shard-000000.tar: (the file is cut off|a damaged tar file)'):
        read_photos(folder)

def test_shards_in_a_folder_that_is_no_split(made, tmp_path):
    folder = write_shards(read(made), tmp_path/'shards')
    (folder/'val').rename(folder/'vall')
    with pytest.raises(DataError, match="vall/shard-000000.tar: 'vall' is not the name of a split"):
        read_photos(folder)

def test_the_same_shard_twice(made, tmp_path):
    folder = write_shards(read(made), tmp_path/'shards')
    shutil.copy(folder/'train'/'shard-000000.tar', folder/'train'/'shard-000001.tar')
    with pytest.raises(DataError, match='several samples have it'):
        read_photos(folder)

def test_webdataset_reads_what_was_written(made, tmp_path):
    "Images and classes, in the order of the list"
    webdataset = pytest.importorskip('webdataset')
    photos = read(made)
    folder = write_shards(photos, tmp_path/'shards', megabytes=.02)
    for split in ('train', 'val', 'test'):
        part = photos.of(split)
        paths = [str(path) for path in sorted((folder/split).glob('*.tar'))]
        found = list(webdataset.WebDataset(paths, shardshuffle=False).decode('rgb8').to_tuple('jpg', 'cls', 'json'))
        assert [label for _, label, _ in found] == part.labels.tolist()
        assert [known['path'] for _, _, known in found] == part.paths
        for row, (image, _, _) in enumerate(found):
            assert np.abs(image.astype(int) - part.photo(row).pixels()).mean() < 1
