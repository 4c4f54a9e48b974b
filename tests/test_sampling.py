"""common/sampling.py: which image has which noise and label, on which process."""

import pytest
import torch

from common.rng import PerImageNoise
from common.sampling import generate
from common.teachers.load import load_teacher


@pytest.fixture(scope="module")
def toy():
    return load_teacher("toy-cond")


def two_draws_and_label(model, z, cond, noise):
    return torch.cat([z, noise(), cond["labels"][:, None].float()], 1)


def labels_only(model, z, cond, noise):
    return cond["labels"]


def test_indices_and_labels_of_a_rank(toy):
    ((indices, labels, x),) = generate(labels_only, toy, 6, batch=10, rank=1, world=2)
    assert indices.tolist() == [1, 3, 5]
    assert labels.tolist() == x.tolist() == [1, 3, 5]


def test_noise_depends_on_seed_and_index_only(toy):
    """Image 3 alone has the same noise as in a batch, in the first draw and the next."""
    ((_, _, x),) = generate(two_draws_and_label, toy, 6, seed=1, batch=10, rank=1, world=2)
    noise = PerImageNoise(1, [3])
    assert torch.equal(x[1, :4], torch.cat([noise(2)[0], noise(2)[0]]))


def test_labels_repeat(toy):
    indices, labels, x = list(generate(labels_only, toy, 40, batch=9))[3]
    assert indices.tolist() == list(range(27, 36))
    assert labels.tolist() == x.tolist() == [k % 8 for k in range(27, 36)]


def test_fewer_classes(toy):
    ((_, labels, _),) = generate(labels_only, toy, 7, classes=3)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_a_later_first_image(toy):
    ((indices, labels, _),) = generate(labels_only, toy, 12, first=10)
    assert indices.tolist() == [10, 11]
    assert labels.tolist() == [2, 3]


@pytest.mark.parametrize("n", [3, 10, 17])
@pytest.mark.parametrize("batch", [1, 4, 25])
def test_ranks_share_the_images(toy, n, batch):
    """Each image on one of three ranks. As many batches on each rank, none above `batch`."""
    seen, counts = [], []
    for rank in range(3):
        batches = [i.tolist() for i, _, _ in generate(labels_only, toy, n, 0, batch, rank, 3)]
        assert max(map(len, batches)) <= batch
        counts.append(len(batches))
        seen += sum(batches, [])
    assert sorted(seen) == list(range(n))
    if batch > 1:
        assert len(set(counts)) == 1
