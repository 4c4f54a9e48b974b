"""Invariants of DMD2 (arXiv 2405.14867) on closed-form Gaussians, then who gets gradients in a real run. Numbers were derived apart from the code."""

import math
import signal
import sys

import pytest
import torch
import torch.nn as nn

import decoupled_dmd
import dmd2
import msd
from common.errors import UserError
from common.model import Model
from common.rng import BatchRandom, PerImageNoise
from common.run import Run
from common.sampling import generate
from common.schedules import EDM, VP, eps_from_x0, expand, native_weight
from common.teachers.load import load_teacher

torch.set_default_dtype(torch.float32)
ONE = torch.ones((), dtype=torch.float64)


class Gauss(nn.Module):
    """Optimal denoiser for data N(mean, std^2 I). Counts its calls."""

    def __init__(self, mean=0.0, std=1.0, schedule=None):
        super().__init__()
        self.mean, self.std, self.schedule = (
            nn.Parameter(torch.tensor(mean, dtype=torch.float64)),
            std,
            schedule,
        )
        self.inputs = []

    def forward(self, x_t, alpha, sigma, cond):
        self.inputs.append(x_t)
        a, s = expand(alpha, x_t), expand(sigma, x_t)
        return ((self.std**2 * a * x_t + s**2 * self.mean) / (a**2 * self.std**2 + s**2)).to(
            x_t.dtype
        )

    def guided(self, x_t, alpha, sigma, cond, w):
        assert w == 1
        return self(x_t, alpha, sigma, cond)


class Features(nn.Module):
    """A critic network whose only feature map is a linear function of its input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x_t, alpha, sigma, cond, features=False):
        return [self.layer(x_t)] if features else self.layer(x_t)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient(x, sigma, real, fake, seed=1):
    """dm_gradient at VE noise levels sigma (float or [B])."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    x_t = dmd2.renoise(x.detach(), ONE, sigma, normal(*x.shape, seed=seed))
    return dmd2.dm_gradient(x, x_t, ONE.expand(sigma.shape), sigma, {}, real, fake, 1.0)


# ---- 10.1 - 10.5: the distribution-matching gradient ---------------------------------------------------------------------------------------


def test_autograd_of_the_loss_is_g_over_numel():
    real, fake = Gauss(0.3, 0.5), Gauss(-0.2, 0.7)
    x = (0.2 * normal(16, 4, 8, 8)).requires_grad_()
    g, r, f, w = gradient(x, torch.linspace(0.1, 20, 16), real, fake)
    loss = dmd2.dm_loss(x, g)
    loss.backward()
    assert (x.grad - g / x.numel()).abs().max() < 1e-18
    assert abs(loss.item() - 0.5 * g.square().mean().item()) < 1e-15
    assert not any(t.requires_grad for t in (g, r, f, w, real.inputs[0], fake.inputs[0]))
    assert real.mean.grad is None and fake.mean.grad is None


def test_no_gradient_if_critic_equals_teacher():
    same = Gauss(0.3, 0.5)
    for seed in range(5):
        g = gradient(3 * normal(8, 5, seed=seed), 2.0, same, same, seed)[0]
        assert torch.equal(g, torch.zeros_like(g)) and dmd2.dm_loss(normal(8, 5), g) == 0


def test_zero_over_zero_is_zero():
    x = torch.full((2, 3), 0.3, dtype=torch.float64)
    real = Gauss(0.3, 0.0)  # all data in one point, and the sample sits there: x - r = 0, f - r = 0
    assert torch.equal(gradient(x, 1.0, real, Gauss(0.3, 0.0))[0], torch.zeros_like(x))


def test_scale_invariance_and_independent_rows():
    c, x, sigma = (
        3.7,
        0.5 * normal(6, 50),
        torch.tensor([0.01, 0.1, 0.5, 2.5, 10.0, 80.0], dtype=torch.float64),
    )
    g = gradient(x, sigma, Gauss(0.3, 0.5), Gauss(-0.4, 0.6))[0]
    scaled = gradient(c * x, c * sigma, Gauss(c * 0.3, c * 0.5), Gauss(-c * 0.4, c * 0.6))[
        0
    ]  # eps stays, c sigma eps is noise at level c sigma
    error = (g - scaled).abs().amax(1)
    assert (
        error[2:].max() < 2e-15 and error.max() < 1e-13
    )  # small sigma: w is small and divides the rounding of x - r
    other = torch.cat([x[:1], 100 * normal(5, 50, seed=7)])
    assert torch.equal(gradient(other, sigma, Gauss(0.3, 0.5), Gauss(-0.4, 0.6))[0][0], g[0])


@pytest.mark.parametrize(
    "sigma, expected", [(0.01, -0.0351), (0.5, -0.8536), (2.5, -0.9463), (80.0, -0.9502)]
)
def test_shifted_gaussians(sigma, expected):
    m, mg, s = 0.3, -0.4, 0.5
    x = mg + s * normal(1, 1_000_000)
    g, r, f, w = gradient(x, sigma, Gauss(m, s), Gauss(mg, s))
    u, v = sigma**2 * (mg - m) / (s**2 + sigma**2), s**2 * sigma**2 / (s**2 + sigma**2)
    assert (f - r - u).abs().max() < 1e-11  # constant: no noise in the direction
    folded = math.sqrt(2 * v / math.pi) * math.exp(-(u**2) / (2 * v)) + u * math.erf(
        u / math.sqrt(2 * v)
    )
    assert u / folded == pytest.approx(expected, abs=6e-5)
    assert g.mean().item() == pytest.approx(expected, abs=2e-3)
    matched = gradient(m + s * normal(1, 1_000_000), sigma, Gauss(m, s), Gauss(m, s))[3].item()
    assert matched == pytest.approx(0.798 * math.sqrt(v), rel=3e-3)


@pytest.mark.parametrize("b, expected", [(0.8, 0.11665), (0.5, 0.0), (0.3, None)])
def test_gradient_of_the_width(b, expected):
    """E[(f - r) z] for x = b z is sigma^2 dKL/db: it shrinks a wide generator, widens a narrow one, and vanishes at the match only."""
    s, sigma, z = 0.5, 1.3, normal(1, 2_000_000)
    _, r, f, _ = gradient(b * z, sigma, Gauss(0.0, s), Gauss(0.0, b))
    formula = sigma**2 * b * (b**2 - s**2) / ((b**2 + sigma**2) * (s**2 + sigma**2))
    assert expected is None or formula == pytest.approx(expected, abs=5e-6)
    assert ((f - r) * z).mean().item() == pytest.approx(formula, abs=1e-3)
    assert (formula > 0) == (b > s)


# ---- 10.6, 10.7: critic and GAN ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "s, sigma, expected",
    [(0.5, 0.002, 1.0), (0.5, 0.5, 1.0), (0.5, 2.5, 1.0), (0.5, 80.0, 1.0), (0.25, 1.0, 0.2941)],
)
def test_critic_floor_edm(s, sigma, expected):
    x, sigma = s * normal(1000, 500), torch.tensor(sigma, dtype=torch.float64)
    x_t = dmd2.renoise(x, ONE, sigma, normal(1000, 500, seed=1))
    loss = dmd2.fake_loss(
        Gauss(0.0, s), x, x_t, ONE, sigma, {}, native_weight("edm", ONE, sigma, 0.5)
    )
    assert loss.item() == pytest.approx(expected, rel=7e-3)


def test_critic_floor_eps():
    schedule, t, x = VP(), torch.full((1000,), 499.0), normal(1000, 500)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x_t = dmd2.renoise(x, alpha, sigma, normal(1000, 500, seed=1))
    assert dmd2.fake_loss(
        Gauss(0.0, 1.0), x, x_t, alpha, sigma, {}, native_weight("eps", alpha, sigma)
    ).item() == pytest.approx(0.27767, rel=7e-3)


def test_critic_weight_edm():
    assert native_weight("edm", 1.0, 0.002, 0.5).item() == pytest.approx(250004) and native_weight(
        "edm", 1.0, 80.0, 0.5
    ).item() == pytest.approx(4.00016, abs=1e-5)


def test_critic_loss_reaches_the_critic_only():
    student, fake = Gauss(0.1, 0.5), Gauss(0.2, 0.5)
    x = student(normal(4, 6), ONE, ONE, {})
    dmd2.fake_loss(
        dmd2.Critic(fake), x, dmd2.renoise(x.detach(), ONE, ONE, normal(4, 6)), ONE, ONE, {}, ONE
    ).backward()
    assert student.mean.grad is None and fake.mean.grad.abs() > 0


def test_gan_values_at_zero_logits():
    zero, real = torch.zeros(5, 1, requires_grad=True), torch.zeros(5, 1, requires_grad=True)
    loss = dmd2.gen_loss(zero)
    loss.backward()
    assert loss.item() == pytest.approx(0.693147, abs=1e-6) and torch.allclose(
        zero.grad, torch.full((5, 1), -0.5 / 5)
    )
    zero.grad = None
    loss = dmd2.cls_loss(zero, real)
    loss.backward()
    assert loss.item() == pytest.approx(1.386294, abs=1e-6)
    assert (zero.grad > 0).all() and (
        real.grad < 0
    ).all()  # its descent lowers the logits of fakes and raises those of real images


def test_gan_gradient_passes_a_frozen_critic():
    critic = dmd2.Critic(Features(), dmd2.Head(torch.zeros(1, 6))).requires_grad_(False)
    x = torch.randn(4, 6, requires_grad=True)
    dmd2.gen_loss(
        critic(dmd2.renoise(x, ONE, ONE, torch.randn(4, 6)), ONE, ONE, {}, logit=True)
    ).backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in critic.parameters())


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
def test_head(shape, halvings):
    head = dmd2.Head(torch.zeros(1, *shape))
    assert head(torch.randn(3, *shape)).shape == (3, 1)
    convs = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
    assert sum(m.kernel_size == (4, 4) and m.stride == (2, 2) for m in convs) == halvings
    assert all(m.out_channels == shape[0] for m in convs[:-1])  # all keep C channels
    assert all(
        m.num_groups == math.gcd(32, shape[0] // 4)
        for m in head.modules()
        if isinstance(m, nn.GroupNorm)
    )  # 32 for the paper's 768 and 1280
    h = torch.randn(3, *shape, requires_grad=True)
    head(h)[0].sum().backward()
    assert (
        h.grad[0].norm() > 1e-3 and h.grad[1:].norm() == 0
    )  # a group of one number would be normalised to a constant
    assert head(torch.randn(3, *shape).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("shape", [(16, 15, 26), (16, 26, 15), (16, 4, 30)])
def test_heads_of_pictures_that_are_not_square(shape):
    """Lying, standing, and frames one below the other: several logits of a sample, in the three scripts that have this head."""
    h = torch.randn(2, *shape, requires_grad=True)
    for head in (dmd2.Head(h), msd.Head(h), decoupled_dmd.Critic(nn.Identity(), h).head):
        logits = head(h)
        assert logits.shape[0] == 2 and logits.shape[1] >= 1 and logits.ndim == 2
        (grad,) = torch.autograd.grad(logits[0].sum(), h)
        assert grad[0].norm() > 1e-3 and grad[1].norm() == 0


# ---- 10.8, 10.9: grids, backward simulation, sampler ----------------------------------------------------------------------------------------


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
def test_step_grid(n, expected):
    assert dmd2.step_indices(n) == expected
    assert dmd2.step_indices(n, ",".join(map(str, expected))) == expected


def test_step_grid_of_every_size_and_nonsense():
    for n in range(1, 1000):
        assert len(dmd2.step_indices(n)) == n
    for n, steps in (
        (1000, None),
        (2, "999"),
        (2, "499,999"),
        (2, "999,999"),
        (1, "1000"),
        (1, "-1"),
        (2, "a,b"),
        (1, ""),
    ):
        with pytest.raises(UserError, match="--nfe" if steps is None else "--steps"):
            dmd2.step_indices(n, steps)


def test_noise_grids():
    k = EDM().grid(1000)
    for i, v in {
        0: 0.002,
        20: 0.003232,
        100: 0.01675,
        250: 0.1703,
        500: 2.5265,
        980: 72.05,
        999: 80.0,
    }.items():
        assert k[i].item() == pytest.approx(v, rel=3e-4)
    assert (
        k[0] == 0.002
        and k[999] == 80
        and (k < 0.5).double().mean() == pytest.approx(0.339)
        and (k > 5).double().mean() == pytest.approx(0.419)
    )
    vp = VP()
    for t, abar, ratio in (
        (999, 0.0046601, 14.6146),
        (749, 0.0566236, 4.0817),
        (499, 0.2776694, 1.6129),
        (399, 0.4260861, 1.1606),
        (249, 0.6754321, 0.6932),
    ):
        assert vp.alpha(t).square().item() == pytest.approx(
            abar, rel=3e-6
        )  # the table was made in float32
        assert (vp.sigma(t) / vp.alpha(t)).item() == pytest.approx(ratio, abs=6e-5)
    assert torch.equal(vp.grid(1000), torch.arange(1000.0, dtype=torch.float64))


def test_range_of_times():
    draw = BatchRandom(0, 0, 100_000)
    dm, fake = draw.randint(20, 981), draw.randint(0, 1000)  # the calls of main: test_draws below
    assert (dm.min(), dm.max(), fake.min(), fake.max()) == (20, 980, 0, 999)


MOMENTS = [
    (0.0, 1.0),
    (0.1663, 0.9713),
    (0.3688, 0.8511),
    (0.5753, 0.5921),
]  # of the sampler's input at step k; G exact for N(0.7, 0.6^2)


@pytest.mark.parametrize("k", range(4))
def test_backward_simulation_moments(k):
    schedule, n = VP(), 1_000_000
    times = schedule.grid(1000)[dmd2.step_indices(4)]
    seeds = iter(range(10))
    x = dmd2.backward_simulation(
        Gauss(0.7, 0.6), schedule, times, k, {}, lambda: normal(n, 1, seed=next(seeds))
    )
    assert x.mean().item() == pytest.approx(
        MOMENTS[k][0], abs=3e-3
    ) and x.std().item() == pytest.approx(MOMENTS[k][1], abs=3e-3)
    if k:  # the ablation, noised real data, is something else
        noised = dmd2.renoise(
            0.7 + 0.6 * normal(n, 1),
            schedule.alpha(times[k]),
            schedule.sigma(times[k]),
            normal(n, 1, seed=1),
        )
        assert noised.std().item() == pytest.approx([0.9817, 0.9068, 0.7535][k - 1], abs=3e-3)


@pytest.mark.parametrize("schedule", [VP(), EDM()], ids=["vp", "edm"])
@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_training_inputs_are_the_samplers_inputs(schedule, nfe):
    """Bit for bit with the same noise, and the student runs k times without gradient for the input of step k."""
    noises = [normal(5, 3, seed=i) for i in range(nfe)]
    times = schedule.grid(1000)[dmd2.step_indices(nfe)]
    student = Gauss(0.7, 0.6, schedule)
    rest = iter(noises[1:])
    x = dmd2.sample(student, noises[0], {}, nfe, lambda: next(rest))
    inputs, student.inputs = student.inputs, []
    assert len(inputs) == nfe and not x.requires_grad
    assert torch.equal(
        inputs[0], noises[0] * (80 if isinstance(schedule, EDM) else 1)
    )  # 80 z, or exactly the noise tensor
    assert torch.equal(
        x, student(inputs[-1], schedule.alpha(times[-1]), schedule.sigma(times[-1]), {})
    )
    for k in range(nfe):
        again, student.inputs = iter(noises), []
        x_in = dmd2.backward_simulation(student, schedule, times, k, {}, lambda: next(again))
        assert torch.equal(x_in, inputs[k]) and len(student.inputs) == k and not x_in.requires_grad


def test_sampler_ends_where_it_should():
    seeds = iter(range(10))
    x = dmd2.sample(
        Gauss(0.7, 0.6, VP()),
        normal(1_000_000, 1, seed=99),
        {},
        4,
        lambda: normal(1_000_000, 1, seed=next(seeds)),
    )
    assert x.mean().item() == pytest.approx(0.7, abs=2e-3) and x.std().item() == pytest.approx(
        0.3086, abs=2e-3
    )


@pytest.mark.parametrize("nfe", [1, 4])
def test_a_sample_does_not_depend_on_its_batch(nfe):
    student = load_teacher("toy-cond").copy()
    sampler = lambda m, z, c, noise: dmd2.sample(m, z, c, nfe, noise)
    whole = next(generate(sampler, student, 12, seed=3, batch=12))[2]
    parts = {
        i: row
        for part, _, x in generate(sampler, student, 12, seed=3, batch=5, rank=1, world=2)
        for i, row in zip(part.tolist(), x)
    }
    assert sorted(parts) == [1, 3, 5, 7, 9, 11]
    for i, row in parts.items():
        assert torch.allclose(row, whole[i], atol=1e-5)
    assert len(PerImageNoise(0, [4])(2)) == 1


def test_custom_steps_reach_the_sampler():
    student = Gauss(0.7, 0.6, EDM())
    dmd2.sample(student, normal(2, 3), {}, 1, None, steps="399")
    assert torch.equal(student.inputs[0], EDM().grid(1000)[399] * normal(2, 3))


# ---- 10.10, 10.12: guidance, x0 of an eps network ------------------------------------------------------------------------------------------


def test_guidance():
    teacher, x_t = load_teacher("toy-cond"), 2 * normal(64, 2)
    cond, (alpha, sigma) = (
        teacher.encode(torch.arange(64) % 8),
        torch.tensor([0.8, 0.6], dtype=torch.float64),
    )
    c, u = teacher(x_t, alpha, sigma, cond), teacher(x_t, alpha, sigma, teacher.null(64))
    assert torch.equal(teacher.guided(x_t, alpha, sigma, cond, 1), c)
    assert torch.allclose(teacher.guided(x_t, alpha, sigma, cond, 0.0), u, atol=1e-12, rtol=0)
    w = 3.0
    r = dmd2.dm_gradient(u, x_t, alpha.expand(64), sigma.expand(64), cond, teacher, teacher, w)[1]
    assert torch.allclose(r, u + w * (c - u), atol=1e-12, rtol=0) and (r - c).abs().max() > 0.1
    eps_c, eps_u = (eps_from_x0(v, x_t, alpha, sigma) for v in (c, u))
    assert torch.allclose(
        r, (x_t - sigma * (eps_u + w * (eps_c - eps_u))) / alpha, atol=1e-12, rtol=0
    )


def test_student_and_critic_are_not_guided():
    """With guidance the gradient at the start, critic == teacher, is that of the guidance alone: (c - r) / w."""
    teacher = load_teacher("toy-cond")
    x, cond, a, s = normal(8, 2), teacher.encode(torch.arange(8)), ONE.expand(8), ONE.expand(8)
    x_t = dmd2.renoise(x, a, s, normal(8, 2, seed=1))
    g, r, f, w = dmd2.dm_gradient(x, x_t, a, s, cond, teacher, teacher, 2.0)
    assert (
        torch.equal(f, teacher(x_t, a, s, cond))
        and torch.allclose(g * w[:, None], f - r)
        and g.abs().max() > 0
    )


@pytest.mark.parametrize("t, factor", [(999, 0.03417), (399, 0.37139)])
def test_x0_of_an_eps_network(t, factor):
    class Echo(Model):
        predict = lambda self, x, t, cond: x

    net, z = Echo(None, VP(), "eps", (3,)), torch.randn(4, 3)
    assert torch.allclose(
        net(z, net.schedule.alpha(t), net.schedule.sigma(t), {}), factor * z, atol=3e-5
    )


# ---- 10.11: a run: who is trained when, by which gradient, at which learning rate ------------------------------------------------------------


class Trace(list):
    """main() in this process on the toy teacher. One entry per optimiser step: role, lr, gradients, weights of both networks before and after."""

    def __init__(self, monkeypatch, tmp_path, *flags):
        super().__init__()
        self.made, self.integers, self.shared = {}, set(), set()
        self.keep(monkeypatch, dmd2, "Critic", "critic")
        self.keep(monkeypatch, dmd2, "EMA", "ema")
        self.keep(monkeypatch, models, "load_teacher", "teacher")
        step, integers, shared = Run.step, BatchRandom.integers, BatchRandom.shared_int
        monkeypatch.setattr(Run, "step", lambda run, opt, clip: self.step(step, run, opt, clip))
        monkeypatch.setattr(
            BatchRandom, "integers", lambda draw, *a: self.integers.add(a) or integers(draw, *a)
        )
        monkeypatch.setattr(
            BatchRandom, "shared_int", lambda draw, *a: self.shared.add(a) or shared(draw, *a)
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
        monkeypatch.setattr(sys, "argv", ["dmd2.py", *default, *map(str, flags)])
        handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            dmd2.main()
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
                lr=opt.param_groups[0]["lr"],
                grads=grads,
                before=before,
                after=self.weights(),
                images=self.made["ema"].images,
            )
        )
        return norm

    def flat(self, i):
        """Gradient of step i as one vector."""
        return torch.cat([g.flatten() for g in self[i]["grads"][self[i]["role"]]]).double()


@pytest.fixture
def trace(monkeypatch, tmp_path):
    return lambda *flags: Trace(monkeypatch, tmp_path, *flags)


VARIANTS = [
    "",
    "--gan",
    "--gan --nfe 4",
    "--gan --gan-on teacher",
    "--gan --gan-clean",
    "--sim data --nfe 3",
    "--gan --sim data --nfe 2",
    "--fake-weight x0",
    "--gan --dm-weight 0",
    "--cfg 2.5",
    "--gan --nfe 2 --alternate --ema 1000 --cfg 3",
]


@pytest.mark.parametrize("flags", VARIANTS)
def test_gradient_routing(trace, flags):
    steps = trace("--iters", 5, "--ratio", 2, *flags.split())
    alternate = "--alternate" in flags
    expected = ["student", "critic", "critic"] * 2 + ["student", "critic"]
    assert [s["role"] for s in steps] == (
        ["student", "critic"] * 2 + ["student"] if alternate else expected
    )
    for s in steps:
        for net, grads in s[
            "grads"
        ].items():  # every weight of the network whose turn it is; not one of the others
            assert [g is not None for g in grads] == [net == s["role"]] * len(grads), (
                s["role"],
                net,
            )
        changed = {k for k in s["before"] if not torch.equal(s["before"][k], s["after"][k])}
        assert changed <= {s["role"]} and (changed or flags == "" and s is steps[0])
    for a, b in zip(steps, steps[1:]):  # nothing moves between the steps
        assert all(torch.equal(a["after"][k], b["before"][k]) for k in a["after"])
    assert all(p.requires_grad for k in ("student", "critic") for p in steps.nets()[k].parameters())
    assert not any(p.requires_grad for p in steps.nets()["teacher"].parameters())


def test_two_time_scales(trace):
    steps = trace(
        "--iters",
        100,
        "--ratio",
        5,
        "--warmup",
        50,
        "--lr",
        1e-3,
        "--lr-fake",
        2e-3,
        "--ema",
        500,
        "--cooldown",
        0,
    )
    student, critic = ([s for s in steps if s["role"] == role] for role in ("student", "critic"))
    assert len(student) == 20 and len(critic) == 100
    # warm-up counts iterations of the loop, also for the student, which moves in every fifth only
    assert [s["lr"] for s in student] == pytest.approx(
        [1e-3 * min(1, (it + 1) / 50) for it in range(0, 100, 5)]
    )
    assert [s["lr"] for s in critic] == pytest.approx(
        [2e-3 * min(1, (it + 1) / 50) for it in range(100)]
    )
    assert steps.made["ema"].images == 20 * 16  # the average moves with the student
    assert [s["images"] for s in student] == [16 * i for i in range(20)]
    assert not torch.equal(
        next(steps.made["ema"].model.parameters()), next(steps.made["ema"].live.parameters())
    )


def test_cooldown(trace):
    lr = [
        s["lr"]
        for s in trace(
            "--iters", 10, "--ratio", 10, "--cooldown", 0.5, "--lr-fake", 1.0, "--clip", 1e-9
        )
        if s["role"] == "critic"
    ]
    assert lr == pytest.approx([1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", {(0, 8), (20, 981), (0, 1000)}),
        ("--t-range 0 1", {(0, 8), (0, 1000)}),
        ("--t-range 0.5 0.5", {(0, 8), (500, 501), (0, 1000)}),
    ],
)
def test_draws(trace, flags, expected):
    """Times of (4) from 20..980, of the critic from all; one step index for the whole batch."""
    steps = trace("--iters", 1, "--nfe", 4, *flags.split())
    assert steps.integers == expected and steps.shared == {(0, 4)}


def test_weights_of_the_losses(trace):
    """(10) is linear in dm_weight, w_G and w_D."""
    run = lambda dm, g, d: trace(
        "--iters", 1, "--gan", "--dm-weight", dm, "--gan-weight", g, "--cls-weight", d, "--cfg", 2
    )
    both, dm, gan = run(1, 1, 0.6), run(1, 0, 0), run(0, 0.5, 0.6)
    assert (
        gan.flat(0).norm() > 1e-4
    )  # the GAN term alone moves the student: x is not detached on its way through the critic
    assert torch.allclose(both.flat(0), dm.flat(0) + 2 * gan.flat(0), atol=1e-6)
    assert run(0, 0, 0).flat(0).norm() == 0
    # the student's step differs, the sample and the critic's loss at iteration 0 do not
    assert (
        torch.allclose(both.flat(1) - dm.flat(1), gan.flat(1) - dm.flat(1), atol=1e-5)
        and (both.flat(1) - dm.flat(1)).norm() > 1e-3
    )


def test_the_first_student_gradient_by_hand(trace):
    """One iteration against the formulas of the paper written out: g / numel into x, and x from one pass at sigma_max."""
    steps = trace("--iters", 1, "--cfg", 2)
    teacher, draw = load_teacher("toy-cond"), BatchRandom(0, 0, 16)
    student, fake, s = teacher.copy(), teacher.copy(), teacher.schedule
    cond = teacher.encode(draw.randint(0, 8))
    z = draw.randn(2)
    x = student(20.0 * z, 1.0, 20.0, cond)
    sigma = s.grid(1000)[draw.randint(20, 981)]
    x_t = (x.detach() + sigma[:, None] * draw.randn(2)).float()
    r = 2 * teacher(x_t, torch.ones(16), sigma, cond) - teacher(
        x_t, torch.ones(16), sigma, teacher.null(16)
    )
    g = (fake(x_t, torch.ones(16), sigma, cond) - r) / (x - r).abs().mean(1, keepdim=True)
    x.backward(g.detach() / x.numel())
    expected = torch.cat([p.grad.flatten() for p in student.parameters()]).double()
    assert (steps.flat(0) - expected).norm() < 1e-5 * expected.norm()


def test_the_head_learns_which_images_are_real(trace):
    steps = trace(
        "--teacher",
        "toy",
        "--iters",
        40,
        "--ratio",
        1000,
        "--gan",
        "--gan-clean",
        "--cls-weight",
        1,
        "--lr-fake",
        2e-3,
        "--batch",
        256,
    )
    critic, teacher = steps.made["critic"], steps.made["teacher"]
    cond, student = teacher.encode(torch.arange(512) % 8), steps.nets()["student"]
    fake = dmd2.sample(student, torch.randn(512, 2), cond, 1, None)
    real = teacher.mixture.sample(512, torch.arange(512) % 8)
    with torch.no_grad():
        logit = [critic(x, 1.0, 0.01, cond, logit=True).mean() for x in (fake, real)]
    assert logit[1] - logit[0] > 5
