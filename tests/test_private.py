"Packages that we import send no word of their use: nothing reaches a proxy that stands where they would go"
import os
import socket
import subprocess
import sys
import threading

import pytest

# what makes MLflow believe that it is tested, and so say nothing anyway
TEST_MARKS = ('PYTEST', 'CI', 'GITHUB', 'JENKINS', 'TRAVIS')
SWITCHES = ('MLFLOW_DISABLE_TELEMETRY', 'DO_NOT_TRACK', 'HF_HUB_DISABLE_TELEMETRY', 'NO_ALBUMENTATIONS_UPDATE')

class Listener:
    "A proxy that answers nobody, and keeps the first line of what it is asked"

    def __init__(self):
        self.asked = []
        self.server = socket.create_server(('127.0.0.1', 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(4096).split(b'\r\n')[0].decode())

@pytest.fixture
def listener():
    found = Listener()
    yield found
    found.server.close()

def environment(port):
    "That of a user who has set nothing, with all web traffic sent to a port"
    kept = {name: value for name, value in os.environ.items()
            if name not in SWITCHES and not name.startswith(TEST_MARKS)}
    proxy = f'http://127.0.0.1:{port}'
    proxies = dict.fromkeys(('HTTP_PROXY', 'HTTPS_PROXY', 'http_proxy', 'https_proxy'), proxy)
    return kept | proxies | dict(no_proxy='', NO_PROXY='')

TRACKED = """
import mlflow
mlflow.set_tracking_uri('sqlite:///runs.db')
with mlflow.start_run():
    mlflow.log_metric('value', 1)
"""
AUGMENTED = 'import albumentations'

def run(code, folder, port):
    done = subprocess.run([sys.executable, '-c', code], cwd=folder, env=environment(port), capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]

@pytest.mark.parametrize('code, host', [(TRACKED, 'mlflow-telemetry'), (AUGMENTED, 'pypi')])
def test_packages_that_are_imported_after_ours_say_nothing(listener, tmp_path, code, host):
    run(code, tmp_path, listener.port)
    # alone they do: else the test could not fail
    assert any(host in line for line in listener.asked), listener.asked
    listener.asked.clear()
    run(f'import rtsseg\n{code}', tmp_path, listener.port)
    assert not listener.asked

@pytest.mark.parametrize('module, code', [
    ('huggingface_hub.constants', 'HF_HUB_DISABLE_TELEMETRY'),
    ('wandb', 'env.error_reporting_enabled() is False'),
    ('ray._common.usage.usage_lib', 'usage_stats_enabled() is False'),
])
def test_packages_know_that_they_are_to_say_nothing(tmp_path, module, code):
    pytest.importorskip(module.split('.')[0])
    run(f'import rtsseg\nimport {module} as package\nassert package.{code}', tmp_path, 9)

def test_what_a_user_has_set_stays(tmp_path):
    code = ("import os\nos.environ['MLFLOW_DISABLE_TELEMETRY'] = 'false'\nimport rtsseg\n"
            "assert os.environ['MLFLOW_DISABLE_TELEMETRY'] == 'false'")
    run(code, tmp_path, 9)
