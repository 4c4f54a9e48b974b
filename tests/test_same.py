"""The scripts keep one form: shared blocks are the same text everywhere, equations are found by number, nothing but torch and common is imported."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
METHODS = [
    "dmd2",
    "sid",
    "decoupled_dmd",
    "phased_dmd",
    "msd",
    "sana_sprint",
    "twinflow",
    "flowmap",
    "boot",
    "nct",
]
SCRIPTS = [m for m in METHODS if (ROOT / f"{m}.py").exists()]
BLOCKS = ["setup", "resume", "log, pictures, checkpoint", "end"]


def read(script):
    return (ROOT / f"{script}.py").read_text()


def blocks(script):
    found = re.findall(
        r"^ *# ==== same in every script: (.+?) ====\n(.*?)^ *# ==== end ====$",
        read(script),
        re.M | re.S,
    )
    own = lambda text: re.sub(
        r"(state = dict\(.*?\)) \| dict\(.*", r"\1", text
    )  # what a method keeps beside student, optimiser and average
    return {name: own(text.replace(f'Run("{script}"', 'Run("METHOD"')) for name, text in found}


@pytest.mark.parametrize("script", SCRIPTS)
def test_shared_blocks(script):
    assert list(blocks(script)) == BLOCKS
    assert blocks(script) == blocks("dmd2")


@pytest.mark.parametrize("script", SCRIPTS)
def test_length(script):
    lines = read(script).splitlines()
    assert len(lines) <= 350 and max(map(len, lines)) <= 180


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_equation_is_in_the_code(script):
    doc = ast.get_docstring(ast.parse(read(script)))
    numbers = [int(n) for n in re.findall(r"\((\d+)\)$", doc, re.M)]
    assert numbers == list(range(1, len(numbers) + 1)) and numbers, (
        "equations of the docstring are numbered at the end of their lines"
    )
    code = read(script).split(doc[-40:])[-1]
    beside = {
        int(n)
        for comment in re.findall(r"^ *[^#\s].*?# (.*)$", code, re.M)
        for n in re.findall(r"\((\d+)\)", comment)
    }
    assert set(numbers) <= beside, (
        f"no code line has the number of equation {sorted(set(numbers) - beside)}"
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_imports(script):
    for node in ast.walk(ast.parse(read(script))):
        for module in (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        ):
            top = module.split(".")[0]
            assert top in ("torch", "common") or top in sys.stdlib_module_names, f"imports {module}"
