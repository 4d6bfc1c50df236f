"Rates, stages, the plateau, early stopping and the weight average: formulas and independent libraries"
import math

import numpy as np
import pytest
import timm
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import BatchSampler, SequentialSampler

from helpers.loop import At, EachStep, Points, Scripted, equal, net, quick, run, stop, weights
from rtsseg.config import ConfigError, EarlyStopping, LearningRate, LoopConfig
from rtsseg.models import timm_layers
from rtsseg.schedule import EarlyStopper, Plateau, WeightAverage, group_parameters, layer_scales

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "Toys are faster with one thread"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

# ---------------------------------------------------------------- rates
def planned(t, base, freeze, epochs, warm=2., start=1e-6, low=1e-5):
    "Guide 9.1, written a second time: t in epochs, phase 2 from `freeze` on"
    if t < freeze:
        return .02
    since = t - freeze
    if since < warm:
        return start + (base - start) * since / warm
    return low + (base - low) * .5 * (1 + math.cos(math.pi * (since - warm) / (epochs - freeze - warm)))

class Rates:
    "The rates of each step, and the fraction of the epoch that lay behind it"
    def __init__(self, accumulate=1, batches=6):
        self.accumulate, self.batches, self.seen = accumulate, batches, {}

    def on_step(self, run):
        done = (run.batch - 1) // self.accumulate * self.accumulate
        rates = {group['name']: group['lr'] for group in run.optimizer.param_groups}
        self.seen[run.step] = run.epoch - 1 + done / self.batches, rates

@pytest.mark.parametrize('accumulate', [1, 2, 4])
@pytest.mark.parametrize('at', [None, 7])
def test_rate_of_every_step(accumulate, at, tmp_path):
    "Each group's rate is the plan at the fraction of the epoch that lies behind, across a stop as well"
    rates = Rates(accumulate)
    lr = dict(frozen_lr=.02, base_lr=.05, backbone_lr_multiplier=.1, warmup_epochs=2, min_lr=1e-5, schedule='cosine')
    cfg = dict(epochs=8, accumulate=accumulate, freeze_backbone_epochs=2, lr=lr)
    if at:
        run(tmp_path, observers=[rates, At(at, stop)], **cfg)
    r = run(tmp_path, observers=[rates], **cfg)
    assert sorted(rates.seen) == list(range(1, 8 * math.ceil(6 / accumulate) + 1)) and r.step == len(rates.seen)
    for t, seen in rates.seen.values():
        assert seen['decoder'] == pytest.approx(planned(t, .05, 2, 8), rel=1e-9)
        assert seen['encoder'] == pytest.approx(0 if t < 2 else .1 * planned(t, .05, 2, 8), rel=1e-9)

@pytest.mark.parametrize('at', [None, 9])
def test_a_stage_that_continues_has_the_running_schedule(at, tmp_path):
    "Unfreezing a part changes no other rate: no second warm-up, no second cosine"
    rates, whole = Rates(), Rates()
    begins = dict(first=1, rates=dict(decoder=.05), frozen=['encoder'], schedule='cosine', warmup_epochs=2, min_lr=1e-5)
    unfreezes = dict(first=4, last=8, rates=dict(decoder=.05, encoder=.01), continues=True)
    stages = [begins | dict(last=3), unfreezes]
    if at:
        run(tmp_path, epochs=8, stages=stages, observers=[rates, At(at, stop)])
    run(tmp_path, epochs=8, stages=stages, observers=[rates])
    run(epochs=8, stages=[begins | dict(last=8)], observers=[whole])
    assert len(rates.seen) == len(whole.seen) == 48
    for step, (t, seen) in rates.seen.items():
        assert seen['decoder'] == whole.seen[step][1]['decoder'] == pytest.approx(planned(t, .05, 0, 8), rel=1e-9)
        assert seen['encoder'] == pytest.approx(0 if t < 3 else seen['decoder'] / 5, rel=1e-9)

@pytest.mark.parametrize('at', [None, 5, 9, 16])
def test_warm_up_in_steps(at, tmp_path):
    "A line over 10 optimizer steps towards the cosine, whatever an epoch holds; a stage has steps of its own"
    rates = Rates()
    stage = dict(rates=dict(encoder=.05, decoder=.05), schedule='cosine', warmup_steps=10, warmup_start_lr=0.,
                 min_lr=0.)
    cfg = dict(epochs=8, stages=[stage | dict(first=1, last=2), stage | dict(first=3, last=8)])
    if at:
        run(tmp_path, observers=[rates, At(at, stop)], **cfg)
    run(tmp_path, observers=[rates], **cfg)
    for step, (t, seen) in rates.seen.items():
        first_step, first, length = (0, 0, 2) if t < 2 else (12, 2, 6)
        cosine = .05 * (1 + math.cos(math.pi * (t - first) / length)) / 2
        line = min(1, (step - 1 - first_step) / 10)
        assert seen['decoder'] == pytest.approx(cosine * line, rel=1e-9, abs=1e-15)

@pytest.mark.parametrize('lr', [dict(warmup_steps=10), dict(warmup_steps=10, warmup_epochs=1)])
def test_one_kind_of_warm_up(lr):
    with pytest.raises(ValueError, match='warmup_steps takes the place of warmup_epochs'):
        LearningRate(**lr)

# ---------------------------------------------------------------- decay of rates by layer
class Deep(Points):
    "The encoder is a chain of three layers"
    def parts(self, model):
        return dict(encoder=[model[0], model[1], model[2]], decoder=[model[3]])

    def layers(self, model):
        return {name: int(name[0]) for name, _ in model.named_parameters() if name[0] != '3'}

def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))

def test_rates_decay_by_layer():
    "lr × decay^(layers above); a parameter in no layer learns at the full rate; the row shows the top layer's rate"
    watch = EachStep(lambda run: {name: group['lr'] for group in run.optimizer.param_groups
                                  for name, p in run.model.named_parameters() if any(p is q for q in group['params'])})
    r = run(task=Deep(), model=chain(), epochs=1, lr=quick['lr'] | dict(layer_decay=.5), observers=[watch])
    expected = {f'{layer}.{kind}': .05 * factor for layer, factor in enumerate([.25, .5, 1., 1.])
                for kind in ('weight', 'bias')}
    assert len(watch.seen) == 6
    for seen in watch.seen:
        assert seen == pytest.approx(expected, rel=1e-12)
    assert [r.history[0][f'lr/{part}'] for part in ('encoder', 'decoder')] == pytest.approx([.05, .05], rel=1e-12)

def test_a_decay_of_one_is_no_decay():
    "Groups by layer do not change the arithmetic"
    plain, decayed = (run(task=Deep(), model=chain(), lr=quick['lr'] | lr) for lr in ({}, dict(layer_decay=1.)))
    assert torch.equal(weights(plain.model), weights(decayed.model))

def test_a_frozen_part_keeps_still_where_rates_decay():
    r = run(task=Deep(), model=chain(), epochs=1, freeze_backbone_epochs=1, lr=quick['lr'] | dict(layer_decay=.5))
    assert torch.equal(weights(r.model[:3]), weights(chain()[:3]))

@pytest.mark.parametrize('at', [1, 7])
def test_a_run_with_decaying_rates_resumes(at, tmp_path):
    cfg = dict(task=Deep(), lr=quick['lr'] | dict(layer_decay=.5))
    run(tmp_path, model=chain(), observers=[At(at, stop)], **cfg)
    equal(run(model=chain(), **cfg), run(tmp_path, model=chain(), **cfg))

def test_layer_decay_replaces_the_multiplier():
    with pytest.raises(ValueError, match='set lr.backbone_lr_multiplier to 1'):
        LoopConfig(lr=dict(layer_decay=.7))
    LoopConfig(lr=dict(layer_decay=.7, backbone_lr_multiplier=1.))

@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224', 'convnext_atto'])
def test_layers_of_timm_models_are_timms(name):
    "Every parameter has the scale that timm's own optimizer groups give it"
    model = timm.create_model(name, num_classes=3)
    timm_scales = {}
    for group in param_groups_layer_decay(model, weight_decay=0., layer_decay=.75):
        timm_scales |= {id(p): group['lr_scale'] for p in group['params']}
    scales = layer_scales(model, timm_layers(model), .75)
    assert len(set(scales.values())) > 4
    assert {n: timm_scales[id(p)] for n, p in model.named_parameters()} == pytest.approx(scales)
    groups = group_parameters(model, dict(all=[model]), scales)
    assert sum(len(group.parameters) for group in groups) == len(scales)

def test_a_model_without_layers_is_refused():
    "timm puts all of a MiT into one group and only warns"
    with pytest.raises(ConfigError, match='Points does not say which layers'):
        run(lr=quick['lr'] | dict(layer_decay=.5))
    with pytest.raises(ConfigError, match='Linear'):
        timm_layers(nn.Linear(1, 1))

# ---------------------------------------------------------------- layers, gates and samplers
GRADUAL = dict(task=Deep(), epochs=6, unfreeze=dict(share=.7, groups=2, every=2))

def test_layers_begin_to_train_one_after_the_other():
    "Two of three layers are frozen at first; after two epochs the upper one of them trains, after four the lower one"
    start = weights(chain()[0]), weights(chain()[1])
    moved = EachStep(lambda run: [not torch.equal(weights(run.model[i]), before) for i, before in enumerate(start)])
    run(model=chain(), observers=[moved], **GRADUAL)
    assert moved.seen == [[False, False]]*12 + [[False, True]]*12 + [[True, True]]*12

def test_frozen_layers_keep_their_statistics():
    "Batch statistics of a frozen layer stay as they are, and those of a layer that trains move"
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    r = run(model=model, task=Deep(), epochs=1, unfreeze=dict(share=.7))
    assert r.model[1].num_batches_tracked == 0 and r.model[2].num_batches_tracked == 6

@pytest.mark.parametrize('at', [11, 12, 25])
def test_a_run_that_unfreezes_resumes(at, tmp_path):
    run(tmp_path, model=chain(), observers=[At(at, stop)], **GRADUAL)
    equal(run(model=chain(), **GRADUAL), run(tmp_path, model=chain(), **GRADUAL))

GATED = dict(rates=dict(encoder=.01, decoder=.1), gated=True)
GATES = [dict(first=1, last=2, rates=GATED['rates'], loss_weights=dict(square=.1)),
         dict(first=3, last=4, **GATED, loss_weights=dict(square=.2)),
         dict(first=5, last=9, **GATED, loss_weights=dict(square=.3))]
# the second gate, due after epoch 4, wants the best value of the time of the first, .5
SCORES = [.5, .4, .6, .45, .45, .5, .3, .3, .3]
SQUARE = [.1, .1, .2, .2, .2, .2, .3, .3, .3]

def gated_run(folder=None, scores=SCORES, observers=(), model=None):
    "A run whose gates are asked every two epochs"
    return run(folder, task=Scripted(scores), model=model, epochs=9, stages=GATES, gate_epochs=2, observers=observers)

def test_weights_of_a_gated_stage_wait_for_the_milestone():
    "The first gate opens, the second stays closed at epoch 5, and opens at epoch 7; then its weights persist"
    seen = EachStep(lambda run: run.loss_weights(run.epoch)['square'])
    gated_run(observers=[seen])
    assert seen.seen[::6] == SQUARE

def test_weights_that_hold_are_those_that_train():
    "A gate that never opens trains to the bits of a run without its stage"
    never = gated_run(scores=[.9, .4, .5, .5, .5, .5, .5, .5, .5])
    stages = [GATES[0], GATES[1] | dict(last=9)]
    without = run(task=Scripted([0.]*9), epochs=9, stages=stages)
    assert torch.equal(weights(never.model), weights(without.model))

@pytest.mark.parametrize('at', [12, 13, 24, 25, 36, 37, 40])
def test_a_run_with_gates_resumes(at, tmp_path):
    "Stopped before, at and after a gate: the same bits"
    done = (at - 1)//6
    gated_run(tmp_path, SCORES[:done + 1], [At(at, stop)])
    equal(gated_run(), gated_run(tmp_path, SCORES[done:]))

class TwoWays(BatchSampler):
    "Draws all samples, or the first half of them"
    def choose(self, name):
        self.half = name == 'half'

    def __iter__(self):
        batches = list(super().__iter__())
        return iter(batches[:len(batches)//2] if self.half else batches)

    def __len__(self):
        return super().__len__()//(2 if self.half else 1)

def test_a_stage_names_its_sampler():
    stages = [dict(first=1, last=2, rates=GATED['rates'], sampler='half'), dict(first=3, last=4, rates=GATED['rates'])]
    batches = TwoWays(SequentialSampler(range(48)), 8, False)
    r = run(epochs=4, stages=stages, batch=1, loader=dict(batch_sampler=batches, shuffle=None))
    assert [row['step'] for row in r.history] == [3, 6, 12, 18]
    with pytest.raises(ConfigError, match="sampler 'half': this system draws samples in one way"):
        run(epochs=4, stages=stages)

# ---------------------------------------------------------------- the plateau
RATES = dict(encoder=.01, decoder=.1)

def test_plateau():
    "Patience 2: halved by the third validation without a new best; warm-up and other stages do not count"
    stages = [dict(first=1, last=4, rates=RATES),
              dict(first=5, last=12, rates=RATES, schedule='plateau', warmup_epochs=2),
              dict(first=13, last=16, rates=dict(encoder=.003, decoder=.03), schedule='plateau')]
    values = [.9, .1, .1, .1, .1, .1,
              .5, .4, .4, .5, .4, .4,
              .2, .2, .2, .2]
    expected = [.1] * 4 + [None] * 2 + [.1] * 4 + [.05] * 2 + [.03] * 4
    r = run(task=Scripted(values), epochs=16, stages=stages, lr=dict(plateau_patience=2, plateau_factor=.5))
    for row, rate in zip(r.history, expected, strict=True):
        if rate is not None:
            assert (row['lr/decoder'], row['lr/encoder']) == pytest.approx((rate, rate / 10))
    # the last three epochs earned the next halving
    assert r.plateau == Plateau(first=13, best=.2, stalled=0, factor=.5)

def test_a_plateau_continues_with_its_stage():
    "A stage that continues keeps what the plateau has counted"
    stages = [dict(first=1, last=3, rates=dict(decoder=.1), frozen=['encoder'], schedule='plateau'),
              dict(first=4, last=6, rates=RATES, continues=True)]
    r = run(task=Scripted([.5] * 6), epochs=6, stages=stages, lr=dict(plateau_patience=2))
    assert [row['lr/decoder'] for row in r.history] == pytest.approx([.1, .1, .1, .1, .05, .05])

def test_a_plateau_waits_for_a_warm_up_in_steps():
    "6 steps an epoch: the first epoch that begins after 7 steps is the third"
    stages = [dict(first=1, last=6, rates=RATES, schedule='plateau', warmup_steps=7)]
    r = run(task=Scripted([.9, .9, .5, .4, .4, .4]), epochs=6, stages=stages, lr=dict(plateau_patience=1))
    assert r.plateau == Plateau(first=1, best=.5, stalled=1, factor=.5)

VALUES = st.one_of(st.floats(-2, 2), st.sampled_from([0., .5, .50004, .50006, -.5, math.nan]))

@settings(max_examples=300, deadline=None)
@given(values=st.lists(VALUES, min_size=1, max_size=60), patience=st.integers(0, 6),
       mode=st.sampled_from(['min', 'max']), factor=st.sampled_from([.1, .5, .9]))
@example(values=[.5] * 20, patience=5, mode='max', factor=.5)
def test_plateau_equals_torchs(values, patience, mode, factor):
    "Against ReduceLROnPlateau with its own defaults, but for the smallest change of a rate, which ours has not"
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.)
    peer = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode=mode, factor=factor, patience=patience, eps=0)
    ours, lr = Plateau(), LearningRate(plateau_patience=patience, plateau_factor=factor)
    ours.begin(1, mode)
    for value in values:
        peer.step(value)
        ours.update(lr, value, mode)
        assert ours.factor == pytest.approx(optimizer.param_groups[0]['lr'], rel=1e-12)

@pytest.mark.parametrize('at', [None, 20])
def test_a_run_on_a_plateau_equals_torchs(at, tmp_path):
    "The rates of a run whose validations stall, across a stop as well"
    values = [.5, .6, .6, .60005, .6, .6, .61, .61, .6, .6, .6, .6]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=.1)
    peer = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode='max', factor=.5, patience=2)
    expected = []
    for value in values:
        expected.append(optimizer.param_groups[0]['lr'])
        peer.step(value)
    assert len(set(expected)) == 3
    task = Scripted(values)
    cfg = dict(epochs=12, stages=[dict(first=1, last=12, rates=RATES, schedule='plateau')], lr=dict(plateau_patience=2))
    if at:
        run(tmp_path, task=task, observers=[At(at, stop)], **cfg)
    r = run(tmp_path, task=task, **cfg)
    assert [row['lr/decoder'] for row in r.history] == pytest.approx(expected)

# ---------------------------------------------------------------- early stopping
def epoch_of_stop(values, rule, every):
    "The rule of the guide, written with arrays: no average since `patience` epochs beat the best before by min_delta"
    best = since = None
    for i in range(len(values)):
        epoch = every * (i + 1)
        if epoch < rule.start_epoch:
            continue
        finite = [v for v in values[:i + 1] if math.isfinite(v)][-rule.window:]
        mean = np.mean(finite) if finite else -np.inf
        if best is None or mean > best + rule.min_delta + 1e-12:
            best, since = mean, epoch
        if epoch - since >= rule.patience:
            return epoch
    return None

@settings(max_examples=200, deadline=None)
@given(values=st.lists(st.one_of(st.integers(-20, 20).map(float), st.just(math.nan)), min_size=1, max_size=40),
       window=st.integers(1, 4), patience=st.integers(1, 12), delta=st.sampled_from([0., 1.5]),
       start=st.integers(1, 20), every=st.integers(1, 5), mode=st.sampled_from(['max', 'min']))
def test_stopper(values, window, patience, delta, start, every, mode):
    rule = EarlyStopping(patience=patience, window=window, min_delta=delta, start_epoch=start)
    stopper, sign, got = EarlyStopper(), 1 if mode == 'max' else -1, None
    for i, value in enumerate(values):
        if stopper.update(rule, every * (i + 1), sign * value, mode):
            got = every * (i + 1)
            break
    assert got == epoch_of_stop(values, rule, every)

# ---------------------------------------------------------------- the fall after early stopping
# the value never improves on that of epoch 2, so epoch 4 would be the last
STALLED = dict(epochs=12, val_frequency=2, early_stopping=dict(patience=2, window=1, start_epoch=2))

def fallen(t, by, low, after=4, epochs=3):
    "The rate of the schedule up to the stop, then a straight line to the smallest one"
    if t <= after:
        return by(t)
    return by(after) + (low - by(after)) * (t - after) / epochs

@pytest.mark.parametrize('schedule', ['cosine', 'constant'])
@pytest.mark.parametrize('at', [None, 9, 24, 25, 31, 36])
def test_the_rate_falls_after_early_stopping(schedule, at, tmp_path):
    "Over three epochs, the last of them validated; across a stop in any of them or between them as well"
    rates, lr = Rates(), dict(base_lr=.05, backbone_lr_multiplier=.1, warmup_epochs=2, min_lr=1e-5, schedule=schedule)
    cfg = STALLED | dict(lr=lr | dict(anneal_on_stop=3))
    if at:
        half = run(tmp_path, task=Scripted([.5] * 9), observers=[rates, At(at, stop)], **cfg)
        assert not half.finished
    r = run(tmp_path, task=Scripted([.5] * 9), observers=[rates], **cfg)
    assert [row['epoch'] for row in r.history if 'val/loss' in row] == [2, 4, 6, 7]
    assert r.finished and 'early stopping' in r.reason and sorted(rates.seen) == list(range(1, 7 * 6 + 1))

    def scheduled(t):
        return planned(t, .05, 0, 12) if schedule == 'cosine' or t < 2 else .05

    for t, seen in rates.seen.values():
        assert seen['decoder'] == pytest.approx(fallen(t, scheduled, 1e-5), rel=1e-9)
        assert seen['encoder'] == pytest.approx(.1 * seen['decoder'], rel=1e-9)

def test_without_it_early_stopping_ends_the_run():
    assert run(task=Scripted([.5] * 9), **STALLED).history[-1]['epoch'] == 4

def test_the_fall_ends_with_the_last_epoch():
    "Where fewer epochs are left, the smallest rate is reached with the last of them; with none left nothing falls"
    rates = Rates()
    lr = quick['lr'] | dict(anneal_on_stop=9, min_lr=0.)
    r = run(task=Scripted([.5] * 9), observers=[rates], **STALLED | dict(epochs=6, lr=lr))
    assert r.history[-1]['epoch'] == 6
    for t, seen in rates.seen.values():
        assert seen['decoder'] == pytest.approx(fallen(t, lambda t: .05, 0., epochs=2))
    r = run(task=Scripted([.5] * 9), **STALLED | dict(epochs=4, lr=lr))
    assert r.history[-1]['epoch'] == 4 and not r.anneals_after and 'early stopping' in r.reason

def test_no_other_stage_begins_while_the_rate_falls():
    "The encoder stays frozen, and the fall ends at the smallest rate of the schedule under way"
    rates, lr = Rates(), quick['lr'] | dict(anneal_on_stop=3)
    stages = [dict(first=1, last=5, frozen=['encoder'], rates=dict(decoder=.05), min_lr=.01),
              dict(first=6, last=12, rates=dict(encoder=.1, decoder=.1))]
    r = run(task=Scripted([.5] * 9), observers=[rates], **STALLED | dict(lr=lr, stages=stages))
    assert r.history[-1]['epoch'] == 7
    for t, seen in rates.seen.values():
        assert seen == dict(encoder=0., decoder=pytest.approx(fallen(t, lambda t: .05, .01)))

def test_a_plateau_stands_still_while_the_rate_falls():
    "The fall begins at the rate that the plateau had reached; validations during it cut nothing"
    rates = Rates()
    lr = quick['lr'] | dict(schedule='plateau', plateau_patience=0, plateau_factor=.5, anneal_on_stop=3, min_lr=0.)
    r = run(task=Scripted([.5] * 9), observers=[rates], **STALLED | dict(lr=lr))
    assert r.plateau.factor == .5
    for t, seen in rates.seen.values():
        assert seen['decoder'] == pytest.approx(.05 if t < 4 else fallen(t, lambda t: .025, 0.))

# ---------------------------------------------------------------- the average
@pytest.mark.parametrize('decay', [0., .1, 2 / 11])
def test_average_equals_torchs_where_its_decay_is_constant(decay):
    "Up to 2/11 the warm-up of the decay is never the smaller one. Buffers too; integers are copied"
    model, generator = net(norm=True), torch.Generator().manual_seed(0)
    ours = WeightAverage(model, decay)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    # the first update of torch's copies
    theirs.update_parameters(model)
    for _ in range(20):
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn(p.shape, generator=generator)
        model(torch.randn(5, 2, generator=generator))
        ours.update()
        theirs.update_parameters(model)
    for (name, a), b in zip(ours.module.state_dict().items(), theirs.module.state_dict().values(), strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(a, b)
        else:
            assert name.endswith('num_batches_tracked') and a == 20
    assert not ours.module.training and not any(p.requires_grad for p in ours.module.parameters())

@pytest.mark.parametrize('steps', [1, 9, 90])
def test_average_warms_up(steps):
    "What remains of the first weights is Π (1+t)/(10+t) while that lies below the decay"
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    average = WeightAverage(model, .999)
    nn.init.zeros_(model.weight)
    for _ in range(steps):
        average.update()
    expected = math.prod((1 + t) / (10 + t) for t in range(1, steps + 1))
    assert average.module.weight.item() == pytest.approx(expected, rel=1e-4)
