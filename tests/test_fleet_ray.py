"A job on two actors of Ray, one of which is killed: the bytes are those of one process, and no shard is made twice"
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time

import psutil
import pytest

from test_fleet import ONE_THREAD, check_maps, fleet  # noqa: F401

pytest.importorskip('ray')

RUN = """
import sys
from rtsseg.fleet import map_scenes
from rtsseg.rayengine import find_engine
model, scenes, job = sys.argv[1:]
map_scenes(model, scenes, job, workers=2, device='cpu', windows=20, expiry=15., run=find_engine('ray'))
"""

class Watch:
    "What happens in the folder of a job: claims that were seen, and how often each shard was written"

    def __init__(self, job):
        self.job, self.claims, self.writes = job, set(), {}

    def look(self):
        "Note what is there; claims on shards that are not finished, with the process of each"
        for file in self.job.glob('shards/s*'):
            with contextlib.suppress(FileNotFoundError):
                # a file that is written again is another one
                self.writes.setdefault(file.name, set()).add((file.stat().st_ino, file.stat().st_mtime_ns))
        found = []
        for file in self.job.glob('claims/s*'):
            self.claims.add(file.name)
            with contextlib.suppress(FileNotFoundError, ValueError):
                worker = json.loads(file.read_text())['worker']
                found.append((file.name, int(worker.split('-')[-2])))
        return found

    def is_at_work(self, claim):
        "Whether the shard of a claim is being made"
        return (self.job/'claims'/claim).exists() and not (self.job/'shards'/claim.split('.')[0]).exists()

    def kill_one(self):
        "SIGKILL an actor in the middle of a shard; the name of its claim, or '' where none works on one"
        for claim, pid in self.look():
            with contextlib.suppress(ProcessLookupError):
                # held, so that it cannot end the shard meanwhile
                os.kill(pid, signal.SIGSTOP)
                number = signal.SIGKILL if self.is_at_work(claim) else signal.SIGCONT
                os.kill(pid, number)
                if number == signal.SIGKILL:
                    return claim
        return ''

def listening(process):
    "Addresses on which a process and its children wait for connections"
    found = set()
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            connections = each.net_connections(kind='inet')
            found |= {one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN}
    return found

class Run:
    "The job in a process of its own, which is watched"

    def __init__(self, fleet, home, folder):
        self.watch, self.out = Watch(home/'job'), home/'out'
        self.killed, self.addresses = '', set()
        self.arguments = [sys.executable, '-c', RUN, fleet/'model', fleet/'scenes', home/'job']
        # Ray's logs and its token stay in the folder of the test; its sockets need a short path.
        # Its actors would wait for all other processes of a busy machine
        self.env = ONE_THREAD | dict(HOME=str(home), RAY_TMPDIR=folder, RAY_worker_niceness='0')

    def start(self):
        "Run it to its end, and kill an actor meanwhile; the exit code"
        with open(self.out, 'w') as out:
            process = subprocess.Popen(self.arguments, env=self.env, stdout=out, stderr=out)
            while process.poll() is None:
                if self.killed:
                    self.watch.look()
                elif killed := self.watch.kill_one():
                    self.killed, self.addresses = killed, listening(psutil.Process(process.pid))
                time.sleep(.02)
        return process.returncode

@pytest.mark.slow
def test_an_actor_that_is_killed_costs_nothing(fleet, tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        run = Run(fleet, tmp_path, folder)
        code = run.start()
        for _ in range(9):
            # on a machine that is very busy Ray gives up before its processes are there
            if 'Ray did not start' in run.out.read_text():
                code = run.start()
    assert code == 0, run.out.read_text()
    assert run.killed.endswith('.0001')
    shard, watch = run.killed.split('.')[0], run.watch
    assert f'{shard}.0002' in watch.claims, 'its shard was not claimed again'
    assert shard in watch.writes
    assert {len(files) for files in watch.writes.values()} == {1}
    # nobody outside of this machine can reach it
    assert run.addresses
    assert all(address.removeprefix('::ffff:').startswith('127.') for address in run.addresses)
    check_maps(fleet, watch.job)
