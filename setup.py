"Reads everything from settings.ini, so that name, version and commands are written once"
from configparser import ConfigParser
from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=['=']); cfg.read('settings.ini'); s = cfg['DEFAULT']
setup(name=s['lib_name'], version=s['version'], description=s['description'], keywords=s['keywords'].split(), license='Apache-2.0',
      packages=find_packages(include=['rtsseg', 'rtsseg.*']), python_requires=f">={s['min_python']}",
      install_requires=open('requirements.in').read().split(), include_package_data=True,
      entry_points={'console_scripts': [l.replace(' ', '') for l in s['console_scripts'].split('\n') if l.strip()],
                    'nbdev': [f"{s['lib_name']}={s['lib_name']}._modidx:d"]})
