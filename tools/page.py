"""One page of a run, or of several side by side: report.html, one file, no network.

python -m tools.page out/dmd2-mnist                     # -> out/dmd2-mnist/report.html
python -m tools.page out/dmd2-mnist out/dmd2-mnist-1    # two runs, curves in the same panels
python -m tools.page RUN --out FILE.html                # also of a run that has not ended

It has what ran, alarms (docs/alarms.md), pictures with a slider over the iterations, curves over
the values that the method's page in docs/ calls healthy, metrics beside the teacher's, the numbers
of a dry run, and commands to go on.
"""

import argparse
import base64
import io
import json
import re
import shlex
from html import escape
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

from common.errors import UserError, launch, require
from common.files import ROOT, atomic, format_bytes, read_json
from common.metrics import METRICS
from common.teachers.kind import EMBEDDED
from tools.svg import curves
from training.alarm import (
    LEAST_CONTRAST,
    LEAST_DIVERSITY,
    MOST_CLIPPED,
    MOST_COLOUR,
    MOST_CONTRAST,
    MOST_DIVERSITY,
    MOST_SHIFT,
    Alarms,
)
from training.folder import describe_changes, read_starts, starts_until

COLOURS = ("#1f6fb4", "#d9730d", "#2e8540", "#a4286a", "#6b4fa0", "#7a6a00")
MOST_RUNS = len(COLOURS)
MOST_GRIDS = 30  # pictures of a run on the slider
MOST_BYTES = 3_000_000  # of all pictures of a page, before base64 adds a third
WIDEST = 1600  # pixels; larger grids are shrunk
NO_CURVE = ("it", "images", "time", "alarms")


# ---- files of a run ------------------------------------------------------------------------------


def read_lines(path):
    """Objects of a file with one JSON object a line, [] if there is no file. Half a line at the
    end, of a run that is writing, is left out. UserError for anything else."""
    found = []
    texts = path.read_text().splitlines() if path.is_file() else []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if line is None and number == len(texts):
            break
        ok = isinstance(line, dict) and isinstance(line.get("it"), (int, float))
        require(ok, f"{path}: line {number}: expected a JSON object with `it`, found {text[:60]!r}")
        found.append(line)
    return found


def read_run(folder):
    """What the page needs of one run, as a dict."""
    folder = Path(folder)
    starts = read_starts(folder)
    require(starts, f"{folder}: expected the folder of a run with run.jsonl, found none")
    log = read_lines(folder / "log.jsonl")
    start = starts[-1]
    dry = folder / "dryrun.json"
    return dict(
        folder=folder,
        name=folder.resolve().name,
        start=start,
        starts=starts_until(starts, log[-1]["it"] + 1) if log else starts,
        method=str(start.get("method", "")),
        teacher=str(start["flags"].get("teacher", "")),
        log=log,
        results=read_lines(folder / "eval.jsonl"),
        dry=read_json(dry) if dry.is_file() else None,
        grids=sorted(p for p in (folder / "samples").glob("*.png") if p.stem.isdigit()),
    )


def teacher_rows(teacher):
    """Measured samplers of a teacher's folder, [] if it names none or is on the hub."""
    folder = ROOT / "assets" / teacher if teacher in EMBEDDED else Path(teacher)
    path = folder / "teacher.json"
    if not path.is_file():
        return []
    evaluation = read_json(path).get("evaluation") or {}
    return [row for row in evaluation.get("measured", []) if isinstance(row, dict)]


def alarms_of(run):
    """[(alarm, iteration of the line that turned it on, text, iteration off or None), ...]."""
    flags = run["start"]["flags"]
    if not isinstance(flags.get("clip"), (int, float)):
        flags = flags | dict(clip=10.0)
    alarms = Alarms(SimpleNamespace(**flags))
    found = []
    for line in run["log"]:
        for name, text in alarms.update(line):
            found.append([name, line["it"], text, None])
        for entry in found:
            if entry[3] is None and entry[0] not in alarms.on:
                entry[3] = line["it"]
    return found


# ---- healthy values of a method's page -----------------------------------------------------------


def table_lines(path, heading):
    """Lines of the tables below a heading of a page in docs/, as lists of cells."""
    if not path.is_file():
        return
    for line in path.read_text().partition(heading)[2].splitlines():
        if line.startswith("## "):
            return
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            yield [cell.strip().replace(r"\|", "|") for cell in cells]


def healthy(method, teacher):
    """{column of the log: (meaning, [healthy values as text], advice)} of docs/<method>.md.

    The values are those of the table's columns for this teacher: its headings name the toy, or
    else are of mnist. Of other teachers no page has any. A row of two columns of the log has
    their values one after the other, with "and" between them.
    """
    kind = teacher.removesuffix("-cond")
    found = {}
    columns, width = [], 0
    for cells in table_lines(ROOT / "docs" / f"{Path(method).name}.md", "What is logged"):
        names = re.findall(r"`(\w+)`", cells[0])
        if cells[:2] == ["name", "meaning"]:
            width = len(cells)
            columns = [
                i
                for i, heading in enumerate(cells[2:-1], 2)
                if kind in ("toy", "mnist") and ("toy" in heading) == (kind == "toy")
            ]
        for place, name in enumerate(names if len(cells) == width else ()):
            texts = [cells[i] for i in columns]
            shared = [text.split(" and ") for text in texts]
            if len(names) > 1:
                texts = [parts[place] for parts in shared if len(parts) == len(names)]
            found[name] = (cells[1], texts, cells[-1])
    return found


def figures_of_pictures():
    """The same for the figures that alarms compare, {column: (meaning, [], "")}."""
    lines = table_lines(ROOT / "docs" / "alarms.md", "What is compared")
    return {cells[0].strip("`"): (cells[1], [], "") for cells in lines if "`" in cells[0]}


LIMITS = dict(  # without an alarm
    diversity=(LEAST_DIVERSITY, MOST_DIVERSITY),
    contrast=(LEAST_CONTRAST, MOST_CONTRAST),
    shift=(0, MOST_SHIFT),
    clipped=(-1, MOST_CLIPPED),
    colour=(0, MOST_COLOUR),
)


def band_of(texts):
    """(least, greatest) number of healthy values, or None.

    "0.61 (0.53 to 0.66), 0.55; 1.51 at iteration 0" -> (0.53, 0.66): parts that have other words
    are about something else.
    """
    number = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
    numbers = []
    for part in re.split(r"[;,/()]", " ".join(f"{text};" for text in texts)):
        if not re.sub(rf"{number}|\bto\b|\bmedian\b|\babout\b|\s", "", part):
            numbers += [float(n) for n in re.findall(number, part)]
    return (min(numbers), max(numbers)) if len(numbers) > 1 else None


# ---- parts of the page ---------------------------------------------------------------------------


def table(rows, head=None):
    """<table> of rows of text. A cell that is a number is rounded."""

    def cell(value, tag):
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        return f"<{tag}>{escape(text)}</{tag}>"

    lines = ["<tr>" + "".join(cell(v, "th") for v in head) + "</tr>"] if head else []
    lines += ["<tr>" + "".join(cell(v, "td") for v in row) + "</tr>" for row in rows]
    kind = "numbers" if head else "facts"
    return f'<div class="wide"><table class="{kind}">{"".join(lines)}</table></div>'


def marked(text):
    """A line of docs/ as HTML: `code`."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def what_ran(run):
    start = run["start"]
    plan = start.get("plan")
    rows = list(plan.items()) if isinstance(plan, dict) else []
    iters = start["flags"].get("iters")
    done = run["log"][-1]["it"] + 1 if run["log"] else 0
    rows.append(("iterations", f"{done} of {iters} in the log"))
    rows.append(("code", f"revision {start.get('revision')}, started {start.get('date')}"))
    versions = start.get("versions")
    if isinstance(versions, dict):
        rows.append(("versions", ", ".join(f"{name} {v}" for name, v in versions.items())))
    rows.append(("command", shlex.join(map(str, start.get("command") or []))))
    for resumed in run["starts"][1:]:
        changes = resumed.get("changed") or {}
        text = describe_changes(changes) if isinstance(changes, dict) else ""
        rows.append((f"resumed at {resumed['first']}", text or "no flag changed"))
    flags = table(sorted((name, json.dumps(v)) for name, v in start["flags"].items()))
    return f"{table(rows)}<details><summary>all flags</summary>{flags}</details>"


def alarm_list(run):
    if not run["log"]:
        return "<p>No line in the log yet.</p>"
    found = alarms_of(run)
    if not found:
        return f'<p class="good">No alarm in {len(run["log"])} lines of the log.</p>'
    items = []
    for name, it, text, off in found:
        until = "still on" if off is None else f"off at {off}"
        label = f"<b>{escape(name)}</b> at iteration {it}, {until}"
        items.append(f'<li class="{"bad" if off is None else "past"}">{label}: {escape(text)}</li>')
    return f"<ul>{''.join(items)}</ul>"


def embedded(path):
    """A picture as a data: address; large ones are shrunk. None if it cannot be read."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if image.width <= WIDEST and len(data) <= 200_000:
                return f"data:image/png;base64,{base64.b64encode(data).decode()}"
            smaller = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    smaller.thumbnail((WIDEST, WIDEST))
    file = io.BytesIO()
    smaller.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def spread_evenly(items, n):
    """At most n of the items, with the first and the last."""
    if len(items) <= n:
        return items
    return [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]


def slider(run, most_bytes):
    """Pictures of the run, of which one shows: without JavaScript the last."""
    count = MOST_GRIDS
    while True:
        grids = [(int(p.stem), embedded(p)) for p in spread_evenly(run["grids"], count)]
        grids = [(it, address) for it, address in grids if address]
        if sum(len(address) for _, address in grids) <= most_bytes * 4 / 3 or count <= 2:
            break
        count = max(2, count * 2 // 3)
    if not grids:
        return "<p>No pictures yet.</p>"
    last = len(grids) - 1
    images = []
    for i, (it, address) in enumerate(grids):
        hidden = "" if i == last else " hidden"
        alt = f"samples after {it} iterations"
        images.append(f'<img src="{address}" alt="{alt}" data-it="{it}"{hidden}>')
    control = f'<input type="range" min="0" max="{last}" value="{last}" aria-label="iteration">'
    label = f"iteration <output>{grids[-1][0]}</output>"
    if last == 0:
        control = ""
    return f'<figure class="slider"><p>{control} {label}</p><div>{"".join(images)}</div></figure>'


def panels(runs):
    """A panel for each logged number, with the curves of all runs."""
    pages = [healthy(run["method"], run["teacher"]) for run in runs] + [figures_of_pictures()]
    same_page = len({(run["method"], run["teacher"]) for run in runs}) == 1
    names = dict.fromkeys(
        name for run in runs for line in run["log"] for name in line if name not in NO_CURVE
    )
    found = []
    for name in names:
        series = [points(run["log"], name) for run in runs]
        if not any(series) or (name == "skipped" and not any(v for s in series for _, v in s)):
            continue
        meaning, values, advice = next((p[name] for p in pages if name in p), ("", [], ""))
        band = LIMITS.get(name)
        text = f"<figcaption><b>{escape(name)}</b> {marked(meaning)}"
        if values and same_page:
            band = band_of(values)
            text += f"<small>healthy: {marked('; '.join(values))}</small>"
        if advice:
            text += f"<small>worry when: {marked(advice)}</small>"
        drawing = curves(series, COLOURS, band)
        found.append(f"<figure>{drawing}{text}</figcaption></figure>")
    return f'<div class="panels">{"".join(found)}</div>' if found else "<p>No line yet.</p>"


def points(log, name):
    """[(iteration, value or None), ...] of a column."""
    found = [(line["it"], line[name]) for line in log if name in line]
    numbers = (int, float, type(None))
    return [(it, value) for it, value in found if isinstance(value, numbers)]


def metrics(runs):
    """The runs' results beside the teacher's; None if there are none."""
    rows = []
    # what a teacher's folder has measured is without a LoRA
    plain = [run for run in runs if not run["start"]["flags"].get("teacher_lora")]
    for teacher in dict.fromkeys(run["teacher"] for run in plain):
        for row in teacher_rows(teacher):
            rows.append((f"teacher {teacher}, w = {row.get('cfg')}", row))
    students = [(run, row) for run in runs for row in run["results"]]
    if not students:
        return None
    rows += [(f"{run['name']}, iteration {row['it']}", row) for run, row in students]
    columns = [
        name for name in METRICS if name != "kid_std" and any(name in row for _, row in rows)
    ]
    head = ["model", "steps", *columns, "n"]
    body = [[label, *(row.get(key, "") for key in ["nfe", *columns, "n"])] for label, row in rows]
    protocol = "; ".join(dict.fromkeys(str(row.get("protocol", "")) for _, row in students))
    note = "Compare rows of equal n only."
    return f"{table(body, head)}<p>Protocol of the students: {escape(protocol)}. {note}</p>"


def dry_run(run):
    dry = run["dry"]
    rows = []
    for name, label in (("peak", "peak of memory"), ("at_rest", "between iterations")):
        if isinstance(dry.get(name), (int, float)):
            rows.append((label, format_bytes(dry[name])))
    for name, size in (dry.get("parts") or {}).items():
        rows.append((f"at the peak: {name}", format_bytes(size)))
    if isinstance(dry.get("tflop_per_iteration"), (int, float)):
        rows.append(("work of an iteration", f"{dry['tflop_per_iteration']:.4g} TFLOP"))
    return table(rows)


def commands(run):
    """Lines to go on, to measure, to make images, to load."""
    out, method = shlex.quote(str(run["folder"])), run["method"]
    lines = [
        f"python {shlex.quote(method)}.py --resume --out {out} --iters N    # go on, up to N",
        f"python eval.py {out}    # measure the student",
    ]
    if not run["teacher"].startswith("toy"):
        what = '"a prompt" "another"' if takes_prompts(run) else "--labels 0 1"
        given = '["a prompt", "another"]' if takes_prompts(run) else "[0, 1]"
        lines += [
            f"python sample.py {out} {what} --n 4 --out x.png    # make images",
            "",
            "from sample import load    # in Python, from the folder of this repository",
            "",
            f"images = load({str(run['folder'])!r})({given}, seed=0)",
        ]
    text = escape("\n".join(lines))
    note = "docs/travel.md has the lines for plain diffusers."
    return f"<pre>{text}</pre><p>{note}</p>"


def takes_prompts(run):
    plan = run["start"].get("plan")
    return "prompts" in str(plan.get("data", "")) if isinstance(plan, dict) else False


# ---- the page ------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 0 auto; padding: 1rem;
  max-width: 1200px; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 1.8rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; overflow-wrap: anywhere; }
h3 i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
td, th { text-align: left; padding: .2rem .6rem .2rem 0; border-bottom: 1px solid #e4e4e4;
  vertical-align: top; }
.facts td { overflow-wrap: anywhere; } .numbers td, td:first-child { white-space: nowrap; }
figure { margin: 0; } figcaption { font-size: 13px; } small { display: block; color: #666; }
.panels { display: grid; gap: 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); }
svg { width: 100%; display: block; background: #fafafa; }
svg text { font-size: 10px; fill: #666; }
polyline { fill: none; stroke-width: 1.4; } .axis { stroke: #ddd; } .band { fill: #d5ecd5; }
.slider div { overflow-x: auto; } .slider img { max-width: 100%; image-rendering: pixelated; }
.slider img[hidden] { display: none; } .slider input { width: min(24rem, 60vw); }
@media (max-width: 640px) { .slider img { max-width: none; min-width: 640px; } }
.good { color: #23702f; } .bad { color: #a51d1d; } .past { color: #666; }
pre { background: #f4f4f4; padding: .7rem; overflow-x: auto; font-size: 13px; }
"""

SCRIPT = """
for (const box of document.querySelectorAll(".slider")) {
  const input = box.querySelector("input"), images = box.querySelectorAll("img");
  if (input) input.oninput = () => {
    images.forEach((image, i) => { image.hidden = i != input.value; });
    box.querySelector("output").textContent = images[input.value].dataset.it;
  };
}
"""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(runs):
    """HTML of one page. runs: dicts of `read_run`."""
    title = ", ".join(run["name"] for run in runs)
    several = len(runs) > 1
    parts = [f"<h1>{escape(title)}</h1>"]

    def section(heading, make, wanted=lambda run: True):
        """The same part of every run, with the run's name if there are several."""
        chosen = [(run, colour) for run, colour in zip(runs, COLOURS) if wanted(run)]
        if not chosen:
            return
        parts.append(f"<h2>{heading}</h2>")
        for run, colour in chosen:
            if several:
                mark = f'<i style="background:{colour}"></i>'
                parts.append(f"<h3>{mark}{escape(run['name'])}</h3>")
            parts.append(make(run))

    section("Alarms", alarm_list)
    section("Pictures", lambda run: slider(run, MOST_BYTES // len(runs)))
    results = metrics(runs)
    if results:
        parts.append(f"<h2>Metrics</h2>{results}")
    note = "Green: healthy values of the method's page in docs/, and figures without an alarm."
    parts.append(f"<h2>Curves</h2><p>{note}</p>{panels(runs)}")
    section("What ran", what_ran)
    section("Dry run", dry_run, wanted=lambda run: run["dry"] is not None)
    section("Next", commands)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"{''.join(parts)}<script>{SCRIPT}</script></body></html>\n"
    )


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("runs", nargs="+", help=f"folders of up to {MOST_RUNS} runs")
    p.add_argument("--out", help="HTML file; default report.html in the first run's folder")
    args = p.parse_args(argv)
    n = len(args.runs)
    require(n <= MOST_RUNS, f"expected up to {MOST_RUNS} runs, found {n}")
    out = Path(args.out or Path(args.runs[0]) / "report.html")
    text = page([read_run(folder) for folder in args.runs]).encode()
    try:
        with atomic(out) as f:
            f.write(text)
    except OSError as e:
        raise UserError(f"--out {out}: not written: {e.strerror}") from None
    print(f"{out}, {format_bytes(len(text))}")


if __name__ == "__main__":
    launch(main)
