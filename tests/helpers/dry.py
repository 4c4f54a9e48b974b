"""Dry runs of imported scripts, in the process of the test."""

import gc
import importlib
import json

import pytest
from helpers.trace import run_main

from dryrun.ghost import GhostDevice


def dry_run(monkeypatch, script, out, *flags):
    """dryrun.json of `python SCRIPT.py --dry-run FLAGS`."""
    module = importlib.import_module(script)
    try:
        with pytest.raises(SystemExit) as end:
            run_main(monkeypatch, module, "--dry-run", "--out", out, *flags)
        assert end.value.code == 0
    finally:
        leave_device()
    return json.loads((out / "dryrun.json").read_text())


def leave_device():
    """What the end of the process does."""
    gc.unfreeze()
    if GhostDevice.current is not None:
        GhostDevice.current.__exit__(None, None, None)
