"""The five risk models on made-up mammograms (configs/survival/toy.yaml), and one that sees the current exam alone

python benchmarks/risk.py [epochs] [seeds] [model …]; writes nothing but what it prints."""
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from rtsseg.config import find_system, load
from rtsseg.evaluation import evaluate
from rtsseg.phantom import PhantomWorld, make_phantom_world
from rtsseg.risk_models import ALIGNED_BY_IMAGES, RISK_MODELS
from rtsseg.training import train

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT/'configs'/'survival'

def trained_registration(world:dict, runs:Path) -> Path:
    "The model directory of MammoRegNet on the same exams"
    return train(load(CONFIGS/'registration_toy.yaml', runs=runs, data=world, tracker=dict(kind='none')))/'model'

def run(name:str, seed:int, epochs:int, world:dict, runs:Path, paths:dict) -> dict[str, float]:
    "C-index of a model: of validation, which chose its epoch, and of test"
    data = world | dict(priors=0 if name == 'Mirai' else 1)
    model = dict(name=name, encoder='test_byobnet', num_heads=4, grid=2, max_t=8)
    cfg = load(CONFIGS/'toy.yaml', runs=runs, data=data, tracker=dict(kind='none'), seed=seed, epochs=epochs,
               model=model, paths=paths)
    folder, system = train(cfg), find_system('survival')
    tables = {split: system.read_table(evaluate(folder, split)) for split in ('val', 'test')}
    return {split: system.metrics(table, cfg)['c_index'] for split, table in tables.items()}

def main(epochs:int, seeds:int, names:list[str]) -> None:
    "Train and print"
    with TemporaryDirectory() as top:
        world = Path(top)/'world'
        made = PhantomWorld(patients=320)
        make_phantom_world(world, made)
        data = dict(csv_file=world/'exams.csv', data_root=world, height=made.height, width=made.width, made=None)
        paths = {}
        if set(names) & set(ALIGNED_BY_IMAGES):
            paths = dict(embed_path_saved_reg_model=trained_registration(data | dict(priors=1), Path(top)/'runs'))
        for name in names:
            for seed in range(seeds):
                # a ledger of the test split for each model: they are compared, not chosen
                found = run(name, seed, epochs, data, Path(top)/name, paths)
                print(name, 'seed', seed, {split: round(value, 3) for split, value in found.items()}, flush=True)

if __name__ == '__main__':
    given = sys.argv[1:]
    main(int(given[0]) if given else 20, int(given[1]) if len(given) > 1 else 3, given[2:] or list(RISK_MODELS))
