"""Python imports this when it starts with this folder on PYTHONPATH: the trainer of the run folder HOLD_RUN waits at
the end of epoch HOLD_EPOCH until it is asked to stop, or until the file HOLD_UNTIL exists"""
import os
import sys
import time

def hold_trainer():
    from rtsseg.log import Log
    write = Log.on_epoch

    def on_epoch(self, run):
        write(self, run)
        # a chapter trains other runs as examples
        is_held = os.path.realpath(self.folder) == os.path.realpath(os.environ['HOLD_RUN'])
        if is_held and run.epoch == int(os.environ['HOLD_EPOCH']):
            while not run.asked and not os.path.exists(os.environ['HOLD_UNTIL']):
                time.sleep(.02)

    Log.on_epoch = on_epoch

# launchers and notebooks start this process too, and train nothing
if '--inline' in sys.orig_argv:
    hold_trainer()
