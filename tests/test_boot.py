"""Invariants of BOOT (arXiv 2306.05544) on a closed-form Gaussian, then who gets gradients in a real run. Numbers were derived apart from the code."""

import math
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import boot
from common.errors import UserError
from common.rng import BatchRandom
from common.run import Run
from common.sampling import generate, teacher_sample
from common.schedules import EDM, VP, Flow, TrigFlow, expand
from common.teachers.load import load_teacher
from tools.measure import count_nfe

COSINE = TrigFlow()  # alpha = cos(pi u / 2), sigma = sin(pi u / 2) for a share u of its path
SCHEDULES = dict(vp=VP(), edm=EDM(), flow=Flow(), shifted=Flow(shift=3.0), cosine=COSINE)
schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
ARGS = SimpleNamespace(grid="time", coef="exp", solver="ddim", cfg=1.0, clip_x0="none")
MU, S = 1.0, 0.5


def f64(x):
    return torch.as_tensor(x, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def args(**changes):
    return SimpleNamespace(**(vars(ARGS) | changes))


class Gauss(nn.Module):
    """Optimal denoiser for data N(mu, s^2), any schedule."""

    def __init__(self, schedule=COSINE):
        super().__init__()
        self.mean, self.schedule, self.inputs = nn.Parameter(f64(MU)), schedule, []

    def forward(self, x_t, alpha, sigma, cond):
        self.inputs.append(x_t)
        a, s = expand(alpha, x_t), expand(sigma, x_t)
        return self.mean + a * S**2 / (a**2 * S**2 + s**2) * (x_t - a * self.mean)

    def guided(self, x_t, alpha, sigma, cond, w):
        return self(x_t, alpha, sigma, cond)


def exact(eps, u, schedule=COSINE):
    """y at share u of the exact trajectory from eps."""
    at = boot.level(schedule, u)
    return (
        MU + expand(((at.alpha * S) ** 2 + at.sigma**2).sqrt().sub(at.sigma) / at.alpha, eps) * eps
    )


class Oracle(nn.Module):
    """A student that knows the exact trajectory."""

    def __init__(self, top):
        super().__init__()
        self.top, self.schedule = top, top.schedule

    def forward(self, x, alpha, sigma, cond):
        assert torch.equal(alpha, self.top.alpha) and torch.equal(
            sigma, self.top.sigma
        )  # the image input is at T, always
        return exact(
            x if self.schedule.unit_norm else x / self.top.sigma, cond["time"], self.schedule
        )


class Table(dict):
    """A student that holds one number per time."""

    def __call__(self, x, alpha, sigma, cond):
        return torch.stack([self[round(float(u), 9)] for u in cond["time"]])


class Net(nn.Module):
    """A student with weights: an embedding of the time that starts at zero, as `extend` makes it."""

    def __init__(self, schedule=COSINE):
        super().__init__()
        torch.manual_seed(0)
        self.schedule, self.image, self.time = (
            schedule,
            nn.Linear(3, 3).double(),
            nn.Linear(1, 3).double(),
        )

    def forward(self, x, alpha, sigma, cond):
        return self.image(x).sin() + self.time(cond["time"][:, None]).cos()


def no_edge(u):
    return torch.zeros(len(u), dtype=torch.bool)


def residual(u_t, u_s, eps, schedule=COSINE, **changes):
    """(y*_s - target) / k of the exact trajectory."""
    top = boot.level(schedule, f64(1.0))
    target, k, _ = boot.bootstrap(
        Oracle(top), Gauss(schedule), eps, u_t, u_s, no_edge(u_t), {}, top, args(**changes)
    )
    return (exact(eps, u_s, schedule) - target) / expand(k, eps)


def fixed_point(n, t_max=0.999, schedule=COSINE, eps=1.0, **changes):
    """y_0 of a student that repeats its targets, on a grid of n steps."""
    top, eps, student = boot.level(schedule, f64(t_max)), f64([[eps]]), Table()
    times = [t_max * (1 - i / n) for i in range(n + 1)]
    edge = torch.tensor([True])
    student[round(t_max, 9)] = torch.zeros(1, dtype=torch.float64)
    for u_t, u_s in [(t_max, t_max), *zip(times, times[1:])]:  # the boundary first
        target = boot.bootstrap(
            student, Gauss(schedule), eps, f64([u_t]), f64([u_s]), edge, {}, top, args(**changes)
        )[0]
        edge = torch.tensor([False])
        student[round(u_s, 9)] = target[0]
    return student[0.0].item()


# ---- B1, B3: the Signal-ODE -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "u, lam, dlam, y, x, f",
    [
        (0.1, -1.8427, 10.1664, 1.366102, 1.505717, 1.476657),
        (0.5, 0.0, 3.1416, 1.118034, 1.497676, 1.223607),
        (0.9, 1.8427, 10.1664, 1.019767, 1.147215, 1.039473),
        (0.99, 4.1535, 100.0165, 1.001964, 1.015615, 1.003927),
    ],
)
def test_signal_ode(u, lam, dlam, y, x, f):
    at, eps = boot.level(COSINE, f64([u])), f64([[1.0]])
    assert (at.sigma / at.alpha).log().item() == pytest.approx(lam, abs=5e-5)
    rate = math.pi / 2 * (COSINE.dsigma(at.t) / at.sigma - COSINE.dalpha(at.t) / at.alpha).item()
    assert rate == pytest.approx(dlam, abs=5e-5)
    values = (exact(eps, f64([u])), boot.point(exact(eps, f64([u])), eps, at))
    clean = boot.teacher_signal(Gauss(), values[1], at, {}, 1.0)
    assert [v.item() for v in (*values, clean)] == pytest.approx([y, x, f], abs=1e-6)
    t = at.t.clone().requires_grad_()  # dy / dt of the closed form, by autograd
    curve = MU + (((t.cos() * S) ** 2 + t.sin() ** 2).sqrt() - t.sin()) / t.cos()
    slope = math.pi / 2 * torch.autograd.grad(curve.sum(), t)[0].item()
    assert slope == pytest.approx(-rate * (clean - values[0]).item(), abs=1e-12)


def test_boundary_value_is_the_teachers_guess():
    assert [exact(f64([[1.0]]), f64([u])).item() for u in (0.9, 0.99, 0.999)] == pytest.approx(
        [1.019767, 1.001964, 1.000196], abs=1e-6
    )
    at = boot.level(COSINE, f64([0.999]))
    assert boot.teacher_signal(Gauss(), f64([[1.0]]), at, {}, 1.0).item() == pytest.approx(
        1.000392, abs=1e-6
    )


# ---- B2, B5: the step -------------------------------------------------------------------------------------------------------------------------


@schedules
@pytest.mark.parametrize("grid", ["time", "logsnr"])
def test_a_step_is_ddim(schedule, grid):
    t, s = (
        boot.level(schedule, f64([0.8, 0.5, 0.999]), grid),
        boot.level(schedule, f64([0.55, 0.0, 0.2]), grid),
    )
    y, f, eps = normal(3, 5), normal(3, 5, seed=1), normal(3, 5, seed=2)
    x_s = boot.point(boot.carried(y, f, boot.coefficient(t, s)), eps, s)
    x_t, ratio = boot.point(y, eps, t), expand(s.sigma / t.sigma, y)
    ddim = ratio * x_t + (expand(s.alpha, y) - expand(t.alpha, y) * ratio) * f
    assert (x_s - ddim).abs().max() < 1e-14 * max(1, float(t.sigma.max()))
    if schedule is COSINE and grid == "time":
        assert 1 - boot.coefficient(t, s)[0].item() == pytest.approx(0.380432, abs=1e-6)
    if isinstance(
        schedule, EDM
    ):  # alpha = 1: Euler's step of dx / dsigma = (x - D) / sigma, and both coefficients are one
        euler = x_t + expand(s.sigma - t.sigma, y) * (x_t - f) / expand(t.sigma, y)
        assert (x_s - euler)[[0, 2]].abs().max() < 1e-12
        assert torch.allclose(
            boot.coefficient(t, s)[[0, 2]], boot.coefficient(t, s, "euler")[[0, 2]], atol=1e-12
        )


@pytest.mark.parametrize(
    "u, delta, euler, k",
    [
        (0.9, 1 / 16, 0.6354, 0.3930),
        (0.5, 1 / 16, 0.1963, 0.1793),
        (0.1, 1 / 16, 0.6354, 0.6277),
        (0.99, 1 / 64, 1.5628, 0.6099),
        (0.99, 1 / 16, 6.25, 0.8627),
        (0.999, 1 / 16, 62.5, 0.9843),
    ],
)
def test_coefficients(u, delta, euler, k):
    t, s = boot.level(COSINE, f64(u)), boot.level(COSINE, f64(u - delta))
    assert boot.coefficient(t, s).item() == pytest.approx(k, abs=5e-5)
    assert boot.coefficient(t, s, "euler").item() == pytest.approx(euler, rel=3e-4)


@pytest.mark.parametrize(
    "t, s, k", [(999, 979, 0.1128), (999, 949, 0.2539), (500, 480, 0.0643), (40, 20, 0.3068)]
)
def test_coefficients_of_sd(t, s, k):
    vp = VP()
    t, s = (boot.Level(vp, f64(i), vp.alpha(f64(i)), vp.sigma(f64(i))) for i in (t, s))
    assert boot.coefficient(t, s).item() == pytest.approx(k, abs=5e-5)


@schedules
@pytest.mark.parametrize("grid", ["time", "logsnr"])
def test_limits(schedule, grid):
    """B8: a step of length 0 changes nothing, a step to the clean end gives f; on the whole path k is in [0, 1]."""
    u = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    at, clean = boot.level(schedule, u, grid), boot.level(schedule, torch.zeros_like(u), grid)
    assert torch.equal(boot.coefficient(at, at), torch.zeros_like(u)) and torch.equal(
        boot.coefficient(at, clean), torch.ones_like(u)
    )
    k = boot.coefficient(at, boot.level(schedule, u - 0.01, grid))
    assert ((k > 0) & (k <= 1)).all() and (k[-1] == 1) == (
        schedule.config["name"] in ("flow", "trigflow")
    )
    y, f = normal(100, 2), normal(100, 2, seed=1)
    assert torch.equal(boot.carried(y, f, 0 * k), y) and torch.allclose(
        boot.carried(y, f, torch.ones_like(k)), f, atol=1e-15
    )


# ---- levels and times -------------------------------------------------------------------------------------------------------------------------


@schedules
@pytest.mark.parametrize("grid", ["time", "logsnr"])
def test_levels(schedule, grid):
    u = torch.linspace(0, 1, 201, dtype=torch.float64)
    at = boot.level(schedule, u, grid)
    lam = (at.sigma / at.alpha).log()
    assert (lam.diff() > 0).all() and (at.t.diff() > 0).all()
    assert (at.alpha[0], at.sigma[0]) == (1, 0) and at.t[-1] == schedule.t_max
    assert (at.alpha[-1], at.sigma[-1]) == (
        schedule.alpha(f64(schedule.t_max)),
        schedule.sigma(f64(schedule.t_max)),
    )
    one = boot.level(schedule, 0.3, grid)
    assert one.t.ndim == 0 and one.t == pytest.approx(
        boot.level(schedule, f64([0.3]), grid).t.item()
    )
    if grid == "logsnr":
        inside = lam[1:-1].diff()
        assert torch.allclose(inside, inside.mean(), rtol=2e-3)  # t_from_snr rounds to float32
    elif isinstance(schedule, EDM):
        assert torch.allclose(
            at.sigma[1:] ** (1 / 7),
            torch.lerp(f64(0.002 ** (1 / 7)), f64(80 ** (1 / 7)), u[1:]),
            atol=1e-5,
        )
    elif isinstance(schedule, Flow):
        assert torch.allclose(at.t, schedule.shifted(u), atol=1e-5 if schedule.shift > 1 else 1e-14)
    else:
        assert torch.allclose(at.t, u * schedule.t_max, atol=1e-10)


def test_pairs():
    v, delta = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000, 1 / 16
    u_t, u_s = boot.pairs(v, delta, 0, 0)
    assert (
        (0 < u_t).all()
        and (u_t <= 1).all()
        and (0 <= u_s).all()
        and (u_s < 1).all()
        and (u_s < u_t).all()
        and (u_t - u_s <= delta + 1e-15).all()
    )
    inner = (u_t < 1) & (u_s > 0)
    assert torch.allclose(
        (u_t - u_s)[inner], f64(delta)
    ) and inner.double().mean() == pytest.approx((1 - delta) / (1 + delta), abs=1e-4)
    assert (
        (u_s == 0).double().mean()
        == (u_t == 1).double().mean()
        == pytest.approx(delta / (1 + delta), abs=1e-4)
    )
    assert u_t[u_s == 0].min() < 1e-4  # to the image from everywhere within delta
    edges = boot.pairs(f64([0.0, 1 - 2**-53]), delta, 0, 0)
    assert all(((0 <= u) & (u <= 1)).all() for u in edges) and edges[0][1] > 0


@pytest.mark.parametrize("it, low", [(0, 1.0), (25, 0.75), (75, 0.25), (100, 0.0), (5000, 0.0)])
def test_progressive_horizon(it, low):
    v, delta = torch.linspace(0, 1, 1000, dtype=torch.float64), 0.1
    u_t, u_s = boot.pairs(v, delta, it, 100)
    assert (
        u_t.min() == pytest.approx(low, abs=1e-12)
        and u_s.min() == pytest.approx(max(low - delta, 0), abs=1e-12)
        and u_t.max() == 1
    )
    if low == 0:
        assert all(torch.equal(a, b) for a, b in zip((u_t, u_s), boot.pairs(v, delta, 0, 0)))


@pytest.mark.parametrize(
    "batch, share, count",
    [(64, 0.25, 16), (64, 1 / 16, 4), (10, 0.25, 2), (7, 0.0, 0), (32, 0.99, 31)],
)
def test_boundary_rows(batch, share, count):
    rows = boot.boundary_rows(batch, share)
    assert rows.shape == (batch,) and rows.dtype == torch.bool and rows.sum() == count
    if batch == 64:  # every process has the same number of them
        assert {int(part.sum()) for part in rows.split(16)} == {count // 4}


# ---- B4, B6: the exact trajectory nearly solves it, the grid solution is DDIM --------------------------------------------------------------------


@pytest.mark.parametrize(
    "coef, expected",
    [
        ("exp", (5.12e-2, 2.47e-2, 1.21e-2, 6.00e-3, 2.98e-3)),
        ("euler", (3.94e-2, None, None, None, 2.21e-3)),
    ],
)
def test_residual_of_the_exact_trajectory(coef, expected):
    """In units of the signal, first order in delta. It is linear in eps, and the specification's numbers are those of |eps| = 2.178, over the exact k in both forms."""
    for delta, value in zip((1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256), expected):
        u = torch.linspace(delta + 0.02, 0.98, 4000, dtype=torch.float64)
        r = residual(u, u - delta, torch.full((4000, 1), 2.178, dtype=torch.float64), coef=coef)[
            :, 0
        ]
        k = [
            boot.coefficient(boot.level(COSINE, u), boot.level(COSINE, u - delta), c)
            for c in (coef, "exp")
        ]
        assert value is None or (r * k[0] / k[1]).abs().max().item() == pytest.approx(
            value, rel=5e-3
        )


@schedules
@pytest.mark.parametrize("grid", ["time", "logsnr"])
def test_the_exact_trajectory_solves_it_on_every_schedule(schedule, grid):
    """First order in delta, second with the midpoint solver. Oracle and teacher know nothing of the grid."""
    u, size = torch.linspace(0.2, 0.9, 200, dtype=torch.float64), {}
    for delta in (0.02, 0.01):
        for solver in ("ddim", "midpoint"):
            top = boot.level(schedule, f64(1.0), grid)
            x = lambda u: boot.level(schedule, u, grid)
            eps, teacher = torch.ones(200, 1, dtype=torch.float64), Gauss(schedule)
            y = lambda u: (
                MU
                + (((x(u).alpha * S) ** 2 + x(u).sigma ** 2).sqrt() - x(u).sigma)[:, None]
                / x(u).alpha[:, None]
            )
            student = lambda inp, a, s, cond: y(cond["time"])
            target, k, gap = boot.bootstrap(
                student,
                teacher,
                eps,
                u,
                u - delta,
                no_edge(u),
                {},
                top,
                args(grid=grid, solver=solver),
            )
            assert len(teacher.inputs) == (2 if solver == "midpoint" else 1)
            size[solver, delta] = (
                (y(u - delta) - target).abs().max().item()
            )  # error of one step: delta^2, or delta^3
    assert size["ddim", 0.02] / size["ddim", 0.01] == pytest.approx(4, rel=0.15)
    assert (
        size["midpoint", 0.02] / size["midpoint", 0.01] == pytest.approx(8, rel=0.3)
        and size["midpoint", 0.01] < 0.1 * size["ddim", 0.01]
    )


@pytest.mark.parametrize(
    "n, expected",
    [(1, 1.000393), (2, 1.200267), (4, 1.333615), (8, 1.411474), (32, 1.476486), (128, 1.494019)],
)
def test_bootstrapping_on_a_grid(n, expected):
    assert fixed_point(n) == pytest.approx(expected, abs=1.5e-6)


@pytest.mark.parametrize("n", [1, 4, 16])
def test_the_grid_solution_is_the_teachers_sampler(n):
    """Flow, T at pure noise: Euler's sampler of common/metrics.py. `teacher_path` is that sampler for flow and VP."""
    for schedule in (Flow(), VP()):
        teacher, z = Gauss(schedule), normal(6, 1)
        path = boot.teacher_path(teacher, z, {}, 1.0, n)
        assert (
            len(path) == n + 1
            and (path[-1] - teacher_sample(teacher, z, {}, n)).abs().max() < 1e-12
        )
    assert fixed_point(n, 1.0, Flow(), 0.7) == pytest.approx(
        teacher_sample(Gauss(Flow()), f64([[0.7]]), {}, n).item(), abs=1e-12
    )
    assert fixed_point(n, 1.0, Flow(), 0.7, grid="logsnr") == pytest.approx(
        boot.teacher_path(Gauss(Flow()), f64([[0.7]]), {}, 1.0, n, "logsnr")[-1].item(), abs=1e-12
    )


def test_the_boundary_matters_as_far_as_alpha_does():
    """What +1 in y_T does to y_0 (spec, pitfall 4), in 1,000 steps; nothing at all on a flow whose T is pure noise."""

    def change(schedule, t_max):
        at = boot.level(schedule, t_max * (1 - torch.arange(1001, dtype=torch.float64) / 1000))
        levels = [boot.Level(schedule, *part) for part in zip(*at[1:])]
        ends, eps, teacher = [], f64([[1.0]]), Gauss(schedule)
        for extra in (0.0, 1.0):
            y = teacher(eps, levels[0].alpha, levels[0].sigma, {}) + extra
            for t, s in zip(levels, levels[1:]):
                y = boot.carried(
                    y,
                    boot.teacher_signal(teacher, boot.point(y, eps, t), t, {}, 1.0),
                    boot.coefficient(t, s),
                )
            ends.append(y.item())
        return ends[1] - ends[0]

    assert change(COSINE, 0.99) == pytest.approx(0.008, abs=5e-4) and change(
        COSINE, 0.9
    ) == pytest.approx(0.079, abs=1e-3)
    assert change(VP(), 1.0) == pytest.approx(0.034, abs=1e-3) and change(Flow(), 1.0) == 0


# ---- B7: the flow map on the linear path ------------------------------------------------------------------------------------------------------------


def test_target_is_that_of_the_discrete_flow_map():
    """Student as average velocity F = y - z over a duration d = 1 - t (FreeFlow, arXiv 2511.19428): going on from d' to d by one Euler step of the teacher,
    F* = (d' F(z, d') + (d - d') u(z + d' F(z, d'), 1 - d')) / d."""
    schedule, student, teacher, z = Flow(), Net(Flow()), Gauss(Flow()), normal(64, 3)
    v = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    u_t, u_s = boot.pairs(v, 0.07, 0, 0)
    top = boot.level(schedule, f64(1.0))
    target = boot.bootstrap(student, teacher, z, u_t, u_s, no_edge(v), {}, top, ARGS)[0]
    before, after = (1 - u_t)[:, None], (1 - u_s)[:, None]
    F = student(z, None, None, dict(time=u_t)) - z
    x = z + before * F
    velocity = (teacher(x, before[:, 0], 1 - before[:, 0], {}) - x) / (
        1 - before
    )  # towards the data
    F_star = (before * F + (after - before) * velocity) / after
    assert (target - (z + F_star)).abs().max() < 1e-13
    t, s = boot.level(schedule, f64(0.7)), boot.level(schedule, f64(0.6))
    assert boot.coefficient(t, s).item() == pytest.approx(0.25 / 0.7, abs=1e-12)


# ---- initialisation -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["toy", "toy-cond", "mnist"])
def test_student_starts_as_the_teachers_guess(name):
    """At every t, bit for bit: the boundary loss is exactly 0. (The toy teacher answers with the exact posterior, so its network is compared.)"""
    teacher = load_teacher(name)
    teacher.exact = False
    eps, cond = torch.randn(4, *teacher.shape), teacher.encode(torch.arange(4))
    top = boot.level(teacher.schedule, f64(1.0))
    student = teacher.copy().extend("time")
    guess = teacher(boot.first_input(teacher.schedule, top, eps), top.alpha, top.sigma, cond)
    u = f64([1.0, 0.6, 0.3, 0.0])
    assert torch.equal(boot.signal(student, eps, u, cond, top), guess) and torch.equal(
        boot.signal(student, eps, 0 * u + 1, cond, top), guess
    )
    edge = torch.ones(4, dtype=torch.bool)
    target, k, gap = boot.bootstrap(
        student, teacher, eps, 0 * u + 1, 0 * u + 1, edge, cond, top, ARGS
    )
    assert (
        torch.equal(target, guess)
        and boot.errors(boot.signal(student, eps, 0 * u + 1, cond, top), target, k).max() == 0
    )
    nn.init.normal_(
        next(iter(student.extras["time"].layers[2].parameters()))
    )  # the time does reach the network
    assert (
        boot.signal(student, eps, u, cond, top) - boot.signal(student, eps, u / 2, cond, top)
    ).abs().max() > 1e-3


@pytest.mark.parametrize("schedule, factor", [(VP(), 1.0), (EDM(), 80.0), (Flow(), 1.0)])
def test_first_input(schedule, factor):
    eps = torch.randn(3, 2)
    assert torch.equal(
        boot.first_input(schedule, boot.level(schedule, f64(1.0)), eps), factor * eps
    )


# ---- B8, B9: guidance, losses, gradients ----------------------------------------------------------------------------------------------------------------


def test_guidance_and_clipping():
    teacher, x = load_teacher("toy-cond"), 2 * normal(64, 2)
    cond, at = (
        teacher.encode(torch.arange(64) % 8),
        boot.level(teacher.schedule, torch.full((64,), 0.4, dtype=torch.float64)),
    )
    c, u = (teacher(x, at.alpha, at.sigma, k) for k in (cond, teacher.null(64)))
    assert torch.equal(boot.teacher_signal(teacher, x, at, cond, 1.0), c)
    assert (
        torch.allclose(
            boot.teacher_signal(teacher, x, at, cond, 3.0), u + 3 * (c - u), atol=1e-12, rtol=0
        )
        and (c - u).abs().max() > 0.1
    )
    e = lambda clean: (x - expand(at.alpha, x) * clean) / expand(at.sigma, x)
    assert torch.allclose(
        (x - expand(at.sigma, x) * (e(u) + 3 * (e(c) - e(u)))) / expand(at.alpha, x),
        u + 3 * (c - u),
        atol=1e-12,
        rtol=0,
    )
    f = torch.stack([torch.linspace(-3, 3, 1000), torch.linspace(-0.5, 0.5, 1000)]).view(
        2, 1, 20, 50
    )
    assert boot.clipped(f, "none") is f and torch.equal(boot.clipped(f, "static"), f.clamp(-1, 1))
    dynamic, top = boot.clipped(f, "dynamic"), f[0].abs().flatten().quantile(0.995)
    assert torch.allclose(dynamic[0], (f[0] / top).clamp(-1, 1)) and torch.equal(dynamic[1], f[1])


@pytest.mark.parametrize("solver", ["ddim", "midpoint"])
def test_gradient(solver):
    """dL / dtheta = 2 / k^2 (y_s - y*) dy_s / dtheta / numel: nothing through the target, nothing into the teacher."""
    student, teacher, eps = Net(), Gauss(), normal(8, 3)
    u_t = torch.linspace(0.2, 1.0, 8, dtype=torch.float64)
    u_s, edge, top = u_t - 0.1, torch.arange(8) == 7, boot.level(COSINE, f64(1.0))
    u_s[7] = 1.0
    target, k, gap = boot.bootstrap(
        student, teacher, eps, u_t, u_s, edge, {}, top, args(solver=solver)
    )
    assert not (target.requires_grad or k.requires_grad or gap.requires_grad) and k[7] == 1
    assert torch.equal(
        target[7], teacher(eps, top.alpha, top.sigma, {})[7].detach()
    )  # the boundary's target is f(eps, T), not f(alpha y + sigma eps)
    y_s = boot.signal(student, eps, u_s, {}, top)
    loss, bs, bc = boot.total(boot.errors(y_s, target, k), edge, 1.7, 1 / 8)
    loss.backward()
    assert teacher.mean.grad is None
    weight = torch.where(edge, f64(1.7 * 8), f64(8 / 7)) / k**2
    y_again = boot.signal(student, eps, u_s, {}, top)
    by_hand = torch.autograd.grad(
        y_again,
        list(student.parameters()),
        2 * weight[:, None] * (y_again - target).detach() / eps.numel(),
    )
    assert all(
        torch.allclose(p.grad, g, atol=1e-14, rtol=1e-12)
        for p, g in zip(student.parameters(), by_hand)
    )
    # in units of the signal: (7) is the mean square of (y_s - y_t) / k + y_t - f, the residual of (2)
    y_t = boot.signal(student, eps, u_t, {}, top)
    plain = ((y_s - y_t) / k[:, None] - gap).square().mean(1)
    assert torch.allclose(plain[:7], boot.errors(y_s, target, k)[:7], rtol=1e-10)
    assert torch.allclose(bs.mean(), plain[:7].mean()) and torch.allclose(
        bc.mean(), (y_s - target)[7].square().mean()
    )


def test_weight():
    y, target, k = normal(4, 3), normal(4, 3, seed=1), f64([1.0, 0.5, 0.1, 1e-6])
    each = (y - target).square().mean(1)
    assert torch.equal(boot.errors(y, target, k, "none"), each)
    assert torch.allclose(
        boot.errors(y, target, k), each / f64([1.0, 0.25, 0.01, 4e-4])
    )  # --k-min is for the weight alone ...
    tiny = f64([1e-6])
    assert (
        boot.carried(y[:1], target[:1], tiny).sub(y[:1] + 1e-6 * (target - y)[:1]).abs().max()
        < 1e-15
    )  # ... the target has the true k


@pytest.mark.parametrize("k", [1e-3, 1e-2, 0.0122])
def test_the_coefficient_is_never_rounded_to_bf16(k):
    """In bf16 1 - exp(.) of a small step would be off by per cents."""
    t = boot.level(COSINE, torch.tensor(0.5, dtype=torch.float32))
    assert t.alpha.dtype == boot.coefficient(t, boot.level(COSINE, 0.4)).dtype == torch.float64
    y = torch.zeros(1, 2)
    assert boot.carried(y, y + 1, f64([k])).dtype == torch.float32 and torch.allclose(
        boot.carried(y, y + 1, f64([k])), torch.tensor(k, dtype=torch.float32)
    )


def test_loss_of_two_processes_is_that_of_one():
    each, edge = normal(64).abs(), boot.boundary_rows(64, 0.1)
    whole = boot.total(each, edge, 2.0, 6 / 64)[0]
    parts = [boot.total(each[i], edge[i], 2.0, 6 / 64)[0] for i in (slice(0, 32), slice(32, 64))]
    assert torch.allclose(whole, sum(parts) / 2) and torch.allclose(
        whole, each[~edge].mean() + 2 * each[edge].mean()
    )
    assert torch.allclose(boot.total(each, edge & False, 0.0, 0.0)[0], each.mean())


# ---- broken on purpose (spec, section 8) ------------------------------------------------------------------------------------------------------------------


def broken_sign(right):  # lambda as + log-SNR: exp(lambda_t - lambda_s)
    return dict(coefficient=lambda t, s, coef="exp": 1 - 1 / (1 - right["coefficient"](t, s, coef)))


def broken_next_state(right):  # where the formula has the clean estimate, the state one step on
    def teacher_signal(teacher, x, at, cond, w, clip="none"):
        s = boot.level(at.schedule, (at.t / at.schedule.t_max - 1 / 32).clamp(min=0))
        f = right["teacher_signal"](teacher, x, at, cond, w, clip)
        return (
            expand(s.sigma / at.sigma, x) * x
            + expand(s.alpha - at.alpha * s.sigma / at.sigma, x) * f
        )

    return dict(teacher_signal=teacher_signal)


def broken_state(right):  # the teacher is shown the signal, not the noisy state
    return dict(point=lambda y, eps, at: y)


def broken_boundary(right):  # y_T taken to be the noise, while alpha_T is not small
    return dict(
        signal=lambda student, eps, u, cond, top: torch.where(
            (u == 0.9)[:, None], eps * 3, right["signal"](student, eps, u, cond, top)
        )
    )


@pytest.mark.parametrize(
    "change, t_max",
    [
        (broken_sign, 0.999),
        (broken_next_state, 0.999),
        (broken_state, 0.999),
        (broken_boundary, 0.9),
    ],
)
def test_a_broken_target_has_another_fixed_point(monkeypatch, change, t_max):
    right = fixed_point(32, t_max)
    assert right == pytest.approx(1.476486, abs=0.02)
    for name, mutant in change(
        {k: getattr(boot, k) for k in ("coefficient", "teacher_signal", "point", "signal")}
    ).items():
        monkeypatch.setattr(boot, name, mutant)
    wrong = fixed_point(32, t_max)
    assert not abs(wrong - right) < 0.05, wrong


# ---- read-out ---------------------------------------------------------------------------------------------------------------------------------------------


@schedules
def test_read_out_at_any_time(schedule):
    eps, teacher = normal(5, 1), Gauss(schedule)
    student = Oracle(boot.level(schedule, f64(1.0)))
    assert torch.allclose(boot.sample(student, eps, {}), MU + S * eps) and torch.allclose(
        boot.sample(student, eps, {}, noisy=True), MU + S * eps
    )
    for u in (0.75, 0.5, 0.1):
        at = boot.level(schedule, u)
        y, x = (boot.sample(student, eps, {}, at=u, noisy=noisy) for noisy in (False, True))
        assert torch.allclose(y, exact(eps, f64(u).expand(5), schedule)) and torch.allclose(
            x, at.alpha * y + at.sigma * eps
        )
        # that state lies on the trajectory: x / std of the marginal keeps its place, and the teacher goes on from there to the same image
        assert torch.allclose((x - at.alpha * MU) / ((at.alpha * S) ** 2 + at.sigma**2).sqrt(), eps)
    with pytest.raises(UserError, match="--nfe 2"):
        boot.sample(student, eps, {}, 2)


def test_a_sample_does_not_depend_on_its_batch():
    student = load_teacher("toy-cond").copy().extend("time")
    nn.init.normal_(student.extras["time"].layers[2].weight)
    sampler = lambda m, z, c, noise: boot.sample(m, z, c, 1, noise)
    whole = next(generate(sampler, student, 12, seed=3, batch=12))[2]
    parts = {
        i: row
        for part, _, x in generate(sampler, student, 12, seed=3, batch=5, rank=1, world=2)
        for i, row in zip(part.tolist(), x)
    }
    assert sorted(parts) == [1, 3, 5, 7, 9, 11] and all(
        torch.allclose(row, whole[i], atol=1e-5) for i, row in parts.items()
    )
    assert count_nfe(sampler, student) == 1


def test_fidelity():
    """0 for a student that walks the teacher's own path; the spread is the variance of its images."""
    teacher = load_teacher("toy-cond")
    watch = boot.Fidelity(teacher, SimpleNamespace(seed=0, cfg=2.0, grid="time", t_max=1.0), 50)
    assert [len(z) for z, _, _ in watch.parts] == [32, 18] and sorted(
        watch(teacher.copy().extend("time"))
    ) == sorted(map(str, boot.READOUTS))
    z, cond, path = (
        torch.cat([p[0] for p in watch.parts]),
        None,
        [torch.cat([p[2][i] for p in watch.parts]) for i in range(4)],
    )
    image = teacher_sample  # an independent sampler ends nearby: another grid near the image
    near = image(teacher, z, teacher.encode(torch.arange(50) % 8), 32, 2.0)
    assert (near - path[3]).square().mean() < 1e-3 and watch.spread() == pytest.approx(
        float(path[3].var(0).mean())
    )
    known = lambda z, cond, u: {
        round(float(a[0]), 6): b for a, b in zip(z.double(), path[boot.READOUTS.index(u)])
    }

    class Walker(nn.Module):
        schedule = teacher.schedule

        def forward(self, x, alpha, sigma, cond):
            u = float(cond["time"][0])
            at, eps = boot.level(self.schedule, u), x / sigma.to(x.dtype)
            rows = torch.stack(
                [
                    known(z, cond, u)[round(float(a[0]), 6)]
                    for a in z[[int((z - e).abs().sum(1).argmin()) for e in eps]].double()
                ]
            )
            return ((rows.double() - at.sigma * eps.double()) / at.alpha).float()

    assert all(d < 1e-9 for d in watch(Walker()).values())


# ---- a run: who is trained, by which gradient, at which times ------------------------------------------------------------------------------------------------


class Trace(list):
    """main() in this process on the toy teacher. One entry per optimiser step: lr, gradients, weights before and after."""

    def __init__(self, monkeypatch, tmp_path, *flags):
        super().__init__()
        self.made, self.seen, self.inputs = {}, [], []
        for module, name, key in ((boot, "EMA", "ema"), (models, "load_teacher", "teacher")):
            self.keep(monkeypatch, module, name, key)
        step, pairs, targets = Run.step, boot.pairs, boot.bootstrap
        monkeypatch.setattr(Run, "step", lambda run, opt, clip: self.step(step, run, opt, clip))
        monkeypatch.setattr(boot, "pairs", lambda *a: self.inputs.append(a[1:]) or pairs(*a))
        monkeypatch.setattr(boot, "bootstrap", lambda *a: self.seen.append(a[3:6]) or targets(*a))
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
            "--eval-n",
            "0",
        ]
        monkeypatch.setattr(sys, "argv", ["boot.py", *default, *map(str, flags)])
        handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            boot.main()
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
            monkeypatch.undo()

    def keep(self, monkeypatch, module, name, key):
        make = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: self.made.setdefault(key, make(*a, **k)))

    def flat(self):
        return torch.cat([p.detach().flatten() for p in self.made["ema"].live.parameters()])

    def step(self, step, run, opt, clip):
        params = [p for group in opt.param_groups for p in group["params"]]
        student = self.made["ema"].live
        assert [id(p) for p in params] == [id(p) for p in student.parameters()]
        entry = dict(
            lr=opt.param_groups[0]["lr"],
            grads={k: p.grad.clone() for k, p in student.named_parameters()},
            before=self.flat(),
        )
        assert all(
            p.grad is None and not p.requires_grad for p in self.made["teacher"].parameters()
        )
        norm = step(run, opt, clip)
        self.append(entry | dict(after=self.flat(), images=self.made["ema"].images))
        return norm


@pytest.fixture
def trace(monkeypatch, tmp_path):
    return lambda *flags: Trace(monkeypatch, tmp_path, *flags)


VARIANTS = [
    "",
    "--cfg 2.5",
    "--grid logsnr",
    "--solver midpoint",
    "--coef euler",
    "--weight none",
    "--beta 0 --boundary-frac 0",
    "--horizon-warmup 2 --ema 100",
    "--t-max 0.9 --at 0.5",
]


@pytest.mark.parametrize("flags", VARIANTS)
def test_gradient_routing(trace, flags):
    """One step per iteration; every weight of the student has a gradient, the teacher has none and stays."""
    steps = trace("--iters", 4, *flags.split())
    assert len(steps) == 4 and [s["images"] for s in steps] == [0, 16, 32, 48]
    for s in steps:
        assert all(g.isfinite().all() for g in s["grads"].values()) and not torch.equal(
            s["before"], s["after"]
        )
    assert steps[0]["grads"]["extras.time.layers.2.weight"].norm() > 0
    assert all(torch.equal(a["after"], b["before"]) for a, b in zip(steps, steps[1:]))
    fresh = load_teacher("toy-cond")
    assert all(
        torch.equal(p, q) for p, q in zip(steps.made["teacher"].parameters(), fresh.parameters())
    )


def test_times_of_a_run(trace):
    steps = trace(
        "--iters",
        3,
        "--batch",
        400,
        "--t-max",
        0.8,
        "--delta",
        0.125,
        "--boundary-frac",
        0.2,
        "--horizon-warmup",
        2,
    )
    assert steps.inputs == [(0.125, it, 2) for it in range(3)]
    for u_t, u_s, edge in steps.seen:
        assert (
            edge.sum() == 80
            and (u_t[edge] == 0.8).all()
            and (u_s[edge] == 0.8).all()
            and u_t.max() == 0.8
            and u_s.min() >= 0
        )
    assert [round(float(u_s.min()), 1) for _, u_s, _ in steps.seen] == [0.7, 0.3, 0.0]


def test_rates_and_average(trace):
    steps = trace("--iters", 10, "--warmup", 4, "--lr", 1e-3, "--ema", 50, "--cooldown", 0.5)
    assert [s["lr"] for s in steps] == pytest.approx(
        [1e-3 * f for f in (0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2)]
    )
    ema = steps.made["ema"]
    assert not torch.equal(torch.cat([p.flatten() for p in ema.model.parameters()]), steps.flat())


def test_the_first_gradient_by_hand(trace):
    """One iteration of the EDM toy written out: sigma only, alpha = 1, x_T = 20 eps."""
    steps = trace("--iters", 1, "--cfg", 2, "--beta", 0.5)
    teacher, draw = load_teacher("toy-cond"), BatchRandom(0, 0, 16)
    torch.manual_seed(0)
    student, s = teacher.copy().extend("time"), teacher.schedule
    cond, eps, v = teacher.encode(draw.randint(0, 8)), draw.randn(2), draw.rand()
    nodes = s.grid(1000)
    sigma = lambda u: torch.where(
        u == 0,
        0.0,
        torch.stack(
            [torch.lerp(nodes[int(p)], nodes[min(int(p) + 1, 999)], p - int(p)) for p in u * 999]
        ),
    )
    v = 33 / 32 * (1 - v)
    u_t, u_s = v.clamp(max=1), (v - 1 / 32).clamp(min=0)
    edge = torch.arange(16) % 4 == 3
    u_t[edge] = u_s[edge] = 1.0
    y = lambda u: student(20 * eps, 1.0, 20.0, cond | dict(time=u))
    with torch.no_grad():
        y_t = y(u_t)
        x = torch.where(edge[:, None], 20 * eps, y_t + sigma(u_t)[:, None] * eps).float()
        c, n = (teacher(x, torch.ones(16), sigma(u_t), k) for k in (cond, teacher.null(16)))
        f, k = n + 2 * (c - n), torch.where(edge, 1.0, 1 - sigma(u_s) / sigma(u_t))
        target = y_t + k[:, None] * (f - y_t)
    y_s = y(u_s)
    error = (y_s - target).square().mean(1)
    ((error / k.clamp(min=0.02) ** 2)[~edge].mean() + 0.5 * error[edge].mean()).backward()
    for name, p in student.named_parameters():
        assert torch.allclose(
            steps[0]["grads"][name], p.grad, rtol=1e-4, atol=1e-6 * float(p.grad.abs().max() + 1)
        ), name


def test_no_images_are_loaded(trace, monkeypatch):
    monkeypatch.setattr(data, "load_images", None)
    assert len(trace("--iters", 1)) == 1 and "data" not in vars(boot)


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--teacher", "mnist", "--coef", "euler"], "--coef euler.*--t-max"),
        (["--clip-x0", "static"], "--clip-x0 static"),
    ],
)
def test_what_only_the_teacher_can_tell(trace, flags, expected):
    with pytest.raises(UserError, match=expected):
        trace("--iters", 1, *flags)
