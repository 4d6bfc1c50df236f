"""Toy versions of five systems run on the loop unedited: each is a task of a few lines, a model and a config.
They are examples as much as tests"""
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from rtsseg.checkpoint import load_state
from rtsseg.config import LoopConfig
from rtsseg.loop import Task, fit
from rtsseg.metrics import confusion, mean_iou

F = nn.functional

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "Toys are faster with one thread"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

# ---------------------------------------------- what is asked of every system

@dataclass
class Toy:
    "All that `fit` needs"
    task: Task
    model: nn.Module
    data: DataLoader
    val: DataLoader
    cfg: LoopConfig

class Watch:
    "Notes the weights and the rate of each part at the end of every epoch, and stops at a given step"
    def __init__(self, stop=None):
        self.at, self.weights, self.rates = stop, [], []

    def on_start(self, run):
        self.note(run)

    def on_epoch(self, run):
        self.note(run)
        row = run.history[-1]
        self.rates.append({name.removeprefix('lr/'): rate for name, rate in row.items() if name.startswith('lr/')})

    def on_step(self, run):
        if run.step == self.at:
            run.stop('as asked')

    def note(self, run):
        weights = {}
        for group in run.optimizer.param_groups:
            weights[group['name']] = torch.cat([p.detach().flatten() for p in group['params']])
        self.weights.append(weights)

def moved(watch, epoch):
    "Names of the parts that moved in an epoch (1-based)"
    before, after = watch.weights[epoch - 1:epoch + 1]
    return {part for part in after if not torch.equal(before[part], after[part])}

def train(toy, folder, *observers):
    return fit(toy.cfg, toy.task, toy.model, toy.data, toy.val, folder, observers)

def learns_and_resumes(make, folder):
    """`make(seed of the weights)` gives a toy. Train one. Train a second one, stop it in the middle of an epoch, and
    resume with a model of other weights: both end with the same bytes"""
    toy, watch = make(0), Watch()
    run = train(toy, folder/'whole', watch)
    half = train(make(0), folder/'halves', Watch(stop=run.step * 2 // 3 + 1))
    assert half.reason == 'as asked'
    assert 0 < half.batch < len(toy.data)
    rest = train(make(1), folder/'halves')
    for a, b in zip(run.state().values(), rest.state().values(), strict=True):
        same(a, b)
    return run, watch

def same(a, b):
    "Assert that two trees of tensors and numbers are equal"
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        for key in a.keys() | b.keys():
            same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert a == b

def conv(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.ReLU())

class Net(nn.Module):
    "An encoder and a head"
    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x):
        return self.head(self.encoder(x))

quick = dict(
    device='cpu',
    val_frequency=1,
    freeze_backbone_epochs=0,
    ema=dict(decay=.9),
    early_stopping=dict(patience=None),
)

# ---------------------------------------------- (a) binary segmentation with ignored pixels

class Binary(Task):
    "Focal loss, mean over the valid pixels; judged by the IoU of all pixels together"
    monitor, mode = 'iou', 'max'

    def parts(self, model):
        return dict(encoder=[model.encoder], decoder=[model.head])

    def forward(self, model, batch):
        return model(batch['image'])[:, 0]

    def count(self, batch):
        return dict(focal=(batch['target'] != 255).sum())

    def loss(self, out, batch):
        valid = batch['target'] != 255
        logits, y = out[valid], batch['target'][valid]
        bce = F.binary_cross_entropy_with_logits(logits, y, reduction='none')
        focal = bce * (logits.sigmoid() - y).abs()**2
        return dict(focal=focal.sum() / valid.sum().clamp(min=1))

    def meter(self):
        return IoU()

class IoU:
    def __init__(self):
        self.both, self.any = 0, 0

    def update(self, out, batch):
        predicted, true, valid = out > 0, batch['target'] == 1, batch['target'] != 255
        self.both += int((predicted & true & valid).sum())
        self.any += int(((predicted | true) & valid).sum())

    def state(self):
        return self.both, self.any

    def merge(self, states):
        self.both, self.any = map(sum, zip(*states))

    def compute(self):
        return dict(iou=self.both / max(1, self.any))

def squares(n, seed):
    "Bright squares in noise; the rim of each is ignored"
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(n):
        y = torch.zeros(16, 16)
        row, column = torch.randint(1, 9, (2,), generator=generator).tolist()
        y[row - 1:row + 6, column - 1:column + 6] = 255
        y[row:row + 5, column:column + 5] = 1
        noise = .7 * torch.randn(1, 16, 16, generator=generator)
        samples.append(dict(image=(y == 1).float()[None] + noise, target=y))
    return samples

def binary(seed=0):
    lr = dict(frozen_lr=.01, base_lr=.01, backbone_lr_multiplier=.5, warmup_epochs=1)
    cfg = LoopConfig(**quick | dict(epochs=10, accumulate=2, freeze_backbone_epochs=1), lr=lr)
    torch.manual_seed(seed)
    model = Net(nn.Sequential(conv(1, 8), conv(8, 8)), nn.Conv2d(8, 1, 1))
    return Toy(Binary(), model, DataLoader(squares(96, 0), 8, shuffle=True), DataLoader(squares(32, 1), 8), cfg)

def test_binary_segmentation(tmp_path):
    run, watch = learns_and_resumes(binary, tmp_path)
    targets = torch.stack([sample['target'] for sample in squares(32, 1)])
    # the IoU of a model that sees squares everywhere
    share = float((targets == 1).sum() / (targets != 255).sum())
    assert share < .15
    assert run.best['value'] > .75
    assert moved(watch, 1) == {'decoder'}
    assert moved(watch, 2) == {'encoder', 'decoder'}
    assert watch.rates[0] == dict(encoder=0., decoder=.01)
    for rates in watch.rates[1:]:
        assert rates['encoder'] == pytest.approx(.5 * rates['decoder'])
    assert run.step == 10 * 6

# ---------------------------------------------- (b) classes, a teacher, and losses that join later

class Distilled(Task):
    "Cross-entropy, Dice and Lovász on labels; features (L2) and softened predictions (KL, temperature T) of a teacher"
    monitor, mode, T = 'miou', 'max', 2.

    def __init__(self, teacher):
        self.teacher = teacher.eval().requires_grad_(False)
        self.project = nn.Conv2d(8, 3, 1)

    def parts(self, model):
        return dict(encoder=[model.encoder], decoder=[model.head])

    def modules(self):
        # trained, but not a part of the model
        return self.project

    def forward(self, model, batch):
        features = model.encoder(batch['image'])
        return features, model.head(features)

    def count(self, batch):
        n = (batch['target'] != 255).sum()
        # Dice and Lovász are ratios of sums: each micro-batch counts once
        once = int(n > 0)
        return dict(ce=n, dice=once, lovasz=once, feature=len(batch['image']), kl=batch['target'].numel())

    def loss(self, out, batch):
        features, logits = out
        values = self.label_losses(logits, batch['target'])
        # the teacher is absent in evaluation
        if torch.is_grad_enabled():
            values |= self.teacher_losses(features, logits, batch['image'])
        return values

    def label_losses(self, logits, target):
        valid = target != 255
        p, t = logits.softmax(1).movedim(1, -1)[valid], F.one_hot(target[valid], 3).float()
        ce = F.cross_entropy(logits, target, ignore_index=255, reduction='sum') / valid.sum().clamp(min=1)
        dice = (1 - (2 * (p * t).sum(0) + 1) / (p.sum(0) + t.sum(0) + 1)).mean()
        return dict(ce=ce, dice=dice, lovasz=lovasz(p, t))

    def teacher_losses(self, features, logits, image):
        with torch.no_grad():
            teacher_features, teacher_logits = self.teacher(image)
        ours, theirs = (logits / self.T).log_softmax(1), (teacher_logits / self.T).softmax(1)
        kl = self.T**2 * F.kl_div(ours, theirs, reduction='none').sum(1).mean()
        return dict(feature=F.mse_loss(self.project(features), teacher_features), kl=kl)

    def meter(self):
        return MIoU(3)

def lovasz(p, t):
    "Lovász-softmax (Berman et al. 2018) over pixels: p, t (n, classes); a mean over the classes that are there"
    losses = []
    for k in t.any(0).nonzero()[:, 0].tolist():
        errors, order = (t[:, k] - p[:, k]).abs().sort(descending=True)
        true = t[order, k]
        jaccard = 1 - (true.sum() - true.cumsum(0)) / (true.sum() + (1 - true).cumsum(0))
        losses.append(errors @ torch.cat([jaccard[:1], jaccard.diff()]))
    return torch.stack(losses).mean() if losses else p.sum()

class MIoU:
    "Mean IoU from one confusion matrix"
    def __init__(self, k):
        self.table = np.zeros((k, k), int)

    def update(self, out, batch):
        self.table += confusion(out[1].argmax(1), batch['target'], len(self.table))

    def state(self):
        return self.table

    def merge(self, states):
        self.table = sum(states)

    def compute(self):
        return dict(miou=mean_iou(self.table))

class Teacher(nn.Module):
    "Knows the answer: the strongest of the three blurred channels. Counts its calls"
    calls = 0

    def forward(self, x):
        Teacher.calls += 1
        features = F.avg_pool2d(x, 5, 1, 2, count_include_pad=False)
        return features, 8 * features

def land(n, seed, labelled):
    "Three kinds of land in blocks, seen through noise; a share of the pixels carries a label"
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(n):
        y = torch.randint(0, 3, (2, 2), generator=generator).repeat_interleave(8, 0).repeat_interleave(8, 1)
        x = F.one_hot(y, 3).movedim(-1, 0) + torch.randn(3, 16, 16, generator=generator)
        known = torch.rand(16, 16, generator=generator) < labelled
        samples.append(dict(image=x, target=torch.where(known, y, 255)))
    return samples

def distilled(seed=0):
    stages = [
        dict(
            first=1,
            last=3,
            rates=dict(encoder=.01, decoder=.02, modules=.02),
            schedule='cosine',
            warmup_epochs=1,
            loss_weights=dict(lovasz=0.),
        ),
        dict(
            first=4,
            last=5,
            rates=dict(encoder=.002, decoder=.004, modules=.004),
            loss_weights=dict(ce=.6),
        ),
    ]
    loss_weights = dict(ce=.7, dice=.3, lovasz=.1, feature=.5, kl=.5)
    cfg = LoopConfig(**quick, epochs=5, stages=stages, loss_weights=loss_weights)
    torch.manual_seed(seed)
    model = Net(nn.Sequential(conv(3, 8), conv(8, 8)), nn.Conv2d(8, 3, 1))
    torch.manual_seed(seed)
    task = Distilled(Teacher())
    return Toy(task, model, DataLoader(land(96, 0, .02), 8, shuffle=True), DataLoader(land(32, 1, 1.), 8), cfg)

def losses_of(row, prefix):
    "Names of the loss parts that a row of the history has"
    return {name.removeprefix(prefix) for name in row if name.startswith(prefix)}

def test_classes_with_a_teacher(tmp_path):
    run, watch = learns_and_resumes(distilled, tmp_path)
    # a guess reaches 1/5 (hits 1/9, union 5/9 of the pixels), the channels of each pixel alone .46
    assert run.best['value'] > .75
    saved = load_state(tmp_path/'whole'/'checkpoints'/'resume.ckpt')
    assert set(saved['modules']) == {'weight', 'bias'}
    assert moved(watch, 1) == {'encoder', 'decoder', 'modules'}
    first, second = dict(ce=.7, dice=.3, lovasz=0.), dict(ce=.6, dice=.3, lovasz=.1)
    for row, weights in zip(run.history, [first, first, first, second, second], strict=True):
        assert losses_of(row, 'train/loss/') == {'ce', 'dice', 'lovasz', 'feature', 'kl'}
        assert losses_of(row, 'val/loss/') == set(weights)
        total = sum(weight * row[f'val/loss/{part}'] for part, weight in weights.items())
        assert row['val/loss'] == pytest.approx(total)
    assert watch.rates[4] == dict(encoder=.002, decoder=.004, modules=.004)

def test_teacher_is_absent_in_evaluation(tmp_path):
    toy = distilled()
    toy.cfg = toy.cfg.model_copy(update=dict(epochs=1))
    Teacher.calls = 0
    run = train(toy, tmp_path)
    assert Teacher.calls == run.step == len(toy.data)

# ---------------------------------------------- (c) a species head that routes to disease heads

class Plants(Task):
    """L = L_species + 0.7 L_disease; the head of the sample's species judges its disease, and only samples with a
    disease label count"""
    monitor, mode = 'cascade', 'max'

    def parts(self, model):
        return dict(backbone=[model.backbone], species=[model.species], diseases=[model.diseases])

    def forward(self, model, batch):
        return model(batch['x'], batch['species'])

    def count(self, batch):
        return dict(species=len(batch['x']), disease=(batch['disease'] >= 0).sum())

    def loss(self, out, batch):
        species, disease = out
        known = (batch['disease'] >= 0).sum()
        disease_sum = F.cross_entropy(disease, batch['disease'], ignore_index=-1, reduction='sum')
        return dict(species=F.cross_entropy(species, batch['species']), disease=disease_sum / known.clamp(min=1))

    def meter(self):
        return Cascade()

class Router(nn.Module):
    "A head for each species, of as many diseases as it has; logits of unequal lengths are padded with −1e4"
    def __init__(self, diseases):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh())
        self.species = nn.Linear(16, len(diseases))
        self.diseases = nn.ModuleList(nn.Linear(16, d) for d in diseases)

    def forward(self, x, species):
        features = self.backbone(x)
        widest = max(head.out_features for head in self.diseases)
        disease = features.new_full((len(x), widest), -1e4)
        for k, head in enumerate(self.diseases):
            disease[species == k, :head.out_features] = head(features[species == k])
        return self.species(features), disease

class Cascade:
    "Accuracy of the species, of the disease given the species, and of both together"
    def __init__(self):
        self.counts = torch.zeros(5, dtype=torch.long)

    def update(self, out, batch):
        species = out[0].argmax(1) == batch['species']
        disease = out[1].argmax(1) == batch['disease']
        known = batch['disease'] >= 0
        counts = [species, torch.ones_like(species), disease & known, species & disease & known, known]
        self.counts += torch.stack([hits.sum() for hits in counts])

    def state(self):
        return self.counts

    def merge(self, states):
        self.counts = sum(states)

    def compute(self):
        species, n, disease, both, known = self.counts.tolist()
        return dict(species=species / n, disease=disease / known, cascade=both / known)

DISEASES = (2, 3, 4)

def sector(a, b, n):
    "Which of n sectors of a circle the angle of (a, b) lies in"
    return int((torch.atan2(b, a) / torch.pi + 1) / 2 * n * .999)

def plants(n, seed):
    """Species by the angle of the first two features, disease by the sector of the next two. A third of the samples
    carries no disease label, nor does any of samples 64 to 127"""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for i in range(n):
        x = torch.randn(6, generator=generator)
        species = sector(x[0], x[1], 3)
        disease = sector(x[2], x[3], DISEASES[species])
        if i % 3 == 0 or 64 <= i < 128:
            disease = -1
        samples.append(dict(x=x, species=torch.tensor(species), disease=torch.tensor(disease)))
    return samples

def hierarchy(seed=0):
    stages = [
        dict(
            first=1,
            last=1,
            frozen=['backbone', 'diseases'],
            rates=dict(species=.03),
            loss_weights=dict(disease=0.),
        ),
        dict(
            first=2,
            last=6,
            frozen=['diseases'],
            rates=dict(backbone=.01, species=.03),
            schedule='cosine',
            loss_weights=dict(disease=0.),
        ),
        dict(
            first=7,
            last=9,
            frozen=['backbone', 'species'],
            rates=dict(diseases=.03),
            loss_weights=dict(species=0.),
        ),
        dict(first=10, last=18, rates=dict(backbone=.01, species=.01, diseases=.02)),
    ]
    cfg = LoopConfig(**quick, epochs=18, stages=stages, loss_weights=dict(disease=.7))
    torch.manual_seed(seed)
    model = Router(DISEASES)
    return Toy(Plants(), model, DataLoader(plants(800, 0), 32), DataLoader(plants(400, 1), 100), cfg)

def test_routed_heads(tmp_path):
    run, watch = learns_and_resumes(hierarchy, tmp_path)
    best = run.best['metrics']
    # guesses reach .33, .36 and .12
    assert best['species'] > .85
    assert best['disease'] > .8
    assert best['cascade'] > .75
    assert moved(watch, 1) == {'species'}
    for epoch in (2, 6):
        assert moved(watch, epoch) == {'backbone', 'species'}
    for epoch in (7, 9):
        assert moved(watch, epoch) == {'diseases'}
    assert moved(watch, 10) == {'backbone', 'species', 'diseases'}
    last, warm = run.history[-1], run.history[0]
    assert last['val/loss'] == pytest.approx(last['val/loss/species'] + .7 * last['val/loss/disease'])
    assert warm['val/loss'] == pytest.approx(warm['val/loss/species'])
    # in the three epochs that train disease heads only, two batches of each have nothing for them
    assert run.skipped == 2 * 3

# ---------------------------------------------- (d) two time series of unequal length

class Seasons(Task):
    "Two streams of their own lengths, padded with a mask; only both together tell the class"
    monitor, mode = 'accuracy', 'max'

    def parts(self, model):
        return dict(encoder=[model.radar, model.optical], decoder=[model.head])

    def forward(self, model, batch):
        return model(batch['radar'], batch['optical'])

    def count(self, batch):
        return dict(ce=len(batch['y']))

    def loss(self, out, batch):
        return dict(ce=F.cross_entropy(out, batch['y']))

    def meter(self):
        return Accuracy()

class Accuracy:
    def __init__(self):
        self.right, self.n = 0, 0

    def update(self, out, batch):
        self.right += int((out.argmax(1) == batch['y']).sum())
        self.n += len(batch['y'])

    def state(self):
        return self.right, self.n

    def merge(self, states):
        self.right, self.n = map(sum, zip(*states))

    def compute(self):
        return dict(accuracy=self.right / max(1, self.n))

class Stream(nn.Module):
    "Features of each step, and their mean over the steps that are there"
    def __init__(self, bands):
        super().__init__()
        self.steps = nn.Sequential(nn.Linear(bands, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, x, there):
        return (self.steps(x) * there[..., None]).sum(1) / there.sum(1, keepdim=True)

class Dual(nn.Module):
    "A stream of radar, a stream of optical images, and a head on both"
    def __init__(self):
        super().__init__()
        self.radar, self.optical = Stream(2), Stream(3)
        self.head = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, radar, optical):
        return self.head(torch.cat([self.radar(*radar), self.optical(*optical)], 1))

def pad_stream(values):
    "Values (T, bands) of each sample become (B, T, bands) and a mask (B, T), T the longest of the batch"
    x = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=-9999.)
    there = torch.arange(x.shape[1]) < torch.tensor([len(v) for v in values])[:, None]
    return x.where(there[..., None], 0.), there

def pad(samples):
    "Collate samples of unequal lengths"
    streams = {name: pad_stream([sample[name] for sample in samples]) for name in ('radar', 'optical')}
    return dict(**streams, y=torch.tensor([sample['y'] for sample in samples]))

def series(n, seed):
    "Each stream lies high or low; the class says whether they agree, so that one stream alone tells nothing"
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(n):
        sides = torch.randint(0, 2, (2,), generator=generator) * 2 - 1
        lengths = torch.randint(5, 15, (2,), generator=generator).tolist()
        radar = .5 * sides[0] + torch.randn(lengths[0], 2, generator=generator)
        optical = .5 * sides[1] + torch.randn(lengths[1], 3, generator=generator)
        samples.append(dict(radar=radar, optical=optical, y=int(sides[0] == sides[1])))
    return samples

def seasons(seed=0, val_batch=50):
    cfg = LoopConfig(**quick, epochs=12, lr=dict(base_lr=.01, backbone_lr_multiplier=1., warmup_epochs=1))
    torch.manual_seed(seed)
    model = Dual()
    data = DataLoader(series(600, 0), 20, shuffle=True, collate_fn=pad)
    val = DataLoader(series(200, 1), val_batch, collate_fn=pad)
    return Toy(Seasons(), model, data, val, cfg)

def test_two_time_series(tmp_path):
    run, _ = learns_and_resumes(seasons, tmp_path)
    assert run.best['value'] > .9
    # padding changes nothing
    alone, padded = (next(iter(seasons(val_batch=k).val)) for k in (1, 50))
    assert alone['radar'][0].shape[1] < padded['radar'][0].shape[1]
    first, same_first = (run.task.forward(run.judged, batch)[0] for batch in (alone, padded))
    torch.testing.assert_close(first, same_first)

# ---------------------------------------------- (e) a risk, and the C-index over all patients

class Risk(Task):
    """Chance of the event in each of five years; a year counts while the patient is known to be at risk. All patients
    are judged at once"""
    monitor, mode, YEARS = 'c_index', 'max', 5

    def parts(self, model):
        return dict(encoder=[model.encoder], head=[model.head])

    def forward(self, model, batch):
        return model(batch['x'])

    def count(self, batch):
        return dict(hazard=self.years(batch)[1].sum())

    def years(self, batch):
        "Whether the event fell into each year, and whether the patient was seen through it"
        year, last = torch.arange(self.YEARS), batch['time'].long()[:, None]
        event = batch['event'][:, None] & (year == last)
        return event.float(), ((year < last) | event).float()

    def loss(self, out, batch):
        event, seen = self.years(batch)
        hazard = F.binary_cross_entropy_with_logits(out, event, weight=seen, reduction='sum')
        return dict(hazard=hazard / seen.sum().clamp(min=1))

    def meter(self):
        return Concordance()

class Concordance:
    "Risk, time and event of every patient. The C-index counts pairs, so it is not a mean of batches or of processes"
    def __init__(self):
        self.rows = []

    def update(self, out, batch):
        risk = F.softplus(out).sum(1)
        self.rows.append(torch.stack([risk, batch['time'], batch['event'].float()], 1))

    def state(self):
        return torch.cat(self.rows)

    def merge(self, states):
        self.rows = list(states)

    def compute(self):
        return dict(c_index=c_index(*torch.cat(self.rows).T))

def c_index(risk, time, event):
    "Harrell's C: of the pairs whose order is known, the share that the risk orders correctly; a tie counts one half"
    later = (time[:, None] < time) | ((time[:, None] == time) & (event == 0))
    known = (event[:, None] > 0) & later
    right = (risk[:, None] > risk) + .5 * (risk[:, None] == risk)
    return float(right[known].mean())

def patients(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=generator)
    chance = 3 * torch.empty(n).exponential_(generator=generator)
    event_time = chance * torch.exp(1 - x[:, 0].abs() - 1.5 * x[:, 1])
    end = (6 * torch.rand(n, generator=generator)).clamp(max=4.99)
    time, event = event_time.minimum(end), event_time < end
    return [dict(x=a, time=t, event=e) for a, t, e in zip(x, time, event, strict=True)]

def survival(seed=0):
    rates = dict(encoder=.002, head=.02)
    stage = dict(first=1, last=14, rates=rates, schedule='plateau', warmup_epochs=2, warmup_start_lr=0.)
    cfg = LoopConfig(**quick, epochs=14, stages=[stage], lr=dict(plateau_patience=0, plateau_factor=.5))
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
    model = Net(encoder, nn.Linear(16, 5))
    return Toy(Risk(), model, DataLoader(patients(1200, 0), 40, shuffle=True), DataLoader(patients(300, 1), 32), cfg)

def test_survival(tmp_path):
    run, watch = learns_and_resumes(survival, tmp_path)
    assert run.best['value'] > .65
    for rates in watch.rates:
        assert rates['encoder'] == pytest.approx(.1 * rates['head'])
    steps = len(survival().data)
    assert watch.rates[0]['head'] == pytest.approx(.02 * (steps - 1) / steps / 2)
    assert watch.rates[2]['head'] == pytest.approx(.02)
    # after the warm-up the rate is that of torch's own scheduler
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=.02)
    peer = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode='max', factor=.5, patience=0)
    for epoch in range(3, 14):
        peer.step(run.history[epoch - 1]['val/c_index'])
        assert watch.rates[epoch]['head'] == pytest.approx(optimizer.param_groups[0]['lr'])
    assert optimizer.param_groups[0]['lr'] < .02

def test_c_index_is_of_all_patients():
    """Four patients in two processes: each orders its own pair correctly, and the four pairs across them wrongly.
    2 of 6 are right, not the mean of 1 and 1"""
    halves, whole = [Concordance(), Concordance()], Concordance()
    risks, times = ((2., 1.), (4., 3.)), ((1., 2.), (3., 4.))
    for half, risk, time in zip(halves, risks, times, strict=True):
        half.update(torch.tensor(risk)[:, None], dict(time=torch.tensor(time), event=torch.ones(2)))
    whole.merge([half.state() for half in halves])
    assert [half.compute()['c_index'] for half in halves] == [1., 1.]
    assert whole.compute()['c_index'] == pytest.approx(2 / 6)

@pytest.mark.real
def test_c_index_of_a_real_study(data_dir):
    "432 prisoners and the risks of a Cox model: Harrell's C as lifelines gives it"
    file = data_dir/'survival'/'rossi_risk.csv'
    if not file.exists():
        pytest.skip('the rossi table is not on this machine')
    rows = np.loadtxt(file, delimiter=',', skiprows=1)
    time, event, risk = torch.from_numpy(rows).T[:3]
    assert c_index(risk, time, event) == pytest.approx(.6403, abs=5e-5)
