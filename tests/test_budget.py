"A budget of time: what it fits, that measuring leaves no trace, and that a run with a budget repeats to the bit"
import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from helpers.loop import At, Points, equal, net, points, quick, stop, weights
from rtsseg.budget import (
    BUDGET,
    MAX_VALIDATION_SHARE,
    RESERVE,
    EpochLengths,
    Pace,
    StagePace,
    fit_to_minutes,
    measure_pace,
    read_budget,
    validations,
    with_budget,
)
from rtsseg.config import ConfigError, LoopConfig, Sampler
from rtsseg.loop import fit
from rtsseg.processes import RankBatches
from rtsseg.sampler import Batches

seconds = st.floats(1e-3, 30)

def planned_seconds(cfg, fitted, pace):
    "Seconds of all steps and of all validations of a run, if each takes what was measured"
    steps = sum(stage.epochs * stage.step for stage in pace.stages) * fitted.steps[0]
    return steps, validations(cfg.epochs, fitted.val_frequency) * pace.validation

@given(minutes=st.floats(.05, 600), stages=st.lists(st.tuples(st.integers(1, 40), seconds), min_size=1, max_size=3),
       validation=seconds, val_frequency=st.integers(1, 20))
def test_what_is_fitted_takes_no_longer_than_the_budget(minutes, stages, validation, val_frequency):
    "All of the time is planned but for the reserve and less than a step in each epoch, or nothing fits and is refused"
    pace = Pace(stages=[StagePace(epochs=n, step=step) for n, step in stages], validation=validation)
    cfg = LoopConfig(epochs=sum(n for n, _ in stages), budget_minutes=minutes, val_frequency=val_frequency)
    one_step_each = sum(n * step for n, step in stages)
    try:
        fitted = fit_to_minutes(cfg, pace)
    except ConfigError:
        assert one_step_each + validation > 60 * minutes * (1 - RESERVE - MAX_VALIDATION_SHARE)
        return
    steps, judged = planned_seconds(cfg, fitted, pace)
    whole = 60 * minutes * (1 - RESERVE)
    assert whole - one_step_each - 1e-6 < steps + judged <= whole + 1e-6
    assert judged <= max(MAX_VALIDATION_SHARE * whole, validation) + 1e-6
    assert fitted.val_frequency >= val_frequency

@given(n=st.integers(1, 40), world=st.integers(1, 3), length=st.integers(1, 30))
def test_an_epoch_has_the_steps_that_are_asked_for(n, world, length):
    "In every process, one pass after the other"
    batches = [[i] for i in range(n)]
    shares = [list(RankBatches(batches, rank, world, length=length)) for rank in range(world)]
    assert {len(share) for share in shares} == {length}
    in_turn = [batch for step in zip(*shares, strict=True) for batch in step]
    assert in_turn == list(itertools.islice(itertools.cycle(batches), length * world))

@given(positives=st.integers(1, 9), negatives=st.integers(0, 60), fraction=st.sampled_from([.25, .5, None]),
       steps=st.integers(1, 80), seed=st.integers(0, 5))
def test_no_draw_comes_twice_in_an_epoch_of_any_length(positives, negatives, fraction, steps, seed):
    positive = [True] * positives + [False] * negatives
    try:
        batches = Batches(positive, Sampler(positive_fraction=fraction), 4, seed)
    except ValueError:
        return
    keys = [key for batch in RankBatches(batches, length=steps) for key in batch]
    assert len(set(keys)) == len(keys) == 4 * steps

def loaders():
    data = points(96)
    return DataLoader(data, batch_size=8, shuffle=True), DataLoader(data, batch_size=8)

def budgeted(folder, observers=(), **more):
    "A run with a budget, and what was fitted"
    cfg = LoopConfig(**quick | dict(epochs=4, budget_minutes=.05) | more)
    model = net(norm=True)
    cfg, steps_of = with_budget(cfg, Points(), model, *loaders(), Path(folder))
    run = fit(cfg, Points(), model, *loaders(), folder, observers, steps_of)
    return run, read_budget(Path(folder))

@pytest.mark.parametrize('freeze', [0, 2])
def test_measuring_leaves_no_trace(freeze):
    "Weights, batch statistics and what trains are as before"
    model, before = net(norm=True), net(norm=True)
    cfg = LoopConfig(**quick | dict(epochs=4, budget_minutes=.1, freeze_backbone_epochs=freeze))
    pace = measure_pace(cfg, Points(), model, *loaders())
    assert torch.equal(weights(model), weights(before))
    assert all(p.requires_grad for p in model.parameters())
    assert [stage.epochs for stage in pace.stages] == ([2, 2] if freeze else [4])

def test_a_run_repeats_from_what_was_fitted(tmp_path):
    "With budget.json of another run, on however fast a machine"
    first, fitted = budgeted(tmp_path/'first')
    (tmp_path/'second').mkdir()
    (tmp_path/'second'/BUDGET).write_bytes((tmp_path/'first'/BUDGET).read_bytes())
    second, _ = budgeted(tmp_path/'second')
    assert first.step == sum(fitted.steps)
    equal(first, second)

def test_a_stopped_run_keeps_the_lengths_of_epochs_that_began(tmp_path):
    "They are read again; where all are known, the run ends in the same bytes"
    undisturbed, fitted = budgeted(tmp_path/'undisturbed')
    (tmp_path/'stopped').mkdir()
    (tmp_path/'stopped'/BUDGET).write_bytes((tmp_path/'undisturbed'/BUDGET).read_bytes())
    stopped, _ = budgeted(tmp_path/'stopped', [At(fitted.steps[0] + 1, stop)])
    assert not stopped.finished
    resumed, _ = budgeted(tmp_path/'stopped')
    equal(resumed, undisturbed)

def test_a_stopped_run_has_the_time_that_is_left(tmp_path):
    "The epoch under way keeps its length, and the time until it began is not given again"
    _, first = budgeted(tmp_path, [At(1, stop)])
    assert len(first.steps) == 1
    _, fitted = budgeted(tmp_path)
    assert fitted.steps[0] == first.steps[0]
    assert fitted.began[0] == first.began[0]
    assert fitted.began == sorted(fitted.began)

def test_lengths_follow_the_formula(tmp_path):
    "Time left over the seconds of the epochs left, at the speed of the epoch before"
    pace = Pace(stages=[StagePace(epochs=2, step=.5), StagePace(epochs=4, step=1.)], validation=3.)
    cfg = LoopConfig(epochs=6, budget_minutes=10, val_frequency=2)
    fitted = fit_to_minutes(cfg, pace)
    lengths = EpochLengths(cfg, fitted, tmp_path)
    lengths.start = time.monotonic() - 200
    # of the second epoch, on a machine half as fast as it was
    history = [dict(epoch=1, batches=50, seconds=50.)]
    run = SimpleNamespace(epoch=2, history=history)
    steps = lengths(run)
    left = 600 * (1 - RESERVE) - 200
    assert steps == int((left / 2 - 3 * 3.) / (.5 + 4 * 1.))
    # a run that was resumed does not know how fast it was
    lengths.start = time.monotonic() - 299
    history[0] = dict(epoch=1)
    run.epoch = 3
    assert lengths(run) == int(((600 * (1 - RESERVE) - 299) / 2 - 2 * 3.) / 4.)
    # and one that is late takes one step an epoch
    lengths.start = time.monotonic() - 700
    run.epoch = 4
    assert lengths(run) == 1

def test_a_budget_that_is_too_short_says_what_would_do(tmp_path):
    with pytest.raises(ConfigError, match='budget_minutes 1e-06: 4 epochs .* already take .* minutes here: raise it'):
        budgeted(tmp_path, budget_minutes=1e-6)
    assert not (tmp_path/BUDGET).exists()

def test_a_budget_and_a_length_contradict_each_other():
    with pytest.raises(ValueError, match='budget_minutes fits steps_per_epoch'):
        LoopConfig(budget_minutes=1, steps_per_epoch=5)
