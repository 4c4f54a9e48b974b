"""What an iteration costs beside the network passes it cannot avoid.

    python -m tools.bench dmd2 --teacher mnist                 # any flags of the script may follow; the last line is one JSON object
    python -m tools.bench dmd2 --teacher toy --iters 200
    python tools/bench.py --teacher sdxl --random-weights      # a full-size network without any download: sd15, sdxl, sana, sd3; bf16, --grad-checkpoint
    torchrun --nproc_per_node=8 tools/bench.py --teacher sdxl --random-weights --batch 32 --gan --shard
    python tools/bench.py --teacher sdxl --random-weights --tiny --device cpu     # the same code in seconds
    python -m tools.bench dmd2 --vs HEAD~3 --pairs 5           # this tree against a revision, in turns; last line: ratios of each pair and their median
    OMP_NUM_THREADS=1 python -m tools.bench dmd2 --processor-time    # on a machine that others use too: seconds of the processor, not of the wall
    python -m tools.bench dmd2 --profile trace.json            # instead: torch's profiler over a few iterations; a table, and a trace for chrome://tracing

The script's own main() runs for --iters iterations. Every network pass in it is recorded by kind (forward; forward + backward; forward + backward
to the input only; forward with a derivative in forward mode, "jvp", in fp32; those of nct with the branch; each with its batch size and whether it
stopped at the feature sites; sana_sprint's heads). Between iterations the same kinds are run bare, i.e. only the network on tensors of that size, so that both see the
same machine at the same time. overhead = time of the loop / sum of its bare passes. passes: in forwards of the
batch size, as counted: a backward to the weights 2, to the input alone 1, a jvp 2 in all; what stops at the feature sites counts whole, heads not at all, and those of
nct's branch are not counted (null).
"""

import importlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common import data
from common.model import Model
from common.run import Run
from controls.controlled import Controlled
from tools import random_teachers

ROOT = Path(__file__).resolve().parent.parent
SKIP = 6  # iterations before the clock starts: allocation, threads, first-call set-up
CLOCK = [time.perf_counter]  # or time.process_time
COST = {"forward": 1, "forward+backward": 3, "forward+backward to x": 2, "jvp": 2}  # in forwards


def kind_of(model, x_t, features):
    if forward_ad._current_level >= 0:
        mode = "jvp"
    elif not torch.is_grad_enabled():
        mode = "forward"
    elif any(p.requires_grad for p in model.net.parameters()):
        mode = "forward+backward"
    else:
        mode = "forward+backward to x" if x_t.requires_grad else "forward"
    return mode, len(x_t), features if isinstance(features, (bool, tuple)) else tuple(features)


def bare(model, kind, cond, sync):
    """Seconds of one pass of this kind on random tensors: the network and nothing else."""
    mode, batch, features = kind
    run = (
        branch
        if isinstance(model, Controlled)
        else heads
        if isinstance(model, torch.nn.ModuleList)
        else network
    )(model, mode, batch, features, cond, sync)
    params = (
        []
        if mode == "jvp"
        else [*model.net.parameters(), *model.extras.parameters()]
        if isinstance(model, Model)
        else list(model.parameters())
    )
    before = [(p, p.requires_grad, p.grad) for p in params]
    for p in params:
        p.requires_grad_(mode != "forward" and not mode.endswith("to x"))
        p.grad = None
    sync()
    start = CLOCK[0]()
    with torch.set_grad_enabled("backward" in mode):
        out = run()
        if "backward" in mode:
            out.backward()
    sync()
    seconds = CLOCK[0]() - start
    for p, need, grad in before:
        p.grad = grad
        p.requires_grad_(need)
    return seconds


def network(model, mode, batch, features, cond, sync):
    """A Model's pass -> function that makes it."""
    x, t = (
        torch.randn(batch, *model.shape, device=sync.device),
        torch.rand(batch, device=sync.device).clamp(0.01),
    )
    cond = {k: v[:1].expand(batch, *v.shape[1:]).contiguous() for k, v in cond.items()}
    x.requires_grad_(mode.endswith("to x"))

    def run():
        if mode == "jvp":  # fused attention has no derivative in forward mode
            with sdpa_kernel(SDPBackend.MATH), model.extended(cond):
                return torch.func.jvp(
                    lambda x, t: model.predict(x, t, cond),
                    (x, t),
                    (torch.ones_like(x), torch.ones_like(t)),
                )[1]
        with (
            torch.autocast(x.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16),
            model.extended(cond),
        ):  # with what a student reads beside t
            if model.sharding:  # what gathers the weights hangs on the model's own call
                out = model(x, model.schedule.alpha(t), model.schedule.sigma(t), cond, features)
            else:
                out = (
                    model.run_to_features(x, t, cond, *[features] * (features is not True))
                    if features
                    else model.predict(x, t, cond)
                )
            return (out[-1] if features else out).float().sum()

    return run


def branch(model, mode, batch, features, cond, sync):
    """nct: a pass of the frozen generator with the trained branch."""
    x, cond = (
        torch.randn(batch, *model.generator.shape, device=sync.device),
        {k: v[:1].expand(batch, *v.shape[1:]).contiguous() for k, v in cond.items()},
    )
    c = cond.pop("c")
    return lambda: model(x, c, cond).float().sum()


def heads(model, mode, batch, features, maps, sync):
    """sana_sprint's discriminator on maps of features."""
    maps = [torch.randn_like(v).requires_grad_(mode.endswith("to x")) for v in maps.values()]
    return lambda: sum(head(h).float().sum() for head, h in zip(model, maps, strict=True))


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

    load_teacher, data.load_images = (
        load_teacher,
        lambda path, teacher, say: random_teachers.images(teacher),
    )
    return [
        "--dtype",
        "bf16",
        "--grad-checkpoint",
        "--batch",
        "4",
        *[f for f in flags if f not in ("--random-weights", "--tiny")],
    ]


def take(argv, flag, default=None):
    """Removes `flag VALUE` -> the value."""
    if flag not in argv:
        return default
    at = argv.index(flag)
    if at + 1 == len(argv):
        raise SystemExit(f"{flag}: expected a value")
    value = argv[at + 1]
    del argv[at : at + 2]
    return value


def versus(script, rev, pairs, argv):
    """This tree and revision `rev`, in turns (which comes first alternates), by this bench; other load on the machine hits both."""

    def once(root):
        done = subprocess.run(
            [sys.executable, "tools/bench.py", script, *argv],
            cwd=root,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"bench of {script} in {root} failed:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    with tempfile.TemporaryDirectory() as folder:
        old, found = os.path.join(folder, "tree"), []
        subprocess.run(
            ["git", "worktree", "add", "--quiet", "--detach", old, rev], cwd=ROOT, check=True
        )
        try:
            for name in ("tools/bench.py", "tools/random_teachers.py", "tools/networks.json"):
                shutil.copy(ROOT / name, os.path.join(old, name))
            for i in range(pairs):
                a, b = (once(ROOT), once(old)) if i % 2 == 0 else reversed([once(old), once(ROOT)])
                found.append((a, b))
                print(
                    f"pair {i + 1}: here {a['s_per_iteration']:.4f} s, {rev} {b['s_per_iteration']:.4f} s, ratio {a['s_per_iteration'] / b['s_per_iteration']:.3f}",
                    flush=True,
                )
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", old], cwd=ROOT, check=True)
    ratios = sorted(round(a["s_per_iteration"] / b["s_per_iteration"], 3) for a, b in found)
    print(
        json.dumps(
            dict(
                script=script,
                vs=rev,
                seconds_ratio=statistics.median(ratios),
                seconds_ratios=ratios,
                overhead=[a["overhead"] for a, _ in found],
                overhead_vs=[b["overhead"] for _, b in found],
                peak_mb=found[-1][0]["peak_mb"],
                peak_mb_vs=found[-1][1]["peak_mb"],
                flags=argv,
            )
        )
    )


def main():
    argv = sys.argv[1:]
    script = argv.pop(0) if argv and not argv[0].startswith("-") else "dmd2"
    if busy := "--processor-time" in argv:
        argv.remove("--processor-time")
        CLOCK[0] = time.process_time
    rev, pairs, trace = take(argv, "--vs"), int(take(argv, "--pairs", 3)), take(argv, "--profile")
    if rev:
        return versus(script, rev, pairs, argv + ["--processor-time"] * busy)
    flags = random_weights(argv) if "--random-weights" in argv else argv
    iters = int(take(flags, "--iters", SKIP + 8 if trace else 36))
    method = importlib.import_module(script)
    counts, cond_seen, example = Counter(), {}, {}
    loop_seconds, bare_seconds, per_iter, peak, work = [], defaultdict(list), [], [0], {}
    forward, loop, controlled, inside = Model.forward, Run.loop, Controlled.forward, [0]

    def counted_heads(net, features):
        mode = "heads, forward+backward" + " to x" * (
            not any(p.requires_grad for p in net.parameters())
        )
        kind = mode, len(features[0]), False
        counts[kind] += 1
        example.setdefault(kind, net)
        cond_seen.setdefault(kind, {i: h.detach() for i, h in enumerate(features)})
        return logits(net, features)

    def counted_branch(self, z, c, cond):
        kind = (
            (
                "forward, with branch"
                if not torch.is_grad_enabled()
                else "forward+backward, with branch"
            ),
            len(z),
            False,
        )
        counts[kind] += 1
        example.setdefault(kind, self)
        cond_seen.setdefault(kind, {k: v.detach() for k, v in cond.items()} | dict(c=c.detach()))
        inside[0] += 1
        try:
            return controlled(self, z, c, cond)
        finally:
            inside[0] -= 1

    def counted(self, x_t, alpha, sigma, cond, features=False):
        if inside[0]:  # a part of what was counted already
            return forward(self, x_t, alpha, sigma, cond, features)
        kind = kind_of(self, x_t, features)
        counts[kind] += 1
        example.setdefault(kind, self)
        cond_seen.setdefault(kind, {k: v.detach() for k, v in cond.items()})
        return forward(self, x_t, alpha, sigma, cond, features)

    def timed_loop(self, first, last):
        sync = (lambda: torch.cuda.synchronize()) if self.device.type == "cuda" else (lambda: None)
        self.bar = tqdm(disable=True)
        wait = type("Sync", (), {"__call__": staticmethod(sync), "device": self.device})()
        profiler = torch.profiler.profile(record_shapes=True) if trace else None
        for it in range(iters):
            counts.clear()
            if trace and it == SKIP:
                profiler.start()
            if trace:
                yield it
                continue
            wait()
            start = CLOCK[0]()
            yield it
            wait()
            seconds, kinds = CLOCK[0]() - start, dict(counts)
            peak[0] = max(peak[0], self.peak_mb())  # of the loop, not of the bare passes
            work.update(
                {
                    kind: flops(example[kind], kind, cond_seen[kind], wait)
                    for kind in kinds
                    if kind not in work
                }
            )
            passes = {kind: bare(example[kind], kind, cond_seen[kind], wait) for kind in kinds}
            if it >= SKIP:
                loop_seconds.append(seconds)
                per_iter.append(kinds)
                for kind, s in passes.items():
                    bare_seconds[kind].append(s)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
        if trace:
            wait()
            profiler.stop()
            print(
                profiler.key_averages().table(
                    sort_by="self_device_time_total"
                    if self.device.type == "cuda"
                    else "self_cpu_time_total",
                    row_limit=25,
                )
            )
            profiler.export_chrome_trace(trace)
            print(
                f"{trace}: {iters - SKIP} iterations, for chrome://tracing or https://ui.perfetto.dev"
            )
            raise SystemExit(0)
        report(self, loop_seconds, bare_seconds, per_iter)
        raise SystemExit(0)

    def report(run, loop_seconds, bare_seconds, per_iter):
        typical = {kind: statistics.median(s) for kind, s in bare_seconds.items()}
        # iterations of one pattern (a student turn, a critic turn) are compared with their own passes, medians of each: other load on the machine drops out
        groups = defaultdict(list)
        for seconds, kinds in zip(loop_seconds, per_iter):
            groups[tuple(sorted(kinds.items(), key=repr))].append(seconds)
        measured = sum(statistics.median(s) * len(s) for s in groups.values()) / len(loop_seconds)
        floor = sum(
            sum(typical[kind] * n for kind, n in pattern) * len(s) for pattern, s in groups.items()
        ) / len(loop_seconds)
        if not run.is_main:
            return
        done = sum(work[kind] * n for kinds in per_iter for kind, n in kinds.items()) / len(
            per_iter
        )  # of one process
        ceiling = random_teachers.matmul_ceiling(run.device, run.dtype)
        print(
            f"{script} on {run.args.teacher}, {run.device}, {torch.get_num_threads()} threads, batch {run.args.batch}, {len(loop_seconds)} iterations"
        )
        passes = 0
        for kind in sorted(typical, key=repr):
            mode, batch, features = kind
            n = sum(kinds.get(kind, 0) for kinds in per_iter) / len(per_iter)
            passes += (
                n
                * batch
                / run.args.batch
                * (0 if mode.startswith("heads") else COST.get(mode, math.nan))
            )
            print(
                f"  {mode + (', to the feature sites' if features else ''):44s} batch {batch:5d}  {typical[kind] * 1e3:8.1f} ms  x {n:.2f} per iteration"
            )
        result = dict(
            script=script,
            teacher=run.args.teacher,
            device=str(run.device),
            threads=torch.get_num_threads(),
            batch=run.args.batch,
            s_per_iteration=round(measured, 5),
            bare_passes_s=round(floor, 5),
            overhead=round(measured / floor, 3),
            passes=None if math.isnan(passes) else round(passes, 2),
            images_per_s=float(f"{run.args.batch / measured:.4g}"),
            peak_mb=round(peak[0]),
            processes=run.world,
            tflop_per_iteration=float(f"{done / 1e12:.4g}"),
            tflop_per_s=float(f"{done / measured / 1e12:.4g}"),
            of_matmul_ceiling=float(f"{done / measured / ceiling:.3g}"),
            iterations=len(loop_seconds),
            torch=torch.__version__,
        )
        print(json.dumps(result), flush=True)

    Model.forward, Run.loop, Controlled.forward = counted, timed_loop, counted_branch
    if logits := getattr(method, "logits", None):
        method.logits = counted_heads
    with tempfile.TemporaryDirectory() as out:
        sys.argv = [
            f"{script}.py",
            "--out",
            os.path.join(out, "run"),
            "--sample-every",
            "0",
            "--save-every",
            "0",
            "--eval-n",
            "0",
            *flags,
        ]
        try:
            method.main()
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
