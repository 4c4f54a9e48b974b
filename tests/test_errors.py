"""common/errors.py: one line and an exit code for mistakes and faults."""

import sys

import pytest
from safetensors import SafetensorError

from common.errors import (
    RunError,
    UserError,
    describe,
    did_you_mean,
    explain_fault,
    first_line,
    launch,
    require,
)


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


def test_a_mistake_is_printed_by_the_first_process_only(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as end:
        launch(raising(UserError("--lr: wrong")))
    assert end.value.code == 2
    assert capsys.readouterr().err == ""


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
