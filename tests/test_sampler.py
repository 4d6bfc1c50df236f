"Sampler: what an epoch and a batch hold, for any split, curriculum and batch size"
import warnings
from collections import Counter

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader, Dataset

from rtsseg.config import CurriculumRow, Sampler
from rtsseg.sampler import Batches

def make(n_pos, n_neg, ratio, fraction, size, seed=0, drop_last=True):
    "A split in random order and its sampler, or None where no batch can be filled"
    positive = np.random.default_rng(n_pos + n_neg).permutation([True]*n_pos + [False]*n_neg)
    cfg = Sampler(positive_fraction=fraction, curriculum=[CurriculumRow(first=1, last=3, ratio=ratio), CurriculumRow(first=4, last=9, ratio=ratio + 3)])
    try: return positive, Batches(positive, cfg, size, seed, drop_last)
    except ValueError as e:
        assert 'batch_size' in str(e)
        return positive, None

def draw(batches, epoch):
    batches.set_epoch(epoch)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return list(batches)

splits = dict(n_pos=st.integers(1, 40), n_neg=st.integers(0, 300), ratio=st.integers(1, 12), size=st.integers(1, 24), epoch=st.integers(1, 12),
              seed=st.integers(0, 2**32), drop_last=st.booleans())

@settings(deadline=None, max_examples=150)
@given(fraction=st.floats(.05, .95), **splits)
def test_balanced_batches(n_pos, n_neg, ratio, size, epoch, seed, drop_last, fraction):
    "Each batch has round(f·B) positives, no negative comes twice, no positive is more than one draw ahead of another"
    positive, b = make(n_pos, n_neg, ratio, fraction, size, seed, drop_last)
    if b is None or not n_neg: return
    out, asked = draw(b, epoch), n_pos*(ratio if epoch <= 3 else ratio + 3)
    seen = Counter(k[2] for batch in out for k in batch)
    pos, neg = ({t: n for t, n in seen.items() if positive[t] == which} for which in (True, False))
    per = round(fraction*size); pool = min(asked, n_neg)
    assert len(out) == len(b) == (pool//(size-per) if drop_last else -(-pool//(size-per)))
    for batch in out[:None if drop_last else -1]: assert len(batch) == size and sum(positive[k[2]] for k in batch) == per
    if not drop_last: assert any(positive[k[2]] for k in out[-1]) and len(neg) == pool
    assert set(neg.values()) <= {1} and len(neg) >= pool - (size-per) + 1
    times = [pos.get(t, 0) for t in np.flatnonzero(positive)]
    assert max(times) - min(times) <= 1
    keys = [k for batch in out for k in batch]
    assert len(set(keys)) == len(keys) and all(type(v) is int for k in keys for v in k) and {k[:2] for k in keys} == {(seed, epoch)}
    for t, n in pos.items(): assert sorted(k[3] for k in keys if k[2] == t) == list(range(n))

@settings(deadline=None, max_examples=150)
@given(**splits)
def test_batches_that_follow_the_ratio(n_pos, n_neg, ratio, size, epoch, seed, drop_last):
    "Every tile of the pool once, up to the dropped batch, and a positive in each batch that has room for one"
    positive, b = make(n_pos, n_neg, ratio, None, size, seed, drop_last)
    if b is None: return
    out, r = draw(b, epoch), ratio if epoch <= 3 else ratio + 3
    tiles = [k[2] for batch in out for k in batch]
    pool = n_pos + min(n_pos*r, n_neg)
    assert len(set(tiles)) == len(tiles) == (pool//size*size if drop_last else pool)
    assert {len(batch) for batch in out[:None if drop_last else -1]} <= {size}
    if size >= 1 + r: assert all(any(positive[k[2]] for k in batch) for batch in (out if drop_last else out[:-1]))
    if not drop_last: assert sum(positive[t] for t in tiles) == n_pos
    assert b.plan(epoch).tiles == len(tiles)

@settings(deadline=None, max_examples=100)
@given(fraction=st.sampled_from([.25, .5, .75, None]), quarter=st.integers(1, 4), **{k: v for k, v in splits.items() if k != 'size'})
def test_double_batch(n_pos, n_neg, ratio, quarter, epoch, seed, drop_last, fraction):
    "A batch of 2B holds what two successive batches of B hold"
    (_, one), (_, two) = (make(n_pos, n_neg, ratio, fraction, s, seed) for s in (8*quarter, 4*quarter))
    if one is None or two is None: return
    one, two = draw(one, epoch), draw(two, epoch)
    assert [sorted(b) for b in one] == [sorted(p + q) for p, q in zip(two[::2], two[1::2])]

@pytest.mark.parametrize('fraction', [.5, None])
def test_other_epochs_drop_other_tiles(fraction):
    "Over the epochs every tile is drawn, though each epoch drops some"
    b = Batches([True]*10 + [False]*60, Sampler(positive_fraction=fraction, curriculum=[CurriculumRow(first=1, last=1, ratio=3)]), 14, seed=0)
    epochs = [{k[2] for batch in draw(b, e) for k in batch} for e in range(1, 31)]
    assert all(len(e) < 40 for e in epochs) and set.union(*epochs) == set(range(70)) and len({frozenset(e) for e in epochs}) == 30

def test_negatives_are_drawn_evenly():
    "Each negative has the same chance in every epoch: χ² over 400 epochs"
    from scipy.stats import chisquare
    positive, b = make(5, 40, 2, .5, 2)
    count = Counter(k[2] for e in range(10, 410) for batch in draw(b, e) for k in batch if not positive[k[2]])
    assert chisquare([count[t] for t in np.flatnonzero(~positive)]).pvalue > .01

class Echo(Dataset):
    "Gives back its key"
    def __len__(self): return 70
    def __getitem__(self, key): return torch.tensor(key)

def test_workers_see_the_same_stream():
    _, b = make(10, 60, 3, .5, 8)
    streams = []
    for workers in (0, 1, 2):
        loader = DataLoader(Echo(), batch_sampler=b, num_workers=workers, persistent_workers=workers > 0)
        epochs = []
        for e in (1, 2):
            b.set_epoch(e); assert len(loader) == len(b)
            epochs.append(torch.stack(list(loader)))
        streams.append(torch.stack(epochs))
    assert all(torch.equal(s, streams[0]) for s in streams) and not torch.equal(streams[0][0], streams[0][1])

def test_said_once():
    _, b = make(10, 15, 3, .5, 4)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        for e in (1, 2, 5): b.set_epoch(e); list(b)
    assert len(told) == 1 and '1:3' in str(told[0].message) and '1:1.5' in str(told[0].message)
