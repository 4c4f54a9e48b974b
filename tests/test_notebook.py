"""docs/emoji.ipynb: its cells run in their order and show what the text around them says."""

import ast
import json
import re
import shlex

import pytest
import torch
from helpers.cards import SEED, our_latents, relative
from PIL import Image

import dmd2
from common.files import ROOT
from common.teachers.load import load_teacher
from common.teachers.students import network_of, read_student

NOTEBOOK = ROOT / "docs" / "emoji.ipynb"


def cells(kind):
    """Texts of the cells of a kind: code, markdown."""
    found = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def translated(source):
    """`!command {NAME}` of a notebook as a call of shell()."""
    source = source.replace("\\\n", " ")
    return re.sub(r"^!(.*)$", lambda line: f"shell(f{line[1]!r})", source, flags=re.M)


def execute(source, names):
    """Runs a cell. -> what a notebook shows below it: the value of a last expression."""
    body = ast.parse(translated(source)).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), str(NOTEBOOK), "exec"), names)
    if last is not None:
        return eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names)


def test_the_notebook_has_no_outputs():
    """They would change with every run, and make the file large."""
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_commands_of_a_notebook_become_calls():
    names = dict(shell=lambda command: names.update(found=command), N=3)
    assert execute('!python x.py "a b" \\\n    --n {N}\nN + 1', names) == 4
    assert shlex.split(names["found"]) == ["python", "x.py", "a b", "--n", "3"]


@pytest.mark.slow
def test_the_notebook_runs(scripts, tmp_path, monkeypatch):
    """With two iterations instead of 150."""
    monkeypatch.chdir(ROOT / "docs")

    def shell(command):
        python, script, *flags = shlex.split(command)
        assert python == "python"
        scripts.run(script, *flags)

    names = dict(shell=shell)
    first, *others = cells("code")
    for name, value in dict(ITERS=2, OUT=str(tmp_path)).items():
        first, count = re.subn(rf"^{name} = [^ ]+", f"{name} = {value!r}", first, flags=re.M)
        assert count == 1
    execute(first, names)
    for source in others:
        shown = execute(source, names)
        assert isinstance(shown, Image.Image)
        low, high = shown.convert("L").getextrema()
        assert high - low > 100  # a picture

    # the last cell's pipeline is the student: the latents of our own sampler
    home, info = read_student(tmp_path / "dmd2")
    teacher = load_teacher("emoji")
    student = network_of(str(home), home, info, teacher, "emoji")
    z = torch.randn(1, *teacher.shape, generator=torch.Generator().manual_seed(1))
    cond = teacher.encode(torch.tensor([0]))
    assert teacher.prompts[0] == "red heart"
    ours = our_latents(dmd2.sample, student, z, cond, 4, **info["sampler"])
    torch.manual_seed(SEED)
    pipe = names["pipe"]
    assert pipe.get_active_adapters()
    call = dict(num_inference_steps=4, guidance_scale=1, latents=z, output_type="latent")
    assert relative(pipe("red heart", **call).images, ours) < 1e-4


def test_the_size_in_the_text():
    text = " ".join(cells("markdown"))
    passes = 2 * int(re.search(r"in (\d+) guided steps", text)[1])
    assert f"which are {passes} passes" in text
    assert "--nfe 16 --cfg 3.5" in cells("code")[1]
