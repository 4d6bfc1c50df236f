"The loop's promises: accumulation, skipped steps, totals, validation, checkpoints, resume, workers, loss scaling"
import copy
import itertools
import math
import threading

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

import rtsseg.checkpoint
import rtsseg.loop
import rtsseg.tiles
import rtsseg.workers
from helpers.loop import (
    At,
    Crash,
    EachStep,
    Nothing,
    Points,
    Scripted,
    all_weights,
    crash,
    equal,
    flat,
    gradient,
    net,
    points,
    quick,
    run,
    stop,
    weights,
)
from rtsseg.checkpoint import load_state, save_state
from rtsseg.config import ConfigError, CurriculumRow, LoopConfig, Sampler, load
from rtsseg.loop import TrainingState, fit, gpu_memory, validate
from rtsseg.sampler import Batches
from rtsseg.tiles import loaders

F = nn.functional

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "Toys are faster with one thread"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

def unlabelled(data):
    "The same samples without labels"
    return [sample | dict(y=torch.tensor(255.)) for sample in data]

# ---------------------------------------------------------------- one step
def group_gradient(batch, weight=1.):
    "The gradient of one large batch, and the parts of its loss"
    model, task = net(), Points()
    values = task.loss(task.forward(model, batch), batch)
    (values['bce'] + weight * values['square']).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), values

@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=5), weight=st.floats(0, 3), seed=st.integers(0, 9))
@example(counts=[0, 6, 0, 1], weight=1., seed=0)
def test_accumulated_gradient_is_the_big_batch_gradient(counts, weight, seed):
    "However the valid samples fall into micro-batches, the gradient is that of Σ λ · mean over all of them"
    data = points(6 * len(counts), ignored=10**6, seed=seed)
    for i, sample in enumerate(data):
        is_valid = i > 0 and i % 6 < counts[i // 6]
        sample['y'] = sample['y'] if is_valid else torch.tensor(255.)
    assume(any(sample['y'] != 255 for sample in data))
    r = run(data=data, batch=6, epochs=1, accumulate=len(counts), optimizer=dict(clip_norm=None),
            loss_weights=dict(square=weight))
    whole = default_collate(data)
    expected, values = group_gradient(whole, weight)
    torch.testing.assert_close(gradient(r), expected, atol=2e-6, rtol=1e-5)
    for part, n in Points().count(whole).items():
        if n:
            assert r.history[0][f'train/loss/{part}'] == pytest.approx(values[part].item(), rel=1e-5)
        else:
            assert f'train/loss/{part}' not in r.history[0]

@pytest.mark.parametrize('limit', [1e-3, .1, 100.])
def test_clipping_is_torchs(limit):
    r = run(data=points(8), epochs=1, optimizer=dict(clip_norm=limit))
    model, batch = net(), default_collate(points(8))
    sum(Points().loss(Points().forward(model, batch), batch).values()).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    torch.testing.assert_close(gradient(r), torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradient(r).norm() == pytest.approx(min(limit, float(norm)), rel=1e-3)
    assert r.history[0]['grad_norm/mean'] == pytest.approx(float(norm), rel=1e-6)

def test_weight_decay_is_decoupled():
    "One AdamW step by hand (Loshchilov and Hutter 2019): w − lr·(decay·w + g/(|g| + ε)), both moments corrected"
    r = run(data=points(8), epochs=1, optimizer=dict(clip_norm=None, weight_decay=.3))
    w, g = torch.cat([p.detach().flatten() for p in net().parameters()]), gradient(r)
    expected = w - .05 * (.3 * w + g / (g.abs() + 1e-8))
    torch.testing.assert_close(all_weights(r), expected, atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('at', [None, 2, 4])
def test_gradient_norms_are_logged(at, tmp_path):
    "Mean and largest norm before clipping, over the steps of an epoch that were taken, across a stop as well"
    class Broken(Points):
        def loss(self, out, batch):
            is_bad = any(torch.equal(x, points()[8]['x']) for x in batch['x'])
            return {part: v * (math.nan if is_bad else 1) for part, v in super().loss(out, batch).items()}

    cfg = dict(task=Broken(), epochs=1, lr=quick['lr'] | dict(base_lr=1e-12), optimizer=dict(weight_decay=0.))
    if at:
        run(tmp_path, observers=[At(at, stop)], **cfg)
    r = run(tmp_path, **cfg)
    # at a rate of almost 0 the weights stay, so each batch can be differentiated by itself
    batches = [default_collate(points()[i:i + 8]) for i in range(0, 48, 8)]
    norms = [float(group_gradient(batch)[0].norm()) for i, batch in enumerate(batches) if i != 1]
    assert r.skipped == 1 and len(norms) == 5
    assert r.history[0]['grad_norm/mean'] == pytest.approx(np.mean(norms), rel=1e-4)
    assert r.history[0]['grad_norm/max'] == pytest.approx(max(norms), rel=1e-4)

# ---------------------------------------------------------------- what the task adds up
class Kept(Points):
    "Keeps all outputs; the loss of one sample of the first group is NaN"
    def __init__(self):
        self.kept = []

    def loss(self, out, batch):
        is_bad = torch.is_grad_enabled() and any(torch.equal(x, points(76)[7]['x']) for x in batch['x'])
        return {part: v * (math.nan if is_bad else 1) for part, v in super().loss(out, batch).items()}

    def tally(self, out, batch):
        assert not torch.is_grad_enabled()
        self.kept.append((out.detach(), batch['y']))
        return super().tally(out, batch)

def share_right(kept):
    "The share of valid samples on the right side, over all outputs at once"
    out, y = map(torch.cat, zip(*kept))
    valid = y != 255
    return int(((out > 0) == (y > 0))[valid].sum()) / int(valid.sum())

@pytest.mark.parametrize('accumulate', [1, 4])
@pytest.mark.parametrize('at', [None, 1, 2])
def test_tally_is_the_epochs_own(accumulate, at, tmp_path):
    "Unequal micro-batches, a skipped step and a stop: the row counts all outputs of the steps that were taken"
    # 10 batches, the last of 4
    cfg = dict(task=Kept(), data=points(76), accumulate=accumulate, epochs=1)
    if at:
        run(tmp_path, observers=[At(at, stop)], **cfg)
    r = run(tmp_path, **cfg)
    kept = cfg['task'].kept
    assert r.skipped == 1 and len(kept) == 10
    assert r.history[0]['train/right'] == share_right(kept[accumulate:]) and not r.totals.tally

class PairMeter:
    "Share of pairs of samples that are in the right order: not a function of sums over batches"
    def __init__(self):
        self.rows = []

    def update(self, out, batch):
        assert not out.requires_grad
        valid = batch['y'] != 255
        self.rows += list(zip(out[valid].tolist(), batch['y'][valid].tolist()))

    def state(self):
        return self.rows

    def merge(self, states):
        self.rows = [row for rows in states for row in rows]

    def compute(self):
        pairs = [(a, b) for (a, positive), (b, other) in itertools.product(self.rows, repeat=2) if positive > other]
        return dict(order=sum(a > b for a, b in pairs) / len(pairs), n=len(self.rows))

class Ordered(Kept):
    def train_meter(self):
        return PairMeter()

@pytest.mark.parametrize('accumulate', [1, 4])
@pytest.mark.parametrize('at', [None, 1, 2])
def test_a_meter_sees_the_whole_training_epoch(accumulate, at, tmp_path):
    "A number over all pairs of the epoch, with micro-batches, a skipped step and a stop; each epoch begins again"
    cfg = dict(task=Ordered(), data=points(76), accumulate=accumulate)
    if at:
        run(tmp_path, observers=[At(at, stop)], **cfg)
    r = run(tmp_path, **cfg)
    kept = cfg['task'].kept
    first, second = kept[accumulate:10], kept[10 + accumulate:]
    for row, outputs in zip(r.history, (first, second), strict=True):
        meter = PairMeter()
        for out, y in outputs:
            meter.update(out, dict(y=y))
        assert row['train/order'] == meter.compute()['order'] and row['train/n'] == len(meter.rows)

def test_an_epoch_without_a_step_has_no_summary():
    "Where all steps were skipped nothing is there to compute numbers from"
    r = run(data=unlabelled(points(16)), epochs=1, task=Ordered())
    assert r.skipped == r.step == 2
    assert not any(key.startswith(('train/', 'grad_norm/')) for key in r.history[0])

# ---------------------------------------------------------------- what is measured
class Reads(Dataset):
    "Counts what is read, in this process"
    def __init__(self):
        self.rows, self.read = points(44), 0

    def __len__(self):
        return 44

    def __getitem__(self, i):
        self.read += 1
        return self.rows[i]

def test_samples_per_second_are_those_that_this_process_read(tmp_path):
    "44 samples, the last batch of 4; a resumed epoch counts what was left of it. A checkpoint holds no times"
    run(tmp_path, data=Reads(), observers=[At(8, stop)])
    data = Reads()
    first, second = run(tmp_path, data=data).history
    assert 'seconds' not in first and 'images_per_second' not in first
    assert (second['batches'], data.read) == (4, 28)
    assert second['images_per_second'] * second['seconds'] == pytest.approx(28) and 0 < second['wait'] < 1
    saved = load_state(tmp_path/'checkpoints'/'resume.ckpt')['history']
    assert len(saved) == 2 and not any(row.keys() & set(TrainingState.MEASURED) for row in saved)

def test_samples_per_second_with_workers():
    row, = run(data=points(44), loader=dict(num_workers=2), epochs=1).history
    assert row['images_per_second'] * row['seconds'] == pytest.approx(44)

# ---------------------------------------------------------------- steps that are skipped
def test_a_group_without_labels_is_not_a_step():
    "A group of unlabelled samples changes nothing, weight decay and average included, and is counted"
    # batches 3 and 4 of 6
    data = points()[:16] + unlabelled(points()[16:32]) + points()[32:]
    watch = EachStep(lambda run: torch.cat([weights(run.model), weights(run.judged)]))
    r = run(data=data, epochs=1, observers=[watch], ema=dict(decay=.5))
    assert (r.skipped, r.step, r.average.steps) == (2, 6, 4) and r.history[0]['skipped'] == 2
    seen = watch.seen
    assert torch.equal(seen[1], seen[2]) and torch.equal(seen[2], seen[3]) and not torch.equal(seen[3], seen[4])
    # beside other batches they are part of a step
    assert run(data=data, epochs=1, accumulate=3).skipped == 0

@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_loss_that_is_not_finite_skips_its_step(bad):
    class Broken(Points):
        calls = 0

        def loss(self, out, batch):
            values = super().loss(out, batch)
            if torch.is_grad_enabled():
                self.calls += 1
                if self.calls == 3:
                    return values | dict(bce=values['bce'] * bad)
            return values

    r = run(task=Broken(), epochs=1)
    assert (r.skipped, r.step, r.average.steps) == (1, 6, 5)
    assert weights(r.model).isfinite().all() and weights(r.judged).isfinite().all()
    assert all(v.isfinite().all() for s in r.optimizer.state.values() for v in s.values())
    assert math.isfinite(r.best['value']) and math.isfinite(r.history[0]['train/loss/bce'])

@pytest.mark.parametrize('scale', [None, 2.**10])
def test_a_group_that_reaches_no_trained_part_is_not_a_step(scale, precise):
    "Where a batch concerns frozen parts only, nothing has a gradient, and a scaler has nothing to check"
    if scale:
        precise(scale)

    class Half(Points):
        def loss(self, out, batch):
            return super().loss(out, batch) | dict(bce=out.detach().mean())

        def count(self, batch):
            return super().count(batch) | dict(square=0)

    r = run(task=Half(), epochs=1)
    assert r.step == r.skipped == 6 and torch.equal(weights(r.model), weights(net()))

# ---------------------------------------------------------------- judging and stopping
def test_without_an_average_the_model_itself_is_judged(tmp_path):
    r = run(tmp_path, ema=dict(enabled=False))
    assert r.judged is r.model and r.average is None
    assert torch.equal(weights(r.model), flat(load_state(tmp_path/'checkpoints'/'resume.ckpt')['model']))

def test_the_weights_that_train_are_judged_beside_their_average(tmp_path):
    "The same numbers of the average, the same weights, and the value of the others; without an average there is none"
    plain, both, alone = (run(tmp_path/name, val_frequency=1, ema=ema) for name, ema in (
        ('plain', dict()), ('both', dict(compare=True)), ('alone', dict(compare=True, enabled=False))))
    assert torch.equal(weights(plain.model), weights(both.model))
    name = both.task.monitor
    for row, other in zip(plain.history, both.history, strict=True):
        assert other[f'val/{name}'] == row[f'val/{name}'] and f'val/raw/{name}' not in row
    expected, _ = validate(both.task, both.model, DataLoader(points(20, seed=1), 7))
    assert both.history[-1][f'val/raw/{name}'] == pytest.approx(expected[name], rel=1e-6)
    assert both.history[-1][f'val/raw/{name}'] != both.history[-1][f'val/{name}']
    assert not any('raw' in column for row in alone.history for column in row)

@pytest.mark.parametrize('mode, values, best', [
    ('max', [.1, .5, .4, .5, .45], 2),
    ('min', [.9, .5, .7, .2, .3], 4),
    ('max', [math.nan, .1, math.nan, .05, math.inf], 2)])
def test_best_is_the_best_raw_value(mode, values, best, tmp_path):
    "Of equal ones the first; a NaN or an infinity never"
    judged = []

    class Watch:
        def on_validation(self, run, metrics, meter):
            judged.append(weights(run.judged))

    r = run(tmp_path, task=Scripted(values, mode), epochs=5, observers=[Watch()])
    saved = load_state(tmp_path/'checkpoints'/'best.ckpt')
    assert r.best['epoch'] == saved['best']['epoch'] == best
    assert r.best['value'] == values[best - 1] == saved['best']['metrics']['score']
    assert torch.equal(flat(saved['model']), judged[best - 1])

class ScriptedLoss(Scripted):
    "Validations whose loss is written here"
    def __init__(self, values):
        super().__init__(values, 'min')
        self.monitor = 'loss'

    def meter(self):
        meter = Nothing()
        meter.compute = lambda: dict(loss=self.values.pop(0))
        return meter

def two_stages(loss_weights):
    first = dict(first=1, last=3, rates=dict(encoder=.01, decoder=.1), schedule='plateau')
    second = dict(first=4, last=6, rates=first['rates'], continues=True, loss_weights=loss_weights)
    return [first, second]

@pytest.mark.parametrize('task, loss_weights, best', [
    # the loss is weighted otherwise from epoch 4 on: what came before cannot be compared
    (ScriptedLoss([.1, .2, .3, .9, .8, .85]), dict(square=5.), 5),
    # a weight of 1 is what every part has
    (ScriptedLoss([.1, .2, .3, .9, .8, .85]), dict(square=1.), 1),
    # another value than the loss means the same in every stage
    (Scripted([.1, .2, .3, .9, .8, .85], 'min'), dict(square=5.), 1)])
def test_a_loss_of_other_weights_begins_a_new_best(task, loss_weights, best, tmp_path):
    "Best weights, early stopping and the plateau begin again where the monitored loss is weighted otherwise"
    cfg = dict(epochs=6, stages=two_stages(loss_weights), lr=dict(plateau_patience=1), val_frequency=1,
               early_stopping=dict(patience=9, window=1, start_epoch=1, min_delta=0.))
    run(tmp_path, task=task, observers=[At(21, stop)], **cfg)
    r = run(tmp_path, task=task, **cfg)
    assert r.best['epoch'] == load_state(tmp_path/'checkpoints'/'best.ckpt')['best']['epoch'] == best
    assert r.stopper.since == best and r.stopper.best == -r.best['value']
    # epochs 2 and 3 were worse than the first, and cut the rate once
    assert r.plateau.factor == (.5 if best == 5 else .25)

@pytest.mark.parametrize('frequency, epochs, at', [(1, 3, {1, 2, 3}), (2, 5, {2, 4, 5}), (7, 3, {3})])
def test_validation_frequency(frequency, epochs, at):
    "Every so many epochs, and after the last"
    r = run(val_frequency=frequency, epochs=epochs)
    assert {row['epoch'] for row in r.history if 'val/loss' in row} == at
    assert [row['epoch'] for row in r.history] == list(range(1, epochs + 1))

def test_early_stopping_in_fit(tmp_path):
    """Window 2, patience 4, from epoch 4, a validation every 2. The averages at epochs 4, 6, 8, 10, 12 are .25, .35,
    .425, .4, .4: .35 lies less than min_delta above .25, .425 more, and nothing after it does. So epoch 12 is the last;
    and epoch 8 is the best, for its raw value"""
    stopping = dict(patience=4, window=2, min_delta=.1001, start_epoch=4)
    r = run(tmp_path, task=Scripted([.2, .3, .4, .45, .35, .45]), epochs=20, val_frequency=2, early_stopping=stopping)
    assert r.history[-1]['epoch'] == 12 and r.finished and 'early stopping' in r.reason and r.best['epoch'] == 8
    # and it stays stopped
    again = run(tmp_path, task=Scripted([]), epochs=20, val_frequency=2)
    assert again.step == r.step and 'stopped early' in again.reason

def test_observers_are_strict(tmp_path):
    "A hook that does not exist is an error before anything is written"
    class Late:
        def on_batch(self, run):
            pass

    with pytest.raises(ConfigError, match='Late.on_batch is not a hook'):
        run(tmp_path, observers=[Late()])
    assert not list(tmp_path.iterdir())

def test_observers_are_called_in_order(tmp_path):
    called = []

    class All:
        pass

    def note(hook):
        return lambda self, *args: called.append(hook.removeprefix('on_'))

    for hook in rtsseg.loop.HOOKS:
        setattr(All, hook, note(hook))
    run(tmp_path, data=points(8), observers=[All()], freeze_backbone_epochs=1, checkpoint=dict(every=2),
        lr=quick['lr'] | dict(frozen_lr=.1))
    # 20 points to validate, 7 a batch
    epoch = ['stage', 'step', 'judge', 'judge', 'judge', 'judged', 'validation', 'epoch']
    assert called == ['start', *epoch, *epoch, 'checkpoint', 'end']

def test_validation_pools_counts():
    "The loss over unequal batches is that of one batch of all; the model is left as it was, in eval mode"
    model, data = net(norm=True), points(20)
    before = weights(model)
    small, whole = (validate(Points(), model, DataLoader(data, b), weights=dict(square=2.))[0] for b in (3, 20))
    assert small == pytest.approx(whole)
    assert small['loss'] == pytest.approx(small['loss/bce'] + 2 * small['loss/square'])
    assert torch.equal(before, weights(model)) and not model.training
    assert all(p.grad is None for p in model.parameters())

def test_helpers_train_again_after_a_frozen_stage():
    "Frozen parts are in eval mode, helpers outside the model as well"
    class Helped(Points):
        def __init__(self):
            self.helper = nn.Linear(1, 1)

        def modules(self):
            return self.helper

    watch = EachStep(lambda run: (run.task.helper.training, run.model[0].training, run.model[3].training))
    rates = dict(encoder=.1, decoder=.1, modules=.1)
    stages = [dict(first=1, last=1, frozen=['encoder', 'modules'], rates=dict(decoder=.1)),
              dict(first=2, last=2, rates=rates)]
    run(task=Helped(), data=points(8), stages=stages, observers=[watch])
    assert watch.seen == [(False, False, True), (True, True, True)]

# ---------------------------------------------------------------- models of any kind
class Volumes(Points):
    "Volumes of 2 × 2 × 2; the mean decides the class"
    monitor, mode = 'loss', 'min'

    def parts(self, model):
        return dict(decoder=[model])

    def count(self, batch):
        return dict(bce=len(batch['y']))

    def loss(self, out, batch):
        return dict(bce=F.binary_cross_entropy_with_logits(out, batch['y']))

def volume_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 8, 2), nn.BatchNorm3d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))

def volumes(n=64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 2, 2, 2, generator=generator)
    return [dict(x=a, y=(a.mean() > 0).float()) for a in x]

def test_three_dimensional_convolutions_train(tmp_path):
    "Training, validation and a resume of a model whose weights have rank 5"
    def train(folder, observers=()):
        feed = DataLoader(volumes(), 16)
        return fit(LoopConfig(**quick, epochs=12), Volumes(), volume_net(), feed, feed, folder, observers)

    whole = train(tmp_path/'whole')
    assert whole.history[-1]['val/loss'] < .7 * whole.history[0]['val/loss']
    train(tmp_path/'half', [At(21, stop)])
    equal(whole, train(tmp_path/'half'))

@pytest.mark.parametrize('model, channels_last', [
    (nn.Conv2d(3, 4, 3), True), (nn.Conv3d(3, 4, 3), False), (nn.Conv1d(3, 4, 3), False),
    (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 3)), False)])
def test_the_memory_format_follows_from_the_rank(model, channels_last):
    assert (rtsseg.loop.place_model(model, 'cpu') is model)
    weight = next(model.parameters())
    is_last = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    assert is_last == channels_last

# ---------------------------------------------------------------- mixing of samples in a batch
class Mixed(Points):
    "MixUp: the collate function draws partners and weights, the loss mixes the labels"
    def count(self, batch):
        return dict(bce=len(batch['y']))

    def forward(self, model, batch):
        share = batch['share'][:, None]
        return model(share * batch['x'] + (1 - share) * batch['x'][batch['partner']])[:, 0]

    def loss(self, out, batch):
        own = F.binary_cross_entropy_with_logits(out, batch['y'], reduction='none')
        other = F.binary_cross_entropy_with_logits(out, batch['y'][batch['partner']], reduction='none')
        return dict(bce=(batch['share'] * own + (1 - batch['share']) * other).mean())

def unmixed(samples):
    "A batch whose samples are their own partners"
    batch, n = default_collate(samples), len(samples)
    return batch | dict(share=torch.ones(n), partner=torch.arange(n))

def mixed(samples):
    "A batch with drawn partners; the draw depends on the key of its first sample, and on nothing else"
    batch, n = default_collate(samples), len(samples)
    rng = np.random.default_rng(batch['key'][0].tolist())
    share, partner = rng.beta(.4, .4, n), rng.permutation(n)
    return batch | dict(share=torch.from_numpy(share).float(), partner=torch.from_numpy(partner))

@pytest.mark.parametrize('workers', [0, 2])
def test_batches_mixed_in_the_collate_function_resume(workers, tmp_path):
    "MixUp needs nothing of the loop: a stopped run ends in the same bytes, whichever process prepared its batches"
    class Rows(Keyed):
        def __getitem__(self, key):
            row = super().__getitem__(key)
            return row | dict(y=row['y'].clamp(max=1), key=torch.tensor(key))

    val = DataLoader([row | dict(y=row['y'].clamp(max=1)) for row in points(20, seed=1)], 7, collate_fn=unmixed)

    def train(folder, workers, observers=(), collate=mixed):
        feed = DataLoader(Rows(), batch_sampler=Keys(), num_workers=workers, collate_fn=collate)
        return fit(LoopConfig(**quick, epochs=3), Mixed(), net(norm=True), feed, val, folder, observers)

    whole = train(tmp_path/'whole', 0)
    train(tmp_path/'half', workers, [At(7, stop)])
    equal(whole, train(tmp_path/'half', workers))
    plain = train(tmp_path/'plain', 0, collate=unmixed)
    assert not torch.equal(weights(whole.model), weights(plain.model))

# ---------------------------------------------------------------- checkpoints
@pytest.mark.parametrize('every, keep, epochs, files', [(2, 2, 9, {6, 8}), (1, 1, 3, {3}), (3, 5, 7, {3, 6})])
def test_keep_last(every, keep, epochs, files, tmp_path):
    run(tmp_path, epochs=epochs, checkpoint=dict(every=every, keep_last=keep))
    folder = tmp_path/'checkpoints'
    kept = {f'epoch-{epoch:04d}.ckpt' for epoch in files}
    assert {path.name for path in folder.iterdir()} == {'best.ckpt', 'resume.ckpt'} | kept
    for epoch in files:
        assert load_state(folder/f'epoch-{epoch:04d}.ckpt')['epoch'] == epoch + 1

def test_keep_last_counts(tmp_path):
    "Epoch 10000 comes after 9999, though not in the alphabet"
    run(tmp_path, epochs=1)
    resume = tmp_path/'checkpoints'/'resume.ckpt'
    save_state(resume, load_state(resume) | dict(epoch=9998, finished=False))
    run(tmp_path, epochs=10001, checkpoint=dict(every=1, keep_last=2))
    assert {path.name for path in resume.parent.iterdir()} == {'best.ckpt', 'resume.ckpt', 'epoch-10000.ckpt',
                                                               'epoch-10001.ckpt'}

def same(a, b):
    "Whether two nested states are equal, tensors to the bit"
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b

def test_a_checkpoint_is_what_was_there_when_it_was_asked_for(tmp_path, monkeypatch):
    "Three steps are taken before the thread writes: what it writes is not theirs, in weights, moments or average"
    write, may_write, expected = rtsseg.checkpoint.write_packed, threading.Event(), []

    def late(path, data):
        may_write.wait(60)
        return write(path, data)

    def ask(run):
        expected.append(copy.deepcopy(run.state()))
        assert run.save('between', wait=False) is None and not (run.folder/'checkpoints').exists()

    monkeypatch.setattr(rtsseg.checkpoint, 'write_packed', late)
    observers = [At(9, ask), At(12, lambda run: may_write.set())]
    done = run(tmp_path, model=net(norm=True), epochs=3, val_frequency=3, observers=observers)
    saved = load_state(tmp_path/'checkpoints'/'between.ckpt')
    assert same(saved, expected[0]) and not same(done.state()['average'], saved['average'])

def test_checkpoints_are_written_one_at_a_time(tmp_path, monkeypatch):
    """A thread does not finish before the next checkpoint, of whatever kind, or the end of the run asks for it: they
    still wait for it. A run that saves after every step ends as one that does not"""
    write, wait_for_writers = rtsseg.checkpoint.write_packed, rtsseg.checkpoint.wait_for_writers
    under_way, seen, next_is_asked = [], [], threading.Event()

    def asked():
        next_is_asked.set()
        wait_for_writers()
        next_is_asked.clear()

    def slow(path, data):
        in_main = threading.current_thread() is threading.main_thread()
        under_way.append(path.stem)
        seen.append((len(under_way), in_main, path.stem))
        if not in_main:
            assert next_is_asked.wait(60)
        under_way.remove(path.stem)
        return write(path, data)

    monkeypatch.setattr(rtsseg.checkpoint, 'write_packed', slow)
    monkeypatch.setattr(rtsseg.checkpoint, 'wait_for_writers', asked)
    monkeypatch.setattr(rtsseg.workers, 'wait_for_writers', asked)
    cfg = dict(epochs=4, checkpoint=dict(every=2))
    often = run(tmp_path, model=net(norm=True), **cfg | dict(checkpoint=dict(every=2, resume_minutes=1e-9)))
    assert {n for n, *_ in seen} == {1} and len(seen) > 24 and not under_way
    assert load_state(tmp_path/'checkpoints'/'resume.ckpt')['step'] == 24
    assert {name for _, in_main, name in seen if not in_main} == {'resume'}
    assert {name for _, in_main, name in seen if in_main} == {'best', 'epoch-0002', 'epoch-0004', 'resume'}
    monkeypatch.undo()
    equal(often, run(model=net(norm=True), **cfg))

def test_another_machine_is_noted(tmp_path, capsys):
    "Results repeat to the bit on the same number of processes and threads only; a run that resumes on others says so"
    run(tmp_path, observers=[At(3, stop)])
    torch.set_num_threads(2)
    try:
        run(tmp_path, observers=[At(5, stop)])
        said = capsys.readouterr().err
        run(tmp_path)
    finally:
        torch.set_num_threads(1)
    assert 'note: this run had processes: 1, CPU threads: 1; now it has processes: 1, CPU threads: 2.' in said
    assert not capsys.readouterr().err

def older(state, plateau=0):
    "A state as it was written before the plateau counted validations"
    stopper = dict(state['stopper'], plateau=plateau, plateau_best=-math.inf, plateau_since=0, factor=1.)
    newer = ('plateau', 'gradient', 'meter_states', 'anneals_after')
    return {k: v for k, v in state.items() if k not in newer} | dict(stopper=stopper)

def test_a_run_of_an_older_version_resumes(tmp_path):
    "Unless it stood in a plateau, which counted otherwise"
    cfg = dict(model=net(norm=True), val_frequency=2)
    whole = run(**cfg)
    run(tmp_path, model=net(norm=True), val_frequency=2, observers=[At(8, stop)])
    path = tmp_path/'checkpoints'/'resume.ckpt'
    state = load_state(path)
    save_state(path, older(state, plateau=1))
    with pytest.raises(rtsseg.checkpoint.CheckpointError, match='its plateau counted epochs'):
        run(tmp_path, model=net(norm=True), val_frequency=2)
    save_state(path, older(state))
    again = run(tmp_path, model=net(norm=True), val_frequency=2)
    assert torch.equal(weights(whole.model), weights(again.model)) and whole.best == again.best

def test_a_state_from_before_the_fall_resumes(tmp_path):
    "A run that was begun before `lr.anneal_on_stop` existed"
    cfg = dict(epochs=4)
    run(tmp_path, observers=[At(8, stop)], **cfg)
    path = tmp_path/'checkpoints'/'resume.ckpt'
    state = load_state(path)
    del state['anneals_after']
    save_state(path, state)
    equal(run(**cfg), run(tmp_path, **cfg))

# ---------------------------------------------------------------- resume
# 10 batches an epoch: groups of 4, 4, 2
RESUME = dict(data=points(76), accumulate=4, epochs=6, checkpoint=dict(every=2), loader=dict(shuffle=True),
              freeze_backbone_epochs=1, early_stopping=dict(patience=3, window=2, start_epoch=2, min_delta=1.),
              lr=dict(frozen_lr=.05, base_lr=.05, backbone_lr_multiplier=.5, warmup_epochs=2))

@pytest.fixture(scope='module')
def undisturbed():
    return run(model=net(norm=True), **RESUME)

@pytest.mark.parametrize('at', [1, 2, 3, 4, 8, 14])
def test_stopped_anywhere_ends_the_same(at, undisturbed, tmp_path):
    """Dropout, batch statistics, a shuffled order, unequal groups, a frozen phase and early stopping, over a stop at
    the first, inner or last step of an epoch"""
    half = run(tmp_path, model=net(norm=True), observers=[At(at, stop)], **RESUME)
    assert half.step == at < undisturbed.step and not half.finished
    equal(undisturbed, run(tmp_path, model=net(9, norm=True), **RESUME))

@pytest.mark.parametrize('at', [1, 5, 7])
def test_crashed_anywhere_ends_the_same(at, undisturbed, tmp_path):
    "No last words: only what the timed checkpoint holds. Here it is due at every step"
    often = RESUME | dict(checkpoint=dict(every=2, resume_minutes=1e-9))
    with pytest.raises(Crash):
        run(tmp_path, model=net(norm=True), observers=[At(at, crash)], **often)
    steps = [load_state(path)['step'] for path in (tmp_path/'checkpoints').glob('resume.ckpt')]
    assert steps == ([at - 1] if at > 1 else [])
    equal(undisturbed, run(tmp_path, model=net(9 if at > 1 else 0, norm=True), **RESUME))

def test_many_short_lives(undisturbed, tmp_path):
    "Stopped after every single step"
    for at in itertools.count(1):
        r = run(tmp_path, model=net(at - 1, norm=True), observers=[At(at, stop)], **RESUME)
        if r.finished:
            break
    equal(undisturbed, r)

# early stopping at epoch 5; then epochs 6 and 7 of 9
FALLING = RESUME | dict(epochs=9, lr=RESUME['lr'] | dict(anneal_on_stop=2))

@pytest.fixture(scope='module')
def fallen():
    return run(model=net(norm=True), **FALLING)

@pytest.mark.parametrize('at', [9, 15, 16, 18, 20])
def test_stopped_around_a_fall_of_the_rate_ends_the_same(at, fallen, tmp_path):
    "Before early stopping decides, with the last step before it, within the fall, and at its inner epoch's end"
    assert fallen.history[-1]['epoch'] == 7 and fallen.anneals_after == 5
    half = run(tmp_path, model=net(norm=True), observers=[At(at, stop)], **FALLING)
    assert half.step == at < fallen.step and half.anneals_after == (5 if at > 15 else 0)
    rest = run(tmp_path, model=net(9, norm=True), **FALLING)
    equal(fallen, rest)
    assert rest.anneals_after == 5
    # and it stays stopped
    assert run(tmp_path, model=net(norm=True), **FALLING).step == fallen.step

def test_the_best_of_a_fall_is_kept(tmp_path):
    "The last epoch of the fall is validated, and its weights are exported where they are the best"
    stopping = dict(patience=2, window=1, start_epoch=2)
    lr = quick['lr'] | dict(anneal_on_stop=3)
    r = run(tmp_path, task=Scripted([.5, .4, .3, .9]), epochs=20, val_frequency=2, early_stopping=stopping, lr=lr)
    assert (r.history[-1]['epoch'], r.best['epoch'], r.best['value']) == (7, 7, .9)
    best = load_state(tmp_path/'checkpoints'/'best.ckpt')
    assert torch.equal(flat(best['model']), weights(r.judged))

def test_order_of_a_loader_with_its_own_generator(tmp_path):
    "Its generator stands elsewhere after a new start; the order is a function of seed and epoch all the same"
    def settings():
        return dict(loader=dict(shuffle=True, generator=torch.Generator().manual_seed(3)), epochs=3)

    whole = run(**settings())
    run(tmp_path, observers=[At(9, stop)], **settings())
    equal(whole, run(tmp_path, **settings()))

def test_seeds_differ():
    a, b, c = (run(seed=seed, model=net(norm=True), loader=dict(shuffle=True)) for seed in (1, 1, 2))
    equal(a, b)
    assert not torch.equal(weights(a.model), weights(c.model))

# ---------------------------------------------------------------- workers
class Keyed(Dataset):
    "Draws noise by its key, as the segmentation data do"
    def __init__(self):
        self.rows = points()

    def __getitem__(self, key):
        row, rng = self.rows[key[2]], np.random.default_rng(np.random.SeedSequence(key))
        return row | dict(x=row['x'] + torch.from_numpy(rng.normal(0, .1, 2)).float())

class Keys:
    "Batches of keys (seed, epoch, tile, occurrence); epochs differ in length"
    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 4 + self.epoch % 2

    def __iter__(self):
        order = np.random.default_rng((0, self.epoch)).permutation(48).tolist()
        for batch in range(len(self)):
            yield [(0, self.epoch, tile, batch) for tile in order[8 * batch:8 * batch + 8]]

def keyed(folder, workers, persistent=False, observers=()):
    options = dict(prefetch_factor=3) if workers else {}
    feed = DataLoader(Keyed(), batch_sampler=Keys(), num_workers=workers, persistent_workers=persistent, **options)
    val = DataLoader(points(20, seed=1), 7)
    return fit(LoopConfig(**quick, epochs=3), Points(), net(norm=True), feed, val, folder, observers)

def test_results_do_not_depend_on_workers(tmp_path):
    "0, 1, 2 or 4 of them, persistent or not, and changed between a stop and a new start: nothing is lost or repeated"
    none = keyed(tmp_path/'0', 0)
    assert [row['batches'] for row in none.history] == [5, 4, 5]
    for n in (1, 2, 4):
        equal(none, keyed(tmp_path/f'{n}', n, persistent=n > 1))
    assert keyed(tmp_path/'half', 2, True, [At(7, stop)]).batch == 2
    equal(none, keyed(tmp_path/'half', 1, True))

def test_real_batches_do_not_depend_on_workers(tiny_world, monkeypatch):
    "The segmentation loaders with all augmentation, two epochs and a validation: every pixel is the same"
    monkeypatch.setattr(rtsseg.tiles.os, 'cpu_count', lambda: 4)

    def read(n):
        cfg = load(device='cpu', batch_size=8, loader=dict(num_workers=n),
                   data=dict(manifest=tiny_world, tile_size=64, split_check='warn'))
        feed = loaders(cfg)
        assert feed.train.num_workers == n
        for epoch in (1, 2):
            feed.train.batch_sampler.set_epoch(epoch)
            yield from feed.train
        yield from feed.val

    none = list(read(0))
    assert len(none) > 4 and not torch.equal(none[0]['image'], none[1]['image'])
    for n in (1, 2, 4):
        for a, b in zip(none, read(n), strict=True):
            assert same(a, b)

def test_an_empty_epoch_is_an_error():
    with pytest.raises(ConfigError, match='holds no batch'):
        run(data=points(4), loader=dict(drop_last=True))

@pytest.mark.parametrize('which', ['train', 'val'])
@pytest.mark.parametrize('kind', ['iterable', 'no batches'])
def test_loaders_without_an_order_are_refused(kind, which, tmp_path):
    "An iterable data set has no order that a resumed run could repeat; the message says what to use"
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(points())

    odd = DataLoader(Stream(), 8) if kind == 'iterable' else DataLoader(points(), None)
    feeds = dict(train=DataLoader(points(), 8), val=DataLoader(points(), 8)) | {which: odd}
    why = dict(iterable='Stream is an iterable data set.*__getitem__')
    with pytest.raises(ConfigError, match=f'{which}: {why.get(kind, ".*makes no batches")}'):
        fit(LoopConfig(**quick), Points(), net(), feeds['train'], feeds['val'], tmp_path)
    assert not list(tmp_path.iterdir())

# ---------------------------------------------------------------- samplers that learn
class Noting(Keys):
    "Notes what it learns"
    def __init__(self, learns=True):
        self.learns, self.learnt = learns, []

    def learn(self, tiles, losses):
        self.learnt.append((tiles, losses))

class Weighed(Points):
    "Says how hard each sample was"
    asked = 0

    def difficulty(self, out, batch):
        assert not torch.is_grad_enabled()
        self.asked += 1
        return batch['tile'], F.binary_cross_entropy_with_logits(out, batch['y'].clamp(max=1), reduction='none')

class Named(Keyed):
    def __getitem__(self, key):
        return super().__getitem__(key) | dict(tile=key[2])

def learn(folder, sampler, task=None, model=None, observers=(), **cfg):
    cfg = LoopConfig(**quick | dict(epochs=1) | cfg)
    val = DataLoader(points(20, seed=1), 7)
    feed = DataLoader(Named(), batch_sampler=sampler)
    return fit(cfg, task or Weighed(), model or net(norm=True), feed, val, folder, observers)

def test_a_sampler_learns_each_samples_loss_after_its_step(tmp_path):
    "Each micro-batch of each step in order, with the losses of the weights before that step; nothing of a skipped step"
    seen = []

    class Checked(Weighed):
        def loss(self, out, batch):
            values = super().loss(out, batch)
            if not torch.is_grad_enabled():
                return values
            by_hand = [float(F.binary_cross_entropy_with_logits(o, y.clamp(max=1)))
                       for o, y in zip(out.detach(), batch['y'])]
            seen.append((batch['tile'].tolist(), by_hand, len(sampler.learnt)))
            return {part: v * (math.nan if len(seen) == 1 else 1) for part, v in values.items()}

    sampler = Noting()
    # 5 batches: groups of 2, 2, 1, of which the first is skipped
    r = learn(tmp_path, sampler, Checked(), accumulate=2)
    assert r.skipped == 1 and [n for *_, n in seen] == [0, 0, 0, 0, 2]
    for (tiles, losses), (expected, by_hand, _) in zip(sampler.learnt, seen[2:], strict=True):
        assert tiles == expected and losses == pytest.approx(by_hand, rel=1e-5)

def test_nothing_is_asked_where_nobody_learns(tmp_path):
    task, sampler = Weighed(), Noting(learns=False)
    learn(tmp_path, sampler, task)
    assert task.asked == 0 and sampler.learnt == []

def test_a_task_without_difficulty_is_an_error_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match='Points has no difficulty'):
        learn(tmp_path, Noting(), Points())
    assert not list(tmp_path.iterdir())

def hard():
    settings = Sampler(hard_negatives=.8, curriculum=[CurriculumRow(first=1, last=1, ratio=2)])
    return Batches([True] * 8 + [False] * 40, settings, 4, seed=0)

@pytest.fixture(scope='module')
def hardened(tmp_path_factory):
    return learn(tmp_path_factory.mktemp('hard'), hard(), epochs=4)

@pytest.mark.parametrize('at', [1, 3, 8, 13])
@pytest.mark.parametrize('how', [stop, crash])
def test_hard_negatives_over_a_stop(at, how, hardened, tmp_path):
    "What the sampler knows, and what it has learnt since the epoch began, resumes with the run; 8 batches an epoch"
    cfg = dict(epochs=4, checkpoint=dict(resume_minutes=1e-9))
    try:
        learn(tmp_path, hard(), observers=[At(at, how)], **cfg)
    except Crash:
        pass
    has_checkpoint = at > 1 or how is stop
    rest = learn(tmp_path, hard(), model=net(9 if has_checkpoint else 0, norm=True), **cfg)
    equal(hardened, rest)
    assert rest.sampler.state() == hardened.sampler.state() and rest.sampler.state()['losses']

def test_a_sampler_forgets_another_run(hardened, tmp_path):
    "The same sampler in two runs: the second begins as the first did"
    sampler = hard()
    learn(tmp_path/'1', sampler, epochs=4)
    again = learn(tmp_path/'2', sampler, epochs=4)
    equal(hardened, again)
    assert again.sampler.state() == hardened.sampler.state()

# ---------------------------------------------------------------- scaling, half precision
@pytest.fixture
def precise(monkeypatch):
    "precise(scale, mixed): runs use a gradient scaler that starts at `scale`, and this mixed precision"
    def use(scale=None, mixed='no'):
        def make(cfg):
            AcceleratorState._reset_state(reset_partial_state=True)
            accelerator = Accelerator(cpu=True, mixed_precision=mixed)
            accelerator.scaler = scale and torch.amp.GradScaler('cpu', init_scale=scale, growth_interval=10**6)
            return accelerator
        monkeypatch.setattr(rtsseg.loop, 'make_accelerator', make)
    yield use
    AcceleratorState._reset_state(reset_partial_state=True)

def test_scaling_by_a_power_of_two_changes_no_bit(precise):
    "Unscaled before clipping and before the step: 2^10 is exact. Clipping first would show, the norm is far too large"
    cfg = dict(accumulate=2, optimizer=dict(clip_norm=.01))
    plain = run(**cfg)
    precise(2.**10)
    equal(plain, run(**cfg))

def test_overflow_skips_and_lowers_the_scale(precise, tmp_path):
    "After an overflow weights, moments and average stand still, and the scale halves until it fits; a resume keeps it"
    precise(2.**127)
    watch = EachStep(lambda run: (run.accelerator.scaler.get_scale(), run.skipped, run.average.steps,
                                  torch.equal(weights(run.model), weights(net()))))
    cfg = dict(loss_weights=dict(bce=32., square=32.))
    half = run(tmp_path, observers=[watch, At(9, stop)], **cfg)
    n = half.skipped
    assert 1 <= n < 9 and watch.seen[n - 1] == (2.**(127 - n), n, 0, True) and watch.seen[n][1:] == (n, 1, False)
    precise(2.**127)
    rest = run(tmp_path, **cfg)
    assert rest.skipped == n and rest.accelerator.scaler.get_scale() == 2.**(127 - n)
    assert weights(rest.model).isfinite().all()

def test_half_precision_stays_inside_the_model(precise):
    "The model computes in bfloat16; losses and meters see float32; weights, gradients and the average stay float32"
    inside, outside = set(), set()

    class Look(Points):
        def forward(self, model, batch):
            out = super().forward(model, batch)
            inside.add(out.dtype)
            return out

        def loss(self, out, batch):
            outside.add(out.dtype)
            return super().loss(out, batch)

    precise(mixed='bf16')
    r = run(task=Look())
    assert inside == {torch.bfloat16} and outside == {torch.float32}
    assert {p.dtype for p in [*r.model.parameters(), *r.judged.parameters()]} == {torch.float32}
    assert not torch.equal(weights(r.model), weights(net()))

def test_memory_is_that_of_a_gpu(monkeypatch):
    "A peak that is forgotten once it was read; a CPU has none"
    peaks = [300 * 2**20]
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda device: peaks[-1])
    monkeypatch.setattr(torch.cuda, 'reset_peak_memory_stats', lambda device: peaks.append(100 * 2**20))
    assert [gpu_memory(torch.device('cuda')) for _ in range(2)] == [dict(gpu_memory=300), dict(gpu_memory=100)]
    assert gpu_memory(torch.device('cpu')) == {}
