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


def edited(script, text, tmp_path):
    """The script with its only edit that has this text, as a module."""
    (edit,) = [e for e in edits(script) if text in "\n".join(e.lines)]
    path = tmp_path / "edited.py"
    path.write_text(changed_script(edit))
    return import_script("edited", path)


def test_the_head_sees_clean_inputs(trace, tmp_path):
    """The first edit of dmd2: official compute_cls_logits with diffusion_gan off has the images as
    they are, at index 0 of the grid."""
    clean = edited("dmd2", "alpha(grid[0])", tmp_path)
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


def test_conditions_of_the_losses_are_those_of_other_images(trace, tmp_path):
    """An edit of dmd2: the official four-step recipe takes them from a second draw of images."""
    module = edited("dmd2", "cond = images.samples", tmp_path)
    record = [(module, "dm_gradient"), (Images, "samples")]
    steps = trace(module, "--gan", "--ratio", 1, "--iters", 2, record=record)
    of_gan = [c.result[1]["labels"] for c in steps.calls["samples"][0::2]]
    of_losses = [c.result[1]["labels"] for c in steps.calls["samples"][1::2]]
    found = [c.args[4]["labels"] for c in steps.calls["dm_gradient"]]
    assert len(found) == 2
    assert all(map(torch.equal, found, of_losses))
    assert not any(map(torch.equal, of_gan, of_losses))


def test_groups_of_the_official_recipe_of_order_one(trace, tmp_path):
    """An edit of twinflow: rows of `any` have any t, and jump to r = 0."""
    module = edited("twinflow", "# one", tmp_path)
    steps = trace(module, "--order", 1, "--iters", 1, record=[(module, "times")])
    (call,) = steps.calls["times"]
    rows = call.args[2]["any"]
    t, r = call.result
    assert (r[rows] == 0).all()
    assert len(t[rows].unique()) == len(rows) > 1
