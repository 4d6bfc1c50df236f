"What a person sees in Jupyter: the Stop button loses nothing, curves are redrawn, errors take one line"
import re
import time

import pytest

manager_of_kernels = pytest.importorskip('jupyter_client')

@pytest.fixture(scope='module')
def kernel(tmp_path_factory):
    "A running kernel and its client"
    manager, client = manager_of_kernels.manager.start_new_kernel(cwd=str(tmp_path_factory.mktemp('kernel')))
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)

class Cell:
    "One run of a cell: its outputs, collected until it ends"

    def __init__(self, kernel, code):
        self.manager, self.client = kernel
        self.request = self.client.execute(code)
        self.text, self.pictures, self.redrawn, self.error = '', 0, 0, None

    def read(self, until=None):
        "Take in outputs until the cell ends, or its text matches"
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            message = self.client.get_iopub_msg(timeout=300)
            if message['parent_header'].get('msg_id') != self.request:
                continue
            kind, content = message['msg_type'], message['content']
            if kind == 'status' and content['execution_state'] == 'idle':
                return self
            if kind == 'stream':
                self.text += content['text']
            self.pictures += kind == 'display_data' and 'image/png' in content['data']
            self.redrawn += kind == 'update_display_data'
            if kind == 'error':
                self.error = content
            if until and re.search(until, self.text):
                return self
        raise AssertionError(f'no end after 300 s: {self.text[-2000:]}')

SETUP = """
%matplotlib inline
from rtsseg.config import RtsConfig
from rtsseg.toy import tiny_toy
from rtsseg.training import train
cfg = RtsConfig(
    name='stopped', runs='runs', device='cpu', epochs=12, batch_size=8, val_frequency=4, freeze_backbone_epochs=0,
    data=dict(manifest=str(tiny_toy('.')), tile_size=64, split_check='warn'),
    sampler=dict(curriculum=[dict(first=1, last=12, ratio=1)]), tracker=dict(kind='none'),
    model=dict(architecture='unet', encoder='tu-test_efficientnet', weights=None,
               options=dict(decoder_channels=[16, 8, 8, 8, 8])), loader=dict(num_workers=0))
"""

FIRST_EPOCH = r'epoch +1/12 .*images/s'

@pytest.mark.slow
def test_the_stop_button_loses_nothing(kernel):
    "One line instead of a traceback; the same cell resumes, and draws its curves again at each validation"
    assert Cell(kernel, SETUP).read().error is None
    stopped = Cell(kernel, 'train(cfg, plot=True)').read(until=FIRST_EPOCH)
    kernel[0].interrupt_kernel()
    stopped.read()
    message, = stopped.error['traceback']
    assert re.fullmatch(r'stopped before its end \(SIGINT\) at epoch \d+, step \d+; the same command resumes', message)
    resumed = Cell(kernel, 'train(cfg, plot=True)').read()
    assert resumed.error is None
    assert 'resuming from epoch' in resumed.text
    assert not re.search(FIRST_EPOCH, resumed.text)
    assert resumed.pictures == 1
    assert resumed.redrawn >= 1

def test_an_error_takes_one_line(kernel):
    error = Cell(kernel, "from rtsseg import load\nload(overrides=['epoch=3'])").read().error
    assert len(error['traceback']) == 1
    assert error['traceback'][0].startswith('error: config: epoch: no such setting')
    assert "did you mean 'epochs'?" in error['traceback'][0]
