"Fault 39: a tracker that is down, slow or gone"
import json, os, shutil, signal, socket, subprocess, sys, threading, time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

import rtsseg.runs, rtsseg.track
from rtsseg.cli import rtsseg_track
from rtsseg.config import RtsConfig, load, to_yaml
from rtsseg.runs import run_folder
from rtsseg.prepare import prepare
from rtsseg.toy import tiny_toy
from rtsseg.runs import append_line, read_lines
from rtsseg.track import Tracker, deliver, left
from helpers.loop import At, equal, net, run, stop
from test_train import server, start_server, port, wait_for      # noqa: the fixture of a real MLflow server

FAULTS = {39: ('the tracker refuses connections, swallows them, answers with errors or slowly, or dies in mid-run', 'the run goes on; what it has to say is kept, and delivered once when the tracker is back')}
BIN = Path(sys.executable).parent
EPOCHS = dict(epochs=4)

def world(tmp_path, uri=None):
    "A run folder and its tracker"
    cfg = RtsConfig(runs=tmp_path/'runs', name='toy', tracker=dict(uri=uri)); folder = tmp_path/'runs'/'toy'/'abc'/'seed42'; folder.mkdir(parents=True, exist_ok=True)
    return folder, lambda: Tracker(cfg, folder, dict(config_hash='abc'))

def train(folder, tracker, observers=(), **more):
    done = run(folder, model=net(), observers=[tracker, *observers], **EPOCHS | more); tracker.finish(done.finished, ['log.jsonl'])
    return done

def points(folder, uri):
    "All points of the tracker's run, and that there is one run only"
    client = MlflowClient(uri); found, = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert found.info.run_id == json.loads((folder/'tracker.json').read_text())['run_id']
    return found, {k: [(m.step, m.value, m.timestamp) for m in client.get_metric_history(found.info.run_id, k)] for k in found.data.metrics}

def kept(folder):
    "What the spool holds, in the same form"
    out = {}
    for e in (e for e, _ in read_lines(folder/'tracker.jsonl') if e and e['event'] == 'metrics'):
        for k, v in e['values'].items(): out.setdefault(k, []).append((e['step'], v, e['time']))
    return out

@contextmanager
def listening(backlog):
    "A port whose connections nobody takes up"
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); s.listen(backlog); yield s.getsockname()[1]

@contextmanager
def broken(how):
    "The port of a tracker that is of no use"
    if how == 'refused': yield port()
    elif how == 'accepts and never answers':
        with listening(50) as p: yield p
    elif how == 'swallows connections':                     # the queue is full: the next SYN is dropped, as by a firewall
        with listening(0) as p:
            full = [socket.socket() for _ in range(3)]
            for s in full: s.setblocking(False); s.connect_ex(('127.0.0.1', p))
            yield p
            for s in full: s.close()
    else:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if how == 'slow': time.sleep(2)
                self.send_response(500); self.send_header('Content-Length', '0'); self.end_headers()
            do_POST = do_PUT = do_PATCH = do_GET
            def log_message(self, *a): pass
        http = ThreadingHTTPServer(('127.0.0.1', 0), Handler); http.daemon_threads = True; threading.Thread(target=http.serve_forever, daemon=True).start()
        yield http.server_address[1]
        http.shutdown(); http.server_close()

@pytest.fixture(scope='module')
def undisturbed(): return run(model=net(), **EPOCHS)

@pytest.mark.parametrize('how', ['refused', 'accepts and never answers', 'swallows connections', 'answers with 500', 'slow'])
def test_39_a_tracker_of_no_use(undisturbed, tmp_path, monkeypatch, capsys, how):
    "Training ends in the same weights and says once what is wrong; it never waits for a socket, and at the end for three seconds at most; later each point is delivered once"
    connects, joins, connect, join = [], [], socket.socket.connect, threading.Thread.join
    monkeypatch.setattr(socket.socket, 'connect', lambda s, at: (connects.append(threading.current_thread()), connect(s, at))[1])
    monkeypatch.setattr(threading.Thread, 'join', lambda t, timeout=None: (joins.append((t, timeout)), join(t, timeout))[1])
    monkeypatch.setitem(rtsseg.track.QUICK, 'MLFLOW_HTTP_REQUEST_TIMEOUT', '1')      # so that it is known soon that nobody answers
    with broken(how) as p:
        folder, tracker = world(tmp_path, f'http://127.0.0.1:{p}'); t = tracker()
        done = train(folder, t, [At(20, lambda run: wait_for(lambda: t.warned))])      # it was tried, and given up, while training went on
    equal(undisturbed, done); said = capsys.readouterr().out
    assert connects and threading.main_thread() not in connects
    assert [timeout for thread, timeout in joins if thread is t.thread] == [3]
    assert said.count('does not take what it is sent') == 1 and '6 events are still to be delivered: rtsseg-track --run ' in said
    join(t.thread, 30); monkeypatch.setenv('RTSSEG_TRACKER_URI', uri := f'sqlite:///{tmp_path}/healthy.db')
    rtsseg_track(str(folder)); assert '6 events delivered to sqlite:' in capsys.readouterr().out
    found, history = points(folder, uri); assert history == kept(folder) and found.info.status == 'FINISHED'
    assert [s for s, *_ in history['train/loss/bce']] == [1, 2, 3, 4] and [v for _, v, _ in history['train/loss/bce']] == [r['train/loss/bce'] for r in done.history]
    rtsseg_track(str(folder)); assert '0 events delivered' in capsys.readouterr().out
    assert points(folder, uri)[1] == history

def test_39_death_in_mid_run(undisturbed, tmp_path, capsys):
    "A real server is killed after the second epoch and started again later: the run does not notice, and the server ends with every point once"
    p = port(); process = start_server(tmp_path, p)
    try:
        folder, tracker = world(tmp_path, uri := f'http://127.0.0.1:{p}'); t = tracker()
        def kill(run): wait_for(lambda: left(folder, uri) == 0); os.killpg(process.pid, signal.SIGKILL); process.wait()
        equal(undisturbed, train(folder, t, [At(13, kill)]))                          # of 24 steps
        assert json.loads((folder/'tracker.json').read_text())['run_id'] and left(folder, uri) == 3 and 'does not take what it is sent' in capsys.readouterr().out
        process = start_server(tmp_path, p)
        tracker().catch_up()                                                          # as the next start of a run that is done does
        found, history = points(folder, uri); assert history == kept(folder) and {len(h) for h in history.values()} == {4} and found.info.status == 'FINISHED'
    finally: os.killpg(process.pid, signal.SIGKILL)

def test_39_the_deliverer_dies_at_every_step(tmp_path, monkeypatch):
    "After each request and before each note of it: what is sent again changes nothing, and there is one run"
    folder, tracker = world(tmp_path); t = tracker(); monkeypatch.setattr(t, 'mirror', lambda: None)
    t.thread = threading.Thread(target=print, daemon=True)
    done = run(folder, model=net(), observers=[t], **EPOCHS); t.write('end', status='FINISHED', files=['log.jsonl'])
    MlflowClient(f'sqlite:///{tmp_path}/empty.db')
    class Dies(Exception): pass
    count, real = [0], {n: getattr(MlflowClient, n) for n in ('create_experiment', 'create_run', 'update_run', 'log_batch', 'log_artifact', 'set_terminated')}
    def dies(f, k):
        def call(*a, **kw):
            out = f(*a, **kw); count[0] += 1
            if count[0] == k: raise Dies
            return out
        return call
    for k in range(1, 99):
        shutil.copy(tmp_path/'empty.db', tmp_path/f'{k}.db'); uri, count[0] = f'sqlite:///{tmp_path}/{k}.db', 0
        for n, f in real.items(): monkeypatch.setattr(MlflowClient, n, dies(f, k))
        try: deliver(folder, uri)
        except Dies:
            if k % 2: (folder/'tracker.json').unlink(missing_ok=True)                 # nothing is known of what was sent: the worst case
            deliver(folder, uri)
        else: break
        assert points(folder, uri)[1] == kept(folder)
    assert k > 9 and len(kept(folder)['train/loss/bce']) == len(done.history)

def test_39_a_spool_that_a_kill_cut_off(tmp_path):
    "The half line is not delivered, the next one follows the last whole one, and a damaged one is passed over"
    folder, tracker = world(tmp_path); t = tracker()
    half = train(folder, t, [At(8, stop)]); assert not half.finished and left(folder, t.uri) == 0
    with open(t.path, 'ab') as f: f.write(b'{"event": "metrics", "st')
    assert left(folder, t.uri) == 0
    t = tracker(); done = train(folder, t); found, history = points(folder, t.uri)
    assert done.finished and found.info.status == 'FINISHED' and history == kept(folder) and {len(h) for h in history.values()} == {4}      # the epochs of both lives, in one run
    t.path.write_bytes(t.path.read_bytes().replace(b'"metrics", "time"', b'"metrics\xff "time"', 1)); (folder/'tracker.json').unlink()
    deliver(folder, t.uri); assert points(folder, t.uri)[1] == history

def test_39_a_folder_that_cannot_be_written(undisturbed, tmp_path, monkeypatch, capsys):
    "A full disk costs the tracker its events, and the run nothing"
    def full(path, row): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(rtsseg.track, 'append_line', full); folder, tracker = world(tmp_path)
    equal(undisturbed, train(folder, tracker())); assert 'tracker.jsonl was not written (No space left on device)' in capsys.readouterr().out

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp('world')
    return load(overrides=['augment.enabled=false', 'loader.num_workers=0'], name='tiny', runs=folder/'runs', device='cpu', epochs=1, batch_size=8, val_frequency=1,
                freeze_backbone_epochs=0, data=dict(manifest=tiny_toy(folder), tile_size=64, split_check='warn'), sampler=dict(curriculum=[dict(first=1, last=4, ratio=1)]),
                model=dict(architecture='unet', encoder='tu-test_efficientnet', weights=None, options=dict(decoder_channels=[16, 8, 8, 8, 8])))

CLEAN = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'CI', 'PYTEST_CURRENT_TEST', 'PYTEST_VERSION', 'RTSSEG_TRACKER_URI')}      # a user's environment: MLflow keeps still in a test

def commands(stopped, found):
    "What other users see of this user's processes"
    while not stopped.is_set():
        for f in Path('/proc').glob('[0-9]*/cmdline'):
            try: found.add(f.read_bytes())
            except OSError: pass
        time.sleep(.02)

@pytest.mark.parametrize('health', ['healthy', 'down'])
def test_39_a_password_stays_where_it_was_given(tiny, server, tmp_path, health):
    "Neither the run folder, nor what is said, nor the list of processes, nor the tracker itself holds it"
    at = server.removeprefix('http://') if health == 'healthy' else f'127.0.0.1:{port()}'
    uri = f'http://user:canary@{at}' + ('?token=canary' if health == 'down' else '')
    cfg = tiny.model_copy(update=dict(runs=tmp_path/'runs', tracker=tiny.tracker.model_copy(update=dict(experiment=health))))
    (tmp_path/'tiny.yaml').write_text(to_yaml(cfg))
    if health == 'down': (tmp_path/'secret.yaml').write_text(f'tracker: {{uri: "{uri}"}}'); given, env = f"{tmp_path/'tiny.yaml'},{tmp_path/'secret.yaml'}", CLEAN      # in a config
    else: given, env = tmp_path/'tiny.yaml', CLEAN | dict(RTSSEG_TRACKER_URI=uri)                                                                                    # in the environment
    stopped, seen = threading.Event(), set(); watch = threading.Thread(target=commands, args=(stopped, seen)); watch.start()
    folder = run_folder(cfg, prepare(cfg).hash)
    done = [subprocess.run(c, env=env | more, capture_output=True, text=True, timeout=200) for c, more in (([BIN/'rtsseg-train', '--config', given], {}),
            ([sys.executable, '-c', f'from rtsseg.cli import rtsseg_track; rtsseg_track({str(folder)!r})'], dict(RTSSEG_TRACKER_URI=uri)))]
    stopped.set(); watch.join()
    assert [d.returncode for d in done] == [0, 0 if health == 'healthy' else 3], done
    assert ('does not take what it is sent (ConnectionRefusedError)' in done[0].stdout) == (health == 'down')
    assert not [d for d in done if 'canary' in d.stdout + d.stderr]
    assert any(b'--inline' in c for c in seen) and not [c for c in seen if b'canary' in c]
    assert (folder/'tracker.jsonl').stat().st_size and not [f for f in cfg.runs.rglob('*') if f.is_file() and b'canary' in f.read_bytes()]
    if health == 'healthy':
        client = MlflowClient(server); found, = client.search_runs([client.get_experiment_by_name(health).experiment_id])
        assert found.info.status == 'FINISHED' and found.data.params['epochs'] == '1' and 'canary' not in str(found.to_dictionary())
        names = [f.path for f in client.list_artifacts(found.info.run_id)]; assert 'log.jsonl' in names
        got = Path(client.download_artifacts(found.info.run_id, '', str(tmp_path))); assert not [f for f in got.rglob('*') if f.is_file() and f.name not in ('secret.yaml',) and b'canary' in f.read_bytes()]

def test_39_nobody_is_called_whom_the_user_did_not_name(tiny, tmp_path):
    "A run with the tracker that is set by default, a file, opens no socket to another machine and asks for no name: MLflow's reports to its makers are off"
    cfg = tiny.model_copy(update=dict(runs=tmp_path/'runs', seed=7)); (tmp_path/'tiny.yaml').write_text(to_yaml(cfg))
    guard = f"""
import socket
def called(*at):
    with open({str(tmp_path/'calls')!r}, 'a') as f: f.write(repr(at) + chr(10))
    raise OSError('no network')
real = socket.socket.connect
def connect(s, at): return real(s, at) if s.family == socket.AF_UNIX or at[0] in ('127.0.0.1', '::1') else called(at)
socket.socket.connect = connect; socket.socket.connect_ex = connect; socket.getaddrinfo = called
from rtsseg.config import load; from rtsseg.training import train
print(train(load({str(tmp_path/'tiny.yaml')!r})))
import time; time.sleep(3)
"""
    done = subprocess.run([sys.executable, '-c', guard], env=CLEAN, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and json.loads((next(tmp_path.rglob('tracker.json'))).read_text())['run_id'], done.stderr[-2000:]
    assert not (tmp_path/'calls').exists(), (tmp_path/'calls').read_text()
