"""Regression of a one-step student on pairs (noise, the sample that the teacher's ODE makes of it).

DMD2 starts its one-step SDXL student like this (appendix of arXiv 2405.14867). The result is a
student of dmd2.py, which training then starts from:

    torchrun --nproc_per_node=8 -m tools.regression --teacher sdxl --step-indices 399
    torchrun --nproc_per_node=8 dmd2.py --teacher sdxl --nfe 1 --step-indices 399 \\
        --start out/regression-sdxl

    L = mean (G(z, t_0, c) - x)^2     x: 50 steps of the teacher from z, with guidance --cfg     (1)

The official code measures LPIPS of decoded images; here it is the squared error of the samples.
Pair i depends on (seed, i) only, so any number of processes makes the same pairs. They are made
once and kept in the run's folder.
"""

import hashlib
import json

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import dmd2
from common.errors import RunError, first_line, launch, require
from common.files import ROOT, atomic
from common.rng import PerImageNoise, derive_seed
from common.sampling import generate, teacher_sample
from common.schedules import initial_noise
from common.teachers.load import load_teacher
from training.ema import EMA
from training.flags import Parser
from training.optim import adamw
from training.plan import describe_steps
from training.report import Report
from training.run import Run

STEPS = 50  # of the teacher
PART = 64  # pairs in one file

SDXL = dict(  # official code of DMD2
    cfg=8.0,
    pairs=10_000,
    lr=1e-5,
    batch=64,
    iters=2_000,
    ema=0,
)
TOY = dict(SDXL, cfg=1.0, pairs=2_000, lr=2e-3, iters=200)
PRESETS = {
    "default": SDXL,
    "toy": TOY,
    "toy-cond": dict(TOY, cfg=2.0),
    "mnist": dict(SDXL, cfg=1.5, pairs=2_000, lr=5e-4, iters=200),
}


def parse_args(argv=None):
    p = Parser(__doc__, few_steps=False, start=False)
    add = p.method.add_argument
    add("--pairs", type=int, help="number of pairs")
    add("--step-indices", metavar="I", help="grid index of the student's step [999]")
    args = p.parse(PRESETS, argv, default_out)
    require(args.pairs >= 1, f"--pairs: expected at least 1, found {args.pairs}")
    args.out = args.out or str(default_out(args))
    return args


def default_out(args):
    return ROOT / "out" / f"regression-{args.teacher.rsplit('/')[-1]}"


class Pairs:
    """n pairs of a teacher with guidance cfg. Only samples are kept in files, memory-mapped; noise
    and condition follow from the number of the pair."""

    def __init__(self, run, teacher, n, cfg):
        self.teacher = teacher
        self.n = n
        # other noise than that of sample grids and metrics
        self.seed = derive_seed(run.args.seed, 11) % 2**31
        prompts = teacher.classes if teacher.prompts is None else teacher.prompts
        key = [run.args.teacher, prompts, list(teacher.shape), self.seed, n, cfg, str(run.dtype)]
        key += [lora.record() for lora in teacher.loras]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
        self.folder = run.out / f"pairs-{name}"
        try:
            self.make(run, cfg)
            run.barrier()
            self.parts = [load_file(path)["x"] for path in self.paths()]
        except (OSError, SafetensorError, KeyError) as e:
            raise self.unreadable(first_line(e)) from None
        if sum(len(part) for part in self.parts) != n:
            raise self.unreadable(f"expected {n} pairs; delete the folder to make them again")

    def unreadable(self, reason):
        return RunError(f"{self.folder}: pairs not written or not readable: {reason}")

    def paths(self):
        return [self.folder / f"{i:06d}.safetensors" for i in range(-(-self.n // PART))]

    def make(self, run, cfg):
        """This process's share of the files that are missing."""
        paths = self.paths()
        missing = [i for i, path in enumerate(paths) if not path.exists()]
        run.barrier()  # all processes have looked before the first one writes
        run.print(f"{self.n} pairs in {self.folder}, {len(missing)} of {len(paths)} files to make")
        self.folder.mkdir(parents=True, exist_ok=True)
        sampler = lambda model, z, cond, noise: teacher_sample(model, z, cond, STEPS, cfg)
        for i in tqdm(missing[run.rank :: run.world], desc="pairs", disable=not run.is_main):
            if run.stopping:
                raise SystemExit(128 + run.stopping)  # the files so far are kept
            end = min(self.n, (i + 1) * PART)
            batches = generate(sampler, self.teacher, end, self.seed, run.batch, first=i * PART)
            x = torch.cat([x.cpu() for _, _, x in batches])
            with atomic(paths[i]) as f:
                save_file(dict(x=x), f.name)

    def rows(self, index):
        """index: int64 [B] -> noise [B, *shape], sample [B, *shape], cond."""
        numbers = index.tolist()
        z = PerImageNoise(self.seed, numbers, index.device)(*self.teacher.shape)
        x = torch.stack([self.parts[i // PART][i % PART] for i in numbers]).to(index.device)
        return z, x, self.teacher.encode(index % max(self.teacher.classes, 1))


def main():
    args = parse_args()
    indices = dmd2.step_indices(1, args.step_indices)
    run = Run(dmd2.__file__, args)  # its students are students of dmd2.py
    teacher = load_teacher(args.teacher, run.device, run.dtype, **run.teacher_kwargs(students=1))
    schedule = teacher.schedule
    t = schedule.grid(dmd2.N)[indices[0]]
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)

    student = teacher.copy(args.lora)
    student_ddp = run.train(student)
    opt_g = adamw(student, args.lr, args)
    ema = EMA(student, args.ema, args.ema_cpu)
    report = Report(run, teacher, ema, dmd2.sample, dict(steps=str(indices[0])))
    facts = dict(steps=describe_steps(schedule, t[None]), pairs=args.pairs)
    run.print_summary(student=student, teacher=teacher, **facts)

    state = dict(student=student, opt_g=opt_g, ema=ema)
    first = run.resume(state)
    pairs = Pairs(run, teacher, args.pairs, args.cfg)
    it = first - 1
    for it in run.loop(first, args.iters, show=["regression"]):
        draw = run.draw(it)
        run.set_rates(it, (opt_g, args.lr))
        z, x, cond = pairs.rows(draw.randint(0, pairs.n))
        prediction = student_ddp(initial_noise(schedule, t, z), alpha, sigma, cond)
        loss = F.mse_loss(prediction, x)  # (1)
        loss.backward()
        logs = dict(regression=loss, grad_student=run.step(opt_g, args.clip))
        ema.update(run.images_stepped)
        run.after(it, logs, state, report)

    run.finish(it, state, report)
    report.end(it + 1)


if __name__ == "__main__":
    launch(main)
