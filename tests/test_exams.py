"Lists of mammograms: what is wrong with them is named together, and images that cannot be read are counted"
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest

from rtsseg.console import DataError
from rtsseg.exams import ExamTable, check_exams, risk_labels
from rtsseg.phantom import PhantomWorld, make_phantom_world

WORLD = PhantomWorld(patients=24, height=48, width=32)

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp('phantoms')
    make_phantom_world(folder, WORLD)
    return folder

@pytest.fixture
def world(made, tmp_path):
    "A copy of the world, to be damaged: its folder, and its list as a table of texts"
    folder = shutil.copytree(made, tmp_path/'world')
    return folder, pd.read_csv(folder/'exams.csv', dtype=str, keep_default_na=False)

def problems(world):
    "The lines of what reading and checking refuse; [] for nothing"
    folder, rows = world
    rows.to_csv(folder/'exams.csv', index=False)
    try:
        check_exams(ExamTable.read(folder/'exams.csv', folder))
    except DataError as e:
        return str(e).splitlines()
    return []

def rows_of(rows, **wanted):
    "Numbers of the rows with these values"
    return [k for k in rows.index if all(rows.loc[k, name] == value for name, value in wanted.items())]

def test_a_made_up_world_is_right(world):
    assert problems(world) == []

def change(row, **cells):
    def apply(folder, rows):
        for name, value in cells.items():
            rows.loc[row, name] = value
    return apply

def second_split(folder, rows):
    "A later exam of a patient of training, in the test split"
    train = rows[rows.split == 'train']
    patient = train.patient_id[train.groupby('patient_id').exam_id.transform('nunique') > 1].iloc[0]
    last = rows.exam_id[rows.patient_id == patient].iloc[-1]
    rows.loc[rows.exam_id == last, 'split'] = 'test'

def eight_bits(folder, rows):
    cv2.imwrite(str(folder/rows.path[3]), np.zeros((48, 32), np.uint8))

def twice(folder, rows):
    rows.loc[1, ['ImageLaterality', 'view']] = rows.loc[0, ['ImageLaterality', 'view']]

def same_file(folder, rows):
    train, test = rows.index[rows.split == 'train'][0], rows.index[rows.split == 'test'][0]
    shutil.copy(folder/rows.path[train], folder/rows.path[test])

BAD = {
    'follow-up below zero': (change(0, years_last_followup='-1'), 'row 1, years_last_followup -1: below zero'),
    'time to cancer below zero': (change(0, Time_to_Cancer_Years='-2', diagnosed_date_year='2015'),
                                  'row 1, Time_to_Cancer_Years -2: below zero'),
    'an unknown view': (change(2, view='XCCL'), "row 3, view 'XCCL': unknown"),
    'an unknown side': (change(2, ImageLaterality='B'), "row 3, ImageLaterality 'B': unknown"),
    'an unknown split': (change(2, split='hold-out'), "row 3, split 'hold-out': unknown"),
    'a word for a year': (change(2, study_date_year='12'), "row 3, study_date_year '12': not a year"),
    'a missing file': (lambda folder, rows: (folder/rows.path[4]).unlink(), 'row 5, path'),
    'a view that is there twice': (twice, 'is there 2 times'),
    'a patient in two splits': (second_split, 'all exams of a patient belong in one split'),
    'eight bits': (eight_bits, '8 bits where data.bits declares 16'),
    'one file in two splits': (same_file, 'is the same file as'),
}

@pytest.mark.parametrize('damage', BAD)
def test_bad_lists_are_refused_with_row_and_field(world, damage):
    apply, words = BAD[damage]
    apply(*world)
    found = problems(world)
    assert any(words in line for line in found), found

def test_all_problems_come_in_one_message(world):
    folder, rows = world
    for name in ('follow-up below zero', 'an unknown view', 'a missing file'):
        BAD[name][0](folder, rows)
    found = problems(world)
    for words in ('row 1, years_last_followup', 'row 3, view', 'row 5, path'):
        assert any(words in line for line in found), found

def test_a_split_without_exams_is_named(world):
    folder, rows = world
    rows.loc[rows.split == 'val', 'split'] = 'train'
    assert 'exams.csv: split \'val\': no exam' in problems(world)

def test_too_many_damaged_images_are_refused(world):
    "One of a few hundred is more than 0.1%"
    folder, rows = world
    path = folder/rows.path[7]
    path.write_bytes(path.read_bytes()[:200])
    found = problems(world)
    assert any(rows.path[7] in line for line in found), found

def test_views_and_priors_that_are_missing_are_no_problem(world):
    folder, rows = world
    kept = rows.drop(index=rows_of(rows, ImageLaterality='R', view='MLO')[:3]).reset_index(drop=True)
    assert problems((folder, kept)) == []
    exams = ExamTable.read(folder/'exams.csv', folder)
    assert sum(not path for paths in exams.paths for path in paths) == 3
    assert [] in exams.priors

def test_labels_of_the_recipe():
    "Cancer within the third year; none in two whole years; none in nine; cancer in the seventh, beyond what is asked"
    labels = risk_labels(np.array([2, np.nan, np.nan, 6]), np.array([4, 2, 9, 8]))
    assert labels.y_seq.astype(int).tolist() == [[0, 0, 1, 1, 1], [0] * 5, [0] * 5, [0] * 5]
    assert labels.y_mask.astype(int).tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1] * 5, [1] * 5]
    assert labels.event.tolist() == [True, False, False, False]
    assert labels.time.tolist() == [3, 2, 5, 5]

def test_a_world_is_a_function_of_its_seed(made, tmp_path):
    make_phantom_world(tmp_path, WORLD)
    for name in ('exams.csv', 'truth.csv', *pd.read_csv(made/'exams.csv').path):
        assert (tmp_path/name).read_bytes() == (made/name).read_bytes(), name
