"""Runs scripts as processes of their own without paying for `import torch` each time.

A server process imports torch once. Every script is a fork of it that runs `python SCRIPT FLAGS`
from the first line (runpy, __main__), with its own exit code, output, signals and locks. Modules of
this repository are imported by the fork, so a missing import still shows.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def serve():
    """The server: one job a line on standard input, one line of JSON as its result."""
    import numpy  # noqa: F401
    import scipy.linalg  # noqa: F401
    import torch
    import torch._dynamo  # the first optimiser imports it, which takes a second
    import torch.distributed  # noqa: F401
    from PIL import Image  # noqa: F401

    torch.set_num_threads(1)
    # without it every fork walks, and so copies, all of torch when it ends: 1.4 s instead of 0.3
    gc.collect()
    gc.freeze()

    for line in iter(sys.stdin.readline, ""):
        job = json.loads(line)
        if "load" in job:
            importlib.import_module(job["load"])
            gc.freeze()
            result = None
        elif "wait" in job:
            _, status, used = os.wait4(job["wait"], 0)
            result = [os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime]
        else:
            result = os.fork()
            if result == 0:
                run_job(job)
        print(json.dumps(result), flush=True)


def run_job(job):
    """In the fork: runs the script of a job and ends the process."""
    redirect(0, "/dev/null", os.O_RDONLY)
    redirect(1, job["out"], os.O_WRONLY | os.O_CREAT)
    redirect(2, job["err"], os.O_WRONLY | os.O_CREAT)
    os.environ.update(job["env"])
    sys.argv = job["argv"]
    sys.path[0] = str(ROOT)
    # what a test does to the process before the script runs
    exec(os.environ.pop("BEFORE", ""), {})
    end_process(lambda: runpy.run_path(job["argv"][0], run_name="__main__"))


def redirect(descriptor, path, mode):
    os.dup2(os.open(path, mode), descriptor)


def end_process(run):
    """Calls run() and ends this process as Python would.

    Torch's modules are not torn down, which takes longer than many a script.
    """
    code = 1
    try:
        run()
        code = 0
    except SystemExit as e:
        if isinstance(e.code, int):
            code = e.code
        elif e.code is None:
            code = 0
        else:
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
    """required_flags(script) -> flags that every run of this script gets."""

    def __init__(self, required_flags=lambda script: []):
        self.required_flags = required_flags
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.folder = tempfile.TemporaryDirectory()
        self.count = 0

    def send(self, **job):
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, script, *flags, **env):
        """-> Process. flags: of any type. env: more environment variables; BEFORE is Python code
        that runs in the process ahead of the script, to break something."""
        self.count += 1
        out = Path(self.folder.name) / f"{self.count}.out"
        err = Path(self.folder.name) / f"{self.count}.err"
        argv = [ROOT / script, *self.required_flags(script), *flags]
        pid = self.send(
            argv=[str(word) for word in argv],
            out=str(out),
            err=str(err),
            env={name: str(value) for name, value in env.items()},
        )
        return Process(self, pid, out, err)

    def load(self, *modules):
        """Imports packages once that every one of the next scripts would import."""
        for module in modules:
            self.send(load=module)

    def run(self, script, *flags, code=0, **env):
        """Runs to the end and asserts the exit code. -> finished Process."""
        process = self.start(script, *flags, **env)
        found = process.wait()
        words = " ".join(map(str, flags))
        assert found == code, (
            f"exit code {found}, expected {code}: {words}\n{process.out}\n{process.err}"
        )
        return process

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()


class Process:
    def __init__(self, server, pid, out, err):
        self.server = server
        self.pid = pid
        self.out_file = out
        self.err_file = err
        self.code = None
        self.cpu = None

    def wait(self):
        """Exit code, negative for a signal as in subprocess. Sets .cpu, processor seconds."""
        if self.code is None:
            self.code, self.cpu = self.server.send(wait=self.pid)
        return self.code

    def kill(self, signum):
        os.kill(self.pid, signum)

    @property
    def out(self):
        return self.out_file.read_text()

    @property
    def err(self):
        return self.err_file.read_text()


if __name__ == "__main__":
    serve()
