#!/usr/bin/env python3
"""Puts the newest results into the docs, between `<!-- generated: NAME -->` and `<!-- end -->`.

A table without results says which command makes them. With --check nothing is written, and a page
that would change is an error.
"""

import argparse
import re
import sys

import harness
import plot
import tables

OP_KEYS = ("shape", "n_kv", "n_query", "device", "threads", "policy")

# name of the place: (file of results, what makes a row unique, table, command)
TABLES = {
    "kld": ("kld.jsonl", ("model", "data", "n_ctx", "policy"), tables.kld, "eval/kld.py"),
    "speed": ("speed.jsonl", ("model", "n_depth", "threads", "policy"), tables.speed,
              "eval/speed.sh"),
    "speed-in-short": ("speed.jsonl", ("model", "n_depth", "threads", "policy"),
                       tables.speed_in_short, "eval/speed.sh"),
    "op": ("op.jsonl", OP_KEYS, tables.op, "eval/speed.sh"),
    "policy-cost": ("op.jsonl", OP_KEYS, tables.policy_cost, "eval/speed.sh"),
    "by-length": ("by_length.jsonl", OP_KEYS, tables.by_length, "eval/speed.sh"),
    "kernels": ("kernels.jsonl", ("device", "half", "lanes", "inner", "bits", "rows"),
                tables.kernels, "eval/speed.sh"),
    "memory": ("memory.jsonl", ("model", "n_tokens", "policy"), tables.memory, "eval/memory.py"),
    "demo": ("demo.jsonl", ("label",), tables.demo, "eval/demo.py"),
    "transcript": ("demo.jsonl", ("label",), tables.transcript, "eval/demo.py"),
}
# drawn file: (file of results, what makes a point unique, drawing)
PLOTS = {
    "docs/decode_by_length.svg": ("by_length.jsonl", OP_KEYS, plot.decode_by_length),
}
PLACE = re.compile(r"(<!-- generated: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
PAGES = [harness.ROOT / "README.md", *sorted((harness.ROOT / "docs").rglob("*.md"))]


def origins(records):
    """What the rows were measured with; several only if they were made at different times."""
    found = {}
    for record in records:
        run = record["run"]
        commit = f" at {run['commit']}" if "commit" in run else ""
        text = (f"`{run['command']}` on {run['date']}, zipcache {run['zipcache']}{commit}, "
                f"llama.cpp {run['llama.cpp']}, {run['cpu']}")
        if "model" in record:
            text += f"; {record['model']}"
        if "n_ctx" in record:
            text += (f", {record['data']}, {record['n_tokens']} positions at context "
                     f"{record['n_ctx']}")
        found[text] = None
    return "; ".join(found)


def table(name):
    if name not in TABLES:
        harness.fail(f"no table is named {name}; there are {', '.join(TABLES)}")
    file, keys, make, command = TABLES[name]
    records = tables.latest(harness.read(harness.RESULTS, file), *keys)
    if not records:
        return f"Not measured yet: `{command}` makes this table.\n"
    return f"{make(records)}\n\nMeasured by {origins(records)}.\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    args = parser.parse_args()
    generated = {}
    for page in PAGES:
        generated[page] = PLACE.sub(lambda place: place[1] + table(place[2]) + place[4],
                                    page.read_text(encoding="utf-8"))
    for name, (file, keys, draw) in PLOTS.items():
        records = tables.latest(harness.read(harness.RESULTS, file), *keys)
        if records:
            generated[harness.ROOT / name] = draw(records)
    stale = []
    for page, new in generated.items():
        old = page.read_text(encoding="utf-8") if page.exists() else ""
        if new == old:
            continue
        stale.append(str(page.relative_to(harness.ROOT)))
        if not args.check:
            page.write_text(new, encoding="utf-8")
            print(f"updated {stale[-1]}")
    if args.check and stale:
        sys.exit(f"update_docs: out of date: {', '.join(stale)}; run eval/update_docs.py")


if __name__ == "__main__":
    main()
