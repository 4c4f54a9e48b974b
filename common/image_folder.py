"""Image and caption files of a folder.

The folder may come from somebody else: nothing outside it is read, whatever its names and links
say, and no file is decoded by a format that can run programs.
"""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LONGEST = 4000  # characters of a prompt or caption; text encoders read a few hundred tokens


# ---- images --------------------------------------------------------------------------------------


def read_image(path, channels, size=None):
    """An image file as uint8 [C, h, w].

    channels: 1 (grey) or 3 (RGB). size: height and width, or one number for both; the middle of the
    image is cut to this format and resized (Lanczos). None: all of the image at its own size.
    ValueError: not an image that pillow accepts.
    """
    from PIL import Image

    with warnings.catch_warnings():
        # by default pillow only warns of a decompression bomb below twice its limit
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            # other formats run programs (EPS) or are rare
            with Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP")) as image:
                image = image.convert("L" if channels == 1 else "RGB")
        except Exception as e:  # pillow raises many types for damaged files
            raise ValueError(f"{type(e).__name__}: {e}") from None
    if size is not None:
        h, w = (size, size) if isinstance(size, int) else size
        # crop and resize in one step: a strip of 1 x 80,000,000 pixels must not be enlarged first
        image = image.resize((w, h), Image.LANCZOS, box=middle(image.width, image.height, w, h))
    pixels = np.array(image, dtype=np.uint8).reshape(image.height, image.width, channels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def middle(width, height, w, h):
    """Box (left, top, right, bottom) of the largest centred part with the aspect ratio w : h."""
    scale = min(width / w, height / h)
    box_width = max(round(scale * w), 1)
    box_height = max(round(scale * h), 1)
    left = (width - box_width) // 2
    top = (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def read_images(files, channels, size, say):
    """Readable images as a list of uint8 [C, h, w], and their places in `files`.

    say(line) names the files that are skipped because they are not readable.
    """
    images, places = [], []
    for i, path in enumerate(files):
        try:
            images.append(read_image(path, channels, size))
            places.append(i)
        except ValueError as e:
            say(f"skipped {path}: not readable as an image ({str(e)[:100]})")
    return images, places


# ---- folders -------------------------------------------------------------------------------------


def existing_folder(folder, flag="--data"):
    path = Path(folder)
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise UserError(f"{flag} {folder}: expected a folder of images, found {found}")
    return path


def image_files(folder):
    """Image files below a folder, sorted. Hidden files and folders are left out."""

    def is_hidden(path):
        return any(part.startswith(".") for part in path.relative_to(folder).parts)

    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not is_hidden(path)
    )


def check_inside(folder, path, where):
    """The path, if it lies in the folder even after its links are followed; else UserError."""
    try:
        is_plain = ".." not in path.relative_to(folder).parts
        if is_plain and path.resolve().is_relative_to(folder.resolve()):
            return path
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, a circle of links
        pass
    raise UserError(
        f"--data {folder}: {where}: expected a file in this folder, "
        f"found a way out of it: {str(path)[:100]!r}"
    )


def class_folders(folder):
    """Image files, their labels int64 [N], and the names of the classes.

    One subfolder per class, sorted by name; without subfolders the folder is one class.
    """
    folder = existing_folder(folder)
    classes = sorted(
        check_inside(folder, path, "class")
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith(".")
    )
    classes = classes or [folder]
    files, labels = [], []
    for label, class_folder in enumerate(classes):
        for path in image_files(class_folder):
            files.append(check_inside(folder, path, "image"))
            labels.append(label)
    return files, torch.tensor(labels, dtype=torch.int64), [path.name for path in classes]


# ---- captions ------------------------------------------------------------------------------------


def read_captions(folder):
    """List of (image file, caption).

    Captions stand in metadata.jsonl, in lines with file_name and text (the imagefolder format of
    Hugging Face), or in a .txt file of the same name for each image.
    """
    folder = existing_folder(folder)
    table = folder / "metadata.jsonl"
    captions = read_table(folder, table) if table.is_file() else read_text_files(folder)
    if not captions:
        suffixes = ", ".join(SUFFIXES)
        raise UserError(f"--data {folder}: expected images ({suffixes}) with captions, found none")
    return captions


def read_table(folder, table):
    captions = []
    for i, line in enumerate(read_lines(folder, table, 16 * LONGEST), 1):
        if not line.strip():
            continue
        where = f"{table}: line {i}"
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
        except (ValueError, RecursionError, TypeError, KeyError):
            name = text = None
        if not isinstance(name, str) or not isinstance(text, str):
            raise UserError(
                f"--data {where}: expected a JSON object with file_name and text, both text"
            )
        path = check_inside(folder, folder / name, f"{table.name}: line {i}")
        if not os.path.isfile(path):  # Path.is_file raises for a name that no file can have
            raise UserError(f"--data {where}: no such file: {name[:100]!r}")
        captions.append((path, clean_caption(text.encode("utf-8", "surrogatepass"), where)))
    return captions


def read_text_files(folder):
    images = [check_inside(folder, path, "image") for path in image_files(folder)]
    missing = [path for path in images if not path.with_suffix(".txt").is_file()]
    if missing:
        raise UserError(
            f"--data {folder}: expected a caption for each image, in a .txt of its name or in "
            f"metadata.jsonl, found none for {len(missing)} of {len(images)} images, "
            f"the first is {missing[0].relative_to(folder)}"
        )
    captions = []
    for image in images:
        path = image.with_suffix(".txt")
        text = b"".join(read_lines(folder, path, 4 * LONGEST, whole=True))
        captions.append((image, clean_caption(text, path)))
    return captions


def read_lines(folder, path, limit, whole=False):
    """Lines of a file, or the whole file, as bytes. A longer one than limit is never read whole."""
    check_inside(folder, path, path.name)
    try:
        with open(path, "rb") as f:
            read = f.read if whole else f.readline
            while text := read(limit + 1):
                if len(text) > limit:
                    raise UserError(
                        f"--data {path}: expected captions of at most {LONGEST} characters, "
                        f"found one of over {limit} bytes"
                    )
                yield text
    except OSError as e:
        raise UserError(f"--data {path}: {e.strerror}") from None


def clean_caption(text, where):
    """Caption from bytes: valid UTF-8, white space collapsed, not longer than LONGEST."""
    try:
        caption = " ".join(text.decode("utf-8-sig").split())
    except UnicodeError:
        raise UserError(f"--data {where}: expected UTF-8 text") from None
    if len(caption) > LONGEST:
        raise UserError(
            f"--data {where}: expected a caption of at most {LONGEST} characters, "
            f"found {len(caption)}"
        )
    return caption
