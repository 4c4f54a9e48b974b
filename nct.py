"""NCT: noise consistency training, new controls for a finished one-step generator. Luo, Xue, Hu, Tang, NeurIPS 2025, arXiv 2506.19741.

The generator f makes an image of noise z in one pass. A small branch beside it, a ControlNet, shall make it obey a condition c that it was never told of,
still in one pass. Pairs (z, c) with c = h(f(z)) cost nothing: h is the control, such as an edge detector, and f alone already obeys them. What is missing
are pairs of independent noise and condition. So z is blended into other noise, step by step, under the same c, and the output is asked to stay as it was
one step before: consistency training, in the space of noise. No teacher, no score network, no discriminator, no images.

Notation: f frozen; g(z, c) = f with the branch, equal to f at first; z, eps ~ N(0, I) of the shape of f's input; sg[] stops gradients. What f takes beside
noise, label or prompt, goes along unchanged in every call and is not written.
    z_k = cos(pi t_k / 2) z + sin(pi t_k / 2) eps,   t_k = k / N     unit variance at every k: z_0 = z, z_N = eps. --path linear: sigma = t    (1)
    x = f(z),   c = h(x)                                                                                                                      (2)
    d(a, b) = mean (a - b)^2    or pseudo-Huber  (sqrt(sum (a - b)^2 + a^2) - a) / sqrt(D)  of D elements, a = 0.00054 sqrt(D)                  (3)
    L_con = mean d(g(z_{k+1}, c), sg[g(z_k, c)])                     k ~ U{0..N-1} of each sample, one eps; same weights, no average            (4)
    L_bound = mean d(g(z, c), sg[x])                                 where noise and condition belong together nothing shall change            (5)
    L = w L_con + lambda L_bound                                     one forward of both; the gradient passes through f to the branch          (6)
    lambda <- min(max(lambda + eta (L_bound - xi), 0), lambda_max)   dual ascent on: minimise L_con under L_bound <= xi                        (7)
    image: g(z, c)                                                   z independent of c                                                       (8)
To first order (4) says: constant along the probability flow of p(z_t | c) in noise space. (4) alone is smallest for a g that ignores its noise; (5) holds it.
N = 1 is regression of x on (eps, c): the blurred mean.

Commands (results and times: README and docs/RESULTS.md):
    python dmd2.py && python nct.py --control edges              # soft edges for the one-step student in out/dmd2-mnist, two CPU cores, minutes
    python nct.py --control sr --factor 4                        # super-resolution; also: half, inpaint, canny, depth
    python nct.py --teacher toy --control class                  # after `python dmd2.py --teacher toy`: which mode, for a generator without labels
    torchrun --nproc_per_node=8 nct.py --generator DIR --control depth --control-model ESTIMATOR    # student folder of any script here, or a one-step pipeline

Ablations of the paper: --con-weight 0 (the condition is ignored), --lambda0 0 --eta 0 (no boundary: collapse), --N 1 (blur), --eta 0 (fixed weight).

Differences from the paper, whose code is not public and which gives no N, path, k, d, xi, eta, lambda_0 or length of training:
    - all of these are ours. w = N by default, which divides (4) by the step, so that N does not change the balance with (5); the paper shows no weight.
    - lambda starts at --lambda0 and is bounded: where xi is below what the branch can reach it would grow until the condition is lost.
    - the branch beside a transformer is a copy of its last --blocks blocks whose outputs are added to those of the frozen ones. Its tokens are theirs plus
      the hint, which is not zero at first; the output layers are. ControlNets copy the first blocks; here that lost diversity (docs/nct.md, 4).
    - the branch of an image prompt (--control image, UNets that read a prompt) is an IP-Adapter whose values are zero at first; what the paper
      starts its own from is not given.
"""

import hashlib
import json
import math
import os

import torch
import torch.distributed as dist

from common.ema import EMA
from common.errors import UserError, launch
from common.files import ROOT, write_json
from common.flags import Parser
from common.report import Report, dumps, save_grid
from common.run import Run
from common.schedules import expand
from common.teachers.load import load_teacher
from common.teachers.students import teacher_of
from controls.controlled import hash_model, load_controlled, load_generator, make_controlled
from controls.maps import Control
from controls.measure import control_error, control_rows, control_summary

PRESETS = {  # the flags of a teacher; every one can be overridden. Ours but for rate, betas, batch and average of the last two [P]. toy, mnist: measured
    # (docs/nct.md). lambda starts low, so that control comes first, and grows, since xi is out of reach: then the outputs get sharp
    "mnist": dict(
        cfg=None,
        nfe=1,
        control="edges",
        N=32,
        lr=1e-3,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        clip=10.0,
        batch=32,
        iters=3500,
        warmup=30,
        cooldown=0.5,
        ema=2000,
        lambda0=2.0,
        eta=0.2,
        xi=0.003,
    ),
    "toy": dict(
        cfg=None,
        nfe=1,
        control="class",
        N=16,
        lr=1e-3,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        clip=1.0,
        batch=256,
        iters=2000,
        warmup=0,
        cooldown=0.5,
        ema=0,
        lambda0=1.0,
        eta=0.1,
        xi=0.015,
    ),
    "default": dict(
        cfg=None,
        nfe=1,
        control="edges",
        N=32,
        lr=1e-5,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        clip=1.0,
        batch=128,
        iters=20000,
        warmup=500,
        cooldown=0.0,
        ema=900000,
        lambda0=1.0,
        eta=1.0,
        xi=3e-3,
    ),  # average 0.9999 per step
}
PRESETS["image"] = dict(
    PRESETS["default"], lr=1e-4, drop=0.05
)  # a folder with --control image: rate and empty prompts of the paper's IP-Adapter [P]
PRESETS |= {"toy-cond": PRESETS["toy"], "emoji": dict(PRESETS["mnist"], lr=3e-4, iters=800)}
PRESETS["emoji-flow"] = PRESETS["emoji"]


def parse_args(argv=None):
    p = Parser(__doc__, critic=True, images=True)
    p.model.add_argument(
        "--generator",
        help="finished one-step student, folder of a run; or of a one-step pipeline. Default out/dmd2-<teacher>; its teacher is found there",
    )
    p.model.add_argument(
        "--blocks",
        type=int,
        help="transformer blocks, from the end, that the branch copies; default half of them",
    )
    p.method.add_argument(
        "--control",
        help="h in (2): edges, canny, sr, half, inpaint, depth; image (image prompt); class, for a generator without labels (controls/maps.py)",
    )
    p.method.add_argument("--factor", type=int, default=4, help="of --control sr")
    p.method.add_argument(
        "--control-model",
        help="folder of transformers: depth estimator for --control depth, CLIP vision encoder with projection for image",
    )
    p.method.add_argument(
        "--drop", type=float, default=0.0, help="share of empty prompts; 0.05 with --control image"
    )
    p.method.add_argument("--N", type=int, help="steps from z to eps in (1)")
    p.method.add_argument(
        "--path",
        choices=["trig", "linear"],
        default="trig",
        help="sigma in (1): sin(pi t / 2) or t; alpha follows",
    )
    p.method.add_argument("--distance", choices=["l2", "huber"], default="l2", help="d in (3)")
    p.method.add_argument("--huber", type=float, help="a in (3), default 0.00054 sqrt(D)")
    p.method.add_argument(
        "--con-weight", type=float, help="w in (6), default N; 0: no consistency loss"
    )
    p.method.add_argument("--lambda0", type=float, help="lambda at the start")
    p.method.add_argument("--eta", type=float, help="rate of lambda in (7); 0 keeps it")
    p.method.add_argument("--xi", type=float, help="what L_bound may be")
    p.method.add_argument("--lambda-max", type=float, default=1e3, help="bound of lambda")
    p.set_defaults(teacher=None)
    given = p.parse_known_args(argv)[0]
    found = teacher_of(given.generator) if given.generator else None
    p.set_defaults(teacher=found or "mnist")
    args = p.parse(
        dict(PRESETS, default=PRESETS["image" if given.control == "image" else "default"]), argv
    )
    for wrong, message in (
        (
            args.nfe != 1,
            f"--nfe {args.nfe}: expected 1; the generator makes an image in one pass and so does its controlled form",
        ),
        (args.data, f"--data {args.data}: this method never looks at images"),
        (
            args.lr_fake is not None or args.lora_fake,
            "--lr-fake, --lora-fake: this method has no second network",
        ),
        (
            args.lora or args.shard,
            "--lora, --shard: nothing but the branch is trained here; leave them out",
        ),
        (not 0 <= args.drop <= 1, f"--drop: expected a share from 0 to 1, found {args.drop}"),
        (args.N < 1, f"--N: expected at least 1, found {args.N}"),
        (
            args.huber is not None and args.distance == "l2",
            "--huber: means something only with --distance huber",
        ),
        (
            args.huber is not None and not 0 < args.huber < math.inf,
            f"--huber: expected a number > 0, found {args.huber}",
        ),
        *(
            (
                getattr(args, n) is not None and not 0 <= getattr(args, n) < math.inf,
                f"--{n.replace('_', '-')}: expected a number >= 0, found {getattr(args, n)}",
            )
            for n in ("con_weight", "lambda0", "eta", "xi", "lambda_max")
        ),
        (
            args.lambda0 > args.lambda_max,
            f"--lambda0 {args.lambda0}: expected at most --lambda-max, found {args.lambda_max}",
        ),
    ):
        if wrong:
            raise UserError(message)
    args.con_weight = float(args.N) if args.con_weight is None else args.con_weight
    args.generator = args.generator or str(ROOT / "out" / f"dmd2-{args.teacher}")
    args.out = args.out or str(ROOT / "out" / f"nct-{args.teacher.split('/')[-1]}-{args.control}")
    return args


# ---- networks ---------------------------------------------------------------------------------------------------------------------------
#   generator f        frozen, the student of another run
#   branch             trained, starts without effect (controls/branches.py)
#   student g          both; its parameters are those of the branch


class Multiplier:
    """lambda of (7): a state of the training, the same number on every process. `of`: a number of what is trained, so that a resume with another generator
    or control is refused."""

    def __init__(self, args, device, what):
        self.value, self.seen = torch.tensor(float(args.lambda0), device=device), []
        self.eta, self.xi, self.top, self.of = (
            args.eta,
            args.xi,
            args.lambda_max,
            torch.tensor(int(hashlib.sha256(what.encode()).hexdigest()[:6], 16) / 2**24),
        )

    def update(self, bound, world=1, parts=1):
        """bound: L_bound of this process's part of the batch, 0-d. Nothing happens before all parts were given."""
        self.seen.append(bound.detach().float())
        if len(self.seen) < parts:
            return
        bound, self.seen = torch.stack(self.seen).mean(), []
        if world > 1:
            dist.all_reduce(bound := bound.clone())
            bound = bound / world
        step = (self.eta * (bound - self.xi)).nan_to_num(
            0.0, 0.0, 0.0
        )  # a skipped step leaves lambda alone too
        self.value = (self.value + step).clamp(0, self.top)  # (7)

    def state_dict(self):
        return dict(value=self.value, of=self.of)

    def load_state_dict(self, state):
        if not torch.equal(state["of"], self.of):
            raise ValueError("it was trained for another --control or --generator")
        self.value = state["value"].to(self.value.device)


# ---- helpers ----------------------------------------------------------------------------------------------------------------------------


def blend(z, eps, k, n, path="trig"):
    """z_k for k [B] in 0..n. Exactly z at 0 and eps at n."""
    t = k.double() / n
    alpha, sigma = (
        ((t * math.pi / 2).cos(), (t * math.pi / 2).sin())
        if path == "trig"
        else ((1 - t * t).sqrt(), t)
    )
    alpha = torch.where(k == n, 0.0, alpha)
    return (expand(alpha, z) * z + expand(sigma, z) * eps).to(z.dtype)  # (1)


def twice(cond):
    return {k: torch.cat([v, v]) for k, v in cond.items()}


# ---- losses -----------------------------------------------------------------------------------------------------------------------------


def distance(a, b, kind="l2", huber=None):
    """[B]"""
    square = (a - b).square().flatten(1)
    if kind == "l2":
        return square.mean(1)  # (3)
    root = square.shape[1] ** 0.5
    huber = 0.00054 * root if huber is None else huber
    return ((square.sum(1) + huber**2).sqrt() - huber) / root  # (3)


def pairs(f, control, z, r, cond):
    """Noise of f and the condition of its image belong together."""
    with torch.no_grad():
        x = f(z, cond)
        return x, control(x, r)  # (2)


def losses(g, plain, z, eps, k, x, c, cond, args):
    """[B] each of (4) and (5). g: the network to be trained; plain: the same without its wrapper for several processes."""
    with torch.no_grad():
        target = plain(blend(z, eps, k, args.N, args.path), c, cond)
    far = blend(z, eps, k + 1, args.N, args.path)
    out, bound = g(torch.cat([far, z]), torch.cat([c, c]), twice(cond)).chunk(2)
    con = distance(out, target, args.distance, args.huber)  # (4)
    return con, distance(bound, x, args.distance, args.huber)  # (5)


def total(con, bound, weight, multiplier):
    return weight * con.mean() + multiplier * bound.mean()  # (6)


# ---- sampler ----------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(student, z, cond, nfe=1, noise=None, c=None):
    """z [B, *shape] -> x, one pass. c: the condition; default: that of another sample of the generator, from noise(), which z knows nothing of."""
    if nfe != 1:
        raise UserError(f"--nfe {nfe}: expected 1; a controlled generator has one step")
    c = student.condition(noise(), noise(), cond) if c is None else c
    return student(z, c, cond)  # (8)


def load_student(folder, info, teacher=None):
    """The student in a folder that this script wrote. info: "model" of its distill.json."""
    return load_controlled(folder, info, teacher)


def main():
    args, networks = (
        parse_args(),
        (1, 0, 1),
    )  # students, critics, averages (here the generator): for the estimate of memory
    if not os.path.isdir(args.generator):
        raise UserError(
            f"--generator {args.generator}: expected the folder of a finished one-step run, found none; `python dmd2.py --teacher {args.teacher}` makes one"
        )
    run = Run(__file__, args)
    teacher = load_teacher(args.teacher, run.device, run.dtype, **run.teacher_kwargs(*networks))
    shape = teacher.shape
    generator, info, sampler_f = load_generator(args.generator, teacher, args.teacher)
    generator.dtype = run.dtype
    args.cfg = args.cfg or info.get("cfg") or 1.0  # of the teacher's row in pictures
    control = Control(args.control, generator, teacher, args.factor, args.control_model)
    torch.manual_seed(args.seed)  # the branch starts equal on all processes
    student = make_controlled(generator, info, sampler_f, control, args.blocks)
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
    multiplier = Multiplier(args, run.device, json.dumps([control.config(), hash_model(generator)]))
    report = Report(run, teacher, ema, sample, {})
    share = sum(p.numel() for p in student.parameters()) / sum(
        p.numel() for p in generator.parameters()
    )
    # f 4 forwards, 2 backwards through it; the branch 3 forwards, 2 backwards
    passes = f"{4 + 2 * student.branch.backward_share + 7 * share:.2f}"
    run.print_summary(
        student=student,
        generator=generator,
        teacher=teacher,
        steps="1, from pure noise",
        control=f"{control.config()}",
        consistency=f"N = {args.N}, {args.path}, {args.distance}, weight {args.con_weight:g}",
        boundary=f"lambda {args.lambda0:g} at first, eta {args.eta:g}, xi {args.xi:g}",
        passes_per_iteration=passes,
    )
    run.record["passes_per_iteration"] = passes

    state = dict(student=student, opt_g=opt_g, ema=ema, multiplier=multiplier)
    first = run.resume(state)
    it = first - 1
    for it in run.loop(first, args.iters):
        draw = run.draw(it)
        run.set_rates(it, (opt_g, args.lr))
        cond = teacher.encode(draw.randint(0, max(teacher.classes, 1)))
        if args.drop:
            cond = teacher.drop_condition(cond, draw.rand() < args.drop)
        z, eps, r = draw.randn(*shape), draw.randn(*shape), draw.randn(4)
        x, c = pairs(student.f, control, z, torch.special.ndtr(r), cond)
        con, bound = losses(G, student, z, eps, draw.randint(0, args.N), x, c, cond, args)
        loss = total(con, bound, args.con_weight, multiplier.value)
        loss.backward()
        norm = run.step(opt_g, args.clip)
        multiplier.update(bound.mean(), run.world, args.accumulate)
        ema.update(run.images_stepped)

        logs = dict(
            con=con.mean(),
            bound=bound.mean(),
            multiplier=multiplier.value if run.is_last_microstep else None,
            loss=loss,
            grad_student=norm,
        )

        run.after(it, logs, state, report)

    run.finish(it, state)
    report.end()
    if run.is_main and args.eval_n:
        result = control_error(ema.model, min(args.eval_n, 2000), args.seed)
        write_json(run.out / "control.json", json.loads(dumps(result)))
        run.print(control_summary(result))
        save_grid(run.out / "samples" / "control.png", control_rows(ema.model, args.seed))


if __name__ == "__main__":
    launch(main)
