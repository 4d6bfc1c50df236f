"""Mammography risk from its config alone: five models trained, killed and resumed to the same bytes, evaluated and
reported; the guide's command, flags, folder and files"""
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from helpers.shell import Program, held, running, shell
from helpers.waiting import wait_for
from rtsseg.class_export import CLASS_FORMATS, RISK_INPUTS, export_any, runner_of
from rtsseg.config import ConfigError, find_system, load, read_yaml, to_yaml
from rtsseg.evaluation import evaluate
from rtsseg.exam_begin import begin_from
from rtsseg.exam_feed import turn_chest_left
from rtsseg.exam_runs import results_name
from rtsseg.phantom import PhantomWorld, make_phantom_world
from rtsseg.reporting import report
from rtsseg.risk_models import ALIGNED_BY_IMAGES, RISK_MODELS
from rtsseg.runs import read_log, run_folder
from rtsseg.schedule import Plateau, learning_rate, plan_stages
from rtsseg.survival_metrics import risk_columns
from rtsseg.systems.survival import (
    REQUIRED_FLAGS,
    RISK_FLAGS,
    config_of_flags,
    flag_parser,
    model_file,
    model_settings,
)
from rtsseg.training import train
from rtsseg.tuning import search
from rtsseg.variants import read_axes

ROOT = Path(__file__).resolve().parent.parent
SURVIVAL = ROOT/'configs'/'survival'
NET = dict(width=4, levels=2, heads=2, window=4, size=None)

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    return make_phantom_world(tmp_path_factory.mktemp('world'), PhantomWorld(patients=24, height=48, width=32)).parent

def data(world):
    return dict(csv_file=world/'exams.csv', data_root=world, height=48, width=32, priors=1, made=None)

SMALL = dict(encoder='test_byobnet', num_heads=4, grid=2, max_t=3)

def config(world, runs, name='VMRA-MaR', **more):
    "configs/survival/toy.yaml on a smaller world, two epochs"
    small = dict(runs=runs, epochs=2, batch_size=8, tracker=dict(kind='none'), data=data(world), registration=NET,
                 model=dict(name=name, **SMALL))
    return load(SURVIVAL/'toy.yaml', **small | more)

@pytest.fixture(scope='module')
def registered(world, tmp_path_factory):
    "The model directory of a registration"
    cfg = load(SURVIVAL/'registration.yaml', runs=tmp_path_factory.mktemp('runs'), epochs=1, batch_size=8, device='cpu',
               tracker=dict(kind='none'), registration=NET, data=data(world), loader=dict(num_workers=0))
    return train(cfg)/'model'

@pytest.fixture(scope='module')
def undisturbed(world, tmp_path_factory):
    "A run with a view in a folder of its own: two epochs, a checkpoint after each"
    top = tmp_path_factory.mktemp('risk')
    cfg = config(world, top/'runs', checkpoint=dict(every=1), path_out_dir=top/'out'/'risk')
    return train(cfg)

@pytest.mark.parametrize('name', RISK_MODELS)
def test_each_model_trains_is_judged_and_is_exported(world, registered, tmp_path, name):
    "An epoch, and the evaluation finds its numbers again; without their registration two of them are refused"
    paths = dict(embed_path_saved_reg_model=registered)
    folder = train(config(world, tmp_path/'runs', name, epochs=1, paths=paths))
    row, = read_log(folder)
    assert all(np.isfinite(value) for key, value in row.items() if key.startswith('train/loss/'))
    assert {'val/c_index', 'val/auc_5', 'train/c_index', 'train/auc_1', 'val/loss'} <= set(row)
    cfg, system = load(folder/'config.yaml'), find_system('survival')
    table = system.read_table(evaluate(folder, 'val'))
    best = json.loads((folder/'model'/'metrics.json').read_text())
    found = system.metrics(table, cfg)
    assert found == pytest.approx({key: best['metrics'][key] for key in found}, abs=1e-6, nan_ok=True)
    # on exams with missing views, and without a prior
    parity = export_any(folder/'model', tmp_path/'out', ['onnx'])['model.onnx']
    assert parity.difference < 1e-5
    if name in ALIGNED_BY_IMAGES:
        alone = config(world, tmp_path/'runs', name)
        with pytest.raises(ConfigError, match='embed_path_saved_reg_model is null: model.name .* needs the weights'):
            system.model(alone, system.feed(alone))

def test_killed_it_ends_in_the_same_bytes(world, undisturbed, tmp_path):
    "kill -9 after the first epoch"
    cfg = config(world, tmp_path/'runs', checkpoint=dict(every=1, resume_minutes=1e-6))
    (tmp_path/'cfg.yaml').write_text(to_yaml(cfg))
    folder = run_folder(cfg, find_system('survival').feed(cfg).hash)
    program = ['rtsseg-train', '--config', tmp_path/'cfg.yaml', '--inline']
    with running(Program(*program, env=held(folder, 1))) as process:
        wait_for(lambda: 'epoch   1/2' in process.printed() or process.poll() is not None)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert train(cfg) == folder
    weights = [(run/'model'/'model.safetensors').read_bytes() for run in (folder, undisturbed)]
    assert weights[0] == weights[1]

def test_results_do_not_depend_on_workers(world, undisturbed, tmp_path):
    folder = train(config(world, tmp_path, loader=dict(num_workers=2)))
    assert (folder/'model'/'model.safetensors').read_bytes() == (undisturbed/'model'/'model.safetensors').read_bytes()

def test_an_exported_file_gives_the_risk_of_an_evaluation(undisturbed, tmp_path):
    "From the numbers of the PNG files, in TorchScript"
    export_any(undisturbed/'model', tmp_path/'out', ['torchscript'])
    run = runner_of(torch.jit.load(tmp_path/'out'/CLASS_FORMATS['torchscript']), RISK_INPUTS)
    cfg, system = load(undisturbed/'config.yaml'), find_system('survival')
    dataset = system.feed(cfg).loaders()[1].dataset
    exams = dataset.exams
    place = next(place for place, row in enumerate(dataset.rows) if exams.priors[row])
    now = dataset.rows[place]
    before = exams.priors[now][0]
    views = [[turn_chest_left(exams.image(exam, view)) for view in range(4)] for exam in (now, before)]
    years = exams.table.study_year
    inputs = dict(pixels=np.array(views, np.float32)[None, :, :, None], present=np.ones((1, 2, 4), bool),
                  gap=np.float32([[0, years[now] - years[before]]]))
    table = system.read_table(evaluate(undisturbed, 'val')).frame.set_index('sample')
    expected = table.loc[dataset.names[place], risk_columns(5)].to_numpy(float)
    np.testing.assert_allclose(run(inputs)[0], expected, atol=1e-5)

def test_an_export_of_other_formats_is_refused(undisturbed, tmp_path):
    with pytest.raises(ConfigError, match='onnx and torchscript'):
        export_any(undisturbed/'model', tmp_path/'out', ['int8'])
    assert not (tmp_path/'out').exists()

def view_of(folder):
    return Path((folder/'guide'/'view.txt').read_text())

def test_the_output_folder_is_that_of_the_guide(undisturbed):
    "Names and contents; PyTorch opens the files by itself, and its own schedulers take the states"
    cfg, view = load(undisturbed/'config.yaml'), view_of(undisturbed)
    run_id = f'{undisturbed.parent.name}-{undisturbed.name}'
    assert re.fullmatch(r'risk_Model_VMRA-MaR_lr_0\.003_wd_0\.0001_epochs_2_bs_8_\d{8}_\d{6}', view.name)
    assert {path.name for path in view.iterdir()} == {
        'checkpoint_0001.pth', 'checkpoint_0002.pth', f'best_model_risk_prediction_id-{run_id}.pth',
        f'model_risk_prediction_training_id_{run_id}_last_epoch.pth',
        f'train_risk_prediction_training_id_{run_id}.log'}
    assert all(path.is_symlink() for path in view.iterdir())
    kept = torch.load(view/'checkpoint_0001.pth', weights_only=True)
    assert {'model', 'optimizer', 'scheduler_warmup', 'scheduler_plateau', 'epoch', 'global_step',
            'best_c_index'} <= set(kept)
    first, last = read_log(undisturbed)
    assert (kept['epoch'], kept['global_step']) == (1, first['step'])
    # the best model is the exported one
    best = torch.load(view/f'best_model_risk_prediction_id-{run_id}.pth', weights_only=True)
    model = find_system('survival').unpack(undisturbed/'model').model
    assert all(torch.equal(value, best['model'][key]) for key, value in model.state_dict().items())
    assert best['best_c_index'] == max(first['val/c_index'], last['val/c_index'])
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=cfg.lr.base_lr)
    LambdaLR(optimizer, lambda step: 1.).load_state_dict(kept['scheduler_warmup'])
    ReduceLROnPlateau(optimizer, mode='max').load_state_dict(kept['scheduler_plateau'])
    log = (view/f'train_risk_prediction_training_id_{run_id}.log').read_text()
    assert len(log.splitlines()) == 2 and 'val/c_index' in log and 'train/auc_5' in log

def test_a_run_begins_from_a_file_of_the_folder(world, undisturbed, tmp_path):
    "--resume_from: the second epoch again, in another folder, to the same weights"
    cfg = config(world, tmp_path/'runs', checkpoint=dict(every=1))
    folder = run_folder(cfg, find_system('survival').feed(cfg).hash)
    assert begin_from(view_of(undisturbed)/'checkpoint_0001.pth', folder)
    assert train(cfg) == folder
    assert (folder/'model'/'model.safetensors').read_bytes() == (undisturbed/'model'/'model.safetensors').read_bytes()

def test_a_report_shows_years_risk_and_attention(undisturbed):
    evaluate(undisturbed, 'val')
    done = shell('rtsseg-report', '--run', undisturbed)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (undisturbed/'report.html').read_text()
    words = ('c_index', 'auc_1', 'auc_5', 'ROC by year', 'Kaplan–Meier by risk', 'Calibration', 'Attention',
             'The exams of highest risk')
    assert all(word in text for word in words)

def test_a_report_of_two_seeds_has_mean_and_spread(world, undisturbed):
    "C-index and yearly AUC, mean ± standard deviation over seeds"
    other = train(load(undisturbed/'config.yaml', seed=1, runs=undisturbed.parents[2]))
    assert other.parent == undisturbed.parent and other != undisturbed
    cfg, system, found = load(undisturbed/'config.yaml'), find_system('survival'), []
    for folder in (undisturbed, other):
        found.append(system.metrics(system.read_table(evaluate(folder, 'val')), cfg)['c_index'])
    report([undisturbed, other], None)
    text = (undisturbed.parent/'report.html').read_text()
    assert f'{np.mean(found):.3f} ± {np.std(found, ddof=1):.3f}' in text

@pytest.mark.parametrize('name', ['survival', 'registration'])
def test_a_search_keeps_the_best_of_its_trials(world, tmp_path, name):
    cfg = config(world, tmp_path/'runs', epochs=1)
    if name == 'registration':
        shared = dict(runs=cfg.runs, epochs=1, batch_size=8, tracker=dict(kind='none'))
        cfg = load(SURVIVAL/'registration_toy.yaml', registration=NET, data=data(world), **shared)
    (tmp_path/'space.yaml').write_text('lr.base_lr: [0.003, 0.001]\n')
    study = search(cfg, tmp_path/'space.yaml', 2)
    values = [trial.value for trial in study.trials]
    assert len(values) == 2 and study.best_value == max(values)
    runs = [cfg.runs/trial.user_attrs['run']/'model'/'metrics.json' for trial in study.trials]
    assert values == [json.loads(path.read_text())['value'] for path in runs]
    # what a search tries by itself fits the config
    space, trials = find_system(name).search_plan(cfg)
    assert trials == 20 and 'lr.base_lr' in read_axes(ROOT/'configs'/f'{space}.yaml', type(cfg))

# ---------------------------------------------------------------- the guide's numbers

def test_the_base_is_the_guide_number_for_number():
    "Guide 004, CLI arguments, optimizer and schedulers"
    cfg = load(SURVIVAL/'base.yaml')
    assert (cfg.epochs, cfg.batch_size, cfg.seed, cfg.deterministic) == (100, 12, 2023, True)
    assert (cfg.lr.base_lr, cfg.optimizer.weight_decay, cfg.optimizer.name) == (5e-5, 1e-4, 'adamw')
    assert (cfg.lr.warmup_steps, cfg.lr.schedule, cfg.lr.plateau_patience, cfg.lr.plateau_factor) == (
        5000, 'plateau', 5, .5)
    assert (cfg.early_stopping.patience, cfg.early_stopping.start_epoch, cfg.early_stopping.window,
            cfg.early_stopping.min_delta) == (15, 1, 1, 0)
    assert (cfg.data.height, cfg.data.width, cfg.checkpoint.every, cfg.val_frequency) == (2048, 1664, 10, 1)
    assert cfg.augment.enabled and cfg.optimizer.clip_norm is None and not cfg.ema.enabled
    planned, = plan_stages(cfg, ['encoder', 'decoder'])
    # linear from 0 over steps, whatever an epoch holds; the encoder at a tenth
    for step, rate in ((0, 0), (2500, 2.5e-5), (5000, 5e-5), (90000, 5e-5)):
        assert learning_rate(planned, 'decoder', step / 300, step) == pytest.approx(rate)
        assert learning_rate(planned, 'encoder', step / 300, step) == pytest.approx(rate / 10)
    assert learning_rate(planned, 'decoder', 50, 15000, factor=.25) == pytest.approx(1.25e-5)

def test_oa_breacr_trains_its_encoder_at_the_whole_rate():
    multipliers = {name: load(SURVIVAL/'base.yaml', SURVIVAL/model_file(name)).lr.backbone_lr_multiplier
                   for name in RISK_MODELS}
    assert multipliers == {name: 1 if name == 'OA-BreaCR' else .1 for name in RISK_MODELS}

def test_the_plateau_is_that_of_torch():
    "With the guide's settings, over validations of a C-index"
    settings, rng = load(SURVIVAL/'base.yaml').lr, np.random.default_rng(0)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=settings.base_lr)
    peer = ReduceLROnPlateau(optimizer, mode='max', factor=.5, patience=5)
    ours = Plateau()
    ours.begin(1, 'max')
    for value in np.maximum.accumulate(rng.uniform(.5, .7, 60)) - .02 * rng.random(60):
        peer.step(value)
        ours.update(settings, value, 'max')
        assert settings.base_lr * ours.factor == pytest.approx(optimizer.param_groups[0]['lr'])
    assert ours.factor < 1

def test_a_run_that_ends_inside_its_warm_up_is_warned_of(world, tmp_path):
    def warnings(**lr):
        cfg = config(world, tmp_path, lr=dict(schedule='plateau', warmup_epochs=0, min_lr=1e-6, **lr), epochs=40,
                     early_stopping=dict(patience=15, start_epoch=1, window=1, min_delta=0))
        return find_system('survival').feed(cfg).warnings()

    assert 'ends inside its warm-up' in warnings(warmup_steps=5000)[0]
    steps = len(find_system('survival').feed(config(world, tmp_path)).loaders()[0])
    assert 'early stopping with patience 15 may end the run' in warnings(warmup_steps=20 * steps)[0]
    assert warnings(warmup_steps=4 * steps) == []

def test_a_rate_for_pretrained_weights_without_them_is_doubted():
    lines = load(SURVIVAL/'base.yaml').doubtful_settings()
    assert any('paths.mirai_encoder is null' in line and '0.1 × the rate' in line for line in lines)
    assert load(SURVIVAL/'base.yaml', SURVIVAL/'oa_breacr.yaml').doubtful_settings() == []

def test_augmentations_are_those_of_the_guide(world):
    "Guide 004, Data Augmentation; validation sees images as they are"
    cfg = load(SURVIVAL/'base.yaml')
    augment, size = cfg.augment, (cfg.data.height, cfg.data.width)
    assert (augment.crop.height * size[0], augment.crop.width * size[1]) == pytest.approx((1946, 1581))
    assert (augment.crop.p, augment.affine.p, augment.jitter.p, augment.gamma.p) == (.2, .5, .5, .5)
    assert (augment.affine.translation, augment.affine.scale) == (.1, (1, 1.1))
    assert (augment.jitter.brightness, augment.jitter.contrast, augment.gamma.gamma) == (.4, .4, (.8, 1.2))
    small = load(SURVIVAL/'toy.yaml', data=data(world))
    train, val = find_system('survival').feed(small).loaders()
    assert train.dataset.dataset.augment.enabled and not val.dataset.augment.enabled

# ---------------------------------------------------------------- the guide's command

# the tables of the guide: flag and default
OPTIONAL_FLAGS = dict(num_epochs=100, batch_size=12, learning_rate=5e-5, weight_decay=1e-4, warmup_steps=5000,
                      use_scheduler=True, patience_lr_scheduler=5, lr_decay=.5, patience=15, augmentations=True,
                      resume_from=None, wandb_id=None, seed=2023)

def line(**given):
    needed = dict(model='LMV-Net', dataset='EMBED', csv_file='exams.csv', data_root='png', path_out_dir='out/risk')
    return [text for flag, value in (needed | given).items() for text in (f'--{flag}', str(value))]

def test_every_flag_of_the_guide_is_taken():
    known = {action.dest for action in flag_parser()._actions}
    assert set(REQUIRED_FLAGS) == {'model', 'dataset', 'csv_file', 'data_root', 'path_out_dir'}
    assert {*REQUIRED_FLAGS, *OPTIONAL_FLAGS} <= known
    given = {flag: value for flag, value in OPTIONAL_FLAGS.items() if value is not None}
    plain, resume = config_of_flags(line(), ROOT/'none')
    assert resume is None and plain.tracker.run_id == ''
    # typed, the defaults of the guide change nothing
    assert config_of_flags(line(**given), ROOT/'none')[0] == plain
    with pytest.raises(SystemExit):
        config_of_flags(line()[2:])

@pytest.mark.parametrize('flag, value, field', [
    ('num_epochs', 7, 'epochs'), ('batch_size', 3, 'batch_size'), ('learning_rate', 1e-3, 'lr.base_lr'),
    ('weight_decay', .1, 'optimizer.weight_decay'), ('warmup_steps', 9, 'lr.warmup_steps'),
    ('patience_lr_scheduler', 2, 'lr.plateau_patience'), ('lr_decay', .1, 'lr.plateau_factor'),
    ('patience', 4, 'early_stopping.patience'), ('seed', 1, 'seed'), ('dropout', .35, 'model.dropout'),
    ('num_attn_blocks', 2, 'model.num_attn_blocks'), ('distance', 'Wasserstein', 'model.distance'),
    ('alpha_coeff', .5, 'model.alpha_coeff'), ('margin', 3., 'model.margin'), ('wandb_id', 'abc-1', 'tracker.run_id')])
def test_a_flag_sets_what_it_means(flag, value, field):
    cfg, _ = config_of_flags(line(**{flag: value}))
    for name in field.split('.'):
        cfg = getattr(cfg, name)
    assert cfg == value

def test_switches_have_a_value_or_none():
    assert config_of_flags([*line(), '--augmentations'])[0].augment.enabled
    assert not config_of_flags(line(augmentations=False))[0].augment.enabled
    assert config_of_flags(line(use_scheduler=False))[0].lr.schedule == 'constant'
    with pytest.raises(ConfigError, match='True or False was expected'):
        config_of_flags(line(augmentations='perhaps'))

def test_the_command_line_goes_before_the_file_and_the_file_before_the_defaults(tmp_path):
    (tmp_path/'lmv_net.yaml').write_text('name: LMV-Net\ndropout: 0.1\nnum_attn_blocks: 3\npatience: 2\n')
    cfg, _ = config_of_flags(line(dropout=.3), tmp_path)
    assert (cfg.model.dropout, cfg.model.num_attn_blocks, cfg.early_stopping.patience, cfg.epochs) == (.3, 3, 2, 100)
    (tmp_path/'lmv_net.yaml').write_text('name: Mirai\nfeature_dim: 1536\n')
    with pytest.raises(ConfigError, match="name is 'Mirai'.*\n.*feature_dim: nothing reads this key"):
        config_of_flags(line(), tmp_path)

@pytest.mark.parametrize('name', RISK_MODELS)
def test_a_models_file_says_the_same_as_its_config(name):
    flat = read_yaml(ROOT/'config'/'models'/model_file(name))
    assert flat == read_yaml(SURVIVAL/model_file(name))['model']
    assert set(flat) - {'name'} <= set(model_settings())

@pytest.mark.parametrize('name', RISK_MODELS)
def test_a_script_trains_its_model_as_the_guide_says(name):
    "It names what is required, and leaves what has a default to main_train.py"
    text = (ROOT/'scripts'/f'train_{model_file(name)[:-5]}.sh').read_text()
    given = dict(re.findall(r'--(\w+) (\S+) \\', text))
    assert 'main_train.py' in text and text.endswith('"$@"\n')
    assert given['model'] == name
    assert set(given) == {'model', 'dataset', 'csv_file', 'data_root', 'path_out_dir'}

@pytest.mark.slow
def test_accelerate_launch_trains_in_two_processes(world, tmp_path):
    """The guide's command by accelerate, whose launcher of several GPUs starts two processes on a CPU as well

    Then resumed from its checkpoint, with an epoch more."""
    given = dict(model='Mirai', csv_file=world/'exams.csv', data_root=world, path_out_dir=tmp_path/'out'/'risk',
                 num_epochs=1, batch_size=4, warmup_steps=2, encoder='test_byobnet', num_heads=4)
    small = ['data.height=48', 'data.width=32', 'device=cpu', 'loader.num_workers=0', 'tracker.kind=none',
             'checkpoint.every=1']
    launcher = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2']
    program = [*launcher, ROOT/'main_train.py', *line(**given),
               *(text for override in small for text in ('--override', override))]
    done = subprocess.run(list(map(str, program)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    view, = (tmp_path/'out').glob('risk_Model_Mirai_lr_5e-05_wd_0.0001_epochs_1_bs_4_*')
    start, = [json.loads(text) for log in (tmp_path/'out'/'runs').rglob('log.jsonl')
              for text in log.read_text().splitlines() if '"start"' in text]
    assert start['processes'] == 2
    more = [*map(str, program), '--num_epochs', '2', '--resume_from', str(view/'checkpoint_0001.pth')]
    done = subprocess.run(more, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    view, = (tmp_path/'out').glob('*_epochs_2_bs_4_*')
    kept = torch.load(view/'checkpoint_0002.pth', weights_only=True)
    assert [row['epoch'] for row in kept['run']['history']] == [1, 2]

def test_the_command_says_what_is_wrong(tmp_path):
    "One message, and exit code 2"
    program = [sys.executable, ROOT/'main_train.py', *line(model='Mira')]
    done = subprocess.run(list(map(str, program)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and 'model.name' in done.stderr and 'Traceback' not in done.stderr

def test_the_name_of_the_folder_is_that_of_the_guide():
    cfg = load(SURVIVAL/'base.yaml')
    assert results_name(Path('results/risk'), 'LMV-Net', cfg, '20260101_000000') == Path(
        'results/risk_Model_LMV-Net_lr_5e-05_wd_0.0001_epochs_100_bs_12_20260101_000000')

def test_the_flags_name_settings_that_exist():
    cfg = load(SURVIVAL/'base.yaml')
    for field in {**RISK_FLAGS, **model_settings()}.values():
        node = cfg
        for name in field.split('.'):
            node = getattr(node, name)
