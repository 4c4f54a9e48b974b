import sys

plain = sys.excepthook
# Ctrl-C while packages are still being imported, which takes seconds: one line. Later: common/run.py, launch
sys.excepthook = lambda kind, value, trace: print("interrupted", file=sys.stderr) if kind is KeyboardInterrupt else plain(kind, value, trace)
