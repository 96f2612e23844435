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
    cold = {r["shape"]: r for r in ours if r["bench"] == "decode cold"}
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
                     f"{cold[r['shape']]['seconds'] * 1e6:.1f}",
                     f"{fp16 * 1e6:.1f}" if fp16 else "", f"{fp16 / r['seconds']:.2f}x"
                     if fp16 else "", f"{fp16 / e['seconds']:.2f}x" if fp16 else ""])
    return markdown(["shape", "us", "10 to 90 %", "MB read", "of read bandwidth", "early us",
                     "of read bandwidth", "cold us", "best FP16 SDPA us", "faster", "early"],
                    rows) + origin(ours)


def ceilings():
    rows = [[f"{r['bench']} {r['shape']}", f"{r['seconds'] * 1e6:.1f}",
             f"{r['bytes_per_s'] / 1e9:.0f}"]
            for r in read("cuda_decode.jsonl")
            if r["bench"] in ("read", "copy", "decode fp16 ours")]
    rows += [[f"{r['bench']} {r['shape']}", f"{r['seconds'] * 1e6:.1f}",
              f"{r['bytes_per_s'] / 1e9:.0f}"]
             for r in read("cuda_peers.jsonl") if r["bench"].startswith("decode")]
    return markdown(["what", "us", "GB/s"], rows) + origin(read("cuda_decode.jsonl"))


def prefill():
    times = {(r["bench"], r["shape"].split()[-1]): r["seconds"] for r in read("cuda_peers.jsonl")
             if r["bench"].startswith("prefill")}
    rows = []
    for r in read("cuda_decode.jsonl"):
        if r["bench"] in ("pack", "probe", "query power"):
            n = r["shape"].split()[0].rstrip(",")
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


def llama_origin(records):
    run = records[0]["run"]
    device, driver = run["device"].split(", ")
    dates = ", ".join(dict.fromkeys(f"{r['run']['date']}" for r in records))
    return (f"\n\nMeasured by `bench/cuda_llama.py` on {dates}: {device}, driver {driver}; "
            "llama.cpp v0.5.0 with CUDA.\n")


def llama_speed():
    records = [r for r in read("cuda_llama.jsonl") if r["bench"] == "speed"]
    records.sort(key=lambda r: (r["batch"], r["n_prompt"]))
    rows = [[f"{r['batch']} x {r['n_prompt']}", r["cache"], f"{r['decode_tok_s']:.1f}",
             f"{r['decode_vs_f16']:.2f}x", f"{r['prefill_tok_s']:.0f}",
             f"{r['cache_mib']}" if "cache_mib" in r else "",
             f"{r['smaller_than_f16']:.2f}x" if "cache_mib" in r else ""] for r in records]
    return markdown(["batch x prompt", "cache", "decode tok/s", "of f16", "prefill tok/s",
                     "cache MiB", "smaller than f16"], rows) + llama_origin(records)


def llama_predictions():
    records = [r for r in read("cuda_llama.jsonl") if r["bench"] == "kld"]
    rows = [[r["cache"], str(r["n_sequences"]), f"{r['mean_ppl_q']:.3f}", f"{r['mean_kld']:.4f}",
             f"{r['same_top_p']:.1f} %"] for r in records]
    return (f"\nPerplexity with f16: {records[0]['mean_ppl_base']:.3f}.\n\n" +
            markdown(["cache", "sequences at a time", "perplexity", "mean KL divergence", "same top token"],
                     rows).lstrip("\n") + llama_origin(records))


TABLES = {"gpu-llama-speed": llama_speed, "gpu-llama-predictions": llama_predictions,
          "gpu-decode": decode, "gpu-ceilings": ceilings, "gpu-prefill": prefill,
          "gpu-chunk-attention": chunk_attention, "gpu-tests": tests}
