"""What README promises, run as written."""

import re
from pathlib import Path

import pytest
import test_lora
import torch

import dmd2
from common.teachers.load import load_teacher

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_a_student_loads_in_plain_diffusers(tmp_path, monkeypatch):
    """The code block of README, on the shipped network saved as a student, makes the images of our own sampler."""
    teacher = load_teacher("mnist")
    teacher.copy().save(tmp_path / "out" / "dmd2-mnist" / "student", dict(method="dmd2"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope = {}
    with torch.no_grad():
        exec(re.search(r"```python\n(.*?)```", README, re.S).group(1), scope)
    torch.manual_seed(0)
    z = torch.randn(10, 1, 28, 28)
    ours = teacher.decode(dmd2.sample(teacher, z, teacher.encode(torch.arange(10)), 1, None))
    assert (
        ours.int() - scope["images"].int()
    ).abs().max() <= 1 and ours.float().std() > 50  # one grey level: round-off at a border


def test_lines_for_pipelines_are_those_that_test_lora_runs():
    assert re.findall(r"```python\n(.*?)```", README, re.S)[1:] == [
        code.lstrip("\n") for code in (test_lora.FULL, test_lora.LORA, test_lora.FLOW)
    ]


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_shipped_teacher_is_what_the_assets_page_says():
    teacher = load_teacher("mnist")
    page = (ROOT / "assets" / "README.md").read_text()
    assert f"{sum(p.numel() for p in teacher.parameters()):,} parameters" in page
    assert (
        ROOT / "assets" / "mnist" / "diffusion_pytorch_model.safetensors"
    ).stat().st_size <= 8 * 2**20
    assert (
        teacher.evaluation["held_out_accuracy"] >= 0.97
        and f"{teacher.evaluation['held_out_accuracy']:.1%}" in page
    )
