"""DMD2: Improved Distribution Matching Distillation. Yin et al., NeurIPS 2024, arXiv 2405.14867.

The student G makes an image in one or a few network passes. It is trained so that its samples, with
noise added, have the same distribution as the teacher's: the gradient of the KL divergence between
the two is a difference of two denoisers, the frozen teacher ("real") and a critic ("fake") that is
trained all the while on the student's own samples. The critic takes --ratio steps per student step,
which makes the regression loss of the first DMD unnecessary. A GAN head on the critic's features
(--gan) corrects what the teacher itself gets wrong, from real images.

Notation: x_t = alpha_t x + sigma_t eps; mu(x_t, t, c) is a network's estimate of the clean x; c is
the label or prompt; sg[] stops gradients. All times t are indices into a grid of 1000 noise levels,
from data to noise. n is --nfe; t_k are the levels of its steps, from noise to data.

    x = G(x_in, t_k, c)                      k ~ U{0..n-1}, one draw for the whole batch         (1)
    x_in = alpha_k xhat + sigma_k eps        xhat: its output after k steps; k = 0: pure noise   (2)
    r = mu_real(x_t, t, c), guided (--cfg)   f = mu_fake(x_t, t, c), not guided                  (3)
    g = (f - r) / mean|x - r|                mean over the pixels of a sample; t ~ U{20..980}    (4)
    L_dm = 1/2 mean (x - sg[x - g])^2        so that dL_dm/dx = g / numel(x)                     (5)
    L_fake = mean lambda_t (mu_fake(x_t, t, c) - sg[x])^2     t ~ U{0..999}; lambda_t: the       (6)
                                         weight with which the teacher was trained
    l(x) = head(critic features of x_t)      t ~ U{0..999}                                       (7)
    L_gen = mean softplus(-l(x))                                                                 (8)
    L_cls = mean softplus(l(sg[x])) + mean softplus(-l(x_real))                                  (9)
    student: L_dm + w_G L_gen                critic and head: L_fake + w_D L_cls                (10)

Usage:
    python dmd2.py                                           # one step, MNIST, minutes on a CPU
    python dmd2.py --nfe 4 --gan                             # four steps, with the GAN term
    python dmd2.py --teacher toy                             # 2-D mixture, under a minute
    torchrun --nproc_per_node=8 dmd2.py --teacher sdxl       # 8 GPUs

Differences from the paper, variants and results: docs/dmd2.md.
"""

import training.interrupt  # noqa: F401  # isort: skip

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.errors import launch, require
from common.schedules import add_noise, expand, initial_noise, shifted_grid
from common.teachers.load import load_teacher
from common.teachers.students import start_from
from data.images import load_images
from training.ema import EMA
from training.flags import Parser
from training.optim import adamw
from training.plan import describe_steps
from training.report import Report
from training.run import Run

N = 1000  # noise levels of the grid

# Presets: the flags for a kind of teacher, unless the command line gives others.
# [P] paper, [C] official code, [A] answer of an author, [T] code of others, [O] ours, measured in
# docs/RESULTS.md. `source` is printed at the start; docs/teachers.md has all of them in a table.
IMAGENET64 = dict(  # EDM on ImageNet-64 [P, C]
    cfg=1.0,
    nfe=1,
    lr=2e-6,
    lr_fake=2e-6,
    betas=(0.9, 0.999),
    ratio=5,
    batch=280,
    iters=200_000,
    warmup=500,
    cooldown=0.0,
    ema=0,
    shift=1.0,
    gan_weight=3e-3,
    cls_weight=1e-2,  # [C]
    source="[P, C]",
)
TOY = dict(  # [O], but ratio and GAN weights [P]
    IMAGENET64,
    lr=5e-4,
    lr_fake=5e-4,
    batch=256,
    iters=4000,
    warmup=0,
    cooldown=0.5,
    source="[O]",
)
MNIST = dict(  # [O]
    cfg=1.5,
    nfe=1,
    lr=1e-3,
    lr_fake=1e-3,
    betas=(0.5, 0.99),
    ratio=3,
    batch=64,
    iters=900,
    warmup=20,
    cooldown=0.5,
    ema=2000,
    shift=0.3,  # less noise: fewer speckles in the background
    gan_weight=0.03,
    cls_weight=0.1,
    source="[O]",
)
EMOJI = dict(MNIST, cfg=3.5, nfe=4, lr=1e-4, lr_fake=1e-4, batch=32, iters=600, shift=1.0)  # [O]
SD15 = dict(  # one step, first stage [P, C]
    IMAGENET64,
    cfg=1.75,
    lr=1e-5,
    lr_fake=1e-5,
    ratio=10,
    batch=2048,
    iters=40_000,
    gan_weight=1e-3,
)
SDXL = dict(  # four steps [P, C]
    IMAGENET64,
    cfg=8.0,
    nfe=4,
    lr=5e-7,
    lr_fake=5e-7,
    batch=128,
    iters=20_000,
    gan_weight=5e-3,
)
CIFAR10 = dict(  # [T] FastGen
    IMAGENET64, lr=1e-4, lr_fake=1e-4, batch=2048, iters=100_000, warmup=0, gan_weight=1e-3
)
LATENTS = dict(  # [T] DMDR, without its two tricks; with guidance 1.5 its FID was 5.2, not 2.1
    IMAGENET64,
    lr=2e-5,
    lr_fake=2e-5,
    batch=512,
    iters=100_000,
    clip=1.0,
    source="[T] DMDR",
)
SD3 = dict(  # SD3.5-Large [T] SenseFlow
    SDXL,
    cfg=4.0,
    lr=1e-6,
    lr_fake=1e-6,
    weight_decay=0.0,
    batch=64,  # [A] of DMDR, for this teacher
    source="[T] SenseFlow, batch [A] DMDR, iterations nobody's",
)
FLUX = dict(  # [T] FastGen, 512 px; the guidance of the network's input is --embedded-guidance
    SDXL,
    cfg=1.0,
    lr=1e-5,
    lr_fake=1e-5,
    batch=64,  # nobody's
    iters=5000,
    warmup=0,
    gan_weight=0.03,
    source="[T] FastGen, batch nobody's",
)
QWEN = dict(  # [T] NVIDIA's configuration for Qwen-Image; shift 3 instead of the 2 of 1024 px
    FLUX,
    cfg=4.0,
    lr=2e-6,
    lr_fake=2e-6,
    batch=128,
    step_indices="999,817,599,332",
    shift=1.5,
    source="[T] NVIDIA Model-Optimizer, shift of Qwen-Image-Flash",
)
WAN = dict(  # 1.3B [T] FastGen; shift 5 instead of the file's 3
    FLUX,
    cfg=5.0,
    iters=6000,
    step_indices="999,832,624,356",
    shift=5 / 3,
    source="[T] FastGen",
)
WAN14B = dict(  # [T]
    WAN, lr=2e-6, lr_fake=2e-6, iters=4000, clip=1.0, source="[T] FastVideo, guidance of FastGen"
)
WAN22 = dict(WAN14B, cfg=4.0, lr_fake=4e-7, betas=(0.0, 0.999), iters=20_000)
WAN5B = dict(  # Wan 2.2 5B, two steps [T] FastGen; its file's shift is 5
    WAN,
    nfe=2,
    step_indices="999,499",
    shift=1.0,
    source="[T] FastGen, batch and length nobody's",
)
PRESETS = {
    "default": dict(IMAGENET64, source="nobody's: ImageNet-64's"),
    "toy": TOY,
    "toy-cond": TOY,
    "mnist": MNIST,
    "emoji": EMOJI,
    "emoji-flow": dict(EMOJI, source="nobody's: emoji's"),
    "own": dict(MNIST, shift=1.0, source="nobody's: mnist's"),
    "edm-imagenet64": IMAGENET64,
    "edm-cifar10": dict(CIFAR10, source="[T] FastGen"),
    "dit": dict(LATENTS, source="nobody's: SiT's"),
    "sit": LATENTS,
    "sd15": SD15,
    "sd21": dict(SD15, source="nobody's: sd15's"),
    "sdxl": SDXL,  # as LoRA [C]: --lora 64 --lora-alpha 8 --lr 5e-5 --lr-fake 5e-5
    "sd3": SD3,
    "sana": dict(SD3, cfg=4.5, source="nobody's: sd3's"),
    "sana-0.6b": dict(SD3, cfg=4.5, source="nobody's: sd3's"),
    "flux": FLUX,
    # as LoRA [T] LightX2V: --lora 16 --lr 1e-4 --lr-fake 2e-5 --ratio 2 --warmup 10
    "chroma": dict(SD3, cfg=5.0, source="nobody's: sd3's"),
    "flux2": dict(FLUX, source="nobody's: flux's"),
    "flux2-klein": dict(FLUX, cfg=4.0, source="[T] DiffSynth-Studio, batch and length nobody's"),
    "hunyuan-image": dict(SD3, cfg=3.5, source="nobody's: sd3's"),
    "lumina2": dict(SD3, source="nobody's: sd3's"),
    "qwen-image": QWEN,  # as LoRA [A]: --lora 64 --lora-alpha 8 --lr 5e-5 --lr-fake 4e-7
    "z-image": dict(SD3, cfg=6.0, source="nobody's: sd3's"),
    "wan2.1": WAN,
    "wan2.1-14b": WAN14B,
    "wan2.2": dict(WAN22, source="nobody's: phased_dmd's"),
    "wan2.2-5b": WAN5B,
    "sana-video": dict(FLUX, cfg=6.0, iters=6000, source="nobody's: wan2.1's"),
    "ltx-video": dict(FLUX, cfg=3.0, iters=6000, source="nobody's: wan2.1's"),
    "hunyuanvideo-1.5": dict(FLUX, cfg=6.0, iters=6000, source="nobody's: wan2.1's"),
}


def parse_args(argv=None):
    p = Parser(__doc__, critic=True, images=True, small=True)
    add = p.method.add_argument
    add("--step-indices", metavar="I,...", help="grid indices of the steps, e.g. 999,749,499,249")
    add("--ratio", type=int, help="critic steps per student step")
    add("--shift", type=float, help="factor on sigma / alpha of all levels drawn in (4), (6), (7)")
    add(
        "--sim",
        choices=["backward", "data"],
        default="backward",
        help="input x_in of a step: (2), or noised images",
    )
    add("--gan", action="store_true", help="add the GAN losses (8) and (9), which need images")
    add("--gan-weight", type=float, help="weight w_G of (8) in (10)")
    add("--cls-weight", type=float, help="weight w_D of (9) in (10)")
    args = p.parse(PRESETS, argv)
    require(args.ratio >= 1, f"--ratio: expected at least 1, found {args.ratio}")
    require(args.shift > 0, f"--shift: expected a number > 0, found {args.shift}")
    unused = args.data and not args.gan and args.sim == "backward" and not args.from_image
    require(not unused, f"--data {args.data}: this run uses no images; add --gan")
    return args


# ---- networks ------------------------------------------------------------------------------------


class Head(nn.Module):
    """GAN head: one logit from one feature map [B, C, H, W], or [B, C] for points."""

    def __init__(self, feature):
        super().__init__()
        c = feature.shape[1]
        if feature.ndim == 2:
            self.layers = nn.Sequential(nn.Linear(c, c), nn.SiLU(), nn.Linear(c, 1))
            return
        layers = []
        side = min(feature.shape[2:])
        while side > 4:  # halve down to 4 x 4
            layers += [nn.Conv2d(c, c, 4, stride=2, padding=1), group_norm(c), nn.SiLU()]
            side //= 2
        layers += [nn.Conv2d(c, c, side, stride=side), group_norm(c), nn.SiLU()]
        layers += [nn.Conv2d(c, 1, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, feature):
        return self.layers(feature.float()).flatten(1)  # [B, 1]


def group_norm(c):
    """Up to 32 groups of at least 4 channels: at 1 x 1, a group of one number would become 0."""
    return nn.GroupNorm(math.gcd(32, max(c // 4, 1), c), c)


class Critic(nn.Module):
    """mu_fake and the head in one module, so that one DDP wrapper averages both gradients."""

    def __init__(self, fake):
        super().__init__()
        self.fake = fake
        self.head = None  # with --gan

    def forward(self, x_t, alpha, sigma, cond, logit=False):
        if logit:
            features = self.fake(x_t, alpha, sigma, cond, features=True)
            return self.head(features[-1])  # (7)
        return self.fake(x_t, alpha, sigma, cond)


# ---- few-step sampling ---------------------------------------------------------------------------


def step_indices(n, text=None):
    """Grid indices of an n-step student, from noise to data. n = 4: 999, 749, 499, 249 [C].

    text: indices given by --step-indices instead.
    """
    require(n < N, f"--nfe {n}: expected at most {N - 1}, steps are levels of a grid of {N}")
    if text is None:
        return list(range(N - 1, 0, -(N // n)))[:n]
    try:
        indices = [int(i) for i in text.split(",")]
    except ValueError:
        indices = []
    falling = indices == sorted(set(indices), reverse=True)
    ok = len(indices) == n and falling and all(0 <= i < N for i in indices)
    require(ok, f"--step-indices {text}: expected {n} falling indices in 0..{N - 1} (--nfe {n})")
    return indices


def backward_simulation(student, schedule, times, k, cond, z, noise):
    """Input of step k: the student's own sampler, run for k steps without gradient.

    times: of all steps, falling. z: unit noise [B, *shape], the first; noise(): more of it.
    """
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    x_in = initial_noise(schedule, times[0], z)
    with torch.no_grad():
        for j in range(k):
            xhat = student(x_in, alpha[j], sigma[j], cond)
            x_in = add_noise(xhat, alpha[j + 1], sigma[j + 1], noise())  # (2)
    return x_in


@torch.no_grad()
def sample(student, z, cond, nfe, noise, steps=None):
    """n-step sampler: denoise, add fresh noise at the next level, repeat. -> x [B, *shape].

    z: unit noise [B, *shape]. noise(): more of it. steps: text of --step-indices.
    """
    schedule = student.schedule
    times = schedule.grid(N)[step_indices(nfe, steps)]
    x_in = backward_simulation(student, schedule, times, nfe - 1, cond, z, noise)
    return student(x_in, schedule.alpha(times[-1]), schedule.sigma(times[-1]), cond)


# ---- losses --------------------------------------------------------------------------------------


@torch.no_grad()
def dm_gradient(x, x_t, alpha, sigma, cond, real, fake, cfg):
    """g of (4) [B, *shape], without graph; also r, f and the normaliser [B] for the log.

    x: samples of the student. x_t: x with noise at the levels alpha, sigma [B].
    """
    r = real.guided(x_t, alpha, sigma, cond, cfg)  # (3)
    f = fake(x_t, alpha, sigma, cond)  # (3)
    norm = (x - r).abs().flatten(1).mean(1)  # [B]
    safe = norm.where(norm != 0, math.inf)  # 0 / 0 is 0; after a nan, run.step skips the step
    g = (f - r) / safe.view(-1, *[1] * (x.ndim - 1))  # (4)
    return g, r, f, norm


def dm_loss(x, g):
    return 0.5 * F.mse_loss(x, (x - g).detach())  # (5)


def fake_loss(prediction, x, weight):
    """weight: lambda_t [B], which makes this the loss that the teacher was trained with."""
    error = prediction - x.detach()
    return (expand(weight, x).to(x.dtype) * error.square()).mean()  # (6)


def gen_loss(logit_fake):
    return F.softplus(-logit_fake).mean()  # (8)


def cls_loss(logit_fake, logit_real):
    return F.softplus(logit_fake).mean() + F.softplus(-logit_real).mean()  # (9)


# ---- training ------------------------------------------------------------------------------------


def main():
    args = parse_args()
    indices = step_indices(args.nfe, args.step_indices)
    run = Run(__file__, args)
    load = run.teacher_kwargs(students=1, critics=1)
    teacher = load_teacher(args.teacher, run.device, run.dtype, **load)
    schedule = teacher.schedule

    # Noise levels: those of the student's steps, and the grid from which all others are drawn,
    # which --shift moves. They may depend on the size, which several --size change.
    times = schedule.grid(N)[indices]

    # Networks: student and critic start as the teacher or as another run's, the head from scratch.
    use_images = args.gan or args.sim == "data"
    images = load_images(args.data, teacher, run.print) if use_images else None
    student = teacher.copy(args.lora, args.small)
    critic = Critic(teacher.copy(args.lora_fake, args.small_fake))
    if args.start and not args.resume:
        start_from(args.start, teacher, student, critic.fake, run.print)
    if args.gan:
        zeros = torch.zeros(1, *teacher.shape, device=run.device)
        with torch.no_grad():
            features = critic.fake(zeros, 1.0, 1.0, teacher.encode([0]), features=True)
        torch.manual_seed(args.seed)  # the head starts equal on all processes
        critic.head = run.to_device(Head(features[-1]))
    student_ddp = run.train(student)  # DDP around both; for passes that train weights
    critic_ddp = run.train(critic)
    opt_g = adamw(student, args.lr, args)
    opt_c = adamw(critic, args.lr_fake, args)
    ema = EMA(student, args.ema, args.ema_cpu)
    report = Report(run, teacher, ema, sample, dict(steps=",".join(map(str, indices))))
    facts = dict(steps=describe_steps(schedule, times))
    run.print_summary(images, student=student, critic=critic, teacher=teacher, **facts)

    state = dict(student=student, opt_g=opt_g, ema=ema, critic=critic, opt_c=opt_c)
    first = run.resume(state)
    it = first - 1  # if no iteration is left
    for it in run.loop(first, args.iters, show=["dm", "fake"]):
        draw = run.draw(it)
        times = schedule.grid(N)[indices]  # of this iteration's size
        grid = shifted_grid(schedule, N, args.shift)
        run.set_rates(it, (opt_g, args.lr), (opt_c, args.lr_fake))
        cond = teacher.random_cond(draw)
        if images:
            x_real, cond_real = images.samples(run, teacher, it)
        logs = {}

        def noised(x, i):
            """x_t, alpha, sigma of x at the levels with grid indices i [B]."""
            alpha, sigma = schedule.alpha(grid[i]), schedule.sigma(grid[i])
            return add_noise(x, alpha, sigma, draw.randn_like(x)), alpha, sigma

        # Sample of the student. One forward pass serves both turns.
        student_turn = it % args.ratio == 0
        k = draw.shared_randint(0, args.nfe)  # on all processes, for equally many passes
        alpha_k, sigma_k = schedule.alpha(times[k]), schedule.sigma(times[k])
        if args.sim == "backward" or k == 0:
            noise = lambda: draw.randn(*teacher.shape)
            x_in = backward_simulation(student, schedule, times, k, cond, noise(), noise)
        else:  # the paper's ablation
            x_in, cond = add_noise(x_real, alpha_k, sigma_k, draw.randn(*teacher.shape)), cond_real
        if student_turn:
            x = student_ddp(x_in, alpha_k, sigma_k, cond)  # (1)
        else:
            with torch.no_grad():
                x = student(x_in, alpha_k, sigma_k, cond)

        # Student.
        if student_turn:
            critic.requires_grad_(False)  # not no_grad: (8) must reach x through the critic
            x_t, alpha, sigma = noised(x.detach(), draw.randint(20, 981))
            g, r, f, norm = dm_gradient(x, x_t, alpha, sigma, cond, teacher, critic.fake, args.cfg)
            loss_dm = dm_loss(x, g)
            loss = loss_dm
            if args.gan:
                logit = critic(*noised(x, draw.randint(0, N)), cond, logit=True)
                loss_gen = gen_loss(logit)
                loss = loss + args.gan_weight * loss_gen  # (10)
                logs |= dict(gen=loss_gen)
            loss.backward()
            grad_student = run.step(opt_g, args.clip)  # clip, step, zero the gradients
            logs |= dict(dm=loss_dm, grad_student=grad_student, dm_norm=norm.mean())
            logs |= dict(real_gap=(x - r).square().mean(), fake_gap=(x - f).square().mean())
            ema.update(run.images_stepped)
            critic.requires_grad_(True)

        # Critic, on the same samples.
        x = x.detach()
        x_t, alpha, sigma = noised(x, draw.randint(0, N))
        weight = teacher.native_loss_weight(alpha, sigma)
        loss_fake = fake_loss(critic_ddp(x_t, alpha, sigma, cond), x, weight)
        loss = loss_fake
        if args.gan:  # fake and real in one batch, each with its own level and noise
            i = torch.cat([draw.randint(0, N), draw.randint(0, N)])
            eps = torch.cat([draw.randn_like(x), draw.randn_like(x)])
            alpha, sigma = schedule.alpha(grid[i]), schedule.sigma(grid[i])
            x_t = add_noise(torch.cat([x, x_real]), alpha, sigma, eps)
            both = {name: torch.cat([cond[name], cond_real[name]]) for name in cond}
            logit_fake, logit_real = critic_ddp(x_t, alpha, sigma, both, logit=True).chunk(2)
            loss_cls = cls_loss(logit_fake, logit_real)
            loss = loss + args.cls_weight * loss_cls  # (10)
            logs |= dict(cls=loss_cls, logit_fake=logit_fake.mean(), logit_real=logit_real.mean())
        loss.backward()
        grad_critic = run.step(opt_c, args.clip)
        logs |= dict(fake=loss_fake, grad_critic=grad_critic)
        logs |= dict(mean=x.mean(), std=x.std())

        run.after(it, logs, state, report)

    run.finish(it, state, report)
    report.end(it + 1)


if __name__ == "__main__":
    launch(main)
