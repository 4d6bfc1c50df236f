"""The five risk models of guide 004 on made-up mammograms, beside the one that sees the current exam alone

    python benchmarks/risk.py [model …] [--epochs 16] [--seeds 0] [--folder FOLDER]

configs/survival/toy.yaml with a small encoder from random weights, one process on one core. The best epoch is chosen on
validation, so the C-index of the test split stands beside it, as do the truth of the made-up world and the CPU seconds.
Each model and seed is a cell: a line of risk.jsonl. A cell that is there is not run again, unless a config or the
made-up world has changed since; the rows are made from all cells. A folder that is named keeps the images and
the runs, and several processes may fill cells in it.
"""
import argparse
import hashlib
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch

import rtsseg.phantom
from common import emit_value, machine
from rtsseg.config import find_system, load
from rtsseg.evaluation import evaluate
from rtsseg.phantom import make_phantom_world
from rtsseg.risk_models import ALIGNED_BY_IMAGES, RISK_MODELS
from rtsseg.runs import environment
from rtsseg.survival_metrics import concordance
from rtsseg.training import train

HERE = Path(__file__).resolve().parent
CONFIGS, RESULTS = HERE.parent/'configs'/'survival', HERE/'risk.jsonl'
# what each has to reach on validation; and the patients whose exams are registered
GOAL, PAIR_PATIENTS = .7, 160

def settings():
    "Digest of what decides a cell: both configs and the code of the made-up world"
    files = CONFIGS/'toy.yaml', CONFIGS/'registration_toy.yaml', Path(rtsseg.phantom.__file__)
    return hashlib.sha256(b''.join(path.read_bytes() for path in files)).hexdigest()[:8]

def cells():
    "The cells of these settings: {(model, seed, epochs): line}"
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    return {(line['model'], line['seed'], line['epochs']): line for line in lines if line['settings'] == settings()}

def keep(model, seed, epochs, **numbers):
    "Append a cell"
    about = dict(rtsseg=environment()['rtsseg'], machine=machine())
    line = dict(model=model, seed=seed, epochs=epochs, settings=settings(), **numbers, **about)
    with open(RESULTS, 'a') as file:
        file.write(json.dumps(line) + '\n')

class World:
    "The made-up mammograms, and where runs on them lie"

    def __init__(self, top):
        self.folder, self.pairs, self.runs = (Path(top)/name for name in ('world', 'pairs', 'runs'))
        self.made = load(CONFIGS/'toy.yaml').data.made
        if not (self.folder/'exams.csv').exists():
            make_phantom_world(self.folder, self.made)

    def config(self, name, runs, data=None, folder=None, **more):
        "A config of survival on this world"
        folder = folder or self.folder
        data = dict(csv_file=folder/'exams.csv', data_root=folder, made=None) | (data or {})
        return load(CONFIGS/f'{name}.yaml', runs=runs, tracker=dict(kind='none'), data=data, **more)

    def truth(self):
        "C-index of the hazard that the outcomes of the validation split were drawn from"
        data = self.config('toy', self.runs).data
        exams = data.read()
        labels, split = exams.labels(data.years), exams.table.split.to_numpy()
        truth = pd.read_csv(self.folder/'truth.csv').set_index('exam_id').log_hazard
        risk = truth[exams.table.exam_id].to_numpy()
        rows = [row for row in exams.samples(data.years) if split[row] == 'val']
        return concordance(labels.time[rows], labels.event[rows], risk[rows])

    def registration(self):
        "The model directory of MammoRegNet on the other exams, trained once, and its numbers"
        # it needs no outcomes, and few patients
        others = self.made.model_copy(update=dict(patients=PAIR_PATIENTS, seed=self.made.seed + 1))
        if not (self.pairs/'exams.csv').exists():
            make_phantom_world(self.pairs, others)
        system, start = find_system('registration'), time.process_time()
        folder = train(self.config('registration_toy', self.runs, folder=self.pairs))
        seconds = time.process_time() - start
        numbers = system.metrics(system.read_table(evaluate(folder, 'val')), load(folder/'config.yaml'))
        return folder/'model', dict(val=numbers['ncc'], before=numbers['ncc_before'], seconds=round(seconds))

    def run(self, name, seed, epochs, paths):
        "C-index of a model on validation and test, and its CPU seconds"
        start, system = time.process_time(), find_system('survival')
        model = dict(name=name, encoder='test_byobnet', num_heads=4, grid=2, max_t=8)
        # a ledger of the test split for each model: they are compared, not chosen
        cfg = self.config('toy', self.runs/name, dict(priors=int(name != 'Mirai')), seed=seed, epochs=epochs,
                          model=model, paths=paths)
        folder = train(cfg)
        seconds = time.process_time() - start
        val, test = (system.metrics(system.read_table(evaluate(folder, split)), cfg)['c_index']
                     for split in ('val', 'test'))
        return dict(val=val, test=test, truth=self.truth(), seconds=round(seconds))

def fill(asked, epochs, folder):
    "Run the cells that are missing"
    with TemporaryDirectory() as top:
        world, paths = World(folder or top), {}
        for name, seed in asked:
            if name in ALIGNED_BY_IMAGES and not paths:
                path, numbers = world.registration()
                paths = dict(embed_path_saved_reg_model=path)
                keep('MammoRegNet', 0, epochs, **numbers)
            keep(name, seed, epochs, **world.run(name, seed, epochs, paths))

def emit_rows(found):
    "A row a cell, with the model of one exam as its peer"
    for (name, seed, epochs), cell in sorted(found.items(), key=lambda item: item[0][0] != 'Mirai'):
        if name == 'MammoRegNet':
            emit_value('MammoRegNet: local correlation of pairs after and before', round(cell['val'], 3),
                       round(cell['before'], 3), cpu_seconds=cell['seconds'])
            continue
        alone = found.get(('Mirai', seed, epochs)) if name != 'Mirai' else None
        least = max(GOAL, alone['val'] if alone else 0)
        emit_value(f'{name}: C-index of validation, beside Mirai', round(cell['val'], 3),
                   alone and round(alone['val'], 3), goal=f'> {GOAL}' + (', > Mirai' if alone else ''),
                   met=cell['val'] > least, test=round(cell['test'], 3), truth=round(cell['truth'], 3), seed=seed,
                   epochs=epochs, cpu_seconds=cell['seconds'])

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('models', nargs='*', default=list(RISK_MODELS))
    parser.add_argument('--epochs', type=int, default=load(CONFIGS/'toy.yaml').epochs)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--folder', default='')
    given = parser.parse_args()
    torch.set_num_threads(1)
    there = cells()
    asked = [(name, seed) for name in given.models for seed in given.seeds if (name, seed, given.epochs) not in there]
    if asked:
        fill(asked, given.epochs, given.folder)
    emit_rows(cells())

if __name__ == '__main__':
    main()
