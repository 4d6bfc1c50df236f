"A training step of the networks of a plan on a CPU: compiled beside not, and after how many steps compiling pays"
import statistics
import sys

import segmentation_models_pytorch as smp
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from common import emit, short, timed, turns
from rtsseg.plan import BATCH, NETWORKS

SIDE = 128

def step_of(network, is_compiled):
    "A function that takes a training step on one batch of random numbers"
    torch.manual_seed(0)
    model = smp.create_model(network.architecture, network.encoder, encoder_weights=None,
                             decoder_channels=network.decoder_channels)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images = torch.randn(BATCH['cpu'], 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    targets = (torch.rand(BATCH['cpu'], 1, SIDE, SIDE) < .1).float()
    if is_compiled:
        model.compile()

    def step():
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(model(images), targets).backward()
        optimizer.step()

    return step

def main(rounds=40):
    torch.set_num_threads(1)
    for network in NETWORKS:
        compiled, plain = step_of(network, True), step_of(network, False)
        # the first steps compile, the backward pass with a batch of this form too
        compiling = timed(compiled) + timed(compiled)
        times = turns(compiled, plain, rounds)
        saved = statistics.median(times[1]) - statistics.median(times[0])
        pays_after = round(compiling / saved) if saved > 0 else 'never'
        emit(f'training step of {network.encoder}: compiled / not', *times, seconds_of_compiling=short(compiling),
             pays_after_steps=pays_after, side=SIDE, batch=BATCH['cpu'], threads=1)

if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
