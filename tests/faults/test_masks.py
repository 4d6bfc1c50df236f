"Faults 15 to 18: masks that cannot be meant"
import re

import numpy as np
import pytest

from rtsseg.console import DataError
from rtsseg.manifest import read_manifest
from rtsseg.stats import compute_stats
from rtsseg.tiles import read_tile
from rtsseg.tiles import loaders
from rtsseg.training import train
from helpers.tiles import refused, rewrite, seen, settings, world, wrong

FAULTS = {15: ('mask values that are not 0, 1 and 255; or 0 and 255 alone, which many tools write for yes and no', 'refused, with the values'),
          16: ('a mask whose grid is off by a pixel', 'refused, with the shift'),
          17: ('a tile that counts as positive and has an empty mask', 'refused'),
          18: ('a tile whose whole mask is 255', 'nothing is learnt from it; the check names it and counts it')}

def unread(world, word):
    "The check, the statistics and whoever reads the tile say the same"
    assert any(l.startswith('files: ') and re.search(word, l) for l in wrong(world)), wrong(world)
    m = read_manifest(world/'full.csv')
    with pytest.raises(DataError, match=word): compute_stats(m.of('train'))
    with pytest.raises(DataError, match=word): read_tile(m, 0)

@pytest.mark.parametrize('change,word', [(lambda a: a * 2, 'values 0, 2 of type uint8'), (lambda a: np.where(a, 1, np.arange(32) % 2 * 2), 'values 0, 1, 2 of type uint8'), (lambda a: a * .5, 'values 0, 0.5 of type float32'),
                                         (lambda a: a * 1., 'values 0, 1 of type float32'), (lambda a: a * np.nan, 'values nan of type float32'), (lambda a: a * 254, 'values 0, 254 of type uint8'),
                                         (lambda a: np.where(a, -1, 0), 'values -1, 0 of type int16')])
def test_15_values(world, change, word):
    "0.5 is no label, and 2 no class of ours: the values are named"
    def as_file(a): b = change(a); return b.astype('float32' if b.dtype.kind == 'f' else 'int16' if b.min() < 0 else 'uint8')
    rewrite(world/'t0_m.tif', as_file); unread(world, f"tile 't0', mask 't0_m.tif': {word}: a mask is uint8 and holds 0, 1 and 255")

def test_15_two_bands(world):
    rewrite(world/'t0_m.tif', lambda a: np.concatenate([a, a])); unread(world, "tile 't0', mask 't0_m.tif': a mask has one band, this one has 2")

def test_15_255_for_positive(world):
    "All masks hold 0 and 255: the check says what to do about it, and training refuses"
    for i in range(6): rewrite(world/f't{i}_m.tif', lambda a: a * 255)
    said = wrong(world); assert 'mask values: 0 and 255, never 1 (if 255 means positive, import with classes {0: 0, 255: 1})' in said
    for s in ('train', 'val'): assert any(l.startswith(f'split {s}: 0 of 2 tiles positive') for l in said)
    for use in (loaders, train):
        with pytest.raises(DataError, match="tile 't0', mask 't0_m.tif': n_positive is 36, and no pixel of it that counts is 1"): use(settings(world))

def test_15_16_17_through_the_check(world):
    "All in one answer, with exit code 2, and nothing is written"
    rewrite(world/'t0_m.tif', lambda a: a * 2); rewrite(world/'t1_m.tif', shift=(1, 0)); rewrite(world/'t2_m.tif', lambda a: a * 0); rewrite(world/'t3_m.tif', lambda a: a * np.float32(.5))
    said = refused('rtsseg-check', world)
    for word in ("tile 't0', mask 't0_m.tif': values 0, 2", "tile 't1', mask 't1_m.tif': the mask is shifted", "tile 't2', mask 't2_m.tif': n_positive is 36", "tile 't3', mask 't3_m.tif': values 0, 0.5"): assert word in said

@pytest.mark.parametrize('shift', [(1, 0), (0, -1), (.5, .5), (.02, 0)])
def test_16_a_mask_off_by_a_pixel(world, shift):
    "To a fiftieth of a pixel"
    rewrite(world/'t0_m.tif', shift=shift); unread(world, r"tile 't0', mask 't0_m.tif': the mask is shifted against its image by \({:.2f}, {:.2f}\) pixels".format(*shift))

def test_16_a_mask_off_by_a_pixel_without_crs(world):
    "Where neither file has a CRS, but both say where they lie"
    rewrite(world/'t0.tif', crs=None); rewrite(world/'t0_m.tif', crs=None, shift=(1, 0)); unread(world, r"the mask is shifted against its image by \(1.00, 0.00\) pixels")

def test_16_a_mask_of_another_size(world):
    rewrite(world/'t0_m.tif', lambda a: a[:, :-1]); unread(world, "tile 't0', mask 't0_m.tif': the mask has 32 × 31 pixels, its image 32 × 32")

@pytest.mark.parametrize('value', [0, 255])
def test_17_a_positive_tile_with_an_empty_mask(world, value):
    "By the manifest it holds slumps, by its mask none (or none that counts)"
    rewrite(world/'t0_m.tif', lambda a: a * 0 + value); word = "tile 't0', mask 't0_m.tif': n_positive is 36, and no pixel of it that counts is 1"
    assert f'positive without positives: {word}' in wrong(world)
    for use in (loaders, train):
        with pytest.raises(DataError, match=word): use(settings(world))

def test_17_another_count_is_a_warning(world):
    rewrite(world/'t0_m.tif', lambda a: np.roll(a, 1, 2) | a); found = seen(world)['n_positive']
    assert found.level == 'warning' and found.value == "tile 't0': 36 in the manifest, 42 in the mask"

def test_18_a_whole_mask_at_255(world):
    "The check counts it among the notes, and a run ends as any other"
    rewrite(world/'t1_m.tif', lambda a: a * 0 + 255); t = (world/'full.csv').read_text().replace(',36,', ',0,', 2).replace(',0,', ',36,', 1); (world/'full.csv').write_text(t)
    m = read_manifest(world/'full.csv'); assert m.table.n_positive.tolist() == [36, 0, 36, 36, 36, 36]
    found = seen(world); assert not wrong(world) and found['wholly ignored'].level == 'note' and "tile 't1', image 't1.tif'" in found['wholly ignored'].value and 'in 1 tiles' in found['wholly ignored'].note
    folder = train(settings(world)); assert (folder/'model'/'model.safetensors').exists()
