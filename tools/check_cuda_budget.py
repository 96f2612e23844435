#!/usr/bin/env python3
"""Compares what ptxas says of every kernel with the committed budget.

Usage: check_cuda_budget.py [--update] [--budget FILE] LOG...

A LOG is the output of a build with `-Xptxas -v`, OBJECT.log beside its OBJECT. A kernel that exceeds
its budget of registers, static shared memory, spills (stack included; none where the budget names
none) or code (any size where it names none), or is missing from the budget fails; a budget that no
build output mentions fails too, if its architecture was built.
--update writes the budget from the logs, spills and code excepted: these take a hand and a reason.
"""
import argparse
import json
import pathlib
import re
import struct
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


def code_sizes(data):
    """(mangled name, architecture as a number) -> bytes, of the device code in an object file."""
    sizes, start = {}, 0
    while (start := data.find(b"\x7fELF", start)) >= 0:
        elf = data[start:]
        start += 4
        if struct.unpack_from("<H", elf, 18)[0] != 190:  # EM_CUDA
            continue
        (first,), (flags,) = struct.unpack_from("<Q", elf, 40), struct.unpack_from("<I", elf, 48)
        size, count, names = struct.unpack_from("<HHH", elf, 58)
        arch = flags >> (8 if elf[8] >= 8 else 0) & 0xff
        sections = [struct.unpack_from("<IIQQQQ", elf, first + n * size) for n in range(count)]
        for section in sections:
            at = sections[names][4] + section[0]
            name = elf[at:elf.index(b"\0", at)].decode()
            if name.startswith(".text."):
                sizes[name.removeprefix(".text."), arch] = section[5]
    return sizes


def parse(log):
    kernels, name = {}, None
    sizes = code_sizes(log.with_suffix("").read_bytes())
    for line in log.read_text().splitlines():
        if match := ENTRY.search(line):
            mangled, arch = match.groups()
            name = f"{short_name(mangled)} {arch}"
            kernels[name] = {"registers": 0, "shared_bytes": 0, "spill_bytes": 0,
                             "code_bytes": sizes.get((mangled, int(re.sub(r"\D", "", arch))))}
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
        kernels.update(parse(log))
    problems = [] if kernels else ["no kernel in the logs: build with -Xptxas -v, from scratch"]
    if args.update:
        allowed = {name: {what: of[what] for what in ("spill_bytes", "code_bytes") if what in of}
                   for name, of in json.loads(args.budget.read_text()).items()}
        budget = {name: {"registers": used["registers"], "shared_bytes": used["shared_bytes"],
                         **allowed.get(name, {})}
                  for name, used in sorted(kernels.items())}
        args.budget.write_text(json.dumps(budget, indent=2) + "\n")
    budget = json.loads(args.budget.read_text())
    for name, used in kernels.items():
        for what, most in {"spill_bytes": 0, **budget.get(name, {})}.items():
            if used[what] is None:
                problems.append(f"{name}: no code in the object: is it compressed?")
            elif used[what] > most:
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
