"The toy world can be learnt, and not by colour alone: a small U-Net against gradient boosting on the same pixels"

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import average_precision_score
from torch.nn.functional import binary_cross_entropy_with_logits

from rtsseg.config import ToySource
from rtsseg.manifest import read_manifest
from rtsseg.stats import compute_stats
from rtsseg.tiles import read_tile
from rtsseg.toy import make_toy

@pytest.fixture(scope='module')
def pixels(tmp_path_factory):
    "Normalised RGB tiles (n, 3, 64, 64) and labels (n, 64, 64) of train and of val"
    manifest = read_manifest(
        make_toy(
            ToySource(regions=2, scene_size=1280, tile_size=64, block_size=768.0, prevalence=0.02),
            tmp_path_factory.mktemp('toy') / 'manifest.csv',
        )
    )
    stats = compute_stats(manifest.of('train'))

    def read(split):
        part = manifest.of(split)
        x, _, y = zip(*[read_tile(part, i, stats=stats) for i in range(len(part))])
        return stats.normalise(np.stack(x)).transpose(0, 3, 1, 2).astype(np.float32), np.stack(y)

    return read('train'), read('val')


def ap(score, y):
    return average_precision_score(y[y < 255], score[y < 255])


def boosting(train, val):
    "Average precision of a classifier that sees one pixel at a time"
    (x, y), (xv, yv) = train, val
    rng = np.random.default_rng(0)

    def flat(images):
        return images.transpose(0, 2, 3, 1).reshape(-1, images.shape[1])

    pos, neg = np.flatnonzero(y.ravel() == 1), np.flatnonzero(y.ravel() == 0)
    take = np.r_[pos, rng.choice(neg, 5 * len(pos), replace=False)]
    model = HistGradientBoostingClassifier(max_iter=100, random_state=0).fit(flat(x)[take], y.ravel()[take])
    return ap(model.predict_proba(flat(xv))[:, 1].reshape(yv.shape), yv)


def turned(images, k, flip):
    "Mirrored or not, and turned by k quarters"
    mirrored = images[..., ::-1] if flip else images
    return torch.from_numpy(np.rot90(mirrored, k, (-2, -1)).copy())

def unet(train, val, steps=100, batch=16):
    "Average precision of a small U-Net after 100 steps of plain training"
    (x, y), (xv, yv) = train, val
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    pos, neg = np.flatnonzero((y == 1).any((1, 2))), np.flatnonzero(~(y == 1).any((1, 2)))
    model = smp.Unet(
        'tu-test_resnet', encoder_weights=None, in_channels=x.shape[1], encoder_depth=3, decoder_channels=(32, 32, 16)
    )
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        i = np.r_[rng.choice(pos, batch // 2), rng.choice(neg, batch // 2)]
        k, flip = rng.integers(4), rng.integers(2)
        xb, yb = turned(x[i], k, flip), turned(y[i], k, flip)
        known = (yb < 255).float()
        loss = (
            binary_cross_entropy_with_logits(model(xb)[:, 0], (yb == 1).float(), reduction='none') * known
        ).sum() / known.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
    model.eval()
    with torch.inference_mode():
        return ap(
            np.concatenate([model(torch.from_numpy(xv[i : i + 64]))[:, 0].numpy() for i in range(0, len(xv), 64)]), yv
        )


def test_learnable_but_not_by_colour(pixels):
    train, val = pixels
    chance, colour, learnt = (val[1] == 1).mean(), boosting(train, val), unet(train, val)
    print(f'chance {chance:.3f}, colour {colour:.3f}, U-Net {learnt:.3f}')
    assert learnt > 1.25 * colour
    assert learnt > 15 * chance
