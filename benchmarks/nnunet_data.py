"""The sets of quality.py in nnU-Net's own layout: a float32 TIFF a band, label 2 for what is ignored"""
import json

import numpy as np
from skimage import io

from quality_data import SETS, band_statistics, pixels, prepared, rows_of

def write_tiff(path, plane):
    io.imsave(path, plane, check_contrast=False)

def write_planes(folder, name, planes, means):
    "Write each band of an image; nodata becomes the mean of its band"
    for band, plane in enumerate(np.where(np.isnan(planes), means, planes).astype(np.float32)):
        write_tiff(folder/f'{name}_{band:04}.tif', plane)

def write_case(folder, name, planes, label, means):
    "Write an image that nnU-Net may train on"
    write_planes(folder/'imagesTr', name, planes, means)
    write_tiff(folder/'labelsTr'/f'{name}.tif', np.where(label == 255, 2, label).astype(np.uint8))

def write_description(folder, bands, split):
    "Write dataset.json, and the cases of each split"
    channels = dict(enumerate(['R', 'G', 'B', *bands]))
    labels = dict(background=0, object=1, ignore=2)
    dataset = dict(channel_names=channels, labels=labels, numTraining=sum(map(len, split.values())),
                   file_ending='.tif')
    (folder/'split.json').write_text(json.dumps(split))
    (folder/'dataset.json').write_text(json.dumps(dataset))

def convert(name, folder):
    "Write a set as a dataset of nnU-Net; dataset.json comes last"
    manifest, bands = prepared(name), SETS[name].bands
    for part in ('imagesTr', 'labelsTr', 'imagesTs'):
        (folder/part).mkdir(parents=True, exist_ok=True)
    images = {part: {row['tile_id']: pixels(manifest, row, bands) for row in rows_of(manifest, part)}
              for part in ('train', 'val', 'test')}
    means, _ = band_statistics([planes for planes, _ in images['train'].values()])
    for part in ('train', 'val'):
        for tile, (planes, label) in images[part].items():
            write_case(folder, tile, planes, label, means)
    for tile, (planes, _) in images['test'].items():
        write_planes(folder/'imagesTs', tile, planes, means)
    write_description(folder, bands, {part: list(images[part]) for part in ('train', 'val')})
