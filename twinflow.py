"""TwinFlow: one-step generation by self-adversarial flows on an any-step base. Cheng, Sun, Li, Lin, ICLR 2026, arXiv 2512.05150.

One network is generator, real velocity and fake velocity. Given a second time r it answers with the mean velocity from t to r, learnt by a recursive
consistency loss of order N (RCGM), so one checkpoint samples in 1, 2, 4 or any number of passes. Negative times carry noise to the network's own
one-step samples; the difference of both velocities is the gradient of a KL divergence and corrects the one-step sample. Needs images or --image-free.

Notation: x data, z noise, t in [-T, T]: T is the noisy end of the teacher's schedule (1 for flow), t < 0 belongs to the fake field; sg[] stops
gradients; F^- is the target network, e the null condition, D = 0.01. F(x_t, t, r, c) is the mean velocity from t to r:
    x_t = |t| z + (1 - |t|) x        x_r = x_t + (r - t) F        clean estimate: xhat = x_t - |t| F                                     (1)
    time embedding = E1(|t|) + (t - r) E2(r) + [t < 0] E3(|t|)        E1: the teacher's; E2, E3 start at zero                            (2)
    v = z - x + k [Fg(x_t, t, t, c) - Fg(x_t, t, t, e)]        Fg: F^- or the frozen teacher; --image-free: Fg(e) instead of z - x       (3)
    I = sum_i (a_i - a_{i+1}) F^-(y_i, a_i, a_{i+1})        from y_0 = x_t - D v at a_0 = max(t - D, r) to a_N = r in N equal steps      (4)
    R = [(t - r) F - I] / D - v    if t - r >= D, else F - v        target = sg[F - clamp(R, -1, 1)]        (N = 0: v)                   (5)
    L_base = w(t, r) d(F, target)        w = tan((1 - |t| + |r|) pi / 2.5) + 1                                                           (6)
    d(p, q) = m / sqrt(m + c^2), c = 0.001, the root without gradient        m: mean square of p - q of one sample; --distance l2: m     (7)
    L_adv = d(F(y, -s, -s, c), z' - x')        x' = sg[one-step sample of fresh noise], y = s z' + (1 - s) x', z' fresh again            (8)
    L_rect = d(F1, sg[F1 - g])        F1 = F(x_T, T, 0, c), x' = x_T - T F1, y as above, g = clamp(F(y, -s, -s, c) - F(y, s, s, c), -1, 1)     (9)
    L = mean over the batch of (6), or (8) for adversarial rows, + mu mean over one-step rows of (9)                                    (10)
Rows of a batch take turns (--groups): e2e (t, r) = (T, 0); mul r in [0.95 t, t]; any r in [0, t]; adv t = r = -s. t, s uniform in (0, T).

Commands (bounds of the tests: energy distance 0.01 on the toy):
    python twinflow.py                                       # one checkpoint for any number of steps, embedded MNIST teacher, two CPU cores
    python twinflow.py --nfe 4                               # the same training; samples and measures with four steps
    python twinflow.py --teacher toy                         # 2-D mixture, half a minute
    torchrun --nproc_per_node=8 twinflow.py --teacher DIR    # any teacher folder, 8 GPUs

Differences from the paper:
    - k, mu, w, the clamps, D, the four equal groups and the guided v of (3) are in the official code only [C]; --flat drops w, --clamp 0 the clamps. --cfg is
      the effective scale: k = 1 - 1 / cfg if F^- guides itself (fixed point 1 / (1 - k)), cfg - 1 with --guide frozen, cfg if image-free.
    - [C] starts E2 as a copy of E1, or small, and F(x, -s, -s) reads E1(-s). Here E2 and a new E3 start at zero, so at the start every F is the teacher's
      velocity at |t| and g = 0; the factors t - r and [t < 0] keep F(x, t, t) free of both for good. R = F - v is computed as such; [C] has 0 / 0 at t = r.
      [C] can guide in an interval of times and draw them from a Beta distribution; all its configurations are as here.
    - fresh noise in (8), (9), as [C]; the paper's tutorial reuses it (biased). Groups go by place in the global batch, so any batch of at least four works.
    - teachers that are no linear flow: F = (x_t - xhat) / |t|, T = sigma / (alpha + sigma) at their noisy end, samples start at T z.
    - --lora trains adapters and, whole, the embeddings of (2), so that all networks are asked at their own t; [C] shows its LoRA one number, t - r / 2, and
      so asks its frozen teacher at t / 2 where r = t (our reading). Its LoRA of Qwen-Image has --lora 64 --lr 1e-4.
    - the presets mnist, emoji, toy, and the exported average of the student (--ema), are ours; which weights the paper samples from is not said.
"""

import math

import torch

from common import data
from common.ema import EMA
from common.errors import UserError, launch
from common.flags import Parser
from common.report import evaluate_run, export, pictures
from common.run import Run
from common.schedules import expand
from common.teachers.load import load_teacher

PAPER = dict(
    nfe=1, order=2, target_decay=0.99, weight_decay=0.0, rect_weight=0.5, clip=1.0
)  # [P] paper, but for the last two: [C] official code
PRESETS = {  # the flags of a teacher; every one can be overridden. mnist and toy: ours; in two dimensions the normalised distance and the clamps are biased
    "mnist": dict(
        PAPER,
        cfg=1.5,
        distance="barron",
        clamp=1.0,
        lr=1e-3,
        betas=(0.9, 0.99),
        batch=64,
        iters=1600,
        warmup=20,
        cooldown=0.5,
        ema=2000,
    ),
    "toy": dict(
        PAPER,
        cfg=1.0,
        distance="l2",
        clamp=0.0,
        lr=1e-3,
        betas=(0.9, 0.99),
        batch=256,
        iters=2000,
        warmup=0,
        cooldown=0.0,
        ema=0,
    ),
    # any other folder: text to image, SANA-0.6B of table 6 [P]; cfg 5, i.e. k = 0.8, distance and clamp [C]
    "default": dict(
        PAPER,
        cfg=5.0,
        distance="barron",
        clamp=1.0,
        lr=1e-4,
        betas=(0.9, 0.95),
        batch=128,
        iters=30000,
        warmup=0,
        cooldown=0.0,
        ema=0,
    ),
}
PRESETS |= {
    "toy-cond": PRESETS["toy"],
    "emoji": dict(PRESETS["mnist"], cfg=3.5, nfe=4, lr=3e-4, batch=32, iters=700),
}
GROUPS = ("e2e", "mul", "any", "adv")
DELTA = 0.01  # D of (4) and (5)


def parse_args(argv=None):
    p = Parser(__doc__)
    p.method.add_argument(
        "--order",
        type=int,
        help="N of (4): calls of the target network per sample; 0 is plain flow matching, 1 the MeanFlow limit",
    )
    p.method.add_argument(
        "--groups",
        type=int,
        nargs=4,
        default=(1, 1, 1, 1),
        metavar="n",
        help="rows of e2e, mul, any, adv in turn; 1 1 1 0: RCGM alone",
    )
    p.method.add_argument(
        "--target-decay",
        type=float,
        help="F^-: average of the weights with this decay per iteration, warmed up from 0; 0: the student itself",
    )
    p.method.add_argument(
        "--guide",
        choices=["target", "frozen"],
        default="target",
        help="Fg of (3): F^-, or the frozen teacher",
    )
    p.method.add_argument(
        "--image-free",
        action="store_true",
        help="no images: the student's own samples and the frozen teacher's velocity; add --guide frozen",
    )
    p.method.add_argument("--rect-weight", type=float, help="mu in (10)")
    p.method.add_argument("--distance", choices=["barron", "l2"], help="d of (7)")
    p.method.add_argument("--clamp", type=float, help="bound of R and g, elementwise; 0 is none")
    p.method.add_argument("--flat", action="store_true", help="w = 1 in (6)")
    p.method.add_argument(
        "--mode",
        choices=["auto", "few", "any", "mul"],
        default="auto",
        help="sampler, see `sample`; auto: few to 2 steps, any to 8, mul above",
    )
    p.method.add_argument(
        "--steps",
        help="times of the sampler's steps in units of T, falling, e.g. 0.999,0.7; default: the official grids",
    )
    args = p.parse(PRESETS, argv)
    turn, (e2e, mul, _, adv) = sum(args.groups), args.groups
    for wrong, message in (
        (
            min(args.groups) < 0 or turn == 0,
            f"--groups: expected four numbers >= 0, not all 0, found {' '.join(map(str, args.groups))}",
        ),
        (
            args.batch < turn,
            f"--batch {args.batch}: expected at least {turn}, one row for each of --groups",
        ),
        (
            not min(args.order, args.rect_weight) >= 0,
            f"--order and --rect-weight: expected numbers >= 0, found {args.order} and {args.rect_weight}",
        ),
        (not args.clamp >= 0, f"--clamp: expected a number >= 0, found {args.clamp}"),
        (
            args.rect_weight and not (e2e and adv),
            "--groups: (9) needs e2e rows and a fake velocity learnt on adv rows; add --rect-weight 0",
        ),
        (
            args.order == 0 and not (mul or adv),
            "--order 0: only mul and adv rows train, and --groups has none of them",
        ),
        (
            not 0 <= args.target_decay < 1,
            f"--target-decay: expected 0 <= decay < 1, found {args.target_decay}; for a frozen guide: --guide frozen",
        ),
        (
            args.image_free and args.guide != "frozen",
            "--image-free: the velocity comes from the frozen teacher; add --guide frozen",
        ),
        (
            args.image_free and args.data,
            f"--data {args.data}: this run would not look at images (--image-free)",
        ),
        (
            args.guide == "frozen" and args.cfg == 1 and not args.image_free,
            "--guide frozen: nothing is guided at --cfg 1",
        ),
        (
            args.guide == "target" and args.cfg <= 0.5,
            f"--cfg: expected more than 0.5 where the network guides itself, found {args.cfg}",
        ),
        (
            args.lr_fake is not None or args.lora_fake,
            "--lr-fake, --lora-fake: there is no second network to train",
        ),
    ):
        if wrong:
            raise UserError(message)
    time_grid(args.nfe, args.mode, args.steps)
    return args


# ---- networks ---------------------------------------------------------------------------------------------------------------------------
#   student F          trained, starts as the teacher: generator, real and fake velocity
#   target F^-         average of the student's weights, for (4) and, unless --guide frozen, (3)
#   teacher            frozen; asked only with --guide frozen


class Target(torch.nn.Module):
    """F^-. The decay grows from 0 (the first update copies) to `decay`: 0, 0.495, 0.620, 0.690, ... for 0.99. decay 0: the student itself."""

    def __init__(self, student, decay):
        super().__init__()
        self.decay, self.model = decay, student.copy().requires_grad_(False) if decay else student
        self.register_buffer("now", torch.zeros((), dtype=torch.float64))
        self.pairs = (list(self.model.parameters()), list(student.parameters()))

    @torch.no_grad()
    def update(self, due=True):
        if self.decay and due:
            torch._foreach_lerp_(*self.pairs, 1 - self.now.item())
            self.now += 0.5 * (1 - self.now) * (self.decay - self.now)


def velocity(net, x_t, t, r, cond):
    """F(x_t, t, r, c) [B, *shape] in the dtype of x_t, for a student or a teacher (which does not see r). t, r [B] float64; t = r < 0: the fake field."""
    if not len(x_t):
        return x_t  # a process may hold no row of a group
    s = t.abs()
    two = dict(
        r=torch.stack([r, t - r], 1), fake=torch.stack([s, (t < 0).double()], 1)
    )  # (2): each number with its factor
    xhat = net(x_t, 1 - s, s, cond | two)
    return ((x_t.double() - xhat.double()) / expand(s.clamp(min=1e-6), x_t)).to(x_t.dtype)  # (1)


# ---- helpers ----------------------------------------------------------------------------------------------------------------------------


def end_time(schedule):
    """T: the teacher's noisy end as a time of the linear path. 1 for flow, sigma_max / (1 + sigma_max) for EDM."""
    alpha, sigma = schedule.alpha(schedule.t_max), schedule.sigma(schedule.t_max)
    return float(sigma / (alpha + sigma))


def partition(batch, groups, rank=0, world=1, device="cpu"):
    """Place i of the global batch belongs to the group whose turn it is. -> rows of each group on this process [n], and their mean number over processes."""
    turn = [name for name, n in zip(GROUPS, groups) for _ in range(n)]
    names, local = [turn[i % len(turn)] for i in range(batch)], batch // world
    rows = {
        g: [i for i, name in enumerate(names[rank * local : (rank + 1) * local]) if name == g]
        for g in GROUPS
    }
    return {g: torch.tensor(rows[g], dtype=torch.long, device=device) for g in GROUPS}, {
        g: names.count(g) / world for g in GROUPS
    }


def times(u, w, rows, T):
    """t, r [B] of all groups from uniform u, w [B]; those of adv are still positive."""
    t = T * u
    r = t * w  # any
    t[rows["e2e"]], r[rows["e2e"]] = T, 0.0
    r[rows["mul"]] = t[rows["mul"]] * (1 - 0.05 * w[rows["mul"]])
    r[rows["adv"]] = t[rows["adv"]]
    return t, r


def mix(x, z, t):
    return (expand(1 - t, x) * x + expand(t, x) * z).to(x.dtype)  # (1)


def pick(cond, *rows):
    return {k: v[torch.cat(rows)] for k, v in cond.items()}


@torch.no_grad()
def one_step(net, z, cond, T):
    """One-step samples from noise z [n, *shape]."""
    t = torch.full((len(z),), T, dtype=torch.float64, device=z.device)
    return T * z - T * velocity(net, T * z, t, 0 * t, cond)


def strength(scale, guide, image_free):
    """k of (3) for an effective guidance scale, and the scale in terms of k."""
    return (
        (scale, "k")
        if image_free
        else (scale - 1, "1 + k")
        if guide == "frozen"
        else (1 - 1 / scale, "1 / (1 - k)")
    )


# ---- losses -----------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def guided(v, net, x_t, t, cond, null, k, image_free=False):
    """v of (3) from z - x. net: Fg, cond and null: [B, ...]."""
    both = {key: torch.cat([cond[key], null.get(key, cond[key])]) for key in cond}
    c, e = velocity(net, torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([t, t]), both).chunk(2)
    return (e if image_free else v) + k * (c - e)  # (3)


@torch.no_grad()
def rcgm_target(F, v, x_t, t, r, net, order, clamp):
    """Target of (5) [B, *shape]. F: the student's answer at (x_t, t, r); net(y, a, b): the target network's mean velocity from a to b."""
    if order == 0:
        return v
    start, y, I = torch.maximum(t - DELTA, r), x_t - DELTA * v, torch.zeros_like(x_t)
    for i in range(order):
        a, b = torch.lerp(start, r, i / order), torch.lerp(start, r, (i + 1) / order)
        move = (expand(a - b, y) * net(y, a, b)).to(y.dtype)
        y, I = y - move, I + move  # (4)
    gap = expand(t - r, F)
    R = torch.where(gap >= DELTA, (gap * F - I) / DELTA - v, F.double() - v)  # (5)
    return F - R.clamp(-clamp, clamp).to(F.dtype)  # (5)


def time_weight(t, r):
    return torch.tan((1 - t.abs() + r.abs()) * (math.pi / 2.5)) + 1  # (6)


def distance(p, q, kind, c=1e-3):
    """One number per sample, [B]. barron: about the root mean square, so that all samples pull with nearly the same force."""
    m = (p - q).square().flatten(1).mean(1)
    return m if kind == "l2" else m / (c * (m.detach() / (c**2 + 1e-8) + 1).sqrt())  # (7)


@torch.no_grad()
def rectification(x1, z, s, net, clamp):
    """g of (9), fake minus real velocity around one-step samples x1. net(y, t, r): the student, on twice the rows."""
    y = mix(x1, z, s)
    signed = torch.cat([-s, s])
    fake, real = net(torch.cat([y, y]), signed, signed).chunk(2)
    return (fake - real).clamp(-clamp, clamp)  # (9)


# ---- sampler ----------------------------------------------------------------------------------------------------------------------------


def time_grid(nfe, mode="auto", steps=None):
    """-> mode, falling times in units of T with the final 0. Official grids: even from 0.999 to 0.5 (2 steps: 0.7); mul: Kumaraswamy transform of even."""
    mode = mode if mode != "auto" else "few" if nfe <= 2 else "any" if nfe <= 8 else "mul"
    if steps is not None:
        t = [float(s) for s in str(steps).split(",") if s.strip().replace(".", "", 1).isdigit()]
        if len(t) != nfe or t != sorted(set(t), reverse=True) or not all(0 < s <= 1 for s in t):
            raise UserError(
                f"--steps {steps}: expected {nfe} falling times in (0, 1] (--nfe {nfe})"
            )
        return mode, [*t, 0.0]
    if mode == "mul":
        u = torch.linspace(0.001, 1, nfe + 1, dtype=torch.float64)[:-1]
        u = (1 - (1 - u**1.17) ** 0.8) ** 1.1
    else:
        u = torch.linspace(0.001, 0.3 if nfe == 2 else 0.5, nfe, dtype=torch.float64)
    return mode, [*(1 - u).tolist(), 0.0]


@torch.no_grad()
def sample(student, z, cond, nfe, noise, mode="auto", steps=None):
    """z [B, *shape] unit noise -> x [B, *shape]. few: jump to the clean end, add fresh noise(); any: jump to the next time, deterministic; mul: as the
    teacher, along the instantaneous velocity."""
    mode, grid = time_grid(nfe, mode, steps)
    T = end_time(student.schedule)
    x = T * z.double()
    for t, after in zip(grid[:-1], grid[1:]):
        t, after = (
            torch.full((len(z),), T * s, dtype=torch.float64, device=z.device) for s in (t, after)
        )
        F = velocity(
            student, x.to(z.dtype), t, dict(few=0 * t, any=after, mul=t)[mode], cond
        ).double()
        xhat, zhat = x - expand(t, x) * F, x + expand(1 - t, x) * F
        x = mix(xhat, noise().double() if mode == "few" and after[0] > 0 else zhat, after)
    return x.to(z.dtype)


def main():
    args = parse_args()
    networks = (
        1,
        0,
        int(args.target_decay > 0),
    )  # students, critics, averages: for the estimate of memory
    # ==== same in every script: setup ====
    run = Run("twinflow", args)
    teacher = load_teacher(args.teacher, run.device, run.dtype, **run.teacher_kwargs(*networks))
    schedule, shape = teacher.schedule, teacher.shape
    # ==== end ====
    T, clamp = end_time(schedule), args.clamp or math.inf
    k, relation = strength(args.cfg, args.guide, args.image_free)
    places = [
        partition(
            args.batch, args.groups, run.rank * args.accumulate + i, run.data_shard[1], run.device
        )
        for i in range(args.accumulate)
    ]
    share = places[0][1]
    mean = lambda a, g: (
        a[rows[g]].flatten(1).mean(1).sum() / max(share[g], 1e-9)
    )  # averaged over processes: the mean over the global batch
    kept = [
        g for g in GROUPS if share[g] and (args.order or g in ("mul", "adv"))
    ]  # the base loss of order 0 is flow matching, for these only
    images = None if args.image_free else data.load_images(args.data, teacher, run.print)
    torch.manual_seed(args.seed)  # the new embeddings start equal on all processes
    student = teacher.copy(args.lora).extend("r", "fake")
    target, ema = Target(student, args.target_decay), EMA(student, args.ema, args.ema_cpu)
    guide = teacher if args.guide == "frozen" else target.model
    if args.grad_checkpoint:
        student.checkpoint_activations()
    G = run.train(student)
    opt_g = torch.optim.AdamW(
        student.parameters(),
        lr=args.lr,
        betas=args.betas,
        weight_decay=args.weight_decay,
        fused=True,
    )
    sampler = dict(mode=args.mode) | (dict(steps=args.steps) if args.steps else {})
    mode, grid = time_grid(args.nfe, **sampler)
    e2e, mul, anyr, adv = (
        n / sum(args.groups) for n in args.groups
    )  # one pass = one forward of the network on the whole batch; a backward counts two
    passes = (
        3
        + args.order * (1 - adv)
        + (1 if args.image_free else adv)
        + 2 * (mul + anyr) * bool(k or args.image_free)
        + 2 * e2e * bool(args.rect_weight)
    )
    run.print_summary(
        student=student,
        target=f"decay {args.target_decay:g}" if args.target_decay else "the student itself",
        teacher=teacher,
        images=images,
        guidance=f"k = {k:.4g} by the {args.guide} network: effective scale {relation} = {args.cfg:g}",
        T=f"{T:.4f}",
        steps=f"{mode}: " + ", ".join(f"{T * t:.4f}" for t in grid),
        groups=", ".join(f"{g} {share[g] * run.data_shard[1]:g}" for g in GROUPS),
        passes_per_iteration=f"{passes:.2f}",
    )

    # ==== same in every script: resume ====
    state = dict(student=student, opt_g=opt_g, ema=ema) | dict(target=target)
    first = run.resume(state)
    it = first - 1
    # ==== end ====

    for it in run.loop(first, args.iters):
        rows = places[run.microstep][0]
        base, inner = (
            torch.cat([rows[g] for g in ("e2e", "mul", "any")]),
            torch.cat([rows["mul"], rows["any"]]),
        )
        draw = run.draw(it)
        run.set_rates(it, (opt_g, args.lr))
        t, r = times(draw.rand(), draw.rand(), rows, T)
        z0 = draw.randn(*shape)
        if images:
            pixels, labels = images.batch(it, args.batch, args.seed, *run.data_shard)
            x, cond = teacher.encode_images(pixels.to(run.device)).clone(), teacher.encode(labels)
            x[rows["adv"]] = one_step(
                student, z0[rows["adv"]], pick(cond, rows["adv"]), T
            )  # x' of (8)
        else:
            cond = teacher.encode(draw.randint(0, max(teacher.classes, 1)))
            x = one_step(student, z0, cond, T)
        z = draw.randn(*shape)  # not z0, which would bias (8)
        x_t, v = mix(x, z, t), z - x
        t[rows["adv"]], r[rows["adv"]] = -t[rows["adv"]], -r[rows["adv"]]
        F = velocity(G, x_t, t, r, cond)
        target.update(
            run.microstep == 0
        )  # before the targets are asked for, so the first iteration's F^- is the student

        goal = (
            v.clone()
        )  # that of adv is v as it is: (8); e2e, at t = T, has no guidance of its own
        if k or args.image_free:
            goal[inner] = guided(
                v[inner],
                guide,
                x_t[inner],
                t[inner],
                pick(cond, inner),
                teacher.null(len(inner)),
                k,
                args.image_free,
            )
        ask = lambda y, a, b: velocity(target.model, y, a, b, pick(cond, base))
        goal[base] = rcgm_target(
            F[base], goal[base], x_t[base], t[base], r[base], ask, args.order, clamp
        )
        weight = torch.ones_like(t) if args.flat else time_weight(t, r)
        weight[rows["adv"]] = 1.0
        d = weight * distance(F, goal, args.distance)  # (6), (8)
        loss = sum(d[rows[g]].sum() for g in kept) / sum(share[g] for g in kept)
        logs = {g: mean(d[:, None], g) for g in kept} | dict(
            fm=mean((F.detach() - v).square(), "mul")
        )
        x1 = x_t - T * F.detach()  # in the rows of e2e: one-step samples
        if args.rect_weight:
            e2e, ask = (
                rows["e2e"],
                lambda y, t, r: velocity(student, y, t, r, pick(cond, rows["e2e"], rows["e2e"])),
            )
            g = rectification(x1[e2e], draw.randn(*shape)[e2e], T * draw.rand()[e2e], ask, clamp)
            rect = (
                distance(F[e2e], (F[e2e] - g).detach(), args.distance).sum() / share["e2e"]
            )  # (9)
            loss = loss + args.rect_weight * rect  # (10)
            logs |= dict(rect=rect, twin_gap=g.square().flatten(1).mean(1).sum() / share["e2e"])
        loss.backward()
        logs = (
            dict(loss=loss, grad=run.step(opt_g, args.clip))
            | logs
            | dict(mean=mean(x1, "e2e"), square=mean(x1.square(), "e2e"))
        )
        ema.update(run.images_stepped)

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
