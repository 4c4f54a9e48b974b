"""Runs of scripts as processes: quick flags, what they leave in their folder, several processes."""

import json
import re
import socket
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
# No cooldown: its rates depend on --iters, which a resume changes.
QUICK = ["--teacher", "toy", "--batch", 32, "--eval-n", 0, "--sample-every", 0]
QUICK += ["--log-every", 3, "--cooldown", 0]


def log(out, times=False):
    """Lines of log.jsonl without wall-clock numbers; times: these numbers instead."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    if times:
        return [line["time"] for line in lines]
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


def count_lines(out):
    path = out / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def checkpoint(out, it):
    """Everything in a checkpoint that must be reproducible, {path: tensor or value}."""
    payload = torch.load(out / "ckpt" / f"it-{it:08d}.pt", weights_only=True)
    parts = {
        "header",
        "it",
        "images",
        "seconds",
        "log_bytes",
        "skipped",
        "values",
        "state",
        "student",
    }
    assert set(payload) == parts
    flat = {}

    def walk(path, x):
        if isinstance(x, dict):
            entries = x.items()
        elif isinstance(x, (list, tuple)):
            entries = enumerate(x)
        else:
            flat[path] = x
            return
        for key, value in entries:
            walk(f"{path}/{key}", value)

    differ = ("seconds", "log_bytes", "student")  # distill.json has times; weights are in `state`
    walk("", {k: v for k, v in payload.items() if k not in differ})
    return flat


def equal_values(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    return a == b or (a != a and b != b)  # nan: no value


def same(a, b, it):
    """Run folders a and b hold the same run, bit for bit, up to iteration `it`."""
    x, y = checkpoint(a, it), checkpoint(b, it)
    assert x.keys() == y.keys()
    assert any("opt_g" in name for name in x)
    assert [name for name in x if not equal_values(x[name], y[name])] == []
    assert log(a) == log(b)


def network_states(out, it):
    """{network: all its weights as one float64 vector}, of a checkpoint."""
    state = torch.load(out / "ckpt" / f"it-{it:08d}.pt", weights_only=True)["state"]
    names = [name for name in state if not name.startswith(("opt", "ema"))]
    return {name: torch.cat([v.flatten().double() for v in state[name].values()]) for name in names}


def close(a, b, it, only=""):
    """Run folders a and b hold the same run up to rounding.

    Weights are compared by norm, network by network: Adam turns the rounding of a tiny gradient
    into a visible change of that one weight. only: a network to which the narrow bound applies,
    instead of the log.
    """
    x, y = network_states(a, it), network_states(b, it)
    for name in x:
        bound = 1e-5 if only and only in name else 0.03
        assert (x[name] - y[name]).norm() <= bound * x[name].norm(), name
    for one, other in zip(log(a), log(b), strict=True):
        assert one.keys() == other.keys()
        if only:
            continue
        for name, value in one.items():
            if value is None:  # not finite, or no sample has a value
                assert other[name] is None, name
            elif isinstance(value, list):  # names of alarms
                assert other[name] == value, name
            elif name != "std":  # the std of a batch is no mean over processes
                assert other[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def without_torchs_own(text):
    """Standard error without what torch 2.14 says about itself: its forward-mode derivatives call
    torch.jit.script, which it has deprecated."""
    return re.sub(r".*FutureWarning: `torch.jit.script`.*\n.*warnings.warn.*\n", "", text)


def wait_for(ready, seconds=60):
    end = time.time() + seconds
    while not ready():
        assert time.time() < end, "timed out"
        time.sleep(0.01)


def processes(scripts, n, *args, **env):
    """Starts a script as torchrun does with n processes -> list of them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env |= dict(WORLD_SIZE=n, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return [scripts.start(*args, RANK=rank, LOCAL_RANK=rank, **env) for rank in range(n)]


def run_processes(scripts, n, *args, **env):
    """The same, to their end -> list of the finished processes."""
    started = processes(scripts, n, *args, **env)
    codes = [p.wait() for p in started]
    assert codes == [0] * n, "\n".join(p.err for p in started)
    return started


def one_line(p, expected, script):
    """Process p ends with exit code 2 and one line that matches `expected`."""
    assert p.wait() == 2, p.err
    assert re.fullmatch(rf"{script}\.py: [^\n]*\n", p.err), p.err
    assert re.search(expected, p.err), p.err
