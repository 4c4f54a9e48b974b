"""What schedulers, terminals and users send: the run saves and ends with exit code 128 + n."""

import signal

import pytest
from helpers.runs import QUICK, log, processes, same

SIGNALS = ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"]
each_signal = pytest.mark.parametrize("name", SIGNALS)
FLAGS = ["dmd2.py", *QUICK, "--iters", 12, "--log-every", 1, "--save-every", 0, "--out"]

# Signals to the process itself, one after the other, after the log's line of iteration 4.
AFTER_LINE_4 = """
import os, signal, time
import training.run
log = training.run.Run.log
def log_and_send(run, it, values):
    log(run, it, values)
    if it == 4 and run.rank == {rank}:
        for name in {names!r}:
            os.kill(os.getpid(), getattr(signal, name))
training.run.Run.log = log_and_send
"""
# Before the first iteration, in the place where prompts are encoded and networks are loaded.
WHILE_LOADING = """
import os, signal
import common.teachers.load
def load_teacher(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
common.teachers.load.load_teacher = load_teacher
"""
# After the last one.
WHILE_EVALUATING = """
import os, signal
import training.report
def evaluate(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
training.report.evaluate = evaluate
"""


def sent(*names, rank=0):
    return AFTER_LINE_4.format(names=names, rank=rank)


def saved(out):
    return sorted(path.name for path in (out / "ckpt").iterdir())


@pytest.fixture(scope="module")
def whole(scripts, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    scripts.run(*FLAGS, out)
    return out


@each_signal
def test_it_saves_and_goes_on(name, scripts, whole, tmp_path):
    out, number = tmp_path / "run", getattr(signal, name)
    p = scripts.run(*FLAGS, out, code=128 + number, BEFORE=sent(name))
    assert p.err.endswith(f"stopped by {name} after iteration 5; go on with --resume\n")
    assert saved(out) == ["it-00000005.pt"]
    assert not (out / "student").exists()
    scripts.run(*FLAGS, out, "--resume")
    same(whole, out, 12)


@each_signal
def test_a_second_one_ends_at_once(name, scripts, tmp_path):
    out, number = tmp_path / "run", getattr(signal, name)
    p = scripts.run(*FLAGS, out, code=128 + number, BEFORE=sent(name, name))
    expected = f"dmd2.py: ended at once by a second {name}; the last checkpoint is intact"
    assert p.err.splitlines()[-1] == expected
    assert saved(out) == []


def test_ctrl_c_after_another_signal_ends_at_once(scripts, tmp_path):
    out = tmp_path / "run"
    scripts.run(*FLAGS, out, code=130, BEFORE=sent("SIGTERM", "SIGINT"))
    assert saved(out) == []


@pytest.mark.parametrize("names", [("SIGUSR1", "SIGTERM"), ("SIGTERM", "SIGHUP")])
def test_what_schedulers_send_one_after_the_other(names, scripts, tmp_path):
    """Slurm announces the end by SIGUSR1 and sends SIGTERM then; systemd sends both of the others.
    Neither may cost the checkpoint."""
    out, number = tmp_path / "run", getattr(signal, names[0])
    scripts.run(*FLAGS, out, code=128 + number, BEFORE=sent(*names))
    assert saved(out) == ["it-00000005.pt"]


def test_torchrun_passes_on_what_came_already(scripts, tmp_path):
    """Slurm and systemd signal every process of a job, and torchrun passes the signal on."""
    out = tmp_path / "run"
    twice = sent("SIGTERM", "SIGTERM")
    scripts.run(*FLAGS, out, code=143, BEFORE=twice, TORCHELASTIC_RUN_ID="x")
    assert saved(out) == ["it-00000005.pt"]


def test_nohup_keeps_a_closed_terminal_away(scripts, tmp_path):
    out = tmp_path / "run"
    ignore = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    scripts.run(*FLAGS, out, BEFORE=ignore + sent("SIGHUP"))
    assert (out / "student").exists()


def test_before_the_first_iteration_there_is_nothing_to_wait_for(scripts, tmp_path):
    """Encoding prompts and loading networks may take longer than a scheduler waits."""
    out = tmp_path / "run"
    p = scripts.run(*FLAGS, out, code=143, BEFORE=WHILE_LOADING)
    expected = "dmd2.py: stopped by SIGTERM before the first iteration; "
    assert p.err == f"{expected}there is nothing to save\n"
    scripts.run(*FLAGS, out, code=143, BEFORE=sent("SIGTERM"))
    p = scripts.run(*FLAGS, out, "--resume", code=143, BEFORE=WHILE_LOADING)
    assert p.err == f"{expected}go on with --resume\n"
    assert saved(out) == ["it-00000005.pt"]


def test_after_the_last_iteration_all_is_saved(scripts, tmp_path):
    """Sampling for the metrics may take minutes as well; --resume does it again."""
    out = tmp_path / "run"
    p = scripts.run(*FLAGS, out, "--eval-n", 64, code=143, BEFORE=WHILE_EVALUATING)
    last_line = "dmd2.py: stopped by SIGTERM after the last iteration; go on with --resume\n"
    assert p.err.endswith(last_line)
    assert saved(out) == ["it-00000012.pt"]
    scripts.run(*FLAGS, out, "--eval-n", 64, "--resume")
    assert (out / "metrics.json").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_all_processes_stop_at_one_iteration(rank, scripts, tmp_path):
    """The signal reaches one of them only."""
    out = tmp_path / "run"
    started = processes(scripts, 2, *FLAGS, out, BEFORE=sent("SIGUSR1", rank=rank))
    assert [p.wait() for p in started] == [128 + signal.SIGUSR1] * 2
    assert saved(out) == ["it-00000005.pt"]
    assert len(log(out)) == 5
