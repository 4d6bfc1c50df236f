"Modules, README and JSON schema are made from the notebooks: make them, or (--check) say what is out of step, in a copy that leaves this tree alone"
import os, re, shutil, subprocess, sys
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

def sync(root):
    for command in ([BIN/'nbdev_export'], [BIN/'nbdev_clean'], [sys.executable, '-c', SCHEMA]): subprocess.run(command, cwd=root, env=ENV, check=True)
    readme(root)

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
