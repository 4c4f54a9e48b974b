"""common/pairs.py: the teacher's pairs are its ODE's, made once, the same for any number of processes; the warm-up learns them and leaves no trace in a resume."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers.runs import QUICK, close, processes, same

import dmd2
from common.errors import RunError, UserError
from common.pairs import STEPS, Pairs, warm_up
from common.rng import BatchRandom, PerImageNoise
from common.sampling import teacher_sample
from common.teachers.load import load_teacher


def run_of(out, **args):
    args = SimpleNamespace(**dict(seed=0, teacher="toy-cond", cfg=2.0) | args)
    return SimpleNamespace(
        out=out,
        args=args,
        world=1,
        rank=0,
        main=False,
        dtype=torch.float32,
        method="dmd2",
        batch=50,
        print=lambda *a: None,
        stopping=0,
    )


def test_pairs(tmp_path, monkeypatch):
    teacher = load_teacher("toy-cond")
    made = Pairs(run_of(tmp_path), teacher, 150, 2.0)
    index = torch.tensor([149, 3, 64, 3])
    z, x, cond = made.rows(index)
    assert (
        torch.equal(cond["labels"], index % 8)
        and torch.equal(z[1], z[3])
        and torch.equal(x[1], x[3])
        and not torch.equal(z[0], z[1])
    )
    assert torch.allclose(
        x, teacher_sample(teacher, z, teacher.encode(index % 8), STEPS, 2.0), atol=1e-5
    )
    assert not torch.allclose(
        x, teacher_sample(teacher, z, teacher.encode(index % 8), STEPS, 1.0), atol=1e-2
    )
    assert not torch.equal(
        z, PerImageNoise(0, index.tolist())(2)
    )  # sample grids and metrics have other noise
    (folder,) = tmp_path.iterdir()
    files = sorted(folder.iterdir())
    assert len(files) == 3 and sum(len(p) for p in made.parts) == 150
    # what is there is not made again; what is missing is, and is the same
    content = [f.read_bytes() for f in files]
    files[1].unlink()
    asked = []
    monkeypatch.setattr(
        pairs, "teacher_sample", lambda *a: asked.append(len(a[1])) or teacher_sample(*a)
    )
    Pairs(run_of(tmp_path), teacher, 150, 2.0)
    assert sum(asked) == 64 and [f.read_bytes() for f in files] == content
    for other in (dict(), dict(cfg=1.0), dict(seed=1)):
        Pairs(run_of(tmp_path, **other), teacher, 8, other.get("cfg", 2.0))
    assert len(list(tmp_path.iterdir())) == 4
    stopped = run_of(tmp_path)
    stopped.stopping = 15
    files[2].unlink()
    with pytest.raises(SystemExit, match="143"):
        Pairs(stopped, teacher, 150, 2.0)
    assert files[1].exists() and not files[2].exists()
    files[0].write_bytes(b"x")
    with pytest.raises(RunError, match="pairs not written or not readable"):
        Pairs(run_of(tmp_path), teacher, 150, 2.0)


def test_regression(tmp_path):
    """Every iteration has pairs of its own; what is learnt is the teacher's image of a noise."""
    teacher, seen = load_teacher("toy"), []
    student, run = (
        teacher.copy(),
        run_of(tmp_path, cfg=1.0, betas=(0.9, 0.99), weight_decay=0.0, clip=1.0, log_every=1),
    )
    run.loop, run.draw, run.log = range, lambda it: BatchRandom(0, it, 50), lambda *a: None
    run.step = lambda opt, clip: (opt.step(), opt.zero_grad(), torch.zeros(()))[2]
    one_step = lambda z, c: seen.append(z) or student(80 * z, 1.0, 80.0, c)
    z, x, cond = Pairs(run, teacher, 500, 1.0).rows(torch.arange(500))
    before = (one_step(z, cond) * x).mean().item()
    seen.clear()
    warm_up(run, teacher, student, one_step, 500, 6, 2e-3)
    assert len(torch.cat(seen).unique(dim=0)) > 200  # 300 draws of 500: 226 different ones expected
    warm_up(run, teacher, student, one_step, 500, 100, 2e-3)
    assert abs(before) < 0.05 and (one_step(z, cond) * x).mean() > 0.3 * (x * x).mean()


@pytest.mark.parametrize(
    "flags",
    [
        "--regression 0 5 1e-3",
        "--regression 5 0.5 1e-3",
        "--regression 5 5 nan",
        "--regression 5 5 inf",
        "--regression 5 5 1e-3 --nfe 2",
    ],
)
def test_mistakes(flags):
    with pytest.raises(
        UserError,
        match="--regression.*expected (pairs, iterations and learning rate|a number of ordinary size)",
    ):
        dmd2.parse_args(flags.split())


def test_warm_up(scripts, tmp_path):
    """It learns the map, one or two processes take the same steps, with the weight average behind it; a resume does not do it again."""
    one, two, half = tmp_path / "one", tmp_path / "two", tmp_path / "half"
    args = [
        "dmd2.py",
        *QUICK,
        "--lr",
        1e-6,
        "--lr-fake",
        1e-6,
        "--ema",
        100,
        "--log-every",
        1,
        "--iters",
    ]
    warm = ["--regression", 256, 40, 2e-3]
    scripts.run(*args, 4, *warm, "--save-every", 2, "--out", one)
    ps = processes(scripts, 2, *args, 4, *warm, "--save-every", 2, "--out", two)
    assert [p.wait() for p in ps] == [0, 0], ps[0].err + ps[1].err
    lines = [json.loads(line) for line in (one / "log.jsonl").read_text().splitlines()]
    assert [line["it"] for line in lines] == [*range(-40, 4)] and all(
        ("regression" in line) == (line["it"] < 0) for line in lines
    )
    first, last = (
        sum(line["regression"] for line in part) / 5 for part in (lines[:5], lines[35:40])
    )
    assert last < 0.6 * first
    state = [
        torch.load(out / "ckpt" / "it-00000004.pt", weights_only=True)["state"]
        for out in (one, two)
    ]
    for k, v in state[0]["student"].items():  # the average starts where the warm-up ends
        assert (state[0]["ema"]["model"][k] - v).abs().max() < 1e-4
    close(one, two, 4)
    for a, b in zip(sorted(one.glob("pairs-*/*")), sorted(two.glob("pairs-*/*")), strict=True):
        assert a.name == b.name and a.read_bytes() == b.read_bytes()
    scripts.run(*args, 2, *warm, "--out", half)
    p = scripts.run(*args, 4, *warm, "--resume", "--out", half)
    assert "pairs of the teacher" not in p.out
    same(one, half, 4)
