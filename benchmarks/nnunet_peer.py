"""A cell of quality.py: nnU-Net v2, run by a Python that has it (see README.md)

    python benchmarks/nnunet_peer.py prepare DATA                    plan and preprocess
    python benchmarks/nnunet_peer.py train DATA MINUTES SEED FOLDER  train and predict

Its planner, its 2-D network, its augmentation and its trainer, with one change: training takes a number of minutes. Its
rate falls to zero in that time, by its own formula, at each step in place of each 250th. It does not validate on
the way: nnU-Net predicts with its last checkpoint, so validation would decide nothing.
"""
import json
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

DATASET = 'Dataset001_quality'
PROCESSES = 2

def name_folders(data, results, workers):
    "Tell nnU-Net where its folders are, and how many processes augment"
    os.environ |= dict(nnUNet_raw=str(data/'raw'), nnUNet_preprocessed=str(data/'preprocessed'),
                       nnUNet_results=str(results), nnUNet_n_proc_DA=str(workers))

def read_json(path):
    return json.loads(path.read_text())

def prepare(data):
    data = Path(data)
    # the planner takes this for its threads, of which there must be one
    name_folders(data, data/'results', 1)
    extract_fingerprints([1], num_processes=PROCESSES)
    plan_experiments([1])
    preprocess([1], configurations=('2d',), num_processes=(PROCESSES,))

class TimedTrainer(nnUNetTrainer):
    "Trains for a number of seconds"
    seconds, steps = 0., 0

    def do_split(self):
        split = read_json(Path(os.environ['nnUNet_raw'])/DATASET/'split.json')
        return split['train'], split['val']

    def run_training(self):
        self.on_train_start()
        self.network.train()
        start = time.monotonic()
        while (share := (time.monotonic() - start)/self.seconds) < 1:
            self.lr_scheduler.step(share*self.num_epochs)
            self.train_step(next(self.dataloader_train))
            self.steps += 1
        return time.monotonic() - start

def trainer_of(data):
    "A trainer as nnUNetv2_train makes it"
    folder = data/'preprocessed'/DATASET
    plans = read_json(folder/'nnUNetPlans.json') | {'continue_training': False}
    return TimedTrainer(plans, '2d', 0, read_json(folder/'dataset.json'), torch.device('cpu'))

def predictor_of(trainer):
    "A predictor with the trained weights, at the settings of nnUNetv2_predict"
    trainer.set_deep_supervision_enabled(False)
    predictor = nnUNetPredictor(device=torch.device('cpu'), allow_tqdm=False)
    predictor.manual_initialization(trainer.network.eval(), trainer.plans_manager, trainer.configuration_manager,
                                    [trainer.network.state_dict()], trainer.dataset_json, 'TimedTrainer',
                                    trainer.inference_allowed_mirroring_axes)
    return predictor

def predict(trainer, images, out):
    "Keep the probabilities of all test images"
    predictor, reader = predictor_of(trainer), trainer.plans_manager.image_reader_writer_class()
    (out/'scores').mkdir()
    for first in sorted(images.glob('*_0000.tif')):
        tile = first.name.removesuffix('_0000.tif')
        planes, properties = reader.read_images(sorted(map(str, images.glob(f'{tile}_[0-9][0-9][0-9][0-9].tif'))))
        _, probability = predictor.predict_single_npy_array(planes, properties, save_or_return_probabilities=True)
        np.save(out/'scores'/f'{tile}.npy', probability[1, 0])

def train(data, minutes, seed, out):
    data, out, seed = Path(data), Path(out), int(seed)
    name_folders(data, out/'results', 0)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    trainer = trainer_of(data)
    trainer.seconds = 60*float(minutes)
    trainer.initialize()
    seconds = trainer.run_training()
    predict(trainer, data/'raw'/DATASET/'imagesTs', out)
    planned = trainer.configuration_manager
    facts = dict(seconds=round(seconds, 1), steps=trainer.steps, batch=planned.batch_size, patch=planned.patch_size)
    (out/'facts.json').write_text(json.dumps(facts))

if __name__ == '__main__':
    {'prepare': prepare, 'train': train}[sys.argv[1]](*sys.argv[2:])
