"""common/fid.py: the network against stored outputs of another implementation; closed forms."""

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

BRANCH_SUMS = [
    208.124,
    249.289,
    255.883,
    206.429,
    196.916,
    142.04,
]  # printed by torch-fidelity 0.4.0, see below


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(d, seed=0):
    a = randn(d, 2 * d, seed=seed)
    return a @ a.T / (2 * d)


@pytest.fixture(scope="module")
def net():
    """Inception with random weights of usable scale; RandomState gives the same
    numbers in all versions of numpy, so the outputs can be stored."""
    rng, net = np.random.RandomState(0), Inception()
    for key, v in sorted(net.state_dict().items()):
        if key.endswith("num_batches_tracked"):
            continue
        w = torch.from_numpy(rng.standard_normal(tuple(v.shape)).astype(np.float32))
        if v.ndim > 1:
            w *= (2 / v[0].numel()) ** 0.5
        elif key.endswith("bn.weight") or key.endswith("running_var"):
            w = 1 + 0.1 * w.clamp(-3, 3)
        else:
            w *= 0.1
        v.copy_(w)
    return net


@pytest.fixture(scope="module")
def image():
    return torch.from_numpy(
        np.random.RandomState(1).randint(0, 256, (1, 3, 40, 32)).astype(np.uint8)
    )


# --- Inception ------------------------------------------------------------------------------------


def test_keys_and_parameters(net):
    state = net.state_dict()
    assert len(state) == 566 and sum(k.endswith("num_batches_tracked") for k in state) == 94
    assert sum(p.numel() for p in net.parameters()) == 23_850_960
    assert state["fc.weight"].shape == (1008, 2048) and state[
        "Mixed_7c.branch3x3dbl_3b.conv.weight"
    ].shape == (384, 384, 3, 1)
    assert state["Mixed_6b.branch7x7dbl_4.conv.weight"].shape == (128, 128, 7, 1)
    assert all(m.eps == 1e-3 for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_outputs_equal_those_of_torch_fidelity(net, image):
    """Printed by torch-fidelity 0.4.0's extractor for these weights, this image."""
    features, logits = net(image)
    assert (
        features.shape == (1, 2048)
        and logits.shape == (1, 1008)
        and features.dtype == logits.dtype == torch.float32
    )
    branches = features.split([320, 384, 384, 384, 384, 192], 1)  # of Mixed_7c
    assert [b.sum().item() for b in branches] == pytest.approx(BRANCH_SUMS, rel=2e-4)
    assert [
        features.square().sum().item(),
        logits.sum().item(),
        logits.square().sum().item(),
    ] == pytest.approx([2145.24, -70.5135, 2064.57], rel=2e-4)


def test_torch_fidelity_itself(net, image, tmp_path):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.save(net.state_dict(), tmp_path / "w.pth")
    other = module.FeatureExtractorInceptionV3(
        "net", ["2048", "logits"], feature_extractor_weights_path=str(tmp_path / "w.pth")
    )
    with torch.no_grad():
        for a, b in zip(net(image), other(image)):
            assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize(
    "name,channels,kind",
    [
        ("Mixed_5b", 192, "avg"),
        ("Mixed_6b", 768, "avg"),
        ("Mixed_7b", 1280, "avg"),
        ("Mixed_7c", 2048, "max"),
    ],
)
def test_pool_branch(net, name, channels, kind):
    """Average without the padding's zeros, except for the last block,
    which takes the maximum: no key tells them apart."""
    block, x = getattr(net, name), randn(1, channels, 3, 3).float()
    windows = F.unfold(F.pad(x, (1, 1, 1, 1), value=float("nan")), 3).view(1, channels, 9, 9)
    pooled = windows.nanmean(2) if kind == "avg" else windows.nan_to_num(-1e9).amax(2)
    with torch.no_grad():
        want = block.branch_pool(pooled.view(1, channels, 3, 3))
        got = block(x)[:, -want.shape[1] :]
    assert torch.allclose(got, want, atol=1e-5) and want.abs().sum() > 0


def test_last_pool_changes_the_features(net, image, monkeypatch):
    x = F.interpolate(image.float(), size=(75, 75)).sub(128).div(128)
    with torch.no_grad():
        f = net.body(x.repeat(1, 1, 2, 2))[0]
        monkeypatch.setattr(net.Mixed_7c, "pool", POOLS["avg"])
        g = net.body(x.repeat(1, 1, 2, 2))[0]
    assert (f - g).norm() > 0.05 * f.norm()


def test_inception_input(net, image, monkeypatch):
    monkeypatch.setattr(net, "body", lambda x: x)  # what the network would see
    assert torch.equal(net(image), (resize_tf1(image.float()) - 128) / 128)
    assert torch.equal(net(image, resize="clean"), (resize_clean(image) - 128) / 128)
    grey = image[:, :1]
    assert torch.equal(net(grey), net(grey.repeat(1, 3, 1, 1)))
    assert torch.equal(net(torch.zeros_like(image)), torch.full((1, 3, 299, 299), -1.0))
    for wrong in (image.float() / 127.5 - 1, image[0], image[:, :2]):
        with pytest.raises(ValueError, match="uint8"):
            net(wrong)
    with pytest.raises(ValueError, match="resize"):
        net(image, resize="bilinear")


def test_inception_never_trains(net, image):
    net.train()
    assert not any(m.training for m in net.modules()) and not any(
        p.requires_grad for p in net.parameters()
    )
    a = net.Conv2d_1a_3x3(torch.zeros(1, 3, 9, 9))
    with torch.autocast(
        "cpu", dtype=torch.bfloat16
    ):  # a training loop's autocast must not reach the features
        small = Inception.__new__(Inception)
        torch.nn.Module.__init__(small)
        small.body = lambda x: net.Conv2d_1a_3x3(x)
        b = small(torch.full((1, 3, 9, 9), 128, dtype=torch.uint8))
    assert b.dtype == torch.float32 and torch.equal(a[0, :, 0, 0], b[0, :, 0, 0])


# --- weights file ---------------------------------------------------------------------------------


def test_weights_round_trip(net, tmp_path, capsys):
    path = tmp_path / "w.pth"
    torch.save(
        {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}, path
    )
    before = torch.get_rng_state()
    loaded, prefix = load_inception(path, force=True)
    assert torch.equal(
        before, torch.get_rng_state()
    )  # an evaluation must not change the run around it
    assert len(prefix) == 8 and prefix in capsys.readouterr().out
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in loaded.state_dict().items())
    with pytest.raises(UserError, match=f"6726825d.*{prefix}") as e:  # without force
        load_inception(path)
    one_line(e, path)


def one_line(e, path):
    text = str(e.value)
    assert (
        "\n" not in text
        and str(path) in text
        and "expected" in text
        and "found" in text
        and len(text) < 400
    )


class Payload:
    """Unpickling this creates the marker file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("save", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_pickle_posing_as_weights(tmp_path, save, force):
    marker, path = tmp_path / "marker", tmp_path / "w.pth"
    save({"fc.weight": Payload(marker)}, path)
    with pytest.raises(UserError) as e:
        load_inception(path, force=force)
    one_line(e, path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker))).close()
    assert marker.exists()  # the payload is live


def test_bad_weight_files(net, tmp_path):
    path = tmp_path / "w.pth"
    state = net.state_dict()
    small = {k: v for k, v in state.items() if v.numel() < 100}  # mostly missing
    wrong_shape = {**state, "fc.bias": torch.zeros(1000)}
    for content, text in [
        (small, "absent"),
        ([1, 2], "state dict"),
        ({"a": 1}, "state dict"),
        (torch.zeros(3), "state dict"),
    ]:
        torch.save(content, path)
        with pytest.raises(UserError, match=text) as e:
            load_inception(path, force=True)
        one_line(e, path)
    torch.save(wrong_shape, path)
    with pytest.raises(UserError, match=r"fc.bias \[1008\], found \[1000\]") as e:
        load_inception(path, force=True)
    one_line(e, path)
    for missing in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(UserError) as e:
            load_inception(missing)
        one_line(e, missing)
    path.write_bytes(b"")
    with pytest.raises(UserError) as e:
        load_inception(path, force=True)
    one_line(e, path)


# --- pixels ---------------------------------------------------------------------------------------


def test_resize_tf1_by_hand():
    x = torch.tensor([[0.0, 8.0], [100.0, 108.0]])[None, None]
    # size 4: sources 0, 0.5, 1, 1.5 (held at 1): fractions 0, 0.5, 1, 1 of the way
    t = torch.tensor([0.0, 0.5, 1.0, 1.0])
    assert torch.equal(resize_tf1(x, 4)[0, 0], 100 * t[:, None] + 8 * t[None, :])
    # size 3: sources 0, 2/3, 4/3 (held)
    t = torch.tensor([0.0, 2 / 3, 1.0])
    assert torch.allclose(resize_tf1(x, 3)[0, 0], 100 * t[:, None] + 8 * t[None, :], atol=1e-5)
    # shrinking does not average: every output lies at i * H / size
    row = torch.tensor([0.0, 10.0, 0.0, 30.0, 0.0, 50.0])[None, None, None].expand(1, 1, 6, 6)
    assert torch.equal(
        resize_tf1(row, 4)[0, 0, 0], torch.tensor([0.0, 5.0, 30.0, 25.0])
    )  # 0, 1.5, 3, 4.5
    assert torch.equal(resize_tf1(row, 3)[0, 0, 0], torch.tensor([0.0, 0.0, 0.0]))


@pytest.mark.parametrize("h,w", [(7, 299), (299, 5), (64, 400), (600, 30)])
def test_resize_tf1_ramp(h, w):
    """On a ramp the value is the source position itself, up to the last pixel,
    whether the axis grows or shrinks."""
    y, x = torch.arange(h, dtype=torch.float64), torch.arange(w, dtype=torch.float64)
    i = torch.arange(299, dtype=torch.float64)
    got = resize_tf1((y[:, None] + 1000 * x[None, :])[None, None])[0, 0]
    want = (i * h / 299).clamp(max=h - 1)[:, None] + 1000 * (i * w / 299).clamp(max=w - 1)[None, :]
    assert torch.allclose(got, want, rtol=0, atol=1e-7)


def test_resize_identity_and_constant():
    u = torch.from_numpy(
        np.random.RandomState(0).randint(0, 256, (2, 3, 299, 299)).astype(np.uint8)
    )
    assert torch.equal(resize_tf1(u.float()), u.float()) and torch.equal(resize_clean(u), u.float())
    for n in (1, 28, 400):
        c = torch.full((1, 1, n, n), 77, dtype=torch.uint8)
        assert torch.equal(resize_tf1(c), torch.full((1, 1, 299, 299), 77.0))
        assert torch.allclose(resize_clean(c), torch.full((1, 1, 299, 299), 77.0), atol=1e-3)


def test_resize_clean():
    u = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (2, 3, 20, 31)).astype(np.uint8))
    out = resize_clean(u, 16)
    assert (
        out.shape == (2, 3, 16, 16)
        and out.dtype == torch.float32
        and out.min() >= 0
        and out.max() <= 255
    )
    assert (out != out.round()).any()  # not quantised
    one = Image.fromarray(u[1, 2].numpy().astype(np.float32)).resize(
        (16, 16), Image.Resampling.BICUBIC
    )  # each plane on its own
    assert torch.allclose(out[1, 2], torch.from_numpy(np.array(one)).clamp(0, 255))
    edge = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    edge[..., 4:] = 255  # bicubic overshoots at an edge; clean-fid clips
    assert resize_clean(edge).min() == 0 and resize_clean(edge).max() == 255
    noise = torch.from_numpy(
        np.random.RandomState(0).randint(0, 256, (1, 1, 598, 598)).astype(np.uint8)
    )
    assert resize_clean(noise).std() < 0.7 * resize_tf1(noise).std()  # antialiased against not


# --- statistics -----------------------------------------------------------------------------------


def stats_of(x, sizes=None):
    s = fid.Stats(x.shape[1])
    for part in x.split(sizes or len(x)):
        s.update(part)
    return s


def test_streaming_equals_batch():
    x = randn(100, 6) * 3 + 5
    s = stats_of(x, [1, 30, 2, 17, 25, 5, 20])
    mu, cov = s.mean_cov()
    assert s.n == 100 and mu.dtype == cov.dtype == torch.float64
    np.testing.assert_allclose(mu, x.mean(0), atol=1e-10)
    np.testing.assert_allclose(cov, np.cov(x.numpy(), rowvar=False), atol=1e-10)


def test_stats_are_float64_inside():
    x = (randn(4000, 2) + 1000).float()  # float32 sums of squares would lose the variance
    np.testing.assert_allclose(
        stats_of(x, 50).mean_cov()[1], np.cov(x.double().numpy(), rowvar=False), rtol=1e-6
    )


def test_stats_misuse():
    s = fid.Stats(3)
    for wrong in (torch.zeros(2, 4), torch.zeros(3)):
        with pytest.raises(ValueError):
            s.update(wrong)
    with pytest.raises(ValueError, match="n=0"):
        s.mean_cov()
    s.update(torch.tensor([[1.0, 2.0, float("nan")], [0.0, 0.0, 0.0]]))
    with pytest.raises(ValueError, match="finite"):
        s.mean_cov()


def test_stats_file(tmp_path):
    mu, cov = randn(4), spd(4)
    path = tmp_path / "ref.npz"
    fid.save_stats(path, mu, cov, 50000, "fid50k inception-tf1resize uint8")
    d = fid.load_stats(path)
    assert (
        torch.equal(d["mu"], mu)
        and torch.equal(d["sigma"], cov)
        and d["n"] == 50000
        and d["protocol"] == "fid50k inception-tf1resize uint8"
    )
    assert os.listdir(tmp_path) == ["ref.npz"]  # no temporary file stays
    np.savez(path, mu=mu.numpy().astype(np.float32), sigma=cov.numpy())  # EDM's layout
    d = fid.load_stats(path)
    assert d["n"] is None and d["protocol"] is None and d["mu"].dtype == torch.float64


def bad_stats(tmp_path):
    ok = dict(mu=np.zeros(3), sigma=np.eye(3))
    for k, arrays in enumerate(
        [
            dict(mu=ok["mu"]),
            dict(x=np.zeros(3)),
            {**ok, "mu": np.zeros((3, 1))},
            {**ok, "sigma": np.eye(2)},
            {**ok, "sigma": np.zeros(3)},
            {**ok, "mu": np.zeros(3, int)},
            {**ok, "mu": np.array(list("abc"))},
            {**ok, "sigma": np.full((3, 3), np.nan)},
            {**ok, "n": np.zeros(2)},
            {**ok, "mu": np.array([None, 1, 2], dtype=object)},
        ]
    ):
        np.savez(tmp_path / f"{k}.npz", **arrays)
        yield tmp_path / f"{k}.npz"
    np.save(tmp_path / "single.npy", np.zeros(3))
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_text("not an archive")
    whole = (tmp_path / "0.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    yield from (
        tmp_path / name for name in ("single.npy", "empty.npz", "text.npz", "cut.npz", "none.npz")
    )
    yield tmp_path


def test_bad_stats_files(tmp_path):
    for path in bad_stats(tmp_path):
        with pytest.raises(UserError) as e:
            fid.load_stats(path)
        one_line(e, path)


def test_pickle_posing_as_stats(tmp_path):
    marker, raw, inside = tmp_path / "marker", tmp_path / "raw.npz", tmp_path / "inside.npz"
    raw.write_bytes(pickle.dumps(dict(mu=Payload(marker))))
    np.savez(inside, mu=np.array([Payload(marker)], dtype=object), sigma=np.eye(1))
    for path in (raw, inside):
        with pytest.raises(UserError) as e:
            fid.load_stats(path)
        one_line(e, path)
    assert not marker.exists()


# --- Frechet distance -----------------------------------------------------------------------------


def test_frechet_one_dimension():
    got = fid.frechet(
        torch.tensor([1.0]), torch.tensor([[4.0]]), torch.tensor([-2.0]), torch.tensor([[0.25]])
    )
    assert got == pytest.approx(3**2 + 1.5**2, abs=1e-12)


def test_frechet_diagonal_and_rotation():
    m1, m2, a, b = (
        randn(5, seed=1),
        randn(5, seed=2),
        randn(5, seed=3).square(),
        randn(5, seed=4).square(),
    )
    want = ((m1 - m2).square().sum() + (a.sqrt() - b.sqrt()).square().sum()).item()
    assert fid.frechet(m1, a.diag(), m2, b.diag()) == pytest.approx(want, rel=1e-12)
    assert fid.frechet(m1.numpy(), a.diag().numpy(), m2.numpy(), b.diag().numpy()) == pytest.approx(
        want, rel=1e-12
    )
    q = torch.linalg.qr(randn(5, 5)).Q
    rotate = lambda m, c: (q @ m, q @ c @ q.T)
    assert fid.frechet(*rotate(m1, a.diag()), *rotate(m2, b.diag())) == pytest.approx(
        want, rel=1e-10
    )


def test_frechet_laws():
    (m1, c1), (m2, c2) = (randn(8, seed=1), spd(8, 1)), (randn(8, seed=2), spd(8, 2))
    base, shift = fid.frechet(m1, c1, m2, c2), randn(8, seed=3)
    assert fid.frechet(m2, c2, m1, c1) == pytest.approx(base, rel=1e-10)
    assert fid.frechet(3 * m1, 9 * c1, 3 * m2, 9 * c2) == pytest.approx(9 * base, rel=1e-10)
    assert fid.frechet(m1, c1, m1 + shift, c1) == pytest.approx(
        shift.square().sum().item(), rel=1e-8
    )
    assert fid.frechet(m1, c1, m1, c1) == pytest.approx(0, abs=1e-6)
    low = stats_of(randn(6, 8)).mean_cov()  # rank 5 in 8 dimensions
    assert fid.frechet(*low, *low) == pytest.approx(0, abs=1e-6)
    assert fid.frechet(m1, 0 * c1, m1, c2) == pytest.approx(c2.trace().item(), rel=1e-12)


def test_frechet_equals_sqrtm():
    linalg = pytest.importorskip("scipy.linalg")
    c1, c2 = spd(12, 1), spd(12, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = linalg.sqrtm((c1 @ c2).numpy())
    if not isinstance(root, np.ndarray):
        pytest.skip("this scipy returns no matrix")
    want = (c1.trace() + c2.trace()).item() - 2 * np.trace(root).real
    assert fid.frechet(torch.zeros(12), c1, torch.zeros(12), c2) == pytest.approx(want, rel=1e-6)


def test_frechet_complaints():
    m, c = torch.zeros(4), spd(4)
    with pytest.raises(UserError, match="4 against 3"):
        fid.frechet(m, c, m[:3], c[:3, :3])
    for pair in ((c, -c), (-c, c)):
        with pytest.raises(ValueError, match="not a covariance"):
            fid.frechet(m, pair[0], m, pair[1])


# --- KID, precision and recall, diversity ---------------------------------------------------------


def mmd_by_hand(x, y):
    k = lambda a, b: (float(a @ b) / len(a) + 1) ** 3
    n, m = len(x), len(y)
    return (
        sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        + sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
        - 2 * sum(k(a, b) for a in x for b in y) / (n * m)
    )


def test_kid_by_hand():
    x, y = randn(7, 3, seed=1), randn(7, 3, seed=2) + 1
    mean, std = fid.kid(x, y)  # size falls to 7: every subset is the whole set
    assert mean == pytest.approx(mmd_by_hand(x, y), rel=1e-10) and std < 1e-12
    mean, std = fid.kid(x, y, subsets=1, size=4, seed=5)
    g = torch.Generator().manual_seed(5)
    a, b = x[torch.randperm(7, generator=g)[:4]], y[torch.randperm(7, generator=g)[:4]]
    assert mean == pytest.approx(mmd_by_hand(a, b), rel=1e-10) and std == 0


def test_kid_of_halves_and_shift():
    x = randn(2000, 8)
    mean, std = fid.kid(x[:1000], x[1000:], subsets=50, size=100)
    assert abs(mean) < 3 * std / 50**0.5 + 0.01 and std > 0
    runs = [
        fid.kid(randn(20, 4, seed=2 * i), randn(20, 4, seed=2 * i + 1), subsets=1)[0]
        for i in range(200)
    ]
    assert (
        abs(np.mean(runs)) < 4 * np.std(runs) / 200**0.5 and min(runs) < 0
    )  # unbiased: a V-statistic would be positive
    assert fid.kid(x[:1000], x[1000:] + 1, subsets=20, size=100)[0] > 0.5
    assert fid.kid(x, x[:500], subsets=3, size=50, seed=1) == fid.kid(
        x, x[:500], subsets=3, size=50, seed=1
    )
    assert fid.kid(x, x[:500], subsets=3, size=50, seed=1) != fid.kid(
        x, x[:500], subsets=3, size=50, seed=2
    )
    with pytest.raises(ValueError):
        fid.kid(x[:1], x)


def test_prdc_by_hand():
    real, fake = torch.tensor([[0.0], [1.0], [3.0], [7.0]]), torch.tensor([[2.0], [5.0], [100.0]])
    # k = 1: real radii 1, 1, 2, 4; fake radii 3, 3, 95.
    # fake 2 lies in the balls of 1 (border), 3; fake 5 in those of 3 (border), 7; fake 100 in none.
    # reals 0, 1, 3 lie in the ball of fake 2; 7 in that of fake 5.
    assert fid.prdc(real, fake, k=1) == pytest.approx(
        dict(precision=2 / 3, recall=1, density=4 / 3, coverage=3 / 4)
    )
    # k = 2: real radii 3, 2, 3, 6; fake 2 lies in all balls (7: 5 <= 6), fake 5 in 3 and 7.
    # Fake radii 98, 95, 98.
    assert fid.prdc(real, fake, k=2) == pytest.approx(
        dict(precision=2 / 3, recall=1, density=6 / 6, coverage=1)
    )


@pytest.mark.parametrize("k", [1, 3, 5])
def test_prdc_sets(k):
    x = torch.from_numpy(
        np.random.RandomState(0).randint(0, 2**20, (150, 1))
    )  # integers: distances on a border are exact
    same = fid.prdc(x, x, k)
    assert same == pytest.approx(
        dict(precision=1, recall=1, density=(k + 1) / k, coverage=1), abs=1e-12
    )
    y = randn(60, 4)
    assert fid.prdc(y, y + 1000, k) == dict(precision=0, recall=0, density=0, coverage=0)
    collapsed = fid.prdc(y, y[:1] + 1e-6 * randn(60, 4, seed=1), k)
    assert (
        collapsed["precision"] == 1 and collapsed["recall"] < 0.05 and collapsed["coverage"] < 0.5
    )
    like = fid.prdc(randn(500, 3), randn(500, 3, seed=1), k)
    assert (
        abs(like["density"] - 1) < 0.15
        and like["precision"] > 0.6
        and like["recall"] > 0.6
        and like["coverage"] > 0.4
    )


def test_prdc_blocks_and_duplicates():
    x, y = randn(53, 4), randn(31, 4, seed=1) * 1.3
    whole = fid.prdc(x, y)
    assert (
        0 < whole["recall"] < 1
        and fid.prdc(x, y, block=7) == pytest.approx(whole)
        and fid.prdc(x.float(), y.half(), block=30) == pytest.approx(whole)
    )
    twice = torch.tensor(
        [[0.0], [0.0], [9.0], [9.0]]
    )  # a duplicate is a neighbour at distance zero
    assert fid.prdc(twice, torch.tensor([[1.0], [2.0]]), k=1) == dict(
        precision=0, recall=0.5, density=0, coverage=0
    )
    for wrong in (x[:3], x[0], x * float("nan")):
        with pytest.raises(ValueError):
            fid.prdc(x, wrong)
