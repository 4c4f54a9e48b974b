"""anyflow.py: its equations on Gaussians whose velocity and flow map are known, then whole
iterations of a run computed a second time.

Expected numbers were derived apart from the code.
"""

import pytest
import torch
from helpers import byhand
from helpers.frame import check_frame
from helpers.gaussian import Gauss, GaussFlow, f64, full, normal
from helpers.trace import Trace

import anyflow
import dmd2
from common.errors import UserError
from common.rng import BatchRandom
from common.schedules import EDM, Flow, expand
from common.teachers.toy import MLP, Toy
from data.images import Images

GAUSS = GaussFlow(1.0, 0.5)


class Exact:
    """The exact mean velocity as a network: (x_t, alpha, sigma, cond) -> clean estimate."""

    schedule = Flow()
    dtype = torch.float64

    def __init__(self, data=GAUSS):
        self.data = data

    def __call__(self, x, alpha, sigma, cond):
        t = sigma.expand(len(x))
        v = self.data.mean_velocity(x, t, torch.minimum(cond["r"][:, 0], t))
        return x - expand(t, x) * v


class Constant:
    """Its mean velocity is one number everywhere, a parameter."""

    def __init__(self, value=0.3):
        self.value = f64(value).requires_grad_()
        self.calls = 0

    def __call__(self, x, alpha, sigma, cond):
        self.calls += 1
        return x - expand(sigma, x) * self.value


def tiny():
    """An untrained small network, on the toy's points."""
    torch.manual_seed(0)
    return Toy(MLP(width=16, depth=2), Flow(), "flow", (2,), 8, labelled=True)


@pytest.fixture
def trace(monkeypatch, tmp_path):
    def run(*flags, **kwargs):
        return Trace(monkeypatch, anyflow, tmp_path / "out", *flags, **kwargs)

    return run


# ---- (1) to (3): the two times -------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, t, r, expected",
    [
        (1.0, 0.25, 0.25, -0.923077),
        (1.0, 0.5, 0.5, -0.4),
        (1.0, 0.75, 0.75, -0.108108),
        (1.0, 1.0, 1.0, 0.0),
        (1.0, 1.0, 0.0, -0.5),
        (1.0, 0.8, 0.2, -0.406267),
        (-0.5, 0.9, 0.3, -1.488592),
    ],
)
def test_eq02_numbers(x, t, r, expected):
    found = anyflow.velocity(Exact(), full(x, 1)[:, None], full(t, 1), full(r, 1), {})
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_eq01_a_jump_of_the_exact_map_follows_the_ode():
    x = normal(50, 3)
    found = anyflow.jump(Exact(), x, 0.8, 0.3, {})
    assert (found - GAUSS.flow_map(x, f64(0.8), f64(0.3))).abs().max() < 1e-12


def test_eq03_without_distance_the_second_time_is_not_seen():
    """r = t: the network's own velocity, whatever E2 has learnt; r < t: another one."""
    teacher = tiny()
    student = byhand.wake(teacher.copy().extend("r"))
    x, t = normal(8, 2).float(), torch.linspace(0.1, 1, 8, dtype=torch.float64)
    cond = teacher.encode(torch.arange(8))
    plain = student.with_network(student.net)  # without the new input
    same = anyflow.velocity(student, x, t, t, cond)
    assert torch.equal(same, anyflow.velocity(plain, x, t, t, cond))
    other = anyflow.velocity(student, x, t, 0.3 * t, cond)
    assert (other - same).abs().amax(1).min() > 1e-4


def test_eq03_the_student_starts_as_the_teachers_velocity():
    teacher = tiny()
    student = teacher.copy().extend("r")
    x, t = normal(8, 2).float(), torch.linspace(0.1, 1, 8, dtype=torch.float64)
    cond = teacher.encode(torch.arange(8))
    assert torch.equal(
        anyflow.velocity(student, x, t, 0 * t, cond), anyflow.velocity(teacher, x, t, t, cond)
    )


# ---- (4): times ----------------------------------------------------------------------------------


def test_eq04_grids():
    assert anyflow.jump_times(2, 5.0).tolist() == pytest.approx([1, 0.8333333, 0])
    expected = [1, 0.9375, 0.8333333, 0.625, 0]
    assert anyflow.jump_times(4, 5.0).tolist() == pytest.approx(expected)
    assert anyflow.jump_times(4, 1.0, 0.5).tolist() == [0.5, 0.375, 0.25, 0.125, 0]
    assert anyflow.jump_times(1, 5.0, 0.8).tolist() == [0.8, 0]


def test_eq04_eq10_times_of_a_batch():
    """Places 0, 2 r = t; 1 r = 0; 3 any r; the larger of two uniform numbers is t, shifted."""
    draw = BatchRandom(0, 0, 400_000)
    t, r = anyflow.map_times(draw.rand(), draw.rand(), 0, 5.0)
    place = torch.arange(400_000) % 4
    assert (r == t)[place % 2 == 0].all()
    assert (r == 0)[place == 1].all()
    assert ((0 < r) & (r < t))[place == 3].all()
    assert t.median().item() == pytest.approx(0.923495, abs=1e-3)
    assert t.mean().item() == pytest.approx(0.87646, abs=1e-3)
    assert (t > 0.9).double().mean().item() == pytest.approx(0.586735, abs=3e-3)
    free = place == 3
    assert r[free].mean().item() == pytest.approx(0.61754, abs=3e-3)
    assert (t - r)[free].mean().item() == pytest.approx(0.25892, abs=3e-3)
    u = f64(0.2, 0.9, 0.5, 0.4, 0.7)
    w = f64(0.6, 0.1, 0.3, 0.8, 0.9)
    t, r = anyflow.map_times(u, w, 2, 1.0, 0.5)  # from place 2 of the global batch
    assert t.tolist() == pytest.approx([0.3, 0.45, 0.25, 0.4, 0.45])
    assert r.tolist() == pytest.approx([0.3, 0.05, 0.25, 0.0, 0.45])


@pytest.mark.parametrize(
    "shift, expected",
    [
        (5.0, [0.34694, 1.29298, 1.40762, 1.04083, 0.36205, 0]),
        (1.0, [0.35577, 1.32586, 1.44341, 1.06730, 0.37126, 0]),
    ],
)
def test_eq08_weight(shift, expected):
    t = f64(0.1, 0.5, 2 / 3, 0.9, 0.99, 1)
    assert anyflow.time_weight(t, shift).tolist() == pytest.approx(expected, abs=1e-5)
    grid = anyflow.jump_times(1000, shift)[:-1]
    assert anyflow.time_weight(grid, shift).mean().item() == pytest.approx(1)


# ---- (5) to (9): the flow map --------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, t, r, residual", [(-0.5, 0.7, 0.2, -1.112e-5), (0.4, 0.5, 0.1, 1.031e-6)]
)
def test_eq06_eq07_the_exact_map_is_the_fixed_point(x, t, r, residual, monkeypatch):
    """F + (t - r) dF = v but for the error of the difference, which is of second order."""
    x, t, r = full(x, 1)[:, None], full(t, 1), full(r, 1)
    v = GAUSS.velocity(x, t)
    F = GAUSS.mean_velocity(x, t, r)
    for eps, factor in ((0.005, 1.0), (0.01, 4.0), (0.001, 1 / 25)):
        monkeypatch.setattr(anyflow, "EPS", eps)
        target = anyflow.map_target(v, anyflow.slope(Exact(), x, v, t, r, {}), t, r)
        assert (F - target).item() == pytest.approx(residual * factor, rel=0.02)


@pytest.mark.parametrize("t, r", [(1.0, 0.0), (0.5, 0.4995), (0.9, 0.898)])
def test_eq06_no_network_is_asked_beyond_the_ends(t, r):
    """Above T or below r: the difference is then taken on what is left."""
    seen = []

    class Net(Exact):
        def __call__(self, x, alpha, sigma, cond):
            seen.append((sigma, x))
            assert (cond["r"][:, 0] == r).all()
            return super().__call__(x, alpha, sigma, cond)

    x, v = full(0.4, 1)[:, None], full(2.0, 1)[:, None]
    dF = anyflow.slope(Net(), x, v, full(t, 1), full(r, 1), {}, T=1.0)
    (high, x_high), (low, x_low) = seen
    assert high.item() == pytest.approx(min(t + 0.005, 1.0))
    assert low.item() == pytest.approx(max(t - 0.005, r))
    assert (x_high - x).item() == pytest.approx(2 * (high.item() - t))
    assert (x_low - x).item() == pytest.approx(2 * (low.item() - t))
    step = 1e-4
    ends = [
        GAUSS.mean_velocity(x + s * v, full(min(t + s, 1.0), 1), full(r, 1)).item()
        for s in (step * (t < 1), -step)
    ]
    expected = (ends[0] - ends[1]) / (step * (1 + (t < 1)))
    assert dF.item() == pytest.approx(expected, rel=0.02)


def test_eq06_is_in_float32(monkeypatch):
    """Also in a run in bf16; the network's dtype comes back, after an error too."""
    teacher = tiny()
    student = teacher.copy().extend("r")
    student.dtype = torch.bfloat16
    seen = []

    def spy(net, x_t, t, r, cond):
        seen.append(net.dtype)
        if len(seen) == 3:
            raise KeyError
        return x_t

    monkeypatch.setattr(anyflow, "velocity", spy)
    args = (student, normal(2, 2), normal(2, 2), full(0.5, 2), full(0.1, 2), {})
    anyflow.slope(*args)
    assert seen == [torch.float32] * 2
    assert student.dtype == torch.bfloat16
    with pytest.raises(KeyError):
        anyflow.slope(*args)
    assert student.dtype == torch.bfloat16


def test_eq05_of_data_is_right_on_average():
    """x and z of all x_t: y - F* has no slope in x_t; its spread is larger near the diagonal."""
    n = 400_000
    x, z = 1 + 0.5 * normal(n, 1), normal(n, 1, seed=1)
    for t, r, spread in ((0.7, 0.2, 0.436306), (0.7, 0.7, 0.698430)):
        t, r = full(t, n), full(r, n)
        x_t = (1 - t[:, None]) * x + t[:, None] * z
        v = anyflow.data_velocity(None, x, z, x_t, t, {}, 1)
        assert torch.equal(v, z - x)
        dF = anyflow.slope(Exact(), x_t, v, t, r, {}) if r[0] < t[0] else torch.zeros_like(x)
        error = anyflow.map_target(v, dF, t, r) - GAUSS.mean_velocity(x_t, t, r)
        centred = x_t - x_t.mean()
        assert abs((error * centred).mean() / centred.square().mean()) < 5e-3
        assert abs(error.mean()) < 3e-3
        assert error.std().item() == pytest.approx(spread, rel=0.01)


def test_eq05_guidance():
    """Of the teacher u + w (c - u); of data that, with the student's own estimates at r = t."""
    teacher = Gauss(f64(0.0, 1.0), f64(0.5, 0.5))  # label 0 is unconditional
    x_t, t = normal(6, 2), torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    cond = dict(labels=torch.ones(6, dtype=torch.int64))
    c, u = (GaussFlow(m, 0.5).velocity(x_t, t) for m in (1.0, 0.0))
    found = anyflow.teacher_velocity(teacher, x_t, t, cond, 3.0)
    assert (found - (u + 3 * (c - u))).abs().max() < 1e-12
    x, z = normal(6, 2, seed=1), normal(6, 2, seed=2)
    found = anyflow.data_velocity(teacher, x, z, x_t, t, cond, 3.0)
    assert (found - (z - x + 2 * (c - u))).abs().max() < 1e-12
    dropped = dict(labels=torch.zeros(6, dtype=torch.int64))  # these rows are not guided
    found = anyflow.data_velocity(teacher, x, z, x_t, t, dropped, 3.0)
    assert (found - (z - x)).abs().max() < 1e-12


def test_eq07_weighted_error_and_gradient():
    prediction, target = normal(4, 3, 2).float().requires_grad_(), normal(4, 3, 2, seed=1).float()
    weight = f64(0.5, 1, 2, 0)
    each = anyflow.squared_error(prediction, target, weight)
    expected = weight * (prediction - target).square().mean((1, 2))
    assert torch.allclose(each, expected)
    each.sum().backward()
    expected = weight[:, None, None] * 2 * (prediction - target) / 6
    assert torch.allclose(prediction.grad.double(), expected.double(), atol=1e-6)


def test_eq07_target_has_no_gradient():
    v = normal(2, 2).requires_grad_()
    assert not anyflow.map_target(v, v, full(0.5, 2), full(0.1, 2)).requires_grad


@pytest.mark.parametrize("weight, expected", [(1.0, 0.599994), (0.01, 0.599401)])
def test_eq09_balanced_rows_pull_alike_whatever_their_weight(weight, expected):
    """Value m l / (l + 1e-5); the gradient is that of m log l."""
    w = f64(2.0).requires_grad_()
    each = torch.stack([f64(0.2), f64(0.4), weight * (w - 1) ** 2])
    found = anyflow.balance(each, torch.tensor([True, True, False]))
    assert torch.equal(found[:2], each[:2])
    loss = each[2].item()
    assert found[2].item() == pytest.approx(0.3 * loss / (loss + 1e-5))
    found[2].backward()
    assert w.grad.item() == pytest.approx(expected, abs=1e-6)


def test_eq09_bounded_rows():
    """Small errors pull as they are, and none more than one of 0.1: 0.1 l' / (l + 0.1)."""
    w = f64(1e-6, 0.1, 100.0).requires_grad_()
    each = anyflow.bound(w)
    assert each.tolist() == pytest.approx([1e-6, 0.05, 0.1], rel=2e-3)
    each.sum().backward()
    assert w.grad.tolist() == pytest.approx([1.0, 0.5, 1e-3], rel=2e-3)


def test_eq09_mean_of_all_processes(monkeypatch):
    monkeypatch.setattr(anyflow, "all_reduce", lambda sums: sums.add_(f64(1.0, 2.0)))
    each = f64(0.2, 0.5)
    found = anyflow.balance(each, torch.tensor([True, False]), world=2)
    assert found.tolist() == pytest.approx([0.2, 0.4 * 0.5 / 0.50001])


# ---- (11): rollouts ------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 50])
def test_eq11_every_rollout_of_the_exact_map_ends_at_its_sample(n, shift):
    z = normal(20, 2)
    passes = 0
    for k in range(n):
        times = anyflow.rollout_times(n, k, shift)
        passes += len(times) - 1
        x = anyflow.rollout(Exact(), z, {}, times)
        assert (x - (1 + 0.5 * z)).abs().max() < 1e-12
    expected = {1: 1, 2: 2, 4: 2.5, 8: 2.75, 16: 2.875, 50: 2.96}
    assert passes / n == expected[n]


def test_eq11_times():
    assert anyflow.rollout_times(4, 0, 1.0) == [1, 0.75, 0]
    assert anyflow.rollout_times(4, 1, 5.0) == pytest.approx([1, 0.9375, 0.8333333, 0])
    assert anyflow.rollout_times(4, 3, 1.0, 0.8) == pytest.approx([0.8, 0.2, 0])
    assert anyflow.rollout_times(1, 0, 1.0) == [1, 0]


@pytest.mark.parametrize("n, k", [(1, 0), (2, 1), (4, 1), (50, 17)])
def test_eq11_gradient_through_all_jumps(n, k):
    net = Constant()
    x = anyflow.rollout(net, normal(3, 2), {}, anyflow.rollout_times(n, k, 5.0))
    (grad,) = torch.autograd.grad(x.sum(), net.value)
    assert grad.item() == pytest.approx(-6)  # each of the 6 numbers moves by -1


def test_eq11_the_draw_is_that_of_all_processes():
    times = set()
    for it in range(200):
        draws = [BatchRandom(0, it, 4, rank, 2) for rank in range(2)]
        draws[1].rand()
        found = [tuple(anyflow.random_rollout(draw, [1, 4], 1.0, 1.0)) for draw in draws]
        assert found[0] == found[1]
        times.add(found[0])
    assert times == {(1, 0), (1, 0.75, 0), (1, 0.75, 0.5, 0), (1, 0.5, 0.25, 0), (1, 0.25, 0)}


@pytest.mark.parametrize("nfe", [1, 2, 4, 8])
def test_sample_of_the_exact_map(nfe):
    z = normal(20, 2)
    x = anyflow.sample(Exact(), z, {}, nfe, shift=5.0)
    assert (x - (1 + 0.5 * z)).abs().max() < 1e-12


def test_sample_begins_at_the_teachers_last_level():
    """EDM with sigma 20: T = 20 / 21. The noise there is T z, which a velocity of 0 leaves."""
    net = Constant(0.0)
    net.schedule = EDM(0.01, 20.0, 0.7)
    z = normal(4, 2)
    assert torch.allclose(anyflow.sample(net, z, {}, 1), 20 / 21 * z)
    assert net.calls == 1


# ---- (12) to (15): distribution matching ---------------------------------------------------------


@pytest.mark.parametrize(
    "t, gap", [(0.2, 0.08), (0.5, 0.32), (0.8, 0.393846), (0.95, 0.399723), (1.0, 0.4)]
)
def test_eq12_eq13_of_a_shift(t, gap):
    x = 1.4 + 0.5 * normal(8, 3)
    t = full(t, 8)
    x_t = (1 - t[:, None]) * x + t[:, None] * normal(8, 3, seed=1)
    args = (x, x_t, 1 - t, t, {}, Gauss(1.0, 0.5), Gauss(1.4, 0.5), 1.0)
    g, r, f, norm = anyflow.dm_gradient(*args)
    assert (f - r - gap).abs().max() < 1e-6
    assert torch.allclose(g, (f - r) / norm[:, None])
    assert torch.allclose(norm, (x - r).abs().mean(1))
    assert torch.equal(g, dmd2.dm_gradient(*args)[0])


def test_eq12_guidance_is_the_teachers_alone():
    """Conditional 1.3, unconditional 0.4 at scale 4: 4.0. The critic is not guided."""

    class Net:
        sharding = None
        guided, cond_and_uncond = Gauss.guided, Gauss.cond_and_uncond
        unconditional = Gauss.unconditional
        null = lambda self, n: dict(labels=torch.zeros(n, dtype=torch.int64))

        def __call__(self, x, alpha, sigma, cond):
            return torch.where(cond["labels"] == 1, 1.3, 0.4)[:, None].double()

    cond, x, t = dict(labels=torch.ones(3, dtype=torch.int64)), normal(3, 1), full(0.5, 3)
    _, r, f, _ = anyflow.dm_gradient(x, x, 1 - t, t, cond, Net(), Net(), 4.0)
    assert r.flatten().tolist() == pytest.approx([4.0] * 3)
    assert f.flatten().tolist() == pytest.approx([1.3] * 3)


def test_eq13_zero_over_zero_is_zero():
    x = torch.zeros(2, 2, dtype=torch.float64)
    t = full(0.5, 2)
    g, *_ = anyflow.dm_gradient(x, x, 1 - t, t, {}, Gauss(0.0, 0.5), Gauss(0.0, 0.5), 1.0)
    assert torch.equal(g, x)


def test_eq14_gradient():
    """2 g / numel, without the half of DMD2; the value is the mean square of g."""
    x, g = normal(5, 3).requires_grad_(), normal(5, 3, seed=1)
    loss = anyflow.dm_loss(x, g)
    loss.backward()
    assert loss.item() == pytest.approx(g.square().mean().item())
    assert (x.grad - 2 * g / 15).abs().max() < 1e-15


@pytest.mark.parametrize("t, floor", [(0.5, 0.8), (0.8, 0.384615), (1.0, 0.25)])
def test_eq15_of_the_best_critic(t, floor):
    """s^2 / (t^2 + (1 - t)^2 s^2), and more for any other. x, z = +-1 have the moments needed."""
    z, unit = f64([1.0, 1, -1, -1])[:, None], f64([1.0, -1, 1, -1])[:, None]
    x = 1 + 0.5 * unit
    t = full(t, 4)
    x_t = (1 - t[:, None]) * x + t[:, None] * z

    def loss(std):
        prediction = anyflow.velocity(Exact(GaussFlow(1.0, std)), x_t, t, t, {})
        return anyflow.critic_loss(prediction, x, z).item()

    assert loss(0.5) == pytest.approx(floor, abs=1e-6)
    if t[0] < 1:
        assert min(loss(0.45), loss(0.55)) > loss(0.5)


# ---- whole iterations by hand --------------------------------------------------------------------


class Hand:
    """(1) to (15) from the docstring, on points with labels 0 to 7 and 8 for none."""

    def __init__(self, trace, images, **case):
        fixed = dict(w=1.0, w_dm=1.0, s=1.0, first=2, data=False, balance=False, rollouts=[1, 4])
        self.trace, self.images, self.jumps_with_graph = trace, images, 0
        vars(self).update(fixed | case)
        self.T = {"edm": 20 / 21, "flow": 1.0, "trigflow": 1.0}[case.get("kind", "edm")]
        self.logs = []

    def S(self, u):
        return self.T * self.s * u / (1 + (self.s - 1) * u)

    def F(self, net, x, t, r, labels):
        """(2), (3); the teacher and the critic do not see r."""
        cond = dict(labels=labels, r=torch.stack([r, t - r], 1))
        xhat = net(x.float(), 1 - t, t, cond)
        return (x.double() - xhat) / t[:, None]

    def times(self, draw):
        n = self.rollouts[draw.shared_randint(0, len(self.rollouts))]
        k = draw.shared_randint(0, n)
        times = [self.S(1 - i / n) for i in (0, k, k + 1, n)]
        return [t for t, before in zip(times, [None, *times]) if t != before]

    def jumps(self, net, draw, labels, times):
        x = (times[0] * draw.randn(2)).double()
        for t, r in zip(times, times[1:]):
            t, r = full(t, 16), full(r, 16)
            x = x - (t - r)[:, None] * self.F(net, x, t, r, labels)  # (1)
        return x  # (11)

    def guided(self, net, x_t, t, labels, w):
        c, u = (
            net(x_t.float(), 1 - t, t, dict(labels=given, r=torch.stack([t, 0 * t], 1))).double()
            for given in (labels, torch.full((16,), 8))
        )
        return c, u, u + w * (c - u)

    def map_loss(self, draw, student, teacher, x, labels, logs):
        if self.data and self.w != 1:
            labels = torch.where(draw.rand() < 0.1, 8, labels)
        z = draw.randn(2).double()
        u, v = draw.rand(), draw.rand()
        t, r = torch.maximum(u, v), torch.minimum(u, v)
        turn = torch.arange(16) % 4
        r = torch.where(turn == 1, 0.0, torch.where(turn == 3, r, t))
        t, r = self.S(t), self.S(r)
        x_t = ((1 - t)[:, None] * x + t[:, None] * z).float().double()
        with torch.no_grad():
            if self.data:
                c, u, _ = self.guided(student, x_t, t, labels, 0)
                v = z - x - (self.w - 1) * (c - u) / t[:, None]  # (5)
            else:
                v = (x_t - self.guided(teacher, x_t, t, labels, self.w)[2]) / t[:, None]  # (5)
            a, b = (self.T - t).clamp(max=0.005), (t - r).clamp(max=0.005)
            high = self.F(student, x_t + a[:, None] * v, t + a, r, labels)
            low = self.F(student, x_t - b[:, None] * v, t - b, r, labels)
            dF = (high - low) / (a + b)[:, None]  # (6)
            target = torch.where((r < t)[:, None], v - (t - r)[:, None] * dF, v)
        grid = self.S(1 - torch.arange(1000, dtype=torch.float64) / 1000) / self.T
        weight = t * (1 - t).sqrt() / (grid * (1 - grid).sqrt()).mean()  # (8)
        each = weight * (self.F(student, x_t, t, r, labels) - target).square().mean(1)  # (7)
        logs["map"] = each.mean()
        if self.balance:
            mean = each[turn % 2 == 0].mean().detach()
            each = torch.where(turn % 2 == 0, each, each * mean / (each + 1e-5).detach())  # (9)
        else:
            each = each * 0.1 / (each + 0.1).detach()  # (9)
        return each.mean()  # (10)

    def turns(self, it):
        networks = self.trace.networks()
        teacher, student, critic = (networks[name] for name in ("teacher", "student", "critic"))
        draw, logs = BatchRandom(0, it, 16), {}
        if self.images:
            x, cond = self.images[it].result
            x, labels = x.double(), cond["labels"]
        else:
            labels = draw.randint(0, 8)
            with torch.no_grad():
                x = self.jumps(student, draw, labels, [self.T, 0.0])
        loss = self.map_loss(draw, student, teacher, x, labels, logs)
        if it < self.first:
            yield "student", loss
            self.logs.append(logs)
            return
        times = self.times(draw)
        labels_critic = draw.randint(0, 8)
        with torch.no_grad():
            x_critic = self.jumps(student, draw, labels_critic, times)
        times = self.times(draw)
        labels = draw.randint(0, 8)
        x = self.jumps(student, draw, labels, times)
        self.jumps_with_graph += len(times) - 1
        t = self.S(draw.rand())[:, None]
        x_t = (1 - t) * x.detach().float() + t * draw.randn(2)
        r = self.guided(teacher, x_t, t[:, 0], labels, self.w_dm)[2]  # (12)
        f = self.guided(critic, x_t, t[:, 0], labels, 1)[0]  # (12)
        g = ((f - r) / (x - r).abs().mean(1, keepdim=True)).detach()  # (13)
        logs |= dict(dm=(g**2).mean(), dm_norm=(x - r).abs().mean(), mean=x.mean(), std=x.std())
        logs |= dict(real_gap=((x - r) ** 2).mean(), fake_gap=((x - f) ** 2).mean())
        yield "student", loss + 2 * (x * g).sum() / 32  # the gradient of (14)

        def critic_loss():
            x = x_critic
            t = self.S(draw.randn().double().sigmoid())
            z = draw.randn(2)
            x_t = (1 - t[:, None]) * x + t[:, None] * z
            velocity = self.F(critic, x_t, t, t, labels_critic)
            loss = (velocity - (z - x)).square().mean()  # (15)
            self.logs.append(logs | dict(critic=loss))
            return loss

        yield "critic", critic_loss


BY_HAND = {
    "--image-free --rollouts 1 4 --cfg 2 --dm-cfg 3": dict(w=2, w_dm=3),
    "--shift 5 --rows balanced --rollouts 4": dict(kind="flow", s=5, balance=True, rollouts=[4]),
    "--velocity data --cfg 3 --lora 4 --lora-fake 4 --rollouts 2 8": dict(
        kind="trigflow", data=True, w=3, rollouts=[2, 8]
    ),
}


@pytest.mark.parametrize("flags", BY_HAND)
def test_whole_iterations_by_hand(trace, monkeypatch, flags):
    """(1) to (15) in both stages: gradients, AdamW's updates, the average, what the log says, and
    the samples."""
    common = "--iters 5 --map-iters 2 --lr 3e-3 --lr-dm 2e-3 --lr-fake 4e-3 --betas 0.3 0.8"
    common += " --weight-decay 0.1 --clip 0.1 --warmup 1 --cooldown 0.6 --ema 3"
    case = dict(BY_HAND[flags])
    teacher = byhand.any_toy(case.get("kind", "edm"))
    seeds = byhand.start_awake(monkeypatch)
    wrapped = byhand.wrap_trained(monkeypatch)
    record = [(Images, "samples")]
    steps = trace(*common.split(), *flags.split(), teacher=teacher, record=record)
    images = steps.calls["samples"]
    assert len(images) == (0 if "--image-free" in flags else 5)
    hand = Hand(steps, images, **case)
    assert seeds == [0]  # the new input is equal on all processes
    first = byhand.rates(3e-3, 2, warmup=1, cooldown=0.6)
    second = [byhand.rates(lr, 3, warmup=1, cooldown=0.6) for lr in (2e-3, 4e-3)]
    roles = [step.role for step in steps]
    assert roles == ["student"] * 2 + ["student", "critic"] * 3
    stages = [steps[:2], steps[2:]]
    byhand.compare_average(steps, 3)
    # the second stage starts from the average of the first
    mean, live = (steps[i].after["student"].double() for i in (0, 1))
    mean = live + 0.5 ** (16 / 1.6) * (mean - live)
    start = steps[2].before["student"].double()
    assert byhand.difference(start - live, mean - live) < 1e-2
    optimisers = dict(student=byhand.AdamW(first, (0.3, 0.8), 0.1, 0.1))
    steps[:] = stages[0]
    assert byhand.compare_iterations(steps, hand.turns, optimisers, 2e-4) == 2
    optimisers = dict(
        student=byhand.AdamW(second[0], (0.0, 0.999), 0.1, 0.1),
        critic=byhand.AdamW(second[1], (0.0, 0.999), 0.1, 0.1),
    )
    steps[:] = stages[1]
    assert byhand.compare_iterations(steps, lambda it: hand.turns(it + 2), optimisers, 2e-4) == 3
    byhand.compare_logs(steps.logs, hand.logs)

    # gradients flow through what run.train returns, other passes do not
    student, critic = (net.calls for net in wrapped)
    assert student[False] == critic[False] == 0
    assert critic[True] == 3
    assert student[True] == 5 + hand.jumps_with_graph
    x, noises, cond = byhand.sample_by_record(steps, anyflow)
    times = [hand.S(1 - i / steps.distill["nfe"]) for i in range(steps.distill["nfe"] + 1)]
    expected = (times[0] * noises[0]).double()
    for t, r in zip(times, times[1:]):
        t, r = full(t, 9), full(r, 9)
        v = hand.F(steps.ema.model, expected, t, r, cond["labels"])
        expected = expected - (t - r)[:, None] * v
    assert byhand.difference(x, expected) < 1e-5


def test_frame(monkeypatch, tmp_path):
    critic_of = lambda steps: steps.networks()["critic"]
    flags = ["--map-iters", 0, "--lr-dm", 3e-3]
    out, show = tmp_path / "out", ["map"]
    check_frame(monkeypatch, anyflow, out, *flags, show=show, critic_of=critic_of)


def test_the_first_stage_leaves_the_critic_alone(trace):
    steps = trace("--iters", 4, "--map-iters", 2, "--warmup", 0)
    assert [step.role for step in steps] == ["student", "student", *["student", "critic"] * 2]
    for step in steps:
        assert not step.moved("teacher")
        assert not step.has_grad("teacher")
        assert step.moved("critic") == (step.role == "critic")
        assert step.moved("student") == (step.role == "student")
        assert not (step.role == "student" and step.has_grad("critic"))
    assert steps[2].moments == 0  # AdamW starts anew


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--map-iters 9 --iters 8", "--map-iters: expected 0 to --iters 8, found 9"),
        ("--shift 0", "--shift: expected a number > 0"),
        ("--image-free --velocity data", "--image-free: .*--velocity teacher"),
        ("--image-free --data x", "--data x: this run uses no images"),
        ("--lr-dm 0", "--lr-dm: expected a number > 0"),
        ("--dm-cfg -1", "--dm-cfg: expected a number >= 0"),
        ("--rollouts 4 0", "--rollouts: expected numbers of at least 1, found 0"),
    ],
)
def test_mistakes(flags, message, trace):
    with pytest.raises(UserError, match=message):
        trace(*flags.split())
