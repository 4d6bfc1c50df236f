"""Fault 47: files of other people, changed in any place: each is read, or refused by a message; nothing is written, and
nothing ends in a traceback"""
import copy
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from helpers.fuzz import as_json, change_cells, change_database, changed_bytes, changed_trees, write_csv, write_parquet
from helpers.maps import noise, write_map, write_scene
from helpers.record import IS_LONG, note
from helpers.runs import guard, run
from helpers.tiles import make_world
from rtsseg.config import find_system, load
from rtsseg.console import RtssegError
from rtsseg.files import seal_model
from rtsseg.infer import load_model
from rtsseg.manifest import read_manifest, write_manifest
from rtsseg.results import read_results
from rtsseg.review import estimate_review, read_ratings, review_sample
from rtsseg.scenelist import read_scenes
from rtsseg.sequence import read_sequence
from rtsseg.variants import read_axes

FAULTS = {
    47: (
        'a manifest, a model directory, a run folder, a file of ratings, a plan or a list of scenes of which cells, '
        'fields, types or bytes were changed at random',
        'it is read, or refused by a message; nothing is written, and nothing ends in a traceback',
    ),
}

EXAMPLES = 2000 if IS_LONG else 25
often = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

def read_or_refused(read, *given):
    "Read; an error is one of the library's, with exit code 2 and something to say. Nothing is written"
    try:
        with guard():
            read(*given)
    except RtssegError as error:
        assert error.code == 2
        assert str(error).strip()

def draws(test):
    "Run a test on many examples: `test(draw)`"
    @often
    @given(data=st.data())
    def many(data):
        test(data.draw)
    many()

# ---------------------------------------------------------------- manifests

@pytest.fixture(scope='module')
def tiles(tmp_path_factory):
    "A small world with its manifest as CSV, Parquet and GeoPackage"
    world = make_world(tmp_path_factory.mktemp('tiles')/'world')
    for suffix in ('parquet', 'gpkg'):
        write_manifest(read_manifest(world/'full.csv'), world/f'full.{suffix}')
    return world

@pytest.mark.parametrize('suffix', ['csv', 'parquet', 'gpkg'])
def test_47_manifests(tiles, suffix):
    "Cells, columns, types, rows and bytes of a table of tiles; of a GeoPackage its tables too"
    path, whole = tiles/f'changed.{suffix}', pd.read_csv(tiles/'full.csv', dtype=object, keep_default_na=False)

    def one(draw):
        if suffix == 'gpkg':
            shutil.copy(tiles/'full.gpkg', path)
            change_database(draw, path)
        else:
            write = dict(csv=write_csv, parquet=write_parquet)[suffix]
            write(draw, change_cells(draw, whole), path)
        read_or_refused(read_manifest, path)

    draws(one)
    note('changed files', f'manifest as {suffix}', EXAMPLES, EXAMPLES)

# ---------------------------------------------------------------- model directories and run folders

def read_tree(path):
    "What a JSON or YAML file holds"
    if path.suffix == '.json':
        return json.loads(path.read_text())
    return YAML(typ='safe').load(path.read_text())

def changed_file(draw, path):
    "Content of a file of which fields or bytes were changed"
    data = path.read_bytes()
    if path.suffix in ('.json', '.yaml') and draw(st.integers(0, 3)):
        return as_json(draw(changed_trees(read_tree(path))))
    return draw(changed_bytes(data))

@pytest.fixture(scope='module')
def whole_run(tmp_path_factory):
    "A run folder of a model that was calibrated and tested"
    return run(tmp_path_factory.mktemp('run'))

def test_47_model_directories(whole_run, tmp_path):
    "Any file of a model; the list of digests is that of the files, or is changed itself"
    whole, model = whole_run/'model', tmp_path/'model'
    names = sorted(path.name for path in whole.iterdir())

    def one(draw):
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(whole, model)
        name = draw(st.sampled_from(names))
        (model/name).write_bytes(changed_file(draw, whole/name))
        if name != 'SHA256SUMS':
            seal_model(model)
        read_or_refused(load_model, model)

    draws(one)
    note('changed files', 'model directory', EXAMPLES, EXAMPLES)

def changed_log(draw, text):
    "Lines of a log, of which some were changed"
    lines = [json.loads(line) for line in text.splitlines()]
    at = draw(st.integers(0, len(lines) - 1))
    lines[at] = draw(changed_trees(lines[at]))
    return b'\n'.join(map(as_json, lines)) + draw(st.sampled_from([b'\n', b'']))

def test_47_run_folders(whole_run, tmp_path):
    "Config, log, environment, evidence and model of a run, and the ledger above it: as a report reads them"
    top = whole_run.parents[2]
    root = tmp_path/'runs'
    folder = root/whole_run.relative_to(top)
    shutil.copytree(top, root)
    files = [path.relative_to(top) for path in top.rglob('*') if path.is_file() and path.suffix != '.lock'
             and path.stat().st_size < 1 << 20]
    names = sorted(map(str, files))

    def one(draw):
        name = draw(st.sampled_from(names))
        before = (root/name).read_bytes()
        if name.endswith('log.jsonl') and draw(st.booleans()):
            (root/name).write_bytes(changed_log(draw, (top/name).read_text()))
        else:
            (root/name).write_bytes(changed_file(draw, top/name))
        try:
            if f'{folder.name}/model/' in name and 'SHA256SUMS' not in name:
                seal_model(folder/'model')
            read_or_refused(read_results, folder)
        finally:
            (root/name).write_bytes(before)
            shutil.copy(whole_run/'model'/'SHA256SUMS', folder/'model'/'SHA256SUMS')

    draws(one)
    note('changed files', 'run folder', EXAMPLES, EXAMPLES)

# ---------------------------------------------------------------- ratings

@pytest.fixture(scope='module')
def sample(tmp_path_factory):
    "A sample of a map, and the ratings of it"
    home = tmp_path_factory.mktemp('review')
    rng = np.random.default_rng(0)
    write_map(home/'map.tif', rng.random((128, 128))**4)
    review_sample(home/'map.tif', home/'sample', n=24, side=16, threshold=.5, least=2)
    units = pd.read_csv(home/'sample'/'units.csv')
    ratings = {unit: dict(answer='no', outline=True) for unit in units.unit}
    settings_of = json.loads((home/'sample'/'sample.json').read_text())
    found = dict(sample=settings_of['units_sha256'], rater='rater', made='2024-05-01', ratings=ratings)
    (home/'rater.json').write_text(json.dumps(found))
    read_ratings(home/'sample', [home/'rater.json'])
    return home

@pytest.mark.parametrize('name', ['rater.json', 'sample/sample.json', 'sample/units.csv', 'sample/strata.csv'])
def test_47_ratings(sample, tmp_path, name):
    "What a rater sends, and what the sample holds"
    home = shutil.copytree(sample, tmp_path/'home')

    def one(draw):
        (home/name).write_bytes(changed_file(draw, sample/name))
        read_or_refused(lambda: estimate_review(read_ratings(home/'sample', [home/'rater.json'])))

    draws(one)
    note('changed files', f'ratings: {name.split("/")[-1]}', EXAMPLES, EXAMPLES)

# ---------------------------------------------------------------- plans

AXES = {'loss.gamma': [2, 0], 'lr.base_lr': dict(low=1e-4, high=1e-2, log=True),
        'sampler': {'balanced': {'sampler.positive_fraction': .5}, 'plain': {'sampler.positive_fraction': None}}}
STEPS = dict(steps=[dict(name='more', set={'epochs': 3}), dict(name='rate', set={'lr.base_lr': 1e-3})])
PLAN = dict(epochs=3, batch_size=4, lr=dict(base_lr=1e-3), sampler=dict(curriculum=[dict(first=1, last=3, ratio=1)]),
            model=dict(encoder='tu-test_efficientnet', weights=None), data=dict(tile_size=64, extra_bands=['ndvi']))

def read_space(path):
    return read_axes(path, find_system('rts').Config)

READERS = {'config': (load, PLAN), 'search space': (read_space, AXES), 'sequence': (read_sequence, STEPS)}

@pytest.mark.parametrize('kind', READERS)
def test_47_plans(tmp_path, kind):
    "A config, as rtsseg-plan writes one, a search space, the steps of a sequence"
    read, tree = READERS[kind]
    path = tmp_path/'plan.yaml'

    def one(draw):
        path.write_bytes(draw(changed_bytes(as_json(draw(changed_trees(copy.deepcopy(tree)))))))
        read_or_refused(read, path)

    draws(one)
    note('changed files', f'plan: {kind}', EXAMPLES, EXAMPLES)

def test_47_lists_of_scenes(tmp_path):
    "Tables of scenes for a map, as CSV and Parquet"
    write_scene(tmp_path/'a.tif', noise(20, 20))
    whole = pd.DataFrame(dict(scene=['a.tif', 'a.tif'], name=['a', 'b'], region='north', date='2024-05-01'))

    def one(draw):
        suffix = draw(st.sampled_from(['csv', 'parquet']))
        path = tmp_path/f'list.{suffix}'
        dict(csv=write_csv, parquet=write_parquet)[suffix](draw, change_cells(draw, whole), path)
        read_or_refused(read_scenes, path, False, ())

    draws(one)
    note('changed files', 'list of scenes', EXAMPLES, EXAMPLES)
