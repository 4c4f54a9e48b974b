"""Invariants of Phased DMD (arXiv 2510.27684) on closed-form Gaussians, the limit of one phase, then who gets gradients in a real run. Numbers were
derived apart from the code. BROKEN: mistakes that each fail a test below."""

import math
import signal
import sys

import pytest
import torch
import torch.nn as nn

import dmd2
import phased_dmd
from common.errors import UserError
from common.rng import BatchRandom
from common.routed import ByLevel, Routed
from common.run import Run
from common.sampling import generate, teacher_sample
from common.schedules import Flow, native_weight
from common.teachers.load import load_teacher
from common.teachers.toy import MLP, Toy, energy_distance

f64 = lambda *v: torch.tensor(v if len(v) > 1 else v[0], dtype=torch.float64)
ZERO = f64(0.0)
# (z, eps) with zero mean, unit variance and no correlation, exactly: enough for everything that is affine
Z, EPS = f64(1.0, 1.0, -1.0, -1.0), f64(1.0, -1.0, 1.0, -1.0)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Affine(nn.Module):
    """mu = gain x + shift, whatever the level. As an expert: an affine generator."""

    def __init__(self, gain=0.3, shift=0.1):
        super().__init__()
        self.gain, self.shift, self.calls = nn.Parameter(f64(gain)), nn.Parameter(f64(shift)), []
        self.sharding = None

    def forward(self, x, alpha, sigma, cond, features=False):
        self.calls.append(
            (x, float(alpha) if torch.as_tensor(alpha).ndim == 0 else None, torch.is_grad_enabled())
        )
        return self.gain * x + self.shift

    def guided(self, x, alpha, sigma, cond, w):
        return self(x, alpha, sigma, cond)


class Gauss(Affine):
    """Optimal denoiser of data N(mean, var)."""

    def __init__(self, mean=2.0, var=0.25):
        super().__init__()
        self.mean, self.var = mean, var

    def forward(self, x, alpha, sigma, cond):
        a, v = alpha[:, None], sigma[:, None] ** 2
        return (self.var * a * x + v * self.mean) / (a**2 * self.var + v)


def velocity_target(x_s, eps, t, s):
    """The critic's target as the paper writes it, from the script's x*."""
    a, h = phased_dmd.transition(t, s)
    return ((a[:, None] * x_s + h[:, None] * eps) - phased_dmd.fake_target(x_s, eps, t, s)) / t[
        :, None
    ]


def line(x, y):
    """Slope and intercept of y on x, per row of [B, n]."""
    mx, my = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    slope = ((x - mx) * (y - my)).mean(1, keepdim=True) / ((x - mx) ** 2).mean(1, keepdim=True)
    return slope, my - slope * mx


# ---- 10.1 - 10.5: the forward transition, the critic's target and its weight ------------------------------------------------------------------


@pytest.mark.parametrize(
    "s, t, a, v",
    [
        (0.5, 0.75, 0.5, 0.5),
        (5 / 6, 0.9, 0.6, 0.56),
        (5 / 6, 0.95, 0.3, 0.84),
        (0.625, 0.8, 0.5333333, 0.5288889),
        (0.0, 0.3, 0.7, 0.09),
    ],
)
def test_transition(s, t, a, v):
    s, t = f64(s), f64(t)
    alpha, h = phased_dmd.transition(t, s)
    assert alpha.item() == pytest.approx(a, abs=1e-7) and (h**2).item() == pytest.approx(
        v, abs=1e-7
    )
    assert (h**2).item() == pytest.approx(
        (t**2 - ((1 - t) / (1 - s)) ** 2 * s**2).item(), abs=1e-15
    )
    var0 = 0.37  # from a correct x_s the usual marginal of x_t
    assert (alpha**2 * ((1 - s) ** 2 * var0 + s**2) + h**2).item() == pytest.approx(
        ((1 - t) ** 2 * var0 + t**2).item(), abs=1e-15
    )


def test_transition_at_zero_is_the_ordinary_one():
    """Exactly: the last phase noises as DMD2 does, bit for bit."""
    t = torch.rand(1000, dtype=torch.float64)
    a, h = phased_dmd.transition(t, ZERO)
    assert torch.equal(a, 1 - t) and torch.equal(h, t)
    t = f64(0.501, 0.6, 0.999)
    assert torch.allclose(phased_dmd.transition(t, f64(0.5))[1] ** 2, 2 * t - 1, atol=1e-15)
    near = phased_dmd.transition(f64(0.5 + 1e-9), f64(0.5))[1]  # no cancellation next to s
    assert (near**2).item() == pytest.approx(2e-9, rel=1e-6)


@pytest.mark.parametrize(
    "s, t, c_eps, c_x",
    [
        (0.5, 0.75, 1.414214, -2),
        (0.5, 0.55, 3.162278, -2),
        (5 / 6, 0.9, 4.543441, -6),
        (5 / 6, 0.95, 2.400397, -6),
        (0.0, 0.4, 1, -1),
        (0.2, 0.9, 1.007333, -1.25),
    ],
)
def test_coefficients_of_the_target(s, t, c_eps, c_x):
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    t, s = f64(t).reshape(1), f64(s)
    assert velocity_target(zero, one, t, s).item() == pytest.approx(c_eps, abs=6e-7)
    assert velocity_target(one, zero, t, s).item() == pytest.approx(c_x, abs=1e-12)


def test_target_for_any_sample():
    """target = -x_t / (1 - t) + t / (1 - t) eps / h, valid noised image or not; and its x* is the x-prediction target."""
    for s in (0.0, 0.5, 5 / 6):
        x, eps, t = (
            3 * normal(50, 7),
            normal(50, 7, seed=1),
            s + (1 - s) * torch.linspace(0.01, 0.99, 50, dtype=torch.float64),
        )
        a, h = (c[:, None] for c in phased_dmd.transition(t, f64(s)))
        u = t[:, None]
        expected = -(a * x + h * eps) / (1 - u) + u / (1 - u) * eps / h
        assert (
            (velocity_target(x, eps, t, f64(s)) - expected) / (1 + expected.abs())
        ).abs().max() < 1e-12
        assert torch.allclose(
            velocity_target(x, eps, t, f64(s)),
            (u + (1 - u) * s**2 / (1 - s) ** 2) / h * eps - x / (1 - s),
            rtol=1e-12,
            atol=1e-12,
        )
    assert torch.equal(phased_dmd.fake_target(x, eps, t, ZERO), x)  # s = 0: the sample itself


def moments(t=0.75, s=0.5, mean=2.0, var=0.25):
    """x_s of correct noised data N(mean, var) at s, x_t, and the target at t, on exact moments: each [1, 4]."""
    x_s = ((1 - s) * mean + math.sqrt((1 - s) ** 2 * var + s**2) * Z)[None]
    a, h = phased_dmd.transition(f64(t), f64(s))
    return x_s, a * x_s + h * EPS[None]


def test_target_is_unbiased():
    x_s, x_t = moments()
    slope, intercept = line(x_t, velocity_target(x_s, EPS[None], f64(0.75).reshape(1), f64(0.5)))
    assert slope.item() == pytest.approx(1.189189, abs=1e-6) and intercept.item() == pytest.approx(
        -2.594595, abs=1e-6
    )
    exact = lambda x: (
        (x - Gauss()(x, f64(0.25).reshape(1), f64(0.75).reshape(1), {})) / 0.75
    )  # E[eps - x_0 | x_t]
    assert torch.allclose(slope * x_t + intercept, exact(x_t), atol=1e-14)
    slope, intercept = line(
        x_t, phased_dmd.fake_target(x_s, EPS[None], f64(0.75).reshape(1), f64(0.5))
    )
    assert slope.item() == pytest.approx(0.108108, abs=1e-6) and intercept.item() == pytest.approx(
        1.945946, abs=1e-6
    )
    slope, intercept = line(x_t, EPS - x_s)  # the ordinary target is biased
    assert slope.item() == pytest.approx(0.952833, abs=1e-6) and intercept.item() == pytest.approx(
        -1.476417, abs=1e-6
    )


@pytest.mark.parametrize(
    "s, level",
    [
        (0.0, 0.316228),
        (0.5, 0.55),
        (0.625, 0.655496),
        (0.75, 0.767054),
        (5 / 6, 0.843586),
        (0.875, 0.882327),
        (0.9375, 0.940921),
    ],
)
def test_weight_of_the_critic_loss(s, level):
    """Below 1 only for t below `level`; the loss is then the paper's clamp(1 / h^2, 0, 10) times the error of h F."""
    s = f64(s)
    around = phased_dmd.fake_weight(f64(level - 1e-6, level + 1e-6), s, "all")
    assert around[0] < 1 and around[1] == 1
    t = s + (1 - s) * torch.linspace(0.02, 0.98, 40, dtype=torch.float64)
    x, eps, critic = normal(40, 5), normal(40, 5, seed=1), Affine()
    a, h = phased_dmd.transition(t, s)
    x_t = a[:, None] * x + h[:, None] * eps
    loss = phased_dmd.fake_loss(
        critic,
        x,
        x_t,
        eps,
        t,
        s,
        {},
        phased_dmd.fake_weight(t, s, "all") * native_weight("flow", 1 - t, t),
    )
    v = (x_t - critic(x_t, 1 - t, t, {})) / t[:, None]
    scaled, target = h[:, None] * v, h[:, None] * velocity_target(x, eps, t, s)
    assert loss.item() == pytest.approx(
        ((1 / h**2).clamp(0, 10)[:, None] * (scaled - target) ** 2).mean().item(), rel=1e-12
    )
    flat = torch.ones_like(t)
    assert torch.equal(phased_dmd.fake_weight(t, s, "none"), flat) and torch.equal(
        phased_dmd.fake_weight(t, s, "inner"), flat
    ) == (s == 0)
    loss.backward()
    assert critic.gain.grad.abs() > 0


def test_critic_loss_reaches_the_critic_only():
    critic, x = Affine(), normal(4, 3).requires_grad_()
    t = f64(0.6, 0.7, 0.8, 0.9)
    phased_dmd.fake_loss(critic, x, normal(4, 3), normal(4, 3), t, f64(0.5), {}, t).backward()
    assert x.grad is None and critic.gain.grad.abs() > 0


# ---- 10.7: the student's gradient -----------------------------------------------------------------------------------------------------------


class Constant(Affine):
    forward = lambda self, x, alpha, sigma, cond: torch.full_like(x, self.shift.item())


@pytest.mark.parametrize("s, t, w", [(0.0, 0.5, 0.5), (0.5, 0.75, 1 / 6), (5 / 6, 0.9, 1 / 15)])
def test_weight_of_equation_10(s, t, w):
    """T - F = (f - r) / t, so g = w (T - F) is w / t for f - r = 1; w in the paper's form alpha_t alpha_{t|s} / (alpha_t sigma_t + sigma_t^2)."""
    x, t, s = torch.zeros(1, 3, dtype=torch.float64), f64(t).reshape(1), f64(s)
    g = phased_dmd.dm_gradient(
        x, x, t, s, {}, Constant(shift=1.0), Constant(shift=2.0), 1.0, "paper"
    )[0]
    assert torch.allclose(g * t, torch.full_like(g, w), atol=1e-15)
    a, _ = phased_dmd.transition(t, s)
    assert (g * t)[0, 0].item() == pytest.approx(
        ((1 - t) * a / ((1 - t) * t + t**2)).item(), abs=1e-15
    )
    assert not phased_dmd.dm_gradient(
        x, x, f64(1.0).reshape(1), s, {}, Constant(shift=1.0), Constant(shift=2.0), 1.0, "paper"
    )[0].any()  # pure noise says nothing


def test_normaliser_and_loss():
    t, s = f64(0.6, 0.7, 0.8, 0.9), f64(0.5)
    x0, x_t = normal(4, 5), normal(4, 5, seed=1)
    g, r, f, w = phased_dmd.dm_gradient(
        x0, x_t, t, s, {}, Affine(0.2), Affine(0.4, 0.3), 1.0, "dmd2"
    )
    assert (
        torch.equal(g, (f - r) / (x0 - r).abs().mean(1, keepdim=True))
        and torch.equal(w, (x0 - r).abs().mean(1))
        and not (g.requires_grad or f.requires_grad)
    )
    y = x0.clone().requires_grad_()
    loss = phased_dmd.dm_loss(y, g)
    loss.backward()
    assert (y.grad - g / y.numel()).abs().max() < 1e-16 and loss.item() == pytest.approx(
        0.5 * g.square().mean().item(), abs=1e-15
    )
    same = Affine(0.2)
    for normaliser in ("paper", "dmd2"):
        assert not phased_dmd.dm_gradient(x0, x_t, t, s, {}, same, same, 1.0, normaliser)[0].any()


@pytest.mark.parametrize(
    "t_j, s, factor",
    [
        (1.0, 0.75, 4),
        (0.9, 0.75, 6),
        (1.0, 5 / 6, 6),
        (0.9375, 5 / 6, 9),
        (1.0, 0.875, 8),
        (0.954545, 0.875, 12),
        (0.5, 0.0, 1),
    ],
)
def test_the_two_spaces(t_j, s, factor):
    """The same g on the clean estimate moves the expert t_j / (t_j - s) times as far: the official code's weighting of its steps."""
    grads, g, x_j = [], normal(6, 3), normal(6, 3, seed=1)
    for space in (1, 0):
        expert = Affine()
        y = phased_dmd.step(expert, x_j, f64(t_j), f64(s), {})[space]
        phased_dmd.dm_loss(y, g).backward()
        grads.append(expert.gain.grad)
    assert (grads[0] / grads[1]).item() == pytest.approx(factor, rel=1e-4)


# ---- 10.6: fixed points ---------------------------------------------------------------------------------------------------------------------


def field(p, levels, s, inputs, t_j):
    """Descent direction of the expert's two weights (gain, shift), by the script's functions: rollout's last step, re-noising, the best affine critic
    for the script's target, equation 10. Teacher N(2, 0.25)."""
    expert = Affine(*p.tolist())
    x_s, x0 = phased_dmd.step(expert, inputs.expand(len(levels), 4), t_j, s, {})
    a, h = phased_dmd.transition(levels, s)
    eps = EPS.expand(len(levels), 4)
    x_t = phased_dmd.combine(a, x_s.detach(), h, eps)
    slope, intercept = line(x_t, phased_dmd.fake_target(x_s.detach(), eps, levels, s))
    critic = lambda x, *rest: slope * x + intercept
    g = phased_dmd.dm_gradient(x0, x_t, levels, s, {}, Gauss(), critic, 1.0, "paper")[0]
    phased_dmd.dm_loss(x_s, g).backward()
    return torch.stack([expert.gain.grad, expert.shift.grad])


def fixed_point(s, inputs, t_j):
    """(mean, variance) of x_s where the expert comes to rest, by Newton's method; the rest must be stable, i.e. descent leads there."""
    s, t_j = f64(s), f64(t_j)
    levels = s + (1 - s) * (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    p = f64(0.3, 0.8)
    jacobian = lambda p: torch.stack(
        [
            (field(p + d, levels, s, inputs, t_j) - field(p - d, levels, s, inputs, t_j)) / 2e-5
            for d in 1e-5 * torch.eye(2, dtype=torch.float64)
        ],
        1,
    )
    for _ in range(30):
        p = p - torch.linalg.solve(jacobian(p), field(p, levels, s, inputs, t_j)).clamp(-0.3, 0.3)
    assert (torch.linalg.eigvals(jacobian(p)).real > 0).all()
    x_s = phased_dmd.step(Affine(*p.tolist()), inputs, t_j, s, {})[0]
    return x_s.mean().item(), x_s.var(unbiased=False).item()


def check_fixed_points():
    """Phase 1 ends at the teacher's own distribution at s = 0.5, N((1 - s) 2, (1 - s)^2 0.25 + s^2); phase 2, from there, at its data."""
    mean, var = fixed_point(0.5, Z, 1.0)
    assert mean == pytest.approx(1, abs=1e-10) and var == pytest.approx(0.3125, abs=1e-10)
    mean, var = fixed_point(0.0, mean + math.sqrt(var) * Z, 0.5)
    assert mean == pytest.approx(2, abs=1e-10) and var == pytest.approx(0.25, abs=1e-10)


def biased(x_s, eps, t, s):  # pitfall 1: x* of the velocity eps - x_s
    a, h = (c[:, None] for c in phased_dmd.transition(t, s))
    return a * x_s + h * eps - t[:, None] * (eps - x_s)


RIGHT = {name: getattr(phased_dmd, name) for name in ("dm_gradient", "fake_target")}
BROKEN = {
    "ordinary target": ("fake_target", biased),
    "sign": ("dm_gradient", lambda *a: (lambda g, *rest: (-g, *rest))(*RIGHT["dm_gradient"](*a))),
    "ordinary noise": (
        "transition",
        lambda t, s: ((1 - t) * torch.ones_like(s), t * torch.ones_like(s)),
    ),  # as if x_s were clean
    "target of the sample": ("fake_target", lambda x_s, eps, t, s: x_s),
}


def test_fixed_points():
    check_fixed_points()


@pytest.mark.parametrize("what", BROKEN)
def test_broken_has_other_fixed_points(what, monkeypatch):
    monkeypatch.setattr(phased_dmd, *BROKEN[what])
    with pytest.raises((AssertionError, torch.linalg.LinAlgError)):
        check_fixed_points()


def test_fixed_point_of_the_ordinary_target(monkeypatch):
    """What the bias does: a mean and a spread far off, and a critic that differs from the teacher where it should not."""
    monkeypatch.setattr(phased_dmd, "fake_target", biased)
    mean, var = fixed_point(0.5, Z, 1.0)
    assert mean == pytest.approx(1.5116, abs=2e-3) and var == pytest.approx(0.0853, abs=2e-3)
    gap = []
    for target in (biased, RIGHT["fake_target"]):
        x_s, x_t = moments()
        slope, intercept = line(x_t, target(x_s, EPS[None], f64(0.75).reshape(1), f64(0.5)))
        x = f64(0.3).reshape(1, 1)
        gap.append(
            ((slope * x + intercept) - Gauss()(x, f64(0.25).reshape(1), f64(0.75).reshape(1), {}))
            .abs()
            .item()
            / 0.75
        )  # as velocities
    assert gap[0] == pytest.approx(1.0473, abs=1e-4) and gap[1] < 1e-14


# ---- 10.8, 10.10: grids, levels, sampler, experts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, shift, expected",
    [
        (4, 5, [1, 0.9375, 0.833333, 0.625]),
        (4, 3, [1, 0.9, 0.75, 0.5]),
        (4, 7, [1, 0.954545, 0.875, 0.7]),
        (4, 1, [1, 0.75, 0.5, 0.25]),
        (2, 1, [1, 0.5]),
        (1, 5, [1]),
    ],
)
def test_step_grid(n, shift, expected):
    assert phased_dmd.step_times(n, shift).tolist() == pytest.approx([*expected, 0], abs=1e-6)


def test_phases():
    assert [phased_dmd.phase_ends(n, k) for n, k in ((4, 2), (4, 4), (1, 1), (4, 1), (5, 2))] == [
        [2, 4],
        [1, 2, 3, 4],
        [1],
        [4],
        [2, 5],
    ]
    assert [phased_dmd.phase_starts(*a) for a in ((1, [7]), (2, [7]), (4, [7]), (3, [2, 9]))] == [
        [0],
        [0, 7],
        [0, 7, 14, 21],
        [0, 2, 11],
    ]


@pytest.mark.parametrize(
    "s, margin, shift, raw",
    [
        (0.5, 0.0, 1, (501, 1000)),
        (0.5, 0.02, 1, (520, 980)),
        (0.0, 0.02, 1, (20, 980)),
        (0.0, 0.0, 1, (1, 1000)),
        (0.875, 0.02, 7, (520, 980)),
        (5 / 6, 0.0, 5, (501, 1000)),
    ],
)
def test_levels(s, margin, shift, raw):
    """Nested intervals: from just above s up to 1 in every phase, in the official code's count of timesteps."""
    grid = Flow(shift).grid(phased_dmd.N)
    low, high = phased_dmd.levels(grid, f64(s), margin)
    assert (low + 1, high) == raw and grid[low] > s + 1e-9
    if shift == 7:
        assert grid[low].item() == pytest.approx(0.883495, abs=1e-6) and (
            phased_dmd.transition(grid[low], f64(s))[1] ** 2
        ).item() == pytest.approx(0.115468, abs=1e-6)
    if shift == 5:
        assert grid[low:high].mean().item() == pytest.approx(0.9308, abs=2e-4)
    with pytest.raises(UserError, match="no noise level"):
        phased_dmd.levels(grid, f64(0.999), 0.4)


def test_euler():
    """N steps of constant velocity move x by -v in all, and a jump from t_j to s is the steps in between."""
    v, z = normal(3, 2), normal(3, 2, seed=1)
    flow = lambda x, alpha, sigma, cond: x - sigma * v
    times = phased_dmd.step_times(4, 5)
    assert torch.allclose(phased_dmd.rollout(flow, times, 4, {}, z), z - v, atol=1e-14)
    x = phased_dmd.rollout(flow, times, 1, {}, z)
    assert torch.allclose(
        phased_dmd.step(flow, x, times[1], times[3], {})[0],
        phased_dmd.rollout(flow, times, 3, {}, z),
        atol=1e-14,
    )
    x0 = Affine()(z, 1, 0, {})
    assert torch.equal(
        phased_dmd.step(Affine(), z, f64(0.5), ZERO, {})[0], x0
    )  # to 0: the clean estimate itself


def routed(nfe, phases, shift):
    experts, times, ends = (
        [Affine(0.1 * i) for i in range(phases)],
        phased_dmd.step_times(nfe, shift),
        phased_dmd.phase_ends(nfe, phases),
    )
    return (
        ByLevel(experts, [float(times[b] / (1 - times[b])) for b in ends[:-1]]),
        times,
        ends,
    )


@pytest.mark.parametrize(
    "nfe, phases, shift",
    [(4, 2, 5.0), (4, 4, 3.0), (4, 2, 1.0), (2, 2, 7.0), (3, 2, 0.3), (4, 1, 1.0)],
)
def test_every_step_goes_to_its_expert(nfe, phases, shift):
    """The step at s_k itself is the next expert's; training inputs are the sampler's inputs, and the jump of a phase's last step is its Euler step."""
    student, times, ends = routed(nfe, phases, shift)
    z = normal(5, 3)
    x = phased_dmd.sample(student, z, {}, nfe, None, shift)
    for k, (a, b) in enumerate(zip([0, *ends], ends)):
        calls = student.experts[k].calls
        assert [c[1] for c in calls] == [
            pytest.approx(float(1 - t), abs=1e-12) for t in times[a:b]
        ] and not any(c[2] for c in calls)
        inputs = [c[0] for c in calls]
        for j in range(a, b):
            assert torch.equal(phased_dmd.rollout(student, times, j, {}, z), inputs[j - a])
    x_j = phased_dmd.rollout(student, times, nfe - 1, {}, z)
    assert (
        torch.equal(x, phased_dmd.step(student.experts[-1], x_j, times[nfe - 1], times[nfe], {})[0])
        and not x.requires_grad
    )


def test_a_sample_does_not_depend_on_its_batch():
    teacher = load_teacher("toy-cond")
    student = ByLevel([teacher.copy(), teacher.copy()], [1.0])
    sampler = lambda m, z, c, noise: phased_dmd.sample(m, z, c, 4, noise)
    whole = next(generate(sampler, student, 12, seed=3, batch=12))[2]
    parts = {
        i: row
        for part, _, x in generate(sampler, student, 12, seed=3, batch=5, rank=1, world=2)
        for i, row in zip(part.tolist(), x)
    }
    assert sorted(parts) == [1, 3, 5, 7, 9, 11] and all(
        torch.allclose(row, whole[i], atol=1e-5) for i, row in parts.items()
    )


def test_teacher_sampler_is_the_start(monkeypatch):
    """Before training the student is the teacher's own Euler sampler on the same grid (flow networks)."""
    monkeypatch.setattr(Toy, "adapter", "toy")
    net = Toy(MLP(width=16), Flow(), "flow", (2,), 8, labelled=True)
    z, cond = torch.randn(6, 2), dict(labels=torch.arange(6))
    ours = phased_dmd.sample(ByLevel([net.copy(), net.copy()], [1.0]), z, cond, 4)
    assert torch.allclose(ours, teacher_sample(net, z, cond, 4), atol=1e-5)


# ---- runs: the limit of one phase, who is trained when, by which gradient ------------------------------------------------------------------------


class Trace(list):
    """main() of a script in this process. One entry per optimiser step: role (expert number, or "critic"), lr, gradients, weights before and after."""

    def __init__(self, monkeypatch, tmp_path, script, *flags, patch=lambda: None):
        super().__init__()
        self.made, self.integers, self.shared, self.steps, self.logs = {}, [], [], [], []
        self.keep(monkeypatch, script, "EMA", "ema")
        patch()
        self.keep(monkeypatch, models, "load_teacher", "teacher")
        step, integers, shared = Run.step, BatchRandom.integers, BatchRandom.shared_int
        monkeypatch.setattr(Run, "step", lambda run, opt, clip: self.step(step, run, opt, clip))
        monkeypatch.setattr(
            Run,
            "log",
            lambda run, it, values: self.logs.append(
                {k: float(torch.as_tensor(v).detach()) for k, v in values.items()}
            ),
        )
        monkeypatch.setattr(
            BatchRandom, "integers", lambda draw, *a: self.integers.append(a) or integers(draw, *a)
        )
        monkeypatch.setattr(
            BatchRandom, "shared_int", lambda draw, *a: self.shared.append(a) or shared(draw, *a)
        )
        for name in ("export", "pictures", "report"):
            monkeypatch.setattr(metrics, name, lambda *a, **k: None)
        default = [
            "--teacher",
            "toy-cond",
            "--batch",
            "16",
            "--out",
            str(tmp_path / "out"),
            "--overwrite",
            "--save-every",
            "0",
            "--sample-every",
            "0",
            "--log-every",
            "1",
        ]
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *default, *map(str, flags)])
        handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            script.main()
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
            monkeypatch.undo()

    def keep(self, monkeypatch, module, name, key):
        make = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: self.made.setdefault(key, make(*a, **k)))

    def nets(self, params=()):
        student = self.made["ema"].live
        nets = dict(enumerate(student.experts)) if isinstance(student, Routed) else {0: student}
        if params and not any(params[0] is p for net in nets.values() for p in net.parameters()):
            self.made["critic"] = nn.ParameterList(
                params
            )  # of the critic only its parameters are known here
        return (
            nets
            | ({"critic": self.made["critic"]} if "critic" in self.made else {})
            | dict(teacher=self.made["teacher"])
        )

    def step(self, step, run, opt, clip):
        params = [p for group in opt.param_groups for p in group["params"] if p.grad is not None]
        nets = self.nets(params)
        role = next(k for k, net in nets.items() if next(net.parameters()) is params[0])
        flat = lambda net: torch.cat([p.detach().flatten() for p in net.parameters()])
        entry = dict(
            role=role,
            lr=opt.param_groups[0]["lr"],
            before={k: flat(net) for k, net in nets.items()},
            moments=len(opt.state),
            grads={
                k: [None if p.grad is None else p.grad.clone() for p in net.parameters()]
                for k, net in nets.items()
            },
        )
        norm = step(run, opt, clip)
        self.append(
            entry
            | dict(
                after={k: flat(net) for k, net in nets.items()},
                average=[flat(e) for e in getattr(self.made["ema"].model, "experts", [])],
            )
        )
        return norm

    def flat(self, i):
        return torch.cat([g.flatten() for g in self[i]["grads"][self[i]["role"]]]).double()


@pytest.fixture
def trace(monkeypatch, tmp_path):
    return lambda *flags, script=phased_dmd, **kw: Trace(
        monkeypatch, tmp_path, script, *flags, **kw
    )


class FlowToy(Toy):
    """A flow network small enough for exact comparisons, also in float64."""

    double = False

    def copy(self, adapters=None):
        twin = super().copy()
        return twin if not self.double else twin.apply(lambda m: nn.Module.double(m)) or twin


@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["float32", "float64"]
)
def test_one_phase_is_dmd2(dtype, bound, trace, monkeypatch):
    """One phase, one step, DMD2's normaliser: every gradient and every weight of dmd2 on a flow teacher, same seed."""

    def patch():
        torch.manual_seed(0)
        teacher = FlowToy(MLP(width=16), Flow(), "flow", (2,), 8, labelled=True)
        teacher.double = dtype == torch.float64
        teacher = (teacher.copy() if teacher.double else teacher).requires_grad_(False)
        draw = BatchRandom.normal
        monkeypatch.setattr(models, "load_teacher", lambda *a, **kw: teacher)
        monkeypatch.setattr(
            BatchRandom, "normal", lambda self, *shape: draw(self, *shape).to(dtype)
        )

    common = [
        "--iters",
        7,
        "--ratio",
        3,
        "--cfg",
        2,
        "--nfe",
        1,
        "--shift",
        1,
        "--lr",
        1e-3,
        "--lr-fake",
        2e-3,
        "--cooldown",
        0,
    ]
    ours = trace(*common, "--phases", 1, "--step-shift", 1, "--normaliser", "dmd2", patch=patch)
    theirs = trace(*common, "--t-range", 0, 1, script=dmd2, patch=patch)
    assert (
        [s["role"] for s in ours]
        == [s["role"] for s in theirs]
        == [0, "critic", "critic", "critic"] * 2 + [0, "critic"]
    )
    for i, (a, b) in enumerate(zip(ours, theirs)):
        assert (ours.flat(i) - theirs.flat(i)).norm() <= bound * theirs.flat(
            i
        ).norm() and theirs.flat(i).norm() > 1e-4
        x, y = a["after"][a["role"]].double(), b["after"][b["role"]].double()
        assert (x - y).norm() <= bound * y.norm() and not torch.equal(
            b["before"][b["role"]], b["after"][b["role"]]
        )
    for a, b in zip(ours.logs, theirs.logs, strict=True):
        assert all(
            a[k] == pytest.approx(b[k], rel=bound)
            for k in ("fake", "mean", "std", "dm", "dm_norm")
            if k in b
        )


VARIANTS = [
    "",
    "--cfg 2.5 --normaliser paper",
    "--space x0 --normaliser dmd2 --clamp none --margin 0.02 --critic-on full",
    "--nfe 3 --step-shift 5 --shift 5",
    "--ema 100 --cfg 2",
]


@pytest.mark.parametrize("flags", VARIANTS)
def test_gradient_routing(trace, flags):
    """In phase k only G_k on student turns and the critic on its own; nothing else has a gradient or moves, but for the critic's restart."""
    steps = trace("--iters", 8, "--ratio", 2, "--phase-iters", 3, *flags.split())
    turns = lambda k, n: sum([[k, "critic"] if i % 2 == 0 else ["critic"] for i in range(n)], [])
    assert [s["role"] for s in steps] == turns(0, 3) + turns(1, 5)
    start = steps.nets()[
        "teacher"
    ].copy()  # the teacher's network, which the exact toy teacher itself does not use
    start = torch.cat([p.detach().flatten() for p in start.parameters()])
    begin = 5  # step at which phase 2 begins
    assert (
        steps[begin]["role"] == 1
        and steps[begin + 1]["moments"] == 0 < steps[begin + 2]["moments"]
        and steps[3]["moments"]
    )
    for i, s in enumerate(steps):
        for net, grads in s["grads"].items():
            assert [g is not None for g in grads] == [net == s["role"]] * len(grads), (
                s["role"],
                net,
            )
        changed = {k for k in s["before"] if not torch.equal(s["before"][k], s["after"][k])}
        assert changed <= {s["role"]} and (changed or i in (0, begin))
        if 0 < i:
            moved = {
                k
                for k in s["before"]
                if k in steps[i - 1]["after"]
                and not torch.equal(s["before"][k], steps[i - 1]["after"][k])
            }
            assert moved == (
                set() if i != begin else {"critic"} | ({0} if "--ema" in flags else set())
            )
    assert torch.equal(steps[begin]["before"]["critic"], start) and torch.equal(
        steps[begin]["before"][1], start
    )
    assert not torch.equal(steps[begin - 1]["after"]["critic"], start) and not torch.equal(
        steps[begin]["before"][0], start
    )
    if "--ema" in flags:  # a finished expert stays as its average
        assert torch.equal(
            steps[begin]["before"][0], steps[begin - 1]["average"][0]
        ) and not torch.equal(steps[begin]["before"][0], steps[begin - 1]["after"][0])
        assert torch.equal(steps[-1]["average"][0], steps[begin]["before"][0])
    assert not any(p.requires_grad for p in steps.nets()["teacher"].parameters())


@pytest.mark.parametrize(
    "flags, expected, shared",
    [
        ("--phases 2 --nfe 4", {(0, 8), (500, 1000), (0, 1000)}, {(0, 2), (2, 4)}),
        (
            "--phases 4 --nfe 4",
            {(0, 8), (750, 1000), (500, 1000), (250, 1000), (0, 1000)},
            {(0, 1), (1, 2), (2, 3), (3, 4)},
        ),
        ("--phases 2 --margin 0.02", {(0, 8), (519, 980), (19, 980)}, {(0, 2), (2, 4)}),
        ("--phases 1 --nfe 4", {(0, 8), (0, 1000)}, {(0, 4)}),
    ],
)
def test_draws(trace, flags, expected, shared):
    """Levels of both losses from (s_k, 1] in every phase, one step index of the phase for the whole batch."""
    steps = trace("--iters", 8, "--phase-iters", 2, "--ratio", 1, "--step-shift", 1, *flags.split())
    assert (
        set(steps.integers) == expected and set(steps.shared) == shared and len(steps.shared) == 8
    )
    assert [line["phase"] for line in steps.logs] == [
        min(i // 2, len(shared) - 1) + 1 for i in range(8)
    ]


def test_one_call_has_gradient(trace, monkeypatch):
    """Of the rollout only the last pass, on student turns; the earlier passes and those of teacher and critic in the student's loss have none."""
    seen, forward = [], Toy.forward

    def patch():
        monkeypatch.setattr(
            Toy,
            "forward",
            lambda self, *a, **k: seen.append(torch.is_grad_enabled()) or forward(self, *a, **k),
        )
        monkeypatch.setattr("common.run.Run.rehearse", lambda *a: None)

    steps = trace("--iters", 6, "--phase-iters", 3, "--ratio", 3, patch=patch)
    assert sum(seen) == sum(s["role"] == "critic" for s in steps) + 2


def test_rates_of_every_phase(trace):
    steps = trace(
        "--iters",
        12,
        "--phase-iters",
        4,
        "--ratio",
        1,
        "--warmup",
        2,
        "--cooldown",
        0.5,
        "--lr-fake",
        1.0,
        "--clip",
        1e-9,
    )
    lr = [s["lr"] for s in steps if s["role"] == "critic"]
    assert lr == pytest.approx([0.5, 1, 1, 0.5, 0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_ida(trace):
    """Student step, then the critic is drawn towards the expert of the phase."""
    steps = trace(
        "--iters", 3, "--phase-iters", 1, "--ida", 0.75, "--lr", 0.1, "--cfg", 2, "--ratio", 2
    )
    moved = [i for i, s in enumerate(steps) if s["role"] == 1][0]
    a, b = steps[moved]["before"]["critic"], steps[moved]["after"][1]
    assert (
        torch.allclose(steps[moved + 1]["before"]["critic"], 0.75 * a + 0.25 * b, atol=1e-6)
        and (a - b).norm() > 0.1
    )


def test_the_critic_sees_full_rollouts(trace):
    """--critic-on full: on critic iterations all steps of the phase are run, no step index is drawn."""
    steps = trace("--iters", 6, "--phase-iters", 3, "--ratio", 3, "--critic-on", "full")
    assert steps.shared == [(0, 2), (2, 4)]


def test_the_first_student_gradient_by_hand(trace):
    """One iteration of phase 1 against the paper's formulas written out with velocities."""
    steps = trace("--iters", 1, "--cfg", 2, "--normaliser", "paper", "--step-shift", 1)
    teacher, draw = load_teacher("toy-cond"), BatchRandom(0, 0, 16)
    expert, fake = teacher.copy(), teacher.copy()
    cond, z, j, s = (
        teacher.encode(draw.randint(0, 8)),
        draw.randn(2),
        draw.shared_randint(0, 2),
        0.5,
    )
    v = lambda net, x, t: (x - net(x, 1 - t, t, cond)) / (t.reshape(-1, 1) if t.ndim else t)
    t_j, x_j = f64(1.0), z
    if j == 1:
        with torch.no_grad():
            x_j = (z - 0.25 * v(expert, z, t_j)).float()
        t_j = f64(0.75)
    x_s = x_j + (s - t_j) * v(expert, x_j, t_j)
    t = (draw.randint(500, 1000) + 1).double() / 1000
    u = t[:, None]
    a, h = (1 - u) / (1 - s), (u**2 - ((1 - u) / (1 - s)) ** 2 * s**2).sqrt()
    x_t = (a * x_s.detach() + h * draw.randn(2)).float()
    with torch.no_grad():
        null = lambda net, x, t: (x - net(x, 1 - t, t, teacher.null(16))) / t[:, None]
        T, F = 2 * v(teacher, x_t, t) - null(teacher, x_t, t), v(fake, x_t, t)
    w = (1 - u) ** 2 / ((1 - s) * u)
    x_s.backward((w * (T - F)).float() / x_s.numel())
    expected = torch.cat([p.grad.flatten() for p in expert.parameters()]).double()
    assert (steps.flat(0) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("clamp", ["inner", "none"])
def test_the_first_critic_gradient_by_hand(trace, clamp):
    """The paper's clamped loss times the toy network's own weight; the critic sees what the student made before its step, in the first turn."""
    steps = trace("--iters", 1, "--step-shift", 1, "--clamp", clamp)
    teacher, draw = load_teacher("toy-cond"), BatchRandom(0, 0, 16)
    expert, critic = teacher.copy().requires_grad_(False), teacher.copy()
    cond, x, s = teacher.encode(draw.randint(0, 8)), draw.randn(2), 0.5
    for t, to in [(1.0, s)] if draw.shared_randint(0, 2) == 0 else [(1.0, 0.75), (0.75, s)]:
        x = (x + (to - t) * (x - expert(x, 1 - t, t, cond)) / t).float()
    draw.randint(500, 1000), draw.randn(2)  # of the student's turn
    t = (draw.randint(500, 1000) + 1).double() / 1000
    eps, u = draw.randn(2), t[:, None]
    h2 = u**2 - ((1 - u) / (1 - s)) ** 2 * s**2
    x_t = ((1 - u) / (1 - s) * x + h2.sqrt() * eps).float()
    target = (u + (1 - u) * s**2 / (1 - s) ** 2) / h2.sqrt() * eps - x / (1 - s)
    velocity = (x_t - critic(x_t, 1 - t, t, cond)) / u
    weight = (10 * h2).clamp(max=1) if clamp == "inner" else 1
    (
        weight * u**2 * teacher.native_loss_weight(1 - t, t)[:, None] * (velocity - target) ** 2
    ).mean().backward()  # u^2: from a velocity's error to a clean estimate's
    expected = torch.cat([p.grad.flatten() for p in critic.parameters()]).double()
    assert (
        steps[1]["role"] == "critic" and (steps.flat(1) - expected).norm() < 1e-5 * expected.norm()
    )


@pytest.mark.parametrize("nfe, phases, shift", [(4, 2, 5), (4, 4, 3), (3, 2, 0.3)])
def test_experts_of_a_run(trace, nfe, phases, shift):
    """The student that is trained, and saved, sends the step at s_k to the expert of phase k + 1."""
    student = (
        trace("--iters", 1, "--nfe", nfe, "--phases", phases, "--step-shift", shift)
        .made["ema"]
        .live
    )
    ends, times = phased_dmd.phase_ends(nfe, phases), phased_dmd.step_times(nfe, shift)
    assert [int(student.route(1, 1 - t, t, {})) for t in times[:-1]] == [
        sum(i >= b for b in ends) for i in range(nfe)
    ]


@pytest.mark.slow
def test_the_bias_of_the_ordinary_target(trace, monkeypatch):
    """Phase 1 of the toy: x_s against re-noised data. With the target eps - x_s the critic, and so the student, goes elsewhere."""

    def distance(change):
        def patch():
            monkeypatch.setattr(phased_dmd, "fake_target", change)

        steps = trace(
            "--teacher",
            "toy",
            "--batch",
            256,
            "--iters",
            800,
            "--phase-iters",
            800,
            "--log-every",
            1000,
            patch=patch,
        )
        student, teacher, gen = (
            steps.made["ema"].live,
            steps.made["teacher"],
            torch.Generator().manual_seed(0),
        )
        times = phased_dmd.step_times(4, 3.0)
        x_s = phased_dmd.rollout(
            student, times, 2, teacher.null(4000), torch.randn(4000, 2, generator=gen)
        )
        data = 0.25 * teacher.mixture.sample(4000, generator=gen) + 0.75 * torch.randn(
            4000, 2, generator=gen
        )
        return energy_distance(x_s, data)

    right, wrong = distance(RIGHT["fake_target"]), distance(biased)
    assert right < 0.004 and wrong > 5 * right, (right, wrong)
