"Wait for an event, not for a time"
import time

def wait_for(condition, seconds=300):
    "Wait until condition() holds; the limit is far above what the slowest machine needs"
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f'waited for {seconds} seconds'
        time.sleep(.02)
