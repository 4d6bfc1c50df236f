"Augment: one key, one draw, in any process; masks on their images; and the boundary band by brute force"

import hashlib
import subprocess
import sys

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import binary_erosion
from torch.utils.data import DataLoader, Dataset

from rtsseg.augment import Augmenter, boundary
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
