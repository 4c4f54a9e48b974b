"""BOOT: data-free distillation of denoising diffusion models with bootstrapping. Gu, Zhai, Zhang, Liu, Susskind, ICML 2024, arXiv 2306.05544.

The student reads the noise eps that the teacher would start from, and a time t, and says in one pass where the teacher's trajectory from eps is at t.
Nothing but noise (and labels or prompts) is needed: at every time its target is its own answer a little earlier, carried one solver step further by the
teacher. It starts as the teacher's first guess and learns from the noise end down to the image. No images, no GAN, no average in the target.

Notation: x_t = alpha_t x + sigma_t eps; f(x_t, t, c) is the teacher's estimate of the clean x; lambda_t = log(sigma_t / alpha_t), rising in t; T is the
noise end, s < t; sg[] stops gradients; c is the label or prompt, w the guidance scale.
    y_t = (x_t - sigma_t eps) / alpha_t    signal: what a trajectory holds beside its own eps, which stays the same all along              (1)
    dy_t / dt = -lambda'_t (f(x_t, t, c) - y_t)    Signal-ODE: the teacher's probability-flow ODE, written in y. eps cancels               (2)
    y(eps, t, c)                           the student: the network asked for the clean x of eps at level T, with t as a new input         (3)
    f = f(null) + w (f(c) - f(null))                                                                                                       (4)
    k = 1 - exp(lambda_s - lambda_t)       exact if f stood still: DDIM.   --coef euler: k = (t - s) lambda'_t                             (5)
    y* = sg[y_t + k (f(alpha_t y_t + sigma_t eps, t, c) - y_t)],   y_t = y(eps, t, c): the same weights, no average                        (6)
    L_BS = mean ((y(eps, s, c) - y*) / k)^2                              the error of (2) in units of the signal                           (7)
    L_BC = mean (y(eps, T, c) - sg[f(eps, T, c)])^2                      boundary: at T the signal is the teacher's guess, not eps         (8)
    L = L_BS + beta L_BC                                                                                                                   (9)
    image: y(eps, 0, c);  state at any t: alpha_t y(eps, t, c) + sigma_t eps                                                              (10)
Why (6) is the teacher's sampler: a DDIM step is x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) f. With (1) on both sides the terms in
eps are equal and drop out; what is left, divided by alpha_s, is y_s = (1 - k) y_t + k f. Each step is a convex mix: errors of y are not amplified.

Commands (results and times: README and docs/RESULTS.md):
    python boot.py                                       # embedded MNIST teacher, two CPU cores, minutes
    python boot.py --teacher toy                         # 2-D mixture, half a minute; ends at energy distance < 0.01, all modes > 5 %
    python boot.py --grid logsnr --horizon-warmup 300    # even steps in log-SNR, learnt from the noise end downwards
    torchrun --nproc_per_node=8 boot.py --teacher DIR    # any teacher folder, 8 GPUs

Differences from the paper:
    - there is no official code, and of the paper only abstract, reviews and citations were at hand. delta, the law of t, beta, the constant of (7), the
      student's time input, T and every optimiser value are our choices; "progressive" training is rebuilt from its description (--horizon-warmup).
    - the printed loss has Euler's coefficient (--coef euler). It grows without bound where alpha_T is near 0; the exact one stays in [0, 1], allows T to be
      the teacher's own noise end, and makes the fixed point the teacher's DDIM (Euler for flow) sampler with 1 / delta steps.
    - pairs (t, s) are delta apart, cut at both ends: v ~ U(0, 1 + delta), t = min(v, 1), s = max(v - delta, 0). So s = 0, the image, is trained itself.
    - (7) and (8) share one batch: --boundary-frac of its rows have s = t = T. Where alpha_T = 0 (flow), (6) does not see y_T and (8) is a formality.
    - --solver midpoint asks the teacher again half way (second order, one more teacher call): used by others on top of BOOT's loss.
"""

import math
from typing import NamedTuple

import torch

from common.ema import EMA
from common.errors import UserError, launch
from common.files import write_json
from common.flags import Parser
from common.report import evaluate_run, export, pictures, save_grid
from common.run import Run
from common.sampling import generate
from common.schedules import expand
from common.teachers.load import load_teacher

PRESETS = {  # the flags of a teacher; every one can be overridden. All numbers are ours, the paper's are not public. toy: measured; mnist: two short trials
    "mnist": dict(
        cfg=1.5,
        nfe=1,
        delta=1 / 16,
        boundary_frac=1 / 16,
        lr=1e-3,
        betas=(0.5, 0.99),
        weight_decay=0.01,
        clip=10.0,
        batch=64,
        iters=1650,
        warmup=20,
        cooldown=0.5,
        ema=2000,
    ),
    "toy": dict(
        cfg=1.0,
        nfe=1,
        delta=1 / 32,
        lr=1e-3,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        clip=1.0,
        batch=256,
        iters=1500,
        warmup=0,
        cooldown=0.5,
        ema=0,
    ),
    "default": dict(
        cfg=1.0,
        nfe=1,
        delta=1 / 64,
        lr=1e-4,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        clip=1.0,
        batch=256,
        iters=100000,
        warmup=500,
        cooldown=0.0,
        ema=1770000,
    ),  # 0.9999 per step
}
PRESETS |= {
    "toy-cond": PRESETS["toy"],
    "emoji": dict(PRESETS["mnist"], cfg=3.5, lr=2e-4, batch=32, iters=500),
}
N = 1000  # nodes of the schedule's own grid that times are interpolated in
READOUTS, PATH_STEPS, PATH_N = (
    (0.75, 0.5, 0.25, 0.0),
    32,
    250,
)  # of `fidelity`: times, DDIM steps of the teacher, noises at the end of a run


def parse_args(argv=None):
    p = Parser(__doc__)
    p.method.description = (
        "all times are shares of the path: 1 is the teacher's noise end, 0 the image"
    )
    p.method.add_argument("--delta", type=float, help="t - s in (6)")
    p.method.add_argument(
        "--grid",
        choices=["time", "logsnr"],
        default="time",
        help="even steps of time on the teacher's own schedule, or of log-SNR",
    )
    p.method.add_argument(
        "--t-max",
        type=float,
        default=1.0,
        help="T; below 1 only where --coef euler needs alpha_T > 0",
    )
    p.method.add_argument("--coef", choices=["exp", "euler"], default="exp", help="of (5)")
    p.method.add_argument(
        "--solver",
        choices=["ddim", "midpoint"],
        default="ddim",
        help="f of (6): at t, or half way to s (a second teacher call)",
    )
    p.method.add_argument(
        "--weight", choices=["signal", "none"], default="signal", help="of (7): 1 / k^2, or 1"
    )
    p.method.add_argument(
        "--k-min", type=float, help="least k in the weight, default 0.02; the target has the true k"
    )
    p.method.add_argument("--beta", type=float, default=1.0, help="weight of (8) in (9)")
    p.method.add_argument(
        "--boundary-frac", type=float, default=0.25, help="share of the batch that (8) has"
    )
    p.method.add_argument(
        "--horizon-warmup",
        type=int,
        default=0,
        help="iterations over which the lower end of t and s falls from T to 0; 0: whole range at once",
    )
    p.method.add_argument(
        "--clip-x0",
        choices=["none", "static", "dynamic"],
        default="none",
        help="of the guided f, for pixels in [-1, 1]: clamp, or Imagen's threshold",
    )
    p.method.add_argument(
        "--at",
        type=float,
        default=0.0,
        help="time at which pictures and metrics read the signal; 0: the image",
    )
    p.method.add_argument(
        "--fidelity-every",
        type=int,
        default=100,
        help="iterations between looks at 64 fixed noises beside the teacher; 0: only at the end",
    )
    args = p.parse(PRESETS, argv)
    args.horizon_warmup = min(args.horizon_warmup, 1) if args.smoke else args.horizon_warmup
    for wrong, message in (
        (
            args.nfe != 1,
            f"--nfe {args.nfe}: expected 1; the student is a function of the noise alone, more passes are not defined",
        ),
        (args.data, f"--data {args.data}: this method never looks at images"),
        (
            args.lr_fake is not None or args.lora_fake,
            "--lr-fake, --lora-fake: this method has no second network",
        ),
        (
            not 0 < args.delta <= 1,
            f"--delta: expected a number above 0, at most 1, found {args.delta}",
        ),
        (
            not 0 < args.t_max <= 1,
            f"--t-max: expected a number above 0, at most 1, found {args.t_max}",
        ),
        (
            not 0 <= args.at <= args.t_max,
            f"--at: expected a time from 0 to --t-max, found {args.at}",
        ),
        (
            args.weight == "none" and args.k_min is not None,
            "--k-min: means something only with --weight signal",
        ),
        (
            not 0 < (0.02 if args.k_min is None else args.k_min) <= 1,
            f"--k-min: expected a number above 0, at most 1, found {args.k_min}",
        ),
        (not 0 <= args.beta < math.inf, f"--beta: expected a number >= 0, found {args.beta}"),
        (
            not 0 <= args.boundary_frac < 1,
            f"--boundary-frac: expected a share from 0 to below 1, found {args.boundary_frac}",
        ),
        (
            (args.beta > 0) != (int(args.boundary_frac * args.batch) > 0),
            f"--beta {args.beta:g}, --boundary-frac {args.boundary_frac:g}: of {args.batch} samples (8) has {int(args.boundary_frac * args.batch)}; set both to 0 or none",
        ),
        (
            args.horizon_warmup < 0,
            f"--horizon-warmup: expected at least 0, found {args.horizon_warmup}",
        ),
        (
            args.horizon_warmup >= args.iters,
            f"--horizon-warmup {args.horizon_warmup}: expected less than --iters {args.iters}, or the image is never trained",
        ),
        (
            args.fidelity_every < 0,
            f"--fidelity-every: expected at least 0, found {args.fidelity_every}",
        ),
    ):
        if wrong:
            raise UserError(message)
    args.k_min = args.k_min or 0.02
    return args


# ---- networks ---------------------------------------------------------------------------------------------------------------------------
#   teacher            frozen                     f
#   student            trained, starts as the teacher at T for every t (the embedding of t ends in a layer of zeros)


def first_input(schedule, top, eps):
    """What the teacher starts from: eps for VP and flow, sigma_max eps for EDM; sigma_T eps if T is not the noise end of a flow."""
    return eps if schedule.unit_norm else (expand(top.sigma, eps) * eps).to(eps.dtype)


def signal(student, eps, u, cond, top):
    """y at times u [B] (shares of the path), [B, *shape]. The image input and its level are those of T whatever u is."""
    return student(
        first_input(top.schedule, top, eps), top.alpha, top.sigma, cond | dict(time=u)
    )  # (3)


# ---- helpers ----------------------------------------------------------------------------------------------------------------------------


class Level(NamedTuple):
    """A point of the path: time of the teacher's schedule, alpha and sigma there; float64, 0-d or [B]."""

    schedule: object
    t: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor


def level(schedule, u, grid="time"):
    """Share u of the path (0-d or [B]) -> Level. u = 1 is the schedule's own noise end, u = 0 is clean (alpha 1, sigma 0) on every schedule. Between them
    "time" is even on the schedule's own grid (flow: t with its shift; VP: index; EDM: sigma^(1 / rho)), "logsnr" even in lambda within 0.01 < sigma / alpha < 100."""
    u = torch.as_tensor(u, dtype=torch.float64)
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64, device=u.device)
    if grid == "logsnr":
        low, high = (schedule.sigma(ends) / schedule.alpha(ends)).clamp(0.01, 100).log()
        t = schedule.t_from_snr((-2 * (low + u * (high - low))).exp())
    else:
        nodes = schedule.grid(N).to(u.device)
        nodes = torch.cat([ends[:1], nodes]) if nodes[0] > ends[0] else nodes
        place = u.clamp(0, 1) * (len(nodes) - 1)
        i = place.floor().long().clamp(max=len(nodes) - 2)
        t = torch.lerp(nodes[i], nodes[i + 1], place - i)
    t = torch.where(u >= 1, ends[1], torch.where(u <= 0, ends[0], t))
    return Level(
        schedule,
        t,
        torch.where(u <= 0, 1.0, schedule.alpha(t)),
        torch.where(u <= 0, 0.0, schedule.sigma(t)),
    )


def coefficient(t, s, coef="exp"):
    """k of the step from Level t to Level s: 0 for s = t, 1 for a clean s or an alpha_t of 0."""
    if coef == "euler":
        k = (t.t - s.t) * (
            t.schedule.dsigma(t.t) / t.sigma - t.schedule.dalpha(t.t) / t.alpha
        )  # (5)
    else:
        k = 1 - s.sigma * t.alpha / (t.sigma * s.alpha)  # (5)
    return torch.where(t.t == s.t, 0.0, k)  # there it may be 0 / 0


def point(y, eps, at):
    return (expand(at.alpha, y) * y + expand(at.sigma, y) * eps).to(y.dtype)  # (1), (10)


def pairs(v, delta, it, horizon):
    """v [B] uniform in [0, 1) -> times u_t > u_s in [0, 1], delta apart but for both ends. Until iteration `horizon` their lower end is still on its way to 0."""
    low = max(0.0, 1 - it / horizon) if horizon else 0.0
    v = 1 + delta - (1 + delta - low) * v  # in (low, 1 + delta]
    return v.clamp(max=1), (v - delta).clamp(min=0)


def boundary_rows(batch, share):
    """bool [batch], True: a row of (8); int(share * batch) of them, spread evenly. A function of the place in the global batch: N processes do what one does."""
    return (torch.arange(batch + 1) * int(share * batch) // batch).diff() > 0


def clipped(f, how):
    """Guided pixels leave [-1, 1]. static: clamp; dynamic: divide each sample by its 99.5 % quantile of |f| if that is above 1, then clamp."""
    if how == "none":
        return f
    top = (
        f.float().abs().flatten(1).quantile(0.995, dim=1).clamp(min=1).view(-1, *[1] * (f.ndim - 1))
        if how == "dynamic"
        else 1.0
    )
    return (f / top).clamp(-1, 1).to(f.dtype)


# ---- losses -----------------------------------------------------------------------------------------------------------------------------


def teacher_signal(teacher, x, at, cond, w, clip="none"):
    return clipped(teacher.guided(x, at.alpha, at.sigma, cond, w), clip)  # (4)


def carried(y_t, f, k):
    return (y_t + expand(k, y_t) * (f - y_t)).to(y_t.dtype)  # (6)


@torch.no_grad()
def bootstrap(student, teacher, eps, u_t, u_s, edge, cond, top, args):
    """Targets of one batch, [B, *shape], the k [B] that they were made with, and f - y_t. edge: rows of (8), u_t = u_s = T; their target is f(eps, T), k is 1."""
    t, s = (level(top.schedule, u, args.grid) for u in (u_t, u_s))
    column = edge.view(-1, *[1] * (eps.ndim - 1))
    y_t = signal(
        student, eps, u_t, cond, top
    )  # the same weights that are trained, no average of them
    x = torch.where(column, first_input(top.schedule, top, eps), point(y_t, eps, t))
    f = teacher_signal(teacher, x, t, cond, args.cfg, args.clip_x0)
    if args.solver == "midpoint":
        half = level(top.schedule, (u_t + u_s) / 2, args.grid)
        y_half = carried(y_t, f, coefficient(t, half, args.coef))
        f = torch.where(
            column,
            f,
            teacher_signal(teacher, point(y_half, eps, half), half, cond, args.cfg, args.clip_x0),
        )
    k = torch.where(edge, 1.0, coefficient(t, s, args.coef))
    return carried(y_t, f, k), k, f - y_t


def errors(y_s, target, k, weight="signal", k_min=0.02):
    """[B]; of a row with k = 1 this is the error of (8)."""
    each = (y_s - target.detach()).square().flatten(1).mean(1)
    return (
        each / k.clamp(min=k_min).square() if weight == "signal" else each.double()
    )  # (7): what (2) is off by


def total(each, edge, beta, frac):
    """L and its parts of the rows' errors; frac: the share of `edge` in the global batch. Constant factors, so that the mean over processes is that of one."""
    bs, bc = each * ~edge / (1 - frac), each * edge / max(frac, 1e-9)  # (8)
    return (bs + beta * bc).mean(), bs, bc  # (9)


# ---- sampler ----------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(student, z, cond, nfe=1, noise=None, at=0.0, grid="time", t_max=1.0, noisy=False):
    """z [B, *shape] -> the signal at time `at`, one pass; at = 0 is the image. noisy: the state x_t on the teacher's trajectory instead."""
    if nfe != 1:
        raise UserError(f"--nfe {nfe}: expected 1; the student is a function of the noise alone")
    y = signal(
        student,
        z,
        torch.full((len(z),), at, dtype=torch.float64, device=z.device),
        cond,
        level(student.schedule, t_max, grid),
    )  # (10)
    return point(y, z, level(student.schedule, at, grid)) if noisy else y


@torch.no_grad()
def teacher_path(teacher, z, cond, w, steps, grid="time", t_max=1.0):
    """States of the teacher's own DDIM sampler after 0, 1, ..., `steps` even steps of the path; the last is its image."""
    levels = [level(teacher.schedule, t_max * (1 - i / steps), grid) for i in range(steps + 1)]
    path = [first_input(teacher.schedule, levels[0], z)]
    for t, s in zip(levels, levels[1:]):
        x, f = path[-1].double(), teacher_signal(teacher, path[-1], t, cond, w).double()
        path.append(
            (s.sigma / t.sigma * x + (s.alpha - t.alpha * s.sigma / t.sigma) * f).to(z.dtype)
        )
    return path


class Fidelity:
    """Mean squared distance of student and teacher from the same n noises, at READOUTS (states; at 0: images). `spread`: the variance of teacher images."""

    def __init__(self, teacher, args, n):
        self.args, self.parts = args, []
        for _, _, (z, cond) in generate(lambda m, z, c, noise: (z, c), teacher, n, args.seed, 32):
            path = teacher_path(teacher, z, cond, args.cfg, PATH_STEPS, args.grid, args.t_max)
            self.parts.append((z, cond, [path[round((1 - u) * PATH_STEPS)] for u in READOUTS]))

    def __call__(self, student):
        distance = lambda u, z, cond, x: (
            sample(
                student,
                z,
                cond,
                at=u * self.args.t_max,
                grid=self.args.grid,
                t_max=self.args.t_max,
                noisy=True,
            )
            - x
        ).square()
        each = [
            torch.cat([distance(u, z, cond, path[i]) for z, cond, path in self.parts]).mean()
            for i, u in enumerate(READOUTS)
        ]
        return dict(zip(map(str, READOUTS), map(float, each)))

    def spread(self):
        return float(torch.cat([path[-1] for _, _, path in self.parts]).var(0).mean())


def main():
    args, networks = parse_args(), (1,)  # students: for the estimate of memory
    # ==== same in every script: setup ====
    run = Run("boot", args)
    teacher = load_teacher(args.teacher, run.device, run.dtype, **run.teacher_kwargs(*networks))
    schedule, shape = teacher.schedule, teacher.shape
    # ==== end ====
    top = level(schedule, torch.tensor(args.t_max, device=run.device), args.grid)
    if args.coef == "euler" and top.alpha == 0:
        raise UserError(
            f"--coef euler: lambda' is infinite at the noise end of {args.teacher}, where alpha is 0; use --t-max 0.99 or --coef exp"
        )
    if args.clip_x0 != "none" and len(shape) < 3:
        raise UserError(
            f"--clip-x0 {args.clip_x0}: expected a teacher of pixels, found samples of shape {list(shape)}"
        )
    edges = boundary_rows(args.batch, args.boundary_frac).to(run.device).split(run.batch)
    frac = int(args.boundary_frac * args.batch) / args.batch
    student = teacher.copy(args.lora)
    torch.manual_seed(args.seed)  # the new input starts equal on all processes
    student.extend("time")
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
    ema = EMA(student, args.ema, args.ema_cpu)
    sampler = dict(at=args.at, grid=args.grid, t_max=args.t_max)
    watch = Fidelity(teacher, args, 8 if args.smoke else 64) if args.fidelity_every else None
    asked = (1 if args.cfg == 1 else 2) * (2 if args.solver == "midpoint" else 1)
    run.print_summary(
        student=student,
        teacher=teacher,
        steps="1, from pure noise",
        bootstrap=f"{args.delta:g} of the path, {args.grid}, {args.coef}, {args.solver}",
        boundary=f"{round(frac * args.batch)} of {args.batch} samples, alpha at T {float(top.alpha):.4g}",
        passes_per_iteration=f"{3 + 1 + asked}",
    )  # one pass = one forward of the network; a backward counts two

    # ==== same in every script: resume ====
    state = dict(student=student, opt_g=opt_g, ema=ema)
    first = run.resume(state)
    it = first - 1
    # ==== end ====

    for it in run.loop(first, args.iters):
        draw = run.draw(it)
        run.set_rates(it, (opt_g, args.lr))
        cond = teacher.encode(draw.randint(0, max(teacher.classes, 1)))
        eps = draw.randn(*shape)
        edge = edges[run.data_shard[0]]
        u_t, u_s = (
            args.t_max * torch.where(edge, 1.0, u)
            for u in pairs(draw.rand(), args.delta, it, args.horizon_warmup)
        )
        target, k, gap = bootstrap(student, teacher, eps, u_t, u_s, edge, cond, top, args)
        each = errors(signal(G, eps, u_s, cond, top), target, k, args.weight, args.k_min)
        loss, bs, bc = total(each, edge, args.beta, frac)
        loss.backward()
        norm = run.step(opt_g, args.clip)
        ema.update(run.images_stepped)

        logs = dict(
            loss=loss,
            grad_student=norm,
            boundary=bc.mean(),
            increment=(gap.flatten(1).abs().mean(1) * ~edge).mean() / (1 - frac),
        )
        quarter = (u_s / args.t_max * 4).long().clamp(max=3)
        logs |= {
            f"bootstrap_{q}": (bs * (quarter == q)).mean() for q in range(4)
        }  # parts of L_BS from s in [q / 4, (q + 1) / 4): they add up to it
        if watch and run.is_last_microstep and it % args.fidelity_every == 0:
            logs |= {f"distance_{u}": d for u, d in watch(ema.model).items()}

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
        fidelity = Fidelity(teacher, args, min(PATH_N, args.eval_n))
        result = fidelity(ema.model)
        write_json(
            run.out / "path.json",
            dict(
                result,
                spread=fidelity.spread(),
                steps=PATH_STEPS,
                n=min(PATH_N, args.eval_n),
                cfg=args.cfg,
            ),
        )
        run.print(
            f"distance to the teacher from the same noise: {', '.join(f'{d:.4g} at {u}' for u, d in result.items())}; spread {fidelity.spread():.4g}"
        )
        rows = []
        for u in (1.0, *READOUTS):
            read = lambda m, z, c, noise: sample(
                m, z, c, at=u * args.t_max, grid=args.grid, t_max=args.t_max
            )
            n = 4000 if teacher.adapter == "toy" else 20
            rows.append(
                (
                    f"signal at {u:g}",
                    teacher.to_pictures(next(generate(read, ema.model, n, args.seed, n))[2]),
                )
            )
        save_grid(run.out / "samples" / "readout.png", rows)


if __name__ == "__main__":
    launch(main)
