"Folders with odd names, and folders that are moved between commands"
import os
import shutil

import numpy as np
import pytest

from helpers.maps import map_bytes, noise, write_scene
from helpers.runs import run
from rtsseg.calibration import calibrate
from rtsseg.console import DataError, RtssegError
from rtsseg.evaluation import evaluate
from rtsseg.evidence import Evidence
from rtsseg.prediction import predict
from rtsseg.reporting import report

ODD = {
    'spaces': 'my tiles of  2024 ',
    'other letters': 'Плитки 瓦片 لوحة',
    'quotes and signs': """it's "50%" & #1 {x} $HOME;""",
    'as long as a file system allows': 'n' * 240,
    'composed accents': 'te\u0301le\u0301de\u0301tection',
}

def home(folder):
    "The folder that holds data and runs, of a run folder"
    return folder.parents[3]

def whole_job(root):
    "From a trained model to a report and a map, in a folder; the folder of the run"
    folder = run(root)
    report([folder])
    scene = write_scene(root/'scene of a place.tif', noise(70, 90))
    predict(folder/'model', scene, root/'map of a place.tif')
    return folder

@pytest.fixture(scope='module')
def usual(tmp_path_factory):
    "The same job in a folder with a plain name"
    return whole_job(tmp_path_factory.mktemp('usual'))

def digests(folder):
    "The bytes of what a job leaves, without what names its place"
    found = {path.name: path.read_bytes() for path in (folder/'evidence').iterdir()}
    found |= {name: (folder/'model'/name).read_bytes() for name in ('model.safetensors', 'calibration.json')}
    return found | {'map': map_bytes(home(folder)/'map of a place.tif')[0]}

@pytest.mark.parametrize('name', ODD.values(), ids=list(ODD))
def test_the_job_runs_in_a_folder_of_any_name(usual, tmp_path, name):
    "And its files are the same bytes"
    root = tmp_path/name
    root.mkdir()
    assert digests(whole_job(root)) == digests(usual)

def test_the_job_runs_below_a_link(usual, tmp_path):
    "Of the folder that holds data and runs"
    (tmp_path/'real').mkdir()
    (tmp_path/'link').symlink_to('real', target_is_directory=True)
    assert digests(whole_job(tmp_path/'link')) == digests(usual)

# ---------------------------------------------------------------- moved between commands

@pytest.fixture
def copied(usual, tmp_path):
    "A copy of the job's folder, elsewhere: the folder of its run, and what its config calls the data"
    root = shutil.copytree(home(usual), tmp_path/'copy')
    return root/usual.relative_to(home(usual))

def test_a_moved_run_is_evaluated_calibrated_and_reported(usual, copied, tmp_path):
    "Its data lie where they lay"
    moved = shutil.move(home(copied)/'runs', tmp_path/'elsewhere')
    folder = tmp_path/'elsewhere'/copied.relative_to(home(copied)/'runs')
    assert moved == tmp_path/'elsewhere'
    shutil.rmtree(folder/'evidence')
    evaluate(folder)
    calibrate(folder)
    report([folder])
    same = (usual/'model'/'calibration.json').read_bytes()
    assert (folder/'model'/'calibration.json').read_bytes() == same

def test_data_that_were_moved_are_missed_by_name(copied, usual, tmp_path):
    "The message says which file, and how the new place is named"
    config = copied/'config.yaml'
    gone = tmp_path/'gone'/'manifest.csv'
    config.write_text(config.read_text().replace(str(home(usual)/'manifest.csv'), str(gone)))
    shutil.rmtree(copied/'evidence')
    with pytest.raises(RtssegError, match='manifest.csv') as error:
        evaluate(copied)
    message = str(error.value)
    assert os.path.relpath(gone) in message or str(gone) in message
    assert message.endswith(f'write their new place into {os.path.relpath(config)}')
    assert not (copied/'evidence').exists()
    moved = shutil.move(home(usual)/'manifest.csv', home(usual)/'elsewhere.csv')
    try:
        config.write_text(config.read_text().replace(str(gone), str(moved)))
        assert Evidence.read(evaluate(copied)) == Evidence.read(usual/'evidence'/'val.parquet')
    finally:
        shutil.move(moved, home(usual)/'manifest.csv')

def test_a_map_with_the_longest_name(usual, tmp_path):
    "Its note and its style, whose names are longer, too"
    scene = home(usual)/'scene of a place.tif'
    out = tmp_path/f'{"n" * 240}.tif'
    predict(usual/'model', scene, out)
    assert out.read_bytes() == map_bytes(home(usual)/'map of a place.tif')[0]
    assert {path.suffix for path in tmp_path.iterdir()} == {'.tif', '.json', '.qml'}

def test_a_model_directory_predicts_anywhere(usual, tmp_path):
    "It needs nothing but itself, also where the run, its data and its config are gone"
    model = shutil.copytree(usual/'model', tmp_path/'another machine'/'model')
    scene = write_scene(tmp_path/'scene of a place.tif', noise(70, 90))
    predict(model, scene, tmp_path/'map.tif')
    assert (tmp_path/'map.tif').read_bytes() == map_bytes(home(usual)/'map of a place.tif')[0]

def test_a_part_of_a_model_directory_is_no_model(usual, tmp_path):
    "A copy that was cut short is named"
    model = shutil.copytree(usual/'model', tmp_path/'model')
    (model/'model.safetensors').unlink()
    scene = write_scene(tmp_path/'scene.tif', np.ones((3, 70, 90), 'uint8'))
    with pytest.raises((DataError, RtssegError), match='model.safetensors'):
        predict(model, scene, tmp_path/'map.tif')
