"The field's own folders: PLANET-RGB, EXTRA, labels, metadata.csv and splits.yaml, as they are"
import shutil

import numpy as np
import pandas as pd
import pytest
import rasterio

from helpers.runs import MODEL
from rtsseg.config import FieldSource, RtsConfig, find_system, load
from rtsseg.console import DataError
from rtsseg.importers import import_field
from rtsseg.prepare import find_manifest
from rtsseg.raster import write_raster
from rtsseg.rawtile import example_tiles
from rtsseg.tiles import read_tile
from rtsseg.training import train

@pytest.fixture
def folder(tmp_path):
    "The example tiles under the names of that layout"
    home = tmp_path/'field'
    raw = example_tiles(home)
    for ours, theirs in (('images', 'PLANET-RGB'), ('extra', 'EXTRA'), ('masks', 'labels')):
        shutil.move(home/ours, home/theirs)
    claims = np.where(raw['mask'] == '', 'negative', 'positive')
    table = pd.DataFrame({'Tile_id': raw.tile_id, 'TrainClass': claims, 'RegionName': raw.region, 'UIDs': ''})
    table.to_csv(home/'metadata.csv', index=False)
    (home/'splits.yaml').write_text('train: [Banks]\nval: [Taymyr]\n')
    return home

def set_metadata(folder, **cells):
    "Change cells of metadata.csv: column={tile_id: value}"
    table = pd.read_csv(folder/'metadata.csv', dtype=str, keep_default_na=False).set_index('Tile_id', drop=False)
    for column, values in cells.items():
        for tile_id, value in values.items():
            table.loc[tile_id, column] = value
    table.to_csv(folder/'metadata.csv', index=False)

# ---------------------------------------------------------------- TrainClass
def test_a_negative_tile_with_a_slump_is_named(folder):
    "All wrong tiles in one error, those without a slump in a positive tile too"
    slumps = sorted(file.stem for file in (folder/'labels').iterdir())
    set_metadata(folder, TrainClass={name: 'Negative' for name in slumps[:2]})
    with pytest.raises(DataError) as error:
        import_field(FieldSource(path=folder), folder/'manifest.csv', block_size=400)
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    for name, line in zip(slumps, lines):
        assert f'{name!r}, TrainClass: negative, but its label holds slump pixels' in line
    assert not (folder/'manifest.csv').exists()

# ---------------------------------------------------------------- EXTRA bands by index
def without_descriptions(folder):
    "The EXTRA rasters with their two bands exchanged and no word on what they are; what they held: {tile_id: planes}"
    held = {}
    for file in (folder/'EXTRA').iterdir():
        with rasterio.open(file) as ds:
            held[file.stem], place, crs = ds.read(), ds.transform, ds.crs
        write_raster(file, held[file.stem][::-1], place, crs)
    return held

def field_config(folder, registry=None, manifest=None):
    "A config of RGB and one EXTRA band"
    source = dict(kind='field', path=folder, registry=registry)
    data = dict(source=source, manifest=manifest or folder/'manifest.csv', tile_size=64, block_size=400,
                split_check='warn', extra_bands=['ndvi'])
    return RtsConfig(data=data, runs=folder.parent/'runs', model=MODEL | dict(in_channels=4), batch_size=4,
                     epochs=1, loader=dict(num_workers=0), device='cpu', tracker=dict(kind='none'))

def test_bands_are_found_by_a_registry(folder, tmp_path):
    held = without_descriptions(folder)
    plain = import_field(FieldSource(path=folder), folder/'plain.csv', block_size=400)
    with pytest.raises(DataError, match=r"no band is described as 'ndvi'"):
        read_tile(plain, 0, ['ndvi'])
    (tmp_path/'bands.yaml').write_text('relief: 1\nndvi: 2\n')
    cfg = field_config(folder, registry=tmp_path/'bands.yaml')
    manifest = find_manifest(cfg)
    # which band is which is part of the content
    assert manifest.hash != plain.hash
    for row in range(len(manifest)):
        _, extra, _ = read_tile(manifest, row, ['ndvi', 'relief'])
        assert (extra.transpose(2, 0, 1) == held[manifest.table.tile_id[row]]).all()
    with pytest.raises(DataError, match=r"extra_bands numbers no band 'nvdi' \(did you mean 'ndvi'"):
        read_tile(manifest, 0, ['nvdi'])

def test_a_registry_that_was_changed_is_noticed(folder, tmp_path):
    "A manifest that was made with another one is not used silently"
    registry = tmp_path/'bands.yaml'
    registry.write_text('ndvi: 1\nrelief: 2\n')
    cfg = field_config(folder, registry=registry)
    assert find_manifest(cfg).hash == find_manifest(cfg).hash
    registry.write_text('ndvi: 2\nrelief: 1\n')
    with pytest.raises(DataError, match='registry ndvi=1 relief=2 .asked for: ndvi=2 relief=1'):
        find_manifest(cfg)

@pytest.mark.parametrize('text, message', [
    ('ndvi: 0', 'bands count from 1'), ('ndvi: one', 'bands count from 1'), ('- ndvi', 'a mapping was expected'),
    ('', 'names no band'), ('ndvi: 1\nndvi: 2', 'ndvi'), ('soil water: 1', "'soil': name=number was expected"),
    (None, 'cannot be read')])
def test_a_wrong_registry_is_named(folder, tmp_path, text, message):
    if text is not None:
        (tmp_path/'bands.yaml').write_text(text)
    with pytest.raises(DataError, match=f'bands.yaml.*{message}'):
        import_field(FieldSource(path=folder, registry=tmp_path/'bands.yaml'), folder/'manifest.csv')
    assert not (folder/'manifest.csv').exists()

# ---------------------------------------------------------------- a folder that is only read
@pytest.fixture
def read_only(folder):
    "The folder without the right to write, and what it held, down to the times"
    def held():
        return {file: file.stat().st_mtime_ns for file in [folder, *folder.rglob('*')]}
    before = held()
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield folder
    # tests may run as root, who can write everywhere
    assert held() == before
    for path in before:
        path.chmod(0o755)

def test_nothing_is_written_into_the_data(read_only, tmp_path):
    "Manifest and its card at the place that is named, statistics beside the runs; a model is trained"
    home = tmp_path/'made'/'here'
    cfg = field_config(read_only, manifest=home/'manifest.csv')
    folder = train(cfg)
    assert {file.name for file in home.iterdir()} >= {'manifest.csv', 'source.json'}
    assert (folder.parent/'normalization_stats.json').is_file()
    # as evaluation and report read it
    assert find_system('rts').feed(load(folder/'config.yaml')).manifest.root == read_only
    # where the data lie is not published with the model
    assert str(tmp_path) not in (folder/'model'/'config.yaml').read_text()

def test_a_manifest_is_used_without_its_source(read_only, tmp_path):
    "data.root says where the tiles are; another place is an error with row and field"
    made = find_manifest(field_config(read_only, manifest=tmp_path/'manifest.csv'))
    cfg = RtsConfig(data=dict(manifest=tmp_path/'manifest.csv', root=read_only))
    assert find_manifest(cfg).hash == made.hash
    with pytest.raises(DataError, match="tile_id 'Banks_00'.*'PLANET-RGB/Banks_00.tif': no such file"):
        find_manifest(RtsConfig(data=dict(manifest=tmp_path/'manifest.csv')))

def test_paths_do_not_leave_the_root(read_only, tmp_path):
    "Not even into the folder of the manifest"
    find_manifest(field_config(read_only, manifest=tmp_path/'manifest.csv'))
    table = pd.read_csv(tmp_path/'manifest.csv')
    shutil.copy(read_only/table.image[0], tmp_path/'near.tif')
    for path, message in (('../near.tif', 'leaves'), (str(tmp_path/'near.tif'), 'absolute'), ('near.tif', 'no such')):
        table.assign(image=table.image.where(table.index > 0, path)).to_csv(tmp_path/'manifest.csv', index=False)
        with pytest.raises(DataError, match=rf"row 1 \(tile_id 'Banks_00'\), image: .*{message}"):
            find_manifest(RtsConfig(data=dict(manifest=tmp_path/'manifest.csv', root=read_only)))

def test_one_place_for_the_tiles(folder):
    with pytest.raises(ValueError, match='root says where the tiles of a manifest lie'):
        RtsConfig(data=dict(root=folder, source=dict(kind='field', path=folder)))
