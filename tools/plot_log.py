"""Curves of the numbers that runs log, also of a run that has not ended. Needs matplotlib.

python -m tools.plot_log out/dmd2-mnist                    # -> out/dmd2-mnist/samples/log.png
python -m tools.plot_log out/dmd2-mnist out/dmd2-mnist-1   # two runs in the same panels
python -m tools.plot_log out/dmd2-mnist --out FILE.png
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

from common.errors import UserError, launch

NO_CURVE = ("it", "images", "time", "alarms")


def read_log(folder):
    """The log.jsonl of a run -> {name: (iterations, values)}, without the clock."""
    path = Path(folder) / "log.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except OSError as e:
        raise UserError(f"{path}: expected the log of a run, found: {e.strerror}") from None
    except ValueError:
        raise UserError(f"{path}: expected one JSON object per line") from None
    points = {}
    for line in lines:
        for name, value in line.items():
            if name not in NO_CURVE and (name, value) != ("skipped", 0):
                value = math.nan if value is None else float(value)  # JSON has no nan
                points.setdefault(name, []).append((line["it"], value))
    if not points:
        raise UserError(f"{path}: expected lines of a run, found none")
    return {name: np.array(pairs).T for name, pairs in points.items()}


def plot(path, logs, title):
    """PNG with a panel for each logged number. logs: {label: read_log of a run}.

    Pale: the logged values; dark: their running mean. Logarithmic where all values are positive and
    span more than a factor 50. UserError: no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("log curves need matplotlib: pip install matplotlib") from None

    names = list(dict.fromkeys(name for log in logs.values() for name in log))
    rows, columns = math.ceil(len(names) / 3), min(3, len(names))
    figure = Figure(figsize=(4 * columns, 2 * rows + 1), layout="constrained")
    figure.suptitle(title)
    for i, name in enumerate(names, 1):
        panel = figure.add_subplot(rows, columns, i, title=name)
        for color, (label, log) in enumerate(logs.items()):
            iterations, values = log.get(name, np.zeros((2, 0)))
            marker = "o" if len(values) == 1 else None  # one point makes no line
            panel.plot(iterations, values, f"C{color}", alpha=0.3)
            panel.plot(iterations, running_mean(values), f"C{color}", marker=marker, label=label)
        values = np.concatenate([log[name][1] for log in logs.values() if name in log])
        values = values[np.isfinite(values)]
        if len(values) and 0 < values.min() < values.max() / 50:
            panel.set_yscale("log")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def running_mean(values, share=25):
    """Mean over a window of 1 / share of all values, smaller at the ends. A nan stays a nan."""
    half = len(values) // share // 2
    windows = (values[max(i - half, 0) : i + half + 1] for i in range(len(values)))
    return [window.mean() for window in windows]


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("runs", nargs="+", help="folders of runs")
    p.add_argument("--out", help="PNG; default samples/log.png in the first run's folder")
    args = p.parse_args(argv)
    out = Path(args.out or Path(args.runs[0]) / "samples" / "log.png")
    plot(out, {run: read_log(run) for run in args.runs}, Path(args.runs[0]).resolve().name)
    print(out)


if __name__ == "__main__":
    launch(main)
