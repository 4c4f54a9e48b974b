"""common/log.py: means over microsteps, strict JSON, rates."""

import json

import pytest
import torch

from common.log import Log


@pytest.fixture
def log(tmp_path):
    return Log(tmp_path / "log.jsonl", world=1)


def lines(log):
    return [json.loads(line) for line in log.path.read_text().splitlines()]


def test_values_are_floats_or_tensors(log):
    log.add(dict(a=1.5, b=torch.tensor(2, dtype=torch.int64), c=torch.tensor(0.1).bfloat16()))
    means = log.means()
    assert means["a"] == 1.5
    assert means["b"] == 2.0
    assert means["c"] == pytest.approx(0.1, rel=1e-2)


def test_means_are_over_the_microsteps_that_have_a_value(log):
    log.add(dict(a=1.0, b=None))
    log.add(dict(a=2.0, b=5.0))
    assert log.means() == dict(a=1.5, b=5.0)


def test_means_start_the_next_iteration(log):
    log.add(dict(a=1.0))
    log.means()
    log.add(dict(a=3.0))
    assert log.means() == dict(a=3.0)


def test_nan_and_infinities_become_null(log):
    means = dict(a=float("nan"), b=float("inf"), c=1 / 3)
    log.write(0, 64, 0, means, seconds=1.0, peak_mb=100)
    (line,) = lines(log)
    assert line["a"] is None
    assert line["b"] is None
    assert line["c"] == 0.333333


def test_rates_are_since_the_last_line(log):
    assert log.write(0, 64, 0, {}, seconds=1.0, peak_mb=1) is None
    assert log.write(10, 704, 1, {}, seconds=3.0, peak_mb=1) == 320.0
    first, second = lines(log)
    assert first["time"]["images_per_s"] is None
    assert second["time"] == dict(seconds=3.0, images_per_s=320.0, peak_mb=1)
    assert (second["it"], second["images"], second["skipped"]) == (10, 704, 1)
