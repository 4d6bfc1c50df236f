"Faults 19 to 25: settings that cannot be meant"
import json, subprocess, sys
from pathlib import Path

import pytest

from rtsseg.config import ConfigError, load, run_folder, to_yaml
from rtsseg.segment import prepare
from rtsseg.toy import tiny_toy
from rtsseg.train import Busy, locked, run, start_over

BIN = Path(sys.executable).parent

@pytest.fixture
def tiny(tmp_path):
    return load(overrides=['augment.enabled=false', 'loader.num_workers=0', 'tracker.kind=none'], name='tiny', runs=tmp_path/'runs', device='cpu', epochs=1, batch_size=8, val_frequency=1,
                freeze_backbone_epochs=0, data=dict(manifest=tiny_toy(tmp_path), tile_size=64, split_check='warn'), sampler=dict(curriculum=[dict(first=1, last=4, ratio=1)]),
                model=dict(architecture='unet', encoder='tu-test_efficientnet', weights=None, options=dict(decoder_channels=[16, 8, 8, 8, 8])))

def test_23_a_run_folder_whose_config_was_changed(tiny):
    "It is refused, and nothing in it is touched"
    folder = run(tiny); path = folder/'config.yaml'; path.write_text(path.read_text().replace('weight_decay: 0.01', 'weight_decay: 0.02'))
    before = {f: f.stat().st_mtime_ns for f in folder.rglob('*') if f.is_file() and f.name != '.lock'}
    with pytest.raises(ConfigError, match='config.yaml has been changed since the run began.*--fresh'): run(tiny)
    assert {f: f.stat().st_mtime_ns for f in folder.rglob('*') if f.is_file() and f.name != '.lock'} == before

def test_23_fresh_puts_the_old_folder_aside(tiny, tmp_path):
    "Whole, under another name; the same command trains anew and ends in the same bytes"
    folder = run(tiny); model = (folder/'model'/'model.safetensors').read_bytes(); held = {f.relative_to(folder) for f in folder.rglob('*')}
    (tmp_path/'tiny.yaml').write_text(to_yaml(tiny))
    done = subprocess.run([BIN/'rtsseg-train', '--config', tmp_path/'tiny.yaml', '--inline', '--fresh'], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and 'put aside: ' in done.stdout, done.stderr
    aside, = folder.parent.glob('old-seed42-*')
    assert {f.relative_to(aside) for f in aside.rglob('*')} == held and (aside/'model'/'model.safetensors').read_bytes() == model == (folder/'model'/'model.safetensors').read_bytes()
    assert len([l for l in (folder/'log.jsonl').read_text().splitlines() if json.loads(l)['event'] == 'start']) == 1

def test_23_a_run_under_way_is_not_put_aside(tiny):
    folder = run_folder(tiny, prepare(tiny).hash); assert start_over(folder) is None
    with locked(folder), pytest.raises(Busy): start_over(folder)
    assert folder.is_dir()
