"A run of a second or two of each other system, on a made-up world"
import cv2
import numpy as np

from rtsseg.class_world import make_class_world
from rtsseg.config import config_folder, load
from rtsseg.leaf_world import make_leaf_world
from rtsseg.phantom import PhantomWorld, make_phantom_world
from rtsseg.season import SeasonWorld, make_season

# a checkpoint after every step
OFTEN = dict(every=1, resume_minutes=1e-9)

def classify(home):
    "Bright and dark images in three splits"
    rng = np.random.default_rng(0)
    for split in ('train', 'val', 'test'):
        for kind, brightness in (('bright', 150), ('dark', 0)):
            folder = home/'images'/split/kind
            folder.mkdir(parents=True)
            for k in range(6):
                cv2.imwrite(str(folder/f'{k}.png'), rng.integers(brightness, brightness + 100, (32, 32, 3), 'uint8'))
    return dict(batch_size=4, data=dict(source=home/'images'), model=dict(name='test_efficientnet'))

def landcover(home):
    land = make_class_world(home/'land', side=64, images=12)
    return dict(batch_size=4, windows=dict(side=64, stride=48), data=dict(source=land, sides=[64], made=None))

def plants(home):
    leaves = make_leaf_world(home/'leaves', side=32, images=12, species=2)
    stages = [
        dict(first=1, last=1, frozen=['encoder', 'diseases'], rates=dict(species=1e-3),
             loss_weights=dict(species=1., disease=0.)),
        dict(first=2, last=2, rates=dict(encoder=1e-3, species=1e-3, diseases=1e-3),
             loss_weights=dict(species=1., disease=.7)),
    ]
    data = dict(source=leaves/'photos.csv', taxonomy=leaves/'taxonomy.json', side=32, made=None)
    return dict(batch_size=8, stages=stages, data=data, model=dict(backbone='test_efficientnet', weights=None))

def exams(home):
    "Settings that survival and registration share"
    path = home/'phantoms'/'exams.csv'
    if not path.exists():
        make_phantom_world(path.parent, PhantomWorld(patients=16, height=48, width=32))
    data = dict(csv_file=path, data_root=path.parent, height=48, width=32, priors=1, made=None)
    return dict(batch_size=8, data=data, registration=dict(width=4, levels=2, heads=2, window=4, size=None))

def survival(home):
    model = dict(name='VMRA-MaR', encoder='test_byobnet', num_heads=4, grid=2, max_t=3)
    return exams(home) | dict(model=model)

def timeseries(home):
    season = make_season(home/'season', SeasonWorld(side=32, train=4, val=2, test=2, dates1=(5, 7), dates2=(4, 6)))
    paths = {f'base_{split}_path': season/split for split in ('train', 'val', 'test')}
    return dict(batch_size=4, data=paths | dict(patch=16, made=None), model=dict(depth=2, filters=4, dropout=.1),
                early_stopping=dict(patience=3))

# system: a config of configs/, and what makes a world and the settings that differ
SYSTEMS = {
    'classify': ('classify', classify),
    'landcover': ('landcover/toy', landcover),
    'plants': ('plants/toy', plants),
    'survival': ('survival/toy', survival),
    'registration': ('survival/registration_toy', exams),
    'timeseries': ('timeseries/toy', timeseries),
}

def system_config(system, home, runs):
    "The config of two epochs of a system, whose world is made in a folder"
    file, make = SYSTEMS[system]
    small = dict(runs=runs, device='cpu', epochs=2, tracker=dict(kind='none'), checkpoint=OFTEN)
    return load(config_folder()/f'{file}.yaml', **small | make(home))
