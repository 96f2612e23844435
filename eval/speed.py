#!/usr/bin/env python3
"""Tokens per second by depth, beside llama.cpp's own cache types in the same run.

Runs llama-bench for each cache in turn, several rounds interleaved, so that a machine that slows
down slows all of them. Appends one JSON line per cache and depth to eval/results/speed.jsonl
(medians over the rounds) and prints a Markdown table.

    eval/speed.py                              f16, q8_0, q4_0 and the default policy at 4096 tokens
    eval/speed.py --depths 1024,4096,8192 --rounds 5 default mode=paper
"""

import json
import statistics
import subprocess
import sys

import harness
import tables

PLAIN = ["f16", "q8_0", "q4_0"]


def bench(args, cache, depth):
    """One llama-bench run: (prefill, decode) in tokens per second at `depth`."""
    command = [harness.LLAMA_BIN / "llama-bench", "-m", args.model, "-t", args.threads, "-fa", 1,
               "-d", depth, "-p", args.prefill, "-n", args.decode, "-r", 1, "-o", "jsonl"]
    env = harness.environment()
    if cache in PLAIN:
        command += ["-ctk", cache, "-ctv", cache]
    else:
        env = harness.environment(harness.settings_of(cache) | {"report": 0})
        env["GGML_BACKEND_PATH"] = str(args.plugin)
        command += ["-dev", "ZipCache", "-ngl", 99]
    done = subprocess.run(list(map(str, command)), env=env, text=True, capture_output=True)
    if done.returncode != 0:
        harness.fail(f"llama-bench failed ({done.returncode}):\n{done.stderr[-2000:]}")
    points = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [next(p["avg_ts"] for p in points if p[n] > 0) for n in ("n_prompt", "n_gen")]


def spread(values):
    """Median absolute deviation."""
    middle = statistics.median(values)
    return statistics.median([abs(value - middle) for value in values])


def parse_arguments():
    parser = harness.parser(__doc__)
    parser.add_argument("policies", nargs="*", default=["default"], metavar="POLICY",
                        help="name=value,... or default")
    parser.add_argument("--depths", default="4096", help="tokens in the cache, comma-separated")
    parser.add_argument("--peers", default=",".join(PLAIN),
                        help="llama.cpp's own cache types, f16 among them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefill", type=int, default=128, help="tokens read at each depth")
    parser.add_argument("--decode", type=int, default=32, help="tokens generated at each depth")
    args = parser.parse_args()
    args.peers = args.peers.split(",")
    if "f16" not in args.peers or not set(args.peers) <= set(PLAIN):
        harness.fail(f"--peers: f16 and any others of {', '.join(PLAIN)}")
    args.plugin = harness.need(args.build / "lib" / "libggml-zipcache.so", "run: make")
    harness.need(args.model, "run: make models")
    harness.need(harness.LLAMA_BIN / "llama-bench", "run: make deps")
    return args


def main():
    args = parse_arguments()
    caches = args.peers + args.policies
    meta = harness.run_meta(args.build)
    rows = []
    for depth in map(int, args.depths.split(",")):
        runs = {cache: [] for cache in caches}
        for round_ in range(args.rounds):
            for cache in caches:
                print(f"speed: {cache} at {depth}, round {round_ + 1}", file=sys.stderr, flush=True)
                runs[cache].append(bench(args, cache, depth))
        f16 = [statistics.median(column) for column in zip(*runs["f16"])]
        for cache in caches:
            prefill, decode = zip(*runs[cache])
            record = {
                "task": "speed", "model": args.model.name, "policy": cache, "n_depth": depth,
                "threads": args.threads, "rounds": args.rounds,
                "prefill_tok_s": round(statistics.median(prefill), 2),
                "prefill_spread": round(spread(prefill), 2),
                "decode_tok_s": round(statistics.median(decode), 2),
                "decode_spread": round(spread(decode), 2),
                "prefill_vs_f16": round(statistics.median(prefill) / f16[0], 3),
                "decode_vs_f16": round(statistics.median(decode) / f16[1], 3), "run": meta}
            harness.append(args.results, "speed.jsonl", record)
            rows.append(record)
    print(tables.speed(rows))


if __name__ == "__main__":
    main()
