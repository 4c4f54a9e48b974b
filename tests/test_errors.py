"""common/errors.py: one line and an exit code for mistakes and faults."""

import os
import subprocess
import sys

import pytest
from helpers.cases import SCRIPTS
from helpers.runs import ROOT
from safetensors import SafetensorError

from common.errors import (
    Interrupted,
    RunError,
    UserError,
    describe,
    did_you_mean,
    explain_fault,
    first_line,
    launch,
    require,
)


@pytest.mark.parametrize("script", [*SCRIPTS, "eval", "sample"])
def test_ctrl_c_while_torch_is_imported(script, tmp_path):
    """A torch.py that stands for the seconds of the import: it interrupts its own process."""
    # background jobs of a shell have SIGINT ignored
    text = "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    (tmp_path / "torch.py").write_text(text + "os.kill(os.getpid(), signal.SIGINT)\n")
    env = os.environ | dict(PYTHONPATH=str(tmp_path))
    command = [sys.executable, ROOT / f"{script}.py"]
    p = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (p.returncode, p.stderr) == (130, f"{script}.py: interrupted\n")


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, code, text",
    [
        (UserError("--lr: wrong"), 2, "--lr: wrong"),
        (UserError("two\n  lines"), 2, "two lines"),
        (RunError("not finite"), 1, "not finite"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Interrupted(15, "stopped by SIGTERM"), 143, "stopped by SIGTERM"),
        (OSError(28, "No space left"), 1, "file not written or not read: [Errno 28] No space left"),
        (MemoryError(), 1, "out of memory: lower --batch"),
    ],
)
def test_exit_codes(error, code, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/dmd2.py"])
    with pytest.raises(SystemExit) as end:
        launch(raising(error))
    assert end.value.code == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"dmd2.py: {text}")


@pytest.fixture
def launched(monkeypatch, capsys):
    """launched(error, rank, local rank, met) -> what this process prints. met: process group."""
    monkeypatch.setattr(sys, "argv", ["dmd2.py"])
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-7")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("signal.signal", lambda *args: None)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)

    def run(error, rank, local_rank, met=False):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: met)
        with pytest.raises(SystemExit):
            launch(raising(error))
        return capsys.readouterr().err

    return run


def test_flags_and_files_are_judged_by_one_process_a_machine(launched):
    error = UserError("--lr: wrong")
    assert launched(error, 0, 0) == "dmd2.py: --lr: wrong\n"
    assert launched(error, 1, 1) == ""
    assert launched(error, 8, 0) == "dmd2.py: rank 8 on gpu-7: --lr: wrong\n"


@pytest.mark.parametrize("error", [UserError("no such file"), OSError("no such file")])
def test_what_one_process_sees_is_printed_with_its_rank(error, launched):
    err = launched(error, 1, 1, met=True)
    assert err.startswith("dmd2.py: rank 1 on gpu-7: ")
    assert err.endswith("no such file\n")


def test_what_all_processes_were_told_is_printed_once(launched):
    error = UserError("told")
    error.on_all_ranks = True
    assert launched(error, 0, 0, met=True) == "dmd2.py: told\n"
    assert launched(error, 1, 1, met=True) == ""


def test_a_signal_is_no_news_of_one_process(launched):
    error = Interrupted(15, "stopped by SIGTERM")
    assert launched(error, 0, 0, met=True) == "dmd2.py: stopped by SIGTERM\n"
    assert launched(error, 1, 1, met=True) == ""


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("shape mismatch")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        launch(raising(error))


def test_a_run_that_ends_well_has_exit_code_0():
    with pytest.raises(SystemExit) as end:
        launch(lambda: None)
    assert end.value.code == 0


@pytest.mark.parametrize(
    "error, expected",
    [
        (RuntimeError("CUDA out of memory. Tried to allocate"), "out of memory: lower --batch"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory"), "out of memory"),
        (RuntimeError("x does not have a deterministic implementation"), "--deterministic"),
        (RuntimeError("[gloo] Connection closed by peer"), "another process of this run is gone"),
        (RuntimeError("NCCL error"), "another process of this run is gone"),
        (SafetensorError("header too large"), "file not written or not read: header too large"),
    ],
)
def test_faults_of_torch_in_words(error, expected):
    assert explain_fault(error).startswith(expected)


def test_other_faults_are_not_explained_away():
    assert explain_fault(RuntimeError("size mismatch")) is None


def test_require():
    require(True, "never")
    with pytest.raises(UserError, match="always"):
        require(False, "always")


def test_texts_of_exceptions():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
    assert describe(KeyError("beta")) == "KeyError: 'beta'"
    assert did_you_mean("mnistt", ["toy", "mnist"]) == ", did you mean mnist?"
