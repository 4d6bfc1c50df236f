"Pages beside the chapters (tutorials, the glossary): what they link to is there"
import ast
import re
from functools import cache
from pathlib import Path

import nbformat
import pytest

NBS = Path(__file__).resolve().parent.parent/'nbs'
TUTORIALS = sorted((NBS/'tutorials').glob('*.ipynb'))
# the tables of the guides have tests of their own
PAGES = [NBS/'glossary.qmd', NBS/'add_a_system.qmd', NBS/'survives.qmd', *TUTORIALS]
each_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)

def prose(page):
    "The Markdown of a page"
    if page.suffix == '.qmd':
        return page.read_text()
    return '\n'.join(cell.source for cell in nbformat.read(page, 4).cells if cell.cell_type == 'markdown')

def links(text):
    "(file, anchor) of all links to other pages of the site"
    targets = re.findall(r'\]\((?!\w+:|#)([^)]+)\)', text)
    return [target.partition('#')[::2] for target in targets]

def anchor_of(heading):
    "How the site names a heading"
    return re.sub(r'\s', '-', re.sub(r'[^\w\s.-]', '', heading)).lower()

@cache
def anchors(page):
    "What can be linked to in a page: headings below the title, and definitions that the page exports"
    found = {anchor_of(heading) for heading in re.findall(r'^##+ (.*)$', prose(page), re.MULTILINE)}
    cells = nbformat.read(page, 4).cells if page.suffix == '.ipynb' else []
    for cell in cells:
        if cell.cell_type == 'code' and re.search(r'^#\| *export', cell.source, re.MULTILINE):
            nodes = ast.parse(cell.source).body
            found |= {node.name.lower() for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return found

@each_page
def test_links_lead_to_files_and_headings(page):
    broken = []
    for file, anchor in links(prose(page)):
        target = (page.parent/file).resolve()
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            broken.append(f'{file}#{anchor}')
    assert not broken, broken

def glossary_rows():
    "(term, meaning, chapter) of each row"
    lines = [line for line in (NBS/'glossary.qmd').read_text().splitlines() if line.startswith('| ')]
    rows = [[cell.strip() for cell in line.strip('|').split(' | ')] for line in lines]
    return rows[1:]

def test_the_glossary_is_in_order():
    "Each term once, by the alphabet; a meaning is a line"
    terms = [term for term, *_ in glossary_rows()]
    assert len(set(terms)) == len(terms)

    def place(term):
        return re.sub('[^a-z0-9]', '', term.replace('κ', '').lower())

    assert terms == sorted(terms, key=place)
    for term, meaning, *_ in glossary_rows():
        assert 20 < len(meaning) < 200, term

NEEDED = [
    'RTS', 'tile', 'block', 'region', 'split', 'prevalence', 'ratio 1:r', 'PR-AUC', 'operating point', 'calibration',
    'views', 'EMA', 'curriculum', 'evidence', 'ledger', 'model directory', 'run folder', 'expected area', 'floor',
    'COG', 'κ (kappa)', 'mIoU', 'boundary IoU', 'C-index',
]

@pytest.mark.parametrize('term', NEEDED)
def test_the_glossary_explains_it(term):
    assert term in [row[0] for row in glossary_rows()]
