#!/usr/bin/env python3
"""The CUDA plug-in inside unmodified llama.cpp programs, on a GPU: saved, restored, copied, shifted.

Beside it CUDA0 alone. The cache is given 8 bits, so that answers are those of f16 but for ties and
rows of saved files can be compared number by number. The model is a random one of two layers, made on
the spot: it shows errors, not quality.

    cuda_e2e.py --plugin libggml-zipcache-cuda.so --bin DIR [--work DIR] [unittest arguments]
"""

import concurrent.futures
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np

import llama_programs
from llama_programs import OPTIONS, Server, run
import plugin_e2e
import tiny_gguf

EXACT = {"policy": "uniform", "key_bits": 8, "value_bits": 8}
# Root mean square of rows' differences over that of the rows: 8 bits of a channel's range are about
# 0.005, a wrong position or row is above 1.
CLOSE = 0.03
# So that both caches hold the same tokens.
ALWAYS_A = {"logit_bias": [[ord("a"), 100.0]]}
STORIES = [
    "The history of the city of Rome begins with a quarrel of two brothers over a hill. ",
    "A small boat left the harbour in the morning. The fisherman sang, the sea was calm. ",
    "The three most important inventions of the last century are not what most believe. ",
    "Once upon a time there was a king who had no children, but a garden full of trees. ",
]


def same_tokens(test, found, expected, at_least=1):
    """Of a random model ties are many."""
    return plugin_e2e.same_tokens(test, found, expected, at_least)


def distance(left, right):
    """Of two saved states: relative root mean square of the difference of all f16 in them. Headers
    are the same in both."""
    a, b = (np.frombuffer(path.read_bytes()[:path.stat().st_size // 2 * 2], np.float16)
            for path in (left, right))
    if a.size != b.size:
        return float("inf")
    same = a.view(np.uint16) == b.view(np.uint16)
    with np.errstate(invalid="ignore"):
        a, b = a.astype(np.float64), b.astype(np.float64)
    used = ~same & np.isfinite(a) & np.isfinite(b)
    scale = np.sqrt(np.mean(np.square(b[np.isfinite(b) & (np.abs(b) < 100)])))
    return float(np.sqrt(np.sum(np.square(a[used] - b[used])) / b.size) / scale)


class CudaTest(unittest.TestCase):
    def saved(self, folder, name, talk, *arguments, **options):
        """A server's answers of `talk`, and the file of its slot's state after them."""
        with Server("-np", 1, "--slot-save-path", folder, *arguments, **options) as server:
            answers = talk(server)
            server.post("/slots/0?action=save", {"filename": name})
        return answers, Path(folder) / name

    def test_saved_rows_are_those_of_f16(self):
        # A prompt and 200 decoded tokens: sealed by both, staged tokens and sinks.
        def talk(server):
            return server.complete("".join(STORIES * 2)[:620], n=200, cache_prompt=False, **ALWAYS_A)
        for settings, limit in ((EXACT, CLOSE), ({}, 0.4)):
            with self.subTest(settings), tempfile.TemporaryDirectory() as folder:
                _, plain = self.saved(folder, "plain.bin", talk, "-c", 1024, plugin=False)
                _, ours = self.saved(folder, "ours.bin", talk, "-c", 1024, **settings)
                print(f"rows {settings}: {distance(ours, plain):.4f}", flush=True)
                self.assertLess(distance(ours, plain), limit)

    def test_saved_slot_goes_both_ways(self):
        prompt = "".join(STORIES * 3)[:800]
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["-c", 2048, "-np", 1, "--slot-save-path", folder]

            def save(server, name):
                answer = server.complete(prompt, id_slot=0)
                server.post("/slots/0?action=save", {"filename": name})
                return answer

            def restore(server, name, expected):
                server.post("/slots/0?action=erase", {})
                server.post("/slots/0?action=restore", {"filename": name})
                answer = server.complete(prompt, id_slot=0)
                self.assertGreater(answer["timings"]["cache_n"], 700)
                same_tokens(self, answer, expected)

            with Server(*arguments, plugin=False) as plain:
                expected = save(plain, "plain.bin")
            with Server(*arguments, **EXACT) as server:
                same_tokens(self, save(server, "ours.bin"), expected)
                restore(server, "ours.bin", expected)
            with Server(*arguments, **EXACT) as server:
                restore(server, "plain.bin", expected)
                restore(server, "ours.bin", expected)
                # Restored rows are exact until the next step, so what is saved then is the file.
                server.post("/slots/0?action=restore", {"filename": "plain.bin"})
                server.post("/slots/0?action=save", {"filename": "again.bin"})
            self.assertLess(distance(Path(folder) / "again.bin", Path(folder) / "plain.bin"), 1e-6)
            with Server(*arguments, plugin=False) as plain:
                restore(plain, "ours.bin", expected)
            with Server(*arguments) as server:  # the default
                expected = save(server, "default.bin")
                server.post("/slots/0?action=restore", {"filename": "default.bin"})
                again = server.complete(prompt, id_slot=0)
                self.assertGreater(again["timings"]["cache_n"], 700)
                same_tokens(self, again, expected)

    def test_before_anything_was_computed(self):
        # Rows are restored into a cache that has seen no attention yet.
        prompt = "".join(STORIES)[:300]
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["-c", 1024, "-np", 1, "--slot-save-path", folder]
            with Server(*arguments, plugin=False) as plain:
                expected = plain.complete(prompt, id_slot=0)
                plain.post("/slots/0?action=save", {"filename": "plain.bin"})
            with Server(*arguments, "--no-warmup", **EXACT) as server:
                server.post("/slots/0?action=restore", {"filename": "plain.bin"})
                same_tokens(self, server.complete(prompt, id_slot=0), expected)

    def test_copies_of_a_prompt(self):
        prompt = "".join(STORIES * 2)[:600]
        for settings in (EXACT, {}):
            with self.subTest(settings), Server("-c", 4096, "-np", 4, "--no-kv-unified",
                                                **settings) as server:
                alone = server.complete(prompt, cache_prompt=False)
                answers = server.complete(prompt, n_cmpl=3)
                self.assertEqual(len(answers), 3)
                same_tokens(self, answers[1], answers[0])
                same_tokens(self, answers[2], answers[0])
                if settings:
                    same_tokens(self, answers[0], alone)

    def test_overlapping_requests_and_prefix_reuse(self):
        prompts = [f"Chapter {n}. {story}" * 3 for n in range(1, 3) for story in STORIES]
        for slots in (["-np", "4"], ["-np", "4", "--kv-unified"]):
            with self.subTest(slots=slots), Server("-c", 8192, *slots, **EXACT) as server:
                alone = [server.complete(prompt, n=16, cache_prompt=False) for prompt in prompts]
                with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
                    together = list(pool.map(lambda prompt: server.complete(prompt, n=16), prompts))
                for pair in zip(together, alone):
                    same_tokens(self, *pair, at_least=1)
                again = server.complete(prompts[-1], n=16)
                self.assertGreater(again["timings"]["cache_n"], 0)
                same_tokens(self, again, alone[-1], at_least=1)

    def test_prompts_parked_in_memory(self):
        # One slot and three talks: each time the slot's state goes to the RAM cache and comes back.
        with Server("-c", 1024, "-np", 1, **EXACT) as server:
            talks = [story * 4 for story in STORIES[:3]]
            first = [server.complete(talk) for talk in talks]
            for talk, expected in zip(talks, first):
                again = server.complete(talk)
                self.assertGreater(again["timings"]["cache_n"], 200)
                same_tokens(self, again, expected)

    def test_chunks_reused_by_shifting(self):
        story = "".join(STORIES * 2)[:600]
        def talk(server):
            server.complete("Chapter one. Some words that are dropped later. " + story, n=1)
            return server.complete("Chapter one. " + story, n=4, **ALWAYS_A)
        arguments = ["-c", 1024, "--cache-reuse", 32, "--cache-ram", 0]
        with tempfile.TemporaryDirectory() as folder:
            expected, plain = self.saved(folder, "plain.bin", talk, *arguments, plugin=False)
            found, ours = self.saved(folder, "ours.bin", talk, *arguments, **EXACT)
            self.assertGreater(found["timings"]["cache_n"], 500)
            self.assertEqual(found["timings"]["cache_n"], expected["timings"]["cache_n"])
            print(f"shifted rows: {distance(ours, plain):.4f}", flush=True)
            self.assertLess(distance(ours, plain), CLOSE)

    def test_context_shift(self):
        text = "".join(STORIES * 8)
        def answer(**options):
            with Server("-c", 512, "-np", 1, "--context-shift", "--keep", 4, **options) as server:
                tokens = server.post("/tokenize", {"content": text})["tokens"]
                answered = server.complete(tokens[:500], n=64)  # full after 12 of them
                self.assertTrue(answered["truncated"])
                return answered
        same_tokens(self, answer(**EXACT), answer(plugin=False))
        answer()

    def test_alibi(self):
        with tempfile.TemporaryDirectory() as folder:
            model, text, base = (Path(folder) / name for name in ("m.gguf", "text", "base"))
            tiny_gguf.alibi(model, head_dim=64)
            text.write_text("".join(STORIES * 8))
            common = ["-f", text, "-c", 512, "-ub", 128, "--chunks", 2, "--kl-divergence-base", base]
            run("llama-perplexity", *common, plugin=False, model=model)
            for _ in range(9):  # a program of milliseconds may leave before its last lines do
                done = run("llama-perplexity", *common, "--kl-divergence", model=model, **EXACT)
                found = re.search(r"Mean +KLD: +([-0-9.]+)", done.stdout + done.stderr)
                if found:
                    break
            found = float(found.group(1))
            print(f"KLD with ALiBi: {found}", flush=True)
            self.assertLess(found, 0.001)


def add_arguments(parser):
    parser.add_argument("--model", type=Path, help="instead of a random one")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--device", default="ZipCacheCUDA")


if __name__ == "__main__":
    is_cpu = "ZipCache" in sys.argv
    OPTIONS.plain = [] if is_cpu else ["-ngl", "99", "-dev", "CUDA0"]
    root = Path(__file__).resolve().parent.parent
    if not is_cpu and shutil.which("nvidia-smi") is None:
        print("SKIPPED: no nvidia-smi")
        sys.exit(77)
    if "--model" not in sys.argv and "-h" not in sys.argv:
        work = Path(sys.argv[sys.argv.index("--work") + 1] if "--work" in sys.argv
                    else tempfile.gettempdir())
        model = work / "random-tiny.gguf"
        subprocess.run([sys.executable, root / "bench/random_gguf.py", model, "--shape", "tiny"],
                       check=True)
        sys.argv += ["--model", str(model)]
    llama_programs.main(__doc__, add_arguments)
