"The five risk models: what is masked changes nothing, risk never falls, each learns; flows of a registration"
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from rtsseg.registration import MammoRegNet, RegNet, affine_flow, resize_flow, then, warp_by
from rtsseg.risk_models import (
    ALIGNED_BY_IMAGES,
    RISK_MODELS,
    RiskModel,
    build_risk,
    cumulative_logits,
    embedding_losses,
    masked_bce,
    normal_distances,
)

TINY = RiskModel(encoder='test_byobnet', num_heads=4, grid=2, max_t=3)
NET = RegNet(width=4, levels=2, heads=2, window=4, size=None)
each_model = pytest.mark.parametrize('name', RISK_MODELS)

def model_of(name, **more):
    torch.manual_seed(0)
    registration = MammoRegNet(NET)
    # a network that moves something, so that masks of flows matter
    torch.nn.init.normal_(registration.flows[0].weight, std=.1)
    return build_risk(TINY.model_copy(update=dict(name=name, **more)), 5, registration)

def exams(n=2, exams=2, side=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(n, exams, 4, 1, side, side, generator=generator)
    gap = 1.5 * torch.arange(exams).float().expand(n, -1)
    return image, torch.ones(n, exams, 4, dtype=torch.bool), gap

masks = st.lists(st.booleans(), min_size=16, max_size=16)

@each_model
@settings(max_examples=4, deadline=None)
@given(masks)
def test_what_is_masked_changes_nothing(name, mask):
    "Not even NaN, in evaluation and in training"
    image, _, gap = exams()
    present = torch.tensor(mask).view(2, 2, 4)
    # a current exam has a view
    present[:, 0, 0] = True
    hidden = torch.where(present[..., None, None, None], image, torch.nan)
    zero = torch.where(present[..., None, None, None], image, 0.)
    for training in (False, True):
        found = []
        for given_image in (hidden, zero):
            model = model_of(name).train(training)
            torch.manual_seed(1)
            found.append(model(given_image, present, gap)['risk'])
        assert torch.equal(*found)
        assert found[0].isfinite().all()

@each_model
def test_risk_never_falls(name):
    model = model_of(name).eval()
    with torch.no_grad():
        risk = model(*exams(n=4))['risk']
    assert risk.shape == (4, 5) and (risk.diff(dim=1) >= 0).all()

@each_model
def test_a_sample_does_not_depend_on_the_others(name):
    "In evaluation"
    model = model_of(name).eval()
    image, present, gap = exams(n=3)
    with torch.no_grad():
        whole = model(image, present, gap)['risk']
        alone = model(image[1:2], present[1:2], gap[1:2])['risk']
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-4, atol=1e-4)

@each_model
def test_each_learns(name):
    "A square in the current image of half of the women"
    image, present, gap = exams(n=8)
    ill = torch.arange(8) % 2 == 0
    image[ill, 0, 0, 0, 8:20, 8:20] += 1.5
    y_seq, y_mask = ill.float()[:, None].expand(-1, 5), torch.ones(8, 5)
    model = model_of(name, dropout=0.)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        loss = masked_bce(model(image, present, gap)['risk'], y_seq, y_mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < .3 * losses[0]

@each_model
def test_a_batch_without_priors_is_one_whose_priors_are_missing(name):
    model = model_of(name).eval()
    image, present, gap = exams()
    present[:, 1], gap = False, torch.zeros_like(gap)
    with torch.no_grad():
        missing = model(image, present, gap)['risk']
        never = model(image[:, :1], present[:, :1], gap[:, :1])['risk']
    torch.testing.assert_close(missing, never, rtol=1e-5, atol=1e-5)

def test_the_asymmetry_is_of_the_same_kind_of_view():
    "Left CC is compared with right CC: exchanging both MLO views of the two breasts changes nothing of CC"
    model = model_of('VMRA-MaR', flip_right=False).eval()
    maps = torch.rand(1, 1, 4, model.channels, 2, 2)
    equal = maps.clone()
    equal[:, :, 2:] = equal[:, :, :2]
    with torch.no_grad():
        found, seen = model.asymmetry(equal, torch.ones(1, 1, 4, dtype=torch.bool))
        # CC left against MLO right would not be zero
        assert found.abs().max() == 0 and bool(seen.all())
        other, _ = model.asymmetry(maps, torch.ones(1, 1, 4, dtype=torch.bool))
    assert other.abs().max() > 0

@pytest.mark.parametrize('name', ALIGNED_BY_IMAGES)
def test_the_registration_stands_still(name):
    "It has no parameters, is saved with the model, and a step moves nothing of it"
    model = model_of(name)
    own = {key: value.clone() for key, value in model.state_dict().items() if key.startswith('registration.')}
    assert own and not any(key.startswith('registration.') for key, _ in model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=.1)
    model(*exams())['risk'].sum().backward()
    optimizer.step()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in own.items())

# ---------------------------------------------------------------- flows

sides = st.integers(5, 12)

@settings(max_examples=20, deadline=None)
@given(sides, sides, st.integers(0, 99))
def test_a_warp_is_that_of_scipy(height, width, seed):
    "On images that are not square: x goes along the width"
    rng = np.random.default_rng(seed)
    image, (dx, dy) = rng.random((height, width)), rng.uniform(-1, 1, (2, height, width))
    rows, columns = np.mgrid[:height, :width].astype(float)
    places = np.clip(rows + dy, 0, height - 1), np.clip(columns + dx, 0, width - 1)
    expected = map_coordinates(image, places, order=1)
    found = warp_by(torch.tensor(image)[None, None].float(), torch.tensor(np.stack([dx, dy]))[None].float())
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-4)

@settings(max_examples=20, deadline=None)
@given(st.floats(-.3, .3), st.floats(-.3, .3), st.sampled_from([(8, 12), (16, 10)]))
def test_a_shift_is_a_shift_on_every_grid(across, down, size):
    "An affine map, its flow, and its flow on another grid"
    maps = torch.tensor([[[1., 0, across], [0, 1, down]]])
    flow = affine_flow(maps, size)
    expected = torch.tensor([across * size[1] / 2, down * size[0] / 2])[None, :, None, None]
    torch.testing.assert_close(flow, expected.expand_as(flow), atol=1e-4, rtol=1e-4)
    larger = 2 * size[0], 3 * size[1]
    torch.testing.assert_close(resize_flow(flow, larger), affine_flow(maps, larger), atol=1e-3, rtol=1e-3)

def test_two_shifts_add_up():
    one, other = (torch.full((1, 2, 6, 6), value) for value in (1., -.5))
    assert torch.equal(then(one, other), torch.full((1, 2, 6, 6), .5))

# ---------------------------------------------------------------- ordinal

@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=6, max_size=6))
def test_cumulative_logits_are_those_of_sums(logits):
    log_p = torch.tensor([logits]).double().log_softmax(1)
    expected = log_p.exp().cumsum(1)[:, :-1]
    torch.testing.assert_close(cumulative_logits(log_p).sigmoid(), expected, atol=1e-9, rtol=1e-6)

@pytest.mark.parametrize('name', ['Wasserstein', 'Bhattacharyya', 'HellingerDistance', 'JDistance'])
def test_a_distance_is_symmetric_and_zero_to_itself(name):
    torch.manual_seed(0)
    found = normal_distances(torch.randn(5, 3), torch.randn(5, 3), name)
    torch.testing.assert_close(found, found.T, atol=1e-4, rtol=1e-4)
    assert found.diagonal().abs().max() < 1e-3
    assert (found + torch.eye(5) > 0).all()

def test_women_who_left_early_take_no_part_in_the_order():
    torch.manual_seed(0)
    out = dict(mean=torch.randn(4, 3), log_var=torch.zeros(4, 3))
    year, known = torch.tensor([0, 2, 5, 5]), torch.tensor([True, True, True, False])
    base = embedding_losses(out, year, known, TINY)[1]
    out['mean'][3] += 50
    assert torch.equal(base, embedding_losses(out, year, known, TINY)[1])
