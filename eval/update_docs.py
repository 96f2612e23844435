#!/usr/bin/env python3
"""Puts the newest results into the docs, between `<!-- generated: NAME -->` and `<!-- end -->`.

A table without results says which command makes them. With --check nothing is written, and a page
that would change is an error.
"""

import argparse
import re
import sys

import gpu_tables
import harness
import plot
import plot_length
import tables

OP_KEYS = ("shape", "n_kv", "n_query", "device", "threads", "policy")

# name of the place: (files of results, what makes a row unique, table, command)
KLD_KEYS = ("model", "data", "n_ctx", "options", "policy")
TABLES = {
    "kld": ("ppl-smollm2-*-2048.jsonl", KLD_KEYS, tables.kld, "eval/results.py ppl-smollm2"),
    "speed": ("speed.jsonl", ("model", "n_depth", "threads", "policy"), tables.speed,
              "eval/speed.sh"),
    "speed-in-short": ("speed.jsonl", ("model", "n_depth", "threads", "policy"),
                       tables.speed_in_short, "eval/speed.sh"),
    "op": ("op.jsonl", OP_KEYS, tables.op, "eval/speed.sh"),
    "policy-cost": ("op.jsonl", OP_KEYS, tables.policy_cost, "eval/speed.sh"),
    "policy-share": ("policy_share.jsonl", ("model", "n_depth", "threads", "policy"),
                     tables.policy_share, "eval/speed.sh"),
    "by-length": ("by_length.jsonl", OP_KEYS, tables.by_length, "eval/speed.sh"),
    "kernels": ("kernels.jsonl", ("device", "half", "lanes", "inner", "bits", "rows"),
                tables.kernels, "eval/speed.sh"),
    "memory": ("memory.jsonl", ("model", "n_tokens", "policy"), tables.memory, "eval/memory.py"),
    "demo": ("demo.jsonl", ("label",), tables.demo, "eval/demo.py"),
    "transcript": ("demo.jsonl", ("label",), tables.transcript, "eval/demo.py"),
    "paper-ratios": ("ratio.jsonl", ("task", "what"), tables.paper_ratios, "eval/results.py ratio"),
    "ratio-generation": ("ratio-generation.jsonl", ("policy", "n_tokens"), tables.generation_ratios,
                         "eval/results.py ratio-generation"),
    "ratio": ("ratio.jsonl", ("task", "policy", "n_tokens"), tables.ratio, "eval/results.py ratio"),
}
for run, table in (("ppl-smollm2-*-2048", tables.kld), ("ppl-gemma3-*-2048", tables.kld),
                   ("ppl-smollm2-*-8192", tables.kld), ("ppl-gemma3-*-8192", tables.kld),
                   ("decode-smollm2-*", tables.kld), ("granularity-smollm2-*", tables.kld),
                   ("metrics-smollm2-*", tables.kld), ("probes-smollm2-*", tables.kld),
                   ("lines-smollm2", tables.scores), ("methods-lines-smollm2", tables.scores),
                   ("agreement-smollm2", tables.agreement)):
    name = run.replace("-*", "")
    TABLES[name] = (f"{run}.jsonl", KLD_KEYS, table, f"eval/results.py {run.split('-*')[0]}")

# Judged by all results there are; each claim says itself what it lacks.
SUMMARIES = {"claims": tables.paper_claims, "aims": tables.aims}

# name of the place: (files of results, title, file beside the page)
PLOTS = {
    "plot-2048": ("ppl-*-2048.jsonl", "windows of 2048 tokens", "kld_over_bits_2048.svg"),
    "plot-8192": ("ppl-*-8192.jsonl", "windows of 8192 tokens", "kld_over_bits_8192.svg"),
}
IMAGES = harness.ROOT / "docs" / "images"

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
        if "n_ctx" in record and "n_tokens" in record:
            text += (f", {record['data']}, {record['n_tokens']} positions at context "
                     f"{record['n_ctx']}")
        found[text] = None
    return "; ".join(found)


def table(name):
    if name in gpu_tables.TABLES:
        return gpu_tables.TABLES[name]()
    if name in SUMMARIES:
        return f"{SUMMARIES[name]([])}\n"
    if name not in TABLES:
        harness.fail(f"no table is named {name}; there are "
                     f"{', '.join([*TABLES, *SUMMARIES, *PLOTS])}")
    pattern, keys, make, command = TABLES[name]
    records = tables.latest(harness.read(harness.RESULTS, pattern), *keys)
    if not records:
        return f"Not measured yet: `{command}` makes this table.\n"
    return f"{make(records)}\n\nMeasured by {origins(records)}.\n"


def draw(name):
    """The plot's SVG, or None without results."""
    pattern, title, _ = PLOTS[name]
    records = plot.with_series(harness.read(harness.RESULTS, pattern))
    return plot.divergence_over_bits(records, title) if records else None


def plot_place(name):
    if draw(name) is None:
        return "Not measured yet: `eval/results.py ppl` makes this plot.\n"
    return f"![mean KL divergence over counted bits, {PLOTS[name][1]}](images/{PLOTS[name][2]})\n"


def outputs():
    """Every file that is made, and what it should hold."""
    for name, (_, _, file) in PLOTS.items():
        svg = draw(name)
        if svg is not None:
            yield IMAGES / file, svg
    by_length = tables.latest(harness.read(harness.RESULTS, "by_length.jsonl"), *OP_KEYS)
    if by_length:
        yield IMAGES / "decode_by_length.svg", plot_length.decode_by_length(by_length)
    for page in PAGES:
        yield page, PLACE.sub(lambda place: place[1] +
                              (plot_place if place[2] in PLOTS else table)(place[2]) + place[4],
                              page.read_text(encoding="utf-8"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    args = parser.parse_args()
    stale = []
    for path, new in outputs():
        if path.exists() and path.read_text(encoding="utf-8") == new:
            continue
        stale.append(str(path.relative_to(harness.ROOT)))
        if not args.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(new, encoding="utf-8")
            print(f"updated {stale[-1]}")
    if args.check and stale:
        sys.exit(f"update_docs: out of date: {', '.join(stale)}; run eval/update_docs.py")


if __name__ == "__main__":
    main()
