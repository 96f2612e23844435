#!/usr/bin/env python3
"""`zipcache bench`: that each subcommand measures, agrees with its peer, and writes stable keys."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

SHARED = {"bench", "device", "threads", "run"}
OP = SHARED | {"shape", "n_kv", "n_query", "batch", "policy", "seconds", "spread", "bytes",
               "bytes_per_s", "peak_bytes_per_s", "peers", "binds"}
KERNELS = SHARED | {"half", "bits", "rows", "seconds", "bytes_per_s", "flops_per_s"}
MODEL = {"bench", "run", "threads", "model", "policy", "n_depth", "n_prompt", "n_gen",
         "prefill_tok_s", "prefill_spread", "decode_tok_s", "decode_spread", "decode_vs_f16"}


def bench(program, folder, *arguments):
    path = folder / f"{arguments[0]}.jsonl"
    done = subprocess.run([program, "bench", *map(str, arguments), "--json", path], text=True,
                          capture_output=True)
    if done.returncode != 0:
        sys.exit(f"bench {arguments}: {done.returncode}\n{done.stdout}{done.stderr}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check(condition, what):
    if not condition:
        sys.exit(f"failed: {what}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--zipcache", required=True)
    program = parser.parse_args().zipcache
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = bench(program, folder, "op", "--shapes", "4/2x64", "--n-kv", 256, "--n-query",
                        "1,64", "-t", "1,2", "--rounds", 1, "--peers", "f16,q4_0", "--warm")
        check(len(records) == 4, f"4 points of op, found {len(records)}")
        for record in records:
            check(OP <= record.keys(), f"keys of op: {OP - record.keys()} missing")
            check(set(record["peers"]) == {"f16", "q4_0"}, "both peers measured")
            check(0 < record["difference"] < 0.5, f"near the peer: {record}")
        records = bench(program, folder, "op", "--policy", "fp16", "--shapes", "4/2x64", "--n-kv",
                        300, "--n-query", "1,40", "--rounds", 1, "--peers", "f16", "--warm")
        check(all(record["difference"] < 1e-2 for record in records[-2:]), f"the same: {records}")

        records = bench(program, folder, "kernels", "--widths", "3,16", "--rows", 4, "--dims", 64,
                        "--rounds", 1, "--warm")
        check(len(records) >= 4, f"points of kernels, found {len(records)}")
        check(all(KERNELS <= record.keys() for record in records), "keys of kernels")

        records = bench(program, folder, "model", "--shape", "tiny", "-m", folder / "tiny.gguf",
                        "-d", "256,600", "-p", 32, "-n", 2, "--rounds", 1, "--peers", "f16,q8_0")
        check(len(records) == 6, f"6 points of model, found {len(records)}")
        for record in records:
            check(MODEL <= record.keys(), f"keys of model: {MODEL - record.keys()} missing")
            check(record["decode_tok_s"] > 0, "tokens decoded")

        bad = subprocess.run([program, "bench", "op", "--shapes", "4x64"], text=True,
                             capture_output=True)
        check(bad.returncode == 1 and "shape '4x64'" in bad.stderr, f"a bad shape: {bad.stderr}")
    print("bench: passed")


if __name__ == "__main__":
    main()
