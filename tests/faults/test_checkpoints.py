"Faults 26 to 30: checkpoints that cannot be trusted"
import contextlib, io, os, pickle, shutil, signal, warnings

import pytest, torch
from hypothesis import example, given, settings, strategies as st

import rtsseg.cli, rtsseg.loop, rtsseg.training
from rtsseg.config import load, to_yaml
from rtsseg.checkpoint import CheckpointError, MAGIC, load_state, newest_state, save_state
from rtsseg.toy import tiny_toy
from rtsseg.runs import Stopped
from rtsseg.launch import StopSignals
from helpers.loop import At, Nothing, Points, Scripted, equal, net, run, stop, weights

FAULTS = {26: ('the newest checkpoint is cut off', 'the one before it is taken, aloud; the run ends in the same bits'),
          27: ('a bit of a checkpoint is flipped', 'the one before it is taken, aloud; best weights that are damaged are made anew, where a checkpoint from before them is left'),
          28: ('all checkpoints are damaged, or are of another model or version', 'refused: never a silent start from nothing'),
          29: ('a checkpoint carries code', 'refused; the code is not run'),
          30: ('the run is asked to stop while the averaged weights are judged', 'it stops; the weights that train are saved as such, the average beside them')}

CFG = dict(epochs=6, checkpoint=dict(every=2))      # 6 steps an epoch

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "Toys are faster so"
    before = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(before)

def again(folder=None, seed=9, **more): return run(folder, model=net(seed, norm=True), **CFG | more)

@pytest.fixture(scope='module')
def undisturbed(): return again(seed=0)

@pytest.fixture(scope='module')
def half(tmp_path_factory):
    "A run that was stopped in its fifth epoch: resume.ckpt, best.ckpt and the checkpoints of epochs 2 and 4"
    folder = tmp_path_factory.mktemp('half'); again(folder, 0, observers=[At(27, stop)])
    return folder

def copied(folder, to): shutil.copytree(folder, to); return to
def damage(folder, *names, how=lambda b: b[:-100]):
    for n in names: f = folder/'checkpoints'/f'{n}.ckpt'; f.write_bytes(how(f.read_bytes()))
def contents(folder): return {f.relative_to(folder): f.read_bytes() for f in folder.rglob('*') if f.is_file() and f.name != '.lock'}

@pytest.fixture(scope='module')
def real(tmp_path_factory):
    "The config of a run from real files, its undisturbed folder, and one that was stopped in its third and last epoch"
    at = tmp_path_factory.mktemp('real')
    cfg = load(overrides=['augment.enabled=false', 'loader.num_workers=0', 'tracker.kind=none'], name='tiny', runs=at/'whole', device='cpu', epochs=3, batch_size=8, val_frequency=1, freeze_backbone_epochs=0,
               checkpoint=dict(every=1), data=dict(manifest=tiny_toy(at), tile_size=64, split_check='warn'), sampler=dict(curriculum=[dict(first=1, last=4, ratio=1)]),
               model=dict(architecture='unet', encoder='tu-test_efficientnet', weights=None, options=dict(decoder_channels=[16, 8, 8, 8, 8])))
    whole = rtsseg.training.train(cfg); steps = load_state(whole/'checkpoints'/'resume.ckpt')['step']
    with pytest.raises(Stopped): rtsseg.training.train(cfg.model_copy(update=dict(runs=at/'half')), [At(steps - 1, stop)])
    return cfg, whole, at/'half'

# ---------------------------------------------------------------- 26, 27: the newest is damaged
@pytest.mark.parametrize('part', [0, .001, .004, .01, *(i / 16 for i in range(1, 16)), .9999])
def test_26_the_newest_is_cut_off(half, undisturbed, tmp_path, capsys, part):
    "Wherever a checkpoint is cut off, the run says so, goes on from the one before it and ends as if nothing had happened"
    folder = copied(half, tmp_path/'run'); damage(folder, 'resume', how=lambda b: b[:int(part * len(b))])
    equal(undisturbed, again(folder))
    said = capsys.readouterr().out
    assert said.startswith('note: resume.ckpt is ') and 'Going on from epoch-0004.ckpt' in said

def test_26_a_real_run_ends_in_the_same_bytes(real, tmp_path, capsys):
    "A run from real files whose newest checkpoint is cut off gives the same model, byte for byte"
    cfg, whole, stopped = real; cfg = cfg.model_copy(update=dict(runs=copied(stopped, tmp_path/'runs')))
    damage(next(cfg.runs.glob('tiny/*/seed42')), 'resume')
    folder = rtsseg.training.train(cfg)
    assert 'resume.ckpt is damaged: its content does not match its seal. Going on from epoch-0002.ckpt' in capsys.readouterr().out
    assert (folder/'model'/'model.safetensors').read_bytes() == (whole/'model'/'model.safetensors').read_bytes()

def test_26_long_before_one_is_kept_by_epoch(undisturbed, tmp_path, capsys):
    "Each resume checkpoint leaves the one before it in place, which the end of the run removes"
    rare = dict(checkpoint=dict(every=9, resume_minutes=1e-9)); again(tmp_path, 0, observers=[At(4, stop)], **rare); damage(tmp_path, 'resume')
    assert load_state(tmp_path/'checkpoints'/'before.ckpt')['step'] == 3
    equal(undisturbed, again(tmp_path, **rare)); assert 'Going on from before.ckpt, which is from before' in capsys.readouterr().out
    assert sorted(f.name for f in (tmp_path/'checkpoints').iterdir()) == ['best.ckpt', 'resume.ckpt']

def test_26_a_file_that_cannot_be_read(half, undisturbed, tmp_path, capsys):
    "A checkpoint that the disk does not give (here: a folder in its place) is as good as a damaged one"
    folder = copied(half, tmp_path/'run'); (folder/'checkpoints'/'epoch-0009.ckpt').mkdir()
    equal(undisturbed, again(folder)); assert 'epoch-0009.ckpt cannot be read' in capsys.readouterr().out

@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    "Two checkpoints, of steps 10 and 20"
    d = tmp_path_factory.mktemp('pair')
    for step in (10, 20): save_state(d/f'epoch-{step:04d}.ckpt', dict(step=step, w=torch.arange(50.)))
    return d, (d/'epoch-0020.ckpt').read_bytes()

@settings(max_examples=60, deadline=None)
@given(at=st.floats(0, .9999), bit=st.integers(0, 7), cut=st.booleans())
@example(at=0., bit=0, cut=True)
@example(at=.008, bit=0, cut=False)     # the step
def test_27_any_flipped_bit(pair, at, bit, cut):
    "Wherever the bit lies, in the head, the seal or the content: it is noticed, said, and the checkpoint before it is taken"
    d, good = pair; i = int(at * len(good)); data = bytearray(good); data[i] ^= 1 << bit
    (d/'epoch-0020.ckpt').write_bytes(good[:i] if cut else bytes(data))
    with pytest.raises(CheckpointError): load_state(d/'epoch-0020.ckpt')
    with contextlib.redirect_stdout(io.StringIO()) as said: assert newest_state(d)['step'] == 10
    assert 'epoch-0020.ckpt' in said.getvalue()
    (d/'epoch-0020.ckpt').write_bytes(good)
    assert newest_state(d)['step'] == 20

FOUND = [.1, .2, .3, .4, .9, .5]      # the fifth validation is the best

@pytest.mark.parametrize('how', ['damaged', 'missing', 'older', 'of another kind'])
def test_27_the_best_weights_are_damaged(tmp_path, capsys, how):
    "A state whose best weights are gone is not gone on from: the run falls back to before they were found, finds them again, and ends in the same bits"
    whole = again(tmp_path/'whole', 0, task=Scripted(FOUND)); folder = tmp_path/'run'; again(folder, 0, task=Scripted(FOUND), observers=[At(33, stop)])
    best = folder/'checkpoints'/'best.ckpt'; good = load_state(best)
    if how == 'damaged': damage(folder, 'best')
    elif how == 'missing': best.unlink()
    elif how == 'older': save_state(best, good | dict(best=dict(good['best'], step=24)))
    else: save_state(best, dict(step=99))
    again(folder, task=Scripted(FOUND[4:]), observers=[At(26, stop)])       # and is stopped before it has found them
    said = capsys.readouterr().out; assert said.startswith('note: best.ckpt ') and 'Going on from epoch-0004.ckpt' in said
    equal(whole, again(folder, task=Scripted(FOUND[4:])))
    assert best.read_bytes() == (tmp_path/'whole'/'checkpoints'/'best.ckpt').read_bytes()

# ---------------------------------------------------------------- 28: nothing to go on from
def test_28_all_are_damaged(half, tmp_path):
    "A run none of whose checkpoints can be read is refused, all of them named; nothing is overwritten"
    folder = copied(half, tmp_path/'run'); damage(folder, 'resume', 'epoch-0002', 'epoch-0004'); before = contents(folder)
    with pytest.raises(CheckpointError, match='no checkpoint to go on from: resume.ckpt is damaged.*; epoch-0004.ckpt is damaged.*; epoch-0002.ckpt is damaged.*start over'): again(folder)
    assert contents(folder) == before

@pytest.mark.parametrize('names', [['resume', 'epoch-0001', 'epoch-0002'], ['best']])
def test_28_the_command_refuses(real, tmp_path, monkeypatch, capsys, names):
    "rtsseg-train ends with code 2 and one line that names the files; no weights are made, and the folder stays as it was"
    cfg, whole, stopped = real; cfg = cfg.model_copy(update=dict(runs=copied(stopped, tmp_path/'runs'))); folder = next(cfg.runs.glob('tiny/*/seed42'))
    if names == ['best']:
        for n in ('epoch-0001', 'epoch-0002'): (folder/'checkpoints'/f'{n}.ckpt').unlink()      # no state is from before the best weights
    damage(folder, *names); before = contents(folder); (tmp_path/'cfg.yaml').write_text(to_yaml(cfg))
    monkeypatch.setattr(warnings, 'formatwarning', warnings.formatwarning)      # which the command changes
    with pytest.raises(SystemExit) as left: rtsseg.cli.rtsseg_train(config=str(tmp_path/'cfg.yaml'), inline=True)
    assert left.value.code == 2 and contents(folder) == before
    line, = [l for l in capsys.readouterr().err.splitlines() if l.startswith('error: ')]; assert all(f'{n}.ckpt is damaged' in line for n in names) and '--fresh' in line

def test_28_the_best_weights_are_damaged_as_the_run_ends(real, tmp_path):
    "Damaged best weights never become a model; the same command finds them again, from a checkpoint before them, and ends in the same bytes"
    cfg, whole = real[0].model_copy(update=dict(runs=tmp_path/'runs')), real[1]; assert load_state(whole/'checkpoints'/'best.ckpt')['best']['epoch'] > 1
    class Breaks:
        def on_end(self, run): damage(run.folder, 'best')
    with pytest.raises(CheckpointError, match='best.ckpt is damaged'): rtsseg.training.train(cfg, [Breaks()])
    folder, = cfg.runs.glob('tiny/*/seed42'); assert not (folder/'model').exists()
    assert (rtsseg.training.train(cfg)/'model'/'model.safetensors').read_bytes() == (whole/'model'/'model.safetensors').read_bytes()

@pytest.mark.parametrize('how,why', [
    (lambda s: s | dict(model={k: v[:1] for k, v in s['model'].items() if v.ndim}), 'RuntimeError: Error'),      # other shapes
    (lambda s: s | dict(model={k + 'x': v for k, v in s['model'].items()}), 'RuntimeError: Error'),               # other names
    (lambda s: s | dict(average={}), "KeyError: 'module'"),                                                       # saved without an average
    (lambda s: s | dict(optimizer=dict(s['optimizer'], param_groups=s['optimizer']['param_groups'][:1])), 'ValueError: '),
    (lambda s: s | dict(optimizer=dict(s['optimizer'], state={k: {n: v.T if v.ndim > 1 else v for n, v in m.items()} for k, m in s['optimizer']['state'].items()})), 'moments of other shapes'),
    (lambda s: s | dict(stopper=dict(patience=3)), 'TypeError: '),
    (lambda s: {k: v for k, v in s.items() if k != 'history'}, "KeyError: 'history'"),
    (lambda s: s | dict(model=None), 'TypeError: ')])
def test_28_a_state_of_another_model(half, tmp_path, how, why):
    "A whole checkpoint that does not fit, of another model or version, is refused in words"
    folder = copied(half, tmp_path/'run')
    for f in (folder/'checkpoints').glob('[!b]*.ckpt'): save_state(f, how(load_state(f)))
    before = contents(folder)
    with pytest.raises(CheckpointError, match='of another model, or of another version') as e: again(folder)
    assert why in str(e.value) and contents(folder) == before

def test_28_a_file_of_another_version(tmp_path):
    "The files of another version are told from damaged ones and from those of others"
    for start, why in ((MAGIC[:-1] + b'9', 'another version of'), (b'PK', 'no checkpoint of'), (b'', 'no checkpoint of')):
        (tmp_path/'resume.ckpt').write_bytes(start + bytes(len(start) * 99))
        with pytest.raises(CheckpointError, match=why): newest_state(tmp_path)

# ---------------------------------------------------------------- 29: code
@pytest.mark.parametrize('how', ['sealed', 'not sealed', 'a class'])
def test_29_a_checkpoint_cannot_run_code(tmp_path, monkeypatch, how):
    "A file that would make a folder when it is unpickled, sealed or not, and one that names a class: refused, and no folder is made"
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'made'),)
    path = tmp_path/'run'/'checkpoints'/'resume.ckpt'; path.parent.mkdir(parents=True)
    if how == 'not sealed': path.write_bytes(pickle.dumps(Evil(), 2))
    else:
        if how == 'sealed': monkeypatch.setattr(rtsseg.loop.torch, 'save', lambda state, out: out.write(pickle.dumps(Evil(), 2)))
        save_state(path, dict(step=1, evil=Evil())); monkeypatch.undo()
    with pytest.raises(CheckpointError, match='no checkpoint of this library' if how == 'not sealed' else 'cannot be read: UnpicklingError'): load_state(path)
    with pytest.raises(CheckpointError, match='no checkpoint to go on from'): again(tmp_path/'run')
    assert not (tmp_path/'made').exists()

# ---------------------------------------------------------------- 30: which weights are saved
def test_30_sigterm_while_the_average_is_judged(undisturbed, tmp_path):
    "Asked to stop in the middle of a validation, the run saves the weights that train as the model and the averaged ones beside them, and goes on as if undisturbed"
    class Asks(Points):
        def meter(self): m = Nothing(); m.update = lambda out, batch: os.kill(os.getpid(), signal.SIGTERM); return m
    with StopSignals() as t: stopped = again(tmp_path, 0, task=Asks(), observers=[t])
    saved = load_state(tmp_path/'checkpoints'/'resume.ckpt'); flat = lambda s: torch.cat([v.double().flatten() for v in s.values()])
    assert stopped.reason == 'SIGTERM' and stopped.batch == 6 and not stopped.history and not stopped.best      # all of epoch 1 is trained, and nothing is judged
    assert torch.equal(flat(saved['model']), weights(stopped.model)) and torch.equal(flat(saved['average']['module']), weights(stopped.average.module))
    assert not torch.equal(flat(saved['model']), flat(saved['average']['module']))
    equal(undisturbed, again(tmp_path))

@pytest.mark.parametrize('change', [dict(skipped='1'), dict(epoch=-1), dict(batch=-3), dict(best=5), dict(best=dict(step='x')), dict(history=[1]), dict(finished=1), dict(sums=[])])
def test_29_sealed_states_of_odd_types(tmp_path, change):
    "Anybody can seal a file: what it holds is looked at all the same"
    run(tmp_path, epochs=1); path = tmp_path/'checkpoints'/'resume.ckpt'; save_state(path, load_state(path) | change)
    with pytest.raises(CheckpointError, match='resume.ckpt is sealed, but holds no state of a run'): run(tmp_path, epochs=2)
