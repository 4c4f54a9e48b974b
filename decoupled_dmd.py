"""Decoupled DMD: CFG augmentation as the spear, distribution matching as the shield. Liu et al., ICLR 2026, arXiv 2511.22677.

DMD with a guided teacher moves the student along r - f, where r is the guided and f the critic's estimate. Exactly, r - f = (c - f) + (w - 1)(c - u):
distribution matching (DM), which keeps the student close to the teacher, and CFG augmentation (CA), which makes few steps look sharp and has no fixed
point of its own. Here each term looks at its own noisy copy of the sample: CA only at levels cleaner than the student's input, DM at all levels.

Notation: x_t = alpha_t x + sigma_t eps, more noise with larger t (the paper's clock runs the other way); sg[] stops gradients; y is a label or prompt.
    x = G(x_in, t_k, y)                     k ~ U{0..n-1}, one draw for the whole batch; k = 0 takes x_in = pure noise                   (1)
    x_in = alpha_k xhat + sigma_k eps       the student's own sampler run k steps, without gradient; eps fresh, or the one xhat implies  (2)
    c, u = the teacher's estimates of x from x_t, with y and without it;    f = the critic's, with y                                   (3)
    g_ca = (w - 1)(u - c) / N_ca            at t = t_ca                                                                                (4)
    g_dm = (f - c) / N_dm                   at t = t_dm                                                                                (5)
    N_ca = N_dm = max(mean|x - c|, floor)   mean over the pixels of each sample, c at the term's own t                                  (6)
    hybrid: t_ca < t_k, t_dm any    full: both any    constrained: both < t_k    shared: t_ca = t_dm any, one noisy copy: that is DMD2  (7)
    L = 1/2 mean (x - sg[x - g_ca - v_dm g_dm])^2        so that dL / dx = (g_ca + v_dm g_dm) / numel(x)                    (8)
    L_fake = mean lambda_t (f(x_t) - sg[x])^2        the critic learns the student's samples at all levels, whatever (7) is            (9)
    L_mom = mean 1/2 [(s2 + (m - M)^2) / V - 1 - log(s2 / V)]     m, s2: mean and variance of each x; M, V: of real images             (10)
    L_gen = mean softplus(-l(x)),    l(x) = head(critic features of x_t)                                                              (11)
    L_cls = mean softplus(l(sg[x])) + mean softplus(-l(x_real))                                                                       (12)
    student: L + v_mom L_mom + w_G L_gen        critic and head: L_fake + w_D L_cls                                                   (13)

Commands (results and times: README and docs/RESULTS.md):
    python decoupled_dmd.py                                       # one step, embedded MNIST teacher, two CPU cores, minutes
    python decoupled_dmd.py --nfe 4 --schedule shared             # four steps of plain DMD, to compare with --nfe 4
    python decoupled_dmd.py --teacher toy                         # 2-D mixture, under a minute
    python decoupled_dmd.py --teacher toy-cond --regulariser none --iters 600   # CA alone: the student runs away from the data
    torchrun --nproc_per_node=8 decoupled_dmd.py --teacher DIR    # any teacher folder, 8 GPUs
Toy bounds: `toy` (w = 1, DM alone): energy distance < 0.01, every mode > 5 %. `toy-cond` (w = 2): mean radius < 2; with --regulariser none > 20.

Differences from the paper:
    - no training code of the authors is public. The normalisers (6) are not in the printed algorithm (--normaliser none); two reproductions that follow the
      author's snippet have them, with the floors 1e-8 and 0.1. The 1/2 of (8) is DMD2's; without it the gradient is twice as large, which AdamW ignores.
    - --schedule shared takes DMD2's normaliser, mean|x - r| with the guided r and no floor, and is dmd2.py then; --normaliser own keeps (6).
    - levels are the N = 1000 of the teacher's grid. Flow teachers: drawn before the time shift, as the author says (--levels unshifted: CDM's rule), and the
      final sigma is held in --t-range (CDM). Others draw from that share of the grid, as DMD2 does. Neither restriction is in the paper.
    - the paper says only "backward simulation": --rollout stochastic (default) is DMD2's sampler, deterministic the one Z-Image-Turbo is used with.
    - the weight of (10) is not in the paper. Its SDXL rows have DMD2's GAN on: --gan. As the only regulariser: --gan --regulariser none; (9) stays (DMD2).
    - the presets mnist, emoji and toy are ours, as in dmd2.py, with --shift (below 1: less noisy levels), the weight average and the cooldown.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import data
from common.ema import EMA
from common.errors import UserError, launch
from common.flags import Parser
from common.report import evaluate_run, export, pictures
from common.run import Run
from common.schedules import eps_from_x0, expand
from common.teachers.load import load_teacher

PRESETS = {  # the flags of a teacher; every one can be overridden. Sources: [P] paper, [C] DMD2's code, which [P] builds on, ours = measured here, docs/RESULTS.md
    "mnist": dict(
        cfg=1.5,
        nfe=1,
        lr=1e-3,
        lr_fake=1e-3,
        betas=(0.5, 0.99),
        ratio=3,
        floor=0.05,
        shift=0.3,
        batch=64,
        iters=1200,
        warmup=20,
        cooldown=0.5,
        ema=2000,
        moments=(-0.737, 0.374),
        gan_weight=0.03,
        cls_weight=0.1,
    ),
    "toy": dict(
        cfg=1.0,
        nfe=1,
        lr=5e-4,
        lr_fake=1e-3,
        betas=(0.9, 0.999),
        ratio=5,
        floor=0.05,
        shift=1.0,
        batch=256,
        iters=3000,
        warmup=0,
        cooldown=0.5,
        ema=0,
        gan_weight=3e-3,
        cls_weight=1e-2,
    ),
    # any other folder: SDXL in four steps [C: guidance 8, lr, ratio, batch 128, 20K iterations, warm-up 500, GAN weights; P: hybrid, moments]
    "default": dict(
        cfg=8.0,
        nfe=4,
        lr=5e-7,
        lr_fake=5e-7,
        betas=(0.9, 0.999),
        ratio=5,
        floor=1e-8,
        shift=1.0,
        batch=128,
        iters=20000,
        warmup=500,
        cooldown=0.0,
        ema=0,
        moments=(0.075, 0.81),
        gan_weight=5e-3,
        cls_weight=1e-2,
    ),
}
PRESETS |= {
    "toy-cond": PRESETS["toy"] | dict(cfg=2.0, nfe=4),
    "emoji": PRESETS["mnist"]
    | dict(cfg=3.5, nfe=4, shift=1.0, lr=1e-4, lr_fake=1e-4, batch=32, iters=600),
}
N = 1000  # noise levels of the schedule's own grid over which all times are drawn


def parse_args(argv=None):
    p = Parser(__doc__)
    p.method.add_argument(
        "--steps",
        help="grid indices of the student's steps, e.g. 999,749,499,249; default: the rule of `step_indices`",
    )
    p.method.add_argument(
        "--rollout",
        choices=["stochastic", "deterministic"],
        default="stochastic",
        help="eps of (2), in training and in sampling",
    )
    p.method.add_argument(
        "--ratio",
        type=int,
        help="critic steps per student step; without a critic every iteration is a student step",
    )
    p.method.add_argument(
        "--schedule",
        choices=["hybrid", "full", "constrained", "shared"],
        default="hybrid",
        help="noise levels of the two terms, (7)",
    )
    p.method.add_argument(
        "--normaliser",
        choices=["own", "guided", "none"],
        help="(6), DMD2's, or none; default: own, with --schedule shared guided",
    )
    p.method.add_argument("--floor", type=float, help="of (6)")
    p.method.add_argument("--dm-weight", type=float, default=1.0, help="v_dm in (8)")
    p.method.add_argument(
        "--regulariser",
        choices=["dm", "moments", "none"],
        default="dm",
        help="what holds CA back: (5), (10), or nothing but --gan",
    )
    p.method.add_argument("--moments", type=float, nargs=2, help="M and V of (10): of real samples")
    p.method.add_argument(
        "--moments-weight", type=float, default=1.0, help="v_mom in (13); not in the paper"
    )
    p.method.add_argument(
        "--gan",
        action="store_true",
        help="add (11) and (12); needs images: the teacher's own or --data",
    )
    p.method.add_argument("--gan-weight", type=float, help="w_G in (13)")
    p.method.add_argument("--cls-weight", type=float, help="w_D in (13)")
    p.method.add_argument(
        "--fake-weight",
        choices=["native", "x0"],
        default="native",
        help="lambda_t in (9): the teacher's own loss, or 1",
    )
    p.method.add_argument(
        "--levels",
        choices=["shifted", "unshifted"],
        default="shifted",
        help="flow teachers with a time shift: shift the drawn levels too?",
    )
    p.method.add_argument(
        "--shift",
        type=float,
        help="multiplies sigma / alpha of all levels drawn in (4), (5), (9), (11), (12); below 1: less noise; 1 in the paper",
    )
    p.method.add_argument(
        "--t-range",
        type=float,
        nargs=2,
        default=(0.02, 0.98),
        help="of (7): share of the grid; flow teachers: bounds of the final sigma",
    )
    args = p.parse(PRESETS, argv)
    args.normaliser = args.normaliser or ("guided" if args.schedule == "shared" else "own")
    is_dm = args.regulariser == "dm"
    for fine, mistake in (
        (args.ratio >= 1, f"--ratio: expected at least 1, found {args.ratio}"),
        (
            0 <= args.t_range[0] <= args.t_range[1] <= 1,
            f"--t-range: expected 0 <= low <= high <= 1, found {args.t_range[0]} {args.t_range[1]}",
        ),
        (
            0 < args.shift < math.inf and 0 < args.floor < math.inf,
            f"--shift, --floor: expected numbers > 0, found {args.shift} {args.floor}",
        ),
        (
            args.normaliser != "guided" or args.schedule == "shared",
            "--normaliser guided: divides both terms at one noisy copy: add --schedule shared",
        ),
        (
            is_dm or args.schedule in ("hybrid", "full"),
            f"--schedule {args.schedule}: says where DM looks, and --regulariser {args.regulariser} has none",
        ),
        (
            is_dm or args.cfg != 1,
            f"--regulariser {args.regulariser}: with --cfg 1 neither term of the gradient is left; give another --cfg",
        ),
        (
            args.regulariser != "moments" or args.moments,
            "--regulariser moments: add --moments M V; means nothing for points, which have no pixels",
        ),
        (
            not args.moments or 0 < args.moments[1] < math.inf,
            f"--moments: expected a mean and a variance > 0, found {args.moments}",
        ),
        (
            not args.data or args.gan,
            f"--data {args.data}: this run would not look at images; add --gan",
        ),
    ):
        if not fine:
            raise UserError(mistake)
    return args


# ---- networks ---------------------------------------------------------------------------------------------------------------------------
#   teacher            frozen                     c and u
#   student G          trained, starts as the teacher
#   critic ("fake")    trained, starts as the teacher, its GAN head from scratch; not trained with --regulariser moments or none, unless there is --gan


class Critic(nn.Module):
    """f and DMD2's GAN head in one module, for one DDP wrapper. h: a feature map [1, C, H, W], halved down to 4x4 or less, or [1, C] for points."""

    def __init__(self, fake, h=None):
        super().__init__()
        self.fake, (c, side) = (
            fake,
            (1, 0) if h is None else (h.shape[1], min(h.shape[2:], default=0)),
        )
        norm = lambda: [
            nn.GroupNorm(math.gcd(32, max(c // 4, 1)), c),
            nn.SiLU(),
        ]  # 32 groups, fewer if they had under 4 channels: 1x1 maps would vanish
        layers = [] if side else [nn.Linear(c, c), nn.SiLU(), nn.Linear(c, 1)]
        while side > 4:
            layers += [nn.Conv2d(c, c, 4, 2, 1), *norm()]
            side = (side - 2) // 2 + 1
        layers += [nn.Conv2d(c, c, side, side, 0), *norm(), nn.Conv2d(c, 1, 1)] if side else []
        self.head = nn.Sequential(*layers, nn.Flatten(1)) if h is not None else None

    def forward(self, x_t, alpha, sigma, cond, logit=False):
        h = self.fake(x_t, alpha, sigma, cond, features=logit)
        return self.head(h[-1].float()) if logit else h  # logit: [B, 1]


# ---- helpers ----------------------------------------------------------------------------------------------------------------------------


def step_indices(n, steps=None):
    """Grid indices of an n-step student, falling: DMD2's rule list(range(N-1, 0, -(N // n))), of which n are kept. n=4: 999, 749, 499, 249."""
    if n >= N:
        raise UserError(
            f"--nfe {n}: expected at most {N - 1}, the student's steps are levels of a grid of {N}"
        )
    if steps is None:
        return list(range(N - 1, 0, -(N // n)))[:n]
    index = [int(s) for s in str(steps).split(",") if s.isdecimal()]
    if (
        ",".join(map(str, index)) != str(steps)
        or len(index) != n
        or index != sorted(set(index), reverse=True)
        or not all(0 <= i < N for i in index)
    ):
        raise UserError(f"--steps {steps}: expected {n} falling indices in 0..{N - 1} (--nfe {n})")
    return index


def level_table(schedule, index, t_range, shift=1.0, levels="shifted"):
    """grid [N], rising: the levels of (9); table [N]: those of (7), of which low..high are drawn; caps: for each step of the student, how many levels of
    the table have less noise than its input. The noisiest step of all takes every level."""
    times, flow = schedule.grid(N), schedule.config["name"] == "flow"
    if levels == "unshifted" and not (flow and schedule.shift != 1):
        raise UserError(
            "--levels unshifted: means something only for a flow teacher with a time shift"
        )
    snr, shift = (
        lambda t: (schedule.alpha(t) / schedule.sigma(t)) ** 2,
        shift / schedule.shift if levels == "unshifted" else shift,
    )
    grid = times if shift == 1 else schedule.t_from_snr(snr(times) / shift**2)
    caps = [N if i == N - 1 else int((snr(grid) > snr(times[i])).sum()) for i in index]
    if (
        flow
    ):  # the final sigma is held: a restricted draw would be far from the bound once it is shifted
        return grid, grid.clamp(*t_range), 0, N - 1, caps
    return grid, grid, int(t_range[0] * N), min(int(t_range[1] * N), N - 1), caps


def draw_levels(kind, integers, low, high, cap):
    """Indices t_dm, t_ca [B] into the table. integers(a, b): uniform in a..b-1; cap: of the student's step."""  # (7)
    top, narrow = (
        high + 1,
        max(min(cap, high + 1), low + 1),
    )  # never empty: a step below the lowest level gets that one
    t_dm = integers(low, narrow if kind == "constrained" else top)
    return t_dm, t_dm if kind == "shared" else integers(low, top if kind == "full" else narrow)


def renoise(x, alpha, sigma, eps):
    """x_t = alpha x + sigma eps in the dtype of x; alpha, sigma: 0-d or [B], float64."""
    return (expand(alpha, x) * x + expand(sigma, x) * eps).to(x.dtype)


def backward_simulation(student, schedule, times, k, cond, z, noise, rollout="stochastic"):
    """Input of step k: the student's own sampler, run k steps from z [B, *shape] without gradient, exactly as in `sample`. noise(): fresh [B, *shape]."""
    x_in = (
        z if schedule.unit_norm else (schedule.sigma(times[0]) * z).to(z.dtype)
    )  # pure noise: z for VP (unit norm at every t) and flow, sigma_max z for EDM
    with torch.no_grad():
        for j in range(k):
            alpha, sigma = schedule.alpha(times[j]), schedule.sigma(times[j])
            xhat = student(x_in, alpha, sigma, cond)
            eps = noise() if rollout == "stochastic" else eps_from_x0(xhat, x_in, alpha, sigma)
            x_in = renoise(
                xhat, schedule.alpha(times[j + 1]), schedule.sigma(times[j + 1]), eps
            )  # (2)
    return x_in


# ---- losses -----------------------------------------------------------------------------------------------------------------------------


def gradients(x, ca, dm, cond, teacher, fake, w, normaliser="own", floor=1e-8):
    """g_ca, g_dm, N_ca [B], N_dm [B], without graph. x: student output [B, *shape]; ca, dm: its noisy copies (x_t, alpha [B], sigma [B]); None: that
    term is left out, its g is 0; the same object: one copy for both, asked once."""
    size = lambda r: (x - r).abs().flatten(1).mean(1)  # one number per sample
    one = lambda n: n.where(n != 0, math.inf).view(
        -1, *[1] * (x.ndim - 1)
    )  # 0 / 0 is 0, but a nan stays and is counted
    with torch.no_grad():
        parts = ([(*ca, cond), (*ca, cond | teacher.null(len(x)))] if ca else []) + (
            [(*dm, cond)] if dm and dm is not ca else []
        )  # the teacher answers all in one pass
        x_t, alpha, sigma = (torch.cat([p[i] for p in parts]) for i in range(3))
        answers = teacher(
            x_t, alpha, sigma, {k: torch.cat([p[3][k] for p in parts]) for k in cond}
        ).chunk(len(parts))  # (3)
        c_ca, u = answers[:2] if ca else (x, x)
        c_dm = c_ca if dm is ca else answers[-1] if dm else x
        f = fake(*dm, cond) if dm else x
        n_ca, n_dm = size(c_ca).clamp(min=floor), size(c_dm).clamp(min=floor)  # (6)
        if normaliser != "own":
            n_ca = n_dm = (
                size(u + w * (c_dm - u) if ca else c_dm)
                if normaliser == "guided"
                else torch.ones_like(n_dm)
            )
        g_ca = (w - 1) * (u - c_ca) / one(n_ca)  # (4)
        g_dm = (f - c_dm) / one(n_dm)  # (5)
    return g_ca, g_dm, n_ca, n_dm


def generator_loss(x, g):
    return 0.5 * F.mse_loss(x, (x - g).detach())  # (8)


def fake_loss(critic, x, x_t, alpha, sigma, cond, weight):
    """Denoising loss of the critic on detached student samples; weight: lambda_t [B]."""
    error = critic(x_t, alpha, sigma, cond) - x.detach()
    return (expand(weight, x).to(x.dtype) * error.square()).mean()  # (9)


def moments_loss(x, mean, var):
    m, s2 = x.flatten(1).mean(1), x.flatten(1).var(1, correction=0)
    return 0.5 * ((s2 + (m - mean) ** 2) / var - 1 - (s2 / var).log()).mean()  # (10)


def gen_loss(logit_fake):
    return F.softplus(-logit_fake).mean()  # (11)


def cls_loss(logit_fake, logit_real):
    return F.softplus(logit_fake).mean() + F.softplus(-logit_real).mean()  # (12)


# ---- sampler ----------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(student, z, cond, nfe, noise, steps=None, rollout="stochastic"):
    """n-step sampler: denoise, go to the next level with fresh or with the implied noise, repeat. z [B, *shape] unit noise; noise(): more. -> x [B, *shape]."""
    schedule = student.schedule
    times = schedule.grid(N)[step_indices(nfe, steps)]
    x_in = backward_simulation(student, schedule, times, nfe - 1, cond, z, noise, rollout)
    return student(x_in, schedule.alpha(times[-1]), schedule.sigma(times[-1]), cond)


def main():
    args, networks = parse_args(), (1, 1)  # students, critics: for the estimate of memory
    # ==== same in every script: setup ====
    run = Run("decoupled_dmd", args)
    teacher = load_teacher(args.teacher, run.device, run.dtype, **run.teacher_kwargs(*networks))
    schedule, shape = teacher.schedule, teacher.shape
    # ==== end ====
    index = step_indices(args.nfe, args.steps)
    times = schedule.grid(N)[index]
    grid, table, low, high, caps = level_table(
        schedule, index, args.t_range, args.shift, args.levels
    )
    grid, table = grid.to(run.device), table.to(run.device)  # indexed by draws
    use_ca, use_dm, use_critic = (
        args.cfg != 1,
        args.regulariser == "dm",
        args.regulariser == "dm" or args.gan,
    )  # w = 1: (4) is 0 and u is not asked for
    ratio = args.ratio if use_critic else 1
    student, fake, h = teacher.copy(args.lora), teacher.copy(args.lora_fake), None
    images = data.load_images(args.data, teacher, run.print) if args.gan else None
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
    critic = run.to_device(Critic(fake, h))
    for model in (student, fake) if args.grad_checkpoint else ():
        model.checkpoint_activations()
    G, C = run.train(student), run.train(critic) if use_critic else critic
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
    sampler = dict(steps=",".join(map(str, index)), rollout=args.rollout)
    # one pass = one forward of the network; a backward counts two. The student's forward is shared by both turns. Without the GAN's part.
    per_student = 2 + 2 * use_ca + use_dm * (1 if args.schedule == "shared" and use_ca else 2)
    passes = (args.nfe - 1) / 2 + 1 + 3 * use_critic + per_student / ratio
    run.print_summary(
        student=student,
        critic=critic if use_critic else "not trained",
        teacher=teacher,
        images=images,
        steps=index,
        times=[round(float(t), 4) for t in times],
        levels_of_CA=[
            f"{low}..{max(min(cap, high + 1), low + 1) - 1}"
            if args.schedule in ("hybrid", "constrained")
            else f"{low}..{high}"
            for cap in caps
        ],
        passes_per_iteration=f"{passes:.2f}" + " and those of the GAN head" * args.gan,
        graph=dict(student=1 + args.gan),
    )

    # ==== same in every script: resume ====
    state = dict(student=student, opt_g=opt_g, ema=ema) | dict(critic=critic, opt_c=opt_c)
    first = run.resume(state)
    it = first - 1
    # ==== end ====

    for it in run.loop(first, args.iters):
        draw = run.draw(it)
        run.set_rates(it, (opt_g, args.lr), (opt_c, args.lr_fake))
        cond = teacher.encode(draw.randint(0, max(teacher.classes, 1)))
        if args.gan:
            pixels, labels = images.batch(it, args.batch, args.seed, *run.data_shard)
            x_real, cond_real = teacher.encode_images(pixels.to(run.device)), teacher.encode(labels)
        noisy = lambda x, t: (
            renoise(x, schedule.alpha(t), schedule.sigma(t), draw.randn_like(x)),
            schedule.alpha(t),
            schedule.sigma(t),
        )
        turn = it % ratio == 0  # of the student; iteration 0 is one
        logs = {}

        # the student's sample: one forward pass serves both turns
        k = draw.shared_randint(0, args.nfe)
        x_in = backward_simulation(
            student,
            schedule,
            times,
            k,
            cond,
            draw.randn(*shape),
            lambda: draw.randn(*shape),
            args.rollout,
        )
        with torch.set_grad_enabled(turn):
            x = (G if turn else student)(
                x_in, schedule.alpha(times[k]), schedule.sigma(times[k]), cond
            )  # (1)

        if turn:
            critic.requires_grad_(
                False
            )  # no gradient for its weights, but (11) must reach x through them
            t_dm, t_ca = draw_levels(args.schedule, draw.randint, low, high, caps[k])
            dm = noisy(x.detach(), table[t_dm]) if use_dm else None
            ca = (
                (dm if args.schedule == "shared" else noisy(x.detach(), table[t_ca]))
                if use_ca
                else None
            )
            g_ca, g_dm, n_ca, n_dm = gradients(
                x, ca, dm, cond, teacher, fake, args.cfg, args.normaliser, args.floor
            )
            loss = generator_loss(x, g_ca + args.dm_weight * g_dm)
            logs = dict(
                ca=0.5 * g_ca.square().mean(),
                dm=0.5 * g_dm.square().mean(),
                norm_ca=n_ca.mean(),
                norm_dm=n_dm.mean(),
                cos=F.cosine_similarity(g_ca.flatten(1), g_dm.flatten(1)).mean(),
            )
            if args.regulariser == "moments":
                loss_mom = moments_loss(x, *args.moments)
                loss, logs["moments"] = loss + args.moments_weight * loss_mom, loss_mom  # (13)
            if args.gan:
                loss_gen = gen_loss(critic(*noisy(x, grid[draw.randint(0, N)]), cond, logit=True))
                loss, logs["gen"] = loss + args.gan_weight * loss_gen, loss_gen  # (13)
            loss.backward()
            logs |= dict(grad_student=run.step(opt_g, args.clip))
            ema.update(run.images_stepped)
            critic.requires_grad_(True)

        if use_critic:
            x_t, alpha, sigma = noisy(x := x.detach(), grid[draw.randint(0, N)])
            weight = (
                teacher.native_loss_weight(alpha, sigma)
                if args.fake_weight == "native"
                else torch.ones_like(sigma)
            )
            loss = loss_fake = fake_loss(C, x, x_t, alpha, sigma, cond, weight)
            if args.gan:
                t = [
                    grid[draw.randint(0, N)] for _ in range(2)
                ]  # fake and real in one batch, each with its own time and noise
                both = noisy(x, t[0]), noisy(x_real, t[1])
                cond = {key: torch.cat([cond[key], cond_real[key]]) for key in cond}
                logit_fake, logit_real = C(
                    *(torch.cat(v) for v in zip(*both)), cond, logit=True
                ).chunk(2)
                loss_cls = cls_loss(logit_fake, logit_real)
                loss = loss + args.cls_weight * loss_cls  # (13)
                logs |= dict(
                    cls=loss_cls, logit_fake=logit_fake.mean(), logit_real=logit_real.mean()
                )
            loss.backward()
            logs |= dict(fake=loss_fake, grad_critic=run.step(opt_c, args.clip))
        logs |= dict(mean=x.mean(), std=x.std())

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
