"One run that two forked processes train together"
import multiprocessing
import os
import socket
import sys
import time

fork = multiprocessing.get_context('fork')

def run_pair(work, output, limit=300):
    """Do work(rank) in two forked processes that train one run together; their exit codes.
    What a process prints is added to the file <output>-<rank>.txt"""
    port = free_port()
    children = []
    for rank in (0, 1):
        child = fork.Process(target=work_as_rank, args=(work, rank, port, f'{output}-{rank}.txt'))
        child.start()
        children.append(child)
    until = time.monotonic() + limit
    for child in children:
        child.join(max(until - time.monotonic(), 0))
    waiting = [child for child in children if child.exitcode is None]
    for child in waiting:
        child.kill()
        child.join()
    assert not waiting, f'a process still waits for the other after {limit} seconds'
    return [child.exitcode for child in children]

def work_as_rank(work, rank, port, output):
    "In a forked process: print to a file, and do work(rank) as one process of two"
    sys.stdout = sys.stderr = open(output, 'a', buffering=1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2',
        MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port),
    )
    work(rank)

def free_port():
    "A port on which nothing listens"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]
