"""tools/bench.py: its passes, and the line of JSON that it ends with."""

import json
import subprocess
import sys
import time

import pytest
import torch

from common.files import ROOT
from common.teachers.load import load_teacher
from tools import bench


def run_bench(*flags):
    """-> the JSON of the last line, the text."""
    command = [sys.executable, "-m", "tools.bench", *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


def test_toy():
    """dmd2 on the toy, whose teacher has no network: per iteration a student and a critic pass, the
    critic's with backward; in every fifth one, the student's backward and the critic's estimate
    in (3) too: 1 + 3 + (2 + 1) / 5."""
    result, text = run_bench("dmd2", "--teacher", "toy", "--batch", 64, "--iters", 16)
    assert result["passes"] == 4.6
    assert result["iterations"] == 16 - bench.WARMUP
    assert result["batch"] == 64
    assert result["peak_mb"] > 0
    assert result["s_per_iteration"] > result["bare_passes_s"] > 0
    overhead = result["s_per_iteration"] / result["bare_passes_s"]
    assert result["overhead"] == pytest.approx(overhead, rel=1e-2)
    assert "forward+backward  " in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "sd15", "sana", "sd3"])
def test_random_weights(name):
    tiny = ["--teacher", name, "--random-weights", "--tiny", "--device", "cpu", "--dtype", "fp32"]
    flags = ["--gan", "--iters", 8, "--ratio", 2, "--batch", 2]
    result, text = run_bench("dmd2", *tiny, *flags)
    assert result["teacher"] == name
    assert result["batch"] == 2
    assert result["iterations"] == 2
    assert 0 < result["of_matmul_ceiling"] < 1
    flops_per_s = result["tflop_per_iteration"] / result["s_per_iteration"]
    assert result["tflop_per_s"] == pytest.approx(flops_per_s, rel=1e-2)
    assert "memory, estimated" in text
    assert "forward+backward to x, to the feature layers" in text


@pytest.mark.slow
def test_profile(tmp_path):
    path = tmp_path / "trace.json"
    command = [sys.executable, "-m", "tools.bench", "dmd2", "--teacher", "toy"]
    done = subprocess.run(
        [*command, "--profile", path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "Self CPU" in done.stdout
    assert json.loads(path.read_text())["traceEvents"]


@pytest.mark.parametrize("mode", ["forward", "forward+backward", "jvp"])
def test_a_bare_pass_of_an_extended_student(mode):
    """The embeddings of `extend` are evaluated too, and no gradient of the pass is left."""
    model = load_teacher("mnist").copy().extend("r")
    evaluations = []
    model.extras["r"].register_forward_hook(lambda *args: evaluations.append(1))
    cond = model.encode([0, 1]) | dict(r=torch.ones(2))
    kind = bench.Kind("network", mode, batch=2)
    example = bench.network_example(model, kind, cond)
    seconds = bench.Bench(time.perf_counter).time_bare(example, kind, torch.device("cpu"))
    assert seconds > 0
    assert len(evaluations) == 1
    for p in model.parameters():
        assert p.grad is None
        assert p.requires_grad


def test_modes_of_passes():
    weight = torch.ones(2, requires_grad=True)
    frozen = torch.ones(2)
    x = torch.ones(3)
    x_with_grad = torch.ones(3, requires_grad=True)
    assert bench.mode_of([weight], x) == "forward+backward"
    assert bench.mode_of([frozen], x_with_grad) == "forward+backward to x"
    assert bench.mode_of([frozen], x) == "forward"
    with torch.no_grad():
        assert bench.mode_of([weight], x_with_grad) == "forward"


def test_a_derivative_is_recognised():
    modes = []

    def call(t):
        modes.append(bench.mode_of([], torch.ones(3), t))
        return 2 * t

    torch.func.jvp(call, (torch.ones(3),), (torch.ones(3),))
    assert modes == ["jvp"]
