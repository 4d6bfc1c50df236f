"""The checkpoint of UNet++ with EfficientNet-B5, its averaged weights and AdamW's moments, beside torch.save with fsync

python benchmarks/checkpoint.py [rounds]     a minute, some GB written

How long training waits for a checkpoint, how much memory that takes, and what a step costs while one is written.
"""
import os
import statistics
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import segmentation_models_pytorch as smp
import torch
from accelerate import Accelerator

from common import emit, emit_value, timed
from rtsseg.checkpoint import CheckpointWriter, load_state, wait_for_writers
from rtsseg.config import LoopConfig
from rtsseg.loop import Task, TrainingState
from rtsseg.schedule import WeightAverage

def resident():
    "Megabytes that this process holds"
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages*os.sysconf('SC_PAGE_SIZE')/1e6

def extra_memory(function):
    "Megabytes that this process holds during a call, beyond those from before"
    before, seen, done = resident(), [], threading.Event()

    def watch():
        while not done.wait(.002):
            seen.append(resident())

    thread = threading.Thread(target=watch)
    thread.start()
    function()
    done.set()
    thread.join()
    return round(max(seen) - before)

def settle():
    "Wait until nothing is being written"
    wait_for_writers()
    os.sync()

class Training:
    "The model at its real size, with a small batch"
    def __init__(self, folder):
        torch.manual_seed(0)
        torch.set_num_threads(1)
        self.folder = Path(folder)
        self.device = 'cuda' if torch.cuda.is_available() else 'cpu'
        self.model = smp.UnetPlusPlus('efficientnet-b5', encoder_weights=None).train().to(self.device)
        self.average = WeightAverage(self.model, .999)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self.batch = torch.randn(2, 3, 64, 64, device=self.device)
        self.step()
        accelerator = Accelerator(cpu=self.device == 'cpu')
        self.state = TrainingState(LoopConfig(), Task(), self.model, self.average, self.folder, accelerator,
                                   self.optimizer, step=1)

    def step(self):
        self.model(self.batch).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()
        # wait for the GPU
        float(self.average.floats[0][0].flatten()[0])

    def start_checkpoint(self):
        self.state.save('resume', wait=False)

    def whole_checkpoint(self):
        self.state.save('resume')

    def peer(self):
        with open(self.folder/'peer.pt', 'wb') as file:
            torch.save(self.state.state(), file)
            file.flush()
            os.fsync(file.fileno())

def waiting(training, rounds):
    "How long training waits"
    calls = {training.start_checkpoint: [], training.whole_checkpoint: [], training.peer: []}
    for _ in range(rounds + 2):
        for function, times in calls.items():
            times.append(timed(function))
            settle()
    started, whole, peer = (times[2:] for times in calls.values())
    path = training.folder/'checkpoints'/'resume.ckpt'
    assert load_state(path)['step'] == 1
    minutes = LoopConfig().checkpoint.resume_minutes
    share = statistics.median(started)/(60*minutes)
    notes = {'bytes': path.stat().st_size, 'device': training.device}
    emit('training waits for a periodic checkpoint / torch.save and fsync', started, peer, minutes_between=minutes,
         share=round(share, 6), share_goal=.01, share_met=share <= .01, **notes)
    emit('a checkpoint that is waited for / torch.save and fsync', whole, peer, **notes)

def memory(training):
    def checkpoint_to_the_end():
        training.start_checkpoint()
        wait_for_writers()

    emit_value('memory held beside the state', extra_memory(checkpoint_to_the_end), extra_memory(training.peer), 'MB',
               waited_for=extra_memory(training.whole_checkpoint))

def steps_beside_a_write(training, rounds):
    during, alone = [], []
    for _ in range(rounds):
        settle()
        training.start_checkpoint()
        count = 0
        while any(isinstance(thread, CheckpointWriter) for thread in threading.enumerate()):
            during.append(timed(training.step))
            count += 1
        alone += [timed(training.step) for _ in range(count)]
    extra = round((sum(during) - sum(alone))/rounds, 3)
    emit('a training step while a checkpoint is written / alone', during, alone, device=training.device, threads=1,
         extra_seconds_a_checkpoint=extra)

def main(rounds=10):
    with TemporaryDirectory() as folder:
        training = Training(folder)
        waiting(training, rounds)
        memory(training)
        steps_beside_a_write(training, rounds)

if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
