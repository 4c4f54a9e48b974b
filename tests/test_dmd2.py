"""dmd2.py: its equations on closed-form Gaussians, then who is trained when in a real run.

Expected numbers were derived apart from the code.
"""

import math

import pytest
import torch
import torch.nn as nn
from helpers import byhand
from helpers.frame import check_frame
from helpers.gaussian import Gauss, f64, normal
from helpers.trace import Trace

import dmd2
from common.errors import UserError
from common.model import Model
from common.rng import BatchRandom, PerImageNoise
from common.sampling import generate
from common.schedules import EDM, VP, add_noise, eps_from_x0, native_weight
from common.teachers.load import load_teacher
from data.images import load_images

ONE = f64(1.0)


class Features(nn.Module):
    """A critic network whose only feature map is a linear function of its input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x_t, alpha, sigma, cond, features=False):
        h = self.layer(x_t)
        return [h] if features else h


def gradient(x, sigma, real, fake, seed=1):
    """dm_gradient of (4) for alpha = 1 at the levels sigma (a number or [B])."""
    sigma = f64(sigma)
    alpha = ONE.expand(sigma.shape)
    x_t = add_noise(x.detach(), alpha, sigma, normal(*x.shape, seed=seed))
    return dmd2.dm_gradient(x, x_t, alpha, sigma, {}, real, fake, 1.0)


# ---- (4), (5): the distribution-matching gradient ------------------------------------------------


def test_eq05_autograd_of_the_loss_is_g_over_numel():
    real, fake = Gauss(0.3, 0.5), Gauss(-0.2, 0.7)
    x = (0.2 * normal(16, 4, 8, 8)).requires_grad_()
    g, r, f, norm = gradient(x, torch.linspace(0.1, 20, 16), real, fake)
    loss = dmd2.dm_loss(x, g)
    loss.backward()
    assert (x.grad - g / x.numel()).abs().max() < 1e-18
    assert abs(loss.item() - 0.5 * g.square().mean().item()) < 1e-15
    for t in (g, r, f, norm, real.inputs[0], fake.inputs[0]):
        assert not t.requires_grad
    assert real.mean.grad is None
    assert fake.mean.grad is None


def test_eq04_no_gradient_if_the_critic_equals_the_teacher():
    same = Gauss(0.3, 0.5)
    for seed in range(5):
        g = gradient(3 * normal(8, 5, seed=seed), 2.0, same, same, seed)[0]
        assert torch.equal(g, torch.zeros_like(g))
        assert dmd2.dm_loss(normal(8, 5), g) == 0


def test_eq04_zero_over_zero_is_zero():
    x = torch.full((2, 3), 0.3, dtype=torch.float64)
    point = Gauss(0.3, 0.0)  # all data in one point, and x is there: x - r = 0 and f - r = 0
    g = gradient(x, 1.0, point, Gauss(0.3, 0.0))[0]
    assert torch.equal(g, torch.zeros_like(x))


def test_eq04_a_nan_of_the_teacher_stays_a_nan():
    """So that the step is skipped and counted: as a 0 it would look like a student at rest."""
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    broken = x.clone().fill_diagonal_(float("nan"))
    real = Gauss()
    real.guided = lambda *args: broken
    levels = f64(0.5, 0.5)
    g = dmd2.dm_gradient(x, x, levels, levels, {}, real, lambda *args: x, 1.0)[0]
    assert g.diagonal().isnan().all()


def test_eq04_does_not_change_with_the_scale_of_the_data():
    c = 3.7
    x = 0.5 * normal(6, 50)
    sigma = f64(0.01, 0.1, 0.5, 2.5, 10.0, 80.0)
    g = gradient(x, sigma, Gauss(0.3, 0.5), Gauss(-0.4, 0.6))[0]
    real, fake = Gauss(c * 0.3, c * 0.5), Gauss(-c * 0.4, c * 0.6)
    scaled = gradient(c * x, c * sigma, real, fake)[0]
    error = (g - scaled).abs().amax(1)
    assert error[2:].max() < 2e-15
    assert error.max() < 1e-13  # small sigma: the normaliser is small and divides rounding errors


def test_eq04_rows_are_independent():
    x = 0.5 * normal(6, 50)
    sigma = f64(0.01, 0.1, 0.5, 2.5, 10.0, 80.0)
    real, fake = Gauss(0.3, 0.5), Gauss(-0.4, 0.6)
    g = gradient(x, sigma, real, fake)[0]
    others = torch.cat([x[:1], 100 * normal(5, 50, seed=7)])
    assert torch.equal(gradient(others, sigma, real, fake)[0][0], g[0])


@pytest.mark.parametrize(
    "sigma, expected", [(0.01, -0.0351), (0.5, -0.8536), (2.5, -0.9463), (80.0, -0.9502)]
)
def test_eq04_of_shifted_gaussians(sigma, expected):
    """x ~ N(mg, s^2) and data ~ N(m, s^2): f - r is a constant u, the normaliser E|N(u, v)|."""
    m, mg, s = 0.3, -0.4, 0.5
    x = mg + s * normal(1, 1_000_000)
    g, r, f, _ = gradient(x, sigma, Gauss(m, s), Gauss(mg, s))
    u = sigma**2 * (mg - m) / (s**2 + sigma**2)
    v = s**2 * sigma**2 / (s**2 + sigma**2)
    spread = math.sqrt(2 * v / math.pi) * math.exp(-(u**2) / (2 * v))
    folded = spread + u * math.erf(u / math.sqrt(2 * v))
    assert (f - r - u).abs().max() < 1e-11  # no noise in the direction
    assert u / folded == pytest.approx(expected, abs=6e-5)
    assert g.mean().item() == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("sigma", [0.01, 0.5, 2.5, 80.0])
def test_eq04_normaliser_of_a_student_that_is_right(sigma):
    m, s = 0.3, 0.5
    v = s**2 * sigma**2 / (s**2 + sigma**2)
    x = m + s * normal(1, 1_000_000)
    norm = gradient(x, sigma, Gauss(m, s), Gauss(m, s))[3]
    assert norm.item() == pytest.approx(0.798 * math.sqrt(v), rel=3e-3)


@pytest.mark.parametrize("b, expected", [(0.8, 0.11665), (0.5, 0.0), (0.3, None)])
def test_eq04_moves_the_width_towards_the_datas(b, expected):
    """E[(f - r) z] for x = b z is sigma^2 dKL/db: positive for a wide generator, negative for a
    narrow one, zero only at the match."""
    s, sigma = 0.5, 1.3
    z = normal(1, 2_000_000)
    _, r, f, _ = gradient(b * z, sigma, Gauss(0.0, s), Gauss(0.0, b))
    formula = sigma**2 * b * (b**2 - s**2) / ((b**2 + sigma**2) * (s**2 + sigma**2))
    if expected is not None:
        assert formula == pytest.approx(expected, abs=5e-6)
    assert ((f - r) * z).mean().item() == pytest.approx(formula, abs=1e-3)
    assert (formula > 0) == (b > s)


# ---- (6): the critic's loss ----------------------------------------------------------------------


def optimal_loss(std, alpha, sigma, weight, n=1000):
    """fake_loss of the optimal denoiser of N(0, std^2), at levels alpha, sigma (0-d or [n])."""
    x = std * normal(n, 500)
    x_t = add_noise(x, alpha, sigma, normal(n, 500, seed=1))
    prediction = Gauss(0.0, std)(x_t, alpha, sigma, {})
    return dmd2.fake_loss(prediction, x, weight).item()


@pytest.mark.parametrize(
    "std, sigma, expected",
    [(0.5, 0.002, 1.0), (0.5, 0.5, 1.0), (0.5, 2.5, 1.0), (0.5, 80.0, 1.0), (0.25, 1.0, 0.2941)],
)
def test_eq06_floor_of_an_edm_critic(std, sigma, expected):
    sigma = f64(sigma)
    weight = native_weight("edm", ONE, sigma, 0.5)
    assert optimal_loss(std, ONE, sigma, weight) == pytest.approx(expected, rel=7e-3)


def test_eq06_floor_of_an_eps_critic():
    t = torch.full((1000,), 499.0)
    alpha, sigma = VP().alpha(t), VP().sigma(t)
    loss = optimal_loss(1.0, alpha, sigma, native_weight("eps", alpha, sigma))
    assert loss == pytest.approx(0.27767, rel=7e-3)


def test_eq06_weight_of_an_edm_critic():
    assert native_weight("edm", 1.0, 0.002, 0.5).item() == pytest.approx(250004)
    assert native_weight("edm", 1.0, 80.0, 0.5).item() == pytest.approx(4.00016, abs=1e-5)


def test_eq06_reaches_the_critic_only():
    student, fake = Gauss(0.1, 0.5), Gauss(0.2, 0.5)
    x = student(normal(4, 6), ONE, ONE, {})
    x_t = add_noise(x.detach(), ONE, ONE, normal(4, 6))
    prediction = dmd2.Critic(fake)(x_t, ONE, ONE, {})
    dmd2.fake_loss(prediction, x, ONE).backward()
    assert student.mean.grad is None
    assert fake.mean.grad.abs() > 0


# ---- (7), (8), (9): the GAN term -----------------------------------------------------------------


def test_eq08_at_logit_zero():
    fake = torch.zeros(5, 1, requires_grad=True)
    loss = dmd2.gen_loss(fake)
    loss.backward()
    assert loss.item() == pytest.approx(0.693147, abs=1e-6)
    assert torch.allclose(fake.grad, torch.full((5, 1), -0.5 / 5))


def test_eq09_at_logit_zero():
    fake = torch.zeros(5, 1, requires_grad=True)
    real = torch.zeros(5, 1, requires_grad=True)
    loss = dmd2.cls_loss(fake, real)
    loss.backward()
    assert loss.item() == pytest.approx(1.386294, abs=1e-6)
    assert (fake.grad > 0).all()  # descent lowers the logits of fakes
    assert (real.grad < 0).all()  # and raises the logits of real images


def test_eq07_gradient_passes_through_a_frozen_critic():
    critic = dmd2.Critic(Features())
    critic.head = dmd2.Head(torch.zeros(1, 6))
    critic.requires_grad_(False)
    x = torch.randn(4, 6, requires_grad=True)
    x_t = add_noise(x, ONE, ONE, torch.randn(4, 6))
    dmd2.gen_loss(critic(x_t, ONE, ONE, {}, logit=True)).backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in critic.parameters())


@pytest.mark.parametrize(
    "shape, halvings",
    [
        ((16, 8, 8), 1),
        ((16, 7, 7), 1),
        ((16, 4, 4), 0),
        ((48, 32, 32), 3),
        ((32, 7, 7), 1),
        ((16, 1, 1), 0),
        ((24,), 0),
    ],
)
def test_eq07_head(shape, halvings):
    head = dmd2.Head(torch.zeros(1, *shape))
    assert head(torch.randn(3, *shape)).shape == (3, 1)
    assert head(torch.randn(3, *shape).bfloat16()).dtype == torch.float32

    convs = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
    halving = [m for m in convs if m.kernel_size == (4, 4) and m.stride == (2, 2)]
    assert len(halving) == halvings
    assert all(m.out_channels == shape[0] for m in convs[:-1])
    for m in head.modules():
        if isinstance(m, nn.GroupNorm):
            assert m.num_groups == math.gcd(32, shape[0] // 4)  # 32 for the paper's widths

    h = torch.randn(3, *shape, requires_grad=True)
    head(h)[0].sum().backward()
    assert h.grad[0].norm() > 1e-3  # a group of one number would be normalised to a constant
    assert h.grad[1:].norm() == 0


def test_eq07_head_of_points_by_hand():
    head = dmd2.Head(torch.zeros(1, 6))
    first, _, last = head.layers
    h = torch.randn(3, 6)
    hidden = h @ first.weight.T + first.bias
    expected = (hidden * hidden.sigmoid()) @ last.weight.T + last.bias
    assert torch.allclose(head(h), expected, atol=1e-6)


@pytest.mark.parametrize("c, groups", [(1, 1), (9, 1), (18, 2), (64, 16), (320, 16), (1280, 32)])
def test_eq07_groups_of_the_norm(c, groups):
    norm = dmd2.group_norm(c)
    assert norm.num_groups == groups
    assert norm(torch.randn(2, c, 1, 1)).shape == (2, c, 1, 1)


@pytest.mark.parametrize("shape, n", [((16, 15, 26), 2), ((16, 26, 15), 2), ((16, 4, 30), 7)])
def test_eq07_head_of_pictures_that_are_not_square(shape, n):
    """Landscape, portrait, and frames one below the other: a sample has several logits, one for
    each square of the halved map that fits beside the last one."""
    h = torch.randn(2, *shape, requires_grad=True)
    logits = dmd2.Head(h)(h)
    assert logits.shape == (2, n)
    (grad,) = torch.autograd.grad(logits[0].sum(), h)
    assert grad[0].norm() > 1e-3
    assert grad[1].norm() == 0


# ---- (1), (2): steps, backward simulation, sampler -----------------------------------------------


@pytest.mark.parametrize(
    "n, expected",
    [
        (1, [999]),
        (2, [999, 499]),
        (3, [999, 666, 333]),
        (4, [999, 749, 499, 249]),
        (6, [999, 833, 667, 501, 335, 169]),
    ],
)
def test_step_indices(n, expected):
    assert dmd2.step_indices(n) == expected
    assert dmd2.step_indices(n, ",".join(map(str, expected))) == expected


def test_there_are_n_step_indices():
    for n in range(1, 1000):
        assert len(dmd2.step_indices(n)) == n


@pytest.mark.parametrize(
    "n, text",
    [
        (2, "999"),
        (2, "499,999"),
        (2, "999,999"),
        (1, "1000"),
        (1, "-1"),
        (2, "a,b"),
        (1, ""),
    ],
)
def test_wrong_step_indices_are_refused(n, text):
    with pytest.raises(UserError, match="--step-indices"):
        dmd2.step_indices(n, text)


def test_more_steps_than_levels_are_refused():
    with pytest.raises(UserError, match="--nfe 1000"):
        dmd2.step_indices(1000)


def test_grid_of_edm():
    grid = EDM().grid(1000)
    levels = {0: 0.002, 20: 0.003232, 100: 0.01675, 250: 0.1703, 500: 2.5265, 980: 72.05, 999: 80.0}
    for i, sigma in levels.items():
        assert grid[i].item() == pytest.approx(sigma, rel=3e-4)
    assert grid[0] == 0.002
    assert grid[999] == 80
    assert (grid < 0.5).double().mean() == pytest.approx(0.339)
    assert (grid > 5).double().mean() == pytest.approx(0.419)


@pytest.mark.parametrize(
    "t, abar, ratio",
    [
        (999, 0.0046601, 14.6146),
        (749, 0.0566236, 4.0817),
        (499, 0.2776694, 1.6129),
        (399, 0.4260861, 1.1606),
        (249, 0.6754321, 0.6932),
    ],
)
def test_grid_of_vp(t, abar, ratio):
    vp = VP()
    assert vp.grid(1000)[t] == t
    # the published table was made in float32
    assert vp.alpha(t).square().item() == pytest.approx(abar, rel=3e-6)
    assert (vp.sigma(t) / vp.alpha(t)).item() == pytest.approx(ratio, abs=6e-5)


# Mean and standard deviation of the sampler's input at step k, for the exact G of N(0.7, 0.6^2).
MOMENTS = [(0.0, 1.0), (0.1663, 0.9713), (0.3688, 0.8511), (0.5753, 0.5921)]
# The same for data with noise, the ablation --sim data.
STD_OF_NOISED_DATA = [None, 0.9817, 0.9068, 0.7535]


@pytest.mark.parametrize("k", range(4))
def test_eq02_moments_of_backward_simulation(k):
    schedule, n = VP(), 1_000_000
    times = schedule.grid(1000)[dmd2.step_indices(4)]
    seeds = iter(range(10))
    noise = lambda: normal(n, 1, seed=next(seeds))
    x = dmd2.backward_simulation(Gauss(0.7, 0.6), schedule, times, k, {}, noise(), noise)
    mean, std = MOMENTS[k]
    assert x.mean().item() == pytest.approx(mean, abs=3e-3)
    assert x.std().item() == pytest.approx(std, abs=3e-3)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_noised_data_differs_from_backward_simulation(k):
    schedule, n = VP(), 1_000_000
    t = schedule.grid(1000)[dmd2.step_indices(4)][k]
    data = 0.7 + 0.6 * normal(n, 1)
    x = add_noise(data, schedule.alpha(t), schedule.sigma(t), normal(n, 1, seed=1))
    assert x.std().item() == pytest.approx(STD_OF_NOISED_DATA[k], abs=3e-3)


@pytest.mark.parametrize("schedule", [VP(), EDM()], ids=["vp", "edm"])
@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_eq02_training_inputs_are_the_samplers_inputs(schedule, nfe):
    """Bit for bit with the same noise; the input of step k costs k passes without gradient."""
    noises = [normal(5, 3, seed=i) for i in range(nfe)]
    times = schedule.grid(1000)[dmd2.step_indices(nfe)]
    student = Gauss(0.7, 0.6, schedule)
    rest = iter(noises[1:])
    x = dmd2.sample(student, noises[0], {}, nfe, lambda: next(rest))
    inputs = student.inputs
    assert len(inputs) == nfe
    assert not x.requires_grad
    scale = 80 if isinstance(schedule, EDM) else 1
    assert torch.equal(inputs[0], noises[0] * scale)
    last = student(inputs[-1], schedule.alpha(times[-1]), schedule.sigma(times[-1]), {})
    assert torch.equal(x, last)

    for k in range(nfe):
        again = iter(noises[1:])
        student.inputs = []
        x_in = dmd2.backward_simulation(
            student, schedule, times, k, {}, noises[0], lambda: next(again)
        )
        assert torch.equal(x_in, inputs[k])
        assert len(student.inputs) == k
        assert not x_in.requires_grad


def test_eq01_moments_of_samples():
    seeds = iter(range(10))
    z = normal(1_000_000, 1, seed=99)
    noise = lambda: normal(1_000_000, 1, seed=next(seeds))
    x = dmd2.sample(Gauss(0.7, 0.6, VP()), z, {}, 4, noise)
    assert x.mean().item() == pytest.approx(0.7, abs=2e-3)
    assert x.std().item() == pytest.approx(0.3086, abs=2e-3)


@pytest.mark.parametrize("nfe", [1, 4])
def test_a_sample_does_not_depend_on_its_batch(nfe):
    student = load_teacher("toy-cond").copy()
    sampler = lambda model, z, cond, noise: dmd2.sample(model, z, cond, nfe, noise)
    whole = next(generate(sampler, student, 12, seed=3, batch=12))[2]
    rows = {}
    for part, _, x in generate(sampler, student, 12, seed=3, batch=5, rank=1, world=2):
        rows |= dict(zip(part.tolist(), x))
    assert sorted(rows) == [1, 3, 5, 7, 9, 11]
    for i, row in rows.items():
        assert torch.allclose(row, whole[i], atol=1e-5)
    assert len(PerImageNoise(0, [4])(2)) == 1


def test_step_indices_reach_the_sampler():
    student = Gauss(0.7, 0.6, EDM())
    dmd2.sample(student, normal(2, 3), {}, 1, None, steps="399")
    assert torch.equal(student.inputs[0], EDM().grid(1000)[399] * normal(2, 3))


# ---- (3): guidance -------------------------------------------------------------------------------


def guided_case():
    teacher = load_teacher("toy-cond")
    cond = teacher.encode(torch.arange(64) % 8)
    return teacher, cond, 2 * normal(64, 2), f64(0.8), f64(0.6)


@pytest.mark.parametrize("w", [0.0, 1.0])
def test_eq03_guidance_at_its_ends(w):
    teacher, cond, x_t, alpha, sigma = guided_case()
    expected = teacher(x_t, alpha, sigma, cond if w else teacher.null(64))
    guided = teacher.guided(x_t, alpha, sigma, cond, w)
    assert torch.allclose(guided, expected, atol=1e-12, rtol=0)


def test_eq03_guidance_on_x0_is_guidance_on_eps():
    teacher, cond, x_t, alpha, sigma = guided_case()
    w = 3.0
    c = teacher(x_t, alpha, sigma, cond)
    u = teacher(x_t, alpha, sigma, teacher.null(64))
    levels = (alpha.expand(64), sigma.expand(64))
    r = dmd2.dm_gradient(u, x_t, *levels, cond, teacher, teacher, w)[1]
    assert torch.allclose(r, u + w * (c - u), atol=1e-12, rtol=0)
    assert (r - c).abs().max() > 0.1
    eps_c = eps_from_x0(c, x_t, alpha, sigma)
    eps_u = eps_from_x0(u, x_t, alpha, sigma)
    from_eps = (x_t - sigma * (eps_u + w * (eps_c - eps_u))) / alpha
    assert torch.allclose(r, from_eps, atol=1e-12, rtol=0)


def test_eq03_student_and_critic_are_not_guided():
    """With critic == teacher, the gradient is the guidance alone: (c - r) / norm."""
    teacher = load_teacher("toy-cond")
    cond = teacher.encode(torch.arange(8))
    x, levels = normal(8, 2), ONE.expand(8)
    x_t = add_noise(x, levels, levels, normal(8, 2, seed=1))
    g, r, f, norm = dmd2.dm_gradient(x, x_t, levels, levels, cond, teacher, teacher, 2.0)
    assert torch.equal(f, teacher(x_t, levels, levels, cond))
    assert torch.allclose(g * norm[:, None], f - r)
    assert g.abs().max() > 0


@pytest.mark.parametrize("t, factor", [(999, 0.03417), (399, 0.37139)])
def test_eq01_first_step_of_an_eps_network(t, factor):
    """A network that returns its input: x0 = (1 - sigma) / alpha z at the noisy end."""

    class Echo(Model):
        def predict(self, x, t, cond):
            return x

    net = Echo(None, VP(), "eps", (3,))
    z = torch.randn(4, 3)
    x0 = net(z, net.schedule.alpha(t), net.schedule.sigma(t), {})
    assert torch.allclose(x0, factor * z, atol=3e-5)


# ---- (10) and the loop: who is trained when, by which gradient, at which rate --------------------


@pytest.fixture
def trace(monkeypatch, tmp_path):
    def run(*flags, **kwargs):
        return Trace(monkeypatch, dmd2, tmp_path / "out", *flags, **kwargs)

    return run


VARIANTS = ["", "--gan", "--gan --nfe 4", "--sim data --nfe 3", "--gan --sim data --nfe 2"]
VARIANTS += ["--cfg 2.5", "--gan --nfe 2 --ema 1000 --cfg 3"]


@pytest.mark.parametrize("flags", VARIANTS)
def test_gradient_routing(trace, flags):
    """Every weight of the network whose turn it is gets a gradient and moves; no other does."""
    steps = trace("--iters", 5, "--ratio", 2, *flags.split())
    order = ["student", "critic", "critic"] * 2 + ["student", "critic"]
    assert [step.role for step in steps] == order
    for i, step in enumerate(steps):
        for name, grads in step.grads.items():
            found = [g is not None for g in grads]
            assert found == [name == step.role] * len(grads), (step.role, name)
        # at the first step (4) is exactly 0: critic and teacher are equal, without guidance
        if flags or i > 0:
            assert step.moved(step.role)
        for name in step.before:
            assert name == step.role or not step.moved(name)
    for a, b in zip(steps, steps[1:]):  # nothing moves between the steps
        for name in a.after:
            assert torch.equal(a.after[name], b.before[name])
    assert all(p.requires_grad for p in steps.student.parameters())
    assert all(p.requires_grad for p in steps.critic.parameters())
    assert not any(p.requires_grad for p in steps.teacher.parameters())


def test_two_time_scales(trace):
    """The student moves every --ratio iterations; warm-up counts iterations of the loop."""
    rates = ["--lr", 1e-3, "--lr-fake", 2e-3, "--warmup", 50, "--cooldown", 0]
    steps = trace("--iters", 100, "--ratio", 5, "--ema", 500, *rates)
    student = [step for step in steps if step.role == "student"]
    critic = [step for step in steps if step.role == "critic"]
    warmup = [min(1, (it + 1) / 50) for it in range(100)]
    assert [step.lr for step in student] == pytest.approx([1e-3 * f for f in warmup[::5]])
    assert [step.lr for step in critic] == pytest.approx([2e-3 * f for f in warmup])


def test_the_average_moves_with_the_student(trace):
    steps = trace("--iters", 100, "--ratio", 5, "--ema", 500)
    student = [step for step in steps if step.role == "student"]
    assert [step.images for step in student] == [16 * i for i in range(20)]
    assert steps.ema.images == 20 * 16
    averaged, live = next(steps.ema.model.parameters()), next(steps.student.parameters())
    assert not torch.equal(averaged, live)


def test_cooldown(trace):
    flags = ["--cooldown", 0.5, "--lr-fake", 1.0, "--clip", 1e-9]
    steps = trace("--iters", 10, "--ratio", 10, *flags)
    rates = [step.lr for step in steps if step.role == "critic"]
    assert rates == pytest.approx([1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_ranges_of_the_draws(trace):
    """Labels; t of (4) from 20..980, of (6) from 0..999; one step index for the whole batch."""
    record = [(BatchRandom, "randint"), (BatchRandom, "shared_randint")]
    steps = trace("--iters", 1, "--nfe", 4, record=record)
    assert {call.args[1:] for call in steps.calls["randint"]} == {(0, 8), (20, 981), (0, 1000)}
    assert {call.args[1:] for call in steps.calls["shared_randint"]} == {(0, 4)}


def test_randint_includes_its_first_and_excludes_its_last_number():
    t = BatchRandom(0, 0, 100_000).randint(20, 981)
    assert t.min() == 20
    assert t.max() == 980


def test_eq10_weights_of_the_losses(trace, monkeypatch):
    """The student's gradient is linear in w_G, the critic's in w_D, and (4) can be left out."""

    def run(w_g, w_d):
        flags = ["--gan-weight", w_g, "--cls-weight", w_d, "--cfg", 2]
        steps = trace("--iters", 1, "--gan", *flags)
        return [step.flat_grad() for step in steps]

    student_dm, critic_fake = run(0, 0)
    student, critic = run(0.5, 0.6)
    student_twice, critic_twice = run(1.0, 1.2)
    gan, cls = student - student_dm, critic - critic_fake
    assert gan.norm() > 1e-4  # x is not detached on its way through the critic
    assert cls.norm() > 1e-3
    assert torch.allclose(student_twice, student_dm + 2 * gan, atol=1e-6)
    assert torch.allclose(critic_twice, critic_fake + 2 * cls, atol=1e-5)

    monkeypatch.setattr(dmd2, "dm_loss", lambda x, g: 0 * x.mean())
    assert torch.allclose(run(0.5, 0.6)[0], gan, atol=1e-6)
    assert run(0, 0)[0].norm() == 0


def test_eq01_eq05_first_student_gradient_by_hand(trace):
    """One iteration, written out from the paper: g / numel into x, and x from one pass at
    sigma_max."""
    steps = trace("--iters", 1, "--cfg", 2)
    teacher = load_teacher("toy-cond")
    student, fake = teacher.copy(), teacher.copy()
    draw = BatchRandom(0, 0, 16)
    cond = teacher.encode(draw.randint(0, 8))
    x = student(20.0 * draw.randn(2), 1.0, 20.0, cond)
    sigma = teacher.schedule.grid(1000)[draw.randint(20, 981)]
    alpha = torch.ones(16)
    x_t = (x.detach() + sigma[:, None] * draw.randn(2)).float()
    c = teacher(x_t, alpha, sigma, cond)
    u = teacher(x_t, alpha, sigma, teacher.null(16))
    r = 2 * c - u
    g = (fake(x_t, alpha, sigma, cond) - r) / (x - r).abs().mean(1, keepdim=True)
    x.backward(g.detach() / x.numel())
    expected = torch.cat([p.grad.flatten() for p in student.parameters()]).double()
    assert (steps[0].flat_grad() - expected).norm() < 1e-5 * expected.norm()


def test_eq06_first_critic_gradient_by_hand(trace):
    """The same iteration's critic step: an EDM loss on the student's samples at new levels."""
    steps = trace("--iters", 1, "--cfg", 2)
    teacher = load_teacher("toy-cond")
    student, fake = teacher.copy(), teacher.copy()
    draw = BatchRandom(0, 0, 16)
    cond = teacher.encode(draw.randint(0, 8))
    x = student(20.0 * draw.randn(2), 1.0, 20.0, cond).detach()
    draw.randint(20, 981), draw.randn(2)  # the student's turn
    sigma = teacher.schedule.grid(1000)[draw.randint(0, 1000)]
    x_t = (x + sigma[:, None] * draw.randn(2)).float()
    error = fake(x_t, torch.ones(16), sigma, cond) - x
    sigma_data = teacher.sigma_data
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    (weight[:, None] * error.double().square()).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in fake.parameters()]).double()
    assert (steps[1].flat_grad() - expected).norm() < 1e-5 * expected.norm()


def test_eq09_the_head_learns_which_images_are_real(trace):
    flags = ["--cls-weight", 1, "--lr-fake", 2e-3, "--batch", 256]
    steps = trace("--teacher", "toy", "--iters", 150, "--ratio", 1000, "--gan", *flags)
    labels = torch.arange(512) % 8
    cond = steps.teacher.encode(labels)
    fake = dmd2.sample(steps.student, torch.randn(512, 2), cond, 1, None)
    real = steps.teacher.mixture.sample(512, labels)
    with torch.no_grad():
        logit_fake = steps.critic(fake, 1.0, 0.01, cond, logit=True).mean()
        logit_real = steps.critic(real, 1.0, 0.01, cond, logit=True).mean()
    assert logit_real - logit_fake > 5


# ---- whole iterations by hand --------------------------------------------------------------------


def levels_by_hand(shift=1.0):
    """sigma of EDM's grid with the toy teacher's range: 0.01 at 0, 20 at 999, with rho = 7."""
    ramp = torch.linspace(0.01 ** (1 / 7), 20 ** (1 / 7), 1000, dtype=torch.float64)
    return (shift * ramp**7).clamp(min=0.01)


def iteration_by_hand(trace, it, points, nfe=1, ratio=1, w=1.0, shift=1.0, gan=None, data=False):
    """(1) to (10) on toy-cond, where alpha = 1 and sigma_data = 0.714.

    points: (x [N, 2], labels). gan: (w_G, w_D). -> {role: loss}, numbers of the log.
    """
    teacher, student, critic, batch = trace.teacher, trace.student, trace.critic, 16
    draw = BatchRandom(3, it, batch)
    one = torch.ones(batch, dtype=torch.float64)
    steps, levels = levels_by_hand()[dmd2.step_indices(nfe)], levels_by_hand(shift)
    cond = dict(labels=draw.randint(0, 8))
    x_real, labels_real = points
    col = lambda a: a.float()[:, None]

    def noised(x, i):
        return x + col(levels[i]) * draw.randn(2), levels[i]

    k = draw.shared_randint(0, nfe)
    if data and k > 0:
        x_in, cond = x_real + steps[k].float() * draw.randn(2), dict(labels=labels_real)
    else:
        x_in = steps[0].float() * draw.randn(2)
        for j in range(k):  # (2)
            xhat = student(x_in, one, steps[j] * one, cond).detach()
            x_in = xhat + steps[j + 1].float() * draw.randn(2)
    x = student(x_in, one, steps[k] * one, cond)  # (1)

    losses, logs = {}, {}
    if it % ratio == 0:
        x_t, sigma = noised(x.detach(), draw.randint(20, 981))
        c = teacher(x_t, one, sigma, cond)
        u = teacher(x_t, one, sigma, dict(labels=torch.full((batch,), 8)))
        r, f = u + w * (c - u), critic.fake(x_t, one, sigma, cond)  # (3)
        norm = (x - r).abs().mean(1, keepdim=True)
        g = (f - r) / norm  # (4)
        losses["student"] = (x * g.detach() / x.numel()).sum()  # the gradient of (5)
        logs |= dict(dm=0.5 * g.square().mean(), dm_norm=norm.mean())
        logs |= dict(real_gap=(x - r).square().mean(), fake_gap=(x - f).square().mean())
        if gan:
            x_t, sigma = noised(x, draw.randint(0, 1000))
            features = critic.fake(x_t, one, sigma, cond, features=True)[-1]
            gen = (1 + (-critic.head(features)).exp()).log().mean()  # (8)
            losses["student"] += gan[0] * gen
            logs |= dict(gen=gen)

    x = x.detach()
    x_t, sigma = noised(x, draw.randint(0, 1000))
    s = 0.714
    weight = (sigma**2 + s**2) / (sigma * s) ** 2  # EDM's loss
    error = critic.fake(x_t, one, sigma, cond) - x
    losses["critic"] = (col(weight) * error**2).mean()  # (6)
    logs |= dict(fake=losses["critic"], mean=x.mean(), std=x.std())
    if gan:
        logs["cls"] = 0.0
        i, i_real = draw.randint(0, 1000), draw.randint(0, 1000)
        both = [noised(x, i), noised(x_real, i_real)]
        labels = (cond, dict(labels=labels_real))
        for name, sign, c, (x_t, sigma) in zip(("fake", "real"), (1, -1), labels, both):
            logit = critic.head(critic.fake(x_t, one, sigma, c, features=True)[-1])  # (7)
            logs["cls"] += (1 + (sign * logit).exp()).log().mean()  # (9)
            logs[f"logit_{name}"] = logit.mean()
        losses["critic"] = losses["critic"] + gan[1] * logs["cls"]
    return losses, logs


BY_HAND = {
    "": {},
    "--nfe 3 --ratio 2": dict(nfe=3, ratio=2),
    "--cfg 2.5 --shift 0.3 --ratio 1": dict(w=2.5, shift=0.3, ratio=1),
    "--gan --gan-weight 0.7 --cls-weight 0.3 --nfe 2 --cfg 2": dict(gan=(0.7, 0.3), nfe=2, w=2.0),
    "--sim data --nfe 3 --ratio 1": dict(data=True, nfe=3, ratio=1),
    "--gan --gan-weight 0.7 --cls-weight 0.3 --small depth=2 --small-fake width=24 depth=4": dict(
        gan=(0.7, 0.3)
    ),
}


@pytest.mark.parametrize("flags, case", BY_HAND.items())
def test_whole_iterations_by_hand(trace, monkeypatch, flags, case):
    """Student, critic and head: gradients and AdamW's updates of six iterations."""
    make_head, seeds = dmd2.Head, []

    def noted(feature):
        seeds.append(torch.initial_seed())
        return make_head(feature)

    monkeypatch.setattr(dmd2, "Head", noted)
    wrapped = byhand.wrap_trained(monkeypatch)
    common = "--iters 6 --lr 3e-3 --lr-fake 2e-3 --betas 0.3 0.8 --weight-decay 0.1 --clip 0.5"
    flags = f"{common} --warmup 0 --cooldown 0 --seed 3 {flags}"
    steps = trace(*flags.split(), record=[(dmd2, "load_images")])
    uses_images = "--gan" in flags or "--sim data" in flags
    assert len(steps.calls["load_images"]) == uses_images  # read only where they are used
    case = dict(ratio=5) | case
    images, logs = load_images(None, steps.teacher), []
    optimisers = {
        role: byhand.AdamW(lr, (0.3, 0.8), 0.1, 0.5)
        for role, lr in (("student", 3e-3), ("critic", 2e-3))
    }

    def losses(it):
        points, labels = images.batch(it, 16, 3)
        turns, numbers = iteration_by_hand(steps, it, (points, labels), **case)
        logs.append(numbers)
        return turns

    assert byhand.compare_iterations(steps, losses, optimisers) == 6
    byhand.compare_logs(steps.logs, logs)

    # the head is equal on all processes; gradients flow through what run.train returns alone
    assert seeds == ([3] if "gan" in case else [])
    turns = [-(-6 // case["ratio"]), 12 if "gan" in case else 6]
    assert [net.calls for net in wrapped] == [{True: n, False: 0} for n in turns]


def test_frame(monkeypatch, tmp_path):
    check_frame(monkeypatch, dmd2, tmp_path / "out", show=["dm", "fake"])


@pytest.mark.parametrize("flags", ["--gan --nfe 3", "--sim data --nfe 3"])
def test_alpha_and_sigma_are_of_one_level(trace, flags):
    """In a flow their sum is 1, wherever noise is added or a network evaluated."""
    record = [(dmd2, "add_noise"), (Model, "forward")]
    flags = f"{flags} --iters 4 --ratio 1 --seed 1"
    steps = trace(*flags.split(), teacher=byhand.any_toy("flow"), record=record)
    levels = [call.args[1:3] for call in steps.calls["add_noise"]]
    levels += [call.args[2:4] for call in steps.calls["forward"] if torch.is_tensor(call.args[2])]
    sums = torch.cat([(alpha + sigma).flatten() for alpha, sigma in levels])
    assert len(levels) > 20
    assert torch.allclose(sums, torch.ones_like(sums))
