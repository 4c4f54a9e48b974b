"""Errors of the user and of the run, each reported as one line with an exit code."""

import difflib
import os
import sys
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError


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
        code, line = (
            2 if isinstance(e, UserError) else 1,
            str(e) if int(os.environ.get("RANK", 0)) == 0 else None,
        )
    except KeyboardInterrupt:
        code, line = 130, "interrupted"
    except (OSError, RuntimeError, MemoryError, SafetensorError) as e:
        code, line = 1, explain_fault(e)
        if line is None:
            raise
    finally:
        if line is not None:
            print(f"{Path(sys.argv[0]).name}: {' '.join(line.split())}", file=sys.stderr)
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(code)


EXPLANATIONS = (  # words in the messages of torch, and what they mean
    (
        ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED"),
        "out of memory: lower --batch (if it happened while measuring: --eval-n), or add --accumulate N, --grad-checkpoint, --lora RANK or --shard",
    ),
    (
        ("deterministic implementation", "Deterministic behavior was enabled"),
        "--deterministic: an operation of this run has no deterministic form here; leave it out",
    ),
    (
        ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer"),
        "another process of this run is gone; torchrun --max-restarts goes on alone, else --resume",
    ),
)


def explain_fault(e):
    """One line for a fault that is no mistake of the code: memory, disk, another process. None: it may be one."""
    if isinstance(e, MemoryError):
        return EXPLANATIONS[0][1]
    meaning = [
        f"{text} ({first_line(e)[:200]})"
        for words, text in EXPLANATIONS
        if any(w in str(e) for w in words)
    ]
    return (
        meaning[0]
        if meaning
        else f"file not written or not read: {first_line(e)}"
        if isinstance(e, (OSError, SafetensorError))
        else None
    )


def first_line(e):
    """First line of an exception's message; its kind if it has none."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


def describe(e, limit=200):
    """Kind and message of an exception in one line, e.g. "KeyError: 'beta_start'"."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:limit]}"


def did_you_mean(word, known):
    """', did you mean X?' for the nearest known names, or ''."""
    hits = difflib.get_close_matches(str(word), list(known), n=3, cutoff=0.5)
    return f", did you mean {' or '.join(hits)}?" if hits else ""
