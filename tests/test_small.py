"""common/small.py: --small and --small-fake, students and critics smaller than the teacher."""

import diffusers
import pytest
import torch
from helpers.cards import same_as_card, write_as_run
from helpers.dry import dry_run, leave_device
from helpers.teachers import PROMPTS, SIZE, changed, load
from helpers.trace import Trace, record_calls, run_main, weights

import dmd2
import phased_dmd
import sid
from common.errors import UserError
from common.files import read_json
from common.model import Model
from common.small import count_parameters, kept_blocks, teacher_names
from common.teachers.load import PIPELINES, load_model, load_pipeline, load_teacher
from dryrun import ghost
from dryrun.teachers import public_configs
from training.run import Run

ghost.register()  # before the first backward of this process: while pytest collects


# ---- which blocks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, total, expected",
    [
        (6, 12, [0, 2, 4, 7, 9, 11]),  # DistilBERT's
        (2, 3, [0, 2]),  # BK-SDM: layers of a UNet's stage on the way up
        (1, 2, [0]),  # on the way down
        (3, 3, [0, 1, 2]),
        (5, 3, [0, 1, 2]),  # a larger network: the others are new
    ],
)
def test_kept_blocks(n, total, expected):
    assert kept_blocks(n, total) == expected


# kind of tiny pipeline -> keys of its numbers of blocks, and the lists of these blocks
DEPTHS = {
    "sd3": dict(num_layers="transformer_blocks"),
    "sana": dict(num_layers="transformer_blocks"),
    "flux": dict(num_layers="transformer_blocks", num_single_layers="single_transformer_blocks"),
    "flux2": dict(num_layers="transformer_blocks", num_single_layers="single_transformer_blocks"),
    "lumina": dict(num_layers="layers"),
    "qwen": dict(num_layers="transformer_blocks"),
    "zimage": dict(n_layers="layers"),
    "wan": dict(num_layers="blocks"),
    "dit": dict(num_layers="transformer_blocks"),
    "sit": dict(num_layers="transformer_blocks"),
}
FAST = ["flux", "wan"]
slow = pytest.mark.slow


def load_any(folders, kind):
    if kind in ("dit", "sit"):
        return load_teacher(str(folders(kind)), text=dict(say=lambda line: None))
    return load(folders, kind, PROMPTS)


def deepened(teacher, keys, blocks):
    """A frozen teacher like this one with more blocks."""
    deep = teacher.copy(None, changed(*[f"{key}={blocks}" for key in keys]))
    return deep.requires_grad_(False)


@pytest.mark.parametrize("kind", [k if k in FAST else pytest.param(k, marks=slow) for k in DEPTHS])
def test_kept_blocks_are_the_teachers(kind, folders):
    """Bit for bit, and all else too: of five blocks 0, 2 and 4. Without them, both are the same
    network."""
    keys = DEPTHS[kind]
    teacher = deepened(load_any(folders, kind), keys, 5)
    student = teacher.copy(None, changed(*[f"{key}=3" for key in keys]))
    assert student.copied_share == 1
    ours, theirs = student.net.state_dict(), teacher.net.state_dict()
    lists = tuple(f"{name}." for name in keys.values())
    for name in lists:
        numbers = {
            int(key.removeprefix(name).split(".")[0]) for key in ours if key.startswith(name)
        }
        assert numbers == {0, 1, 2}
    for name, tensor in ours.items():
        prefix = next((p for p in lists if name.startswith(p)), None)
        if prefix:
            number, rest = name.removeprefix(prefix).split(".", 1)
            name = f"{prefix}{2 * int(number)}.{rest}"
        assert torch.equal(tensor, theirs[name]), name
    count = sum(p.numel() for p in student.parameters())
    options = student.network, teacher.net_config(), changed(*[f"{key}=3" for key in keys])
    assert count == count_parameters(*options)
    assert count < sum(p.numel() for p in teacher.parameters())
    for path in keys.values():  # the dropped blocks were all of the difference
        blocks = getattr(teacher.net, path)
        setattr(teacher.net, path, torch.nn.ModuleList([blocks[i] for i in (0, 2, 4)]))
    x, cond = torch.randn(2, *teacher.shape), teacher.encode([0, 1])
    with torch.no_grad():
        assert torch.equal(student(x, 0.6, 0.8, cond), teacher(x, 0.6, 0.8, cond))
        maps = student(x, 0.6, 0.8, cond, features=(0.2, 0.9))  # where a GAN head sits
    assert len(maps) == 2


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_unets_as_bk_sdm(name):
    """At full size, by shapes: all of its parameters start as the teacher's. 0.58 billion are those
    of BK-SDM-Base."""
    index, config, *_ = public_configs(name)
    cls = PIPELINES[index["_class_name"]]
    nets = []
    for changes in ({}, dict(layers_per_block=1)):
        with torch.device("meta"):
            nets.append(cls.network(config | changes))
    whole, half = nets
    names = teacher_names(half, whole)
    assert names.keys() == half.state_dict().keys()
    last = "up_blocks.2.resnets.{}.conv1.weight"
    assert names[last.format(1)] == last.format(2)
    if name == "sd15":
        assert sum(p.numel() for p in half.parameters()) == pytest.approx(0.58e9, rel=0.005)


def test_tensors_of_another_shape_are_new():
    """Equal on all processes, and for every copy; the share of the others is known."""
    teacher = load_teacher("toy")
    student = teacher.copy(None, changed("width=64", seed=5))
    again = teacher.copy(None, changed("width=64", seed=5))
    other = teacher.copy(None, changed("width=64", seed=6))
    assert torch.equal(weights(student), weights(again))
    assert not torch.equal(weights(student), weights(other))
    assert torch.equal(student.net.out.bias, teacher.net.out.bias)
    total = sum(p.numel() for p in student.parameters())
    assert student.copied_share == 2 / total  # that bias alone has its size


def test_copies_of_a_smaller_network_are_as_small():
    student = load_teacher("toy").copy(None, changed("depth=2"))
    for copy in (student.copy(), student.copy(None, changed("depth=2"))):
        assert torch.equal(weights(copy), weights(student))
        assert next(copy.parameters()) is not next(student.parameters())


def test_a_student_of_a_rounded_teacher_starts_from_its_files(folders):
    options = dict(prompts=PROMPTS, cache=folders.cache, say=lambda line: None, **SIZE["flux"])
    exact = load_pipeline(str(folders("flux")), **options)
    rounded = load_pipeline(str(folders("flux")), dtype=torch.bfloat16, **options)
    changes = changed("num_layers=1", "num_single_layers=1")
    expected = weights(exact.copy(None, changes))
    assert torch.equal(weights(rounded.copy(None, changes)), expected)
    assert not torch.equal(expected, expected.bfloat16().float())


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, expected",
    [
        ("layers=2", "--small layers=2: layers: expected a key of the network's config.json"),
        ("num_layers=x", "--small num_layers=x: no network can be built: TypeError"),
        ("in_channels=8", "--small in_channels=8: no network for the teacher's samples: "),
        ("joint_attention_dim=8", "no network for the teacher's samples: RuntimeError"),
        ("out_channels=8", "expected a network for samples .*, found one for "),
    ],
)
def test_changes_that_make_no_student(change, expected, folders):
    with pytest.raises(UserError, match=expected) as e:
        load(folders, "flux", PROMPTS).copy(None, changed(change))
    assert "\n" not in str(e.value)


def test_a_wrong_change_is_found_before_the_weights_are_loaded(folders, monkeypatch, tmp_path):
    """The estimate of the memory needs the size of the network."""
    calls = record_calls(monkeypatch, PIPELINES["StableDiffusionPipeline"], "load_net")
    flags = ["--teacher", folders("sd15"), "--cache-prompts", folders.cache]
    with pytest.raises(UserError, match="--small-fake layers_per_bloc=1: .*did you mean"):
        run_main(monkeypatch, dmd2, *flags, "--out", tmp_path, "--small-fake", "layers_per_bloc=1")
    assert calls == []


# ---- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [dmd2, sid, phased_dmd], ids=lambda script: script.__name__)
def test_who_receives_gradients(script, monkeypatch, tmp_path):
    """Each weight of the smaller network whose turn it is, and no other."""
    flags = "--iters 4 --ratio 1 --cfg 2 --small depth=2 --small-fake width=24".split()
    if script is phased_dmd:
        flags += "--phases 2 --phase-iters 2".split()
    steps = Trace(monkeypatch, script, tmp_path, *flags)
    for step in steps:
        moved = {name for name in step.before if step.moved(name)}
        assert moved == {step.role}
        assert all(g is not None for g in step.grads[step.role])
        assert step.before["teacher"].numel() > step.before[step.role].numel()


def test_start_of_a_run_with_smaller_networks(monkeypatch, tmp_path, capsys):
    """--start takes a run of the same size, and refuses another."""
    quick = "--teacher toy-cond --batch 16 --iters 4 --eval-n 0 --sample-every 0 --warmup 0".split()
    small = ["--small", "depth=2", "--small-fake", "width=24"]
    first = tmp_path / "first"
    run_main(monkeypatch, dmd2, *quick, *small, "--out", first)
    plan = capsys.readouterr().out
    assert "% of the student's parameters start as the teacher's; " in plan
    record = read_json(first / "student" / "distill.json")
    assert record["flags"]["small"]["changes"] == ["depth=2"]
    begun = record_calls(monkeypatch, Run, "print_summary")
    run_main(monkeypatch, dmd2, *quick, *small, "--start", first, "--out", tmp_path / "second")
    loaded = load_model(first / "student", record["model"])
    assert begun[0].kwargs["student"].net.config == loaded.net.config
    with pytest.raises(UserError, match="--start .*: does not fit the student of these flags"):
        run_main(monkeypatch, dmd2, *quick, "--start", first, "--out", tmp_path / "third")


def test_a_dry_run_of_smaller_networks(monkeypatch, tmp_path):
    """Memory and estimate are those of their own sizes, the work is less."""
    flags = ["--teacher", "toy-cond", "--batch", 32, "--nfe", 1]
    try:
        whole = dry_run(monkeypatch, "dmd2", tmp_path, *flags)
        small = ["--small", "depth=2", "--small-fake", "width=32", "--ema", 100]
        result = dry_run(monkeypatch, "dmd2", tmp_path, *flags, *small)
    finally:
        leave_device()
    teacher = load_teacher("toy-cond")
    for role, changes, network in (
        ("student", "depth=2", "students"),
        ("critic", "width=32", "critics"),
    ):
        net = teacher.copy(None, changed(changes))
        count = sum(p.numel() for p in net.parameters())
        rounding = 512 * len(list(net.parameters()))
        assert 0 <= result["parts"][f"weights of {role}"] - 4 * count < rounding
        assert result["estimate"][network] == 16 * count
    assert result["tflop_per_iteration"] < 0.7 * whole["tflop_per_iteration"]
    assert sum(turn["waits"] == {} for turn in result["turns"]) == len(result["turns"])


def test_a_new_phase_does_not_make_the_host_wait(monkeypatch, tmp_path):
    """Its critic is a new small network, which is tried with one pass."""
    flags = "--teacher toy-cond --batch 8 --iters 8 --warmup 0 --phases 2 --phase-iters 4".split()
    try:
        result = dry_run(monkeypatch, "phased_dmd", tmp_path, *flags, "--small-fake", "depth=2")
    finally:
        leave_device()
    assert 4 in [turn["it"] for turn in result["turns"]]
    assert not any(turn["waits"] for turn in result["turns"])


# ---- export --------------------------------------------------------------------------------------

SMALLER = {
    "sd15": ["layers_per_block=2"],  # there is none below the 1 of the tiny one
    "sdxl": ["transformer_layers_per_block=[1, 1]"],
    "sd3": ["num_layers=1"],
    "sana": ["num_layers=1"],
    "flux": ["num_layers=1", "num_single_layers=1"],
    "qwen": ["num_layers=1"],
    "zimage": ["n_layers=1"],
    "wan22": ["num_layers=1"],
}


def moved(student):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    return student


@pytest.mark.parametrize(
    "kind", [k if k in ("sdxl", "flux") else pytest.param(k, marks=slow) for k in SMALLER]
)
def test_students_in_plain_diffusers(kind, folders, tmp_path):
    """The folder is a pipeline with the smaller network, and gives the samples of our sampler."""
    diffusers.utils.logging.disable_progress_bar()
    teacher = load(folders, kind, PROMPTS)
    student = moved(teacher.copy(None, changed(*SMALLER[kind])))
    record = write_as_run(tmp_path, student, teacher, "dmd2", dmd2, 2, {})
    assert "comfyui" not in record["plain"]
    same_as_card(tmp_path, teacher, student, dmd2.sample, 2, PROMPTS[0], 0)
    again = load_model(tmp_path, record["model"], teacher)
    assert torch.equal(weights(again), weights(student))


# ---- broken on purpose ---------------------------------------------------------------------------


def test_other_blocks_are_found(folders, monkeypatch):
    monkeypatch.setattr("common.small.kept_blocks", lambda n, total: list(range(n)))
    with pytest.raises(AssertionError):
        test_kept_blocks_are_the_teachers("wan", folders)


def test_weights_that_are_not_the_teachers_are_found(folders, monkeypatch):
    monkeypatch.setattr(Model, "give_weights", lambda *unused: None)
    with pytest.raises(AssertionError):
        test_kept_blocks_are_the_teachers("wan", folders)
