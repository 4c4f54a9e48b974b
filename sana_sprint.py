"""SANA-Sprint: continuous-time consistency distillation with a latent adversarial loss. Chen et al., ICCV 2025, arXiv 2503.09641.

One student for 1, 2, 3 or 4 steps. Two losses are added. sCM (Lu & Song, arXiv 2410.11081): along the teacher's guided probability-flow ODE the student's
clean image must not change; the ODE is followed exactly, by a forward-mode derivative of the student, without solver or target network. LADD: a hinge GAN
on features of the frozen teacher, which makes single steps sharp. Both need images. Guidance is built in: its scale w is drawn per sample, enters the
teacher's derivative, and is shown to the student. Any teacher (flow, VP, EDM) is first seen in TrigFlow coordinates, which takes no training.

Notation: y = x_0 / sd has standard deviation 1 (the teacher's data divided by rho, theirs); sd = 0.5; u = x_t / sd; time t in [0, pi/2]; c the label;
eps fresh unit noise; sg[] stops gradients; D(x, a, b, c) the Model of common/models.py: a network's clean estimate at any (alpha, sigma) = (a, b).
    u = cos(t) y + sin(t) eps,   t = atan(exp(tau) / sd),   tau ~ N(P_mean, P_std^2)                                                    (1)
    yhat(u, t, c) = D(rho u, cos t, rho sin t, c) / rho     any network in TrigFlow coordinates, by equal signal-to-noise ratio         (2)
    F(u, t, c) = (cos(t) u - yhat) / sin(t)                 the ODE is dx_t / dt = sd F, and x_s = cos(t-s) x_t - sin(t-s) sd F         (3)
    dx = sd [F_pre(u, t, null) + w (F_pre(u, t, c) - F_pre(u, t, null))]     the frozen teacher; w drawn from --cfg-train               (4)
    J = d F(u, t, c, w) along (cos t sin t dx / sd, cos t sin t)             the student's JVP; cos t sin t dF/dt would overflow        (5)
    g = -cos^2 t (sd F - dx) - r (cos t sin t x_t + sd J)                    = cos t d(sd yhat)/dt at r = min(1, step / H)              (6)
    g <- g / (|g| + 0.1)                                                     norm over all numbers of a sample                          (7)
    L_scm = mean [exp(-lv(t)) (F - sg[F] - sg[g])^2 + lv(t)]                 lv: a learned function of t, or 0 (--adaptive-weight off)  (8)
    fake = yhat(cos(t') y + sin(t') eps, t', c, w)    t' as in (1), or with probability p the noisy end pi/2                            (9)
    l_k(x) = head_k(block k of the teacher at cos(s) x + sin(s) eps)         s as in (1) with its own mean and deviation               (10)
    L_gen = -mean l(fake)                                                                                                              (11)
    L_heads = 1/2 mean relu(1 - l(y)) + 1/2 mean relu(1 + l(sg[fake]))                                                                 (12)
    student: L_scm + adv_weight L_gen         heads: L_heads            in turn, each on images of its own                             (13)

Commands:
    python sana_sprint.py                                       # one step, embedded MNIST teacher; --nfe 4: pictures and evaluation in four
    python sana_sprint.py --teacher toy                         # 2-D mixture, half a minute; energy distance below 0.01, every mode above 5 %
    torchrun --nproc_per_node=8 sana_sprint.py --teacher DIR    # any teacher folder, 8 GPUs

Differences from the paper:
    - mnist, emoji, toy: presets are ours. The weight exp(-lv) is 1 / E[g^2 | t]: unbounded where the student converges, which drives it away (seen in 2-D), so
      it is off on the toy, clamped on mnist; full, as in the paper, by default. lv is a small network of t (paper: a layer on the network's embedding) and
      starts at -ln D, D numbers a sample, where (7) leads it (paper: 0): on its way there the weight of sCM beside the GAN would change D times.
    - --anchor (mnist 0.2; elsewhere 0, as in the paper): near t = 0 the mnist teacher does not see all noise. Samplers jump over these times, (5) does not.
    - the paper trains the teacher on with a dense time embedding and QK norm first: python -m recipes.pretrain --start TEACHER. --time dense does without
      training: the network is shown times of 0..1, its new time embedders are fitted to the old ones at 0..1000, and fast waves, which JVPs magnify, are gone.
    - heads have GroupNorm (code: batch norm over 8 samples) and 3x3 convolutions (code: width 9 along the flattened tokens; toy: 1x1).
    - an iteration is one student and one heads update, and H counts these. Times end where the teacher's schedule does (SD 1.5: 1.5025). No ControlNet.
    - switches for the official code: --prior, --d-levels own, --misaligned. Its P_mean is 0.2, the paper's 0; the paper gives no H, it is the code's.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm

from common import data
from common.ema import EMA
from common.errors import UserError, launch
from common.flags import Parser
from common.model import ScalarEmbedding
from common.report import evaluate_run, export, pictures
from common.run import Run
from common.schedules import TrigFlow, expand
from common.teachers.load import load_teacher

PRESETS = {  # the flags of a teacher; every one can be overridden. Sources: [P] paper, [C] official code, [S] sCM paper, ours = measured here
    "mnist": dict(
        cfg=1.5,
        cfg_train=[1.25, 1.5, 1.75],
        nfe=1,
        p_scm=(-0.8, 1.6),
        p_adv=(-3.5, 1.0),
        adv_weight=2.0,
        adaptive_weight="clamped",
        H=50,
        anchor=0.2,
        time="dense",
        rho=None,
        lr=3e-4,
        lr_fake=2e-3,
        betas=(0.5, 0.99),
        batch=64,
        iters=1200,
        warmup=20,
        cooldown=0.5,
        ema=2000,
        clip=200.0,
        weight_decay=0.0,
    ),
    "toy": dict(
        cfg=1.0,
        cfg_train=None,
        nfe=1,
        p_scm=(-0.4, 1.4),
        adv_weight=0.5,
        adaptive_weight="off",
        H=200,
        time="native",
        rho=None,
        lr=1e-3,
        lr_fake=1e-3,
        betas=(0.5, 0.99),
        batch=256,
        iters=800,
        warmup=100,
        cooldown=0.5,
        ema=0,
        clip=10.0,
        weight_decay=0.0,
    ),
    # lr, batch, iterations, weights of (13), times, w [P]; H, clip, warm-up [C]. The optimiser there is CAME; AdamW without decay stands for it
    "default": dict(
        cfg=4.5,
        cfg_train=[4.0, 4.5, 5.0],
        nfe=2,
        p_scm=(0.0, 1.6),
        adv_weight=0.5,
        adaptive_weight="full",
        H=2000,
        time="native",
        rho=1.0,
        lr=2e-6,
        lr_fake=2e-6,
        betas=(0.9, 0.999),
        batch=512,
        iters=20000,
        warmup=5000,
        cooldown=0.0,
        ema=0,
        clip=0.1,
        weight_decay=0.0,
    ),
}
PRESETS |= {
    "toy-cond": PRESETS["toy"],
    "emoji": dict(
        PRESETS["default"],
        cfg=3.5,
        cfg_train=[3.0, 3.5, 4.0],
        H=50,
        lr=1e-4,
        lr_fake=1e-3,
        betas=(0.5, 0.99),
        batch=32,
        iters=350,
        warmup=20,
        cooldown=0.5,
        ema=2000,
        clip=100.0,
    ),
}
SD = 0.5  # sigma_data of TrigFlow: only its ratio to the 0.1 of (7) matters
DEPTHS = (0.1, 0.4, 0.7, 0.95)  # blocks 2, 8, 14, 19 of 20 [C]
PUBLISHED = {
    1: [math.pi / 2],
    2: [math.atan(200 / SD), 1.3],
    4: [math.atan(200 / SD), 1.3, 1.1, 0.6],
}  # the paper's times; none for three steps


def parse_args(argv=None):
    p = Parser(__doc__)
    p.method.add_argument(
        "--steps",
        help="falling times of the sampler in (0, pi/2], e.g. 1.5683,1.3; default: the paper's, or evenly spaced",
    )
    p.method.add_argument(
        "--cfg-train",
        type=float,
        nargs="+",
        help="guidance scales of (4); several: the student is told which, and --cfg picks one",
    )
    p.method.add_argument("--p-scm", type=float, nargs=2, help="P_mean and P_std of (1)")
    p.method.add_argument(
        "--p-adv",
        type=float,
        nargs=2,
        default=(-0.6, 1.0),
        help="mean and deviation of the heads' noise levels, (10)",
    )
    p.method.add_argument("--H", type=int, help="iterations until r of (6) is 1")
    p.method.add_argument(
        "--anchor",
        type=float,
        default=0.0,
        help="least t of (1) and (9); cleaner draws are put there with r = 0: at it the student is the teacher",
    )
    p.method.add_argument(
        "--adaptive-weight",
        choices=["off", "clamped", "full"],
        help="lv of (8); clamped: bounded below, at -ln(numbers per sample) - 2",
    )
    p.method.add_argument(
        "--prior",
        action="store_true",
        help="factor 1 / (sd tan t) on the square of (8), as in the official code",
    )
    p.method.add_argument("--adv-weight", type=float, help="adv_weight of (13); 0: sCM alone")
    p.method.add_argument("--max-time", type=float, default=0.5, help="p of (9)")
    p.method.add_argument(
        "--d-levels",
        choices=["same", "own"],
        default="same",
        help="one s of (10) for a real and a fake image, or each its own",
    )
    p.method.add_argument(
        "--misaligned",
        action="store_true",
        help="real images with another's label are fakes too in (12)",
    )
    p.method.add_argument(
        "--rho",
        type=float,
        help="standard deviation of the teacher's data; default: measured on the images, 1 for unknown teachers",
    )
    p.method.add_argument(
        "--time",
        choices=["native", "dense"],
        help="time embedding of teacher and student: the teacher's own, or fitted to it on 0..1",
    )
    args = p.parse(PRESETS, argv)
    args.cfg_train = args.cfg_train or [args.cfg]
    pair = lambda v: math.isfinite(v[0]) and 0 <= v[1] < math.inf
    for flag, fine, expected in (
        (
            "cfg",
            min(args.cfg_train) <= args.cfg <= max(args.cfg_train),
            f"a scale within --cfg-train {' '.join(map(str, args.cfg_train))}",
        ),
        *(
            (name, pair(getattr(args, name)), "a mean and a deviation >= 0")
            for name in ("p_scm", "p_adv")
        ),
        ("anchor", 0 <= args.anchor < 1.5, "a time in [0, 1.5)"),
        ("max_time", 0 <= args.max_time <= 1, "a probability"),
        ("adv_weight", 0 <= args.adv_weight < math.inf, "a number >= 0"),
        ("H", args.H >= 0, "a number >= 0"),
        ("lora_fake", not args.lora_fake, "none"),
        ("rho", args.rho is None or 0 < args.rho < math.inf, "a number > 0"),
        (
            "adv_weight",
            args.adv_weight or not args.misaligned and args.d_levels == "same",
            "a number > 0 beside --misaligned and --d-levels",
        ),
    ):
        if not fine:
            raise UserError(
                f"--{flag.replace('_', '-')}: expected {expected}, found {getattr(args, flag)}"
            )
    return args


# ---- networks ---------------------------------------------------------------------------------------------------------------------------
#   teacher     frozen                                             F_pre, and the features of (10)
#   student     trained, starts as the teacher                     F; told w when there are several
#   log_var     trained with the student, starts at 0              its mean output is lv of (8), but for lv0
#   heads       trained by (12), default initialisation            l_k of (10)
# All are called bare, also with several processes, since a JVP goes around DDP's hooks; `run.average_gradients` is the one all-reduce.


class Head(nn.Module):
    """One logit per place of a feature map, no time, no label. Spectral norm everywhere; its power iteration runs in train mode only, so not in (11)."""

    def __init__(self, h):  # h: a feature map [1, C, H, W], or [1, C] for networks without space
        super().__init__()
        c, layer = (
            h.shape[1],
            lambda c, out, k: spectral_norm(
                nn.Conv2d(c, out, k, padding=k // 2) if h.ndim == 4 else nn.Linear(c, out)
            ),
        )
        norm = lambda: [
            nn.GroupNorm(math.gcd(32, max(c // 4, 1)), c),
            nn.LeakyReLU(0.2),
        ]  # four channels a group or more: 1x1 maps would vanish
        self.first = nn.Sequential(layer(c, c, 1), *norm())
        self.second = nn.Sequential(layer(c, c, 3), *norm())
        self.last = layer(c, 1, 1)

    def forward(self, h):
        h = self.first(h.float())
        return self.last((h + self.second(h)) / math.sqrt(2)).flatten(1)  # [B, places]


def logits(heads, features):  # list of maps [B, C, ...] -> [B, all places of all maps]
    return torch.cat([head(h) for head, h in zip(heads, features, strict=True)], 1)  # (10)


# ---- helpers ----------------------------------------------------------------------------------------------------------------------------


def noisy(y, t, eps):
    """u of (1) in the dtype of y; t: 0-d or [B], float64. No noise at t = 0, no signal at pi/2, exactly."""
    trig = TrigFlow(1.0)
    return (expand(trig.alpha(t), y) * y + expand(trig.sigma(t), y) * eps).to(y.dtype)


def proposal(normal, mean, std, low, high):
    """Times of (1) from unit noise [B], within the range that the teacher knows."""
    return torch.atan(torch.exp(mean + std * normal.double()) / SD).clamp(low, high)  # (1)


def time_range(schedule, rho):
    """Cleanest and noisiest t of a schedule; at least 1e-3, since (3) becomes 0 / 0."""
    low, high = (
        math.atan2(float(schedule.sigma(t)), rho * float(schedule.alpha(t)))
        for t in (schedule.t_min, schedule.t_max)
    )
    return max(low, 1e-3), high


def clean(model, u, t, cond, rho):
    return model(rho * u, TrigFlow(rho).alpha(t), TrigFlow(rho).sigma(t), cond) / rho  # (2)


def velocity(model, u, t, cond, rho):
    """The TrigFlow view of any network; t [B] float64 in (0, pi/2]."""
    return (
        (expand(TrigFlow(1.0).alpha(t), u) * u - clean(model, u, t, cond, rho)) / expand(t.sin(), u)
    ).to(u.dtype)  # (3)


@torch.no_grad()
def teacher_derivative(teacher, u, t, cond, rho, w):
    """dx_t / dt of the teacher's guided ODE; w: [B], or None for the conditional alone, in one pass."""
    f = velocity(teacher, u, t, cond, rho)
    if w is None:
        return SD * f
    null = velocity(teacher, u, t, teacher.null(len(u)), rho)
    return SD * (null + expand(w, u) * (f - null)).to(u.dtype)  # (4)


def student_derivative(student, u, t, cond, rho, dx):
    """J of (5), in fp32 whatever the passes are in, without graph. Fused attention has no forward-mode derivative: plain attention, here only."""
    cs = t.cos() * t.sin()
    dtype, student.dtype = student.dtype, torch.float32
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(
                lambda u, t: velocity(student, u, t, cond, rho),
                (u, t),
                ((expand(cs, u) * dx / SD).to(u.dtype), cs),
            )[1]  # (5)
    finally:
        student.dtype = dtype


def tangent(f, dx, u, t, j, r):
    """-> g of (7) and the norm [B] of g of (6). f: the student's F without graph, at the same u, t, cond as j."""
    cos, sin = expand(t.cos(), u), expand(t.sin(), u)
    g = -(cos**2) * (SD * f - dx) - expand(r, u) * (cos * sin * SD * u + SD * j)  # (6)
    norm = g.flatten(1).norm(dim=1)
    return (g / (expand(norm, g) + 0.1)).to(u.dtype), norm  # (7)


# ---- losses -----------------------------------------------------------------------------------------------------------------------------


def scm_loss(f, g, lv=None, floor=None, prior=None):
    """f: F with graph; g of (7). lv [B] or None: no weight. floor: bound of lv in the weight, which then has no gradient into lv; lv itself is learned
    on the same errors. prior: [B], a factor of the squares."""
    square = (f - f.detach() - g.detach()).square().flatten(1).mean(1)
    square = square if prior is None else prior * square
    if lv is None:
        return square.mean()
    if floor is None:
        return ((-lv).exp() * square + lv).mean()  # (8)
    return ((-lv.detach().clamp(min=floor)).exp() * square).mean() + (
        (-lv).exp() * square.detach() + lv
    ).mean()


def gen_loss(logit_fake):
    return -logit_fake.mean()  # (11)


def heads_loss(logit_fake, logit_real):
    return 0.5 * F.relu(1 - logit_real).mean() + 0.5 * F.relu(1 + logit_fake).mean()  # (12)


# ---- sampler ----------------------------------------------------------------------------------------------------------------------------


def sample_times(n, steps=None):
    """n falling times: --steps, or the paper's, or, where it has none, the official scheduler's even ones."""
    if steps is None:
        return PUBLISHED.get(n) or [math.pi / 2 * (1 - i / n) for i in range(n)]
    try:
        times = [float(s) for s in str(steps).split(",")]
    except ValueError:
        times = []
    if (
        len(times) != n
        or times != sorted(set(times), reverse=True)
        or not all(0 < t < 1.571 for t in times)
    ):
        raise UserError(
            f"--steps {steps}: expected {n} falling times above 0 and up to pi/2 (--nfe {n})"
        )
    return times


@torch.no_grad()
def sample(student, z, cond, nfe, noise, steps=None, rho=1.0, cfg=None):
    """Denoise, add fresh noise at the next time, repeat. z [B, *shape] unit noise; noise(): more; cfg: w, for a student that is told. -> x [B, *shape]"""
    times = torch.tensor(sample_times(nfe, steps), dtype=torch.float64).clamp(
        max=time_range(student.schedule, rho)[1]
    )
    cond = (
        cond
        if cfg is None
        else cond | dict(guidance=torch.full((len(z),), 0.1 * cfg, device=z.device))
    )
    y = clean(student, z, times[0], cond, rho)
    for t in times[1:]:
        y = clean(student, noisy(y, t, noise()), t, cond, rho)
    return rho * y


def main():
    args, networks = parse_args(), (1,)  # students: for the estimate of memory
    # ==== same in every script: setup ====
    run = Run("sana_sprint", args)
    teacher = load_teacher(args.teacher, run.device, run.dtype, **run.teacher_kwargs(*networks))
    schedule, shape = teacher.schedule, teacher.shape
    # ==== end ====
    times = sample_times(args.nfe, args.steps)
    images = data.load_images(args.data, teacher, run.print)
    if dense := args.time == "dense" and not getattr(teacher, "dense", False):
        if args.lora or not hasattr(teacher, "adapt"):
            raise UserError(
                f"--time dense: {'--lora keeps the weights' if args.lora else f'the network of {args.teacher} has no waves to be rid of'}; use --time native"
            )
        teacher = teacher.copy().adapt().fit_time().requires_grad_(False)
    rho = args.rho or round(
        float(teacher.encode_images(images.images[images.order(0, 0)[:2000]].to(run.device)).std()),
        4,
    )
    scales, told, (low, high) = (
        torch.tensor(args.cfg_train, device=run.device),
        len(args.cfg_train) > 1,
        time_range(schedule, rho),
    )
    torch.manual_seed(args.seed)  # new parts start equal on all processes
    student = teacher.copy(args.lora).extend(*["guidance"] * told)
    maps = lambda x: teacher(
        x, 1.0, 1.0, teacher.encode([0] * len(x)), features=DEPTHS
    )  # of a sample, for their sizes, and in the rehearsal
    heads, log_var = (
        run.to_device(
            nn.ModuleList(map(Head, maps(torch.zeros(1, *shape, device=run.device)))).eval()
        ),
        run.to_device(ScalarEmbedding(32)),
    )
    critic = nn.ModuleDict(
        dict(heads=heads, log_var=log_var) | (dict(teacher=teacher) if dense else {})
    )  # what a checkpoint needs beside the student
    start, lv0 = (
        max(low, args.anchor),
        -math.log(math.prod(shape)),
    )  # lv0: where |g| = 1 leads lv; lv is clamped 2 below
    if args.grad_checkpoint:
        student.checkpoint_activations()
    S = torch.compile(student) if args.compile else student  # in all passes but (5)
    params_g, params_c = [*student.parameters(), *log_var.parameters()], list(heads.parameters())
    opt_g = torch.optim.AdamW(
        params_g, lr=args.lr, betas=args.betas, weight_decay=args.weight_decay, fused=True
    )
    opt_c = torch.optim.AdamW(
        params_c, lr=args.lr_fake, betas=args.betas, weight_decay=args.weight_decay, fused=True
    )
    ema = EMA(student, args.ema, args.ema_cpu)
    sampler = (
        dict(rho=rho)
        | (dict(steps=args.steps) if args.steps else {})
        | (dict(cfg=args.cfg) if told else {})
    )
    guide = args.cfg_train != [1.0]
    passes = (
        1 + guide + 3.4 + 3 + (5 + 3 + args.misaligned if args.adv_weight else 0)
    )  # forward 1, backward 2, one to the input alone 1, JVP 3.4 (measured)
    run.print_summary(
        student=student,
        heads=heads,
        teacher=teacher,
        images=images,
        steps=[round(t, 4) for t in times],
        rho=rho,
        times_from=f"{low:.4f} to {high:.4f}",
        guidance=args.cfg_train,
        passes_per_iteration=f"{passes:.1f}",
        graph=dict(student=2, heads=lambda x: logits(heads, maps(x))) if args.adv_weight else None,
    )

    # ==== same in every script: resume ====
    state = dict(student=student, opt_g=opt_g, ema=ema) | dict(critic=critic, opt_c=opt_c)
    first = run.resume(state)
    it = first - 1
    # ==== end ====

    for it in run.loop(first, args.iters):
        draw = run.draw(it)
        run.set_rates(it, (opt_g, args.lr), (opt_c, args.lr_fake))

        def batch(
            i,
        ):  # clean images in units of their deviation, as many with a neighbour's label, cond for the teacher and for the student, w
            pixels, labels = images.batch(i, args.batch, args.seed)
            y, other = (
                teacher.encode_images(p[draw.rows].to(run.device)) / rho
                for p in (pixels, pixels.roll(1, 0) if args.misaligned else pixels)
            )
            cond, w = teacher.encode(labels[draw.rows]), scales[draw.randint(0, len(scales))]
            return y, other, cond, cond | dict(guidance=0.1 * w), w

        def fake(y, given):
            t = torch.where(
                draw.rand() < args.max_time, high, proposal(draw.randn(), *args.p_scm, start, high)
            )
            return clean(S, noisy(y, t, draw.randn_like(y)), t, given, rho)  # (9)

        levels = lambda: proposal(draw.randn(), *args.p_adv, low, high)
        seen = lambda y, s, cond: teacher(
            rho * noisy(y, s, draw.randn_like(y)), s.cos(), rho * s.sin(), cond, features=DEPTHS
        )

        # the student
        y, _, cond, given, w = batch(2 * it)
        t = proposal(draw.randn(), *args.p_scm, start, min(high, math.pi / 2 - 1e-4))
        u = noisy(y, t, draw.randn_like(y))
        dx = teacher_derivative(teacher, u, t, cond, rho, w if guide else None)
        j = student_derivative(student, u, t, given, rho, dx)
        f = velocity(S, u, t, given, rho)
        g, norm = tangent(
            f.detach(), dx, u, t, j, min(1.0, it / max(args.H, 1)) * (t > args.anchor)
        )
        lv = lv0 + log_var(t).mean(1) if args.adaptive_weight != "off" else None
        loss = loss_scm = scm_loss(
            f,
            g,
            lv,
            lv0 - 2 if args.adaptive_weight == "clamped" else None,
            1 / (SD * t.tan()) if args.prior else None,
        )
        logs = dict(
            scm=loss_scm,
            tangent=norm.mean(),
            jvp=j.flatten(1).norm(dim=1).mean(),
            gap=(SD * f - dx).square().mean(),
            lv=0.0 if lv is None else lv.mean(),
        )
        if args.adv_weight:
            heads.requires_grad_(False)
            loss_gen = gen_loss(logits(heads, seen(fake(y, given), levels(), cond)))
            heads.requires_grad_(True)
            loss = loss + args.adv_weight * loss_gen  # (13)
            logs |= dict(gen=loss_gen)
        loss.backward()
        run.average_gradients(params_g)
        logs |= dict(grad_student=run.step(opt_g, args.clip))
        ema.update(run.images_stepped)

        # the heads
        if args.adv_weight:
            y, other, cond, given, _ = batch(2 * it + 1)
            with torch.no_grad():
                s = levels()
                again = lambda: s if args.d_levels == "same" else levels()
                parts = [
                    seen(fake(y, given), s, cond),
                    *([seen(other, again(), cond)] if args.misaligned else []),
                    seen(y, again(), cond),
                ]
            heads.train()
            l_fake, l_real = logits(heads, [torch.cat(maps) for maps in zip(*parts)]).split(
                [len(y) * (len(parts) - 1), len(y)]
            )
            heads.eval()
            loss_heads = heads_loss(l_fake, l_real)
            loss_heads.backward()
            run.average_gradients(params_c)
            logs |= dict(
                heads=loss_heads,
                grad_heads=run.step(opt_c, args.clip),
                logit_fake=l_fake.mean(),
                logit_real=l_real.mean(),
            )

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
