"""Every script from the command line, on the toy teacher: what a run leaves, resume, several
processes, mistakes of the user, help."""

import ast
import functools
import importlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.cases import (
    COMMON_MISTAKES,
    MISTAKES,
    PLAN_DEPENDS_ON_ITERS,
    SCRIPTS,
    SECOND_FLAGS,
    required_flags,
)
from helpers.runs import (
    QUICK,
    ROOT,
    close,
    count_lines,
    log,
    one_line,
    processes,
    run_processes,
    same,
    wait_for,
    without_torchs_own,
)
from helpers.trace import run_main

import nct
from common.files import read_json
from common.teachers.load import load_teacher
from common.teachers.students import network_of, read_student
from training.alarm import FIGURES
from training.ema import EMA
from training.flags import Parser
from training.run import Run

VARIANTS = [(script, []) for script in SCRIPTS]
VARIANTS += [(script, flags) for script, flags in SECOND_FLAGS.items()]
NAMES = [f"{script}{'-more' if flags else ''}" for script, flags in VARIANTS]
variants = pytest.mark.parametrize("script, flags", VARIANTS, ids=NAMES)
each = pytest.mark.parametrize("script", SCRIPTS)
slow = pytest.mark.slow


# ---- what a run leaves ---------------------------------------------------------------------------


STUDENT_LOSS = dict(
    sid="sid", sana_sprint="scm", twinflow="loss", flowmap="prediction", boot="loss"
)
STUDENT_LOSS |= dict(nct="loss", dmd2="dm", decoupled_dmd="dm", phased_dmd="dm", msd="dm")
STUDENT_LOSS |= dict(swiftbrush="vsd", anyflow="map")
STAGES = {"phased_dmd": 2}  # of the toy's presets; --smoke has three iterations for each


@each
def test_smoke(script, tmp_path):
    """In a plain process, as a user starts it."""
    out = tmp_path / "run"
    command = [sys.executable, f"{script}.py", *required_flags(f"{script}.py")]
    command += ["--teacher", "toy", "--smoke", "--out", out]
    p = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    assert "Traceback" not in p.stderr
    assert "Warning" not in without_torchs_own(p.stderr)
    last_bar = p.stderr.strip().splitlines()[-1]
    assert f" {STUDENT_LOSS[script]}=" in last_bar  # not only the critic's
    assert "None" not in last_bar
    for fact in ("trained: student", "passes per iteration", "memory", str(out)):
        assert fact in p.stdout

    info = read_json(out / "student" / "distill.json")
    assert info["method"] == script
    assert info["teacher"] == "toy"
    n = info["flags"]["iters"]
    assert n == 3 * STAGES.get(script, 1)
    assert info["revision"]
    assert info["training"]["passes_per_iteration"] > 0
    assert [line["it"] for line in log(out)] == list(range(n))
    images = [(line["it"] + 1) * info["flags"]["batch"] for line in log(out)]
    assert [line["images"] for line in log(out)] == images
    assert (out / "samples" / f"{n:08d}.png").read_bytes().startswith(b"\x89PNG")
    result = read_json(out / "metrics.json")
    assert result["method"] == script
    assert result["it"] == n
    assert result["n"] == 64
    assert result["energy_distance"] > 0
    assert not list(out.rglob("*.tmp"))


# ---- what --smoke reaches ------------------------------------------------------------------------

SMOKED = dict(zip(NAMES, VARIANTS))
SMOKED["sid-gan"] = ("sid", ["--gan", "--cfg", 2])  # with the warm-up of the form
SMOKED["decoupled_dmd-ca"] = ("decoupled_dmd", "--teacher toy-cond --cfg 3".split())
MOMENTS = "--teacher toy-cond --cfg 3 --regulariser moments --moments 0 1"
SMOKED["decoupled_dmd-moments"] = ("decoupled_dmd", MOMENTS.split())
UNUSED = {
    "decoupled_dmd-moments": ["critic fake"],
    "sana_sprint": ["log_var"],
}  # networks that these flags do not train


@pytest.fixture(scope="module")
def smoked(tmp_path_factory):
    """smoked(name of SMOKED) -> weights at the start and at the end of main() with --smoke, and
    the lines of its log.

    Weights: {part of a checkpoint's state: {name: tensor}}; each expert, each head and the average
    are parts.
    """

    def parts(state):
        flat = {}
        for name, part in state.items():
            if isinstance(part, (torch.optim.Optimizer, nct.Multiplier)):
                continue
            module = part.model if isinstance(part, EMA) else part
            for key, p in module.named_parameters():
                top = re.match(r"fake|head|experts\.\d+|", key)[0]
                weights = flat.setdefault(f"{name} {top}".strip(), {})
                weights[key] = p.detach().clone()
        return flat

    @functools.cache
    def run(name):
        script, flags = SMOKED[name]
        out = tmp_path_factory.mktemp(name)
        found = []
        resume, finish = Run.resume, Run.finish

        def at_start(run, state, **kwargs):
            found.append(parts(state))
            return resume(run, state, **kwargs)

        def at_end(run, it, state, report):
            found.append(parts(state))
            return finish(run, it, state, report)

        # no decay: a weight that moves has had a gradient
        fixed = [*required_flags(f"{script}.py"), "--teacher", "toy", "--batch", 32, "--eval-n", 0]
        fixed += ["--smoke", "--weight-decay", 0, "--out", out]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "resume", at_start)
            patch.setattr(Run, "finish", at_end)
            run_main(patch, importlib.import_module(script), *fixed, *flags)
        return *found, log(out)

    return run


def documented_names(script):
    """Names in the table under "What is logged" of the script's page, and of the line above it."""
    page = (ROOT / "docs" / f"{script}.md").read_text()
    section = page.split("## 3. What is logged")[1].split("\n## ")[0]
    table = re.search(r"\| name \|.*?\n\n", section, re.S)[0]
    first_column = " ".join(row.split("|")[1] for row in table.split("\n") if row)
    names = set(re.findall(r"`([\w.]+)`", first_column))
    line = re.search(r"also has (.*?) and `time`", section)[1]
    return names | set(re.findall(r"`(\w+)`", line)) - {"time"}


@pytest.mark.parametrize("name", SMOKED)
def test_smoke_trains_every_network(name, smoked):
    start, end, _ = smoked(name)
    assert start.keys() == end.keys()
    still = []
    for part, before in start.items():
        if all(torch.equal(p, end[part][key]) for key, p in before.items()):
            still.append(part)
    assert still == UNUSED.get(name, [])
    assert any(part.startswith("student") for part in start)


@each
def test_smoke_logs_every_documented_number(script, smoked):
    """All runs of a script together; and none that the script's page leaves out. Figures of
    pictures are the same for all scripts, and on a page of their own (test_alarm.py)."""
    logged = set()
    for name in SMOKED:
        if SMOKED[name][0] == script:
            logged.update(*smoked(name)[2])
    assert logged & set(FIGURES) == {"diversity", "contrast", "shift"}  # those of points
    assert logged - set(FIGURES) == documented_names(script)


def exported_weights(out):
    home, info = read_student(out)
    student = network_of(out, home, info, load_teacher("toy"), "toy")
    return student.state_dict()


def saved_state(out, it):
    return torch.load(out / "ckpt" / f"it-{it:08d}.pt", weights_only=True)["state"]


@each
def test_the_exported_student_is_the_last_one(script, scripts, tmp_path):
    """Without an average."""
    scripts.run(f"{script}.py", *QUICK, "--iters", 3, "--ema", 0, "--out", tmp_path / "run")
    weights = exported_weights(tmp_path / "run")
    state = saved_state(tmp_path / "run", 3)["student"]
    assert weights.keys() == state.keys()
    for name, v in weights.items():
        assert torch.equal(v, state[name]), name


@each
def test_the_exported_student_is_the_average(script, scripts, tmp_path):
    scripts.run(f"{script}.py", *QUICK, "--iters", 5, "--ema", 200, "--out", tmp_path / "run")
    weights = exported_weights(tmp_path / "run")
    state = saved_state(tmp_path / "run", 5)
    for name, v in weights.items():
        assert torch.equal(v, state["ema"]["model"][name]), name
    assert any(not torch.equal(v, state["student"][name]) for name, v in weights.items())


# ---- resume: N + N = 2N, bit for bit -------------------------------------------------------------


@variants
def test_resume(script, flags, scripts, tmp_path):
    """N = 7 is no multiple of the ratio (5) or of --log-every (3)."""
    whole, halves, cut = tmp_path / "whole", tmp_path / "halves", tmp_path / "cut"

    def run(out, *more):
        args = [f"{script}.py", *QUICK, *flags, "--cooldown", 0, "--save-every", 7, "--out", out]
        return scripts.run(*args, *more)

    run(whole, "--iters", 14)
    checkpoints = sorted(p.name for p in (whole / "ckpt").iterdir())
    assert checkpoints == ["it-00000007.pt", "it-00000014.pt"]
    if not (flags and script in PLAN_DEPENDS_ON_ITERS):
        run(halves, "--iters", 7)
        assert "resumed it-00000007.pt" in run(halves, "--iters", 14, "--resume").out
        same(whole, halves, 14)

    # Killed while writing a checkpoint, and the newest one is damaged: the one before is taken,
    # and the log goes back with it.
    shutil.copytree(whole, cut)
    newest = cut / "ckpt" / "it-00000014.pt"
    newest.write_bytes(newest.read_bytes()[:5000])
    (cut / "ckpt" / "it-00000021.pt.tmp").write_bytes(b"PK\x03\x04 half a file")
    p = run(cut, "--iters", 14, "--resume")
    assert "it-00000014.pt: not readable" in p.err
    assert "resumed it-00000007.pt" in p.out
    same(whole, cut, 14)
    assert not list(cut.rglob("*.tmp"))


def test_sigterm_saves_and_a_second_process_is_refused(scripts, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    args = ["dmd2.py", *QUICK, "--iters", 200, "--log-every", 1, "--save-every", 0, "--out"]
    scripts.run(*args, whole)
    p = scripts.start(*args, out)
    wait_for(lambda: count_lines(out) > 5)
    refused = scripts.start(*args, out, "--overwrite")
    p.kill(signal.SIGSTOP)  # the first one waits until the second one has been refused
    assert refused.wait() == 2
    assert "another run is writing here" in refused.err
    p.kill(signal.SIGCONT)
    p.kill(signal.SIGTERM)
    assert p.wait() == 143
    assert "go on with --resume" in p.err
    assert "Traceback" not in p.err
    (saved,) = (out / "ckpt").iterdir()
    assert 5 < int(saved.stem[3:]) < 200
    assert not (out / "student").exists()
    scripts.run(*args, out, "--resume")
    same(whole, out, 200)


@pytest.mark.parametrize("moments", [1, pytest.param(12, marks=slow)])
def test_kill_9(moments, scripts, tmp_path):
    """Killed at any moment, with a checkpoint after every iteration: most of the time goes into
    writing them."""
    whole, out, n = tmp_path / "whole", tmp_path / "run", 40 * moments
    args = ["dmd2.py", *QUICK, "--iters", n, "--log-every", 1, "--save-every", 1, "--out"]
    scripts.run(*args, whole)
    p = scripts.start(*args, out)
    for i in range(moments):
        enough = 5 + 30 * i
        wait_for(lambda enough=enough: count_lines(out) > enough or (out / "student").exists())
        time.sleep(0.003 * i)
        p.kill(signal.SIGKILL)
        assert p.wait() == -signal.SIGKILL
        (out / "ckpt" / "it-00009999.pt.tmp").write_bytes(b"PK")
        p = scripts.start(*args, out, "--resume")
    assert p.wait() == 0, p.err
    same(whole, out, n)


# ---- several processes, several parts of a batch -------------------------------------------------

# The network whose turn comes first, where the turn after it evaluates what it has just become. Of
# all parts of a batch only the last one sees that, so one iteration is compared.
FIRST = {"sid": "critic", "sana_sprint": "student"}
# Numbers that are means over a part: lambda of flowmap's (9), the weights of sid's discriminator.
ONE_PART = {"flowmap": "--ratio 1 --correction 0".split(), "sid": ["--cls-weight", 0]}


def first_network(script, flags):
    name = f"{script}-more" if flags else script
    return FIRST.get(name) or FIRST.get(script, "")


@pytest.mark.parametrize(
    "script, flags",
    [
        pytest.param(script, flags, marks=[slow] if flags else [], id=name)
        for (script, flags), name in zip(VARIANTS, NAMES)
    ],
)
def test_parts_of_a_batch_equal_the_whole(script, flags, scripts, tmp_path):
    """--accumulate 4: the same steps, to rounding; averages and logs once an iteration."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first = first_network(script, flags)
    iters = 1 if first else 5
    args = [f"{script}.py", *QUICK, *flags, *ONE_PART.get(script, []), "--iters", iters]
    args += ["--gan-warmup", 0] if "--gan-warmup" in flags else []  # fits one iteration
    args += ["--log-every", 1, "--out"]
    scripts.run(*args, whole)
    assert "x 8 samples x 4 parts" in scripts.run(*args, parts, "--accumulate", 4).out
    close(whole, parts, iters, first)


@pytest.mark.parametrize("script", ["dmd2", "msd", pytest.param("sana_sprint", marks=slow)])
def test_parts_of_a_batch_on_two_processes(script, scripts, tmp_path):
    """Their gradients are averaged once, with the last part."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    iters = 1 if script in FIRST else 5
    args = [f"{script}.py", *QUICK, *SECOND_FLAGS[script], "--iters", iters, "--log-every", 1]
    scripts.run(*args, "--out", whole)
    p, _ = run_processes(scripts, 2, *args, "--out", parts, "--accumulate", 4)
    assert "2 process(es) x 4 samples x 4 parts" in p.out
    close(whole, parts, iters, FIRST.get(script, ""))


@variants
def test_two_processes_equal_one(script, flags, scripts, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    args = [f"{script}.py", *QUICK, *flags, "--iters", 5, "--log-every", 1, "--out"]
    scripts.run(*args, one)
    first, second = run_processes(scripts, 2, *args, two)
    assert "Warning" not in without_torchs_own(first.err)
    assert second.out == ""
    close(one, two, 5)


# The first attempt ends like a lost machine, after iteration 4 and one line of the log past its
# checkpoint.
CRASH = """
import os, sys, runpy
sys.path.insert(0, {root!r})
from training.run import Run
log = Run.log
def log_and_die(run, it, values):
    log(run, it, values)
    if it == 4 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(9)
Run.log = log_and_die
sys.argv[0] = {script!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@slow  # imports torch five times
def test_torchrun(scripts, tmp_path):
    """The launcher itself; --max-restarts resumes from the last checkpoint without --resume."""
    one, two = tmp_path / "one", tmp_path / "two"
    args = [*map(str, QUICK), "--iters", "6", "--log-every", "1", "--save-every", "2", "--out"]
    scripts.run("dmd2.py", *args, one)
    crash = tmp_path / "crash.py"
    crash.write_text(CRASH.format(root=str(ROOT), script=str(ROOT / "dmd2.py")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc_per_node=2", "--max-restarts=1", "--monitor-interval=0.1"]
    p = subprocess.run([*torchrun, crash, *args, two], cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    assert "resumed it-00000004.pt" in p.stdout
    close(one, two, 6)


# ---- mistakes of the user: exit code 2 and one line that names the flag --------------------------


@each
def test_mistakes(script, scripts, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "pictures" / "0").mkdir(parents=True)
    (tmp_path / "pictures" / "0" / "broken.png").write_text("no picture")
    mistakes = COMMON_MISTAKES if script == "dmd2" else COMMON_MISTAKES[:2]
    mistakes = mistakes + MISTAKES[script]
    if not torch.cuda.is_available():
        mistakes = mistakes + [("--device cuda", "--device cuda: torch sees no CUDA")]
    for flags, expected in mistakes:
        out = [] if "--out" in flags else ["--out", tmp_path / "out"]
        flags = flags.format(tmp=tmp_path, assets=ROOT / "assets" / "toy").split()
        one_line(scripts.start(f"{script}.py", *QUICK, *out, *flags), expected, script)
        assert {path.name for path in tmp_path.iterdir()} == {"file", "pictures"}, flags


@each
def test_only_the_first_process_names_a_mistake(script, scripts, tmp_path):
    """The batch is checked before processes wait for each other."""
    args = [f"{script}.py", *QUICK, "--batch", 33, "--out", tmp_path / "odd"]
    first, second = processes(scripts, 2, *args)
    expected = (
        "--batch 33: expected a multiple of the number of processes times --accumulate, found 2 x 1"
    )
    one_line(first, expected, script)
    assert second.wait() == 2
    assert second.err == ""


@pytest.fixture
def old_run(scripts, tmp_path):
    """Arguments of a run of two iterations, and its folder."""
    out = tmp_path / "run"
    args = ["dmd2.py", *QUICK, "--out", out]
    scripts.run(*args, "--iters", 2)
    return args, out


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", "holds a run at iteration 2; add --resume, --overwrite or another --out"),
        ("--resume --teacher toy-cond", "expected a run of dmd2 on toy-cond, found"),
        ("--overwrite --teacher toyy", "did you mean"),
        ("--overwrite --step-indices 0,0", "--step-indices 0,0"),
    ],
)
def test_a_mistake_does_not_cost_the_run_that_is_there(flags, expected, old_run, scripts):
    args, out = old_run
    content = lambda: {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    before = content()
    one_line(scripts.start(*args, "--iters", 4, *flags.split()), expected, "dmd2")
    assert content() == before


@pytest.mark.parametrize(
    "change, expected",
    [
        (dict(header=dict(method="other", teacher="toy")), "found {'method': 'other'"),
        (dict(state={}), "does not fit"),
        (dict(state=dict(student=dict(wrong=torch.zeros(1)))), "does not fit"),
        (None, "--resume"),  # readable, but no checkpoint of ours
    ],
)
def test_checkpoints_of_other_runs(change, expected, old_run, scripts):
    args, out = old_run
    path = out / "ckpt" / "it-00000002.pt"
    payload = torch.load(path, weights_only=True)
    if change is None:
        payload = torch.zeros(3)
    else:
        state = payload["state"] | change.get("state", {}) if change.get("state") else {}
        payload = payload | change | (dict(state=state) if "state" in change else {})
    torch.save(payload, path)
    one_line(scripts.start(*args, "--iters", 4, "--resume"), expected, "dmd2")


def test_overwrite(old_run, scripts):
    args, out = old_run
    scripts.run(*args, "--iters", 1, "--overwrite")
    assert [p.name for p in (out / "ckpt").iterdir()] == ["it-00000001.pt"]
    assert [line["it"] for line in log(out)] == [0]


@pytest.mark.parametrize("script", sorted(PLAN_DEPENDS_ON_ITERS))
def test_another_plan_is_refused(script, scripts, tmp_path):
    args = [f"{script}.py", *QUICK, *SECOND_FLAGS[script], "--out", tmp_path / "run"]
    scripts.run(*args, "--iters", 7)
    for iters in (6, 14):
        p = scripts.start(*args, "--iters", iters, "--resume")
        one_line(p, "--resume: .*--iters", script)


def test_a_pickle_is_not_executed(scripts, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "run" / "ckpt").mkdir(parents=True)
    torch.save(dict(header=Trap()), tmp_path / "run" / "ckpt" / "it-00000002.pt")
    p = scripts.start("dmd2.py", *QUICK, "--iters", 4, "--resume", "--out", tmp_path / "run")
    assert p.wait() == 2
    assert p.err.count("\n") == 2  # the file that is not readable, and the refusal
    assert "no readable checkpoint" in p.err
    assert not (tmp_path / "executed").exists()


# ---- help and commands ---------------------------------------------------------------------------


@each
def test_help(script, scripts, monkeypatch):
    parsers = []
    parse = Parser.parse

    def recorded(parser, *args):
        parsers.append(parser)
        return parse(parser, *args)

    monkeypatch.setattr(Parser, "parse", recorded)
    __import__(script).parse_args(["--teacher", "toy"])
    text = scripts.run(f"{script}.py", "--help").out
    for action in parsers[0]._actions:
        assert action.help, f"{action.option_strings} has no help"
        for option in action.option_strings:
            assert re.search(rf"{option}\b", text)
    doc = ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text()))
    assert doc.splitlines()[0] in text
    groups = re.findall(r"^([a-z ]+):$", text, re.M)
    assert groups == ["model", "method", "optimisation", "run", "dry run"]
    commands = doc.split("\n\nUsage:\n")[1].split("\n\n")[0]
    assert text.endswith(f"\n\nUsage:\n{commands}\n")
    assert fits_two_screens(text)


def fits_two_screens(text):
    """Of 50 lines and 100 columns each."""
    lines = text.splitlines()
    return len(lines) <= 100 and max(map(len, lines)) <= 100


@pytest.mark.parametrize("script", ["eval", "sample"])
def test_help_of_what_comes_after_training(script, scripts):
    text = scripts.run(f"{script}.py", "--help").out
    assert f"python {script}.py out/dmd2-" in text  # commands
    assert fits_two_screens(text)


@each
def test_commands_of_the_docstring(script):
    module = __import__(script)
    pattern = rf"    (python|torchrun .*) ?{script}\.py"
    commands = [line for line in module.__doc__.splitlines() if re.match(pattern, line)]
    assert len(commands) >= 3
    for command in commands:
        words = shlex.split(command.split("#")[0])
        words = [str(ROOT / "assets" / "mnist") if word == "DIR" else word for word in words]
        module.parse_args(words[words.index(f"{script}.py") + 1 :])


@pytest.mark.parametrize("teacher", ["emoji", "emoji-flow", str(ROOT / "assets/emoji-flow")])
@each
def test_preset_of_the_small_text_to_image_teachers(script, teacher):
    """Minutes on one core, not the weeks of `default`; with the guidance of their teacher."""
    args = __import__(script).parse_args(["--teacher", teacher])
    assert args.iters <= 1000
    assert args.batch == 32
    assert args.lr >= 5e-5
    assert args.cfg == 3.5 or script == "nct"


def test_a_relative_teacher_is_found_from_elsewhere(scripts, tmp_path):
    """distill.json keeps its absolute path."""
    shutil.copytree(ROOT / "assets" / "toy", tmp_path / "home" / "t")
    go = "import os; os.chdir({!r})"
    flags = ["--teacher", "t", "--batch", 8, "--iters", 1, "--eval-n", 0, "--warmup", 0]
    out = tmp_path / "run"
    before = go.format(str(tmp_path / "home"))
    scripts.run("dmd2.py", *flags, "--out", out, BEFORE=before)
    info = read_json(out / "student" / "distill.json")
    assert info["teacher"] == info["flags"]["teacher"] == str(tmp_path / "home" / "t")
    elsewhere = go.format(str(tmp_path))
    scripts.run("eval.py", out, "--n", 64, "--out", tmp_path / "e.jsonl", BEFORE=elsewhere)
