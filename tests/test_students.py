"""common/teachers/students.py: a student is sampled by its own script. A copy is a method."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.cases import required_flags
from helpers.server import ROOT
from helpers.trace import run_main
from safetensors.torch import load_file

import boot
import dmd2
import msd
from common.errors import UserError
from common.files import read_json
from common.teachers.load import load_teacher
from common.teachers.students import (
    network_of,
    read_student,
    sampler_of,
    script_of,
    start_from,
    teacher_of,
)
from training.run import Run


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Folder of a one-step student of the toy, as dmd2.py leaves it."""
    folder = tmp_path_factory.mktemp("run")
    record = dict(method="dmd2", teacher="toy", nfe=1, cfg=1.0, sampler=dict(steps="999"))
    load_teacher("toy").copy().save(folder / "student", record)
    return folder


def with_record(student, tmp_path, **changes):
    """A copy of the student with changes to its distill.json; None removes an entry."""
    folder = tmp_path / "changed"
    shutil.copytree(student, folder)
    path = folder / "student" / "distill.json"
    record = read_json(path) | changes
    path.write_text(json.dumps({k: v for k, v in record.items() if v is not None}))
    return folder


def python(tmp_path, *command, path):
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(map(str, path)), OMP_NUM_THREADS="1")
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)


def test_without_a_step_the_student_of_a_bf16_teacher_is_the_file(folders, monkeypatch, tmp_path):
    """It and the critic have the digits from which the teacher alone is rounded."""
    folder, out = folders("sd15"), tmp_path / "run"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("dog\n")
    flags = [
        "--teacher",
        folder,
        "--prompts",
        prompts,
        "--dtype",
        "bf16",
        "--batch",
        2,
        "--iters",
        1,
    ]
    flags += ["--lr", 0, "--weight-decay", 0, "--ema", 8, "--eval-n", 0, "--sample-every", 0]
    run_main(monkeypatch, dmd2, *flags, "--out", out)
    home = next(f for f in (out / "student" / "unet", out / "student") if f.is_dir())
    name = "diffusion_pytorch_model.safetensors"
    expected, found = load_file(folder / "unet" / name), load_file(home / name)
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert any((w != w.bfloat16()).any() for w in expected.values())


# ---- a copy is a method --------------------------------------------------------------------------

QUICK = ["--teacher", "toy", "--iters", 3, "--batch", 32, "--eval-n", 200, "--sample-every", 0]
SAMPLER = "    return student(x_in, schedule.alpha(times[-1]), schedule.sigma(times[-1]), cond)\n"


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """mine.py in a folder of its own: dmd2.py, but its sampler puts every point at (7, 7)."""
    folder = tmp_path_factory.mktemp("research")
    code = (ROOT / "dmd2.py").read_text()
    assert code.count(SAMPLER) == 1
    (folder / "mine.py").write_text(code.replace(SAMPLER, "    return torch.full_like(z, 7.0)\n"))
    done = python(folder, "mine.py", *QUICK, path=[ROOT])
    assert done.returncode == 0, done.stderr
    return folder


def test_a_copy_trains_into_its_own_folder(mine):
    home = mine / "out" / "mine-toy"
    assert read_json(home / "student" / "distill.json")["method"] == "mine"
    assert (home / "metrics.json").is_file()


def test_a_copy_resumes(mine):
    done = python(mine, "mine.py", *QUICK, "--iters", 5, "--resume", path=[ROOT])
    assert done.returncode == 0, done.stderr
    assert "resumed it-00000003.pt" in done.stdout


def test_eval_uses_the_copys_sampler(mine):
    """The energy distance of points at (7, 7) to the mixture: 2 E|x - y| - E|y - y'| > 15."""
    run = mine / "out" / "mine-toy"
    command = [ROOT / "eval.py", run, "--n", 200, "--out", mine / "eval.jsonl"]
    done = python(mine, *command, path=[ROOT, mine])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["method"] == "mine"
    assert result["energy_distance"] > 15
    assert result["energy_distance"] == read_json(run / "metrics.json")["energy_distance"]


def test_compare_uses_the_copys_sampler(mine, student):
    command = [ROOT / "eval.py", mine / "out" / "mine-toy", student, "--compare", "--n", 200]
    done = python(mine, *command, "--out", mine / "compare.jsonl", path=[ROOT, mine])
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (mine / "compare.jsonl").read_text().splitlines()]
    distances = {row["method"]: row["energy_distance"] for row in rows}
    assert distances["mine"] > 15
    assert distances["dmd2"] < 5


def test_a_script_that_is_missing_is_one_line(mine):
    """Without mine.py's folder on PYTHONPATH."""
    command = [ROOT / "eval.py", mine / "out" / "mine-toy", "--n", 200]
    done = python(mine, *command, "--out", mine / "eval.jsonl", path=[ROOT])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "method 'mine': expected its script mine.py in" in done.stderr


# ---- which code is run ---------------------------------------------------------------------------


def test_the_script_of_a_student(student):
    home, info = read_student(student)
    assert script_of(home, info) is dmd2


@pytest.mark.parametrize("name", ["nowhere", "training.run", "../dmd2", "os", "/tmp/x", "", "a b"])
def test_other_names_are_no_scripts(name, student, tmp_path):
    home, info = read_student(with_record(student, tmp_path, method=name))
    with pytest.raises(UserError, match="expected its script"):
        script_of(home, info)


def test_a_script_needs_a_sampler(student, tmp_path, monkeypatch):
    """It is not even imported without one."""
    (tmp_path / "other.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    home, info = read_student(with_record(student, tmp_path, method="other"))
    with pytest.raises(UserError, match="other.py has no function `sample`"):
        script_of(home, info)


def test_a_script_in_the_students_own_folder_is_not_run(student, tmp_path, monkeypatch):
    folder = with_record(student, tmp_path, method="evil")
    for place in (folder, folder / "student"):
        (place / "evil.py").write_text("def sample(): pass\nraise SystemExit('imported')\n")
    monkeypatch.chdir(folder)
    home, info = read_student(folder)
    with pytest.raises(UserError, match="expected its script evil.py"):
        script_of(home, info)


def test_arguments_that_the_sampler_does_not_take(student, tmp_path):
    home, info = read_student(with_record(student, tmp_path, sampler=dict(wrong=1)))
    with pytest.raises(UserError, match="sampler: does not fit dmd2.sample"):
        sampler_of(home, info)


def test_values_that_the_sampler_does_not_take(student, tmp_path):
    home, info = read_student(with_record(student, tmp_path, sampler=dict(steps=[1, {}])))
    sample = sampler_of(home, info)
    model = load_teacher("toy")
    cond = model.encode([0])
    with pytest.raises(UserError, match="dmd2.sample fails with"):
        sample(model, torch.zeros(1, 2), cond, 1, None, **info["sampler"])


# ---- records and networks ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(method=None), "method: expected text"),
        (dict(teacher=3), "teacher: expected text"),
        (dict(nfe=0), "nfe: expected an integer from 1 to 1000"),
        (dict(nfe=True), "nfe: expected an integer from 1 to 1000"),
        (dict(sampler=[]), "sampler: expected an object"),
        (dict(model="x"), "model: expected an object"),
    ],
)
def test_bad_records(changes, message, student, tmp_path):
    with pytest.raises(UserError, match=message):
        read_student(with_record(student, tmp_path, **changes))


def test_folders_that_are_no_students(tmp_path):
    with pytest.raises(UserError, match="expected the folder of a run, found nothing"):
        read_student(tmp_path / "nowhere")
    with pytest.raises(UserError, match="the run has not ended yet or is none"):
        read_student(tmp_path)
    with pytest.raises(UserError, match="a teacher"):
        read_student(ROOT / "assets" / "toy")


def test_a_student_of_another_teacher(student):
    home, info = read_student(student)
    mnist = load_teacher("mnist")
    with pytest.raises(UserError, match="expected a student of mnist, dit.*found toy"):
        network_of(student, home, info, mnist, "mnist")


def test_teacher_of(student, tmp_path):
    assert teacher_of(student) == "toy"
    assert teacher_of(student / "student") == "toy"
    assert teacher_of(tmp_path) is None
    (tmp_path / "model_index.json").write_text("{}")
    assert teacher_of(tmp_path) == str(tmp_path)


# ---- --start -------------------------------------------------------------------------------------

TINY = ["--teacher", "toy-cond", "--batch", 32, "--eval-n", 0, "--sample-every", 0]
TINY += ["--log-every", 1, "--cooldown", 0]
SPEC = dict(rank=2, alpha=2, targets=None, seed=0, flag="--lora")


def state_at_start(monkeypatch, script, *flags):
    """Copies of what main() of a script trains, after --start and before the first step."""
    copies = {}
    resume = Run.resume

    def recorded(run, state, **kwargs):
        for name, part in state.items():
            copies[name] = copy.deepcopy(part.state_dict())
        return resume(run, state, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "resume", recorded)
        run_main(patch, script, *TINY, *flags)
    return copies


def saved_state(run, it):
    return torch.load(run / "ckpt" / f"it-{it:08d}.pt", weights_only=True)["state"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[name]) for name, v in a.items())


def part(weights, prefix):
    found = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
    assert found
    return found


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    """A run of dmd2.py with an average and without GAN: six iterations."""
    out = tmp_path_factory.mktemp("first") / "run"
    with pytest.MonkeyPatch.context() as patch:
        flags = ["--iters", 6, "--ema", 100, "--cfg", 2, "--ratio", 2, "--lr", 1e-2]
        run_main(patch, dmd2, *TINY, *flags, "--out", out)
    return out


def test_the_second_stage_of_dmd2(first_stage, monkeypatch, tmp_path, capsys):
    """It begins with the exported student and the critic; head, average, optimisers are new."""
    flags = ["--iters", 3, "--gan", "--ema", 100, "--start", first_stage, "--out", tmp_path]
    start = state_at_start(monkeypatch, dmd2, *flags)
    critic = first_stage / "ckpt" / "it-00000006.pt"
    line = f"{first_stage / 'student'} (average), critic: {critic}\n"
    assert f"start                  student: {line}" in capsys.readouterr().out

    first = saved_state(first_stage, 6)
    assert equal(start["student"], first["ema"]["model"])
    assert equal(start["ema"]["model"], first["ema"]["model"])
    assert start["ema"]["images"] == 0
    assert not equal(start["student"], first["student"])  # of the last iteration, not averaged
    assert not equal(start["student"], load_teacher("toy-cond").state_dict())
    assert equal(part(start["critic"], "fake."), part(first["critic"], "fake."))
    assert part(start["critic"], "head.")
    for opt in ("opt_g", "opt_c"):
        assert first[opt]["state"]
        assert not start[opt]["state"]
    assert start["opt_g"]["param_groups"][0]["lr"] != 1e-2  # that of the flags


def test_a_students_folder_has_no_critic(first_stage, monkeypatch, tmp_path, capsys):
    flags = ["--iters", 1, "--start", first_stage / "student", "--out", tmp_path]
    start = state_at_start(monkeypatch, dmd2, *flags)
    assert "critic: the teacher, none found there" in capsys.readouterr().out
    assert equal(start["student"], saved_state(first_stage, 6)["ema"]["model"])
    teacher = load_teacher("toy-cond").copy()
    assert equal(part(start["critic"], "fake."), teacher.state_dict())


@pytest.mark.parametrize("script", ["sid", "decoupled_dmd", "phased_dmd", "msd", "swiftbrush"])
def test_start_from_another_methods_run(script, first_stage, monkeypatch, tmp_path):
    flags = required_flags(f"{script}.py")
    flags = [*flags, "--iters", 4, "--start", first_stage, "--out", tmp_path]
    start = state_at_start(monkeypatch, __import__(script), *flags)
    first = saved_state(first_stage, 6)
    students = [start["student"]]
    if script in ("phased_dmd", "msd"):
        names = {name.split(".")[1] for name in start["student"]}
        assert len(names) > 1
        students = [part(start["student"], f"experts.{i}.") for i in names]
    for student in students:
        assert equal(student, first["ema"]["model"])
    if script != "msd":  # its critic starts anew for each student
        prefix = "" if script in ("phased_dmd", "swiftbrush") else "fake."
        assert equal(part(start["critic"], prefix), part(first["critic"], "fake."))


@pytest.mark.parametrize(
    "script", ["phased_dmd", "msd", "sana_sprint", "twinflow", "flowmap", "boot", "anyflow"]
)
def test_start_from_the_methods_own_run(script, monkeypatch, tmp_path):
    """Experts and new inputs (a second time, a guidance scale) come along."""
    module = __import__(script)
    flags = [*required_flags(f"{script}.py"), "--lr", 1e-2, "--iters", 4, "--ema", 0]
    run_main(monkeypatch, module, *TINY, *flags, "--out", tmp_path / "first")
    first = saved_state(tmp_path / "first", 4)
    flags += ["--start", tmp_path / "first", "--out", tmp_path / "second"]
    start = state_at_start(monkeypatch, module, *flags)
    assert equal(start["student"], first["student"])
    if script == "flowmap":
        assert equal(start["aux"], first["aux"])
    if script in ("phased_dmd", "anyflow"):
        assert equal(start["critic"], first["critic"])


def test_a_resume_does_not_start_again(first_stage, monkeypatch, tmp_path):
    """The folder of the first stage may be gone by then."""
    moved = tmp_path / "moved"
    shutil.copytree(first_stage, moved)
    flags = ["--start", moved, "--out", tmp_path / "run"]
    run_main(monkeypatch, dmd2, *TINY, *flags, "--iters", 2)
    shutil.rmtree(moved)
    run_main(monkeypatch, dmd2, *TINY, *flags, "--iters", 4, "--resume")
    assert (tmp_path / "run" / "ckpt" / "it-00000004.pt").is_file()


@pytest.mark.parametrize(
    "script, flags, message",
    [
        (dmd2, "--lora 2", "the student .*expected adapters of rank 2, alpha 2, found no adapters"),
        (dmd2, "--lora-fake 2", "the critic .*expected adapters of rank 2, alpha 2, found no"),
        (dmd2, "--teacher mnist", "expected a student of this teacher, dit .*found toy"),
        (boot, "", "the student .*extras.time.*: that run has no such tensor"),
        (msd, "--small width=32", r"the student .*: expected shape \[9, 32\], found \[9, 128\]"),
    ],
)
def test_students_that_do_not_fit(script, flags, message, first_stage, monkeypatch, tmp_path):
    args = [*TINY, "--iters", 10, "--warmup", 0, "--start", first_stage, "--out", tmp_path]
    with pytest.raises(UserError, match=f"--start {first_stage}: .*{message}"):
        run_main(monkeypatch, script, *args, *flags.split())


def test_adapters_with_another_alpha(tmp_path):
    """It shows in no tensor's shape."""
    teacher = load_teacher("toy")
    record = dict(method="dmd2", teacher="toy", nfe=1, cfg=1.0, sampler={})
    teacher.copy(SPEC).save(tmp_path / "student", record)
    start_from(tmp_path, teacher, teacher.copy(SPEC))
    with pytest.raises(UserError, match="expected adapters of rank 2, alpha 8, found .* alpha 2"):
        start_from(tmp_path, teacher, teacher.copy(SPEC | dict(alpha=8)))


def test_a_damaged_critic(first_stage, tmp_path):
    """An older checkpoint is taken; one that holds no weights is refused."""
    run = tmp_path / "run"
    shutil.copytree(first_stage, run)
    path = run / "ckpt" / "it-00000006.pt"
    teacher = load_teacher("toy-cond")
    payload = torch.load(path, weights_only=True)
    payload["state"]["critic"] = dict(fake=3)
    torch.save(payload, path)
    with pytest.raises(UserError, match=f"--start {path}: expected the weights of a critic"):
        start_from(run, teacher, teacher.copy(), teacher.copy())
    path.write_bytes(b"PK")
    lines = []
    start_from(run, teacher, teacher.copy(), teacher.copy(), lines.append)
    assert "critic: the teacher, none found there" in lines[0]
