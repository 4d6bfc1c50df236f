"Programs that a test starts, and stops while they train"
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

from helpers.shell import CLEAN

# programs of a test train with one thread, as the test itself does
ONE_THREAD = CLEAN | dict(OMP_NUM_THREADS='1')
HOLD = Path(__file__).parent/'hold'

def held(folder, epoch, until='/nowhere'):
    "Environment in which the trainer of a run waits after an epoch until it is asked to stop, or until a file exists"
    path = f"{HOLD}:{ONE_THREAD.get('PYTHONPATH', '')}"
    return ONE_THREAD | dict(PYTHONPATH=path, HOLD_RUN=str(folder), HOLD_EPOCH=str(epoch), HOLD_UNTIL=str(until))

def default_hangup():
    "SIGHUP ends a program, also where the process that runs the tests ignores it"
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

@contextmanager
def started(*command, env=ONE_THREAD, **more):
    "A program that runs meanwhile, and is killed where it outlives the test"
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen([*map(str, command)], env=env, preexec_fn=default_hangup, **streams | more)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
