#!/usr/bin/env python3
"""The plug-in with tiny random models of architectures that no small published model has, inside the
real llama-perplexity: what llama.cpp predicts without the plug-in is the reference.

    architectures_e2e.py --plugin libggml-zipcache.so --bin DIR [unittest arguments]
"""

import re
import tempfile
import unittest
from pathlib import Path

import llama_programs
import tiny_gguf
from llama_programs import run

N_CTX = 256
TEXT = Path(__file__).read_text(encoding="utf-8")[:1500]  # bytes are tokens


class ArchitectureTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.model, self.base = self.folder / "model.gguf", self.folder / "base.kld"
        self.text = self.folder / "text.txt"
        self.text.write_text(TEXT, encoding="utf-8")

    def logged(self, pattern, *arguments, **options):
        """Runs a program until `pattern` is in what it prints: (match, run). llama.cpp's programs log
        from a thread, and one that ends within milliseconds may leave before its last lines do."""
        for _ in range(9):
            done = run(*arguments, model=self.model, **options)
            found = re.search(pattern, done.stdout + done.stderr)
            if found:
                return found, done
        self.fail(f"no '{pattern}' in:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")

    def perplexity(self, pattern, *arguments, **options):
        return self.logged(pattern, "llama-perplexity", "-f", self.text, "-c", N_CTX, "-b", N_CTX,
                           "-ub", 64, "--kl-divergence-base", self.base, *arguments, **options)

    def divergence(self, **settings):
        """Mean KL divergence from plain llama.cpp, and what went to stderr."""
        found, done = self.perplexity(r"Mean    KLD:\s*(-?[\d.]+)", "--kl-divergence", **settings)
        return float(found.group(1)), done.stderr

    def check(self, write_model):
        write_model(self.model)
        self.perplexity("", plugin=False)
        exact, report = self.divergence(policy="fp16")
        # Measured: at most 1e-6; 0.0007 without the cap, 0.005 without sinks, 0.06 without the bias.
        self.assertLess(abs(exact), 2e-5)
        self.assertIn("bits per element", report)
        # Random keys and values compress badly: measured up to 0.05.
        compressed, _ = self.divergence()
        self.assertLess(compressed, 0.2)

    def test_plain(self):
        self.check(tiny_gguf.llama)

    def test_soft_cap_and_sliding_window(self):
        self.check(tiny_gguf.soft_cap)

    def test_sinks_and_sliding_window(self):
        self.check(tiny_gguf.sinks)

    def test_alibi(self):
        self.check(tiny_gguf.alibi)

    def test_hybrid(self):
        self.check(tiny_gguf.hybrid)

    def test_recurrent_model_is_left_alone(self):
        tiny_gguf.recurrent(self.model)
        self.perplexity("", plugin=False)
        exact, report = self.divergence()
        self.assertLess(abs(exact), 1e-6)
        self.assertNotIn("bits per element", report)  # nothing of ours to report

    def refused(self, line):
        _, done = self.logged("zipcache: .*" + line, "llama-completion", "-p", "abc", "-n", 2,
                              "-no-cnv", "-c", N_CTX, check=False)
        self.assertGreater(done.returncode, 0)

    def test_latent_attention_is_refused(self):
        tiny_gguf.latent(self.model)
        self.refused("MLA")

    def test_odd_head_size_is_refused(self):
        tiny_gguf.llama(self.model, head_dim=24)
        self.refused("heads of 24 elements are not served; supported: multiples of 16 up to 512")


if __name__ == "__main__":
    llama_programs.main(__doc__)
