"""Phased DMD: few-step distribution matching, phase by phase, with score matching within subintervals. Fan et al., CVPR 2026, arXiv 2510.27684.

DMD with several steps trains, whenever its rollout stops early, a one-step generator too, and loses diversity. Here the way from noise to data is cut
at levels s_1 > ... > s_K = 0 and an expert G_k learns each part, one after the other. Phase k never jumps to a clean image: it goes to the noisy level
s_k and the distribution of x_s is matched there. Without a clean sample the usual target of the critic is wrong; (4) is the right one. The critic
starts from the teacher again in every phase, earlier experts are frozen, and in sampling the noise level decides which expert answers. No images.

Notation, flow form for every teacher: x_t = (1 - t) x_0 + t eps, t = 1 is noise; mu(x_t, t, c) is a network's estimate of x_0 and v = (x_t - mu) / t its
velocity; grid 1 = t_0 > t_1 > ... > t_N = 0; s = s_k ends phase k and is a time of the grid; sg[] stops gradients; c is the label or prompt.
    x_j = z, then steps x + (t_{i+1} - t_i) v to t_j, by the expert of each t_i, without gradient; j ~ U{steps of phase k}, one draw for the batch (1)
    x_s = x_j + (s - t_j) v_k(x_j, t_j, c)          one jump to the end of the phase by G_k, the only pass with gradient                        (2)
    x_t = a x_s + h eps     a = (1 - t) / (1 - s), h^2 = t^2 - a^2 s^2; t in (s, 1), never in (s_k, s_{k-1}) only                               (3)
    x*  = x_s / (1 - s) - (1 - t) s^2 / ((1 - s)^2 h) eps       E[x* | x_t] is the denoiser of the x_t in (3), valid samples or not             (4)
    L_fake = mean min(1, 10 h^2) lambda_t (mu_fake(x_t, t, c) - sg[x*])^2     lambda_t: the teacher's own loss, 1 / t^2 (a velocity error)      (5)
    r = mu_real(x_t, t, c) with guidance u + w (c - u);   f = mu_fake(x_t, t, c) without                                                        (6)
    g = (f - r) / d         d = (1 - s) t^2 / (1 - t)^2; or d = mean|mu_k(x_j, t_j, c) - r| over each sample, as in DMD2                        (7)
    L_dm = 1/2 mean (x_s - sg[x_s - g])^2                                                                                                       (8)
(4) as a velocity, (x_t - x*) / t, is the paper's target [t + (1 - t) s^2 / (1 - s)^2] / h eps - x_s / (1 - s).

Commands (results and times: README and docs/RESULTS.md):
    python phased_dmd.py                                       # four steps, two phases, embedded MNIST teacher, CPU
    python phased_dmd.py --phases 4 --phase-iters 350          # one expert per step
    python phased_dmd.py --teacher toy                         # 2-D mixture, under a minute; energy distance below 0.01, every mode above 5 %
    torchrun --nproc_per_node=8 phased_dmd.py --teacher DIR    # any teacher folder, 8 GPUs

Differences from the paper:
    - presets toy and mnist are ours: learning rates, Adam's betas, ratio, batch, weight average, warm-up and cooldown (in every phase). A finished
      expert is frozen as its average, so that later phases see what sampling uses.
    - the experts of a teacher that has several itself (Wan 2.2) start from the one for their noise levels: with four steps, two phases and shift 5, from
      the first and the second. A phase whose steps ask both is both.
    - experts are full networks; the paper's are --lora 64 --lora-alpha 8 --lr 5e-5, with a whole critic. It gives no iteration
      numbers, no guidance in training, and no word on whether its runs normalise.
    - critic and student share the rollout of an iteration; levels t come from a grid of 1,000; teachers of other schedules are asked at equal SNR.
    - in the last phase (s = 0) the factor min(1, 10 h^2) is left out (--clamp all keeps it): nothing diverges there, and one phase is then DMD.
    - switches for what the official code does instead: --normaliser dmd2 --space x0 (the loss on the clean estimate of the same pass), --clamp none
      --margin 0.02, --critic-on full (its critic sees complete rollouts only), --ida 0.97. Not here: its alternation between phases, the losses for
      diversity and on real data, the limits of t for teachers that are experts themselves (Wan 2.2).
"""

import torch
import torch.nn.functional as F

from common.ema import EMA
from common.errors import UserError, launch
from common.flags import Parser
from common.report import evaluate_run, export, pictures
from common.routed import ByLevel, Routed
from common.run import Run
from common.schedules import Flow, expand
from common.teachers.load import load_teacher

PRESETS = {  # the flags of a teacher; every one can be overridden. Sources: [P] paper, [C] official code, ours = measured here
    # mnist, toy: ours, except 4 steps in 2 phases [P] and the toy's ratio 5 [P]
    "mnist": dict(
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
    ),
    "toy": dict(
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
    ),
    # any other folder: [P] batch 64, shift 5, ratio 5, Adam, critic's rate, (7) with the weight of eq. 10; [C] full fine-tune at 2e-6 (paper: LoRA, 5e-5),
    # clip 1, guidance 4, 4,000 rounds of 5 critic steps
    "default": dict(
        cfg=4.0,
        nfe=4,
        phases=2,
        phase_iters=[10000],
        iters=20000,
        step_shift=5.0,
        shift=5.0,
        normaliser="paper",
        lr=2e-6,
        lr_fake=4e-7,
        betas=(0.0, 0.999),
        ratio=5,
        batch=64,
        warmup=0,
        cooldown=0.0,
        ema=0,
        clip=1.0,
    ),
}
PRESETS |= {
    "toy-cond": PRESETS["toy"],
    "emoji": dict(
        PRESETS["mnist"],
        cfg=3.5,
        shift=1.0,
        lr=1e-4,
        lr_fake=1e-4,
        batch=32,
        iters=700,
        phase_iters=[300],
    ),
}
N = 1000  # noise levels of the grid from which t is drawn


def parse_args(argv=None):
    p = Parser(__doc__)
    p.method.add_argument(
        "--phases", type=int, help="K: number of experts; the steps are shared out evenly"
    )
    p.method.add_argument(
        "--phase-iters",
        type=int,
        nargs="+",
        help="iterations of each phase but the last, which has the rest of --iters: one number for all, or K - 1",
    )
    p.method.add_argument("--ratio", type=int, help="critic steps per student step")
    p.method.add_argument(
        "--step-shift",
        type=float,
        help="multiplies t / (1 - t) of the student's steps; above 1: steps at higher noise",
    )
    p.method.add_argument(
        "--shift",
        type=float,
        help="multiplies t / (1 - t) of all levels drawn in (3); the paper has one shift for steps and levels",
    )
    p.method.add_argument(
        "--margin",
        type=float,
        default=0.0,
        help="share of the grid of levels left out next to s and next to 1; official code: 0.02",
    )
    p.method.add_argument(
        "--clamp",
        choices=["inner", "all", "none"],
        default="inner",
        help="phases in which (5) has min(1, 10 h^2): those with s > 0, all, none",
    )
    p.method.add_argument(
        "--normaliser",
        choices=["paper", "dmd2"],
        help="d in (7): the paper's equation 10, or one number per sample from the clean estimates",
    )
    p.method.add_argument(
        "--space",
        choices=["xs", "x0"],
        default="xs",
        help="sample that carries the gradient in (8): x_s, or the clean estimate of the same pass",
    )
    p.method.add_argument(
        "--critic-on",
        choices=["truncated", "full"],
        default="truncated",
        help="critic's samples: those of (2), or rollouts of all steps",
    )
    p.method.add_argument(
        "--ida",
        type=float,
        default=1.0,
        help="after each student step critic <- ida critic + (1 - ida) expert; official code: 0.97; 1: off",
    )
    args = p.parse(PRESETS, argv)
    for name in ("ratio", "phases"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}: expected at least 1, found {getattr(args, name)}")
    if args.phases > args.nfe:
        raise UserError(
            f"--phases {args.phases}: expected at most one per step, found --nfe {args.nfe}"
        )
    if args.smoke:  # three iterations of everything: also of every phase
        args.iters, args.phase_iters = max(args.iters, args.phases), [1]
    if len(args.phase_iters) not in (1, args.phases - 1) or min(args.phase_iters) < 1:
        raise UserError(
            f"--phase-iters: expected one number or {args.phases - 1} (--phases {args.phases}), each at least 1, found {args.phase_iters}"
        )
    for name in ("step_shift", "shift"):
        if not 0 < getattr(args, name) < float("inf"):
            raise UserError(
                f"--{name.replace('_', '-')}: expected a number > 0, found {getattr(args, name)}"
            )
    if not 0 <= args.margin < 0.5:
        raise UserError(f"--margin: expected a share from 0 to below 0.5, found {args.margin}")
    if not 0 <= args.ida <= 1:
        raise UserError(f"--ida: expected a share from 0 to 1, found {args.ida}")
    if args.ida < 1 and (args.lora or args.lora_fake):
        raise UserError(
            f"--ida {args.ida:g}: mixes the weights of critic and expert, which adapters (--lora, --lora-fake) have no part of alike"
        )
    if args.data:
        raise UserError(f"--data {args.data}: this method does not look at images")
    return args


# ---- networks ---------------------------------------------------------------------------------------------------------------------------
#   teacher ("real")     frozen                          mu_real
#   student G_1 .. G_K   all start as the teacher        G_k is trained in phase k, frozen in later ones; models.Routed: the noise level picks the expert
#   critic ("fake")      trained, mu_fake                starts as the teacher in every phase

# ---- helpers ----------------------------------------------------------------------------------------------------------------------------


def step_times(nfe, shift):
    """Grid 1 = t_0 > ... > t_N = 0, float64 [N + 1]: uniform, then shifted. N = 4, shift 5: 1, 0.9375, 0.8333, 0.625, 0."""
    return torch.cat([Flow(shift).grid(nfe).flip(0), torch.zeros(1, dtype=torch.float64)])


def phase_ends(nfe, phases):
    """b_k: index of the time that ends phase k; phase k has the steps b_{k-1} .. b_k - 1. 4 steps, 2 phases: 2, 4."""
    return [(k + 1) * nfe // phases for k in range(phases)]


def phase_starts(phases, phase_iters):
    """First iteration of each phase."""
    lengths = list(phase_iters) * (phases - 1) if len(phase_iters) == 1 else list(phase_iters)
    return [sum(lengths[:k]) for k in range(phases)]


def starts_as(teacher, times, ends):
    """What each phase's expert starts as: the teacher; of a teacher of several experts (Wan 2.2) the one that all steps of the phase ask, if one does."""
    if not isinstance(teacher, Routed):
        return [teacher] * len(ends)
    asked = [[teacher.at_level(t / (1 - t)) for t in times[a:b]] for a, b in zip([0, *ends], ends)]
    return [those[0] if all(expert is those[0] for expert in those) else teacher for those in asked]


def levels(grid, s, margin):
    """Range low, high for draw.randint: indices of the levels in (s, 1], `margin` of the grid away from both ends."""
    below, gap = int((grid <= s + 1e-9).sum()), round(margin * len(grid))
    if (low := below + max(gap, 1) - 1) >= (high := len(grid) - gap):
        raise UserError(f"--margin {margin}: no noise level is left above s = {s:.4g}")
    return low, high


def transition(t, s):
    """a and h of (3), float64: from x_s to x_t, s < t."""
    return (1 - t) / (1 - s), ((t - s) * (t + s - 2 * t * s)).sqrt() / (
        1 - s
    )  # t^2 - a^2 s^2, without cancellation


def combine(a, x, b, y):
    """a x + b y in the dtype of x; a, b: 0-d or [B], float64."""
    return (expand(a, x) * x + expand(b, x) * y).to(x.dtype)


def step(model, x, t, to, cond):
    """Euler step from t to a lower time (0-d, float64) -> sample there, clean estimate. x + (to - t) (x - x0) / t, written so that to = 0 gives x0."""
    x0 = model(x, 1 - t, t, cond)
    return x0 + to / t * (x - x0), x0


def rollout(student, times, j, cond, z):
    """x_j: the student's own sampler from noise z to times[j]."""
    x = z
    for i in range(j):
        x = step(student, x, times[i], times[i + 1], cond)[0]  # (1)
    return x


# ---- losses -----------------------------------------------------------------------------------------------------------------------------


def fake_target(x_s, eps, t, s):
    """x* of (4), for x_t made from x_s with eps. t: [B], s: 0-d."""
    return combine(
        1 / (1 - s) * torch.ones_like(t),
        x_s,
        -(1 - t) * s**2 / ((1 - s) ** 2 * transition(t, s)[1]),
        eps,
    )  # (4)


def fake_weight(t, s, clamp):
    """min(1, 10 h^2) where the phase has it: the variance of (4) grows like 1 / h^2 as t falls to s > 0. [B]"""
    return (
        (10 * transition(t, s)[1] ** 2).clamp(max=1)
        if clamp == "all" or clamp == "inner" and s > 0
        else torch.ones_like(t)
    )


def fake_loss(critic, x_s, x_t, eps, t, s, cond, weight):
    """Loss of the critic on student samples; weight [B]: min(1, 10 h^2) lambda_t."""
    error = critic(x_t, 1 - t, t, cond) - fake_target(x_s.detach(), eps, t, s)
    return (expand(weight, x_s).to(x_s.dtype) * error.square()).mean()  # (5)


def dm_gradient(x0, x_t, t, s, cond, real, fake, cfg, normaliser):
    """g of (7) and its parts, without graph. x0: the student's clean estimate [B, *shape]; x_t: its x_s with noise up to t [B]."""
    with torch.no_grad():
        r = real.guided(x_t, 1 - t, t, cond, cfg)  # (6)
        f = fake(x_t, 1 - t, t, cond)
        w = (x0 - r).abs().flatten(1).mean(1)  # one number per sample
        d = (1 - s) * t**2 / (1 - t) ** 2 if normaliser == "paper" else w
        g = (f - r) / expand(d.where(d != 0, torch.inf), x0).to(
            x0.dtype
        )  # (7); 0 / 0 is 0, and t = 1 has d = inf; a nan stays and is counted
    return g, r, f, w


def dm_loss(y, g):
    return 0.5 * F.mse_loss(y, (y - g).detach())  # (8)


# ---- sampler ----------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(student, z, cond, nfe, noise=None, step_shift=1.0):
    """n deterministic Euler steps without guidance; the noise level picks the expert. z [B, *shape] unit noise. -> x [B, *shape]."""
    return rollout(student, step_times(nfe, step_shift), nfe, cond, z)


def main():
    args = parse_args()
    networks = (
        args.phases,
        1,
        0,
        True,
    )  # students, critics, further averages, each student one network: for the estimate of memory
    # ==== same in every script: setup ====
    run = Run("phased_dmd", args)
    teacher = load_teacher(args.teacher, run.device, run.dtype, **run.teacher_kwargs(*networks))
    schedule, shape = teacher.schedule, teacher.shape
    # ==== end ====
    if args.ida < 1 and isinstance(teacher, Routed):
        raise UserError(
            f"--ida {args.ida:g}: mixes the weights of critic and expert, and the critic of {args.teacher} has {len(teacher.experts)} experts itself"
        )
    times, ends, starts = (
        step_times(args.nfe, args.step_shift),
        phase_ends(args.nfe, args.phases),
        phase_starts(args.phases, args.phase_iters),
    )
    grid = Flow(args.shift).grid(N)
    ranges = [levels(grid, times[b], args.margin) for b in ends]
    grid = grid.to(run.device)
    table = [
        float(times[b] / (1 - times[b])) for b in ends[:-1]
    ]  # the step at s_k itself is the next expert's
    student, critic = (
        ByLevel([t.copy(args.lora) for t in starts_as(teacher, times, ends)], table),
        teacher.copy(args.lora_fake),
    )
    if args.grad_checkpoint:
        student.checkpoint_activations()
        critic.checkpoint_activations()
    C, G = run.train(critic), None
    opt_g = torch.optim.AdamW(
        student.parameters(),
        lr=args.lr,
        betas=args.betas,
        weight_decay=args.weight_decay,
        fused=True,
    )  # skips what has no gradient
    opt_c = torch.optim.AdamW(
        critic.parameters(),
        lr=args.lr_fake,
        betas=args.betas,
        weight_decay=args.weight_decay,
        fused=True,
    )
    ema = EMA(student, args.ema, args.ema_cpu)
    sampler = dict(step_shift=args.step_shift)
    # one pass = one forward of the network; a backward counts two. The last pass of the rollout is shared by both turns.
    turn_passes = (2 + (1 if args.cfg == 1 else 2) + 1) / args.ratio
    passes = [
        a
        + (b - a - 1) / 2
        + 1
        + 3
        + turn_passes
        + (
            b / args.ratio + (1 - 1 / args.ratio) * (b - a - 1) / 2
            if args.critic_on == "full"
            else 0
        )
        for a, b in zip([0, *ends], ends)
    ]
    run.print_summary(
        student=student,
        critic=critic,
        teacher=teacher,
        steps=[round(float(t), 4) for t in times[:-1]],
        phases=", ".join(
            f"{k + 1}: to s = {float(times[b]):.4g} from iteration {i}"
            for k, (b, i) in enumerate(zip(ends, starts))
        ),
        passes_per_iteration=" / ".join(f"{n:.2f}" for n in passes),
    )
    if starts[-1] >= args.iters:
        run.warn(
            f"--iters {args.iters} ends before the last phase begins (iteration {starts[-1]}, --phase-iters): its expert stays the teacher"
        )

    # ==== same in every script: resume ====
    state = dict(student=student, opt_g=opt_g, ema=ema) | dict(critic=critic, opt_c=opt_c)
    first = run.resume(state)
    it = first - 1
    # ==== end ====

    for it in run.loop(first, args.iters):
        k = sum(it >= i for i in starts) - 1  # phase, a function of the iteration
        if begins := it == starts[k] and run.microstep == 0:  # a phase
            student.load_state_dict(
                ema.model.state_dict()
            )  # finished experts stay as they are sampled
            critic.load_state_dict(
                (teacher.copy(args.lora_fake) if args.lora_fake else teacher).state_dict()
            )
            opt_c.state.clear()
        if G is None or begins:
            G = run.train(
                student.experts[k]
            )  # the only expert that is called with gradient in this phase
        begin, end, s = [0, *ends][k], ends[k], times[ends[k]]
        draw = run.draw(it)
        run.set_rates(
            it,
            (opt_g, args.lr),
            (opt_c, args.lr_fake),
            span=(starts[k], [*starts, args.iters][k + 1]),
        )
        cond = teacher.encode(draw.randint(0, max(teacher.classes, 1)))
        turn = (it - starts[k]) % args.ratio == 0  # of the student
        logs = dict(phase=k + 1)

        def noisy(x_s):  # (3)
            t, eps = grid[draw.randint(*ranges[k])], draw.randn_like(x_s)
            a, h = transition(t, s)
            return combine(a, x_s, h, eps), eps, t

        # the student's sample: one rollout serves both turns
        full = args.critic_on == "full"
        j = end - 1 if full and not turn else draw.shared_randint(begin, end)
        with torch.no_grad():
            x_j = rollout(student, times, j, cond, draw.randn(*shape))
        with torch.set_grad_enabled(turn):
            x_s, x0 = step(G if turn else student.experts[k], x_j, times[j], s, cond)  # (2)

        if turn:
            x_t, _, t = noisy(x_s.detach())
            g, r, f, w = dm_gradient(
                x0, x_t, t, s, cond, teacher, critic, args.cfg, args.normaliser
            )
            loss = dm_loss(x_s if args.space == "xs" else x0, g)
            loss.backward()
            norm = run.step(opt_g, args.clip)
            ema.update(run.images_stepped)
            if args.ida < 1 and run.is_last_microstep:
                with torch.no_grad():
                    torch._foreach_lerp_(
                        list(critic.parameters()),
                        list(student.experts[k].parameters()),
                        1 - args.ida,
                    )
            logs |= dict(
                dm=loss,
                grad_student=norm,
                dm_norm=w.mean(),
                real_gap=(x0 - r).square().mean(),
                fake_gap=(x0 - f).square().mean(),
            )
            if full:
                with torch.no_grad():
                    x_s = rollout(student, times, end, cond, draw.randn(*shape))

        x_s = x_s.detach()
        x_t, eps, t = noisy(x_s)
        loss = fake_loss(
            C,
            x_s,
            x_t,
            eps,
            t,
            s,
            cond,
            fake_weight(t, s, args.clamp) * teacher.native_loss_weight(1 - t, t),
        )
        loss.backward()
        norm = run.step(opt_c, args.clip)
        logs |= dict(fake=loss, grad_critic=norm, mean=x_s.mean(), std=x_s.std())

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
