"""Species and diseases of the made-up leaf world: routed heads beside one flat head, and what colours alone tell

    python benchmarks/plants.py [--seeds 42 43 44] [--epochs 48] [--staged]

Both sides train the network of configs/plants/toy.yaml from random weights, end to end, for as many epochs at the same
rates; the peer has one linear layer over all pairs of species and disease in place of two routed heads. An image of the
test split is right where species and disease are. `--staged` adds the six stages of the guide in as many epochs. A
linear model of colour histograms says how far colours alone lead. Seeds vary the weights and the draws; the world
stays. Each seed prints its row.
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

def end_to_end(epochs, weights):
    "One stage in which all parts learn, at the rates with which the toy ends"
    last = load(TOY).stages[-1]
    return [last.model_dump() | dict(first=1, last=epochs, loss_weights=weights)]

def six_stages(epochs):
    "The stages of the toy, the last one cut so that the run has so many epochs"
    stages = [stage.model_dump() for stage in load(TOY).stages]
    return [*stages[:-1], stages[-1] | dict(last=epochs)]

def judged(cfg):
    "The true and the predicted disease of each test image, by the predicted species"
    folder = train(cfg)
    evaluate(folder, 'val')
    frame = find_system('plants').read_table(evaluate(folder, 'test')).frame
    shutil.rmtree(folder)
    return frame

def side_of(kind, world, runs, seed, epochs):
    "Accuracy and macro-F1 of species and disease together, on the test split"
    data, stages = dict(source=world/'photos.csv', taxonomy=world/'taxonomy.json', made=None), six_stages(epochs)
    if kind == 'routed':
        stages = end_to_end(epochs, dict(species=1., disease=.7))
    if kind == 'flat':
        data = dict(source=flat_table(world), taxonomy=None, made=None)
        stages = end_to_end(epochs, dict(species=0., disease=1.))
    frame = judged(load(TOY, name=kind, runs=runs, seed=seed, epochs=epochs, stages=stages, data=data,
                        tracker=dict(kind='none')))
    return np.array([accuracy_score(frame.disease, frame.cascade_found),
                     f1_score(frame.disease, frame.cascade_found, average='macro')])

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

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--seeds', type=int, nargs='+', default=[42, 43, 44])
    parser.add_argument('--epochs', type=int, default=load(TOY).epochs)
    parser.add_argument('--staged', action='store_true')
    given = parser.parse_args()
    kinds = ['routed', 'flat', 'staged'] if given.staged else ['routed', 'flat']
    with TemporaryDirectory() as home:
        made = load(TOY).data.made
        world = make_leaf_world(f'{home}/world', made.side, made.images, made.species, made.seed)
        emit_value('leaf world, species and disease together: accuracy of a linear model of colour histograms',
                   short(by_colour(world)))
        for seed in given.seeds:
            found = {kind: side_of(kind, world, Path(home)/'runs', seed, given.epochs) for kind in kinds}
            for k, name in enumerate(('accuracy', 'macro-F1')):
                staged = dict(staged=short(found['staged'][k])) if given.staged else {}
                emit_value(f'leaf world, species and disease together: {name} of routed heads / one flat head',
                           short(found['routed'][k]), short(found['flat'][k]), seed=seed, epochs=given.epochs,
                           goal='> peer', met=bool(found['routed'][k] > found['flat'][k]), **staged)

if __name__ == '__main__':
    main()
