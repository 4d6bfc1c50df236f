"The averaged weights of UNet++ with EfficientNet-B5: their update, and the switch to them for a validation"
import copy
import sys

import segmentation_models_pytorch as smp
import torch

from common import emit, turns
from rtsseg.schedule import WeightAverage

def float_tensors(model):
    "Parameters and buffers that are averaged"
    return [tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.is_floating_point()]

def main(rounds=100):
    torch.manual_seed(0)
    # two threads would wait for each other on a busy machine
    torch.set_num_threads(1)
    model = smp.UnetPlusPlus('efficientnet-b5', encoder_weights=None).train()
    average, mirror = WeightAverage(model, .999), copy.deepcopy(model)
    averaged, live = float_tensors(mirror), float_tensors(model)
    size = sum(parameter.numel() for parameter in model.parameters())

    @torch.no_grad()
    def lerp():
        torch._foreach_lerp_(averaged, live, 1e-3)

    times = turns(average.update, lerp, rounds)
    emit('EMA update, UNet++ B5: WeightAverage.update / one foreach lerp', *times, goal=1.1, parameters=size,
         tensors=len(live), threads=1)

    # Validation takes the module of averaged weights, and copies nothing
    def switch():
        return average.module

    def swap():
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(average.module.state_dict())
        model.load_state_dict(saved)

    copied = 3 * sum(tensor.nbytes for tensor in model.state_dict().values())
    times = turns(switch, swap, rounds // 10)
    emit('EMA weights in for a validation, and out: no copy / state_dict swap', *times, bytes_of_the_swap=copied)

if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
