"""common/metrics.py: features and points to numbers. On several processes: test_eval.py."""

import pytest
import torch
import torch.nn.functional as F

from common import metrics
from common.errors import UserError
from common.features import ClassifierExtractor
from common.routed import ByLabel
from common.teachers.load import load_teacher
from common.teachers.toy import energy_distance, sliced_wasserstein


@pytest.fixture(scope="module")
def mnist():
    return load_teacher("mnist")


@pytest.fixture(scope="module")
def toy():
    return load_teacher("toy-cond")


def of_mixture(toy, z, cond):
    """Exact samples of the labels' modes: z as the deviation from the mode's mean."""
    means = toy.mixture.means[cond["labels"]]
    return (means + toy.mixture.std * z).float()


# ---- images --------------------------------------------------------------------------------------


class Oracle(ClassifierExtractor):
    """A classifier that reads the label which the sampler below wrote into the first pixel."""

    def __call__(self, images):
        features, _ = super().__call__(images)
        return features, F.one_hot(images[:, 0, 0, 0].long(), 10).float()


def test_agreement_and_distinct(mnist):
    """Three batches with the same noise, as from a seed that is equal everywhere: 10 images."""

    def sampler(model, z, cond, noise):
        generator = torch.Generator().manual_seed(int(cond["labels"][0]))
        x = mnist.encode_images(torch.randint(0, 255, z.shape, generator=generator))
        x[:, 0, 0, 0] = (cond["labels"] - 127.5) / 127.5  # decoded to the label itself
        return x

    extractor = Oracle(mnist)
    r = metrics.evaluate(sampler, mnist, mnist, 30, batch=10, extractor=extractor)
    assert r["agreement"] == 1.0
    assert r["distinct"] == 10


def test_samples_that_are_not_finite(mnist):
    r = metrics.evaluate(lambda m, z, c, noise: z * float("nan"), mnist, mnist, 10)
    assert r["nonfinite"] == 10
    assert r["distinct"] == 1


def test_finite_samples_are_not_counted(mnist):
    assert "nonfinite" not in metrics.evaluate(lambda m, z, c, noise: z, mnist, mnist, 10)


def test_metrics_of_the_reference_itself(mnist):
    """The data set as samples: distance 0, every sample in a ball of its copy."""
    extractor = ClassifierExtractor(mnist)
    features = extractor.image_features(extractor.reference_images().images)
    found = metrics.distances(extractor, features)
    assert found["fd"] < 1e-3
    assert found["precision"] == found["recall"] == found["coverage"] == 1
    assert abs(found["kid"]) < 3 * found["kid_std"] + 1


def test_what_is_called_for_each_batch(mnist):
    counts, kept = [], []
    metrics.evaluate(
        lambda m, z, c, noise: z,
        mnist,
        mnist,
        n=20,
        batch=8,
        progress=counts.append,
        keep=lambda index, images: kept.append((index.tolist(), images)),
    )
    assert counts == [8, 8, 4]
    assert sum([index for index, _ in kept], []) == list(range(20))
    assert all(images.dtype == torch.uint8 for _, images in kept)


def test_fewer_samples_than_processes(mnist):
    with pytest.raises(UserError, match="3 samples: expected at least one for each of 4 processes"):
        metrics.evaluate(None, mnist, mnist, n=3, world=4)


# ---- points --------------------------------------------------------------------------------------


def test_points_are_compared_with_as_many_of_their_labels(toy):
    """The mixture's samples have a seed of their own, and the labels of the points."""
    sampler = lambda m, z, cond, noise: of_mixture(toy, z, cond) + 0.3
    points = []
    keep = lambda index, x: points.append(x)
    r = metrics.evaluate(sampler, toy, toy, n=100, seed=4, batch=30, keep=keep)
    x = torch.cat(points)
    generator = torch.Generator().manual_seed(5)
    y = toy.mixture.sample(100, torch.arange(100) % 8, generator)
    assert r["energy_distance"] == energy_distance(x, y)
    assert r["sliced_wasserstein"] == sliced_wasserstein(x, y)
    assert r["protocol"] == "toy exact n=100 seed=4"


def test_shares_of_modes(toy):
    """Every sample at the mean of mode 0 or, of label 1, at that of mode 1: 7 / 8 and 1 / 8."""
    sampler = lambda m, z, cond, noise: toy.mixture.means[(cond["labels"] == 1).long()].float()
    r = metrics.evaluate(sampler, toy, toy, n=80)
    assert (r["mode_min"], r["mode_max"], r["near_mode"]) == (0, 7 / 8, 1)


def test_experts_are_measured_on_their_labels(toy):
    """Expert 1 has labels 2 and 5 and is wrong; expert 0 has the others and is right."""
    table = [0, 0, 1, 0, 0, 1, 0, 0]

    def sampler(model, z, cond, noise):
        wrong = (cond["labels"] == 2) | (cond["labels"] == 5)
        return of_mixture(toy, z, cond) + 2.0 * wrong[:, None]

    model = ByLabel([toy, toy], table)
    right, wrong = metrics.evaluate(sampler, model, toy, n=800)["experts"]
    assert (right["expert"], right["labels"], right["n"]) == (0, [0, 1, 3, 4, 6, 7], 600)
    assert (wrong["expert"], wrong["labels"], wrong["n"]) == (1, [2, 5], 200)
    assert right["energy_distance"] < 0.02
    assert wrong["energy_distance"] > 1
    assert right["near_mode"] > 0.95
    assert wrong["near_mode"] < 0.1


# ---- lines ---------------------------------------------------------------------------------------


def test_hashes_of_images():
    x = torch.arange(6).view(3, 2)
    hashes = metrics.hash_images(torch.cat([x, x[1:2]]))
    assert len(hashes.unique()) == 3
    assert hashes[1] == hashes[3]


def test_summary():
    result = dict(method="dmd2", nfe=1, fd=15.832, kid=None, density=1.0, protocol="fd x")
    assert metrics.summary(result) == "dmd2 nfe=1: fd 15.83  (fd x)"
