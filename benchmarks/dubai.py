"""Buildings on real aerial images: this library beside a plain recipe, in equal time, and a boosting on pixel colours as the floor.

    python benchmarks/dubai.py [--seconds 300] [--seeds 42 43 44]

All three see the same images at half resolution and are judged on the same validation tiles by native average precision
(scikit-learn's, over every labelled pixel). The plain recipe: U-Net with resnet18 from random weights, BCE, AdamW 1e-3, 128² crops of
which half hold a building, flips. Ours: configs/dubai_building.yaml, its epochs chosen so that it takes about as many seconds; then the plain
recipe gets exactly the seconds that ours took, validation included. Ours is judged at its last epoch too, since the exported one was
chosen on these tiles. Needs shared/data/dubai_landcover beside the project.
"""
import argparse, json, statistics, time
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2, numpy as np, torch
import segmentation_models_pytorch as smp
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import average_precision_score

from rtsseg.config import load
from rtsseg.tiles import read_tile
from rtsseg.infer import load_model
from rtsseg.prepare import prepare
from rtsseg.tiles import eval_loader
from rtsseg.runs import read_log
from rtsseg.training import train

ROOT = Path(__file__).parents[1]
SOURCE = ROOT.parent/'shared'/'data'/'dubai_landcover'

def half_resolution():
    "Training images and building masks at half resolution, whole"
    import pandas as pd
    for tile in pd.read_csv(SOURCE/'manifest.csv').query('split == "train"').tile_id:
        image = cv2.cvtColor(cv2.imread(str(SOURCE/'images'/f'{tile}.jpg')), cv2.COLOR_BGR2RGB)
        mask = cv2.imread(str(SOURCE/'masks'/f'{tile}.png'), cv2.IMREAD_GRAYSCALE)
        h, w = (n // 2 for n in mask.shape)
        yield cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA), cv2.resize(np.where(mask == 255, 255, mask == 0).astype(np.uint8), (w, h), interpolation=cv2.INTER_NEAREST)

def judge(score, part):
    "Native average precision over the labelled pixels of a split"
    truth = np.concatenate([read_tile(part, i)[2].ravel() for i in range(len(part))])
    return float(average_precision_score(truth[truth != 255], np.concatenate([score(i).ravel() for i in range(len(part))])[truth != 255]))

def plain(images, part, seconds, seed):
    "The plain recipe, for so many seconds of training"
    rng = np.random.default_rng(seed); torch.manual_seed(seed)
    model = smp.Unet('resnet18', encoder_weights=None, classes=1); optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    places = [(k, np.argwhere(m == 1)) for k, (_, m) in enumerate(images)]; holding = [p for p in places if len(p[1])]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])      # ImageNet's, as such recipes take them
    def scaled(image): return torch.from_numpy(((image / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32))
    def crop(positive):
        k, where = holding[rng.integers(len(holding))] if positive else places[rng.integers(len(places))]
        image, mask = images[k]; h, w = mask.shape
        y, x = where[rng.integers(len(where))] - rng.integers(0, 128, 2) if positive else (rng.integers(0, h - 127), rng.integers(0, w - 127))
        y, x = np.clip(y, 0, h - 128), np.clip(x, 0, w - 128); a, b = image[y:y + 128, x:x + 128], mask[y:y + 128, x:x + 128]
        for axis in (0, 1):
            if rng.random() < 0.5: a, b = np.flip(a, axis), np.flip(b, axis)
        return a, b
    began, steps = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        a, b = zip(*[crop(i % 2 == 0) for i in range(16)])
        z, y = model(scaled(np.stack(a)))[:, 0], torch.from_numpy(np.stack(b).astype(np.float32)); valid = (y != 255).float()
        loss = (torch.nn.functional.binary_cross_entropy_with_logits(z, y * valid, reduction='none') * valid).sum() / valid.sum()
        optimizer.zero_grad(); loss.backward(); optimizer.step(); steps += 1
    model.eval()
    with torch.inference_mode(): return judge(lambda i: model(scaled(read_tile(part, i)[0][None]))[0, 0].numpy(), part), steps

def ours(cfg, folder):
    "This library: seconds of training and validation, the average precision of the exported model and of the last epoch, and the steps"
    began = time.monotonic(); run_folder = train(cfg); seconds = time.monotonic() - began
    model = load_model(run_folder/'model'); part = prepare(cfg).of('val')
    with torch.inference_mode(): z = torch.cat([model.model(b['image'])[:, 0] for b in eval_loader(part, model.stats, cfg)]).numpy()
    rows = read_log(run_folder)
    return seconds, judge(lambda i: z[i], part), rows[-1]['val/pr_auc@native'], sum(r['batches'] for r in rows)

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seconds', type=float, default=300, help='training time of each run')
    parser.add_argument('--seeds', type=int, nargs='+', default=[42, 43, 44])
    parser.add_argument('--overrides', nargs='*', default=[], help='of configs/dubai_building.yaml')
    args = parser.parse_args()
    if not SOURCE.exists(): raise SystemExit(f'{SOURCE.name} is not beside the project')
    with TemporaryDirectory() as tmp:
        cfg = load(ROOT/'configs'/'dubai_building.yaml', overrides=args.overrides, runs=f'{tmp}/runs', tracker=dict(kind='none'))
        part, images = prepare(cfg).of('val'), list(half_resolution())
        rng = np.random.default_rng(0)
        def sample(image, mask): k = rng.choice(mask.size, 20_000); return image.reshape(-1, 3)[k], mask.ravel()[k]
        x, y = map(np.concatenate, zip(*[sample(*pair) for pair in images]))
        boost = HistGradientBoostingClassifier(random_state=0).fit(x[y != 255], y[y != 255])
        floor = judge(lambda i: boost.predict_proba(read_tile(part, i)[0].reshape(-1, 3))[:, 1], part)
        print(json.dumps(dict(what='boosting on pixel colours', ap=round(floor, 4))), flush=True)
        # one short run tells what an epoch costs
        began = time.monotonic(); train(cfg.model_copy(update=dict(epochs=1, name='probe'))); cost = time.monotonic() - began
        epochs, found = max(2, round(args.seconds / cost)), {'ours': [], 'plain': []}
        for seed in args.seeds:
            seconds, exported, ap, steps = ours(cfg.model_copy(update=dict(seed=seed, epochs=epochs)), tmp)
            base, base_steps = plain(images, part, seconds, seed)
            found['ours'].append(ap); found['plain'].append(base)
            print(json.dumps(dict(what='dubai_building', seed=seed, seconds=round(seconds), epochs=epochs, ours=round(ap, 4), exported=round(exported, 4), ours_steps=steps, plain=round(base, 4), plain_steps=base_steps)), flush=True)
        median = {k: statistics.median(v) for k, v in found.items()}; spread = statistics.stdev(found['plain']) if len(args.seeds) > 1 else 0.
        print(json.dumps(dict(what='median', **{k: round(v, 4) for k, v in median.items()}, plain_seed_std=round(spread, 4), goal='ours >= plain - plain_seed_std', met=median['ours'] >= median['plain'] - spread)))

if __name__ == '__main__': main()
