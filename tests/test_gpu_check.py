"""tools/gpu_check.py, as far as a machine without a GPU shows it."""

import copy
import json
import sys

import pytest
from helpers.dry import leave_device

from common.errors import UserError
from dryrun import ghost
from tools import gpu_check

ghost.register()  # before the first backward of this process: while pytest collects


@pytest.fixture
def check(monkeypatch, tmp_path):
    """check(*flags) -> what it writes as JSON, and its exit code."""

    def run(*flags):
        file = tmp_path / "found.json"
        argv = ["gpu_check", "--device", "cpu", "--json", str(file), *flags]
        monkeypatch.setattr(sys, "argv", argv)
        code = 0
        try:
            gpu_check.main()
        except SystemExit as end:
            code = end.code
        return json.loads(file.read_text()), code

    yield run
    leave_device()


def test_a_case_on_a_cpu(check, capsys):
    """A text-to-image transformer: the peak of real tensors within 5 %."""
    found, code = check("--match", "teacher sd3")
    (row,) = found["rows"]
    assert code == 0
    assert found["device"] == "CPU"
    assert row["dry"]["peak"] == pytest.approx(row["real"]["peak"], rel=0.05)
    assert row["real"]["finite"]
    assert row["dry"]["bf16"] == 0  # --dtype fp32
    assert f"| {row['case']} | " in capsys.readouterr().out


@pytest.mark.parametrize("peak, code", [(1049, 0), (951, 0), (1051, 1), (949, 1)])
def test_a_peak_that_differs_ends_with_an_error(peak, code, check, monkeypatch):
    dry = dict(peak=peak, tflop=1.0, bf16=0.0)
    real = dict(peak=1000, seconds=1.0, first_seconds=1.0, finite=True)
    monkeypatch.setattr(gpu_check, "dry_run", lambda *args: dry)
    monkeypatch.setattr(gpu_check, "real_run", lambda *args: real)
    assert check("--match", "teacher sd3")[1] == code


def test_what_is_bad():
    half = dict(peak=100, finite=True)
    good = dict(case="x", dry=dict(peak=109), real=half)
    assert not gpu_check.is_bad(good, 0.1)
    for change in (
        dict(dry=dict(peak=111)),
        dict(dry=dict(peak=89)),
        dict(real=dict(half, finite=False)),
    ):
        assert gpu_check.is_bad(copy.deepcopy(good) | change, 0.1), change
    assert not gpu_check.is_bad(dict(case="x", real=half), 0.1)  # without a dry run
    assert gpu_check.is_bad(dict(case="x", why="no time left"), 0.1)


def test_no_such_case(check):
    with pytest.raises(UserError, match="--match sdxxl"):
        check("--match", "sdxxl")
