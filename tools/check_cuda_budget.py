#!/usr/bin/env python3
"""Compares what ptxas says of every kernel with the committed budget.

Usage: check_cuda_budget.py [--update] [--budget FILE] LOG...

A LOG is the output of a build with `-Xptxas -v`. A kernel that exceeds its budget of registers, static
shared memory or spills (stack included; none where the budget names none), or is missing from the
budget fails; a budget that no build output mentions fails too, if its architecture was built.
--update writes the budget from the logs, spills excepted: to allow some takes a hand and a reason.
"""
import argparse
import json
import pathlib
import re
import subprocess
import sys

BUDGET = pathlib.Path(__file__).parent.parent / "src/kernels/cuda/budget.json"
ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def short_name(mangled):
    """zipcache::cuda::decode_kernel<128>(...) -> decode_kernel<128>"""
    plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip()
    match = re.search(r"(\w+(?:<[^>]*>)?)\(", plain.replace("(anonymous namespace)::", "")
                      .replace("(int)", ""))
    return match.group(1) if match else mangled


def parse(text):
    kernels, name = {}, None
    for line in text.splitlines():
        if match := ENTRY.search(line):
            name = f"{short_name(match.group(1))} {match.group(2)}"
            kernels[name] = {"registers": 0, "shared_bytes": 0, "spill_bytes": 0}
        elif name and (match := STACK.search(line)):
            kernels[name]["spill_bytes"] = sum(map(int, match.groups()))
        elif name and (match := USED.search(line)):
            kernels[name]["registers"] = int(match.group(1))
            if match := SHARED.search(line):
                kernels[name]["shared_bytes"] = int(match.group(1))
            name = None
    return kernels


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--budget", type=pathlib.Path, default=BUDGET)
    parser.add_argument("logs", nargs="+", type=pathlib.Path)
    args = parser.parse_args()

    kernels = {}
    for log in args.logs:
        kernels.update(parse(log.read_text()))
    problems = [] if kernels else ["no kernel in the logs: build with -Xptxas -v, from scratch"]
    if args.update:
        allowed = {name: {"spill_bytes": of["spill_bytes"]}
                   for name, of in json.loads(args.budget.read_text()).items() if "spill_bytes" in of}
        budget = {name: {"registers": used["registers"], "shared_bytes": used["shared_bytes"],
                         **allowed.get(name, {})}
                  for name, used in sorted(kernels.items())}
        args.budget.write_text(json.dumps(budget, indent=2) + "\n")
    budget = json.loads(args.budget.read_text())
    for name, used in kernels.items():
        for what, most in {"spill_bytes": 0, **budget.get(name, {})}.items():
            if used[what] > most:
                problems.append(f"{name}: {used[what]} {what}, budget {most}")
        if name not in budget:
            problems.append(f"{name}: not in {args.budget.name}")
    built = {name.split()[-1] for name in kernels}  # of the architectures
    problems += [f"{name}: in the budget, not in the logs"
                 for name in budget.keys() - kernels.keys() if name.split()[-1] in built]
    for problem in problems:
        print(f"cuda budget: {problem}", file=sys.stderr)
    if not problems:
        print(f"cuda budget: {len(kernels)} kernels within budget")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
