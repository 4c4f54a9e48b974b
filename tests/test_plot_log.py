"""tools/plot_log.py: the numbers of log.jsonl and their curves."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.errors import UserError
from tools.plot_log import main, plot, read_log, running_mean


@pytest.fixture
def folder(tmp_path):
    """A run whose line of iteration 30 has no value of `sometimes`."""
    lines = []
    for it in range(0, 200, 10):
        line = dict(it=it, images=8 * it, skipped=0, lr=1e-3, loss=1 / (it + 1), gap=None)
        line["time"] = dict(seconds=it)
        if it != 30:
            line["sometimes"] = 5
        lines.append(json.dumps(line) + "\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("".join(lines))
    return tmp_path / "run"


def test_read_log(folder):
    log = read_log(folder)
    # nothing was skipped, and times are no result
    assert set(log) == {"lr", "loss", "gap", "sometimes"}
    assert np.isnan(log["gap"][1]).all()  # null
    iterations, values = log["loss"]
    assert iterations.tolist() == list(range(0, 200, 10))
    assert values[1] == 1 / 11
    assert 30 not in log["sometimes"][0]


def test_a_folder_without_a_log(tmp_path):
    with pytest.raises(UserError, match="expected the log of a run"):
        read_log(tmp_path)


@pytest.mark.parametrize(
    "text, error", [("{", "one JSON object per line"), ("", "expected lines of a run, found none")]
)
def test_a_damaged_log(tmp_path, text, error):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(UserError, match=error):
        read_log(tmp_path)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_running_mean(values, share):
    y = np.array(values)
    half = len(y) // share // 2
    expected = [y[max(0, i - half) : i + half + 1].mean() for i in range(len(y))]
    assert np.allclose(running_mean(y, share), expected, atol=1e-9)


def test_a_picture_of_two_runs(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.jsonl").write_text('{"it": 0, "loss": NaN}\n')
    main([str(folder), str(tmp_path / "other"), "--out", str(tmp_path / "a" / "log.png")])
    assert capsys.readouterr().out == f"{tmp_path / 'a' / 'log.png'}\n"
    pixels = np.array(Image.open(tmp_path / "a" / "log.png").convert("RGB")).astype(int)
    blue = (pixels[..., 2] - pixels[..., 0] > 100).sum()
    assert blue > 100  # the first run's curves


def test_the_default_place(folder, capsys):
    pytest.importorskip("matplotlib")
    main([str(folder)])
    assert (folder / "samples" / "log.png").stat().st_size > 1000


def test_without_matplotlib(folder, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="need matplotlib: pip install matplotlib"):
        plot(tmp_path / "x.png", {"run": read_log(folder)}, "title")
