"""SiD: score identity distillation. Zhou et al., ICML 2024, arXiv 2404.04057; LSG 2406.01561, SiDA 2410.14919, few-step 2505.12674, SiD-DiT 2509.25127.

A student makes an image in one or a few passes. The Fisher divergence between its noised images and the teacher's falls along a difference of two
denoisers: the frozen teacher phi and a critic psi that follows the student's images. Unlike in DMD the loss is differentiated through both of them:
their weights stand still, their inputs carry the student's gradient. It needs no images, unless the critic's encoder also serves as a discriminator.

Notation: x_t = a_t x + s_t eps; f(x_t, t, c) is a network's estimate of the clean x; sg[] stops gradients; |.|^2 sums over the pixels, E is the batch mean.
    x = f_theta(x_k, tau_k, c)           k ~ U{0..K-1}, one draw for all: the uniform mixture of all steps' outputs is matched to the data           (1)
    x_k = sg[a_k xhat + s_k noise]       xhat = output of step k-1, noise fresh, fixed (the first z) or ddim (what xhat took away); x_0 = s_0 z        (2)
    f^kappa = f(x_t, t, none) + kappa (f(x_t, t, c) - f(x_t, t, none))                                                                              (3)
    L_psi = E lambda_t |f_psi^k1(x_t) - sg[x]|^2                        lambda_t: the loss of the form's networks                                   (4)
    L_alpha = E w <f_phi^k4 - f_psi^k2, (f_phi^k4 - x) - alpha (f_phi^k4 - f_psi^k3)>       k2 = k3 but for experiments                             (5)
    w = sg[1 / max(mean|x - f_phi^k4|, 1e-5)]                           "sid_legacy"; or a function of t, --weight                                  (6)
    D(x) = mean over the channels of the critic's encoder at x_t        one logit for each position, no new weights                                 (7)
    L_D = omega_t (softplus(-D(x_real)) + softplus(D(sg x))) / 2        real and fake share t, eps and label; each factor averaged over the batch   (8)
    L_adv = pixels * mean softplus(-clip(D(x), -10, 10)) * mean w                                                                                   (9)
    critic: L_psi + lsd L_D         student: lsg L_alpha, with the GAN (lsg L_alpha + lsg_gan L_adv) / 2; critic first, one step each               (10)
    form     levels of (4)                 levels of (5)                                          tau_k, k of K              w, lambda_t            (11)
    edm      ln s ~ N(-1.2, 1.2^2)         grid of 80..0.002 with rho 7, uniform, up to s = 24.4  2.5 (1 - k/K)              sid_legacy, EDM's
    vp       t ~ U{20..979} of 1000        the same                                               int(625 (1 - k/K))         sid_legacy, error of eps
    flow     logit t ~ N(ln 2, 1.6^2)      the same                                               1 - k/K                    1 - t, error of v

Commands (results and times: README and docs/RESULTS.md):
    python sid.py                                       # one step, embedded MNIST teacher, two CPU cores, minutes
    python sid.py --nfe 4 --gan                         # four steps, with the discriminator on the teacher's images
    python sid.py --teacher toy                         # 2-D mixture, under a minute; energy distance below 0.01, every mode above 5 %
    torchrun --nproc_per_node=8 sid.py --teacher DIR    # any teacher folder, 8 GPUs

Differences from the paper:
    - presets mnist, emoji and toy are ours, for minutes on a CPU: rates, betas, batch, average, mnist's --weight; not in the paper: warm-up, cooldown, --shift.
    - steps with a non-finite gradient are skipped; the official code drops samples with NaN, sets bad gradients to 0 or 1e5, and clips values in SiDA.
    - (8), (9): the official code averages within each process, here over the whole batch, so that N processes are one; on one process both are the same.
      --gan-average process: the official SiDA; sample: a product for each sample, as in SiD-DiT. Features are those of this project's sites.
    - edm at K > 1 is not in the paper: its tau_k follow the rule of the others. --form asks any teacher at another form's levels, at equal SNR.
    - Zero-CFG (0, 0, 0, 1) is the literal reading of the abstract. Of Anti-CFG only the sign is known to us: (1, -0.5, -0.5, 1), with a tenth of the
      critic's conditions empty, is a guess. EDM's augmentation, EDM2's uncertainty head and dropout in the student are left out.
    - switches: --ratio (1 in the paper), --weight none (users' advice), --detach (no gradient through both networks: (5) then has DMD's direction).
"""

import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from common import data
from common.ema import EMA
from common.errors import UserError, launch
from common.flags import Parser
from common.report import evaluate_run, export, pictures
from common.run import Run
from common.schedules import SCHEDULES, eps_from_x0, expand, native_weight
from common.teachers.load import load_teacher

PAPER = dict(
    guidance="lsg", nfe=1, ratio=1, shift=1.0, betas=(0.0, 0.999), weight_decay=0.0, clip=1e9
)  # [C] Adam, critic and student in turn, no clipping
PRESETS = {  # the flags of a teacher; every one can be overridden. Sources: [C] official code, ours = measured here. By form: FORMS
    "mnist": dict(
        PAPER,
        cfg=1.5,
        alpha=1.0,
        shift=0.3,
        weight="1_over_sigma",
        lr=5e-4,
        lr_fake=1e-3,
        betas=(0.5, 0.99),
        batch=64,
        iters=550,
        warmup=20,
        cooldown=0.5,
        ema=2000,
    ),  # ours; 1 / sigma, not the flow's 1 - sigma: only little noise shows the speckle in the background
    "toy": dict(
        PAPER,
        cfg=1.0,
        alpha=1.0,
        lr=5e-4,
        lr_fake=5e-4,
        batch=256,
        iters=2000,
        warmup=0,
        cooldown=0.5,
        ema=0,
    ),  # ours
    # any other folder: CIFAR-10 [C: alpha 1.2 (1 in SiDA and for text), batch 256, lr 1e-5, 500M images, average over 0.5M images]
    "default": dict(
        PAPER,
        cfg=1.0,
        alpha=1.2,
        lr=1e-5,
        lr_fake=1e-5,
        batch=256,
        iters=2_000_000,
        warmup=0,
        cooldown=0.0,
        ema=500_000,
    ),
}
PRESETS |= {
    "toy-cond": PRESETS["toy"],
    "emoji": dict(
        PRESETS["mnist"],
        cfg=3.5,
        weight=None,
        shift=1.0,
        lr=5e-5,
        lr_fake=2e-4,
        batch=32,
        iters=300,
    ),
}
FORMS = {  # defaults that depend on the form [C]; vp with the GAN: its weight is from a third party's notes on 2505.12674, its warm-up edm's
    "edm": dict(
        weight="sid_legacy", drop=0.0, sid_weight=100.0, gan_weight=0.01, gan_warmup=100_000
    ),
    "vp": dict(weight="sid_legacy", drop=0.1, sid_weight=1.0, gan_weight=0.001, gan_warmup=100_000),
    "flow": dict(
        weight="1_minus_sigma", drop=0.0, sid_weight=100.0, gan_weight=1.0, gan_warmup=20_000
    ),
}
GUIDANCE = {  # k1..k4 from w = --cfg: long and short; only the teacher, as in DMD; Zero-CFG; Anti-CFG
    "lsg": lambda w: (w, w, w, w),
    "long": lambda w: (1.0, 1.0, 1.0, w),
    "zero": lambda w: (0.0, 0.0, 0.0, 1.0),
    "anti": lambda w: (1.0, -0.5, -0.5, 1.0),
}
WEIGHTS = {  # of (5), as functions of the flow's time t = sigma / (alpha + sigma); what is divided by is at least 1e-5
    "1_minus_sigma": lambda t: 1 - t,
    "1_minus_sigma_squared": lambda t: (1 - t) ** 2,
    "none": torch.ones_like,
    "1_over_sigma": lambda t: 1 / t.clamp(min=1e-5),
    "1_over_sigma2": lambda t: 1 / (t**2).clamp(min=1e-5),
    "snr_sqrt": lambda t: 1 / (t / (1 - t)).clamp(min=1e-5),
    "snr": lambda t: 1 / ((t / (1 - t)) ** 2).clamp(min=1e-5),
}


def parse_args(argv=None):
    p = Parser(__doc__)
    p.method.add_argument(
        "--alpha",
        type=float,
        help="of (5): 0.5 is the Fisher divergence for a perfect critic, the papers use 1 to 1.2",
    )
    p.method.add_argument(
        "--form", choices=list(FORMS), help="row of (11); default: that of the teacher's schedule"
    )
    p.method.add_argument(
        "--weight", choices=["sid_legacy", *WEIGHTS], help="w of (5); default by form"
    )
    p.method.add_argument(
        "--guidance",
        choices=list(GUIDANCE),
        help="k1..k4 of (4) and (5): all = --cfg (lsg), only k4 = --cfg (long), Zero-CFG, Anti-CFG",
    )
    for i, what in enumerate(
        (
            "the critic in training",
            "the critic in the difference",
            "the critic in alpha's term",
            "the teacher",
        ),
        1,
    ):
        p.method.add_argument(
            f"--k{i}", type=float, help=f"guidance of {what}, instead of --guidance's"
        )
    p.method.add_argument(
        "--drop",
        type=float,
        help="share of empty conditions in the critic's turn; default 0.1 for guided vp (k1 or k2 not 1) and anti, else 0",
    )
    p.method.add_argument(
        "--steps",
        help="levels of the student's steps, falling, in the form's own t, e.g. 1,.9,.75,.5 (SD3's shift); default: (11)",
    )
    p.method.add_argument(
        "--renoise", choices=["fresh", "fixed", "ddim"], default="fresh", help="noise of (2)"
    )
    p.method.add_argument(
        "--shift",
        type=float,
        help="multiplies sigma / alpha of all levels drawn in (4) and (5); below 1: less noise; 1 in the paper",
    )
    p.method.add_argument("--ratio", type=int, help="critic steps per student step")
    p.method.add_argument(
        "--detach", action="store_true", help="no gradient through teacher and critic in (5)"
    )
    p.method.add_argument("--sid-weight", type=float, help="lsg in (10); default by form")
    p.method.add_argument(
        "--gan",
        action="store_true",
        help="add (8) and (9); needs images: the teacher's own or --data",
    )
    p.method.add_argument("--gan-weight", type=float, help="lsg_gan in (10); default by form")
    p.method.add_argument("--cls-weight", type=float, default=1.0, help="lsd in (10)")
    p.method.add_argument(
        "--gan-warmup",
        type=int,
        help="images before the student moves, and as many again before (9) joins; default by form",
    )
    p.method.add_argument(
        "--gan-average",
        choices=["batch", "process", "sample"],
        default="batch",
        help="over what each factor of (8) and (9) is averaged",
    )
    args = p.parse(PRESETS, argv)
    low, high = (
        dict(shift=1e-3, sid_weight=0, gan_weight=0, cls_weight=0, gan_warmup=0, drop=0, ratio=1),
        dict(drop=1),
    )
    for name in ("alpha", "k1", "k2", "k3", "k4", *low):
        value, a, b = getattr(args, name), low.get(name, -1e9), high.get(name, 1e9)
        if value is not None and not a <= value <= b:
            raise UserError(
                f"--{name.replace('_', '-')}: expected a number from {a:g} to {b:g}, found {value}"
            )
    if args.guidance in ("zero", "anti") and args.cfg not in (1, p.get_default("cfg")):
        raise UserError(
            f"--guidance {args.guidance} leaves the teacher without guidance, so --cfg {args.cfg:g} means nothing; use --k1 to --k4 for other mixtures"
        )
    if args.renoise != "fresh" and args.nfe == 1:
        raise UserError(
            f"--renoise {args.renoise}: one step adds no noise again; use --nfe 2 or more"
        )
    if not args.gan and (
        args.data
        or args.gan_weight is not None
        or args.gan_warmup is not None
        or args.cls_weight != 1
        or args.gan_average != "batch"
    ):
        raise UserError(
            "--data, --gan-weight, --cls-weight, --gan-warmup and --gan-average mean something only with the discriminator: add --gan"
        )
    return args


def fill_in(args, form):
    """Flags that were not given, from the form and the guidance preset. -> (k1, k2, k3, k4)"""
    kappa = tuple(
        k if given is None else given
        for k, given in zip(GUIDANCE[args.guidance](args.cfg), (args.k1, args.k2, args.k3, args.k4))
    )
    args.drop = (
        args.drop
        if args.drop is not None
        else 0.1
        if args.guidance == "anti"
        else FORMS[form]["drop"] * (kappa[:2] != (1, 1))
    )
    vars(args).update(
        {name: value for name, value in FORMS[form].items() if getattr(args, name) is None},
        **dict(zip(("k1", "k2", "k3", "k4"), kappa)),
        form=form,
        cfg=max(kappa[3], 0.0),
    )  # --cfg is the teacher's guidance everywhere: in pictures and in distill.json
    return kappa


# ---- networks ---------------------------------------------------------------------------------------------------------------------------
#   teacher phi     frozen; passes gradients on to its input
#   student theta   trained, starts as the teacher
#   critic psi      trained, starts as the teacher; its encoder is the discriminator. In the student's turn it is frozen and passes gradients on


class Critic(nn.Module):
    """psi with all that is asked of it in training, so that one DDP wrapper sees every pass: predictions at a guidance, or the logits (7)."""

    def __init__(self, fake):
        super().__init__()
        self.fake = fake

    def forward(self, x_t, alpha, sigma, cond, kappa=None):
        if kappa is not None:
            return self.fake.guided(x_t, alpha, sigma, cond, kappa)  # (3)
        return (
            self.fake(x_t, alpha, sigma, cond, features=True)[-1].float().mean(1)
        )  # (7): [B, h, w], or [B] for networks without space


# ---- helpers ----------------------------------------------------------------------------------------------------------------------------


def form_of(teacher_schedule, form=None):
    """(form, its schedule): the teacher's own schedule where it fits, else the form's standard one, reached at equal SNR."""
    own = teacher_schedule.config["name"]
    form = form or (
        own if own in FORMS else "flow"
    )  # TrigFlow: the official code uses the flow's formulas
    return form, teacher_schedule if own == form else SCHEDULES[form]()


def step_levels(form, schedule, n, steps=None):
    """tau_0 > ... > tau_{n-1} of an n-step student, in the schedule's t. vp, n = 4: 625, 468, 312, 156; flow: 1, .75, .5, .25."""
    rule = dict(
        edm=lambda u: 2.5 * u, vp=lambda u: float(int(0.625 * schedule.T * u)), flow=lambda u: u
    )[form]
    try:
        levels = (
            [rule(1 - i / n) for i in range(n)]
            if steps is None
            else [float(s) for s in str(steps).split(",")]
        )
    except ValueError:
        levels = []
    if (
        len(levels) != n
        or any(a <= b for a, b in zip(levels, levels[1:]))
        or not (schedule.t_min < levels[-1] <= levels[0] <= schedule.t_max)
    ):
        what = (
            f"--nfe {n}: its rule does not give" if steps is None else f"--steps {steps}: expected"
        )
        raise UserError(
            f"{what} {n} falling levels above {schedule.t_min:g}, up to {schedule.t_max:g} (--nfe {n}, {form} form)"
        )
    return torch.tensor(levels, dtype=torch.float64)


def draw_levels(draw, schedule, args, student):
    """(alpha, sigma) [B] at which (5) (student) or (4) is asked, by the row args.form of (11)."""
    if args.form == "vp":
        t = draw.randint(int(0.02 * schedule.T), int(0.98 * schedule.T))  # (11)
    elif args.form == "edm" and student:
        low, high = (s ** (1 / schedule.rho) for s in (schedule.t_min, schedule.t_max))
        t = (high + (1 - 0.8 * draw.rand()) * (low - high)) ** schedule.rho
    elif args.form == "edm":
        t = (-1.2 + 1.2 * draw.randn().double()).exp()
    else:
        t = (math.log(2) + 1.6 * draw.randn().double()).sigmoid()
    if args.shift != 1:
        t = schedule.t_from_snr((schedule.alpha(t) / schedule.sigma(t) / args.shift) ** 2)
    return schedule.alpha(t), schedule.sigma(t)


def add_noise(x, alpha, sigma, eps):
    """x_t = alpha x + sigma eps in the dtype of x; alpha, sigma: 0-d or [B], float64. Passes gradients on to x."""
    return (expand(alpha, x) * x + expand(sigma, x) * eps).to(x.dtype)


def rollout(student, schedule, levels, k, cond, noise, how):
    """Input of step k: the student's own sampler, run k steps without gradient, exactly as in `sample`. noise(): fresh [B, *shape]."""
    z = noise()
    x_k = (schedule.sigma(levels[0]) * z).to(z.dtype)
    with torch.no_grad():
        for a, b in zip(levels[:k], levels[1 : k + 1]):
            xhat = student(x_k, schedule.alpha(a), schedule.sigma(a), cond)
            eps = (
                noise()
                if how == "fresh"
                else z
                if how == "fixed"
                else eps_from_x0(xhat, x_k, schedule.alpha(a), schedule.sigma(a))
            )
            x_k = add_noise(xhat, schedule.alpha(b), schedule.sigma(b), eps)  # (2)
    return x_k


def weighted(bce, weight, average):
    """Mean of losses [B, ...] with weights [B] that have no gradient. batch, process: the product of both means, over all samples or each process's."""
    if average == "sample":
        return (bce.reshape(len(bce), -1).mean(1) * weight).mean()
    mean = weight.detach().mean()
    if average == "batch" and dist.is_initialized():
        dist.all_reduce(mean)
        mean = mean / dist.get_world_size()
    return bce.mean() * mean


# ---- losses -----------------------------------------------------------------------------------------------------------------------------


def fake_loss(f, x, weight):
    """Denoising loss of the critic on student samples; weight: lambda_t [B]."""
    return (weight * (f - x.detach()).square().flatten(1).sum(1)).mean().to(x.dtype)  # (4)


def sid_loss(x, f_phi, f_psi, f_psi3, w, alpha):
    """x, both predictions: all with gradient. Its value is expected near 0, of either sign, for alpha = 1: no measure of progress."""
    return (
        w.to(x.dtype)
        * ((f_phi - f_psi) * ((f_phi - x) - alpha * (f_phi - f_psi3))).flatten(1).sum(1)
    ).mean()  # (5)


def sid_weight(kind, x, f_phi, alpha, sigma):
    """w [B] of (5), without gradient."""
    if kind == "sid_legacy":
        return 1 / (x - f_phi).detach().abs().flatten(1).mean(1).clamp(min=1e-5)  # (6)
    return WEIGHTS[kind](sigma / (alpha + sigma)).to(x.device)


def cls_loss(logit_fake, logit_real, omega, average="batch"):
    return weighted((F.softplus(logit_fake) + F.softplus(-logit_real)) / 2, omega, average)  # (8)


def adv_loss(logit_fake, w, pixels, average="batch"):
    return pixels * weighted(F.softplus(-logit_fake.clamp(-10, 10)), w, average)  # (9)


# ---- sampler ----------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(student, z, cond, nfe, noise, form=None, steps=None, renoise="fresh"):
    """K-step sampler: denoise, add noise at the next level, repeat; no guidance. z [B, *shape] unit noise; noise(): more of it. -> x [B, *shape]."""
    form, schedule = form_of(student.schedule, form)
    levels, first = step_levels(form, schedule, nfe, steps), [z]
    x_k = rollout(
        student, schedule, levels, nfe - 1, cond, lambda: first.pop() if first else noise(), renoise
    )
    return student(x_k, schedule.alpha(levels[-1]), schedule.sigma(levels[-1]), cond)


def main():
    args, networks = parse_args(), (1, 1)  # students, critics: for the estimate of memory
    # ==== same in every script: setup ====
    run = Run("sid", args)
    teacher = load_teacher(args.teacher, run.device, run.dtype, **run.teacher_kwargs(*networks))
    schedule, shape = teacher.schedule, teacher.shape
    # ==== end ====
    form, schedule = form_of(schedule, args.form)
    k1, k2, k3, k4 = kappa = fill_in(args, form)
    levels = step_levels(form, schedule, args.nfe, args.steps)
    images = data.load_images(args.data, teacher, run.print) if args.gan else None
    student, critic = teacher.copy(args.lora), Critic(teacher.copy(args.lora_fake))
    if args.grad_checkpoint:
        student.checkpoint_activations()
        critic.fake.checkpoint_activations()
    G, C = run.train(student), run.train(critic)
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
    sampler = dict(
        form=form, steps=",".join(f"{t:.10g}" for t in levels.tolist()), renoise=args.renoise
    )
    # one pass = one forward of the network; a backward counts one for the weights and one for the input (measured). Without the discriminator's part.
    cost, roll = lambda k: 1 if k in (0, 1) else 2, (args.nfe - 1) / 2
    passes = (
        roll
        + 1
        + 3 * cost(k1)
        + (roll + 3 + (1 if args.detach else 2) * (cost(k4) + cost(k2) + cost(k3) * (k3 != k2)))
        / args.ratio
    )
    run.print_summary(
        student=student,
        critic=critic,
        teacher=teacher,
        images=images,
        form=form,
        steps=sampler["steps"],
        kappa=kappa,
        weight=args.weight,
        empty_conditions=args.drop,
        passes_per_iteration=f"{passes:.2f}" + " and those of the discriminator" * args.gan,
        graph=dict(student=cost(k1) + args.gan)
        if args.detach
        else dict(student=1, critic=cost(k2) + cost(k3) * (k3 != k2), teacher=cost(k4)),
    )

    # ==== same in every script: resume ====
    state = dict(student=student, opt_g=opt_g, ema=ema) | dict(critic=critic, opt_c=opt_c)
    first = run.resume(state)
    it = first - 1
    # ==== end ====

    for it in run.loop(first, args.iters):
        draw = run.draw(it)
        run.set_rates(it, (opt_g, args.lr), (opt_c, args.lr_fake))
        seen = it * args.batch
        k = draw.shared_randint(
            0, args.nfe
        )  # for both turns, and the same on all processes: they must call their networks equally often
        inputs = lambda cond: (
            rollout(student, schedule, levels, k, cond, lambda: draw.randn(*shape), args.renoise),
            schedule.alpha(levels[k]),
            schedule.sigma(levels[k]),
            cond,
        )
        # the critic's turn comes first: as long as it equals the teacher, (5) has no gradient
        if args.gan:
            pixels, labels = images.batch(it, args.batch, args.seed, *run.data_shard)
            x_real = teacher.encode_images(pixels.to(run.device))
        cond = teacher.encode(labels if args.gan else draw.randint(0, max(teacher.classes, 1)))
        if args.drop:  # before the student is asked, which makes these images without condition too
            cond = teacher.drop_condition(cond, draw.rand() < args.drop)
        with torch.no_grad():
            x = student(*inputs(cond))
        (alpha, sigma), eps = draw_levels(draw, schedule, args, student=False), draw.randn_like(x)
        x_t = add_noise(x, alpha, sigma, eps)
        native = native_weight(
            dict(edm="edm", vp="eps", flow="flow")[form], alpha, sigma, teacher.sigma_data
        )
        loss = loss_fake = fake_loss(C(x_t, alpha, sigma, cond, k1), x, native)
        logs = dict(fake=loss_fake, mean=x.mean(), std=x.std())
        if args.gan:
            twice = lambda a: torch.cat([a, a])
            both = torch.cat(
                [x_t, add_noise(x_real, alpha, sigma, eps)]
            )  # one level, noise and label for the fake image and the real one
            logit_fake, logit_real = C(
                both, twice(alpha), twice(sigma), {key: twice(v) for key, v in cond.items()}
            ).chunk(2)
            omega = native if form == "edm" else torch.full_like(native, float(x[0].numel()))
            logs |= dict(cls=cls_loss(logit_fake, logit_real, omega.float(), args.gan_average))
            loss = loss + args.cls_weight * logs["cls"]  # (10)
            logs |= dict(logit_fake=logit_fake.mean(), logit_real=logit_real.mean())
        loss.backward()
        logs |= dict(grad_critic=run.step(opt_c, args.clip))
        if it % args.ratio == 0 and (not args.gan or seen >= args.gan_warmup):
            critic.requires_grad_(
                False
            )  # no gradient for its weights; the input's must pass, and does
            cond = teacher.encode(draw.randint(0, max(teacher.classes, 1)))
            x = G(*inputs(cond))  # (1)
            alpha, sigma = draw_levels(draw, schedule, args, student=True)
            x_t = add_noise(x, alpha, sigma, draw.randn_like(x))
            with torch.set_grad_enabled(not args.detach):
                f_phi = teacher.guided(x_t, alpha, sigma, cond, k4)
                f_psi = critic(x_t, alpha, sigma, cond, k2)
                f_psi3 = f_psi if k3 == k2 else critic(x_t, alpha, sigma, cond, k3)
            w = sid_weight(args.weight, x, f_phi, alpha, sigma)
            loss_sid = sid_loss(x, f_phi, f_psi, f_psi3, w, args.alpha)
            loss = args.sid_weight * loss_sid
            if args.gan and seen >= 2 * args.gan_warmup:
                logs |= dict(
                    adv=adv_loss(
                        critic(x_t, alpha, sigma, cond), w.float(), x[0].numel(), args.gan_average
                    )
                )
                loss = (loss + args.gan_weight * logs["adv"]) / 2  # (10)
            loss.backward()
            logs = (
                dict(
                    gap=(f_phi - f_psi).square().mean(),
                    sid=loss_sid,
                    weight=w.mean(),
                    real_gap=(x - f_phi).square().mean(),
                    grad_student=run.step(opt_g, args.clip),
                )
                | logs
            )
            ema.update(run.images_stepped)
            critic.requires_grad_(True)

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
