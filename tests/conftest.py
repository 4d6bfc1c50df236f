"What tests share. Environment variables are set before torch or albumentations are imported"
import os
import signal

os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')
os.environ.setdefault('MPLBACKEND', 'agg')
threads = os.environ.setdefault('OMP_NUM_THREADS', '1' if 'PYTEST_XDIST_WORKER' in os.environ else '2')
# torch follows MKL_NUM_THREADS, whatever OMP_NUM_THREADS is
os.environ.setdefault('MKL_NUM_THREADS', threads)
os.environ.setdefault('OPENBLAS_NUM_THREADS', threads)

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

# Files that take minutes start first, so that no worker is left alone with one of them at the end
LONG = [
    'test_train', 'test_report', 'test_run_time', 'test_experiments', 'test_tracker', 'test_security', 'test_models',
    'test_main_job', 'test_rasters', 'test_search', 'test_calibrate', 'test_toy_learnable', 'test_intervals',
    'test_inference',
]

# The same examples in every run, on a slow machine too.
# `pytest --hypothesis-profile=default` tries others
settings.register_profile('same', derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('same')

def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))

@pytest.fixture(scope='session')
def data_dir():
    "Real data sets beside the project, where there are any"
    path = ROOT.parent/'shared'/'data'
    if not path.is_dir():
        pytest.skip('the real data sets are not on this machine')
    return path

@pytest.fixture(scope='session')
def tiny_world(tmp_path_factory):
    "Manifest of a small toy world, made once. Tests read it and write elsewhere"
    from rtsseg.toy import tiny_toy
    return Path(tiny_toy(tmp_path_factory.mktemp('toy')))

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "The model directory of an untrained network"
    from helpers.maps import untrained_model
    return untrained_model(tmp_path_factory.mktemp('model'))

@pytest.fixture(scope='module')
def loaded(model):
    "That model, loaded"
    from rtsseg.infer import load_model
    return load_model(model)

@pytest.fixture(scope='module')
def chromium():
    "A browser that opens pages (helpers/browser.py)"
    from helpers.browser import launched
    with launched() as browser:
        yield browser

@pytest.fixture
def default_signals():
    "SIGINT and SIGHUP mean what they mean in a terminal, also where nohup or a background job ignores them"
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)

@pytest.fixture
def world(tmp_path):
    "Six tiles of 32 pixels with two manifests, for a test to damage (helpers/tiles.py)"
    from helpers.tiles import make_world
    return make_world(tmp_path/'world')
