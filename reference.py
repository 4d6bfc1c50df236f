"""The API reference of the site: what each exported definition takes and returns, and links to it from every page.

A processor of nbdev (settings.ini, `procs`). nbdev's own executes cells of the notebook, has nothing to say about the
fields of a config node, and makes links that break where the site does not lie at the root of its host.
"""
import ast
import os
import re
from importlib import import_module
from pathlib import Path

from execnb.nbio import mk_cell
from nbdev.config import get_config
from nbdev.process import Processor
from nbdev.showdoc import show_doc
from pydantic import BaseModel

BACKTICKS = re.compile(r'`([^`\s]+?)(?:\(\))?`(?!\])')

def pages():
    "{name: (module, page with anchor)} of every exported definition; a name that several modules export is left out"
    found, repeated = {}, set()
    for module, names in import_module('rtsseg._modidx').d['syms'].items():
        for full, (page, _) in names.items():
            name = full.removeprefix(f'{module}.')
            if name in found:
                repeated.add(name)
            found[name] = module, page
    return {name: place for name, place in found.items() if name not in repeated}

def link_names(text, folder):
    "Markdown in which names of the library are links, relative to a folder of the site"
    known = pages()

    def link(match):
        if match[1] not in known:
            return match[0]
        return f'[{match[0]}]({os.path.relpath(known[match[1]][1], folder)})'

    blocks = re.split(r'(^```.*?^```$)', text, flags=re.MULTILINE | re.DOTALL)
    return ''.join(block if block.startswith('```') else BACKTICKS.sub(link, block) for block in blocks)

def type_name(annotation):
    "A type as a reader writes it"
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return re.sub(r'\b(?:typing|pathlib|rtsseg(?:\.\w+)*)\.(?=\w)', '', text)

def field_table(node):
    "The fields that a config node adds to those of its base"
    lines = []
    inherited = {name for base in node.__bases__ for name in getattr(base, 'model_fields', {})}
    for name, field in node.model_fields.items():
        if name in inherited and name not in node.__annotations__:
            continue
        default = 'required' if field.is_required() else f'`{field.default!r}`'
        cells = [f'`{name}`', f'`{type_name(field.annotation)}`', default, field.description or '']
        lines.append('| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |')
    if not lines:
        return ''
    return '\n'.join(['| field | type | default | meaning |', '|---|---|---|---|', *lines])

def describe(definition):
    "What a definition takes and returns, as Markdown"
    if isinstance(definition, type) and issubclass(definition, BaseModel):
        return f'{definition.__doc__ or ""}\n\n{field_table(definition)}'
    # nbdev's own heading goes
    text = show_doc(definition)._repr_markdown_()
    return text[text.index('\n', text.index('### ')):]

def defined_names(cell):
    "Public functions and classes of an exported cell"
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    return [node.name for node in ast.parse(cell.source).body if isinstance(node, kinds) and node.name[0] != '_']

class add_reference(Processor):
    "Puts the entries of the definitions behind their cells, and links names of the library"

    def begin(self):
        path = Path(self.nb.path_).resolve()
        folder = path.parent.relative_to(Path(get_config().nbs_path).resolve())
        source = path.read_text()
        module = re.search(r'#\| *default_exp +([\w.]+)', source)
        cells = []
        for cell in self.nb.cells:
            cells.append(cell)
            if cell.cell_type == 'markdown':
                cell.source = link_names(cell.source, folder)
            elif module and 'export' in cell.directives_:
                exported = import_module(f'rtsseg.{module[1]}')
                for name in defined_names(cell):
                    text = link_names(describe(getattr(exported, name)), folder)
                    cells.append(mk_cell(f'### `{name}` {{#{name.lower()}}}\n\n{text}', 'markdown'))
        self.nb.cells = cells
