"""SANA-Sprint: consistency distillation with a GAN. Chen et al., ICCV 2025, arXiv 2503.09641.

One student serves 1, 2, 3 or 4 steps. Two losses are added. sCM (Lu and Song, arXiv 2410.11081):
along the teacher's guided probability-flow ODE, the student's clean image must not change. A
forward-mode derivative (JVP) of the student follows the ODE exactly, without a solver and without a
target network. LADD: a hinge GAN, whose heads read features of the frozen teacher, makes single
steps sharp. Both need images. Guidance is built in: its scale w is drawn for each sample, enters
the teacher's derivative, and is an input of the student. Any teacher (flow, VP, EDM) is evaluated
in TrigFlow coordinates, which takes no training.

Notation: D(z, alpha, sigma, c) is a network's estimate of the clean x in z = alpha x + sigma eps;
y = x / rho has standard deviation 1. TrigFlow has times t in [0, pi/2] and noisy samples x_t = sd u
with sd = 0.5. c is the label or prompt; w is the guidance scale; eps is fresh unit noise; sg[]
stops gradients.

    u = cos(t) y + sin(t) eps           t = atan(exp(tau) / sd), tau ~ N(P_mean, P_std^2)        (1)
    yhat(u, t, c) = D(rho u, cos t, rho sin t, c) / rho                                          (2)
    F(u, t, c) = (cos(t) u - yhat) / sin(t)             makes the ODE dx_t / dt = sd F           (3)
    dx = sd (F_pre(u, t, null) + w (F_pre(u, t, c) - F_pre(u, t, null)))     F_pre: teacher      (4)
    J = derivative of F(u, t, c, w) along (cos t sin t dx / sd, cos t sin t)    F: student       (5)
    g = -cos^2 t (sd F - dx) - r (cos t sin t x_t + sd J)         r = min(1, iteration / H)      (6)
    g <- g / (|g| + 0.1)                norm over all numbers of a sample                        (7)
    L_scm = mean exp(-lv(t)) (F - sg[F + g])^2 + lv(t)            lv: learned function, or 0     (8)
    fake = yhat(cos(t) y + sin(t) eps, t, c, w)         t as in (1), or pi/2 with probability p  (9)
    l(y) = heads(teacher features of cos(s) y + sin(s) eps)       s as in (1), other mean, std  (10)
    L_gen = -mean l(fake)                                                                       (11)
    L_heads = mean relu(1 - l(y)) / 2 + mean relu(1 + l(sg[fake])) / 2                          (12)
    student: L_scm + w_G L_gen          heads: L_heads, on other images                         (13)

Usage:
    python sana_sprint.py                                     # one step, MNIST, minutes on a CPU
    python sana_sprint.py --nfe 4                             # the same, evaluated in four steps
    python sana_sprint.py --teacher toy                       # 2-D mixture, under a minute
    torchrun --nproc_per_node=8 sana_sprint.py --teacher DIR  # any teacher folder, 8 GPUs

Differences from the paper, variants and results: docs/sana_sprint.md.
"""

import training.interrupt  # noqa: F401  # isort: skip

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm

from common.errors import launch, require
from common.model import ScalarEmbedding
from common.schedules import TrigFlow, add_noise, expand
from common.teachers.load import load_teacher
from common.teachers.students import start_from
from data.images import load_images
from training.ema import EMA
from training.flags import Parser
from training.optim import adamw
from training.report import Report
from training.run import Run

SD = 0.5  # only its ratio to the 0.1 of (7) matters
TRIG = TrigFlow(1.0)
DEPTHS = (0.1, 0.4, 0.7, 0.95)  # of the features in (10); blocks 2, 8, 14, 19 of 20 [C]

# Presets: the flags for a kind of teacher, unless the command line gives others.
# [P] paper, [C] official code, [T] code of others, [O] ours, measured in docs/RESULTS.md.
# `source` is printed at the start; docs/teachers.md has all of them in a table.
SANA = dict(  # [P], but H, clip, warmup [C]; CAME is the optimiser there
    cfg=4.5,
    cfg_train=[4.0, 4.5, 5.0],
    nfe=2,
    p_scm=(0.0, 1.6),
    p_adv=(-0.6, 1.0),
    H=2000,
    anchor=0.0,
    adaptive_weight="full",
    adv_weight=0.5,
    max_time=0.5,
    time="native",
    rho=1.0,  # standard deviation of the teacher's data; None: measured on the images
    lr=2e-6,
    lr_fake=2e-6,
    betas=(0.9, 0.999),
    weight_decay=0.0,
    clip=0.1,
    batch=512,
    iters=20_000,
    warmup=5000,
    cooldown=0.0,
    ema=0,
    source="[P, C]",
)
TOY = dict(  # [O]
    SANA,
    cfg=1.0,
    cfg_train=None,
    nfe=1,
    p_scm=(-0.4, 1.4),
    H=200,
    adaptive_weight="off",  # it is unbounded where the student is right: in 2-D it drifts away
    rho=None,
    lr=1e-3,
    lr_fake=1e-3,
    betas=(0.5, 0.99),
    clip=10.0,
    batch=256,
    iters=800,
    warmup=100,
    cooldown=0.5,
    source="[O]",
)
MNIST = dict(  # [O]
    SANA,
    cfg=1.5,
    cfg_train=[1.25, 1.5, 1.75],
    nfe=1,
    p_scm=(-0.8, 1.6),
    p_adv=(-3.5, 1.0),  # heads must see less noise to see the grain of small images
    H=50,
    anchor=0.2,  # cleaner, the teacher does not see all of the noise
    adaptive_weight="clamped",
    adv_weight=2.0,
    time="dense",
    rho=None,
    lr=3e-4,
    lr_fake=2e-3,
    betas=(0.5, 0.99),
    clip=200.0,
    batch=64,
    iters=1200,
    warmup=20,
    cooldown=0.5,
    ema=2000,
    source="[O]",
)
EMOJI = dict(  # [O]
    SANA,
    cfg=3.5,
    cfg_train=[3.0, 3.5, 4.0],
    H=50,
    lr=1e-4,
    lr_fake=1e-3,
    betas=(0.5, 0.99),
    clip=100.0,
    batch=32,
    iters=350,
    warmup=20,
    cooldown=0.5,
    ema=2000,
    source="[O]",
)
WAN = dict(  # [T] rCM, whose DMD term is LADD here
    SANA,
    cfg=5.0,
    cfg_train=[4.5, 5.0, 5.5],
    nfe=4,
    p_scm=(-0.8, 1.6),
    H=1000,
    lr=2e-6,
    lr_fake=4e-7,
    betas=(0.0, 0.999),
    weight_decay=0.01,
    clip=1e9,  # none
    warmup=0,
    source="[T] rCM; LADD with it is nobody's",
)
WAN14B = dict(WAN, lr=1e-6, lr_fake=1e-7, H=300)  # [T] rCM
LATENTS = dict(  # sCM's ImageNet-512 in latents, without the adversarial loss in its paper
    SANA,
    cfg=1.5,
    cfg_train=[1.0, 1.5, 2.0],
    p_scm=(-0.8, 1.6),
    H=10_000,
    rho=None,
    lr=1e-4,
    lr_fake=1e-4,
    betas=(0.9, 0.99),
    clip=10.0,
    batch=2048,
    iters=200_000,
    warmup=0,
    source="nobody's: sCM's ImageNet-512",
)
CIFAR10 = dict(  # [T] FastGen's sCD, whose losses --adv-weight 0 gives
    LATENTS,
    cfg=1.0,
    cfg_train=None,
    nfe=1,
    p_scm=(-1.0, 1.4),
    rho=0.5,
    clip=1e6,
    batch=512,
    iters=500_000,
    source="[T] FastGen's sCD; LADD with it is nobody's",
)
IMAGENET64 = dict(  # [T] FastGen's sCD
    CIFAR10, p_scm=(-1.0, 1.6), lr=7e-5, lr_fake=7e-5, clip=10.0, batch=1024, iters=600_000
)
# The paper's teachers have dense times and QK norm; SANA itself has neither.
ADAPTED = "[P, C] of the adapted teachers, sana-sprint-teacher"
# For other pipelines: SANA's numbers, guidance of the pipeline and 0.5 on both sides.
OTHER = dict(SANA, source="nobody's: SANA's")
PRESETS = {
    "default": OTHER,
    "toy": TOY,
    "toy-cond": TOY,
    "mnist": MNIST,
    "emoji": EMOJI,
    "emoji-flow": dict(EMOJI, source="nobody's: emoji's"),
    "own": dict(MNIST, source="nobody's: mnist's"),
    "edm-imagenet64": IMAGENET64,
    "edm-cifar10": CIFAR10,
    "dit": LATENTS,
    "sit": LATENTS,
    "sd15": dict(OTHER, cfg=7.5, cfg_train=[7.0, 7.5, 8.0]),
    "sd21": dict(OTHER, cfg=7.5, cfg_train=[7.0, 7.5, 8.0]),
    "sdxl": dict(OTHER, cfg=5.0, cfg_train=[4.5, 5.0, 5.5]),
    "sd3": dict(OTHER, cfg=7.0, cfg_train=[6.5, 7.0, 7.5]),
    "sana": dict(SANA, source=ADAPTED),
    "sana-0.6b": dict(SANA, source=ADAPTED),
    "flux": dict(OTHER, cfg=1.0, cfg_train=None),  # its network has an input for guidance already
    "chroma": dict(OTHER, cfg=5.0, cfg_train=[4.5, 5.0, 5.5]),
    "flux2": dict(OTHER, cfg=1.0, cfg_train=None),
    "flux2-klein": dict(OTHER, cfg=4.0, cfg_train=[3.5, 4.0, 4.5]),
    "hunyuan-image": dict(OTHER, cfg=3.5, cfg_train=[3.0, 3.5, 4.0]),
    "lumina2": dict(OTHER, cfg=4.0, cfg_train=[3.5, 4.0, 4.5]),
    "qwen-image": dict(OTHER, cfg=4.0, cfg_train=[3.5, 4.0, 4.5]),
    "z-image": dict(OTHER, cfg=6.0, cfg_train=[5.5, 6.0, 6.5]),
    "wan2.1": WAN,
    "wan2.1-14b": WAN14B,
    "wan2.2": dict(WAN14B, cfg=4.0, cfg_train=[3.5, 4.0, 4.5], source="nobody's: wan2.1-14b's"),
    "wan2.2-5b": dict(WAN14B, source="nobody's: wan2.1-14b's"),
    "sana-video": dict(OTHER, cfg=6.0, cfg_train=[5.5, 6.0, 6.5]),
    "ltx-video": dict(OTHER, cfg=3.0, cfg_train=[2.5, 3.0, 3.5]),
    "hunyuanvideo-1.5": dict(OTHER, cfg=6.0, cfg_train=[5.5, 6.0, 6.5]),
}


def parse_args(argv=None):
    p = Parser(__doc__, critic=True, images=True, lora_fake=False)
    add = p.method.add_argument
    add("--steps", metavar="T,...", help="times of the steps, in the teacher's own time [paper's]")
    add("--cfg-train", type=float, nargs="+", metavar="W", help="scales w of (4) [that of --cfg]")
    add("--p-scm", type=float, nargs=2, metavar="X", help="P_mean and P_std of (1)")
    add("--p-adv", type=float, nargs=2, metavar="X", help="the same of s in (10)")
    add("--H", type=int, help="iterations until r of (6) is 1")
    add("--anchor", type=float, help="least t of (1), (9); there r = 0: the student is the teacher")
    add("--adaptive-weight", choices=["off", "clamped", "full"], help="learned weight lv of (8)")
    add("--adv-weight", type=float, help="weight w_G of the GAN loss in (13); 0: sCM alone")
    add("--max-time", type=float, help="probability p of t = pi/2 in (9)")
    add("--time", choices=["native", "dense"], help="dense: fit the time embedding to 0..1 first")
    args = p.parse(PRESETS, argv)
    args.cfg_train = args.cfg_train or [args.cfg]
    scales = " ".join(map(str, args.cfg_train))
    within = min(args.cfg_train) <= args.cfg <= max(args.cfg_train)
    require(within, f"--cfg: expected a scale within --cfg-train {scales}, found {args.cfg}")
    for flag, (_, std) in (("--p-scm", args.p_scm), ("--p-adv", args.p_adv)):
        require(std >= 0, f"{flag}: expected a mean and a deviation >= 0, found {std}")
    if args.smoke:
        args.H = min(args.H, 2)  # r = 0, a half, 1
    require(args.H >= 0, f"--H: expected a number >= 0, found {args.H}")
    require(
        args.H < args.iters,
        f"--H {args.H}: expected less than --iters {args.iters}, or r of (6) never reaches 1",
    )
    ok = 0 <= args.anchor < 1.5
    require(ok, f"--anchor: expected a time in [0, 1.5), found {args.anchor}")
    ok = 0 <= args.max_time <= 1
    require(ok, f"--max-time: expected a probability, found {args.max_time}")
    ok = args.adv_weight >= 0
    require(ok, f"--adv-weight: expected a number >= 0, found {args.adv_weight}")
    return args


# ---- networks ------------------------------------------------------------------------------------


class Head(nn.Module):
    """GAN head: a logit for each place of a feature map [B, C, H, W], or [B, C] for points.

    Spectral norm everywhere. Its power iteration runs in train mode only, so not in (11).
    """

    def __init__(self, feature):
        super().__init__()
        c = feature.shape[1]
        self.first = nn.Sequential(spectral_layer(feature, c, 1), group_norm(c), nn.LeakyReLU(0.2))
        self.second = nn.Sequential(spectral_layer(feature, c, 3), group_norm(c), nn.LeakyReLU(0.2))
        self.last = spectral_layer(feature, 1, 1)

    def forward(self, feature):
        h = self.first(feature.float())
        h = (h + self.second(h)) / math.sqrt(2)
        return self.last(h).flatten(1)  # [B, places]


def spectral_layer(feature, channels, width):
    """A convolution for maps like `feature`, or a linear layer for points."""
    c = feature.shape[1]
    if feature.ndim == 2:
        return spectral_norm(nn.Linear(c, channels))
    return spectral_norm(nn.Conv2d(c, channels, width, padding=width // 2))


def group_norm(c):
    """Up to 32 groups of at least 4 channels: at 1 x 1, a group of one number would become 0."""
    return nn.GroupNorm(math.gcd(32, max(c // 4, 1), c), c)


class Heads(nn.ModuleList):
    """One head for each feature map."""

    def forward(self, features):
        logits = [head(feature) for head, feature in zip(self, features, strict=True)]
        return torch.cat(logits, 1)  # (10) [B, places of all maps]


def with_dense_time(teacher, args):
    """The teacher with its time embedding fitted to times of 0..1.

    The fast waves of an embedding of 0..1000, which a derivative along t magnifies, are gone.
    """
    if getattr(teacher, "dense", False):
        return teacher
    require(
        hasattr(teacher, "adapt"),
        "--time dense: expected a teacher made by recipes/pretrain.py, which can be fitted, or one "
        f"that has dense times, as sana-sprint-teacher, found {args.teacher}; use --time native",
    )
    require(not args.lora, "--time dense: --lora keeps the network's weights; use --time native")
    return teacher.copy().adapt().fit_time().requires_grad_(False)


# ---- TrigFlow coordinates ------------------------------------------------------------------------


def data_std(images, teacher, device):
    """rho: standard deviation of the teacher's samples, from 2000 images."""
    some = images.images[images.order(0, 0)[:2000]]
    return round(float(teacher.encode_images(some.to(device)).std()), 4)


def noisy(y, t, eps):
    """u of (1). t: 0-d or [B], float64. No noise at t = 0 and no signal at pi/2, exactly."""
    return add_noise(y, TRIG.alpha(t), TRIG.sigma(t), eps)  # (1)


def random_times(normal, mean, std, low, high):
    """t of (1) from unit noise [B], within the times that the teacher knows."""
    return torch.atan(torch.exp(mean + std * normal.double()) / SD).clamp(low, high)  # (1)


def time_range(schedule, rho):
    """Cleanest and noisiest t of a teacher; at least 1e-3, because (3) becomes 0 / 0."""
    low, high = trig_times(schedule, rho, (schedule.t_min, schedule.t_max))
    return max(low, 1e-3), high


def trig_times(schedule, rho, times):
    """TrigFlow times, a list, with the same SNR as `times` of a schedule."""
    pairs = [(float(schedule.sigma(t)), rho * float(schedule.alpha(t))) for t in times]
    return [math.atan2(sigma, alpha) for sigma, alpha in pairs]


def clean(model, u, t, cond, rho):
    """yhat of (2)."""
    return model(rho * u, TRIG.alpha(t), rho * TRIG.sigma(t), cond) / rho  # (2)


def velocity(model, u, t, cond, rho):
    """F of (3) of any network, in the dtype of u. t: [B], float64, in (0, pi/2]."""
    yhat = clean(model, u, t, cond, rho)
    return ((expand(TRIG.alpha(t), u) * u - yhat) / expand(t.sin(), u)).to(u.dtype)  # (3)


# ---- few-step sampling ---------------------------------------------------------------------------

PAPER_TIMES = {  # there are none for three steps
    1: [math.pi / 2],
    2: [math.atan(200 / SD), 1.3],
    4: [math.atan(200 / SD), 1.3, 1.1, 0.6],
}


def sample_times(schedule, rho, n, text=None):
    """TrigFlow times of an n-step sampler, from noise to data, float64 [n].

    The paper's, or evenly spaced as in the official scheduler. text: of --steps.
    """
    if text is None:
        times = PAPER_TIMES.get(n) or [math.pi / 2 * (1 - k / n) for k in range(n)]
    else:
        times = trig_times(schedule, rho, parse_steps(schedule, n, text))
    high = time_range(schedule, rho)[1]
    return torch.tensor(times, dtype=torch.float64).clamp(max=high)


def parse_steps(schedule, n, text):
    """n falling times of a schedule, from the text of --steps."""
    try:
        times = [float(t) for t in text.split(",")]
    except ValueError:
        times = []
    falling = len(times) == n and times == sorted(set(times), reverse=True)
    ok = falling and schedule.t_min < times[-1] and times[0] <= schedule.t_max
    span = f"above {schedule.t_min:g}, up to {schedule.t_max:g}"
    require(ok, f"--steps {text}: expected {n} falling times {span} (--nfe {n})")
    return times


@torch.no_grad()
def sample(student, z, cond, nfe, noise, steps=None, rho=1.0, cfg=None):
    """n-step sampler: denoise, add fresh noise at the next level, repeat. -> x [B, *shape].

    z: unit noise [B, *shape]. noise(): more of it. steps: text of --steps. cfg: w, an input of
    students that were trained with several.
    """
    times = sample_times(student.schedule, rho, nfe, steps)
    if cfg is not None:
        cond = student_cond(cond, torch.full((len(z),), cfg, device=z.device))
    y = clean(student, z, times[0], cond, rho)
    for t in times[1:]:
        y = clean(student, noisy(y, t, noise()), t, cond, rho)
    return rho * y


def student_cond(cond, w):
    """cond with the guidance scale w [B] as an input of order one."""
    return cond | dict(guidance=0.1 * w)


# ---- losses --------------------------------------------------------------------------------------


@torch.no_grad()
def teacher_derivative(teacher, u, t, cond, rho, w):
    """dx of (4) [B, *shape]. w: [B], or None for no guidance, in one pass instead of two."""
    f = velocity(teacher, u, t, cond, rho)
    if w is None:
        return SD * f
    f_null = velocity(teacher, u, t, teacher.unconditional(cond, len(u)), rho)
    return SD * (f_null + expand(w, u) * (f - f_null)).to(u.dtype)  # (4)


@torch.no_grad()
def student_derivative(student, u, t, cond, rho, dx):
    """J of (5) [B, *shape], without graph, in fp32 whatever the other passes are in.

    The factor cos t sin t is part of the direction, because dF/dt alone overflows near t = 0. Fused
    attention has no forward-mode derivative; plain attention replaces it here only.
    """
    factor = t.cos() * t.sin()
    direction = ((expand(factor, u) * dx / SD).to(u.dtype), factor)
    dtype = student.dtype
    student.dtype = torch.float32
    try:
        with sdpa_kernel(SDPBackend.MATH):
            f = lambda u, t: velocity(student, u, t, cond, rho)
            return torch.func.jvp(f, (u, t), direction)[1]  # (5)
    finally:
        student.dtype = dtype


def tangent(f, dx, u, t, j, r):
    """g of (7) [B, *shape] and the norm [B] of g of (6). At r = 1, (6) is cos t d(sd yhat)/dt.

    f: F of the student without graph, where J was computed. r: a number or [B].
    """
    cos, sin = expand(t.cos(), u), expand(t.sin(), u)
    g = -(cos**2) * (SD * f - dx) - expand(r, u) * (cos * sin * SD * u + SD * j)  # (6)
    norm = g.flatten(1).norm(dim=1)
    return (g / (expand(norm, g) + 0.1)).to(u.dtype), norm  # (7)


def scm_loss(f, g, lv=None, floor=None):
    """f: F with graph. g: of (7). lv: [B], or None for no weight.

    floor: lower bound of lv in the weight. lv is then learned on the same errors, apart from F.
    """
    square = (f - f.detach() - g.detach()).square().flatten(1).mean(1)
    if lv is None:
        return square.mean()
    if floor is None:
        return ((-lv).exp() * square + lv).mean()  # (8)
    weighted = (-lv.detach().clamp(min=floor)).exp() * square
    learned = (-lv).exp() * square.detach() + lv
    return weighted.mean() + learned.mean()


def gen_loss(logit_fake):
    return -logit_fake.mean()  # (11)


def heads_loss(logit_fake, logit_real):
    return 0.5 * F.relu(1 - logit_real).mean() + 0.5 * F.relu(1 + logit_fake).mean()  # (12)


# ---- training ------------------------------------------------------------------------------------


def main():
    args = parse_args()
    run = Run(__file__, args)
    load = run.teacher_kwargs(students=1)
    loaded = load_teacher(args.teacher, run.device, run.dtype, **load)
    teacher = with_dense_time(loaded, args) if args.time == "dense" else loaded
    schedule = teacher.schedule
    images = load_images(args.data, teacher, run.print)

    # TrigFlow coordinates: deviation of the data, range of times, times of the steps.
    rho = args.rho or data_std(images, teacher, run.device)
    low, high = time_range(schedule, rho)
    least = max(low, args.anchor)
    times = sample_times(schedule, rho, args.nfe, args.steps)

    # Guidance: scales w of (4). If there are several, w is an input of the student.
    scales = torch.tensor(args.cfg_train)
    several = len(scales) > 1
    guided = args.cfg_train != [1.0]

    # Networks: the student starts as the teacher; heads, lv and the input for w start from scratch.
    torch.manual_seed(args.seed)  # equal on all processes
    student = teacher.copy(args.lora)
    if several:
        student.extend("guidance")
    if args.start and not args.resume:
        start_from(args.start, teacher, student, say=run.print)
    zeros = torch.zeros(1, *teacher.shape, device=run.device)
    features = teacher(zeros, 1.0, 1.0, teacher.encode([0]), features=DEPTHS)
    heads = run.to_device(Heads(map(Head, features)).eval())
    log_var = run.to_device(ScalarEmbedding(32))  # lv = lv0 + the mean of its output
    lv0 = -math.log(math.prod(teacher.shape))  # log of the mean square of g for |g| = 1
    student_net = run.train(student, ddp=False)  # a JVP bypasses DDP's hooks: `average_gradients`
    trained = nn.ModuleList([student, log_var])
    opt_g = adamw(trained, args.lr, args)
    opt_h = adamw(heads, args.lr_fake, args)
    ema = EMA(student, args.ema, args.ema_cpu)
    sampler = dict(rho=rho, steps=args.steps, cfg=args.cfg if several else None)
    report = Report(run, teacher, ema, sample, sampler)
    steps = " ".join(f"{t:.4g}" for t in times.tolist())
    facts = dict(
        guidance=f"w = {args.cfg:g}, trained for {' '.join(f'{w:g}' for w in args.cfg_train)}",
        steps=f"{args.nfe} at TrigFlow's t = {steps}",
        times=f"{low:.4f} to {high:.4f}; deviation of the data {rho:.4g}",
    )
    run.print_summary(images, student=student, heads=heads, teacher=teacher, **facts)

    state = dict(student=student, opt_g=opt_g, ema=ema, heads=heads, opt_h=opt_h, log_var=log_var)
    if teacher is not loaded:
        state["teacher"] = teacher  # its fitted time embedding
    first = run.resume(state)
    it = first - 1  # if no iteration is left
    for it in run.loop(first, args.iters, show=["scm", "gen", "heads"]):
        draw = run.draw(it)
        run.set_rates(it, (opt_g, args.lr), (opt_h, args.lr_fake))
        logs = {}

        def batch(i):
            """y, cond and w of images that are drawn twice an iteration."""
            x_real, cond = images.samples(run, teacher, i)
            return x_real / rho, cond, scales[draw.randint(0, len(scales))]

        def fake_sample(y, cond, w):
            at_end = draw.rand() < args.max_time
            t = torch.where(at_end, high, random_times(draw.randn(), *args.p_scm, least, high))
            u = noisy(y, t, draw.randn_like(y))
            return clean(student_net, u, t, student_cond(cond, w), rho)  # (9)

        def features_of(y, s, cond):
            """Teacher features of y with noise at the times s [B]."""
            u = noisy(y, s, draw.randn_like(y))
            return teacher(rho * u, s.cos(), rho * s.sin(), cond, features=DEPTHS)

        # Student, sCM. Its times stay below pi/2, where cos t = 0.
        y, cond, w = batch(2 * it)
        t = random_times(draw.randn(), *args.p_scm, least, min(high, math.pi / 2 - 1e-4))
        u = noisy(y, t, draw.randn_like(y))
        dx = teacher_derivative(teacher, u, t, cond, rho, w if guided else None)
        j = student_derivative(student, u, t, student_cond(cond, w), rho, dx)
        f = velocity(student_net, u, t, student_cond(cond, w), rho)
        r = min(1.0, it / max(args.H, 1)) * (t > args.anchor)
        g, norm = tangent(f.detach(), dx, u, t, j, r)
        lv = None if args.adaptive_weight == "off" else lv0 + log_var(t).mean(1)
        floor = lv0 - 2 if args.adaptive_weight == "clamped" else None
        loss_scm = scm_loss(f, g, lv, floor)
        loss = loss_scm
        logs |= dict(scm=loss_scm, tangent=norm.mean(), jvp=j.flatten(1).norm(dim=1).mean())
        logs |= dict(gap=(SD * f - dx).square().mean(), lv=0.0 if lv is None else lv.mean())

        # Student, LADD.
        if args.adv_weight:
            heads.requires_grad_(False)  # not no_grad: (11) must reach the fake through the heads
            fake = fake_sample(y, cond, w)
            s = random_times(draw.randn(), *args.p_adv, low, high)
            loss_gen = gen_loss(heads(features_of(fake, s, cond)))
            loss = loss + args.adv_weight * loss_gen  # (13)
            logs |= dict(gen=loss_gen)
            heads.requires_grad_(True)
        loss.backward()
        run.average_gradients(trained.parameters())
        grad_student = run.step(opt_g, args.clip)  # clip, step, zero the gradients
        logs |= dict(grad_student=grad_student)
        ema.update(run.images_stepped)

        # Heads, on other images. Fake and real have the same levels.
        if args.adv_weight:
            y, cond, w = batch(2 * it + 1)
            s = random_times(draw.randn(), *args.p_adv, low, high)
            with torch.no_grad():
                fakes = features_of(fake_sample(y, cond, w), s, cond)
                reals = features_of(y, s, cond)
            heads.train()
            both = [torch.cat(pair) for pair in zip(fakes, reals)]
            logit_fake, logit_real = heads(both).chunk(2)
            heads.eval()
            loss_heads = heads_loss(logit_fake, logit_real)
            loss_heads.backward()
            run.average_gradients(heads.parameters())
            grad_heads = run.step(opt_h, args.clip)
            logs |= dict(heads=loss_heads, grad_heads=grad_heads)
            logs |= dict(logit_fake=logit_fake.mean(), logit_real=logit_real.mean())

        run.after(it, logs, state, report)

    run.finish(it, state, report)
    report.end(it + 1)


if __name__ == "__main__":
    launch(main)
