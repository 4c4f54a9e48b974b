"""MSD: Multi-Student Distillation. Song et al., ICML 2025, arXiv 2410.23274.

The conditions of a teacher (its labels) are split among K students. Each is distilled to one step
for its own part only. A sample still costs one pass of one network, which its label chooses, but K
networks share what must be learned. Students never meet: here one is trained after the other, in
one loop, and all processes share each student's batch. Each student goes through distribution
matching (the losses of DMD2), then the same with a GAN term (--adm). Students smaller than their
teacher (--small) start with those of its weights that fit, and with teacher score matching (3),
which is done once for all of them.

Notation: x_t = alpha_t x + sigma_t eps; mu(x_t, t, c) is a network's estimate of the clean x; c is
the label, one of C; w is the guidance scale --cfg; sg[] stops gradients. All times t are indices
into a grid of 1000 noise levels, from data to noise.

    V_k = {c: table[c] = k}                  table[c] = floor(c K / C), the router              (1)
    x = G_k(noise, t = 999, c)               c ~ uniform on V_k                                 (2)
    L_tsm = mean lambda_t (phi(x_t, t, c) - sg[mu_real(x_t, t, c)])^2
                                             x: real images; phi: what all students start from  (3)
    r = mu_real(x_t, t, c), with guidance    f = mu_fake(x_t, t, c), without                    (4)
    g = (f - r) / mean|x - r|                mean over the pixels of a sample; t ~ U{20..980}   (5)
    L_dm = 1/2 mean (x - sg[x - g])^2        so that dL_dm/dx = g / numel(x)                    (6)
    L_fake = mean lambda_t (mu_fake(x_t, t, c) - sg[x])^2     t ~ U{0..999}                     (7)
    l(x) = head(critic features of x_t)      t ~ U{0..999}                                      (8)
    L_gen = mean softplus(-l(x))                                                                (9)
    L_cls = mean softplus(l(sg[x])) + mean softplus(-l(x_real))      x_real: images of V_k     (10)
    student: L_dm + w_G L_gen                critic and head: L_fake + w_D L_cls               (11)

Usage:
    python msd.py                                            # four students, MNIST, on a CPU
    python msd.py --teacher toy-cond                         # 2-D mixture, about a minute
    python msd.py --small num_layers=3 --out out/msd-small   # half of the teacher's layers
    torchrun --nproc_per_node=8 msd.py --teacher DIR         # any teacher with labels, 8 GPUs

Differences from the paper, variants and results: docs/msd.md.
"""

import training.interrupt  # noqa: F401  # isort: skip

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.errors import launch, require
from common.routed import ByLabel
from common.schedules import add_noise, expand, initial_noise, shifted_grid
from common.teachers.load import load_teacher
from common.teachers.students import start_from
from data.images import load_images
from training.ema import EMA
from training.flags import Parser
from training.optim import adamw
from training.plan import describe_steps
from training.report import Report
from training.run import Run

N = 1000  # noise levels of the grid
STAGES = ("tsm", "dm", "adm")

# Presets: the flags for a kind of teacher, unless the command line gives others.
# [P] paper, [D] DMD2's, [O] ours, measured in docs/RESULTS.md. `source` is printed at the start;
# docs/teachers.md has all of them in a table.
IMAGENET64 = dict(  # EDM on ImageNet-64
    students=4,  # [P]
    cfg=1.0,
    lr=2e-6,  # [D]
    lr_fake=2e-6,  # [D]
    betas=(0.9, 0.999),
    ratio=5,  # [D]
    batch=280,  # [D]
    iters=800_000,  # [D] 200,000 for each student
    warmup=500,  # [D]
    cooldown=0.0,
    ema=0,
    shift=1.0,
    tsm_lr=1e-4,  # a guess: EDM's for this network
    adm=0.27,  # [D]
    adm_lr=0.25,  # [D]
    gan_weight=3e-3,  # [D]
    cls_weight=1e-2,  # [D]
    source="[P], rates and GAN [D]",
)
TOY = dict(  # [O], but ratio and GAN weights [D]
    IMAGENET64,
    lr=5e-4,
    lr_fake=5e-4,
    batch=256,
    iters=4000,
    warmup=0,
    tsm_lr=2e-3,
    adm=0.0,
    source="[O]",
)
MNIST = dict(  # [O]
    students=4,
    cfg=1.5,
    lr=1e-3,
    lr_fake=1e-3,
    betas=(0.5, 0.99),
    ratio=3,
    batch=64,
    iters=1600,
    warmup=20,
    cooldown=0.5,
    ema=2000,
    shift=0.3,  # less noise: fewer speckles in the background
    tsm_lr=1e-3,
    adm=0.0,
    adm_lr=0.25,
    gan_weight=0.03,
    cls_weight=0.1,
    source="[O]",
)
EMOJI = dict(MNIST, students=2, cfg=3.5, lr=1e-4, lr_fake=1e-4, batch=32, iters=600, shift=1.0)
SD15 = dict(  # the batch is a quarter of DMD2's, for each of four students
    IMAGENET64,
    cfg=1.75,  # [D]
    lr=1e-5,  # [D]
    lr_fake=1e-5,  # [D]
    ratio=10,  # [D]
    batch=512,
    iters=160_000,  # 40,000 for each student [D]
    gan_weight=1e-3,  # [D]
    source="students [P], the rest [D]",
)
LATENTS = dict(
    IMAGENET64,
    lr=2e-5,
    lr_fake=2e-5,
    batch=512,
    iters=400_000,
    source="nobody's: rates of dmd2's, times 4 students",
)
SDXL = dict(  # published in four steps only
    IMAGENET64,
    cfg=8.0,
    lr=5e-7,
    lr_fake=5e-7,
    batch=128,
    iters=100_000,
    gan_weight=5e-3,
    source="nobody's: dmd2's, in one step",
)
SD3 = dict(
    SDXL,
    cfg=4.0,
    lr=1e-6,
    lr_fake=1e-6,
    batch=64,
    iters=80_000,
)
PRESETS = {
    "default": dict(IMAGENET64, source="nobody's: ImageNet-64's"),
    "toy": dict(TOY, students=1),  # points without labels: nothing to split
    "toy-cond": TOY,
    "mnist": MNIST,
    "emoji": dict(EMOJI, source="nobody's: dmd2's"),
    "emoji-flow": dict(EMOJI, source="nobody's: dmd2's"),
    "own": dict(MNIST, students=2, shift=1.0, source="nobody's: mnist's"),
    "edm-imagenet64": IMAGENET64,
    "dit": LATENTS,
    "sit": LATENTS,
    "sd15": SD15,
    "sd21": dict(SD15, source="nobody's: sd15's"),
    "sdxl": SDXL,
    "sd3": SD3,
    "sana": dict(SD3, cfg=4.5),
    "sana-0.6b": dict(SD3, cfg=4.5),
    "flux": dict(SD3, cfg=1.0),
    "chroma": dict(SD3, cfg=5.0),
    "flux2": dict(SD3, cfg=1.0),
    "flux2-klein": dict(SD3, cfg=4.0),
    "hunyuan-image": dict(SD3, cfg=3.5),
    "lumina2": dict(SD3, cfg=4.0),
    "qwen-image": dict(SD3, cfg=4.0),
    "z-image": dict(SD3, cfg=6.0),
    "wan2.1": dict(SD3, cfg=5.0),
    "wan2.1-14b": dict(SD3, cfg=5.0),
    "wan2.2": dict(SD3, cfg=4.0),
    "wan2.2-5b": dict(SD3, cfg=5.0),
    "sana-video": dict(SD3, cfg=6.0),
    "ltx-video": dict(SD3, cfg=3.0),
    "hunyuanvideo-1.5": dict(SD3, cfg=6.0),
}


def parse_args(argv=None):
    p = Parser(__doc__, critic=True, images=True, few_steps=False, small=True)
    add = p.method.add_argument
    add("--students", type=int, help="K, the number of students that share the labels")
    add("--tsm", type=float, help="share of all iterations for (3) [0.4 with --small, else 0]")
    add("--tsm-lr", type=float, help="learning rate of (3)")
    add("--adm", type=float, help="last share of each student's iterations, with (9) and (10)")
    add("--adm-lr", type=float, help="factor on both learning rates in that share")
    add("--ratio", type=int, help="critic steps per student step")
    add("--shift", type=float, help="factor on sigma / alpha of all levels drawn")
    add("--gan-weight", type=float, help="weight w_G of (9) in (11)")
    add("--cls-weight", type=float, help="weight w_D of (10) in (11)")
    args = p.parse(PRESETS, argv)
    if args.tsm is None:
        args.tsm = 0.4 if args.small else 0.0
    require(args.students >= 1, f"--students: expected at least 1, found {args.students}")
    require(args.ratio >= 1, f"--ratio: expected at least 1, found {args.ratio}")
    require(args.shift > 0, f"--shift: expected a number > 0, found {args.shift}")
    ok = 0 <= args.adm <= 1
    require(ok, f"--adm: expected a share from 0 to 1, found {args.adm:g}")
    ok = 0 <= args.tsm < 1
    require(ok, f"--tsm: expected a share from 0 to below 1, found {args.tsm:g}")
    require(args.tsm_lr >= 0, f"--tsm-lr: expected a number >= 0, found {args.tsm_lr}")
    require(args.adm_lr >= 0, f"--adm-lr: expected a number >= 0, found {args.adm_lr}")
    ok = args.small or not args.tsm
    require(ok, "--tsm: a student of the teacher's size starts as the teacher: add --small")
    unused = args.data and not (args.adm or args.tsm or args.from_image)
    require(not unused, f"--data {args.data}: this run uses no images; add --adm or --small")
    if args.smoke:
        shorten_stages(args)
    ok = args.iters - round(args.tsm * args.iters) >= args.students
    require(
        ok,
        f"--iters {args.iters}: expected one for each of {args.students} students, besides --tsm",
    )
    pieces = plan(args.iters, args.students, args.tsm, args.adm)
    shortest = min(end - first for first, end, *_ in pieces)
    require(
        args.warmup < shortest,
        f"--warmup {args.warmup}: expected less than the {shortest} iterations of the shortest "
        "stage (--iters, --students, --tsm, --adm), which has its own warm-up",
    )
    return args


def shorten_stages(args):
    """--smoke: three iterations of each stage, for each student."""
    both = 0 < args.adm < 1  # without and with (9) and (10)
    args.iters = args.students * (6 if both else 3)
    if both:
        args.adm = 0.5
    if args.tsm:
        args.iters += 3
        args.tsm = 3 / args.iters


def count_conditions(teacher):
    """Number of different conditions that the teacher's labels give; the toy has one for all."""
    classes = max(teacher.classes, 1)
    if teacher.prompts is not None:
        return classes
    return len(teacher.encode(torch.arange(classes))["labels"].unique())


# ---- networks ------------------------------------------------------------------------------------


class Head(nn.Module):
    """GAN head: one logit from one feature map [B, C, H, W], or [B, C] for points."""

    def __init__(self, feature):
        super().__init__()
        c = feature.shape[1]
        if feature.ndim == 2:
            self.layers = nn.Sequential(nn.Linear(c, c), nn.SiLU(), nn.Linear(c, 1))
            return
        layers = []
        side = min(feature.shape[2:])
        while side > 4:  # halve down to 4 x 4
            layers += [nn.Conv2d(c, c, 4, stride=2, padding=1), group_norm(c), nn.SiLU()]
            side //= 2
        layers += [nn.Conv2d(c, c, side, stride=side), group_norm(c), nn.SiLU()]
        layers += [nn.Conv2d(c, 1, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, feature):
        return self.layers(feature.float()).flatten(1)  # [B, 1]


def group_norm(c):
    """Up to 32 groups of at least 4 channels: at 1 x 1, a group of one number would become 0."""
    return nn.GroupNorm(math.gcd(32, max(c // 4, 1), c), c)


class Critic(nn.Module):
    """mu_fake and the head in one module, so that one DDP wrapper averages both gradients."""

    def __init__(self, fake):
        super().__init__()
        self.fake = fake
        self.head = None  # with --gan

    def forward(self, x_t, alpha, sigma, cond, logit=False):
        if logit:
            features = self.fake(x_t, alpha, sigma, cond, features=True)
            return self.head(features[-1])  # (8)
        return self.fake(x_t, alpha, sigma, cond)


# ---- labels and stages ---------------------------------------------------------------------------


def partition(labels, students):
    """The router: table[label] is the student of that label. Parts differ by one at most."""
    return [label * students // labels for label in range(labels)]  # (1)


def plan(iters, students, tsm, adm):
    """What the iterations are for: [(first, end, student, stage)].

    (3) for all, then student by student. Empty stages are left out.
    """
    n = round(tsm * iters)
    pieces = [(0, n, 0, "tsm")]
    for k in range(students):
        first = n + (iters - n) * k // students
        end = n + (iters - n) * (k + 1) // students
        switch = end - round(adm * (end - first))
        pieces += [(first, switch, k, "dm"), (switch, end, k, "adm")]
    return [(first, end, k, stage) for first, end, k, stage in pieces if first < end]


def piece_at(pieces, it):
    """The piece of the plan that iteration `it` belongs to."""
    return next(piece for piece in pieces if it < piece[1])


# ---- one-step sampling ---------------------------------------------------------------------------


def one_step(net, schedule, z, cond):
    """x [B, *shape] in one pass, at the noisiest level. z: unit noise [B, *shape]."""
    t = schedule.grid(1)[0]
    x_in = initial_noise(schedule, t, z)
    return net(x_in, schedule.alpha(t), schedule.sigma(t), cond)  # (2)


@torch.no_grad()
def sample(student, z, cond, nfe, noise):
    """One pass of one student for each sample, found by its label. -> x [B, *shape].

    z: unit noise [B, *shape].
    """
    require(nfe == 1, f"--nfe {nfe}: the students of MSD make a sample in one pass")
    return one_step(student, student.schedule, z, cond)


# ---- losses --------------------------------------------------------------------------------------


def tsm_loss(prediction, target, weight):
    """Teacher score matching. target: the teacher's estimate at the same x_t; weight: lambda_t."""
    error = prediction - target.detach()
    return (expand(weight, error).to(error.dtype) * error.square()).mean()  # (3)


@torch.no_grad()
def dm_gradient(x, x_t, alpha, sigma, cond, real, fake, cfg):
    """g of (5) [B, *shape], without graph; also r, f and the normaliser [B] for the log.

    x: samples of the student. x_t: x with noise at the levels alpha, sigma [B].
    """
    r = real.guided(x_t, alpha, sigma, cond, cfg)  # (4)
    f = fake(x_t, alpha, sigma, cond)  # (4)
    norm = (x - r).abs().flatten(1).mean(1)  # [B]
    safe = norm.where(norm != 0, math.inf)  # 0 / 0 is 0; after a nan, run.step skips the step
    g = (f - r) / safe.view(-1, *[1] * (x.ndim - 1))  # (5)
    return g, r, f, norm


def dm_loss(x, g):
    return 0.5 * F.mse_loss(x, (x - g).detach())  # (6)


def fake_loss(prediction, x, weight):
    """weight: lambda_t [B], which makes this the loss that the teacher was trained with."""
    error = prediction - x.detach()
    return (expand(weight, x).to(x.dtype) * error.square()).mean()  # (7)


def gen_loss(logit_fake):
    return F.softplus(-logit_fake).mean()  # (9)


def cls_loss(logit_fake, logit_real):
    return F.softplus(logit_fake).mean() + F.softplus(-logit_real).mean()  # (10)


# ---- training ------------------------------------------------------------------------------------


def main():
    args = parse_args()
    run = Run(__file__, args)
    load = run.teacher_kwargs(students=args.students, critics=1)
    teacher = load_teacher(args.teacher, run.device, run.dtype, **load)
    schedule = teacher.schedule
    most = count_conditions(teacher)
    require(
        args.students <= most,
        f"--students {args.students}: expected at most {most}, the number of different conditions "
        f"of --teacher {args.teacher}",
    )

    # Labels of each student, and the images with these labels.
    table = partition(max(teacher.classes, 1), args.students)
    own_labels = [(torch.tensor(table) == k).nonzero()[:, 0] for k in range(args.students)]
    images = load_images(args.data, teacher, run.print) if args.tsm or args.adm else None
    own_images = []
    if args.adm:
        own_images = [images.part(v, k, args.students) for k, v in enumerate(own_labels)]
    for v, part in zip(own_labels, own_images):
        found = f"found none of {len(v)} labels from {v[0]} to {v[-1]}"
        require(
            len(part), f"--data: the stage --adm needs images of each student's labels, {found}"
        )

    # Networks: students and critic start as the teacher, or with what fits of its weights if they
    # are smaller; the critic anew for each student. The head starts from scratch.
    students = [teacher.copy(args.lora, args.small) for _ in range(args.students)]
    student = ByLabel(students, table)
    if args.start and not args.resume:
        start_from(args.start, teacher, student, say=run.print)
    if args.grad_checkpoint:
        student.experts[0].checkpoint_activations()  # a network that cannot do it fails here
    critic = Critic(teacher.copy(args.lora_fake, args.small_fake))
    if args.adm:
        zeros = torch.zeros(1, *teacher.shape, device=run.device)
        with torch.no_grad():
            features = critic.fake(zeros, 1.0, 1.0, teacher.encode([0]), features=True)
        torch.manual_seed(args.seed)  # the head starts equal on all processes
        critic.head = run.to_device(Head(features[-1]))
    opt_g = adamw(student, args.lr, args)
    opt_c = adamw(critic, args.lr_fake, args)
    ema = EMA(student, args.ema, args.ema_cpu)
    report = Report(run, teacher, ema, sample, {})
    pieces = plan(args.iters, args.students, args.tsm, args.adm)
    rates = dict(
        tsm=(args.tsm_lr, 0.0),
        dm=(args.lr, args.lr_fake),
        adm=(args.adm_lr * args.lr, args.adm_lr * args.lr_fake),
    )
    labels = ", ".join(str(len(v)) for v in own_labels)
    run.print_summary(
        images,
        student=student.experts[0],
        critic=critic,
        teacher=teacher,
        steps=describe_steps(schedule, schedule.grid(N)[-1:]),
        students=f"{args.students}, one after the other; labels of each: {labels}",
        plan=", ".join(f"{stage} {k}: {a}..{b - 1}" for a, b, k, stage in pieces),
    )

    def mark(piece):
        """What a resume must find: where the plan is, and who has which label."""
        first, _, k, stage = piece
        place = torch.tensor([first, k, STAGES.index(stage), *table])
        return place.to(run.device, non_blocking=True)

    critic.register_buffer("place", mark(pieces[0]))
    state = dict(student=student, opt_g=opt_g, ema=ema, critic=critic, opt_c=opt_c)

    def check_plan(first):
        require(
            torch.equal(critic.place, mark(piece_at(pieces, first - 1))),
            "--resume: the students' turns follow from --iters, --students, --tsm and --adm: "
            "give those of the run's start, or none",
        )

    first = run.resume(state, check=check_plan)
    it = first - 1  # if no iteration is left
    for it in run.loop(first, args.iters, show=["tsm", "dm", "fake"]):
        piece = piece_at(pieces, it)
        start, end, k, stage = piece

        # A new student or stage. What was trained becomes its average, the rest starts afresh.
        if it == start and it > 0 and run.microstep == 0:
            *_, last_k, last_stage = piece_at(pieces, it - 1)
            averaged = ema.model.experts
            if last_stage == "tsm":  # all students start from phi
                averaged = [averaged[0]] * args.students
            student.experts = nn.ModuleList(net.copy() for net in averaged)
            ema.load_state_dict(dict(images=0, model=student.state_dict()))
            goes_on = (last_k, last_stage) == (k, "dm")
            source = critic.fake if goes_on else teacher
            critic.fake = source.copy(args.lora_fake, args.small_fake)
            if args.adm:
                torch.manual_seed(args.seed + k)  # the head starts equal on all processes
                critic.head = run.to_device(Head(features[-1]))
            critic.place = mark(piece)
            opt_g = adamw(student, args.lr, args)
            opt_c = adamw(critic, args.lr_fake, args)
            state |= dict(opt_g=opt_g, opt_c=opt_c)
        if it in (first, start) and run.microstep == 0:
            net = student.experts[k]
            student_ddp = run.train(net)
            # without the GAN term the head has no gradient, for which DDP would wait
            critic_ddp = run.train(critic if stage == "adm" else critic.fake)
            labels = own_labels[k]

        draw = run.draw(it)
        grid = shifted_grid(schedule, N, args.shift)  # of this iteration's size
        lr, lr_fake = rates[stage]
        run.set_rates(it, (opt_g, lr), (opt_c, lr_fake), span=(start, end))
        if stage != "dm":
            source = images if stage == "tsm" else own_images[k]
            x_real, cond_real = source.samples(run, teacher, it)
        logs = {}

        def noised(x, i):
            """x_t, alpha, sigma of x at the levels with grid indices i [B]."""
            alpha, sigma = schedule.alpha(grid[i]), schedule.sigma(grid[i])
            return add_noise(x, alpha, sigma, draw.randn_like(x)), alpha, sigma

        # Teacher score matching, on real images.
        if stage == "tsm":
            x_t, alpha, sigma = noised(x_real, draw.randint(0, N))
            prediction = student_ddp(x_t, alpha, sigma, cond_real)
            target = teacher(x_t, alpha, sigma, cond_real)
            loss = tsm_loss(prediction, target, teacher.native_loss_weight(alpha, sigma))
            loss.backward()
            grad_student = run.step(opt_g, args.clip)  # clip, step, zero the gradients
            logs |= dict(tsm=loss, grad_student=grad_student)
            logs |= dict(student=k, stage=STAGES.index(stage))
            ema.update(run.images_stepped)
            run.after(it, logs, state, report)
            continue

        # Sample of the student. One forward pass serves both turns.
        student_turn = it % args.ratio == 0
        cond = teacher.encode(labels[draw.randint(0, len(labels))])
        z = draw.randn(*teacher.shape)
        if student_turn:
            x = one_step(student_ddp, schedule, z, cond)
        else:
            with torch.no_grad():
                x = one_step(net, schedule, z, cond)

        # Student.
        if student_turn:
            critic.requires_grad_(False)  # not no_grad: (9) must reach x through the critic
            x_t, alpha, sigma = noised(x.detach(), draw.randint(20, 981))
            g, r, f, norm = dm_gradient(x, x_t, alpha, sigma, cond, teacher, critic.fake, args.cfg)
            loss_dm = dm_loss(x, g)
            loss = loss_dm
            if stage == "adm":
                logit = critic(*noised(x, draw.randint(0, N)), cond, logit=True)
                loss_gen = gen_loss(logit)
                loss = loss + args.gan_weight * loss_gen  # (11)
                logs |= dict(gen=loss_gen)
            loss.backward()
            grad_student = run.step(opt_g, args.clip)
            logs |= dict(dm=loss_dm, grad_student=grad_student, dm_norm=norm.mean())
            logs |= dict(real_gap=(x - r).square().mean(), fake_gap=(x - f).square().mean())
            ema.update(run.images_stepped)
            critic.requires_grad_(True)

        # Critic, on the same samples.
        x = x.detach()
        x_t, alpha, sigma = noised(x, draw.randint(0, N))
        weight = teacher.native_loss_weight(alpha, sigma)
        loss_fake = fake_loss(critic_ddp(x_t, alpha, sigma, cond), x, weight)
        loss = loss_fake
        if stage == "adm":  # fake and real in one batch, each with its own level and noise
            i = torch.cat([draw.randint(0, N), draw.randint(0, N)])
            eps = torch.cat([draw.randn_like(x), draw.randn_like(x)])
            alpha, sigma = schedule.alpha(grid[i]), schedule.sigma(grid[i])
            x_t = add_noise(torch.cat([x, x_real]), alpha, sigma, eps)
            both = {name: torch.cat([cond[name], cond_real[name]]) for name in cond}
            logit_fake, logit_real = critic_ddp(x_t, alpha, sigma, both, logit=True).chunk(2)
            loss_cls = cls_loss(logit_fake, logit_real)
            loss = loss + args.cls_weight * loss_cls  # (11)
            logs |= dict(cls=loss_cls, logit_fake=logit_fake.mean(), logit_real=logit_real.mean())
        loss.backward()
        grad_critic = run.step(opt_c, args.clip)
        logs |= dict(fake=loss_fake, grad_critic=grad_critic)
        logs |= dict(mean=x.mean(), std=x.std(), student=k, stage=STAGES.index(stage))

        run.after(it, logs, state, report)

    run.finish(it, state, report)
    report.end(it + 1)


if __name__ == "__main__":
    launch(main)
