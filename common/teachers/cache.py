"""Folders in which embeddings of prompts and latents of images are kept (--cache-prompts).

A folder's name has a digest of what its contents depend on. All processes write its files and read
those of the others.
"""

import contextlib
import hashlib
import json
import shutil
import time
from importlib import metadata
from pathlib import Path

from safetensors import SafetensorError

from common.errors import UserError, first_line, require
from common.files import ROOT, format_bytes

SHARD = 1024  # largest number of rows in one file
VISIBLE_AFTER = 90  # seconds; network file systems show a new file up to a minute late


def cache_folder(cache, name, key):
    """Folder for `name`, below `cache` (None: out/prompts), of what depends on the list `key`."""
    return Path(cache or ROOT / "out" / "prompts") / f"{name}-{digest_of(key)}"


def digest_of(values):
    """16 letters that change when a value of the list does."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value).encode() + b"\n")
    return digest.hexdigest()[:16]


def library_versions():
    """Versions of what turns files into embeddings and latents."""
    return [metadata.version(name) for name in ("diffusers", "transformers")]


def stamp_files(files, base):
    """What changes when files do: names, sizes and modification times."""
    stamps = []
    for path in files:
        name = str(path.relative_to(base))
        if path.exists():
            stamps.append((name, path.stat().st_size, path.stat().st_mtime_ns))
        else:
            stamps.append((name,))
    return stamps


@contextlib.contextmanager
def cache_errors(home, what):
    """Raises what the files of a folder raise in the block as one UserError. what: "latents"."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        raise UserError(
            f"--cache-prompts {home}: expected to read and write {what} there, "
            f"found: {first_line(e)}; delete it to encode again"
        ) from None


def require_space(home, what, size, advice=""):
    """UserError if `size` bytes do not fit on the disk of a folder. what: takes them, "the ..."."""
    free = shutil.disk_usage(home).free
    require(
        size <= free,
        f"--cache-prompts {home}: {what} take {format_bytes(size)}, found {format_bytes(free)} "
        f"free; choose a folder on a larger disk{advice}",
    )


def wait_until_visible(home, paths):
    """UserError if another process has written these files, and this one does not see them."""
    end = time.monotonic() + VISIBLE_AFTER
    while not all(path.is_file() for path in paths):
        if time.monotonic() > end:
            raise UserError(
                f"--cache-prompts {home}: expected a folder on a disk that all machines share; "
                "process 0 has written there, and this process does not see it"
            )
        time.sleep(1)
