"""Segmentation of rare objects by plan and budget, beside a plain recipe and nnU-Net, in equal minutes of training

    python benchmarks/quality.py [--sets dubai landslides toy] [--methods ours plain nnunet] [--minutes 5 20]
                                 [--seeds 42 43 44] [--parallel 2] [--nnunet-python PATH]

Each set, method, seed and number of minutes is a cell: a process on a core of its own, whose result is a line of
quality.jsonl. A cell that is there is not run again, so that a whole run may take several days; the rows are made from
all lines. `--parallel` cells start together and the next ones wait for them, so that load affects all alike.
Preparation is not counted for any method, nor is prediction.
"""
import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

import quality_ours
import quality_plain
from common import emit_value, machine, short
from nnunet_data import convert
from quality_data import DATA, ROOT, SETS, native_ap, prepared, set_settings
from rtsseg.ablation import compare_seeds
from rtsseg.runs import environment

HERE = Path(__file__).resolve().parent
RESULTS = HERE/'quality.jsonl'
CELLS = ROOT/'runs'/'quality'
# Raise it after a change that gives other results for ours: rules of the plan, training, prediction
OURS = 1
# what is compared with ours, and the verdicts that reach the goal; landslides are too few for one
PEERS = {'plain': ('better beyond noise', ['gain']), 'nnunet': ('not worse beyond noise', ['gain', 'noise'])}
WITHOUT_GOAL = ['landslides']

class Cell(NamedTuple):
    set: str
    method: str
    seed: int
    minutes: float

    @property
    def folder(self):
        return CELLS/'_'.join(map(str, self))

    def plan(self, settings):
        "The plan that all seeds of ours share"
        return CELLS/f'plan_{self.set}_{self.minutes:g}_{settings}.yaml'

class NnUNet:
    "A Python that has nnU-Net, and its data"
    def __init__(self, python):
        self.python = python
        ask = 'from importlib.metadata import version; print(version("nnunetv2"))'
        self.version = subprocess.check_output([python, '-c', ask], text=True).strip()

    def data(self, name):
        return DATA/name/'nnunet'

    def script(self, *arguments):
        return [self.python, HERE/'nnunet_peer.py', *map(str, arguments)]

    def prepare(self, name):
        "Convert, plan and preprocess a set, once"
        raw = self.data(name)/'raw'/'Dataset001_quality'
        if (self.data(name)/'done').exists():
            return
        shutil.rmtree(self.data(name), ignore_errors=True)
        convert(name, raw)
        subprocess.run(self.script('prepare', self.data(name)), env=one_thread(), check=True)
        (self.data(name)/'done').touch()

def on_core(number):
    "Keeps a process that starts to one core, as if the machine had no other"
    return lambda: os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[number]})

def one_thread():
    return os.environ | dict(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='passive', NO_ALBUMENTATIONS_UPDATE='1',
                             PYTHONHASHSEED='42')

def settings_of(name, method, nnunet):
    "A hash of what a cell measures: other data, another recipe, another version of ours or of nnU-Net"
    own = dict(ours=OURS, plain=quality_plain.RECIPE, nnunet=nnunet and nnunet.version)
    text = json.dumps([set_settings(name), own[method]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]

def read_results():
    "All lines; the last one of a cell counts"
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]

def cell_of(row):
    return Cell(row['set'], row['method'], row['seed'], row['minutes'])

def script(method, *arguments):
    return [sys.executable, HERE/f'quality_{method}.py', *map(str, arguments)]

def command(cell, settings, nnunet):
    if cell.method == 'ours':
        return script('ours', 'train', cell.set, cell.plan(settings), cell.seed, cell.folder)
    if cell.method == 'plain':
        return script('plain', cell.set, cell.minutes, cell.seed, cell.folder)
    return nnunet.script('train', nnunet.data(cell.set), cell.minutes, cell.seed, cell.folder)

def prepare(cell, settings, nnunet):
    "What a cell needs and shares with others: a plan, or what nnU-Net preprocesses"
    if cell.method == 'nnunet':
        nnunet.prepare(cell.set)
    elif cell.method == 'ours' and not quality_ours.seconds_file(cell.plan(settings)).exists():
        subprocess.run(script('ours', 'plan', cell.set, cell.minutes, cell.plan(settings)), env=one_thread(),
                       preexec_fn=on_core(0), check=True)

def start(cell, settings, nnunet, core):
    "Start a cell in an empty folder; its output goes to log.txt there"
    shutil.rmtree(cell.folder, ignore_errors=True)
    cell.folder.mkdir(parents=True)
    with open(cell.folder/'log.txt', 'w') as log:
        return subprocess.Popen(command(cell, settings, nnunet), env=one_thread(), preexec_fn=on_core(core),
                                stdout=log, stderr=subprocess.STDOUT)

def judge(cell, settings):
    "The line of a cell that has ended"
    facts = json.loads((cell.folder/'facts.json').read_text())
    ap = round(native_ap(prepared(cell.set), cell.folder), 4)
    shutil.rmtree(cell.folder/'scores')
    env = environment()
    made_by = dict(rtsseg=env['rtsseg'], commit=env.get('git_commit', '')[:8], machine=machine())
    return cell._asdict() | dict(ap=ap, settings=settings) | facts | made_by

def run_together(cells, settings, nnunet):
    "Run some cells side by side and keep their results; whether all of them ended well"
    for cell in cells:
        prepare(cell, settings[cell.set, cell.method], nnunet)
    processes = [start(cell, settings[cell.set, cell.method], nnunet, core) for core, cell in enumerate(cells)]
    codes = [process.wait() for process in processes]
    for cell, code in zip(cells, codes, strict=True):
        if code:
            print(f'{cell.folder.name}: exit code {code}, see {cell.folder.relative_to(ROOT)}/log.txt', flush=True)
            continue
        row = judge(cell, settings[cell.set, cell.method])
        with open(RESULTS, 'a') as file:
            file.write(json.dumps(row) + '\n')
        print(f"{cell.folder.name}: {row['ap']}", flush=True)
    return not any(codes)

def missing_cells(options, settings):
    "Cells without a result, in the order in which they run: ours beside the plain recipe, nnU-Net beside itself"
    done = {(cell_of(row), row['settings']) for row in read_results()}
    together = [[method for method in options.methods if method != 'nnunet'],
                [method for method in options.methods if method == 'nnunet']]
    wanted = product(options.minutes, options.sets, together, options.seeds)
    cells = [Cell(name, method, seed, minutes) for minutes, name, methods, seed in wanted for method in methods]
    return [cell for cell in cells if (cell, settings[cell.set, cell.method]) not in done]

def newest(rows, name, method, minutes):
    "{seed: average precision} of the newest settings"
    found = [row for row in rows if (row['set'], row['method'], row['minutes']) == (name, method, minutes)]
    return {row['seed']: row['ap'] for row in found if row['settings'] == found[-1]['settings']}

def mean(values):
    return round(sum(values)/len(values), 4)

def emit_comparison(name, minutes, peer, ours, theirs):
    "A row: ours beside a peer, over the seeds that both have"
    seeds = sorted(ours.keys() & theirs.keys())
    old, new = [theirs[seed] for seed in seeds], [ours[seed] for seed in seeds]
    found = compare_seeds(old, new)
    goal, reached = PEERS[peer]
    details = dict(difference=short(found.mean), seeds=len(seeds), verdict=found.verdict)
    if len(seeds) > 1:
        details |= dict(std=short(found.std))
        if name not in WITHOUT_GOAL:
            details |= dict(goal=goal, met=found.verdict in reached)
    what = f'{name}, {minutes:g} minutes, beside {peer}'
    emit_value(what, mean(new), mean(old), 'native average precision', **details)

def emit_rows():
    "A row for each set, time and peer"
    rows = read_results()
    for name, minutes, peer in product(SETS, sorted({row['minutes'] for row in rows}), PEERS):
        ours, theirs = (newest(rows, name, method, minutes) for method in ('ours', peer))
        if ours.keys() & theirs.keys():
            emit_comparison(name, minutes, peer, ours, theirs)

def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sets', nargs='+', choices=SETS, default=[*SETS])
    parser.add_argument('--methods', nargs='+', choices=['ours', *PEERS], default=['ours', *PEERS])
    parser.add_argument('--minutes', type=float, nargs='+', default=[5., 20.], help='of training')
    parser.add_argument('--seeds', type=int, nargs='+', default=[42, 43, 44])
    parser.add_argument('--parallel', type=int, default=2, help='cells at once, each on a core of its own')
    parser.add_argument('--nnunet-python', help='a Python that has nnU-Net; without it that peer is left out')
    return parser.parse_args()

def possible(options):
    "The options without the sets and methods that this machine lacks, which are named"
    for name, data_set in SETS.items():
        if name in options.sets and data_set.needs and not data_set.needs.exists():
            print(f'{name}: skipped, the real data sets are not beside the project')
            options.sets.remove(name)
    if 'nnunet' in options.methods and not options.nnunet_python:
        print('nnunet: skipped, --nnunet-python names no Python that has it')
        options.methods.remove('nnunet')
    return options

def main():
    options = possible(arguments())
    nnunet = NnUNet(options.nnunet_python) if 'nnunet' in options.methods else None
    settings = {pair: settings_of(*pair, nnunet) for pair in product(options.sets, options.methods)}
    cells = missing_cells(options, settings)
    for name in sorted({cell.set for cell in cells}):
        prepared(name)
    groups = [cells[first:first + options.parallel] for first in range(0, len(cells), options.parallel)]
    ended_well = [run_together(group, settings, nnunet) for group in groups]
    emit_rows()
    if not all(ended_well):
        sys.exit(1)

if __name__ == '__main__':
    main()
