"""Alarms: a run that goes wrong says so, by its log and by the pictures that it draws anyway.

An alarm costs no network pass: lines of log.jsonl are read once more, and the pictures of
--sample-every are compared with the teacher's, which have the same noise and conditions. It never
stops a run. The limits, and the runs that they were chosen from: docs/alarms.md.
"""

import contextlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

# ---- figures of pictures -------------------------------------------------------------------------

FIGURES = ("diversity", "contrast", "shift", "clipped", "colour")  # what `compare` returns


def figures(samples, conditions):
    """Figures of samples: float [n, C, ...], pictures in 0..1 or points [n, C]. Sample i has
    condition i % conditions. Computed in float64 on the CPU."""
    samples = samples.detach().cpu().double()
    channels = samples.transpose(0, 1).flatten(1)  # [C, n * pixels]
    found = dict(
        mean=channels.mean(1),
        spread=channels.std(1),
        distance=distance_within(samples.flatten(1), conditions),
    )
    if samples.ndim == 4:
        found["clipped"] = ((samples <= 0) | (samples >= 1)).double().mean()
        if samples.shape[1] == 3:
            found["colour"] = (samples.amax(1) - samples.amin(1)).mean()
    return found


def distance_within(samples, conditions):
    """Mean squared distance between two samples of one condition; nan if no two have the same.

    samples: [n, D]. Over the ordered pairs of n samples, sum |x_i - x_j|^2 = 2 n sum |x_i - m|^2,
    where m is their mean.
    """
    total = samples.new_zeros(())
    pairs = 0
    for first in range(conditions):
        x = samples[first::conditions]
        n = len(x)
        pairs += n * (n - 1)
        if n > 1:
            total += 2 * n * (x - x.mean(0)).square().sum()
    return total / pairs if pairs else samples.new_tensor(torch.nan)


def compare(student, teacher):
    """Figures of a student relative to its teacher's, {name of FIGURES: float}.

    diversity: distance between samples of one condition, teacher 1. contrast: standard deviation of
    the channel that differs most, teacher 1. shift: of the mean of a channel, in the teacher's
    standard deviations. Of pictures, clipped: share of values at black or white, minus the
    teacher's. Of RGB, colour: mean of largest minus least channel, teacher 1.
    """
    ratio = student["spread"] / teacher["spread"]
    shift = (student["mean"] - teacher["mean"]).abs() / teacher["spread"]
    found = dict(
        diversity=student["distance"] / teacher["distance"],
        contrast=ratio[ratio.log().abs().argmax()],
        shift=shift.max(),
    )
    if "clipped" in student:
        found["clipped"] = student["clipped"] - teacher["clipped"]
    if "colour" in student:
        found["colour"] = student["colour"] / teacher["colour"]
    return {name: value.item() for name, value in found.items()}


# ---- rules ---------------------------------------------------------------------------------------

FIRST_JUDGED = 20  # iteration
LEAST_DIVERSITY, MOST_DIVERSITY = 0.35, 1.8
LEAST_CONTRAST, MOST_CONTRAST = 0.6, 1.4
MOST_SHIFT = 0.3
MOST_CLIPPED, MOST_COLOUR = 0.1, 1.5
MOST_LAG, MOST_FAR = 2, 30
MOST_CLIPS = 10  # twinflow's is above --clip throughout, and learns
CHECK_SIGN = "in your own copy, check the sign of the loss"


@dataclass
class Rule:
    """When an alarm turns on, and what it says.

    needs: columns of log.jsonl; a line without one of them changes nothing. is_bad(line, best, on):
    best has the greatest value of each column on earlier lines, of `shift` the least one since
    FIRST_JUDGED; on: whether the alarm is on. lines:
    bad ones in a row until it is on; a line that is not bad turns it off. seen: what is wrong, with
    {columns} to be filled in. cures: what to try.
    """

    name: str
    needs: tuple
    is_bad: Callable
    lines: int
    seen: str
    cures: list


def rules(clip):
    """The rules of a run with this --clip."""

    def is_low(name, least, line, best, on):
        # A student that is still learning may be low too, but less with every picture.
        learns = line["it"] < FIRST_JUDGED or line[name] > 1.05 * best.get(name, 0)
        return line[name] < least and (on or not learns)

    def is_alike(line, best, on):
        return is_low("diversity", LEAST_DIVERSITY, line, best, on)

    def is_off(line, best, on):
        # So may its brightness be off, but less with every picture.
        learns = line["shift"] < 0.95 * best.get("shift", math.inf)
        return (
            is_low("contrast", LEAST_CONTRAST, line, best, on)
            or line["contrast"] > MOST_CONTRAST
            or line["diversity"] > MOST_DIVERSITY
            or (line["shift"] > MOST_SHIFT and (on or not learns))
        )

    def is_clipped(line, best, on):
        return line["clipped"] > MOST_CLIPPED or line.get("colour", 1) > MOST_COLOUR

    found = [
        Rule(
            "alike",
            ("diversity",),
            is_alike,
            2,
            "pictures of one condition are alike, their distance is {diversity:.2f} of the "
            "teacher's",
            ["raise --ratio", "lower --lr"],
        ),
        Rule(
            "off",
            ("contrast", "shift", "diversity"),
            is_off,
            2,
            "pictures leave the teacher's: contrast {contrast:.2f} and diversity {diversity:.2f} "
            "of the teacher's, brightness off by {shift:.2f} standard deviations",
            ["lower --lr", "lower --lr-fake", "raise --ratio", CHECK_SIGN],
        ),
        Rule(
            "clipped",
            ("clipped",),
            is_clipped,
            2,
            "black, white or colours that the teacher has not: {clipped:.2f} more of all values "
            "are at an end of the range",
            ["lower --cfg"],
        ),
        Rule(
            "far",
            ("real_gap", "fake_gap"),
            lambda line, best, on: line["real_gap"] > MOST_FAR * line["fake_gap"],
            3,
            "the teacher's estimates are far from the samples: real_gap {real_gap:.3g}, fake_gap "
            "{fake_gap:.3g}",
            ["lower --cfg", "if pictures are off too, lower --lr", CHECK_SIGN],
        ),
    ]
    for column in ("fake_gap", "gap"):
        found.append(
            Rule(
                "lag",
                (column, "real_gap"),
                lambda line, best, on, column=column: line[column] > MOST_LAG * line["real_gap"],
                5,
                f"the critic lags behind the student: {column} {{{column}:.3g}}, real_gap "
                "{real_gap:.3g}",
                ["raise --ratio", "raise --lr-fake", "lower --lr"],
            )
        )
    for column in ("grad_student", "grad"):
        found.append(
            Rule(
                "clip",
                (column,),
                lambda line, best, on, column=column: line[column] > MOST_CLIPS * clip,
                10,
                f"the gradient is far above --clip {clip:g}: norm {{{column}:.3g}}",
                ["lower --lr", "if pictures are good, raise --clip"],
            )
        )
    found.append(
        Rule(
            "skipped",
            ("skipped",),
            lambda line, best, on: line["skipped"] > best.get("skipped", 0),
            3,
            "steps are left out, their gradient is not finite: {skipped} so far",
            ["lower --lr", "--dtype fp32"],
        )
    )
    return found


class Alarms:
    """Which alarms of a run are on: a function of the lines of log.jsonl so far.

    args: the flags of the run. What needs a flag that the script does not have is not advised.
    """

    def __init__(self, args):
        self.rules = rules(args.clip)
        self.args = args
        self.bad = {}  # {alarm: (iteration of the first, number) of its bad lines in a row}
        self.on = {}  # {alarm: iteration of the first bad line}
        self.best = {}  # {column: greatest value, of shift the least}

    def update(self, line):
        """Reads one more line. Returns [(alarm, text)] of those that it turns on."""
        news = []
        for rule in self.rules:
            if not all(isinstance(line.get(name), (int, float)) for name in rule.needs):
                continue
            since, count = self.bad.get(rule.name, (line["it"], 0))
            if not rule.is_bad(line, self.best, rule.name in self.on):
                self.bad.pop(rule.name, None)
                self.on.pop(rule.name, None)
                continue
            self.bad[rule.name] = (since, count + 1)
            if count + 1 == rule.lines:
                self.on[rule.name] = since
                seen = rule.seen.format(**line)
                cures = "; ".join(cure for cure in rule.cures if self.can(cure))
                news.append((rule.name, f"{seen}, since iteration {since}. {cures}"))
        for name, value in line.items():
            if not isinstance(value, (int, float)):
                continue
            if name != "shift":
                self.best[name] = max(value, self.best.get(name, value))
            elif line["it"] >= FIRST_JUDGED:
                self.best[name] = min(value, self.best.get(name, value))
        return news

    def can(self, cure):
        flags = re.findall(r"--([a-z-]+)", cure)
        return all(hasattr(self.args, flag.replace("-", "_")) for flag in flags)

    def read(self, path):
        """Reads the lines that log.jsonl has already, for a run that is resumed."""
        for line in path.read_text().splitlines() if path.is_file() else []:
            with contextlib.suppress(ValueError):  # half a line of a full disk
                self.update(json.loads(line))
