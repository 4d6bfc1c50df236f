"""Patches of two time series per second of CPU time, from zarr stores to tensors

    python benchmarks/series.py [rounds]

CPU time of one process, patches of 64² from tiles of 256² with nine variables of 13 to 22 dates and an elevation. A
round is eight patches of each side. Both end with the same: scaled, padded float32 tensors, fill at 0, masks and a
target; ours also moves, mirrors and turns. The peer slices plainly: its arrays stay open, and of each it reads the
whole tile, as a data set of whole tiles does, or the part of the patch. Ours keeps tiles within its budget, which are
read once before the rounds that count; with a budget of 0 it reads chunks each time, like the peer.
"""
import sys
import time
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import zarr

from common import emit, per_item, turns
from rtsseg.season import SeasonWorld, make_season
from rtsseg.series_feed import SeriesAugment, SeriesData, SeriesPatches, SeriesReader
from rtsseg.series_stats import series_stats, survey_tiles

PATCHES = 8

class Plain:
    "Slices of open zarr arrays"

    def __init__(self, tiles, stats, data, is_whole):
        self.stats, self.data, self.is_whole = stats, data, is_whole
        self.arrays = {}
        for tile in tiles:
            folder = data.folders[tile.split]
            for name in [*data.s1, *data.s2, *data.static, 'label']:
                self.arrays[tile.name, name] = zarr.open(folder/f'{tile.name}_{name}.zarr', mode='r')

    def cut(self, tile, name, top, left):
        rows, columns = slice(top, top + self.data.patch), slice(left, left + self.data.patch)
        array = self.arrays[tile, name]
        return array[:][..., rows, columns] if self.is_whole else array[..., rows, columns]

    def scaled(self, tile, name, top, left):
        values = self.cut(tile, name, top, left)
        known = values != self.data.nodata
        mean, std = self.stats.of(name)
        return np.where(known, (values - mean) / std, 0).astype(np.float32), known

    def patch(self, tile, top, left):
        sample = {}
        for number, names in enumerate((self.data.s1, self.data.s2), 1):
            pairs = [self.scaled(tile, name, top, left) for name in names]
            values, known = (np.stack(arrays) for arrays in zip(*pairs))
            more = self.stats.longest[number - 1] - values.shape[1]
            sample[f's{number}'] = torch.from_numpy(np.pad(values, ((0, 0), (0, more), (0, 0), (0, 0))))
            sample[f'valid{number}'] = torch.from_numpy(np.pad(known.any(0), ((0, more), (0, 0), (0, 0))))
        static = np.stack([self.scaled(tile, name, top, left)[0] for name in self.data.static])
        target = torch.from_numpy(self.cut(tile, 'label', top, left).astype(np.int64))
        return sample | dict(static=torch.from_numpy(static), target=target)

class Case:
    "Both sides on the same patches"

    def __init__(self, data, budget_mb, is_whole):
        tiles = data.tiles()
        self.stats = series_stats(tiles, survey_tiles(tiles))
        self.reader = SeriesReader(tiles, self.stats, budget_mb)
        self.patches = SeriesPatches(self.reader, 'train', data, SeriesAugment())
        self.as_they_lie = SeriesPatches(self.reader, 'train', data, SeriesAugment(enabled=False))
        self.plain, self.numbers = Plain(tiles, self.stats, data, is_whole), {True: count(), False: count()}
        self.order = np.random.default_rng(0).permutation(len(self.patches)).tolist()

    def rows(self, is_ours):
        first = next(self.numbers[is_ours]) * PATCHES
        return [self.order[number % len(self.order)] for number in range(first, first + PATCHES)]

    def ours(self):
        for row in self.rows(True):
            self.patches[(42, 1, row, 0)]

    def peer(self):
        for row in self.rows(False):
            number, top, left = self.patches.places[row]
            self.plain.patch(self.reader.tiles[number].name, top, left)

    def check(self):
        "Both sides make the same of a patch"
        number, top, left = self.patches.places[1]
        peer = self.plain.patch(self.reader.tiles[number].name, top, left)
        ours = self.as_they_lie[1]
        for name, values in peer.items():
            assert torch.allclose(values.float(), ours[name].float(), atol=1e-5), name

def main(rounds=30):
    with TemporaryDirectory() as folder:
        root = make_season(Path(folder)/'season', SeasonWorld(side=256, train=4, val=1, test=1))
        data = SeriesData(base_train_path=root/'train', base_val_path=root/'val', base_test_path=root/'test', patch=64)
        for what, budget_mb, is_whole, goal in (
                ('tiles in the budget, beside whole tiles', 4096, True, 1/2),
                ('tiles in the budget, beside slices of the patch', 4096, False, 1/2),
                ('no budget, beside whole tiles', 0, True, 1/2),
                ('no budget, beside slices of the patch', 0, False, None)):
            case = Case(data, budget_mb, is_whole)
            case.check()
            # what is kept is read in the rounds that do not count
            for row in range(len(case.patches)):
                case.patches[row]
            ours, peer = per_item(turns(case.ours, case.peer, rounds, clock=time.process_time), PATCHES)
            rates = [round(1/np.median(seconds)) for seconds in (ours, peer)]
            emit(f'patches of 64²: {what}', ours, peer, goal=goal, patches_a_second=rates, threads=1)

if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
