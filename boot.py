"""BOOT: data-free distillation with bootstrapping. Gu et al., ICML 2024, arXiv 2306.05544.

The student reads the noise eps that the teacher would start from and a time t, and predicts in one
pass where the teacher's trajectory from eps is at t. Its target is its own prediction at a slightly
noisier time, carried one solver step further by the teacher. It starts as the teacher's first
estimate and learns from the noise end down to the image. It needs nothing but the teacher and
noise: there are no real images, no stored trajectories, no GAN, and no averaged target network.

Notation: x_t = alpha_t x + sigma_t eps; f(x_t, t, c) is the teacher's estimate of the clean x;
lambda_t = log(sigma_t / alpha_t) rises with t; s < t; T is the noise end, x_T pure noise; c is the
label or prompt; w is the guidance scale; sg[] stops gradient.

    y_t = (x_t - sigma_t eps) / alpha_t          signal: the trajectory without its own eps      (1)
    dy_t / dt = -lambda'_t (f(x_t, t, c) - y_t)  the teacher's ODE, written in y                 (2)
    y(eps, t, c) = f_student(x_T, T, c; t)       student: a network with t as a new input        (3)
    f = f(null) + w (f(c) - f(null))             the teacher's estimate with guidance            (4)
    k = 1 - exp(lambda_s - lambda_t)             exact if f is constant from t to s              (5)
    y* = sg[y_t + k (f(alpha_t y_t + sigma_t eps, t, c) - y_t)]          y_t = y(eps, t, c)      (6)
    L_BS = mean ((y(eps, s, c) - y*) / k)^2      bootstrap: the error of (2), in units of y      (7)
    L_BC = mean (y(eps, T, c) - sg[f(x_T, T, c)])^2    boundary: the teacher's first estimate    (8)
    L = L_BS + beta L_BC                                                                         (9)
    x = y(eps, 0, c)                             state at t: alpha_t y(eps, t, c) + sigma_t eps (10)

(6) is the teacher's sampler: a DDIM step is x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t
sigma_s / sigma_t) f. With (1) on both sides the terms in eps are equal. What is left, divided by
alpha_s, is y_s = (1 - k) y_t + k f: a convex mix, which does not amplify errors of y.

Usage:
    python boot.py                                       # MNIST, minutes on a CPU
    python boot.py --teacher toy                         # 2-D mixture, under a minute
    python boot.py --horizon-warmup 300                  # learns the noisy times first
    torchrun --nproc_per_node=8 boot.py --teacher DIR    # 8 GPUs

Differences from the paper, variants and results: docs/boot.md.
"""

import training.interrupt  # noqa: F401  # isort: skip

import math

import torch

from common.errors import launch, require
from common.files import write_json
from common.sampling import generate
from common.schedules import add_noise, expand, f64, initial_noise
from common.teachers.load import load_teacher
from common.teachers.students import start_from
from training.ema import EMA
from training.flags import Parser
from training.optim import adamw
from training.report import Report, save_grid
from training.run import Run

N = 1000  # nodes of the schedule's grid that times are interpolated in
K_MIN = 0.02  # least k in the weight of (7); the target has the true k

# Presets: the flags for a kind of teacher, unless the command line gives others.
# All are ours, the paper's are not public. [O]: measured in docs/RESULTS.md. `source` is printed at
# the start; docs/teachers.md has all of them in a table.
DEFAULT = dict(
    cfg=1.0,
    delta=1 / 64,
    lr=1e-4,
    betas=(0.9, 0.999),
    weight_decay=0.0,
    batch=256,
    iters=100_000,
    warmup=500,
    cooldown=0.0,
    ema=1_770_000,  # 0.9999 per step
    clip=1.0,
    source="nobody's",
)
TOY = dict(
    cfg=1.0,
    delta=1 / 32,
    lr=1e-3,
    betas=(0.9, 0.999),
    weight_decay=0.0,
    batch=256,
    iters=1500,
    warmup=0,
    cooldown=0.5,
    ema=0,
    clip=1.0,
    source="[O]",
)
MNIST = dict(
    cfg=1.5,
    delta=1 / 16,
    boundary_frac=1 / 16,  # alpha_T is 0: the target (6) does not depend on y_T
    lr=1e-3,
    betas=(0.5, 0.99),
    weight_decay=0.01,
    batch=64,
    iters=1650,
    warmup=20,
    cooldown=0.5,
    ema=2000,
    clip=10.0,
    source="[O]",
)
EMOJI = dict(
    MNIST,
    cfg=3.5,
    lr=2e-4,
    batch=32,
    iters=500,
    source="nobody's: mnist's at a lower rate",
)
TEXT = dict(DEFAULT, lr=1e-5)  # guidance of the pipeline: the student has it built in
PRESETS = {
    "default": DEFAULT,
    "toy": TOY,
    "toy-cond": TOY,
    "mnist": MNIST,
    "emoji": EMOJI,
    "emoji-flow": EMOJI,
    "own": dict(MNIST, source="nobody's: mnist's"),
    "edm-imagenet64": DEFAULT,
    "edm-cifar10": DEFAULT,
    "dit": dict(DEFAULT, cfg=1.5),
    "sit": dict(DEFAULT, cfg=1.5),
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

# The student's path is compared with the teacher's, also every --distance-every iterations.
PATH_N = 250  # noises, at the end of a run
PATH_STEPS = 32  # DDIM steps of the teacher
READOUTS = (0.75, 0.5, 0.25, 0.0)  # times


def parse_args(argv=None):
    p = Parser(__doc__, few_steps=False)
    p.method.description = "times are shares of the path: 1 is the teacher's noise end, 0 the image"
    add = p.method.add_argument
    add("--delta", type=float, help="step of the bootstrap, t - s in (6)")
    add("--beta", type=float, default=1.0, help="weight of (8) in (9)")
    add("--boundary-frac", type=float, default=0.25, help="share of the batch with (8)")
    add(
        "--horizon-warmup",
        type=int,
        default=0,
        help="iterations over which the lower end of t falls from T to 0; 0: all times at once",
    )
    add(
        "--distance-every",
        type=int,
        default=100,
        help="iterations between distances to the teacher's states; 0: at the end",
    )
    args = p.parse(PRESETS, argv)
    if args.smoke:
        args.horizon_warmup = min(args.horizon_warmup, 1)

    ok = 0 < args.delta <= 1
    require(ok, f"--delta: expected a number above 0, at most 1, found {args.delta}")
    ok = 0 <= args.beta < math.inf
    require(ok, f"--beta: expected a number >= 0, found {args.beta}")
    share = args.boundary_frac
    ok = 0 <= share < 1
    require(ok, f"--boundary-frac: expected a share from 0 to below 1, found {share}")
    count = int(share * args.batch)
    require(
        (args.beta > 0) == (count > 0),
        f"--beta {args.beta:g}, --boundary-frac {share:g}: {count} of {args.batch} samples have "
        "(8); set both to 0 or none",
    )
    warmup = args.horizon_warmup
    require(warmup >= 0, f"--horizon-warmup: expected at least 0, found {warmup}")
    require(
        warmup < args.iters,
        f"--horizon-warmup {warmup}: expected less than --iters {args.iters}, "
        "or the image is never trained",
    )
    every = args.distance_every
    require(every >= 0, f"--distance-every: expected at least 0, found {every}")
    return args


# ---- times and levels ----------------------------------------------------------------------------


def level(schedule, u):
    """alpha, sigma at time u, a share of the path; float64 in the shape of u (0-d or [B]).

    u = 1 is the noise end of the schedule, u = 0 is clean (alpha 1, sigma 0) on all schedules.
    Between them u is even on the schedule's own grid (flow: t with its shift; VP: index;
    EDM: sigma^(1 / rho)).
    """
    u = f64(u)
    nodes = schedule.grid(N)
    if nodes[0] > schedule.t_min:
        nodes = torch.cat([f64([schedule.t_min]), nodes])
    nodes = nodes.to(u.device, non_blocking=True)
    position = u * (len(nodes) - 1)
    i = position.floor().long().clamp(max=len(nodes) - 2)
    t = torch.lerp(nodes[i], nodes[i + 1], position - i)
    t = torch.where(u == 1, schedule.t_max, t)
    alpha = torch.where(u == 0, 1.0, schedule.alpha(t))
    sigma = torch.where(u == 0, 0.0, schedule.sigma(t))
    return alpha, sigma


def time_pairs(v, delta, it, horizon):
    """Times t > s of (6) for v [B], uniform in [0, 1): delta apart, cut at both ends of the path.

    So s = 0, the image, is trained itself. Until iteration `horizon` the lower end of t is on its
    way from 1 to 0.
    """
    low = 0.0
    if it < horizon:
        low = 1 - it / horizon
    t = 1 + delta - (1 + delta - low) * v  # in (low, 1 + delta]
    return t.clamp(max=1), (t - delta).clamp(min=0)


def spread_rows(count, batch):
    """bool [batch], of which `count` are True, spread evenly.

    They are places in the global batch, so that N processes do what one does, and all have some.
    """
    return (torch.arange(batch + 1) * count // batch).diff() > 0


# ---- the student ---------------------------------------------------------------------------------


def signal(student, schedule, eps, u, cond):
    """y of (3) [B, *shape] at times u [B]. eps: unit noise; it enters at level T for all u."""
    T = schedule.t_max
    x = initial_noise(schedule, T, eps)
    return student(x, schedule.alpha(T), schedule.sigma(T), cond | dict(time=u))  # (3)


@torch.no_grad()
def sample(student, z, cond, nfe=1, noise=None, at=0.0, noisy=False):
    """One pass from unit noise z to the signal at time `at`, [B, *shape]; 0: the image.

    noisy: the state on the teacher's trajectory instead. noise is not used. There are no further
    steps: the student only knows pure noise.
    """
    require(nfe == 1, f"--nfe {nfe}: expected 1; the student is a function of the noise alone")
    u = torch.full((len(z),), at, dtype=torch.float64, device=z.device)
    y = signal(student, student.schedule, z, u, cond)
    if not noisy:
        return y
    return add_noise(y, *level(student.schedule, at), z)  # (10)


# ---- losses --------------------------------------------------------------------------------------


def coefficient(alpha_t, sigma_t, alpha_s, sigma_s):
    """k in [0, 1] of the step from t to s < t: 1 for a clean s, and where alpha_t is 0."""
    return 1 - sigma_s * alpha_t / (sigma_t * alpha_s)  # (5)


def carry(y, f, k):
    """y moved towards the clean estimate f [B, *shape]. k: [B]."""
    return (y + expand(k, y) * (f - y)).to(y.dtype)  # (6)


@torch.no_grad()
def bootstrap(student, teacher, eps, u_t, u_s, is_boundary, cond, w):
    """Targets y* [B, *shape], the k [B] that they were made with, and f - y_t.

    u_t, u_s: times [B]. is_boundary: bool [B], True for samples of (8). They have u_t = u_s = 1,
    and their target is f(x_T, T), so that k is 1.
    """
    schedule = teacher.schedule
    alpha_t, sigma_t = level(schedule, u_t)
    alpha_s, sigma_s = level(schedule, u_s)
    y_t = signal(student, schedule, eps, u_t, cond)  # of the weights in training, not an average
    x_t = add_noise(y_t, alpha_t, sigma_t, eps)  # (1)
    x_T = initial_noise(schedule, schedule.t_max, eps)
    at_T = is_boundary.view(-1, *[1] * (eps.ndim - 1)).to(eps.device, non_blocking=True)
    f = teacher.guided(torch.where(at_T, x_T, x_t), alpha_t, sigma_t, cond, w)  # (4)
    k = coefficient(alpha_t, sigma_t, alpha_s, sigma_s)
    k = torch.where(is_boundary, 1.0, k)  # 0 / 0 where alpha_T is 0
    return carry(y_t, f, k), k, f - y_t


def squared_errors(y_s, target, k):
    """[B], of (7); of (8) where k is 1."""
    each = (y_s - target.detach()).square().flatten(1).mean(1)
    return each / expand(k.clamp(min=K_MIN).square(), each)  # (7), the residual of (2)


def split(each, is_boundary, share):
    """L_BS and L_BC as [B], whose means over the batches of all processes are the losses.

    share: of the boundary in the global batch.
    """
    loss_bs = each * ~is_boundary / (1 - share)  # (7)
    loss_bc = each * is_boundary / max(share, 1e-9)  # (8)
    return loss_bs, loss_bc


# ---- distance to the teacher's path --------------------------------------------------------------


@torch.no_grad()
def teacher_path(teacher, z, cond, w, steps):
    """States after 0, 1, ..., `steps` DDIM steps, even in time. z: unit noise."""
    schedule = teacher.schedule
    levels = [level(schedule, 1 - i / steps) for i in range(steps + 1)]
    path = [initial_noise(schedule, schedule.t_max, z)]
    for (alpha_t, sigma_t), (alpha_s, sigma_s) in zip(levels, levels[1:]):
        f = teacher.guided(path[-1], alpha_t, sigma_t, cond, w).double()
        ratio = sigma_s / sigma_t
        x_s = ratio * path[-1].double() + (alpha_s - alpha_t * ratio) * f
        path.append(x_s.to(z.dtype))
    return path


class PathDistance:
    """Mean squared distance of student and teacher from the same n noises, at READOUTS.

    The teacher's states are computed once.
    """

    def __init__(self, teacher, args, n):
        self.args = args
        self.n = n
        self.sizes = teacher.sizes
        self.real = self.states(self.teacher_states, teacher)

    def states(self, sampler, model):
        """[READOUTS, n, *shape]"""
        if self.sizes:
            self.sizes.use(0)  # of several --size the same one each time
        batches = generate(sampler, model, self.n, self.args.seed, batch=32)
        return torch.cat([x for _, _, x in batches], 1)

    def teacher_states(self, teacher, z, cond, noise):
        path = teacher_path(teacher, z, cond, self.args.cfg, PATH_STEPS)
        return torch.stack([path[round((1 - u) * PATH_STEPS)] for u in READOUTS])

    def student_states(self, student, z, cond, noise):
        return torch.stack([sample(student, z, cond, at=u, noisy=True) for u in READOUTS])

    def __call__(self, student):
        """{time: distance}"""
        fake = self.states(self.student_states, student)
        return {
            str(u): (fake[i] - self.real[i]).square().mean().item() for i, u in enumerate(READOUTS)
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
    each = ", ".join(f"{value:.4g} at {u}" for u, value in result.items())
    run.print(f"distance to the teacher from the same noise: {each}; spread {spread:.4g}")


def draw_readouts(run, report, student):
    """samples/readout.png: signals of the same noises, from the noise end to the image."""
    rows = []
    for u in (1.0, *READOUTS):

        def sampler(student, z, cond, noise, u=u):
            return sample(student, z, cond, at=u)

        rows.append((f"signal at {u:g}", report.draw(student, sampler)))
    if run.is_main:
        save_grid(run.out / "samples" / "readout.png", rows)


# ---- training ------------------------------------------------------------------------------------


def main():
    args = parse_args()
    run = Run(__file__, args)
    load = run.teacher_kwargs(students=1)
    teacher = load_teacher(args.teacher, run.device, run.dtype, **load)
    schedule = teacher.schedule

    # The samples of (8) in each part of the batch.
    count = int(args.boundary_frac * args.batch)
    share = count / args.batch
    boundary = spread_rows(count, args.batch).split(run.batch)

    # Networks: the student starts as the teacher. A new input enters by an embedding that is
    # added to the network's time embedding. The last layer of it starts at zero, so the network
    # starts as it was, whatever the input: the student as the teacher at T for every t.
    student = teacher.copy(args.lora)
    torch.manual_seed(args.seed)  # the embeddings start equal on all processes
    student.extend("time")
    if args.start and not args.resume:
        start_from(args.start, teacher, student, say=run.print)
    student_ddp = run.train(student)  # DDP around it; for passes that train weights
    opt_g = adamw(student, args.lr, args)
    ema = EMA(student, args.ema, args.ema_cpu)
    report = Report(run, teacher, ema, sample, {})
    distance = None
    if args.distance_every and not args.dry_run:
        distance = PathDistance(teacher, args, n=8 if args.smoke else 64)
    run.print_summary(
        student=student,
        teacher=teacher,
        steps="1, from pure noise",
        targets=f"{args.delta:g} of the path ahead; boundary: {count} of {args.batch} samples",
    )

    state = dict(student=student, opt_g=opt_g, ema=ema)
    first = run.resume(state)
    it = first - 1  # if no iteration is left
    for it in run.loop(first, args.iters, show=["loss"]):
        draw = run.draw(it)
        run.set_rates(it, (opt_g, args.lr))
        is_boundary = boundary[run.data_shard[0]]
        cond = teacher.random_cond(draw)
        eps = draw.randn(*teacher.shape)
        u_t, u_s = time_pairs(draw.rand(), args.delta, it, args.horizon_warmup)
        u_t = torch.where(is_boundary, 1.0, u_t)
        u_s = torch.where(is_boundary, 1.0, u_s)

        # Student. Target at s: its own prediction at t, one step of the teacher further.
        inputs = (eps, u_t, u_s, is_boundary, cond)
        target, k, gap = bootstrap(student, teacher, *inputs, args.cfg)
        y_s = signal(student_ddp, schedule, eps, u_s, cond)
        is_boundary = is_boundary.to(run.device, non_blocking=True)
        loss_bs, loss_bc = split(squared_errors(y_s, target, k), is_boundary, share)
        loss = (loss_bs + args.beta * loss_bc).mean()  # (9)
        loss.backward()
        grad_student = run.step(opt_g, args.clip)  # clip, step, zero the gradients
        logs = dict(loss=loss, grad_student=grad_student, boundary=loss_bc.mean())
        ema.update(run.images_stepped)

        # How far the teacher moves the signal, and (7) by quarters of s: they add up to it.
        moved = gap.flatten(1).abs().mean(1) * ~is_boundary
        logs |= dict(increment=moved.mean() / (1 - share))
        quarter = (4 * u_s).long().clamp(max=3).to(run.device, non_blocking=True)
        for q in range(4):
            logs |= {f"bootstrap_{q}": (loss_bs * (quarter == q)).mean()}
        if distance and run.is_last_microstep and it % args.distance_every == 0:
            for u, value in distance(ema.model).items():
                logs |= {f"distance_{u}": value}

        run.after(it, logs, state, report)

    run.finish(it, state, report)
    report.end(it + 1)
    if args.eval_n:
        write_distances(run, teacher, ema.model)
        draw_readouts(run, report, ema.model)


if __name__ == "__main__":
    launch(main)
