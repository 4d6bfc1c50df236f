"What the benchmarks share: ours and a peer take turns, so that noise of the machine affects both"
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

def timed(function, *arguments, clock=time.perf_counter):
    "Seconds of one call: wall clock, or CPU time of this process with `time.process_time`"
    start = clock()
    function(*arguments)
    return clock() - start

def turns(ours, peer, rounds, warm=3, clock=time.perf_counter):
    "Seconds of each call of two functions; each goes first every second round. The first `warm` rounds do not count"
    times = {ours: [], peer: []}
    for i in range(rounds + warm):
        order = (ours, peer) if i % 2 == 0 else (peer, ours)
        for function in order:
            times[function].append(timed(function, clock=clock))
    return times[ours][warm:], times[peer][warm:]

def per_item(times, items):
    "The seconds of two lists of calls, each divided by the items that a call handles"
    return [[seconds / items for seconds in calls] for calls in times]

def peak_mb():
    "Of this process since it was started; `ru_maxrss` would know the peak of its parent too"
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))/1024

def memory_mb():
    "Of this process now"
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('VmRSS'))/1024

def memory_in_process(script, side, path):
    "Megabytes that a script prints as the peak of one side, which it runs in a process of its own"
    command = [sys.executable, script, side, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return round(json.loads(done.stdout.splitlines()[-1]))

def machine():
    "The machine in words: cores, load, and the GPU where torch sees one"
    words = f'{os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}'
    torch = sys.modules.get('torch')
    if torch and torch.cuda.is_available():
        words += f', {torch.cuda.get_device_name()}'
    return words

def emit_value(what, ours, peer=None, unit='', **details):
    "Print one JSON line with a number of ours, and that of the peer; returns nothing"
    row = {'what': what, 'unit': unit, 'ours': ours, 'peer': peer, **details, 'machine': machine()}
    print(json.dumps({name: value for name, value in row.items() if value is not None}), flush=True)

def emit(what, ours, peer, goal=None, **details):
    """Print one JSON line: medians in milliseconds, their ratio, and the quartiles of the ratio within a round

    `goal` is the largest ratio that is acceptable."""
    ratios = [ours_seconds / peer_seconds for ours_seconds, peer_seconds in zip(ours, peer, strict=True)]
    ours_median, peer_median = statistics.median(ours), statistics.median(peer)
    ratio = ours_median / peer_median
    found = {'ratio': short(ratio), 'quartiles': [short(value) for value in statistics.quantiles(ratios, n=4)]}
    if goal:
        found |= {'goal': f'≤ {short(goal)}', 'met': ratio <= goal}
    emit_value(what, short(1000 * ours_median), short(1000 * peer_median), 'ms', **found, rounds=len(ours), **details)

def short(number):
    "Three significant digits"
    return float(f'{number:.3g}')
