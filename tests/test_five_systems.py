"Toy versions of five systems run on the loop unedited: each is a task of a few lines, a model and a config. They are examples as much as tests"
from pathlib import Path

import numpy as np, pytest, torch
from torch import nn
from torch.utils.data import DataLoader

from rtsseg.config import LoopConfig
from rtsseg.checkpoint import load_state
from rtsseg.loop import Task, fit
from rtsseg.metrics import confusion, mean_iou

F = nn.functional
HERE = Path(__file__).parent

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "Toys are faster so"
    before = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(before)

# ---------------------------------------------------------------- what is asked of every system
class Watch:
    "Notes each part's weights and its rate at the end of every epoch, and stops where it is told to"
    def __init__(self, stop=None): self.at, self.weights, self.rates = stop, [], []
    def on_start(self, run): self.note(run)
    def on_epoch(self, run): self.note(run); self.rates.append({k[3:]: v for k, v in run.history[-1].items() if k.startswith('lr/')})
    def on_step(self, run):
        if run.step == self.at: run.stop('as asked')
    def note(self, run): self.weights.append({g['name']: torch.cat([p.detach().flatten() for p in g['params']]) for g in run.optimizer.param_groups})

def moved(watch, epoch):
    "Names of the parts that moved in an epoch (1-based)"
    before, after = watch.weights[epoch - 1:epoch + 1]
    return {k for k in after if not torch.equal(before[k], after[k])}

def train(system, folder, *observers):
    task, model, data, val, cfg = system
    return fit(cfg, task, model, data, val, folder, observers)

def learns_and_resumes(make, folder):
    """make(seed of the weights) → task, model, training loader, validation loader, config. Train; then again, stopped in the middle of an epoch and
    started once more with other weights in hand: every byte of the end must be the same"""
    run = train(make(0), folder/'whole', watch := Watch())
    half = train(make(0), folder/'halves', Watch(stop=run.step * 2 // 3 + 1))
    assert half.reason == 'as asked' and 0 < half.batch < len(make(0)[2])
    rest = train(make(1), folder/'halves')
    for a, b in zip(run.state().values(), rest.state().values(), strict=True): same(a, b)
    return run, watch

def same(a, b):
    if isinstance(a, torch.Tensor): assert torch.equal(a, b)
    elif isinstance(a, dict):
        for k in a.keys() | b.keys():
            if k not in ('seconds', 'batches'): same(a[k], b[k])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True): same(x, y)
    else: assert a == b

def conv(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.GroupNorm(4, o), nn.ReLU())

class Net(nn.Module):
    "An encoder and a head"
    def __init__(self, encoder, head, seed): torch.manual_seed(seed); super().__init__(); self.encoder, self.head = encoder(), head()
    def forward(self, x): return self.head(self.encoder(x))

quick = dict(device='cpu', val_frequency=1, freeze_backbone_epochs=0, ema=dict(decay=.9), early_stopping=dict(patience=None))

# ---------------------------------------------------------------- (a) binary segmentation with ignored pixels
class Binary(Task):
    "Focal loss, mean over the valid pixels; judged by the IoU of all pixels together"
    monitor, mode = 'iou', 'max'
    def parts(self, model): return dict(encoder=[model.encoder], decoder=[model.head])
    def forward(self, model, batch): return model(batch['image'])[:, 0]
    def count(self, batch): return dict(focal=(batch['target'] != 255).sum())
    def loss(self, out, batch):
        valid = batch['target'] != 255; y = batch['target'][valid]; bce = F.binary_cross_entropy_with_logits(out[valid], y, reduction='none')
        return dict(focal=(bce * (out[valid].sigmoid() - y).abs()**2).sum() / valid.sum().clamp(min=1))
    def meter(self): return IoU()

class IoU:
    def __init__(self): self.both, self.any = 0, 0
    def update(self, out, batch):
        p, t, ok = out > 0, batch['target'] == 1, batch['target'] != 255
        self.both += int((p & t & ok).sum()); self.any += int(((p | t) & ok).sum())
    def state(self): return self.both, self.any
    def merge(self, states): self.both, self.any = map(sum, zip(*states))
    def compute(self): return dict(iou=self.both / max(1, self.any))

def squares(n, seed):
    "Bright squares in noise; the rim of each is ignored"
    g, out = torch.Generator().manual_seed(seed), []
    for _ in range(n):
        y = torch.zeros(16, 16); r, c = torch.randint(1, 9, (2,), generator=g).tolist()
        y[r-1:r+6, c-1:c+6] = 255; y[r:r+5, c:c+5] = 1
        out.append(dict(image=(y == 1).float()[None] + .7 * torch.randn(1, 16, 16, generator=g), target=y))
    return out

def binary(seed=0):
    lr = dict(frozen_lr=.01, base_lr=.01, backbone_lr_multiplier=.5, warmup_epochs=1)
    cfg = LoopConfig(**quick | dict(epochs=10, accumulate=2, freeze_backbone_epochs=1), lr=lr)
    model = Net(lambda: nn.Sequential(conv(1, 8), conv(8, 8)), lambda: nn.Conv2d(8, 1, 1), seed)
    return Binary(), model, DataLoader(squares(96, 0), 8, shuffle=True), DataLoader(squares(32, 1), 8), cfg

def test_binary_segmentation(tmp_path):
    run, watch = learns_and_resumes(binary, tmp_path)
    share = torch.stack([d['target'] for d in squares(32, 1)]); share = float((share == 1).sum() / (share != 255).sum())   # IoU of 'everywhere'
    assert share < .15 and run.best['value'] > .75
    assert moved(watch, 1) == {'decoder'} and moved(watch, 2) == {'encoder', 'decoder'}
    for r in watch.rates[1:]: assert r['encoder'] == pytest.approx(.5 * r['decoder'])
    assert watch.rates[0] == dict(encoder=0., decoder=.01) and run.step == 10 * 6

# ---------------------------------------------------------------- (b) several classes, a teacher, and losses that join later
class Distilled(Task):
    "Cross-entropy, Dice and Lovász on labels; features (L2) and softened predictions (KL at temperature T) of a frozen teacher"
    monitor, mode, T = 'miou', 'max', 2.
    def __init__(self, teacher, seed): torch.manual_seed(seed); self.teacher, self.project = teacher.eval().requires_grad_(False), nn.Conv2d(8, 3, 1)
    def parts(self, model): return dict(encoder=[model.encoder], decoder=[model.head])
    def modules(self): return self.project                             # trains, and is no part of the model
    def forward(self, model, batch): f = model.encoder(batch['image']); return f, model.head(f)
    def count(self, batch):                                            # Dice and Lovász are ratios of sums: each micro-batch counts once
        n = (batch['target'] != 255).sum(); return dict(ce=n, dice=int(n > 0), lovasz=int(n > 0), feature=len(batch['image']), kl=batch['target'].numel())
    def loss(self, out, batch):
        (features, z), y = out, batch['target']; valid = y != 255
        p, t = z.softmax(1).movedim(1, -1)[valid], F.one_hot(y[valid], 3).float()
        n = valid.sum().clamp(min=1)
        dice = (1 - (2 * (p * t).sum(0) + 1) / (p.sum(0) + t.sum(0) + 1)).mean()
        values = dict(ce=F.cross_entropy(z, y, ignore_index=255, reduction='sum') / n, dice=dice, lovasz=lovasz(p, t))
        if torch.is_grad_enabled():                                    # the teacher is absent in evaluation
            with torch.no_grad(): f, soft = self.teacher(batch['image'])
            values |= dict(feature=F.mse_loss(self.project(features), f),
                           kl=self.T**2 * F.kl_div((z / self.T).log_softmax(1), (soft / self.T).softmax(1), reduction='none').sum(1).mean())
        return values
    def meter(self): return MIoU(3)

def lovasz(p, t):
    "Lovász-softmax (Berman et al. 2018) over pixels: p, t (n, classes); a mean over the classes that are there"
    out = []
    for k in t.any(0).nonzero()[:, 0].tolist():
        errors, order = (t[:, k] - p[:, k]).abs().sort(descending=True); g = t[order, k]
        jaccard = 1 - (g.sum() - g.cumsum(0)) / (g.sum() + (1 - g).cumsum(0))
        out.append(errors @ torch.cat([jaccard[:1], jaccard.diff()]))
    return torch.stack(out).mean() if out else p.sum()

class MIoU:
    "Mean IoU from one confusion matrix"
    def __init__(self, k): self.table = np.zeros((k, k), int)
    def update(self, out, batch): self.table += confusion(out[1].argmax(1), batch['target'], len(self.table))
    def state(self): return self.table
    def merge(self, states): self.table = sum(states)
    def compute(self): return dict(miou=mean_iou(self.table))

class Teacher(nn.Module):
    "Knows the answer: the strongest of the three blurred channels. Counts its calls"
    calls = 0
    def forward(self, x): Teacher.calls += 1; f = F.avg_pool2d(x, 5, 1, 2, count_include_pad=False); return f, 8 * f

def land(n, seed, labelled):
    "Three kinds of land in blocks, seen through noise; few pixels carry a label"
    g, out = torch.Generator().manual_seed(seed), []
    for _ in range(n):
        y = torch.randint(0, 3, (2, 2), generator=g).repeat_interleave(8, 0).repeat_interleave(8, 1)
        x = F.one_hot(y, 3).movedim(-1, 0) + torch.randn(3, 16, 16, generator=g)
        out.append(dict(image=x, target=torch.where(torch.rand(16, 16, generator=g) < labelled, y, 255)))
    return out

def distilled(seed=0):
    stages = [dict(first=1, last=3, rates=dict(encoder=.01, decoder=.02, modules=.02), schedule='cosine', warmup_epochs=1, loss_weights=dict(lovasz=0.)),
              dict(first=4, last=5, rates=dict(encoder=.002, decoder=.004, modules=.004), loss_weights=dict(ce=.6))]
    cfg = LoopConfig(**quick, epochs=5, stages=stages, loss_weights=dict(ce=.7, dice=.3, lovasz=.1, feature=.5, kl=.5))
    model = Net(lambda: nn.Sequential(conv(3, 8), conv(8, 8)), lambda: nn.Conv2d(8, 3, 1), seed)
    return Distilled(Teacher(), seed), model, DataLoader(land(96, 0, .02), 8, shuffle=True), DataLoader(land(32, 1, 1.), 8), cfg

def test_classes_with_a_teacher(tmp_path):
    run, watch = learns_and_resumes(distilled, tmp_path)
    assert run.best['value'] > .75                                     # a guess reaches 1/5 (hits 1/9, union 5/9 of the pixels), a pixel's own channels .46
    saved = load_state(tmp_path/'whole'/'checkpoints'/'resume.ckpt')
    assert set(saved['modules']) == {'weight', 'bias'} and moved(watch, 1) == {'encoder', 'decoder', 'modules'}
    for row, weights in zip(run.history, 3 * [dict(ce=.7, dice=.3, lovasz=0.)] + 2 * [dict(ce=.6, dice=.3, lovasz=.1)]):
        assert {k for k in row if k.startswith('train/loss/')} == {f'train/loss/{p}' for p in ('ce', 'dice', 'lovasz', 'feature', 'kl')}
        assert {k for k in row if k.startswith('val/loss/')} == {f'val/loss/{p}' for p in weights}
        assert row['val/loss'] == pytest.approx(sum(w * row[f'val/loss/{p}'] for p, w in weights.items()))
    assert watch.rates[4] == dict(encoder=.002, decoder=.004, modules=.004)

def test_teacher_is_absent_in_evaluation(tmp_path):
    task, model, data, val, cfg = distilled()
    Teacher.calls = 0; run = fit(cfg.model_copy(update=dict(epochs=1)), task, model, data, val, tmp_path)
    assert Teacher.calls == run.step == len(data)

# ---------------------------------------------------------------- (c) a species head and disease heads that it routes to
class Plants(Task):
    "L = L_species + 0.7 L_disease; a sample's disease is judged by the head of its species, and only where it carries a disease label"
    monitor, mode = 'cascade', 'max'
    def parts(self, model): return dict(backbone=[model.backbone], species=[model.species], diseases=[model.diseases])
    def forward(self, model, batch): return model(batch['x'], batch['species'])
    def count(self, batch): return dict(species=len(batch['x']), disease=(batch['disease'] >= 0).sum())
    def loss(self, out, batch):
        species, disease = out; known = batch['disease'] >= 0
        return dict(species=F.cross_entropy(species, batch['species']),
                    disease=F.cross_entropy(disease, batch['disease'], ignore_index=-1, reduction='sum') / known.sum().clamp(min=1))
    def meter(self): return Cascade()

class Router(nn.Module):
    "A head for each species, of as many diseases as it has; logits of unequal lengths are filled up with −1e4"
    def __init__(self, diseases, seed):
        torch.manual_seed(seed); super().__init__()
        self.backbone, self.species = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh()), nn.Linear(16, len(diseases))
        self.diseases = nn.ModuleList(nn.Linear(16, d) for d in diseases)
    def forward(self, x, species):
        f = self.backbone(x); disease = f.new_full((len(x), max(h.out_features for h in self.diseases)), -1e4)
        for k, head in enumerate(self.diseases): disease[species == k, :head.out_features] = head(f[species == k])
        return self.species(f), disease

class Cascade:
    "Accuracy of the species, of the disease given the species, and of both together"
    def __init__(self): self.n = torch.zeros(5, dtype=torch.long)
    def update(self, out, batch):
        s, d, known = out[0].argmax(1) == batch['species'], out[1].argmax(1) == batch['disease'], batch['disease'] >= 0
        self.n += torch.stack([s.sum(), torch.tensor(len(s)), (d & known).sum(), (s & d & known).sum(), known.sum()])
    def state(self): return self.n
    def merge(self, states): self.n = sum(states)
    def compute(self): s, n, d, both, known = self.n.tolist(); return dict(species=s / n, disease=d / known, cascade=both / known)

DISEASES = (2, 3, 4)
def plants(n, seed):
    "Species by the angle of the first two features, disease by the sector of the next two; a third carry no disease label"
    g, out = torch.Generator().manual_seed(seed), []
    for i in range(n):
        x = torch.randn(6, generator=g); sector = lambda a, b, n: int((torch.atan2(b, a) / torch.pi + 1) / 2 * n * .999)
        s = sector(x[0], x[1], 3); d = sector(x[2], x[3], DISEASES[s])
        out.append(dict(x=x, species=torch.tensor(s), disease=torch.tensor(-1 if i % 3 == 0 or 64 <= i < 128 else d)))
    return out

def hierarchy(seed=0):
    stages = [dict(first=1, last=1, frozen=['backbone', 'diseases'], rates=dict(species=.03), loss_weights=dict(disease=0.)),
              dict(first=2, last=6, frozen=['diseases'], rates=dict(backbone=.01, species=.03), schedule='cosine', loss_weights=dict(disease=0.)),
              dict(first=7, last=9, frozen=['backbone', 'species'], rates=dict(diseases=.03), loss_weights=dict(species=0.)),
              dict(first=10, last=18, rates=dict(backbone=.01, species=.01, diseases=.02))]
    cfg = LoopConfig(**quick, epochs=18, stages=stages, loss_weights=dict(disease=.7))
    return Plants(), Router(DISEASES, seed), DataLoader(plants(800, 0), 32), DataLoader(plants(400, 1), 100), cfg

def test_routed_heads(tmp_path):
    run, watch = learns_and_resumes(hierarchy, tmp_path)
    best = run.best['metrics']
    assert best['species'] > .85 and best['disease'] > .8 and best['cascade'] > .75        # guesses: .33, .36, .12
    first, second, third = {'backbone', 'species'}, {'diseases'}, {'backbone', 'species', 'diseases'}
    for epoch, parts in {1: {'species'}, 2: first, 6: first, 7: second, 9: second, 10: third}.items(): assert moved(watch, epoch) == parts
    last, warm = run.history[-1], run.history[0]
    assert last['val/loss'] == pytest.approx(last['val/loss/species'] + .7 * last['val/loss/disease'])
    assert warm['val/loss'] == pytest.approx(warm['val/loss/species'])
    assert run.skipped == 2 * 3                                        # while only disease heads train, two batches of each epoch have nothing for them

# ---------------------------------------------------------------- (d) two time series of unequal length
class Seasons(Task):
    "Two streams of their own lengths, padded with a mask; the class is known only to both together"
    monitor, mode = 'accuracy', 'max'
    def parts(self, model): return dict(encoder=[model.radar, model.optical], decoder=[model.head])
    def forward(self, model, batch): return model(batch['radar'], batch['optical'])
    def count(self, batch): return dict(ce=len(batch['y']))
    def loss(self, out, batch): return dict(ce=F.cross_entropy(out, batch['y']))
    def meter(self): return Accuracy()

class Accuracy:
    def __init__(self): self.right, self.n = 0, 0
    def update(self, out, batch): self.right += int((out.argmax(1) == batch['y']).sum()); self.n += len(batch['y'])
    def state(self): return self.right, self.n
    def merge(self, states): self.right, self.n = map(sum, zip(*states))
    def compute(self): return dict(accuracy=self.right / max(1, self.n))

class Stream(nn.Module):
    "Features of each step, and their mean over the steps that are there"
    def __init__(self, bands): super().__init__(); self.steps = nn.Sequential(nn.Linear(bands, 16), nn.Tanh(), nn.Linear(16, 8))
    def forward(self, x, there): return (self.steps(x) * there[..., None]).sum(1) / there.sum(1, keepdim=True)

class Dual(nn.Module):
    def __init__(self, seed):
        torch.manual_seed(seed); super().__init__()
        self.radar, self.optical, self.head = Stream(2), Stream(3), nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    def forward(self, radar, optical): return self.head(torch.cat([self.radar(*radar), self.optical(*optical)], 1))

def pad(samples):
    "Collate: each stream becomes (values (B, T, bands), mask (B, T)), T the longest of the batch"
    def stream(k):
        x = nn.utils.rnn.pad_sequence([s[k] for s in samples], batch_first=True, padding_value=-9999.)
        there = torch.arange(x.shape[1]) < torch.tensor([len(s[k]) for s in samples])[:, None]
        return x.where(there[..., None], 0.), there
    return dict(radar=stream('radar'), optical=stream('optical'), y=torch.tensor([s['y'] for s in samples]))

def series(n, seed):
    "Each stream lies high or low; the class says whether they agree, so that one stream alone is worth nothing"
    g, out = torch.Generator().manual_seed(seed), []
    for _ in range(n):
        up = torch.randint(0, 2, (2,), generator=g) * 2 - 1; lengths = torch.randint(5, 15, (2,), generator=g).tolist()
        radar, optical = (.5 * u + torch.randn(t, bands, generator=g) for u, t, bands in zip(up, lengths, (2, 3)))
        out.append(dict(radar=radar, optical=optical, y=int(up[0] == up[1])))
    return out

def seasons(seed=0, val_batch=50):
    cfg = LoopConfig(**quick, epochs=12, lr=dict(base_lr=.01, backbone_lr_multiplier=1., warmup_epochs=1))
    return Seasons(), Dual(seed), DataLoader(series(600, 0), 20, shuffle=True, collate_fn=pad), DataLoader(series(200, 1), val_batch, collate_fn=pad), cfg

def test_two_time_series(tmp_path):
    run, _ = learns_and_resumes(seasons, tmp_path)
    assert run.best['value'] > .9
    a, b = (next(iter(seasons(val_batch=k)[3])) for k in (1, 50))                # padding changes nothing
    out = lambda batch: run.task.forward(run.judged, batch)
    assert a['radar'][0].shape[1] < b['radar'][0].shape[1]
    torch.testing.assert_close(out(a)[0], out(b)[0])

# ---------------------------------------------------------------- (e) a risk, and the C-index over all patients
class Risk(Task):
    "Chance of the event in each of five years; a year counts while the patient is known to be at risk. Judged over all patients at once"
    monitor, mode, YEARS = 'c_index', 'max', 5
    def parts(self, model): return dict(encoder=[model.encoder], head=[model.head])
    def forward(self, model, batch): return model(batch['x'])
    def count(self, batch): return dict(hazard=self.years(batch)[1].sum())
    def years(self, batch):
        "Whether the event fell into each year, and whether the patient was seen through it"
        y = torch.arange(self.YEARS); last = batch['time'].long()[:, None]; event = batch['event'][:, None] & (y == last)
        return event.float(), ((y < last) | event).float()
    def loss(self, out, batch):
        event, seen = self.years(batch)
        return dict(hazard=F.binary_cross_entropy_with_logits(out, event, weight=seen, reduction='sum') / seen.sum().clamp(min=1))
    def meter(self): return Concordance()

class Concordance:
    "Risk, time and event of every patient; the C-index is a number of pairs, so batches and processes cannot be averaged"
    def __init__(self): self.rows = []
    def update(self, out, batch): self.rows.append(torch.stack([F.softplus(out).sum(1), batch['time'], batch['event'].float()], 1))
    def state(self): return torch.cat(self.rows)
    def merge(self, states): self.rows = list(states)
    def compute(self): return dict(c_index=c_index(*torch.cat(self.rows).T))

def c_index(risk, time, event):
    "Harrell's C: of the pairs whose order is known, the share that the risk orders rightly; equal risks count one half"
    known = (event[:, None] > 0) & ((time[:, None] < time) | ((time[:, None] == time) & (event == 0)))
    return float((((risk[:, None] > risk) + .5 * (risk[:, None] == risk))[known]).mean())

def patients(n, seed):
    g = torch.Generator().manual_seed(seed); x = torch.randn(n, 8, generator=g)
    time = 3 * torch.empty(n).exponential_(generator=g) * torch.exp(1 - x[:, 0].abs() - 1.5 * x[:, 1]); gone = 6 * torch.rand(n, generator=g)
    return [dict(x=a, time=t, event=e) for a, t, e in zip(x, time.minimum(gone).clamp(max=4.99), time < gone.clamp(max=4.99))]

def survival(seed=0):
    stage = dict(first=1, last=14, rates=dict(encoder=.002, head=.02), schedule='plateau', warmup_epochs=2, warmup_start_lr=0.)
    cfg = LoopConfig(**quick, epochs=14, stages=[stage], lr=dict(plateau_patience=0, plateau_factor=.5))
    model = Net(lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU()), lambda: nn.Linear(16, 5), seed)
    return Risk(), model, DataLoader(patients(1200, 0), 40, shuffle=True), DataLoader(patients(300, 1), 32), cfg

def test_survival(tmp_path):
    run, watch = learns_and_resumes(survival, tmp_path)
    assert run.best['value'] > .65
    for r in watch.rates: assert r['encoder'] == pytest.approx(.1 * r['head'])
    steps = len(survival()[2])
    assert watch.rates[0]['head'] == pytest.approx(.02 * (steps - 1) / steps / 2) and watch.rates[2]['head'] == pytest.approx(.02)
    # after the warm-up the rate is that of torch's own scheduler
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=.02)
    peer = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode='max', factor=.5, patience=0)
    for epoch in range(3, 14):
        peer.step(run.history[epoch - 1]['val/c_index'])
        assert watch.rates[epoch]['head'] == pytest.approx(optimizer.param_groups[0]['lr'])
    assert optimizer.param_groups[0]['lr'] < .02

def test_c_index_is_of_all_patients():
    "Four patients at two processes: each orders its own pair rightly, and the four pairs across wrongly: 2 of 6, not the mean of 1 and 1"
    halves, whole = [Concordance(), Concordance()], Concordance()
    for h, risk, time in zip(halves, ((2., 1.), (4., 3.)), ((1., 2.), (3., 4.))):
        h.update(torch.tensor(risk)[:, None], dict(time=torch.tensor(time), event=torch.ones(2)))
    whole.merge([h.state() for h in halves])
    assert [h.compute()['c_index'] for h in halves] == [1., 1.] and whole.compute()['c_index'] == pytest.approx(2 / 6)

def test_c_index_of_a_real_study():
    "432 prisoners and the risks of a Cox model: Harrell's C as lifelines gives it"
    file = HERE.parents[1]/'shared'/'data'/'survival'/'rossi_risk.csv'
    if not file.exists(): pytest.skip('the rossi table is not at hand')
    rows = torch.tensor([[float(v) for v in line.split(',')] for line in file.read_text().split()[1:]], dtype=torch.float64)
    assert c_index(rows[:, 2], rows[:, 0], rows[:, 1]) == pytest.approx(.6403, abs=5e-5)
