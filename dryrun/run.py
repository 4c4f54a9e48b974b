"""--dry-run: the script's own loop on a device without memory, and what that shows.

A Run has a DryRun instead of a folder. It enters the device (dryrun/ghost.py), chooses the
iterations of the loop, and ends the process after them with a report and dryrun.json.
"""

import contextlib
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch

from common.errors import RunError
from common.files import format_bytes, write_json
from common.rng import BatchRandom
from dryrun.ghost import NAME, Ghost, GhostDevice
from dryrun.wire import GATHERED, GhostDDP, GhostSharding, Traffic
from training.optim import average_over_processes

# Dense bf16 with fp32 sums, in TFLOP/s, from the makers' data sheets.
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "RTX 4090": 165}
UTILISATION = 0.4  # an assumption: the share of them that training reaches
SHOWN = 8  # lines of source in a list
STEP = 1.002  # the parts are taken again when the peak has grown by this factor


class DryRun:
    """run: the Run, before it has anything but its flags and the method's name."""

    def __init__(self, args, method):
        self.args = args
        self.method = method
        self.gpu = GhostDevice()
        self.gpu.expected = torch.float32 if args.dtype == "fp32" else torch.bfloat16
        self.gpu.__enter__()
        self.started = time.monotonic()
        self.traffic = Traffic(args.processes or 1, self.gpu)
        self.estimate = None  # of the start, bytes by part
        self.state = {}
        self.models = {}
        self.span = None  # first and last + 1 iteration of the stage, by run.set_rates
        self.stepped = []  # networks that were stepped in this iteration
        self.turns = []  # a dict for each iteration
        self.late = False  # in the second half of a stage's iterations
        self.at_peak = None
        self.sampled = 0  # peak when at_peak was taken
        what = "its loop, without weights, numbers and downloads"
        print(f"{method}: dry run of {what}; large networks take minutes", flush=True)

    def init_processes(self, args):
        """As common.distributed.init_processes: one process, on the device without memory."""
        return 0, 1, torch.device(NAME, 0), self.gpu.expected

    # ---- several processes

    def sharding(self, device, dtype, size):
        return GhostSharding(self.traffic, device, dtype, size)

    def data_parallel(self, module):
        return GhostDDP(module, self.traffic) if self.traffic.processes > 1 else module

    def average_gradients(self, grads):
        if self.traffic.processes > 1:
            reduce = lambda flat: self.traffic.all_reduce(flat.numel() * flat.element_size())
            average_over_processes(grads, self.traffic.processes, reduce)

    # ---- what Run tells

    def begin(self, state, models):
        """Before the loop. state: what a checkpoint would hold. models: {name: module}."""
        self.state = state
        self.models = models
        gc.collect()
        gc.freeze()  # what exists stays: later collections need not look at it

    def note_step(self, opt):
        self.stepped.append(self.network_of(opt))

    def random(self, *args):
        """The BatchRandom of an iteration."""
        return DryRandom(*args, late=self.late)

    def network_of(self, opt):
        """Name of the network that an optimiser trains."""
        params = {id(p) for group in opt.param_groups for p in group["params"]}
        for name, module in self.networks():
            if any(id(p) in params for p in module.parameters()):
                return name
        return "other"

    def networks(self):
        """(name, module) of all networks, trained ones first."""
        found = [(k, v) for k, v in self.state.items() if isinstance(v, torch.nn.Module)]
        return found + [(k, v) for k, v in self.models.items() if k not in self.state]

    # ---- the iterations

    def iterations(self, last):
        """Yields the iterations to run, of 0..last-1: in each stage those in which all kinds of
        turns occur, at its start and at its end."""
        self.gpu.memory.on_peak = self.sample_parts
        first = 0
        while first < last:
            self.late = False
            yield from self.measure(first)
            end = self.span[1]  # of this stage, or of the run
            for it in self.turns_of(first, end)[1:]:
                self.late = it > first + 1
                yield from self.measure(it)
            first = end

    def turns_of(self, first, end):
        """Iterations first, first + 1, and the same two of the last cycle of --ratio iterations,
        counted from `first` and from 0: scripts do one or the other."""
        cycle = getattr(self.args, "ratio", None) or 1
        chosen = {first, first + 1}
        for origin in (first, 0):
            begin = origin + (end - 1 - origin) // cycle * cycle
            if cycle > 1 and begin + 1 >= end:
                begin -= cycle
            chosen |= {begin, begin + (cycle > 1)}
        return sorted(it for it in chosen if first <= it < end)

    def measure(self, it):
        """Yields `it` and records what the loop did with it."""
        gpu = self.gpu
        self.stepped = []
        self.at_peak, self.sampled = None, 0
        self.traffic.restart()
        gpu.restart()
        at_rest = gpu.memory.now
        yield it
        seconds = time.monotonic() - self.started
        print(
            f"  {f'iteration {it}':22s} peak {format_bytes(gpu.memory.peak)}, {seconds:.0f} s",
            flush=True,
        )
        gpu.memory.settle()
        parts = self.at_peak["parts"]
        parts["activations"] = gpu.memory.peak - sum(parts.values())
        self.turns.append(
            dict(
                it=it,
                turn=" + ".join(dict.fromkeys(self.stepped)) or "none",
                peak=gpu.memory.peak,
                at_rest=at_rest,
                parts=parts,
                largest=self.at_peak["largest"],
                tflop=gpu.flops / 1e12,
                tflop_by_dtype={str(k)[6:]: n / 1e12 for k, n in gpu.dtypes.items()},
                odd_products=[
                    dict(dtype=str(dtype)[6:], line=line, tflop=n / 1e12)
                    for (dtype, line), n in gpu.odd.most_common(SHOWN)
                ],
                operations=gpu.operations,
                waits=dict(gpu.waits),
                sent=dict(self.traffic.sent),
            )
        )

    # ---- memory by part

    def sample_parts(self, memory):
        """Bytes by part at a peak. Not at each of a slow rise: the parts are those within 0.2 % of
        the peak, and what belongs to none of them, the activations, is the rest."""
        if self.at_peak and memory.now < self.sampled * STEP:
            return
        self.sampled = memory.now
        parts, seen = self.parts()
        by_line = defaultdict(lambda: [0, 0])
        for storage in list(memory.live):
            if id(storage) not in seen:
                entry = by_line[storage.line]
                entry[0] += storage.nbytes
                entry[1] += 1
        largest = sorted(by_line.items(), key=lambda item: -item[1][0])[:SHOWN]
        self.at_peak = dict(
            parts=parts,
            largest=[dict(line=line, bytes=n, tensors=count) for line, (n, count) in largest],
        )

    def parts(self):
        """Bytes of weights, gradients, moments and the average, and the ids of their storages."""
        parts = defaultdict(int)
        seen = set()
        buckets = self.traffic.buckets()

        def add(part, t):
            if isinstance(t, Ghost) and id(t.storage) not in seen:
                seen.add(id(t.storage))
                parts[part] += t.storage.nbytes

        for name, module in self.networks():
            for t in tensors_of(module):
                add(f"weights of {name}", t)
                add(f"gradients of {name}", t.grad)
                add(f"gradients of {name}", buckets.get(id(t)))
        ema = self.state.get("ema")
        if ema is not None and not ema.on_cpu:
            for t in tensors_of(ema.averaged):
                add("average", t)
        for part in self.state.values():
            if isinstance(part, torch.optim.Optimizer):
                name = f"moments of {self.network_of(part)}"
                for moments in part.state.values():
                    for t in moments.values():
                        add(name, t)
        for _, storage in self.traffic.held:
            seen.add(id(storage))
            parts[GATHERED] += storage.nbytes
        return dict(parts), seen

    # ---- the result

    def result(self):
        """All that was measured, as written to dryrun.json."""
        top = max(self.turns, key=lambda turn: turn["peak"])
        return dict(
            method=self.method,
            teacher=self.args.teacher,
            batch=self.args.batch,
            processes=self.traffic.processes,
            accumulate=self.args.accumulate,
            peak=top["peak"],
            at_rest=self.turns[-1]["at_rest"],
            parts=top["parts"],
            estimate=self.estimate,
            tflop_per_iteration=self.mean(lambda turn: turn["tflop"]),
            sent_per_iteration=self.mean(lambda turn: sum(turn["sent"].values())),
            iterations=self.args.iters,
            turns=self.turns,
            seconds=round(time.monotonic() - self.started, 1),
        )

    def mean(self, value):
        """Of an iteration: the rarer kind of turn, which does more, comes once in --ratio."""
        cycle = getattr(self.args, "ratio", None) or 1
        kinds = self.by_kind()
        means = [sum(map(value, turns)) / len(turns) for turns in kinds.values()]
        if len(means) == 2:
            return (max(means) + (cycle - 1) * min(means)) / cycle
        return sum(means) / len(means)

    def by_kind(self):
        kinds = defaultdict(list)
        for turn in self.turns:
            kinds[turn["turn"]].append(turn)
        return kinds

    def end(self, say, out):
        """Prints the report and writes dryrun.json. Ends the process."""
        result = self.result()
        limit = self.args.device_memory
        if limit is not None:
            result |= self.search(limit * 2**30, result)
        for line in describe(result, self.args, self.by_kind()):
            say(line)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "dryrun.json", result)
        say(f"  {'written':22s} {out / 'dryrun.json'}")
        self.gpu.__exit__(None, None, None)
        raise SystemExit(0)

    # ---- other flags, tried

    def search(self, limit, result):
        """The largest --batch whose peak fits in `limit` bytes, and what other flags would do."""
        step = self.traffic.processes * self.args.accumulate
        tries = {self.args.batch // step: result["peak"]}

        def peak(n):
            if n not in tries:
                tries[n] = self.attempt("--batch", n * step)["peak"]
            return tries[n]

        largest = largest_that_fits(peak, limit, self.args.batch // step)
        advice = {}
        if not self.args.grad_checkpoint:
            with contextlib.suppress(RunError):  # not every network offers it
                advice["--grad-checkpoint"] = self.attempt("--grad-checkpoint")["peak"]
        if self.args.ema and not self.args.ema_cpu:
            advice["--ema-cpu"] = result["peak"] - result["parts"].get("average", 0)
        return dict(
            device_memory=limit,
            largest_batch=largest * step,
            peaks_by_batch={n * step: p for n, p in sorted(tries.items())},
            peaks_with=advice,
        )

    def attempt(self, *flags):
        """dryrun.json of this command with further flags, in a process of its own."""
        with tempfile.TemporaryDirectory() as folder:
            argv = without_flag(sys.argv, "--device-memory")
            command = [sys.executable, *argv, *map(str, flags), "--out", folder]
            print(f"  {'trying':22s} {' '.join(map(str, flags))}", flush=True)
            p = subprocess.run(command, capture_output=True, text=True, env=os.environ)
            if p.returncode:
                raise RunError(f"--dry-run {' '.join(map(str, flags))}: {p.stderr.strip()[-300:]}")
            return json.loads((Path(folder) / "dryrun.json").read_text())


def tensors_of(module):
    """Its parameters and buffers, faster than by its own methods, which also make their names."""
    modules, seen = [module], set()
    while modules:
        m = modules.pop()
        if m is None or id(m) in seen:
            continue
        seen.add(id(m))
        yield from (t for t in (*m._parameters.values(), *m._buffers.values()) if t is not None)
        modules += m._modules.values()


def without_flag(argv, name):
    """A command line without a flag and its value."""
    kept = list(argv)
    for i, word in enumerate(argv):
        if word == name:
            return kept[:i] + kept[i + 2 :]
        if word.startswith(f"{name}="):
            return kept[:i] + kept[i + 1 :]
    return kept


def largest_that_fits(peak, limit, start):
    """Largest n with peak(n) <= limit, 0 if 1 does not fit. peak: rising, and expensive to call.

    n is doubled until it does not fit. Between the two, by turns: where the line through both
    reaches `limit`, since the peak is nearly a straight line, and the middle, where it is not.
    Beyond 2^20 nobody needs to know.
    """
    fits, too_large = 0, None
    n, found = start, {}
    while too_large is None or too_large - fits > 1:
        found[n] = peak(n)
        if found[n] <= limit:
            fits = n
        else:
            too_large = n
        if too_large is None:
            n = 2 * n
            if n > 2**20:
                return fits
            continue
        n = (fits + too_large) // 2
        if fits and len(found) % 2:
            share = (limit - found[fits]) / (found[too_large] - found[fits])
            n = math.floor(fits + share * (too_large - fits))
        n = min(max(n, fits + 1), too_large - 1)
    return fits


class DryRandom(BatchRandom):
    """Draws the lowest step index in a stage's first iterations and the highest in its last ones.

    The work of backward simulation is a straight line in the index, so the mean of the two is the
    mean over all of them.
    """

    def __init__(self, *args, late):
        super().__init__(*args)
        self.late = late

    def shared_randint(self, low, high):
        return high - 1 if self.late else low


# ---- the report ----------------------------------------------------------------------------------


def describe(result, args, kinds):
    """Lines of the report."""
    row = lambda name, text: f"  {name:22s} {text}"
    yield f"{result['method']}: dry run, no weights and no numbers; {result['seconds']} s"
    for kind, turns in kinds.items():
        top = max(turns, key=lambda turn: turn["peak"])
        tflop = sum(t["tflop"] for t in turns) / len(turns)
        yield f" turn of {kind}"
        yield row("memory, peak", f"{format_bytes(top['peak'])}: {parts_text(top['parts'])}")
        yield row("memory, at rest", format_bytes(turns[-1]["at_rest"]))
        yield row("work", f"{tflop:.4g} TFLOP: {shares(top['tflop_by_dtype'])}")
        for odd in top["odd_products"]:
            yield row(f"in {odd['dtype']}", f"{odd['tflop']:.3g} TFLOP at {odd['line']}")
        for what, n in turns[-1]["sent"].items():
            yield row("sent by a process", f"{format_bytes(n)}: {what}")
        waits = turns[-1]["waits"]
        yield row("waits of the host", sum(waits.values()) or "none")
        for line, count in list(waits.items())[:SHOWN]:
            yield row("", f"{count} x {line}")
        for entry in top["largest"]:
            size = format_bytes(entry["bytes"])
            yield row("at the peak", f"{size} in {entry['tensors']} tensors of {entry['line']}")
    yield " run"
    yield row("memory, peak", format_bytes(result["peak"]))
    if result["estimate"]:
        total = format_bytes(sum(result["estimate"].values()))
        yield row("estimated at start", f"{total} without activations")
    yield row("work per iteration", f"{result['tflop_per_iteration']:.4g} TFLOP a process")
    if result["sent_per_iteration"]:
        sent = format_bytes(result["sent_per_iteration"])
        yield row("sent per iteration", f"{sent} by each of {result['processes']} processes")
    yield from times(result, args, row)
    if "largest_batch" in result:
        limit = format_bytes(result["device_memory"])
        found = result["largest_batch"] or "none"
        yield row("largest --batch", f"{found} in {limit}")
        for flag, peak in result["peaks_with"].items():
            sizes = f"{format_bytes(peak)} instead of {format_bytes(result['peak'])}"
            yield row("advice", f"{flag}: {sizes}")
    yield row("not shown", "kernels, workspaces and fragmentation of a real device, and its speed")


def parts_text(parts):
    return ", ".join(f"{name} {format_bytes(n)}" for name, n in parts.items() if n)


def shares(by_dtype):
    total = sum(by_dtype.values()) or 1
    return ", ".join(f"{name} {100 * n / total:.0f} %" for name, n in by_dtype.items())


def format_time(seconds):
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def times(result, args, row):
    """Time of the whole run: at --tflops, or at the assumed share of what devices are sold for."""
    total = result["tflop_per_iteration"] * result["iterations"]
    run = f"{result['iterations']:,} iterations of batch {args.batch}"
    if args.tflops:
        time = format_time(total / args.tflops)
        yield row("time", f"{run}: {time} at {args.tflops:g} TFLOP/s (--tflops)")
        return
    speeds = {name: n * UTILISATION for name, n in PEAK_TFLOPS.items()}
    each = ", ".join(f"{name} {format_time(total / n)}" for name, n in speeds.items())
    assumed = f"if {UTILISATION:.0%} of their bf16 peak is reached (assumed)"
    yield row("time", f"{run}: {each}, {assumed}")
