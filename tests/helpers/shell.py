"""The commands, each in a process of its own that was forked from one that has imported everything: what a shell gives,
without the seconds of its imports"""
import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch

BIN = Path(sys.executable).parent

processes = multiprocessing.get_context('forkserver')
processes.set_forkserver_preload(['rtsseg.tuning', 'rtsseg.prediction', 'rtsseg.reporting', 'rtsseg.pixel_report'])

# with IN_TEST set, nbdev's commands do nothing
CLEAN = {name: value for name, value in os.environ.items() if name != 'IN_TEST'}
# the same number of threads in every process of a test
ONE_THREAD = CLEAN | dict(OMP_NUM_THREADS='1')

# ---------------------------------------------------------------- a trainer that waits

HOLD = Path(__file__).parent/'hold'

def held(folder, epoch, until='/nowhere'):
    "Environment in which the trainer of a run waits after an epoch until it is asked to stop, or until a file exists"
    path = f"{HOLD}:{ONE_THREAD.get('PYTHONPATH', '')}"
    return ONE_THREAD | dict(PYTHONPATH=path, HOLD_RUN=str(folder), HOLD_EPOCH=str(epoch), HOLD_UNTIL=str(until))

# ---------------------------------------------------------------- in the forked process

def redirect(descriptor, path):
    "Let stdout (1) or stderr (2) of this process go to a file"
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)

def run_command(name, *args, cwd, env):
    "Run a command as its script in bin/ does, or `-c code` as Python does"
    os.chdir(cwd)
    os.environ.clear()
    # a forked process cannot start over to get one
    os.environ.update(dict(PYTHONHASHSEED='42') | env)
    sys.argv = [name, *args]
    torch.set_num_threads(int(env.get('OMP_NUM_THREADS', torch.get_num_threads())))
    # what Python does at its start
    if '--inline' in args and 'HOLD_RUN' in env:
        runpy.run_path(str(HOLD/'sitecustomize.py'))['hold_trainer']()
    try:
        if name == '-c':
            exec(*args, {'__name__': '__main__'})
        else:
            runpy.run_path(str(BIN/name), run_name='__main__')
    finally:
        # a forked process does not do this by itself
        atexit._run_exitfuncs()

def run_redirected(*call, out, err, prepare, **options):
    "Run a command whose output goes to files"
    redirect(1, out)
    redirect(2, err)
    # these end it, also where the process that runs the tests ignores them
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if prepare:
        prepare()
    run_command(*call, **options)

# ---------------------------------------------------------------- in the test

class Program:
    "A command that runs meanwhile, with what tests use of `subprocess.Popen`"

    def __init__(self, *call, cwd='.', env=CLEAN, prepare=None):
        self.call, self.folder = [*map(str, call)], TemporaryDirectory()
        self.out, self.err = (Path(self.folder.name)/name for name in ('out', 'err'))
        options = dict(out=self.out, err=self.err, cwd=os.path.abspath(cwd), env=env, prepare=prepare)
        self.process = processes.Process(target=run_redirected, args=self.call, kwargs=options)
        self.process.start()
        self.pid = self.process.pid

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.wait()
        self.folder.cleanup()

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout=300):
        "Its exit code; raises `TimeoutExpired`"
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.call, timeout)
        return self.poll()

    def printed(self):
        "What it printed so far: stdout, then stderr"
        return ''.join(path.read_text() for path in (self.out, self.err) if path.exists())

    def kill(self):
        self.process.kill()

@contextmanager
def running(program):
    "A `Program` or a Popen, which is killed where it outlives the test"
    with program:
        try:
            yield program
        finally:
            program.kill()

def shell(*call, timeout=600, **options):
    """`shell('rtsseg-x', '--a', b)`: exit code and output, as subprocess.run returns them. Of what libraries read at
    import, the number of torch's threads is that of `env`. `prepare`, a function of a module, is called first"""
    with running(Program(*call, **options)) as program:
        code = program.wait(timeout)
        return subprocess.CompletedProcess(call, code, program.out.read_text(), program.err.read_text())

# ---------------------------------------------------------------- the trainers of a launcher

def exit_code(work):
    "Do the work of a process; the code with which it exits"
    try:
        work()
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else bool(e.code)
    except BaseException:
        # torch's hook, which names the rank
        sys.excepthook(*sys.exc_info())
        return 1
    return 0

class ForkedTrainer:
    "In place of subprocess.Popen in rtsseg.launch: a trainer that is forked from its launcher"

    def __init__(self, program, env, start_new_session, stdin, stdout, stderr):
        self.returncode = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        # these are the launcher's to run
        atexit._clear()
        code = 1
        try:
            os.setsid()
            self.take_streams(stdin, stdout, stderr)
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = exit_code(lambda: run_command(Path(program[0]).name, *program[1:], cwd='.', env=env))
            sys.stdout.flush()
        finally:
            os._exit(code)

    def take_streams(self, *streams):
        "Read and write where the launcher says, and close all that is the launcher's"
        for number, stream in enumerate(streams):
            source = os.open(os.devnull, os.O_RDWR) if stream == subprocess.DEVNULL else stream
            os.dup2(source if isinstance(source, int) else source.fileno(), number)
        os.closerange(3, 1024)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self):
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

def fork_trainers():
    "For `prepare`: the command forks its trainers"
    import rtsseg.launch
    rtsseg.launch.subprocess = SimpleNamespace(Popen=ForkedTrainer, DEVNULL=subprocess.DEVNULL)
