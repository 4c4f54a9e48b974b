"""Invariants of SiD (arXiv 2404.04057 and its successors): closed-form Gaussians, schedules, who gets gradients in a real run. Numbers were derived apart
from the code. Expectations over z, eps ~ N(0, 1) of polynomials of degree two are exact means over the four points (+-1, +-1)."""

import math
import signal
import sys

import pytest
import torch
import torch.nn as nn
from helpers.conversions import from_x0

import dmd2
import sid
from common import data
from common.errors import UserError
from common.rng import BatchRandom
from common.run import Run
from common.sampling import generate
from common.schedules import EDM, VP, Flow, TrigFlow, eps_from_x0, expand
from common.teachers.load import load_teacher
from common.teachers.toy import Toy

ONE = torch.ones((), dtype=torch.float64)
f64 = lambda *v: torch.tensor(v, dtype=torch.float64)
Z, EPS = f64(1, 1, -1, -1).view(4, 1), f64(1, -1, 1, -1).view(4, 1)


class Gauss(nn.Module):
    """Optimal denoiser for data N(mean, std^2 I). Counts its calls."""

    classes = 0

    def __init__(self, mean=0.0, std=1.0, schedule=None):
        super().__init__()
        self.mean, self.std, self.schedule, self.inputs = nn.Parameter(f64(mean)), std, schedule, []

    def forward(self, x_t, alpha, sigma, cond):
        self.inputs.append(x_t)
        a, s = expand(alpha, x_t), expand(sigma, x_t)
        return ((self.std**2 * a * x_t + s**2 * self.mean) / (a**2 * self.std**2 + s**2)).to(
            x_t.dtype
        )


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gaussian(theta, alpha, s=1.0, sigma=1.0, detach=False, fake_std=None):
    """E L_alpha and its derivative for data N(0, s^2), x = theta z, VE noise, w = 1; the critic is optimal for std fake_std (theta) and stands still."""
    theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    x = theta * Z
    x_t = sid.add_noise(x, ONE, sigma * ONE, EPS)
    f_phi, f_psi = (
        Gauss(0, std)(x_t, ONE, sigma * ONE, {})
        for std in (s, float(theta.detach() if fake_std is None else fake_std))
    )
    if detach:
        f_phi, f_psi = f_phi.detach(), f_psi.detach()
    loss = sid.sid_loss(x, f_phi, f_psi, f_psi, torch.ones(4, dtype=torch.float64), alpha)
    loss.backward()
    return loss.item(), theta.grad.item()


# ---- 10.1 - 10.5: value and gradient ---------------------------------------------------------------------------------------------------------


TABLE = [
    (2.0, 0.0, 0.45, 0.60),
    (2.0, 0.5, 0.225, 0.42),
    (2.0, 1.0, 0.0, 0.24),
    (2.0, 1.2, -0.09, 0.168),
    (0.5, 0.0, 0.1125, -0.15),
    (0.5, 0.5, 0.05625, -0.195),
    (0.5, 1.0, 0.0, -0.24),
    (0.5, 1.2, -0.0225, -0.258),
]


@pytest.mark.parametrize("theta, alpha, value, gradient", TABLE)
def test_gaussian_value_and_gradient(theta, alpha, value, gradient):
    loss, grad = gaussian(theta, alpha)
    assert loss == pytest.approx(value, abs=1e-14) and grad == pytest.approx(gradient, abs=1e-14)
    A, B = 1 / 2, theta**2 / (theta**2 + 1)
    assert loss == pytest.approx((1 - alpha) * (A - B) ** 2 * (theta**2 + 1), abs=1e-14)
    assert grad == pytest.approx(2 * theta * (A - B) * ((1 - alpha) * A + alpha * B - 1), abs=1e-14)


def test_monte_carlo_agrees():
    z, eps, theta = (
        normal(2_000_000, 1),
        normal(2_000_000, 1, seed=1),
        torch.tensor(2.0, dtype=torch.float64, requires_grad=True),
    )
    x_t = theta * z + eps
    loss = sid.sid_loss(
        theta * z, x_t / 2, 0.8 * x_t, 0.8 * x_t, torch.ones(len(z), dtype=torch.float64), 1.2
    )
    loss.backward()
    assert loss.item() == pytest.approx(-0.09, abs=5e-3) and theta.grad.item() == pytest.approx(
        0.168, abs=5e-3
    )


def test_half_is_the_fisher_divergence():
    """At alpha = 1/2, for any tensors; so its gradient at the optimal critic is half of the total derivative of E |f_phi - f_psi|^2."""
    x, a, b, w = *(normal(5, 3, 4, 4, seed=i) for i in range(3)), normal(5, seed=3).abs()
    halves = 0.5 * (w * ((a - x).square() - (b - x).square()).flatten(1).sum(1)).mean()
    assert sid.sid_loss(x, a, b, b, w, 0.5).item() == pytest.approx(halves.item(), rel=1e-12)
    F = lambda theta: (1 / 2 - theta**2 / (theta**2 + 1)) ** 2 * (theta**2 + 1)
    total = (F(2 + 1e-6) - F(2 - 1e-6)) / 2e-6
    assert total == pytest.approx(0.84, abs=1e-8) and 2 * gaussian(2.0, 0.5)[1] == pytest.approx(
        total, abs=1e-8
    )


@pytest.mark.parametrize(
    "theta, sigma, threshold", [(3.0, 0.1, 1.126), (3.0, 1.0, 1.25), (2.0, 0.5, 1.417)]
)
def test_where_alpha_turns_the_gradient_round(theta, sigma, threshold):
    for alpha in (0.0, 0.5, 1.0, threshold - 2e-3):
        assert (
            gaussian(theta, alpha, sigma=sigma)[1] > 0
            and gaussian(1 / theta, alpha, sigma=sigma)[1] < 0
        )  # towards theta = s
    assert gaussian(theta, threshold + 2e-3, sigma=sigma)[1] < 0


def detached_gradient(alpha, dtype=torch.float64):
    x = normal(6, 3, 4, 4).to(dtype).requires_grad_()
    a, b, w = (
        normal(6, 3, 4, 4, seed=1).to(dtype),
        normal(6, 3, 4, 4, seed=2).to(dtype),
        normal(6, seed=3).abs(),
    )
    sid.sid_loss(x, a, b, b, w, alpha).backward()
    return x.grad, -(a - b) * w.view(6, 1, 1, 1).to(dtype) / 6


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2])
def test_detached_networks_leave_the_same_gradient_for_every_alpha(alpha):
    found, expected = detached_gradient(alpha)
    assert (found - expected).abs().max() < 1e-15
    assert gaussian(2.0, alpha, detach=True)[1] == pytest.approx(
        0.60, abs=1e-14
    )  # and a correct SiD must not give it at alpha = 1


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_detached_networks_give_the_direction_of_dmd(dtype, tolerance, alpha):
    """dmd2's generator gradient, from the same sample, noise and level, into the student's weights: the same up to C H W."""
    real, fake, student = Gauss(0.3, 0.5), Gauss(-0.2, 0.7), nn.Linear(6, 6).to(dtype)
    sigma, eps, z = f64(0.1, 0.5, 2.0, 10.0), normal(4, 6, seed=1).to(dtype), normal(4, 6).to(dtype)
    ones, grads = torch.ones(4, dtype=torch.float64), []
    for method in ("dmd2", "sid"):
        x = student(z)
        if method == "dmd2":
            real.guided = lambda x_t, a, s, c, w: real(x_t, a, s, c)
            loss = dmd2.dm_loss(
                x,
                dmd2.dm_gradient(
                    x, dmd2.renoise(x.detach(), ones, sigma, eps), ones, sigma, {}, real, fake, 1.0
                )[0],
            )
        else:
            x_t = sid.add_noise(x, ones, sigma, eps)
            with torch.no_grad():
                f_phi, f_psi = real(x_t, ones, sigma, {}), fake(x_t, ones, sigma, {})
            loss = sid.sid_loss(
                x, f_phi, f_psi, f_psi, sid.sid_weight("sid_legacy", x, f_phi, ones, sigma), alpha
            )
        grads.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, student.parameters())])
        )
    assert (grads[1] - 6 * grads[0]).norm() < tolerance * grads[1].norm() and grads[0].norm() > 1e-3


# ---- 10.6 - 10.8: identities ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_no_gradient_if_critic_equals_teacher(alpha):
    teacher = load_teacher("toy-cond").copy().requires_grad_(False)
    x = (2 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0))).requires_grad_()
    cond, sigma = (
        teacher.encode(torch.arange(64) % 8),
        torch.logspace(-2, 1, 64, dtype=torch.float64),
    )
    x_t = sid.add_noise(
        x, ONE.expand(64), sigma, torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    )
    f_phi, f_psi = (
        sid.Critic(net)(x_t, ONE.expand(64), sigma, cond, 2.0)
        for net in (teacher, teacher.copy().requires_grad_(False))
    )
    loss = sid.sid_loss(
        x, f_phi, f_psi, f_psi, sid.sid_weight("sid_legacy", x, f_phi, ONE, sigma), alpha
    )
    loss.backward()
    assert loss.item() == 0 and x.grad.abs().max() < 1e-6


def test_the_form_of_alpha_one():
    x, a, b, b3, w = *(normal(5, 3, 4, 4, seed=i) for i in range(4)), normal(5, seed=4).abs()
    short = (w * ((a - b) * (b3 - x)).flatten(1).sum(1)).mean()
    assert sid.sid_loss(x, a, b, b3, w, 1.0).item() == pytest.approx(short.item(), rel=1e-13)


@pytest.mark.parametrize("form", ["flow", "vp", "v"])
def test_the_same_loss_in_velocity_and_noise(form):
    """Flow: w t^2 <v_phi - v_psi, v_psi - (eps - x)>; VP: w (s / a)^2 <e_phi - e_psi, e_psi - eps>; v-prediction: (1 / snr) of w <..., ...> (a^2 / s^2) s^2."""
    schedule, t = (Flow(), f64(0.1, 0.5, 0.9)) if form == "flow" else (VP(), f64(20, 400, 979))
    a, s = schedule.alpha(t), schedule.sigma(t)
    x, eps, f_phi, f_psi, w = *(normal(3, 8, seed=i) for i in range(4)), f64(1, 2, 3)
    x_t = sid.add_noise(x, a, s, eps)
    kind = dict(flow="flow", vp="eps", v="v")[form]
    n_phi, n_psi, n = (from_x0(kind, f, x_t, a, s) for f in (f_phi, f_psi, x))
    if kind == "eps":
        assert torch.allclose(n, eps, atol=1e-12)
    scale = s**2 / a**2 if kind == "eps" else s**2
    other = (w * scale * ((n_phi - n_psi) * (n_psi - n)).sum(1)).mean()
    assert sid.sid_loss(x, f_phi, f_psi, f_psi, w, 1.0).item() == pytest.approx(
        other.item(), rel=1e-11
    )


@pytest.mark.parametrize(
    "form, schedule, expected",
    [
        (
            "edm",
            EDM(),
            lambda f, x, x_t, a, s: (s**2 + 0.25) / (s * 0.5) ** 2 * (f - x).square().sum(1),
        ),
        (
            "vp",
            VP(),
            lambda f, x, x_t, a, s: (
                (eps_from_x0(f, x_t, a, s) - eps_from_x0(x, x_t, a, s)).square().sum(1)
            ),
        ),
        (
            "flow",
            Flow(),
            lambda f, x, x_t, a, s: (
                ((x_t - f) / s[:, None] - (x_t - x) / s[:, None]).square().sum(1)
            ),
        ),
    ],
)
def test_critic_loss_of_each_form(form, schedule, expected):
    t = f64(20, 400, 979) if form == "vp" else f64(0.1, 0.5, 0.9)
    a, s = schedule.alpha(t), schedule.sigma(t)
    x, eps, f = (normal(3, 8, seed=i) for i in range(3))
    x_t = sid.add_noise(x, a, s, eps)
    weight = sid.native_weight(dict(edm="edm", vp="eps", flow="flow")[form], a, s, 0.5)
    assert sid.fake_loss(f, x, weight).item() == pytest.approx(
        expected(f, x, x_t, a, s).mean().item(), rel=1e-12
    )
    if form == "vp":  # a v-network's loss snr / (snr + 1) |v - v*|^2 is the same
        v = (from_x0("v", f, x_t, a, s) - from_x0("v", x, x_t, a, s)).square().sum(1)
        assert (a**2 * v).mean().item() == pytest.approx(
            sid.fake_loss(f, x, weight).item(), rel=1e-12
        )


def test_critic_loss_reaches_the_critic_only():
    student, fake = Gauss(0.1, 0.5), Gauss(0.2, 0.5)
    x = student(normal(4, 6), ONE, ONE, {})
    sid.fake_loss(
        fake(sid.add_noise(x.detach(), ONE, ONE, normal(4, 6)), ONE, ONE, {}), x, torch.ones(4)
    ).backward()
    assert student.mean.grad is None and fake.mean.grad.abs() > 0


def test_weight():
    x, f_phi, f_psi = (normal(5, 3, 4, 4, seed=i) for i in range(3))
    x = x.requires_grad_()
    w = sid.sid_weight("sid_legacy", x, f_phi, ONE, ONE)
    assert torch.allclose(w, 1 / (x - f_phi).abs().mean((1, 2, 3))) and not w.requires_grad
    assert sid.sid_weight("sid_legacy", x, x, ONE, ONE).tolist() == pytest.approx([1e5] * 5)
    value = lambda c: sid.sid_loss(
        c * x,
        c * f_phi,
        c * f_psi,
        c * f_psi,
        sid.sid_weight("sid_legacy", c * x, c * f_phi, ONE, ONE),
        1.2,
    ).item()
    assert value(3.7) == pytest.approx(3.7 * value(1.0), rel=1e-12)  # not 3.7^2
    t = f64(0.2, 0.5, 0.9)
    for kind, expected in {
        "1_minus_sigma": 1 - t,
        "1_minus_sigma_squared": (1 - t) ** 2,
        "1_over_sigma": 1 / t,
        "1_over_sigma2": t**-2,
        "snr_sqrt": (1 - t) / t,
        "snr": ((1 - t) / t) ** 2,
        "none": t**0,
    }.items():
        for alpha, sigma in ((1 - t, t), ((1 - t) / t, ONE.expand(3))):  # at equal SNR the same
            assert torch.allclose(
                sid.sid_weight(kind, x[:3], f_phi, alpha, sigma), expected, rtol=1e-12
            )
    assert set(sid.WEIGHTS) == {
        "1_minus_sigma",
        "1_minus_sigma_squared",
        "1_over_sigma",
        "1_over_sigma2",
        "snr_sqrt",
        "snr",
        "none",
    }
    assert all(torch.isfinite(w(f64(0, 1))).all() for w in sid.WEIGHTS.values())


# ---- 10.9: levels -----------------------------------------------------------------------------------------------------------------------------


def levels(form, schedule, student, n=200_000, shift=1):
    flags = sid.parse_args(["--teacher", "toy", "--shift", str(shift)])
    sid.fill_in(flags, form)
    alpha, sigma = sid.draw_levels(BatchRandom(0, 0, n), schedule, flags, student)
    assert alpha.shape == sigma.shape == (n,) and sigma.dtype == torch.float64
    return alpha, sigma


def test_levels_edm():
    a, s = levels("edm", EDM(), student=False)
    assert (
        (a == 1).all()
        and s.log().mean().item() == pytest.approx(-1.2, abs=0.01)
        and s.log().std().item() == pytest.approx(1.2, abs=0.01)
    )
    s = levels("edm", EDM(), student=True)[1].sort().values
    for share, sigma in (
        (0, 0.002),
        (0.25, 0.0851),
        (0.5, 0.9654),
        (0.75, 5.839),
        (1, 24.41),
    ):  # r / 0.8
        assert s[min(int(share * len(s)), len(s) - 1)].item() == pytest.approx(sigma, rel=0.02)
    assert (
        0.002 <= s[0]
        and s[-1] < 24.42
        and (s < 2.5).double().mean().item() == pytest.approx(0.624, abs=4e-3)
    )
    assert EDM().grid(5)[3] != s[0]  # continuous, no grid
    assert len(s.unique()) > 0.99 * len(s)


@pytest.mark.parametrize("student", [False, True])
def test_levels_vp_and_flow(student):
    vp, (a, s) = VP(), levels("vp", VP(), student)
    assert s.min() == vp.sigma(20) and s.max() == vp.sigma(979)
    assert (
        (s / a)[:, None] == (vp.sigma(torch.arange(20, 30)) / vp.alpha(torch.arange(20, 30)))
    ).any(1).double().mean().item() == pytest.approx(10 / 960, rel=0.1)
    a, t = levels("flow", Flow(), student)
    assert (
        t.mean().item() == pytest.approx(0.617, abs=2e-3)
        and t.median().item() == pytest.approx(0.667, abs=3e-3)
        and torch.equal(a, 1 - t)
    )
    assert (t < 0.02).double().mean().item() == pytest.approx(0.0021, abs=4e-4) and (
        t > 0.98
    ).double().mean().item() == pytest.approx(0.0228, abs=1.5e-3)


@pytest.mark.parametrize("form, schedule", [("edm", EDM()), ("vp", VP()), ("flow", Flow())])
def test_shift_multiplies_the_noise(form, schedule):
    for student in (False, True):
        (a, s), (b, t) = (levels(form, schedule, student, 1000, shift) for shift in (1, 0.3))
        inside = s / a > 0.13  # the others end at the schedule's smallest level
        assert inside.double().mean() > 0.4 and torch.allclose(
            (t / b)[inside], 0.3 * (s / a)[inside], rtol=1e-5
        )


@pytest.mark.parametrize(
    "form, n, expected",
    [
        ("edm", 1, [2.5]),
        ("edm", 4, [2.5, 1.875, 1.25, 0.625]),
        ("vp", 1, [625]),
        ("vp", 2, [625, 312]),
        ("vp", 4, [625, 468, 312, 156]),
        ("flow", 1, [1]),
        ("flow", 2, [1, 0.5]),
        ("flow", 4, [1, 0.75, 0.5, 0.25]),
    ],
)
def test_step_levels(form, n, expected):
    schedule = dict(edm=EDM, vp=VP, flow=Flow)[form]()
    assert sid.step_levels(form, schedule, n).tolist() == expected
    assert sid.step_levels(form, schedule, n, ",".join(map(str, expected))).tolist() == expected


def test_step_levels_of_nonsense():
    for form, schedule, n, steps in (
        ("flow", Flow(), 2, "1"),
        ("flow", Flow(), 2, ".5,1"),
        ("flow", Flow(), 2, "1,0"),
        ("flow", Flow(), 1, "1.5"),
        ("flow", Flow(), 1, "nan"),
        ("edm", EDM(), 1, "x"),
        ("vp", VP(), 700, None),
    ):
        with pytest.raises(UserError, match="--nfe" if steps is None else "--steps"):
            sid.step_levels(form, schedule, n, steps)


def test_first_levels_agree_and_schedules():
    vp = VP()
    for t, ratio in ((625, 2.5017), (20, 0.138), (979, 12.97)):
        assert (vp.sigma(t) / vp.alpha(t)).item() == pytest.approx(ratio, rel=1e-3)
    for schedule, form in ((EDM(), "edm"), (vp, "vp"), (Flow(), "flow"), (TrigFlow(), "flow")):
        found, own = sid.form_of(schedule)
        assert found == form and (own is schedule) == (form == schedule.config["name"])
    assert sid.form_of(Flow(), "edm")[1].config["sigma_max"] == 80  # any form on any teacher


def test_one_step_of_the_untrained_student():
    """The init of a Gaussian teacher's student: variance .1189 of 1, far too small."""
    x = sid.sample(Gauss(0.0, 1.0, EDM()), normal(1_000_000, 1), {}, 1, None)
    assert x.var().item() == pytest.approx(0.1189, abs=1e-3)


# ---- 10.10: few steps ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fresh", "fixed", "ddim"])
@pytest.mark.parametrize("schedule", [VP(), EDM(), Flow()], ids=["vp", "edm", "flow"])
@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_training_inputs_are_the_samplers_inputs(schedule, nfe, how):
    """Bit for bit with the same noise; k calls without gradient for the input of step k, none after it."""
    noises, student, form = (
        [normal(5, 3, seed=i) for i in range(nfe)],
        Gauss(0.7, 0.6, schedule),
        schedule.config["name"],
    )
    taus, rest = sid.step_levels(form, schedule, nfe), iter(noises[1:])
    x = sid.sample(student, noises[0], {}, nfe, lambda: next(rest), renoise=how)
    inputs, student.inputs = student.inputs, []
    assert len(inputs) == nfe and not x.requires_grad
    assert torch.equal(inputs[0], schedule.sigma(taus[0]) * noises[0])
    assert torch.equal(
        x, student(inputs[-1], schedule.alpha(taus[-1]), schedule.sigma(taus[-1]), {})
    )
    for k in range(nfe):
        again, student.inputs = iter(noises), []
        x_k = sid.rollout(student, schedule, taus, k, {}, lambda: next(again), how)
        assert torch.equal(x_k, inputs[k]) and len(student.inputs) == k and not x_k.requires_grad


def test_renoise():
    """ddim is the Euler step x + (t' - t) v; fixed takes the first z; fresh another one, so that two steps forget z."""
    schedule, student, z, taus = (
        Flow(),
        Gauss(0.7, 0.6, Flow()),
        normal(4, 3),
        f64(1, 0.75, 0.5, 0.25),
    )
    run = lambda how, k: sid.rollout(
        student,
        schedule,
        taus,
        k,
        {},
        iter([z, *(normal(4, 3, seed=9 + i) for i in range(4))]).__next__,
        how,
    )
    for k in (1, 2, 3):
        before = run("ddim", k - 1)
        v = (before - student(before, 1 - taus[k - 1], taus[k - 1], {})) / taus[k - 1]
        assert torch.allclose(run("ddim", k), before + (taus[k] - taus[k - 1]) * v, atol=1e-14)
        before = run("fixed", k - 1)
        xhat = student(before, 1 - taus[k - 1], taus[k - 1], {})
        assert torch.allclose(run("fixed", k), (1 - taus[k]) * xhat + taus[k] * z, atol=1e-14)
        before = run("fresh", k - 1)
        xhat = student(before, 1 - taus[k - 1], taus[k - 1], {})
        assert torch.allclose(
            run("fresh", k), (1 - taus[k]) * xhat + taus[k] * normal(4, 3, seed=8 + k), atol=1e-14
        )


@pytest.mark.parametrize("k", range(4))
def test_gradient_through_the_last_call_only(k):
    schedule, student, taus = Flow(), Gauss(0.7, 0.6, Flow()), f64(1, 0.75, 0.5, 0.25)
    noise = lambda: iter([normal(4, 3, seed=i) for i in range(5)]).__next__
    x_k = sid.rollout(student, schedule, taus, k, {}, noise(), "fresh")
    student(x_k, 1 - taus[k], taus[k], {}).square().sum().backward()
    found, student.mean.grad = student.mean.grad, None
    student(x_k.clone(), 1 - taus[k], taus[k], {}).square().sum().backward()
    assert torch.equal(found, student.mean.grad)
    x, draws = None, noise()  # through all calls it is another one, but for the first step
    for a in taus[: k + 1]:
        x = student(draws() if x is None else (1 - a) * x + a * draws(), 1 - a, a, {})
    student.mean.grad = None
    x.square().sum().backward()
    assert (
        (found - student.mean.grad).abs() < 1e-12
        if k == 0
        else (found - student.mean.grad).abs() > 1e-3 * found.abs()
    )


@pytest.mark.parametrize("nfe", [1, 4])
def test_a_sample_does_not_depend_on_its_batch(nfe):
    student = load_teacher("toy-cond").copy()
    sampler = lambda m, z, c, noise: sid.sample(m, z, c, nfe, noise)
    whole = next(generate(sampler, student, 12, seed=3, batch=12))[2]
    parts = {
        i: row
        for part, _, x in generate(sampler, student, 12, seed=3, batch=5, rank=1, world=2)
        for i, row in zip(part.tolist(), x)
    }
    assert sorted(parts) == [1, 3, 5, 7, 9, 11] and all(
        torch.allclose(row, whole[i], atol=1e-5) for i, row in parts.items()
    )


# ---- 10.12: guidance ----------------------------------------------------------------------------------------------------------------------------


def parsed(*flags, form="flow"):
    args = sid.parse_args(["--teacher", "toy-cond", *map(str, flags)])
    return sid.fill_in(args, form), args


@pytest.mark.parametrize(
    "teacher", ["mnist", "emoji", "emoji-flow", "somewhere/emoji", "somewhere"]
)
def test_an_unguided_mixture_refuses_guidance_that_was_asked_for(teacher):
    """And not the preset's own, however the preset was found."""
    assert sid.parse_args(["--teacher", teacher, "--guidance", "zero"]).guidance == "zero"
    with pytest.raises(UserError, match="--cfg 2.25 means nothing"):
        sid.parse_args(["--teacher", teacher, "--guidance", "zero", "--cfg", "2.25"])


def test_guidance_presets():
    assert parsed("--cfg", 3)[0] == (3, 3, 3, 3) and parsed("--cfg", 3, "--guidance", "long")[
        0
    ] == (1, 1, 1, 3)
    assert parsed("--guidance", "zero")[0] == (0, 0, 0, 1)
    anti, args = parsed("--guidance", "anti")
    assert anti[3] == 1 and min(anti) < 0 and args.drop == 0.1
    assert (
        parsed("--cfg", 3, "--k2", 0.5, "--k4", 1)[0] == (3, 0.5, 3, 1)
        and parsed("--cfg", 3, "--k4", 1)[1].cfg == 1
    )
    for form, cfg, drop in (("vp", 1, 0), ("vp", 2, 0.1), ("flow", 2, 0), ("edm", 2, 0)):
        assert parsed("--cfg", cfg, form=form)[1].drop == drop


@pytest.mark.parametrize(
    "form, weight, lsg, gan, warmup",
    [
        ("edm", "sid_legacy", 100, 0.01, 100_000),
        ("vp", "sid_legacy", 1, 0.001, 100_000),
        ("flow", "1_minus_sigma", 100, 1, 20_000),
    ],
)
def test_defaults_of_each_form(form, weight, lsg, gan, warmup):
    args = parsed(form=form)[1]
    assert (args.weight, args.sid_weight, args.gan_weight, args.gan_warmup, args.form) == (
        weight,
        lsg,
        gan,
        warmup,
        form,
    )
    args = parsed("--weight", "none", "--sid-weight", 2, form=form)[1]
    assert (args.weight, args.sid_weight) == ("none", 2)


@pytest.mark.parametrize("k", [4.5, -1.0, 1.5])
def test_a_guided_critic_can_represent_any_target(k):
    """f_c = f_0 + (T - f_0) / k makes f^k = T: training through guidance is a reparametrisation."""

    class Two(Toy):
        def __init__(self):
            nn.Module.__init__(self)
            self.c, self.u, self.classes, self.extras = (
                nn.Parameter(normal(4, 2)),
                nn.Parameter(normal(4, 2, seed=1)),
                8,
                {},
            )

        device = property(lambda self: torch.device("cpu"))

        def forward(self, x_t, alpha, sigma, cond):
            return torch.where(
                cond["labels"][:, None] == 8,
                self.u.repeat(len(x_t) // 4, 1),
                self.c.repeat(len(x_t) // 4, 1),
            )

    net, target, cond = Two(), normal(4, 2, seed=2), dict(labels=torch.arange(4))
    net.c.data = net.u.data + (target - net.u.data) / k
    ask = lambda kappa: sid.Critic(net)(
        torch.zeros(4, 2, dtype=torch.float64), ONE, ONE, cond, kappa
    )
    assert torch.allclose(ask(k), target, atol=1e-13)
    assert [torch.autograd.grad(ask(0).sum(), p, allow_unused=True)[0] for p in (net.c,)][
        0
    ].abs().sum() == 0  # blind to the condition
    assert torch.autograd.grad(ask(1).sum(), net.u, allow_unused=True)[0].abs().sum() == 0


# ---- 10.13: the discriminator ------------------------------------------------------------------------------------------------------------------


def test_gan_values():
    zero = torch.zeros(4, 2, 2, dtype=torch.float64, requires_grad=True)
    w, gan_weight = 1 / f64(0.1, 0.2, 0.4, 0.8), 0.01
    loss = gan_weight * sid.adv_loss(zero, w, 192)
    loss.backward()
    assert loss.item() == pytest.approx(6.2383, abs=5e-5) and torch.allclose(
        zero.grad, torch.full_like(zero, -0.28125)
    )  # the same for every sample
    each = torch.zeros(4, 2, 2, dtype=torch.float64, requires_grad=True)
    (gan_weight * sid.adv_loss(each, w, 192, "sample")).backward()
    assert torch.allclose(
        each.grad[:, 0, 0], -192 * 0.01 * 0.5 * w / 16
    )  # SiD-DiT: each with its own w
    three = f64(0, 12, -12).requires_grad_()
    sid.adv_loss(three, torch.ones(3), 1).backward()
    assert three.grad.tolist() == pytest.approx([-1 / 6, 0, 0], abs=1e-12)
    omega = f64(1, 2, 3, 6)
    a, b = (torch.zeros(4, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = sid.cls_loss(a, b, omega)
    loss.backward()
    assert (
        loss.item() == pytest.approx(3 * math.log(2)) and (a.grad > 0).all() and (b.grad < 0).all()
    )
    assert torch.allclose(a.grad, torch.full_like(a, 3 * 0.5 * 0.5 / 16))


class Features(nn.Module):
    """A network whose last site is one convolution."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 5, 3, 2)

    def forward(self, x_t, alpha, sigma, cond, features=False):
        assert features
        return [x_t, self.layer(x_t)]


def test_logits_are_the_channel_mean_of_the_encoder():
    critic, x = (
        sid.Critic(Features()).requires_grad_(False),
        torch.randn(2, 1, 9, 9, requires_grad=True),
    )
    logit = critic(sid.add_noise(x, 0.5 * ONE, 0.5 * ONE, torch.randn(2, 1, 9, 9)), 0.5, 0.5, {})
    assert logit.shape == (2, 4, 4) and logit.dtype == torch.float32
    assert torch.equal(critic(x, 0.5, 0.5, {}), critic.fake.layer(x).mean(1))
    assert len(list(critic.parameters())) == len(list(critic.fake.parameters()))  # no new weights
    sid.adv_loss(logit, torch.ones(2), 81).backward()
    assert x.grad.abs().sum() > 0 and all(
        p.grad is None for p in critic.parameters()
    )  # a frozen critic passes the gradient on


# ---- a run: who is trained when, by which gradient ------------------------------------------------------------------------------------------------


class Trace(list):
    """main() in this process on the toy teacher. One entry per optimiser step: role, gradients, weights of the networks before and after."""

    def __init__(self, monkeypatch, tmp_path, *flags):
        super().__init__()
        self.made, self.shared = {}, []
        for module, name, key in (
            (sid, "Critic", "critic"),
            (sid, "EMA", "ema"),
            (models, "load_teacher", "teacher"),
        ):
            self.keep(monkeypatch, module, name, key)
        step, shared = Run.step, BatchRandom.shared_int
        monkeypatch.setattr(Run, "step", lambda run, opt, clip: self.step(step, run, opt, clip))
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
        ]
        monkeypatch.setattr(sys, "argv", ["sid.py", *default, *map(str, flags)])
        handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            sid.main()
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
            monkeypatch.undo()

    def keep(self, monkeypatch, module, name, key):
        make = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: self.made.setdefault(key, make(*a, **k)))

    def nets(self):
        return dict(
            student=self.made["ema"].live, critic=self.made["critic"], teacher=self.made["teacher"]
        )

    def weights(self):
        return {
            k: torch.cat([p.detach().flatten() for p in net.parameters()])
            for k, net in self.nets().items()
        }

    def step(self, step, run, opt, clip):
        params = [p for group in opt.param_groups for p in group["params"]]
        nets = self.nets()
        role = next(k for k, net in nets.items() if next(net.parameters()) is params[0])
        grads = {
            k: [None if p.grad is None else p.grad.clone() for p in net.parameters()]
            for k, net in nets.items()
        }
        before = self.weights()
        norm = step(run, opt, clip)
        self.append(
            dict(
                role=role,
                grads=grads,
                before=before,
                after=self.weights(),
                images=self.made["ema"].images,
            )
        )
        return norm

    def flat(self, i):
        return torch.cat([g.flatten() for g in self[i]["grads"][self[i]["role"]]]).double()


@pytest.fixture
def trace(monkeypatch, tmp_path):
    return lambda *flags: Trace(monkeypatch, tmp_path, *flags)


VARIANTS = [
    "",
    "--cfg 2.5",
    "--guidance zero --nfe 3",
    "--guidance anti",
    "--gan --gan-warmup 0",
    "--gan --gan-warmup 0 --nfe 2 --cfg 2 --renoise ddim",
    "--form flow --k3 0.5",
    "--form vp --cfg 2 --nfe 4 --renoise fixed",
    "--detach",
    "--alpha 0.5 --weight snr --ema 500",
]


@pytest.mark.parametrize("flags", VARIANTS)
def test_gradient_routing(trace, flags):
    steps = trace("--iters", 3, *flags.split())
    assert [s["role"] for s in steps] == ["critic", "student"] * 3  # the critic first
    for s in steps:
        for net, grads in s[
            "grads"
        ].items():  # every weight of the network whose turn it is; not one of the others
            assert [g is not None for g in grads] == [net == s["role"]] * len(grads), (
                s["role"],
                net,
            )
        assert {k for k in s["before"] if not torch.equal(s["before"][k], s["after"][k])} == {
            s["role"]
        }
    for a, b in zip(steps, steps[1:]):  # nothing moves between the steps
        assert all(torch.equal(a["after"][k], b["before"][k]) for k in a["after"])
    assert all(p.requires_grad for k in ("student", "critic") for p in steps.nets()[k].parameters())
    assert not any(p.requires_grad for p in steps.nets()["teacher"].parameters())
    nfe = int(flags.split("--nfe ")[1][0]) if "--nfe" in flags else 1
    assert steps.shared == [(0, nfe)] * 3  # one step index for both turns and the whole batch


def test_ratio_and_warmup_by_images(trace):
    roles = lambda *flags: "".join(s["role"][0] for s in trace(*flags))
    assert roles("--iters", 6, "--ratio", 3) == "cscccscc"
    assert (
        roles("--iters", 6, "--gan", "--gan-warmup", 32) == "cccscscscs"
    )  # batch 16: the student rests while fewer than 32 images were seen


def test_half_of_each_loss_after_the_warm_up(trace):
    """Before: full L_alpha, no GAN; then (L_alpha + L_adv) / 2, and the student's GAN gradient is not zero."""

    def student(*flags):
        steps = trace("--iters", 1, "--gan", "--lr-fake", 0, "--cfg", 2, "--k2", 1, *flags)
        return steps.flat(1)

    plain, both, double = (
        student("--gan-warmup", 0, "--gan-weight", 0),
        student("--gan-warmup", 0, "--gan-weight", 1),
        student("--gan-warmup", 0, "--gan-weight", 2),
    )
    assert (both - plain).norm() > 1e-3 * plain.norm() and torch.allclose(
        double - both, both - plain, atol=1e-5 * float(double.norm())
    )
    steps = trace(
        "--iters",
        3,
        "--gan",
        "--gan-warmup",
        16,
        "--lr-fake",
        0,
        "--lr",
        0,
        "--cfg",
        2,
        "--k2",
        1,
        "--gan-weight",
        0,
    )
    only = trace(
        "--iters",
        3,
        "--gan",
        "--gan-warmup",
        0,
        "--lr-fake",
        0,
        "--lr",
        0,
        "--cfg",
        2,
        "--k2",
        1,
        "--gan-weight",
        0,
    )
    students = [
        [s.flat(i) for i in range(len(s)) if s[i]["role"] == "student"] for s in (steps, only)
    ]
    assert len(students[0]) == 2 and torch.allclose(
        students[0][0], 2 * students[1][1], rtol=1e-4, atol=1e-4 * float(students[1][1].norm())
    )
    assert torch.allclose(students[0][1], students[1][2], rtol=1e-4, atol=1e-5)


def by_hand(alpha, through=True):
    """The first student gradient of a run on toy-cond, batch 16, edm form, with k = (1, 1, 1, 2) and a critic that does not move, from the paper's formulas."""
    teacher, draw = load_teacher("toy-cond"), BatchRandom(0, 0, 16)
    student, fake, s = teacher.copy(), teacher.copy().requires_grad_(False), teacher.schedule
    draw.randint(0, 8), draw.randn(2), draw.randn(), draw.randn(2)  # the critic's turn
    cond = teacher.encode(draw.randint(0, 8))
    x = student((2.5 * draw.randn(2)), 1.0, 2.5, cond)
    r = 0.8 * draw.rand()
    sigma = (20 ** (1 / 7) + (1 - r) * (0.01 ** (1 / 7) - 20 ** (1 / 7))) ** 7
    x_t = (x + sigma[:, None] * draw.randn(2)).float()
    one = torch.ones(16)
    f_phi = 2 * teacher(x_t, one, sigma, cond) - teacher(x_t, one, sigma, teacher.null(16))
    f_psi = fake(x_t, one, sigma, cond)
    if not through:
        f_phi, f_psi = f_phi.detach(), f_psi.detach()
    w = 1 / (x - f_phi).abs().mean(1).clamp(min=1e-5).detach()
    (
        100 * (w[:, None] * (f_phi - f_psi) * ((f_phi - x) - alpha * (f_phi - f_psi))).sum() / 16
    ).backward()
    return torch.cat([p.grad.flatten() for p in student.parameters()]).double()


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_first_student_gradient_by_hand(trace, alpha):
    """The gradient passes through both networks: with detached ones it is another by far."""
    flags = ["--iters", 1, "--cfg", 2, "--guidance", "long", "--lr-fake", 0, "--alpha", alpha]
    found, right, wrong = trace(*flags).flat(1), by_hand(alpha), by_hand(alpha, through=False)
    assert (found - right).norm() < 1e-5 * right.norm() and (
        wrong - right
    ).norm() > 0.01 * right.norm()
    assert (trace(*flags, "--detach").flat(1) - wrong).norm() < 1e-5 * wrong.norm()


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--gan", "--cls-weight", 3],
        ["--drop", 0.5],
        ["--nfe", 5],
        ["--nfe", 5, "--form", "flow"],
        ["--gan", "--drop", 0.5, "--k1", 1.5],
    ],
    ids=lambda f: " ".join(map(str, f)),
)
def test_the_first_critic_gradient_by_hand(trace, flags):
    """(4) and (8) written out: real and fake image share level, noise and label; labels are emptied before the student is asked;
    of five steps it takes four, with noise at the levels 2.5, 2, 1.5, 1 (flow: 1, .8, .6, .4)."""
    teacher, draw, gan, drop, flow = (
        load_teacher("toy-cond"),
        BatchRandom(0, 0, 16),
        "--gan" in flags,
        "--drop" in flags,
        "flow" in flags,
    )
    student, fake = teacher.copy(), teacher.copy()
    real, labels = (
        data.load_images(None, teacher).batch(0, 16, 0) if gan else (None, draw.randint(0, 8))
    )
    if drop:
        labels = torch.where(draw.rand() < 0.5, 8, labels)
        assert 2 < (labels == 8).sum() < 14
    cond = teacher.encode(labels)
    x = torch.zeros(16, 2)
    with torch.no_grad():
        for i in range(1 + (draw.shared_randint(0, 5) if "--nfe" in flags else 0)):
            tau = (1 if flow else 2.5) * (1 - i / 5)
            keep = 1 - tau if flow else 1.0
            x = student(keep * x + tau * draw.randn(2), keep, tau, cond)
    assert i == 3 or "--nfe" not in flags
    n, eps = draw.randn().double(), draw.randn(2)
    sigma = (math.log(2) + 1.6 * n).sigmoid() if flow else (1.2 * n - 1.2).exp()
    alpha = 1 - sigma if flow else torch.ones(16)
    noisy = lambda y: (alpha[:, None] * y + sigma[:, None] * eps).float()
    lam = sigma**-2 if flow else (sigma**2 + 0.714**2) / (sigma * 0.714) ** 2
    f = fake(noisy(x), alpha, sigma, cond)
    if "--k1" in flags:
        u = fake(noisy(x), alpha, sigma, teacher.null(16))
        f = u + 1.5 * (f - u)
    loss = (lam * (f - x).square().sum(1)).sum() / 16
    if gan:
        logit = lambda y: fake(noisy(y), alpha, sigma, cond, features=True)[-1].mean(1)
        loss = (
            loss
            + (3 if "--cls-weight" in flags else 1)
            * lam.mean()
            * (nn.functional.softplus(logit(x)) + nn.functional.softplus(-logit(real))).mean()
            / 2
        )
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in fake.parameters()]).double()
    assert (trace("--iters", 1, *flags).flat(0) - expected).norm() < 1e-5 * expected.norm()


def test_gradient_through_both_networks_by_differences():
    """d L / d x of (5) in float64 through two MLPs, against central differences of its value, w held."""
    teacher = load_teacher("toy-cond")
    phi, psi = (
        teacher.copy().double().requires_grad_(False),
        teacher.copy().double().requires_grad_(False),
    )
    with torch.no_grad():
        for i, p in enumerate(psi.parameters()):
            p += 0.05 * normal(*p.shape, seed=i)
    x, eps, sigma, cond = (
        normal(3, 2),
        normal(3, 2, seed=1),
        f64(0.3, 1.0, 3.0),
        teacher.encode(torch.arange(3)),
    )
    w = f64(1, 2, 3)

    def loss(x):
        x_t = sid.add_noise(x, ONE.expand(3), sigma, eps)
        f_psi = sid.Critic(psi)(x_t, ONE.expand(3), sigma, cond, 1.5)
        return sid.sid_loss(
            x, phi.guided(x_t, ONE.expand(3), sigma, cond, 2.0), f_psi, f_psi, w, 1.2
        )

    x.requires_grad_()
    loss(x).backward()
    for i in range(3):
        for j in range(2):
            h = torch.zeros(3, 2, dtype=torch.float64)
            h[i, j] = 1e-5
            assert x.grad[i, j].item() == pytest.approx(
                ((loss(x + h) - loss(x - h)) / 2e-5).item(), rel=1e-5, abs=1e-8
            )


# ---- the tests fail when the method is broken --------------------------------------------------------------------------------------------------


BROKEN = {
    "networks detached": (
        lambda x, a, b, b3, w, alpha: RIGHT(x, a.detach(), b.detach(), b3.detach(), w, alpha),
        lambda: test_gaussian_value_and_gradient(2.0, 1.0, 0.0, 0.24),
    ),
    "sign": (
        lambda *args: -RIGHT(*args),
        lambda: test_gaussian_value_and_gradient(2.0, 0.5, 0.225, 0.42),
    ),
    "alpha's term without its minus": (
        lambda x, a, b, b3, w, alpha: RIGHT(x, a, b, b3, w, -alpha),
        lambda: test_half_is_the_fisher_divergence(),
    ),
    "mean over pixels": (
        lambda x, *args: RIGHT(x, *args) / x[0].numel(),
        lambda: test_the_form_of_alpha_one(),
    ),
    "student's sample detached": (
        lambda x, *args: RIGHT(x.detach(), *args),
        lambda: test_gaussian_value_and_gradient(0.5, 1.0, 0.0, -0.24),
    ),
}
RIGHT = sid.sid_loss


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_loss_fails(what, monkeypatch):
    wrong, check = BROKEN[what]
    check()
    monkeypatch.setattr(sid, "sid_loss", wrong)
    with pytest.raises(AssertionError):
        check()


def test_reversed_time_fails(monkeypatch):
    """r counted from the noisy end: the student would see nothing but large noise."""
    right = BatchRandom.uniform
    monkeypatch.setattr(BatchRandom, "uniform", lambda draw: (1 - 0.8 * right(draw)) / 0.8)
    with pytest.raises(AssertionError):
        test_levels_edm()
