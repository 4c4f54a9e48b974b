"""tools/pictures.py: rows of images and scatter plots with captions."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageFont

from tools.pictures import (
    MARGIN,
    SIDE,
    by_angle,
    captioned,
    sample_rows,
    save_numbered,
    scatter,
    wrapped,
)

LONG = "a name that is much longer than it should be, with more words than fit"


def read(path):
    return np.array(Image.open(path)).astype(int)


def assert_clean_margin(path, width=4):
    """Nothing touches the border: no text is cut there."""
    pixels = np.array(Image.open(path).convert("L"))
    assert pixels[width:-width, width:-width].min() < 100
    for edge in (pixels[:width], pixels[-width:], pixels[:, :width], pixels[:, -width:]):
        assert (edge == 255).all()


def test_captions_of_images_are_not_cut(tmp_path):
    grey = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    colour = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    sample_rows(tmp_path / "rows.png", [(f"{LONG}\nsecond line", grey), ("b", colour)])
    assert_clean_margin(tmp_path / "rows.png")


@pytest.mark.parametrize("n", [1, 5, 13])
def test_captions_of_scatter_plots_are_not_cut(tmp_path, n):
    points = np.array([[9.0, 9.0], [0, float("nan")]])
    scatter(tmp_path / "x.png", [(f"{LONG}\n{LONG}", points)] * n, ["black", "black"])
    assert_clean_margin(tmp_path / "x.png")


def test_image_rows_show_the_images(tmp_path):
    """Two of 8 x 8 pixels, enlarged seven times, with a gap of 2 pixels."""
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images[1, 0] = 200
    sample_rows(tmp_path / "a.png", [("x", images)])
    row = read(tmp_path / "a.png")[MARGIN : MARGIN + 56]
    right = -MARGIN
    assert (row[:, right - 56 : right] == [200, 0, 0]).all()
    assert (row[:, right - 58 : right - 56] == 255).all()
    assert (row[:, right - 114 : right - 58] == 0).all()


def test_scatter_puts_points_where_they_are(tmp_path):
    points = np.array([[0.8, 0.8], [-0.8, 5.0]])
    scatter(tmp_path / "a.png", [("a", points)], [(255, 0, 0), (0, 0, 255)])
    pixels = read(tmp_path / "a.png")
    top = pixels.shape[0] - MARGIN - SIDE
    middles = []
    for channel in (0, 2):
        where = np.argwhere(pixels[..., channel] - pixels[..., 2 - channel] > 100)
        middles.append(where.mean(0) - [top, MARGIN])
    red, blue = middles
    assert np.abs(red - [50, 150]).max() < 2  # up is smaller
    assert abs(blue[1] - 50) < 2
    assert blue[0] < 6  # outside of the plot: drawn at its border


def test_colours_are_directions():
    angle = np.linspace(0, 2 * math.pi, 9)[:-1] + 0.01
    points = np.stack([np.cos(angle), np.sin(angle)], 1)
    colours = by_angle(points)
    assert len(set(colours)) == 8
    assert by_angle(5 * points) == colours
    rgb = [ImageColor.getrgb(colour) for colour in colours]
    assert rgb[0][0] > 200
    assert rgb[3][1] > 200


@pytest.mark.parametrize("channels", [1, 3])
def test_numbered_files(tmp_path, channels):
    images = torch.randint(256, (2, channels, 4, 6), dtype=torch.uint8)
    save_numbered(tmp_path, torch.tensor([3, 17]), images)
    for number, image in ((3, images[0]), (17, images[1])):
        pixels = torch.from_numpy(read(tmp_path / f"{number:06d}.png"))
        assert torch.equal(pixels.reshape(4, 6, channels), image.permute(1, 2, 0).long())


def test_captions_fit_below_their_pictures(tmp_path):
    """Words of a caption go to the next line, three lines at most; the note has its own."""
    font = ImageFont.load_default(12)
    text = "a red apple and a green pear on a blue table in a small room with a large window"
    lines = wrapped(text, font, 128).split("\n")
    assert len(lines) == 3
    assert all(font.getlength(line) <= 128 for line in lines)
    assert text.startswith(" ".join(lines)[:40])
    assert wrapped("heart", font, 128) == "heart"
    assert font.getlength(wrapped("W" * 99, font, 128)) <= 128

    image = Image.new("RGB", (64, 64), "red")
    captioned(tmp_path / "x.png", [image] * 3, ["a", text, ""], ["1", "2", "3"], columns=2)
    sheet = np.asarray(Image.open(tmp_path / "x.png"))
    red = (sheet == (255, 0, 0)).all(2)
    assert red.sum() == 3 * 128 * 128
    assert red[12, 12]
    assert red[12, 12 + 128 + 12]
    assert not red[12:140, 140:152].any()
