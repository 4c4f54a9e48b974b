"""One run: this process's share of the batch, optimiser steps, log, checkpoints.

There is no trainer here. A script's `main` is one flat loop, and `Run` is what that loop needs and
no method is about. Nothing in this file knows a method.
"""

import os
import signal
import sys
import time
import warnings
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.checkpoint import (
    EVALUATED,
    check_header,
    list_checkpoints,
    load_state,
    misfits,
    read_counters,
    read_newest,
    read_values,
    write_checkpoint,
)
from common.distributed import bar_interval, init_processes, on_rank0
from common.errors import Interrupted, RunError, UserError, first_line, require
from common.files import format_bytes, require_writable, sync
from common.model import Model
from common.rng import BatchRandom, derive_seed
from common.routed import Routed
from common.teachers.students import read_student
from common.teachers.teacher_lora import read_teacher_loras
from data.image_folder import existing_folder
from training.alarm import FIGURES, Alarms
from training.folder import (
    RunFolder,
    changed_flags,
    default_folder,
    describe_changes,
    read_starts,
    starts_until,
)
from training.log import Log
from training.memory import (
    describe_bytes,
    estimate_memory,
    free_memory,
    keep_heap,
    parameter_bytes,
    peak_memory,
    refuse_if_too_large,
)
from training.optim import average_over_processes, clipped_step, rate_factor
from training.passes import PassCounter
from training.plan import describe_run, is_unguided_by_mistake

# What Ctrl-C, a closed terminal, Slurm, Kubernetes, systemd and other schedulers send. Not every
# system has all of them.
STOP_SIGNALS = ("SIGINT", "SIGHUP", "SIGTERM", "SIGUSR1", "SIGUSR2")
PASSED_ON = 5  # seconds within which torchrun passes on a signal that a process has got already

MAX_BAD_STEPS = 20  # steps in a row with a gradient that is not finite before the run gives up
CYCLES_COUNTED = 10  # network passes are counted in this many cycles of --ratio iterations


class Run:
    """script: path of the method's script, whose name is the method's name. args: of Parser.parse.

    rank, world, is_main (rank 0); device; dtype of network passes; out, the folder; batch, samples
    of one microstep in this process.

    --accumulate N: the loop visits every iteration N times, with one part of the batch each time.
    Backward passes sum gradients. What happens once per iteration waits for the last part: `step`,
    the average (`images_stepped` is 0 before), all-reduces, the log, pictures and checkpoints.
    """

    def __init__(self, script, args):
        self.method = Path(script).stem
        self.args = args
        check_batch(args)
        if args.deterministic:
            set_deterministic()
        check_places(args)
        self.out = Path(args.out or default_folder(script, args.teacher))
        self.dry = None
        if args.dry_run:
            require_writable("--out", self.out)
            from dryrun.run import DryRun  # takes a second to import

            self.dry = DryRun(args, self.method)
        init = self.dry.init_processes if self.dry else init_processes
        self.rank, self.world, self.device, self.dtype = init(args)
        self.is_main = self.rank == 0
        if self.device.type == "cpu":
            keep_heap()
        self.shares = (args.processes or self.world) * args.accumulate  # parts of a batch
        self.batch = args.batch // self.shares
        self.to_device = self._placement()

        self.start_time = time.monotonic()
        self.past_seconds = 0.0  # of the run before it was resumed
        self.outside_loop = "before the first iteration"  # "": in the loop
        self.stopping = 0  # signal that asked the run to stop
        self.stopping_since = 0.0
        self.microstep = 0
        self.skipped = 0  # steps left out because a gradient was not finite
        self.bad_steps = {}  # such steps in a row, by optimiser
        self.saved = 0  # iterations in the newest checkpoint
        self.rates = {}  # learning rates of this iteration, by their names in the log
        self.show = ()  # names of the values that the progress bar shows
        self.shown = {}  # what it shows
        self.first = 0  # iteration of this start's first step
        self.past_images = 0  # images before that
        self.ddp_modules = weakref.WeakSet()
        self.models = weakref.WeakValueDictionary()  # a script may replace a network
        self.counter = None  # of network passes, in the first iterations
        self.loras = read_teacher_loras(args.teacher_lora)
        self.record = {}  # facts for the student's distill.json
        self.plan = {}  # lines of print_summary
        self.sizes = None  # of the teacher, if --size has several

        self.log_file = Log(self.out / "log.jsonl", self.world)
        self.alarms = Alarms(args)
        self.figures = {}  # of the newest pictures, for the next line of the log
        self.folder = RunFolder(self.out, args.resume, args.overwrite)
        if self.dry is None:
            on_rank0(self.folder.open)
            self.folder.after_open()
        for signum in stop_signals():
            signal.signal(signum, self._on_signal)

    # ---- this process's share of an iteration

    @property
    def data_shard(self):
        """(index, count) of the current microbatch among those of all processes."""
        index = self.rank * self.args.accumulate + self.microstep
        return index, self.shares

    @property
    def is_last_microstep(self):
        return self.microstep == self.args.accumulate - 1

    @property
    def images_stepped(self):
        """Images of the optimiser step that this microstep ends with; 0 before the last one."""
        return self.args.batch if self.is_last_microstep else 0

    def images_before(self, it):
        """Images of all iterations before `it`, also of those before a resume changed --batch."""
        return self.past_images + (it - self.first) * self.args.batch

    def draw(self, it):
        """Random numbers of iteration `it`. Also seeds torch's global generator (dropout), and
        draws the size of the iteration's samples where --size has several."""
        torch.manual_seed(derive_seed(self.args.seed, it, 4, self.data_shard[0]))
        kind = BatchRandom if self.dry is None else self.dry.random
        draw = kind(self.args.seed, it, self.args.batch, *self.data_shard, self.device)
        if self.sizes:
            self.sizes.draw(draw)
        return draw

    def barrier(self):
        """Waits for all processes."""
        if self.world > 1:
            dist.barrier()

    def print(self, *text):
        if self.is_main:
            tqdm.write(" ".join(map(str, text)), file=sys.stdout)  # above the progress bar
            sys.stdout.flush()

    def warn(self, text):
        if self.is_main:
            tqdm.write(f"{self.method}: {text}", file=sys.stderr)

    @property
    def seconds(self):
        """Of the whole run, with the time before it was resumed."""
        return self.past_seconds + time.monotonic() - self.start_time

    # ---- teacher and networks

    def _placement(self):
        """Function that puts a module on the device: with --shard, spread over the processes."""
        if self.args.shard:
            if self.dry:
                return self.dry.sharding(self.device, self.dtype, self.args.shard_size)
            from training.shard import Sharding  # takes a second to import

            return Sharding(self.device, self.dtype, self.args.shard_size)
        device = self.device  # not self: a run that refers to itself would keep its lock
        return lambda module: module.to(device)

    def teacher_kwargs(self, students=1, critics=0, averages=0, single=False):
        """What load_teacher takes next to name, device and dtype.

        The numbers are for the memory estimate, see `estimate_memory`.
        """

        def check_memory(**sizes):
            world = self.args.processes or self.world
            parts = estimate_memory(self.args, world, sizes, students, critics, averages, single)
            if self.dry:
                self.dry.estimate = parts
                return
            free = free_memory(self.device, self.world)
            total = sum(parts.values())
            needed = f"{format_bytes(total)} and activations, {format_bytes(free)} free"
            self.print(f"  {'memory, estimated':22s} {needed}")
            refuse_if_too_large(self.args, total, free, self.device)

        return dict(text=self.prompt_kwargs(), place=self.to_device, budget=check_memory)

    def prompt_kwargs(self):
        """What load_pipeline takes for a text-to-image teacher."""
        args = self.args
        return dict(
            prompts=args.prompts,
            negative=args.negative_prompt,
            cache=args.cache_prompts,
            size=args.size,
            frames=args.frames,
            guidance=args.embedded_guidance,
            data=args.data,
            loras=self.loras or None,
            say=self.print,
        )

    def train(self, module, ddp=True):
        """The module to call where gradients flow: compiled with --compile, in DDP if there are
        several processes. With --shard the networks average their gradients themselves.

        ddp=False: the script averages the gradients, see `average_gradients`.
        """
        if self.args.grad_checkpoint:
            for model in module.modules():
                if isinstance(model, Model):
                    model.checkpoint_activations()
        if self.args.shard:
            return module
        if self.dry:
            return self.dry.data_parallel(module) if ddp else module
        if self.args.compile:
            module = torch.compile(module)
        if self.world == 1 or not ddp:
            return module
        # Without device_ids, since DDP would then move inputs that are on the host for a reason.
        # An iteration may have no sample for one of the experts.
        some_unused = any(isinstance(m, Routed) for m in module.modules())
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers, and 2.6 only knows the old name
            warnings.simplefilter("ignore", FutureWarning)
            ddp = torch.nn.parallel.DistributedDataParallel(
                module,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=some_unused,
            )
        self.ddp_modules.add(ddp)
        return ddp

    def print_summary(self, images=None, **facts):
        """Prints what follows from the flags, before the first step. images: of the losses, if any.

        facts: networks (printed as numbers of parameters), and lines by name.
        """
        args = self.args
        teacher = facts.get("teacher")
        if args.cfg not in (None, 1) and teacher is not None:
            teacher.null(1)  # UserError from a teacher without a null condition
        networks = {k: v for k, v in facts.items() if isinstance(v, torch.nn.Module)}
        others = {k: v for k, v in facts.items() if k not in networks}
        self.models |= networks
        self.sizes = getattr(teacher, "sizes", None)
        if self.sizes:
            self.sizes.use(0)
        trained = {name: count_trained(net) for name, net in networks.items()}
        self.record = dict(
            images=len(images or ()), networks={name: n for name, n in trained.items() if n}
        )
        self.plan = describe_run(self, images, networks, others)
        if self.dry:
            return
        memory = describe_bytes(parameter_bytes(self.models), free_memory(self.device, self.world))

        passes = str(self.dtype).removeprefix("torch.")
        self.print(f"{self.method}: teacher {args.teacher}, device {self.device}, {passes} passes")
        for name, text in self.plan.items():
            self.print(f"  {name:22s} {text}")
        self.print(f"  {'memory, networks':22s} {memory}")
        self.print(f"  {'folder':22s} {self.out}")
        if is_unguided_by_mistake(args, teacher):
            self.warn(
                f"--teacher {args.teacher} takes text and is not guided (w = 1), so its images are "
                "poor; give --cfg W, or --cfg 1 if that is meant"
            )

    # ---- optimiser steps

    def set_rates(self, it, *pairs, span=None):
        """Learning rates of iteration `it`, with --warmup and --cooldown.

        pairs: (optimiser, lr), at first the student's. span: first and last + 1 iteration of the
        stage that `it` belongs to, for a run whose stages each have a warm-up and a cooldown;
        default: the whole run.
        """
        first, end = span or (0, self.args.iters)
        if self.dry:
            self.dry.span = first, end
        factor = rate_factor(it, first, end, self.args.warmup, self.args.cooldown)
        for name, (opt, lr) in zip(("lr", "lr_fake"), pairs):
            self.rates[name] = lr * factor
            for group in opt.param_groups:
                group["lr"] = lr * factor

    def average_gradients(self, params):
        """Gradients become their means over the processes.

        For networks that were called without DDP, whose hooks do not support forward-mode
        derivatives. Call it between backward and `step`, on all processes, which must have
        gradients for the same parameters.
        """
        grads = [p.grad for p in params if p.grad is not None]
        # gradients of sharded networks are means already
        if not self.is_last_microstep or not grads or self.args.shard:
            return
        if self.dry:
            self.dry.average_gradients(grads)
        elif self.world > 1:
            average_over_processes(grads, self.world)

    def step(self, opt, clip):
        """One optimiser step, see `clipped_step`. A step that is skipped because its gradient is
        not finite is counted. Returns the gradient norm, or None before the last microstep."""
        if not self.is_last_microstep:
            return None
        if self.dry:
            self.dry.note_step(opt)
        spread = self.args.shard and not self.dry
        norm, bad = clipped_step(opt, clip, self.args.accumulate, spread)
        # in a row, by network: a healthy critic must not hide a broken student
        self.bad_steps[id(opt)] = (self.bad_steps.get(id(opt), 0) + bad) * bad
        self.skipped = self.skipped + bad
        return norm

    # ---- loop

    def loop(self, first, last, show=()):
        """Iterations first..last-1, each --accumulate times, with a progress bar.

        show: names of logged values for the bar, at first the student's loss. After one of
        STOP_SIGNALS the loop ends early, at the same iteration on all processes.
        """
        if self.dry:
            for it in self.dry.iterations(last):
                for microstep in range(self.args.accumulate):
                    self.microstep = microstep
                    self.dry.traffic.is_last_microstep = self.is_last_microstep
                    yield it
            self.dry.end(self.print, self.out)
        self.outside_loop = ""
        self.show = show
        self.counter = PassCounter(self.models) if self._counts_passes() else None
        cycle = getattr(self.args, "ratio", None) or 1
        self.bar = progress_bar(first, last, self.method, disable=not self.is_main)
        for it in self.bar:
            for microstep in range(self.args.accumulate):
                self.microstep = microstep
                for module in self.ddp_modules:
                    module.require_backward_grad_sync = self.is_last_microstep
                yield it
            done = it + 1 - first
            if self.counter and (done == CYCLES_COUNTED * cycle or it + 1 == last):
                self._report_passes(self.counter, done)
                self.counter = None
            if self._agree_to_stop():
                break
        self.bar.close()

    def _counts_passes(self):
        # a hook would break the graph of a compiled network
        return not self.args.compile and "passes_per_iteration" not in self.record

    def _report_passes(self, counter, iterations):
        """Network passes per iteration and sample, and the peak of memory, in the first cycles."""
        counter.remove()
        samples = iterations * self.batch * self.args.accumulate
        passes = {name: n / samples for name, n in counter.samples.items() if n}
        total = round(sum(passes.values()), 2)
        self.record["passes_per_iteration"] = total
        if self.is_main:
            each = ", ".join(f"{name} {n:.2f}" for name, n in passes.items())
            peak = peak_memory(self.device) / 2**20
            text = f"{total:.2f}: {each}; a backward counts two"
            if counter.left_out:
                text += f"; without {', '.join(counter.left_out)}"
            self.print(f"  {'passes per iteration':22s} {text}")
            self.print(f"  {'memory, peak':22s} {peak:.0f} MB so far")

    def after(self, it, logs, state, report):
        """What follows each iteration when it is due: log, pictures, evaluation, checkpoint."""
        if self.dry:  # an iteration that nothing is due after
            self.log_file.add(it, logs)
            return
        args = self.args
        self.log(it, logs)
        if self.sizes:  # pictures, metrics and the student's folder are of the first size
            self.sizes.use(0)
        if self.counter:  # sampling for pictures and metrics is not part of an iteration
            self.counter.paused = True
        if self.due(it, args.sample_every) or self.is_first_picture(it):
            report.pictures(it + 1)
        is_best = False
        if self.due(it, args.eval_every):
            is_best = report.evaluate(it + 1, n=EVALUATED)
        if self.counter:
            self.counter.paused = False
        if is_best or self.due(it, args.save_every):
            self.save(it, state, report)

    def due(self, it, every):
        """Whether a multiple of `every` iterations is complete after iteration `it`; 0: never."""
        return bool(every) and self.is_last_microstep and (it + 1) % every == 0

    def is_first_picture(self, it):
        """After the first iteration too: what is wrong with the samples shows at once."""
        return bool(self.args.sample_every) and self.is_last_microstep and it == 0

    def log(self, it, values):
        """Values {name: float, 0-d tensor or None}. Every --log-every iterations a line of
        log.jsonl with the means of the newest values: those of turns that the iteration of the line
        does not have are of the last such turn since the line before.

        The only place of the loop where the host waits for the device.
        """
        self.log_file.add(it, values)
        if it % self.args.log_every or not self.is_last_microstep:
            return
        means = self.log_file.take()
        self._give_up_if_broken(it)
        if not self.is_main:
            return
        images = self.images_before(it + 1)
        peak_mb = round(peak_memory(self.device) / 2**20)
        counts = (it, images, int(self.skipped))
        values = means | self.figures
        self.figures = {}
        rate = self.log_file.write(
            *counts, self.rates, values, self.seconds, peak_mb, self._read_for_alarms
        )
        # values of an earlier line stay until there are newer ones
        self.shown |= {name: f"{means[name]:.3g}" for name in self.show if name in means}
        if rate is not None:
            self.shown["img/s"] = rate
        in_order = {name: self.shown[name] for name in [*self.show, "img/s"] if name in self.shown}
        self.bar.set_postfix(in_order, refresh=False)

    def note_pictures(self, figures):
        """Figures of the newest pictures, which the next line of the log has."""
        self.figures = figures

    def _read_for_alarms(self, line):
        """Alarms that are on after a line of the log; what turns one on is said once."""
        for name, text in self.alarms.update(line):
            self.warn(f"alarm {name!r}: {text} (docs/alarms.md)")
        return list(self.alarms.on)

    def repeat_alarms(self):
        """At the end: the alarms that are still on."""
        if self.alarms.on:
            on = ", ".join(f"{name} since {it}" for name, it in self.alarms.on.items())
            self.warn(f"alarms still on at the end: {on} (docs/alarms.md)")

    def _give_up_if_broken(self, it):
        bad = max((int(n) for n in self.bad_steps.values()), default=0)
        if bad >= MAX_BAD_STEPS:
            newest = self.checkpoints()[-1] if self.checkpoints() else "none"
            raise RunError(
                f"the gradient was not finite in {bad} steps in a row (iteration {it}); "
                f"last checkpoint: {newest}"
            )

    # ---- signals

    def _on_signal(self, signum, frame):
        name = signal.Signals(signum).name
        if self.outside_loop:
            todo = "go on with --resume" if self.checkpoints() else "there is nothing to save"
            raise Interrupted(signum, f"stopped by {name} {self.outside_loop}; {todo}")
        now = time.monotonic()
        if not self.stopping:
            self.stopping = signum
            self.stopping_since = now
            return
        # A second signal does not wait for the checkpoint. Two things are no second signal: what
        # torchrun passes on although every process got it, and another kind, since schedulers
        # announce the end with one and send SIGTERM then.
        passed_on = "TORCHELASTIC_RUN_ID" in os.environ and now < self.stopping_since + PASSED_ON
        if signum in (self.stopping, signal.SIGINT) and not passed_on:
            raise Interrupted(
                signum, f"ended at once by a second {name}; the last checkpoint is intact"
            )

    def _agree_to_stop(self):
        if self.world > 1:
            signum = torch.tensor(int(self.stopping))
            dist.all_reduce(signum, op=dist.ReduceOp.MAX)  # on the host (gloo)
            self.stopping = int(signum)
        return bool(self.stopping)

    # ---- checkpoints

    def checkpoints(self):
        """Paths of this run's checkpoints, the oldest first."""
        return list_checkpoints(self.out)

    def _header(self):
        """What a resume must have in common with the checkpoint."""
        teacher = Path(self.args.teacher).name
        loras = [spec for spec in (self.args.lora, self.args.lora_fake) if spec]
        if loras:  # alpha shows in no tensor's shape
            alphas = ", ".join(f"{spec['alpha']:g}" for spec in loras)
            teacher += f", --lora-alpha {alphas}"
        for lora in self.loras:
            teacher += f", --teacher-lora {lora.name_of_content()}"
        return dict(method=self.method, teacher=teacher)

    def save(self, it, state, report=None):
        """Checkpoint after iteration `it`. state: {name: object with state_dict()}.

        It also holds the student of `report`, as tools/export.py writes it. These are the tensors
        of `state`, which torch.save stores once. A full disk costs this checkpoint and a warning,
        not the run.
        """
        student = report.student_files(it + 1) if report else {}
        saved = {}
        values = self.log_file.means() | self.figures  # that the next line of the log will show
        if self.is_main or self.args.shard:
            saved = {name: part.state_dict() for name, part in state.items()}
        if self.args.shard:  # whole tensors: any number of processes can resume, sharded or not
            from training.shard import gather_state

            saved = gather_state(saved, self.is_main)
        if self.is_main:
            try:
                self._write_checkpoint(it + 1, saved, student, values)
            except (OSError, RuntimeError) as e:
                self.warn(
                    f"checkpoint at iteration {it + 1} not written ({first_line(e)}); "
                    "the previous one is intact"
                )
        self.saved = it + 1
        self.barrier()

    def _write_checkpoint(self, it, saved, student, values):
        log = self.out / "log.jsonl"
        with open(log, "a") as f:
            sync(f.fileno())
        payload = dict(
            header=self._header(),
            it=it,
            images=self.images_before(it),
            seconds=self.seconds,
            log_bytes=log.stat().st_size,
            skipped=int(self.skipped),
            values=values,
            state=saved,
            student=student,
        )
        write_checkpoint(self.out, it, payload)

    def resume(self, state, fixed=(), check=lambda first: None):
        """Loads the newest readable checkpoint into `state`, if --resume or a restart by torchrun
        wants that. Returns the first iteration to do, 0 for a new run.

        fixed: flags that a resume must not change, because what is trained depends on them.
        check(first): raises UserError if the script cannot go on from there.
        """
        if self.dry:
            self.dry.begin(state, self.models)
            return 0
        path, payload, damaged = None, None, []
        if self.folder.resume_wanted:
            path, payload, damaged = read_newest(self.out, self.args.shard, self.warn)
        if path is None:
            ckpt = self.out / "ckpt"
            require(not self.args.resume, f"--resume: no readable checkpoint in {ckpt}")
            on_rank0(self.folder.start)
            on_rank0(self.folder.clear)
            on_rank0(lambda: self.note_start(0))
            return 0

        changes = self._changes(payload)
        differ = f"; flags that differ: {describe_changes(changes, '--')}" if changes else ""
        check_header(payload, self._header(), self.out, differ)
        with misfits(path):
            counters = read_counters(payload)
            values = read_values(payload)
        first = counters["it"]
        require(
            first <= self.args.iters,
            f"--resume: {self.out} has {first} iterations already, more than "
            f"--iters {self.args.iters}: nothing is done and nothing overwritten",
        )
        for name in changes.keys() & set(fixed):
            change = describe_changes({name: changes[name]}, "--")
            raise UserError(f"--resume: {change}: {self.method} cannot change it during a run")
        own_part = own_optimiser_part if self.args.shard else lambda part, saved: saved
        with misfits(path, differ):
            load_state(payload["state"], state, own_part)
        check(first)

        self.saved = self.first = first
        self.past_images = counters["images"]
        self.skipped = counters["skipped"]
        self.figures = {name: values.pop(name) for name in FIGURES if name in values}
        self.log_file.restore(first - 1, values)
        self.past_seconds = counters["seconds"]
        on_rank0(lambda: self.folder.rewind(counters["log_bytes"], damaged))
        if self.is_main:
            self.alarms.read(self.log_file.path)
        on_rank0(lambda: self.note_start(first, changed=changes))
        changed = f"; changed: {describe_changes(changes)}" if changes else ""
        self.print(f"resumed {path.name}{changed}")
        return first

    def _changes(self, payload):
        """{flag: [old, new]} against the start that made a checkpoint."""
        starts = read_starts(self.out)
        if not starts:
            self.warn(f"{self.out}: no run.jsonl, so flags that are not given are the preset's")
            return {}
        it = payload.get("it") if isinstance(payload, dict) else None
        made = starts_until(starts, it) if isinstance(it, int) else []
        return changed_flags((made or starts)[-1], dict(flags=vars(self.args), cwd=os.getcwd()))

    def note_start(self, first, **facts):
        if self.loras:
            facts["teacher_lora"] = [lora.record() for lora in self.loras]
        self.revision = self.folder.note_start(
            first=first,
            **facts,
            method=self.method,
            flags=vars(self.args),
            processes=self.world,
            device=str(self.device),
            plan=self.plan,
        )

    def finish(self, it, state, report=None):
        """Last checkpoint, after iteration `it`. A run that a signal stopped ends here, with exit
        code 128 + number of the signal: 143 for SIGTERM, 130 for Ctrl-C."""
        if self.saved != it + 1:
            self.save(it, state, report)
        if self.stopping:
            name = signal.Signals(self.stopping).name
            self.warn(f"stopped by {name} after iteration {it + 1}; go on with --resume")
            raise SystemExit(128 + self.stopping)
        self.outside_loop = "after the last iteration"  # sampling for metrics may take minutes

    def close(self):
        """Releases the folder."""
        if self.folder.lock is not None:
            self.folder.lock.close()


def stop_signals():
    """Numbers of STOP_SIGNALS. nohup ignores SIGHUP, and then it stays ignored."""
    known = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]
    ignored = [s for s in known if s.name == "SIGHUP" and signal.getsignal(s) == signal.SIG_IGN]
    return [s for s in known if s not in ignored]


def check_batch(args):
    """UserError if the processes cannot share the batch. Before they wait for each other."""
    world = args.processes or int(os.environ.get("WORLD_SIZE", 1))
    require(
        args.batch % (world * args.accumulate) == 0,
        f"--batch {args.batch}: expected a multiple of the number of processes times --accumulate, "
        f"found {world} x {args.accumulate}",
    )
    require(
        world > 1 or not args.shard,
        "--shard: expected several processes to spread the weights over "
        "(torchrun --nproc_per_node=N), found one; a resumed run takes --no-shard",
    )
    size = args.shard_size if args.shard else None
    require(
        size is None or 1 < size and world % size == 0,
        f"--shard-size {size}: expected a divisor above 1 of the processes, found {world}",
    )


def check_places(args):
    """UserError for folders of flags that are read much later, after the teacher was loaded."""
    if args.data:
        existing_folder(args.data)
    if getattr(args, "start", None) and not args.resume:
        read_student(args.start)


def set_deterministic():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is first used
    torch.use_deterministic_algorithms(True)
    # costs time, and nothing here reads uninitialised memory
    torch.utils.deterministic.fill_uninitialized_memory = False


def progress_bar(first, last, name, disable):
    interval = bar_interval()
    return tqdm(
        range(first, last),
        initial=first,
        total=last,
        desc=name,
        unit="it",
        smoothing=0.05,
        mininterval=interval,
        maxinterval=max(10, 3 * interval),
        disable=disable,
    )


def count_trained(net):
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def own_optimiser_part(part, saved):
    """--shard: this process's part of an optimiser's state; networks take theirs themselves."""
    if not isinstance(part, torch.optim.Optimizer):
        return saved
    from training.shard import local_optimizer_state

    return local_optimizer_state(part, saved)
