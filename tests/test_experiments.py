"Each experiment file trains, through everything that the guide's run has, on a world of a second; and the guide's table leaves nothing out"
import functools, json, math, re, warnings
from pathlib import Path

import nbformat
import pytest

from rtsseg.config import RtsConfig, load, read_yaml
from rtsseg.runs import read_log
from rtsseg.training import train

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT/'configs'
EXPERIMENTS = sorted((CONFIGS/'experiments').glob('*.yaml'))
BASES = [CONFIGS/'rts_baseline.yaml', CONFIGS/'rts_field.yaml']

@pytest.fixture(scope='module')
def world(tmp_path_factory): return tmp_path_factory.mktemp('experiments')

def paths(tree, prefix=''):
    "{'a': {'b': 1}} → {'a.b'}"
    return {p for k, v in tree.items() for p in (paths(v, f'{prefix}{k}.') if isinstance(v, dict) else {f'{prefix}{k}'})}

@pytest.mark.parametrize('file', EXPERIMENTS, ids=lambda p: p.stem)
def test_an_experiment_names_only_what_differs(file):
    tree = read_yaml(file); assert tree.pop('name') == file.stem
    def value(cfg, path):
        for part in path.split('.'): cfg = cfg[part] if isinstance(cfg, dict) else getattr(cfg, part)
        return cfg
    base, cfg = load(BASES[0]), load(BASES[0], file)
    same = {p for p in paths(tree) if not p.startswith('loss_weights.') and value(cfg, p) == value(base, p)}
    whole = {'loss.boundary_ignore_width', 'loss.boundary_soft_width', 'loss.soft_label_value', 'loss.tversky_alpha', 'loss.tversky_beta', 'loss.balance', 'data.extra_bands',
             'data.multi_resolution.factor', 'model.fusion', 'model.extra_encoder', 'model.in_channels'}      # said although it is the default, where the experiment is about it
    assert same <= whole, same - whole

@pytest.mark.parametrize('file', [*BASES, *EXPERIMENTS], ids=lambda p: p.stem)
def test_it_trains(file, world):
    "Two epochs, the first with a frozen backbone; experiments that name no model take the toy's small one"
    base = BASES[0] if file in BASES or 'model' in read_yaml(file) else CONFIGS/'toy.yaml'
    cfg = load(base, file, CONFIGS/'test.yaml', batch_size=6, runs=world/'runs', data=dict(manifest=world/'world'/'manifest.csv'))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        folder = train(cfg)
    rows = read_log(folder)
    assert [r['epoch'] for r in rows] == [1, 2] and rows[-1]['skipped'] == 0
    assert all(math.isfinite(v) for r in rows for k, v in r.items() if k.startswith(('train/loss', 'val/loss')) or k == f'val/{cfg.metrics.monitor}')
    assert {k.removeprefix('train/loss/') for k in rows[0] if k.startswith('train/loss/')} == set(cfg.loss.parts)
    stages = [json.loads(l) for l in (folder/'log.jsonl').read_text().splitlines() if '"stage"' in l]
    assert [s['frozen'] for s in stages] == [['encoder'], []]
    assert rows[0]['lr/encoder'] == 0 < rows[1]['lr/encoder']
    for f in (folder/'checkpoints').iterdir(): f.unlink()      # a ViT-L leaves gigabytes

# --- the table of the guide, nbs/guide.qmd: section → setting → experiment → test → chapter ---

ROWS = [[c.strip() for c in l.strip('|\n').split(' | ')] for l in (ROOT/'nbs'/'guide.qmd').read_text().splitlines() if re.match(r'\| [\d–]', l)]
codes = re.compile(r'`([^`]+)`')
PLACES = ('name', 'runs', 'tracker.', 'data.manifest', 'data.source')                   # where things lie

def leaves(cls=RtsConfig, prefix=''):
    "Every field of the config, and its default"
    for name, f in cls.model_fields.items():
        if hasattr(f.annotation, 'model_fields'): yield from leaves(f.annotation, f'{prefix}{name}.')
        else: yield f'{prefix}{name}', f.get_default(call_default_factory=True)

@functools.cache
def drawn(chapter):
    "The headings of a chapter, as a site names them, below which there is a picture"
    heading, found = '', set()
    for cell in nbformat.read(ROOT/'nbs'/chapter, 4).cells:
        for line in re.findall(r'^#+ (.*)$', cell.source, re.M) if cell.cell_type == 'markdown' else []: heading = re.sub(r'\s', '-', re.sub(r'[^\w\s.-]', '', line)).lower()
        if cell.cell_type == 'code' and any('image/png' in o.get('data', {}) for o in cell.outputs): found.add(heading)
    return found

def test_the_guides_table_names_every_setting_with_its_default():
    from ruamel.yaml import YAML
    default, named = dict(leaves()), set()
    for _, _, settings, *_ in ROWS:
        for text in codes.findall(settings):
            field, eq, value = text.partition(' = '); named.add(field)
            assert field in default, f'{field} is no setting'
            if eq: assert YAML(typ='safe', pure=True).load(value) == (list(v) if isinstance(v := default[field], tuple) else v), f'{text}: the default is {v}'
    left = {f for f in default if f not in named and not f.startswith(PLACES)}
    assert not left, f'the guide table lacks {sorted(left)}'

def test_the_guides_table_names_what_exists():
    sections = {s for s, *_ in ROWS}
    assert sections >= {'3.1', '3.2', '3.3', '5.1', '5.2', '5.3', '5.4', '5.5', '6.1', '6.2', '6.3', '6.4', '7.2', '7.3', '8.3', '9.1', '9.2', '10.1', '10.2', '10.3', '10.4', '10.5', '11.1', '12.1', '12.2', '13'}
    named = set()
    for _, asked, _, experiments, tests, chapter in ROWS:
        assert asked and tests, f'{asked}: a row wants a test'
        for name in codes.findall(experiments):
            named.add(name); assert (CONFIGS/f'{name}.yaml').is_file() or (CONFIGS/'experiments'/f'{name}.yaml').is_file(), name
        for name in codes.findall(tests):
            file, _, function = name.partition('::'); assert re.search(rf'^def {function}\(', (ROOT/'tests'/f'{file}.py').read_text(), re.M), name
        target, _, anchor = re.search(r'\]\(([^)]+)\)', chapter)[1].partition('#')
        assert anchor in drawn(target), f'{asked}: {target} has no figure under #{anchor}, but under {sorted(drawn(target))}'
    assert {p.stem for p in EXPERIMENTS} <= named, {p.stem for p in EXPERIMENTS} - named
