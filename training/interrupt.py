"""Ctrl-C while a script imports torch and diffusers, which takes seconds: one line and exit code
130, as later in `launch`. The first import of every script, before those that take long."""

import os
import sys

other_errors = sys.excepthook


def one_line_for_ctrl_c(kind, error, traceback):
    if not issubclass(kind, KeyboardInterrupt) or hasattr(sys, "ps1"):  # or in a Python prompt
        other_errors(kind, error, traceback)
        return
    print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr, flush=True)
    os._exit(130)  # Python itself would end by the signal


sys.excepthook = one_line_for_ctrl_c
