#!/usr/bin/env python3
"""The first thing that a user runs (tools/demo.sh), with the compressed cache and without it.

Appends one JSON line per run to eval/results/demo.jsonl and prints a Markdown table.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import harness
import tables

RUNS = {"zipcache, default": [], "llama.cpp f16": ["--plain"]}


def main():
    args = harness.parser(__doc__).parse_args()
    meta = harness.run_meta(args.build)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "run.json"
        for label, flags in RUNS.items():
            print(f"demo: {label}", file=sys.stderr, flush=True)
            done = subprocess.run(
                [harness.ROOT / "tools" / "demo.sh", "-t", str(args.threads), "--json", result,
                 *flags],
                env=harness.environment(), capture_output=True, text=True)
            if done.returncode != 0:
                harness.fail(f"tools/demo.sh failed:\n{done.stderr}")
            rows.append({"task": "demo", "label": label, **json.loads(result.read_text()),
                         "answer": done.stdout.strip(),
                         "table": done.stderr[done.stderr.index("KV cache of"):], "run": meta})
            harness.append(args.results, "demo.jsonl", rows[-1])
    print(tables.demo(rows))


if __name__ == "__main__":
    main()
