"""recipes/style_lora.py: the colours of the style, what the adapters learn, and the file."""

import re

import pytest
import torch
from helpers.teachers import load, quiet
from safetensors.torch import load_file

from common import lora
from common.errors import UserError
from common.teachers.load import load_pipeline
from common.teachers.teacher_lora import read_teacher_loras
from recipes import style_lora

PROMPTS = ["a red heart", "dog", "pizza 7"]


def test_ink_of_known_colours():
    """White stays, black becomes ink, grey is half of both, green is lighter than blue."""
    colours = torch.tensor([[255, 255, 255], [0, 0, 0], [51, 51, 51], [0, 255, 0], [0, 0, 255]])
    found = style_lora.ink(colours.to(torch.uint8)[:, :, None, None])[:, :, 0, 0]
    expected = [[255, 255, 255], [25, 45, 150], [71, 87, 171], [160, 168, 212], [51, 69, 162]]
    assert (found.int() - torch.tensor(expected)).abs().max() <= 1


def test_the_file_is_a_teacher_lora(folders, tmp_path, monkeypatch, capsys):
    """It is read, and the teacher with it has a lower loss on what it has learnt."""
    teacher = load(folders, "sd15", PROMPTS)
    monkeypatch.setattr(style_lora, "load_teacher", lambda *args, **kwargs: teacher)
    out = tmp_path / "ink"
    flags = ["--images", 6, "--batch", 6, "--iters", 60, "--lr", 1e-2, "--out", out]
    style_lora.main([str(flag) for flag in flags])
    printed = capsys.readouterr().out
    first, last = re.search(r"loss (\S+) in the first tenth, (\S+) in the last", printed).groups()
    assert float(last) < 0.95 * float(first)
    assert (out / "images.png").is_file()
    assert load_file(out / lora.FILE)
    loras = read_teacher_loras([str(out / lora.FILE)])
    options = dict(prompts=PROMPTS, cache=folders.cache, say=quiet)
    changed = load_pipeline(str(folders("sd15")), loras=loras, **options)
    before, after = (dict(model.net.named_parameters()) for model in (teacher, changed))
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("flag", ["images", "rank", "iters", "batch"])
def test_mistakes(flag):
    with pytest.raises(UserError, match=f"--{flag}: expected at least 1, found 0"):
        style_lora.parse_args([f"--{flag}", "0"])
