"""The plants system from its config alone: six stages, killed and resumed to the same bytes, evaluated, reported and
searched; weights that open without the library"""
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from helpers.shell import Program, held, running, shell
from helpers.waiting import wait_for
from rtsseg.config import find_system, load, to_yaml
from rtsseg.console import DataError
from rtsseg.evaluation import evaluate
from rtsseg.leaf_world import make_leaf_world
from rtsseg.runs import read_log, run_folder
from rtsseg.schedule import learning_rate, plan_stages
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
                 watch=dict(ratio=1.001, epochs=1, slow=.1))
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
    assert all(word in text for word in ('species_top1', 'tail_macro_f1'))

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

def test_a_model_is_not_judged_on_other_diseases(leaves, undisturbed, tmp_path):
    "The table has a disease that the model does not know: named, and nothing is written"
    cfg = load(undisturbed/'config.yaml')
    table = pd.read_csv(leaves/'photos.csv')
    table['path'] = [(leaves/path).as_posix() for path in table.path]
    feed, system = find_system('plants').feed(cfg), find_system('plants')
    packed = system.unpack(undisturbed/'model')
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
