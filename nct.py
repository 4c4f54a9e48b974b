"""NCT: Noise Consistency Training. Luo, Xue, Hu, Tang, NeurIPS 2025, arXiv 2506.19741.

A finished one-step generator f makes an image of noise z in one pass. A small branch, a ControlNet,
is trained to make it follow a condition c that it was never trained with, still in one pass. Pairs
(z, c) with c = h(f(z)) cost nothing: h is the control, such as an edge detector, and f alone
already follows them. What is missing are pairs of independent noise and condition. So z is blended
into other noise, step by step, under the same c, and the output must stay what it was one step
before: consistency training in the space of noise. It needs no teacher, critic, discriminator or
images.

Notation: f is frozen; g(z, c) is f with the branch, equal to f at first; z, eps ~ N(0, I); sg[]
stops gradients. What f takes besides noise (label or prompt) is the same in every call and is not
written. D is the number of elements of an image.

    z_k = cos(pi t_k / 2) z + sin(pi t_k / 2) eps
                                             t_k = k / N, so that z_0 = z and z_N = eps          (1)
    x = f(z)                                 c = h(x)                                            (2)
    d(a, b) = mean (a - b)^2                 or pseudo-Huber: (sqrt(|a - b|^2 + h^2) - h) / sqrt(D)
                                             with h = 0.00054 sqrt(D)                            (3)
    L_con = mean d(g(z_{k+1}, c), sg[g(z_k, c)])      k ~ U{0..N-1} of each sample               (4)
    L_bound = mean d(g(z, c), sg[x])         where z and c belong together, nothing changes      (5)
    L = w L_con + lambda L_bound             the gradient passes through f to the branch         (6)
    lambda <- clamp(lambda + eta (L_bound - xi), 0, lambda_max)
                                             dual ascent: minimise L_con under L_bound <= xi     (7)
    image: g(z, c)                           z independent of c                                  (8)

To first order (4) says: constant along the probability flow of p(z_t | c) in the space of noise.
(4) alone is smallest for a g that ignores its noise, which (5) prevents. N = 1 is regression of x
on (eps, c): the blurred mean.

Usage:
    python dmd2.py && python nct.py --control edges          # soft edges, MNIST, minutes on a CPU
    python nct.py --control sr --factor 4                    # also half, inpaint, canny, depth
    python nct.py --teacher toy --control class              # after python dmd2.py --teacher toy
    torchrun --nproc_per_node=8 nct.py --generator DIR --control edges       # any one-step student

Differences from the paper, variants and results: docs/nct.md.
"""

import training.interrupt  # noqa: F401  # isort: skip

import hashlib
import json
import math
import os

import torch
import torch.distributed as dist

from common.errors import launch, require
from common.files import ROOT, write_json
from common.schedules import add_noise
from common.teachers.load import load_teacher
from common.teachers.sizes import sizes_of
from common.teachers.students import teacher_of
from controls.controlled import hash_model, load_controlled, load_generator, make_controlled
from controls.maps import Control
from controls.measure import control_error, control_rows, control_summary
from training.ema import EMA
from training.flags import Parser, flag_name
from training.optim import adamw
from training.report import Report, dumps, save_grid
from training.run import Run

# Presets: the flags for a kind of teacher, unless the command line gives others.
# [P] paper, [O] ours: the paper gives no N, k, d, w, lambda or length of training. `source` is
# printed at the start; docs/teachers.md has all of them in a table.
FOLDER = dict(
    cfg=None,  # of the teacher's row in pictures: the generator's
    control="edges",
    N=32,  # [O]
    lambda0=1.0,  # [O]
    eta=1.0,  # [O]
    xi=3e-3,  # [O]
    lr=1e-5,  # [P]
    betas=(0.9, 0.95),  # [P]
    weight_decay=0.0,
    clip=1.0,
    batch=128,  # [P]
    iters=20_000,
    warmup=500,
    cooldown=0.0,
    ema=900_000,  # [P] 0.9999 per step
    source="rates and batch [P], the rest nobody's",
)
IMAGE_PROMPT = dict(FOLDER, lr=1e-4, drop=0.05)  # the paper's IP-Adapter [P]
TOY = dict(  # [O]
    FOLDER,
    control="class",
    N=16,
    eta=0.1,
    xi=0.015,
    lr=1e-3,
    batch=256,
    iters=2000,
    warmup=0,
    cooldown=0.5,
    ema=0,
    source="[O]",
)
MNIST = dict(  # [O]
    FOLDER,
    lambda0=2.0,  # low at first, so that control comes first
    eta=0.2,
    xi=0.003,  # out of reach, so that lambda grows and outputs get sharp
    lr=1e-3,
    clip=10.0,
    batch=32,
    iters=3500,
    warmup=30,
    cooldown=0.5,
    ema=2000,
    source="[O]",
)
EMOJI = dict(MNIST, lr=3e-4, iters=800)  # [O]
PRESETS = {
    "default": dict(FOLDER, source="nobody's: sd15's"),
    "toy": TOY,
    "toy-cond": TOY,
    "mnist": MNIST,
    "emoji": EMOJI,
    "emoji-flow": dict(EMOJI, source="nobody's: emoji's"),
    "own": dict(MNIST, source="nobody's: mnist's"),
    "sd15": FOLDER,
}


def parse_args(argv=None):
    p = Parser(__doc__, few_steps=False, lora=False, start=False)
    p.model.add_argument("--generator", metavar="DIR", help="one-step student [out/dmd2-<teacher>]")
    p.model.add_argument(
        "--blocks", type=int, help="last transformer blocks that are copied [half]"
    )
    add = p.method.add_argument
    add(
        "--control", metavar="NAME", help="h in (2): edges, canny, sr, half, ... (controls/maps.py)"
    )
    add("--factor", type=int, default=4, help="factor of --control sr")
    add("--control-model", metavar="DIR", help="transformers model for --control depth, image")
    add("--drop", type=float, default=0.0, help="share of empty prompts")
    add("--N", type=int, help="steps from z to eps in (1)")
    add("--distance", choices=["l2", "huber"], default="l2", help="d in (3)")
    add("--con-weight", type=float, help="weight w of (4) in (6); 0: no consistency loss [N]")
    add("--lambda0", type=float, help="lambda of (6) at the start")
    add("--eta", type=float, help="rate of lambda in (7); 0 keeps it")
    add("--xi", type=float, help="bound of L_bound in (7)")
    add("--lambda-max", type=float, default=1e3, help="bound of lambda in (7)")

    # the generator knows its teacher
    p.set_defaults(teacher=None)
    given, _ = p.parse_known_args(argv)
    found = teacher_of(given.generator) if given.generator else None
    p.set_defaults(teacher=found or "mnist")
    presets = PRESETS
    if given.control == "image":
        presets = dict(PRESETS, default=IMAGE_PROMPT, sd15=IMAGE_PROMPT)
    args = p.parse(presets, argv, default_out)

    require(0 <= args.drop <= 1, f"--drop: expected a share from 0 to 1, found {args.drop}")
    require(args.N >= 1, f"--N: expected at least 1, found {args.N}")
    for name in ("con_weight", "lambda0", "eta", "xi", "lambda_max"):
        value = getattr(args, name)
        ok = value is None or 0 <= value < math.inf
        require(ok, f"{flag_name(name)}: expected a number >= 0, found {value}")
    ok = args.lambda0 <= args.lambda_max
    found = f"found {args.lambda_max}"
    require(ok, f"--lambda0 {args.lambda0}: expected at most --lambda-max, {found}")
    if args.con_weight is None:
        args.con_weight = float(args.N)
    args.generator = args.generator or str(ROOT / "out" / f"dmd2-{args.teacher}")
    args.out = args.out or str(default_out(args))
    return args


def default_out(args):
    return ROOT / "out" / f"nct-{args.teacher.split('/')[-1]}-{args.control}"


# ---- lambda --------------------------------------------------------------------------------------


class Multiplier:
    """lambda of (7), the same number on every process.

    what: text that identifies what is trained, so that a resume with another generator or control
    is refused.
    """

    def __init__(self, args, device, what):
        self.value = torch.tensor(float(args.lambda0), device=device)
        self.eta = args.eta
        self.xi = args.xi
        self.largest = args.lambda_max
        self.bounds = []  # L_bound of the microsteps so far
        fingerprint = int(hashlib.sha256(what.encode()).hexdigest()[:6], 16)
        self.of = torch.tensor(fingerprint / 2**24)

    def update(self, bound, world=1, parts=1):
        """bound: L_bound of one microstep of this process, 0-d. lambda moves after all `parts`."""
        self.bounds.append(bound.detach().float())
        if len(self.bounds) < parts:
            return
        bound = torch.stack(self.bounds).mean()
        self.bounds = []
        if world > 1:
            bound = bound.clone()
            dist.all_reduce(bound)
            bound = bound / world
        step = self.eta * (bound - self.xi)
        step = step.nan_to_num(0.0, 0.0, 0.0)  # the optimiser skips this step, and lambda too
        self.value = (self.value + step).clamp(0, self.largest)  # (7)

    def state_dict(self):
        return dict(value=self.value, of=self.of)

    def load_state_dict(self, state):
        if not torch.equal(state["of"], self.of):
            raise ValueError("it was trained for another --control or --generator")
        self.value = state["value"].to(self.value.device)


# ---- one-step sampling ---------------------------------------------------------------------------


def blend(z, eps, k, n):
    """z_k [B, *shape] for k [B] in 0..n: exactly z at 0 and eps at n."""
    t = k.double() / n
    alpha = (t * math.pi / 2).cos()
    alpha = torch.where(k == n, 0.0, alpha)
    sigma = (t * math.pi / 2).sin()
    return add_noise(z, alpha, sigma, eps)  # (1)


@torch.no_grad()
def sample(student, z, cond, nfe=1, noise=None, c=None):
    """One pass. z: unit noise [B, *shape] -> x [B, *shape].

    c: the condition; default: the condition of another sample of the generator, made from noise(),
    which is independent of z.
    """
    require(nfe == 1, f"--nfe {nfe}: expected 1; a controlled generator has one step")
    if c is None:
        c = student.condition(noise(), noise(), cond)
    return student(z, c, cond)  # (8)


def load_student(folder, info, teacher=None):
    """The student in a folder that this script wrote. info: "model" of its distill.json."""
    return load_controlled(folder, info, teacher)


# ---- losses --------------------------------------------------------------------------------------


def distance(a, b, kind="l2"):
    """d of (3) for each sample, [B]. a, b: [B, *shape]."""
    square = (a - b).square().flatten(1)
    if kind == "l2":
        return square.mean(1)  # (3)
    root = square.shape[1] ** 0.5
    h = 0.00054 * root
    return ((square.sum(1) + h**2).sqrt() - h) / root  # (3)


@torch.no_grad()
def matching_pairs(f, control, z, r, cond):
    """x and the condition c that belongs to z. r: uniform numbers [B, 4] for random controls."""
    x = f(z, cond)
    return x, control(x, r)  # (2)


def consistency_losses(student_ddp, student, z, eps, k, x, c, cond, N, kind):
    """(4) and (5) for each sample, [B] each. student_ddp is called where gradients flow."""
    with torch.no_grad():
        target = student(blend(z, eps, k, N), c, cond)
    # one forward pass for both losses
    z_both = torch.cat([blend(z, eps, k + 1, N), z])
    cond_both = {name: torch.cat([v, v]) for name, v in cond.items()}
    out, at_z = student_ddp(z_both, torch.cat([c, c]), cond_both).chunk(2)
    con = distance(out, target, kind)  # (4)
    bound = distance(at_z, x, kind)  # (5)
    return con, bound


def total_loss(con, bound, weight, multiplier):
    return weight * con.mean() + multiplier * bound.mean()  # (6)


# ---- training ------------------------------------------------------------------------------------


def main():
    args = parse_args()
    require(
        os.path.isdir(args.generator),
        f"--generator {args.generator}: expected the folder of a finished one-step run, "
        f"found none; `python dmd2.py --teacher {args.teacher}` makes one",
    )
    sizes = sizes_of(args.size)
    require(len(sizes) < 2, f"--size: expected one size, that of --generator, found {len(sizes)}")
    run = Run(__file__, args)
    load = run.teacher_kwargs(students=1, averages=1)  # averages: the generator
    teacher = load_teacher(args.teacher, run.device, run.dtype, **load)
    shape = teacher.shape

    # Networks: the generator is frozen; the branch is trained and starts without effect.
    generator, info, generator_sample = load_generator(args.generator, teacher, args.teacher)
    generator.dtype = run.dtype
    args.cfg = args.cfg or info.get("cfg") or 1.0
    control = Control(args.control, generator, teacher, args.factor, args.control_model)
    torch.manual_seed(args.seed)  # the branch starts equal on all processes
    student = make_controlled(generator, info, generator_sample, control, args.blocks)
    if args.grad_checkpoint:
        student.checkpoint_activations()
    student_ddp = run.train(student)  # DDP around it; for passes that train weights
    opt_g = adamw(student, args.lr, args)
    ema = EMA(student, args.ema, args.ema_cpu)
    what = json.dumps([control.config(), hash_model(generator)])
    multiplier = Multiplier(args, run.device, what)
    report = Report(run, teacher, ema, sample, {})
    run.print_summary(
        student=student,
        generator=generator,
        teacher=teacher,
        steps="1, from pure noise",
        control=control.config(),
        losses=(
            f"N = {args.N}, {args.distance}, weight {args.con_weight:g}; "
            f"lambda {args.lambda0:g} at first, eta {args.eta:g}, xi {args.xi:g}"
        ),
    )

    state = dict(student=student, opt_g=opt_g, ema=ema, multiplier=multiplier)
    first = run.resume(state)
    it = first - 1  # if no iteration is left
    for it in run.loop(first, args.iters, show=["loss"]):
        draw = run.draw(it)
        run.set_rates(it, (opt_g, args.lr))
        cond = teacher.random_cond(draw)
        if args.drop:
            cond = teacher.drop_condition(cond, draw.rand() < args.drop)

        z, eps = draw.randn(*shape), draw.randn(*shape)
        r = torch.special.ndtr(draw.randn(4))
        k = draw.randint(0, args.N)
        x, c = matching_pairs(student.f, control, z, r, cond)
        con, bound = consistency_losses(
            student_ddp, student, z, eps, k, x, c, cond, args.N, args.distance
        )
        loss = total_loss(con, bound, args.con_weight, multiplier.value)
        loss.backward()
        logs = dict(con=con.mean(), bound=bound.mean(), loss=loss)
        grad_student = run.step(opt_g, args.clip)  # clip, step, zero the gradients
        logs |= dict(grad_student=grad_student)
        multiplier.update(bound.mean(), run.world, args.accumulate)
        if run.is_last_microstep:
            logs |= dict(multiplier=multiplier.value)
        ema.update(run.images_stepped)

        run.after(it, logs, state, report)

    run.finish(it, state, report)
    report.end(it + 1)
    if run.is_main and args.eval_n:
        result = control_error(ema.model, min(args.eval_n, 2000), args.seed)
        write_json(run.out / "control.json", json.loads(dumps(result)))
        run.print(control_summary(result))
        save_grid(run.out / "samples" / "control.png", control_rows(ema.model, args.seed))


if __name__ == "__main__":
    launch(main)
