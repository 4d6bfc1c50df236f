"The rules of the library that a machine can check: imports, notebooks, plain code, commands, README and site"
import ast
import configparser
import importlib
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import nbformat
import pytest
import yaml

import rtsseg
from helpers import style
from rtsseg.cli import COMMANDS, arguments_of, main

ROOT = Path(__file__).resolve().parent.parent

# the chapters that `make demo` runs, and the parameters that they share
CHAIN = ['04i_check', '05_train', '05a_evaluate', '06_calibrate', '07_report', '08z_map']
PARAMETERS = {'config', 'manifest', 'name', 'epochs', 'seed', 'overrides'}

settings = configparser.ConfigParser(delimiters=['='])
settings.read(ROOT/'settings.ini')
settings = settings['DEFAULT']
scripts = dict(line.strip().split('=') for line in settings['console_scripts'].splitlines() if line.strip())

# ---------------------------------------------------------------- files and notebooks
def git(*arguments):
    done = subprocess.run(['git', *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()

def tracked():
    "Files of the repository, new ones included"
    return [name for name in git('ls-files', '-co', '--exclude-standard') if (ROOT/name).is_file()]

def code_cells(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == 'code']

def directives(cell):
    "{'export', 'hide', …}"
    return set(re.findall(r'^#\| *(\S+)', cell.source, re.MULTILINE))

@cache
def module(path):
    "The module that a notebook is exported to"
    for cell in code_cells(path):
        if match := re.search(r'^#\| *default_exp +(\S+)', cell.source, re.MULTILINE):
            return match[1]

def by_number(path):
    "index first, then by number"
    return path.stem != 'index', path.name

notebooks = [path for path in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in path.parts]
notebooks.sort(key=by_number)
tutorials = [path for path in notebooks if path.parent.name == 'tutorials']
chapters = [path for path in notebooks if path.stem != 'index' and path not in tutorials]
each_notebook = pytest.mark.parametrize('path', notebooks, ids=lambda path: path.stem)
each_chapter = pytest.mark.parametrize('path', chapters, ids=lambda path: path.stem)
each_tutorial = pytest.mark.parametrize('path', tutorials, ids=lambda path: path.stem)

# the numbers of the chapters are the import order
ORDER = [module(path) for path in chapters if path.parent.name == 'nbs']
SYSTEMS = [module(path) for path in chapters if path.parent.name == 'systems']

def test_a_module_has_one_notebook():
    "A second notebook with the same default_exp would take the module over at the next export"
    names = [module(path) for path in chapters]
    assert None not in names
    assert len(set(names)) == len(names)

def test_each_module_has_a_notebook():
    files = [path.relative_to(ROOT/'rtsseg').with_suffix('') for path in (ROOT/'rtsseg').rglob('*.py')]
    modules = ['.'.join(file.parts) for file in files if not file.stem.startswith('_')]
    assert sorted(modules) == sorted(ORDER + SYSTEMS)

def test_only_known_notebooks():
    names = {path.relative_to(ROOT).as_posix() for path in notebooks}
    assert names == {name for name in tracked() if name.endswith('.ipynb')}

@each_notebook
def test_a_notebook_is_clean(path):
    notebook = nbformat.read(path, 4)
    # the site drops what else stands in the first cell
    first = notebook.cells[0]
    assert first.cell_type == 'markdown'
    assert re.fullmatch(r'# \S.*\n> \S.*', first.source), 'title and description, and nothing else'
    assert notebook.metadata.kernelspec.name == 'python3'
    assert notebook.metadata.kernelspec.language == 'python'
    size = path.stat().st_size
    assert size < 800_000, f'{size // 1000} KB: fewer or smaller pictures'
    assert not any(output.output_type == 'error' for cell in code_cells(path) for output in cell.outputs)

def has_picture(cell):
    return any(kind.startswith('image/') for output in cell.outputs for kind in output.get('data', {}))

@each_chapter
def test_a_chapter_opens_with_a_picture(path):
    "Before its first exported cell"
    cells = code_cells(path)
    assert re.fullmatch(r'#\| default_exp \S+\n#\| hide', cells[0].source)
    exported = [at for at, cell in enumerate(cells) if 'export' in directives(cell)]
    assert any(has_picture(cell) for cell in cells[:exported[0]])

@each_tutorial
def test_a_tutorial_is_short_and_shows_what_it_does(path):
    "About ten steps, a picture, and checks of what the text says; it exports nothing"
    cells = code_cells(path)
    assert not any({'export', 'default_exp'} & directives(cell) for cell in cells)
    assert 8 <= len([cell for cell in cells if 'hide' not in directives(cell)]) <= 14
    assert any(has_picture(cell) for cell in cells)
    assert any(isinstance(node, ast.Assert) for cell in cells for node in ast.walk(ast.parse(cell.source)))

@each_chapter
def test_exported_code_names_what_it_imports(path):
    for cell in code_cells(path):
        if 'export' in directives(cell):
            for node in ast.walk(ast.parse(cell.source)):
                names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
                assert '*' not in names, cell.source

@pytest.mark.parametrize('stem', CHAIN)
def test_chapters_of_the_main_job_take_the_same_parameters(stem):
    cells = code_cells(ROOT/'nbs'/f'{stem}.ipynb')
    tagged = [cell for cell in cells if 'parameters' in cell.metadata.get('tags', [])]
    assert len(tagged) == 1
    assignments = [node for node in ast.parse(tagged[0].source).body if isinstance(node, ast.Assign)]
    assert PARAMETERS <= {target.id for node in assignments for target in node.targets}

def test_no_trace_of_a_machine():
    "Nothing that is published holds an absolute path, or a host of a private network"
    places = re.compile(r'(?<![\w.])/(?:work|tmp|root|home|Users|opt)/\w|/site-packages/')
    hosts = re.compile(r'index-url|find-links|trusted-host|://(?!quarto\.org)')
    found = []
    for name in tracked():
        if Path(name).suffix in ('.png', '.tif', '.safetensors') or name == 'tests/test_house.py':
            continue
        text = re.sub(r'"image/png": "[^"]*"', '', (ROOT/name).read_text())
        found += [f'{name}: {match[0]}' for match in places.finditer(text)]
        if name.startswith('requirements') or name in ('Makefile', 'Dockerfile', 'setup.py', 'settings.ini'):
            found += [f'{name}: {match[0]}' for match in hosts.finditer(text)]
    assert not found, '\n'.join(found)

# ---------------------------------------------------------------- rooms and walls
WINGS = {
    'core': 'console files config runs',
    'data': 'ground raster vrt rawtile columns explore manifest splits stats findings audit filecheck importers '
            'folders toy pretrained windows prepare stage card class_world leaf_world photos shards season '
            'series series_stats exams phantom',
    'feed': 'sampler augment tiles mixing order class_tiles photo_feed series_feed exam_feed',
    'measure': 'scores shapes rowgroups evidence metrics objects outlines bootstrap intervals class_metrics '
               'plant_metrics cleanup survival_metrics',
    'learn': 'losses class_losses models weights infer checkpoint workers processes schedule loop budget sliding '
             'label_losses routed distil refine series_models registration risk_models',
    'seam': 'system',
    'task': 'segment mirrors track launch check class_checks log noise resume observe ensemble training '
            'evaluation plan routed_runs blend land_words outline_trial class_ensemble exam_runs exam_begin '
            'exam_splits',
    'judge': 'operating calibration styles page invented results shared pixel_results tables figures verdict errormap '
             'pixel_report class_report plant_report risk_report reporting',
    'maps': 'mapfile scenestats regions prediction polygons areas estimates review export mapcheck preview '
            'claims scenelist fleet joins relearn mosaic rayengine cost class_export class_predict '
            'tour',
    'search': 'variants ablation tuning sequence',
    'commands': 'cli',
}

# what a wing may import beside itself
MAY_IMPORT = {
    'core': '',
    'data': 'core',
    'feed': 'core data',
    'measure': 'core',
    'learn': 'core data',
    'seam': 'core measure',
    'task': 'core data feed measure learn seam',
    'judge': 'core data feed measure seam',
    'maps': 'core data feed measure learn seam judge task',
    'search': 'core data feed learn seam task judge',
    'commands': ' '.join(WINGS),
    'systems': 'core data feed measure learn seam judge task',
}

WING_OF = {room: wing for wing, rooms in WINGS.items() for room in rooms.split()}
WING_OF |= {name: 'systems' for name in SYSTEMS}

def absolute_name(node, package):
    "The module that an import statement names"
    if not node.level:
        return node.module
    above = package[:len(package) - node.level + 1]
    return '.'.join(above + [node.module] if node.module else above)

@cache
def siblings(name):
    "Modules of the library that an exported module imports, anywhere in it"
    path = ROOT/'rtsseg'/f'{name.replace(".", "/")}.py'
    package, found = ['rtsseg', *name.split('.')[:-1]], set()
    tree = ast.parse(path.read_text())
    # what a type checker alone imports does not count
    tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(absolute_name(node, package))
    return {full.removeprefix('rtsseg.') for full in found if full.startswith('rtsseg.')}

def reachable(name):
    "All modules of the library that importing one brings along"
    found, new = set(), {name}
    while new:
        found |= new
        new = set().union(*map(siblings, new)) - found
    return found - {name}

@pytest.mark.parametrize('name', ORDER)
def test_imports_point_backwards(name):
    later = siblings(name) - set(ORDER[:ORDER.index(name)])
    assert not later, f'{name} imports {sorted(later)}, which come after it'

@pytest.mark.parametrize('name', ORDER + SYSTEMS)
def test_a_wing_imports_what_it_may(name):
    assert name in WING_OF, f'{name} is in none of the wings above'
    wing = WING_OF[name]
    allowed = {wing, *MAY_IMPORT[wing].split()} - {'systems'}
    beyond = {other: WING_OF[other] for other in siblings(name) if WING_OF.get(other) not in allowed}
    assert not beyond, f'{name} ({wing}) imports {beyond}'

def test_no_chapter_imports_a_system():
    "Train, evaluate, report and search serve every system; a config names the one that is meant"
    for name in ORDER:
        assert not {other for other in reachable(name) if other.startswith('systems')}, name

def test_systems_do_not_import_each_other():
    for name in SYSTEMS:
        assert not {other for other in siblings(name) if other.startswith('systems')}, name

TRAINER = {'loop', 'schedule', 'checkpoint', 'training', 'check', 'segment'}

@pytest.mark.parametrize('name', ['prediction', 'export', 'results', 'reporting', 'calibration', 'evidence'])
def test_using_a_model_needs_no_trainer(name):
    assert not reachable(name) & TRAINER

ON_ANY_PLATFORM = """
import sys
for name in ('fcntl', 'resource', 'termios', 'pwd'):
    sys.modules[name] = None
import rtsseg.evidence, rtsseg.results, rtsseg.reporting, rtsseg.prediction, rtsseg.cli
"""

def test_results_are_read_on_any_platform():
    "Modules that only Unix has are imported where they are used"
    done = subprocess.run([sys.executable, '-c', ON_ANY_PLATFORM], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr

def public(tree):
    "Public functions and classes of a module, and public methods of its public classes: (qualified name, node)"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                methods = [method for method in node.body if isinstance(method, ast.FunctionDef)]
                yield from ((f'{node.name}.{m.name}', m) for m in methods if not m.name.startswith('_'))

def lacks(node):
    "What a definition lacks: its docstring, or annotations"
    missing = [] if ast.get_docstring(node) else ['a docstring']
    if isinstance(node, ast.FunctionDef):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        names = [argument.arg for argument in arguments if not argument.annotation]
        missing += [name for name in names if name not in ('self', 'cls')]
        missing += [] if node.returns else ['what it returns']
    return missing

@pytest.mark.parametrize('name', ORDER + SYSTEMS)
def test_public_definitions_are_annotated_and_described(name):
    tree = ast.parse((ROOT/'rtsseg'/f'{name.replace(".", "/")}.py').read_text())
    missing = {where: lacks(node) for where, node in public(tree)}
    lines = [f'{where}: {", ".join(found)}' for where, found in missing.items() if found]
    assert not lines, '\n'.join(lines)

def defined(tree):
    "Names that a module defines itself"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))

def test_a_public_name_means_one_thing():
    "No two rooms define it"
    rooms = {}
    for room in ORDER + SYSTEMS:
        for name in defined(ast.parse((ROOT/'rtsseg'/f'{room.replace(".", "/")}.py').read_text())):
            if not name.startswith('_'):
                rooms.setdefault(name, set()).add(room)
    several = {name: sorted(found) for name, found in rooms.items() if len(found) > 1}
    assert not several, several

# ---------------------------------------------------------------- plain code and plain words
CODE = [*notebooks, *(ROOT/name for name in tracked() if name.endswith('.py') and not name.startswith('rtsseg/'))]
PROSE = [*notebooks, *(ROOT/name for name in tracked() if name.endswith(('.md', '.qmd')))]
by_name = dict(ids=lambda path: path.relative_to(ROOT).as_posix())

@pytest.mark.parametrize('path', CODE, **by_name)
def test_code_is_plain(path):
    found = []
    for where, source, is_exported in style.sources(path):
        found += [f'{where}:{line}: {what}' for line, what in style.violations(source, is_exported)]
    assert not found, '\n'.join(found)

@pytest.mark.parametrize('path', CODE, **by_name)
def test_words_of_code_are_plain(path):
    found = []
    for where, source, _ in style.sources(path):
        found += [f'{where}:{line}: {what}' for line, what in style.odd_words(source)]
    assert not found, '\n'.join(found)

@pytest.mark.parametrize('path', PROSE, **by_name)
def test_words_are_plain(path):
    found = [f'{where}: {word}' for where, text in style.prose(path) for word in style.ODD_WORDS.findall(text)]
    assert not found, '\n'.join(found)

@pytest.mark.parametrize('source, words', [
    ('x = 1' + ' + 1' * 30, '125 columns'),
    ('# ' + 'x' * 100, 'a comment of 102 columns'),
    ('a = 1; b = 2', 'share a line'),
    ('if a: b = 1; c = 2', 'share a line'),
    ('x = 1 if a else 2 if b else 3', 'inside another'),
    ('x = [f(1 if a else 2) if b else 3]', 'inside another'),
    ("x = 's' * (n > 1)", 'times a condition'),
    ('x = (not a) * [1]', 'times a condition'),
    ("x = f'{a}' * bool(b)", 'times a condition'),
    ('x = y + (y := 1)', 'read before the walrus'),
    ('while y + (y := 1):\n    x = 1', 'read before the walrus'),
    ('x = 1  # why', 'behind code'),
    ('def f():\n' + '    x = 1\n' * 50, 'f has 51 lines'),
])
def test_each_rule_finds_its_violation(source, words):
    assert [words in what for _, what in style.violations(source, is_exported=True)] == [True]

@pytest.mark.parametrize('source', [
    'x = 1 if a else 2',
    "x = 's' * n",
    'if (y := f()):\n    print(y)',
    'def f():\n' + '    x = 1\n' * 49,
    'x = [\n    1,\n]\ny = 2',
    '#| export',
    'def f(x:int    # what it is\n     ):\n    return x',
    'class A:\n    x: int = 1    # what it is',
])
def test_plain_code_passes(source):
    assert style.violations(source, is_exported=True) == []

# ---------------------------------------------------------------- commands
@pytest.mark.parametrize('name', COMMANDS)
def test_a_command_explains_its_arguments(name):
    for argument in arguments_of(COMMANDS[name].__wrapped__):
        assert argument.help, f'rtsseg-{name}: --{argument.name} has no line of help'

def test_commands_are_installed():
    commands = {f'rtsseg-{name}': f'rtsseg.cli:rtsseg_{name.replace("-", "_")}' for name in COMMANDS}
    assert scripts == {'rtsseg': 'rtsseg.cli:main'} | commands
    for command in ('rtsseg', 'rtsseg-report'):
        program = [Path(sys.executable).parent/command, '--help']
        done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert f'usage: {command}' in done.stdout

SHOW_HASH_SEED = "import atexit; atexit.register(lambda: print('hash', hash('a text')))"

EVERY_COMMAND = ['rtsseg', *(f'rtsseg-{name}' for name in COMMANDS)]

@pytest.mark.parametrize('command, given', [('rtsseg', '7'), *((command, None) for command in EVERY_COMMAND)])
def test_every_command_has_a_hash_seed(tmp_path, command, given):
    "42 where the shell set none; what it set stays"
    (tmp_path/'sitecustomize.py').write_text(SHOW_HASH_SEED)
    clean = {name: value for name, value in os.environ.items() if name != 'PYTHONHASHSEED'} | dict(PYTHONPATH=tmp_path)
    seed = {} if given is None else dict(PYTHONHASHSEED=given)

    def hash_of(program, env):
        return subprocess.run(program, env=env, capture_output=True, text=True).stdout.splitlines()[-1]

    wanted = hash_of([sys.executable, '-c', ''], clean | dict(PYTHONHASHSEED=given or '42'))
    assert wanted.startswith('hash ')
    assert hash_of([Path(sys.executable).parent/command, '--help'], clean | seed) == wanted

IMPORT_LATE = [ROOT/'rtsseg/cli.py', *sorted((ROOT/'benchmarks').glob('*.py'))]

@pytest.mark.parametrize('path', IMPORT_LATE, ids=lambda path: path.stem)
def test_what_a_script_imports_is_there(path):
    "Commands import inside of functions, and no test runs the benchmarks: only a call would find a mistake"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.startswith('rtsseg')):
            found = importlib.import_module(absolute_name(node, ['rtsseg']))
            for alias in node.names:
                assert hasattr(found, alias.name), f'{node.module}.{alias.name}'

def imported_by(code):
    "Names of the modules that a piece of code imports, in a Python of its own"
    program = f'import sys\n{code}\nprint(*sys.modules, file=sys.stderr)'
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stderr.splitlines()[-1].split())

HEAVY = {'torch', 'pandas', 'numpy', 'pydantic', 'rtsseg.config'}
HELP = [[], ['--version'], *([name, '--help'] for name in COMMANDS)]

@pytest.mark.parametrize('line', HELP, ids=' '.join)
def test_arguments_are_parsed_without_heavy_imports(line):
    "So that --help answers at once"
    code = f'import rtsseg.cli\ntry:\n    rtsseg.cli.main({line})\nexcept SystemExit:\n    pass'
    assert not HEAVY & imported_by(code)

def test_the_library_is_imported_when_it_is_used():
    "`import rtsseg` is instant, offers seven names, and knows no others"
    assert not HEAVY & imported_by('import rtsseg; dir(rtsseg)')
    assert set(rtsseg.__all__) <= set(dir(rtsseg))
    for name in rtsseg.__all__:
        assert getattr(rtsseg, name).__name__ == name
    assert not hasattr(rtsseg, 'nothing')

def test_a_type_checker_sees_what_is_imported_later():
    "The names of `__all__`, of the lazy table and of the imports for type checkers agree"
    tree = ast.parse((ROOT/'rtsseg/__init__.py').read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imports = [node for node in imports if node.module.startswith('rtsseg.')]
    shown = {alias.name: node.module for node in imports for alias in node.names}
    assert set(shown) == set(rtsseg.__all__)
    for name, module_name in shown.items():
        assert getattr(rtsseg, name) is getattr(importlib.import_module(module_name), name)

def test_a_config_is_read_without_torch():
    assert 'torch' not in imported_by('import rtsseg; rtsseg.load("toy")')

@pytest.mark.parametrize('line, code, words', [
    (['--version'], 0, f'rtsseg {rtsseg.__version__}'),
    ([], 0, 'usage: rtsseg COMMAND'),
    (['trian'], 2, "error: no such command: 'trian' (did you mean 'train'?)"),
    (['check', '--config', 'tooy'], 2, "did you mean 'toy'?"),
    (['check', '--override', 'epochs=many', '--override', 'lr.bse_lr=1'], 2, "'base_lr'"),
])
def test_the_umbrella(capsys, line, code, words):
    assert main(line) == code
    printed = capsys.readouterr()
    assert words in printed.out + printed.err

# ---------------------------------------------------------------- README
def readme():
    return (ROOT/'README.md').read_text()

def test_readme_opens_with_the_two_commands():
    top = readme()[:1500]
    assert 0 < top.index('make demo') < top.index('make test') < top.index('![') < top.index('```python')

def test_links_and_pictures_of_the_readme_are_there():
    for target in re.findall(r'\]\((?!\w+:|#)([^)]+)\)', readme()):
        assert (ROOT/target).is_file(), target
        assert not target.endswith('.png') or (ROOT/target).stat().st_size < 150_000, target

def test_readme_lists_chapters_and_commands():
    "And tutorials"
    for path in chapters + tutorials:
        title, description = nbformat.read(path, 4).cells[0].source.split('\n')
        row = f'| [{title[2:]}]({path.relative_to(ROOT).as_posix()}) | {description[2:]} |'
        assert row in readme(), f'the tables of tutorials and chapters lack {row}'
    for command in scripts:
        assert command in readme()

# ---------------------------------------------------------------- pages
def test_every_fault_has_its_test():
    "What the page of faults promises is shown, and what is shown is promised"
    sys.path.insert(0, str(ROOT))
    import sync
    sys.path.pop(0)
    groups = sync.faults(ROOT)
    page = (ROOT/'nbs'/'survives.qmd').read_text()
    assert all(title for title, *_ in groups)
    numbers = [key for _, table, _ in groups for key in table if isinstance(key, int)]
    assert numbers == list(range(1, 49))
    for title, table, shown in groups:
        assert set(shown) == set(table), f'{title}: {set(shown) ^ set(table)}'
        for tests in shown.values():
            assert all(name in page for name, _ in tests)

def copy_tree(target):
    for name in tracked():
        (target/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/name, target/name)

FAKE_QUARTO = '#!/bin/sh\nmkdir -p _docs && echo "$@" > _docs/called\n'

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "A copy of the repository after all of nbdev's work for the site, with a Quarto that only says that it was called"
    home = tmp_path_factory.mktemp('site')
    copy_tree(home/'site')
    quarto = home/'bin'/'quarto'
    quarto.parent.mkdir()
    quarto.write_text(FAKE_QUARTO)
    quarto.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != 'IN_TEST'}
    environment['PATH'] = f'{quarto.parent}:{Path(sys.executable).parent}:{os.environ["PATH"]}'
    environment['PYTHONPATH'] = str(home/'site')
    # as make docs does, so that nbdev writes no README of its own
    (home/'site'/'README.md').touch()
    command = ['nbdev_docs', '--n_workers', '2']
    done = subprocess.run(command, cwd=home/'site', env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return home/'site'

def site_settings(site):
    "What Quarto reads: the stub, and the files that it names"
    stub = yaml.safe_load((site/'_proc/_quarto.yml').read_text())
    return stub, [yaml.safe_load((site/'_proc'/name).read_text()) for name in stub['metadata-files']]

def site_cells(site, path):
    "Cells of a page as Quarto gets it"
    return nbformat.read(site/'_proc'/path.relative_to(ROOT/'nbs'), 4).cells

def front_matter(cells):
    return yaml.safe_load(cells[0].source.strip().strip('-'))

@pytest.mark.slow
def test_the_site_can_be_built(site):
    stub, parts = site_settings(site)
    assert (site/'_docs/called').read_text().split()[0] == 'render'
    assert (site/'README.md').read_text() == readme()
    assert stub['project']['output-dir'] == '_docs'
    for part in parts:
        assert part.get('project', {}).get('type', 'website') == 'website'
        assert 'commonmark' not in part.get('format', {})
        for link in part.get('website', {}).get('navbar', {}).get('left', []):
            assert (site/'_proc'/link['href']).is_file()
    assert any(part.get('website', {}).get('title') == 'rtsseg' for part in parts)

def pages_below(contents):
    "The pages of a sidebar, sections opened"
    for entry in contents:
        if isinstance(entry, str):
            yield entry
        else:
            yield from pages_below(entry['contents'])

@pytest.mark.slow
def test_the_sidebar_lists_all_pages(site):
    "Each once: notebooks, and pages in Markdown"
    sidebars = [part.get('website', {}).get('sidebar', {}) for part in site_settings(site)[1]]
    listed = [*pages_below(next(sidebar['contents'] for sidebar in sidebars if 'contents' in sidebar))]
    assert listed[0] == 'index.ipynb'
    pages = [*notebooks, *(ROOT/'nbs').rglob('*.qmd')]
    assert sorted(listed) == sorted(path.relative_to(ROOT/'nbs').as_posix() for path in pages)

@pytest.mark.parametrize('folder', ['.', 'systems', 'tutorials'])
def test_pages_have_names_of_their_own(folder):
    "nbdev drops the number of a chapter: two that differ by it alone would be one page"
    paths = [path for path in (ROOT/'nbs'/folder).iterdir() if path.suffix in ('.ipynb', '.qmd')]
    names = [re.sub(r'^\d+[a-z]*_', '', path.stem) for path in paths]
    assert sorted(names) == sorted(set(names))

@pytest.mark.slow
@each_chapter
def test_code_and_tests_are_folded_behind_what_they_define(site, path):
    "Each exported cell comes after the entries of its definitions, and opens on a click; so do cells of tests"
    cells = site_cells(site, path)
    for at, cell in enumerate(cells):
        if cell.source.startswith('#| code-fold: true\n#| code-summary: "Source"'):
            public = [node.name for node in ast.parse(cell.source).body
                      if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != '_']
            before = '\n'.join(entry.source for entry in cells[at - len(public):at])
            assert all(f'{{#api-{name}}}' in before for name in public)
    folded = sum('#| code-summary: "Source"' in cell.source for cell in cells)
    assert folded == sum('export' in directives(cell) for cell in code_cells(path))

@pytest.mark.slow
@each_notebook
def test_a_page_shows_its_code(site, path):
    cells = site_cells(site, path)
    text = '\n'.join(cell.source for cell in cells)
    assert front_matter(cells)['title']
    for cell in code_cells(path):
        if 'export' in directives(cell):
            assert cell.source.split('\n', 1)[1].strip() in text
    assert not re.search(r'^#\| *(?:default_exp|export|hide)', text, re.MULTILINE)

@pytest.mark.slow
@each_chapter
def test_a_page_describes_what_it_exports(site, path):
    "Each public function and class has an entry with its signature or its fields"
    text = '\n'.join(cell.source for cell in site_cells(site, path))
    for cell in code_cells(path):
        if 'export' in directives(cell):
            for node in ast.parse(cell.source).body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != '_':
                    assert f'### `{node.name}` {{#api-{node.name}}}' in text

@pytest.mark.slow
def test_links_of_the_site_resolve(site):
    "To files, and to entries of the reference"
    anchors = {}
    for path in notebooks:
        cells = site_cells(site, path)
        folder = (site/'_proc'/path.relative_to(ROOT/'nbs')).parent
        page = front_matter(cells).get('output-file', f'{path.stem}.html')
        text = '\n'.join(cell.source for cell in cells if cell.cell_type == 'markdown')
        anchors[folder/page] = folder, text, set(re.findall(r'\{#([^}]+)\}', text))
    for folder, text, _ in anchors.values():
        for target in re.findall(r'\]\((?!\w+:|#)([^)]+)\)', text):
            file, _, anchor = target.partition('#')
            place = Path(os.path.normpath(folder/file))
            if place in anchors:
                assert anchor in anchors[place][2], target
            else:
                assert place.is_file(), target
