"""Image and caption files of a folder.

The folder may come from somebody else: no file is decoded by a format that can run programs, and
names with ".." or of other places are refused. Links are followed, since a folder of links is the
usual way to make a subset; they are counted and said. See docs/data.md.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError
from data.image_file import NOT_READ, SUFFIXES

LONGEST = 4000  # characters of a prompt or caption; text encoders read a few hundred tokens

# Columns of metadata.jsonl for teachers that take an image: the usual names of edit data sets. Of
# several that a line has, the first counts.
SOURCES = ("source_file_name", "input_file_name", "source_image", "input_image")
SOURCES += ("original_image", "edit_image")
TARGETS = ("file_name", "target_file_name", "output_file_name", "edited_image", "image")
TEXTS = ("text", "edit_prompt", "prompt", "caption")

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
    for where, entry in read_entries(folder, table):
        name, texts = entry.get("file_name"), list_of_texts(entry.get("text"))
        if not isinstance(name, str) or not texts:
            raise UserError(
                f"--data {where}: expected a JSON object with file_name and text, both text "
                "(or a list of texts)"
            )
        captions.append((file_below(folder, name, where), clean_captions(texts, where)))
    return captions


def read_entries(folder, table):
    """Yields (where, object) of the lines of metadata.jsonl; {} for a line that is no object."""
    for i, line in enumerate(read_lines(folder, table, 16 * LONGEST), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        yield f"{table}: line {i}", entry if isinstance(entry, dict) else {}


def list_of_texts(value):
    """A text or a list of texts -> list of str; [] for anything else."""
    texts = [value] if isinstance(value, str) else value
    are_texts = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    return texts if are_texts else []


def file_below(folder, name, where):
    """Path of a file that a line of metadata.jsonl names."""
    path = folder / name
    try:
        is_below = ".." not in path.relative_to(folder).parts
    except ValueError:  # an absolute path
        is_below = False
    if not is_below:
        raise UserError(
            f"--data {where}: expected a file in this folder, found a way out of it: {name[:100]!r}"
        )
    if not os.path.isfile(path):  # Path.is_file raises for a name that no file can have
        raise UserError(f"--data {where}: no such file: {name[:100]!r}")
    return path


def clean_captions(texts, where):
    return [clean_caption(text.encode("utf-8", "surrogatepass"), where) for text in texts]


class Edit(NamedTuple):
    """A line of metadata.jsonl for a teacher that takes an image."""

    source: Path  # the image that the teacher is given
    texts: list  # of str, at least one: what is to be done with it
    target: Path | None  # what comes out; None: not known


def read_edits(folder):
    """Edits of a folder, from its metadata.jsonl: a column of SOURCES, one of TEXTS and, if the
    result is known, one of TARGETS."""
    folder = existing_folder(folder)
    table = folder / "metadata.jsonl"
    if not table.is_file():
        raise UserError(
            f"--data {folder}: expected metadata.jsonl, whose lines name source image and text, "
            "found none (docs/data.md)"
        )
    edits = []
    for where, entry in read_entries(folder, table):
        source, target, texts = (column(entry, names) for names in (SOURCES, TARGETS, TEXTS))
        texts = list_of_texts(texts)
        if not isinstance(source, str) or not texts or not isinstance(target, str | None):
            raise UserError(
                f"--data {where}: expected a JSON object with the source image "
                f"({', '.join(SOURCES)}), a text ({', '.join(TEXTS)}) and, where it is known, the "
                f"result ({', '.join(TARGETS)}), found {', '.join(map(str, entry)) or 'none'}"[:400]
            )
        if target is not None:
            target = file_below(folder, target, where)
        source = file_below(folder, source, where)
        edits.append(Edit(source, clean_captions(texts, where), target))
    if not edits:
        raise UserError(f"--data {table}: expected a line for each edit, found none")
    return edits


def column(entry, names):
    """The value of the first of some columns that a line has; None: it has none of them."""
    return next((entry[name] for name in names if entry.get(name) is not None), None)


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
