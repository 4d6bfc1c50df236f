"A serialised albumentations pipeline in place of the built-in augmentation: it trains, resumes and counts in the hash"
import albumentations as A
import numpy as np
import pytest

from helpers.runs import tiny
from rtsseg.augment import Augmenter, Pipeline
from rtsseg.config import Augment, ConfigError
from rtsseg.runs import config_hash
from rtsseg.training import train

def write_pipeline(path, *transforms):
    A.save(A.Compose(transforms), path, data_format='yaml')
    return path


def with_pipeline(folder, path):
    "Settings of a run of a second with a pipeline; the helper's own settings switch augmentation off"
    return tiny(folder).model_copy(update=dict(augment=Augment(pipeline=path)))


def weights(folder):
    return (folder/'model'/'model.safetensors').read_bytes()


def test_a_run_trains_with_a_pipeline(tmp_path):
    "The same file gives the same weights in another place; another file is another run"
    path = write_pipeline(tmp_path/'flip.yaml', A.HorizontalFlip(p=.5), A.RandomBrightnessContrast(p=.5))
    one, two = (weights(train(with_pipeline(tmp_path/name, path))) for name in 'ab')
    assert one == two
    assert weights(train(tiny(tmp_path/'c'))) != one


def test_the_hash_counts_the_content_of_the_file(tmp_path):
    path = write_pipeline(tmp_path/'one.yaml', A.HorizontalFlip(p=.5))
    copy = tmp_path/'copy.yaml'
    copy.write_bytes(path.read_bytes())
    cfg, same = (with_pipeline(tmp_path/'w', p) for p in (path, copy))
    assert config_hash(cfg) == config_hash(same)
    write_pipeline(copy, A.HorizontalFlip(p=.25))
    assert config_hash(cfg) != config_hash(same)


def test_extra_bands_move_with_the_image_and_keep_their_values(tmp_path):
    path = write_pipeline(tmp_path/'p.yaml', A.HorizontalFlip(p=1), A.RandomBrightnessContrast((.2, .2), p=1))
    rng = np.random.default_rng(0)
    image = np.dstack([rng.random((16, 16, 3)), rng.normal(0, 1e4, (16, 16, 2))]).astype(np.float32)
    mask = rng.choice(np.uint8([0, 1, 255]), (16, 16))
    out, labels = Augmenter(Augment(pipeline=path), [0]*5)(image, mask, (1, 1, 0, 0))
    np.testing.assert_array_equal(out[..., 3:], image[:, ::-1, 3:])
    np.testing.assert_array_equal(labels, mask[:, ::-1])
    assert not np.allclose(out[..., :3], image[:, ::-1, :3])


@pytest.mark.parametrize('text, problem', [
    ('a: [', 'is not an albumentations pipeline'),
    ('{}', 'is not an albumentations pipeline'),
])
def test_a_file_that_is_not_a_pipeline_is_refused(tmp_path, text, problem):
    path = tmp_path/'bad.yaml'
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        Pipeline(path)


def test_a_pipeline_that_resizes_is_refused(tmp_path):
    path = write_pipeline(tmp_path/'crop.yaml', A.RandomCrop(8, 8, p=1))
    with pytest.raises(ValueError, match='a tile must keep its size'):
        Pipeline(path)(np.zeros((16, 16, 3), np.float32), np.zeros((16, 16), np.uint8), (1, 1, 0, 0))
