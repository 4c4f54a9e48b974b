"""Dry runs beside reality: is the peak of memory the one that --dry-run shows?

    python -m tools.gpu_check                      # on a GPU, networks of full size; ten minutes
    python -m tools.gpu_check --device cpu         # tiny networks, for a machine without a GPU
    python -m tools.gpu_check --match sdxl         # only the cases whose command contains this

Nothing is downloaded: networks have public configurations and random weights. Every case is a dry
run and a few real iterations of the same command, in bf16 on a GPU. There each of the two is a
process of its own, the peak is that of CUDA's allocator, and the dry runs go on beside each other.
A case that does not fit the free memory or the time is named. On a CPU networks are tiny, and the
peak is that of all real tensors (tools/tracker.py). The last case compiles; it has no dry run.

Prints a table; --json FILE writes it. Exit code 1 if a case fails, if weights are not finite after
it, or if a peak differs by more than 10 % (5 % on a CPU).
"""

import argparse
import contextlib
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from common.errors import RunError, UserError, launch
from common.files import ROOT, write_json
from dryrun import ghost
from tools import bench
from tools.tracker import RealMemory

LORA = "--lora 64 --lora-fake 64"
CASES = [  # script and flags, of a dry run and of reality
    "dmd2 --teacher sdxl --gan --grad-checkpoint --batch 1 --ratio 2",
    f"dmd2 --teacher sdxl {LORA} --grad-checkpoint --batch 8 --ratio 2",
    "dmd2 --teacher sd3 --grad-checkpoint --batch 1 --ratio 2",
    "sid --teacher sd15 --batch 2",
    "sana_sprint --teacher sana --grad-checkpoint --batch 1 --H 0",
    f"dmd2 --teacher sana {LORA} --batch 1 --ratio 2 --compile",
]
TINY_CASES = [  # on a CPU. Large batches: else activations would be lost beside weights
    "dmd2 --teacher sd3 --grad-checkpoint --batch 8 --ratio 2",
    "dmd2 --teacher sana --lora 4 --lora-fake 4 --batch 8 --ratio 2",
    "sana_sprint --teacher sana --batch 8 --H 0",
]
SAME = "--nfe 1 --warmup 0 --log-every 1000"  # of all cases
ITERATIONS = 6
WARM = 4  # iterations that are not measured: both kinds of turn, and moments come to be
MINUTES = 9.5


def script_and_flags(case, device):
    """-> module, list of str"""
    name, *own = case.split()
    dtype = "bf16" if is_gpu(device) else "fp32"
    flags = [*own, *SAME.split(), "--iters", str(ITERATIONS), "--dtype", dtype]
    return importlib.import_module(name), flags


def run(case, device, wrap, *further):
    """main() of a case's script for ITERATIONS, its loop wrapped. -> its Run"""
    script, flags = script_and_flags(case, device)
    flags += further
    # A dry run of full size takes the network's configuration from its name, as a user's does.
    with contextlib.ExitStack() as stack:
        if not is_gpu(device) or "--dry-run" not in flags:
            stack.enter_context(restored(script))
            bench.use_random_weights(script, tiny=not is_gpu(device))
        stack.enter_context(restored(sys, "argv"))
        return bench.run_script(script, flags, wrap)


@contextlib.contextmanager
def restored(owner, *names):
    """Attributes of a module are what they were before; without names, what bench replaces."""
    names = names or [n for n in ("load_teacher", "load_images") if hasattr(owner, n)]
    before = {name: getattr(owner, name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def is_gpu(device):
    return device.startswith("cuda")


def dry_run(case, device):
    """-> peak (bytes) of the iterations that are also measured, TFLOP of an iteration, share of
    products in bf16."""
    with tempfile.TemporaryDirectory() as folder, restored(ghost, "BLOCK"):
        if not is_gpu(device):
            ghost.BLOCK = 1  # the tracker does not round up
        try:
            run(case, device, lambda loop: loop, "--dry-run", "--out", folder)
        except SystemExit:  # the end of a dry run
            pass
        finally:
            gc.unfreeze()
            if ghost.GhostDevice.current is not None:
                ghost.GhostDevice.current.__exit__(None, None, None)
        result = json.loads((Path(folder) / "dryrun.json").read_text())
    turns = [turn for turn in result["turns"] if turn["it"] >= WARM]
    bf16 = sum(turn["tflop_by_dtype"].get("bfloat16", 0) for turn in turns)
    return dict(
        peak=max(turn["peak"] for turn in turns),
        tflop=result["tflop_per_iteration"],
        bf16=bf16 / sum(turn["tflop"] for turn in turns),
    )


def real_run(case, device):
    """-> peak (bytes) and mean seconds of iterations, seconds of the first, finite: are weights."""
    tracker = contextlib.nullcontext() if is_gpu(device) else RealMemory()
    found = {}

    def now():
        if is_gpu(device):
            torch.cuda.synchronize()
        return time.perf_counter()

    def wrap(loop):
        def measured(run, first, last, **options):
            start = now()
            for it in loop(run, first, last, **options):
                if it == first + 1:
                    found["first_seconds"] = now() - start  # with --compile, most of it
                if it == WARM:
                    start = now()
                    if is_gpu(device):
                        torch.cuda.reset_peak_memory_stats()
                    else:
                        tracker.restart()
                yield it
            found["seconds"] = (now() - start) / (ITERATIONS - WARM)
            found["peak"] = torch.cuda.max_memory_allocated() if is_gpu(device) else tracker.peak

        return measured

    with tracker:
        done = run(case, device, wrap, "--device", device)
    weights = [p for module in done.models.values() for p in module.parameters()]
    found["finite"] = all(bool(p.isfinite().all()) for p in weights)
    return found


# ---- all cases -----------------------------------------------------------------------------------


def start(half, case, device):
    """dry_run or real_run of a case, in a process of its own. -> Popen"""
    command = [sys.executable, "-m", "tools.gpu_check", "--device", device, "--half", half, case]
    threads = {"OMP_NUM_THREADS": "1"} if half == "dry" else {}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | threads, **pipes)


def result_of(process, end):
    """What it has found. RunError: it fails, or lasts until `end` (of time.monotonic)."""
    try:
        out, err = process.communicate(timeout=max(end - time.monotonic(), 1))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise RunError("no time left") from None
    if process.returncode:
        raise RunError((err.strip() or "failed").splitlines()[-1][:200])
    return json.loads(out.splitlines()[-1])


def check_on_gpu(cases, device, end):
    """Yields a row for each case: the case, both halves, or why one is missing."""
    dry = {case: start("dry", case, device) for case in cases if "--compile" not in case}
    for case in cases:
        row = dict(case=case)
        try:
            if case in dry:
                row["dry"] = result_of(dry[case], end)
                free = torch.cuda.mem_get_info(device)[0]
                if row["dry"]["peak"] > free:
                    raise RunError(f"not run, {free / 2**30:.0f} GB are free")
            row["real"] = result_of(start("real", case, device), end)
        except RunError as error:
            row["why"] = str(error)
        yield row


def check_on_cpu(cases):
    """The same in this process, one after the other."""
    ghost.register()  # before the first backward of this process
    for case in cases:
        yield dict(case=case, dry=dry_run(case, "cpu"), real=real_run(case, "cpu"))


def difference(row):
    """Of the peaks, of that of reality."""
    return row["dry"]["peak"] / row["real"]["peak"] - 1


def is_bad(row, tolerance):
    """Does it end the check with an error?"""
    if "real" not in row or not row["real"]["finite"]:
        return True
    return "dry" in row and abs(difference(row)) > tolerance


def table(rows):
    """Markdown. s: of an iteration."""
    head = ["command", "peak, dry", "peak, real", "difference", "bf16", "TFLOP", "s", "note"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        dry, real = row.get("dry"), row.get("real")
        size = lambda half: f"{half['peak'] / 2**30:.4g} GB" if half else ""
        note = row.get("why", "")
        if real:
            note = f"first iteration {real['first_seconds']:.1f} s"
            note += "" if real["finite"] else ", weights are not finite"
        cells = [row["case"], size(dry), size(real)]
        cells += [f"{100 * difference(row):+.1f} %" if dry and real else ""]
        cells += [f"{100 * dry['bf16']:.0f} %", f"{dry['tflop']:.3g}"] if dry else ["", ""]
        lines.append([*cells, f"{real['seconds']:.3g}" if real else "", note])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main():
    p = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    default = "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("--device", default=default, help=f"[{default}]")
    p.add_argument("--match", metavar="TEXT", default="", help="cases whose command contains this")
    p.add_argument("--minutes", type=float, default=MINUTES, help=f"time for all [{MINUTES}]")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    p.add_argument("--half", nargs=2, help=argparse.SUPPRESS)
    options = p.parse_args()
    if options.half:
        half, case = options.half
        print(json.dumps((dry_run if half == "dry" else real_run)(case, options.device)))
        return

    gpu = is_gpu(options.device)
    cases = [case for case in (CASES if gpu else TINY_CASES) if options.match in case]
    if not cases:
        raise UserError(f"--match {options.match}: expected a part of a command, found none")
    end = time.monotonic() + 60 * options.minutes
    rows = []
    for row in check_on_gpu(cases, options.device, end) if gpu else check_on_cpu(cases):
        rows.append(row)
        print(f"{row['case']}: {row.get('why', 'done')}", flush=True)
    print(table(rows), flush=True)
    if options.json:
        name = torch.cuda.get_device_name(options.device) if gpu else "CPU"
        write_json(options.json, dict(device=name, torch=torch.__version__, rows=rows))
    if any(is_bad(row, 0.1 if gpu else 0.05) for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    launch(main)
