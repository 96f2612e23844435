#!/usr/bin/env python3
"""Does the cache take the memory that it reports? Measured from outside, by /proc/PID/smaps.

Runs `zipcache run` on the first tokens of a text, few and many, and compares how much the process
grows in between with how much the reported cache grows. A run without the plug-in, whose cache is
written whole when it is opened, tells how much the rest of the process grows with the context; that
is taken off. Counted are all private anonymous pages: also those of NORESERVE mappings, since the
C library takes the memory of every thread but the first from such.

    eval/memory.py                     the default list of policies, 2000 to 8000 tokens
    eval/memory.py --tokens 4000 mode=paper
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import tables

POLICIES = ["default", "mode=paper", "policy=uniform", "policy=fp16"]
PLAIN = "plain"  # llama.cpp's own cache
TOLERANCE = 0.05
POLL_SECONDS = 0.02
TEXT_BYTES_PER_TOKEN = 8  # ample; turning a whole book into tokens would take memory, too


def anonymous_bytes(pid):
    """Private anonymous memory of a process; None when it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    found = re.search(r"^Anonymous:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def measure(args, spec, n_tokens, folder):
    """(most bytes that the process held, its own report)"""
    report, text = Path(folder) / "report.json", Path(folder) / "text.txt"
    text.write_bytes(args.data.read_bytes()[:n_tokens * TEXT_BYTES_PER_TOKEN])
    command = [args.build / "bin" / "zipcache", "run", "-m", args.model, "--raw", "--file", text,
               "--max-prompt-tokens", n_tokens, "-n", 16, "-c", args.tokens + 64,
               "-t", args.threads, "--json", report]
    if spec == PLAIN:
        command += ["--plain"]
    else:
        for name, value in harness.settings_of(spec).items():
            command += ["--" + name, value]
    print(f"memory: {spec}, {n_tokens} tokens", file=sys.stderr, flush=True)
    most = 0
    with subprocess.Popen(list(map(str, command)), env=harness.environment(), text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            most = max(most, anonymous_bytes(process.pid) or 0)
            time.sleep(POLL_SECONDS)
        errors = process.stderr.read()
    if process.returncode != 0:
        harness.fail(f"zipcache run failed ({process.returncode}):\n{errors[-2000:]}")
    return most, json.loads(report.read_text())


def growth(args, spec, folder):
    """From few tokens to many: bytes of the process, bytes reported, and the long run's report."""
    few, few_report = measure(args, spec, args.from_tokens, folder)
    many, report = measure(args, spec, args.tokens, folder)
    return many - few, report["bytes"]["total"] - few_report["bytes"]["total"], report


def main():
    parser = harness.parser(__doc__)
    parser.add_argument("policies", nargs="*", metavar="POLICY", help="name=value,... or default")
    parser.add_argument("--data", type=Path, help="text (default books/pg2701_moby_dick.txt)")
    parser.add_argument("--from-tokens", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=8000)
    args = parser.parse_args()
    args.data = args.data or harness.data_file("books/pg2701_moby_dick.txt")
    harness.need(args.build / "bin" / "zipcache", "run: make")
    harness.need(args.model, "run: make models")

    meta = harness.run_meta(args.build)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        few, _ = measure(args, PLAIN, args.from_tokens, folder)
        many, _ = measure(args, PLAIN, args.tokens, folder)
        rest = many - few
        for spec in args.policies or POLICIES:
            held, reported, report = growth(args, spec, folder)
            rows.append({"task": "memory", "model": args.model.name, "data": args.data.name,
                         "policy": spec, "from_tokens": args.from_tokens, "n_tokens": args.tokens,
                         "fp16_bytes": report["fp16_bytes"],
                         "total_bytes": report["bytes"]["total"],
                         "reported_growth": reported, "measured_growth": held - rest,
                         "host_growth": rest, "run": meta})
            harness.append(args.results, "memory.jsonl", rows[-1])
    print(tables.memory(rows))
    wrong = [row["policy"] for row in rows
             if abs(row["measured_growth"] / row["reported_growth"] - 1) > TOLERANCE]
    if wrong:
        harness.fail(f"more than {100 * TOLERANCE:.0f} % from what is reported: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
