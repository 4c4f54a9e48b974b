"""Image and caption files of a folder.

The folder may come from somebody else: no file is decoded by a format that can run programs, and
names with ".." or of other places are refused. Links are followed, since a folder of links is the
usual way to make a subset; they are counted and said. See docs/data.md.
"""

import json
import os
from collections import Counter
from pathlib import Path

from common.errors import UserError
from data.image_file import NOT_READ, SUFFIXES

LONGEST = 4000  # characters of a prompt or caption; text encoders read a few hundred tokens

# Folders of operating systems and tools, beside those whose names begin with a dot
JUNK = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information"}


# ---- folders -------------------------------------------------------------------------------------


def existing_folder(folder, flag="--data"):
    path = Path(folder)
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise UserError(f"{flag} {folder}: expected a folder of images, found {found}")
    return path


def is_junk(name):
    """True for hidden files and folders (._x.png, .thumbnails), and for those in JUNK."""
    return name.startswith(".") or name.lower() in JUNK


def image_files(folder, notes=None, root=None):
    """Image files below a folder, sorted. Junk is left out, links to folders are not followed.

    notes, root: see `is_image`; root is the folder itself if it is None.
    """
    notes = Counter() if notes is None else notes
    root = root or trusted_root(folder)
    return sorted(
        path
        for path in folder.rglob("*")
        if not any(is_junk(part) for part in path.relative_to(folder).parts)
        and is_image(path, notes, root)
    )


def is_image(path, notes, root):
    """True for the name of an image file.

    notes: Counter of what should be said: formats that are not read, and links to folders or to
    files outside of `root`.
    """
    suffix = path.suffix.lower()
    if suffix in NOT_READ:
        notes[f"left out ({suffix} is not read)"] += 1
    if suffix not in SUFFIXES:
        if path.is_symlink() and path.is_dir():
            notes["links to folders left out"] += 1
        return False
    if path.is_symlink() and not is_inside(path, root):
        notes["links to other folders"] += 1
    return True


def trusted_root(folder):
    """Where links may lead without being counted: the folder; in the hub's cache, the repository.

    The cache keeps files in REPOSITORY/blobs and links to them in REPOSITORY/snapshots/REVISION.
    """
    folder = folder.resolve()
    for parent in (folder, *folder.parents):
        if parent.name == "snapshots":
            return parent.parent
    return folder


def is_inside(path, root):
    """True if a path lies in the folder `root` after all links. root: without links in it."""
    try:
        return path.resolve().is_relative_to(root)
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, a circle of links
        return False


# ---- captions ------------------------------------------------------------------------------------


def read_captions(folder):
    """List of (image file, its captions: list of str, at least one).

    Captions stand in metadata.jsonl, in lines with file_name and text (the imagefolder format of
    Hugging Face), or in a .txt file of the same name for each image. An image may have several: a
    list as text, or one a line in the .txt.
    """
    folder = existing_folder(folder)
    table = folder / "metadata.jsonl"
    captions = read_metadata(folder, table) if table.is_file() else read_text_files(folder)
    if not captions:
        suffixes = ", ".join(SUFFIXES)
        raise UserError(f"--data {folder}: expected images ({suffixes}) with captions, found none")
    return captions


def read_metadata(folder, table):
    captions = []
    for i, line in enumerate(read_lines(folder, table, 16 * LONGEST), 1):
        if not line.strip():
            continue
        where = f"{table}: line {i}"
        name, texts = parse_entry(line, where)
        path = folder / name
        try:
            is_below = ".." not in path.relative_to(folder).parts
        except ValueError:  # an absolute path
            is_below = False
        if not is_below:
            raise UserError(
                f"--data {where}: expected a file in this folder, "
                f"found a way out of it: {name[:100]!r}"
            )
        if not os.path.isfile(path):  # Path.is_file raises for a name that no file can have
            raise UserError(f"--data {where}: no such file: {name[:100]!r}")
        texts = [clean_caption(text.encode("utf-8", "surrogatepass"), where) for text in texts]
        captions.append((path, texts))
    return captions


def parse_entry(line, where):
    """file_name (str) and text (list of str) of a line of metadata.jsonl."""
    try:
        entry = json.loads(line)
        name, texts = entry["file_name"], entry["text"]
    except (ValueError, RecursionError, TypeError, KeyError):
        name = texts = None
    if isinstance(texts, str):
        texts = [texts]
    are_texts = isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)
    if not isinstance(name, str) or not are_texts:
        raise UserError(
            f"--data {where}: expected a JSON object with file_name and text, both text "
            "(or a list of texts)"
        )
    return name, texts


def read_text_files(folder):
    images = image_files(folder)
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
        lines = [line for line in text.splitlines() if line.strip()] or [b""]
        captions.append((image, [clean_caption(line, path) for line in lines]))
    return captions


def read_lines(folder, path, limit, whole=False):
    """Lines of a file, or the whole file, as bytes. A longer one than limit is never read whole."""
    # A link in somebody's folder must not make a caption of any file of this machine
    target = path.resolve()
    if target.suffix != path.suffix and not is_inside(path, trusted_root(folder)):
        raise UserError(
            f"--data {path}: expected a file in this folder or a link to a {path.suffix} file, "
            f"found a link to {str(target)[:100]!r}"
        )
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
