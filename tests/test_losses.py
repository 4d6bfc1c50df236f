"Losses: for any logits, targets and parameters"
from functools import partial

import numpy as np, pytest, segmentation_models_pytorch as smp, torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from torchvision.ops import sigmoid_focal_loss

from rtsseg.config import Loss
from rtsseg.losses import IGNORE, class_weight, cross_entropy, focal, make_loss, tversky

shape = (2, 3, 4)
logits = arrays(np.float32, shape, elements=st.floats(-30, 30, width=32))
hard, soft = arrays(np.float32, shape, elements=st.sampled_from([0., 1.])), arrays(np.float32, shape, elements=st.floats(0, 1, width=32))
ignored = arrays(bool, shape)
gammas, alphas = st.sampled_from([0., .5, 1., 2., 3., 5.]), st.floats(0, 1)

EVERY = {'focal': focal, 'cross_entropy': partial(cross_entropy, weight=20.), 'tversky': partial(tversky, alpha=.3, beta=.7), 'dice': tversky,
         'dice, each image': partial(tversky, per_image=True)}
every = pytest.mark.parametrize('f', EVERY.values(), ids=EVERY)

def run(x, t, f=focal, **kw):
    x = torch.tensor(x)[:, None].requires_grad_()
    loss = f(x, torch.tensor(t), **kw); loss.backward()
    return loss.item(), x.grad[:, 0].numpy()

@settings(deadline=None)
@given(logits, hard, gammas, alphas)
def test_agrees_with_torchvision(x, t, gamma, alpha):
    theirs = sigmoid_focal_loss(torch.tensor(x), torch.tensor(t), alpha, gamma, 'mean').item()
    np.testing.assert_allclose(run(x, t, gamma=gamma, alpha=alpha)[0], theirs, rtol=1e-4, atol=1e-6)

@settings(deadline=None)
@given(logits, soft, gammas, alphas)
def test_follows_its_formula(x, t, gamma, alpha):
    z, y = x.astype(float), t.astype(float)
    p, ce = 1/(1 + np.exp(-z)), np.logaddexp(0, z) - y*z
    formula = ((alpha*y + (1-alpha)*(1-y))*abs(y-p)**gamma*ce).mean()
    np.testing.assert_allclose(run(x, t, gamma=gamma, alpha=alpha)[0], formula, rtol=1e-3, atol=1e-5)

@settings(deadline=None)
@given(logits, soft, ignored, st.floats(1, 1000, width=32))
def test_cross_entropy_agrees_with_torch(x, t, gone, weight):
    ok = ~gone; ours = run(x, np.where(gone, np.float32(255), t), cross_entropy, weight=weight)[0]
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(x[ok]), torch.tensor(t[ok]), pos_weight=torch.tensor(weight)).item() if ok.any() else 0
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)

@settings(deadline=None)
@given(logits, hard, soft, ignored, st.booleans(), st.floats(0, 1, width=32), st.floats(0, 1, width=32), st.floats(.125, 100, width=32))
def test_tversky_agrees_with_smp(x, t, s, gone, is_soft, alpha, beta, smooth):
    "whose α is the guide's β. It has no loss at all where there is no positive pixel"
    t = np.where(gone, np.float32(255), s if is_soft else t); y = np.where(gone, 0, t)
    if y.sum() == 0: return
    theirs = smp.losses.TverskyLoss('binary', smooth=smooth, alpha=beta, beta=alpha, ignore_index=IGNORE)(torch.tensor(x)[:, None], torch.tensor(t)[:, None]).item()
    np.testing.assert_allclose(run(x, t, tversky, alpha=alpha, beta=beta, smooth=smooth)[0], theirs, rtol=1e-4, atol=1e-5)

@settings(deadline=None)
@given(logits, hard, st.floats(0, 1, width=32), st.floats(0, 1, width=32))
def test_tversky_of_hard_labels_is_the_product_form(x, y, alpha, beta):
    "Guide 5.2, written out: soft targets reduce to hard ones"
    p = 1/(1 + np.exp(-x.astype(float))); tp, fn, fp = (p*y).sum(), ((1-p)*y).sum(), (p*(1-y)).sum()
    np.testing.assert_allclose(run(x, y, tversky, alpha=alpha, beta=beta)[0], 1 - (tp + 1)/(tp + alpha*fn + beta*fp + 1), rtol=1e-4, atol=1e-6)

@every
@settings(deadline=None)
@given(x=logits, other=logits, t=soft, gone=ignored)
def test_ignored_pixels_do_nothing(f, x, other, t, gone):
    t = np.where(gone, np.float32(255), t)
    (a, da), (b, db) = run(x, t, f), run(np.where(gone, other, x), t, f)
    assert a == b and (da == db).all() and not da[gone].any()
    if gone.all(): assert a == 0 and not da.any()
    elif 'per_image' not in getattr(f, 'keywords', {}): np.testing.assert_allclose(a, f(torch.tensor(x[~gone]), torch.tensor(t[~gone])), rtol=1e-4, atol=1e-6)

@every
@settings(deadline=None)
@given(x=arrays(np.float32, shape, elements=st.floats(-65504, 65504, width=16)), t=soft, dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_finite_however_saturated(f, x, t, dtype):
    x = torch.tensor(x).to(dtype).requires_grad_()
    loss = f(x, torch.tensor(t)); grad, = torch.autograd.grad(loss, x)
    assert loss.dtype == torch.float32 and loss.isfinite() and loss > -1e-6 and grad.isfinite().all()

@settings(deadline=None)
@given(arrays(np.float32, shape, elements=st.floats(-65504, 65504, width=16)), soft, gammas, st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_focal_is_finite_for_any_gamma(x, t, gamma, dtype):
    x = torch.tensor(x).to(dtype).requires_grad_()
    loss = focal(x, torch.tensor(t), gamma); grad, = torch.autograd.grad(loss, x)
    assert loss.isfinite() and loss >= 0 and grad.isfinite().all()

@settings(deadline=None)
@given(logits, soft, ignored, st.permutations(range(24)), st.integers(1, 23))
def test_parts_add_up(x, t, gone, order, cut):
    "Any split into micro-batches, weighted by counts, is the whole, in value and in gradient"
    t = np.where(gone, np.float32(255), t).ravel()[order]; x = x.ravel()[order]
    (value, count), = make_loss(Loss()).values()
    whole = torch.tensor(x, requires_grad=True); value(whole, torch.tensor(t)).backward()
    parts = torch.tensor(x, requires_grad=True); n = count(torch.tensor(t)).clamp(min=1)
    for s in (slice(0, cut), slice(cut, None)): (value(parts[s], torch.tensor(t[s]))*count(torch.tensor(t[s]))/n).backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-4, atol=1e-7)

@every
def test_false_positives_have_a_gradient(f):
    "A batch of background full of false alarms is pushed down everywhere"
    assert (run(np.full(shape, 5, np.float32), np.zeros(shape, np.float32), f)[1] > 0).all()

@every
def test_false_positives_have_a_gradient_over_full_tiles(f):
    x = torch.full((4, 1, 512, 512), 3., requires_grad=True); f(x, torch.zeros(4, 512, 512)).backward()
    assert (x.grad > 0).all()

@every
@settings(deadline=None)
@given(x=logits, y=hard)
def test_a_step_downhill_helps(f, x, y):
    "Towards the labels, every loss falls or stays"
    assert f(torch.tensor(x + (2*y - 1)), torch.tensor(y)) <= f(torch.tensor(x), torch.tensor(y)) + 1e-6

@settings(deadline=None)
@given(logits, soft, st.lists(st.sampled_from(['focal', 'cross_entropy', 'tversky', 'dice']), min_size=1, unique=True), st.sampled_from(['linear', 'sqrt', 'log']), st.floats(1, 1e4))
def test_any_parts_by_config(x, t, names, balance, ratio):
    "Each part of a configured loss is the function of that name, with the config's parameters"
    cfg = Loss(parts=names, balance=balance, gamma=3, alpha=.5, tversky_alpha=.2, tversky_beta=.8, smooth=2)
    x, t = torch.tensor(x), torch.tensor(t)
    expected = dict(focal=focal(x, t, 3, .5), cross_entropy=cross_entropy(x, t, class_weight(ratio, balance)), tversky=tversky(x, t, .2, .8, 2), dice=tversky(x, t, .5, .5, 2))
    assert {n: f(x, t).item() for n, (f, _) in make_loss(cfg, ratio).items()} == {n: expected[n].item() for n in names}
    assert {n: f(x, t) for n, (f, _) in make_loss(Loss(class_ratio=7.), ratio).items()} == {'focal': focal(x, t)}

@every
@pytest.mark.parametrize('logits', [(2, 2, 8, 8), (2, 8, 4), (3, 1, 8, 8)])
def test_shapes_that_do_not_fit(f, logits):
    with pytest.raises(ValueError, match='do not fit'): f(torch.zeros(logits), torch.zeros(2, 8, 8))
