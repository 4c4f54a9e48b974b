"""What an iteration costs beside the network passes it cannot avoid.

    python -m tests.bench dmd2 --teacher mnist                 # any flags of the script may follow; the last line is one JSON object
    python -m tests.bench dmd2 --teacher toy --iters 200
    python tests/bench.py --teacher sdxl --random-weights      # a full-size network without any download: sd15, sdxl, sana, sd3; bf16, --grad-checkpoint
    torchrun --nproc_per_node=8 tests/bench.py --teacher sdxl --random-weights --batch 32 --gan --shard
    python tests/bench.py --teacher sdxl --random-weights --tiny --device cpu     # the same code in seconds

The script's own main() runs for --iters iterations. Every network pass in it is recorded by kind (forward; forward + backward; forward + backward
to the input only; each with its batch size and whether it stopped at the feature sites). Between iterations the same kinds are run bare, i.e. only
the network on tensors of that size, so that both see the same machine at the same time. overhead = time of the loop / sum of its bare passes.
"""
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import random_teachers

from common import data, models
from common.run import Run

SKIP = 6  # iterations before the clock starts: allocation, threads, first-call set-up


def kind_of(model, x_t, features):
    if not torch.is_grad_enabled():
        mode = "forward"
    elif any(p.requires_grad for p in model.net.parameters()):
        mode = "forward+backward"
    else:
        mode = "forward+backward to x" if x_t.requires_grad else "forward"
    return mode, len(x_t), bool(features)


def bare(model, kind, cond, sync):
    """Seconds of one pass of this kind on random tensors: the network and nothing else."""
    mode, batch, features = kind
    x, t = torch.randn(batch, *model.shape, device=sync.device), torch.rand(batch, device=sync.device).clamp(0.01)
    cond = {k: v[:1].expand(batch, *v.shape[1:]).contiguous() for k, v in cond.items()}
    params = list(model.net.parameters())
    trainable = [p.requires_grad for p in params]
    for p in params:
        p.requires_grad_(mode == "forward+backward")
    x.requires_grad_(mode == "forward+backward to x")
    old, run_net = [p.grad for p in params], (model.run_to_sites if features else model.predict)
    if model.sharding:  # what gathers the weights hangs on the model's own call
        run_net = lambda x, t, cond: model(x, model.schedule.alpha(t), model.schedule.sigma(t), cond, features)
    for p in params:
        p.grad = None
    sync()
    start = time.perf_counter()
    with torch.set_grad_enabled(mode != "forward"), torch.autocast(x.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        out = run_net(x, t, cond)
        if mode != "forward":
            (out[-1] if features else out).float().sum().backward()
    sync()
    seconds = time.perf_counter() - start
    for p, grad, need in zip(params, old, trainable):
        p.grad = grad
        p.requires_grad_(need)
    return seconds


def flops(model, kind, cond, sync):
    """FLOPs of one such pass as torch counts them: products of matrices, convolutions, attention, also those that --grad-checkpoint repeats."""
    with FlopCounterMode(display=False) as counter:
        bare(model, kind, cond, sync)
    return counter.get_total_flops()


def random_weights(flags):
    """Puts random networks in the place of load_teacher's and random latents in that of images -> flags of the script."""
    tiny = "--tiny" in flags

    def load_teacher(name, device="cpu", dtype=torch.float32, text=None, **loading):
        return random_teachers.load(random_teachers.entry(name, tiny), device, dtype, **loading)

    models.load_teacher, data.load_images = load_teacher, lambda path, teacher, say: random_teachers.images(teacher)
    return ["--dtype", "bf16", "--grad-checkpoint", "--batch", "4", *[f for f in flags if f not in ("--random-weights", "--tiny")]]


def main():
    argv = sys.argv[1:]
    script = argv.pop(0) if argv and not argv[0].startswith("-") else "dmd2"
    flags = random_weights(argv) if "--random-weights" in argv else argv
    iters = int(flags.pop(flags.index("--iters") + 1)) if "--iters" in flags else 36
    flags = [f for f in flags if f != "--iters"]
    method = importlib.import_module(script)
    counts, cond_seen, example = Counter(), {}, {}
    loop_seconds, bare_seconds, per_iter, peak, work = [], defaultdict(list), [], [0], {}
    forward, loop = models.Model.forward, Run.loop

    def counted(self, x_t, alpha, sigma, cond, features=False):
        kind = kind_of(self, x_t, features)
        counts[kind] += 1
        example.setdefault(kind, self)
        cond_seen.setdefault(kind, {k: v.detach() for k, v in cond.items()})
        return forward(self, x_t, alpha, sigma, cond, features)

    def timed_loop(self, first, last):
        sync = (lambda: torch.cuda.synchronize()) if self.device.type == "cuda" else (lambda: None)
        self.bar = tqdm(disable=True)
        wait = type("Sync", (), {"__call__": staticmethod(sync), "device": self.device})()
        for it in range(iters):
            counts.clear()
            wait()
            start = time.perf_counter()
            yield it
            wait()
            seconds, kinds = time.perf_counter() - start, dict(counts)
            peak[0] = max(peak[0], self.peak_mb())  # of the loop, not of the bare passes
            work.update({kind: flops(example[kind], kind, cond_seen[kind], wait) for kind in kinds if kind not in work})
            passes = {kind: bare(example[kind], kind, cond_seen[kind], wait) for kind in kinds}
            if it >= SKIP:
                loop_seconds.append(seconds)
                per_iter.append(kinds)
                for kind, s in passes.items():
                    bare_seconds[kind].append(s)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
        report(self, loop_seconds, bare_seconds, per_iter)
        raise SystemExit(0)

    def report(run, loop_seconds, bare_seconds, per_iter):
        typical = {kind: statistics.median(s) for kind, s in bare_seconds.items()}
        # iterations of one pattern (a student turn, a critic turn) are compared with their own passes, medians of each: other load on the machine drops out
        groups = defaultdict(list)
        for seconds, kinds in zip(loop_seconds, per_iter):
            groups[tuple(sorted(kinds.items()))].append(seconds)
        measured = sum(statistics.median(s) * len(s) for s in groups.values()) / len(loop_seconds)
        floor = sum(sum(typical[kind] * n for kind, n in pattern) * len(s) for pattern, s in groups.items()) / len(loop_seconds)
        if not run.main:
            return
        done = sum(work[kind] * n for kinds in per_iter for kind, n in kinds.items()) / len(per_iter)  # of one process
        ceiling = random_teachers.matmul_ceiling(run.device, run.dtype)
        print(f"{script} on {run.args.teacher}, {run.device}, {torch.get_num_threads()} threads, batch {run.args.batch}, {len(loop_seconds)} iterations")
        for kind in sorted(typical):
            mode, batch, features = kind
            n = sum(kinds.get(kind, 0) for kinds in per_iter) / len(per_iter)
            print(f"  {mode + (', to the feature sites' if features else ''):44s} batch {batch:5d}  {typical[kind] * 1e3:8.1f} ms  x {n:.2f} per iteration")
        result = dict(script=script, teacher=run.args.teacher, device=str(run.device), threads=torch.get_num_threads(), batch=run.args.batch,
                      s_per_iteration=round(measured, 5), bare_passes_s=round(floor, 5), overhead=round(measured / floor, 3),
                      images_per_s=float(f"{run.args.batch / measured:.4g}"), peak_mb=round(peak[0]), processes=run.world,
                      tflop_per_iteration=float(f"{done / 1e12:.4g}"), tflop_per_s=float(f"{done / measured / 1e12:.4g}"),
                      of_matmul_ceiling=float(f"{done / measured / ceiling:.3g}"), iterations=len(loop_seconds), torch=torch.__version__)
        print(json.dumps(result), flush=True)

    models.Model.forward, Run.loop = counted, timed_loop
    with tempfile.TemporaryDirectory() as out:
        sys.argv = [f"{script}.py", "--out", os.path.join(out, "run"), "--sample-every", "0", "--save-every", "0", "--eval-n", "0", *flags]
        try:
            method.main()
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
