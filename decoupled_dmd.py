"""Decoupled DMD. Liu et al., ICLR 2026, arXiv 2511.22677.

DMD2 (dmd2.py) moves the student along r - f, where r is the guided teacher's estimate of the clean
sample, and f the estimate of a critic that is trained on the student's own samples. This difference
is a sum of two terms:

    r - f = (c - f) + (w - 1) (c - u)

The first is distribution matching (DM): it keeps the student close to the unguided teacher. The
second is CFG augmentation (CA): it makes few steps look sharp, and has no fixed point of its own.
The method evaluates each term at its own noisy copy of the sample, CA only at levels with less
noise than the student's input, DM at all levels.

Notation: x_t = alpha_t x + sigma_t eps, with more noise at larger t (the paper's time runs the
other way); c, u and f are estimates of the clean x; y is the label or prompt; w is the guidance
scale --cfg; sg[] stops gradients.

    x = G(x_in, t_k, y)                          k ~ U{0..n-1}, one draw for the whole batch    (1)
    x_in = alpha_k xhat + sigma_k eps            xhat: the student's own output after k steps   (2)
    c, u, f                                      teacher with and without y, critic with y      (3)
    g_ca = (w - 1) (u - c) / N_ca                at t = t_ca                                    (4)
    g_dm = (f - c) / N_dm                        at t = t_dm                                    (5)
    N_ca, N_dm = max(mean|x - c|, floor)         mean over a sample's pixels, c at the term's t (6)
    t_ca, t_dm: --levels                                                                        (7)
        hybrid          t_ca < t_k, t_dm any
        full            both any
        constrained     both < t_k
        shared          t_ca = t_dm any, one noisy copy: this is DMD2
    L = 1/2 mean (x - sg[x - g_ca - g_dm])^2     so that dL/dx = (g_ca + g_dm) / numel(x)       (8)
    L_fake = mean lambda_t (f - sg[x])^2         t any, for every choice of (7)                 (9)
    L_mom = mean 1/2 (q - 1 - log(s2 / V))       q = (s2 + (m - M)^2) / V                      (10)
        m, s2; M, V     mean and variance of a sample's pixels; of real images
    l(x) = head(critic features of x_t)          t any                                         (11)
    L_gen = mean softplus(-l(x))                                                               (12)
    L_cls = mean softplus(l(sg[x])) + mean softplus(-l(x_real))                                (13)
    student: L + L_mom + w_G L_gen               critic and head: L_fake + w_D L_cls           (14)

Usage:
    python decoupled_dmd.py                                      # one step, MNIST, minutes on a CPU
    python decoupled_dmd.py --nfe 4 --levels shared              # four steps of plain DMD2
    python decoupled_dmd.py --teacher toy                        # 2-D mixture, under a minute
    torchrun --nproc_per_node=8 decoupled_dmd.py --teacher DIR   # any teacher folder, 8 GPUs

Differences from the paper, variants and results: docs/decoupled_dmd.md.
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
LEVELS = ["hybrid", "full", "constrained", "shared"]
REGULARISERS = ["dm", "moments", "none"]

# Presets: the flags for a kind of teacher, unless the command line gives others.
# [P] paper, [C] DMD2's code, [A] answer of an author, [T] code of others, [O] ours, measured in
# docs/RESULTS.md. `source` is printed at the start; docs/teachers.md has all of them in a table.
FOUR_STEPS = dict(  # SDXL [C]
    cfg=8.0,
    nfe=4,
    lr=5e-7,
    lr_fake=5e-7,
    betas=(0.9, 0.999),
    ratio=5,
    batch=128,
    iters=20_000,
    warmup=500,
    cooldown=0.0,
    ema=0,
    shift=1.0,
    floor=1e-8,
    gan_weight=5e-3,
    cls_weight=1e-2,
    source="[P, C]",
)
TOY = dict(  # [O]
    FOUR_STEPS,
    cfg=1.0,
    nfe=1,
    lr=5e-4,
    lr_fake=1e-3,
    batch=256,
    iters=3000,
    warmup=0,
    cooldown=0.5,
    floor=0.05,
    gan_weight=3e-3,
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
    iters=1200,
    warmup=20,
    cooldown=0.5,
    ema=2000,
    shift=0.3,  # less noise: fewer speckles in the background
    floor=0.05,
    gan_weight=0.03,
    cls_weight=0.1,
    source="[O]",
)
EMOJI = dict(MNIST, cfg=3.5, nfe=4, lr=1e-4, lr_fake=1e-4, batch=32, iters=600, shift=1.0)  # [O]
SD15 = dict(  # [T] AaronCaoZJ's model card
    FOUR_STEPS,
    cfg=3.0,
    lr=1e-5,
    lr_fake=1e-5,
    batch=64,  # nobody's
    iters=10_000,
    source="[T] AaronCaoZJ, batch nobody's",
)
SD3 = dict(  # [T] CDM, which has a third term; its guidance 7 is of CA alone, so w = 8
    FOUR_STEPS,
    cfg=8.0,
    lr=1e-5,
    lr_fake=5e-6,
    weight_decay=1e-4,
    ratio=2,
    batch=128,
    iters=4000,
    warmup=100,
    ema=90_000,  # 0.999 per step
    clip=1.0,
    floor=0.1,
    source="[T] CDM",
)
QWEN = dict(  # [A] Qwen-Image-Lightning. As LoRA: --lora 64 --lora-alpha 8 --lr 5e-5
    FOUR_STEPS,
    cfg=4.0,
    lr=2e-7,
    lr_fake=1e-5,
    betas=(0.0, 0.999),
    batch=32,  # nobody's
    iters=10_000,
    warmup=0,
    clip=1.0,
    source="[A] Qwen-Image-Lightning, batch nobody's",
)
IMAGENET = dict(FOUR_STEPS, nfe=1, clip=1.0, source="nobody's: dmd2's")
LATENTS = dict(IMAGENET, cfg=1.5, lr=2e-5, lr_fake=2e-5, batch=512, iters=100_000)
PIXELS = dict(  # without guidance there is no CA: this is dmd2.py
    IMAGENET, cfg=1.0, lr=2e-6, lr_fake=2e-6, batch=280, iters=200_000, clip=10.0
)
PRESETS = {
    "default": dict(FOUR_STEPS, source="nobody's: SDXL's"),
    "toy": TOY,
    "toy-cond": dict(TOY, cfg=2.0, nfe=4),
    "mnist": dict(MNIST, moments=(-0.737, 0.374)),
    "emoji": EMOJI,
    "emoji-flow": dict(EMOJI, source="nobody's: emoji's"),
    "own": dict(MNIST, shift=1.0, source="nobody's: mnist's"),
    "edm-imagenet64": PIXELS,
    "edm-cifar10": PIXELS,
    "dit": LATENTS,
    "sit": LATENTS,
    "sd15": SD15,
    "sd21": dict(SD15, source="nobody's: sd15's"),
    "sdxl": dict(FOUR_STEPS, moments=(0.075, 0.81)),  # moments [P] of this VAE
    "sd3": SD3,
    "sana": dict(SD3, cfg=4.5, source="nobody's: sd3's"),
    "sana-0.6b": dict(SD3, cfg=4.5, source="nobody's: sd3's"),
    "flux": dict(SD3, cfg=1.0, source="nobody's: sd3's; no CA, rather dmd2.py"),
    "chroma": dict(SD3, cfg=5.0, source="nobody's: sd3's"),
    "flux2": dict(SD3, cfg=1.0, source="nobody's: sd3's; no CA, rather dmd2.py"),
    "flux2-klein": dict(SD3, cfg=4.0, source="nobody's: sd3's"),
    "hunyuan-image": dict(SD3, cfg=3.5, source="nobody's: sd3's"),
    "lumina2": dict(SD3, cfg=4.0, source="4 steps [P], the rest nobody's: sd3's"),
    "qwen-image": QWEN,
    "z-image": dict(SD3, cfg=6.0, nfe=8, source="8 steps [P], the rest nobody's: sd3's"),
    "wan2.1": dict(SD3, cfg=5.0, source="nobody's: sd3's"),
    "wan2.1-14b": dict(SD3, cfg=5.0, source="nobody's: sd3's"),
    "wan2.2": dict(SD3, cfg=4.0, source="nobody's: sd3's"),
    "wan2.2-5b": dict(SD3, cfg=5.0, source="nobody's: sd3's"),
    "sana-video": dict(SD3, cfg=6.0, source="nobody's: sd3's"),
    "ltx-video": dict(SD3, cfg=3.0, source="nobody's: sd3's"),
    "hunyuanvideo-1.5": dict(SD3, cfg=6.0, source="nobody's: sd3's"),
}


def parse_args(argv=None):
    p = Parser(__doc__, critic=True, images=True, small=True)
    add = p.method.add_argument
    add("--step-indices", metavar="I,...", help="grid indices of the steps, e.g. 999,749,499,249")
    add("--ratio", type=int, help="critic steps per student step")
    add("--levels", choices=LEVELS, default="hybrid", help="noise levels of the two terms (7)")
    add("--shift", type=float, help="factor on sigma / alpha of all levels drawn in (7), (9), (11)")
    add("--floor", type=float, help="least normaliser (6)")
    add("--regulariser", choices=REGULARISERS, default="dm", help="beside CA: dm (5), moments (10)")
    add("--moments", type=float, nargs=2, metavar=("M", "V"), help="M and V in (10)")
    add("--gan", action="store_true", help="add the GAN losses (12) and (13), which need images")
    add("--gan-weight", type=float, help="weight w_G of (12) in (14)")
    add("--cls-weight", type=float, help="weight w_D of (13) in (14)")
    args = p.parse(PRESETS, argv)
    require(args.ratio >= 1, f"--ratio: expected at least 1, found {args.ratio}")
    require(args.shift > 0, f"--shift: expected a number > 0, found {args.shift}")
    require(args.floor > 0, f"--floor: expected a number > 0, found {args.floor}")
    if args.regulariser != "dm":
        check_without_dm(args)
        if not args.gan:
            args.ratio = 1  # no critic to train: every iteration is a student step
    unused = args.data and not args.gan and not args.from_image
    require(not unused, f"--data {args.data}: this run uses no images; add --gan")
    return args


def check_without_dm(args):
    """UserError if a flag contradicts --regulariser moments or none."""
    flag = f"--regulariser {args.regulariser}"
    require(args.cfg != 1, f"{flag}: --cfg 1 switches CA off too; give another --cfg")
    ok = args.levels in ("hybrid", "full")
    require(ok, f"{flag}: --levels {args.levels} sets the levels of DM, which is off")
    if args.regulariser == "moments":
        require(args.moments, f"{flag}: add --moments M V, mean and variance of real samples")
        ok = 0 < args.moments[1] < math.inf
        require(ok, f"--moments: expected a mean and a variance > 0, found {args.moments}")


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
    """f and the head in one module, so that one DDP wrapper averages both gradients."""

    def __init__(self, fake):
        super().__init__()
        self.fake = fake
        self.head = None  # with --gan

    def forward(self, x_t, alpha, sigma, cond, logit=False):
        if logit:
            features = self.fake(x_t, alpha, sigma, cond, features=True)
            return self.head(features[-1])  # (11)
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


# ---- noise levels of the two terms ---------------------------------------------------------------


def term_levels(schedule, grid):
    """Levels of CA and DM: a grid [N], of which the indices low..high-1 are drawn.

    As in DMD2, the levels near both ends are left out. Those of flow teachers are clamped instead:
    after a time shift, index 20 of 1000 may be far from the level 0.02.
    """
    if schedule.config["name"] == "flow":
        return grid.clamp(0.02, 0.98), 0, N
    return grid, 20, 981


def count_cleaner(schedule, grid, indices):
    """For each step of the student: how many levels of the grid have less noise than its input."""
    times = schedule.grid(N)[indices]
    snr_of_steps = (schedule.alpha(times) / schedule.sigma(times)) ** 2
    snr_of_grid = (schedule.alpha(grid) / schedule.sigma(grid)) ** 2
    counts = [int((snr_of_grid > snr).sum()) for snr in snr_of_steps]
    if indices[0] == N - 1:
        counts[0] = N  # the input is pure noise; a --shift above 1 goes beyond its nominal level
    return counts


def draw_levels(levels, randint, low, high, cleaner):
    """Indices t_dm, t_ca [B] of both terms' levels in the grid of `term_levels`.

    randint(a, b): uniform integers [B] in a..b-1. cleaner: of the student's step (`count_cleaner`).
    """
    below = max(min(cleaner, high), low + 1)  # never empty: a step below all levels gets the lowest
    t_dm = randint(low, below if levels == "constrained" else high)
    if levels == "shared":
        return t_dm, t_dm
    t_ca = randint(low, high if levels == "full" else below)  # (7)
    return t_dm, t_ca


# ---- losses --------------------------------------------------------------------------------------


def in_one_pass(net, calls):
    """Calls (x_t, alpha, sigma, cond) of one network, made as one pass over the joined batch."""
    x_t, alpha, sigma, conds = zip(*calls)
    cond = {name: torch.cat([c[name] for c in conds]) for name in conds[0]}
    return net(torch.cat(x_t), torch.cat(alpha), torch.cat(sigma), cond).chunk(len(calls))


def mean_abs(x):
    """Mean |x| over the pixels of each sample, [B]."""
    return x.abs().flatten(1).mean(1)


def divide(x, norm):
    """x [B, *shape] / norm [B]. 0 / 0 is 0; a nan stays, so that the step is skipped."""
    safe = norm.where(norm != 0, math.inf)
    return x / safe.view(-1, *[1] * (x.ndim - 1))


@torch.no_grad()
def gradients(x, ca, dm, cond, teacher, fake, cfg, floor):
    """(4), (5) [B, *shape] and their normalisers (6) [B], without graph: g_ca, g_dm, n_ca, n_dm.

    x: samples of the student. ca, dm: the noisy copies x_t, alpha [B], sigma [B] of the two terms;
    None leaves a term out. If both are the same object, the teacher is evaluated on it once, and
    both terms get DMD2's normaliser, which has no floor.
    """
    # c and u at t_ca, c at t_dm: all from one pass of the teacher
    calls = []
    if ca is not None:
        calls += [(*ca, cond), (*ca, teacher.unconditional(cond, len(x)))]
    if dm is not None and dm is not ca:
        calls += [(*dm, cond)]
    estimates = in_one_pass(teacher, calls)  # (3)

    c_ca = u = c_dm = f = x  # of a term that is left out: makes its gradient 0
    if ca is not None:
        c_ca, u = estimates[:2]
    if dm is not None:
        c_dm = c_ca if dm is ca else estimates[-1]
        f = fake(*dm, cond)  # (3)

    if dm is ca:
        n_ca = n_dm = mean_abs(x - (u + cfg * (c_dm - u)))
    else:
        n_ca = mean_abs(x - c_ca).clamp(min=floor)  # (6)
        n_dm = mean_abs(x - c_dm).clamp(min=floor)  # (6)
    g_ca = divide((cfg - 1) * (u - c_ca), n_ca)  # (4)
    g_dm = divide(f - c_dm, n_dm)  # (5)
    return g_ca, g_dm, n_ca, n_dm


@torch.no_grad()
def cosine(x, g_ca, g_dm, n_ca, n_dm):
    """Cosine of the two terms of each sample, [B]; nan where one of them, times its normaliser, is
    below 0.1 % of mean |x|. So small a difference of two estimates is rounding (label and null
    condition agree, or the critic is the teacher), and its direction means nothing."""
    least = 1e-3 * mean_abs(x)
    exact = (mean_abs(g_ca) * n_ca > least) & (mean_abs(g_dm) * n_dm > least)
    cos = F.cosine_similarity(g_ca.flatten(1), g_dm.flatten(1))
    return cos.where(exact, math.nan)


def dm_loss(x, g):
    return 0.5 * F.mse_loss(x, (x - g).detach())  # (8)


def fake_loss(prediction, x, weight):
    """weight: lambda_t [B], which makes this the loss that the teacher was trained with."""
    error = prediction - x.detach()
    return (expand(weight, x).to(x.dtype) * error.square()).mean()  # (9)


def moments_loss(x, mean, var):
    m = x.flatten(1).mean(1)  # [B]
    s2 = x.flatten(1).var(1, correction=0)  # [B]
    q = (s2 + (m - mean) ** 2) / var
    return 0.5 * (q - 1 - (s2 / var).log()).mean()  # (10)


def gen_loss(logit_fake):
    return F.softplus(-logit_fake).mean()  # (12)


def cls_loss(logit_fake, logit_real):
    return F.softplus(logit_fake).mean() + F.softplus(-logit_real).mean()  # (13)


# ---- training ------------------------------------------------------------------------------------


def main():
    args = parse_args()
    indices = step_indices(args.nfe, args.step_indices)
    run = Run(__file__, args)
    load = run.teacher_kwargs(students=1, critics=1)
    teacher = load_teacher(args.teacher, run.device, run.dtype, **load)
    schedule = teacher.schedule

    # Noise levels: those of the student's steps, and the grid from which all others are drawn. They
    # may depend on the size, which several --size change; how many are cleaner does not.
    times = schedule.grid(N)[indices]
    grid = shifted_grid(schedule, N, args.shift)
    _, low, high = term_levels(schedule, grid)
    cleaner = count_cleaner(schedule, grid, indices)

    # The parts of this run.
    use_ca = args.cfg != 1  # at w = 1, (4) is 0
    use_dm = args.regulariser == "dm"
    use_critic = use_dm or args.gan
    floor = 0.0 if args.levels == "shared" else args.floor  # DMD2 has none

    # Networks: student and critic start as the teacher or as another run's, the head from scratch.
    images = load_images(args.data, teacher, run.print) if args.gan else None
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
    if args.cfg == 1:
        facts["terms"] = "DM alone, as in dmd2.py: without guidance there is no CA"
    run.print_summary(images, student=student, critic=critic, teacher=teacher, **facts)

    state = dict(student=student, opt_g=opt_g, ema=ema, critic=critic, opt_c=opt_c)
    first = run.resume(state)
    it = first - 1  # if no iteration is left
    for it in run.loop(first, args.iters, show=["ca", "dm", "fake"]):
        draw = run.draw(it)
        times = schedule.grid(N)[indices]  # of this iteration's size
        grid = shifted_grid(schedule, N, args.shift)
        term_grid, _, _ = term_levels(schedule, grid)
        run.set_rates(it, (opt_g, args.lr), (opt_c, args.lr_fake))
        cond = teacher.random_cond(draw)
        if images:
            x_real, cond_real = images.samples(run, teacher, it)
        logs = {}

        def noised(x, t):
            """x_t, alpha, sigma of x at the times t [B]."""
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            return add_noise(x, alpha, sigma, draw.randn_like(x)), alpha, sigma

        # Sample of the student. One forward pass serves both turns.
        student_turn = it % args.ratio == 0
        k = draw.shared_randint(0, args.nfe)  # on all processes, for equally many passes
        alpha_k, sigma_k = schedule.alpha(times[k]), schedule.sigma(times[k])
        noise = lambda: draw.randn(*teacher.shape)
        x_in = backward_simulation(student, schedule, times, k, cond, noise(), noise)
        if student_turn:
            x = student_ddp(x_in, alpha_k, sigma_k, cond)  # (1)
        else:
            with torch.no_grad():
                x = student(x_in, alpha_k, sigma_k, cond)

        # Student.
        if student_turn:
            critic.requires_grad_(False)  # not no_grad: (12) must reach x through the critic
            t_dm, t_ca = draw_levels(args.levels, draw.randint, low, high, cleaner[k])
            dm = noised(x.detach(), term_grid[t_dm]) if use_dm else None
            ca = None
            if use_ca:
                ca = dm if args.levels == "shared" else noised(x.detach(), term_grid[t_ca])
            terms = gradients(x, ca, dm, cond, teacher, critic.fake, args.cfg, floor)
            g_ca, g_dm, n_ca, n_dm = terms
            loss = dm_loss(x, g_ca + g_dm)
            if args.regulariser == "moments":
                loss_mom = moments_loss(x, *args.moments)
                loss = loss + loss_mom  # (14)
                logs |= dict(moments=loss_mom)
            if args.gan:
                logit = critic(*noised(x, grid[draw.randint(0, N)]), cond, logit=True)
                loss_gen = gen_loss(logit)
                loss = loss + args.gan_weight * loss_gen  # (14)
                logs |= dict(gen=loss_gen)
            loss.backward()
            logs |= dict(ca=0.5 * g_ca.square().mean(), dm=0.5 * g_dm.square().mean())
            logs |= dict(norm_ca=n_ca.mean(), norm_dm=n_dm.mean())
            logs |= dict(cos=cosine(x, *terms))
            grad_student = run.step(opt_g, args.clip)  # clip, step, zero the gradients
            logs |= dict(grad_student=grad_student)
            ema.update(run.images_stepped)
            critic.requires_grad_(True)

        # Critic, on the same samples.
        x = x.detach()
        logs |= dict(mean=x.mean(), std=x.std())
        if use_critic:
            x_t, alpha, sigma = noised(x, grid[draw.randint(0, N)])
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
                loss = loss + args.cls_weight * loss_cls  # (14)
                logs |= dict(cls=loss_cls)
                logs |= dict(logit_fake=logit_fake.mean(), logit_real=logit_real.mean())
            loss.backward()
            grad_critic = run.step(opt_c, args.clip)
            logs |= dict(fake=loss_fake, grad_critic=grad_critic)

        run.after(it, logs, state, report)

    run.finish(it, state, report)
    report.end(it + 1)


if __name__ == "__main__":
    launch(main)
