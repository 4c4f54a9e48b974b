"""Pairs (noise, what the teacher's ODE makes of it), and regression of a one-step student on them: a warm-up before a loop (DMD2, appendix on SDXL).

Pair i depends on (seed, i) only, so any number of processes makes the same ones; they are kept in the run's folder, in parts, and made once.
"""

import hashlib
import json

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from common.errors import RunError, UserError, first_line
from common.files import atomic
from common.rng import PerImageNoise, derive_seed
from common.sampling import generate, teacher_sample

STEPS, PART = 50, 64  # steps of the teacher; pairs in one file


class Pairs:
    """n pairs of a teacher with guidance cfg. Only images are kept, memory-mapped: noise and condition follow from the number of the pair."""

    def __init__(self, run, teacher, n, cfg):
        self.teacher, self.n, self.seed = (
            teacher,
            n,
            derive_seed(run.args.seed, 11) % 2**31,
        )  # not the noise of sample grids and metrics
        what = [
            run.args.teacher,
            teacher.classes if teacher.prompts is None else teacher.prompts,
            list(teacher.shape),
            self.seed,
            n,
            cfg,
            str(run.dtype),
        ]
        folder = run.out / f"pairs-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]}"
        files = [folder / f"{i:06d}.safetensors" for i in range(-(-n // PART))]
        missing = [i for i, file in enumerate(files) if not file.exists()]
        if run.world > 1:
            dist.barrier()  # all have looked before the first one writes
        run.print(
            f"{run.method}: {n} pairs of the teacher, {STEPS} steps, in {folder}"
            + f", {len(missing)} of {len(files)} files to make" * bool(missing)
        )
        sampler = lambda m, z, c, noise: teacher_sample(m, z, c, STEPS, cfg)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for i in tqdm(missing[run.rank :: run.world], desc="pairs", disable=not run.is_main):
                if run.stopping:
                    raise SystemExit(128 + run.stopping)  # the files so far are kept
                parts = generate(
                    sampler, teacher, min(n, (i + 1) * PART), self.seed, run.batch, first=i * PART
                )
                with atomic(files[i]) as f:
                    save_file(dict(x=torch.cat([x.cpu() for _, _, x in parts])), f.name)
            if run.world > 1:
                dist.barrier()
            self.parts = [load_file(file)["x"] for file in files]
            if any(
                part.shape != (min(PART, n - i * PART), *teacher.shape)
                for i, part in enumerate(self.parts)
            ):
                raise OSError("their shapes are others; delete the folder to make them again")
        except (OSError, SafetensorError, KeyError) as e:
            raise RunError(
                f"{folder}: pairs not written or not readable: {first_line(e)}"
            ) from None

    def rows(self, index):
        """index: int64 [B] -> noise [B, *shape], image [B, *shape], cond."""
        x = torch.stack([self.parts[i // PART][i % PART] for i in index.tolist()]).to(index.device)
        z = PerImageNoise(self.seed, index.tolist(), index.device)(*self.teacher.shape)
        return z, x, self.teacher.encode(index % max(self.teacher.classes, 1))


def check(args):
    """Three numbers from --regression PAIRS ITERS LR."""
    if args.regression is None:
        return
    n, iters, lr = args.regression
    if args.nfe != 1 or not (1 <= n < 1e9 and 1 <= iters < 1e9 and 0 < lr < 1e9):
        raise UserError(
            f"--regression {n:g} {iters:g} {lr:g}: expected pairs, iterations and learning rate, above 0, and --nfe 1, found --nfe {args.nfe}"
        )
    args.regression = [min(int(n), 2 * PART), 3, lr] if args.smoke else [int(n), int(iters), lr]


def warm_up(run, teacher, student, predict, n, iters, lr):
    """Regression before the first iteration, counted upwards to 0 in the log: mean (predict(z, cond) - x)^2 over pairs. predict: one step of the student as
    Run.train wraps it. Nothing is saved before the loop saves; a run that is killed here starts the regression anew, on the same pairs."""
    args, pairs = run.args, Pairs(run, teacher, n, run.args.cfg)
    opt = torch.optim.AdamW(
        student.parameters(), lr=lr, betas=args.betas, weight_decay=args.weight_decay, fused=True
    )
    for it in run.loop(0, iters):
        draw = run.draw(it - iters)
        z, x, cond = pairs.rows(draw.randint(0, n))
        loss = F.mse_loss(predict(z, cond), x)
        loss.backward()
        logs = dict(regression=loss, grad_student=run.step(opt, args.clip))
        if it % args.log_every == 0 or it == iters - 1:
            run.log(it - iters, logs)
        if run.stopping:
            raise SystemExit(128 + run.stopping)
    run.last_log = (
        None  # the rate of images starts anew; a weight average forgets its start by itself
    )
