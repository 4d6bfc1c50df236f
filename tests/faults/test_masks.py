"Faults 15 to 18: wrong masks"
import re

import numpy as np
import pytest

from helpers.tiles import errors, findings, refused, rewrite, settings
from rtsseg.console import DataError
from rtsseg.manifest import read_manifest
from rtsseg.stats import compute_stats
from rtsseg.tiles import loaders, read_tile
from rtsseg.training import train

FAULTS = {15: ('mask values that are not 0, 1 and 255; or 0 and 255 alone, which many tools write for yes and no',
               'refused, with the values'),
          16: ('a mask whose grid is off by a pixel', 'refused, with the shift'),
          17: ('a tile that counts as positive and has an empty mask', 'refused'),
          18: ('a tile whose whole mask is 255', 'nothing is learnt from it; the check names it and counts it')}

EMPTY = "tile 't0', mask 't0_m.tif': n_positive is 36, and no pixel of it that counts is 1"

def check_unreadable(world, message):
    "The check, the statistics and the reading of the tile say the same"
    assert any(line.startswith('files: ') and re.search(message, line) for line in errors(world)), errors(world)
    manifest = read_manifest(world/'full.csv')
    with pytest.raises(DataError, match=message):
        compute_stats(manifest.of('train'))
    with pytest.raises(DataError, match=message):
        read_tile(manifest, 0)

def check_refused_in_python(world, message):
    "Loaders and training refuse the data"
    for use in (loaders, train):
        with pytest.raises(DataError, match=message):
            use(settings(world))

COLUMN = np.arange(32)
VALUES = {'values 0, 2 of type uint8': lambda mask: mask * 2,
          'values 0, 1, 2 of type uint8': lambda mask: np.where(mask, 1, COLUMN % 2 * 2).astype('uint8'),
          'values 0, 254 of type uint8': lambda mask: mask * 254,
          'values -1, 0 of type int16': lambda mask: -mask.astype('int16'),
          'values 0, 0.5 of type float32': lambda mask: (mask * .5).astype('float32'),
          'values 0, 1 of type float32': lambda mask: mask.astype('float32'),
          'values nan of type float32': lambda mask: np.full(mask.shape, np.nan, 'float32')}

@pytest.mark.parametrize('values', VALUES)
def test_15_values(world, values):
    "0.5 and 2 are not classes: the values are named"
    rewrite(world/'t0_m.tif', VALUES[values])
    check_unreadable(world, f"tile 't0', mask 't0_m.tif': {values}: a mask is uint8 and holds 0, 1 and 255")

def test_15_two_bands(world):
    rewrite(world/'t0_m.tif', lambda mask: np.concatenate([mask, mask]))
    check_unreadable(world, "tile 't0', mask 't0_m.tif': a mask has one band, this one has 2")

def test_15_255_for_positive(world):
    "All masks hold 0 and 255: the check says what to do about it, and training refuses"
    for i in range(6):
        rewrite(world/f't{i}_m.tif', lambda mask: mask * 255)
    found = errors(world)
    assert ('mask values: 0 and 255, never 1 (if 255 means positive, import with classes {0: 0, 255: 1})') in found
    for split in ('train', 'val'):
        assert any(line.startswith(f'split {split}: 0 of 2 tiles positive') for line in found)
    check_refused_in_python(world, EMPTY)

def test_15_16_17_through_the_check(world):
    "All in one answer, with exit code 2, and nothing is written"
    rewrite(world/'t0_m.tif', lambda mask: mask * 2)
    rewrite(world/'t1_m.tif', shift=(1, 0))
    rewrite(world/'t2_m.tif', lambda mask: mask * 0)
    rewrite(world/'t3_m.tif', lambda mask: mask * np.float32(.5))
    printed = refused('rtsseg-check', world)
    for message in ("tile 't0', mask 't0_m.tif': values 0, 2", "tile 't1', mask 't1_m.tif': the mask is shifted",
                    "tile 't2', mask 't2_m.tif': n_positive is 36", "tile 't3', mask 't3_m.tif': values 0, 0.5"):
        assert message in printed

@pytest.mark.parametrize('shift', [(1, 0), (0, -1), (.5, .5), (.02, 0)])
def test_16_a_mask_off_by_a_pixel(world, shift):
    "Down to a fiftieth of a pixel"
    rewrite(world/'t0_m.tif', shift=shift)
    x, y = shift
    check_unreadable(world, "tile 't0', mask 't0_m.tif': the mask is shifted against its image by "
                            rf'\({x:.2f}, {y:.2f}\) pixels')

def test_16_a_mask_off_by_a_pixel_without_crs(world):
    "Neither file has a CRS, but both say where they lie"
    rewrite(world/'t0.tif', crs=None)
    rewrite(world/'t0_m.tif', crs=None, shift=(1, 0))
    check_unreadable(world, r'the mask is shifted against its image by \(1.00, 0.00\) pixels')

def test_16_loaders_compare_places_themselves(world):
    "Where no check has read the tiles, as in a script of one's own"
    rewrite(world/'t2_m.tif', shift=(1, 0))
    feed = loaders(settings(world))
    assert sum(len(batch['tile']) for batch in feed.val) == 2
    problem, = feed.val.dataset.lost()
    assert "mask 't2_m.tif': the mask is shifted against its image" in problem

def test_16_a_mask_of_another_size(world):
    rewrite(world/'t0_m.tif', lambda mask: mask[:, :-1])
    check_unreadable(world, "tile 't0', mask 't0_m.tif': the mask has 32 × 31 pixels, its image 32 × 32")

@pytest.mark.parametrize('value', [0, 255])
def test_17_a_positive_tile_with_an_empty_mask(world, value):
    "Positive by the manifest, and no positive pixel that counts in the mask"
    rewrite(world/'t0_m.tif', lambda mask: mask * 0 + value)
    assert f'positive without positives: {EMPTY}' in errors(world)
    check_refused_in_python(world, EMPTY)

def test_17_another_count_is_a_warning(world):
    rewrite(world/'t0_m.tif', lambda mask: np.roll(mask, 1, 2) | mask)
    found = findings(world)['n_positive']
    assert found.level == 'warning' and found.value == "tile 't0': 36 in the manifest, 42 in the mask"

def test_18_a_whole_mask_at_255(world):
    "The check counts it among the notes, and a run ends as any other"
    rewrite(world/'t1_m.tif', lambda mask: mask * 0 + 255)
    text = (world/'full.csv').read_text()
    first, second, rest = text.split(',36,', 2)
    (world/'full.csv').write_text(f'{first},36,{second},0,{rest}')
    assert read_manifest(world/'full.csv').table.n_positive.tolist() == [36, 0, 36, 36, 36, 36]
    assert not errors(world)
    found = findings(world)['wholly ignored']
    assert found.level == 'note' and "tile 't1', image 't1.tif'" in found.value and 'in 1 tiles' in found.note
    folder = train(settings(world))
    assert (folder/'model'/'model.safetensors').exists()
