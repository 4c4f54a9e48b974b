"""Files: written whole or not at all, JSON, safetensors. Nothing that is read is ever executed."""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import subprocess
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.errors import UserError, describe, require

ROOT = Path(__file__).resolve().parent.parent
LARGEST_FILE = 10**10  # bytes of weights in one file
WEIGHTS = "diffusion_pytorch_model.safetensors"  # a network, under the name that diffusers uses
NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
LOAD_ERRORS = (  # what diffusers and transformers raise for missing, truncated or foreign files
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    TypeError,
    AttributeError,
    ImportError,
    SafetensorError,
)


@contextlib.contextmanager
def atomic(path):
    """A binary file that appears under its name complete or not at all.

    Written under a temporary name, fsync'ed, renamed, and the folder fsync'ed. The temporary name
    is random, because another run may be writing the same file of a shared cache.
    """
    path = Path(path)
    tmp = Path(f"{path}.{os.urandom(4).hex()}.tmp")
    try:
        with open(tmp, "wb") as f:
            yield f
            f.flush()
            sync(f.fileno())
        os.replace(tmp, path)
        sync_folder(path.parent)
    finally:
        tmp.unlink(missing_ok=True)


def require_writable(flag, folder):
    """UserError if a folder, which may not exist yet, cannot be made or written. flag: its name."""
    home = Path(folder).absolute()
    while not os.path.lexists(home):
        home = home.parent
    reason = None
    if not home.is_dir():
        reason = errno.ENOTDIR
    elif not os.access(home, os.W_OK | os.X_OK):
        reason = errno.EACCES
    require(reason is None, not_writable(flag, folder, reason and os.strerror(reason)))


def not_writable(flag, folder, reason):
    return f"{flag} {folder}: expected a folder that can be written, found: {reason}"


def sync(descriptor):
    """fsync, where the file system has one: some network and FUSE file systems refuse it."""
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in NOT_SUPPORTED:
            raise


def sync_folder(path):
    """Makes a rename in the folder last through a crash, where folders can be synced."""
    try:
        folder = os.open(path, os.O_RDONLY)
    except PermissionError:  # may be written but not read; Windows
        return
    try:
        sync(folder)
    finally:
        os.close(folder)


def write_json(path, value):
    with atomic(path) as f:
        f.write((json.dumps(value, indent=1) + "\n").encode())


def read_json(path, what="file"):
    """Dict of a JSON file. UserError if the file is missing, not JSON or not an object."""
    try:
        value = json.loads(Path(path).read_text())
    except OSError as e:
        raise UserError(f"{what} {path}: {e.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{what} {path}: expected JSON, found something else") from None
    found = type(value).__name__
    require(isinstance(value, dict), f"{what} {path}: expected a JSON object, found {found}")
    return value


@contextlib.contextmanager
def load_errors(what):
    """Raises LOAD_ERRORS of the block as one UserError: `what`, then the error in one line."""
    try:
        yield
    except pickle.UnpicklingError:  # its own advice is to run the code
        raise UserError(
            f"{what}: expected weights that can be read without running code, found a pickle of "
            "something else; diffusers' save_pretrained writes safetensors"
        ) from None
    except LOAD_ERRORS as e:
        raise UserError(f"{what}: {describe(e)}") from None


def save_weights(path, tensors, metadata=None):
    """Dict of tensors -> safetensors file. Above LARGEST_FILE several files and their index, as
    diffusers has it. metadata: of the file's header, {text: text}."""
    if sum(v.nbytes for v in tensors.values()) > LARGEST_FILE:
        pattern = path.name.replace(".safetensors", "{suffix}.safetensors")
        save_torch_state_dict(
            {name: v.detach().cpu().contiguous() for name, v in tensors.items()},
            path.parent,
            filename_pattern=pattern,
            max_shard_size=LARGEST_FILE,
            metadata=dict(metadata or {}, format="pt"),
        )
        return
    save_one_file(path, tensors, metadata)


def save_one_file(path, tensors, metadata=None):
    """`save_weights` into one file, whatever its size."""
    tensors = {name: v.detach().cpu().contiguous() for name, v in tensors.items()}
    metadata = dict(metadata or {}, format="pt")
    with atomic(path) as f:
        save_file(tensors, f.name, metadata=metadata)
        sort_metadata(f.name)


def sort_metadata(path):
    """Puts the metadata of a safetensors file in order: safetensors writes it in any, and equal
    students are to be equal files."""
    with open(path, "r+b") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # the same text in another order, unless it was written otherwise
            f.seek(8)
            f.write(text.ljust(length))  # spaces are padding


def write_folder(folder, files, metadata=None):
    """Writes {path in the folder: contents}, in this order. contents: tensors {name: tensor}, text,
    or an object for JSON (a path that ends in .json). metadata: of the files of tensors."""
    for name, contents in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            write_json(path, contents)
        elif isinstance(contents, str):
            with atomic(path) as f:
                f.write(contents.encode())
        else:
            save_weights(path, contents, metadata)


def load_weights(path, module, key=lambda name: name):
    """Loads a safetensors file into a module: all of its tensors, and no others.

    key: function of a tensor's name in the module -> its name in the file.
    UserError: not a safetensors file, a tensor is missing, unknown or of another shape.
    """
    set_weights(path, module, read_weights(path), key)


def read_weights(path):
    """Tensors {name: tensor} of a safetensors file. UserError: it is none."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(
            f"{path}: expected a safetensors file, found something else or half of one ({reason})"
        ) from None


def set_weights(path, module, tensors, key=lambda name: name):
    """`load_weights` of tensors that were read already. path: for messages."""
    state = module.state_dict()
    for name, v in state.items():
        k = key(name)
        require(k in tensors, f"{path}: tensor {k} is missing")
        expected, found = list(v.shape), list(tensors[k].shape)
        require(found == expected, f"{path}: tensor {k}: expected shape {expected}, found {found}")
    extra = sorted(set(tensors) - {key(name) for name in state})
    if extra:
        raise UserError(
            f"{path}: {len(extra)} tensors that the configuration does not know, "
            f"the first is {extra[0]}"
        )
    module.load_state_dict({name: tensors[key(name)] for name in state})


def hash_files(paths):
    """sha256 of the contents of files, as hex digits."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            while part := f.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()


def is_local_name(name):
    """Whether a name found in a JSON file stays inside that file's folder."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    return not os.path.isabs(name) and ".." not in Path(name).parts


def check_npz_size(archive, largest=2**28, ratio=100):
    """ValueError for an open .npz that unpacks to far more than arrays of numbers do."""
    parts = archive.zip.infolist()
    unpacked = sum(part.file_size for part in parts)
    packed = sum(part.compress_size for part in parts)
    if unpacked > largest and unpacked > ratio * packed:
        raise ValueError(f"would grow to {unpacked} bytes")


def git_revision():
    """Commit of the code, with '+' if the tree differs from it; 'unknown' outside git."""

    def git(*args):
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True)

    try:
        head = git("rev-parse", "--short=10", "HEAD")
        if head.returncode != 0:
            return "unknown"
        changed = git("status", "--porcelain").stdout.strip()
    except OSError:  # no git on this machine
        return "unknown"
    return head.stdout.strip() + ("+" if changed else "")


def format_bytes(n):
    """Bytes in GB or MB, as text."""
    if n >= 2**30:
        return f"{n / 2**30:.1f} GB"
    return f"{n / 2**20:.1f} MB"
