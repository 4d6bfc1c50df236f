"""Guide 003 in one command, `python main.py`: search, the best model, its test, and results.json

Further arguments are those of rtsseg-search, as in `python main.py --config timeseries/toy --trials 4`."""
import sys
from pathlib import Path

import torch

from rtsseg.cli import main

if __name__ == '__main__':
    here, gpus = Path(__file__).resolve().parent, torch.cuda.device_count()
    sys.exit(main(['search', '--config', str(here/'base.yaml'), '--then', 'test', '--processes', str(max(gpus, 1)),
                   *sys.argv[1:]]))
