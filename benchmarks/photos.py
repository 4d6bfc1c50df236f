"""Photographs of plants: from JPEG to an augmented tensor of 224², and what mixing adds to a training step

    python benchmarks/photos.py [rounds]

CPU time of one thread; a round is 24 photographs of each side, every one drawn afresh. Both sides read JPEGs of 500 or
1000 pixels from disk and end with a normalised float32 tensor: guide 001, tiers 1 and 2. The peer is the guide's code
written plainly: OpenCV decodes the whole file, then the Compose of the guide with albumentations' present names. Mixing
is timed beside a step (forward, backward, update) of the same images, on a GPU where there is one.
"""
import os
import sys
import time
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')
import albumentations as A
import cv2
import numpy as np
import timm
import torch
from albumentations.pytorch import ToTensorV2

from common import emit, emit_value, per_item, timed, turns
from rtsseg.leaf_world import LEAVES, LOOKS, draw_leaf_photo
from rtsseg.mixing import Mixing, draw_mix, mix_images
from rtsseg.photo_feed import PhotoAugment, PhotoData, PhotoDataset
from rtsseg.photos import PhotoTable

PHOTOS = 24

def guide_compose():
    "The lines of the guide's code, and the exposure of its table"
    degraded = [A.GaussianBlur(blur_limit=(3, 7), p=1.),
                A.GaussNoise(std_range=(10**.5/255, 50**.5/255), p=1.),
                A.ISONoise(color_shift=(.01, .05), intensity=(.1, .3), p=1.)]
    return A.Compose([
        A.RandomResizedCrop(size=(224, 224), scale=(.6, 1.), ratio=(.75, 1.33)),
        A.HorizontalFlip(p=.5),
        A.Rotate(limit=45, p=.5),
        A.ColorJitter(brightness=.3, contrast=.3, saturation=.3, hue=.1, p=.8),
        A.RandomBrightnessContrast(brightness_limit=.2, contrast_limit=.2, p=.5),
        A.OneOf(degraded, p=.3),
        A.ImageCompression(quality_range=(60, 95), p=.2),
        A.RandomShadow(shadow_roi=(0, .5, .5, 1), num_shadows_limit=(1, 2), p=.15),
        A.ToGray(p=.05),
        A.Normalize(mean=(.485, .456, .406), std=(.229, .224, .225)),
        ToTensorV2(),
    ], seed=42)

def write_photos(root, side):
    "JPEGs of both splits in folders"
    for number, (species, look) in enumerate(zip(list(LEAVES)*4, LOOKS*4)):
        for split in ('train', 'val'):
            rngs = (np.random.default_rng((number, last)) for last in (0, 1))
            path = root/split/species/'any'/f'{split}{number}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            photo = draw_leaf_photo(species, look, side, *rngs)
            cv2.imwrite(str(path), photo[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
    return PhotoTable.read(root).of('train')

class Case:
    "Both sides, on photographs of one size"
    def __init__(self, photos):
        self.dataset = PhotoDataset(photos, PhotoData(), PhotoAugment())
        self.paths = [str(photos.root/path) for path in photos.table.path]
        self.compose, self.numbers = guide_compose(), count()

    def ours(self):
        number = next(self.numbers)
        for row in range(PHOTOS):
            out = self.dataset[(42, 1, row, number)]['image']
        assert out.dtype == torch.float32 and out.shape == (3, 224, 224)

    def peer(self):
        for path in self.paths[:PHOTOS]:
            image = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)
            out = self.compose(image=image)['image']
        assert out.dtype == torch.float32 and out.shape == (3, 224, 224)

def compare_photos(rounds):
    for side in (500, 1000):
        with TemporaryDirectory() as folder:
            case = Case(write_photos(Path(folder), side))
            ours, peer = per_item(turns(case.ours, case.peer, rounds, clock=time.process_time), PHOTOS)
        rates = [round(1/np.median(seconds)) for seconds in (ours, peer)]
        emit(f'augmented photographs of {side}² as JPEG', ours, peer, goal=1/1.5, photographs_a_second=rates, threads=1)

class Step:
    "A training step and its mixing"
    def __init__(self, name, batch, device):
        torch.manual_seed(0)
        self.model = timm.create_model(name, num_classes=320).to(device)
        self.images, self.device = torch.randn(batch, 3, 224, 224, device=device), device
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.mixes = [draw_mix(Mixing(mixup=dict(p=.5), cutmix=dict(p=.5)), (42, 1, k, 0), batch, (224, 224), None)
                      for k in range(20)]

    def synchronise(self):
        if self.device == 'cuda':
            torch.cuda.synchronize()

    def train(self):
        self.model(self.images).logsumexp(1).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.synchronise()

    def mix(self):
        for mix in self.mixes:
            mix_images(self.images, mix)
        self.synchronise()

def compare_mixing(rounds):
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    for name, batch in (('resnet50', 16), ('swin_tiny_patch4_window7_224', 16)):
        step = Step(name, 256 if device == 'cuda' else batch, device)
        step.train()
        step.mix()
        steps = [timed(step.train) for _ in range(rounds)]
        # half of the batches are mixed
        mixes = [timed(step.mix) / len(step.mixes) / 2 for _ in range(rounds)]
        share = float(np.median(mixes) / np.median(steps))
        emit_value(f'mixing, share of a step of {name}', float(f'{100 * share:.2g}'), None, '%', goal='≤ 1%',
                   met=share <= .01, batch=len(step.images), device=device)

def main(rounds=30):
    compare_photos(rounds)
    compare_mixing(5)

if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
