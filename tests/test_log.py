"""training/log.py: means over microsteps, strict JSON, rates."""

import json
import math

import pytest
import torch

from training.log import Log


@pytest.fixture
def log(tmp_path):
    return Log(tmp_path / "log.jsonl", world=1)


def lines(log):
    return [json.loads(line) for line in log.path.read_text().splitlines()]


def test_values_are_floats_or_tensors(log):
    log.add(0, dict(a=1.5, b=torch.tensor(2, dtype=torch.int64), c=torch.tensor(0.1).bfloat16()))
    means = log.means()
    assert means["a"] == 1.5
    assert means["b"] == 2.0
    assert means["c"] == pytest.approx(0.1, rel=1e-2)


def test_means_are_over_the_microsteps_that_have_a_value(log):
    log.add(0, dict(a=1.0, b=None))
    log.add(0, dict(a=2.0, b=5.0))
    assert log.means() == dict(a=1.5, b=5.0)


def test_values_by_sample(log):
    """The mean over those that have one, in all microsteps together."""
    nan = float("nan")
    log.add(0, dict(cos=torch.tensor([1.0, nan, 0.5, 0.0]), none=torch.tensor([nan, nan])))
    log.add(0, dict(cos=torch.tensor([nan, nan, -0.5, nan]), none=torch.tensor([nan, nan])))
    means = log.take()
    assert means["cos"] == 0.25
    assert math.isnan(means["none"])


def test_a_value_that_is_not_finite_stays(log):
    log.add(0, dict(loss=torch.tensor(float("nan"))))
    log.add(0, dict(loss=torch.tensor(1.0)))
    assert math.isnan(log.take()["loss"])


def test_the_newest_value_counts(log):
    """Of turns that not every iteration has: the last one since the line before."""
    log.add(0, dict(critic=1.0, student=10.0))
    log.add(1, dict(critic=2.0))
    assert log.take() == dict(critic=2.0, student=10.0)
    log.add(2, dict(critic=3.0))
    assert log.take() == dict(critic=3.0)
    assert log.take() == {}


def test_values_that_wait_for_their_line_keep_no_graph(log):
    x = torch.ones((), requires_grad=True)
    log.add(0, dict(loss=2 * x))
    ((value,),) = [values for _, values in log.newest.values()]
    assert value.grad_fn is None


def test_values_that_wait_for_their_line_outlive_a_resume(log, tmp_path):
    log.add(3, dict(student=1 / 3))
    resumed = Log(tmp_path / "log.jsonl", world=1)
    resumed.restore(3, log.means())
    for either in (log, resumed):
        either.add(4, dict(critic=2.0))
    assert resumed.take() == log.take()


def test_nan_and_infinities_become_null(log):
    means = dict(a=float("nan"), b=float("inf"), c=1 / 3)
    log.write(0, 64, 0, {}, means, seconds=1.0, peak_mb=100)
    (line,) = lines(log)
    assert line["a"] is None
    assert line["b"] is None
    assert line["c"] == 0.333333


def test_rates_are_since_the_last_line(log):
    assert log.write(0, 64, 0, {}, {}, seconds=1.0, peak_mb=1) is None
    assert log.write(10, 704, 1, dict(lr=1e-3), {}, seconds=3.0, peak_mb=1) == 320.0
    first, second = lines(log)
    assert first["time"]["images_per_s"] is None
    assert second["time"] == dict(seconds=3.0, images_per_s=320.0, peak_mb=1)
    assert (second["it"], second["images"], second["skipped"]) == (10, 704, 1)
    assert second["lr"] == 1e-3
