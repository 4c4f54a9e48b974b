"""phased_dmd.py: its equations on closed-form Gaussians, the limit of one phase, then who is
trained when in a real run.

Expected numbers were derived apart from the code. What it copies from dmd2.py is tested there;
tests/test_form.py compares the copies.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn as nn
from helpers import byhand
from helpers.frame import check_frame
from helpers.gaussian import Gauss, f64, normal, relative_error
from helpers.trace import Trace, run_main, weights

import dmd2
import phased_dmd
from common.errors import UserError
from common.rng import BatchRandom
from common.routed import ByLevel
from common.sampling import generate, teacher_sample
from common.schedules import EDM, VP, Flow, TrigFlow, add_noise, native_weight
from common.teachers.load import load_teacher
from common.teachers.toy import MLP, Toy, energy_distance

ZERO = f64(0.0)
# Noise with zero mean, unit variance and no correlation, exactly: enough for all that is affine.
Z = f64([1.0, 1.0, -1.0, -1.0])
EPS = f64([1.0, -1.0, 1.0, -1.0])


class Affine(nn.Module):
    """mu = gain x + shift at every level. As an expert: an affine generator."""

    sharding = None

    def __init__(self, gain=0.3, shift=0.1):
        super().__init__()
        self.gain = nn.Parameter(f64(gain))
        self.shift = nn.Parameter(f64(shift))
        self.inputs = []
        self.alphas = []
        self.with_grad = []

    def forward(self, x, alpha, sigma, cond, features=False):
        self.inputs.append(x)
        self.alphas.append(torch.as_tensor(alpha))
        self.with_grad.append(torch.is_grad_enabled())
        return self.gain * x + self.shift

    def guided(self, x, alpha, sigma, cond, w):
        return self(x, alpha, sigma, cond)


def noisy_copy(x_s, t, s, eps):
    a, h = phased_dmd.transition(t, s)
    return add_noise(x_s, a, h, eps)


def velocity_target(x_s, eps, t, s):
    """The critic's target as the paper writes it, a velocity, from the script's x*."""
    x_t = noisy_copy(x_s, t, s, eps)
    return (x_t - phased_dmd.fake_target(x_s, eps, t, s)) / t[:, None]


def fit_line(x, y):
    """Slope and intercept of y on x, for each row of [B, n]."""
    mean_x, mean_y = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    covariance = ((x - mean_x) * (y - mean_y)).mean(1, keepdim=True)
    slope = covariance / (x - mean_x).square().mean(1, keepdim=True)
    return slope, mean_y - slope * mean_x


# ---- (3): noise above a noisy sample -------------------------------------------------------------


@pytest.mark.parametrize(
    "s, t, a, variance",
    [
        (0.5, 0.75, 0.5, 0.5),
        (5 / 6, 0.9, 0.6, 0.56),
        (5 / 6, 0.95, 0.3, 0.84),
        (0.625, 0.8, 0.5333333, 0.5288889),
        (0.0, 0.3, 0.7, 0.09),
    ],
)
def test_eq03_transition(s, t, a, variance):
    s, t = f64(s), f64(t)
    found_a, h = phased_dmd.transition(t, s)
    assert found_a.item() == pytest.approx(a, abs=1e-7)
    assert (h**2).item() == pytest.approx(variance, abs=1e-7)
    assert (h**2).item() == pytest.approx((t**2 - found_a**2 * s**2).item(), abs=1e-15)


@pytest.mark.parametrize("s, t", [(0.5, 0.75), (5 / 6, 0.9), (0.625, 0.8), (0.0, 0.3)])
def test_eq03_gives_the_usual_marginal(s, t):
    """Of x_t, if x_s is a correct noisy sample of data with variance var0."""
    var0 = 0.37
    a, h = phased_dmd.transition(f64(t), f64(s))
    variance_of_x_s = (1 - s) ** 2 * var0 + s**2
    expected = (1 - t) ** 2 * var0 + t**2
    assert (a**2 * variance_of_x_s + h**2).item() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("shift", [0.3, 1, 5])
def test_eq03_at_zero_is_the_usual_noise(shift):
    """The last phase adds noise as dmd2 does, bit for bit at the levels of the grid."""
    t = Flow(shift).grid(phased_dmd.N)
    a, h = phased_dmd.transition(t, ZERO)
    assert torch.equal(a, 1 - t)
    assert torch.equal(h, t)


def test_eq03_next_to_s():
    """h^2 = 2 t - 1 for s = 0.5, without cancellation where t is near s."""
    t = f64(0.501, 0.6, 0.999)
    assert torch.allclose(phased_dmd.transition(t, f64(0.5))[1] ** 2, 2 * t - 1, atol=1e-15)
    near = phased_dmd.transition(f64(0.5 + 1e-9), f64(0.5))[1]
    assert (near**2).item() == pytest.approx(2e-9, rel=1e-6)


@pytest.mark.parametrize(
    "s, shift, lowest, level",
    [
        (0.5, 1, 500, 0.501),
        (0.0, 1, 0, 0.001),
        (5 / 6, 5, 500, 0.8339),
        (0.875, 7, 500, 0.8754),
        (0.25, 3, 100, 0.2521),
    ],
)
def test_eq03_levels_go_from_s_to_1(s, shift, lowest, level):
    """Nested intervals: from just above s up to pure noise in every phase."""
    grid = Flow(shift).grid(phased_dmd.N)
    assert phased_dmd.lowest_level(grid, f64(s)) == lowest
    assert grid[lowest] > s + 1e-9
    assert grid[lowest].item() == pytest.approx(level, abs=1e-4)
    assert grid[-1] == 1
    if shift == 5:
        assert grid[lowest:].mean().item() == pytest.approx(0.9308, abs=2e-4)


# ---- (4): the critic's target --------------------------------------------------------------------


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
def test_eq04_coefficients(s, t, c_eps, c_x):
    """As a velocity the target is c_eps eps + c_x x_s."""
    one, zero = f64([[1.0]]), f64([[0.0]])
    t, s = f64([t]), f64(s)
    assert velocity_target(zero, one, t, s).item() == pytest.approx(c_eps, abs=6e-7)
    assert velocity_target(one, zero, t, s).item() == pytest.approx(c_x, abs=1e-12)


@pytest.mark.parametrize("s", [0.0, 0.5, 5 / 6])
def test_eq04_for_any_sample(s):
    """Two other forms of the velocity, for x_s that need not be a noisy sample."""
    x, eps = 3 * normal(50, 7), normal(50, 7, seed=1)
    t = s + (1 - s) * torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    found = velocity_target(x, eps, t, f64(s))
    x_t = noisy_copy(x, t, f64(s), eps)
    h = phased_dmd.transition(t, f64(s))[1][:, None]
    u = t[:, None]
    expected = -x_t / (1 - u) + u / (1 - u) * eps / h
    assert ((found - expected) / (1 + expected.abs())).abs().max() < 1e-12
    of_the_paper = (u + (1 - u) * s**2 / (1 - s) ** 2) / h * eps - x / (1 - s)
    assert torch.allclose(found, of_the_paper, rtol=1e-12, atol=1e-12)


def test_eq04_at_zero_is_the_sample():
    x, eps, t = normal(50, 7), normal(50, 7, seed=1), torch.linspace(0.01, 0.99, 50)
    assert torch.equal(phased_dmd.fake_target(x, eps, t.double(), ZERO), x)


DATA = Gauss(2.0, 0.5)  # as a teacher: the denoiser of N(2, 0.25)
S, T = f64(0.5), f64([0.75])


def correct_samples():
    """x_s of data N(2, 0.25) at s = 0.5, and x_t at t = 0.75, with exact moments, [1, 4]."""
    x_s = (0.5 * 2 + math.sqrt(0.25 * 0.25 + 0.25) * Z)[None]
    return x_s, noisy_copy(x_s, T, S, EPS[None])


def test_eq04_is_unbiased():
    """Its regression on x_t is E[x_0 | x_t]; as a velocity, E[eps - x_0 | x_t]."""
    x_s, x_t = correct_samples()
    slope, intercept = fit_line(x_t, phased_dmd.fake_target(x_s, EPS[None], T, S))
    assert slope.item() == pytest.approx(0.108108, abs=1e-6)
    assert intercept.item() == pytest.approx(1.945946, abs=1e-6)
    x0 = DATA(x_t, 1 - T, T, {})
    assert torch.allclose(slope * x_t + intercept, x0, atol=1e-14)

    slope, intercept = fit_line(x_t, velocity_target(x_s, EPS[None], T, S))
    assert slope.item() == pytest.approx(1.189189, abs=1e-6)
    assert intercept.item() == pytest.approx(-2.594595, abs=1e-6)
    assert torch.allclose(slope * x_t + intercept, (x_t - x0) / 0.75, atol=1e-14)


def test_the_usual_target_is_biased():
    x_s, x_t = correct_samples()
    slope, intercept = fit_line(x_t, EPS - x_s)
    assert slope.item() == pytest.approx(0.952833, abs=1e-6)
    assert intercept.item() == pytest.approx(-1.476417, abs=1e-6)


# ---- (5): the critic's loss ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "s, level",
    [
        (0.5, 0.55),
        (0.625, 0.655496),
        (0.75, 0.767054),
        (5 / 6, 0.843586),
        (0.875, 0.882327),
        (0.9375, 0.940921),
    ],
)
def test_eq05_weight(s, level):
    """q is below 1 only for t below `level`."""
    q = phased_dmd.fake_weight(f64(level - 1e-6, level + 1e-6), f64(s))
    assert q[0] < 1
    assert q[1] == 1


def test_eq05_reaches_the_critic_only():
    x, prediction = normal(4, 5).requires_grad_(), normal(4, 5, seed=1).requires_grad_()
    phased_dmd.fake_loss(prediction, x, f64(1.0, 2.0, 3.0, 4.0)).backward()
    expected = f64(1.0, 2.0, 3.0, 4.0)[:, None] * (prediction - x) / 10
    assert torch.allclose(prediction.grad, expected, atol=1e-15)
    assert x.grad is None


def test_eq05_weight_of_the_last_phase():
    t = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
    assert torch.equal(phased_dmd.fake_weight(t, ZERO), torch.ones_like(t))


@pytest.mark.parametrize("s", [0.5, 0.625, 5 / 6])
def test_eq05_is_the_papers_loss(s):
    """clamp(1 / h^2, 0, 10) times the squared error of h F, with F a velocity."""
    s = f64(s)
    t = s + (1 - s) * torch.linspace(0.02, 0.98, 40, dtype=torch.float64)
    x, eps, critic = normal(40, 5), normal(40, 5, seed=1), Affine()
    x_t = noisy_copy(x, t, s, eps)
    weight = phased_dmd.fake_weight(t, s) * native_weight("flow", 1 - t, t)
    prediction = critic(x_t, 1 - t, t, {})
    loss = phased_dmd.fake_loss(prediction, phased_dmd.fake_target(x, eps, t, s), weight)

    h = phased_dmd.transition(t, s)[1][:, None]
    velocity = (x_t - prediction) / t[:, None]
    error = h * velocity - h * velocity_target(x, eps, t, s)
    expected = ((1 / h**2).clamp(0, 10) * error.square()).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    assert critic.gain.grad.abs() > 0


# ---- (7), (8): the student's gradient ------------------------------------------------------------


@pytest.mark.parametrize("s, t, w", [(0.0, 0.5, 0.5), (0.5, 0.75, 1 / 6), (5 / 6, 0.9, 1 / 15)])
def test_eq07_paper_is_its_equation_10(s, t, w):
    """f - r = t (T - F) for velocities T, F; so g = w (T - F) is w / t where f - r = 1."""
    t, s = f64([t]), f64(s)
    r = torch.zeros(1, 3, dtype=torch.float64)
    g = phased_dmd.paper_gradient(r, r + 1, t, s)
    assert torch.allclose(g * t, torch.full_like(g, w), atol=1e-15)
    a, _ = phased_dmd.transition(t, s)
    of_the_paper = (1 - t) * a / ((1 - t) * t + t**2)
    assert (g * t)[0, 0].item() == pytest.approx(of_the_paper.item(), abs=1e-15)


def test_eq07_paper_is_zero_at_pure_noise():
    r = torch.zeros(1, 3, dtype=torch.float64)
    assert not phased_dmd.paper_gradient(r, r + 1, f64([1.0]), f64(0.5)).any()


def test_eq07_dmd2():
    t = f64(0.6, 0.7, 0.8, 0.9)
    x0, x_t = normal(4, 5), normal(4, 5, seed=1)
    real, fake = Affine(0.2), Affine(0.4, 0.3)
    g, r, f, norm = phased_dmd.dm_gradient(x0, x_t, 1 - t, t, {}, real, fake, 1.0)
    assert torch.equal(norm, (x0 - r).abs().mean(1))
    assert torch.equal(g, (f - r) / norm[:, None])
    assert not g.requires_grad
    assert not f.requires_grad


def test_eq07_is_zero_if_the_critic_equals_the_teacher():
    t = f64(0.6, 0.7, 0.8, 0.9)
    x0, x_t, same = normal(4, 5), normal(4, 5, seed=1), Affine(0.2)
    g, r, f, _ = phased_dmd.dm_gradient(x0, x_t, 1 - t, t, {}, same, same, 1.0)
    assert not g.any()
    assert not phased_dmd.paper_gradient(r, f, t, f64(0.5)).any()


def test_eq08_autograd_of_the_loss_is_g_over_numel():
    x, g = normal(4, 5).requires_grad_(), normal(4, 5, seed=1)
    loss = phased_dmd.dm_loss(x, g)
    loss.backward()
    assert (x.grad - g / x.numel()).abs().max() < 1e-16
    assert loss.item() == pytest.approx(0.5 * g.square().mean().item(), abs=1e-15)


# ---- fixed points of both together ---------------------------------------------------------------


def descent_direction(p, levels, s, inputs, t_j):
    """Gradient for the weights p = (gain, shift) of an affine expert, by the script's functions.

    Its last step, the noise, the best affine critic for the script's target, the paper's form of
    (7). The teacher is the denoiser of N(2, 0.25).
    """
    expert = Affine(*p.tolist())
    x_s, x0 = phased_dmd.euler_step(expert, inputs.expand(len(levels), 4), t_j, s, {})
    eps = EPS.expand(len(levels), 4)
    x_t = noisy_copy(x_s.detach(), levels, s, eps)
    slope, intercept = fit_line(x_t, phased_dmd.fake_target(x_s.detach(), eps, levels, s))
    critic = lambda x, *rest: slope * x + intercept
    _, r, f, _ = phased_dmd.dm_gradient(x0, x_t, 1 - levels, levels, {}, DATA, critic, 1.0)
    g = phased_dmd.paper_gradient(r, f, levels, s)
    phased_dmd.dm_loss(x_s, g).backward()
    return torch.stack([expert.gain.grad, expert.shift.grad])


def fixed_point(s, inputs, t_j):
    """Mean and variance of x_s where the expert comes to rest, by Newton's method.

    The rest must be stable, that is, descent leads there.
    """
    s, t_j = f64(s), f64(t_j)
    levels = s + (1 - s) * (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    p = f64(0.3, 0.8)

    def slopes(p):
        columns = []
        for d in 1e-5 * torch.eye(2, dtype=torch.float64):
            above = descent_direction(p + d, levels, s, inputs, t_j)
            below = descent_direction(p - d, levels, s, inputs, t_j)
            columns.append((above - below) / 2e-5)
        return torch.stack(columns, 1)

    for _ in range(30):
        direction = descent_direction(p, levels, s, inputs, t_j)
        p = p - torch.linalg.solve(slopes(p), direction).clamp(-0.3, 0.3)
    assert (torch.linalg.eigvals(slopes(p)).real > 0).all()
    x_s, _ = phased_dmd.euler_step(Affine(*p.tolist()), inputs, t_j, s, {})
    return x_s.mean().item(), x_s.var(unbiased=False).item()


def test_eq04_eq07_fixed_points():
    """Phase 1 ends at the distribution of the data with noise at s = 0.5, which is
    N((1 - s) 2, (1 - s)^2 0.25 + s^2); phase 2, which starts from there, at the data."""
    mean, variance = fixed_point(0.5, Z, 1.0)
    assert mean == pytest.approx(1, abs=1e-10)
    assert variance == pytest.approx(0.3125, abs=1e-10)
    mean, variance = fixed_point(0.0, mean + math.sqrt(variance) * Z, 0.5)
    assert mean == pytest.approx(2, abs=1e-10)
    assert variance == pytest.approx(0.25, abs=1e-10)


def biased_target(x_s, eps, t, s):
    """x* of the usual velocity eps - x_s."""
    return noisy_copy(x_s, t, s, eps) - t[:, None] * (eps - x_s)


def noise_of_a_clean_sample(t, s):
    return (1 - t) * torch.ones_like(s), t * torch.ones_like(s)


right_paper_gradient = phased_dmd.paper_gradient
right_target = phased_dmd.fake_target

BROKEN = {
    "usual target": ("fake_target", biased_target),
    "target is the sample": ("fake_target", lambda x_s, eps, t, s: x_s),
    "sign": ("paper_gradient", lambda *args: -right_paper_gradient(*args)),
    "noise as of a clean sample": ("transition", noise_of_a_clean_sample),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_on_purpose(name, monkeypatch):
    monkeypatch.setattr(phased_dmd, *BROKEN[name])
    with pytest.raises((AssertionError, torch.linalg.LinAlgError)):
        test_eq04_eq07_fixed_points()


def test_fixed_point_of_the_usual_target(monkeypatch):
    """What its bias does: mean and variance far from 1 and 0.3125."""
    monkeypatch.setattr(phased_dmd, "fake_target", biased_target)
    mean, variance = fixed_point(0.5, Z, 1.0)
    assert mean == pytest.approx(1.5116, abs=2e-3)
    assert variance == pytest.approx(0.0853, abs=2e-3)


@pytest.mark.parametrize("target, expected", [(biased_target, 1.0473), (right_target, 0.0)])
def test_critic_of_correct_samples(target, expected):
    """How far its velocity at 0.3 is from the teacher's, for correct samples x_s."""
    x_s, x_t = correct_samples()
    slope, intercept = fit_line(x_t, target(x_s, EPS[None], T, S))
    x = f64([[0.3]])
    difference = (slope * x + intercept - DATA(x, 1 - T, T, {})).abs() / 0.75
    assert difference.item() == pytest.approx(expected, abs=1e-4 if expected else 1e-14)


# ---- (1), (2): steps, phases, sampler ------------------------------------------------------------


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
def test_step_times(n, shift, expected):
    assert phased_dmd.step_times(n, shift).tolist() == pytest.approx([*expected, 0], abs=1e-6)


@pytest.mark.parametrize(
    "nfe, phases, ends",
    [(4, 2, [2, 4]), (4, 4, [1, 2, 3, 4]), (1, 1, [1]), (4, 1, [4]), (5, 2, [2, 5])],
)
def test_phase_ends(nfe, phases, ends):
    assert phased_dmd.phase_ends(nfe, phases) == ends


@pytest.mark.parametrize(
    "phases, phase_iters, starts",
    [(1, [7], [0]), (2, [7], [0, 7]), (4, [7], [0, 7, 14, 21]), (3, [2, 9], [0, 2, 11])],
)
def test_phase_starts(phases, phase_iters, starts):
    assert phased_dmd.phase_starts(phases, phase_iters) == starts


@pytest.mark.parametrize(
    "edge, expected", [(1.0, "ab"), (2.0, "ab"), (4.0, "_b"), (0.5, "a_"), (0.1, "aa")]
)
def test_experts_start_as_those_of_the_teacher(edge, expected):
    """Of a teacher with two experts (Wan 2.2), split at sigma / alpha = edge: the one that makes
    all steps of a phase, at inf, 3 and at 1, 1 / 3; else the whole teacher."""
    teacher = ByLevel([Affine(0.1), Affine(0.2)], [edge])
    names = dict(a=teacher.experts[0], b=teacher.experts[1], _=teacher)
    starts = phased_dmd.starts_as(teacher, phased_dmd.step_times(4, 1), [2, 4])
    assert all(net is names[name] for net, name in zip(starts, expected, strict=True))
    plain = Affine()
    assert phased_dmd.starts_as(plain, phased_dmd.step_times(4, 1), [2, 4]) == [plain, plain]


def constant_velocity(v):
    return lambda x, alpha, sigma, cond: x - sigma * v


def test_eq01_n_steps_move_by_the_velocity():
    v, z = normal(3, 2), normal(3, 2, seed=1)
    times = phased_dmd.step_times(4, 5)
    x = phased_dmd.backward_simulation(constant_velocity(v), times, 4, {}, z)
    assert torch.allclose(x, z - v, atol=1e-14)


def test_eq02_a_jump_is_the_steps_in_between():
    """Of a constant velocity, from t_1 to t_3."""
    v, z = normal(3, 2), normal(3, 2, seed=1)
    net, times = constant_velocity(v), phased_dmd.step_times(4, 5)
    x_1 = phased_dmd.backward_simulation(net, times, 1, {}, z)
    jump, _ = phased_dmd.euler_step(net, x_1, times[1], times[3], {})
    steps = phased_dmd.backward_simulation(net, times, 3, {}, z)
    assert torch.allclose(jump, steps, atol=1e-14)


def test_eq02_a_jump_to_zero_is_the_estimate_itself():
    x = normal(3, 2)
    jump, x0 = phased_dmd.euler_step(Affine(), x, f64(0.5), ZERO, {})
    assert torch.equal(jump, Affine()(x, 0.5, 0.5, {}))
    assert torch.equal(jump, x0)


@pytest.mark.parametrize(
    "nfe, phases, shift",
    [(4, 2, 5.0), (4, 4, 3.0), (4, 2, 1.0), (2, 2, 7.0), (3, 2, 0.3), (4, 1, 1.0)],
)
def test_eq01_every_step_goes_to_its_expert(nfe, phases, shift):
    """The step at s_k itself is the next expert's; training inputs are the sampler's inputs."""
    times, ends = phased_dmd.step_times(nfe, shift), phased_dmd.phase_ends(nfe, phases)
    table = [float(times[end] / (1 - times[end])) for end in ends[:-1]]
    student = ByLevel([Affine(0.1 * i) for i in range(phases)], table)
    z = normal(5, 3)
    x = phased_dmd.sample(student, z, {}, nfe, None, shift)
    assert not x.requires_grad

    for expert, begin, end in zip(student.experts, [0, *ends], ends):
        inputs, alphas = expert.inputs[:], expert.alphas[:]
        assert not any(expert.with_grad)
        assert torch.allclose(torch.stack(alphas), 1 - times[begin:end], atol=1e-12)
        for j in range(begin, end):
            x_j = phased_dmd.backward_simulation(student, times, j, {}, z)
            assert torch.equal(x_j, inputs[j - begin])
    # the jump of the last step, in training, is the sampler's last step
    x_j = phased_dmd.backward_simulation(student, times, nfe - 1, {}, z)
    last, _ = phased_dmd.euler_step(student.experts[-1], x_j, times[-2], times[-1], {})
    assert torch.equal(x, last)


def test_a_sample_does_not_depend_on_its_batch():
    teacher = load_teacher("toy-cond")
    student = ByLevel([teacher.copy(), teacher.copy()], [1.0])
    sampler = lambda model, z, cond, noise: phased_dmd.sample(model, z, cond, 4, noise)
    whole = next(generate(sampler, student, 12, seed=3, batch=12))[2]
    rows = {}
    for part, _, x in generate(sampler, student, 12, seed=3, batch=5, rank=1, world=2):
        rows |= dict(zip(part.tolist(), x))
    assert sorted(rows) == [1, 3, 5, 7, 9, 11]
    for i, row in rows.items():
        assert torch.allclose(row, whole[i], atol=1e-5)


def flow_toy():
    """A small flow network with labels."""
    torch.manual_seed(0)
    return FlowToy(MLP(width=16), Flow(), "flow", (2,), 8, labelled=True).requires_grad_(False)


class FlowToy(Toy):
    """double: also its copies compute in float64."""

    double_precision = False

    def copy(self, adapters=None, changes=None):
        twin = super().copy()
        if self.double_precision:
            nn.Module.double(twin)
        return twin


def test_the_untrained_student_is_the_teachers_sampler():
    """Euler steps on the same grid, for flow networks."""
    net = flow_toy()
    z, cond = torch.randn(6, 2), dict(labels=torch.arange(6))
    ours = phased_dmd.sample(ByLevel([net.copy(), net.copy()], [1.0]), z, cond, 4)
    assert torch.allclose(ours, teacher_sample(net, z, cond, 4), atol=1e-5)


# ---- main(), by hand -----------------------------------------------------------------------------


@pytest.fixture
def trace(monkeypatch, tmp_path):
    def run(*flags, script=phased_dmd, **kwargs):
        return Trace(monkeypatch, script, tmp_path / "out", *flags, **kwargs)

    return run


@dataclasses.dataclass
class ByHand:
    """(1) to (8) with velocities, for a network of points with 8 labels.

    ends: index of the step that ends each phase; starts: its first iteration.
    """

    trace: Trace
    nfe: int = 4
    ends: tuple = (2, 4)
    starts: tuple = (0, 3)
    iters: int = 6
    step_shift: float = 3.0
    shift: float = 1.0
    normaliser: str = "dmd2"
    w: float = 1.0
    ratio: int = 1
    halflife: float = 0.0

    def __post_init__(self):
        adamw = lambda lr: byhand.AdamW(lr, (0.3, 0.8), 0.1, 0.5)
        self.optimisers = {f"student{k}": adamw(3e-3) for k in range(len(self.ends))}
        self.fresh_critic = lambda: adamw(2e-3)
        shifted = lambda u, shift: shift * u / (1 + (shift - 1) * u)
        falling = torch.arange(self.nfe, -1, -1, dtype=torch.float64) / self.nfe
        self.times = shifted(falling, self.step_shift)
        self.grid = shifted(torch.arange(1, 1001, dtype=torch.float64) / 1000, self.shift)
        self.seen = set()  # steps j
        self.logs = []

    def phase(self, it):
        return sum(start <= it for start in self.starts[1:])

    def factor(self, it):
        """On the rates: two iterations of warm-up, cooldown in the second half of a phase."""
        k = self.phase(it)
        start, stop = self.starts[k], [*self.starts[1:], self.iters][k]
        return min(1, (it - start + 1) / 2) * min(1, 2 * (1 - (it - start) / (stop - start)))

    def expert(self, student, i):
        """That makes step i."""
        return student.experts[sum(i >= end for end in self.ends)]

    def velocity(self, net, x, t, cond):
        x0 = net(x, 1 - t, t, cond)
        return (x - x0) / (t[:, None] if t.ndim else t)

    def rollout(self, student, x, j, cond):
        """Input of step j (1)."""
        for i in range(j):
            v = self.velocity(self.expert(student, i), x, self.times[i], cond).detach()
            x = (x + (self.times[i + 1] - self.times[i]) * v).float()
        return x

    def estimate(self, student, x, cond):
        """Of the last step: a clean sample."""
        t = self.times[self.nfe - 1]
        return (x - t * self.velocity(student.experts[-1], x, t, cond)).detach().float()

    def noised(self, x_s, s, draw):
        """x_t of (3), with t, h [B, 1] and the noise."""
        lowest = int((self.grid < s + 1e-9).sum())
        t = self.grid[draw.randint(lowest, 1000)][:, None]
        a = (1 - t) / (1 - s)
        h = (t**2 - a**2 * s**2).sqrt()
        eps = draw.randn(2)
        return (a * x_s + h * eps).float(), t, h, eps

    def iteration(self, it):
        """Generator of ("student<k>", its loss) in a student's turn, and ("critic", its loss)."""
        trace, draw, k = self.trace, BatchRandom(2, it, 16), self.phase(it)
        teacher, student, critic = trace.teacher, trace.student, trace.networks()["critic"]
        if it == self.starts[k]:
            self.optimisers["critic"] = self.fresh_critic()
        begin, end = [0, *self.ends][k], self.ends[k]
        s = self.times[end]
        cond = dict(labels=draw.randint(0, 8))
        j = draw.shared_randint(begin, end)
        t_j, x_j = self.times[j], self.rollout(student, draw.randn(2), j, cond)
        v = self.velocity(student.experts[k], x_j, t_j, cond)
        x_s, x0 = x_j + (s - t_j) * v, x_j - t_j * v  # (2)
        logs = dict(phase=k + 1)
        self.logs.append(logs)
        if (it - self.starts[k]) % self.ratio == 0:
            self.seen.add(j)
            x_t, t, _, _ = self.noised(x_s.detach(), s, draw)
            c = self.velocity(teacher, x_t, t[:, 0], cond)
            u = self.velocity(teacher, x_t, t[:, 0], dict(labels=torch.full((16,), 8)))
            real = u + self.w * (c - u)  # (6)
            fake = self.velocity(critic, x_t, t[:, 0], cond)
            r, f = x_t - t * real, x_t - t * fake
            norm = (x0 - r).abs().mean(1, keepdim=True)
            g = t * (real - fake) / norm  # (7)
            if self.normaliser == "paper":
                g = (1 - t) ** 2 / ((1 - s) * t) * (real - fake)  # (7)
            g = g.detach()
            logs |= dict(dm=0.5 * (g**2).mean(), dm_norm=norm.mean())
            logs |= dict(real_gap=((x0 - r) ** 2).mean(), fake_gap=((x0 - f) ** 2).mean())
            yield f"student{k}", (g * x_s).sum() / x_s.numel()  # has the gradient of (8)

        x_s = x_s.detach()
        x_t, t, h, eps = self.noised(x_s, s, draw)
        target = (t + (1 - t) * s**2 / (1 - s) ** 2) / h * eps - x_s / (1 - s)  # (4)
        error = t * (self.velocity(critic, x_t, t[:, 0], cond) - target)  # of the clean estimate
        level = byhand.level_of(teacher.schedule, 1 - t, t)
        weight = byhand.weight_of(teacher.prediction, *level, sigma_data=0.7)
        q = (10 * h**2).clamp(max=1) if s > 0 else 1.0
        logs |= dict(mean=x_s.mean(), std=x_s.std(), fake=(q * weight * error**2).mean())  # (5)
        yield "critic", logs["fake"]


def compare_phases(steps, by_hand, resets, halflife):
    """Nothing but optimisers moves a network, unless a phase begins: then the critic's weights are
    those in `resets`, and experts become their average over all student steps, which stays."""
    experts = [f"student{k}" for k in range(len(by_hand.ends))]
    mean = {name: steps[0].before[name].double() for name in experts}

    def close(found, name, live):
        distance = (live.double() - mean[name]).norm()
        return (found - mean[name]).norm() <= 1e-2 * distance + 1e-6

    it = n = 0
    for step, following in zip(steps, [*steps[1:], None]):
        if step.role != "critic":
            n += 1  # batches; EDM's ramp-up is 5 % of them
            beta = 0.5 ** (1 / min(halflife / 16, 0.05 * n)) if halflife else 0.0
            for name in experts:
                mean[name] = beta * mean[name] + (1 - beta) * step.after[name]
        it += step.role == "critic"
        if following is None:
            continue
        begins = step.role == "critic" and it in by_hand.starts
        if begins:
            assert torch.equal(following.before["critic"], resets[by_hand.starts.index(it) - 1])
        for name in experts:
            if begins and halflife:
                assert close(following.before[name], name, step.after[name])
            else:
                assert torch.equal(following.before[name], step.after[name])
    for name, expert in zip(experts, steps.ema.model.experts):
        assert close(weights(expert), name, steps[-1].after[name])


class Born(byhand.Tiny):
    """Keeps the weights with which its copies are made."""

    born = ()

    def copy(self, adapters=None, changes=None):
        twin = super().copy(adapters, changes)
        if self.is_teacher:
            self.born = [*self.born, weights(twin)]
        return twin


# name: (schedule, prediction, flags, case of ByHand)
BY_HAND = {
    "edm": (
        EDM(),
        "edm",
        "--iters 6 --phase-iters 3 --cfg 2 --shift 2 --ema 8",
        dict(w=2.0, shift=2.0, halflife=8),
    ),
    "flow, 3 phases, paper": (
        Flow(3),
        "flow",
        "--nfe 3 --phases 3 --phase-iters 3 4 --iters 10 --ratio 3 --normaliser paper --cfg 2.5",
        dict(
            nfe=3,
            ends=(1, 2, 3),
            starts=(0, 3, 7),
            iters=10,
            ratio=3,
            normaliser="paper",
            w=2.5,
        ),
    ),
    "eps, 5 steps, paper": (
        VP(),
        "eps",
        "--nfe 5 --phase-iters 4 --iters 12 --step-shift 1 --normaliser paper --cfg 3 --ema 8",
        dict(
            nfe=5,
            ends=(2, 5),
            starts=(0, 4),
            iters=12,
            step_shift=1.0,
            normaliser="paper",
            w=3.0,
            halflife=8,
        ),
    ),
    "v, LoRA": (
        VP(),
        "v",
        "--iters 7 --phase-iters 3 --cfg 1.5 --step-shift 5 --shift 5"
        " --lora 4 --lora-fake 4 --lora-alpha 8",
        dict(iters=7, w=1.5, step_shift=5.0, shift=5.0),
    ),
    "flow, LoRA of the experts": (
        Flow(),
        "flow",
        "--phases 4 --phase-iters 3 --iters 12 --cfg 2 --lora 4 --shift 0.3 --ema 8",
        dict(ends=(1, 2, 3, 4), starts=(0, 3, 6, 9), iters=12, w=2.0, shift=0.3, halflife=8),
    ),
    "edm, small": (
        EDM(),
        "edm",
        "--iters 6 --phase-iters 3 --cfg 2 --small width=12 --small-fake depth=2",
        dict(w=2.0),
    ),
    "trigflow, one phase": (
        TrigFlow(0.5),
        "trigflow",
        "--phases 1 --nfe 2 --iters 6 --cfg 1",
        dict(nfe=2, ends=(2,), starts=(0,)),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_whole_iterations_by_hand(trace, monkeypatch, capsys, name):
    """(1), (2), (3), (4), (5), (6), (7), (8): gradients of experts and critic, AdamW's updates, a
    new phase, the average, numbers of log.jsonl, and sampling by the record."""
    schedule, prediction, flags, case = BY_HAND[name]
    common = "--seed 2 --ratio 1 --lr 3e-3 --lr-fake 2e-3 --betas 0.3 0.8 --weight-decay 0.1"
    rates = "--clip 0.5 --warmup 2 --cooldown 0.5"
    wrapped = byhand.wrap_trained(monkeypatch)
    flags = [*common.split(), *rates.split(), *flags.split()]
    teacher = Born(schedule, prediction)
    steps = trace(*flags, teacher=teacher, record=[(phased_dmd, "adamw")])
    optimised = [call.args[0] for call in steps.calls["adamw"]]
    assert all(a is b for a, b in zip(optimised, [steps.student, steps.networks()["critic"]]))
    by_hand = ByHand(steps, **case)
    # paper's d falls to 0 with t, and magnifies the rounding of f - r
    tolerance = 2e-4 if by_hand.normaliser == "paper" else 2e-5
    done = byhand.compare_iterations(
        steps, by_hand.iteration, by_hand.optimisers, tolerance, factor=by_hand.factor
    )
    assert done == by_hand.iters
    summary = capsys.readouterr().out
    for end, start in zip(by_hand.ends, by_hand.starts):
        assert f"to s = {by_hand.times[end]:.4g} from iteration {start}" in summary
    assert by_hand.seen == set(range(by_hand.nfe))

    phases = len(by_hand.ends)
    first = [steps[0].before[f"student{k}"] for k in range(phases)] + [steps[0].before["critic"]]
    assert all(torch.equal(a, b) for a, b in zip(first, teacher.born))
    resets = [weights(teacher)] * phases
    if {"--lora-fake", "--small-fake"} & set(flags):
        resets = teacher.born[phases + 1 :]
    compare_phases(steps, by_hand, resets, by_hand.halflife)

    byhand.compare_logs(steps.logs, by_hand.logs)
    roles = [step.role for step in steps]
    for role, name in (("student", "grad_student"), ("critic", "grad_critic")):
        norms = [step.flat_grad().norm().item() for step in steps if step.role.startswith(role)]
        assert [line[name] for line in steps.logs if name in line] == pytest.approx(norms, rel=1e-5)
    turns = [roles.count("critic"), *[roles.count(f"student{k}") for k in range(phases)]]
    assert [net.calls[True] for net in wrapped] == turns
    assert not any(net.calls[False] for net in wrapped)

    x, noises, cond = byhand.sample_by_record(steps, phased_dmd)
    student = steps.ema.model
    x_j = by_hand.rollout(student, noises[0], by_hand.nfe - 1, cond)
    assert torch.allclose(x, by_hand.estimate(student, x_j, cond), atol=1e-5)


def test_a_new_phase_begins_with_its_first_microstep(trace):
    """--accumulate 2 is the same run: critic and experts are set once a phase, not at each part."""
    flags = "--iters 8 --phase-iters 4 --ratio 2 --cfg 2 --ema 8 --lr 3e-3 --lr-fake 2e-3 --lora 4"
    whole, parts = [
        trace(*flags.split(), "--accumulate", n, "--lora-fake", 4, teacher=Born(EDM(), "edm"))
        for n in (1, 2)
    ]
    assert len(parts) == 2 * len(whole)
    assert len(whole.teacher.born) == len(parts.teacher.born) == 4
    for name, expected in whole[-1].after.items():
        assert relative_error(parts[-1].after[name], expected) < 1e-5, name
    assert torch.allclose(weights(parts.ema.model), weights(whole.ema.model), atol=1e-5)
    assert len(parts.trained) == len(whole.trained) == 3


def test_frame(monkeypatch, tmp_path):
    critic = lambda steps: steps.networks()["critic"]
    flags = ["--phase-iters", 1, "--cfg", 2]
    out = tmp_path / "out"
    check_frame(monkeypatch, phased_dmd, out, *flags, show=["dm", "fake"], critic_of=critic)


# ---- main(): the limit of one phase, who is trained when -----------------------------------------


@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["float32", "float64"]
)
def test_one_phase_is_dmd2(dtype, bound, trace, monkeypatch):
    """One step in one phase: every gradient, weight and log of dmd2 on a flow teacher."""
    randn, randint = BatchRandom.randn, BatchRandom.randint

    def any_level(draw, low, high, **kwargs):
        """dmd2 leaves out the ends of the grid in its student's turn."""
        return randint(draw, 0, 1000) if low == 20 else randint(draw, low, high, **kwargs)

    def load(*args, **kwargs):
        teacher = flow_toy()
        teacher.double_precision = dtype == torch.float64
        return teacher.copy().requires_grad_(False) if teacher.double_precision else teacher

    monkeypatch.setattr(BatchRandom, "randn", lambda draw, *shape: randn(draw, *shape).to(dtype))
    monkeypatch.setattr(BatchRandom, "randint", any_level)
    monkeypatch.setattr(phased_dmd, "load_teacher", load)
    monkeypatch.setattr(dmd2, "load_teacher", load)
    flags = ["--iters", 7, "--ratio", 3, "--cfg", 2, "--nfe", 1, "--shift", 1]
    flags += ["--lr", 1e-3, "--lr-fake", 2e-3, "--cooldown", 0]
    ours = trace(*flags, "--phases", 1, "--step-shift", 1, "--normaliser", "dmd2")
    theirs = trace(*flags, script=dmd2)

    order = ["student", "critic", "critic", "critic"] * 2 + ["student", "critic"]
    assert [step.role.rstrip("0") for step in ours] == order
    assert [step.role for step in theirs] == order
    for a, b in zip(ours, theirs):
        assert b.flat_grad().norm() > 1e-4
        assert relative_error(a.flat_grad(), b.flat_grad()) <= bound
        assert b.moved(b.role)
        assert relative_error(a.after[a.role].double(), b.after[b.role].double()) <= bound
    for a, b in zip(ours.logs, theirs.logs, strict=True):
        for name in {"fake", "mean", "std", "dm", "dm_norm"} & b.keys():
            assert a[name] == pytest.approx(b[name], rel=bound)


def changed_between(step, next_step):
    """Networks that something else than an optimiser changed after `step`."""
    return {
        name
        for name in next_step.before
        if name in step.after and not torch.equal(step.after[name], next_step.before[name])
    }


VARIANTS = ["", "--cfg 2.5 --normaliser paper", "--nfe 3 --step-shift 5 --shift 5"]
VARIANTS += ["--ema 100 --cfg 2"]
SECOND = 5  # optimiser step at which phase 2 begins: after 2 of the student, 3 of the critic


def two_phases(trace, flags, **kwargs):
    return trace("--iters", 8, "--ratio", 2, "--phase-iters", 3, *flags.split(), **kwargs)


@pytest.mark.parametrize("flags", VARIANTS)
def test_gradient_routing(trace, flags):
    """In phase k the expert of k moves in student turns and the critic in its own; no other network
    has a gradient or moves."""
    steps = two_phases(trace, flags)
    first = ["student0", "critic", "critic", "student0", "critic"]
    second = [role.replace("0", "1") for role in first] + ["critic", "student1", "critic"]
    assert [step.role for step in steps] == first + second
    for i, step in enumerate(steps):
        for name, grads in step.grads.items():
            found = [g is not None for g in grads]
            assert found == [name == step.role] * len(grads), (step.role, name)
            assert name == step.role or not step.moved(name)
        # without guidance (7) is 0 at the first step of a phase: critic and teacher are equal
        if i not in (0, SECOND):
            assert step.moved(step.role)
    assert not any(p.requires_grad for p in steps.teacher.parameters())


@pytest.mark.parametrize("flags", VARIANTS)
def test_a_new_phase(trace, flags):
    """The critic starts from the teacher again, with fresh moments, as the new expert does; a
    finished expert becomes its average."""
    steps = two_phases(trace, flags)
    for i, (a, b) in enumerate(zip(steps, steps[1:])):
        expected = set()
        if i + 1 == SECOND:
            expected = {"critic", "student0"} if "--ema" in flags else {"critic"}
        assert changed_between(a, b) == expected
    last, begin = steps[SECOND - 1], steps[SECOND]
    start = weights(steps.teacher.copy())
    assert torch.equal(begin.before["critic"], start)
    assert torch.equal(begin.before["student1"], start)
    assert not torch.equal(last.after["critic"], start)
    assert not torch.equal(begin.before["student0"], start)
    moments = [step.moments for step in steps if step.role == "critic"]
    assert [n > 0 for n in moments] == [False, True, True, False, True, True, True, True]


def test_a_finished_expert_stays_as_its_average(trace):
    """Whole run after its phase: the average itself does not move any more."""
    watch = lambda steps: dict(average=steps.ema.model.experts[0])
    steps = two_phases(trace, "--ema 100 --cfg 2", watch=watch)
    last, begin = steps[SECOND - 1], steps[SECOND]
    assert torch.equal(begin.before["student0"], last.after["average"])
    assert not torch.equal(begin.before["student0"], last.after["student0"])
    assert torch.equal(steps[-1].after["average"], begin.before["student0"])


@pytest.mark.parametrize(
    "flags, levels, steps_of_phases",
    [
        ("--phases 2", {(500, 1000), (0, 1000)}, [(0, 2), (2, 4)]),
        ("--phases 4", {(750, 1000), (500, 1000), (250, 1000), (0, 1000)}, None),
        ("--phases 1", {(0, 1000)}, [(0, 4)]),
    ],
)
def test_ranges_of_the_draws(trace, flags, levels, steps_of_phases):
    """Levels of both losses from (s_k, 1] in every phase; one step for the whole batch."""
    record = [(BatchRandom, "randint"), (BatchRandom, "shared_randint")]
    few = ["--iters", 8, "--phase-iters", 2, "--ratio", 1, "--step-shift", 1, "--nfe", 4]
    steps = trace(*few, *flags.split(), record=record)
    expected = steps_of_phases or [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert {call.args[1:] for call in steps.calls["randint"]} == levels | {(0, 8)}
    shared = [call.args[1:] for call in steps.calls["shared_randint"]]
    assert len(shared) == 8
    assert set(shared) == set(expected)
    phases = [min(it // 2, len(expected) - 1) + 1 for it in range(8)]
    assert [line["phase"] for line in steps.logs] == phases


def test_one_pass_has_gradient(trace, monkeypatch):
    """Of a student turn only the jump (2), and the critic's own pass in each iteration."""
    passes, forward = [], Toy.forward

    def counted(model, *args, **kwargs):
        passes.append(torch.is_grad_enabled())
        return forward(model, *args, **kwargs)

    monkeypatch.setattr(Toy, "forward", counted)
    steps = trace("--iters", 6, "--phase-iters", 3, "--ratio", 3)
    roles = [step.role for step in steps]
    assert len(roles) == 8
    assert sum(passes) == roles.count("critic") + 2


def test_networks_of_the_student_see_no_graph(trace):
    """The gradient (7) is made from x_t without a graph, and has none."""
    steps = trace("--iters", 6, "--phase-iters", 3, record=[(phased_dmd, "dm_gradient")])
    assert len(steps.calls["dm_gradient"]) == 2
    for call in steps.calls["dm_gradient"]:
        x0, x_t, *_ = call.args
        assert x0.requires_grad
        assert not x_t.requires_grad
        assert not any(part.requires_grad for part in call.result)


@pytest.mark.parametrize("flag", ["--nfe 3", "--phases 4", "--step-shift 2"])
def test_a_resumed_run_keeps_its_experts_levels(flag, monkeypatch, tmp_path):
    flags = ["--teacher", "toy-cond", "--out", tmp_path / "out", "--batch", 16, "--eval-n", 0]
    flags += ["--sample-every", 0, "--phase-iters", 1, "--iters", 4]
    run_main(monkeypatch, phased_dmd, *flags, "--step-shift", 3)
    message = f"{flag.split()[0][2:]} .*: phased_dmd cannot change it during a run"
    with pytest.raises(UserError, match=message):
        run_main(monkeypatch, phased_dmd, *flags, *flag.split(), "--resume")


def test_rates_of_every_phase(trace):
    """Warm-up and cooldown belong to a phase."""
    few = ["--iters", 12, "--phase-iters", 4, "--ratio", 1, "--lr-fake", 1.0, "--clip", 1e-9]
    steps = trace(*few, "--warmup", 2, "--cooldown", 0.5)
    rates = [step.lr for step in steps if step.role == "critic"]
    assert rates == pytest.approx([0.5, 1, 1, 0.5, 0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("nfe, phases, shift", [(4, 2, 5), (4, 4, 3), (3, 2, 0.3), (8, 2, 1)])
def test_experts_of_a_run(trace, nfe, phases, shift):
    """The student that is saved sends the step at s_k to the expert of phase k + 1."""
    flags = ["--iters", phases, "--phase-iters", 1, "--phases", phases]
    steps = trace(*flags, "--nfe", nfe, "--step-shift", shift)
    times, ends = phased_dmd.step_times(nfe, shift), phased_dmd.phase_ends(nfe, phases)
    experts = [int(steps.student.route(1, 1 - t, t, {})) for t in times[:-1]]
    assert experts == [sum(i >= end for end in ends) for i in range(nfe)]


@pytest.mark.slow
def test_bias_of_the_usual_target_in_a_run(trace, monkeypatch):
    """Phase 1 of the toy: x_s against noisy data. The usual target leads elsewhere."""

    def distance(target):
        monkeypatch.setattr(phased_dmd, "fake_target", target)
        few = ["--batch", 256, "--iters", 801, "--phase-iters", 800]
        steps = trace("--teacher", "toy", *few, "--log-every", 1000)
        generator = torch.Generator().manual_seed(0)
        times, cond = phased_dmd.step_times(4, 3.0), steps.teacher.null(4000)
        z = torch.randn(4000, 2, generator=generator)
        x_s = phased_dmd.backward_simulation(steps.student, times, 2, cond, z)
        data = steps.teacher.mixture.sample(4000, generator=generator)
        noise = torch.randn(4000, 2, generator=generator)
        return energy_distance(x_s, 0.25 * data + 0.75 * noise)

    right, wrong = distance(right_target), distance(biased_target)
    assert right < 0.004
    assert wrong > 5 * right
