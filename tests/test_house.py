"The house rules that a machine can check: imports point backwards, notebooks are clean and buildable, commands explain themselves"
import ast, configparser, importlib, os, re, shutil, subprocess, sys
from pathlib import Path

import nbformat, pytest, yaml

import rtsseg
from rtsseg.cli import COMMANDS, arguments_of, main

ROOT = Path(__file__).resolve().parent.parent
CHAIN = ['04i_check', '05_train', '05a_evaluate', '06_calibrate', '07_report']   # what make demo runs
PARAMETERS = {'config', 'manifest', 'name', 'epochs', 'seed', 'overrides'}
settings = configparser.ConfigParser(delimiters=['=']); settings.read(ROOT/'settings.ini'); settings = settings['DEFAULT']
scripts = [l.strip().split('=') for l in settings['console_scripts'].splitlines() if l.strip()]

def git(*args): return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()

def tracked(): return [f for f in git('ls-files', '-co', '--exclude-standard') if (ROOT/f).is_file()]

notebooks = sorted((p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts), key=lambda p: (p.stem != 'index', p.name))
chapters = [p for p in notebooks if p.stem != 'index']
each_notebook = pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)

def code(path): return [c for c in nbformat.read(path, 4).cells if c.cell_type == 'code']

def directives(cell): return {m[1] for m in re.finditer(r'^#\| *(\S+)', cell.source, re.M)}

def module(path): return next((m[1] for c in code(path) if (m := re.search(r'^#\| *default_exp +(\S+)', c.source, re.M))), None)

# the numbers of the chapters are the import order
ORDER = [module(p) for p in chapters if p.parent.name == 'nbs']

def siblings(name):
    "Modules of the house that an exported module imports, anywhere in it"
    tree, found = ast.parse((ROOT/'rtsseg'/f'{name}.py').read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names if a.name.startswith('rtsseg.')}
        if isinstance(node, ast.ImportFrom) and node.level: found |= {f'rtsseg.{node.module}'} if node.module else {f'rtsseg.{a.name}' for a in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or '').split('.')[0] == 'rtsseg':
            found |= {node.module} if node.module != 'rtsseg' else {f'rtsseg.{a.name}' for a in node.names}
    return {f.split('.')[1] for f in found}

def test_every_room_stands():
    assert sorted(p.stem for p in (ROOT/'rtsseg').glob('*.py') if not p.stem.startswith('_')) == sorted(ORDER)

@pytest.mark.parametrize('name', ORDER)
def test_imports_point_backwards(name):
    used, before = siblings(name), set(ORDER[:ORDER.index(name)])
    assert used <= before, f'{name} imports {sorted(used - before)}, which come after it'

def test_a_module_has_one_notebook():
    "A second notebook with the same default_exp would take the module over at the next export"
    names = [module(p) for p in chapters]
    assert None not in names and len(set(names)) == len(names)

def test_only_known_notebooks():
    assert {p.relative_to(ROOT).as_posix() for p in notebooks} == {f for f in tracked() if f.endswith('.ipynb')}

@each_notebook
def test_a_notebook_is_clean(path):
    nb = nbformat.read(path, 4); text = path.read_text()
    first = nb.cells[0]
    assert first.cell_type == 'markdown' and re.fullmatch(r'# \S.*\n> \S.*', first.source), 'title and description alone: the site drops what else stands in this cell'
    assert nb.metadata.kernelspec.name == 'python3' and nb.metadata.kernelspec.language == 'python'
    assert len(text) < 800_000, f'{len(text)//1000} KB: fewer or smaller pictures'
    if path.stem == 'index': return
    assert re.fullmatch(r'#\| default_exp \S+\n#\| hide', code(path)[0].source)
    assert any(o.get('output_type') == 'display_data' and 'image/png' in o.get('data', {}) for c in code(path) for o in c.outputs), 'a picture'
    assert not any(o.output_type == 'error' for c in code(path) for o in c.outputs)
    exported = [c for c in code(path) if 'export' in directives(c)]
    assert not any(isinstance(n, ast.ImportFrom) and any(a.name == '*' for a in n.names) for c in exported for n in ast.walk(ast.parse(c.source)))

@pytest.mark.parametrize('stem', CHAIN)
def test_notebooks_of_the_chain_take_the_same_parameters(stem):
    tagged = [c for c in code(ROOT/'nbs'/f'{stem}.ipynb') if 'parameters' in c.metadata.get('tags', [])]
    assert len(tagged) == 1
    assert PARAMETERS <= {t.id for n in ast.parse(tagged[0].source).body if isinstance(n, ast.Assign) for t in n.targets}

def test_no_trace_of_a_machine():
    "No absolute path and no host of whoever built this stands in what is published"
    places = re.compile(r'(?<![\w.])/(?:work|tmp|root|home|Users|opt)/\w|/site-packages/')
    hosts = re.compile(r'index-url|find-links|trusted-host|://(?!quarto\.org)')
    found = []
    for f in tracked():
        if Path(f).suffix in ('.png', '.tif', '.safetensors'): continue
        text = re.sub(r'"image/png": "[^"]*"', '', (ROOT/f).read_text())
        if f != 'tests/test_house.py': found += [f'{f}: {m[0]}' for m in places.finditer(text)]
        if f.startswith('requirements') or f in ('Makefile', 'Dockerfile', 'setup.py', 'settings.ini'): found += [f'{f}: {m[0]}' for m in hosts.finditer(text)]
    assert not found, '\n'.join(found)

@pytest.mark.parametrize('name', COMMANDS)
def test_a_command_explains_its_arguments(name):
    for argument in arguments_of(COMMANDS[name].__wrapped__):
        assert argument.help, f'rtsseg-{name}: --{argument.name} has no line of help'

def test_commands_are_installed():
    assert dict(scripts) == {'rtsseg': 'rtsseg.cli:main'} | {f'rtsseg-{name}': f'rtsseg.cli:rtsseg_{name}' for name in COMMANDS}
    for command in ('rtsseg', 'rtsseg-report'):
        done = subprocess.run([Path(sys.executable).parent/command, '--help'], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and f'usage: {command}' in done.stdout, done.stderr

def test_what_commands_import_is_there():
    "Their imports stand inside the functions, where only a call would find a mistake"
    tree = ast.parse((ROOT/'rtsseg/cli.py').read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or '', 'rtsseg') if not node.level else importlib.import_module(f'rtsseg.{node.module}')
            for name in node.names:
                assert hasattr(module, name.name), f'{node.module}.{name.name}'

def imported_by(code):
    "Names of the modules that a piece of code imports, in a Python of its own"
    program = f'import sys\n{code}\nprint(*sys.modules, file=sys.stderr)'
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stderr.splitlines()[-1].split())

@pytest.mark.parametrize('line', [[], ['--version'], *([name, '--help'] for name in COMMANDS)], ids=' '.join)
def test_arguments_are_parsed_without_heavy_imports(line):
    "So that --help answers at once"
    code = f'import rtsseg.cli\ntry: rtsseg.cli.main({line})\nexcept SystemExit: pass'
    assert not {'torch', 'pandas', 'numpy', 'pydantic', 'rtsseg.config'} & imported_by(code)

def test_the_library_is_imported_when_it_is_used():
    "`import rtsseg` is instant, offers seven names, and knows no others"
    assert not {'torch', 'pandas', 'numpy', 'rtsseg.config'} & imported_by('import rtsseg; dir(rtsseg)')
    assert rtsseg.__all__ == sorted(rtsseg.__all__) and set(rtsseg.__all__) <= set(dir(rtsseg))
    for name in rtsseg.__all__:
        assert getattr(rtsseg, name).__name__ == name
    with pytest.raises(AttributeError, match='nothing'):
        rtsseg.nothing

def test_a_config_is_read_without_torch():
    assert 'torch' not in imported_by('import rtsseg; rtsseg.load("configs/toy.yaml")')

@pytest.mark.parametrize('line, code, words', [
    (['--version'], 0, f'rtsseg {rtsseg.__version__}'),
    ([], 0, 'usage: rtsseg COMMAND'),
    (['trian'], 2, "error: no such command: 'trian' (did you mean 'train'?)"),
    (['check', '--config', 'tooy'], 2, "did you mean 'toy'?"),
    (['check', '--override', 'epochs=many', '--override', 'lr.bse_lr=1'], 2, "'base_lr'"),
])
def test_the_umbrella(capsys, line, code, words):
    assert main(line) == code
    said = capsys.readouterr()
    assert words in said.out + said.err

def test_readme_opens_with_the_two_commands():
    text = (ROOT/'README.md').read_text(); top = text[:1500]
    assert 0 < top.index('make demo') < top.index('make test') < top.index('![') < top.index('```python')
    assert len(re.search(r'```python\n(.*?)```', text, re.S)[1].strip().splitlines()) == 5
    for target in re.findall(r'\]\((?!\w+:|#)([^)]+)\)', text): assert (ROOT/target).is_file(), target
    picture = ROOT/re.search(r'!\[[^]]*\]\(([^)]+)\)', text)[1]; assert picture.stat().st_size < 150_000
    for p in chapters: assert f'({p.relative_to(ROOT).as_posix()})' in text, f'the table of chapters lacks {p.name}'
    for command, _ in scripts: assert command in text

def test_every_fault_has_its_test():
    "What the page of faults promises is shown, and what is shown is promised"
    sys.path.insert(0, str(ROOT)); import sync; sys.path.pop(0)
    groups = sync.faults(ROOT); assert all(title for title, *_ in groups)
    assert [k for _, table, _ in groups for k in table if isinstance(k, int)] == list(range(1, 43))
    for title, table, shown in groups: assert set(shown) == set(table), f'{title}: {set(shown) ^ set(table)}'
    page = (ROOT/'nbs'/'survives.qmd').read_text(); assert all(name in page for _, _, shown in groups for tests in shown.values() for name, _ in tests)

def test_the_site_can_be_built(tmp_path):
    "All of nbdev's work for the site, in a copy, with a Quarto that only says that it was called"
    site = tmp_path/'site'
    for f in tracked(): (site/f).parent.mkdir(parents=True, exist_ok=True); shutil.copy2(ROOT/f, site/f)
    quarto = tmp_path/'bin'/'quarto'; quarto.parent.mkdir()
    quarto.write_text('#!/bin/sh\nmkdir -p _docs && echo "$@" > _docs/called\n'); quarto.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | {'PATH': f'{quarto.parent}:{Path(sys.executable).parent}:{os.environ["PATH"]}'}
    readme = (site/'README.md').read_text(); (site/'README.md').touch()   # as make docs does
    done = subprocess.run(['nbdev_docs', '--n_workers', '2'], cwd=site, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (site/'_docs/called').read_text().split()[0] == 'render' and (site/'README.md').read_text() == readme
    stub = yaml.safe_load((site/'_proc/_quarto.yml').read_text()); files = [site/'_proc'/f for f in stub['metadata-files']]
    whole = [yaml.safe_load(f.read_text()) for f in files]
    assert stub['project']['output-dir'] == '_docs' and all(w.get('project', {}).get('type', 'website') == 'website' for w in whole)
    assert any(w.get('website', {}).get('title') == 'rtsseg' for w in whole)
    assert not any('commonmark' in w.get('format', {}) for w in whole)
    assert all((site/'_proc'/link['href']).is_file() for w in whole for link in w.get('website', {}).get('navbar', {}).get('left', []))
    names = [p.relative_to(ROOT/'nbs').as_posix() for p in notebooks]
    listed = next(w['website']['sidebar']['contents'] for w in whole if 'contents' in w.get('website', {}).get('sidebar', {}))
    assert [l for l in listed if isinstance(l, str)] == [n for n in names if '/' not in n] and listed[0] == 'index.ipynb'
    for name in names:
        cells = nbformat.read(site/'_proc'/name, 4).cells; text = '\n'.join(c.source for c in cells)
        assert cells[0].source.startswith('---') and yaml.safe_load(cells[0].source.strip().strip('-'))['title']
        for c in code(ROOT/'nbs'/name):   # what is exported can be read on its page
            if 'export' in directives(c): assert c.source.split('\n', 1)[1].strip() in text
        assert not re.search(r'^#\| *(?:default_exp|export|hide)', text, re.M)
        links = [t for c in cells if c.cell_type == 'markdown' for t in re.findall(r'\]\((?!\w+:|#)([^)#]+)', c.source)]
        for target in links: assert (site/'_proc'/Path(name).parent/target).is_file(), f'{name}: {target}'
