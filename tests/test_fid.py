"""common/fid.py and tools/inception.py.

The network against stored outputs of another implementation, statistics and distances against
closed forms.
"""

import os
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common import fid
from common.errors import UserError
from tools.inception import POOLS, Inception, load_inception, resize_clean, resize_tf1


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(dim, seed=0):
    a = randn(dim, 2 * dim, seed=seed)
    return a @ a.T / (2 * dim)


def random_pixels(*shape, seed=0):
    pixels = np.random.RandomState(seed).randint(0, 256, shape)
    return torch.from_numpy(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def net():
    """Inception with random weights of usable scale. RandomState is stable over numpy versions, so
    that outputs can be stored."""
    rng, net = np.random.RandomState(0), Inception()
    for key, tensor in sorted(net.state_dict().items()):
        if key.endswith("num_batches_tracked"):
            continue
        w = torch.from_numpy(rng.standard_normal(tuple(tensor.shape)).astype(np.float32))
        if tensor.ndim > 1:
            w *= (2 / tensor[0].numel()) ** 0.5
        elif key.endswith(("bn.weight", "running_var")):
            w = 1 + 0.1 * w.clamp(-3, 3)
        else:
            w *= 0.1
        tensor.copy_(w)
    return net


@pytest.fixture(scope="module")
def image():
    return random_pixels(1, 3, 40, 32, seed=1)


# ---- Inception -----------------------------------------------------------------------------------


def test_keys_and_parameters(net):
    state = net.state_dict()
    assert len(state) == 566
    assert sum(key.endswith("num_batches_tracked") for key in state) == 94
    assert sum(p.numel() for p in net.parameters()) == 23_850_960
    assert state["fc.weight"].shape == (1008, 2048)
    assert state["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert state["Mixed_6b.branch7x7dbl_4.conv.weight"].shape == (128, 128, 7, 1)
    assert all(m.eps == 1e-3 for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_shapes_of_outputs(net, image):
    features, logits = net(image)
    assert features.shape == (1, 2048)
    assert logits.shape == (1, 1008)
    assert features.dtype == logits.dtype == torch.float32


def test_outputs_equal_those_of_torch_fidelity(net, image):
    """The numbers were printed by torch-fidelity 0.4.0 with these weights and this image."""
    features, logits = net(image)
    branches = features.split([320, 384, 384, 384, 384, 192], 1)  # of Mixed_7c
    sums = [branch.sum().item() for branch in branches]
    expected = [208.124, 249.289, 255.883, 206.429, 196.916, 142.04]
    assert sums == pytest.approx(expected, rel=2e-4)
    assert features.square().sum().item() == pytest.approx(2145.24, rel=2e-4)
    assert logits.sum().item() == pytest.approx(-70.5135, rel=2e-4)
    assert logits.square().sum().item() == pytest.approx(2064.57, rel=2e-4)


def test_torch_fidelity_itself(net, image, tmp_path):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = str(tmp_path / "w.pth")
    torch.save(net.state_dict(), path)
    other = module.FeatureExtractorInceptionV3(
        "net", ["2048", "logits"], feature_extractor_weights_path=path
    )
    with torch.no_grad():
        for a, b in zip(net(image), other(image)):
            assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize(
    "name, channels, kind",
    [
        ("Mixed_5b", 192, "avg"),
        ("Mixed_6b", 768, "avg"),
        ("Mixed_7b", 1280, "avg"),
        ("Mixed_7c", 2048, "max"),
    ],
)
def test_pool_branch(net, name, channels, kind):
    """Average without the padding's zeros, but maximum in the last block: no key reveals it."""
    block, x = getattr(net, name), randn(1, channels, 3, 3).float()
    windows = F.unfold(F.pad(x, (1, 1, 1, 1), value=float("nan")), 3).view(1, channels, 9, 9)
    pooled = windows.nanmean(2) if kind == "avg" else windows.nan_to_num(-1e9).amax(2)
    with torch.no_grad():
        expected = block.branch_pool(pooled.view(1, channels, 3, 3))
        found = block(x)[:, -expected.shape[1] :]
    assert torch.allclose(found, expected, atol=1e-5)
    assert expected.abs().sum() > 0


def test_last_pool_changes_the_features(net, image, monkeypatch):
    x = F.interpolate(image.float(), size=(75, 75)).sub(128).div(128).repeat(1, 1, 2, 2)
    with torch.no_grad():
        features, _ = net.body(x)
        monkeypatch.setattr(net.Mixed_7c, "pool", POOLS["avg"])
        others, _ = net.body(x)
    assert (features - others).norm() > 0.05 * features.norm()


@pytest.fixture
def net_input(net, monkeypatch):
    """Calls of this network return what its layers would get."""
    monkeypatch.setattr(net, "body", lambda x: x)
    return net


def test_inputs_are_resized_and_scaled(net_input, image):
    assert torch.equal(net_input(image), (resize_tf1(image.float()) - 128) / 128)
    assert torch.equal(net_input(image, resize="clean"), (resize_clean(image) - 128) / 128)
    black = torch.full((1, 3, 299, 299), -1.0)
    assert torch.equal(net_input(torch.zeros_like(image)), black)


def test_grey_images_get_three_channels(net_input, image):
    grey = image[:, :1]
    assert torch.equal(net_input(grey), net_input(grey.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(
    "spoil", [lambda x: x.float() / 127.5 - 1, lambda x: x[0], lambda x: x[:, :2]]
)
def test_other_inputs_are_refused(net, image, spoil):
    with pytest.raises(ValueError, match="uint8"):
        net(spoil(image))


def test_other_resizes_are_refused(net, image):
    with pytest.raises(ValueError, match="resize"):
        net(image, resize="bilinear")


def test_inception_never_trains(net):
    net.train()
    assert not any(m.training for m in net.modules())
    assert not any(p.requires_grad for p in net.parameters())


def test_autocast_does_not_reach_the_features(net):
    zeros = net.Conv2d_1a_3x3(torch.zeros(1, 3, 9, 9))
    small = Inception.__new__(Inception)
    torch.nn.Module.__init__(small)
    small.body = lambda x: net.Conv2d_1a_3x3(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = small(torch.full((1, 3, 9, 9), 128, dtype=torch.uint8))
    assert features.dtype == torch.float32
    assert torch.equal(zeros[0, :, 0, 0], features[0, :, 0, 0])


# ---- weight file ---------------------------------------------------------------------------------


def assert_one_line(error, path):
    text = str(error.value)
    assert "\n" not in text
    assert str(path) in text
    assert "expected" in text
    assert "found" in text
    assert len(text) < 400


@pytest.fixture
def weights(net, tmp_path):
    """The network's weights as pytorch-fid stores them."""
    state = net.state_dict()
    kept = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save(kept, tmp_path / "w.pth")
    return tmp_path / "w.pth"


def test_weights_round_trip(net, weights, capsys):
    loaded, digest = load_inception(weights, force=True)
    assert len(digest) == 8
    assert digest in capsys.readouterr().out
    expected = net.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())


def test_loading_leaves_the_random_state(weights):
    before = torch.get_rng_state()
    load_inception(weights, force=True)
    assert torch.equal(before, torch.get_rng_state())


def test_other_weights_are_refused(weights):
    _, digest = load_inception(weights, force=True)
    with pytest.raises(UserError, match=f"6726825d.*{digest}") as e:
        load_inception(weights)
    assert_one_line(e, weights)


class Payload:
    """Unpickling this creates the marker file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "marker"))).close()
    assert (tmp_path / "marker").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("save", [torch.save, lambda o, path: path.write_bytes(pickle.dumps(o))])
def test_pickle_posing_as_weights(tmp_path, save, force):
    marker, path = tmp_path / "marker", tmp_path / "w.pth"
    save({"fc.weight": Payload(marker)}, path)
    with pytest.raises(UserError) as e:
        load_inception(path, force=force)
    assert_one_line(e, path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda state: {k: v for k, v in state.items() if v.numel() < 100}, "absent"),
        (lambda state: [1, 2], "state dict"),
        (lambda state: {"a": 1}, "state dict"),
        (lambda state: torch.zeros(3), "state dict"),
        (
            lambda state: {**state, "fc.bias": torch.zeros(1000)},
            r"fc.bias \[1008\], found \[1000\]",
        ),
    ],
)
def test_bad_weight_files(net, tmp_path, change, error):
    path = tmp_path / "w.pth"
    torch.save(change(net.state_dict()), path)
    with pytest.raises(UserError, match=error) as e:
        load_inception(path, force=True)
    assert_one_line(e, path)


def test_missing_and_empty_weight_files(tmp_path):
    (tmp_path / "empty.pth").touch()
    for path in (tmp_path / "none.pth", tmp_path, tmp_path / "empty.pth"):
        with pytest.raises(UserError) as e:
            load_inception(path, force=True)
        assert_one_line(e, path)


# ---- resizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, fractions",
    [
        (4, [0.0, 0.5, 1.0, 1.0]),  # sources 0, 0.5, 1, 1.5, the last held at 1
        (3, [0.0, 2 / 3, 1.0]),  # sources 0, 2/3, 4/3
    ],
)
def test_resize_tf1_by_hand(size, fractions):
    x = torch.tensor([[0.0, 8.0], [100.0, 108.0]])[None, None]
    t = torch.tensor(fractions)
    expected = 100 * t[:, None] + 8 * t[None, :]
    assert torch.allclose(resize_tf1(x, size)[0, 0], expected, atol=1e-5)


@pytest.mark.parametrize(
    "size, expected",
    [
        (4, [0.0, 5.0, 30.0, 25.0]),  # sources 0, 1.5, 3, 4.5
        (3, [0.0, 0.0, 0.0]),
    ],
)
def test_resize_tf1_does_not_average(size, expected):
    row = torch.tensor([0.0, 10.0, 0.0, 30.0, 0.0, 50.0])
    x = row[None, None, None].expand(1, 1, 6, 6)
    assert resize_tf1(x, size)[0, 0, 0].tolist() == expected


@pytest.mark.parametrize("h, w", [(7, 299), (299, 5), (64, 400), (600, 30)])
def test_resize_tf1_ramp(h, w):
    """On a ramp the value is the source position itself, up to the last pixel."""
    y, x = torch.arange(h, dtype=torch.float64), torch.arange(w, dtype=torch.float64)
    i = torch.arange(299, dtype=torch.float64)
    found = resize_tf1((y[:, None] + 1000 * x[None, :])[None, None])[0, 0]
    source_y = (i * h / 299).clamp(max=h - 1)
    source_x = (i * w / 299).clamp(max=w - 1)
    expected = source_y[:, None] + 1000 * source_x[None, :]
    assert torch.allclose(found, expected, rtol=0, atol=1e-7)


def test_resizes_keep_the_same_size():
    pixels = random_pixels(2, 3, 299, 299)
    assert torch.equal(resize_tf1(pixels.float()), pixels.float())
    assert torch.equal(resize_clean(pixels), pixels.float())


@pytest.mark.parametrize("n", [1, 28, 400])
def test_resizes_keep_a_constant(n):
    pixels = torch.full((1, 1, n, n), 77, dtype=torch.uint8)
    expected = torch.full((1, 1, 299, 299), 77.0)
    assert torch.equal(resize_tf1(pixels), expected)
    assert torch.allclose(resize_clean(pixels), expected, atol=1e-3)


def test_resize_clean_takes_each_plane_on_its_own():
    pixels = random_pixels(2, 3, 20, 31)
    found = resize_clean(pixels, 16)
    assert found.shape == (2, 3, 16, 16)
    assert found.dtype == torch.float32
    plane = Image.fromarray(pixels[1, 2].numpy().astype(np.float32))
    plane = plane.resize((16, 16), Image.Resampling.BICUBIC)
    assert torch.allclose(found[1, 2], torch.from_numpy(np.array(plane)).clamp(0, 255))


def test_resize_clean_is_not_rounded():
    found = resize_clean(random_pixels(2, 3, 20, 31), 16)
    assert (found != found.round()).any()


def test_resize_clean_is_clipped():
    """Bicubic interpolation overshoots at an edge."""
    edge = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    edge[..., 4:] = 255
    assert resize_clean(edge).min() == 0
    assert resize_clean(edge).max() == 255


def test_resize_clean_is_antialiased():
    noise = random_pixels(1, 1, 598, 598)
    assert resize_clean(noise).std() < 0.7 * resize_tf1(noise).std()


# ---- statistics ----------------------------------------------------------------------------------


def stats_of(x, sizes=None):
    stats = fid.Stats(x.shape[1])
    for part in x.split(sizes or len(x)):
        stats.update(part)
    return stats


def test_streaming_equals_batch():
    x = randn(100, 6) * 3 + 5
    stats = stats_of(x, [1, 30, 2, 17, 25, 5, 20])
    mu, cov = stats.mean_cov()
    assert stats.n == 100
    assert mu.dtype == cov.dtype == torch.float64
    np.testing.assert_allclose(mu, x.mean(0), atol=1e-10)
    np.testing.assert_allclose(cov, np.cov(x.numpy(), rowvar=False), atol=1e-10)


def test_stats_are_float64_inside():
    """In float32 the sums of squares would lose the variance."""
    x = (randn(4000, 2) + 1000).float()
    _, cov = stats_of(x, 50).mean_cov()
    np.testing.assert_allclose(cov, np.cov(x.double().numpy(), rowvar=False), rtol=1e-6)


@pytest.mark.parametrize("features", [torch.zeros(2, 4), torch.zeros(3)])
def test_features_of_another_shape(features):
    with pytest.raises(ValueError):
        fid.Stats(3).update(features)


def test_too_few_features():
    stats = fid.Stats(3)
    with pytest.raises(ValueError, match="n=0"):
        stats.mean_cov()


def test_features_that_are_not_finite():
    stats = fid.Stats(3)
    stats.update(torch.tensor([[1.0, 2.0, float("nan")], [0.0, 0.0, 0.0]]))
    with pytest.raises(ValueError, match="finite"):
        stats.mean_cov()


def test_stats_file(tmp_path):
    mu, cov, protocol = randn(4), covariance(4), "fid50k inception-tf1resize uint8"
    fid.save_stats(tmp_path / "ref.npz", mu, cov, 50000, protocol)
    loaded = fid.load_stats(tmp_path / "ref.npz")
    assert torch.equal(loaded["mu"], mu)
    assert torch.equal(loaded["sigma"], cov)
    assert loaded["n"] == 50000
    assert loaded["protocol"] == protocol
    assert loaded["features"] is None
    assert os.listdir(tmp_path) == ["ref.npz"]  # no temporary file stays


def test_stats_file_with_features(tmp_path):
    features = torch.ones(9, 4) / 3
    fid.save_stats(tmp_path / "ref.npz", randn(4), covariance(4), 9, "p", features)
    loaded = fid.load_stats(tmp_path / "ref.npz")["features"]
    assert torch.equal(loaded, features.half().float())


def test_stats_file_of_edm(tmp_path):
    mu, cov = randn(4).numpy(), covariance(4).numpy()
    np.savez(tmp_path / "ref.npz", mu=mu.astype(np.float32), sigma=cov)
    loaded = fid.load_stats(tmp_path / "ref.npz")
    assert loaded["n"] is None
    assert loaded["protocol"] is None
    assert loaded["mu"].dtype == torch.float64


MU, SIGMA = np.zeros(3), np.eye(3)


@pytest.mark.parametrize(
    "arrays",
    [
        dict(mu=MU),
        dict(x=MU),
        dict(mu=np.zeros((3, 1)), sigma=SIGMA),
        dict(mu=MU, sigma=np.eye(2)),
        dict(mu=MU, sigma=np.zeros(3)),
        dict(mu=np.zeros(3, int), sigma=SIGMA),
        dict(mu=np.array(list("abc")), sigma=SIGMA),
        dict(mu=MU, sigma=np.full((3, 3), np.nan)),
        dict(mu=MU, sigma=SIGMA, n=np.zeros(2)),
        dict(mu=np.array([None, 1, 2], dtype=object), sigma=SIGMA),
        dict(mu=MU, sigma=SIGMA, features=np.zeros((2, 4))),
        dict(mu=MU, sigma=SIGMA, features=np.zeros((2, 3), int)),
        dict(mu=MU, sigma=SIGMA, features=np.full((2, 3), np.inf)),
    ],
)
def test_bad_arrays(tmp_path, arrays):
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError) as e:
        fid.load_stats(path)
    assert_one_line(e, path)


def test_bad_archives(tmp_path):
    np.save(tmp_path / "single.npy", MU)
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "cut.npz", mu=MU, sigma=SIGMA)
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for name in ("single.npy", "empty.npz", "text.npz", "cut.npz", "none.npz", ""):
        with pytest.raises(UserError) as e:
            fid.load_stats(tmp_path / name)
        assert_one_line(e, tmp_path / name)


def test_pickle_posing_as_stats(tmp_path):
    marker, raw, inside = tmp_path / "marker", tmp_path / "raw.npz", tmp_path / "inside.npz"
    raw.write_bytes(pickle.dumps(dict(mu=Payload(marker))))
    np.savez(inside, mu=np.array([Payload(marker)], dtype=object), sigma=np.eye(1))
    for path in (raw, inside):
        with pytest.raises(UserError) as e:
            fid.load_stats(path)
        assert_one_line(e, path)
    assert not marker.exists()


# ---- Frechet distance ----------------------------------------------------------------------------


def test_frechet_of_one_dimension():
    found = fid.frechet([1.0], [[4.0]], [-2.0], [[0.25]])
    assert found == pytest.approx(3**2 + 1.5**2, abs=1e-12)


@pytest.fixture
def diagonal():
    """Two Gaussians with diagonal covariances, and their distance."""
    mu1, mu2 = randn(5, seed=1), randn(5, seed=2)
    var1, var2 = randn(5, seed=3).square(), randn(5, seed=4).square()
    distance = (mu1 - mu2).square().sum() + (var1.sqrt() - var2.sqrt()).square().sum()
    return mu1, var1.diag(), mu2, var2.diag(), distance.item()


def test_frechet_of_diagonal_covariances(diagonal):
    *gaussians, expected = diagonal
    assert fid.frechet(*gaussians) == pytest.approx(expected, rel=1e-12)
    arrays = [x.numpy() for x in gaussians]
    assert fid.frechet(*arrays) == pytest.approx(expected, rel=1e-12)


def test_frechet_does_not_change_under_rotations(diagonal):
    mu1, cov1, mu2, cov2, expected = diagonal
    q = torch.linalg.qr(randn(5, 5)).Q
    found = fid.frechet(q @ mu1, q @ cov1 @ q.T, q @ mu2, q @ cov2 @ q.T)
    assert found == pytest.approx(expected, rel=1e-10)


@pytest.fixture
def gaussians():
    return randn(8, seed=1), covariance(8, 1), randn(8, seed=2), covariance(8, 2)


def test_frechet_is_symmetric(gaussians):
    mu1, cov1, mu2, cov2 = gaussians
    expected = fid.frechet(mu1, cov1, mu2, cov2)
    assert fid.frechet(mu2, cov2, mu1, cov1) == pytest.approx(expected, rel=1e-10)


def test_frechet_is_a_square(gaussians):
    mu1, cov1, mu2, cov2 = gaussians
    expected = 9 * fid.frechet(mu1, cov1, mu2, cov2)
    found = fid.frechet(3 * mu1, 9 * cov1, 3 * mu2, 9 * cov2)
    assert found == pytest.approx(expected, rel=1e-10)


def test_frechet_of_a_shift(gaussians):
    mu, cov, _, _ = gaussians
    shift = randn(8, seed=3)
    expected = shift.square().sum().item()
    assert fid.frechet(mu, cov, mu + shift, cov) == pytest.approx(expected, rel=1e-8)


def test_frechet_of_a_point(gaussians):
    mu, cov, _, _ = gaussians
    found = fid.frechet(mu, 0 * cov, mu, cov)
    assert found == pytest.approx(cov.trace().item(), rel=1e-12)


def test_frechet_of_equal_gaussians_is_zero(gaussians):
    mu, cov, _, _ = gaussians
    assert fid.frechet(mu, cov, mu, cov) == pytest.approx(0, abs=1e-6)
    singular = stats_of(randn(6, 8)).mean_cov()  # rank 5 in 8 dimensions
    assert fid.frechet(*singular, *singular) == pytest.approx(0, abs=1e-6)


def test_frechet_equals_sqrtm():
    linalg = pytest.importorskip("scipy.linalg")
    cov1, cov2 = covariance(12, 1), covariance(12, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = linalg.sqrtm((cov1 @ cov2).numpy())
    if not isinstance(root, np.ndarray):
        pytest.skip("this scipy returns no matrix")
    expected = (cov1.trace() + cov2.trace()).item() - 2 * np.trace(root).real
    zeros = torch.zeros(12)
    assert fid.frechet(zeros, cov1, zeros, cov2) == pytest.approx(expected, rel=1e-6)


def test_frechet_of_other_dimensions():
    mu, cov = torch.zeros(4), covariance(4)
    with pytest.raises(UserError, match="4 against 3"):
        fid.frechet(mu, cov, mu[:3], cov[:3, :3])


@pytest.mark.parametrize("signs", [(1, -1), (-1, 1)])
def test_frechet_without_a_covariance(signs):
    mu, cov = torch.zeros(4), covariance(4)
    with pytest.raises(ValueError, match="not a covariance"):
        fid.frechet(mu, signs[0] * cov, mu, signs[1] * cov)


# ---- KID -----------------------------------------------------------------------------------------


def mmd_by_hand(x, y):
    kernel = lambda a, b: (float(a @ b) / len(a) + 1) ** 3
    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j)
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j)
    xy = sum(kernel(a, b) for a in x for b in y)
    return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)


def test_kid_by_hand():
    """The size of a subset is reduced to 7: every subset is the whole set."""
    x, y = randn(7, 3, seed=1), randn(7, 3, seed=2) + 1
    mean, std = fid.kid(x, y)
    assert mean == pytest.approx(mmd_by_hand(x, y), rel=1e-10)
    assert std < 1e-12


def test_kid_of_one_subset():
    x, y = randn(7, 3, seed=1), randn(7, 3, seed=2) + 1
    mean, std = fid.kid(x, y, subsets=1, size=4, seed=5)
    generator = torch.Generator().manual_seed(5)
    a = x[torch.randperm(7, generator=generator)[:4]]
    b = y[torch.randperm(7, generator=generator)[:4]]
    assert mean == pytest.approx(mmd_by_hand(a, b), rel=1e-10)
    assert std == 0


def test_kid_of_halves():
    x = randn(2000, 8)
    mean, std = fid.kid(x[:1000], x[1000:], subsets=50, size=100)
    assert abs(mean) < 3 * std / 50**0.5 + 0.01
    assert std > 0


def test_kid_is_unbiased():
    """A V-statistic would be positive."""
    values = []
    for i in range(200):
        x, y = randn(20, 4, seed=2 * i), randn(20, 4, seed=2 * i + 1)
        values.append(fid.kid(x, y, subsets=1)[0])
    assert abs(np.mean(values)) < 4 * np.std(values) / 200**0.5
    assert min(values) < 0


def test_kid_of_a_shift():
    x = randn(2000, 8)
    assert fid.kid(x[:1000], x[1000:] + 1, subsets=20, size=100)[0] > 0.5


def test_kid_depends_on_the_seed():
    x = randn(2000, 8)
    first, again, other = (fid.kid(x, x[:500], 3, 50, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_kid_of_one_feature():
    with pytest.raises(ValueError):
        fid.kid(randn(1, 8), randn(5, 8))


# ---- precision, recall, density, coverage --------------------------------------------------------


@pytest.mark.parametrize(
    "k, expected",
    [
        # real radii 1, 1, 2, 4; fake radii 3, 3, 95
        # fake 2 is in the balls of 1 (border) and 3, fake 5 in those of 3 (border) and 7
        # reals 0, 1, 3 are in the ball of fake 2, 7 in that of fake 5
        (1, dict(precision=2 / 3, recall=1, density=4 / 3, coverage=3 / 4)),
        # real radii 3, 2, 3, 6; fake radii 98, 95, 98
        # fake 2 is in all balls (of 7: 5 <= 6), fake 5 in those of 3 and 7
        (2, dict(precision=2 / 3, recall=1, density=6 / 6, coverage=1)),
    ],
)
def test_prdc_by_hand(k, expected):
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    fake = torch.tensor([[2.0], [5.0], [100.0]])
    assert fid.prdc(real, fake, k) == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_prdc_of_equal_sets(k):
    """Integers: distances on a border are exact."""
    x = torch.from_numpy(np.random.RandomState(0).randint(0, 2**20, (150, 1)))
    expected = dict(precision=1, recall=1, density=(k + 1) / k, coverage=1)
    assert fid.prdc(x, x, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_prdc_of_distant_sets(k):
    x = randn(60, 4)
    expected = dict(precision=0, recall=0, density=0, coverage=0)
    assert fid.prdc(x, x + 1000, k) == expected


@pytest.mark.parametrize("k", [1, 3, 5])
def test_prdc_of_a_collapse(k):
    real = randn(60, 4)
    found = fid.prdc(real, real[:1] + 1e-6 * randn(60, 4, seed=1), k)
    assert found["precision"] == 1
    assert found["recall"] < 0.05
    assert found["coverage"] < 0.5


@pytest.mark.parametrize("k", [1, 3, 5])
def test_prdc_of_one_distribution(k):
    found = fid.prdc(randn(500, 3), randn(500, 3, seed=1), k)
    assert abs(found["density"] - 1) < 0.15
    assert found["precision"] > 0.6
    assert found["recall"] > 0.6
    assert found["coverage"] > 0.4


def test_prdc_does_not_depend_on_blocks():
    x, y = randn(53, 4), randn(31, 4, seed=1) * 1.3
    whole = fid.prdc(x, y)
    assert 0 < whole["recall"] < 1
    assert fid.prdc(x, y, block=7) == pytest.approx(whole)
    assert fid.prdc(x.float(), y.half(), block=30) == pytest.approx(whole)


def test_prdc_of_duplicates():
    """A duplicate is a neighbour at distance zero."""
    twice = torch.tensor([[0.0], [0.0], [9.0], [9.0]])
    found = fid.prdc(twice, torch.tensor([[1.0], [2.0]]), k=1)
    assert found == dict(precision=0, recall=0.5, density=0, coverage=0)


@pytest.mark.parametrize("spoil", [lambda x: x[:3], lambda x: x[0], lambda x: x * float("nan")])
def test_prdc_of_bad_features(spoil):
    x = randn(53, 4)
    with pytest.raises(ValueError):
        fid.prdc(x, spoil(x))
