"""tools/animate.py: the grids of a run in one animated file."""

import numpy as np
import pytest
from PIL import Image, ImageSequence

from common.errors import UserError
from tools.animate import main


@pytest.fixture
def run(tmp_path):
    """A run with three grids, of one grey each, and a curve beside them."""
    folder = tmp_path / "run" / "samples"
    folder.mkdir(parents=True)
    for it in (1, 10, 100):
        Image.new("RGB", (24, 8), (2 * it, 0, 0)).save(folder / f"{it:08d}.png")
    Image.new("RGB", (24, 8), "white").save(folder / "log.png")
    return tmp_path / "run"


def frames(path):
    """[(value of the red channel, milliseconds)] of the frames of a file."""
    with Image.open(path) as image:
        assert image.info["loop"] == 0  # for ever
        found = []
        for frame in ImageSequence.Iterator(image):
            frame.load()
            red = np.array(frame.convert("RGB"))[..., 0]
            assert red.min() == red.max()
            found.append((int(red[0, 0]), frame.info["duration"]))
        return found


def test_all_grids(run, capsys):
    main([str(run)])
    assert capsys.readouterr().out == f"{run}/samples.webp\n"
    assert frames(run / "samples.webp") == [(2, 1200), (20, 1200), (200, 3600)]


def test_some_grids_as_gif(run, tmp_path):
    main([str(run), "--its", "100", "1", "--out", str(tmp_path / "x.gif")])
    assert frames(tmp_path / "x.gif") == [(200, 1200), (2, 3600)]


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--its", "1", "7"],
            "--its 7: expected an iteration with a sample grid, found those of 1,",
        ),
        (["--out", "x.png"], "--out x.png: expected a name that ends with .webp or .gif"),
    ],
)
def test_mistakes(run, flags, message):
    with pytest.raises(UserError, match=message):
        main([str(run), *flags])


def test_no_grids(tmp_path):
    with pytest.raises(UserError, match="samples: expected sample grids of a run"):
        main([str(tmp_path)])
