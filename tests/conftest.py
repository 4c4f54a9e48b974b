import os
import sys
from pathlib import Path

# Before torch is imported: tensors are tiny, and the other cores are for the scripts' processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402

pytest.register_assert_rewrite("helpers")


@pytest.fixture(scope="session")
def scripts():
    """Runs scripts as processes: scripts.run("dmd2.py", "--teacher", "toy", ...)."""
    from helpers.cases import required_flags
    from helpers.server import Server

    server = Server(required_flags)
    yield server
    server.close()


@pytest.fixture
def trace(monkeypatch, tmp_path):
    """trace(script, *flags): runs main() of an imported script here. -> helpers.trace.Trace"""
    from helpers.trace import Trace

    def run(script, *flags, **kwargs):
        return Trace(monkeypatch, script, tmp_path / "out", *flags, **kwargs)

    return run
