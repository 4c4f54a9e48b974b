"""`eval.py --compare`: students and their teacher in one table and one picture.

Written are the picture (--grid, default out/compare.png), the table as .md and .json of the same
name, and the logged numbers of each student's runs in a folder -curves/ (if matplotlib is there).
Runs that differ in the seed only are one row of the table. Results are kept in a folder (--cache),
so that a repeated call measures only what is new.

Column `to teacher`: mean squared difference of the first samples from the teacher's, from the same
noise and label. The teacher is its row with the most Euler steps at the student's guidance scale.
Images count from -1 to 1, points as they are. A run that did not record a value has "-".
"""

import json
import re
import shlex
from pathlib import Path

import torch

from common.errors import UserError, did_you_mean, require
from common.files import git_revision, write_json
from common.metrics import METRICS
from common.rng import PerImageNoise
from tools.pictures import by_angle, sample_rows, scatter
from tools.plot_log import plot, read_log
from tools.rows import steps_text
from training.report import dumps

HEADINGS = {  # of a row's keys, in the order of the table
    "name": "name",
    "nfe": "NFE",
    "passes": "passes per image",
    "seeds": "seeds",
    **{key: key.replace("_", " ") for key in METRICS if key != "kid_std"},
    "kid": "KID",
    "fid": "FID",
    "agreement": "label agreement",
    "to_teacher": "to teacher",
    "images": "images needed",
    "networks": "networks trained",
    "passes_per_iteration": "passes per iteration",
    "iterations": "iterations",
    "train_seconds": "training seconds",
    "command": "command",
}
EACH = ("fid", "fd", "energy_distance")  # the table has their mean and the value of every seed

# Flags that do not change what is trained: runs that differ in them are one row.
NEUTRAL_FLAGS = ("seed", "out", "device", "cache_prompts", "eval_n")
NEUTRAL_FLAGS += ("log_every", "sample_every", "eval_every", "save_every")


def add_flags(group):
    add = group.add_argument
    add("--sort", help="column: --sort fd, smallest first; --sort=-recall, largest first")
    add("--cache", help="folder of earlier results [measured, in the folder of --out]")
    add("--fresh", action="store_true", help="measure again what the cache has")


def check_flags(args):
    if args.sort or args.cache or args.fresh:
        require(args.compare, "--sort, --cache and --fresh mean something only with --compare")
    if args.sort and args.sort.lstrip("-") not in HEADINGS:
        raise UserError(
            f"--sort {args.sort}: expected one of {', '.join(HEADINGS)}, "
            f"with - before it for the largest first{did_you_mean(args.sort, HEADINGS)}"
        )


def split_unfinished(runs):
    """Folders of students, and what else out/* matches. Without a student all are the former:
    loading them explains what is wrong."""

    def is_other(run):
        records = (Path(run) / "student" / "distill.json", Path(run) / "distill.json")
        return Path(run).exists() and not any(record.is_file() for record in records)

    others = [run for run in runs if is_other(run)]
    if len(others) == len(runs):
        return runs, []
    return [run for run in runs if run not in others], others


# ---- rows of the table ---------------------------------------------------------------------------


def group_seeds(measured):
    """Measured rows [(row, result), ...] -> lists of those that are one row of the table.

    These are students of one method with the same flags and different seeds. A second run of the
    same seed is a row of its own: it says nothing about the spread over seeds.
    """
    groups = {}
    for i, (row, result) in enumerate(measured):
        flags, seed = row.info.get("flags"), row.info.get("seed")
        key = str(i)
        if isinstance(flags, dict) and seed is not None:
            flags = {k: v for k, v in flags.items() if k not in NEUTRAL_FLAGS}
            key = json.dumps([result["method"], result["nfe"], flags], sort_keys=True)
            while seed in [other.info["seed"] for other, _ in groups.get(key, [])]:
                key += " again"
        groups.setdefault(key, []).append((row, result))
    return list(groups.values())


def table_row(group, targets):
    """A row of the table from the runs [(row, result), ...] that it stands for.

    targets: {guidance scale: (steps, samples)} of the teacher.
    """
    row, result = group[0]
    keys = ("name", "method", "teacher", "nfe", "passes", "cfg", "n", "protocol", "dtype")
    out = {key: result[key] for key in (*keys, "best_of") if key in result}
    out["runs"] = [
        dict(result, seed=row.info.get("seed"), run=str(row.run or "")) for row, result in group
    ]
    out["each"] = {key: [r[key] for _, r in group] for key in METRICS if key in result}
    out |= {key: mean(values) for key, values in out["each"].items()}
    if result["cfg"] in targets:
        _, target = targets[result["cfg"]]
        out["to_teacher"] = mean([distance(row.samples, target) for row, _ in group])
    if result["method"] == "teacher":
        out |= teacher_facts(row, result)
    elif "best_of" not in result:
        out |= training_facts(group)
    return out


def teacher_facts(row, result):
    command = (
        f"python eval.py --teacher {result['teacher']} --nfe {result['nfe']} "
        f"--cfg {result['cfg']:g}"
    )
    for lora in row.teacher.loras:
        command += f" --teacher-lora {shlex.quote(lora.argument())}"
    if not result.get("heun"):
        return dict(name=row.caption, command=[command])
    evaluations = 2 * result["nfe"] - 1  # two per step, one in the last
    return dict(name=row.caption, nfe=evaluations, command=[command + " --heun"])


def training_facts(group):
    """What the students of a group recorded of their training."""
    row, result = group[0]
    infos = [row.info for row, _ in group]
    records = [info.get("training") or {} for info in infos]
    record = records[0]
    facts = {key: record.get(key) for key in ("passes_per_iteration", "iterations", "hardware")}
    facts["seeds"] = [info.get("seed") for info in infos]
    facts["train_seconds"] = mean([record.get("seconds") for record in records])
    if record.get("images") is not None:
        facts["images"] = "yes" if record["images"] else "no"
    if record.get("networks"):
        count = len(row.info["model"].get("experts", [0]))
        student = "student" if count == 1 else f"{count} x student"
        names = [student if "student" in name else name for name in record["networks"]]
        facts["networks"] = ", ".join(names)
    if record.get("command"):
        # without what differs between the runs of a row
        own_flags = r" --(seed|out)[ =]('[^']*'|\S+)| --overwrite"
        facts["command"] = [re.sub(own_flags, "", record["command"])]
        if result["nfe"] != row.info["nfe"]:
            facts["command"].append(f"python eval.py OUT --nfe {result['nfe']}")
    return facts


def mean(values):
    return None if None in values else sum(values) / len(values)


def distance(a, b):
    """Mean squared difference of the samples that both have; uint8 counts as -1 to 1."""
    n = min(len(a), len(b))
    unit = 127.5 if a.dtype == torch.uint8 else 1.0
    return ((a[:n].double() - b[:n].double()) / unit).square().mean().item()


def sort_rows(rows, key):
    """By a column, smallest first, or with - before its name largest first. None: as they came."""
    if key is None:
        return rows
    name = key.lstrip("-")
    known = [row for row in rows if row.get(name) is not None]
    known.sort(key=lambda row: (isinstance(row[name], str), row[name]), reverse=key[0] == "-")
    return known + [row for row in rows if row.get(name) is None]


def markdown(rows, headings=HEADINGS):
    """Markdown table. headings: {key of a row: heading}. Columns that no row has are left out."""
    keys = [key for key in headings if any(row.get(key) is not None for row in rows)]
    lines = [[headings[key] for key in keys]]
    lines += [[format_cell(row, key).replace("|", "\\|") for key in keys] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keys))]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def format_cell(row, key):
    value = row.get(key)
    if key == "command" and value:
        return ", then ".join(f"`{command}`" for command in value)
    if isinstance(value, list):
        return ", ".join(map(format_number, value))
    every = row.get("each", {}).get(key, [])
    if key in EACH and len(every) > 1:
        return f"{format_number(value)} ({', '.join(map(format_number, every))})"
    return format_number(value)


def format_number(value):
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- output --------------------------------------------------------------------------------------


def write_comparison(args, measured, earlier, say):
    """Table, picture and curves. measured: [(row, result), ...]. earlier: revisions of the results
    from the cache."""
    targets = teacher_targets(measured)
    table = []
    for group in group_seeds(measured):
        row = table_row(group, targets)
        row["source"], _ = group[0]  # whose samples are drawn
        table.append(row)
    table = sort_rows(table, args.sort)
    sources = [row.pop("source") for row in table]

    grid = Path(args.grid)
    notes = comparison_notes(args, measured, targets, earlier)
    text = markdown(table) + "\n\n" + "\n".join(f"- {note}" for note in notes)
    grid.with_suffix(".md").write_text(text + "\n")
    write_json(grid.with_suffix(".json"), json.loads(dumps(dict(rows=table, notes=notes))))
    draw(grid, table, sources, args.seed)
    say(f"\n{text}\n\nwritten: {grid}, {grid.stem}.md, {grid.stem}.json")
    try:
        for row, source in zip(table, sources):
            if "best_of" not in row and row["nfe"] == source.info.get("nfe"):
                draw_curves(grid.with_name(f"{grid.stem}-curves"), row)
    except UserError as e:
        say(f"no curves: {e}")


def teacher_targets(measured):
    """{guidance scale: (steps, samples)} of the teacher's rows with the most Euler steps."""
    targets = {}
    for row, result in measured:
        if result["method"] == "teacher" and not result.get("heun"):
            most, _ = targets.get(result["cfg"], (0, None))
            if result["nfe"] > most:
                targets[result["cfg"]] = result["nfe"], row.samples
    return targets


def comparison_notes(args, measured, targets, earlier):
    def listed(key):
        return ", ".join(dict.fromkeys(str(result[key]) for _, result in measured))

    notes = list(dict.fromkeys(result["protocol"] for _, result in measured))
    kept = min(len(row.samples) for row, _ in measured)
    for cfg, (steps, _) in targets.items():
        notes.append(
            f"to teacher: mean squared difference to the teacher's {steps} Euler steps, "
            f"w = {cfg:g}, from the same noise and label, first {kept} samples"
        )
    notes += [f"measured with {listed(key)} ({key})" for key in ("dtype", "hardware", "revision")]
    if earlier:
        notes.append(
            f"{len(earlier)} of {len(measured)} rows were measured earlier, at "
            f"{', '.join(dict.fromkeys(earlier))}, now {git_revision()}; --fresh measures again"
        )
    if args.left_out:
        names = ", ".join(Path(run).name for run in args.left_out)
        notes.append(f"left out, no finished students: {names}")
    return notes


def draw(path, table, sources, seed):
    """Samples from the same noise and labels in every row; points in the colour of their noise."""
    captions = []
    for row, source in zip(table, sources):
        name = source.caption
        if row["method"] != "teacher":
            name = f"{row['name']}, {steps_text(row['nfe'])}"
        metrics = [f"{k.replace('_', ' ')} {format_number(row[k])}" for k in EACH if k in row]
        captions.append(f"{name}\n{', '.join(metrics)}")
    teacher = sources[0].teacher
    if teacher.adapter == "toy":
        n = min(len(source.samples) for source in sources)
        points = [source.samples[:n].numpy() for source in sources]
        noise = PerImageNoise(seed, range(n))(*teacher.shape).numpy()
        rings = [(x, y, 2 * teacher.mixture.std) for x, y in teacher.mixture.means.tolist()]
        scatter(path, list(zip(captions, points)), by_angle(noise), rings)
    else:
        count = 4 if teacher.video else 20
        sample_rows(
            path, [(text, source.samples[:count]) for text, source in zip(captions, sources)]
        )


def draw_curves(folder, row):
    """The logs of all runs of a row of the table in one picture."""
    runs = [run for run in row["runs"] if (Path(run["run"]) / "log.jsonl").is_file()]
    if runs:
        logs = {f"seed {run['seed']}": read_log(run["run"]) for run in runs}
        plot(folder / f"{row['name']}.png", logs, row["name"])
