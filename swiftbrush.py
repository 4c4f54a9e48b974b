"""SwiftBrush. Nguyen and Tran, CVPR 2024, arXiv 2312.05239.

The student G makes an image in one network pass. It is trained so that its samples, with noise
added, have the same distribution as the teacher's: the gradient of the KL divergence between the
two is a difference of two denoisers, the frozen teacher and a critic that is trained all the while
on the student's own samples. This is variational score distillation, with a network in place of
the 3-D scene. The critic is the teacher with LoRA adapters, both are guided with the same scale,
and each takes one step an iteration. No images are needed.

Notation: x_t = alpha_t x + sigma_t eps; mu(x_t, t, c) and eps(x_t, t, c) are a network's estimates
of the clean x and of the noise; c is the label or prompt; sg[] stops gradients. All times t are
indices into a grid of 1000 noise levels, from data to noise; alpha_t^2 + sigma_t^2 = 1.

    x = G(z, T, c)                           z: pure noise at the last level, T = 999            (1)
    r = u + w (mu_teacher(x_t, t, c) - u)    u: the same with the null condition; f likewise     (2)
    f = u + w (mu_critic(x_t, t, c) - u)     with the critic; w is --cfg                         (3)
    g = alpha_t sigma_t (f - r)              = sigma_t^2 (eps_teacher - eps_critic), guided;     (4)
                                             t ~ U{20..980}
    L_vsd = 1/2 mean (x - sg[x - g])^2       so that dL_vsd/dx = g / numel(x)                    (5)
    L_critic = mean alpha_t^2 (eps_critic(x_t, t, c) - eps)^2       t ~ U{0..999}; c is the      (6)
                                             null condition in a share --null-share of the samples

Networks of other schedules (flow, EDM) are evaluated at the level with the same alpha_t / sigma_t.

Usage:
    python swiftbrush.py                                        # MNIST, minutes on a CPU
    python swiftbrush.py --teacher toy                          # 2-D mixture, under a minute
    torchrun --nproc_per_node=8 swiftbrush.py --teacher sd15    # 8 GPUs

Differences from the paper, variants and results: docs/swiftbrush.md.
"""

import training.interrupt  # noqa: F401  # isort: skip

import torch
import torch.nn.functional as F

from common.errors import launch, require
from common.schedules import add_noise, expand, initial_noise
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
SD21 = dict(  # the official command; updates and batch [P, A]
    cfg=4.5,
    lr=1e-6,
    lr_fake=1e-3,
    lora_fake=64,
    lora_alpha=108.0,
    lora_targets=["to_q", "to_v"],
    betas=(0.9, 0.999),
    weight_decay=0.0,
    batch=16,
    iters=65_000,
    clip=1.0,
    ema=100_000,  # images; the code's average covers the last ninth of the run at its end
    null_share=0.1,
    source="[C], updates and batch [P, A]",
)
TOY = dict(  # [O]
    cfg=1.0,
    lr=5e-4,
    lr_fake=2e-3,
    betas=(0.9, 0.999),
    weight_decay=0.0,
    batch=256,
    iters=4000,
    cooldown=0.5,
    ema=0,
    null_share=0.1,
    source="[O]",
)
MNIST = dict(  # [O]
    TOY,
    lr=1e-4,
    batch=64,
    iters=1250,
    warmup=20,
    ema=2000,
)
EMOJI = dict(MNIST, cfg=3.5, batch=32, iters=600, source="nobody's: mnist's")
WHOLE = dict(SD21, lora_fake=None, lora_alpha=None, lora_targets=None, lr_fake=1e-5)  # the critic
PRESETS = {
    "default": dict(SD21, source="nobody's: sd21's"),
    "toy": TOY,
    "toy-cond": TOY,
    "mnist": MNIST,
    "emoji": EMOJI,
    "emoji-flow": EMOJI,
    "own": dict(MNIST, source="nobody's: mnist's"),
    "edm-imagenet64": dict(WHOLE, cfg=1.0, source="nobody's"),
    "edm-cifar10": dict(WHOLE, cfg=1.0, source="nobody's"),
    "sd21": SD21,
}


def parse_args(argv=None):
    p = Parser(__doc__, critic=True, few_steps=False, small=True)
    add = p.method.add_argument
    add("--null-share", type=float, metavar="X", help="share of samples without condition in (6)")
    args = p.parse(PRESETS, argv)
    ok = 0 <= args.null_share < 1
    require(ok, f"--null-share: expected a share from 0 to below 1, found {args.null_share}")
    return args


# ---- sampling ------------------------------------------------------------------------------------


@torch.no_grad()
def sample(student, z, cond, nfe, noise):
    """One step from unit noise z [B, *shape]. noise is not used. -> x [B, *shape]."""
    return student(*first_input(student.schedule, z), cond)  # (1)


def first_input(schedule, z):
    """Pure noise at the last level, made of unit noise z [B, *shape]; its alpha and sigma."""
    t = schedule.grid(N)[-1]
    return initial_noise(schedule, t, z), schedule.alpha(t), schedule.sigma(t)


# ---- losses --------------------------------------------------------------------------------------


@torch.no_grad()
def vsd_gradient(x_t, alpha, sigma, cond, teacher, critic, cfg):
    """g of (4) [B, *shape], without graph; also r and f for the log.

    x_t: samples of the student with noise at the levels alpha, sigma [B].
    """
    r = teacher.guided(x_t, alpha, sigma, cond, cfg)  # (2)
    f = critic.guided(x_t, alpha, sigma, cond, cfg)  # (3)
    weight = alpha * sigma / (alpha**2 + sigma**2)
    return expand(weight, x_t).to(x_t.dtype) * (f - r), r, f  # (4)


def vsd_loss(x, g):
    return 0.5 * F.mse_loss(x, (x - g).detach())  # (5)


def critic_loss(prediction, x, alpha, sigma):
    """prediction, x: the critic's estimate and the student's samples [B, *shape].

    An error of the noise is alpha / sigma times that of the clean sample, with the other sign.
    """
    total = alpha**2 + sigma**2
    weight = alpha**2 / total * (alpha / sigma) ** 2
    error = prediction - x.detach()
    return (expand(weight, x).to(x.dtype) * error.square()).mean()  # (6)


# ---- training ------------------------------------------------------------------------------------


def main():
    args = parse_args()
    run = Run(__file__, args)
    load = run.teacher_kwargs(students=1, critics=1)
    teacher = load_teacher(args.teacher, run.device, run.dtype, **load)
    schedule = teacher.schedule

    # Networks: student and critic start as the teacher, or as another run's.
    student = teacher.copy(args.lora, args.small)
    critic = teacher.copy(args.lora_fake, args.small_fake)
    if args.start and not args.resume:
        start_from(args.start, teacher, student, critic, run.print)
    student_ddp = run.train(student)  # DDP around both; for passes that train weights
    critic_ddp = run.train(critic)
    opt_g = adamw(student, args.lr, args)
    opt_c = adamw(critic, args.lr_fake, args)
    ema = EMA(student, args.ema, args.ema_cpu)
    report = Report(run, teacher, ema, sample, {})
    facts = dict(steps=describe_steps(schedule, schedule.grid(1)))
    run.print_summary(None, student=student, critic=critic, teacher=teacher, **facts)

    state = dict(student=student, opt_g=opt_g, ema=ema, critic=critic, opt_c=opt_c)
    first = run.resume(state)
    it = first - 1  # if no iteration is left
    for it in run.loop(first, args.iters, show=["vsd", "critic"]):
        draw = run.draw(it)
        grid = schedule.grid(N)  # of this iteration's size
        run.set_rates(it, (opt_g, args.lr), (opt_c, args.lr_fake))
        cond = teacher.random_cond(draw)

        def noised(x, i):
            """x_t, alpha, sigma of x at the levels with grid indices i [B]."""
            alpha, sigma = schedule.alpha(grid[i]), schedule.sigma(grid[i])
            return add_noise(x, alpha, sigma, draw.randn_like(x)), alpha, sigma

        # Student.
        x = student_ddp(*first_input(schedule, draw.randn(*teacher.shape)), cond)  # (1)
        x_t, alpha, sigma = noised(x.detach(), draw.randint(20, 981))
        g, r, f = vsd_gradient(x_t, alpha, sigma, cond, teacher, critic, args.cfg)
        loss = vsd_loss(x, g)
        loss.backward()
        grad_student = run.step(opt_g, args.clip)  # clip, step, zero the gradients
        ema.update(run.images_stepped)
        logs = dict(vsd=loss, grad_student=grad_student)
        logs |= dict(real_gap=(x - r).square().mean(), fake_gap=(x - f).square().mean())

        # Critic, on the same samples.
        x = x.detach()
        x_t, alpha, sigma = noised(x, draw.randint(0, N))
        cond = teacher.drop_condition(cond, draw.rand() < args.null_share)
        loss = critic_loss(critic_ddp(x_t, alpha, sigma, cond), x, alpha, sigma)
        loss.backward()
        grad_critic = run.step(opt_c, args.clip)
        logs |= dict(critic=loss, grad_critic=grad_critic, mean=x.mean(), std=x.std())

        run.after(it, logs, state, report)

    run.finish(it, state, report)
    report.end(it + 1)


if __name__ == "__main__":
    launch(main)
