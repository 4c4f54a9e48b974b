"""The lines that a student's card (README.md of its folder) has for plain diffusers, run here or in
a process of their own, which does not have this repository on its path."""

import json
import os
import re
import subprocess
import sys

import torch
from helpers.teachers import from_output, from_tokens, to_argument, to_tokens
from safetensors.torch import load_file, save_file

from common.files import read_json
from common.teachers import whole
from common.teachers.card import PROMPT

SEED = 7

RUNNER = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
import diffusers
from safetensors.torch import load_file, save_file
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
noise = load_file("noise.safetensors")
found = {}
for name, (home, code) in json.load(open("jobs.json")).items():
    os.chdir(home)
    names = dict(Z=noise[name])
    exec(code, names)
    found[name] = names["image"].contiguous()
assert "common" not in sys.modules
os.chdir(sys.argv[1])
save_file(found, "found.safetensors")
"""


def write_as_run(home, student, teacher, method, module, nfe, sampler, **options):
    """Writes a student's folder as a run does -> its record."""
    files, entries = whole.student_files(student, teacher, module.sample, sampler, nfe)
    record = dict(method=method, teacher=str(teacher.folder), nfe=nfe, cfg=3.0, sampler=sampler)
    record |= entries | dict(flags=dict(cfg=3.0))
    files["distill.json"] = json.loads(json.dumps(record))
    whole.write_student(home, files, teacher.folder, **options)
    return files["distill.json"]


def card_code(home):
    """The card's Python code."""
    return re.search(r"```python\n(.*?)```", (home / "README.md").read_text(), re.S)[1]


def for_test(code, prompt):
    """The same code, of whose first noise is Z, whose further noise is of SEED, and whose result is
    the latents. Nothing else of it is changed."""
    start = re.search(rf'pipe\((prompt=)?"{PROMPT}"', code)[0]
    call = start.replace(PROMPT, prompt) + ', output_type="latent"'
    if "torch.randn(" in code:  # the card scales the first noise
        code = re.sub(r"torch\.randn\([^)]*\)", "Z", code)
    else:
        call += ", latents=Z"
    assert code.count(start) == 1
    code = code.replace(start, call)
    quiet = "pipe.set_progress_bar_config(disable=True)"
    code = code.replace("image = pipe(", f"{quiet}\ntorch.manual_seed({SEED})\nimage = pipe(")
    return re.sub(r"\)\.(images|frames)\[0\]\s*$", r").\1", code)


def run_card(home, model, z, prompt):
    """Latents of the card's lines, in this process. z: unit noise [1, *shape]."""
    names = dict(Z=to_argument(model, z))
    here = os.getcwd()
    os.chdir(home)
    try:
        exec(for_test(card_code(home), prompt), names)
    finally:
        os.chdir(here)
    return from_output(model, names["image"])


def run_apart(jobs, folder):
    """{name: latents} of {name: (home, model, z, prompt)}, of one new process in `folder`."""
    noise = {name: to_argument(model, z).clone() for name, (_, model, z, _) in jobs.items()}
    save_file(noise, folder / "noise.safetensors")
    codes = {
        name: (str(home), for_test(card_code(home), prompt))
        for name, (home, _, _, prompt) in jobs.items()
    }
    (folder / "jobs.json").write_text(json.dumps(codes))
    command = [sys.executable, "-I", "-c", RUNNER, str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(folder / "found.safetensors")
    return {name: from_output(jobs[name][1], y) for name, y in found.items()}


def our_latents(sample, model, z, cond, nfe, **sampler):
    """What a script's sampler makes, with the further noise of a pipeline: SEED, and its order."""

    def noise():
        return from_tokens(model, torch.randn(to_tokens(model, z).shape))

    torch.manual_seed(SEED)
    with torch.no_grad():
        return sample(model, z, cond, nfe, noise, **sampler)


def same_as_card(home, teacher, student, sample, nfe, prompt, index, **sampler):
    """The card's lines give the student's samples, and the student is not the teacher.

    prompt: with number `index` among the teacher's.
    """
    z = torch.randn(1, *teacher.shape, generator=torch.Generator().manual_seed(1))
    cond = teacher.encode([index])
    expected = our_latents(sample, student, z, cond, nfe, **sampler)
    theirs = run_card(home, teacher, z, prompt)
    plain = read_json(home / "distill.json")["plain"]
    assert relative(theirs, expected) < (5e-3 if "nearly" in plain else 1e-5)
    untrained = our_latents(sample, teacher, z, cond, nfe, **sampler)
    assert relative(untrained, expected) > 1e-3


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())
