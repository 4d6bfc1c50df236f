"Models: every architecture, every way that weights come in or fail to, fusion, recomputation, the steps of both phases, the probe"
import copy, json, os, socket, subprocess, sys, textwrap, zlib
from collections import Counter
from types import SimpleNamespace

import pytest, segmentation_models_pytorch as smp, timm, torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

import rtsseg.check
from rtsseg.config import RtsConfig, ConfigError, LoopConfig, Model
from rtsseg.stats import Stats
from rtsseg.infer import load_model, predict_logits, save_model
from rtsseg.schedule import WeightAverage
from rtsseg.loop import fit
from rtsseg.pretrained import ARCHITECTURES, find_weights, pretrained_stats
from rtsseg.models import LateFusion, build, check_size, parts
from rtsseg.prepare import prepare, statistics
from rtsseg.segment import SegmentTask
from rtsseg.check import measure_steps, probe, show_probe

ENCODER = {'segformer': 'mit_b0', 'dpt': 'tu-vit_tiny_patch16_224'}

def plain(arch, **kw):
    options = dict(dynamic_img_size=True) if arch == 'dpt' else {}
    return Model(architecture=arch, encoder=ENCODER.get(arch, 'resnet18'), weights=None, options=options, **kw)

@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_every_architecture_gives_a_logit_a_pixel(arch):
    model = build(plain(arch, in_channels=4)).eval()
    check_size(model, 128)
    with torch.no_grad(): out = model(torch.randn(2, 4, 128, 128))
    assert out.shape == (2, 1, 128, 128) and out.isfinite().all() and out.std() > 0
    if arch == 'pan':   # its decoder pools three times more
        with pytest.raises(ConfigError, match='too small'): check_size(model, 64)
    assert {id(p) for ms in parts(model).values() for m in ms for p in m.parameters()} == {id(p) for p in model.parameters()}

@pytest.mark.parametrize('arch, encoder', [('unet', 'resnet18'), ('unetplusplus', 'efficientnet-b0'), ('segformer', 'mit_b0'), ('fpn', 'mobileone_s0'),
                                           ('linknet', 'densenet121'), ('deeplabv3plus', 'tu-resnet18'), ('upernet', 'tu-convnext_atto'), ('dpt', 'tu-vit_tiny_patch16_224')])
def test_extra_channels_start_at_zero(arch, encoder, tmp_path):
    "With pretrained weights and two EXTRA bands, the first output is the RGB model's, bit by bit"
    options = dict(dynamic_img_size=True) if arch == 'dpt' else {}
    cfg = Model(architecture=arch, encoder=encoder, weights=None, options=options); torch.manual_seed(0)
    save_file(build(cfg).state_dict(), tmp_path/'model.safetensors')
    cfg = cfg.model_copy(update=dict(weights=str(tmp_path/'model.safetensors')))
    torch.manual_seed(1); rgb = build(cfg).eval()
    torch.manual_seed(1); five = build(cfg.model_copy(update=dict(in_channels=5))).eval()
    x = torch.randn(2, 5, 64, 64)
    with torch.no_grad(): assert torch.equal(five(x), rgb(x[:, :3].contiguous()))

def test_random_weights_use_every_channel():
    stem = build(plain('unet', in_channels=4)).encoder.conv1.weight
    assert stem.shape[1] == 4 and (stem.std((0, 2, 3)) > 0).all()

def test_a_model_of_four_channels_hands_its_stem_on(tmp_path):
    first = build(plain('unet', in_channels=4)); save_file(first.state_dict(), tmp_path/'m.safetensors')
    second = build(plain('fpn', in_channels=4).model_copy(update=dict(weights=str(tmp_path/'m.safetensors'))))
    assert all(torch.equal(a, b) for a, b in zip(first.encoder.state_dict().values(), second.encoder.state_dict().values()))
    with pytest.raises(ConfigError, match='conv1.weight'): build(plain('fpn').model_copy(update=dict(weights=str(tmp_path/'m.safetensors'))))

def test_timm_file_is_held_against_the_whole_model(tmp_path):
    net = timm.create_model('resnet18').eval(); file = tmp_path/'net.pt'; x = torch.randn(1, 3, 64, 64)
    cfg = Model(architecture='unet', encoder='tu-resnet18', weights=str(file))
    torch.save(dict(state_dict=net.state_dict()), file)
    with torch.no_grad(): assert torch.equal(build(cfg).eval().encoder(x)[-1], net.forward_features(x))
    torch.save(timm.create_model('resnet34').state_dict(), file)
    with pytest.raises(ConfigError, match=r'layer1\.2\.conv1\.weight'): build(cfg)

def test_broken_files(tmp_path):
    file = tmp_path/'w.safetensors'; cfg = plain('unet').model_copy(update=dict(weights=str(file)))
    for content in (b'', b'x'*100):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match='cannot be read'): build(cfg)
    torch.save(dict(epoch=3), tmp_path/'w.pt')
    with pytest.raises(ConfigError, match='no table of tensors'): build(cfg.model_copy(update=dict(weights=str(tmp_path/'w.pt'))))

@pytest.mark.parametrize('encoder, weights, repo', [('tu-resnet18', 'imagenet', None), ('tu-resnet18', 'a1_in1k', 'timm/resnet18.a1_in1k'),
                                                    ('tu-resnet18.fb_swsl_ig1b_ft_in1k', 'imagenet', 'timm/resnet18.fb_swsl_ig1b_ft_in1k'), ('resnet18', 'ssl', 'smp-hub/resnet18.ssl')])
def test_names_of_weights(encoder, weights, repo, monkeypatch):
    "The error names the source; timm's default tag is timm's business"
    monkeypatch.setattr('rtsseg.pretrained.try_to_load_from_cache', lambda *a, **k: None)
    monkeypatch.setattr('urllib.request.urlopen', lambda *a, **k: (_ for _ in ()).throw(OSError('no network')))
    with pytest.raises(ConfigError) as e: find_weights(Model(encoder=encoder, weights=weights))
    assert (repo or timm.get_pretrained_cfg('resnet18').hf_hub_id) in str(e.value) and 'null for random weights' in str(e.value)

def python(code, **env):
    "Run code in a process of its own: the hub reads its settings at import"
    env = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGINGFACE'))} | {k: str(v) for k, v in env.items()}
    return subprocess.run([sys.executable, '-c', textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=120)

def test_weights_by_name_come_from_the_cache(tmp_path):
    source = smp.encoders.encoders['resnet18']['pretrained_settings']['imagenet']
    snapshot = tmp_path/'hub'/('models--' + source['repo_id'].replace('/', '--'))/'snapshots'/source['revision']; snapshot.mkdir(parents=True)
    torch.manual_seed(3); encoder = smp.encoders.get_encoder('resnet18', weights=None)
    save_file(encoder.state_dict() | {'fc.weight': torch.zeros(1000, 512), 'fc.bias': torch.zeros(1000)}, snapshot/'model.safetensors')
    done = python(f'''
        import torch, urllib.request
        urllib.request.urlopen = None   # whoever asks the network fails
        from rtsseg.config import Model
        from rtsseg.models import build
        torch.save(build(Model(architecture='unet', encoder='resnet18')).encoder.state_dict(), {str(tmp_path/'got.pt')!r})''', HF_HOME=tmp_path)
    assert done.returncode == 0, done.stderr
    got = torch.load(tmp_path/'got.pt', weights_only=True)
    assert all(torch.equal(v, got[k]) for k, v in encoder.state_dict().items())

MISSING = '''
    import time
    from rtsseg.config import ConfigError, Model
    from rtsseg.models import build
    start = time.time()
    try: build(Model())
    except ConfigError as e: print(round(time.time() - start, 1), e)'''

def test_a_hub_that_never_answers_is_a_quick_clear_error(tmp_path):
    with socket.socket() as server:   # listens and says nothing
        server.bind(('127.0.0.1', 0)); server.listen()
        done = python(MISSING, HF_HOME=tmp_path, HF_ENDPOINT=f'http://127.0.0.1:{server.getsockname()[1]}')
    seconds, _, text = done.stdout.partition(' ')
    assert float(seconds) < 15, done.stdout + done.stderr
    for word in ("'imagenet'", 'efficientnet-b5', 'smp-hub/efficientnet-b5.imagenet', 'model.weights'): assert word in text, done.stdout + done.stderr

def test_a_hub_that_is_switched_off_is_not_asked(monkeypatch):
    monkeypatch.setattr('rtsseg.pretrained.try_to_load_from_cache', lambda *a, **k: None)
    monkeypatch.setattr('rtsseg.pretrained.is_offline_mode', lambda: True); monkeypatch.setattr('urllib.request.urlopen', None)
    with pytest.raises(ConfigError, match='HF_HUB_OFFLINE'): find_weights(Model())

def test_one_step_trains_both_parts_and_the_new_band(tmp_path):
    torch.manual_seed(0); save_file(build(plain('unet')).state_dict(), tmp_path/'m.safetensors')
    model = build(plain('unet', in_channels=4).model_copy(update=dict(weights=str(tmp_path/'m.safetensors'))))
    x, before = torch.randn(4, 4, 64, 64), {k: v.clone() for k, v in model.named_parameters()}
    y = (x[:, 3:] > 0).float(); loss = lambda: torch.nn.functional.binary_cross_entropy_with_logits(model(x), y)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1); first = loss(); first.backward(); optimizer.step()
    assert loss() < first
    for part in parts(model).values(): assert any(not torch.equal(p, before[k]) for k, p in model.named_parameters() for m in part if any(p is q for q in m.parameters()))
    assert model.encoder.conv1.weight[:, 3].abs().sum() > 0

def test_sizes():
    model = build(plain('unetplusplus'))
    for size in (64, (32, 96)): check_size(model, size)
    for size in (100, (64, 65)):
        with pytest.raises(ConfigError, match='data.tile_size'): check_size(model, size)
    with pytest.raises(ConfigError, match='come back as'): check_size(build(plain('fpn').model_copy(update=dict(options=dict(upsampling=2)))), 64)
    before = {k: v.clone() for k, v in model.state_dict().items()}; check_size(model, 64)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not any(v.is_meta for v in model.state_dict().values())

# ---------------------------------------------------------------- the two phases, taken by the loop itself
class Seen(Exception): pass

def digest(modules):
    "A number for each parameter and buffer: it changes when a bit does"
    return [zlib.crc32(t.detach().contiguous().flatten().view(torch.uint8).numpy()) for m in modules for t in [*m.parameters(), *m.buffers()]]

def two_steps(model, tmp_path, size=64, channels=3):
    "One step with a frozen encoder, one with all of the model: [(rates, digests of the parts)] before, between and after"
    cfg = RtsConfig(epochs=2, freeze_backbone_epochs=1, val_frequency=2, batch_size=2, ema=dict(enabled=False), device='cpu', data=dict(tile_size=size), lr=dict(warmup_epochs=0))
    tile = dict(image=torch.randn(channels, size, size), target=(torch.rand(size, size) < .3).float(), tile=0)
    seen = [({}, {k: digest(ms) for k, ms in parts(model).items()})]
    def on_step(run):
        groups = [p for g in run.optimizer.param_groups for p in g['params']]
        assert Counter(map(id, groups)) == Counter(map(id, model.parameters()))          # every parameter in one group, once
        seen.append(({g['name']: g['lr'] for g in run.optimizer.param_groups}, {k: digest(ms) for k, ms in parts(model).items()}))
        if len(seen) == 3: raise Seen
    feed = DataLoader([tile] * 2, batch_size=2)
    with pytest.raises(Seen): fit(cfg, SegmentTask(cfg, None), model, feed, feed, tmp_path, [SimpleNamespace(on_step=on_step)])
    return seen

GUIDE = [('unetplusplus', 'efficientnet-b3'), ('unetplusplus', 'efficientnet-b5'), ('unetplusplus', 'efficientnet-b7'), ('unetplusplus', 'tu-tf_efficientnet_b3'),
         ('segformer', 'mit_b5'), ('dpt', 'tu-vit_large_patch16_dinov3.sat493m')]

@pytest.mark.parametrize('arch, encoder', GUIDE)
def test_candidates_of_the_guide_train_in_both_phases(arch, encoder, tmp_path):
    "Frozen, the encoder keeps every bit, its batch-norm statistics too; then it learns at its own rate"
    torch.manual_seed(0)
    (_, start), (frozen, between), (full, end) = two_steps(build(Model(architecture=arch, encoder=encoder, weights=None)), tmp_path)
    assert frozen == dict(encoder=0, decoder=1e-3) and full['encoder'] == pytest.approx(full['decoder'] / 10) and full['decoder'] == pytest.approx(1e-4)
    assert between['encoder'] == start['encoder'] and between['decoder'] != start['decoder']
    assert end['encoder'] != between['encoder'] and end['decoder'] != between['decoder']

# ---------------------------------------------------------------- gradient checkpointing
def kept(net, x):
    "Bytes that a forward pass keeps for the backward pass, and the output"
    own, held = {p.untyped_storage().data_ptr() for p in net.parameters()}, {}
    def pack(t): held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(); return t.detach()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): out = net(x)
    return sum(n for k, n in held.items() if k not in own), out

BLOCKS = [('unet', 'resnet18'), ('segformer', 'mit_b0'), ('unetplusplus', 'efficientnet-b0'), ('fpn', 'densenet121'), ('fpn', 'mobileone_s0'), ('fpn', 'dpn68'), ('unet', 'tu-convnext_atto'),
          ('fpn', 'tu-regnety_002'), ('unet', 'tu-tf_efficientnet_b0'), ('dpt', 'tu-vit_tiny_patch16_224')]

@pytest.mark.parametrize('arch, encoder, half', [(*names, False) for names in BLOCKS] + [(*names, True) for names in BLOCKS[:2]])
def test_recomputation_changes_memory_only(arch, encoder, half):
    "Output, gradients, dropout and drop-connect, batch-norm statistics and their counts, the next random number: equal bit by bit after two passes, for fewer bytes"
    options = dict(dynamic_img_size=True, drop_path_rate=.3) if arch == 'dpt' else {}
    cfg, x, found = Model(architecture=arch, encoder=encoder, weights=None, options=options), torch.randn(2, 3, 64, 64), []
    for on in (False, True):
        torch.manual_seed(0); net = build(cfg.model_copy(update=dict(gradient_checkpointing=on))).train()
        for _ in range(2):
            with torch.autocast('cpu', torch.bfloat16, enabled=half): size, out = kept(net, x)
            out.float().square().mean().backward()
        found.append((size, [out, torch.rand(1), *net.buffers(), *(torch.zeros(0) if p.grad is None else p.grad for p in net.parameters())]))
    (a, one), (b, two) = found
    assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True)) and b < a

def test_frozen_encoders_compute_once():
    net = build(Model(architecture='unet', encoder='resnet18', weights=None, gradient_checkpointing=True)).train(); calls = Counter()
    for name, m in net.encoder.named_modules():
        if isinstance(m, nn.Conv2d): m.register_forward_hook(lambda m, *_, name=name: calls.update([name]))
    x = torch.randn(2, 3, 64, 64); net(x).sum().backward()
    assert calls['layer1.0.conv1'] == 2 and calls['conv1'] == 1
    calls.clear(); net.encoder.eval().requires_grad_(False); net(x).sum().backward()
    assert set(calls.values()) == {1}
    calls.clear(); net.eval()
    with torch.no_grad(): net(x)
    assert set(calls.values()) == {1}

def test_the_average_of_a_recomputing_model_has_weights_of_its_own():
    net = build(Model(architecture='unet', encoder='resnet18', weights=None, gradient_checkpointing=True)).eval(); x = torch.randn(1, 3, 64, 64)
    average = WeightAverage(net, .9).module
    with torch.no_grad():
        before = net(x); assert torch.equal(average(x), before)
        for p in net.parameters(): p.mul_(2)
        assert torch.equal(average(x), before) and not torch.equal(net(x), before)
    check_size(net, 64)

def test_an_encoder_without_blocks_cannot_be_recomputed():
    for cfg in (Model(architecture='unet', encoder='vgg11', weights=None), Model(architecture='unet', encoder='resnet18', extra_encoder='vgg11', fusion='late', in_channels=4, weights=None)):
        with pytest.raises(ConfigError, match='gradient_checkpointing: vgg11 has no blocks'): build(cfg.model_copy(update=dict(gradient_checkpointing=True)))

# ---------------------------------------------------------------- late fusion
@pytest.mark.parametrize('arch, encoder, extra', [('unet', 'resnet18', None), ('unetplusplus', 'efficientnet-b0', 'resnet18'), ('segformer', 'mit_b0', 'resnet18'), ('segformer', 'mit_b0', None),
                                                  ('fpn', 'tu-convnext_atto', 'mobilenet_v2'), ('linknet', 'vgg11', 'resnet18'), ('deeplabv3plus', 'resnet18', 'tu-resnet18'), ('manet', 'resnet18', None),
                                                  ('pspnet', 'resnet18', None), ('upernet', 'tu-convnext_atto', None)])
def test_late_fusion_starts_as_the_rgb_model(arch, encoder, extra, tmp_path):
    "Bit by bit, in evaluation and in training mode; its keys hold those of the RGB model"
    cfg = Model(architecture=arch, encoder=encoder, weights=None)
    torch.manual_seed(0); rgb = build(cfg)
    torch.manual_seed(0); late = build(cfg.model_copy(update=dict(fusion='late', extra_encoder=extra, in_channels=5)))
    assert isinstance(late, LateFusion) and set(rgb.state_dict()) < set(late.state_dict())
    check_size(late, 64); x = torch.randn(2, 5, 64, 64)
    for train in (True, False):
        with torch.no_grad():
            torch.manual_seed(1); a = rgb.train(train)(x[:, :3].contiguous())
            torch.manual_seed(1); b = late.train(train)(x)
        assert torch.equal(a, b)
    split = {k: {id(p) for m in ms for p in m.parameters()} for k, ms in parts(late).items()}
    assert split['encoder'] == {id(p) for p in late.encoder.parameters()} and split['encoder'] | split['decoder'] == {id(p) for p in late.parameters()} and not split['encoder'] & split['decoder']

def test_late_fusion_learns_while_the_pretrained_encoder_is_frozen(tmp_path):
    torch.manual_seed(0); save_file(build(plain('unet')).state_dict(), tmp_path/'m.safetensors')
    model = build(plain('unet', fusion='late', in_channels=4, gradient_checkpointing=True).model_copy(update=dict(weights=str(tmp_path/'m.safetensors'))))
    before, second = {k: v.clone() for k, v in model.state_dict().items()}, copy.deepcopy(model)
    two_steps(model, tmp_path, channels=4)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert {f'joins.{i}.weight' for i in range(1, 6)} | {k for k, _ in model.extra_encoder.named_parameters(prefix='extra_encoder')} <= moved
    cfg = LoopConfig(); second.encoder.eval().requires_grad_(False)        # frozen throughout: what EXTRA bands say is learnt without it
    x = torch.randn(4, 4, 64, 64); y = (x[:, 3:] > 0).float(); optimizer = torch.optim.AdamW([p for p in second.parameters() if p.requires_grad], cfg.lr.frozen_lr)
    for i in range(12):
        loss = nn.functional.binary_cross_entropy_with_logits(second(x), y); optimizer.zero_grad(); loss.backward(); optimizer.step()
        if not i: first = loss.item()
    assert loss.item() < .9 * first and all(torch.equal(v, before[f'encoder.{k}']) for k, v in second.encoder.state_dict().items())

def test_what_cannot_be_fused_late():
    late = dict(fusion='late', in_channels=4, weights=None)
    with pytest.raises(ConfigError, match='resnet18 has features at half size, which mit_b0 has not'): build(Model(architecture='unet', encoder='resnet18', extra_encoder='mit_b0', **late))
    with pytest.raises(ConfigError, match="'tu-vit_tiny_patch16_224' has no features at several scales to join with those of 'resnet18'"):
        build(Model(architecture='dpt', encoder='tu-vit_tiny_patch16_224', extra_encoder='resnet18', **late))
    with pytest.raises(ConfigError, match='model.extra_encoder'): build(Model(encoder='resnet18', extra_encoder='resnet19', **late))

def test_a_model_directory_of_late_fusion_loads(tmp_path):
    cfg = RtsConfig(data=dict(extra_bands=['ndvi']), model=dict(architecture='unet', encoder='resnet18', extra_encoder='mobilenet_v2', weights=None, fusion='late', in_channels=4, gradient_checkpointing=True))
    stats = Stats(['R', 'G', 'B', 'ndvi'], 'uint8', 255., [.3]*4, [.1]*4, 100, 'abc')
    model = build(cfg.model).to(memory_format=torch.channels_last).eval(); x = torch.randn(1, 4, 64, 64)
    for j in model.joins.values(): nn.init.normal_(j.weight, std=.1)
    save_model(tmp_path/'model', model, cfg, stats, dict(epoch=1, value=.5, metrics={}), {})
    with torch.no_grad(): assert torch.equal(predict_logits(load_model(tmp_path/'model').model, x), predict_logits(model, x))
    assert 'resnet18 (EXTRA bands: mobilenet_v2, fused late)' in (tmp_path/'model'/'README.md').read_text()

# ---------------------------------------------------------------- the model directory of another run
def directory(path, cfg, seed=0):
    torch.manual_seed(seed); model = build(cfg).eval(); path.mkdir(); save_file(model.state_dict(), path/'model.safetensors')
    return model

@pytest.mark.parametrize('arch, encoder', [('unetplusplus', 'efficientnet-b0'), ('segformer', 'mit_b0'), ('fpn', 'tu-regnety_002')])
def test_a_model_directory_starts_another_model(arch, encoder, tmp_path):
    "Encoder and decoder; what the new model has more starts at zero"
    cfg = Model(architecture=arch, encoder=encoder, weights=None); old = directory(tmp_path/'model', cfg); x = torch.randn(2, 6, 64, 64)
    for more in (dict(), dict(in_channels=5), dict(in_channels=6, fusion='late')):
        new = build(cfg.model_copy(update=dict(weights=str(tmp_path/'model')) | more)).eval()
        with torch.no_grad(): assert torch.equal(new(x[:, :more.get('in_channels', 3)]), old(x[:, :3].contiguous()))

def test_a_model_directory_with_more_bands(tmp_path):
    old = directory(tmp_path/'four', plain('unet', in_channels=4)); x = torch.randn(2, 6, 64, 64)
    new = build(plain('unet', in_channels=6).model_copy(update=dict(weights=str(tmp_path/'four')))).eval()
    with torch.no_grad(): assert torch.equal(new(x), old(x[:, :4].contiguous()))
    late = plain('unet', in_channels=4, fusion='late'); fused = directory(tmp_path/'late', late, seed=1); nn.init.ones_(fused.joins['1'].weight)
    save_file(fused.state_dict(), tmp_path/'late'/'model.safetensors'); again = build(late.model_copy(update=dict(weights=str(tmp_path/'late')))).eval()
    with torch.no_grad(): assert torch.equal(again(x[:, :4]), fused(x[:, :4]))

def test_a_model_directory_that_does_not_fit(tmp_path):
    cfg = plain('unet'); directory(tmp_path/'model', cfg); here = dict(weights=str(tmp_path/'model'))
    with pytest.raises(ConfigError, match=r'does not fit unet with resnet18:\n.*size mismatch for decoder\.blocks\.0\.conv1\.0\.weight'):
        build(cfg.model_copy(update=here | dict(options=dict(decoder_channels=[128, 64, 32, 16, 8]))))
    with pytest.raises(ConfigError, match=r'Missing key.*layer1\.2\.conv1'): build(cfg.model_copy(update=here | dict(encoder='resnet34')))
    directory(tmp_path/'late', cfg.model_copy(update=dict(fusion='late', in_channels=4)))
    with pytest.raises(ConfigError, match='Unexpected key.*extra_encoder'): build(cfg.model_copy(update=dict(weights=str(tmp_path/'late'))))
    with pytest.raises(ConfigError, match=r'Missing key.*extra_encoder\.layer1\.2'):
        build(cfg.model_copy(update=dict(weights=str(tmp_path/'late'), fusion='late', in_channels=4, extra_encoder='resnet34')))
    (tmp_path/'model'/'model.safetensors').unlink()
    with pytest.raises(ConfigError, match='no such file: .*model.safetensors'): build(cfg.model_copy(update=here))

# ---------------------------------------------------------------- statistics of pretrained encoders
@pytest.mark.parametrize('encoder, weights, mean, std', [('tu-vit_large_patch16_dinov3.sat493m', 'imagenet', (.430, .411, .296), (.213, .156, .143)),
                                                         ('tu-vit_large_patch16_dinov3', 'sat493m', (.430, .411, .296), (.213, .156, .143)),
                                                         ('tu-vit_large_patch16_dinov3.sat493m', './local.safetensors', (.430, .411, .296), (.213, .156, .143)),
                                                         ('tu-resnet18', 'imagenet', (.485, .456, .406), (.229, .224, .225)),
                                                         ('tu-tf_efficientnet_b5', 'ap_in1k', (.5, .5, .5), (.5, .5, .5))])
def test_timm_knows_what_normalised_its_encoders(encoder, weights, mean, std):
    got = pretrained_stats(Model(encoder=encoder, weights=weights))
    assert got[0] == pytest.approx(mean, abs=1e-3) and got[1] == pytest.approx(std, abs=1e-3)

def test_smp_keeps_its_statistics_beside_the_weights(tmp_path):
    "From the hub's cache; a local file counts as the encoder's ImageNet weights; where nobody knows, an error says what to do"
    source = smp.encoders.encoders['resnet18']['pretrained_settings']['imagenet']
    snapshot = tmp_path/'hub'/('models--' + source['repo_id'].replace('/', '--'))/'snapshots'/source['revision']; snapshot.mkdir(parents=True)
    (snapshot/'config.json').write_text(json.dumps(dict(mean=[.1, .2, .3], std=[.4, .5, .6], input_range=[0, 1])))
    done = python('''
        import urllib.request
        from rtsseg.config import ConfigError, Model
        from rtsseg.pretrained import pretrained_stats
        urllib.request.urlopen = lambda *a, **k: (_ for _ in ()).throw(OSError('no network'))
        for w in ('imagenet', './mine.pt'): assert pretrained_stats(Model(encoder='resnet18', weights=w)) == ([.1, .2, .3], [.4, .5, .6])
        try: pretrained_stats(Model(encoder='resnet18', weights='ssl'))
        except ConfigError as e: print(e)''', HF_HOME=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ('model.normalisation', "'ssl'", 'smp-hub/resnet18.ssl', 'use dataset'): assert word in done.stdout

def test_statistics_that_nobody_knows():
    with pytest.raises(ConfigError, match='model.normalisation: resnet18 .* use dataset'): pretrained_stats(Model(encoder='resnet18', weights=None))
    never = next(n for n in timm.list_models() if not timm.models.is_model_pretrained(n))
    with pytest.raises(ConfigError, match=f'no statistics of any, for tu-{never}'): pretrained_stats(Model(encoder=f'tu-{never}'))

def test_pretrained_statistics_reach_the_tiles(tiny_world, tmp_path):
    "R, G and B from the encoder, EXTRA bands from the training split; a model directory hands its own on"
    def cfg(**kw): return RtsConfig(runs=tmp_path/'runs', data=dict(manifest=tiny_world, tile_size=64, extra_bands=['ndvi'], split_check='warn'), model=dict(architecture='unet', encoder='tu-resnet18', in_channels=4) | kw)
    manifest = prepare(cfg()); own, pretrained = statistics(cfg(), manifest), statistics(cfg(normalisation='pretrained'), manifest)
    assert own.mean[:3] != pretrained.mean[:3] == [.485, .456, .406] and pretrained.std[:3] == [.229, .224, .225]
    assert (pretrained.mean[3:], pretrained.std[3:], pretrained.scale) == (own.mean[3:], own.std[3:], own.scale)
    assert statistics(cfg(normalisation='pretrained'), manifest) == pretrained
    own.save(tmp_path/'model'/'normalization_stats.json')
    assert statistics(cfg(normalisation='pretrained', weights=str(tmp_path/'model')), manifest) == own

# ---------------------------------------------------------------- the batch that fits
def small(**kw): return RtsConfig(batch_size=6, device='cpu', data=dict(tile_size=64), model=dict(architecture='unet', encoder='resnet18', weights=None), **kw)

def test_the_probe_finds_the_largest_batch(monkeypatch):
    "Down by a tenth at a time from where it starts, past every size that runs out of memory"
    tried = []
    def steps(cfg, batch):
        tried.append(batch)
        if batch > 41: raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return dict(parameters=0, gradients=0, optimizer=0, average=0, activations=10 * batch)
    monkeypatch.setattr(rtsseg.check, 'measure_steps', steps)
    cfg = small().model_copy(update=dict(batch_size=64)); found = probe(cfg)
    assert tried == [2, 64, 57, 51, 45, 40] and found['batch_size'] == 40 and found['activations'] == 10
    assert 'batch_size: 40 ' in show_probe(found, cfg)
    monkeypatch.setattr(rtsseg.check, 'measure_steps', lambda *_: (_ for _ in ()).throw(RuntimeError("DefaultCPUAllocator: can't allocate memory")))
    with pytest.raises(ConfigError, match='not even one tile of 64 pixels'): probe(cfg)
    monkeypatch.setattr(rtsseg.check, 'measure_steps', lambda *_: (_ for _ in ()).throw(RuntimeError('something else')))
    with pytest.raises(RuntimeError, match='something else'): probe(cfg)

def test_the_probe_takes_steps_of_the_run():
    "All parts train, the average is kept, micro-batches are those of the config; without EMA there is none"
    first = measure_steps(small(), 2); second = measure_steps(small(ema=dict(enabled=False), accumulate=2), 2)
    n = sum(p.numel() for p in build(small().model).parameters())
    assert first['parameters'] == first['gradients'] == second['parameters'] == 4 * n and 2 * 4 * n < first['optimizer'] < 2.001 * 4 * n
    assert first['average'] >= 4 * n and second['average'] == 0
    assert measure_steps(small(), 4)['activations'] == pytest.approx(2 * first['activations'], rel=.01)
