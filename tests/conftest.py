"What tests share. Environment variables are set before torch or albumentations are imported"
import os
os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')
threads = os.environ.setdefault('OMP_NUM_THREADS', '1' if 'PYTEST_XDIST_WORKER' in os.environ else '2')
for v in ('MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ.setdefault(v, threads)       # torch goes by MKL's, whatever OpenMP's is
os.environ.setdefault('MPLBACKEND', 'agg')

from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent

LONG = ['test_run_time', 'test_train', 'test_experiments', 'test_inference', 'test_security', 'test_report', 'test_models']

def pytest_collection_modifyitems(items):
    "Files that take minutes come first, so that no worker is left alone with one of them at the end"
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))

@pytest.fixture(scope='session')
def data_dir():
    "Real data beside the project, where there is any"
    path = ROOT.parent/'shared'/'data'
    if not path.is_dir(): pytest.skip('the real data sets are not on this machine')
    return path

@pytest.fixture(scope='session')
def tiny_world(tmp_path_factory):
    "Manifest of a small toy world, made once. Tests read it and write elsewhere"
    from rtsseg.toy import tiny_toy
    return Path(tiny_toy(tmp_path_factory.mktemp('toy')))
