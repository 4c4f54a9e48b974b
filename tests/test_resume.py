"""--resume keeps a run's word: its own flags, changes said and recorded, nothing relabelled."""

import json
import os
import re
import shutil

import pytest
import torch
from helpers.cases import SCRIPTS
from helpers.runs import QUICK, log, one_line, same

from common.errors import UserError
from common.files import ROOT, read_json
from training.folder import changed_flags, describe_changes, flags_of, history, starts_until

OWN = "--lr 1e-4 --batch 64 --nfe 2 --ratio 3 --seed 7 --cfg 1.5 --save-every 20".split()
OWN += "--warmup 4 --cooldown 0".split()
QUIET = "--eval-n 0 --sample-every 0 --log-every 10".split()


def starts(out):
    return [json.loads(line) for line in (out / "run.jsonl").read_text().splitlines()]


def at(folder):
    """Environment of a script that runs in another working directory."""
    return dict(BEFORE=f"import os; os.chdir({str(folder)!r})")


def content(out):
    return {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="module")
def done(scripts, tmp_path_factory):
    """A run of dmd2.py with flags of its own, 40 iterations, on a teacher given by a relative path;
    and the folder from which it was started."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(ROOT / "assets" / "toy", home / "teacher")
    flags = ["--teacher", "teacher", "--out", "run", *OWN, *QUIET, "--iters", 40]
    scripts.run("dmd2.py", *flags, **at(home))
    return home


@pytest.fixture
def copied(done, tmp_path):
    """A copy of the finished run, and the folder from which it was started."""
    shutil.copytree(done / "run", tmp_path / "run")
    return tmp_path / "run"


# ---- from the command line -----------------------------------------------------------------------


def test_a_bare_resume_has_the_flags_of_the_run(done, copied, scripts, tmp_path):
    """From another working directory; the teacher's path was relative to the first one."""
    p = scripts.run("dmd2.py", "--resume", "--out", "run", "--iters", 60, **at(tmp_path))
    assert "resumed it-00000040.pt; changed: iters 40 -> 60\n" in p.out
    old, new = (start["flags"] for start in starts(copied))
    for name in ("lr", "batch", "nfe", "ratio", "seed", "cfg", "eval_n", "log_every"):
        assert new[name] == old[name], name
    assert new["teacher"] == str(done / "teacher")

    whole = ["--teacher", "teacher", "--out", tmp_path / "whole", *OWN, *QUIET, "--iters", 60]
    scripts.run("dmd2.py", *whole, **at(done))
    same(tmp_path / "whole", copied, 60)


def test_changed_flags_are_taken_printed_and_recorded(copied, scripts, tmp_path):
    more = "--cfg 1 --batch 32 --iters 60 --weight-decay 0.5 --betas 0.8 0.9".split()
    p = scripts.run("dmd2.py", "--resume", "--out", copied, *more)
    (line,) = [line for line in p.out.splitlines() if line.startswith("resumed")]
    start, changes = line.split("; changed: ")
    assert start == "resumed it-00000040.pt"
    assert set(changes.split(", ")) == {
        "cfg 1.5 -> 1",
        "batch 64 -> 32",
        "iters 40 -> 60",
        "weight-decay 0.01 -> 0.5",
        "betas 0.9 0.999 -> 0.8 0.9",
    }
    last = starts(copied)[-1]
    assert last["first"] == 40
    assert last["changed"]["cfg"] == [1.5, 1.0]
    assert last["flags"]["cfg"] == 1.0
    training = read_json(copied / "student" / "distill.json")["training"]
    assert training["resumed"] == [dict(first=40, changed=last["changed"])]
    assert training["iterations"] == 60
    assert training["images_seen"] == 40 * 64 + 20 * 32

    # `images` is a count, and the optimiser has the new options
    assert [row["images"] for row in log(copied)][-2:] == [40 * 64 + 32, 40 * 64 + 11 * 32]
    saved = torch.load(copied / "ckpt" / "it-00000060.pt", weights_only=True)
    assert saved["images"] == 40 * 64 + 20 * 32
    for name in ("opt_g", "opt_c"):
        (group,) = saved["state"][name]["param_groups"]
        assert (group["weight_decay"], list(group["betas"])) == (0.5, [0.8, 0.9])

    # a second resume starts from the flags of the first
    p = scripts.run("dmd2.py", "--resume", "--out", copied, "--iters", 70)
    assert "resumed it-00000060.pt; changed: iters 60 -> 70\n" in p.out
    assert log(copied)[-1]["images"] == 40 * 64 + 21 * 32


def test_fewer_iterations_change_nothing(copied, scripts):
    before = content(copied)
    p = scripts.start("dmd2.py", "--resume", "--out", copied, "--iters", 30, "--eval-n", 100)
    one_line(p, "has 40 iterations already, more than --iters 30: nothing is done", "dmd2")
    assert content(copied) == before

    p = scripts.start("dmd2.py", "--resume", "--out", copied, "--iters", 3)  # and --warmup 4
    one_line(p, "has 40 iterations already, more than --iters 3: nothing is done", "dmd2")


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--gan", "critic: head.* the checkpoint has no such tensor.*--gan False -> True"),
        ("--ema 100", "ema: the checkpoint has no average, its run had --ema 0.*--ema 0 -> 100"),
        ("--lora 2", "expected a run of dmd2 .*--lora None -> 2"),
        ("--teacher toy-cond", "expected a run of dmd2 on toy-cond, found.*--teacher "),
    ],
)
def test_a_misfit_names_the_network_and_the_flag(flags, expected, copied, scripts):
    before = content(copied)
    p = scripts.start("dmd2.py", "--resume", "--out", copied, "--iters", 60, *flags.split())
    one_line(p, expected, "dmd2")
    assert content(copied) == before


def test_another_rank_is_named(scripts, tmp_path):
    flags = ["--teacher", "toy", "--lora", 2, "--lora-targets", "inp", "--lora-alpha", 4]
    scripts.run("dmd2.py", *QUICK, *flags, "--iters", 2, "--out", tmp_path)
    p = scripts.start("dmd2.py", "--resume", "--out", tmp_path, "--iters", 4, "--lora", 1)
    expected = r"student: .*lora_A.*expected shape \[1, 18\], found \[2, 18\].*--lora 2 -> 1"
    one_line(p, expected, "dmd2")


@pytest.mark.parametrize(
    "script, first, then, expected",
    [
        ("phased_dmd", "--nfe 4", "--nfe 2", "--nfe 4 -> 2: phased_dmd cannot change it"),
        ("msd", "--teacher toy-cond --students 2", "--students 1", "student: .*--students 2 -> 1"),
        (
            "flowmap",
            "--cfg-range 1 2",
            "--cfg-range 1 1",
            "student: extras.*--cfg-range 1 2 -> 1 1",
        ),
        ("dmd2", "--gan", "--no-gan", "critic: head.*the checkpoint has.*--gan True -> False"),
    ],
)
def test_flags_that_a_run_cannot_change(script, first, then, expected, scripts, tmp_path):
    flags = [*QUICK, *first.split(), "--iters", 2, "--out", tmp_path]
    scripts.run(f"{script}.py", *flags)
    p = scripts.start(f"{script}.py", "--resume", "--out", tmp_path, "--iters", 4, *then.split())
    assert p.wait() == 2
    assert re.search(expected, p.err.splitlines()[-1]), p.err
    assert "Traceback" not in p.err


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_resumes_by_its_folder_alone(script, scripts, tmp_path, monkeypatch):
    """Equal to a run without interruption, in another working directory."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    flags = [
        *QUICK,
        "--teacher",
        "toy",
        "--lr",
        1e-4,
        "--seed",
        3,
        "--batch",
        16,
        "--save-every",
        3,
    ]
    scripts.run(f"{script}.py", *flags, "--iters", 6, "--out", whole)
    shutil.copytree(whole, halves)
    (halves / "ckpt" / "it-00000006.pt").unlink()
    monkeypatch.setattr(scripts, "required_flags", lambda script: [])
    p = scripts.run(f"{script}.py", "--resume", "--out", "halves", **at(tmp_path))
    assert "resumed it-00000003.pt\n" in p.out
    same(whole, halves, 6)
    training = read_json(halves / "student" / "distill.json")["training"]
    assert training["iterations"] == 6
    assert training["resumed"] == [dict(first=3, changed={})]


def test_a_switch_of_the_run_can_be_turned_off(scripts, tmp_path):
    flags = [*QUICK, "--deterministic", "--iters", 2, "--out", tmp_path]
    scripts.run("dmd2.py", *flags)
    p = scripts.run("dmd2.py", "--resume", "--out", tmp_path, "--iters", 3)
    assert "changed: iters 2 -> 3\n" in p.out
    p = scripts.run("dmd2.py", "--resume", "--out", tmp_path, "--iters", 4, "--no-deterministic")
    assert "iters 3 -> 4" in p.out
    assert "deterministic True -> False" in p.out


def test_a_refused_plan_leaves_no_trace(scripts, tmp_path):
    """The flags of a refused resume are not those of the next one."""
    flags = [*QUICK, "--teacher", "toy-cond", "--students", 2, "--out", tmp_path, "--save-every", 5]
    scripts.run("msd.py", *flags, "--iters", 8)
    (tmp_path / "ckpt" / "it-00000008.pt").unlink()
    p = scripts.start("msd.py", "--resume", "--out", tmp_path, "--iters", 20)
    one_line(p, "--resume: the students' turns follow from --iters", "msd")
    assert "resumed it-00000005.pt\n" in scripts.run("msd.py", "--resume", "--out", tmp_path).out


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lr", "betas", "eps", "weight_decay", "params"])
def test_an_option_that_is_missing_in_a_checkpoint(name, copied, scripts):
    path = copied / "ckpt" / "it-00000040.pt"
    payload = torch.load(path, weights_only=True)
    del payload["state"]["opt_c"]["param_groups"][0][name]
    torch.save(payload, path)
    p = scripts.start("dmd2.py", "--resume", "--out", copied, "--iters", 41)
    one_line(p, f"does not fit .*: opt_c: no entry '{name}' in param_groups", "dmd2")


def test_parts_that_only_one_of_both_has(make_run):
    run = make_run()
    run.resume({})
    run.save(0, dict(net=torch.nn.Linear(1, 1), head=torch.nn.Linear(1, 1)))
    run.close()
    with pytest.raises(UserError, match="head: only the checkpoint has it"):
        make_run("--resume").resume(dict(net=torch.nn.Linear(1, 1)))


def test_a_checkpoint_without_run_jsonl(make_run, capsys):
    """The flags of the run are not known: the preset's, said in one line."""
    run = make_run()
    run.save(0, dict(net=torch.nn.Linear(1, 1)))
    run.close()
    assert not (run.out / "run.jsonl").exists()
    assert make_run("--resume").resume(dict(net=torch.nn.Linear(1, 1))) == 1
    assert "no run.jsonl, so flags that are not given are the preset's" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, message",
    [
        ("half a line", "line 1: expected the flags of a start"),
        ('{"first": 0}', "line 1: expected the flags of a start"),
        ('{"first": 0, "flags": {"lr": "fast"}}', "--lr: expected its value, found 'fast'"),
        ('{"first": 0, "flags": {"gan": 1}}', "--gan: expected its value, found 1"),
        ('{"first": 0, "flags": {"betas": 0.9}}', "--betas: expected its value, found 0.9"),
        ('{"first": 0, "flags": {"iters": true}}', "--iters: expected its value, found True"),
        ('{"first": 0, "flags": {"sim": "none"}}', "--sim: expected its value, found 'none'"),
        ('{"first": 0, "flags": {"lr": -1.0}}', "--lr: expected a number >= 0, found -1.0"),
    ],
)
def test_a_damaged_record(line, message, make_run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        make_run("--resume")


# ---- the record ----------------------------------------------------------------------------------


def start(first, cwd="/tmp", **flags):
    return dict(first=first, cwd=cwd, flags=flags)


def test_starts_that_were_undone_do_not_count():
    """The run was killed before a checkpoint of the second start, and fell back to iteration 10."""
    a, b, c, d = start(0, cfg=1.0), start(20, cfg=2.0), start(20, cfg=3.0), start(10, cfg=4.0)
    assert starts_until([a, b, c], 30) == [a, c]
    assert starts_until([a, b, c], 20) == [a]
    assert starts_until([a, b, c, d], 30) == [a, d]
    assert history([a, b, c], 30) == [dict(first=20, changed=dict(cfg=[1.0, 3.0]))]


def test_changes():
    old = start(
        0, lr=1e-3, betas=(0.9, 0.99), lora=dict(rank=4, seed=0), seed=0, out="a", resume=False
    )
    new = start(
        5, lr=2e-6, betas=[0.9, 0.99], lora=dict(rank=8, seed=1), seed=0, out="b", resume=True
    )
    changes = changed_flags(old, new)
    assert changes == dict(lr=[1e-3, 2e-6], lora=[4, 8])
    assert describe_changes(changes) == "lr 0.001 -> 2e-06, lora 4 -> 8"
    assert describe_changes(dict(lr_fake=[1.0, None]), "--") == "--lr-fake 1 -> None"


def test_relative_paths(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "toy").mkdir()
    there = str(tmp_path)
    assert flags_of(start(0, there, teacher="mine"))["teacher"] == f"{there}/mine"
    assert flags_of(start(0, there, teacher="toy"))["teacher"] == "toy"  # ours, whatever is there
    assert flags_of(start(0, there, teacher="sdxl"))["teacher"] == "sdxl"  # no folder
    assert flags_of(start(0, there, data="../a"))["data"] == os.path.normpath(f"{there}/../a")
    assert flags_of(start(0, there, data="/a"))["data"] == "/a"
    here = start(0, os.getcwd(), data="a")
    assert flags_of(here, absolute=False)["data"] == "a"
