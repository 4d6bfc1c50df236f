"The checkpoint of UNet++ with EfficientNet-B5, its averaged weights and AdamW's moments: how long training stands still, against torch.save with fsync, and how training goes on beside it"
import json, os, statistics, sys, threading, time
from pathlib import Path
from tempfile import TemporaryDirectory

import segmentation_models_pytorch as smp, torch
from accelerate import Accelerator

from common import emit, timed
from rtsseg.config import LoopConfig
from rtsseg.checkpoint import CheckpointWriter, load_state
from rtsseg.schedule import WeightAverage
from rtsseg.loop import Task, TrainingState

def beside(f):
    "Megabytes that this process holds in the course of a call, beyond those from before"
    rss = lambda: int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6
    before, seen, done = rss(), [], threading.Event()
    def watch():
        while not done.wait(.002): seen.append(rss())
    t = threading.Thread(target=watch); t.start(); f(); done.set(); t.join()
    return round(max(seen) - before)

def main(rounds=10):
    torch.manual_seed(0); torch.set_num_threads(1); device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model = smp.UnetPlusPlus('efficientnet-b5', encoder_weights=None).train().to(device); average = WeightAverage(model, .999)
    optimizer, batch = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True), torch.randn(2, 3, 64, 64, device=device)
    def step(): model(batch).square().mean().backward(); optimizer.step(); optimizer.zero_grad(); average.update(); float(average.floats[0][0].flatten()[0])
    step(); minutes = LoopConfig().checkpoint.resume_minutes
    with TemporaryDirectory() as d:
        run = TrainingState(LoopConfig(), Task(), model, average, Path(d), Accelerator(cpu=device == 'cpu'), optimizer, step=1)
        def blocks(): run.save('resume', wait=False)
        def waits(): run.save('resume')
        def bare():
            with open(Path(d)/'peer.pt', 'wb') as f: torch.save(run.state(), f); f.flush(); os.fsync(f.fileno())
        ours, sealed, peer = [], [], []
        for _ in range(rounds + 2):
            for f, times in ((blocks, ours), (waits, sealed), (bare, peer)): times.append(timed(f)); CheckpointWriter.settle(); os.sync()      # minutes lie between
        size = (Path(d)/'checkpoints'/'resume.ckpt').stat().st_size; assert load_state(Path(d)/'checkpoints'/'resume.ckpt')['step'] == 1
        share = statistics.median(ours[2:]) / (60 * minutes)
        emit('training stands still for the checkpoint of every few minutes / torch.save and fsync', ours[2:], peer[2:], bytes=size, device=device, minutes=minutes, share=round(share, 6), share_goal=.01, met_share=share <= .01)
        emit('a sealed checkpoint that is waited for / torch.save and fsync', sealed[2:], peer[2:], bytes=size, device=device)
        print(json.dumps(dict(what='megabytes held beside the state', ours=beside(lambda: (blocks(), CheckpointWriter.settle())), waited_for=beside(waits), peer=beside(bare), bytes=size)), flush=True)
        during, alone = [], []
        for _ in range(rounds):                                                         # steps with a write under way, and as many without
            CheckpointWriter.settle(); os.sync(); blocks(); n = len(during)
            while any(isinstance(t, CheckpointWriter) for t in threading.enumerate()): during.append(timed(step))
            for _ in range(len(during) - n): alone.append(timed(step))
        emit('a training step while a checkpoint is written / alone', during, alone, device=device, threads=1, extra_seconds_a_checkpoint=round((sum(during) - sum(alone)) / rounds, 3))

if __name__ == '__main__': main(*map(int, sys.argv[1:]))
