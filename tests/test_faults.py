"""The crash matrix: every script, on the toy teacher, is killed, stopped, starved of disk and
memory, fed with nan. Each run ends with the bits of an undisturbed one, or with a clean refusal. It
leaves no litter, and a log without gap or duplicate.

    python -m pytest -m "slow or not slow" tests/test_faults.py      # a sample of it, two minutes
    DISTIL_FAULTS=full python -m pytest -m "slow or not slow" tests/test_faults.py      # all of it
    SEED=1 python -m pytest tests/test_faults.py                              # another sample
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
from helpers.cases import FULL, SCRIPTS, SEED, required_flags
from helpers.runs import ROOT, checkpoint, log, one_line, run_processes, same
from safetensors.torch import load_file

N = 12
FLAGS = ["--teacher", "toy", "--batch", 32, "--iters", N, "--log-every", 1, "--save-every", 2]
FLAGS += ["--sample-every", 0, "--eval-n", 8, "--cooldown", 0, "--ema", 500]
slow = pytest.mark.slow
some_scripts = [s if s == "dmd2" else pytest.param(s, marks=slow) for s in SCRIPTS]
some = pytest.mark.parametrize("script", some_scripts)
full = pytest.mark.parametrize("script", SCRIPTS if FULL else SCRIPTS[:1])

# ---- code that runs in the process before the script (tests/helpers/server.py, BEFORE) -----------

# Death before the n-th time that it touches a file of its folder: opens, renames, removes, cuts.
TOUCH = """
import atexit, os, sys
left = [{n}]
events = ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir")
def watch(event, args):
    if event in events and str(args[0]).startswith({out!r}):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), {signum})
sys.addaudithook(watch)
if {count!r}:
    atexit.register(lambda: open({count!r}, "w").write(str({n} - left[0])))
"""
# Death inside of a file that is being written, after n bytes of all such files.
BYTES = """
import os, common.files
left = [{n}]
class Half:
    def __init__(self, file):
        self.file = file
    def __getattr__(self, name):
        return getattr(self.file, name)
    def __enter__(self):
        return self
    def __exit__(self, *args):
        self.file.close()
    def write(self, data):
        left[0] -= len(data)
        if left[0] < 0:
            self.file.write(bytes(data)[:left[0]])
            self.file.flush()
            os.kill(os.getpid(), {signum})
        return self.file.write(data)
def half_open(path, mode="r"):
    file = open(path, mode)
    return Half(file) if mode == "wb" else file
common.files.open = half_open
"""
# After so many seconds of processor time: anywhere, also inside of torch.
TIME = """
import os, threading, time
def wait():
    while time.process_time() < {n}:
        time.sleep(0.001)
    os.kill(os.getpid(), {signum})
threading.Thread(target=wait, daemon=True).start()
"""
# After the log's line of an iteration.
LINE = """
import os, training.run
log = training.run.Run.log
def log_and_act(run, it, values):
    log(run, it, values)
    if it == {n} and run.rank == {rank}:
        {do}
training.run.Run.log = log_and_act
"""
DIE = "os.kill(os.getpid(), 9)"
# nan in the batch, the frozen network or the loss, in a span of iterations.
NAN = """
import torch
import data.images, common.rng, training.run, common.teachers.toy
toy = common.teachers.toy
now, nan = [-1], float("nan")
def is_bad():
    return now[0] in range{span}
def spoil(x):
    if not torch.is_tensor(x) or not x.is_floating_point():
        return x
    x = x.clone()
    if is_bad():
        x[0] = nan
    return x
def wrap(cls, name, make):
    setattr(cls, name, make(getattr(cls, name)))
def note_iteration(draw):
    def noted(run, it):
        now[0] = it
        return draw(run, it)
    return noted
wrap(training.run.Run, "draw", note_iteration)
if {kind!r} == "batch":
    wrap(common.rng.BatchRandom, "randn", lambda f: lambda *a: spoil(f(*a)))
    wrap(data.images.Images, "batch", lambda f: lambda *a: tuple(map(spoil, f(*a))))
if {kind!r} == "teacher":  # nct has none in its loop but the frozen generator
    def frozen_only(forward):
        def wrapped(net, *args, **kwargs):
            out = forward(net, *args, **kwargs)
            return out if next(net.parameters()).requires_grad else spoil(out)
        return wrapped
    wrap(toy.Mixture, "x0", lambda f: lambda *a, **k: spoil(f(*a, **k)))
    wrap(toy.Toy, "forward", frozen_only)
if {kind!r} == "loss":
    def backward(f):
        return lambda loss, *a, **k: f(loss * nan if is_bad() else loss, *a, **k)
    wrap(torch.Tensor, "backward", backward)
"""


# ---- runs ----------------------------------------------------------------------------------------


def go(scripts, script, out, *more, **env):
    return scripts.start(f"{script}.py", *FLAGS, "--out", out, *more, **env)


def go_on(scripts, script, out, **env):
    """What a user does after a crash: --resume, or a new start if nothing was saved yet."""
    saved = list((out / "ckpt").glob("it-*.pt"))
    return go(scripts, script, out, *(["--resume"] if saved else []), **env)


def finish(scripts, script, out):
    p = go_on(scripts, script, out)
    assert p.wait() == 0, p.err


def wait_without_traceback(p, script):
    """No traceback, and a reason in the last line if the run was refused or failed."""
    p.wait()
    assert "Traceback" not in p.err, p.err
    if p.code in (1, 2):
        assert re.match(rf"{script}\.py: .", p.err.splitlines()[-1]), p.err


def json_lines(path):
    """Lines of strict JSON."""
    refuse = lambda word: pytest.fail(f"{path}: {word} is no JSON")
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def files(out):
    return sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())


def is_checkpoint(name):
    return name.startswith("ckpt/")


def equal(whole, out):
    """Both folders hold the same finished run, and nothing else."""
    same(whole, out, N)
    assert [line["it"] for line in json_lines(out / "log.jsonl")] == list(range(N))
    assert [line["it"] for line in json_lines(out / "eval.jsonl")] == [N]
    assert json_lines(out / "run.jsonl")[0]["first"] == 0
    others = [[f for f in files(folder) if not is_checkpoint(f)] for folder in (whole, out)]
    assert others[0] == others[1]  # no litter either
    kept = [[f for f in files(folder) if is_checkpoint(f)] for folder in (whole, out)]
    assert len(kept[0]) == len(kept[1]) == 2
    # the one before the last may be the checkpoint of a stop between two saves
    assert kept[0][-1] == kept[1][-1]
    for name in files(out / "student"):
        if name.endswith(".safetensors"):
            a, b = whole / "student" / name, out / "student" / name
            assert a.read_bytes() == b.read_bytes(), name


@pytest.fixture(scope="session")
def undisturbed(scripts, tmp_path_factory):
    """script -> folder of a whole run, how often it touches files, how many bytes of checkpoints it
    writes, its seconds of processor time."""
    known = {}

    def make(script):
        if script not in known:
            home = tmp_path_factory.mktemp(script)
            out, count = home / "run", home / "count"
            before = TOUCH.format(n=10**9, out=str(out), signum=0, count=str(count))
            p = go(scripts, script, out, BEFORE=before)
            assert p.wait() == 0, p.err
            size = sum(f.stat().st_size for f in (out / "ckpt").iterdir()) * N // 4
            known[script] = out, int(count.read_text()), size, p.cpu
        return known[script]

    return make


# ---- death and signals ---------------------------------------------------------------------------

FEW = [(script, 1) for script in ("dmd2", "phased_dmd", "nct")]
MANY = [pytest.param(script, 20 if FULL else 2, marks=slow) for script in SCRIPTS]


@pytest.mark.parametrize("script, moments", FEW + MANY)
def test_kill_9(script, moments, scripts, undisturbed, tmp_path):
    """SIGKILL at random moments, in turn in the middle of writing a checkpoint, before some touch
    of a file, and at any time. Some of the runs that go on are killed too."""
    whole, touches, size, cpu = undisturbed(script)
    rng = random.Random(f"{script} {moments} {SEED}")
    deaths = 0

    def killed(out):
        """Code that kills the run at a random moment, of the kind whose turn it is."""
        kind = (BYTES, TOUCH, TIME)[deaths % 3]
        n = {
            TOUCH: rng.randint(1, touches),
            BYTES: rng.randint(0, size - 1),
            TIME: rng.uniform(0.2, 0.9) * cpu,
        }[kind]
        return kind.format(n=n, out=str(out), signum=int(signal.SIGKILL), count="")

    for case in range(4 * moments):
        out = tmp_path / str(case)
        while True:
            before = killed(out)
            p = go_on(scripts, script, out, BEFORE=before)
            # 0: what was left of the run was shorter
            assert p.wait() in (0, -signal.SIGKILL), f"{p.err}\n{before}"
            if p.code == 0:
                break
            deaths += 1
            if deaths >= moments or rng.random() >= 0.75:
                break
        if p.code:
            finish(scripts, script, out)
        equal(whole, out)
        shutil.rmtree(out)
        if deaths >= moments:
            return
    pytest.fail(f"only {deaths} of {moments} runs died")


STOPS = [(SCRIPTS[0], signal.SIGTERM)]
STOPS += [pytest.param(script, signal.SIGTERM, marks=slow) for script in SCRIPTS[1:]]
for script in SCRIPTS if FULL else SCRIPTS[:1]:
    STOPS.append(pytest.param(script, signal.SIGINT, marks=slow))


@pytest.mark.parametrize("script, signum", STOPS)
def test_stopped(script, signum, scripts, undisturbed, tmp_path):
    """SIGTERM and Ctrl-C while some file is touched: the iteration is finished and saved, exit code
    143 or 130. Before the run has its folder (the first five touches) and before the first
    iteration there is nothing to save; after the last one all is saved, and the run ends at once
    or, if it is ending anyhow, with code 0."""
    whole, touches, _, _ = undisturbed(script)
    rng = random.Random(f"{script} {signum} {SEED}")
    for case in range(3 if FULL and signum == signal.SIGTERM else 1):
        out = tmp_path / str(case)
        n = rng.randint(6, touches)
        before = TOUCH.format(n=n, out=str(out), signum=int(signum), count="")
        p = go(scripts, script, out, BEFORE=before)
        wait_without_traceback(p, script)
        assert p.code in (0, 128 + signum)
        if p.code:
            begun = "before the first iteration; there is nothing to save" not in p.err
            assert not begun or "go on with --resume" in p.err
            assert begun or not list((out / "ckpt").iterdir())
            assert (out / "ckpt").exists()
            ended = "after the last iteration" in p.err
            assert ended or not (out / "student").exists()
            finish(scripts, script, out)
        equal(whole, out)


def test_ctrl_c_by_somebody_who_does_not_want_to_wait(scripts, tmp_path):
    twice = "os.kill(os.getpid(), 2); os.kill(os.getpid(), 2); import time; time.sleep(9)"
    before = LINE.format(n=3, rank=0, do=twice)
    p = go(scripts, "dmd2", tmp_path / "run", BEFORE=before)
    assert p.wait() == 130
    expected = "dmd2.py: ended at once by a second SIGINT; the last checkpoint is intact"
    assert p.err.splitlines()[-1] == expected
    assert "Traceback" not in p.err


# ---- disk ----------------------------------------------------------------------------------------

LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({}, resource.RLIM_INFINITY))"


@pytest.fixture
def died(scripts, tmp_path):
    """died(script): folder of a run that was killed after iteration 6."""

    def make(script):
        out = tmp_path / "died"
        p = go(scripts, script, out, BEFORE=LINE.format(n=6, rank=0, do=DIE))
        assert p.wait() == -9
        return out

    return make


@some
def test_disk_full(script, scripts, undisturbed, died, tmp_path):
    """Files end at a limit, as on a full disk. Checkpoints: a warning, the run goes on. The log, or
    the student at the end: one line, exit code 1. The checkpoints that were there stay as they are,
    and with space again the run goes on from them."""
    whole, _, _, _ = undisturbed(script)
    start = died(script)
    ckpt = min(f.stat().st_size for f in (start / "ckpt").iterdir())
    # the log itself, from iteration 6 on: there is a line of it by then
    small = (start / "log.jsonl").stat().st_size + 150
    limits = [ckpt // 2, 20_000, small]
    if not FULL and script != "phased_dmd":
        limits = [random.Random(f"{script} {SEED}").randint(8_000, ckpt)]
    for limit in limits:
        out = tmp_path / f"{limit}"
        shutil.copytree(start, out)
        before = {p.name: p.read_bytes() for p in (out / "ckpt").iterdir()}
        stop = LIMIT.format(limit)
        if limit == small:
            stop = LINE.format(n=6, rank=0, do=stop)
        p = go_on(scripts, script, out, BEFORE=stop)
        wait_without_traceback(p, script)
        assert p.code in (0, 1), p.err
        assert "go on with --resume" not in p.err
        assert p.code == 1 or "not written" in p.err
        if limit == small:
            assert p.code == 1
            assert len(json_lines(out / "run.jsonl")) == 2
        assert {p.name: p.read_bytes() for p in (out / "ckpt").iterdir()} == before
        assert not list(out.rglob("*.tmp"))
        assert p.code == 1 or (out / "student" / "distill.json").exists()
        finish(scripts, script, out)
        equal(whole, out)


@full
@slow
def test_two_runs_in_one_folder(script, scripts, undisturbed, tmp_path):
    """The second is refused while the first is alive, whatever its flags, and changes nothing."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed(script)[0], out)
    content = lambda: {f: (out / f).read_bytes() for f in files(out)}
    before = content()
    with open(out / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for more in ([], ["--resume"], ["--overwrite"]):
            p = go(scripts, script, out, *more)
            one_line(p, "another run is writing here", script)
    assert content() == before


# No capability, as in capset(2): root may write anywhere, so the runs give up that right.
NOBODY = """
import ctypes, struct
assert ctypes.CDLL(None).capset(struct.pack('Ii', 0x20080522, 0), bytes(24)) == 0
"""
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="gives up rights of root")


@pytest.fixture
def world_readable_folder():
    """pytest's own folders cannot be entered by others."""
    home = Path(tempfile.mkdtemp())
    yield home
    for path in (home, *home.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(home)


@needs_root
@full
@slow
def test_a_folder_that_cannot_be_written(script, scripts, undisturbed, world_readable_folder):
    """It is refused at the start, and what is in it stays."""
    home = world_readable_folder
    home.chmod(0o555)
    expected = "--out .*expected a folder that can be written"
    p = go(scripts, script, home / "new", BEFORE=NOBODY)
    one_line(p, f"{expected}, found: Permission denied", script)
    home.chmod(0o755)
    old = home / "old"
    shutil.copytree(undisturbed(script)[0], old)
    for path in (old, old / "ckpt", old / "samples", old / ".lock"):
        path.chmod(0o555)
    for more in ("--resume", "--overwrite"):
        one_line(go(scripts, script, old, more, BEFORE=NOBODY), expected, script)
    assert files(old) == files(undisturbed(script)[0])


@needs_root
@full
@slow
def test_a_folder_that_closes_during_the_run(script, scripts, undisturbed, world_readable_folder):
    """The run ends with one line, and goes on from its checkpoint once it can."""
    out = world_readable_folder / "run"
    out.mkdir()
    close = "[os.chmod(p, 0o555) for p in (run.out, run.out / 'ckpt', run.out / 'samples')]"
    p = go(scripts, script, out, BEFORE=NOBODY + LINE.format(n=4, rank=0, do=close))
    wait_without_traceback(p, script)
    assert p.code == 1, p.err
    assert "not written" in p.err
    checkpoints = [f.name for f in sorted((out / "ckpt").iterdir())]
    assert checkpoints == ["it-00000002.pt", "it-00000004.pt"]
    for path in (out, out / "ckpt", out / "samples"):
        path.chmod(0o755)
    finish(scripts, script, out)
    equal(undisturbed(script)[0], out)


# ---- nan -----------------------------------------------------------------------------------------

KINDS = ["batch", "teacher", "loss"]
NAN_CASES = []
for i, script in enumerate(SCRIPTS):
    every = FULL or script == "dmd2"
    NAN_CASES += [(script, kind) for kind in (KINDS if every else [KINDS[i % 3]])]


@slow
@pytest.mark.parametrize("script, kind", NAN_CASES)
def test_nan(script, kind, scripts, undisturbed, tmp_path):
    """nan in a batch, in the output of the frozen network, in a loss, in two iterations: these
    steps are skipped and counted, and nothing keeps the nan."""
    out = tmp_path / "run"
    p = go(scripts, script, out, BEFORE=NAN.format(kind=kind, span=(5, 7)))
    assert p.wait() == 0, p.err
    found = json_lines(out / "log.jsonl")
    assert [line["it"] for line in found] == list(range(N))
    assert found[4]["skipped"] == 0
    assert found[6]["skipped"] >= 1
    assert found[6]["skipped"] == found[-1]["skipped"]
    for name, value in checkpoint(out, N).items():
        assert not torch.is_tensor(value) or value.isfinite().all(), name
    for path in (out / "student").rglob("*.safetensors"):
        assert all(v.isfinite().all() for v in load_file(path).values()), path

    good = log(undisturbed(script)[0])
    for a, b in zip(found[:5], good[:5]):
        assert {k: v for k, v in a.items() if k != "time"} == b


@some
def test_nan_without_end(script, scripts, tmp_path):
    """After 20 bad steps in a row the run stops, and no checkpoint holds a nan."""
    out = tmp_path / "run"
    before = NAN.format(kind="loss", span=(6, 1000))
    p = go(scripts, script, out, "--iters", 40, BEFORE=before)
    wait_without_traceback(p, script)
    assert p.code == 1
    assert "not finite in 20 steps in a row" in p.err
    assert not (out / "student").exists()
    found = json_lines(out / "log.jsonl")
    assert [line["it"] for line in found] == list(range(len(found)))
    assert found[-1]["skipped"] >= 19
    paths = sorted((out / "ckpt").iterdir())
    states = [torch.load(path, weights_only=True)["state"]["student"] for path in paths]
    for name, v in states[0].items():
        assert v.isfinite().all()
        assert torch.equal(v, states[1][name])
    if FULL or script == "dmd2":  # without whatever was wrong, it goes on to its end
        p = go(scripts, script, out, "--iters", 40, "--resume")
        assert p.wait() == 0, p.err
        assert [line["it"] for line in json_lines(out / "log.jsonl")] == list(range(40))


# ---- another time and place ----------------------------------------------------------------------

# The clock is set back and forth; on Linux, as root, the host has another name (CLONE_NEWUTS).
ELSEWHERE = """
import ctypes, os, random, socket, time
real, rng = time.time, random.Random(0)
time.time = lambda: real() + rng.choice([-3e9, -1e5, 0, 1e5, 3e9])
name = b"host-%d" % os.getpid()
libc = ctypes.CDLL(None)
if os.getuid() or libc.unshare(0x04000000) or libc.sethostname(name, len(name)):
    socket.gethostname = lambda: name.decode()
assert socket.gethostname() == name.decode()
"""


@some
def test_another_time_and_place(script, scripts, undisturbed, tmp_path):
    """The same seed once more gives the same bits, while the clock is set back and forth, on a host
    of another name, with files from the future."""
    whole, _, _, _ = undisturbed(script)
    out = tmp_path / "run"
    rng = random.Random(f"{script} {SEED}")
    death = LINE.format(n=rng.randint(0, N - 1), rank=0, do=DIE)
    p = go(scripts, script, out, BEFORE=ELSEWHERE + death)
    assert p.wait() == -9, p.err
    for path in out.rglob("*"):
        stamp = rng.choice([10**8, 4 * 10**9])
        os.utime(path, (stamp, stamp))
    p = go_on(scripts, script, out, BEFORE=ELSEWHERE)
    assert p.wait() == 0, p.err
    equal(whole, out)
    seconds = [times["seconds"] for times in log(out, times=True)]
    assert seconds == sorted(seconds)
    assert seconds[0] >= 0
    assert seconds[-1] < 600


# ---- several processes ---------------------------------------------------------------------------

# torchrun's own agent. Its workers are forks of a process that has imported torch already.
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
        exec({line!r}.format(n=n, rank=rank, do={die!r}), {{}})
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:
        if e.code:
            os._exit(e.code)
if __name__ == "__main__":
    config = LaunchConfig(
        1, 1, 2, run_id=str(os.getpid()), rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts={restarts}, monitor_interval=0.1, start_method="fork",
    )
    elastic_launch(config, work)()
"""


def torchrun(scripts, tmp_path, script, *flags, deaths=(), restarts=2, setup=""):
    path = ROOT / f"{script}.py"
    argv = [str(path), *required_flags(path.name), *map(str, FLAGS), *map(str, flags)]
    agent = tmp_path / "agent.py"
    parts = dict(deaths=list(deaths), argv=argv, setup=setup, line=LINE, die=DIE)
    agent.write_text(AGENT.format(restarts=restarts, **parts))
    return scripts.start(agent)


@full
@slow
def test_a_lost_process(script, scripts, tmp_path):
    """One of two processes dies, after the restart the other one: both times the run goes on by
    itself, to the bits of the undisturbed one."""
    rng = random.Random(f"{script} {SEED}")
    whole, out = tmp_path / "whole", tmp_path / "run"
    run_processes(scripts, 2, f"{script}.py", *FLAGS, "--out", whole)
    first = rng.randint(0, N - 3)
    deaths = [(1, first), (0, rng.randint(first + 1, N - 2))]
    p = torchrun(scripts, tmp_path, script, "--out", out, deaths=deaths)
    assert p.wait() == 0, p.err
    equal(whole, out)

    # Before the first checkpoint, after iteration 1, an attempt starts from the beginning. Process
    # 0 may still write it when the other one died in that iteration.
    starts = len(json_lines(out / "run.jsonl"))
    assert starts >= 1 + sum(it > 1 for _, it in deaths)
    assert starts <= 1 + sum(it > 1 - rank for rank, it in deaths)

    # lines of torchrun's agent start with their level and date
    ours = [line for line in p.err.splitlines() if not re.match(r"[EWI]\d{4} ", line)]
    assert not any("Traceback" in line for line in ours), p.err
    reasons = [re.sub(".*\r", "", line) for line in ours if f"{script}.py: " in line]
    assert reasons
    for line in reasons:
        assert "another process of this run is gone" in line


@slow
def test_restarts_do_not_continue_a_refused_run(scripts, undisturbed, tmp_path):
    """To a restarted attempt every checkpoint looks like its own. The first attempt was refused, so
    the old run must not go on."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed("dmd2")[0], out)
    p = torchrun(scripts, tmp_path, "dmd2", "--out", out, "--iters", 20, restarts=1)
    assert p.wait() != 0
    assert p.err.count("holds a run at iteration 12; add --resume, --overwrite") == 2, p.err
    assert "resumed" not in p.out
    assert files(out) == files(undisturbed("dmd2")[0])


DIE_BEFORE_THE_TEACHER = """
import common.teachers.load
def die(*args, **kwargs):
    os._exit(9)
if attempt == 0:
    common.teachers.load.load_teacher = die
"""


@slow
def test_restarts_discard_what_was_to_be_overwritten(scripts, undisturbed, tmp_path):
    """The first attempt died before --overwrite took effect."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed("dmd2")[0], out)
    flags = ["--out", out, "--overwrite"]
    p = torchrun(scripts, tmp_path, "dmd2", *flags, restarts=1, setup=DIE_BEFORE_THE_TEACHER)
    assert p.wait() == 0, p.err
    assert "resumed" not in p.out
    assert len(json_lines(out / "run.jsonl")) == 1


# ---- memory, records, network --------------------------------------------------------------------

LITTLE_MEMORY = """
import resource
line = next(line for line in open("/proc/self/status") if line.startswith("VmSize"))
used = int(line.split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20, resource.RLIM_INFINITY))
"""


def test_out_of_memory(scripts, tmp_path):
    """What to lower, in one line."""
    p = go(scripts, "dmd2", tmp_path / "run", "--batch", 10**7, BEFORE=LITTLE_MEMORY)
    assert p.wait() == 1, p.err
    assert "Traceback" not in p.err
    assert re.match(r"dmd2\.py: out of memory: lower --batch", p.err.splitlines()[-1]), p.err


PRINT_STATE = """
import atexit, os, torch
def state():
    on = torch.are_deterministic_algorithms_enabled()
    print("state", on, os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
atexit.register(state)
"""


def test_run_jsonl_has_what_another_start_needs(scripts, undisturbed, tmp_path):
    """A line for each start, with all flags, the code's revision, the packages' versions."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed("dmd2")[0], out)
    flags = ["--iters", N + 2, "--resume", "--deterministic"]
    p = go(scripts, "dmd2", out, *flags, BEFORE=PRINT_STATE)
    assert p.wait() == 0, p.err
    assert "state True :4096:8" in p.out  # what --deterministic sets; CPUs do not need it
    first, second = json_lines(out / "run.jsonl")
    assert (first["first"], second["first"]) == (0, N)
    assert first["processes"] == 1
    assert first["flags"]["seed"] == 0
    assert second["flags"]["iters"] == N + 2
    assert second["flags"]["deterministic"]
    assert second["command"][-1] == "--deterministic"
    assert {"python", "numpy", "diffusers"} <= set(second["versions"])
    assert second["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    git = ["git", "rev-parse", "--short=10", "HEAD"]
    head = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert second["revision"].startswith(head or "unknown")
    student = json.loads((out / "student" / "distill.json").read_text())
    assert student["revision"] == second["revision"]


# On Linux, as root, there is no network to reach (CLONE_NEWNET).
NO_NETWORK = """
import atexit, ctypes, os, socket, sys
if os.getuid() == 0:
    ctypes.CDLL(None).unshare(0x40000000)
seen = []
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        seen.append(args[1:])
sys.addaudithook(watch)
atexit.register(lambda: print("connections", seen))
"""


@full
def test_nothing_uses_the_network(script, scripts, tmp_path):
    """Without a hub name there is no connection."""
    p = go(scripts, script, tmp_path / "run", "--eval-n", 64, BEFORE=NO_NETWORK)
    assert p.wait() == 0, p.err
    assert "connections []" in p.out
