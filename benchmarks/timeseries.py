"""Classes of the made-up season: the library's model, MONAI's UNet on stacked time, and less than all of the season

    python benchmarks/timeseries.py [--seeds 42 43 44] [--epochs 40] [--kinds ours monai one_date radar camera]

All sides train from configs/timeseries/toy.yaml on the same patches, with the same loss and rates. MONAI's UNet (2-D,
all dates of both streams as channels) has about as many parameters, and as many epochs as take the same CPU seconds,
which a first epoch measures. `one_date` sees the clearest optical date of each patch and the radar date next to it;
`radar` and `camera` see one stream. Nobody stops early; for all kinds alike the best mIoU of any epoch counts, over
whole validation tiles. Seeds vary weights and draws; the season stays. MONAI comes with
pip install --no-deps monai==1.6.1
"""
import argparse
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.nn.functional import pad

from common import emit_value, short
from rtsseg.config import find_system, load
from rtsseg.runs import read_log
from rtsseg.season import make_season
from rtsseg.series_models import DualUNet3D
from rtsseg.training import train

TOY = Path(__file__).resolve().parent.parent/'configs'/'timeseries'/'toy.yaml'
KINDS = ['ours', 'monai', 'one_date', 'radar', 'camera']
# as in the toy
SIZE = dict(depth=2, filters=8, dropout=0.)

class StackedUNet(nn.Module):
    "MONAI's UNet on all dates of both streams as channels"
    def __init__(self, s1, s2, static, classes, times, width):
        super().__init__()
        from monai.networks.nets import UNet
        self.times = times
        channels = (s1 + 1) * times[0] + (s2 + 1) * times[1] + static
        self.net = UNet(2, channels, classes, (width, 2 * width), (2,), num_res_units=2, norm='batch')

    def forward(self, s1, s2, static, present1, present2, valid1, valid2, day1, day2):
        planes = [static]
        for s, valid, steps in ((s1, valid1, self.times[0]), (s2, valid2, self.times[1])):
            film = torch.cat([s, valid[:, None].float()], 1)
            planes.append(pad(film, (0, 0, 0, 0, 0, steps - film.shape[2])).flatten(1, 2))
        return self.net(torch.cat(planes, 1))

def at(dates, *tensors):
    "One date of each sample: of (N, T) and (N, C, T, …) or (N, T, …)"
    rows, found = torch.arange(len(dates)), []
    for tensor, axis in tensors:
        picked = tensor.movedim(axis, 1)[rows, dates][:, None]
        found.append(picked.movedim(1, axis))
    return found

class OneDate(DualUNet3D):
    "The library's model on the clearest optical date of a patch, and on the radar date next to it"
    def forward(self, s1, s2, static, present1, present2, valid1, valid2, day1, day2):
        second = valid2.flatten(2).float().mean(2).argmax(1)
        day = day2.gather(1, second[:, None])
        first = (day1 - day).abs().masked_fill(~present1, torch.inf).argmin(1)
        s1, valid1, day1, present1 = at(first, (s1, 2), (valid1, 1), (day1, 1), (present1, 1))
        s2, valid2, day2, present2 = at(second, (s2, 2), (valid2, 1), (day2, 1), (present2, 1))
        return super().forward(s1, s2, static, present1, present2, valid1, valid2, day1, day2)

class Radar(DualUNet3D):
    "The library's model without the optical stream"
    def __init__(self, s1, s2, static, classes, **size):
        super().__init__(s1, 0, static, classes, **size)

class Camera(DualUNet3D):
    "The library's model without the radar"
    def __init__(self, s1, s2, static, classes, **size):
        super().__init__(0, s2, static, classes, **size)

def parameters(model):
    return sum(p.numel() for p in model.parameters())

def monai_options(cfg, feed):
    "Dates, and the width with which it has about as many parameters as ours"
    times, wanted = feed.stats.longest, parameters(find_system('timeseries').model(cfg, feed))
    sizes = {width: parameters(StackedUNet(*cfg.channels, len(cfg.data.class_names), times, width))
             for width in range(4, 80, 2)}
    return dict(times=times, width=min(sizes, key=lambda width: abs(sizes[width] - wanted)))

def trained(cfg):
    "The row of the best validation by mIoU, parameters, and CPU seconds of training"
    began = time.process_time()
    folder = train(cfg)
    seconds = time.process_time() - began
    best = max((row for row in read_log(folder) if 'val/miou' in row), key=lambda row: row['val/miou'])
    size = parameters(find_system('timeseries').unpack(folder/'model').model)
    shutil.rmtree(folder)
    return best, size, seconds

def side_of(kind, config, feed, seconds):
    "What a kind reaches; MONAI's in so many CPU seconds"
    names = dict(one_date='OneDate', radar='Radar', camera='Camera')
    if kind == 'ours':
        return trained(config())
    if kind != 'monai':
        return trained(config(model=dict(name=f'timeseries:{names[kind]}', options=SIZE)))
    model = dict(name='timeseries:StackedUNet', options=monai_options(config(), feed))
    _, _, first = trained(config(model=model, epochs=1))
    return trained(config(model=model, epochs=max(round(seconds / first), 1)))

def settings_of(home, seed, epochs, **more):
    "The toy's config on the season in a folder"
    paths = {f'base_{split}_path': home/'season'/split for split in ('train', 'val', 'test')}
    fixed = dict(runs=home/'runs', seed=seed, epochs=epochs, tracker=dict(kind='none'), data=paths | dict(made=None),
                 early_stopping=dict(patience=None))
    return load(TOY, **fixed | more)

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--seeds', type=int, nargs='+', default=[42, 43, 44])
    parser.add_argument('--epochs', type=int, default=load(TOY).epochs)
    parser.add_argument('--kinds', nargs='+', choices=KINDS, default=KINDS)
    parser.add_argument('--seconds', type=float, help="CPU seconds of MONAI's side, where ours is not among the kinds")
    given = parser.parse_args()
    # where models of these kinds are found by their path
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    with TemporaryDirectory() as home:
        make_season(f'{home}/season', load(TOY).data.made)
        for seed in given.seeds:
            config = partial(settings_of, Path(home), seed, given.epochs)
            feed, found = find_system('timeseries').feed(config()), {}
            for kind in given.kinds:
                seconds = found['ours'][2] if 'ours' in found else given.seconds
                best, size, seconds = found[kind] = side_of(kind, config, feed, seconds)
                emit_value(f'made-up season, validation tiles: mIoU of {kind}', short(best['val/miou']), seed=seed,
                           accuracy=short(best['val/accuracy']), loss=short(best['val/loss']), parameters=size,
                           epochs=best['epoch'], cpu_seconds=short(seconds))
            if {'ours', 'monai'} <= set(found):
                ours, peer = (found[kind][0]['val/miou'] for kind in ('ours', 'monai'))
                emit_value('made-up season, validation tiles: mIoU, equal parameters and CPU seconds', short(ours),
                           short(peer), seed=seed, goal='≥ peer', met=bool(ours >= peer))

if __name__ == '__main__':
    main()
