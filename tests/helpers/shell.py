"""The commands, each in a process of its own that was forked from one that has imported everything: what a shell gives,
without the seconds of its imports"""
import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

processes = multiprocessing.get_context('forkserver')
processes.set_forkserver_preload(['rtsseg.tuning', 'rtsseg.prediction', 'rtsseg.reporting', 'rtsseg.pixel_report'])

# with IN_TEST set, nbdev's commands do nothing
CLEAN = {name: value for name, value in os.environ.items() if name != 'IN_TEST'}

def redirect(descriptor, path):
    "Let stdout (1) or stderr (2) of this process go to a file"
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)

def run_command(name, *args, out, err, cwd, env, prepare):
    "In the forked process: run a command as its script in bin/ does"
    redirect(1, out)
    redirect(2, err)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [name, *args]
    if prepare:
        prepare()
    try:
        runpy.run_path(str(Path(sys.executable).parent/name), run_name='__main__')
    finally:
        # a forked process does not do this by itself
        atexit._run_exitfuncs()

def shell(*call, cwd='.', env=CLEAN, timeout=600, prepare=None):
    """`shell('rtsseg-x', '--a', b)`: exit code and output, as subprocess.run returns them. What is read at import
    (OMP_NUM_THREADS and the like) is as it is in this process. `prepare`, a function of a module, is called first"""
    with TemporaryDirectory() as folder:
        out, err = Path(folder)/'out', Path(folder)/'err'
        settings = dict(out=out, err=err, cwd=os.path.abspath(cwd), env=env, prepare=prepare)
        process = processes.Process(target=run_command, args=[*map(str, call)], kwargs=settings)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(call, timeout)
        return subprocess.CompletedProcess(call, process.exitcode, out.read_text(), err.read_text())
