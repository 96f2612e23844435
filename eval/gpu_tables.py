"""The GPU tables of docs/performance.md, from the JSON lines in bench/results/."""

import json

from harness import ROOT, markdown

RESULTS = ROOT / "bench" / "results"


def read(name):
    file = RESULTS / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def origin(records):
    first = records[0]
    return (f"\n\nMeasured by `bench/run_cuda.sh` on {first['date']}: {first['device']}, driver "
            f"{first['driver']}.\n")


def decode():
    ours, peers = read("cuda_decode.jsonl"), read("cuda_peers.jsonl")
    best = {}
    for peer in peers:
        if peer["bench"].startswith("decode"):
            best[peer["shape"]] = min(best.get(peer["shape"], 1e9), peer["seconds"])
    early = {r["shape"]: r for r in ours if r["bench"] == "decode early"}
    rows = []
    for r in ours:
        if r["bench"] != "decode":
            continue
        e = early[r["shape"]]
        fp16 = best.get(" ".join(r["shape"].split()[:2]))
        fp16 = None if any(word in r["shape"] for word in ("d64", "d256", "G8")) else fp16
        rows.append([r["shape"], f"{r['seconds'] * 1e6:.1f}",
                     f"{r['seconds_p10'] * 1e6:.1f} to {r['seconds_p90'] * 1e6:.1f}",
                     f"{r['bytes'] / 1e6:.1f}", f"{100 * r['of_read']:.1f} %",
                     f"{e['seconds'] * 1e6:.1f}", f"{100 * e['of_read']:.1f} %",
                     f"{fp16 * 1e6:.1f}" if fp16 else "", f"{fp16 / r['seconds']:.2f}x"
                     if fp16 else "", f"{fp16 / e['seconds']:.2f}x" if fp16 else ""])
    return markdown(["shape", "us", "10 to 90 %", "MB read", "of read bandwidth", "early us",
                     "of read bandwidth", "best FP16 SDPA us", "faster", "early"],
                    rows) + origin(ours)


def ceilings():
    rows = [[f"{r['bench']} {r['shape']}", f"{r['seconds'] * 1e6:.1f}",
             f"{r['bytes_per_s'] / 1e9:.0f}"]
            for r in read("cuda_decode.jsonl") if r["bench"] in ("read", "copy")]
    rows += [[f"{r['bench']} {r['shape']}", f"{r['seconds'] * 1e6:.1f}",
              f"{r['bytes_per_s'] / 1e9:.0f}"]
             for r in read("cuda_peers.jsonl") if r["bench"].startswith("decode")]
    return markdown(["what", "us", "GB/s"], rows) + origin(read("cuda_decode.jsonl"))


def prefill():
    times = {(r["bench"], r["shape"].split()[-1]): r["seconds"] for r in read("cuda_peers.jsonl")
             if r["bench"].startswith("prefill")}
    rows = []
    for r in read("cuda_decode.jsonl"):
        if r["bench"] in ("pack", "probe"):
            n = r["shape"].split(",")[0]
            rows.append([r["bench"], r["shape"], f"{r['seconds'] * 1e6:.0f}"] +
                        [f"{100 * r['seconds'] / times[(f'prefill fp16 {peer}', n)]:.2f} %"
                         for peer in ("flash", "cudnn")])
    return markdown(["kernel", "prompt", "us", "of FP16 prefill, flash", "of cuDNN's"],
                    rows) + origin(read("cuda_decode.jsonl"))


def chunk_attention():
    rows = [[*r["shape"].split(", "), f"{r['seconds'] * 1e6:.1f}"]
            for r in read("cuda_decode.jsonl") if r["bench"] == "prefill"]
    return markdown(["packed tokens", "chunk", "us"], rows) + origin(read("cuda_decode.jsonl"))


def tests():
    records = read("cuda_tests.jsonl")
    rows = [[r.get("test") or "compute-sanitizer " + r["sanitizer"],
             "passed" if r["passed"] else "failed",
             f"{r['seconds']:.1f} s" if "seconds" in r else r["summary"]] for r in records]
    return markdown(["test", "result", ""], rows) + origin(records)


TABLES = {"gpu-decode": decode, "gpu-ceilings": ceilings, "gpu-prefill": prefill,
          "gpu-chunk-attention": chunk_attention, "gpu-tests": tests}
