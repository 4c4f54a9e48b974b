"""tools/track.py: lines of a log that grows, a table, trackers that are not installed."""

import csv
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from common.errors import UserError
from tools.track import Table, Tail, follow, main, scalars

LINE = dict(it=10, images=640, skipped=0, lr=1e-3, dm=0.5, cos=None, alarms=["off"])
LINE |= dict(time=dict(seconds=1.5, images_per_s=None, peak_mb=300))


@pytest.fixture
def run(tmp_path):
    start = dict(first=0, flags=dict(lr=1e-3), method="dmd2")
    (tmp_path / "run.jsonl").write_text(json.dumps(start) + "\n")
    write(tmp_path, LINE, dict(LINE, it=20, alarms=[], late=2.0))
    return tmp_path


def write(run, *lines, mode="a"):
    with open(run / "log.jsonl", mode) as f:
        f.write("".join(f"{json.dumps(line)}\n" for line in lines))


def table(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


# ---- the log -------------------------------------------------------------------------------------


def test_only_new_whole_lines(run):
    tail = Tail(run / "log.jsonl")
    assert [line["it"] for line in tail.read()] == [10, 20]
    assert tail.read() == []
    with open(run / "log.jsonl", "a") as f:
        f.write('{"it": 30, "dm"')
    assert tail.read() == []
    with open(run / "log.jsonl", "a") as f:
        f.write(": 1}\n")
    assert tail.read() == [dict(it=30, dm=1)]


@pytest.mark.parametrize("its", [[10], [10, 25], [10, 25, 30, 40]])
def test_a_log_that_a_resume_has_cut(run, its):
    """Shorter, as long as before, or longer by the time of the next look."""
    tail = Tail(run / "log.jsonl")
    tail.read()
    write(run, *(dict(LINE, it=it) for it in its), mode="w")
    assert [line["it"] for line in tail.read()] == its
    assert tail.read() == []


@pytest.mark.parametrize("text", ["5\n", "{\n", '{"it": "x"}\n', '{"dm": 1}\n'])
def test_a_file_that_is_no_log(run, text):
    (run / "log.jsonl").write_text(text)
    with pytest.raises(UserError, match="log.jsonl: expected a JSON object with `it` a line"):
        Tail(run / "log.jsonl").read()


def test_scalars():
    expected = dict(images=640, skipped=0, lr=1e-3, dm=0.5, alarms=1)
    expected |= {"alarms/off": 1, "time/seconds": 1.5, "time/peak_mb": 300}
    assert scalars(LINE) == expected
    assert scalars(dict(it=1, x=float("nan"), alarms=[], time="late")) == dict(alarms=0)


# ---- trackers ------------------------------------------------------------------------------------


def test_a_table(run):
    main([str(run), "--to", "csv"])
    first, second = table(run / "log.csv")
    assert (first["it"], first["dm"], first["alarms/off"], first["late"]) == (
        "10",
        "0.5",
        "1.0",
        "",
    )
    assert (second["it"], second["late"], second["time/seconds"]) == ("20", "2.0", "1.5")


def test_a_table_takes_each_iteration_once(tmp_path):
    rows = Table(tmp_path / "x.csv")
    for it, values in [(1, dict(a=1.0)), (2, dict(a=2.0)), (3, dict(a=3.0)), (2, dict(b=5.0))]:
        rows.add(it, values)
    rows.add(4, dict(b=6.0))
    rows.close()
    found = [(row["it"], row["a"], row["b"]) for row in table(tmp_path / "x.csv")]
    assert found == [("1", "1.0", ""), ("2", "", "5.0"), ("3", "3.0", ""), ("4", "", "6.0")]


def test_follow(run, tmp_path):
    """A line comes between two looks, and is in the file before the third."""
    seen = []

    def wait():
        seen.append(len(table(run / "x.csv")))
        write(run, dict(LINE, it=20 + 10 * len(seen)))
        return len(seen) < 3

    assert follow(Tail(run / "log.jsonl"), Table(run / "x.csv"), wait) == 4
    assert seen == [2, 3, 4]


class Recorder:
    """Stands in for SummaryWriter and for a run of wandb."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs, self.logged, self.is_open = args, kwargs, [], True

    def add_scalar(self, name, value, step):
        self.logged.append((step, name, value))

    def log(self, values, step):
        self.logged += [(step, name, value) for name, value in values.items()]

    def flush(self):
        pass

    def close(self):
        self.is_open = False

    finish = close


def test_tensorboard(run, monkeypatch):
    made = []
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda folder: made.append(Recorder(folder)) or made[-1]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    main([str(run), "--to", "tensorboard"])
    (writer,) = made
    assert writer.args == (run / "tensorboard",)
    assert (10, "dm", 0.5) in writer.logged
    assert (20, "late", 2.0) in writer.logged
    assert not writer.is_open


def test_wandb(run, monkeypatch):
    made = []
    fake = SimpleNamespace(init=lambda **kwargs: made.append(Recorder(**kwargs)) or made[-1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    main([str(run), "--to", "wandb"])
    (tracker,) = made
    assert tracker.kwargs == dict(project="dmd2", name=run.name, config=dict(lr=1e-3))
    assert (10, "alarms/off", 1.0) in tracker.logged
    assert not tracker.is_open
    with pytest.raises(UserError, match="--out: wandb chooses its own folder"):
        main([str(run), "--to", "wandb", "--out", "x"])


@pytest.mark.parametrize(
    "kind, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")]
)
def test_a_tracker_that_is_missing(run, monkeypatch, kind, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"--to {kind}: pip install {kind}"):
        main([str(run), "--to", kind])


def test_mistakes(run, tmp_path):
    with pytest.raises(UserError, match="expected the folder of a run, found no run.jsonl"):
        main([str(tmp_path / "none"), "--to", "csv"])
    with pytest.raises(UserError, match="--out .*: not written"):
        main([str(run), "--to", "csv", "--out", str(tmp_path / "none" / "x.csv")])
    (run / "log.jsonl").unlink()
    with pytest.raises(UserError, match="log.jsonl: expected the log of a run"):
        main([str(run), "--to", "csv"])
    assert not (run / "log.csv").exists()
