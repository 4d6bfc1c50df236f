"Models: every architecture, every way that weights come in or fail to, one step of training"
import os, socket, subprocess, sys, textwrap

import pytest, segmentation_models_pytorch as smp, timm, torch
from safetensors.torch import save_file

from rtsseg.config import ConfigError, Model
from rtsseg.models import ARCHITECTURES, build, check_size, find_weights, parts

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
    monkeypatch.setattr('rtsseg.models.try_to_load_from_cache', lambda *a, **k: None)
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
    monkeypatch.setattr('rtsseg.models.try_to_load_from_cache', lambda *a, **k: None)
    monkeypatch.setattr('rtsseg.models.is_offline_mode', lambda: True); monkeypatch.setattr('urllib.request.urlopen', None)
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
