"""tools/measure.py: batches of image files."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from tools.measure import list_images, same_size_batches


@pytest.fixture
def folder(tmp_path):
    """Ten images of grey level i; the last four are larger."""
    for i in range(10):
        size = (8, 8) if i < 6 else (9, 8)
        Image.new("L", size, i).save(tmp_path / f"{i}.png")
    return tmp_path


def test_batches_are_of_one_size(folder):
    batches = list(same_size_batches(sorted(folder.iterdir()), None, 4))
    shapes = [tuple(batch.shape) for batch in batches]
    assert shapes == [(4, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 9)]
    levels = torch.cat([batch[:, 0, 0, 0] for batch in batches])
    assert levels.tolist() == list(range(10))


def test_the_shape_that_an_extractor_expects(folder):
    with pytest.raises(UserError, match="6.png: expected 8 x 8 pixels, the teacher's size"):
        list(same_size_batches(sorted(folder.iterdir()), torch.Size([1, 8, 8]), 4))


def test_files_by_name(folder):
    assert [path.name for path in list_images("--images", folder, 8)] == [
        f"{i}.png" for i in range(8)
    ]
    assert len(list_images("--images", folder)) == 10


def test_hidden_files_are_left_out(folder):
    np.save(folder / ".0.png", np.zeros(1))
    assert len(list_images("--images", folder)) == 10


def test_too_few_files(folder):
    with pytest.raises(UserError, match="--images .*: expected at least 11 images .*, found 10"):
        list_images("--images", folder, 11)
