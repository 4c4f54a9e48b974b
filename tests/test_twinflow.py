"""twinflow.py: its equations on Gaussians whose velocity and flow map are known, then the first
iteration of a run against the formulas written out.

Expected numbers were derived apart from the code.
"""

import dataclasses
import math

import pytest
import torch
from helpers import byhand
from helpers.frame import check_frame
from helpers.gaussian import GaussFlow, f64, full, normal
from helpers.runs import QUICK, log, run_processes
from helpers.trace import Trace, record_calls, run_main

import twinflow
from common.errors import UserError
from common.model import Model
from common.rng import BatchRandom
from common.sampling import generate
from common.schedules import VP, Flow, expand
from common.teachers.load import load_teacher
from common.teachers.toy import MLP, Toy
from data.images import load_images
from training import run

GAUSS = GaussFlow(0.3, 0.5)


class Exact:
    """The exact mean velocity as a network: (x_t, alpha, sigma, cond) -> clean estimate.

    Rows of the fake velocity are for the data `fake`.
    """

    schedule = Flow()

    def __init__(self, real=GAUSS, fake=None):
        self.real = real
        self.fake = fake or real
        self.calls = 0

    def __call__(self, x, alpha, sigma, cond):
        self.calls += 1
        t = sigma.expand(len(x))
        is_fake = expand(cond["fake"][:, 1], x) > 0
        real = self.real.mean_velocity(x, t, cond["r"][:, 0])
        v = torch.where(is_fake, self.fake.velocity(x, t), real)
        return x - expand(t, x) * v


def tiny():
    """An untrained small network, on the toy's points."""
    torch.manual_seed(0)
    return Toy(MLP(width=16, depth=2), Flow(), "flow", (2,), 8, labelled=True)


def trained(seed=1):
    """A small student whose weights have moved away from their start."""
    torch.manual_seed(seed)
    net = tiny().copy().extend("r", "fake")
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return net


def uniform(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, dtype=torch.float64, generator=generator)


# ---- (1), (2): path, velocity, one-step sample ---------------------------------------------------


def test_eq01_path_and_velocity():
    x, z = normal(50, 3), normal(50, 3, seed=1)
    t = uniform(50) * 0.98 + 0.01
    s = t[:, None]
    x_t = twinflow.mix(x, z, t)
    assert torch.allclose(x_t, s * z + (1 - s) * x, atol=1e-15)
    knows_x = lambda *args: x
    assert (twinflow.velocity(knows_x, x_t, t, t, {}) - (z - x)).abs().max() < 1e-12
    v = GAUSS.velocity(x_t, t)
    assert (GAUSS.score(x_t, t) + (x_t + (1 - s) * v) / s).abs().max() < 1e-12
    assert (twinflow.velocity(Exact(), x_t, t, t, {}) - v).abs().max() < 1e-12
    mean = GAUSS.mean_velocity(x_t, t, 0.3 * t)
    assert (twinflow.velocity(Exact(), x_t, t, 0.3 * t, {}) - mean).abs().max() < 1e-12


def test_eq01_numbers():
    one = torch.ones(3, 1, dtype=torch.float64)
    t = f64(0.25, 0.5, 0.75)
    found = twinflow.velocity(Exact(), one, t, t, {}).flatten().tolist()
    assert found == pytest.approx([-0.0615385, 0.72, 0.8], abs=1e-7)
    found = twinflow.velocity(Exact(), one[:1], full(1.0, 1), full(0.0, 1), {})
    assert found.item() == pytest.approx(0.2)
    mean = GAUSS.mean_velocity(one[:1], full(0.8, 1), full(0.2, 1))
    assert mean.item() == pytest.approx(0.3976364, abs=1e-7)


def test_eq01_one_step_sample():
    """mean + std z, with this sign."""
    z = normal(1000, 2)
    assert (twinflow.one_step(Exact(), z, {}, 1.0) - (0.3 + 0.5 * z)).abs().max() < 1e-12


def test_eq02_negative_times_are_the_fake_velocity():
    """t = r = -s is the fake velocity at noise level s, and nothing but the velocity changes."""
    fake = GaussFlow(-0.4, 0.9)
    x, s = normal(20, 3), uniform(20)
    net = Exact(GAUSS, fake)
    found = twinflow.velocity(net, x, -s, -s, {})
    assert torch.allclose(found, fake.velocity(x, s), atol=1e-12)
    found = twinflow.velocity(net, x, s, s, {})
    assert torch.allclose(found, GAUSS.velocity(x, s), atol=1e-12)


def test_eq02_a_trained_network_tells_the_two_velocities_apart():
    net = trained()
    x, s = normal(20, 2).float(), uniform(20)
    cond = net.encode(torch.arange(20) % 8)
    minus = twinflow.velocity(net, x, -s, -s, cond)
    plus = twinflow.velocity(net, x, s, s, cond)
    assert (minus - plus).abs().amax(1).min() > 1e-4


@pytest.mark.parametrize("name", ["toy-cond", "mnist"])
def test_eq02_the_student_starts_as_its_teacher(name):
    """Bit for bit, for every r and for both signs of t."""
    # of the toy: its network, not the exact mixture
    teacher = load_teacher(name).copy().requires_grad_(False)
    net = teacher.copy().extend("r", "fake")
    n = 6
    x = torch.randn(n, *teacher.shape)
    cond = teacher.encode(torch.arange(n))
    t = torch.linspace(0.05, 1, n, dtype=torch.float64)
    xhat = teacher(x, 1 - t, t, cond).double()
    start = ((x.double() - xhat) / expand(t, x)).float()
    for times, r in ((t, t), (t, 0 * t), (t, 0.3 * t), (-t, -t)):
        assert torch.equal(twinflow.velocity(net, x, times, r, cond), start)
    if name == "mnist":  # this is the network's own output, up to conversions to x0 and back
        assert torch.allclose(start, teacher.predict(x, t.float(), cond), atol=1e-5)


def test_eq02_the_diagonal_never_sees_the_new_embeddings():
    """The factors t - r and [t < 0] keep F(x, t, t) free of E2 and E3, whatever they learn."""
    net = trained()
    x, t = torch.randn(6, 2), torch.linspace(0.1, 0.9, 6).double()
    cond = net.encode(torch.arange(6))
    before = twinflow.velocity(net, x, t, t, cond)
    off_diagonal = twinflow.velocity(net, x, t, 0 * t, cond)
    fake = twinflow.velocity(net, x, -t, -t, cond)
    for p in net.extras.parameters():
        p.data += torch.randn_like(p)
    assert torch.equal(twinflow.velocity(net, x, t, t, cond), before)
    assert not torch.allclose(twinflow.velocity(net, x, t, 0 * t, cond), off_diagonal)
    assert not torch.allclose(twinflow.velocity(net, x, -t, -t, cond), fake)


# ---- (3): guidance -------------------------------------------------------------------------------


def test_eq03_strength_of_an_effective_scale():
    assert twinflow.guidance_strength(5.0, "target", False) == pytest.approx(0.8)
    assert twinflow.guidance_strength(5.0, "frozen", False) == pytest.approx(4.0)
    assert twinflow.guidance_strength(5.0, "frozen", True) == pytest.approx(5.0)


@pytest.mark.parametrize("scale, expected", [(2.0, 1.8), (5.0, 4.2), (1.0, 1.0), (0.8, 0.84)])
def test_eq03_fixed_point_of_a_network_that_guides_itself(scale, expected):
    """Iterating the target from any start ends at the effective scale."""
    c, u = 1.0, 0.2
    k = twinflow.guidance_strength(scale, "target", False)
    v = 0.0
    for _ in range(200):
        v = c + k * (v - u)
    assert v == pytest.approx(expected)
    assert expected == pytest.approx(u + scale * (c - u))


def test_eq03_scale_by_a_frozen_guide():
    c, u = 1.0, 0.2
    k = twinflow.guidance_strength(5.0, "frozen", False)
    assert c + k * (c - u) == pytest.approx(4.2)
    k = twinflow.guidance_strength(5.0, "frozen", True)
    assert u + k * (c - u) == pytest.approx(4.2)


@pytest.fixture
def guidance_case():
    teacher = load_teacher("toy-cond")
    n = 8
    x, v = torch.randn(n, 2), torch.randn(n, 2)
    t = torch.linspace(0.1, 0.9, n).double()
    return teacher, teacher.encode(torch.arange(n)), teacher.null(n), x, v, t


def test_eq03_guided_velocity(guidance_case):
    teacher, cond, null, x, v, t = guidance_case
    v_c = twinflow.velocity(teacher, x, t, t, cond)
    v_e = twinflow.velocity(teacher, x, t, t, null)
    found = twinflow.guided(v, teacher, x, t, cond, null, 0.5)
    assert torch.allclose(found, v + 0.5 * (v_c - v_e), atol=1e-5)


def test_eq03_without_images_is_the_teachers_guided_velocity(guidance_case):
    teacher, cond, null, x, v, t = guidance_case
    expected = (x - teacher.guided(x, 1 - t, t, cond, 3.0)) / t[:, None]
    found = twinflow.guided(v, teacher, x, t, cond, null, 3.0, image_free=True)
    assert torch.allclose(found.double(), expected, atol=1e-4)


# ---- (4), (5): the any-step target ---------------------------------------------------------------


def residual(x, t, r, v=None, order=2):
    """R of (5) for the exact mean velocity, without clamp. v: the exact velocity by default."""
    pred = GAUSS.mean_velocity(x, t, r)
    v = GAUSS.velocity(x, t) if v is None else v
    net = GAUSS.mean_velocity
    return pred - twinflow.rcgm_target(pred, v, x, t, r, net, order, math.inf)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_eq04_of_a_perfect_network_does_not_depend_on_the_order(order):
    x, t = normal(200, 1), 0.1 + 0.9 * uniform(200)
    r = (t - 0.01) * uniform(200, seed=1)
    difference = residual(x, t, r, order=order) - residual(x, t, r, order=7)
    assert difference.abs().max() < 1e-11


@pytest.mark.parametrize(
    "delta, expected",
    [
        (0.01, [-1.0411e-3, 1.7975e-3, -2.7027e-3]),
        (0.001, [-1.0210e-4, 1.7583e-4, -2.6451e-4]),
    ],
)
def test_eq05_residual_is_linear_in_delta(delta, expected, monkeypatch):
    monkeypatch.setattr(twinflow, "DELTA", delta)
    x = f64([[1.0], [-0.5], [0.4]])
    found = residual(x, f64(0.9, 0.7, 0.5), f64(0.0, 0.2, 0.1))
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-4)


def test_eq05_residual_of_any_velocity():
    """R = (X_r(x - D u, t - D) - X_r(x, t)) / D for a perfect network, whatever u is."""
    d, n = 0.01, 200
    x, u = normal(n, 2), 3 * normal(n, 2, seed=1)
    t, r = full(0.7, n), full(0.2, n)
    expected = (GAUSS.flow_map(x - d * u, t - d, r) - GAUSS.flow_map(x, t, r)) / d
    assert (residual(x, t, r, v=u) - expected).abs().max() < 1e-11


def test_eq05_residual_of_sample_velocities():
    """E[R] over x, z given x_t is the value of the exact velocity; its spread is the slope of the
    flow map times the spread of z - x."""
    n, t = 1_000_000, 0.7
    mean = GAUSS.velocity(full(0.5, 1)[:, None], full(t, 1)).item()
    spread = GAUSS.std / math.sqrt(GAUSS.variance(t))  # of z - x given x_t
    u = mean + spread * normal(n, 1)
    found = residual(full(0.5, n)[:, None], full(t, n), full(0.2, n), v=u)
    assert found.std().item() == pytest.approx(0.441, abs=2e-3)
    assert found.mean().item() == pytest.approx(-1.25e-3, abs=2e-3)


@pytest.mark.parametrize("r", [0.495, 0.5])
def test_eq05_near_the_diagonal(r):
    """R = F - v there, clamped: 0.3 moves to 0.9, and towards 2.0 by 1 only."""
    pred, x, t = full(0.3, 2)[:, None], normal(2, 1), full(0.5, 2)
    v = f64([[0.9], [2.0]])
    target = twinflow.rcgm_target(pred, v, x, t, full(r, 2), GAUSS.mean_velocity, 2, 1.0)
    assert target.flatten().tolist() == pytest.approx([0.9, 1.3])


@pytest.mark.parametrize("gap", [1e-2 - 1e-9, 1e-3, 1e-6, 0.0])
def test_eq05_float32_near_the_diagonal(gap):
    x, v, pred = (normal(100, 3, seed=i).float() for i in range(3))
    t = full(0.5, 100)
    target = twinflow.rcgm_target(pred, v, x, t, t - gap, GAUSS.mean_velocity, 2, math.inf)
    assert torch.allclose(target, v, atol=1e-6)


def test_eq05_order_zero_is_flow_matching():
    x, v, t = normal(9, 2), 7 * normal(9, 2, seed=1), uniform(9)
    target = twinflow.rcgm_target(0 * v, v, x, t, 0.5 * t, None, 0, 1.0)
    assert torch.equal(target, v)  # and no clamp


def test_targets_carry_no_gradient():
    net, x, t = trained(), normal(8, 2).float(), full(0.8, 8)
    cond = net.encode(torch.arange(8))
    mean_velocity = lambda y, a, b: twinflow.velocity(net, y, a, b, cond)
    pred = mean_velocity(x, t, 0 * t)
    assert pred.requires_grad
    target = twinflow.rcgm_target(pred, x, x, t, 0 * t, mean_velocity, 2, 1.0)
    assert not target.requires_grad
    twice = net.encode(torch.arange(16) % 8)
    both = lambda y, a, b: twinflow.velocity(net, y, a, b, twice)
    assert not twinflow.rectification(x - pred, x, t, both, 1.0).requires_grad
    assert not twinflow.one_step(net, x, cond, 1.0).requires_grad
    assert not twinflow.guided(pred, net, x, t, cond, net.null(8), 0.5).requires_grad


# ---- (6), (7): weight and distance ---------------------------------------------------------------


def test_eq06_time_weight():
    gap = f64(0, 0.01, 0.05, 0.25, 0.5, 1)
    expected = [4.0777, 3.9510, 3.5257, 2.3764, 1.7265, 1]
    found = twinflow.time_weight(torch.ones(6).double(), 1 - gap).tolist()
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "rms, ratio, tolerance", [(1.0, 1.00499, 1e-5), (0.01, 1.000, 2e-3), (1e-4, 0.10, 2e-3)]
)
def test_eq07_is_about_the_root_mean_square(rms, ratio, tolerance):
    q = rms * normal(4, 3, 8).sign()
    p = torch.zeros_like(q, requires_grad=True)
    d = twinflow.distance(p, q, "barron")
    assert d.shape == (4,)
    assert (d / rms - ratio).abs().max() < tolerance
    d.sum().backward()
    force = [2 * ratio / math.sqrt(24)] * 4  # nearly the same for all sizes of error
    assert p.grad.flatten(1).norm(dim=1).tolist() == pytest.approx(force, rel=0.02)
    assert torch.allclose(twinflow.distance(p, q, "l2"), full(rms**2, 4))


# ---- (8), (9): rectification ---------------------------------------------------------------------


def rect_gradient(mean, std, a, b, fake=None, n=400_000):
    """dE L_rect / d(b, a) for one-step samples a z + b and exact velocities. Quasi-random."""
    real = GaussFlow(mean, std)
    fake = fake or GaussFlow(b, a).velocity
    i = torch.arange(n, dtype=torch.float64) + 0.5
    s = i / n
    quantile = lambda u: math.sqrt(2) * torch.erfinv(2 * (u % 1) - 1)
    z0 = quantile(i * 0.7548776662466927)[:, None]
    z1 = quantile(i * 0.5698402909980532)[:, None]
    a = torch.tensor(a, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(b, dtype=torch.float64, requires_grad=True)
    x1 = a * z0 + b

    def net(y, t, r):
        s = t.abs()
        return torch.where(t[:, None] < 0, fake(y, s), real.velocity(y, s))

    g = twinflow.rectification(x1.detach(), z1, s, net, math.inf)
    pred = z0 - x1  # T = 1
    twinflow.distance(pred, (pred - g).detach(), "l2").mean().backward()
    return b.grad.item(), a.grad.item()


@pytest.mark.parametrize("std, integral", [(1.0, math.pi / 4), (0.5, 1.18283), (0.25, 1.67434)])
def test_eq09_of_a_shift(std, integral):
    """Descent moves b down to the mean."""
    db, da = rect_gradient(0.2, std, std, 1.2)
    assert db == pytest.approx(2 * integral, rel=2e-3)
    assert da == pytest.approx(0, abs=5e-3)


@pytest.mark.parametrize("a, expected", [(1.0, 0.795), (0.2, -0.267), (0.5, 0.0)])
def test_eq09_of_a_scale(a, expected):
    db, da = rect_gradient(0.3, 0.5, a, 0.3)
    assert da == pytest.approx(expected, abs=2e-3)
    assert db == pytest.approx(0, abs=2e-3)


def test_eq08_reused_noise_would_be_wrong():
    """If (8) noised a sample with the noise that made it, the fixed point would be 0.7077 instead
    of 0.5: why a run draws fresh noise (test_eq08_noise_is_fresh)."""

    def coupled(a):  # E[z - a z | (s + (1 - s) a) z = y]
        return lambda y, s: (1 - a) * y / (s + (1 - s) * a)[:, None]

    assert rect_gradient(0.0, 0.5, 0.7077, 0.0, coupled(0.7077))[1] == pytest.approx(0, abs=2e-3)
    assert abs(rect_gradient(0.0, 0.5, 0.5, 0.0, coupled(0.5))[1]) > 0.1


def test_eq09_is_zero_if_fake_equals_real():
    net = tiny().copy().extend("r", "fake")
    x, z = normal(8, 2, seed=1).float(), normal(8, 2).float()
    cond = net.encode(torch.arange(16) % 8)
    velocity = lambda y, t, r: twinflow.velocity(net, y, t, r, cond)
    g = twinflow.rectification(x, z, uniform(8), velocity, 1.0)
    assert torch.equal(g, torch.zeros_like(g))


def test_eq09_gradient():
    pred, g = normal(5, 3, 4).requires_grad_(), normal(5, 3, 4, seed=1)
    loss = twinflow.distance(pred, (pred - g).detach(), "l2").mean()
    loss.backward()
    assert loss.item() == pytest.approx(g.square().mean().item())
    assert (pred.grad - 2 * g / g.numel()).abs().max() < 1e-15


@pytest.mark.parametrize("clamp, expected", [(1.0, 1.0), (math.inf, 5.0)])
def test_eq09_clamp(clamp, expected):
    x = normal(5, 3, 4)
    net = lambda y, t, r: torch.where(t[:, None, None] < 0, 5.0, 0.0) * torch.ones_like(y)
    g = twinflow.rectification(x, x, full(0.5, 5), net, clamp)
    assert (g == expected).all()


# ---- F^-, the target network ---------------------------------------------------------------------


def test_target_average():
    live = tiny().copy().extend("r", "fake")
    target = twinflow.Target(live, 0.99)
    decays = []
    for _ in range(140):
        decays.append(target.now.item())
        before = [p.clone() for p in target.model.parameters()]
        for p in live.parameters():
            p.data += 0.1
        target.update()
        for p, old, new in zip(target.model.parameters(), before, live.parameters()):
            assert torch.allclose(p, decays[-1] * old + (1 - decays[-1]) * new, atol=1e-4)
    assert decays[:6] == pytest.approx([0, 0.495, 0.620, 0.690, 0.737, 0.770], abs=6e-4)
    assert next(i for i, a in enumerate(decays) if 1 - a < 0.02) == 132
    assert not any(p.requires_grad for p in target.parameters())
    assert all(p.requires_grad for p in live.parameters())


def test_the_first_update_copies():
    live = tiny().copy().extend("r", "fake")
    target = twinflow.Target(live, 0.99)
    for p in live.parameters():
        p.data += 1
    target.update()
    for p, q in zip(target.model.parameters(), live.parameters(), strict=True):
        assert torch.equal(p, q)


def test_without_decay_the_target_is_the_student():
    live = tiny().copy().extend("r", "fake")
    assert twinflow.Target(live, 0).model is live


# ---- sampler -------------------------------------------------------------------------------------


def grid(*args):
    return twinflow.time_grid(*args)[1]


def test_official_grids():
    assert grid(1) == pytest.approx([0.999, 0])
    assert grid(2) == pytest.approx([0.999, 0.7, 0])
    even = [0.999, 0.8327, 0.6663, 0.5, 0]
    assert grid(4, "few") == pytest.approx(even, abs=1e-4)
    assert grid(4, "any") == pytest.approx(even, abs=1e-4)
    assert grid(8, "any")[:3] == pytest.approx([0.999, 0.9277, 0.8564], abs=1e-4)
    assert grid(8, "any")[-2:] == pytest.approx([0.5, 0])
    long = grid(30, "mul")
    assert len(long) == 31
    assert long[:3] == pytest.approx([0.9999, 0.9898, 0.9755], abs=1e-4)
    assert long[-2:] == pytest.approx([0.0815, 0], abs=1e-4)


def test_modes():
    modes = [twinflow.time_grid(n)[0] for n in (1, 2, 3, 8, 9)]
    assert modes == ["few", "few", "any", "any", "mul"]
    assert twinflow.time_grid(2, steps="0.999,0.6") == ("few", [0.999, 0.6, 0.0])


@pytest.mark.parametrize("mode", ["few", "any", "mul"])
def test_grids_fall(mode):
    for n in range(1, 60):
        t = grid(n, mode)
        assert len(t) == n + 1
        assert t[0] > 0.99
        assert t == sorted(set(t), reverse=True)


STEPS = [(1, "1"), (2, "1,0.7"), (3, "1,0.8,0.1"), (5, "1,0.9,0.5,0.3,0.01")]


@pytest.mark.parametrize("nfe, steps", STEPS)
def test_mode_any_with_the_exact_flow_map(nfe, steps):
    """mean + std z for every grid, in nfe passes."""
    z, net = normal(200_000, 1), Exact()
    x = twinflow.sample(net, z, {}, nfe, None, "any", steps)
    assert (x - (0.3 + 0.5 * z)).abs().max() < 1e-12
    assert net.calls == nfe


@pytest.mark.parametrize("nfe, steps", STEPS)
def test_mode_few_with_the_exact_flow_map(nfe, steps):
    """N(mean, std^2) for every grid, with new noise at every step."""
    z, seeds = normal(200_000, 1), iter(range(1, 9))
    noise = lambda: normal(200_000, 1, seed=next(seeds))
    x = twinflow.sample(Exact(), z, {}, nfe, noise, "few", steps)
    assert x.mean().item() == pytest.approx(0.3, abs=4e-3)
    assert x.std().item() == pytest.approx(0.5, abs=4e-3)
    assert next(seeds) == nfe
    if nfe > 1:
        assert (x - (0.3 + 0.5 * z)).abs().max() > 0.5


def test_mode_mul_with_many_steps():
    net, z = Exact(), normal(1000, 1)
    x = twinflow.sample(net, z, {}, 400, None, "mul")
    assert (x - (0.3 + 0.5 * z)).abs().max() < 0.02
    assert net.calls == 400


def test_end_time():
    assert twinflow.end_time(Flow()) == 1.0
    assert twinflow.end_time(load_teacher("toy").schedule) == pytest.approx(20 / 21)
    alpha = math.sqrt(0.0046601)
    sigma = math.sqrt(1 - alpha**2)
    assert twinflow.end_time(VP()) == pytest.approx(sigma / (alpha + sigma), rel=1e-5)


@pytest.mark.parametrize("nfe", [1, 4, 12])
def test_a_sample_does_not_depend_on_its_batch(nfe):
    net = load_teacher("toy-cond").copy().extend("r", "fake")
    sampler = lambda model, z, cond, noise: twinflow.sample(model, z, cond, nfe, noise, "few")
    whole = next(generate(sampler, net, 12, seed=3, batch=12))[2]
    rows = {}
    for part, _, x in generate(sampler, net, 12, seed=3, batch=5, rank=1, world=2):
        rows |= dict(zip(part.tolist(), x))
    assert sorted(rows) == [1, 3, 5, 7, 9, 11]
    for i, row in rows.items():
        assert torch.allclose(row, whole[i], atol=1e-5)


# ---- rows and times ------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [4, 5, 6, 8, 10, 12, 24])
def test_partition(batch):
    rows, share = twinflow.partition(batch, (1, 1, 1, 1))
    assert sorted(torch.cat(list(rows.values())).tolist()) == list(range(batch))
    assert sum(share.values()) == batch
    lengths = [len(r) for r in rows.values()]
    assert max(lengths) - min(lengths) <= 1
    for group, indices in rows.items():
        assert len(indices) == share[group] >= 1


@pytest.mark.parametrize("batch, world", [(4, 2), (6, 2), (6, 3), (12, 3), (12, 4), (24, 4)])
def test_partition_over_processes(batch, world):
    """The same rows, on whatever process they are."""
    rows, share = twinflow.partition(batch, (1, 1, 1, 1))
    parts = [twinflow.partition(batch, (1, 1, 1, 1), rank, world) for rank in range(world)]
    for group in rows:
        shifted = [part[group] + i * (batch // world) for i, (part, _) in enumerate(parts)]
        assert torch.cat(shifted).tolist() == rows[group].tolist()
        assert sum(part_share[group] for _, part_share in parts) == pytest.approx(share[group])


def test_partition_by_ratios():
    rows, _ = twinflow.partition(10, (1, 0, 3, 1))
    assert [len(rows[group]) for group in twinflow.GROUPS] == [2, 0, 6, 2]


def test_batches_that_are_too_small():
    for batch in ("1", "2", "3"):
        with pytest.raises(UserError, match="--batch"):
            twinflow.parse_args(["--batch", batch])
    twinflow.parse_args(["--batch", "4"])


def test_times():
    rows, _ = twinflow.partition(40_000, (1, 1, 1, 1))
    u, w = uniform(40_000), uniform(40_000, seed=1)
    t, r = twinflow.times(u, w, rows, 0.9)
    e2e, mul, any_, adv = (rows[group] for group in twinflow.GROUPS)
    assert (t[e2e] == 0.9).all()
    assert (r[e2e] == 0).all()
    assert torch.equal(t[adv], r[adv])
    for group in (mul, any_, adv):
        assert t[group].mean().item() == pytest.approx(0.45, abs=0.01)
        assert t[group].max() < 0.9
    share = r[any_] / t[any_]
    assert share.min() >= 0
    assert share.mean().item() == pytest.approx(0.5, abs=0.01)
    share = r[mul] / t[mul]
    assert share.min() > 0.95 - 1e-12
    assert share.mean().item() == pytest.approx(0.975, abs=1e-3)


def test_half_of_the_mul_rows_are_near_the_diagonal():
    rows, _ = twinflow.partition(40_000, (1, 1, 1, 1))
    t, r = twinflow.times(uniform(40_000), uniform(40_000, seed=1), rows, 1.0)
    near = (t - r)[rows["mul"]] < twinflow.DELTA
    assert near.double().mean().item() == pytest.approx(0.52, abs=0.01)


# ---- broken on purpose: each must fail the test beside it ----------------------------------------

RIGHT = {
    name: getattr(twinflow, name)
    for name in ("rectification", "rcgm_target", "one_step", "velocity")
}


def one_noise_level(x1, z, s, net, clamp):
    return RIGHT["rectification"](x1, z, 0 * s + s.mean(), net, clamp)


def no_stop_gradient(pred, *args):
    return pred + RIGHT["rcgm_target"](pred.detach(), *args) - pred.detach()


def against_time(pred, v, x, *args):
    return RIGHT["rcgm_target"](pred, v, x + 2 * twinflow.DELTA * v, *args)


BROKEN = {
    "sign of g": (
        "rectification",
        lambda *args: -RIGHT["rectification"](*args),
        lambda: test_eq09_of_a_scale(1.0, 0.795),
    ),
    "one noise level": (
        "rectification",
        one_noise_level,
        lambda: test_eq09_of_a_shift(0.5, 1.18283),
    ),
    "no stop-gradient": ("rcgm_target", no_stop_gradient, test_targets_carry_no_gradient),
    "clamp at order 0": (
        "rcgm_target",
        lambda pred, v, *args: pred + (v - pred).clamp(-1, 1),
        test_eq05_order_zero_is_flow_matching,
    ),
    "y against time": ("rcgm_target", against_time, test_eq05_residual_of_any_velocity),
    "sign of x": (
        "one_step",
        lambda net, z, cond, T: 2 * z - RIGHT["one_step"](net, z, cond, T),
        test_eq01_one_step_sample,
    ),
    "|t| instead of t": (
        "velocity",
        lambda net, x, t, r, cond: RIGHT["velocity"](net, x, t.abs(), r.abs(), cond),
        test_eq02_negative_times_are_the_fake_velocity,
    ),
    "no factor": (
        "velocity",
        lambda net, x, t, r, cond: RIGHT["velocity"](net, x, t, 0.9 * r, cond),
        test_eq02_the_diagonal_never_sees_the_new_embeddings,
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_on_purpose(what, monkeypatch):
    name, wrong, test = BROKEN[what]
    test()
    monkeypatch.setattr(twinflow, name, wrong)
    with pytest.raises(AssertionError):
        test()


# ---- (10): one iteration of a run against the formulas -------------------------------------------


@pytest.fixture
def first_step(monkeypatch, tmp_path):
    """first_step(*flags, batch): main() for one iteration on toy-cond -> Trace with the calls of
    velocity and one_step, and the target network."""

    def run(*flags, batch=16):
        record = [(twinflow, "velocity"), (twinflow, "one_step"), (twinflow, "Target")]
        flags = ["--iters", 1, "--batch", batch, *flags]
        steps = Trace(monkeypatch, twinflow, tmp_path / "out", *flags, record=record)
        steps.target = steps.calls["Target"][0].result
        steps.velocities = [call.args for call in steps.calls["velocity"]]
        return steps

    return run


def flat_gradient(net):
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
    return torch.cat([g.flatten() for g in grads]).double()


def test_order_zero_on_the_diagonal_is_flow_matching(first_step, monkeypatch):
    """The gradient is that of mean |F - (z - x)|^2, with w = 1."""
    monkeypatch.setattr(twinflow, "time_weight", lambda t, r: torch.ones_like(t))
    steps = first_step("--order", 0, "--groups", 0, 1, 0, 0, "--rect-weight", 0)
    calls = [args for args in steps.velocities if len(args[1])]
    assert len(calls) == 1
    _, x_t, t, r, cond = calls[0]
    teacher, draw = load_teacher("toy-cond"), BatchRandom(0, 0, 16)
    x, _ = load_images(None, teacher).batch(0, 16)
    draw.rand(), draw.rand(), draw.randn(2)  # times and z0
    z = draw.randn(2)
    assert torch.allclose(x_t, twinflow.mix(x, z, t))
    torch.manual_seed(0)
    fresh = teacher.copy().extend("r", "fake")
    (twinflow.velocity(fresh, x_t, t, r, cond) - (z - x)).square().mean().backward()
    expected = flat_gradient(fresh)
    assert (steps[0].flat_grad() - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize(
    "flags, networks",
    [
        ("--cfg 2", "SSTTTS"),
        ("", "SSTTS"),
        ("--cfg 2 --guide frozen", "SSFTTS"),
        ("--cfg 2 --target-decay 0", "SSSSSS"),
        ("--order 1 --rect-weight 0", "SST"),
        ("--cfg 2 --guide frozen --image-free", "SSFTTS"),
        ("--order 0 --rect-weight 0", "SS"),
    ],
)
def test_which_network_is_evaluated(first_step, flags, networks):
    """One-step samples, the pass with gradient, guidance, N targets, rectification: by the student
    (S), the target network (T) or the frozen teacher (F)."""
    steps = first_step(*flags.split())
    names = {id(steps.target.model): "T"}
    names[id(steps.calls["one_step"][0].args[0])] = "S"
    found = [names.get(id(args[0]), "F") for args in steps.velocities]
    assert "".join(found) == networks
    for args, name in zip(steps.velocities, found):
        assert name != "F" or args[0].exact


def test_eq08_noise_is_fresh(first_step):
    """The noise that makes a fake sample is not the noise that is added to it."""
    steps = first_step("--rect-weight", 0.5, batch=400)
    (call,) = steps.calls["one_step"]
    _, z0, cond, T = call.args
    x = twinflow.one_step(load_teacher("toy-cond").copy(), z0, cond, T)
    _, x_t, t, _, _ = next(args for args in steps.velocities if len(args[1]) == 400)
    s = t[3::4].abs()  # the adv rows
    z = (x_t[3::4].double() - expand(1 - s, x) * x) / expand(s, x)
    keep = s > 0.05
    pair = torch.stack([z[keep].flatten(), z0[keep].flatten().double()])
    assert torch.corrcoef(pair)[0, 1].abs() < 0.2
    assert z[keep].std().item() == pytest.approx(1, abs=0.1)


def test_the_target_is_updated_before_the_first_step(first_step):
    """After the first iteration it is the student before its first step."""
    steps = first_step()
    target = torch.cat([p.flatten() for p in steps.target.model.parameters()])
    assert torch.equal(target, steps[0].before["student"])
    assert steps.target.now == pytest.approx(0.495)


def test_processes_without_a_row_of_every_group(scripts, tmp_path):
    """Four rows on two processes: neither has all groups. The gradient (Adam's first moment) and
    the log are those of one process."""
    one, two = tmp_path / "one", tmp_path / "two"
    args = ["twinflow.py", *QUICK, "--batch", 4, "--cfg", 2, "--teacher", "toy-cond"]
    scripts.run(*args, "--iters", 1, "--out", one)
    run_processes(scripts, 2, *args, "--iters", 1, "--out", two)

    def moments(out):
        saved = torch.load(out / "ckpt" / "it-00000001.pt", weights_only=True)["state"]
        state = saved["opt_g"]["state"]
        return torch.cat([state[i]["exp_avg"].flatten() for i in sorted(state)])

    a, b = moments(one), moments(two)
    assert a.norm() > 0
    assert (a - b).norm() < 1e-5 * a.norm()
    (first,), (second,) = log(one), log(two)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert second[name] == pytest.approx(value, rel=1e-4, abs=1e-5)


# ---- whole iterations by hand --------------------------------------------------------------------


@pytest.fixture
def awake(monkeypatch):
    """Students whose new inputs, and adapters, have an effect from the first iteration on.
    -> list that grows by the seed with which the inputs were made."""
    extend, seeds = Model.extend, []

    def extend_awake(model, *names):
        seeds.append(torch.initial_seed())
        return byhand.wake(extend(model, *names))

    monkeypatch.setattr(Model, "extend", extend_awake)
    return seeds


@dataclasses.dataclass
class Method:
    """What the flags of a run say, for the equations. letters: e2e, mul, any, adv of each turn."""

    order: int = 2
    w: float = 1.0
    frozen: bool = False
    image_free: bool = False
    mu: float = 0.5
    barron: bool = False
    clamp: float = math.inf
    letters: str = "emav"
    decay: float = 0.99
    T: float = 20 / 21
    batch: int = 16

    @property
    def k(self):
        """The factor of (3) whose fixed point is the scale w."""
        if self.image_free:
            return self.w  # Fg(e) + k (Fg(c) - Fg(e))
        return self.w - 1 if self.frozen else 1 - 1 / self.w

    def distance(self, p, q):
        """(7), [B]"""
        m = (p - q).square().mean(1)
        return m / (m.detach() / 1.01 + 1e-6).sqrt() if self.barron else m


def mean_velocity(net, x, t, r, cond):
    """F(x, t, r, c) by (1) and (2), float64."""
    s = t.abs()
    second = torch.stack([r, t - r], 1)  # E2 of r, with the factor t - r
    fake = torch.stack([s, (t < 0).double()], 1)
    xhat = net(x.float(), 1 - s, s, cond | dict(r=second, fake=fake))
    return (x - xhat) / s[:, None]


def iteration_by_hand(trace, it, images, method):
    """(1) to (10) for one iteration. -> loss, numbers of the log."""
    student, teacher, B, T = trace.student, trace.teacher, method.batch, method.T
    F_minus = trace.networks()["target"] if method.decay else student
    col = lambda a: a[:, None]
    draw = BatchRandom(3, it, B)
    letter = [method.letters[i % len(method.letters)] for i in range(B)]
    e, m, a, v = (torch.tensor([x == group for x in letter]) for group in "emav")

    u, w, z0 = draw.rand(), draw.rand(), draw.randn(2)
    t = torch.where(e, T, T * u)
    r = torch.where(e, 0.0, torch.where(m, t * (1 - 0.05 * w), t * w))
    if method.image_free:
        x, labels = torch.zeros(B, 2), draw.randint(0, 8)
    else:
        x, labels = images.batch(it, B, 3)
    c, null = dict(labels=labels), dict(labels=torch.full((B,), 8))
    end, zero = torch.full((B,), T).double(), torch.zeros(B).double()
    with torch.no_grad():
        own = T * z0 - T * mean_velocity(student, T * z0, end, zero, c)
    x = torch.where(col(v | method.image_free), own, x.double())
    z = draw.randn(2)
    x_t = (col(t) * z + col(1 - t) * x).float()  # (1)
    pred_t, pred_r = torch.where(v, -t, t), torch.where(v, -t, r)
    pred = mean_velocity(student, x_t, pred_t, pred_r, c)

    with torch.no_grad():
        drawn = z - x
        if method.k or method.image_free:  # (3)
            guide = teacher if method.frozen else F_minus
            v_c, v_e = (mean_velocity(guide, x_t, t, t, y) for y in (c, null))
            guided = (v_e if method.image_free else drawn) + method.k * (v_c - v_e)
            velocity = torch.where(col(e | v), drawn, guided)
        else:
            velocity = drawn
        target = velocity
        if method.order:
            start = torch.maximum(t - 0.01, r)
            y, integral = x_t - 0.01 * velocity, 0.0
            for i in range(method.order):  # (4)
                here = start + (r - start) * i / method.order
                there = start + (r - start) * (i + 1) / method.order
                move = col(here - there) * mean_velocity(F_minus, y, here, there, c)
                y, integral = y - move, integral + move
            R = (col(t - r) * pred - integral) / 0.01 - velocity  # (5)
            R = torch.where(col(t - r < 0.01), pred - velocity, R)
            target = pred - R.clamp(-method.clamp, method.clamp)
        target = torch.where(col(v), drawn, target)  # (8)

    weight = torch.where(v, 1.0, torch.tan((1 - t + r) * math.pi / 2.5) + 1)
    each = weight * method.distance(pred, target)  # (6)
    trained = e | m | a | v if method.order else m | v
    loss = each[trained].mean()

    logs = dict(fm=(pred - drawn)[m].square().mean())
    logs |= {name: each[rows & trained].mean() for name, rows in zip(twinflow.GROUPS, (e, m, a, v))}
    x1 = (x_t - T * pred).detach()
    logs |= dict(mean=x1[e].mean(), square=x1[e].square().mean())
    if method.mu:  # (9)
        z1, s = draw.randn(2), T * draw.rand()
        with torch.no_grad():
            y = col(s) * z1 + col(1 - s) * x1
            g = mean_velocity(student, y, -s, -s, c) - mean_velocity(student, y, s, s, c)
            g = g.clamp(-method.clamp, method.clamp)
        rect = method.distance(pred, pred.detach() - g)[e].mean()
        loss = loss + method.mu * rect  # (10)
        logs |= dict(rect=rect, twin_gap=g[e].square().mean())
    logs = {name: value for name, value in logs.items() if not value.isnan()}  # groups with rows
    return loss, logs | dict(loss=loss)


def sample_by_hand(student, noise, cond, T, mode, times):
    """times: of the steps, in units of T."""
    x = T * noise().double()
    times = [T * t for t in [*times, 0.0]]
    for t, s in zip(times, times[1:]):
        at = lambda time: torch.full((len(x),), time).double()
        r = dict(few=0.0, any=s, mul=t)[mode]
        with torch.no_grad():
            v = mean_velocity(student, x, at(t), at(r), cond)
        if mode == "few" and s > 0:
            x = (1 - s) * (x - t * v) + s * noise()
        else:
            x = x + (s - t) * v
    return x


FLOW, VP_END = dict(T=1.0), dict(T=14.6146 / 15.6146)  # sigma / alpha at the end of SD's table
BARRON = dict(barron=True, clamp=1.0)
# flags, teacher, what they mean, mode and times of the sampler
BY_HAND = [
    ("", "edm", {}, "few", [0.999]),
    (
        "--distance barron --clamp 1 --cfg 5 --rect-weight 0.7 --nfe 2",
        "flow",
        dict(w=5.0, mu=0.7) | BARRON | FLOW,
        "few",
        [0.999, 0.7],
    ),
    (
        "--distance barron --clamp 0.5 --cfg 3 --guide frozen --order 1 --target-decay 0 --nfe 3",
        "vp",
        dict(w=3.0, frozen=True, order=1, decay=0, barron=True, clamp=0.5) | VP_END,
        "any",
        [0.999, 0.7495, 0.5],
    ),
    (
        "--image-free --cfg 3 --guide frozen --order 3 --target-decay 0.5 --nfe 2 --mode mul",
        "trigflow",
        dict(w=3.0, frozen=True, image_free=True, order=3, decay=0.5) | FLOW,
        "mul",
        None,
    ),
    (
        "--image-free --cfg 0 --guide frozen --target-decay 0.5",
        "flow",
        dict(w=0.0, frozen=True, image_free=True, decay=0.5) | FLOW,
        "few",
        [0.999],
    ),
    (
        "--order 0 --groups 1 2 0 1 --cfg 2 --clamp 1 --target-decay 0 --nfe 2 --steps 0.9,0.4 "
        "--mode any",
        "edm",
        dict(order=0, w=2.0, letters="emmv", clamp=1.0, decay=0),
        "any",
        [0.9, 0.4],
    ),
    (
        "--batch 7 --distance barron --clamp 0.3 --ema 2 --nfe 3 --mode few --steps 1,0.8,0.1",
        "edm",
        dict(barron=True, clamp=0.3, batch=7),
        "few",
        [1.0, 0.8, 0.1],
    ),
    (
        "--groups 2 1 1 1 --accumulate 2 --cfg 2",
        "edm",
        dict(letters="eemav", w=2.0),
        "few",
        [0.999],
    ),
    (
        "--groups 0 1 2 0 --rect-weight 0 --cfg 0.8 --lora 4 --target-decay 0.9",
        "edm",
        dict(mu=0, letters="maa", w=0.8, decay=0.9),
        "few",
        [0.999],
    ),
]


def kumaraswamy(n):
    """The official times of n steps of mode mul."""
    u = [0.001 + 0.999 * i / n for i in range(n)]
    return [1 - (1 - (1 - a**1.17) ** 0.8) ** 1.1 for a in u]


@pytest.mark.parametrize(
    "flags, schedule, method, mode, times", BY_HAND, ids=[case[0] for case in BY_HAND]
)
def test_whole_iterations_by_hand(trace, awake, monkeypatch, flags, schedule, method, mode, times):
    """Six iterations, (1) to (10): gradients, AdamW's updates, F^-, the average, the log; then the
    sampler of distill.json."""
    monkeypatch.setattr(twinflow, "load_teacher", lambda *args, **kwargs: byhand.any_toy(schedule))
    record = [(twinflow, name) for name in ("Target", "Report", "rectification")]
    wrapped = byhand.wrap_trained(monkeypatch)

    def target(steps):
        model = steps.calls["Target"][0].result.model
        return {} if model is steps.student else dict(target=model)

    common = "--iters 6 --lr 3e-3 --betas 0.3 0.8 --weight-decay 0.1 --clip 0.5"
    common += " --warmup 3 --cooldown 0.5 --seed 3"
    flags = [*common.split(), *flags.split()]
    steps = trace(twinflow, *flags, record=record, watch=target)
    images = load_images(None, steps.teacher)
    method = Method(**method)
    logs = []
    if "--accumulate" in flags:  # gradients are sums over the parts of a batch
        del steps[::2]
        for step in steps:
            step.grads["student"] = [g / 2 for g in step.grads["student"]]

    # The new inputs are equal on all processes. Gradients flow through what run.train returns, and
    # neither through other passes nor into g.
    assert awake == [3]
    microsteps = 12 if "--accumulate" in flags else 6
    assert [net.calls for net in wrapped] == [{True: microsteps, False: 0}]
    assert not any(call.result.requires_grad for call in steps.calls["rectification"])

    # F^-: the first update copies, then its decay grows
    if method.decay:
        assert not any(p.requires_grad for p in steps.networks()["target"].parameters())
        average, decay = 0.0, 0.0
        for step in steps:
            average = decay * average + (1 - decay) * step.before["student"].double()
            decay += 0.5 * (1 - decay) * (method.decay - decay)
            assert byhand.difference(step.before["target"].double(), average) < 1e-6

    def losses(it):
        loss, numbers = iteration_by_hand(steps, it, images, method)
        logs.append(numbers)
        return dict(student=loss)

    lr = byhand.rates(3e-3, 6, warmup=3, cooldown=0.5)
    optimisers = dict(student=byhand.AdamW(lr, (0.3, 0.8), 0.1, 0.5))
    assert byhand.compare_iterations(steps, losses, optimisers) == 6

    # the exported student, its average if it has one
    report = steps.calls["Report"][0].result
    byhand.compare_logs(log(report.run.out), logs)
    byhand.set_weights(steps, dataclasses.replace(steps[-1], before=steps[-1].after))
    halflife = report.run.args.ema
    last = (
        byhand.average(steps, halflife, method.batch)
        if halflife
        else steps[-1].after["student"].double()
    )
    exported = torch.cat([p.detach().flatten() for p in report.ema.model.parameters()])
    assert byhand.difference(exported.double(), last) < 1e-6
    found, noise, cond = byhand.samples_of_record(report)
    times = times or kumaraswamy(2)
    expected = sample_by_hand(report.ema.model, noise, cond, method.T, mode, times)
    assert byhand.difference(found.double(), expected) < 1e-5


def test_frame(monkeypatch, tmp_path):
    out = tmp_path / "out"
    check_frame(monkeypatch, twinflow, out, show=["loss"], rates=dict(lr=3e-3))


def test_rows_of_processes_and_microsteps(monkeypatch, tmp_path):
    """Process 1 of 2 has the parts 2 and 3 of 4 of a batch."""
    device = torch.device("cpu")
    monkeypatch.setattr(run, "init_processes", lambda args: (1, 2, device, torch.float32))
    monkeypatch.setattr(run, "on_rank0", lambda work: None)
    monkeypatch.setattr(twinflow, "load_images", lambda *args: 1 / 0)  # what follows is another's
    calls = record_calls(monkeypatch, twinflow, "partition")
    flags = ["--teacher", "toy", "--batch", 32, "--accumulate", 2, "--out", tmp_path / "out"]
    with pytest.raises(ZeroDivisionError):
        run_main(monkeypatch, twinflow, *flags)
    assert [call.args[2:4] for call in calls] == [(2, 4), (3, 4)]


def test_eq01_at_the_clean_end():
    """(4) evaluates F there, and multiplies it by 0: it must be finite, and not the fake one."""
    seen = []

    def net(x, alpha, sigma, cond):
        seen.append(cond["fake"])
        return 0 * x

    zero = torch.zeros(3, dtype=torch.float64)
    assert twinflow.velocity(net, torch.ones(3, 2), zero, zero, {}).isfinite().all()
    assert (seen[0] == 0).all()


def test_eq01_a_process_without_rows_makes_no_pass():
    none = torch.zeros(0, dtype=torch.float64)
    assert twinflow.velocity(None, torch.ones(0, 2), none, none, {}).shape == (0, 2)


def test_one_step_in_double_precision_needs_the_first_noise_only():
    seen = []

    def net(x, alpha, sigma, cond):
        seen.append(sigma)
        return 0 * x

    net.schedule = VP()
    z = torch.randn(5, 2)
    twinflow.sample(net, z, {}, 1, None)
    twinflow.one_step(net, z, {}, 0.9)
    assert [sigma.dtype for sigma in seen] == [torch.float64] * 2


def test_grids_in_double_precision():
    assert twinflow.time_grid(3)[1] == pytest.approx([0.999, 0.7495, 0.5, 0], abs=1e-12)
    assert twinflow.time_grid(5, "mul")[1] == pytest.approx([*kumaraswamy(5), 0], abs=1e-12)
