"Weights & Biases without a network: what an offline folder holds, a stop, a resume, and what was missed"
import json
import struct
from collections import Counter

import pytest

from helpers.loop import At, net, run, stop
from helpers.waiting import wait_for
from rtsseg.config import load
from rtsseg.track import Tracker, deliver_missed, left

pytest.importorskip('wandb')
EPOCHS = 4

@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    "No server, and no file in the home folder"
    for name in ('WANDB_DIR', 'WANDB_API_KEY', 'RTSSEG_TRACKER_URI'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('WANDB_MODE', 'offline')
    for name in ('CONFIG', 'CACHE', 'DATA'):
        monkeypatch.setenv(f'WANDB_{name}_DIR', str(tmp_path/name))

def records(path):
    "The records of an offline file: a header of 7 bytes, then blocks of 32 KiB that hold pieces of records"
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, whole = path.read_bytes(), 7, b''
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
        _, length, kind = struct.unpack('<IHB', data[at:at + 7])
        whole += data[at + 7:at + 7 + length]
        at += 7 + length
        # a whole record, or the last piece of one
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b''

class Mirrored:
    "A run of the small world with a tracker of kind wandb"
    def __init__(self, folder):
        self.cfg = load(runs=folder/'runs', name='small', tracker=dict(kind='wandb', experiment='slumps'))
        self.folder = folder/'runs'/'small'/'abc'/'seed42'
        self.folder.mkdir(parents=True)

    def train(self, *observers):
        tracker = Tracker(self.cfg, self.folder, dict(config_hash='abc'))
        done = run(self.folder, model=net(), observers=[tracker, *observers], epochs=EPOCHS)
        tracker.finish(done.finished, ['config.yaml'])
        assert left(self.folder, tracker.uri) == 0
        return done

    def parts(self, n):
        "The offline files, in the order in which they were begun, once a process of wandb has written all of them"
        def read():
            return [list(records(path)) for path in sorted(self.folder.glob('wandb/offline-run-*/*.wandb'))]
        wait_for(lambda: len(read()) == n and all(of_kind(part, 'exit') for part in read()))
        return read()

def of_kind(part, kind):
    return [getattr(record, kind) for record in part if record.WhichOneof('record_type') == kind]

def points(part):
    "{step: {metric: value}}"
    found = {}
    for row in of_kind(part, 'history'):
        values = {item.key or '/'.join(item.nested_key): json.loads(item.value_json) for item in row.item}
        found[row.step.num] = {name: value for name, value in values.items() if not name.startswith('_')}
    return found

def kept(folder):
    lines = map(json.loads, (folder/'tracker.jsonl').read_text().splitlines())
    return {line['step']: line['values'] for line in lines if line['event'] == 'metrics'}

def test_an_offline_folder_holds_the_run(tmp_path):
    "Project, id, settings, each epoch's numbers and the files"
    world = Mirrored(tmp_path)
    (world.folder/'config.yaml').write_text('name: small\n')
    world.train()
    part, = world.parts(1)
    begun = of_kind(part, 'run')[0]
    assert (begun.project, begun.run_id) == ('slumps', json.loads((world.folder/'tracker.json').read_text())['run_id'])
    settings = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert settings['config_hash'] == 'abc' and settings['lr.base_lr'] == str(world.cfg.lr.base_lr)
    assert points(part) == kept(world.folder) and list(points(part)) == [1, 2, 3, 4]
    assert Counter(file.path for record in of_kind(part, 'files') for file in record.files)['config.yaml'] == 1
    assert [end.exit_code for end in of_kind(part, 'exit')] == [0]

def test_a_stopped_run_resumes_under_its_id(tmp_path):
    "Both processes write under one id; together they hold each epoch once"
    world = Mirrored(tmp_path)
    world.train(At(15, stop))
    world.train()
    first, second = world.parts(2)
    assert of_kind(first, 'run')[0].run_id == of_kind(second, 'run')[0].run_id
    assert [of_kind(part, 'exit')[0].exit_code for part in (first, second)] == [255, 0]
    assert points(first) | points(second) == kept(world.folder)
    assert not points(first).keys() & points(second).keys()

def test_what_was_missed_is_delivered_later(tmp_path, monkeypatch):
    "Where nothing was sent, the command sends all of it"
    world = Mirrored(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, 'mirror', lambda tracker: setattr(tracker, 'thread', True))
        tracker = Tracker(world.cfg, world.folder, dict(config_hash='abc'))
        run(world.folder, model=net(), observers=[tracker], epochs=EPOCHS)
    assert not (world.folder/'wandb').exists()
    assert deliver_missed(world.folder).startswith('5 events')
    part, = world.parts(1)
    assert points(part) == kept(world.folder) and len(points(part)) == EPOCHS
