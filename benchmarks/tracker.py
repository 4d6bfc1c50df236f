"A small training run, as a command, whose tracker is of no use, against the same run with a healthy server: seconds that it takes longer"
import os, socket, statistics, subprocess, sys, tempfile, threading, time, urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from common import emit, turns
from rtsseg.config import load, to_yaml
from rtsseg.toy import tiny_toy

BIN = Path(sys.executable).parent

@contextmanager
def answering(status, delay=0):
    "A server that answers everything so"
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self): time.sleep(delay); self.send_response(status); self.send_header('Content-Length', '0'); self.end_headers()
        do_POST = do_PUT = do_PATCH = do_GET
        def log_message(self, *a): pass
    http = ThreadingHTTPServer(('127.0.0.1', 0), Handler); http.daemon_threads = True; threading.Thread(target=http.serve_forever, daemon=True).start()
    yield http.server_address[1]
    http.shutdown()

@contextmanager
def listening(backlog, clients=0):
    "A port whose connections nobody takes up; with as many clients as it has room for, it swallows the next"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen(backlog); others = [socket.socket() for _ in range(clients)]
        for c in others: c.setblocking(False); c.connect_ex(s.getsockname())
        yield s.getsockname()[1]

@contextmanager
def closed():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); yield s.getsockname()[1]      # bound, so that nobody else takes it, and not listening

@contextmanager
def healthy(folder):
    with closed() as port: pass
    server = subprocess.Popen([BIN/'mlflow', 'server', '--host', '127.0.0.1', '--port', str(port), '--workers', '1', '--backend-store-uri', f'sqlite:///{folder}/mlflow.db', '--artifacts-destination', folder/'artifacts'],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while True:
        try: urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=2); break
        except OSError: time.sleep(.2)
    try: yield port
    finally: os.killpg(server.pid, 9); server.wait()

def main(rounds=3, epochs=3):
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        cfg = load(overrides=['augment.enabled=false', 'loader.num_workers=0'], name='tiny', device='cpu', epochs=epochs, batch_size=8, val_frequency=1, freeze_backbone_epochs=0,
                   data=dict(manifest=tiny_toy(d), tile_size=64, split_check='warn'), sampler=dict(curriculum=[dict(first=1, last=9, ratio=1)]),
                   model=dict(architecture='unet', encoder='tu-test_efficientnet', weights=None, options=dict(decoder_channels=[16, 8, 8, 8, 8])))
        (d/'tiny.yaml').write_text(to_yaml(cfg)); count = [0]
        def train(port):
            count[0] += 1
            subprocess.run([BIN/'rtsseg-train', '--config', d/'tiny.yaml', '--inline', '--overrides', f"runs={d}/runs{count[0]}"], env=os.environ | dict(RTSSEG_TRACKER_URI=f'http://127.0.0.1:{port}'), check=True, stdout=subprocess.DEVNULL)
        with healthy(d) as well:
            for what, tracker in (('refuses', closed()), ('accepts and never answers', listening(50)), ('swallows connections', listening(0, 3)), ('answers with 500', answering(500)), ('answers after 2 s', answering(500, 2))):
                with tracker as port: ours, peer = turns(lambda: train(port), lambda: train(well), rounds, warm=0)
                more = [a - b for a, b in zip(ours, peer)]
                emit(f'a run whose tracker {what} / with a healthy server', ours, peer, seconds_more=round(statistics.median(more), 2), most_seconds_more=round(max(more), 2), goal_seconds_more=5, met=statistics.median(more) <= 5)

if __name__ == '__main__': main(*map(int, sys.argv[1:]))
