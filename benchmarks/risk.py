"""The five risk models of guide 004 on made-up mammograms, beside the one that sees the current exam alone

    python benchmarks/risk.py [epochs] [seeds] [model …]

configs/survival/toy.yaml with a small encoder from random weights, one process on one core. The best epoch is chosen on
validation, so the C-index of the test split stands beside it, as do the truth of the made-up world and the CPU seconds.
"""
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch

from common import emit_value
from rtsseg.config import find_system, load
from rtsseg.evaluation import evaluate
from rtsseg.phantom import make_phantom_world
from rtsseg.risk_models import ALIGNED_BY_IMAGES, RISK_MODELS
from rtsseg.survival_metrics import concordance
from rtsseg.training import train

CONFIGS = Path(__file__).resolve().parent.parent/'configs'/'survival'
# what each has to reach on validation
GOAL = .7

def config(name, world, runs, **more):
    "A config of survival on a world that was made"
    cfg = load(CONFIGS/f'{name}.yaml')
    data = dict(csv_file=world/'exams.csv', data_root=world, made=None, **more.pop('data', {}))
    return load(CONFIGS/f'{name}.yaml', runs=runs, tracker=dict(kind='none'), data=data, **dict(seed=cfg.seed) | more)

def trained_registration(world, runs):
    "The model directory of MammoRegNet on the same exams, and how alike pairs are before and after"
    folder = train(config('registration_toy', world, runs))
    system = find_system('registration')
    numbers = system.metrics(system.read_table(evaluate(folder, 'val')), load(folder/'config.yaml'))
    emit_value('MammoRegNet: local correlation of pairs', round(numbers['ncc'], 3), round(numbers['ncc_before'], 3))
    return folder/'model'

def truth_of(world, cfg):
    "C-index of the hazard that the outcomes of the validation split were drawn from"
    exams = cfg.data.read()
    labels, split = exams.labels(cfg.data.years), exams.table.split.to_numpy()
    truth = pd.read_csv(world/'truth.csv').set_index('exam_id').log_hazard[exams.table.exam_id].to_numpy()
    rows = [row for row in exams.samples(cfg.data.years) if split[row] == 'val']
    return concordance(labels.time[rows], labels.event[rows], truth[rows])

def run(name, seed, epochs, world, runs, paths):
    "C-index of a model on validation and test, and its CPU seconds"
    start = time.process_time()
    model = dict(name=name, encoder='test_byobnet', num_heads=4, grid=2, max_t=8)
    cfg = config('toy', world, runs, data=dict(priors=int(name != 'Mirai')), seed=seed, epochs=epochs, model=model,
                 paths=paths)
    folder, system = train(cfg), find_system('survival')
    seconds = time.process_time() - start
    tables = [system.read_table(evaluate(folder, split)) for split in ('val', 'test')]
    return [system.metrics(table, cfg)['c_index'] for table in tables], seconds

def main(epochs, seeds, names):
    "Train and print"
    torch.set_num_threads(1)
    with TemporaryDirectory() as top:
        world, runs = Path(top)/'world', Path(top)/'runs'
        cfg = load(CONFIGS/'toy.yaml')
        make_phantom_world(world, cfg.data.made)
        emit_value('the truth of the made-up world', round(truth_of(world, config('toy', world, runs)), 3))
        paths, alone = {}, {}
        for name in names:
            if name in ALIGNED_BY_IMAGES and not paths:
                paths = dict(embed_path_saved_reg_model=trained_registration(world, runs))
            for seed in range(seeds):
                # a ledger of the test split for each model: they are compared, not chosen
                (val, test), seconds = run(name, seed, epochs, world, runs/name, paths)
                alone.setdefault(seed, val if name == 'Mirai' else None)
                peer = alone[seed] if name != 'Mirai' else None
                emit_value(f'{name}: C-index of validation, beside Mirai', round(val, 3), peer and round(peer, 3),
                           seed=seed, test=round(test, 3), epochs=epochs, cpu_seconds=round(seconds),
                           goal=f'> {GOAL}' + (', above Mirai' if peer else ''),
                           met=bool(val > max(GOAL, peer or 0)))

if __name__ == '__main__':
    given = sys.argv[1:]
    chosen = given[2:] or list(RISK_MODELS)
    main(int(given[0]) if given else load(CONFIGS/'toy.yaml').epochs, int(given[1]) if len(given) > 1 else 1, chosen)
