"Losses: for any logits, targets and parameters"
from functools import partial

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.ops import sigmoid_focal_loss

from rtsseg.config import Loss
from rtsseg.losses import IGNORE, class_weight, cross_entropy, focal, make_loss, tversky

SHAPE = (2, 3, 4)
logits = arrays(np.float32, SHAPE, elements=st.floats(-30, 30, width=32))
saturated = arrays(np.float32, SHAPE, elements=st.floats(-65504, 65504, width=16))
hard = arrays(np.float32, SHAPE, elements=st.sampled_from([0., 1.]))
soft = arrays(np.float32, SHAPE, elements=st.floats(0, 1, width=32))
masks = arrays(bool, SHAPE)
weights = st.floats(0, 1, width=32)
gammas = st.sampled_from([0., .5, 1., 2., 3., 5.])
alphas = st.floats(0, 1)
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])

EVERY = {
    'focal': focal,
    'cross_entropy': partial(cross_entropy, weight=20.),
    'tversky': partial(tversky, alpha=.3, beta=.7),
    'dice': tversky,
    'dice, each image': partial(tversky, per_image=True)
}
every = pytest.mark.parametrize('loss', EVERY.values(), ids=EVERY)


def value_and_grad(x, target, loss=focal, **settings):
    "Value of a loss, and its gradient at the logits, as NumPy"
    x = torch.tensor(x)[:, None].requires_grad_()
    value = loss(x, torch.tensor(target), **settings)
    value.backward()
    return value.item(), x.grad[:, 0].numpy()


def value(x, target, loss=focal, **settings):
    return value_and_grad(x, target, loss, **settings)[0]


def ignore(target, ignored):
    return np.where(ignored, np.float32(IGNORE), target)


@settings(deadline=None)
@given(logits, hard, gammas, alphas)
def test_agrees_with_torchvision(x, y, gamma, alpha):
    theirs = sigmoid_focal_loss(torch.tensor(x), torch.tensor(y), alpha, gamma, 'mean').item()
    np.testing.assert_allclose(value(x, y, gamma=gamma, alpha=alpha), theirs, rtol=1e-4, atol=1e-6)


@settings(deadline=None)
@given(logits, soft, gammas, alphas)
def test_follows_its_formula(x, y, gamma, alpha):
    z, t = x.astype(float), y.astype(float)
    p = 1/(1 + np.exp(-z))
    cross = np.logaddexp(0, z) - t*z
    formula = ((alpha*t + (1 - alpha)*(1 - t))*abs(t - p)**gamma*cross).mean()
    np.testing.assert_allclose(value(x, y, gamma=gamma, alpha=alpha), formula, rtol=1e-3, atol=1e-5)


@settings(deadline=None)
@given(logits, soft, masks, st.floats(1, 1000, width=32))
def test_cross_entropy_agrees_with_torch(x, y, ignored, weight):
    ours = value(x, ignore(y, ignored), cross_entropy, weight=weight)
    theirs = 0
    if not ignored.all():
        valid_x, valid_y = torch.tensor(x[~ignored]), torch.tensor(y[~ignored])
        theirs = binary_cross_entropy_with_logits(valid_x, valid_y, pos_weight=torch.tensor(weight)).item()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@settings(deadline=None)
@given(logits, st.one_of(hard, soft), masks, weights, weights, st.floats(.125, 100, width=32))
def test_tversky_agrees_with_smp(x, y, ignored, alpha, beta, smooth):
    "In smp, α is the guide's β; without a positive pixel smp has no loss at all, so one pixel is positive here"
    y = ignore(y, ignored)
    y[0, 0, 0] = 1
    loss = smp.losses.TverskyLoss('binary', smooth=smooth, alpha=beta, beta=alpha, ignore_index=IGNORE)
    theirs = loss(torch.tensor(x)[:, None], torch.tensor(y)[:, None]).item()
    ours = value(x, y, tversky, alpha=alpha, beta=beta, smooth=smooth)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@settings(deadline=None)
@given(logits, hard, weights, weights)
def test_tversky_of_hard_labels_is_the_product_form(x, y, alpha, beta):
    "Guide 5.2: for hard labels TP is the sum of p·y"
    p = 1/(1 + np.exp(-x.astype(float)))
    tp, fn, fp = (p*y).sum(), ((1 - p)*y).sum(), (p*(1 - y)).sum()
    formula = 1 - (tp + 1)/(tp + alpha*fn + beta*fp + 1)
    np.testing.assert_allclose(value(x, y, tversky, alpha=alpha, beta=beta), formula, rtol=1e-4, atol=1e-6)


@every
@settings(deadline=None)
@given(x=logits, other=logits, y=soft, ignored=masks)
def test_ignored_pixels_do_nothing(loss, x, other, y, ignored):
    target = ignore(y, ignored)
    here, grad = value_and_grad(x, target, loss)
    there, other_grad = value_and_grad(np.where(ignored, other, x), target, loss)
    assert here == there
    assert (grad == other_grad).all()
    assert not grad[ignored].any()
    if ignored.all():
        assert here == 0 and not grad.any()
        return
    if 'per_image' in getattr(loss, 'keywords', {}):
        return
    valid_only = loss(torch.tensor(x[~ignored]), torch.tensor(target[~ignored]))
    np.testing.assert_allclose(here, valid_only, rtol=1e-4, atol=1e-6)


@every
@settings(deadline=None)
@given(x=saturated, y=soft, dtype=dtypes)
def test_finite_however_saturated(loss, x, y, dtype):
    x = torch.tensor(x).to(dtype).requires_grad_()
    value = loss(x, torch.tensor(y))
    grad, = torch.autograd.grad(value, x)
    assert value.dtype == torch.float32
    assert value.isfinite() and value > -1e-6
    assert grad.isfinite().all()


@settings(deadline=None)
@given(saturated, soft, gammas, dtypes)
def test_focal_is_finite_for_any_gamma(x, y, gamma, dtype):
    x = torch.tensor(x).to(dtype).requires_grad_()
    value = focal(x, torch.tensor(y), gamma)
    grad, = torch.autograd.grad(value, x)
    assert value.isfinite() and value >= 0
    assert grad.isfinite().all()


@settings(deadline=None)
@given(logits, soft, masks, st.permutations(range(24)), st.integers(1, 23))
def test_parts_add_up(x, y, ignored, order, cut):
    "Any split into micro-batches, weighted by counts, is the whole batch, in value and in gradient"
    target = torch.tensor(ignore(y, ignored).ravel()[order])
    part = make_loss(Loss())['focal']

    whole = torch.tensor(x.ravel()[order], requires_grad=True)
    part.value(whole, target).backward()

    pieces = torch.tensor(x.ravel()[order], requires_grad=True)
    n = part.count(target).clamp(min=1)
    for batch in (slice(0, cut), slice(cut, None)):
        share = part.count(target[batch])/n
        (part.value(pieces[batch], target[batch])*share).backward()
    torch.testing.assert_close(pieces.grad, whole.grad, rtol=1e-4, atol=1e-7)


@every
def test_false_positives_have_a_gradient(loss):
    "A batch of background full of false alarms is pushed down everywhere"
    false_alarms = np.full(SHAPE, 5, np.float32)
    assert (value_and_grad(false_alarms, np.zeros(SHAPE, np.float32), loss)[1] > 0).all()


@every
def test_false_positives_have_a_gradient_over_full_tiles(loss):
    x = torch.full((4, 1, 512, 512), 3., requires_grad=True)
    loss(x, torch.zeros(4, 512, 512)).backward()
    assert (x.grad > 0).all()


@every
@settings(deadline=None)
@given(x=logits, y=hard)
def test_a_step_downhill_helps(loss, x, y):
    "Towards the labels, every loss falls or stays"
    step = 2*y - 1
    assert loss(torch.tensor(x + step), torch.tensor(y)) <= loss(torch.tensor(x), torch.tensor(y)) + 1e-6


names_of_parts = st.lists(st.sampled_from(['focal', 'cross_entropy', 'tversky', 'dice']), min_size=1, unique=True)


@settings(deadline=None)
@given(logits, soft, names_of_parts, st.sampled_from(['linear', 'sqrt', 'log']), st.floats(1, 1e4))
def test_any_parts_by_config(x, y, names, balance, ratio):
    "Each part of a configured loss is the function of that name, with the config's parameters"
    cfg = Loss(parts=names, balance=balance, gamma=3, alpha=.5, tversky_alpha=.2, tversky_beta=.8, smooth=2)
    x, y = torch.tensor(x), torch.tensor(y)
    expected = dict(
        focal=focal(x, y, 3, .5),
        cross_entropy=cross_entropy(x, y, class_weight(ratio, balance)),
        tversky=tversky(x, y, .2, .8, 2),
        dice=tversky(x, y, .5, .5, 2)
    )
    parts = make_loss(cfg, ratio)
    assert {name: part.value(x, y) for name, part in parts.items()} == {name: expected[name] for name in names}


def test_the_config_can_set_the_class_ratio():
    x, y = torch.zeros(SHAPE), torch.ones(SHAPE)
    cfg = Loss(parts=['cross_entropy'], balance='linear', class_ratio=7.)
    assert make_loss(cfg, ratio=400)['cross_entropy'].value(x, y) == cross_entropy(x, y, 7.)


@every
@pytest.mark.parametrize('shape', [(2, 2, 8, 8), (2, 8, 4), (3, 1, 8, 8)])
def test_shapes_that_do_not_fit(loss, shape):
    with pytest.raises(ValueError, match='do not fit'):
        loss(torch.zeros(shape), torch.zeros(2, 8, 8))
