"""swiftbrush.py: its equations on closed-form data, then what a run trains.

Expected numbers were derived apart from the code. The closed forms are for data N(m, s^2), whose
best denoiser is known.
"""

import math

import pytest
import torch
import torch.nn as nn
from helpers import byhand
from helpers.frame import check_frame
from helpers.gaussian import Gauss, f64, full, normal
from helpers.teachers import load
from helpers.trace import Trace

import dmd2
import swiftbrush
from common.errors import UserError
from common.rng import BatchRandom
from common.schedules import EDM, VP, Flow, TrigFlow, add_noise, eps_from_x0
from common.teachers.toy import Toy

VP1000 = VP()


@pytest.fixture
def trace(monkeypatch, tmp_path):
    def run(*flags, **kwargs):
        return Trace(monkeypatch, swiftbrush, tmp_path / "out", *flags, **kwargs)

    return run


def vp_level(t, n=1):
    t = full(float(t), n)
    return VP1000.alpha(t), VP1000.sigma(t)


# ---- (2) to (5): the student's gradient ----------------------------------------------------------


def gradient(x, t, teacher, critic, cfg=1.0, seed=1, cond=None):
    """(4) at VP's level t for all samples -> g, r, f."""
    alpha, sigma = vp_level(t, len(x))
    x_t = add_noise(x.detach(), alpha, sigma, normal(*x.shape, seed=seed))
    return swiftbrush.vsd_gradient(x_t, alpha, sigma, cond or {}, teacher, critic, cfg)


def test_eq05_autograd_of_the_loss_is_g_over_numel():
    teacher, critic = Gauss(0.3, 0.5), Gauss(-0.2, 0.7)
    x = (0.2 * normal(16, 4, 8, 8)).requires_grad_()
    g, r, f = gradient(x, 400, teacher, critic)
    loss = swiftbrush.vsd_loss(x, g)
    loss.backward()
    assert (x.grad - g / x.numel()).abs().max() < 1e-18
    assert abs(loss.item() - 0.5 * g.square().mean().item()) < 1e-15
    for v in (g, r, f):
        assert not v.requires_grad
    assert teacher.mean.grad is None
    assert critic.mean.grad is None


@pytest.mark.parametrize(
    "t, expected", [(20, -0.0027387), (249, -0.1405530), (499, -0.2515966), (980, -0.0531547)]
)
def test_eq04_moves_the_mean(t, expected):
    """g = sigma^3 alpha (m_student - m) / (alpha^2 s^2 + sigma^2) for all samples, if both have the
    spread s."""
    x = -0.2 + 0.8 * normal(50, 3)
    g, _, _ = gradient(x, t, Gauss(0.5, 0.8), Gauss(-0.2, 0.8))
    assert (g - expected).abs().max() < 5e-8


def test_eq04_grows_or_shrinks_the_spread():
    """E[g z] of x = b z. Four points z, eps = +-1 have the moments that it needs."""
    z, eps = f64([1.0, 1, -1, -1])[:, None], f64([1.0, -1, 1, -1])[:, None]
    alpha, sigma = vp_level(499, 4)
    for b, expected in ((1.1, 0.0591275), (0.8, 0.0)):
        x_t = alpha[:, None] * b * z + sigma[:, None] * eps
        g, _, _ = swiftbrush.vsd_gradient(x_t, alpha, sigma, {}, Gauss(0, 0.8), Gauss(0, b), 1.0)
        assert abs((g * z).mean().item() - expected) < 1e-7


def test_eq04_is_the_difference_of_the_noises():
    """sigma^2 (eps_teacher - eps_critic), as the official code has it."""
    x = normal(6, 3)
    alpha, sigma = vp_level(300, 6)
    x_t = add_noise(x, alpha, sigma, normal(6, 3, seed=2))
    g, r, f = swiftbrush.vsd_gradient(x_t, alpha, sigma, {}, Gauss(0.3, 0.5), Gauss(0, 0.7), 1.0)
    noises = [eps_from_x0(x0, x_t, alpha, sigma) for x0 in (r, f)]
    expected = sigma[:, None] ** 2 * (noises[0] - noises[1])
    assert (g - expected).abs().max() < 1e-12


def test_eq04_weight_on_vp_levels():
    """alpha sigma: known values, and its maximum 1/2 where the two are equal."""
    alpha, sigma = VP1000.alpha(torch.arange(1000)), VP1000.sigma(torch.arange(1000))
    x = torch.zeros(1000, 1, dtype=torch.float64)
    zero, one = lambda *a: torch.zeros_like(x), lambda *a: torch.ones_like(x)
    teacher, critic = nn.Module(), nn.Module()
    teacher.guided, critic.guided = zero, one
    g = swiftbrush.vsd_gradient(x, alpha, sigma, {}, teacher, critic, 1.0)[0].flatten()
    known = {20: 0.1354, 249: 0.4682, 399: 0.4945, 499: 0.4478, 749: 0.2311, 980: 0.0762}
    for t, expected in known.items():
        assert abs(g[t].item() - expected) < 5e-5
    assert g.argmax() == 354
    assert abs(g.max().item() - 0.5) < 1e-7


@pytest.mark.parametrize("factor", [0.3, 5.0])
def test_eq04_is_the_same_on_every_schedule(factor):
    """Levels of one alpha / sigma, whatever their size: the equal-SNR view."""
    x, eps = normal(8, 3), normal(8, 3, seed=1)
    alpha, sigma = vp_level(600, 8)
    teacher, critic = Gauss(0.3, 0.5), Gauss(0.1, 0.6)
    found = []
    for c in (1.0, factor):
        x_t = add_noise(x, c * alpha, c * sigma, eps)
        args = (x_t, c * alpha, c * sigma, {}, teacher, critic, 1.0)
        found.append(swiftbrush.vsd_gradient(*args)[0])
    assert (found[0] - found[1]).abs().max() < 1e-12


def test_eq04_on_a_straight_path():
    """t (1 - t) / (t^2 + (1 - t)^2) times the difference of the clean estimates."""
    t = f64([0.1, 0.5, 0.9])
    x_t = normal(3, 2)
    g, r, f = swiftbrush.vsd_gradient(x_t, 1 - t, t, {}, Gauss(0.3, 0.5), Gauss(0, 1), 1.0)
    weight = f64([0.09 / 0.82, 0.5, 0.09 / 0.82])[:, None]
    assert (g - weight * (f - r)).abs().max() < 1e-12


def test_eq04_is_dmd2s_gradient_with_another_weight():
    """DMD2 divides f - r by mean|x - r| instead."""
    x = 0.1 + 0.6 * normal(16, 5)
    teacher, critic = Gauss(0.3, 0.5), Gauss(0.1, 0.6)
    alpha, sigma = vp_level(350, 16)
    x_t = add_noise(x, alpha, sigma, normal(16, 5, seed=1))
    g, r, _ = swiftbrush.vsd_gradient(x_t, alpha, sigma, {}, teacher, critic, 1.0)
    theirs, _, _, _ = dmd2.dm_gradient(x, x_t, alpha, sigma, {}, teacher, critic, 1.0)
    scale = (alpha * sigma)[:, None] * (x - r).abs().mean(1, keepdim=True)
    assert (g / scale - theirs).abs().max() < 1e-12


class TwoClasses:
    """The best denoiser of labels 0, 1 at -m, +m with spread 0.4; label 2 is both."""

    def __init__(self, m):
        self.m = m
        self.passes = 0

    sharding = None
    guided, cond_and_uncond = Gauss.guided, Gauss.cond_and_uncond
    unconditional = Gauss.unconditional

    def null(self, n):
        return dict(labels=torch.full((n,), 2))

    def __call__(self, x, alpha, sigma, cond):
        self.passes += len(x)
        alpha, sigma = alpha[:, None], sigma[:, None]
        variance = 0.16 * alpha**2 + sigma**2
        centres = f64([-self.m, self.m])
        clean = (0.16 * alpha * x + sigma**2 * centres) / variance  # [B, 2], a column a class
        share = (-((x - alpha * centres) ** 2) / (2 * variance)).softmax(1)
        labels = cond["labels"][:, None]
        chosen = torch.where(labels == 1, f64([0, 1.0]), f64([1.0, 0]))
        share = torch.where(labels == 2, share, chosen)
        return (share * clean).sum(1, keepdim=True)


def pull(m, w):
    """Mean of (4) over t = 20 ... 980 and over samples of label 1, for a student at -m, +m."""
    u = torch.linspace(-6, 6, 201, dtype=torch.float64)
    density = (-(u**2) / 2).softmax(0)
    total = 0.0
    for t in range(20, 981, 20):
        alpha, sigma = vp_level(t, 201)
        x_t = (alpha * m + (0.16 * alpha**2 + sigma**2).sqrt() * u)[:, None]
        cond = dict(labels=torch.ones(201, dtype=torch.int64))
        g, _, _ = swiftbrush.vsd_gradient(
            x_t, alpha, sigma, cond, TwoClasses(1.0), TwoClasses(m), w
        )
        total += (density * g[:, 0]).sum().item() / 49
    return total


def test_eq02_eq03_guidance_on_both_sides_keeps_the_zero():
    """Of an exact critic: where the student is the teacher without guidance. The pull towards it is
    about four times as strong from within, and twice from outside."""
    for w in (1.0, 4.5):
        assert abs(pull(1.0, w)) < 1e-12
        assert pull(0.6, w) < -0.1
        assert pull(1.4, w) > 0.1
    assert 4.0 < pull(0.2, 4.5) / pull(0.2, 1.0) < 4.3
    assert 1.8 < pull(2.0, 4.5) / pull(2.0, 1.0) < 2.0


def test_eq02_eq03_one_pass_without_guidance():
    teacher, critic = TwoClasses(1.0), TwoClasses(0.5)
    alpha, sigma = vp_level(300, 4)
    cond = dict(labels=torch.tensor([0, 1, 1, 0]))
    args = (normal(4, 1), alpha, sigma, cond, teacher, critic)
    _, r, f = swiftbrush.vsd_gradient(*args, 1.0)
    assert (teacher.passes, critic.passes) == (4, 4)
    _, r2, f2 = swiftbrush.vsd_gradient(*args, 3.0)
    assert (teacher.passes, critic.passes) == (12, 12)
    for net, plain, guided in ((teacher, r, r2), (critic, f, f2)):
        null = net(args[0], alpha, sigma, net.null(4))
        assert (guided - (null + 3 * (plain - null))).abs().max() < 1e-12


# ---- (6): the critic -----------------------------------------------------------------------------


@pytest.mark.parametrize("t, expected", [(20, 0.952962), (499, 0.0548246), (980, 2.19020e-5)])
def test_eq06_of_the_best_critic(t, expected):
    """alpha^4 s^2 / (alpha^2 s^2 + sigma^2), and more for any other."""
    z, eps = f64([1.0, 1, -1, -1])[:, None], f64([1.0, -1, 1, -1])[:, None]
    alpha, sigma = vp_level(t, 4)
    x = 0.8 * z

    def loss(std):
        prediction = Gauss(0.0, std)(add_noise(x, alpha, sigma, eps), alpha, sigma, {})
        return swiftbrush.critic_loss(prediction, x, alpha, sigma).item()

    assert loss(0.8) == pytest.approx(expected, rel=1e-5)
    assert min(loss(0.7), loss(0.9)) > loss(0.8)


def test_eq06_is_the_error_of_the_noise():
    x, eps = normal(5, 3), normal(5, 3, seed=1)
    x.requires_grad_()
    prediction = normal(5, 3, seed=2).requires_grad_()
    alpha, sigma = (
        VP1000.alpha(torch.arange(0, 1000, 200)),
        VP1000.sigma(torch.arange(0, 1000, 200)),
    )
    loss = swiftbrush.critic_loss(prediction, x, alpha, sigma)
    x_t = add_noise(x.detach(), alpha, sigma, eps)
    error = eps_from_x0(prediction.detach(), x_t, alpha, sigma) - eps
    expected = (alpha[:, None] ** 2 * error**2).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    loss.backward()
    assert x.grad is None  # the student does not receive it
    assert prediction.grad.abs().min() > 0


# ---- (1): one step -------------------------------------------------------------------------------


def test_eq01_one_step_from_pure_noise():
    """Noise that the network takes for all of its input leaves 0.034171 z. The official code's
    rounded constants give 0.034318 z."""

    class Net:
        schedule = VP1000

        def __call__(self, x, alpha, sigma, cond):
            return (x - sigma * x) / alpha

    z = normal(4, 3)
    x = swiftbrush.sample(Net(), z, {}, 1, None)
    assert (x / z - 0.034171).abs().max() < 2e-6


@pytest.mark.parametrize("schedule", [EDM(0.01, 20.0, 0.714), Flow(), TrigFlow(0.7)], ids=str)
def test_eq01_the_last_level_of_other_schedules(schedule):
    z = normal(4, 3)
    x, alpha, sigma = swiftbrush.first_input(schedule, z)
    grid = schedule.grid(1000)
    assert (alpha, sigma) == (schedule.alpha(grid[999]), schedule.sigma(grid[999]))
    assert torch.allclose(x, sigma * z)


def test_eq01_samples_have_no_graph():
    """Also of a network that is in training."""
    net = Gauss(0.3, 0.5, VP1000)
    x, alpha, sigma = swiftbrush.first_input(VP1000, normal(4, 3))
    assert net(x, alpha, sigma, {}).requires_grad
    assert not swiftbrush.sample(net, normal(4, 3), {}, 1, None).requires_grad


# ---- a run ---------------------------------------------------------------------------------------


class VPToy(byhand.Tiny):
    """On VP levels; its copies begin with the same weights."""

    def __init__(self):
        super().__init__(VP1000, "eps")

    def copy(self, adapters=None, changes=None):
        return Toy.copy(self, adapters, changes)


def test_a_fresh_critic_gives_no_gradient(trace):
    """Adapters start at zero: with equal networks (4) is 0 for any guidance, until the critic has
    made its first step. The student's gradient is 0 in DMD2 only without guidance."""
    steps = trace("--iters", 3, "--cfg", 4.5, "--lora-fake", 4, "--warmup", 0, teacher=VPToy())
    assert [step.role for step in steps] == ["student", "critic"] * 3
    students = [step.flat_grad().norm().item() for step in steps[::2]]
    assert students[0] == 0
    assert min(students[1:]) > 1e-8
    for step in steps:
        assert not step.moved("teacher")
    assert steps[1].moved("critic")


def test_levels_and_null_share(trace):
    record = [(BatchRandom, "randint"), (swiftbrush, "critic_loss"), (VPToy, "drop_condition")]
    steps = trace("--iters", 40, "--null-share", 0.1, record=record, teacher=VPToy())
    drawn = {call.args[1:] for call in steps.calls["randint"]}
    assert drawn == {(0, 8), (20, 981), (0, 1000)}
    empty = torch.cat([call.args[2] for call in steps.calls["drop_condition"]])
    assert len(empty) == 40 * 16
    assert 0.06 < empty.double().mean() < 0.14
    for call in steps.calls["drop_condition"]:
        assert torch.equal(call.result["labels"] == 8, call.args[2])


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
def test_adapters_of_the_published_critic(kind, folders):
    """Factor 108 / 64, to_q and to_v of all attention layers; here with the rank 8."""
    preset = swiftbrush.PRESETS["sd21"]
    assert preset["lora_fake"] == 64
    teacher = load(folders, kind, ["a", "b"])
    spec = dict(rank=8, alpha=preset["lora_alpha"] / 8, targets=preset["lora_targets"])
    critic = teacher.copy(dict(spec, seed=0, flag="--lora-fake"))
    layers = [n for n, m in critic.net.named_modules() if hasattr(m, "lora_A")]
    assert layers
    assert {name.rpartition(".")[2] for name in layers} == {"to_q", "to_v"}
    expected = [n for n, _ in teacher.net.named_modules() if n.endswith(("to_q", "to_v"))]
    assert layers == expected
    for name in layers:
        assert set(critic.net.get_submodule(name).scaling.values()) == {1.6875}


# ---- whole iterations by hand --------------------------------------------------------------------


class Hand:
    """(1) to (6) from the docstring, on points with labels 0 to 7 and 8 for none."""

    def __init__(self, trace, w=1.0, share=0.1):
        self.trace, self.w, self.share = trace, w, share
        self.schedule = trace.teacher.schedule
        self.logs = []

    def level(self, i):
        """alpha, sigma [B, 1] in float64 at grid indices i."""
        s = self.schedule
        if isinstance(s, VP):
            t = i.double()
        elif isinstance(s, EDM):
            low, high = 0.01 ** (1 / 7), 20 ** (1 / 7)
            t = (low + i.double() / 999 * (high - low)) ** 7
        elif isinstance(s, Flow):
            t = (i.double() + 1) / 1000
        else:
            t = (i.double() + 1) / 1000 * math.pi / 2
        return s.alpha(t)[:, None], s.sigma(t)[:, None]

    def estimate(self, net, x_t, alpha, sigma, cond):
        c = net(x_t, alpha[:, 0], sigma[:, 0], cond)
        u = net(x_t, alpha[:, 0], sigma[:, 0], dict(labels=torch.full((16,), 8)))
        return (u + self.w * (c - u)).double()

    def turns(self, it):
        networks = self.trace.networks()
        teacher, student, critic = (networks[name] for name in ("teacher", "student", "critic"))
        draw = BatchRandom(0, it, 16)
        cond = dict(labels=draw.randint(0, 8))
        alpha, sigma = self.level(torch.full((16,), 999))
        z = draw.randn(2)
        x_in = z if isinstance(self.schedule, VP) else (sigma * z).float()
        x = student(x_in, alpha[:, 0], sigma[:, 0], cond)  # (1)
        alpha, sigma = self.level(draw.randint(20, 981))
        x_t = (alpha * x.detach() + sigma * draw.randn(2)).float()
        r = self.estimate(teacher, x_t, alpha, sigma, cond)  # (2)
        f = self.estimate(critic, x_t, alpha, sigma, cond)  # (3)
        noise = lambda x0: (x_t - alpha * x0) / sigma
        g = sigma**2 / (alpha**2 + sigma**2) * (noise(r) - noise(f))  # (4)
        yield "student", (x * g.detach()).sum() / 32  # the gradient of (5)
        logs = dict(vsd=(g**2).mean() / 2, real_gap=((x - r) ** 2).mean())
        logs |= dict(fake_gap=((x - f) ** 2).mean(), mean=x.mean(), std=x.std())

        def loss():
            """With the weights of the critic as they stand before its step."""
            return self.critic_loss(draw, critic, x.detach(), cond, logs)

        yield "critic", loss

    def critic_loss(self, draw, critic, x, cond, logs):
        alpha, sigma = self.level(draw.randint(0, 1000))
        eps = draw.randn(2)
        x_t = (alpha * x + sigma * eps).float()
        labels = torch.where(draw.rand() < self.share, 8, cond["labels"])
        x0 = critic(x_t, alpha[:, 0], sigma[:, 0], dict(labels=labels)).double()
        found = (alpha * x + sigma * eps - alpha * x0) / sigma
        loss = (alpha**2 / (alpha**2 + sigma**2) * (found - eps) ** 2).mean()  # (6)
        self.logs.append(logs | dict(critic=loss))
        return loss


BY_HAND = {
    "": dict(kind="edm"),
    "--cfg 4.5": dict(kind="vp", w=4.5),
    "--cfg 2 --null-share 0.5 --lora 4": dict(kind="flow", w=2, share=0.5),
    "--cfg 2 --small depth=2 --small-fake width=24": dict(kind="edm", w=2),
    "--cfg 0.5 --null-share 0 --lora-fake 4 --lora-alpha 6.75": dict(
        kind="trigflow", w=0.5, share=0
    ),
}


@pytest.mark.parametrize("flags", BY_HAND)
def test_whole_iterations_by_hand(trace, monkeypatch, flags):
    """(1) to (6): gradients, AdamW's updates, the average, what the log says, and the samples."""
    common = "--iters 5 --lr 3e-3 --lr-fake 2e-3 --betas 0.3 0.8 --weight-decay 0.1 --clip 0.1"
    common += " --warmup 2 --cooldown 0.6 --ema 3"
    case = dict(BY_HAND[flags])
    teacher = byhand.any_toy(case.pop("kind"))
    byhand.start_awake(monkeypatch)
    wrapped = byhand.wrap_trained(monkeypatch)
    steps = trace(*common.split(), *flags.split(), teacher=teacher)
    hand = Hand(steps, **case)
    optimisers = {
        role: byhand.AdamW(byhand.rates(lr, 5, warmup=2, cooldown=0.6), (0.3, 0.8), 0.1, 0.1)
        for role, lr in (("student", 3e-3), ("critic", 2e-3))
    }
    assert byhand.compare_iterations(steps, hand.turns, optimisers, 1e-4) == 5
    byhand.compare_logs(steps.logs, hand.logs)
    # gradients flow through what run.train returns, other passes do not
    assert [net.calls for net in wrapped] == [{True: 5, False: 0}] * 2

    byhand.compare_average(steps, 3)
    x, noises, cond = byhand.sample_by_record(steps, swiftbrush)
    alpha, sigma = hand.level(torch.full((9,), 999))
    x_in = noises[0] if isinstance(hand.schedule, VP) else (sigma * noises[0]).float()
    expected = steps.ema.model(x_in, alpha[:, 0], sigma[:, 0], cond)
    assert byhand.difference(x, expected) < 1e-5


def test_a_whole_critic_in_place_of_adapters():
    """--lora-fake 0 drops the adapters of a preset, with their alpha and targets."""
    args = swiftbrush.parse_args(["--teacher", "sdxl"])
    assert args.lora_fake["rank"] == 64
    assert args.lora_fake["alpha"] == 108
    args = swiftbrush.parse_args(["--teacher", "sdxl", "--lora-fake", "0"])
    assert args.lora_fake is None
    assert args.lora_alpha is None
    with pytest.raises(UserError, match="--lora-alpha and --lora-targets need"):
        swiftbrush.parse_args("--teacher sdxl --lora-fake 0 --lora-alpha 4".split())


@pytest.mark.parametrize("flags", ["--null-share 1", "--null-share -0.1"])
def test_mistakes(flags, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="--null-share: expected a share"):
        Trace(monkeypatch, swiftbrush, tmp_path / "out", *flags.split())


def test_frame(monkeypatch, tmp_path):
    critic_of = lambda steps: steps.networks()["critic"]
    check_frame(
        monkeypatch, swiftbrush, tmp_path / "out", show=["vsd", "critic"], critic_of=critic_of
    )
