"""tools/gpu_check.py, as far as a machine without a GPU shows it."""

import copy
import json
import subprocess
import sys
import time

import pytest
import torch
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


def test_flags_of_the_cases_on_a_gpu():
    for case in gpu_check.CASES:
        script, flags = gpu_check.script_and_flags(case, "cuda")
        args = script.parse_args(flags)
        assert args.dtype == "bf16"
        assert args.compile == ("--compile" in case)


ANSWERS = {  # what a process runs in place of half a case
    "dry fits": "print('{\"peak\": 5}')",
    "real fits": "print('a line'); print('{\"peak\": 4}')",
    "dry large": "print('{\"peak\": 11}')",
    "dry slow": "import time; time.sleep(60)",
    "real --compile": "raise SystemExit('no such kernel')",
}


def test_halves_of_a_case_on_a_gpu_are_processes(monkeypatch):
    def start(half, case, device):
        command = [sys.executable, "-c", ANSWERS[f"{half} {case}"]]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(command, **pipes)

    monkeypatch.setattr(gpu_check, "start", start)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 20))
    check = lambda cases, end: list(gpu_check.check_on_gpu(cases, "cuda", end))
    fits, large, compiled = check(["fits", "large", "--compile"], time.monotonic() + 60)
    assert fits == dict(case="fits", dry=dict(peak=5), real=dict(peak=4))
    assert large["why"] == "not run, 0 GB are free"
    assert compiled == dict(case="--compile", why="no such kernel")
    (slow,) = check(["slow"], time.monotonic())
    assert slow == dict(case="slow", why="no time left")


def test_no_such_case(check):
    with pytest.raises(UserError, match="--match sdxxl"):
        check("--match", "sdxxl")
