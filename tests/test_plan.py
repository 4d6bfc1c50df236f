"A plan: what it chooses, that it overrides nothing, and that it leads from a folder of images to a report"
import re

import cv2
import numpy as np
import pytest
from rasterio import transform

from rtsseg.cli import main
from rtsseg.config import ConfigError, load
from rtsseg.console import DataError
from rtsseg.manifest import Manifest, read_manifest
from rtsseg.plan import (
    NETWORKS,
    SIDES,
    Fingerprint,
    Machine,
    RunPlan,
    crop_sides,
    longer_sides,
    nested,
    object_boxes,
    plan_batch,
    plan_epochs,
    plan_full_batch,
    plan_monitor,
    plan_name,
    plan_network,
    plan_precision,
    plan_sampling,
    plan_start,
    plan_threads,
    plan_tiles,
    take_fingerprint,
    write_plan,
)
from rtsseg.pretrained import are_at_hand
from rtsseg.raster import write_raster
from rtsseg.sampler import Batches

CPU = Machine('cpu', 2, 2**33, has_bf16=False)

def fingerprint(**more):
    "Of ten images of several sizes with objects of 20 pixels"
    given = dict(images=10, shortest=300, are_tiles=False, lengths=np.full(50, 20), positive_share=.01, pixel_size=3.)
    return Fingerprint(**given | more)

@pytest.mark.parametrize('length', [3, 60, 65, 120, 130, 5000])
def test_a_crop_is_twice_as_long_as_nine_of_ten_objects(length):
    "As far as there are sides; the smaller ones, for little time, still hold them"
    found = fingerprint(lengths=np.full(50, length))
    side, *for_little_time = crop_sides(found)
    chosen = {choice.setting: choice.value for choice in plan_tiles(found, side)}
    assert chosen == {'data.crops.enabled': True, 'data.tile_size': side}
    assert all(length <= other < side for other in for_little_time)
    assert side >= min(2 * length, max(SIDES))
    smaller = [other for other in SIDES if other < side]
    assert all(other < 2 * length for other in smaller)

def test_tiles_that_are_no_larger_than_a_crop_stay_as_they_are():
    chosen = plan_tiles(fingerprint(are_tiles=True, shortest=96), 128)
    assert [(c.setting, c.value) for c in chosen] == [('data.tile_size', 96)]
    chosen = plan_tiles(fingerprint(are_tiles=True, shortest=256), 64)
    assert [(c.setting, c.value) for c in chosen] == [('data.crops.enabled', True), ('data.tile_size', 64)]

def test_object_lengths_by_another_library():
    from skimage.measure import label, regionprops
    rng = np.random.default_rng(0)
    mask = (cv2.GaussianBlur(rng.random((200, 150)), (0, 0), 3) > .53).astype(np.uint8)
    boxes = [region.bbox for region in regionprops(label(mask, connectivity=2))]
    assert sorted(longer_sides(object_boxes(mask))) == sorted(max(b[2] - b[0], b[3] - b[1]) for b in boxes)

def test_more_time_takes_a_larger_network():
    "The largest that takes enough steps; the smallest where none does"
    plan = RunPlan(overrides=['data.tile_size=32', 'batch_size=2', 'device=cpu'])
    def encoder(minutes):
        return next(c.value for c in plan_network(plan, minutes) if c.setting == 'model.encoder')
    assert encoder(1e-6) == NETWORKS[0].encoder
    assert encoder(1e6) == NETWORKS[-1].encoder

def test_a_batch_of_a_gpu_fits_into_its_memory(monkeypatch):
    asked = []
    monkeypatch.setattr('rtsseg.plan.largest_batch', lambda cfg, most, limit: asked.append((most, limit)) or (4, {}))
    monkeypatch.setattr('torch.cuda.mem_get_info', lambda: (2**30, 2**34))
    chosen, = plan_batch(load(overrides=['batch_size=16']), Machine('cuda', 8, 2**33, has_bf16=False))
    assert (chosen.setting, chosen.value, asked) == ('batch_size', 4, [(16, 2**30)])
    assert plan_batch(load(), CPU) == []

def test_weights_at_hand_are_taken(monkeypatch):
    "Of the largest network that is fast enough; the rates are the guide's then"
    plan = RunPlan(overrides=['data.tile_size=32', 'batch_size=2', 'device=cpu'])
    here = {NETWORKS[0].encoder, NETWORKS[2].encoder}
    monkeypatch.setattr('rtsseg.plan.are_at_hand', lambda model: model.encoder in here)
    def chosen(minutes):
        return {choice.setting: choice.value for choice in plan_network(plan, minutes)}
    plenty, none = chosen(1e6), chosen(1e-6)
    assert (plenty['model.encoder'], plenty['model.weights']) == (NETWORKS[2].encoder, 'imagenet')
    assert (none['model.encoder'], none['model.weights']) == (NETWORKS[0].encoder, None)
    given = RunPlan(overrides=[*plan.overrides, 'model.weights=null'])
    assert all(choice.value != 'imagenet' for choice in plan_network(given, 1e6))
    assert [choice.setting for choice in plan_start('imagenet')] == ['freeze_backbone_epochs']
    assert 'lr.base_lr' in {choice.setting for choice in plan_start(None)}

def test_weights_in_a_cache_are_found_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr('rtsseg.pretrained.weights_source', lambda cfg: 'https://example.org/some/weights.pth')
    monkeypatch.setattr('rtsseg.pretrained.check_reachable', lambda url: pytest.fail('the network was asked'))
    assert not are_at_hand(load().model)
    (tmp_path/'hub'/'checkpoints').mkdir(parents=True)
    (tmp_path/'hub'/'checkpoints'/'weights.pth').touch()
    assert are_at_hand(load().model)

def test_the_fastest_number_of_threads(monkeypatch):
    seconds = {1: .3, 4: .1, 8: .2}
    monkeypatch.setattr('rtsseg.plan.step_seconds', lambda cfg: seconds[cfg.threads])
    cfg = load(overrides=['threads=8'])
    chosen, = plan_threads(cfg, CPU)
    assert (chosen.setting, chosen.value) == ('threads', 4)
    assert all(f'{number}: {taken:g} s' in chosen.why for number, taken in seconds.items())
    # one core leaves no choice
    assert plan_threads(load(overrides=['threads=1']), CPU) == []

@pytest.mark.parametrize('half, chosen', [(.5, 'bf16'), (.95, 'fp32'), (2., 'fp32')])
def test_bf16_must_be_clearly_faster(monkeypatch, half, chosen):
    monkeypatch.setattr('rtsseg.plan.step_seconds', lambda cfg: dict(fp32=1., bf16=half)[cfg.precision])
    choice, = plan_precision(load(), Machine('cpu', 2, 2**33, has_bf16=True))
    assert (choice.setting, choice.value) == ('precision', chosen)
    assert f'1 s a step in fp32, {half:g} s in bf16' in choice.why
    assert plan_precision(load(), CPU) == []

def test_little_time_has_few_epochs_and_says_so():
    "No plan whose budget refuses it for more epochs than steps"
    for steps in (1, 30, 100, 10_000):
        chosen = {choice.setting: choice for choice in plan_epochs(5, steps)}
        assert 2 <= chosen['epochs'].value <= 12
        assert ('too few to learn much' in chosen['epochs'].why) == (steps < 200)

def test_the_curriculum_and_the_monitor_follow_the_negatives(tiny_world):
    manifest = read_manifest(tiny_world)
    def of(negatives):
        table = manifest.table.assign(split='train', n_positive=0, positive=False)
        table.loc[:9, ['n_positive', 'positive']] = [5, True]
        return Manifest(table[:10 + negatives], manifest.root, manifest.path)
    ratios = {n: plan_sampling(of(n), 12)[0].value[0]['ratio'] for n in (0, 9, 25, 100)}
    assert ratios == {0: '1:1', 9: '1:1', 25: '1:2', 100: '1:5'}
    as_val = of(100).table.assign(split='val')
    enough, few = (plan_monitor(Manifest(rows, manifest.root, manifest.path)) for rows in (as_val, as_val[:30]))
    assert [(c.setting, c.value) for c in enough] == [('metrics.monitor', 'pr_auc@200')]
    # what the few tiles can answer comes first, and is what probabilities are fitted to
    planned = load(**nested(few))
    assert (planned.metrics.monitor, planned.metrics.ratios) == ('pr_auc@native', ['native', 200])
    assert planned.calibrate.ratio == 'native' and all(c.why for c in few)

def test_a_plan_overrides_nothing(tiny_world, tmp_path):
    "Settings of a config are as they were, and a given network stays with its rates"
    own = tmp_path/'own.yaml'
    own.write_text('epochs: 7\nlr: {base_lr: 5e-4}\nmodel: {architecture: unet, encoder: resnet18, weights: null}\n')
    out = tmp_path/'plan.yaml'
    write_plan(out, str(tiny_world), minutes=.5, device='cpu', files=[own])
    text = out.read_text()
    assert 'base_lr' not in text and 'encoder' not in text
    both = load(own, out)
    assert (both.epochs, both.lr.base_lr, both.model.encoder) == (7, 5e-4, 'resnet18')
    assert both.budget_minutes == .5
    # what follows from a given value does
    assert both.lr.warmup_epochs == .35

def test_a_plan_alone_has_what_overrides_said(tiny_world, tmp_path):
    "The command that is printed names no override; a setting of the network leaves the rules on"
    out = tmp_path/'plan.yaml'
    given = ['batch_size=3', 'model.dropout=0.1', 'sampler.curriculum=[{first: 1, last: 4, ratio: 1}]', 'threads=1']
    write_plan(out, str(tiny_world), minutes=.5, device='cpu', overrides=given)
    planned = load(out)
    assert (planned.batch_size, planned.model.dropout, planned.threads) == (3, .1, 1)
    assert [row.last for row in planned.sampler.curriculum] == [4]
    assert planned.model.encoder == NETWORKS[0].encoder and planned.lr.base_lr == 3e-3

def test_what_is_mapped_is_named(tiny_world, tmp_path):
    "As said, else as a config says that was given, else an object"
    own = tmp_path/'own.yaml'
    own.write_text('data: {object: gully}\n')
    def named(files=(), **given):
        plan = RunPlan(files, **given)
        plan.add(plan_name(plan, ''))
        return plan.config().data.object
    assert (named(), named([own]), named(overrides=['data.object=pond'])) == ('object', 'gully', 'pond')
    assert [choice.value for choice in plan_name(RunPlan([own]), 'building')] == ['building']

def test_a_plan_is_not_written_over(tiny_world, tmp_path):
    out = tmp_path/'plan.yaml'
    out.write_text('edited: by hand')
    with pytest.raises(ConfigError, match='--force'):
        write_plan(out, str(tiny_world), minutes=.5, device='cpu')
    assert out.read_text() == 'edited: by hand'
    write_plan(out, str(tiny_world), minutes=.5, device='cpu', overrides=['threads=1'], force=True)
    assert load(out).budget_minutes == .5

@pytest.mark.parametrize('minutes', [0, -1, float('nan'), float('inf')])
def test_minutes_that_are_no_time(tiny_world, tmp_path, minutes):
    with pytest.raises(ConfigError, match='minutes'):
        write_plan(tmp_path/'plan.yaml', str(tiny_world), minutes=minutes, device='cpu')

def test_a_budget_that_training_would_refuse_is_refused(tiny_world, tmp_path):
    with pytest.raises(ConfigError, match='budget_minutes 0.0001: .* minutes here'):
        write_plan(tmp_path/'plan.yaml', str(tiny_world), minutes=1e-4, device='cpu')
    assert not (tmp_path/'plan.yaml').exists()

def test_a_batch_is_no_larger_than_training_fills(tiny_world):
    "By the sampler's own rule, which the larger one breaks"
    manifest = read_manifest(tiny_world)
    few = manifest.table.assign(split='train', n_positive=5, positive=True)[:5]
    cfg = load(overrides=['batch_size=8'])
    chosen, = plan_full_batch(Manifest(few, manifest.root, manifest.path), cfg)
    assert (chosen.setting, chosen.value) == ('batch_size', 5)
    with pytest.raises(ValueError, match='fill'):
        Batches(few.positive, cfg.sampler, 6, 42)
    assert plan_full_batch(Manifest(few, manifest.root, manifest.path), load(overrides=['batch_size=4'])) == []

def test_images_of_every_split_decide_whether_they_are_tiles(tiny_world, tmp_path):
    "Training tiles of one size beside larger images of validation are images of any size"
    manifest = read_manifest(tiny_world)
    table = manifest.table.copy()
    row = table.index[table.split == 'val'][0]
    name = 'larger.tif'
    write_raster(manifest.root/name, np.zeros((3, 90, 120), np.uint8), transform.from_origin(0, 0, 3, 3), 'EPSG:3413')
    table.loc[row, 'image'] = name
    assert take_fingerprint(manifest).are_tiles
    assert not take_fingerprint(Manifest(table, manifest.root, manifest.path)).are_tiles

def test_a_split_without_objects_cannot_be_planned(tiny_world):
    manifest = read_manifest(tiny_world)
    empty = manifest.table[manifest.table.n_positive == 0].reset_index(drop=True)
    with pytest.raises(DataError, match='no training image holds an object'):
        take_fingerprint(Manifest(empty, manifest.root, manifest.path))

def test_a_manifest_or_a_folder(tmp_path, tiny_world):
    with pytest.raises(ConfigError, match='leave out one of them'):
        write_plan(tmp_path/'p.yaml', str(tiny_world), str(tmp_path))
    with pytest.raises(ConfigError, match='minutes'):
        write_plan(tmp_path/'p.yaml', str(tiny_world), minutes=0)
    assert not (tmp_path/'p.yaml').exists()

def write_folder(folder, count=9):
    "Photographs of several sizes in which bright blobs are the objects"
    rng = np.random.default_rng(0)
    for name in ('images', 'masks'):
        (folder/name).mkdir(parents=True)
    for i in range(count):
        shape = (150 + 10 * i, 220 - 10 * i)
        mask = np.zeros(shape, np.uint8)
        for _ in range(3):
            cv2.circle(mask, tuple(map(int, rng.integers(20, 130, 2))), 7, 255, -1)
        image = rng.normal(100, 10, (*shape, 3)) + (mask > 0)[..., None] * 60
        cv2.imwrite(str(folder/'images'/f'{i}.jpg'), image.clip(0, 255).astype(np.uint8))
        cv2.imwrite(str(folder/'masks'/f'{i}.png'), mask)

def test_a_folder_of_several_classes_is_planned_with_those_that_are_given(tmp_path, monkeypatch):
    "Without them it is refused; with them nothing else of the source is lost"
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path/'fields')
    for path in (tmp_path/'fields'/'masks').iterdir():
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED) // 255 * 2
        mask[:5, :5] = 5
        cv2.imwrite(str(path), mask)
    with pytest.raises(DataError, match='data.source.classes'):
        write_plan('plan.yaml', folder='fields', minutes=1, device='cpu')
    given = ['data.source.classes={0: 0, 2: 1, 5: 255}', 'threads=1']
    write_plan('plan.yaml', folder='fields', minutes=1, device='cpu', overrides=given)
    source = load('plan.yaml').data.source
    assert (source.classes, source.path) == ({0: 0, 2: 1, 5: 255}, tmp_path/'fields')

def test_from_a_folder_to_a_report_in_two_commands(tmp_path, monkeypatch, capsys):
    "Whose masks hold 0 and 255, and without a line of YAML; the second command may be given again"
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path/'fields')
    assert main(['plan', '--folder', 'fields', '--minutes', '0.2', '--device', 'cpu', '--out', 'fields.yaml',
                 '--object', 'light patch']) == 0
    printed = capsys.readouterr().out
    assert 'rtsseg run --config fields.yaml' in printed
    assert load('fields.yaml').data.crops.enabled
    quick = ['--override', 'metrics.replicates=20', '--override', 'tracker.kind=none']
    for _ in range(2):
        assert main(['run', '--config', 'fields.yaml', *quick]) == 0
        printed = capsys.readouterr().out
        assert 'report.html' in printed
    # ten images hold no 1:200: the verdict speaks about the split as it is
    assert re.search(r'^object precision at native ', printed, re.MULTILINE)
    report, = (tmp_path/'runs').rglob('report.html')
    assert 'PR-AUC' in report.read_text()
    # what is mapped has its name wherever a person reads
    card = report.with_name('model')/'README.md'
    for text in (printed, report.read_text(), report.with_suffix('.md').read_text(), card.read_text()):
        assert not re.search(r'\bslumps?\b|_RTS', text, re.IGNORECASE) and 'light patch' in text
