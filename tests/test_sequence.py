"Sequences of steps: what gains is carried, what fails costs its row, and the same command resumes"
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers.refiners import FindsNothing, KnowsTruth
from helpers.shell import shell
from rtsseg import sequence
from rtsseg.class_world import make_class_world
from rtsseg.config import ConfigError, RunConfig, find_system, load, to_yaml
from rtsseg.console import DataError
from rtsseg.runs import flatten, read_log, run_config
from rtsseg.sequence import Verdict, judge_step, read_sequence, run_sequence
from rtsseg.system import SampleTable, System
from rtsseg.training import train

ROOT = Path(__file__).resolve().parent.parent
SYSTEM = find_system('landcover')

# ------------------------------------------------ the rule

class Means(System):
    "The mean of a column, in groups of one sample"
    def __init__(self, mode='max'):
        self.mode = mode

    def monitor(self, cfg):
        return 'mean', self.mode

    def metrics(self, table, cfg, weights=None):
        return dict(mean=float(np.average(table['value'], weights=weights)))

def table_of(values):
    names = [str(n) for n in range(len(values))]
    return SampleTable(pd.DataFrame(dict(sample=names, group=names, value=values)))

BASE = np.random.default_rng(0).normal(size=400)
# a change whose standard error is 1 / √400 = .05
NOISE = np.random.default_rng(1).normal(size=400)
NOISE = (NOISE - NOISE.mean()) / NOISE.std()

@pytest.mark.parametrize('change, least, mode, text', [
    (.15, 0, 'max', 'gain'), (.07, 0, 'max', 'noise'), (-.07, 0, 'max', 'noise'), (-.15, 0, 'max', 'loss'),
    (.15, .2, 'max', 'below least_gain'), (.25, .2, 'max', 'gain'), (.15, 0, 'min', 'loss'), (-.15, 0, 'min', 'gain')])
def test_a_step_is_carried_where_it_gains_more_than_two_sigma(change, least, mode, text):
    verdict = judge_step(Means(mode), RunConfig(), table_of(BASE), table_of(BASE + NOISE + change), least)
    assert verdict.change == pytest.approx(change) and verdict.sigma == pytest.approx(.05, rel=.15)
    assert (verdict.text, verdict.carried) == (text, text == 'gain')

def test_equal_tables_are_noise_and_other_samples_an_error():
    assert judge_step(Means(), RunConfig(), table_of(BASE), table_of(BASE)).text == 'noise'
    with pytest.raises(ValueError, match='different samples'):
        judge_step(Means(), RunConfig(), table_of(BASE), table_of(BASE[:-1]))

# ------------------------------------------------ a run of it

STEPS = """
steps:
  - {name: baseline}
  - {name: longer, target: 0.75–0.80, set: {epochs: 6}}
  - {name: broken, set: {model.weights: nowhere/weights.pt, model.architecture: segformer, model.encoder: mit_b0}}
  - {name: views, files: [views.yaml], least_gain: 0.9}
  - {name: theirs, checkpoint: theirs}
  - {name: both, ensemble: [baseline, longer], weights: '0.4,0.6'}
  - {name: lost, ensemble: [longer, broken]}
  - {name: outlines, set: {finish: refined, refine: {where: all, model: nowhere.pt}}, trial: true}
"""

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A land, the steps, and a model directory from elsewhere"
    home = tmp_path_factory.mktemp('sequence')
    make_class_world(home/'land', side=64, images=12)
    (home/'steps.yaml').write_text(STEPS)
    (home/'views.yaml').write_text('name: views\nviews: flips\n')
    folder = train(config(home, runs=home/'elsewhere', seed=7, epochs=2))
    shutil.copytree(folder/'model', home/'theirs')
    return home

def config(home, **more):
    small = dict(runs=home/'runs', epochs=1, batch_size=2, tracker=dict(kind='none'), windows=dict(side=64, stride=64),
                 data=dict(source=home/'land', sides=[64], made=None))
    return load(ROOT/'configs'/'landcover'/'toy.yaml', **small | more)

@pytest.fixture(scope='module')
def outcome(home):
    return run_sequence(config(home), home/'steps.yaml', images=3)

def test_each_step_is_a_row(outcome):
    rows = {row.step: row for row in outcome.rows}
    assert list(rows) == ['baseline', 'longer', 'broken', 'views', 'theirs', 'both', 'lost', 'outlines']
    assert rows['baseline'].verdict.text == 'baseline' and rows['longer'].verdict.text == 'gain'
    assert rows['broken'].verdict.text == 'failed'
    assert not rows['views'].verdict.carried and rows['views'].columns['TTA'] == 'flips'
    for name in ('theirs', 'both'):
        assert rows[name].verdict.text.endswith('only compared') and rows[name].run.startswith(name)
    assert rows['lost'].verdict.text == rows['outlines'].verdict.text == 'failed'

def test_the_winner_is_carried(outcome, home):
    "Views were laid over the longer run, which they left as it is"
    rows = {row.step: row for row in outcome.rows}
    assert outcome.cfg.epochs == 6 and outcome.cfg.views == 'none'
    assert rows['views'].run == rows['longer'].run != rows['baseline'].run
    assert rows['longer'].verdict.change == pytest.approx(
        rows['longer'].columns['mIoU'] - rows['baseline'].columns['mIoU'])
    assert load(outcome.folder/'winner.yaml') == outcome.cfg
    assert run_config(home/'runs'/rows['longer'].run).views == 'none'

def test_numbers_are_those_of_the_runs(outcome, home):
    "mIoU of the best epoch, and boundary IoU at the wider of two widths"
    for row in outcome.rows[:2]:
        best = json.loads((home/'runs'/row.run/'model'/'metrics.json').read_text())
        assert row.columns['mIoU'] == pytest.approx(best['metrics']['miou'])
        assert row.columns['bIoU'] == pytest.approx(best['metrics']['biou_3'])
        assert row.speed > 0

def test_the_table_has_the_columns_of_the_guide(outcome):
    wanted = ['Backbone', 'Pretrain', 'Loss', 'Aug', 'LR', 'Size', 'TTA', 'Post', 'mIoU', 'bIoU', 'FPS']
    frame = pd.read_csv(outcome.folder/'table.csv')
    assert [name for name in frame.columns if name in wanted] == wanted
    text, page = ((outcome.folder/name).read_text() for name in ('table.md', 'table.html'))
    for words in ('broken failed:', 'nowhere/weights.pt', '0.75–0.80', 'lost failed: ensemble: step broken failed',
                  'nowhere.pt', 'tu-test_efficientnet', '0.7 cross_entropy + 0.3 dice', '2σ'):
        assert words in text and words in page

def test_the_same_command_resumes(outcome, home, monkeypatch):
    "Nothing is trained or evaluated again, and the table is the same"
    def never(*args):
        raise AssertionError('evaluated again')

    before = pd.read_csv(outcome.folder/'table.csv')
    runs = {path: path.read_bytes() for path in (home/'runs'/'landcover_toy').rglob('log.jsonl')}
    monkeypatch.setattr(sequence, 'evaluate', never)
    again = run_sequence(config(home), home/'steps.yaml', images=3)
    assert again.folder == outcome.folder
    pd.testing.assert_frame_equal(pd.read_csv(again.folder/'table.csv'), before)
    assert {path: path.read_bytes() for path in runs} == runs

GATED = """
steps:
  - {name: baseline}
  - name: gated
    set:
      epochs: 2
      gate_epochs: 9
      loss: {parts: [cross_entropy, dice, lovasz]}
      loss_weights: {lovasz: 0}
      stages:
        - {first: 1, last: 1, rates: {encoder: 1e-3, decoder: 1e-3}}
        - {first: 2, last: 2, rates: {encoder: 1e-3, decoder: 1e-3}, gated: true, loss_weights: {lovasz: 0.1}}
"""

@pytest.mark.parametrize('opens, loss', [(True, '0.7 cross_entropy + 0.3 dice + 0.1 lovasz'),
                                         (False, '0.7 cross_entropy + 0.3 dice')])
def test_the_table_names_a_loss_only_where_its_gate_opened(opens, loss, home, tmp_path, monkeypatch):
    (tmp_path/'steps.yaml').write_text(GATED)
    def reaches(gate, value, mode):
        gate.milestone = .99
        return opens

    monkeypatch.setattr('rtsseg.schedule.LossGate.is_reached', reaches)
    found = run_sequence(config(home, runs=tmp_path/'runs'), tmp_path/'steps.yaml', images=3)
    rows = read_log(tmp_path/'runs'/found.rows[1].run)
    assert [row.get('loss_weight/lovasz') for row in rows] == [0, .1 if opens else 0]
    best = json.loads((tmp_path/'runs'/found.rows[1].run/'model'/'metrics.json').read_text())
    assert best['epoch'] == 2 and found.rows[1].columns['Loss'] == loss

# ------------------------------------------------ outlines that are drawn again

OUTLINES = """
steps:
  - {name: baseline}
  - {name: longer, set: {epochs: 2}}
  - {name: views, set: {views: flips}}
  - {name: outlines, set: {finish: refined, refine: {where: all, min_area: 4, model: sam.ts}}, trial: true}
  - {name: both, ensemble: [baseline, longer]}
  - {name: another, set: {epochs: 3}, trial: true}
"""

@pytest.mark.parametrize('passes', [True, False])
def test_a_trial_decides_about_outlines(passes, home, tmp_path, monkeypatch):
    "By boundary IoU, through the views that won; a model that is only compared is used as the winner is"
    (tmp_path/'steps.yaml').write_text(OUTLINES)
    (tmp_path/'sam.ts').write_text('a refiner')
    cfg = config(home, runs=tmp_path/'runs')
    refiner = KnowsTruth(SYSTEM.feed(cfg).samples, cfg.data.values) if passes else FindsNothing()
    monkeypatch.setattr('rtsseg.systems.landcover.load_refiner', lambda cfg, device: refiner)
    # steps without a trial are carried
    monkeypatch.setattr(sequence, 'judge_step', lambda *args: Verdict(.1, .01, True, 'gain'))
    found = run_sequence(cfg, tmp_path/'steps.yaml', images=3)
    rows = {row.step: row for row in found.rows}
    assert rows['views'].verdict.carried and rows['outlines'].verdict.carried == passes
    assert (found.cfg.views, found.cfg.finish) == ('flips', 'refined' if passes else 'none')
    assert rows['outlines'].verdict.text.startswith('trial passed, +' if passes else 'not kept: trial not passed')
    for name in ('outlines', 'both'):
        assert (rows[name].columns['TTA'], rows[name].columns['Post']) == ('flips', 'refined' if passes else '')
    assert rows['another'].verdict.text == 'failed'
    text = (found.folder/'table.md').read_text()
    assert 'points of boundary IoU' in text and 'needs another training' in text
    # started again, nothing is tried again
    monkeypatch.setattr('rtsseg.systems.landcover.refinement_arms', None)
    run_sequence(cfg, tmp_path/'steps.yaml', images=3)
    assert (found.folder/'table.md').read_text() == text

def test_it_refuses_to_start_where_a_check_fails(home, tmp_path):
    land = shutil.copytree(home/'land', tmp_path/'land')
    shutil.copy(land/'Val'/'Urban'/'images_png'/'0.png', land/'Train'/'Urban'/'images_png'/'0.png')
    cfg = config(home, runs=tmp_path/'runs', data=dict(source=land, sides=[64], made=None))
    with pytest.raises(DataError, match='5 splits'):
        run_sequence(cfg, home/'steps.yaml')
    assert not (tmp_path/'runs').exists()

@pytest.mark.parametrize('text, words', [
    ('steps: []', 'at least 1 item'),
    ('steps: [{name: a, filse: []}]', 'filse'),
    ('steps: [{name: a}, {name: b, files: [lost.yaml]}]', 'no such file'),
    ('steps: [{name: a}, {name: b, set: {lr.bse_lr: 1}}]', 'base_lr'),
    ('steps: [{name: a b}]', 'pattern'),
    ('steps: [{name: a}, {name: b, ensemble: [a]}]', 'two steps or more'),
    ('steps: [{name: a}, {name: b}, {name: c, ensemble: [a, d]}]', "no trained step 'd' before it"),
])
def test_a_file_that_is_wrong_is_refused_before_anything_is_trained(text, words, home, tmp_path):
    (tmp_path/'steps.yaml').write_text(text)
    with pytest.raises(ConfigError, match=words):
        run_sequence(config(home, runs=tmp_path/'runs'), tmp_path/'steps.yaml')
    assert not (tmp_path/'runs').exists()

def test_a_step_cannot_change_what_is_measured(home, tmp_path):
    (tmp_path/'steps.yaml').write_text('steps: [{name: a}, {name: b, set: {metrics.boundary_widths: [2]}}]')
    found = run_sequence(config(home, runs=tmp_path/'runs'), tmp_path/'steps.yaml', images=3)
    assert found.rows[1].verdict.text == 'failed'
    assert 'cannot change metrics' in (found.folder/'table.md').read_text()

def test_the_command(home, outcome, tmp_path):
    "On the finished sequence"
    (tmp_path/'cfg.yaml').write_text(to_yaml(config(home)))
    done = shell('rtsseg-sequence', '--config', tmp_path/'cfg.yaml', '--steps', home/'steps.yaml', '--images', '3')
    assert done.returncode == 0, done.stdout + done.stderr
    assert '| longer |' in done.stdout and 'trained already' in done.stdout

def test_the_guides_steps_are_configs():
    "Each is valid on the baseline, and laid over every choice of those before it: none takes a part of the loss away"
    base = load(ROOT/'configs'/'landcover'/'baseline.yaml')
    file = ROOT/'configs'/'landcover'/'sequence.yaml'
    steps = read_sequence(file).steps
    assert len(steps) == 8 and steps[-1].ensemble == ['earthvqa', 'distillation'] and steps[-1].weights == '0.6,0.4'
    carried = [base]
    for step in steps[1:-1]:
        fields = sequence.step_fields(step, type(base), file.parent)
        after = [sequence.with_fields(cfg, fields) for cfg in carried]
        for old, new in zip(carried, after, strict=True):
            assert set(old.loss_parts) <= set(new.loss_parts) and set(old.loss_weights) <= set(new.loss_weights)
            assert new.stages[-1:] == old.stages[-1:] or step.name == 'lovasz'
            assert step.name != 'earthvqa' or differing(old, new) == {'model.weights'}
        carried += after
    last = carried[-1]
    assert set(last.loss_parts) == {'cross_entropy', 'dice', 'lovasz', 'teacher_features'}
    assert last.stages[-1].loss_weights == dict(cross_entropy=.6, dice=.3, lovasz=.1)
    assert last.loss_weights['teacher_features'] == .5 and last.views == 'scales'

def differing(cfg, other):
    "Dotted settings that differ"
    ours, theirs = (flatten(one.model_dump()) for one in (cfg, other))
    return {name for name in ours | theirs if ours.get(name) != theirs.get(name)}

def test_a_stage_weighs_only_what_there_is():
    "So a step whose list of parts takes the place of another one cannot lose a part unseen"
    base, experiments = ROOT/'configs'/'landcover'/'baseline.yaml', ROOT/'configs'/'landcover'/'experiments'
    with pytest.raises(ConfigError, match='stages.2.loss_weights names lovasz'):
        load(base, experiments/'gated_lovasz.yaml', experiments/'edge_head.yaml')
