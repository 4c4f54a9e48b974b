"""sid.py: its equations on closed-form Gaussians, then who is trained when in a real run.

Expected numbers were derived apart from the code.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import byhand
from helpers.conversions import from_x0
from helpers.frame import check_frame
from helpers.gaussian import Gauss, f64, normal, relative_error
from helpers.trace import Trace

import dmd2
import sid
from common.errors import UserError
from common.rng import BatchRandom
from common.sampling import generate
from common.schedules import EDM, VP, Flow, TrigFlow, add_noise, eps_from_x0
from common.teachers.load import load_teacher
from data.images import load_images

ONE = f64(1.0)
SCHEDULES = dict(edm=EDM, vp=VP, flow=Flow)

# A mean over these four points is the exact expectation over z, eps ~ N(0, 1) of a polynomial of
# degree two.
Z = f64([[1.0], [1.0], [-1.0], [-1.0]])
EPS = f64([[1.0], [-1.0], [1.0], [-1.0]])


# ---- (5): value and gradient ---------------------------------------------------------------------


def gaussian(theta, alpha, sigma=1.0, detach=False):
    """E L_sid and its derivative, for data N(0, 1), x = theta z, x_t = x + sigma eps, w = 1.

    The critic is the optimal one of x, and stands still.
    """
    real = Gauss(0.0, 1.0)
    fake = Gauss(0.0, theta)
    theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    x = theta * Z
    x_t = add_noise(x, 1.0, sigma, EPS)
    r = real(x_t, 1.0, sigma, {})
    f = fake(x_t, 1.0, sigma, {})
    if detach:
        r, f = r.detach(), f.detach()
    loss = sid.sid_loss(x, r, f, ONE.expand(4), alpha)
    loss.backward()
    return loss.item(), theta.grad.item()


@pytest.mark.parametrize(
    "theta, alpha, value, gradient",
    [
        (2.0, 0.0, 0.45, 0.60),
        (2.0, 0.5, 0.225, 0.42),
        (2.0, 1.0, 0.0, 0.24),
        (2.0, 1.2, -0.09, 0.168),
        (0.5, 0.0, 0.1125, -0.15),
        (0.5, 0.5, 0.05625, -0.195),
        (0.5, 1.0, 0.0, -0.24),
        (0.5, 1.2, -0.0225, -0.258),
    ],
)
def test_eq05_of_a_gaussian(theta, alpha, value, gradient):
    loss, grad = gaussian(theta, alpha)
    assert loss == pytest.approx(value, abs=1e-14)
    assert grad == pytest.approx(gradient, abs=1e-14)
    a = 1 / 2
    b = theta**2 / (theta**2 + 1)
    formula = 2 * theta * (a - b) * ((1 - alpha) * a + alpha * b - 1)
    assert loss == pytest.approx((1 - alpha) * (a - b) ** 2 * (theta**2 + 1), abs=1e-14)
    assert grad == pytest.approx(formula, abs=1e-14)


def test_eq05_by_monte_carlo():
    n = 2_000_000
    theta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = theta * normal(n, 1)
    x_t = x + normal(n, 1, seed=1)
    loss = sid.sid_loss(x, x_t / 2, 0.8 * x_t, ONE.expand(n), 1.2)
    loss.backward()
    assert loss.item() == pytest.approx(-0.09, abs=5e-3)
    assert theta.grad.item() == pytest.approx(0.168, abs=5e-3)


def random_estimates():
    """x, r, f [5, 3, 4, 4] and w [5]."""
    return *(normal(5, 3, 4, 4, seed=i) for i in range(3)), normal(5, seed=3).abs()


def test_eq05_at_one_half_for_any_estimates():
    """It is half the difference of the two denoising errors."""
    x, r, f, w = random_estimates()
    errors = (r - x).square() - (f - x).square()
    halves = 0.5 * (w * errors.flatten(1).sum(1)).mean()
    assert sid.sid_loss(x, r, f, w, 0.5).item() == pytest.approx(halves.item(), rel=1e-12)


def test_eq05_at_one_half_is_the_gradient_of_the_fisher_divergence():
    """With the optimal critic, it is half of the derivative of E|r - f|^2, critic included."""

    def divergence(theta):
        gap = 1 / 2 - theta**2 / (theta**2 + 1)
        return gap**2 * (theta**2 + 1)

    slope = (divergence(2 + 1e-6) - divergence(2 - 1e-6)) / 2e-6
    assert slope == pytest.approx(0.84, abs=1e-8)
    assert 2 * gaussian(2.0, 0.5)[1] == pytest.approx(slope, abs=1e-8)


def test_eq05_at_one_for_any_estimates():
    x, r, f, w = random_estimates()
    short = (w * ((r - f) * (f - x)).flatten(1).sum(1)).mean()
    assert sid.sid_loss(x, r, f, w, 1.0).item() == pytest.approx(short.item(), rel=1e-13)


@pytest.mark.parametrize(
    "theta, sigma, threshold", [(3.0, 0.1, 1.126), (3.0, 1.0, 1.25), (2.0, 0.5, 1.417)]
)
def test_eq05_largest_alpha_with_the_right_direction(theta, sigma, threshold):
    """Descent moves the width theta towards the data's, 1, up to a threshold of alpha."""
    for alpha in (0.0, 0.5, 1.0, threshold - 2e-3):
        assert gaussian(theta, alpha, sigma=sigma)[1] > 0
        assert gaussian(1 / theta, alpha, sigma=sigma)[1] < 0
    assert gaussian(theta, threshold + 2e-3, sigma=sigma)[1] < 0


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2])
def test_eq05_with_detached_networks_does_not_depend_on_alpha(alpha):
    """The gradient is -(r - f) w for every alpha: 0.60 for the Gaussian, not 0.24 as it should."""
    x, r, f, w = random_estimates()
    x.requires_grad_()
    sid.sid_loss(x, r, f, w, alpha).backward()
    expected = -(r - f) * w.view(5, 1, 1, 1) / 5
    assert (x.grad - expected).abs().max() < 1e-15
    assert gaussian(2.0, alpha, detach=True)[1] == pytest.approx(0.60, abs=1e-14)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_eq05_with_detached_networks_has_the_direction_of_dmd(dtype, tolerance, alpha):
    """dmd2's gradient of the student's weights, from the same x, noise and level, times C H W."""
    real, fake = Gauss(0.3, 0.5), Gauss(-0.2, 0.7)
    student = nn.Linear(6, 6).to(dtype)
    levels = (ONE.expand(4), f64(0.1, 0.5, 2.0, 10.0))
    x = student(normal(4, 6).to(dtype))
    x_t = add_noise(x.detach(), *levels, normal(4, 6, seed=1).to(dtype))

    g, r, f, _ = dmd2.dm_gradient(x, x_t, *levels, {}, real, fake, 1.0)
    dmd = torch.autograd.grad(dmd2.dm_loss(x, g), student.parameters(), retain_graph=True)
    w = sid.sid_weight("sid_legacy", x, r, *levels)
    found = torch.autograd.grad(sid.sid_loss(x, r, f, w, alpha), student.parameters())
    dmd = torch.cat([p.flatten() for p in dmd])
    found = torch.cat([p.flatten() for p in found])
    assert dmd.norm() > 1e-3
    assert relative_error(6 * dmd, found) < tolerance


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_eq05_no_gradient_if_the_critic_equals_the_teacher(alpha):
    teacher = load_teacher("toy-cond").copy().requires_grad_(False)
    critic = sid.Critic(teacher.copy().requires_grad_(False))
    x = 2 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    cond = teacher.encode(torch.arange(64) % 8)
    levels = (ONE.expand(64), torch.logspace(-2, 1, 64, dtype=torch.float64))
    x_t = add_noise(x, *levels, torch.randn(64, 2, generator=torch.Generator().manual_seed(1)))
    r = teacher.guided(x_t, *levels, cond, 2.0)
    f = critic(x_t, *levels, cond, 2.0)
    loss = sid.sid_loss(x, r, f, sid.sid_weight("sid_legacy", x, r, *levels), alpha)
    loss.backward()
    assert loss.item() == 0
    assert x.grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind, schedule", [("flow", Flow()), ("eps", VP()), ("v", VP())])
def test_eq05_in_predictions_of_the_networks(kind, schedule):
    """At alpha = 1, with network outputs n and the target n* of x: w scale <n_r - n_f, n_f - n*>.

    The scale is t^2 for velocities of a flow, (sigma / alpha)^2 for eps, sigma^2 for v.
    """
    t = f64(0.1, 0.5, 0.9) if kind == "flow" else f64(20, 400, 979)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x, eps, r, f = (normal(3, 8, seed=i) for i in range(4))
    w = f64(1, 2, 3)
    x_t = add_noise(x, alpha, sigma, eps)
    n_r, n_f, target = (from_x0(kind, x0, x_t, alpha, sigma) for x0 in (r, f, x))
    if kind == "eps":
        assert torch.allclose(target, eps, atol=1e-12)
    scale = sigma**2 / alpha**2 if kind == "eps" else sigma**2
    expected = (w * scale * ((n_r - n_f) * (n_f - target)).sum(1)).mean()
    assert sid.sid_loss(x, r, f, w, 1.0).item() == pytest.approx(expected.item(), rel=1e-11)


def test_eq05_gradient_through_both_networks_by_differences():
    """dL_sid/dx through two float64 networks with guidance, against central differences."""
    teacher = load_teacher("toy-cond")
    real = teacher.copy().double().requires_grad_(False)
    fake = teacher.copy().double().requires_grad_(False)
    with torch.no_grad():
        for i, p in enumerate(fake.parameters()):
            p += 0.05 * normal(*p.shape, seed=i)
    levels = (ONE.expand(3), f64(0.3, 1.0, 3.0))
    cond = teacher.encode(torch.arange(3))

    def loss(x):
        x_t = add_noise(x, *levels, normal(3, 2, seed=1))
        r = real.guided(x_t, *levels, cond, 2.0)
        f = sid.Critic(fake)(x_t, *levels, cond, 1.5)
        return sid.sid_loss(x, r, f, f64(1, 2, 3), 1.2)

    x = normal(3, 2).requires_grad_()
    loss(x).backward()
    for i in range(3):
        for j in range(2):
            h = torch.zeros(3, 2, dtype=torch.float64)
            h[i, j] = 1e-5
            slope = (loss(x + h) - loss(x - h)) / 2e-5
            assert x.grad[i, j].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-8)


# ---- (4), (11): the critic's loss ----------------------------------------------------------------


def edm_loss(f, x, x_t, alpha, sigma):
    return (sigma**2 + 0.25) / (sigma * 0.5) ** 2 * (f - x).square().sum(1)


def eps_loss(f, x, x_t, alpha, sigma):
    error = eps_from_x0(f, x_t, alpha, sigma) - eps_from_x0(x, x_t, alpha, sigma)
    return error.square().sum(1)


def velocity_loss(f, x, x_t, alpha, sigma):
    s = sigma[:, None]
    return ((x_t - f) / s - (x_t - x) / s).square().sum(1)


def v_loss(f, x, x_t, alpha, sigma):
    """snr / (snr + 1) |v - v*|^2, the loss of a v-prediction network, is that of eps."""
    error = from_x0("v", f, x_t, alpha, sigma) - from_x0("v", x, x_t, alpha, sigma)
    return alpha**2 * error.square().sum(1)


@pytest.mark.parametrize(
    "form, expected",
    [("edm", edm_loss), ("vp", eps_loss), ("vp", v_loss), ("flow", velocity_loss)],
)
def test_eq04_eq11_loss_of_each_form(form, expected):
    t = f64(20, 400, 979) if form == "vp" else f64(0.1, 0.5, 0.9)
    schedule = SCHEDULES[form]()
    levels = (schedule.alpha(t), schedule.sigma(t))
    x, eps, f = (normal(3, 8, seed=i) for i in range(3))
    x_t = add_noise(x, *levels, eps)
    loss = sid.fake_loss(f, x, sid.fake_weight(form, *levels, 0.5))
    assert loss.item() == pytest.approx(expected(f, x, x_t, *levels).mean().item(), rel=1e-12)


def test_eq04_reaches_the_critic_only():
    student, fake = Gauss(0.1, 0.5), Gauss(0.2, 0.5)
    x = student(normal(4, 6), ONE, ONE, {})
    x_t = add_noise(x.detach(), ONE, ONE, normal(4, 6))
    prediction = sid.Critic(fake)(x_t, ONE, ONE, {})
    sid.fake_loss(prediction, x, torch.ones(4)).backward()
    assert student.mean.grad is None
    assert fake.mean.grad.abs() > 0


# ---- (6): the weight -----------------------------------------------------------------------------


def test_eq06_has_no_gradient():
    x, r, _, _ = random_estimates()
    x.requires_grad_()
    w = sid.sid_weight("sid_legacy", x, r, ONE, ONE)
    assert torch.allclose(w, 1 / (x - r).abs().mean((1, 2, 3)))
    assert not w.requires_grad


def test_eq06_is_finite_if_the_teacher_returns_x():
    x = normal(5, 3, 4, 4)
    w = sid.sid_weight("sid_legacy", x, x, ONE, ONE)
    assert w.tolist() == pytest.approx([1e5] * 5)


def test_eq06_makes_the_loss_linear_in_the_scale_of_the_data():
    x, r, f, _ = random_estimates()

    def value(c):
        w = sid.sid_weight("sid_legacy", c * x, c * r, ONE, ONE)
        return sid.sid_loss(c * x, c * r, c * f, w, 1.2).item()

    assert value(3.7) == pytest.approx(3.7 * value(1.0), rel=1e-12)


@pytest.mark.parametrize("kind, power", [("1_minus_sigma", None), ("1_over_sigma", -1)])
def test_eq06_weights_that_depend_on_the_level(kind, power):
    """They are functions of the flow's sigma, also at the levels of another schedule."""
    t = f64(0.2, 0.5, 0.9)
    expected = 1 - t if power is None else t**power
    x = normal(3, 4)
    for alpha, sigma in ((1 - t, t), ((1 - t) / t, ONE.expand(3))):  # the same SNR
        w = sid.sid_weight(kind, x, 2 * x, alpha, sigma)
        assert torch.allclose(w, expected, rtol=1e-12)
    ends = sid.sid_weight(kind, x[:2], x[:2], f64(1, 0), f64(0, 1))
    assert torch.isfinite(ends).all()


# ---- (11): noise levels and times ----------------------------------------------------------------


def drawn(form, student_turn, n=200_000, shift=1):
    draw = BatchRandom(0, 0, n)
    alpha, sigma = sid.draw_levels(draw, form, SCHEDULES[form](), shift, student_turn)
    assert alpha.shape == sigma.shape == (n,)
    assert sigma.dtype == torch.float64
    return alpha, sigma


def test_eq11_edm_levels_of_the_critic():
    alpha, sigma = drawn("edm", student_turn=False)
    assert (alpha == 1).all()
    assert sigma.log().mean().item() == pytest.approx(-1.2, abs=0.01)
    assert sigma.log().std().item() == pytest.approx(1.2, abs=0.01)


def test_eq11_edm_levels_of_the_student():
    sigma = drawn("edm", student_turn=True)[1].sort().values
    quantiles = [(0.25, 0.0851), (0.5, 0.9654), (0.75, 5.839)]
    for share, expected in quantiles:
        assert sigma[int(share * len(sigma))].item() == pytest.approx(expected, rel=0.02)
    assert sigma[0].item() == pytest.approx(0.002, rel=0.02)
    assert sigma[-1].item() == pytest.approx(24.41, rel=0.02)
    assert 0.002 <= sigma[0]
    assert sigma[-1] < 24.42
    assert (sigma < 2.5).double().mean().item() == pytest.approx(0.624, abs=4e-3)
    assert len(sigma.unique()) > 0.99 * len(sigma)  # a continuum, not a grid


@pytest.mark.parametrize("student_turn", [False, True])
def test_eq11_vp_levels(student_turn):
    vp = VP()
    alpha, sigma = drawn("vp", student_turn)
    assert sigma.min() == vp.sigma(20)
    assert sigma.max() == vp.sigma(979)
    ten_times = torch.arange(20, 30)
    ratios = vp.sigma(ten_times) / vp.alpha(ten_times)
    among_them = ((sigma / alpha)[:, None] == ratios).any(1)
    assert among_them.double().mean().item() == pytest.approx(10 / 960, rel=0.1)


@pytest.mark.parametrize("student_turn", [False, True])
def test_eq11_flow_levels(student_turn):
    alpha, t = drawn("flow", student_turn)
    assert torch.equal(alpha, 1 - t)
    assert t.mean().item() == pytest.approx(0.617, abs=2e-3)
    assert t.median().item() == pytest.approx(0.667, abs=3e-3)
    assert (t < 0.02).double().mean().item() == pytest.approx(0.0021, abs=4e-4)
    assert (t > 0.98).double().mean().item() == pytest.approx(0.0228, abs=1.5e-3)


@pytest.mark.parametrize("form", SCHEDULES)
@pytest.mark.parametrize("student_turn", [False, True])
def test_shift_multiplies_the_noise(form, student_turn):
    alpha, sigma = drawn(form, student_turn, 1000)
    alpha_shifted, sigma_shifted = drawn(form, student_turn, 1000, shift=0.3)
    ratio = sigma / alpha
    inside = ratio > 0.13  # the others end at the schedule's smallest level
    assert inside.double().mean() > 0.4
    shifted = (sigma_shifted / alpha_shifted)[inside]
    assert torch.allclose(shifted, 0.3 * ratio[inside], rtol=1e-5)


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
def test_eq11_step_times(form, n, expected):
    schedule = SCHEDULES[form]()
    assert sid.step_times(form, schedule, n).tolist() == expected
    text = ",".join(map(str, expected))
    assert sid.step_times(form, schedule, n, text).tolist() == expected


@pytest.mark.parametrize(
    "form, n, text",
    [
        ("flow", 2, "1"),
        ("flow", 2, ".5,1"),
        ("flow", 2, ".5,.5"),
        ("flow", 2, "1,0"),
        ("flow", 1, "1.5"),
        ("flow", 1, "nan"),
        ("flow", 1, "inf"),
        ("flow", 1, ""),
        ("edm", 1, "x"),
    ],
)
def test_wrong_steps_are_refused(form, n, text):
    with pytest.raises(UserError, match="--steps"):
        sid.step_times(form, SCHEDULES[form](), n, text)


def test_more_steps_than_vp_has_times_are_refused():
    with pytest.raises(UserError, match="^--nfe 700: expected"):
        sid.step_times("vp", VP(), 700)


def test_eq11_first_levels_of_edm_and_vp_agree():
    vp = VP()
    for t, ratio in ((625, 2.5017), (20, 0.138), (979, 12.97)):
        assert (vp.sigma(t) / vp.alpha(t)).item() == pytest.approx(ratio, rel=1e-3)


@pytest.mark.parametrize("schedule", [EDM(), VP(), Flow()])
def test_form_of_a_known_schedule(schedule):
    form, same = sid.form_of(schedule)
    assert form == schedule.config["name"]
    assert same is schedule


def test_form_of_trigflow_is_flow():
    form, schedule = sid.form_of(TrigFlow())
    assert form == "flow"
    assert isinstance(schedule, Flow)


# ---- (1), (2): sampling --------------------------------------------------------------------------


def test_eq01_one_step_of_the_untrained_student():
    """A student that starts as the teacher of N(0, 1) makes samples of variance 0.1189."""
    x = sid.sample(Gauss(0.0, 1.0, EDM()), normal(1_000_000, 1), {}, 1, None)
    assert x.var().item() == pytest.approx(0.1189, abs=1e-3)


@pytest.mark.parametrize("form", SCHEDULES)
@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_eq02_training_inputs_are_the_samplers_inputs(form, nfe):
    """Bit for bit with the same noise; the input of step k costs k passes without gradient."""
    noises = [normal(5, 3, seed=i) for i in range(nfe)]
    schedule = SCHEDULES[form]()
    times = sid.step_times(form, schedule, nfe)
    student = Gauss(0.7, 0.6, schedule)
    rest = iter(noises[1:])
    x = sid.sample(student, noises[0], {}, nfe, lambda: next(rest))
    inputs = student.inputs
    assert len(inputs) == nfe
    assert not x.requires_grad
    assert torch.equal(inputs[0], schedule.sigma(times[0]) * noises[0])
    last = student(inputs[-1], schedule.alpha(times[-1]), schedule.sigma(times[-1]), {})
    assert torch.equal(x, last)

    for k in range(nfe):
        again = iter(noises[1:])
        student.inputs = []
        x_in = sid.backward_simulation(
            student, schedule, times, k, {}, noises[0], lambda: next(again)
        )
        assert torch.equal(x_in, inputs[k])
        assert len(student.inputs) == k
        assert not x_in.requires_grad


@pytest.mark.parametrize("k", [1, 2, 3])
def test_eq02_adds_fresh_noise(k):
    """The estimate of the step before, and the k-th noise at the level of step k."""
    schedule, times = Flow(), f64(1, 0.75, 0.5, 0.25)
    student = Gauss(0.7, 0.6, schedule)
    noises = [normal(4, 3, seed=i) for i in range(4)]
    before = sid.backward_simulation(
        student, schedule, times, k - 1, {}, noises[0], iter(noises[1:]).__next__
    )
    x_in = sid.backward_simulation(
        student, schedule, times, k, {}, noises[0], iter(noises[1:]).__next__
    )
    xhat = student(before, 1 - times[k - 1], times[k - 1], {})
    assert torch.allclose(x_in, (1 - times[k]) * xhat + times[k] * noises[k], atol=1e-14)


@pytest.mark.parametrize("k", range(4))
def test_eq01_gradient_of_the_last_pass_only(k):
    schedule, times = Flow(), f64(1, 0.75, 0.5, 0.25)
    student = Gauss(0.7, 0.6, schedule)
    noises = [normal(4, 3, seed=i) for i in range(4)]

    def gradient(x):
        (grad,) = torch.autograd.grad(x.square().sum(), student.mean)
        return grad

    x_in = sid.backward_simulation(
        student, schedule, times, k, {}, noises[0], iter(noises[1:]).__next__
    )
    found = gradient(student(x_in, 1 - times[k], times[k], {}))
    constant = gradient(student(x_in.clone(), 1 - times[k], times[k], {}))
    assert torch.equal(found, constant)

    x = student(noises[0], 0.0, 1.0, {})
    for t, noise in zip(times[1 : k + 1], noises[1:]):
        x = student((1 - t) * x + t * noise, 1 - t, t, {})
    through_all_passes = gradient(x)
    if k == 0:
        assert (found - through_all_passes).abs() < 1e-12
    else:
        assert (found - through_all_passes).abs() > 1e-3 * found.abs()


@pytest.mark.parametrize("nfe", [1, 4])
def test_a_sample_does_not_depend_on_its_batch(nfe):
    student = load_teacher("toy-cond").copy()
    sampler = lambda model, z, cond, noise: sid.sample(model, z, cond, nfe, noise)
    whole = next(generate(sampler, student, 12, seed=3, batch=12))[2]
    rows = {}
    for part, _, x in generate(sampler, student, 12, seed=3, batch=5, rank=1, world=2):
        rows |= dict(zip(part.tolist(), x))
    assert sorted(rows) == [1, 3, 5, 7, 9, 11]
    for i, row in rows.items():
        assert torch.allclose(row, whole[i], atol=1e-5)


def test_steps_reach_the_sampler():
    student = Gauss(0.7, 0.6, EDM())
    sid.sample(student, normal(2, 3), {}, 1, None, steps="1.25")
    assert torch.equal(student.inputs[0], 1.25 * normal(2, 3))


# ---- (3): guidance -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "guidance, kappa_real, kappa_fake", [("lsg", 3, 3), ("long", 3, 1), ("zero", 1, 0)]
)
def test_eq03_guidance_scales(guidance, kappa_real, kappa_fake):
    assert sid.guidance_scales(guidance, 3) == (kappa_real, kappa_fake)


@pytest.mark.parametrize("teacher", ["mnist", "emoji", "emoji-flow", "sdxl", "toy"])
def test_zero_guidance_refuses_a_scale(teacher):
    """A scale from the command line, but not one from the preset."""
    flags = ["--teacher", teacher, "--guidance", "zero"]
    assert sid.parse_args(flags).cfg == 1
    with pytest.raises(UserError, match="--guidance zero: expected --cfg 1.*found 2.25"):
        sid.parse_args([*flags, "--cfg", "2.25"])


class TwoOutputs(Gauss):
    """A critic that returns one constant for labels, another for the null label 0."""

    def __init__(self):
        super().__init__()
        self.c = nn.Parameter(normal(4, 2))
        self.u = nn.Parameter(normal(4, 2, seed=1))

    def forward(self, x_t, alpha, sigma, cond):
        repeats = len(x_t) // 4
        is_null = cond["labels"][:, None] == 0
        return torch.where(is_null, self.u.repeat(repeats, 1), self.c.repeat(repeats, 1))


def critic_of_two(kappa, net):
    cond = dict(labels=torch.arange(1, 5))
    return sid.Critic(net)(torch.zeros(4, 2, dtype=torch.float64), ONE, ONE, cond, kappa)


@pytest.mark.parametrize("kappa", [4.5, -1.0, 1.5])
def test_eq03_a_guided_critic_can_represent_any_target(kappa):
    """c = u + (target - u) / kappa does: training through the guidance is a reparametrisation."""
    net, target = TwoOutputs(), normal(4, 2, seed=2)
    net.c.data = net.u.data + (target - net.u.data) / kappa
    assert torch.allclose(critic_of_two(kappa, net), target, atol=1e-13)


@pytest.mark.parametrize("kappa, unused", [(0, "c"), (1, "u")])
def test_eq03_a_critic_without_guidance_has_one_output(kappa, unused):
    net = TwoOutputs()
    critic_of_two(kappa, net).sum().backward()
    grads = {name: getattr(net, name).grad for name in ("c", "u")}
    assert grads.pop(unused).abs().sum() == 0
    (used,) = grads.values()
    assert used.abs().sum() > 0


# ---- (7), (8), (9): the GAN term -----------------------------------------------------------------


class Features(nn.Module):
    """A network whose last feature map is one convolution."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 5, 3, 2)

    def forward(self, x_t, alpha, sigma, cond, features=False):
        assert features
        return [x_t, self.layer(x_t)]


def test_eq07_logits_are_the_channel_mean_of_the_features():
    critic = sid.Critic(Features())
    x = torch.randn(2, 1, 9, 9)
    logit = critic(x, 0.5, 0.5, {}, logit=True)
    assert logit.shape == (2, 4, 4)
    assert logit.dtype == torch.float32
    assert torch.equal(logit, critic.fake.layer(x).mean(1))
    assert len(list(critic.parameters())) == len(list(critic.fake.parameters()))  # no new weights


def test_eq09_gradient_passes_through_a_frozen_critic():
    critic = sid.Critic(Features()).requires_grad_(False)
    x = torch.randn(2, 1, 9, 9, requires_grad=True)
    x_t = add_noise(x, 0.5, 0.5, torch.randn(2, 1, 9, 9))
    sid.adv_loss(critic(x_t, 0.5, 0.5, {}, logit=True), torch.ones(2), 81).backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in critic.parameters())


def test_eq09_at_logit_zero():
    """Of 192 numbers a sample, with w_G = 0.01: the gradient is the same for every sample."""
    logit = torch.zeros(4, 2, 2, dtype=torch.float64, requires_grad=True)
    w = 1 / f64(0.1, 0.2, 0.4, 0.8)
    loss = 0.01 * sid.adv_loss(logit, w, 192)
    loss.backward()
    assert loss.item() == pytest.approx(6.2383, abs=5e-5)
    assert torch.allclose(logit.grad, torch.full_like(logit, -0.28125))


def test_eq09_has_no_gradient_beyond_ten():
    logit = f64(0, 12, -12).requires_grad_()
    sid.adv_loss(logit, torch.ones(3), 1).backward()
    assert logit.grad.tolist() == pytest.approx([-1 / 6, 0, 0], abs=1e-12)


def test_eq08_at_logit_zero():
    fake = torch.zeros(4, 2, 2, dtype=torch.float64, requires_grad=True)
    real = torch.zeros(4, 2, 2, dtype=torch.float64, requires_grad=True)
    loss = sid.cls_loss(fake, real, f64(1, 2, 3, 6))
    loss.backward()
    assert loss.item() == pytest.approx(3 * math.log(2))
    assert torch.allclose(fake.grad, torch.full_like(fake, 3 * 0.5 * 0.5 / 16))
    assert torch.allclose(real.grad, -fake.grad)


# ---- flags that depend on the form ---------------------------------------------------------------


def filled(form, *flags):
    args = sid.parse_args(["--teacher", "toy-cond", *map(str, flags)])
    sid.fill_in(args, form)
    return args


@pytest.mark.parametrize(
    "form, weight, scale, gan_weight, gan_warmup, drop",
    [
        ("edm", "sid_legacy", 100, 0.01, 100_000, 0),
        ("vp", "sid_legacy", 1, 0.001, 100_000, 0.1),
        ("flow", "1_minus_sigma", 100, 1, 20_000, 0),
    ],
)
def test_values_of_each_form(form, weight, scale, gan_weight, gan_warmup, drop):
    args = filled(form)
    assert args.weight == weight
    assert args.scale == scale
    assert args.gan_weight == gan_weight
    assert args.gan_warmup == gan_warmup
    assert args.drop == drop


def test_eq08_eq09_weights_are_means_over_all_processes(monkeypatch):
    """Of four processes, whose own means are 3, 5, 7 and 9."""
    monkeypatch.setattr(sid.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(sid.dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(sid.dist, "all_reduce", lambda mean: mean.add_(5 + 7 + 9))
    assert sid.batch_mean(f64(1, 5)).item() == (3 + 5 + 7 + 9) / 4


def test_flags_override_the_form():
    args = filled("edm", "--weight", "1_over_sigma", "--gan-warmup", 0, "--gan-weight", 0)
    assert args.weight == "1_over_sigma"
    assert args.gan_warmup == 0
    assert args.gan_weight == 0


@pytest.mark.parametrize("iters, ratio, last", [(10, 3, 9), (9, 3, 6), (4, 1, 3)])
def test_eq09_joins_before_the_last_student_step(iters, ratio, last):
    """That is, after twice --gan-warmup images; the last student step is in iteration `last`."""
    flags = ["--gan", "--batch", 16, "--iters", iters, "--ratio", ratio]
    assert filled("edm", *flags, "--gan-warmup", 8 * last).gan_warmup == 8 * last
    with pytest.raises(UserError, match=f"at most {16 * last}, those"):
        filled("edm", *flags, "--gan-warmup", 8 * last + 1)


def test_the_warmup_of_a_smoke_run_is_one_iteration():
    args = filled("edm", "--gan", "--smoke", "--batch", 16)
    assert args.gan_warmup == 16
    assert filled("edm", "--gan", "--smoke", "--gan-warmup", 0).gan_warmup == 0


# ---- (10) and the loop: who is trained when, by which gradient -----------------------------------


@pytest.fixture
def trace(monkeypatch, tmp_path):
    """trace(*flags, form=None): a run on toy-cond, whose form is edm if no other one is given."""

    def run(*flags, form=None, **kwargs):
        with monkeypatch.context() as patch:
            if form:
                patch.setattr(sid, "form_of", lambda schedule: (form, SCHEDULES[form]()))
            return Trace(monkeypatch, sid, tmp_path / "out", *flags, **kwargs)

    return run


VARIANTS = [
    (None, ""),
    (None, "--cfg 2.5"),
    (None, "--guidance zero --nfe 3"),
    (None, "--guidance long --cfg 2"),
    (None, "--gan --gan-warmup 0"),
    (None, "--gan --gan-warmup 0 --nfe 2 --cfg 2"),
    (None, "--alpha 0.5 --weight 1_over_sigma --ema 500"),
    ("flow", "--cfg 2"),
    ("vp", "--cfg 2 --nfe 4"),
]


@pytest.mark.parametrize("form, flags", VARIANTS)
def test_gradient_routing(trace, form, flags):
    """Every weight of the network whose turn it is gets a gradient and moves; no other does."""
    steps = trace("--iters", 3, *flags.split(), form=form)
    assert [step.role for step in steps] == ["critic", "student"] * 3
    for step in steps:
        for name, grads in step.grads.items():
            found = [g is not None for g in grads]
            assert found == [name == step.role] * len(grads), (step.role, name)
        for name in step.before:
            assert step.moved(name) == (name == step.role)
    for a, b in zip(steps, steps[1:]):  # nothing moves between the steps
        for name in a.after:
            assert torch.equal(a.after[name], b.before[name])
    assert all(p.requires_grad for p in steps.student.parameters())
    assert all(p.requires_grad for p in steps.critic.parameters())
    assert not any(p.requires_grad for p in steps.teacher.parameters())


def test_one_step_index_for_both_turns(trace):
    """Drawn once an iteration, for the whole batch and all processes."""
    steps = trace("--iters", 3, "--nfe", 4, record=[(BatchRandom, "shared_randint")])
    assert [call.args[1:] for call in steps.calls["shared_randint"]] == [(0, 4)] * 3


def roles(steps):
    return "".join(step.role[0] for step in steps)


def test_ratio(trace):
    assert roles(trace("--iters", 6, "--ratio", 3)) == "cscccscc"


def test_the_student_waits_for_gan_warmup_images(trace):
    """Two iterations of 16 images here."""
    assert roles(trace("--iters", 6, "--gan", "--gan-warmup", 32)) == "cccscscscs"


def test_the_average_moves_with_the_student(trace):
    steps = trace("--iters", 6, "--ratio", 3, "--ema", 500)
    student = [step for step in steps if step.role == "student"]
    assert [step.images for step in student] == [0, 16]
    assert steps.ema.images == 32


FROZEN = ["--gan", "--lr", 0, "--lr-fake", 0, "--cfg", 2, "--guidance", "long"]


def student_gradients(steps):
    return [step.flat_grad() for step in steps if step.role == "student"]


def test_eq10_is_linear_in_the_weight_of_the_gan_term(trace):
    def run(gan_weight):
        steps = trace("--iters", 1, *FROZEN, "--gan-warmup", 0, "--gan-weight", gan_weight)
        return student_gradients(steps)[0]

    plain, once, twice = run(0), run(1), run(2)
    tolerance = 1e-5 * float(twice.norm())
    assert (once - plain).norm() > 1e-3 * plain.norm()
    assert torch.allclose(twice - once, once - plain, atol=tolerance)


def test_eq10_halves_the_loss_once_the_gan_term_has_joined(trace):
    """It joins in the third iteration: the second has a whole L_sid, the third half of it."""
    joins_late = trace("--iters", 3, *FROZEN, "--gan-weight", 0, "--gan-warmup", 16)
    from_the_start = trace("--iters", 3, *FROZEN, "--gan-weight", 0, "--gan-warmup", 0)
    whole, half = student_gradients(joins_late)
    _, half_of_whole, same = student_gradients(from_the_start)
    atol = 1e-4 * float(half_of_whole.norm())
    assert torch.allclose(whole, 2 * half_of_whole, rtol=1e-4, atol=atol)
    assert torch.allclose(half, same, rtol=1e-4, atol=1e-5)


# ---- the first iteration by hand -----------------------------------------------------------------


def at(alpha, sigma, x, eps):
    return (alpha[:, None] * x + sigma[:, None] * eps).float()


def guided_by_hand(net, x_t, alpha, sigma, cond, kappa):
    c = net(x_t, alpha, sigma, cond)
    u = net(x_t, alpha, sigma, net.null(len(x_t)))
    return u + kappa * (c - u)


def gradient_of(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()]).double()


def edm_levels_of_the_student(r):
    """r ~ U(0, 0.8) on the toy's schedule, whose levels are 0.01 to 20, rho = 7."""
    low, high = 0.01 ** (1 / 7), 20 ** (1 / 7)
    sigma = (high + (1 - r) * (low - high)) ** 7
    return torch.ones(16), sigma


def student_by_hand(steps, alpha, kappa_real, kappa_fake, form="edm", through=True, adv=0.0):
    """The first student gradient of a run with one step, from the paper's formulas.

    The critic is the one that the run's first critic step has made. adv: w_G.
    """
    teacher = load_teacher("toy-cond")
    student = teacher.copy()
    fake = teacher.copy().requires_grad_(False)
    nn.utils.vector_to_parameters(steps[1].before["critic"], fake.parameters())

    draw = BatchRandom(0, 0, 16)
    if not adv:
        draw.randint(0, 8)  # the critic's turn, whose labels are those of images with --gan
    draw.randn(2)
    draw.randn()
    draw.randn(2)

    cond = teacher.encode(draw.randint(0, 8))
    z = draw.randn(2)
    if form == "edm":
        x = student(2.5 * z, 1.0, 2.5, cond)
        a, sigma = edm_levels_of_the_student(0.8 * draw.rand())
        scale = 100
    else:
        x = student(z, 0.0, 1.0, cond)
        sigma = (math.log(2) + 1.6 * draw.randn().double()).sigmoid()
        a, scale = 1 - sigma, 100
    x_t = at(a, sigma, x, draw.randn(2))
    r = guided_by_hand(teacher, x_t, a, sigma, cond, kappa_real)
    f = guided_by_hand(fake, x_t, a, sigma, cond, kappa_fake)
    if not through:
        r, f = r.detach(), f.detach()
    w = 1 / (x - r).abs().mean(1).clamp(min=1e-5).detach() if form == "edm" else 1 - sigma
    inner = ((r - f) * ((r - x) - alpha * (r - f))).sum(1)
    loss = scale * (w * inner).sum() / 16
    if adv:
        logit = fake(x_t, a, sigma, cond, features=True)[-1].mean(1)
        assert logit.abs().max() < 10
        loss = (loss + adv * 2 * F.softplus(-logit).mean() * w.mean()) / 2
    loss.backward()
    return gradient_of(student)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("guidance, kappa_fake", [("lsg", 2), ("long", 1)])
def test_eq05_first_student_gradient_by_hand(trace, alpha, guidance, kappa_fake):
    """The gradient passes through both networks: without them it differs by far."""
    flags = ["--cfg", 2, "--guidance", guidance, "--lr-fake", 1e-2, "--alpha", alpha]
    steps = trace("--iters", 1, *flags)
    found = steps[1].flat_grad()
    right = student_by_hand(steps, alpha, 2, kappa_fake)
    wrong = student_by_hand(steps, alpha, 2, kappa_fake, through=False)
    assert relative_error(found, right) < 1e-5
    assert relative_error(wrong, right) > 0.01


def test_eq05_eq11_first_student_gradient_of_a_flow_by_hand(trace):
    steps = trace("--iters", 1, "--cfg", 2, "--lr-fake", 1e-2, form="flow")
    expected = student_by_hand(steps, 1.0, 2, 2, form="flow")
    assert relative_error(steps[1].flat_grad(), expected) < 1e-5


def test_eq05_first_student_gradient_with_zero_cfg_by_hand(trace):
    steps = trace("--iters", 1, "--guidance", "zero", "--lr-fake", 1e-2)
    assert relative_error(steps[1].flat_grad(), student_by_hand(steps, 1.0, 1, 0)) < 1e-5


def test_eq09_eq10_first_student_gradient_with_the_gan_by_hand(trace):
    flags = ["--gan", "--gan-warmup", 0, "--gan-weight", 30, "--lr-fake", 1e-2]
    steps = trace("--iters", 1, *flags)
    expected = student_by_hand(steps, 1.0, 1, 1, adv=30)
    assert relative_error(steps[1].flat_grad(), expected) < 1e-5


def critic_by_hand(form="edm", kappa=1.0, nfe=1, drop=0.0, cls_weight=None):
    """The first critic gradient of a run, from the paper's formulas. cls_weight: w_D with --gan."""
    teacher = load_teacher("toy-cond")
    student, fake = teacher.copy(), teacher.copy()
    draw = BatchRandom(0, 0, 16)
    if cls_weight is None:
        labels = draw.randint(0, 8)
    else:
        x_real, labels = load_images(None, teacher).batch(0, 16, 0)
    if drop:
        labels = torch.where(draw.rand() < drop, 8, labels)  # before the student makes x
        assert 2 < (labels == 8).sum() < 14
    cond = teacher.encode(labels)

    k = draw.shared_randint(0, nfe)
    assert nfe == 1 or k == 3
    x = torch.zeros(16, 2)
    with torch.no_grad():
        for i in range(k + 1):  # with noise at the levels 2.5, 2, 1.5, 1, or 1, 0.8, 0.6, 0.4
            tau = (2.5 if form == "edm" else 1.0) * (1 - i / nfe)
            keep = 1.0 if form == "edm" else 1 - tau
            x = student(keep * x + tau * draw.randn(2), keep, tau, cond)

    n, eps = draw.randn().double(), draw.randn(2)
    if form == "edm":
        sigma = (1.2 * n - 1.2).exp()
        alpha = torch.ones(16)
        weight = (sigma**2 + 0.714**2) / (sigma * 0.714) ** 2
    else:
        sigma = (math.log(2) + 1.6 * n).sigmoid()
        alpha = 1 - sigma
        weight = sigma**-2
    f = guided_by_hand(fake, at(alpha, sigma, x, eps), alpha, sigma, cond, kappa)
    loss = (weight * (f - x).square().sum(1)).sum() / 16
    if cls_weight is not None:

        def logit(y):  # fake and real share level, noise and label
            x_t = at(alpha, sigma, y, eps)
            return fake(x_t, alpha, sigma, cond, features=True)[-1].mean(1)

        bce = F.softplus(logit(x)) + F.softplus(-logit(x_real))
        omega = weight.mean() if form == "edm" else 2
        loss = loss + cls_weight * omega * bce.mean() / 2
    loss.backward()
    return gradient_of(fake)


@pytest.mark.parametrize(
    "flags, case",
    [
        ("", dict()),
        ("--cfg 1.5", dict(kappa=1.5)),
        ("--cfg 1.5 --guidance long", dict()),
        ("--guidance zero", dict(kappa=0.0)),
        ("--nfe 5", dict(nfe=5)),
        ("--gan --gan-warmup 0 --cls-weight 3", dict(cls_weight=3)),
        ("", dict(form="flow")),
        ("--nfe 5", dict(form="flow", nfe=5)),
        ("--gan --gan-warmup 0", dict(form="flow", cls_weight=1)),
    ],
)
def test_eq04_eq08_first_critic_gradient_by_hand(trace, flags, case):
    steps = trace("--iters", 1, *flags.split(), form=case.get("form"))
    assert relative_error(steps[0].flat_grad(), critic_by_hand(**case)) < 1e-5


@pytest.mark.parametrize(
    "flags, case",
    [
        ("--cfg 1.5", dict(kappa=1.5, drop=0.5)),
        ("--cfg 1.5 --gan --gan-warmup 0", dict(kappa=1.5, drop=0.5, cls_weight=1)),
        ("--cfg 1.5 --guidance long", dict()),  # nothing is dropped for a critic without guidance
    ],
)
def test_dropped_conditions_by_hand(trace, monkeypatch, flags, case):
    monkeypatch.setitem(sid.FORMS, "edm", dict(sid.FORMS["edm"], drop=0.5))
    steps = trace("--iters", 1, *flags.split())
    assert relative_error(steps[0].flat_grad(), critic_by_hand(**case)) < 1e-5


# ---- whole iterations by hand --------------------------------------------------------------------


def level_by_hand(kind, ratio):
    """alpha and sigma of a schedule at this sigma / alpha, within its range."""
    if kind == "edm":
        ratio = ratio.clamp(0.002, 80)
        return torch.ones_like(ratio), ratio
    if kind == "vp":
        return 1 / (1 + ratio**2).sqrt(), ratio / (1 + ratio**2).sqrt()
    return 1 / (1 + ratio), ratio / (1 + ratio)


def vp_ratios():
    """sigma / alpha of Stable Diffusion's 1000 times."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - beta).cumprod(0)
    return ((1 - abar) / abar).sqrt()


def drawn_by_hand(kind, draw, shift, student_turn):
    """Levels of (11) for the critic or the student, sigma / alpha times `shift`."""
    if kind == "vp":
        ratio = vp_ratios()[draw.randint(20, 980)]
    elif kind == "flow":
        ratio = (math.log(2) + 1.6 * draw.randn().double()).exp()  # t / (1 - t) of a logit t
    elif student_turn:
        low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
        ratio = (low + 0.8 * draw.rand() * (high - low)) ** 7
    else:
        ratio = (1.2 * draw.randn().double() - 1.2).exp()
    return level_by_hand(kind, shift * ratio)


def steps_by_hand(kind, n, times=None):
    """alpha, sigma of the student's n steps (11). times: of --steps."""
    if kind == "edm":
        return level_by_hand(kind, f64(times or [2.5 * (n - k) / n for k in range(n)]))
    if kind == "vp":
        return level_by_hand(kind, vp_ratios()[times or [625 * (n - k) // n for k in range(n)]])
    t = f64(times or [(n - k) / n for k in range(n)])
    return 1 - t, t


@dataclasses.dataclass
class ByHand:
    """(1) to (11) for a network of points with 8 labels."""

    trace: Trace
    kind: str  # edm, vp or flow
    kappa: tuple = (1.0, 1.0)  # of teacher and critic
    alpha: float = 1.0
    weight: str = "sid_legacy"
    scale: float = 100.0
    nfe: int = 1
    times: list = None  # of --steps
    ratio: int = 1
    shift: float = 1.0
    drop: float = 0.0  # share of empty labels
    gan: tuple = None  # w_G, w_D, images of the warm-up
    dropped: int = 0  # labels emptied so far
    logs: list = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.steps = steps_by_hand(self.kind, self.nfe, self.times)

    def noised(self, x, level, eps):
        return (level[0][:, None] * x + level[1][:, None] * eps).to(x.dtype)

    def sample(self, net, k, cond, noise):
        """(1) at step k, from (2)."""
        alpha, sigma = self.steps
        x_in = sigma[0].float() * noise()
        for j in range(k):
            xhat = net(x_in, alpha[j], sigma[j], cond).detach()
            x_in = (alpha[j + 1] * xhat + sigma[j + 1] * noise()).float()
        return net(x_in, alpha[k], sigma[k], cond)

    def guided(self, net, x_t, level, cond, kappa):
        c = net(x_t, *level, cond)
        u = net(x_t, *level, dict(labels=torch.full((len(x_t),), 8)))
        return u + kappa * (c - u)  # (3)

    def iteration(self, it, images):
        """Generator of ("critic", its loss) and, in a student's turn, ("student", its loss)."""
        trace, fake, draw = self.trace, self.trace.critic.fake, BatchRandom(0, it, 16)
        k = draw.shared_randint(0, self.nfe)
        if self.gan:
            x_real, labels = images.batch(it, 16, 0)
        else:
            labels = draw.randint(0, 8)
        if self.drop:
            empty = draw.rand() < self.drop
            self.dropped += int(empty.sum())
            labels = torch.where(empty, 8, labels)
        cond = dict(labels=labels)
        x = self.sample(trace.student, k, cond, lambda: draw.randn(2)).detach()
        level = drawn_by_hand(self.kind, draw, self.shift, student_turn=False)
        eps = draw.randn(2)
        f = self.guided(fake, self.noised(x, level, eps), level, cond, self.kappa[1])
        lam = self.native_weight(*level)
        loss = (lam * (f - x).square().sum(1)).mean()  # (4)
        logs = dict(fake=loss, mean=x.mean(), std=x.std())
        self.logs.append(logs)
        if self.gan:
            logits = [
                fake(self.noised(y, level, eps), *level, cond, features=True)[-1].mean(1)  # (7)
                for y in (x, x_real)
            ]
            bce = (1 + logits[0].exp()).log() + (1 + (-logits[1]).exp()).log()
            omega = lam.mean() if self.kind == "edm" else 2
            cls = omega * bce.mean() / 2  # (8)
            loss = loss + self.gan[1] * cls  # (10)
            logs |= dict(cls=cls, logit_fake=logits[0].mean(), logit_real=logits[1].mean())
        yield "critic", loss

        seen, warmup = 16 * it, self.gan[2] if self.gan else 0
        if it % self.ratio or seen < warmup:
            return
        cond = dict(labels=draw.randint(0, 8))
        x = self.sample(trace.student, k, cond, lambda: draw.randn(2))
        level = drawn_by_hand(self.kind, draw, self.shift, student_turn=True)
        x_t = self.noised(x, level, draw.randn(2))
        r = self.guided(trace.teacher, x_t, level, cond, self.kappa[0])
        f = self.guided(fake, x_t, level, cond, self.kappa[1])
        t = level[1] / (level[0] + level[1])
        w = dict(
            sid_legacy=1 / (x - r).abs().mean(1).detach(),
            one_minus=1 - t,
            one_over=1 / t,
        )[self.weight]  # (6)
        inner = ((r - f) * ((r - x) - self.alpha * (r - f))).sum(1)
        sid_loss = (w * inner).mean()  # (5)
        loss = self.scale * sid_loss
        logs |= dict(sid=sid_loss, weight=w.mean())
        logs |= dict(real_gap=(x - r).square().mean(), gap=(r - f).square().mean())
        if self.gan and seen >= 2 * warmup:
            logit = fake(x_t, *level, cond, features=True)[-1].mean(1)
            assert logit.abs().max() < 10
            adv = w.mean() * 2 * (1 + (-logit).exp()).log().mean()  # (9)
            loss = (loss + self.gan[0] * adv) / 2  # (10)
            logs |= dict(adv=adv)
        yield "student", loss

    def native_weight(self, alpha, sigma):
        if self.kind == "edm":
            return (sigma**2 + 0.49) / (0.7 * sigma) ** 2
        return (alpha / sigma) ** 2 if self.kind == "vp" else sigma**-2


# name: (schedule, prediction, flags, case of ByHand)
BY_HAND = {
    "edm": (EDM(), "edm", "--alpha 1.2 --ema 3 --ratio 1 --gan-warmup 0", dict(alpha=1.2)),
    "edm, 3 steps, long": (
        EDM(),
        "edm",
        "--nfe 3 --cfg 2.5 --guidance long --shift 0.3 --weight 1_minus_sigma --ratio 2",
        dict(nfe=3, kappa=(2.5, 1.0), shift=0.3, weight="one_minus", ratio=2),
    ),
    "edm, GAN": (
        EDM(),
        "edm",
        "--gan --gan-warmup 16 --gan-weight 30 --cls-weight 0.3 --cfg 1.5 --alpha 0.5",
        dict(kappa=(1.5, 1.5), alpha=0.5, gan=(30, 0.3, 16)),
    ),
    "eps, 4 steps": (
        VP(),
        "eps",
        "--nfe 4 --cfg 2 --weight 1_over_sigma --ema 3",
        dict(nfe=4, kappa=(2, 2), weight="one_over", scale=1, drop=0.1),
    ),
    "eps, long": (
        VP(),
        "eps",
        "--cfg 2 --guidance long --ratio 2",
        dict(kappa=(2, 1), scale=1, ratio=2),
    ),
    "v, zero, GAN": (
        VP(),
        "v",
        "--guidance zero --gan --gan-warmup 0 --gan-weight 0.2 --nfe 2 --shift 0.5",
        dict(nfe=2, kappa=(1, 0), scale=1, drop=0.1, gan=(0.2, 1, 0), shift=0.5),
    ),
    "flow, LoRA": (
        Flow(3),
        "flow",
        "--cfg 1.5 --nfe 2 --lora 4 --lora-fake 4 --lora-alpha 8",
        dict(nfe=2, kappa=(1.5, 1.5), weight="one_minus"),
    ),
    "flow, GAN": (
        Flow(),
        "flow",
        "--gan --gan-warmup 16 --cls-weight 2 --shift 2",
        dict(weight="one_minus", gan=(1, 2, 16), shift=2),
    ),
    "flow, small": (
        Flow(),
        "flow",
        "--gan --gan-warmup 16 --shift 2 --small width=12 --small-fake depth=2",
        dict(weight="one_minus", gan=(1, 1, 16), shift=2),
    ),
    "trigflow": (
        TrigFlow(0.5),
        "trigflow",
        "--nfe 2 --steps 0.9,0.4 --cfg 2",
        dict(nfe=2, times=[0.9, 0.4], kappa=(2, 2), weight="one_minus"),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_whole_iterations_by_hand(trace, monkeypatch, name):
    """Student and critic: gradients and AdamW's updates; log; average; sampling by the record."""
    wrapped = byhand.wrap_trained(monkeypatch)
    schedule, prediction, flags, case = BY_HAND[name]
    common = "--iters 6 --lr 3e-3 --lr-fake 2e-3 --betas 0.3 0.8 --weight-decay 0.1 --clip 0.5"
    flags = f"{common} --warmup 3 --cooldown 0.5 {flags}"
    teacher = byhand.Tiny(schedule, prediction)
    steps = trace(*flags.split(), teacher=teacher, record=[(sid, "load_images")])
    images = load_images(None, steps.teacher, lambda line: None)
    kind = dict(edm="edm", vp="vp").get(schedule.config["name"], "flow")
    by_hand = ByHand(steps, kind, **case)
    optimisers = {
        role: byhand.AdamW(lr, (0.3, 0.8), 0.1, 0.5)
        for role, lr in (("student", 3e-3), ("critic", 2e-3))
    }
    factor = lambda it: min(1, (it + 1) / 3) * min(1, (6 - it) / 3)
    iteration = lambda it: by_hand.iteration(it, images)
    assert byhand.compare_iterations(steps, iteration, optimisers, factor=factor) == 6
    assert bool(by_hand.dropped) == bool(by_hand.drop)
    byhand.compare_logs(steps.logs, by_hand.logs)
    assert all(("adv" in line) == ("adv" in logs) for line, logs in zip(steps.logs, by_hand.logs))

    # gradients flow through what run.train returns, other passes do not; images are for the GAN
    turns = [sum(step.role == "student" for step in steps), 12 if by_hand.gan else 6]
    assert [net.calls for net in wrapped] == [{True: n, False: 0} for n in turns]
    assert len(steps.calls["load_images"]) == bool(by_hand.gan)

    if "--ema" in flags:
        byhand.compare_average(steps, 3)
    x, noises, cond = byhand.sample_by_record(steps, sid)
    expected = by_hand.sample(steps.ema.model, by_hand.nfe - 1, cond, iter(noises).__next__)
    assert torch.allclose(x, expected, atol=1e-5)


# ---- deliberate mistakes -------------------------------------------------------------------------

RIGHT = sid.sid_loss


def networks_detached(x, r, f, w, alpha):
    return RIGHT(x, r.detach(), f.detach(), w, alpha)


def wrong_sign(x, r, f, w, alpha):
    return -RIGHT(x, r, f, w, alpha)


def plus_alpha(x, r, f, w, alpha):
    return RIGHT(x, r, f, w, -alpha)


def mean_over_pixels(x, r, f, w, alpha):
    return RIGHT(x, r, f, w, alpha) / x[0].numel()


def sample_detached(x, r, f, w, alpha):
    return RIGHT(x.detach(), r, f, w, alpha)


@pytest.mark.parametrize(
    "wrong, test, case",
    [
        (networks_detached, test_eq05_of_a_gaussian, (2.0, 1.0, 0.0, 0.24)),
        (wrong_sign, test_eq05_of_a_gaussian, (2.0, 0.5, 0.225, 0.42)),
        (plus_alpha, test_eq05_at_one_half_for_any_estimates, ()),
        (mean_over_pixels, test_eq05_at_one_for_any_estimates, ()),
        (sample_detached, test_eq05_of_a_gaussian, (0.5, 1.0, 0.0, -0.24)),
    ],
)
def test_a_wrong_loss_fails(wrong, test, case, monkeypatch):
    test(*case)
    monkeypatch.setattr(sid, "sid_loss", wrong)
    with pytest.raises(AssertionError):
        test(*case)


def test_levels_counted_from_the_noisy_end_fail(monkeypatch):
    """The student would be trained at large noise only."""
    right = BatchRandom.rand
    monkeypatch.setattr(BatchRandom, "rand", lambda draw: (1 - 0.8 * right(draw)) / 0.8)
    with pytest.raises(AssertionError):
        test_eq11_edm_levels_of_the_student()


@pytest.mark.parametrize("kind", sid.PRESETS)
def test_the_gan_joins_within_the_run_of_every_preset(kind):
    preset = sid.PRESETS[kind]
    longest = max(form["gan_warmup"] for form in sid.FORMS.values())
    warmup = preset.get("gan_warmup", longest)
    assert 2 * warmup < preset["iters"] * preset["batch"] / 2


def test_frame(monkeypatch, tmp_path):
    check_frame(monkeypatch, sid, tmp_path / "out", show=["sid", "fake"])
