"""tools/bench.py: its passes, and the line of JSON that it ends with."""

import json
import re
import subprocess
import sys

import pytest
import torch

from common.files import ROOT
from common.teachers.load import load_teacher
from tools import bench


@pytest.mark.slow  # `import diffusers` and eight iterations each
@pytest.mark.parametrize("name", ["sdxl", "sd15", "sana", "sd3"])
def test_bench(name):
    command = [
        sys.executable,
        "-m",
        "tools.bench",
        "--teacher",
        name,
        "--random-weights",
        "--tiny",
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--gan",
        "--iters",
        "8",
        "--ratio",
        "2",
        "--batch",
        "2",
    ]
    p = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 0 and "Traceback" not in p.stderr, p.stderr
    result = json.loads(p.stdout.splitlines()[-1])
    assert (
        result["teacher"] == name
        and result["batch"] == 2
        and result["iterations"] == 2
        and result["peak_mb"] > 0
        and result["images_per_s"] > 0
    )
    assert 0 < result["of_matmul_ceiling"] < 1 and result["tflop_per_s"] == pytest.approx(
        result["tflop_per_iteration"] / result["s_per_iteration"], rel=1e-2
    )
    for fact in ("memory, estimated", "forward+backward to x, to the feature sites"):
        assert fact in p.stdout


def test_bare_passes_read_what_a_student_reads_beside_t():
    """Its new embeddings are part of the pass that the loop is compared with, and keep no gradient of it."""
    model, asked = load_teacher("mnist").copy().extend("r"), []
    model.extras["r"].register_forward_hook(lambda *a: asked.append(1))
    cond = model.encode([0, 1]) | dict(r=torch.ones(2))
    sync = type("Sync", (), {"__call__": lambda self: None, "device": torch.device("cpu")})()
    for mode in ("forward", "forward+backward", "jvp"):
        assert bench.bare(model, (mode, 2, False), dict(cond, r=torch.ones(2)), sync) > 0
    assert len(asked) == 3 and all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.slow  # 24 iterations of few images on mnist each
@pytest.mark.parametrize(
    "script", ["dmd2", "sid", "decoupled_dmd", "phased_dmd", "twinflow", "flowmap", "boot", "msd"]
)
def test_passes_are_those_that_the_script_counts(script):
    """What it prints is what is run: no pass beside those of the algorithm. 18 iterations: whole turns of every ratio; phased_dmd draws how many steps it rolls
    out. (sana_sprint and nct count parts that the bench does not: heads, the branch.)"""
    batch = "16" if script == "boot" else "4"  # boot: a sixteenth of the rows is for the boundary
    p = subprocess.run(
        [
            sys.executable,
            "-m",
            "tools.bench",
            script,
            "--teacher",
            "mnist",
            "--batch",
            batch,
            "--iters",
            "24",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert p.returncode == 0, p.stderr
    assert json.loads(p.stdout.splitlines()[-1])["passes"] == pytest.approx(
        float(re.search(r"passes per iteration +([\d.]+)", p.stdout)[1]),
        abs=0.5 if script == "phased_dmd" else 0.006,
    )
