"""Checkpoints: ckpt/it-XXXXXXXX.pt holds everything that a resume needs.

Random numbers and the order of the data need no state: they are functions of the iteration.
"""

import zipfile

import torch

from common.errors import UserError, first_line
from common.files import atomic

KEPT = 2  # checkpoints


def list_checkpoints(out):
    """Checkpoints of a run folder, the oldest first."""
    return sorted(p for p in (out / "ckpt").glob("it-*.pt") if p.stem[3:].isdigit())


def write_checkpoint(out, it, payload):
    """Writes the checkpoint of `it` complete iterations and deletes the oldest ones. OSError or
    RuntimeError (how torch.save reports a full disk): the older checkpoints are intact."""
    with atomic(out / "ckpt" / f"it-{it:08d}.pt") as f:
        torch.save(payload, f)
    delete_oldest(out)


def delete_oldest(out):
    for old in list_checkpoints(out)[:-KEPT]:
        old.unlink()


def read_newest(out, mmap, warn):
    """The newest checkpoint that can be read: path and payload, None and None if there is none;
    and the paths of newer ones that are damaged. warn(text) is called for each of these."""
    damaged = []
    for path in reversed(list_checkpoints(out)):
        try:
            return path, read_checkpoint(path, mmap), damaged
        except Exception as e:  # torch raises many kinds of errors for a damaged file
            warn(f"{path}: not readable ({type(e).__name__}), trying the one before")
            damaged.append(path)
    return None, None, damaged


def read_checkpoint(path, mmap=False):
    with zipfile.ZipFile(path) as z:  # torch does not verify the checksums that it writes
        damaged = z.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(damaged)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def check_header(payload, expected, out):
    """UserError if a checkpoint is not of this run. expected: its method and its teacher."""
    found = payload.get("header") if isinstance(payload, dict) else None
    if found != expected:
        raise UserError(
            f"--resume {out}: expected a run of {expected['method']} on {expected['teacher']}, "
            f"found {' '.join(str(found).split())[:200]}"
        )


def load_checkpoint(path, payload, state, own_part=lambda part, saved: saved):
    """Loads a payload into `state`, {name: object with load_state_dict()}.

    own_part: function (object, its saved state) -> what this process loads. Returns the counters
    of `read_counters`. UserError if the state is not that of these networks.
    """
    try:
        counters = read_counters(payload)
        read_values(payload)
        for name, part in state.items():
            part.load_state_dict(own_part(part, payload["state"][name]))
            if isinstance(part, torch.optim.Optimizer):
                check_moments(name, part)
        return counters
    except torch.OutOfMemoryError:
        raise
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError) as e:
        reason = first_line(e)
        raise UserError(
            f"--resume {path}: does not fit the networks of these flags: {reason}"
        ) from None


def read_counters(payload):
    """(iterations, skipped steps, length of the log in bytes, seconds), checked. ValueError."""
    counters = [payload[name] for name in ("it", "skipped", "log_bytes", "seconds")]
    whole = all(isinstance(v, int) for v in counters[:3])
    if not whole or not all(0 <= v < float("inf") for v in counters):
        raise ValueError(f"expected counters >= 0, found {str(counters)[:100]}")
    return counters


def read_values(payload):
    """Logged values that no line of the log has shown yet, {name: float}, checked. ValueError."""
    values = payload.get("values", {})
    if not isinstance(values, dict) or not all(isinstance(v, float) for v in values.values()):
        raise ValueError(f"expected logged values, found {str(values)[:100]}")
    return values


def check_moments(name, opt):
    """ValueError if moments do not have their parameters' shapes, which torch does not compare."""
    for p, moments in opt.state.items():
        complete = {"step", "exp_avg", "exp_avg_sq"} <= set(moments)
        shapes = {key: () if key == "step" else p.shape for key in moments}
        if not complete or any(v.shape != shapes[key] for key, v in moments.items()):
            raise ValueError(f"{name}: expected moments of shape {list(p.shape)}, found others")
