#!/usr/bin/env python3
"""FP16 attention of PyTorch (cuDNN and flash) at the shapes of cuda_bench: what packed decode is
measured against. Same method: every launch of a graph reads other buffers, medians of graph replays.

Usage: cuda_peers.py [--json FILE] [--quick]
"""
import argparse
import json
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DECODE = [(8, 32768), (64, 4096), (1, 131072), (1, 32768), (8, 4096), (1, 4096)]
PREFILL = [32768, 4096]
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def attend(q, k, v, causal):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal,
                                                            enable_gqa=True)


def time_graph(launch, n_launches, n_samples):
    """Seconds per launch: (median, 10th percentile, 90th percentile)."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for n in range(min(n_launches, 3)):
            launch(n)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for n in range(n_launches):
            launch(n)
    times = []
    for sample in range(-2, n_samples):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if sample >= 0:
            times.append(begin.elapsed_time(end) * 1e-3 / n_launches)
    times.sort()
    return statistics.median(times), times[len(times) // 10], times[len(times) * 9 // 10]


def measure(backend, batch, n_query, n_kv, n_samples):
    size = 2 * batch * KV_HEADS * n_kv * HEAD_DIM * 2
    copies = 2 if n_query > 1 else max(2, min(32, (2 << 30) // size))
    half = dict(dtype=torch.float16, device="cuda")
    q = torch.randn(batch, HEADS, n_query, HEAD_DIM, **half)
    k = [torch.randn(batch, KV_HEADS, n_kv, HEAD_DIM, **half) for _ in range(copies)]
    v = [torch.randn(batch, KV_HEADS, n_kv, HEAD_DIM, **half) for _ in range(copies)]
    with sdpa_kernel(BACKENDS[backend]):
        return size, time_graph(lambda n: attend(q, k[n], v[n], n_query > 1), copies, n_samples)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--json")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    out = open(args.json, "w") if args.json else None
    shapes = [(b, 1, n) for b, n in DECODE] + [(1, n, n) for n in PREFILL]
    for batch, n_query, n_kv in shapes:
        for backend in BACKENDS:
            name = f"B{batch} {n_kv // 1024}k"
            bench = f"{'decode' if n_query == 1 else 'prefill'} fp16 {backend}"
            samples = 5 if args.quick or n_query > 1 else 20
            try:
                size, (median, p10, p90) = measure(backend, batch, n_query, n_kv, samples)
            except RuntimeError as error:  # a backend that refuses a shape
                print(f"{bench:22} {name:10} {str(error).splitlines()[0]}")
                continue
            print(f"{bench:22} {name:10} {median * 1e6:10.2f} us [{p10 * 1e6:.2f} {p90 * 1e6:.2f}] "
                  f"{size / median * 1e-9:7.0f} GB/s", flush=True)
            if out:
                line = dict(bench=bench, shape=name, seconds=median, seconds_p10=p10,
                            seconds_p90=p90, bytes=size, bytes_per_s=size / median,
                            torch=torch.__version__, device=torch.cuda.get_device_name())
                out.write(json.dumps(line) + "\n")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
