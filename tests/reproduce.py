"""Runs rows of docs/RESULTS.md again, as their commands say, and compares what comes out with what is stated.

    python -m tests.reproduce --list                                     # the rows that can be run, and why others can not
    python -m tests.reproduce --rows 2                                   # two rows by chance, one seed of each
    python -m tests.reproduce --match "toy"                              # rows whose command matches
    python -m tests.reproduce --every-seed --out out/reproduce           # all of it, unattended; the same command goes on where it was stopped

A row belongs to a table with a column `command` and one that begins with fd, FID or energy distance; its seeds are in a column `seeds` or in that heading.
The cell holds one value for each seed, or a mean and, in brackets, the values. Commands run one after the other, with --seed S --out FOLDER added; OUT stands
for that folder in later ones. Accepted is what lies between the least and the greatest value that the row states, widened on both sides by --tolerance times
their mean: one seed says nothing about the spread, and the same seed differs between machines (docs/RESULTS.md: 15.83 and 14.33). Energy distances have 0.002
beside that, the noise of 5,000 points. The last line is OK or the number of rows outside; exit code 0 or 1.
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

ROOT = Path(__file__).resolve().parent.parent
METRICS = {"fd": "fd", "FID": "fid", "energy distance": "energy_distance"}
NOISE = {"energy_distance": 0.002}


def tables(text):
    """Markdown -> for each table a list of rows, each a dict by heading."""
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.M):
        cells = [
            [c.strip() for c in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
            for line in block.splitlines()
        ]
        if len(cells) > 2 and set("".join(cells[1])) <= set("-: "):
            yield [dict(zip(cells[0], row)) for row in cells[2:]]


def numbers(cell):
    """'14.3 (15.8, 13.7)' -> [15.8, 13.7]; '15.8, 13.7' the same; '69.3 (misses the aim)' -> [69.3]; no number: []."""
    each = re.search(r"\(([-+\d.,e ]+)\)", cell)
    found = (each[1] if each else re.sub(r"\(.*?\)", "", cell)).split(",")
    try:
        return [float(v) for v in found]
    except ValueError:
        return []


def read_rows(text):
    """-> list of dict(commands, metric, values, seeds), or dict(commands, why) for a row that can not be run."""
    rows = []
    for table in tables(text):
        heading = next(
            (
                h
                for h in table[0]
                if any(h == m or h.startswith((m + ",", m + " (")) for m in METRICS)
            ),
            None,
        )
        for cells in table if heading and "command" in table[0] else ():
            commands, values = re.findall(r"`([^`]+)`", cells["command"]), numbers(cells[heading])
            row = dict(
                commands=commands,
                metric=next(k for m, k in METRICS.items() if heading.startswith(m)),
                values=values,
            )
            listed = re.search(r"seeds ([\d, ]+)", heading)
            seeds = cells.get("seeds", listed[1] if listed else "")
            row["seeds"] = [int(s) for s in re.findall(r"\d+", seeds)][: len(values)] or [0]
            scripts = [re.match(r"python (\w+)\.py( --teacher| OUT|$| )", c) for c in commands]
            alone = bool(commands) and commands[0].startswith("python eval.py --teacher ")
            if not commands:
                row["why"] = "no command"
            elif not values:
                row["why"] = f"no value in the column {heading}"
            elif not all(scripts) or any(not (ROOT / f"{s[1]}.py").is_file() for s in scripts):
                row["why"] = "not a command of a script here"
            elif (
                not alone
                and scripts[0][1] == "eval"
                or any(s[1] == "eval" and s[2] != " OUT" for s in scripts[1:])
            ):
                row["why"] = "measures a run of another row"
            elif blank := next(
                (
                    w
                    for c in commands
                    for w in c.split()
                    if re.fullmatch("[A-Z]+", w) and w != "OUT"
                ),
                None,
            ):
                row["why"] = f"{blank} stands for a folder of yours"
            elif len(values) not in (1, len(row["seeds"])):
                row["why"] = f"{len(values)} values for {len(row['seeds'])} seeds"
            rows.append(row)
    return rows


def accepted(row, tolerance):
    """-> lowest and highest value that agrees with the row."""
    mean, noise = sum(row["values"]) / len(row["values"]), NOISE.get(row["metric"], 0.0)
    return min(row["values"]) - tolerance * abs(mean) - noise, max(row["values"]) + tolerance * abs(
        mean
    ) + noise


def call(words, log):
    """One command; its output goes to a file as well. -> its standard output. RuntimeError with the last line of its errors if it fails."""
    p = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with open(log, "a") as f:
        f.write(f"$ python {shlex.join(words)}\n{p.stdout}{p.stderr}")
    if p.returncode:
        raise RuntimeError(
            f"exit code {p.returncode}: {(p.stderr.strip().splitlines() or ['nothing was printed'])[-1]}"
        )
    return p.stdout


def run(row, seed, home):
    """The row's commands, with what is done already left out -> the metrics of the last one."""
    slug = re.sub(
        r"[^a-z0-9.]+", "-", " ".join(row["commands"]).lower().replace("python ", "")
    ).strip("-")[:100]
    out, state = home / f"{slug}-seed{seed}", home / f"{slug}-seed{seed}.json"
    done = json.loads(state.read_text()) if state.is_file() else []
    for command in row["commands"][len(done) :]:
        words = [str(out) if w == "OUT" else w for w in shlex.split(command)[1:]]
        if words[0] == "eval.py":
            last = call(
                [*words, "--seed", str(seed), "--out", f"{out}.jsonl"], f"{out}.log"
            ).splitlines()[-1]
            result = json.loads(last)
        else:
            going = (
                bool(list((out / "ckpt").glob("it-*.pt"))) and "--resume" not in words
            )  # stopped in its middle
            call(
                [*words, "--seed", str(seed), "--out", str(out), *["--resume"] * going],
                f"{out}.log",
            )
            result = json.loads((out / "metrics.json").read_text())
        done.append(result)
        state.write_text(json.dumps(done))
    return done[-1]


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "--results", default=str(ROOT / "docs" / "RESULTS.md"), help="markdown with the tables"
    )
    p.add_argument("--rows", type=int, help="so many rows by chance; default: all")
    p.add_argument(
        "--match", default="", help="only rows whose commands match this regular expression"
    )
    p.add_argument("--choice", type=int, help="seed of the chance; default: another one each time")
    p.add_argument(
        "--every-seed", action="store_true", help="all seeds of a row; default: one by chance"
    )
    p.add_argument(
        "--tolerance",
        type=float,
        default=0.15,
        help="share of the mean by which the stated range is widened",
    )
    p.add_argument("--out", help="folder of the runs, kept; default: a temporary one")
    p.add_argument("--list", action="store_true", help="only show the rows")
    args = p.parse_args(argv)
    every = [
        r
        for r in read_rows(Path(args.results).read_text())
        if re.search(args.match, " ".join(r["commands"]))
    ]
    rows = [r for r in every if "why" not in r]
    if args.list:
        for r in every:
            print(
                f"{', then '.join(r['commands']) or '?'}: {r.get('why') or '{} {} (seeds {})'.format(r['metric'], r['values'], r['seeds'])}"
            )
        return 0
    if not rows:
        p.exit(
            2,
            f"reproduce: {args.results}: expected rows that can be run, found none (--list says why)\n",
        )
    choice = random.Random(random.randrange(10**6) if args.choice is None else args.choice)
    rows = choice.sample(rows, min(args.rows, len(rows))) if args.rows else rows
    temporary = None if args.out else tempfile.TemporaryDirectory(prefix="distil-")
    home, outside = Path(args.out or temporary.name), 0
    home.mkdir(parents=True, exist_ok=True)
    print("| command | seed | stated | accepted | found | |\n|---|---|---|---|---|---|", flush=True)
    for row in rows:
        low, high = accepted(row, args.tolerance)
        for seed in row["seeds"] if args.every_seed else [choice.choice(row["seeds"])]:
            try:
                found = run(row, seed, home)[row["metric"]]
                verdict = "within" if low <= found <= high else "OUTSIDE"
                found = f"{found:.4g}"
            except RuntimeError as e:
                found, verdict = "-", f"FAILED, {e}"
            outside += verdict != "within"
            stated = ", ".join(f"{v:.4g}" for v in row["values"])
            commands = ", then ".join(f"`{c}`" for c in row["commands"])
            print(
                f"| {commands} | {seed} | {row['metric'].replace('_', ' ')} {stated} | {low:.4g} to {high:.4g} | {found} | {verdict} |",
                flush=True,
            )
    if temporary:
        temporary.cleanup()
    print("OK" if not outside else f"{outside} outside or failed")
    return int(outside > 0)


if __name__ == "__main__":
    sys.exit(main())
