"Scenes become maps: seams, edges, grids, what is refused, what it costs"
import hashlib, json, tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest, rasterio, torch
from hypothesis import given, settings, strategies as st
from rasterio.transform import Affine, from_origin
from scipy.special import expit, logit
from torch import nn

import rtsseg.prediction
from rtsseg.calibration import calibrate_evidence
from rtsseg.config import Calibrate, RtsConfig, ConfigError, Metrics
from rtsseg.console import DataError
from rtsseg.raster import write_raster
from rtsseg.manifest import read_manifest
from rtsseg.stats import Stats, compute_stats
from rtsseg.infer import load_model, predict_logits, save_model
from rtsseg.weights import ModelError
from rtsseg.evidence import Meter
from rtsseg.models import build
from rtsseg.prediction import NODATA, STEPS, _alone, predict, starts
from rtsseg.tiles import TileDataset
from rtsseg.toy import BANDS, scored_tiles

GRID, CRS = from_origin(-2_500_000, 700_000, 3, 3), 'EPSG:3413'
STATS = Stats(channels=['R', 'G', 'B'], dtype='uint8', scale=255., mean=[.4, .35, .3], std=[.2, .2, .2], pixels=1, manifest_hash='none')

def make_model(folder, stats=STATS, tile=64):
    "A model directory of an untrained network whose scores spread"
    torch.manual_seed(0); names = stats.channels[3:]
    cfg = RtsConfig(batch_size=8, data=dict(tile_size=tile, extra_bands=names), model=dict(architecture='unet', encoder='tu-test_efficientnet', weights=None, in_channels=3 + len(names),
                                                                                        options=dict(decoder_channels=[16, 8, 8, 8, 8])))
    model = build(cfg.model)
    with torch.no_grad(): model.segmentation_head[0].weight *= 30
    return save_model(folder, model, cfg, stats, dict(epoch=1, value=0., metrics={}), {})

@pytest.fixture(scope='module')
def model(tmp_path_factory): return make_model(tmp_path_factory.mktemp('model'))

@pytest.fixture(scope='module')
def loaded(model): return load_model(model)

@pytest.fixture
def stub(monkeypatch, loaded):
    "Puts another network in the place of the model's"
    def put(net): monkeypatch.setattr(rtsseg.prediction, 'load_model', lambda folder, device: replace(loaded, model=net.eval())); return loaded.folder
    return put

def pixels(h, w, seed=0): return np.random.default_rng(seed).integers(1, 256, (3, h, w), 'uint8')

def write(path, image, **kw): write_raster(path, image, **dict(transform=GRID, crs=CRS, nodata=0) | kw); return path

def read(path):
    with rasterio.open(path) as ds: return ds.read(1)

class Pointwise(nn.Module):
    "Every pixel by itself: what a window sees around it is all the same"
    def __init__(self): super().__init__(); self.mix = nn.Conv2d(3, 1, 1); nn.init.constant_(self.mix.weight, 1.3); nn.init.constant_(self.mix.bias, -.5)
    def forward(self, x): return self.mix(x)

def pointwise(image): return expit(1.3 * ((image / 255 - np.array(STATS.mean)[:, None, None]) / .2).sum(0) - .5)

class Whole(nn.Module):
    "One score a window, from its brightness: the hardest seams there are"
    def __init__(self): super().__init__(); self.scale = nn.Parameter(torch.tensor(400.))
    def forward(self, x): return (self.scale * x.mean((1, 2, 3), keepdim=True)).expand(-1, 1, *x.shape[2:])

# ---------------------------------------------------------------- the map is what the model says
@pytest.mark.parametrize('views', ['none', 'full'])
@pytest.mark.parametrize('names', [[], BANDS])
def test_a_scene_of_one_tile_is_what_validation_would_see(tiny_world, tmp_path, names, views):
    "Read, scaled, normalised, filled and judged as the loader's tile is, to the last bit that a map holds"
    manifest = read_manifest(tiny_world); model = make_model(tmp_path/'model', compute_stats(manifest.of('train'), names)); loaded = load_model(model)
    table = manifest.table; gaps = [i for i in range(len(table)) if (read(manifest.root/table.image[i]) == 0).any()]
    for i in [0, gaps[0]]:
        tile = TileDataset(manifest, loaded.stats, loaded.cfg)[i]
        with torch.no_grad(): p = predict_logits(loaded.model, tile['image'][None], views)[0].double().sigmoid().numpy()
        told = predict(model, manifest.root/table.image[i], tmp_path/f'{i}.tif', manifest.root/table.extra[i] if names else '', views)
        found = read(tmp_path/f'{i}.tif'); valid = found != NODATA
        with rasterio.open(manifest.root/table.image[i]) as ds: assert (valid == (ds.read() != 0).any(0)).all() and told['valid'] == valid.sum() > 0
        assert (found[valid] == np.rint(STEPS * p)[valid]).all() and np.ptp(found[valid]) > 5000

def test_scores_become_probabilities(model, tmp_path):
    "By the calibration of the views that were asked for; what the calibration promises stands in the map"
    logits, masks, table = scored_tiles(); meter = Meter(table); meter.update(torch.from_numpy(logits), torch.from_numpy(masks), torch.arange(len(table)))
    c = calibrate_evidence(meter.evidence(), Calibrate(method='slope_intercept'), Metrics(replicates=20)); folder = make_model(tmp_path/'model'); scene = write(tmp_path/'scene.tif', pixels(100, 90))
    raw = predict(folder, scene, tmp_path/'raw.tif'); assert raw['calibration'] is None
    c.save(folder/'calibration.json'); told = predict(folder, scene, tmp_path/'map.tif'); assert abs(c.intercept) > .1 and abs(c.slope - 1) > .1
    p = read(tmp_path/'raw.tif') / STEPS; want = expit(c.slope * logit(p) + c.intercept)
    assert np.abs(read(tmp_path/'map.tif') / STEPS - want).max() < 2 * max(c.slope, 1) / STEPS
    assert told['calibration'] == dict(method='slope_intercept', ratio='1:200', slope=c.slope, intercept=c.intercept, thresholds={f'1:{r}': x.threshold if x.reached else None for r, x in c.thresholds.items()})
    with pytest.raises(ValueError, match="no calibration for views 'minimal'"): predict(folder, scene, tmp_path/'m.tif', views='minimal')

def test_a_model_that_overflows_is_not_mapped(stub, tmp_path):
    net = Whole(); net.scale.data.fill_(float('nan')); write(tmp_path/'scene.tif', np.full((3, 70, 64), 102, 'uint8'))
    with pytest.raises(ModelError, match='no numbers in the window at row 0, column 0'): predict(stub(net), tmp_path/'scene.tif', tmp_path/'map.tif')
    assert not (tmp_path/'map.tif').exists()

# ---------------------------------------------------------------- seams and edges
@settings(max_examples=40, deadline=None)
@given(h=st.integers(1, 300), w=st.integers(1, 300), batch=st.integers(1, 9), hole=st.tuples(*[st.integers(0, 300)] * 4))
def test_windows_leave_no_trace(loaded, tmp_path_factory, h, w, batch, hole):
    "Any size, any hole: a model that looks at single pixels gives the same map as it does pixel by pixel, on the grid of the scene"
    d = tmp_path_factory.mktemp('s'); image = pixels(h, w); top, bottom, left, right = *sorted(hole[:2]), *sorted(hole[2:]); image[:, top:bottom, left:right] = 0
    write(d/'scene.tif', image)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(rtsseg.prediction, 'load_model', lambda folder, device: replace(loaded, model=Pointwise().eval()))
        told = predict(loaded.folder, d/'scene.tif', d/'map.tif', batch=batch)
    with rasterio.open(d/'map.tif') as ds, rasterio.open(d/'scene.tif') as scene:
        assert (ds.shape, ds.crs, ds.transform, ds.nodata, ds.dtypes, ds.scales) == (scene.shape, scene.crs, scene.transform, NODATA, ('uint16',), (1 / STEPS,))
        found = ds.read(1)
    valid = image.any(0); assert ((found != NODATA) == valid).all() and (told['pixels'], told['valid']) == (valid.size, valid.sum())
    assert np.abs(found - STEPS * pointwise(image))[valid].max(initial=0) < 1
    data = [valid[y:y + 64, x:x + 64].any() for y in starts(h, 64) for x in starts(w, 64)]; assert (told['windows'], told['empty']) == (sum(data), len(data) - sum(data))

@given(size=st.integers(1, 2000), tile=st.integers(2, 600))
def test_windows_cover_a_side_and_stay_inside(size, tile):
    "At least half of every window lies on its neighbour, and none but the only one reaches over the edge"
    at = starts(size, tile); assert at[0] == 0 and at[-1] == max(size - tile, 0) and (np.diff(at) > 0).all() and np.diff(at).max(initial=0) <= tile / 2

def test_no_seam_is_steeper_than_the_fading(stub, tmp_path):
    "Windows that disagree as much as can be: from a pixel to the next the map moves by no more than sin(π / tile), the steepest that a squared sine has"
    image = np.random.default_rng(0).integers(1, 256, (3, 9, 9), 'uint8').repeat(32, 1).repeat(32, 2); write(tmp_path/'scene.tif', image)
    predict(stub(Whole()), tmp_path/'scene.tif', tmp_path/'map.tif'); p = read(tmp_path/'map.tif') / STEPS
    assert np.ptp(p) > .9                                                       # they do disagree
    for axis in (0, 1): assert np.abs(np.diff(p, axis=axis)).max() <= np.sin(np.pi / 64) + 1.5 / STEPS

def test_a_turned_scene_gives_a_turned_map(model, tmp_path):
    "With all eight views, and windows that lie alike from every side"
    image = pixels(96, 96); maps = []
    for k in range(4): write(tmp_path/f'{k}.tif', np.ascontiguousarray(np.rot90(image, k, (1, 2)))); predict(model, tmp_path/f'{k}.tif', tmp_path/f'm{k}.tif', views='full'); maps.append(read(tmp_path/f'm{k}.tif').astype(int))
    assert np.ptp(maps[0]) > 5000
    for k in range(1, 4): assert np.abs(np.rot90(maps[0], k) - maps[k]).max() <= 1

# ---------------------------------------------------------------- the file
def test_the_map_is_cloud_optimized_and_its_overviews_are_means(stub, tmp_path):
    "of the pixels that hold data"
    image = pixels(600, 1100); image[:, :101, :301] = 0; write(tmp_path/'scene.tif', image); predict(stub(Pointwise()), tmp_path/'scene.tif', tmp_path/'map.tif')
    with rasterio.open(tmp_path/'map.tif') as ds:
        assert ds.tags(ns='IMAGE_STRUCTURE')['LAYOUT'] == 'COG' and ds.block_shapes == [(512, 512)] and ds.overviews(1) == [2, 4] and ds.descriptions == ('probability',)
        whole = ds.read(1, masked=True).astype(float)
    with rasterio.open(tmp_path/'map.tif', overview_level=0) as ds: half = ds.read(1, masked=True)
    means = whole.reshape(300, 2, 550, 2).mean((1, 3))
    assert (half.mask == means.mask).all() and np.abs(half - means).max() <= .5 and half.mask.sum() == 50 * 150

def test_the_same_model_and_scene_give_the_same_bytes(model, tmp_path):
    "Wherever they lie; and the map and the file beside it tell the same, and no place"
    for name in ('a', 'b/c'):
        (tmp_path/name).mkdir(parents=True); write(tmp_path/name/f'{name[-1]}_scene.tif', pixels(90, 150)); make_model(tmp_path/name/'model')
        predict(tmp_path/name/'model', tmp_path/name/f'{name[-1]}_scene.tif', tmp_path/name/'map.tif')
    files = [(tmp_path/n/'map.tif').read_bytes() for n in ('a', 'b/c')]; assert files[0] == files[1]
    with rasterio.open(tmp_path/'a/map.tif') as ds: tags = ds.tags()
    assert json.loads(tags['RTSSEG']) | dict(sha256=hashlib.sha256((tmp_path/'a/map.tif').read_bytes()).hexdigest()) == json.loads((tmp_path/'a/map.tif.json').read_text()) and set(tags) == {'RTSSEG', 'AREA_OR_POINT'}
    for trace in (str(tmp_path), 'scene.tif', '.parts'): assert trace.encode() not in files[0]
    assert sorted(f.name for f in (tmp_path/'a').iterdir()) == ['a_scene.tif', 'map.tif', 'map.tif.json', 'model']

def test_memory_grows_with_the_width_of_a_scene_and_not_with_its_height(stub, tmp_path):
    peaks = []
    for h in (256, 2048):
        write(tmp_path/f'{h}.tif', pixels(h, 100)); tracemalloc.start()
        predict(stub(Pointwise()), tmp_path/f'{h}.tif', tmp_path/f'm{h}.tif')
        peaks.append(tracemalloc.get_traced_memory()[1]); tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]

# ---------------------------------------------------------------- what is refused
def rotated(d): write(d/'scene.tif', pixels(64, 64), transform=GRID @ Affine.rotation(3))
def four(d): write(d/'scene.tif', np.ones((4, 64, 64), 'uint8'))
def sixteen(d): write(d/'scene.tif', pixels(64, 64).astype('uint16'))
def nowhere(d): write(d/'scene.tif', pixels(64, 64), crs=None)
def vrt(d): (d/'scene.tif').write_text('<VRTDataset rasterXSize="64" rasterYSize="64"><VRTRasterBand dataType="Byte" band="1"/></VRTDataset>')
def missing(d): pass
def wide(d):
    with rasterio.open(d/'scene.tif', 'w', driver='GTiff', width=3_000_000, height=64, count=3, dtype='uint8', crs=CRS, transform=GRID, sparse_ok=True, tiled=True): pass
def one_block(d):
    with rasterio.open(d/'scene.tif', 'w', driver='GTiff', width=20_000, height=20_000, count=3, dtype='uint8', crs=CRS, transform=GRID, sparse_ok=True, tiled=True, blockxsize=20_480, blockysize=20_480): pass
def specks(d):
    with rasterio.open(d/'scene.tif', 'w', driver='GTiff', width=300_000, height=64, count=3, dtype='uint8', crs=CRS, transform=GRID, sparse_ok=True, tiled=True, blockxsize=16, blockysize=16): pass
def good(d): write(d/'scene.tif', pixels(64, 64))

@pytest.mark.parametrize('scene, more, error, text', [
    (rotated, {}, DataError, 'rotated grid'), (four, {}, DataError, 'has 3 bands, this one has 4'), (sixteen, {}, DataError, 'is uint16, but the model was trained on uint8'),
    (nowhere, {}, DataError, 'names no CRS: say --crs'), (vrt, {}, DataError, 'is not a GeoTIFF'), (missing, {}, DataError, 'no such file'),
    (wide, {}, DataError, 'claims 3000000 × 64 .*64 rows of it are more than'), (one_block, {}, DataError, 'blocks of 20480 × 20480 pixels in 3 bands: more than'), (specks, {}, DataError, 'claims 75000 blocks in 64 rows: more than'),
    (good, dict(crs='EPSG:3413'), ConfigError, 'names its CRS, EPSG:3413: leave --crs out'), (nowhere, dict(crs='EPSG:nonsense'), DataError, 'not a coordinate reference system'),
    (good, dict(extra='extra.tif'), ConfigError, 'the model sees RGB only'), (good, dict(views='ful'), ConfigError, "'ful' is none of .*did you mean 'full'"),
    (good, dict(device='tpu', batch=0), ConfigError, "device: 'tpu' .*\nbatch: 0")], ids=lambda v: getattr(v, '__name__', None))
def test_what_cannot_be_meant_is_refused(model, tmp_path, scene, more, error, text):
    "before anything is written"
    scene(tmp_path); before = set(tmp_path.iterdir())
    with pytest.raises(error, match=text): predict(model, tmp_path/'scene.tif', tmp_path/'map.tif', **more)
    assert set(tmp_path.iterdir()) == before

@pytest.mark.parametrize('change, text', [(None, 'extra: the model sees ndvi, relative_elevation too'), (dict(names=['ndvi', 'slope']), "'relative_elevation'"), (dict(transform=GRID @ Affine.translation(1, 0)), 'shifted against its image'),
                                          (dict(crs='EPSG:32608'), 'another CRS')])
def test_extra_bands_are_found_by_name_and_lie_on_the_same_grid(tmp_path, change, text):
    stats = Stats(channels=['R', 'G', 'B', *BANDS], dtype='uint8', scale=255., mean=[.4, .4, .4, 0., 0.], std=[.2, .2, .2, 1., 1.], pixels=1, manifest_hash='none')
    folder = make_model(tmp_path/'model', stats); write(tmp_path/'scene.tif', pixels(70, 70)); extra = np.random.default_rng(0).normal(size=(2, 70, 70)).astype('float32')
    if change is not None: write_raster(tmp_path/'extra.tif', extra, **dict(transform=GRID, crs=CRS, names=BANDS) | change)
    with pytest.raises((DataError, ConfigError), match=text): predict(folder, tmp_path/'scene.tif', tmp_path/'map.tif', tmp_path/'extra.tif' if change is not None else '')
    extra[0, 60:, :5] = np.nan; write_raster(tmp_path/'extra.tif', extra[::-1], GRID, CRS, names=BANDS[::-1], nodata=np.nan)      # in another order: names decide
    predict(folder, tmp_path/'scene.tif', tmp_path/'a.tif', tmp_path/'extra.tif'); a = read(tmp_path/'a.tif')
    write_raster(tmp_path/'extra.tif', extra, GRID, CRS, names=BANDS, nodata=np.nan); predict(folder, tmp_path/'scene.tif', tmp_path/'b.tif', tmp_path/'extra.tif')
    assert (a == read(tmp_path/'b.tif')).all() and ((a == NODATA) == np.isnan(extra[0])).all()

def test_a_scene_without_a_grid_makes_a_map_without(model, tmp_path):
    write(tmp_path/'scene.tif', pixels(64, 64), crs=None, transform=None)
    predict(model, tmp_path/'scene.tif', tmp_path/'none.tif', crs='none'); predict(model, tmp_path/'scene.tif', tmp_path/'said.tif', crs=CRS)
    with rasterio.open(tmp_path/'none.tif') as a, rasterio.open(tmp_path/'said.tif') as b: assert a.crs is None and b.crs == CRS and (a.read() == b.read()).all()

def test_a_map_is_made_by_one_process_at_a_time(model, tmp_path):
    good(tmp_path)
    with _alone(tmp_path/'map.tif.parts'), pytest.raises(DataError, match='another process makes this map'): predict(model, tmp_path/'scene.tif', tmp_path/'map.tif')
