"Images of any size: windows that cover them once, crops that stay inside, and a run on images that were never cut"
import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rasterio.transform import from_origin
from sklearn.metrics import average_precision_score
from torch.utils.data import default_collate

from rtsseg import rawtile
from rtsseg.augment import Augmenter
from rtsseg.check import check_loaders
from rtsseg.config import Augment, load
from rtsseg.console import DataError
from rtsseg.evaluation import evaluate
from rtsseg.evidence import Evidence
from rtsseg.filecheck import survey
from rtsseg.findings import has_errors
from rtsseg.infer import judged_part, load_model
from rtsseg.manifest import read_manifest
from rtsseg.metrics import average_precision, histogram
from rtsseg.prepare import prepare
from rtsseg.raster import write_raster
from rtsseg.rawtile import read_row
from rtsseg.splits import thin_splits
from rtsseg.stats import compute_stats
from rtsseg.tiles import TileDataset
from rtsseg.training import train
from rtsseg.windows import cover_side, cut_windows, draw_crop, label_windows, with_context

sizes = st.integers(1, 300)

def blobs(height, width, seed):
    "A label with a few ellipses, and a corner that is ignored"
    rng = np.random.default_rng(seed)
    label = np.zeros((height, width), np.uint8)
    for _ in range(rng.integers(0, 4)):
        middle = int(rng.integers(width)), int(rng.integers(height))
        cv2.ellipse(label, middle, tuple(map(int, rng.integers(1, 20, 2))), 0, 0, 360, 1, -1)
    label[:rng.integers(0, 10), :rng.integers(0, 10)] = 255
    return label

@given(size=sizes, side=st.integers(1, 80))
def test_windows_cover_a_side_once(size, side):
    "No pixel twice, none left out, and all windows inside where the image is as large as one"
    own = [range(start + taken, min(start + side, size)) for start, taken in cover_side(size, side)]
    assert [pixel for part in own for pixel in part] == list(range(size))
    assert all(0 <= start and (start + side <= size or size < side) for start, _ in cover_side(size, side))

@given(height=sizes, width=sizes, side=st.sampled_from([32, 64]), seed=st.integers(0, 999))
def test_each_positive_pixel_is_counted_once(height, width, side, seed):
    label = blobs(height, width, seed)
    found = list(label_windows(label, side))
    assert sum(row['n_positive'] for row in found) == (label == 1).sum()
    for row in found:
        parts = cv2.connectedComponents((own_label(label, row) == 1).astype(np.uint8), connectivity=8)[0] - 1
        assert len(row['points']) == parts
        assert all(label[point] == 1 for point in row['points'])

def own_label(label, row):
    "The part of a label that a window judges"
    return label[row['top'] + row['own_top']:row['top'] + row['side'],
                 row['left'] + row['own_left']:row['left'] + row['side']]

@given(height=sizes, width=sizes, side=st.sampled_from([32, 64]), seed=st.integers(0, 999),
       jitter=st.floats(0, 1), occurrence=st.integers(0, 9), context=st.integers(0, 40))
def test_crops_and_contexts(height, width, side, seed, jitter, occurrence, context):
    """A crop lies inside its image where that is large enough. One of a positive window holds an object of it. A window
    lies in its context, which leaves the image only where the image is smaller"""
    for row in label_windows(blobs(height, width, seed), side):
        crop = draw_crop(row, np.random.default_rng((seed, occurrence)), jitter)
        assert crop == draw_crop(row, np.random.default_rng((seed, occurrence)), jitter)
        for start, size in ((crop.top, height), (crop.left, width)):
            assert 0 <= start <= size - side or size < side
        if row['n_positive']:
            assert any(0 <= y - crop.top < side and 0 <= x - crop.left < side for y, x in row['points'])
        around = with_context(row, context)
        assert around.side == side + 2 * context
        for start, own, size in ((around.top, row['top'], height), (around.left, row['left'], width)):
            assert start <= own and own + side <= start + around.side
            assert 0 <= start <= size - around.side or size < around.side

STRONG = dict(elastic={'p': 0}, random_scale={'p': .5}, brightness={'p': 0}, contrast={'p': 0}, saturation={'p': 0},
              gaussian_noise={'p': 0}, clahe={'p': 0})

@given(seed=st.integers(0, 10**6), channels=st.sampled_from([3, 4, 5, 9]))
def test_a_draw_with_its_rim_pads_nothing(seed, channels):
    "Every pixel comes from the image, and is what the draw without a rim has where that has one"
    side, key = 32, (seed, 1, 0, 0)
    augment = Augmenter(Augment(**STRONG), fill=[-1.] * channels)
    rim = augment.rim(key, side)
    image = np.random.default_rng(seed).random((3 * side, 3 * side, channels), dtype=np.float32)
    mask = (image[..., 0] > .5).astype(np.uint8)
    inner = slice(side, 2 * side)
    outer = slice(side - rim, 2 * side + rim)
    alone, alone_mask = augment(image[inner, inner].copy(), mask[inner, inner].copy(), key)
    whole, whole_mask = augment(image[outer, outer].copy(), mask[outer, outer].copy(), key, rim)
    assert whole.shape == alone.shape and whole_mask.shape == (side, side)
    if rim < side:
        assert (whole >= 0).all() and (whole_mask != 255).all()
    # pixels that are interpolated with the padding differ
    inside = cv2.erode((alone_mask != 255).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    inside[[0, -1]] = inside[:, [0, -1]] = False
    assert np.abs(whole - alone)[inside & (alone >= 0).all(2)].max(initial=0) < 2e-3
    assert (whole_mask == alone_mask)[inside].mean() > .99 or not inside.any()

# ---------------------------------------------------------------- a run on images
def write_images(folder, shapes, crs=None):
    "Images whose objects are bright, with a manifest of them"
    folder.mkdir()
    rng, rows = np.random.default_rng(0), []
    for number, shape in enumerate(shapes):
        label = blobs(*shape, seed=number)
        image = rng.normal(110, 8, (3, *shape)) + 60 * (label == 1)
        place = from_origin(500_000 + 9000 * number, 8_100_000, 3, 3) if crs else None
        write_raster(folder/f'{number}.tif', image.clip(1, 255).astype(np.uint8), place, crs)
        write_raster(folder/f'{number}_mask.tif', label[None], place, crs)
        rows.append(dict(tile_id=f'i{number:02}', image=f'{number}.tif', mask=f'{number}_mask.tif', region='all',
                         block=f'i{number:02}', crs='' if crs else 'none', split=['train', 'val', 'test'][number % 3]))
    pd.DataFrame(rows).to_csv(folder/'manifest.csv', index=False)
    return folder/'manifest.csv'

SHAPES = [(100, 150), (90, 128), (130, 70), (64, 64), (200, 111), (40, 90), (150, 150), (97, 65), (70, 140)]

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images')/'data', SHAPES)

def image_run(images, runs, **more):
    "The config of a run of seconds on images"
    settings = dict(
        name='images', runs=runs, device='cpu', epochs=2, batch_size=8, val_frequency=1, freeze_backbone_epochs=0,
        steps_per_epoch=4, lr=dict(base_lr=1e-3, backbone_lr_multiplier=1., warmup_epochs=0),
        data=dict(manifest=images, tile_size=32, split_check='warn', crops=dict(enabled=True)),
        sampler=dict(curriculum=[dict(first=1, last=2, ratio=1)]), metrics=dict(monitor='pr_auc@native'),
        model=dict(architecture='unet', encoder='tu-test_efficientnet', weights=None,
                   options=dict(encoder_depth=4, decoder_channels=[16, 8, 8, 8])))
    return load(overrides=['loader.num_workers=0', 'tracker.kind=none'], **settings | more)

def test_windows_have_the_identity_of_their_images(images):
    "The same data, however large the windows are: the ledger of test looks knows them"
    whole = read_manifest(images)
    for side in (32, 64):
        windows = cut_windows(whole, side)
        assert windows.hash == whole.hash
        assert windows.table.n_positive.sum() == whole.table.n_positive.sum()
        assert windows.of('val').whole.table.tile_id.tolist() == whole.of('val').table.tile_id.tolist()
        assert set(windows.table.block) == set(whole.table.block)

def test_statistics_of_windows_are_those_of_the_images(images):
    whole = read_manifest(images)
    by_window, by_image = (compute_stats(m.of('train')) for m in (cut_windows(whole, 32), whole))
    np.testing.assert_allclose(by_window.mean, by_image.mean, rtol=.02)
    assert by_window.positive == by_image.positive and by_window.background == by_image.background

def test_the_check_judges_windows_without_their_context(images, tmp_path):
    cfg = image_run(images, tmp_path)
    findings = check_loaders(cfg, prepare(cfg), batches=3)
    assert not has_errors(findings)
    shapes, = [found.value for found in findings if found.what == 'validation: batches']
    assert shapes.endswith('image (8, 3, 32, 32) target (8, 32, 32)')

def test_a_window_is_read_with_its_context(images, tmp_path):
    "Image and target are those of the whole image, at the place that `corner` says"
    cfg = image_run(images, tmp_path)
    val = prepare(cfg).of('val')
    stats = compute_stats(prepare(cfg).of('train'))
    tiles = TileDataset(val, stats, cfg)
    assert cfg.data.context == 16
    for i, row in enumerate(val.table.to_dict('records')):
        sample = tiles[i]
        whole = read_row(val.root, val.whole.table.set_index('image', drop=False).loc[row['image']])
        image = stats.normalise(whole.rgb.transpose(1, 2, 0) / np.float32(stats.scale))
        assert sample['image'].shape == (3, 64, 64) and sample['target'].shape == (32, 32)
        y, x = sample['corner'].tolist()
        inside = sample['target'].numpy() != 255
        part = image[row['top']:row['top'] + 32, row['left']:row['left'] + 32]
        seen = sample['image'].numpy().transpose(1, 2, 0)[y:y + 32, x:x + 32]
        h, w = part.shape[:2]
        np.testing.assert_allclose(seen[:h, :w][inside[:h, :w]], part[inside[:h, :w]], atol=1e-5)
        assert (inside.sum(), (sample['target'] == 1).sum()) == (own_valid(whole, row), row['n_positive'])

def own_valid(whole, row):
    return (own_label(whole.label, row) != 255).sum()

def test_judged_part_is_where_the_target_is():
    logits = torch.arange(2 * 6 * 6.).reshape(2, 6, 6)
    batch = dict(target=torch.zeros(2, 3, 3), corner=torch.tensor([[0, 1], [3, 2]]))
    assert torch.equal(judged_part(logits, batch), torch.stack([logits[0, :3, 1:4], logits[1, 3:, 2:5]]))
    assert judged_part(logits, dict(target=torch.zeros(2, 6, 6))) is logits

def test_negative_draws_hold_no_object_and_positive_ones_do(images, tmp_path):
    cfg = image_run(images, tmp_path, augment=dict(enabled=False))
    train_part = prepare(cfg).of('train')
    tiles = TileDataset(train_part, compute_stats(train_part), cfg)
    for i, positive in enumerate(train_part.table.positive):
        held = [(tiles[(42, 1, i, k)]['target'] == 1).any().item() for k in range(12)]
        assert all(held) if positive else not any(held)
    images = [tiles[(42, 1, i, k)]['image'] for i in range(len(train_part)) for k in (0, 0, 1)]
    assert all(map(torch.equal, images[::3], images[1::3]))
    assert not all(map(torch.equal, images[::3], images[2::3]))

@pytest.mark.parametrize('megabytes', [1, 100])
def test_a_cache_changes_nothing(images, tmp_path, megabytes):
    "Draws and evaluations of windows are the same bits, also where only some images fit into the cache"
    cfg = image_run(images, tmp_path)
    part = prepare(cfg).of('train')
    stats = compute_stats(part)
    cached_cfg = cfg.model_copy(deep=True)
    cached_cfg.loader.cache_mb = megabytes
    plain, cached = TileDataset(part, stats, cfg), TileDataset(part, stats, cached_cfg)
    if megabytes == 1:
        # room for one image, not for the next
        cached.images.free = 150 * 150 * 5
    for _ in range(2):
        for i in range(len(part)):
            for key in (i, (42, 1, i, 0)):
                a, b = plain[key], cached[key]
                assert a.keys() == b.keys()
                assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    assert bool(cached.images.kept)

@pytest.fixture(scope='module')
def trained(images, tmp_path_factory):
    cfg = image_run(images, tmp_path_factory.mktemp('runs'))
    return cfg, train(cfg)

def test_evidence_of_windows_is_that_of_whole_images(trained):
    "Native average precision from windows equals scikit-learn's over all pixels of all images, each counted once"
    cfg, folder = trained
    found = Evidence.read(evaluate(folder, 'test'))
    packed, part = load_model(folder/'model'), prepare(cfg).of('test')
    tiles = TileDataset(part, packed.stats, cfg)
    scores, truth = [], []
    with torch.inference_mode():
        for i in range(len(part)):
            batch = default_collate([tiles[i]])
            logits = judged_part(packed.model(batch['image'])[:, 0], batch)[0].numpy()
            target = batch['target'][0].numpy()
            scores.append(logits[target != 255])
            truth.append(target[target != 255])
    whole = part.whole
    labels = [read_row(whole.root, row).label for row in whole.table.to_dict('records')]
    assert sum(map(len, truth)) == sum((label != 255).sum() for label in labels)
    expected = average_precision_score(np.concatenate(truth), np.concatenate(scores))
    assert float(average_precision(histogram(found, 'native'), found.exact)) == pytest.approx(expected, abs=1e-3)

def test_results_do_not_depend_on_workers(trained, tmp_path):
    cfg, folder = trained
    other = cfg.model_copy(deep=True, update=dict(runs=tmp_path))
    other.loader.num_workers = 2
    weights = [(f/'model'/'model.safetensors').read_bytes() for f in (folder, train(other))]
    assert weights[0] == weights[1]

def test_an_image_that_cannot_be_read_is_named(tmp_path):
    manifest = write_images(tmp_path/'data', SHAPES[:3], 'EPSG:32610')
    whole = read_manifest(manifest)
    (tmp_path/'data'/'1.tif').write_bytes((tmp_path/'data'/'1.tif').read_bytes()[:300])
    with pytest.raises(DataError, match="tile 'i01', image '1.tif'"):
        cut_windows(whole, 32)
    assert thin_splits(whole.table)

def test_without_crops_an_image_of_another_size_is_refused(images, tmp_path):
    with pytest.raises(DataError, match='data.crops.enabled=true takes images of any size'):
        train(image_run(images, tmp_path, data=dict(manifest=images, tile_size=32, split_check='warn')))

def test_check_and_statistics_read_an_image_once(images, tmp_path, monkeypatch):
    "Not once for each of its windows; what they see is the same"
    cfg = image_run(images, tmp_path)
    manifest = prepare(cfg)
    apart = [read_row(manifest.root, row) for row in manifest.table.to_dict('records')]
    read = []
    whole = rawtile.ImageCache._whole
    def counted(cache, row):
        if row['image'] not in cache.kept:
            read.append(row['image'])
        return whole(cache, row)
    monkeypatch.setattr(rawtile.ImageCache, '_whole', counted)
    seen = survey(manifest, [])
    assert sorted(read) == sorted(set(manifest.table.image)) and len(manifest) > len(read)
    assert seen.tiles.positive.tolist() == [int((tile.label == 1).sum()) for tile in apart]
    assert not seen.tiles.place.any()
    read.clear()
    compute_stats(manifest.of('train'))
    assert sorted(read) == sorted(set(manifest.of('train').table.image))
