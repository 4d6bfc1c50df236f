"Modules, README, JSON schema and the page of faults are made from notebooks and tests: make them, or (--check) say what is out of step, in a copy that leaves this tree alone"
import ast, os, re, shutil, subprocess, sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
ENV = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}   # with it set, nbdev_export does nothing
SCHEMA = "from rtsseg.config import write_schema; write_schema('configs/schema.json')"

def readme(root):
    "nbs/index.ipynb as Markdown; links that are right beside the notebook are made right for the top of the repository"
    import nbformat
    from nbconvert import MarkdownExporter
    notebook = nbformat.read(root/'nbs/index.ipynb', 4); notebook.metadata.language_info = {'name': 'python'}
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    text = re.sub(r'^#\| .*\n', '', text, flags=re.M)
    text = re.sub(r'\]\((?!\w+:|#)([^)]+)\)', lambda m: f']({os.path.normpath(os.path.join("nbs", m[1]))})', text)
    (root/'README.md').write_text(text.strip() + '\n')

SURVIVES = """---
title: What survives what
---

Spot machines die, disks fill, trackers go down, rasters lie. Each line here is a promise, and a test that does it to the library and looks at what is left; this page is made from those tests.

| exit code | meaning | what to do |
|---|---|---|
| 0 | done | |
| 2 | *refused*: a message names file and field, all that could be seen to be wrong at once, and nothing was written | mend it, or do what the message offers |
| 3 | *stopped* before its end: by a signal, a full disk, a lost worker, too little memory, too many unreadable tiles | the same command goes on, and ends in the same bits |
| 130, 143 | interrupted from the keyboard, or asked to end while it was still starting or had nothing to save | the same |

Not promised: that a damaged disk or a network file system keeps what was written to it, and that results are the same bits on another kind of machine or another number of CPU threads.
`pytest tests/faults` runs all of these tests, `make soak` kills a run 200 times instead of 50.
"""

def faults(root):
    "Of each file of tests/faults, by number: its title, {number: (what happens, what then)}, and {number: [(test, its docstring)]}"
    return sorted(map(_group, (root/'tests/faults').glob('test_*.py')), key=lambda group: f'{next(iter(group[1])):>2}')

def _group(path):
    tree, shown = ast.parse(path.read_text()), {}
    table = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == 'FAULTS')
    for n in tree.body:
        if isinstance(n, ast.FunctionDef) and (m := re.match(r'test_(?:(\d+)|(S\d+))_', n.name)): shown.setdefault(int(m[1]) if m[1] else m[2], []).append((n.name, ast.get_docstring(n)))
    return ast.get_docstring(tree), table, shown

def survives(root):
    "nbs/survives.qmd, from the tables and docstrings of tests/faults"
    cell, text = lambda s: s.replace('|', '\\|').replace('<', '&lt;').replace('\n', ' '), [SURVIVES]
    for title, table, shown in faults(root):
        text += [f'## {cell(title)}', '', '| | what happens | what then |', '|---|---|---|', *(f'| {k} | {cell(what)} | {cell(then)} |' for k, (what, then) in table.items()), '']
        text += [':::{.callout-note collapse="true"}', '## How it is shown', '', *(f'- **{k}** `{name}`' + (f': {cell(told)}' if told else '') for k in table for name, told in shown.get(k, [])), ':::', '']
    (root/'nbs/survives.qmd').write_text('\n'.join(text))

def sync(root):
    for command in ([BIN/'nbdev_export'], [BIN/'nbdev_clean'], [sys.executable, '-c', SCHEMA]): subprocess.run(command, cwd=root, env=ENV, check=True)
    readme(root); survives(root)

def check():
    "Everything that is made, made anew in a copy of the tree, must come out as it stands"
    with TemporaryDirectory() as tmp:
        tmp, git = Path(tmp), lambda *a: subprocess.run(['git', *a], cwd=tmp, env=ENV, check=True, capture_output=True, text=True).stdout
        for name in subprocess.run(['git', 'ls-files', '-coz', '--exclude-standard'], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split('\0'):
            if name and (ROOT/name).is_file(): (tmp/name).parent.mkdir(parents=True, exist_ok=True); shutil.copy2(ROOT/name, tmp/name)
        git('init', '-q'); git('add', '-A')
        for f in (tmp/'rtsseg').rglob('*.py'):
            if f.name != '__init__.py': f.unlink()
        sync(tmp)
        changes = [l for l in git('status', '--porcelain', '-uall').splitlines() if l[1] != ' ']
        if changes: sys.exit('out of step with the notebooks (make sync mends it, git diff shows it):\n' + '\n'.join(changes))
        print(f'    {len(list((tmp/"nbs").rglob("*.ipynb")))} notebooks and all that is made from them agree')

if __name__ == '__main__': check() if '--check' in sys.argv else sync(ROOT)
