"The loop's promises at their edges: accumulation, skipped steps, averages, rates, stopping, checkpoints, resume, workers and loss scaling"
import copy, itertools, math, threading, time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np, pytest, torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import example, given, settings, strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

import rtsseg.checkpoint, rtsseg.loop, rtsseg.segment
from helpers.loop import At, Crash, Nothing, Points, Scripted, crash, equal, gradient, net, points, quick, run, stop, weights
from rtsseg.config import ConfigError, CurriculumRow, EarlyStopping, LoopConfig, Sampler as SamplerConfig, Stage, load
from rtsseg.checkpoint import load_state, save_state
from rtsseg.schedule import EarlyStopper, WeightAverage
from rtsseg.loop import Task, TrainingState, fit, validate
from rtsseg.sampler import Batches
from rtsseg.tiles import loaders

F = nn.functional

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "Toys are faster so"
    before = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(before)

# ---------------------------------------------------------------- one step
@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any), weight=st.floats(0, 3), seed=st.integers(0, 9))
@example(counts=[0, 6, 0, 1], weight=1., seed=0)
def test_accumulated_gradient_is_the_big_batch_gradient(counts, weight, seed):
    "However the valid samples fall into micro-batches, the gradient is that of Σ λ · mean over all of them"
    data = points(6 * len(counts), ignored=10**6, seed=seed)
    for i, d in enumerate(data): d['y'] = d['y'] if i % 6 < counts[i // 6] and i else torch.tensor(255.)
    if all(d['y'] == 255 for d in data): return
    r = run(data=data, batch=6, epochs=1, accumulate=len(counts), optimizer=dict(clip_norm=None), loss_weights=dict(square=weight))
    model, task, whole = net(), Points(), torch.utils.data.default_collate(data)
    values = task.loss(task.forward(model, whole), whole); (values['bce'] + weight * values['square']).backward()
    torch.testing.assert_close(gradient(r), torch.cat([p.grad.flatten() for p in model.parameters()]), atol=2e-6, rtol=1e-5)
    n = Points().count(whole)
    for p in ('bce', 'square'):
        if n[p]: assert r.history[0][f'train/loss/{p}'] == pytest.approx(values[p].item(), rel=1e-5)
        else: assert f'train/loss/{p}' not in r.history[0]

@pytest.mark.parametrize('limit', [1e-3, .1, 100.])
def test_clipping_is_torchs(limit):
    r = run(data=points(8), epochs=1, optimizer=dict(clip_norm=limit))
    model, batch = net(), torch.utils.data.default_collate(points(8)); sum(Points().loss(Points().forward(model, batch), batch).values()).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    torch.testing.assert_close(gradient(r), torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradient(r).norm() == pytest.approx(min(limit, float(norm)), rel=1e-3)

def test_weight_decay_is_decoupled():
    "One AdamW step by hand (Loshchilov and Hutter 2019): w − lr·(decay·w + g/(|g| + ε)), since both moments are corrected"
    r = run(data=points(8), epochs=1, optimizer=dict(clip_norm=None, weight_decay=.3))
    w, g = torch.cat([p.detach().flatten() for p in net().parameters()]), gradient(r)
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in r.model.parameters()]), w - .05 * (.3 * w + g / (g.abs() + 1e-8)), atol=1e-5, rtol=1e-4)

# ---------------------------------------------------------------- what the task adds up
@pytest.mark.parametrize('accumulate', [1, 4])
@pytest.mark.parametrize('at', [None, 1, 2])
def test_tally_is_the_epochs_own(accumulate, at, tmp_path):
    "Unequal micro-batches, a step that was left out and a stop: what the row says is counted over all outputs of the steps that were taken"
    kept = []
    class Kept(Points):
        def loss(self, out, batch): self.calls = getattr(self, 'calls', 0) + 1; return {p: v * (math.nan if self.bad(batch) else 1) for p, v in super().loss(out, batch).items()}
        def bad(self, batch): return torch.is_grad_enabled() and any(torch.equal(x, points(76)[7]['x']) for x in batch['x'])      # a sample of the first group
        def tally(self, out, batch):
            assert not torch.is_grad_enabled(); kept.append((out.detach(), batch['y'])); return super().tally(out, batch)
    cfg = dict(task=Kept(), data=points(76), accumulate=accumulate, epochs=1)                                     # 10 batches, the last of 4
    if at: run(tmp_path, observers=[At(at, stop)], **cfg)
    r = run(tmp_path, **cfg)
    out, y = map(torch.cat, zip(*kept[accumulate:])); ok = y != 255
    assert r.skipped == 1 and len(kept) == 10
    assert r.history[0]['train/right'] == int(((out > 0) == (y > 0))[ok].sum()) / int(ok.sum()) and not r.tally

def test_an_epoch_without_a_step_has_no_summary():
    "Where all steps were left out there are no sums to make numbers of"
    data = points(16); [d.update(y=torch.tensor(255.)) for d in data]
    r = run(data=data, epochs=1)
    assert r.skipped == r.step == 2 and not any(k.startswith('train/') for k in r.history[0])

# ---------------------------------------------------------------- what is measured
class Reads(Dataset):
    "Counts what is read, in this process"
    def __init__(self): self.rows, self.read = points(44), 0
    def __len__(self): return 44
    def __getitem__(self, i): self.read += 1; return self.rows[i]

def test_samples_per_second_are_those_that_this_life_read(tmp_path):
    "44 samples, the last batch of 4; the epoch that was gone on with counts what was left of it. Times are no part of a checkpoint"
    run(tmp_path, data=Reads(), observers=[At(8, stop)]); data = Reads(); r = run(tmp_path, data=data)
    first, second = r.history
    assert 'seconds' not in first and 'images_per_second' not in first and (second['batches'], data.read) == (4, 28)
    assert second['images_per_second'] * second['seconds'] == pytest.approx(28) and 0 < second['wait'] < 1
    assert all(not row.keys() & set(TrainingState.MEASURED) for f in (tmp_path/'checkpoints').glob('resume.ckpt') for row in load_state(f)['history'])
    r = run(data=points(44), loader=dict(num_workers=2), epochs=1)
    assert r.history[0]['images_per_second'] * r.history[0]['seconds'] == pytest.approx(44)

# ---------------------------------------------------------------- steps that are left out
def test_nothing_to_learn_from_is_no_step():
    "A group of ignored samples alone changes nothing, weight decay and average included, and is counted"
    data = points(); [d.update(y=torch.tensor(255.)) for d in data[16:32]]         # batches 3 and 4 of 6
    seen = []
    class Watch:
        def on_step(self, run): seen.append(torch.cat([weights(run.model), weights(run.judged)]))
    r = run(data=data, epochs=1, observers=[Watch()], ema=dict(decay=.5))
    assert (r.skipped, r.step, r.average.steps) == (2, 6, 4) and r.history[0]['skipped'] == 2
    assert torch.equal(seen[1], seen[2]) and torch.equal(seen[2], seen[3]) and not torch.equal(seen[3], seen[4])
    assert run(data=data, epochs=1, accumulate=3).skipped == 0                     # the same batches beside others

@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_no_step(bad):
    class Broken(Points):
        calls = 0
        def loss(self, out, batch):
            Broken.calls += torch.is_grad_enabled(); values = super().loss(out, batch)
            return values | dict(bce=values['bce'] * bad) if Broken.calls == 3 and torch.is_grad_enabled() else values
    Broken.calls = 0; r = run(task=Broken(), epochs=1)
    assert (r.skipped, r.step, r.average.steps) == (1, 6, 5)
    assert weights(r.model).isfinite().all() and weights(r.judged).isfinite().all() and math.isfinite(r.best['value'])
    assert all(v.isfinite().all() for s in r.optimizer.state.values() for v in s.values()) and math.isfinite(r.history[0]['train/loss/bce'])

@pytest.mark.parametrize('scale', [None, 2.**10])
def test_a_group_that_reaches_no_trained_part_is_no_step(scale, precise):
    "Where a batch speaks about frozen parts only there is no gradient, and nothing that a scaler could check; that is no error"
    if scale: precise(scale)
    class Half(Points):
        def loss(self, out, batch): return super().loss(out, batch) | dict(bce=out.detach().mean())
        def count(self, batch): return super().count(batch) | dict(square=0)
    r = run(task=Half(), epochs=1)
    assert r.step == r.skipped == 6 and torch.equal(weights(r.model), weights(net()))

# ---------------------------------------------------------------- the average
@pytest.mark.parametrize('decay', [0., .1, 2 / 11])
def test_average_equals_torchs_where_its_decay_is_constant(decay):
    "Up to 2/11 the warm-up of the decay is never the smaller one. Buffers too; integers are copied"
    model, g = net(norm=True), torch.Generator().manual_seed(0)
    ours, torchs = WeightAverage(model, decay), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    torchs.update_parameters(model)                                                # its first update copies
    for _ in range(20):
        with torch.no_grad():
            for p in model.parameters(): p += torch.randn(p.shape, generator=g)
        model(torch.randn(5, 2, generator=g)); ours.update(); torchs.update_parameters(model)
    for (k, a), b in zip(ours.module.state_dict().items(), torchs.module.state_dict().values()):
        if a.is_floating_point(): torch.testing.assert_close(a, b)
        else: assert k.endswith('num_batches_tracked') and a == 20
    assert not ours.module.training and not any(p.requires_grad for p in ours.module.parameters())

@pytest.mark.parametrize('steps', [1, 9, 90])
def test_average_warms_up(steps):
    "What remains of the first weights is Π (1+t)/(10+t) while that lies below the decay"
    model = nn.Linear(1, 1, bias=False); nn.init.ones_(model.weight); average = WeightAverage(model, .999); nn.init.zeros_(model.weight)
    for _ in range(steps): average.update()
    assert average.module.weight.item() == pytest.approx(math.prod((1 + t) / (10 + t) for t in range(1, steps + 1)), rel=1e-4)

def test_without_an_average_the_model_itself_is_judged(tmp_path):
    r = run(tmp_path, ema=dict(enabled=False))
    assert r.judged is r.model and r.average is None
    assert torch.equal(weights(r.model), torch.cat([v.double().flatten() for v in load_state(tmp_path/'checkpoints'/'resume.ckpt')['model'].values()]))

# ---------------------------------------------------------------- rates
def planned(t, base, freeze, epochs, warm=2., start=1e-6, low=1e-5):
    "Guide 9.1, written a second time: t in epochs, phase 2 from `freeze` on"
    if t < freeze: return .02
    s = t - freeze
    if s < warm: return start + (base - start) * s / warm
    return low + (base - low) * .5 * (1 + math.cos(math.pi * (s - warm) / (epochs - freeze - warm)))

@pytest.mark.parametrize('accumulate', [1, 2, 4])
@pytest.mark.parametrize('at', [None, 7])
def test_rate_of_every_step(accumulate, at, tmp_path):
    "Each group's rate is the plan at the fraction of the epoch that lies behind, across a stop as well"
    seen, lr = {}, dict(frozen_lr=.02, base_lr=.05, backbone_lr_multiplier=.1, warmup_epochs=2, min_lr=1e-5, schedule='cosine')
    class Watch:
        def on_step(self, run):
            behind = (run.batch - 1) // accumulate * accumulate                    # micro-batches of the epoch before this group, of 6
            seen[run.step] = run.epoch - 1 + behind / 6, {g['name']: g['lr'] for g in run.optimizer.param_groups}
    settings = dict(epochs=8, accumulate=accumulate, freeze_backbone_epochs=2, lr=lr, observers=[Watch()])
    if at: run(tmp_path, **settings | dict(observers=[Watch(), At(at, stop)]))
    r = run(tmp_path, **settings)
    assert sorted(seen) == list(range(1, 8 * math.ceil(6 / accumulate) + 1)) and r.step == len(seen)
    for t, rates in seen.values():
        assert rates['decoder'] == pytest.approx(planned(t, .05, 2, 8), rel=1e-9)
        assert rates['encoder'] == pytest.approx(0 if t < 2 else .1 * planned(t, .05, 2, 8), rel=1e-9)

def test_plateau():
    "Patience 2: halved after each two validations without a new best, never for what happened in the warm-up or in another stage"
    stages = [dict(first=1, last=4, rates=dict(encoder=.01, decoder=.1)),
              dict(first=5, last=12, rates=dict(encoder=.01, decoder=.1), schedule='plateau', warmup_epochs=2),
              dict(first=13, last=16, rates=dict(encoder=.003, decoder=.03), schedule='plateau')]
    values = [.9, .1, .1, .1, .1, .1,   .5, .4, .5, .6, .6, .6,   .2, .3, .3, .3]     # epochs 1–4, 5–6 (warm-up), 7–12, 13–16
    lr = [.1] * 4 + [None] * 2 + [.1] * 3 + [.05] * 3 + [.03] * 4
    r = run(task=Scripted(values), epochs=16, stages=stages, lr=dict(plateau_patience=2, plateau_factor=.5))
    for row, want in zip(r.history, lr):
        assert want is None or (row['lr/decoder'], row['lr/encoder']) == pytest.approx((want, want / 10))
    assert r.stopper.factor == .5                                                  # the last two epochs earned the next halving

# ---------------------------------------------------------------- judging and stopping
@pytest.mark.parametrize('mode,values,best', [('max', [.1, .5, .4, .5, .45], 2), ('min', [.9, .5, .7, .2, .3], 4),
                                              ('max', [math.nan, .1, math.nan, .05, math.inf], 2)])
def test_best_is_the_best_raw_value(mode, values, best, tmp_path):
    "Of equal ones the first; what is no number never"
    kept = []
    class Watch:
        def on_validation(self, run, metrics, meter): kept.append(weights(run.judged))
    r = run(tmp_path, task=Scripted(values, mode), epochs=5, observers=[Watch()])
    saved = load_state(tmp_path/'checkpoints'/'best.ckpt')
    assert r.best['epoch'] == saved['best']['epoch'] == best and r.best['value'] == values[best - 1] == saved['best']['metrics']['score']
    assert torch.equal(torch.cat([v.double().flatten() for v in saved['model'].values()]), kept[best - 1])

@pytest.mark.parametrize('frequency,epochs,at', [(1, 3, {1, 2, 3}), (2, 5, {2, 4, 5}), (7, 3, {3})])
def test_validation_frequency(frequency, epochs, at):
    "Every so many epochs, and after the last"
    r = run(val_frequency=frequency, epochs=epochs)
    assert {h['epoch'] for h in r.history if 'val/loss' in h} == at and [h['epoch'] for h in r.history] == list(range(1, epochs + 1))

def test_early_stopping_in_fit(tmp_path):
    """Window 2, patience 4, from epoch 4, a validation every 2. The averages at epochs 4, 6, 8, 10, 12 are .25, .35, .425, .4, .4: .35 lies less than
    min_delta above .25, .425 more, and nothing after it does. So epoch 12 is the last; and epoch 8 is the best, for its raw value"""
    values = [.2, .3, .4, .45, .35, .45]
    r = run(tmp_path, task=Scripted(values), epochs=20, val_frequency=2, early_stopping=dict(patience=4, window=2, min_delta=.1001, start_epoch=4))
    assert r.history[-1]['epoch'] == 12 and r.finished and 'early stopping' in r.reason and r.best['epoch'] == 8
    again = run(tmp_path, task=Scripted([]), epochs=20, val_frequency=2)
    assert again.step == r.step and 'stopped early' in again.reason               # and it stays stopped

@settings(max_examples=200, deadline=None)
@given(values=st.lists(st.one_of(st.integers(-20, 20).map(float), st.just(math.nan)), min_size=1, max_size=40),
       window=st.integers(1, 4), patience=st.integers(1, 12), delta=st.sampled_from([0., 1.5]), start=st.integers(1, 20), every=st.integers(1, 5), sign=st.sampled_from(['max', 'min']))
def test_stopper(values, window, patience, delta, start, every, sign):
    "Against the rule of the guide written with arrays: a stop where no average since `patience` epochs beat the best before by more than delta"
    cfg = LoopConfig(early_stopping=dict(patience=patience, window=window, min_delta=delta, start_epoch=start)); s = EarlyStopper()
    got = next((every * (i + 1) for i, v in enumerate(values) if s.update(cfg, every * (i + 1), v if sign == 'max' else -v, sign)), None)
    best, since, want = None, None, None
    for i in range(len(values)):
        epoch, finite = every * (i + 1), [v for v in values[:i + 1] if v == v][-window:]
        if epoch < start: continue
        mean = np.mean(finite) if finite else -np.inf
        if best is None or mean > best + delta + 1e-12: best, since = mean, epoch
        if epoch - since >= patience: want = epoch; break
    assert got == want

def test_observers_are_strict_and_called_in_order(tmp_path):
    class Late:
        def on_batch(self, run): pass
    with pytest.raises(ConfigError, match='Late.on_batch is no hook'): run(tmp_path, observers=[Late()])
    assert not list(tmp_path.iterdir())                                            # before anything was written
    said = []
    class All:
        def __getattr__(self, name): raise AttributeError(name)
    for hook in rtsseg.loop.HOOKS: setattr(All, hook, lambda self, *a, hook=hook: said.append(hook[3:]))
    run(tmp_path, data=points(8), epochs=2, observers=[All()], freeze_backbone_epochs=1, lr=quick['lr'] | dict(frozen_lr=.1), checkpoint=dict(every=2))
    assert said == ['start', 'stage', 'step', *['judge'] * 3, 'judged', 'validation', 'epoch', 'stage', 'step', *['judge'] * 3, 'judged', 'validation', 'epoch', 'checkpoint', 'end']      # 20 points, 7 a batch

def test_evaluate_pools_counts():
    "The loss over unequal batches is that of one batch of all; the model is left as it was, in eval mode"
    model, data = net(norm=True), points(20); before = weights(model)
    (small, _), (whole, _) = (validate(Points(), model, DataLoader(data, b), weights=dict(square=2.)) for b in (3, 20))
    assert small == pytest.approx(whole) and small['loss'] == pytest.approx(small['loss/bce'] + 2 * small['loss/square'])
    assert torch.equal(before, weights(model)) and not model.training and all(p.grad is None for p in model.parameters())

def test_helpers_train_again_after_a_frozen_stage():
    "Frozen parts are in eval mode, helpers that are no part of the model as well"
    modes = []
    class Helped(Points):
        def __init__(self): self.helper = nn.Linear(1, 1)
        def modules(self): return self.helper
    class Watch:
        def on_step(self, run): modes.append((run.epoch, run.task.helper.training, run.model[0].training, run.model[3].training))
    rates = dict(encoder=.1, decoder=.1, modules=.1)
    stages = [dict(first=1, last=1, frozen=['encoder', 'modules'], rates=dict(decoder=.1)), dict(first=2, last=2, rates=rates)]
    run(task=Helped(), data=points(8), stages=stages, observers=[Watch()])
    assert modes == [(1, False, False, True), (2, True, True, True)]

# ---------------------------------------------------------------- checkpoints
@pytest.mark.parametrize('every,keep,epochs,files', [(2, 2, 9, {6, 8}), (1, 1, 3, {3}), (3, 5, 7, {3, 6})])
def test_keep_last(every, keep, epochs, files, tmp_path):
    run(tmp_path, epochs=epochs, checkpoint=dict(every=every, keep_last=keep))
    assert {f.name for f in (tmp_path/'checkpoints').iterdir()} == {'best.ckpt', 'resume.ckpt', *(f'epoch-{e:04d}.ckpt' for e in files)}
    for e in files: assert load_state(tmp_path/'checkpoints'/f'epoch-{e:04d}.ckpt')['epoch'] == e + 1

def test_keep_last_counts(tmp_path):
    "Epoch 10000 comes after 9999, though not in the alphabet"
    run(tmp_path, epochs=1); resume = tmp_path/'checkpoints'/'resume.ckpt'; save_state(resume, load_state(resume) | dict(epoch=9998, finished=False))
    run(tmp_path, epochs=10001, checkpoint=dict(every=1, keep_last=2))
    assert {f.name for f in resume.parent.iterdir()} == {'best.ckpt', 'resume.ckpt', 'epoch-10000.ckpt', 'epoch-10001.ckpt'}

def test_a_checkpoint_is_what_was_there_when_it_was_asked_for(tmp_path, monkeypatch):
    "Three steps are taken before a thread comes to write: what it writes is not theirs, in weights, moments, average or anything else"
    write, go, want = rtsseg.checkpoint.write_packed, threading.Event(), []
    monkeypatch.setattr(rtsseg.checkpoint, 'write_packed', lambda path, data: (go.wait(60), write(path, data))[1])
    def ask(run): want.append(copy.deepcopy(run.state())); assert run.save('between', wait=False) is None and not (run.folder/'checkpoints').exists()
    done = run(tmp_path, model=net(norm=True), epochs=3, val_frequency=3, observers=[At(9, ask), At(12, lambda run: go.set())])
    def same(a, b):
        if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        if isinstance(a, list): return len(a) == len(b) and all(map(same, a, b))
        return torch.equal(a, b) if torch.is_tensor(a) else a == b
    assert same(load_state(tmp_path/'checkpoints'/'between.ckpt'), want[0]) and not same(done.state()['average'], want[0]['average'])

def test_checkpoints_are_written_one_at_a_time(tmp_path, monkeypatch):
    "A thread that is slow is waited for by the next checkpoint, of whatever kind, and by the end; a run that saves after every step ends as one that does not"
    write, under_way, seen = rtsseg.checkpoint.write_packed, [], []
    def slow(path, data):
        under_way.append(path.stem); seen.append((len(under_way), threading.current_thread() is threading.main_thread(), path.stem)); time.sleep(.02)
        under_way.remove(path.stem); return write(path, data)
    monkeypatch.setattr(rtsseg.checkpoint, 'write_packed', slow); cfg = dict(epochs=4, checkpoint=dict(every=2))
    often = run(tmp_path, model=net(norm=True), **cfg | dict(checkpoint=dict(every=2, resume_minutes=1e-9)))
    assert {n for n, *_ in seen} == {1} and len(seen) > 24 and not under_way and load_state(tmp_path/'checkpoints'/'resume.ckpt')['step'] == 24
    assert {name for _, main, name in seen if not main} == {'resume'} and {name for _, main, name in seen if main} == {'best', 'epoch-0002', 'epoch-0004', 'resume'}
    equal(often, run(model=net(norm=True), **cfg))

def test_another_machine_is_said(tmp_path, capsys):
    "Results repeat to the bit on the same number of processes and threads only: a run that goes on with others says so, once"
    run(tmp_path, observers=[At(3, stop)]); torch.set_num_threads(2)
    try: run(tmp_path, observers=[At(5, stop)]); said = capsys.readouterr().out; run(tmp_path)
    finally: torch.set_num_threads(1)
    assert 'note: this run had processes: 1, CPU threads: 1; now it has processes: 1, CPU threads: 2.' in said and not capsys.readouterr().out

# ---------------------------------------------------------------- resume
RESUME = dict(data=points(76), accumulate=4, epochs=6, checkpoint=dict(every=2), loader=dict(shuffle=True), freeze_backbone_epochs=1,   # 10 batches: groups of 4, 4, 2
              early_stopping=dict(patience=3, window=2, start_epoch=2, min_delta=1.), lr=dict(frozen_lr=.05, base_lr=.05, backbone_lr_multiplier=.5, warmup_epochs=2))

@pytest.fixture(scope='module')
def undisturbed(): return run(model=net(norm=True), **RESUME)

@pytest.mark.parametrize('at', [1, 2, 3, 4, 8, 14])
def test_stopped_anywhere_ends_the_same(at, undisturbed, tmp_path):
    "Dropout, batch statistics, a shuffled order, unequal groups, a frozen phase and early stopping, over a stop at the first, inner or last step of an epoch"
    half = run(tmp_path, model=net(norm=True), observers=[At(at, stop)], **RESUME)
    assert half.step == at < undisturbed.step and not half.finished
    equal(undisturbed, run(tmp_path, model=net(9, norm=True), **RESUME))

@pytest.mark.parametrize('at', [1, 5, 7])
def test_crashed_anywhere_ends_the_same(at, undisturbed, tmp_path):
    "No last words: only what the timed checkpoint holds. Here it is due at every step"
    with pytest.raises(Crash): run(tmp_path, model=net(norm=True), observers=[At(at, crash)], **RESUME | dict(checkpoint=dict(every=2, resume_minutes=1e-9)))
    steps = [load_state(f)['step'] for f in (tmp_path/'checkpoints').glob('resume.ckpt')]
    assert steps == ([at - 1] if at > 1 else [])
    equal(undisturbed, run(tmp_path, model=net(9 if at > 1 else 0, norm=True), **RESUME))

def test_many_short_lives(undisturbed, tmp_path):
    "Stopped after every single step"
    for at in itertools.count(1):
        r = run(tmp_path, model=net(at - 1, norm=True), observers=[At(at, stop)], **RESUME)
        if r.finished: break
    equal(undisturbed, r)

def test_order_of_a_loader_with_its_own_generator(tmp_path):
    "Its generator stands elsewhere after a new start; the order is a function of seed and epoch all the same"
    own = lambda: dict(loader=dict(shuffle=True, generator=torch.Generator().manual_seed(3)), epochs=3)
    whole = run(**own()); run(tmp_path, observers=[At(9, stop)], **own())
    equal(whole, run(tmp_path, **own()))

def test_seeds_differ():
    a, b, c = (run(seed=s, model=net(norm=True), loader=dict(shuffle=True)) for s in (1, 1, 2))
    equal(a, b); assert not torch.equal(weights(a.model), weights(c.model))

# ---------------------------------------------------------------- workers
class Keyed(Dataset):
    "Draws noise by its key, as the segmentation task does"
    def __init__(self): self.rows = points()
    def __getitem__(self, key):
        row, rng = self.rows[key[2]], np.random.default_rng(np.random.SeedSequence(key))
        return row | dict(x=row['x'] + torch.from_numpy(rng.normal(0, .1, 2)).float())

class Keys:
    "Batches of keys (seed, epoch, tile, occurrence); epochs differ in length"
    epoch = 0
    def set_epoch(self, epoch): self.epoch = epoch
    def __len__(self): return 4 + self.epoch % 2
    def __iter__(self):
        order = np.random.default_rng((0, self.epoch)).permutation(48).tolist()
        for b in range(len(self)): yield [(0, self.epoch, t, b) for t in order[8 * b:8 * b + 8]]

def keyed(folder, workers, persistent=False, observers=()):
    loader = DataLoader(Keyed(), batch_sampler=Keys(), num_workers=workers, persistent_workers=persistent, **dict(prefetch_factor=3) if workers else {})
    return fit(LoopConfig(**quick, epochs=3), Points(), net(norm=True), loader, DataLoader(points(20, seed=1), 7), folder, observers)

def test_results_do_not_depend_on_workers(tmp_path):
    "0, 1, 2 or 4 of them, persistent or not, and changed between a stop and a new start; what was read ahead is neither lost nor repeated"
    none = keyed(tmp_path/'0', 0)
    assert [h['batches'] for h in none.history] == [5, 4, 5]
    for n in (1, 2, 4): equal(none, keyed(tmp_path/f'{n}', n, persistent=n > 1))
    assert keyed(tmp_path/'half', 2, True, [At(7, stop)]).batch == 2
    equal(none, keyed(tmp_path/'half', 1, True))

def test_real_batches_do_not_depend_on_workers(tiny_world, monkeypatch):
    "The segmentation loaders with all of the augmentation, two epochs of training and a validation: every pixel, whoever prepared it"
    monkeypatch.setattr(rtsseg.tiles.os, 'cpu_count', lambda: 4)
    def read(n):
        cfg = load(device='cpu', batch_size=8, data=dict(manifest=tiny_world, tile_size=64, split_check='warn'), loader=dict(num_workers=n)); feed = loaders(cfg); assert feed.train.num_workers == n
        for epoch in (1, 2): feed.train.batch_sampler.set_epoch(epoch); yield from feed.train
        yield from feed.val
    none = list(read(0)); assert len(none) > 4 and not torch.equal(none[0]['image'], none[1]['image'])
    for n in (1, 2, 4):
        for a, b in zip(none, read(n), strict=True): assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)

def test_an_empty_epoch_is_an_error():
    with pytest.raises(ConfigError, match='holds no batch'): run(data=points(4), loader=dict(drop_last=True))

# ---------------------------------------------------------------- samplers that learn
class Told(Keys):
    "Notes what it is told"
    def __init__(self, learns=True): self.learns, self.told = learns, []
    def learn(self, tiles, losses): self.told.append((tiles, losses))

class Weighed(Points):
    "Says how hard each sample was, and notes it by optimizer step"
    asked = 0
    def difficulty(self, out, batch):
        assert not torch.is_grad_enabled(); self.asked += 1
        return batch['tile'], F.binary_cross_entropy_with_logits(out, batch['y'].clamp(max=1), reduction='none')

class Named(Keyed):
    def __getitem__(self, key): return super().__getitem__(key) | dict(tile=key[2])

def learn(folder, sampler, task=None, model=None, observers=(), **cfg):
    return fit(LoopConfig(**quick | dict(epochs=1) | cfg), task or Weighed(), model or net(norm=True), DataLoader(Named(), batch_sampler=sampler), DataLoader(points(20, seed=1), 7), folder, observers)

def test_a_sampler_is_told_each_samples_loss_after_its_step(tmp_path):
    "Each micro-batch of each step in order, with the losses of the weights before that step; nothing of a step that was left out"
    seen = []
    class Checked(Weighed):
        def loss(self, out, batch):
            values = super().loss(out, batch)
            if not torch.is_grad_enabled(): return values
            seen.append((batch['tile'].tolist(), [float(F.binary_cross_entropy_with_logits(o, y.clamp(max=1))) for o, y in zip(out.detach(), batch['y'])], len(sampler.told)))
            return {p: v * (math.nan if len(seen) == 1 else 1) for p, v in values.items()}
    sampler = Told(); r = learn(tmp_path, sampler, Checked(), accumulate=2)                # 5 batches: groups of 2, 2, 1, of which the first is left out
    assert r.skipped == 1 and [n for *_, n in seen] == [0, 0, 0, 0, 2] and len(sampler.told) == 3
    for (tiles, losses), (want, by_hand, _) in zip(sampler.told, seen[2:], strict=True): assert tiles == want and losses == pytest.approx(by_hand, rel=1e-5)

def test_nothing_is_asked_where_nobody_learns(tmp_path):
    task, sampler = Weighed(), Told(learns=False); learn(tmp_path, sampler, task)
    assert task.asked == 0 and sampler.told == []

def test_a_task_that_cannot_tell_is_an_error_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match='Points has no difficulty'): learn(tmp_path, Told(), Points())
    assert not list(tmp_path.iterdir())

def hard(h=.8): return Batches([True] * 8 + [False] * 40, SamplerConfig(hard_negatives=h, curriculum=[CurriculumRow(first=1, last=1, ratio=2)]), 4, seed=0)

@pytest.fixture(scope='module')
def hardened(tmp_path_factory): return learn(tmp_path_factory.mktemp('hard'), hard(), epochs=4)

@pytest.mark.parametrize('at', [1, 3, 8, 13])
@pytest.mark.parametrize('how', [stop, crash])
def test_hard_negatives_over_a_stop(at, how, hardened, tmp_path):
    "What the sampler knows, and what it has learnt since the epoch began, goes on with the run; 8 batches an epoch"
    cfg = dict(epochs=4, checkpoint=dict(resume_minutes=1e-9))
    try: learn(tmp_path, hard(), observers=[At(at, how)], **cfg)
    except Crash: pass
    rest = learn(tmp_path, hard(), model=net(9 if at > 1 or how is stop else 0, norm=True), **cfg)
    equal(hardened, rest); assert rest.sampler.state() == hardened.sampler.state() and rest.sampler.state()['losses']

def test_a_sampler_forgets_another_run(hardened, tmp_path):
    "The same sampler in two runs: the second begins as the first did"
    sampler = hard(); learn(tmp_path/'1', sampler, epochs=4)
    again = learn(tmp_path/'2', sampler, epochs=4); equal(hardened, again); assert again.sampler.state() == hardened.sampler.state()

# ---------------------------------------------------------------- loss scaling and half precision, as far as a CPU shows them
@pytest.fixture
def precise(monkeypatch):
    "precise(scale, mixed) → runs use a gradient scaler that starts at `scale`, and this mixed precision"
    def use(scale=None, mixed='no'):
        def make(cfg):
            AcceleratorState._reset_state(reset_partial_state=True); acc = Accelerator(cpu=True, mixed_precision=mixed)
            acc.scaler = scale and torch.amp.GradScaler('cpu', init_scale=scale, growth_interval=10**6); return acc
        monkeypatch.setattr(rtsseg.loop, 'accelerator', make)
    yield use
    AcceleratorState._reset_state(reset_partial_state=True)

def test_scaling_by_a_power_of_two_changes_no_bit(precise):
    "Unscaled before clipping and before the step, over accumulated groups: 2^10 is exact. Clipping first would show, for the norm is far above the limit"
    cfg = dict(accumulate=2, optimizer=dict(clip_norm=.01), epochs=2); plain = run(**cfg)
    precise(2.**10); equal(plain, run(**cfg))

def test_overflow_skips_and_lowers_the_scale(precise, tmp_path):
    "An overflow is no step: weights, moments and average stand still, and the scale halves until it fits; a resume keeps the scale"
    precise(2.**127); seen = []
    class Watch:
        def on_step(self, run):
            still = torch.equal(weights(run.model), weights(net())); seen.append((run.accelerator.scaler.get_scale(), run.skipped, run.average.steps, still))
    cfg = dict(loss_weights=dict(bce=32., square=32.)); half = run(tmp_path, observers=[Watch(), At(9, stop)], **cfg)
    n = half.skipped
    assert 1 <= n < 9 and seen[n - 1] == (2.**(127 - n), n, 0, True) and seen[n][1:] == (n, 1, False)
    precise(2.**127); rest = run(tmp_path, **cfg)
    assert rest.skipped == n and rest.accelerator.scaler.get_scale() == 2.**(127 - n) and weights(rest.model).isfinite().all()

def test_half_precision_stays_inside_the_model(precise):
    "The model computes in bfloat16; losses and meters see float32, and weights, gradients and the average stay float32"
    inside, outside = set(), set()
    class Look(Points):
        def forward(self, model, batch): out = super().forward(model, batch); inside.add(out.dtype); return out
        def loss(self, out, batch): outside.add(out.dtype); return super().loss(out, batch)
    precise(mixed='bf16'); r = run(task=Look())
    assert inside == {torch.bfloat16} and outside == {torch.float32}
    assert {p.dtype for p in [*r.model.parameters(), *r.judged.parameters()]} == {torch.float32} and not torch.equal(weights(r.model), weights(net()))
