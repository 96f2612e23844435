#!/usr/bin/env python3
"""The CUDA plug-in in an unmodified llama.cpp: text, predictions, speed and memory, in one command.

  tools/build_llama.sh --cuda && cmake --preset cuda && cmake --build --preset cuda
  bench/cuda_llama.py --json bench/results/cuda_llama.jsonl

Plain CUDA with cache types f16 and q4_0 runs beside it, in turns. Speed is of a random model of the
Llama-3-8B shape, made on the spot; predictions are of the model given by --model (or of a random
one, which shows errors of the kernels but no quality). Memory is what the driver counts at its
peak, less that of the same program with next to no context.
"""

import argparse
import datetime
import hashlib
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).parent.parent
ZIPCACHE = ["-dev", "ZipCacheCUDA"]
CACHES = {  # name -> (arguments, environment)
    "f16": ([], {}),
    "q4_0": (["-ctk", "q4_0", "-ctv", "q4_0"], {}),
    "q8_0": (["-ctk", "q8_0", "-ctv", "q8_0"], {}),
    "zipcache": (ZIPCACHE, {}),
    # Fewer, longer runs of pages with one scale set; of prompts that come 2048 tokens at a time.
    "zipcache blocks of 2048": ([*ZIPCACHE, "-ub", "2048"], {"ZIPCACHE_BLOCK": "2048"}),
    "zipcache fp16": (ZIPCACHE, {"ZIPCACHE_POLICY": "fp16"}),
    "zipcache 8 bits": (ZIPCACHE, {"ZIPCACHE_POLICY": "uniform", "ZIPCACHE_KEY_BITS": "8",
                                   "ZIPCACHE_VALUE_BITS": "8"}),
}


class Memory:
    """The largest memory.used that nvidia-smi shows while in the block, MiB."""

    def __enter__(self):
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self):
        while not self._stop.is_set():
            out = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
                                 capture_output=True, text=True, check=False).stdout.split()
            self.peak = max(self.peak, int(out[0]) if out else 0)
            time.sleep(0.3)  # each look holds locks of the driver that the program needs, too

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


class Bench:
    def __init__(self, args):
        self.args = args
        self.lines = []
        device = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
                                capture_output=True, text=True, check=False).stdout.strip()
        self.run_meta = {"device": device, "date": datetime.date.today().isoformat()}

    def add(self, **line):
        extra, environment = CACHES[line["cache"]]
        line |= {"arguments": " ".join([f"{k}={v}" for k, v in environment.items()] + extra)}
        line["run"] = self.run_meta
        print(json.dumps(line), flush=True)
        self.lines.append(line)

    def run(self, program, cache, *arguments):
        extra, environment = CACHES[cache]
        env = os.environ | environment
        if "-dev" in extra:
            env["GGML_BACKEND_PATH"] = str(self.args.plugin)
        command = [str(self.args.llama / program), *map(str, arguments), *extra]
        done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace",
                              timeout=300, check=False)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return done

    # Greedy text: policy fp16 is CUDA0 as it is; 8 bits go through our kernels.
    def text(self, model):
        prompt = self.args.work / "prompt.txt"
        prompt.write_text(self.args.text.read_text(encoding="utf-8")[:4000], encoding="utf-8")
        plain = None
        for cache in ("f16", "zipcache fp16", "zipcache 8 bits", "zipcache"):
            out = self.run("llama-completion", cache, "-m", model, "-ngl", 99, "-fa", "on", "-fit",
                           "off", "-c", 8192, "-n", 64, "--temp", 0, "-no-cnv", "--no-warmup",
                           "--no-display-prompt", "-f", prompt).stdout
            plain = plain if plain is not None else out
            self.add(bench="text", model=pathlib.Path(model).name, cache=cache, n_tokens=64,
                     same_as_f16=out == plain, md5=hashlib.md5(out.encode()).hexdigest(), text=out[:80])

    def predictions(self, model):
        base = self.args.work / "base.kld"
        common = ["-m", model, "-ngl", 99, "-fa", "on", "-fit", "off", "-f", self.args.text, "-c",
                  self.args.n_ctx, "--chunks", self.args.chunks, "--kl-divergence-base", base]
        self.run("llama-perplexity", "f16", *common)
        for cache in ("zipcache fp16", "zipcache 8 bits", "zipcache", "zipcache blocks of 2048",
                      "q8_0", "q4_0"):
            n_ctx = self.args.n_ctx
            if "2048" in cache and n_ctx <= 2048:
                continue  # a context in one batch: nothing is sealed before it is over
            for n_sequences in ((1, 4) if cache == "zipcache" and n_ctx <= 2048 else (1,)):
                out = self.run("llama-perplexity", cache, *common, "--kl-divergence", "-b",
                               max(2048, n_sequences * self.args.n_ctx)).stdout
                found = {key: float(value) for key, value in re.findall(
                    r"^(Mean PPL\(Q\)|Mean PPL\(base\)|Mean +KLD|Same top p) *: *(\S+)", out, re.M)}
                self.add(bench="kld", model=pathlib.Path(model).name, cache=cache,
                         n_ctx=self.args.n_ctx, chunks=self.args.chunks, n_sequences=n_sequences,
                         **{re.sub(r"\W+", "_", key).strip("_").lower(): value
                            for key, value in found.items()})

    def speed(self, model):
        points = [("4096,32768", 1, 256, 33280), ("8192", 8, 128, 66560)]
        caches = self.args.caches
        seen, memory, floor = {}, {}, {}
        common = ["-m", model, "-ngl", 99, "-fa", "on", "-fit", "off", "--output-format", "jsonl"]
        for cache in caches:
            with Memory() as used:
                # As large a batch as the cache's others, or the host reserves less for its activations;
                # long enough to be seen after the last buffer came.
                self.run("llama-batched-bench", cache, *common, "-c", 2304 if "2048" in cache else 512,
                         "-npp", 192, "-ntg", 320, "-npl", 1)
            floor[cache] = used.peak
        for turn in range(self.args.rounds):
            for n_prompt, batch, n_gen, n_ctx in points:
                for cache in caches:
                    if cache == "q4_0" and turn > 0:
                        continue
                    with Memory() as used:
                        out = self.run("llama-batched-bench", cache, *common, "-c", n_ctx, "-npp",
                                       n_prompt, "-ntg", n_gen, "-npl", batch).stdout
                    for line in (json.loads(line) for line in out.splitlines() if line.startswith("{")):
                        key = (cache, line["pp"], batch)
                        seen.setdefault(key, []).append((line["speed_pp"], line["speed_tg"]))
                        memory[key] = used.peak
        for (cache, n_prompt, batch), rates in seen.items():
            decode = statistics.median(rate for _, rate in rates)
            plain = statistics.median(rate for _, rate in seen["f16", n_prompt, batch])
            largest = max(n for c, n, b in seen if c == cache and b == batch)
            cache_mib = memory[cache, n_prompt, batch] - floor[cache]
            plain_mib = memory["f16", n_prompt, batch] - floor["f16"]
            line = {"bench": "speed", "model": "random Llama-3-8B shape, Q4_0", "cache": cache,
                    "n_prompt": n_prompt, "batch": batch, "rounds": len(rates),
                    "prefill_tok_s": statistics.median(rate for rate, _ in rates),
                    "decode_tok_s": decode, "decode_vs_f16": decode / plain,
                    "decode_tok_s_all": [rate for _, rate in rates]}
            if n_prompt == largest:
                line |= {"cache_mib": cache_mib, "smaller_than_f16": plain_mib / max(cache_mib, 1)}
            self.add(**line)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=pathlib.Path, default=ROOT / "build/llama.cpp/build-cuda/bin")
    parser.add_argument("--plugin", type=pathlib.Path,
                        default=ROOT / "build/cuda/lib/libggml-zipcache-cuda.so")
    parser.add_argument("--model", type=pathlib.Path, help="of text and predictions")
    parser.add_argument("--text", type=pathlib.Path, default=ROOT / "docs/formats.md")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "build/models")
    parser.add_argument("--n-ctx", type=int, default=2048)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--caches", nargs="*", help="of speed, f16 first",
                        default=["f16", "zipcache", "zipcache blocks of 2048", "q4_0"])
    parser.add_argument("--only", choices=["text", "kld", "speed"], nargs="*",
                        default=["text", "kld", "speed"])
    parser.add_argument("--json", type=pathlib.Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)

    def random_model(shape):
        path = args.work / f"random-{shape}.gguf"
        if not path.exists():
            subprocess.run([sys.executable, ROOT / "bench/random_gguf.py", path, "--shape", shape],
                           check=True)
        return path

    small = args.model or (random_model("1b") if {"text", "kld"} & set(args.only) else None)
    if "text" in args.only:
        bench.text(small)
    if "kld" in args.only:
        bench.predictions(small)
    if "speed" in args.only:
        bench.speed(random_model("8b"))
    args.json.write_text("".join(json.dumps(line) + "\n" for line in bench.lines), encoding="utf-8")


if __name__ == "__main__":
    main()
