"""Checkpoints: ckpt/it-XXXXXXXX.pt holds everything that a resume needs.

Random numbers and the order of the data need no state: they are functions of the iteration.
"""

import contextlib
import json
import zipfile

import torch

from common.errors import UserError, first_line
from common.files import atomic

KEPT = 2  # newest checkpoints; the best one is kept as well
EVALUATED = 1000  # samples of an evaluation by --eval-every: scores of equal numbers are compared
SCORES = ("fid", "fd", "energy_distance")
COUNTERS = ("it", "images", "skipped", "log_bytes", "seconds")
MISFITS = (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError)
OPTIONS = {"params", "lr", "betas", "eps", "weight_decay"}  # that every group of AdamW has


def list_checkpoints(out):
    """Checkpoints of a run folder, the oldest first."""
    return sorted(p for p in (out / "ckpt").glob("it-*.pt") if p.stem[3:].isdigit())


def iterations_of(path):
    """Iterations that a checkpoint has, by its name."""
    return int(path.stem[3:])


def write_checkpoint(out, it, payload):
    """Writes the checkpoint of `it` complete iterations and deletes the oldest ones. OSError or
    RuntimeError (how torch.save reports a full disk): the older checkpoints are intact."""
    with atomic(out / "ckpt" / f"it-{it:08d}.pt") as f:
        torch.save(payload, f)
    delete_oldest(out)


def delete_oldest(out):
    """All but the KEPT newest and the best one."""
    best = best_checkpoint(out)
    for old in list_checkpoints(out)[:-KEPT]:
        if old != best:
            old.unlink()


def best_checkpoint(out):
    """Path of the checkpoint with the lowest score in eval.jsonl; None if none was evaluated."""
    paths = {iterations_of(path): path for path in list_checkpoints(out)}
    scores = {it: score for it, score in read_scores(out).items() if it in paths}
    return paths[min(scores, key=scores.get)] if scores else None


def read_scores(out):
    """{iteration: score} of the evaluations that --eval-every made. The score is the first metric
    of SCORES that they have; lower is better."""
    path = out / "eval.jsonl"
    scores = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        # the last one may be half a line
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            values = [row[name] for name in SCORES if row.get(name) is not None]
            if row["n"] == EVALUATED and values:
                scores[row["it"]] = float(values[0])
    return scores


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


def check_header(payload, expected, out, hint=""):
    """UserError if a checkpoint is not of this run. expected: its method and its teacher. hint:
    ends the line."""
    found = payload.get("header") if isinstance(payload, dict) else None
    if found != expected:
        raise UserError(
            f"--resume {out}: expected a run of {expected['method']} on {expected['teacher']}, "
            f"found {' '.join(str(found).split())[:200]}{hint}"
        )


@contextlib.contextmanager
def misfits(path, hint=""):
    """Raises what is wrong with a checkpoint's contents as one UserError. hint: ends its line."""
    try:
        yield
    except MISFITS as e:
        raise UserError(
            f"--resume {path}: does not fit the networks of these flags: {describe_misfit(e)}{hint}"
        ) from None


def describe_misfit(e):
    """One line. Raises an error of full memory, a RuntimeError that says nothing about files."""
    if isinstance(e, torch.OutOfMemoryError):
        raise e
    return f"no entry {e}" if isinstance(e, KeyError) else first_line(e)


def load_state(saved, state, own_part=lambda part, saved: saved):
    """Loads states {name: state_dict} into `state`, {name: object with load_state_dict()}.

    own_part: function (object, its saved state) -> what this process loads. Raises what `misfits`
    reports, with the name of the object.
    """
    others = sorted(set(saved) ^ set(state))
    if others:
        where = "the checkpoint" if others[0] in saved else "this run"
        raise ValueError(f"{others[0]}: only {where} has it")
    for name, part in state.items():
        try:
            load_part(part, own_part(part, saved[name]))
        except MISFITS as e:
            raise ValueError(f"{name}: {describe_misfit(e)}") from None


def load_part(part, saved):
    """Loads one object. ValueError or what load_state_dict raises if the state is not its own."""
    if isinstance(part, torch.nn.Module):
        check_tensors(part.state_dict(), saved)
    if not isinstance(part, torch.optim.Optimizer):
        part.load_state_dict(saved)
        return
    # Rates and the like follow from the flags, which may have changed.
    options = [{k: v for k, v in group.items() if k != "params"} for group in part.param_groups]
    for group in saved["param_groups"]:
        missing = sorted(OPTIONS - set(group))
        if missing:
            raise ValueError(f"no entry {missing[0]!r} in param_groups")
    part.load_state_dict(saved)
    for group, own in zip(part.param_groups, options):
        group.update(own)
    check_moments(part)


def check_tensors(own, saved, where="the checkpoint"):
    """ValueError that names the first tensor which only one of two state_dicts has, or whose shape
    differs. where: what `saved` is from."""
    for name in own:
        if name not in saved:
            raise ValueError(f"{name}: {where} has no such tensor")
        expected, found = list(own[name].shape), list(saved[name].shape)
        if expected != found:
            raise ValueError(f"{name}: expected shape {expected}, found {found} in {where}")
    for name in saved:
        if name not in own:
            raise ValueError(f"{name}: the network has no such tensor, {where} has")


def read_counters(payload):
    """{it, images, skipped, log_bytes, seconds} of a payload: iterations, images that the student
    was trained for, skipped steps, length of the log, seconds. ValueError."""
    counters = {name: payload[name] for name in COUNTERS}
    whole = all(isinstance(v, int) for name, v in counters.items() if name != "seconds")
    if not whole or not all(0 <= v < float("inf") for v in counters.values()):
        raise ValueError(f"expected counters >= 0, found {str(list(counters.values()))[:100]}")
    return counters


def read_values(payload):
    """Logged values that no line of the log has shown yet, {name: float}, checked. ValueError."""
    values = payload.get("values", {})
    if not isinstance(values, dict) or not all(isinstance(v, float) for v in values.values()):
        raise ValueError(f"expected logged values, found {str(values)[:100]}")
    return values


def check_moments(opt):
    """ValueError if moments do not have their parameters' shapes, which torch does not compare."""
    for p, moments in opt.state.items():
        complete = {"step", "exp_avg", "exp_avg_sq"} <= set(moments)
        shapes = {key: () if key == "step" else p.shape for key in moments}
        if not complete or any(v.shape != shapes[key] for key, v in moments.items()):
            raise ValueError(f"expected moments of shape {list(p.shape)}, found others")
