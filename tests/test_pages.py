"The pages that follow from the code: every setting, every command; and the check of links in a rendered site"
import re
import sys
from pathlib import Path

import pytest
from nbformat import NotebookNode

from rtsseg.cli import COMMANDS
from rtsseg.config import BUILT_IN_SYSTEMS, find_system

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import pages  # noqa: E402
import reference  # noqa: E402

sys.path.pop(0)

def fields(tree, prefix=''):
    "Dotted names of all fields of a tree, sections opened"
    for name in type(tree).model_fields:
        value = getattr(tree, name)
        if hasattr(type(value), 'model_fields'):
            yield from fields(value, f'{prefix}{name}.')
        else:
            yield f'{prefix}{name}'

@pytest.mark.parametrize('system', BUILT_IN_SYSTEMS)
def test_the_page_of_settings_has_every_field(system):
    "Of each system: among those that all runs have, or among its own"
    page = (ROOT/'nbs/configuration.qmd').read_text()
    tables = dict(re.findall(r'^## (.+?)\n(.*?)(?=^## |\Z)', page, re.S | re.M))
    seen = tables['Every run'] + tables[f'System {system}']
    assert [name for name in fields(find_system(system).Config()) if f'| `{name}` |' not in seen] == []

def test_the_page_of_commands_has_every_argument():
    page = (ROOT/'nbs/commands.qmd').read_text()
    assert re.findall(r'^## rtsseg (\S+)$', page, re.M) == list(COMMANDS)
    assert '| `--config` | `toy` | YAML file, or a name in configs/' in page

def test_broken_links_are_found(tmp_path, capsys):
    "A missing file, a missing anchor and a missing picture; other hosts are not asked"
    (tmp_path/'sub').mkdir()
    (tmp_path/'a.html').write_text('''<h2 id="here">x</h2><a href="sub/b.html#there">y</a><a href="#here">z</a>
        <a href="https://example.org/none">out</a><a href="gone.html">1</a><a href="sub/b.html#gone">2</a>
        <img src="gone.png">''')
    (tmp_path/'sub/b.html').write_text('<h2 id="there">x</h2><a href="../a.html">up</a>')
    assert pages.broken_links(tmp_path) == ['a.html: gone.html', 'a.html: sub/b.html#gone', 'a.html: gone.png']
    assert '2 pages, 7 links, 3 broken' in capsys.readouterr().out

def test_what_is_loaded_from_other_hosts_is_found(tmp_path):
    "Scripts, styles and imports of styles; not a link that a reader follows"
    (tmp_path/'a.html').write_text('''<script src="https://example.org/a.js"></script>
        <link rel="stylesheet" href="//example.org/b.css"><link rel="canonical" href="https://example.org/a.html">
        <a href="https://example.org/c">c</a><img src="d.png">''')
    (tmp_path/'e.css').write_text('@import "https://example.org/f.css";\n@import url(g.css);')
    found = pages.asked_hosts(tmp_path)
    assert [line.split('/')[-1] for line in found] == ['a.js', 'b.css', 'f.css']
    assert found[2] == 'e.css: loads https://example.org/f.css'

def test_bars_end_cells_outside_of_code_alone():
    "Pandoc shows a backslash inside of code"
    row = reference.table('field', [('a', 'int | None', '', 'x | `y | z` <t>')]).splitlines()[-1]
    assert row == '| `a` | `int | None` |  | x \\| `y | z` &lt;t> |'

def test_a_picture_is_read_out_as_the_sentence_before_it():
    shown = {'output_type': 'display_data', 'data': {'image/jpeg': ''}}
    cell = NotebookNode(cell_type='code', source='show()', outputs=[shown])
    prose = '## Head\n\nNot this.\n\nLosses of [`train`](05_train.ipynb) fall. More.\n\n- not this'
    reference.describe_picture(cell, prose)
    assert cell.source == '#| fig-alt: "Losses of train fall"\nshow()'
