"""common/distributed.py: devices, launchers, errors that one of several processes sees."""

import io
import signal
import sys

import pytest
import torch
from helpers.runs import QUICK, one_line, processes
from tqdm import tqdm

from common.distributed import choose_device, run_in_step
from common.errors import UserError

# Two machines without a disk in common: process 1 works in another folder.
TWO_DISKS = """
import os
os.chdir(os.path.join({home!r}, os.environ["RANK"]))
os.environ["LOCAL_RANK"] = "0"
"""
WITHOUT_MODULES = """
import sys
for name in {names!r}:
    sys.modules[name] = None
"""


# ---- --device ------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    """gpus(n, local_rank, processes): torch sees n GPUs -> list of those that are chosen."""
    chosen = []

    def see(n, local_rank=None, processes=None):
        monkeypatch.setattr("torch.cuda.is_available", lambda: n > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: n)
        monkeypatch.setattr("torch.cuda.set_device", chosen.append)
        for name, value in dict(LOCAL_RANK=local_rank, LOCAL_WORLD_SIZE=processes).items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, str(value))
        return chosen

    return see


@pytest.mark.parametrize(
    "name, n, expected",
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda:0"),
        ("cpu", 2, "cpu"),
        ("cpu:0", 2, "cpu"),
        ("cuda", 2, "cuda:0"),
        ("cuda:0", 2, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_devices(name, n, expected, gpus):
    chosen = gpus(n)
    assert choose_device(name) == torch.device(expected)
    assert chosen == ([torch.device(expected)] if "cuda" in expected else [])


def test_each_process_has_its_own_gpu(gpus):
    gpus(4, local_rank=3, processes=4)
    assert choose_device("auto") == torch.device("cuda:3")


@pytest.mark.parametrize(
    "name, n, local_rank, processes, says",
    [
        ("cuda", 0, None, None, "--device cuda: torch sees no CUDA device here"),
        ("cuda:1", 0, None, None, "--device cuda:1: torch sees no CUDA device here"),
        ("cuda:2", 2, None, None, "expected cuda:0 to cuda:1.*CUDA_VISIBLE_DEVICES"),
        ("cuda:1", 2, 0, 2, "expected cuda, since torchrun gives each process its own GPU"),
        ("auto", 2, 0, 3, "--nproc_per_node: .* each of the 2 GPUs .*, found 3"),
        ("mps", 0, None, None, "found mps .Apple's GPUs have no float64.*--device cpu"),
        ("mps:0", 0, None, None, "found mps:0 .Apple's GPUs"),
        ("cuda:-1", 2, None, None, "expected auto, cpu, cuda or cuda:N, found cuda:-1"),
        ("cpu:1", 0, None, None, "found cpu:1"),
        ("gpu", 2, None, None, "found gpu"),
        ("xla", 2, None, None, "found xla"),
        ("", 2, None, None, "expected auto, cpu, cuda or cuda:N"),
    ],
)
def test_devices_that_are_refused(name, n, local_rank, processes, says, gpus):
    gpus(n, local_rank, processes)
    with pytest.raises(UserError, match=says):
        choose_device(name)


# ---- launchers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env, says",
    [
        (dict(SLURM_NTASKS=8), "SLURM_NTASKS=8 without RANK: srun started 8 tasks"),
        (dict(OMPI_COMM_WORLD_SIZE=2), "OMPI_COMM_WORLD_SIZE=2 without RANK: mpirun"),
        (dict(PMI_SIZE=2), "PMI_SIZE=2 without RANK: mpiexec"),
        (dict(WORLD_SIZE=2), "WORLD_SIZE=2 without RANK"),
    ],
)
def test_processes_that_do_not_know_of_each_other(env, says, scripts, tmp_path):
    flags = ["dmd2.py", *QUICK, "--iters", 2, "--out", tmp_path / "out"]
    one_line(scripts.start(*flags, **env), says, "dmd2")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "env", [dict(SLURM_NTASKS=1), dict(SLURM_NTASKS=8, RANK=0, WORLD_SIZE=1), dict(WORLD_SIZE=1)]
)
def test_one_process_of_a_job(env, scripts, tmp_path):
    """srun -n 1; torchrun within a job of several tasks."""
    scripts.run("dmd2.py", *QUICK, "--iters", 2, "--out", tmp_path / "out", **env)


# ---- what one process sees -----------------------------------------------------------------------


def test_a_teacher_that_only_one_machine_has(scripts, folders, tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    (tmp_path / "0" / "t").symlink_to(folders("dit"))
    flags = [
        "--teacher",
        "./t",
        "--iters",
        2,
        "--warmup",
        0,
        "--batch",
        2,
        "--eval-n",
        0,
        "--cfg",
        1,
    ]
    flags += ["--out", tmp_path / "out"]
    before = TWO_DISKS.format(home=str(tmp_path))
    first, second = processes(scripts, 2, "dmd2.py", *flags, BEFORE=before)
    one_line(second, r"dmd2.py: rank 1 on .*: --teacher \./t: expected ", "dmd2")
    first.kill(signal.SIGTERM)  # as torchrun does; it waits for the other one to come
    first.wait()


def test_a_bar_for_long_work(monkeypatch):
    """It counts what all ranks have done, and tells how long the rest takes."""
    text = io.StringIO()
    monkeypatch.setattr(sys, "stderr", text)
    monkeypatch.setattr(
        "common.distributed.tqdm",
        lambda **kwargs: tqdm(**kwargs | dict(delay=0, mininterval=0, file=text)),
    )
    done = []

    def work():
        for n in (16, 16, 8):
            done.append(n)
            yield n

    run_in_step(work(), 40, "prompt")
    assert done == [16, 16, 8]
    assert "16/40 [00:00<00:0" in text.getvalue()
    assert "32/40 [00:00<00:0" in text.getvalue()
    assert "prompt/s]" in text.getvalue()


# ---- systems without fcntl -----------------------------------------------------------------------


def test_a_system_without_locks_and_resource_limits(scripts, tmp_path):
    """Windows has neither module."""
    before = WITHOUT_MODULES.format(names=("fcntl", "resource"))
    p = scripts.run(
        "dmd2.py", *QUICK, "--iters", 2, "--out", tmp_path / "out", code=0, BEFORE=before
    )
    assert p.err.startswith("warning: --out ")
    assert "no lock on this file system (this Python has no fcntl)" in p.err
    assert (tmp_path / "out" / "student").exists()
