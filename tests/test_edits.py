"""The variants under "How to change it" in docs/<method>.md: each edit applies to the script and
the changed copy trains.

An edit is a fenced ```diff block. Its lines start with a space (context), - (removed) or +
(added); a line @@ separates places of the script. A comment <!-- flags: ... --> before the block
gives the flags of the run.
"""

import re
from dataclasses import dataclass

import pytest
import torch
from helpers.cases import SCRIPTS, required_flags
from helpers.runs import QUICK, ROOT

from common.teachers.students import import_script
from data.images import Images

BLOCK = re.compile(r"(?:<!-- flags: (?P<flags>.*?) -->\n)?```diff\n(?P<lines>.*?)```", re.S)


@dataclass
class Edit:
    script: str
    flags: list
    lines: list

    def places(self):
        """[(old text, new text)] for every place of the script that changes."""
        places = [[]]
        for line in self.lines:
            if line == "@@":
                places.append([])
            else:
                places[-1].append(line)
        return [(side(place, "-"), side(place, "+")) for place in places]


def side(lines, sign):
    """Text of one side of a diff: the context and the lines with this sign."""
    return "".join(f"{line[1:]}\n" for line in lines if line[:1] in (sign, " ", ""))


def edits(script):
    page = (ROOT / "docs" / f"{script}.md").read_text()
    found = []
    for match in BLOCK.finditer(page):
        flags = (match["flags"] or "--teacher toy").split()
        found.append(Edit(script, flags, match["lines"].splitlines()))
    return found


EDITS = [
    pytest.param(edit, id=f"{script}-{i}")
    for script in SCRIPTS
    for i, edit in enumerate(edits(script))
]


def changed_script(edit):
    code = (ROOT / f"{edit.script}.py").read_text()
    for old, new in edit.places():
        assert old, "an edit needs lines of the script, to be found by"
        assert code.count(old) == 1, f"expected once in {edit.script}.py, found other:\n{old}"
        code = code.replace(old, new)
    return code


@pytest.mark.parametrize("edit", EDITS)
def test_edit_applies(edit):
    code = changed_script(edit)
    compile(code, f"{edit.script}.py", "exec")
    assert code != (ROOT / f"{edit.script}.py").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS)
def test_edit_trains(edit, scripts, tmp_path):
    copy = tmp_path / f"{edit.script}.py"
    copy.write_text(changed_script(edit))
    args = [*QUICK, "--iters", 3, "--log-every", 1, "--out", tmp_path / "run"]
    if edit.script == "nct":
        args = [*required_flags("nct.py"), *args]
    scripts.run(copy, *args, *edit.flags)


def test_the_head_sees_clean_inputs(trace, tmp_path):
    """The first edit of dmd2: official compute_cls_logits with diffusion_gan off has the images as
    they are, at index 0 of the grid."""
    (edit,) = [e for e in edits("dmd2") if "--gan" in e.flags and "x_real" in "".join(e.lines)]
    path = tmp_path / "clean.py"
    path.write_text(changed_script(edit))
    clean = import_script("clean", path)
    record = [(clean.Critic, "forward"), (clean, "dm_loss"), (Images, "samples")]
    steps = trace(clean, "--gan", "--ratio", 1, "--iters", 2, record=record)
    of_head = [c for c in steps.calls["forward"] if c.kwargs.get("logit")]
    student_turn, critic_turn = of_head[-2:]
    x = steps.calls["dm_loss"][-1].args[0]
    x_real, _ = steps.calls["samples"][-1].result
    assert torch.equal(student_turn.args[1], x)
    assert torch.equal(critic_turn.args[1], torch.cat([x, x_real]))

    schedule = steps.teacher.schedule
    least = schedule.grid(1000)[0]
    for call in (student_turn, critic_turn):
        assert call.args[2].unique().tolist() == [schedule.alpha(least)]
        assert call.args[3].unique().tolist() == [schedule.sigma(least)]
