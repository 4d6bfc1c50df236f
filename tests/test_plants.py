"""The plants system from its config alone: six stages, killed and resumed to the same bytes, evaluated, reported and
searched; weights that open without the library"""
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch.nn.functional import cross_entropy

from helpers.shell import Program, held, running, shell
from helpers.waiting import wait_for
from rtsseg.class_export import CLASS_FORMATS, export_any, some_photos
from rtsseg.config import ConfigError, find_system, load, read_yaml, to_yaml
from rtsseg.console import DataError
from rtsseg.evaluation import evaluate
from rtsseg.export import MOST_DIFFERENCE
from rtsseg.label_losses import label_focal
from rtsseg.leaf_world import make_leaf_world
from rtsseg.photo_feed import rare_weights
from rtsseg.plant_metrics import plant_scores
from rtsseg.routed import RoutedModel, build_routed, diagnose, offsets_of, own_diseases, route
from rtsseg.routed_runs import append_once
from rtsseg.runs import Stopped, append_line, config_hash, flatten, read_log, run_folder
from rtsseg.schedule import learning_rate, plan_stages
from rtsseg.systems.plants import PlantsTask
from rtsseg.training import train
from rtsseg.tuning import search

ROOT = Path(__file__).resolve().parent.parent

# epochs of the six stages in these tests
LASTS = 1, 2, 3, 6, 7, 8

def six_stages():
    "The stages of the guide, each of one epoch, and B1 of three"
    guide = load(ROOT/'configs'/'plants'/'guide.yaml')
    firsts = 1, *(last + 1 for last in LASTS)
    spans = zip(guide.stages, firsts, LASTS)
    return [stage.model_dump() | dict(first=first, last=last) for stage, first, last in spans]

@pytest.fixture(scope='module')
def leaves(tmp_path_factory):
    return make_leaf_world(tmp_path_factory.mktemp('world')/'leaves', side=48, images=24, species=4)

def config(leaves, runs, **more):
    "configs/plants/toy.yaml on a smaller world, eight epochs"
    small = dict(runs=runs, epochs=8, batch_size=16, tracker=dict(kind='none'), stages=six_stages(),
                 data=dict(source=leaves/'photos.csv', taxonomy=leaves/'taxonomy.json', side=32, made=None),
                 model=dict(backbone='test_efficientnet', weights=None), stage_weights_every=1,
                 # a loss that rises at all counts, so that heads are slowed
                 watch=dict(ratio=1.001, epochs=1, images=1, slow=.1))
    return load(ROOT/'configs'/'plants'/'toy.yaml', **small | more)

@pytest.fixture(scope='module')
def undisturbed(leaves, tmp_path_factory):
    return train(config(leaves, tmp_path_factory.mktemp('runs')))

def events(folder, kind):
    lines = [json.loads(line) for line in (folder/'log.jsonl').read_text().splitlines()]
    return [line for line in lines if line['event'] == kind]

def files_below(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob('*.pt'))}

def test_each_stage_trains_what_it_names(undisturbed):
    rows = read_log(undisturbed)
    parts = ('encoder', 'species', 'diseases')
    learnt = [[part for part in parts if row[f'lr/{part}']] for row in rows]
    assert learnt == [['species'], *[['encoder', 'species']] * 2, *[['diseases']] * 4, list(parts)]
    # 0.1 ×: the backbone in A3
    assert rows[2]['lr/encoder'] == pytest.approx(.1 * rows[2]['lr/species'])
    assert all(math.isfinite(row['val/loss']) for row in rows)
    assert any(name.startswith('train/disease/') for name in rows[0])

def broken_at(batch, forward=PlantsTask.forward):
    "A forward pass that gives no finite logit of a disease in one training batch"
    calls = []

    def broken(self, model, inputs):
        species, diseases = forward(self, model, inputs)
        calls.extend([batch] if model.training else [])
        return species, diseases * math.nan if model.training and len(calls) == batch else diseases
    return broken

class StopAfter:
    "Ask for a stop after a step"
    def __init__(self, step):
        self.step = step

    def on_step(self, run):
        if run.step == self.step:
            run.stop('as asked')

@pytest.mark.parametrize('stopped', [False, True])
def test_a_head_without_a_finite_loss_is_counted_across_a_resume(leaves, tmp_path, monkeypatch, stopped):
    "The step is skipped, the images are counted, and a stop later in the epoch forgets none of them"
    stages = [six_stages()[-1] | dict(first=1, last=1)]
    unmixed = dict(mixup=dict(p=0), cutmix=dict(p=0))
    cfg = config(leaves, tmp_path/'runs', epochs=1, stages=stages, mixing=unmixed)
    monkeypatch.setattr(PlantsTask, 'forward', broken_at(2))
    if stopped:
        with pytest.raises(Stopped):
            train(cfg, [StopAfter(3)])
    folder = train(cfg)
    row, = read_log(folder)
    event, = events(folder, 'not_finite')
    assert row['skipped'] == 1 and event['epoch'] == 1 and sum(event['heads'].values()) == cfg.batch_size
    assert {f'train/not_finite/{name}': n for name, n in event['heads'].items()} == {
        name: n for name, n in row.items() if name.startswith('train/not_finite/')}

def test_an_epoch_that_is_repeated_writes_no_event_twice(tmp_path):
    "The checkpoint of an epoch is written after its events: a kill in between repeats it"
    row = dict(event='not_finite', epoch=3, heads={'oak': 2})
    append_line(tmp_path/'log.jsonl', dict(event='start'))
    for written in (row, row, row | dict(epoch=4)):
        append_once(tmp_path/'log.jsonl', written)
    assert events(tmp_path, 'not_finite') == [row, row | dict(epoch=4)]

def kill_after(epoch, program, folder):
    "kill -9 of a trainer that waits after an epoch"
    with running(Program(*program, env=held(folder, epoch))) as process:
        wait_for(lambda: f'epoch   {epoch}/8' in process.printed() or process.poll() is not None)
        process.kill()
        assert process.wait() == -signal.SIGKILL

def test_killed_in_two_stages_it_ends_in_the_same_bytes(leaves, undisturbed, tmp_path):
    "kill -9 in A2 and in B1: order, augmentation, mixing, samplers, slowed heads and weights of stages are the same"
    assert events(undisturbed, 'diverges')
    cfg = config(leaves, tmp_path/'runs', checkpoint=dict(resume_minutes=1e-6))
    (tmp_path/'cfg.yaml').write_text(to_yaml(cfg))
    folder = run_folder(cfg, find_system('plants').feed(cfg).hash)
    program = ['rtsseg-train', '--config', tmp_path/'cfg.yaml', '--inline']
    for epoch in (2, 6):
        kill_after(epoch, program, folder)
    assert train(cfg) == folder
    assert len(events(folder, 'start')) == 3
    weights = [(f/'model'/'model.safetensors').read_bytes() for f in (folder, undisturbed)]
    assert weights[0] == weights[1]
    assert files_below(folder/'stages') == files_below(undisturbed/'stages')

def test_results_do_not_depend_on_workers(leaves, undisturbed, tmp_path):
    folder = train(config(leaves, tmp_path, loader=dict(num_workers=2)))
    assert (folder/'model'/'model.safetensors').read_bytes() == (undisturbed/'model'/'model.safetensors').read_bytes()

def test_evaluation_finds_the_numbers_of_training_again(undisturbed):
    cfg, system = load(undisturbed/'config.yaml'), find_system('plants')
    found = system.metrics(system.read_table(evaluate(undisturbed, 'val')), cfg)
    best = json.loads((undisturbed/'model'/'metrics.json').read_text())
    assert found == pytest.approx({name: best['metrics'][name] for name in found}, abs=1e-9, nan_ok=True)

def test_the_names_of_the_files_are_those_of_the_guide(undisturbed):
    rows = read_log(undisturbed)
    names = set(files_below(undisturbed/'stages'))
    first = rows[0]['val/loss']
    assert f'species_only/epoch=01-val_loss={first:.2f}.pt' in names
    best = max(rows[:3], key=lambda row: row['val/species_top1'])['epoch']
    assert [name for name in names if name.startswith('species_only') and 'best' in name] == [
        f'species_only/epoch={best:02d}-best.pt']
    heads = {name for name in names if name.startswith('disease_heads')}
    assert heads == {f'disease_heads/disease_heads_{name}.pt'
                     for name in ('epoch=01', 'epoch=02', 'epoch=03', 'epoch=04', 'final')}
    assert {'hierarchical_full/epoch=01.pt', 'hierarchical_full/epoch=01-best.pt'} <= names

WITHOUT_THE_LIBRARY = '''
import sys
sys.modules['rtsseg'] = None
import timm, torch
found = torch.load(sys.argv[1], weights_only=True)
weights = found['weights']
backbone = timm.create_model(found['backbone'], num_classes=0).eval()
backbone.load_state_dict({k[len('backbone.'):]: v for k, v in weights.items() if k.startswith('backbone.')})
image = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    features = backbone(image)
    species = features @ weights['species.weight'].T + weights['species.bias']
    diseases = features @ weights['diseases.weight'].T + weights['diseases.bias']
names = list(found['taxonomy'])
at = species.argmax(1)[0]
sizes = [len(found['taxonomy'][name]) for name in names]
own = diseases[0, sum(sizes[:at]):sum(sizes[:at + 1])]
print(names[at], found['taxonomy'][names[at]][own.argmax()], sep='|')
'''

def test_weights_of_a_stage_open_without_the_library(undisturbed, tmp_path):
    "PyTorch and timm alone name species and disease as the library does, and the file says how good it is"
    cfg, system = load(undisturbed/'config.yaml'), find_system('plants')
    path = undisturbed/'stages'/'hierarchical_full'/'epoch=01.pt'
    feed = system.feed(cfg)
    image = next(iter(feed.in_order('test')))['image'][:1]
    torch.save(image, tmp_path/'image.pt')
    command = [sys.executable, '-c', WITHOUT_THE_LIBRARY, path, tmp_path/'image.pt']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = system.model(cfg, feed).eval()
    found = torch.load(path, weights_only=True)
    model.load_state_dict(found['weights'])
    with torch.no_grad():
        species, diseases = model(image)
    at = int(species.argmax(1))
    start, end = feed.taxonomy.offsets[at:at + 2]
    assert done.stdout.strip() == '|'.join(feed.taxonomy.classes[start + int(diseases[0, start:end].argmax())])
    last = read_log(undisturbed)[-1]
    for name in ('species_top1', 'macro_f1', 'disease_top1', 'cascade'):
        assert found['scores'][name] == last[f'val/{name}']
    images = dict(zip(map('/'.join, feed.taxonomy.classes), feed.images))
    assert found['scores']['tail_f1'] and all(images[name] <= 80 for name in found['scores']['tail_f1'])

def test_final_heads_are_written_without_a_validation_too(leaves, tmp_path):
    "The last epoch of B2 is not validated: its weights are there, without scores"
    folder = train(config(leaves, tmp_path, val_frequency=8))
    heads = torch.load(folder/'stages'/'disease_heads'/'disease_heads_final.pt', weights_only=True)
    assert (heads['epoch'], heads['scores']) == (LASTS[4] - LASTS[2], {})
    assert set(heads['weights']) == {'diseases.weight', 'diseases.bias'}

def test_the_tail_makes_another_run(leaves, tmp_path):
    "It decides which losses are watched and slowed, and what a monitor of the tail measures"
    hashes = [config_hash(config(leaves, tmp_path, metrics=dict(tail=tail))) for tail in (80, 40)]
    assert hashes[0] != hashes[1]

def test_heads_alone_are_those_of_the_whole(undisturbed):
    heads = torch.load(undisturbed/'stages'/'disease_heads'/'disease_heads_final.pt', weights_only=True)
    assert set(heads['weights']) == {'diseases.weight', 'diseases.bias'}

def test_commands_serve_it(leaves, tmp_path):
    "Trained, evaluated and reported from a file"
    (tmp_path/'cfg.yaml').write_text(to_yaml(config(leaves, tmp_path/'runs')))
    for command in ('train', 'evaluate', 'report'):
        done = shell(f'rtsseg-{command}', '--config', tmp_path/'cfg.yaml')
        assert done.returncode == 0, done.stdout + done.stderr
    page, = tmp_path.glob('runs/plants_toy/*/seed42/report.html')
    text = page.read_text()
    assert all(word in text for word in ('species_top1', 'tail_macro_f1', '≥ 0.95', 'all disease heads converge',
                                         'A2 backbone and species head', 'most often taken for', 'What next',
                                         'Wrong images, one of each disease', 'cascade: species and disease'))

def test_a_world_is_made_where_the_config_says_so(tmp_path):
    data = dict(source=tmp_path/'new'/'photos.csv', taxonomy=tmp_path/'new'/'taxonomy.json', side=32,
                made=dict(side=32, images=4, species=2))
    feed = find_system('plants').feed(config(tmp_path, tmp_path/'runs', data=data), prepare=True)
    assert len(feed.taxonomy.species) == 2 and feed.size('train') >= 4 * 9

def test_a_search_tries_its_settings(leaves, tmp_path):
    (tmp_path/'space.yaml').write_text('loss.gamma: [0.0, 2.0]')
    stages = six_stages()[:1]
    study = search(config(leaves, tmp_path/'runs', epochs=1, stages=stages), tmp_path/'space.yaml', trials=2)
    assert len(study.trials) == 2 and np.isfinite([trial.value for trial in study.trials]).all()

def test_a_model_is_not_judged_on_other_diseases(leaves, undisturbed):
    "The model has a disease that the table does not: both are named"
    cfg = load(undisturbed/'config.yaml')
    system = find_system('plants')
    feed, packed = system.feed(cfg), system.unpack(undisturbed/'model')
    names = json.loads((leaves/'taxonomy.json').read_text())
    species = next(iter(names))
    packed.taxonomy.diseases[species] = [*names[species][:-1], 'of another table']
    with pytest.raises(DataError, match="'of another table' is in the model alone"):
        feed.split('val', packed)

def test_photographs_that_cannot_be_decoded_are_refused_where_they_are_many(leaves, tmp_path):
    "More than one in a thousand"
    source = make_leaf_world(tmp_path/'leaves', side=32, images=4, species=2)
    path = next((source/'photos'/'train').rglob('*.jpg'))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=path.name):
        train(config(source, tmp_path/'runs'))
    assert not (tmp_path/'runs').exists()

def test_stages_are_those_of_the_guide():
    "Guide 001, Training Protocol and Stage B, number for number"
    cfg = load(ROOT/'configs'/'plants'/'guide.yaml')
    parts = ['encoder', 'species', 'diseases']
    plan = plan_stages(cfg, parts)
    lengths = [planned.stage.last - planned.stage.first + 1 for planned in plan]
    assert lengths == [5, 20, 5, 15, 5, 10] and cfg.epochs == 60
    frozen = [planned.stage.frozen for planned in plan]
    assert frozen == [['encoder', 'diseases'], ['diseases'], ['diseases'], ['encoder', 'species'],
                      ['encoder', 'species'], []]

    def rates(epoch):
        "At the start of an epoch"
        planned = next(p for p in plan if p.holds(epoch))
        return [learning_rate(planned, part, epoch - 1) for part in parts]

    assert [rates(epoch) for epoch in (1, 26, 31, 46, 51, 60)] == [
        [0, 1e-3, 0], [pytest.approx(5e-7), 5e-6, 0], [0, 0, 1e-3], [0, 0, 5e-4], [1e-5] * 3, [1e-5] * 3]
    # the cosine of A2 from its first step to its last
    assert rates(6) == pytest.approx([1e-4, 1e-4, 0])
    assert rates(16)[0] == pytest.approx((1e-4 + 1e-6) / 2)
    assert learning_rate(plan[1], 'encoder', 25) == pytest.approx(1e-6)
    assert [planned.stage.sampler for planned in plan] == ['', '', '', 'weighted', 'weighted', '']
    weights = [planned.stage.loss_weights for planned in plan]
    a, b, full = dict(species=1, disease=0), dict(species=0, disease=1), dict(species=1, disease=.7)
    assert weights == [a, a, a, b, b, full]
    assert (cfg.loss.gamma, cfg.loss.alpha, cfg.loss.label_smoothing) == (2, .25, .1)
    mixup, cutmix = cfg.mixing.mixup, cfg.mixing.cutmix
    assert (mixup.alpha, cutmix.alpha, mixup.p + cutmix.p) == (.2, 1, .5)
    assert (cfg.batch_size, cfg.optimizer.clip_norm, cfg.precision, cfg.data.side) == (512, 1, 'fp16', 224)
    assert (cfg.loader.num_workers, cfg.loader.prefetch_factor) == (8, 4)
    assert cfg.loader.pin_memory and cfg.loader.persistent_workers
    assert cfg.data.rare == {80: 3, 50: 5} and not cfg.model.compile
    assert cfg.model.backbone == 'swin_tiny_patch4_window7_224.ms_in22k'

def test_tiers_are_those_of_the_guide():
    "Its code, and the line of the table that the code lacks; the table itself names its arguments"
    augment = load(ROOT/'configs'/'plants'/'guide.yaml').augment
    assert (augment.crop.scale, augment.crop.ratio) == ((.6, 1), (.75, 1.33))
    assert (augment.hflip.p, augment.rotate.p, augment.rotate.limit) == (.5, .5, 45)
    jitter, exposure = augment.jitter, augment.exposure
    assert (jitter.p, jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (.8, .3, .3, .3, .1)
    assert (exposure.p, exposure.brightness, exposure.contrast) == (.5, .2, .2)
    degrade, shadow = augment.degrade, augment.shadow
    assert (degrade.p, degrade.blur, degrade.variance) == (.3, (3, 7), (10, 50))
    assert (degrade.colour_shift, degrade.intensity) == ((.01, .05), (.1, .3))
    assert (augment.compression.p, augment.compression.quality, augment.grey.p) == (.2, (60, 95), .05)
    assert (shadow.p, shadow.region, shadow.shadows) == (.15, (0, .5, .5, 1), (1, 2))
    assert (augment.rand_augment.layers, augment.rand_augment.magnitude) == (2, 9)

def test_rare_diseases_are_drawn_more_often():
    labels = np.repeat(range(4), [200, 80, 79, 49])
    cfg = load(ROOT/'configs'/'plants'/'guide.yaml')
    assert [rare_weights(labels, cfg.data.rare)[labels == k][0] for k in range(4)] == [1, 1, 3, 5]

EXPERIMENTS = sorted((ROOT/'configs'/'plants'/'experiments').glob('*.yaml'))

@pytest.mark.parametrize('file', EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_differs_in_what_it_names(file):
    tree, base = read_yaml(file), ROOT/'configs'/'plants'/'guide.yaml'
    assert tree.pop('name') == file.stem
    before, after = (flatten(load(*files).model_dump(mode='json')) for files in ((base,), (base, file)))
    different = {name for name in after if after[name] != before[name]} - {'name'}
    assert different == set(flatten(tree))

def test_focal_loss_follows_its_formula():
    "Lin et al. (2017), equation 5, with softmax"
    logits, label = torch.randn(20, 6, dtype=torch.float64), torch.randint(0, 6, (20,))
    p = logits.softmax(1)[torch.arange(20), label]
    expected = -.25 * (1 - p)**2 * p.log()
    torch.testing.assert_close(label_focal(logits, label), expected.float())

def test_smoothing_stays_within_the_species():
    "As of a head with its diseases alone"
    offsets, species = offsets_of([3, 5]), torch.tensor([0, 1, 1])
    logits, disease = torch.randn(3, 8), torch.tensor([1, 3, 7])
    found = label_focal(logits, disease, 0., 1., .1, own_diseases(species, offsets))
    parts = [logits[0, :3], logits[1, 3:], logits[2, 3:]]
    expected = [cross_entropy(part, label, label_smoothing=.1)
                for part, label in zip(parts, torch.tensor([1, 0, 4]), strict=True)]
    torch.testing.assert_close(found, torch.stack(expected))

def test_one_layer_is_a_head_for_each_species():
    torch.manual_seed(0)
    sizes = [2, 3, 5, 1]
    model, offsets = build_routed(RoutedModel(backbone='test_vit', weights=None), sizes), offsets_of(sizes)
    features, species = torch.randn(40, model.diseases.in_features), torch.arange(40) % 4
    found = route(model.diseases(features), species, offsets)
    for row, k in enumerate(species.tolist()):
        own = slice(offsets[k], offsets[k + 1])
        alone = features[row] @ model.diseases.weight[own].T + model.diseases.bias[own]
        torch.testing.assert_close(found[row, own], alone)
    assert found.isfinite().sum(1).tolist() == [sizes[k] for k in species]

def test_swin_has_the_features_of_the_guide():
    with torch.device('meta'):
        model = build_routed(RoutedModel(weights=None), [30] * 320)
    assert (model.species.in_features, model.species.out_features, model.diseases.out_features) == (768, 320, 9600)
    assert 27e6 < sum(p.numel() for p in model.backbone.parameters()) < 29e6

@pytest.mark.parametrize('name', ['test_vit', 'test_efficientnet', 'mobilenetv3_small_050', 'convnext_atto'])
def test_a_local_checkpoint_gives_the_backbone(name, tmp_path):
    "Of a classifier with other classes, of any timm model"
    source = timm.create_model(name, num_classes=7)
    torch.save(source.state_dict(), tmp_path/'inaturalist.pt')
    model = build_routed(RoutedModel(backbone=name, weights=str(tmp_path/'inaturalist.pt')), [2, 3]).eval()
    image = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        expected = source.eval().forward_head(source.forward_features(image), pre_logits=True)
        torch.testing.assert_close(model.backbone(image), expected)
        assert [tuple(logits.shape) for logits in model(image)] == [(1, 2), (1, 5)]

def as_published(state):
    "The keys of a Swin checkpoint of its authors"
    state = {re.sub(r'layers\.(\d)\.downsample', lambda m: f'layers.{int(m[1]) - 1}.downsample', name): tensor
             for name, tensor in state.items()}
    return {name.replace('head.fc.', 'head.'): tensor for name, tensor in state.items()}

@pytest.mark.parametrize('form', ['classifier', 'backbone', 'published'])
def test_forms_of_a_swin_checkpoint(form, tmp_path):
    "Of timm with 8142 species, of a backbone alone, and with the keys of its authors"
    source = timm.create_model('swin_tiny_patch4_window7_224', num_classes=0 if form == 'backbone' else 8142)
    state = source.state_dict()
    torch.save(as_published(state) if form == 'published' else state, tmp_path/'inaturalist.pt')
    model = build_routed(RoutedModel(weights=str(tmp_path/'inaturalist.pt')), [2, 3])
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, state[name]), name

WITHOUT_THE_LIBRARY_OR_PYTORCH = '''
import json, sys
sys.modules['rtsseg'] = sys.modules['torch'] = None
import numpy as np, onnxruntime
folder, photos = sys.argv[1:]
session = onnxruntime.InferenceSession(f'{folder}/model.onnx', providers=['CPUExecutionProvider'])
logits, probability, species, disease = session.run(None, dict(pixels=np.load(photos)))
taxonomy = json.load(open(f'{folder}/taxonomy.json'))
classes = [(name, each) for name, own in taxonomy.items() for each in own]
print(json.dumps([dict(species=list(taxonomy)[s], named=classes[d], sum=float(row.sum()), best=int(row.argmax()) == d)
                  for s, d, row in zip(species.tolist(), disease.tolist(), probability)]))
'''

def test_it_labels_a_folder_of_photographs(undisturbed, leaves, tmp_path):
    "The species and diseases of an evaluation, from a model directory and files alone"
    system = find_system('plants')
    table = system.read_table(evaluate(undisturbed, 'val')).frame
    for name in table['sample']:
        (tmp_path/'photos'/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(leaves/name, tmp_path/'photos'/name)
    (tmp_path/'photos'/'broken.jpg').write_bytes(b'no photograph')
    given = '--model', undisturbed/'model', '--scene', tmp_path/'photos', '--out', tmp_path/'out'
    done = shell('rtsseg-predict', *given)
    assert done.returncode == 0 and 'broken.jpg' in done.stdout + done.stderr
    found = pd.read_csv(tmp_path/'out'/'plants.csv').set_index('path').loc[table['sample']]
    classes = system.unpack(undisturbed/'model').taxonomy.classes
    assert [*zip(found.species, found.disease)] == [classes[number] for number in table.cascade_found]
    assert found.species_probability.between(0, 1).all() and found.disease_probability.between(0, 1).all()

def test_its_model_is_exported(undisturbed, tmp_path):
    "The file names what the library names in use, without it; every format stands in export.json with its parity"
    done = shell('rtsseg-export', '--model', undisturbed/'model', '--out', tmp_path/'out')
    assert done.returncode == 0, done.stdout + done.stderr
    cfg, system = load(undisturbed/'config.yaml'), find_system('plants')
    feed, packed = system.feed(cfg), system.unpack(undisturbed/'model')
    photos = some_photos(cfg.data, 'test', 12)
    np.save(tmp_path/'photos.npy', photos)
    command = [sys.executable, '-c', WITHOUT_THE_LIBRARY_OR_PYTORCH, tmp_path/'out', tmp_path/'photos.npy']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = np.linspace(0, feed.size('test') - 1, 12).astype(int).tolist()
    batch = torch.stack([feed.in_order('test').dataset[row]['image'] for row in rows])
    with torch.no_grad():
        species, disease = diagnose(packed.model(batch), offsets_of(np.diff(feed.taxonomy.offsets).tolist()))
    found = json.loads(done.stdout)
    assert [row['species'] for row in found] == [feed.taxonomy.species[k] for k in species]
    assert [row['named'] for row in found] == [list(feed.taxonomy.classes[k]) for k in disease]
    assert all(row['sum'] == pytest.approx(1) and row['best'] for row in found)
    about = json.loads((tmp_path/'out'/'export.json').read_text())
    assert about['of_validation'] and about['calibrated_on'] and set(about['files']) == set(CLASS_FORMATS.values())
    for name in ('model.onnx', 'model.torchscript.pt'):
        assert about['files'][name]['difference'] <= MOST_DIFFERENCE

def test_an_export_that_cannot_be_leaves_nothing_behind(undisturbed, tmp_path):
    "Views and 8 bits without photographs"
    shutil.copytree(undisturbed/'model', tmp_path/'model')
    for why, asked in {'looks at an image once': dict(views='full'), 'images: int8': dict(formats=['int8'])}.items():
        with pytest.raises(ConfigError, match=why):
            export_any(tmp_path/'model', tmp_path/'out', **asked)
    assert not (tmp_path/'out').exists()

def test_weights_by_name_that_are_not_there(leaves, tmp_path, monkeypatch):
    "The message says what else can be done; nothing is written"
    def refuse(url):
        raise OSError('no network')
    monkeypatch.setattr('rtsseg.pretrained.check_reachable', refuse)
    monkeypatch.setattr('rtsseg.pretrained.cached_file', lambda *where: None)
    names = dict(backbone='swin_tiny_patch4_window7_224.ms_in22k', weights='imagenet')
    cfg = config(leaves, tmp_path/'runs', model=names)
    with pytest.raises(ConfigError, match='are not on this machine .* set model.weights to a local'):
        train(cfg)
    assert not (tmp_path/'runs').exists()

def test_weights_that_do_not_fit_are_counted(leaves, tmp_path):
    state = timm.create_model('test_vit', num_classes=7).state_dict()
    torch.save({name: value for name, value in state.items() if 'norm1' not in name}, tmp_path/'half.pt')
    cfg = config(leaves, tmp_path/'runs', model=dict(backbone='test_vit', weights=str(tmp_path/'half.pt')))
    with pytest.raises(ConfigError, match='missing: blocks.0.norm1.bias'):
        train(cfg)
    assert not (tmp_path/'runs').exists()

def test_a_side_that_does_not_fit_is_refused(leaves, tmp_path):
    "By a forward pass before anything is written"
    cfg = config(leaves, tmp_path/'runs', model=dict(backbone='test_vit', weights=None))
    cfg.data.side = 50
    with pytest.raises(ConfigError, match='no forward pass with images of 50 × 50 on cpu'):
        train(cfg)
    assert not (tmp_path/'runs').exists()

def test_metrics_are_sklearns(undisturbed):
    "Of the table of a run, and with weights"
    system = find_system('plants')
    frame = system.read_table(evaluate(undisturbed, 'val')).frame
    for weights in (None, np.random.default_rng(0).integers(1, 4, len(frame))):
        found = plant_scores(frame, weights)
        scores = dict(sample_weight=weights)
        assert found['species_top1'] == pytest.approx(accuracy_score(frame.species, frame.species_found, **scores))
        assert found['disease_top1'] == pytest.approx(accuracy_score(frame.disease, frame.disease_found, **scores))
        both = (frame.species == frame.species_found) & (frame.disease == frame.cascade_found)
        assert found['cascade'] == pytest.approx(np.average(both, weights=weights))
        labels = np.union1d(frame.disease[frame.images <= 80], frame.disease_found[frame.images_found <= 80])
        for average in ('macro', 'weighted'):
            theirs = f1_score(frame.disease, frame.disease_found, labels=labels, average=average, **scores)
            assert found[f'tail_{average}_f1'] == pytest.approx(theirs)

def test_a_compiled_model_has_the_same_weights(leaves, tmp_path):
    "Off by default; nothing is compiled before the first batch"
    system, cfg = find_system('plants'), config(leaves, tmp_path)
    feed = system.feed(cfg)
    plain = system.model(cfg, feed)
    cfg.model.compile = True
    compiled = system.model(cfg, feed)
    assert plain._compiled_call_impl is None and compiled._compiled_call_impl is not None
    assert list(compiled.state_dict()) == list(plain.state_dict())

@pytest.mark.slow
def test_the_config_of_the_guide_trains(tmp_path):
    "Swin-T at 224 through all six stages, from random weights: a step of four images each"
    source = make_leaf_world(tmp_path/'leaves', side=64, images=4, species=2)
    stages = [stage.model_dump() | dict(first=number, last=number)
              for number, stage in enumerate(load(ROOT/'configs'/'plants'/'guide.yaml').stages, 1)]
    cfg = load(ROOT/'configs'/'plants'/'guide.yaml', runs=tmp_path/'runs', tracker=dict(kind='none'), device='cpu',
               epochs=6, stages=stages, batch_size=4, steps_per_epoch=1, model=dict(weights=None),
               loader=dict(num_workers=0), data=dict(source=source/'photos.csv', taxonomy=source/'taxonomy.json'))
    rows = read_log(train(cfg))
    assert len(rows) == 6 and all(row['skipped'] == 0 and math.isfinite(row['val/loss']) for row in rows)

def test_a_config_without_stages_is_doubted():
    "The guide's own has six"
    system = find_system('plants')
    assert any('plants/guide' in line for line in system.warnings(system.Config()))
    assert not any('plants/guide' in line for line in system.warnings(load('plants/guide')))
