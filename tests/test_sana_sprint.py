"""Invariants of SANA-Sprint (arXiv 2503.09641) on closed-form Gaussians and small networks in float64, then who is trained by what in a real run."""

import math
import signal
import sys

import pytest
import torch
import torch.nn as nn
from helpers.conversions import from_x0

import sana_sprint as ss
from common.errors import UserError
from common.model import Model, ScalarEmbedding
from common.rng import BatchRandom
from common.run import Run
from common.sampling import generate, teacher_sample
from common.schedules import EDM, VP, Flow, TrigFlow, equal_snr, expand
from common.teachers.dit import DiT
from common.teachers.load import load_teacher
from common.teachers.toy import MLP, Toy

SD = 0.5


@pytest.fixture
def exact(monkeypatch):
    """Float64 all the way: times are not rounded to float32 on their way into a network."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def times(n, low=0.05, high=1.5):
    return torch.linspace(low, high, n, dtype=torch.float64)


class Gauss(nn.Module):
    """Optimal denoiser of data N(mean, std^2), or (consistency=True) the map to the end of its ODE. Any (alpha, sigma), data of deviation rho as they are."""

    def __init__(self, mean=0.0, std=1.0, consistency=False, schedule=None):
        super().__init__()
        self.mean, self.std, self.consistency, self.schedule, self.dtype = (
            mean,
            std,
            consistency,
            schedule or Flow(),
            torch.float64,
        )

    def forward(self, x_t, alpha, sigma, cond):
        a, s = expand(alpha, x_t), expand(sigma, x_t)
        var = a**2 * self.std**2 + s**2
        if self.consistency:
            return (self.mean + self.std / var.sqrt() * (x_t - a * self.mean)).to(x_t.dtype)
        return ((self.std**2 * a * x_t + s**2 * self.mean) / var).to(x_t.dtype)

    def null(self, n):
        return {}


class Native(Model):
    """A network with its own schedule and prediction, which says what Gauss knows."""

    def predict(self, x, t, cond):
        a, s = self.schedule.alpha(t), self.schedule.sigma(t)
        return from_x0(self.prediction, self.gauss(x, a, s, cond), x, a, s, self.sigma_data)


def true_velocity(u, t, mean, std, rho):
    """F of the definition: cos t E[eps | u] - sin t E[y | u], y = data / rho."""
    y = Gauss(mean / rho, std / rho)(u, t.cos(), t.sin(), {})
    eps = (u - expand(t.cos(), u) * y) / expand(t.sin(), u)
    return expand(t.cos(), u) * eps - expand(t.sin(), u) * y


def toy(**kw):
    torch.manual_seed(0)
    return (
        Toy(MLP(width=32), EDM(0.01, 20.0, 0.714), "edm", (2,), 8, sigma_data=0.714)
        .double()
        .copy()
        .double()
    )


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


def derivative(model, u, t, cond, rho, dx):
    dtype = model.dtype
    j = ss.student_derivative(model, u, t, cond, rho, dx)
    assert model.dtype == dtype and not j.requires_grad
    return j


# ---- 10.1, 10.2: any teacher in TrigFlow coordinates ----------------------------------------------------------------------------------------


def test_flow_in_trigflow_coordinates(exact):
    t = times(50, 0.01, 1.57)
    s, alpha, sigma, scale = equal_snr(Flow(), TrigFlow(1.0).alpha(t), TrigFlow(1.0).sigma(t))
    lam = 1 / (t.sin() + t.cos())
    assert (s - t.sin() * lam).abs().max() < 1e-15 and (scale - lam).abs().max() < 1e-15
    assert (lam * t.cos() - (1 - s)).abs().max() < 1e-15 and (lam * t.sin() - s).abs().max() < 1e-15
    slope = torch.func.jvp(
        lambda t: equal_snr(Flow(), t.cos(), t.sin())[0],
        (torch.tensor(0.9, dtype=torch.float64),),
        (torch.ones((), dtype=torch.float64),),
    )[1]
    assert slope.item() == pytest.approx(0.506625, abs=1e-6)


def test_short_form_of_the_flow_teacher(exact):
    """F = [(cos t - sin t) u + v] / (sin t + cos t): section 2.1."""
    net = Native(nn.Linear(1, 1), Flow(), "flow", (3,))
    net.gauss = Gauss(0.7, 1.3)
    u, t = normal(20, 3), times(20)
    s, lam = t.sin() / (t.sin() + t.cos()), 1 / (t.sin() + t.cos())
    v = net.predict(expand(lam, u) * u, s, {})
    short = (expand(t.cos() - t.sin(), u) * u + v) * expand(lam, u)
    assert (ss.velocity(net, u, t, {}, 1.0) - short).abs().max() < 1e-13


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
def test_any_teacher(schedule, prediction, rho, exact):
    net = Native(nn.Linear(1, 1), schedule, prediction, (3,), sigma_data=0.5)
    net.gauss = Gauss(0.7, 1.3)
    u, t = (
        normal(40, 3),
        times(
            40,
            max(0.05, ss.time_range(schedule, rho)[0]),
            min(1.55, ss.time_range(schedule, rho)[1]),
        ),
    )
    assert (
        ss.velocity(net, u, t, {}, rho) - true_velocity(u, t, 0.7, 1.3, rho)
    ).abs().max() < 1e-11
    if (
        prediction == "edm" and rho == net.sigma_data
    ):  # row EDM of section 2.2: F is minus the raw network
        a, s = TrigFlow(rho).alpha(t), TrigFlow(rho).sigma(t)
        raw = net.predict(u * rho / expand(t.cos(), u), s / a, {})
        assert (ss.velocity(net, u, t, {}, rho) + raw).abs().max() < 1e-11


def test_time_range():
    assert ss.time_range(VP(), 1.0) == pytest.approx(
        (0.0292, 1.5025), abs=5e-5
    )  # SD 1.5: tan t from 0.0292 to 14.615
    assert ss.time_range(Flow(), 0.6) == (1e-3, math.pi / 2)
    low, high = ss.time_range(EDM(0.01, 20.0), 0.7)
    assert math.tan(low) == pytest.approx(0.01 / 0.7) and math.tan(high) == pytest.approx(20 / 0.7)


# ---- 10.10: the teacher's own sampler, seen from here ------------------------------------------------------------------------------------------


def trig_sample(teacher, z, cond, nfe, w, rho):
    """First-order exact steps in TrigFlow coordinates over the SNR grid of metrics.teacher_sample."""
    s = teacher.schedule
    grid = (
        torch.linspace(s.t_max, 0, nfe + 1, dtype=torch.float64)[:-1]
        if s.unit_norm
        else s.grid(nfe).flip(0)
    )
    t = torch.cat(
        [torch.atan2(s.sigma(grid), rho * s.alpha(grid)), torch.zeros(1, dtype=torch.float64)]
    )
    u = (
        z * t[0].sin()
        if s.config["name"] == "edm"
        else z.double()
        if not s.unit_norm
        else z / (s.alpha(grid[0]) ** 2 + s.sigma(grid[0]) ** 2 / rho**2).sqrt() / rho
    )
    for a, b in zip(t, t[1:]):
        dx = ss.teacher_derivative(
            teacher, u.to(z.dtype), a.expand(len(z)), cond, rho, torch.full((len(z),), w)
        ).double()
        u = (a - b).cos() * u - (a - b).sin() * dx / SD
    return rho * u


@pytest.mark.parametrize(
    "name, rho", [("mnist", 0.617), ("toy-cond", 0.714), ("vp", 1.0), ("vp", 0.7)]
)
def test_teacher_sampler_in_trigflow_coordinates(name, rho):
    if name == "vp":
        teacher = Native(nn.Linear(1, 1), VP(), "eps", (3,))
        teacher.gauss, teacher.null, cond = Gauss(0.7, 1.3), lambda n: {}, {}
    else:
        teacher = load_teacher(name)
        cond = teacher.encode(torch.arange(4))
    z = normal(4, *teacher.shape)
    z, w = (z.float(), 1.5) if name == "mnist" else (z, 1.0)
    expected = teacher_sample(teacher, z, cond, 5, w)
    assert (trig_sample(teacher, z, cond, 5, w, rho) - expected).abs().max() < 1e-4


def test_exact_step():
    x0, z, t, s = normal(5), normal(5, seed=1), 1.1, 0.4
    x_t = math.cos(t) * x0 + math.sin(t) * z
    moved = math.cos(t - s) * x_t - math.sin(t - s) * (math.cos(t) * z - math.sin(t) * x0)
    assert (moved - ss.noisy(x0, torch.tensor(s), z)).abs().max() < 1e-7  # float32 time


# ---- 10.3 - 10.7: the tangent ------------------------------------------------------------------------------------------------------------------


def g_of(student, teacher, u, t, r=1.0, rho=1.0, cond={}):
    """-> unnormalised g, normalised g, F."""
    dx = ss.teacher_derivative(teacher, u, t, cond, rho, None)
    f = ss.velocity(student, u, t, cond, rho)
    g, norm = ss.tangent(f.detach(), dx, u, t, derivative(student, u, t, cond, rho, dx), r)
    return g * (expand(norm, g) + 0.1), g, f


@pytest.mark.parametrize("rho", [1.0, 0.6])
def test_no_tangent_at_the_solution(rho):
    mean, std = 0.7, 1.3
    u, t = normal(60, 4), times(60, 0.05, 1.5707)
    raw, _, _ = g_of(Gauss(mean, std, consistency=True), Gauss(mean, std), u, t, rho=rho)
    assert raw.abs().max() < 1e-13
    assert (
        g_of(Gauss(mean, std, consistency=True), Gauss(mean + 0.1, std), u, t, rho=rho)[0]
        .abs()
        .max()
        > 1e-2
    )


def test_no_tangent_at_the_teacher_before_the_warm_up():
    u, t, same = normal(60, 4), times(60), Gauss(0.7, 1.3)
    assert torch.equal(g_of(same, same, u, t, r=0.0)[1], torch.zeros_like(u))
    assert 0.3 < g_of(same, same, u, t, r=1.0)[0].abs().max() < 3


def test_tangent_of_pure_noise():
    """Data like noise: the teacher's F is 0, and F = 0 has g = -cos t sin t x_t; the solution is -tan(t / 2) u."""
    u, t, teacher = normal(30, 4), times(30), Gauss(0.0, 1.0)
    assert ss.velocity(teacher, u, t, {}, 1.0).abs().max() < 1e-14
    raw, _, _ = g_of(teacher, teacher, u, t)
    assert (raw + expand(t.cos() * t.sin(), u) * SD * u).abs().max() < 1e-14
    f = ss.velocity(Gauss(0.0, 1.0, consistency=True), u, t, {}, 1.0)
    assert (f + expand((t / 2).tan(), u) * u).abs().max() < 1e-13


def test_tangent_is_the_derivative_along_the_teachers_ode(exact):
    student, teacher, rho, h = toy(), Gauss(0.2, 0.6), 0.7, 1e-3
    u, t, cond = normal(16, 2), times(16, 0.1, 1.5), dict(labels=torch.arange(16) % 9)
    raw, _, _ = g_of(student, teacher, u, t, rho=rho, cond=cond)
    f_pre = ss.teacher_derivative(teacher, u, t, cond, rho, None) / SD
    at = lambda h: SD * ss.clean(student, u + h * f_pre, t + h, cond, rho)
    slope = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    assert (raw - expand(t.cos(), u) * slope).abs().max() < 1e-7


def case(name):
    if name == "toy":
        return toy(), 0.7
    if name == "toy told":
        model = toy().extend("guidance").double()
        for p in model.extras.parameters():
            p.data.normal_()
        return model, 0.7
    if name == "tiny dit":
        return tiny_dit(), 0.6
    if name == "vp":
        torch.manual_seed(0)
        model = Native(MLP(width=16).double(), VP(), "eps", (2,), 8)
        model.predict = lambda x, t, cond: model.net(x, 1 + t, cond["labels"])
        return model, 1.0
    return load_teacher("mnist").copy().double(), 0.617


@pytest.mark.parametrize("name", ["toy", "toy told", "tiny dit", "vp", "mnist"])
def test_jvp_equals_central_differences(name, exact):
    """Relative 1e-6 in float64; the step is small because the mnist network embeds times of 0..1000."""
    model, rho = case(name)
    n = 3
    u, t, dx = (
        normal(n, *model.shape),
        torch.tensor([0.3, 0.9, 1.45], dtype=torch.float64),
        SD * normal(n, *model.shape, seed=1),
    )
    cond = dict(labels=torch.arange(n), guidance=torch.full((n,), 0.15, dtype=torch.float64))
    cs, h = t.cos() * t.sin(), 1e-5
    with torch.no_grad():
        at = lambda h: ss.velocity(model, u + h * expand(cs, u) * dx / SD, t + h * cs, cond, rho)
        slope = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    # student_derivative switches bf16 off, here float32 stands for "no autocast"
    assert (derivative(model, u, t, cond, rho, dx) - slope).norm() < 1e-6 * slope.norm()


def test_fused_attention_has_no_derivative():
    """Why student_derivative asks for plain attention."""
    model = tiny_dit().float()
    u, t = torch.randn(2, 1, 14, 14), torch.tensor([0.5, 1.0], dtype=torch.float64)
    try:
        torch.func.jvp(lambda u: ss.velocity(model, u, t, model.null(2), 1.0), (u,), (u,))
    except NotImplementedError:
        return
    pytest.skip("this torch differentiates its fused attention forwards")


def test_gradient_is_that_of_the_discrete_consistency_loss(exact):
    """Without normalisation, lim 1/h grad 1/2 w |f(x_t, t) - sg f(x_{t-h}, t-h)|^2 with w = 1 / (sd tan t)."""
    student, teacher, rho, h = toy(), Gauss(0.2, 0.6), 0.7, 1e-5
    u, t, cond = normal(16, 2), times(16, 0.2, 1.4), dict(labels=torch.arange(16) % 9)
    raw, _, f = g_of(student, teacher, u, t, rho=rho, cond=cond)
    params = list(student.parameters())
    got = torch.autograd.grad(ss.scm_loss(f, raw) / 2 * f.numel(), params)
    f_pre = ss.teacher_derivative(teacher, u, t, cond, rho, None) / SD
    before = SD * ss.clean(student, u - h * f_pre, t - h, cond, rho).detach()
    gap = (SD * ss.clean(student, u, t, cond, rho) - before).square().sum(1)
    expected = torch.autograd.grad((gap / (SD * t.tan())).sum() / 2 / h, params)
    a, b = (torch.cat([g.flatten() for g in gs]) for gs in (got, expected))
    assert (a - b).norm() < 1e-4 * b.norm()


# ---- 10.8, 10.13: normalisation, weight, ends of the range --------------------------------------------------------------------------------------


def test_normalisation():
    u, t = normal(5, 3, 4, 4), times(5)
    f, dx = normal(5, 3, 4, 4, seed=1), normal(5, 3, 4, 4, seed=2)
    g, n = ss.tangent(f, dx, u, t, torch.zeros_like(u), 0.0)
    raw = -(expand(t.cos(), u) ** 2) * (SD * f - dx)
    assert (
        torch.allclose(n, raw.flatten(1).norm(dim=1))
        and torch.allclose(g.flatten(1).norm(dim=1), n / (n + 0.1))
        and (g.flatten(1).norm(dim=1) < 1).all()
    )
    assert torch.allclose(g * (n + 0.1).view(-1, 1, 1, 1), raw)
    # r multiplies x_t and J, and neither of them a second time with cos t sin t
    j = normal(5, 3, 4, 4, seed=3)
    g1, n1 = ss.tangent(f, dx, u, t, j, 0.25)
    assert torch.allclose(
        g1 * (n1 + 0.1).view(-1, 1, 1, 1) - raw, -0.25 * SD * (expand(t.cos() * t.sin(), u) * u + j)
    )


def test_r_of_every_sample_its_own():
    u, t, f, dx, j = normal(4, 3, 2, 2), times(4), *(normal(4, 3, 2, 2, seed=s) for s in (1, 2, 3))
    mixed, zero, one = (
        ss.tangent(f, dx, u, t, j, r)[0] for r in (torch.tensor([0.0, 1.0, 0.0, 1.0]), 0.0, 1.0)
    )
    assert (
        torch.equal(mixed[::2], zero[::2])
        and torch.equal(mixed[1::2], one[1::2])
        and not torch.equal(zero, one)
    )


def test_adaptive_weight():
    omega, a = torch.tensor([2.7], dtype=torch.float64), 0.3
    f = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    g = torch.full((1, 4), a**0.5, dtype=torch.float64)
    lv = torch.tensor([math.log(2.7 * a)], dtype=torch.float64, requires_grad=True)
    assert lv.item() == pytest.approx(-0.2107, abs=1e-4)
    loss = ss.scm_loss(f, g, lv, prior=omega)
    d_lv, d_f = torch.autograd.grad(loss, [lv, f])
    assert d_lv.abs() < 1e-12 and torch.allclose(
        d_f, -2 * g / 4 / a
    )  # omega cancels: the weight is 1 / a = 3.333
    # clamped: the same lv is learned, the student's weight ends at the floor
    d_lv, d_f = torch.autograd.grad(ss.scm_loss(f, g, lv, floor=1.0, prior=omega), [lv, f])
    assert d_lv.abs() < 1e-12 and torch.allclose(d_f, -2 * g / 4 * 2.7 * math.exp(-1))
    d_lv, d_f = torch.autograd.grad(ss.scm_loss(f, g, lv + 0.5, floor=-9.0), [lv, f])
    assert torch.allclose(d_lv, 1 - a * (-lv - 0.5).exp()) and torch.allclose(
        d_f, -2 * g / 4 * (-lv - 0.5).exp().item()
    )
    (d_f,) = torch.autograd.grad(ss.scm_loss(f, g), [f])
    assert torch.allclose(d_f, -2 * g / 4)


@pytest.mark.parametrize("name", ["toy", "tiny dit"])
@pytest.mark.parametrize("t", [1e-3, math.pi / 2 - 1e-4])
def test_finite_at_both_ends_in_float32(name, t):
    model, rho = case(name)
    model = model.float()
    u, t = torch.randn(4, *model.shape), torch.full((4,), t, dtype=torch.float64)
    f = ss.velocity(model, u, t, model.null(4), rho)
    dx = SD * f.detach()
    g, n = ss.tangent(f.detach(), dx, u, t, derivative(model, u, t, model.null(4), rho, dx), 1.0)
    ss.scm_loss(f, g).backward()
    assert (
        g.isfinite().all()
        and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        and (n < 1e3).all()
    )


def test_stop_gradients():
    teacher, student = toy(), toy()
    u, t, cond = normal(8, 2), times(8), dict(labels=torch.arange(8))
    dx = ss.teacher_derivative(teacher, u, t, cond, 0.7, torch.full((8,), 1.5))
    j = ss.student_derivative(student, u, t, cond, 0.7, dx)
    f = ss.velocity(student, u, t, cond, 0.7)
    g, _ = ss.tangent(f.detach(), dx, u, t, j, 1.0)
    assert not (dx.requires_grad or j.requires_grad or g.requires_grad)
    params = list(student.parameters())
    got = torch.autograd.grad(
        ss.scm_loss(f, ss.tangent(f, dx, u, t, j, 1.0)[0]), params, retain_graph=True
    )  # sg[g]: also where g came with a graph
    expected = torch.autograd.grad(f, params, -2 * g / g.numel())
    assert all(torch.allclose(a, b, atol=1e-15) for a, b in zip(got, expected)) and any(
        a.abs().max() > 0 for a in got
    )
    assert all(p.grad is None for p in teacher.parameters())


class Phi(nn.Module):
    """F = phi(t) u."""

    def __init__(self):
        super().__init__()
        self.net, self.dtype = (
            nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 1)).double(),
            torch.float64,
        )

    def phi(self, t):
        return self.net(torch.stack([t.sin(), t.cos()], -1))[..., 0]

    def forward(self, x, alpha, sigma, cond):
        return (
            expand(alpha, x) * x
            - expand(sigma, x) * expand(self.phi(torch.atan2(sigma, alpha)), x) * x
        )


def learn_phi(steps=400, adaptive=True):
    """Data like noise; teacher_derivative is 0 there. -> phi at 0.5, 1, 1.5, pi/2"""
    torch.manual_seed(0)
    student, teacher, lv = Phi(), Gauss(0.0, 1.0), ScalarEmbedding(32).double()
    opt = torch.optim.Adam([*student.parameters(), *lv.parameters()], lr=5e-3)
    for it in range(steps):
        opt.param_groups[0]["lr"] = 5e-3 * min(1, 2 * (1 - it / steps))
        t = ss.proposal(torch.randn(64), -0.4, 1.4, 1e-3, math.pi / 2 - 1e-4)
        u = ss.noisy(torch.randn(64, 16).double(), t, torch.randn(64, 16))
        dx = ss.teacher_derivative(teacher, u, t, {}, 1.0, None)
        f = ss.velocity(student, u, t, {}, 1.0)
        g, _ = ss.tangent(
            f.detach(),
            dx,
            u,
            t,
            ss.student_derivative(student, u, t, {}, 1.0, dx),
            min(1, 4 * it / steps),
        )
        loss = ss.scm_loss(f, g, lv(t).mean(1) if adaptive else None)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return student.phi(torch.tensor([0.5, 1.0, 1.5, math.pi / 2]).double()).tolist()


@pytest.mark.parametrize("adaptive", [True, False])
def test_training_finds_the_consistency_function(adaptive):
    assert learn_phi(adaptive=adaptive) == pytest.approx(
        [-math.tan(t / 2) for t in (0.5, 1.0, 1.5, math.pi / 2)], abs=0.06
    )


RIGHT = {name: getattr(ss, name) for name in ("student_derivative", "tangent", "velocity")}
BROKEN = {
    "sign of J": ("student_derivative", lambda *a: -RIGHT["student_derivative"](*a)),
    "J twice with cos t sin t": (
        "student_derivative",
        lambda m, u, t, *a: expand(t.cos() * t.sin(), u) * RIGHT["student_derivative"](m, u, t, *a),
    ),
    "sign of g": ("tangent", lambda *a: (lambda g, n: (-g, n))(*RIGHT["tangent"](*a))),
    "no warm-up of x_t and J": (
        "tangent",
        lambda f, dx, u, t, j, r: RIGHT["tangent"](f, dx, u, t, j, 0.0),
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_tangent_finds_something_else(what, monkeypatch):
    monkeypatch.setattr(ss, *BROKEN[what])
    assert (
        max(
            abs(p + math.tan(t / 2))
            for p, t in zip(learn_phi(100, False), (0.5, 1.0, 1.5, math.pi / 2))
        )
        > 0.2
    )


# ---- 10.9, 10.14: sampler -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(1, None), (2, None), (4, None), (3, "1.5708,0.9,0.2")])
@pytest.mark.parametrize("rho", [1.0, 0.6])
def test_sampler_of_the_solution_gives_the_data(steps, rho):
    n, seeds = 400_000, iter(range(1, 10))
    z = normal(n, 1)
    x = ss.sample(
        Gauss(0.3, 0.8, consistency=True),
        z,
        {},
        steps[0],
        lambda: normal(n, 1, seed=next(seeds)),
        steps[1],
        rho,
    )
    assert x.mean().item() == pytest.approx(0.3, abs=5e-3) and x.std().item() == pytest.approx(
        0.8, abs=3e-3
    )
    assert next(seeds) == steps[0]  # as many noises as steps between


@pytest.mark.parametrize(
    "mean, std, expected",
    [
        (-1, 1.6, (0.148, 0.634, 1.303)),
        (0, 1.6, (0.384, 1.107, 1.470)),
        (-0.6, 1, (0.384, 0.832, 1.247)),
    ],
)
def test_quantiles_of_the_proposal(mean, std, expected):
    """16, 50 and 84 %: minus one, no and one deviation."""
    assert ss.proposal(
        torch.tensor([-1.0, 0.0, 1.0]), mean, std, 1e-3, 1.57
    ).tolist() == pytest.approx(expected, abs=1e-3)


def test_published_times():
    assert ss.sample_times(1) == [math.pi / 2]
    assert ss.sample_times(2) == pytest.approx([1.56830, 1.3], abs=1e-5) and ss.sample_times(
        4
    ) == pytest.approx([1.56830, 1.3, 1.1, 0.6], abs=1e-5)
    assert (
        ss.sample_times(3) == pytest.approx([1.5708, 1.0472, 0.5236], abs=1e-4)
        and len(ss.sample_times(8)) == 8
    )
    assert ss.sample_times(2, "1.57080,1.3") == [1.5708, 1.3]
    for n, steps in (
        (2, "1.3"),
        (2, "1.1,1.3"),
        (1, "0"),
        (1, "1.6"),
        (1, "x"),
        (2, "1.3,1.3"),
        (1, ""),
    ):
        with pytest.raises(UserError, match="--steps"):
            ss.sample_times(n, steps)


def test_one_step_is_the_network_at_pure_noise():
    teacher = load_teacher("mnist")
    z = torch.randn(4, 1, 28, 28)
    cond = teacher.encode(torch.arange(4))
    assert torch.allclose(
        ss.sample(teacher, z, cond, 1, None, rho=0.617), teacher(z, 0.0, 1.0, cond), atol=1e-5
    )


def test_a_sample_does_not_depend_on_its_batch():
    student = load_teacher("toy-cond").copy().extend("guidance")
    nn.init.normal_(student.extras["guidance"].layers[2].weight)
    sampler = lambda m, z, c, noise: ss.sample(m, z, c, 2, noise, rho=0.7, cfg=1.5)
    whole = next(generate(sampler, student, 12, seed=3, batch=12))[2]
    parts = {
        i: row
        for part, _, x in generate(sampler, student, 12, seed=3, batch=5, rank=1, world=2)
        for i, row in zip(part.tolist(), x)
    }
    assert sorted(parts) == [1, 3, 5, 7, 9, 11] and all(
        torch.allclose(row, whole[i], atol=1e-5) for i, row in parts.items()
    )
    other = next(
        generate(
            lambda m, z, c, noise: ss.sample(m, z, c, 2, noise, rho=0.7, cfg=4.0),
            student,
            12,
            seed=3,
            batch=12,
        )
    )[2]
    assert (other - whole).abs().max() > 1e-2  # the student hears w


# ---- 10.11: guidance; the student at the start --------------------------------------------------------------------------------------------------


def test_guidance_commutes_with_the_view():
    teacher = load_teacher("mnist")
    u, t, cond, rho = (
        torch.randn(4, 1, 28, 28),
        times(4, 0.3, 1.5),
        teacher.encode(torch.arange(4)),
        0.617,
    )
    guided = lambda w: type(
        "G", (), dict(__call__=lambda self, x, a, s, c: teacher.guided(x, a, s, c, w))
    )()
    dx = ss.teacher_derivative(teacher, u, t, cond, rho, torch.tensor([1.0, 1.5, 2.0, 4.0]))
    for i, w in enumerate((1.0, 1.5, 2.0, 4.0)):
        assert torch.allclose(dx[i], SD * ss.velocity(guided(w), u, t, cond, rho)[i], atol=1e-5)
    assert torch.allclose(
        dx[0], ss.teacher_derivative(teacher, u, t, cond, rho, None)[0], atol=1e-6
    )


@pytest.mark.parametrize("name", ["mnist", "toy"])
def test_the_student_starts_as_the_teacher(name):
    """Bit for bit, for every w."""
    teacher = load_teacher(name)
    teacher.exact = False  # toy: the network, not the mixture
    student = teacher.copy().extend("guidance")
    u, t, cond = torch.randn(6, *teacher.shape), times(6), teacher.encode(torch.arange(6))
    given = cond | dict(guidance=0.1 * torch.tensor([1, 1.5, 2, 4, 4.5, 5]))
    assert torch.equal(
        ss.velocity(student, u, t, given, 0.6), ss.velocity(teacher, u, t, cond, 0.6)
    )


# ---- 10.12: LADD --------------------------------------------------------------------------------------------------------------------------------


def test_hinge_values_at_zero_logits():
    zero, real = torch.zeros(5, 7, requires_grad=True), torch.zeros(5, 7, requires_grad=True)
    loss = ss.heads_loss(zero, real)
    loss.backward()
    assert (
        loss.item() == 1.0 and (zero.grad > 0).all() and (real.grad < 0).all()
    )  # its descent lowers the logits of fakes
    assert ss.heads_loss(torch.full((5, 7), -1.5), torch.full((5, 7), 1.5)) == 0
    zero.grad = None
    loss = ss.gen_loss(zero)
    loss.backward()
    assert loss.item() == 0 and torch.allclose(zero.grad, torch.full((5, 7), -1 / 35))


@pytest.mark.parametrize("name", ["mnist", "toy"])
def test_the_adversarial_gradient_passes_the_frozen_teacher(name):
    teacher = load_teacher(name)
    cond, x = teacher.encode(torch.arange(4)), torch.randn(4, *teacher.shape, requires_grad=True)
    maps = teacher(x, 0.7, 0.7, cond, features=ss.DEPTHS)
    heads = nn.ModuleList(map(ss.Head, maps)).eval().requires_grad_(False)
    assert len(maps) == (4 if name == "mnist" else 2)
    out = ss.logits(heads, maps)
    assert out.shape == (4, 64 if name == "mnist" else 2)
    ss.gen_loss(out).backward()
    assert x.grad.abs().sum() > 0 and all(
        p.grad is None for p in [*teacher.parameters(), *heads.parameters()]
    )


@pytest.mark.parametrize("shape", [(160, 4, 4), (48, 1, 1), (32, 3, 5), (24,)])
def test_head(shape):
    head = ss.Head(torch.zeros(1, *shape))
    places = math.prod(shape[1:])
    h = torch.randn(3, *shape, requires_grad=True)
    out = head(h)
    assert out.shape == (3, places) and all(
        m.num_channels // m.num_groups >= 4 for m in head.modules() if isinstance(m, nn.GroupNorm)
    )
    out[0].sum().backward()
    assert h.grad[0].norm() > 1e-3 and h.grad[1:].norm() == 0
    head.eval()
    u = {k: v.clone() for k, v in head.named_buffers()}
    head(torch.randn(3, *shape))
    assert u and all(
        torch.equal(u[k], v) for k, v in head.named_buffers()
    )  # no power iteration in eval
    assert head(torch.randn(3, *shape).bfloat16()).dtype == torch.float32


# ---- a run: who is trained when, by what, at which times -----------------------------------------------------------------------------------------


class Trace(list):
    """main() in this process. One entry per optimiser step: role, gradients, weights before and after. Times and calls beside it."""

    def __init__(self, monkeypatch, tmp_path, *flags):
        super().__init__()
        (
            self.made,
            self.times,
            self.fakes,
            self.rates,
            self.r,
            self.logs,
            self.batches,
            self.training,
        ) = {}, [], [], [], [], [], [], []
        step, log = Run.step, Run.log
        self.keep(monkeypatch, ss, "EMA", "ema")
        self.keep(monkeypatch, models, "load_teacher", "teacher")
        monkeypatch.setattr(Run, "step", lambda run, opt, clip: self.step(step, run, opt, clip))
        monkeypatch.setattr(
            Run,
            "log",
            lambda run, it, values: (
                self.logs.append({k: float(torch.as_tensor(v).detach()) for k, v in values.items()})
                or log(run, it, values)
            ),
        )
        self.spy(
            monkeypatch, "teacher_derivative", lambda m, u, t, c, rho, w: self.times.append((t, w))
        )
        self.spy(monkeypatch, "clean", lambda m, u, t, c, rho: self.fakes.append(t))
        self.spy(
            monkeypatch,
            "tangent",
            lambda f, dx, u, t, j, r: self.rates.append(float(r.max())) or self.r.append(r),
        )
        self.spy(
            monkeypatch,
            "heads_loss",
            lambda fake, real: self.batches.append((len(fake), len(real))),
        )
        self.spy(monkeypatch, "logits", lambda heads, maps: self.training.append(heads.training))
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
        monkeypatch.setattr(sys, "argv", ["sana_sprint.py", *default, *map(str, flags)])
        handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            ss.main()
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
            monkeypatch.undo()

    def keep(self, monkeypatch, module, name, key):
        make = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: self.made.setdefault(key, make(*a, **k)))

    def spy(self, monkeypatch, name, note):
        right = getattr(ss, name)
        monkeypatch.setattr(ss, name, lambda *a: note(*a) and None or right(*a))

    def step(self, step, run, opt, clip):
        params = [p for group in opt.param_groups for p in group["params"]]
        student, teacher = (
            list(self.made["ema"].live.parameters()),
            list(self.made["teacher"].parameters()),
        )
        role = "student" if params[0] is student[0] else "heads"
        grads = [p.grad is not None for p in params]
        self.heads = params if role == "heads" else getattr(self, "heads", [])
        others = self.heads if role == "student" else student
        entry = dict(
            role=role,
            grads=grads,
            clean=all(p.grad is None for p in [*others, *teacher]),
            lr=opt.param_groups[0]["lr"],
            flat=torch.cat([p.grad.flatten() for p in params if p.grad is not None]).double(),
            n=len(student),
            images=self.made["ema"].images,
        )
        norm = step(run, opt, clip)
        self.append(entry)
        return norm


@pytest.fixture
def trace(monkeypatch, tmp_path):
    return lambda *flags: Trace(monkeypatch, tmp_path, *flags)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--adaptive-weight clamped --prior",
        "--adv-weight 0 --adaptive-weight full",
        "--misaligned --d-levels own",
        "--cfg-train 1 1.5 2 --cfg 1.5",
        "--cfg 1.5 --nfe 4 --ema 1000",
    ],
)
def test_gradient_routing(trace, flags):
    steps = trace("--iters", 3, *flags.split())
    adversarial = "--adv-weight 0" not in flags
    assert [s["role"] for s in steps] == (["student", "heads"] if adversarial else ["student"]) * 3
    for s in steps:
        assert s["clean"]  # nobody else, and never the teacher, has a gradient
        assert all(s["grads"][: s["n"]])  # every weight of the student, and every one of the heads
        assert s["role"] == "heads" or set(s["grads"][s["n"] :]) == {
            "--adaptive-weight" in flags
        }  # lv
    assert (
        steps.training == [False] * adversarial + [False, True] * 3 * adversarial
    )  # first the rehearsal; power iterations of spectral norm in the heads' turn only
    assert steps.batches == [((32 if "--misaligned" in flags else 16), 16)] * 3 * adversarial
    assert not any(m.training for m in steps.made["teacher"].modules() if isinstance(m, nn.Dropout))
    assert steps[-1]["images"] == (48 if adversarial else 32)  # the average moves with the student


def test_scm_times_stay_below_pure_noise(trace, monkeypatch):
    """pi/2 is for (9) only: tan t would change its sign. Here with everything pushed to the noisy end, as far as a flow teacher goes."""
    monkeypatch.setattr(ss, "time_range", lambda *a: (1e-3, math.pi / 2))
    steps = trace("--iters", 2, "--p-scm", 30, 1)
    assert all(t.max() <= math.pi / 2 - 1e-4 for t, _ in steps.times) and len(steps.times) == 2
    assert ss.proposal(torch.full((3,), 99.0), 0.0, 1.6, 1e-3, math.pi / 2 - 1e-4).tan().min() > 0


@pytest.mark.parametrize("p", [0, 0.5, 1])
def test_max_time_in_both_turns(trace, p):
    steps = trace("--iters", 4, "--batch", 64, "--max-time", p)
    high = ss.time_range(steps.made["teacher"].schedule, 0.7122)[1]
    # per iteration: clean() of teacher (exact), student's JVP, student, fake of the student's turn, fake of the heads' turn
    fakes = [t for i, t in enumerate(steps.fakes) if i % 5 >= 3]
    assert len(steps.fakes) == 20
    for t in fakes:
        assert (t == high).double().mean().item() == pytest.approx(
            p, abs=0.25 if p == 0.5 else 0.05
        )


def test_a_one_step_fake_does_not_know_its_image():
    """With p = 1, x_t' is noise: (9) at pi/2."""
    y, end, eps = normal(5, 3), torch.tensor(math.pi / 2, dtype=torch.float64), normal(5, 3, seed=1)
    assert torch.equal(ss.noisy(y, end, eps), eps)


def test_warm_up_of_the_tangent(trace):
    assert trace("--iters", 6, "--H", 4).rates == [0, 0.25, 0.5, 0.75, 1, 1] and trace(
        "--iters", 2, "--H", 0
    ).rates == [0, 1]


def test_the_anchor(trace):
    """--anchor: no cleaner times than it in (1) and (9); at it the student is held to the teacher alone."""
    steps = trace("--iters", 4, "--H", 2, "--anchor", 0.4, "--batch", 64, "--max-time", 0)
    held = [t == 0.4 for t, _ in steps.times]
    assert (
        all(t.min() == 0.4 for t, _ in steps.times)
        and min(t.min() for i, t in enumerate(steps.fakes) if i % 5 >= 3) == 0.4
    )
    assert all(0.05 < h.double().mean() < 0.7 for h in held)
    assert [set(r[h].tolist()) for r, h in zip(steps.r, held)] == [{0}] * 4 and [
        set(r[~h].tolist()) for r, h in zip(steps.r, held)
    ] == [{0}, {0.5}, {1}, {1}]
    free = trace("--iters", 1, "--H", 0, "--batch", 64)
    assert free.times[0][0].min() < 0.1 and free.r[0].shape == (64,)


def test_lv_starts_where_it_goes(trace):
    """At -ln D, D numbers per sample: the mean square of a normalised tangent. From 0 it needs hundreds of iterations, in which sCM is D times weaker beside the GAN."""
    for mode in ("full", "clamped"):
        assert trace("--iters", 1, "--adaptive-weight", mode).logs[0]["lv"] == pytest.approx(
            -math.log(2), abs=1e-6
        )
    assert trace("--iters", 1, "--adaptive-weight", "off").logs[0]["lv"] == 0


def test_why_mnist_has_an_anchor():
    """Near t = 0 the mnist teacher sees too little of the noise in an empty background, from 0.2 on all of it: its ODE, followed to the end, leaves grain."""
    teacher, rho = load_teacher("mnist"), 0.617
    y, eps, cond = (
        torch.full((20, 1, 28, 28), -1 / rho),
        torch.randn(20, 1, 28, 28, generator=torch.Generator().manual_seed(0)),
        teacher.encode(torch.arange(20) % 10),
    )
    y[:, :, 6:22, 13:15] = 1 / rho  # a stroke
    far = torch.zeros(28, 28, dtype=torch.bool)
    far[:, :7] = far[:, 21:] = True

    def seen(t):
        t = torch.full((20,), t, dtype=torch.float64)
        f = ss.velocity(teacher, ss.noisy(y, t, eps), t, cond, rho)[:, 0, far]
        e = eps[:, 0, far]
        return float((f * e).mean() / e.square().mean() / t[0].cos())

    with torch.no_grad():
        assert (
            seen(0.01) < 0.4
            and seen(0.02) < 0.6
            and seen(ss.PRESETS["mnist"]["anchor"]) == pytest.approx(1, abs=0.03)
        )


def test_guidance_scales_are_drawn_per_sample(trace):
    steps = trace("--iters", 3, "--cfg-train", 1, 1.5, 2, "--cfg", 1.5)
    assert all(set(w.tolist()) == {1, 1.5, 2} for _, w in steps.times)
    assert "guidance" in steps.made["ema"].live.extras and all(
        w is None for _, w in trace("--iters", 1).times
    )


def test_the_first_gradient_of_the_network_is_zero_where_student_and_teacher_agree(
    trace, monkeypatch
):
    """r = 0 and F = F_pre: section 10.4, in the run. lv has a gradient all the same."""
    load = load_teacher
    monkeypatch.setattr(
        models,
        "load_teacher",
        lambda *a, **kw: (lambda m: setattr(m, "exact", False) or m)(load(*a, **kw)),
    )
    steps = trace("--iters", 1, "--adv-weight", 0, "--adaptive-weight", "full")
    assert steps.logs[0]["gap"] == 0 and steps.logs[0]["tangent"] == 0
    n = sum(p.numel() for p in steps.made["ema"].live.parameters())
    assert steps[0]["flat"][:n].abs().max() == 0 and steps[0]["flat"][n:].abs().max() > 0


def test_weights_of_the_losses(trace):
    """(13) is linear in adv_weight."""
    one, two, none = (trace("--iters", 1, "--adv-weight", w)[0]["flat"] for w in (0.5, 1.0, 0))
    assert torch.allclose(two - none, 2 * (one - none), atol=1e-7) and (one - none).norm() > 1e-4


def test_draws_do_not_depend_on_the_processes():
    whole, half = BatchRandom(0, 3, 16), BatchRandom(0, 3, 16, rank=1, world=2)
    assert torch.equal(
        ss.proposal(whole.normal(), 0, 1, 0.01, 1.5)[8:],
        ss.proposal(half.normal(), 0, 1, 0.01, 1.5),
    )
