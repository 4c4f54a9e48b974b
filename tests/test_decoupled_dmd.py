"""decoupled_dmd.py: its equations on closed-form Gaussians, the choice in which it is DMD2, noise
levels, then who is trained by what in a real run.

Expected numbers were derived apart from the code. What it copies from dmd2.py is tested there;
tests/test_form.py compares the copies.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import byhand
from helpers.frame import check_frame
from helpers.gaussian import Gauss, f64, full, labels, normal, relative_error
from helpers.trace import Trace, weights

import decoupled_dmd as dd
import dmd2
from common.errors import UserError
from common.rng import BatchRandom
from common.schedules import EDM, VP, Flow, TrigFlow, add_noise, expand
from common.teachers.toy import Toy
from data.images import load_images

INDICES = [999, 749, 499, 249]  # of four steps
SCHEDULES = dict(vp=VP(), edm=EDM())


def cond_of(x):
    return labels(*[1] * len(x))


def noisy_copy(x, sigma, seed=1):
    """x_t, alpha, sigma on the flow schedule; sigma: a number or [B]."""
    sigma = f64(sigma).expand(len(x))
    eps = normal(*x.shape, seed=seed).to(x.dtype)
    return add_noise(x.detach(), 1 - sigma, sigma, eps), 1 - sigma, sigma


def networks():
    """A teacher and a critic of Gaussians; label 0 is unconditional."""
    return Gauss((0.2, 0.9), (0.8, 0.5)), Gauss((0.0, 0.4), (1.0, 0.6))


def without_normalisers(terms):
    """(w - 1) (u - c) and f - c."""
    g_ca, g_dm, n_ca, n_dm = terms
    return g_ca * n_ca[:, None], g_dm * n_dm[:, None]


# ---- (3) to (6), (8): the two terms --------------------------------------------------------------


def test_eq03_eq04_eq05_eq06_by_hand():
    """Each term from its own copy, with its own normaliser, from passes made one by one."""
    x, w, floor = normal(64, 5), 3.0, 0.2
    teacher, fake = networks()
    y = cond_of(x)
    ca = noisy_copy(x, torch.linspace(0.02, 0.5, 64))
    dm = noisy_copy(x, torch.linspace(0.98, 0.02, 64), seed=2)
    g_ca, g_dm, n_ca, n_dm = dd.gradients(x, ca, dm, y, teacher, fake, w, floor)

    c_ca, c_dm = teacher(*ca, y), teacher(*dm, y)
    u = teacher(*ca, teacher.null(64))
    f = fake(*dm, y)
    size_ca = (x - c_ca).abs().mean(1)
    size_dm = (x - c_dm).abs().mean(1)
    assert (size_ca < floor).any()
    assert (size_ca > floor).any()
    assert torch.allclose(n_ca, size_ca.clamp(min=floor), rtol=1e-14, atol=0)
    assert torch.allclose(n_dm, size_dm.clamp(min=floor), rtol=1e-14, atol=0)
    assert not torch.equal(n_ca, n_dm)
    assert (g_ca + (w - 1) * (c_ca - u) / n_ca[:, None]).abs().max() < 1e-13
    assert (g_dm + (c_dm - f) / n_dm[:, None]).abs().max() < 1e-13


def test_eq04_eq05_their_sum_is_dmds_direction():
    """At one noisy copy, r - f = (c - f) + (w - 1) (c - u): nothing is approximated."""
    x, w = normal(64, 6), 3.5
    teacher, fake = networks()
    one = noisy_copy(x, torch.linspace(0.02, 0.98, 64))
    ca, dm = without_normalisers(dd.gradients(x, one, one, cond_of(x), teacher, fake, w, 0.0))
    r = teacher.guided(*one, cond_of(x), w)
    f = fake(*one, cond_of(x))
    assert (ca + dm - (f - r)).abs().max() < 1e-13
    assert ca.abs().mean() > 0.1
    assert dm.abs().mean() > 0.1


PRECISIONS = [(torch.float64, 1e-12, 0.02), (torch.float32, 1e-6, 0.1)]
precisions = pytest.mark.parametrize("dtype, bound, least", PRECISIONS, ids=["float64", "float32"])


@pytest.mark.parametrize("w", [1.5, 4.0, 8.0])
@precisions
def test_eq07_shared_is_dmd2(dtype, bound, least, w):
    """g and the gradient that it gives the student, from the same noise.

    least: noise level below which f - r and x - r are differences of nearly equal numbers.
    """
    x = normal(64, 6).to(dtype)
    teacher, fake = networks()
    one = noisy_copy(x, torch.linspace(least, 0.98, 64))
    theirs = dmd2.dm_gradient(x, *one, cond_of(x), teacher, fake, w)[0]
    g_ca, g_dm, n_ca, n_dm = dd.gradients(x, one, one, cond_of(x), teacher, fake, w, 0.0)
    assert relative_error(g_ca + g_dm, theirs) < bound
    assert torch.equal(n_ca, n_dm)

    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss, loss_of_dmd2 = dd.dm_loss(a, g_ca + g_dm), dmd2.dm_loss(b, theirs)
    loss.backward()
    loss_of_dmd2.backward()
    assert relative_error(a.grad, b.grad) < bound
    assert loss.item() == pytest.approx(loss_of_dmd2.item(), rel=10 * bound)


@precisions
def test_eq05_without_guidance_is_dmd2(dtype, bound, least):
    """w = 1: only DM is left, and it is all of DMD2."""
    x = normal(8, 6).to(dtype)
    teacher, fake = networks()
    dm = noisy_copy(x, 0.6)
    g_ca, g_dm, _, _ = dd.gradients(x, None, dm, cond_of(x), teacher, fake, 1.0, 0.0)
    theirs = dmd2.dm_gradient(x, *dm, cond_of(x), teacher, fake, 1.0)[0]
    assert relative_error(g_dm, theirs) < bound
    assert g_ca.abs().max() == 0


def test_eq08_autograd_of_the_loss_is_the_sum_over_numel():
    teacher, fake = Gauss((0.2, 0.9)), Gauss((0.0, 0.4))
    x = normal(16, 4, 3, 3).requires_grad_()
    ca, dm = noisy_copy(x, 0.3), noisy_copy(x, 0.7, seed=2)
    terms = dd.gradients(x, ca, dm, cond_of(x), teacher, fake, 3.0, 0.1)
    assert not any(term.requires_grad for term in terms)
    g = terms[0] + terms[1]
    loss = dd.dm_loss(x, g)
    loss.backward()
    assert terms[0].abs().min() > 0
    assert (x.grad - g / x.numel()).abs().max() < 1e-18
    assert loss.item() == pytest.approx(0.5 * g.square().mean().item(), rel=1e-12)
    assert teacher.mean.grad is None
    assert fake.mean.grad is None


@pytest.mark.parametrize("shared", [True, False])
def test_eq06_zero_over_zero_is_zero(shared):
    x = torch.full((2, 3), 0.3, dtype=torch.float64)
    point = Gauss((0.3, 0.3), (0.0, 0.0))  # all data in one point, and x is there
    ca = noisy_copy(x, 0.5)
    dm = ca if shared else noisy_copy(x, 0.5)
    g_ca, g_dm, _, _ = dd.gradients(x, ca, dm, cond_of(x), point, point, 2.0, 0.0)
    assert torch.equal(g_ca, torch.zeros_like(x))
    assert torch.equal(g_dm, torch.zeros_like(x))


def test_eq03_cost():
    """Rows of the teacher and of the critic, and whether the null condition is needed."""
    x = normal(8, 3)
    a, b = noisy_copy(x, 0.3), noisy_copy(x, 0.7)
    for ca, dm, teacher_rows, fake_rows, nulls in (
        (a, b, [24], [8], 1),
        (a, a, [16], [8], 1),
        (None, b, [8], [8], 0),
        (a, None, [16], [], 1),
    ):
        teacher, fake = networks()
        dd.gradients(x, ca, dm, cond_of(x), teacher, fake, 2.0, 0.1)
        assert [len(x_t) for x_t in teacher.inputs] == teacher_rows
        assert [len(x_t) for x_t in fake.inputs] == fake_rows
        assert teacher.null_calls == nulls


# ---- what each term does -------------------------------------------------------------------------


def test_eq05_nothing_moves_at_the_goal():
    """w = 1, the student is the teacher's conditional, and the critic has learnt it."""
    x = 0.9 + 0.5 * normal(64, 5)
    teacher, fake = Gauss((0.2, 0.9), (0.8, 0.5)), Gauss((7.0, 0.9), (0.1, 0.5))
    ca, dm = noisy_copy(x, 0.3), noisy_copy(x, 0.7)
    g_ca, g_dm, _, _ = dd.gradients(x, ca, dm, cond_of(x), teacher, fake, 1.0, 1e-8)
    assert g_dm.abs().max() < 1e-15
    assert g_ca.abs().max() == 0


@pytest.mark.parametrize("student", [-3.0, 0.0, 5.0])
def test_eq04_ca_has_no_fixed_point(student):
    """Equal variances: c - u is w(sigma) (m_c - m_u), 0.5 at sigma = 0.5, for any student."""
    x = student + normal(1000, 1)
    teacher = Gauss((0.0, 1.0), (1.0, 1.0))
    terms = dd.gradients(x, noisy_copy(x, 0.5), None, cond_of(x), teacher, None, 2.0, 1e-8)
    ca, dm = without_normalisers(terms)
    assert (ca + 0.5).abs().max() < 1e-12
    assert ca.std() < 1e-12
    assert torch.equal(dm, torch.zeros_like(x))


@pytest.mark.parametrize("v_u, slope", [(0.5, 1 / 6), (1.0, 0.0), (2.0, -1 / 6)])
def test_eq04_ca_expands_or_contracts(v_u, slope):
    """It depends on whether the unconditional data are narrower or wider."""
    x = f64([[0.0], [1.0]])
    noiseless = (0.5 * x, full(0.5, 2), full(0.5, 2))  # so that the map is linear
    teacher = Gauss((0.0, 0.0), (v_u**0.5, 1.0))
    terms = dd.gradients(x, noiseless, None, cond_of(x), teacher, None, 2.0, 1e-8)
    ca = without_normalisers(terms)[0]
    assert -(ca[1] - ca[0]).item() == pytest.approx(slope, abs=1e-12)


def spread_evenly(low, high, n=1000):
    """In place of random draws: evenly spaced ones, so that a mean over them is an expectation."""
    return low + torch.arange(n) * (high - low) // n


def fixed_point(index, levels="hybrid", iters=150):
    """Mean and standard deviation where the student N(m, s^2) comes to rest, at the step `index`.

    One-dimensional Gaussians of unit variance with m_c = 1 and m_u = 0, w = 3, an exact critic, no
    normaliser, all levels of a flow. Everything is linear: two points z stand for the normal
    distribution, and the noise is replaced by its mean 0.
    """
    grid = Flow().grid(1000)
    (cleaner,) = dd.count_cleaner(Flow(), grid, [index])
    t_dm, t_ca = dd.draw_levels(levels, spread_evenly, 0, 1000, cleaner)
    teacher, fake = Gauss((0.0, 1.0), (1.0, 1.0)), Gauss((0.0, 0.0), (1.0, 1.0))
    z = f64([1.0, -1.0]).repeat_interleave(1000)[:, None]
    m, s = 0.0, 1.5

    def copy_at(x, t):
        return (1 - t)[:, None] * x, 1 - t, t

    for _ in range(iters):
        x = m + s * z
        fake.mean.data[1], fake.std[1] = m, s
        dm = copy_at(x, grid[t_dm.repeat(2)])
        ca = dm if levels == "shared" else copy_at(x, grid[t_ca.repeat(2)])
        terms = dd.gradients(x, ca, dm, cond_of(x), teacher, fake, 3.0, 1e-8)
        g = sum(without_normalisers(terms))
        m = m - g.mean().item()
        s = s - 4 * (g * z).mean().item()
    return m, s


# m_c + (w - 1) rho (m_c - m_u), where rho is the ratio of E[w(sigma)] of CA and of DM
FIXED_POINTS = {999: 3.0, 749: 2.3733, 499: 1.6137, 249: 1.1200}


def test_eq07_fixed_points_of_hybrid():
    """The range of CA decides how far the student goes beyond the conditional mean 1."""
    for index, mean in FIXED_POINTS.items():
        m, s = fixed_point(index)
        assert m == pytest.approx(mean, abs=0.01)
        assert s == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("levels, iters", [("full", 150), ("shared", 150), ("constrained", 400)])
def test_eq07_fixed_points_of_equal_ranges(levels, iters):
    """Where both terms have the same range, it is the mean of guidance, u + 3 (c - u)."""
    m, s = fixed_point(249, levels, iters)
    assert m == pytest.approx(3, abs=0.01)
    assert s == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    "count, expected", [(1000, 0.5), (750, 0.343332), (500, 0.153426), (250, 0.029996)]
)
def test_eq07_mean_weight_of_a_range(count, expected):
    """E[w(sigma)] for sigma ~ U(0, a), behind FIXED_POINTS: from the grid and as a formula."""
    sigma = Flow().grid(1000)[:count] - 0.0005
    w = sigma**2 / ((1 - sigma) ** 2 + sigma**2)
    a = count / 1000
    formula = 0.5 + math.log(2 * a**2 - 2 * a + 1) / (4 * a)
    assert w.mean().item() == pytest.approx(expected, abs=1e-6)
    assert formula == pytest.approx(expected, abs=1e-6)


# ---- (7): noise levels ---------------------------------------------------------------------------


def ranges(levels, cleaner, low=20, high=981):
    """First and last index that each draw can give, in the order of the draws."""
    seen = []

    def randint(a, b):
        seen.append((a, b - 1))
        return torch.zeros(2)

    t_dm, t_ca = dd.draw_levels(levels, randint, low, high, cleaner)
    assert (t_dm is t_ca) == (levels == "shared")
    return seen


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_eq07_ranges(schedule):
    """At index 999 CA has the range of DM, later it has less noise than the input; it is never
    empty."""
    grid = schedule.grid(1000)
    assert dd.term_levels(schedule, grid)[1:] == (20, 981)
    counts = dd.count_cleaner(schedule, grid, [*INDICES, 15])
    assert counts == [1000, 749, 499, 249, 15]
    for cleaner, last in zip(counts, [980, 748, 498, 248, 20]):
        assert ranges("shared", cleaner) == [(20, 980)]
        assert ranges("full", cleaner) == [(20, 980), (20, 980)]
        assert ranges("constrained", cleaner) == [(20, last), (20, last)]
        assert ranges("hybrid", cleaner) == [(20, 980), (20, last)]  # DM is drawn first


def shifted_grid(schedule, shift):
    """The grid of main() under --shift."""
    grid = schedule.grid(1000)
    snr = (schedule.alpha(grid) / schedule.sigma(grid) / shift) ** 2
    return grid if shift == 1 else schedule.t_from_snr(snr)


ALL_SCHEDULES = dict(SCHEDULES, flow3=Flow(3.0), flow05=Flow(0.5))


@pytest.mark.parametrize("shift", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("schedule", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
def test_eq07_ca_is_cleaner_than_the_input(schedule, shift):
    """By the levels themselves; DM reaches both sides of every step."""
    grid = shifted_grid(schedule, shift)
    levels, low, high = dd.term_levels(schedule, grid)
    assert (levels.diff() >= 0).all()
    assert len(levels) == 1000
    for index, cleaner in zip(INDICES, dd.count_cleaner(schedule, grid, INDICES)):
        t_dm, t_ca = dd.draw_levels("hybrid", spread_evenly, low, high, cleaner)
        input_level = schedule.grid(1000)[index]
        ca, dm = levels[t_ca], levels[t_dm]
        if index == 999:
            assert torch.equal(ca, dm)
            continue
        assert ca.max() <= max(input_level, 0.02)
        assert dm.min() < input_level
        if shift >= 1:
            assert dm.max() > input_level
        if shift == 1:  # and no cleaner than necessary
            assert ca.max() == levels[levels < input_level].max()


def test_steps_of_a_flow_with_a_time_shift():
    """s = 3: grids of Z-Image's scheduler."""
    grid = Flow(3.0).grid(1000)
    eight = [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3]
    assert grid[dd.step_indices(4)].tolist() == pytest.approx([1, 0.9, 0.75, 0.5])
    assert grid[dd.step_indices(8)].tolist() == pytest.approx(eight, abs=5e-5)


def ca_levels(levels, low, high):
    """Evenly spread draws of CA at the last of four steps of a flow with time shift 3."""
    schedule = Flow(3.0)
    (cleaner,) = dd.count_cleaner(schedule, schedule.grid(1000), [249])
    many = lambda a, b: spread_evenly(a, b, 20_000)
    return levels[dd.draw_levels("hybrid", many, low, high, cleaner)[1]]


def test_eq07_levels_are_drawn_before_the_time_shift():
    """The author's example: u ~ U(0, 0.25), then the shift. Drawn after it the mean were 0.25."""
    sigma = ca_levels(Flow(3.0).grid(1000), 0, 1000)
    assert 0 < sigma.min()
    assert sigma.max() < 0.5
    assert sigma.mean().item() == pytest.approx(0.2836, abs=6e-4)
    assert sigma.median().item() == pytest.approx(0.3, abs=2e-3)


def test_eq07_final_levels_of_a_flow_are_clamped():
    sigma = ca_levels(*dd.term_levels(Flow(3.0), Flow(3.0).grid(1000)))
    assert sigma.min() == 0.02
    assert sigma.mean().item() == pytest.approx(0.2839, abs=6e-4)
    assert (sigma == 0.02).double().mean().item() == pytest.approx(0.027, abs=4e-3)
    assert dd.term_levels(Flow(3.0), Flow(3.0).grid(1000))[0].max() == 0.98


@pytest.mark.parametrize("shift", [0.3, 3.0])
def test_shift_of_a_flow_is_its_time_shift(shift):
    """--shift of a plain flow is the same map as a schedule's own shift."""
    assert torch.allclose(shifted_grid(Flow(), shift), Flow(shift).grid(1000), atol=1e-7)


# ---- (9), (10) -----------------------------------------------------------------------------------


def test_eq09_reaches_the_critic_only():
    student, fake = Gauss(0.1, 0.5), Gauss(0.2, 0.5)
    half = full(0.5, 4)
    x = student(normal(4, 6), half, half, {})
    x_t = add_noise(x.detach(), half, half, normal(4, 6, seed=1))
    weight = f64(1.0, 2.0, 3.0, 4.0)
    prediction = dd.Critic(fake)(x_t, half, half, {})
    loss = dd.fake_loss(prediction, x, weight)
    loss.backward()
    expected = (weight * (prediction - x).square().mean(1)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert student.mean.grad is None
    assert fake.mean.grad.abs() > 0


MEAN, VAR = 0.075, 0.81  # of SDXL's latents, from the paper


def standard_samples():
    """[7, 3, 16, 16]; each has mean 0 and variance 1."""
    x = normal(7, 3, 16, 16)
    mean, std = x.flatten(1).mean(1), x.flatten(1).std(1, correction=0)
    return (x - expand(mean, x)) / expand(std, x)


@pytest.mark.parametrize(
    "factor, offset, expected",
    [(1.0, 0.0, 0.0), (2**0.5, 0.0, 0.153426), (0.5**0.5, 0.0, 0.096574), (1.0, 0.9, 0.5)],
    ids=["real", "twice the variance", "half the variance", "mean off by one std"],
)
def test_eq10_values(factor, offset, expected):
    x = MEAN + 0.9 * factor * standard_samples() + offset
    assert dd.moments_loss(x, MEAN, VAR).item() == pytest.approx(expected, abs=1e-6)


def test_eq10_is_a_mean_over_samples():
    real = MEAN + 0.9 * standard_samples()
    loss = dd.moments_loss(torch.cat([real, real + 0.9]), MEAN, VAR)
    assert loss.item() == pytest.approx(0.25, abs=1e-12)


def test_eq10_gradient():
    """Zero at the real moments; descent makes samples narrower that are too wide."""
    z = standard_samples()
    real = (MEAN + 0.9 * z).requires_grad_()
    dd.moments_loss(real, MEAN, VAR).backward()
    assert real.grad.abs().max() < 1e-15
    wide = (MEAN + 1.2 * z).requires_grad_()
    dd.moments_loss(wide, MEAN, VAR).backward()
    assert (wide.grad * z).sum() > 0


# ---- (11): the head ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, halvings, groups",
    [
        ((16, 8, 8), 1, 4),
        ((18, 7, 7), 1, 2),
        ((9, 4, 4), 0, 1),
        ((64, 5, 11), 1, 16),
        ((256, 33, 16), 2, 32),
        ((1, 1, 1), 0, 1),
    ],
)
def test_eq11_head_by_hand(shape, halvings, groups):
    """Halved to 4 x 4 or less, the rest in one convolution, then a logit for each square."""
    h = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    head = dd.Head(h)
    layers = iter(list(head.parameters()))
    expected = h
    for stride, padding in [(2, 1)] * halvings + [(min(shape[1:]) // 2**halvings, 0)]:
        expected = F.conv2d(expected, next(layers), next(layers), stride, padding)
        expected = F.silu(F.group_norm(expected, groups, next(layers), next(layers)))
    expected = F.conv2d(expected, next(layers), next(layers)).flatten(1)
    assert not list(layers)
    assert torch.allclose(head(h.bfloat16().float()), head(h.bfloat16()))
    assert torch.allclose(head(h), expected, atol=1e-5)
    assert h[0].numel() == 1 or (head(h)[0] - head(h)[1]).abs().max() > 1e-4


def test_eq11_head_of_points_by_hand():
    h = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    head = dd.Head(h)
    w, b, w_out, b_out = head.parameters()
    assert torch.allclose(head(h), F.silu(h @ w.T + b) @ w_out.T + b_out, atol=1e-6)


# ---- main(), by hand -----------------------------------------------------------------------------


@pytest.fixture
def trace(monkeypatch, tmp_path):
    def run(script, *flags, **kwargs):
        same = ["--lr", 5e-4, "--lr-fake", 5e-4, "--ratio", 2, "--cfg", 2, "--cooldown", 0]
        return Trace(monkeypatch, script, tmp_path / "out", *same, *flags, **kwargs)

    return run


def levels_by_hand(schedule):
    """alpha and sigma [1000] of the grid, from data to noise."""
    i = torch.arange(1000, dtype=torch.float64)
    if isinstance(schedule, EDM):
        sigma = (0.002 ** (1 / 7) + i / 999 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
        return torch.ones_like(sigma), sigma
    if isinstance(schedule, VP):
        return byhand.level_of(schedule, torch.ones_like(i), byhand.vp_ratios())
    u = (i + 1) / 1000
    if isinstance(schedule, Flow):
        return byhand.level_of(schedule, 1 - u, schedule.shift * u)
    alpha = (u * math.pi / 2).cos()
    alpha[-1] = 0
    return alpha, 0.5 * (u * math.pi / 2).sin()


class ByHand:
    """(1) to (14) for a network of points with 8 labels.

    w, nfe, ...: the flags of this name; the values that a case leaves out are those of `trace`.
    gan: (w_G, w_D). indices: of --step-indices.
    """

    def __init__(self, trace, schedule, images, **case):
        same = dict(w=2.0, nfe=1, ratio=2, levels="hybrid", shift=1.0, floor=0.05, indices=None)
        same |= dict(regulariser="dm", moments=None, gan=None)
        vars(self).update(same | case)
        self.trace, self.images = trace, images
        indices = self.indices or [999 - k * (1000 // self.nfe) for k in range(self.nfe)]
        grid = levels_by_hand(schedule)
        self.steps = [a[indices] for a in grid]
        self.grid = byhand.level_of(schedule, grid[0], self.shift * grid[1])
        self.terms, self.low, self.high = self.grid, 20, 981
        if isinstance(schedule, Flow):
            t = self.grid[1].clamp(0.02, 0.98)
            self.terms, self.low, self.high = (1 - t, t), 0, 1000
        less_noise = [self.grid[1] * a < s * self.grid[0] for a, s in zip(*self.steps)]
        self.cleaner = [int(less.sum()) for less in less_noise]
        if indices[0] == 999:
            self.cleaner[0] = 1000
        self.seen = set()  # steps k
        self.floored = set()  # whether (6) was its floor
        self.logs = []

    def sample(self, net, k, cond, noise):
        """(1) at step k, from (2)."""
        alpha, sigma = self.steps
        z = noise()
        x_in = z if isinstance(net.schedule, VP) else sigma[0].float() * z
        for j in range(k):
            xhat = net(x_in, alpha[j], sigma[j], cond).detach()
            x_in = (alpha[j + 1] * xhat + sigma[j + 1] * noise()).float()
        return net(x_in, alpha[k], sigma[k], cond)

    def copy_of(self, x, levels, i, eps):
        """x_t, alpha, sigma at the indices i of `levels`."""
        alpha, sigma = levels[0][i], levels[1][i]
        return (alpha[:, None] * x + sigma[:, None] * eps).float(), alpha, sigma

    def logit(self, x_t, alpha, sigma, cond):
        """(11)"""
        critic = self.trace.critic
        return critic.head(critic.fake(x_t, alpha, sigma, cond, features=True)[-1])

    def normaliser(self, x, c):
        """(6) [16, 1]"""
        size = (x - c).abs().mean(1, keepdim=True)
        self.floored.update((size < self.floor).flatten().tolist())
        return size.clamp(min=self.floor)

    def terms_of(self, x, k, cond, draw):
        """g_ca, g_dm [16, 2] and n_ca, n_dm [16, 1]; 0 and the floor of a term left out."""
        teacher, null = self.trace.teacher, dict(labels=torch.full((16,), 8))
        below = max(min(self.cleaner[k], self.high), self.low + 1)
        i_dm = draw.randint(self.low, below if self.levels == "constrained" else self.high)
        i_ca = i_dm
        if self.levels != "shared":
            i_ca = draw.randint(self.low, self.high if self.levels == "full" else below)
        left_out = torch.zeros(16, 2), torch.full((16, 1), self.floor)
        (g_ca, n_ca), (g_dm, n_dm) = left_out, left_out
        if self.regulariser == "dm":
            dm = self.copy_of(x, self.terms, i_dm, draw.randn(2))
            c, f = teacher(*dm, cond), self.trace.critic.fake(*dm, cond)  # (3)
            n_dm = self.normaliser(x, c)
            g_dm = (f - c) / n_dm  # (5)
        if self.w != 1 and self.levels == "shared":
            r = (1 - self.w) * teacher(*dm, null) + self.w * c
            n_ca = n_dm = (x - r).abs().mean(1, keepdim=True)
            return (r - c) / -n_ca, (f - c) / n_dm, n_ca, n_dm
        if self.w != 1:
            ca = self.copy_of(x, self.terms, i_ca, draw.randn(2))
            c, u = teacher(*ca, cond), teacher(*ca, null)  # (3)
            n_ca = self.normaliser(x, c)
            g_ca = (self.w - 1) * (u - c) / n_ca  # (4)
        return g_ca, g_dm, n_ca, n_dm

    def moments_loss(self, x):
        """(10), for samples of two numbers."""
        a, b = x.double().T
        mean, var = self.moments
        m = (a + b) / 2
        s2 = ((a - m) ** 2 + (b - m) ** 2) / 2
        q = (s2 + (m - mean) ** 2) / var
        return (0.5 * (q - 1 - torch.log(s2 / var))).mean()

    def cosine_of(self, x, g_ca, g_dm, n_ca, n_dm):
        """{cos: mean of those samples whose terms are no rounding}; {} if there is none."""
        least = 1e-3 * x.abs().mean(1)
        exact = ((g_ca * n_ca).abs().mean(1) > least) & ((g_dm * n_dm).abs().mean(1) > least)
        cos = (g_ca * g_dm).sum(1) / (g_ca.norm(dim=1) * g_dm.norm(dim=1))
        return dict(cos=cos[exact].mean()) if exact.any() else {}

    def iteration(self, it):
        """Generator of ("student", its loss) in a student's turn, and ("critic", its loss)."""
        trace, draw, logs = self.trace, BatchRandom(2, it, 16), {}
        self.logs.append(logs)
        x_real, labels_real = self.images.batch(it, 16, 2)
        cond, cond_real = dict(labels=draw.randint(0, 8)), dict(labels=labels_real)
        k = draw.shared_randint(0, self.nfe)
        x = self.sample(trace.student, k, cond, lambda: draw.randn(2))
        any_level = lambda: draw.randint(0, 1000)
        if it % self.ratio == 0:
            self.seen.add(k)
            terms = self.terms_of(x.detach(), k, cond, draw)
            g_ca, g_dm, n_ca, n_dm = terms = [term.detach() for term in terms]
            loss = ((g_ca + g_dm) * x).sum() / x.numel()  # has the gradient of (8)
            logs |= dict(ca=0.5 * (g_ca**2).mean(), dm=0.5 * (g_dm**2).mean())
            logs |= dict(norm_ca=n_ca.mean(), norm_dm=n_dm.mean(), **self.cosine_of(x, *terms))
            if self.regulariser == "moments":
                logs |= dict(moments=self.moments_loss(x))
                loss = loss + logs["moments"]
            if self.gan:
                logit = self.logit(*self.copy_of(x, self.grid, any_level(), draw.randn(2)), cond)
                logs |= dict(gen=(1 + (-logit).exp()).log().mean())  # (12)
                loss = loss + self.gan[0] * logs["gen"]  # (14)
            yield "student", loss

        x = x.detach()
        logs |= dict(mean=x.mean(), std=x.std())
        if self.regulariser != "dm" and not self.gan:
            return
        x_t, *level = self.copy_of(x, self.grid, any_level(), draw.randn(2))
        error = trace.critic.fake(x_t, *level, cond) - x
        weight = byhand.weight_of(trace.teacher.prediction, *level, sigma_data=0.7)
        loss = logs["fake"] = (weight[:, None] * error**2).mean()  # (9)
        if self.gan:
            i_fake, i_real, eps_fake, eps_real = (
                any_level(),
                any_level(),
                draw.randn(2),
                draw.randn(2),
            )
            fake = self.logit(*self.copy_of(x, self.grid, i_fake, eps_fake), cond)
            real = self.logit(*self.copy_of(x_real, self.grid, i_real, eps_real), cond_real)
            cls = (1 + fake.exp()).log().mean() + (1 + (-real).exp()).log().mean()  # (13)
            loss = loss + self.gan[1] * cls  # (14)
            logs |= dict(cls=cls, logit_fake=fake.mean(), logit_real=real.mean())
        yield "critic", loss


# name: (schedule, prediction, flags, case of ByHand)
BY_HAND = {
    "edm": (EDM(), "edm", "--nfe 1 --ratio 3 --floor 0.1", dict(ratio=3, floor=0.1)),
    "edm, 4 steps, GAN": (
        EDM(),
        "edm",
        "--nfe 4 --cfg 2.5 --shift 0.3 --gan --gan-weight 0.7 --cls-weight 0.4 --ratio 1",
        dict(nfe=4, w=2.5, shift=0.3, gan=(0.7, 0.4), ratio=1),
    ),
    "eps, full, GAN": (
        VP(),
        "eps",
        "--nfe 3 --levels full --gan --gan-weight 0.3 --cls-weight 0.2 --floor 0.5",
        dict(nfe=3, levels="full", gan=(0.3, 0.2), floor=0.5),
    ),
    "eps, constrained": (
        VP(),
        "eps",
        "--step-indices 700,300,5 --nfe 3 --levels constrained --shift 2 --ratio 1 --ema 3",
        dict(nfe=3, indices=[700, 300, 5], levels="constrained", shift=2, ratio=1),
    ),
    "flow, LoRA": (
        Flow(3),
        "flow",
        "--nfe 2 --shift 0.5 --cfg 4 --lora 4 --lora-fake 4 --lora-alpha 8 --ratio 1",
        dict(nfe=2, shift=0.5, w=4, ratio=1),
    ),
    "flow, shared, GAN": (
        Flow(),
        "flow",
        "--nfe 2 --levels shared --cfg 3 --gan --gan-weight 0.5 --cls-weight 2 --ratio 1",
        dict(nfe=2, levels="shared", w=3, gan=(0.5, 2), floor=0.0, ratio=1),
    ),
    "trigflow, shared without guidance": (
        TrigFlow(0.5),
        "trigflow",
        "--nfe 3 --levels shared --cfg 1 --shift 2 --ratio 1",
        dict(nfe=3, levels="shared", w=1, shift=2, floor=0.0, ratio=1),
    ),
    "trigflow, moments": (
        TrigFlow(0.5),
        "trigflow",
        "--regulariser moments --moments 0.1 0.7 --nfe 2 --ratio 4",
        dict(regulariser="moments", moments=(0.1, 0.7), nfe=2, ratio=1),
    ),
    "edm, moments, GAN": (
        EDM(),
        "edm",
        "--regulariser moments --moments -0.2 0.4 --levels full --nfe 1 --gan --gan-weight 0.5",
        dict(regulariser="moments", moments=(-0.2, 0.4), levels="full", gan=(0.5, 0.01)),
    ),
    "flow, nothing but CA": (
        Flow(),
        "flow",
        "--regulariser none --nfe 2 --step-indices 800,100 --floor 0.3",
        dict(regulariser="none", nfe=2, indices=[800, 100], floor=0.3, ratio=1),
    ),
    "edm, small": (
        EDM(),
        "edm",
        "--nfe 2 --cfg 2 --floor 0.1 --gan --gan-weight 0.7 --cls-weight 0.4 --ratio 1"
        " --small depth=2 --small-fake width=12 depth=2",
        dict(nfe=2, w=2, floor=0.1, gan=(0.7, 0.4), ratio=1),
    ),
    "flow, no guidance": (Flow(), "flow", "--nfe 1 --cfg 1 --floor 0.7", dict(w=1, floor=0.7)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_whole_iterations_by_hand(trace, monkeypatch, capsys, name):
    """(1), (2), the rest until (11), (12), (13) and (14): gradients of student and critic with its
    head, AdamW's updates, the average, numbers of log.jsonl, and sampling by the record."""
    schedule, prediction, flags, case = BY_HAND[name]
    common = "--iters 6 --seed 2 --lr 3e-3 --lr-fake 2e-3 --betas 0.3 0.8 --weight-decay 0.1"
    rates = "--clip 0.5 --warmup 3 --cooldown 0.5"
    wrapped = byhand.wrap_trained(monkeypatch)
    steps = trace(
        dd,
        *[*common.split(), *rates.split(), *flags.split()],
        teacher=byhand.Tiny(schedule, prediction),
        record=[(dd, "adamw"), (dd, "load_images")],
    )
    assert len(steps.calls["load_images"]) == ("--gan" in flags)  # read only where they are used
    optimised = [call.args[0] for call in steps.calls["adamw"]]
    assert all(a is b for a, b in zip(optimised, [steps.student, steps.critic]))
    assert ("terms                  DM alone" in capsys.readouterr().out) == ("--cfg 1 " in flags)
    images = load_images(None, steps.teacher, lambda line: None)
    by_hand = ByHand(steps, schedule, images, **case)
    if by_hand.gan:
        torch.manual_seed(2)  # the head starts equal on all processes
        width = steps.critic.fake.net.config["width"]
        head = weights(dd.Head(torch.zeros(1, width)))
        assert torch.equal(steps[0].before["critic"][-len(head) :], head)

    optimisers = {
        role: byhand.AdamW(lr, (0.3, 0.8), 0.1, 0.5)
        for role, lr in (("student", 3e-3), ("critic", 2e-3))
    }
    factor = lambda it: min(1, (it + 1) / 3) * min(1, (6 - it) / 3)
    assert byhand.compare_iterations(steps, by_hand.iteration, optimisers, factor=factor) == 6
    assert by_hand.seen == set(range(by_hand.nfe))
    assert "--floor" not in flags or by_hand.floored == {True, False}

    byhand.compare_logs(steps.logs, by_hand.logs)
    for role in ("student", "critic"):
        norms = [step.flat_grad().norm().item() for step in steps if step.role == role]
        name = f"grad_{role}"
        assert [line[name] for line in steps.logs if name in line] == pytest.approx(norms, rel=1e-5)
    roles = [step.role for step in steps]
    assert [net.calls[True] for net in wrapped] == [
        roles.count("student"),
        roles.count("critic") * (2 if by_hand.gan else 1),
    ]
    assert not any(net.calls[False] for net in wrapped)

    if "--ema" in flags:
        byhand.compare_average(steps, 3)
    x, noises, cond = byhand.sample_by_record(steps, dd)
    expected = by_hand.sample(steps.ema.model, by_hand.nfe - 1, cond, iter(noises).__next__)
    assert torch.allclose(x, expected, atol=1e-5)


def test_frame(monkeypatch, tmp_path):
    check_frame(monkeypatch, dd, tmp_path / "out", show=["ca", "dm", "fake"])


# ---- main(): levels, who is trained, what CA does ------------------------------------------------


@pytest.mark.parametrize("flags", ["--nfe 1", "--nfe 4", "--nfe 4 --cfg 1", "--nfe 2 --gan"])
def test_eq07_a_run_with_shared_levels_is_a_run_of_dmd2(trace, flags):
    """The same draws, samples and gradients, iteration by iteration."""
    flags = [*flags.split(), "--iters", 5]
    ours = trace(dd, "--levels", "shared", *flags)
    theirs = trace(dmd2, *flags)
    assert [step.role for step in ours] == [step.role for step in theirs]
    assert len(ours) == 8
    assert relative_error(ours[0].flat_grad(), theirs[0].flat_grad()) < 1e-6
    assert relative_error(ours[1].flat_grad(), theirs[1].flat_grad()) < 1e-6
    for a, b in zip(ours, theirs):  # Adam amplifies rounding
        assert relative_error(a.after["student"], b.after["student"]) < 1e-5
        assert relative_error(a.after["critic"], b.after["critic"]) < 1e-5


@pytest.mark.parametrize("flags", ["--nfe 1", "--nfe 4", "--nfe 2 --gan"])
def test_eq07_a_run_with_other_levels_is_not_dmd2(trace, flags):
    flags = [*flags.split(), "--iters", 1]
    ours, theirs = trace(dd, *flags), trace(dmd2, *flags)
    assert relative_error(ours[0].flat_grad(), theirs[0].flat_grad()) > 1e-2


def test_eq07_hybrid_is_full_with_one_step(trace):
    """The same ranges, hence the same draws and the same run, bit for bit; not with four steps."""

    def student(*flags):
        return trace(dd, "--iters", 6, *flags)[-1].after["student"]

    assert torch.equal(student("--nfe", 1), student("--nfe", 1, "--levels", "full"))
    assert not torch.equal(student("--nfe", 4), student("--nfe", 4, "--levels", "full"))


def noise_of(x, noisy):
    x_t, alpha, sigma = noisy
    return (x_t - expand(alpha, x) * x.detach()) / expand(sigma, x)


@pytest.mark.parametrize("levels", dd.LEVELS)
def test_eq07_noisy_copies_in_a_run(trace, levels):
    """Levels and noise of both copies in a run of four steps: fresh noise for each but shared."""
    record = [(dd, "gradients"), (BatchRandom, "randint"), (BatchRandom, "shared_randint")]
    flags = ["--levels", levels, "--nfe", 4, "--ratio", 1, "--iters", 12]
    steps = trace(dd, *flags, record=record)
    calls = steps.calls["gradients"]
    k_of_calls = [call.result for call in steps.calls["shared_randint"]]
    assert len(calls) == len(k_of_calls) == 12
    assert set(k_of_calls) == {0, 1, 2, 3}

    grid = steps.teacher.schedule.grid(1000)
    for k, call in zip(k_of_calls, calls):
        x, ca, dm, cond, teacher, fake, w, floor = call.args
        assert w == 2
        assert floor == (0 if levels == "shared" else dd.PRESETS["toy-cond"]["floor"])
        assert teacher is steps.teacher
        assert fake is steps.critic.fake
        assert x.requires_grad
        assert not ca[0].requires_grad
        assert not dm[0].requires_grad
        assert (ca is dm) == (levels == "shared")
        if levels != "shared":
            assert not torch.allclose(noise_of(x, ca), noise_of(x, dm), atol=0.1)
        for eps in (noise_of(x, ca), noise_of(x, dm)):
            assert eps.abs().max() < 5
            assert eps.std() > 0.3
        assert ca[2].min() >= grid[20]
        if k > 1:  # of 16 draws of all levels, some have more noise than the student's input
            input_level = grid[INDICES[k]]
            assert (ca[2].max() < input_level) == (levels in ("hybrid", "constrained"))
            assert (dm[2].max() < input_level) == (levels == "constrained")

    drawn = {call.args[1:] for call in steps.calls["randint"]}
    assert (0, 1000) in drawn  # of the critic: all levels, for every choice of --levels
    expected = {(20, 981)}
    if levels in ("hybrid", "constrained"):
        expected |= {(20, 749), (20, 499), (20, 249)}
    assert {(low, high) for low, high in drawn if low == 20} == expected


ROUTES = ["", "--nfe 4", "--levels shared", "--levels constrained --nfe 2", "--gan", "--cfg 1"]
ROUTES += ["--regulariser none --gan --nfe 2", "--regulariser moments --moments 0 1 --gan"]
ROUTES += ["--ema 500"]


@pytest.mark.parametrize("flags", ROUTES)
def test_gradient_routing(trace, flags):
    """Every weight of the network whose turn it is gets a gradient and moves; no other does."""
    steps = trace(dd, "--iters", 5, *flags.split())
    assert [step.role for step in steps] == ["student", "critic", "critic"] * 2 + [
        "student",
        "critic",
    ]
    for step in steps:
        for name, grads in step.grads.items():
            found = [g is not None for g in grads]
            assert found == [name == step.role] * len(grads), (step.role, name)
        moved = {name for name in step.before if step.moved(name)}
        assert moved == {step.role}
    for a, b in zip(steps, steps[1:]):  # nothing moves between the steps
        for name in a.after:
            assert torch.equal(a.after[name], b.before[name])
    assert all(p.requires_grad for p in steps.student.parameters())
    assert all(p.requires_grad for p in steps.critic.parameters())
    assert not any(p.requires_grad for p in steps.teacher.parameters())


@pytest.mark.parametrize("flags, per_turn, per_iteration", [("", 1, 1), ("--gan", 2, 2)])
def test_passes_with_gradient(trace, monkeypatch, flags, per_turn, per_iteration):
    """Of a student turn (1), and (11) for its GAN; of each iteration the critic's own passes."""
    passes, forward = [], Toy.forward

    def counted(model, *args, **kwargs):
        passes.append(torch.is_grad_enabled())
        return forward(model, *args, **kwargs)

    monkeypatch.setattr(Toy, "forward", counted)
    flags = ["--iters", 6, "--nfe", 3, "--ratio", 3, *flags.split()]
    steps = trace(dd, *flags, record=[(dd, "Head")])
    assert len(steps) == 8
    assert not any(call.args[0].requires_grad for call in steps.calls["Head"])
    assert sum(passes) == 2 * per_turn + 6 * per_iteration


def test_flags_of_a_run_without_dm():
    """--regulariser none and moments: no critic to train, unless for the GAN."""

    def parse(*flags):
        return dd.parse_args(["--teacher", "toy-cond", "--ratio", "4", "--regulariser", *flags])

    assert parse("none").ratio == 1
    assert parse("none", "--gan").ratio == 4
    assert parse("moments", "--moments", "0", "1").ratio == 1
    assert parse("dm").ratio == 4
    for flags, message in (
        (["moments"], "add --moments M V"),
        (["moments", "--moments", "0", "0"], "expected a mean and a variance > 0"),
        (["none", "--cfg", "1"], "--cfg 1 switches CA off too"),
        (["none", "--levels", "shared"], "--levels shared sets the levels of DM"),
    ):
        with pytest.raises(UserError, match=message):
            parse(*flags)


def test_a_run_without_a_critic(trace):
    """CA alone: every iteration is a student step, and the critic is not evaluated."""
    flags = ["--regulariser", "none", "--nfe", 2]
    steps = trace(dd, "--iters", 5, *flags, record=[(dd.Critic, "forward"), (dd, "gradients")])
    assert [step.role for step in steps] == ["student"] * 5
    assert all(step.moved("student") for step in steps)
    assert not steps.calls["forward"]
    assert all(call.args[2] is None for call in steps.calls["gradients"])


def mean_radius(steps):
    """Of samples of the student in four steps; the data have 1."""
    noise = iter([normal(512, 2, seed=i).float() for i in range(4)])
    cond = steps.teacher.encode(torch.arange(512) % 8)
    x = dd.sample(steps.student, next(noise), cond, 4, lambda: next(noise))
    return x.norm(dim=1).mean().item()


def test_ca_alone_runs_away_and_dm_holds_it(trace):
    """After the same 80 student steps at w = 2."""
    same = ["--nfe", 4, "--batch", 64, "--lr", 1e-3, "--lr-fake", 2e-3]
    alone = trace(dd, "--iters", 80, *same, "--regulariser", "none")
    both = trace(dd, "--iters", 240, *same, "--ratio", 3)
    assert mean_radius(alone) > 3
    assert 0.5 < mean_radius(both) < 2


# ---- broken on purpose ---------------------------------------------------------------------------
# A wrong function in place of one of the script's, and a test above that must fail with it.

right = {name: getattr(dd, name) for name in ("gradients", "draw_levels", "count_cleaner")}


def gradients_with(change):
    def wrong(*args):
        return change(*right["gradients"](*args))

    return wrong


def gradients_with_dm_at_the_level_of_ca(x, ca, dm, *args):
    g_ca, _, n_ca, _ = right["gradients"](x, ca, dm, *args)
    _, g_dm, _, n_dm = right["gradients"](x, ca, tuple(ca), *args)
    return g_ca, g_dm, n_ca, n_dm


def draw_levels_as(levels):
    return lambda _, *args: right["draw_levels"](levels, *args)


BROKEN = {
    "clock": (
        "count_cleaner",
        lambda *args: [1000 - n for n in right["count_cleaner"](*args)],
        lambda: test_eq07_ranges(VP()),
    ),
    "sign of CA": (
        "gradients",
        gradients_with(lambda g_ca, g_dm, n_ca, n_dm: (-g_ca, g_dm, n_ca, n_dm)),
        test_eq04_eq05_their_sum_is_dmds_direction,
    ),
    "sign of DM": (
        "gradients",
        gradients_with(lambda g_ca, g_dm, n_ca, n_dm: (g_ca, -g_dm, n_ca, n_dm)),
        test_eq07_fixed_points_of_hybrid,
    ),
    "w for w - 1": (
        "gradients",
        gradients_with(lambda g_ca, g_dm, n_ca, n_dm: (4 / 3 * g_ca, g_dm, n_ca, n_dm)),
        lambda: test_eq07_shared_is_dmd2(torch.float64, 1e-12, 0.02, 4.0),
    ),
    "DM restricted too": (
        "draw_levels",
        draw_levels_as("constrained"),
        test_eq07_fixed_points_of_hybrid,
    ),
    "CA not restricted": (
        "draw_levels",
        draw_levels_as("full"),
        test_eq07_fixed_points_of_hybrid,
    ),
    "one normaliser for both": (
        "gradients",
        gradients_with(
            lambda g_ca, g_dm, n_ca, n_dm: (g_ca, g_dm * (n_dm / n_ca)[:, None], n_ca, n_dm)
        ),
        test_eq03_eq04_eq05_eq06_by_hand,
    ),
    "DM at the level of CA": (
        "gradients",
        gradients_with_dm_at_the_level_of_ca,
        test_eq03_eq04_eq05_eq06_by_hand,
    ),
    "no floor": (
        "gradients",
        lambda *args: right["gradients"](*args[:-1], 0.0),
        test_eq03_eq04_eq05_eq06_by_hand,
    ),
    "target with graph": (
        "dm_loss",
        lambda x, g: 0.5 * F.mse_loss(x, x - g),
        test_eq08_autograd_of_the_loss_is_the_sum_over_numel,
    ),
    "indices instead of levels": (
        "term_levels",
        lambda schedule, grid: (grid, 20, 981),
        test_eq07_final_levels_of_a_flow_are_clamped,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_on_purpose(name, monkeypatch):
    function, wrong, test = BROKEN[name]
    test()
    monkeypatch.setattr(dd, function, wrong)
    with pytest.raises(AssertionError):
        test()


def test_cosine_leaves_out_rounding():
    """Of samples where a term is 0 up to rounding: no value, whatever its direction."""
    x = torch.ones(4, 2)
    g_ca = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1e-5, 0.0], [1.0, 0.0]])
    g_dm = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    norm = torch.full((4,), 2.0)
    found = dd.cosine(x, g_ca, g_dm, norm, norm)
    assert found[:2].tolist() == pytest.approx([1, -(0.5**0.5)])
    assert found[2:].isnan().all()
    assert dd.cosine(0 * x, 0 * g_ca, g_dm, norm, norm).isnan().all()
    assert dd.cosine(0 * x, g_ca, 0 * g_dm, norm, norm).isnan().all()
