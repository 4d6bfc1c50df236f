"Augment: one key, one draw, in any process; strengths; masks on their images; and the boundary band by brute force"

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from scipy.ndimage import binary_erosion
from torch.utils.data import DataLoader, Dataset

from rtsseg.augment import Augmenter, boundary, draw, elastic, warp
from rtsseg.config import Augment, Loss

KEYS = [(42, 1, t, o) for t in range(4) for o in range(3)]


def tile(side=48, channels=5):
    rng = np.random.default_rng(0)
    return rng.random((side, side, channels), dtype=np.float32), rng.choice(np.uint8([0, 1, 255]), (side, side))


class Digests(Dataset):
    "The hash of each draw"

    def __init__(self):
        self.augment = Augmenter(Augment(), [0.5] * 5)

    def __len__(self):
        return len(KEYS)

    def __getitem__(self, i):
        return hashlib.sha256(b''.join(a.tobytes() for a in self.augment(*tile(), KEYS[i]))).hexdigest()


def draws(workers, **kw):
    return [d for batch in DataLoader(Digests(), batch_size=2, num_workers=workers, **kw) for d in batch]


def test_any_number_of_workers():
    alone = draws(0)
    assert len(set(alone)) == len(KEYS)
    for workers in (1, 2):
        assert draws(workers) == alone


def test_a_process_of_its_own():
    "No state of this process, as its hash seed, has a part in it"
    code = 'import test_augment as t; print("\\n".join(t.draws(0)))'
    out = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=__file__.rpartition('/')[0]
    ).stdout
    assert out.split() == draws(0)


def test_library_state_has_no_part():
    import random

    a = Augmenter(Augment(), [0.5] * 5)
    first = a(*tile(), KEYS[3])
    random.seed(1)
    np.random.seed(1)
    a(*tile(), KEYS[5])
    assert all((x == y).all() for x, y in zip(a(*tile(), KEYS[3]), first))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**63), st.integers(1, 300), st.integers(0, 10**6), st.integers(0, 500), st.integers(3, 9))
def test_any_key_any_number_of_channels(seed, epoch, n, occurrence, channels):
    image, mask = tile(channels=channels)
    image[..., 3:] = image[..., 3:] * 2000 - 1000
    out, m = Augmenter(Augment(), image.mean((0, 1)))(image, mask, (seed, epoch, n, occurrence))
    assert out.shape == image.shape and out.dtype == np.float32 and out.flags.c_contiguous and np.isfinite(out).all()
    assert m.shape == mask.shape and m.dtype == np.uint8 and set(np.unique(m)) <= {0, 1, 255}
    assert 0 <= out[..., :3].min() and out[..., :3].max() <= 1 and np.abs(out[..., 3:]).max(initial=0) <= 1001


def test_noise_has_the_variance_of_the_guide():
    "Drawn evenly from 10..50 on the scale 0..255: 30 on average, and every part of the range as often"
    certain = Augment(gaussian_noise={'p': 1})
    stds = [draw(certain, np.random.default_rng((0, 1, 0, n)))['gaussian_noise'] for n in range(4000)]
    variances = 255**2 * np.square(stds)
    assert variances.mean() == pytest.approx(30, abs=4 * 40 / 12**0.5 / 4000**0.5)
    assert stats.kstest(variances, stats.uniform(10, 40).cdf).pvalue > 0.001


def library_elastic(alpha, sigma, seed, **mode):
    "(2, 192, 192) displacements of albumentations, pixels"
    import albumentations

    transform = albumentations.ElasticTransform(alpha=alpha, sigma=sigma, **mode)
    transform.set_random_seed(seed)
    maps = transform.get_params_dependent_on_data(dict(shape=(192, 192)), {})
    return np.stack([maps['map_x'], maps['map_y']]) - np.mgrid[:192, :192][::-1]


def field_statistics(fields):
    "Standard deviation, largest value of a field on average, correlation of x and y; the rim of each field left out"
    inner = np.stack(fields)[..., 40:-40, 40:-40]
    together = np.corrcoef(inner[:, 0].ravel(), inner[:, 1].ravel())[0, 1]
    return inner.std(), np.abs(inner).max((1, 2, 3)).mean(), together


@pytest.mark.parametrize('alpha,sigma', [(120, 6), (40, 3), (300, 10)])
def test_elastic_is_as_strong_as_the_mode_of_the_library_that_it_names(alpha, sigma):
    "Over 100 draws the default mode agrees within 6%; every other mode differs by more in one of the statistics"
    at = np.eye(2)
    fields = [elastic(alpha, sigma, (192, 192), at, np.random.default_rng(n)).transpose(2, 0, 1) for n in range(100)]
    spread, largest, together = field_statistics(fields)

    def of_library(**other):
        mode = dict(approximate=False, same_dxdy=False, noise_distribution='gaussian') | other
        return field_statistics([library_elastic(alpha, sigma, n, **mode) for n in range(100)])

    expected = of_library()
    assert [spread, largest] == pytest.approx(expected[:2], rel=0.06) and abs(together) < 0.1
    assert of_library(noise_distribution='uniform')[0] > 2 * spread
    assert of_library(same_dxdy=True)[2] == pytest.approx(1)
    if sigma > 3:
        assert abs(of_library(approximate=True)[0] / spread - 1) > 0.06


MOVES = {n: {'p': 0} for n in ('brightness', 'contrast', 'saturation', 'gaussian_noise', 'clahe')}
FLAT = MOVES | {'rotate90': {'p': 0}}


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 10**6), st.integers(40, 90), st.integers(40, 90))
def test_the_mask_lies_on_its_image(n, h, w):
    "Full draws on tiles of any form: the channel that holds the mask's own code agrees with the mask"
    row, column = np.mgrid[:h, :w].astype(np.float32)
    image = np.dstack([np.full((h, w, 3), 0.5, np.float32), column, row])
    for code, channel in ((column, 3), (row, 4)):
        out, m = Augmenter(Augment(**FLAT), [0.5] * 3 + [0, 0])(image, code.astype(np.uint8), (1, 1, 0, n))
        inside = binary_erosion(m != 255, iterations=2)
        assert np.abs(m - out[..., channel])[inside].max(initial=0) <= 0.51


BORDERLESS = MOVES | {'border': 'reflect'}


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(24, 64), st.integers(3, 6))
def test_a_reflected_border_ignores_nothing(n, side, channels):
    "No pixel becomes ignored or takes the fill; with the constant border, the same draw may do both"
    image = np.random.default_rng(n).random((side, side, channels), dtype=np.float32)
    mask = (image[..., 0] > 0.5).astype(np.uint8)
    fill, key = [-9.0] * channels, (3, 1, 0, n)
    out, m = Augmenter(Augment(**BORDERLESS), fill)(image, mask, key)
    padded = Augmenter(Augment(**MOVES), fill)(image, mask, key)[1]
    assert set(np.unique(m)) <= {0, 1} and out.min() >= image.min() - 1e-5
    known = padded != 255
    assert (m == padded)[known].all()


def test_shares_of_ignored_pixels():
    "The guide's list makes about a fifth of all pixels ignored; reflection none"

    def shares(border):
        augment = Augmenter(Augment(**MOVES, border=border), [0.0] * 3)
        image, mask = np.zeros((64, 64, 3), np.float32), np.zeros((64, 64), np.uint8)
        return [(augment(image, mask, (0, 1, 0, n))[1] == 255).mean() for n in range(600)]

    assert np.mean(shares('constant')) == pytest.approx(0.19, abs=0.03)
    assert not any(shares('reflect'))


@settings(deadline=None, max_examples=40)
@given(st.floats(0.5, 1.2), st.floats(-180, 180), st.floats(-10, 10), st.floats(-10, 10), st.integers(0, 10**6))
def test_reflection_is_the_librarys(scale, angle, shear_x, shear_y, n):
    "Image and mask against cv2 by the inverse matrix, written out: reflection c b | a b c at every edge"
    import cv2

    rng = np.random.default_rng(n)
    image, mask = rng.random((40, 40, 3), dtype=np.float32), rng.integers(0, 2, (40, 40), dtype=np.uint8)
    drawn = dict(shift_scale_rotate=(0.1, -0.05, scale, angle), affine=(shear_x, shear_y))
    out, m = warp(image, mask, [0.0] * 3, drawn, None, border='reflect')
    # a mirrored mosaic of the tile, moved with a border that it never reaches
    rim = 160
    around = [(rim, rim), (rim, rim)]
    wide, labels = np.pad(image, [*around, (0, 0)], mode='reflect'), np.pad(mask, around, mode='reflect')
    cos, sin = scale * np.cos(np.radians(angle)), scale * np.sin(np.radians(angle))
    turn = np.array([[cos, sin, 4], [-sin, cos, -2], [0, 0, 1]])
    shear = np.array([[1, np.tan(np.radians(shear_x)), 0], [np.tan(np.radians(shear_y)), 1, 0], [0, 0, 1]])
    to_middle = np.array([[1, 0, 19.5], [0, 1, 19.5], [0, 0, 1]])
    back = to_middle @ np.linalg.inv(shear @ turn) @ np.linalg.inv(to_middle)
    back[:2, 2] += rim
    flags = cv2.WARP_INVERSE_MAP
    expected = cv2.warpAffine(wide, back[:2], (40, 40), flags=flags | cv2.INTER_LINEAR)
    np.testing.assert_allclose(out, expected, atol=2e-2)
    same = m == cv2.warpAffine(labels, back[:2], (40, 40), flags=flags | cv2.INTER_NEAREST)
    # a place half way between two pixels may round to either
    assert same.mean() > 0.99


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(3, 10))
def test_every_channel_moves_alike_and_has_its_own_padding(n, channels):
    "Channels go through OpenCV four at a time: each must come out as the first does but for its offset and its fill"
    plane, mask = tile(channels=1)[0], np.zeros((48, 48), np.uint8)
    offset = np.arange(channels, dtype=np.float32)
    out, m = Augmenter(Augment(**MOVES), offset - 7)(plane + offset, mask, (2, 1, 0, n))
    np.testing.assert_allclose(out - offset, np.broadcast_to(out[..., :1], out.shape), atol=2e-5)
    padded = binary_erosion(m == 255, iterations=2, border_value=1)
    np.testing.assert_allclose(out[padded], np.broadcast_to(offset - 7, out[padded].shape), atol=1e-5)


def test_arrays_come_out_new_and_the_layout_in_memory_has_no_part():
    image, mask = tile()
    for key in KEYS:
        a = Augmenter(Augment(), [0.5] * 5)
        out = a(image, mask, key)
        assert not any(np.shares_memory(o, i) for o, i in zip(out, (image, mask)))
        # as a raster is read
        bands_first = np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0)
        for x, y in zip(a(bands_first, np.asfortranarray(mask), key), out):
            np.testing.assert_array_equal(x, y)


@settings(deadline=None, max_examples=150)
@given(
    arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.sampled_from([0, 0, 1, 255])),
    st.sampled_from([0.5, 1, 1.5, 2, 2.9, 3, 5]),
    st.sampled_from(['ignore', 'constant', 'distance']),
)
def test_boundary_by_brute_force(mask, width, kind):
    "Every pair of pixels measured: no distance transform in it"
    kw = (
        dict(boundary_handling='ignore', boundary_ignore_width=width)
        if kind == 'ignore'
        else dict(
            boundary_handling='soft_labels', soft_label_profile=kind, boundary_soft_width=width, soft_label_value=0.1
        )
    )
    places, expected = np.argwhere(mask < 2), mask.astype(np.float32)
    for y, x in places:
        d = min((np.hypot(y - v, x - u) for v, u in places if mask[v, u] != mask[y, x]), default=np.inf)
        if d <= width:
            label = mask[y, x]
            expected[y, x] = dict(ignore=255, constant=abs(label - 0.1), distance=0.5 + (label - 0.5) * d / width)[
                kind
            ]
    np.testing.assert_allclose(boundary(mask, Loss(**kw)), expected, atol=1e-5)

def test_hue_is_off_and_then_changes_no_draw():
    "Draws with hue at any probability agree in all that comes before it"
    for n in range(50):
        key = (0, 1, 0, n)
        off, on = (draw(Augment(hue=dict(p=p)), np.random.default_rng(key)) for p in (0, 1))
        assert 'hue' not in off and abs(on.pop('hue')) <= .05
        assert on == off
