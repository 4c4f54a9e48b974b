"""--shard on two gloo processes: the same numbers as whole networks, checkpoints that any number of processes reads, a whole student."""
import json
import warnings

import pytest
import torch

import tiny
from cases import MORE, SHORT
from common import models, teachers
from test_scripts import QUICK, checkpoint, close, log, one_line, processes, same

SHARDED = ["--shard"]


def both(scripts, tmp_path, script, args, it):
    """The run on one process and sharded on two -> their folders, compared."""
    one, two = tmp_path / "one", tmp_path / "two"
    scripts.run(f"{script}.py", *args, "--out", one)
    ps = processes(scripts, 2, f"{script}.py", *args, *SHARDED, "--out", two)
    assert [p.wait() for p in ps] == [0, 0], ps[0].err + ps[1].err
    assert "Warning" not in ps[0].err and ps[1].out == ""
    close(one, two, it)
    return one, two


@pytest.mark.parametrize("script", list(SHORT))
def test_toy(script, scripts, tmp_path):
    both(scripts, tmp_path, script, [*QUICK, *MORE[script], "--iters", 5, "--log-every", 1], 5)
