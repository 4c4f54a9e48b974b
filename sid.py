"""SiD: Score identity Distillation. Zhou et al., ICML 2024, arXiv 2404.04057.

Also SiD-LSG (2406.01561), SiDA (2410.14919), few-step SiD (2505.12674), SiD-DiT (2509.25127).

The student G makes an image in one or a few network passes. It is trained so that its samples, with
noise added, have the same distribution as the teacher's. The loss estimates the Fisher divergence
between the two from two denoisers, the frozen teacher ("real") and a critic ("fake") that is
trained all the while on the student's own samples. Unlike in DMD, the loss is differentiated
through both: their weights are frozen in the student's turn, but the gradient passes through them
to x. With --gan the critic's encoder is also a discriminator, the only part that needs real images.

Notation: x_t = alpha_t x + sigma_t eps; mu(x_t, t, c) is a network's estimate of the clean x; c is
the label or prompt; sg[] stops gradients. |.|^2 and <.,.> sum over the pixels of a sample, E is the
mean over the batch. alpha without an index is --alpha.

    x = G(x_in, t_k, c)                      k ~ U{0..n-1}, one draw for the whole batch         (1)
    x_in = alpha_k xhat + sigma_k eps        xhat: the student's own output after k steps        (2)
    r = mu_real, f = mu_fake at x_t, both guided: mu(null) + kappa (mu(c) - mu(null))            (3)
    L_fake = E lambda_t |f - sg[x]|^2                                                            (4)
    L_sid = E w <r - f, (r - x) - alpha (r - f)>             r, f and x have gradient            (5)
    w = sg[1 / mean|x - r|]                  mean over pixels. Or, with t = sigma / (alpha +     (6)
                                         sigma), 1 - t or 1 / t (--weight)
    l(x) = mean over the channels of the critic's features of x_t: a logit for each position     (7)
    L_cls = E[omega_t] mean (softplus(l(sg[x])) + softplus(-l(x_real))) / 2                      (8)
    L_adv = E[w] numel(x) mean softplus(-clip(l(x), -10, 10))                                    (9)
    student: s L_sid, with the GAN (s L_sid + w_G L_adv) / 2     critic: L_fake + w_D L_cls     (10)

The means of (8), (9) are over the batch and positions. omega_t is lambda_t for edm, else numel(x).
Until --gan-warmup images, the student waits; until twice that, its loss is s L_sid. The official
code has levels, steps and lambda_t for three forms of schedules:

    form   t of (4) and (5)                  t_k                   lambda_t is that of          (11)
    vp     t ~ U{20..979} of 1000            int(625 (1 - k/n))    the error of eps
    flow   logit t ~ N(ln 2, 1.6^2)          1 - k/n               the error of the velocity
    edm    ln t ~ N(-1.2, 1.2^2); for (5):   2.5 (1 - k/n)         EDM's loss
           EDM's sampling grid without its noisiest 20 %

Usage:
    python sid.py                                            # one step, MNIST, minutes on a CPU
    python sid.py --nfe 4 --gan                              # four steps, with the GAN term
    python sid.py --teacher toy                              # 2-D mixture, under a minute
    torchrun --nproc_per_node=8 sid.py --teacher DIR         # any teacher folder, 8 GPUs

Differences from the paper, variants and results: docs/sid.md.
"""

import training.interrupt  # noqa: F401  # isort: skip

import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from common.errors import launch, require
from common.schedules import Flow, add_noise, expand, native_weight
from common.teachers.load import load_teacher
from common.teachers.students import start_from
from data.images import load_images
from training.ema import EMA
from training.flags import Parser
from training.optim import adamw
from training.plan import describe_steps
from training.report import Report
from training.run import Run

# Presets: the flags for a kind of teacher, unless the command line gives others.
# [P] paper, [C] official code, [O] ours, measured in docs/RESULTS.md. `source` is printed at the
# start; docs/teachers.md has all of them in a table.
CIFAR10 = dict(  # EDM on CIFAR-10 [C]: 500M images; its authors call 100M very competitive
    cfg=1.0,
    guidance="lsg",
    alpha=1.2,  # 1 for SiDA and for text
    nfe=1,
    lr=1e-5,
    lr_fake=1e-5,
    betas=(0.0, 0.999),
    weight_decay=0.0,
    clip=1e9,  # none
    ratio=1,
    batch=256,
    iters=2_000_000,
    warmup=0,
    cooldown=0.0,
    ema=500_000,
    shift=1.0,
    cls_weight=1.0,
    source="[C] SiD",
)
TOY = dict(  # [O]
    CIFAR10,
    alpha=1.0,
    lr=5e-4,
    lr_fake=5e-4,
    iters=2000,
    cooldown=0.5,
    ema=0,
    source="[O]",
)
MNIST = dict(  # [O]
    CIFAR10,
    cfg=1.5,
    alpha=1.0,
    weight="1_over_sigma",  # little noise shows speckle in the background, so it weighs most
    lr=5e-4,
    lr_fake=1e-3,
    betas=(0.5, 0.99),
    batch=64,
    iters=550,
    warmup=20,
    cooldown=0.5,
    ema=2000,
    shift=0.3,  # less noise: fewer speckles in the background
    gan_warmup=0,  # the run is shorter than that of the form
    source="[O]",
)
EMOJI = dict(  # [O]
    MNIST,
    cfg=3.5,
    weight=None,
    lr=5e-5,
    lr_fake=2e-4,
    batch=32,
    iters=300,
    shift=1.0,
)
LSG = dict(  # Stable Diffusion 1.5 and 2.1-base [C] SiD-LSG: 10M images; lowest FID at guidance 1.5
    CIFAR10,
    cfg=2.0,
    alpha=1.0,
    lr=1e-6,
    lr_fake=1e-6,
    batch=512,
    iters=20_000,
    ema=50_000,
    source="[C] SiD-LSG",
)
SID_DIT = dict(  # [C] ml-sid-dit: 2M images; the pipelines' guidance differs, 4.5 is for all
    CIFAR10,
    cfg=4.5,
    alpha=1.0,
    nfe=4,
    lr=1e-6,
    lr_fake=1e-6,
    iters=8000,
    ema=0,
    source="[C] SiD-DiT",
)
SANA = dict(SID_DIT, lr=5e-6, lr_fake=5e-6, iters=4000)  # [C] 1M images
EDM2 = dict(  # SiDA's ImageNet-512 [C], but the rate, which is for magnitude-preserving networks
    CIFAR10,
    cfg=1.5,
    alpha=1.0,
    batch=2048,
    iters=97_000,
    ema=2_000_000,
    source="nobody's: SiDA's EDM2 at rate 1e-5",
)
PRESETS = {
    "default": dict(CIFAR10, source="nobody's: CIFAR-10's"),
    "toy": TOY,
    "toy-cond": TOY,
    "mnist": MNIST,
    "emoji": EMOJI,
    "emoji-flow": dict(EMOJI, source="nobody's: emoji's"),
    "own": dict(MNIST, weight=None, shift=1.0, source="nobody's: mnist's"),
    "edm-imagenet64": dict(  # 1000M images
        CIFAR10,
        lr=4e-6,
        lr_fake=4e-6,
        batch=8192,
        iters=122_000,
        ema=2_000_000,
        source="[C] SiD",
    ),
    "edm-cifar10": CIFAR10,
    "dit": EDM2,
    "sit": EDM2,
    "sd15": LSG,
    "sd21": dict(LSG, source="nobody's: sd15's"),
    "sdxl": dict(SID_DIT, source="4 steps [P], the rest nobody's: SiD-DiT's"),
    "sd3": SID_DIT,
    "sana": SANA,
    "sana-0.6b": SANA,
    "flux": dict(SID_DIT, cfg=1.0, source="[C] SiD-DiT, guidance nobody's"),
    "chroma": dict(SID_DIT, cfg=5.0, source="nobody's: SiD-DiT's"),
    "flux2": dict(SID_DIT, cfg=1.0, source="nobody's: SiD-DiT's"),
    "flux2-klein": dict(SID_DIT, cfg=4.0, source="nobody's: SiD-DiT's"),
    "hunyuan-image": dict(SID_DIT, cfg=3.5, source="nobody's: SiD-DiT's"),
    "lumina2": dict(SID_DIT, cfg=4.0, source="nobody's: SiD-DiT's"),
    "qwen-image": dict(SID_DIT, cfg=4.0, source="nobody's: SiD-DiT's"),
    "z-image": dict(SID_DIT, cfg=6.0, source="nobody's: SiD-DiT's"),
    "wan2.1": dict(SID_DIT, cfg=5.0, source="nobody's: SiD-DiT's"),
    "wan2.1-14b": dict(SID_DIT, cfg=5.0, source="nobody's: SiD-DiT's"),
    "wan2.2": dict(SID_DIT, cfg=4.0, source="nobody's: SiD-DiT's"),
    "wan2.2-5b": dict(SID_DIT, cfg=5.0, source="nobody's: SiD-DiT's"),
    "sana-video": dict(SID_DIT, cfg=6.0, source="nobody's: SiD-DiT's"),
    "ltx-video": dict(SID_DIT, cfg=3.0, source="nobody's: SiD-DiT's"),
    "hunyuanvideo-1.5": dict(SID_DIT, cfg=6.0, source="nobody's: SiD-DiT's"),
}

# What the official code has for each form of (11) [C], where neither flag nor preset says more.
FORMS = {
    "edm": dict(
        weight="sid_legacy",
        scale=100.0,  # s in (10)
        drop=0.0,  # share of conditions dropped while a guided critic is trained
        gan_weight=0.01,
        gan_warmup=100_000,
    ),
    "vp": dict(
        weight="sid_legacy",
        scale=1.0,
        drop=0.1,
        gan_weight=0.001,  # from a third party's notes on few-step SiD
        gan_warmup=100_000,  # EDM's
    ),
    "flow": dict(
        weight="1_minus_sigma",
        scale=100.0,
        drop=0.0,
        gan_weight=1.0,
        gan_warmup=20_000,
    ),
}


def parse_args(argv=None):
    p = Parser(__doc__, critic=True, images=True, small=True)
    add = p.method.add_argument
    weights = ["sid_legacy", "1_minus_sigma", "1_over_sigma"]
    add(
        "--alpha",
        type=float,
        help="alpha of (5); 0.5 is exact for a perfect critic, papers have 1 to 1.2",
    )
    add("--weight", choices=weights, help="weight w of (5) [by form]")
    add(
        "--guidance",
        choices=["lsg", "long", "zero"],
        help="guide both networks (lsg), the teacher (long), none (zero: the critic sees no cond)",
    )
    add("--steps", metavar="T,...", help="times of the steps, e.g. 1,.9,.75,.5 [by form]")
    add("--ratio", type=int, help="critic steps per student step")
    add("--shift", type=float, help="factor on sigma / alpha of all levels drawn in (4), (5)")
    add("--gan", action="store_true", help="add the GAN losses (8) and (9), which need images")
    add("--gan-weight", type=float, help="weight w_G of (9) in (10) [by form]")
    add("--cls-weight", type=float, help="weight w_D of (8) in (10)")
    add(
        "--gan-warmup",
        type=int,
        help="images before the student starts, and as many again before (9) joins [by form]",
    )
    args = p.parse(PRESETS, argv)
    require(args.ratio >= 1, f"--ratio: expected at least 1, found {args.ratio}")
    require(args.shift > 0, f"--shift: expected a number > 0, found {args.shift}")
    unused = args.data and not args.gan and not args.from_image
    require(not unused, f"--data {args.data}: this run uses no images; add --gan")
    if args.guidance == "zero":
        ok = args.cfg in (1, p.get_default("cfg"))
        require(ok, f"--guidance zero: expected --cfg 1, no network is guided; found {args.cfg:g}")
        args.cfg = 1.0
        args.cfg_given = True
    if args.smoke and args.gan:
        args.ratio = 1  # the turns of the critic alone are those of the warm-up
    return args


def fill_in(args, form):
    """Flags that neither the command line nor the preset has set get the values of the form."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    vars(args).update(FORMS[form] | given)
    if args.smoke:  # iterations: the critic alone, the student without (9), the student with it
        args.gan_warmup = min(args.gan_warmup, args.batch)
    last = (args.iters - 1) // args.ratio * args.ratio  # iteration of the last student step
    require(
        not args.gan or 2 * args.gan_warmup <= last * args.batch,
        f"--gan-warmup {args.gan_warmup}: (9) joins after {2 * args.gan_warmup} images, expected "
        f"at most {last * args.batch}, those before the last student step (--iters, --batch)",
    )


# ---- networks ------------------------------------------------------------------------------------


class Critic(nn.Module):
    """mu_fake and its logits in one module, so that one DDP wrapper averages both gradients."""

    def __init__(self, fake):
        super().__init__()
        self.fake = fake

    def forward(self, x_t, alpha, sigma, cond, kappa=1.0, logit=False):
        if logit:
            features = self.fake(x_t, alpha, sigma, cond, features=True)
            return features[-1].float().mean(1)  # (7) [B, h, w], or [B] for points
        return self.fake.guided(x_t, alpha, sigma, cond, kappa)  # (3)


def guidance_scales(guidance, cfg):
    """kappa_real and kappa_fake of (3)."""
    if guidance == "lsg":  # SiD-LSG, "long and short"
        return cfg, cfg
    if guidance == "long":  # the teacher alone, as in DMD
        return cfg, 1.0
    return 1.0, 0.0  # Zero-CFG of few-step SiD


# ---- noise levels --------------------------------------------------------------------------------


def form_of(schedule):
    """Row of (11) for a teacher with this schedule, and the schedule in which the row is stated.

    The official code treats TrigFlow teachers as flow teachers. They are evaluated at equal SNR.
    """
    name = schedule.config["name"]
    if name in FORMS:
        return name, schedule
    return "flow", Flow()


def draw_levels(draw, form, schedule, shift, student_turn):
    """alpha, sigma [B] of random noise levels: for (5) in the student's turn, otherwise for (4)."""
    if form == "vp":
        t = draw.randint(int(0.02 * schedule.T), int(0.98 * schedule.T))  # (11)
    elif form == "flow":
        t = (math.log(2) + 1.6 * draw.randn().double()).sigmoid()  # (11)
    elif student_turn:  # the grid, as a function of a continuous index
        low = schedule.t_min ** (1 / schedule.rho)
        high = schedule.t_max ** (1 / schedule.rho)
        t = (high + (1 - 0.8 * draw.rand()) * (low - high)) ** schedule.rho  # (11)
    else:
        t = (-1.2 + 1.2 * draw.randn().double()).exp()  # (11)
    if shift != 1:
        snr = (schedule.alpha(t) / schedule.sigma(t) / shift) ** 2
        t = schedule.t_from_snr(snr)
    return schedule.alpha(t), schedule.sigma(t)


# ---- few-step sampling ---------------------------------------------------------------------------


def step_times(form, schedule, n, text=None):
    """Times of an n-step student, from noise to data, float64 [n]. n = 4 in VP: 625, 468, 312, 156.

    text: times given by --steps instead.
    """
    shares = [1 - k / n for k in range(n)]
    if text is not None:
        times = parse_times(text)
    elif form == "edm":
        times = [2.5 * u for u in shares]  # (11)
    elif form == "vp":
        times = [float(int(0.625 * schedule.T * u)) for u in shares]  # (11)
    else:
        times = shares  # (11)
    falling = len(times) == n and times == sorted(set(times), reverse=True)
    ok = falling and schedule.t_min < times[-1] and times[0] <= schedule.t_max
    found = f"--nfe {n}" if text is None else f"--steps {text}"
    span = f"above {schedule.t_min:g}, up to {schedule.t_max:g}"
    require(ok, f"{found}: expected {n} falling times {span} (--nfe {n})")
    return torch.tensor(times, dtype=torch.float64)


def parse_times(text):
    """Numbers of --steps; none if one of them is not a number."""
    try:
        return [float(t) for t in text.split(",")]
    except ValueError:
        return []


def backward_simulation(student, schedule, times, k, cond, z, noise):
    """Input of step k: the student's own sampler, run for k steps without gradient.

    times: of all steps, falling. z: unit noise [B, *shape], the first; noise(): more of it.
    """
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    x_in = sigma[0] * z  # not initial_noise: in vp, t = 625 is below pure noise
    with torch.no_grad():
        for j in range(k):
            xhat = student(x_in, alpha[j], sigma[j], cond)
            x_in = add_noise(xhat, alpha[j + 1], sigma[j + 1], noise())  # (2)
    return x_in


@torch.no_grad()
def sample(student, z, cond, nfe, noise, steps=None):
    """n-step sampler: denoise, add fresh noise at the next level, repeat. -> x [B, *shape].

    z: unit noise [B, *shape]. noise(): more of it. steps: text of --steps.
    """
    form, schedule = form_of(student.schedule)
    times = step_times(form, schedule, nfe, steps)
    x_in = backward_simulation(student, schedule, times, nfe - 1, cond, z, noise)
    return student(x_in, schedule.alpha(times[-1]), schedule.sigma(times[-1]), cond)


# ---- losses --------------------------------------------------------------------------------------


def fake_loss(prediction, x, weight):
    """weight: lambda_t [B], see `fake_weight`."""
    error = (prediction - x.detach()).square().flatten(1).sum(1)  # [B]
    return (expand(weight, error) * error).mean().to(x.dtype)  # (4)


def fake_weight(form, alpha, sigma, sigma_data):
    """lambda_t [B]: turns the square error of x into that of eps or velocity, or EDM's loss."""
    prediction = "eps" if form == "vp" else form
    return native_weight(prediction, alpha, sigma, sigma_data)  # (11)


def sid_loss(x, r, f, w, sid_alpha):
    """All of x, r, f [B, *shape] with graph: r and f are functions of x. sid_alpha: --alpha.

    At 1 the value is expected near 0 with either sign, and does not show progress.
    """
    product = (r - f) * ((r - x) - sid_alpha * (r - f))
    products = product.flatten(1).sum(1)  # [B]
    return (expand(w, products).to(x.dtype) * products).mean()  # (5)


def sid_weight(kind, x, r, alpha, sigma):
    """w [B] of (5), without gradient. kind: value of --weight."""
    if kind == "sid_legacy":
        return 1 / (x - r).detach().abs().flatten(1).mean(1).clamp(min=1e-5)  # (6)
    t = sigma / (alpha + sigma)  # (6); time and sigma of a flow at this SNR
    if kind == "1_minus_sigma":
        return 1 - t
    return 1 / t.clamp(min=1e-5)  # 1_over_sigma


def cls_loss(logit_fake, logit_real, omega):
    """omega: omega_t [B]."""
    bce = (F.softplus(logit_fake) + F.softplus(-logit_real)) / 2
    return bce.mean() * batch_mean(omega)  # (8)


def adv_loss(logit_fake, w, numel):
    """w: of (5), [B]. numel: of one sample."""
    bce = F.softplus(-logit_fake.clamp(-10, 10))
    return numel * (bce.mean() * batch_mean(w))  # (9)


def batch_mean(weight):
    """Mean of weights [B] over the batch of all processes, float32."""
    mean = weight.float().mean()
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean = mean / dist.get_world_size()
    return mean


# ---- training ------------------------------------------------------------------------------------


def main():
    args = parse_args()
    run = Run(__file__, args)
    load = run.teacher_kwargs(students=1, critics=1)
    teacher = load_teacher(args.teacher, run.device, run.dtype, **load)

    # What follows from the teacher's schedule and the guidance.
    form, schedule = form_of(teacher.schedule)
    fill_in(args, form)
    times = step_times(form, schedule, args.nfe, args.steps)
    kappa_real, kappa_fake = guidance_scales(args.guidance, args.cfg)

    # Networks: student and critic start as the teacher or as another run's.
    images = load_images(args.data, teacher, run.print) if args.gan else None
    student = teacher.copy(args.lora, args.small)
    critic = Critic(teacher.copy(args.lora_fake, args.small_fake))
    if args.start and not args.resume:
        start_from(args.start, teacher, student, critic.fake, run.print)
    student_ddp = run.train(student)  # DDP around both; for passes that train weights
    critic_ddp = run.train(critic)
    opt_g = adamw(student, args.lr, args)
    opt_c = adamw(critic, args.lr_fake, args)
    ema = EMA(student, args.ema, args.ema_cpu)
    steps = ",".join(f"{t:.10g}" for t in times.tolist())
    report = Report(run, teacher, ema, sample, dict(steps=steps))
    facts = dict(
        guidance=f"w = {args.cfg:g}, {args.guidance}",
        steps=describe_steps(schedule, times),
        form=f"{form}, weight {args.weight}",
    )
    run.print_summary(images, student=student, critic=critic, teacher=teacher, **facts)

    state = dict(student=student, opt_g=opt_g, ema=ema, critic=critic, opt_c=opt_c)
    first = run.resume(state)
    it = first - 1  # if no iteration is left
    for it in run.loop(first, args.iters, show=["sid", "fake"]):
        draw = run.draw(it)
        run.set_rates(it, (opt_g, args.lr), (opt_c, args.lr_fake))
        images_seen = run.images_before(it)
        logs = {}

        # The student's step in both turns.
        k = draw.shared_randint(0, args.nfe)  # on all processes, for equally many passes
        alpha_k, sigma_k = schedule.alpha(times[k]), schedule.sigma(times[k])
        noise = lambda: draw.randn(*teacher.shape)

        # Critic. Its turn comes first: at the start it is the teacher, where (5) has no gradient.
        if args.gan:
            x_real, cond = images.samples(run, teacher, it)
        else:
            cond = teacher.random_cond(draw)
        if args.drop and kappa_fake != 1:  # before x is made, which then has none either
            cond = teacher.drop_condition(cond, draw.rand() < args.drop)
        x_in = backward_simulation(student, schedule, times, k, cond, noise(), noise)
        with torch.no_grad():
            x = student(x_in, alpha_k, sigma_k, cond)
        alpha, sigma = draw_levels(draw, form, schedule, args.shift, student_turn=False)
        eps = draw.randn_like(x)
        x_t = add_noise(x, alpha, sigma, eps)
        weight = fake_weight(form, alpha, sigma, teacher.sigma_data)
        loss_fake = fake_loss(critic_ddp(x_t, alpha, sigma, cond, kappa_fake), x, weight)
        loss = loss_fake
        if args.gan:  # fake and real in one batch, with the same levels, noise and labels
            x_t = torch.cat([x_t, add_noise(x_real, alpha, sigma, eps)])
            alpha, sigma = torch.cat([alpha, alpha]), torch.cat([sigma, sigma])
            both = {name: torch.cat([c, c]) for name, c in cond.items()}
            logit_fake, logit_real = critic_ddp(x_t, alpha, sigma, both, logit=True).chunk(2)
            omega = weight if form == "edm" else torch.full_like(weight, x[0].numel())
            loss_cls = cls_loss(logit_fake, logit_real, omega)
            loss = loss + args.cls_weight * loss_cls  # (10)
            logs |= dict(cls=loss_cls, logit_fake=logit_fake.mean(), logit_real=logit_real.mean())
        loss.backward()
        grad_critic = run.step(opt_c, args.clip)  # clip, step, zero the gradients
        logs |= dict(fake=loss_fake, grad_critic=grad_critic)
        logs |= dict(mean=x.mean(), std=x.std())

        # Student, on new samples. With --gan the critic has a head start.
        student_turn = it % args.ratio == 0
        if args.gan and images_seen < args.gan_warmup:
            student_turn = False
        if student_turn:
            critic.requires_grad_(False)  # not no_grad: (5) must reach x through the critic
            cond = teacher.random_cond(draw)
            x_in = backward_simulation(student, schedule, times, k, cond, noise(), noise)
            x = student_ddp(x_in, alpha_k, sigma_k, cond)  # (1)
            alpha, sigma = draw_levels(draw, form, schedule, args.shift, student_turn=True)
            x_t = add_noise(x, alpha, sigma, draw.randn_like(x))
            r = teacher.guided(x_t, alpha, sigma, cond, kappa_real)  # (3)
            f = critic.fake.guided(x_t, alpha, sigma, cond, kappa_fake)  # (3)
            w = sid_weight(args.weight, x, r, alpha, sigma)
            loss_sid = sid_loss(x, r, f, w, args.alpha)
            loss = args.scale * loss_sid
            if args.gan and images_seen >= 2 * args.gan_warmup:
                logit = critic(x_t, alpha, sigma, cond, logit=True)
                loss_adv = adv_loss(logit, w, x[0].numel())
                loss = (loss + args.gan_weight * loss_adv) / 2  # (10)
                logs |= dict(adv=loss_adv)
            loss.backward()
            grad_student = run.step(opt_g, args.clip)
            logs |= dict(sid=loss_sid, grad_student=grad_student, weight=w.mean())
            logs |= dict(real_gap=(x - r).square().mean(), gap=(r - f).square().mean())
            ema.update(run.images_stepped)
            critic.requires_grad_(True)

        run.after(it, logs, state, report)

    run.finish(it, state, report)
    report.end(it + 1)


if __name__ == "__main__":
    launch(main)
