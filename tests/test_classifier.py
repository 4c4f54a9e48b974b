"""recipes/classifier.py: the features in which samples of an own teacher are measured."""

import pytest
import torch
import torch.nn.functional as F
from helpers import shapes

from common import fid
from common.rng import derive_seed
from data.images import Images, load_folder
from recipes.classifier import (
    feature_stats,
    gaussian_blur,
    new_classifier,
    random_affine,
    scale_features,
    spoil,
    train_classifier,
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """300 pictures of 32 x 32 pixels: four classes that differ in shape and colour."""
    return load_folder(shapes.write_shapes(tmp_path_factory.mktemp("shapes")), 3, 32)


# ---- the second task -----------------------------------------------------------------------------


@pytest.fixture
def spoilt():
    """400 grey images of one level, spoilt, and the amounts."""
    torch.manual_seed(0)
    return spoil(torch.full((400, 3, 16, 16), 128.0))


def test_amounts_are_those_of_the_images(spoilt):
    """Offsets of the channels and the standard deviation of the noise, found in the images."""
    images, amounts = spoilt
    noise = 4 * torch.sinh(amounts[:, 4])
    some = (noise > 2) & (noise < 25)  # more is clipped
    assert some.sum() > 80
    found = images[some].std((2, 3)).mean(1)
    assert torch.allclose(found, noise[some], rtol=0.15, atol=0.2)
    few = noise < 25
    error = images.mean((2, 3)) - 128 - 20 * amounts[:, :3]
    assert error[few].abs().max() < 8


def test_each_amount_is_zero_in_half_of_the_images(spoilt):
    _, amounts = spoilt
    for zero in (amounts[:, :3] == 0).all(1), amounts[:, 3] == 0, amounts[:, 4] == 0:
        assert 0.4 < zero.float().mean() < 0.6


def test_blur_of_a_point():
    """It becomes a Gaussian of this variance, another one for each image; the sum stays."""
    x = torch.zeros(2, 3, 17, 17)
    x[:, :, 8, 8] = 1
    out = gaussian_blur(x, torch.tensor([0.7, 1.2]))
    squares = (torch.arange(17.0) - 8) ** 2
    for picture, sigma in zip(out[:, 1], (0.7, 1.2)):
        assert picture.sum().item() == pytest.approx(1)
        for weights in (picture.sum(0), picture.sum(1)):
            assert (weights * squares).sum().item() == pytest.approx(sigma**2, rel=0.02)


def test_images_of_blur_0_are_not_blurred():
    """White noise keeps its sharpness where the amount says 0, and loses it elsewhere."""
    torch.manual_seed(0)
    x = 128 + 20 * torch.randn(400, 1, 16, 16)
    out, amounts = spoil(x)
    sharp = (out[..., 1:] - out[..., :-1]).std((1, 2, 3))
    no_noise = amounts[:, 2] == 0
    assert sharp[no_noise & (amounts[:, 1] == 0)].min() > 20
    assert sharp[no_noise & (amounts[:, 1] > 0.8)].max() < 12


# ---- training ------------------------------------------------------------------------------------


def test_without_the_second_task_nothing_has_changed(pictures):
    """The features of the embedded teachers: the steps of a plain classifier, done here again."""
    few = Images(pictures.images[::3], pictures.labels[::3], pictures.names)
    net, _ = train_classifier(few, 3, seed=5)

    torch.manual_seed(derive_seed(5, 7))
    train = torch.randperm(100)[10:]
    plain = new_classifier(few)
    opt = torch.optim.AdamW(plain.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, total_steps=3)
    for _ in range(3):
        plain.train()
        index = train[torch.randperm(90)]
        _, logits = plain(random_affine(few.images[index]))
        F.cross_entropy(logits, few.labels[index], label_smoothing=0.05).backward()
        opt.step()
        opt.zero_grad()
        schedule.step()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, net.state_dict()[name]), name


def test_scaled_features(pictures):
    """Standard deviation 1 over the images, and the same logits. A feature that is the same for
    all images stays finite."""
    torch.manual_seed(0)
    net = new_classifier(pictures).eval()
    torch.nn.init.zeros_(net.feat.weight[7])
    before = net(pictures.images[:50])[1]
    scale_features(net, pictures)
    variance = feature_stats(net, pictures).mean_cov()[1].diagonal()
    assert torch.allclose(variance[torch.arange(64) != 7], torch.ones(63).double(), atol=1e-4)
    assert variance[7].item() == pytest.approx(0, abs=1e-4)
    features, after = net(pictures.images[:50])
    assert features.isfinite().all()
    assert torch.allclose(before, after, atol=1e-5)


# ---- what fd sees --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moments(pictures):
    """moments(images) -> mean and covariance, in the features that recipes.pretrain makes for the
    pictures: 67 epochs are its 200 steps."""
    net, accuracy = train_classifier(pictures, 67, seed=0, spoilt=True)
    assert accuracy == 1
    return lambda images: feature_stats(net, Images(images, None, [])).mean_cov()


@pytest.fixture(scope="module")
def fd(pictures, moments):
    """fd(images): their distance to the pictures."""
    reference = moments(pictures.images)
    return lambda images: fid.frechet(*moments(images), *reference)


@pytest.fixture(scope="module")
def halves(pictures, moments):
    """Distance of one half of the pictures to the other, with as many of each class."""
    return fid.frechet(*moments(pictures.images[::2]), *moments(pictures.images[1::2]))


@pytest.mark.slow
def test_fd_sees_noise(pictures, fd, halves):
    """Noise with a standard deviation of 10, 20 and 40 of 255 grey levels."""
    found = [fd(shapes.with_noise(pictures.images, std)) for std in (0, 10, 20, 40)]
    assert found[0] < 1e-3
    assert found[1] > 5 * halves
    assert found[2] > 1.3 * found[1]
    assert found[3] > 1.3 * found[2]


@pytest.mark.slow
def test_fd_sees_blur(pictures, fd, halves):
    found = [fd(shapes.blurred(pictures.images, sigma)) for sigma in (1, 2)]
    assert found[0] > 2 * halves
    assert found[1] > 2 * found[0]


@pytest.mark.slow
def test_fd_sees_another_colour(pictures, fd, halves):
    found = [
        fd(shapes.with_colour_shift(pictures.images, (shift, -shift, 0))) for shift in (10, 20)
    ]
    assert found[0] > 1.5 * halves
    assert found[1] > 2 * found[0]


@pytest.mark.slow
def test_fd_sees_a_missing_class(pictures, fd, halves):
    assert fd(pictures.images[pictures.labels != 2]) > 5 * halves
