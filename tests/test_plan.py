"""training/plan.py: what a run says before its first step, in the terminal and in run.jsonl."""

import importlib
import json
import re
from types import SimpleNamespace

import pytest
import torch
from helpers.cases import SCRIPTS
from helpers.runs import QUICK, ROOT

from common import schedules
from training.plan import describe_steps, is_unguided_by_mistake, spelled_out

LINES = 12  # of a new run, in a terminal of 100 columns, and those of the method
EXTRA = {"sid": 1, "phased_dmd": 1, "msd": 2, "sana_sprint": 1, "twinflow": 1, "flowmap": 1}
EXTRA |= {"boot": 1, "nct": 2}


def plan_of(out):
    return json.loads((out / "run.jsonl").read_text().splitlines()[-1])["plan"]


def printed_plan(text):
    """{name: text} of the lines that start a run."""
    return dict(re.findall(r"^  ([a-z, ]{1,22}?) {2,}(\S.*)$", text, re.M))


def start_of(p):
    """The lines of a run before its student is written."""
    return p.out.split("\nstudent: ")[0].splitlines()


@pytest.mark.parametrize(
    "schedule, times, expected",
    [
        (schedules.Flow(), [1, 0.75, 0.5], "3 at t = 1 0.75 0.5, sigma / alpha = inf 3 1"),
        (schedules.EDM(0.002, 80.0), [80.0], "1 at t = 80, sigma / alpha = 80"),
        (
            schedules.Flow(),
            [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2],
            "9 at t = 1 0.9 0.8 ... 0.2",
        ),
    ],
)
def test_steps(schedule, times, expected):
    times = torch.tensor(times, dtype=torch.float64)
    assert describe_steps(schedule, times).startswith(expected)


def test_what_will_run_is_printed_and_kept(scripts, tmp_path):
    flags = "--teacher toy-cond --gan --nfe 2 --cfg 2 --ema 500 --warmup 1 --iters 4 --lr 1e-3"
    p = scripts.run("dmd2.py", *QUICK, *flags.split(), "--out", tmp_path / "run")
    plan = plan_of(tmp_path / "run")
    assert plan["preset"] == "toy-cond (teacher of this repository); source: measured here"
    assert plan["guidance, steps"].startswith("w = 2; 2 at t = 20 ")
    expected = "student 0.001, critic 0.0005, ratio 5, warm-up 1"
    assert plan["rates"].startswith(expected)
    assert plan["batch"] == "32 = 1 process(es) x 32 samples; 4 iterations; average over 500 images"
    assert re.fullmatch(r"\d+ images of the teacher", plan["data"])
    assert re.fullmatch(
        r"trained: student (0\.\d\d)M, critic 0\.\d\dM; frozen: teacher \1M", plan["networks"]
    )
    shown = printed_plan(p.out)
    assert {name: shown[name] for name in plan} == plan
    assert shown["folder"] == str(tmp_path / "run")


@pytest.mark.parametrize("script", SCRIPTS)
def test_sources_are_printed_in_words(script):
    for preset in importlib.import_module(script).PRESETS.values():
        assert not re.search(r"\[|nobody", spelled_out(preset["source"]))


def test_sources():
    assert spelled_out("[P, C]") == "paper, official code"
    text = "[T] DiffSynth-Studio, batch nobody's"
    assert spelled_out(text) == "others' code: DiffSynth-Studio, batch not published"
    assert spelled_out("[Z] of a copy") == "Z of a copy"


def test_prompts_and_images(scripts, tmp_path):
    """The embedded text-to-image teacher: the file of its prompts, and their number."""
    flags = "--teacher emoji --smoke --batch 2 --eval-n 0 --sample-every 0".split()
    flags += ["--negative-prompt", "a blurred one"]
    p = scripts.run("dmd2.py", *flags, "--out", tmp_path / "run")
    plan = plan_of(tmp_path / "run")
    assert plan["guidance, steps"].startswith("w = 3.5; 4 at t = ")
    assert plan["negative prompt"] == "'a blurred one'"
    assert plan["preset"] == "emoji (teacher of this repository); source: measured here"
    assert re.fullmatch(r"\d+ prompts in assets/emoji/prompts\.txt", plan["data"])
    lines = [line for line in start_of(p) if not line.startswith("prompts: ")]
    assert len(lines) <= LINES + 1, "\n".join(lines)  # the negative prompt
    assert max(map(len, lines)) <= 100, "\n".join(lines)


@pytest.mark.parametrize("script", ["dmd2", "decoupled_dmd", "swiftbrush", *EXTRA])
def test_it_fits_a_terminal(script, scripts, tmp_path):
    p = scripts.run(f"{script}.py", *QUICK, "--iters", 12, "--eval-n", 0, "--out", tmp_path / "x")
    lines = [line for line in start_of(p) if not line.endswith(str(tmp_path / "x"))]
    assert len(lines) <= LINES + EXTRA.get(script, 0) - 1, "\n".join(lines)  # one is the folder
    assert max(map(len, lines)) <= 100, "\n".join(lines)
    names = list(printed_plan(p.out))
    for name in ("preset", "guidance, steps", "rates", "batch", "networks", "memory, networks"):
        assert name in names


def test_what_decoupled_dmd_has_without_guidance(scripts, tmp_path):
    flags = [*QUICK, "--iters", 1, "--eval-n", 0, "--out"]
    scripts.run("decoupled_dmd.py", *flags, tmp_path / "a")
    assert "there is no CA" in plan_of(tmp_path / "a")["terms"]
    scripts.run("decoupled_dmd.py", *flags, tmp_path / "b", "--teacher", "toy-cond")
    assert "terms" not in plan_of(tmp_path / "b")


# ---- text without guidance -----------------------------------------------------------------------

TEXT = SimpleNamespace(takes_prompts=True)
LABELS = SimpleNamespace(takes_prompts=False)
FLUX = SimpleNamespace(
    takes_prompts=True,
    guidance=3.5,
    net=SimpleNamespace(config=SimpleNamespace(guidance_embeds=True)),
)
SCHNELL = SimpleNamespace(
    takes_prompts=True, net=SimpleNamespace(config=SimpleNamespace(guidance_embeds=False))
)


@pytest.mark.parametrize(
    "teacher, cfg, given, expected",
    [
        (TEXT, 1.0, False, True),
        (TEXT, 1.0, True, False),
        (TEXT, 2.0, False, False),
        (TEXT, None, False, False),  # nct guides nothing
        (LABELS, 1.0, False, False),
        (FLUX, 1.0, False, False),  # its guidance is an input of the network
        (SCHNELL, 1.0, False, True),
    ],
)
def test_a_text_teacher_without_guidance(teacher, cfg, given, expected):
    args = SimpleNamespace(cfg=cfg, cfg_given=given)
    assert is_unguided_by_mistake(args, teacher) == expected


@pytest.mark.parametrize("flags, warned", [("", True), ("--cfg 1", False), ("--cfg 2", False)])
def test_the_warning(flags, warned, scripts, tmp_path):
    """A copy of dmd2.py whose presets do not guide."""
    copy = tmp_path / "unguided.py"
    copy.write_text((ROOT / "dmd2.py").read_text().replace("cfg=3.5", "cfg=1.0"))
    start = "--teacher emoji --smoke --batch 2 --eval-n 0 --sample-every 0".split()
    p = scripts.run(copy, *start, *flags.split(), "--out", tmp_path / "run")
    assert ("takes text and is not guided" in p.err) == warned
