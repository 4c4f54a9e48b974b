"""One image file as 8-bit pixels, as an image viewer shows it.

Turned by its EXIF orientation, 16 bits a channel reduced to 8, colours converted to sRGB by the
profile in the file, transparency on white. Files whose look is not defined are refused. What was
converted is counted, so that a run can say it (docs/data.md).
"""

import functools
import io
import os
import warnings
from collections import Counter

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, features

READER = 2  # grows when a file is read differently, so that caches of the old pixels do not count

# Decoders that run no programs (EPS does). AVIF comes with pillow 11.3.
FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"]
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
if "avif" in features.modules and features.check_module("avif"):
    FORMATS += ["AVIF"]
    SUFFIXES += (".avif",)

# Files that may hold images and are not read: counted, so that nobody misses them.
NOT_READ = {".avif", ".heic", ".heif", ".jxl", ".jp2", ".exr", ".hdr", ".svg", ".psd", ".tga"}
NOT_READ |= {".ppm", ".pgm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".ico", ".pdf"}
NOT_READ |= {".zip", ".tar", ".gz", ".parquet", ".arrow", ".tfrecord", ".npy", ".npz", ".mp4"}
NOT_READ -= set(SUFFIXES)


def read_image(path, channels, size=None, notes=None, as_stored=False):
    """An image file as uint8 [C, h, w].

    channels: 1 (grey) or 3 (RGB). size: height and width, or one number for both; the middle of the
    image is cut to this format and resized (Lanczos). None: all of the image at its own size.
    notes: Counter to which each conversion adds 1 (`describe_notes`).
    as_stored: pillow's convert() of the stored pixels and nothing else, which is what pytorch-fid
    and clean-fid read.
    ValueError: not an image that pillow accepts, or one whose look is not defined.
    """
    notes = Counter() if notes is None else notes
    found = Counter()
    if not os.path.isfile(path):  # a folder, a pipe, a broken link
        raise ValueError("not a file")
    with warnings.catch_warnings():
        # by default pillow only warns of a decompression bomb below twice its limit
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            # not by name: pillow would map an uncompressed TIFF into memory, and mixes up the rows
            # of one whose orientation swaps height and width
            with open(path, "rb") as f, Image.open(f, formats=FORMATS) as image:
                image = stored_pixels(image) if as_stored else as_shown(image, found)
                mode = "L" if channels == 1 else "RGB"
                if image.mode != mode:  # convert() copies also where there is nothing to do
                    image = image.convert(mode)
                image.load()
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            limit = f"{Image.MAX_IMAGE_PIXELS:,}"
            raise ValueError(f"over {limit} pixels, the limit of pillow; reduce it") from None
        except Exception as e:  # pillow raises many types for damaged files
            raise ValueError(f"{type(e).__name__}: {e}") from None
    if size is not None:
        image = fit(image, *((size, size) if isinstance(size, int) else size), found)
    notes.update(found)
    pixels = np.array(image, dtype=np.uint8).reshape(image.height, image.width, channels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_images(files, channels, size, say, notes=None):
    """Readable images as a list of uint8 [C, h, w], and their places in `files`.

    say(line) names the files that are skipped because they are not readable.
    """
    images, places = [], []
    for i, path in enumerate(files):
        try:
            images.append(read_image(path, channels, size, notes))
            places.append(i)
        except ValueError as e:
            say(f"skipped {path}: not readable as an image ({str(e)[:100]})")
    return images, places


def describe_notes(notes):
    """'; turned by EXIF orientation: 2, composited on white: 1', or ''."""
    parts = [f"{what}: {n}" for what, n in notes.items() if n]
    return "; " + ", ".join(parts) if parts else ""


# ---- size ----------------------------------------------------------------------------------------


def fit(image, h, w, notes):
    """The middle of an image, in the format w : h, resized to w x h pixels."""
    box = middle(image.width, image.height, w, h)
    width, height = box[2] - box[0], box[3] - box[1]
    if (width, height) != image.size:
        notes["cropped to the middle"] += 1
    if (width, height) != (w, h):
        change = "enlarged" if width < w else "reduced"
        notes[f"{change} to {h} x {w} (Lanczos)"] += 1
    # crop and resize in one step: a strip of 1 x 80,000,000 pixels must not be enlarged first
    return image.resize((w, h), Image.LANCZOS, box=box)


def middle(width, height, w, h):
    """Box (left, top, right, bottom) of the largest centred part with the aspect ratio w : h."""
    scale = min(width / w, height / h)
    box_width = max(round(scale * w), 1)
    box_height = max(round(scale * h), 1)
    left = (width - box_width) // 2
    top = (height - box_height) // 2
    return left, top, left + box_width, top + box_height


# ---- look ----------------------------------------------------------------------------------------


def stored_pixels(image):
    if image.mode.startswith(("I", "F")):
        raise ValueError("16 or more bits of grey, which convert() would clip at 255")
    return image


def as_shown(image, notes):
    """Pillow image of mode L or RGB, sRGB, from an opened file."""
    if image.format == "TIFF" and image.mode in ("I", "F"):
        raise ValueError("32-bit, float or signed: no value is agreed to be white; save as 16 bits")
    # The opened file knows these, a decoded or turned image does not
    bits = bits_a_channel(image)
    profile = image.info.get("icc_profile")
    white_is_zero = image.format == "TIFF" and image.tag_v2.get(262) == 0
    if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a JPEG's extra views
        notes["first of several frames"] += 1

    image = turn(image, notes)
    if bits > 8:
        notes[f"reduced from {bits} bits a channel"] += 1
    image, alpha = split_alpha(image, bits)
    if image.mode.startswith("I"):
        image = grey_8_bits(image, bits, white_is_zero)
    image = to_srgb(image, profile, notes)
    if alpha is not None:
        notes["composited on white"] += 1
        shown = Image.new(image.mode, image.size, "white")
        shown.paste(image, mask=alpha)
        image = shown
    return image


def bits_a_channel(image):
    """2, 4, 8, 12 or 16, from pillow's name of the stored layout, such as "RGB;16B"."""
    if image.format in ("PNG", "TIFF"):
        layout = str([tile[3] for tile in image.tile])
        for bits in (16, 12, 4, 2):
            if f";{bits}" in layout:
                return bits
    return 8


def turn(image, notes):
    """The decoded image as its EXIF orientation says: mirrored or turned by quarters."""
    if image.format != "TIFF":
        image.load()  # PNG may have its EXIF behind the pixels
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # pillow raises many types for damaged metadata, and viewers show the image
        notes["with damaged EXIF, not turned"] += 1
        return image
    if orientation in range(2, 9):
        notes["turned by EXIF orientation"] += 1
        image = ImageOps.exif_transpose(image)  # pillow turns a TIFF while it decodes
    return image


def split_alpha(image, bits):
    """-> image without transparency, mask of mode L or None if every pixel is opaque."""
    key = image.info.get("transparency")  # of PNG without alpha: the colour that is transparent
    if key is not None and image.mode.startswith("I"):
        opaque = np.asarray(image) != key
        alpha = Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8))
    elif image.has_transparency_data:
        # pillow brings the pixels to 8 bits, but not the key
        if bits == 16 and isinstance(key, tuple):
            image.info["transparency"] = tuple(value >> 8 for value in key)
        if bits < 8 and image.mode == "L":
            image.info["transparency"] = key * 255 // (2**bits - 1)
        is_grey = image.mode in ("1", "L", "LA", "La")
        with_alpha = image.convert("LA" if is_grey else "RGBA")
        alpha = with_alpha.getchannel("A")
        image = with_alpha.convert("L" if is_grey else "RGB")  # drops alpha
    else:
        return image, None
    return image, alpha if alpha.getextrema()[0] < 255 else None


def grey_8_bits(image, bits, white_is_zero):
    """Grey of 12 or 16 bits as mode L: the high byte, as pillow reduces colours of 16 bits."""
    grey = (np.asarray(image).astype(np.int64) >> (bits - 8)).astype(np.uint8)
    return Image.fromarray(255 - grey if white_is_zero else grey)


# ---- colour --------------------------------------------------------------------------------------


def to_srgb(image, profile, notes):
    """Image of mode L or RGB in sRGB. profile: bytes of the file's ICC profile, or None."""
    if image.mode not in ("L", "RGB", "CMYK", "LAB"):  # 1, P, YCbCr
        image = image.convert("RGB")
    if image.mode in ("CMYK", "LAB"):
        notes[f"converted from {image.mode}"] += 1
    if profile or image.mode == "LAB":
        try:
            transform = srgb_transform(profile, image.mode)
        except (ImageCms.PyCMSError, ImportError):  # damaged, of other channels, no LittleCMS
            notes["with a colour profile that is not usable, ignored"] += 1
        else:
            if transform is not None:
                notes["converted to sRGB by its colour profile"] += 1
                image = ImageCms.applyTransform(image, transform)
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


@functools.lru_cache(maxsize=64)
def srgb_transform(profile, mode):
    """Transform from a profile (bytes) to sRGB, mode RGB; None if it would change next to nothing.

    PyCMSError: a damaged profile, or one for other channels than `mode`.
    """
    source = io.BytesIO(profile) if mode != "LAB" else ImageCms.createProfile("LAB")
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode in ("L", "RGB"):
        # sRGB has many profiles under many names, so its effect on 16 levels a channel decides
        levels = np.arange(0, 256, 17, dtype=np.uint8)
        if mode == "RGB":
            colors = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(16, -1, 3)
        else:
            colors = levels[None]
        before = Image.fromarray(colors)
        after = ImageCms.applyTransform(before, transform)
        change = np.asarray(after).astype(int) - np.asarray(before.convert("RGB"))
        if np.abs(change).max() <= 2:
            return None
    return transform
