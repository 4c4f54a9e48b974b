"""Invariants of Decoupled DMD (arXiv 2511.22677): closed forms on Gaussians, the limit in which it is DMD2, noise levels, who is trained by what."""

import math
import signal
import sys

import pytest
import torch
import torch.nn as nn

import decoupled_dmd as dd
import dmd2
from common.errors import UserError
from common.model import Model
from common.rng import BatchRandom
from common.run import Run
from common.sampling import generate, teacher_sample
from common.schedules import EDM, VP, Flow, expand
from common.teachers.load import load_teacher

STEPS = dd.step_indices(4)
KINDS = ["hybrid", "full", "constrained", "shared"]


class Gauss(nn.Module):
    """Optimal denoiser of N(mean, std^2 I): with label 1 the conditional, with label 0 the unconditional data. Counts rows and calls for null."""

    def __init__(self, mean=(0.0, 1.0), std=(1.0, 1.0), schedule=None):
        super().__init__()
        self.mean, self.std, self.schedule = (
            nn.Parameter(torch.tensor(mean, dtype=torch.float64)),
            torch.tensor(std, dtype=torch.float64),
            schedule,
        )
        self.rows, self.nulls, self.inputs = [], 0, []

    def forward(self, x_t, alpha, sigma, cond):
        self.rows.append(len(x_t))
        self.inputs.append(x_t)
        a, s, m, d = (
            expand(alpha, x_t),
            expand(sigma, x_t),
            expand(self.mean[cond["labels"]], x_t),
            expand(self.std[cond["labels"]], x_t),
        )
        return ((d**2 * a * x_t + s**2 * m) / (a**2 * d**2 + s**2)).to(x_t.dtype)

    def null(self, n):
        self.nulls += 1
        return dict(labels=torch.zeros(n, dtype=torch.int64))

    guided, pair = Model.guided, Model.cond_and_uncond


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def copy_at(x, sigma, seed=1):
    """A noisy copy of x on the flow schedule; sigma: number or [B]."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64).expand(len(x))
    return (
        dd.renoise(x.detach(), 1 - sigma, sigma, normal(*x.shape, seed=seed).to(x.dtype)),
        1 - sigma,
        sigma,
    )


def label(x):
    return dict(labels=torch.ones(len(x), dtype=torch.int64))


def every(a, b, n=1000):
    """In place of random draws from a..b-1: n evenly spaced ones, so that a mean over them is the expectation."""
    return a + torch.arange(n) * (b - a) // n


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---- T1, T2: the identity; shared is DMD2 ----------------------------------------------------------------------------------------------------


def check_identity():
    """The guided estimate minus the critic's is DM plus CA: one noisy copy, no normaliser."""
    x, teacher, fake = normal(64, 6), Gauss((0.2, 0.9), (0.8, 0.5)), Gauss((0.0, 0.4), (1.0, 0.6))
    one = copy_at(x, torch.linspace(0.02, 0.98, 64))
    g_ca, g_dm, _, _ = dd.gradients(x, one, one, label(x), teacher, fake, 3.5, "none")
    r, f = teacher.guided(*one, label(x), 3.5), fake(*one, label(x))
    assert (
        (g_ca + g_dm - (f - r)).abs().max() < 1e-13
        and g_ca.abs().mean() > 0.1
        and g_dm.abs().mean() > 0.1
    )


def check_shared_is_dmd2(dtype=torch.float64, w=4.0, bound=1e-12):
    """g and the gradient it gives the student's weights, under the same noise."""
    x, teacher, fake = (
        normal(64, 6).to(dtype),
        Gauss((0.2, 0.9), (0.8, 0.5)),
        Gauss((0.0, 0.4), (1.0, 0.6)),
    )
    one = copy_at(
        x, torch.linspace(0.02 if dtype == torch.float64 else 0.1, 0.98, 64)
    )  # below, f - r and x - r are differences of nearly equal numbers
    theirs = dmd2.dm_gradient(x, *one, label(x), teacher, fake, w)[0]
    g_ca, g_dm, n_ca, n_dm = dd.gradients(
        x, one, one, label(x), teacher, fake, w, "guided", floor=0.1
    )
    assert relative(g_ca + g_dm, theirs) < bound and torch.equal(n_ca, n_dm)
    a, b = (v.clone().requires_grad_() for v in (x, x))
    ours, reference = dd.generator_loss(a, g_ca + g_dm), dmd2.dm_loss(b, theirs)
    ours.backward()
    reference.backward()
    assert relative(a.grad, b.grad) < bound and ours.item() == pytest.approx(
        reference.item(), rel=10 * bound
    )


def test_identity():
    check_identity()


@pytest.mark.parametrize("w", [1.0, 1.5, 8.0])
@pytest.mark.parametrize(
    "dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["float64", "float32"]
)
def test_shared_is_dmd2(dtype, bound, w):
    if w > 1:
        check_shared_is_dmd2(dtype, w, bound)
    x, teacher, fake = normal(8, 6).to(dtype), Gauss((0.2, 0.9)), Gauss((0.0, 0.4))
    dm = copy_at(x, 0.6)
    g = dd.gradients(x, None, dm, label(x), teacher, fake, 1.0, "guided")[
        1
    ]  # w = 1: only DM is left, and it is all of DMD2
    assert relative(g, dmd2.dm_gradient(x, *dm, label(x), teacher, fake, 1.0)[0]) < bound


def check_autograd():
    teacher, fake = Gauss((0.2, 0.9)), Gauss((0.0, 0.4))
    x = normal(16, 4, 3, 3).requires_grad_()
    g_ca, g_dm, n_ca, n_dm = dd.gradients(
        x, copy_at(x, 0.3), copy_at(x, 0.7, seed=2), label(x), teacher, fake, 3.0, floor=0.1
    )
    assert not any(v.requires_grad for v in (g_ca, g_dm, n_ca, n_dm))
    loss = dd.generator_loss(x, g_ca + g_dm)
    loss.backward()
    assert (x.grad - (g_ca + g_dm) / x.numel()).abs().max() < 1e-18 and g_ca.abs().min() > 0
    assert loss.item() == pytest.approx(0.5 * (g_ca + g_dm).square().mean().item(), rel=1e-12)
    assert teacher.mean.grad is None and fake.mean.grad is None


def test_autograd_of_the_loss_is_the_sum_over_numel():
    check_autograd()


def check_by_hand():
    """Every term from its own copy, with its own normaliser, from calls made one by one."""
    x, teacher, fake, w, floor = (
        normal(64, 5),
        Gauss((0.2, 0.9), (0.8, 0.5)),
        Gauss((0.0, 0.4), (1.0, 0.6)),
        3.0,
        0.2,
    )
    ca, dm, y = (
        copy_at(x, torch.linspace(0.02, 0.5, 64)),
        copy_at(x, torch.linspace(0.98, 0.02, 64), seed=2),
        label(x),
    )
    g_ca, g_dm, n_ca, n_dm = dd.gradients(x, ca, dm, y, teacher, fake, w, floor=floor)
    c_ca, u, c_dm, f = (
        teacher(*ca, y),
        teacher(*ca, teacher.null(64)),
        teacher(*dm, y),
        fake(*dm, y),
    )
    size = lambda c: (x - c).abs().mean(1)
    assert torch.allclose(n_ca, size(c_ca).clamp(min=floor), rtol=1e-14, atol=0) and torch.allclose(
        n_dm, size(c_dm).clamp(min=floor), rtol=1e-14, atol=0
    )
    assert (n_ca == floor).any() and (n_ca > floor).any() and not torch.equal(n_ca, n_dm)
    assert (g_ca + (w - 1) * (c_ca - u) / n_ca[:, None]).abs().max() < 1e-13 and (
        g_dm + (c_dm - f) / n_dm[:, None]
    ).abs().max() < 1e-13


def test_terms_by_hand():
    check_by_hand()


def test_zero_over_zero_is_zero():
    x = torch.full((2, 3), 0.3, dtype=torch.float64)
    point = Gauss((0.3, 0.3), (0.0, 0.0))
    for mode in ("own", "guided"):
        one = copy_at(x, 0.5)
        g = dd.gradients(
            x, one, one, label(x), point, Gauss((0.3, 0.3), (0.0, 0.0)), 2.0, mode, floor=1e-8
        )
        assert torch.equal(g[0], torch.zeros_like(x)) and torch.equal(g[1], torch.zeros_like(x))


# ---- T3 - T6: what each term does ------------------------------------------------------------------------------------------------------------


def test_nothing_moves_at_the_goal():
    """w = 1 and a critic that knows the student, which is the teacher's conditional: both terms vanish pointwise."""
    x, teacher, fake = (
        0.9 + 0.5 * normal(64, 5),
        Gauss((0.2, 0.9), (0.8, 0.5)),
        Gauss((7.0, 0.9), (0.1, 0.5)),
    )
    g_ca, g_dm, _, _ = dd.gradients(
        x, copy_at(x, 0.3), copy_at(x, 0.7), label(x), teacher, fake, 1.0
    )
    assert g_dm.abs().max() < 1e-15 and g_ca.abs().max() == 0


@pytest.mark.parametrize("student", [-3.0, 0.0, 5.0])
def test_ca_has_no_fixed_point(student):
    """Equal variances: c - u is w(sigma) (m_c - m_u) wherever the student is, here 0.5 at sigma = 0.5, without any spread."""
    x = student + normal(1000, 1)
    g, zero, n, _ = dd.gradients(
        x, copy_at(x, 0.5), None, label(x), Gauss((0.0, 1.0)), None, 2.0, "none"
    )
    assert (
        (g + 0.5).abs().max() < 1e-12
        and g.std() < 1e-12
        and torch.equal(zero, torch.zeros_like(x))
        and torch.equal(n, torch.ones_like(n))
    )


@pytest.mark.parametrize("v_u, slope", [(0.5, 1 / 6), (1.0, 0.0), (2.0, -1 / 6)])
def test_ca_expands_or_contracts(v_u, slope):
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    same = (
        0.5 * x,
        torch.full((2,), 0.5, dtype=torch.float64),
        torch.full((2,), 0.5, dtype=torch.float64),
    )  # no noise: the map is linear
    g = dd.gradients(
        x, same, None, label(x), Gauss((0.0, 0.0), (v_u**0.5, 1.0)), None, 2.0, "none"
    )[0]
    assert -(g[1] - g[0]).item() == pytest.approx(slope, abs=1e-12)


FIXED = [
    (999, 3.0),
    (749, 2.3733),
    (499, 1.6137),
    (249, 1.1200),
]  # m_c + (w - 1) Rho (m_c - m_u), w = 3, m_c = 1, m_u = 0


def fixed_point(step, kind="hybrid", iters=150):
    """Mean and std at which the student N(m, s^2) rests: one-dimensional Gaussians of unit variance, an exact critic, no normaliser, all levels of a flow."""
    schedule, teacher, fake = Flow(), Gauss((0.0, 1.0)), Gauss((0.0, 0.0))
    _, table, low, high, caps = dd.level_table(schedule, [step], (0.0, 1.0))
    t_dm, t_ca = dd.draw_levels(kind, every, low, high, caps[0])
    # all is linear: two points stand for the normal z, no noise for its mean, and the means over levels are separate
    z, m, s = (
        torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(1000)[:, None],
        0.0,
        1.5,
    )
    at = lambda x, t: (dd.renoise(x, 1 - t, t, torch.zeros_like(x)), 1 - t, t)
    for _ in range(iters):
        x = m + s * z
        fake.mean.data[1], fake.std[1] = m, s
        dm = at(x, table[t_dm.repeat(2)])
        g_ca, g_dm, _, _ = dd.gradients(
            x,
            dm if kind == "shared" else at(x, table[t_ca.repeat(2)]),
            dm,
            label(x),
            teacher,
            fake,
            3.0,
            "none",
        )
        m, s = m - (g_ca + g_dm).mean().item(), s - 4 * ((g_ca + g_dm) * z).mean().item()
    return m, s


def check_fixed_points():
    for step, mean in FIXED:
        m, s = fixed_point(step)
        assert m == pytest.approx(mean, abs=0.01) and s == pytest.approx(1, abs=0.01), (step, m, s)


def test_fixed_points():
    """The range of CA decides how far the student goes beyond the conditional mean; over all levels (w = 3) exactly to the guided mean."""
    check_fixed_points()
    assert fixed_point(249, "full")[0] == pytest.approx(3, abs=0.01) and fixed_point(249, "shared")[
        0
    ] == pytest.approx(3, abs=0.01)
    assert fixed_point(249, "constrained", 400)[0] == pytest.approx(
        3, abs=0.01
    )  # both ranges narrow: the ratio of the two is 1 again


def test_weight_of_the_ranges():
    """E[w] over U(0, a), the numbers behind FIXED, by the levels of the script."""
    for a, e in ((1000, 0.5), (750, 0.343332), (500, 0.153426), (250, 0.029996)):
        s = Flow().grid(1000)[:a] - 0.0005
        w = s**2 / ((1 - s) ** 2 + s**2)
        assert w.mean().item() == pytest.approx(e, abs=1e-6)
        assert 0.5 + math.log(2 * (a / 1000) ** 2 - 2 * a / 1000 + 1) / (
            4 * a / 1000
        ) == pytest.approx(e, abs=1e-6)


# ---- T7, T8: noise levels --------------------------------------------------------------------------------------------------------------------


def ranges(kind, cap, low=20, high=980):
    seen = []
    t_dm, t_ca = dd.draw_levels(
        kind, lambda a, b: seen.append((a, b - 1)) or torch.zeros(2), low, high, cap
    )
    assert (t_dm is t_ca) == (kind == "shared")
    return seen


def check_ranges():
    """VP indices; at 999 CA has the range of DM, later it is cleaner than the student's input, and never empty."""
    for schedule in (VP(), EDM()):
        _, _, low, high, caps = dd.level_table(schedule, [*STEPS, 15], (0.02, 0.98))
        assert (low, high, caps) == (20, 980, [1000, 749, 499, 249, 15])
        all_, narrow = [(20, 980)], [[(20, 980)], [(20, 748)], [(20, 498)], [(20, 248)], [(20, 20)]]
        for cap, n in zip(caps, narrow):
            assert ranges("shared", cap) == all_ and ranges("full", cap) == all_ * 2
            assert (
                ranges("constrained", cap) == n * 2 and ranges("hybrid", cap) == all_ + n
            )  # DM first


def test_ranges():
    check_ranges()


@pytest.mark.parametrize("levels", ["shifted", "unshifted"])
@pytest.mark.parametrize("shift", [0.3, 1.0, 4.0])
@pytest.mark.parametrize(
    "schedule", [Flow(3.0), Flow(0.5), VP(), EDM()], ids=["flow3", "flow05", "vp", "edm"]
)
def test_ca_is_cleaner_than_the_input(schedule, shift, levels):
    """For all shifts, by the levels themselves; DM sees both sides of every step."""
    if levels == "unshifted" and schedule.config["name"] != "flow":
        return
    grid, table, low, high, caps = dd.level_table(schedule, STEPS, (0.02, 0.98), shift, levels)
    assert (grid.diff() >= 0).all() and len(table) == 1000
    for step, cap in zip(STEPS, caps):
        t_dm, t_ca = dd.draw_levels("hybrid", every, low, high, cap)
        t_g, ca, dm = schedule.grid(1000)[step], table[t_ca], table[t_dm]
        assert ca.max() <= max(t_g, 0.02) and dm.min() < t_g
        assert step == 999 or dm.max() > t_g or shift < 1
        if step == 999:
            assert torch.equal(ca, dm)
        if step < 999 and shift == 1:
            nearest = table[(table < t_g).nonzero().max()]
            assert ca.max() == nearest  # and no cleaner than it has to be


def check_shift():
    """s = 3: grid of the steps, levels drawn before the shift (the author's example), after it, and held in the bounds."""
    flow = Flow(3.0)
    assert flow.grid(1000)[STEPS].tolist() == pytest.approx([1, 0.9, 0.75, 0.5])
    assert flow.grid(1000)[dd.step_indices(8)].tolist() == pytest.approx(
        [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3], abs=5e-5
    )

    def draws(bounds, levels="shifted"):
        _, table, low, high, caps = dd.level_table(flow, [249], bounds, 1.0, levels)
        return table[
            dd.draw_levels("hybrid", lambda a, b: every(a, b, 20000), low, high, caps[0])[1]
        ]

    s = draws((0.0, 1.0))
    assert (
        0 < s.min()
        and s.max() < 0.5
        and s.mean().item() == pytest.approx(0.2836, abs=6e-4)
        and s.median().item() == pytest.approx(0.3, abs=2e-3)
    )
    s = draws((0.02, 0.98))
    assert (
        s.min() == 0.02
        and s.mean().item() == pytest.approx(0.2839, abs=6e-4)
        and (s == 0.02).double().mean().item() == pytest.approx(0.027, abs=4e-3)
    )
    s = draws((0.0, 1.0), "unshifted")
    assert s.max() <= 0.5 and s.max() > 0.498 and s.mean().item() == pytest.approx(0.25, abs=1e-3)


def test_time_shift():
    check_shift()
    for schedule in (Flow(), VP(), EDM()):
        with pytest.raises(UserError, match="--levels unshifted"):
            dd.level_table(schedule, STEPS, (0.02, 0.98), 1.0, "unshifted")
    for shift in (0.3, 3.0):  # --shift on a plain flow is the same map as a schedule's own
        grid = dd.level_table(Flow(), STEPS, (0.0, 1.0), shift)[0]
        assert torch.allclose(grid, Flow(shift).grid(1000), atol=1e-7)


# ---- T9: the mean-variance regulariser -----------------------------------------------------------------------------------------------------


def test_moments():
    x = normal(7, 3, 16, 16)
    x = (x - x.flatten(1).mean(1).view(-1, 1, 1, 1)) / x.flatten(1).std(1, correction=0).view(
        -1, 1, 1, 1
    )  # mean 0, variance 1, each
    at = lambda x: dd.moments_loss(x, 0.075, 0.81).item()
    fits = 0.075 + 0.9 * x
    assert at(fits) == pytest.approx(0, abs=1e-14)
    assert at(0.075 + 0.9 * 2**0.5 * x) == pytest.approx(0.153426, abs=1e-6) and at(
        0.075 + 0.9 * 0.5**0.5 * x
    ) == pytest.approx(0.096574, abs=1e-6)
    assert at(fits + 0.9) == pytest.approx(0.5, abs=1e-12) and at(
        torch.cat([fits, fits + 0.9])
    ) == pytest.approx(0.25, abs=1e-12)
    fits.requires_grad_()
    dd.moments_loss(fits, 0.075, 0.81).backward()
    assert fits.grad.abs().max() < 1e-15
    wide = (0.075 + 1.2 * x).requires_grad_()
    dd.moments_loss(wide, 0.075, 0.81).backward()
    assert (wide.grad * x).sum() > 0  # descent makes it narrower


# ---- T12 and the sampler -------------------------------------------------------------------------------------------------------------------


def test_cost():
    x, teacher, fake = normal(8, 3), Gauss(), Gauss()
    a, b = copy_at(x, 0.3), copy_at(x, 0.7)
    for ca, dm, w, rows, fakes, nulls in (
        (a, b, 2.0, [24], [8], 1),
        (a, a, 2.0, [16], [8], 1),
        (None, b, 1.0, [8], [8], 0),
        (a, None, 2.0, [16], [], 1),
    ):
        teacher.rows, fake.rows, teacher.nulls = [], [], 0
        dd.gradients(x, ca, dm, label(x), teacher, fake, w)
        assert (teacher.rows, fake.rows, teacher.nulls) == (rows, fakes, nulls)


def test_step_grid_and_nonsense():
    assert [dd.step_indices(n) for n in (1, 2, 4)] == [[999], [999, 499], [999, 749, 499, 249]]
    assert all(dd.step_indices(n) == dmd2.step_indices(n) for n in range(1, 1000))
    for n, steps in (
        (1000, None),
        (2, "999"),
        (2, "499,999"),
        (2, "999,999"),
        (1, "1000"),
        (1, "-1"),
        (2, "a,b"),
        (1, ""),
        (1, "999,x"),
        (1, "²"),
    ):
        with pytest.raises(UserError, match="--nfe" if steps is None else "--steps"):
            dd.step_indices(n, steps)


@pytest.mark.parametrize("rollout", ["stochastic", "deterministic"])
@pytest.mark.parametrize("schedule", [VP(), EDM(), Flow(3.0)], ids=["vp", "edm", "flow"])
@pytest.mark.parametrize("nfe", [1, 2, 4, 8])
def test_training_inputs_are_the_samplers_inputs(schedule, nfe, rollout):
    """Bit for bit; k calls without gradient for the input of step k. Only the stochastic rule asks for more noise."""
    noises, student = (
        [normal(5, 3, seed=i) for i in range(nfe)],
        Gauss((0.7, 0.7), (0.6, 0.6), schedule),
    )
    times, y = schedule.grid(1000)[dd.step_indices(nfe)], label(torch.zeros(5))
    rest = iter(noises[1:])
    x = dd.sample(student, noises[0], y, nfe, lambda: next(rest), rollout=rollout)
    inputs, student.inputs = student.inputs, []
    assert (
        len(inputs) == nfe
        and not x.requires_grad
        and (len(list(rest)) == 0 or rollout == "deterministic")
    )
    assert torch.equal(inputs[0], noises[0] * (80 if isinstance(schedule, EDM) else 1))
    for k in range(nfe):
        rest, student.inputs = iter(noises[1:]), []
        x_in = dd.backward_simulation(
            student, schedule, times, k, y, noises[0], lambda: next(rest), rollout
        )
        assert torch.equal(x_in, inputs[k]) and len(student.inputs) == k and not x_in.requires_grad


@pytest.mark.parametrize("schedule", [Flow(1.0), Flow(3.0)], ids=["flow1", "flow3"])
def test_deterministic_rollout_is_the_ode_sampler(schedule):
    """Euler steps on the flow, written out with the velocity, and the teacher's own sampler on the same grid."""
    net, z, y = Gauss((0.7, 0.7), (0.6, 0.6), schedule), normal(50, 3), label(torch.zeros(50))
    x = dd.sample(net, z, y, 4, None, rollout="deterministic")
    sigma, v = [*schedule.grid(1000)[STEPS], 0.0], z.clone()
    for s, r in zip(sigma, sigma[1:]):
        v = v + (r - s) * (v - net(v, 1 - s, s, y)) / s
    assert (x - v).abs().max() < 1e-12
    assert (x - teacher_sample(net, z, y, 4)).abs().max() < 1e-6
    assert (x - dd.sample(net, z, y, 4, lambda: normal(50, 3, seed=1))).abs().max() > 0.1


@pytest.mark.parametrize("rollout", ["stochastic", "deterministic"])
def test_a_sample_does_not_depend_on_its_batch(rollout):
    student = load_teacher("toy-cond").copy()
    sampler = lambda m, z, c, noise: dd.sample(m, z, c, 4, noise, rollout=rollout)
    whole = next(generate(sampler, student, 12, seed=3, batch=12))[2]
    parts = {
        i: row
        for part, _, x in generate(sampler, student, 12, seed=3, batch=5, rank=1, world=2)
        for i, row in zip(part.tolist(), x)
    }
    assert sorted(parts) == [1, 3, 5, 7, 9, 11] and all(
        torch.allclose(row, whole[i], atol=1e-5) for i, row in parts.items()
    )


# ---- runs of main() in this process ----------------------------------------------------------------------------------------------------------


class Trace(list):
    """main() of a script on the toy teacher with labels. One entry per optimiser step: role, gradients, weights before and after; `calls`: arguments of
    every call of `gradients`; `drawn`: ranges of all index draws; `k`: steps of the student."""

    def __init__(self, monkeypatch, tmp_path, module, *flags):
        super().__init__()
        self.made, self.calls, self.drawn, self.k = {}, [], [], []
        for owner, name, key in (
            (module, "Critic", "critic"),
            (module, "EMA", "ema"),
            (models, "load_teacher", "teacher"),
        ):
            self.keep(monkeypatch, owner, name, key)
        if module is dd:
            gradients = dd.gradients
            monkeypatch.setattr(dd, "gradients", lambda *a: self.calls.append(a) or gradients(*a))
        step, integers, shared = Run.step, BatchRandom.integers, BatchRandom.shared_int
        monkeypatch.setattr(
            BatchRandom,
            "shared_int",
            lambda draw, *a: self.k.append(shared(draw, *a)) or self.k[-1],
        )
        monkeypatch.setattr(Run, "step", lambda run, opt, clip: self.step(step, run, opt, clip))
        monkeypatch.setattr(
            BatchRandom, "integers", lambda draw, *a: self.drawn.append(a) or integers(draw, *a)
        )
        for name in ("export", "pictures", "report"):
            monkeypatch.setattr(metrics, name, lambda *a, **k: None)
        common = [
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
        same = [
            "--lr",
            "5e-4",
            "--lr-fake",
            "5e-4",
            "--ratio",
            "2",
            "--cfg",
            "2",
            "--cooldown",
            "0",
        ]
        monkeypatch.setattr(sys, "argv", ["script.py", *common, *same, *map(str, flags)])
        handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            module.main()
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
        nets, before = self.nets(), self.weights()
        role = next(k for k, net in nets.items() if next(net.parameters()) is params[0])
        grads = {
            k: [None if p.grad is None else p.grad.clone() for p in net.parameters()]
            for k, net in nets.items()
        }
        norm = step(run, opt, clip)
        self.append(dict(role=role, grads=grads, before=before, after=self.weights()))
        return norm

    def flat(self, i):
        return torch.cat([g.flatten() for g in self[i]["grads"][self[i]["role"]]]).double()


@pytest.fixture
def trace(monkeypatch, tmp_path):
    return lambda module, *flags: Trace(monkeypatch, tmp_path, module, *flags)


@pytest.mark.parametrize("flags", ["--nfe 1", "--nfe 4", "--nfe 4 --cfg 1", "--nfe 2 --gan"])
def test_a_run_with_the_shared_schedule_is_dmd2(trace, flags):
    """Same seed: the same draws, sample, gradient of the student and of the critic, iteration by iteration."""
    flags = flags.split() + ["--iters", 5]
    ours, theirs = trace(dd, "--schedule", "shared", *flags), trace(dmd2, *flags)
    assert [s["role"] for s in ours] == [s["role"] for s in theirs] and len(ours) == 8
    assert (
        relative(ours.flat(0), theirs.flat(0)) < 1e-6
        and relative(ours.flat(1), theirs.flat(1)) < 1e-6
    )
    for a, b in zip(ours, theirs):  # rounding grows through Adam
        assert all(relative(a["after"][k], b["after"][k]) < 1e-5 for k in ("student", "critic"))
    other = trace(dd, *flags) if "--cfg" not in flags else None
    assert other is None or relative(other.flat(0), theirs.flat(0)) > 1e-2  # and only that schedule


def test_one_step_hybrid_is_full(trace):
    """T10: the same ranges, hence the same draws and the same run, bit for bit; with four steps no longer."""
    run = lambda *flags: trace(dd, "--iters", 6, *flags)[-1]["after"]["student"]
    full, four = run("--nfe", 1, "--schedule", "full"), run("--nfe", 4)
    assert torch.equal(run("--nfe", 1), full) and not torch.equal(
        run("--nfe", 4, "--schedule", "full"), four
    )


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_the_sample(trace, kind):
    """Levels and noise of both copies in a run of four steps: fresh noise for each, unless shared."""
    run = trace(dd, "--schedule", kind, "--nfe", 4, "--ratio", 1, "--iters", 12, "--log-every", 1)
    for x, ca, dm, cond, teacher, fake, w, mode, floor in run.calls:
        assert (
            w == 2
            and mode == ("guided" if kind == "shared" else "own")
            and floor == dd.PRESETS["toy"]["floor"]
            and teacher is run.made["teacher"]
        )
        assert fake is run.made["critic"].fake and x.requires_grad and not ca[0].requires_grad
        eps = [((x_t - expand(a, x) * x.detach()) / expand(s, x)) for x_t, a, s in (ca, dm)]
        assert (ca is dm) == (kind == "shared") and (
            ca is dm or not torch.allclose(eps[0], eps[1], atol=0.1)
        )
        assert all(e.abs().max() < 5 and e.std() > 0.3 for e in eps)
    t_g = run.made["teacher"].schedule.grid(1000)[STEPS]
    assert set(run.k) == {0, 1, 2, 3} and len(run.k) == len(run.calls) == 12
    for k, (_, ca, dm, *_) in zip(
        run.k, run.calls
    ):  # 16 levels each: at step 3 a third of all are above the student's input
        assert k == 0 or (ca[2].max() < t_g[k]) == (kind in ("hybrid", "constrained")) or k == 1
        assert k == 0 or (dm[2].max() < t_g[k]) == (kind == "constrained") or k == 1
        assert ca[2].min() >= run.made["teacher"].schedule.grid(1000)[20]
    lows = {(a, b) for a, b in run.drawn if a == 20}
    assert (0, 1000) in run.drawn  # the critic learns at all levels, whatever the schedule
    assert lows == (
        {(20, 981)} if kind in ("shared", "full") else {(20, 981), (20, 749), (20, 499), (20, 249)}
    )


ROUTES = [
    "",
    "--nfe 4",
    "--nfe 4 --rollout deterministic",
    "--schedule shared",
    "--schedule constrained --nfe 2",
    "--gan",
    "--regulariser none --gan --nfe 2",
    "--cfg 1",
    "--normaliser none",
    "--fake-weight x0",
    "--dm-weight 0.5 --ema 500",
]


@pytest.mark.parametrize("flags", ROUTES)
def test_gradient_routing(trace, flags):
    steps = trace(dd, "--iters", 5, *flags.split())
    assert [s["role"] for s in steps] == ["student", "critic", "critic"] * 2 + ["student", "critic"]
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
    for a, b in zip(steps, steps[1:]):
        assert all(torch.equal(a["after"][k], b["before"][k]) for k in a["after"])
    assert all(p.requires_grad for k in ("student", "critic") for p in steps.nets()[k].parameters())
    teacher = steps.nets()["teacher"]
    assert (
        not any(p.requires_grad for p in teacher.parameters())
        and not any(net.training for net in (teacher, teacher.net))
        or teacher.adapter == "toy"
    )


def test_without_a_critic(trace):
    """CA alone: every iteration is a student step, the critic is neither asked nor trained."""
    steps = trace(dd, "--iters", 5, "--regulariser", "none", "--nfe", 2)
    assert [s["role"] for s in steps] == ["student"] * 5 and all(
        dm is None for _, _, dm, *_ in steps.calls
    )
    assert all(not torch.equal(s["before"]["student"], s["after"]["student"]) for s in steps)


def test_ca_alone_runs_away_and_dm_holds_it(trace):
    """The toy of the docstring in small: after the same 80 student steps (w = 2)."""
    radius = {}
    for name, flags in dict(
        alone=["--regulariser", "none"], both=["--ratio", 3, "--iters", 240]
    ).items():
        run = trace(
            dd, "--iters", 80, "--nfe", 4, "--batch", 64, "--lr", 1e-3, "--lr-fake", 2e-3, *flags
        )
        noise = iter([normal(512, 2, seed=i).float() for i in range(4)])
        with torch.no_grad():
            x = dd.sample(
                run.nets()["student"],
                next(noise),
                run.made["teacher"].encode(torch.arange(512) % 8),
                4,
                lambda: next(noise),
            )
        radius[name] = x.norm(dim=1).mean().item()
    print(radius)
    assert radius["alone"] > 3 and 0.5 < radius["both"] < 2


# ---- broken on purpose -------------------------------------------------------------------------------------------------------------------------


def swapped(right, old, new):
    """decoupled_dmd with one piece of text replaced, as a namespace; the piece must occur once."""
    text = open(dd.__file__).read()
    assert text.count(old) == 1, old
    names = {"__name__": "broken"}
    exec(compile(text.replace(old, new), "broken", "exec"), names)
    return names[right]


BROKEN = {  # section 8: what is replaced, by what, in which function; and the check that sees it
    "clock": (
        "level_table",
        "snr(grid) > snr(times[i])",
        "snr(grid) < snr(times[i])",
        check_ranges,
    ),
    "sign of CA": ("gradients", "(w - 1) * (u - c_ca)", "(w - 1) * (c_ca - u)", check_identity),
    "sign of DM": ("gradients", "(f - c_dm) / one", "(c_dm - f) / one", check_fixed_points),
    "alpha for alpha - 1": (
        "gradients",
        "(w - 1) * (u - c_ca)",
        "w * (u - c_ca)",
        check_shared_is_dmd2,
    ),
    "DM restricted too": (
        "draw_levels",
        'narrow if kind == "constrained" else top',
        "narrow",
        check_fixed_points,
    ),
    "decoupled, but no range": (
        "draw_levels",
        'top if kind == "full" else narrow',
        "top",
        check_fixed_points,
    ),
    "one normaliser for both": (
        "gradients",
        "size(c_dm).clamp(min=floor)",
        "size(c_ca).clamp(min=floor)",
        check_by_hand,
    ),
    "DM at the level of CA": (
        "gradients",
        "else answers[-1] if dm",
        "else c_ca if dm",
        check_by_hand,
    ),
    "no floor": (
        "gradients",
        "size(c_ca).clamp(min=floor), size",
        "size(c_ca), size",
        check_by_hand,
    ),
    "graph": (
        "generator_loss",
        "F.mse_loss(x, (x - g).detach())",
        "F.mse_loss(x, x - g)",
        check_autograd,
    ),
    "bounds before the shift": (
        "level_table",
        "grid, grid.clamp(*t_range), 0, N - 1, caps",
        "grid, grid, int(t_range[0] * N), int(t_range[1] * N), caps",
        check_shift,
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_on_purpose(what, monkeypatch):
    name, old, new, check = BROKEN[what]
    check()
    monkeypatch.setattr(dd, name, swapped(name, old, new))
    with pytest.raises(AssertionError):
        check()
