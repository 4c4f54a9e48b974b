"""The crash matrix: every script, on the toy teacher, is killed, stopped, starved of disk and memory, fed with nan. Each run ends with the bits of an
undisturbed one, or with a clean refusal; it leaves no litter and a log without gap or duplicate.

    python -m pytest -m "slow or not slow" tests/test_faults.py                          # a sample of it, about two minutes; without -m a smaller one
    DISTIL_FAULTS=full python -m pytest -m "slow or not slow" tests/test_faults.py       # all of it: 20 moments of death for every script; SEED=n: others
"""

import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from helpers.cases import FULL, SEED, required_flags
from safetensors.torch import load_file
from test_scripts import ROOT, SCRIPTS, checkpoint, log, one_line, processes, same

N = 12
FLAGS = [
    "--teacher",
    "toy",
    "--batch",
    32,
    "--iters",
    N,
    "--log-every",
    1,
    "--save-every",
    2,
    "--sample-every",
    0,
    "--eval-n",
    8,
    "--cooldown",
    0,
    "--ema",
    500,
]
slow = pytest.mark.slow
some = pytest.mark.parametrize(
    "script", [s if s == "dmd2" else pytest.param(s, marks=slow) for s in SCRIPTS]
)
full = pytest.mark.parametrize("script", SCRIPTS if FULL else SCRIPTS[:1])

# Code that runs in the process before the script (tests/helpers/server.py, BEFORE).
# death before the n-th time that it touches a file of its folder: opens, renames, removes, cuts
TOUCH = """
import atexit, os, sys
left = [{n}]
def watch(event, args):
    if event in ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir") and str(args[0]).startswith({out!r}):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), {signum})
sys.addaudithook(watch)
if {count!r}:
    atexit.register(lambda: open({count!r}, "w").write(str({n} - left[0])))
"""
# death inside of a file that is being written, after n bytes of all such files
BYTES = """
import os, common.run as R
left = [{n}]
class Half:
    def __init__(self, file):
        self.file = file
    def __getattr__(self, name):
        return getattr(self.file, name)
    def __enter__(self):
        return self
    def __exit__(self, *a):
        self.file.close()
    def write(self, data):
        left[0] -= len(data)
        if left[0] < 0:
            self.file.write(bytes(data)[:left[0]])
            self.file.flush()
            os.kill(os.getpid(), {signum})
        return self.file.write(data)
R.open = lambda path, mode="r": Half(open(path, mode)) if mode == "wb" else open(path, mode)
"""
# after so many seconds of processor time: anywhere, also inside of torch
TIME = """
import os, threading, time
def wait():
    while time.process_time() < {n}:
        time.sleep(0.001)
    os.kill(os.getpid(), {signum})
threading.Thread(target=wait, daemon=True).start()
"""
# after the log's line of an iteration
LINE = """
import os, common.run as R
log = R.Run.log
def last(run, it, values):
    log(run, it, values)
    if it == {n} and run.rank == {rank}:
        {do}
R.Run.log = last
"""
NAN = """
import torch, common.data as D, common.models as M, common.run as R, common.toy as T
now, nan = [-1], float("nan")
def wrap(cls, name, make):
    setattr(cls, name, make(getattr(cls, name)))
def bad():
    return now[0] in range{span}
def spoil(x):
    x = x.clone() if torch.is_tensor(x) and x.is_floating_point() else x
    if bad() and torch.is_tensor(x) and x.is_floating_point():
        x[0] = nan
    return x
wrap(R.Run, "draw", lambda draw: lambda run, it: now.__setitem__(0, it) or draw(run, it))
if {kind!r} == "batch":
    wrap(R.Draw, "normal", lambda f: lambda *a: spoil(f(*a)))
    wrap(D.Images, "batch", lambda f: lambda *a: tuple(map(spoil, f(*a))))
if {kind!r} == "teacher":  # nct has none in its loop but the frozen generator
    wrap(T.Mixture, "x0", lambda f: lambda *a, **k: spoil(f(*a, **k)))
    wrap(M.Toy, "forward", lambda f: lambda self, *a, **k: f(self, *a, **k) if next(self.parameters()).requires_grad else spoil(f(self, *a, **k)))
if {kind!r} == "loss":
    wrap(torch.Tensor, "backward", lambda f: lambda self, *a, **k: f(self * nan if bad() else self, *a, **k))
"""


def go(scripts, script, out, *more, **env):
    return scripts.start(f"{script}.py", *FLAGS, "--out", out, *more, **env)


def again(scripts, script, out, **env):
    """What a user does after a crash: --resume, or a new start where nothing was saved yet."""
    return go(
        scripts, script, out, *["--resume"] * bool(list((out / "ckpt").glob("it-*.pt"))), **env
    )


def clean(p, script):
    """No traceback, and whatever ended the run is said in the last line."""
    p.wait()
    assert "Traceback" not in p.err, p.err
    if p.code in (1, 2):
        assert re.match(rf"{script}\.py: .", p.err.splitlines()[-1]), p.err


def lines(path):
    """Of strict JSON."""
    refuse = lambda word: pytest.fail(f"{path}: {word} is no JSON")
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def files(out):
    return sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())


def equal(whole, out):
    same(whole, out, N)
    assert [line["it"] for line in lines(out / "log.jsonl")] == list(range(N))
    assert [line["it"] for line in lines(out / "eval.jsonl")] == [N] and lines(out / "run.jsonl")[
        0
    ]["first"] == 0
    kept = [[f for f in files(folder) if f.startswith("ckpt/")] for folder in (whole, out)]
    assert set(files(whole)) - set(kept[0]) == set(files(out)) - set(kept[1])  # no litter either
    assert (
        len(kept[0]) == len(kept[1]) == 2 and kept[0][-1] == kept[1][-1]
    )  # the one before the last may be that of a stop between two saves
    for name in files(out / "student"):
        a, b = whole / "student" / name, out / "student" / name
        assert a.read_bytes() == b.read_bytes() if a.suffix == ".safetensors" else True, name


@pytest.fixture(scope="session")
def undisturbed(scripts, tmp_path_factory):
    """script -> folder of a whole run; how often it touches files, how many bytes of checkpoints it writes, its seconds of processor time."""
    known = {}

    def make(script):
        if script not in known:
            home = tmp_path_factory.mktemp(script)
            before = TOUCH.format(
                n=10**9, out=str(home / "run"), signum=0, count=str(home / "count")
            )
            p = go(scripts, script, home / "run", BEFORE=before)
            assert p.wait() == 0, p.err
            size = sum(f.stat().st_size for f in (home / "run" / "ckpt").iterdir()) * N // 4
            known[script] = home / "run", int((home / "count").read_text()), size, p.cpu
        return known[script]

    return make


@pytest.mark.parametrize(
    "script, moments",
    [(s, 1) for s in ("dmd2", "phased_dmd", "nct")]
    + [pytest.param(s, 20 if FULL else 2, marks=slow) for s in SCRIPTS],
)
def test_kill_9(script, moments, scripts, undisturbed, tmp_path):
    """SIGKILL at random moments, in turn before some touch of a file, in the middle of writing a checkpoint, and at any time; some of the runs that go on are killed too."""
    whole, touches, size, cpu = undisturbed(script)
    rng, done = random.Random(f"{script} {moments} {SEED}"), 0
    for case in range(4 * moments):
        out = tmp_path / str(case)
        p = None
        while p is None or p.code and done < moments and rng.random() < 0.75:
            kind = (BYTES, TOUCH, TIME)[done % 3]
            n = {
                TOUCH: rng.randint(1, touches),
                BYTES: rng.randint(0, size - 1),
                TIME: rng.uniform(0.2, 0.9) * cpu,
            }[kind]
            before = kind.format(n=n, out=str(out), signum=int(signal.SIGKILL), count="")
            p = again(scripts, script, out, BEFORE=before)
            assert p.wait() in (0, -signal.SIGKILL), (
                f"{n=}\n{p.err}\n{before}"
            )  # 0: what was left of the run was shorter
            done += p.code != 0
        if p.code:
            p = again(scripts, script, out)
            assert p.wait() == 0, f"{n=}\n{p.err}\n{before}"
        equal(whole, out)
        shutil.rmtree(out)
        if done >= moments:
            return
    pytest.fail(f"only {done} of {moments} runs died")


@pytest.mark.parametrize(
    "script, signum",
    [
        (SCRIPTS[0], signal.SIGTERM),
        *(
            pytest.param(s, n, marks=slow)
            for n in (signal.SIGTERM, signal.SIGINT)
            for s in (SCRIPTS if FULL or n == signal.SIGTERM else SCRIPTS[:1])
            if (s, n) != (SCRIPTS[0], signal.SIGTERM)
        ),
    ],
)
def test_stopped(script, signum, scripts, undisturbed, tmp_path):
    """SIGTERM and Ctrl-C while some file is touched: the iteration is finished and saved, exit code 143 or 130. Before the run has its folder there is nothing to
    save (the first five touches); after the last checkpoint the run goes on to its end, exit code 0."""
    whole, touches, _, _ = undisturbed(script)
    rng, codes = random.Random(f"{script} {signum} {SEED}"), []
    for case in range(3 if FULL and signum == signal.SIGTERM else 1):
        out = tmp_path / str(case)
        p = go(
            scripts,
            script,
            out,
            BEFORE=TOUCH.format(
                n=rng.randint(6, touches), out=str(out), signum=int(signum), count=""
            ),
        )
        clean(p, script)
        codes.append(p.code)
        assert p.code in (0, 128 + signum)
        if p.code:
            assert (
                "go on with --resume" in p.err
                and (out / "ckpt").exists()
                and not (out / "student").exists()
            )
            assert again(scripts, script, out).wait() == 0
        equal(whole, out)
    print(codes)


def test_ctrl_c_before_and_after(scripts, tmp_path):
    """While packages are imported; twice, by somebody who does not want to wait; while the finished run is measured."""
    at_import = "import os, signal, sys\nsignal.signal(2, signal.default_int_handler)\nsys.addaudithook(lambda event, args: event == 'import' and args[0] == 'common.metrics' and os.kill(os.getpid(), 2))"
    p = go(scripts, "dmd2", tmp_path / "a", BEFORE=at_import)
    assert p.wait() in (130, -signal.SIGINT) and p.err == "interrupted\n"
    p = go(
        scripts,
        "dmd2",
        tmp_path / "b",
        BEFORE=LINE.format(
            n=3,
            rank=0,
            do="os.kill(os.getpid(), 2); os.kill(os.getpid(), 2); import time; time.sleep(9)",
        ),
    )
    assert (
        p.wait() == 130
        and p.err.splitlines()[-1] == "dmd2.py: interrupted"
        and "Traceback" not in p.err
    )


@some
def test_disk_full(script, scripts, undisturbed, tmp_path):
    """Files end at a limit, as on a full disk. Checkpoints: a warning, the run goes on. The log, or the student at the end: one line, exit code 1. The checkpoints
    that were there stay as they are, and with space again the run goes on from them."""
    whole, _, _, _ = undisturbed(script)
    died = tmp_path / "died"
    p = go(scripts, script, died, BEFORE=LINE.format(n=6, rank=0, do="os.kill(os.getpid(), 9)"))
    assert p.wait() == -9
    ckpt = min(f.stat().st_size for f in (died / "ckpt").iterdir())
    small = (
        died / "log.jsonl"
    ).stat().st_size + 150  # the log itself, from iteration 6 on: there is a line of it by then
    for limit in (
        [ckpt // 2, 20_000, small]
        if FULL or script == "phased_dmd"
        else [random.Random(f"{script} {SEED}").randint(8_000, ckpt)]
    ):
        out, stop = (
            tmp_path / f"{limit}",
            f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))",
        )
        shutil.copytree(died, out)
        before = {p.name: p.read_bytes() for p in (out / "ckpt").iterdir()}
        p = again(
            scripts,
            script,
            out,
            BEFORE=LINE.format(n=6, rank=0, do=stop) if limit == small else stop,
        )
        clean(p, script)
        assert limit != small or p.code == 1 and len(lines(out / "run.jsonl")) == 2
        assert (
            p.code in (0, 1)
            and "go on with --resume" not in p.err
            and (p.code == 1 or "not written" in p.err)
        ), p.err
        assert {p.name: p.read_bytes() for p in (out / "ckpt").iterdir()} == before and not list(
            out.rglob("*.tmp")
        )
        assert p.code == 1 or (out / "student" / "distill.json").exists()
        p = again(scripts, script, out)
        assert p.wait() == 0, p.err
        equal(whole, out)


KINDS = ["batch", "teacher", "loss"]


@pytest.mark.parametrize(
    "script, kind",
    [
        (s, kind)
        for i, s in enumerate(SCRIPTS)
        for kind in (KINDS if FULL or s == "dmd2" else KINDS[i % 3 : i % 3 + 1])
    ],
)
@slow
def test_nan(script, kind, scripts, undisturbed, tmp_path):
    """nan in a batch, in what the frozen network says, in a loss, in two iterations: these steps are skipped and counted, and nothing keeps the nan."""
    p = go(scripts, script, tmp_path / "run", BEFORE=NAN.format(kind=kind, span=(5, 7)))
    assert p.wait() == 0, p.err
    found = lines(tmp_path / "run" / "log.jsonl")
    assert (
        [line["it"] for line in found] == list(range(N))
        and found[4]["skipped"] == 0
        and 1 <= found[6]["skipped"] == found[-1]["skipped"]
    )
    tensors = {k: v for k, v in checkpoint(tmp_path / "run", N).items() if torch.is_tensor(v)}
    assert [k for k, v in tensors.items() if not v.isfinite().all()] == []
    assert all(
        v.isfinite().all()
        for f in (tmp_path / "run" / "student").rglob("*.safetensors")
        for v in load_file(f).values()
    )
    good = log(undisturbed(script)[0])
    assert found[4]["images"] == good[4]["images"] and all(
        a.get(k) == b.get(k) for a, b in zip(found[:5], good[:5]) for k in b if k != "time"
    )


@pytest.mark.parametrize("script", ["dmd2", "msd", "phased_dmd", "decoupled_dmd"])
def test_nan_of_the_teacher_is_not_lost(script):
    """Normalised by the distance to the teacher, which may be 0: that gives 0. A nan stays a nan, or a broken teacher would only look like a student that rests."""
    module, x, cond = (
        __import__(script),
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        dict(labels=torch.zeros(2, dtype=torch.int64)),
    )
    for value, expected in (
        (x, [0.0, 0.0]),
        (x.clone().fill_diagonal_(float("nan")), [float("nan")] * 2),
    ):
        ask = lambda x_t, alpha, sigma, cond: value.repeat(len(x_t) // 2, 1)
        real = type(
            "Real",
            (),
            dict(guided=lambda *a: value, null=lambda n: cond, __call__=lambda self, *a: ask(*a)),
        )
        half = torch.full((2,), 0.5, dtype=torch.float64)
        if script == "decoupled_dmd":
            real.null = lambda self, n: cond
            ca, dm = (x, half, half), (x, half, half)
            found = module.gradients(x, ca, dm, cond, real(), lambda *a: x, 2.0, floor=0.0)[:2]
        else:
            found = [module.dm_gradient(x, x, half, half, cond, real, lambda *a: x, 1)[0]]
        for g in found:
            assert torch.equal(
                torch.nan_to_num(g.diagonal(), nan=7.0),
                torch.nan_to_num(torch.tensor(expected), nan=7.0),
            ), (script, g)


@some
def test_nan_for_good(script, scripts, tmp_path):
    """After 20 bad steps in a row the run stops, and no checkpoint holds a nan: without whatever was wrong it goes on to its end."""
    out = tmp_path / "run"
    p = go(scripts, script, out, "--iters", 40, BEFORE=NAN.format(kind="loss", span=(6, 1000)))
    assert p.wait() == 1, p.err
    clean(p, script)
    assert "not finite in 20 steps in a row" in p.err and not (out / "student").exists()
    found = lines(out / "log.jsonl")
    assert [line["it"] for line in found] == list(range(len(found))) and found[-1]["skipped"] >= 19
    old, new = sorted((out / "ckpt").iterdir())
    weights = [torch.load(f, weights_only=True)["state"]["student"] for f in (old, new)]
    assert all(v.isfinite().all() and torch.equal(v, weights[1][k]) for k, v in weights[0].items())
    if FULL or script == "dmd2":
        p = go(scripts, script, out, "--iters", 40, "--resume")
        assert p.wait() == 0 and [line["it"] for line in lines(out / "log.jsonl")] == list(
            range(40)
        ), p.err


@some
def test_another_time_and_place(script, scripts, undisturbed, tmp_path):
    """The same seed once more gives the same bits, while the clock is set back and forth, on a host of another name, with files from the future."""
    whole, _, _, _ = undisturbed(script)
    out, rng = tmp_path / "run", random.Random(f"{script} {SEED}")
    before = """
import ctypes, os, random, socket, time
real, rng = time.time, random.Random(0)
time.time = lambda: real() + rng.choice([-3e9, -1e5, 0, 1e5, 3e9])
name = b"host-%d" % os.getpid()
if os.getuid() or ctypes.CDLL(None).unshare(0x04000000) or ctypes.CDLL(None).sethostname(name, len(name)):  # 0x04000000: CLONE_NEWUTS
    socket.gethostname = lambda: name.decode()
assert socket.gethostname() == name.decode()
"""
    p = go(
        scripts,
        script,
        out,
        BEFORE=before + LINE.format(n=rng.randint(0, N - 1), rank=0, do="os.kill(os.getpid(), 9)"),
    )
    assert p.wait() == -9, p.err
    for path in out.rglob("*"):
        os.utime(path, (stamp := rng.choice([10**8, 4 * 10**9]), stamp))
    p = again(scripts, script, out, BEFORE=before)
    assert p.wait() == 0, p.err
    equal(whole, out)
    seconds = [line["time"]["seconds"] for line in lines(out / "log.jsonl")]
    assert seconds == sorted(seconds) and 0 <= seconds[0] and seconds[-1] < 600


@full
@slow
def test_two_runs_in_one_folder(script, scripts, undisturbed, tmp_path):
    """The second is refused while the first is alive, whatever it was told, and changes nothing."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed(script)[0], out)
    content = lambda: {f: (out / f).read_bytes() for f in files(out)}
    before = content()
    with open(out / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for more in ([], ["--resume"], ["--overwrite"]):
            one_line(go(scripts, script, out, *more), "another run is writing here", script)
    assert content() == before


@pytest.mark.skipif(os.getuid() != 0, reason="gives up rights of root")
@full
@slow
def test_read_only(script, scripts, undisturbed):
    """Root may write anywhere, so the runs give up that right. A folder that cannot be written is refused at the start; where that happens later, the run says
    so in one line, and goes on from its checkpoint once it can."""
    home = Path(tempfile.mkdtemp())
    try:
        home.chmod(0o555)
        nobody = "import ctypes, struct\nassert ctypes.CDLL(None).capset(struct.pack('Ii', 0x20080522, 0), bytes(24)) == 0\n"  # no capability, as in capset(2)
        one_line(
            go(scripts, script, home / "new", BEFORE=nobody),
            "--out .*expected a folder that can be written, found: Permission denied",
            script,
        )
        shutil.copytree(undisturbed(script)[0], home / "old")
        for path in (
            home / "old",
            home / "old" / "ckpt",
            home / "old" / "samples",
            home / "old" / ".lock",
        ):
            path.chmod(0o555)
        for more in ("--resume", "--overwrite"):
            one_line(
                go(scripts, script, home / "old", more, BEFORE=nobody),
                "--out .*expected a folder that can be written",
                script,
            )
        assert files(home / "old") == files(undisturbed(script)[0])
        (home / "run").mkdir()
        close = "[os.chmod(p, 0o555) for p in (run.out, run.out / 'ckpt', run.out / 'samples')]"
        p = go(scripts, script, home / "run", BEFORE=nobody + LINE.format(n=4, rank=0, do=close))
        clean(p, script)
        assert (
            p.code == 1
            and "not written" in p.err
            and [f.name for f in sorted((home / "run" / "ckpt").iterdir())]
            == ["it-00000002.pt", "it-00000004.pt"]
        ), p.err
        for path in (home / "run", home / "run" / "ckpt", home / "run" / "samples"):
            path.chmod(0o755)
        assert again(scripts, script, home / "run").wait() == 0
        equal(undisturbed(script)[0], home / "run")
    finally:
        shutil.rmtree(home)


# ---- several processes -----------------------------------------------------------------------------------------------------------------------

# torchrun's own agent; its workers are forks of a process that has imported torch already
AGENT = """
import os, runpy, sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
deaths = {deaths!r}  # (rank, iteration) by attempt
def work():
    sys.argv = {argv!r}
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    exec({setup!r})
    if attempt < len(deaths):
        rank, n = deaths[attempt]
        exec({line!r}.format(n=n, rank=rank, do="os.kill(os.getpid(), 9)"), {{}})
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:
        if e.code:
            os._exit(e.code)
if __name__ == "__main__":
    config = LaunchConfig(1, 1, 2, run_id=str(os.getpid()), rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts={restarts}, monitor_interval=0.1,
                          start_method="fork")
    elastic_launch(config, work)()
"""


def torchrun(scripts, tmp_path, script, *flags, deaths=(), restarts=2, setup=""):
    argv = [str(ROOT / f"{script}.py"), *required_flags(f"{script}.py"), *map(str, FLAGS), *map(str, flags)]
    path = tmp_path / "agent.py"
    path.write_text(
        AGENT.format(deaths=list(deaths), argv=argv, setup=setup, line=LINE, restarts=restarts)
    )
    return scripts.start(path)


@full
@slow
def test_a_lost_process(script, scripts, tmp_path):
    """One of two processes dies, after the restart the other one: both times the run goes on by itself, to the bits of the undisturbed one."""
    rng = random.Random(f"{script} {SEED}")
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert [p.wait() for p in processes(scripts, 2, f"{script}.py", *FLAGS, "--out", whole)] == [
        0,
        0,
    ]
    first = rng.randint(0, N - 3)
    deaths = [(1, first), (0, rng.randint(first + 1, N - 2))]
    p = torchrun(scripts, tmp_path, script, "--out", out, deaths=deaths)
    assert p.wait() == 0, p.err
    equal(whole, out)
    # before the first checkpoint, after iteration 1, a start from the beginning; process 0 may still write it when the other one died in that iteration
    assert (
        1 + sum(it > 1 for _, it in deaths)
        <= len(lines(out / "run.jsonl"))
        <= 1 + sum(it > 1 - rank for rank, it in deaths)
    )
    ours = [
        line for line in p.err.splitlines() if not re.match(r"[EWI]\d{4} ", line)
    ]  # without those of torchrun's agent
    said = [re.sub(".*\r", "", line) for line in ours if f"{script}.py: " in line]
    assert (
        said
        and all("another process of this run is gone" in line for line in said)
        and not any("Traceback" in line for line in ours)
    ), p.err


@slow
def test_restarts_do_not_make_a_refused_run_go_on(scripts, undisturbed, tmp_path):
    """To a restarted attempt every checkpoint looks like its own. The first attempt was refused, or died before --overwrite took effect: the old run must not go on."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed("dmd2")[0], out)
    p = torchrun(scripts, tmp_path, "dmd2", "--out", out, "--iters", 20, restarts=1)
    assert (
        p.wait() != 0
        and p.err.count("holds a run at iteration 12; add --resume, --overwrite") == 2
        and "resumed" not in p.out
    ), p.err
    assert files(out) == files(undisturbed("dmd2")[0])
    die = "import common.models as M\ndef load(*a, **k): os._exit(9)\nif attempt == 0: M.load_teacher = load"
    p = torchrun(scripts, tmp_path, "dmd2", "--out", out, "--overwrite", restarts=1, setup=die)
    assert p.wait() == 0 and "resumed" not in p.out, p.err
    assert len(lines(out / "run.jsonl")) == 1


# ---- memory, records ------------------------------------------------------------------------------------------------------------------------


def test_out_of_memory(scripts, tmp_path):
    """What to lower, in one line."""
    before = """
import resource
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20, resource.RLIM_INFINITY))
"""
    p = go(scripts, "dmd2", tmp_path / "run", "--batch", 10**7, BEFORE=before)
    assert (
        p.wait() == 1
        and "Traceback" not in p.err
        and re.match(r"dmd2\.py: out of memory: lower --batch", p.err.splitlines()[-1])
    ), p.err


def test_what_it_takes_to_run_it_again(scripts, undisturbed, tmp_path):
    """run.jsonl: a line for each start, with all flags, the code's revision, the packages' versions."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed("dmd2")[0], out)
    told = "import atexit, os, torch\natexit.register(lambda: print('state', torch.are_deterministic_algorithms_enabled(), os.environ.get('CUBLAS_WORKSPACE_CONFIG')))"
    p = go(scripts, "dmd2", out, "--iters", N + 2, "--resume", "--deterministic", BEFORE=told)
    assert p.wait() == 0 and "state True :4096:8" in p.out, (
        p.out + p.err
    )  # what --deterministic is for; CPUs need it not
    first, second = lines(out / "run.jsonl")
    assert (
        (first["first"], second["first"]) == (0, N)
        and second["flags"]["iters"] == N + 2
        and second["flags"]["deterministic"]
        and second["command"][-1] == "--deterministic"
    )
    head = (
        subprocess.run(
            ["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
        or "unknown"
    )
    assert second["versions"]["torch"].startswith(torch.__version__.split("+")[0]) and {
        "python",
        "numpy",
        "diffusers",
    } <= set(second["versions"])
    assert (
        second["revision"].startswith(head)
        and first["processes"] == 1
        and first["flags"]["seed"] == 0
    )
    assert (
        json.loads((out / "student" / "distill.json").read_text())["revision"] == second["revision"]
    )


@full
def test_nothing_asks_the_network(script, scripts, tmp_path):
    """Without a hub name there is no connection: sockets are counted, and on Linux as root there is no network to reach."""
    before = """
import atexit, ctypes, os, socket, sys
if os.getuid() == 0:
    ctypes.CDLL(None).unshare(0x40000000)  # CLONE_NEWNET
seen = []
sys.addaudithook(lambda event, args: seen.append(args[1:]) if event in ("socket.connect", "socket.getaddrinfo") else None)
atexit.register(lambda: print("connections", seen))
"""
    p = go(scripts, script, tmp_path / "run", "--eval-n", 64, BEFORE=before)
    assert p.wait() == 0 and "connections []" in p.out, p.out + p.err
