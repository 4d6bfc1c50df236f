"Fault 40: a model that is not whole, or not what it says"
import json, re, shutil, subprocess, sys
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file, save

from rtsseg.files import seal_model
from rtsseg.infer import ModelError, load_model
from small_run import run

FAULTS = {40: ('a model directory with a missing or an extra weight, without normalization_stats.json, with a standard deviation of 0, weights that are no numbers, or bands in another order', 'refused')}

@pytest.fixture(scope='module')
def whole(tmp_path_factory): return run(tmp_path_factory.mktemp('whole'))

@pytest.fixture
def folder(whole, tmp_path):
    "A copy of the run, to be damaged"
    return shutil.copytree(whole.parents[2], tmp_path/'runs')/whole.relative_to(whole.parents[2])

def weights(folder, change):
    "Other weights, and a list of digests that agrees"
    path = folder/'model'/'model.safetensors'; found = load_file(path); change(found); path.write_bytes(save(found)); seal_model(folder/'model')

def stats(folder, **change):
    path = folder/'model'/'normalization_stats.json'; path.write_text(json.dumps(json.loads(path.read_text()) | change)); seal_model(folder/'model')

def refused(folder, why):
    "By the loader, and by a command: exit code 2, a message that names the file, nothing written"
    with pytest.raises(ModelError, match=why): load_model(folder/'model')
    before = {f: f.stat().st_mtime_ns for f in folder.parents[2].rglob('*')}
    done = subprocess.run([Path(sys.executable).parent/'rtsseg-evaluate', '--run', folder, '--split', 'test'], capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and done.stderr.startswith('error: ') and 'Traceback' not in done.stderr and not done.stdout, done.stderr
    assert re.search(why, done.stderr) and {f: f.stat().st_mtime_ns for f in folder.parents[2].rglob('*')} == before

def test_40_a_missing_weight(folder):
    "Weights of another architecture, or cut by hand, are not filled up with random ones"
    weights(folder, lambda w: w.pop('segmentation_head.0.bias')); refused(folder, r"model.safetensors does not fit config.yaml: 1 weights missing \['segmentation_head.0.bias'\], 0 extra")

def test_40_an_extra_weight(folder):
    "What the config does not build is not left aside in silence"
    weights(folder, lambda w: w.update(more=torch.zeros(2))); refused(folder, r"model.safetensors does not fit config.yaml: 0 weights missing \[\], 1 extra \['more'\]")

def test_40_without_statistics(folder):
    "A model without the statistics of its training data would give quietly wrong maps"
    (folder/'model'/'normalization_stats.json').unlink(); refused(folder, 'normalization_stats.json is missing, and SHA256SUMS lists it')
    seal_model(folder/'model')
    with pytest.raises(ModelError, match='normalization_stats.json is missing: the model cannot be used without it'): load_model(folder/'model')

def test_40_a_standard_deviation_of_zero(folder):
    "Nothing is divided by 0"
    stats(folder, std=[.1, 0., .1]); refused(folder, 'normalization_stats.json: statistics: not finite, or a standard deviation of 0')

@pytest.mark.parametrize('number', [float('nan'), float('inf')])
def test_40_weights_that_are_no_numbers(folder, number):
    "One of them makes every map empty"
    def change(w): w['decoder.blocks.0.conv1.0.weight'][0, 0, 0, 0] = number
    weights(folder, change); refused(folder, r"model.safetensors holds numbers that are not finite: \['decoder.blocks.0.conv1.0.weight'\]")

@pytest.mark.parametrize('bands', [['B', 'G', 'R'], ['R', 'G', 'B', 'ndvi'], ['R', 'G', 'G'], 'RGB'])
def test_40_bands_in_another_order(folder, bands):
    "The statistics say which bands there are, and the config in which order: a model that saw others is not used"
    stats(folder, channels=bands, **({} if len(bands) == 3 else dict(mean=[.3] * 4, std=[.1] * 4))); refused(folder, 'normalization_stats.json')
