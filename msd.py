"""MSD: multi-student distillation. Song et al., "Multi-student Diffusion Distillation for Better One-step Generators", ICML 2025, arXiv 2410.23274.

The conditions of a teacher (its classes) are split among K students, each distilled to one step for its own part only. A sample still costs one pass of
one network, which its label chooses, but K networks share what must be known. Students never meet: here one is trained after the other, in one loop, and
all processes share each student's batch. So one process and torchrun do the same steps, none idles, and one critic is in memory. Each student goes
through distribution matching (DMD2's losses), then the same with a GAN term (--adm). Students smaller than their teacher (--small) cannot start from
its weights: teacher score matching, done once for all of them, comes first.

Notation: x_t = alpha_t x + sigma_t eps; mu(x_t, t, c) is a network's estimate of the clean x; sg[] stops gradients; c is the label, one of C.
    V_k = {c: table[c] = k},   table[c] = floor(rank(c) K / C)            rank(c) = c: neighbours together; the router of training and inference    (1)
    x = G_k(pure noise, t = the noisiest level, c)                        c ~ uniform on V_k                                                        (2)
    L_tsm = mean lambda_t (phi(x_t, t, c) - sg[mu_real(x_t, t, c)])^2     x: images of all labels; phi: where all students start; t as in (7)       (3)
    r = mu_real(x_t, t, c) with guidance u + w (c - u);   f = mu_fake(x_t, t, c) without                                                            (4)
    g = (f - r) / mean|x - r|            mean over the pixels of each sample; t ~ U{20..980} of 1000                                                (5)
    L_dm = 1/2 mean (x - sg[x - g])^2    so that dL_dm / dx = g / numel(x); its value is no KL and need not fall                                    (6)
    L_fake = mean lambda_t (mu_fake(x_t, t, c) - sg[x])^2     lambda_t: the loss the teacher was trained with; t ~ U{0..999}                        (7)
    l(x) = head(critic features of alpha_t x + sigma_t eps)   t ~ U{0..999}                                                                         (8)
    L_gen = mean softplus(-l(x))                                                                                                                    (9)
    L_cls = mean softplus(l(sg[x])) + mean softplus(-l(x_real))           x_real: images of V_k                                                    (10)
    student: L_dm, in the adversarial stage + w_G L_gen;   critic and head: L_fake, there + w_D L_cls                                              (11)

Commands (results and times: README and docs/RESULTS.md):
    python msd.py                                               # four students of the embedded MNIST teacher (settings of dmd2.py, not yet measured here)
    python msd.py --teacher toy-cond                            # 2-D mixture: each student's energy distance to its labels falls from 0.02 below 0.005
                                                                # (--teacher toy has no labels, so there is one student, which is DMD2)
    python msd.py --small num_layers=3 --out out/msd-small      # students with half the teacher's layers
    torchrun --nproc_per_node=8 msd.py --teacher DIR            # any teacher folder, 8 GPUs

Differences from the paper:
    - there is no official code. Not published, so DMD2's or guesses: learning rates, iterations, w_G, w_D, the weight and times of (3), that a small
      student's critic is a copy of the teacher, that the adversarial stage goes on from the averaged student and its critic with a fresh head.
    - --iters counts all students together: runs with different --students cost the same. The paper trains each of K as long as a single one.
    - the paper's stage on ImageNet has a regression on teacher pairs (shared by all students); here is only its other variant, --ratio > 1 instead.
    - the mnist preset is ours: dmd2.py's for minutes on a CPU; --warmup and --cooldown hold for each stage. Labels only: prompts await a table.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import data
from common.ema import EMA
from common.errors import UserError, launch
from common.flags import Parser
from common.report import evaluate_run, export, pictures
from common.rng import derive_seed
from common.routed import ByLabel
from common.run import Run
from common.schedules import expand
from common.teachers.load import load_teacher

PRESETS = {  # the flags of a teacher; every one can be overridden. Sources: [P] paper, [D] DMD2, ours: mnist, emoji, toy-cond but its ratio 5 and GAN weights [D]
    "mnist": dict(
        students=4,
        cfg=1.5,
        nfe=1,
        lr=1e-3,
        lr_fake=1e-3,
        betas=(0.5, 0.99),
        ratio=3,
        shift=0.3,
        batch=64,
        iters=1600,
        warmup=20,
        cooldown=0.5,
        ema=2000,
        adm=0.0,
        adm_lr=0.25,
        gan_weight=0.03,
        cls_weight=0.1,
        tsm_lr=1e-3,
    ),
    "toy-cond": dict(
        students=4,
        cfg=1.0,
        nfe=1,
        lr=5e-4,
        lr_fake=5e-4,
        betas=(0.9, 0.999),
        ratio=5,
        shift=1.0,
        batch=256,
        iters=4000,
        warmup=0,
        cooldown=0.0,
        ema=0,
        adm=0.0,
        adm_lr=0.25,
        gan_weight=3e-3,
        cls_weight=1e-2,
        tsm_lr=2e-3,
    ),
    # any other folder: four students, DM -> ADM [P]; ImageNet-64 of DMD2 [D: lr 2e-6, then a quarter of it for about 0.27 of the run; ratio 5, batch 280,
    # w_G 3e-3, w_D 1e-2, warm-up 500, 200K iterations for each student]; lr of (3): a guess, EDM's for this network is 1e-4
    "default": dict(
        students=4,
        cfg=1.0,
        nfe=1,
        lr=2e-6,
        lr_fake=2e-6,
        betas=(0.9, 0.999),
        ratio=5,
        shift=1.0,
        batch=280,
        iters=800000,
        warmup=500,
        cooldown=0.0,
        ema=0,
        adm=0.27,
        adm_lr=0.25,
        gan_weight=3e-3,
        cls_weight=1e-2,
        tsm_lr=1e-4,
    ),
}
PRESETS |= {
    "toy": dict(PRESETS["toy-cond"], students=1),  # points without labels: nothing to split
    "emoji": dict(
        PRESETS["mnist"], students=2, cfg=3.5, shift=1.0, lr=1e-4, lr_fake=1e-4, batch=32, iters=600
    ),
}
N = 1000  # noise levels of the schedule's own grid over which all times are drawn
STAGES = ("tsm", "dm", "adm")


def parse_args(argv=None):
    p = Parser(__doc__)
    p.method.add_argument(
        "--students", type=int, help="K, the number of students that share the labels"
    )
    p.method.add_argument(
        "--partition",
        choices=["contiguous", "random"],
        default="contiguous",
        help="rank(c) in (1): c itself, or shuffled",
    )
    p.method.add_argument(
        "--small",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="changes to the teacher's network configuration, e.g. num_layers=3",
    )
    p.method.add_argument(
        "--tsm",
        type=float,
        help="share of all iterations for (3); default 0.4 with --small, else 0",
    )
    p.method.add_argument("--tsm-lr", type=float, help="learning rate of (3)")
    p.method.add_argument(
        "--adm",
        type=float,
        help="share of each student's iterations for the adversarial stage, its last; needs images",
    )
    p.method.add_argument(
        "--adm-lr", type=float, help="factor on both learning rates in the adversarial stage"
    )
    p.method.add_argument("--gan-weight", type=float, help="w_G in (11)")
    p.method.add_argument("--cls-weight", type=float, help="w_D in (11)")
    p.method.add_argument("--ratio", type=int, help="critic steps per student step")
    p.method.add_argument(
        "--shift",
        type=float,
        help="multiplies sigma / alpha of all levels drawn; below 1: less noise; 1 in the paper",
    )
    args = p.parse(PRESETS, argv)
    args.tsm = args.tsm if args.tsm is not None else 0.4 if args.small else 0.0
    args.iters = 3 * args.students if args.smoke else args.iters  # of everything, for everyone
    for wrong, message in (
        (
            args.nfe != 1,
            f"--nfe {args.nfe}: the students of MSD make a sample in one pass; dmd2.py has several steps",
        ),
        (
            min(args.students, args.ratio) < 1,
            f"--students, --ratio: expected at least 1, found {args.students}, {args.ratio}",
        ),
        (
            not 0 <= args.adm <= 1 or not 0 <= args.tsm < 1,
            f"--adm, --tsm: expected shares from 0 to 1, --tsm below it, found {args.adm:g}, {args.tsm:g}",
        ),
        (
            args.tsm and not args.small,
            "--tsm: a student of the teacher's size starts as the teacher and has nothing to learn from (3): add --small",
        ),
        (args.shift <= 0, f"--shift: expected a number > 0, found {args.shift}"),
        (args.lora and args.small, "--lora: needs the teacher's network, --small has another"),
        (
            not min(args.tsm_lr, args.adm_lr) >= 0,
            f"--tsm-lr, --adm-lr: expected numbers >= 0, found {args.tsm_lr}, {args.adm_lr}",
        ),
        (
            args.data and not (args.adm or args.tsm),
            f"--data {args.data}: this run would not look at images; add --adm (or --small, for --tsm)",
        ),
        (
            args.iters - round(min(max(args.tsm, 0), 1) * args.iters) < args.students,
            f"--iters {args.iters}: expected one for each of {args.students} students, beside --tsm",
        ),
    ):
        if wrong:
            raise UserError(message)
    return args


# ---- networks ---------------------------------------------------------------------------------------------------------------------------
#   teacher ("real")   frozen                                       mu_real
#   students G_k       one at a time is trained, starts as the teacher, or as phi of (3) if smaller; all in one `ByLabel`, which is saved and evaluated
#   critic ("fake")    trained, a copy of the teacher for each student, mu_fake and the features of the GAN head
#   head               trained with the critic in the adversarial stage, default initialisation


class Head(nn.Module):
    """Logit from one feature map: stride-2 convolutions down to 4x4 or less, one convolution over the rest, 1x1 to a number. No R1, no spectral norm."""

    def __init__(self, h):  # h: a feature map [1, C, H, W], or [1, C] for networks without space
        super().__init__()
        c, layers = h.shape[1], []
        norm = lambda: [
            nn.GroupNorm(math.gcd(32, max(c // 4, 1)), c),
            nn.SiLU(),
        ]  # 32 groups, fewer if they had under 4 channels: 1x1 maps would vanish
        if h.ndim == 2:
            layers += [nn.Linear(c, c), nn.SiLU(), nn.Linear(c, 1)]
        else:
            side = min(h.shape[2:])
            while side > 4:
                layers += [nn.Conv2d(c, c, 4, 2, 1), *norm()]
                side = (side - 2) // 2 + 1
            layers += [nn.Conv2d(c, c, side, side, 0), *norm(), nn.Conv2d(c, 1, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, h):
        return self.layers(h.float()).flatten(1)  # [B, 1]


class Critic(nn.Module):
    """mu_fake and the GAN head in one module, so that one DDP wrapper averages both gradients. place: which student and stage it serves, for a resume."""

    def __init__(self, fake, head, place):
        super().__init__()
        self.fake, self.head = fake, head
        self.register_buffer("place", place)

    def forward(self, x_t, alpha, sigma, cond, logit=False):
        if not logit:
            return self.fake(x_t, alpha, sigma, cond)
        return self.head(self.fake(x_t, alpha, sigma, cond, features=True)[-1])  # (8)


# ---- helpers ----------------------------------------------------------------------------------------------------------------------------


def partition(labels, students, how="contiguous", seed=0):
    """The router: table[label] is the student of that label. Parts differ by one label at most."""
    rank = (
        torch.randperm(labels, generator=torch.Generator().manual_seed(derive_seed(seed, 10)))
        if how == "random"
        else torch.arange(labels)
    )
    return (rank * students // labels).tolist()  # (1)


def plan(iters, students, tsm, adm):
    """What the iterations are for: [(first, end, student, stage)]. (3) for all, then student by student; empty stages are left out."""
    n = round(tsm * iters)
    pieces = [(0, n, 0, "tsm")]
    for k in range(students):
        first, end = (n + (iters - n) * i // students for i in (k, k + 1))
        switch = end - round(adm * (end - first))
        pieces += [(first, switch, k, "dm"), (switch, end, k, "adm")]
    return [p for p in pieces if p[0] < p[1]]


def renoise(x, alpha, sigma, eps):
    """x_t = alpha x + sigma eps in the dtype of x; alpha, sigma: 0-d or [B], float64."""
    return (expand(alpha, x) * x + expand(sigma, x) * eps).to(x.dtype)


def one_step(net, schedule, z, cond):
    """x [B, *shape] in one pass from pure noise: z itself for VP (unit norm at every t) and flow, sigma_max z for EDM."""
    t = schedule.grid(1)[0]
    x_in = z if schedule.unit_norm else (schedule.sigma(t) * z).to(z.dtype)
    return net(x_in, schedule.alpha(t), schedule.sigma(t), cond)  # (2)


# ---- losses -----------------------------------------------------------------------------------------------------------------------------


def tsm_loss(phi, target, weight):
    """Teacher score matching: phi and the teacher's estimate `target` at the same x_t; weight: lambda_t [B]."""
    return (expand(weight, phi).to(phi.dtype) * (phi - target.detach()).square()).mean()  # (3)


def dm_gradient(x, x_t, alpha, sigma, cond, real, fake, cfg):
    """g of (5) and its parts, without graph. x: student output [B, *shape]; x_t its noisy version at (alpha, sigma)."""
    with torch.no_grad():
        r = real.guided(x_t, alpha, sigma, cond, cfg)  # (4)
        f = fake(x_t, alpha, sigma, cond)
        w = (x - r).abs().flatten(1).mean(1)  # one number per sample
        g = (f - r) / w.where(w != 0, math.inf).view(
            -1, *[1] * (x.ndim - 1)
        )  # (5); 0 / 0 is 0, but a nan stays and is counted
    return g, r, f, w


def dm_loss(x, g):
    return 0.5 * F.mse_loss(x, (x - g).detach())  # (6)


def fake_loss(critic, x, x_t, alpha, sigma, cond, weight):
    """Denoising loss of the critic on detached student samples; weight: lambda_t [B]."""
    error = critic(x_t, alpha, sigma, cond) - x.detach()
    return (expand(weight, x).to(x.dtype) * error.square()).mean()  # (7)


def gen_loss(logit_fake):
    return F.softplus(-logit_fake).mean()  # (9)


def cls_loss(logit_fake, logit_real):
    return F.softplus(logit_fake).mean() + F.softplus(-logit_real).mean()  # (10)


# ---- sampler ----------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(student, z, cond, nfe, noise):
    """One pass of one student for each sample, found by its label. z [B, *shape] unit noise -> x [B, *shape]."""
    if nfe != 1:
        raise UserError(f"--nfe {nfe}: the students of MSD make a sample in one pass")
    return one_step(student, student.schedule, z, cond)


def main():
    args = parse_args()
    networks = (
        0 if args.small else args.students,
        1,
    )  # students, critics: for the estimate of memory
    # ==== same in every script: setup ====
    run = Run("msd", args)
    teacher = load_teacher(args.teacher, run.device, run.dtype, **run.teacher_kwargs(*networks))
    schedule, shape = teacher.schedule, teacher.shape
    # ==== end ====
    grid = schedule.grid(N).to(run.device)
    if args.shift != 1:
        grid = schedule.t_from_snr((schedule.alpha(grid) / schedule.sigma(grid) / args.shift) ** 2)
    classes = max(teacher.classes, 1)
    if args.students > (
        found := classes
        if teacher.prompts is not None
        else len(teacher.encode(torch.arange(classes))["labels"].unique())
    ):
        raise UserError(
            f"--students {args.students}: expected at most {found}, the number of different conditions of --teacher {args.teacher}"
        )
    table = partition(classes, args.students, args.partition, args.seed)
    own = [(torch.tensor(table) == k).nonzero()[:, 0] for k in range(args.students)]  # V_k
    images = data.load_images(args.data, teacher, run.print) if args.tsm or args.adm else None
    parts = [images.part(v, k, args.students) for k, v in enumerate(own)] if args.adm else []
    if empty := [v.tolist() for v, part in zip(own, parts) if not len(part)]:
        raise UserError(
            f"--data: the adversarial stage needs images of each student's labels, found none of {empty[0]}"
        )
    one = teacher.resized(args.small, args.seed) if args.small else teacher
    student = ByLabel([one.copy(args.lora) for _ in range(args.students)], table)
    ema = EMA(student, args.ema, args.ema_cpu)
    with torch.no_grad():
        h = teacher(
            torch.zeros(1, *shape, device=run.device), 1.0, 1.0, teacher.encode([0]), features=True
        )[-1]
    head = lambda: run.to_device(Head(h)) if args.adm else None
    mark = lambda start, end, k, stage: torch.tensor(
        [start, k, STAGES.index(stage), *table], device=run.device
    )
    critic = Critic(teacher.copy(args.lora_fake), head(), mark(0, 0, 0, "dm"))
    recompute = lambda *nets: [net.checkpoint_activations() for net in nets * args.grad_checkpoint]
    recompute(student.experts[0], critic.fake)  # who cannot do it says so here
    adam = lambda net, lr: torch.optim.AdamW(
        net.parameters(), lr=lr, betas=args.betas, weight_decay=args.weight_decay, fused=True
    )
    opt_g, opt_c = adam(student, args.lr), adam(critic, args.lr_fake)
    sampler, pieces = {}, plan(args.iters, args.students, args.tsm, args.adm)
    # one pass = one forward of the network; a backward counts two. The student's forward is shared by both turns. Without the GAN's part.
    passes = 1 + 3 + (2 + (1 if args.cfg == 1 else 2) + 1) / args.ratio
    run.print_summary(
        students=f"{args.students}, one after the other",
        one_student=student.experts[0],
        critic=critic,
        teacher=teacher,
        images=images,
        steps=[N - 1],
        labels_of_the_students=[v.tolist() for v in own]
        if classes <= 100
        else [len(v) for v in own],
        plan=", ".join(f"{stage} {k}: {a}..{b - 1}" for a, b, k, stage in pieces),
        passes_per_iteration=f"{passes:.2f}"
        + " and those of the GAN head" * bool(args.adm)
        + ", 4 in tsm" * bool(args.tsm),
        graph=dict(one_student=1 + bool(args.adm)),
    )

    # ==== same in every script: resume ====
    state = dict(student=student, opt_g=opt_g, ema=ema) | dict(critic=critic, opt_c=opt_c)
    first = run.resume(state)
    it = first - 1
    # ==== end ====
    place = lambda it: next(p for p in pieces if it < p[1])
    if first and (first > args.iters or not torch.equal(critic.place, mark(*place(first - 1)))):
        raise UserError(
            "--resume: the students' turns follow from --iters, --students, --partition, --tsm and --adm: give those of the run's start"
        )

    for it in run.loop(first, args.iters):
        start, end, k, stage = place(it)
        if (
            it == start and run.microstep == 0
        ):  # a new student or stage: all that was trained becomes its average, and what is trained now starts afresh
            before = place(it - 1)[2:] if it else (None, None)
            student.experts = nn.ModuleList(
                ema.model.experts[0 if before[1] == "tsm" else i].copy()
                for i in range(args.students)
            )
            ema.load_state_dict(dict(images=0, model=student.state_dict()))
            critic.fake = (critic.fake if before == (k, "dm") else teacher).copy(args.lora_fake)
            torch.manual_seed(args.seed + k)  # the head starts equal on all processes
            critic.head = head()
            critic.place = mark(*place(it))
            opt_g, opt_c = adam(student, args.lr), adam(critic, args.lr_fake)
            state |= dict(opt_g=opt_g, opt_c=opt_c)
        net, fake = student.experts[k], critic.fake
        if it in (first, start) and run.microstep == 0:
            recompute(net, fake)
            G, C, mine = (
                run.train(net),
                run.train(critic if stage == "adm" else fake),
                own[k].to(run.device),
            )  # before adm, the head has no gradient to wait for
        draw = run.draw(it)
        lr, lr_fake = dict(
            tsm=(args.tsm_lr, 0),
            dm=(args.lr, args.lr_fake),
            adm=(args.adm_lr * args.lr, args.adm_lr * args.lr_fake),
        )[stage]
        run.set_rates(it, (opt_g, lr), (opt_c, lr_fake), span=(start, end))
        noisy = lambda x, i: (
            renoise(x, schedule.alpha(grid[i]), schedule.sigma(grid[i]), draw.randn_like(x)),
            schedule.alpha(grid[i]),
            schedule.sigma(grid[i]),
        )
        turn = stage != "tsm" and it % args.ratio == 0  # of the student; iteration 0 is one
        logs = dict(student=k, stage=STAGES.index(stage))
        if stage != "dm":
            pixels, labels = (images if stage == "tsm" else parts[k]).batch(
                it, args.batch, args.seed, *run.data_shard
            )
            x_real, cond_real = teacher.encode_images(pixels.to(run.device)), teacher.encode(labels)

        if stage == "tsm":
            x_t, alpha, sigma = noisy(x_real, draw.randint(0, N))
            loss = tsm_loss(
                G(x_t, alpha, sigma, cond_real),
                teacher(x_t, alpha, sigma, cond_real),
                teacher.native_loss_weight(alpha, sigma),
            )
            loss.backward()
            logs = dict(tsm=loss, grad_student=run.step(opt_g, args.clip)) | logs
            ema.update(run.images_stepped)
        else:  # the student's sample: one forward pass serves both turns
            cond = teacher.encode(mine[draw.randint(0, len(mine))])
            with torch.set_grad_enabled(turn):
                x = one_step(G if turn else net, schedule, draw.randn(*shape), cond)

        if turn:
            critic.requires_grad_(
                False
            )  # no gradient for its weights, but (9) must reach x through them
            x_t, alpha, sigma = noisy(x.detach(), draw.randint(20, 981))
            g, r, f, w = dm_gradient(x, x_t, alpha, sigma, cond, teacher, fake, args.cfg)
            loss = loss_dm = dm_loss(x, g)
            if stage == "adm":
                loss_gen = gen_loss(critic(*noisy(x, draw.randint(0, N)), cond, logit=True))
                loss = loss + args.gan_weight * loss_gen  # (11)
                logs |= dict(gen=loss_gen)
            loss.backward()
            norm = run.step(opt_g, args.clip)
            ema.update(run.images_stepped)
            critic.requires_grad_(True)
            logs = (
                dict(
                    dm=loss_dm,
                    grad_student=norm,
                    dm_norm=w.mean(),
                    real_gap=(x - r).square().mean(),
                    fake_gap=(x - f).square().mean(),
                )
                | logs
            )

        if stage != "tsm":
            x_t, alpha, sigma = noisy(x := x.detach(), draw.randint(0, N))
            loss = loss_fake = fake_loss(
                C, x, x_t, alpha, sigma, cond, teacher.native_loss_weight(alpha, sigma)
            )
            if stage == "adm":
                i = torch.cat(
                    [draw.randint(0, N), draw.randint(0, N)]
                )  # fake and real in one batch, each with its own time and noise
                eps = torch.cat([draw.randn_like(x), draw.randn_like(x)])
                alpha, sigma = schedule.alpha(grid[i]), schedule.sigma(grid[i])
                x_t, both = (
                    renoise(torch.cat([x, x_real]), alpha, sigma, eps),
                    {key: torch.cat([cond[key], cond_real[key]]) for key in cond},
                )
                logit_fake, logit_real = C(x_t, alpha, sigma, both, logit=True).chunk(2)
                loss_cls = cls_loss(logit_fake, logit_real)
                loss = loss_fake + args.cls_weight * loss_cls  # (11)
                logs |= dict(
                    cls=loss_cls, logit_fake=logit_fake.mean(), logit_real=logit_real.mean()
                )
            loss.backward()
            logs = (
                dict(
                    fake=loss_fake,
                    grad_critic=run.step(opt_c, args.clip),
                    mean=x.mean(),
                    std=x.std(),
                )
                | logs
            )

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
