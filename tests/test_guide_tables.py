"""The tables of the guides on the site leave nothing out: every line, setting, default, experiment, test and figure"""
import ast
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from rtsseg.config import RunConfig, find_system, load

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT/'configs'

# ---------------------------------------------------------------- what the tables say

def numbered(guide):
    "The numbered headings of a guide's text: {number: title}; a table's rows begin with numbers as well"
    return dict(re.findall(r'(?<=\n\n)([1-9]\d*(?:\.[1-9]\d*)?)\.? ([A-Z].*)\n(?=\n)', guide))

def numbered_by_stage(guide):
    "The headings of a guide in Markdown that have a number of two parts: {number: title}"
    return dict(re.findall(r'^#+ \**(\d\.\d) ?(.*?)\**$', guide, re.M))

def values_of(tree, prefix=''):
    "Every field of a config tree, and its value"
    found = {}
    for name in type(tree).model_fields:
        value = getattr(tree, name)
        found |= values_of(value, f'{prefix}{name}.') if isinstance(value, BaseModel) else {f'{prefix}{name}': value}
    return found

@dataclass(frozen=True)
class GuideTable:
    "A page that says where each line of a guide lives"
    page: str                         # in nbs/
    guide: str                        # the first letters of the guide's text, where it lies beside the project
    headings: Callable[[str], dict]   # of that text: {what a row calls it: title}
    base: Callable[[], Any]           # the config whose values are the defaults that rows name
    elsewhere: type|None              # a config tree whose fields another page names, so that this one need not
    experiments: str                  # files of experiments below configs/, each of which a row has to name
    lines: dict[str, list[str]]       # of each section, words that a row of it must hold

# settings that say where things are, and not what a run is; members are written by rtsseg-ensemble
PLACES = 'name', 'runs', 'system', 'tracker.', 'data.manifest', 'data.source', 'members'

RTS_LINES = {
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


LANDCOVER_LINES = {
    '1.0': ['ignore index', 'palette', 'IoU of each class', '2 to 3 pixels', 'normalisation', 'overfitted',
            'move together', 'official splits', 'no image of another set', 'evaluation equals', 'mean IoU by hand',
            'background counts once', 'only after all seven'],
    '1.1': ['starts afresh'],
    '1.2': ['SegFormer-B2', 'ImageNet', '512', 'CE 0.7 + Dice 0.3', '50 epochs', 'AdamW', 'cosine and warm-up',
            'clipping at 1.0', '0.65', 'EMA 0.999', '10 to 15 epochs', 'mixed precision', '2 to 4', 'official splits'],
    '1.3': ['EarthVQA', 'mismatches listed', '50 to 70%'],
    '2.1': ['CE 0.6 + Dice 0.3 + Lovász 0.1', 'milestone', 'ten epochs more'],
    '2.2': ['512, 640 and 768', '0.5 to 2.0', 'windows', 'class-aware', '30 to 40%', 'weights of classes', 'flips',
            '10 degrees', '0.1, 0.1, 0.1, 0.05', 'p 0.2', 'Urban or Rural', 'α 0.2', 'ablation'],
    '2.3': ['B4 and B5', 'gradient checkpointing', 'frozen teacher', 'L2 or attention', 'T 2 to 4', 'encoder itself',
            'every ten epochs'],
    '3.1': ['tile 1024 with stride 768', 'edge head', 'soft Dice', 'boundary loss', 'least area and width', 'Otsu'],
    '3.2': ['0.75, 1.0, 1.25 with flips', '0.8 mIoU', 'with and without TTA', 'mAcc', 'confusion',
            'Backbone, Pretrain, Loss, Aug, LR, Size, TTA, Post, mIoU, bIoU, FPS', 'W&B or MLflow', 'seed', 'commit'],
    '4.1': ['EfficientSAM', '3 to 5 pixels outside', '5 to 10 iterations', '100 validation images', 'more than 1.0'],
    '4.2': ['0.6 and 0.4'],
}

def titled(guide):
    "The headings of a guide in Markdown, by their first words"
    titles = re.findall(r'^#{2,4} (.*)$', guide, re.M)
    return {re.split(r'[:—(&]', title)[0].strip(): title for title in titles}

PLANT_LINES = {
    'Objective': ['two heads'],
    'Architecture': ['Swin-T', 'ImageNet-22k', '224 × 224', '768', 'iNaturalist', 'routed by species'],
    'Environment Setup': ['timm', 'Lightning'],
    'Training Protocol': ['six stages'],
    'Stage A': ['A1', 'A2', 'A3', 'focal loss', '512, or 256'],
    'Tier 1': ['scale 0.6 to 1', 'flip', 'rotation', 'jitter', 'brightness and contrast'],
    'Tier 2': ['blur', 'variance 10 to 50', 'compression', 'grey', 'shadows'],
    'Tier 3': ['MixUp', 'CutMix', 'RandAugment', 'label smoothing', 'validation'],
    'SSD Data Loading Strategy': ['8 workers', 'dropped', 'JPEG', 'waits for data'],
    'Stage B': ['B1', 'B2', 'B3', 'linear', '3 ×, below 50 images 5 ×', '0.7 L_disease'],
    'Model Checkpointing': ['species_only', 'disease_heads', 'hierarchical_full', 'macro-F1'],
    'Expected Training Time': ['seconds an epoch'],
    'Evaluation Metrics': ['species top-1', 'top-3', 'cascade', 'rare diseases', 'targets'],
    'Edge Cases': ['memory', 'compile', 'pure PyTorch', 'diverges'],
    'Verification': ['box'],
}

def capitalised(guide):
    "The lines of a guide in plain text that name a part of it: few words, all but the small ones with a capital"
    words = r'(?:[A-Z][a-z]+|and|with|&)'
    return {line: line for line in re.findall(rf'^([A-Z][a-z]+(?: {words})*):?$', guide, re.M)}

TIMESERIES_LINES = {
    'Overview': ['Sentinel-1 and Sentinel-2', 'several GPUs', 'Optuna'],
    'Data Loading & Preprocessing': ['zarr', 'by chunks', 'patches'],
    'Data Preprocessing': ['padded'],
    'Normalization & Statistics': ['CuPy', 'z-scores', 'fill'],
    'Padding': ['max_T'],
    'Class Weights': ['compute_class_weights'],
    'Model Definition': ['placeholder'],
    'Model': ['concatenated, a 3-D convolution', 'in its place'],
    'Model and Training': ['same bytes'],
    'Distributed Training': ['NCCL', 'DDP', 'patience', 'clipping', 'cosine', 'best_model.pth'],
    'Requirements': ['PyTorch, CuPy, zarr, Optuna, NumPy'],
    'Repository Structure': ['main.py'],
    'Usage': ['one command'],
    'Configure Paths and Tile Identifiers': ['base_train_path … test_tiles'],
    'Run Hyperparameter Optimization and Training': ['python main.py'],
    'Hyperparameter Optimization': ['layers, rate, batch size'],
    'Hyperparameter Optimization with Optuna': ['resumes'],
    'Objective Function': ['best validation loss'],
    'Study Persistence': ['study.db', 'study.pkl'],
    'Evaluation': ['loss and accuracy', 'results.json: best settings, test metrics, configuration'],
    'Detailed Workflow': ['printed'],
}

def titled_by_pictures(guide):
    "The headings of a guide whose lines begin with a picture, in letters that were read in another code: {name: title}"
    titles = [re.sub(r'^[^A-Za-z]+', '', row) for row in guide.splitlines()
              if re.match(r'\d?[^\x00-\x7f]', row) and not row.startswith(('•', '\u0e50\u0178\u2018\u2030'))]
    return {re.split(r'[(&]', title)[0].strip(): title for title in titles}

RISK_LINES = {
    'Training a Model': ['five models', 'two data sets'],
    'Prerequisites': ['before a run'],
    'Environment': ['Accelerate', 'Weights & Biases', 'Kornia'],
    'Data': ['CSV', 'splits', 'EMBED or CSAW'],
    'Model configuration': ['YAML', 'dropout', 'num_attn_blocks', 'distance', 'alpha_coeff', 'margin',
                            'without a file'],
    'Registration model': ['MammoRegNet', 'each data set', 'ImgFeatAlign and LMV-Net say so'],
    'Running Training': ['shell script', 'accelerate launch'],
    'CLI Arguments': ['both tables'],
    'Required': ['--model', '--dataset', '--csv_file', '--data_root', '--path_out_dir'],
    'Key Optional': ['--num_epochs', '--batch_size', '--learning_rate', '--weight_decay', '--warmup_steps',
                     '--use_scheduler', '--patience_lr_scheduler', '--lr_decay', '--patience', '--augmentations',
                     '--resume_from', '--wandb_id', '--seed'],
    'Configuration System': ['command line before YAML before defaults'],
    'Training Pipeline': ['same bytes'],
    'Argument Parsing': ['timestamped'],
    'Accelerator Initialisation': ['several GPUs', 'mixed precision', 'device', 'gradients'],
    'Reproducibility': ['seeds', 'cuDNN'],
    'Data Loading': ['sharded', 'nothing is augmented in validation'],
    'Model Initialisation': ['at a tenth', 'OA-BreaCR', 'warning'],
    'Optimizer': ['AdamW'],
    'Epoch Loop': ['validate'],
    'Training': ['C-index', 'AUC of each year'],
    'Validation': ['loss', 'C-index', 'AUC of each year'],
    'Logging': ['log file', 'main process'],
    'Scheduler Step': ['after the warm-up', 'C-index'],
    'Learning Rate Scheduling': ['5000 steps from 0', 'constant'],
    'Checkpointing': ['every 10 epochs', 'best C-index', 'optimizer', 'schedulers', 'epoch, step'],
    'Resume Training': ['--resume_from'],
    'Early Stopping': ['15 epochs', 'name of its own'],
    'Output Directory': ['all names'],
    'Data Augmentation': ['1946', '2048', '10%', '1.1', '0.4', '0.8', 'training alone'],
    'Experiment Tracking': ['C-index', 'AUC', 'step is the epoch'],
    'Resume Logging': ['--wandb_id'],
}

TABLES = [
    GuideTable('guide.qmd', '000', numbered, find_system('rts').Config, None, 'experiments/*.yaml', RTS_LINES),
    GuideTable('guide_landcover.qmd', '002', numbered_by_stage, partial(load, CONFIGS/'landcover'/'baseline.yaml'),
               RunConfig, 'landcover/*/*.yaml', LANDCOVER_LINES),
    GuideTable('guide_plants.qmd', '001', titled, partial(load, CONFIGS/'plants'/'guide.yaml'), RunConfig,
               'plants/experiments/*.yaml', PLANT_LINES),
    GuideTable('guide_timeseries.qmd', '003', capitalised, partial(load, CONFIGS/'timeseries'/'base.yaml'), RunConfig,
               'timeseries/*.yaml', TIMESERIES_LINES),
    GuideTable('guide_survival.qmd', '004', titled_by_pictures, partial(load, CONFIGS/'survival'/'base.yaml'),
               RunConfig, 'survival/*.yaml', RISK_LINES),
]
each_table = pytest.mark.parametrize('table', TABLES, ids=lambda table: table.page)

# ---------------------------------------------------------------- reading a page

@functools.cache
def rows_of(page):
    "The rows of the tables of a page: section, what is asked, settings, experiments, tests, chapter"
    lines = [line for line in (ROOT/'nbs'/page).read_text().splitlines() if line.startswith('| ')]
    rows = [[cell.strip() for cell in line.strip('|').split(' | ')] for line in lines]
    return [row for row in rows if row[0] != 'guide']

RAW = re.compile(r'`([^`]+)`\{=html\}')

def code_words(text):
    "What stands between backticks, and is not HTML"
    return re.findall(r'`([^`]+)`', RAW.sub('', text))

def folded(tests):
    "How a row shows its tests: their number, which opens"
    count = f'{len(tests)} test' if len(tests) == 1 else f'{len(tests)} tests'
    names = ', '.join(f'`{name}`' for name in tests)
    return f'`<details><summary>{count}</summary>`{{=html}} {names} `</details>`{{=html}}'

# what a row says instead of a test, where nothing is built
NOT_BUILT = 'not built'

@each_table
def test_a_table_names_every_setting_with_its_default(table):
    default, named = values_of(table.base()), set()
    for _, _, settings, *_ in rows_of(table.page):
        for text in code_words(settings):
            field, equals, value = text.partition(' = ')
            named.add(field)
            assert field in default, f'{field} is not a setting'
            expected = default[field]
            if isinstance(expected, tuple):
                expected = list(expected)
            if equals:
                assert YAML(typ='safe', pure=True).load(value) == expected, f'{text}: the default is {expected}'
    elsewhere = values_of(table.elsewhere()) if table.elsewhere else {}
    missing = {field for field in default if field not in named and field not in elsewhere
               and not field.startswith(PLACES)}
    assert not missing, f'{table.page} lacks {sorted(missing)}'

def anchor_of(heading):
    "How a site names a heading"
    return re.sub(r'\s', '-', re.sub(r'[^\w\s.-]', '', heading)).lower()

def has_picture(cell):
    "Whether a cell shows an image"
    return cell.cell_type == 'code' and any('image/png' in output.get('data', {}) for output in cell.outputs)

@functools.cache
def headings_with_pictures(chapter):
    "The anchors of the headings of a chapter below which there is a picture; '' is its title, which has none"
    anchor, found = '', set()
    for cell in nbformat.read(ROOT/'nbs'/chapter, 4).cells:
        if cell.cell_type == 'markdown':
            for heading in re.findall(r'^##+ (.*)$', cell.source, re.M):
                anchor = anchor_of(heading)
        elif has_picture(cell):
            found.add(anchor)
    return found

def config_exists(name):
    "Whether there is a config, an experiment or a search of this name, or one in a folder of a system"
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

EACH_SECTION = [pytest.param(table, section, id=f'{table.page} {section}')
                for table in TABLES for section in table.lines]

@pytest.mark.parametrize('table, section', EACH_SECTION)
def test_a_table_has_every_line(table, section):
    asked = ' '.join(asked for of, asked, *_ in rows_of(table.page) if of == section)
    missing = [words for words in table.lines[section] if words.lower() not in asked.lower()]
    assert not missing, f'{section}: no row for {missing}'

def guide_text(table):
    "The text of a guide; skips the test where it is not there"
    found = sorted((ROOT.parent/'shared'/'guides').glob(f'{table.guide}_*'))
    if not found:
        pytest.skip('the text of the guide is not there')
    return found[0].read_text()

@each_table
def test_a_table_has_every_heading(table):
    "A row for each heading of the text itself, or for the sections below it; and no row of another"
    headings = table.headings(guide_text(table))
    rows = {of for of, *_ in rows_of(table.page)} - {'–'}
    parts = {of.partition('.')[0] for of in rows if '.' in of}
    missing = {name: title for name, title in headings.items() if name not in rows | parts}
    assert not missing, f'no row for {missing}'
    assert rows <= set(headings), f'{rows - set(headings)}: the guide has no such heading'
    assert rows == set(table.lines)

def test_headings_are_told_from_rows_of_tables():
    "A heading stands alone, with a dot after its number or without"
    text = '1. No\n\n1. Aim\n\nIoU\n0.3 Relaxed\n\n4 Consistency\n\nOrder\n1 RGB\n2 Late fusion\n\n5.4 Balanced\n\n'
    assert numbered(text) == {'1': 'Aim', '4': 'Consistency', '5.4': 'Balanced'}

@pytest.mark.parametrize('name, is_there', [
    ('test_experiments::test_it_trains', True), ('test_experiments::test_it_trains[rts_baseline]', True),
    ('faults/test_manifest::test_05_splits_that_share_ground', True), ('test_experiments::test_it_train', False),
    ('test_guide_tables::has_test', False), ('test_none::test_it_trains', False), ('test_experiments', False),
    ('test_guide_tables::test_headings_are_told_from_rows_of_tables[x]', False)])
def test_a_named_test_is_a_function_of_that_file(name, is_there):
    assert has_test(name) == is_there

EACH_ROW = [pytest.param(row, id=f'{table.page} {row[0]} {row[1]}'[:70])
            for table in TABLES for row in rows_of(table.page)]

@pytest.mark.parametrize('row', EACH_ROW)
def test_a_table_names_what_exists(row):
    _, asked, _, experiments, tests, chapter = row
    assert asked
    assert tests, 'a row needs a test'
    for name in code_words(experiments):
        assert config_exists(name), name
    assert tests == folded(code_words(tests)) or tests == NOT_BUILT
    for name in code_words(tests):
        assert has_test(name), name
    target, _, anchor = re.search(r'\]\(([^)]+)\)', chapter)[1].partition('#')
    assert anchor in headings_with_pictures(target), sorted(headings_with_pictures(target))

@each_table
def test_a_table_names_every_experiment(table):
    "By its name, or by its place below configs/"
    named = {name for row in rows_of(table.page) for name in code_words(row[3])}
    files = {path.relative_to(CONFIGS).with_suffix('').as_posix() for path in CONFIGS.glob(table.experiments)}
    assert not {file for file in files if not {file, file.removeprefix('experiments/')} & named}
