"A run as its users start it: from papermill, from a shell, killed and started again, and mirrored to a tracker"
import contextlib, io, json, os, re, resource, shutil, signal, socket, subprocess, sys, time, warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from rtsseg.cli import rtsseg_evaluate, rtsseg_noise, rtsseg_train
from rtsseg.config import load, to_yaml
from rtsseg.runs import run_folder
import rtsseg.evaluation, rtsseg.launch, rtsseg.observe, rtsseg.prepare, rtsseg.training
from rtsseg.console import DataError
from rtsseg.evaluation import Locked, TestLedger, evaluate, look_of
from rtsseg.checkpoint import load_state
from rtsseg.loop import TrainingState
from rtsseg.evidence import Evidence, evidence_path
from rtsseg.prepare import prepare, statistics
from rtsseg.segment import headline
from rtsseg.toy import tiny_toy
from rtsseg.runs import read_lines
from rtsseg.runs import RunError, Stopped, read_log, run_lock
from rtsseg.log import KeepTables, Log, show_training
from rtsseg.systems.rts import RTS
from rtsseg.training import force_config, launch, prepare_run, train
from helpers.runs import in_time
from helpers.shell import shell

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
SHELL = dict(env={k: v for k, v in os.environ.items() if k != 'IN_TEST'} | dict(OMP_NUM_THREADS='1'), capture_output=True, text=True, timeout=300)

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "A config of a few seconds, and the file that holds it"
    folder = tmp_path_factory.mktemp('world')
    cfg = load(overrides=['augment.enabled=false', 'loader.num_workers=0', 'tracker.kind=none'], name='tiny', runs=folder/'runs', device='cpu', epochs=4, batch_size=8, val_frequency=1,
               freeze_backbone_epochs=0, lr=dict(base_lr=1e-3, backbone_lr_multiplier=1.), data=dict(manifest=tiny_toy(folder), tile_size=64, split_check='warn'),
               sampler=dict(curriculum=[dict(first=1, last=4, ratio=1)]), model=dict(architecture='unet', encoder='resnet18', weights=None, options=dict(decoder_channels=[32, 16, 16, 8, 8])))
    (folder/'tiny.yaml').write_text(to_yaml(cfg))
    return cfg, folder/'tiny.yaml'

def numbers(folder): return [{k: v for k, v in r.items() if k not in TrainingState.MEASURED} for r in read_log(folder)]

def papermill(notebook, out, *parameters, **env):
    return subprocess.run([BIN/'papermill', notebook, out, *(a for p in parameters for a in ('-p', *p))], cwd=ROOT/'nbs', **SHELL | dict(env=SHELL['env'] | env))

@pytest.fixture(scope='module')
def undisturbed(tiny): return train(tiny[0])

def test_papermill_trains(tiny, tmp_path):
    "With a tracker that cannot be reached, and whose password no notebook ever shows"
    out, overrides = tmp_path/'out.ipynb', ['lr.base_lr=3e-4', 'tracker.kind=mlflow']
    done = papermill('05_train.ipynb', out, ('config', str(tiny[1])), ('seed', '43'), ('epochs', '1'), ('name', 'other'), ('overrides', json.dumps(overrides)), RTSSEG_TRACKER_URI=f'http://user:canary@127.0.0.1:{port()}')
    assert done.returncode == 0, done.stderr[-2000:]
    cfg = load(tiny[1], seed=43, epochs=1, name='other', overrides=overrides); folder = run_folder(cfg, prepare(cfg).hash)
    assert (folder/'model'/'model.safetensors').exists() and load(folder/'config.yaml').lr.base_lr == 3e-4
    assert 'events are still to be delivered' in out.read_text() and not any('canary' in text for text in (out.read_text(), done.stdout, done.stderr))

def test_shell_refuses_unknown_keys(tmp_path):
    (tmp_path/'bad.yaml').write_text('epoch: 3')
    done = subprocess.run([BIN/'rtsseg-train', '--config', tmp_path/'bad.yaml'], **SHELL)
    assert done.returncode == 2 and "did you mean 'epochs'" in done.stderr and 'Traceback' not in done.stdout + done.stderr
    assert [f.name for f in tmp_path.iterdir()] == ['bad.yaml']

def wait_for(condition, seconds=300):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, 'waited too long'
        time.sleep(0.05)

def elsewhere(tiny, tmp_path):
    "The same run in another place, saved after every step, so that a kill finds something to go on from"
    cfg = tiny[0].model_copy(update=dict(runs=tmp_path/'runs'), deep=True); cfg.checkpoint.resume_minutes = 1e-4
    (tmp_path/'tiny.yaml').write_text(to_yaml(cfg))
    return cfg, run_folder(cfg, prepare(cfg).hash)

def events(folder, name=''): return [e for e, _ in read_lines(folder/'log.jsonl') if e['event'] == name] if (folder/'log.jsonl').exists() else []

def same(folder, other):
    "Two runs ended alike, to the bit"
    a, b = (load_state(f/'checkpoints'/'resume.ckpt') for f in (folder, other))
    for part in ('model', 'average'):
        x, y = (s[part] if part == 'model' else s[part]['module'] for s in (a, b))
        assert all(torch.equal(x[k], y[k]) for k in y), part
    assert [(r['epoch'], r['val/pr_auc@200'], r['train/loss/focal']) for r in read_log(folder)] == [(r['epoch'], r['val/pr_auc@200'], r['train/loss/focal']) for r in read_log(other)]

def default_hangup(): signal.signal(signal.SIGHUP, signal.SIG_DFL)      # whoever runs these tests may have it ignored

@pytest.mark.parametrize('death, how', [('the notebook', signal.SIGKILL), ('the trainer', signal.SIGTERM), ('the trainer', signal.SIGKILL), ('the command', signal.SIGTERM), ('the command', signal.SIGHUP)])
def test_started_again_it_ends_the_same(tiny, undisturbed, tmp_path, death, how):
    cfg, folder = elsewhere(tiny, tmp_path)
    program = {'the notebook': [sys.executable, '-c', f"from rtsseg.config import load\nfrom rtsseg.training import launch\nlaunch(load({str(tmp_path/'tiny.yaml')!r}))"],
               'the trainer': [BIN/'rtsseg-train', '--config', tmp_path/'tiny.yaml', '--inline'], 'the command': [BIN/'rtsseg-train', '--config', tmp_path/'tiny.yaml']}[death]
    first = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=SHELL['env'], preexec_fn=default_hangup)
    wait_for(lambda: events(folder, 'epoch'))
    first.send_signal(how); said = first.communicate(timeout=300)[0]
    assert first.returncode == (3 if how != signal.SIGKILL else -signal.SIGKILL) and (how == signal.SIGKILL or 'the same command resumes' in said and 'Traceback' not in said), said
    if death == 'the command': assert f'stopped ({how.name})' in said and events(folder, 'end')[-1]['reason'] == 'SIGTERM'       # it has saved by the time the command ends
    saved = train(cfg)                                            # waits for the lock of a trainer that still saves
    assert saved == folder and len(read_log(folder)) == cfg.epochs
    starts = events(folder, 'start')
    assert len(starts) == 2 and starts[1]['step'] > 0           # it went on, it did not start over
    same(folder, undisturbed)

def test_a_notebook_that_is_killed(tiny, undisturbed, tmp_path, capsys):
    "papermill is asked to stop, then killed: it does not look like success, the trainer saves within a step, and the same command comes to the same end"
    cfg, folder = elsewhere(tiny, tmp_path); out = tmp_path/'out.ipynb'
    command = dict(args=[BIN/'papermill', '05_train.ipynb', out, '-p', 'config', tmp_path/'tiny.yaml'], cwd=ROOT/'nbs', env=SHELL['env'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done = lambda: re.search(r'^ *"done: ', out.read_text(), re.M)      # as the chapter has it
    for how, epoch in ((signal.SIGTERM, 1), (signal.SIGKILL, 2)):
        notebook = subprocess.Popen(**command)
        wait_for(lambda: any(r['epoch'] >= epoch for r in events(folder, 'epoch')), 200)
        notebook.send_signal(how); assert notebook.wait(30) != 0 and not done()
        with run_lock(folder): pass                               # the trainer has saved and is gone
        if how == signal.SIGTERM:
            assert events(folder, 'end')[-1]['reason'] == 'SIGTERM' and 0 < load_state(folder/'checkpoints'/'resume.ckpt')['step'] < load_state(undisturbed/'checkpoints'/'resume.ckpt')['step']
            with pytest.raises(SystemExit) as e: rtsseg_evaluate(str(folder))
            assert e.value.code == 2 and f'{len(read_log(folder))} of 4 epochs are done' in (said := capsys.readouterr().err) and 'rtsseg-train --config ' in said
    assert subprocess.run(**command).returncode == 0 and done()
    assert all(e['step'] > 0 for e in events(folder, 'start')[1:]) and (folder/'model'/'model.safetensors').read_bytes() == (undisturbed/'model'/'model.safetensors').read_bytes()
    same(folder, undisturbed)

def test_what_goes_wrong_in_a_line_ends_with_two(tiny, tmp_path, capsys, monkeypatch):
    "A run folder that is taken, or was changed: one line, exit 2; --force goes on, and the log keeps what differed"
    cfg, folder = elsewhere(tiny, tmp_path); given = str(tmp_path/'tiny.yaml'); monkeypatch.setattr(warnings, 'formatwarning', warnings.formatwarning)      # put back afterwards
    def call(**more):
        try: rtsseg_train(given, **more)
        except SystemExit as e:
            # a slow machine prints progress before
            said = capsys.readouterr().err
            return e.code, said[said.index('error: '):]
    with run_lock(folder):
        (folder/'config.yaml').write_text(to_yaml(cfg.model_copy(update=dict(epochs=7))))
        for how in ('fresh', 'force'): assert call(**{how: True}) == (2, f'error: {folder.parent.name}/seed42: another process (pid {os.getpid()}) trains in this run folder; wait for it or stop it\n')
    code, said = call(); assert code == 2 and ' (epochs 7 → 4). ' in said and '--force' in said and not (folder/'log.jsonl').exists()
    assert force_config(cfg) == {'epochs': [7, 4]} and events(folder, 'forced') == [dict(event='forced', differs={'epochs': [7, 4]})]
    (folder/'config.yaml').write_text('epochs: ['); code, said = call()
    assert code == 2 and said.startswith(f'error: {folder.parent.name}/seed42/config.yaml has been changed') and 'while parsing' in said and '--fresh' in said and '--force' in said and said.count('\n') == 1
    assert 'config.yaml' in force_config(cfg) and load(folder/'config.yaml') == cfg and force_config(cfg) == {}
    many = cfg.model_copy(update=dict(epochs=7, accumulate=2, val_frequency=3, lr=cfg.lr.model_copy(update=dict(base_lr=.1, min_lr=.2, frozen_lr=.3)))); (folder/'config.yaml').write_text(to_yaml(many))
    assert call()[1].split(' (')[1].split(')')[0].count(' → ') == 5 and ', and 1 more). ' in call()[1]
    assert call(inline=True, detach=True) == (2, 'error: --inline trains in this very process: leave out --processes and --detach\n')

@pytest.mark.parametrize('how', ['fresh', 'force'])
@pytest.mark.parametrize('more', [dict(processes=0), dict(overrides='device=cuda')], ids=['processes', 'device'])
def test_a_command_that_is_refused_leaves_the_run_as_it_was(tiny, undisturbed, tmp_path, capsys, monkeypatch, how, more):
    "--fresh puts nothing aside, --force adopts nothing"
    monkeypatch.setattr(warnings, 'formatwarning', warnings.formatwarning); monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    cfg = tiny[0].model_copy(update=dict(runs=tmp_path/'runs')); folder = run_folder(cfg, prepare(cfg).hash); shutil.copytree(undisturbed.parent, folder.parent)
    (folder/'config.yaml').write_text(to_yaml(cfg.model_copy(update=dict(epochs=7)))); (tmp_path/'tiny.yaml').write_text(to_yaml(cfg))
    if how == 'force': shutil.rmtree(folder/'model')            # an exported one needs no device
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob('*')}
    with pytest.raises(SystemExit) as e: rtsseg_train(str(tmp_path/'tiny.yaml'), **{how: True}, **more)
    said = capsys.readouterr()
    assert e.value.code == 2 and re.match(r'error: (processes: 0 was given|device: cuda was asked for)', said.err) and said.out == '' and {f: f.stat().st_mtime_ns for f in tmp_path.rglob('*')} == before

@pytest.mark.parametrize('inline', [True, False])
@pytest.mark.parametrize('override, words', [('model.architecture=foo', "unknown: 'foo'"), ('model.options={"foo": 1}', 'model.options.foo'), ('device=cuda', 'no GPU')])
def test_a_model_that_is_refused_leaves_nothing(tiny, tmp_path, capsys, monkeypatch, override, words, inline):
    "No statistics either"
    monkeypatch.setattr(warnings, 'formatwarning', warnings.formatwarning); monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit) as e: rtsseg_train(str(tiny[1]), overrides=json.dumps([override, f'runs={tmp_path}/runs']), inline=inline)
    assert e.value.code == 2 and words in capsys.readouterr().err and not list(tmp_path.iterdir())

def test_tiles_are_looked_at_once_before_anything_is_written(tiny, tmp_path, monkeypatch):
    "After the model, whose refusal is quicker, and before statistics; where these lie there they were looked at"
    cfg, folder = elsewhere(tiny, tmp_path)
    def bad(cfg, manifest): raise DataError('all that is wrong')
    monkeypatch.setattr(rtsseg.prepare, 'check_all_tiles', bad)
    with pytest.raises(DataError, match='all that is wrong'): train(cfg)
    assert not cfg.runs.exists()
    monkeypatch.undo(); statistics(cfg, prepare(cfg)); monkeypatch.setattr(rtsseg.prepare, 'tile_problems', bad); assert prepare_run(cfg).folder == folder

@pytest.mark.parametrize('where', ['runs', 'name', 'manifest'])
def test_paths_that_no_file_can_have_end_with_two(tiny, tmp_path, capsys, monkeypatch, where):
    monkeypatch.setattr(warnings, 'formatwarning', warnings.formatwarning); (tmp_path/'file').touch(); (tmp_path/'runs').mkdir()
    path = dict(runs=f'{tmp_path}/file', name='n' * 500, manifest=f'{tmp_path}/' + 'm' * 5000)[where]
    overrides = [f'runs={path if where == "runs" else tmp_path/"runs"}']
    with pytest.raises(SystemExit) as e: rtsseg_train(str(tiny[1]), overrides=json.dumps(overrides), inline=True, **({} if where == 'runs' else {where: path}))
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.startswith('error: ') and path in said and 'What was saved stands' not in said and sorted(f.name for f in tmp_path.rglob('*')) == ['file', 'runs']

def test_the_environment_of_a_container_is_not_the_launchers(tiny, undisturbed, tmp_path):
    "It names processes that nobody starts here: the run trains, and is found to be done, and either time its folder is said"
    strange = SHELL['env'] | dict(RANK='1', LOCAL_RANK='1', WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT='1')
    (tmp_path/'tiny.yaml').write_text(to_yaml(tiny[0].model_copy(update=dict(runs=tmp_path/'runs', epochs=1))))
    for words in ('epoch   1/1', 'trained already'):
        done = shell('rtsseg-train', '--config', tmp_path/'tiny.yaml', env=strange, timeout=100); folder, = tmp_path.glob('runs/tiny/*/seed42')
        assert done.returncode == 0 and words in done.stdout and done.stdout.endswith(f'{os.path.relpath(folder)}\n') and (folder/'model'/'model.safetensors').exists(), done.stdout + done.stderr

def test_another_machine_is_told(tiny, undisturbed, tmp_path, capsys):
    "A run that goes on with other libraries says so once, keeps where it began, and logs what differs"
    cfg, folder = elsewhere(tiny, tmp_path)
    class Stop:
        def on_epoch(self, run): run.stop('as asked')
    with pytest.raises(Stopped): train(cfg, [Stop()])
    first = json.loads((folder/'environment.json').read_text()); first['versions']['torch'] = '1.0'; (folder/'environment.json').write_text(json.dumps(first)); capsys.readouterr()
    train(cfg); said = capsys.readouterr().err
    assert said.count('results repeat to the bit only where all is the same: versions.torch 1.0 → ') == 1 and json.loads((folder/'environment.json').read_text()) == first
    a, b = events(folder, 'start'); assert 'differs' not in a and list(b['differs']) == ['versions.torch']

def test_seeds_differ_and_share_a_hash(tiny, undisturbed):
    other = train(tiny[0].model_copy(update=dict(seed=43)))
    assert other.parent == undisturbed.parent and numbers(other) != numbers(undisturbed)

def port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

def start_server(folder, p):
    "A real MLflow server on loopback, when it answers"
    process = subprocess.Popen([BIN/'mlflow', 'server', '--host', '127.0.0.1', '--port', str(p), '--workers', '1', '--backend-store-uri', f'sqlite:///{folder}/mlflow.db',
                                '--artifacts-destination', str(folder/'artifacts')], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    import urllib.request
    def healthy():
        try: return urllib.request.urlopen(f'http://127.0.0.1:{p}/health', timeout=2).status == 200
        except OSError: return False
    try: wait_for(healthy)
    except BaseException: os.killpg(process.pid, signal.SIGKILL); raise
    return process

@pytest.fixture(scope='module')
def server(tmp_path_factory):
    process = start_server(tmp_path_factory.mktemp('mlflow'), p := port())
    try: yield f'http://127.0.0.1:{p}'
    finally: os.killpg(process.pid, signal.SIGKILL); process.wait()

def test_tracker_mirrors_the_run(tiny, server, tmp_path):
    from mlflow import MlflowClient
    cfg = tiny[0].model_copy(update=dict(runs=tmp_path/'runs', tracker=tiny[0].tracker.model_copy(update=dict(kind='mlflow', uri=server))))
    folder = train(cfg)
    client = MlflowClient(server); found = client.get_run(json.loads((folder/'tracker.json').read_text())['run_id'])
    assert found.info.status == 'FINISHED' and found.data.params['lr.base_lr'] == '0.001' and found.data.tags['manifest_hash'] == prepare(cfg).hash
    history = client.get_metric_history(found.info.run_id, 'val/pr_auc_at_200')
    assert [(m.step, m.value) for m in history] == [(r['epoch'], r['val/pr_auc@200']) for r in read_log(folder)]
    assert {f.path for f in client.list_artifacts(found.info.run_id)} >= {'config.yaml', 'environment.json', 'model'}
    assert str(tmp_path) not in (folder/'model'/'config.yaml').read_text()                    # a model is handed on, this machine is not

def test_a_damaged_model_is_exported_anew(tiny, undisturbed, tmp_path, capfd):
    "From the checkpoint, by the same command; where no checkpoint is left that is an error, and no training from the start"
    cfg = tiny[0].model_copy(update=dict(runs=tmp_path/'runs')); folder = run_folder(cfg, prepare(cfg).hash); shutil.copytree(undisturbed, folder)
    path = folder/'model'/'model.safetensors'; good = path.read_bytes(); path.write_bytes(good[:-1] + bytes([good[-1] ^ 1])); (folder/'model'/'README.md').unlink()
    capfd.readouterr(); train(cfg); said = capfd.readouterr().err
    assert 'model.safetensors is not the file' in said and 'README.md is missing' in said and path.read_bytes() == good and (folder/'model'/'README.md').exists()
    path.write_bytes(b''); shutil.rmtree(folder/'checkpoints')
    with pytest.raises(RunError, match='No checkpoint is left') as e: train(cfg)
    assert e.value.code == 2

def test_a_finished_run_is_left_alone(tiny, undisturbed, capfd):
    before = {f: f.stat().st_mtime_ns for f in undisturbed.rglob('*') if f.is_file() and f.name != '.lock'}
    assert train(tiny[0]) == undisturbed and 'trained already' in capfd.readouterr().out
    assert {f: f.stat().st_mtime_ns for f in undisturbed.rglob('*') if f.is_file() and f.name != '.lock'} == before

def test_a_real_run_in_two_processes(tiny, tmp_path):
    "The launcher, loaders, evidence of both halves, export: what was validated in two processes is what one sees of the exported model"
    cfg = tiny[0].model_copy(update=dict(batch_size=4, epochs=1, runs=tmp_path/'runs'), deep=True)
    (tmp_path/'two.yaml').write_text(to_yaml(cfg))
    done = subprocess.run([BIN/'rtsseg-train', '--config', tmp_path/'two.yaml', '--processes', '2'], **SHELL)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    folder = run_folder(cfg, prepare(cfg).hash)
    assert json.loads((folder/'log.jsonl').read_text().splitlines()[0])['processes'] == 2
    seen = headline(Evidence.read(evaluate(folder, 'val')), cfg)
    best = json.loads((folder/'model'/'metrics.json').read_text())['metrics']
    assert {k: best[k] for k in seen} == pytest.approx(seen, abs=1e-4, nan_ok=True)       # evaluation counts on finer bins

def test_one_of_two_processes_fails(tiny, tmp_path):
    "A disk without room: the first process cannot write its last state, the second loses it. The command ends with the code of the first, and with its one line alone"
    cfg = tiny[0].model_copy(update=dict(batch_size=4, epochs=1, runs=tmp_path/'runs'), deep=True); (tmp_path/'two.yaml').write_text(to_yaml(cfg))
    done = subprocess.run([BIN/'rtsseg-train', '--config', tmp_path/'two.yaml', '--processes', '2'], **SHELL, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2))
    assert done.returncode == 3 and re.fullmatch('error: the last state could not be written; make room, .*\n', done.stderr), done.stderr
    assert 'checkpoint resume was not written (File too large)' in done.stdout and 'Traceback' not in done.stdout and 'rank' not in done.stdout

def test_a_process_of_two_that_is_killed(tiny, tmp_path):
    "The other ends too, and the command says what happened"
    cfg, folder = elsewhere(tiny, tmp_path); command = [BIN/'rtsseg-train', '--config', tmp_path/'tiny.yaml', '--processes', '2', '--epochs', '99', '--overrides', 'batch_size=4']
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=SHELL['env'])
    wait_for(lambda: list(tmp_path.glob('runs/tiny/*/seed42/checkpoints/resume.ckpt')))
    ranks = [int(p) for p in Path(f'/proc/{first.pid}/task/{first.pid}/children').read_text().split()]; os.kill(ranks[1], signal.SIGKILL)
    out, said = first.communicate(timeout=300)
    assert first.returncode == 3 and len(ranks) == 2 and said.startswith('error: the trainer was ended by SIGKILL; its last line: ') and not any(Path(f'/proc/{p}').exists() for p in ranks), said
    assert not any(word in out + said for word in ('Traceback', '[rank')), out + said

@pytest.mark.parametrize('what, program', [(KeyboardInterrupt, 'sleep 2; kill -INT $PPID'), (BrokenPipeError, 'echo something; yes | head -c 200000')])
def test_a_launcher_that_is_interrupted_or_that_nobody_hears(tiny, tmp_path, monkeypatch, what, program):
    "It closes the pipe, at which the trainer saves and stops, and waits for that, however much is said meanwhile"
    cfg, _ = elsewhere(tiny, tmp_path); ranks = []
    def start(_, n, env, **streams): ranks.append(subprocess.Popen(['sh', '-c', f'{program}; cat; sleep .5; exit 3'], **streams)); return ranks, None
    class Deaf(io.StringIO):
        def write(self, text): raise BrokenPipeError
    monkeypatch.setattr(rtsseg.launch, 'start_processes', start)
    with in_time(), contextlib.redirect_stdout(Deaf()), pytest.raises(what): launch(cfg)
    assert ranks[0].returncode == 3

def test_a_detached_run(tiny, tmp_path):
    "It says where its words go, returns, and comes to its end by itself"
    cfg, folder = elsewhere(tiny, tmp_path)
    done = subprocess.run([BIN/'rtsseg-train', '--config', tmp_path/'tiny.yaml', '--epochs', '1', '--detach'], cwd=tmp_path, **SHELL)
    where, path = done.stdout.splitlines(); out = tmp_path/path/'train.out'
    assert done.returncode == 0 and where == f'the run continues by itself; its output goes to {path}/train.out' and not (tmp_path/path/'model').exists()
    wait_for(lambda: out.read_text().endswith(f'{path}\n')); assert 'epoch   1/1' in out.read_text() and (tmp_path/path/'model'/'model.safetensors').exists()

def test_validations_are_kept_in_the_order_of_epochs(tmp_path):
    "Beyond epoch 9999 names have another order"
    meter = SimpleNamespace(table=lambda: SimpleNamespace(write=lambda path: (path.parent.mkdir(exist_ok=True), path.touch())))
    for epoch in (9998, 9999, 10000, 10001): KeepTables(tmp_path).on_validation(SimpleNamespace(epoch=epoch, accelerator=SimpleNamespace(is_main_process=True)), {}, meter)
    assert sorted(f.name for f in (tmp_path/'evidence').iterdir()) == ['epoch-10000.parquet', 'epoch-10001.parquet']

def test_the_noise_floor_becomes_the_next_runs_min_delta(tiny, undisturbed, tmp_path):
    "Paired draws of blocks, by hand and with scikit-learn's average precision; and the file is a config for the next run"
    out = tmp_path/'noise.yaml'
    done = subprocess.run([BIN/'rtsseg-noise', '--run', undisturbed, '--replicates', '25', '--out', out], **SHELL)
    assert done.returncode == 0 and '25 paired bootstrap replicates of validations 3 and 4' in done.stdout, done.stdout + done.stderr
    pair = [Evidence.read(undisturbed/'evidence'/f'epoch-000{i}.parquet') for i in (3, 4)]
    names, block = np.unique(pair[0]['block'], return_inverse=True); positive = pair[0]['positive']
    draws = np.random.default_rng(0).multinomial(len(names), [1/len(names)]*len(names), 25)
    def ap(e, draw):
        n = draw[block]; w = np.where(positive, n, n * 200 * n[positive].sum() / max(n[~positive].sum(), 1))
        (cp, tp), (np_, _), (cn, tn), (nn, _) = (e.flat(k) for k in ('pos_codes', 'pos_counts', 'neg_codes', 'neg_counts'))
        return average_precision_score(np.r_[np.ones(len(cp)), np.zeros(len(cn))], np.r_[cp, cn], sample_weight=np.r_[w[tp]*np_, w[tn]*nn])
    whole = [d for d in draws if d[block][positive].sum() and d[block][~positive].sum()]
    sigma = np.std([ap(pair[1], d) - ap(pair[0], d) for d in whole], ddof=1)
    assert load(tiny[1], out).early_stopping.min_delta == pytest.approx(2*sigma, rel=.01)      # scores of single precision are rounded, and scikit-learn takes those of one code as tied

@pytest.mark.parametrize('out', ['a folder', 'a file/noise.yaml'])
def test_a_noise_floor_that_cannot_be_written(undisturbed, tmp_path, capsys, out):
    (tmp_path/'a folder').mkdir(); (tmp_path/'a file').touch()
    with pytest.raises(SystemExit) as e: rtsseg_noise(str(undisturbed), replicates=5, out=str(tmp_path/out))
    assert e.value.code == 2 and capsys.readouterr().err.startswith(f'error: out: {tmp_path/out} cannot be written: ') and sorted(f.name for f in tmp_path.rglob('*')) == ['a file', 'a folder']

# ---------------------------------------------------------------- a look at the test split
@pytest.fixture
def world(tiny, undisturbed, tmp_path):
    "A run and its data, to be harmed; where its test evidence and its ledger go"
    cfg = tiny[0]; shutil.copytree(cfg.data.manifest.parent, tmp_path/'data'); folder = tmp_path/'runs'/'tiny'/undisturbed.parent.name/'seed42'; shutil.copytree(undisturbed, folder)
    cfg = cfg.model_copy(update=dict(runs=tmp_path/'runs', data=cfg.data.model_copy(update=dict(manifest=tmp_path/'data'/cfg.data.manifest.name)))); (folder/'config.yaml').write_text(to_yaml(cfg))
    return cfg, folder, evidence_path(folder, 'test', 'none'), tmp_path/'runs'/'test_ledger.json'

def test_a_pass_that_fails_is_no_look(world, monkeypatch):
    "Tiles that cannot be read, or a pass that breaks off: nothing was seen, and nothing is noted, nor logged"
    cfg, folder, evidence, ledger = world; log = (folder/'log.jsonl').read_bytes(); row = prepare(cfg).of('test').table.iloc[0]; path = cfg.data.manifest.parent/row.image
    whole = path.read_bytes(); path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(DataError, match='cannot be read, which is more than'): evaluate(folder, 'test')
    path.write_bytes(whole); real = rtsseg.observe.predict_logits
    def breaks(*a): raise RuntimeError('out of memory')
    monkeypatch.setattr(rtsseg.observe, 'predict_logits', breaks)
    with pytest.raises(RuntimeError, match='out of memory'): evaluate(folder, 'test')
    assert not ledger.exists() and not evidence.exists() and (folder/'log.jsonl').read_bytes() == log
    monkeypatch.setattr(rtsseg.observe, 'predict_logits', real); evaluate(folder, 'test')
    looks, = json.loads(ledger.read_text()).values(); assert len(looks['looks']) == 1 and evidence.exists()

@pytest.mark.parametrize('at', ['observe.is_resolved', 'evidence.Evidence.write'])
def test_a_look_that_is_killed_stands(world, monkeypatch, at):
    "From the moment on at which numbers are said or written"
    cfg, folder, evidence, ledger = world
    def dies(*a): raise KeyboardInterrupt
    monkeypatch.setattr(f'rtsseg.{at}', dies)
    with pytest.raises(KeyboardInterrupt): evaluate(folder, 'test')
    looks, = json.loads(ledger.read_text()).values(); assert len(looks['looks']) == 1 and not evidence.exists()

def test_a_look_that_somebody_else_was_quicker_with(world, monkeypatch):
    "Two configurations may both begin; the second to end is refused, and nothing of it is kept. One that comes later is refused before its pass"
    cfg, folder, evidence, ledger = world; real, passes = rtsseg.observe.predict_logits, []
    def slow(*a):
        if not passes: data = prepare(cfg).hash; TestLedger(folder.parents[2], data).record(look_of(load(folder/'config.yaml', overrides=['loss.gamma=1']), data))
        passes.append(1); return real(*a)
    monkeypatch.setattr(rtsseg.observe, 'predict_logits', slow)
    with pytest.raises(Locked): evaluate(folder, 'test')
    assert passes and not evidence.exists(); passes[:] = ['again']
    with pytest.raises(Locked): evaluate(folder, 'test')
    assert passes == ['again'] and len(json.loads(ledger.read_text()).popitem()[1]['looks']) == 1

def test_a_pass_is_logged_after_a_line_that_was_cut_off(world):
    cfg, folder, *_ = world
    with open(folder/'log.jsonl', 'ab') as f: f.write(b'{"event": "ep')
    evaluate(folder, 'val'); assert [e['event'] for e, _ in read_lines(folder/'log.jsonl')][-2:] == ['end', 'evaluate']

def test_one_validation_has_no_noise_floor(tiny, tmp_path):
    cfg = tiny[0].model_copy(update=dict(runs=tmp_path/'runs', epochs=1))
    done = subprocess.run([BIN/'rtsseg-noise', '--run', train(cfg)], **SHELL)
    assert done.returncode == 2 and '1 of the two validations' in done.stderr and 'Traceback' not in done.stderr

def test_signs_are_said_once_with_their_remedy_and_starving_too(tmp_path, capsys):
    log, rows = Log(tmp_path, RTS()), []; (tmp_path/'config.yaml').write_text('name: signs')
    told = SimpleNamespace(history=rows, cfg=load(overrides=['loader.num_workers=0']), task=SimpleNamespace(monitor='pr_auc@200'), best={}, accelerator=SimpleNamespace(is_main_process=True, device=torch.device('cpu')))
    for i in range(1, 6):
        rows.append({'epoch': i, 'seconds': 1., 'batches': 20, 'images_per_second': 7., 'wait': .6, 'train/loss/focal': 1/i, 'val/loss': float(i), 'train/iou': .95, 'val/iou@1': .3, 'val/pr_auc@1': .1*i, 'val/pr_auc@200': -.1*i})
        log.on_epoch(told)
    said = capsys.readouterr(); SIGNS = ['train-val divergence', 'large IoU gap', 'balanced vs realistic gap']
    assert all(said.err.count(f'sign of overfitting, {sign}: ') == 1 for sign in SIGNS) and said.err.count('(guide 10.5)') == 3
    assert said.err.count('raise loader.num_workers (now 0') == 1 and '7 images/s, 60% waiting for data' in said.out
    events = [json.loads(l) for l in (tmp_path/'log.jsonl').read_text().splitlines()]
    assert {(e['epoch'], e['sign']) for e in events if e['event'] == 'overfitting'} == {(i, sign) for sign in SIGNS for i in range(1 if sign == 'large IoU gap' else 3, 6)}
    show = show_training(tmp_path); assert len(show.axes) == 4 and {l for a in show.axes for l in a.get_legend_handles_labels()[1]} >= set(SIGNS)
