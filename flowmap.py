"""FreeFlow: flow map distillation without data. Tong et al., CVPR 2026, arXiv 2511.19428.

The student learns where the teacher's ODE carries a noise z after any duration d. It needs nothing
but the teacher and noise: at every point of the student's own path, its velocity should be the
teacher's (prediction). Errors add up along the path, so its end is corrected: the student's images,
with noise added, should have the velocity field of the teacher's data (correction). Their own field
is learned all the while by an auxiliary network, aux, which has the flags --lr-fake and
--lora-fake. There are no real images, no stored trajectories and no GAN. Every noise keeps the
image that it has in the teacher, and the guidance scale can be an input of the student.

Notation: x_t = (1 - t) x + t n, from data x at t = 0 to noise n at t = 1; x0(x_t, t, c) is a
network's estimate of the clean x, whatever its own schedule; u is the velocity from noise to data,
u(x_t, t, c) = E[x - n | x_t, c]; d = 1 - t is the time since the start at noise z; c is the label
or prompt; w is the guidance scale; |.|^2 is the mean square over a sample; sg[] stops gradient.

    u(x_t, t, c) = (x0(x_t, t, c) - x_t) / t                                                     (1)
    u_w = u(null) + w (u(c) - u(null))              the teacher's velocity with guidance         (2)
    u_avg(z, d, c, w) = x0(z, 1, c; d, w) - z       the student: mean velocity over the first d  (3)
    f(z, d) = z + d u_avg(z, d)                     flow map; f(z, 1) is the image               (4)
    e = u_avg + d du_avg/dd - u_w(f(z, d), 1 - d)   prediction; z does not depend on d           (5)
    e = u_avg(z, d) - (d' u_avg(z, d') + (d - d') u_w(f(z, d'), 1 - d')) / d
                                                    with --euler-steps N; d' = d - 1 / N         (6)
    g = e / (|e|^2 + eps)^k                         of a prediction                              (7)
    e = aux(x_r, r, c, w) - u_w(x_r, r, c)          correction: x = f(z, 1), and u_w is guided
                                                    up to --r-guided; r = sigmoid(0.8 + N(0,1))  (8)
    g = lambda e                                    lambda = mean |g of (7)| / mean |e|          (9)
    L = mean u_avg . sg[g]                          a share --correction has (9), the rest (7)  (10)
    L_aux = mean (aux(x_r, r, c, w) - (x - n))^2    x = sg[f(z, 1)], r ~ U(0, 1)                (11)

Usage:
    python flowmap.py                                        # MNIST, minutes on a CPU
    python flowmap.py --teacher toy                          # 2-D mixture, under a minute
    python flowmap.py --euler-steps 32 --correction 0        # prediction alone, no derivatives
    torchrun --nproc_per_node=8 flowmap.py --teacher DIR --cfg-range 1 3    # 8 GPUs

Differences from the paper, variants and results: docs/flowmap.md.
"""

import training.interrupt  # noqa: F401  # isort: skip

import math

import torch
from torch.distributed import all_reduce
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.errors import launch, require
from common.files import write_json
from common.model import put_rows, take_rows
from common.sampling import generate
from common.schedules import expand, f64
from common.teachers.load import load_teacher
from common.teachers.students import start_from
from training.ema import EMA
from training.flags import Parser
from training.optim import adamw
from training.report import Report
from training.run import Run

AT_END = 0.1  # share of the durations in (5) that are exactly 1, the others are uniform [O]
T_LEAST = 1e-3  # no network is evaluated at smaller t: (1) is 0 / 0 at t = 0

# Presets: the flags for a kind of teacher, unless the command line gives others.
# [P] paper, [F] MeanFlow in NVlabs/FastGen, [O] ours, measured in docs/RESULTS.md. `source` is
# printed at the start; docs/teachers.md has all of them in a table.
IMAGENET256 = dict(  # SiT-XL/2 on ImageNet-256
    cfg=1.5,  # the released students were sampled with it [P]
    cfg_range=(1.0, 3.0),
    lr=1e-4,  # [F]
    lr_fake=1e-4,
    betas=(0.9, 0.95),  # [F]
    weight_decay=0.0,  # [F]
    batch=256,  # [P]
    iters=1_500_000,  # [P]; 100,000 are its "20 epochs", 1,000,000 its 512 px
    warmup=1000,  # [F]
    cooldown=0.0,
    ema=1_770_000,  # 0.9999 per step [F]
    clip=1.0,
    source="[P], rates [F]",
)
TOY = dict(  # [O]
    cfg=1.0,
    lr=1e-3,
    lr_fake=1e-3,
    betas=(0.9, 0.95),
    weight_decay=0.0,
    batch=256,
    iters=2000,
    warmup=0,
    cooldown=0.5,
    ema=0,
    clip=1.0,
    eps=1.0,  # at 1e-3, samples at small d, which are right already, outweigh those near the image
    source="[O]",
)
MNIST = dict(  # [O]
    cfg=1.5,
    lr=5e-4,
    lr_fake=1e-3,
    betas=(0.5, 0.99),
    weight_decay=0.01,
    batch=64,
    iters=900,
    warmup=20,
    cooldown=0.75,
    ema=2000,
    clip=10.0,
    eps=0.1,
    source="[O]",
)
EMOJI = dict(MNIST, cfg=3.5, lr=2e-4, lr_fake=2e-4, batch=32, iters=350)  # [O]
TEXT = dict(  # rates of FastGen's MeanFlow of Wan; guidance of the pipeline
    IMAGENET256,
    cfg_range=None,
    lr=1e-5,
    lr_fake=1e-5,
    betas=(0.9, 0.99),
    batch=32,
    iters=20_000,
    ema=22_000,  # 0.999 per step
    source="nobody's: rates of MeanFlow [F]",
)
EDM = dict(IMAGENET256, cfg=1.0, cfg_range=None, source="nobody's: SiT's")
PRESETS = {
    "default": dict(IMAGENET256, source="nobody's: SiT's"),
    "toy": TOY,
    "toy-cond": TOY,
    "mnist": MNIST,
    "emoji": EMOJI,
    "emoji-flow": dict(EMOJI, source="nobody's: emoji's"),
    "own": dict(MNIST, source="nobody's: mnist's"),
    "edm-imagenet64": EDM,
    "edm-cifar10": EDM,
    "dit": dict(IMAGENET256, source="nobody's: SiT's"),
    "sit": IMAGENET256,
    "sd15": dict(TEXT, cfg=7.5),
    "sd21": dict(TEXT, cfg=7.5),
    "sdxl": dict(TEXT, cfg=5.0),
    "sd3": dict(TEXT, cfg=7.0),
    "sana": dict(TEXT, cfg=4.5),
    "sana-0.6b": dict(TEXT, cfg=4.5),
    "flux": dict(TEXT, cfg=1.0),  # its network has an input for guidance already
    "chroma": dict(TEXT, cfg=5.0),
    "flux2": dict(TEXT, cfg=1.0),
    "flux2-klein": dict(TEXT, cfg=4.0),
    "hunyuan-image": dict(TEXT, cfg=3.5),
    "lumina2": dict(TEXT, cfg=4.0),
    "qwen-image": dict(TEXT, cfg=4.0),
    "z-image": dict(TEXT, cfg=6.0),
    "wan2.1": dict(TEXT, cfg=5.0),
    "wan2.1-14b": dict(TEXT, cfg=5.0),
    "wan2.2": dict(TEXT, cfg=4.0),
    "wan2.2-5b": dict(TEXT, cfg=5.0),
    "sana-video": dict(TEXT, cfg=6.0),
    "ltx-video": dict(TEXT, cfg=3.0),
    "hunyuanvideo-1.5": dict(TEXT, cfg=6.0),
}

# The student's path is compared with the teacher's.
PATH_N = 250  # noises, at the end of a run
PATH_STEPS = 32  # Euler steps of the teacher
READOUTS = (0.25, 0.5, 0.75, 1.0)  # durations


def parse_args(argv=None):
    p = Parser(__doc__, critic=True, few_steps=False)
    add = p.method.add_argument
    add("--correction", type=float, default=0.25, help="share of the batch with (8); 0: (5) alone")
    add("--euler-steps", type=int, metavar="N", help="(6) instead of (5), with steps of 1 / N")
    add("--k", type=float, default=1.0, help="exponent of (7); 0: plain squared error")
    add("--eps", type=float, default=1e-3, help="eps of (7)")
    add(
        "--cfg-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="train for all scales w of this range, which become an input [only --cfg]",
    )
    add("--r-mean", type=float, default=0.8, help="mean of the normal number of r in (8)")
    add("--r-guided", type=float, default=0.7, help="largest r at which (8) is guided")
    add("--ratio", type=int, default=1, help="steps of aux per student step")
    args = p.parse(PRESETS, argv)

    if args.cfg_range is None:
        args.cfg_range = (args.cfg, args.cfg)
    low, high = args.cfg_range
    require(
        0 <= low <= args.cfg <= high,
        f"--cfg-range: expected 0 <= low <= --cfg <= high, found {low} {high} and --cfg {args.cfg}",
    )
    ok = 0 <= args.correction <= 1
    require(ok, f"--correction: expected a share from 0 to 1, found {args.correction}")
    steps = args.euler_steps
    require(steps is None or steps >= 1, f"--euler-steps: expected at least 1, found {steps}")
    unused = steps is not None and args.correction == 1
    require(not unused, f"--euler-steps {steps}: --correction 1 leaves no sample to the prediction")
    require(args.ratio >= 1, f"--ratio: expected at least 1, found {args.ratio}")
    unused = args.ratio > 1 and args.correction == 0
    require(not unused, f"--ratio {args.ratio}: --correction 0 does not train aux")
    require(
        args.ratio == 1 or args.accumulate == 1,
        f"--ratio {args.ratio}: with --accumulate, aux makes one step per iteration",
    )
    require(
        0 <= args.k < math.inf and 0 < args.eps < math.inf,
        f"--k and --eps: expected k >= 0 and eps > 0, found {args.k} and {args.eps}",
    )
    require(math.isfinite(args.r_mean), f"--r-mean: expected a number, found {args.r_mean}")
    ok = 0 <= args.r_guided <= 1
    require(ok, f"--r-guided: expected a time from 0 to 1, found {args.r_guided}")
    return args


# ---- velocities ----------------------------------------------------------------------------------


def velocity(net, schedule, x_t, t, cond):
    """u of (1) [B, *shape], of any network. schedule: the network's own. t: 0-d or [B].

    All signs and times are settled here. Teachers differ in both (SiT has time 1 - t and predicts
    x - n, FLUX time t and n - x, others have other schedules), but a Model returns its estimate
    of the clean x at any (alpha, sigma), and this estimate has one velocity on the linear path.
    """
    t_min = torch.tensor(schedule.t_min)
    ratio = float(schedule.sigma(t_min) / schedule.alpha(t_min))
    least = ratio / (1 + ratio)  # the least t that the network was trained for
    t = f64(t).clamp(min=max(T_LEAST, least))
    x0 = net(x_t, 1 - t, t, cond)
    return ((x0.double() - x_t) / expand(t, x_t)).to(x_t.dtype)  # (1)


def guided_velocity(teacher, x_t, t, cond, w, t_guided=1.0):
    """u_w of (2) [B, *shape] where t <= t_guided, the conditional velocity at larger t.

    w: [B], or one number, of which 1 takes only one pass of the teacher.
    """
    c = velocity(teacher, teacher.schedule, x_t, t, cond)
    if not torch.is_tensor(w) and w == 1:
        return c
    u = velocity(teacher, teacher.schedule, x_t, t, teacher.unconditional(cond, len(x_t)))
    t = f64(t).to(x_t.device, non_blocking=True)
    w = f64(w).to(x_t.device, non_blocking=True)
    w = torch.where(t <= t_guided, w, 1.0)
    return (u + expand(w, x_t) * (c - u)).to(x_t.dtype)  # (2)


def guidance_input(w, like):
    """The condition "guidance" of student and aux, [B] of order one. like: any tensor [B]."""
    if not torch.is_tensor(w):
        w = torch.full_like(like, w)
    return dict(guidance=(w - 1) / 4)


def average_velocity(student, z, d, cond, w):
    """u_avg of (3) [B, *shape]. z: unit noise; d: [B]; w: [B] or one number.

    The factor on d keeps all frequencies of its embedding below 4.7 rad per unit of d. Derivatives
    along d multiply by the frequency, and at 12.6 rad, without the factor, training is known to
    fail with k = 0.
    """
    cond = cond | dict(duration=0.375 * d) | guidance_input(w, d)
    return student(z, 0.0, 1.0, cond) - z  # (3)


def flow_map(z, d, u_avg):
    return (z + expand(d, z) * u_avg).to(z.dtype)  # (4)


def derivative(student, z, d, cond, w):
    """u_avg and du_avg/dd, both [B, *shape] without graph, by forward-mode differentiation.

    student: not in DDP, whose hooks do not support it. Passes are in float32 whatever --dtype is.
    """

    def u_avg(d):
        return average_velocity(student, z, d, cond, w)

    dtype = student.dtype
    student.dtype = torch.float32
    try:
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode derivative
            return torch.func.jvp(u_avg, (d,), (torch.ones_like(d),))
    finally:
        student.dtype = dtype


# ---- sampling ------------------------------------------------------------------------------------


@torch.no_grad()
def sample(student, z, cond, nfe=1, noise=None, w=1.0, duration=1.0):
    """One pass from unit noise z to the image, [B, *shape]. noise is not used.

    w: guidance, if it is an input of the student. duration: below 1, the state at t = 1 - duration
    on the way to the image. There are no further steps: the student only knows pure noise.
    """
    require(nfe == 1, f"--nfe {nfe}: expected 1; a flow map from noise has no further steps")
    d = torch.full((len(z),), duration, dtype=torch.float64, device=z.device)
    return flow_map(z, d, average_velocity(student, z, d, cond, w))


# ---- losses --------------------------------------------------------------------------------------


@torch.no_grad()
def prediction_error(student, teacher, z, d, cond, w):
    """e of (5) [B, *shape]: velocity of the student along its path, minus the teacher's there."""
    u_avg, slope = derivative(student, z, d, cond, w)
    u = guided_velocity(teacher, flow_map(z, d, u_avg), 1 - d, cond, w)
    return u_avg + (expand(d, z) * slope).to(z.dtype) - u  # (5)


@torch.no_grad()
def euler_error(u_avg, student, teacher, z, d, cond, w, steps):
    """e of (6) [B, *shape]. u_avg: the student's at z and d.

    The target is the student's path up to d', continued by one Euler step of the teacher. It is
    reached where the student is the teacher's Euler sampler with this number of steps.
    """
    d_before = (d - 1 / steps).clamp(min=0)
    u_before = average_velocity(student, z, d_before, cond, w)
    u = guided_velocity(teacher, flow_map(z, d_before, u_before), 1 - d_before, cond, w)
    travelled = expand(d_before, z) * u_before + expand(d - d_before, z) * u
    return u_avg - (travelled / expand(d, z)).to(z.dtype)  # (6)


@torch.no_grad()
def correction_error(aux, teacher, x, r, n, cond, w, r_guided):
    """e of (8) [B, *shape]: velocity field of the student's images x, minus the teacher's."""
    x_r = flow_map(x, r, n - x)  # (1 - r) x + r n
    fake = velocity(aux, teacher.schedule, x_r, r, cond | guidance_input(w, r))
    real = guided_velocity(teacher, x_r, r, cond, w, r_guided)
    return fake - real  # (8)


def mean_square(e):
    """Over the elements of each sample, [B]."""
    return e.flatten(1).square().mean(1)


def weighted(e, k, eps):
    """g of (7) [B, *shape]. With k = 1, samples of large and of small error weigh alike."""
    weight = (mean_square(e) + eps).pow(k)
    return e / weight.view(-1, *[1] * (e.ndim - 1))  # (7)


def balance(g, e, world, eps=1e-8):
    """lambda of (9), 0-d, the same on all processes.

    g: (7) of this process's samples with a prediction; e: (8) of those with a correction.
    """
    norms = [mean_square(g).sqrt().sum(), mean_square(e).sqrt().sum()]
    counts = [torch.full((), float(len(rows)), device=g.device) for rows in (g, e)]
    sums = torch.stack(norms + counts)
    if world > 1:
        all_reduce(sums)
    mean_g, mean_e = sums[:2] / sums[2:]
    return mean_g / (mean_e + eps)  # (9)


def student_loss(u_avg, g):
    return (u_avg * g.detach()).mean()  # (10)


def aux_loss(prediction, x, n):
    return (prediction - (x - n)).square().mean()  # (11)


# ---- batches -------------------------------------------------------------------------------------


def spread_rows(count, batch):
    """bool [batch], of which `count` are True, spread evenly.

    They are places in the global batch, so that N processes do what one does, and all have some.
    """
    return (torch.arange(batch + 1) * count // batch).diff() > 0


def check_share(share, batch, local_batch):
    """UserError if a process (and part of --accumulate) has not both kinds of samples."""
    least = max(math.ceil(1 / part - 1e-9) for part in (share, 1 - share) if part > 0)
    require(
        local_batch >= least,
        f"--batch {batch}: expected at least {least} samples per process (and part of "
        f"--accumulate), so that each has predicted and corrected ones, found {local_batch}",
    )


def durations(u, steps=None):
    """d [B] in [0, 1] for u [B], uniform in [0, 1). steps: only multiples of 1 / steps."""
    d = (u / (1 - AT_END)).clamp(max=1)
    if steps is None:
        return d
    return (d * steps).ceil().clamp(min=1) / steps


def random_guidance(draw, low, high):
    """w of a batch: [B], uniform from low to high, or the one number."""
    if low == high:
        return low
    return low + (high - low) * draw.rand()


def take(rows, cond, w):
    """cond and w of these samples. w: [B] or one number."""
    cond = {name: take_rows(value, rows) for name, value in cond.items()}
    if torch.is_tensor(w):
        w = w[rows]
    return cond, w


# ---- distance to the teacher's path --------------------------------------------------------------


@torch.no_grad()
def teacher_path(teacher, z, cond, w, steps):
    """States after 0, 1, ..., `steps` Euler steps on the linear path. z: unit noise."""
    path = [z]
    for i in range(steps):
        u = guided_velocity(teacher, path[-1], 1 - i / steps, cond, w)
        path.append(path[-1] + u / steps)
    return path


class PathDistance:
    """Mean squared distance of student and teacher from the same n noises, at READOUTS.

    The teacher's states are computed once.
    """

    def __init__(self, teacher, args, n):
        self.args = args
        self.n = n
        self.real = self.states(self.teacher_states, teacher)

    def states(self, sampler, model):
        """[READOUTS, n, *shape]"""
        batches = generate(sampler, model, self.n, self.args.seed, batch=32)
        return torch.cat([x for _, _, x in batches], 1)

    def teacher_states(self, teacher, z, cond, noise):
        path = teacher_path(teacher, z, cond, self.args.cfg, PATH_STEPS)
        return torch.stack([path[round(d * PATH_STEPS)] for d in READOUTS])

    def student_states(self, student, z, cond, noise):
        w = self.args.cfg
        return torch.stack([sample(student, z, cond, w=w, duration=d) for d in READOUTS])

    def __call__(self, student):
        """{duration: distance}"""
        fake = self.states(self.student_states, student)
        return {
            str(d): (fake[i] - self.real[i]).square().mean().item() for i, d in enumerate(READOUTS)
        }

    def spread(self):
        """Variance of the teacher's images: half the distance of two that are independent."""
        return self.real[-1].var(0).mean().item()


def write_distances(run, teacher, student):
    """path.json at the end of a run. Call it on all processes: sharded networks need them."""
    args = run.args
    n = min(PATH_N, args.eval_n)
    distance = PathDistance(teacher, args, n)
    result = distance(student)
    spread = distance.spread()
    facts = dict(spread=spread, steps=PATH_STEPS, n=n, cfg=args.cfg)
    if run.is_main:
        write_json(run.out / "path.json", result | facts)
    each = ", ".join(f"{value:.4g} after {d}" for d, value in result.items())
    run.print(f"distance to the teacher from the same noise: {each}; spread {spread:.4g}")


# ---- training ------------------------------------------------------------------------------------


def main():
    args = parse_args()
    run = Run(__file__, args)
    load = run.teacher_kwargs(students=1, critics=1)
    teacher = load_teacher(args.teacher, run.device, run.dtype, **load)
    schedule = teacher.schedule
    low, high = args.cfg_range

    # Which samples have a correction; the others have a prediction.
    check_share(args.correction, args.batch, run.batch)
    count = round(args.correction * args.batch)
    parts = spread_rows(count, args.batch).split(run.batch)
    roles = [(part, (~part).nonzero()[:, 0], part.nonzero()[:, 0]) for part in parts]

    # Networks: student and aux start as the teacher. A new input enters by an embedding that is
    # added to the network's time embedding. The last layer of it starts at zero, so the network
    # starts as it was, whatever the input: the student as the teacher at t = 1 for every d.
    student = teacher.copy(args.lora)
    aux = teacher.copy(args.lora_fake)
    torch.manual_seed(args.seed)  # the embeddings start equal on all processes
    student.extend("duration")
    if low < high:
        student.extend("guidance")
        aux.extend("guidance")
    if args.start and not args.resume:
        start_from(args.start, teacher, student, aux, run.print)
    student_ddp = run.train(student)  # DDP around both; for passes that train weights
    aux_ddp = run.train(aux)
    opt_g = adamw(student, args.lr, args)
    opt_aux = adamw(aux, args.lr_fake, args)
    ema = EMA(student, args.ema, args.ema_cpu)
    report = Report(run, teacher, ema, sample, dict(w=args.cfg))
    run.print_summary(
        student=student,
        aux=aux,
        teacher=teacher,
        steps="1, from pure noise",
        guidance=f"w = {args.cfg:g}, trained for {low:g} to {high:g}",
        corrected=f"{count} of {args.batch} samples",
    )

    state = dict(student=student, opt_g=opt_g, ema=ema, aux=aux, opt_aux=opt_aux)
    first = run.resume(state)
    it = first - 1  # if no iteration is left
    for it in run.loop(first, args.iters, show=["prediction", "correction", "aux"]):
        draw = run.draw(it)
        run.set_rates(it, (opt_g, args.lr), (opt_aux, args.lr_fake))
        is_corrected, predicted, corrected = roles[run.data_shard[0]]  # bool [B], indices
        logs = {}

        # Student. One forward pass serves both kinds of samples.
        z = draw.randn(*teacher.shape)
        cond = teacher.random_cond(draw)
        w = random_guidance(draw, low, high)
        d = durations(draw.rand(), args.euler_steps)
        d = torch.where(is_corrected, 1.0, d)  # a correction needs the image
        r = torch.sigmoid(args.r_mean + draw.randn().double())
        n = draw.randn(*teacher.shape)
        u_avg = average_velocity(student_ddp, z, d, cond, w)
        g = torch.empty_like(z)
        if len(predicted):
            z_p, d_p = take_rows(z, predicted), d[predicted]
            cond_p, w_p = take(predicted, cond, w)
            if args.euler_steps:
                u_p = take_rows(u_avg.detach(), predicted)
                e = euler_error(u_p, student, teacher, z_p, d_p, cond_p, w_p, args.euler_steps)
            else:
                e = prediction_error(student, teacher, z_p, d_p, cond_p, w_p)
            g_p = weighted(e, args.k, args.eps)
            put_rows(g, predicted, g_p)
            logs |= dict(prediction=mean_square(e).mean())
        if len(corrected):
            z_c, u_c = take_rows(z, corrected), take_rows(u_avg.detach(), corrected)
            x = flow_map(z_c, 1.0, u_c)
            r_c, n_c = r[corrected], take_rows(n, corrected)
            cond_c, w_c = take(corrected, cond, w)
            e = correction_error(aux, teacher, x, r_c, n_c, cond_c, w_c, args.r_guided)
            lam = 1.0  # of a correction alone
            if len(predicted):
                lam = balance(g_p, e, run.world)
            put_rows(g, corrected, lam * e)
            logs |= {"correction": mean_square(e).mean(), "lambda": lam}
        student_loss(u_avg, g).backward()
        grad_student = run.step(opt_g, args.clip)  # clip, step, zero the gradients
        logs |= dict(grad_student=grad_student)
        ema.update(run.images_stepped)

        # Aux, on new images of the student.
        aux_steps = args.ratio if args.correction > 0 else 0
        for _ in range(aux_steps):
            cond = teacher.random_cond(draw)
            w = random_guidance(draw, low, high)
            x = sample(student, draw.randn(*teacher.shape), cond, w=w)
            n = draw.randn(*teacher.shape)
            r = draw.rand()
            x_r = flow_map(x, r, n - x)  # (1 - r) x + r n
            prediction = velocity(aux_ddp, schedule, x_r, r, cond | guidance_input(w, r))
            loss = aux_loss(prediction, x, n)
            loss.backward()
            grad_critic = run.step(opt_aux, args.clip)
            logs |= dict(aux=loss, std=x.std(), grad_critic=grad_critic)

        run.after(it, logs, state, report)

    run.finish(it, state, report)
    report.end(it + 1)
    if args.eval_n:
        write_distances(run, teacher, ema.model)


if __name__ == "__main__":
    launch(main)
