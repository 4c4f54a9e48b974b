"""tools/dry_runs.py: the table of dry runs in docs/scale.md."""

import json
import re

import pytest

import dmd2
from common.errors import RunError
from common.files import ROOT
from dryrun.run import PEAK_TFLOPS, UTILISATION
from tools import dry_runs

README = ROOT / "README.md"


def test_the_page_has_the_table_of_the_results():
    results = json.loads(dry_runs.RESULTS.read_text())
    assert set(results) <= set(dry_runs.commands()), "rows that the tool does not run"
    section = dry_runs.PAGE.read_text().split(dry_runs.FIRST)[1].split(dry_runs.LAST)[0]
    assert section.strip() == dry_runs.table(results).strip()


def test_the_figures_of_the_readme_are_those_of_the_results():
    results = json.loads(dry_runs.RESULTS.read_text())
    rows = re.findall(
        r"\| (\d+) GB \| `(\S+\.py .+ --dry-run)` \| ([\d.]+) GB \| (\d+) \|", README.read_text()
    )
    assert len(rows) >= 4
    for gpu, command, peak, hours in rows:
        assert dry_runs.gigabytes(results[command]["peak"]) == peak, command
        assert float(peak) < 0.95 * float(gpu), command
        words = command.split()
        preset = dmd2.PRESETS[words[words.index("--teacher") + 1]]
        images = preset["batch"] * preset["iters"]
        batch = int(words[words.index("--batch") + 1])
        if "--processes" in words:  # work is that of one process
            batch /= int(words[words.index("--processes") + 1])
        tflop = results[command]["tflop_per_iteration"] / batch
        speed = PEAK_TFLOPS["H100"] * UTILISATION  # TFLOP/s
        assert f"{images * tflop / speed / 3600:.2g}" == f"{int(hours):.2g}", command


def test_the_table_of_teachers_has_the_peaks_of_the_results():
    results = json.loads(dry_runs.RESULTS.read_text())
    text = dry_runs.TEACHERS_PAGE.read_text()
    assert dry_runs.with_peaks(text, results) == text
    memory = text.split("\n## Memory\n")[1]
    row = re.search(r"\n\| `sdxl` \|.*", memory)[0].split("|")
    peaks = [results[c]["peak"] for c in results if c.startswith("dmd2.py --teacher sdxl --grad")]
    assert f" {dry_runs.gigabytes(min(peaks))} GB " in row


def test_a_row_of_the_table():
    row = dict(
        peak=3 * 2**29,
        at_rest=2**30,
        tflop_per_iteration=12.345,
        sent_per_iteration=0,
        host_cpu_seconds=60,
        host_bytes=2**29,
    )
    command = "dmd2.py --teacher sd15 --grad-checkpoint --batch 8 --dry-run"
    *_, line = dry_runs.table({command: row}).splitlines()
    assert line == "| dmd2 | sd15 | whole | 8 | 1.5 | 1.0 | 12.35 |  | 60 s | 0.5 |"
    for command, (_, _, networks, batch) in dry_runs.commands().items():
        if networks.startswith("`--shard`"):  # the command's batch is that of all processes
            assert f"--processes 8 --grad-checkpoint --batch {8 * batch} " in command


def test_a_command_is_run_and_its_own_memory_counted():
    row = dry_runs.run("dmd2.py --teacher toy --batch 8 --dry-run")
    assert row["peak"] > row["at_rest"] > 0
    assert sum(row["parts"].values()) == row["peak"]
    assert 2**27 < row["host_bytes"] < 2**32
    assert 0 < row["host_cpu_seconds"]


def test_a_command_that_fails():
    with pytest.raises(RunError, match="toyy"):
        dry_runs.run("dmd2.py --teacher toyy --dry-run")
