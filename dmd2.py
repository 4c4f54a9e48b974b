"""DMD2: improved distribution matching distillation. Yin et al., NeurIPS 2024, arXiv 2405.14867.

A student G that makes an image in one or a few passes is trained to give samples that are distributed like the teacher's: the KL divergence between
both, after adding noise, falls along the difference of two denoisers, the frozen teacher ("real") and a critic ("fake") that is trained all the while
on the student's own images. The critic takes `--ratio` steps per student step, which makes DMD's regression loss unnecessary. A GAN head on the
critic's features (--gan) adds what the teacher itself gets wrong; it is the only part that needs images.

Notation: x_t = alpha_t x + sigma_t eps; mu(x_t, t, c) is a network's estimate of the clean x; sg[] stops gradients; c is the label or prompt.
    x = G(x_in, t_k, c)                  k ~ U{0..n-1}, one draw for the whole batch; k = 0 takes x_in = pure noise                     (1)
    x_in = alpha_k xhat + sigma_k eps,   xhat = the student's own output after k steps: backward simulation, no gradient                (2)
    r = mu_real(x_t, t, c) with guidance u + w (c - u);   f = mu_fake(x_t, t, c) without                                                (3)
    g = (f - r) / mean|x - r|            mean over the pixels of each sample; t ~ U{20..980} of 1000                                    (4)
    L_dm = 1/2 mean (x - sg[x - g])^2    so that dL_dm / dx = g / numel(x); its value is no KL and need not fall                         (5)
    L_fake = mean lambda_t (mu_fake(x_t, t, c) - sg[x])^2      lambda_t: the loss the teacher was trained with; t ~ U{0..999}            (6)
    l(x) = head(critic features of alpha_t x + sigma_t eps)    t ~ U{0..999}                                                            (7)
    L_gen = mean softplus(-l(x))                                                                                                        (8)
    L_cls = mean softplus(l(sg[x])) + mean softplus(-l(x_real))                                                                         (9)
    student: dm_weight L_dm + w_G L_gen        critic and head: L_fake + w_D L_cls                                                     (10)

Commands (results and times: README and docs/RESULTS.md):
    python dmd2.py                                       # one step, embedded MNIST teacher, two CPU cores, minutes
    python dmd2.py --nfe 4 --gan                         # four steps, with the GAN term on the teacher's images
    python dmd2.py --teacher toy                         # 2-D mixture, under a minute
    torchrun --nproc_per_node=8 dmd2.py --teacher DIR    # any teacher folder, 8 GPUs

Differences from the paper:
    - the default preset (mnist) is ours: learning rates, Adam's betas, ratio, batch, the weight average and the cooldown are set for minutes on a CPU;
      the paper has neither average nor cooldown. --shift 0.3 draws less noisy levels: 36 % of them below sigma / alpha = 0.17, where a pixel flow's
      uniform times have 15 % and the paper's grid for pixels (EDM, rho 7) has 25 %.
    - flow teachers are not in the paper: t = (i + 1) / 1000 stands for its index i, the critic's loss is the velocity error.
    - prompts of the backward simulation and of the losses are the same draw, as in the paper; GAN images are an independent draw.
    - eps -> x is computed in float64 as in the official code, but r, f and g are float32 afterwards (effect about 1e-6).
    - switches for what others do: --gan-on teacher (FastGen), --sim data (noised real images, the paper's ablation), --alternate (FastGen: a student
      OR a critic step), --fake-weight x0 (FastGen), --gan-clean (official code with diffusion_gan off), --dm-weight 0 (GAN alone).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import data
from common.ema import EMA
from common.errors import UserError, launch
from common.flags import Parser
from common.pairs import check, warm_up
from common.report import evaluate_run, export, pictures
from common.run import Run
from common.schedules import expand
from common.teachers.load import load_teacher

PRESETS = {  # the flags of a teacher; all can be overridden. Sources: [P] paper, [C] official code, ours (docs/RESULTS.md): mnist, emoji, toy but its ratio and GAN weights [P]
    "mnist": dict(
        cfg=1.5,
        nfe=1,
        lr=1e-3,
        lr_fake=1e-3,
        betas=(0.5, 0.99),
        ratio=3,
        shift=0.3,
        batch=64,
        iters=900,
        warmup=20,
        cooldown=0.5,
        ema=2000,
        gan_weight=0.03,
        cls_weight=0.1,
    ),
    "toy": dict(
        cfg=1.0,
        nfe=1,
        lr=5e-4,
        lr_fake=5e-4,
        betas=(0.9, 0.999),
        ratio=5,
        shift=1.0,
        batch=256,
        iters=4000,
        warmup=0,
        cooldown=0.5,
        ema=0,
        gan_weight=3e-3,
        cls_weight=1e-2,
    ),
    # SD 1.5 in one step, first stage, and SDXL in four [P, C]; flow teachers: the numbers of SDXL, which are nobody's for them, and their pipelines' guidance
    "sd15": dict(
        cfg=1.75,
        nfe=1,
        lr=1e-5,
        lr_fake=1e-5,
        betas=(0.9, 0.999),
        ratio=10,
        shift=1.0,
        batch=2048,
        iters=40000,
        warmup=500,
        cooldown=0.0,
        ema=0,
        gan_weight=1e-3,
        cls_weight=1e-2,
    ),
    "sdxl": dict(
        cfg=8.0,
        nfe=4,
        lr=5e-7,
        lr_fake=5e-7,
        betas=(0.9, 0.999),
        ratio=5,
        shift=1.0,
        batch=128,
        iters=20000,
        warmup=500,
        cooldown=0.0,
        ema=0,
        gan_weight=5e-3,
        cls_weight=1e-2,
    ),
    # SDXL as LoRA [C]: --lora 64 --lora-alpha 8 --lr 5e-5 --lr-fake 5e-5, the critic whole; its convolutions too (--lora-targets). SDXL in one step [C]:
    # --nfe 1 --steps 399 --regression 10000 2000 1e-5, batch 256 there, and LPIPS of decoded images instead of the latents' squares
    # the paper's ImageNet-64, also for any other folder [P, C: lr 2e-6, ratio 5, batch 280, 200K iterations, w_G 3e-3, w_D 1e-2 (w_D: [C] only), warm-up 500]
    "edm-imagenet64": dict(
        cfg=1.0,
        nfe=1,
        lr=2e-6,
        lr_fake=2e-6,
        betas=(0.9, 0.999),
        ratio=5,
        shift=1.0,
        batch=280,
        iters=200000,
        warmup=500,
        cooldown=0.0,
        ema=0,
        gan_weight=3e-3,
        cls_weight=1e-2,
    ),
}
PRESETS |= {
    "toy-cond": PRESETS["toy"],
    "default": PRESETS["edm-imagenet64"],
    "emoji": dict(
        PRESETS["mnist"], cfg=3.5, nfe=4, lr=1e-4, lr_fake=1e-4, shift=1.0, batch=32, iters=600
    ),
}
PRESETS |= dict.fromkeys(
    ("dit-xl-256", "dit-xl-512", "sit-xl-256"), dict(PRESETS["edm-imagenet64"], cfg=1.5)
)  # ImageNet latents: not the paper's
PRESETS |= {
    name: PRESETS["sdxl"] | dict(cfg=w)
    for w, names in (
        (8.0, "sd3 sd3.5 sana sana-0.6b"),
        (1.0, "flux"),
        (4.0, "qwen-image"),
        (6.0, "z-image"),
        (5.0, "wan2.1 wan2.1-14b wan2.2"),
    )
    for name in names.split()
}
N = 1000  # noise levels of the schedule's own grid over which all times are drawn


def parse_args(argv=None):
    p = Parser(__doc__)
    p.method.add_argument(
        "--steps",
        help="grid indices of the student's steps, e.g. 999,749,499,249; default: the rule of `step_indices`",
    )
    p.method.add_argument("--ratio", type=int, help="critic steps per student step")
    p.method.add_argument("--dm-weight", type=float, default=1.0, help="weight of (5) in (10)")
    p.method.add_argument(
        "--gan",
        action="store_true",
        help="add (8) and (9); needs images: the teacher's own or --data",
    )
    p.method.add_argument("--gan-weight", type=float, help="w_G in (10)")
    p.method.add_argument("--cls-weight", type=float, help="w_D in (10)")
    p.method.add_argument(
        "--gan-on",
        choices=["critic", "teacher"],
        default="critic",
        help="whose features the head reads",
    )
    p.method.add_argument(
        "--gan-clean", action="store_true", help="no noise on the head's inputs, time index 0"
    )
    p.method.add_argument(
        "--sim",
        choices=["backward", "data"],
        default="backward",
        help="training inputs of steps k > 0",
    )
    p.method.add_argument(
        "--alternate",
        action="store_true",
        help="iterations that update the student leave the critic alone",
    )
    p.method.add_argument(
        "--fake-weight",
        choices=["native", "x0"],
        default="native",
        help="lambda_t in (6): the teacher's own loss, or 1",
    )
    p.method.add_argument(
        "--shift",
        type=float,
        help="multiplies sigma / alpha of all levels drawn in (4), (6) and (7); below 1: less noise; 1 in the paper",
    )
    p.method.add_argument(
        "--t-range",
        type=float,
        nargs=2,
        default=(0.02, 0.98),
        help="share of the grid that (4) draws from",
    )
    p.method.add_argument(
        "--regression",
        type=float,
        nargs=3,
        metavar=("PAIRS", "ITERS", "LR"),
        help="one step: warm-up on that many images of the teacher's ODE",
    )
    args = p.parse(PRESETS, argv)
    check(args)
    for wrong, message in (
        (args.ratio < 1, f"--ratio: expected at least 1, found {args.ratio}"),
        (
            args.alternate and args.ratio == 1,
            "--alternate: with --ratio 1 the critic would never be trained; use --ratio 2 or more",
        ),
        (
            not 0 <= args.t_range[0] <= args.t_range[1] <= 1,
            f"--t-range: expected 0 <= low <= high <= 1, found {args.t_range[0]} {args.t_range[1]}",
        ),
        (args.shift <= 0, f"--shift: expected a number > 0, found {args.shift}"),
        (
            not args.gan and (args.gan_clean or args.gan_on == "teacher" or args.dm_weight == 0),
            "--gan-on, --gan-clean and --dm-weight 0 mean something only with the GAN term: add --gan",
        ),
        (
            args.data and not (args.gan or args.sim == "data"),
            f"--data {args.data}: this run would not look at images; add --gan (or --sim data)",
        ),
    ):
        if wrong:
            raise UserError(message)
    return args


# ---- networks ---------------------------------------------------------------------------------------------------------------------------
#   teacher ("real")   frozen                     mu_real
#   student G          trained, starts as the teacher
#   critic ("fake")    trained, starts as the teacher, mu_fake and the features of the GAN head
#   head               trained with the critic, default initialisation


class Head(nn.Module):
    """Logit from one feature map: stride-2 convolutions down to 4x4 or less, one convolution over the rest, 1x1 to a number. No R1, no spectral norm."""

    def __init__(self, h):  # h: a feature map [1, C, H, W], or [1, C] for networks without space
        super().__init__()
        c, layers = h.shape[1], []
        norm = lambda: [
            nn.GroupNorm(math.gcd(32, max(c // 4, 1)), c),
            nn.SiLU(),
        ]  # 32 groups, fewer if they had under 4 channels: 1x1 maps would vanish
        if h.ndim == 2:
            layers += [nn.Linear(c, c), nn.SiLU(), nn.Linear(c, 1)]
        else:
            side = min(h.shape[2:])
            while side > 4:
                layers += [nn.Conv2d(c, c, 4, 2, 1), *norm()]
                side = (side - 2) // 2 + 1
            layers += [nn.Conv2d(c, c, side, side, 0), *norm(), nn.Conv2d(c, 1, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, h):
        return self.layers(h.float()).flatten(1)  # [B, 1]


class Critic(nn.Module):
    """mu_fake and the GAN head in one module, so that one DDP wrapper averages both gradients. `on`: whose features the head reads, if not its own."""

    def __init__(self, fake, head=None):
        super().__init__()
        self.fake, self.head = fake, head

    def forward(self, x_t, alpha, sigma, cond, logit=False, on=None):
        if not logit:
            return self.fake(x_t, alpha, sigma, cond)
        return self.head((on or self.fake)(x_t, alpha, sigma, cond, features=True)[-1])  # (7)


# ---- helpers ----------------------------------------------------------------------------------------------------------------------------


def step_indices(n, steps=None):
    """Grid indices of an n-step student, falling: the official rule list(range(N-1, 0, -(N // n))), of which n are kept. n=4: 999, 749, 499, 249."""
    if n >= N:
        raise UserError(
            f"--nfe {n}: expected at most {N - 1}, the student's steps are levels of a grid of {N}"
        )
    if steps is None:
        return list(range(N - 1, 0, -(N // n)))[:n]
    try:
        index = [int(s) for s in str(steps).split(",")]
    except ValueError:
        index = []
    if (
        len(index) != n
        or index != sorted(set(index), reverse=True)
        or not all(0 <= i < N for i in index)
    ):
        raise UserError(f"--steps {steps}: expected {n} falling indices in 0..{N - 1} (--nfe {n})")
    return index


def renoise(x, alpha, sigma, eps):
    """x_t = alpha x + sigma eps in the dtype of x; alpha, sigma: 0-d or [B], float64."""
    return (expand(alpha, x) * x + expand(sigma, x) * eps).to(x.dtype)


def first_input(schedule, t, z):
    """Pure noise as the student's first input: z for VP (unit norm at every t) and flow, sigma_max z for EDM."""
    return z if schedule.unit_norm else (schedule.sigma(t) * z).to(z.dtype)


def backward_simulation(student, schedule, times, k, cond, noise):
    """Input of step k: the student's own sampler, run k steps without gradient, exactly as in `sample`. noise(): fresh [B, *shape]."""  # (2)
    x_in = first_input(schedule, times[0], noise())
    with torch.no_grad():
        for j in range(k):
            xhat = student(x_in, schedule.alpha(times[j]), schedule.sigma(times[j]), cond)
            x_in = renoise(
                xhat, schedule.alpha(times[j + 1]), schedule.sigma(times[j + 1]), noise()
            )
    return x_in


# ---- losses -----------------------------------------------------------------------------------------------------------------------------


def dm_gradient(x, x_t, alpha, sigma, cond, real, fake, cfg):
    """g of (4) and its parts, without graph. x: student output [B, *shape]; x_t its noisy version at (alpha, sigma)."""
    with torch.no_grad():
        r = real.guided(x_t, alpha, sigma, cond, cfg)  # (3)
        f = fake(x_t, alpha, sigma, cond)
        w = (x - r).abs().flatten(1).mean(1)  # one number per sample
        g = (f - r) / w.where(w != 0, math.inf).view(
            -1, *[1] * (x.ndim - 1)
        )  # (4); 0 / 0 is 0, but a nan stays and is counted
    return g, r, f, w


def dm_loss(x, g):
    return 0.5 * F.mse_loss(x, (x - g).detach())  # (5)


def fake_loss(critic, x, x_t, alpha, sigma, cond, weight):
    """Denoising loss of the critic on detached student samples; weight: lambda_t [B]."""
    error = critic(x_t, alpha, sigma, cond) - x.detach()
    return (expand(weight, x).to(x.dtype) * error.square()).mean()  # (6)


def gen_loss(logit_fake):
    return F.softplus(-logit_fake).mean()  # (8)


def cls_loss(logit_fake, logit_real):
    return F.softplus(logit_fake).mean() + F.softplus(-logit_real).mean()  # (9)


# ---- sampler ----------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(student, z, cond, nfe, noise, steps=None):
    """n-step stochastic sampler: denoise, add fresh noise at the next level, repeat. z [B, *shape] unit noise; noise(): more of it. -> x [B, *shape]."""
    schedule, k = student.schedule, nfe - 1
    times = schedule.grid(N)[step_indices(nfe, steps)]
    x_in = backward_simulation(student, schedule, times, k, cond, iter_first(z, noise))
    return student(x_in, schedule.alpha(times[k]), schedule.sigma(times[k]), cond)


def iter_first(z, noise):
    """noise() that gives z first."""
    queue = [z]
    return lambda: queue.pop() if queue else noise()


def main():
    args, networks = parse_args(), (1, 1)  # students, critics: for the estimate of memory
    # ==== same in every script: setup ====
    run = Run("dmd2", args)
    teacher = load_teacher(args.teacher, run.device, run.dtype, **run.teacher_kwargs(*networks))
    schedule, shape = teacher.schedule, teacher.shape
    # ==== end ====
    index, grid = step_indices(args.nfe, args.steps), schedule.grid(N)
    times, grid = grid[index], grid.to(run.device)  # the grid is indexed by draws
    if args.shift != 1:
        grid = schedule.t_from_snr((schedule.alpha(grid) / schedule.sigma(grid) / args.shift) ** 2)
    images = (
        data.load_images(args.data, teacher, run.print) if args.gan or args.sim == "data" else None
    )
    student, fake = teacher.copy(args.lora), teacher.copy(args.lora_fake)
    head = None
    if args.gan:
        with torch.no_grad():
            h = fake(
                torch.zeros(1, *shape, device=run.device),
                1.0,
                1.0,
                teacher.encode([0]),
                features=True,
            )[-1]
        torch.manual_seed(args.seed)  # the head starts equal on all processes
        head = run.to_device(Head(h))
    critic = Critic(fake, head)
    for model in (student, fake) if args.grad_checkpoint else ():
        model.checkpoint_activations()
    G, C = run.train(student), run.train(critic)
    opt_g = torch.optim.AdamW(
        student.parameters(),
        lr=args.lr,
        betas=args.betas,
        weight_decay=args.weight_decay,
        fused=True,
    )
    opt_c = torch.optim.AdamW(
        critic.parameters(),
        lr=args.lr_fake,
        betas=args.betas,
        weight_decay=args.weight_decay,
        fused=True,
    )
    ema = EMA(student, args.ema, args.ema_cpu)
    on, sampler = (
        teacher if args.gan_on == "teacher" else None,
        dict(steps=",".join(map(str, index))),
    )
    low, high = int(args.t_range[0] * N), min(int(args.t_range[1] * N), N - 1)  # both included
    # one pass = one forward of the network; a backward counts two. The student's forward is shared by both turns. Without the GAN's part.
    per_student = 2 + (1 if args.cfg == 1 else 2) + 1
    passes = (args.nfe - 1) / 2 + 1 + 3 + per_student / args.ratio
    run.print_summary(
        student=student,
        critic=critic,
        teacher=teacher,
        images=images,
        steps=index,
        times=[round(float(t), 4) for t in times],
        passes_per_iteration=f"{passes:.2f}" + " and those of the GAN head" * args.gan,
        graph=dict(student=1 + args.gan),
    )

    # ==== same in every script: resume ====
    state = dict(student=student, opt_g=opt_g, ema=ema) | dict(critic=critic, opt_c=opt_c)
    first = run.resume(state)
    it = first - 1
    # ==== end ====
    if args.regression and not first:
        one_step = lambda z, c: G(
            first_input(schedule, times[0], z),
            schedule.alpha(times[0]),
            schedule.sigma(times[0]),
            c,
        )
        warm_up(run, teacher, student, one_step, *args.regression)

    for it in run.loop(first, args.iters):
        draw = run.draw(it)
        run.set_rates(it, (opt_g, args.lr), (opt_c, args.lr_fake))
        cond = teacher.encode(draw.randint(0, max(teacher.classes, 1)))
        if images:
            pixels, labels = images.batch(it, args.batch, args.seed, *run.data_shard)
            x_real = teacher.encode_images(pixels.to(run.device))
            cond_real = teacher.encode(labels)
        noisy = lambda x, i: (
            renoise(x, schedule.alpha(grid[i]), schedule.sigma(grid[i]), draw.randn_like(x)),
            schedule.alpha(grid[i]),
            schedule.sigma(grid[i]),
        )
        gan_index = lambda: draw.randint(0, N) * (0 if args.gan_clean else 1)
        turn = it % args.ratio == 0  # of the student; iteration 0 is one
        logs = {}

        # the student's sample: one forward pass serves both turns
        k = draw.shared_randint(0, args.nfe)
        if args.sim == "backward" or k == 0:
            x_in = backward_simulation(
                student, schedule, times, k, cond, lambda: draw.randn(*shape)
            )
        else:
            x_in, cond = (
                renoise(
                    x_real, schedule.alpha(times[k]), schedule.sigma(times[k]), draw.randn(*shape)
                ),
                cond_real,
            )
        with torch.set_grad_enabled(turn):
            x = (G if turn else student)(
                x_in, schedule.alpha(times[k]), schedule.sigma(times[k]), cond
            )  # (1)

        if turn:
            critic.requires_grad_(
                False
            )  # no gradient for its weights, but (8) must reach x through them
            x_t, alpha, sigma = noisy(x.detach(), draw.randint(low, high + 1))
            g, r, f, w = dm_gradient(x, x_t, alpha, sigma, cond, teacher, fake, args.cfg)
            loss_dm = dm_loss(x, g)
            loss = args.dm_weight * loss_dm
            if args.gan:
                loss_gen = gen_loss(critic(*noisy(x, gan_index()), cond, logit=True, on=on))
                loss = loss + args.gan_weight * loss_gen  # (10)
                logs |= dict(gen=loss_gen)
            loss.backward()
            norm = run.step(opt_g, args.clip)
            ema.update(run.images_stepped)
            critic.requires_grad_(True)
            logs = (
                dict(
                    dm=loss_dm,
                    grad_student=norm,
                    dm_norm=w.mean(),
                    real_gap=(x - r).square().mean(),
                    fake_gap=(x - f).square().mean(),
                )
                | logs
            )

        if not (turn and args.alternate):
            x = x.detach()
            i = draw.randint(0, N)
            x_t, alpha, sigma = noisy(x, i)
            weight = (
                teacher.native_loss_weight(alpha, sigma)
                if args.fake_weight == "native"
                else torch.ones_like(sigma)
            )
            loss = loss_fake = fake_loss(C, x, x_t, alpha, sigma, cond, weight)
            if args.gan:
                i = torch.cat(
                    [gan_index(), gan_index()]
                )  # fake and real in one batch, each with its own time and noise
                both = {key: torch.cat([cond[key], cond_real[key]]) for key in cond}
                eps = torch.cat([draw.randn_like(x), draw.randn_like(x)])
                alpha, sigma = schedule.alpha(grid[i]), schedule.sigma(grid[i])
                logit_fake, logit_real = C(
                    renoise(torch.cat([x, x_real]), alpha, sigma, eps),
                    alpha,
                    sigma,
                    both,
                    logit=True,
                    on=on,
                ).chunk(2)
                loss_cls = cls_loss(logit_fake, logit_real)
                loss = loss + args.cls_weight * loss_cls  # (10)
                logs |= dict(
                    cls=loss_cls, logit_fake=logit_fake.mean(), logit_real=logit_real.mean()
                )
            loss.backward()
            norm = run.step(opt_c, args.clip)
            logs = dict(fake=loss_fake, grad_critic=norm, mean=x.mean(), std=x.std()) | logs

        # ==== same in every script: log, pictures, checkpoint ====
        if it % args.log_every == 0:
            run.log(it, logs)
        if run.due(it, args.sample_every):
            pictures(run, teacher, ema.model, sample, sampler, it + 1)
        if run.due(it, args.eval_every):
            evaluate_run(run, teacher, ema.model, sample, sampler, it + 1, n=1000)
        if run.due(it, args.save_every):
            run.save(it, state)
        # ==== end ====

    # ==== same in every script: end ====
    run.finish(it, state)
    export(run, teacher, ema.model, sampler)
    pictures(run, teacher, ema.model, sample, sampler, args.iters)
    evaluate_run(run, teacher, ema.model, sample, sampler, args.iters, n=args.eval_n)
    # ==== end ====


if __name__ == "__main__":
    launch(main)
