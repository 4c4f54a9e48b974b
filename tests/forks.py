"""Runs scripts as processes of their own without paying for `import torch` each time.

A server process imports torch once; every script is a fork of it that runs `python SCRIPT FLAGS` from the first line (runpy, __main__), with its own
exit code, output, signals and locks. Modules of this repository are imported by the fork, so a missing import still shows.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from cases import needs

ROOT = Path(__file__).resolve().parent.parent


def serve():
    import gc
    import importlib
    import runpy

    import numpy  # noqa: F401
    import scipy.linalg  # noqa: F401
    import torch
    import torch._dynamo  # the first optimiser imports it, a second's work
    import torch.distributed  # noqa: F401
    from PIL import Image  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # or every fork walks, and so copies, all of torch when it ends: 1.4 s instead of 0.3
    for line in iter(sys.stdin.readline, ""):
        job = json.loads(line)
        if "load" in job:
            importlib.import_module(job["load"])
            gc.freeze()
            print("null", flush=True)
            continue
        if "wait" in job:
            _, status, used = os.wait4(job["wait"], 0)
            print(
                json.dumps([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime]),
                flush=True,
            )
            continue
        pid = os.fork()
        if pid:
            print(json.dumps(pid), flush=True)
            continue
        for fd, path, mode in (
            (0, "/dev/null", os.O_RDONLY),
            (1, job["out"], os.O_WRONLY | os.O_CREAT),
            (2, job["err"], os.O_WRONLY | os.O_CREAT),
        ):
            os.dup2(os.open(path, mode), fd)
        os.environ.update(job["env"])
        sys.argv, sys.path[0] = job["argv"], str(ROOT)
        exec(
            os.environ.pop("BEFORE", ""), {}
        )  # what a test does to the process before the script runs
        end(lambda: runpy.run_path(job["argv"][0], run_name="__main__"))


def end(run):
    """Ends this process as Python would, but for tearing down all of torch's modules, which takes longer than many a script."""
    code = 1
    try:
        run()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if code and not isinstance(e.code, int):
            print(e.code, file=sys.stderr)
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        code = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 255)


class Server:
    def __init__(self):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=env,
        )
        self.folder = tempfile.TemporaryDirectory()
        self.count = 0

    def ask(self, **job):
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, script, *flags, **env):
        """-> Process. flags: anything; env: more environment variables; BEFORE: code that runs ahead of the script, to break something."""
        self.count += 1
        out, err = (Path(self.folder.name) / f"{self.count}.{name}" for name in ("out", "err"))
        pid = self.ask(
            argv=[str(ROOT / script), *needs(script), *map(str, flags)],
            out=str(out),
            err=str(err),
            env={k: str(v) for k, v in env.items()},
        )
        return Process(self, pid, out, err)

    def load(self, *modules):
        """Packages that the next scripts would otherwise import each for itself."""
        for module in modules:
            self.ask(load=module)

    def run(self, script, *flags, code=0, **env):
        """Runs to the end and asserts the exit code. -> finished Process."""
        p = self.start(script, *flags, **env)
        assert p.wait() == code, (
            f"exit code {p.code}, expected {code}: {' '.join(map(str, flags))}\n{p.out}\n{p.err}"
        )
        return p

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()


class Process:
    def __init__(self, server, pid, out, err):
        self.server, self.pid, self.files, self.code, self.cpu = server, pid, (out, err), None, None

    def wait(self):
        """Exit code, negative for a signal as in subprocess. Then .cpu is the processor time in seconds."""
        if self.code is None:
            self.code, self.cpu = self.server.ask(wait=self.pid)
        return self.code

    def kill(self, signum):
        os.kill(self.pid, signum)

    out = property(lambda self: self.files[0].read_text())
    err = property(lambda self: self.files[1].read_text())


if __name__ == "__main__":
    serve()
