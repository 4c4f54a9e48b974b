"""training/alarm.py: figures of pictures, rules, and runs that go wrong."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from helpers.cases import SCRIPTS
from helpers.runs import log
from helpers.source import ROOT
from helpers.trace import run_main

import boot
import dmd2
from training import alarm
from training.alarm import FIGURES, Alarms, compare, distance_within, figures, rules

FLAGS = dmd2.parse_args([])

# ---- figures of pictures -------------------------------------------------------------------------


def test_distance_within_is_over_all_pairs_of_one_condition():
    x = torch.randn(11, 5, dtype=torch.float64)
    pairs = [(i, j) for i in range(11) for j in range(i) if i % 3 == j % 3]
    expected = sum((x[i] - x[j]).square().sum().item() for i, j in pairs) / len(pairs)
    assert distance_within(x, 3).item() == pytest.approx(expected, rel=1e-12)


def test_no_pair_no_distance():
    assert math.isnan(distance_within(torch.randn(3, 5), 3))


def checkers(low, high):
    """Four RGB pictures of 2 x 2 pixels. Conditions 0, 1 by turns; red is `high`, the rest `low`,
    but for the third picture, whose red is `low` too."""
    pictures = torch.full((4, 3, 2, 2), float(low))
    pictures[[0, 1, 3], 0] = high
    return pictures


def test_figures_of_pictures():
    found = figures(checkers(0.25, 0.75), 2)
    assert found["mean"].tolist() == pytest.approx([0.625, 0.25, 0.25])
    # red, 16 values: three quarters at 0.75; n - 1
    assert found["spread"][0].item() == pytest.approx((3 / 16 * 0.25 * 16 / 15) ** 0.5)
    # of the two pairs one differs, by 0.5 in four pixels
    assert found["distance"].item() == pytest.approx((4 * 0.25 + 0) / 2)
    assert found["colour"].item() == pytest.approx(0.5 * 3 / 4)
    assert found["clipped"].item() == 0
    assert figures(checkers(0.5, 1), 2)["clipped"].item() == pytest.approx(3 / 12)


def test_points_and_grey_have_fewer_figures():
    assert set(figures(torch.randn(8, 2), 1)) == {"mean", "spread", "distance"}
    assert set(figures(torch.rand(8, 1, 2, 2), 1)) == {"mean", "spread", "distance", "clipped"}


def test_a_student_like_its_teacher():
    same = figures(torch.rand(6, 3, 4, 4), 3)
    expected = dict(diversity=1, contrast=1, shift=0, clipped=0, colour=1)
    assert compare(same, same) == pytest.approx(expected)
    assert set(expected) == set(FIGURES)


def test_compare():
    """One channel is twice as strong and moved by three of the teacher's standard deviations."""
    x = torch.randn(40, 2, dtype=torch.float64)
    teacher = figures(x, 1)
    moved = x.clone()
    moved[:, 1] = 2 * (x[:, 1] - x[:, 1].mean()) + x[:, 1].mean() + 3 * x[:, 1].std()
    found = compare(figures(moved, 1), teacher)
    a, b = x.var(0).tolist()
    assert found["contrast"] == pytest.approx(2)
    assert found["shift"] == pytest.approx(3)
    assert found["diversity"] == pytest.approx((a + 4 * b) / (a + b))


# ---- rules ---------------------------------------------------------------------------------------


def history(column, values, every=10, **more):
    return [dict(it=every * i, **{column: v}, **more) for i, v in enumerate(values)]


def turned_on(lines, clip=10.0):
    """[(alarm, iteration of the line that turned it on)]."""
    alarms = Alarms(SimpleNamespace(clip=clip))
    return [(name, line["it"]) for line in lines for name, _ in alarms.update(line)]


def pictures(**columns):
    """Lines with figures of pictures; those not given are the teacher's own."""
    n = len(next(iter(columns.values())))
    columns = dict(diversity=[1.0] * n, contrast=[1.0] * n, shift=[0.0] * n) | columns
    return [
        dict(it=90 * i, **{name: values[i] for name, values in columns.items()}) for i in range(n)
    ]


# Diversity on mnist every 20 iterations, from recorded runs: docs/alarms.md has the commands.
COLLAPSES = [0.157, 0.236, 0.223, 0.162, 0.263, 0.225, 0.295, 0.254, 0.235, 0.229]
HEALTHY = [0.157, 0.279, 0.366, 0.486, 0.540, 0.548, 0.560, 0.536, 0.538, 0.569]


def test_alike():
    assert turned_on(pictures(diversity=COLLAPSES)) == [("alike", 3 * 90)]
    assert turned_on(pictures(diversity=HEALTHY)) == []


def test_alike_after_a_good_start():
    assert turned_on(pictures(diversity=[*HEALTHY, 0.34, 0.33])) == [("alike", 11 * 90)]


def test_alike_stays_until_there_is_variety_again():
    """A little more than ever before is not enough for that."""
    alarms = Alarms(FLAGS)
    on = []
    for line in pictures(diversity=[0.2, 0.2, 0.2, 0.25, 0.34, 0.36, 0.5]):
        alarms.update(line)
        on.append("alike" in alarms.on)
    assert on == [False, False, True, True, True, False, False]


@pytest.mark.parametrize(
    "columns, name",
    [
        (dict(contrast=[0.7, 0.5, 0.4, 0.4]), "off"),
        (dict(contrast=[1.0, 1.0, 1.5, 1.5]), "off"),
        (dict(shift=[0.1, 0.1, 0.31, 0.4]), "off"),
        (dict(diversity=[1.0, 1.0, 1.9, 2.4]), "off"),
        (dict(clipped=[0.0, 0.0, 0.11, 0.2]), "clipped"),
        (dict(clipped=[0.0] * 4, colour=[1.0, 1.2, 1.6, 1.7]), "clipped"),
    ],
)
def test_pictures_that_leave_the_teachers(columns, name):
    lines = pictures(**columns)
    worst = 2 if columns == dict(contrast=[0.7, 0.5, 0.4, 0.4]) else 3
    assert turned_on(lines) == [(name, 90 * worst)]
    assert turned_on(lines[:worst]) == []


def test_a_student_whose_contrast_still_grows():
    """One step of the teacher has little: the toy's is nearly a point."""
    assert turned_on(pictures(contrast=[0.02, 0.1, 0.3, 0.5, 0.9, 1.0])) == []


def test_far():
    assert turned_on(history("real_gap", [33.0, 31.0, 31.0], fake_gap=0.06)) == [("far", 20)]
    assert turned_on(history("real_gap", [0.63, 0.6, 0.6], fake_gap=0.045)) == []


@pytest.mark.parametrize("column", ["fake_gap", "gap"])
def test_lag(column):
    lines = history(column, [0.1] * 5, real_gap=0.049)
    assert turned_on(lines) == [("lag", 40)]
    assert turned_on(history(column, [0.1] * 5, real_gap=0.051)) == []
    lines[2][column] = 0.01
    assert turned_on(lines) == []


@pytest.mark.parametrize("column", ["grad_student", "grad"])
def test_clip(column):
    assert turned_on(history(column, [101.0] * 10)) == [("clip", 90)]
    assert turned_on(history(column, [101.0] * 10), clip=11.0) == []
    assert turned_on(history(column, [101.0] * 5 + [99.0] + [101.0] * 9)) == []


def test_skipped():
    assert turned_on(history("skipped", [0, 1, 2, 4, 4])) == [("skipped", 30)]
    assert turned_on(history("skipped", [5, 5, 5, 5])) == []


def test_lines_without_the_columns_change_nothing():
    """A turn without the student, lines between pictures, JSON's null."""
    lines = history("grad_student", [101.0] * 10)
    between = [dict(it=line["it"] + 1, grad_student=None, fake=1.0) for line in lines]
    both = sorted(lines + between, key=lambda line: line["it"])
    assert turned_on(both) == [("clip", 90)]


def test_the_text_says_what_since_when_and_what_to_do():
    alarms = Alarms(FLAGS)
    news = [alarms.update(line) for line in pictures(diversity=COLLAPSES[:4])]
    ((name, text),) = news[-1]
    assert name == "alike"
    assert "0.16 of the teacher's" in text
    assert "since iteration 180" in text
    assert "raise --ratio" in text


def test_brightness_that_is_on_its_way_is_no_alarm():
    """flowmap on the toy, seed 1: from 0.48 to 0.05. If it stays, or comes back, there is one."""
    falls = [0.04, 0.48, 0.44, 0.36, 0.29, 0.24]
    assert turned_on(pictures(shift=falls)) == []
    assert turned_on(pictures(shift=[0.04, 0.48, 0.47, 0.46, 0.46])) == [("off", 270)]
    assert turned_on(pictures(shift=[0.04, 0.48, 0.2, 0.4, 0.39])) == [("off", 360)]


def test_only_flags_of_the_script_are_advised():
    """boot has no --ratio."""
    alarms = Alarms(boot.parse_args([]))
    news = [alarms.update(line) for line in pictures(diversity=COLLAPSES[:4])]
    ((_, text),) = news[-1]
    assert text.endswith("lower --lr")
    assert "--ratio" not in text


def test_every_rule_fills_in_its_text():
    for rule in rules(10.0):
        assert rule.seen.format(**dict.fromkeys(rule.needs, 1.0))


def test_every_alarm_is_on_its_page():
    page = (ROOT / "docs" / "alarms.md").read_text()
    missing = {rule.name for rule in rules(10.0) if f"| `{rule.name}` |" not in page}
    assert not missing


# ---- runs ----------------------------------------------------------------------------------------

QUICK = "--teacher toy-cond --batch 64 --eval-n 0 --cooldown 0".split()


@pytest.mark.parametrize("cut", range(1, 10))
def test_a_resume_has_the_same_state(cut, tmp_path):
    """From the lines of the log, as they are written: floats of six digits and null."""
    lines = pictures(diversity=COLLAPSES)
    lines[4]["contrast"] = None
    whole = Alarms(FLAGS)
    for line in lines:
        whole.update(line)
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines[:cut]))
    resumed = Alarms(FLAGS)
    resumed.read(tmp_path / "log.jsonl")
    for line in lines[cut:]:
        resumed.update(line)
    assert (resumed.on, resumed.bad, resumed.best) == (whole.on, whole.bad, whole.best)


def test_figures_that_wait_for_their_line_outlive_a_resume(monkeypatch, tmp_path):
    """Pictures after 6 iterations, a checkpoint after 8, the next line at 10. So does the count of
    bad lines: with this limit every grid is bad, and the second one turns the alarm on."""
    monkeypatch.setattr(alarm, "MOST_DIVERSITY", -1)
    flags = [*QUICK, "--sample-every", 6, "--save-every", 8, "--log-every", 5]
    run_main(monkeypatch, dmd2, *flags, "--iters", 14, "--out", tmp_path / "whole")
    run_main(monkeypatch, dmd2, *flags, "--iters", 8, "--out", tmp_path / "cut")
    more = ["--resume", "--out", tmp_path / "cut", "--iters", 14]
    run_main(monkeypatch, dmd2, *more)
    whole = log(tmp_path / "whole")
    assert [line["it"] for line in whole if "diversity" in line] == [5, 10]
    assert [line["alarms"] for line in whole] == [[], [], ["off"]]
    assert log(tmp_path / "cut") == whole


def test_pictures_change_no_other_number(monkeypatch, tmp_path):
    flags = [*QUICK, "--log-every", 1, "--iters", 8, "--save-every", 0]
    run_main(monkeypatch, dmd2, *flags, "--sample-every", 2, "--out", tmp_path / "with")
    run_main(monkeypatch, dmd2, *flags, "--sample-every", 0, "--out", tmp_path / "without")
    seen = log(tmp_path / "with")
    assert sum("contrast" in line for line in seen) == 4  # of 1, 2, 4, 6, 8; the last has no line
    assert all(line["alarms"] == [] for line in seen)  # nobody can tell after eight iterations
    plain = [{k: v for k, v in line.items() if k not in FIGURES} for line in seen]
    assert plain == log(tmp_path / "without")


def test_a_flipped_sign_is_seen(monkeypatch, tmp_path, capsys):
    """The student of dmd2 runs away from its teacher. The same flags with the right sign: silence.

    The run goes on to its end, the log has a column, the alarm is said once and at the end.
    """
    flags = [*QUICK, "--iters", 80, "--lr", 1e-3, "--sample-every", 20, "--log-every", 20]
    run_main(monkeypatch, dmd2, *flags, "--out", tmp_path / "right")
    assert all(line["alarms"] == [] for line in log(tmp_path / "right"))
    assert "alarm" not in capsys.readouterr().err

    loss = dmd2.dm_loss
    monkeypatch.setattr(dmd2, "dm_loss", lambda x, g: loss(x, -g))
    run_main(monkeypatch, dmd2, *flags, "--out", tmp_path / "wrong")
    lines = log(tmp_path / "wrong")
    assert [line["it"] for line in lines] == list(range(0, 80, 20))
    assert "off" in lines[-1]["alarms"]
    said = [line for line in capsys.readouterr().err.splitlines() if "alarm 'off'" in line]
    assert len(said) == 1
    assert "(docs/alarms.md)" in said[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_draws_what_alarms_need(script):
    """run.after and Report in every main: what test_form says of copies does not say this."""
    text = (ROOT / f"{script}.py").read_text()
    assert "run.after(it, logs, state, report)" in text
    assert "Report(run, teacher, ema" in text
