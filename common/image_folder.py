"""Image and caption files of a folder."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


LONGEST = 4000  # characters of a prompt or caption; text encoders read a few hundred tokens


def read_image(path, channels, size):
    """uint8 [C, h, w], the middle of the image, cut to the format and resized (Lanczos). size: h and w in one, or both. ValueError if the file is no image
    that pillow accepts."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", Image.DecompressionBombWarning
        )  # a bomb is refused, not warned about
        try:
            with Image.open(
                path, formats=("PNG", "JPEG", "WEBP", "BMP")
            ) as img:  # others run programs (EPS) or are rare
                img = img.convert("L" if channels == 1 else "RGB")
        except Exception as e:  # pillow's readers raise many kinds for a damaged file
            raise ValueError(f"{type(e).__name__}: {e}") from None
    h, w = (size, size) if isinstance(size, int) else size
    side = min(
        img.width / w, img.height / h
    )  # cropped before it is resized: a strip of 1 x 80,000,000 pixels must not be enlarged
    width, height = max(round(side * w), 1), max(round(side * h), 1)
    left, top = (img.width - width) // 2, (img.height - height) // 2
    a = np.array(
        img.resize((w, h), Image.LANCZOS, box=(left, top, left + width, top + height)),
        dtype=np.uint8,
    )
    return torch.from_numpy(a.reshape(h, w, channels)).permute(2, 0, 1)


def class_folders(folder):
    """-> image files, their labels (int64), names of the classes."""
    folder = existing(folder)
    inside = contained(folder)
    classes = sorted(
        inside(d, "class") for d in folder.iterdir() if d.is_dir() and not d.name.startswith(".")
    ) or [folder]
    found = [
        (inside(path, "image"), label)
        for label, sub in enumerate(classes)
        for path in image_files(sub)
    ]
    return (
        [path for path, _ in found],
        torch.tensor([label for _, label in found], dtype=torch.int64),
        [c.name for c in classes],
    )


def contained(folder):
    """A function of (path, where): the path, if it lies in the folder also when its links are followed; else UserError. The folder may be somebody else's."""
    home = folder.resolve()

    def inside(path, where):
        try:
            if ".." not in path.relative_to(folder).parts and path.resolve().is_relative_to(home):
                return path
        except (
            OSError,
            ValueError,
            RuntimeError,
        ):  # a name that no file can have, a circle of links
            pass
        raise UserError(
            f"--data {folder}: {where}: expected a file in this folder, found a way out of it: {str(path)[:100]!r}"
        )

    return inside


def existing(folder):
    if not Path(folder).is_dir():
        raise UserError(
            f"--data {folder}: expected a folder of images, found {'a file' if Path(folder).exists() else 'nothing'}"
        )
    return Path(folder)


def image_files(folder):
    hidden = lambda p: any(part.startswith(".") for part in p.relative_to(folder).parts)
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not hidden(p))


def read_images(files, channels, size, say):
    """-> list of uint8 [C, h, w], their numbers among `files`. Unreadable ones are named and left out."""
    images, kept = [], []
    for i, path in enumerate(files):
        try:
            images.append(read_image(path, channels, size))
            kept.append(i)
        except ValueError as e:
            say(f"skipped {path}: not readable as an image ({str(e)[:100]})")
    return images, kept


def read_captions(folder):
    """-> list of (image file, caption): lines of metadata.jsonl (file_name, text: the imagefolder format of Hugging Face), or each image with its same-name
    .txt. The folder may be somebody else's: nothing outside of it is read, whatever its names and links say."""
    folder = existing(folder)
    inside = contained(folder)

    def pieces(path, limit, read):
        """What f.read or f.readline gives until the end, none of it above limit bytes."""
        try:
            with open(inside(path, path.name), "rb") as f:
                while piece := getattr(f, read)(limit + 1):
                    if len(piece) > limit:
                        raise UserError(
                            f"--data {path}: expected captions of at most {LONGEST} characters, found one of over {limit} bytes"
                        )
                    yield piece
        except OSError as e:
            raise UserError(f"--data {path}: {e.strerror}") from None

    def caption(text, where):
        try:
            text = " ".join(
                (
                    text.decode("utf-8-sig") if isinstance(text, bytes) else text.encode().decode()
                ).split()
            )
        except UnicodeError:
            raise UserError(f"--data {where}: expected UTF-8 text") from None
        if len(text) > LONGEST:
            raise UserError(
                f"--data {where}: expected a caption of at most {LONGEST} characters, found {len(text)}"
            )
        return text

    found, table = [], folder / "metadata.jsonl"
    if table.is_file():
        for i, line in enumerate(pieces(table, 16 * LONGEST, "readline"), 1):
            if not line.strip():
                continue
            where = f"{table}: line {i}"
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
            if (
                not isinstance(entry, dict)
                or not isinstance(entry.get("file_name"), str)
                or not isinstance(entry.get("text"), str)
            ):
                raise UserError(
                    f"--data {where}: expected a JSON object with file_name and text, both text"
                )
            path = inside(folder / entry["file_name"], f"{table.name}: line {i}")
            if not os.path.isfile(
                path
            ):  # unlike Path.is_file, False also for a name that no file can have
                raise UserError(f"--data {where}: no such file: {entry['file_name'][:100]!r}")
            found.append((path, caption(entry["text"], where)))
    else:
        files = [inside(p, "image") for p in image_files(folder)]
        if lonely := [p for p in files if not p.with_suffix(".txt").is_file()]:
            raise UserError(
                f"--data {folder}: expected a caption for each image, in a .txt of its name or in metadata.jsonl, found none for {len(lonely)} of "
                f"{len(files)} images, the first is {lonely[0].relative_to(folder)}"
            )
        found = [
            (
                p,
                caption(
                    b"".join(pieces(p.with_suffix(".txt"), 4 * LONGEST, "read")),
                    p.with_suffix(".txt"),
                ),
            )
            for p in files
        ]
    if not found:
        raise UserError(
            f"--data {folder}: expected images ({', '.join(SUFFIXES)}) with captions, found none"
        )
    return found
