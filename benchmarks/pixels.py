"""PR-AUC of 400 tiles of 512² (105 million pixels, one in a thousand positive), and what evidence weighs on disk

python benchmarks/pixels.py [tiles]     one thread, up to 8 GB

Peers: the exact PR-AUC of scikit-learn and of torchmetrics, each run once in its own process; and one read pass over
the scores. Further: what another ratio or region costs once evidence exists, and Parquet at its defaults.
"""
import multiprocessing
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from scipy import ndimage
from sklearn.metrics import average_precision_score
from torchmetrics.functional.classification import binary_average_precision

from common import emit, emit_value, short, timed, turns
from rtsseg.evidence import Evidence, tile_evidence
from rtsseg.metrics import average_precision, histogram, tile_weights
from rtsseg.scores import tile_histograms

RATIOS = (200, 500, 1000)
THRESHOLDS = np.arange(1, 20)/20
NO_OBJECTS = tile_evidence(np.zeros((1, 1), np.float16), np.zeros((1, 1), np.uint8), ())

class Split:
    "Half-precision logits, masks and identities; every twentieth tile has a fiftieth of its pixels positive"
    def __init__(self, tiles, rng):
        self.logits = np.empty((tiles, 512, 512), np.float16)
        self.masks = np.zeros((tiles, 512, 512), np.uint8)
        self.rows = []
        for i in range(tiles):
            positive = i % 20 == 0
            if positive:
                self.masks[i, 100:173, 200:273] = 1
            noise = rng.standard_normal((512, 512), dtype=np.float32)
            self.logits[i] = noise*1.5 - 5 + 4*self.masks[i]
            row = {'tile_id': f't{i:05}', 'split': 'val', 'region': 'ABCD'[i//20 % 4], 'block': ''}
            self.rows.append({**row, 'positive': positive, 'pixel_size': 3.})

    def pixel_rows(self, logits):
        "Rows of evidence without objects"
        for row, scores, mask in zip(self.rows, logits, self.masks, strict=False):
            yield row | NO_OBJECTS | tile_histograms(scores, mask)

    def evidence(self, logits):
        return Evidence.from_rows(self.pixel_rows(logits), thresholds=())

    def flat(self):
        "Truth and single-precision scores of all pixels"
        return self.masks.ravel(), self.logits.ravel().astype(np.float32)

def speckled(rng):
    "Evidence of a tile of a badly trained model: some 2,500 objects at 19 thresholds"
    def field(scale):
        return ndimage.zoom(rng.normal(size=(512//scale, 512//scale)), scale, order=1)

    logits = (1.5*field(8) + field(2) - 5).astype(np.float16)
    return tile_evidence(logits, np.zeros((512, 512), np.uint8), THRESHOLDS)

def pr_auc(evidence, ratio):
    return float(average_precision(histogram(evidence, ratio)))

def alone(function):
    "Value and seconds of a call in a process of its own, and how much memory it took beyond its input, GB"
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e6

    def child(pipe):
        before, values = peak(), []
        seconds = timed(lambda: values.append(function()))
        pipe.send((values[0], seconds, peak() - before))

    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context('fork').Process(target=child, args=(there,))
    process.start()
    there.close()
    found = here.recv()
    process.join()
    return found

def beside_reading(split):
    "PR-AUC at three ratios beside one pass over the scores; the seconds of ours"
    def ours(logits=split.logits):
        evidence = split.evidence(logits)
        return [pr_auc(evidence, ratio) for ratio in RATIOS]

    times, read = turns(ours, lambda: split.logits.view(np.uint16).sum(), 7)
    size = {'pixels': split.logits.size, 'positive': round(float(split.masks.mean()), 5)}
    emit('PR-AUC at three ratios, half precision, beside one sum over the bits', times, read, goal=5, **size)
    single = split.logits[:len(split.rows)//4].astype(np.float32) + np.float32(1e-3)
    seconds = turns(lambda: ours(single), lambda: single.astype(np.float16), 7)
    emit('the same, single precision, beside rounding it to half', *seconds, pixels=single.size)
    return times

def beside_libraries(split, times):
    "The same beside the exact values of other libraries; the evidence"
    logits, quarter = split.logits, split.logits[:len(split.rows)//4]
    evidence, _, memory = alone(lambda: split.evidence(logits))
    _, _, memory_of_quarter = alone(lambda: split.evidence(quarter))

    def scikit_learn(weights=None):
        return average_precision_score(*split.flat(), sample_weight=weights)

    def weighted():
        return scikit_learn(tile_weights(evidence, 200).repeat(512*512))

    def torchmetrics():
        truth, scores = split.flat()
        return float(binary_average_precision(torch.from_numpy(scores), torch.from_numpy(truth).long()))

    peers = [('scikit-learn', 'native', scikit_learn, 100), ('scikit-learn, weighted', 200, weighted, 100),
             ('torchmetrics, exact', 'native', torchmetrics, 50)]
    for name, ratio, peer, faster in peers:
        value, seconds, peer_memory = alone(peer)
        emit(f'PR-AUC at three ratios, beside one of {name}', times, [seconds]*len(times), goal=1/faster,
             pr_auc=pr_auc(evidence, ratio), peer_pr_auc=value, gb=round(memory, 3),
             gb_of_a_quarter=round(memory_of_quarter, 3), peer_gb=round(peer_memory, 2))
    return evidence

def further_questions(split, evidence):
    "What another ratio or region costs"
    again = evidence.select(np.arange(len(evidence)))
    region = evidence['region'] == 'A'
    # fill the cache
    pr_auc(again, 'native')
    questions = {
        'a further ratio': lambda: pr_auc(again, 300),
        'a region, selected': lambda: pr_auc(evidence.select(region), 200),
        'a region, by weights': lambda: pr_auc(evidence, region*tile_weights(evidence, 200)),
    }
    for what, question in questions.items():
        times = turns(question, lambda: split.evidence(split.logits), 7)
        emit(f'{what}, beside seeing all pixels again', *times, limit_ms=10)

def on_disk(rows, kind):
    "Writing, reading and size, beside pyarrow with its defaults"
    evidence = Evidence.from_rows(rows, thresholds=THRESHOLDS)
    with tempfile.TemporaryDirectory() as folder:
        ours, peer, table = Path(folder)/'ours', Path(folder)/'peer', evidence.table
        written = turns(lambda: evidence.write(ours), lambda: pq.write_table(table, peer), 7)
        emit(f'writing evidence, {kind}, beside Parquet at its defaults', *written)
        sizes = [round(path.stat().st_size/len(evidence)*20_000/1e6) for path in (ours, peer)]
        objects = len(evidence.nested('predicted'))//len(evidence)
        emit_value(f'size of 20,000 tiles, {kind}, beside Parquet at its defaults', *sizes, 'MB',
                   ratio=short(sizes[0]/sizes[1]), goal='< 200 MB', met=sizes[0] < 200,
                   scaled_from_tiles=len(evidence), objects_of_a_tile=objects)
        emit(f'reading evidence, {kind}, beside the same',
             *turns(lambda: Evidence.read(ours), lambda: pq.read_table(peer), 7))

def main(tiles=400):
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    split = Split(tiles, rng)
    times = beside_reading(split)
    evidence = beside_libraries(split, times)
    further_questions(split, evidence)
    on_disk(list(split.pixel_rows(split.logits)), 'pixels')
    on_disk([row | speckled(rng) for row in split.rows], 'speckled')

if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
