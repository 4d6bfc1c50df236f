__version__ = "0.2.0"

import os
from importlib import import_module
from typing import TYPE_CHECKING

# Packages that are imported later send no word of their use, and ask for no newer version; what a user has set stays.
# Processes of their own inherit it.
PRIVATE = {
    'MLFLOW_DISABLE_TELEMETRY': 'true',
    'HF_HUB_DISABLE_TELEMETRY': '1',
    'WANDB_ERROR_REPORTING': 'false',
    'RAY_USAGE_STATS_ENABLED': '0',
    'NO_ALBUMENTATIONS_UPDATE': '1',
}
for _name, _value in PRIVATE.items():
    os.environ.setdefault(_name, _value)

if TYPE_CHECKING:
    from rtsseg.calibration import calibrate
    from rtsseg.config import load
    from rtsseg.evaluation import evaluate
    from rtsseg.prediction import predict
    from rtsseg.reporting import report
    from rtsseg.training import train
    from rtsseg.tuning import search

__all__ = ['calibrate', 'evaluate', 'load', 'predict', 'report', 'search', 'train']

# where each name is; nothing is imported before it is used
_ROOMS = {
    'load': 'config',
    'train': 'training',
    'evaluate': 'evaluation',
    'calibrate': 'calibration',
    'report': 'reporting',
    'predict': 'prediction',
    'search': 'tuning',
}


def __getattr__(name):
    if name in _ROOMS:
        return getattr(import_module(f'rtsseg.{_ROOMS[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
    return sorted({*globals(), *__all__})
