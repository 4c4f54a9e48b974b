"""training/report.py: grids, results and the exported student."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.teachers import whole
from common.teachers.load import load_teacher
from training import report as report_module
from training.report import Report, dumps, save_grid, split_name


def toy_teacher():
    return SimpleNamespace(adapter="toy", evaluation={})


def make_report(run, model=None):
    return Report(run, toy_teacher(), SimpleNamespace(model=model), None, {})


def test_evaluations_that_a_resume_has_undone_are_replaced(make_run, monkeypatch):
    run = make_run()
    path = run.out / "eval.jsonl"
    lines = [json.dumps(dict(it=it)) for it in (2, 6, 8)]
    path.write_text("\n".join([*lines, '{"it": 9, "half']))
    result = dict(protocol="x", n=8)
    monkeypatch.setattr(report_module, "evaluate", lambda *args, **kwargs: dict(result))
    make_report(run).evaluate(6, 8)
    assert [json.loads(line)["it"] for line in path.read_text().splitlines()] == [2, 6]
    assert json.loads((run.out / "metrics.json").read_text())["it"] == 6


def test_no_evaluation_without_samples_or_metric(make_run, capsys):
    run = make_run()
    report = make_report(run)
    report.evaluate(6, 0)
    report.teacher = SimpleNamespace(adapter="dit", evaluation={})
    report.evaluate(6, 8)
    assert "this teacher brings no metric" in capsys.readouterr().out
    assert not (run.out / "metrics.json").exists()


def test_a_student_that_is_half_written_does_not_look_finished(make_run, monkeypatch):
    run = make_run()
    run.note_start(0)
    (run.out / "student").mkdir()
    (run.out / "student" / "distill.json").write_text("{}")

    def write_folder(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole, "write_folder", write_folder)
    with pytest.raises(OSError):
        make_report(run, load_teacher("toy")).export(1)
    assert not (run.out / "student" / "distill.json").exists()


def test_grid(tmp_path):
    """Two rows of three pictures of 2 x 2 pixels, enlarged 32 times; the first pixel is red."""
    red = torch.zeros(3, 3, 2, 2, dtype=torch.uint8)
    red[:, 0, 0, 0] = 255
    grey = torch.full((3, 1, 2, 2), 128, dtype=torch.uint8)
    save_grid(tmp_path / "grid.png", [("a", red), ("b", grey)])
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    padding, caption, side = 2, 14, 64
    row = side + caption + padding
    assert sheet.shape == (2 * row + padding, 3 * (side + padding) + padding, 3)
    top = padding + caption
    assert sheet[top, padding].tolist() == [255, 0, 0]
    assert sheet[top + 31, padding + 31].tolist() == [255, 0, 0]
    assert sheet[top + 32, padding].tolist() == [0, 0, 0]
    assert sheet[top + row, padding].tolist() == [128, 128, 128]


def test_grid_with_names(tmp_path):
    """The names stand below the last row, in as many lines as the longest needs."""
    black = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    save_grid(tmp_path / "plain.png", [("a", black)])
    save_grid(tmp_path / "named.png", [("a", black)], ["cat", "green triangle"])
    plain, named = (np.asarray(Image.open(tmp_path / f"{n}.png")) for n in ("plain", "named"))
    assert named.shape == (plain.shape[0] + 2 * 14, *plain.shape[1:])
    assert (named[: len(plain) - 2] == plain[:-2]).all()
    below = named[len(plain) :] < 128
    assert below[:, :66].any() and below[:, 66:].any()
    assert not below[14:, :66].any()  # one line below the first picture


@pytest.mark.parametrize(
    "name, lines",
    [
        ("cat", ["cat"]),
        ("green triangle", ["green", "triangle"]),
        ("a" * 15, ["a" * 10, "a" * 5]),
        ("one two three four five six", ["one two", "three..."]),
        (" ", [" "]),
    ],
)
def test_names_in_at_most_two_lines(name, lines):
    assert split_name(name, 64) == lines


def test_names_below_a_runs_pictures(make_run):
    """Of the labels with which they are drawn; at least two of each. A toy has no names."""
    run = make_run()
    rows = [("x", torch.zeros(20, 1, 28, 28))]
    assert make_report(run, None).column_names(rows) is None
    teacher = load_teacher("mnist")
    report = Report(run, teacher, None, None, {})
    drawn = []

    def sampler(model, z, cond, noise):
        drawn.extend(cond["labels"].tolist())
        return torch.zeros_like(z)

    report.draw(teacher, sampler)
    assert report.column_names(rows) == [str(label) for label in drawn]
    assert drawn == [*range(10), *range(10)]
    assert report.column_names([("x", rows[0][1][:12])]) == ["0", "1", "2", "3", "4", "5"] * 2


def test_strict_json():
    value = dict(a=float("nan"), b=[float("inf"), 1.5], c=dict(d=-float("inf")), e="x", f=None)
    expected = dict(a=None, b=[None, 1.5], c=dict(d=None), e="x", f=None)
    assert json.loads(dumps(value)) == expected
