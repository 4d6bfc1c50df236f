"Lists of mammograms: what is wrong with them is named together, and images that cannot be read are counted"
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.ensemble import RandomForestRegressor
from torch.utils.data import default_collate

from rtsseg.config import find_system
from rtsseg.console import DataError
from rtsseg.exam_feed import ExamAugment, ExamData, ExamDataset
from rtsseg.exams import EXAM_VIEWS, ExamTable, check_exams, import_csaw, import_embed, read_mammogram, risk_labels
from rtsseg.phantom import PhantomWorld, make_phantom_world
from rtsseg.survival_metrics import concordance

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

def many_exams(folder, patients=260):
    "A list of one exam a patient and four images of 4 × 4 pixels: more than a thousand files"
    rows, rng = [], np.random.default_rng(0)
    for number in range(patients):
        for side, view in EXAM_VIEWS:
            path = f'{number}_{side}_{view}.png'
            cv2.imwrite(str(folder/path), rng.integers(1, 65536, (4, 4)).astype(np.uint16))
            rows.append(dict(patient_id=number, exam_id=number, ImageLaterality=side, view=view, diagnosed_date_year='',
                             study_date_year=2010, Time_to_Cancer_Years='', years_last_followup=5,
                             split=('train', 'val')[number % 2], path=path))
    pd.DataFrame(rows).to_csv(folder/'exams.csv', index=False)
    return ExamTable.read(folder/'exams.csv', folder)

def test_few_damaged_images_are_counted(tmp_path):
    "Of 1040 images, one is below 0.1%; two are too many"
    exams = many_exams(tmp_path)
    (tmp_path/exams.paths[3][1]).write_bytes(b'cut off')
    assert check_exams(exams) == [(3, 1)]
    (tmp_path/exams.paths[8][2]).write_bytes(b'cut off')
    with pytest.raises(DataError, match=exams.paths[8][2]):
        check_exams(exams)

def test_an_exam_without_a_readable_view_does_not_count(made, tmp_path):
    "It is noted, its years are masked, no loss and no table sees its outcome"
    folder = shutil.copytree(made, tmp_path/'world')
    data = ExamData(csv_file=folder/'exams.csv', data_root=folder, height=48, width=32)
    exams = data.read().of('val')
    dataset = ExamDataset(exams, data, ExamAugment(enabled=False))
    patients = [dataset[place]['group'] for place in range(9)]
    # the next sample is of another patient: it does not see this exam as an earlier one
    damaged = next(place for place in range(1, 8) if patients[place] != patients[place + 1])
    places = range(damaged - 1, damaged + 2)
    whole = [dataset[place] for place in places]
    for path in exams.paths[dataset.rows[damaged]]:
        (folder/path).write_bytes(b'cut off')
    batch = default_collate([dataset[place] for place in places])
    assert [place for place in places if dataset.unread[place]] == [damaged]
    assert batch['y_mask'].any(1).tolist() == [True, False, True]
    cfg = find_system('survival').Config(data=data.model_dump(), model=dict(name='OA-BreaCR'))
    task = find_system('survival').task(cfg, None)
    torch.manual_seed(0)
    heads = {name: torch.randn(3, 5) for name in ('risk', 'current', 'change')}
    out = heads | dict(log_p=torch.randn(3, 6).log_softmax(1), mean=torch.randn(3, 4), log_var=torch.zeros(3, 4),
                       alignment=torch.zeros(3))
    assert task.rows(out, batch)['sample'] == [sample['sample'] for sample in whole if sample['sample'] !=
                                               dataset.names[damaged]]
    scores = task.train_meter()
    scores.update(out, batch)
    assert [row[0] for row in scores.rows] == [whole[0]['time'], whole[2]['time']]
    # whatever its outcome was, losses and counts are the same
    other = batch | dict(y_seq=batch['y_seq'].index_fill(0, torch.tensor([1]), 1.))
    for one, two in ((task.loss(out, batch), task.loss(out, other)), (task.count(batch), task.count(other))):
        assert {name: float(value) for name, value in one.items()} == {name: float(v) for name, v in two.items()}

def test_bits_that_a_png_does_not_use_are_declared(tmp_path):
    "Values of 12 bits in a PNG of 16: one window for all, whatever an image holds"
    pixels = np.uint16([[0, 100, 4095, 7]])
    cv2.imwrite(str(tmp_path/'x.png'), pixels)
    assert read_mammogram(tmp_path, 'x.png', 12).tolist() == (pixels.astype(int) * 65535 // 4095).tolist()
    with pytest.raises(DataError, match='a value of 4095 where data.bits declares 10: at most 1023'):
        read_mammogram(tmp_path, 'x.png', 10)
    with pytest.raises(DataError, match='16 bits where data.bits declares 8'):
        read_mammogram(tmp_path, 'x.png', 8)

def test_views_of_a_sample_share_their_scale_and_their_light(made):
    "A disc of one size in all views is of one size after augmentation, wherever it lies; and so is its brightness"
    data = ExamData(csv_file=made/'exams.csv', data_root=made, height=64, width=64, mean=0, std=1, chest_left=False)
    dataset = ExamDataset(data.read().of('train'), data, ExamAugment())
    place = next(place for place, row in enumerate(dataset.rows) if dataset.exams.priors[row])
    disc = np.uint16(30000 * (np.hypot(*(np.mgrid[:64, :64] - 32)) < 12))
    dataset.exams = SimpleNamespace(table=dataset.exams.table, priors=dataset.exams.priors, paths=dataset.exams.paths,
                                    image=lambda row, view: disc)
    areas = set()
    for draw in range(12):
        images = dataset[7, 0, place, draw]['image'].flatten(0, 2)
        size, light = (images > 0).sum((1, 2)).float(), images.amax((1, 2))
        assert (size - size.mean()).abs().max() < .06 * size.mean()
        torch.testing.assert_close(light, light[:1].expand(8), rtol=.02, atol=0)
        areas.add(round(float(size.mean())))
    assert max(areas) > 1.08 * min(areas)

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

def test_exams_of_two_patients_may_have_one_name(world):
    "As where a list counts the exams of each patient: none is lost"
    folder, rows = world
    rows['exam_id'] = rows.exam_id.str[-2:]
    assert problems((folder, rows)) == []
    data = ExamData(csv_file=folder/'exams.csv', data_root=folder, height=48, width=32)
    names = ExamDataset(data.read(), data, ExamAugment()).names
    assert names.is_unique and len(names) == len(data.read().samples())

DATES = {
    'an exam after the diagnosis': (dict(diagnosed_date_year='2005', Time_to_Cancer_Years='0'), 'after the diagnosis'),
    'a wait that is too long': (dict(diagnosed_date_year='2012', Time_to_Cancer_Years='9', years_last_followup='9'),
                                'Time_to_Cancer_Years 9: the diagnosis of 2012 is'),
    'follow-up that ends before the cancer': (
        dict(diagnosed_date_year='2014', study_date_year='2010', Time_to_Cancer_Years='4', years_last_followup='1'),
        'ends before the cancer, 4 years after the exam'),
    'a diagnosis without a wait': (dict(diagnosed_date_year='2014', Time_to_Cancer_Years=''),
                                   'Time_to_Cancer_Years: empty'),
    'a wait without a diagnosis': (dict(diagnosed_date_year='', Time_to_Cancer_Years='2'),
                                   'diagnosed_date_year: empty'),
    'rows of an exam that disagree': (dict(years_last_followup='30'), ': years_last_followup'),
    'follow-up that ends before a later exam': (dict(years_last_followup='0'), 'years_last_followup: ends in'),
    'a code of another data set': (dict(density='40'), "row 1, density '40': EMBED has 1 to 5"),
}

@pytest.mark.parametrize('name', DATES)
def test_years_that_contradict_each_other(world, name):
    cells, words = DATES[name]
    folder, rows = world
    change(0, **cells)(folder, rows)
    assert any(words in line for line in problems(world)), problems(world)

def test_images_are_found_by_their_names(world):
    "Without a column path, as the public benchmark lays them out; the same exams"
    folder, rows = world
    rows.to_csv(folder/'exams.csv', index=False)
    named = ExamTable.read(folder/'exams.csv', folder)
    without = rows.drop(columns='path')
    without.to_csv(folder/'exams.csv', index=False)
    assert ExamTable.read(folder/'exams.csv', folder).paths == named.paths
    (folder/rows.path[5]).unlink()
    found, = problems((folder, without))
    assert found.startswith('exams.csv: row 6, path: no such file')

# ---------------------------------------------------------------- importers
EMBED_TABLE = """empi_anon,acc_anon,ImageLateralityFinal,ViewPosition,anon_dicom_path,study_date_anon,FinalImageType
1,11,L,CC,a/1.dcm,2014-03-02,2D
1,11,L,CC,a/2.dcm,2014-03-02,2D
1,11,R,MLO,a/3.dcm,2014-03-02,cview
1,12,L,MLO,a/4.dcm,2016-05-01,2D
1,13,L,CC,a/5.dcm,2018-05-01,2D
2,21,R,CC,b/1.dcm,2015-01-01,2D
2,22,R,XCCL,b/2.dcm,2018-01-01,2D
3,31,R,CC,c/1.dcm,2015-01-01,2D
4,41,R,CC,d/1.dcm,2015-01-01,2D
"""
EMBED_FINDINGS = """empi_anon,acc_anon,side,asses,path_severity,procdate_anon,study_date_anon,tissueden
1,11,L,N,,,2014-03-02,2.0
1,12,L,S,0,2017-02-01,2016-05-01,2.0
2,21,R,N,,,2015-01-01,3.0
3,31,R,S,,,2015-01-01,3.0
4,41,R,K,,,2015-01-01,4.0
"""
CSAW_TABLE = """anon_patientid,exam_year,imagelaterality,viewposition,anon_filename,rad_timing,x_case,x_type,\
libra_percentdensity
1,2010,Left,CC,1a.dcm,,1,2,20.5
1,2012,Left,CC,1b.dcm,,1,2,20.5
1,2014,Left,CC,1c.dcm,2,1,2,20.5
2,2011,Right,MLO,2a.dcm,,0,,30
2,2013,Right,MLO,2b.dcm,,0,,30
3,2013,Right,MLO,3a.dcm,,1,1,30
4,2013,Right,MLO,4a.dcm,1,1,1,30
"""

def test_embed_is_imported_by_its_rules(tmp_path):
    "Cancer proven in 2017; watched to 2018; a suspicion without an outcome is left out; K is a cancer of its own year"
    (tmp_path/'images.csv').write_text(EMBED_TABLE)
    (tmp_path/'clinical.csv').write_text(EMBED_FINDINGS)
    found, left_out = import_embed(tmp_path/'images.csv', tmp_path/'clinical.csv', suffix='.png')
    columns = ['path', 'study_date_year', 'diagnosed_date_year', 'Time_to_Cancer_Years', 'years_last_followup',
               'density', 'cancer_type']
    assert found[columns].values.tolist() == [
        ['a/1.png', '2014', '2017', '3', '4', '2', '0'], ['a/4.png', '2016', '2017', '1', '2', '2', '0'],
        ['b/1.png', '2015', '', '', '3', '3', ''], ['d/1.png', '2015', '2015', '0', '0', '4', '']]
    assert list(left_out.values()) == [1, 1, 1, 1, 1]

def test_csaw_is_imported_by_its_rules(tmp_path):
    "An interval cancer is found in the year after the last exam; a case without a timing is left out"
    (tmp_path/'csaw.csv').write_text(CSAW_TABLE)
    found, left_out = import_csaw(tmp_path/'csaw.csv')
    columns = ['path', 'ImageLaterality', 'diagnosed_date_year', 'Time_to_Cancer_Years', 'years_last_followup']
    assert found[columns].values.tolist() == [
        ['1a.dcm', 'L', '2015', '5', '5'], ['1b.dcm', 'L', '2015', '3', '3'], ['1c.dcm', 'L', '2015', '1', '1'],
        ['2a.dcm', 'R', '', '', '2'], ['2b.dcm', 'R', '', '', '0'], ['4a.dcm', 'R', '2013', '0', '0']]
    assert left_out['outcome unknown'] == 1

def test_what_is_imported_passes_the_audit(tmp_path):
    "Of forty patients, each split has some, and no patient is in two"
    lines = [f'{patient},{year},{side},CC,{patient}_{year}_{side}.dcm,,0,,30' for patient in range(40)
             for year in (2010, 2012) for side in ('Left', 'Right')]
    (tmp_path/'csaw.csv').write_text('\n'.join([CSAW_TABLE.splitlines()[0], *lines]))
    found, _ = import_csaw(tmp_path/'csaw.csv', suffix='.png')
    for path in found.path:
        cv2.imwrite(str(tmp_path/path), np.zeros((4, 4), np.uint16))
    found.to_csv(tmp_path/'exams.csv', index=False)
    exams = ExamTable.read(tmp_path/'exams.csv', tmp_path, 'CSAW')
    assert exams.table.groupby('patient_id').split.nunique().max() == 1
    assert exams.table.split.value_counts().to_dict() == dict(train=56, val=12, test=12)

def test_tables_of_other_columns_and_dates_are_refused(tmp_path):
    (tmp_path/'csaw.csv').write_text(CSAW_TABLE.replace('rad_timing', 'timing').replace('x_case', 'case'))
    with pytest.raises(DataError, match='(?s)no column .rad_timing.*no column .x_case'):
        import_csaw(tmp_path/'csaw.csv')
    (tmp_path/'images.csv').write_text(EMBED_TABLE.replace('2018-05-01', 'May'))
    (tmp_path/'clinical.csv').write_text(EMBED_FINDINGS)
    with pytest.raises(DataError, match="row 5, date 'May': not a date"):
        import_embed(tmp_path/'images.csv', tmp_path/'clinical.csv')

# ---------------------------------------------------------------- DICOM
def write_dicom(path, pixels, bits, kind):
    "A mammogram as a detector stores it"
    pydicom = pytest.importorskip('pydicom')
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.DigitalMammographyXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    image = pydicom.dataset.FileDataset(path, {}, file_meta=meta, preamble=b'\0' * 128)
    image.Rows, image.Columns = pixels.shape
    image.SamplesPerPixel, image.PhotometricInterpretation, image.PixelRepresentation = 1, kind, 0
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, bits, bits - 1
    image.PixelData = pixels.tobytes()
    image.save_as(path)

@pytest.mark.parametrize('kind', ['MONOCHROME1', 'MONOCHROME2'])
def test_dicom_is_stretched_to_16_bits_with_dense_as_white(tmp_path, kind):
    pixels = np.random.default_rng(0).integers(4096, size=(8, 6)).astype(np.uint16)
    pixels[0, :2] = 0, 4095
    write_dicom(tmp_path/'x.dcm', pixels if kind == 'MONOCHROME2' else 4095 - pixels, 12, kind)
    found = read_mammogram(tmp_path, 'x.dcm')
    assert found.dtype == np.uint16 and found[0, :2].tolist() == [0, 65535]
    np.testing.assert_array_equal(found, pixels.astype(int) * 65535 // 4095)

def test_a_damaged_dicom_is_named(tmp_path):
    pytest.importorskip('pydicom')
    (tmp_path/'x.dcm').write_bytes(b'no image')
    with pytest.raises(DataError, match='x.dcm: not a DICOM image'):
        read_mammogram(tmp_path, 'x.dcm')

def test_dicom_without_pydicom_says_what_to_install(world, monkeypatch):
    folder, rows = world
    rows['path'] = rows.path.str.replace('.png', '.dcm')
    for path in folder.glob('*/*.png'):
        path.rename(path.with_suffix('.dcm'))
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    assert any("pip install 'rtsseg[dicom]'" in line for line in problems(world))

# ---------------------------------------------------------------- cheats
def features(exams):
    "Of each exam, by name: what could give the outcome away without a look into the breast"
    found = {name: [] for name in ('border pixels', 'brightness', 'table')}
    for row in range(len(exams)):
        views = np.stack([exams.image(row, view) for view in range(4)]) / 65535
        edges = views[:, 0], views[:, -1], views[:, :, 0], views[:, :, -1]
        found['border pixels'].append(np.concatenate([edge.reshape(4, -1, 8).mean(2).ravel() for edge in edges]))
        found['brightness'].append([*views.mean((1, 2)), *views.std((1, 2)), *views.max((1, 2))])
        found['table'].append([float(exams.table.density[row]), exams.table.study_year[row], len(exams.priors[row])])
    return {name: np.array(rows) for name, rows in found.items()}

def test_the_made_up_world_cannot_be_cheated(tmp_path):
    "The truth orders patients far better than border pixels, brightness or the table, learned on half of them"
    make_phantom_world(tmp_path, PhantomWorld(patients=300, height=48, width=32))
    exams = ExamTable.read(tmp_path/'exams.csv', tmp_path)
    labels, given = exams.labels(), features(exams)
    truth = pd.read_csv(tmp_path/'truth.csv').log_hazard.to_numpy()
    known = labels.time > 0
    # patients by turns
    half = exams.table.patient_id.factorize()[0] % 2 == 0
    fit, judged = known & half, known & ~half

    def index(risk):
        return concordance(labels.time[judged], labels.event[judged], risk)

    assert index(truth[judged]) > .82
    for name, values in given.items():
        model = RandomForestRegressor(200, min_samples_leaf=8, random_state=0)
        model.fit(values[fit], labels.event[fit] / labels.time[fit])
        assert index(model.predict(values[judged])) < .65, name
