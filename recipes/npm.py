"""Reads files of an npm package in memory. Nothing is unpacked, links are not followed."""

import subprocess
import tarfile
import tempfile
from pathlib import Path

from common.errors import UserError, first_line

LARGEST = 2**23  # bytes of a file that is read


def read_package(source, name, pattern):
    """-> {path in the package: bytes} of the files whose path matches `pattern`, of re.compile.

    source: folder with NAME-VERSION.tgz, or with an unpacked folder NAME; None: npm fetches it.
    UserError.
    """
    if source is None:
        return fetch_package(name, pattern)
    archives = sorted(Path(source).glob(f"{name}-*.tgz"))
    if archives:
        return read_archive(archives[-1], pattern)
    folder = Path(source) / name
    if not folder.is_dir():
        raise UserError(
            f"--source {source}: expected {name}-VERSION.tgz or a folder {name}, found neither"
        )
    files = {}
    for path in folder.glob("**/*"):
        inside = path.relative_to(folder).as_posix()
        if pattern.fullmatch(inside) and path.is_file() and not path.is_symlink():
            files[inside] = path.read_bytes()
    return files


def fetch_package(name, pattern):
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(["npm", "pack", name], cwd=folder, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as e:
            raise UserError(
                f"npm pack {name}: expected the package, found: {first_line(e)[:200]}; "
                "give --source a folder that has it"
            ) from None
        return read_package(folder, name, pattern)


def read_archive(path, pattern):
    files = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                inside = member.name.removeprefix("package/")
                if pattern.fullmatch(inside):
                    check_member(member, path)
                    files[inside] = tar.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError) as e:
        kind = type(e).__name__
        raise UserError(
            f"--source {path}: expected a .tgz of npm, found something else ({kind})"
        ) from None
    return files


def check_member(member, path):
    if member.isfile() and member.size <= LARGEST:
        return
    found = "more" if member.isfile() else "no plain file"
    raise UserError(
        f"--source {path}: {member.name}: expected a file of at most {LARGEST} bytes, found {found}"
    )
