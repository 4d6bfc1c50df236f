"""Write everything that is generated from notebooks and tests: modules, README, JSON schema, pages of the site

`python sync.py` writes it. `python sync.py --check` writes it into a copy of the tree, and lists what differs."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
# With IN_TEST set, nbdev_export does nothing
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != 'IN_TEST'}
WRITE_SCHEMA = "from rtsseg.config import write_schema; write_schema('configs/schema.json')"

SURVIVES = """---
title: What survives what
---

Spot machines stop, disks fill up, trackers fail, rasters are damaged. Each line below is a promise. A test
causes the fault and looks at what is left. This page is generated from those tests.

| exit code | meaning | what to do |
|---|---|---|
| 0 | done | |
| 2 | *refused*: a message names file and field, with all problems that can be seen at once; nothing was written | \
fix it, or follow the message |
| 3 | *stopped* early: by a signal, a full disk, a lost worker, too little memory, too many unreadable tiles | \
run the same command again: it resumes, and ends in the same bits |
| 130, 143 | interrupted with Ctrl-C, or terminated, while it was starting or had nothing to save; or by a second \
Ctrl-C | the same |

Not promised: that a damaged disk or a network file system keeps what was written to it, and that results are
the same bits on another kind of machine or with another number of CPU threads.

`pytest tests/faults` runs all of these tests. `make soak` runs their long form: some 500 kills, and 2,000 changed files
of each kind. What it survived last stands at the end of this page.
"""

FIGURES = """## What was survived, by command

The last runs that were recorded: trials survived, of trials. A trial of `kills` is a command that was killed, run again
and compared, byte by byte, with one that nothing disturbed; of `full disks` one whose disk filled up; of `pairs` two
commands at once in one run folder; of `changed files` a file that was changed at random and then read.

| | of | survived |
|---|---|---|
"""

MEMORY = """
Peak memory of a large case beside a small one (`benchmarks/memory.py`):

| | small | large | ratio |
|---|---|---|---|
"""

class FaultGroup(NamedTuple):
    "The faults of one file of tests/faults, keyed by number (or 'S1' for a security fault)"
    title: str
    table: dict     # number: (what happens, what then)
    tests: dict     # number: [(name of the test, its docstring or None)]

def readme(root):
    "Write nbs/index.ipynb as README.md, and the pictures among its outputs to nbs/images"
    import nbformat
    from nbconvert import MarkdownExporter
    from traitlets.config import Config

    notebook = nbformat.read(root/'nbs/index.ipynb', 4)
    notebook.metadata.language_info = {'name': 'python'}
    notebook.cells = [cell for cell in notebook.cells if '#| hide' not in cell.source]
    for cell in notebook.cells:
        if cell.cell_type == 'code' and '#| output: false' in cell.source:
            cell.outputs = []
    config = Config()
    config.NbConvertBase.display_data_priority = ['text/markdown', 'image/png', 'text/plain']
    names = {'output_files_dir': 'images', 'unique_key': 'index'}
    text, resources = MarkdownExporter(config=config).from_notebook_node(notebook, resources=names)

    for picture in (root/'nbs/images').glob('index_*.png'):
        picture.unlink()
    for name, content in resources['outputs'].items():
        (root/'nbs'/name).write_bytes(content)

    text = re.sub(r'^#\| .*\n', '', text, flags=re.M)
    text = re.sub(r'\]\((?!\w+:|#)([^)]+)\)', _link_from_the_top, text)
    (root/'README.md').write_text(text.strip() + '\n')

def _link_from_the_top(link):
    "A relative link of a notebook, as it reads at the top of the repository"
    target = os.path.normpath(os.path.join('nbs', link[1]))
    return f']({target})'

def faults(root):
    "The groups of faults of tests/faults, by number"
    groups = [_fault_group(path) for path in (root/'tests/faults').glob('test_*.py')]
    return sorted(groups, key=lambda group: f'{next(iter(group.table)):>2}')

def _fault_group(path):
    "What a file of tests says of its faults, read without running it"
    tree = ast.parse(path.read_text())
    table, tests = {}, {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == 'FAULTS':
            table = ast.literal_eval(node.value)
        if isinstance(node, ast.FunctionDef):
            found = re.match(r'test_(\d+|S\d+)_', node.name)
            if found:
                number = int(found[1]) if found[1].isdigit() else found[1]
                tests.setdefault(number, []).append((node.name, ast.get_docstring(node)))
    return FaultGroup(ast.get_docstring(tree), table, tests)

def _cell(text):
    "Text that may stand in a cell of a Markdown table"
    return text.replace('|', '\\|').replace('<', '&lt;').replace('\n', ' ')

def survives(root):
    "Write nbs/survives.qmd from the tables and docstrings of tests/faults"
    lines = [SURVIVES]
    for group in faults(root):
        lines += [f'## {_cell(group.title)}', '', '| | what happens | what then |', '|---|---|---|']
        for number, (event, outcome) in group.table.items():
            lines.append(f'| {number} | {_cell(event)} | {_cell(outcome)} |')
        lines += ['', '<details>', '<summary>How it is shown</summary>', '']
        for number in group.table:
            for name, docstring in group.tests.get(number, []):
                explanation = f': {_cell(docstring)}' if docstring else ''
                lines.append(f'- **{number}** `{name}`{explanation}')
        lines += ['', '</details>', '']
    (root/'nbs/survives.qmd').write_text('\n'.join([*lines, figures(root)]))

def figures(root):
    "What `make soak` recorded, and what benchmarks/memory.py found, as Markdown; '' for each that was not run"
    record, measured = root/'tests/faults/soak.json', root/'benchmarks/results.jsonl'
    found = json.loads(record.read_text()) if record.exists() else {}
    lines = []
    for kind, trials in sorted(found.items(), key=lambda each: each[0] != 'kills'):
        lines += [f'| {kind} | {_cell(name)} | {survived} of {of} |' for name, (survived, of) in trials.items()]
    text = FIGURES + '\n'.join(lines) + '\n' if lines else ''
    rows = [json.loads(line) for line in measured.read_text().splitlines()]
    peaks = [row for row in rows if row['script'] == 'memory']
    lines = [f"| {row['what']} | {row['small']} | {row['ours']} MB | {row['ratio']} |" for row in peaks]
    return text + (MEMORY + '\n'.join(lines) + '\n' if lines else '')

def sync(root):
    "Write all generated files of a tree"
    commands = [
        [BIN/'nbdev_export'],
        [BIN/'nbdev_clean'],
        [sys.executable, '-c', WRITE_SCHEMA],
        [sys.executable, 'pages.py'],
    ]
    for command in commands:
        subprocess.run(command, cwd=root, env=ENVIRONMENT, check=True)
    readme(root)
    survives(root)

def git(folder, *arguments):
    "Output of a git command in a folder"
    done = subprocess.run(['git', *arguments], cwd=folder, env=ENVIRONMENT, check=True, capture_output=True, text=True)
    return done.stdout

def copy_tree(target):
    "Copy the files that git knows, and those that it would add, to a folder"
    for name in git(ROOT, 'ls-files', '-coz', '--exclude-standard').split('\0'):
        if name and (ROOT/name).is_file():
            (target/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT/name, target/name)

def check():
    "Exit with a message unless all generated files, written into a copy of the tree, are equal to those here"
    with TemporaryDirectory() as folder:
        copy = Path(folder)
        copy_tree(copy)
        git(copy, 'init', '-q')
        git(copy, 'add', '-A')
        for module in (copy/'rtsseg').rglob('*.py'):
            if module.name != '__init__.py':
                module.unlink()
        sync(copy)
        changes = [line for line in git(copy, 'status', '--porcelain', '-uall').splitlines() if line[1] != ' ']
        if changes:
            listed = '\n'.join(changes)
            sys.exit(f'generated files differ (`make sync` writes them, `git diff` shows the changes):\n{listed}')
        count = len(list((copy/'nbs').rglob('*.ipynb')))
        print(f'    {count} notebooks and all generated files agree')

if __name__ == '__main__':
    if '--check' in sys.argv:
        check()
    else:
        sync(ROOT)
