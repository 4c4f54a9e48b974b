"""README's commands, run one after the other in a reader's folder.

They run as written but for what costs time or is not here: training runs have --smoke, evaluations
64 samples, eight processes are two, pipelines are tiny, and so are LoRA and accumulation.
"""

import glob
import re
import shlex
import shutil

import pytest
from helpers.cases import SCRIPTS
from helpers.runs import processes
from helpers.teachers import draw, write_captioned

from common.files import ROOT

pytestmark = pytest.mark.slow
INSTALL = "pip install -r requirements.txt && "
ELSEWHERE = {  # run by another file of tests
    "python -m pytest": "this suite",
    "python eval.py out/dmd2-sdxl --prompts": "tests/test_scores.py, with tiny models",
    "python eval.py --images A --ref-images B": "tests/test_eval.py, without the weights of FID",
}
TINY = dict(sdxl="sdxl", sd15="sd15", FOLDER="sd15")  # teachers that are tiny folders here
SMALLER = {"--lora": "4", "--lora-fake": "4", "--accumulate": "2", "--it": "3", "--iters": "4"}


def commands():
    """Lines of README's blocks that begin with python or torchrun, in their order."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    blocks = [text for language, text in blocks if not language]
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    lines = [line.removeprefix(INSTALL) for line in lines]
    return [line for line in lines if line.startswith(("python ", "torchrun "))]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The reader's folder: the scripts, and the files that README's commands name."""
    home = tmp_path_factory.mktemp("reader")
    for script in [*SCRIPTS, "sample", "eval"]:
        shutil.copy(ROOT / f"{script}.py", home)
    (home / "prompts.txt").write_text("dog\na red heart\n")
    write_captioned(home / "IMAGES")
    for i in range(40):
        draw(home / "photos" / f"class{i % 2}" / f"{i}.png", (32, 32), (200 * (i % 2), 5 * i, 90))
    draw(home / "drawing.png", (28, 28), (255, 255, 255))
    return home


class Reader:
    """Runs commands in a folder. folders: of tiny teachers, made when they are asked for."""

    def __init__(self, home, folders, scripts):
        self.home, self.folders, self.scripts = home, folders, scripts

    def run(self, command, *more):
        words = shlex.split(command)
        n = 2 if words[0] == "torchrun" else 1
        words = [w for w in words[1:] if not w.startswith("--nproc_per_node")]
        script = self.home / words[0]
        flags = self.changed(words[1:])
        if words[0] == "-m":
            script, flags = ROOT / (words[1].replace(".", "/") + ".py"), self.changed(words[2:])
        flags += self.shortened(script.stem, flags) + list(more)
        before = f"import os; os.chdir({str(self.home)!r})"
        if n == 1:
            return self.scripts.run(script, *flags, BEFORE=before)
        started = processes(self.scripts, n, script, *flags, BEFORE=before)
        assert [p.wait() for p in started] == [0] * n, "\n".join(p.err for p in started)
        return started[0]

    def changed(self, flags):
        """Flags with smaller numbers, tiny teachers, and the shell's patterns expanded."""
        flags = [found for flag in flags for found in self.expanded(flag)]
        for i, flag in enumerate(flags[:-1]):
            if flag in SMALLER:
                flags[i + 1] = SMALLER[flag]
            if flag == "--teacher" and flags[i + 1] in TINY:
                flags[i + 1] = str(self.folders(TINY[flags[i + 1]]))
                flags += ["--batch", "4", "--cache-prompts", "cache"]
        return flags

    def expanded(self, word):
        return sorted(glob.glob(word, root_dir=self.home)) if "*" in word else [word]

    def shortened(self, script, flags):
        if script == "eval":
            return ["--n", "64"]
        if script == "pretrain":
            small = "--iters 2 --width 64 --heads 2 --depth 1 --batch 16"
            return [*small.split(), "--out", "out/teacher-photos"]
        is_training = script in SCRIPTS and "--resume" not in flags
        return ["--smoke", "--overwrite"] if is_training else []


def test_readme(home, folders, scripts):
    scripts.load("peft", "diffusers.loaders.peft")
    reader = Reader(home, folders, scripts)
    # what the reader has: a style for the fine-tune, a student of nct.py
    reader.run("python dmd2.py --teacher sd15 --lora 4 --lora-fake 4 --out style")
    shutil.copy(home / "style/student/pytorch_lora_weights.safetensors", home / "style.safetensors")
    ran = []
    for command in commands():
        if command.startswith(tuple(ELSEWHERE)):
            continue
        if "nct-mnist-edges" in command:
            nct = "python nct.py --generator out/dmd2-mnist --control edges"
            reader.run(nct, "--out", "out/nct-mnist-edges")
        reader.run(command)
        ran.append(command)
    assert len(ran) >= 15
    assert (home / "x.png").is_file() and (home / "out/dmd2-mnist/student").is_dir()
