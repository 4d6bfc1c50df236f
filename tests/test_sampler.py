"Sampler: what an epoch and a batch hold, for any split, curriculum and batch size"

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch.utils.data import DataLoader, Dataset

from rtsseg.config import CurriculumRow, Sampler
from rtsseg.sampler import Batches

def make(n_pos, n_neg, ratio, fraction, size, seed=0, drop_last=True, hard=0.0):
    "A split in random order and its sampler, which knows losses of half of the tiles; None without a full batch"
    rng = np.random.default_rng(n_pos + n_neg)
    positive = rng.permutation([True] * n_pos + [False] * n_neg)
    cfg = Sampler(
        positive_fraction=fraction,
        hard_negatives=hard,
        curriculum=[CurriculumRow(first=1, last=3, ratio=ratio), CurriculumRow(first=4, last=9, ratio=ratio + 3)],
    )
    try:
        b = Batches(positive, cfg, size, seed, drop_last)
    except ValueError as e:
        assert 'batch_size' in str(e)
        return positive, None
    tiles = np.flatnonzero(rng.random(len(positive)) < 0.5)
    b.learn(tiles, rng.exponential(size=len(tiles)) * (rng.random(len(tiles)) < 0.8))
    b.set_epoch(0)
    return positive, b


def draw(batches, epoch):
    batches.set_epoch(epoch)
    return list(batches)


splits = dict(
    n_pos=st.integers(1, 40),
    n_neg=st.integers(0, 300),
    ratio=st.integers(1, 12),
    size=st.integers(1, 24),
    epoch=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    drop_last=st.booleans(),
    hard=st.sampled_from([0.0, 0.5, 1.0]),
)


@settings(deadline=None, max_examples=150)
@given(fraction=st.floats(0.05, 0.95), **splits)
def test_balanced_batches(n_pos, n_neg, ratio, size, epoch, seed, drop_last, hard, fraction):
    "Each batch has round(f·B) positives, no negative comes twice, no positive is more than one draw ahead of another"
    positive, b = make(n_pos, n_neg, ratio, fraction, size, seed, drop_last, hard)
    if b is None or not n_neg:
        return
    out, asked = draw(b, epoch), n_pos * (ratio if epoch <= 3 else ratio + 3)
    seen = Counter(k[2] for batch in out for k in batch)
    pos, neg = ({t: n for t, n in seen.items() if positive[t] == which} for which in (True, False))
    per = round(fraction * size)
    pool = min(asked, n_neg)
    assert len(out) == len(b) == (pool // (size - per) if drop_last else -(-pool // (size - per)))
    for batch in out[: None if drop_last else -1]:
        assert len(batch) == size and sum(positive[k[2]] for k in batch) == per
    if not drop_last:
        assert any(positive[k[2]] for k in out[-1]) and len(neg) == pool
    assert set(neg.values()) <= {1} and len(neg) >= pool - (size - per) + 1
    times = [pos.get(t, 0) for t in np.flatnonzero(positive)]
    assert max(times) - min(times) <= 1
    keys = [k for batch in out for k in batch]
    assert (
        len(set(keys)) == len(keys)
        and all(type(v) is int for k in keys for v in k)
        and {k[:2] for k in keys} == {(seed, epoch)}
    )
    for t, n in pos.items():
        assert sorted(k[3] for k in keys if k[2] == t) == list(range(n))


@settings(deadline=None, max_examples=150)
@given(**splits)
def test_batches_that_follow_the_ratio(n_pos, n_neg, ratio, size, epoch, seed, drop_last, hard):
    "Every tile of the pool once, up to the dropped batch, and a positive in each batch that has room for one"
    positive, b = make(n_pos, n_neg, ratio, None, size, seed, drop_last, hard)
    if b is None:
        return
    out, r = draw(b, epoch), ratio if epoch <= 3 else ratio + 3
    tiles = [k[2] for batch in out for k in batch]
    pool = n_pos + min(n_pos * r, n_neg)
    assert len(set(tiles)) == len(tiles) == (pool // size * size if drop_last else pool)
    assert {len(batch) for batch in out[: None if drop_last else -1]} <= {size}
    if size >= 1 + r:
        assert all(any(positive[k[2]] for k in batch) for batch in (out if drop_last else out[:-1]))
    if not drop_last:
        assert sum(positive[t] for t in tiles) == n_pos
    assert b.plan(epoch).tiles == len(tiles)


@settings(deadline=None, max_examples=100)
@given(
    fraction=st.sampled_from([0.25, 0.5, 0.75, None]),
    quarter=st.integers(1, 4),
    **{k: v for k, v in splits.items() if k != 'size'},
)
def test_double_batch(n_pos, n_neg, ratio, quarter, epoch, seed, drop_last, hard, fraction):
    "A batch of 2B holds what two successive batches of B hold"
    (_, one), (_, two) = (make(n_pos, n_neg, ratio, fraction, s, seed, hard=hard) for s in (8 * quarter, 4 * quarter))
    if one is None or two is None:
        return
    one, two = draw(one, epoch), draw(two, epoch)
    assert [sorted(b) for b in one] == [sorted(p + q) for p, q in zip(two[::2], two[1::2])]


@pytest.mark.parametrize('fraction', [0.5, None])
def test_other_epochs_drop_other_tiles(fraction):
    "Over the epochs every tile is drawn, though each epoch drops some"
    b = Batches(
        [True] * 10 + [False] * 60,
        Sampler(positive_fraction=fraction, curriculum=[CurriculumRow(first=1, last=1, ratio=3)]),
        14,
        seed=0,
    )
    epochs = [{k[2] for batch in draw(b, e) for k in batch} for e in range(1, 31)]
    assert (
        all(len(e) < 40 for e in epochs)
        and set.union(*epochs) == set(range(70))
        and len({frozenset(e) for e in epochs}) == 30
    )


def test_negatives_are_drawn_evenly():
    "Each negative has the same chance in every epoch: χ² over 400 epochs"
    positive, b = make(5, 40, 2, 0.5, 2)
    count = Counter(k[2] for e in range(10, 410) for batch in draw(b, e) for k in batch if not positive[k[2]])
    assert chisquare([count[t] for t in np.flatnonzero(~positive)]).pvalue > 0.01


# ---------------------------------------------------------------- hard negatives
def test_the_even_draw_is_a_permutation():
    "With hard_negatives 0 an epoch's negatives are the first of one permutation, with or without losses"
    positive, b = make(7, 90, 4, 0.5, 8, seed=5)
    rng = np.random.default_rng(np.random.SeedSequence((5, 2), spawn_key=(1,)))
    rng.random()
    assert [k[2] for batch in draw(b, 2) for k in batch if not positive[k[2]]] == rng.permutation(
        np.flatnonzero(~positive)
    )[:28].tolist()


def chance(weights, k):
    "Each set of k: the chance that k successive draws give it, each among the tiles left and by their weights"

    def of(order):
        left = sum(weights)
        return np.prod([weights[i] / (left - sum(weights[j] for j in order[:n])) for n, i in enumerate(order)])

    return {c: sum(map(of, itertools.permutations(c))) for c in itertools.combinations(range(len(weights)), k)}


@pytest.mark.parametrize(
    'hard,losses',
    [
        (1.0, [1.0, 2.0, 3.0, 4.0, 10.0]),
        (0.5, [1.0, 2.0, 3.0, 4.0, 10.0]),
        (0.8, [5.0, 0.0, None, 1.0, None]),
        (1.0, [None] * 5),
    ],
)
@pytest.mark.parametrize('ratio', [1, 2, 3])
def test_draw_follows_the_weights(hard, losses, ratio):
    "Every set of negatives comes as often as successive draws without replacement say: χ² over 3000 epochs"
    b = Batches(
        [True] + [False] * 5,
        Sampler(
            positive_fraction=None, hard_negatives=hard, curriculum=[CurriculumRow(first=1, last=1, ratio=ratio)]
        ),
        1 + ratio,
        seed=0,
    )
    known = [loss for loss in losses if loss is not None]
    b.learn([1 + i for i, loss in enumerate(losses) if loss is not None], known)
    relative = [1.0 if loss is None else loss / np.mean(known) for loss in losses]
    want = chance([1 - hard + hard * loss for loss in relative], ratio)
    seen = Counter(tuple(sorted(k[2] - 1 for k in batch if k[2])) for e in range(2, 3002) for batch in draw(b, e))
    assert (
        set(seen) <= set(want) and chisquare([seen[c] for c in want], [3000 * p for p in want.values()]).pvalue > 0.01
    )


def test_losses_of_zero_come_last_and_evenly():
    "h = 1, two tiles with a loss and four without, three to draw: both of the two, and each of the four equally often"
    b = Batches(
        [True] + [False] * 6,
        Sampler(positive_fraction=None, hard_negatives=1.0, curriculum=[CurriculumRow(first=1, last=1, ratio=3)]),
        4,
        seed=0,
    )
    b.learn(range(1, 7), [0.0, 0.0, 2.0, 0.0, 1.0, 0.0])
    count = Counter(k[2] for e in range(2, 1002) for batch in draw(b, e) for k in batch)
    assert count[3] == count[5] == 1000 and chisquare([count[t] for t in (1, 2, 4, 6)]).pvalue > 0.01


def loss_of(key):
    return float(np.random.default_rng(key).exponential())


def train(b, epochs, state=None, start=(1, 0), stop=None, ahead=0):
    """What a loop does: batches from `start`, `ahead` of them prefetched before losses are learnt.

    At `stop` (epoch, batches done) it returns the state.
    """
    if state is not None:
        b.load(state)
    out = []
    for e in range(start[0], epochs + 1):
        b.set_epoch(e)
        stream = iter(b)
        read = []
        for i in range(len(b)):
            if (e, i) == stop:
                return out, b.state()
            read += itertools.islice(stream, i + 1 + ahead - len(read))
            if (e, i) < start:
                continue
            out.append(read[i])
            b.learn([k[2] for k in read[i]], [loss_of(k) for k in read[i]])
    return out, b.state()


@settings(deadline=None, max_examples=60)
@given(
    fraction=st.sampled_from([0.5, None]),
    hard=st.sampled_from([0.0, 0.5, 1.0]),
    epoch=st.integers(1, 4),
    at=st.floats(0, 1),
    ahead=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_resume_anywhere(fraction, hard, epoch, at, ahead, seed):
    "Stopped after any batch of any epoch and resumed from numbers alone, prefetching or not: same stream, same losses"
    def new():
        return make(8, 100, 3, fraction, 6, seed, hard=hard)[1]

    positive = make(8, 100, 3, fraction, 6)[0]
    (whole, end), b = train(new(), 4, {}), new()
    b.set_epoch(epoch)
    stop = epoch, int(at * (len(b) - 1))
    first, state = train(b, 4, {}, stop=stop, ahead=ahead)
    rest, again = train(new(), 4, state, stop, ahead=3)
    assert first + rest == whole and again == end
    if hard:
        assert len(end['losses']) and all(
            type(k) is int and type(v) is float and not positive[k]
            for d in (end['losses'], end['learnt'])
            for k, v in d.items()
        )


def test_hard_ones_come_at_any_time_of_the_epoch():
    """Of tiles with losses 1 to 40, half of them drawn, the mean place does not depend on the loss.

    Drawn hardest first, the last batch would drop the easy ones.
    """
    b = Batches(
        [True] + [False] * 40,
        Sampler(positive_fraction=None, hard_negatives=1.0, curriculum=[CurriculumRow(first=1, last=1, ratio=20)]),
        21,
        seed=0,
    )
    b.learn(range(1, 41), range(1, 41))
    loss, place = np.array(
        [(k[2], i) for e in range(2, 402) for batch in draw(b, e) for i, k in enumerate(k for k in batch if k[2])]
    ).T
    assert abs(np.corrcoef(loss, place)[0, 1]) < 4 / np.sqrt(len(loss))


def test_last_loss_counts():
    "Of two losses of a tile the later one; hard tiles of the last epoch are drawn more often in the next"
    positive, b = make(20, 400, 5, 0.5, 10, hard=1.0)
    easy = np.flatnonzero(~positive)[:200]
    b.load({})
    b.learn(np.flatnonzero(~positive), np.full(400, 9.0))
    b.learn(easy, np.full(200, 1.0))
    drawn = {k[2] for batch in draw(b, 2) for k in batch}
    # the 20 positive tiles are drawn as well
    assert len(drawn - set(easy.tolist())) > 2 * len(drawn & set(easy.tolist())) + 20


class Echo(Dataset):
    "Gives back its key"

    def __len__(self):
        return 70

    def __getitem__(self, key):
        return torch.tensor(key)


@pytest.mark.parametrize('hard', [0.0, 0.9])
def test_workers_see_the_same_stream(hard):
    "However far they read ahead of the losses that are learnt"
    _, b = make(10, 60, 3, 0.5, 8, hard=hard)
    streams = []
    for workers in (0, 1, 2):
        loader = DataLoader(Echo(), batch_sampler=b, num_workers=workers, persistent_workers=workers > 0)
        epochs = []
        b.load({})
        for e in (1, 2, 3):
            b.set_epoch(e)
            assert len(loader) == len(b)
            batches = []
            for batch in loader:
                batches.append(batch)
                b.learn(batch[:, 2], torch.tensor([loss_of(k) for k in batch.tolist()]))
            epochs.append(torch.stack(batches))
        streams.append(torch.stack(epochs))
    assert all(torch.equal(s, streams[0]) for s in streams) and not torch.equal(streams[0][0], streams[0][1])


def test_said_once(caplog):
    _, b = make(10, 15, 3, 0.5, 4)
    for e in (1, 2, 5):
        b.set_epoch(e)
        list(b)
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 1 and '1:3' in messages[0] and '1:1.5' in messages[0]


@pytest.mark.parametrize('n_neg,said', [(31, 0), (30, 1), (15, 2)])
def test_no_choice_is_said_once(n_neg, said, caplog):
    "1:3 of 10 positives leaves hard_negatives a choice among 31 tiles, none among 30 or fewer"
    b = Batches(
        [True] * 10 + [False] * n_neg,
        Sampler(hard_negatives=0.5, curriculum=[CurriculumRow(first=1, last=1, ratio=3)]),
        4,
        seed=0,
    )
    for e in (1, 2, 5):
        b.set_epoch(e)
        list(b)
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == said and all(f'all {n_neg}' in w for w in messages)
