"A run as its users start it: from papermill, from a shell, killed and started again"
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

import rtsseg.check
import rtsseg.launch
import rtsseg.observe
import rtsseg.prepare
from helpers.commands import fork_trainers_without_room
from helpers.evidence import counted_codes
from helpers.loop import unmeasured
from helpers.pair import free_port
from helpers.runs import MODEL, in_time, toy_world
from helpers.shell import BIN, ONE_THREAD, Program, fork_trainers, held, running, shell
from helpers.tiles import truncate
from helpers.waiting import wait_for
from rtsseg.check import (
    check_batch_size,
    check_config_files,
    check_container,
    check_tracker,
    environment_findings,
    verdict,
)
from rtsseg.checkpoint import load_state
from rtsseg.cli import rtsseg_evaluate, rtsseg_noise, rtsseg_train
from rtsseg.config import RtsConfig, TrackerConfig, load, settings, to_yaml
from rtsseg.console import DataError
from rtsseg.evaluation import Locked, TestLedger, evaluate, look_of
from rtsseg.evidence import Evidence, evidence_path
from rtsseg.log import KeepTables, Log, show_training
from rtsseg.prepare import prepare, statistics
from rtsseg.runs import RunError, Stopped, read_lines, read_log, run_folder, run_lock
from rtsseg.segment import headline
from rtsseg.systems.rts import RTS
from rtsseg.training import force_config, launch, prepare_run, train

ROOT = Path(__file__).parents[1]
EPOCHS = 3
# 72 tiles
SMALL = dict(regions=2, scene_size=384, block_size=192)
SIGINT, SIGKILL, SIGTERM, SIGHUP = signal.SIGINT, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP

# ---------------------------------------------------------------- a small run

@pytest.fixture(autouse=True)
def own_warnings(monkeypatch):
    "A command changes how warnings are shown; a test that calls it as a function undoes that"
    monkeypatch.setattr(warnings, 'formatwarning', warnings.formatwarning)

def write_config(cfg, folder):
    "Write a config to tiny.yaml in a folder"
    path = folder/'tiny.yaml'
    path.write_text(to_yaml(cfg))
    return path

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "The config of a run of a few seconds, which lies beside its data as tiny.yaml"
    folder = tmp_path_factory.mktemp('world')
    cfg = load(
        overrides=['augment.enabled=false', 'loader.num_workers=0', 'tracker.kind=none'],
        name='tiny',
        runs=folder/'runs',
        device='cpu',
        epochs=EPOCHS,
        batch_size=8,
        val_frequency=1,
        freeze_backbone_epochs=0,
        lr=dict(base_lr=1e-3, backbone_lr_multiplier=1.),
        data=dict(manifest=toy_world(folder, **SMALL), tile_size=64, split_check='warn'),
        sampler=dict(curriculum=[dict(first=1, last=EPOCHS, ratio=1)]),
        model=MODEL,
    )
    write_config(cfg, folder)
    return cfg

@pytest.fixture(scope='module')
def tiny_file(tiny):
    return tiny.data.manifest.parent/'tiny.yaml'

@pytest.fixture(scope='module')
def undisturbed(tiny):
    "The run folder of a run that nothing disturbed"
    return train(tiny)

def moved_to(cfg, folder, **changes):
    "The same run with its run folder in another place"
    return cfg.model_copy(update=dict(runs=folder/'runs') | changes, deep=True)

def elsewhere(tiny, tmp_path, **changes):
    "The same run in another place, saved after every step, so that a kill finds a checkpoint; its config and folder"
    cfg = moved_to(tiny, tmp_path, **changes)
    cfg.checkpoint.resume_minutes = 1e-4
    write_config(cfg, tmp_path)
    return cfg, run_folder(cfg, prepare(cfg).hash)

def numbers(folder):
    return unmeasured(read_log(folder))

def events(folder, name):
    "The lines of a log that may not be there yet, of one event"
    log = folder/'log.jsonl'
    if not log.exists():
        return []
    return [line for line, _ in read_lines(log) if line['event'] == name]

def logged_epochs(folder):
    return [line['epoch'] for line in events(folder, 'epoch')]

def same(folder, other):
    "Assert that two runs ended in the same state, to the bit"
    a, b = (load_state(f/'checkpoints'/'resume.ckpt') for f in (folder, other))
    for x, y in ((a['model'], b['model']), (a['average']['module'], b['average']['module'])):
        assert x.keys() == y.keys()
        for name in x:
            assert torch.equal(x[name], y[name]), name
    columns = ('epoch', 'val/pr_auc@200', 'train/loss/focal')
    rows, other_rows = ([[row[c] for c in columns] for row in read_log(f)] for f in (folder, other))
    assert rows == other_rows

def refuse(command, *args, **more):
    "Call a command that refuses; its exit code"
    with pytest.raises(SystemExit) as e:
        command(*args, **more)
    return e.value.code

def error_message(printed):
    "What a command prints from `error: ` on; a slow machine prints progress before"
    return printed[printed.index('error: '):]

def times(folder):
    "When each file and folder below a folder was changed, but for the lock"
    return {file: file.stat().st_mtime_ns for file in folder.rglob('*') if file.name != '.lock'}

def file_names(folder):
    return sorted(file.name for file in folder.rglob('*'))

# ---------------------------------------------------------------- from papermill and a shell

def papermill_command(out, *parameters):
    options = [word for name, value in parameters for word in ('-p', name, value)]
    return [BIN/'papermill', '05_train.ipynb', out, *options]

def ends_well(notebook):
    "Whether an executed chapter has the last line that it prints"
    return re.search(r'^ *"done: ', notebook.read_text(), re.M) is not None

@pytest.mark.slow
def test_papermill_trains(tiny_file, tmp_path):
    "With a tracker that cannot be reached, and whose password no notebook ever shows"
    out, overrides = tmp_path/'out.ipynb', ['lr.base_lr=3e-4', 'tracker.kind=mlflow']
    given = dict(config=str(tiny_file), seed='43', epochs='1', name='other', overrides=json.dumps(overrides))
    env = ONE_THREAD | dict(RTSSEG_TRACKER_URI=f'http://user:canary@127.0.0.1:{free_port()}')
    command = papermill_command(out, *given.items())
    done = subprocess.run(command, cwd=ROOT/'nbs', env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    cfg = load(tiny_file, seed=43, epochs=1, name='other', overrides=overrides)
    folder = run_folder(cfg, prepare(cfg).hash)
    assert (folder/'model'/'model.safetensors').exists()
    assert load(folder/'config.yaml').lr.base_lr == 3e-4
    assert ends_well(out)
    # the examples of the chapter are skipped
    assert [cell.source for cell in nbformat.read(out, 4).cells if cell.get('outputs')][0].startswith('#| slow')
    assert 'events are still to be delivered' in out.read_text()
    for text in (out.read_text(), done.stdout, done.stderr):
        assert 'canary' not in text

def test_shell_refuses_unknown_keys(tmp_path):
    (tmp_path/'bad.yaml').write_text('epoch: 3')
    done = shell('rtsseg-train', '--config', tmp_path/'bad.yaml')
    assert done.returncode == 2
    assert "did you mean 'epochs'" in done.stderr
    assert 'Traceback' not in done.stdout + done.stderr
    assert file_names(tmp_path) == ['bad.yaml']

def in_git(folder, *arguments):
    "Run git in a folder, as somebody"
    who = ['-c', 'user.name=a', '-c', 'user.email=a@b']
    subprocess.run(['git', '-C', str(folder), *who, *arguments], check=True, capture_output=True)

def test_the_configs_own_file_has_to_be_committed(tmp_path):
    "In its own repository, wherever the command runs: outside of any, untracked, committed, changed"
    (tmp_path/'sub').mkdir()
    path = tmp_path/'sub'/'my.yaml'
    path.write_text('epochs: 3')

    def seen():
        return check_config_files(settings(path).files)

    assert (seen().level, seen().value) == ('note', 'my.yaml is in no repository')
    in_git(tmp_path, 'init')
    assert (seen().level, seen().value) == ('note', 'my.yaml is not added to its repository')
    in_git(tmp_path, 'add', '.')
    in_git(tmp_path, 'commit', '-m', 'a')
    # another file of the repository does not matter
    (tmp_path/'other').write_text('')
    assert (seen().level, seen().value) == ('ok', 'my.yaml')
    path.write_text('epochs: 4')
    assert (seen().level, seen().value) == ('note', 'my.yaml is changed since its commit')

@pytest.mark.parametrize('tracker', ['none', 'mlflow', 'wandb'])
def test_a_tracker_that_is_not_a_server_is_an_open_box(tracker, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    assert check_tracker(TrackerConfig(kind=tracker)).level == 'note'

@pytest.mark.parametrize('mark', ['/.dockerenv', '/run/.containerenv', ''])
def test_the_box_of_the_container(mark, monkeypatch):
    "Ticked where the check runs in one, which says that its tests were not seen; elsewhere open"
    monkeypatch.setattr(Path, 'exists', lambda path: str(path) == mark)
    box = 'container built and tested'
    found = check_container()
    assert (found.level, found.value) == (('ok', 'this check runs in one') if mark else ('note', 'not in a container'))
    assert ('tests were not run' in found.note) == bool(mark)
    for is_gpu in (True, False):
        assert (box in verdict([replace(found, what=box)], is_gpu)) == (not mark)

def test_a_probe_ticks_its_box(tmp_path, monkeypatch, capsys):
    "For this config on this device, whatever its batch size; another model was not tried"
    box = 'GPU memory profiled, batch size confirmed'
    cfg = load(runs=tmp_path, device='cpu', batch_size=8, tracker=dict(kind='none'))
    monkeypatch.setattr(rtsseg.check, 'probe', lambda cfg: dict(batch_size=8))
    monkeypatch.setattr(rtsseg.check, 'show_probe', lambda found, cfg: 'shown')

    def finding(**change):
        return check_batch_size(cfg.model_copy(update=change))

    assert finding().level == 'note' and 'not tried here' in finding().note
    RTS().probe(cfg)
    assert finding().level == 'ok' and 'on cpu: batches up to 8 fit' in finding().note
    assert environment_findings(cfg)[box] == finding()
    assert finding(batch_size=9).level == 'warning'
    assert finding(model=cfg.model.model_copy(update=dict(encoder='resnet18'))).level == 'note'
    monkeypatch.setattr(rtsseg.check, 'device_name', lambda cfg: 'another')
    assert finding().level == 'note'

@pytest.mark.slow
def test_another_hash_seed_gives_the_same_bytes(tiny, tmp_path):
    "The order of sets of text differs between hash seeds; weights and checkpoint do not. The run records the hash seed"
    weights = []
    for seed in ('1', '2'):
        home = tmp_path/seed
        home.mkdir()
        given = write_config(moved_to(tiny, home, epochs=1), home)
        command = [BIN/'rtsseg-train', '--config', given, '--inline', '--override', 'augment.enabled=true']
        done = subprocess.run(command, env=ONE_THREAD | dict(PYTHONHASHSEED=seed), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        folder, = home.glob('runs/tiny/*/seed42')
        assert json.loads((folder/'environment.json').read_text())['hash_seed'] == seed
        weights.append([(folder/name).read_bytes() for name in ('model/model.safetensors', 'checkpoints/best.ckpt')])
    assert weights[0] == weights[1]

@pytest.mark.slow
def test_the_environment_of_a_container_is_not_the_launchers(tiny, tmp_path):
    """Variables of another launcher name processes that do not exist here: the run trains, and later is found to be
    done. Its folder is printed each time"""
    rank = dict(RANK='1', LOCAL_RANK='1', WORLD_SIZE='2', LOCAL_WORLD_SIZE='2')
    strange = ONE_THREAD | rank | dict(MASTER_ADDR='127.0.0.1', MASTER_PORT='1')
    given = write_config(moved_to(tiny, tmp_path, epochs=1), tmp_path)
    for words in ('epoch   1/1', 'trained already'):
        done = shell('rtsseg-train', '--config', given, env=strange, prepare=fork_trainers)
        assert done.returncode == 0, done.stdout + done.stderr
        folder, = tmp_path.glob('runs/tiny/*/seed42')
        assert words in done.stdout
        assert done.stdout.endswith(f'{os.path.relpath(folder)}\n')
        assert (folder/'model'/'model.safetensors').exists()

@pytest.mark.slow
def test_a_detached_run(tiny, tmp_path):
    "It prints where its output goes, returns, and comes to its end by itself"
    cfg, finish = moved_to(tiny, tmp_path, epochs=1), tmp_path/'finish'
    folder = run_folder(cfg, prepare(cfg).hash)
    given, env = write_config(cfg, tmp_path), held(folder, 1, until=finish)
    done = shell('rtsseg-train', '--config', given, '--detach', cwd=tmp_path, env=env, prepare=fork_trainers)
    assert done.returncode == 0, done.stderr
    first, where, path = done.stdout.splitlines()
    assert first == f'{cfg.name}, seed {cfg.seed}: reading the data'
    assert tmp_path/path == folder
    assert where == f'the run continues by itself; its output goes to {path}/train.out'
    assert not (folder/'model').exists()
    finish.touch()
    out = folder/'train.out'
    wait_for(lambda: out.read_text().endswith(f'{path}\n'))
    assert 'epoch   1/1' in out.read_text()
    assert (folder/'model'/'model.safetensors').exists()

# ---------------------------------------------------------------- stopped and started again

def program(name, config):
    "What trains: a notebook, the command, or the trainer that both start"
    if name == 'the notebook':
        imports = 'from rtsseg.config import load\nfrom rtsseg.training import launch\n'
        return ['-c', f'{imports}launch(load({str(config)!r}))']
    command = ['rtsseg-train', '--config', config]
    return [*command, '--inline'] if name == 'the trainer' else command

@pytest.mark.slow
@pytest.mark.parametrize('death, how', [
    ('the notebook', SIGKILL),
    ('the trainer', SIGINT),
    ('the trainer', SIGKILL),
    ('the command', SIGTERM),
    ('the command', SIGHUP),
])
def test_started_again_it_ends_the_same(tiny, undisturbed, tmp_path, death, how):
    cfg, folder = elsewhere(tiny, tmp_path)
    command = program(death, tmp_path/'tiny.yaml')
    with running(Program(*command, env=held(folder, 1), prepare=fork_trainers)) as first:
        wait_for(lambda: events(folder, 'epoch') or first.poll() is not None)
        first.send_signal(how)
        code, output = first.wait(), first.printed()
    if how == SIGKILL:
        assert code == -SIGKILL, output
    else:
        assert code == 3, output
        assert 'the same command resumes' in output
        assert 'Traceback' not in output
    if death == 'the command':
        assert f'stopped ({how.name})' in output
        # the trainer has saved by the time the command ends
        assert events(folder, 'end')[-1]['reason'] == 'SIGTERM'
    # waits for the lock of a trainer that still saves
    saved = train(cfg)
    assert saved == folder
    assert len(read_log(folder)) == EPOCHS
    _, second = events(folder, 'start')
    assert second['step'] > 0
    same(folder, undisturbed)

@pytest.mark.slow
def test_a_notebook_that_is_killed(tiny, undisturbed, tmp_path, capsys):
    """papermill is asked to stop, then killed: it does not look like success, the trainer saves within a step, and the
    run comes to the same end"""
    cfg, folder = elsewhere(tiny, tmp_path)
    out = tmp_path/'out.ipynb'
    command = papermill_command(out, ('config', tmp_path/'tiny.yaml'))
    silent = dict(cwd=ROOT/'nbs', stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill_after(epoch, how):
        with running(subprocess.Popen(command, env=held(folder, epoch), **silent)) as notebook:
            wait_for(lambda: epoch in logged_epochs(folder) or notebook.poll() is not None)
            assert notebook.poll() is None
            notebook.send_signal(how)
            assert notebook.wait(300) != 0
        assert not ends_well(out)
        # the trainer has saved and is gone
        with run_lock(folder, wait=300):
            pass

    kill_after(1, SIGTERM)
    assert events(folder, 'end')[-1]['reason'] == 'SIGTERM'
    step, last = (load_state(f/'checkpoints'/'resume.ckpt')['step'] for f in (folder, undisturbed))
    assert 0 < step < last
    assert refuse(rtsseg_evaluate, str(folder)) == 2
    message = capsys.readouterr().err
    assert f'1 of {EPOCHS} epochs are done' in message
    assert 'rtsseg-train --config ' in message
    kill_after(2, SIGKILL)
    assert train(cfg) == folder
    for start in events(folder, 'start')[1:]:
        assert start['step'] > 0
    weights = Path('model')/'model.safetensors'
    assert (folder/weights).read_bytes() == (undisturbed/weights).read_bytes()
    same(folder, undisturbed)

def test_another_machine_is_noted(tiny, tmp_path, capsys):
    "A run that resumes with other libraries prints one note, keeps where it began, and logs what differs"
    cfg, folder = elsewhere(tiny, tmp_path, epochs=2)

    class Stop:
        def on_epoch(self, run):
            run.stop('as asked')

    with pytest.raises(Stopped):
        train(cfg, [Stop()])
    path = folder/'environment.json'
    first = json.loads(path.read_text())
    first['versions']['torch'] = '1.0'
    path.write_text(json.dumps(first))
    capsys.readouterr()
    train(cfg)
    notes = capsys.readouterr().err
    assert notes.count('results repeat to the bit only where all is the same: versions.torch 1.0 → ') == 1
    assert json.loads(path.read_text()) == first
    start, resume = events(folder, 'start')
    assert 'differs' not in start
    assert list(resume['differs']) == ['versions.torch']

def test_seeds_differ_and_share_a_hash(tiny, undisturbed):
    other = train(tiny.model_copy(update=dict(seed=43)))
    assert other.parent == undisturbed.parent
    assert numbers(other) != numbers(undisturbed)

def test_a_damaged_model_is_exported_again(tiny, undisturbed, tmp_path, capfd):
    "From the checkpoint, by the same command; without a checkpoint that is an error, and nothing is trained"
    cfg = moved_to(tiny, tmp_path)
    folder = run_folder(cfg, prepare(cfg).hash)
    shutil.copytree(undisturbed, folder)
    path, readme = folder/'model'/'model.safetensors', folder/'model'/'README.md'
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    readme.unlink()
    capfd.readouterr()
    train(cfg)
    notes = capfd.readouterr().err
    assert 'model.safetensors is not the file' in notes
    assert 'README.md is missing' in notes
    assert path.read_bytes() == good
    assert readme.exists()
    path.write_bytes(b'')
    shutil.rmtree(folder/'checkpoints')
    with pytest.raises(RunError, match='No checkpoint is left') as e:
        train(cfg)
    assert e.value.code == 2

def test_a_finished_run_is_left_alone(tiny, undisturbed, capfd):
    before = times(undisturbed)
    assert train(tiny) == undisturbed
    assert 'trained already' in capfd.readouterr().out
    assert times(undisturbed) == before

# ---------------------------------------------------------------- refused

def test_a_taken_or_changed_run_folder_is_refused_in_one_line(tiny, tmp_path, capsys):
    "Exit code 2. --force continues, and the log keeps what differed"
    cfg, folder = elsewhere(tiny, tmp_path)
    config = folder/'config.yaml'
    name = f'{folder.parent.name}/seed42'

    def refused(**more):
        assert refuse(rtsseg_train, str(tmp_path/'tiny.yaml'), **more) == 2
        message = error_message(capsys.readouterr().err)
        assert message.count('\n') == 1
        return message

    def change(**fields):
        config.write_text(to_yaml(cfg.model_copy(update=fields)))

    with run_lock(folder):
        change(epochs=7)
        busy = f'error: {name}: another process (pid {os.getpid()}) trains in this run folder; wait for it or stop it\n'
        assert refused(fresh=True) == busy
        assert refused(force=True) == busy
    message = refused()
    assert f' (epochs 7 → {EPOCHS}). ' in message
    assert '--force' in message
    assert not (folder/'log.jsonl').exists()
    difference = {'epochs': [7, EPOCHS]}
    assert force_config(cfg) == difference
    assert events(folder, 'forced') == [dict(event='forced', differs=difference)]

    config.write_text('epochs: [')
    message = refused()
    assert message.startswith(f'error: {name}/config.yaml has been changed')
    for words in ('while parsing', '--fresh', '--force'):
        assert words in message
    assert 'config.yaml' in force_config(cfg)
    assert load(config) == cfg
    assert force_config(cfg) == {}

    rates = cfg.lr.model_copy(update=dict(base_lr=.1, min_lr=.2, frozen_lr=.3))
    change(epochs=7, accumulate=2, val_frequency=3, lr=rates)
    message = refused()
    listed = message.split(' (')[1].split(')')[0]
    assert listed.count(' → ') == 5
    assert ', and 1 more). ' in message
    in_process = 'error: --inline trains in this process: leave out --processes and --detach\n'
    assert refused(inline=True, detach=True) == in_process

@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)

@pytest.mark.parametrize('how', ['fresh', 'force'])
@pytest.mark.parametrize('more', [dict(processes=0), dict(overrides='device=cuda')], ids=['processes', 'device'])
def test_a_command_that_is_refused_leaves_the_run_as_it_was(tiny, undisturbed, tmp_path, capsys, no_gpu, how, more):
    "--fresh moves nothing, --force adopts nothing"
    cfg = moved_to(tiny, tmp_path)
    folder = run_folder(cfg, prepare(cfg).hash)
    shutil.copytree(undisturbed.parent, folder.parent)
    (folder/'config.yaml').write_text(to_yaml(cfg.model_copy(update=dict(epochs=7))))
    given = write_config(cfg, tmp_path)
    # a run with an exported model needs no device
    if how == 'force':
        shutil.rmtree(folder/'model')
    before = times(tmp_path)
    assert refuse(rtsseg_train, str(given), **{how: True}, **more) == 2
    printed = capsys.readouterr()
    assert re.match(r'error: (processes: 0 was given|device: cuda was asked for)', error_message(printed.err))
    assert printed.out == ''
    assert times(tmp_path) == before

@pytest.mark.parametrize('inline', [True, False])
@pytest.mark.parametrize('override, words', [
    ('model.architecture=foo', "no such architecture: 'foo'"),
    ('model.options={"foo": 1}', 'model.options.foo'),
    ('device=cuda', 'no GPU'),
])
def test_a_model_that_is_refused_leaves_nothing(tiny_file, tmp_path, capsys, no_gpu, override, words, inline):
    "No statistics either"
    overrides = json.dumps([override, 'model.encoder=resnet18', f'runs={tmp_path}/runs'])
    assert refuse(rtsseg_train, str(tiny_file), overrides=overrides, inline=inline) == 2
    assert words in capsys.readouterr().err
    assert file_names(tmp_path) == []

def test_tiles_are_looked_at_once_before_anything_is_written(tiny, tmp_path, monkeypatch):
    "Tiles are read after the model, whose refusal is quicker, and before statistics, which show that tiles were read"
    cfg, folder = elsewhere(tiny, tmp_path)

    def bad(cfg, manifest):
        raise DataError('all that is wrong')

    with monkeypatch.context() as patch:
        patch.setattr(rtsseg.prepare, 'check_all_tiles', bad)
        with pytest.raises(DataError, match='all that is wrong'):
            train(cfg)
    assert not cfg.runs.exists()
    statistics(cfg, prepare(cfg))
    monkeypatch.setattr(rtsseg.prepare, 'tile_problems', bad)
    assert prepare_run(cfg).folder == folder

@pytest.mark.parametrize('where', ['runs', 'name', 'manifest'])
def test_paths_that_no_file_can_have_end_with_two(tiny_file, tmp_path, capsys, where):
    (tmp_path/'file').touch()
    (tmp_path/'runs').mkdir()
    bad = dict(runs=f'{tmp_path}/file', name='n' * 500, manifest=f'{tmp_path}/' + 'm' * 5000)[where]
    given = dict(runs=f'{tmp_path}/runs') | {where: bad}
    overrides = json.dumps([f"runs={given.pop('runs')}"])
    assert refuse(rtsseg_train, str(tiny_file), overrides=overrides, inline=True, **given) == 2
    message = error_message(capsys.readouterr().err)
    assert bad in message
    assert 'What was saved stands' not in message
    assert file_names(tmp_path) == ['file', 'runs']

# ---------------------------------------------------------------- two processes

@pytest.mark.slow
def test_a_real_run_in_two_processes(tiny, tmp_path):
    """The launcher, loaders, evidence of both halves, export: what was validated in two processes is what one process
    sees of the exported model"""
    cfg = moved_to(tiny, tmp_path, batch_size=4, epochs=1)
    done = shell('rtsseg-train', '--config', write_config(cfg, tmp_path), '--processes', '2', env=ONE_THREAD)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    folder = run_folder(cfg, prepare(cfg).hash)
    assert events(folder, 'start')[0]['processes'] == 2
    seen = headline(Evidence.read(evaluate(folder, 'val')), cfg.metrics)
    exported = json.loads((folder/'model'/'metrics.json').read_text())['metrics']
    # evaluation counts on finer bins
    assert {name: exported[name] for name in seen} == pytest.approx(seen, abs=1e-4, nan_ok=True)

@pytest.mark.slow
def test_one_of_two_processes_fails(tiny, tmp_path):
    """A disk without room: the first process cannot write its last state, the second loses it. The command ends with
    the code of the first, and prints its one line only"""
    cfg = moved_to(tiny, tmp_path, batch_size=4, epochs=1)
    command = ['rtsseg-train', '--config', write_config(cfg, tmp_path), '--processes', '2']
    # evidence is smaller than this, and a checkpoint larger
    no_room = partial(fork_trainers_without_room, 400_000)
    done = shell(*command, env=ONE_THREAD, prepare=no_room)
    assert done.returncode == 3, done.stderr
    one_line = 'error: the last state could not be written; make room and start again: the run starts from .*\n'
    assert re.fullmatch(one_line, error_message(done.stderr)), done.stderr
    assert 'checkpoint resume was not written (File too large)' in done.stdout
    assert 'Traceback' not in done.stdout
    assert 'rank' not in done.stdout

@pytest.mark.slow
def test_a_process_of_two_that_is_killed(tiny, tmp_path):
    "The other ends too, and the command prints what happened"
    cfg, folder = elsewhere(tiny, tmp_path, batch_size=4)
    command = ['rtsseg-train', '--config', tmp_path/'tiny.yaml', '--processes', '2']
    with running(Program(*command, env=held(folder, 1), prepare=fork_trainers)) as first:
        wait_for(lambda: events(folder, 'epoch') or first.poll() is not None)
        children = Path(f'/proc/{first.pid}/task/{first.pid}/children')
        ranks = [int(number) for number in children.read_text().split()]
        assert len(ranks) == 2
        os.kill(ranks[1], SIGKILL)
        code, out, err = first.wait(), first.out.read_text(), first.err.read_text()
    assert code == 3, err
    assert error_message(err).startswith('error: the trainer was ended by SIGKILL; its last line: '), err
    for rank in ranks:
        assert not Path(f'/proc/{rank}').exists()
    for word in ('Traceback', '[rank'):
        assert word not in out + err

def trainer_is(script, tmp_path, monkeypatch):
    "Let a script of the shell stand for the trainer; {waits} is a file that exists once the launcher waits"
    waits, ranks = tmp_path/'the launcher waits', []
    wait_for_processes = rtsseg.launch.wait_for_processes

    def start(program, n, env, **streams):
        ranks.append(subprocess.Popen(['sh', '-c', script.format(waits=f"'{waits}'")], **streams))
        return ranks, None

    def wait(processes):
        waits.touch()
        return wait_for_processes(processes)

    monkeypatch.setattr(rtsseg.launch, 'start_processes', start)
    monkeypatch.setattr(rtsseg.launch, 'wait_for_processes', wait)
    return ranks

@pytest.mark.parametrize('what, work', [
    (Stopped, 'until [ -e {waits} ]; do sleep .05; done; kill -INT $PPID'),
    (BrokenPipeError, 'echo something; yes | head -c 200000'),
])
@pytest.mark.usefixtures('default_signals')
def test_a_launcher_that_is_interrupted_or_whose_output_is_closed(tiny, tmp_path, monkeypatch, what, work):
    """It closes the pipe, at which the trainer saves and stops, and waits for that, however much the trainer prints
    meanwhile"""
    cfg, _ = elsewhere(tiny, tmp_path)
    ranks = trainer_is(work + '; cat; sleep .5; exit 3', tmp_path, monkeypatch)

    class Closed(io.StringIO):
        def write(self, text):
            # after the launcher's own first line
            if '\n' in self.getvalue():
                raise BrokenPipeError
            return super().write(text)

    with in_time(), contextlib.redirect_stdout(Closed()), pytest.raises(what):
        launch(cfg)
    assert ranks[0].returncode == 3

@pytest.mark.usefixtures('default_signals')
def test_a_launcher_that_is_interrupted_twice_does_not_wait(tiny, tmp_path, monkeypatch):
    "The second Ctrl-C comes while the trainer saves"
    cfg, _ = elsewhere(tiny, tmp_path)
    script = 'until [ -e {waits} ]; do sleep .05; done; kill -INT $PPID; cat; kill -INT $PPID; exec sleep 600'
    ranks = trainer_is(script, tmp_path, monkeypatch)
    monkeypatch.setattr(rtsseg.launch, 'GRACE_SECONDS', 600)
    try:
        with in_time(), pytest.raises(KeyboardInterrupt):
            launch(cfg)
        assert ranks[0].poll() is None
    finally:
        ranks[0].kill()
        ranks[0].wait()

# ---------------------------------------------------------------- validations and their noise

def test_validations_are_kept_in_the_order_of_epochs(tmp_path):
    "Beyond epoch 9999 names have another order"
    (tmp_path/'evidence').mkdir()
    table = SimpleNamespace(write=Path.touch)
    meter = SimpleNamespace(table=lambda: table)
    accelerator = SimpleNamespace(is_main_process=True)
    for epoch in (9998, 9999, 10000, 10001):
        run = SimpleNamespace(epoch=epoch, accelerator=accelerator)
        KeepTables(tmp_path).on_validation(run, {}, meter)
    assert file_names(tmp_path/'evidence') == ['epoch-10000.parquet', 'epoch-10001.parquet']

def drawn_average_precision(evidence, block, draw):
    "scikit-learn's average precision at 1:200, each tile counted as often as its block was drawn"
    positive, n = evidence['positive'], draw[block]
    negative_weight = 200 * n[positive].sum() / max(n[~positive].sum(), 1)
    weight = np.where(positive, n, n * negative_weight)
    labels, codes, weights = [], [], []
    for label, kind in ((1, 'pos'), (0, 'neg')):
        code, count, tile = counted_codes(evidence, kind)
        labels.append(np.full(len(code), label))
        codes.append(code)
        weights.append(weight[tile] * count)
    return average_precision_score(*map(np.concatenate, (labels, codes)), sample_weight=np.concatenate(weights))

def test_the_noise_floor_becomes_the_next_runs_min_delta(tiny_file, undisturbed, tmp_path):
    "Paired draws of blocks, by hand and with scikit-learn's average precision; the file is a config for the next run"
    out = tmp_path/'noise.yaml'
    done = shell('rtsseg-noise', '--run', undisturbed, '--replicates', '25', '--out', out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '25 paired bootstrap replicates of validations 2 and 3' in done.stdout
    before, last = (Evidence.read(undisturbed/'evidence'/f'epoch-000{i}.parquet') for i in (2, 3))
    names, block = np.unique(before['block'], return_inverse=True)
    positive = before['positive']
    draws = np.random.default_rng(0).multinomial(len(names), [1 / len(names)] * len(names), 25)
    gains = []
    for draw in draws:
        n = draw[block]
        # draws without a tile of either kind have no average precision
        if n[positive].sum() and n[~positive].sum():
            gain = drawn_average_precision(last, block, draw) - drawn_average_precision(before, block, draw)
            gains.append(gain)
    sigma = np.std(gains, ddof=1)
    assert sigma > 0
    # scores of single precision are rounded, and scikit-learn takes those of one code as tied
    assert load(tiny_file, out).early_stopping.min_delta == pytest.approx(2 * sigma, rel=.02)

@pytest.mark.parametrize('out', ['a folder', 'a file/noise.yaml'])
def test_a_noise_floor_that_cannot_be_written(undisturbed, tmp_path, capsys, out):
    (tmp_path/'a folder').mkdir()
    (tmp_path/'a file').touch()
    assert refuse(rtsseg_noise, str(undisturbed), replicates=5, out=str(tmp_path/out)) == 2
    message = error_message(capsys.readouterr().err)
    assert message.startswith(f'error: out: {tmp_path/out} cannot be written: ')
    assert file_names(tmp_path) == ['a file', 'a folder']

def test_one_validation_has_no_noise_floor(undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path/'runs'/'tiny'/undisturbed.parent.name/'seed42')
    (folder/'evidence'/f'epoch-000{EPOCHS}.parquet').unlink()
    done = shell('rtsseg-noise', '--run', folder)
    assert done.returncode == 2
    assert '1 of the two validations' in done.stderr
    assert 'Traceback' not in done.stderr

# ---------------------------------------------------------------- a look at the test split

@dataclass
class Copy:
    "A run and its data for a test to damage, and where its test evidence and its ledger go"
    cfg: RtsConfig
    folder: Path
    evidence: Path
    ledger: Path

    def looks(self):
        entry, = json.loads(self.ledger.read_text()).values()
        return entry['looks']

@pytest.fixture
def copy(tiny, undisturbed, tmp_path):
    data = shutil.copytree(tiny.data.manifest.parent, tmp_path/'data', ignore=shutil.ignore_patterns('runs'))
    folder = shutil.copytree(undisturbed, tmp_path/'runs'/'tiny'/undisturbed.parent.name/'seed42')
    cfg = moved_to(tiny, tmp_path)
    cfg.data.manifest = data/'manifest.csv'
    (folder/'config.yaml').write_text(to_yaml(cfg))
    return Copy(cfg, folder, evidence_path(folder, 'test', 'none'), cfg.runs/'test_ledger.json')

def test_a_pass_that_fails_does_not_count(copy, monkeypatch):
    "Tiles that cannot be read, or a pass that breaks off: nothing was seen, and nothing is noted or logged"
    log = (copy.folder/'log.jsonl').read_bytes()
    row = prepare(copy.cfg).of('test').table.iloc[0]
    image = copy.cfg.data.manifest.parent/row.image
    whole = image.read_bytes()
    truncate(image)
    with pytest.raises(DataError, match='cannot be read, which is more than'):
        evaluate(copy.folder, 'test')
    image.write_bytes(whole)

    def breaks(*args):
        raise RuntimeError('out of memory')

    with monkeypatch.context() as patch:
        patch.setattr(rtsseg.observe, 'predict_logits', breaks)
        with pytest.raises(RuntimeError, match='out of memory'):
            evaluate(copy.folder, 'test')
    assert not copy.ledger.exists()
    assert not copy.evidence.exists()
    assert (copy.folder/'log.jsonl').read_bytes() == log
    evaluate(copy.folder, 'test')
    assert len(copy.looks()) == 1
    assert copy.evidence.exists()

@pytest.mark.parametrize('at', ['observe.why_unresolved', 'evidence.Evidence.write'])
def test_a_look_that_is_killed_stands(copy, monkeypatch, at):
    "From the moment at which numbers are printed or written"
    def dies(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(f'rtsseg.{at}', dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(copy.folder, 'test')
    assert len(copy.looks()) == 1
    assert not copy.evidence.exists()

def test_a_look_that_another_run_took_first(copy, monkeypatch):
    """Two configurations may both begin; the second to end is refused, and nothing of it is kept. A later one is
    refused before its pass"""
    predict, passes = rtsseg.observe.predict_logits, []

    def look_meanwhile():
        data = prepare(copy.cfg).hash
        other = load(copy.folder/'config.yaml', overrides=['loss.gamma=1'])
        TestLedger(copy.folder.parents[2], data).record(look_of(other, data))

    def slow(*args):
        if not passes:
            look_meanwhile()
        passes.append(1)
        return predict(*args)

    monkeypatch.setattr(rtsseg.observe, 'predict_logits', slow)
    with pytest.raises(Locked):
        evaluate(copy.folder, 'test')
    batches = len(passes)
    assert batches > 0
    assert not copy.evidence.exists()
    with pytest.raises(Locked):
        evaluate(copy.folder, 'test')
    assert len(passes) == batches
    assert len(copy.looks()) == 1

def test_a_pass_is_logged_after_a_line_that_was_cut_off(copy):
    log = copy.folder/'log.jsonl'
    with open(log, 'ab') as f:
        f.write(b'{"event": "ep')
    evaluate(copy.folder, 'val')
    events = [line['event'] for line, _ in read_lines(log)]
    # one for each pass
    assert set(events[events.index('end') + 1:]) == {'evaluate'}

# ---------------------------------------------------------------- signs of overfitting

SIGNS = ['train-val divergence', 'large IoU gap', 'balanced vs realistic gap']

def overfitted_row(epoch):
    "A row of a run that overfits and waits for data"
    return {
        'epoch': epoch,
        'seconds': 1.,
        'batches': 20,
        'images_per_second': 7.,
        'wait': .6,
        'train/loss/focal': 1 / epoch,
        'val/loss': float(epoch),
        'train/iou': .95,
        'val/iou@1': .3,
        'val/pr_auc@1': .1 * epoch,
        'val/pr_auc@200': -.1 * epoch,
    }

def test_signs_are_said_once_with_their_remedy_and_starving_too(tmp_path, capsys):
    (tmp_path/'config.yaml').write_text('name: signs')
    log = Log(tmp_path, RTS())
    run = SimpleNamespace(
        history=[],
        cfg=load(overrides=['loader.num_workers=0']),
        last_epoch=300,
        length=20,
        task=SimpleNamespace(monitor='pr_auc@200'),
        best={},
        accelerator=SimpleNamespace(is_main_process=True, device=torch.device('cpu')),
    )
    for epoch in range(1, 6):
        run.history.append(overfitted_row(epoch))
        log.on_epoch(run)
    printed = capsys.readouterr()
    for sign in SIGNS:
        assert printed.err.count(f'sign of overfitting, {sign}: ') == 1
    assert printed.err.count('(guide 10.5)') == 3
    assert printed.err.count('raise loader.num_workers (now 0') == 1
    assert '7 images/s, 60% waiting for data' in printed.out
    found = {(line['epoch'], line['sign']) for line in events(tmp_path, 'overfitting')}
    # the gap shows in the first epoch, and the others in the third
    first = {'train-val divergence': 3, 'large IoU gap': 1, 'balanced vs realistic gap': 3}
    assert found == {(epoch, sign) for sign in SIGNS for epoch in range(first[sign], 6)}
    figure = show_training(tmp_path)
    assert len(figure.axes) == 4
    labels = [label for ax in figure.axes for label in ax.get_legend_handles_labels()[1]]
    assert set(labels) >= set(SIGNS)
