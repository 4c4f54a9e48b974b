"""common/teachers/students.py: a student is sampled by its own script. A copy is a method."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.server import ROOT

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
    import dmd2

    home, info = read_student(student)
    assert script_of(home, info) is dmd2


@pytest.mark.parametrize("name", ["nowhere", "common.run", "../dmd2", "os", "/tmp/x", "", "a b"])
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


def test_start_from_a_student(tmp_path):
    teacher = load_teacher("toy")
    trained = teacher.copy()
    with torch.no_grad():
        for p in trained.parameters():
            p += 1
    record = dict(method="dmd2", teacher="toy", nfe=1, cfg=1.0, sampler={})
    trained.save(tmp_path / "student", record)
    fresh = teacher.copy()
    start_from(tmp_path, fresh, teacher)
    for a, b in zip(fresh.parameters(), trained.parameters(), strict=True):
        assert torch.equal(a, b)


def test_start_needs_the_same_kind_of_student(student):
    teacher = load_teacher("toy")
    spec = dict(rank=2, alpha=2, targets=None, seed=0, flag="--lora")
    with pytest.raises(UserError, match="--start .*does not fit the student of these flags"):
        start_from(student, teacher.copy(spec), teacher)
