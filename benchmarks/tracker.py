"""A small training run, as a command, whose tracker fails, beside the same run with a healthy server

python benchmarks/tracker.py [rounds] [epochs]     ten minutes
"""
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from common import emit_value, turns
from rtsseg.config import load, to_yaml
from rtsseg.toy import tiny_toy

BIN = Path(sys.executable).parent
GOAL_SECONDS = 5

@contextmanager
def answering(status, delay=0):
    "Port of a server that answers every request with this status, after some seconds"
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            time.sleep(delay)
            self.send_response(status)
            self.send_header('Content-Length', '0')
            self.end_headers()

        do_POST = do_PUT = do_PATCH = do_GET

        def log_message(self, *arguments): pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()

@contextmanager
def listening(backlog, clients=0):
    "A port that accepts nothing; with as many clients as its queue holds, further connections get no reply at all"
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        listener.listen(backlog)
        others = [socket.socket() for _ in range(clients)]
        for client in others:
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]

@contextmanager
def closed():
    "A port that is bound, so that no other process takes it, and does not listen"
    with socket.socket() as bound:
        bound.bind(('127.0.0.1', 0))
        yield bound.getsockname()[1]

@contextmanager
def healthy(folder):
    "Port of an MLflow server"
    with closed() as port:
        pass
    command = [BIN/'mlflow', 'server', '--host', '127.0.0.1', '--port', str(port), '--workers', '1',
               '--backend-store-uri', f'sqlite:///{folder}/mlflow.db', '--artifacts-destination', folder/'artifacts']
    quiet = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
    server = subprocess.Popen(command, **quiet, start_new_session=True)
    try:
        wait_for(f'http://127.0.0.1:{port}/health')
        yield port
    finally:
        os.killpg(server.pid, 9)
        server.wait()

def wait_for(address):
    while True:
        try:
            urllib.request.urlopen(address, timeout=2)
            return
        except OSError:
            time.sleep(.2)

class Runs:
    "Runs of one small config, each in a folder of its own"
    def __init__(self, folder, epochs):
        self.folder, self.count = folder, 0
        cfg = load(overrides=['augment.enabled=false', 'loader.num_workers=0'], name='tiny', device='cpu',
                   epochs=epochs, batch_size=8, val_frequency=1, freeze_backbone_epochs=0,
                   data={'manifest': tiny_toy(folder), 'tile_size': 64, 'split_check': 'warn'},
                   sampler={'curriculum': [{'first': 1, 'last': 9, 'ratio': 1}]},
                   model={'architecture': 'unet', 'encoder': 'tu-test_efficientnet', 'weights': None,
                          'options': {'decoder_channels': [16, 8, 8, 8, 8]}})
        (folder/'tiny.yaml').write_text(to_yaml(cfg))

    def train(self, port):
        self.count += 1
        runs = f'runs={self.folder}/runs{self.count}'
        command = [BIN/'rtsseg-train', '--config', self.folder/'tiny.yaml', '--inline', '--overrides', runs]
        environment = os.environ | {'RTSSEG_TRACKER_URI': f'http://127.0.0.1:{port}'}
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)

def main(rounds=3, epochs=3):
    trackers = {
        'refuses': closed(),
        'accepts and never answers': listening(50),
        'gets no connection': listening(0, clients=3),
        'answers with 500': answering(500),
        'answers after 2 s': answering(500, delay=2),
    }
    with tempfile.TemporaryDirectory() as folder, healthy(Path(folder)) as well:
        runs = Runs(Path(folder), epochs)
        for what, tracker in trackers.items():
            with tracker as port:
                ours, peer = turns(lambda port=port: runs.train(port), lambda: runs.train(well), rounds, warm=0)
            more = [a - b for a, b in zip(ours, peer, strict=True)]
            median = statistics.median(more)
            emit_value(f'a run whose tracker {what} / with a healthy server: seconds more', round(median, 2), unit='s',
                       goal=f'≤ {GOAL_SECONDS} s', met=median <= GOAL_SECONDS, most=round(max(more), 2), rounds=rounds)

if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
