"A config of a run of a second, a run folder without training, and a guard that sees what code does as it reads"
import json
import os
import shutil
import signal
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from rtsseg.calibration import calibrate
from rtsseg.config import load, to_yaml
from rtsseg.evaluation import evaluate
from rtsseg.evidence import Evidence
from rtsseg.files import write_atomic
from rtsseg.infer import save_model
from rtsseg.intervals import summary
from rtsseg.manifest import read_manifest
from rtsseg.models import build
from rtsseg.runs import run_folder
from rtsseg.stats import compute_stats
from rtsseg.toy import tiny_toy

MODEL = dict(
    architecture='unet',
    encoder='tu-test_efficientnet',
    weights=None,
    options=dict(decoder_channels=[16, 8, 8, 8, 8]),
)

# ---------------------------------------------------------------- toy worlds and settings

@cache
def shared_world(**settings):
    "A toy world that this process makes once; the folder is gone with the process"
    home = TemporaryDirectory()
    tiny_toy(home.name, **settings)
    return home

def toy_world(folder, **settings):
    "Copy a toy world into a folder; its manifest"
    return shutil.copytree(shared_world(**settings).name, folder, dirs_exist_ok=True)/'manifest.csv'

def tiny(folder, **more):
    "The config of a run of a second on a toy world of 36 tiles in this folder; `more` are top-level fields that differ"
    manifest = toy_world(folder, regions=1, scene_size=384, block_size=192)
    settings = dict(
        name='tiny',
        runs=folder/'runs',
        device='cpu',
        epochs=1,
        batch_size=8,
        val_frequency=1,
        freeze_backbone_epochs=0,
        data=dict(manifest=manifest, tile_size=64, split_check='warn'),
        sampler=dict(curriculum=[dict(first=1, last=4, ratio=1)]),
        model=MODEL,
    )
    off = ['augment.enabled=false', 'loader.num_workers=0', 'tracker.kind=none']
    return load(overrides=off, **settings | more)

# ---------------------------------------------------------------- a run folder without training

def write_environment(folder, manifest_hash):
    "environment.json as a run writes it"
    environment = dict(
        manifest_hash=manifest_hash,
        git_commit='a' * 40,
        git_clean=True,
        system='Linux',
        python='3.11',
        rtsseg='0',
        processor='x',
        cpus=2,
        versions={'torch': '2'},
    )
    write_atomic(folder/'environment.json', json.dumps(environment))

def write_log(folder):
    "log.jsonl of two epochs"
    lines = [
        dict(event='start', epoch=1, step=0, device='cpu', processes=1),
        dict(event='stage', epoch=1, first=1, last=2, frozen=[]),
    ]
    for epoch in (1, 2):
        numbers = {'lr/encoder': 1e-3, 'train/loss/focal': .1 / epoch, 'val/loss': .1, 'val/pr_auc@1': .5}
        lines.append(dict(event='epoch', epoch=epoch, step=10 * epoch, seconds=1.) | numbers)
    lines.append(dict(event='end', reason='all epochs done', epoch=2, step=20, best=2))
    write_atomic(folder/'log.jsonl', ''.join(json.dumps(line) + '\n' for line in lines))

def trained(root, draw=0, **more):
    """The run folder of a model of random weights that tells bright from dark, as training leaves it

    With a function that writes its model directory with another value of the best validation."""
    settings = dict(
        name='small',
        runs=root/'runs',
        device='cpu',
        batch_size=8,
        loader=dict(num_workers=0),
        data=dict(manifest=toy_world(root), tile_size=64),
        epochs=2,
        metrics=dict(ratios=[1], monitor='pr_auc@1', replicates=20),
        calibrate=dict(ratio=1, target_precision=.3),
        model=MODEL,
    )
    cfg = load(**settings | more)
    world = read_manifest(cfg.data.manifest, cfg.data.block_size)
    folder = run_folder(cfg, world.hash)
    stats = compute_stats(world.of('train'))
    torch.manual_seed(draw)
    model = build(cfg.model).eval()
    write_atomic(folder/'config.yaml', to_yaml(cfg))
    write_environment(folder, world.hash)
    write_log(folder)

    def export(value):
        best = dict(epoch=2, step=20, value=value, metrics={'pr_auc@1': value})
        save_model(folder/'model', model, cfg, stats, best, {})

    export(0.)
    return folder, export

def run(root, seed=0, **more):
    "The run folder of such a model: evaluated, calibrated and tested"
    folder, export = trained(root, seed, **more)
    evidence = Evidence.read(evaluate(folder))
    export(summary(evidence, [1], ious=())[1]['pr_auc'])
    calibrate(folder)
    evaluate(folder, 'test')
    return folder

# ---------------------------------------------------------------- guards

@contextmanager
def in_time(seconds=300):
    "Code that would wait without end fails; the limit is far above what the slowest machine needs"
    def fail(*_):
        raise AssertionError(f'it still waits after {seconds} s')
    old = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)

WATCHED = 'open', 'os.', 'socket.', 'subprocess.', 'pickle.', 'shutil.'
CHANGES = (
    'os.remove', 'os.rename', 'os.rmdir', 'os.mkdir', 'os.link', 'os.symlink', 'os.truncate', 'os.chmod', 'os.chown',
    'os.utime', 'shutil.rmtree', 'shutil.move',
)
NEVER = (
    'os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'os.spawn', 'subprocess.Popen', 'socket.connect',
    'socket.getaddrinfo', 'socket.bind', 'pickle.find_class',
)
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

class AuditLog:
    "Python's audit events while a guard is active; a hook cannot be removed, so it is installed once"
    installed = False
    guards = 0
    events = []

    @classmethod
    def hook(cls, name, args):
        if not cls.guards or not name.startswith(WATCHED):
            return
        if name == 'open' and (isinstance(args[0], int) or not args[2] & WRITE_FLAGS):
            return
        plain = tuple(a if isinstance(a, (str, bytes, int, os.PathLike)) else type(a) for a in args)
        cls.events.append((name, plain))

    @classmethod
    def start(cls):
        if not cls.installed:
            sys.addaudithook(cls.hook)
            cls.installed = True
        cls.guards += 1
        cls.events.clear()

    @classmethod
    def stop(cls):
        cls.guards -= 1
        return list(cls.events)

def leads_outside(path, folders):
    "Whether something that is written lies outside of all these folders"
    if not isinstance(path, (str, bytes, os.PathLike)) or os.fsdecode(path) == os.devnull:
        return False
    target = Path(os.path.realpath(os.fsdecode(path)))
    return not any(target.is_relative_to(folder) for folder in folders)

def is_forbidden(name, args, folders):
    "Whether an audit event is something that reading a model or a run must not do"
    if name in NEVER:
        return True
    if name == 'open':
        return leads_outside(args[0], folders)
    return name in CHANGES and any(leads_outside(path, folders) for path in args[:2])

@contextmanager
def guard(*folders):
    "Nothing is written outside of these folders, no process is started, no socket opened, no object unpickled"
    folders = [Path(folder).resolve() for folder in folders]
    AuditLog.start()
    try:
        yield
    finally:
        events = AuditLog.stop()
    forbidden = [(name, args) for name, args in events if is_forbidden(name, args, folders)]
    assert not forbidden, forbidden
