"""Curves as SVG, without matplotlib: text of an <svg> element for a page of tools/page.py."""

import math
from html import escape

WIDTH, HEIGHT = 320, 150
LEFT, RIGHT, TOP, BOTTOM = 54, 8, 8, 18  # margins of the plot, for numbers
MOST_POINTS = 400  # of a curve


def curves(series, colours, band=None):
    """<svg> of curves over iterations.

    series: [[(iteration, value or None), ...], ...]; None breaks a curve. colours: one a curve.
    band: (low, high) of healthy values, shaded. Logarithmic where all values are positive and span
    more than a factor of 50.
    """
    values = [v for points in series for _, v in points if v is not None and math.isfinite(v)]
    if not values:
        return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}"></svg>'
    is_log = 0 < min(values) < max(values) / 50
    low, high = limits(values, band, is_log)
    last = max((it for points in series for it, _ in points), default=0)
    scale = math.log if is_log else float

    def x(it):
        return LEFT + (WIDTH - LEFT - RIGHT) * it / max(last, 1)

    def y(value):
        share = (scale(value) - scale(low)) / ((scale(high) - scale(low)) or 1)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    if band is not None:
        top, bottom = y(clamp(band[1], low, high)), y(clamp(band[0], low, high))
        size = f'width="{x(last) - LEFT:.1f}" height="{max(bottom - top, 1):.1f}"'
        parts.append(f'<rect class="band" x="{LEFT}" y="{top:.1f}" {size}/>')
    for value in (low, high):
        place = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"'
        parts.append(f'<line class="axis" {place}/>')
        place = f'x="{LEFT - 4}" y="{y(value) + 4:.1f}" text-anchor="end"'
        parts.append(f"<text {place}>{number(value)}</text>")
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 4}">0</text>')
    parts.append(
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">iteration {last}</text>'
    )
    for points, colour in zip(series, colours):
        for piece in pieces(thinned(points)):
            if len(piece) == 1:  # one point makes no line
                it, value = piece[0]
                place = f'cx="{x(it):.1f}" cy="{y(value):.1f}"'
                parts.append(f'<circle {place} r="2" fill="{escape(colour)}"/>')
                continue
            path = " ".join(f"{x(it):.1f},{y(value):.1f}" for it, value in piece)
            parts.append(f'<polyline points="{path}" stroke="{escape(colour)}"/>')
    return "".join([*parts, "</svg>"])


def number(value):
    """At most three digits, in the shorter of its two forms: 0.012, 1.7e3, 8.7e-5."""
    text = f"{value:.3g}"
    short = f"{value:.1e}".replace("e+0", "e").replace("e-0", "e-")
    return text if len(text) <= 6 else short


def limits(values, band, is_log):
    """Least and greatest value of the axis: the band is in it where it is not far away."""
    low, high = min(values), max(values)
    if band is not None and not (is_log and band[0] <= 0):
        spread = high - low
        low = min(low, max(band[0], low - spread))
        high = max(high, min(band[1], high + spread))
    if low == high:
        return low - abs(low) / 2, high + (abs(high) / 2 or 1)
    return low, high


def clamp(value, low, high):
    return min(max(value, low), high)


def thinned(points):
    """At most MOST_POINTS of the points, evenly, with the last one."""
    step = math.ceil(len(points) / MOST_POINTS)
    if step <= 1:
        return points
    return [*points[:-1][::step], points[-1]]


def pieces(points):
    """Runs of points that have a value."""
    found = [[]]
    for it, value in points:
        if value is None or not math.isfinite(value):
            found.append([])
        else:
            found[-1].append((it, value))
    return [piece for piece in found if piece]
