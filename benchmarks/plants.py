"""Species and diseases of the made-up leaf world: routed heads beside one flat head, and what colours alone tell

    python benchmarks/plants.py [--seeds 42 43 44] [--epochs 48]

Each side trains the network of configs/plants/toy.yaml from random weights for as many epochs. Ours has the six stages;
the peer has one linear layer over all pairs of species and disease, and trains end to end throughout. Both are judged
on the test split: an image is right where species and disease are. A linear model of colour histograms says how far
colours alone lead. Seeds vary the weights and the draws; the world stays.
"""
import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score

from common import emit_value, short
from rtsseg.config import find_system, load
from rtsseg.evaluation import evaluate
from rtsseg.leaf_world import make_leaf_world
from rtsseg.training import train

TOY = Path(__file__).resolve().parent.parent/'configs'/'plants'/'toy.yaml'

def flat_table(world):
    "The same photographs with one species, whose diseases are all pairs"
    table = pd.read_csv(world/'photos.csv')
    flat = table.assign(species='leaf', disease=table.species + ': ' + table.disease)
    flat.to_csv(world/'flat.csv', index=False)
    return world/'flat.csv'

def end_to_end(epochs):
    "One stage in which all parts learn, at the rates with which the toy ends"
    last = load(TOY).stages[-1]
    return [last.model_dump() | dict(first=1, last=epochs, loss_weights=dict(species=0., disease=1.))]

def shortened(epochs):
    "The six stages, the last one cut so that the run has so many epochs"
    stages = [stage.model_dump() for stage in load(TOY).stages]
    return [*stages[:-1], stages[-1] | dict(last=epochs)]

def judged(cfg):
    "The true and the predicted disease of each test image, by the predicted species"
    folder = train(cfg)
    evaluate(folder, 'val')
    frame = find_system('plants').read_table(evaluate(folder, 'test')).frame
    shutil.rmtree(folder)
    return frame

def side_of(world, runs, seed, epochs, flat):
    "The test table of one side"
    data = dict(source=world/'photos.csv', taxonomy=world/'taxonomy.json', made=None)
    stages = shortened(epochs)
    if flat:
        data, stages = dict(source=flat_table(world), taxonomy=None, made=None), end_to_end(epochs)
    return judged(load(TOY, name='flat' if flat else 'routed', runs=runs, seed=seed, epochs=epochs, stages=stages,
                       data=data, tracker=dict(kind='none')))

def histograms(world, split):
    "Colour histograms, (n, 512), and the pair of each image"
    table = pd.read_csv(world/'photos.csv')
    table = table[table.split == split]
    found = [cv2.calcHist([cv2.imread(str(world/path))], [0, 1, 2], None, [8] * 3, [0, 256] * 3).ravel()
             for path in table.path]
    return np.array(found) / np.sum(found[0]), table.species + ': ' + table.disease

def by_colour(world):
    "Accuracy of a linear model of colour histograms on the test split"
    (x, y), (x_test, y_test) = histograms(world, 'train'), histograms(world, 'test')
    model = LogisticRegression(C=100, max_iter=2000).fit(x, y)
    return accuracy_score(y_test, model.predict(x_test))

def scores(frame):
    "Accuracy and macro-F1 of species and disease together"
    return (accuracy_score(frame.disease, frame.cascade_found),
            f1_score(frame.disease, frame.cascade_found, average='macro'))

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--seeds', type=int, nargs='+', default=[42, 43, 44])
    parser.add_argument('--epochs', type=int, default=load(TOY).epochs)
    given = parser.parse_args()
    ours, peer = [], []
    with TemporaryDirectory() as home:
        made = load(TOY).data.made
        world = make_leaf_world(f'{home}/world', made.side, made.images, made.species, made.seed)
        colour = by_colour(world)
        for seed in given.seeds:
            for sides, flat in ((ours, False), (peer, True)):
                sides.append(scores(side_of(world, Path(home)/'runs', seed, given.epochs, flat)))
    for k, name in enumerate(('accuracy', 'macro-F1')):
        mine, theirs = [side[k] for side in ours], [side[k] for side in peer]
        emit_value(f'leaf world, species and disease together: {name} of routed heads / one flat head',
                   short(np.mean(mine)), short(np.mean(theirs)), goal='> peer in each seed',
                   met=bool(np.all(np.array(mine) > theirs)), epochs=given.epochs,
                   by_seed=f'{[round(v, 3) for v in mine]} / {[round(v, 3) for v in theirs]}')
    emit_value('leaf world: accuracy of routed heads / a linear model of colour histograms',
               short(np.mean([side[0] for side in ours])), short(colour), goal='> 1.5 × peer',
               met=bool(np.mean([side[0] for side in ours]) > 1.5 * colour))

if __name__ == '__main__':
    main()
