"Faults 43 to 46: each command killed, on a full disk, beside another one, and on machines that are not as usual"
import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from helpers.attempt import ENVIRONMENT, Attempt, Changes, die, fork_all, import_noted, kill_tree, stand_still
from helpers.children import killed_after
from helpers.jobs import JOBS, Works, digests
from helpers.record import IS_LONG, LONG, note
from helpers.shell import BIN, running
from helpers.waiting import wait_for

ROOT = Path(__file__).parents[2]

FAULTS = {
    43: (
        'any command, or a process that it started, is killed: training with its launcher and loaders, evaluation, '
        'calibration, report, prediction, map workers, search, export, training of every system',
        'the same command ends in the same bytes',
    ),
    44: (
        'the disk fills up under any of these commands',
        'it stops with exit code 3, or does without what can be left out; what was there stays; with room, the same '
        'command ends in the same bytes',
    ),
    45: (
        'two of these commands at once in one run folder',
        'each ends, or is refused by a line that names the other; the same commands one after another end in the '
        'same bytes',
    ),
    46: (
        'a read-only folder, another umask, a folder of another user, a clock that jumps back by an hour, a file '
        'system without hard links or locks',
        'the same bytes, or one line that says what is missing; nothing is half written',
    ),
}

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "A process of one thread may be forked"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

def mounted(*words):
    "Call mount; whether that is possible here"
    return bool(shutil.which('mount')) and subprocess.run(['mount', *words], capture_output=True).returncode == 0

def resize(disk, size):
    "Give a disk in memory a size in bytes, 0: no limit; whether it was mounted"
    options = f'remount,size={size}' if os.path.ismount(disk) else f'size={size}'
    return mounted('-t', 'tmpfs', '-o', options, 'tmpfs', disk)

@pytest.fixture(scope='module')
def works():
    """What the jobs find and leave, in a folder that every user can reach; on a disk in memory where these tests may
    mount one"""
    with tempfile.TemporaryDirectory() as folder:
        home, disk = Path(folder), Path(folder)/'disk'
        home.chmod(0o755)
        disk.mkdir()
        is_own = resize(disk, 0)
        disk.chmod(0o755)
        yield Works(home)
        if is_own:
            subprocess.run(['umount', '-l', disk], check=True)

def assert_done(name, done):
    "The command ended well, or has nothing left to do"
    job = JOBS[name]
    is_done_already = job.refuses and done.code == 2 and job.refuses in done.printed
    assert done.code == 0 or is_done_already, done.printed

def assert_ended(works, name, done):
    "The job is done, as where nothing disturbed it"
    assert_done(name, done)
    assert digests(works.work) == works.expected(name)

# ---------------------------------------------------------------- 43: killed

def killed_in(seconds):
    "For `attempt`: the kernel ends the command once it has computed for so long"
    def prepare():
        fork_all()
        killed_after(seconds)()
    return prepare

def kill_points(name, works, dice):
    "Where to kill: by turns at a change on disk, in the middle of computing, and in each process of several"
    counts, seconds, _ = works.measured[name]
    roles = JOBS[name].roles
    while True:
        yield Changes(dice.randint(1, counts['']), kill_tree).prepare
        if not roles:
            yield killed_in(dice.uniform(.05, .95) * seconds)
        for role in roles:
            yield Changes(dice.randint(1, counts[role]), die, role).prepare

@pytest.mark.parametrize('name', JOBS)
def test_43_killed_anywhere(works, name):
    "At a change on disk, in the middle of computing, or a process of several: the same command ends in the same bytes"
    kills, dice = JOBS[name].kills * LONG, random.Random(0)
    works.expected(name)
    points = kill_points(name, works, dice)
    killed = 0
    while killed < kills:
        works.restore(name)
        for _ in range(min(3, kills - killed)):
            killed += works.attempt(name, next(points)).code != 0
        assert_ended(works, name, works.attempt(name, fork_all))
    note('kills', name, killed, kills)

def kernels(papermill):
    "The kernels that papermill has started"
    children = psutil.Process(papermill.pid).children(recursive=True)
    return [child for child in children if any('ipykernel_launcher' in word for word in child.cmdline())]

def computed_for(papermill, seconds):
    "Whether papermill has ended, or its kernel has computed for so long"
    if papermill.poll() is not None:
        return True
    with suppress(psutil.NoSuchProcess):
        return any(sum(kernel.cpu_times()[:2]) > seconds for kernel in kernels(papermill))

@pytest.mark.slow
@pytest.mark.skipif(not IS_LONG, reason='a kernel takes ten seconds to start: this is a part of make soak')
def test_43_the_kernel_of_a_notebook(works):
    "The chapter of calibration under papermill: that fails, and calibrates when it is run again"
    expected, dice, killed = works.expected('calibrate'), random.Random(3), 0
    command = [BIN/'papermill', '06_calibrate.ipynb', works.home/'out.ipynb', '-p', 'config', works.work/'tiny.yaml']
    run = partial(subprocess.Popen, command, cwd=ROOT/'nbs', env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                  stderr=subprocess.DEVNULL)
    works.restore('calibrate')
    with run() as whole:
        wait_for(lambda: computed_for(whole, 0))
        kernel, = kernels(whole)
        seconds = 0
        while whole.poll() is None:
            with suppress(psutil.NoSuchProcess):
                seconds = sum(kernel.cpu_times()[:2])
            time.sleep(.1)
        assert whole.returncode == 0
    while killed < LONG:
        works.restore('calibrate')
        point = dice.uniform(.3, 1) * seconds
        with running(run()) as papermill:
            wait_for(partial(computed_for, papermill, point))
            for kernel in kernels(papermill):
                kernel.kill()
            killed += papermill.wait() != 0
        with run() as papermill:
            assert papermill.wait() == 0
        found = digests(works.work)
        assert all(found[name] == value for name, value in expected.items())
    note('kills', 'kernel of a notebook', killed, LONG)

# ---------------------------------------------------------------- 44: a full disk

@pytest.fixture
def disk(works):
    "The disk of the work folder, whose size can be set"
    if not os.path.ismount(works.home/'disk'):
        pytest.skip('only root can mount a disk of a chosen size')
    yield works.home/'disk'
    resize(works.home/'disk', 0)

def used_bytes(disk):
    "What a disk holds"
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize

# another system fills a disk no otherwise
STARVED = list(JOBS) if IS_LONG else [name for name, job in JOBS.items() if not job.system]

@pytest.mark.parametrize('name', STARVED)
def test_44_a_disk_that_fills_up(works, disk, name):
    """At a random byte of what the command writes: exit code 3, or 0 where it could do without; nothing is lost, and
    with room the same command ends in the same bytes"""
    times, dice, expected = 2 * LONG - 1, random.Random(1), works.expected(name)
    room = works.measured[name][2]
    survived = 0
    for _ in range(times):
        works.restore(name)
        before = digests(works.work)
        resize(disk, used_bytes(disk) + dice.randrange(0, room, 4096))
        done = works.attempt(name, fork_all)
        resize(disk, 0)
        assert done.code in (0, 3), done.printed
        assert 'Traceback' not in done.printed, done.printed
        after = digests(works.work)
        assert all(after[file] in (before[file], expected.get(file)) for file in before)
        assert_ended(works, name, works.attempt(name, fork_all))
        survived += 1
    note('full disks', name, survived, times)

# ---------------------------------------------------------------- 45: two at once

PAIRED = 'train', 'evaluate', 'calibrate', 'test', 'report', 'predict', 'export'

def partners(first):
    "The commands that run beside one: all in the long form; else the same one and the next one"
    place = PAIRED.index(first)
    return PAIRED if IS_LONG else PAIRED[place:place + 2]

@pytest.mark.parametrize('first', PAIRED)
def test_45_two_commands_at_once(works, first):
    """In a finished run, one stands still at a random change on disk until the other one has ended, or waits for it.
    Each is done, or refused by one line and done when it is started again; all files are as they were"""
    counts, dice, survived = works.measured_of(first)[0], random.Random(2), 0
    seconds = partners(first)
    for second in seconds:
        expected = works.expected_after(first, 'report') | works.expected_after(second, 'report')
        works.restore_result('report')
        for name, done in run_at_once(works, first, second, dice.randint(1, counts['command'])):
            assert done.code in (0, 2, 3), done.printed
            assert 'Traceback' not in done.printed, done.printed
            assert_done(name, works.attempt(name, fork_all) if done.code else done)
        assert without_report(digests(works.work)) == without_report(expected)
        assert all(path.read_text().endswith('</html>') for path in works.work.rglob('report.html'))
        survived += 1
    note('pairs', f'{first}, beside another', survived, len(seconds))

def without_report(found):
    "Without the page, which tells how often a run was evaluated"
    return {name: value for name, value in found.items() if not name.endswith(('report.html', 'report.md'))}

def run_at_once(works, first, second, k):
    "Names and ends of two commands; the first stands still at its k-th change on disk"
    one = Attempt(works.work, works.words(first), Changes(k, stand_still, 'command').prepare)
    try:
        wait_for(lambda: one.has_ended() or one.stands_still())
        two = Attempt(works.work, works.words(second), fork_all, number='2')
        # for a lock it may wait without end
        with suppress(AssertionError):
            wait_for(two.has_ended, 5)
    finally:
        os.kill(one.pid, signal.SIGCONT)
    return [(first, one.wait()), (second, two.wait())]

# ---------------------------------------------------------------- 46: other folders and machines

as_root = pytest.mark.skipif(os.geteuid() != 0, reason='only root can become other users')

NOBODY = 65534

def become_nobody():
    "For `attempt`: the command runs as a user without rights"
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    os.environ['HOME'] = '/nonexistent'

def as_nobody(works, name):
    "For `attempt`: a job as a user without rights, who need not be able to read Python's own files"
    works.state(name)

    def prepare():
        fork_all()
        import_noted(works.home/f'{name}.modules')
        become_nobody()

    return prepare

def assert_one_line(done):
    "The command was refused by a message, without a traceback"
    assert done.code in (2, 3), done.printed
    assert 'Traceback' not in done.printed, done.printed
    assert 'error: ' in done.printed

@as_root
@pytest.mark.parametrize('name', ['train', 'evaluate', 'predict', 'map'])
def test_46_a_folder_that_may_not_be_written(works, name):
    "One line that names a file; the folder stays as it is"
    works.state(name)
    works.restore(name)
    before = digests(works.work)
    done = works.attempt(name, as_nobody(works, name))
    assert_one_line(done)
    assert 'ermission denied' in done.printed
    assert digests(works.work) == before
    assert not list(works.work.rglob('.*.tmp'))

@as_root
@pytest.mark.parametrize('name', ['train', 'calibrate', 'report'])
def test_46_a_file_system_that_is_mounted_read_only(works, name):
    "As root, whom no rights stop"
    works.restore(name)
    before = digests(works.work)
    if not mounted('--bind', works.work, works.work):
        pytest.skip('no file system can be mounted here')
    try:
        assert mounted('-o', 'remount,ro,bind', works.work)
        done = works.attempt(name, fork_all)
    finally:
        subprocess.run(['umount', works.work], check=True)
    assert_one_line(done)
    assert 'Read-only file system' in done.printed
    assert digests(works.work) == before

def modes(folder):
    "Rights of all files and folders below a folder, as far as a umask takes them away"
    return {path: path.stat().st_mode & 0o777 for path in folder.rglob('*')}

@pytest.mark.parametrize('umask', [0o077, 0o002])
def test_46_another_umask(works, umask):
    "Of all commands in a row: the same bytes, and each file has the rights that the umask leaves"
    def prepare():
        fork_all()
        os.umask(umask)

    # a report changes the card of the model, and so comes last
    names = 'train', 'evaluate', 'calibrate', 'predict', 'export', 'test', 'report'
    expected = {file: value for name in names for file, value in works.expected(name).items()}
    works.restore('train')
    before = set(modes(works.work))
    for name in names:
        done = works.attempt(name, prepare)
        assert done.code == 0, done.printed
    found = digests(works.work)
    for path, mode in modes(works.work).items():
        if path not in before and path.name != '.lock':
            assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, path
    assert found == expected

@as_root
@pytest.mark.parametrize('name', ['evaluate', 'calibrate', 'test', 'predict'])
def test_46_two_users_of_one_run(works, name):
    "One trained it; another one of the same group, for whom the folder can be written, continues: the same bytes"
    works.state(name)
    works.restore(name)
    for path in [works.work, *works.work.rglob('*')]:
        path.chmod(0o777 if path.is_dir() else 0o666)
    done = works.attempt(name, as_nobody(works, name))
    assert done.code == 0, done.printed
    assert digests(works.work) == works.expected(name)

def clock_jumps_back():
    "For `attempt`: in the middle of the command the time of day jumps back by an hour"
    fork_all()
    now, calls = time.time, 0

    def jumping():
        nonlocal calls
        calls += 1
        return now() - (3600 if calls > 40 else 0)

    time.time = jumping

@pytest.mark.parametrize('name', ['train', 'map'])
def test_46_a_clock_that_jumps_back(works, name):
    "By an hour, as where a machine's clock is set: the command ends in the same bytes"
    works.restore(name)
    done = works.attempt(name, clock_jumps_back)
    assert done.code == 0, done.printed
    assert digests(works.work) == works.expected(name)
    assert '-' not in ''.join(line for line in done.printed.splitlines() if line.startswith('epoch'))

def no_links():
    "For `attempt`: a file system without hard links"
    def refuse(*args, **options):
        raise OSError(errno.EPERM, 'Operation not permitted', str(args[0]))

    fork_all()
    os.link = refuse

def no_locks():
    "For `attempt`: a network file system without locks"
    def refuse(*args):
        raise OSError(errno.ENOLCK, 'No locks available')

    fork_all()
    fcntl.flock = refuse

@pytest.mark.parametrize('lacking', [no_links, no_locks])
@pytest.mark.parametrize('name', ['train', 'predict', 'map'])
def test_46_a_file_system_without(works, name, lacking):
    "Hard links or locks: the same bytes, or one line that names what is missing"
    works.restore(name)
    done = works.attempt(name, lacking)
    if done.code:
        assert_one_line(done)
        assert 'locks' in done.printed or 'hard links' in done.printed
    else:
        assert digests(works.work) == works.expected(name)
