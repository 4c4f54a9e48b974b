"""What every script needs and no method is about: flags, processes, random numbers, EMA, checkpoints, the log, pictures.

There is no trainer here: a script's `main` is one flat loop, and `Run` only answers its questions (which device, which samples are mine, where is
the last checkpoint). Nothing in this file knows a method.
"""
import argparse
import contextlib
import ctypes
import datetime
import difflib
import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
import weakref
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
STOP_AFTER_BAD = 20  # optimiser steps in a row with a non-finite gradient before the run gives up


class UserError(Exception):
    """A mistake of the user: one line that names the flag or file, what was expected and what was found. Scripts print it and exit with 2."""


class RunError(Exception):
    """A fault of the run (not finite for long, disk full): one line, exit code 1. The last checkpoint stays as it is."""


def launch(main):
    """Calls a script's main() and turns faults into one line and an exit code: 2 user error, 1 fault, 130 Ctrl-C, 143 SIGTERM (after saving)."""
    code, line = 0, None
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
        main()
    except (UserError, RunError) as e:
        code, line = 2 if isinstance(e, UserError) else 1, str(e) if int(os.environ.get("RANK", 0)) == 0 else None
    except KeyboardInterrupt:
        code, line = 130, "interrupted"
    except (OSError, RuntimeError, MemoryError, SafetensorError) as e:
        code, line = 1, outside(e)
        if line is None:
            raise
    finally:
        if line is not None:
            print(f"{Path(sys.argv[0]).name}: {' '.join(line.split())}", file=sys.stderr)
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(code)


OUTSIDE = (  # words in the messages of torch, and what they mean
    (("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED"),
     "out of memory: lower --batch (if it happened while measuring: --eval-n), or add --accumulate N, --grad-checkpoint, --lora RANK or --shard"),
    (("deterministic implementation", "Deterministic behavior was enabled"), "--deterministic: an operation of this run has no deterministic form here; leave it out"),
    (("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer"), "another process of this run is gone; torchrun --max-restarts goes on alone, else --resume"),
)


def outside(e):
    """One line for a fault that is no mistake of the code: memory, disk, another process. None: it may be one."""
    if isinstance(e, MemoryError):
        return OUTSIDE[0][1]
    meaning = [f"{text} ({reason(e)[:200]})" for words, text in OUTSIDE if any(w in str(e) for w in words)]
    return meaning[0] if meaning else f"file not written or not read: {reason(e)}" if isinstance(e, (OSError, SafetensorError)) else None


def reason(e):
    """First line of an exception's message; its kind if it has none."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


# ---- flags ------------------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the flags that mean the same in every script, in the groups model / method / optimisation / run."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self.model, self.method = self.add_argument_group("model"), self.add_argument_group("method")
        self.optim, self.run = self.add_argument_group("optimisation"), self.add_argument_group("run")
        self.model.add_argument("--teacher", default="mnist", help="toy, toy-cond, mnist; sdxl, sd15, sana, sd3, ... (common/models.py, HUB); a name on the hub; a folder")
        self.model.add_argument("--prompts", help="text-to-image: file of prompts, one per line; default assets/prompts.txt")
        self.model.add_argument("--cache-prompts", help="folder for their embeddings and for latents of --data, computed once; default out/prompts")
        self.model.add_argument("--size", type=pixels, help="pixels along a side, or HEIGHTxWIDTH, if other than what the teacher was built for (pipelines)")
        self.model.add_argument("--frames", type=int, help="frames of a video, if other than what the teacher's pipeline makes by default (text to video)")
        self.model.add_argument("--cfg", type=float, help="guidance scale w of the teacher, u + w (c - u); 1 is the plain conditional")
        self.model.add_argument("--embedded-guidance", type=float, help="guidance scale that FLUX.1-dev, distilled from guidance, is told as an input (3.5); --cfg is on top of it")
        self.model.add_argument("--nfe", type=int, help="network passes of the student per sample")
        self.model.add_argument("--lora", type=int, metavar="RANK", help="train adapters of this rank instead of the student's weights, which stay the teacher's")
        self.model.add_argument("--lora-fake", type=int, metavar="RANK", help="the same for the second network, where there is one")
        self.model.add_argument("--lora-alpha", type=float, help="the adapters' update is alpha / rank B A; default: the rank")
        self.model.add_argument("--lora-targets", nargs="+", metavar="NAME", help="ends of the names of layers that get adapters; default: attention and feed-forward")
        self.model.add_argument("--data", help="images for losses that need them: a folder with one subfolder per class (text-to-image: with captions, .txt or "
                                "metadata.jsonl); default: the teacher's own")
        self.optim.add_argument("--iters", type=int, help="iterations of the loop")
        self.optim.add_argument("--batch", type=int, help="global batch: samples per iteration over all processes")
        self.optim.add_argument("--accumulate", type=int, default=1, metavar="N", help="sum the gradients of an iteration over N parts of its batch: less memory, the same step (README says where not quite)")
        self.optim.add_argument("--lr", type=float, help="learning rate of the student")
        self.optim.add_argument("--lr-fake", type=float, help="learning rate of the second network, where there is one")
        self.optim.add_argument("--warmup", type=int, default=0, help="iterations of linear warm-up")
        self.optim.add_argument("--cooldown", type=float, default=0.0, help="share of the run, at its end, over which learning rates fall to 0")
        self.optim.add_argument("--clip", type=float, default=10.0, help="gradient norm")
        self.optim.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.999), help="of AdamW, all networks")
        self.optim.add_argument("--weight-decay", type=float, default=0.01, help="of AdamW, all networks")
        self.optim.add_argument("--ema", type=float, help="half-life of the student's weight average, in images of student updates; 0 is off")
        self.optim.add_argument("--ema-cpu", action="store_true", help="keep the weight average in the host's memory, updated beside the training")
        self.optim.add_argument("--grad-checkpoint", action="store_true", help="recompute activations in backward: less memory, about a third more time")
        self.run.add_argument("--out", help="folder of the run; default out/<method>-<teacher>")
        self.run.add_argument("--seed", type=int, default=0, help="of all random numbers; noise and labels depend on (seed, iteration, sample), not on the processes")
        self.run.add_argument("--device", default="auto", help="auto, cpu or cuda")
        self.run.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="of the network passes; weights stay fp32. auto: bf16 on CUDA")
        self.run.add_argument("--deterministic", action="store_true", help="CUDA: the same bits in every run on the same machine, at some cost in time; CPUs do it anyway")
        self.run.add_argument("--shard", action="store_true", help="spread weights, gradients and optimiser over the processes (torch's fully_shard) instead of DDP")
        self.run.add_argument("--compile", action="store_true", help="torch.compile the networks")
        self.run.add_argument("--log-every", type=int, default=10, help="iterations between lines of log.jsonl")
        self.run.add_argument("--sample-every", type=int, default=500, help="iterations between sample grids; 0: only at the end")
        self.run.add_argument("--eval-every", type=int, default=0, help="iterations between evaluations of 1,000 samples; 0: only at the end")
        self.run.add_argument("--eval-n", type=int, default=5000, help="samples of the evaluation at the end; 0: none")
        self.run.add_argument("--save-every", type=int, default=500, help="iterations between checkpoints; 0: only at the end")
        self.run.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of --out")
        self.run.add_argument("--overwrite", action="store_true", help="discard a run that is already in --out")
        self.run.add_argument("--smoke", action="store_true", help="three iterations of everything, then a small evaluation")

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")

    def parse(self, presets, argv=None):
        """Two passes: --teacher picks a preset, which becomes the defaults. Every default can still be overridden."""
        teacher = self.parse_known_args(argv)[0].teacher if "-h" not in (argv or sys.argv) else "mnist"
        name = Path(teacher).name  # a folder may be called like a preset; emoji-flow is trained as emoji is
        self.set_defaults(**next(presets[k] for k in (teacher, name, {"emoji-flow": "emoji"}.get(name), "default") if k in presets))
        args = self.parse_args(argv)
        if args.smoke:
            args.iters, args.log_every, args.sample_every, args.save_every, args.eval_n = 3, 1, 3, 3, min(args.eval_n, 64)
        for name, given in vars(args).items():
            for value in given if isinstance(given, (list, tuple)) else [given]:
                if isinstance(value, float) and value != value or isinstance(value, int) and abs(value) >= (2**63 if name == "seed" else 2**31):
                    raise UserError(f"--{name.replace('_', '-')}: expected a number of ordinary size, found {value}")
        for name in ("iters", "batch", "accumulate", "nfe", "log_every"):
            if getattr(args, name) < 1:
                raise UserError(f"--{name.replace('_', '-')}: expected at least 1, found {getattr(args, name)}")
        for name in ("lr", "lr_fake", "ema", "cfg", "embedded_guidance", "warmup", "weight_decay", "sample_every", "eval_every", "eval_n", "save_every"):
            if getattr(args, name) is not None and not 0 <= getattr(args, name) < float("inf"):
                raise UserError(f"--{name.replace('_', '-')}: expected a number >= 0, found {getattr(args, name)}")
        if 0 < args.eval_n < max(8, world := int(os.environ.get("WORLD_SIZE", 1))):  # k = 3 neighbours and a covariance need some
            raise UserError(f"--eval-n {args.eval_n}: expected 0 or at least {max(8, world)} samples")
        for name, fine, expected in (("cooldown", 0 <= args.cooldown <= 1, "a share from 0 to 1"), ("clip", args.clip > 0, "a number > 0"),
                                     ("betas", all(0 <= b < 1 for b in args.betas), "two numbers from 0 to below 1")):
            if not fine:
                raise UserError(f"--{name}: expected {expected}, found {getattr(args, name)}")
        for name, other in (("compile", "neither has been tried with the other"), ("ema_cpu", "the average is spread over the processes already"),
                            ("lora", "adapters need the teacher's whole weights"), ("lora_fake", "adapters need the teacher's whole weights")):
            if args.shard and vars(args).get(name):
                raise UserError(f"--shard with --{name.replace('_', '-')}: {other}; use one of them")
        if not (args.lora or args.lora_fake) and (args.lora_alpha is not None or args.lora_targets):
            raise UserError("--lora-alpha and --lora-targets mean something only with --lora or --lora-fake")
        if args.lora_alpha is not None and not 0 < args.lora_alpha < float("inf"):
            raise UserError(f"--lora-alpha: expected a number > 0, found {args.lora_alpha}")
        for name, flag in (("lora", "--lora"), ("lora_fake", "--lora-fake")):  # what Model.copy asks for
            if (rank := getattr(args, name)) is not None:
                if rank < 1:
                    raise UserError(f"{flag}: expected a rank of at least 1, found {rank}")
                setattr(args, name, dict(rank=rank, alpha=args.lora_alpha or rank, targets=args.lora_targets, seed=args.seed, flag=flag))
        if args.resume and args.overwrite:
            raise UserError("--resume and --overwrite contradict each other: the first keeps the run in --out, the second discards it")
        return args


def pixels(text):
    """A --size: 512, or HEIGHTxWIDTH -> [height, width]."""
    if not (m := re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)):
        raise argparse.ArgumentTypeError(f"expected pixels, as 512 or HEIGHTxWIDTH, found {text!r}")
    return [int(m[1]), int(m[2] or m[1])]


def size(n):
    """Bytes for people."""
    return f"{n / 2**30:.1f} GB" if n >= 2**30 else f"{n / 2**20:.1f} MB"


def near(word, known):
    """', did you mean X?' for the nearest known names, or ''."""
    hits = difflib.get_close_matches(str(word), list(known), n=3, cutoff=0.5)
    return f", did you mean {' or '.join(hits)}?" if hits else ""


# ---- random numbers ---------------------------------------------------------------------------------------------------------------------


def mix(*key):
    """A 64-bit seed from integers, well mixed: neighbouring keys give unrelated streams."""
    return int(np.random.SeedSequence([int(k) % 2**63 for k in key]).generate_state(1, np.uint64)[0])


class Draw:
    """Random numbers of one iteration, a function of (seed, iteration, place in the global batch) and not of the number of processes.

    Every process draws the whole global batch and keeps its own rows; that is cheap beside a network pass and needs no communication. Rows differ
    between processes; `shared_int` is the same on all of them (what all ranks must agree on, such as a step index). Nothing is left to save for a resume.
    """

    def __init__(self, seed, it, batch, rank=0, world=1, device="cpu"):
        self.total, self.rows, self.device = batch, slice(rank * (batch // world), (rank + 1) * (batch // world)), device
        self.gen = torch.Generator(device).manual_seed(mix(seed, it, 1))
        self.cpu = torch.Generator().manual_seed(mix(seed, it, 2))

    def normal(self, *shape):  # [B_local, *shape] float32
        return torch.randn(self.total, *shape, generator=self.gen, device=self.device)[self.rows]

    def like(self, x):
        return self.normal(*x.shape[1:])

    def uniform(self):  # [B_local] float64 in [0, 1)
        return torch.rand(self.total, generator=self.gen, device=self.device, dtype=torch.float64)[self.rows]

    def integers(self, low, high):  # [B_local] int64 in low..high-1
        return torch.randint(low, high, (self.total,), generator=self.gen, device=self.device)[self.rows]

    def shared_int(self, low, high):  # python int in low..high-1, equal on all processes
        return int(torch.randint(low, high, (), generator=self.cpu))


class ImageNoise:
    """Noise of images i = first, first+step, ... where image i depends on (seed, i) only: the same picture for any batch or world size (EDM's rule).
    Call it once for z and once for every later draw: noise(shape) -> [n, *shape] float32 on `device`."""

    def __init__(self, seed, indices, device="cpu"):
        self.gens, self.device = [torch.Generator().manual_seed(mix(seed, i, 3)) for i in indices], device

    def __call__(self, *shape):
        return torch.stack([torch.randn(*shape, generator=g) for g in self.gens]).to(self.device)


# ---- weight average ---------------------------------------------------------------------------------------------------------------------


class EMA:
    """Average of a model's weights, fp32. `halflife` is in images; it is shortened to 5 % of the images seen so far, so that the average forgets the
    start early on (EDM's ramp-up). halflife 0: `.model` is the model itself. host: the average stays in the host's memory (--ema-cpu); weights are fetched
    after each update and blended by a thread of its own while the next iteration runs, and `.model` is a copy made when it is asked for."""

    def __init__(self, model, halflife, host=False):
        self.halflife, self.images, self.live, self.blending = halflife, 0, model, None
        self.twin = model.copy().requires_grad_(False) if halflife and not host else model
        self.host = [p.detach().to("cpu", torch.float32, copy=True) for p in model.parameters()] if halflife and host else []
        self.fetched = [torch.empty_like(h, pin_memory=torch.cuda.is_available()) for h in self.host]
        self.thread = ThreadPoolExecutor(1) if self.host else None

    def wait(self):
        if self.blending:
            self.blending.result()  # raises what went wrong there
        self.blending = None

    @property
    def model(self):
        if not self.host:
            return self.twin
        self.wait()
        twin = self.live.copy().requires_grad_(False)
        for p, h in zip(twin.parameters(), self.host, strict=True):
            p.copy_(h)
        return twin

    @torch.no_grad()
    def update(self, images):
        """To be called after a student update only: on other iterations the average would drift towards a student that did not move. images: of this update
        (Run.stepped); 0 changes nothing."""
        self.images += images
        if self.halflife and images:
            beta = 0.5 ** (images / max(min(self.halflife, 0.05 * self.images), 1e-8))
            if self.host:
                self.fetch(1 - beta)
            else:
                torch._foreach_lerp_(list(self.twin.parameters()), [p.float() for p in self.live.parameters()], 1 - beta)

    def fetch(self, share):
        self.wait()
        for to, p in zip(self.fetched, self.live.parameters(), strict=True):
            to.copy_(p, non_blocking=True)
        done = torch.cuda.current_stream().record_event() if torch.cuda.is_available() and torch.cuda.is_initialized() else None

        def blend():
            if done:
                done.synchronize()
            torch._foreach_lerp_(self.host, self.fetched, share)

        self.blending = self.thread.submit(blend)

    def state_dict(self):
        self.wait()
        average = dict(zip((name for name, _ in self.live.named_parameters()), self.host)) if self.host else {}
        return dict(images=self.images, model=(self.live.state_dict() | average if self.host else self.twin.state_dict()) if self.halflife else {})

    def load_state_dict(self, state):
        if not isinstance(state["images"], (int, float)) or not state["images"] >= 0:
            raise ValueError(f"average: expected a number of images, found {str(state['images'])[:80]}")
        self.images = state["images"]
        if self.host:
            self.wait()
            for (name, _), h in zip(self.live.named_parameters(), self.host, strict=True):
                h.copy_(state["model"][name])
        elif self.halflife:
            self.twin.load_state_dict(state["model"])


# ---- the run ----------------------------------------------------------------------------------------------------------------------------


def processes(args):
    """Device and process group of --device, --dtype and torchrun's environment -> rank, world, device, dtype of the network passes. UserError: no such device."""
    rank, world, cuda = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.is_available()
    if args.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device: expected auto, cpu or cuda, found {args.device}")
    if args.device == "cuda" and not cuda:
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu or install a CUDA build of torch")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda and args.device != "cpu" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if world > 1 and not dist.is_initialized():  # both backends: scalars that only the host needs go over gloo and never wait for the GPU
        where, restarts = {}, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        if restarts and os.environ.get("GROUP_WORLD_SIZE", "1") == "1":  # torchrun's store outlives its workers and still has the addresses of the
            # dead ones (pytorch issue 135712), so names are new after a restart. The count is per machine; on several, start torchrun with
            # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
            store = next(dist.rendezvous("env://", rank, world))[0]
            where = dict(store=dist.PrefixStore(f"restart_{restarts}", store), rank=rank, world_size=world)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=30), **where)
    return rank, world, device, torch.bfloat16 if args.dtype == "bf16" or (args.dtype == "auto" and device.type == "cuda") else torch.float32


def keep_heap():
    """glibc returns freed memory to the system and takes it back page by page, every iteration anew: without that a run on a CPU is some per cent faster."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # glibc only
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes free at the top of the heap before it is cut
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: smaller blocks come from the heap


class Run:
    """Processes, device, folder, log and checkpoints of one run. Attributes: rank, world, main (rank 0), device, dtype, out, batch (local), seconds.

    --accumulate N: the loop runs N times with the same number of the iteration, on one part of the batch after the other. Backward passes sum gradients, and
    what happens once per iteration waits for the last part: `step`, the average (`stepped` is 0 before), the all-reduce, the log, `due`."""

    def __init__(self, method, args):
        self.method, self.args = method, args
        if args.batch % ((world := int(os.environ.get("WORLD_SIZE", 1))) * args.accumulate):  # before the processes look for each other
            raise UserError(f"--batch {args.batch}: expected a multiple of the number of processes times --accumulate, found {world} x {args.accumulate}")
        if args.shard and world == 1:
            raise UserError("--shard: expected several processes to spread the weights over (torchrun --nproc_per_node=N), found one")
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is first used
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
        self.rank, self.world, self.device, self.dtype = processes(args)
        if self.device.type == "cpu":
            keep_heap()
        self.main, self.batch = self.rank == 0, args.batch // (self.world * args.accumulate)
        self.part, self.wrapped, self.values = 0, weakref.WeakSet(), []  # which part of an iteration's batch; DDP's modules; what the parts have logged
        device = self.device  # not self: a run that holds itself would keep its lock
        self.place = lambda module: module.to(device)  # what is trained goes through here, or through Model.copy and Model.extend
        if args.shard:
            from common.shard import Sharding  # a second's import
            self.place = Sharding(self.device)
        self.out = Path(args.out or ROOT / "out" / f"{method}-{Path(args.teacher).name}")
        self.start, self.past_seconds, self.stopping, self.bad, self.skipped, self.saved, self.record = time.monotonic(), 0.0, False, {}, 0, 0, {}
        # torchrun --max-restarts starts a failed worker again with the same flags: it goes on from the last checkpoint
        self.restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        self.resume_wanted = args.resume or self.restarted
        self.once(self.open_folder)
        if self.restarted and args.overwrite and (self.out / ".lock").read_text():
            self.resume_wanted = False  # the first attempt ended before it discarded the run that was here
        for sig in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sig, self.on_signal)

    @property
    def slot(self):
        """Which part of the global batch is at hand, and how many there are: each process has --accumulate of them."""
        return self.rank * self.args.accumulate + self.part, self.world * self.args.accumulate

    @property
    def last(self):
        return self.part == self.args.accumulate - 1

    @property
    def stepped(self):
        """Images of the step that this part ends with; 0 where gradients are still being summed."""
        return self.args.batch * self.last

    def once(self, fn):
        """fn() on rank 0; a UserError or RunError there is raised on every rank, so that none waits for a process that has ended."""
        error = None
        if self.main:
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
            raise UserError(f"--out {self.out}: expected a folder that can be written, found: {e.strerror}") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--out {self.out}: another run is writing here; choose another folder or wait for it") from None
        for litter in [p for pattern in ("*.json*.tmp", "pairs-*/*.tmp", "ckpt/*.tmp", "samples/*.tmp", "student/**/*.tmp") for p in self.out.glob(pattern)]:
            litter.unlink()  # left by a run that was killed while writing
        self.lock.seek(0)
        if self.restarted and "holds a run" in (left := self.lock.read()):
            raise UserError(left)
        refusal = ""
        if not self.resume_wanted and (old := self.checkpoints()):
            refusal = f"--out {self.out}: holds a run at iteration {int(old[-1].stem[3:])}; add --resume, --overwrite or another --out"
        if not self.restarted:
            self.mark("to be discarded" if refusal and self.args.overwrite else refusal)
        if refusal and not self.args.overwrite:
            raise UserError(refusal)
        if self.args.resume and not self.checkpoints():
            raise UserError(f"--resume: no checkpoint in {self.out / 'ckpt'}")

    def mark(self, text):
        """What torchrun's next attempts must know of this one, since to them every checkpoint looks like one of their own."""
        if "TORCHELASTIC_RESTART_COUNT" not in os.environ:
            return
        self.lock.truncate(0)
        self.lock.write(text)
        self.lock.flush()

    def clear(self):
        """Removes what an earlier run left. Called when nothing can be wrong with the flags any more, so that a typo beside --overwrite costs nothing."""
        results = ("ckpt/it-*", "samples/[0-9]*.png", "metrics.json", "control.json", "path.json", "student/**/*.json", "student/**/*.safetensors") if self.args.overwrite else ()
        for path in [p for pattern in ("log.jsonl", "eval.jsonl", "run.jsonl", *results) for p in self.out.glob(pattern)]:
            path.unlink()
        self.mark("")

    def note_start(self, first):
        """A line of run.jsonl for each start: all that it takes to do it again."""
        self.revision, versions = revision(), dict(python=sys.version.split()[0])
        for name in ("torch", "numpy", "diffusers", "transformers", "peft", "safetensors"):
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name)
        line = dict(first=first, date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), method=self.method, command=sys.argv,
                    flags=vars(self.args), processes=self.world, device=str(self.device), revision=self.revision, versions=versions)
        before = path.read_text() if (path := self.out / "run.jsonl").exists() else ""
        with atomic(path) as f:
            f.write((before + json.dumps(line) + "\n").encode())

    def on_signal(self, signum, frame):
        if self.stopping and signum == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the checkpoint
        self.stopping = signum

    def print(self, *text):
        if self.main:
            print(*text, flush=True)

    def warn(self, text):
        if self.main:
            tqdm.write(f"{self.method}: {text}", file=sys.stderr)

    @property
    def seconds(self):
        return self.past_seconds + time.monotonic() - self.start  # a clock that is set does not touch it

    def text(self):
        """What load_teacher needs for a pipeline."""
        a = self.args
        return dict(prompts=a.prompts, cache=a.cache_prompts, size=a.size, frames=a.frames, guidance=a.embedded_guidance, data=a.data, say=self.print, once=self.once)

    def loading(self, students=1, critics=0, averages=0, single=False):
        """What load_teacher needs beside device and dtype. The numbers, for the estimate of memory: networks of the teacher's size that the script makes.
        single: its students are one network each, also where the teacher is several experts."""
        return dict(text=self.text(), place=self.place, budget=lambda **sizes: self.budget(students, critics, averages, **sizes, single=single))

    # -- memory

    def budget(self, students, critics, averages, network, width, vae=0, experts=1, single=False):
        """Before anything big is loaded: what the networks will take, refused with advice if the device has less. network, vae: parameters, of all experts
        together; width: bytes of one in frozen networks."""
        a, ways = self.args, self.world if self.args.shard else 1
        students = students / experts if single else students
        full = lambda n, lora: 0 if lora else n * network * 16 / ways  # fp32 weights, gradients, two moments; adapters are small beside the network
        total, free = self.memory("memory, estimated", {
            "teacher": network * width / ways, "students": full(students, vars(a).get("lora")), "critics": full(critics, vars(a).get("lora_fake")),
            "averages": (averages + students * (bool(a.ema) and not a.ema_cpu)) * network * 4 / ways * (not vars(a).get("lora")), "VAE": vae * width})
        if total > free:
            ways_out = [flag for flag, given in (("--lora RANK", vars(a).get("lora", True)), ("--shard on more processes", False), ("--ema-cpu", a.ema_cpu or not a.ema))
                        if not given]
            raise UserError(f"--teacher {a.teacher}: its networks need {size(total)}, activations not included, found {size(free)} free on {self.device} for a process; "
                            f"try {', '.join(ways_out)} (--grad-checkpoint and a smaller --batch lower activations only)")

    def memory(self, name, parts):
        """Prints bytes by part, of one process -> their sum, and what the device has free."""
        total, free = sum(parts.values()), self.free_memory()
        self.print(f"  {name:22s} {', '.join(f'{k} {size(v)}' for k, v in parts.items() if v)}: {size(total)}, {size(free)} free; activations come on top")
        return total, free

    def rehearse(self, graph, facts):
        """Makes the largest backward of the script once, on zeros, and prints the peak of memory to expect: that of the rehearsal and what the optimisers will
        add. What does not fit ends here and not in the first step. graph: networks that this backward goes through, {name: how many batches, or a function
        of a batch}, first the one that is trained; the others are asked about its output. The teacher is asked without gradient while the graph is alive."""
        n, cond, nets = self.batch, facts["teacher"].encode([0]), [value for value in facts.values() if isinstance(value, torch.nn.Module)]
        x, outs = torch.zeros(n, *facts["teacher"].shape, device=self.device), []
        ask = lambda name, k, x: getattr(facts[name], "fake", facts[name]).rehearsal(torch.cat([x] * k), cond)  # a Critic's passes are those of its network
        for name, k in graph.items():
            outs.append(k(outs[0][:n]) if callable(k) else ask(name, k, outs[0][:n] if outs else x))
        with torch.no_grad():
            ask("teacher", 1 if self.args.cfg in (None, 1) else 2, x)
        sum(out.sum() for out in outs).backward()
        trained = {p for net in nets for p in net.parameters() if p.requires_grad}
        coming = sum((p.to_local() if hasattr(p, "to_local") else p).numel() * (8 if p.grad is not None else 12) for p in trained)  # two moments, and the gradient
        for p in trained:
            p.grad = None
        here, margin = self.peak_mb() * 2**20, 1.08 if self.device.type == "cpu" else 1.0  # on CPUs gaps in the heap, measured: docs/RESULTS.md
        if coming > self.free_memory():
            raise UserError(f"--teacher {self.args.teacher}: gradients and optimisers need {size(coming)} more, found {size(self.free_memory())} free on {self.device}; "
                            f"try --lora RANK, --shard on more processes")
        self.print(f"  {'memory, peak':22s} {(here + coming) * margin / 2**20:.0f} MB expected: {size(here)} in a rehearsal of the largest backward, {size(coming)} to come"
                   + ", gaps" * (margin > 1))

    def free_memory(self):
        """Bytes that this process can still have: of the GPU, or its share of the machine's available memory."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
        available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")] or [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
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
        idle = any(hasattr(m, "experts") for m in model.modules())  # models.Routed: an iteration may have no sample for one of its experts
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames broadcast_buffers; 2.6 knows only the old name
            model = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True,
                                                              find_unused_parameters=idle)
        self.wrapped.add(model)
        return model

    def average_gradients(self, params):
        """Gradients become their means over the processes, by one all-reduce. For networks that `train` did not wrap: forward-mode derivatives go around
        DDP's hooks. To be called between backward and `step`, on all processes, which must have gradients for the same parameters."""
        grads = [p.grad for p in params if p.grad is not None]
        if self.world == 1 or not grads or not self.last or self.args.shard:  # sharded gradients are means already
            return
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= self.world
        torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads)])

    def describe(self, images=None, graph=None, **facts):
        """Prints everything derived from the flags before the first step. Models appear as parameters (trained / frozen). images: those that the losses look
        at, if any. graph: of `rehearse`. What a comparison of methods asks for is kept for the student's record."""
        self.record = dict(images=len(images or ()), passes_per_iteration=facts.get("passes_per_iteration"), networks={})
        facts |= dict(images=len(images)) if images else {}
        if self.args.cfg not in (None, 1) and "teacher" in facts:
            facts["teacher"].null(1)  # a teacher without a null label says so here
        self.print(f"{self.method}: teacher {self.args.teacher}, device {self.device}, {str(self.dtype)[6:]} passes, {self.world} process(es) x {self.batch} samples"
                   + f" x {self.args.accumulate} parts" * (self.args.accumulate > 1))
        parts, seen = {}, set()  # weights that networks share count once
        for name, value in facts.items():
            if isinstance(value, torch.nn.Module):
                p = list(value.parameters())
                trained = sum(q.numel() for q in p if q.requires_grad)
                self.record["networks"] |= {name: trained} if trained else {}
                mine = [(q.to_local() if self.args.shard and hasattr(q, "to_local") else q, q.requires_grad) for q in p if id(q) not in seen]
                seen |= {id(q) for q in p}
                parts[name] = sum(q.numel() * (q.element_size() + 12 * train) for q, train in mine)  # gradient and two moments, fp32
                base = sum({id(t): t.numel() for m in value.modules() for t in vars(m).get("base", [])}.values())  # of networks with adapters: the teacher's
                value = f"{sum(q.numel() for q in p) / 1e6:.2f}M parameters, {'trained' if trained else 'frozen'}" + f", on {base / 1e6:.2f}M of the teacher's, frozen" * (base > 0)
            self.print(f"  {name.replace('_', ' '):22s} {value}")
        self.memory("memory, networks", parts)
        self.rehearse(graph or dict(student=1), facts)
        self.print(f"  {'folder':22s} {self.out}")

    def draw(self, it):
        """Random numbers of iteration it. The global generator (dropout and the like) is re-seeded too, so that a resume needs no RNG state."""
        torch.manual_seed(mix(self.args.seed, it, 4, self.slot[0]))
        return Draw(self.args.seed, it, self.args.batch, *self.slot, self.device)

    def set_rates(self, it, *pairs, span=None):
        """Learning rates of iteration it: linear --warmup from lr / warmup, then constant, then linear over the last --cooldown share to 0. pairs: (optimiser, lr).
        span: first iteration and the one after the last of the stage that `it` belongs to, for a run whose stages each have their own; default the whole run."""
        args, (first, last) = self.args, span or (0, self.args.iters)
        decay = min(1.0, (it - first + 1) / max(args.warmup, 1)) * min(1.0, (1 - (it - first) / (last - first)) / max(args.cooldown, 1e-9))
        for opt, lr in pairs:
            for group in opt.param_groups:
                group["lr"] = lr * decay

    def step(self, opt, clip):
        """Clip the gradients of what `opt` trains to global norm `clip`, step, zero. A non-finite gradient skips the step, counted, without waiting for the
        device. -> norm (0-d tensor); None where gradients are still being summed over parts of the batch."""
        if not self.last:
            return None
        grads = [p.grad for group in opt.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, foreach=True) / self.args.accumulate  # the sum is now a mean
        norm = norm.full_tensor() if self.args.shard else norm
        bad = 1 - norm.isfinite().float()
        # fused optimisers divide by grad_scale on their way, and leave weights and moments alone where found_inf is 1
        opt.grad_scale, opt.found_inf = ((norm / clip).clamp(min=1) * self.args.accumulate).float(), bad
        opt.step()
        opt.zero_grad(set_to_none=True)
        self.bad[id(opt)] = (self.bad.get(id(opt), 0) + bad) * bad  # in a row, for each network: a healthy critic must not hide a broken student
        self.skipped = self.skipped + bad
        return norm

    # -- loop

    def loop(self, first, last):
        """Iteration numbers first..last-1 with a progress bar. Ends early (all processes at the same iteration) after SIGTERM or Ctrl-C."""
        quiet = not sys.stderr.isatty()
        self.bar = tqdm(range(first, last), initial=first, total=last, disable=not self.main, mininterval=10 if quiet else 0.2,
                        maxinterval=30 if quiet else 10, desc=self.method, unit="it", smoothing=0.05)
        for it in self.bar:
            for self.part in range(self.args.accumulate):
                for model in self.wrapped:
                    model.require_backward_grad_sync = self.last  # as DDP's no_sync
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
        self.values.append({k: v.detach().float().reshape(()).cpu() if torch.is_tensor(v) else torch.tensor(float(v)) for k, v in values.items() if v is not None})
        if not self.last:
            return
        values = {k: torch.stack([part[k] for part in self.values if k in part]).mean() for k in self.values[-1]}
        self.values = []
        flat = torch.stack(list(values.values()))
        if self.world > 1:
            dist.all_reduce(flat)
            flat /= self.world
        bad, skipped = max(map(int, self.bad.values()), default=0), int(self.skipped)
        if bad >= STOP_AFTER_BAD:
            raise RunError(f"the gradient was not finite in {bad} steps in a row (iteration {it}); last checkpoint: {(self.checkpoints() or ['none'])[-1]}")
        if not self.main:
            return
        images = (it + 1) * self.args.batch
        now, last = self.seconds, getattr(self, "last_log", None)
        rate = (images - last[0]) / max(now - last[1], 1e-9) if last else float("nan")
        self.last_log = (images, now)
        clock = dict(seconds=round(now, 2), images_per_s=None if rate != rate else round(rate, 1), peak_mb=round(self.peak_mb()))
        number = lambda v: float(f"{float(v):.6g}") if math.isfinite(v) else None  # JSON has no nan
        line = dict(it=it, images=images, skipped=skipped, **{k: number(v) for k, v in zip(values, flat)}, time=clock)
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
        return bool(every) and self.last and (it + 1) % every == 0

    # -- checkpoints: everything a resume needs. Random numbers need no state (Draw), data order is a function of the iteration.

    def checkpoints(self):
        return sorted(p for p in (self.out / "ckpt").glob("it-*.pt") if p.stem[3:].isdigit())

    def header(self):
        alphas = [f"{spec['alpha']:g}" for spec in (vars(self.args).get("lora"), vars(self.args).get("lora_fake")) if spec]  # no shape tells them apart
        return dict(method=self.method, teacher=Path(self.args.teacher).name + (f", --lora-alpha {', '.join(alphas)}" if alphas else ""))

    def save(self, it, state):
        """After iteration it: state = {name: object with state_dict()}. Written to a temporary name, fsync'ed, renamed; the two newest are kept."""
        state = {k: v.state_dict() for k, v in state.items()} if self.main or self.args.shard else {}
        if self.args.shard:  # the checkpoint is that of whole networks: any number of processes goes on from it, with --shard or without
            from common.shard import gather
            state = gather(state, self.main)
        if self.main:
            log, path = self.out / "log.jsonl", self.out / "ckpt" / f"it-{it + 1:08d}.pt"
            try:
                with open(log, "a") as f:
                    os.fsync(f.fileno())
                payload = dict(header=self.header(), it=it + 1, seconds=self.seconds, log_bytes=log.stat().st_size, skipped=int(self.skipped), state=state)
                with atomic(path) as f:
                    torch.save(payload, f)
            except (OSError, RuntimeError) as e:  # RuntimeError: how torch.save reports a full disk
                self.warn(f"checkpoint at iteration {it + 1} not written ({reason(e)}); the previous one is intact")
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
                with zipfile.ZipFile(path) as z:  # torch does not look at the checksums that it writes
                    if (part := z.testzip()) is not None:
                        raise zipfile.BadZipFile(part)
                payload = torch.load(path, map_location="cpu", weights_only=True, mmap=self.args.shard)  # no pickled code is ever run
            except Exception as e:  # torch raises many kinds for a damaged file; the reason is shown and the older checkpoint tried
                self.warn(f"{path}: not readable ({type(e).__name__}), trying the one before")
                unreadable.append(path)
                continue
            found, expected = payload.get("header") if isinstance(payload, dict) else None, self.header()
            if found != expected:
                raise UserError(f"--resume {self.out}: expected a run of {expected['method']} on {expected['teacher']}, found {' '.join(str(found).split())[:200]}")
            try:
                counters = it, skipped, log_bytes, seconds = [payload[k] for k in ("it", "skipped", "log_bytes", "seconds")]
                if not all(isinstance(v, int) for v in counters[:3]) or not all(0 <= v < float("inf") for v in counters):
                    raise ValueError(f"expected counters >= 0, found {str(counters)[:100]}")
                for name, part in state.items():
                    part.load_state_dict(self.own(part, payload["state"][name]))
                    for p, moments in part.state.items() if isinstance(part, torch.optim.Optimizer) else ():  # which torch does not compare
                        if any(v.shape != (() if k == "step" else p.shape) for k, v in moments.items()) or not {"step", "exp_avg", "exp_avg_sq"} <= set(moments):
                            raise ValueError(f"{name}: expected moments of shape {list(p.shape)}, found others")
            except torch.OutOfMemoryError:
                raise
            except (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError) as e:
                raise UserError(f"--resume {path}: does not fit the networks of these flags: {reason(e)}") from None
            self.past_seconds, self.skipped, self.saved = seconds, skipped, it
            self.once(lambda: (self.rewind(log_bytes, unreadable), self.note_start(it)))
            self.print(f"resumed {path.name}")
            return it
        if self.args.resume:
            raise UserError(f"--resume: no readable checkpoint in {self.out / 'ckpt'}")
        self.once(lambda: (self.clear(), self.note_start(0)))
        return 0

    def own(self, part, state):
        """This process's part of an optimiser's state; networks see to it themselves."""
        if not (self.args.shard and isinstance(part, torch.optim.Optimizer)):
            return state
        from common.shard import take_optimiser
        return take_optimiser(part, state)

    def rewind(self, log_bytes, unreadable):
        """The log back to the length it had at the checkpoint; damaged checkpoints out of the way, so that they do not count as the newest."""
        log = self.out / "log.jsonl"
        if log.exists():
            os.truncate(log, min(log_bytes, log.stat().st_size))
        for path in unreadable:
            path.rename(f"{path}.unreadable")
        for old in self.checkpoints()[:-2]:  # death came after a new one was there and before the oldest was gone
            old.unlink()

    def finish(self, it, state):
        """Last checkpoint, after iteration it. A run that a signal ended leaves here: exit code 143 (SIGTERM) or 130 (Ctrl-C)."""
        if self.saved != it + 1:
            self.save(it, state)
        if self.stopping:
            self.warn(f"stopped by {signal.Signals(self.stopping).name} after iteration {it + 1}; go on with --resume")
            raise SystemExit(128 + self.stopping)


@contextlib.contextmanager
def atomic(path):
    """A binary file that appears under its name complete or not at all: temporary name, fsync, rename, fsync of the folder."""
    tmp = Path(f"{path}.{os.urandom(4).hex()}.tmp")  # another run may be writing the same file of a cache
    try:
        with open(tmp, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
        fd = os.open(Path(path).parent, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    finally:
        tmp.unlink(missing_ok=True)


def write_json(path, value):
    with atomic(path) as f:
        f.write((json.dumps(value, indent=1) + "\n").encode())


def read_json(path, what="file"):
    """Dict of a JSON file. UserError if it is missing, not JSON or not an object."""
    try:
        value = json.loads(Path(path).read_text())
    except OSError as e:
        raise UserError(f"{what} {path}: {e.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{what} {path}: expected JSON, found something else") from None
    if not isinstance(value, dict):
        raise UserError(f"{what} {path}: expected a JSON object, found {type(value).__name__}")
    return value


def revision():
    """Commit of the code, '+' appended when the tree differs from it; 'unknown' outside git."""
    git = lambda *a: subprocess.run(["git", "-C", str(ROOT), *a], capture_output=True, text=True)
    try:
        head = git("rev-parse", "--short=10", "HEAD")
        return head.stdout.strip() + ("+" if git("status", "--porcelain").stdout.strip() else "") if head.returncode == 0 else "unknown"
    except OSError:
        return "unknown"


# ---- pictures ---------------------------------------------------------------------------------------------------------------------------


def save_grid(path, rows, scale=None):
    """PNG of captioned rows. rows: list of (caption, uint8 [n, C, H, W], C 1 or 3). Small images are enlarged by whole pixels."""
    from PIL import Image, ImageDraw
    side = rows[0][1].shape[-1]
    scale = scale or max(1, 64 // side)
    pad, text = 2, 14
    n, (h, w) = max(len(r[1]) for r in rows), (rows[0][1].shape[-2] * scale, side * scale)
    sheet = Image.new("RGB", (n * (w + pad) + pad, len(rows) * (h + text + pad) + pad), "white")
    pen = ImageDraw.Draw(sheet)
    for r, (caption, images) in enumerate(rows):
        top = pad + r * (h + text + pad)
        pen.text((pad, top), caption, fill="black")
        for i, img in enumerate(images):
            a = img.cpu().expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
            sheet.paste(Image.fromarray(a).resize((w, h), Image.NEAREST), (pad + i * (w + pad), top + text))
    with atomic(path) as f:
        sheet.save(f, "PNG")
