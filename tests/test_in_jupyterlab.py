"JupyterLab in a browser, as a person uses it: bars, curves, the Stop button, the same cell again, objects as tables"
import re
import socket
import subprocess
import sys
from urllib.request import urlopen

import nbformat
import pytest
from playwright.sync_api import expect

from helpers.browser import in_browser, launched
from helpers.shell import ONE_THREAD
from helpers.waiting import wait_for

pytest.importorskip('jupyterlab')

# seconds that anything may take on a busy machine
PATIENCE = 120

SETUP = """
%matplotlib inline
from time import sleep
from rtsseg.config import RtsConfig, load
from rtsseg.manifest import read_manifest
from rtsseg.toy import tiny_toy
from rtsseg.training import train
cfg = RtsConfig(
    name='stopped', runs='runs', device='cpu', epochs=12, batch_size=8, val_frequency=4, freeze_backbone_epochs=0,
    data=dict(manifest=str(tiny_toy('.')), tile_size=64, split_check='warn'),
    sampler=dict(curriculum=[dict(first=1, last=12, ratio=1)]), tracker=dict(kind='none'),
    model=dict(architecture='unet', encoder='tu-test_efficientnet', weights=None,
               options=dict(decoder_channels=[16, 8, 8, 8, 8])), loader=dict(num_workers=0))

class SlowSecondEpoch:
    def on_step(self, run):
        sleep(1 if run.epoch == 2 else 0)
"""
CELLS = [
    SETUP,
    'train(cfg, observers=[SlowSecondEpoch()], plot=True)',
    'read_manifest(cfg.data.manifest)',
    "load(overrides=['epoch=3'])",
]
TRAIN, SHOW, FAIL = 1, 2, 3

def write_notebook(path):
    "A notebook with those cells, which opens without a question for its kernel"
    kernel = dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))
    cells = [nbformat.v4.new_code_cell(code) for code in CELLS]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)

def free_port():
    "A port of this machine that nobody listens on"
    with socket.socket() as one:
        one.bind(('127.0.0.1', 0))
        return one.getsockname()[1]

def answers(url):
    "Whether a server is there"
    try:
        return urlopen(url, timeout=1).status == 200
    except OSError:
        return False

@pytest.fixture
def lab(tmp_path):
    "Address of the notebook in a JupyterLab on loopback"
    write_notebook(tmp_path/'book.ipynb')
    port = free_port()
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', f'--port={port}',
               '--ServerApp.port_retries=0', '--IdentityProvider.token=', f'--ServerApp.root_dir={tmp_path}']
    homes = {f'JUPYTER_{name}_DIR': str(tmp_path/'jupyter'/name.lower()) for name in ('CONFIG', 'DATA', 'RUNTIME')}
    with open(tmp_path/'lab.log', 'w') as log:
        server = subprocess.Popen(command, env=ONE_THREAD | homes, stdout=log, stderr=log)
    try:
        wait_for(lambda: answers(f'http://127.0.0.1:{port}/api'), PATIENCE)
        yield f'http://127.0.0.1:{port}/lab/tree/book.ipynb'
    finally:
        server.terminate()
        server.wait(PATIENCE)

class Notebook:
    "The notebook that is open in a page of JupyterLab"

    def __init__(self, page):
        self.page = page

    def cell(self, number):
        return self.page.locator('.jp-Notebook .jp-CodeCell').nth(number)

    def run(self, number):
        "Start a cell; its outputs"
        self.cell(number).locator('.cm-content').click()
        self.page.keyboard.press('Control+Enter')
        return self.cell(number).locator('.jp-OutputArea').first

    def stop(self):
        "Press the Stop button"
        self.page.locator('[data-command="notebook:interrupt-kernel"]').first.click()

@pytest.fixture
def notebook(lab):
    "That notebook in a browser, once its kernel is ready"
    with launched() as browser:
        page = browser.new_page(viewport=dict(width=1280, height=1400))
        page.set_default_timeout(PATIENCE * 1000)
        expect.set_options(timeout=PATIENCE * 1000)
        page.goto(lab)
        page.get_by_text('| Idle').wait_for()
        yield Notebook(page)

FIRST_EPOCH, LAST_EPOCH = (re.compile(rf'epoch +{number}/12 .*images/s') for number in (1, 12))

@in_browser
@pytest.mark.slow
def test_a_notebook_in_jupyterlab(notebook):
    """A bar moves in place; Stop loses nothing and takes one line; the same cell resumes and draws its curves in one
    place; an object is a table; an error is one line"""
    notebook.run(0)
    out = notebook.run(TRAIN)
    expect(out).to_contain_text('stopped, seed 42: reading the data')
    expect(out).to_contain_text(FIRST_EPOCH)
    expect(out).to_contain_text(re.compile(r'epoch 2/12: .*batch/s'))
    notebook.stop()
    expect(out).to_contain_text(re.compile(r'stopped before its end \(SIGINT\) at epoch \d+, step \d+; '
                                           'the same command resumes'))
    text = out.inner_text()
    assert 'Traceback' not in text
    assert len(re.findall(r'epoch \d+/12: ', text)) <= 1, 'a bar that does not move in place leaves many lines'

    out = notebook.run(TRAIN)
    expect(out).to_contain_text('resuming from epoch')
    expect(out).to_contain_text(LAST_EPOCH)
    assert not FIRST_EPOCH.search(out.inner_text())
    expect(out.locator('img')).to_have_count(1)

    out = notebook.run(SHOW)
    expect(out.locator('table').first).to_be_visible()
    out = notebook.run(FAIL)
    expect(out).to_contain_text("error: config: epoch: no such setting")
    expect(out).to_contain_text("did you mean 'epochs'?")
    assert len(out.inner_text().strip().splitlines()) == 1
