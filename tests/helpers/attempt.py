"""A command in a forked process: it costs no imports, it can be killed or stopped at a chosen change on disk, alone or
with all that it started, and what it printed is kept"""
import atexit
import importlib
import mmap
import multiprocessing
import os
import signal
import struct
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import psutil

import rtsseg.fleet
import rtsseg.launch
import rtsseg.tuning
from helpers.shell import ONE_THREAD, exit_code, fork_trainers, redirect, run_command

# what commands import as they need it
for name in ('pixel_report', 'reporting', 'calibration', 'evaluation', 'prediction', 'export', 'class_export'):
    importlib.import_module(f'rtsseg.{name}')

# the card of a model names the commit, which may change while the tests run
ENVIRONMENT = ONE_THREAD | dict(GIT_DIR=os.devnull)

class Done(NamedTuple):
    "How a command ended"
    code: int          # exit code, or minus the signal that ended it
    printed: str       # stdout and stderr
    seconds: float     # of CPU, with those of processes that it waited for

class Attempt:
    "A command that runs, in the folder of the test"

    def __init__(self, folder, words, prepare=lambda: None, end=lambda: None, number=''):
        self.output = folder.with_name(f'{folder.name}.out{number}')
        self.output.unlink(missing_ok=True)
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            self.run(folder, words, prepare, end)

    def run(self, folder, words, prepare, end):
        "In the forked process"
        # what the tests would do at their end
        atexit._clear()
        code = 1
        try:
            os.setsid()
            for number in (1, 2):
                redirect(number, self.output)
            # both write at the end of the same file; pytest has put others into their places
            os.dup2(1, 2)
            sys.stdout, sys.stderr = (open(number, 'w', closefd=False) for number in (1, 2))
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            inherited = multiprocessing.current_process()._config
            inherited['authkey'] = b'test'
            # of the tests' own process; another user could not write there
            inherited.pop('tempdir', None)
            prepare()
            code = exit_code(lambda: run_command(*words, cwd=folder.parent, env=ENVIRONMENT))
            sys.stdout.flush()
            sys.stderr.flush()
            end()
        finally:
            os._exit(code)

    def has_ended(self):
        "Whether it has; it is not collected"
        return bool(os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT))

    def stands_still(self):
        "Whether it was stopped at a change on disk"
        return Path(f'/proc/{self.pid}/stat').read_text().rpartition(')')[2].split()[0] == 'T'

    def wait(self):
        "Its end"
        _, status, used = os.wait4(self.pid, 0)
        text = self.output.read_text(errors='replace') if self.output.exists() else ''
        return Done(os.waitstatus_to_exitcode(status), text, used.ru_utime + used.ru_stime)

def attempt(folder, words, prepare=lambda: None, end=lambda: None):
    "Run a command to its end; `prepare` and `end` are called in its process"
    return Attempt(folder, words, prepare, end).wait()

def note_modules(path):
    "For `attempt`, at the end: keep the names of all modules that were imported"
    return lambda: path.write_text('\n'.join(sys.modules))

def import_noted(path):
    "For `attempt`: import those modules, which another user may not be able to read"
    for name in path.read_text().splitlines():
        # scripts, and names that a library made up
        with suppress(Exception):
            importlib.import_module(name)

def fork_all():
    "For `attempt`: the command forks all that it starts, and does not wait for what has died longer than a second"
    fork_trainers()
    fork = multiprocessing.get_context('fork')
    rtsseg.fleet.multiprocessing = SimpleNamespace(get_context=lambda kind: fork)
    rtsseg.launch.GRACE_SECONDS = rtsseg.tuning.HEARTBEAT = 1

# ---------------------------------------------------------------- changes on disk

CHANGES = 'os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'os.link', 'os.truncate', 'sqlite3.connect'

def changes_disk(name, args):
    "Whether an audit event begins a change on disk"
    if name == 'open':
        return isinstance(args[0], str) and bool(args[2] & (os.O_WRONLY | os.O_RDWR)) and args[0] != os.devnull
    return name in CHANGES

# the process that was called, a trainer that it started, a worker of either
ROLES = 'command', 'trainer', 'worker'

class Changes:
    """Counts the changes on disk of a command in all its processes, and those of each of `ROLES`; does something at the
    k-th. A worker of a loader only reads, so that all that Python reports of workers counts for them. Flushing a file
    counts too, and does nothing: a process that dies does not lose what the kernel has"""

    def __init__(self, k=0, act=lambda root: None, role=''):
        # shared with forked processes
        self.shared = mmap.mmap(-1, 8 * (1 + len(ROLES)))
        self.k, self.act, self.role, self.root, self.is_busy = k, act, role, 0, False

    def counts(self):
        "{role: how many}; '' is all changes"
        return dict(zip(('', *ROLES), struct.unpack('4q', self.shared[:])))

    def own_role(self):
        if multiprocessing.parent_process():
            return 'worker'
        return 'command' if os.getpid() == self.root else 'trainer'

    def add(self, role, is_change=True):
        "One more"
        counts = self.counts()
        counts[role] += 1
        counts[''] += is_change
        self.shared[:] = struct.pack('4q', *counts.values())
        counted = is_change if self.role == '' else role == self.role
        if counted and counts[self.role] == self.k:
            self.act(self.root)

    def hook(self, name, args):
        # acting may open files
        if self.is_busy:
            return
        self.is_busy = True
        try:
            role, is_change = self.own_role(), changes_disk(name, args)
            if is_change or role == 'worker':
                self.add(role, is_change)
        finally:
            self.is_busy = False

    def flush(self, file):
        "In place of os.fsync"
        self.add(self.own_role())

    def prepare(self):
        "For `attempt`"
        self.root = os.getpid()
        fork_all()
        os.fsync = self.flush
        sys.addaudithook(self.hook)

def die(root):
    "For `Changes`: kill -9 of this process"
    os.kill(os.getpid(), signal.SIGKILL)

def kill_tree(root):
    "For `Changes`: kill -9 of a command and of all that it started"
    first = psutil.Process(root)
    others = [process for process in (*first.children(recursive=True), first) if process.pid != os.getpid()]
    for process in others:
        process.kill()
    psutil.wait_procs(others, timeout=10)
    die(root)

def stand_still(root):
    "For `Changes`: until SIGCONT"
    os.kill(os.getpid(), signal.SIGSTOP)
