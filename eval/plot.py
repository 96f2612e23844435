#!/usr/bin/env python3
"""KL divergence over counted bits as an SVG, one point per policy; small enough to need no library,
and the same bytes for the same numbers.

    eval/plot.py RESULTS.jsonl... > plot.svg      what `zipcache eval --task ppl` wrote
"""

import html
import json
import math
import sys

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 460, 70, 20, 40, 50
COLORS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b"]
FONT = 'font-family="sans-serif" font-size="12"'


def ticks(low, high):
    """1, 2 and 5 times the powers of ten in between."""
    power = math.floor(math.log10(low))
    candidates = [base * 10.0 ** p for p in range(power, math.ceil(math.log10(high)) + 1)
                  for base in (1, 2, 5)]
    return [tick for tick in candidates if low <= tick <= high]


def text(x, y, words, anchor="middle", color="#333"):
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}" {FONT}>'
            f"{html.escape(words)}</text>")


def line(x1, y1, x2, y2, color="#ddd", width=1):
    return (f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" '
            f'stroke-width="{width}"/>')


def label(policy):
    """A policy in few words: "policy=kivi,key-bits=2,value-bits=2" is "kivi 2 bits"."""
    parts = [part for part in policy.removeprefix("policy=").split(",")
             if not part.startswith("calibration=")]
    widths = {part.split("=")[1] for part in parts if part.startswith(("key-bits=", "value-bits="))}
    if len(widths) == 1:
        parts = [part for part in parts if not part.startswith(("key-bits=", "value-bits="))]
        parts[0] += f" {widths.pop()} bits"
    return ",".join(parts)


def place_labels(points):
    """points: (x, y, policy). One label per policy, right of its points or, near the edge, left of
    them; lower where it would lie on another."""
    placed = []
    for policy in dict.fromkeys(policy for _, _, policy in points):
        xs, ys = zip(*((x, y) for x, y, of in points if of == policy))
        words = label(policy)
        width = 6.5 * len(words)
        left = max(xs) + 8 + width > WIDTH - RIGHT
        begin = min(xs) - 8 - width if left else max(xs) + 8
        placed.append([sum(ys) / len(ys) + 4, begin, begin + width, words])
    placed.sort()
    for index, one in enumerate(placed):
        for other in placed[:index]:
            if one[1] < other[2] and other[1] < one[2] and abs(one[0] - other[0]) < 14:
                one[0] = other[0] + 14
    return [(begin, y, words) for y, begin, _, words in placed]


def divergence_over_bits(records, title):
    """records: one per policy and series, with policy, series, bits_per_element, kld_mean."""
    points = [r for r in records if r["kld_mean"] > 0 and r["bits_per_element"] < 16]
    bits = [r["bits_per_element"] for r in points]
    klds = [r["kld_mean"] for r in points]
    x_low, x_high = math.floor(min(bits)), math.ceil(max(bits))
    y_low, y_high = min(klds) / 1.5, max(klds) * 1.5

    def x(value):
        return LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y(value):
        share = (math.log(value) - math.log(y_low)) / (math.log(y_high) - math.log(y_low))
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
             f'viewBox="0 0 {WIDTH} {HEIGHT}">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
             text(WIDTH / 2, 22, title)]
    for tick in range(x_low, x_high + 1):
        parts += [line(x(tick), TOP, x(tick), HEIGHT - BOTTOM),
                  text(x(tick), HEIGHT - BOTTOM + 18, str(tick))]
    for tick in ticks(y_low, y_high):
        parts += [line(LEFT, y(tick), WIDTH - RIGHT, y(tick)),
                  text(LEFT - 8, y(tick) + 4, f"{tick:g}", "end")]
    parts.append(text(WIDTH / 2, HEIGHT - 12, "bits per element, all bytes counted"))
    parts.append(f'<text transform="translate(18 {HEIGHT / 2:.0f}) rotate(-90)" '
                 f'text-anchor="middle" fill="#333" {FONT}>mean KL divergence to FP16, nats</text>')
    series = list(dict.fromkeys(r["series"] for r in points))
    for index, name in enumerate(series):
        color = COLORS[index % len(COLORS)]
        parts.append(text(WIDTH - RIGHT - 6, TOP + 16 + 16 * index, name, "end", color))
        for r in (r for r in points if r["series"] == name):
            cx, cy = x(r["bits_per_element"]), y(r["kld_mean"])
            parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4" fill="{color}"/>')
    for begin, baseline, words in place_labels(
            [(x(r["bits_per_element"]), y(r["kld_mean"]), r["policy"]) for r in points]):
        parts.append(text(begin, baseline, words, "start"))
    return "\n".join(parts + ["</svg>"]) + "\n"


def with_series(records):
    """Points of one model and text have one colour."""
    return [r | {"series": f"{r['model'].split('-')[0]}, {r['data']}"} for r in records]


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    records = []
    for path in sys.argv[1:]:
        with open(path, encoding="utf-8") as file:
            records += [json.loads(line) for line in file]
    records = [r for r in records if r["task"] == "ppl"]
    if not records:
        sys.exit("plot: no results of task ppl in these files")
    contexts = sorted({r["n_ctx"] for r in records})
    sys.stdout.write(divergence_over_bits(
        with_series(records), f"windows of {', '.join(map(str, contexts))} tokens"))


if __name__ == "__main__":
    main()
