"The averaged weights of UNet++ with EfficientNet-B5: their update against one fused lerp, and the switch to them against swapping states"
import copy, sys

import segmentation_models_pytorch as smp, torch

from common import emit, turns
from rtsseg.schedule import WeightAverage

def main(rounds=100):
    torch.manual_seed(0); torch.set_num_threads(1)     # two would wait for each other on a busy machine
    model = smp.UnetPlusPlus('efficientnet-b5', encoder_weights=None).train()
    average, mirror = WeightAverage(model, .999), copy.deepcopy(model)
    floats = lambda m: [t for t in [*m.parameters(), *m.buffers()] if t.is_floating_point()]
    to, of, size = floats(mirror), floats(model), sum(p.numel() for p in model.parameters())

    @torch.no_grad()
    def lerp(): torch._foreach_lerp_(to, of, 1e-3)
    emit('EMA update, UNet++ B5: Average.update / one foreach lerp', *turns(average.update, lerp, rounds), goal=1.1, parameters=size, tensors=len(of), threads=1)

    class Run:                                     # as the loop has it: validation takes the other module
        judged = property(lambda self: average.module if average else model)
    run = Run()
    def switch(): run.judged
    def swap():
        live = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(average.module.state_dict()); model.load_state_dict(live)
    copied = 3 * sum(v.nbytes for v in model.state_dict().values())
    emit('EMA weights in for a validation, and out: no copy / state_dict swap', *turns(switch, swap, rounds // 10), parameters=size, bytes_of_the_swap=copied)

if __name__ == '__main__': main(*map(int, sys.argv[1:]))
