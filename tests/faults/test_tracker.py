"Fault 39: a tracker that is down, slow or gone"
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from mlflow import MlflowClient

import rtsseg.mirrors
from helpers import runs as small_run
from helpers.loop import At, equal, net, run, stop
from helpers.mlflow_server import Server, failing_port, listening_port, refusing_port, swallowing_port
from helpers.pair import free_port
from helpers.shell import shell
from helpers.waiting import wait_for
from rtsseg.cli import rtsseg_track
from rtsseg.config import RtsConfig, TrackerConfig, to_yaml
from rtsseg.prepare import prepare
from rtsseg.runs import read_lines, read_log, run_folder
from rtsseg.track import Tracker, deliver, left

FAULTS = {
    39: ('the tracker refuses connections, does not accept them, answers slowly or with errors, or dies during a run',
         'the run continues; its events are kept, and delivered once when the tracker is back'),
}

TESTS = Path(__file__).parents[1]

# 24 steps
EPOCHS = dict(epochs=4)

@pytest.fixture(scope='module')
def server(tmp_path_factory):
    "A real server, which a test may stop and start again"
    server = Server(tmp_path_factory.mktemp('mlflow'))
    server.start()
    yield server
    server.stop()

@pytest.fixture(scope='module')
def undisturbed():
    return run(model=net(), **EPOCHS)

class TrackedRun:
    "A run of milliseconds whose folder has a tracker"
    def __init__(self, tmp_path, uri=None):
        tracker = dict(uri=uri, experiment='milliseconds')
        self.cfg = RtsConfig(runs=tmp_path/'runs', name='toy', tracker=tracker)
        self.folder = tmp_path/'runs'/'toy'/'abc'/'seed42'
        self.folder.mkdir(parents=True)

    def tracker(self):
        "A new tracker, as each start of the run makes one"
        return Tracker(self.cfg, self.folder, dict(config_hash='abc'))

    def train(self, tracker, *observers):
        done = run(self.folder, model=net(), observers=[tracker, *observers], **EPOCHS)
        tracker.finish(done.finished, ['log.jsonl'])
        return done

    def delivered(self, uri):
        "The only run that a tracker holds of this name, and its points: {metric: [(step, value, time)]}"
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(self.cfg.tracker.experiment)
        found, = client.search_runs([experiment.experiment_id])
        assert found.info.run_id == json.loads((self.folder/'tracker.json').read_text())['run_id']
        points = {}
        for name in found.data.metrics:
            history = client.get_metric_history(found.info.run_id, name)
            points[name] = [(point.step, point.value, point.timestamp) for point in history]
        return found, points

    def kept(self):
        "The points that tracker.jsonl holds, in the same form"
        points = {}
        for event, _ in read_lines(self.folder/'tracker.jsonl'):
            if event and event['event'] == 'metrics':
                for name, value in event['values'].items():
                    points.setdefault(name, []).append((event['step'], value, event['time']))
        return points

# ---------------------------------------------------------------- a tracker that does not work

BROKEN = {
    'refuses': refusing_port,
    'does not answer': listening_port,
    'does not accept connections': swallowing_port,
    'answers with 500': failing_port,
    'answers too late': partial(failing_port, answer_at_once=False),
}

@contextmanager
def recorded_waits(monkeypatch):
    "Which threads opened connections, and with which time limits threads were waited for"
    connect, join = socket.socket.connect, threading.Thread.join
    connecting, joins = [], []

    def record_connect(self, address):
        connecting.append(threading.current_thread())
        return connect(self, address)

    def record_join(self, timeout=None):
        joins.append((self, timeout))
        return join(self, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, 'connect', record_connect)
        patch.setattr(threading.Thread, 'join', record_join)
        yield connecting, joins

@pytest.mark.parametrize('how', BROKEN)
def test_39_a_tracker_that_does_not_work(undisturbed, tmp_path, monkeypatch, capsys, how):
    """Training ends in the same weights, with one message on what is wrong. It never waits for a connection, and at
    the end for three seconds at most. Later each point is delivered once"""
    # the tracker gives up early
    monkeypatch.setitem(rtsseg.mirrors.QUICK, 'MLFLOW_HTTP_REQUEST_TIMEOUT', '1')
    with BROKEN[how]() as port, recorded_waits(monkeypatch) as (connecting, joins):
        world = TrackedRun(tmp_path, f'http://127.0.0.1:{port}')
        tracker = world.tracker()
        # the tracker is tried and given up during training
        done = world.train(tracker, At(20, lambda run: wait_for(lambda: tracker.warned)))
    equal(undisturbed, done)
    output = capsys.readouterr().out
    assert connecting and threading.main_thread() not in connecting
    assert [timeout for thread, timeout in joins if thread is tracker.thread] == [3]
    assert output.count('does not take what it is sent') == 1
    assert '6 events are still to be delivered: rtsseg-track --run ' in output
    wait_for(lambda: not tracker.thread.is_alive())

    healthy = f'sqlite:///{tmp_path}/healthy.db'
    monkeypatch.setenv('RTSSEG_TRACKER_URI', healthy)
    rtsseg_track(str(world.folder))
    assert '6 events delivered to sqlite:' in capsys.readouterr().out
    found, points = world.delivered(healthy)
    assert found.info.status == 'FINISHED'
    assert points == world.kept()
    losses = [(step, value) for step, value, _ in points['train/loss/bce']]
    assert losses == [(row['epoch'], row['train/loss/bce']) for row in done.history]
    assert len(losses) == 4

    rtsseg_track(str(world.folder))
    assert '0 events delivered' in capsys.readouterr().out
    assert world.delivered(healthy)[1] == points

@pytest.mark.slow
def test_39_death_during_a_run(server, undisturbed, tmp_path, capsys):
    """A real server is killed after the second epoch and started again later: the run is not affected, and the server
    ends with every point once"""
    world = TrackedRun(tmp_path, server.uri)

    def kill(run):
        wait_for(lambda: left(world.folder, server.uri) == 0)
        server.stop()

    try:
        equal(undisturbed, world.train(world.tracker(), At(13, kill)))
        assert json.loads((world.folder/'tracker.json').read_text())['run_id']
        assert left(world.folder, server.uri) == 3
        assert 'does not take what it is sent' in capsys.readouterr().out
    finally:
        # the other tests need it too
        server.start()
    # as the next start of a finished run does
    world.tracker().catch_up()
    wait_for(lambda: left(world.folder, server.uri) == 0)
    found, points = world.delivered(server.uri)
    assert found.info.status == 'FINISHED'
    assert points == world.kept()
    assert {len(history) for history in points.values()} == {4}

# ---------------------------------------------------------------- delivery that is interrupted

class Killed(Exception):
    "In place of the death of the process that delivers"

REQUESTS = 'create_experiment', 'create_run', 'update_run', 'log_batch', 'log_artifact', 'set_terminated'

def die_after_request(patch, k):
    "MlflowClient fails after its k-th request, which arrives"
    done = 0

    def failing(request):
        def send(*args, **options):
            nonlocal done
            answer = request(*args, **options)
            done += 1
            if done == k:
                raise Killed
            return answer
        return send

    for name in REQUESTS:
        patch.setattr(MlflowClient, name, failing(getattr(MlflowClient, name)))

def is_killed_at_request(k, folder, uri, monkeypatch):
    "Whether delivery has a k-th request, after which it is killed"
    with monkeypatch.context() as patch:
        die_after_request(patch, k)
        try:
            deliver(folder, uri)
        except Killed:
            return True
    return False

@pytest.mark.slow
def test_39_delivery_is_killed_after_each_request(tmp_path, monkeypatch):
    "And before the note of it: what is sent again changes nothing, and there is one run"
    world = TrackedRun(tmp_path)
    tracker = world.tracker()
    # nothing is delivered during training
    monkeypatch.setattr(tracker, 'mirror', lambda: None)
    done = run(world.folder, model=net(), observers=[tracker], **EPOCHS)
    for row in done.history:
        tracker.metrics(row)
    tracker.write('end', status='FINISHED', files=['log.jsonl'])
    empty = tmp_path/'empty.db'
    MlflowClient(f'sqlite:///{empty}')

    for k in range(1, 99):
        database = shutil.copy(empty, tmp_path/f'{k}.db')
        uri = f'sqlite:///{database}'
        if not is_killed_at_request(k, world.folder, uri, monkeypatch):
            break
        # the worst case: nothing is known of what was sent
        if k % 2:
            (world.folder/'tracker.json').unlink(missing_ok=True)
        deliver(world.folder, uri)
        assert world.delivered(uri)[1] == world.kept()
    assert k > 9
    assert len(world.kept()['train/loss/bce']) == len(done.history)

def test_39_a_spool_that_a_kill_cut_off(tmp_path):
    "The half line is not delivered, the next one follows the last complete one, and a damaged one is skipped"
    world = TrackedRun(tmp_path)
    tracker = world.tracker()
    half = world.train(tracker, At(8, stop))
    assert not half.finished
    assert left(world.folder, tracker.uri) == 0
    with open(tracker.path, 'ab') as file:
        file.write(b'{"event": "metrics", "st')
    assert left(world.folder, tracker.uri) == 0

    tracker = world.tracker()
    done = world.train(tracker)
    found, points = world.delivered(tracker.uri)
    assert done.finished and found.info.status == 'FINISHED'
    assert points == world.kept()
    # the epochs of both starts, in one run
    assert {len(history) for history in points.values()} == {4}

    damaged = tracker.path.read_bytes().replace(b'"metrics", "time"', b'"metrics\xff "time"', 1)
    tracker.path.write_bytes(damaged)
    (world.folder/'tracker.json').unlink()
    deliver(world.folder, tracker.uri)
    assert world.delivered(tracker.uri)[1] == points

def test_39_a_folder_that_cannot_be_written(undisturbed, tmp_path, monkeypatch, capsys):
    "On a full disk the tracker lacks events, and the run is not affected"
    def fail(path, row):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(rtsseg.track, 'append_line', fail)
    world = TrackedRun(tmp_path)
    equal(undisturbed, world.train(world.tracker()))
    assert 'tracker.jsonl was not written (No space left on device)' in capsys.readouterr().out

# ---------------------------------------------------------------- what leaves the machine

# the environment of a user: MLflow sends no reports in a test
TEST_VARIABLES = 'IN_TEST', 'CI', 'PYTEST_CURRENT_TEST', 'PYTEST_VERSION', 'RTSSEG_TRACKER_URI'
USER = {name: value for name, value in os.environ.items() if name not in TEST_VARIABLES}

def tracked_config(folder, experiment):
    "The config of a run of two epochs that is mirrored"
    cfg = small_run.tiny(folder, epochs=2)
    cfg.tracker = TrackerConfig(experiment=experiment)
    (folder/'tiny.yaml').write_text(to_yaml(cfg))
    return cfg

class CommandLines(threading.Thread):
    "The command lines of all processes, which other users of the machine can read; collected until `stop`"
    def __init__(self):
        super().__init__()
        self.stopped, self.seen = threading.Event(), set()

    def run(self):
        while not self.stopped.is_set():
            for path in Path('/proc').glob('[0-9]*/cmdline'):
                try:
                    self.seen.add(path.read_bytes())
                except OSError:
                    # the process has ended
                    continue
            time.sleep(.02)

    def stop(self):
        self.stopped.set()
        self.join()

def assert_no_password(folder):
    for path in folder.rglob('*'):
        assert not path.is_file() or b'canary' not in path.read_bytes(), path

def train_and_deliver(config, folder, uri, environment):
    "rtsseg-train, then rtsseg-track; the results of both, which hold no password, as does no command line"
    watch = CommandLines()
    watch.start()
    try:
        trained = shell('rtsseg-train', '--config', config, env=environment)
        delivered = shell('rtsseg-track', '--run', folder, env=USER | dict(RTSSEG_TRACKER_URI=uri))
    finally:
        watch.stop()
    for done in (trained, delivered):
        assert 'canary' not in done.stdout + done.stderr
    assert trained.returncode == 0, trained
    assert any(b'--inline' in line for line in watch.seen)
    assert not any(b'canary' in line for line in watch.seen)
    assert (folder/'tracker.jsonl').stat().st_size
    assert_no_password(folder.parents[2])
    return trained, delivered

class Mirrored(NamedTuple):
    "A run that the server mirrors, started with a password, and what its commands printed"
    cfg: RtsConfig
    folder: Path
    trained: subprocess.CompletedProcess
    delivered: subprocess.CompletedProcess

@pytest.fixture(scope='module')
def mirrored(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp('mirrored')
    cfg = tracked_config(folder, 'healthy')
    run = run_folder(cfg, prepare(cfg).hash)
    uri = server.uri.replace('http://', 'http://user:canary@')
    environment = USER | dict(RTSSEG_TRACKER_URI=uri)
    return Mirrored(cfg, run, *train_and_deliver(folder/'tiny.yaml', run, uri, environment))

@pytest.fixture
def on_server(server, mirrored):
    "What the server holds of the run"
    client = MlflowClient(server.uri)
    found, = client.search_runs([client.get_experiment_by_name('healthy').experiment_id])
    return client, found

@pytest.mark.slow
def test_39_a_password_in_the_environment(mirrored, on_server, tmp_path):
    "Neither the run folder, nor what is printed, nor the list of processes, nor the tracker itself holds it"
    client, found = on_server
    assert mirrored.delivered.returncode == 0, mirrored.delivered
    assert 'does not take what it is sent' not in mirrored.trained.stdout
    assert 'canary' not in str(found.to_dictionary())
    client.download_artifacts(found.info.run_id, '', str(tmp_path))
    assert any(tmp_path.rglob('log.jsonl'))
    assert_no_password(tmp_path)

@pytest.mark.slow
def test_the_tracker_mirrors_a_run(mirrored, on_server):
    "Settings, tags, each validation and the files"
    client, found = on_server
    assert found.info.status == 'FINISHED'
    assert found.data.params['lr.base_lr'] == str(mirrored.cfg.lr.base_lr)
    assert found.data.params['epochs'] == str(mirrored.cfg.epochs)
    assert found.data.tags['manifest_hash'] == prepare(mirrored.cfg).hash
    logged = [(row['epoch'], row['val/pr_auc@200']) for row in read_log(mirrored.folder)]
    history = client.get_metric_history(found.info.run_id, 'val/pr_auc_at_200')
    assert [(metric.step, metric.value) for metric in history] == logged
    artifacts = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert artifacts >= {'config.yaml', 'environment.json', 'log.jsonl', 'model'}
    # a model is given to others, and so holds no path of this machine
    assert str(mirrored.cfg.runs) not in (mirrored.folder/'model'/'config.yaml').read_text()

@pytest.mark.slow
def test_39_a_password_in_a_config(tmp_path):
    "Also where the tracker is down, only the file holds it that the user wrote"
    cfg = tracked_config(tmp_path, 'down')
    folder = run_folder(cfg, prepare(cfg).hash)
    uri = f'http://user:canary@127.0.0.1:{free_port()}?token=canary'
    secret = tmp_path/'secret.yaml'
    secret.write_text(f'tracker: {{uri: "{uri}"}}')
    trained, delivered = train_and_deliver(f'{tmp_path}/tiny.yaml,{secret}', folder, uri, USER)
    assert delivered.returncode == 3, delivered
    assert 'does not take what it is sent (ConnectionRefusedError)' in trained.stdout

@pytest.mark.slow
def test_39_the_default_tracker_opens_no_connection(tmp_path):
    "It is a file: a run looks up no name and reaches no other machine, and MLflow's reports to its makers are off"
    tracked_config(tmp_path, 'default')
    calls = tmp_path/'calls'
    command = [sys.executable, '-m', 'helpers.without_network', tmp_path/'tiny.yaml', calls]
    environment = USER | dict(PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    position, = tmp_path.rglob('tracker.json')
    assert json.loads(position.read_text())['run_id']
    assert not calls.exists(), calls.read_text()
