#!/usr/bin/env python3
"""Turns what bench/run_cuda.sh left in a folder into the committed results.

Usage: record_cuda.py OUT_DIR

Writes bench/results/cuda_decode.jsonl and cuda_peers.jsonl (times) and cuda_tests.jsonl (each test
of cuda_test, each sanitizer), every line with device, driver and date.
"""
import json
import pathlib
import re
import sys

RESULTS = pathlib.Path(__file__).parent / "results"


def write(name, lines, run):
    RESULTS.mkdir(exist_ok=True)
    text = "".join(json.dumps({**line, **run}) + "\n" for line in lines)
    (RESULTS / name).write_text(text, encoding="utf-8")


def main():
    out = pathlib.Path(sys.argv[1])
    device, driver = (out / "device.csv").read_text().split(", ")[:2]
    run = {"device": device, "driver": driver, "date": (out / "date").read_text().strip()}
    for name in ("cuda_decode.jsonl", "cuda_peers.jsonl"):
        write(name, map(json.loads, (out / name).read_text().splitlines()), run)
    tests = [{"test": name, "passed": status == "OK", "seconds": int(ms) / 1000}
             for status, name, ms in
             re.findall(r"^\[ *(OK|FAILED) *\] (\S+) \((\d+) ms\)$",
                        (out / "test.log").read_text(), re.MULTILINE)]
    for tool in ("memcheck", "racecheck", "synccheck"):
        if (out / f"{tool}.txt").exists():
            last = (out / f"{tool}.txt").read_text().splitlines()[-1].strip("= ")
            tests.append({"sanitizer": tool, "passed": "0 errors" in last or " 0 hazards" in last,
                          "summary": last})
    write("cuda_tests.jsonl", tests, run)


if __name__ == "__main__":
    main()
