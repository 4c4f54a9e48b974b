"""FreeFlow (arXiv 2511.19428): equations on a Gaussian teacher in closed form, then a real run.

Numbers in tables were derived apart from the code.
"""

import functools
import types

import pytest
import torch
import torch.nn as nn
from helpers import byhand
from helpers.gaussian import Gauss, GaussFlow, f64, full, labels, normal, relative_error
from helpers.runs import log
from torch.nn.attention import SDPBackend, sdpa_kernel

import flowmap
from common.errors import UserError
from common.files import read_json
from common.model import Model
from common.rng import BatchRandom, PerImageNoise
from common.sampling import teacher_sample
from common.schedules import EDM, VP, Flow, add_noise, expand
from common.teachers.dit import DiT
from common.teachers.load import load_teacher

MEAN, STD = 1.0, 0.5  # of the teacher's data
FLOW = GaussFlow(MEAN, STD)


def gauss(mean=MEAN, std=STD):
    return Gauss(mean, std)


class Average(nn.Module):
    """A student whose average velocity is the given function of z and d (shaped to z)."""

    def __init__(self, u_avg):
        super().__init__()
        self.u_avg = u_avg
        self.schedule = Flow()
        self.dtype = torch.float32

    def forward(self, x, alpha, sigma, cond):
        assert float(alpha) == 0
        assert float(sigma) == 1
        return x + self.u_avg(x, expand(cond["duration"] / 0.375, x))


def exact_state(z, d):
    """Where the ODE of the Gaussian teacher carries z after the duration d."""
    return FLOW.flow_map(z, torch.ones_like(f64(d)), 1 - d)


EXACT = Average(lambda z, d: (exact_state(z, d.flatten()) - z) / d)


def tiny():
    """A DiT of 30k weights, all of them random."""
    config = dict(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        sample_size=28,
        patch_size=7,
        num_embeds_ada_norm=10,
        activation_fn="linear-silu",
    )
    torch.manual_seed(0)
    net = DiT.network(config)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.1)
    return DiT(net, Flow(), "flow", (1, 28, 28), 10)


def make_teacher(name):
    return tiny() if name == "tiny" else load_teacher(name)


def with_duration(student):
    """As after some training: the duration matters."""
    torch.manual_seed(0)
    student.extend("duration")
    with torch.no_grad():
        for p in student.extras.parameters():
            p.normal_(0, 0.1)
    return student


# ---- (1), (2): velocities ------------------------------------------------------------------------


def field(x, t):
    """Some velocity field u(x, t), from noise to data."""
    return torch.sin(3 * x) * t.view(-1, 1) - x


class SiT(Model):
    """`field` as SiT writes it: its time is 1 - t, its output data - noise."""

    def predict(self, x, t, cond):
        sit = lambda x, time: field(x, 1 - time)
        return -sit(x, 1 - t)


class Repa(Model):
    """`field` as REPA writes it: its time is t, its output noise - data."""

    def predict(self, x, t, cond):
        return -field(x, t)


@pytest.mark.parametrize("network", [SiT, Repa])
def test_eq01_conventions_of_sit_and_repa(network):
    """The Model of either is two lines, and both have the same velocity."""
    x, t = normal(5, 3), f64(0.01, 0.3, 0.5, 0.9, 1.0)
    net = network(None, Flow(), "flow", (3,))
    found = flowmap.velocity(net, Flow(), x, t, {})
    assert torch.allclose(found, field(x, t), atol=1e-5)  # times are float32


class OtherSchedule(Model):
    """The Gaussian data on a network of another schedule, which predicts x0 or eps."""

    def predict(self, x, t, cond):
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        x0 = gauss()(x, alpha, sigma, cond)
        if self.prediction == "x0":
            return x0
        return (x - expand(alpha, x) * x0) / expand(sigma, x)  # eps, the same as v of a flow


@pytest.mark.parametrize(
    "schedule, prediction",
    [(VP(), "eps"), (EDM(), "x0"), (Flow(), "x0")],
    ids=["vp", "edm", "flow"],
)
def test_eq01_networks_of_other_schedules(schedule, prediction):
    net, x = OtherSchedule(None, schedule, prediction, (3,)), normal(4, 3)
    for t in (0.05, 0.3, 0.8, 0.9):  # beyond 0.936 the VP network is evaluated at its last level
        found = flowmap.velocity(net, schedule, x, full(t, 4), {})
        assert torch.allclose(found, -FLOW.velocity(x, full(t, 4)), atol=2e-3), t


@pytest.mark.parametrize(
    "schedule, prediction",
    [(VP(), "eps"), (EDM(), "x0"), (Flow(), "x0")],
    ids=["vp", "edm", "flow"],
)
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_eq01_is_never_0_over_0(schedule, prediction, t):
    net = OtherSchedule(None, schedule, prediction, (3,))
    assert flowmap.velocity(net, schedule, normal(4, 3), t, {}).isfinite().all()


TWO_MEANS = [MEAN, MEAN + 2]  # of label 0, the unconditional data, and of label 1


def conditional(teacher, x, t):
    return flowmap.velocity(teacher, teacher.schedule, x, t, labels(*[1] * len(x)))


def unconditional(teacher, x, t):
    return flowmap.velocity(teacher, teacher.schedule, x, t, labels(*[0] * len(x)))


def test_eq02_each_sample_has_its_scale_up_to_t_guided():
    teacher, x = gauss(TWO_MEANS), normal(5, 3)
    t, w = f64(0.1, 0.3, 0.5, 0.7, 0.8), f64(1.0, 2.0, 0.0, 3.0, 3.0)
    c, u = conditional(teacher, x, t), unconditional(teacher, x, t)
    found = flowmap.guided_velocity(teacher, x, t, labels(1, 1, 1, 1, 1), w, 0.7)
    for i, scale in enumerate((1, 2, 0, 3, 1)):
        assert torch.allclose(found[i], u[i] + scale * (c - u)[i], atol=1e-12), i


def test_eq02_without_t_guided_all_times_are_guided():
    teacher, x, t = gauss(TWO_MEANS), normal(3, 3), f64(0.0, 0.5, 1.0)
    c, u = conditional(teacher, x, t), unconditional(teacher, x, t)
    found = flowmap.guided_velocity(teacher, x, t, labels(1, 1, 1), 1.5)
    assert torch.allclose(found, u + 1.5 * (c - u), atol=1e-12)


def test_eq02_scale_1_is_one_pass():
    teacher, x, t = gauss(TWO_MEANS), normal(3, 3), full(0.5, 3)
    c = conditional(teacher, x, t)
    teacher.inputs.clear()
    assert torch.equal(flowmap.guided_velocity(teacher, x, t, labels(1, 1, 1), 1), c)
    assert len(teacher.inputs) == 1


# ---- (3), (4): the student -----------------------------------------------------------------------


@pytest.mark.parametrize("d, w", [(0.0, 1.0), (0.3, 1.5), (1.0, 3.0)])
@pytest.mark.parametrize("name", ["mnist", "tiny"])
def test_eq03_the_student_starts_as_the_teachers_velocity_at_pure_noise(name, d, w):
    teacher = make_teacher(name)
    student = teacher.copy().extend("duration", "guidance")
    z, cond, d = torch.randn(4, 1, 28, 28), teacher.encode(torch.arange(4)), full(d, 4)
    u = flowmap.velocity(teacher, teacher.schedule, z, 1.0, cond)
    assert torch.equal(flowmap.average_velocity(student, z, d, cond, w), u)
    u_avg, slope = flowmap.derivative(student, z, d, cond, w)
    assert torch.allclose(u_avg, u, atol=1e-5)
    assert slope.abs().max() == 0


def test_aux_starts_as_the_teacher():
    teacher, z, r = tiny(), torch.randn(4, 1, 28, 28), full(0.3, 4)
    aux, cond = teacher.copy().extend("guidance"), teacher.encode(torch.arange(4))
    given = cond | flowmap.guidance_input(2.5, r)
    found = flowmap.velocity(aux, teacher.schedule, z, r, given)
    assert torch.equal(found, flowmap.velocity(teacher, teacher.schedule, z, r, cond))


def test_guidance_input_is_0_without_guidance():
    assert flowmap.guidance_input(1.0, full(0.3, 2))["guidance"].tolist() == [0, 0]
    assert flowmap.guidance_input(f64(3, 5), full(0.3, 2))["guidance"].tolist() == [0.5, 1]


@pytest.mark.parametrize("duration", [0.25, 1.0])
def test_eq04_sample_is_the_flow_map(duration):
    z = normal(6, 3)
    found = flowmap.sample(EXACT, z, {}, 1, None, duration=duration)
    assert torch.allclose(found, exact_state(z, f64(duration)))


def test_sample_has_one_step():
    with pytest.raises(UserError, match="--nfe 2"):
        flowmap.sample(EXACT, normal(6, 3), {}, 2, None)


# ---- (5): prediction with the derivative ---------------------------------------------------------


@pytest.mark.parametrize("d", [0.02, 0.3, 0.7, 0.99])
def test_eq05_is_zero_at_the_exact_map(d):
    e = flowmap.prediction_error(EXACT, gauss(), normal(7, 3), full(d, 7), {}, 1)
    assert e.abs().max() < 1e-13


def test_eq05_at_the_image_is_off_by_the_least_time_only():
    e = flowmap.prediction_error(EXACT, gauss(), normal(7, 3), full(1.0, 7), {}, 1)
    assert 0 < e.abs().max() < 0.02  # the teacher is evaluated at t = 0.001


@pytest.mark.parametrize("name", ["mnist", "tiny"])
def test_eq05_is_zero_at_the_start_for_d_0(name):
    teacher = make_teacher(name)
    student = teacher.copy().extend("duration")
    z, cond = torch.randn(4, 1, 28, 28), teacher.encode(torch.arange(4))
    e = flowmap.prediction_error(student, teacher, z, full(0.0, 4), cond, 1)
    assert e.abs().max() < 1e-5


@pytest.mark.parametrize(
    "d, u_avg, slope, u",
    [
        (0.3, 0.052970, 0.246640, 0.126962),
        (0.7, 0.229967, 0.712671, 0.728837),
        (1.0, 0.5, 1.0, 1.5),
    ],
)
def test_eq05_numbers_of_the_exact_map(d, u_avg, slope, u):
    z, d = torch.ones(1, 1, dtype=torch.float64), f64([d])
    found = flowmap.derivative(EXACT, z, d, {}, 1)
    assert [float(v) for v in found] == pytest.approx([u_avg, slope], abs=1e-6)
    state = flowmap.flow_map(z, d, found[0])
    velocity = flowmap.velocity(gauss(), Flow(), state, 1 - d, {})
    assert velocity.item() == pytest.approx(u, abs=1e-6 if d < 1 else 4e-3)


def central_difference(student, z, d, cond, h):
    u_avg = functools.partial(flowmap.average_velocity, student, z, cond=cond, w=1)
    with torch.no_grad():
        return (u_avg(d=d + h) - u_avg(d=d - h)) / (2 * h)


@pytest.mark.parametrize("name, n", [("tiny", 4), ("mnist", 2), ("toy", 4)])
def test_eq05_derivative_is_the_central_difference(name, n):
    student = with_duration(make_teacher(name).copy()).requires_grad_(False)
    cond, z = student.encode(torch.arange(n)), torch.randn(n, *student.shape)
    d = f64(0.1, 0.4, 0.75, 1.0)[:n]
    _, slope = flowmap.derivative(student, z, d, cond, 1)
    assert slope.dtype == torch.float32
    assert slope.norm() > 1e-2
    assert relative_error(central_difference(student, z, d, cond, 1e-2), slope) < 2e-3
    # in float64, by Richardson's extrapolation, whose own error is below 1e-9
    student.double()
    z = z.double()
    u_avg, slope = flowmap.derivative(student, z, d, cond, 1)
    if name == "toy":  # the same kernels with and without forward mode
        assert torch.equal(u_avg, flowmap.average_velocity(student, z, d, cond, 1))
    coarse = central_difference(student, z, d, cond, 2e-3)
    fine = central_difference(student, z, d, cond, 1e-3)
    assert (slope - (4 * fine - coarse) / 3).abs().max() < 1e-6


def test_derivative_takes_the_math_kernel_whatever_the_caller_chose():
    student, z = with_duration(tiny()).requires_grad_(False), torch.randn(2, 1, 28, 28)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        _, slope = flowmap.derivative(student, z, f64(0.2, 0.9), student.encode([0, 1]), 1)
    assert slope.isfinite().all()
    assert slope.abs().max() > 0


def test_derivatives_are_float32_where_other_passes_are_bf16():
    student, z, d = (
        with_duration(tiny()).requires_grad_(False),
        torch.randn(2, 1, 28, 28),
        f64(1, 0),
    )
    cond = student.encode([0, 1])
    u_avg, slope = flowmap.derivative(student, z, d, cond, 1)
    student.dtype = torch.bfloat16
    found = flowmap.derivative(student, z, d, cond, 1)
    assert torch.equal(found[0], u_avg)
    assert torch.equal(found[1], slope)
    assert student.dtype == torch.bfloat16
    assert not torch.equal(flowmap.average_velocity(student, z, d, cond, 1), u_avg)


# ---- (6): prediction with a finite step ----------------------------------------------------------


def fixed_point(z, teacher, steps, cond=None, w=1):
    """States f(z, k / steps) of the student that (6) leads to, from a start without meaning."""
    cond = cond or {}
    table = [torch.full_like(z, 7.0) for _ in range(steps + 1)]  # u_avg at k / steps
    student = Average(lambda z, d: table[round(float(d.flatten()[0]) * steps)])
    for _ in range(steps):
        # the end first: a sweep carries the right values one step further, not all the way
        for k in range(steps, 0, -1):
            d = full(k / steps, len(z))
            e = flowmap.euler_error(table[k], student, teacher, z, d, cond, w, steps)
            table[k] = table[k] - e
    return [z + k / steps * u_avg for k, u_avg in enumerate(table)]


@pytest.mark.parametrize("steps, image", [(1, 1.0), (2, 1.2), (4, 1.340541), (8, 1.414785)])
def test_eq06_fixed_point_is_the_euler_sampler(steps, image):
    z = torch.ones(1, 1, dtype=torch.float64)
    states = fixed_point(z, gauss(), steps)
    assert states[-1].item() == pytest.approx(image, abs=1e-6)


@pytest.mark.parametrize("w", [1, 1.7])
def test_eq06_fixed_point_is_the_teachers_own_sampler(w):
    """On the 2-D mixture, with guidance: along the whole path, and at its end common's sampler."""
    teacher = load_teacher("toy-cond")
    teacher.schedule = Flow()
    z, cond = normal(40, 2), teacher.encode(torch.arange(40) % 8)
    states = fixed_point(z, teacher, 8, cond, w)
    path = flowmap.teacher_path(teacher, z, cond, w, 8)
    assert torch.allclose(torch.stack(states), torch.stack(path), atol=1e-9)
    assert torch.allclose(states[8], teacher_sample(teacher, z, cond, 8, w), atol=1e-9)


@pytest.mark.parametrize("t, s", [(0.7, 0.6), (0.2, 0.1)])
def test_eq06_target_is_that_of_boot(t, s):
    """With y = z + u_avg on the linear path: y_s = y_t + k (x0 - y_t), k = 1 - e^(l_s - l_t)."""
    teacher, z, slope = gauss(), normal(5, 3), normal(5, 3, seed=1)
    student = Average(lambda z, d: slope * (1 + d))
    now = normal(5, 3, seed=2)
    e = flowmap.euler_error(now, student, teacher, z, full(1 - s, 5), {}, 1, 10)
    y_t = z + slope * (1 + 1 - t)
    x_t = add_noise(y_t, 1 - t, t, z)
    x0 = teacher(x_t, f64(1 - t), f64(t), {})
    k = 1 - (s / (1 - s)) / (t / (1 - t))  # l = log(sigma / alpha)
    assert torch.allclose(z + now - e, y_t + k * (x0 - y_t), atol=1e-12)


def test_eq06_weight_of_boots_target():
    assert 1 - (0.6 / 0.4) / (0.7 / 0.3) == pytest.approx(0.357143, abs=1e-6)


def test_eq06_a_step_longer_than_the_duration_starts_at_the_noise():
    z = normal(4, 2)
    student = Average(lambda z, d: z * torch.nan_to_num(1 / d, posinf=0.0))
    e = flowmap.euler_error(torch.zeros_like(z), student, gauss(), z, full(0.05, 4), {}, 1, 10)
    assert torch.allclose(-e, MEAN - z)  # u(z, 1)


# ---- (7): weight ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "k, norm, expected",
    [(1, 1, 99.99), (1, 10, 10.0), (1, 100, 1.0), (0.5, 1, 10), (0.5, 100, 10), (0, 3, 3)],
)
def test_eq07_norms(k, norm, expected):
    e = norm * torch.ones(1, 100, dtype=torch.float64) / 10
    assert flowmap.weighted(e, k, 1e-6).norm().item() == pytest.approx(expected, rel=1e-3)


def test_eq07_each_sample_has_its_own_weight():
    e = normal(4, 6) * f64([1, 2, 4, 8])[:, None]
    found = flowmap.weighted(e, 1, 1e-12)
    assert torch.allclose(found[2], e[2] / e[2].square().mean())


# ---- (8): correction -----------------------------------------------------------------------------


def correction_of(student, x, r, n):
    """e of (8) where aux is exact for the student's data."""
    return flowmap.correction_error(student, gauss(), x, full(r, len(x)), n, {}, 1, 1.0)


@pytest.mark.parametrize(
    "r, expected", [(0.2, 0.4), (0.5, 0.64), (0.8, 0.492308), (0.95, 0.420761)]
)
def test_eq08_of_a_shifted_student_moves_it_back(r, expected):
    """The same for every x: a step along -e moves the mean of 1.4 towards the teacher's 1.0."""
    e = correction_of(gauss(1.4), 1.4 + STD * normal(50, 3), r, normal(50, 3, seed=1))
    assert torch.allclose(e, torch.full_like(e, expected), atol=1e-6)


@pytest.mark.parametrize("r", [0.2, 0.5, 0.8, 0.95])
def test_eq08_of_the_teachers_data_is_zero(r):
    e = correction_of(gauss(), MEAN + STD * normal(50, 3), r, normal(50, 3, seed=1))
    assert e.abs().max() == 0


def test_eq08_is_a_difference_of_scores():
    """(1 - r) / r e = score of the student's noised data - score of the teacher's."""
    x, n, r = 1.4 + STD * normal(50, 3), normal(50, 3, seed=1), 0.8
    x_r = add_noise(x, 1 - r, r, n)
    e = correction_of(gauss(1.4), x, r, n)
    scores = GaussFlow(1.4, STD).score(x_r, f64(r)) - FLOW.score(x_r, f64(r))
    assert torch.allclose((1 - r) / r * e, scores, atol=1e-6)
    assert torch.allclose(scores, torch.full_like(scores, 0.123077), atol=1e-6)


@pytest.mark.parametrize("std, expected", [(0.25, -0.00359), (0.5, 0.0), (1.0, 0.05430)])
def test_eq08_of_a_student_of_another_width(std, expected):
    """Which of x and n is the image, and how much of each is in x_r, decides these numbers."""
    z, n = normal(400_000, 1), normal(400_000, 1, seed=1)
    e = correction_of(gauss(MEAN, std), MEAN + std * z, 0.8, n)
    assert (z * e).mean().item() == pytest.approx(expected, abs=6e-4)


def test_eq08_aux_is_not_guided():
    """It describes a student that is guided already. Of two equal networks, guidance is left."""
    teacher, aux = gauss(TWO_MEANS), gauss(TWO_MEANS)
    x, n, r = normal(6, 3), normal(6, 3, seed=1), full(0.5, 6)
    cond = labels(*[1] * 6)
    e = flowmap.correction_error(aux, teacher, x, r, n, cond, 3.0, 0.7)
    x_r = add_noise(x, 0.5, 0.5, n)
    c, u = conditional(teacher, x_r, r), unconditional(teacher, x_r, r)
    assert torch.allclose(e, -2 * (c - u), atol=1e-12)
    assert len(aux.inputs) == 1


# ---- (9): balance --------------------------------------------------------------------------------


def mean_norm(e):
    return e.flatten(1).square().mean(1).sqrt().mean()


def test_eq09_both_parts_become_equally_large():
    g, e = normal(5, 3, 2), 0.1 * normal(3, 3, 2, seed=1)
    lam = flowmap.balance(g, e, 1)
    assert mean_norm(lam * e).item() == pytest.approx(mean_norm(g).item(), rel=1e-5)


def test_eq09_the_size_of_e_does_not_matter():
    g, e = normal(5, 3, 2), 0.1 * normal(3, 3, 2, seed=1)
    found = flowmap.balance(g, 10 * e, 1) * 10 * e
    assert torch.allclose(found, flowmap.balance(g, e, 1) * e)


def test_eq09_lambda_of_several_processes_is_that_of_one(monkeypatch):
    """Means over the samples of all processes, which need not have equally many."""
    g, e = normal(12, 3), normal(4, 3, seed=1)
    parts = [(g[:5], e[:3]), (g[5:], e[3:])]
    sums = []
    monkeypatch.setattr(flowmap, "all_reduce", lambda a: sums.append(a.clone()))
    for part in parts:
        flowmap.balance(*part, 2)
    monkeypatch.setattr(flowmap, "all_reduce", lambda a: a.copy_(sums[0] + sums[1]))
    for part in parts:
        assert torch.allclose(flowmap.balance(*part, 2), flowmap.balance(g, e, 1))


def test_eq09_lambda_of_a_correction_of_zero():
    g = normal(6, 3)
    lam = flowmap.balance(g, 0 * g, 1)
    assert lam.item() == pytest.approx(1e8 * g.square().mean(1).sqrt().mean().item())


# ---- (10), (11): losses --------------------------------------------------------------------------


def test_eq10_gradient_is_g_over_numel():
    u_avg, g = normal(4, 3).requires_grad_(), normal(4, 3, seed=1).requires_grad_()
    flowmap.student_loss(u_avg, g).backward()
    assert torch.allclose(u_avg.grad, g / 12)
    assert g.grad is None


def aux_gradients(a, b):
    """Gradients of (11) in a, b at r = 0.6, for aux = a x_r + b and images of mean 1.4."""
    x, n, r = 1.4 + STD * normal(400_000, 1), normal(400_000, 1, seed=1), 0.6
    a, b = f64(a).requires_grad_(), f64(b).requires_grad_()
    prediction = a * add_noise(x, 1 - r, r, n) + b
    flowmap.aux_loss(prediction, x, n).backward()
    return a.grad, b.grad


def test_eq11_optimum():
    slope, offset = aux_gradients(-1.25, 2.1)  # of least squares, E[x - n | x_r]
    assert abs(slope) < 0.01
    assert abs(offset) < 0.01


def test_eq11_beside_the_optimum():
    slope, _ = aux_gradients(-1.15, 2.1)
    assert slope > 0.03


# ---- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch, count", [(64, 16), (32, 16), (8, 0), (8, 8), (10, 3), (1000, 700)])
def test_spread_rows(batch, count):
    assert flowmap.spread_rows(count, batch).sum() == count


def test_spread_rows_gives_all_processes_the_same_share():
    assert [int(part.sum()) for part in flowmap.spread_rows(16, 64).split(8)] == [2] * 8


def uniform(n):
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_durations():
    d = flowmap.durations(uniform(100_000))
    assert (d == 1).double().mean().item() == pytest.approx(0.1, abs=3e-3)
    assert d[d < 1].mean().item() == pytest.approx(0.5, abs=3e-3)
    assert d.max() == 1


def test_durations_of_steps():
    d = flowmap.durations(uniform(100_000), 4)
    assert d.unique().tolist() == [0.25, 0.5, 0.75, 1.0]
    # a quarter of the uniform ones is rounded up to 1 as well
    assert (d == 1).double().mean().item() == pytest.approx(0.1 + 0.9 / 4, abs=5e-3)
    assert flowmap.durations(torch.zeros(1), 4) == 0.25


def test_random_guidance():
    draw = BatchRandom(0, 0, 10_000)
    assert flowmap.random_guidance(draw, 1.5, 1.5) == 1.5
    w = flowmap.random_guidance(draw, 1.0, 3.0)
    assert (w.min(), w.max()) == (pytest.approx(1.0, abs=1e-2), pytest.approx(3.0, abs=1e-2))
    assert w.mean().item() == pytest.approx(2.0, abs=2e-2)


def test_take():
    cond, w = flowmap.take(torch.tensor([2, 0]), labels(5, 6, 7), f64(1, 2, 3))
    assert cond["labels"].tolist() == [7, 5]
    assert w.tolist() == [3, 1]
    assert flowmap.take(torch.tensor([2, 0]), {}, 1.5) == ({}, 1.5)


# ---- distance to the teacher's path --------------------------------------------------------------


@pytest.mark.parametrize("i", [50, 100, 199])
def test_teacher_path_follows_the_ode(i):
    z = normal(6, 3)
    path = flowmap.teacher_path(gauss(), z, {}, 1, 200)
    assert torch.equal(path[0], z)
    assert torch.allclose(path[i], exact_state(z, f64(i / 200)), atol=0.02)


class TeachersImage(Average):
    """A student with the teacher's states, of each noise itself or (flip) of another one."""

    def __init__(self, teacher, flip):
        super().__init__(lambda z, d: (self.state(z, d) - z) / d)
        self.teacher, self.flip = teacher, flip
        self.classes, self.shape, self.encode = teacher.classes, teacher.shape, teacher.encode

    def state(self, z, d):
        cond = self.teacher.encode(torch.zeros(len(z), dtype=torch.int64))
        path = flowmap.teacher_path(self.teacher, z, cond, 1.0, flowmap.PATH_STEPS)
        state = path[round(float(d.flatten()[0]) * flowmap.PATH_STEPS)]
        return state.flip(0) if self.flip else state


ARGS = types.SimpleNamespace(seed=0, cfg=1.0)


def test_path_distance_of_a_perfect_student():
    teacher = load_teacher("toy")
    distance = flowmap.PathDistance(teacher, ARGS, 250)
    found = distance(TeachersImage(teacher, flip=False))
    assert list(found) == ["0.25", "0.5", "0.75", "1.0"]
    assert max(found.values()) < 1e-10
    assert distance.spread() == pytest.approx(0.51, abs=0.05)


def test_path_distance_of_a_student_that_ignores_the_noise():
    """Two independent images are twice their variance apart."""
    teacher = load_teacher("toy")
    distance = flowmap.PathDistance(teacher, ARGS, 250)
    found = distance(TeachersImage(teacher, flip=True))
    assert found["1.0"] > 1.5 * distance.spread()


# ---- a run: who is trained when, by which gradient -----------------------------------------------
# A Trace calls the second network that is trained "critic": here it is aux.

ROUTES = {  # flags -> roles of the steps of an iteration
    "": ["student", "critic"],
    "--euler-steps 8 --cfg 2": ["student", "critic"],
    "--ratio 2 --cfg-range 0 2 --ema 1000": ["student", "critic", "critic"],
    "--correction 1": ["student", "critic"],
    "--correction 0": ["student"],
}


@pytest.mark.parametrize("flags", ROUTES)
def test_eq10_eq11_gradient_routing(trace, flags):
    steps = trace(flowmap, "--iters", 3, *flags.split())
    assert [step.role for step in steps] == ROUTES[flags] * 3
    for step in steps:
        for net in step.grads:
            assert step.has_grad(net) == (net == step.role), net
        assert None not in step.grads[step.role]
        assert {net for net in step.before if step.moved(net)} <= {step.role}
    for step, following in zip(steps, steps[1:]):
        for net in step.after:
            assert torch.equal(step.after[net], following.before[net]), net
    assert not any(p.requires_grad for p in steps.teacher.parameters())


@pytest.mark.parametrize("flags", [flags for flags in ROUTES if "--correction" not in flags])
def test_every_step_moves_its_network(trace, flags):
    for step in trace(flowmap, "--iters", 3, *flags.split()):
        assert step.moved(step.role)


def test_eq09_the_two_parts_add(trace, monkeypatch):
    """lambda = 0 is prediction alone, and the correction's gradient is linear in lambda."""

    def second_gradient(factor):
        patched = lambda g, e, world: factor * balance(g, e, world)
        with monkeypatch.context() as patch:
            patch.setattr(flowmap, "balance", patched)
            fixed = ["--cfg", 2, "--lr", 0, "--weight-decay", 0]
            return trace(flowmap, "--iters", 2, *fixed)[2].flat_grad()

    balance = flowmap.balance
    none, half, full = second_gradient(0), second_gradient(0.5), second_gradient(1)
    assert torch.allclose(full - none, 2 * (half - none), atol=1e-6)
    assert (full - none).norm() > 1e-4


def test_eq09_lambda_is_1_without_a_prediction(trace):
    assert [line["lambda"] for line in trace(flowmap, "--iters", 2, "--correction", 1).logs] == [
        1,
        1,
    ]


def test_range_of_guidance_reaches_student_and_aux(trace):
    steps = trace(flowmap, "--iters", 3, "--cfg", 2, "--cfg-range", 1, 3)
    student, aux = steps.trained
    assert list(student.extras) == ["duration", "guidance"]
    assert list(aux.extras) == ["guidance"]
    z, cond = torch.randn(8, 2), steps.teacher.encode(torch.arange(8))
    images = [flowmap.sample(student, z, cond, w=w) for w in (1.0, 3.0)]
    assert (images[0] - images[1]).abs().max() > 1e-5


def test_without_a_range_guidance_is_no_input(trace):
    student, aux = trace(flowmap, "--iters", 1).trained
    assert list(student.extras) == ["duration"]
    assert list(aux.extras) == []


def test_both_parts_must_have_samples_in_each_process(trace):
    for share in (0.1, 0.9):
        with pytest.raises(UserError, match="expected at least 10 samples per process.*found 8"):
            trace(flowmap, "--correction", share, "--batch", 8)


# ---- whole iterations by hand --------------------------------------------------------------------


class Hand:
    """(1) to (11) from the docstring, on 2-D points with labels 0 to 7 and 8 for none.

    least: of t, from the least noise of the teacher's schedule, or 1e-3.
    """

    def __init__(self, trace, least=0.01 / 1.01, **case):
        fixed = dict(w=1.0, low=None, high=None, correction=0.25, euler=None, k=1.0, eps=1.0)
        case = fixed | dict(mean=0.8, guided=0.7, ratio=1) | case
        self.trace, self.least = trace, least
        self.low, self.high = case.pop("low") or case["w"], case.pop("high") or case["w"]
        self.is_range = self.low < self.high
        vars(self).update(case)
        ends = [int(i * self.correction) for i in range(17)]
        self.corrected = torch.tensor([b > a for a, b in zip(ends, ends[1:])])
        self.logs = []

    def scale(self, draw):
        """w of a batch."""
        if not self.is_range:
            return torch.full((16,), self.w, dtype=torch.float64)
        return self.low + (self.high - self.low) * draw.rand()

    def inputs(self, labels, w):
        cond = dict(labels=labels)
        return cond | dict(guidance=(w - 1) / 4) if self.is_range else cond

    def u_avg(self, z, d, labels, w):
        cond = self.inputs(labels, w) | dict(duration=0.375 * d)
        return self.trace.student(z, 0.0, 1.0, cond) - z  # (3)

    def u(self, net, x, t, cond):
        t = t.clamp(min=self.least)
        return ((net(x, 1 - t, t, cond).double() - x) / t[:, None]).float()  # (1)

    def u_w(self, x, t, labels, w):
        c = self.u(self.trace.teacher, x, t, dict(labels=labels))
        null = self.u(self.trace.teacher, x, t, dict(labels=torch.full_like(labels, 8)))
        return (null + w[:, None] * (c - null)).float()  # (2)

    def state(self, z, d, u_avg):
        return (z + d[:, None] * u_avg).float()  # (4)

    def prediction(self, z, d, labels, w):
        def of_d(d):
            return self.u_avg(z, d, labels, w)

        if self.euler is None:
            u_avg, slope = torch.autograd.functional.jvp(of_d, d, torch.ones_like(d))
            u = self.u_w(self.state(z, d, u_avg), 1 - d, labels, w)
            e = u_avg + d[:, None] * slope - u  # (5)
        else:
            before = (d - 1 / self.euler).clamp(min=0)
            u_before = of_d(before)
            u = self.u_w(self.state(z, before, u_before), 1 - before, labels, w)
            way = before[:, None] * u_before + (d - before)[:, None] * u
            e = of_d(d) - way / d[:, None]  # (6)
        return e

    def correction_of(self, x, r, n, labels, w):
        x_r = (x + r[:, None] * (n - x)).float()
        fake = self.u(self.trace.networks()["critic"], x_r, r, self.inputs(labels, w))
        return fake - self.u_w(x_r, r, labels, torch.where(r > self.guided, 1.0, w))  # (8)

    def losses(self, it):
        draw, C = BatchRandom(3, it, 16), self.corrected
        one = torch.ones(16, dtype=torch.float64)
        norm = lambda e: (e**2).mean(1).sqrt().mean()
        self.logs.append({})

        def student():
            z, labels, w = draw.randn(2), draw.randint(0, 8), self.scale(draw)
            d = (draw.rand() / 0.9).clamp(max=1)  # a tenth of the durations is 1
            if self.euler is not None:
                d = (d * self.euler).ceil().clamp(min=1) / self.euler
            r, n = (self.mean + draw.randn().double()).sigmoid(), draw.randn(2)
            d = torch.where(C, one, d)
            u_avg, g = self.u_avg(z, d, labels, w), torch.zeros(16, 2, dtype=torch.float64)
            x = self.state(z, one, self.u_avg(z, one, labels, w)).detach()
            if not C.all():
                e = self.prediction(z[~C], d[~C], labels[~C], w[~C]).detach().double()
                g[~C] = e / ((e**2).mean(1, keepdim=True) + self.eps) ** self.k  # (7)
                self.logs[-1]["prediction"] = (e**2).mean()
            if C.any():
                e = self.correction_of(x[C], r[C], n[C], labels[C], w[C]).detach().double()
                lam = 1.0 if C.all() else norm(g[~C]) / norm(e)
                g[C] = lam * e  # (9)
                self.logs[-1] |= {"correction": (e**2).mean(), "lambda": lam}
            return (u_avg * g).mean()  # (10)

        def aux():
            labels, w = draw.randint(0, 8), self.scale(draw)
            z, n, r = draw.randn(2), draw.randn(2), draw.rand()
            x = self.state(z, one, self.u_avg(z, one, labels, w)).detach()
            x_r = (x + r[:, None] * (n - x)).float()
            prediction = self.u(self.trace.networks()["critic"], x_r, r, self.inputs(labels, w))
            loss = ((prediction - (x - n)) ** 2).mean()  # (11)
            self.logs[-1] |= dict(aux=loss, std=x.std())
            return loss

        return [("student", student)] + [("critic", aux)] * (self.ratio if C.any() else 0)


# flags -> what they say, and the schedule of the teacher (default: EDM's, that of the toy)
BY_HAND = {
    "--cfg 2.5 --euler-steps 4 --k 0.5 --correction 0.5": dict(
        w=2.5, euler=4, k=0.5, correction=0.5
    ),
    "--euler-steps 3 --cfg-range 1 3 --eps 0.01": dict(
        low=1.0, high=3.0, euler=3, eps=0.01, kind="flow"
    ),
    "--correction 1 --cfg 2 --ratio 2": dict(w=2.0, correction=1, ratio=2, trigkind="flow"),
    "--cfg 2 --r-mean -0.3 --r-guided 0.4 --eps 0.05 --ratio 2 --lora 4 --lora-fake 2": dict(
        w=2.0, mean=-0.3, guided=0.4, eps=0.05, ratio=2
    ),
    "--cfg 2 --cfg-range 0.5 3": dict(w=2.0, low=0.5, high=3.0, kind="vp"),
    "--correction 0 --cfg 2 --k 2": dict(w=2.0, correction=0, k=2.0, kind="flow"),
    "": {},
}
# sigma / alpha of the cleanest level; of this VP schedule it is a third
LEAST = dict(edm=0.01, vp=(0.1 / 0.9) ** 0.5, flow=0.0, trigflow=0.0)


@pytest.mark.parametrize("flags", BY_HAND)
def test_whole_iterations_by_hand(trace, monkeypatch, tmp_path, flags):
    """(1) to (11): gradients of student and aux, AdamW's updates and the average of it."""
    common = "--iters 4 --seed 3 --lr 3e-3 --lr-fake 2e-3 --betas 0.3 0.8 --weight-decay 0.1"
    common += " --clip 0.1 --warmup 2 --cooldown 0.6 --ema 3"
    case = dict(BY_HAND[flags])
    kind = case.pop("kind", "edm")
    teacher = byhand.any_toy(kind)
    if kind == "vp":
        teacher.schedule = VP(20, 0.1, 0.3, "linear")
    monkeypatch.setattr(flowmap, "load_teacher", lambda *args, **kwargs: teacher)
    seeds = byhand.start_awake(monkeypatch)
    wrapped = byhand.wrap_trained(monkeypatch)
    flags = [*common.split(), *flags.split()]
    errors = ["prediction_error", "euler_error", "correction_error"]
    record = [(flowmap, name) for name in ("Report", *errors)]
    steps = trace(flowmap, *flags, record=record)
    found = [call.result for name in errors for call in steps.calls[name]]
    assert not any(e.requires_grad for e in found)  # no graph is kept for a g that has none

    ratio = LEAST[kind]
    hand = Hand(steps, max(ratio / (1 + ratio), 1e-3), **case)
    factors = byhand.rates(1.0, 4, warmup=2, cooldown=0.6)
    rates = dict(
        student=[3e-3 * f for f in factors],
        critic=[2e-3 * f for f in factors for _ in range(hand.ratio)],
    )
    optimisers = {role: byhand.AdamW(lr, (0.3, 0.8), 0.1, 0.1) for role, lr in rates.items()}
    assert byhand.compare_iterations(steps, hand.losses, optimisers, 1e-4) == 4
    lines = log(tmp_path / "out")
    byhand.compare_logs(lines, hand.logs)
    for i, line in enumerate(lines):
        lr, lr_fake = rates["student"][i], rates["critic"][i * hand.ratio]
        assert (line["lr"], line["lr_fake"]) == pytest.approx((lr, lr_fake), rel=1e-5)
        assert ("prediction" in line, "correction" in line) == (
            hand.correction < 1,
            hand.correction > 0,
        )
    assert set(seeds) == {3}  # embeddings are equal on all processes

    # gradients flow through what run.train returns, other passes do not
    turns = 4 * hand.ratio * (hand.correction > 0)
    assert [net.calls for net in wrapped] == [{True: 4, False: 0}, {True: turns, False: 0}]

    # the student is the average, sampled with the guidance of --cfg
    last = byhand.average([step for step in steps if step.role == "student"], 3, 16)
    average = steps.ema.model
    found = torch.cat([p.detach().flatten() for p in average.parameters()]).double()
    assert byhand.difference(found, last) < 1e-6
    x, noise, cond = byhand.samples_of_record(steps.calls["Report"][0].result)
    steps.ema.live, z, one = average, noise(), torch.ones(6, dtype=torch.float64)
    w = torch.full((6,), hand.w, dtype=torch.float64)
    expected = hand.state(z, one, hand.u_avg(z, one, cond["labels"], w))  # (4)
    assert byhand.difference(x, expected) < 1e-5


def test_distance_to_the_teachers_path_by_hand(trace, tmp_path):
    """path.json: the average against Euler's path of the teacher, from the same noise."""
    flags = "--iters 2 --seed 3 --cfg 2 --cfg-range 1 3 --ema 3 --lr 1e-2 --eval-n 40"
    steps = trace(flowmap, *flags.split())
    steps.ema.live = steps.ema.model
    hand = Hand(steps, w=2.0, low=1.0, high=3.0)
    z, labels, two = PerImageNoise(3, range(40))(2), torch.arange(40) % 8, full(2.0, 40)
    path = [z]
    for i in range(32):
        u = hand.u_w(path[-1], full(1 - i / 32, 40), labels, two)
        path.append(path[-1] + u / 32)
    expected = dict(spread=path[-1].var(0).mean().item(), steps=32, n=40, cfg=2.0)
    for d in (0.25, 0.5, 0.75, 1.0):
        x = hand.state(z, full(d, 40), hand.u_avg(z, full(d, 40), labels, two))
        expected[str(d)] = (x - path[int(32 * d)]).square().mean().item()
    assert read_json(tmp_path / "out" / "path.json") == pytest.approx(expected, rel=1e-4)


def at_the_image(average_velocity):
    return lambda student, z, d, cond, w: average_velocity(student, z, d * 0 + 1, cond, w)


def guided_at_all_r(correction_error):
    return lambda *args: correction_error(*args[:-1], 1.0)


def of_the_noise(sample):
    return lambda student, z, cond, **kwargs: z


def not_weighted(weighted):
    return lambda e, k, eps: e


BROKEN = {
    "average_velocity": at_the_image,
    "correction_error": guided_at_all_r,
    "sample": of_the_noise,
    "weighted": not_weighted,
}


@pytest.mark.parametrize("name", BROKEN)
def test_by_hand_notices(trace, monkeypatch, tmp_path, name):
    """The comparison fails when the run uses a wrong function."""
    monkeypatch.setattr(flowmap, name, BROKEN[name](getattr(flowmap, name)))
    with pytest.raises(AssertionError, match="student|critic"):
        test_whole_iterations_by_hand(trace, monkeypatch, tmp_path, "--cfg 2 --cfg-range 0.5 3")


# ---- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["toy", "mnist", "sdxl"])
def test_defaults_are_the_papers(teacher):
    args = flowmap.parse_args(["--teacher", teacher])
    assert args.nfe == 1
    assert args.euler_steps is None
    assert (args.correction, args.k) == (0.25, 1.0)
    assert (args.r_mean, args.r_guided) == (0.8, 0.7)


@pytest.mark.parametrize("teacher, factor", [("toy", 1), ("mnist", 2), ("sdxl", 1)])
def test_rates_of_the_presets(teacher, factor):
    args = flowmap.parse_args(["--teacher", teacher])
    assert args.lr_fake == factor * args.lr


def test_range_of_guidance_of_the_presets():
    assert flowmap.parse_args(["--teacher", "dit-xl-256"]).cfg_range == (1.0, 3.0)
    assert flowmap.parse_args(["--teacher", "mnist", "--cfg", "2"]).cfg_range == (2.0, 2.0)
