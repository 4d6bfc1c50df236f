"""Each experiment file trains, through everything that the guide's run has, on a world of a second; and the guide's
table leaves nothing out"""
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

# sections of the guide that ask for something
SECTIONS = set(
    '3.1 3.2 3.3 5.1 5.2 5.3 5.4 5.5 6.1 6.2 6.3 6.4 7.2 7.3 8.3 9.1 9.2 10.1 10.2 10.3 10.4 10.5 11.1 12.1 12.2 13'
    .split()
)

# settings that say where things are, and not what a run is
PLACES = 'name', 'runs', 'system', 'tracker.', 'data.manifest', 'data.source'

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

def has_test(name):
    "Whether there is a test, named as file::function"
    file, _, function = name.partition('::')
    return re.search(rf'^def {function}\(', (ROOT/'tests'/f'{file}.py').read_text(), re.M)

def test_the_guides_table_has_every_section():
    assert {section for section, *_ in ROWS} >= SECTIONS

@pytest.mark.parametrize('row', ROWS, ids=lambda row: f'{row[0]} {row[1]}'[:60])
def test_the_guides_table_names_what_exists(row):
    _, asked, _, experiments, tests, chapter = row
    assert asked
    assert tests, 'a row needs a test'
    for name in code_words(experiments):
        assert config_exists(name), name
    for name in code_words(tests):
        assert has_test(name), name
    target, _, anchor = re.search(r'\]\(([^)]+)\)', chapter)[1].partition('#')
    assert anchor in headings_with_pictures(target), sorted(headings_with_pictures(target))

def test_the_guides_table_names_every_experiment():
    named = {name for row in ROWS for name in code_words(row[3])}
    assert {path.stem for path in EXPERIMENTS} <= named
