"""What a run keeps in memory: the estimate before loading, the average on the host, text encoders that are gone."""

import json
import re
import weakref

import pytest
import torch
from helpers import pipelines
from test_run import Box, run  # noqa: F401
from test_scripts import QUICK, ROOT, checkpoint, log

from common.ema import EMA
from common.errors import UserError
from common.model import Model
from common.teachers.flow import Sana
from common.teachers.load import load_pipeline, load_teacher
from common.teachers.pipeline import Pipeline
from common.teachers.unet import SDXL

GB = 2**30


# ---- the estimate ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def estimate(run, monkeypatch):  # noqa: F811
    """estimate(free, flags, ...) -> bytes by part that budget prints, for a network of 1,000 parameters and a VAE of 100 in bf16."""
    said = {}

    def ask(free, *flags, students=1, critics=1, averages=0, **sizes):
        r = run(*flags)
        monkeypatch.setattr(r, "free_memory", lambda: free)
        memory = r.memory
        monkeypatch.setattr(
            r, "memory", lambda name, parts: said.update(parts) or memory(name, parts)
        )
        try:
            r.budget(students, critics, averages, network=1000, width=2, vae=100, **sizes)
        finally:
            r.lock.close()
        return dict(said)

    return ask


def test_estimate(estimate):
    """Weights, gradients and two moments in fp32 are 16 bytes."""
    base = dict(teacher=2000, students=16000, critics=16000, averages=0, VAE=200)
    assert estimate(10**6) == base
    assert estimate(10**6, "--ema", "100") == base | dict(averages=4000)
    assert estimate(10**6, "--ema", "100", "--ema-cpu") == base
    assert estimate(10**6, students=3, critics=0, averages=1) == base | dict(
        students=48000, critics=0, averages=4000
    )
    # a teacher of two experts, 500 parameters each: students are as large, but for a script whose students are one network each
    assert estimate(10**6, students=2, experts=2) == base | dict(students=32000)
    assert estimate(10**6, "--ema", "100", students=2, experts=2, single=True) == base | dict(
        averages=4000
    )


def test_what_does_not_fit_is_refused_with_advice(estimate):
    assert estimate(34200)  # to the byte
    with pytest.raises(
        UserError,
        match=r"--teacher toy: its networks need 0.0 MB, activations not included, found 0.0 MB free on cpu.*--shard",
    ) as e:
        estimate(34199)
    assert (
        "\n" not in str(e.value)
        and "--grad-checkpoint" in str(e.value)
        and "--batch" in str(e.value)
        and "--ema-cpu" not in str(e.value)
    )
    with pytest.raises(UserError, match="--ema-cpu"):
        estimate(38199, "--ema", "1")
    assert estimate(38200, "--ema", "1")


def test_shards_are_estimated_by_process(run, monkeypatch):  # noqa: F811
    r, said = run(), {}
    r.args.shard, r.world = True, 4
    monkeypatch.setattr(r, "memory", lambda name, parts: said.update(parts) or (0, 1))
    r.budget(1, 0, 0, network=1000, width=2, vae=100)
    assert said == dict(teacher=500, students=4000, critics=0, averages=0, VAE=200)


def test_a_pipeline_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    """Its size is read from the headers of its files."""
    (tmp_path / "sd15").mkdir()
    folder, asked = pipelines.sd15(tmp_path / "sd15"), {}

    def budget(**sizes):
        asked.update(sizes)
        raise UserError("too large")

    monkeypatch.setattr(Pipeline, "load_net", None)  # would fail if it were asked
    with pytest.raises(UserError, match="too large"):
        load_teacher(
            str(folder),
            dtype=torch.bfloat16,
            text=dict(prompts=["a"], cache=tmp_path / "cache", say=lambda *a: None),
            budget=budget,
        )
    monkeypatch.undo()
    model = load_teacher(
        str(folder), text=dict(prompts=["a"], cache=tmp_path / "cache", say=lambda *a: None)
    )
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert asked == dict(network=count(model), vae=count(model.vae), width=2, experts=1)


def test_both_experts_are_counted(tmp_path):
    (tmp_path / "wan").mkdir()
    folder, asked = pipelines.wan22(tmp_path / "wan"), {}
    text = dict(prompts=["a"], cache=tmp_path / "cache", size=16, frames=1, say=lambda *a: None)
    model = load_teacher(str(folder), text=text, budget=lambda **sizes: asked.update(sizes))
    assert (
        asked["network"] == sum(p.numel() for p in model.parameters())
        and asked["experts"] == len(model.experts) == 2
    )


def test_a_run_that_does_not_fit(scripts, tmp_path):
    """From the command line, on a machine with a kilobyte."""
    small = tmp_path / "small.py"
    small.write_text(
        f"import sys, runpy\nsys.path.insert(0, {str(ROOT)!r})\nfrom common.run import Run\nRun.free_memory = lambda run: 1024\n"
        f"sys.argv[0] = {str(ROOT / 'dmd2.py')!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    p = scripts.start(small, *QUICK, "--out", tmp_path / "run")
    assert (
        p.wait() == 2
        and re.fullmatch(r"dmd2\.py: --teacher toy: its networks need [^\n]*\n", p.err)
        and "memory, estimated" in p.out
    )


# ---- the rehearsal ------------------------------------------------------------------------------------------------------------------------------


def test_rehearsal(run, monkeypatch, capsys):  # noqa: F811
    """One pass of the largest backward: rows asked of each network, with and without gradient, nothing left behind, and what does not fit refused."""
    r, (student, other, teacher) = (
        run("--batch", "6"),
        [load_teacher("mnist").requires_grad_(i == 0) for i in range(3)],
    )
    r.args.cfg, asked, call, outs = 2.0, [], Model.forward, []

    def forward(self, x, *args, **kwargs):
        asked.append(
            (
                next(
                    (k for k, v in dict(student=student, other=other).items() if v is self),
                    "teacher",
                ),
                len(x),
                torch.is_grad_enabled(),
                x.requires_grad,
            )
        )
        return call(self, x, *args, **kwargs)

    monkeypatch.setattr(Model, "forward", forward)
    last = lambda x: (
        outs.append((len(x), x.requires_grad)) or x
    )  # a function is asked about the first network's output, in the same backward
    r.rehearse(
        dict(student=3, other=2, last=last),
        dict(student=student, other=other, teacher=teacher, steps=4),
    )
    assert outs == [(6, True)]
    assert asked == [
        ("student", 18, True, False),
        ("other", 12, True, True),
        ("teacher", 12, False, False),
    ]
    assert all(p.grad is None for m in (student, other) for p in m.parameters())
    assert re.search(
        r"memory, peak +\d+ MB expected: .* in a rehearsal of the largest backward, 24.9 MB to come",
        capsys.readouterr().out,
    )  # 8 x 3.26M
    monkeypatch.setattr(r, "free_memory", lambda: 24 * 2**20)
    with pytest.raises(
        UserError,
        match="--teacher toy: gradients and optimisers need 24.9 MB more, found 24.0 MB free on cpu; try --lora RANK",
    ):
        r.rehearse(dict(student=1), dict(student=student, teacher=teacher))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", ["dmd2", "dmd2 --dtype bf16 --batch 128", "sid", "sana_sprint", "twinflow"]
)
def test_peak_is_the_expected_one(flags, scripts, tmp_path):
    """Resident memory on a CPU, within a tenth."""
    script, *flags = flags.split()
    p = scripts.run(
        f"{script}.py",
        "--teacher",
        "mnist",
        *flags,
        "--iters",
        8,
        "--log-every",
        1,
        "--sample-every",
        0,
        "--save-every",
        0,
        "--eval-n",
        0,
        "--out",
        tmp_path / "run",
    )
    expected = float(re.search(r"memory, peak +(\d+) MB expected", p.out)[1])
    peak = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["time"][
        "peak_mb"
    ]
    assert expected == pytest.approx(peak, rel=0.1), (expected, peak)


# ---- the average on the host -------------------------------------------------------------------------------------------------------------------


def test_average_on_the_host_is_the_same():
    torch.manual_seed(0)
    model = Box(30, 30)
    device, host = EMA(model, 100), EMA(model, 100, host=True)
    for i in range(20):
        with torch.no_grad():
            model.weight += torch.randn(30, 30)
        device.update(10)
        host.update(10)
        model.bias.data.add_(1)  # while the thread may still be at work
    assert torch.equal(host.model.weight, device.model.weight) and torch.equal(
        host.model.bias, device.model.bias
    )
    assert not host.model.weight.requires_grad and host.model is not model
    again = EMA(Box(30, 30), 100, host=True)
    again.load_state_dict(host.state_dict())
    assert again.images == 200 and torch.equal(again.model.weight, device.model.weight)
    device.load_state_dict(again.state_dict())  # the two kinds read each other's
    assert device.state_dict()["model"].keys() == host.state_dict()["model"].keys()


@pytest.mark.parametrize(
    "script, flags",
    [
        ("dmd2", []),
        pytest.param("msd", ["--teacher", "toy-cond", "--students", 2], marks=pytest.mark.slow),
        pytest.param("phased_dmd", ["--phases", 3, "--phase-iters", 2], marks=pytest.mark.slow),
    ],
)
def test_runs_with_the_average_on_the_host(script, flags, scripts, tmp_path):
    args = [f"{script}.py", *QUICK, *flags, "--ema", 500, "--iters", 6, "--save-every", 3, "--out"]
    scripts.run(*args, tmp_path / "device")
    scripts.run(*args, tmp_path / "host", "--ema-cpu")
    a, b = checkpoint(tmp_path / "device", 6), checkpoint(tmp_path / "host", 6)
    assert a.keys() == b.keys() and all(
        torch.equal(v, b[k]) if torch.is_tensor(v) else v == b[k] for k, v in a.items()
    )
    weights = sorted(
        p.relative_to(tmp_path / "host")
        for p in (tmp_path / "host" / "student").rglob("*.safetensors")
    )
    assert weights and all(
        (tmp_path / "host" / p).read_bytes() == (tmp_path / "device" / p).read_bytes()
        for p in weights
    )
    (tmp_path / "host" / "ckpt" / "it-00000006.pt").unlink()
    scripts.run(*args, tmp_path / "host", "--ema-cpu", "--resume")
    b = checkpoint(tmp_path / "host", 6)
    assert all(
        torch.equal(v, b[k]) if torch.is_tensor(v) else v == b[k] for k, v in a.items()
    ) and log(tmp_path / "host") == log(tmp_path / "device")


# ---- text encoders -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdxl", "sana"])
def test_text_encoders_are_gone_before_the_network_comes(name, tmp_path, monkeypatch):
    """Every module of the pipeline that encodes prompts, when the network is about to be loaded."""
    (tmp_path / name).mkdir()
    folder = getattr(pipelines, name)(tmp_path / name)
    cls = dict(sdxl=SDXL, sana=Sana)[name]
    seen, alive, text_pipeline, load_net = [], [], cls.text_pipeline.__func__, cls.load_net.__func__

    def recorded(cls, *args):
        pipe = text_pipeline(cls, *args)
        seen.extend(
            weakref.ref(m)
            for part in pipe.components.values()
            if isinstance(part, torch.nn.Module)
            for m in part.modules()
        )
        return pipe

    def load(cls, *args):
        alive.append(sum(ref() is not None for ref in seen))
        return load_net(cls, *args)

    monkeypatch.setattr(cls, "text_pipeline", classmethod(recorded))
    monkeypatch.setattr(cls, "load_net", classmethod(load))
    model = load_pipeline(
        str(folder), prompts=["a", "b"], cache=tmp_path / "cache", say=lambda *a: None
    )
    assert len(seen) > 10 and alive == [0]
    reachable = {type(m).__module__.split(".")[0] for m in [*model.modules(), *model.vae.modules()]}
    assert "transformers" not in reachable
    load_pipeline(str(folder), prompts=["a", "b"], cache=tmp_path / "cache", say=lambda *a: None)
    assert alive == [0, 0] and len(set(map(id, seen))) == len(seen)  # the second start loads none
