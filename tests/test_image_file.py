"""data/image_file.py: the pixels of a file are those that an image viewer shows.

Each expectation is computed from the pixels that were written, not by the reader.
"""

import io
import os
import struct
import time
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms

from data.image_file import SUFFIXES, describe_notes, fit, read_image, read_images

RAMP = np.linspace(0, 65535, 8).astype(np.uint16)[None].repeat(3, 0)  # 16 bits, 3 x 8
ROW = [0, 36, 73, 109, 146, 182, 219, 255]  # the same in 8 bits


def read(path, channels=3, **options):
    """-> pixels as ints [C, h, w], notes."""
    notes = Counter()
    return read_image(path, channels, notes=notes, **options).int(), dict(notes)


def rows(path, channels=1):
    """-> the first row of the first channel, notes. All rows and channels are the same."""
    image, notes = read(path, channels)
    assert (image == image[:1, :1]).all()
    return image[0, 0].tolist(), notes


def write_png(path, pixels, bits, kind, *chunks):
    """A PNG by hand: pillow writes no colours of 16 bits. pixels: an array of rows as stored.

    kind: 0 grey, 2 RGB, 4 grey with alpha, 6 RGBA. chunks: (name, data) before the pixels.
    """

    def chunk(name, data):
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    width = pixels[0].nbytes * 8 // (bits * channels)
    header = struct.pack(">IIBBBBB", width, len(pixels), bits, kind, 0, 0, 0)
    raw = b"".join(b"\0" + row.tobytes() for row in pixels)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


# ---- bits a channel ------------------------------------------------------------------------------

REDUCED = {"reduced from 16 bits a channel": 1}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_grey_of_16_bits(name, channels, tmp_path):
    """pillow's convert() clips at 255 instead."""
    Image.fromarray(RAMP).save(tmp_path / name)
    assert rows(tmp_path / name, channels) == (ROW, REDUCED)


def test_grey_of_16_bits_in_other_tiffs(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "packed.tif", compression="tiff_lzw")
    assert rows(tmp_path / "packed.tif") == (ROW, REDUCED)
    big = Image.frombytes("I;16B", (8, 3), RAMP.astype(">u2").tobytes())
    big.save(tmp_path / "big.tif")
    assert rows(tmp_path / "big.tif") == (ROW, REDUCED)
    Image.fromarray(RAMP).save(tmp_path / "negative.tif", tiffinfo={262: 0})  # white is zero
    assert rows(tmp_path / "negative.tif")[0] == [255 - value for value in ROW]


def test_grey_of_12_bits(tmp_path):
    """Scans and microscopes: the largest value is 4095."""
    values = np.linspace(0, 4095, 8).astype(int)
    pairs = values.reshape(4, 2)
    packed = b"".join(((a << 12) | b).to_bytes(3, "big") for a, b in pairs.tolist())
    tags = [(256, 8), (257, 1), (258, 12), (259, 1), (262, 1), (273, 200), (277, 1), (278, 1)]
    tags.append((279, len(packed)))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    header = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    (tmp_path / "x.tif").write_bytes(header.ljust(200, b"\0") + packed)
    expected = (values >> 4).tolist()
    assert rows(tmp_path / "x.tif") == (expected, {"reduced from 12 bits a channel": 1})


def test_colours_of_16_bits(tmp_path):
    color = np.stack([RAMP, RAMP[:, ::-1], RAMP // 2], -1).astype(">u2")
    write_png(tmp_path / "x.png", color, 16, 2)
    image, notes = read(tmp_path / "x.png")
    assert image[:, 0].tolist() == (color[0] >> 8).T.tolist()
    assert notes == REDUCED


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_white_are_refused(mode, tmp_path):
    dtype = np.float32 if mode == "F" else np.int32
    Image.fromarray(RAMP.astype(dtype)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="no value is agreed to be white; save as 16 bits"):
        read(tmp_path / "x.tif")


def test_fewer_bits(tmp_path):
    two = np.array([[0b00011011]] * 2, np.uint8)
    write_png(tmp_path / "two.png", two, 2, 0)
    assert rows(tmp_path / "two.png") == ([0, 85, 170, 255], {})
    bits = np.array([[0, 255, 255, 0]] * 2, np.uint8)
    for name in ("one.png", "one.tif", "one.bmp"):
        Image.fromarray(bits).convert("1").save(tmp_path / name)
        assert rows(tmp_path / name) == ([0, 255, 255, 0], {})


# ---- transparency --------------------------------------------------------------------------------

ON_WHITE = {"composited on white": 1}
GREY = np.array([[10, 60, 110, 160]] * 2, np.uint8)
ALPHA = np.array([[0, 255, 51, 255]] * 2, np.uint8)
SEEN = [255, 60, 226, 160]  # 110 * 0.2 + 255 * 0.8


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["LA.png", "RGBA.png", "RGBA.webp", "RGBA.tif", "LA.tif"])
def test_alpha_on_white(name, channels, tmp_path):
    mode = name.split(".")[0]
    colors = [GREY] if mode == "LA" else [GREY] * 3
    options = dict(lossless=True, exact=True) if name.endswith("webp") else {}
    Image.fromarray(np.stack([*colors, ALPHA], -1)).save(tmp_path / name, **options)
    assert rows(tmp_path / name, channels) == (SEEN, ON_WHITE)


def test_opaque_alpha_changes_nothing(tmp_path):
    Image.fromarray(GREY).convert("RGBA").save(tmp_path / "x.png")
    assert rows(tmp_path / "x.png") == (GREY[0].tolist(), {})


@pytest.mark.parametrize("name", ["x.png", "x.gif"])
def test_a_transparent_colour_of_a_palette(name, tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2, 1]] * 2, np.uint8), "P")
    image.putpalette([200, 0, 0, 0, 90, 0, 0, 0, 50])
    image.save(tmp_path / name)
    before, notes = read(tmp_path / name)
    assert before[:, 0].T.tolist() == [[200, 0, 0], [0, 90, 0], [0, 0, 50], [0, 90, 0]]
    assert notes == {}
    image.save(tmp_path / name, transparency=1)
    after, notes = read(tmp_path / name)
    assert after[:, 0].T.tolist() == [[200, 0, 0], [255] * 3, [0, 0, 50], [255] * 3]
    assert notes == ON_WHITE


def test_a_transparent_colour_without_a_palette(tmp_path):
    """A PNG without alpha may name one colour, in the bits of the file."""
    Image.fromarray(GREY).save(tmp_path / "grey.png", transparency=60)
    assert rows(tmp_path / "grey.png") == ([10, 255, 110, 160], ON_WHITE)
    Image.fromarray(RAMP).save(tmp_path / "grey16.png", transparency=int(RAMP[0, 3]))
    expected = ROW[:3] + [255] + ROW[4:]
    assert rows(tmp_path / "grey16.png") == (expected, REDUCED | ON_WHITE)
    color = np.stack([RAMP] * 3, -1).astype(">u2")
    write_png(tmp_path / "rgb16.png", color, 16, 2, (b"tRNS", color[0, 3].tobytes()))
    assert rows(tmp_path / "rgb16.png") == (expected, REDUCED | ON_WHITE)
    two = np.array([[0b00011011]] * 2, np.uint8)
    write_png(tmp_path / "two.png", two, 2, 0, (b"tRNS", struct.pack(">H", 1)))
    assert rows(tmp_path / "two.png") == ([0, 255, 170, 255], ON_WHITE)


# ---- orientation ---------------------------------------------------------------------------------

ARROW = np.array([[255, 255, 255, 255], [255, 0, 0, 0], [0, 0, 0, 0]], np.uint8)
TURNED = {  # what the stored pixels have to go through (EXIF 2.3, tag 0x0112)
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: a.T[:, ::-1],
    7: lambda a: a.T[::-1, ::-1],
    8: lambda a: a.T[::-1],
    9: lambda a: a,  # no such value
}


def write_turned(path, pixels, orientation, **options):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **options)


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tif", "x.avif"])
def test_orientation(name, orientation, tmp_path):
    if not name.endswith(SUFFIXES):
        pytest.skip("this pillow has no AVIF")
    big = ARROW.repeat(16, 0).repeat(16, 1)  # blocks of JPEG
    write_turned(tmp_path / name, big, orientation, quality=95)
    expected = torch.tensor(TURNED[orientation](ARROW).copy())
    image, notes = read(tmp_path / name, 1)
    assert image.shape[1:] == (16 * expected.shape[0], 16 * expected.shape[1])
    assert (image[0, 8::16, 8::16] - expected).abs().max() < 9
    assert notes == ({"turned by EXIF orientation": 1} if 1 < orientation < 9 else {})


def test_orientation_comes_before_the_crop(tmp_path):
    """The middle of a portrait that is stored as a landscape."""
    stored = np.zeros((8, 24), np.uint8)
    stored[:, 8:16] = 200
    write_turned(tmp_path / "x.png", stored, 6)
    image, _ = read(tmp_path / "x.png", 1, size=(16, 8))
    assert (image[0, 4:12] == 200).all()
    assert (image[0, [0, 1, 2, 3, -4, -3, -2, -1]] == 0).all()


def test_orientation_of_grey_with_16_bits(tmp_path):
    write_turned(tmp_path / "x.png", RAMP, 2)
    assert rows(tmp_path / "x.png")[0] == ROW[::-1]


def test_exif_behind_the_pixels(tmp_path):
    write_turned(tmp_path / "x.png", GREY, 2)
    raw = (tmp_path / "x.png").read_bytes()
    start = raw.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(raw[start : start + 4], "big")
    tail = raw.index(b"IEND") - 4
    (tmp_path / "x.png").write_bytes(raw[:start] + raw[end:tail] + raw[start:end] + raw[tail:])
    assert rows(tmp_path / "x.png")[0] == GREY[0, ::-1].tolist()


def test_damaged_exif(tmp_path):
    """The image is shown as it is stored."""
    Image.fromarray(GREY).save(tmp_path / "x.png", exif=b"Exif\0\0nonsense")
    row, notes = rows(tmp_path / "x.png")
    assert row == GREY[0].tolist()
    assert notes == {"with damaged EXIF, not turned": 1}


# ---- colours -------------------------------------------------------------------------------------


def profile(kind, **xy):
    """An ICC profile of display colours: gamma 2.2 with these primaries, (x, y) of the CIE."""
    body = {"wtpt": xyz(0.9642, 1.0, 0.8249)}
    if kind == "GRAY":
        body["kTRC"] = gamma(2.2 if not xy else xy["gamma"])
    else:
        for channel, values in xy.items():
            body[f"{channel}XYZ"] = xyz(*values)
            body[f"{channel}TRC"] = gamma(2.2)
    offset, table, data = 132 + 12 * len(body), b"", b""
    for name, value in body.items():
        table += name.encode() + struct.pack(">II", offset + len(data), len(value))
        data += value
    size = offset + len(data)
    header = struct.pack(">I4xI4s4s4s", size, 0x02400000, b"mntr", kind.encode(), b"XYZ ")
    header = header.ljust(36, b"\0") + b"acsp" + bytes(28) + xyz(0.9642, 1.0, 0.8249)[8:]
    return header.ljust(128, b"\0") + struct.pack(">I", len(body)) + table + data


def xyz(*values):
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def gamma(value):
    return b"curv\0\0\0\0" + struct.pack(">IH2x", 1, round(value * 256))


# Columns of Adobe RGB (1998), adapted to D50
ADOBE = profile(
    "RGB ",
    r=(0.60974, 0.31111, 0.01947),
    g=(0.20528, 0.62567, 0.06087),
    b=(0.14919, 0.06322, 0.74457),
)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
BY_PROFILE = {"converted to sRGB by its colour profile": 1}


def adobe_to_srgb(color):
    """By hand, with the matrix of Adobe RGB to linear sRGB (both of D65)."""
    linear = (np.array(color) / 255) ** 2.2
    matrix = [[1.39836, -0.39836, 0], [0, 1, 0], [0, -0.04293, 1.04293]]
    out = np.clip(matrix @ linear, 0, 1)
    out = np.where(out <= 0.0031308, 12.92 * out, 1.055 * out ** (1 / 2.4) - 0.055)
    return out * 255


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.tif"])
def test_a_wider_colour_space(name, tmp_path):
    color = (150, 100, 60)
    Image.new("RGB", (16, 16), color).save(tmp_path / name, icc_profile=ADOBE, quality=100)
    image, notes = read(tmp_path / name)
    expected = adobe_to_srgb(color)
    assert np.abs(image[:, 8, 8].numpy() - expected).max() < 3
    assert np.abs(np.array(color) - expected).max() > 10  # it makes a difference
    assert notes == BY_PROFILE


@pytest.mark.parametrize("icc", [SRGB, None])
def test_srgb_is_left_as_it_is(icc, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png", icc_profile=icc)
    image, notes = read(tmp_path / "x.png")
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1).int())
    assert notes == {}


def test_grey_with_a_profile(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "x.png", icc_profile=profile("GRAY", gamma=1.0))
    row, notes = rows(tmp_path / "x.png")
    linear = GREY[0] / 255
    assert np.abs(np.array(row) - 255 * (1.055 * linear ** (1 / 2.4) - 0.055)).max() < 3
    assert notes == BY_PROFILE


def test_profile_and_alpha(tmp_path):
    pixels = np.full((2, 2, 4), 255, np.uint8)
    pixels[..., :3] = (150, 100, 60)
    pixels[0, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "x.png", icc_profile=ADOBE)
    image, notes = read(tmp_path / "x.png")
    assert (image[:, 0] == 255).all()
    assert np.abs(image[:, 1, 0].numpy() - adobe_to_srgb((150, 100, 60))).max() < 3
    assert notes == BY_PROFILE | ON_WHITE


@pytest.mark.parametrize("icc", [b"nonsense" * 30, ADOBE])
def test_a_profile_that_is_not_usable(icc, tmp_path):
    """Damaged, or of colours in a grey image."""
    Image.fromarray(GREY).save(tmp_path / "x.png", icc_profile=icc)
    row, notes = rows(tmp_path / "x.png")
    assert row == GREY[0].tolist()
    assert notes == {"with a colour profile that is not usable, ignored": 1}


@pytest.mark.parametrize("name", ["x.jpg", "x.tif"])
def test_cmyk(name, tmp_path):
    """Ink: magenta takes away green, black all."""
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:, :8] = (0, 255, 0, 0)
    inks[:, 8:] = (0, 0, 0, 255)
    Image.fromarray(inks, "CMYK").save(tmp_path / name, quality=100)
    image, notes = read(tmp_path / name)
    assert (image[:, 8, 3] - torch.tensor([255, 0, 255])).abs().max() < 4
    assert image[:, 8, 12].max() < 4
    assert notes == {"converted from CMYK": 1}


def test_other_colour_models(tmp_path):
    Image.new("RGB", (4, 4), (100, 100, 100)).save(tmp_path / "y.tif", compression="jpeg")
    assert rows(tmp_path / "y.tif") == ([100] * 4, {})  # stored as YCbCr
    Image.new("LAB", (4, 4), (128, 128, 128)).save(tmp_path / "lab.tif")  # L* 50: grey 119
    row, notes = rows(tmp_path / "lab.tif", 3)
    assert max(abs(value - 119) for value in row) < 2
    assert notes["converted from LAB"] == 1


# ---- several frames, files that are no images ----------------------------------------------------


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_the_first_frame(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    frames = [Image.new("RGB", (4, 4), (level, 0, 0)) for level in (200, 100, 50)]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    image, notes = read(path)
    assert image[0].unique().tolist() == [200]
    assert notes == {"first of several frames": 1}


def test_further_views_of_a_photograph_are_no_animation(tmp_path):
    """MPO: a JPEG with a second picture behind it, as telephones write."""
    image = Image.new("RGB", (16, 16), (9, 9, 9))
    image.save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[image])
    with Image.open(tmp_path / "x.jpg") as opened:
        assert opened.format == "MPO"
    assert read(tmp_path / "x.jpg")[1] == {}


def test_the_content_decides_and_not_the_suffix(tmp_path):
    data = io.BytesIO()
    Image.fromarray(GREY).save(data, "GIF")
    (tmp_path / "x.jpg").write_bytes(data.getvalue())
    assert rows(tmp_path / "x.jpg")[0] == GREY[0].tolist()


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix != ".jfif"])
def test_truncated_files_are_refused(suffix, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"x{suffix}"
    Image.fromarray(noise).save(path)
    read(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(ValueError):
        read(path)


def test_pipes_and_folders_are_not_opened(tmp_path):
    """Opening a pipe would wait for ever."""
    os.mkfifo(tmp_path / "x.png")
    (tmp_path / "y.png").mkdir()
    (tmp_path / "z.png").symlink_to(tmp_path / "none")
    for name in ("x.png", "y.png", "z.png"):
        with pytest.raises(ValueError, match="not a file"):
            read(tmp_path / name)


def test_the_limit_is_named(tmp_path, monkeypatch):
    Image.new("L", (40, 30)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="over 1,000 pixels, the limit of pillow"):
        read(tmp_path / "x.png")


def test_a_refused_image_adds_no_notes(tmp_path):
    write_turned(tmp_path / "a.png", RAMP, 2)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:-60])
    notes, lines = Counter(), []
    images, places = read_images(
        [tmp_path / "b.png", tmp_path / "a.png"], 1, 8, lines.append, notes
    )
    assert places == [1]
    assert len(images) == len(lines) == 1
    assert "b.png" in lines[0]
    assert notes["turned by EXIF orientation"] == 1
    assert describe_notes(Counter(a=2, b=0, c=1)) == "; a: 2, c: 1"
    assert describe_notes(Counter()) == ""


# ---- as stored -----------------------------------------------------------------------------------


def test_as_stored(tmp_path):
    """What pytorch-fid reads: nothing is turned, converted or put on white."""
    pixels = np.stack([GREY, GREY, GREY, ALPHA], -1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 2
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif, icc_profile=ADOBE)
    image, notes = read(tmp_path / "x.png", as_stored=True)
    with Image.open(tmp_path / "x.png") as opened:
        expected = np.array(opened.convert("RGB"))
    assert torch.equal(image, torch.from_numpy(expected).permute(2, 0, 1).int())
    assert image[0, 0].tolist() == GREY[0].tolist()
    assert notes == {}
    Image.fromarray(RAMP).save(tmp_path / "y.png")
    with pytest.raises(ValueError, match="would clip at 255"):
        read(tmp_path / "y.png", as_stored=True)


# ---- size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, notes",
    [
        ((8, 16), {}),
        ((8, 8), {"cropped to the middle": 1}),
        ((4, 8), {"reduced to 4 x 8 (Lanczos)": 1}),
        ((16, 16), {"cropped to the middle": 1, "enlarged to 16 x 16 (Lanczos)": 1}),
    ],
)
def test_a_change_of_size_is_counted(size, notes):
    found = Counter()
    image = fit(Image.new("L", (16, 8)), *size, found)
    assert (image.height, image.width) == size
    assert dict(found) == notes


def test_a_long_strip_is_not_enlarged(tmp_path):
    """1 x 3,000,000 pixels: enlarged to a width of 256 before the crop it would take 190 GB."""
    Image.new("L", (1, 3_000_000), 99).save(tmp_path / "strip.png")
    start = time.time()
    image = read_image(tmp_path / "strip.png", 1, 256)
    assert image.shape == (1, 256, 256)
    assert (image == 99).all()
    assert time.time() - start < 5


def test_without_a_size_the_pixels_are_those_of_the_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png", 3)
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))


def test_the_central_square_is_taken(tmp_path):
    a = np.zeros((10, 30), np.uint8)
    a[:, 10:20] = 255
    Image.fromarray(a).save(tmp_path / "x.png")
    assert (read_image(tmp_path / "x.png", 1, 10) == 255).all()  # same size: no resampling
    assert (read_image(tmp_path / "x.png", 1, 5) > 235).all()  # Lanczos reaches over the border
    Image.fromarray(a.T.copy()).save(tmp_path / "x.png")
    assert (read_image(tmp_path / "x.png", 1, 20) > 195).all()


def test_other_aspect_ratios(tmp_path):
    """The middle in the format of `size`: 20 x 10 or 5 x 10 pixels of 40 x 10."""
    a = np.full((10, 40), 7, np.uint8)
    a[:, 10:30] = np.where(np.arange(20) < 10, 60, 200)
    path = tmp_path / "x.png"
    Image.fromarray(a).save(path)
    wide = read_image(path, 1, (10, 20))
    assert wide.shape == (1, 10, 20)
    assert wide[0, 0].tolist() == [60] * 10 + [200] * 10
    high = read_image(path, 3, (20, 10))
    assert high.shape == (3, 20, 10)
    assert high.min() > 40
    assert high[0, 9, :3].float().mean() < 80
    assert high[0, 9, -3:].float().mean() > 180
    Image.fromarray(a.T.copy()).save(path)
    assert torch.equal(read_image(path, 1, (20, 10)), wide.transpose(1, 2))
