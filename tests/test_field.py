"The field's own folders: PLANET-RGB, EXTRA, labels, metadata.csv and splits.yaml, as they are"
import shutil

import numpy as np
import pandas as pd
import pytest

from rtsseg.config import FieldSource
from rtsseg.console import DataError
from rtsseg.importers import import_field
from rtsseg.rawtile import example_tiles

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
