"""Invariants of TwinFlow (arXiv 2512.05150) on Gaussians whose velocity and flow map are known, then one iteration of a run against the formulas written
out. Numbers were derived apart from the code."""

import math
import signal
import sys

import pytest
import torch
from helpers.runs import QUICK, log, processes

import twinflow
from common import data
from common.errors import UserError
from common.rng import BatchRandom
from common.run import Run
from common.sampling import generate
from common.schedules import VP, Flow, expand
from common.teachers.load import load_teacher
from common.teachers.toy import MLP, Toy


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def full(value, n):
    return torch.full((n,), value, dtype=torch.float64)


class Gauss:
    """Data N(m, sg^2) on the linear path: instantaneous velocity v, flow map X, mean velocity F, score. x [B, D], t, r [B]."""

    def __init__(self, m=0.3, sg=0.5):
        self.m, self.sg = m, sg

    def var(self, t):
        return t**2 + (1 - t) ** 2 * self.sg**2

    def v(self, x, t):
        t = expand(t, x)
        return -self.m + (t - (1 - t) * self.sg**2) / self.var(t) * (x - (1 - t) * self.m)

    def score(self, x, t):
        t = expand(t, x)
        return -(x - (1 - t) * self.m) / self.var(t)

    def X(self, x, t, r):
        t, r = expand(t, x), expand(r, x)
        return (1 - r) * self.m + (self.var(r) / self.var(t)).sqrt() * (x - (1 - t) * self.m)

    def F(self, x, t, r):
        gap = expand(t - r, x)
        return torch.where(
            gap > 0, (x - self.X(x, t, r)) / torch.where(gap > 0, gap, 1), self.v(x, t)
        )


class Exact:
    """The same as a network: (x_t, alpha, sigma, cond) -> clean estimate of the mean velocity to r. Rows of the fake field answer for another Gaussian."""

    schedule = Flow()

    def __init__(self, real=Gauss(), fake=None):
        self.real, self.fake, self.calls = real, fake or real, 0

    def __call__(self, x, alpha, sigma, cond):
        self.calls += 1
        fake, t = expand(cond["fake"][:, 1], x) > 0, sigma.expand(len(x))
        F = torch.where(fake, self.fake.v(x, t), self.real.F(x, t, cond["r"][:, 0]))
        return x - expand(t, x) * F


def tiny(prediction="flow"):
    torch.manual_seed(0)
    return Toy(MLP(width=16, depth=2), Flow(), prediction, (2,), 8, labelled=True)


def student(seed=1):
    """An extended tiny network that has learnt something."""
    torch.manual_seed(seed)
    net = tiny().copy().extend("r", "fake")
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return net


# ---- 10.1, 10.2, 10.15: path, velocity, one-step sample ---------------------------------------------------------------------------------------


def test_path_and_conversions():
    g, x, z, t = (
        Gauss(),
        normal(50, 3),
        normal(50, 3, seed=1),
        torch.rand(50, dtype=torch.float64) * 0.98 + 0.01,
    )
    x_t = twinflow.mix(x, z, t)
    assert torch.allclose(x_t, t[:, None] * z + (1 - t[:, None]) * x, atol=1e-15)
    v = g.v(x_t, t)
    assert (g.score(x_t, t) + (x_t + (1 - t[:, None]) * v) / t[:, None]).abs().max() < 1e-12
    F = twinflow.velocity(lambda *a: x, x_t, t, t, {})  # a network that knows x
    assert (F - (z - x)).abs().max() < 1e-12
    assert (twinflow.velocity(Exact(), x_t, t, t, {}) - v).abs().max() < 1e-12
    assert (
        twinflow.velocity(Exact(), x_t, t, 0.3 * t, {}) - g.F(x_t, t, 0.3 * t)
    ).abs().max() < 1e-12


def test_numbers():
    g, one = Gauss(), torch.ones(3, 1, dtype=torch.float64)
    t = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    assert twinflow.velocity(Exact(), one, t, t, {}).flatten().tolist() == pytest.approx(
        [-0.0615385, 0.72, 0.8], abs=1e-7
    )
    assert twinflow.velocity(
        Exact(), one[:1], full(1.0, 1), full(0.0, 1), {}
    ).item() == pytest.approx(0.2)
    assert g.F(one[:1], full(0.8, 1), full(0.2, 1)).item() == pytest.approx(0.3976364, abs=1e-7)
    z = normal(1000, 2)
    assert (
        twinflow.one_step(Exact(), z, {}, 1.0) - (0.3 + 0.5 * z)
    ).abs().max() < 1e-12  # m + sg z, with this sign


def test_negative_time():
    """t = r = -s asks the fake field at noise level s, and nothing but the field is another."""
    real, fake, x, s = Gauss(), Gauss(-0.4, 0.9), normal(20, 3), torch.rand(20, dtype=torch.float64)
    net = Exact(real, fake)
    assert torch.allclose(twinflow.velocity(net, x, -s, -s, {}), fake.v(x, s), atol=1e-12)
    assert torch.allclose(twinflow.velocity(net, x, s, s, {}), real.v(x, s), atol=1e-12)
    learnt, x = student(), x[:, :2].float()
    cond = learnt.encode(torch.arange(20) % 8)
    minus, plus = (twinflow.velocity(learnt, x, a, a, cond) for a in (-s, s))
    assert (minus - plus).abs().amax(1).min() > 1e-4


# ---- 10.3 - 10.7: the any-step target ----------------------------------------------------------------------------------------------------------


def residual(x, t, r, v=None, order=2, F=None, net=None, clamp=math.inf):
    g = Gauss()
    F = g.F(x, t, r) if F is None else F
    return F - twinflow.rcgm_target(
        F, g.v(x, t) if v is None else v, x, t, r, net or g.F, order, clamp
    )


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_the_target_of_a_perfect_network_does_not_depend_on_the_order(order):
    x, t = normal(200, 1), 0.1 + 0.9 * torch.rand(200, dtype=torch.float64)
    r = (t - 0.01) * torch.rand(200, dtype=torch.float64)
    assert (residual(x, t, r, order=order) - residual(x, t, r, order=7)).abs().max() < 1e-11


@pytest.mark.parametrize(
    "delta, numbers",
    [(0.01, [-1.0411e-3, 1.7975e-3, -2.7027e-3]), (0.001, [-1.0210e-4, 1.7583e-4, -2.6451e-4])],
)
def test_residual_is_linear_in_delta(delta, numbers, monkeypatch):
    monkeypatch.setattr(twinflow, "DELTA", delta)
    x, t, r = (
        torch.tensor(a, dtype=torch.float64)
        for a in ([[1], [-0.5], [0.4]], [0.9, 0.7, 0.5], [0.0, 0.2, 0.1])
    )
    assert residual(x, t, r).flatten().tolist() == pytest.approx(numbers, rel=1e-4)


def test_residual_of_any_velocity():
    """R = [X_r(x - D u, t - D) - X_r(x, t)] / D for a perfect network, whatever u is."""
    g, d, n = Gauss(), 0.01, 200
    x, u, t, r = normal(n, 2), 3 * normal(n, 2, seed=1), full(0.7, n), full(0.2, n)
    expected = (g.X(x - d * u, t - d, r) - g.X(x, t, r)) / d
    assert (residual(x, t, r, v=u) - expected).abs().max() < 1e-11


def test_residual_of_sample_velocities():
    """E[R] over x, z given x_t is the value of the exact velocity; its spread is the flow map's slope times that of z - x."""
    n, t, g = 1_000_000, 0.7, Gauss()
    mean = g.v(full(0.5, 1)[:, None], full(t, 1)).item()
    spread = g.sg / math.sqrt(g.var(t))  # of z - x given x_t
    u = mean + spread * normal(n, 1)
    R = residual(full(0.5, n)[:, None], full(t, n), full(0.2, n), v=u)
    assert R.std().item() == pytest.approx(0.441, abs=2e-3) and R.mean().item() == pytest.approx(
        -1.25e-3, abs=2e-3
    )


@pytest.mark.parametrize("r", [0.495, 0.5])
def test_near_the_diagonal(r):
    F, x, t = full(0.3, 2)[:, None], normal(2, 1), full(0.5, 2)
    v = torch.tensor([[0.9], [2.0]], dtype=torch.float64)
    target = twinflow.rcgm_target(F, v, x, t, full(r, 2), Gauss().F, 2, 1.0)
    assert target.flatten().tolist() == pytest.approx([0.9, 1.3])


def test_float32_agrees_across_the_diagonal():
    for gap in (1e-2 - 1e-9, 1e-3, 1e-6, 0.0):
        x, v, F = (normal(100, 3, seed=i).float() for i in range(3))
        t = full(0.5, 100)
        assert torch.allclose(
            twinflow.rcgm_target(F, v, x, t, t - gap, Gauss().F, 2, math.inf), v, atol=1e-6
        )


def test_order_zero_is_flow_matching():
    x, v, t = normal(9, 2), 7 * normal(9, 2, seed=1), torch.rand(9, dtype=torch.float64)
    assert torch.equal(
        twinflow.rcgm_target(0 * v, v, x, t, 0.5 * t, None, 0, 1.0), v
    )  # and no clamp


def test_targets_carry_no_gradient():
    net, x, t = student(), normal(8, 2).float(), full(0.8, 8)
    ask = lambda y, a, b: twinflow.velocity(net, y, a, b, net.encode(torch.arange(8)))
    F = ask(x, t, 0 * t)
    assert (
        F.requires_grad and not twinflow.rcgm_target(F, x, x, t, 0 * t, ask, 2, 1.0).requires_grad
    )
    both = lambda y, a, b: twinflow.velocity(net, y, a, b, net.encode(torch.arange(16) % 8))
    assert not twinflow.rectification(x - F, x, t, both, 1.0).requires_grad
    assert not twinflow.one_step(net, x, net.encode(torch.arange(8)), 1.0).requires_grad
    assert not twinflow.guided(
        F, net, x, t, net.encode(torch.arange(8)), net.null(8), 0.5
    ).requires_grad


# ---- 10.8 - 10.11: rectification ----------------------------------------------------------------------------------------------------------------


def rect_gradient(m, sg, a, b, fake=None, n=400_000):
    """dE L_rect / d(b, a) for one-step samples a z + b, exact fields, l2. s and z on quasi-random points."""
    real, fake = Gauss(m, sg), fake or Gauss(b, a).v
    i = torch.arange(n, dtype=torch.float64) + 0.5
    s = i / n
    quantile = lambda u: math.sqrt(2) * torch.erfinv(2 * (u % 1) - 1)
    z0, z1 = (quantile(i * c)[:, None] for c in (0.7548776662466927, 0.5698402909980532))
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (a, b))
    x1 = a * z0 + b
    net = lambda y, t, r: torch.where(t[:, None] < 0, fake(y, t.abs()), real.v(y, t.abs()))
    g = twinflow.rectification(x1.detach(), z1, s, net, math.inf)
    F1 = z0 - x1  # T = 1
    twinflow.distance(F1, (F1 - g).detach(), "l2").mean().backward()
    return b.grad.item(), a.grad.item()


@pytest.mark.parametrize("sg, integral", [(1.0, math.pi / 4), (0.5, 1.18283), (0.25, 1.67434)])
def test_rectification_of_a_shift(sg, integral):
    db, da = rect_gradient(0.2, sg, sg, 1.2)
    assert db == pytest.approx(2 * integral, rel=2e-3) and da == pytest.approx(
        0, abs=5e-3
    )  # descent moves b down to m


@pytest.mark.parametrize("a, expected", [(1.0, 0.795), (0.2, -0.267), (0.5, 0.0)])
def test_rectification_of_a_scale(a, expected):
    db, da = rect_gradient(0.3, 0.5, a, 0.3)
    assert da == pytest.approx(expected, abs=2e-3) and db == pytest.approx(0, abs=2e-3)


def test_reused_noise_would_be_wrong():
    """If (8) noised a sample with the noise that made it, the fixed point would be 0.7077 instead of 0.5: why a run draws fresh noise (test_fresh_noise)."""
    coupled = lambda a: (
        lambda y, s: (1 - a) * y / (s + (1 - s) * a)[:, None]
    )  # E[z - a z | (s + (1 - s) a) z = y]
    assert rect_gradient(0.0, 0.5, 0.7077, 0.0, coupled(0.7077))[1] == pytest.approx(0, abs=2e-3)
    assert abs(rect_gradient(0.0, 0.5, 0.5, 0.0, coupled(0.5))[1]) > 0.1


def test_no_rectification_if_fake_equals_real():
    net = tiny().copy().extend("r", "fake")
    x, z, s = (
        normal(8, 2, seed=1).float(),
        normal(8, 2).float(),
        torch.rand(8, dtype=torch.float64),
    )
    g = twinflow.rectification(
        x,
        z,
        s,
        lambda y, t, r: twinflow.velocity(net, y, t, r, net.encode(torch.arange(16) % 8)),
        1.0,
    )
    assert torch.equal(g, torch.zeros_like(g))


def test_gradient_of_rectification():
    F1, g = normal(5, 3, 4).requires_grad_(), normal(5, 3, 4, seed=1)
    loss = twinflow.distance(F1, (F1 - g).detach(), "l2").mean()
    loss.backward()
    assert (
        loss.item() == pytest.approx(g.square().mean().item())
        and (F1.grad - 2 * g / g.numel()).abs().max() < 1e-15
    )
    far = lambda y, t, r: torch.where(t[:, None, None] < 0, 5.0, 0.0) * torch.ones_like(y)
    assert (twinflow.rectification(g, g, full(0.5, 5), far, 1.0) == 1).all() and (
        twinflow.rectification(g, g, full(0.5, 5), far, math.inf) == 5
    ).all()


# ---- 10.12, 10.13: distance, weight, average -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rms, ratio, tolerance", [(1.0, 1.00499, 1e-5), (0.01, 1.000, 2e-3), (1e-4, 0.10, 2e-3)]
)
def test_barron(rms, ratio, tolerance):
    q = rms * normal(4, 3, 8).sign()
    p = torch.zeros_like(q, requires_grad=True)
    d = twinflow.distance(p, q, "barron")
    assert d.shape == (4,) and (d / rms - ratio).abs().max() < tolerance
    d.sum().backward()
    assert p.grad.flatten(1).norm(dim=1).tolist() == pytest.approx(
        [2 * ratio / math.sqrt(24)] * 4, rel=0.02
    )
    assert torch.allclose(twinflow.distance(p, q, "l2"), full(rms**2, 4))


def test_time_weight():
    gap = torch.tensor([0, 0.01, 0.05, 0.25, 0.5, 1], dtype=torch.float64)
    assert twinflow.time_weight(torch.ones(6).double(), 1 - gap).tolist() == pytest.approx(
        [4.0777, 3.9510, 3.5257, 2.3764, 1.7265, 1], abs=1e-4
    )


def test_target_average():
    live = tiny().copy().extend("r", "fake")
    target, seen = twinflow.Target(live, 0.99), []
    for _ in range(140):
        seen.append(target.now.item())
        before = [p.clone() for p in target.model.parameters()]
        for p in live.parameters():
            p.data += 0.1
        target.update()
        for p, old, new in zip(target.model.parameters(), before, live.parameters()):
            assert torch.allclose(p, seen[-1] * old + (1 - seen[-1]) * new, atol=1e-4)
    assert seen[:6] == pytest.approx([0, 0.495, 0.620, 0.690, 0.737, 0.770], abs=6e-4)
    assert next(i for i, a in enumerate(seen) if 1 - a < 0.02) == 132
    assert not any(p.requires_grad for p in target.parameters()) and all(
        p.requires_grad for p in live.parameters()
    )
    first = twinflow.Target(live, 0.99)
    for p in live.parameters():
        p.data += 1
    first.update()
    assert all(torch.equal(p, q) for p, q in zip(first.model.parameters(), live.parameters()))
    assert twinflow.Target(live, 0).model is live


# ---- 10.14, 10.15: sampler --------------------------------------------------------------------------------------------------------------------------


def test_grids():
    grid = lambda *a: twinflow.time_grid(*a)[1]
    assert grid(1) == pytest.approx([0.999, 0]) and grid(2) == pytest.approx([0.999, 0.7, 0])
    assert (
        grid(4, "few") == pytest.approx([0.999, 0.8327, 0.6663, 0.5, 0], abs=1e-4) == grid(4, "any")
    )
    assert grid(8, "any")[:3] == pytest.approx([0.999, 0.9277, 0.8564], abs=1e-4) and grid(
        8, "any"
    )[-2:] == pytest.approx([0.5, 0])
    long = grid(30, "mul")
    assert (
        len(long) == 31
        and long[:3] == pytest.approx([0.9999, 0.9898, 0.9755], abs=1e-4)
        and long[-2:] == pytest.approx([0.0815, 0], abs=1e-4)
    )
    assert [twinflow.time_grid(n)[0] for n in (1, 2, 3, 8, 9)] == [
        "few",
        "few",
        "any",
        "any",
        "mul",
    ]
    assert twinflow.time_grid(2, steps="0.999,0.6") == ("few", [0.999, 0.6, 0.0])
    for n in range(1, 60):
        for mode in ("few", "any", "mul"):
            t = grid(n, mode)
            assert len(t) == n + 1 and t[0] > 0.99 and t == sorted(set(t), reverse=True)


@pytest.mark.parametrize(
    "nfe, steps", [(1, "1"), (2, "1,0.7"), (3, "1,0.8,0.1"), (5, "1,0.9,0.5,0.3,0.01")]
)
def test_samplers_with_the_exact_flow_map(nfe, steps):
    """any: m + sg z for every grid. few: N(m, sg^2) for every grid, with new noise at every step. Either in nfe passes."""
    z, net = normal(200_000, 1), Exact()
    x = twinflow.sample(net, z, {}, nfe, None, "any", steps)
    assert (x - (0.3 + 0.5 * z)).abs().max() < 1e-12 and net.calls == nfe
    seeds = iter(range(1, 9))
    x = twinflow.sample(net, z, {}, nfe, lambda: normal(200_000, 1, seed=next(seeds)), "few", steps)
    assert (
        x.mean().item() == pytest.approx(0.3, abs=4e-3)
        and x.std().item() == pytest.approx(0.5, abs=4e-3)
        and next(seeds) == nfe
    )
    assert nfe == 1 or (x - (0.3 + 0.5 * z)).abs().max() > 0.5


def test_many_steps_along_the_instantaneous_velocity():
    net, z = Exact(), normal(1000, 1)
    x = twinflow.sample(net, z, {}, 400, None, "mul")
    assert (x - (0.3 + 0.5 * z)).abs().max() < 0.02 and net.calls == 400


def test_end_time():
    assert twinflow.end_time(Flow()) == 1.0
    assert twinflow.end_time(load_teacher("toy").schedule) == pytest.approx(20 / 21)
    alpha = math.sqrt(0.0046601)
    assert twinflow.end_time(VP()) == pytest.approx(
        math.sqrt(1 - alpha**2) / (alpha + math.sqrt(1 - alpha**2)), rel=1e-5
    )


@pytest.mark.parametrize("nfe", [1, 4, 12])
def test_a_sample_does_not_depend_on_its_batch(nfe):
    net = load_teacher("toy-cond").copy().extend("r", "fake")
    sampler = lambda m, z, c, noise: twinflow.sample(m, z, c, nfe, noise, "few")
    whole = next(generate(sampler, net, 12, seed=3, batch=12))[2]
    parts = {
        i: row
        for part, _, x in generate(sampler, net, 12, seed=3, batch=5, rank=1, world=2)
        for i, row in zip(part.tolist(), x)
    }
    assert sorted(parts) == [1, 3, 5, 7, 9, 11] and all(
        torch.allclose(row, whole[i], atol=1e-5) for i, row in parts.items()
    )


# ---- 10.7, 10.16: the start, guidance ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["toy-cond", "mnist"])
def test_the_student_starts_as_its_teacher(name):
    """Bit for bit, for every r and for both signs of t."""
    teacher = (
        load_teacher(name).copy().requires_grad_(False)
    )  # of the toy the network, not the exact mixture
    net, n = teacher.copy().extend("r", "fake"), 6
    x, cond, t = (
        torch.randn(n, *teacher.shape),
        teacher.encode(torch.arange(n)),
        torch.linspace(0.05, 1, n, dtype=torch.float64),
    )
    expected = ((x.double() - teacher(x, 1 - t, t, cond).double()) / expand(t, x)).float()
    for a, r in ((t, t), (t, 0 * t), (t, 0.3 * t), (-t, -t)):
        assert torch.equal(twinflow.velocity(net, x, a, r, cond), expected)
    if name == "mnist":  # and that is the network's own output, up to the way there and back
        assert torch.allclose(expected, teacher.predict(x, t.float(), cond), atol=1e-5)


def test_the_diagonal_never_sees_the_new_embeddings():
    net, x, t = student(), torch.randn(8, 2), torch.rand(8, dtype=torch.float64)
    cond = net.encode(torch.arange(8))
    before = [twinflow.velocity(net, x, t, r, cond) for r in (t, 0.5 * t)]
    for p in net.extras.parameters():
        p.data.normal_()
    after = [twinflow.velocity(net, x, t, r, cond) for r in (t, 0.5 * t)]
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])


def test_effective_scale():
    """Iterating the target from any start ends at the scale that was asked for."""
    u_c, u_u = 1.0, 0.2
    for scale, expected in ((2.0, 1.8), (5.0, 4.2), (1.0, 1.0), (0.8, 0.84)):
        k, v = twinflow.strength(scale, "target", False)[0], 0.0
        for _ in range(200):
            v = u_c + k * (v - u_u)
        assert v == pytest.approx(expected) and expected == pytest.approx(u_u + scale * (u_c - u_u))
    k = twinflow.strength(5.0, "frozen", False)[0]
    assert k == 4 and u_c + k * (u_c - u_u) == pytest.approx(4.2)
    k = twinflow.strength(5.0, "frozen", True)[0]
    assert k == 5 and u_u + k * (u_c - u_u) == pytest.approx(4.2)
    assert twinflow.strength(5.0, "target", False)[0] == pytest.approx(0.8)


def test_guided_velocity():
    teacher, n = load_teacher("toy-cond"), 8
    x, t, cond, v = (
        torch.randn(n, 2),
        torch.linspace(0.1, 0.9, n).double(),
        teacher.encode(torch.arange(n)),
        torch.randn(n, 2),
    )
    ask = lambda c: twinflow.velocity(teacher, x, t, t, c)
    c, e = ask(cond), ask(teacher.null(n))
    assert torch.allclose(
        twinflow.guided(v, teacher, x, t, cond, teacher.null(n), 0.5), v + 0.5 * (c - e), atol=1e-5
    )
    scale = (x - teacher.guided(x, 1 - t, t, cond, 3.0)) / t[
        :, None
    ]  # the teacher's velocity at scale 3
    assert torch.allclose(
        twinflow.guided(v, teacher, x, t, cond, teacher.null(n), 3.0, True).double(),
        scale,
        atol=1e-4,
    )


# ---- 10.17: partition ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [4, 5, 6, 8, 10, 12, 24])
def test_partition(batch):
    rows, share = twinflow.partition(batch, (1, 1, 1, 1))
    assert (
        sorted(torch.cat(list(rows.values())).tolist()) == list(range(batch))
        and sum(share.values()) == batch
    )
    assert max(map(len, rows.values())) - min(map(len, rows.values())) <= 1 and all(
        len(rows[g]) == share[g] >= 1 for g in rows
    )
    for world in (w for w in (2, 3, 4) if batch % w == 0):  # the same rows, wherever they are
        parts = [twinflow.partition(batch, (1, 1, 1, 1), rank, world) for rank in range(world)]
        for g in rows:
            assert (
                torch.cat(
                    [part[0][g] + i * (batch // world) for i, part in enumerate(parts)]
                ).tolist()
                == rows[g].tolist()
            )
            assert sum(part[1][g] for part in parts) == pytest.approx(share[g])


def test_partition_by_ratios_and_small_batches():
    rows, _ = twinflow.partition(10, (1, 0, 3, 1))
    assert [len(rows[g]) for g in twinflow.GROUPS] == [2, 0, 6, 2]
    for batch in (1, 2, 3):
        with pytest.raises(UserError, match="--batch"):
            twinflow.parse_args(["--batch", str(batch)])
    twinflow.parse_args(["--batch", "4"])


def test_times():
    rows, _ = twinflow.partition(40_000, (1, 1, 1, 1))
    u, w = (
        torch.rand(40_000, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        for i in (0, 1)
    )
    t, r = twinflow.times(u, w, rows, 0.9)
    of = lambda g: (t[rows[g]], r[rows[g]])
    assert (of("e2e")[0] == 0.9).all() and (of("e2e")[1] == 0).all() and torch.equal(*of("adv"))
    for g in ("mul", "any", "adv"):
        assert of(g)[0].mean().item() == pytest.approx(0.45, abs=0.01) and of(g)[0].max() < 0.9
    share = of("any")[1] / of("any")[0]
    assert share.min() >= 0 and share.mean().item() == pytest.approx(0.5, abs=0.01)
    share = of("mul")[1] / of("mul")[0]
    assert share.min() > 0.95 - 1e-12 and share.mean().item() == pytest.approx(0.975, abs=1e-3)
    t, r = twinflow.times(u, w, rows, 1.0)
    assert (t[rows["mul"]] - r[rows["mul"]] < 0.01).double().mean().item() == pytest.approx(
        0.52, abs=0.01
    )


# ---- broken on purpose: each must fail the test beside it ----------------------------------------------------------------------------------------------------


def wrong_noise(x1, z, s, net, clamp, right=twinflow.rectification):
    return right(x1, z, 0 * s + s.mean(), net, clamp)  # one level for all


BROKEN = {
    "sign of g": (
        "rectification",
        lambda *a: -RIGHT["rectification"](*a),
        lambda: test_rectification_of_a_scale(1.0, 0.795),
    ),
    "one noise level": (
        "rectification",
        wrong_noise,
        lambda: test_rectification_of_a_shift(0.5, 1.18283),
    ),
    "no stop-gradient": (
        "rcgm_target",
        lambda F, *a: F + RIGHT["rcgm_target"](F.detach(), *a) - F.detach(),
        test_targets_carry_no_gradient,
    ),
    "clamp at order 0": (
        "rcgm_target",
        lambda F, v, *a: F + (v - F).clamp(-1, 1),
        test_order_zero_is_flow_matching,
    ),
    "y against time": (
        "rcgm_target",
        lambda F, v, x, t, r, *a: RIGHT["rcgm_target"](F, v, x + 2 * twinflow.DELTA * v, t, r, *a),
        test_residual_of_any_velocity,
    ),
    "sign of x": (
        "one_step",
        lambda net, z, cond, T: 2 * z - RIGHT["one_step"](net, z, cond, T),
        test_numbers,
    ),
    "|t| shown": (
        "velocity",
        lambda net, x, t, r, c: RIGHT["velocity"](net, x, t.abs(), r.abs(), c),
        test_negative_time,
    ),
    "no factor": (
        "velocity",
        lambda net, x, t, r, c: RIGHT["velocity"](net, x, t, 0.9 * r, c),
        test_the_diagonal_never_sees_the_new_embeddings,
    ),
}
RIGHT = {name: getattr(twinflow, name) for name, _, _ in BROKEN.values()}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_on_purpose(what, monkeypatch):
    name, wrong, test = BROKEN[what]
    test()
    monkeypatch.setattr(twinflow, name, wrong)
    with pytest.raises(AssertionError):
        test()


# ---- one iteration of a run against the formulas --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def first_step(monkeypatch, tmp_path):
    """main() in this process on toy-cond for some iterations -> dict of the last: gradient of the student, its network, calls of one_step and velocity."""

    def go(*flags, iters=1, batch=16):
        seen = dict(velocity=[], one_step=[], steps=0)
        step, right = (
            Run.step,
            {k: getattr(twinflow, k) for k in ("velocity", "one_step", "Target")},
        )

        def recorded(run, opt, clip):
            params = [p for group in opt.param_groups for p in group["params"]]
            seen.update(
                grad=torch.cat([p.grad.flatten() for p in params]).double(),
                params=params,
                none=[p.grad is None for p in params],
            )
            before = [p.detach().clone() for p in params]
            norm = step(run, opt, clip)
            seen.update(
                steps=seen["steps"] + 1,
                before=before,
                moved=any(not torch.equal(a, b) for a, b in zip(before, params)),
            )
            return norm

        monkeypatch.setattr(Run, "step", recorded)
        monkeypatch.setattr(
            twinflow, "velocity", lambda *a: seen["velocity"].append(a) or right["velocity"](*a)
        )
        monkeypatch.setattr(
            twinflow, "one_step", lambda *a: seen["one_step"].append(a) or right["one_step"](*a)
        )
        monkeypatch.setattr(
            twinflow, "Target", lambda *a: seen.setdefault("target", right["Target"](*a))
        )
        for name in ("export", "pictures", "report"):
            monkeypatch.setattr(metrics, name, lambda *a, **k: None)
        fixed = [
            "--teacher",
            "toy-cond",
            "--batch",
            batch,
            "--iters",
            iters,
            "--out",
            tmp_path / "out",
            "--overwrite",
            "--save-every",
            0,
            "--sample-every",
            0,
        ]
        monkeypatch.setattr(sys, "argv", ["twinflow.py", *map(str, fixed), *map(str, flags)])
        handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            twinflow.main()
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
            monkeypatch.undo()
        return seen

    return go


def by_hand(
    order=2,
    k=0.0,
    mu=0.5,
    kind="l2",
    clamp=math.inf,
    flat=False,
    frozen=False,
    image_free=False,
    groups="emav",
    batch=16,
):
    """Gradient of the first iteration, written from the paper's formulas with a loop over the rows."""
    teacher, draw = load_teacher("toy-cond"), BatchRandom(0, 0, batch)
    torch.manual_seed(0)
    net = teacher.copy().extend("r", "fake")
    T = 20 / 21

    def F(x, t, r, c, model=net):
        s = abs(t)
        cond = dict(c, r=torch.tensor([[r, t - r]]), fake=torch.tensor([[s, float(t < 0)]]))
        return (
            x - model(x[None], torch.tensor([1 - s]).double(), torch.tensor([s]).double(), cond)[0]
        ) / s

    d = lambda p, q: (
        ((p - q) ** 2).mean()
        if kind == "l2"
        else ((p - q) ** 2).mean()
        / (1e-3 * (((p - q) ** 2).mean().detach() / (1e-6 + 1e-8) + 1).sqrt())
    )
    u, w, z0 = draw.rand(), draw.rand(), draw.randn(2)
    if image_free:
        labels = draw.randint(0, 8)
    else:
        points, labels = data.load_images(None, teacher).batch(0, batch)
    z, fresh, s_rect = draw.randn(2), draw.randn(2), draw.rand()
    base, rect, n_rect = [], [], 0
    for i in range(batch):
        kindof, c, e = groups[i % len(groups)], teacher.encode(labels[i : i + 1]), teacher.null(1)
        t, r = T * u[i].item(), T * u[i].item() * w[i].item()
        if kindof == "e":
            t, r = T, 0.0
        if kindof == "m":
            r = t * (1 - 0.05 * w[i].item())
        if kindof == "v" or image_free:
            x = (T * z0[i] - T * F(T * z0[i], T, 0.0, c)).detach()
        else:
            x = points[i]
        x_t, v = t * z[i] + (1 - t) * x, z[i] - x
        if kindof == "v":
            base.append(d(F(x_t, -t, -t, c), v))
            continue
        out = F(x_t, t, r, c)
        with torch.no_grad():
            if kindof != "e" and (k or image_free):
                g = teacher if frozen else net
                v = (F(x_t, t, t, e, g) if image_free else v) + k * (
                    F(x_t, t, t, c, g) - F(x_t, t, t, e, g)
                )
            if order and t - r >= 0.01:
                y, I, a = (
                    x_t - 0.01 * v,
                    0,
                    [(t - 0.01) * (1 - j / order) + r * j / order for j in range(order + 1)],
                )
                for j in range(order):
                    f = F(y, a[j], a[j + 1], c)
                    I, y = I + (a[j] - a[j + 1]) * f, y + (a[j + 1] - a[j]) * f
                R = ((t - r) * out - I) / 0.01 - v
            else:
                R = out - v
            target = out - R.clamp(-clamp, clamp) if order else v
        if order or kindof == "m":
            base.append(
                (1 if flat else math.tan((1 - (t - r)) * math.pi / 2.5) + 1) * d(out, target)
            )
        if kindof == "e" and mu:
            with torch.no_grad():
                x1, s = x_t - T * out, T * s_rect[i].item()
                y = s * fresh[i] + (1 - s) * x1
                g = (F(y, -s, -s, c) - F(y, s, s, c)).clamp(-clamp, clamp)
            rect.append(d(out, out - g))
    loss = sum(base) / len(base) + (mu * sum(rect) / len(rect) if rect else 0)
    loss.backward()
    return torch.cat(
        [
            p.grad.flatten() if p.grad is not None else torch.zeros(p.numel())
            for p in net.parameters()
        ]
    ).double()


CASES = [
    ("--distance l2", dict()),
    ("--distance barron --clamp 1 --cfg 2", dict(kind="barron", clamp=1.0, k=0.5)),
    ("--order 1 --cfg 3 --guide frozen --flat", dict(order=1, k=2.0, frozen=True, flat=True)),
    (
        "--order 3 --image-free --cfg 3 --guide frozen --target-decay 0",
        dict(order=3, k=3.0, frozen=True, image_free=True),
    ),
    ("--groups 0 1 1 0 --rect-weight 0", dict(groups="ma", mu=0)),
    ("--order 0 --clamp 1", dict(order=0)),
]


@pytest.mark.parametrize("flags, case", CASES, ids=[c[0] for c in CASES])
def test_the_first_gradient_by_hand(first_step, flags, case):
    seen, expected = first_step(*flags.split()), by_hand(**case)
    assert not any(seen["none"]) and seen["moved"]
    assert (seen["grad"] - expected).norm() < 2e-5 * expected.norm()


@pytest.mark.parametrize("batch", [4, 7])
def test_the_first_gradient_of_an_odd_batch(first_step, batch):
    assert (
        first_step(batch=batch)["grad"] - (expected := by_hand(batch=batch))
    ).norm() < 2e-5 * expected.norm()


def test_flow_matching_is_order_zero(first_step):
    """--order 0 on the diagonal's rows alone: the gradient is that of mean |F - (z - x)|^2."""
    seen = first_step("--order", 0, "--groups", 0, 1, 0, 0, "--rect-weight", 0, "--flat")
    net, x_t, t, r, cond = next(a for a in seen["velocity"] if len(a[1]) == 16)
    teacher, draw = load_teacher("toy-cond"), BatchRandom(0, 0, 16)
    x, _, z = (
        data.load_images(None, teacher).batch(0, 16)[0],
        [draw.rand(), draw.rand(), draw.randn(2)],
        draw.randn(2),
    )
    assert (
        torch.allclose(x_t, twinflow.mix(x, z, t)) and len(seen["velocity"]) == 1 + 1
    )  # the other is one_step's, of no rows
    torch.manual_seed(0)
    fresh = teacher.copy().extend("r", "fake")
    (twinflow.velocity(fresh, x_t, t, r, cond) - (z - x)).square().mean().backward()
    expected = torch.cat(
        [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in fresh.parameters()]
    ).double()
    assert (seen["grad"] - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize(
    "flags, nets",
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
def test_who_is_asked(first_step, capsys, flags, nets):
    """One-step samples, the pass with gradient, guidance, N targets, rectification: student, target or frozen teacher. And the cost that is printed."""
    seen = first_step(*flags.split())
    names = (
        {id(seen["one_step"][0][0]): "S", id(seen["target"].model): "T"}
        if "decay" not in flags
        else {id(seen["one_step"][0][0]): "S"}
    )
    assert "".join(names.get(id(a[0]), "F") for a in seen["velocity"]) == nets
    assert all(a[0].exact for a in seen["velocity"] if id(a[0]) not in names)
    rows = sum(len(a[1]) for a in seen["velocity"]) / 16 + 2
    assert f"{rows:.2f}" in next(
        line for line in capsys.readouterr().out.splitlines() if "passes per iteration" in line
    )


def test_fresh_noise(first_step):
    """The noise that makes a fake sample is not the noise that is added to it, nor that of the rectification."""
    seen = first_step("--rect-weight", 0.5, batch=400)
    ((net, z0, cond, T),) = seen["one_step"]
    adv = next(a for a in seen["velocity"] if len(a[1]) == 400)
    s = adv[2][3::4].abs()
    x = twinflow.one_step(load_teacher("toy-cond").copy(), z0, cond, T)
    z = (adv[1][3::4].double() - expand(1 - s, x) * x) / expand(s, x)
    keep = s > 0.05
    assert (
        torch.corrcoef(torch.stack([z[keep].flatten(), z0[keep].flatten().double()]))[0, 1].abs()
        < 0.2
    )
    assert z[keep].std().item() == pytest.approx(1, abs=0.1)


def test_weights_of_the_target_are_those_before_the_step(first_step):
    """The average is updated between the student's pass and its targets: after the first iteration it is the student before its first step."""
    seen = first_step(iters=1)
    assert all(torch.equal(p, q) for p, q in zip(seen["target"].model.parameters(), seen["before"]))
    assert seen["target"].now == pytest.approx(0.495)


def test_processes_without_a_row_of_every_group(scripts, tmp_path):
    """Four rows on two processes: neither holds all groups. The gradient (Adam's first moment) and the log are those of one process."""
    args = [
        "twinflow.py",
        *QUICK,
        "--batch",
        4,
        "--cfg",
        2,
        "--teacher",
        "toy-cond",
        "--iters",
        1,
        "--out",
    ]
    scripts.run(*args, tmp_path / "one")
    ps = processes(scripts, 2, *args, tmp_path / "two")
    assert [p.wait() for p in ps] == [0, 0], ps[0].err + ps[1].err
    states = [
        torch.load(tmp_path / out / "ckpt" / "it-00000001.pt", weights_only=True)["state"]["opt_g"][
            "state"
        ]
        for out in ("one", "two")
    ]
    a, b = (torch.cat([state[i]["exp_avg"].flatten() for i in sorted(state)]) for state in states)
    assert a.norm() > 0 and (a - b).norm() < 1e-5 * a.norm()
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert one[0].keys() == two[0].keys() and all(
        two[0][k] == pytest.approx(v, rel=1e-4, abs=1e-5) for k, v in one[0].items()
    )
