"""Pictures with words, by pillow alone: rows of images, scatter plots of 2-D points, curves of a run's log.

python -m common.plots out/dmd2-mnist                    # the curves of log.jsonl, also of a run that has not ended -> out/dmd2-mnist/samples/log.png
python -m common.plots out/dmd2-mnist out/dmd2-mnist-1   # runs with other seeds in the same panels -> the first one's folder; or --out FILE.png
"""

import argparse
import colorsys
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.errors import UserError, launch
from common.files import atomic

INK, PALE, RING = (20, 20, 20), (120, 120, 120), (215, 215, 215)


COLOURS = [(31, 90, 180), (214, 92, 20), (40, 140, 60), (150, 60, 160)]  # of runs in one panel


FINE = 3  # lines and points are drawn this much larger and shrunk, which smooths them; text is drawn last, at its own size


def font(size):
    return ImageFont.load_default(size=size)


def width_of(text, size):
    return math.ceil(font(size).getlength(text))


def save(path, sheet):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as f:
        sheet.save(f, "PNG", optimize=True)


def fit(text, size, width):
    """The text, cut in its middle where it is wider than `width` pixels."""
    if width_of(text, size) <= width:
        return text
    keep = len(text)
    while (
        keep > 2
        and width_of(cut := text[: (keep + 1) // 2] + ".." + text[len(text) - keep // 2 :], size)
        > width
    ):
        keep -= 1
    return cut


def image_rows(path, rows, size=14, margin=10, gap=2):
    """PNG of rows of images with two lines of text at their left. rows: list of (caption, second line, uint8 [n, C, H, W], C 1 or 3)."""
    h, w = rows[0][2].shape[-2:]
    scale = max(1, 56 // w)
    h, w, n = h * scale, w * scale, max(len(r[2]) for r in rows)
    left = max(width_of(text, size) for r in rows for text in r[:2]) + 2 * margin
    row = max(h, 3 * size) + gap
    sheet = Image.new(
        "RGB", (left + n * (w + gap) - gap + margin, 2 * margin + len(rows) * row - gap), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for r, (caption, second, images) in enumerate(rows):
        top = margin + r * row
        for i, text in enumerate((caption, second) if second else (caption,)):
            pen.text(
                (margin, top + (row - gap) / 2 + (i - (second != "") / 2) * (size + 4)),
                text,
                fill=PALE if i else INK,
                font=font(size),
                anchor="lm",
            )
        for i, img in enumerate(images):
            a = img.cpu().expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
            sheet.paste(
                Image.fromarray(a).resize((w, h), Image.NEAREST),
                (left + i * (w + gap), top + (row - gap - h) // 2),
            )
    save(path, sheet)


def by_angle(points):
    """A colour for each point [n, 2]: its direction from the middle."""
    wheel = [
        tuple(round(255 * c) for c in colorsys.hsv_to_rgb(k / 64, 0.85, 0.85)) for k in range(64)
    ]
    return [
        wheel[int(k) % 64]
        for k in np.floor(np.arctan2(points[:, 1], points[:, 0]) / (2 * math.pi) * 64)
    ]


def scatter(path, panels, colours, rings=(), extent=1.6, side=200, size=14, margin=14):
    """PNG of scatter plots. panels: list of (caption, second line, points [n, 2]); colours: one per point, the same in all panels; rings: (x, y, radius).
    Points outside of the view are drawn at its border, so that none is hidden."""
    n = len(panels)
    columns = n if n <= 6 else min((4, 5, 6), key=lambda c: (-n % c, -c))
    head, lines = 2 * size + 10, -(-n // columns)
    place = lambda i: (
        margin + i % columns * (side + margin),
        margin + i // columns * (side + head + margin),
    )
    sheet = Image.new(
        "RGB",
        (columns * (side + margin) + margin, lines * (side + head + margin) + margin),
        "white",
    )
    at = lambda p: (p + extent) / (2 * extent) * side * FINE
    border = extent * (1 - 6 / side)
    for i, (_, _, points) in enumerate(panels):
        plot = Image.new("RGB", (side * FINE, side * FINE), "white")
        pen = ImageDraw.Draw(plot)
        for x, y, radius in rings:
            pen.ellipse(
                [at(x - radius), at(-y - radius), at(x + radius), at(-y + radius)],
                outline=RING,
                width=FINE,
            )
        for x, y, colour in zip(*np.nan_to_num(points).clip(-border, border).T, colours):
            pen.ellipse([at(x) - FINE, at(-y) - FINE, at(x) + FINE, at(-y) + FINE], fill=colour)
        pen.rectangle([0, 0, side * FINE - 1, side * FINE - 1], outline=RING, width=FINE)
        x, y = place(i)
        sheet.paste(plot.resize((side, side), Image.LANCZOS), (x, y + head))
    pen = ImageDraw.Draw(sheet)
    for i, (caption, second, _) in enumerate(panels):
        x, y = place(i)
        pen.text(
            (x + side / 2, y), fit(caption, size, side), fill=INK, font=font(size), anchor="ma"
        )
        pen.text(
            (x + side / 2, y + size + 4),
            fit(second, size - 1, side),
            fill=PALE,
            font=font(size - 1),
            anchor="ma",
        )
    save(path, sheet)


def read_log(folder):
    """Lines of a run's log.jsonl -> {name: (iterations, values)}. What is averaged or counted by Run.log, without its clock."""
    path, series = Path(folder) / "log.jsonl", {}
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except OSError as e:
        raise UserError(f"{path}: expected the log of a run, found: {e.strerror}") from None
    except ValueError:
        raise UserError(f"{path}: expected one JSON object per line") from None
    for line in lines:
        for name, value in line.items():
            if name not in ("it", "images", "time"):
                series.setdefault(name, ([], []))
                series[name][0].append(line["it"])
                series[name][1].append(float(value))
    if not series:
        raise UserError(f"{path}: expected lines of a run, found none")
    return {
        name: tuple(map(np.array, s))
        for name, s in series.items()
        if name != "skipped" or max(s[1]) > 0
    }


def running_mean(y, window):
    """Mean of the values within half a window at either side; fewer at the ends."""
    total = np.concatenate([[0], np.cumsum(y)])
    i = np.arange(len(y))
    low, high = np.maximum(i - window // 2, 0), np.minimum(i + window // 2 + 1, len(y))
    return (total[high] - total[low]) / (high - low)


def ticks(low, high, log):
    """Two to six round numbers within low..high; powers of ten of a logarithmic axis: at most five, perhaps one."""
    if log:
        powers = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
        return list(powers)[:: max(1, -(-len(powers) // 4))]
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = next(m * step for m in (0.5, 1, 2, 5, 10) if (high - low) / (m * step) <= 5)
    return [
        k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def curves(path, logs, title, columns=3, width=330, height=150, size=13, margin=14):
    """PNG with a panel for each logged number. logs: list of (label, what read_log gives), drawn over each other. Pale: what was logged; dark: its running
    mean. Logarithmic where all values are positive and span more than a factor 50."""
    names = list(dict.fromkeys(name for _, log in logs for name in log))
    columns, left, head, foot = min(columns, len(names)), 58, size + 8, size + 8
    last = max(int(t.max()) for _, log in logs for t, _ in log.values())
    top = margin + size + 16
    sheet = Image.new(
        "RGB",
        (
            columns * (width + left + margin) + margin,
            top + -(-len(names) // columns) * (height + head + foot + margin),
        ),
        "white",
    )
    texts = [((margin, margin + size), title, INK, "ls", size + 2)]
    x = margin + width_of(title, size + 2) + 24
    for k, (label, _) in enumerate(logs if len(logs) > 1 else []):
        texts.append(((x, margin + size), label, COLOURS[k % len(COLOURS)], "ls", size))
        x += width_of(label, size) + 18
    sheet = sheet if x < sheet.width else sheet.resize((x, sheet.height))  # blank so far
    for p, name in enumerate(names):
        x0, y0 = (
            margin + p % columns * (width + left + margin) + left,
            top + p // columns * (height + head + foot + margin) + head,
        )
        drawn = [(k, *log[name]) for k, (_, log) in enumerate(logs) if name in log]
        values = np.concatenate([y for _, _, y in drawn])
        values = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)
        log = bool(0 < values.min() < values.max() / 50)
        f = np.log10 if log else lambda y: y
        # a run's first lines may be far above all that follows: the view is that of the others
        low, high = (float(v) for v in (f(values.min()), f(values.max())))
        if not log and len(values) > 20:
            a, b = np.quantile(values, [0.005, 0.99])
            low, high = max(low, a - 0.5 * (b - a)), min(high, b + 0.5 * (b - a))
        pad = 0.06 * (high - low) or max(abs(high), 1e-3) * 0.06
        low, high = low - pad, high + pad
        right = lambda t: t / max(last, 1) * width * FINE
        up = lambda y: (
            (high - np.clip(f(np.maximum(y, 1e-300)) if log else y, low, high))
            / (high - low)
            * height
            * FINE
        )
        plot = Image.new("RGB", (width * FINE, height * FINE), "white")
        pen = ImageDraw.Draw(plot)
        for v in ticks(low, high, log):
            y = (high - v) / (high - low) * height
            pen.line([(0, y * FINE), (width * FINE, y * FINE)], fill=(235, 235, 235), width=FINE)
            texts.append(((x0 - 6, y0 + y), f"{10.0**v if log else v:.4g}", PALE, "rm", size - 2))
        for dark in (False, True):
            for k, t, y in drawn:
                fine = np.isfinite(y)
                t, y = t[fine], y[fine]
                if not len(y):
                    continue
                y = running_mean(y, max(1, len(y) // 25)) if dark else y
                colour = (
                    COLOURS[k % len(COLOURS)]
                    if dark
                    else tuple(255 - (255 - c) // 4 for c in COLOURS[k % len(COLOURS)])
                )
                line = list(zip(right(t), up(y)))
                if len(line) == 1:
                    pen.ellipse(
                        [line[0][0] - 6, line[0][1] - 6, line[0][0] + 6, line[0][1] + 6],
                        fill=colour,
                    )
                pen.line(line, fill=colour, width=2 * FINE if dark else FINE, joint="curve")
        pen.rectangle(
            [0, 0, width * FINE - 1, height * FINE - 1], outline=(200, 200, 200), width=FINE
        )
        sheet.paste(plot.resize((width, height), Image.LANCZOS), (x0, y0))
        texts.append(((x0, y0 - 7), name + ", log scale" * log, INK, "ls", size))
        texts += [
            ((x0, y0 + height + 4), "0", PALE, "la", size - 2),
            ((x0 + width, y0 + height + 4), f"iteration {last + 1:,}", PALE, "ra", size - 2),
        ]
    pen = ImageDraw.Draw(sheet)
    for at, text, colour, anchor, points in texts:
        pen.text(at, text, fill=colour, font=font(points), anchor=anchor)
    save(
        path, sheet.quantize(64, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    )  # a third of the bytes; colours move by about 10 of 255


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("runs", nargs="+", help="folders of runs")
    p.add_argument("--out", help="PNG; default samples/log.png of the first run")
    args = p.parse_args(argv)
    out = Path(args.out or Path(args.runs[0]) / "samples" / "log.png")
    curves(
        out,
        [(Path(run).resolve().name, read_log(run)) for run in args.runs],
        Path(args.runs[0]).resolve().name,
    )
    print(out)


if __name__ == "__main__":
    launch(main)
