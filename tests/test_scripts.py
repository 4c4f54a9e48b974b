"""Every script from the command line, on the toy teacher: what a run leaves, resume, faults, several processes, mistakes of the user."""

import ast
import json
import re
import shlex
import shutil
import signal
import socket
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

from common.files import read_json
from common.flags import Parser
from common.teachers.load import load_model

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = [(s, v) for s in SCRIPTS for v in ([], SECOND_FLAGS.get(s)) if v is not None]
QUICK = [
    "--teacher",
    "toy",
    "--batch",
    32,
    "--eval-n",
    0,
    "--sample-every",
    0,
    "--log-every",
    3,
    "--cooldown",
    0,
]  # a cooldown depends on --iters, which resumes change
variants = pytest.mark.parametrize(
    "script, flags", VARIANTS, ids=[f"{s}{'-more' if v else ''}" for s, v in VARIANTS]
)
each = pytest.mark.parametrize("script", SCRIPTS)
one = pytest.mark.parametrize(
    "script", ["dmd2"]
)  # faults that common/run.py answers for, the same in all


def log(out):
    """log.jsonl without wall-clock numbers."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


def checkpoint(out, it):
    """Everything in a checkpoint that must be reproducible, as a flat dict."""
    payload = torch.load(out / "ckpt" / f"it-{it:08d}.pt", weights_only=True)
    assert set(payload) == {"header", "it", "seconds", "log_bytes", "skipped", "state"}
    flat = {}

    def walk(path, x):
        for k, v in (
            x.items()
            if isinstance(x, dict)
            else enumerate(x)
            if isinstance(x, (list, tuple))
            else ()
        ):
            walk(f"{path}/{k}", v)
        if not isinstance(x, (dict, list, tuple)):
            flat[path] = x

    walk("", {k: v for k, v in payload.items() if k not in ("seconds", "log_bytes")})
    return flat


def same(a, b, it):
    """Run folders a and b hold the same run, bit for bit."""
    x, y = checkpoint(a, it), checkpoint(b, it)
    assert x.keys() == y.keys() and any("opt_g" in k for k in x)
    different = [
        k for k in x if not (torch.equal(x[k], y[k]) if torch.is_tensor(x[k]) else x[k] == y[k])
    ]
    assert not different
    assert log(a) == log(b)


def wait_for(ready, seconds=60):
    end = time.time() + seconds
    while not ready():
        assert time.time() < end, "timed out"
        time.sleep(0.01)


def lines(out):
    return (out / "log.jsonl").read_text().count("\n") if (out / "log.jsonl").exists() else 0


# ---- what a run leaves ---------------------------------------------------------------------------------------------------------------------


@each
def test_smoke(script, tmp_path):
    """In a plain process, as a user starts it."""
    out = tmp_path / "run"
    p = subprocess.run(
        [
            sys.executable,
            f"{script}.py",
            *required_flags(f"{script}.py"),
            "--teacher",
            "toy",
            "--smoke",
            "--out",
            out,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert p.returncode == 0 and "Traceback" not in p.stderr and "Warning" not in p.stderr, p.stderr
    info = read_json(out / "student" / "distill.json")
    assert (
        info["method"] == script
        and info["teacher"] == "toy"
        and info["nfe"] >= 1
        and info["flags"]["iters"] == 3
        and info["revision"]
    )
    student = load_model(out / "student", info["model"])
    state = torch.load(out / "ckpt" / "it-00000003.pt", weights_only=True)["state"]
    weights = student.state_dict()
    assert weights.keys() == state["student"].keys() and all(
        torch.equal(v, state["student"][k]) for k, v in weights.items()
    )  # the toy preset has no average
    assert [line["it"] for line in log(out)] == [0, 1, 2] and all(
        line["images"] == (line["it"] + 1) * info["flags"]["batch"] for line in log(out)
    )
    assert (out / "samples" / "00000003.png").read_bytes().startswith(b"\x89PNG")
    result = read_json(out / "metrics.json")
    assert (
        result["method"] == script
        and result["it"] == 3
        and result["n"] == 64
        and result["energy_distance"] > 0
    )
    assert not list(out.rglob("*.tmp"))
    for fact in ("steps", "parameters, trained", "passes per iteration", "memory", str(out)):
        assert fact in p.stdout


@each
def test_exported_student_is_the_average(script, scripts, tmp_path):
    scripts.run(f"{script}.py", *QUICK, "--iters", 5, "--ema", 200, "--out", tmp_path / "run")
    state = torch.load(tmp_path / "run" / "ckpt" / "it-00000005.pt", weights_only=True)["state"]
    weights = load_model(
        tmp_path / "run" / "student",
        read_json(tmp_path / "run" / "student" / "distill.json")["model"],
    ).state_dict()
    assert all(torch.equal(v, state["ema"]["model"][k]) for k, v in weights.items())
    assert any(not torch.equal(v, state["student"][k]) for k, v in weights.items())


# ---- resume: N + N = 2N, bit for bit ---------------------------------------------------------------------------------------------------------


@variants
def test_resume(script, flags, scripts, tmp_path):
    """N = 7 is no multiple of ratio (5) or --log-every (3). No cooldown: its rates depend on --iters."""
    whole, halves, cut = tmp_path / "whole", tmp_path / "halves", tmp_path / "cut"
    run = lambda out, *more: scripts.run(
        f"{script}.py", *QUICK, *flags, "--cooldown", 0, "--save-every", 7, "--out", out, *more
    )
    run(whole, "--iters", 14)
    assert sorted(p.name for p in (whole / "ckpt").iterdir()) == [
        "it-00000007.pt",
        "it-00000014.pt",
    ]
    if not (flags and script in PLAN_DEPENDS_ON_ITERS):
        run(halves, "--iters", 7)
        assert "resumed it-00000007.pt" in run(halves, "--iters", 14, "--resume").out
        same(whole, halves, 14)
    # killed while writing the second checkpoint, and the newest one damaged: the one before is taken, and the log goes back with it
    shutil.copytree(whole, cut)
    newest = cut / "ckpt" / "it-00000014.pt"
    newest.write_bytes(newest.read_bytes()[:5000])
    (cut / "ckpt" / "it-00000021.pt.tmp").write_bytes(b"PK\x03\x04 half a file")
    p = run(cut, "--iters", 14, "--resume")
    assert "it-00000014.pt: not readable" in p.err and "resumed it-00000007.pt" in p.out
    same(whole, cut, 14)
    assert not list(cut.rglob("*.tmp"))


@one
def test_sigterm_saves_and_a_second_process_is_refused(script, scripts, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    args = [f"{script}.py", *QUICK, "--iters", 200, "--log-every", 1, "--save-every", 0, "--out"]
    scripts.run(*args, whole)
    p = scripts.start(*args, out)
    wait_for(lambda: lines(out) > 5)
    refused = scripts.start(*args, out, "--overwrite") if lines(out) < 100 else None
    p.kill(signal.SIGSTOP)  # the first one waits until the second has been refused
    assert refused.wait() == 2 and "another run is writing here" in refused.err
    p.kill(signal.SIGCONT)
    p.kill(signal.SIGTERM)
    assert p.wait() == 143 and "go on with --resume" in p.err and "Traceback" not in p.err
    (saved,) = (out / "ckpt").iterdir()
    assert 5 < int(saved.stem[3:]) < 200 and not (out / "student").exists()
    scripts.run(*args, out, "--resume")
    same(whole, out, 200)


@one
@pytest.mark.parametrize("moments", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_kill_9(script, moments, scripts, tmp_path):
    """Killed at any moment, with a checkpoint after every iteration: most of the time goes into writing them."""
    whole, out, n = tmp_path / "whole", tmp_path / "run", 40 * moments
    args = [f"{script}.py", *QUICK, "--iters", n, "--log-every", 1, "--save-every", 1, "--out"]
    scripts.run(*args, whole)
    p = scripts.start(*args, out)
    for i in range(moments):
        wait_for(lambda: lines(out) > 5 + 30 * i or (out / "student").exists())
        time.sleep(0.003 * i)
        p.kill(signal.SIGKILL)
        assert p.wait() == -signal.SIGKILL
        (out / "ckpt" / "it-00009999.pt.tmp").write_bytes(b"PK")
        p = scripts.start(*args, out, "--resume")
    assert p.wait() == 0, p.err
    same(whole, out, n)


# ---- several processes -----------------------------------------------------------------------------------------------------------------------


def processes(scripts, n, *args, **env):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [
        scripts.start(
            *args,
            RANK=r,
            LOCAL_RANK=r,
            WORLD_SIZE=n,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            **env,
        )
        for r in range(n)
    ]


def close(one, two, it, only=""):
    """Norm-wise, network by network: Adam turns rounding of a tiny gradient into a visible change of that one weight."""
    a, b = (
        torch.load(out / "ckpt" / f"it-{it:08d}.pt", weights_only=True)["state"]
        for out in (one, two)
    )
    for name in [k for k in a if not k.startswith(("opt", "ema"))]:
        x, y = (torch.cat([v.flatten().double() for v in s[name].values()]) for s in (a, b))
        assert (x - y).norm() <= (1e-5 if only in name else 0.03) * x.norm(), name
    for x, y in zip(log(one), log(two), strict=True):  # `std` of a batch is no mean over processes
        assert x.keys() == y.keys() and (
            only
            or all(y[k] == pytest.approx(v, rel=1e-4, abs=1e-5) for k, v in x.items() if k != "std")
        )


# whose turn comes first, where the turn after it asks for what it has just become: of all parts only the last one sees that, so one iteration is compared
FIRST = {"sid": "critic", "sana_sprint": "student", "phased_dmd-more": "student"}


@pytest.mark.parametrize(
    "script, flags",
    [
        pytest.param(s, v, marks=[pytest.mark.slow] * bool(v), id=f"{s}{'-more' if v else ''}")
        for s, v in VARIANTS
    ],
)
def test_parts_of_a_batch_equal_the_whole(script, flags, scripts, tmp_path):
    """--accumulate 4: the same steps, to rounding; averages, logs, checkpoints once per iteration."""
    whole, parts, first = (
        tmp_path / "whole",
        tmp_path / "parts",
        FIRST.get(f"{script}-more" if flags else script) or FIRST.get(script, ""),
    )
    # numbers that are means over a part: lambda of flowmap's (9), the weights of sid's discriminator
    more = [
        *flags,
        *dict(
            flowmap=["--ratio", 1, "--correction", 0], sid=["--gan-average", "sample"] * bool(flags)
        ).get(script, []),
    ]
    iters = 1 if first else 5
    args = [f"{script}.py", *QUICK, *more, "--iters", iters, "--log-every", 1, "--out"]
    scripts.run(*args, whole)
    assert "x 8 samples x 4 parts" in scripts.run(*args, parts, "--accumulate", 4).out
    close(whole, parts, iters, first)


@pytest.mark.parametrize(
    "script", ["dmd2", "msd", pytest.param("sana_sprint", marks=pytest.mark.slow)]
)
def test_parts_of_a_batch_on_two_processes(script, scripts, tmp_path):
    """Their gradients are averaged once, with the last part."""
    args = [
        f"{script}.py",
        *QUICK,
        *SECOND_FLAGS[script],
        "--iters",
        1 if script in FIRST else 5,
        "--log-every",
        1,
        "--out",
    ]
    scripts.run(*args, tmp_path / "whole")
    ps = processes(scripts, 2, *args, tmp_path / "parts", "--accumulate", 4)
    assert [p.wait() for p in ps] == [0, 0], ps[0].err + ps[1].err
    assert "2 process(es) x 4 samples x 4 parts" in ps[0].out
    close(
        tmp_path / "whole", tmp_path / "parts", 1 if script in FIRST else 5, FIRST.get(script, "")
    )


@variants
def test_two_processes_equal_one(script, flags, scripts, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    args = [f"{script}.py", *QUICK, *flags, "--iters", 5, "--log-every", 1, "--out"]
    scripts.run(*args, one)
    ps = processes(scripts, 2, *args, two)
    assert [p.wait() for p in ps] == [0, 0], ps[0].err + ps[1].err
    assert "Warning" not in ps[0].err and ps[1].out == ""
    close(one, two, 5)


@pytest.mark.slow  # five times `import torch`
@pytest.mark.parametrize("script", SCRIPTS[:1])
def test_torchrun(script, scripts, tmp_path):
    """The launcher itself; --max-restarts resumes from the last checkpoint without --resume."""
    one, two = tmp_path / "one", tmp_path / "two"
    args = [*map(str, QUICK), "--iters", "6", "--log-every", "1", "--save-every", "2", "--out"]
    scripts.run(f"{script}.py", *args, one)
    crash = (
        tmp_path / "crash.py"
    )  # the first attempt ends like a lost machine, after iteration 4 and one line of the log past its checkpoint
    crash.write_text(f"""
import os, sys, runpy
sys.path.insert(0, {str(ROOT)!r})
from common.run import Run
log = Run.log
def die(run, it, values):
    log(run, it, values)
    if it == 4 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(9)
Run.log = die
sys.argv[0] = {str(ROOT / f"{script}.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--max-restarts=1",
        "--monitor-interval=0.1",
        crash,
        *args,
        two,
    ]
    p = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 0 and "resumed it-00000004.pt" in p.stdout, p.stderr
    close(one, two, 6)


# ---- mistakes of the user: exit code 2 and one line that names the flag ---------------------------------------------------------------------


def one_line(p, expected, script):
    p.wait()
    assert p.code == 2, p.err
    assert re.fullmatch(rf"{script}\.py: [^\n]*\n", p.err) and re.search(expected, p.err), p.err


@each
def test_mistakes(script, scripts, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "pictures" / "0").mkdir(parents=True)
    (tmp_path / "pictures" / "0" / "broken.png").write_text("no picture")
    mistakes = (
        (COMMON_MISTAKES if script == "dmd2" else COMMON_MISTAKES[:2])
        + MISTAKES[script]
        + [("--device cuda", "--device cuda: torch sees no CUDA")] * (not torch.cuda.is_available())
    )
    for flags, expected in mistakes:
        out = ["--out", tmp_path / "out"] if "--out" not in flags else []
        one_line(
            scripts.start(
                f"{script}.py",
                *QUICK,
                *out,
                *flags.format(tmp=tmp_path, assets=ROOT / "assets" / "toy").split(),
            ),
            expected,
            script,
        )
    # the batch is divided before processes look for each other, and only the first one speaks
    ps = processes(scripts, 2, f"{script}.py", *QUICK, "--batch", 33, "--out", tmp_path / "odd")
    one_line(
        ps[0],
        "--batch 33: expected a multiple of the number of processes times --accumulate, found 2 x 1",
        script,
    )
    assert ps[1].wait() == 2 and ps[1].err == ""


@one
def test_mistakes_beside_an_existing_run(script, scripts, tmp_path):
    """Each is refused, and none of them costs the run that is already there."""
    out = tmp_path / "run"
    args = [f"{script}.py", *QUICK, "--out", out, "--iters"]
    scripts.run(*args, 2)
    content = lambda: {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    before = content()
    for flags, expected in (
        (["4"], "holds a run at iteration 2; add --resume, --overwrite or another --out"),
        (
            ["4", "--resume", "--teacher", "toy-cond"],
            f"expected a run of {script} on toy, found|expected a run of {script} on toy-cond, found",
        ),
        (["4", "--overwrite", "--teacher", "toyy"], "did you mean"),
        (["4", "--overwrite", "--steps" if script == "dmd2" else "--nfe", "0,0"], "--"),
    ):
        one_line(scripts.start(*args, *flags), expected, script)
        assert content() == before
    path = out / "ckpt" / "it-00000002.pt"
    payload = torch.load(path, weights_only=True)
    for change in (
        dict(header=dict(method="other", teacher="toy")),
        dict(state={}),
        dict(state=dict(payload["state"], student=dict(wrong=torch.zeros(1)))),
    ):
        torch.save(payload | change, path)
        one_line(
            scripts.start(*args, 4, "--resume"),
            "found {'method': 'other'" if "header" in change else "does not fit",
            script,
        )
    torch.save(torch.zeros(3), path)  # readable, but no checkpoint of ours
    one_line(scripts.start(*args, 4, "--resume"), "--resume", script)
    scripts.run(*args, 1, "--overwrite")
    assert [p.name for p in (out / "ckpt").iterdir()] == ["it-00000001.pt"] and [
        line["it"] for line in log(out)
    ] == [0]


@pytest.mark.parametrize("script", sorted(PLAN_DEPENDS_ON_ITERS))
def test_another_plan_is_refused(script, scripts, tmp_path):
    args = [f"{script}.py", *QUICK, *SECOND_FLAGS[script], "--out", tmp_path / "run"]
    scripts.run(*args, "--iters", 7)
    for iters in (6, 14):
        one_line(scripts.start(*args, "--iters", iters, "--resume"), "--resume: .*--iters", script)


@one
def test_a_pickle_is_not_executed(script, scripts, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "run" / "ckpt").mkdir(parents=True)
    torch.save(dict(header=Trap()), tmp_path / "run" / "ckpt" / "it-00000002.pt")
    p = scripts.start(f"{script}.py", *QUICK, "--iters", 4, "--resume", "--out", tmp_path / "run")
    assert (
        p.wait() == 2
        and p.err.count("\n") == 2
        and "no readable checkpoint" in p.err
        and not (tmp_path / "executed").exists()
    )


# ---- help and commands ------------------------------------------------------------------------------------------------------------------------


@each
def test_help(script, scripts, monkeypatch):
    module, parsers = __import__(script), []
    parse = Parser.parse
    monkeypatch.setattr(Parser, "parse", lambda self, *a: parsers.append(self) or parse(self, *a))
    module.parse_args(["--teacher", "toy"])
    text = scripts.run(f"{script}.py", "--help").out
    for action in parsers[0]._actions:
        assert action.help, f"{action.option_strings} has no help"
        assert all(re.search(rf"{option}\b", text) for option in action.option_strings)
    assert (
        text.count("\n") > 40
        and ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text())).splitlines()[0]
        in text
    )
    for group in ("model:", "method:", "optimisation:", "run:"):
        assert group in text


@each
def test_commands_of_the_docstring(script):
    module = __import__(script)
    commands = [
        line.split("#")[0]
        for line in module.__doc__.splitlines()
        if re.match(rf"    (python|torchrun .*) ?{script}\.py", line)
    ]
    assert len(commands) >= 3
    for command in commands:
        words = shlex.split(command)
        module.parse_args(words[words.index(f"{script}.py") + 1 :])


@pytest.mark.parametrize("teacher", ["emoji", "emoji-flow", "somewhere/emoji-flow"])
@each
def test_preset_of_the_small_text_to_image_teachers(script, teacher):
    """Minutes on one core, not the weeks of `default`; guided as their teacher is."""
    args = __import__(script).parse_args(["--teacher", teacher])
    assert (
        args.iters <= 1000
        and args.batch == 32
        and args.lr >= 5e-5
        and (args.cfg == 3.5 or script == "nct")
    )
