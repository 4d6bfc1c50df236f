"The commands, each in a process of its own that was forked from one that has imported everything: what a shell gives, without the seconds of its imports"
import atexit, multiprocessing, os, runpy, subprocess, sys
from pathlib import Path
from tempfile import TemporaryDirectory

processes = multiprocessing.get_context('forkserver'); processes.set_forkserver_preload(['rtsseg.tuning', 'rtsseg.prediction', 'rtsseg.reporting'])
CLEAN = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}       # with it set, nbdev's commands do nothing

def _main(name, *args, said, cwd, env):
    for fd, file in ((1, 'out'), (2, 'err')): os.dup2(os.open(said/file, os.O_WRONLY | os.O_CREAT), fd)
    os.chdir(cwd); os.environ.clear(); os.environ.update(env); sys.argv = [name, *args]
    try: runpy.run_path(str(Path(sys.executable).parent/name), run_name='__main__')
    finally: atexit._run_exitfuncs()                                    # which a forked process leaves out

def shell(*call, cwd='.', env=CLEAN, timeout=200):
    "`shell('rtsseg-x', '--a', b)`: its exit code and what it said, as subprocess.run tells them. What is read at import (OMP_NUM_THREADS and the like) is as it is here"
    with TemporaryDirectory() as said:
        process = processes.Process(target=_main, args=[*map(str, call)], kwargs=dict(said=Path(said), cwd=os.path.abspath(cwd), env=env)); process.start(); process.join(timeout)
        if process.exitcode is None: process.kill(); raise subprocess.TimeoutExpired(call, timeout)
        return subprocess.CompletedProcess(call, process.exitcode, *(Path(said, file).read_text() for file in ('out', 'err')))
