"The library as it is installed: declared dependencies, the lock, sdist and wheel, a new environment"
import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
# those of the lock; crf needs a compiler, and cupy a GPU
EXTRAS = ['search', 'track', 'export', 'ray', 'wandb', 'sam', 'webdataset', 'series', 'dicom', 'map', 'notebooks',
          'dev']
# packages whose import has another name
IMPORTED_AS = {'IPython': 'ipython', 'PIL': 'pillow', 'cupy': 'cupy-cuda13x', 'cv2': 'opencv-python-headless',
               'pydensecrf': 'pydensecrf2', 'ruamel': 'ruamel-yaml'}
# package: the only extra that declares it
OPTIONAL = {'cupy-cuda13x': 'cupy', 'ipython': 'notebooks', 'lonboard': 'map', 'mlflow': 'track', 'onnx': 'export',
            'onnxruntime': 'export', 'optuna': 'search', 'ray': 'ray', 'pydensecrf2': 'crf', 'transformers': 'sam',
            'pydicom': 'dicom', 'wandb': 'wandb', 'zarr': 'series'}

settings = configparser.ConfigParser(delimiters=['='])
settings.read(ROOT/'settings.ini')
settings = settings['DEFAULT']

def requirements(key):
    "The entries of a list of dependencies in settings.ini"
    return [Requirement(line) for line in settings[key].splitlines() if line.strip()]

def names(key):
    "Normalised names of a list of dependencies"
    return {canonicalize_name(requirement.name) for requirement in requirements(key)}

def run(*command, **options):
    "Run a command without this checkout on the path; its output"
    environment = {name: value for name, value in os.environ.items() if name not in ('PYTHONPATH', 'IN_TEST')}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, **options)
    assert done.returncode == 0, f'{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}'
    return done.stdout

def third_party_imports(path):
    "Distributions that a module imports, anywhere in it"
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.append(node.module)
    packages = {module.split('.')[0] for module in modules} - {'rtsseg'}
    return {canonicalize_name(IMPORTED_AS.get(name, name)) for name in packages - sys.stdlib_module_names}

def test_the_library_declares_what_it_imports_and_nothing_else():
    imports = {path.name: third_party_imports(path) for path in (ROOT/'rtsseg').rglob('*.py')}
    declared = names('requirements') | set(OPTIONAL)
    for module, used in imports.items():
        assert used <= declared, f'{module} imports {used - declared}, which settings.ini does not declare'
    unused = declared - set().union(*imports.values())
    assert not unused, f'settings.ini declares {unused}, which no module imports'

@pytest.mark.parametrize('package', OPTIONAL)
def test_an_optional_package_is_declared_by_its_extra_alone(package):
    assert package in names(f'{OPTIONAL[package]}_requirements')
    assert package not in names('requirements')

def test_the_library_imports_without_its_optional_packages():
    "All but rtsseg.tuning, which is about nothing but searches"
    paths = [path.relative_to(ROOT) for path in (ROOT/'rtsseg').rglob('*.py')]
    modules = sorted('.'.join(path.with_suffix('').parts) for path in paths if path.stem not in ('_modidx', 'tuning'))
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({list(OPTIONAL)}))    # None: an import raises ImportError
for module in {modules}:
    importlib.import_module(module)
"""
    run(sys.executable, '-c', code, cwd=ROOT)

def read_lock():
    "{name: (version, hashes)} of requirements.txt"
    found = {}
    for line in (ROOT/'requirements.txt').read_text().splitlines():
        if pin := re.match(r'([\w.-]+)==(\S+)', line):
            hashes = []
            found[canonicalize_name(pin[1])] = (pin[2], hashes)
        elif line.startswith('    --hash=sha256:'):
            hashes.append(line.strip(' \\'))
        else:
            assert line.startswith('#'), line
    return found

@pytest.mark.parametrize('key', ['requirements', *(f'{extra}_requirements' for extra in EXTRAS)])
def test_the_lock_has_each_dependency_in_its_range(key):
    lock = read_lock()
    for requirement in requirements(key):
        version, _ = lock[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f'{requirement}: the lock has {version}'

def test_each_line_of_the_lock_has_a_hash():
    assert all(hashes for _, hashes in read_lock().values())

@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "(sdist, the wheel built from it), from a copy of the files that git knows"
    source = tmp_path_factory.mktemp('source')
    dist = tmp_path_factory.mktemp('dist')
    for name in run('git', 'ls-files', '-co', '--exclude-standard', cwd=ROOT).splitlines():
        if (ROOT/name).is_file():
            (source/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT/name, source/name)
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', dist, source)
    return next(dist.glob('*.tar.gz')), next(dist.glob('*.whl'))

def files_below(folder, patterns=('*',)):
    "Files of a folder of the checkout, as paths relative to it"
    found = {path.relative_to(ROOT/folder).as_posix() for pattern in patterns for path in (ROOT/folder).rglob(pattern)}
    return {name for name in found if '__pycache__' not in name and (ROOT/folder/name).is_file()}

def test_the_sdist_holds_what_a_build_needs(built):
    with tarfile.open(built[0]) as archive:
        held = {name.split('/', 1)[1] for name in archive.getnames() if '/' in name}
    needed = {'setup.py', 'pyproject.toml', 'settings.ini', 'requirements.txt', 'README.md', 'CHANGELOG.md', 'LICENSE'}
    needed |= {f'configs/{name}' for name in files_below('configs')}
    needed |= {f'rtsseg/{name}' for name in files_below('rtsseg')}
    assert needed <= held
    assert not [name for name in held if name.startswith(('tests/', 'benchmarks/', 'nbs/'))]

def test_the_wheel_holds_the_library_and_its_configs(built):
    with zipfile.ZipFile(built[1]) as archive:
        held = set(archive.namelist())
        name = next(name for name in held if name.endswith('.dist-info/METADATA'))
        metadata = Parser().parsestr(archive.read(name).decode())
    library = {f'rtsseg/{name}' for name in files_below('rtsseg')}
    configs = {f'rtsseg/configs/{name}' for name in files_below('configs')}
    assert 'rtsseg/py.typed' in library
    assert {name for name in held if '.dist-info/' not in name} == library | configs
    assert sorted(metadata.get_all('Provides-Extra')) == sorted([*EXTRAS, 'crf', 'cupy'])
    needed = [Requirement(line) for line in metadata.get_all('Requires-Dist')]
    core = {canonicalize_name(requirement.name) for requirement in needed if not requirement.marker}
    assert core == names('requirements')
    pythons = SpecifierSet(metadata['Requires-Python'])
    assert [minor for minor in range(9, 16) if f'3.{minor}' in pythons] == [11, 12, 13]

@pytest.fixture(scope='module')
def environment(built, tmp_path_factory):
    "Folder of the commands of a new environment that holds the wheel, and borrows the dependencies installed here"
    folder = tmp_path_factory.mktemp('environment')
    run(sys.executable, '-m', 'venv', '--without-pip', folder)
    python = folder/'bin'/'python'
    run(sys.executable, '-m', 'pip', '--python', python, 'install', '--quiet', '--no-deps', '--no-index', built[1])
    own = run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip()
    borrowed = {path for path in sys.path if path.endswith('site-packages')}
    # A .pth file of a folder that is named in a .pth file is not read: an editable rtsseg stays out
    Path(own, 'borrowed.pth').write_text('\n'.join(sorted(borrowed)))
    return folder/'bin'

def test_the_installed_library_is_the_wheel(environment, tmp_path):
    code = 'import rtsseg.config; print(rtsseg.config.__file__)'
    assert Path(run(environment/'python', '-c', code, cwd=tmp_path).strip()).is_relative_to(environment.parent)

@pytest.mark.parametrize('command', [line.split('=')[0].strip() for line in settings['console_scripts'].split()])
def test_a_command_of_the_wheel_shows_its_help(environment, tmp_path, command):
    assert f'usage: {command}' in run(environment/command, '--help', cwd=tmp_path)

def test_the_umbrella_command_of_the_wheel(environment, tmp_path):
    assert settings['version'] in run(environment/'rtsseg', '--version', cwd=tmp_path)
    assert 'usage: rtsseg train' in run(environment/'rtsseg', 'train', '--help', cwd=tmp_path)

@pytest.mark.parametrize('names', [['toy'], ['toy', 'experiments/dice']], ids=' '.join)
def test_a_config_of_the_wheel_is_found_by_its_name(environment, tmp_path, names):
    "Its relative paths lead to the folder of the call, not into the installed library"
    code = f'from rtsseg.config import load; cfg = load(*{names}); print(cfg.model.encoder, cfg.runs.resolve())'
    assert run(environment/'python', '-c', code, cwd=tmp_path).split() == ['tu-test_efficientnet', str(tmp_path/'runs')]

# ---------------------------------------------------------------- the container

def instructions():
    "Those of the Dockerfile, with continued lines joined: [(name, argument)]"
    text = re.sub(r'\\\n', ' ', (ROOT/'Dockerfile').read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith('#')]
    return [tuple(line.split(maxsplit=1)) for line in lines]

def test_the_container_runs_as_an_unprivileged_user():
    "What is installed, copied and run after the system's packages"
    names = [name for name, _ in instructions()]
    user, = (argument for name, argument in instructions() if name == 'USER')
    assert user not in ('root', '0')
    as_user = instructions()[names.index('USER'):]
    assert all(argument.startswith(f'--chown={user} ') for name, argument in as_user if name == 'COPY')
    assert as_user[-1][0] == 'CMD'

def test_the_environment_of_the_container_is_a_layer_of_the_lock_alone():
    "Before the sources are copied, so that a change of them does not install it again"
    copies = [argument.split()[1:] for name, argument in instructions() if name == 'COPY']
    assert copies == [['requirements.txt', './'], ['.', '.']]
    commands = [argument for name, argument in instructions() if name == 'RUN']
    assert '--require-hashes -r requirements.txt' in commands[-2]
    assert commands[-1] == 'make install'

def test_the_commands_of_the_dockerfile_are_shell_and_make():
    "Without a container engine: their syntax, and that make knows its targets"
    for name, argument in instructions():
        if name == 'RUN':
            run('bash', '-n', '-c', argument)
    for target in ('install', 'demo', 'test'):
        run('make', '--dry-run', target, cwd=ROOT)

def test_the_container_gets_no_environment_or_data_of_the_checkout():
    ignored = (ROOT/'.dockerignore').read_text().split()
    assert {'.venv', 'data', 'runs'} <= set(ignored)
