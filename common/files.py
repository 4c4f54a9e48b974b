"""Files that are written whole or not at all, JSON, safetensors."""

import contextlib
import json
import os
import subprocess
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.errors import UserError, describe

ROOT = Path(__file__).resolve().parent.parent


# What diffusers and transformers raise for missing, truncated or foreign files.
LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    TypeError,
    AttributeError,
    ImportError,
    SafetensorError,
)
WEIGHTS = "diffusion_pytorch_model.safetensors"  # a network as diffusers writes it


@contextlib.contextmanager
def atomic(path):
    """A binary file that appears under its name complete or not at all: temporary name, fsync, rename, fsync of the folder."""
    tmp = Path(
        f"{path}.{os.urandom(4).hex()}.tmp"
    )  # another run may be writing the same file of a cache
    try:
        with open(tmp, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
        fd = os.open(Path(path).parent, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    finally:
        tmp.unlink(missing_ok=True)


def write_json(path, value):
    with atomic(path) as f:
        f.write((json.dumps(value, indent=1) + "\n").encode())


def read_json(path, what="file"):
    """Dict of a JSON file. UserError if it is missing, not JSON or not an object."""
    try:
        value = json.loads(Path(path).read_text())
    except OSError as e:
        raise UserError(f"{what} {path}: {e.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{what} {path}: expected JSON, found something else") from None
    if not isinstance(value, dict):
        raise UserError(f"{what} {path}: expected a JSON object, found {type(value).__name__}")
    return value


@contextlib.contextmanager
def load_errors(what):
    """Raises LOAD_ERRORS of the block as one UserError: `what`, then the error in one line."""
    try:
        yield
    except LOAD_ERRORS as e:
        raise UserError(f"{what}: {describe(e)}") from None


def git_revision():
    """Commit of the code, '+' appended when the tree differs from it; 'unknown' outside git."""
    git = lambda *a: subprocess.run(["git", "-C", str(ROOT), *a], capture_output=True, text=True)
    try:
        head = git("rev-parse", "--short=10", "HEAD")
        return (
            head.stdout.strip() + ("+" if git("status", "--porcelain").stdout.strip() else "")
            if head.returncode == 0
            else "unknown"
        )
    except OSError:
        return "unknown"


def save_weights(path, tensors):
    with atomic(path) as f:
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
            f.name,
            metadata={"format": "pt"},
        )


def load_weights(path, module, key=lambda name: name):
    """The tensors of a safetensors file into a module, all of them and no others. key: name in the file of the module's tensor `name`."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as e:
        raise UserError(
            f"{path}: expected a safetensors file, found something else or half of one ({str(e).splitlines()[0]})"
        ) from None
    expected = {key(k): tuple(v.shape) for k, v in module.state_dict().items()}
    for k, shape in expected.items():
        if k not in tensors:
            raise UserError(f"{path}: tensor {k} is missing")
        if tuple(tensors[k].shape) != shape:
            raise UserError(
                f"{path}: tensor {k}: expected shape {list(shape)}, found {list(tensors[k].shape)}"
            )
    if extra := sorted(set(tensors) - set(expected)):
        raise UserError(
            f"{path}: {len(extra)} tensors that the configuration does not know, the first is {extra[0]}"
        )
    module.load_state_dict({k: tensors[key(k)] for k in module.state_dict()})


def is_local_name(name):
    """Is this the name of a file in the folder that holds the JSON which names it? The folder may be somebody else's."""
    return (
        isinstance(name, str)
        and bool(name)
        and "\0" not in name
        and not os.path.isabs(name)
        and ".." not in Path(name).parts
    )


def check_npz_size(archive, largest=2**28, ratio=100):
    """ValueError if an open .npz says that it grows beyond what arrays of numbers do."""
    sizes = [(part.file_size, part.compress_size) for part in archive.zip.infolist()]
    if (total := sum(a for a, _ in sizes)) > largest and total > ratio * sum(b for _, b in sizes):
        raise ValueError(f"would grow to {total} bytes")
