"""Dry runs of full-size teachers: memory, work and what it takes to find them out.

    python -m tools.dry_runs                  # the rows that docs/dry_runs.json does not have yet
    python -m tools.dry_runs --match sdxl     # these rows, again
    python -m tools.dry_runs --table          # writes the tables of docs/scale.md, docs/teachers.md

Each row is a command, which runs in a process of its own, one after the other, and is kept as soon
as it ends. Nothing is downloaded and no GPU is used.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.errors import RunError, UserError, launch
from common.files import ROOT, atomic, git_revision, read_json, write_json

RESULTS = ROOT / "docs" / "dry_runs.json"
PAGE = ROOT / "docs" / "scale.md"
TEACHERS_PAGE = ROOT / "docs" / "teachers.md"
TEACHERS = "| `--teacher` | what | parameters |"  # how its table of teachers begins
FIRST, LAST = "<!-- dry runs: python -m tools.dry_runs --table -->\n", "<!-- end of dry runs -->\n"

LORA = "--lora 64 --lora-fake 64"
SHARD = "--shard --processes 8"
ONE_LORA = "--lora 64"  # of scripts whose critic is the student, or who have none
NETWORKS = {"": "whole", LORA: "`--lora 64`", SHARD: "`--shard`, 8 processes", "--gan": "`--gan`"}
NETWORKS[ONE_LORA] = NETWORKS[LORA]
# script, teacher, {flags of NETWORKS: sizes of a process's batch}
ROWS = [
    ("dmd2", "sd15", {"": (1, 8), LORA: (1, 8), SHARD: (1,)}),
    ("dmd2", "sdxl", {"": (1, 8), LORA: (1, 8), SHARD: (1, 8), "--gan": (1,)}),
    ("dmd2", "sd3", {"": (1, 8), LORA: (1, 8), SHARD: (1,)}),
    ("dmd2", "sana", {"": (1, 8), LORA: (1, 8), SHARD: (1,)}),
    ("dmd2", "flux", {"": (1,), LORA: (1, 8), SHARD: (1,)}),
    ("dmd2", "chroma", {LORA: (1,)}),
    ("dmd2", "hunyuan-image", {LORA: (1,)}),
    ("dmd2", "flux-kontext", {LORA: (1,)}),
    ("dmd2", "lumina2", {LORA: (1,)}),
    ("dmd2", "qwen-image", {"": (1,), LORA: (1,), SHARD: (1,)}),
    ("dmd2", "qwen-image-edit", {LORA: (1,)}),
    ("dmd2", "z-image", {"": (1,), LORA: (1,), SHARD: (1,)}),
    ("dmd2", "wan2.1", {"": (1,), LORA: (1,), SHARD: (1,)}),
    ("dmd2", "wan2.1-14b", {"": (1,), LORA: (1,), SHARD: (1,)}),
    ("dmd2", "wan2.2", {"": (1,), LORA: (1,), SHARD: (1,)}),
    ("dmd2", "wan2.2-5b", {LORA: (1,)}),
    ("dmd2", "sana-video", {LORA: (1,)}),
    ("dmd2", "ltx-video", {LORA: (1,)}),
    ("dmd2", "hunyuanvideo-1.5", {LORA: (1,)}),
    ("dmd2", "dit-xl-256", {"": (1, 8), LORA: (1, 8), SHARD: (1,)}),
    ("sid", "sdxl", {LORA: (1,)}),
    ("decoupled_dmd", "sdxl", {LORA: (1,)}),
    ("phased_dmd", "wan2.2", {LORA: (1,)}),
    ("msd", "sdxl", {LORA: (1,)}),
    ("sana_sprint", "sana", {"": (1,)}),
    ("sana_sprint", "sana-sprint-teacher", {"": (1,)}),
    ("twinflow", "sana", {"": (4,)}),  # one sample for each of its groups
    ("twinflow", "qwen-image", {ONE_LORA: (4,)}),
    ("flowmap", "sdxl", {LORA: (1,)}),
    ("boot", "sdxl", {ONE_LORA: (1,)}),
]


def commands():
    """{command: (script, teacher, networks, batch of a process)} of all rows."""
    found = {}
    for script, teacher, kinds in ROWS:
        for flags, batch in [(flags, n) for flags, sizes in kinds.items() for n in sizes]:
            total = batch * 8 if flags == SHARD else batch
            words = f"{script}.py --teacher {teacher} {flags} --grad-checkpoint"
            command = " ".join(f"{words} --batch {total} --dry-run".split())
            found[command] = script, teacher, NETWORKS[flags], batch
    return found


def run(command):
    """One dry run -> what is kept of it. RunError with its last line if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        start = time.monotonic()
        with open(log, "w") as f:
            argv = [sys.executable, *command.split(), "--out", folder]
            process = subprocess.Popen(argv, cwd=ROOT, stdout=f, stderr=subprocess.STDOUT)
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RunError(f"{command}: {log.read_text().strip()[-300:]}")
        result = json.loads((Path(folder) / "dryrun.json").read_text())
    waits = {line for turn in result["turns"] for line in turn["waits"]}
    return dict(
        date=time.strftime("%Y-%m-%d"),
        peak=result["peak"],
        at_rest=result["at_rest"],
        parts=result["parts"],
        tflop_per_iteration=round(result["tflop_per_iteration"], 2),
        sent_per_iteration=round(result["sent_per_iteration"]),
        waits=sorted(waits),
        host_seconds=round(time.monotonic() - start),
        host_cpu_seconds=round(used.ru_utime + used.ru_stime),
        host_bytes=used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    )


def gigabytes(n):
    return f"{n / 2**30:.1f}"


def table(results):
    """Markdown, in the order of ROWS; rows that have not run yet are left out."""
    head = ["script", "`--teacher`", "networks", "batch", "peak, GB", "at rest, GB"]
    head += ["TFLOP per iteration", "GB sent", "host: CPU time", "host: memory, GB"]
    lines = [head, ["---"] * len(head)]
    for command, row in commands().items():
        if command not in results:
            continue
        found = results[command]
        sent = found["sent_per_iteration"]
        cells = [*map(str, row), gigabytes(found["peak"]), gigabytes(found["at_rest"])]
        cells += [f"{found['tflop_per_iteration']:.4g}", gigabytes(sent) if sent else ""]
        cells += [f"{found['host_cpu_seconds']} s", gigabytes(found["host_bytes"])]
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def write_table(results):
    before, rest = PAGE.read_text().split(FIRST)
    after = rest.split(LAST)[1]
    with atomic(PAGE) as f:
        f.write(f"{before}{FIRST}\n{table(results)}\n{LAST}{after}".encode())


def with_peaks(text, results):
    """The text of docs/teachers.md, the last three cells of each row of its table filled in."""
    before, head, rest = text.partition(TEACHERS)
    rows, end, after = rest.partition("\n\n")
    filled = []
    for row in rows.splitlines():
        name = re.match(r"\| `([\w.-]+)`", row)
        if name:
            cells = [cell.strip() for cell in row.split("|")[1:4]]
            cells += [peak_of(results, name[1], flags) for flags in ("", LORA, SHARD)]
            row = f"| {' | '.join(cells)} |"
        filled.append(row)
    return before + head + "\n".join(filled) + end + after


def peak_of(results, teacher, flags):
    """Of dmd2 with one sample a process; empty if it has not run."""
    wanted = "dmd2", teacher, NETWORKS[flags], 1
    for command, row in commands().items():
        if row == wanted and command in results:
            return f"{gigabytes(results[command]['peak'])} GB"
    return ""


def main():
    p = argparse.ArgumentParser(prog="python -m tools.dry_runs", description=__doc__)
    p.add_argument("--match", metavar="TEXT", help="rows whose command contains this")
    p.add_argument("--table", action="store_true", help="only write the table")
    p.add_argument("--results", type=Path, default=RESULTS, help="JSON file of all rows")
    options = p.parse_args()

    revision = git_revision()  # before results are written into the tree
    kept = read_json(options.results) if options.results.is_file() else {}
    chosen = [c for c in commands() if (options.match in c if options.match else c not in kept)]
    if options.match and not chosen:
        raise UserError(f"--match {options.match}: expected a part of a row's command, found none")
    for command in [] if options.table else chosen:
        print(command, flush=True)
        kept[command] = dict(revision=revision, **run(command))
        write_json(options.results, kept)
        found = kept[command]
        print(f"  {gigabytes(found['peak'])} GB, {found['host_seconds']} s", flush=True)
    if options.results == RESULTS:
        write_table(kept)
        filled = with_peaks(TEACHERS_PAGE.read_text(), kept)
        with atomic(TEACHERS_PAGE) as f:
            f.write(filled.encode())


if __name__ == "__main__":
    launch(main)
