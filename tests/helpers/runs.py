"Settings of a run of a second, and a run folder without training: what train, evaluate and calibrate leave behind. And a guard that sees what code does while it reads what others made"
import json, os, shutil, signal, sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from rtsseg.calibration import calibrate
from rtsseg.files import write_atomic
from rtsseg.config import load, to_yaml
from rtsseg.runs import run_folder
from rtsseg.manifest import read_manifest
from rtsseg.stats import compute_stats
from rtsseg.evaluation import evaluate
from rtsseg.infer import save_model
from rtsseg.intervals import summary
from rtsseg.evidence import Evidence
from rtsseg.models import build
from rtsseg.toy import tiny_toy

MODEL = dict(architecture='unet', encoder='tu-test_efficientnet', weights=None, options=dict(decoder_channels=[16, 8, 8, 8, 8]))

@cache
def _made(**settings): home = TemporaryDirectory(); tiny_toy(home.name, **settings); return home       # once a process, and gone with it

def toy_world(folder, **settings):
    "The manifest of a toy world of the caller's own, in this folder"
    return shutil.copytree(_made(**settings).name, folder, dirs_exist_ok=True)/'manifest.csv'

def tiny(folder, **more):
    "Settings of a run of a second, on a toy world of 36 tiles in this folder; more are top-level fields that differ"
    return load(overrides=['augment.enabled=false', 'loader.num_workers=0', 'tracker.kind=none'], **dict(name='tiny', runs=folder/'runs', device='cpu', epochs=1, batch_size=8, val_frequency=1, freeze_backbone_epochs=0,
                data=dict(manifest=toy_world(folder, regions=1, scene_size=384, block_size=192), tile_size=64, split_check='warn'), sampler=dict(curriculum=[dict(first=1, last=4, ratio=1)]), model=MODEL) | more)

def run(root, seed=0, **more):
    "The run folder of a model of random weights that knows bright from dark"
    cfg = load(name='small', runs=root/'runs', device='cpu', batch_size=8, loader=dict(num_workers=0), data=dict(manifest=toy_world(root), tile_size=64), epochs=2, metrics=dict(ratios=[1], monitor='pr_auc@1', replicates=20),
               calibrate=dict(ratio=1, target_precision=.3), model=MODEL, **more)
    world = read_manifest(cfg.data.manifest, cfg.data.block_size); folder = run_folder(cfg, world.hash); torch.manual_seed(seed); model = build(cfg.model).eval()
    write_atomic(folder/'config.yaml', to_yaml(cfg)); write_atomic(folder/'environment.json', json.dumps(dict(manifest_hash=world.hash, git_commit='a' * 40, git_clean=True, system='Linux', python='3.11', rtsseg='0', processor='x', cpus=2, versions={'torch': '2'})))
    lines = [dict(event='start', epoch=1, step=0, device='cpu', processes=1), dict(event='stage', epoch=1, first=1, last=2, frozen=[]),
             *(dict(event='epoch', epoch=i, step=10 * i, seconds=1., **{'lr/encoder': 1e-3, 'train/loss/focal': .1 / i, 'val/loss': .1, 'val/pr_auc@1': .5}) for i in (1, 2)), dict(event='end', reason='all epochs done', epoch=2, step=20, best=2)]
    write_atomic(folder/'log.jsonl', ''.join(json.dumps(l) + '\n' for l in lines))
    def export(value): return save_model(folder/'model', model, cfg, compute_stats(world.of('train')), dict(epoch=2, step=20, value=value, metrics={'pr_auc@1': value}), {})
    export(0.); export(summary(Evidence.read(evaluate(folder)), [1], ious=())[1]['pr_auc'])
    calibrate(folder); evaluate(folder, 'test')
    return folder

@contextmanager
def in_time(seconds=60):
    "What would wait for ever fails"
    def late(*_): raise AssertionError('it waits')
    old = signal.signal(signal.SIGALRM, late); signal.alarm(seconds)
    try: yield
    finally: signal.alarm(0); signal.signal(signal.SIGALRM, old)

_events, _open, _hooked = [], [], []       # a hook stays for good: it is asked to look only inside of `guard`

def _hook(name, args):
    if not _open or not name.startswith(('open', 'os.', 'socket.', 'subprocess.', 'pickle.', 'shutil.')): return
    if name == 'open' and (isinstance(args[0], int) or not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)): return
    _events.append((name, tuple(a if isinstance(a, (str, bytes, int, os.PathLike)) else type(a) for a in args)))

CHANGES = 'os.remove', 'os.rename', 'os.rmdir', 'os.mkdir', 'os.link', 'os.symlink', 'os.truncate', 'os.chmod', 'os.chown', 'os.utime', 'shutil.rmtree', 'shutil.move'
NEVER = 'os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'os.spawn', 'subprocess.Popen', 'socket.connect', 'socket.getaddrinfo', 'socket.bind', 'pickle.find_class'

@contextmanager
def guard(*folders):
    "Nothing is written outside of these folders, no process is started, no socket opened, no object unpickled"
    if _hook not in _hooked: sys.addaudithook(_hook); _hooked.append(_hook)
    _open.append(1); _events.clear()
    try: yield
    finally: _open.pop(); seen = list(_events)
    homes = [Path(f).resolve() for f in folders]
    def away(path): return isinstance(path, (str, bytes, os.PathLike)) and not any(Path(os.path.realpath(os.fsdecode(path))).is_relative_to(h) for h in homes) and os.fsdecode(path) != os.devnull
    bad = [(n, a) for n, a in seen if n in NEVER or (n == 'open' or n in CHANGES) and any(away(p) for p in a[:1 if n == 'open' else 2])]
    assert not bad, bad
