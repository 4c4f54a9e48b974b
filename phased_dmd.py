"""Phased DMD. Fan et al., CVPR 2026, arXiv 2510.27684.

DMD with several steps (dmd2.py) trains its student at a random step of its own rollout, from where
it jumps to a clean image. Jumps from the first step train a one-step generator, which costs
diversity. Here the way from noise to data is divided at noise levels s_1 > ... > s_K = 0, and an
expert G_k learns each part, one after the other. Phase k ends at the level s_k, where the
distribution of the noisy samples x_s is matched; only the last phase makes clean images. Without a
clean sample the usual target of the critic is wrong. The target (4) needs x_s only, and its mean
given x_t is the denoiser of the x_t in (3). The critic starts from the teacher again in every
phase, and finished experts are frozen. When sampling, the noise level chooses the expert.

Notation, in the flow form for every teacher: x_t = (1 - t) x_0 + t eps, so t = 1 is noise;
mu(x_t, t, c) is a network's estimate of x_0, and v = (x_t - mu) / t its velocity; c is the label or
prompt; w is the guidance scale --cfg; sg[] stops gradients. The steps are 1 = t_0 > ... > t_N = 0;
s = s_k is one of them.

    x_j = noise, then steps to t_1 .. t_j    x <- x + (t_{i+1} - t_i) v(x, t_i, c), no gradient  (1)
    x_s = x_j + (s - t_j) v_k(x_j, t_j, c)   j ~ U{steps of phase k}, one for the whole batch    (2)
    x_t = a x_s + h eps                      a = (1 - t) / (1 - s), h^2 = t^2 - a^2 s^2, t > s   (3)
    x* = x_s / (1 - s) - b eps               b = (1 - t) s^2 / ((1 - s)^2 h)                     (4)
    L_fake = mean q lambda_t (mu_fake(x_t, t, c) - sg[x*])^2    q = min(1, 10 h^2); 1 at s = 0   (5)
    r = mu_real(x_t, t, c), with guidance    f = mu_fake(x_t, t, c), without                     (6)
    g = (f - r) / d                          --normaliser paper: d = (1 - s) t^2 / (1 - t)^2
                                             dmd2: d = mean|x0 - r|, x0 = mu_k(x_j, t_j, c)      (7)
    L_dm = 1/2 mean (x_s - sg[x_s - g])^2    so that dL_dm/dx_s = g / numel(x_s)                 (8)

Usage:
    python phased_dmd.py                                       # four steps, two phases, MNIST, CPU
    python phased_dmd.py --phases 4 --phase-iters 350          # one expert per step
    python phased_dmd.py --teacher toy                         # 2-D mixture, under a minute
    torchrun --nproc_per_node=8 phased_dmd.py --teacher DIR    # any teacher folder, 8 GPUs

Differences from the paper, variants and results: docs/phased_dmd.md.
"""

import training.interrupt  # noqa: F401  # isort: skip

import math

import torch
import torch.nn.functional as F

from common.errors import launch, require
from common.routed import ByLevel, Routed
from common.schedules import Flow, add_noise, expand
from common.teachers.load import load_teacher
from common.teachers.students import start_from
from training.ema import EMA
from training.flags import Parser
from training.optim import adamw
from training.plan import describe_steps
from training.report import Report
from training.run import Run

N = 1000  # noise levels of the grid

# Presets: the flags for a kind of teacher, unless the command line gives others.
# [P] paper, [C] official code, [A] answer of an author, [O] ours, measured in docs/RESULTS.md.
# `source` is printed at the start; docs/teachers.md has all of them in a table.
WAN = dict(
    cfg=4.0,  # [C]
    nfe=4,  # [P]
    phases=2,  # [P]
    phase_iters=[10_000],  # [C] half of all
    iters=20_000,  # [C] 4,000 rounds of 5 critic steps
    step_shift=5.0,  # [P]
    shift=5.0,  # [P]
    normaliser="paper",
    lr=2e-6,  # [C] of whole networks; [P]: --lora 64 --lora-alpha 8 --lr 5e-5
    lr_fake=4e-7,  # [P]
    betas=(0.0, 0.999),  # [P]
    ratio=5,  # [P]
    batch=64,  # [P]
    warmup=0,
    cooldown=0.0,
    ema=0,
    clip=1.0,  # [C]
    source="[P, C]",
)
TOY = dict(  # [O], but steps, phases and ratio [P]
    cfg=1.0,
    nfe=4,
    phases=2,
    phase_iters=[600],
    iters=3600,
    step_shift=3.0,
    shift=1.0,
    normaliser="dmd2",
    lr=2e-4,
    lr_fake=1e-3,
    betas=(0.9, 0.999),
    ratio=5,
    batch=256,
    warmup=0,
    cooldown=0.0,
    ema=0,
    source="[O]",
)
MNIST = dict(  # [O], but steps and phases [P]
    cfg=1.5,
    nfe=4,
    phases=2,
    phase_iters=[600],
    iters=1370,
    step_shift=1.0,
    shift=0.3,
    normaliser="dmd2",
    lr=1e-3,
    lr_fake=1e-3,
    betas=(0.5, 0.99),
    ratio=3,
    batch=64,
    warmup=20,
    cooldown=0.5,
    ema=2000,
    source="[O]",
)
EMOJI = dict(  # [O]
    MNIST,
    cfg=3.5,
    shift=1.0,
    lr=1e-4,
    lr_fake=1e-4,
    batch=32,
    iters=700,
    phase_iters=[300],
)
WAN13B = dict(WAN, cfg=5.0, iters=5000, phase_iters=[2500], clip=10.0, source="[C]")  # 1.3B
QWEN = dict(
    WAN,
    step_shift=3.0,  # [P]
    shift=3.0,  # [P]
    lr=2e-7,  # [A] of whole networks
    source="[P], rate [A], guidance nobody's",
)
NO_SHIFT = dict(  # noise levels of VP models have no shift
    WAN,
    step_shift=1.0,
    shift=1.0,
    normaliser="dmd2",
    source="nobody's: Wan's",
)
PRESETS = {
    "default": dict(WAN, source="nobody's: Wan's"),
    "toy": TOY,
    "toy-cond": TOY,
    "mnist": MNIST,
    "emoji": EMOJI,
    "emoji-flow": dict(EMOJI, source="nobody's: emoji's"),
    "own": dict(MNIST, shift=1.0, source="nobody's: mnist's"),
    "edm-imagenet64": dict(NO_SHIFT, cfg=1.0),
    "edm-cifar10": dict(NO_SHIFT, cfg=1.0),
    "dit": dict(NO_SHIFT, cfg=1.5),
    "sit": dict(NO_SHIFT, cfg=1.5),
    "sd15": dict(NO_SHIFT, cfg=3.0),
    "sd21": dict(NO_SHIFT, cfg=3.0),
    "sdxl": dict(NO_SHIFT, cfg=8.0),
    # shift and guidance of the pipeline, that of FLUX.1 at 1024 px
    "sd3": dict(WAN, cfg=7.0, step_shift=3.0, shift=3.0, source="nobody's: Wan's"),
    "sana": dict(WAN, cfg=4.5, step_shift=3.0, shift=3.0, source="nobody's: Wan's"),
    "sana-0.6b": dict(WAN, cfg=4.5, step_shift=3.0, shift=3.0, source="nobody's: Wan's"),
    "flux": dict(WAN, cfg=1.0, step_shift=3.158, shift=3.158, source="nobody's: Wan's"),
    "chroma": dict(WAN, cfg=5.0, step_shift=3.0, shift=3.0, source="nobody's: Wan's"),
    "flux2": dict(WAN, cfg=1.0, step_shift=7.56, shift=7.56, source="nobody's: Wan's"),
    "flux2-klein": dict(WAN, cfg=4.0, step_shift=7.56, shift=7.56, source="nobody's: Wan's"),
    "hunyuan-image": dict(WAN, cfg=3.5, step_shift=5.0, shift=5.0, source="nobody's: Wan's"),
    "lumina2": dict(WAN, cfg=4.0, step_shift=6.0, shift=6.0, source="nobody's: Wan's"),
    "qwen-image": QWEN,
    "z-image": dict(WAN, cfg=6.0, step_shift=6.0, shift=6.0, source="nobody's: Wan's"),
    "wan2.1": WAN13B,
    "wan2.1-14b": dict(WAN, cfg=5.0, source="[P], guidance nobody's: that of 1.3B"),
    "wan2.2": WAN,
    "wan2.2-5b": dict(WAN, cfg=5.0, source="nobody's: Wan's"),
    "sana-video": dict(WAN, cfg=6.0, step_shift=8.0, shift=8.0, source="nobody's: Wan's"),
    "ltx-video": dict(WAN, cfg=3.0, step_shift=25.3, shift=25.3, source="nobody's: Wan's"),
    "hunyuanvideo-1.5": dict(WAN, cfg=6.0, source="nobody's: Wan's"),
}


def parse_args(argv=None):
    p = Parser(__doc__, critic=True, small=True)
    add = p.method.add_argument
    add("--phases", type=int, help="K, the number of experts, which share the steps evenly")
    add(
        "--phase-iters",
        type=int,
        nargs="+",
        metavar="N",
        help="iterations of each phase but the last, one number for all or K - 1",
    )
    add("--ratio", type=int, help="critic steps per student step")
    add("--step-shift", type=float, help="factor on t / (1 - t) of the student's steps")
    add("--shift", type=float, help="factor on t / (1 - t) of the levels drawn in (3)")
    add("--normaliser", choices=["paper", "dmd2"], help="d in (7)")
    args = p.parse(PRESETS, argv)
    require(args.ratio >= 1, f"--ratio: expected at least 1, found {args.ratio}")
    require(args.phases >= 1, f"--phases: expected at least 1, found {args.phases}")
    require(
        args.phases <= args.nfe,
        f"--phases {args.phases}: expected at most one per step, found --nfe {args.nfe}",
    )
    if args.smoke:  # three iterations of each phase
        args.iters = 3 * args.phases
        args.phase_iters = [3]
    require(
        len(args.phase_iters) in (1, args.phases - 1) and min(args.phase_iters) >= 1,
        f"--phase-iters: expected one number or {args.phases - 1} (--phases {args.phases}), "
        f"each at least 1, found {args.phase_iters}",
    )
    starts = phase_starts(args.phases, args.phase_iters)
    require(
        starts[-1] < args.iters,
        f"--phase-iters: the last phase begins with iteration {starts[-1]}, "
        f"expected less than --iters {args.iters}",
    )
    shortest = min(b - a for a, b in zip(starts, [*starts[1:], args.iters]))
    require(
        args.warmup < shortest,
        f"--warmup {args.warmup}: expected less than the {shortest} iterations of the shortest "
        "phase (--iters, --phase-iters), which has its own warm-up",
    )
    require(args.step_shift > 0, f"--step-shift: expected a number > 0, found {args.step_shift}")
    require(args.shift > 0, f"--shift: expected a number > 0, found {args.shift}")
    return args


# ---- steps and phases ----------------------------------------------------------------------------


def step_times(nfe, shift):
    """Times 1 = t_0 > ... > t_N = 0 of the steps, float64 [N + 1]: uniform, then shifted.

    N = 4, shift 5: 1, 0.9375, 0.8333, 0.625, 0.
    """
    times = Flow(shift).grid(nfe).flip(0)
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


def phase_ends(nfe, phases):
    """Index of the time that ends each phase. 4 steps, 2 phases: 2, 4."""
    return [(k + 1) * nfe // phases for k in range(phases)]


def phase_starts(phases, phase_iters):
    """First iteration of each phase."""
    lengths = list(phase_iters)
    if len(lengths) == 1:
        lengths = lengths * (phases - 1)
    return [sum(lengths[:k]) for k in range(phases)]


def starts_as(teacher, times, ends):
    """The network that each phase's expert starts as.

    This is the teacher, unless the teacher consists of experts itself (Wan 2.2) and one of them is
    responsible for all steps of the phase.
    """
    if not isinstance(teacher, Routed):
        return [teacher] * len(ends)
    found = []
    for begin, end in zip([0, *ends], ends):
        first, *others = [teacher.at_level(t / (1 - t)) for t in times[begin:end]]
        found.append(first if all(other is first for other in others) else teacher)
    return found


# ---- few-step sampling ---------------------------------------------------------------------------


def euler_step(model, x, t, to, cond):
    """x at the lower time `to`, and the estimate of x_0 on the way there. t, to: 0-d, float64."""
    x0 = model(x, 1 - t, t, cond)
    return x0 + to / t * (x - x0), x0  # is x + (to - t) v, and exactly x0 for to = 0


def backward_simulation(student, times, j, cond, z):
    """Input of step j: the student's own sampler, run for j steps without gradient."""
    x = z
    with torch.no_grad():
        for i in range(j):
            x, _ = euler_step(student, x, times[i], times[i + 1], cond)  # (1)
    return x


@torch.no_grad()
def sample(student, z, cond, nfe, noise=None, step_shift=1.0):
    """n Euler steps without guidance and without further noise. -> x [B, *shape].

    z: unit noise [B, *shape]. The noise level of a step chooses the expert.
    """
    times = step_times(nfe, step_shift)
    x = backward_simulation(student, times, nfe - 1, cond, z)
    return euler_step(student, x, times[nfe - 1], times[nfe], cond)[0]


# ---- noise above a noisy sample ------------------------------------------------------------------


def lowest_level(grid, s):
    """Index of the first level of the grid above s."""
    return int((grid <= s + 1e-9).sum())


def transition(t, s):
    """a and h of (3), from x_s to x_t, float64 in the shape of t. t > s."""
    a = (1 - t) / (1 - s)
    h = ((t - s) * (t + s - 2 * t * s)).sqrt() / (1 - s)  # t^2 - a^2 s^2 without cancellation
    return a, h  # (3)


# ---- losses --------------------------------------------------------------------------------------


@torch.no_grad()
def dm_gradient(x, x_t, alpha, sigma, cond, real, fake, cfg):
    """g of (7) [B, *shape] in its form dmd2, without graph; also r, f and the normaliser [B].

    x: the student's estimates of x_0. x_t: its x_s with noise up to the levels alpha, sigma [B].
    """
    r = real.guided(x_t, alpha, sigma, cond, cfg)  # (6)
    f = fake(x_t, alpha, sigma, cond)  # (6)
    norm = (x - r).abs().flatten(1).mean(1)  # [B]
    safe = norm.where(norm != 0, math.inf)  # 0 / 0 is 0; after a nan, run.step skips the step
    g = (f - r) / safe.view(-1, *[1] * (x.ndim - 1))  # (7)
    return g, r, f, norm


def paper_gradient(r, f, t, s):
    """g of (7) in its form paper, equation 10 there; 0 at t = 1, where d is infinite."""
    d = (1 - s) * t**2 / (1 - t) ** 2
    return (f - r) / expand(d, r).to(r.dtype)  # (7)


def dm_loss(x, g):
    return 0.5 * F.mse_loss(x, (x - g).detach())  # (8)


def fake_target(x_s, eps, t, s):
    """x* of (4), for x_t made from x_s with the noise eps. t: [B]; s: 0-d."""
    _, h = transition(t, s)
    b = (1 - t) * s**2 / ((1 - s) ** 2 * h)
    return add_noise(x_s, 1 / (1 - s), -b, eps)  # (4)


def fake_weight(t, s):
    """q of (5) [B]: as t falls to s, the variance of (4) grows like 1 / h^2. In the last phase, at
    s = 0, it does not."""
    if s == 0:
        return torch.ones_like(t)
    _, h = transition(t, s)
    return (10 * h**2).clamp(max=1)


def fake_loss(prediction, x, weight):
    """weight: q lambda_t [B], where lambda_t makes this the loss the teacher was trained with."""
    error = prediction - x.detach()
    return (expand(weight, x).to(x.dtype) * error.square()).mean()  # (5)


# ---- training ------------------------------------------------------------------------------------


def main():
    args = parse_args()
    run = Run(__file__, args)
    load = run.teacher_kwargs(students=args.phases, critics=1, single=True)
    teacher = load_teacher(args.teacher, run.device, run.dtype, **load)

    # Steps and phases, and the grid from which all other noise levels are drawn.
    times = step_times(args.nfe, args.step_shift)
    ends = phase_ends(args.nfe, args.phases)
    starts = phase_starts(args.phases, args.phase_iters)
    steps_of_phase = list(zip([0, *ends], ends))  # first, last + 1
    iters_of_phase = list(zip(starts, [*starts[1:], args.iters]))
    grid = Flow(args.shift).grid(N)
    lowest = [lowest_level(grid, times[end]) for end in ends]

    # Networks: experts and critic start as the teacher or as another run's. The step at the level
    # s_k itself belongs to the next expert.
    table = [float(times[end] / (1 - times[end])) for end in ends[:-1]]
    experts = [net.copy(args.lora, args.small) for net in starts_as(teacher, times, ends)]
    student = ByLevel(experts, table)
    critic = teacher.copy(args.lora_fake, args.small_fake)
    if args.start and not args.resume:
        start_from(args.start, teacher, student, critic, run.print)
    critic_ddp = run.train(critic)  # DDP around it; for passes that train weights
    opt_g = adamw(student, args.lr, args)  # leaves experts without gradient as they are
    opt_c = adamw(critic, args.lr_fake, args)
    ema = EMA(student, args.ema, args.ema_cpu)
    report = Report(run, teacher, ema, sample, dict(step_shift=args.step_shift))
    plan = [f"to s = {times[end]:.4g} from iteration {start}" for end, start in zip(ends, starts)]
    facts = dict(steps=describe_steps(Flow(), times[:-1]), phases=", ".join(plan))
    run.print_summary(student=student, critic=critic, teacher=teacher, **facts)

    state = dict(student=student, opt_g=opt_g, ema=ema, critic=critic, opt_c=opt_c)
    first = run.resume(state, fixed=("nfe", "phases", "step_shift"))  # an expert's range of levels
    it = first - 1  # if no iteration is left
    for it in run.loop(first, args.iters, show=["dm", "fake"]):
        # The phase, from 0, its steps begin..end - 1 and its iterations start..stop - 1.
        k = sum(it >= start for start in starts) - 1
        begin, end = steps_of_phase[k]
        start, stop = iters_of_phase[k]
        s = times[end]

        # A new phase. Experts become their averages, which sampling uses; the critic starts as the
        # teacher again.
        if it == start and it > 0 and run.microstep == 0:
            student.load_state_dict(ema.model.state_dict())
            fresh = teacher
            if args.lora_fake or args.small_fake:
                fresh = teacher.copy(args.lora_fake, args.small_fake)
            critic.load_state_dict(fresh.state_dict())
            opt_c.state.clear()
        if it in (first, start) and run.microstep == 0:
            expert = student.experts[k]
            expert_ddp = run.train(expert)  # the only one that gets gradients in this phase

        draw = run.draw(it)
        run.set_rates(it, (opt_g, args.lr), (opt_c, args.lr_fake), span=(start, stop))
        cond = teacher.random_cond(draw)
        logs = dict(phase=k + 1)

        def noised(x_s):
            """x_t with its levels t [B] and its noise."""
            t = grid[draw.randint(lowest[k], N)]
            eps = draw.randn_like(x_s)
            a, h = transition(t, s)
            return add_noise(x_s, a, h, eps), t, eps  # (3)

        # Sample of the student. One forward pass serves both turns.
        student_turn = (it - start) % args.ratio == 0
        j = draw.shared_randint(begin, end)  # on all processes, for equally many passes
        x_j = backward_simulation(student, times, j, cond, draw.randn(*teacher.shape))
        if student_turn:
            x_s, x0 = euler_step(expert_ddp, x_j, times[j], s, cond)  # (2)
        else:
            with torch.no_grad():
                x_s, x0 = euler_step(expert, x_j, times[j], s, cond)

        # Student.
        if student_turn:
            x_t, t, _ = noised(x_s.detach())
            g, r, f, norm = dm_gradient(x0, x_t, 1 - t, t, cond, teacher, critic, args.cfg)
            if args.normaliser == "paper":
                g = paper_gradient(r, f, t, s)
            loss = dm_loss(x_s, g)
            loss.backward()
            grad_student = run.step(opt_g, args.clip)  # clip, step, zero the gradients
            logs |= dict(dm=loss, grad_student=grad_student, dm_norm=norm.mean())
            logs |= dict(real_gap=(x0 - r).square().mean(), fake_gap=(x0 - f).square().mean())
            ema.update(run.images_stepped)

        # Critic, on the same samples.
        x_s = x_s.detach()
        x_t, t, eps = noised(x_s)
        target = fake_target(x_s, eps, t, s)
        weight = fake_weight(t, s) * teacher.native_loss_weight(1 - t, t)
        loss = fake_loss(critic_ddp(x_t, 1 - t, t, cond), target, weight)
        loss.backward()
        grad_critic = run.step(opt_c, args.clip)
        logs |= dict(fake=loss, grad_critic=grad_critic)
        logs |= dict(mean=x_s.mean(), std=x_s.std())

        run.after(it, logs, state, report)

    run.finish(it, state, report)
    report.end(it + 1)


if __name__ == "__main__":
    launch(main)
