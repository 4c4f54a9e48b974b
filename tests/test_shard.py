"""--shard on two gloo processes: the same numbers as whole networks, checkpoints that any number of processes reads, a whole student."""

import json
import shutil
import types
import warnings

import pytest
import torch
from helpers import pipelines
from helpers.cases import SCRIPTS, SECOND_FLAGS
from helpers.runs import QUICK, close, one_line, processes, same

from common import shard
from common.errors import UserError
from common.files import read_json
from common.sampling import generate
from common.teachers.load import PIPELINES, load_model, load_pipeline, load_teacher
from tools import random_teachers

SECOND_FLAGS = SECOND_FLAGS | {
    "flowmap": [
        "--teacher",
        "toy-cond",
        "--correction",
        0.25,
        "--ema",
        1000,
    ],  # the form with a forward-mode derivative
    "msd": [
        *SECOND_FLAGS["msd"],
        "--eval-n",
        9,
    ],  # of eight labels, the first process has one more: other experts are asked there
}
slow = pytest.mark.slow


def test_a_torch_that_cannot_shard_on_cpus(monkeypatch):
    """2.6: a traceback on one process and the others waiting for it."""
    monkeypatch.delattr(torch.cpu.Stream, "record_event", raising=False)
    with pytest.raises(UserError, match="--shard: expected a newer torch for CPUs"):
        shard.Sharding(torch.device("cpu"))


def two(scripts, script, args, out):
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"torch {torch.__version__} cannot shard on CPUs")
    ps = processes(scripts, 2, f"{script}.py", *args, "--shard", "--out", out)
    assert [p.wait() for p in ps] == [0, 0], ps[0].err + ps[1].err
    assert (
        "UserWarning" not in ps[0].err and ps[1].out == ""
    )  # diffusers has a FutureWarning of its own
    return ps[0]


def both(scripts, tmp_path, script, args, it):
    """The run on one process and sharded on two -> folders `one` and `two`, compared, with the average."""
    scripts.run(f"{script}.py", *args, "--out", tmp_path / "one")
    out = two(scripts, script, args, tmp_path / "two").out
    close(tmp_path / "one", tmp_path / "two", it)
    a, b = (
        torch.cat(
            [v.flatten() for v in state(tmp_path / name, it)["ema"]["model"].values()]
            or [torch.ones(1)]
        )
        for name in ("one", "two")
    )
    assert (a - b).norm() <= 1e-5 * a.norm()
    return out


def state(out, it):
    return torch.load(out / "ckpt" / f"it-{it:08d}.pt", weights_only=True)["state"]


@pytest.mark.parametrize(
    "script", [s if s == "dmd2" else pytest.param(s, marks=slow) for s in SCRIPTS if s != "nct"]
)  # nct refuses it
def test_toy(script, scripts, tmp_path):
    both(scripts, tmp_path, script, [*QUICK, *SECOND_FLAGS[script], "--iters", 5, "--log-every", 1], 5)


def test_checkpoints(scripts, tmp_path):
    """Sharded, 4 + 4 = 8 bit for bit. A checkpoint of two processes goes on in one, and the other way round."""
    args = [*QUICK, *SECOND_FLAGS["dmd2"], "--log-every", 1, "--save-every", 4, "--iters"]
    two(scripts, "dmd2", [*args, 8], tmp_path / "whole")
    two(scripts, "dmd2", [*args, 4], tmp_path / "parts")
    shutil.copytree(tmp_path / "parts", tmp_path / "alone")
    assert (
        "resumed it-00000004.pt"
        in two(scripts, "dmd2", [*args, 8, "--resume"], tmp_path / "parts").out
    )
    same(tmp_path / "whole", tmp_path / "parts", 8)
    scripts.run("dmd2.py", *args, 8, "--resume", "--out", tmp_path / "alone")
    close(tmp_path / "whole", tmp_path / "alone", 8)
    scripts.run("dmd2.py", *args, 4, "--overwrite", "--out", tmp_path / "alone")
    two(scripts, "dmd2", [*args, 8, "--resume"], tmp_path / "alone")
    close(tmp_path / "whole", tmp_path / "alone", 8)


@slow  # 20 seconds of a core: two processes that import diffusers and draw pictures
def test_mnist(scripts, tmp_path):
    """Blocks of a transformer, features for the GAN from the middle of it, activations recomputed; then the metric on both processes, 32 and 31 images."""
    args = [
        "--teacher",
        "mnist",
        "--batch",
        4,
        "--iters",
        3,
        "--log-every",
        1,
        "--sample-every",
        0,
        "--cooldown",
        0,
        "--gan",
        "--ratio",
        2,
        "--ema",
        1000,
        "--eval-n",
        63,
        "--grad-checkpoint",
    ]
    out = both(scripts, tmp_path, "dmd2", args, 3)
    one, other = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")
    )
    assert (
        other["fd"] == pytest.approx(one["fd"], rel=1e-3)
        and other["agreement"] == one["agreement"]
        and other["distinct"] == 63
    )
    student, average = read_student(tmp_path / "two"), state(tmp_path / "two", 3)["ema"]["model"]
    assert student.state_dict().keys() == average.keys() and all(
        torch.equal(v, average[k]) for k, v in student.state_dict().items()
    )
    line = next(line for line in out.splitlines() if "memory, networks" in line)
    mb = {
        name: float(n)
        for name, n, _ in map(
            str.split, line.split(": ")[0].replace("memory, networks", "").split(",")
        )
    }
    whole = sum(p.numel() for p in student.parameters()) * 16 / 2**20
    assert mb["student"] == pytest.approx(whole / 2, rel=0.02) and mb["teacher"] == pytest.approx(
        whole / 8, rel=0.02
    )  # half of it on each process


def read_student(out):
    return load_model(out / "student", read_json(out / "student" / "distill.json")["model"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function: name -> folder of a tiny pipeline, flags that choose it."""
    base, made = tmp_path_factory.mktemp("shard"), {}
    warnings.simplefilter("ignore")
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    (base / "prompts.txt").write_text("dog\na red heart\n")

    def get(name):
        if name not in made:
            (base / name).mkdir()
            made[name] = getattr(pipelines, name)(base / name)
        return made[name], [
            "--teacher",
            made[name],
            "--prompts",
            base / "prompts.txt",
            "--cache-prompts",
            base / "cache",
        ]

    return get


@slow
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "sana"])
def test_pipeline(name, folder, scripts, tmp_path):
    """Three iterations and the pictures equal those of whole networks; the run goes on; the exported student is whole and diffusers loads it."""
    import diffusers

    home, args = folder(name)
    args += [
        "--batch",
        4,
        "--cfg",
        3,
        "--eval-n",
        0,
        "--log-every",
        1,
        "--cooldown",
        0,
        "--ema",
        20,
        "--ratio",
        2,
        "--sample-every",
        0,
        "--grad-checkpoint",
        "--nfe",
        2,
    ]
    both(scripts, tmp_path, "dmd2", [*args, "--iters", 3], 3)
    picture = lambda run: (tmp_path / run / "samples" / "00000003.png").read_bytes()
    assert picture("one") == picture("two")
    average = state(tmp_path / "two", 3)["ema"]["model"]
    teacher = load_pipeline(
        str(home), prompts=["dog", "a red heart"], cache=args[5], say=lambda *a: None
    )
    net = getattr(diffusers, teacher.network_class).from_pretrained(tmp_path / "two" / "student")
    assert all(torch.equal(v, average[f"net.{k}"]) for k, v in net.state_dict().items())
    assert (
        "resumed it-00000003.pt"
        in two(
            scripts, "dmd2", [*args, "--iters", 4, "--resume", "--dtype", "bf16"], tmp_path / "two"
        ).out
    )


def test_units():
    """A full-size network is never whole: its largest unit is small (SD 1.5: a fifth, an upper block beside its transformers); every weight is in one."""
    for name, e in random_teachers.TABLE.items():
        cls = PIPELINES[e["pipeline"]]
        model = cls(
            random_teachers.network(e, "meta"),
            types.SimpleNamespace(config=types.SimpleNamespace(**e["vae"])),
            e["scheduler"],
        )
        seen, shares = set(), []
        for unit in shard.units(model):
            own = {id(p): p.numel() for p in unit.parameters() if id(p) not in seen}
            seen |= own.keys()
            shares.append(sum(own.values()) / e["parameters"])
        assert sum(shares) == pytest.approx(1) and max(shares) < 0.2 and len(shares) > 7, name
    assert len(shard.units(load_teacher("mnist"))) > 8


def test_processes_make_as_many_batches():
    """A sharded network answers when all processes ask; whatever the numbers, every image is made once."""
    model = types.SimpleNamespace(
        parameters=lambda: iter([torch.zeros(1)]), classes=3, shape=(2,), encode=lambda labels: {}
    )
    for n, batch, world in (
        (501, 250, 2),
        (9, 4, 2),
        (10, 3, 3),
        (7, 1, 3),
        (64, 250, 4),
        (1, 250, 1),
    ):
        parts = [
            [
                index
                for index, _, _ in generate(
                    lambda model, z, cond, noise: z, model, n, batch=batch, rank=r, world=world
                )
            ]
            for r in range(world)
        ]
        assert (len({len(p) for p in parts}) == 1 or batch == 1) and max(
            len(i) for p in parts for i in p
        ) <= batch
        assert sorted(torch.cat([i for p in parts for i in p]).tolist()) == list(range(n))


def test_refused(scripts, tmp_path):
    start = lambda *flags: scripts.start(
        "dmd2.py", *QUICK, "--out", tmp_path / "run", "--shard", *flags
    )
    one_line(start(), "--shard: expected several processes .*found one", "dmd2")
    for flag in ("--compile", "--ema-cpu"):
        one_line(start(flag), f"--shard with {flag}", "dmd2")
