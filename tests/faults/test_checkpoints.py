"Faults 26 to 30: checkpoints that cannot be trusted"
import contextlib
import io
import os
import pickle
import re
import shutil
import signal

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import rtsseg.checkpoint
import rtsseg.cli
import rtsseg.training
from helpers.loop import At, Nothing, Points, Scripted, equal, flat, net, run, stop, weights
from rtsseg.checkpoint import MAGIC, CheckpointError, load_state, newest_state, save_state
from rtsseg.config import load, to_yaml
from rtsseg.launch import StopSignals
from rtsseg.runs import Stopped
from rtsseg.toy import tiny_toy

FAULTS = {
    26: ('the newest checkpoint is cut off', 'the one before it is used, with a note; the run ends in the same bits'),
    27: ('a bit of a checkpoint is flipped', 'the one before it is used, with a note; damaged best weights are found '
                                             'again, where a checkpoint from before them is left'),
    28: ('all checkpoints are damaged, or are of another model or version',
         'refused: never a silent start from the beginning'),
    29: ('a checkpoint carries code', 'refused; the code is not run'),
    30: ('the run is asked to stop while the averaged weights are judged',
         'it stops; the weights that train are saved as such, the average beside them')}

# 6 steps an epoch
CFG = dict(epochs=6, checkpoint=dict(every=2))

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "Toys are faster with one thread"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

def again(folder=None, seed=9, **more):
    "The run of these tests, begun or resumed"
    return run(folder, model=net(seed, norm=True), **CFG | more)

@pytest.fixture(scope='module')
def undisturbed():
    return again(seed=0)

@pytest.fixture(scope='module')
def half(tmp_path_factory):
    "A run that was stopped in its fifth epoch: resume.ckpt, best.ckpt and the checkpoints of epochs 2 and 4"
    folder = tmp_path_factory.mktemp('half')
    again(folder, 0, observers=[At(27, stop)])
    return folder

def copied(folder, to):
    shutil.copytree(folder, to)
    return to

def cut_end(data):
    return data[:-100]

def damage(folder, *names, how=cut_end):
    "Change the bytes of checkpoints"
    for name in names:
        path = folder/'checkpoints'/f'{name}.ckpt'
        path.write_bytes(how(path.read_bytes()))

def contents(folder):
    return {f.relative_to(folder): f.read_bytes() for f in folder.rglob('*') if f.is_file() and f.name != '.lock'}

@pytest.fixture(scope='module')
def real(tmp_path_factory):
    "The config of a run from real files, its finished folder, and one that was stopped in its third and last epoch"
    home = tmp_path_factory.mktemp('real')
    cfg = load(overrides=['augment.enabled=false', 'loader.num_workers=0', 'tracker.kind=none'], name='tiny',
               runs=home/'whole', device='cpu', epochs=3, batch_size=8, val_frequency=1, freeze_backbone_epochs=0,
               checkpoint=dict(every=1), data=dict(manifest=tiny_toy(home), tile_size=64, split_check='warn'),
               sampler=dict(curriculum=[dict(first=1, last=4, ratio=1)]),
               model=dict(architecture='unet', encoder='tu-test_efficientnet', weights=None,
                          options=dict(decoder_channels=[16, 8, 8, 8, 8])))
    whole = rtsseg.training.train(cfg)
    steps = load_state(whole/'checkpoints'/'resume.ckpt')['step']
    with pytest.raises(Stopped):
        rtsseg.training.train(cfg.model_copy(update=dict(runs=home/'half')), [At(steps - 1, stop)])
    return cfg, whole, home/'half'

def model_bytes(folder):
    return (folder/'model'/'model.safetensors').read_bytes()

def folder_of(cfg):
    folder, = cfg.runs.glob('tiny/*/seed42')
    return folder

# ---------------------------------------------------------------- 26, 27: the newest is damaged
@pytest.mark.parametrize('part', [0, .001, .004, .01, *(i / 16 for i in range(1, 16)), .9999])
def test_26_the_newest_is_cut_off(half, undisturbed, tmp_path, capsys, part):
    "Wherever a checkpoint is cut off, a note says so, and the run resumes from the one before it, to the same bits"
    folder = copied(half, tmp_path/'run')
    damage(folder, 'resume', how=lambda data: data[:int(part * len(data))])
    equal(undisturbed, again(folder))
    said = capsys.readouterr().err
    assert said.startswith('note: resume.ckpt is ') and 'Resuming from epoch-0004.ckpt' in said

def test_26_a_real_run_ends_in_the_same_bytes(real, tmp_path, capsys):
    "A run from real files whose newest checkpoint is cut off gives the same model, byte for byte"
    cfg, whole, stopped = real
    cfg = cfg.model_copy(update=dict(runs=copied(stopped, tmp_path/'runs')))
    damage(folder_of(cfg), 'resume')
    folder = rtsseg.training.train(cfg)
    why = 'resume.ckpt is damaged: its content does not match its seal. Resuming from epoch-0002.ckpt'
    assert why in capsys.readouterr().err
    assert model_bytes(folder) == model_bytes(whole)

def test_26_long_before_one_is_kept_by_epoch(undisturbed, tmp_path, capsys):
    "Each resume checkpoint leaves the one before it in place, which the end of the run removes"
    rare = dict(checkpoint=dict(every=9, resume_minutes=1e-9))
    again(tmp_path, 0, observers=[At(4, stop)], **rare)
    damage(tmp_path, 'resume')
    assert load_state(tmp_path/'checkpoints'/'before.ckpt')['step'] == 3
    equal(undisturbed, again(tmp_path, **rare))
    assert 'Resuming from before.ckpt, which is older' in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path/'checkpoints').iterdir()) == ['best.ckpt', 'resume.ckpt']

def test_26_a_file_that_cannot_be_read(half, undisturbed, tmp_path, capsys):
    "A checkpoint that the disk does not give (here: a folder in its place) counts as damaged"
    folder = copied(half, tmp_path/'run')
    (folder/'checkpoints'/'epoch-0009.ckpt').mkdir()
    equal(undisturbed, again(folder))
    assert 'epoch-0009.ckpt cannot be read' in capsys.readouterr().err

@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    "Two checkpoints, of steps 10 and 20"
    folder = tmp_path_factory.mktemp('pair')
    for step in (10, 20):
        save_state(folder/f'epoch-{step:04d}.ckpt', dict(step=step, w=torch.arange(50.)))
    return folder, (folder/'epoch-0020.ckpt').read_bytes()

@settings(max_examples=60, deadline=None)
@given(at=st.floats(0, .9999), bit=st.integers(0, 7), cut=st.booleans())
@example(at=0., bit=0, cut=True)
# the step
@example(at=.008, bit=0, cut=False)
def test_27_any_flipped_bit(pair, at, bit, cut):
    "A flipped bit in the head, the seal or the content is noticed and noted, and the checkpoint before it is used"
    folder, good = pair
    path, i = folder/'epoch-0020.ckpt', int(at * len(good))
    data = bytearray(good)
    data[i] ^= 1 << bit
    path.write_bytes(good[:i] if cut else bytes(data))
    with pytest.raises(CheckpointError):
        load_state(path)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert newest_state(folder)['step'] == 10
    assert 'epoch-0020.ckpt' in said.getvalue()
    path.write_bytes(good)
    assert newest_state(folder)['step'] == 20

# the fifth validation is the best
FOUND = [.1, .2, .3, .4, .9, .5]

def spoil_best(path, how):
    "Make best.ckpt a file that does not hold the best weights"
    good = load_state(path)
    if how == 'damaged':
        path.write_bytes(cut_end(path.read_bytes()))
    elif how == 'missing':
        path.unlink()
    elif how == 'older':
        save_state(path, good | dict(best=dict(good['best'], step=24)))
    else:
        save_state(path, dict(step=99))

@pytest.mark.parametrize('how', ['damaged', 'missing', 'older', 'of another kind'])
def test_27_the_best_weights_are_damaged(tmp_path, capsys, how):
    """A state whose best weights are lost is not resumed from: the run falls back to before they were found, finds them
    again, and ends in the same bits"""
    whole = again(tmp_path/'whole', 0, task=Scripted(FOUND))
    folder = tmp_path/'run'
    again(folder, 0, task=Scripted(FOUND), observers=[At(33, stop)])
    spoil_best(folder/'checkpoints'/'best.ckpt', how)
    # stopped once more before it has found them
    again(folder, task=Scripted(FOUND[4:]), observers=[At(26, stop)])
    said = capsys.readouterr().err
    assert said.startswith('note: best.ckpt ') and 'Resuming from epoch-0004.ckpt' in said
    equal(whole, again(folder, task=Scripted(FOUND[4:])))
    best = (folder/'checkpoints'/'best.ckpt').read_bytes()
    assert best == (tmp_path/'whole'/'checkpoints'/'best.ckpt').read_bytes()

# ---------------------------------------------------------------- 28: nothing to resume from
def test_28_all_are_damaged(half, tmp_path):
    "A run none of whose checkpoints can be read is refused, all of them named; nothing is overwritten"
    folder = copied(half, tmp_path/'run')
    names = 'resume', 'epoch-0004', 'epoch-0002'
    damage(folder, *names)
    before = contents(folder)
    said = 'the run cannot be resumed: ' + '.*; '.join(f'{name}.ckpt is damaged' for name in names) + '.*start over'
    with pytest.raises(CheckpointError, match=said):
        again(folder)
    assert contents(folder) == before

@pytest.mark.parametrize('names', [['resume', 'epoch-0001', 'epoch-0002'], ['best']])
def test_28_the_command_refuses(real, tmp_path, capsys, names):
    "rtsseg-train ends with code 2 and one line that names the files; no weights are made, the folder stays as it was"
    cfg, _, stopped = real
    cfg = cfg.model_copy(update=dict(runs=copied(stopped, tmp_path/'runs')))
    folder = folder_of(cfg)
    if names == ['best']:
        # no state is from before the best weights
        for name in ('epoch-0001', 'epoch-0002'):
            (folder/'checkpoints'/f'{name}.ckpt').unlink()
    damage(folder, *names)
    before = contents(folder)
    (tmp_path/'cfg.yaml').write_text(to_yaml(cfg))
    with pytest.raises(SystemExit) as left:
        rtsseg.cli.rtsseg_train(config=str(tmp_path/'cfg.yaml'), inline=True)
    assert left.value.code == 2 and contents(folder) == before
    line, = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
    assert all(f'{name}.ckpt is damaged' in line for name in names) and '--fresh' in line

def test_28_the_best_weights_are_damaged_as_the_run_ends(real, tmp_path):
    """Damaged best weights never become a model; the same command finds them again, from a checkpoint before them, and
    ends in the same bytes"""
    class Breaks:
        def on_end(self, run):
            damage(run.folder, 'best')

    cfg, whole, _ = real
    cfg = cfg.model_copy(update=dict(runs=tmp_path/'runs'))
    assert load_state(whole/'checkpoints'/'best.ckpt')['best']['epoch'] > 1
    with pytest.raises(CheckpointError, match='best.ckpt is damaged'):
        rtsseg.training.train(cfg, [Breaks()])
    assert not (folder_of(cfg)/'model').exists()
    assert model_bytes(rtsseg.training.train(cfg)) == model_bytes(whole)

def changed_optimizer(saved, **change):
    return saved | dict(optimizer=dict(saved['optimizer'], **change))

def other_shapes(state):
    return state | dict(model={k: v[:1] for k, v in state['model'].items() if v.ndim})

def other_names(state):
    return state | dict(model={f'{k}x': v for k, v in state['model'].items()})

def fewer_groups(state):
    return changed_optimizer(state, param_groups=state['optimizer']['param_groups'][:1])

def turned_moments(state):
    moments = {}
    for i, values in state['optimizer']['state'].items():
        moments[i] = {name: v.T if v.ndim > 1 else v for name, v in values.items()}
    return changed_optimizer(state, state=moments)

def no_history(state):
    return {k: v for k, v in state.items() if k != 'history'}

@pytest.mark.parametrize('change, why', [
    (other_shapes, 'RuntimeError: Error'),
    (other_names, 'RuntimeError: Error'),
    (lambda state: state | dict(average={}), "KeyError: 'module'"),
    (fewer_groups, 'ValueError: '),
    (turned_moments, 'moments of other shapes'),
    (lambda state: state | dict(stopper=dict(patience=3)), 'TypeError: '),
    (lambda state: state | dict(plateau=dict(patience=3)), 'TypeError: '),
    (no_history, "KeyError: 'history'"),
    (lambda state: state | dict(model=None), 'TypeError: ')],
    ids=['other shapes', 'other names', 'no average', 'fewer groups', 'turned moments', 'another stopper',
         'another plateau', 'no history', 'no model'])
def test_28_a_state_of_another_model(half, tmp_path, change, why):
    "A whole checkpoint that does not fit, of another model or version, is refused with a message"
    folder = copied(half, tmp_path/'run')
    for path in (folder/'checkpoints').glob('[!b]*.ckpt'):
        save_state(path, change(load_state(path)))
    before = contents(folder)
    with pytest.raises(CheckpointError, match='of another model, or of another version') as e:
        again(folder)
    assert why in str(e.value) and contents(folder) == before

@pytest.mark.parametrize('start, why', [
    (MAGIC[:-1] + b'9', 'a checkpoint of another version of this library'),
    (b'PK', 'not a checkpoint of this library'),
    (b'', 'not a checkpoint of this library')])
def test_28_a_file_of_another_version(tmp_path, start, why):
    "The message says whether a file is damaged, of another version, or not a checkpoint at all"
    (tmp_path/'resume.ckpt').write_bytes(start + bytes(len(start) * 99))
    with pytest.raises(CheckpointError, match=why):
        newest_state(tmp_path)

# ---------------------------------------------------------------- 29: code
class Evil:
    "Makes a folder when it is unpickled"
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)

def evil_file(path, target, how, monkeypatch):
    "A checkpoint that would run code, sealed or not, or one that names a class"
    if how == 'not sealed':
        path.write_bytes(pickle.dumps(Evil(target), 2))
        return
    if how == 'sealed':
        evil = pickle.dumps(Evil(target), 2)
        monkeypatch.setattr(rtsseg.checkpoint.torch, 'save', lambda state, out: out.write(evil))
    save_state(path, dict(step=1, evil=Evil(target)))
    monkeypatch.undo()

@pytest.mark.parametrize('how', ['sealed', 'not sealed', 'a class'])
def test_29_a_checkpoint_cannot_run_code(tmp_path, monkeypatch, how):
    "A file that would make a folder when it is unpickled, and one that names a class: refused, and no folder is made"
    path = tmp_path/'run'/'checkpoints'/'resume.ckpt'
    path.parent.mkdir(parents=True)
    evil_file(path, tmp_path/'made', how, monkeypatch)
    why = 'not a checkpoint of this library' if how == 'not sealed' else 'cannot be read: UnpicklingError'
    with pytest.raises(CheckpointError, match=why):
        load_state(path)
    with pytest.raises(CheckpointError, match='the run cannot be resumed'):
        again(tmp_path/'run')
    assert not (tmp_path/'made').exists()

@pytest.mark.parametrize('change', [
    dict(skipped='1'), dict(epoch=-1), dict(batch=-3), dict(best=5), dict(best=dict(step='x')), dict(history=[1]),
    dict(finished=1), dict(sums=[]), dict(gradient=[]), dict(meter_states={}), dict(plateau=[])])
def test_29_sealed_states_of_odd_types(tmp_path, change):
    "Anybody can seal a file: the types of what it holds are checked all the same"
    run(tmp_path, epochs=1)
    path = tmp_path/'checkpoints'/'resume.ckpt'
    save_state(path, load_state(path) | change)
    with pytest.raises(CheckpointError, match=re.escape('resume.ckpt is sealed, but does not hold the state of a run')):
        run(tmp_path)

# ---------------------------------------------------------------- 30: which weights are saved
def test_30_sigterm_while_the_average_is_judged(undisturbed, tmp_path):
    """Asked to stop in the middle of a validation, the run saves the weights that train as the model and the averaged
    ones beside them, and resumes as if undisturbed"""
    class Asks(Points):
        def meter(self):
            meter = Nothing()
            meter.update = lambda out, batch: os.kill(os.getpid(), signal.SIGTERM)
            return meter

    with StopSignals() as signals:
        stopped = again(tmp_path, 0, task=Asks(), observers=[signals])
    # all of epoch 1 is trained, and nothing is judged
    assert stopped.reason == 'SIGTERM' and stopped.batch == 6 and not stopped.history and not stopped.best
    saved = load_state(tmp_path/'checkpoints'/'resume.ckpt')
    model, average = flat(saved['model']), flat(saved['average']['module'])
    assert torch.equal(model, weights(stopped.model)) and torch.equal(average, weights(stopped.average.module))
    assert not torch.equal(model, average)
    equal(undisturbed, again(tmp_path))
