"""PR-AUC of 400 tiles of 512² (105 million pixels, one in a thousand positive) beside scikit-learn's and torchmetrics' exact ones and beside one read pass
over the scores; what a further ratio or region costs; what tiles weigh on disk.

python benchmarks/pixels.py [tiles]     one thread; scikit-learn and torchmetrics run once each, in processes of their own, and want up to 8 GB
"""
import multiprocessing, resource, sys, tempfile
from pathlib import Path

import numpy as np, pyarrow.parquet as pq, torch
from scipy import ndimage
from sklearn.metrics import average_precision_score
from torchmetrics.functional.classification import binary_average_precision

from common import emit, timed, turns
from rtsseg.evidence import Evidence, tile_evidence, tile_histograms
from rtsseg.metrics import average_precision, histogram, tile_weights

RATIOS, THRESHOLDS = (200, 500, 1000), np.arange(1, 20)/20

def split(n, rng):
    "Half-precision logits, masks and identities; every twentieth tile has a fiftieth of its pixels positive"
    logits, masks = np.empty((n, 512, 512), np.float16), np.zeros((n, 512, 512), np.uint8)
    for i in range(n):
        if i % 20 == 0: masks[i, 100:173, 200:273] = 1
        logits[i] = rng.standard_normal((512, 512), dtype=np.float32)*1.5 - 5 + 4*masks[i]
    return logits, masks, [dict(tile_id=f't{i:05}', split='val', region='ABCD'[i//20 % 4], block='', positive=i % 20 == 0, pixel_size=3.) for i in range(n)]

def speckled(rng):
    "A tile of a badly trained model: some 2,500 objects at 19 thresholds"
    field = lambda k: ndimage.zoom(rng.normal(size=(512//k, 512//k)), k, order=1)
    return tile_evidence((1.5*field(8) + field(2) - 5).astype(np.float16), np.zeros((512, 512), np.uint8), THRESHOLDS)

def alone(f):
    "What a call in a process of its own gives: its value, seconds, and how much memory it took on top of its input, GB"
    def child(pipe):
        value, peak = [], lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e6
        before, seconds = peak(), timed(lambda: value.append(f()))
        pipe.send((value[0], seconds, peak() - before))
    here, there = multiprocessing.Pipe()
    p = multiprocessing.get_context('fork').Process(target=child, args=(there,)); p.start(); there.close()
    found = here.recv(); p.join()
    return found

def main(n=400):
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    logits, masks, who = split(n, rng)
    none = tile_evidence(np.zeros((1, 1), np.float16), np.zeros((1, 1), np.uint8), ())
    see = lambda logits, n=n: Evidence.from_rows((i | none | tile_histograms(*t) for i, *t in zip(who[:n], logits, masks)), thresholds=())
    ap = lambda evidence, ratio: float(average_precision(histogram(evidence, ratio)))
    def three(logits):
        e = see(logits)
        return [ap(e, r) for r in RATIOS]
    size = dict(pixels=logits.size, positive=round(float(masks.mean()), 5))

    ours, read = turns(lambda: three(logits), lambda: logits.view(np.uint16).sum(), 7)
    emit('three ratios, half precision, beside one sum over the 16-bit patterns', ours, read, goal=5, **size)
    single = logits[:n//4].astype(np.float32) + np.float32(1e-3)
    emit('the same, single precision, beside NumPy rounding it to half', *turns(lambda: three(single), lambda: single.astype(np.float16), 7), pixels=single.size)

    peers = {'scikit-learn': (100, 'native', lambda: average_precision_score(masks.ravel(), logits.ravel().astype(np.float32))),
             'scikit-learn, reweighted': (100, 200, lambda: average_precision_score(masks.ravel(), logits.ravel().astype(np.float32), sample_weight=tile_weights(evidence, 200).repeat(512*512))),
             'torchmetrics, exact': (50, 'native', lambda: float(binary_average_precision(torch.from_numpy(logits.ravel()).float(), torch.from_numpy(masks.ravel()).long())))}
    (evidence, _, memory), (_, _, quarter) = (alone(lambda: see(logits, k)) for k in (n, n//4))
    for name, (times, ratio, f) in peers.items():
        value, seconds, gb = alone(f)
        emit(f'three ratios, half precision, beside one of {name}', ours, [seconds]*len(ours), goal=1/times, pr_auc=ap(evidence, ratio), theirs=value, gb=round(memory, 3), gb_of_a_quarter=round(quarter, 3), theirs_gb=round(gb, 2))

    again, region = evidence.select(np.arange(len(evidence))), evidence['region'] == 'A'
    ap(again, 'native')                                                     # its pool
    for what, f in {'a further ratio': lambda: ap(again, 300), 'a region, selected': lambda: ap(evidence.select(region), 200), 'a region, by weights': lambda: ap(evidence, region*tile_weights(evidence, 200))}.items():
        emit(f'{what}, beside seeing all pixels again', *turns(f, lambda: see(logits), 7), limit_ms=10)

    for kind, rows in dict(pixels=[i | none | tile_histograms(*t) for i, *t in zip(who, logits, masks)], speckled=[i | speckled(rng) for i in who]).items():
        e = Evidence.from_rows(rows, thresholds=THRESHOLDS)
        with tempfile.TemporaryDirectory() as folder:
            a, b = Path(folder)/'a', Path(folder)/'b'
            emit(f'writing, {kind}, beside pyarrow with its defaults', *turns(lambda: e.write(a), lambda: pq.write_table(e.table, b), 7), objects=len(e.nested('predicted'))//len(e),
                 **{k: round(p.stat().st_size/len(e)*20_000/1e6) for k, p in dict(mb_of_20000=a, theirs_mb=b).items()})
            emit(f'reading, {kind}, beside the same', *turns(lambda: Evidence.read(a), lambda: pq.read_table(b), 7))

if __name__ == '__main__': main(*map(int, sys.argv[1:]))
