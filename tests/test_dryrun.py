"""dryrun/: what --dry-run shows is what real tensors take, and it finds mistakes."""

import os
import re
from pathlib import Path

import diffusers
import pytest
import torch
from helpers.cases import required_flags
from helpers.dry import dry_run, leave_device
from helpers.trace import run_main

import anyflow
import boot
import dmd2
import flowmap
import msd
import nct
import sana_sprint
import sid
import swiftbrush
import twinflow
from common.errors import RunError, UserError
from common.files import ROOT
from common.model import Model
from common.teachers.hub import HUB
from common.teachers.load import load_teacher
from dryrun import ghost
from dryrun.run import DryRun, format_time, largest_that_fits, without_flag
from dryrun.teachers import TABLE
from tools.tracker import RealMemory
from training.run import Run

ghost.register()  # before the first backward of this process: while pytest collects

TOY = ["--teacher", "toy-cond", "--batch", 32]


@pytest.fixture
def dry(monkeypatch, tmp_path):
    """dry(script, *flags) -> dryrun.json of a dry run in this process."""
    yield lambda script, *flags: dry_run(monkeypatch, script, tmp_path / "dry", *flags)
    leave_device()


# ---- memory and work -----------------------------------------------------------------------------


def test_parts_of_the_memory(dry):
    """Student and critic: fp32 weights, two moments; the average; nothing is left over."""
    result = dry("dmd2", *TOY, "--ema", 1000)
    student = load_teacher("toy-cond").copy()
    weights = sum(4 * p.numel() for p in student.parameters())
    tensors = len(list(student.parameters()))
    parts = result["parts"]
    for name in ("weights of student", "weights of critic", "average"):
        assert weights <= parts[name] < weights + 512 * tensors, name
    for name in ("moments of student", "moments of critic"):
        assert 2 * weights <= parts[name] < 2 * weights + 3 * 512 * tensors, name
    assert sum(parts.values()) == result["peak"]
    trained = [n for name, n in parts.items() if name.startswith(("weights", "moments", "average"))]
    assert sum(trained) <= result["at_rest"] < 1.1 * sum(trained)


def real_peak(monkeypatch, tmp_path, script, *flags):
    """Peak of memory in a real loop on the CPU, from its second cycle on."""
    after = Run.after
    peaks = []
    with RealMemory() as memory:

        def measured_after(run, it, *rest):
            peaks.append(memory.peak)
            after(run, it, *rest)
            if it + 1 == getattr(run.args, "ratio", 1):
                memory.restart()

        monkeypatch.setattr(Run, "after", measured_after)
        quiet = ["--save-every", 0, "--sample-every", 0, "--eval-n", 0, "--log-every", 1000]
        run_main(monkeypatch, script, "--out", tmp_path / "real", *quiet, *flags)
    return peaks[-1]


@pytest.mark.slow  # by default tests/test_gpu_check.py does this on another network
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_peak_is_that_of_real_tensors(checkpointed, dry, monkeypatch, tmp_path):
    """mnist: attention, layer norms, a transformer's feed-forward layers."""
    monkeypatch.setattr(ghost, "BLOCK", 1)
    flags = ["--batch", 16, "--dtype", "fp32", "--nfe", 1, "--ratio", 2, "--ema", 100]
    flags += ["--warmup", 0]
    flags += ["--grad-checkpoint"] if checkpointed else []
    found = max(turn["peak"] for turn in dry("dmd2", *flags)["turns"][2:])
    real = real_peak(monkeypatch, tmp_path, dmd2, "--iters", 6, *flags)
    assert found == pytest.approx(real, rel=0.05)


def test_work_of_a_pass(dry):
    """One-step dmd2 on the toy without guidance, per sample: student 3 + 1 (guided teacher: its
    exact formula has no products) + critic 1, and critic 3; each pass is the MLP's products."""
    result = dry("dmd2", *TOY, "--cfg", 1, "--nfe", 1)
    net = load_teacher("toy-cond").copy().net
    layers = [m for m in net.modules() if isinstance(m, torch.nn.Linear)]
    products = sum(2 * 32 * m.in_features * m.out_features for m in layers)
    first = 2 * 32 * layers[0].in_features * layers[0].out_features  # has no gradient of its input
    student, critic = result["turns"][2:4]
    assert critic["tflop"] * 1e12 == pytest.approx(products + 3 * products - first)
    assert student["tflop"] * 1e12 == pytest.approx(2 * (3 * products - first) + products)
    ratio = dmd2.PRESETS["toy-cond"]["ratio"]
    mean = (student["tflop"] + (ratio - 1) * critic["tflop"]) / ratio
    assert result["tflop_per_iteration"] == pytest.approx(mean)


def test_all_kinds_of_turns_are_seen(dry):
    turns = [(t["it"], t["turn"]) for t in dry("dmd2", *TOY, "--ratio", 5, "--iters", 100)["turns"]]
    both, critic = "student + critic", "critic"
    assert turns == [(0, both), (1, critic), (95, both), (96, critic)]


def test_all_phases_are_seen(dry):
    flags = ["--phases", 2, "--phase-iters", 7, "--ratio", 2, "--iters", 20]
    turns = [t["it"] for t in dry("phased_dmd", *TOY, *flags)["turns"]]
    assert {0, 1, 7, 8} < set(turns)
    assert max(turns) >= 18


def test_step_indices_are_the_lowest_and_the_highest(dry):
    """So the mean over the two is that over all of them: 0 and 3 passes, on average 1.5."""
    one, four = (dry("dmd2", *TOY, "--nfe", n)["turns"] for n in (1, 4))
    passes = [(b["tflop"] - a["tflop"]) for a, b in zip(one, four)]
    assert passes[:2] == [0, 0]
    assert passes[2] == pytest.approx(passes[3])
    assert passes[2] > 0


def test_processes_share_the_batch(dry):
    flags = ["--teacher", "toy-cond", "--batch", 4096]  # activations are the most
    whole = dry("dmd2", *flags)
    part = dry("dmd2", *flags, "--processes", 4)
    assert part["tflop_per_iteration"] == pytest.approx(whole["tflop_per_iteration"] / 4)
    assert part["peak"] < whole["peak"]


def test_microsteps_belong_to_one_iteration(dry):
    whole, parts = dry("dmd2", *TOY), dry("dmd2", *TOY, "--accumulate", 4)
    assert parts["tflop_per_iteration"] == pytest.approx(whole["tflop_per_iteration"])
    assert [t["turn"] for t in parts["turns"]] == [t["turn"] for t in whole["turns"]]


def test_nothing_is_written_but_the_result(dry, tmp_path):
    dry("dmd2", *TOY)
    assert [p.name for p in (tmp_path / "dry").iterdir()] == ["dryrun.json"]


def test_times():
    assert [format_time(s) for s in (0.1234, 90, 7200)] == ["0.123 s", "1.5 min", "2 h"]


def test_the_report(dry, capsys):
    dry("dmd2", *TOY, "--tflops", 100)
    text = capsys.readouterr().out
    for line in (
        r"turn of student \+ critic\n",
        r"memory, peak +[\d.]+ MB: weights of student",
        r"waits of the host +none",
        r"time +[\d,]+ iterations of batch \d+: [\d.e-]+ s at 100 TFLOP/s",
        r"not shown",
    ):
        assert re.search(line, text), line


# ---- every script, every kind of teacher ---------------------------------------------------------

KINDS = {  # flags that make their samples small
    "toy-cond": [],
    "mnist": ["--batch", 16],  # boot's share of boundary samples is one of 16
    "sd15": [],
    "sdxl": [],
    "sd3": [],
    "sana": [],
    "flux": ["--size", 32],
    "chroma": ["--size", 32],
    "flux2": ["--size", 32],
    "klein": ["--size", 32],
    "hunyuan": ["--size", 32],
    "lumina": [],
    "qwen": ["--size", 32],
    "zimage": ["--size", 32],
    "wan": ["--size", 16, "--frames", 5],
    "wan22": ["--size", 16, "--frames", 5],
    "sanavideo": ["--size", 32, "--frames", 5],
    "ltx": ["--size", 32, "--frames", 5],
    "hunyuanvideo": ["--size", 16, "--frames", 5],
    "dit": [],
    "sit": [],
}
SCRIPTS = "dmd2 swiftbrush sid decoupled_dmd phased_dmd msd".split()
SCRIPTS += "sana_sprint twinflow flowmap boot anyflow".split()
# By default every script on the toy, and dmd2 on a UNet and a transformer. Slow: dmd2 on all kinds,
# every other script on one. All pairs take about 25 minutes of a core: DISTIL_DRYRUN=full.
QUICK = {(script, "toy-cond") for script in SCRIPTS} | {("dmd2", "sd3"), ("dmd2", "sd15")}
SLOW = {("dmd2", kind) for kind in KINDS}
SLOW |= {("sid", "sd3"), ("decoupled_dmd", "sdxl"), ("phased_dmd", "wan22"), ("msd", "sd15")}
SLOW |= {("sana_sprint", "sana"), ("twinflow", "wan22"), ("flowmap", "sit"), ("boot", "flux")}
SLOW |= {("swiftbrush", "sdxl"), ("anyflow", "wan")}
if os.environ.get("DISTIL_DRYRUN") == "full":
    SLOW = {(script, kind) for script in SCRIPTS for kind in KINDS}
PAIRS = [
    pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow)
    for pair in sorted(QUICK | SLOW)
]
# Products in fp32 although passes are bf16: forward-mode derivatives, which are taken in fp32.
IN_FP32 = ("sana_sprint", "flowmap", "anyflow")
# Waits inside diffusers that no argument avoids: file, the text of the line, and whether it waits
# in every pass or only in the first of a network. docs/scale.md has the same list.
MODELS = "diffusers/models/transformers"
IN_DIFFUSERS = [
    # the length of the prompts, for a result that its network does not use
    (f"{MODELS}/transformer_qwenimage.py", "torch.as_tensor(text_seq_len, device=", "every"),
    # the lengths of the prompts come to the host, for the places of text and image
    (f"{MODELS}/transformer_lumina2.py", "attention_mask.sum(dim=1).tolist()", "every"),
    # zeros in the place of a guidance scale
    (
        f"{MODELS}/transformer_chroma.py",
        "guidance_proj = self.guidance_proj(torch.tensor(",
        "every",
    ),
    # valid tokens of both encoders before the padding, sample by sample
    (f"{MODELS}/transformer_hunyuanimage.py", "text_mask", "every"),
    # is there an image; valid tokens before the padding, sample by sample
    (f"{MODELS}/transformer_hunyuan_video15.py", "if is_t2v:", "every"),
    (f"{MODELS}/transformer_hunyuan_video15.py", "mask", "every"),
    # tables of positions come to the device
    (f"{MODELS}/transformer_z_image.py", "self.freqs_cis = [freqs_cis.to(device)", "first"),
]


# Their later stages begin with networks of their own.
WITH_STAGES = ("msd", "phased_dmd")


def is_in_diffusers(wait, it, script):
    for file, text, when in IN_DIFFUSERS:
        found = re.search(rf" in {file}:(\d+) ", wait)
        if found and (when == "every" or it == 0 or script in WITH_STAGES):
            source = Path(diffusers.__path__[0]).parent / file
            if text in source.read_text().splitlines()[int(found[1]) - 1]:
                return True
    return False


def copy_at(file, text):
    """The wait of a line of ours that copies to the device."""
    lines = (ROOT / file).read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if text in line)
    return f"{file}:{number} copies from the host"


def where_a_stage_begins():
    """msd: its networks start from the teacher's files, and its head is made on the host."""
    return [
        copy_at("training/run.py", "module.to(device)"),
        copy_at("common/model.py", "copied.net.load_state_dict(self.read_weights())"),
    ]


@pytest.mark.parametrize("script, kind", PAIRS)
def test_every_script_on_every_teacher(script, kind, dry, folders):
    """No tensor is on the wrong device, no iteration waits, passes are bf16."""
    teacher = kind if kind in ("toy-cond", "mnist") else folders(kind)
    flags = dict(phased_dmd=["--phases", 2, "--phase-iters", 4], sana_sprint=["--H", 4])
    flags["anyflow"] = ["--map-iters", 4]
    if kind != "toy-cond":  # the preset's rank, 64, is above the width of the tiny networks
        flags["swiftbrush"] = ["--lora-fake", 4]
        flags["msd"] = ["--adm", 0] if kind in ("dit", "sit") else []  # images of all 1,000 labels
    flags = flags.get(script, [])
    flags += ["--teacher", teacher, "--batch", 4, "--iters", 8, "--warmup", 0, *KINDS[kind]]
    result = dry(script, *flags)
    waits = [(line, turn["it"]) for turn in result["turns"] for line in turn["waits"]]
    waits = [line for line, it in waits if not is_in_diffusers(line, it, script)]
    if kind in ("hunyuan", "hunyuanvideo"):  # gradients of the valid tokens
        waits = [line for line in waits if line != "the backward pass indexes with a mask"]
    if script == "msd":  # each of these iterations begins a stage
        waits = [line for line in waits if line not in where_a_stage_begins()]
    assert not waits
    total = sum(turn["tflop"] for turn in result["turns"])
    fp32 = sum(turn["tflop_by_dtype"].get("float32", 0) for turn in result["turns"])
    if script in IN_FP32:
        assert 0 < fp32 < total
    else:
        assert fp32 < 0.02 * total  # heads


def test_times_of_one_step_samples_are_on_the_host():
    """twinflow: they choose between the experts of a teacher that has two."""
    devices = []

    def net(x, alpha, sigma, cond):
        devices.append(sigma.device.type)
        return x

    net.schedule = load_teacher("toy-cond").schedule
    with ghost.GhostDevice():
        z = torch.zeros(2, 3, device="ghost")
        twinflow.one_step(net, z, {}, 1.0)
        twinflow.sample(net, z, {}, 2, lambda: z)
    assert devices == ["cpu"] * 3


def test_nct(dry):
    result = dry("nct", "--teacher", "toy", "--batch", 8, *required_flags("nct.py"))
    assert not {line for turn in result["turns"] for line in turn["waits"]}


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--gan"], ["--lora", 2, "--lora-fake", 2, "--nfe", 4]])
def test_images_and_adapters(flags, dry, folders):
    """Neither weights nor images are read."""
    result = dry("dmd2", "--teacher", folders("sdxl"), "--batch", 4, *flags)
    assert result["turns"][-1]["waits"] == {}


# ---- mistakes that it finds ----------------------------------------------------------------------


def here(text, name):
    """Does a message name a line of the function `name` in this file?"""
    code = globals()[name].__code__
    numbers = [int(n) for n in re.findall(r"tests/test_dryrun\.py:(\d+)", text)]
    lines = {line for *_, line in code.co_lines() if line}
    return bool(set(numbers) & lines)


# A function of each script whose result is in its loss.
LOSSES = [
    (dmd2, "dm_loss"),
    (sid, "sid_loss"),
    (twinflow, "distance"),
    (flowmap, "student_loss"),
    (sana_sprint, "scm_loss"),
    (nct, "distance"),
    (msd, "dm_loss"),
    (boot, "squared_errors"),
    (swiftbrush, "vsd_loss"),
    (anyflow, "squared_error"),
]


def first_of(result):
    return result[0] if isinstance(result, tuple) else result


def on_the_host(loss, *args, **named):
    result = first_of(loss(*args, **named))
    return result + torch.zeros(result.shape or (1,))


def waiting(loss, *args, **named):
    result = loss(*args, **named)
    float(first_of(result).detach().mean())
    return result


def flags_for(script):
    name = f"{script.__name__}.py"
    if script is nct:  # its generator has no classes
        return ["--teacher", "toy", "--batch", 8, *required_flags(name)]
    return [*TOY, *required_flags(name)]


@pytest.mark.parametrize("script, loss", LOSSES)
def test_a_tensor_of_the_host_in_a_loss_is_found(script, loss, dry, monkeypatch):
    right = getattr(script, loss)
    monkeypatch.setattr(script, loss, lambda *args, **named: on_the_host(right, *args, **named))
    with pytest.raises(RuntimeError, match="expected all tensors on the device") as error:
        dry(script.__name__, *flags_for(script))
    assert here(str(error.value), "on_the_host")


def in_fp32(forward, model, *args):
    dtype, model.dtype = model.dtype, torch.float32
    out = forward(model, *args)
    model.dtype = dtype
    return out


@pytest.mark.parametrize("script, loss", LOSSES)
def test_a_wait_and_a_pass_in_fp32_are_found(script, loss, dry, monkeypatch):
    """Both in one run, as neither ends it."""
    right, forward = getattr(script, loss), Model.forward
    monkeypatch.setattr(script, loss, lambda *args, **named: waiting(right, *args, **named))
    monkeypatch.setattr(Model, "forward", lambda *args: in_fp32(forward, *args))
    turns = dry(script.__name__, *flags_for(script), "--dtype", "bf16")["turns"]
    assert here(" ".join(line for turn in turns for line in turn["waits"]), "waiting")
    assert here(" ".join(odd["line"] for odd in turns[0]["odd_products"]), "in_fp32")


def test_the_report_names_the_script_s_line_of_a_pass_in_fp32(dry, monkeypatch, capsys):
    copy = Model.copy

    def copy_in_fp32(model, *args):
        copied = copy(model, *args)
        copied.dtype = torch.float32
        return copied

    monkeypatch.setattr(Model, "copy", copy_in_fp32)
    dry("dmd2", *TOY, "--dtype", "bf16")
    text = capsys.readouterr().out
    found = re.search(r"in float32 +[\d.e-]+ TFLOP at dmd2\.py:(\d+), common/", text)
    source = Path(dmd2.__file__).read_text().splitlines()
    assert re.search(r"student|critic|model", source[int(found[1]) - 1])


def test_no_pass_in_fp32_no_line(dry, capsys):
    dry("dmd2", *TOY, "--dtype", "bf16")
    assert "in float32" not in capsys.readouterr().out


# ---- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--device-memory 8", "--device-memory needs --dry-run"),
        ("--processes 2", "--processes needs --dry-run"),
        ("--dry-run --tflops 0", "--tflops: expected a number > 0"),
        ("--dry-run --resume", "--dry-run with --resume"),
        ("--dry-run --compile", "--dry-run with --compile"),
        ("--dry-run --processes 3 --batch 4", "expected a multiple of the number of processes"),
        ("--dry-run --teacher sdxl --size 100", "--size 100: expected a multiple of"),
        ("--dry-run --teacher sdxxl", "did you mean sdxl"),
        ("--dry-run --out {tmp}/file", "--out .*file: expected a folder that can be written"),
        (
            "--dry-run --out {tmp}/file/below",
            "--out .*below: expected a folder that can be written",
        ),
    ],
)
def test_mistakes(flags, message, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    flags = flags.format(tmp=tmp_path).split()
    try:
        with pytest.raises(UserError, match=message):
            run_main(monkeypatch, dmd2, *TOY, "--out", tmp_path, *flags)
    finally:
        leave_device()
    assert "iteration" not in capsys.readouterr().out


@pytest.mark.parametrize("slope, base", [(1, 0), (3, 10), (7, 50), (40, 1)])
@pytest.mark.parametrize("limit", [0, 10, 57, 58, 1000])
def test_the_largest_batch(slope, base, limit):
    """Peaks of a straight line, and of one with a kink: against trying all."""
    for peak in (lambda n: base + slope * n, lambda n: base + max(slope * n, 20)):
        expected = max((n for n in range(1001) if n == 0 or peak(n) <= limit), default=0)
        for start in (1, 8):
            tried = []
            found = largest_that_fits(lambda n: tried.append(n) or peak(n), limit, start)
            assert found == expected
            assert len(tried) == len(set(tried)) <= 25  # each is a dry run


def test_the_command_line_without_a_flag():
    assert without_flag(["a.py", "--x", "3", "--y"], "--x") == ["a.py", "--y"]
    assert without_flag(["a.py", "--x=3", "--y"], "--x") == ["a.py", "--y"]


def test_the_largest_batch_of_a_run(dry, monkeypatch, tmp_path, capsys):
    """With the batch that is found, real tensors take the memory that was given. Within 2 %: on a
    CPU the numbers count too that the host draws.

    Attempts run in this process: the same code as in their own, without the start of Python.
    """
    monkeypatch.setattr(ghost, "BLOCK", 1)
    flags = ["--teacher", "toy-cond", "--nfe", 1, "--ratio", 2, "--warmup", 0, "--dtype", "fp32"]
    flags += ["--iters", 4, "--batch"]

    def attempt(run, name, n=None):
        if name != "--batch":  # the toy has nothing to checkpoint
            raise RunError(name)
        leave_device()
        result = dry_run(monkeypatch, "dmd2", tmp_path / f"batch-{n}", *flags, n)
        run.gpu.__enter__()
        return result

    monkeypatch.setattr(DryRun, "attempt", attempt)
    limit = 0.005  # GB
    result = dry("dmd2", *flags, 800, "--device-memory", limit)
    found = result["largest_batch"]
    assert f"largest --batch        {found} in 5.1 MB" in capsys.readouterr().out
    peaks = result["peaks_by_batch"]
    assert peaks[str(found)] <= limit * 2**30 < peaks[str(found + 1)]
    real = real_peak(monkeypatch, tmp_path, dmd2, *flags, found)
    assert real == pytest.approx(limit * 2**30, rel=0.02)


# ---- public configurations -----------------------------------------------------------------------

PARAMETERS = {  # published, to the digits in which they are
    "sana-0.6b": 0.59e9,
    "sana-1.5": 1.60e9,
    "sana-1.5-4.8b": 4.8e9,
    "sana-sprint-teacher": 1.60e9,
    "sana-sprint-teacher-0.6b": 0.59e9,
    "sd3.5": 2.24e9,
    "flux": 11.9e9,
    "chroma": 8.9e9,
    "flux2": 32.2e9,
    "flux2-klein": 3.88e9,
    "flux2-klein-9b": 9.08e9,
    "hunyuan-image": 17.4e9,
    "lumina2": 2.61e9,
    "qwen-image": 20.4e9,
    "qwen-image-2512": 20.4e9,
    "z-image": 6.15e9,
    "wan2.1": 1.42e9,
    "wan2.1-14b": 14.3e9,
    "wan2.2": 2 * 14.3e9,
    "wan2.2-5b": 5.0e9,
    "hunyuanvideo-1.5": 8.3e9,
}


def test_every_short_name_has_a_configuration():
    assert set(TABLE) == set(HUB)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_the_public_configurations(name):
    given = {}
    with ghost.GhostDevice():
        budget = lambda **sizes: given.update(sizes)
        text = dict(prompts=["a"])
        load_teacher(name, "ghost", torch.bfloat16, text=text, budget=budget)
    assert given["network"] == pytest.approx(PARAMETERS[name], rel=0.02)
