#!/usr/bin/env python3
"""Does the cache take the memory that it reports? Measured from outside, by /proc/PID/smaps.

Runs `zipcache run` on a long text and on a short one with the same context, so that everything but
the cache is the same, and compares the growth of the process with the growth that the program
reports. Counted are private anonymous pages, without the compute buffers: these are mapped
NORESERVE, and how much of them a run touches grows with its length too.

    eval/memory.py                     the default list of policies, 8000 tokens
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

POLICIES = ["policy=fp16", "default", "mode=paper"]
SHORT_TOKENS = 64
TOLERANCE = 0.05
POLL_SECONDS = 0.02


def anonymous_bytes(pid):
    """Private anonymous memory of a process outside NORESERVE mappings; None when it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    total, kib = 0, None
    for line in text.splitlines():
        if found := re.match(r"Anonymous:\s+(\d+) kB", line):
            kib = int(found.group(1))
        elif line.startswith("VmFlags:") and " nr" not in line:
            total += kib * 1024
    return total or None


def measure(args, spec, n_tokens, folder):
    """(bytes of the process at its end, the program's own report)"""
    report = Path(folder) / "report.json"
    command = [args.build / "bin" / "zipcache", "run", "-m", args.model, "--raw",
               "--file", args.data, "--max-prompt-tokens", n_tokens, "-n", 16,
               "-c", args.tokens + 64, "-t", args.threads, "--json", report]
    for name, value in harness.settings_of(spec).items():
        command += ["--" + name, value]
    held = 0
    with subprocess.Popen(list(map(str, command)), env=harness.environment(), text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            held = anonymous_bytes(process.pid) or held
            time.sleep(POLL_SECONDS)
        errors = process.stderr.read()
    if process.returncode != 0:
        harness.fail(f"zipcache run failed ({process.returncode}):\n{errors[-2000:]}")
    return held, json.loads(report.read_text())


def compare(args, spec, folder):
    short_held, short_report = measure(args, spec, SHORT_TOKENS, folder)
    held, report = measure(args, spec, args.tokens, folder)
    return {
        "n_tokens": report["n_prompt"] + report["n_generated"],
        "fp16_bytes": report["fp16_bytes"],
        "reported_bytes": report["bytes"]["total"],
        # What the short run holds is in both, so its report stands in for it.
        "measured_bytes": held - short_held + short_report["bytes"]["total"],
    }


def main():
    parser = harness.parser(__doc__)
    parser.add_argument("policies", nargs="*", metavar="POLICY", help="name=value,... or default")
    parser.add_argument("--data", type=Path, help="text (default books/pg2701_moby_dick.txt)")
    parser.add_argument("--tokens", type=int, default=8000)
    args = parser.parse_args()
    args.data = args.data or harness.data_file("books/pg2701_moby_dick.txt")
    harness.need(args.build / "bin" / "zipcache", "run: make")
    harness.need(args.model, "run: make models")

    meta = harness.run_meta(args.build)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for spec in args.policies or POLICIES:
            print(f"memory: {spec}", file=sys.stderr, flush=True)
            record = {"task": "memory", "model": args.model.name, "data": args.data.name,
                      "policy": spec, **compare(args, spec, folder), "run": meta}
            harness.append(args.results, "memory.jsonl", record)
            rows.append(record)
    print(tables.memory(rows))
    wrong = [row["policy"] for row in rows
             if abs(row["measured_bytes"] / row["reported_bytes"] - 1) > TOLERANCE]
    if wrong:
        harness.fail(f"more than {100 * TOLERANCE:.0f} % from what is reported: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
