"""tools/reproduce.py: which rows of a page can be run, and what it does with their results."""

import json
from pathlib import Path

import pytest

from common.files import ROOT
from tools import reproduce

PAGE = """
text
| command | NFE | fd, seeds 0, 1, 2 | KID |
|---|---|---|---|
| `python dmd2.py`, remarks | 1 | 15.83, 13.73, 13.39 | 68 |
| `python dmd2.py --iters 3`, then `python dmd2.py --iters 4 --resume` | 1 | 9.08 | 37 |
| the same checkpoint, `python eval.py out/x --nfe 1,2` | 2, 4 | 13.62, 9.50 | |
| `python sana_sprint.py` | 1 | 69.3 (misses the aim of 24) | 1 |
| `python train.py` | 1 | 1.0 | 1 |
| `python sid.py` | 1 | soon | 1 |
| `python boot.py` | 1 | 1.0, 2.0, 3.0, 4.0 | 1 |
| `python dmd2.py --gan --data IMAGES` | 1 | 2.0 | 1 |

| what | fd |
|---|---|
| `python dmd2.py --ratio 9` | 24.0 |

| name | energy distance | seeds | command |
|---|---|---|---|
| a | 0.0021 (0.0020, 0.0022) | 3, 5 | `python boot.py --teacher toy`, then `python eval.py OUT` |
| t | 0.6786 | - | `python eval.py --teacher toy --nfe 1 --cfg 1` |
"""

# values, seeds and metric of each row, and why it cannot be run
ROWS = [
    ([15.83, 13.73, 13.39], [0, 1, 2], "fd", None),
    ([9.08], [0], "fd", None),
    ([13.62, 9.5], [0, 1], "fd", "measures a run of another row"),
    ([69.3], [0], "fd", None),
    ([1.0], [0], "fd", "not a command of a script here"),
    ([], [0], "fd", "no value in the column fd, seeds 0, 1, 2"),
    ([1.0, 2.0, 3.0, 4.0], [0, 1, 2], "fd", "4 values for 3 seeds"),
    ([2.0], [0], "fd", "IMAGES stands for a folder of yours"),
    ([0.002, 0.0022], [3, 5], "energy_distance", None),
    ([0.6786], [0], "energy_distance", None),
]


def test_reading_rows():
    rows = reproduce.read_rows(PAGE)
    found = [(row["values"], row["seeds"], row["metric"], row.get("why")) for row in rows]
    assert found == ROWS
    assert rows[1]["commands"] == ["python dmd2.py --iters 3", "python dmd2.py --iters 4 --resume"]


def test_accepted_range():
    rows = reproduce.read_rows(PAGE)
    margin = 0.15 * 14.3167
    expected = (13.39 - margin, 15.83 + margin)
    assert reproduce.accepted(rows[0], 0.15) == pytest.approx(expected, abs=1e-3)
    margin = 0.1 * 0.0021 + 0.002
    expected = (0.002 - margin, 0.0022 + margin)
    assert reproduce.accepted(rows[8], 0.1) == pytest.approx(expected)


def test_the_page_has_rows_that_can_be_run():
    rows = reproduce.read_rows((ROOT / "docs" / "RESULTS.md").read_text())
    assert sum("why" not in row for row in rows) >= 10


class Reproduced:
    """main() on PAGE, with runs that are not made but have the metrics `found`."""

    def __init__(self, monkeypatch, capsys, folder):
        self.monkeypatch = monkeypatch
        self.capsys = capsys
        self.folder = folder

    def __call__(self, out, *flags, error=None, **found):
        """Sets code, lines (printed) and calls (words of each command)."""
        self.calls = []

        def call(words, log):
            self.calls.append(words)
            if error:
                raise RuntimeError(error)
            folder = Path(words[words.index("--out") + 1])
            if words[0] != "eval.py":
                folder.mkdir(exist_ok=True)
                (folder / "metrics.json").write_text(json.dumps(found))
            return f"progress\n{json.dumps(found)}\n"

        self.monkeypatch.setattr(reproduce, "call", call)
        page = self.folder / "RESULTS.md"
        page.write_text(PAGE)
        argv = ["--results", page, "--out", self.folder / out, *flags]
        self.code = reproduce.main([str(word) for word in argv])
        self.lines = self.capsys.readouterr().out.splitlines()
        return self


@pytest.fixture
def reproduced(monkeypatch, capsys, tmp_path):
    return Reproduced(monkeypatch, capsys, tmp_path)


def test_a_result_within_the_range(reproduced):
    run = reproduced("a", "--match", "dmd2.py$", fd=17.0)
    assert run.code == 0
    assert "| within |" in run.lines[2]
    assert run.lines[-1] == "OK"
    assert len(run.calls) == 1
    assert run.calls[0][:2] == ["dmd2.py", "--seed"]


def test_a_result_outside_the_range(reproduced):
    run = reproduced("a", "--match", "dmd2.py$", fd=18.1)
    assert run.code == 1
    assert "OUTSIDE" in run.lines[2]
    assert run.lines[-1].startswith("1 outside")


def test_a_run_that_fails(reproduced):
    run = reproduced("a", "--match", "sana", error="exit code 1: out of luck")
    assert run.code == 1
    assert "FAILED, exit code 1: out of luck" in run.lines[2]


def test_no_row_matches(reproduced):
    assert reproduced("a", "--match", "no such command").code == 2


def test_every_seed_once(reproduced):
    run = reproduced("a", "--match", "dmd2.py$", "--every-seed", fd=14.0)
    assert [words[words.index("--seed") + 1] for words in run.calls] == ["0", "1", "2"]
    folders = {words[words.index("--out") + 1] for words in run.calls}
    assert len(folders) == 3
    run = reproduced("a", "--match", "dmd2.py$", "--every-seed", fd=14.0)
    assert run.code == 0
    assert run.calls == []  # the second time, everything is there


def test_commands_of_a_row_share_a_folder(reproduced):
    first, second = reproduced("a", "--match", "resume", fd=9.0).calls
    assert first[:3] == ["dmd2.py", "--iters", "3"]
    assert second.count("--resume") == 1
    assert first[first.index("--out") + 1] == second[second.index("--out") + 1]


def test_out_stands_for_the_folder_of_the_run(reproduced):
    run = reproduced("a", "--match", "boot.*toy", energy_distance=0.001)
    training, measuring = run.calls
    folder = training[training.index("--out") + 1]
    assert measuring[:2] == ["eval.py", folder]
    assert run.code == 0


def test_a_teacher_is_measured_alone(reproduced):
    run = reproduced("a", "--match", "eval.py --teacher", energy_distance=0.7)
    assert run.code == 0
    assert run.calls[0][:3] == ["eval.py", "--teacher", "toy"]


def test_a_stopped_run_is_resumed(reproduced, tmp_path):
    checkpoints = tmp_path / "a" / "sana-sprint.py-seed0" / "ckpt"
    checkpoints.mkdir(parents=True)
    (checkpoints / "it-00000005.pt").touch()
    run = reproduced("a", "--match", "sana", fd=69.0)
    assert run.calls[0][-1] == "--resume"


def test_rows_are_chosen_at_random(reproduced):
    picks = set()
    for seed in range(6):
        flags = ["--rows", 2, "--choice", seed]
        run = reproduced(f"a{seed}", *flags, fd=14.0, energy_distance=0.0)
        picks.add(tuple(words[0] for words in run.calls))
    assert len(picks) > 2


def test_it_runs_what_is_written(scripts, monkeypatch, capsys, tmp_path):
    """The value on the page is the result of the command, exactly on the machine that made it."""
    flags = ["--teacher", "toy", "--iters", "3", "--eval-n", "50"]
    scripts.run("boot.py", *flags, "--seed", 2, "--out", tmp_path / "run")
    value = json.loads((tmp_path / "run" / "metrics.json").read_text())["energy_distance"]
    command = f"python boot.py {' '.join(flags)}"
    page = tmp_path / "RESULTS.md"
    argv = ["--results", str(page), "--tolerance", "1e-4", "--out", str(tmp_path / "again")]

    def call(words, log):
        return scripts.run(words[0], *words[1:]).out

    monkeypatch.setattr(reproduce, "call", call)
    head = "| command | energy distance | seeds |\n|---|---|---|\n"
    page.write_text(f"{head}| `{command}` | {value:.6f} | 2 |\n")
    assert reproduce.main(argv) == 0
    page.write_text(f"{head}| `{command}` | {value + 0.01:.6f} | 2 |\n")
    assert reproduce.main(argv) == 1
    assert "OUTSIDE" in capsys.readouterr().out
