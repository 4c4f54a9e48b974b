"""Commands and flags of README and docs/: the scripts accept them as they are written."""

import importlib
import re
import shlex

import pytest
from helpers.cases import SCRIPTS

from common.files import ROOT
from training.flags import Parser

PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"\b(?:python|torchrun [^`]*?) (\w+)\.py\b([^`&|]*)")
TEACHER = str(ROOT / "assets" / "mnist")  # stands for folders of the reader
ELSEWHERE = {  # flags of other scripts that a page names
    "dmd2": {"--per-prompt"},  # eval.py
    "flowmap": {"--best-of"},  # eval.py
    "nct": {"--nfe"},  # dmd2.py
}
# Not whole commands: "python X.py" and the like, with a letter for what the text names.
PLACEHOLDERS = {"FLAGS", "X", "N", "S", "..."}


def commands(page):
    """[(script, words of its flags)] of all commands in backticks and in blocks of code."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).split("\n") + re.findall(r"`([^`\n]+)`", text)
    found = []
    for line in lines:
        for script, rest in COMMAND.findall(line.split(" #")[0]):
            words = shlex.split(rest)
            if script in SCRIPTS and not PLACEHOLDERS & set(words):
                found.append((script, words))
    return found


def with_known_teacher(words):
    """The same flags, where a folder that only the reader has is a teacher that exists."""
    words = list(words)
    for i, word in enumerate(words[:-1]):
        if word == "--teacher" and (words[i + 1].isupper() or "/" in words[i + 1]):
            words[i + 1] = TEACHER
    return words


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_accepted(page):
    for script, words in commands(page):
        try:
            importlib.import_module(script).parse_args(with_known_teacher(words))
        except (Exception, SystemExit) as e:
            if getattr(e, "code", 1) == 0:  # --help
                continue
            pytest.fail(f"python {script}.py {shlex.join(words)}: {e}")


def test_commands_are_found():
    assert len(commands("docs/RESULTS.md")) > 50
    assert ("sid", ["--nfe", "4", "--gan"]) in commands("docs/sid.md")
    assert all(commands(f"docs/{script}.md") for script in SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_of_a_page_are_those_of_its_script(script, monkeypatch):
    """All flags of the method are explained, and no other is named."""
    parsers = []
    parse = Parser.parse

    def spy(parser, *args):
        parsers.append(parser)
        return parse(parser, *args)

    monkeypatch.setattr(Parser, "parse", spy)
    importlib.import_module(script).parse_args([])
    own = {flag for action in parsers[0].method._group_actions for flag in action.option_strings}
    known = {flag for action in parsers[0]._actions for flag in action.option_strings}
    page = (ROOT / "docs" / f"{script}.md").read_text()
    named = set(re.findall(r"(?<![\w-])--\w[\w-]*", page))
    assert own - named == set()
    assert named - known - ELSEWHERE.get(script, set()) == {"--nproc_per_node"}  # torchrun's
