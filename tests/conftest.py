import os
import sys
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported: tiny tensors, and the scripts' own processes need the other cores
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def scripts():
    from forks import Server

    server = Server()
    yield server
    server.close()
