"What the benchmarks share: ours and a peer take turns, so that noise of the machine hits both"
import json, statistics, time

def timed(f, *args, clock=time.perf_counter):
    "Seconds that a call took, of the day or (`time.process_time`) of this process's CPU time"
    t = clock(); f(*args); return clock() - t

def turns(ours, peer, rounds, warm=3, clock=time.perf_counter):
    "Seconds of each call of two functions that take turns, each going first every second time; the first `warm` rounds are left out"
    out = [], []
    for i in range(rounds + warm):
        for j in (0, 1) if i % 2 else (1, 0): out[j].append(timed((ours, peer)[j], clock=clock))
    return out[0][warm:], out[1][warm:]

def emit(what, ours, peer, goal=None, **more):
    "One JSON line: medians in milliseconds, the ratio of the medians, and the quartiles of the ratio within a round"
    ratios = statistics.quantiles([a / b for a, b in zip(ours, peer)], n=4)
    a, b = statistics.median(ours), statistics.median(peer)
    short = lambda x: float(f'{x:.3g}')
    row = dict(what=what, ours_ms=round(1e3 * a, 4), peer_ms=round(1e3 * b, 4), ratio=short(a / b), ratio_quartiles=[short(r) for r in ratios])
    if goal: row |= dict(goal=goal, met=a / b <= goal)
    print(json.dumps(row | dict(rounds=len(ours), **more)), flush=True)
