"""FreeFlow: flow map distillation without data. Tong et al., CVPR 2026, arXiv 2511.19428.

A student learns where the teacher's ODE carries a noise z after any duration, by looking at its own path only: at every point of that path its velocity
shall be the teacher's (prediction). Errors add up along the path, so the end point is corrected: the student's images, noised again, shall have the same
velocity field as the teacher's data (correction); an auxiliary network learns their field on the fly. No images, no stored trajectories, no GAN. Noise
and image stay paired as they are in the teacher, and the guidance scale is an input of the student (--cfg-range).

Notation: linear path x_t = (1 - t) x + t n; t = 1 is the prior. u points from noise to data: u(x_t, t) = E[x - n | x_t]. Duration d = 1 - t. sg[]
stops gradients; c is the label or prompt, w the guidance scale. Every network is asked through its estimate of the clean x, whatever its schedule.
    u(x_t, t, c) = (x0(x_t, t, c) - x_t) / t                                                                                           (1)
    u_w = u(null) + w (u(c) - u(null))     in the guidance interval of t; outside of it u(c)                                           (2)
    F(z, d, c, w) = x0(z, 1, c; d, w) - z  the student: average velocity over the first d; x_t enters as z, t as 1, d and w are inputs (3)
    f(z, d) = z + d F(z, d)                flow map; f(z, 1) is the image                                                              (4)
    D_G = F + d dF/dd - u_w(f(z, d), 1 - d)                                     prediction; z does not depend on d: a partial derivative (5)
    D_G = F - (d' F(z, d') + (d - d') u_w(f(z, d'), 1 - d')) / d                the same with finite steps (--form discrete), d' = d - 1/grid (6)
    G = D_G / (mean D_G^2 + eps)^k         mean over the elements of each sample                                                       (7)
    D_N = g(x_r, r, c) - u_w(x_r, r, c)    correction: x_r = (1 - r) x + r n, x = f(z, 1), r = sigmoid(0.8 + normal)                   (8)
    G = lambda D_N,                        lambda = balance * mean |G of (7)| / mean |D_N|                                             (9)
    L = mean F . sg[G]                     75 % of the batch have the G of (7), 25 % that of (9)                                      (10)
    L_aux = mean (g(x_r, r, c) - (x - n))^2                                     x = sg[f(z, 1)], r ~ U(0, 1); trains g, unguided      (11)

Commands (results and times: README and docs/RESULTS.md):
    python flowmap.py                                                # embedded MNIST teacher, two CPU cores, minutes
    python flowmap.py --teacher toy                                  # 2-D mixture, half a minute
    python flowmap.py --form discrete --correction 0                 # prediction alone, without forward-mode derivatives
    torchrun --nproc_per_node=8 flowmap.py --teacher DIR --cfg-range 1 3    # any teacher folder, 8 GPUs

Differences from the paper:
    - the authors released sampling code only, and the paper's appendix was not available to us. Learning rates, betas, average, the law of d, eps of (7), the
      law of r in (11), the spread of r in (8), the range of w, one step of g per student step, fresh samples for it: our choices in every preset.
    - the mnist and toy presets are ours: minutes on a CPU, constant guidance instead of a range of w, mnist with eps 0.1 (docs/LOG.md).
    - --form discrete: the paper names a discrete variant; (6) is our derivation. Its fixed point is the teacher's Euler sampler with `grid` steps.
    - lambda compares norms after the weighting (7), and L is a mean over elements, where the paper may mean other constants (Adam divides them out).
    - the teacher is never asked below t = 0.001 or below its own least noise, where (1) is 0 / 0.
"""

import math

import torch
from torch.distributed import all_reduce
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.ema import EMA
from common.errors import UserError, launch
from common.files import write_json
from common.flags import Parser
from common.report import evaluate_run, export, pictures
from common.run import Run
from common.sampling import generate
from common.schedules import expand
from common.teachers.load import load_teacher

PRESETS = {  # the flags of a teacher; every one can be overridden. Sources: [P] paper or its notes, [F] what NVlabs/FastGen uses for MeanFlow, ours = measured here
    "mnist": dict(
        cfg=1.5,
        eps=0.1,
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
    ),
    "toy": dict(
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
        eps=1.0,
    ),  # with eps 1e-3 the rows that are right already outweigh those at the end: energy distance 0.35 instead of 0.0014
    # ImageNet-256 with SiT-XL/2: batch 256, 1.5M iterations [P]; lr, betas, warm-up, average [F]; released students were sampled at w = 1.5 [P]; range: ours
    "default": dict(
        cfg=1.5,
        cfg_range=(1.0, 3.0),
        lr=1e-4,
        lr_fake=1e-4,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        batch=256,
        iters=1500000,
        warmup=1000,
        cooldown=0.0,
        ema=1770000,
        clip=1.0,
    ),
}
PRESETS |= {
    "toy-cond": PRESETS["toy"],
    "emoji": dict(PRESETS["mnist"], cfg=3.5, lr=2e-4, lr_fake=2e-4, batch=32, iters=350),
}
for preset in PRESETS.values():
    preset["nfe"] = 1
READOUTS, PATH_STEPS, PATH_N = (
    (0.25, 0.5, 0.75, 1.0),
    32,
    250,
)  # of `fidelity`: durations, Euler steps of the teacher, noises


def parse_args(argv=None):
    p = Parser(__doc__)
    p.method.description = "--nfe is 1: the student is trained from pure noise only, so noising an image and asking it again is not valid"
    p.method.add_argument(
        "--form",
        choices=["jvp", "fd", "discrete"],
        default="jvp",
        help="of (5): forward-mode derivative, central difference (step 0.01), or (6); the first two run in float32",
    )
    p.method.add_argument(
        "--grid",
        type=int,
        help="number of steps of --form discrete, default 32; durations are drawn on this grid",
    )
    p.method.add_argument(
        "--correction",
        type=float,
        default=0.25,
        help="share of the batch that (8) has; 0: prediction alone, 1: correction alone",
    )
    p.method.add_argument("--balance", type=float, default=1.0, help="factor of lambda in (9)")
    p.method.add_argument(
        "--k", type=float, default=1.0, help="exponent of (7); 0: plain squared error"
    )
    p.method.add_argument("--eps", type=float, default=1e-3, help="of (7)")
    p.method.add_argument(
        "--cfg-range",
        type=float,
        nargs=2,
        help="guidance scales the student is trained for, uniform; it is then an input; default: --cfg only",
    )
    p.method.add_argument(
        "--interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        help="times t at which (5) and (6) are guided",
    )
    p.method.add_argument(
        "--interval-correction",
        type=float,
        nargs=2,
        default=(0.0, 0.7),
        help="times r at which (8) is guided",
    )
    p.method.add_argument(
        "--at-end",
        type=float,
        default=0.1,
        help="share of the durations that are exactly 1; the others are uniform",
    )
    p.method.add_argument(
        "--r-mean", type=float, default=0.8, help="of the normal number in (8); higher: more noise"
    )
    p.method.add_argument(
        "--ratio", type=int, default=1, help="steps of the auxiliary network per student step"
    )
    args = p.parse(PRESETS, argv)
    args.grid, given = 32 if args.grid is None else args.grid, args.grid is not None
    low, high = args.cfg_range = tuple(args.cfg_range or (args.cfg, args.cfg))
    for wrong, message in (
        (
            args.nfe != 1,
            f"--nfe {args.nfe}: expected 1; the student is trained from pure noise only, more steps are not valid",
        ),
        (args.data, f"--data {args.data}: this method never looks at images"),
        (args.grid < 1, f"--grid: expected at least 1, found {args.grid}"),
        (given and args.form != "discrete", "--grid: means something only with --form discrete"),
        (
            not 0 <= args.correction <= 1,
            f"--correction: expected a share from 0 to 1, found {args.correction}",
        ),
        (
            args.correction == 1 and args.form != "jvp",
            f"--form {args.form}: --correction 1 leaves no sample to the prediction",
        ),
        (
            args.correction == 0 and args.ratio != 1,
            f"--ratio {args.ratio}: --correction 0 has no auxiliary network to train",
        ),
        (args.ratio < 1, f"--ratio: expected at least 1, found {args.ratio}"),
        (
            args.ratio > 1 < args.accumulate,
            f"--ratio {args.ratio}: with --accumulate the auxiliary network makes one step per iteration",
        ),
        (not args.balance >= 0, f"--balance: expected a number >= 0, found {args.balance}"),
        (
            not (args.k >= 0 and args.eps > 0),
            f"--k and --eps: expected k >= 0 and eps > 0, found {args.k} and {args.eps}",
        ),
        (not math.isfinite(args.r_mean), f"--r-mean: expected a number, found {args.r_mean}"),
        (
            not 0 <= args.at_end < 1,
            f"--at-end: expected a share from 0 to below 1, found {args.at_end}",
        ),
        (
            not 0 <= low <= args.cfg <= high,
            f"--cfg-range: expected 0 <= low <= --cfg <= high, found {low} {high} and --cfg {args.cfg}",
        ),
        *(
            (
                not 0 <= i[0] <= i[1] <= 1,
                f"--{name}: expected 0 <= low <= high <= 1, found {i[0]} {i[1]}",
            )
            for name, i in (
                ("interval", args.interval),
                ("interval-correction", args.interval_correction),
            )
        ),
    ):
        if wrong:
            raise UserError(message)
    return args


# ---- networks ---------------------------------------------------------------------------------------------------------------------------
#   teacher            frozen                     u
#   student            trained, starts as the teacher at t = 1, with d (and w) as new inputs: F. Average of its weights is what is kept
#   critic             trained, starts as the teacher (w as new input if the student has it): g, the field of the student's noised images


def scalars(d, w):
    """New inputs of student and critic, for `Model.extend`. d is compressed so that no frequency of its embedding exceeds 4.7 rad per unit: derivatives
    along d multiply by it, and at the 12.6 rad of uncompressed inputs (7) with k = 0 is known to fail."""
    return dict(
        duration=0.375 * d, guidance=((w if torch.is_tensor(w) else torch.full_like(d, w)) - 1) / 4
    )


def velocity(net, x, t, cond):
    """Generating velocity of any network, [B, *shape], and the one place where signs and times are settled. t: 1 is noise; 0-d or [B].

    Teachers differ (SiT: time 1 - t, output data - noise; SiT + REPA, SD3, FLUX, mnist: time t, output noise - data; EDM, VP: other schedules), but a Model
    is asked for its clean x at (alpha, sigma), and on the linear path that estimate has one velocity only."""
    s = getattr(net, "module", net).schedule  # of DDP's wrapper: what is wrapped
    ratio = float(
        s.sigma(torch.tensor(s.t_min)) / s.alpha(torch.tensor(s.t_min))
    )  # its least noise
    t = torch.as_tensor(t, dtype=torch.float64).clamp(min=max(1e-3, ratio / (1 + ratio)))
    return ((net(x, 1 - t, t, cond).double() - x) / expand(t, x)).to(x.dtype)  # (1)


def guided_velocity(net, x, t, cond, w, interval):
    """w: a number or [B]; interval: (low, high) of the times that are guided. w = 1 is the conditional, in one pass."""
    c = velocity(net, x, t, cond)
    if not torch.is_tensor(w) and w == 1:
        return c
    u = velocity(net, x, t, cond | net.null(len(x)))
    t = torch.as_tensor(t, dtype=torch.float64, device=x.device)
    w = torch.where(
        (t >= interval[0]) & (t <= interval[1]),
        torch.as_tensor(w, dtype=torch.float64, device=x.device),
        1.0,
    )
    return (u + expand(w, x) * (c - u)).to(x.dtype)  # (2)


def average_velocity(student, z, d, cond, w):
    return velocity(student, z, 1.0, cond | scalars(d, w))  # (3)


def flow_map(z, d, F):
    return (z + expand(d, z) * F).to(z.dtype)  # (4)


# ---- helpers ----------------------------------------------------------------------------------------------------------------------------


def roles(batch, share):
    """bool [batch], True: correction. Spread over the batch, so that every process has its share of both and N processes do what one does."""
    place = torch.arange(batch + 1, dtype=torch.float64)
    return (place * share + 1e-9).floor().diff() > 0


def durations(u, at_end, grid=None):
    """u [B] uniform in [0, 1) -> d in [0, 1], a share `at_end` exactly 1; grid: rounded up to multiples of 1 / grid."""
    d = (u / (1 - at_end)).clamp(max=1)
    return d if grid is None else (d * grid).ceil().clamp(min=1) / grid


def derivative(student, z, d, cond, w, form="jvp", h=1e-2):
    """(F, dF/dd) at z [B, *shape], d [B]. Passes in float32 whatever --dtype: in bf16 differences are noise. Not through DDP, whose hooks know no duals."""
    dtype, student.dtype = student.dtype, torch.float32
    F = lambda d: average_velocity(student, z, d, cond, w)
    try:
        if form == "fd":
            return F(d), (F(d + h) - F(d - h)) / (2 * h)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode derivative
            return torch.func.jvp(F, (d,), (torch.ones_like(d),))
    finally:
        student.dtype = dtype


def per_sample(x):
    return x.flatten(1).square().mean(1)


# ---- losses -----------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def prediction(student, teacher, z, d, cond, w, interval=(0, 1), form="jvp"):
    """D_G [B, *shape] with the derivative: where the student's velocity along its own path is not the teacher's there."""
    F, dF = derivative(student, z, d, cond, w, form)
    return (
        F
        + (expand(d, z) * dF).to(z.dtype)
        - guided_velocity(teacher, flow_map(z, d, F), 1 - d, cond, w, interval)
    )  # (5)


@torch.no_grad()
def prediction_discrete(F, student, teacher, z, d, cond, w, interval=(0, 1), grid=32):
    """D_G with a finite step: F(z, d) should be what the student's path up to d' gives, continued by one Euler step of the teacher."""
    before = (d - 1 / grid).clamp(min=0)
    Fb = average_velocity(student, z, before, cond, w)
    u = guided_velocity(teacher, flow_map(z, before, Fb), 1 - before, cond, w, interval)
    return F - ((expand(before, z) * Fb + expand(d - before, z) * u) / expand(d, z)).to(
        z.dtype
    )  # (6)


def weighted(D, k, eps):
    return D / (per_sample(D) + eps).pow(k).view(-1, *[1] * (D.ndim - 1))  # (7)


@torch.no_grad()
def correction(critic, teacher, x, r, n, cond, w, interval=(0, 1)):
    """D_N [B, *shape]: velocity of the student's noised images minus that of the teacher's."""
    x_r = flow_map(x, r, n - x)
    return velocity(critic, x_r, r, cond | scalars(r, w)) - guided_velocity(
        teacher, x_r, r, cond, w, interval
    )  # (8)


def balance(G, D_N, factor, world, eps=1e-8):
    """lambda, 0-d, of all processes together. G, D_N: this process's rows of both parts; no G: nothing to be compared with, the factor itself."""
    sums = torch.stack(
        [per_sample(part).sqrt().sum() for part in (G, D_N)]
        + [torch.tensor(float(len(part)), device=G.device) for part in (G, D_N)]
    )
    if world > 1:
        all_reduce(sums)
    means = sums[:2] / sums[2:].clamp(min=1)
    return (
        factor * means[0] / (means[1] + eps) if len(G) else torch.full_like(means[0], factor)
    )  # (9)


def student_loss(F, G):
    return (F * G.detach()).mean()  # (10)


def aux_loss(critic, x, r, n, cond, w):
    x = x.detach()
    return (
        (velocity(critic, flow_map(x, r, n - x), r, cond | scalars(r, w)) - (x - n)).square().mean()
    )  # (11)


# ---- sampler ----------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(student, z, cond, nfe=1, noise=None, w=1.0, duration=1.0):
    """z [B, *shape] -> image, one pass; deterministic. duration < 1: the state at t = 1 - duration on the way there. w: guidance, if it is an input."""
    if nfe != 1:
        raise UserError(f"--nfe {nfe}: expected 1; a flow map from noise has no further steps")
    d = torch.full((len(z),), duration, dtype=torch.float64, device=z.device)
    return flow_map(z, d, average_velocity(student, z, d, cond, w))


@torch.no_grad()
def teacher_path(teacher, z, cond, w, steps, interval=(0, 1)):
    """States after 0, 1, ..., `steps` Euler steps on the linear path."""
    path = [z]
    for i in range(steps):
        path.append(
            path[-1] + guided_velocity(teacher, path[-1], 1 - i / steps, cond, w, interval) / steps
        )
    return path


def fidelity(student, teacher, args):
    """Mean squared distance of student and teacher from the same noise, along the path: {duration: distance}; `spread`: the variance of teacher images."""
    z, cond = next(generate(lambda m, z, c, noise: (z, c), teacher, PATH_N, args.seed, PATH_N))[2]
    path = teacher_path(teacher, z, cond, args.cfg, PATH_STEPS, args.interval)
    read = lambda d: sample(student, z, cond, w=args.cfg, duration=d)
    result = {
        str(d): float((read(d) - path[round(d * PATH_STEPS)]).square().mean()) for d in READOUTS
    }
    return result | dict(
        spread=float(path[-1].var(0).mean()), steps=PATH_STEPS, n=PATH_N, cfg=args.cfg
    )


def main():
    args, networks = parse_args(), (1, 1)  # students, critics: for the estimate of memory
    # ==== same in every script: setup ====
    run = Run("flowmap", args)
    teacher = load_teacher(args.teacher, run.device, run.dtype, **run.teacher_kwargs(*networks))
    schedule, shape = teacher.schedule, teacher.shape
    # ==== end ====
    share, (low, high) = args.correction, args.cfg_range
    least = max(math.ceil(1 / s) for s in (share, 1 - share) if s > 0)
    if run.batch < least:
        raise UserError(
            f"--batch {args.batch}: expected at least {least} samples per process (and part of --accumulate), so that each has some of both parts, found {run.batch}"
        )
    parts = [
        (role, (~role).nonzero()[:, 0], role.nonzero()[:, 0])
        for role in roles(args.batch, share).to(run.device).split(run.batch)
    ]
    student, critic = teacher.copy(args.lora), teacher.copy(args.lora_fake)
    torch.manual_seed(args.seed)  # new inputs start equal on all processes
    student.extend("duration", *["guidance"] * (low < high))
    critic.extend(*["guidance"] * (low < high))
    if args.grad_checkpoint:
        student.checkpoint_activations()
        critic.checkpoint_activations()
    S, A = (
        torch.compile(student) if args.compile else student,
        run.train(critic),
    )  # the student's gradients are averaged below
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
    sampler = dict(w=args.cfg)
    asked = (
        1 if low == high == 1 else 2
    )  # one pass = one forward of the network; a backward counts two, a forward-mode derivative two with its forward
    passes = (
        3
        + (1 - share) * (dict(jvp=2, fd=3, discrete=1)[args.form] + asked)
        + (share > 0) * (share * (1 + asked) + 4 * args.ratio)
    )
    run.print_summary(
        student=student,
        critic=critic,
        teacher=teacher,
        steps="1, from pure noise",
        guidance=f"{low:g} to {high:g}, sampled at {args.cfg:g}",
        prediction=f"{args.batch - int(share * args.batch + 1e-9)} of {args.batch} samples, {args.form}",
        passes_per_iteration=f"{passes:.2f}",
    )

    # ==== same in every script: resume ====
    state = dict(student=student, opt_g=opt_g, ema=ema) | dict(critic=critic, opt_c=opt_c)
    first = run.resume(state)
    it = first - 1
    # ==== end ====

    for it in run.loop(first, args.iters):
        corrected, P, C = parts[run.data_shard[0]]  # rows of the prediction, of the correction
        draw = run.draw(it)
        run.set_rates(it, (opt_g, args.lr), (opt_c, args.lr_fake))
        labels = lambda: teacher.encode(draw.randint(0, max(teacher.classes, 1)))
        scale = lambda: low + (high - low) * draw.rand() if low < high else args.cfg

        # student: one forward with gradient for both parts, then the direction G of each row
        z, cond, w = draw.randn(*shape), labels(), scale()
        d = torch.where(
            corrected,
            1.0,
            durations(draw.rand(), args.at_end, args.grid if args.form == "discrete" else None),
        )
        r, n = torch.sigmoid(args.r_mean + draw.randn().double()), draw.randn(*shape)
        rows = lambda i: ({k: v[i] for k, v in cond.items()}, w[i] if torch.is_tensor(w) else w)
        F = average_velocity(S, z, d, cond, w)
        D_G, D_N, G = F.detach()[P], F.detach()[C], torch.empty_like(z)
        if len(P):
            if args.form == "discrete":
                D_G = prediction_discrete(
                    D_G, student, teacher, z[P], d[P], *rows(P), args.interval, args.grid
                )
            else:
                D_G = prediction(student, teacher, z[P], d[P], *rows(P), args.interval, args.form)
        G[P] = G_P = weighted(D_G, args.k, args.eps)
        if len(C):
            D_N = correction(
                critic,
                teacher,
                z[C] + F.detach()[C],
                r[C],
                n[C],
                *rows(C),
                args.interval_correction,
            )
        G[C] = (lam := balance(G_P, D_N, args.balance, run.world)) * D_N
        student_loss(F, G).backward()
        run.average_gradients(student.parameters())
        norm = run.step(opt_g, args.clip)
        ema.update(run.images_stepped)
        logs = {
            name: per_sample(D).mean()
            for name, D in (("prediction", D_G), ("correction", D_N))
            if len(D)
        }
        logs |= dict(grad_student=norm) | ({"lambda": lam} if len(C) else {})

        # auxiliary network: fresh images of the student
        for _ in range(args.ratio if share else 0):
            cond, w = labels(), scale()
            x, n, r = (
                sample(student, draw.randn(*shape), cond, w=w),
                draw.randn(*shape),
                draw.rand(),
            )
            loss = aux_loss(A, x, r, n, cond, w)
            loss.backward()
            logs |= dict(aux=loss, std=x.std(), grad_critic=run.step(opt_c, args.clip))

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
    if run.is_main and args.eval_n:
        write_json(run.out / "path.json", result := fidelity(ema.model, teacher, args))
        run.print(
            f"distance to the teacher from the same noise: {', '.join(f'{result[str(d)]:.4g} after {d:g}' for d in READOUTS)}; spread {result['spread']:.4g}"
        )


if __name__ == "__main__":
    launch(main)
