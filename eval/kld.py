#!/usr/bin/env python3
"""How far a compressed cache moves a model's predictions: KL divergence to the FP16 cache.

Runs llama-perplexity on WikiText-2: stock llama.cpp with an f16 cache for the base, stock
llama.cpp with q4_0 (Hadamard-rotated, its default), and the plug-in once per policy. All in one go,
so that every row has the same base. Appends one JSON line per row to eval/results/kld.jsonl and
prints a Markdown table.

    eval/kld.py                            the default list of policies
    eval/kld.py default mode=paper key-bits=4,2,value-bits=4,2
"""

import json
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import harness
import tables

POLICIES = ["policy=fp16", "default", "mode=paper", "policy=uniform,key-bits=4,value-bits=4",
            "policy=uniform,key-bits=2,value-bits=2"]
Q4_0 = ["-ctk", "q4_0", "-ctv", "q4_0"]
Q4_0_BITS = 4.5  # 32 codes of 4 bits and an fp16 scale


def statistics(output):
    """The lines that llama-perplexity --kl-divergence ends with."""

    def value(label, n_groups=1):
        number = r"\s*(-?[\d.]+(?:e-?\d+)?|nan|inf)"
        found = re.search(re.escape(label) + r"\s*:" + number + (r" ±" + number) * (n_groups - 1),
                          output)
        if not found:
            harness.fail(f"llama-perplexity printed no '{label}':\n{output[-2000:]}")
        numbers = [float(group) for group in found.groups()]
        return numbers[0] if n_groups == 1 else numbers

    kld, kld_error = value("Mean    KLD", 2)
    ratio, ratio_error = value("Mean ln(PPL(Q)/PPL(base))", 2)
    same_top, same_top_error = value("Same top p", 2)
    return {"ppl": value("Mean PPL(Q)"), "ppl_fp16": value("Mean PPL(base)"),
            "ln_ppl_ratio": ratio, "ln_ppl_ratio_error": ratio_error,
            "kld_mean": kld, "kld_mean_error": kld_error, "ci95": round(1.96 * kld_error, 6),
            "kld_median": value("Median  KLD"), "kld_p999": value("99.9%   KLD"),
            "same_top": same_top / 100, "same_top_error": same_top_error / 100}


def cpu_seconds():
    """Used by the programs run so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def perplexity(args, *more, settings=None):
    """Output and CPU seconds of one run (wall time says little on a shared machine)."""
    command = [harness.LLAMA_BIN / "llama-perplexity", "-m", args.model, "-f", args.data,
               "-c", args.n_ctx, "-b", args.n_ctx, "-ub", args.n_ubatch, "--chunks", args.chunks,
               "-t", args.threads, "-fa", "on", *more]
    start = cpu_seconds()
    env = harness.environment(settings)
    if settings is not None:
        env["GGML_BACKEND_PATH"] = str(args.plugin)
    done = subprocess.run(list(map(str, command)), env=env, text=True, errors="replace",
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        harness.fail(f"llama-perplexity failed ({done.returncode}):\n{done.stdout[-2000:]}")
    return done.stdout, cpu_seconds() - start


def compare(args, base, spec, report_file):
    """One row of results."""
    compare_flags = ["--kl-divergence-base", base, "--kl-divergence"]
    if spec == "q4_0":
        output, seconds = perplexity(args, *compare_flags, *Q4_0)
        size = {"bits_per_element": Q4_0_BITS, "ratio": 16 / Q4_0_BITS}
    else:
        settings = harness.settings_of(spec) | {"report": report_file}
        output, seconds = perplexity(args, *compare_flags, "-dev", "ZipCache", "-ngl", 99,
                                     settings=settings)
        report = json.loads(Path(report_file).read_text())
        Path(report_file).unlink()
        size = {key: report[key] for key in ("bits_per_element", "ratio", "bytes", "isa")}
    return statistics(output) | size | {"cpu_seconds": round(seconds, 1)}


def parse_arguments():
    parser = harness.parser(__doc__)
    parser.add_argument("policies", nargs="*", metavar="POLICY", help="name=value,... or default")
    parser.add_argument("--data", type=Path, help="text (default wikitext2/wiki.test.raw)")
    parser.add_argument("-c", "--n-ctx", type=int, default=2048)
    parser.add_argument("-ub", "--n-ubatch", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=4)
    args = parser.parse_args()
    args.data = args.data or harness.data_file("wikitext2/wiki.test.raw")
    args.plugin = harness.need(args.build / "lib" / "libggml-zipcache.so", "run: make")
    harness.need(args.model, "run: make models")
    harness.need(harness.LLAMA_BIN / "llama-perplexity", "run: make deps")
    return args


def main():
    args = parse_arguments()
    meta = harness.run_meta(args.build)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.kld"
        print("kld: f16 base", file=sys.stderr, flush=True)
        _, base_seconds = perplexity(args, "--kl-divergence-base", base)
        for spec in ["q4_0", *(args.policies or POLICIES)]:
            print(f"kld: {spec}", file=sys.stderr, flush=True)
            result = compare(args, base, spec, Path(folder) / "report.json")
            record = {
                "task": "kld", "model": args.model.name, "data": args.data.name, "policy": spec,
                "options": f"-b {args.n_ctx} -ub {args.n_ubatch} --chunks {args.chunks} -fa on",
                "n_ctx": args.n_ctx, "n_tokens": args.chunks * (args.n_ctx - 1 - args.n_ctx // 2),
                **result, "cpu_seconds_fp16": round(base_seconds, 1), "run": meta}
            harness.append(args.results, "kld.jsonl", record)
            rows.append(record)
    print(tables.kld(rows))
    print(f"\nf16 base: PPL {rows[0]['ppl_fp16']:.3f}, {base_seconds:.0f} CPU seconds")


if __name__ == "__main__":
    main()
