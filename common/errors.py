"""Mistakes of the user and faults of a run: one line each and an exit code, no traceback."""

import difflib
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError


class UserError(Exception):
    """A mistake of the user: names the flag or file, what was expected and found. Exit code 2."""


class RunError(Exception):
    """A fault of the run (gradients not finite, disk full). Exit code 1; checkpoints stay."""


class Interrupted(KeyboardInterrupt):
    """A signal that ends the process at once. signum: its number. Exit code 128 + signum."""

    def __init__(self, signum, message):
        super().__init__(message)
        self.signum = signum


def require(condition, message):
    """UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def launch(main):
    """Runs a script's main() and ends the process.

    Exit codes: 0 done, 1 fault of the run, 2 mistake of the user, 128 + n signal n. An exception
    that none of these explains keeps its traceback.

    Of several processes each prints what only it has seen, with its rank and machine. Before they
    meet, all of a machine see the same (flags, files), and the first of them prints it.
    """
    code = 0
    line = None
    silent = False
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be valid text
        main()
    except (UserError, RunError) as e:
        code, line = 2 if isinstance(e, UserError) else 1, str(e)
        known_to_all = getattr(e, "on_all_ranks", False)
        silent = rank > 0 and (known_to_all or (local_rank > 0 and not dist.is_initialized()))
    except KeyboardInterrupt as e:
        code, line = 128 + getattr(e, "signum", signal.SIGINT), str(e) or "interrupted"
        silent = rank > 0  # the launcher sends signals to every process
    except (OSError, RuntimeError, MemoryError, SafetensorError) as e:
        code, line = 1, explain_fault(e)
        if line is None:
            raise
    finally:
        if line is not None and not silent:
            if rank > 0:
                wait_for_rank0(local_rank)
                line = f"rank {rank} on {socket.gethostname()}: {line}"
            print(f"{Path(sys.argv[0]).name}: {' '.join(line.split())}", file=sys.stderr)
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(code)


def wait_for_rank0(local_rank):
    """Waits until rank 0 has printed a mistake that every rank makes.

    torchrun ends all processes when one has ended, so this one does not return if rank 0 made the
    same mistake. On other machines, local rank 0 is the one that prints.
    """
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_DFL)
    time.sleep(1 if local_rank == 0 else 2)


OUT_OF_MEMORY = (
    "out of memory: lower --batch (during an evaluation: --eval-n), "
    "or add --accumulate N, --grad-checkpoint, --lora RANK or --shard"
)
NO_DETERMINISTIC_FORM = (
    "--deterministic: an operation of this run has no deterministic implementation; drop the flag"
)
PROCESS_LOST = (
    "another process of this run is gone, its own line (rank N) may say why; "
    "torchrun --max-restarts resumes by itself, else --resume"
)
EXPLANATIONS = {  # text in torch's messages -> what it means
    "out of memory": OUT_OF_MEMORY,
    "can't allocate memory": OUT_OF_MEMORY,
    "not enough memory": OUT_OF_MEMORY,
    "ALLOC_FAILED": OUT_OF_MEMORY,
    "deterministic implementation": NO_DETERMINISTIC_FORM,
    "Deterministic behavior was enabled": NO_DETERMINISTIC_FORM,
    "gloo": PROCESS_LOST,
    "NCCL": PROCESS_LOST,
    "Connection closed by peer": PROCESS_LOST,
    "Connection reset by peer": PROCESS_LOST,
}


def explain_fault(e):
    """One line for a fault outside the code (memory, disk, another process); None for any other."""
    if isinstance(e, MemoryError):
        return OUT_OF_MEMORY
    for text, meaning in EXPLANATIONS.items():
        if text in str(e):
            return f"{meaning} ({first_line(e)[:200]})"
    if isinstance(e, (OSError, SafetensorError)):
        return f"file not written or not read: {first_line(e)}"
    return None


def first_line(e):
    """First line of an exception's message, or the name of its class if it has none."""
    lines = str(e).strip().splitlines()
    return lines[0] if lines else type(e).__name__


def describe(e, limit=200):
    """Kind and message of an exception in one line, e.g. "KeyError: 'beta_start'"."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:limit]}"


def did_you_mean(word, known):
    """', did you mean X?' with the nearest of the known names, or ''."""
    hits = difflib.get_close_matches(str(word), list(known), n=3, cutoff=0.5)
    return f", did you mean {' or '.join(hits)}?" if hits else ""
