"""AnyFlow: any-step flow maps, distilled on-policy. Gu et al., arXiv 2026, 2605.13724.

The student is a flow map: a network with a second time r as an input, which gives the mean velocity
from t down to r. One checkpoint makes samples in 1, 2, 4 or any number of deterministic jumps, and
more jumps are not meant to be worse. It is trained in two stages. First it learns the teacher's
flow map: the slope of its own mean velocity along the path, a finite difference, says what is
missing. Then, while that goes on, its own samples, made with few jumps, should have the same
distribution as the teacher's: as in DMD2, by the difference of the teacher and of a critic that is
trained all the while on these samples. The gradient flows through all jumps.

Notation: x data, z noise, x_t = (1 - t) x + t z; t in [0, T] on this path, T = 1 for flow teachers;
r <= t; c is the label or prompt; w is --cfg; |.|^2 is the mean square over a sample; sg[] stops
gradients. F(x_t, t, r, c) is the student, F(x_t, t, t, c) its velocity at x_t.

    x_r = x_t - (t - r) F(x_t, t, r, c)             a jump                                       (1)
    F = (x_t - xhat) / t                            xhat: a network's estimate of the clean x    (2)
    time embedding = E1(t) + (t - r) E2(r)          E1: the teacher's; E2 starts at zero         (3)
    S(u) = s u / (1 + (s - 1) u)                    s is --shift; n jumps: times T S(1 - i / n)  (4)
    v = the teacher's velocity at x_t, guided       --velocity data: z - x + (w - 1) sg[F(x_t, t,
                                                    t, c) - F(x_t, t, t, null)]                  (5)
    dF = (F(x_t + a v, t + a, r, c) - F(x_t - b v, t - b, r, c)) / (a + b)
                                                    a, b: 0.005, less at T and at r              (6)
    l = W(t) |F(x_t, t, r, c) - sg[v - (t - r) dF]|^2                                            (7)
    W(t) = C t sqrt(1 - t)                          of mean 1 over the times of 1000 jumps       (8)
    l <- l sg[0.1 / (l + 0.1)]                      --rows balanced: l sg[m / (l + 1e-5)] where
                                                    r < t; m is the mean of l where r = t        (9)
    L_map = mean l                                  half of the rows has r = t, a quarter r = 0,
                                                    a quarter any r                             (10)
    x: jumps from z along T, t_k, t_{k+1}, 0        N of --rollouts, k ~ U{0..N-1}; t_i: (4)    (11)
    r = mu_teacher(x_t, t, c), guided (--dm-cfg)    f = mu_critic(x_t, t, c), not guided        (12)
    g = (f - r) / mean|x - r|                       t = T S(U(0,1)); r is that of (12)          (13)
    L_dm = mean (x - sg[x - g])^2                   student of the second stage: L_dm + L_map   (14)
    L_critic = mean |F_critic(x_t, t, c) - (z - x)|^2       x: (11) anew; t = T S(sigmoid(N(0,1)))
                                                                                                (15)

Usage:
    python anyflow.py                                       # any number of steps, MNIST, on a CPU
    python anyflow.py --nfe 4                               # the same training, 4-step samples
    python anyflow.py --teacher toy                         # 2-D mixture
    torchrun --nproc_per_node=8 anyflow.py --teacher wan2.1 --prompts prompts.txt    # 8 GPUs

Differences from the paper, variants and results: docs/anyflow.md.
"""

import training.interrupt  # noqa: F401  # isort: skip

import math

import torch
from torch.distributed import all_reduce

from common.errors import launch, require
from common.model import take_rows
from common.schedules import Flow, add_noise, expand
from common.teachers.load import load_teacher
from common.teachers.students import start_from
from data.images import load_images
from training.ema import EMA
from training.flags import Parser
from training.optim import adamw
from training.plan import describe_steps
from training.report import Report
from training.run import Run

EPS = 0.005  # a and b of (6)
BOUND = 0.1  # of (9)
SECOND_BETAS = (0.0, 0.999)  # AdamW's, of student and critic in the second stage [C]
NULL_SHARE = 0.1  # share of samples without condition, where the student guides itself [C]
T_LEAST = 1e-3  # no network is evaluated at smaller t: (2) is 0 / 0 at t = 0

# Presets: the flags for a kind of teacher, unless the command line gives others.
# [C] official code, [O] ours, measured in docs/RESULTS.md. `source` is printed at the start;
# docs/teachers.md has all of them in a table.
WAN = dict(  # 1.3B, as a whole network; the code has LoRA of rank 256
    cfg=3.0,
    dm_cfg=4.0,
    nfe=4,
    velocity="data",
    shift=5.0,
    rows="balanced",
    rollouts=[2, 4, 8, 16, 50],
    map_iters=6000,
    lr=5e-5,
    lr_dm=2e-6,
    lr_fake=2e-6,
    betas=(0.9, 0.95),
    weight_decay=0.0,
    batch=32,
    iters=7200,
    warmup=1000,
    ema=22_000,  # 0.999 per step
    clip=1.0,
    source="[C]",
)
TOY = dict(  # [O]
    WAN,
    cfg=1.0,
    dm_cfg=1.0,
    nfe=1,
    velocity="teacher",
    shift=1.0,
    rows="bounded",
    rollouts=[1, 2, 4, 8],
    map_iters=2000,
    lr=1e-3,
    lr_dm=2e-4,
    lr_fake=2e-4,
    batch=256,
    iters=2600,
    warmup=0,
    cooldown=0.5,
    ema=5000,
    source="[O]",
)
MNIST = dict(  # not measured
    TOY,
    cfg=1.5,
    dm_cfg=1.5,
    map_iters=800,
    lr=5e-4,
    lr_dm=1e-4,
    batch=64,
    iters=1000,
    warmup=20,
    ema=2000,
    clip=10.0,
    source="nobody's: the toy's",
)
EMOJI = dict(MNIST, cfg=3.5, dm_cfg=3.5, nfe=4, lr=2e-4, batch=32)
OTHER = dict(WAN, source="nobody's: Wan's")
PRESETS = {
    "default": OTHER,
    "toy": TOY,
    "toy-cond": TOY,
    "mnist": MNIST,
    "emoji": EMOJI,
    "emoji-flow": EMOJI,
    "own": MNIST,
    "edm-imagenet64": dict(OTHER, cfg=1.0, dm_cfg=1.0, shift=1.0),
    "edm-cifar10": dict(OTHER, cfg=1.0, dm_cfg=1.0, shift=1.0),
    "dit": dict(OTHER, cfg=1.5, dm_cfg=1.5, shift=1.0),
    "sit": dict(OTHER, cfg=1.5, dm_cfg=1.5, shift=1.0),
    "flux": dict(OTHER, cfg=1.0, dm_cfg=1.0),  # its network has an input for guidance already
    "wan2.1": WAN,
    "wan2.1-14b": dict(WAN, map_iters=4000, iters=5200, batch=16),
    "wan2.2": dict(OTHER, map_iters=4000, iters=5200, batch=16),
    "wan2.2-5b": OTHER,
}


def parse_args(argv=None):
    p = Parser(__doc__, critic=True, images=True)
    add = p.method.add_argument
    add("--map-iters", type=int, help="iterations of the first stage; then (14) joins")
    add("--lr-dm", type=float, help="learning rate of the student in the second stage")
    add("--velocity", choices=["teacher", "data"], help="v of (5)")
    add("--image-free", action="store_true", help="x of (10) are the student's one-step samples")
    add("--shift", type=float, help="s of (4)")
    add("--rows", choices=["balanced", "bounded"], help="form of (9)")
    add("--rollouts", type=int, nargs="+", metavar="N", help="numbers of jumps of (11)")
    add("--dm-cfg", type=float, help="guidance scale of the teacher in (12)")
    args = p.parse(PRESETS, argv)
    if args.smoke:
        args.map_iters = 1
    ok = 0 <= args.map_iters <= args.iters
    require(ok, f"--map-iters: expected 0 to --iters {args.iters}, found {args.map_iters}")
    ok = not args.image_free or args.velocity == "teacher"
    require(ok, "--image-free: without images the velocity is the teacher's; --velocity teacher")
    unused = args.image_free and args.data and not args.from_image
    require(not unused, f"--data {args.data}: this run uses no images (--image-free)")
    require(args.shift > 0, f"--shift: expected a number > 0, found {args.shift}")
    require(args.lr_dm > 0, f"--lr-dm: expected a number > 0, found {args.lr_dm}")
    require(args.dm_cfg >= 0, f"--dm-cfg: expected a number >= 0, found {args.dm_cfg}")
    ok = min(args.rollouts) >= 1
    require(ok, f"--rollouts: expected numbers of at least 1, found {min(args.rollouts)}")
    return args


# ---- networks ------------------------------------------------------------------------------------


def end_time(schedule):
    """T: the teacher's noisy end as a time of the linear path. EDM: sigma_max / (1 + sigma_max)."""
    alpha, sigma = schedule.alpha(schedule.t_max), schedule.sigma(schedule.t_max)
    return float(sigma / (alpha + sigma))


def velocity(net, x_t, t, r, cond):
    """F(x_t, t, r, c) [B, *shape], of a student, or of another network, which does not see r.

    t, r: [B] float64. The second time is a number and the factor on its embedding.
    """
    t = t.clamp(min=T_LEAST)
    second_time = torch.stack([r, t - r], 1)  # (3)
    xhat = net(x_t, 1 - t, t, cond | dict(r=second_time))
    return ((x_t.double() - xhat.double()) / expand(t, x_t)).to(x_t.dtype)  # (2)


def jump(net, x, t, r, cond):
    """x at the lower time r. t, r: numbers."""
    t, r = (torch.full((len(x),), s, dtype=torch.float64, device=x.device) for s in (t, r))
    move = expand(t - r, x) * velocity(net, x, t, r, cond)
    return (x.double() - move).to(x.dtype)  # (1)


# ---- times ---------------------------------------------------------------------------------------


def jump_times(n, shift, T=1.0):
    """Times T = t_0 > ... > t_n = 0 of n jumps, float64 [n + 1]. 4, shift 5: 1, 0.9375, 0.8333,
    0.625, 0."""
    u = 1 - torch.arange(n + 1, dtype=torch.float64) / n
    return T * Flow(shift).shifted(u)  # (4)


def rollout_times(n, k, shift, T=1.0):
    """Times of (11), numbers: T, t_k, t_{k+1}, 0 without repetitions."""
    times = jump_times(n, shift, T).tolist()
    return sorted({T, times[k], times[k + 1], 0.0}, reverse=True)


def map_times(u, w, first, shift, T=1.0):
    """t, r of (10) for uniform u, w [B]. first: place of the first sample in the global batch.

    By turns r = t, r = 0, r = t, any r: so every process has all of them.
    """
    place = torch.arange(first, first + len(u)) % 4
    t, r = torch.maximum(u, w), torch.minimum(u, w)
    r = torch.where(place == 1, 0.0, torch.where(place == 3, r, t))
    return T * Flow(shift).shifted(t), T * Flow(shift).shifted(r)


def time_weight(t, shift):
    """W(t) [B]."""
    grid = jump_times(1000, shift)
    mean = (grid * (1 - grid).sqrt()).sum() / 1000
    return t * (1 - t).sqrt() / mean  # (8)


# ---- few-step sampling ---------------------------------------------------------------------------


@torch.no_grad()
def sample(student, z, cond, nfe, noise=None, shift=1.0):
    """n jumps without guidance and without further noise. -> x [B, *shape].

    z: unit noise [B, *shape].
    """
    T = end_time(student.schedule)
    return rollout(student, z, cond, jump_times(nfe, shift, T).tolist())


def rollout(net, z, cond, times):
    """x at the last of the times, from unit noise z at the first."""
    x = times[0] * z
    for t, r in zip(times, times[1:]):
        x = jump(net, x, t, r, cond)  # (11)
    return x


# ---- losses --------------------------------------------------------------------------------------


@torch.no_grad()
def teacher_velocity(teacher, x_t, t, cond, w):
    """v of (5) [B, *shape], from the frozen teacher."""
    t = t.clamp(min=T_LEAST)
    xhat = teacher.guided(x_t, 1 - t, t, cond, w)
    return ((x_t.double() - xhat.double()) / expand(t, x_t)).to(x_t.dtype)  # (5)


@torch.no_grad()
def data_velocity(student, x, z, x_t, t, cond, w):
    """v of (5) [B, *shape], from a sample x and its noise z. The student guides itself."""
    if w == 1:
        return z - x
    null = student.unconditional(cond, len(x))
    both = {name: torch.cat([cond[name], null[name]]) for name in cond}
    t = torch.cat([t, t])
    c, u = velocity(student, torch.cat([x_t, x_t]), t, t, both).chunk(2)
    return z - x + (w - 1) * (c - u)  # (5)


@torch.no_grad()
def slope(student, x_t, v, t, r, cond, T=1.0):
    """dF of (6) [B, *shape] along v. Passes are in float32 whatever --dtype is, as the difference
    of two rounded numbers would be mostly rounding."""
    a = (T - t).clamp(max=EPS)
    b = (t - r).clamp(max=EPS)
    dtype = student.dtype
    student.dtype = torch.float32
    try:
        high = velocity(student, add_noise(x_t, 1.0, a, v), t + a, r, cond)
        low = velocity(student, add_noise(x_t, 1.0, -b, v), t - b, r, cond)
    finally:
        student.dtype = dtype
    return ((high.double() - low.double()) / expand((a + b).clamp(min=1e-9), x_t)).to(x_t.dtype)


def map_target(v, dF, t, r):
    return (v - expand(t - r, v) * dF).to(v.dtype).detach()  # (7)


def squared_error(prediction, target, weight):
    """l of (7) [B], float32."""
    each = (prediction.float() - target.float()).square().flatten(1).mean(1)
    return expand(weight, each) * each  # (7)


def bound(each):
    """l of (9) [B], for --rows bounded: no row pulls much harder than one with l = BOUND.

    In (6) the network's own error is divided by a + b = 0.01. Rows where it is large would outweigh
    all others and feed it back: without this, training diverges.
    """
    return each * (BOUND / (each + BOUND)).detach()  # (9)


def balance(each, is_velocity, world=1):
    """l of (9) [B], for --rows balanced. is_velocity: bool [B], the rows with r = t."""
    sums = torch.stack([(each * is_velocity).sum(), is_velocity.double().sum()]).detach()
    if world > 1:
        all_reduce(sums)
    mean = sums[0] / sums[1]
    return torch.where(is_velocity, each, each * (mean / (each + 1e-5)).detach())  # (9)


@torch.no_grad()
def dm_gradient(x, x_t, alpha, sigma, cond, real, fake, cfg):
    """g of (13) [B, *shape], without graph; also r, f and the normaliser [B] for the log.

    x: samples of the student. x_t: x with noise at the levels alpha, sigma [B].
    """
    r = real.guided(x_t, alpha, sigma, cond, cfg)  # (12)
    f = fake(x_t, alpha, sigma, cond)  # (12)
    norm = (x - r).abs().flatten(1).mean(1)  # [B]
    safe = norm.where(norm != 0, math.inf)  # 0 / 0 is 0; after a nan, run.step skips the step
    g = (f - r) / safe.view(-1, *[1] * (x.ndim - 1))  # (13)
    return g, r, f, norm


def dm_loss(x, g):
    """Without the half of DMD2: the gradient is 2 g / numel(x)."""
    return (x - (x - g).detach()).square().mean()  # (14)


def critic_loss(prediction, x, z):
    return (prediction - (z - x)).square().mean()  # (15)


# ---- training ------------------------------------------------------------------------------------


def main():
    args = parse_args()
    run = Run(__file__, args)
    load = run.teacher_kwargs(students=1, critics=1)
    teacher = load_teacher(args.teacher, run.device, run.dtype, **load)
    schedule = Flow(args.shift)
    T = end_time(teacher.schedule)

    # Networks: student and critic start as the teacher or as another run's, the student with one
    # more input (3).
    images = None if args.image_free else load_images(args.data, teacher, run.print)
    torch.manual_seed(args.seed)  # the new embedding starts equal on all processes
    student = teacher.copy(args.lora).extend("r")
    critic = teacher.copy(args.lora_fake)
    if args.start and not args.resume:
        start_from(args.start, teacher, student, critic, run.print)
    student_ddp = run.train(student)  # DDP around both; for passes that train weights
    critic_ddp = run.train(critic)
    opt_g = adamw(student, args.lr, args)
    opt_c = adamw(critic, args.lr_fake, args)
    set_betas(opt_c, SECOND_BETAS)
    ema = EMA(student, args.ema, args.ema_cpu)
    report = Report(run, teacher, ema, sample, dict(shift=args.shift))
    facts = dict(
        steps=describe_steps(Flow(), jump_times(args.nfe, args.shift, T)[:-1]),
        stages=f"flow map; distribution matching from iteration {args.map_iters}",
    )
    run.print_summary(images, student=student, critic=critic, teacher=teacher, **facts)

    state = dict(student=student, opt_g=opt_g, ema=ema, critic=critic, opt_c=opt_c)
    first = run.resume(state)
    it = first - 1  # if no iteration is left
    for it in run.loop(first, args.iters, show=["map"]):
        draw = run.draw(it)
        is_second = it >= args.map_iters
        span = (args.map_iters, args.iters) if is_second else (0, args.map_iters)
        lr = args.lr_dm if is_second else args.lr
        run.set_rates(it, (opt_g, lr), (opt_c, args.lr_fake), span=span)
        is_border = it == args.map_iters and it > 0 and run.microstep == 0
        if is_border:  # the second stage starts from the average
            student.load_state_dict(ema.model.state_dict())
            opt_g.state.clear()
        if is_second:
            set_betas(opt_g, SECOND_BETAS)

        # Flow map: both stages. Without images, on the student's own one-step samples.
        if images:
            x, cond = images.samples(run, teacher, it)
        else:
            cond = teacher.random_cond(draw)
            x = sample(student, draw.randn(*teacher.shape), cond, 1)
        if args.velocity == "data" and args.cfg != 1:  # the null branch guides, so it must learn
            cond = teacher.drop_condition(cond, draw.rand() < NULL_SHARE)
        z = draw.randn(*teacher.shape)
        t, r = map_times(draw.rand(), draw.rand(), run.batch * run.data_shard[0], args.shift, T)
        x_t = add_noise(x, 1 - t, t, z)
        if args.velocity == "teacher":
            v = teacher_velocity(teacher, x_t, t, cond, args.cfg)
        else:
            v = data_velocity(student, x, z, x_t, t, cond, args.cfg)
        target = v.clone()
        jumps = (r < t).nonzero().flatten()  # rows of the batch; where r = t the target is v
        own = {name: take_rows(value, jumps) for name, value in cond.items()}
        at_jumps = (take_rows(x_t, jumps), take_rows(v, jumps), t[jumps], r[jumps])
        dF = slope(student, *at_jumps, own, T)
        target[jumps.to(run.device, non_blocking=True)] = map_target(
            at_jumps[1], dF, t[jumps], r[jumps]
        )
        prediction = velocity(student_ddp, x_t, t, r, cond)
        each = squared_error(prediction, target, time_weight(t, args.shift))
        logs = dict(map=each.mean())
        if args.rows == "bounded":
            each = bound(each)
        else:
            each = balance(each, (r == t).to(run.device, non_blocking=True), run.world)
        loss = each.mean()  # (10)

        # Distribution matching, on the student's own samples; those of the critic are others.
        if is_second:
            times = random_rollout(draw, args.rollouts, args.shift, T)
            cond = teacher.random_cond(draw)
            with torch.no_grad():
                x_critic = rollout(student, draw.randn(*teacher.shape), cond, times)
            cond_critic = cond
            times = random_rollout(draw, args.rollouts, args.shift, T)
            cond = teacher.random_cond(draw)
            x = rollout(student_ddp, draw.randn(*teacher.shape), cond, times)
            t = T * schedule.shifted(draw.rand())
            x_t = add_noise(x.detach(), 1 - t, t, draw.randn(*teacher.shape))
            g, real, fake, norm = dm_gradient(x, x_t, 1 - t, t, cond, teacher, critic, args.dm_cfg)
            loss_dm = dm_loss(x, g)
            loss = loss + loss_dm  # (14)
            logs |= dict(dm=loss_dm, dm_norm=norm.mean(), mean=x.mean(), std=x.std())
            logs |= dict(real_gap=(x - real).square().mean(), fake_gap=(x - fake).square().mean())
        loss.backward()
        logs |= dict(grad_student=run.step(opt_g, args.clip))  # clip, step, zero the gradients
        ema.update(run.images_stepped)

        # Critic.
        if is_second:
            t = T * schedule.shifted(draw.randn().double().sigmoid())
            z = draw.randn(*teacher.shape)
            x_t = add_noise(x_critic, 1 - t, t, z)
            prediction = velocity(critic_ddp, x_t, t, t, cond_critic)
            loss = critic_loss(prediction, x_critic, z)
            loss.backward()
            logs |= dict(critic=loss, grad_critic=run.step(opt_c, args.clip))

        run.after(it, logs, state, report)

    run.finish(it, state, report)
    report.end(it + 1)


def set_betas(opt, betas):
    for group in opt.param_groups:
        group["betas"] = betas


def random_rollout(draw, rollouts, shift, T):
    """Times of (11), the same on all processes."""
    n = rollouts[draw.shared_randint(0, len(rollouts))]
    return rollout_times(n, draw.shared_randint(0, n), shift, T)


if __name__ == "__main__":
    launch(main)
