"Losses: for any logits, targets, γ and α"
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from torchvision.ops import sigmoid_focal_loss

from rtsseg.config import Loss
from rtsseg.losses import focal, make_loss

shape = (2, 3, 4)
logits = arrays(np.float32, shape, elements=st.floats(-30, 30, width=32))
hard, soft = arrays(np.float32, shape, elements=st.sampled_from([0., 1.])), arrays(np.float32, shape, elements=st.floats(0, 1, width=32))
ignored = arrays(bool, shape)
gammas, alphas = st.sampled_from([0., .5, 1., 2., 3., 5.]), st.floats(0, 1)

def run(x, t, **kw):
    x = torch.tensor(x)[:, None].requires_grad_()
    loss = focal(x, torch.tensor(t), **kw); loss.backward()
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
@given(logits, logits, soft, ignored, gammas, alphas)
def test_ignored_pixels_do_nothing(x, other, t, gone, gamma, alpha):
    t = np.where(gone, np.float32(255), t)
    (a, da), (b, db) = run(x, t, gamma=gamma, alpha=alpha), run(np.where(gone, other, x), t, gamma=gamma, alpha=alpha)
    assert a == b and (da == db).all() and not da[gone].any()
    if gone.all(): assert a == 0
    else: np.testing.assert_allclose(a, focal(torch.tensor(x[~gone]), torch.tensor(t[~gone]), gamma, alpha), rtol=1e-5, atol=1e-7)

@settings(deadline=None)
@given(arrays(np.float32, shape, elements=st.floats(-65504, 65504, width=16)), soft, gammas, st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_finite_however_saturated(x, t, gamma, dtype):
    x = torch.tensor(x).to(dtype).requires_grad_()
    loss = focal(x, torch.tensor(t), gamma); grad, = torch.autograd.grad(loss, x)
    assert loss.dtype == torch.float32 and loss.isfinite() and loss >= 0 and grad.isfinite().all()

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

def test_false_positives_have_a_gradient():
    "A batch of background full of false alarms is pushed down everywhere"
    assert (run(np.full(shape, 5, np.float32), np.zeros(shape, np.float32))[1] > 0).all()

@pytest.mark.parametrize('logits', [(2, 2, 8, 8), (2, 8, 4), (3, 1, 8, 8)])
def test_shapes_that_do_not_fit(logits):
    with pytest.raises(ValueError, match='do not fit'): focal(torch.zeros(logits), torch.zeros(2, 8, 8))
