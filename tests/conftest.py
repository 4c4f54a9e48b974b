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


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """folders("sd15") -> the folder of a tiny teacher with random weights."""
    from helpers.pipelines import Folders

    return Folders(tmp_path_factory.mktemp("teachers"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Folder of images in three classes: 0, 1, 2."""
    from helpers.teachers import draw

    home = tmp_path_factory.mktemp("pictures")
    for label in range(3):
        for i in range(3):
            draw(home / str(label) / f"{i}.png", (20, 16), (80 * label, 20 * i, 100))
    return home


@pytest.fixture
def trace(monkeypatch, tmp_path):
    """trace(script, *flags): runs main() of an imported script here. -> helpers.trace.Trace"""
    from helpers.trace import Trace

    def run(script, *flags, **kwargs):
        return Trace(monkeypatch, script, tmp_path / "out", *flags, **kwargs)

    return run


@pytest.fixture
def make_run(tmp_path):
    """make_run(*flags) -> a Run of dmd2.py on the toy teacher, in tmp_path / "out"."""
    from helpers.trace import signal_handlers_restored

    import dmd2
    from training.run import Run

    runs = []

    def make(*flags):
        args = ["--teacher", "toy", "--out", tmp_path / "out", *flags]
        run = Run("dmd2.py", dmd2.parse_args([str(a) for a in args]))
        runs.append(run)
        run.folder.start()  # what `resume` does when all flags have proven right
        return run

    with signal_handlers_restored():
        yield make
    for run in runs:
        run.close()


@pytest.fixture
def run(make_run):
    return make_run
