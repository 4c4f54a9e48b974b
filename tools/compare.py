"""`eval.py --compare`: what was measured once is not measured again, runs that differ only by seed are one row; one table, one picture, log curves.

Beside the picture (--grid, default out/compare.png) lie the table as .md and .json and, in a folder -curves/, the logged numbers of each row's runs.
`to teacher`: mean squared difference of a sample and the teacher's own from the same noise and label (the row with the most Euler steps, at the guidance that
the student was trained for), over the first samples; images count as -1 to 1, points as they are. What a run did not record is shown as "-".
`lines of method code`: of the method's script, without docstrings, comments, blank lines and the blocks that are the same in every script.
"""

import ast
import hashlib
import io
import json
import re
import shlex
import tokenize
from pathlib import Path

import numpy as np
import torch

from common import metrics
from common.distributed import gather_rows, on_all_ranks
from common.errors import UserError, did_you_mean
from common.files import ROOT, atomic, git_revision, read_json, write_json
from common.report import dumps
from common.rng import PerImageNoise
from tools.plot_log import by_angle, image_rows, read_log, scatter

BESIDE = (
    "seed",
    "out",
    "device",
    "cache_prompts",
    "log_every",
    "sample_every",
    "eval_every",
    "eval_n",
    "save_every",
)  # flags that leave the student as it is


HEADINGS = {  # of a row's keys, in the order of the table
    "name": "name",
    "nfe": "NFE",
    "passes": "passes per image",
    "seeds": "seeds",
    **{k: k.replace("_", " ") for k in metrics.METRICS if k != "kid_std"},
    "kid": "KID",
    "fid": "FID",
    "agreement": "label agreement",
    "to_teacher": "to teacher",
    "images": "images needed",
    "networks": "networks trained",
    "passes_per_iteration": "passes per iteration",
    "iterations": "iterations",
    "train_seconds": "training seconds",
    "lines": "lines of method code",
    "command": "command",
}


EACH = ("fid", "fd", "energy_distance")  # the mean and every seed's value


KEPT, KEPT_BYTES = 2000, 2**26  # samples of a row that are kept: at most so many, in so many bytes


def add_flags(group):
    group.add_argument(
        "--sort",
        help="key of a column, e.g. fd or train_seconds, the smallest first; --sort=-recall: the largest first",
    )
    group.add_argument(
        "--cache", help="folder of what was measured; default `measured` beside --out"
    )
    group.add_argument("--fresh", action="store_true", help="measure again what is there")


def check(args):
    if (args.sort or args.cache or args.fresh) and not args.compare:
        raise UserError("--sort, --cache and --fresh mean something only with --compare")
    finished = [
        r
        for r in args.runs
        if not Path(r).exists()
        or any((Path(r) / sub / "distill.json").is_file() for sub in ("student", ""))
    ]
    args.left_out = (
        [Path(r).name for r in args.runs if r not in finished] if args.compare and finished else []
    )  # out/* has more than runs
    if args.left_out:
        args.runs = finished
    if args.sort and args.sort.lstrip("-") not in HEADINGS:
        raise UserError(
            f"--sort {args.sort}: expected one of {', '.join(HEADINGS)}, with - before it for the largest first{did_you_mean(args.sort, HEADINGS)}"
        )


def teacher_steps(args, nfes):
    """Rows of the teacher -> list of (steps, Heun?). Euler with 50 steps and those of the students; --heun: also Heun, with at most as many calls as each."""
    euler = args.teacher_nfe or [50, *sorted(set(nfes) - {50}, reverse=True)]
    return [(n, False) for n in euler] + [
        (n, True) for n in dict.fromkeys((n + 1) // 2 for n in euler) if n > 1 and args.heun
    ]


class Book:
    """Results by content, in a folder: for each row a JSON file and the first samples. The name of both is a hash of the weights and their description, of
    the teacher and its reference, and of the protocol. It knows nothing of the code that measures: revisions are shown, and --fresh measures again."""

    def __init__(self, args, rank, world):
        self.args, self.rank, self.world, self.known = args, rank, world, []
        self.home = Path(args.cache or Path(args.out).parent / "measured")
        on_all_ranks(self.open if rank == 0 else lambda: None, world)
        self.start()

    def open(self):
        try:
            self.home.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(
                f"--cache {self.home}: expected a folder that can be written, found: {e.strerror}"
            ) from None

    def start(self):
        self.parts = []  # of the row at hand: samples, batch by batch

    def files(self, row, extractor, dtype):
        a, facts = (
            self.args,
            {k: v for k, v in row["facts"].items() if k not in ("name", "teacher")},
        )
        how = [
            a.n,
            a.seed,
            a.seeds,
            a.inception,
            a.force_inception,
            a.resize,
            a.ref,
            a.ref_images,
            str(dtype),
            extractor.describe(a.n, "") if extractor else "toy",
        ]
        how += [a.per_prompt] if a.per_prompt else []
        key = json.dumps([facts, how, content(row["folder"]), content(row["teacher"].folder)])
        path = self.home / hashlib.sha256(key.encode()).hexdigest()[:24]
        return path.with_suffix(".json"), path.with_suffix(".npz")

    def find(self, row, extractor, dtype):
        """The result of an earlier call, or None; the same on every rank."""

        def look():
            row["files"] = self.files(row, extractor, dtype)
            # PNG files and times are made anew
            if (
                self.args.fresh
                or self.args.save_images
                or self.args.latency
                or not all(path.is_file() for path in row["files"])
            ):
                return None
            result = read_json(row["files"][0], "--cache")
            with np.load(row["files"][1], allow_pickle=False) as f:
                row["samples"] = torch.from_numpy(f["samples"])
            self.known.append(result["revision"])
            return result | row["facts"]

        return on_all_ranks(lambda: look() if self.rank == 0 else None, self.world)[0]

    def take(self, seed, index, images):
        """Of each batch of the first seed, what belongs to the samples that are kept."""
        self.limit = min(
            self.args.n,
            KEPT,
            max(KEPT_BYTES // (images[0].numel() * images.element_size()), self.world),
        )
        if seed == self.args.seed:
            self.parts.append(images.cpu()[index < self.limit])

    def add(self, row, result):
        row["samples"] = gather_rows(torch.cat(self.parts), self.limit, self.rank, self.world)
        self.start()
        if self.rank == 0:
            with atomic(
                row["files"][1]
            ) as f:  # first: what find looks for is complete when the JSON file is there
                np.savez_compressed(f, samples=row["samples"].numpy())
            write_json(row["files"][0], json.loads(dumps(result)))


def content(folder):
    """Hash of all that a model is made of: weights, JSON files, reference statistics."""
    digest = hashlib.sha256()
    for path in sorted(
        p for p in Path(folder).rglob("*") if p.suffix in (".safetensors", ".json", ".npz")
    ):
        digest.update(path.name.encode())
        with open(path, "rb") as f:
            while part := f.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()


def lines_of_code(path):
    """Lines with code outside of the blocks that are the same in every script; a docstring is none, nor are comments."""
    text = Path(path).read_text()
    lines = {
        n
        for t in tokenize.generate_tokens(io.StringIO(text).readline)
        if t.string.strip() and t.type != tokenize.COMMENT
        for n in range(t.start[0], t.end[0] + 1)
    }
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    for block in re.finditer(
        r"^ *# ==== same in every script.*?# ==== end ====$", text, re.M | re.S
    ):
        first = text.count("\n", 0, block.start()) + 1
        lines -= set(range(first, first + block.group().count("\n") + 1))
    return len(lines)


def networks(info):
    """'4 x student, critic'; None if the run did not say."""
    trained = (info.get("training") or {}).get("networks")
    count = len(info["model"].get("experts", [0]))
    name = lambda n: (
        (f"{count} x " * (count > 1) + "student") if n in ("student", "one_student") else n
    )
    return ", ".join(map(name, trained)) if trained else None


def command(info, nfe):
    """What was typed, without what differs between the runs of a row -> list of commands; None if the run did not say."""
    words, kept = shlex.split((info.get("training") or {}).get("command", "")), []
    for before, word in zip([""] + words, words):
        if before not in ("--seed", "--out") and word.split("=")[0] not in (
            "--seed",
            "--out",
            "--overwrite",
        ):
            kept.append(word)
    return (
        [shlex.join(kept)] + ([f"python eval.py OUT --nfe {nfe}"] if nfe != info["nfe"] else [])
        if kept
        else None
    )


def groups(pairs):
    """(row, result) -> lists of those that are one row of the table: students of one method and the same flags, with seeds that differ."""
    found = {}
    for i, (row, result) in enumerate(pairs):
        info = row.get("info") or {}
        flags = info.get("flags")
        known = isinstance(flags, dict) and info.get("seed") is not None
        key = (
            json.dumps(
                [
                    result["method"],
                    result["nfe"],
                    {k: v for k, v in flags.items() if k not in BESIDE},
                ],
                sort_keys=True,
            )
            if known
            else str(i)
        )
        again = (
            sum(r["info"]["seed"] == info["seed"] for r, _ in found.get(key, [])) if known else 0
        )  # a second run with a seed is no further seed
        found.setdefault(key + " again" * again, []).append((row, result))
    return list(found.values())


def line(group, samples):
    """Row of the table from the runs that it stands for. samples: of the teacher, by guidance."""
    (row, result), results = group[0], [r for _, r in group]
    out = {
        k: result[k]
        for k in ("method", "teacher", "nfe", "passes", "cfg", "n", "protocol", "dtype", "best_of")
        if k in result
    }
    out |= dict(
        name=result["name"],
        runs=[
            dict(r, seed=(w.get("info") or {}).get("seed"), run=str(w.get("run") or ""))
            for w, r in group
        ],
    )
    mean = lambda values: None if any(v is None for v in values) else sum(values) / len(values)
    for k in metrics.METRICS:
        if k in result:
            out[k] = mean([r[k] for r in results])
            out.setdefault("each", {})[k] = [r[k] for r in results]
    target = samples.get(result["cfg"])
    if target is not None:
        out["to_teacher"] = mean([distance(w["samples"], target) for w, _ in group])
    if result["method"] == "teacher":
        heun = bool(result.get("heun"))
        out |= dict(
            name=row["caption"], nfe=2 * result["nfe"] - 1 if heun else result["nfe"], seeds=None
        )
        out["command"] = [
            f"python eval.py --teacher {result['teacher']} --nfe {result['nfe']} --cfg {result['cfg']:g}"
            + " --heun" * heun
        ]
    elif "best_of" not in result:
        info, runs = row["info"], [w["run"] for w, _ in group]
        record = info.get("training") or {}
        out |= {
            k: record.get(k)
            for k in ("passes_per_iteration", "iterations", "hardware", "threads", "date")
        } | dict(
            seeds=[w["info"].get("seed") for w, _ in group],
            images=None if record.get("images") is None else "yes" if record["images"] else "no",
            networks=networks(info),
            train_seconds=mean([seconds(w["info"], run) for (w, _), run in zip(group, runs)]),
            revision=info.get("revision"),
            lines=lines_of_code(ROOT / f"{result['method']}.py"),
            command=command(info, result["nfe"]),
        )
        out["iterations"] = out["iterations"] or (info.get("flags") or {}).get("iters")
    return out


def seconds(info, run):
    """Of training, as recorded by the student or, before that was so, by the evaluation at the run's end."""
    if (info.get("training") or {}).get("seconds") is not None:
        return info["training"]["seconds"]
    return (
        read_json(run / "metrics.json").get("train_seconds")
        if (run / "metrics.json").is_file()
        else None
    )


def distance(a, b):
    n = min(len(a), len(b))
    unit = 127.5 if a.dtype == torch.uint8 else 1.0
    return (((a[:n].double() - b[:n].double()) / unit) ** 2).mean().item()


def order(lines, key):
    """By a column, the smallest first, with - before its name the largest; rows without a value are last. No key: as they came."""
    if not key:
        return lines
    name, sign = key.lstrip("-"), -1 if key.startswith("-") else 1
    value = lambda r: r.get(name)[0] if isinstance(r.get(name), list) else r.get(name)
    with_value = [r for r in lines if value(r) is not None]
    text = any(isinstance(value(r), str) for r in with_value)
    return sorted(
        with_value, key=lambda r: str(value(r)) if text else value(r), reverse=sign < 0
    ) + [r for r in lines if value(r) is None]


def show(r, key):
    v = r.get(key)
    if v is None:
        return "-"
    if key == "command":
        return ", then ".join(f"`{c}`" for c in v)
    if isinstance(v, list):
        return ", ".join(map(str, v))
    form = lambda x: (
        "-"
        if x is None
        else f"{x:.4f}"
        if key == "energy_distance"
        else f"{x:,.0f}"
        if key == "train_seconds"
        else f"{x:.4g}"
        if isinstance(x, float)
        else str(x)
    )
    return form(v) + (
        f" ({', '.join(map(form, r['each'][key]))})"
        if key in EACH and len(r["each"][key]) > 1
        else ""
    )


def markdown(lines):
    """Metrics that no row has are left out: points have others than images."""
    columns = [
        k for k in HEADINGS if k not in metrics.METRICS or any(r.get(k) is not None for r in lines)
    ]
    cells = [[HEADINGS[k] for k in columns]] + [
        [show(r, k).replace("|", "\\|") for k in columns] for r in lines
    ]
    width = [max(len(c[i]) for c in cells) for i in range(len(columns))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, width)) + " |" for row in cells]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *text[1:]])


def close(book, rows, results, say):
    """Table, picture and curves, by rank 0."""
    args, grid, pairs = book.args, Path(book.args.grid), list(zip(rows, results))
    target = {}
    for row, result in sorted(pairs, key=lambda p: p[1]["nfe"]):
        if (
            result["method"] == "teacher"
        ):  # the last has the most steps: rows of Heun's method have about half of Euler's
            target[result["cfg"]] = row["samples"], result["nfe"]
    grouped = groups(pairs)
    lines = [line(group, {w: samples for w, (samples, _) in target.items()}) for group in grouped]
    first = {id(r): group[0][0] for r, group in zip(lines, grouped)}
    lines = order(lines, args.sort)
    notes = list(dict.fromkeys(r["protocol"] for r in results))
    kept = min(len(row["samples"]) for row in rows)
    notes += [
        f"to teacher: mean squared difference to the teacher's {nfe} Euler steps, w = {w:g}, from the same noise and label, first {kept} samples"
        for w, (_, nfe) in target.items()
    ]
    notes += [
        f"measured with {', '.join(dict.fromkeys(str(r[k]) for r in results))} ({k})"
        for k in ("dtype", "hardware", "revision")
    ]
    if book.known:
        notes.append(
            f"{len(book.known)} of {len(results)} rows were measured earlier, at {', '.join(dict.fromkeys(book.known))}, now {git_revision()}; --fresh measures again"
        )
    notes += [f"left out, no finished students: {', '.join(args.left_out)}"] * bool(args.left_out)
    table = markdown(lines) + "\n\n" + "\n".join(f"- {note}" for note in notes)
    grid.with_suffix(".md").write_text(table + "\n")
    write_json(grid.with_suffix(".json"), json.loads(dumps(dict(rows=lines, notes=notes))))
    picture(grid, [(r, first[id(r)]) for r in lines], args)
    curves = 0
    for r in lines:
        runs = [
            Path(run["run"])
            for run in r["runs"]
            if run["run"] and (Path(run["run"]) / "log.jsonl").is_file()
        ]
        if runs and "best_of" not in r and r["nfe"] == first[id(r)]["info"]["nfe"]:
            logs = [
                (f"seed {run['seed']}", read_log(run["run"]))
                for run in r["runs"]
                if Path(run["run"]) in runs
            ]
            curves(grid.with_name(grid.stem + "-curves") / f"{r['name']}.png", logs, r["name"])
            curves += 1
    say("\n" + table)
    say(
        f"\nwritten: {grid}, {grid.with_suffix('.md').name}, {grid.with_suffix('.json').name}"
        + f", {grid.stem}-curves/ ({curves} pictures)" * (curves > 0)
    )


def picture(path, lines, args):
    """Same noise, same labels in every row (images) or panel (points, coloured by the direction of their noise)."""
    metric = lambda r: next(
        (
            f"{k.replace('_', ' ')} {show(r, k).split(' ')[0]}"
            + f", mean of {len(r['each'][k])}" * (len(r["each"][k]) > 1)
            for k in EACH
            if r.get(k) is not None
        ),
        "",
    )
    caption = lambda r, row: (
        row["caption"]
        if r["method"] == "teacher"
        else f"{r['name']}, {r['nfe']} step{'s' * (r['nfe'] > 1)}"
    )
    teacher = lines[0][1]["teacher"]
    if teacher.adapter == "toy":
        n = min(len(row["samples"]) for _, row in lines)
        noise, mix = PerImageNoise(args.seed, range(n))(*teacher.shape).numpy(), teacher.mixture
        scatter(
            path,
            [(caption(r, row), metric(r), row["samples"][:n].numpy()) for r, row in lines],
            by_angle(noise),
            [(*m, 2 * mix.std) for m in mix.means.tolist()],
        )
    else:
        image_rows(path, [(caption(r, row), metric(r), row["samples"][:20]) for r, row in lines])
