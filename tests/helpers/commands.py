"Changes to a command: `shell(…, prepare=…)` makes them in its process before the command begins"
import subprocess
from functools import partial

import rtsseg.launch
import rtsseg.runs
import rtsseg.training
from helpers.children import limit_file_size
from helpers.shell import fork_trainers

FROZEN_TRAINER = 'echo $$; sleep 500 & kill -9 $$'

def start_frozen_trainer(program, n, env, **streams):
    "In place of `launch.start_processes`: a trainer that is killed while its child holds the pipe to the command"
    return [subprocess.Popen(['sh', '-c', FROZEN_TRAINER], start_new_session=True, **streams)], None

def freeze_trainer():
    "For `shell`: the command starts a trainer that is killed, and waits a second for its output"
    rtsseg.launch.start_processes = start_frozen_trainer
    rtsseg.launch.GRACE_SECONDS = 1

def fork_trainers_without_room(size):
    "For `shell`: the command forks its trainers, and no file of any process can grow beyond `size` bytes"
    fork_trainers()
    limit_file_size(size)

def wait_a_second():
    "For `shell`: the command waits one second for the lock of a run folder, not sixty"
    rtsseg.training.run_lock = partial(rtsseg.runs.run_lock, wait=1)
