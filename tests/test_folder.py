"""common/folder.py: what a run finds, removes and leaves in its folder."""

import json

import pytest
import torch

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
    assert first["versions"]["torch"] == torch.__version__
