"""Each experiment file trains, through everything that the guide's run has, on a world of a second; and the guide's
table leaves nothing out"""
import ast
import functools
import json
import math
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from ruamel.yaml import YAML

from rtsseg.config import find_system, load, read_yaml
from rtsseg.runs import flatten, read_log
from rtsseg.training import train

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT/'configs'
EXPERIMENTS = sorted((CONFIGS/'experiments').glob('*.yaml'))
BASES = [CONFIGS/'rts_baseline.yaml', CONFIGS/'rts_field.yaml']

# ---------------------------------------------------------------- the experiment files

# written although they are the default, where an experiment is about them
MAY_EQUAL_THE_BASE = {
    'loss.boundary_ignore_width',
    'loss.boundary_soft_width',
    'loss.soft_label_value',
    'loss.tversky_alpha',
    'loss.tversky_beta',
    'loss.balance',
    'data.extra_bands',
    'data.multi_resolution.factor',
    'model.fusion',
    'model.extra_encoder',
    'model.in_channels',
}

def value_at(cfg, path):
    "The value of a dotted field"
    for part in path.split('.'):
        cfg = cfg[part] if isinstance(cfg, dict) else getattr(cfg, part)
    return cfg

@pytest.mark.parametrize('file', EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_names_only_what_differs(file):
    tree = read_yaml(file)
    assert tree.pop('name') == file.stem
    base, cfg = load(BASES[0]), load(BASES[0], file)
    named = [path for path in flatten(tree) if not path.startswith('loss_weights.')]
    same = {path for path in named if value_at(cfg, path) == value_at(base, path)}
    assert same <= MAY_EQUAL_THE_BASE, same - MAY_EQUAL_THE_BASE

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder for the world that the first run draws and checks, and for the runs"
    return tmp_path_factory.mktemp('experiments')

def base_of(file):
    "An experiment that names no model takes the small one of the toy config"
    return BASES[0] if file in BASES or 'model' in read_yaml(file) else CONFIGS/'toy.yaml'

# The same code in seconds: tests/test_models.py trains each candidate itself
SMALL_SIBLINGS = {
    'efficientnet-b3': 'efficientnet-b0',
    'efficientnet-b7': 'efficientnet-b0',
    'mit_b5': 'mit_b0',
    'tu-vit_large_patch16_dinov3.sat493m': 'tu-vit_small_patch16_dinov3.lvd1689m',
}

def must_be_finite(name, monitor):
    "Whether a number of an epoch is a loss or the monitored value"
    return name.startswith(('train/loss', 'val/loss')) or name == f'val/{monitor}'

@pytest.mark.parametrize('file', [*BASES, *EXPERIMENTS], ids=lambda path: path.stem)
def test_it_trains(file, home):
    "Two epochs, the first with a frozen backbone"
    # a block of 2 × 2 tiles: a coarse view needs neighbours
    source = dict(regions=1, block_size=384)
    settings = dict(batch_size=6, runs=home/'runs', data=dict(manifest=home/'world'/'manifest.csv', source=source))
    cfg = load(base_of(file), file, CONFIGS/'test.yaml', **settings)
    cfg.model.encoder = SMALL_SIBLINGS.get(cfg.model.encoder, cfg.model.encoder)
    folder = train(cfg)
    first, last = read_log(folder)
    assert (first['epoch'], last['epoch']) == (1, 2)
    assert last['skipped'] == 0
    for row in (first, last):
        for name, value in row.items():
            assert not must_be_finite(name, cfg.metrics.monitor) or math.isfinite(value), name
    parts = {name.removeprefix('train/loss/') for name in first if name.startswith('train/loss/')}
    assert parts == set(cfg.loss.parts)
    lines = [json.loads(line) for line in (folder/'log.jsonl').read_text().splitlines()]
    assert [line['frozen'] for line in lines if line['event'] == 'stage'] == [['encoder'], []]
    assert first['lr/encoder'] == 0 < last['lr/encoder']
    # all run folders together would fill a small disk
    shutil.rmtree(folder)

def test_the_grid_of_models_builds_the_models_of_their_experiments():
    "Memory included: an entry keeps what its experiment sets"
    entries = read_yaml(CONFIGS/'search'/'models.yaml')['model'].values()
    by_encoder = {entry['model.encoder']: entry for entry in entries}
    for experiment in ('segformer_b5', 'dinov3'):
        model = read_yaml(CONFIGS/'experiments'/f'{experiment}.yaml')['model']
        assert by_encoder[model['encoder']] == {f'model.{name}': value for name, value in model.items()}

# ---------------------------------------------------------------- the table of the guide

def table_rows(path):
    "The rows of the tables of a page: section, what is asked, settings, experiments, tests, chapter"
    lines = [line for line in path.read_text().splitlines() if re.match(r'\| [\d–]', line)]
    return [[cell.strip() for cell in line.strip('|').split(' | ')] for line in lines]

def code_words(text):
    "What stands between backticks"
    return re.findall(r'`([^`]+)`', text)

ROWS = table_rows(ROOT/'nbs'/'guide.qmd')

# What each section of the guide asks for, in words that a row of that section must hold
LINES = {
    '1': ['high precision at acceptable recall'],
    '2.1': ['PyTorch', 'container', 'several GPUs', 'cloud, budget and editor'],
    '2.2': ['one seed', 'deterministic kernels', 'auto-tuning', 'hash seed'],
    '3.1': ['UNet++', 'EfficientNet-B5', 'ImageNet', '512 × 512', '3 channels', 'one logit', 'B3 and B7'],
    '3.2': ['SegFormer-B5', 'DINOv3'],
    '3.3': ['RGB alone', 'one channel at a time', 'early fusion', 'late fusion'],
    '4': ['same statistics', 'imagery has shifted'],
    '5.1': ['focal'],
    '5.2': ['α on false negatives, β on false positives'],
    '5.3': ['λ₁ Focal + λ₂ Dice'],
    '5.4': ['linear', 'sqrt', 'log'],
    '5.5': ['none', 'left out', 'soft labels', 'by distance'],
    '6.1': ['IoU', 'F1'],
    '6.2': ['greedy one-to-one matching', 'IoU 0.1, 0.3 and 0.5'],
    '6.3': ['PR-AUC'],
    '6.4': ['one for all', 'each region'],
    '7': ['harder negatives'],
    '7.1': ['without a positive pixel'],
    '7.2': ['half of each batch'],
    '7.3': ['curriculum', 'epoch boundaries'],
    '8.1': ['50 m to over 2 km', 'several tiles'],
    '8.2': ['native resolution', 'half the resolution'],
    '8.3': ['multi-resolution training', 'recall by size'],
    '9.1': ['AdamW', 'weight decay', 'clipping', 'frozen', 'warm-up and cosine', 'backbone at a tenth', 'EMA', 'FP16',
            'batch size', 'several GPUs', '300 epochs', 'early stopping: patience, window, gain, start',
            'validation every 5', 'data loading', 'checkpoints: best, every N, the last N'],
    '9.2': ['quarter turns', 'flips', 'shift, scale, rotate', 'elastic', 'shear', 'brightness', 'contrast',
            'saturation', 'RGB only', 'Gaussian noise', 'CLAHE', 'down-scaling and padding'],
    '10.1': ['data checks', 'spatial blocking', 'loaders iterated', 'normalisation statistics', 'boundary masks',
             'batch sampler', 'container', 'GPU memory', 'batch size confirmed', 'tracker', 'versions pinned',
             'baseline config', 'config committed', 'commit recorded', 'noise floor'],
    '10.2': ['phases', 'curriculum', 'EMA', 'validation', 'early stopping', 'best checkpoint'],
    '10.3': ['Val-Realistic', 'one pass, then negatives drawn'],
    '10.4': ['exported model', 'temperature', 'thresholds', 'several views', 'every metric on test', 'several seeds'],
    '10.5': ['three signs', 'dropout', 'gap from balanced to realistic'],
    '11.1': ['none, 2, 4 or all 8', 'gain'],
    '11.2': ['averaged pixel by pixel'],
    '12.1': ['temperature'],
    '12.2': ['threshold for each ratio'],
    '13': ['better than another'],
    '14.1': ['mean ± standard deviation'],
    '14.2': ['results table'],
}

# what a row says instead of a test, where nothing is built
NOT_BUILT = 'not built'

# settings that say where things are, and not what a run is; members are written by rtsseg-ensemble
PLACES = 'name', 'runs', 'system', 'tracker.', 'data.manifest', 'data.source', 'members'

def defaults(cls, prefix=''):
    "Every field of a config tree, and its default"
    found = {}
    for name, field in cls.model_fields.items():
        if hasattr(field.annotation, 'model_fields'):
            found |= defaults(field.annotation, f'{prefix}{name}.')
        else:
            found[f'{prefix}{name}'] = field.get_default(call_default_factory=True)
    return found

def test_the_guides_table_names_every_setting_with_its_default():
    default = defaults(find_system('rts').Config)
    named = set()
    for _, _, settings, *_ in ROWS:
        for text in code_words(settings):
            field, equals, value = text.partition(' = ')
            named.add(field)
            assert field in default, f'{field} is not a setting'
            expected = default[field]
            if isinstance(expected, tuple):
                expected = list(expected)
            if equals:
                assert YAML(typ='safe', pure=True).load(value) == expected, f'{text}: the default is {expected}'
    missing = {field for field in default if field not in named and not field.startswith(PLACES)}
    assert not missing, f'the guide table lacks {sorted(missing)}'

def anchor_of(heading):
    "How a site names a heading"
    return re.sub(r'\s', '-', re.sub(r'[^\w\s.-]', '', heading)).lower()

def has_picture(cell):
    "Whether a cell shows an image"
    return cell.cell_type == 'code' and any('image/png' in output.get('data', {}) for output in cell.outputs)

@functools.cache
def headings_with_pictures(chapter):
    "The anchors of the headings of a chapter below which there is a picture"
    anchor, found = '', set()
    for cell in nbformat.read(ROOT/'nbs'/chapter, 4).cells:
        if cell.cell_type == 'markdown':
            for heading in re.findall(r'^#+ (.*)$', cell.source, re.M):
                anchor = anchor_of(heading)
        elif has_picture(cell):
            found.add(anchor)
    return found

def config_exists(name):
    "Whether there is a config, an experiment or a search of this name"
    return (CONFIGS/f'{name}.yaml').is_file() or (CONFIGS/'experiments'/f'{name}.yaml').is_file()

@functools.cache
def functions_in(file):
    "The test functions of a file of tests/, and whether each has parameters: {name: bool}"
    path = ROOT/'tests'/f'{file}.py'
    body = ast.parse(path.read_text()).body if path.is_file() else []
    functions = [node for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith('test_')]
    return {node.name: any('parametrize' in ast.unparse(mark) for mark in node.decorator_list) for node in functions}

def has_test(name):
    "Whether there is a test, named as file::function, or with one of its cases as file::function[case]"
    named = re.fullmatch(r'([\w/]+)::(\w+)(\[.+\])?', name)
    if not named:
        return False
    file, function, case = named.groups()
    known = functions_in(file)
    return known.get(function, False) if case else function in known

def headings_of(guide):
    "The numbered headings of the guide's text: {number: title}; a table's rows begin with numbers as well"
    return dict(re.findall(r'(?<=\n\n)([1-9]\d*(?:\.[1-9]\d*)?)\.? ([A-Z].*)\n(?=\n)', guide))

@pytest.mark.parametrize('section', LINES)
def test_the_guides_table_has_every_line(section):
    asked = ' '.join(asked for of, asked, *_ in ROWS if of == section)
    missing = [words for words in LINES[section] if words.lower() not in asked.lower()]
    assert not missing, f'{section}: no row for {missing}'

GUIDES = sorted((ROOT.parent/'shared'/'guides').glob('000_*'))

@pytest.mark.skipif(not GUIDES, reason='the text of the guide is not there')
def test_the_guides_table_has_every_heading():
    "A row for each numbered heading of the text itself, or for the sections below it; and no row of another number"
    headings = headings_of(GUIDES[0].read_text())
    assert {'1', '4', '5.4', '10.1', '14.2'} <= set(headings) and len(headings) > 40
    rows = {of for of, *_ in ROWS} - {'–'}
    parts = {of.partition('.')[0] for of in rows if '.' in of}
    missing = {number: title for number, title in headings.items() if number not in rows | parts}
    assert not missing, f'no row for {missing}'
    assert rows <= set(headings), f'{rows - set(headings)}: the guide has no such heading'
    assert rows == set(LINES)

def test_headings_are_told_from_rows_of_tables():
    "A heading stands alone, with a dot after its number or without"
    text = '1. No\n\n1. Aim\n\nIoU\n0.3 Relaxed\n\n4 Consistency\n\nOrder\n1 RGB\n2 Late fusion\n\n5.4 Balanced\n\n'
    assert headings_of(text) == {'1': 'Aim', '4': 'Consistency', '5.4': 'Balanced'}

@pytest.mark.parametrize('name, is_there', [
    ('test_experiments::test_it_trains', True), ('test_experiments::test_it_trains[rts_baseline]', True),
    ('faults/test_manifest::test_05_splits_that_share_ground', True), ('test_experiments::test_it_train', False),
    ('test_experiments::has_test', False), ('test_none::test_it_trains', False), ('test_experiments', False),
    ('test_experiments::test_headings_are_told_from_rows_of_tables[x]', False)])
def test_a_named_test_is_a_function_of_that_file(name, is_there):
    assert has_test(name) == is_there

@pytest.mark.parametrize('row', ROWS, ids=lambda row: f'{row[0]} {row[1]}'[:60])
def test_the_guides_table_names_what_exists(row):
    _, asked, _, experiments, tests, chapter = row
    assert asked
    assert tests, 'a row needs a test'
    for name in code_words(experiments):
        assert config_exists(name), name
    assert code_words(tests) or tests == NOT_BUILT
    for name in code_words(tests):
        assert has_test(name), name
    target, _, anchor = re.search(r'\]\(([^)]+)\)', chapter)[1].partition('#')
    assert anchor in headings_with_pictures(target), sorted(headings_with_pictures(target))

def test_the_guides_table_names_every_experiment():
    named = {name for row in ROWS for name in code_words(row[3])}
    assert {path.stem for path in EXPERIMENTS} <= named
