"""Pages of the site that follow from the code: the sidebar, every setting of a config, every command

`python pages.py` writes them into nbs; `python pages.py --check FOLDER` looks for broken links in a rendered site,
and for what its pages load from other hosts."""
import json
import re
import sys
from html.parser import HTMLParser
from inspect import signature
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent
NBS = ROOT/'nbs'

# ---------------------------------------------------------------- the sidebar

START = ['index.ipynb', 'glossary.qmd']
REFERENCE = ['configuration.qmd', 'commands.qmd', 'survives.qmd', 'supply_chain.qmd', 'add_a_system.qmd']
# by the first two digits of a chapter
WINGS = {
    '00': 'Files, config and runs',
    '01': 'Data: read, check, prepare',
    '02': 'Feed: what a batch holds',
    '03': 'Measure: losses, evidence, metrics',
    '04': 'Learn: models and the loop',
    '05': 'Run: train, evaluate, plan',
    '06': 'Judge: calibrate and report',
    '07': 'Report and map files',
    '08': 'Map, review, sign',
    '09': 'Search: many runs',
    '10': 'Commands',
}

def section(title, pages):
    "A group of the sidebar, as lines of YAML"
    return [f'      - section: "{title}"', '        contents:', *(f'          - {page}' for page in pages)]

def sidebar():
    "Four groups: start, tutorials, chapters by wing, reference"
    guides = sorted(path.name for path in NBS.glob('guide*.qmd'))
    tutorials = sorted(f'tutorials/{path.name}' for path in (NBS/'tutorials').glob('*.ipynb'))
    lines = ['website:', '  sidebar:', '    contents:']
    lines += section('Start', [page for page in START if (NBS/page).exists()])
    if tutorials:
        lines += section('Tutorials', tutorials)
    lines += ['      - section: "Chapters"', '        contents:']
    chapters = sorted(path.name for path in NBS.glob('[0-9]*.ipynb'))
    systems = sorted(f'systems/{path.name}' for path in (NBS/'systems').glob('*.ipynb'))
    groups = {title: [name for name in chapters if name.startswith(number)] for number, title in WINGS.items()}
    for title, names in (groups | {'Systems: kinds of data': systems}).items():
        lines += ['    ' + line for line in section(title, names)]
    lines += section('Reference', [*REFERENCE[:2], *guides, *REFERENCE[2:]])
    return '\n'.join(lines) + '\n'

# ---------------------------------------------------------------- every setting

CONFIGURATION = """---
title: Configuration, field by field
description: Every setting of a config with its type, default and meaning
---

A config is a YAML file that holds what differs from these defaults; `--override section.field=value` changes one of
them for a command. The first table holds for every system, the others for the system that they name.
"""

class Setting(NamedTuple):
    "A field of a config"
    name: str       # dotted
    kind: str
    default: str
    meaning: str

def plain(value):
    "A default in a line, or an ellipsis where it is long"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else '…'

def kind_of(field, definitions):
    "The type of a field of a JSON schema, in words"
    if '$ref' in field:
        return kind_of(definitions[field['$ref'].rsplit('/', 1)[1]], definitions)
    if 'anyOf' in field:
        return ' or '.join(dict.fromkeys(kind_of(part, definitions) for part in field['anyOf']))
    if 'const' in field:
        return f'`{json.dumps(field["const"])}`'
    if 'enum' in field:
        return ' or '.join(f'`{json.dumps(value)}`' for value in field['enum'])
    if field.get('type') == 'array' and 'items' in field:
        return f'list of {kind_of(field["items"], definitions)}'
    return f'{field.get("type", "any")}{limits_of(field)}'

LIMITS = {'minimum': '≥', 'exclusiveMinimum': '>', 'maximum': '≤', 'exclusiveMaximum': '<'}

def limits_of(field):
    "The limits of a number, as ' ≥ 1, < 5'; '' without any"
    limits = [f'{sign} {field[name]}' for name, sign in LIMITS.items() if name in field]
    return f' {", ".join(limits)}' if limits else ''

def settings_of(schema):
    "Every field of a JSON schema, sections opened"
    definitions = schema.get('$defs', {})

    def walk(properties, prefix):
        for name, field in properties.items():
            inner = definitions[field['$ref'].rsplit('/', 1)[1]] if '$ref' in field else {}
            if 'properties' in inner:
                yield from walk(inner['properties'], f'{prefix}{name}.')
            else:
                yield Setting(f'{prefix}{name}', kind_of(field, definitions), plain(field.get('default')),
                              field.get('description', ''))

    return list(walk(schema['properties'], ''))

def cell(text):
    "Text that may stand in a cell of a Markdown table"
    return text.replace('|', '\\|').replace('<', '&lt;').replace('\n', ' ')

def table_of(settings):
    "A Markdown table of settings"
    lines = ['| setting | type | default | meaning |', '|------|------|----|----------|']
    for setting in settings:
        cells = f'`{setting.name}`', cell(setting.kind), f'`{setting.default}`', cell(setting.meaning)
        lines.append(f'| {" | ".join(cells)} |')
    return lines

def configuration():
    "The page of all settings: those of every run, then those of each system that the others do not share"
    from rtsseg.config import BUILT_IN_SYSTEMS, RunConfig, find_system
    shared = settings_of(RunConfig.model_json_schema())
    lines = [CONFIGURATION, '## Every run', '', *table_of(shared), '']
    for name in BUILT_IN_SYSTEMS:
        settings = settings_of(find_system(name).Config.model_json_schema())
        own = [setting for setting in settings if setting not in shared]
        lines += [f'## System {name}', '', *table_of(own), '']
    return '\n'.join(lines)

# ---------------------------------------------------------------- every command

# defaults that say nothing
EMPTY = '', None, False, (), []

COMMANDS_HEAD = """---
title: Commands, argument by argument
description: Every command of the shell with its arguments and defaults
---

`rtsseg train …` is the same as `rtsseg-train …`. What stands before the first option is the first argument.
"""

def commands():
    "The page of all commands"
    from rtsseg.cli import COMMANDS, arguments_of
    lines = [COMMANDS_HEAD]
    for name, function in COMMANDS.items():
        about = ' '.join((function.__doc__ or '').split('\n\n')[0].split())
        lines += [f'## rtsseg {name}', '', cell(about), '', '| argument | default | meaning |', '|----|---|-------|']
        taken = signature(function).parameters
        for argument in arguments_of(function.__wrapped__):
            if argument.name not in taken:
                continue
            default = f'`{argument.default}`' if argument.default not in EMPTY else ''
            lines.append(f'| `--{argument.name}` | {cell(default)} | {cell(argument.help)} |')
        lines.append('')
    return '\n'.join(lines)

# ---------------------------------------------------------------- links of a rendered site

def is_loaded(tag, attributes):
    "Whether the address of a tag is asked for when its page opens; others are on a click"
    if tag == 'link':
        return bool({'stylesheet', 'icon', 'preload'} & set((attributes.get('rel') or '').split()))
    return tag in ('script', 'img', 'iframe')

class Page(HTMLParser):
    "Ids and links of a page"

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids.add(found.get('id') or found.get('name'))
        links = [link for link in (found.get('href'), found.get('src')) if link]
        self.links += links
        self.loaded += links if is_loaded(tag, found) else []

def broken_links(folder):
    "Local links of a rendered site that lead nowhere, a line each; other hosts are not asked"
    pages = {path.resolve(): Page(path) for path in sorted(Path(folder).rglob('*.html'))}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            address = urlsplit(link)
            if address.scheme or address.netloc:
                continue
            target = (path.parent/unquote(address.path)).resolve() if address.path else path
            target = target/'index.html' if target.is_dir() else target
            is_missing = not target.exists()
            lacks_anchor = bool(address.fragment) and target in pages \
                and unquote(address.fragment) not in pages[target].ids
            if is_missing or lacks_anchor:
                broken.append(f'{path.relative_to(Path(folder).resolve())}: {link}')
    print(f'{len(pages)} pages, {sum(len(page.links) for page in pages.values())} links, {len(broken)} broken')
    return broken

OTHER_HOST = re.compile(r'(?:https?:)?//')
IMPORTED = re.compile(r'@import\s+(?:url\()?["\']?((?:https?:)?//[^"\')\s]+)')

def asked_hosts(folder):
    "What pages and styles of a rendered site load from other hosts when they open, a line each"
    folder, found = Path(folder), []
    for path in sorted(folder.rglob('*.html')):
        found += [f'{path.relative_to(folder)}: loads {link}' for link in Page(path).loaded if OTHER_HOST.match(link)]
    for path in sorted(folder.rglob('*.css')):
        found += [f'{path.relative_to(folder)}: loads {link}' for link in IMPORTED.findall(path.read_text())]
    return found

def write():
    "Write all pages"
    (NBS/'sidebar.yml').write_text(sidebar())
    (NBS/'configuration.qmd').write_text(configuration())
    (NBS/'commands.qmd').write_text(commands())

if __name__ == '__main__':
    if '--check' in sys.argv:
        found = broken_links(sys.argv[-1]) + asked_hosts(sys.argv[-1])
        sys.exit('\n'.join(found) if found else 0)
    write()
