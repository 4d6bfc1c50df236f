"""The sets of quality.py, and the one number by which all methods are judged there

Each set becomes a manifest with images for training, for choosing a checkpoint (val) and for judging (test). No method
sees the test images before its last step, and all train on the same training images.
"""
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score

from rtsseg.config import load
from rtsseg.prepare import find_manifest, source_settings
from rtsseg.rawtile import read_row

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent/'shared'/'data'
# made once for all cells
DATA = ROOT/'data'/'quality'

def named_splits(folder):
    "{split: names of images} of a real set"
    table = pd.read_csv(folder/'manifest.csv', dtype=str)
    return {split: sorted(names) for split, names in table.groupby('split').tile_id}

def dubai_source():
    "Buildings against the rest at half resolution; every fifth training image is for val"
    folder = SHARED/'dubai_landcover'
    named = named_splits(folder)
    val = named['train'][4::5]
    train = [name for name in named['train'] if name not in val]
    return dict(kind='images', path=folder, classes={0: 1, 1: 0, 2: 0, 3: 0, 4: 0, 255: 255}, downscale=2,
                splits=dict(train=train, val=val, test=named['val']))

def landslides_source():
    folder = SHARED/'s2_landslide_bd'
    return dict(kind='images', path=folder, extra_bands={'nir': 4}, nodata=0, splits=named_splits(folder))

def toy_source():
    return load(ROOT/'configs'/'toy.yaml').data.source.model_dump()

class DataSet(NamedTuple):
    source: Callable      # gives data.source
    bands: tuple          # EXTRA bands
    needs: Path|None      # real data; None for a set that is made up

SETS = {'dubai': DataSet(dubai_source, (), SHARED/'dubai_landcover'),
        'landslides': DataSet(landslides_source, ('nir',), SHARED/'s2_landslide_bd'),
        'toy': DataSet(toy_source, ('ndvi', 'relative_elevation'), None)}

def set_config(name):
    "A config that says where the images of a set are"
    return load(data=dict(manifest=DATA/name/'manifest.csv', source=SETS[name].source(), split_check='warn'))

def set_settings(name):
    "What decides the pixels of a set"
    return source_settings(set_config(name).data.source)

def prepared(name):
    "The manifest of a set, made where it is missing"
    return find_manifest(set_config(name))

def rows_of(manifest, split):
    return manifest.of(split).table.to_dict('records')

def pixels(manifest, row, bands):
    "All bands float32 (C, H, W), NaN where data are missing, and the label"
    tile = read_row(manifest.root, row, bands)
    planes = np.concatenate([tile.rgb, tile.extra]).astype(np.float32)
    planes[:, ~tile.valid] = np.nan
    return planes, tile.label

def band_statistics(images):
    "Mean and standard deviation of each band over images, without nodata; float64 (C, 1, 1)"
    values = np.concatenate([planes.reshape(len(planes), -1) for planes in images], 1).astype(np.float64)
    return np.nanmean(values, 1)[:, None, None], np.nanstd(values, 1)[:, None, None]

def score_file(out, tile):
    return out/'scores'/f'{tile}.npy'

def write_scores(out, tile, scores):
    "Keep the scores (H, W) of a test image in the folder of a cell"
    score_file(out, tile).parent.mkdir(exist_ok=True)
    np.save(score_file(out, tile), scores)

def write_facts(out, **facts):
    "Keep what a method says about its training"
    (out/'facts.json').write_text(json.dumps(facts))

def native_ap(manifest, out):
    "Average precision over every labelled pixel of the test images, whole, by scikit-learn"
    truth, scores = [], []
    for row in rows_of(manifest, 'test'):
        label = read_row(manifest.root, row).label
        score = np.load(score_file(out, row['tile_id']))
        truth.append(label[label != 255])
        scores.append(score[label != 255])
    return float(average_precision_score(np.concatenate(truth), np.concatenate(scores)))
