"Models: architectures, sources of weights and their errors, fusion, recomputation, both phases of training, the probe"
import copy
import json
import re
import socket
import urllib.request
import zlib
from collections import Counter

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader

import rtsseg.check
from rtsseg.check import measure_steps, probe, show_probe
from rtsseg.config import ConfigError, LoopConfig, Model, RtsConfig
from rtsseg.distil import Distillation, load_teacher
from rtsseg.infer import load_model, predict_logits, save_model
from rtsseg.loop import fit
from rtsseg.models import LateFusion, build, check_size, parts
from rtsseg.prepare import prepare, statistics
from rtsseg.pretrained import ARCHITECTURES, find_weights, pretrained_stats
from rtsseg.schedule import WeightAverage
from rtsseg.segment import SegmentTask
from rtsseg.stats import Stats

ENCODER = {'segformer': 'mit_b0', 'dpt': 'tu-vit_tiny_patch16_224'}

def small_model(architecture, **settings):
    "A model of random weights with the smallest encoder that the architecture takes"
    options = dict(dynamic_img_size=True) if architecture == 'dpt' else {}
    encoder = ENCODER.get(architecture, 'resnet18')
    return Model(architecture=architecture, encoder=encoder, weights=None, options=options, **settings)

def changed(cfg, **changes):
    return cfg.model_copy(update=changes)

def build_seeded(cfg, seed):
    torch.manual_seed(seed)
    return build(cfg)

def directory(path, cfg, seed=0):
    "The model of a seed, whose weights a model directory holds"
    model = build_seeded(cfg, seed).eval()
    path.mkdir()
    save_file(model.state_dict(), path/'model.safetensors')
    return model

def copies(model):
    return {key: value.clone() for key, value in model.state_dict().items()}

def parameter_ids(*modules):
    return {id(p) for module in modules for p in module.parameters()}

def raising(error):
    "A function that raises an error, for any arguments"
    def function(*_, **__):
        raise error
    return function

@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_every_architecture_gives_a_logit_a_pixel(architecture):
    model = build(small_model(architecture, in_channels=4)).eval()
    check_size(model, 128)
    with torch.no_grad():
        out = model(torch.randn(2, 4, 128, 128))
    assert out.shape == (2, 1, 128, 128)
    assert out.isfinite().all()
    assert out.std() > 0
    both = parts(model)
    assert parameter_ids(*both['encoder'], *both['decoder']) == parameter_ids(model)

def head_inputs(model, x, n):
    "What the segmentation head reads, over n passes"
    seen = []
    hook = model.segmentation_head.register_forward_hook(lambda head, inputs, out: seen.append(inputs[0]))
    with torch.no_grad():
        for _ in range(n):
            model(x)
    hook.remove()
    return torch.stack(seen)

@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_dropout_works_in_training_alone(architecture):
    "Whole channels at its share, the others scaled up; evaluation and the weights are those of a model without it"
    cfg, x = small_model(architecture), torch.randn(2, 3, 128, 128)
    plain, dropping = build_seeded(cfg, 0), build_seeded(changed(cfg, dropout=.25), 0)
    assert [*dropping.state_dict()] == [*plain.state_dict()]
    dropping.load_state_dict(plain.state_dict())
    assert (dropping.eval()(x) == plain.eval()(x)).all()

    whole = head_inputs(plain, x, 1)
    # the decoder stays in evaluation mode, so that only the dropout differs
    dropping.segmentation_head.train()
    seen = head_inputs(copy.deepcopy(dropping), x, 5)
    kept = (seen != 0).any((3, 4)) | (whole == 0).all((3, 4))
    expected = torch.where(kept[..., None, None], whole/.75, 0)
    torch.testing.assert_close(seen, expected)
    alive = (whole != 0).any((3, 4)).expand(kept.shape)
    share = 1 - kept[alive].float().mean()
    assert abs(share - .25) < 4*(.25*.75/alive.sum())**.5

def test_without_dropout_no_random_number_is_drawn():
    model = build(small_model('unet')).train()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert (torch.get_rng_state() == before).all()
    assert not model.segmentation_head._forward_pre_hooks

def test_late_fusion_has_dropout_too():
    cfg = small_model('unet', in_channels=4, fusion='late', dropout=.5)
    model = build(cfg).train()
    model.encoder.eval()
    x = torch.randn(1, 4, 64, 64)
    assert (head_inputs(model, x, 8) == 0).all((3, 4)).any()

def test_a_decoder_that_pools_more_needs_larger_tiles():
    with pytest.raises(ConfigError, match='too small'):
        check_size(build(small_model('pan', in_channels=4)).eval(), 64)

EARLY = [
    ('unet', 'resnet18'),
    ('unetplusplus', 'efficientnet-b0'),
    ('segformer', 'mit_b0'),
    ('fpn', 'mobileone_s0'),
    ('linknet', 'densenet121'),
    ('deeplabv3plus', 'tu-resnet18'),
    ('upernet', 'tu-convnext_atto'),
    ('dpt', 'tu-vit_tiny_patch16_224'),
]

@pytest.mark.parametrize('architecture, encoder', EARLY)
def test_extra_channels_start_at_zero(architecture, encoder, tmp_path):
    "With pretrained weights and two EXTRA bands, the first output is the RGB model's, bit by bit"
    cfg = changed(small_model(architecture), encoder=encoder)
    save_file(build_seeded(cfg, 0).state_dict(), tmp_path/'model.safetensors')
    cfg = changed(cfg, weights=str(tmp_path/'model.safetensors'))
    rgb = build_seeded(cfg, 1).eval()
    five = build_seeded(changed(cfg, in_channels=5), 1).eval()
    x = torch.randn(2, 5, 64, 64)
    with torch.no_grad():
        assert torch.equal(five(x), rgb(x[:, :3].contiguous()))

def test_random_weights_use_every_channel():
    stem = build(small_model('unet', in_channels=4)).encoder.conv1.weight
    assert stem.shape[1] == 4
    assert (stem.std((0, 2, 3)) > 0).all()

def test_a_model_of_four_channels_hands_its_stem_on(tmp_path):
    file = tmp_path/'m.safetensors'
    first = build(small_model('unet', in_channels=4))
    save_file(first.state_dict(), file)
    second = build(changed(small_model('fpn', in_channels=4), weights=str(file)))
    expected = first.encoder.state_dict()
    for key, value in second.encoder.state_dict().items():
        assert torch.equal(value, expected[key])
    with pytest.raises(ConfigError, match='conv1.weight'):
        build(changed(small_model('fpn'), weights=str(file)))

def test_timm_file_is_held_against_the_whole_model(tmp_path):
    net = timm.create_model('resnet18').eval()
    file = tmp_path/'net.pt'
    cfg = Model(architecture='unet', encoder='tu-resnet18', weights=str(file))
    torch.save(dict(state_dict=net.state_dict()), file)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(build(cfg).eval().encoder(x)[-1], net.forward_features(x))
    torch.save(timm.create_model('resnet34').state_dict(), file)
    with pytest.raises(ConfigError, match=r'layer1\.2\.conv1\.weight'):
        build(cfg)

@pytest.mark.parametrize('content', [b'', b'x' * 100])
def test_broken_files(content, tmp_path):
    file = tmp_path/'w.safetensors'
    file.write_bytes(content)
    with pytest.raises(ConfigError, match='cannot be read'):
        build(changed(small_model('unet'), weights=str(file)))

def test_a_file_without_tensors(tmp_path):
    file = tmp_path/'w.pt'
    torch.save(dict(epoch=3), file)
    with pytest.raises(ConfigError, match='no table of tensors'):
        build(changed(small_model('unet'), weights=str(file)))

REPOSITORIES = [
    # 'imagenet' is timm's default tag, which can change with timm
    ('tu-resnet18', 'imagenet', timm.get_pretrained_cfg('resnet18').hf_hub_id),
    ('tu-resnet18', 'a1_in1k', 'timm/resnet18.a1_in1k'),
    ('tu-resnet18.fb_swsl_ig1b_ft_in1k', 'imagenet', 'timm/resnet18.fb_swsl_ig1b_ft_in1k'),
    ('resnet18', 'ssl', 'smp-hub/resnet18.ssl'),
]

@pytest.fixture
def empty_cache(monkeypatch):
    monkeypatch.setattr('rtsseg.pretrained.try_to_load_from_cache', lambda *_, **__: None)

@pytest.mark.parametrize('encoder, weights, repository', REPOSITORIES)
def test_names_of_weights(encoder, weights, repository, empty_cache, monkeypatch):
    "The error names the source"
    monkeypatch.setattr('urllib.request.urlopen', raising(OSError('no network')))
    with pytest.raises(ConfigError) as e:
        find_weights(Model(encoder=encoder, weights=weights))
    assert repository in str(e.value)
    assert 'null for random weights' in str(e.value)

@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    "The folder in which the hub's cache keeps smp's ImageNet weights of a ResNet-18; the network is not reachable"
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setattr('urllib.request.urlopen', raising(OSError('no network')))
    source = smp.encoders.encoders['resnet18']['pretrained_settings']['imagenet']
    repository = 'models--' + source['repo_id'].replace('/', '--')
    folder = tmp_path/'hub'/repository/'snapshots'/source['revision']
    folder.mkdir(parents=True)
    return folder

def test_weights_by_name_come_from_the_cache(snapshot):
    torch.manual_seed(3)
    expected = smp.encoders.get_encoder('resnet18', weights=None).state_dict()
    classifier = {'fc.weight': torch.zeros(1000, 512), 'fc.bias': torch.zeros(1000)}
    save_file(expected | classifier, snapshot/'model.safetensors')
    found = build(Model(architecture='unet', encoder='resnet18')).encoder.state_dict()
    for key, value in expected.items():
        assert torch.equal(value, found[key])

def count_connections(server):
    "Connections that wait to be accepted"
    server.setblocking(False)
    found = 0
    while True:
        try:
            server.accept()[0].close()
        except BlockingIOError:
            return found
        found += 1

def test_a_hub_that_never_answers_is_a_quick_clear_error(empty_cache, monkeypatch):
    "It is asked once, and given five seconds"
    timeouts = []
    urlopen = urllib.request.urlopen
    def watched(url, timeout):
        timeouts.append(timeout)
        return urlopen(url, timeout=timeout)
    monkeypatch.setattr('urllib.request.urlopen', watched)
    monkeypatch.setattr('rtsseg.pretrained.is_offline_mode', lambda: False)
    # this server listens and never answers
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        server.listen()
        monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', f'http://127.0.0.1:{server.getsockname()[1]}')
        with pytest.raises(ConfigError) as e:
            build(Model())
        assert count_connections(server) == 1
    assert timeouts == [5]
    for word in ("'imagenet'", 'efficientnet-b5', 'smp-hub/efficientnet-b5.imagenet', 'model.weights'):
        assert word in str(e.value)

def test_a_hub_that_is_switched_off_is_not_asked(empty_cache, monkeypatch):
    monkeypatch.setattr('rtsseg.pretrained.is_offline_mode', lambda: True)
    monkeypatch.setattr('urllib.request.urlopen', None)
    with pytest.raises(ConfigError, match='HF_HUB_OFFLINE'):
        find_weights(Model())

def test_one_step_trains_both_parts_and_the_new_band(tmp_path):
    directory(tmp_path/'model', small_model('unet'))
    model = build(changed(small_model('unet', in_channels=4), weights=str(tmp_path/'model'/'model.safetensors')))
    before = copies(model)
    x = torch.randn(4, 4, 64, 64)
    y = (x[:, 3:] > 0).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=.1)
    first = binary_cross_entropy_with_logits(model(x), y)
    first.backward()
    optimizer.step()
    assert binary_cross_entropy_with_logits(model(x), y) < first
    moved = {id(p) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    for modules in parts(model).values():
        assert moved & parameter_ids(*modules)
    assert model.encoder.conv1.weight[:, 3].any()

@pytest.fixture(scope='module')
def plusplus():
    return build(small_model('unetplusplus'))

@pytest.mark.parametrize('size', [64, (32, 96)])
def test_sizes(size, plusplus):
    "A check of the size changes nothing in the model"
    before = copies(plusplus)
    check_size(plusplus, size)
    for key, value in plusplus.state_dict().items():
        assert not value.is_meta
        assert torch.equal(value, before[key])

@pytest.mark.parametrize('size', [100, (64, 65)])
def test_sizes_that_do_not_fit(size, plusplus):
    with pytest.raises(ConfigError, match='data.tile_size'):
        check_size(plusplus, size)

def test_a_size_that_comes_back_smaller():
    model = build(changed(small_model('fpn'), options=dict(upsampling=2)))
    with pytest.raises(ConfigError, match='come back as'):
        check_size(model, 64)

# ------------------------------------------------ both phases, in the loop itself
class Seen(Exception):
    "Ends a run after its second step"

def digest(modules):
    "A number for each parameter and buffer, which changes when a bit does"
    tensors = [t for module in modules for t in [*module.parameters(), *module.buffers()]]
    return [zlib.crc32(t.detach().contiguous().flatten().view(torch.uint8).numpy()) for t in tensors]

def digests(model):
    return {part: digest(modules) for part, modules in parts(model).items()}

class Watch:
    "A callback that keeps the rates and the digests of the parts after each step"
    def __init__(self, model):
        self.model = model
        self.rates = []
        self.digests = [digests(model)]

    def on_step(self, run):
        groups = run.optimizer.param_groups
        # every parameter is in one group, once
        grouped = Counter(id(p) for group in groups for p in group['params'])
        assert grouped == Counter(id(p) for p in self.model.parameters())
        self.rates.append({group['name']: group['lr'] for group in groups})
        self.digests.append(digests(self.model))
        if len(self.rates) == 2:
            raise Seen

def two_steps(model, folder, channels=3):
    "One step with a frozen encoder, then one with all of the model"
    size = 64
    cfg = RtsConfig(epochs=2, freeze_backbone_epochs=1, val_frequency=2, batch_size=2, ema=dict(enabled=False),
                    device='cpu', data=dict(tile_size=size), lr=dict(warmup_epochs=0))
    target = (torch.rand(size, size) < .3).float()
    tile = dict(image=torch.randn(channels, size, size), target=target, tile=0)
    feed = DataLoader([tile, tile], batch_size=2)
    watch = Watch(model)
    with pytest.raises(Seen):
        fit(cfg, SegmentTask(cfg, None), model, feed, feed, folder, [watch])
    return watch

GUIDE = [
    ('unetplusplus', 'efficientnet-b3'),
    ('unetplusplus', 'efficientnet-b5'),
    pytest.param('unetplusplus', 'efficientnet-b7', marks=pytest.mark.slow),
    ('unetplusplus', 'tu-tf_efficientnet_b3'),
    pytest.param('segformer', 'mit_b5', marks=pytest.mark.slow),
    pytest.param('dpt', 'tu-vit_large_patch16_dinov3.sat493m', marks=pytest.mark.slow),
]

@pytest.mark.parametrize('architecture, encoder', GUIDE)
def test_candidates_of_the_guide_train_in_both_phases(architecture, encoder, tmp_path):
    "Frozen, the encoder keeps every bit, its batch-norm statistics too; then it learns at its own rate"
    model = build_seeded(Model(architecture=architecture, encoder=encoder, weights=None), 0)
    watch = two_steps(model, tmp_path)
    frozen, full = watch.rates
    assert frozen == dict(encoder=0, decoder=1e-3)
    assert full == pytest.approx(dict(encoder=1e-5, decoder=1e-4))
    start, between, end = watch.digests
    assert between['encoder'] == start['encoder']
    assert between['decoder'] != start['decoder']
    assert end['encoder'] != between['encoder']
    assert end['decoder'] != between['decoder']

# ------------------------------------------------ gradient checkpointing
def kept_bytes(net, x):
    "Bytes that a forward pass keeps for the backward pass, and the output"
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    sizes = {}
    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = net(x)
    return sum(size for pointer, size in sizes.items() if pointer not in own), out

BLOCKS = [
    ('unet', 'resnet18'),
    ('segformer', 'mit_b0'),
    ('unetplusplus', 'efficientnet-b0'),
    ('fpn', 'densenet121'),
    ('fpn', 'mobileone_s0'),
    ('fpn', 'dpn68'),
    ('unet', 'tu-convnext_atto'),
    ('fpn', 'tu-regnety_002'),
    ('unet', 'tu-tf_efficientnet_b0'),
    ('dpt', 'tu-vit_tiny_patch16_224'),
]

def after_two_passes(cfg, x, half):
    "Bytes that are kept, and all that two passes change: output, gradients, statistics, the next random number"
    net = build_seeded(cfg, 0).train()
    for _ in range(2):
        with torch.autocast('cpu', torch.bfloat16, enabled=half):
            size, out = kept_bytes(net, x)
        out.float().square().mean().backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    return size, [out, torch.rand(1), *net.buffers(), *gradients]

def check_recomputation(architecture, encoder, half):
    cfg = changed(small_model(architecture), encoder=encoder)
    if architecture == 'dpt':
        cfg = changed(cfg, options=cfg.options | dict(drop_path_rate=.3))
    x = torch.randn(2, 3, 64, 64)
    more, expected = after_two_passes(cfg, x, half)
    less, found = after_two_passes(changed(cfg, gradient_checkpointing=True), x, half)
    assert less < more
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

@pytest.mark.parametrize('architecture, encoder', BLOCKS)
def test_recomputation_changes_memory_only(architecture, encoder):
    "Output, gradients, dropout, drop-connect and batch-norm are equal bit by bit, for fewer bytes"
    check_recomputation(architecture, encoder, half=False)

@pytest.mark.parametrize('architecture, encoder', BLOCKS[:2])
def test_recomputation_changes_memory_only_in_half_precision(architecture, encoder):
    check_recomputation(architecture, encoder, half=True)

RECOMPUTING = Model(architecture='unet', encoder='resnet18', weights=None, gradient_checkpointing=True)

def count_calls(encoder):
    "A counter of the forward passes of each convolution, by name"
    calls = Counter()
    def counting(name):
        return lambda *_: calls.update([name])
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(counting(name))
    return calls

def test_frozen_encoders_compute_once():
    net = build(RECOMPUTING).train()
    calls = count_calls(net.encoder)
    x = torch.randn(2, 3, 64, 64)
    net(x).sum().backward()
    assert calls['layer1.0.conv1'] == 2
    assert calls['conv1'] == 1
    calls.clear()
    net.encoder.eval().requires_grad_(False)
    net(x).sum().backward()
    assert set(calls.values()) == {1}
    calls.clear()
    net.eval()
    with torch.no_grad():
        net(x)
    assert set(calls.values()) == {1}

def test_the_average_of_a_recomputing_model_has_weights_of_its_own():
    net = build(RECOMPUTING).eval()
    average = WeightAverage(net, .9).module
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = net(x)
        assert torch.equal(average(x), before)
        for p in net.parameters():
            p.mul_(2)
        assert torch.equal(average(x), before)
        assert not torch.equal(net(x), before)
    check_size(net, 64)

@pytest.mark.parametrize('settings', [dict(encoder='vgg11'),
                                      dict(extra_encoder='vgg11', fusion='late', in_channels=4)])
def test_an_encoder_without_blocks_cannot_be_recomputed(settings):
    with pytest.raises(ConfigError, match='gradient_checkpointing: vgg11 has no blocks'):
        build(changed(RECOMPUTING, **settings))

# ------------------------------------------------ late fusion
LATE = [
    ('unet', 'resnet18', None),
    ('unetplusplus', 'efficientnet-b0', 'resnet18'),
    ('segformer', 'mit_b0', 'resnet18'),
    ('segformer', 'mit_b0', None),
    ('fpn', 'tu-convnext_atto', 'mobilenet_v2'),
    ('linknet', 'vgg11', 'resnet18'),
    ('deeplabv3plus', 'resnet18', 'tu-resnet18'),
    ('manet', 'resnet18', None),
    ('pspnet', 'resnet18', None),
    ('upernet', 'tu-convnext_atto', None),
]

@pytest.mark.parametrize('architecture, encoder, extra', LATE)
def test_late_fusion_starts_as_the_rgb_model(architecture, encoder, extra):
    "Bit by bit, in evaluation and in training mode; its keys include those of the RGB model"
    cfg = Model(architecture=architecture, encoder=encoder, weights=None)
    rgb = build_seeded(cfg, 0)
    late = build_seeded(changed(cfg, fusion='late', extra_encoder=extra, in_channels=5), 0)
    assert isinstance(late, LateFusion)
    assert set(rgb.state_dict()) < set(late.state_dict())
    check_size(late, 64)
    x = torch.randn(2, 5, 64, 64)
    for training in (True, False):
        with torch.no_grad():
            torch.manual_seed(1)
            expected = rgb.train(training)(x[:, :3].contiguous())
            torch.manual_seed(1)
            assert torch.equal(late.train(training)(x), expected)
    both = parts(late)
    encoder_ids = parameter_ids(*both['encoder'])
    decoder_ids = parameter_ids(*both['decoder'])
    assert encoder_ids == parameter_ids(late.encoder)
    assert encoder_ids | decoder_ids == parameter_ids(late)
    assert not encoder_ids & decoder_ids

@pytest.fixture
def pretrained_late(tmp_path):
    "A model of late fusion with a pretrained encoder, which recomputes"
    directory(tmp_path/'model', small_model('unet'))
    cfg = small_model('unet', fusion='late', in_channels=4, gradient_checkpointing=True)
    return build(changed(cfg, weights=str(tmp_path/'model'/'model.safetensors')))

def test_two_steps_move_joins_and_the_extra_encoder(pretrained_late, tmp_path):
    before = copies(pretrained_late)
    two_steps(pretrained_late, tmp_path, channels=4)
    moved = {key for key, value in pretrained_late.state_dict().items() if not torch.equal(value, before[key])}
    assert {f'joins.{i}.weight' for i in range(1, 6)} <= moved
    extra = pretrained_late.extra_encoder.named_parameters(prefix='extra_encoder')
    assert {name for name, _ in extra} <= moved

def test_late_fusion_learns_while_the_pretrained_encoder_is_frozen(pretrained_late):
    "It learns what the EXTRA bands say without a change of the encoder of RGB"
    before = copy.deepcopy(pretrained_late.encoder.state_dict())
    pretrained_late.encoder.eval().requires_grad_(False)
    trained = [p for p in pretrained_late.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, LoopConfig().lr.frozen_lr)
    x = torch.randn(4, 4, 64, 64)
    y = (x[:, 3:] > 0).float()
    losses = []
    for _ in range(12):
        loss = binary_cross_entropy_with_logits(pretrained_late(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < .9 * losses[0]
    for key, value in pretrained_late.encoder.state_dict().items():
        assert torch.equal(value, before[key])

NOT_FUSED = [
    (dict(architecture='unet', encoder='resnet18', extra_encoder='mit_b0'),
     'resnet18 has features at half size, which mit_b0 has not'),
    (dict(architecture='dpt', encoder='tu-vit_tiny_patch16_224', extra_encoder='resnet18'),
     "'tu-vit_tiny_patch16_224' has no features at several scales to join with those of 'resnet18'"),
    (dict(encoder='resnet18', extra_encoder='resnet19'), 'model.extra_encoder'),
]

@pytest.mark.parametrize('names, message', NOT_FUSED)
def test_what_cannot_be_fused_late(names, message):
    with pytest.raises(ConfigError, match=message):
        build(Model(fusion='late', in_channels=4, weights=None, **names))

def test_a_model_directory_of_late_fusion_loads(tmp_path):
    settings = dict(architecture='unet', encoder='resnet18', extra_encoder='mobilenet_v2', weights=None, fusion='late',
                    in_channels=4, gradient_checkpointing=True)
    cfg = RtsConfig(data=dict(extra_bands=['ndvi']), model=settings)
    stats = Stats(['R', 'G', 'B', 'ndvi'], 'uint8', 255., [.3] * 4, [.1] * 4, 100, 'abc')
    model = build(cfg.model).to(memory_format=torch.channels_last).eval()
    for join in model.joins.values():
        nn.init.normal_(join.weight, std=.1)
    save_model(tmp_path/'model', model, cfg, stats, dict(epoch=1, value=.5, metrics={}), {})
    loaded = load_model(tmp_path/'model').model
    x = torch.randn(1, 4, 64, 64)
    with torch.no_grad():
        assert torch.equal(predict_logits(loaded, x), predict_logits(model, x))
    assert 'resnet18 (EXTRA bands: mobilenet_v2, fused late)' in (tmp_path/'model'/'README.md').read_text()

# ------------------------------------------------ the model directory of another run
CONTINUED = [('unetplusplus', 'efficientnet-b0'), ('segformer', 'mit_b0'), ('fpn', 'tu-regnety_002')]

@pytest.mark.parametrize('architecture, encoder', CONTINUED)
def test_a_model_directory_starts_another_model(architecture, encoder, tmp_path):
    "Encoder and decoder are loaded; what the new model has beyond the old one starts at zero"
    cfg = Model(architecture=architecture, encoder=encoder, weights=None)
    old = directory(tmp_path/'model', cfg)
    cfg = changed(cfg, weights=str(tmp_path/'model'))
    x = torch.randn(2, 6, 64, 64)
    for changes in (dict(in_channels=3), dict(in_channels=5), dict(in_channels=6, fusion='late')):
        new = build(changed(cfg, **changes)).eval()
        with torch.no_grad():
            assert torch.equal(new(x[:, :changes['in_channels']]), old(x[:, :3].contiguous()))

def test_a_model_directory_with_more_bands(tmp_path):
    old = directory(tmp_path/'four', small_model('unet', in_channels=4))
    new = build(changed(small_model('unet', in_channels=6), weights=str(tmp_path/'four'))).eval()
    x = torch.randn(2, 6, 64, 64)
    with torch.no_grad():
        assert torch.equal(new(x), old(x[:, :4].contiguous()))

def test_a_model_directory_of_late_fusion_starts_another(tmp_path):
    cfg = small_model('unet', in_channels=4, fusion='late')
    fused = directory(tmp_path/'late', cfg, seed=1)
    nn.init.ones_(fused.joins['1'].weight)
    save_file(fused.state_dict(), tmp_path/'late'/'model.safetensors')
    again = build(changed(cfg, weights=str(tmp_path/'late'))).eval()
    x = torch.randn(2, 4, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), fused(x))

def test_a_model_directory_that_does_not_fit(tmp_path):
    directory(tmp_path/'model', small_model('unet'))
    cfg = changed(small_model('unet'), weights=str(tmp_path/'model'))
    message = r'does not fit unet with resnet18:\n.*size mismatch for decoder\.blocks\.0\.conv1\.0\.weight'
    with pytest.raises(ConfigError, match=message):
        build(changed(cfg, options=dict(decoder_channels=[128, 64, 32, 16, 8])))
    with pytest.raises(ConfigError, match=r'Missing key.*layer1\.2\.conv1'):
        build(changed(cfg, encoder='resnet34'))
    (tmp_path/'model'/'model.safetensors').unlink()
    with pytest.raises(ConfigError, match='no such file: .*model.safetensors'):
        build(cfg)

def test_a_model_directory_of_late_fusion_that_does_not_fit(tmp_path):
    late = dict(fusion='late', in_channels=4)
    directory(tmp_path/'late', small_model('unet', **late))
    cfg = changed(small_model('unet'), weights=str(tmp_path/'late'))
    with pytest.raises(ConfigError, match='Unexpected key.*extra_encoder'):
        build(cfg)
    with pytest.raises(ConfigError, match=r'Missing key.*extra_encoder\.layer1\.2'):
        build(changed(cfg, extra_encoder='resnet34', **late))

# ------------------------------------------------ statistics of pretrained encoders
# the values stand on the model cards: of SAT-493M, of ImageNet, and Inception's
SATELLITE = (.430, .411, .296), (.213, .156, .143)
IMAGENET = (.485, .456, .406), (.229, .224, .225)
INCEPTION = (.5, .5, .5), (.5, .5, .5)
KNOWN = [
    ('tu-vit_large_patch16_dinov3.sat493m', 'imagenet', SATELLITE),
    ('tu-vit_large_patch16_dinov3', 'sat493m', SATELLITE),
    ('tu-vit_large_patch16_dinov3.sat493m', './local.safetensors', SATELLITE),
    ('tu-resnet18', 'imagenet', IMAGENET),
    ('tu-tf_efficientnet_b5', 'ap_in1k', INCEPTION),
]

@pytest.mark.parametrize('encoder, weights, expected', KNOWN)
def test_timm_knows_what_normalised_its_encoders(encoder, weights, expected):
    mean, std = pretrained_stats(Model(encoder=encoder, weights=weights))
    assert mean == pytest.approx(expected[0], abs=1e-3)
    assert std == pytest.approx(expected[1], abs=1e-3)

def test_smp_keeps_its_statistics_beside_the_weights(snapshot):
    "They come from the hub's cache; a local file counts as the encoder's ImageNet weights"
    card = dict(mean=[.1, .2, .3], std=[.4, .5, .6], input_range=[0, 1])
    (snapshot/'config.json').write_text(json.dumps(card))
    for weights in ('imagenet', './mine.pt'):
        assert pretrained_stats(Model(encoder='resnet18', weights=weights)) == (card['mean'], card['std'])

def test_statistics_of_smp_that_are_not_on_this_machine(snapshot):
    "The error says what to do"
    with pytest.raises(ConfigError) as e:
        pretrained_stats(Model(encoder='resnet18', weights='ssl'))
    for word in ('model.normalisation', "'ssl'", 'smp-hub/resnet18.ssl', 'use dataset'):
        assert word in str(e.value)

def test_statistics_that_nobody_knows():
    with pytest.raises(ConfigError, match='model.normalisation: resnet18 .* use dataset'):
        pretrained_stats(Model(encoder='resnet18', weights=None))
    untrained = next(name for name in timm.list_models() if not timm.models.is_model_pretrained(name))
    with pytest.raises(ConfigError, match=f'no statistics of any, for tu-{untrained}'):
        pretrained_stats(Model(encoder=f'tu-{untrained}'))

def test_pretrained_statistics_reach_the_tiles(tiny_world, tmp_path):
    "R, G and B from the encoder, EXTRA bands from the training split; a model directory provides its own"
    def config(**model):
        data = dict(manifest=tiny_world, tile_size=64, extra_bands=['ndvi'], split_check='warn')
        model = dict(architecture='unet', encoder='tu-resnet18', in_channels=4) | model
        return RtsConfig(runs=tmp_path/'runs', data=data, model=model)
    manifest = prepare(config())
    own = statistics(config(), manifest)
    pretrained = statistics(config(normalisation='pretrained'), manifest)
    assert (pretrained.mean[:3], pretrained.std[:3]) == tuple(list(values) for values in IMAGENET)
    assert own.mean[:3] != pretrained.mean[:3]
    assert pretrained.mean[3:] == own.mean[3:]
    assert pretrained.std[3:] == own.std[3:]
    assert pretrained.scale == own.scale
    assert statistics(config(normalisation='pretrained'), manifest) == pretrained
    own.save(tmp_path/'model'/'normalization_stats.json')
    assert statistics(config(normalisation='pretrained', weights=str(tmp_path/'model')), manifest) == own

# ------------------------------------------------ the batch that fits
def small_run(**settings):
    model = dict(architecture='unet', encoder='resnet18', weights=None)
    return RtsConfig(batch_size=6, device='cpu', data=dict(tile_size=64), model=model, **settings)

OUT_OF_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

def test_the_probe_finds_the_largest_batch(monkeypatch):
    "Down by a tenth at a time from where it starts, past every size that runs out of memory"
    tried = []
    def steps(cfg, batch):
        tried.append(batch)
        if batch > 41:
            raise OUT_OF_MEMORY
        return dict(parameters=0, gradients=0, optimizer=0, average=0, activations=10 * batch)
    monkeypatch.setattr(rtsseg.check, 'measure_steps', steps)
    cfg = changed(small_run(), batch_size=64)
    found = probe(cfg)
    assert tried == [2, 64, 57, 51, 45, 40]
    assert found['batch_size'] == 40
    assert found['activations'] == 10
    assert 'batch_size: 40 ' in show_probe(found, cfg)

def test_the_probe_finds_no_batch(monkeypatch):
    monkeypatch.setattr(rtsseg.check, 'measure_steps', raising(OUT_OF_MEMORY))
    with pytest.raises(ConfigError, match='not even one tile of 64 pixels'):
        probe(small_run())

def test_the_probe_passes_other_errors_on(monkeypatch):
    monkeypatch.setattr(rtsseg.check, 'measure_steps', raising(RuntimeError('something else')))
    with pytest.raises(RuntimeError, match='something else'):
        probe(small_run())

def test_the_probe_takes_steps_of_the_run():
    "All parts train, the average is kept, micro-batches are those of the config; without EMA nothing is averaged"
    averaged = measure_steps(small_run(), 2)
    plain = measure_steps(small_run(ema=dict(enabled=False), accumulate=2), 2)
    # float32
    size = 4 * sum(p.numel() for p in build(small_run().model).parameters())
    assert averaged['parameters'] == averaged['gradients'] == plain['parameters'] == size
    # AdamW keeps two moments, and a step count for each parameter
    assert 2 * size < averaged['optimizer'] < 2.001 * size
    assert averaged['average'] >= size
    assert plain['average'] == 0
    assert measure_steps(small_run(), 4)['activations'] == pytest.approx(2 * averaged['activations'], rel=.01)

# ------------------------------------------------ checkpoints of others

MIT = Model(architecture='segformer', encoder='mit_b0', weights=None)

def of_transformers(name, tensor):
    "A tensor of smp's Mix Transformer as transformers names it: {name: tensor}"
    stage, rest = re.fullmatch(r'(?:patch_embed|block|norm)([1-4])[.](.+)', name).groups()
    place = f'segformer.encoder.{{}}.{int(stage) - 1}'
    if name.startswith('patch_embed'):
        return {f'{place.format("patch_embeddings")}.{rest.replace("norm", "layer_norm")}': tensor}
    if name.startswith('norm'):
        return {f'{place.format("layer_norm")}.{rest}': tensor}
    block = place.format('block')
    if '.attn.kv.' in name:
        number, kind = rest.split('.')[0], rest.split('.')[-1]
        halves = zip(('key', 'value'), tensor.chunk(2), strict=True)
        return {f'{block}.{number}.attention.self.{half}.{kind}': part for half, part in halves}
    for ours, theirs in (('attn.norm', 'attention.self.layer_norm'), ('norm1', 'layer_norm_1'),
                         ('norm2', 'layer_norm_2'), ('attn.q', 'attention.self.query'),
                         ('attn.sr', 'attention.self.sr'), ('attn.proj', 'attention.output.dense'),
                         ('mlp.fc', 'mlp.dense')):
        rest = rest.replace(ours, theirs)
    return {f'{block}.{rest}': tensor}

def saved_as(layout, encoder):
    "The tensors of an encoder in a checkpoint of another project, with a decoder beside them"
    state = encoder.state_dict()
    if layout == 'transformers':
        state = {key: part for name, tensor in state.items() for key, part in of_transformers(name, tensor).items()}
        return state | {'decode_head.classifier.weight': torch.zeros(7, 256, 1, 1)}
    prefix = dict(segmentation='backbone.', wrapped='module.net.encoder.', bare='')[layout]
    others = {} if layout == 'bare' else {'decode_head.conv_seg.weight': torch.zeros(7, 256, 1, 1)}
    return {f'{prefix}{name}': tensor for name, tensor in state.items()} | others

@pytest.mark.parametrize('layout', ['segmentation', 'wrapped', 'bare', 'transformers'])
def test_a_mix_transformer_from_another_project(layout, tmp_path, caplog):
    trained = build(MIT).encoder
    torch.save(dict(state_dict=saved_as(layout, trained)), tmp_path/'their.pt')
    with caplog.at_level('INFO', logger='rtsseg'):
        found = build(changed(MIT, weights=str(tmp_path/'their.pt'))).encoder.state_dict()
    for name, tensor in trained.state_dict().items():
        assert torch.equal(found[name], tensor), name

def test_what_does_not_fit_is_listed(tmp_path):
    "Names that are missing, and shapes that differ"
    state = saved_as('segmentation', build(MIT).encoder)
    del state['backbone.norm1.bias']
    state['backbone.norm2.bias'] = torch.zeros(3)
    torch.save(state, tmp_path/'their.pt')
    with pytest.raises(ConfigError) as caught:
        build(changed(MIT, weights=str(tmp_path/'their.pt')))
    assert 'norm1.bias' in str(caught.value) and 'norm2.bias' in str(caught.value)

@pytest.mark.parametrize('layout', ['segmentation', 'bare', 'transformers'])
def test_a_mix_transformer_from_another_project_teaches(layout, tmp_path):
    "A teacher reads checkpoints as a network does that starts from them"
    trained = build(MIT).encoder.eval()
    torch.save(dict(state_dict=saved_as(layout, trained)), tmp_path/'their.pt')
    teacher = load_teacher(Distillation(teacher=str(tmp_path/'their.pt'), encoder='mit_b0'))
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = trained((image - teacher.mean) / teacher.std)[-1]
    assert torch.allclose(teacher(image).features, wanted, atol=1e-5)
