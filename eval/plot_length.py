"""The time of a decode step over the length of the cache, as an SVG beside the performance page."""

import math

from plot import COLORS, line, text

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 760, 400, 64, 48, 24, 190


def decode_by_length(records):
    """Time of one decode step's attention over the number of cells, ours and its peers'."""
    lines = {}
    for r in sorted(records, key=lambda r: r["n_kv"]):
        if r["n_query"] != 1 or r["threads"] != 1:
            continue
        shape = f"{r['shape']['n_heads']}/{r['shape']['n_kv_heads']} x {r['shape']['head_dim']}"
        lines.setdefault(f"{shape} zipcache", []).append((r["n_kv"], r["seconds"] * 1e3))
        for peer, seconds in r["peers"].items():
            lines.setdefault(f"{shape} {peer}", []).append((r["n_kv"], seconds * 1e3))
    return log_log(lines, "cells", "ms per decode step and layer")


def log_log(lines, x_label, y_label):
    """Both axes logarithmic: what is linear has slope 1."""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    x_ticks = powers(2, min(xs), max(xs))
    y_ticks = powers(10, min(ys), max(ys))
    place_x = scale(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT)
    place_y = scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
             'font-family="sans-serif" font-size="12">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for tick in x_ticks:
        x = place_x(tick)
        parts.append(line(x, TOP, x, HEIGHT - BOTTOM))
        parts.append(text(x, HEIGHT - BOTTOM + 16, f"{tick // 1024}k" if tick >= 1024 else str(tick)))
    for tick in y_ticks:
        y = place_y(tick)
        parts.append(line(LEFT, y, WIDTH - RIGHT, y))
        parts.append(text(LEFT - 8, y + 4, f"{tick:g}", "end"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label))
    parts.append(text(8, TOP - 8, y_label, "start"))
    for index, (name, points) in enumerate(lines.items()):
        color = COLORS[index % len(COLORS)]
        way = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{way}" fill="none" stroke="{color}" stroke-width="2"/>')
        y = TOP + 16 * index + 12
        parts.append(line(WIDTH - RIGHT + 10, y - 4, WIDTH - RIGHT + 26, y - 4, color, 2))
        parts.append(text(WIDTH - RIGHT + 32, y, name, "start"))
    return "\n".join([*parts, "</svg>", ""])


def powers(base, low, high):
    """Powers of `base` that enclose low and high."""
    tick = 1.0
    while tick > low:
        tick /= base
    while tick * base <= low:
        tick *= base
    ticks = [tick]
    while ticks[-1] < high:
        ticks.append(ticks[-1] * base)
    return [int(tick) if tick >= 1 else tick for tick in ticks]


def scale(low, high, begin, end):
    span = math.log(high / low) or 1.0
    return lambda value: begin + (end - begin) * math.log(value / low) / span
