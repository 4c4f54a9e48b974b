"""training/folder.py: what a run finds, removes and leaves in its folder."""

import errno
import fcntl
import json
import os

import pytest
import torch
from helpers.trace import signal_handlers_restored

from common.errors import UserError

OLD = (
    "student/expert-3/diffusion_pytorch_model.safetensors",
    "student/generator/distill.json",
    "student/distill.json",
    "control.json",
    "path.json",
    "eval.jsonl",
    "run.jsonl",
)


def write_files(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def one_checkpoint(make_run):
    run = make_run()
    run.save(0, dict(net=torch.nn.Linear(1, 1)))
    run.close()


def test_only_our_own_leftovers_are_removed(make_run, tmp_path):
    write_files(tmp_path / "out", ["keep.tmp", "sub/keep.tmp", "samples/keep.png"])
    write_files(tmp_path / "out", ["ckpt/it-00000001.pt.tmp", "samples/00000001.png.tmp"])
    make_run().resume({})
    kept = {"keep.tmp", "sub/keep.tmp", "samples/keep.png", ".lock", "run.jsonl"}
    assert files(tmp_path / "out") == kept


def test_a_run_is_not_overwritten_by_mistake(make_run):
    one_checkpoint(make_run)
    with pytest.raises(UserError, match="holds a run at iteration 1; add --resume, --overwrite"):
        make_run()


def test_overwrite_leaves_nothing_of_the_old_run(make_run, tmp_path):
    one_checkpoint(make_run)
    write_files(tmp_path / "out", [*OLD, "mine.json"])
    again = make_run("--overwrite")
    # a mistake in the flags that shows later must not cost the old run
    assert (tmp_path / "out" / OLD[0]).exists()
    again.resume({})
    assert files(tmp_path / "out") == {"mine.json", ".lock", "run.jsonl"}
    assert again.checkpoints() == []


def test_two_runs_do_not_share_a_folder(make_run):
    make_run()
    with pytest.raises(UserError, match="another run is writing here"):
        make_run()


@pytest.fixture
def new_run(tmp_path):
    """new_run(out, *flags): a Run of dmd2.py that has not come to `resume` yet."""
    import dmd2
    from training.run import Run

    def make(out, *flags):
        args = dmd2.parse_args(["--teacher", "toy", "--out", str(out), *flags])
        return Run("dmd2.py", args)

    with signal_handlers_restored():
        yield make


def test_a_run_that_does_not_start_leaves_no_folder(new_run, tmp_path):
    run = new_run(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    with pytest.raises(UserError, match="--resume: no checkpoint in"):
        new_run(tmp_path / "a" / "c", "--resume")
    assert not (tmp_path / "a").exists()
    run.resume({})
    assert files(tmp_path / "a") == {"b/.lock", "b/run.jsonl"}
    run.close()


def test_a_folder_of_the_user_stays_as_it_is(new_run, tmp_path):
    write_files(tmp_path / "mine", ["notes.txt"])
    new_run(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_the_second_of_two_runs_that_start_together_is_refused(new_run, tmp_path):
    first, second = new_run(tmp_path / "out"), new_run(tmp_path / "out")
    first.resume({})
    with pytest.raises(UserError, match="another run is writing here"):
        second.resume({})
    first.save(0, dict(net=torch.nn.Linear(1, 1)))
    first.close()
    third = new_run(tmp_path / "elsewhere")
    third.folder.path = tmp_path / "out"  # as if the first had come and gone meanwhile
    with pytest.raises(UserError, match="holds a run at iteration 1"):
        third.resume({})


@pytest.mark.parametrize("below", ["", "/x", "/x/y"])
def test_where_no_folder_can_be(below, new_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a folder that can be written.*Not a directory"):
        new_run(f"{tmp_path}/file{below}")


def test_where_nobody_may_write(new_run, tmp_path, monkeypatch):
    """As root, who runs the tests in a container, may write everywhere: os.access is asked."""
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match="expected a folder that can be written.*denied"):
        new_run(tmp_path / "out")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EIO])
def test_a_file_system_without_locks(number, make_run, monkeypatch, capsys):
    """Lustre without -o flock, some NFS and FUSE."""

    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    one_checkpoint(make_run)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"no lock on this file system ({os.strerror(number)}); make sure" in err


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])
def test_a_lock_that_another_run_holds(number, make_run, monkeypatch):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="another run is writing here"):
        make_run()


def test_resume_needs_a_checkpoint(make_run):
    with pytest.raises(UserError, match="--resume: no checkpoint in"):
        make_run("--resume")


def test_each_start_is_noted(make_run, tmp_path):
    run = make_run("--seed", 3)
    run.resume({})
    run.save(0, dict(net=torch.nn.Linear(1, 1)))
    run.close()
    make_run("--resume").resume(dict(net=torch.nn.Linear(1, 1)))
    first, second = map(json.loads, (tmp_path / "out" / "run.jsonl").read_text().splitlines())
    assert first["first"] == 0
    assert second["first"] == 1
    assert first["flags"]["seed"] == 3
    assert first["method"] == "dmd2"
    assert first["versions"]["torch"] == torch.__version__  # with the build: +cpu, +cu130
