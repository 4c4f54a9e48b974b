"""--shard on two and four gloo processes: the numbers of whole networks, checkpoints that any
number of processes can resume, a whole student."""

import shutil
import types
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import pipelines
from helpers.cases import SCRIPTS, SECOND_FLAGS
from helpers.runs import (
    QUICK,
    checkpoint,
    close,
    log,
    one_line,
    processes,
    run_processes,
    same,
)
from PIL import Image
from safetensors.torch import load_file

from common.errors import UserError
from common.files import read_json
from common.sampling import generate
from common.teachers.load import PIPELINES, load_model, load_pipeline, load_teacher
from tools import random_teachers
from training import shard

FLAGS = SECOND_FLAGS | {
    # the form with a forward-mode derivative
    "flowmap": ["--teacher", "toy-cond", "--correction", 0.25, "--ema", 1000],
    # 9 samples of 8 labels: the first process has one more, and so other experts
    "msd": [*SECOND_FLAGS["msd"], "--eval-n", 9],
}
SHARDED = [script for script in SCRIPTS if script != "nct"]  # which has no --shard
slow = pytest.mark.slow


def run_sharded(scripts, script, args, out, n=2):
    """The script on n processes with --shard -> the finished first process."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"torch {torch.__version__} cannot shard on CPUs")
    first, *others = run_processes(scripts, n, f"{script}.py", *args, "--shard", "--out", out)
    assert "UserWarning" not in first.err  # diffusers has a FutureWarning of its own
    assert all(process.out == "" for process in others)
    return first


def compare(scripts, tmp_path, script, args, it):
    """Runs on one process (folder one) and sharded on two (folder two), and compares the runs.

    it: iterations of both. Returns what the sharded run printed.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    scripts.run(f"{script}.py", *args, "--out", one)
    printed = run_sharded(scripts, script, args, two).out
    close(one, two, it)
    expected, found = average(one, it), average(two, it)
    assert expected.keys() == found.keys()
    difference = sum((found[name] - expected[name]).square().sum() for name in expected)
    assert difference <= 1e-10 * sum(value.square().sum() for value in expected.values())
    return printed


def average(out, it):
    """Weights of the EMA in a checkpoint; without an EMA there are none."""
    payload = torch.load(out / "ckpt" / f"it-{it:08d}.pt", weights_only=True)
    return payload["state"]["ema"]["model"]


def pixels(path):
    return torch.from_numpy(np.array(Image.open(path), dtype=np.int16)).float()


def read_student(out):
    return load_model(out / "student", read_json(out / "student" / "distill.json")["model"])


def test_a_torch_that_cannot_shard_on_cpus(monkeypatch):
    """2.6 would end in a traceback on one process, with the others waiting for it."""
    monkeypatch.delattr(torch.cpu.Stream, "record_event", raising=False)
    with pytest.raises(UserError, match="--shard: expected a newer torch for CPUs"):
        shard.Sharding(torch.device("cpu"))


def test_a_network_that_is_frozen_at_first(tmp_path):
    """Its gradients are averaged in fp32 like those of any other: a group of one process."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"torch {torch.__version__} cannot shard on CPUs")
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        place = shard.Sharding(torch.device("cpu"), torch.bfloat16)
        net = load_teacher("mnist", torch.device("cpu"), torch.bfloat16, place=place).copy()
        x, alpha, sigma = torch.randn(2, *net.shape), torch.full((2,), 0.6), torch.full((2,), 0.8)
        net.requires_grad_(False)
        loss = net(x.requires_grad_(), alpha, sigma, net.encode([1, 2])).square().mean()
        loss.backward()
        net.requires_grad_(True)
        net(x.detach(), alpha, sigma, net.encode([1, 2])).square().mean().backward()
        assert {p.grad.dtype for p in net.parameters() if p.grad is not None} == {torch.float32}
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "script", [s if s == "dmd2" else pytest.param(s, marks=slow) for s in SHARDED]
)
def test_toy(script, scripts, tmp_path):
    args = [*QUICK, *FLAGS[script], "--iters", 5, "--log-every", 1]
    if script == "swiftbrush":
        args += ["--lora-fake", 0]  # adapters are not sharded
    compare(scripts, tmp_path, script, args, 5)


@slow
def test_two_copies_on_four_processes(scripts, tmp_path):
    """--shard-size: gradients are means over the copies too; also of a run that was resumed."""
    args = [*QUICK, *FLAGS["dmd2"], "--log-every", 1, "--batch", 16]
    one, two = tmp_path / "one", tmp_path / "two"
    scripts.run("dmd2.py", *args, "--iters", 5, "--out", one)
    args += ["--shard-size", 2]
    run_sharded(scripts, "dmd2", [*args, "--iters", 3], two, n=4)
    run_sharded(scripts, "dmd2", [*args, "--iters", 5, "--resume"], two, n=4)
    close(one, two, 5)
    scripts.run("dmd2.py", *args, "--iters", 6, "--resume", "--no-shard", "--out", two)


@slow
def test_bf16(scripts, tmp_path):
    """Gathered in bf16, weights are rounded as autocast rounds those of whole networks; only norms
    and biases differ. A resumed run has the same bits."""
    args = [
        "--teacher",
        "mnist",
        "--batch",
        4,
        "--log-every",
        1,
        "--cooldown",
        0,
        "--dtype",
        "bf16",
    ]
    args += ["--gan", "--ratio", 2, "--ema", 1000, "--sample-every", 0, "--eval-n", 0]
    one, two, parts = tmp_path / "one", tmp_path / "two", tmp_path / "parts"
    scripts.run("dmd2.py", *args, "--iters", 4, "--out", one)
    run_sharded(scripts, "dmd2", [*args, "--iters", 4], two)
    expected, found = average(one, 4), average(two, 4)
    difference = sum((found[name] - expected[name]).square().sum() for name in expected)
    assert difference <= 1e-4 * sum(value.square().sum() for value in expected.values())
    for a, b in zip(log(one), log(two), strict=True):
        assert (a.pop("alarms"), b.pop("alarms")) == ([], [])
        assert b == pytest.approx(a, rel=0.05, abs=0.01)

    run_sharded(scripts, "dmd2", [*args, "--iters", 2], parts)
    run_sharded(scripts, "dmd2", [*args, "--iters", 4, "--resume"], parts)
    same(two, parts, 4)


def test_checkpoints(scripts, tmp_path):
    """Sharded, 4 + 4 = 8 bit for bit. Sharded runs continue without --shard, and the reverse."""
    whole, parts, alone = tmp_path / "whole", tmp_path / "parts", tmp_path / "alone"
    args = [*QUICK, *FLAGS["dmd2"], "--log-every", 1, "--save-every", 4]
    run_sharded(scripts, "dmd2", [*args, "--iters", 8], whole)
    run_sharded(scripts, "dmd2", [*args, "--iters", 4], parts)
    shutil.copytree(parts, alone)
    continued = run_sharded(scripts, "dmd2", [*args, "--iters", 8, "--resume"], parts)
    assert "resumed it-00000004.pt" in continued.out
    same(whole, parts, 8)

    scripts.run("dmd2.py", *args, "--iters", 8, "--resume", "--no-shard", "--out", alone)
    close(whole, alone, 8)
    scripts.run("dmd2.py", *args, "--iters", 4, "--overwrite", "--out", alone)
    run_sharded(scripts, "dmd2", [*args, "--iters", 8, "--resume"], alone)
    close(whole, alone, 8)


@slow  # two processes that import diffusers and draw pictures
def test_mnist(scripts, tmp_path):
    """Blocks of a transformer, features from the middle of it, activations computed again."""
    args = ["--teacher", "mnist", "--batch", 4, "--iters", 3, "--log-every", 1, "--cooldown", 0]
    args += ["--gan", "--ratio", 2, "--ema", 1000, "--grad-checkpoint"]
    args += ["--sample-every", 0, "--eval-n", 63]  # 32 samples and 31
    printed = compare(scripts, tmp_path, "dmd2", args, 3)

    one, two = (read_json(tmp_path / name / "metrics.json") for name in ("one", "two"))
    assert two["fd"] == pytest.approx(one["fd"], rel=1e-3)
    assert two["agreement"] == one["agreement"]
    assert two["distinct"] == 63

    student, ema = read_student(tmp_path / "two").state_dict(), average(tmp_path / "two", 3)
    assert student.keys() == ema.keys()
    assert [name for name in student if not torch.equal(student[name], ema[name])] == []

    # memory of one process: half a student with gradient and two moments, half a teacher
    size = sum(value.numel() for value in student.values()) * 4 / 2**20
    assert memory(printed, "student") == pytest.approx(4 * size / 2, rel=0.02)
    assert memory(printed, "teacher") == pytest.approx(size / 2, rel=0.02)


def memory(printed, name):
    """MB of a network, from the line "memory, networks   student 12.3 MB, ...: total"."""
    [line] = [line for line in printed.splitlines() if "memory, networks" in line]
    entries = line.split(": ")[0].replace("memory, networks", "").split(",")
    sizes = dict(entry.split()[:2] for entry in entries)
    return float(sizes[name])


@pytest.fixture(scope="module")
def teacher_flags(tmp_path_factory):
    """Function: name of a tiny pipeline -> its folder, and the flags that choose it."""
    base, folders = tmp_path_factory.mktemp("shard"), {}
    warnings.simplefilter("ignore")
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    prompts = base / "prompts.txt"
    prompts.write_text("dog\na red heart\n")

    def get(name):
        if name not in folders:
            (base / name).mkdir()
            folders[name] = getattr(pipelines, name)(base / name)
        flags = [
            "--teacher",
            folders[name],
            "--prompts",
            prompts,
            "--cache-prompts",
            base / "cache",
        ]
        return folders[name], flags

    return get


@slow
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "sana"])
def test_pipeline(name, teacher_flags, scripts, tmp_path):
    """Losses and pictures equal those of whole networks; diffusers loads the exported student."""
    import diffusers

    folder, args = teacher_flags(name)
    cache = args[-1]
    args += ["--batch", 4, "--cfg", 3, "--nfe", 2, "--ratio", 2, "--ema", 20, "--cooldown", 0]
    args += ["--log-every", 1, "--sample-every", 0, "--eval-n", 0, "--grad-checkpoint"]
    compare(scripts, tmp_path, "dmd2", [*args, "--iters", 3], 3)
    one, two = (pixels(tmp_path / run / "samples" / "00000003.png") for run in ("one", "two"))
    assert (one - two).abs().max() <= 1  # one grey level: sums in another order
    assert one.std() > 10  # not an empty picture

    ema = average(tmp_path / "two", 3)
    prompts = ["dog", "a red heart"]
    teacher = load_pipeline(str(folder), prompts=prompts, cache=cache, say=lambda *line: None)
    network_class = getattr(diffusers, teacher.network_class)
    home = tmp_path / "two" / "student" / teacher.part
    student = network_class.from_pretrained(home).state_dict()
    student.pop("time_embedding.cond_proj.weight", None)  # so that pipelines do not guide it
    assert [key for key in student if not torch.equal(student[key], ema[f"net.{key}"])] == []

    more = ["--iters", 4, "--resume", "--dtype", "bf16"]
    continued = run_sharded(scripts, "dmd2", [*args, *more], tmp_path / "two")
    assert "resumed it-00000003.pt" in continued.out


@slow
def test_bf16_students_start_from_the_files(teacher_flags, scripts, tmp_path):
    """Weights that move by less than fp32 can tell end as the file's, not as the rounded ones: all
    of a critic's, and those that a smaller student has."""
    folder, args = teacher_flags("sdxl")
    args += ["--batch", 4, "--cfg", 3, "--ema", 0, "--weight-decay", 0]
    args += ["--lr", 1e-30, "--lr-fake", 1e-30, "--small", "transformer_layers_per_block=[1,1]"]
    args += ["--dtype", "bf16", "--iters", 1, "--sample-every", 0, "--eval-n", 0]
    run_sharded(scripts, "dmd2", args, tmp_path / "run")
    name = "diffusion_pytorch_model.safetensors"
    expected = load_file(folder / "unet" / name)
    found = load_file(tmp_path / "run" / "student" / "unet" / name)
    found.pop("time_embedding.cond_proj.weight")  # so that pipelines do not guide it
    assert 0 < len(found) < len(expected)
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []
    critic = checkpoint(tmp_path / "run", 1)
    critic = {key: critic[f"/state/critic/fake.net.{key}"] for key in expected}
    assert [key for key in expected if not torch.equal(critic[key], expected[key])] == []
    assert any((w != w.bfloat16()).any() for w in expected.values())


@pytest.mark.parametrize("name", random_teachers.TABLE)
def test_units(name):
    """No unit of a network of full size is large, and every weight is in one.

    The largest is a fifth of SD 1.5: an upper block, next to its transformers.
    """
    entry = random_teachers.TABLE[name]
    net = random_teachers.network(entry, "meta")
    vae = types.SimpleNamespace(config=types.SimpleNamespace(**entry["vae"]))
    model = PIPELINES[entry["pipeline"]](net, vae, entry["scheduler"])
    seen, shares = set(), []
    for unit in shard.units(model):
        own = {id(p): p.numel() for p in unit.parameters() if id(p) not in seen}
        seen |= own.keys()
        shares.append(sum(own.values()) / entry["parameters"])
    assert sum(shares) == pytest.approx(1)
    assert max(shares) < 0.2
    assert len(shares) > 7


def test_units_of_the_embedded_teacher():
    assert len(shard.units(load_teacher("mnist"))) > 8


@pytest.mark.parametrize(
    "n, batch, world",
    [(501, 250, 2), (9, 4, 2), (10, 3, 3), (7, 1, 3), (64, 250, 4), (1, 250, 1)],
)
def test_processes_make_as_many_batches(n, batch, world):
    """All processes call a sharded network equally often, and every image is made once."""
    model = types.SimpleNamespace(
        parameters=lambda: iter([torch.zeros(1)]), classes=3, shape=(2,), encode=lambda labels: {}
    )
    sample = lambda model, z, cond, noise: z
    indices = []  # of each process, of each of its batches
    for rank in range(world):
        batches = generate(sample, model, n, batch=batch, rank=rank, world=world)
        indices.append([index for index, _, _ in batches])
    if batch > 1:
        assert len({len(part) for part in indices}) == 1
    flat = [index for part in indices for index in part]
    assert max(len(index) for index in flat) <= batch
    assert sorted(torch.cat(flat).tolist()) == list(range(n))


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--shard: expected several processes .*found one"),
        (["--compile"], "--shard with --compile"),
        (["--ema-cpu"], "--shard with --ema-cpu"),
    ],
)
def test_refused(flags, message, scripts, tmp_path):
    process = scripts.start("dmd2.py", *QUICK, "--out", tmp_path / "run", "--shard", *flags)
    one_line(process, message, "dmd2")


def test_sizes_need_the_flag(scripts, tmp_path):
    flags = [*QUICK, "--out", tmp_path / "run", "--shard-size", 2]
    one_line(scripts.start("dmd2.py", *flags), "--shard-size needs --shard", "dmd2")


@pytest.mark.parametrize("size", [1, 3])
def test_refused_sizes(size, scripts, tmp_path):
    flags = [*QUICK, "--out", tmp_path / "run", "--shard", "--shard-size", size]
    first, second = processes(scripts, 2, "dmd2.py", *flags)
    one_line(
        first, f"--shard-size {size}: expected a divisor above 1 of the processes, found 2", "dmd2"
    )
    assert second.wait() == 2


# ---- states of optimisers ------------------------------------------------------------------------


def test_a_state_without_sharding_passes_unchanged():
    net = torch.nn.Linear(3, 2)
    opt = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    opt.step()
    state = opt.state_dict()
    parts = shard.local_optimizer_state(opt, state)["state"]
    assert parts.keys() == state["state"].keys()
    for i, moments in parts.items():
        assert all(value is state["state"][i][name] for name, value in moments.items())


def test_gathered_states_keep_their_form():
    state = dict(a=[torch.ones(2), 3], b=dict(c=(1.0, None)))
    gathered = shard.gather_state(state)
    assert torch.equal(gathered["a"][0], torch.ones(2))
    assert gathered["a"][1] == 3
    assert gathered["b"] == dict(c=(1.0, None))
