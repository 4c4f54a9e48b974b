"""The folder of a run: one process at a time, nothing half-written, no run lost by mistake."""

import contextlib
import datetime
import errno
import json
import os
import sys
from importlib import metadata
from pathlib import Path

import torch

from common.checkpoint import delete_oldest, iterations_of, list_checkpoints
from common.errors import UserError, require
from common.files import atomic, git_revision, not_writable, require_writable
from common.teachers.kind import EMBEDDED

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

LITTER = ("*.json*.tmp", "ckpt/*.tmp", "samples/*.tmp", "student/**/*.tmp")
RESULTS = (
    "ckpt/it-*",
    "samples/[0-9]*.png",
    "metrics.json",
    "control.json",
    "path.json",
    "report.html",
    "student/**/*.json",
    "student/**/*.safetensors",
)
LOGS = ("log.jsonl", "eval.jsonl", "run.jsonl")
NOT_KEPT = ("resume", "overwrite", "smoke", "out")  # flags of one start, not of the run
NOT_KEPT += ("preset", "preset_from", "preset_source", "cfg_given", "from_image")  # facts of it
NOT_KEPT += ("dry_run", "device_memory", "processes", "tflops")  # a dry run leaves no run
PATH_FLAGS = ("teacher", "start", "generator", "data", "prompts", "cache_prompts", "control_model")
PATH_LISTS = ("teacher_lora",)
TO_BE_DISCARDED = "to be discarded"
BUSY = "busy"
LOCKED = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # a lock is held; NFS says EACCES


class RunFolder:
    """path: the folder, with log.jsonl, run.jsonl, eval.jsonl, ckpt/, samples/, student/.

    torchrun --max-restarts starts a failed worker again with the same flags. Such an attempt
    resumes from the last checkpoint, unless the first attempt refused the folder: .lock says so.
    """

    def __init__(self, path, resume, overwrite):
        self.path = path
        self.resume = resume
        self.overwrite = overwrite
        self.under_torchrun = "TORCHELASTIC_RESTART_COUNT" in os.environ
        self.restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        self.resume_wanted = resume or self.restarted
        self.lock = None

    def open(self):
        """On rank 0: locks a folder that runs have used. UserError if there is a reason not to use
        it. A new folder is only made by `start`, so that a mistake in the flags leaves none."""
        if (self.path / ".lock").exists() or list_checkpoints(self.path):
            self._lock()
            self._refuse_other_runs()
            return
        require(not self.resume, self._no_checkpoint())
        require_writable("--out", self.path)

    def start(self):
        """On rank 0, once all flags have proven right: makes and locks a new folder."""
        try:
            for sub in ("ckpt", "samples"):
                (self.path / sub).mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise self._not_writable(e.strerror) from None
        if self.lock is None:
            self._lock()
            self._refuse_other_runs()

    def _lock(self):
        out = self.path
        try:
            self.lock = open(out / ".lock", "a+")
        except OSError as e:
            raise self._not_writable(e.strerror) from None
        reason = lock_file(self.lock)
        require(
            reason != BUSY,
            f"--out {out}: another run is writing here; choose another folder or wait for it",
        )
        if reason:
            print(
                f"warning: --out {out}: no lock on this file system ({reason}); "
                "make sure that no other run writes there",
                file=sys.stderr,
            )

    def _refuse_other_runs(self):
        out = self.path
        remove_files(out, LITTER)  # of a run that was killed while writing
        if self.restarted:
            self.lock.seek(0)
            left = self.lock.read()
            require("holds a run" not in left, left)

        checkpoints = list_checkpoints(out)
        refusal = ""
        if checkpoints and not self.resume_wanted:
            it = iterations_of(checkpoints[-1])
            refusal = (
                f"--out {out}: holds a run at iteration {it}; "
                "add --resume, --overwrite or another --out"
            )
        if not self.restarted:
            self._note(TO_BE_DISCARDED if refusal and self.overwrite else refusal)
        require(not refusal or self.overwrite, refusal)
        require(checkpoints or not self.resume, self._no_checkpoint())

    def _no_checkpoint(self):
        return f"--resume: no checkpoint in {self.path / 'ckpt'}"

    def _not_writable(self, reason):
        return UserError(not_writable("--out", self.path, reason))

    def after_open(self):
        """On all ranks. A restart whose first attempt ended before it discarded the old run must
        discard it, not resume it."""
        lock = self.path / ".lock"
        if self.restarted and self.overwrite and lock.exists() and lock.read_text():
            self.resume_wanted = False

    def _note(self, text):
        """Writes into .lock what torchrun's next attempts need to know about this one."""
        if self.under_torchrun:
            self.lock.truncate(0)
            self.lock.write(text)
            self.lock.flush()

    def clear(self):
        """Removes what an earlier run left. Called once all flags have proven right, so that a typo
        next to --overwrite costs nothing."""
        remove_files(self.path, LOGS + (RESULTS if self.overwrite else ()))
        self._note("")

    def rewind(self, log_bytes, unreadable):
        """Cuts the log to its length at the checkpoint, renames damaged checkpoints so that they do
        not count as the newest, and deletes surplus ones (a kill may have come before that)."""
        log = self.path / "log.jsonl"
        if log.exists():
            os.truncate(log, min(log_bytes, log.stat().st_size))
        for path in unreadable:
            path.rename(f"{path}.unreadable")
        delete_oldest(self.path)

    def note_start(self, **facts):
        """Adds a line to run.jsonl: all that is needed to start the same run again. Returns the
        revision of the code."""
        revision = git_revision()
        line = dict(
            date=utc_now(),
            command=sys.argv,
            cwd=os.getcwd(),
            revision=revision,
            versions=package_versions(),
            **facts,
        )
        path = self.path / "run.jsonl"
        before = path.read_text() if path.exists() else ""
        with atomic(path) as f:
            f.write((before + json.dumps(line) + "\n").encode())
        return revision


def lock_file(file):
    """Locks an open file for this process -> None; BUSY, or why the file system has no locks.

    Lustre without -o flock, some NFS, FUSE and container file systems have none.
    """
    if fcntl is None:
        return "this Python has no fcntl"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        return BUSY if e.errno in LOCKED else e.strerror
    return None


# ---- run.jsonl: the starts of a run --------------------------------------------------------------


def default_folder(script, teacher):
    """Where the runs of a script on --teacher go: out/<script>-<teacher>, next to the script."""
    script = Path(script)
    return script.resolve().parent / "out" / f"{script.stem}-{Path(teacher).name}"


def read_starts(out):
    """Lines of run.jsonl, the oldest first; [] if there is no such file. Each has at least `first`,
    the iteration from which its `flags` hold. UserError for a file that says something else."""
    path = Path(out) / "run.jsonl"
    starts = []
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            start = json.loads(line)
            ok = isinstance(start["first"], int) and isinstance(start["flags"], dict)
        except (ValueError, KeyError, TypeError, RecursionError):
            ok = False
        require(ok, f"{path}: line {number}: expected the flags of a start, found something else")
        starts.append(start)
    return starts


def starts_until(starts, it):
    """The starts that made the first `it` iterations. Iterations after `first` of a later start
    were undone by it."""
    kept = []
    for start in starts:
        kept = [earlier for earlier in kept if earlier["first"] < start["first"]] + [start]
    return [start for start in kept if start["first"] < it]


def flags_of(start, absolute=True):
    """Flags of a start. Relative paths become absolute, since they are relative to the working
    directory of that start. absolute=False: only if that is not the current one."""
    flags = {name: v for name, v in start["flags"].items() if name not in NOT_KEPT}
    cwd = start.get("cwd")
    if not isinstance(cwd, str) or (cwd == os.getcwd() and not absolute):
        return flags
    for name in PATH_FLAGS:
        value = flags.get(name)
        if not isinstance(value, str):
            continue
        path = os.path.join(cwd, value)
        is_folder = value not in EMBEDDED and os.path.isdir(path)  # see load_teacher
        if name != "teacher" or is_folder:
            flags[name] = os.path.normpath(path)
    for name in PATH_LISTS:
        values = flags.get(name)
        if isinstance(values, list) and all(isinstance(value, str) for value in values):
            flags[name] = [os.path.normpath(os.path.join(cwd, value)) for value in values]
    return flags


def changed_flags(old, new):
    """{name: [old, new]} of the flags that differ between two starts."""
    old, new = flags_of(old), flags_of(new)
    both = {name: [plain(old[name]), plain(new[name])] for name in new if name in old}
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}


def plain(value):
    """A flag as JSON has it; of --lora the rank, of --small the changes."""
    if isinstance(value, dict):
        return value.get("rank", value.get("changes"))
    return json.loads(json.dumps(value))


def describe_changes(changes, prefix=""):
    """{name: [old, new]} -> "cfg 1.5 -> 1, lr 0.001 -> 2e-06". prefix: of the names."""

    def text(value):
        if isinstance(value, list):
            return " ".join(map(text, value))
        return f"{value:g}" if isinstance(value, float) else str(value)

    parts = []
    for name, (old, new) in changes.items():
        parts.append(f"{prefix}{name.replace('_', '-')} {text(old)} -> {text(new)}")
    return ", ".join(parts)


def history(starts, it):
    """What distill.json says of a run's resumes up to iteration `it`: a list of dicts, the
    iteration `first` and the flags that changed there."""
    kept = starts_until(starts, it)
    return [
        dict(first=after["first"], changed=changed_flags(before, after))
        for before, after in zip(kept, kept[1:])
    ]


# ---- files ---------------------------------------------------------------------------------------


def remove_files(folder, patterns):
    for pattern in patterns:
        for path in list(folder.glob(pattern)):
            path.unlink()


def utc_now():
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def package_versions():
    versions = dict(python=sys.version.split()[0])
    for name in ("numpy", "diffusers", "transformers", "peft", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    versions["torch"] = str(torch.__version__)  # with the build: +cpu, +cu130
    return versions
