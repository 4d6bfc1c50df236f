"Reads everything from settings.ini, so that name, version, commands and dependencies are written once"
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = ['search', 'track', 'export', 'ray', 'wandb', 'sam', 'crf', 'webdataset', 'series', 'cupy', 'dicom',
          'map', 'notebooks', 'dev']

config = ConfigParser(delimiters=['='])
config.read('settings.ini')
settings = config['DEFAULT']

def lines(key):
    "The entries of a list in settings.ini that has one entry a line"
    return [line.replace(' ', '') for line in settings[key].splitlines() if line.strip()]

def minor(key):
    "11 for Python 3.11"
    return int(settings[key].split('.')[1])

python_versions = range(minor('min_python'), minor('max_python') + 1)

setup(
    name=settings['lib_name'],
    version=settings['version'],
    description=settings['description'],
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=settings['author'],
    keywords=settings['keywords'].split(),
    license='Apache-2.0',
    classifiers=[f'Programming Language :: Python :: 3.{version}' for version in python_versions],
    python_requires=f'>=3.{python_versions[0]},<3.{python_versions[-1] + 1}',
    packages=find_packages(include=['rtsseg', 'rtsseg.*']) + ['rtsseg.configs'],
    # configs/ stays at the top of the repository, and the wheel carries it as rtsseg/configs
    package_dir={'rtsseg.configs': 'configs'},
    package_data={'rtsseg': ['py.typed', 'assets/*'],
                  'rtsseg.configs': ['*.yaml', '*.json', '*/*.yaml', '*/*.py', '*/*/*.yaml']},
    install_requires=lines('requirements'),
    extras_require={extra: lines(f'{extra}_requirements') for extra in EXTRAS},
    entry_points={
        'console_scripts': lines('console_scripts'),
        'nbdev': [f"{settings['lib_name']}={settings['lib_name']}._modidx:d"],
    },
)
