"""Measures what an iteration of a script costs next to the network passes that it cannot avoid.

    python -m tools.bench dmd2 --teacher mnist            # any flags of the script may follow
    python -m tools.bench dmd2 --teacher sdxl --random-weights          # full size, no download
    torchrun --nproc_per_node=8 -m tools.bench dmd2 --teacher sdxl --random-weights --batch 32 --gan
    python -m tools.bench dmd2 --teacher sdxl --random-weights --tiny --device cpu  # in seconds
    python -m tools.bench dmd2 --vs HEAD~3 --pairs 5      # this tree against a revision, in turns
    python -m tools.bench dmd2 --profile trace.json       # torch's profiler instead

The last line is one JSON object. The script's own main() runs for --iters iterations. Every network
pass in it is recorded by kind: forward; forward + backward; forward + backward to the input only;
forward with a forward-mode derivative ("jvp"); of nct, those with its branch; of sana_sprint, its
heads. After each iteration, one pass of each kind is run bare, that is, the network alone on random
tensors of that size, so that both are measured on the same machine at the same time.

    overhead = time of an iteration / time of its bare passes
    passes: in forwards of one batch; a backward counts two (training/passes.py). The toy's exact
            teacher has no network and does not count

On a machine that others use too, OMP_NUM_THREADS=1 and --processor-time measure seconds of the
processor instead of the clock's.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
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

from common.files import ROOT
from common.model import Model
from controls.controlled import Controlled
from tools import random_teachers
from training.memory import peak_memory
from training.passes import pass_cost
from training.run import Run

WARMUP = 6  # iterations that are not measured: allocation, threads, first-call set-up
PROFILED = 8  # iterations of --profile after them


# ---- kinds of passes -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kind:
    what: str  # "network", "network with branch", "heads 0"
    mode: str  # "forward", "forward+backward", "forward+backward to x", "jvp"
    batch: int
    features: object = False  # True or depths: the pass ends at the feature layers

    def __str__(self):
        what = "" if self.what == "network" else f", {self.what}"
        end = ", to the feature layers" if self.features else ""
        return f"{self.mode}{what}{end}"


def mode_of(params, x, *others):
    """Mode of a pass on x, from what gradients it must keep."""
    for tensor in (x, *others):
        if torch.is_tensor(tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            return "jvp"
    if not torch.is_grad_enabled():
        return "forward"
    if any(p.requires_grad for p in params):
        return "forward+backward"
    return "forward+backward to x" if x.requires_grad else "forward"


@dataclasses.dataclass
class Example:
    """How to repeat a pass bare. make(): new tensors -> function that runs it, to a scalar."""

    make: object
    params: list  # that get a gradient in "forward+backward"


def expanded(cond, batch):
    """The first row of each tensor of `cond`, `batch` times."""
    rows = {}
    for name, value in cond.items():
        rows[name] = value.detach()[:1].expand(batch, *value.shape[1:]).contiguous()
    return rows


def network_example(model, kind, cond):
    """A pass of a Model: the network alone, without the conversion of its output to x0."""
    cond = expanded(cond, kind.batch)
    autocast = model.dtype == torch.bfloat16

    def make():
        x = torch.randn(kind.batch, *model.shape, device=model.device)
        t = torch.rand(kind.batch, device=model.device).clamp(0.01)
        x.requires_grad_(kind.mode == "forward+backward to x")

        def derivative():
            def call(x, t):
                return model.predict(x, t, cond)

            # fused attention has no forward-mode derivative
            with sdpa_kernel(SDPBackend.MATH), model.adding_to_time(model.embed_scalars(cond)):
                _, tangent = torch.func.jvp(call, (x, t), (torch.ones_like(x), torch.ones_like(t)))
            return tangent

        def output():
            if model.sharding:  # weights are gathered by a hook on the model's own call
                alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
                return model(x, alpha, sigma, cond, kind.features)
            with (
                torch.autocast(x.device.type, torch.bfloat16, enabled=autocast),
                model.adding_to_time(model.embed_scalars(cond)),
            ):
                if not kind.features:
                    return model.predict(x, t, cond)
                depths = () if kind.features is True else (kind.features,)
                return model.run_to_features(x, t, cond, *depths)

        if kind.mode == "jvp":
            return derivative
        if kind.features:
            return lambda: output()[-1].float().sum()
        return lambda: output().float().sum()

    # in a jvp the weights get no gradient: the derivative is a training target
    params = [] if kind.mode == "jvp" else [*model.net.parameters(), *model.extras.parameters()]
    return Example(make, params)


def branch_example(model, kind, c, cond):
    """A pass of nct's frozen generator with its trained branch."""
    given = expanded(dict(cond, c=c), kind.batch)
    c = given.pop("c")

    def make():
        x = torch.randn(kind.batch, *model.generator.shape, device=c.device)
        return lambda: model(x, c, given).float().sum()

    return Example(make, list(model.parameters()))


def module_example(module, kind, x):
    """A pass of any other module with one input, such as a GAN head."""
    shape, dtype, device = x.shape, x.dtype, x.device

    def make():
        x = torch.randn(shape, dtype=dtype, device=device)
        x.requires_grad_(kind.mode == "forward+backward to x")
        return lambda: module(x).float().sum()

    return Example(make, list(module.parameters()))


# ---- recording -----------------------------------------------------------------------------------


class Recorder:
    """Of the current iteration: counts {Kind: passes}; samples, a forward pass of one is 1.

    examples: {Kind: Example}.
    """

    def __init__(self):
        self.counts = Counter()
        self.samples = 0
        self.examples = {}
        self.paused = False

    @contextlib.contextmanager
    def pause(self):
        before = self.paused
        self.paused = True
        try:
            yield
        finally:
            self.paused = before

    def clear(self):
        self.counts.clear()
        self.samples = 0

    def note(self, kind, make_example):
        self.counts[kind] += 1
        if kind not in self.examples:
            self.examples[kind] = make_example()

    @contextlib.contextmanager
    def attached(self):
        """Records every pass of a Model, and of nct's generator with its branch."""
        model_forward, controlled_forward = Model.forward, Controlled.forward

        def recorded_model(model, x_t, alpha, sigma, cond, features=False):
            if not self.paused:
                mode = mode_of(model.net.parameters(), x_t, alpha, sigma)
                depths = features if isinstance(features, bool) else tuple(features)
                kind = Kind("network", mode, len(x_t), depths)
                self.note(kind, lambda: network_example(model, kind, cond))
                self.samples += len(x_t) * pass_cost(model.net, [x_t])
            return model_forward(model, x_t, alpha, sigma, cond, features)

        def recorded_controlled(model, z, c, cond):
            if self.paused:
                return controlled_forward(model, z, c, cond)
            kind = Kind("network with branch", mode_of(model.parameters(), z), len(z))
            self.note(kind, lambda: branch_example(model, kind, c, cond))
            self.samples += len(z) * pass_cost(model, [z])
            with self.pause():  # the generator's pass is a part of this one
                return controlled_forward(model, z, c, cond)

        Model.forward, Controlled.forward = recorded_model, recorded_controlled
        try:
            yield
        finally:
            Model.forward, Controlled.forward = model_forward, controlled_forward

    def attach_to_other_modules(self, models):
        """Records the passes of trained modules that hold no Model, such as a list of heads."""
        for name, module in models.items():
            if any(isinstance(m, (Model, Controlled)) for m in module.modules()):
                continue
            parts = module if isinstance(module, torch.nn.ModuleList) else [module]
            for i, part in enumerate(parts):
                part.register_forward_pre_hook(self.hook(f"{name} {i}"))

    def hook(self, what):
        def record(module, args):
            if self.paused:
                return
            x = args[0]
            kind = Kind(what, mode_of(module.parameters(), x), len(x))
            self.note(kind, lambda: module_example(module, kind, x.detach()))

        return record


# ---- measuring -----------------------------------------------------------------------------------


class Bench:
    """Measures the loop of one run. clock(): seconds."""

    def __init__(self, clock):
        self.clock = clock
        self.recorder = Recorder()
        self.seconds = []  # of each measured iteration
        self.counts = []  # {Kind: passes} of each
        self.passes = []  # in forwards of one batch
        self.bare = defaultdict(list)  # {Kind: seconds}
        self.flops = {}  # {Kind: FLOPs}: products of matrices, convolutions, attention
        self.peak = 0

    def now(self, device):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return self.clock()

    def wrap(self, loop):
        """Run.loop, with a measurement of every iteration."""

        def measured_loop(run, first, last, **options):
            run.record["passes_per_iteration"] = None  # counted here, without the bare passes
            self.recorder.attach_to_other_modules(run.models)
            start = None
            for it in loop(run, first, last, **options):
                if start is None:
                    self.recorder.clear()
                    start = self.now(run.device)
                yield it
                if not run.is_last_microstep:
                    continue
                seconds = self.now(run.device) - start
                start = None
                self.peak = max(self.peak, peak_memory(run.device))
                passes = self.recorder.samples / run.args.batch * run.world
                self.after_iteration(run, it, seconds, passes)

        return measured_loop

    def after_iteration(self, run, it, seconds, passes):
        counts = dict(self.recorder.counts)
        with self.recorder.pause():
            for kind in counts:
                example = self.recorder.examples[kind]
                if kind not in self.flops:
                    with FlopCounterMode(display=False) as counter:
                        self.time_bare(example, kind, run.device)
                    self.flops[kind] = counter.get_total_flops()
                bare = self.time_bare(example, kind, run.device)
                if it >= WARMUP:
                    self.bare[kind].append(bare)
        if it >= WARMUP:
            self.seconds.append(seconds)
            self.counts.append(counts)
            self.passes.append(passes)
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(run.device)

    def time_bare(self, example, kind, device):
        """Seconds of one pass. The gradients and flags of its parameters are restored."""
        before = [(p, p.requires_grad, p.grad) for p in example.params]
        for p in example.params:
            p.requires_grad_(kind.mode == "forward+backward")
            p.grad = None
        run = example.make()
        start = self.now(device)
        with torch.set_grad_enabled("backward" in kind.mode):
            out = run()
            if "backward" in kind.mode:
                out.backward()
        seconds = self.now(device) - start
        for p, requires_grad, grad in before:
            p.requires_grad_(requires_grad)
            p.grad = grad
        return seconds

    def per_iteration(self, amounts):
        """Mean over the iterations of the sum of amounts[kind] over their passes."""
        total = 0.0
        for counts in self.counts:
            total += sum(amounts[kind] * n for kind, n in counts.items())
        return total / len(self.counts)

    def result(self, run, script):
        typical = {kind: statistics.median(seconds) for kind, seconds in self.bare.items()}
        # Iterations with the same passes, such as those with a student turn, are represented by
        # their median: other load on the machine drops out.
        alike = defaultdict(list)
        for seconds, counts in zip(self.seconds, self.counts):
            alike[frozenset(counts.items())].append(seconds)
        total = sum(statistics.median(group) * len(group) for group in alike.values())
        iteration = total / len(self.seconds)
        floor = self.per_iteration(typical)
        flops = self.per_iteration(self.flops)  # of this process
        ceiling = random_teachers.matmul_ceiling(run.device, run.dtype)
        return dict(
            script=script,
            teacher=run.args.teacher,
            device=str(run.device),
            threads=torch.get_num_threads(),
            batch=run.args.batch,
            s_per_iteration=round(iteration, 5),
            bare_passes_s=round(floor, 5),
            overhead=round(iteration / floor, 3),
            passes=round(statistics.mean(self.passes), 2),
            images_per_s=four_digits(run.args.batch / iteration),
            peak_mb=round(self.peak / 2**20),
            processes=run.world,
            tflop_per_iteration=four_digits(flops / 1e12),
            tflop_per_s=four_digits(flops / iteration / 1e12),
            of_matmul_ceiling=four_digits(flops / iteration / ceiling),
            iterations=len(self.seconds),
            torch=torch.__version__,
        )

    def print_kinds(self):
        for kind in sorted(self.bare, key=str):
            milliseconds = statistics.median(self.bare[kind]) * 1e3
            n = sum(counts.get(kind, 0) for counts in self.counts) / len(self.counts)
            print(
                f"  {str(kind):44s} batch {kind.batch:5d}  {milliseconds:8.1f} ms"
                f"  x {n:.2f} per iteration"
            )


def four_digits(value):
    return float(f"{value:.4g}")


class Profile:
    """torch's profiler over PROFILED iterations: a table, and a trace for chrome://tracing."""

    def __init__(self, path):
        self.path = path
        self.profiler = torch.profiler.profile(record_shapes=True)

    def wrap(self, loop):
        def profiled_loop(run, first, last, **options):
            for it in loop(run, first, last, **options):
                if it == WARMUP:
                    self.profiler.start()
                yield it
            self.profiler.stop()

        return profiled_loop

    def print(self, device):
        name = "cuda" if device.type == "cuda" else "cpu"
        averages = self.profiler.key_averages()
        print(averages.table(sort_by=f"self_{name}_time_total", row_limit=25))
        self.profiler.export_chrome_trace(self.path)
        print(f"{self.path}: {PROFILED} iterations, for https://ui.perfetto.dev")


# ---- running a script ----------------------------------------------------------------------------


class Measured(Exception):
    """Ends main() after its loop."""


def run_script(script, flags, wrap):
    """main() of a script with its loop wrapped, without what follows the loop. -> its Run"""
    loop = Run.loop

    def finish(run, *last):
        raise Measured(run)

    original_finish = Run.finish
    Run.loop, Run.finish = wrap(loop), finish
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["--sample-every", "0", "--save-every", "0", "--eval-n", "0"]
        sys.argv = [f"{script.__name__}.py", "--out", str(Path(folder) / "run"), *quiet, *flags]
        try:
            script.main()
        except Measured as measured:
            run = measured.args[0]
            if run.stopping:
                sys.exit(128 + run.stopping)
            return run
        finally:
            Run.loop, Run.finish = loop, original_finish


def use_random_weights(script, tiny):
    """Random networks in place of the teacher's, random latents in place of images."""

    def load_teacher(name, device="cpu", dtype=torch.float32, text=None, **loading):
        entry = random_teachers.entry(name, tiny)
        return random_teachers.load(entry, device, dtype, **loading)

    def load_images(path, teacher, say):
        return random_teachers.images(teacher)

    script.load_teacher = load_teacher
    if hasattr(script, "load_images"):
        script.load_images = load_images


def compare(options, flags):
    """This tree and another revision, in turns, so that other load on the machine affects both."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(
            ["git", "worktree", "add", "--quiet", "--detach", tree, options.vs],
            cwd=ROOT,
            check=True,
        )
        try:
            if not (tree / "tools").is_dir():
                sys.exit(f"--vs {options.vs}: expected a revision that has tools/bench.py")
            # both are measured by the bench of this tree
            for name in ("tools/bench.py", "tools/random_teachers.py", "dryrun/networks.json"):
                (tree / name).parent.mkdir(exist_ok=True)  # older revisions have no dryrun/
                (tree / name).write_bytes((ROOT / name).read_bytes())
            pairs = []
            for i in range(options.pairs):
                order = [ROOT, tree] if i % 2 == 0 else [tree, ROOT]
                found = {root: bench_in(root, options, flags) for root in order}
                here, there = found[ROOT], found[tree]
                pairs.append((here, there))
                ratio = here["s_per_iteration"] / there["s_per_iteration"]
                print(
                    f"pair {i + 1}: here {here['s_per_iteration']:.4f} s,"
                    f" {options.vs} {there['s_per_iteration']:.4f} s, ratio {ratio:.3f}",
                    flush=True,
                )
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
    ratios = [here["s_per_iteration"] / there["s_per_iteration"] for here, there in pairs]
    last_here, last_there = pairs[-1]
    return dict(
        script=options.script,
        vs=options.vs,
        seconds_ratio=round(statistics.median(ratios), 3),
        seconds_ratios=sorted(round(ratio, 3) for ratio in ratios),
        overhead=[here["overhead"] for here, _ in pairs],
        overhead_vs=[there["overhead"] for _, there in pairs],
        peak_mb=last_here["peak_mb"],
        peak_mb_vs=last_there["peak_mb"],
        flags=flags,
    )


def bench_in(root, options, flags):
    """Result of this program in another folder."""
    command = [sys.executable, "-m", "tools.bench", options.script, "--iters", str(options.iters)]
    for name in ("processor_time", "random_weights", "tiny"):
        if getattr(options, name):
            command.append("--" + name.replace("_", "-"))
    done = subprocess.run([*command, *flags], cwd=root, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bench of {options.script} in {root} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- command line --------------------------------------------------------------------------------


def parse_args():
    """-> own options, flags of the script."""
    p = argparse.ArgumentParser(
        prog="bench",
        usage="python -m tools.bench SCRIPT [options] [flags of the script]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = p.add_argument
    add("script", metavar="SCRIPT", help="name of a training script, without .py")
    add("--iters", type=int, default=36, help=f"the first {WARMUP} are not measured [36]")
    add("--processor-time", action="store_true", help="seconds of the processor")
    add("--random-weights", action="store_true", help="--teacher sd15, sdxl, sana or sd3, random")
    add("--tiny", action="store_true", help="of --random-weights: a few thousand parameters")
    add("--vs", metavar="REVISION", help="compare with this revision of the repository")
    add("--pairs", type=int, default=3, help="of --vs: measurements of each [3]")
    add("--profile", metavar="FILE", help="write a trace of torch's profiler instead")
    options, flags = p.parse_known_args()
    if options.iters <= WARMUP:
        p.error(f"--iters {options.iters}: expected more than {WARMUP}")
    return options, flags


def main():
    options, flags = parse_args()
    if options.vs:
        print(json.dumps(compare(options, flags)))
        return

    script = importlib.import_module(options.script)
    if options.random_weights:
        use_random_weights(script, options.tiny)
        flags = ["--dtype", "bf16", "--grad-checkpoint", "--batch", "4", *flags]
    try:
        if options.profile:
            profile = Profile(options.profile)
            run = run_script(script, ["--iters", str(WARMUP + PROFILED), *flags], profile.wrap)
            profile.print(run.device)
            return
        bench = Bench(time.process_time if options.processor_time else time.perf_counter)
        with bench.recorder.attached():
            run = run_script(script, ["--iters", str(options.iters), *flags], bench.wrap)
        if run.is_main:
            result = bench.result(run, options.script)
            print(
                f"{options.script} on {run.args.teacher}, {run.device},"
                f" {torch.get_num_threads()} threads, batch {run.args.batch},"
                f" {len(bench.seconds)} iterations"
            )
            bench.print_kinds()
            print(json.dumps(result), flush=True)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
