"""BOOT (arXiv 2306.05544): equations on a Gaussian teacher in closed form, then a real run.

Numbers in tables were derived apart from the code.
"""

import math
import types

import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import byhand
from helpers.gaussian import Gauss, f64, full, normal

import boot
from common.errors import UserError
from common.files import read_json
from common.rng import BatchRandom, PerImageNoise
from common.sampling import generate, teacher_sample
from common.schedules import EDM, VP, Flow, TrigFlow, add_noise, expand, initial_noise
from common.teachers.load import load_teacher
from tools.measure import count_nfe

MEAN, STD = 1.0, 0.5  # of the teacher's data


class Cosine(TrigFlow):
    """TrigFlow up to a time before its end, so that alpha_T is above 0: T = end pi / 2."""

    def __init__(self, end):
        super().__init__()
        self.t_max = end * math.pi / 2

    def alpha(self, t):
        return f64(t).cos()


COSINE = TrigFlow()  # alpha = cos(u pi / 2), sigma = sin(u pi / 2)
SCHEDULES = dict(vp=VP(), edm=EDM(), flow=Flow(), shifted=Flow(shift=3.0), cosine=COSINE)
schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def gauss(schedule):
    return Gauss(MEAN, STD, schedule)


def exact_signal(eps, u, schedule):
    """y at time u of the exact trajectory from eps."""
    alpha, sigma = boot.level(schedule, u)
    width = ((alpha * STD) ** 2 + sigma**2).sqrt()
    return MEAN + expand((width - sigma) / alpha, eps) * eps


class Oracle(nn.Module):
    """A student that knows the exact trajectory."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, x, alpha, sigma, cond):
        T = self.schedule.t_max
        assert torch.equal(alpha, self.schedule.alpha(T))  # the input is at level T, always
        assert torch.equal(sigma, self.schedule.sigma(T))
        eps = x if self.schedule.unit_norm else x / sigma
        return exact_signal(eps, cond["time"], self.schedule)


class Table(dict):
    """A student that holds one number per time."""

    def __call__(self, x, alpha, sigma, cond):
        return torch.stack([self[round(float(u), 9)] for u in cond["time"]])


class Net(nn.Module):
    """A student with weights."""

    def __init__(self, schedule):
        super().__init__()
        torch.manual_seed(0)
        self.schedule = schedule
        self.image = nn.Linear(3, 3).double()
        self.time = nn.Linear(1, 3).double()

    def forward(self, x, alpha, sigma, cond):
        return self.image(x).sin() + self.time(cond["time"][:, None]).cos()


def no_boundary(u):
    return torch.zeros(len(u), dtype=torch.bool)


def targets(student, schedule, eps, u_t, u_s, is_boundary=None):
    """y*, k and f - y_t of the Gaussian teacher."""
    if is_boundary is None:
        is_boundary = no_boundary(u_t)
    return boot.bootstrap(student, gauss(schedule), eps, u_t, u_s, is_boundary, {}, 1.0)


def fixed_point(n, schedule, eps=1.0):
    """y at 0 of a student that has learned its targets, at n + 1 even times."""
    student, eps = Table(), f64([[eps]])
    times = [1 - i / n for i in range(n + 1)]
    student[1.0] = f64([0.0])
    is_boundary = torch.tensor([True])  # first the boundary
    for u_t, u_s in [(1.0, 1.0), *zip(times, times[1:])]:
        target, _, _ = targets(student, schedule, eps, f64([u_t]), f64([u_s]), is_boundary)
        student[round(u_s, 9)] = target[0]
        is_boundary = torch.tensor([False])
    return student[0.0].item()


# ---- (1), (2): the signal and its ODE ------------------------------------------------------------

ODE = [  # u, lambda, lambda', y, x, f for eps = 1
    (0.1, -1.8427, 10.1664, 1.366102, 1.505717, 1.476657),
    (0.5, 0.0, 3.1416, 1.118034, 1.497676, 1.223607),
    (0.9, 1.8427, 10.1664, 1.019767, 1.147215, 1.039473),
    (0.99, 4.1535, 100.0165, 1.001964, 1.015615, 1.003927),
]


@pytest.mark.parametrize("u, lam, rate, y, x, f", ODE)
def test_eq01_numbers(u, lam, rate, y, x, f):
    alpha, sigma = boot.level(COSINE, f64([u]))
    eps = f64([[1.0]])
    signal = exact_signal(eps, f64([u]), COSINE)
    state = add_noise(signal, alpha, sigma, eps)
    estimate = gauss(COSINE)(state, alpha, sigma, {})
    assert (sigma / alpha).log().item() == pytest.approx(lam, abs=5e-5)
    found = [signal.item(), state.item(), estimate.item()]
    assert found == pytest.approx([y, x, f], abs=1e-6)


@pytest.mark.parametrize("u, lam, rate, y, x, f", ODE)
def test_eq02_holds_on_the_exact_trajectory(u, lam, rate, y, x, f):
    t = f64(u * math.pi / 2).requires_grad_()
    found = math.pi / 2 * (COSINE.dsigma(t) / t.sin() - COSINE.dalpha(t) / t.cos()).item()
    assert found == pytest.approx(rate, abs=5e-5)
    signal = MEAN + ((t.cos() ** 2 * STD**2 + t.sin() ** 2).sqrt() - t.sin()) / t.cos()
    (slope,) = torch.autograd.grad(signal, t)
    state = add_noise(signal.detach().view(1, 1), t.cos(), t.sin(), f64([[1.0]]))
    estimate = gauss(COSINE)(state, t.cos(), t.sin(), {})
    expected = -found * (estimate - signal).item()
    assert math.pi / 2 * slope.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("u, y", [(0.9, 1.019767), (0.99, 1.001964), (0.999, 1.000196)])
def test_eq08_the_signal_ends_at_the_teachers_estimate(u, y):
    """As alpha goes to 0, y goes to E[x | pure noise], the mean."""
    assert exact_signal(f64([[1.0]]), f64([u]), COSINE).item() == pytest.approx(y, abs=1e-6)


def test_eq08_estimate_near_the_end():
    alpha, sigma = boot.level(COSINE, f64([0.999]))
    estimate = gauss(COSINE)(f64([[1.0]]), alpha, sigma, {})
    assert estimate.item() == pytest.approx(1.000392, abs=1e-6)


# ---- (5), (6): the step --------------------------------------------------------------------------


def k_of(schedule, u_t, u_s):
    return boot.coefficient(*boot.level(schedule, u_t), *boot.level(schedule, u_s))


@schedules
def test_eq06_is_ddim(schedule):
    u_t, u_s = f64(0.8, 0.5, 0.999), f64(0.55, 0.0, 0.2)
    y, f, eps = normal(3, 5), normal(3, 5, seed=1), normal(3, 5, seed=2)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = boot.level(schedule, u_t), boot.level(schedule, u_s)
    y_s = boot.carry(y, f, boot.coefficient(alpha_t, sigma_t, alpha_s, sigma_s))
    x_t, x_s = add_noise(y, alpha_t, sigma_t, eps), add_noise(y_s, alpha_s, sigma_s, eps)
    ratio = sigma_s / sigma_t
    ddim = expand(ratio, y) * x_t + expand(alpha_s - alpha_t * ratio, y) * f
    assert (x_s - ddim).abs().max() < 1e-14 * max(1, float(sigma_t.max()))


def test_eq06_is_eulers_step_of_edm():
    """With alpha = 1, of dx / dsigma = (x - D) / sigma."""
    y, f, eps = normal(1, 5), normal(1, 5, seed=1), normal(1, 5, seed=2)
    one, t, s = f64([1.0]), f64([7.0]), f64([3.0])
    x_t = add_noise(y, one, t, eps)
    x_s = add_noise(boot.carry(y, f, boot.coefficient(one, t, one, s)), one, s, eps)
    assert torch.allclose(x_s, x_t + (s - t) * (x_t - f) / t, atol=1e-12)


@pytest.mark.parametrize(
    "u, delta, k",
    [
        (0.8, 0.25, 1 - 0.380432),
        (0.9, 1 / 16, 0.3930),
        (0.5, 1 / 16, 0.1793),
        (0.1, 1 / 16, 0.6277),
        (0.99, 1 / 64, 0.6099),
        (0.99, 1 / 16, 0.8627),
        (0.999, 1 / 16, 0.9843),
    ],
)
def test_eq05_numbers(u, delta, k):
    assert k_of(COSINE, f64(u), f64(u - delta)).item() == pytest.approx(k, abs=5e-5)


@pytest.mark.parametrize(
    "t, s, k", [(999, 979, 0.1128), (999, 949, 0.2539), (500, 480, 0.0643), (40, 20, 0.3068)]
)
def test_eq05_numbers_of_stable_diffusion(t, s, k):
    vp = VP()
    levels = vp.alpha(t), vp.sigma(t), vp.alpha(s), vp.sigma(s)
    assert boot.coefficient(*levels).item() == pytest.approx(k, abs=5e-5)


@schedules
def test_eq05_limits(schedule):
    u = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    k = k_of(schedule, u, u - 0.01)
    assert ((k > 0) & (k <= 1)).all()
    assert (k[-1] == 1) == (schedule.config["name"] in ("flow", "trigflow"))  # alpha_T = 0
    inside = u[:-1]
    assert torch.equal(k_of(schedule, inside, inside), 0 * inside)
    assert torch.equal(k_of(schedule, u, 0 * u), torch.ones_like(u))


def test_eq06_limits():
    y, f = normal(4, 2), normal(4, 2, seed=1)
    assert torch.equal(boot.carry(y, f, full(0.0, 4)), y)
    assert torch.allclose(boot.carry(y, f, full(1.0, 4)), f, atol=1e-15)


@pytest.mark.parametrize("k", [1e-3, 1e-2, 0.0122])
def test_eq06_k_is_never_rounded_to_bf16(k):
    """In bf16 1 - exp(.) of a small step would be off by per cents."""
    u = torch.tensor(0.5, dtype=torch.float32)
    assert k_of(COSINE, u, u - 0.1).dtype == torch.float64
    y = torch.zeros(1, 2)
    found = boot.carry(y, y + 1, f64([k]))
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.tensor(k, dtype=torch.float32))


# ---- times and levels ----------------------------------------------------------------------------

U = torch.linspace(0, 1, 201, dtype=torch.float64)


@schedules
def test_level_rises_from_clean_to_the_noise_end(schedule):
    alpha, sigma = boot.level(schedule, U)
    assert ((sigma / alpha).log().diff() > 0).all()
    assert (alpha[0], sigma[0]) == (1, 0)
    assert alpha[-1] == schedule.alpha(f64(schedule.t_max))
    assert sigma[-1] == schedule.sigma(f64(schedule.t_max))


@schedules
def test_level_of_a_number(schedule):
    alpha, sigma = boot.level(schedule, 0.3)
    assert alpha.ndim == sigma.ndim == 0
    assert boot.level(schedule, f64([0.3])) == (alpha, sigma)


def test_levels_are_even_in_each_schedules_own_time():
    flow, shifted, vp, edm = Flow(), Flow(shift=3.0), VP(), EDM()
    inside = U[1:]
    assert torch.allclose(boot.level(flow, inside)[1], inside, atol=1e-14)
    assert torch.allclose(boot.level(shifted, inside)[1], shifted.shifted(inside), atol=1e-5)
    assert torch.allclose(boot.level(vp, inside)[1], vp.sigma(999 * inside), atol=1e-10)
    assert torch.allclose(boot.level(COSINE, inside)[1], (inside * math.pi / 2).sin(), atol=1e-10)
    rho = torch.lerp(f64(0.002 ** (1 / 7)), f64(80 ** (1 / 7)), inside)
    assert torch.allclose(boot.level(edm, inside)[1] ** (1 / 7), rho, atol=1e-5)


V = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000  # uniform in [0, 1)


def test_time_pairs_are_within_the_path_and_at_most_delta_apart():
    u_t, u_s = boot.time_pairs(V, 1 / 16, 0, 0)
    assert ((0 < u_t) & (u_t <= 1)).all()
    assert ((0 <= u_s) & (u_s < 1)).all()
    assert ((u_s < u_t) & (u_t - u_s <= 1 / 16 + 1e-15)).all()


def test_time_pairs_inside_are_delta_apart():
    delta = 1 / 16
    u_t, u_s = boot.time_pairs(V, delta, 0, 0)
    inside = (u_t < 1) & (u_s > 0)
    assert torch.allclose((u_t - u_s)[inside], f64(delta))
    expected = (1 - delta) / (1 + delta)
    assert inside.double().mean().item() == pytest.approx(expected, abs=1e-4)


def test_time_pairs_reach_both_ends():
    delta = 1 / 16
    u_t, u_s = boot.time_pairs(V, delta, 0, 0)
    share = pytest.approx(delta / (1 + delta), abs=1e-4)
    assert (u_s == 0).double().mean().item() == share
    assert (u_t == 1).double().mean().item() == share
    assert u_t[u_s == 0].min() < 1e-4  # to the image from everywhere within delta


def test_time_pairs_of_the_ends_of_v():
    u_t, u_s = boot.time_pairs(f64(0.0, 1 - 2**-53), 1 / 16, 0, 0)
    assert ((0 < u_t) & (u_t <= 1)).all()
    assert ((0 <= u_s) & (u_s <= 1)).all()


@pytest.mark.parametrize("it, low", [(0, 1.0), (25, 0.75), (75, 0.25), (100, 0.0), (5000, 0.0)])
def test_horizon_falls_to_the_image(it, low):
    v, delta = torch.linspace(0, 1, 1000, dtype=torch.float64), 0.1
    u_t, u_s = boot.time_pairs(v, delta, it, 100)
    assert u_t.min().item() == pytest.approx(low, abs=1e-12)
    assert u_s.min().item() == pytest.approx(max(low - delta, 0), abs=1e-12)
    assert u_t.max() == 1


def test_after_the_horizon_all_times_are_drawn():
    for found, expected in zip(boot.time_pairs(V, 0.1, 100, 100), boot.time_pairs(V, 0.1, 0, 0)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("batch, count", [(64, 16), (64, 4), (10, 2), (7, 0), (32, 31)])
def test_spread_rows(batch, count):
    rows = boot.spread_rows(count, batch)
    assert rows.shape == (batch,)
    assert rows.sum() == count


def test_spread_rows_gives_all_processes_the_same_share():
    assert [int(part.sum()) for part in boot.spread_rows(4, 64).split(16)] == [1] * 4


# ---- (6), (7): the exact trajectory nearly solves it, the solution on a grid is DDIM -------------


@pytest.mark.parametrize(
    "delta, expected",
    [
        (1 / 16, 5.12e-2),
        (1 / 32, 2.47e-2),
        (1 / 64, 1.21e-2),
        (1 / 128, 6.00e-3),
        (1 / 256, 2.98e-3),
    ],
)
def test_eq07_residual_of_the_exact_trajectory(delta, expected):
    """(y_s - y*) / k is of first order in delta. It is linear in eps: the numbers are of 2.178."""
    u = torch.linspace(delta + 0.02, 0.98, 4000, dtype=torch.float64)
    eps = torch.full((4000, 1), 2.178, dtype=torch.float64)
    target, k, _ = targets(Oracle(COSINE), COSINE, eps, u, u - delta)
    residual = (exact_signal(eps, u - delta, COSINE) - target) / k[:, None]
    assert residual.abs().max().item() == pytest.approx(expected, rel=5e-3)


@schedules
def test_eq06_a_step_along_the_exact_trajectory_is_of_first_order(schedule):
    """Its error is of second order in delta, on every schedule."""

    def error(delta):
        u, eps = torch.linspace(0.2, 0.9, 200, dtype=torch.float64), f64([[1.0]] * 200)
        target, _, _ = targets(Oracle(schedule), schedule, eps, u, u - delta)
        return (exact_signal(eps, u - delta, schedule) - target).abs().max().item()

    assert error(0.02) / error(0.01) == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize(
    "n, image",
    [(1, 1.000393), (2, 1.200267), (4, 1.333615), (8, 1.411474), (32, 1.476486), (128, 1.494019)],
)
def test_eq06_fixed_point_numbers(n, image):
    assert fixed_point(n, Cosine(0.999)) == pytest.approx(image, abs=1.5e-6)


@pytest.mark.parametrize("n", [1, 4, 16])
def test_eq06_fixed_point_is_the_teachers_sampler(n):
    """Flow: Euler's, of common/sampling.py."""
    image = teacher_sample(gauss(Flow()), f64([[0.7]]), {}, n).item()
    assert fixed_point(n, Flow(), 0.7) == pytest.approx(image, abs=1e-12)


def boundary_effect(schedule):
    """What + 1 in y_T does to y_0, in 1,000 steps."""
    teacher, eps, images = gauss(schedule), f64([[1.0]]), []
    levels = [boot.level(schedule, 1 - i / 1000) for i in range(1001)]
    for extra in (0.0, 1.0):
        y = teacher(eps, *levels[0], {}) + extra
        for t, s in zip(levels, levels[1:]):
            f = teacher(add_noise(y, *t, eps), *t, {})
            y = boot.carry(y, f, boot.coefficient(*t, *s))
        images.append(y.item())
    return images[1] - images[0]


@pytest.mark.parametrize(
    "schedule, effect, tolerance",
    [(Cosine(0.99), 0.008, 5e-4), (Cosine(0.9), 0.079, 1e-3), (VP(), 0.034, 1e-3), (Flow(), 0, 0)],
    ids=["cosine 0.99", "cosine 0.9", "vp", "flow"],
)
def test_eq08_matters_as_far_as_alpha_T_does(schedule, effect, tolerance):
    assert boundary_effect(schedule) == pytest.approx(effect, abs=tolerance)


def test_eq06_target_is_that_of_the_discrete_flow_map():
    """Of FreeFlow (arXiv 2511.19428), on the linear path: u_avg = y - z over a duration d = 1 - t,
    u_avg* = (d' u_avg(z, d') + (d - d') u(z + d' u_avg(z, d'), 1 - d')) / d."""
    schedule, z = Flow(), normal(64, 3)
    student, teacher = Net(schedule), gauss(schedule)
    u_t, u_s = boot.time_pairs((torch.arange(64, dtype=torch.float64) + 0.5) / 64, 0.07, 0, 0)
    target, _, _ = targets(student, schedule, z, u_t, u_s)
    before, after = (1 - u_t)[:, None], (1 - u_s)[:, None]
    u_avg = student(z, None, None, dict(time=u_t)) - z
    x = z + before * u_avg
    velocity = (teacher(x, 1 - u_t, u_t, {}) - x) / u_t[:, None]  # towards the data
    expected = z + (before * u_avg + (after - before) * velocity) / after
    assert (target - expected).abs().max() < 1e-13


def test_eq05_in_terms_of_the_flow_map():
    assert k_of(Flow(), f64(0.7), f64(0.6)).item() == pytest.approx(0.25 / 0.7, abs=1e-12)


# ---- targets broken on purpose -------------------------------------------------------------------


def wrong_sign(coefficient):
    """lambda as + log-SNR: exp(lambda_t - lambda_s)."""
    return lambda *levels: 1 - 1 / (1 - coefficient(*levels))


def next_state(carry):
    """Where the formula has the clean estimate, something one step on."""
    return lambda y, f, k: carry(y, carry(y, f, k), k)


def signal_for_state(add_noise):
    """The teacher gets the signal, not the noisy state."""
    return lambda y, alpha, sigma, eps: y


def noise_for_signal(signal):
    """y_T taken to be the noise."""

    def broken(student, schedule, eps, u, cond):
        return torch.where((u == 1)[:, None], 3 * eps, signal(student, schedule, eps, u, cond))

    return broken


@pytest.mark.parametrize(
    "name, change, end",
    [
        ("coefficient", wrong_sign, 0.999),
        ("carry", next_state, 0.999),
        ("add_noise", signal_for_state, 0.999),
        ("signal", noise_for_signal, 0.9),  # at 0.999 alpha_T is too small to notice
    ],
)
def test_eq06_a_broken_target_has_another_fixed_point(monkeypatch, name, change, end):
    right = fixed_point(32, Cosine(end))
    assert right == pytest.approx(1.476486, abs=0.02)
    monkeypatch.setattr(boot, name, change(getattr(boot, name)))
    assert not abs(fixed_point(32, Cosine(end)) - right) < 0.05


# ---- (3), (4), (8): start of the student, guidance -----------------------------------------------


@pytest.mark.parametrize("name", ["toy", "toy-cond", "mnist"])
def test_eq03_student_starts_as_the_teachers_estimate_at_every_t(name):
    """Bit for bit, so that the boundary loss (8) starts at 0."""
    teacher = load_teacher(name)
    teacher.exact = False  # the toy's network instead of its formula
    schedule, T = teacher.schedule, teacher.schedule.t_max
    eps, cond = torch.randn(4, *teacher.shape), teacher.encode(torch.arange(4))
    x_T = initial_noise(schedule, T, eps)
    estimate = teacher(x_T, schedule.alpha(T), schedule.sigma(T), cond)
    student = teacher.copy().extend("time")
    found = boot.signal(student, schedule, eps, f64(1.0, 0.6, 0.3, 0.0), cond)
    assert torch.equal(found, estimate)
    ones, is_boundary = full(1.0, 4), torch.ones(4, dtype=torch.bool)
    target, k, _ = boot.bootstrap(student, teacher, eps, ones, ones, is_boundary, cond, 1.0)
    assert torch.equal(target, estimate)
    y_T = boot.signal(student, schedule, eps, ones, cond)
    assert boot.squared_errors(y_T, target, k).max() == 0


def test_eq03_the_time_reaches_the_network():
    student = load_teacher("mnist").copy().extend("time")
    nn.init.normal_(student.extras["time"].layers[2].weight)
    eps, cond = torch.randn(2, 1, 28, 28), student.encode([0, 1])
    found = [boot.signal(student, student.schedule, eps, full(u, 2), cond) for u in (0.9, 0.4)]
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("schedule, factor", [(VP(), 1.0), (EDM(), 80.0), (Flow(), 1.0)])
def test_eq03_input_is_pure_noise_at_level_T(schedule, factor):
    eps, inputs = torch.randn(3, 2), []

    def student(x, alpha, sigma, cond):
        inputs.append((x, alpha, sigma))
        return x

    boot.signal(student, schedule, eps, full(0.3, 3), {})
    ((x, alpha, sigma),) = inputs
    assert torch.equal(x, factor * eps)
    assert (alpha, sigma) == (schedule.alpha(schedule.t_max), schedule.sigma(schedule.t_max))


def test_eq04_targets_are_guided():
    teacher = load_teacher("toy-cond")
    eps, u, cond = normal(64, 2), full(0.4, 64), teacher.encode(torch.arange(64) % 8)
    student = lambda x, alpha, sigma, cond: 0 * x
    gap = lambda cond, w: boot.bootstrap(
        student, teacher, eps, u, u - 0.1, no_boundary(u), cond, w
    )[2]
    c, n = gap(cond, 1.0), gap(teacher.null(64), 1.0)
    assert torch.allclose(gap(cond, 3.0), n + 3 * (c - n), atol=1e-12)
    assert (c - n).abs().max() > 0.1


# ---- (7) to (9): losses and their gradient -------------------------------------------------------


class OneStep:
    """A student with weights, eight pairs of times of which the last is of the boundary."""

    def __init__(self):
        self.student, self.teacher = Net(COSINE), gauss(COSINE)
        self.eps = normal(8, 3)
        self.u_t = torch.linspace(0.2, 1.0, 8, dtype=torch.float64)
        self.u_s = self.u_t - 0.1
        self.u_s[7] = 1.0
        self.is_boundary = torch.arange(8) == 7
        self.target, self.k, self.gap = boot.bootstrap(
            self.student, self.teacher, self.eps, self.u_t, self.u_s, self.is_boundary, {}, 1.0
        )

    def signal(self, u):
        return boot.signal(self.student, COSINE, self.eps, u, {})


def test_eq06_no_gradient_through_the_target():
    step = OneStep()
    assert not (step.target.requires_grad or step.k.requires_grad or step.gap.requires_grad)


def test_eq08_target_is_the_estimate_from_pure_noise():
    step = OneStep()
    alpha, sigma = boot.level(COSINE, full(1.0, 8))
    estimate = step.teacher(step.eps, alpha, sigma, {})[7]
    assert torch.equal(step.target[7], estimate)
    assert step.k[7] == 1


def test_eq07_is_the_residual_of_eq02():
    """In units of the signal: (y_s - y*) / k = (y_s - y_t) / k + y_t - f."""
    step = OneStep()
    y_s, y_t = step.signal(step.u_s), step.signal(step.u_t)
    residual = ((y_s - y_t) / step.k[:, None] - step.gap).square().mean(1)
    found = boot.squared_errors(y_s, step.target, step.k)
    assert torch.allclose(found[:7], residual[:7], rtol=1e-10)


def test_eq09_gradient_by_hand():
    """dL / dtheta = 2 / k^2 (y_s - y*) dy_s / dtheta / numel, in units of either part's share."""
    step, beta, share = OneStep(), 1.7, 1 / 8
    y_s = step.signal(step.u_s)
    each = boot.squared_errors(y_s, step.target, step.k)
    loss_bs, loss_bc = boot.split(each, step.is_boundary, share)
    params = list(step.student.parameters())
    loss = (loss_bs + beta * loss_bc).mean()
    found = torch.autograd.grad(loss, params, retain_graph=True)
    assert torch.autograd.grad(loss, step.teacher.mean, allow_unused=True) == (None,)
    y_s = step.signal(step.u_s)
    weight = torch.where(step.is_boundary, f64(beta * 8), f64(8 / 7)) / step.k**2
    direction = 2 * weight[:, None] * (y_s - step.target).detach() / y_s.numel()
    expected = torch.autograd.grad(y_s, params, direction)
    for a, b in zip(found, expected):
        assert torch.allclose(a, b, atol=1e-14, rtol=1e-12)


def test_eq07_eq08_parts_of_the_loss():
    step = OneStep()
    each = boot.squared_errors(step.signal(step.u_s), step.target, step.k)
    loss_bs, loss_bc = boot.split(each, step.is_boundary, 1 / 8)
    assert torch.allclose(loss_bs.mean(), each[:7].mean())
    assert torch.allclose(loss_bc.mean(), each[7])


def test_eq07_weight_has_a_least_k():
    y, target = normal(4, 3), normal(4, 3, seed=1)
    error = (y - target).square().mean(1)
    found = boot.squared_errors(y, target, f64(1.0, 0.5, 0.1, 1e-6))
    assert torch.allclose(found, error / f64(1.0, 0.25, 0.01, 4e-4))


def test_eq06_has_the_true_k():
    y, f = normal(1, 3), normal(1, 3, seed=1)
    assert (boot.carry(y, f, f64([1e-6])) - (y + 1e-6 * (f - y))).abs().max() < 1e-15


def test_eq07_reaches_the_prediction_only():
    y, target = normal(4, 3).requires_grad_(), normal(4, 3, seed=1).requires_grad_()
    boot.squared_errors(y, target, f64(1.0, 0.5, 0.1, 0.1)).sum().backward()
    assert y.grad.abs().min() > 0
    assert target.grad is None


def total(each, is_boundary, beta, share):
    loss_bs, loss_bc = boot.split(each, is_boundary, share)
    return (loss_bs + beta * loss_bc).mean()


def test_eq09_of_two_processes_is_that_of_one():
    each, is_boundary, share = normal(64).abs(), boot.spread_rows(6, 64), 6 / 64
    whole = total(each, is_boundary, 2.0, share)
    first = total(each[:32], is_boundary[:32], 2.0, share)
    second = total(each[32:], is_boundary[32:], 2.0, share)
    assert torch.allclose(whole, (first + second) / 2)
    assert torch.allclose(whole, each[~is_boundary].mean() + 2 * each[is_boundary].mean())


def test_eq09_without_a_boundary():
    each = normal(64).abs()
    assert torch.allclose(total(each, no_boundary(each), 0.0, 0.0), each.mean())


# ---- (10): samples -------------------------------------------------------------------------------


@schedules
def test_eq10_image(schedule):
    eps = normal(5, 1)
    assert torch.allclose(boot.sample(Oracle(schedule), eps, {}), MEAN + STD * eps)
    assert torch.allclose(boot.sample(Oracle(schedule), eps, {}, noisy=True), MEAN + STD * eps)


@schedules
@pytest.mark.parametrize("u", [0.75, 0.5, 0.1])
def test_eq10_states_on_the_trajectory(schedule, u):
    eps = normal(5, 1)
    alpha, sigma = boot.level(schedule, u)
    y = boot.sample(Oracle(schedule), eps, {}, at=u)
    assert torch.allclose(y, exact_signal(eps, full(u, 5), schedule))
    x = boot.sample(Oracle(schedule), eps, {}, at=u, noisy=True)
    assert torch.allclose(x, alpha * y + sigma * eps)
    # the ODE keeps x, in units of its deviation at each time
    assert torch.allclose((x - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2).sqrt(), eps)


def test_sample_has_one_step():
    with pytest.raises(UserError, match="--nfe 2"):
        boot.sample(Oracle(Flow()), normal(5, 1), {}, 2)


def sampler(student, z, cond, noise):
    return boot.sample(student, z, cond, 1, noise)


def test_a_sample_does_not_depend_on_its_batch():
    student = load_teacher("toy-cond").copy().extend("time")
    nn.init.normal_(student.extras["time"].layers[2].weight)
    _, _, whole = next(generate(sampler, student, 12, seed=3, batch=12))
    found = []
    for indices, _, x in generate(sampler, student, 12, seed=3, batch=5, rank=1, world=2):
        found += indices.tolist()
        assert torch.allclose(x, whole[indices], atol=1e-5)
    assert found == [1, 3, 5, 7, 9, 11]


def test_a_sample_is_one_pass():
    assert count_nfe(sampler, load_teacher("toy-cond").copy().extend("time")) == 1


# ---- distance to the teacher's path --------------------------------------------------------------


@pytest.mark.parametrize("schedule", [Flow(), VP()], ids=["flow", "vp"])
@pytest.mark.parametrize("n", [1, 4, 16])
def test_teacher_path_is_the_teachers_sampler(schedule, n):
    teacher, z = gauss(schedule), normal(6, 1)
    path = boot.teacher_path(teacher, z, {}, 1.0, n)
    assert len(path) == n + 1
    assert (path[-1] - teacher_sample(teacher, z, {}, n)).abs().max() < 1e-12


class OnThePath(nn.Module):
    """A student with the signals of the teacher's states, computed anew for each noise."""

    def __init__(self, teacher, w):
        super().__init__()
        self.teacher, self.w, self.schedule = teacher, w, teacher.schedule
        self.classes, self.shape, self.encode = teacher.classes, teacher.shape, teacher.encode

    def forward(self, x, alpha, sigma, cond):
        eps, u = x / sigma.to(x.dtype), float(cond["time"][0])
        cond = dict(labels=cond["labels"])
        path = boot.teacher_path(self.teacher, eps, cond, self.w, boot.PATH_STEPS)
        state = path[round((1 - u) * boot.PATH_STEPS)].double()
        alpha, sigma = boot.level(self.schedule, u)
        return ((state - sigma * eps.double()) / alpha).float()


@pytest.fixture(scope="module")
def distance():
    return boot.PathDistance(load_teacher("toy-cond"), types.SimpleNamespace(seed=0, cfg=2.0), 50)


def test_path_distance_of_a_perfect_student(distance):
    found = distance(OnThePath(load_teacher("toy-cond"), 2.0))
    assert list(found) == ["0.75", "0.5", "0.25", "0.0"]
    assert max(found.values()) < 1e-9


def test_path_distance_of_another_guidance(distance):
    assert distance(OnThePath(load_teacher("toy-cond"), 1.0))["0.0"] > 1e-3


def test_path_distance_is_of_the_teachers_images(distance):
    """An independent sampler ends nearby: it has another grid near the image."""
    teacher = load_teacher("toy-cond")
    images = lambda teacher, z, cond, noise: teacher_sample(teacher, z, cond, 32, 2.0)
    _, _, near = next(generate(images, teacher, 50, seed=0, batch=50))
    assert (near - distance.real[-1]).square().mean() < 1e-3
    assert distance.spread() == pytest.approx(float(distance.real[-1].var(0).mean()))


# ---- a run: who is trained, by which gradient, at which times ------------------------------------

FLAGS = [
    "",
    "--cfg 2.5",
    "--beta 0 --boundary-frac 0",
    "--horizon-warmup 2 --ema 100",
    "--delta 0.25 --distance-every 2",
]


@pytest.mark.parametrize("flags", FLAGS)
def test_eq09_gradient_routing(trace, flags):
    """One step per iteration; every weight of the student has a gradient, the teacher has none."""
    steps = trace(boot, "--iters", 4, *flags.split())
    assert [step.role for step in steps] == ["student"] * 4
    assert [step.images for step in steps] == [0, 16, 32, 48]
    for step in steps:
        assert all(g.isfinite().all() for g in step.grads["student"])
        assert not step.has_grad("teacher")
        assert step.moved("student")
        assert not step.moved("teacher")
    for step, following in zip(steps, steps[1:]):
        assert torch.equal(step.after["student"], following.before["student"])


def test_eq03_the_time_learns_from_the_first_step_on(trace):
    steps = trace(boot, "--iters", 1)
    names = [name for name, _ in steps.student.named_parameters()]
    grad = steps[0].grads["student"][names.index("extras.time.layers.2.weight")]
    assert grad.norm() > 0


def test_times_of_a_run(trace):
    flags = ["--batch", 400, "--delta", 0.125, "--boundary-frac", 0.2, "--horizon-warmup", 2]
    steps = trace(boot, "--iters", 3, *flags, record=[(boot, "bootstrap")])
    lowest = []
    for call in steps.calls["bootstrap"]:
        _, _, _, u_t, u_s, is_boundary, _, _ = call.args
        assert is_boundary.sum() == 80
        assert (u_t[is_boundary] == 1).all()
        assert (u_s[is_boundary] == 1).all()
        lowest.append(round(float(u_s.min()), 1))
    assert lowest == [0.9, 0.4, 0.0]  # by the horizon, less delta


def test_rates_and_average(trace):
    flags = ["--warmup", 4, "--lr", 1e-3, "--ema", 50, "--cooldown", 0.5]
    steps = trace(boot, "--iters", 10, *flags)
    factors = (0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2)
    assert [step.lr for step in steps] == pytest.approx([1e-3 * factor for factor in factors])
    averaged = nn.utils.parameters_to_vector(steps.ema.model.parameters())
    assert not torch.equal(averaged, steps[-1].after["student"])


# ---- whole iterations by hand --------------------------------------------------------------------


class Hand:
    """(1) to (9) from the docstring, on 2-D points with labels 0 to 7 and 8 for none."""

    def __init__(self, trace, **case):
        fixed = dict(w=1.0, delta=1 / 32, beta=1.0, share=0.25, horizon=0)
        self.trace, self.schedule = trace, trace.teacher.schedule
        vars(self).update(fixed | case)
        ends = [int(i * self.share) for i in range(17)]
        self.at_T = torch.tensor([b > a for a, b in zip(ends, ends[1:])])
        self.logs = []

    def levels(self, u):
        """alpha, sigma [B] at shares of the path, clean at 0 and the schedule's last at 1."""
        if isinstance(self.schedule, EDM):
            nodes = torch.linspace(0.01 ** (1 / 7), 20 ** (1 / 7), 1000, dtype=torch.float64) ** 7
        elif isinstance(self.schedule, VP):
            nodes = torch.arange(1000.0)
        elif isinstance(self.schedule, Flow):
            v = torch.arange(1001) / 1000
            nodes = self.schedule.shift * v / (1 + (self.schedule.shift - 1) * v)
        else:
            nodes = torch.linspace(0, math.pi / 2, 1001, dtype=torch.float64)
        places = u.numpy() * (len(nodes) - 1)
        t = torch.from_numpy(np.interp(places, np.arange(len(nodes)), nodes.double().numpy()))
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        if isinstance(self.schedule, TrigFlow):
            alpha = torch.where(u == 1, 0.0, alpha)
        return torch.where(u == 0, 1.0, alpha), torch.where(u == 0, 0.0, sigma)

    def losses(self, it):
        draw, B = BatchRandom(3, it, 16), self.at_T
        labels, eps = draw.randint(0, 8), draw.randn(2)
        low = max(1 - it / self.horizon, 0) if self.horizon else 0
        t = 1 + self.delta - (1 + self.delta - low) * draw.rand()
        t, s = t.clamp(max=1), (t - self.delta).clamp(min=0)
        one = torch.ones(16, dtype=torch.float64)
        t, s = torch.where(B, one, t), torch.where(B, one, s)
        (a_T, s_T), (a_t, s_t), (a_s, s_s) = map(self.levels, (one, t, s))
        x_T = eps if isinstance(self.schedule, VP) else (s_T[:, None] * eps).float()

        def y(u):
            return self.trace.student(x_T, a_T, s_T, dict(labels=labels, time=u))  # (3)

        y_t, y_s = y(t).detach(), y(s)
        x_t = (a_t[:, None] * y_t + s_t[:, None] * eps).float()  # (1)
        x_t = torch.where(B[:, None], x_T, x_t)
        c = self.trace.teacher(x_t, a_t, s_t, dict(labels=labels))
        null = self.trace.teacher(x_t, a_t, s_t, dict(labels=torch.full_like(labels, 8)))
        f = null + self.w * (c - null)  # (4)
        k = 1 - ((s_s / a_s).log() - (s_t / a_t).log()).exp()  # (5)
        target = torch.where(B[:, None], f, y_t + k[:, None] * (f - y_t))  # (6), (8)
        error = ((y_s - target) ** 2).mean(1)
        residual = error[~B] / k[~B].clamp(min=0.02) ** 2
        loss_bc = error[B].mean() if B.any() else torch.zeros(())  # (8)
        loss = residual.mean() + self.beta * loss_bc  # (7), (9)

        gap = (f - y_t)[~B].abs().mean()
        logs = dict(loss=loss, boundary=loss_bc, increment=gap)
        for q in range(4):
            mine = (s[~B] >= q / 4) & ((s[~B] < (q + 1) / 4) | (q == 3))
            logs[f"bootstrap_{q}"] = (residual * mine).mean()
        self.logs.append(logs)
        return dict(student=loss)


BY_HAND = {
    "--cfg 2.5 --beta 0.4 --delta 0.1 --boundary-frac 0.5 --horizon-warmup 3": dict(
        kind="vp", w=2.5, beta=0.4, delta=0.1, share=0.5, horizon=3
    ),
    "--beta 0 --boundary-frac 0 --cfg 3": dict(kind="flow", w=3, beta=0, share=0),
    "--delta 0.003 --cfg 0 --lora 4": dict(kind="trigflow", w=0, delta=0.003),
    "": {},
}


@pytest.mark.parametrize("flags", BY_HAND)
def test_whole_iterations_by_hand(trace, monkeypatch, flags):
    """(1) to (9): gradients, AdamW's updates, their average, and what the log says."""
    common = "--iters 4 --seed 3 --lr 3e-3 --betas 0.3 0.8 --weight-decay 0.1 --clip 0.1"
    common += " --warmup 2 --cooldown 0.6 --ema 3 --distance-every 0"
    case = dict(BY_HAND[flags])
    kind = case.pop("kind", "edm")
    teacher = byhand.any_toy(kind)
    if kind == "flow":
        teacher.schedule = Flow(shift=3.0)
    monkeypatch.setattr(boot, "load_teacher", lambda *args, **kwargs: teacher)
    seeds = byhand.start_awake(monkeypatch)
    wrapped = byhand.wrap_trained(monkeypatch)
    flags = [*common.split(), *flags.split()]
    steps = trace(boot, *flags, record=[(boot, "Report")])
    hand = Hand(steps, **case)
    rates = byhand.rates(3e-3, 4, warmup=2, cooldown=0.6)
    optimisers = dict(student=byhand.AdamW(rates, (0.3, 0.8), 0.1, 0.1))
    assert byhand.compare_iterations(steps, hand.losses, optimisers, 1e-4) == 4
    byhand.compare_logs(steps.logs, hand.logs)
    assert seeds == [3]  # the embedding is equal on all processes
    # gradients flow through what run.train returns, other passes do not
    assert [net.calls for net in wrapped] == [{True: 4, False: 0}]

    # the student is the average, its sample the signal at the image
    average = steps.ema.model
    found = torch.cat([p.detach().flatten() for p in average.parameters()]).double()
    assert byhand.difference(found, byhand.average(steps, 3, 16)) < 1e-6
    x, noise, cond = byhand.samples_of_record(steps.calls["Report"][0].result)
    (alpha,), (sigma,) = hand.levels(torch.ones(1, dtype=torch.float64))
    x_T = noise() if kind == "vp" else sigma.float() * noise()
    expected = average(x_T, alpha, sigma, cond | dict(time=torch.zeros(6)))  # (10)
    assert byhand.difference(x, expected) < 1e-5


def test_distance_to_the_teachers_path_by_hand(trace, tmp_path):
    """path.json and the log: the average against the teacher's DDIM path, from the same noise; and
    its signals in readout.png."""
    flags = "--iters 3 --seed 3 --cfg 2 --ema 3 --lr 1e-2 --eval-n 64 --distance-every 2"
    record = [(boot, "save_grid"), (boot, "Report")]
    steps = trace(boot, *flags.split(), record=record)
    teacher, student, hand = steps.teacher, steps.ema.model, Hand(steps)
    z, cond = PerImageNoise(3, range(64))(2), dict(labels=torch.arange(64) % 8)
    null = dict(labels=torch.full((64,), 8))
    (*_, last) = levels = hand.levels(full(0.0, 1) + torch.arange(33).flip(0) / 32)[1]
    assert last == 0
    path = [20 * z]
    for a, b in zip(levels, levels[1:]):
        c, u = (teacher(path[-1], 1.0, a, given) for given in (cond, null))
        path.append((b / a * path[-1] + (1 - b / a) * (2 * c - u)).float())

    def y(z, cond, t):
        return student(20 * z, 1.0, 20.0, cond | dict(time=full(t, len(z))))

    expected = {}
    for t in (0.75, 0.5, 0.25, 0.0):
        state = y(z, cond, t) + hand.levels(full(t, 64))[1][:, None] * z
        expected[str(t)] = (state - path[int(32 * (1 - t))]).square().mean().item()
    facts = dict(spread=path[-1].var(0).mean().item(), steps=32, n=64, cfg=2.0)
    found = read_json(tmp_path / "out" / "path.json")
    assert found == pytest.approx(expected | facts, rel=1e-4)

    lines = [{k for k in line if k.startswith("distance")} for line in steps.logs]
    assert lines == [
        {f"distance_{t}" for t in expected},
        set(),
        {f"distance_{t}" for t in expected},
    ]
    for t, value in expected.items():  # nothing moves after iteration 2
        assert steps.logs[2][f"distance_{t}"] == pytest.approx(value, rel=1e-4)

    report = steps.calls["Report"][0].result
    path, rows = steps.calls["save_grid"][0].args
    assert path == tmp_path / "out" / "samples" / "readout.png"
    assert [name for name, _ in rows] == [
        f"signal at {t}" for t in ("1", "0.75", "0.5", "0.25", "0")
    ]
    for t, (_, pictures) in zip((1.0, 0.75, 0.5, 0.25, 0.0), rows, strict=True):
        expected = report.draw(student, lambda student, z, cond, noise, t=t: y(z, cond, t))
        assert torch.equal(pictures, expected)


def unguided(bootstrap):
    return lambda *args: bootstrap(*args[:-1], 1.0)


def k_of_the_boundary(carry):
    return lambda y, f, k: carry(y, f, torch.where(k == 1, 0.5, k))


def not_weighted(squared_errors):
    return lambda y_s, target, k: squared_errors(y_s, target, torch.ones_like(k))


def at_the_image(signal):
    return lambda student, schedule, eps, u, cond: signal(student, schedule, eps, 0 * u, cond)


BROKEN = {
    "bootstrap": unguided,
    "carry": k_of_the_boundary,
    "squared_errors": not_weighted,
    "signal": at_the_image,
}


@pytest.mark.parametrize("name", BROKEN)
def test_by_hand_notices(trace, monkeypatch, name):
    """The comparison fails when the run uses a wrong function."""
    monkeypatch.setattr(boot, name, BROKEN[name](getattr(boot, name)))
    with pytest.raises(AssertionError, match="student"):
        test_whole_iterations_by_hand(trace, monkeypatch, next(iter(BY_HAND)))


def test_no_images_are_loaded():
    assert "load_images" not in vars(boot)
    assert boot.parse_args([]).data is None
