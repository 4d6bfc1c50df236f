"Work in a forked process that is killed at a point which the test chooses"
import os
import resource
import signal
import sys

from rtsseg.console import RtssegError

def in_child(work, prepare=lambda: None):
    "Do the work in a forked, silent process; its exit code, or minus the signal that ended it"
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        prepare()
        work()
    except RtssegError as error:
        os._exit(error.code)
    except BaseException:
        os._exit(1)
    os._exit(0)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

FILE_EVENTS = 'open', 'os.rename', 'os.remove', 'os.rmdir', 'shutil.rmtree'

def killed_at_file_event(k):
    "For `prepare`: kill -9 at the k-th file that is opened, renamed or removed after the first folder was made"
    seen = 0

    def hook(name, args):
        nonlocal seen
        if name == 'os.mkdir' or (seen and name in FILE_EVENTS):
            seen += 1
            if seen == k:
                die()

    return lambda: sys.addaudithook(hook)

def never_opened_for_writing(path):
    "For `prepare`: opening this path for writing ends the process with code 1"
    def hook(name, args):
        if name == 'open' and str(args[0]) == str(path) and args[2] & (os.O_WRONLY | os.O_RDWR):
            os._exit(1)
    return lambda: sys.addaudithook(hook)

def count_calls(work):
    "How many times Python enters or leaves a function while it does the work"
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls

def killed_at_call(k):
    "For `prepare`: kill -9 when Python enters or leaves a function for the k-th time"
    left = k

    def count(frame, event, argument):
        nonlocal left
        left -= 1
        if left <= 0:
            die()

    return lambda: sys.setprofile(count)

def limit_file_size(size):
    "No file of this process can grow beyond `size` bytes: writing fails as on a full disk"
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

def full_disk(size):
    "For `prepare`: writing a file beyond `size` bytes fails"
    return lambda: limit_file_size(size)

def killed_while_writing(size):
    "For `prepare`: the kernel kills the process when it writes a file beyond `size` bytes"
    def prepare():
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        limit_file_size(size)
    return prepare
