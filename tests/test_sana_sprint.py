"""sana_sprint.py: its equations on closed-form Gaussians and small networks, mostly in float64,
then who is trained by what in a real run.

Expected numbers were derived apart from the code.
"""

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import byhand
from helpers.conversions import from_x0
from helpers.frame import check_frame
from helpers.gaussian import Gauss, GaussConsistency, f64, full, normal, relative_error
from helpers.runs import log
from helpers.trace import Trace

import sana_sprint
from common.errors import UserError
from common.model import Model, ScalarEmbedding
from common.rng import BatchRandom
from common.sampling import generate, teacher_sample
from common.schedules import EDM, VP, Flow, TrigFlow, equal_snr, expand
from common.teachers.dit import DiT
from common.teachers.load import load_teacher
from common.teachers.toy import MLP, Toy
from data.images import load_images
from training.run import Run

SD = 0.5
HALF_PI = math.pi / 2
DEPTHS = (0.1, 0.4, 0.7, 0.95)


@pytest.fixture
def exact(monkeypatch):
    """Float64 all the way: times are not rounded to float32 on their way into a network."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)


def times(n, low=0.05, high=1.5):
    return torch.linspace(low, high, n, dtype=torch.float64)


def max_error(found, expected):
    return (found - expected).abs().max().item()


class Native(Model):
    """A network with its own schedule and prediction, whose estimates are those of `gauss`."""

    def __init__(self, gauss, schedule, prediction, shape=(3,), sigma_data=0.5):
        super().__init__(nn.Linear(1, 1), schedule, prediction, shape, sigma_data=sigma_data)
        self.gauss = gauss

    def predict(self, x, t, cond):
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        x0 = self.gauss(x, alpha, sigma, cond)
        return from_x0(self.prediction, x0, x, alpha, sigma, self.sigma_data)

    def null(self, n):
        return {}


def toy_network():
    torch.manual_seed(0)
    schedule = EDM(0.01, 20.0, 0.714)
    model = Toy(MLP(width=32), schedule, "edm", (2,), 8, sigma_data=0.714)
    return model.double().copy().double()


def tiny_dit():
    torch.manual_seed(0)
    config = dict(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        sample_size=14,
        patch_size=7,
        num_embeds_ada_norm=10,
    )
    model = DiT(DiT.network(config), Flow(), "flow", (1, 14, 14), 10)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model.double()


# ---- (1), (2), (3): any teacher in TrigFlow coordinates ------------------------------------------


def true_velocity(u, t, mean, std, rho):
    """F from its definition, cos t E[eps | u] - sin t E[y | u], for y ~ N(mean, std^2) / rho."""
    cos, sin = expand(t.cos(), u), expand(t.sin(), u)
    y = Gauss(mean / rho, std / rho)(u, t.cos(), t.sin(), {})
    eps = (u - cos * y) / sin
    return cos * eps - sin * y


def test_eq02_flow_in_trigflow_coordinates(exact):
    """s = sin / (sin + cos) at equal SNR, and its derivative along t."""
    t = times(50, 0.01, 1.57)
    s, _, _, scale = equal_snr(Flow(), TrigFlow(1.0).alpha(t), TrigFlow(1.0).sigma(t))
    factor = 1 / (t.sin() + t.cos())
    assert max_error(s, t.sin() * factor) < 1e-15
    assert max_error(scale, factor) < 1e-15
    assert max_error(factor * t.cos(), 1 - s) < 1e-15

    at = lambda t: equal_snr(Flow(), t.cos(), t.sin())[0]
    _, slope = torch.func.jvp(at, (f64(0.9),), (f64(1.0),))
    assert slope.item() == pytest.approx(0.506625, abs=1e-6)


def test_eq03_of_a_flow_teacher(exact):
    """F = [(cos t - sin t) u + v] / (sin t + cos t), the training-free transformation."""
    net = Native(Gauss(0.7, 1.3), Flow(), "flow")
    u, t = normal(20, 3), times(20)
    factor = 1 / (t.sin() + t.cos())
    v = net.predict(expand(factor, u) * u, t.sin() * factor, {})
    short = (expand(t.cos() - t.sin(), u) * u + v) * expand(factor, u)
    assert max_error(sana_sprint.velocity(net, u, t, {}, 1.0), short) < 1e-13


@pytest.mark.parametrize(
    "schedule, prediction, rho",
    [
        (Flow(), "flow", 1.0),
        (Flow(), "flow", 0.6),
        (Flow(), "x0", 1.0),
        (VP(), "eps", 1.0),
        (VP(), "v", 1.0),
        (VP(), "eps", 0.7),
        (EDM(sigma_data=0.5), "edm", 0.5),
        (EDM(), "edm", 1.0),
        (TrigFlow(0.5), "trigflow", 0.5),
    ],
)
def test_eq02_eq03_of_any_teacher(schedule, prediction, rho, exact):
    net = Native(Gauss(0.7, 1.3), schedule, prediction)
    low, high = sana_sprint.time_range(schedule, rho)
    u, t = normal(40, 3), times(40, max(0.05, low), min(1.55, high))
    found = sana_sprint.velocity(net, u, t, {}, rho)
    assert max_error(found, true_velocity(u, t, 0.7, 1.3, rho)) < 1e-11


def test_eq03_of_an_edm_teacher_is_minus_its_raw_network(exact):
    rho = 0.5
    net = Native(Gauss(0.7, 1.3), EDM(sigma_data=0.5), "edm")
    u, t = normal(40, 3), times(40)
    raw = net.predict(u * rho / expand(t.cos(), u), rho * t.tan(), {})
    assert max_error(sana_sprint.velocity(net, u, t, {}, rho), -raw) < 1e-11


def test_time_range():
    """SD 1.5: tan t from 0.0292 to 14.615."""
    assert sana_sprint.time_range(VP(), 1.0) == pytest.approx((0.0292, 1.5025), abs=5e-5)
    assert sana_sprint.time_range(Flow(), 0.6) == (1e-3, HALF_PI)
    low, high = sana_sprint.time_range(EDM(0.01, 20.0), 0.7)
    assert math.tan(low) == pytest.approx(0.01 / 0.7)
    assert math.tan(high) == pytest.approx(20 / 0.7)


def trigflow_sampler(teacher, z, cond, nfe, w, rho):
    """Exact steps of (3), from the levels and the first input of the sampler `teacher_sample`."""
    schedule = teacher.schedule
    if schedule.unit_norm:
        grid = torch.linspace(schedule.t_max, 0, nfe + 1, dtype=torch.float64)[:-1]
    else:
        grid = schedule.grid(nfe).flip(0)
    t = torch.atan2(schedule.sigma(grid), rho * schedule.alpha(grid))
    t = torch.cat([t, f64([0.0])])
    if schedule.unit_norm:  # it starts from z itself
        size = (schedule.alpha(grid[0]) ** 2 + schedule.sigma(grid[0]) ** 2 / rho**2).sqrt()
        u = z / size / rho
    else:
        u = z * t[0].sin()
    for a, b in zip(t, t[1:]):
        at = (u.to(z.dtype), a.expand(len(z)), cond, rho, full(w, len(z)))
        dx = sana_sprint.teacher_derivative(teacher, *at).double()
        u = (a - b).cos() * u - (a - b).sin() * dx / SD
    return rho * u


@pytest.mark.parametrize(
    "name, w, rho",
    [("mnist", 1.5, 0.617), ("toy-cond", 1.0, 0.714), ("vp", 1.0, 1.0), ("vp", 1.0, 0.7)],
)
def test_eq03_the_teachers_sampler_in_trigflow_coordinates(name, w, rho):
    if name == "vp":
        teacher, cond = Native(Gauss(0.7, 1.3), VP(), "eps"), {}
    else:
        teacher = load_teacher(name)
        cond = teacher.encode(torch.arange(4))
    z = normal(4, *teacher.shape)
    if name == "mnist":
        z = z.float()
    expected = teacher_sample(teacher, z, cond, 5, w)
    assert max_error(trigflow_sampler(teacher, z, cond, 5, w, rho), expected) < 1e-4


def test_eq03_exact_step():
    """x_s = cos(t - s) x_t - sin(t - s) F moves a point of one (x, eps) from t to s."""
    x, eps, t, s = normal(5), normal(5, seed=1), 1.1, 0.4
    x_t = math.cos(t) * x + math.sin(t) * eps
    f = math.cos(t) * eps - math.sin(t) * x
    moved = math.cos(t - s) * x_t - math.sin(t - s) * f
    assert max_error(moved, sana_sprint.noisy(x, f64(s), eps)) < 1e-7


def test_eq01_ends_are_exact():
    y, eps = normal(5, 3), normal(5, 3, seed=1)
    assert torch.equal(sana_sprint.noisy(y, f64(HALF_PI), eps), eps)
    assert torch.equal(sana_sprint.noisy(y, f64(0.0), eps), y)


@pytest.mark.parametrize(
    "mean, std, expected",
    [
        (-1, 1.6, (0.148, 0.634, 1.303)),
        (0, 1.6, (0.384, 1.107, 1.470)),
        (-0.6, 1, (0.384, 0.832, 1.247)),
    ],
)
def test_eq01_quantiles_of_the_times(mean, std, expected):
    """16, 50 and 84 %: minus one, no and one deviation."""
    t = sana_sprint.random_times(torch.tensor([-1.0, 0.0, 1.0]), mean, std, 1e-3, 1.57)
    assert t.tolist() == pytest.approx(expected, abs=1e-3)


# ---- (4): guidance; the student at its start -----------------------------------------------------


class Guided:
    """A model's guided estimate, as a model."""

    def __init__(self, model, w):
        self.model, self.w = model, w

    def __call__(self, x_t, alpha, sigma, cond):
        return self.model.guided(x_t, alpha, sigma, cond, self.w)


def test_eq04_guidance_commutes_with_the_change_of_coordinates():
    teacher, rho = load_teacher("mnist"), 0.617
    u, t = torch.randn(4, 1, 28, 28), times(4, 0.3, 1.5)
    cond = teacher.encode(torch.arange(4))
    scales = (1.0, 1.5, 2.0, 4.0)
    dx = sana_sprint.teacher_derivative(teacher, u, t, cond, rho, torch.tensor(scales))
    for i, w in enumerate(scales):
        expected = SD * sana_sprint.velocity(Guided(teacher, w), u, t, cond, rho)
        assert torch.allclose(dx[i], expected[i], atol=1e-5)
    unguided = sana_sprint.teacher_derivative(teacher, u, t, cond, rho, None)
    assert torch.allclose(dx[0], unguided[0], atol=1e-6)


@pytest.mark.parametrize("name", ["mnist", "toy"])
def test_the_student_starts_as_the_teacher(name):
    """Bit for bit, for every w."""
    teacher = load_teacher(name)
    teacher.exact = False  # toy: the network, not the mixture
    student = teacher.copy().extend("guidance")
    u, t, cond = torch.randn(6, *teacher.shape), times(6), teacher.encode(torch.arange(6))
    with_w = sana_sprint.student_cond(cond, torch.tensor([1, 1.5, 2, 4, 4.5, 5]))
    found = sana_sprint.velocity(student, u, t, with_w, 0.6)
    assert torch.equal(found, sana_sprint.velocity(teacher, u, t, cond, 0.6))


# ---- (5), (6): the tangent -----------------------------------------------------------------------


def derivative(model, u, t, cond, rho, dx):
    """J of (5). The model's dtype is its own again afterwards."""
    dtype = model.dtype
    j = sana_sprint.student_derivative(model, u, t, cond, rho, dx)
    assert model.dtype == dtype
    assert not j.requires_grad
    return j


def g_of(student, teacher, u, t, r=1.0, rho=1.0, cond=None):
    """g of (6) before its normalisation, g of (7), F."""
    cond = cond or {}
    dx = sana_sprint.teacher_derivative(teacher, u, t, cond, rho, None)
    f = sana_sprint.velocity(student, u, t, cond, rho)
    j = derivative(student, u, t, cond, rho, dx)
    g, norm = sana_sprint.tangent(f.detach(), dx, u, t, j, r)
    return g * (expand(norm, g) + 0.1), g, f


@pytest.mark.parametrize("rho", [1.0, 0.6])
def test_eq06_is_zero_at_the_solution(rho):
    """The exact consistency function of the teacher's ODE, but not of another teacher's."""
    u, t = normal(60, 4), times(60, 0.05, 1.5707)
    student = GaussConsistency(0.7, 1.3)
    assert g_of(student, Gauss(0.7, 1.3), u, t, rho=rho)[0].abs().max() < 1e-13
    assert g_of(student, Gauss(0.8, 1.3), u, t, rho=rho)[0].abs().max() > 1e-2


def test_eq06_is_zero_at_the_teacher_while_r_is_zero():
    u, t, same = normal(60, 4), times(60), Gauss(0.7, 1.3)
    assert torch.equal(g_of(same, same, u, t, r=0.0)[1], torch.zeros_like(u))
    assert 0.3 < g_of(same, same, u, t, r=1.0)[0].abs().max() < 3


def test_eq06_for_data_like_noise():
    """The teacher's F is 0; F = 0 has g = -cos t sin t x_t; the solution is F = -tan(t / 2) u."""
    u, t, teacher = normal(30, 4), times(30), Gauss(0.0, 1.0)
    assert sana_sprint.velocity(teacher, u, t, {}, 1.0).abs().max() < 1e-14
    raw, _, _ = g_of(teacher, teacher, u, t)
    assert max_error(raw, -expand(t.cos() * t.sin(), u) * SD * u) < 1e-14
    f = sana_sprint.velocity(GaussConsistency(0.0, 1.0), u, t, {}, 1.0)
    assert max_error(f, -expand((t / 2).tan(), u) * u) < 1e-13


def slope(fn, h):
    """Derivative of fn at 0 by central differences of fourth order."""
    return (8 * (fn(h) - fn(-h)) - (fn(2 * h) - fn(-2 * h))) / (12 * h)


def test_eq06_is_the_derivative_along_the_teachers_ode(exact):
    """cos t d(sd yhat)/dt at r = 1."""
    student, teacher, rho = toy_network(), Gauss(0.2, 0.6), 0.7
    u, t, cond = normal(16, 2), times(16, 0.1, 1.5), dict(labels=torch.arange(16) % 9)
    raw, _, _ = g_of(student, teacher, u, t, rho=rho, cond=cond)
    f_pre = sana_sprint.teacher_derivative(teacher, u, t, cond, rho, None) / SD
    yhat = lambda h: SD * sana_sprint.clean(student, u + h * f_pre, t + h, cond, rho)
    assert max_error(raw, expand(t.cos(), u) * slope(yhat, 1e-3)) < 1e-7


def case(name):
    """(model, rho)"""
    if name == "toy":
        return toy_network(), 0.7
    if name == "toy with guidance":
        model = toy_network().extend("guidance").double()
        for p in model.extras.parameters():
            p.data.normal_()
        return model, 0.7
    if name == "tiny dit":
        return tiny_dit(), 0.6
    if name == "vp":
        torch.manual_seed(0)
        model = Native(None, VP(), "eps", (2,))
        model.net = MLP(width=16).double()
        model.predict = lambda x, t, cond: model.net(x, 1 + t, cond["labels"])
        return model, 1.0
    return load_teacher("mnist").copy().double(), 0.617


@pytest.mark.parametrize("name", ["toy", "toy with guidance", "tiny dit", "vp", "mnist"])
def test_eq05_equals_central_differences(name, exact):
    """The step is small because the mnist network embeds times of 0..1000."""
    model, rho = case(name)
    u, t = normal(3, *model.shape), f64(0.3, 0.9, 1.45)
    dx = SD * normal(3, *model.shape, seed=1)
    cond = dict(labels=torch.arange(3), guidance=full(0.15, 3))
    factor = t.cos() * t.sin()
    direction = expand(factor, u) * dx / SD
    at = lambda h: sana_sprint.velocity(model, u + h * direction, t + h * factor, cond, rho)
    with torch.no_grad():
        expected = slope(at, 1e-5)
    assert relative_error(derivative(model, u, t, cond, rho, dx), expected) < 1e-6


def test_eq05_fused_attention_has_no_derivative():
    """Why student_derivative needs plain attention."""
    model = tiny_dit().float()
    u, t = torch.randn(2, 1, 14, 14), f64(0.5, 1.0)
    at = lambda u: sana_sprint.velocity(model, u, t, model.null(2), 1.0)
    try:
        torch.func.jvp(at, (u,), (u,))
    except NotImplementedError:
        return
    pytest.skip("this torch differentiates its fused attention forwards")


def flat(grads):
    return torch.cat([g.flatten() for g in grads])


def test_eq06_eq08_gradient_is_that_of_the_discrete_consistency_loss(exact):
    """Without normalisation: 1/h times the gradient of w/2 |yhat(t) - sg[yhat(t - h)]|^2 for small
    h, with w = 1 / (sd tan t)."""
    student, teacher, rho, h = toy_network(), Gauss(0.2, 0.6), 0.7, 1e-5
    u, t, cond = normal(16, 2), times(16, 0.2, 1.4), dict(labels=torch.arange(16) % 9)
    params = list(student.parameters())
    raw, _, f = g_of(student, teacher, u, t, rho=rho, cond=cond)
    loss = sana_sprint.scm_loss(f, raw) / 2 * f.numel()
    found = flat(torch.autograd.grad(loss, params))

    f_pre = sana_sprint.teacher_derivative(teacher, u, t, cond, rho, None) / SD
    before = SD * sana_sprint.clean(student, u - h * f_pre, t - h, cond, rho).detach()
    gap = (SD * sana_sprint.clean(student, u, t, cond, rho) - before).square().sum(1)
    loss = (gap / (SD * t.tan())).sum() / 2 / h
    assert relative_error(found, flat(torch.autograd.grad(loss, params))) < 1e-4


# ---- (7), (8): normalisation and weight ----------------------------------------------------------


def tangent_case():
    """u, t, F, dx, J and g of (6) for r = 0."""
    u, t = normal(5, 3, 4, 4), times(5)
    f, dx, j = (normal(5, 3, 4, 4, seed=i) for i in (1, 2, 3))
    return u, t, f, dx, j, -(expand(t.cos(), u) ** 2) * (SD * f - dx)


def test_eq07_norm_over_a_sample():
    u, t, f, dx, j, raw = tangent_case()
    g, norm = sana_sprint.tangent(f, dx, u, t, j, 0.0)
    assert torch.allclose(norm, raw.flatten(1).norm(dim=1))
    assert torch.allclose(g.flatten(1).norm(dim=1), norm / (norm + 0.1))
    assert torch.allclose(g * (norm + 0.1).view(-1, 1, 1, 1), raw)


def test_eq06_r_multiplies_the_second_part_once():
    """x_t and J; J has its factor cos t sin t already."""
    u, t, f, dx, j, raw = tangent_case()
    g, norm = sana_sprint.tangent(f, dx, u, t, j, 0.25)
    second = g * (norm + 0.1).view(-1, 1, 1, 1) - raw
    assert torch.allclose(second, -0.25 * SD * (expand(t.cos() * t.sin(), u) * u + j))


def test_eq06_every_sample_has_its_own_r():
    u, t, f, dx, j, _ = tangent_case()
    zero = sana_sprint.tangent(f, dx, u, t, j, 0.0)[0]
    one = sana_sprint.tangent(f, dx, u, t, j, 1.0)[0]
    mixed = sana_sprint.tangent(f, dx, u, t, j, f64(0, 1, 0, 1, 0))[0]
    assert torch.equal(mixed[::2], zero[::2])
    assert torch.equal(mixed[1::2], one[1::2])
    assert not torch.equal(zero, one)


MEAN_SQUARE = 0.3


def weight_case():
    """F = 0 with gradient, and g whose mean square is 0.3."""
    f = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    return f, torch.full((1, 4), MEAN_SQUARE**0.5, dtype=torch.float64)


def test_eq08_without_weight():
    f, g = weight_case()
    (d_f,) = torch.autograd.grad(sana_sprint.scm_loss(f, g), [f])
    assert torch.allclose(d_f, -2 * g / 4)


def test_eq08_lv_ends_at_the_log_of_the_mean_square():
    """There the weight is its inverse."""
    f, g = weight_case()
    lv = f64([math.log(MEAN_SQUARE)]).requires_grad_()
    d_lv, d_f = torch.autograd.grad(sana_sprint.scm_loss(f, g, lv), [lv, f])
    assert d_lv.abs() < 1e-12
    assert torch.allclose(d_f, -2 * g / 4 / MEAN_SQUARE)


def test_eq08_clamped_lv_is_learned_the_same_but_weighs_less():
    f, g = weight_case()
    lv = f64([math.log(MEAN_SQUARE)]).requires_grad_()
    d_lv, d_f = torch.autograd.grad(sana_sprint.scm_loss(f, g, lv, floor=1.0), [lv, f])
    assert d_lv.abs() < 1e-12
    assert torch.allclose(d_f, -2 * g / 4 * math.exp(-1))


def test_eq08_clamp_above_its_floor_changes_nothing():
    f, g = weight_case()
    lv = f64([math.log(MEAN_SQUARE) + 0.5]).requires_grad_()
    d_lv, d_f = torch.autograd.grad(sana_sprint.scm_loss(f, g, lv, floor=-9.0), [lv, f])
    assert torch.allclose(d_lv, 1 - MEAN_SQUARE * (-lv).exp())
    assert torch.allclose(d_f, -2 * g / 4 * (-lv).exp().item())


@pytest.mark.parametrize("name", ["toy", "tiny dit"])
@pytest.mark.parametrize("t", [1e-3, HALF_PI - 1e-4])
def test_finite_at_both_ends_in_float32(name, t):
    model, rho = case(name)
    model = model.float()
    u, t = torch.randn(4, *model.shape), full(t, 4)
    f = sana_sprint.velocity(model, u, t, model.null(4), rho)
    dx = SD * f.detach()
    j = derivative(model, u, t, model.null(4), rho, dx)
    g, norm = sana_sprint.tangent(f.detach(), dx, u, t, j, 1.0)
    sana_sprint.scm_loss(f, g).backward()
    assert g.isfinite().all()
    assert (norm < 1e3).all()
    for p in model.parameters():
        assert p.grad is None or p.grad.isfinite().all()


def test_eq08_gradient_is_that_of_f_along_minus_g():
    """g is constant in the loss, also if it has a graph; the teacher gets no gradient."""
    teacher, student = toy_network(), toy_network()
    u, t, cond = normal(8, 2), times(8), dict(labels=torch.arange(8))
    dx = sana_sprint.teacher_derivative(teacher, u, t, cond, 0.7, full(1.5, 8))
    j = sana_sprint.student_derivative(student, u, t, cond, 0.7, dx)
    f = sana_sprint.velocity(student, u, t, cond, 0.7)
    g, _ = sana_sprint.tangent(f.detach(), dx, u, t, j, 1.0)
    g_with_graph, _ = sana_sprint.tangent(f, dx, u, t, j, 1.0)
    for x in (dx, j, g):
        assert not x.requires_grad
    assert g_with_graph.requires_grad

    params = list(student.parameters())
    loss = sana_sprint.scm_loss(f, g_with_graph)
    found = flat(torch.autograd.grad(loss, params, retain_graph=True))
    expected = flat(torch.autograd.grad(f, params, -2 * g / g.numel()))
    assert torch.allclose(found, expected, atol=1e-15)
    assert found.abs().max() > 0
    assert all(p.grad is None for p in teacher.parameters())


class Phi(nn.Module):
    """A student with F = phi(t) u."""

    dtype = torch.float64

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 1)).double()

    def phi(self, t):
        return self.net(torch.stack([t.sin(), t.cos()], -1))[..., 0]

    def forward(self, x, alpha, sigma, cond):
        f = expand(self.phi(torch.atan2(sigma, alpha)), x) * x
        return expand(alpha, x) * x - expand(sigma, x) * f


PHI_TIMES = f64(0.5, 1.0, 1.5, HALF_PI)


def learn_phi(steps=400, adaptive=True):
    """phi at PHI_TIMES after sCM on data like noise, for which the solution is -tan(t / 2)."""
    torch.manual_seed(0)
    student, teacher, log_var = Phi(), Gauss(0.0, 1.0), ScalarEmbedding(32).double()
    opt = torch.optim.Adam([*student.parameters(), *log_var.parameters()], lr=5e-3)
    for it in range(steps):
        opt.param_groups[0]["lr"] = 5e-3 * min(1, 2 * (1 - it / steps))
        t = sana_sprint.random_times(torch.randn(64), -0.4, 1.4, 1e-3, HALF_PI - 1e-4)
        u = sana_sprint.noisy(torch.randn(64, 16).double(), t, torch.randn(64, 16))
        dx = sana_sprint.teacher_derivative(teacher, u, t, {}, 1.0, None)
        f = sana_sprint.velocity(student, u, t, {}, 1.0)
        j = sana_sprint.student_derivative(student, u, t, {}, 1.0, dx)
        g, _ = sana_sprint.tangent(f.detach(), dx, u, t, j, min(1, 4 * it / steps))
        loss = sana_sprint.scm_loss(f, g, log_var(t).mean(1) if adaptive else None)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return student.phi(PHI_TIMES).detach()


@pytest.mark.parametrize("adaptive", [True, False])
def test_eq08_training_finds_the_consistency_function(adaptive):
    assert max_error(learn_phi(adaptive=adaptive), -(PHI_TIMES / 2).tan()) < 0.06


RIGHT_DERIVATIVE = sana_sprint.student_derivative
RIGHT_TANGENT = sana_sprint.tangent


def wrong_sign_of_j(*args):
    return -RIGHT_DERIVATIVE(*args)


def j_with_its_factor_twice(student, u, t, *args):
    return expand(t.cos() * t.sin(), u) * RIGHT_DERIVATIVE(student, u, t, *args)


def wrong_sign_of_g(*args):
    g, norm = RIGHT_TANGENT(*args)
    return -g, norm


def r_is_zero(f, dx, u, t, j, r):
    return RIGHT_TANGENT(f, dx, u, t, j, 0.0)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("student_derivative", wrong_sign_of_j),
        ("student_derivative", j_with_its_factor_twice),
        ("tangent", wrong_sign_of_g),
        ("tangent", r_is_zero),
    ],
)
def test_a_wrong_tangent_finds_something_else(name, wrong, monkeypatch):
    monkeypatch.setattr(sana_sprint, name, wrong)
    found = learn_phi(100, adaptive=False)
    assert max_error(found, -(PHI_TIMES / 2).tan()) > 0.2


# ---- sampler -------------------------------------------------------------------------------------


@pytest.mark.parametrize("nfe, steps", [(1, None), (2, None), (4, None), (3, "1,0.6,0.2")])
@pytest.mark.parametrize("rho", [1.0, 0.6])
def test_samples_of_the_solution_have_the_moments_of_the_data(nfe, steps, rho):
    n, seeds = 400_000, iter(range(1, 10))
    noise = lambda: normal(n, 1, seed=next(seeds))
    student = GaussConsistency(0.3, 0.8)
    x = sana_sprint.sample(student, normal(n, 1), {}, nfe, noise, steps, rho)
    assert x.mean().item() == pytest.approx(0.3, abs=5e-3)
    assert x.std().item() == pytest.approx(0.8, abs=3e-3)
    assert next(seeds) == nfe  # nfe - 1 draws of noise


@pytest.mark.parametrize(
    "n, expected",
    [
        (1, [HALF_PI]),
        (2, [1.56830, 1.3]),
        (3, [1.5708, 1.0472, 0.5236]),
        (4, [1.56830, 1.3, 1.1, 0.6]),
    ],
)
def test_sample_times_of_the_paper(n, expected):
    found = sana_sprint.sample_times(Flow(), 1.0, n)
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_sample_times_for_any_number_of_steps():
    assert len(sana_sprint.sample_times(Flow(), 1.0, 8)) == 8


def test_sample_times_end_with_the_teachers_schedule():
    assert sana_sprint.sample_times(VP(), 1.0, 1).item() == pytest.approx(1.5025, abs=5e-5)


@pytest.mark.parametrize("rho", [1.0, 0.6])
def test_steps_are_in_the_teachers_own_time(rho):
    """tan t = sigma / (rho alpha)."""
    found = sana_sprint.sample_times(Flow(), rho, 2, "0.8,0.5")
    assert found.tan().tolist() == pytest.approx([4 / rho, 1 / rho])
    found = sana_sprint.sample_times(EDM(), rho, 1, "2.5")
    assert found.tan().item() == pytest.approx(2.5 / rho)
    vp = VP()
    found = sana_sprint.sample_times(vp, rho, 1, "499")
    assert found.tan().item() == pytest.approx((vp.sigma(499) / vp.alpha(499)).item() / rho)


@pytest.mark.parametrize(
    "n, text",
    [
        (2, "0.5"),
        (2, "0.5,0.8"),
        (2, "0.5,0.5"),
        (1, "0"),
        (1, "1.1"),
        (1, "nan"),
        (1, "x"),
        (1, ""),
    ],
)
def test_wrong_steps_are_refused(n, text):
    with pytest.raises(UserError, match="--steps"):
        sana_sprint.sample_times(Flow(), 1.0, n, text)


def test_one_step_is_the_network_at_pure_noise():
    teacher = load_teacher("mnist")
    z, cond = torch.randn(4, 1, 28, 28), teacher.encode(torch.arange(4))
    x = sana_sprint.sample(teacher, z, cond, 1, None, rho=0.617)
    assert torch.allclose(x, teacher(z, 0.0, 1.0, cond), atol=1e-5)


def student_with_guidance():
    student = load_teacher("toy-cond").copy().extend("guidance")
    nn.init.normal_(student.extras["guidance"].layers[2].weight)
    return student


def sampler(cfg):
    def run(model, z, cond, noise):
        return sana_sprint.sample(model, z, cond, 2, noise, rho=0.7, cfg=cfg)

    return run


def test_a_sample_does_not_depend_on_its_batch():
    student = student_with_guidance()
    whole = next(generate(sampler(1.5), student, 12, seed=3, batch=12))[2]
    rows = {}
    for part, _, x in generate(sampler(1.5), student, 12, seed=3, batch=5, rank=1, world=2):
        rows |= dict(zip(part.tolist(), x))
    assert sorted(rows) == [1, 3, 5, 7, 9, 11]
    for i, row in rows.items():
        assert torch.allclose(row, whole[i], atol=1e-5)


def test_the_sampler_gives_w_to_the_student():
    student = student_with_guidance()
    first = next(generate(sampler(1.5), student, 12, seed=3, batch=12))[2]
    second = next(generate(sampler(4.0), student, 12, seed=3, batch=12))[2]
    assert max_error(first, second) > 1e-2


# ---- (10), (11), (12): the GAN -------------------------------------------------------------------


def test_eq12_at_logit_zero():
    fake = torch.zeros(5, 7, requires_grad=True)
    real = torch.zeros(5, 7, requires_grad=True)
    loss = sana_sprint.heads_loss(fake, real)
    loss.backward()
    assert loss.item() == 1.0
    assert torch.allclose(fake.grad, torch.full((5, 7), 0.5 / 35))  # descent lowers fakes' logits
    assert torch.allclose(real.grad, torch.full((5, 7), -0.5 / 35))


def test_eq12_is_zero_beyond_the_margin():
    logit = torch.full((5, 7), 1.5)
    assert sana_sprint.heads_loss(-logit, logit) == 0


def test_eq11_gradient():
    fake = torch.zeros(5, 7, requires_grad=True)
    loss = sana_sprint.gen_loss(fake)
    loss.backward()
    assert loss.item() == 0
    assert torch.allclose(fake.grad, torch.full((5, 7), -1 / 35))


@pytest.mark.parametrize("name, maps, places", [("mnist", 4, 64), ("toy", 2, 2)])
def test_eq10_gradient_passes_through_frozen_teacher_and_heads(name, maps, places):
    teacher = load_teacher(name)
    cond, x = teacher.encode(torch.arange(4)), torch.randn(4, *teacher.shape, requires_grad=True)
    features = teacher(x, 0.7, 0.7, cond, features=DEPTHS)
    heads = sana_sprint.Heads(map(sana_sprint.Head, features)).eval().requires_grad_(False)
    logits = heads(features)
    assert len(features) == maps
    assert logits.shape == (4, places)
    sana_sprint.gen_loss(logits).backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in [*teacher.parameters(), *heads.parameters()])


@pytest.mark.parametrize("shape", [(160, 4, 4), (48, 1, 1), (32, 3, 5), (24,)])
def test_eq10_head(shape):
    head = sana_sprint.Head(torch.zeros(1, *shape))
    h = torch.randn(3, *shape, requires_grad=True)
    logits = head(h)
    assert logits.shape == (3, math.prod(shape[1:]))
    assert head(torch.randn(3, *shape).bfloat16()).dtype == torch.float32
    for m in head.modules():
        if isinstance(m, nn.GroupNorm):
            assert m.num_channels // m.num_groups >= 4
    logits[0].sum().backward()
    assert h.grad[0].norm() > 1e-3
    assert h.grad[1:].norm() == 0


@pytest.mark.parametrize("shape", [(16, 3, 5), (24,)])
def test_eq10_head_by_hand(shape):
    """Layer, norm and LeakyReLU; the same with a wider layer as a residual of deviation 1; a logit
    for each place."""
    torch.manual_seed(0)
    head = sana_sprint.Head(torch.zeros(1, *shape)).eval()
    for p in head.parameters():
        p.data += 0.3 * torch.randn_like(p)
    first, norm_1, _, second, norm_2, _ = [*head.first, *head.second]
    for layer in (first, second, head.last):  # each matrix has norm 1 after enough iterations
        layer.train()
        for _ in range(300):
            weight = layer.weight
        layer.eval()
        assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)

    def apply(layer, h):
        if len(shape) == 1:
            return F.linear(h, layer.weight, layer.bias)
        return F.conv2d(h, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)

    def activate(layer, norm, h):
        h = F.group_norm(apply(layer, h), 4 if len(shape) > 1 else 2, norm.weight, norm.bias)
        return torch.where(h > 0, h, 0.2 * h)

    x = torch.randn(3, *shape)
    h = activate(first, norm_1, x)
    h = (h + activate(second, norm_2, h)) / math.sqrt(2)
    assert torch.allclose(head(x), apply(head.last, h).flatten(1), atol=1e-5)
    if len(shape) > 1:
        widths = [layer.weight.shape[-1] for layer in (first, second, head.last)]
        assert widths == [1, 3, 1]


def test_eq10_spectral_norm_of_a_head_is_updated_in_train_mode_only():
    head = sana_sprint.Head(torch.zeros(1, 32, 4, 4))
    before = {name: buffer.clone() for name, buffer in head.named_buffers()}
    head.eval()(torch.randn(3, 32, 4, 4))
    assert before
    assert all(torch.equal(before[name], buffer) for name, buffer in head.named_buffers())
    head.train()(torch.randn(3, 32, 4, 4))
    assert any(not torch.equal(before[name], buffer) for name, buffer in head.named_buffers())


# ---- (9), (13) and the loop: who is trained when, by what, at which times ------------------------


@pytest.fixture
def trace(monkeypatch, tmp_path):
    """trace(*flags): a run on toy-cond, with heads and log_var among its networks. r of (6) is 1
    after the first iteration, unless flags say more."""

    def parts(steps):
        heads = steps.calls["Heads"][0].result
        return dict(heads=heads, log_var=steps.calls["ScalarEmbedding"][0].result)

    def run(*flags, record=()):
        made = [(sana_sprint, "Heads"), (sana_sprint, "ScalarEmbedding")]
        record = [*made, *((sana_sprint, name) for name in record)]
        out = tmp_path / "out"
        flags = ["--H", 0, "--warmup", 0, *flags]
        return Trace(monkeypatch, sana_sprint, out, *flags, record=record, watch=parts)

    return run


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--adaptive-weight clamped",
        "--adv-weight 0 --adaptive-weight full",
        "--cfg-train 1 1.5 2 --cfg 1.5",
        "--cfg 1.5 --nfe 4 --ema 1000",
    ],
)
def test_gradient_routing(trace, flags):
    """Every weight of the network whose turn it is gets a gradient and moves; no other does."""
    steps = trace("--iters", 3, *flags.split())
    turns = ["student"] if "--adv-weight 0" in flags else ["student", "heads"]
    assert [step.role for step in steps] == turns * 3
    for step in steps:
        trained = [step.role]
        if step.role == "student" and "--adaptive-weight" in flags:
            trained.append("log_var")
        for name, grads in step.grads.items():
            found = [g is not None for g in grads]
            assert found == [name in trained] * len(grads), (step.role, name)
        for name in step.before:
            assert step.moved(name) == (name in trained), (step.role, name)
    for a, b in zip(steps, steps[1:]):  # nothing moves between the steps
        for name in a.after:
            assert torch.equal(a.after[name], b.before[name])
    assert all(p.requires_grad for p in steps.student.parameters())
    assert not any(p.requires_grad for p in steps.teacher.parameters())
    assert steps.ema.images == 48  # the average moves with the student


def test_eq01_times_stay_below_pure_noise(trace, monkeypatch):
    """pi/2 is for (9) only: tan t would change its sign. Here all are pushed to the noisy end."""
    monkeypatch.setattr(sana_sprint, "time_range", lambda *args: (1e-3, HALF_PI))
    steps = trace("--iters", 2, "--p-scm", 30, 1, record=["teacher_derivative"])
    calls = steps.calls["teacher_derivative"]
    assert len(calls) == 2
    assert all(call.args[2].max() <= HALF_PI - 1e-4 for call in calls)


def times_of_fakes(steps):
    """t of (9), [B] for each. `clean` runs five times an iteration: for teacher, derivative and F
    of the student, and for the fakes of both turns."""
    calls = steps.calls["clean"]
    assert len(calls) % 5 == 0
    return [call.args[2] for i, call in enumerate(calls) if i % 5 >= 3]


@pytest.mark.parametrize("p, tolerance", [(0, 0.05), (0.5, 0.25), (1, 0.05)])
def test_eq09_share_of_one_step_samples(trace, p, tolerance):
    steps = trace("--iters", 4, "--batch", 64, "--max-time", p, record=["clean"])
    high = sana_sprint.time_range(steps.teacher.schedule, 0.7122)[1]
    found = times_of_fakes(steps)
    assert len(found) == 8
    for t in found:
        assert (t == high).double().mean().item() == pytest.approx(p, abs=tolerance)


@pytest.mark.parametrize("iters, h, expected", [(6, 4, [0, 0.25, 0.5, 0.75, 1, 1]), (2, 0, [0, 1])])
def test_eq06_r_rises_over_h_iterations(trace, iters, h, expected):
    steps = trace("--iters", iters, "--H", h, record=["tangent"])
    assert [call.args[5].max().item() for call in steps.calls["tangent"]] == expected


def test_anchor(trace):
    """No cleaner times than it in (1) and (9); at it r = 0: the student is held to the teacher."""
    flags = ["--H", 2, "--anchor", 0.4, "--batch", 64, "--max-time", 0]
    steps = trace("--iters", 4, *flags, record=["tangent", "clean"])
    assert min(t.min() for t in times_of_fakes(steps)) == 0.4
    for call, expected in zip(steps.calls["tangent"], (0, 0.5, 1, 1), strict=True):
        t, r = call.args[3], call.args[5]
        held = t == 0.4
        assert t.min() == 0.4
        assert 0.05 < held.double().mean() < 0.7
        assert set(r[held].tolist()) == {0}
        assert set(r[~held].tolist()) == {expected}


def test_without_an_anchor_there_are_cleaner_times(trace):
    (call,) = trace("--iters", 1, "--batch", 64, record=["tangent"]).calls["tangent"]
    assert call.args[3].min() < 0.1


@pytest.mark.parametrize(
    "mode, lv", [("full", -math.log(2)), ("clamped", -math.log(2)), ("off", 0)]
)
def test_eq08_lv_starts_at_its_end(trace, mode, lv):
    """At -ln D for D numbers a sample: the mean square of a normalised tangent. From 0 it needs
    hundreds of iterations, in which sCM is D times weaker beside the GAN."""
    steps = trace("--iters", 1, "--adaptive-weight", mode)
    assert steps.logs[0]["lv"] == pytest.approx(lv, abs=1e-6)


def test_why_mnist_has_an_anchor():
    """Near t = 0 the mnist teacher misses noise in an empty background, from 0.2 on it sees all of
    it. Its ODE, followed to the end, leaves grain."""
    teacher, rho = load_teacher("mnist"), 0.617
    y = torch.full((20, 1, 28, 28), -1 / rho)
    y[:, :, 6:22, 13:15] = 1 / rho  # a stroke
    eps = torch.randn(20, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    cond = teacher.encode(torch.arange(20) % 10)
    background = torch.ones(28, 28, dtype=torch.bool)
    background[:, 7:21] = False

    def share_seen(t):
        t = full(t, 20)
        with torch.no_grad():
            f = sana_sprint.velocity(teacher, sana_sprint.noisy(y, t, eps), t, cond, rho)
        f, e = f[:, 0, background], eps[:, 0, background]
        return float((f * e).mean() / e.square().mean() / t[0].cos())

    assert share_seen(0.01) < 0.4
    assert share_seen(0.02) < 0.6
    assert share_seen(sana_sprint.PRESETS["mnist"]["anchor"]) == pytest.approx(1, abs=0.03)


def test_eq04_scales_are_drawn_for_each_sample(trace):
    flags = ["--cfg-train", 1, 1.5, 2, "--cfg", 1.5]
    steps = trace("--iters", 3, *flags, record=["teacher_derivative"])
    for call in steps.calls["teacher_derivative"]:
        assert set(call.args[5].tolist()) == {1, 1.5, 2}
    assert "guidance" in steps.student.extras


def test_eq04_scale_one_takes_one_pass(trace):
    steps = trace("--iters", 1, record=["teacher_derivative"])
    assert steps.calls["teacher_derivative"][0].args[5] is None
    assert len(steps.student.extras) == 0


def test_eq13_no_gradient_where_student_and_teacher_agree(trace, monkeypatch):
    """At r = 0 and F = F_pre, from the network instead of the mixture. lv has a gradient."""
    load = sana_sprint.load_teacher

    def load_network(*args, **kwargs):
        teacher = load(*args, **kwargs)
        teacher.exact = False
        return teacher

    monkeypatch.setattr(sana_sprint, "load_teacher", load_network)
    steps = trace("--iters", 1, "--adv-weight", 0, "--adaptive-weight", "full")
    assert steps.logs[0]["gap"] == 0
    assert steps.logs[0]["tangent"] == 0
    assert flat(steps[0].grads["student"]).abs().max() == 0
    assert flat(steps[0].grads["log_var"]).abs().max() > 0


def test_random_times_do_not_depend_on_the_number_of_processes():
    whole, half = BatchRandom(0, 3, 16), BatchRandom(0, 3, 16, rank=1, world=2)
    t = sana_sprint.random_times(whole.randn(), 0, 1, 0.01, 1.5)
    assert torch.equal(t[8:], sana_sprint.random_times(half.randn(), 0, 1, 0.01, 1.5))


def test_gradients_are_averaged_over_processes(trace, monkeypatch):
    """In both turns, and all that the optimiser steps; there is no DDP here."""
    averaged = []

    def record(run, params):
        averaged.append(sum(p.numel() for p in params))

    monkeypatch.setattr(Run, "average_gradients", record)
    steps = trace("--iters", 1)
    count = lambda name: steps.networks()[name].parameters()
    sizes = {name: sum(p.numel() for p in count(name)) for name in ("student", "log_var", "heads")}
    assert averaged == [sizes["student"] + sizes["log_var"], sizes["heads"]]


# ---- whole iterations by hand --------------------------------------------------------------------


@pytest.fixture
def awake(monkeypatch):
    """Students, their input for w, adapters and lv differ from their start from the first iteration
    on: what starts at zero would hide how it enters."""
    train, embed = Run.train, sana_sprint.ScalarEmbedding
    given = []

    def awake_embedding(width):
        """lv of (8): below and above its lower bound, at different times."""
        made = byhand.wake(embed(width))
        made.layers[2].bias.data -= 2.0
        return made

    def train_awake(run, net, **kwargs):
        given.append(kwargs)
        return train(run, byhand.wake(net), **kwargs)

    monkeypatch.setattr(Run, "train", train_awake)
    monkeypatch.setattr(sana_sprint, "ScalarEmbedding", awake_embedding)
    return given


@dataclasses.dataclass
class Method:
    """What the flags of a run say, for the equations."""

    scales: tuple = (1.0,)
    p_scm: tuple = (-0.4, 1.4)
    p_adv: tuple = (-0.6, 1.0)
    H: int = 0
    anchor: float = 0.0
    weight: str = "off"
    w_gan: float = 0.5
    p_end: float = 0.5
    rho: float = 0.7122  # of the toy's 2000 first points
    range: tuple = (math.atan(0.01 / 0.7122), math.atan(20 / 0.7122))
    D: int = 2


class ByHand:
    """Iteration `it` of a run from (1) to (13), with the networks of its trace as they stand."""

    def __init__(self, trace, it, images, method):
        self.trace, self.it, self.images, self.method = trace, it, images, method
        self.teacher, self.student = trace.teacher, trace.student
        self.heads, self.log_var = trace.networks()["heads"], trace.networks()["log_var"]
        self.draw = BatchRandom(3, it, 16)
        self.logs = {}

    def batch(self, i):
        """y, label, w, and the student's condition with 0.1 w."""
        x, labels = self.images.batch(i, 16, 3)
        w = torch.tensor(self.method.scales)[self.draw.randint(0, len(self.method.scales))]
        cond = dict(labels=labels)
        return x / self.method.rho, cond, w, cond | dict(guidance=0.1 * w)

    def time(self, law, low, high):
        """(1)"""
        tau = law[0] + law[1] * self.draw.randn().double()
        return (tau.exp() / 0.5).atan().clamp(low, high)

    def noisy(self, y, t):
        cos = torch.where(t == math.pi / 2, 0.0, t.cos())
        return (cos[:, None] * y + t.sin()[:, None] * self.draw.randn(2)).float()  # (1)

    def clean(self, model, u, t, cond):
        cos = torch.where(t == math.pi / 2, 0.0, t.cos())
        rho = self.method.rho
        return model(rho * u, cos, rho * t.sin(), cond) / rho  # (2)

    def F(self, model, u, t, cond):
        yhat = self.clean(model, u, t, cond)
        return ((t.cos()[:, None] * u - yhat) / t.sin()[:, None]).to(u.dtype)  # (3)

    def fake(self, y, cond_w):
        at_end = self.draw.rand() < self.method.p_end
        low, high = self.method.range
        t = self.time(self.method.p_scm, max(low, self.method.anchor), high)
        t[at_end] = high
        return self.clean(self.student, self.noisy(y, t), t, cond_w)  # (9)

    def features(self, y, s, cond):
        rho = self.method.rho
        return self.teacher(rho * self.noisy(y, s), s.cos(), rho * s.sin(), cond, features=DEPTHS)

    def logits(self, maps):
        return torch.cat([head(h) for head, h in zip(self.heads, maps)], 1)  # (10)

    def student_loss(self):
        method, sd = self.method, 0.5
        y, cond, w, cond_w = self.batch(2 * self.it)
        low, high = method.range
        t = self.time(method.p_scm, max(low, method.anchor), min(high, math.pi / 2 - 1e-4))
        u = self.noisy(y, t)
        cos, sin = t.cos()[:, None], t.sin()[:, None]
        null = dict(labels=torch.full((16,), 8))
        f_c, f_e = self.F(self.teacher, u, t, cond), self.F(self.teacher, u, t, null)
        dx = (sd * (f_e + w[:, None] * (f_c - f_e))).detach()  # (4)

        at = lambda u, t: self.F(self.student, u, t, cond_w)
        direction = ((cos * sin * dx / sd).float(), t.cos() * t.sin())
        j = torch.func.jvp(at, (u, t), direction)[1].detach()  # (5)
        f = at(u, t)
        r = min(1.0, self.it / max(method.H, 1)) * (t > method.anchor)
        g = -(cos**2) * (sd * f.detach() - dx) - r[:, None] * (cos * sin * sd * u + sd * j)  # (6)
        norm = g.norm(dim=1, keepdim=True)
        g = g / (norm + 0.1)  # (7)
        square = (f - f.detach() - g).square().mean(1)
        start = -math.log(method.D)
        lv = start + self.log_var(t).mean(1) if method.weight != "off" else torch.zeros(16)
        if method.weight == "clamped":  # the same, but the weight is at most exp(2) times its start
            held = (-lv.detach().clamp(min=start - 2)).exp() * square
            loss = (held + (-lv).exp() * square.detach() + lv).mean()
        else:
            loss = ((-lv).exp() * square + lv).mean()  # (8)
        self.logs |= dict(scm=loss, lv=lv.mean(), tangent=norm.mean(), jvp=j.norm(dim=1).mean())
        self.logs |= dict(gap=(sd * f - dx).square().mean())

        if method.w_gan:
            fake = self.fake(y, cond_w)
            s = self.time(method.p_adv, low, high)
            gen = -self.logits(self.features(fake, s, cond)).mean()  # (11)
            self.logs |= dict(gen=gen)
            loss = loss + method.w_gan * gen  # (13)
        return loss

    def heads_loss(self):
        y, cond, w, cond_w = self.batch(2 * self.it + 1)
        s = self.time(self.method.p_adv, *self.method.range)
        with torch.no_grad():
            maps = self.features(self.fake(y, cond_w), s, cond), self.features(y, s, cond)
        self.heads.train()  # for one step of the power iterations of its spectral norms
        logits = self.logits([torch.cat(pair) for pair in zip(*maps)])
        self.heads.eval()
        fake, real = logits.chunk(2)
        loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2  # (12)
        self.logs |= dict(heads=loss, logit_fake=fake.mean(), logit_real=real.mean())
        return loss

    def sample(self, student, noise, cond, times):
        """The few-step sampler. cond: with 0.1 w where w is an input."""
        with torch.no_grad():
            y, times = noise(), [torch.tensor(t).double() for t in times]
            for i, t in enumerate(times):
                if i:
                    y = (t.cos() * y + t.sin() * noise()).float()
                y = self.clean(student, y, t, cond)
        return self.method.rho * y


def vp_range(rho):
    """Least and greatest time of Stable Diffusion's schedule: tan t = sigma / (rho alpha)."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    ratio = (1 / (1 - beta).cumprod(0) - 1).sqrt() / rho
    return ratio[0].atan().item(), ratio[-1].atan().item()


HIGH = math.atan(20 / 0.7122)
FLOW = dict(range=(1e-3, HALF_PI))
# flags, teacher, rho of the preset, what they mean, times of the sampler
BY_HAND = [
    ("", "edm", None, {}, [HIGH]),
    (
        "--cfg-train 1 1.5 2 --cfg 1.5 --adaptive-weight full --H 4 --nfe 2",
        "flow",
        None,
        dict(scales=(1.0, 1.5, 2.0), weight="full", H=4) | FLOW,
        [math.atan(400), 1.3],
    ),
    (
        "--cfg-train 4 5 --cfg 4.5 --adaptive-weight clamped --anchor 0.6 --p-scm 0 1.6 "
        "--p-adv -2 0.7 --adv-weight 3 --max-time 0.3 --nfe 4 --ema 3 --H 2",
        "vp",
        0.9,
        dict(
            scales=(4.0, 5.0),
            weight="clamped",
            anchor=0.6,
            p_scm=(0.0, 1.6),
            p_adv=(-2.0, 0.7),
            w_gan=3.0,
            p_end=0.3,
            H=2,
            rho=0.9,
            range=vp_range(0.9),
        ),
        [vp_range(0.9)[1], 1.3, 1.1, 0.6],
    ),
    (
        "--adv-weight 0 --cfg 3 --nfe 3 --p-scm 1 2",
        "trigflow",
        None,
        dict(scales=(3.0,), w_gan=0.0, p_scm=(1.0, 2.0)) | FLOW,
        [HALF_PI, HALF_PI * 2 / 3, HALF_PI / 3],
    ),
    (
        "--lora 4 --cfg-train 1 2 --cfg 2 --nfe 2 --steps 5,0.4",
        "edm",
        None,
        dict(scales=(1.0, 2.0)),
        [math.atan(5 / 0.7122), math.atan(0.4 / 0.7122)],
    ),
]


@pytest.mark.parametrize(
    "flags, schedule, rho, method, times", BY_HAND, ids=[case[0] for case in BY_HAND]
)
def test_whole_iterations_by_hand(trace, awake, monkeypatch, flags, schedule, rho, method, times):
    """Six iterations, (1) to (13): gradients of student, lv and heads, AdamW's updates, the
    average, the log; then the sampler of distill.json."""
    monkeypatch.setattr(sana_sprint, "load_teacher", lambda *a, **k: byhand.any_toy(schedule))
    monkeypatch.setitem(sana_sprint.PRESETS["toy-cond"], "rho", rho)
    start, seeds = {}, []
    make_heads = sana_sprint.Heads

    def heads_with_start(*args):
        seeds.append(torch.initial_seed())
        heads = make_heads(*args)
        start.update(copy.deepcopy(heads.state_dict()))
        return heads

    monkeypatch.setattr(sana_sprint, "Heads", heads_with_start)
    common = "--iters 6 --lr 3e-3 --lr-fake 2e-3 --betas 0.3 0.8 --weight-decay 0.1 --clip 0.5"
    common += " --warmup 3 --cooldown 0.5 --seed 3"
    record = ["Report", "random_times", "student_derivative"]
    steps = trace(*common.split(), *flags.split(), record=record)
    steps.networks()["heads"].load_state_dict(start)  # with the vectors of its spectral norms
    images = load_images(None, steps.teacher)
    method, logs = Method(**method), []

    def losses(it):
        hand = ByHand(steps, it, images, method)
        logs.append(hand.logs)
        return dict(student=hand.student_loss) | (
            dict(heads=hand.heads_loss) if method.w_gan else {}
        )

    optimisers = {
        role: byhand.AdamW(byhand.rates(lr, 6, warmup=3, cooldown=0.5), (0.3, 0.8), 0.1, 0.5)
        for role, lr in (("student", 3e-3), ("heads", 2e-3))
    }
    # what is new is equal on all processes; a JVP is taken of the network without DDP
    assert seeds == [3]
    assert awake == [dict(ddp=False)]
    assert not any(call.result.requires_grad for call in steps.calls["student_derivative"])
    assert steps.calls["random_times"][0].args[4] == min(method.range[1], HALF_PI - 1e-4)

    together = {} if method.weight == "off" else dict(student=["student", "log_var"])
    assert byhand.compare_iterations(steps, losses, optimisers, together=together) == 6
    report = steps.calls["Report"][0].result
    byhand.compare_logs(log(report.run.out), logs)
    assert all(("gen" in line) == bool(method.w_gan) for line in log(report.run.out))

    # the exported student, its average if it has one
    byhand.set_weights(steps, dataclasses.replace(steps[-1], before=steps[-1].after))
    halflife = report.run.args.ema
    students = [step for step in steps if step.role == "student"]
    last = byhand.average(students, halflife, 16) if halflife else students[-1].after["student"]
    exported = torch.cat([p.detach().flatten() for p in report.ema.model.parameters()])
    assert byhand.difference(exported.double(), last.double()) < 1e-6
    found, noise, cond = byhand.samples_of_record(report)
    several = len(method.scales) > 1
    assert ("guidance" in steps.student.extras) == several
    assert report.sampler["cfg"] == (report.run.args.cfg if several else None)
    if several:
        cond = cond | dict(guidance=torch.full((len(found),), 0.1 * report.run.args.cfg))
    expected = ByHand(steps, 0, images, method).sample(report.ema.model, noise, cond, times)
    assert byhand.difference(found.double(), expected.double()) < 1e-5


def test_frame(monkeypatch, tmp_path):
    show = ["scm", "gen", "heads"]
    steps = check_frame(monkeypatch, sana_sprint, tmp_path / "out", "--H", 1, show=show)
    state = steps.calls["save"][0].args[2]
    assert set(state) == {"student", "opt_g", "ema", "heads", "opt_h", "log_var"}


def test_times_of_the_sampler_are_float64():
    assert sana_sprint.sample_times(Flow(), 1.0, 2).dtype == torch.float64


# ---- --time dense --------------------------------------------------------------------------------


class Waves(nn.Module):
    """A teacher that can be adapted, as it notes."""

    dense = False

    def __init__(self, done=()):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.done = list(done)

    def copy(self):
        return Waves([*self.done, "copied"])

    def adapt(self):
        self.done.append("adapted")
        return self

    def fit_time(self):
        self.done.append("fitted")
        return self


def test_dense_time_of_a_copy():
    args = SimpleNamespace(teacher="x", lora=None)
    teacher = Waves()
    fitted = sana_sprint.with_dense_time(teacher, args)
    assert fitted.done == ["copied", "adapted", "fitted"]
    assert not fitted.weight.requires_grad
    assert teacher.done == []
    teacher.dense = True
    assert sana_sprint.with_dense_time(teacher, args) is teacher
    with pytest.raises(
        UserError,
        match="which can be fitted, or one that has dense times, as sana-sprint-teacher, found x",
    ):
        sana_sprint.with_dense_time(nn.Linear(1, 1), args)
    with pytest.raises(UserError, match="--lora"):
        sana_sprint.with_dense_time(Waves(), SimpleNamespace(teacher="x", lora=4))


def test_checkpoints_have_the_fitted_teacher(monkeypatch, tmp_path):
    fitted = []

    def fit(teacher, args):
        assert args.time == "dense"
        fitted.append(teacher.copy().requires_grad_(False))
        return fitted[0]

    monkeypatch.setattr(sana_sprint, "with_dense_time", fit)
    flags = ["--time", "dense", "--iters", 2, "--H", 1]
    steps = Trace(monkeypatch, sana_sprint, tmp_path / "out", *flags, record=[(Run, "save")])
    assert steps.calls["save"][0].args[2]["teacher"] is fitted[0]
