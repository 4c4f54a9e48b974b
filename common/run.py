"""One run: its folder, this process's share of the batch, optimiser steps, log and checkpoints."""

import contextlib
import datetime
import fcntl
import json
import math
import os
import signal
import sys
import time
import warnings
import weakref
import zipfile
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.distributed import init_processes
from common.errors import RunError, UserError, first_line
from common.files import ROOT, atomic, git_revision
from common.memory import format_bytes, keep_heap
from common.rng import BatchRandom, derive_seed

STOP_AFTER_BAD = 20  # optimiser steps in a row with a non-finite gradient before the run gives up


class Run:
    """Processes, device, folder, log and checkpoints of one run. Attributes: rank, world, main (rank 0), device, dtype, out, batch (local), seconds.

    --accumulate N: the loop runs N times with the same number of the iteration, on one part of the batch after the other. Backward passes sum gradients, and
    what happens once per iteration waits for the last part: `step`, the average (`stepped` is 0 before), the all-reduce, the log, `due`."""

    def __init__(self, method, args):
        self.method, self.args = method, args
        if args.batch % (
            (world := int(os.environ.get("WORLD_SIZE", 1))) * args.accumulate
        ):  # before the processes look for each other
            raise UserError(
                f"--batch {args.batch}: expected a multiple of the number of processes times --accumulate, found {world} x {args.accumulate}"
            )
        if args.shard and world == 1:
            raise UserError(
                "--shard: expected several processes to spread the weights over (torchrun --nproc_per_node=N), found one"
            )
        if args.deterministic:
            os.environ.setdefault(
                "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
            )  # read when CUDA is first used
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = (
                False  # costs time, and nothing here reads such memory
            )
        self.rank, self.world, self.device, self.dtype = init_processes(args)
        if self.device.type == "cpu":
            keep_heap()
        self.is_main, self.batch = self.rank == 0, args.batch // (self.world * args.accumulate)
        self.microstep, self.wrapped, self.values = (
            0,
            weakref.WeakSet(),
            [],
        )  # which part of an iteration's batch; DDP's modules; what the parts have logged
        device = self.device  # not self: a run that holds itself would keep its lock
        self.to_device = lambda module: module.to(
            device
        )  # what is trained goes through here, or through Model.copy and Model.extend
        if args.shard:
            from common.shard import Sharding  # a second's import

            self.to_device = Sharding(self.device)
        self.out = Path(args.out or ROOT / "out" / f"{method}-{Path(args.teacher).name}")
        (
            self.start,
            self.past_seconds,
            self.stopping,
            self.bad,
            self.skipped,
            self.saved,
            self.record,
        ) = time.monotonic(), 0.0, False, {}, 0, 0, {}
        # torchrun --max-restarts starts a failed worker again with the same flags: it goes on from the last checkpoint
        self.restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        self.resume_wanted = args.resume or self.restarted
        self.on_rank0(self.open_folder)
        if self.restarted and args.overwrite and (self.out / ".lock").read_text():
            self.resume_wanted = (
                False  # the first attempt ended before it discarded the run that was here
            )
        for sig in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sig, self.on_signal)

    @property
    def data_shard(self):
        """Which part of the global batch is at hand, and how many there are: each process has --accumulate of them."""
        return self.rank * self.args.accumulate + self.microstep, self.world * self.args.accumulate

    @property
    def is_last_microstep(self):
        return self.microstep == self.args.accumulate - 1

    @property
    def images_stepped(self):
        """Images of the step that this part ends with; 0 where gradients are still being summed."""
        return self.args.batch * self.is_last_microstep

    def on_rank0(self, fn):
        """fn() on rank 0; a UserError or RunError there is raised on every rank, so that none waits for a process that has ended."""
        error = None
        if self.is_main:
            try:
                fn()
            except (UserError, RunError) as e:
                error = e
        if self.world > 1:
            box = [(type(error).__name__, str(error)) if error else None]
            dist.broadcast_object_list(box)
            if box[0]:
                error = dict(UserError=UserError, RunError=RunError)[box[0][0]](box[0][1])
        if error:
            raise error

    def open_folder(self):
        try:
            for sub in ("ckpt", "samples"):
                (self.out / sub).mkdir(parents=True, exist_ok=True)
            self.lock = open(self.out / ".lock", "a+")
        except OSError as e:
            raise UserError(
                f"--out {self.out}: expected a folder that can be written, found: {e.strerror}"
            ) from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"--out {self.out}: another run is writing here; choose another folder or wait for it"
            ) from None
        for litter in [
            p
            for pattern in (
                "*.json*.tmp",
                "pairs-*/*.tmp",
                "ckpt/*.tmp",
                "samples/*.tmp",
                "student/**/*.tmp",
            )
            for p in self.out.glob(pattern)
        ]:
            litter.unlink()  # left by a run that was killed while writing
        self.lock.seek(0)
        if self.restarted and "holds a run" in (left := self.lock.read()):
            raise UserError(left)
        refusal = ""
        if not self.resume_wanted and (old := self.checkpoints()):
            refusal = f"--out {self.out}: holds a run at iteration {int(old[-1].stem[3:])}; add --resume, --overwrite or another --out"
        if not self.restarted:
            self._mark("to be discarded" if refusal and self.args.overwrite else refusal)
        if refusal and not self.args.overwrite:
            raise UserError(refusal)
        if self.args.resume and not self.checkpoints():
            raise UserError(f"--resume: no checkpoint in {self.out / 'ckpt'}")

    def _mark(self, text):
        """What torchrun's next attempts must know of this one, since to them every checkpoint looks like one of their own."""
        if "TORCHELASTIC_RESTART_COUNT" not in os.environ:
            return
        self.lock.truncate(0)
        self.lock.write(text)
        self.lock.flush()

    def _clear(self):
        """Removes what an earlier run left. Called when nothing can be wrong with the flags any more, so that a typo beside --overwrite costs nothing."""
        results = (
            (
                "ckpt/it-*",
                "samples/[0-9]*.png",
                "metrics.json",
                "control.json",
                "path.json",
                "student/**/*.json",
                "student/**/*.safetensors",
            )
            if self.args.overwrite
            else ()
        )
        for path in [
            p
            for pattern in ("log.jsonl", "eval.jsonl", "run.jsonl", *results)
            for p in self.out.glob(pattern)
        ]:
            path.unlink()
        self._mark("")

    def note_start(self, first):
        """A line of run.jsonl for each start: all that it takes to do it again."""
        self.revision, versions = git_revision(), dict(python=sys.version.split()[0])
        for name in ("torch", "numpy", "diffusers", "transformers", "peft", "safetensors"):
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name)
        line = dict(
            first=first,
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            method=self.method,
            command=sys.argv,
            flags=vars(self.args),
            processes=self.world,
            device=str(self.device),
            revision=self.revision,
            versions=versions,
        )
        before = path.read_text() if (path := self.out / "run.jsonl").exists() else ""
        with atomic(path) as f:
            f.write((before + json.dumps(line) + "\n").encode())

    def on_signal(self, signum, frame):
        if self.stopping and signum == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the checkpoint
        self.stopping = signum

    def print(self, *text):
        if self.is_main:
            print(*text, flush=True)

    def warn(self, text):
        if self.is_main:
            tqdm.write(f"{self.method}: {text}", file=sys.stderr)

    @property
    def seconds(self):
        return (
            self.past_seconds + time.monotonic() - self.start
        )  # a clock that is set does not touch it

    def prompt_kwargs(self):
        """What load_teacher needs for a pipeline."""
        a = self.args
        return dict(
            prompts=a.prompts,
            cache=a.cache_prompts,
            size=a.size,
            frames=a.frames,
            guidance=a.embedded_guidance,
            data=a.data,
            say=self.print,
            once=self.on_rank0,
        )

    def teacher_kwargs(self, students=1, critics=0, averages=0, single=False):
        """What load_teacher needs beside device and dtype. The numbers, for the estimate of memory: networks of the teacher's size that the script makes.
        single: its students are one network each, also where the teacher is several experts."""
        return dict(
            text=self.prompt_kwargs(),
            place=self.to_device,
            budget=lambda **sizes: self.check_memory(
                students, critics, averages, **sizes, single=single
            ),
        )

    # -- memory

    def check_memory(
        self, students, critics, averages, network, width, vae=0, experts=1, single=False
    ):
        """Before anything big is loaded: what the networks will take, refused with advice if the device has less. network, vae: parameters, of all experts
        together; width: bytes of one in frozen networks."""
        a, ways = self.args, self.world if self.args.shard else 1
        students = students / experts if single else students
        full = lambda n, lora: (
            0 if lora else n * network * 16 / ways
        )  # fp32 weights, gradients, two moments; adapters are small beside the network
        total, free = self.memory(
            "memory, estimated",
            {
                "teacher": network * width / ways,
                "students": full(students, vars(a).get("lora")),
                "critics": full(critics, vars(a).get("lora_fake")),
                "averages": (averages + students * (bool(a.ema) and not a.ema_cpu))
                * network
                * 4
                / ways
                * (not vars(a).get("lora")),
                "VAE": vae * width,
            },
        )
        if total > free:
            ways_out = [
                flag
                for flag, given in (
                    ("--lora RANK", vars(a).get("lora", True)),
                    ("--shard on more processes", False),
                    ("--ema-cpu", a.ema_cpu or not a.ema),
                )
                if not given
            ]
            raise UserError(
                f"--teacher {a.teacher}: its networks need {format_bytes(total)}, activations not included, found {format_bytes(free)} free on {self.device} for a process; "
                f"try {', '.join(ways_out)} (--grad-checkpoint and a smaller --batch lower activations only)"
            )

    def memory(self, name, parts):
        """Prints bytes by part, of one process -> their sum, and what the device has free."""
        total, free = sum(parts.values()), self.free_memory()
        self.print(
            f"  {name:22s} {', '.join(f'{k} {format_bytes(v)}' for k, v in parts.items() if v)}: {format_bytes(total)}, {format_bytes(free)} free; activations come on top"
        )
        return total, free

    def rehearse(self, graph, facts):
        """Makes the largest backward of the script once, on zeros, and prints the peak of memory to expect: that of the rehearsal and what the optimisers will
        add. What does not fit ends here and not in the first step. graph: networks that this backward goes through, {name: how many batches, or a function
        of a batch}, first the one that is trained; the others are asked about its output. The teacher is asked without gradient while the graph is alive."""
        n, cond, nets = (
            self.batch,
            facts["teacher"].encode([0]),
            [value for value in facts.values() if isinstance(value, torch.nn.Module)],
        )
        x, outs = torch.zeros(n, *facts["teacher"].shape, device=self.device), []
        ask = lambda name, k, x: getattr(facts[name], "fake", facts[name]).rehearsal(
            torch.cat([x] * k), cond
        )  # a Critic's passes are those of its network
        for name, k in graph.items():
            outs.append(k(outs[0][:n]) if callable(k) else ask(name, k, outs[0][:n] if outs else x))
        with torch.no_grad():
            ask("teacher", 1 if self.args.cfg in (None, 1) else 2, x)
        sum(out.sum() for out in outs).backward()
        trained = {p for net in nets for p in net.parameters() if p.requires_grad}
        coming = sum(
            (p.to_local() if hasattr(p, "to_local") else p).numel()
            * (8 if p.grad is not None else 12)
            for p in trained
        )  # two moments, and the gradient
        for p in trained:
            p.grad = None
        here, margin = (
            self.peak_mb() * 2**20,
            1.08 if self.device.type == "cpu" else 1.0,
        )  # on CPUs gaps in the heap, measured: docs/RESULTS.md
        if coming > self.free_memory():
            raise UserError(
                f"--teacher {self.args.teacher}: gradients and optimisers need {format_bytes(coming)} more, found {format_bytes(self.free_memory())} free on {self.device}; "
                f"try --lora RANK, --shard on more processes"
            )
        self.print(
            f"  {'memory, peak':22s} {(here + coming) * margin / 2**20:.0f} MB expected: {format_bytes(here)} in a rehearsal of the largest backward, {format_bytes(coming)} to come"
            + ", gaps" * (margin > 1)
        )

    def free_memory(self):
        """Bytes that this process can still have: of the GPU, or its share of the machine's available memory."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        lines = (
            Path("/proc/meminfo").read_text().splitlines()
            if Path("/proc/meminfo").is_file()
            else []
        )
        available = [
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")
        ] or [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
        return available[0] // int(os.environ.get("LOCAL_WORLD_SIZE", self.world))

    # -- networks and steps

    def train(self, model):
        """The module to call in training: compiled if asked, then DDP when there are several processes (gradients are averaged over them; with --shard, by
        the sharded networks themselves)."""
        if self.args.shard:
            return model
        model = torch.compile(model) if self.args.compile else model
        if self.world == 1:
            return model
        ids = [self.device] if self.device.type == "cuda" else None
        idle = any(
            hasattr(m, "experts") for m in model.modules()
        )  # models.Routed: an iteration may have no sample for one of its experts
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # torch 2.13 renames broadcast_buffers; 2.6 knows only the old name
            model = torch.nn.parallel.DistributedDataParallel(
                model,
                device_ids=ids,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=idle,
            )
        self.wrapped.add(model)
        return model

    def average_gradients(self, params):
        """Gradients become their means over the processes, by one all-reduce. For networks that `train` did not wrap: forward-mode derivatives go around
        DDP's hooks. To be called between backward and `step`, on all processes, which must have gradients for the same parameters."""
        grads = [p.grad for p in params if p.grad is not None]
        if (
            self.world == 1 or not grads or not self.is_last_microstep or self.args.shard
        ):  # sharded gradients are means already
            return
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= self.world
        torch._foreach_copy_(
            grads,
            [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads)],
        )

    def print_summary(self, images=None, graph=None, **facts):
        """Prints everything derived from the flags before the first step. Models appear as parameters (trained / frozen). images: those that the losses look
        at, if any. graph: of `rehearse`. What a comparison of methods asks for is kept for the student's record."""
        self.record = dict(
            images=len(images or ()),
            passes_per_iteration=facts.get("passes_per_iteration"),
            networks={},
        )
        facts |= dict(images=len(images)) if images else {}
        if self.args.cfg not in (None, 1) and "teacher" in facts:
            facts["teacher"].null(1)  # a teacher without a null label says so here
        self.print(
            f"{self.method}: teacher {self.args.teacher}, device {self.device}, {str(self.dtype)[6:]} passes, {self.world} process(es) x {self.batch} samples"
            + f" x {self.args.accumulate} parts" * (self.args.accumulate > 1)
        )
        parts, seen = {}, set()  # weights that networks share count once
        for name, value in facts.items():
            if isinstance(value, torch.nn.Module):
                p = list(value.parameters())
                trained = sum(q.numel() for q in p if q.requires_grad)
                self.record["networks"] |= {name: trained} if trained else {}
                mine = [
                    (
                        q.to_local() if self.args.shard and hasattr(q, "to_local") else q,
                        q.requires_grad,
                    )
                    for q in p
                    if id(q) not in seen
                ]
                seen |= {id(q) for q in p}
                parts[name] = sum(
                    q.numel() * (q.element_size() + 12 * train) for q, train in mine
                )  # gradient and two moments, fp32
                base = sum(
                    {
                        id(t): t.numel() for m in value.modules() for t in vars(m).get("base", [])
                    }.values()
                )  # of networks with adapters: the teacher's
                value = (
                    f"{sum(q.numel() for q in p) / 1e6:.2f}M parameters, {'trained' if trained else 'frozen'}"
                    + f", on {base / 1e6:.2f}M of the teacher's, frozen" * (base > 0)
                )
            self.print(f"  {name.replace('_', ' '):22s} {value}")
        self.memory("memory, networks", parts)
        self.rehearse(graph or dict(student=1), facts)
        self.print(f"  {'folder':22s} {self.out}")

    def draw(self, it):
        """Random numbers of iteration it. The global generator (dropout and the like) is re-seeded too, so that a resume needs no RNG state."""
        torch.manual_seed(derive_seed(self.args.seed, it, 4, self.data_shard[0]))
        return BatchRandom(self.args.seed, it, self.args.batch, *self.data_shard, self.device)

    def set_rates(self, it, *pairs, span=None):
        """Learning rates of iteration it: linear --warmup from lr / warmup, then constant, then linear over the last --cooldown share to 0. pairs: (optimiser, lr).
        span: first iteration and the one after the last of the stage that `it` belongs to, for a run whose stages each have their own; default the whole run."""
        args, (first, last) = self.args, span or (0, self.args.iters)
        decay = min(1.0, (it - first + 1) / max(args.warmup, 1)) * min(
            1.0, (1 - (it - first) / (last - first)) / max(args.cooldown, 1e-9)
        )
        for opt, lr in pairs:
            for group in opt.param_groups:
                group["lr"] = lr * decay

    def step(self, opt, clip):
        """Clip the gradients of what `opt` trains to global norm `clip`, step, zero. A non-finite gradient skips the step, counted, without waiting for the
        device. -> norm (0-d tensor); None where gradients are still being summed over parts of the batch."""
        if not self.is_last_microstep:
            return None
        grads = [
            p.grad for group in opt.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = (
            torch.nn.utils.get_total_norm(grads, foreach=True) / self.args.accumulate
        )  # the sum is now a mean
        norm = norm.full_tensor() if self.args.shard else norm
        bad = 1 - norm.isfinite().float()
        # fused optimisers divide by grad_scale on their way, and leave weights and moments alone where found_inf is 1
        opt.grad_scale, opt.found_inf = (
            ((norm / clip).clamp(min=1) * self.args.accumulate).float(),
            bad,
        )
        opt.step()
        opt.zero_grad(set_to_none=True)
        self.bad[id(opt)] = (
            self.bad.get(id(opt), 0) + bad
        ) * bad  # in a row, for each network: a healthy critic must not hide a broken student
        self.skipped = self.skipped + bad
        return norm

    # -- loop

    def loop(self, first, last):
        """Iteration numbers first..last-1 with a progress bar. Ends early (all processes at the same iteration) after SIGTERM or Ctrl-C."""
        quiet = not sys.stderr.isatty()
        self.bar = tqdm(
            range(first, last),
            initial=first,
            total=last,
            disable=not self.is_main,
            mininterval=10 if quiet else 0.2,
            maxinterval=30 if quiet else 10,
            desc=self.method,
            unit="it",
            smoothing=0.05,
        )
        for it in self.bar:
            for self.microstep in range(self.args.accumulate):
                for model in self.wrapped:
                    model.require_backward_grad_sync = self.is_last_microstep  # as DDP's no_sync
                yield it
            if self.agree_to_stop():
                break
        self.bar.close()

    def agree_to_stop(self):
        if self.world == 1:
            return bool(self.stopping)
        flag = torch.tensor(int(self.stopping))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)  # on the host (gloo)
        self.stopping = int(flag)
        return bool(self.stopping)

    def log(self, it, values):
        """One line of log.jsonl: values (floats, 0-d tensors, None where this part has none) averaged over parts and processes. Wall-clock numbers sit under `time`, apart from what is
        reproducible. The only place of the loop where the host waits for the device."""
        self.values.append(
            {
                k: v.detach().float().reshape(()).cpu()
                if torch.is_tensor(v)
                else torch.tensor(float(v))
                for k, v in values.items()
                if v is not None
            }
        )
        if not self.is_last_microstep:
            return
        values = {
            k: torch.stack([part[k] for part in self.values if k in part]).mean()
            for k in self.values[-1]
        }
        self.values = []
        flat = torch.stack(list(values.values()))
        if self.world > 1:
            dist.all_reduce(flat)
            flat /= self.world
        bad, skipped = max(map(int, self.bad.values()), default=0), int(self.skipped)
        if bad >= STOP_AFTER_BAD:
            raise RunError(
                f"the gradient was not finite in {bad} steps in a row (iteration {it}); last checkpoint: {(self.checkpoints() or ['none'])[-1]}"
            )
        if not self.is_main:
            return
        images = (it + 1) * self.args.batch
        now, last = self.seconds, getattr(self, "last_log", None)
        rate = (images - last[0]) / max(now - last[1], 1e-9) if last else float("nan")
        self.last_log = (images, now)
        clock = dict(
            seconds=round(now, 2),
            images_per_s=None if rate != rate else round(rate, 1),
            peak_mb=round(self.peak_mb()),
        )
        number = lambda v: float(f"{float(v):.6g}") if math.isfinite(v) else None  # JSON has no nan
        line = dict(
            it=it,
            images=images,
            skipped=skipped,
            **{k: number(v) for k, v in zip(values, flat)},
            time=clock,
        )
        with open(self.out / "log.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")
        shown = {k: f"{float(v):.3g}" for k, v in list(zip(values, flat))[:2]}
        self.bar.set_postfix(shown | {"img/s": clock["images_per_s"]}, refresh=False)

    def peak_mb(self):
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    def due(self, it, every):
        """True after iteration it (counted from 0) if a multiple of `every` iterations is complete; every = 0: never."""
        return bool(every) and self.is_last_microstep and (it + 1) % every == 0

    # -- checkpoints: everything a resume needs. Random numbers need no state (Draw), data order is a function of the iteration.

    def checkpoints(self):
        return sorted(p for p in (self.out / "ckpt").glob("it-*.pt") if p.stem[3:].isdigit())

    def _header(self):
        alphas = [
            f"{spec['alpha']:g}"
            for spec in (vars(self.args).get("lora"), vars(self.args).get("lora_fake"))
            if spec
        ]  # no shape tells them apart
        return dict(
            method=self.method,
            teacher=Path(self.args.teacher).name
            + (f", --lora-alpha {', '.join(alphas)}" if alphas else ""),
        )

    def save(self, it, state):
        """After iteration it: state = {name: object with state_dict()}. Written to a temporary name, fsync'ed, renamed; the two newest are kept."""
        state = (
            {k: v.state_dict() for k, v in state.items()} if self.is_main or self.args.shard else {}
        )
        if self.args.shard:  # the checkpoint is that of whole networks: any number of processes goes on from it, with --shard or without
            from common.shard import gather_state

            state = gather_state(state, self.is_main)
        if self.is_main:
            log, path = self.out / "log.jsonl", self.out / "ckpt" / f"it-{it + 1:08d}.pt"
            try:
                with open(log, "a") as f:
                    os.fsync(f.fileno())
                payload = dict(
                    header=self._header(),
                    it=it + 1,
                    seconds=self.seconds,
                    log_bytes=log.stat().st_size,
                    skipped=int(self.skipped),
                    state=state,
                )
                with atomic(path) as f:
                    torch.save(payload, f)
            except (OSError, RuntimeError) as e:  # RuntimeError: how torch.save reports a full disk
                self.warn(
                    f"checkpoint at iteration {it + 1} not written ({first_line(e)}); the previous one is intact"
                )
            else:
                for old in self.checkpoints()[:-2]:
                    old.unlink()
        self.saved = it + 1
        if self.world > 1:
            dist.barrier()

    def resume(self, state):
        """Loads the newest readable checkpoint into `state` if --resume (or torchrun's restart) asks for it -> first iteration to do (0 if none)."""
        unreadable = []
        for path in reversed(self.checkpoints() if self.resume_wanted else []):
            try:
                with zipfile.ZipFile(
                    path
                ) as z:  # torch does not look at the checksums that it writes
                    if (part := z.testzip()) is not None:
                        raise zipfile.BadZipFile(part)
                payload = torch.load(
                    path, map_location="cpu", weights_only=True, mmap=self.args.shard
                )  # no pickled code is ever run
            except Exception as e:  # torch raises many kinds for a damaged file; the reason is shown and the older checkpoint tried
                self.warn(f"{path}: not readable ({type(e).__name__}), trying the one before")
                unreadable.append(path)
                continue
            found, expected = (
                payload.get("header") if isinstance(payload, dict) else None,
                self._header(),
            )
            if found != expected:
                raise UserError(
                    f"--resume {self.out}: expected a run of {expected['method']} on {expected['teacher']}, found {' '.join(str(found).split())[:200]}"
                )
            try:
                counters = it, skipped, log_bytes, seconds = [
                    payload[k] for k in ("it", "skipped", "log_bytes", "seconds")
                ]
                if not all(isinstance(v, int) for v in counters[:3]) or not all(
                    0 <= v < float("inf") for v in counters
                ):
                    raise ValueError(f"expected counters >= 0, found {str(counters)[:100]}")
                for name, part in state.items():
                    part.load_state_dict(self._own_part(part, payload["state"][name]))
                    for p, moments in (
                        part.state.items() if isinstance(part, torch.optim.Optimizer) else ()
                    ):  # which torch does not compare
                        if any(
                            v.shape != (() if k == "step" else p.shape) for k, v in moments.items()
                        ) or not {"step", "exp_avg", "exp_avg_sq"} <= set(moments):
                            raise ValueError(
                                f"{name}: expected moments of shape {list(p.shape)}, found others"
                            )
            except torch.OutOfMemoryError:
                raise
            except (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError) as e:
                raise UserError(
                    f"--resume {path}: does not fit the networks of these flags: {first_line(e)}"
                ) from None
            self.past_seconds, self.skipped, self.saved = seconds, skipped, it
            self.on_rank0(lambda: (self.rewind(log_bytes, unreadable), self.note_start(it)))
            self.print(f"resumed {path.name}")
            return it
        if self.args.resume:
            raise UserError(f"--resume: no readable checkpoint in {self.out / 'ckpt'}")
        self.on_rank0(lambda: (self._clear(), self.note_start(0)))
        return 0

    def _own_part(self, part, state):
        """This process's part of an optimiser's state; networks see to it themselves."""
        if not (self.args.shard and isinstance(part, torch.optim.Optimizer)):
            return state
        from common.shard import local_optimizer_state

        return local_optimizer_state(part, state)

    def rewind(self, log_bytes, unreadable):
        """The log back to the length it had at the checkpoint; damaged checkpoints out of the way, so that they do not count as the newest."""
        log = self.out / "log.jsonl"
        if log.exists():
            os.truncate(log, min(log_bytes, log.stat().st_size))
        for path in unreadable:
            path.rename(f"{path}.unreadable")
        for old in self.checkpoints()[
            :-2
        ]:  # death came after a new one was there and before the oldest was gone
            old.unlink()

    def finish(self, it, state):
        """Last checkpoint, after iteration it. A run that a signal ended leaves here: exit code 143 (SIGTERM) or 130 (Ctrl-C)."""
        if self.saved != it + 1:
            self.save(it, state)
        if self.stopping:
            self.warn(
                f"stopped by {signal.Signals(self.stopping).name} after iteration {it + 1}; go on with --resume"
            )
            raise SystemExit(128 + self.stopping)
