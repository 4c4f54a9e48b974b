"""What a run keeps in memory: the estimate before loading, the average on the CPU, text encoders
that are gone before the network comes."""

import re
import weakref
from types import SimpleNamespace

import pytest
import torch
from helpers import pipelines
from helpers.runs import QUICK, checkpoint, log

from common.errors import UserError
from common.files import format_bytes
from common.teachers.flow import Sana
from common.teachers.load import load_pipeline, load_teacher
from common.teachers.pipeline import Pipeline
from common.teachers.unet import SDXL
from training.ema import EMA
from training.memory import estimate_memory, refuse_if_too_large

# ---- the estimate --------------------------------------------------------------------------------


def estimate(world=1, experts=1, students=1, critics=1, averages=0, single=False, **flags):
    """Bytes by part for a network of 1,000 parameters and a VAE of 100 in bf16."""
    args = dict(teacher="toy", ema=0, ema_cpu=False, lora=None, lora_fake=None, shard=False)
    args |= dict(small=None, small_fake=None, shard_size=None)
    args = SimpleNamespace(**args | flags)
    sizes = dict(network=1000, width=2, vae=100, experts=experts, count_small=len)
    return estimate_memory(args, world, sizes, students, critics, averages, single)


BASE = dict(teacher=2000, students=16000, critics=16000, averages=0, VAE=200)


def test_trained_weights_take_16_bytes():
    """Weight, gradient and two moments in fp32."""
    assert estimate() == BASE


def test_an_average_takes_4_bytes():
    assert estimate(ema=100) == BASE | dict(averages=4000)
    assert estimate(ema=100, ema_cpu=True) == BASE


def test_several_students_and_averages():
    expected = BASE | dict(students=48000, critics=0, averages=4000)
    assert estimate(students=3, critics=0, averages=1) == expected


def test_students_of_a_teacher_of_two_experts():
    """A student is as large as both experts, unless the script's students are one network each."""
    assert estimate(students=2, experts=2) == BASE | dict(students=32000)
    single = estimate(students=2, experts=2, single=True, ema=100)
    assert single == BASE | dict(averages=4000)


def test_adapters_are_not_counted():
    assert estimate(lora=dict(rank=4), ema=100) == BASE | dict(students=0)
    assert estimate(lora_fake=dict(rank=4)) == BASE | dict(critics=0)


def test_smaller_networks_have_their_own_size():
    """count_small is `len` here: 300 and 200 parameters; of two experts, twice as many."""
    small, small_fake = range(300), range(200)
    assert estimate(small=small, ema=100) == BASE | dict(students=4800, averages=1200)
    assert estimate(small_fake=small_fake) == BASE | dict(critics=3200)
    assert estimate(small=small, experts=2) == BASE | dict(students=9600)
    assert estimate(small=small, experts=2, single=True) == BASE | dict(students=4800)


def test_shards_are_estimated_by_process():
    expected = dict(teacher=500, students=4000, critics=0, averages=0, VAE=200)
    assert estimate(world=4, critics=0, shard=True) == expected


def refuse(total, free, ema=0, lora=None):
    args = SimpleNamespace(teacher="toy", ema=ema, ema_cpu=False, lora=lora)
    refuse_if_too_large(args, total, free, "cpu")


def test_what_does_not_fit_is_refused_with_advice():
    refuse(34200, 34200)  # to the byte
    with pytest.raises(UserError) as e:
        refuse(34201, 34200)
    text = str(e.value)
    assert "\n" not in text
    assert text.startswith("--teacher toy: its networks need 0.0 MB, activations not included")
    for advice in ("--lora RANK", "--shard", "--grad-checkpoint", "--batch"):
        assert advice in text
    assert "--ema-cpu" not in text


def test_advice_names_only_what_would_help():
    with pytest.raises(UserError, match="--ema-cpu"):
        refuse(2, 1, ema=1)
    with pytest.raises(UserError) as e:
        refuse(2, 1, lora=dict(rank=4))
    assert "--lora" not in str(e.value)


def test_units():
    assert format_bytes(3 * 2**29) == "1.5 GB"
    assert format_bytes(2**19) == "0.5 MB"


def load_quietly(folder, **kwargs):
    text = dict(prompts=["a"], cache=folder.parent / "cache", say=lambda *args: None)
    text |= kwargs.pop("text", {})
    return load_teacher(str(folder), text=text, **kwargs)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_a_pipeline_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    """Its size is read from the headers of its files."""
    (tmp_path / "sd15").mkdir()
    folder = pipelines.sd15(tmp_path / "sd15")
    given = {}

    def refuse_all(**sizes):
        given.update(sizes)
        raise UserError("too large")

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "load_net", None)  # a call would fail
        with pytest.raises(UserError, match="too large"):
            load_quietly(folder, dtype=torch.bfloat16, budget=refuse_all)
    model = load_quietly(folder)
    whole = dict(flag="--small", changes=[], seed=0)
    assert given.pop("count_small")(whole) == count(model)
    assert given == dict(network=count(model), vae=count(model.vae), width=2, experts=1)


def test_both_experts_are_counted(tmp_path):
    (tmp_path / "wan").mkdir()
    folder = pipelines.wan22(tmp_path / "wan")
    given = {}
    note = lambda **sizes: given.update(sizes)
    model = load_quietly(folder, text=dict(size=16, frames=1), budget=note)
    assert len(model.experts) == 2
    assert given["experts"] == 2
    assert given["network"] == count(model)


def test_a_run_that_does_not_fit(scripts, tmp_path):
    """From the command line, on a machine with a kilobyte."""
    small = "import training.run; training.run.free_memory = lambda device, world: 1024"
    p = scripts.start("dmd2.py", *QUICK, "--out", tmp_path / "run", BEFORE=small)
    assert p.wait() == 2
    assert re.fullmatch(r"dmd2\.py: --teacher toy: its networks need [^\n]*\n", p.err)
    assert "memory, estimated" in p.out


def test_the_peak_is_printed(scripts, tmp_path):
    p = scripts.run("dmd2.py", *QUICK, "--iters", 5, "--out", tmp_path / "run")
    printed = float(re.search(r"memory, peak +(\d+) MB so far", p.out)[1])
    assert printed == pytest.approx(log(tmp_path / "run", times=True)[-1]["peak_mb"], rel=0.2)


# ---- --ema-cpu -----------------------------------------------------------------------------------


class Box(torch.nn.Linear):
    """Stands for a Model: a layer, and copy()."""

    def copy(self):
        twin = Box(self.in_features, self.out_features)
        twin.load_state_dict(self.state_dict())
        return twin


def test_the_average_on_the_cpu_is_the_same():
    torch.manual_seed(0)
    model = Box(30, 30)
    on_device = EMA(model, 100)
    on_cpu = EMA(model, 100, on_cpu=True)
    for _ in range(20):
        with torch.no_grad():
            model.weight += torch.randn(30, 30)
        on_device.update(10)
        on_cpu.update(10)
        model.bias.data.add_(1)  # while the thread may still be at work
    assert torch.equal(on_cpu.model.weight, on_device.model.weight)
    assert torch.equal(on_cpu.model.bias, on_device.model.bias)
    assert not on_cpu.model.weight.requires_grad
    assert on_cpu.model is not model


def test_the_two_kinds_of_average_read_each_others_checkpoints():
    model = Box(3, 3)
    on_device = EMA(model, 100)
    on_cpu = EMA(model, 100, on_cpu=True)
    with torch.no_grad():
        model.weight += 1
    on_device.update(10)
    on_cpu.load_state_dict(on_device.state_dict())
    assert on_cpu.images == 10
    assert torch.equal(on_cpu.model.weight, on_device.model.weight)
    on_device.load_state_dict(on_cpu.state_dict())
    assert on_device.state_dict()["model"].keys() == on_cpu.state_dict()["model"].keys()


def same_checkpoint(a, b):
    assert a.keys() == b.keys()
    for name, v in a.items():
        assert torch.equal(v, b[name]) if torch.is_tensor(v) else v == b[name], name


@pytest.mark.parametrize(
    "script, flags",
    [
        ("dmd2", []),
        pytest.param("msd", ["--teacher", "toy-cond", "--students", 2], marks=pytest.mark.slow),
        pytest.param("phased_dmd", ["--phases", 3, "--phase-iters", 2], marks=pytest.mark.slow),
    ],
)
def test_runs_with_the_average_on_the_cpu(script, flags, scripts, tmp_path):
    on_device, on_cpu = tmp_path / "device", tmp_path / "cpu"
    args = [f"{script}.py", *QUICK, *flags, "--ema", 500, "--iters", 6, "--save-every", 3, "--out"]
    scripts.run(*args, on_device)
    scripts.run(*args, on_cpu, "--ema-cpu")
    same_checkpoint(checkpoint(on_device, 6), checkpoint(on_cpu, 6))
    names = [p.relative_to(on_cpu) for p in (on_cpu / "student").rglob("*.safetensors")]
    assert names
    for name in names:
        assert (on_cpu / name).read_bytes() == (on_device / name).read_bytes()

    (on_cpu / "ckpt" / "it-00000006.pt").unlink()
    scripts.run(*args, on_cpu, "--ema-cpu", "--resume")
    same_checkpoint(checkpoint(on_device, 6), checkpoint(on_cpu, 6))
    assert log(on_cpu) == log(on_device)


# ---- text encoders -------------------------------------------------------------------------------


@pytest.mark.parametrize("name, cls", [("sdxl", SDXL), ("sana", Sana)])
def test_text_encoders_are_gone_before_the_network_comes(name, cls, tmp_path, monkeypatch):
    """Counts which modules of the pipeline that encodes prompts are alive when the network is about
    to be loaded."""
    (tmp_path / name).mkdir()
    folder = str(getattr(pipelines, name)(tmp_path / name))
    text_pipeline, load_net = cls.text_pipeline.__func__, cls.load_net.__func__
    seen = []  # weak references
    alive = []  # how many of them, at each load of a network

    def recorded_pipeline(cls, *args):
        pipe = text_pipeline(cls, *args)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                seen.extend(weakref.ref(module) for module in part.modules())
        return pipe

    def recorded_load(cls, *args):
        alive.append(sum(ref() is not None for ref in seen))
        return load_net(cls, *args)

    monkeypatch.setattr(cls, "text_pipeline", classmethod(recorded_pipeline))
    monkeypatch.setattr(cls, "load_net", classmethod(recorded_load))
    quiet = dict(prompts=["a", "b"], cache=tmp_path / "cache", say=lambda *args: None)
    model = load_pipeline(folder, **quiet)
    assert len(seen) > 10
    assert alive == [0]
    packages = {type(m).__module__.split(".")[0] for m in [*model.modules(), *model.vae.modules()]}
    assert "transformers" not in packages

    known = len(seen)
    load_pipeline(folder, **quiet)  # embeddings come from the cache
    assert alive == [0, 0]
    assert len(seen) == known
