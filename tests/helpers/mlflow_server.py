"A real MLflow server on loopback, and ports where no server works"
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from helpers.pair import free_port
from helpers.waiting import wait_for

MLFLOW = Path(sys.executable).parent/'mlflow'

def is_healthy(port):
    try:
        return urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=2).status == 200
    except OSError:
        return False

class Server:
    "An MLflow server that keeps its data in a folder"

    def __init__(self, folder):
        self.folder, self.port, self.process = folder, free_port(), None
        self.uri = f'http://127.0.0.1:{self.port}'

    def start(self):
        "Start it and wait until it answers"
        command = [MLFLOW, 'server', '--host', '127.0.0.1', '--port', str(self.port), '--workers', '1']
        stores = ['--backend-store-uri', f'sqlite:///{self.folder}/mlflow.db']
        stores += ['--artifacts-destination', self.folder/'artifacts']
        silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen(command + stores, start_new_session=True, **silent)
        try:
            wait_for(lambda: is_healthy(self.port))
        except BaseException:
            self.stop()
            raise

    def stop(self):
        "Kill it and its workers, which may be gone"
        if self.process:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

# ---------------------------------------------------------------- ports where no tracker works

@contextmanager
def refusing_port():
    "Nothing listens: connections are refused"
    yield free_port()

@contextmanager
def listening_port(backlog=50):
    "Connections are made by the kernel, and no program accepts them"
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        listener.listen(backlog)
        yield listener.getsockname()[1]

@contextmanager
def swallowing_port():
    "The queue of connections is full: packets of a further one are dropped, as by a firewall"
    with listening_port(backlog=0) as port, ExitStack() as held:
        for _ in range(3):
            waiting = held.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(('127.0.0.1', port))
        yield port

@contextmanager
def failing_port(answer_at_once=True):
    "Requests are answered with code 500, or not before the end"
    closing = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if not answer_at_once:
                closing.wait()
            self.send_response(500)
            self.send_header('Content-Length', '0')
            self.end_headers()

        do_POST = do_PUT = do_PATCH = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
