"""The log of a run for a tracker: TensorBoard, Weights & Biases, or a table.

python -m tools.track out/dmd2-mnist --to csv    # -> out/dmd2-mnist/log.csv
python -m tools.track RUN --to tensorboard       # -> RUN/tensorboard; tensorboard --logdir RUN
python -m tools.track RUN --to wandb             # a run of the project named after the method
python -m tools.track RUN --to csv --follow      # and every new line, until Ctrl-C

The loop knows no tracker: this program reads log.jsonl, also of a run on another machine whose
folder is seen here. If a resumed run has cut its log, the tracker gets the iterations once more.
"""

import argparse
import csv
import json
import math
import time
from pathlib import Path

from common.errors import UserError, launch, require
from training.folder import read_starts

SECONDS = 5  # between two looks at a log that is followed
TIMES = ("seconds", "images_per_s", "peak_mb")  # of the entry "time"


# ---- the log -------------------------------------------------------------------------------------


class Tail:
    """New whole lines of a log.jsonl with every call of `read`."""

    def __init__(self, path):
        self.path = path
        self.place = 0  # bytes that were read
        self.last = b""  # the newest line, to see whether the log was cut and written again

    def read(self):
        """Objects of the lines since the last call. From the start again if the log was cut."""
        try:
            with open(self.path, "rb") as f:
                if not self.is_same_log(f):
                    self.place, self.last = 0, b""
                f.seek(self.place)
                data = f.read()
        except OSError as e:
            raise UserError(
                f"{self.path}: expected the log of a run, found: {e.strerror}"
            ) from None
        whole = data[: data.rfind(b"\n") + 1]  # the rest is being written
        self.place += len(whole)
        lines = whole.splitlines(keepends=True)
        if lines:
            self.last = lines[-1]
        return [self.parse(line) for line in lines]

    def is_same_log(self, file):
        file.seek(self.place - len(self.last))
        return file.read(len(self.last)) == self.last

    def parse(self, line):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        ok = isinstance(found, dict) and isinstance(found.get("it"), int)
        require(ok, f"{self.path}: expected a JSON object with `it` a line, found {line[:60]!r}")
        return found


def scalars(line):
    """{name: float} of a line, without `it` and what has no value. The clock as time/seconds, ...;
    an alarm that is on as alarms/NAME = 1, their number as alarms."""
    found = {}
    for name, value in line.items():
        if name == "alarms" and isinstance(value, list):
            found["alarms"] = float(len(value))
            found |= {f"alarms/{alarm}": 1.0 for alarm in value}
        elif name == "time" and isinstance(value, dict):
            found |= {f"time/{key}": value[key] for key in TIMES if is_number(value.get(key))}
        elif name != "it" and is_number(value):
            found[name] = value
    return {name: float(value) for name, value in found.items()}


def is_number(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


# ---- trackers ------------------------------------------------------------------------------------
# Each has add(it, scalars) and close().


class Table:
    """A .csv with a column for each name. A name that comes up later needs the file anew."""

    def __init__(self, path):
        self.path = path
        self.rows = {}  # by iteration: those that a resumed run repeats take their first's place
        self.names = {}
        self.file = None

    def add(self, it, values):
        is_next = it > max(self.rows, default=-1)
        known = self.names.keys() >= values.keys()
        self.rows[it] = values
        self.names |= dict.fromkeys(values)
        if self.file is None or not known or not is_next:
            self.write_all()
        else:
            self.write_row(it)

    def write_all(self):
        self.close()
        self.file = open(self.path, "w", newline="")
        csv.writer(self.file).writerow(["it", *self.names])
        for it in sorted(self.rows):
            self.write_row(it)

    def write_row(self, it):
        row = self.rows[it]
        csv.writer(self.file).writerow([it, *(row.get(name, "") for name in self.names)])

    def flush(self):
        if self.file is not None:
            self.file.flush()

    def close(self):
        if self.file is not None:
            self.file.close()
            self.file = None


class TensorBoard:
    def __init__(self, folder):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--to tensorboard: pip install tensorboard") from None
        self.writer = SummaryWriter(folder)

    def add(self, it, values):
        for name, value in values.items():
            self.writer.add_scalar(name, value, it)

    def flush(self):
        self.writer.flush()

    def close(self):
        self.writer.close()


class WeightsAndBiases:
    def __init__(self, run):
        try:
            import wandb
        except ImportError:
            raise UserError("--to wandb: pip install wandb") from None
        start = read_starts(run)[-1]
        project = str(start.get("method", "distillation"))
        self.run = wandb.init(project=project, name=run.resolve().name, config=start["flags"])

    def add(self, it, values):
        self.run.log(values, step=it)

    def flush(self):
        pass  # it sends by itself

    def close(self):
        self.run.finish()


def open_tracker(kind, run, out):
    if kind == "wandb":
        require(out is None, "--out: wandb chooses its own folder")
        return WeightsAndBiases(run), "wandb"
    if kind == "tensorboard":
        place = Path(out or run / "tensorboard")
        return TensorBoard(place), place
    place = Path(out or run / "log.csv")
    return Table(place), place


def follow(tail, tracker, wait):
    """Hands lines over as they come. wait(): between two looks; returns whether to look again."""
    count = 0
    while True:
        for line in tail.read():
            tracker.add(line["it"], scalars(line))
            count += 1
        tracker.flush()
        if not wait():
            return count


def sleep():
    try:
        time.sleep(SECONDS)
    except KeyboardInterrupt:
        return False
    return True


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("run", type=Path, help="folder of a run")
    p.add_argument("--to", required=True, choices=["csv", "tensorboard", "wandb"])
    p.add_argument("--out", help="file or folder [log.csv or tensorboard, in the run's folder]")
    p.add_argument("--follow", action="store_true", help="wait for more lines, until Ctrl-C")
    args = p.parse_args(argv)
    require(read_starts(args.run), f"{args.run}: expected the folder of a run, found no run.jsonl")
    tail = Tail(args.run / "log.jsonl")
    tail.read()  # UserError before anything is written
    tail = Tail(tail.path)
    tracker, place = open_tracker(args.to, args.run, args.out)
    try:
        count = follow(tail, tracker, sleep if args.follow else lambda: False)
    except OSError as e:
        raise UserError(f"--out {place}: not written: {e.strerror}") from None
    finally:
        tracker.close()
    print(f"{count} lines to {place}")


if __name__ == "__main__":
    launch(main)
