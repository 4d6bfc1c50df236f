"""The API reference of the site: what each exported definition takes and returns, and links to it from every page.

A processor of nbdev (settings.ini, `procs`). nbdev's own executes cells of the notebook, has nothing to say about the
fields of a config node, and makes links that break where the site does not lie at the root of its host.
"""
import ast
import json
import os
import re
from functools import cache
from importlib import import_module
from pathlib import Path

from execnb.nbio import mk_cell
from fastcore.docments import docments
from nbdev.config import get_config
from nbdev.process import Processor
from pydantic import BaseModel

FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef
CODE = re.compile(r'(```.*?```|`[^`]*`)', re.DOTALL)
NAME = re.compile(r'`([^`\s]+?)(?:\(\))?`(?!\])')

def entry_id(name):
    "The id of an entry on its page, which no heading and no other definition has"
    return f'api-{name}'

@cache
def pages():
    "{name: page with anchor} of every exported definition; a name that several modules export is left out"
    found, repeated = {}, set()
    for module, names in import_module('rtsseg._modidx').d['syms'].items():
        for full, (page, _) in names.items():
            name = full.removeprefix(f'{module}.')
            if name in found:
                repeated.add(name)
            found[name] = f'{page.partition("#")[0]}#{entry_id(name)}'
    return {name: page for name, page in found.items() if name not in repeated and '.' not in name}

def link_names(text, folder):
    "Markdown in which names of the library are links, relative to a folder of the site"
    def link(match):
        page = pages().get(match[1])
        return f'[{match[0]}]({os.path.relpath(page, folder)})' if page else match[0]

    blocks = re.split(r'(^```.*?^```$)', text, flags=re.MULTILINE | re.DOTALL)
    return ''.join(block if block.startswith('```') else NAME.sub(link, block) for block in blocks)

def without_tags(text):
    """Markdown in which `<name>` is a word and not a tag, and `|` ends no cell of a table, outside of code: there
    Pandoc shows a backslash"""
    parts = CODE.split(text)
    plain = str.maketrans({'<': '&lt;', '|': '\\|'})
    return ''.join(part if CODE.fullmatch(part) else part.translate(plain) for part in parts)

# the widths of columns follow the dashes
COLUMNS = '|-----|------|----|----------|'

def table(first, rows):
    "A Markdown table of (name, type, default, meaning); empty without rows"
    if not rows:
        return ''
    lines = [f'| {first} | type | default | meaning |', COLUMNS]
    for name, kind, default, meaning in rows:
        words = without_tags(' '.join((meaning or '').split()))
        cells = [f'`{name}`', kind and f'`{kind}`', default and f'`{default}`', words]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)

def source(node):
    "The source of a part of a signature; empty where there is none"
    return ast.unparse(node) if node else ''

def parameters(node, comments):
    "(name, type, default, meaning) of the parameters of a function, and what it returns"
    arguments, rows = node.args, []
    positional = arguments.posonlyargs + arguments.args
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    pairs = [*zip(positional, defaults), *zip(arguments.kwonlyargs, arguments.kw_defaults)]
    for argument, default in pairs:
        if argument.arg not in ('self', 'cls'):
            rows.append((argument.arg, source(argument.annotation), source(default), comments.get(argument.arg)))
    for prefix, argument in (('*', arguments.vararg), ('**', arguments.kwarg)):
        if argument:
            rows.append((prefix + argument.arg, source(argument.annotation), '', comments.get(argument.arg)))
    if node.returns:
        rows.append(('returns', source(node.returns), '', comments.get('return')))
    return rows

def fields(node, definition):
    "(name, type, default, meaning) of the fields of a dataclass or a config node"
    is_config, rows = issubclass(definition, BaseModel), []
    comments = {} if is_config else docments(definition)
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and not statement.target.id.startswith('_'):
            name, default, meaning = statement.target.id, source(statement.value), comments.get(statement.target.id)
            if is_config:
                field = definition.model_fields[name]
                default, meaning = '' if field.is_required() else repr(field.default), field.description
            rows.append((name, source(statement.annotation), default, meaning))
    return rows

def methods(node):
    "Public methods of a class, with the first line of what they do"
    rows = []
    for statement in node.body:
        if isinstance(statement, FUNCTIONS) and statement.name[0] != '_':
            about = (ast.get_docstring(statement) or '').split('\n')[0]
            rows.append((f'{statement.name}()', source(statement.returns), '', about))
    return rows

def signature(node):
    "How a definition is called or made, as a block of code"
    if isinstance(node, ast.ClassDef):
        bases = ', '.join(map(source, node.bases))
        return f'class {node.name}({bases})' if bases else f'class {node.name}'
    returns = f' -> {source(node.returns)}' if node.returns else ''
    return f'{node.name}({source(node.args)}){returns}'

def describe(node, definition):
    "What a definition takes and returns, as Markdown"
    parts = [f'```python\n{signature(node)}\n```', without_tags(ast.get_docstring(node) or '')]
    if isinstance(node, FUNCTIONS):
        parts.append(table('parameter', parameters(node, docments(definition))))
    else:
        for statement in node.body:
            if isinstance(statement, FUNCTIONS) and statement.name == '__init__':
                parts.append(table('parameter', parameters(statement, docments(definition.__init__))))
        parts += [table('field', fields(node, definition)), table('method', methods(node))]
    return '\n\n'.join(part for part in parts if part)

def definitions(cell):
    "Public functions and classes of an exported cell"
    kinds = *FUNCTIONS, ast.ClassDef
    return [node for node in ast.parse(cell.source).body if isinstance(node, kinds) and node.name[0] != '_']

TEST = re.compile(r'^\s*(?:assert |test_\w+\(|expect_fail\()', re.MULTILINE)

def is_test(cell):
    "Whether a cell asserts something, and shows nothing"
    return bool(TEST.search(cell.source)) and not cell.outputs

def embed_tables(cell):
    "Let the site take HTML that a cell shows as it is: else each page with a table asks another host for scripts"
    for output in cell.get('outputs', []):
        data = output.get('data', {})
        if 'text/html' in data:
            html = ''.join(data.pop('text/html'))
            data['text/markdown'] = f'```{{=html}}\n{html}\n```'

PICTURE = re.compile(r'^!\[([^\]"]+)\]\(([^)]+)\)$', re.MULTILINE)

def first_sentence(prose):
    "The first sentence of the last paragraph of Markdown, without marks; '' where it has only other blocks"
    paragraphs = [text for text in prose.split('\n\n') if text[:1].isalnum()]
    plain = re.sub(r'\[([^\]]+)\]\([^)]+\)', r'\1', paragraphs[-1]) if paragraphs else ''
    words = ' '.join(re.sub('[`*$]', '', plain).split())
    return re.split(r'(?<=[.:]) ', words)[0].rstrip('.:')

def describe_picture(cell, prose):
    "Let a picture that a cell shows be read out as the words before it"
    kinds = {kind for output in cell.get('outputs', []) for kind in output.get('data', {})}
    shows_one = bool(kinds & {'image/png', 'image/jpeg'})
    text = first_sentence(prose)
    if shows_one and text and '#| fig-alt' not in cell.source:
        cell.source = f'#| fig-alt: {json.dumps(text, ensure_ascii=False)}\n{cell.source}'

def fold(cell, summary):
    "Let the site show a cell as one line that opens"
    cell.source = f'#| code-fold: true\n#| code-summary: "{summary}"\n{cell.source}'

class add_reference(Processor):
    """Puts the entries of the definitions before their cells, which are folded as tests are, and links names of the
    library"""

    def begin(self):
        path = Path(self.nb.path_).resolve()
        folder = path.parent.relative_to(Path(get_config().nbs_path).resolve())
        module = re.search(r'#\| *default_exp +([\w.]+)', path.read_text())
        cells, prose = [], ''
        for cell in self.nb.cells:
            if cell.cell_type == 'markdown':
                prose = cell.source
                cell.source = PICTURE.sub(r'![\1](\2){fig-alt="\1"}', link_names(prose, folder))
                cells.append(cell)
                continue
            describe_picture(cell, prose)
            if module and 'export' in cell.directives_:
                exported = import_module(f'rtsseg.{module[1]}')
                for node in definitions(cell):
                    text = link_names(describe(node, getattr(exported, node.name)), folder)
                    heading = f'### `{node.name}` {{#{entry_id(node.name)}}}'
                    cells.append(mk_cell(f'{heading}\n\n{text}', 'markdown'))
                fold(cell, 'Source')
            elif is_test(cell):
                fold(cell, 'Tests')
            embed_tables(cell)
            cells.append(cell)
        self.nb.cells = cells
