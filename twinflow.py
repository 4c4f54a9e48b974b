"""TwinFlow: One-step Generation by Self-adversarial Flows. Cheng et al., ICLR 2026, 2512.05150.

One network is generator, real velocity and fake velocity. With a second time r as an input it
gives the mean velocity from t to r, which is learned by a recursive consistency loss of order N
(RCGM), so one checkpoint samples in 1, 2, 4 or any number of passes. Negative times lead to noise
on the network's own one-step samples. The difference of the fake and the real velocity is the
gradient of a KL divergence and corrects the one-step sample. Needs images, or --image-free.

Notation: x data, z noise, t in [-T, T]: T is the noisy end of the teacher's schedule (1 for flow),
t < 0 belongs to the fake velocity; c is the label or prompt, e the null condition; F^- is the
target network; D = 0.01; sg[] stops gradients. F(x_t, t, r, c) is the mean velocity from t to r.

    x_t = |t| z + (1 - |t|) x                xhat = x_t - |t| F                                 (1)
    time embedding = E1(|t|) + (t - r) E2(r) + [t < 0] E3(|t|)
                                             E1: the teacher's; E2, E3 start at zero            (2)
    v = z - x + k (Fg(x_t, t, t, c) - Fg(x_t, t, t, e))
                                             Fg: F^- or the frozen teacher                      (3)
    I = sum_i (a_i - a_{i+1}) F^-(y_i, a_i, a_{i+1})
                                             N equal steps from t - D (or r, if later) to r;
                                             y_0 = x_t - D v, y_{i+1} = y_i less the i-th term  (4)
    target = sg[F - clamp(R, -1, 1)]         R = ((t - r) F - I) / D - v,                       (5)
                                             R = F - v where t - r < D
    L_base = w(t, r) d(F, target)            w = tan((1 - |t| + |r|) pi / 2.5) + 1              (6)
    d(p, q) = m / sg[sqrt(m / 1.01 + 0.001^2)] m: mean square of p - q over one sample           (7)
    L_adv = d(F(y, -s, -s, c), z' - x')      y = s z' + (1 - s) x', x' one-step samples         (8)
    L_rect = d(F1, sg[F1 - clamp(F(y, -s, -s, c) - F(y, s, s, c), -1, 1)])
                                             F1 = F(x_T, T, 0, c), y as in (8) from x_T - T F1  (9)
    L = mean of (6), or (8) in adv rows, + mu mean of (9) over e2e rows                        (10)

The rows of a batch belong to four groups in turn (--groups): e2e, one step, (t, r) = (T, 0), not
guided in (3); mul, many steps, r in [0.95 t, t]; any, r in [0, t]; adv, adversarial, t = r = -s.
t and s are uniform in (0, T).

Usage:
    python twinflow.py                                       # any number of steps, MNIST, on a CPU
    python twinflow.py --nfe 4                               # the same training, 4-step samples
    python twinflow.py --teacher toy                         # 2-D mixture, half a minute
    torchrun --nproc_per_node=8 twinflow.py --teacher DIR    # any teacher folder, 8 GPUs

Differences from the paper, variants and results: docs/twinflow.md.
"""

import training.interrupt  # noqa: F401  # isort: skip

import math

import torch

from common.errors import launch, require
from common.model import put_rows, take_rows
from common.schedules import add_noise, expand
from common.teachers.load import load_teacher
from common.teachers.students import start_from
from data.images import load_images
from training.ema import EMA
from training.flags import Parser
from training.optim import adamw
from training.report import Report
from training.run import Run

GROUPS = ("e2e", "mul", "any", "adv")
DELTA = 0.01  # D of (4) and (5)

# Presets: the flags for a kind of teacher, unless the command line gives others.
# [P] paper, [C] official code, [A] answer of an author, [O] ours, measured in docs/RESULTS.md.
# `source` is printed at the start; docs/teachers.md has all of them in a table.
SANA = dict(  # text to image, SANA-0.6B of table 6 [P]
    cfg=5.0,  # [C] k = 0.8
    nfe=1,
    order=2,
    target_decay=0.99,
    distance="barron",  # [C]
    clamp=1.0,  # [C]
    rect_weight=0.5,  # [C] of SD3.5; of OpenUni, on SANA's network, 0.75
    lr=1e-4,
    betas=(0.9, 0.95),
    weight_decay=0.0,
    batch=128,
    iters=30_000,
    warmup=0,
    cooldown=0.0,
    ema=0,
    clip=1.0,  # [C]
    source="[P, C]",
)
TOY = dict(  # [O]
    SANA,
    cfg=1.0,
    distance="l2",  # in two dimensions (7) and the clamps are biased
    clamp=0.0,
    lr=1e-3,
    betas=(0.9, 0.99),
    batch=256,
    iters=2000,
    source="[O]",
)
MNIST = dict(  # [O]
    SANA,
    cfg=1.5,
    lr=1e-3,
    betas=(0.9, 0.99),
    batch=64,
    iters=1600,
    warmup=20,
    cooldown=0.5,
    ema=2000,
    source="[O]",
)
EMOJI = dict(MNIST, cfg=3.5, nfe=4, lr=3e-4, batch=32, iters=700)  # [O]
SD3 = dict(SANA, lr=1e-5, betas=(0.9, 0.99), source="[C], of SD3.5-medium")
QWEN = dict(  # [P] the whole network; as LoRA [P]: --lora 64 --lr 1e-4 --batch 64 --iters 7000
    SD3,
    batch=32,
    iters=10_000,
    source="[P], whole network",
)
LATENTS = dict(SANA, cfg=2.3, source="nobody's: SANA's, guidance of UCGM")
# For other pipelines: Qwen-Image's numbers, guidance of the pipeline.
OTHER = dict(QWEN, source="nobody's: Qwen-Image's")
PRESETS = {
    "default": dict(SANA, source="nobody's: SANA's"),
    "toy": TOY,
    "toy-cond": TOY,
    "mnist": MNIST,
    "emoji": EMOJI,
    "emoji-flow": dict(EMOJI, source="nobody's: emoji's"),
    "own": dict(MNIST, source="nobody's: mnist's"),
    "edm-imagenet64": dict(SANA, cfg=1.0, source="nobody's: SANA's"),
    "edm-cifar10": dict(SANA, cfg=1.0, source="nobody's: SANA's"),
    "dit": LATENTS,
    "sit": LATENTS,
    "sd15": dict(OTHER, cfg=7.5),
    "sd21": dict(OTHER, cfg=7.5),
    "sdxl": dict(OTHER, cfg=5.0),
    "sd3": SD3,
    "sana": dict(SANA, betas=(0.9, 0.99)),  # [P]
    "sana-0.6b": SANA,
    "flux": dict(OTHER, cfg=1.0),  # its network has an input for guidance already
    "chroma": dict(OTHER, cfg=5.0),
    "flux2": dict(OTHER, cfg=1.0),
    "flux2-klein": dict(OTHER, cfg=4.0),
    "hunyuan-image": dict(OTHER, cfg=3.5),
    "lumina2": dict(OTHER, cfg=4.0),
    "qwen-image": QWEN,
    "z-image": dict(QWEN, source="[A] about Qwen-Image's"),
    "wan2.1": dict(OTHER, cfg=5.0),
    "wan2.1-14b": dict(OTHER, cfg=5.0),
    "wan2.2": dict(OTHER, cfg=4.0),
    "wan2.2-5b": dict(OTHER, cfg=5.0),
    "sana-video": dict(OTHER, cfg=6.0),
    "ltx-video": dict(OTHER, cfg=3.0),
    "hunyuanvideo-1.5": dict(OTHER, cfg=6.0),
}


def parse_args(argv=None):
    p = Parser(__doc__, images=True)
    add = p.method.add_argument
    add("--order", type=int, help="N of (4); 0 is plain flow matching, 1 the MeanFlow limit")
    add("--groups", type=int, nargs=4, default=(1, 1, 1, 1), help="rows of e2e, mul, any, adv")
    add("--target-decay", type=float, help="decay of the target network F^-; 0: the student itself")
    add("--guide", choices=["target", "frozen"], default="target", help="Fg of (3), F^- or teacher")
    add("--image-free", action="store_true", help="own samples instead of images")
    add("--rect-weight", type=float, help="weight mu of (9) in (10)")
    add("--distance", choices=["barron", "l2"], help="distance d: that of (7), or its m")
    add(
        "--clamp", type=float, help="elementwise bound of the differences in (5) and (9); 0 is none"
    )
    add(
        "--mode",
        choices=["auto", "few", "any", "mul"],
        default="auto",
        help="times (t, r) of a step, see `sample`",
    )
    add(
        "--steps", metavar="T,...", help="times of the steps in units of T, falling, e.g. 0.999,0.7"
    )
    args = p.parse(PRESETS, argv)
    e2e, mul, _, adv = args.groups
    turn = sum(args.groups)
    groups = " ".join(map(str, args.groups))
    ok = min(args.groups) >= 0 and turn > 0
    require(ok, f"--groups: expected four numbers >= 0, not all 0, found {groups}")
    ok = args.batch >= turn
    require(ok, f"--batch {args.batch}: expected at least {turn}, one row for each of --groups")
    require(args.order >= 0, f"--order: expected a number >= 0, found {args.order}")
    require(args.rect_weight >= 0, f"--rect-weight: expected >= 0, found {args.rect_weight}")
    require(args.clamp >= 0, f"--clamp: expected a number >= 0, found {args.clamp}")
    ok = not args.rect_weight or (e2e and adv)
    require(ok, "--groups: (9) needs e2e rows, and adv rows for its fake velocity; --rect-weight 0")
    ok = args.order > 0 or mul or adv
    require(ok, "--order 0: only mul and adv rows train, and --groups has none of them")
    ok = 0 <= args.target_decay < 1
    hint = "for a frozen guide: --guide frozen"
    require(ok, f"--target-decay: expected 0 <= decay < 1, found {args.target_decay}; {hint}")
    ok = not args.image_free or args.guide == "frozen"
    require(ok, "--image-free: the velocity comes from the frozen teacher; add --guide frozen")
    unused = args.image_free and args.data and not args.from_image
    require(not unused, f"--data {args.data}: this run uses no images (--image-free)")
    ok = args.guide == "target" or args.cfg != 1 or args.image_free
    require(ok, "--guide frozen: nothing is guided at --cfg 1")
    ok = args.guide == "frozen" or args.cfg > 0.5
    require(ok, f"--cfg: expected over 0.5 where the network guides itself, found {args.cfg}")
    time_grid(args.nfe, args.mode, args.steps)
    return args


# ---- networks ------------------------------------------------------------------------------------


class Target(torch.nn.Module):
    """F^-, an average of the student's weights. decay 0: the student itself.

    The decay of the average grows from 0 (the first update copies) to `decay`: 0, 0.495, 0.620,
    0.690, ... for 0.99.
    """

    def __init__(self, student, decay):
        super().__init__()
        self.decay = decay
        self.model = student.copy().requires_grad_(False) if decay else student
        self.register_buffer("now", torch.zeros((), dtype=torch.float64))
        self.pairs = (list(self.model.parameters()), list(student.parameters()))

    @torch.no_grad()
    def update(self):
        if self.decay:
            torch._foreach_lerp_(*self.pairs, 1 - self.now.item())
            self.now += 0.5 * (1 - self.now) * (self.decay - self.now)


def velocity(net, x_t, t, r, cond):
    """F(x_t, t, r, c) [B, *shape], of a student or of a teacher, which does not see r.

    t, r: [B] float64; t = r < 0 is the fake velocity.
    """
    if not len(x_t):
        return x_t  # a process may have no row of a group
    s = t.abs()
    # the new inputs of (2): each is a number and the factor on its embedding
    second_time = torch.stack([r, t - r], 1)
    fake = torch.stack([s, (t < 0).double()], 1)  # (2)
    xhat = net(x_t, 1 - s, s, cond | dict(r=second_time, fake=fake))
    return ((x_t.double() - xhat.double()) / expand(s.clamp(min=1e-6), x_t)).to(x_t.dtype)  # (1)


# ---- rows, times, guidance -----------------------------------------------------------------------


def end_time(schedule):
    """T: the teacher's noisy end as a time of the linear path. EDM: sigma_max / (1 + sigma_max)."""
    alpha, sigma = schedule.alpha(schedule.t_max), schedule.sigma(schedule.t_max)
    return float(sigma / (alpha + sigma))


def partition(batch, groups, rank=0, world=1):
    """Rows of each group on this process, {group: indices [n]}, and their mean over processes.

    Place i of the global batch belongs to the group whose turn it is.
    """
    turn = [name for name, n in zip(GROUPS, groups) for _ in range(n)]
    names = [turn[i % len(turn)] for i in range(batch)]
    local = batch // world
    own = names[rank * local : (rank + 1) * local]
    rows = {}
    for group in GROUPS:
        indices = [i for i, name in enumerate(own) if name == group]
        rows[group] = torch.tensor(indices, dtype=torch.long)
    return rows, {group: names.count(group) / world for group in GROUPS}


def times(u, w, rows, T):
    """t, r [B] of all groups from uniform u, w [B]. Those of adv are still positive."""
    t = T * u
    r = t * w  # any
    t[rows["e2e"]] = T
    r[rows["e2e"]] = 0.0
    r[rows["mul"]] = t[rows["mul"]] * (1 - 0.05 * w[rows["mul"]])
    r[rows["adv"]] = t[rows["adv"]]
    return t, r


def mix(x, z, t):
    """x_t on the linear path. t: [B] >= 0."""
    return add_noise(x, 1 - t, t, z)  # (1)


def pick(cond, *rows):
    return {name: take_rows(v, torch.cat(rows)) for name, v in cond.items()}


def guidance_strength(scale, guide, image_free):
    """k of (3) that has the effect of the guidance scale --cfg."""
    if image_free:
        return scale
    if guide == "frozen":
        return scale - 1
    return 1 - 1 / scale  # the network guides itself: the fixed point has scale 1 / (1 - k)


# ---- few-step sampling ---------------------------------------------------------------------------


def time_grid(nfe, mode="auto", steps=None):
    """Mode, and falling times in units of T with the final 0.

    Official grids: even from 0.999 to 0.5 (2 steps: 0.7); mul: the Kumaraswamy transform of even.
    """
    if mode == "auto":
        mode = "mul"
        if nfe <= 8:
            mode = "few" if nfe <= 2 else "any"
    if steps is not None:
        t = parse_times(steps)
        falling = t == sorted(set(t), reverse=True)
        ok = len(t) == nfe and falling and all(0 < s <= 1 for s in t)
        require(ok, f"--steps {steps}: expected {nfe} falling times in (0, 1] (--nfe {nfe})")
        return mode, [*t, 0.0]
    if mode == "mul":
        u = torch.linspace(0.001, 1, nfe + 1, dtype=torch.float64)[:-1]
        u = (1 - (1 - u**1.17) ** 0.8) ** 1.1
    else:
        u = torch.linspace(0.001, 0.3 if nfe == 2 else 0.5, nfe, dtype=torch.float64)
    return mode, [*(1 - u).tolist(), 0.0]


def parse_times(text):
    """Numbers of --steps; none if one of them is not a number."""
    try:
        return [float(t) for t in text.split(",")]
    except ValueError:
        return []


@torch.no_grad()
def one_step(net, z, cond, T):
    """One-step samples from unit noise z [n, *shape]."""
    t = torch.full((len(z),), T, dtype=torch.float64)
    return T * z - T * velocity(net, T * z, t, 0 * t, cond)


@torch.no_grad()
def sample(student, z, cond, nfe, noise, mode="auto", steps=None):
    """n-step sampler. -> x [B, *shape].

    mode few: jump to the clean end, add fresh noise; any: jump to the next time, deterministic;
    mul: as the teacher, along the instantaneous velocity; auto: few to 2 steps, any to 8, then mul.
    z: unit noise [B, *shape]. noise(): more of it. steps: text of --steps.
    """
    mode, grid = time_grid(nfe, mode, steps)
    T = end_time(student.schedule)
    x = T * z.double()
    for i in range(nfe):
        t = torch.full((len(z),), T * grid[i], dtype=torch.float64)
        next_t = torch.full_like(t, T * grid[i + 1])
        r = dict(few=0 * t, any=next_t, mul=t)[mode]
        v = velocity(student, x.to(z.dtype), t, r, cond).double()
        xhat = x - expand(t, x) * v
        zhat = x + expand(1 - t, x) * v
        if mode == "few" and i < nfe - 1:
            zhat = noise().double()
        x = mix(xhat, zhat, next_t)
    return x.to(z.dtype)


# ---- losses --------------------------------------------------------------------------------------


@torch.no_grad()
def guided(v, net, x_t, t, cond, null, k, image_free=False):
    """v of (3) [B, *shape] from z - x; image_free: from Fg(e) instead. net: Fg."""
    both = {name: torch.cat([cond[name], null[name]]) for name in cond}
    t = torch.cat([t, t])
    v_c, v_e = velocity(net, torch.cat([x_t, x_t]), t, t, both).chunk(2)
    return (v_e if image_free else v) + k * (v_c - v_e)  # (3)


@torch.no_grad()
def rcgm_target(pred, v, x_t, t, r, net, order, clamp):
    """Target of (5) [B, *shape].

    pred: F(x_t, t, r) of the student. net(y, a, b): the target network's mean velocity from a to b.
    """
    if order == 0:
        return v
    start = torch.maximum(t - DELTA, r)
    y = x_t - DELTA * v
    integral = torch.zeros_like(x_t)
    for i in range(order):
        a = torch.lerp(start, r, i / order)
        b = torch.lerp(start, r, (i + 1) / order)
        move = (expand(a - b, y) * net(y, a, b)).to(y.dtype)
        y = y - move
        integral = integral + move  # (4)
    gap = expand(t - r, pred)
    error = torch.where(
        gap >= DELTA,
        (gap * pred - integral) / DELTA - v,  # (5)
        pred.double() - v,
    )
    return pred - error.clamp(-clamp, clamp).to(pred.dtype)  # (5)


def time_weight(t, r):
    return torch.tan((1 - t.abs() + r.abs()) * (math.pi / 2.5)) + 1  # (6)


def distance(p, q, kind, c=1e-3):
    """d of (7) for each sample, [B]: about the root mean square, so that all samples pull with
    nearly the same force. The root has no gradient. kind l2: the mean square itself."""
    m = (p - q).square().flatten(1).mean(1)
    if kind == "l2":
        return m
    return m / (c * (m.detach() / (c**2 + 1e-8) + 1).sqrt())  # (7)


@torch.no_grad()
def rectification(x1, z, s, net, clamp):
    """Fake minus real velocity around one-step samples x1, clamped: the gradient of (9).

    net(y, t, r): the student, on twice the rows.
    """
    y = mix(x1, z, s)
    signed = torch.cat([-s, s])
    fake, real = net(torch.cat([y, y]), signed, signed).chunk(2)
    return (fake - real).clamp(-clamp, clamp)  # (9)


# ---- training ------------------------------------------------------------------------------------


def main():
    args = parse_args()
    run = Run(__file__, args)
    load = run.teacher_kwargs(students=1, averages=1 if args.target_decay else 0)
    teacher = load_teacher(args.teacher, run.device, run.dtype, **load)
    schedule = teacher.schedule
    T = end_time(schedule)
    clamp = args.clamp or math.inf
    k = guidance_strength(args.cfg, args.guide, args.image_free)

    # Rows of the groups in each microstep, and their mean number over processes and microsteps.
    rows_of_microstep = []
    shards = run.data_shard[1]
    for microstep in range(args.accumulate):
        shard = run.rank * args.accumulate + microstep
        rows, mean_rows = partition(args.batch, args.groups, shard, shards)
        rows_of_microstep.append(rows)
    # with order 0 the base loss is flow matching, which only these rows have
    trained_groups = [g for g in GROUPS if mean_rows[g] and (args.order or g in ("mul", "adv"))]

    # Networks: the student starts as the teacher, with two more inputs (2).
    images = None if args.image_free else load_images(args.data, teacher, run.print)
    torch.manual_seed(args.seed)  # the new embeddings start equal on all processes
    student = teacher.copy(args.lora).extend("r", "fake")
    if args.start and not args.resume:
        start_from(args.start, teacher, student, say=run.print)
    target_net = Target(student, args.target_decay)
    guide = teacher if args.guide == "frozen" else target_net.model
    student_ddp = run.train(student)  # DDP around it; for passes that train weights
    opt_g = adamw(student, args.lr, args)
    ema = EMA(student, args.ema, args.ema_cpu)
    sampler = dict(mode=args.mode)
    if args.steps:
        sampler["steps"] = args.steps
    report = Report(run, teacher, ema, sample, sampler)
    mode, grid = time_grid(args.nfe, **sampler)
    run.print_summary(
        images,
        student=student,
        teacher=teacher,
        target=target_net,
        guidance=f"w = {args.cfg:g} (k = {k:.4g}) by the {args.guide} network",
        steps=f"{args.nfe} ({mode}) at t = " + " ".join(f"{T * t:.4g}" for t in grid),
        groups=", ".join(f"{g} {mean_rows[g] * shards:g}" for g in GROUPS),
    )

    def mean(a, group):
        """Mean of a [B, ...] over the rows of a group, which becomes that of the global batch."""
        return take_rows(a, rows[group]).flatten(1).mean(1).sum() / max(mean_rows[group], 1e-9)

    state = dict(student=student, opt_g=opt_g, ema=ema, target=target_net)
    first = run.resume(state)
    it = first - 1  # if no iteration is left
    for it in run.loop(first, args.iters, show=["loss"]):
        rows = rows_of_microstep[run.microstep]
        e2e, adv = rows["e2e"], rows["adv"]
        guided_rows = torch.cat([rows["mul"], rows["any"]])  # e2e, at t = T, is not guided itself
        real_rows = torch.cat([e2e, guided_rows])
        draw = run.draw(it)
        run.set_rates(it, (opt_g, args.lr))

        # Inputs. x is an image; in the rows of adv, and without images, a one-step sample.
        t, r = times(draw.rand(), draw.rand(), rows, T)
        z0 = draw.randn(*teacher.shape)
        if images:
            x, cond = images.samples(run, teacher, it)
            x = x.clone()
            put_rows(x, adv, one_step(student, take_rows(z0, adv), pick(cond, adv), T))  # (8)
        else:
            cond = teacher.random_cond(draw)
            x = one_step(student, z0, cond, T)
        z = draw.randn(*teacher.shape)  # fresh: with z0 again, (8) would be biased
        x_t = mix(x, z, t)
        v = z - x
        t[adv], r[adv] = -t[adv], -r[adv]  # the fake velocity

        pred = velocity(student_ddp, x_t, t, r, cond)
        if run.microstep == 0:  # before F^- is used, so that at first it is the student
            target_net.update()

        # Base loss on real rows. The adv rows learn the velocity of the student's own samples.
        target = v.clone()  # (8)
        if k or args.image_free:
            at_rows = (take_rows(x_t, guided_rows), t[guided_rows], pick(cond, guided_rows))
            null = teacher.unconditional(at_rows[2], len(guided_rows))
            v_guided = take_rows(v, guided_rows)
            v_guided = guided(v_guided, guide, *at_rows, null, k, args.image_free)
            put_rows(target, guided_rows, v_guided)
        real_cond = pick(cond, real_rows)
        real_target = rcgm_target(
            take_rows(pred, real_rows),
            take_rows(target, real_rows),
            take_rows(x_t, real_rows),
            t[real_rows],
            r[real_rows],
            lambda y, a, b: velocity(target_net.model, y, a, b, real_cond),
            args.order,
            clamp,
        )
        put_rows(target, real_rows, real_target)
        weight = time_weight(t, r)
        weight[adv] = 1.0
        each = distance(pred, target, args.distance)
        each = expand(weight, each) * each  # (6), (8)
        total = sum(take_rows(each, rows[g]).sum() for g in trained_groups)
        loss = total / sum(mean_rows[g] for g in trained_groups)
        logs = {g: mean(each[:, None], g) for g in trained_groups}
        logs |= dict(fm=mean((pred.detach() - v).square(), "mul"))

        # Rectification: fake minus real velocity around the one-step samples of the e2e rows.
        x1 = x_t - T * pred.detach()
        if args.rect_weight:
            z1, s = draw.randn(*teacher.shape), T * draw.rand()
            twice = pick(cond, e2e, e2e)
            net = lambda y, t, r: velocity(student, y, t, r, twice)
            x1_e2e, z1_e2e, pred_e2e = (take_rows(a, e2e) for a in (x1, z1, pred))
            g = rectification(x1_e2e, z1_e2e, s[e2e], net, clamp)
            target = (pred_e2e - g).detach()
            rect = distance(pred_e2e, target, args.distance).sum() / mean_rows["e2e"]  # (9)
            loss = loss + args.rect_weight * rect  # (10)
            twin_gap = g.square().flatten(1).mean(1).sum() / mean_rows["e2e"]
            logs |= dict(rect=rect, twin_gap=twin_gap)

        loss.backward()
        grad = run.step(opt_g, args.clip)  # clip, step, zero the gradients
        logs |= dict(loss=loss, grad=grad)
        logs |= dict(mean=mean(x1, "e2e"), square=mean(x1.square(), "e2e"))
        ema.update(run.images_stepped)

        run.after(it, logs, state, report)

    run.finish(it, state, report)
    report.end(it + 1)


if __name__ == "__main__":
    launch(main)
