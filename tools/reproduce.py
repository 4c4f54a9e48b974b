"""Runs the commands of rows of docs/RESULTS.md again and compares the results with the page.

    python -m tools.reproduce --list                       # rows that can be run; why others cannot
    python -m tools.reproduce --rows 2                     # two random rows, one seed of each
    python -m tools.reproduce --match "toy"                # rows whose command matches
    python -m tools.reproduce --every-seed --out again     # everything; run again to continue

A row is read from a table with a column `command` and a column whose heading begins with fd, FID or
energy distance. Its seeds are in a column `seeds` or in that heading. The cell holds one value a
seed, or a mean and the values in brackets. The commands of a row run one after the other, with
--seed S --out FOLDER added; OUT in a later command stands for that folder.

A result is accepted between the least and the greatest value of the row, widened on both sides by
--tolerance times their mean: one seed says nothing about the spread, and one seed differs between
machines (docs/RESULTS.md: 15.83 and 14.33). Energy distances are widened by another 0.002, the
noise of 5,000 points. The last line is OK or the number of rows outside; the exit code is 0 or 1.
"""

import argparse
import json
import random
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from common.files import ROOT

METRICS = {"fd": "fd", "FID": "fid", "energy distance": "energy_distance"}  # heading -> key
NOISE = {"energy_distance": 0.002}


# ---- reading the page ----------------------------------------------------------------------------


def read_tables(text):
    """Markdown -> for each table a list of rows, each a dict by heading."""
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.M):
        lines = []
        for line in block.splitlines():
            cells = re.split(r"(?<!\\)\|", line.strip())[1:-1]
            lines.append([cell.strip() for cell in cells])
        if len(lines) < 3:
            continue
        headings, rule, *rows = lines
        if set("".join(rule)) <= set("-: "):
            yield [dict(zip(headings, row)) for row in rows]


def read_numbers(cell):
    """'14.3 (15.8, 13.7)' or '15.8, 13.7' -> [15.8, 13.7]; '69.3 (too high)' -> [69.3]."""
    in_brackets = re.search(r"\(([-+\d.,e ]+)\)", cell)
    if in_brackets:
        text = in_brackets[1]
    else:
        text = re.sub(r"\(.*?\)", "", cell)
    try:
        return [float(value) for value in text.split(",")]
    except ValueError:
        return []


def metric_heading(headings):
    """-> (heading, key) of the column that is compared, or None."""
    for heading in headings:
        for metric, key in METRICS.items():
            if heading == metric or heading.startswith((f"{metric},", f"{metric} (")):
                return heading, key
    return None


def read_rows(text):
    """-> list of dict(commands, metric, values, seeds); `why` says why a row cannot be run."""
    rows = []
    for table in read_tables(text):
        found = metric_heading(table[0])
        if found is None or "command" not in table[0]:
            continue
        heading, metric = found
        for cells in table:
            row = dict(
                commands=re.findall(r"`([^`]+)`", cells["command"]),
                metric=metric,
                values=read_numbers(cells[heading]),
            )
            row["seeds"] = read_seeds(cells, heading, len(row["values"]))
            why = why_not(row, heading)
            if why:
                row["why"] = why
            rows.append(row)
    return rows


def read_seeds(cells, heading, n):
    """Seeds of a row with n values; [0] if none are named."""
    in_heading = re.search(r"seeds ([\d, ]+)", heading)
    text = cells.get("seeds", in_heading[1] if in_heading else "")
    seeds = [int(seed) for seed in re.findall(r"\d+", text)]
    return seeds[:n] or [0]


def why_not(row, heading):
    """Why a row cannot be run, or None."""
    commands = row["commands"]
    if not commands:
        return "no command"
    if not row["values"]:
        return f"no value in the column {heading}"
    # (script, first argument) of each command
    scripts = []
    for command in commands:
        match = re.match(r"python (\w+)\.py(?: (--teacher|OUT)| |$)", command)
        if not match or not (ROOT / f"{match[1]}.py").is_file():
            return "not a command of a script here"
        scripts.append((match[1], match[2]))
    if scripts[0][0] == "eval" and scripts[0][1] != "--teacher":
        return "measures a run of another row"
    if any(name == "eval" and first != "OUT" for name, first in scripts[1:]):
        return "measures a run of another row"
    for word in " ".join(commands).split():
        if re.fullmatch("[A-Z]+", word) and word != "OUT":
            return f"{word} stands for a folder of yours"
    if len(row["values"]) not in (1, len(row["seeds"])):
        return f"{len(row['values'])} values for {len(row['seeds'])} seeds"
    return None


def accepted(row, tolerance):
    """-> lowest and highest value that agrees with the row."""
    values = row["values"]
    mean = sum(values) / len(values)
    margin = tolerance * abs(mean) + NOISE.get(row["metric"], 0.0)
    return min(values) - margin, max(values) + margin


# ---- running a row -------------------------------------------------------------------------------


def call(words, log):
    """Runs one command -> its standard output. All output goes to the file `log` as well.

    RuntimeError with the last line of its errors if it fails."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    with open(log, "a") as f:
        f.write(f"$ python {shlex.join(words)}\n{done.stdout}{done.stderr}")
    if done.returncode:
        errors = done.stderr.strip().splitlines() or ["nothing was printed"]
        raise RuntimeError(f"exit code {done.returncode}: {errors[-1]}")
    return done.stdout


def run(row, seed, home):
    """Runs the commands of a row that were not finished before -> the metrics of the last one."""
    name = " ".join(row["commands"]).lower().replace("python ", "")
    slug = re.sub(r"[^a-z0-9.]+", "-", name).strip("-")[:100]
    out = home / f"{slug}-seed{seed}"
    state = home / f"{slug}-seed{seed}.json"  # metrics of the commands that are done
    done = json.loads(state.read_text()) if state.is_file() else []
    for command in row["commands"][len(done) :]:
        words = [str(out) if word == "OUT" else word for word in shlex.split(command)[1:]]
        words += ["--seed", str(seed)]
        if words[0] == "eval.py":
            output = call([*words, "--out", f"{out}.jsonl"], f"{out}.log")
            result = json.loads(output.splitlines()[-1])
        else:
            words += ["--out", str(out)]
            was_stopped = any((out / "ckpt").glob("it-*.pt"))
            if was_stopped and "--resume" not in words:
                words.append("--resume")
            call(words, f"{out}.log")
            result = json.loads((out / "metrics.json").read_text())
        done.append(result)
        state.write_text(json.dumps(done))
    return done[-1]


# ---- command line --------------------------------------------------------------------------------


def parse_args(argv):
    p = argparse.ArgumentParser(
        prog="reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = p.add_argument
    add("--results", default=ROOT / "docs" / "RESULTS.md", type=Path, help="markdown with tables")
    add("--rows", type=int, help="number of random rows; default: all")
    add("--match", default="", help="only rows whose commands match this regular expression")
    add("--choice", type=int, help="seed of the random choice; default: a new one each time")
    add("--every-seed", action="store_true", help="all seeds of a row; default: a random one")
    add("--tolerance", type=float, default=0.15, help="share of the mean added to the range")
    add("--out", type=Path, help="folder of the runs, kept; default: a temporary one")
    add("--list", action="store_true", help="only print the rows")
    return p.parse_args(argv)


def describe(row):
    commands = ", then ".join(row["commands"]) or "?"
    if "why" in row:
        return f"{commands}: {row['why']}"
    return f"{commands}: {row['metric']} {row['values']} (seeds {row['seeds']})"


def check(row, seed, args, home):
    """Runs a row with one seed and prints a line of the table -> is the result accepted?"""
    low, high = accepted(row, args.tolerance)
    try:
        value = run(row, seed, home)[row["metric"]]
        verdict = "within" if low <= value <= high else "OUTSIDE"
        found = f"{value:.4g}"
    except RuntimeError as e:
        verdict = f"FAILED, {e}"
        found = "-"
    commands = ", then ".join(f"`{command}`" for command in row["commands"])
    values = ", ".join(f"{value:.4g}" for value in row["values"])
    stated = f"{row['metric'].replace('_', ' ')} {values}"
    cells = [commands, seed, stated, f"{low:.4g} to {high:.4g}", found, verdict]
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return verdict == "within"


def main(argv=None):
    args = parse_args(argv)
    rows = []
    for row in read_rows(args.results.read_text()):
        if re.search(args.match, " ".join(row["commands"])):
            rows.append(row)
    if args.list:
        print("\n".join(map(describe, rows)))
        return 0

    rows = [row for row in rows if "why" not in row]
    if not rows:
        print(
            f"reproduce: {args.results}: expected rows that can be run, found none;"
            " --list gives the reasons",
            file=sys.stderr,
        )
        return 2
    choice = random.Random(args.choice)
    if args.rows:
        rows = choice.sample(rows, min(args.rows, len(rows)))

    outside = 0
    with tempfile.TemporaryDirectory(prefix="distil-") as temporary:
        home = args.out or Path(temporary)
        home.mkdir(parents=True, exist_ok=True)
        print("| command | seed | stated | accepted | found | |\n|---|---|---|---|---|---|")
        for row in rows:
            seeds = row["seeds"] if args.every_seed else [choice.choice(row["seeds"])]
            for seed in seeds:
                if not check(row, seed, args, home):
                    outside += 1
    print(f"{outside} outside or failed" if outside else "OK")
    return int(outside > 0)


if __name__ == "__main__":
    sys.exit(main())
