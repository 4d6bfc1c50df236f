"Work in a forked process that is killed at a point which the test chooses"
import os
import resource
import signal
import sys
import threading
from functools import partial

import rtsseg.files
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
    "How many times Python enters or leaves a function while it does the work, in all threads"
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += 1

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return calls

def killed_at_call(k):
    "For `prepare`: kill -9 when Python enters or leaves a function for the k-th time"
    left = k

    def count(frame, event, argument):
        nonlocal left
        left -= 1
        if left <= 0:
            die()

    def prepare():
        threading.setprofile(count)
        sys.setprofile(count)

    return prepare

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

FILE_CALLS = 'open', 'fsync', 'link', 'replace', 'unlink', 'close'

class HalfWritten:
    "A file that calls `step` before each write with what would write the first half of it"
    def __init__(self, step, *args, **options):
        self.step, self.file = step, open(*args, **options)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.step(lambda: self.write_half(data))
        return self.file.write(data)

    def write_half(self, data):
        self.file.write(data[:len(data) // 2])
        self.file.flush()

def killed_at_write_step(k):
    "For `prepare`: kill -9 at the k-th step of writing files, which is a call of `os` or the middle of a write"
    seen = 0

    def step(last_words=lambda: None):
        nonlocal seen
        seen += 1
        if seen == k:
            last_words()
            die()

    def counted(call):
        def count_and_call(*args, **options):
            step()
            return call(*args, **options)
        return count_and_call

    def prepare():
        for name in FILE_CALLS:
            setattr(os, name, counted(getattr(os, name)))
        rtsseg.files.open = partial(HalfWritten, step)

    return prepare

def killed_after(seconds):
    "For `prepare`: the kernel ends the process (SIGPROF) once it has used this much CPU time; never for 0"
    return lambda: signal.setitimer(signal.ITIMER_PROF, seconds)
