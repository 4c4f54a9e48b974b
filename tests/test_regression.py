"""tools/regression.py: the pairs are the teacher's ODE's, made once, the same for any number of
processes; the regression learns them; dmd2.py starts from its student."""

from types import SimpleNamespace

import pytest
import torch
from helpers.runs import QUICK, close, log, run_processes, same

from common.errors import RunError
from common.rng import PerImageNoise
from common.sampling import teacher_sample
from common.teachers.load import load_teacher
from tools import regression
from tools.regression import STEPS, Pairs


def run_at(out, seed=0, stopping=0):
    args = SimpleNamespace(seed=seed, teacher="toy-cond")
    return SimpleNamespace(
        out=out,
        args=args,
        world=1,
        rank=0,
        is_main=False,
        dtype=torch.float32,
        batch=50,
        print=lambda *text: None,
        barrier=lambda: None,
        stopping=stopping,
    )


@pytest.fixture
def teacher():
    return load_teacher("toy-cond")


def test_eq01_pairs_are_the_teachers(teacher, tmp_path):
    pairs = Pairs(run_at(tmp_path), teacher, 150, 2.0)
    index = torch.tensor([149, 3, 64, 3])
    z, x, cond = pairs.rows(index)
    assert torch.equal(cond["labels"], index % 8)
    assert torch.equal(z[1], z[3])
    assert torch.equal(x[1], x[3])
    assert not torch.equal(z[0], z[1])
    cond = teacher.encode(index % 8)
    assert torch.allclose(x, teacher_sample(teacher, z, cond, STEPS, 2.0), atol=1e-5)
    assert not torch.allclose(x, teacher_sample(teacher, z, cond, STEPS, 1.0), atol=1e-2)


def test_pairs_have_other_noise_than_sample_grids(teacher, tmp_path):
    z, _, _ = Pairs(run_at(tmp_path), teacher, 8, 2.0).rows(torch.arange(8))
    assert not torch.equal(z, PerImageNoise(0, range(8))(2))


def test_what_is_missing_is_made_again_and_is_the_same(teacher, tmp_path, monkeypatch):
    Pairs(run_at(tmp_path), teacher, 150, 2.0)
    (folder,) = tmp_path.iterdir()
    files = sorted(folder.iterdir())
    assert len(files) == 3
    content = [f.read_bytes() for f in files]
    files[1].unlink()
    made = []

    def counted(model, z, *args):
        made.append(len(z))
        return teacher_sample(model, z, *args)

    monkeypatch.setattr(regression, "teacher_sample", counted)
    Pairs(run_at(tmp_path), teacher, 150, 2.0)
    assert sum(made) == 64
    assert [f.read_bytes() for f in files] == content


def test_other_pairs_have_a_folder_of_their_own(teacher, tmp_path):
    Pairs(run_at(tmp_path), teacher, 8, 2.0)
    Pairs(run_at(tmp_path), teacher, 8, 1.0)
    Pairs(run_at(tmp_path, seed=1), teacher, 8, 2.0)
    Pairs(run_at(tmp_path), teacher, 9, 2.0)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_signal_ends_the_making(teacher, tmp_path):
    with pytest.raises(SystemExit, match="143"):
        Pairs(run_at(tmp_path, stopping=15), teacher, 150, 2.0)


def test_damaged_pairs(teacher, tmp_path):
    pairs = Pairs(run_at(tmp_path), teacher, 8, 2.0)
    pairs.paths()[0].write_bytes(b"x")
    with pytest.raises(RunError, match="pairs not written or not readable"):
        Pairs(run_at(tmp_path), teacher, 8, 2.0)


ARGS = ["--teacher", "toy", "--batch", 32, "--eval-n", 0, "--sample-every", 0, "--pairs", 256]
ARGS += ["--iters", 40, "--log-every", 1, "--save-every", 20]


def test_it_learns_the_pairs(scripts, tmp_path):
    scripts.run("tools/regression.py", *ARGS, "--out", tmp_path / "run")
    losses = [line["regression"] for line in log(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_resume_and_two_processes(scripts, tmp_path):
    one, two, half = tmp_path / "one", tmp_path / "two", tmp_path / "half"
    scripts.run("tools/regression.py", *ARGS, "--out", one)
    run_processes(scripts, 2, "tools/regression.py", *ARGS, "--out", two)
    close(one, two, 40)
    for a, b in zip(sorted(one.glob("pairs-*/*")), sorted(two.glob("pairs-*/*")), strict=True):
        assert a.name == b.name
        assert a.read_bytes() == b.read_bytes()
    scripts.run("tools/regression.py", *ARGS, "--iters", 20, "--out", half)
    scripts.run("tools/regression.py", *ARGS, "--resume", "--out", half)
    same(one, half, 40)


def test_dmd2_starts_from_its_student(scripts, tmp_path):
    scripts.run("tools/regression.py", *ARGS, "--out", tmp_path / "first")
    args = [*QUICK, "--lr", 0, "--iters", 1, "--start", tmp_path / "first"]
    scripts.run("dmd2.py", *args, "--out", tmp_path / "second")

    def student(name, it):
        path = tmp_path / name / "ckpt" / f"it-{it:08d}.pt"
        return torch.load(path, weights_only=True)["state"]["student"]

    first, second = student("first", 40), student("second", 1)
    for name, v in first.items():
        assert torch.equal(second[name], v), name
