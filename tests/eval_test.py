#!/usr/bin/env python3
"""`zipcache eval` and `zipcache ratio` as their users meet them, on a text and tasks written here.

    eval_test.py --zipcache PROGRAM --plugin FILE --bin FOLDER --model M.gguf [unittest arguments]
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import tiny_gguf

OPTIONS = None  # the parsed command line
SECONDS = 600
SKIPPED = 77
WINDOW = 64  # tokens
TEXT = " ".join(f"On day {day} the ship sailed {day * 7 % 31} miles to the north, and the captain "
                f"wrote {('a letter', 'his log', 'nothing')[day % 3]}." for day in range(1, 40))


def environment(**settings):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ZIPCACHE_", "GGML_BACKEND_"))}
    return {**env, **settings}


def run(*command, **settings):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=SECONDS,
                          env=environment(**settings))


class EvalTest(unittest.TestCase):
    def setUp(self):
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        self.text = self.write("text.txt", TEXT)

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def evaluate(self, *arguments, **settings):
        return run(OPTIONS.zipcache, "eval", "-m", OPTIONS.model, "-t", 1, *arguments,
                   **{"ZIPCACHE_DATA": str(self.folder), **settings})

    def results(self, *arguments):
        """The records of a run that succeeds."""
        path = self.folder / "results.jsonl"
        done = self.evaluate(*arguments, "--json", path)
        self.assertEqual(done.returncode, 0, done.stderr)
        return [json.loads(line) for line in path.read_text().splitlines()]

    def assert_one_line(self, done, *words, code=1):
        self.assertEqual(done.returncode, code, done.stderr)
        self.assertEqual(done.stdout, "")
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        self.assertTrue(done.stderr.startswith("zipcache: "), done.stderr)
        for word in words:
            self.assertIn(str(word), done.stderr)

    def ppl(self, *arguments, n_ctx=WINDOW, n_ubatch=32):
        return ["--task", "ppl", "--data", self.text, "-c", n_ctx, "-ub", n_ubatch, *arguments]


class Perplexity(EvalTest):
    def llama_perplexity(self, *arguments, **settings):
        done = run(OPTIONS.bin / "llama-perplexity", "-m", OPTIONS.model, "-f", self.text, "-c",
                   WINDOW, "-b", WINDOW, "-ub", 32, "-t", 1, "-fa", "on", "--chunks", 5,
                   "--kl-divergence-base", self.folder / "base.kld", *arguments, **settings)
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        return re.findall(r"^((?:Mean|Max|Min|Median|Cor|RMS|Same| *\d+\.\d%).*?):\s*(.*)$",
                          done.stdout + done.stderr, re.MULTILINE)

    def test_is_that_of_llama_perplexity(self):
        mine = self.evaluate(*self.ppl("--chunks", 5, "q4_0", "hold=0,seal=32")).stdout
        self.llama_perplexity()
        parts = re.split(r"^(q4_0|hold=0,seal=32)\n", mine, flags=re.MULTILINE)[1:]
        mine = dict(zip(parts[::2], parts[1::2]))
        for policy, theirs in (
                ("q4_0", self.llama_perplexity("--kl-divergence", "-ctk", "q4_0", "-ctv", "q4_0")),
                ("hold=0,seal=32", self.llama_perplexity(
                    "--kl-divergence", "-dev", "ZipCache", "-ngl", 99,
                    GGML_BACKEND_PATH=OPTIONS.plugin, ZIPCACHE_HOLD="0", ZIPCACHE_SEAL="32"))):
            self.assertGreater(len(theirs), 30)
            for label, values in theirs:
                with self.subTest(policy=policy, label=label):
                    found = re.search(rf"^{re.escape(label)}:\s*(.*)$", mine[policy], re.MULTILINE)
                    self.assertIsNotNone(found)
                    for a, b in zip(re.findall(r"-?[\d.]+", found[1]),
                                    re.findall(r"-?[\d.]+", values)):
                        self.assertAlmostEqual(float(a), float(b), delta=1e-4 + 1e-3 * abs(float(b)))

    def test_records(self):
        records = self.results(*self.ppl("--chunks", 2, "q8_0", "default", "mode=paper"))
        self.assertEqual([r["policy"] for r in records], ["fp16", "q8_0", "default", "mode=paper"])
        for record in records:
            self.assertEqual(record["n_tokens"], 2 * (WINDOW - 1 - WINDOW // 2))
            self.assertEqual(record["data"], "text.txt")
            self.assertLess(record["kld_median"], record["kld_p999"])
            self.assertLessEqual(*record["ci95"])
        self.assertEqual(records[0]["bits_per_element"], 16)
        self.assertAlmostEqual(records[1]["bits_per_element"], 8.5, places=4)
        self.assertLess(abs(records[0]["kld_mean"]), 1e-5)
        self.assertLess(records[3]["bits_per_element"], 8)  # a prompt is sealed as a whole
        self.assertEqual(set(records[3]["versus"]), {"q8_0", "default"})
        self.assertEqual(sum(v for k, v in records[3]["bytes"].items() if k != "total"),
                         records[3]["bytes"]["total"])

    def test_rest_of_a_text(self):
        whole, rest = (self.results(*self.ppl("--chunks", chunks, *skip, "q8_0"))
                       for chunks, skip in ((0, []), (0, ["--skip-percent", 50])))
        self.assertLess(rest[1]["n_tokens"], whole[1]["n_tokens"])
        self.assertGreaterEqual(2 * rest[1]["n_tokens"] + WINDOW, whole[1]["n_tokens"])
        self.assertNotEqual(rest[0]["ppl"], whole[0]["ppl"])

    def test_token_by_token(self):
        at_once, alone = (self.results(*self.ppl("--chunks", 1, "--style", style, "policy=fp16",
                                                 "mode=paper"))
                          for style in ("prompt", "decode"))
        self.assertAlmostEqual(at_once[1]["ppl"], alone[1]["ppl"], delta=0.02 * alone[1]["ppl"])
        # Sealed is what came before the scored half; the rest is staged, one token after the other.
        self.assertEqual(at_once[2]["bytes"]["staging"], 0)
        self.assertGreater(alone[2]["bytes"]["staging"], 0)

    def test_goes_on_where_it_stopped(self):
        out = self.folder / "run"
        arguments = ["--chunks", 2, "q8_0", "--out", out]
        command = self.ppl(*arguments)

        def without_time(records):
            return [{k: v for k, v in r.items() if k not in ("cpu_seconds", "run")} for r in records]

        whole = without_time(self.results(*command))
        samples = (out / "samples.jsonl").read_text().splitlines(keepends=True)
        self.assertEqual(len(samples), 4)
        (out / "samples.jsonl").write_text("".join(samples[:1]) + samples[1][:100])
        done = self.evaluate(*command)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("1 of 4 samples are there already", done.stderr)
        self.assertEqual(without_time([json.loads(line) for line in
                                       (out / "results.jsonl").read_text().splitlines()]), whole)
        # Another policy is added to what is there; another option is another run.
        self.assertIn("4 of 6 samples", self.evaluate(*command, "q4_0").stderr)
        self.assert_one_line(self.evaluate(*self.ppl(*arguments, n_ubatch=64)), "options was",
                             "-ub 32", "-ub 64")
        self.write("text.txt", TEXT + " The end.")
        self.assert_one_line(self.evaluate(*command), "files was", "text.txt")


class Tasks(EvalTest):
    def test_lines(self):
        records = self.results("--task", "lines", "--lines", 2, "--items", 2, "policy=fp16")
        self.assertEqual(records[1]["n_items"], 2)
        self.assertEqual(records[1]["score"], records[0]["score"])
        self.assertIn("mcnemar_p", records[1]["versus"]["fp16"])

    def test_gsm8k(self):
        self.write("gsm8k/test.jsonl", json.dumps(
            {"question": "What is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"}) + "\n")
        self.write("prompts/gear/gsm8k_prompt_original.txt",
                   "Question: What is 2 + 2?\nLet's think step by step\n2 + 2 = 4.\n"
                   "The answer is 4.\n\n")
        for flags in ([], ["--chat"]):
            records = self.results("--task", "gsm8k", "-n", 24, *flags, "policy=fp16")
            self.assertEqual(records[0]["score"], records[1]["score"])

    def test_humaneval(self):
        self.write("h.jsonl", json.dumps(
            {"task_id": "T/0", "prompt": "x = [1, 2, 3]\n", "entry_point": "x",
             "test": "def check(x):\n    assert x[:3] == [1, 2, 3]"}) + "\n")
        command = ["--task", "humaneval", "--data", "h.jsonl", "-n", 1, "default"]
        self.assertNotIn("score", self.results(*command)[1])
        self.assertIn("score", self.results(*command, "--execute")[1])

    def test_longbench(self):
        config = self.folder / "longbench" / "config"
        self.write(config / "dataset2prompt.json", json.dumps(
            {"hotpotqa": "{context}\n\nQuestion: {input}\nAnswer:"}))
        self.write(config / "dataset2maxlen.json", json.dumps({"hotpotqa": 8}))
        self.write("hotpotqa.jsonl", json.dumps(
            {"input": "Where is it?", "context": "It is in Rome. " * 40, "answers": ["Rome"]}))
        for flags in ([], ["-c", 64]):  # the second cuts the middle
            records = self.results("--task", "longbench", "--data", "hotpotqa.jsonl", *flags,
                                   "default")
            self.assertGreaterEqual(records[1]["score"], 0)

    def test_agreement(self):
        records = self.results("--task", "agreement", "--data", self.text, "--items", 1,
                               "--prompt-tokens", 48, "-n", 8, "policy=uniform,key-bits=2,"
                               "value-bits=2,hold=0,seal=32")
        self.assertEqual(records[0]["score"], 1)
        self.assertEqual(records[0]["first_difference"], 8)
        self.assertLessEqual(records[1]["first_difference"], 8)


class Calibrated(EvalTest):
    """Policies that take what a text showed of the model's channels."""

    WINDOW_POLICY = ",sinks=0,hold=0,seal=32,calibration="

    def calibrate(self, name="calibration.json", data=None, tokens=256, n_ctx=128):
        path = self.folder / name
        return path, run(OPTIONS.zipcache, "calibrate", "-m", OPTIONS.model, "-t", 1, "--data",
                         data or self.text, "--tokens", tokens, "-c", n_ctx, "-ub", 64, "-o", path)

    def calibrated(self, name="calibration.json", tokens=256):
        path, done = self.calibrate(name, tokens=tokens)
        self.assertEqual(done.returncode, 0, done.stderr)
        return path

    def test_file(self):
        path = self.calibrated()
        made = json.loads(path.read_text())
        self.assertEqual([made[key] for key in ("format", "version", "model", "text", "n_tokens")],
                         ["zipcache calibration", 1, OPTIONS.model.name, "text.txt", 256])
        self.assertRegex(made["model_fingerprint"], f"^{OPTIONS.model.stat().st_size}:")
        self.assertEqual([layer["layer"] for layer in made["layers"]], list(range(30)))
        for layer in made["layers"]:
            self.assertEqual([layer[key] for key in ("n_kv_heads", "key_dim", "value_dim")],
                             [3, 64, 64])
            for figure in ("key_min", "key_max", "query_max", "value_min", "value_max"):
                self.assertEqual(len(layer[figure]), 192)
            self.assertLess(max(layer["key_min"]), 0.5 * max(layer["key_max"]))
            self.assertGreater(min(layer["query_max"]), 0)
        self.assertEqual(self.calibrated("again.json").read_bytes(), path.read_bytes())
        # More of the same text only widens what was seen.
        more = json.loads(self.calibrated("more.json", tokens=512).read_text())
        self.assertEqual(more["n_tokens"], 512)
        for before, after in zip(made["layers"], more["layers"]):
            for figure in ("key_max", "query_max", "value_max"):
                self.assertTrue(all(a <= b for a, b in zip(before[figure], after[figure])))

    def test_policies(self):
        path = self.calibrated()
        flat = json.loads(path.read_text())
        for layer in flat["layers"]:
            for figure, value in (("key_min", -1), ("key_max", 1), ("query_max", 1),
                                  ("value_min", -1), ("value_max", 1)):
                layer[figure] = [value] * len(layer[figure])
        flat_path = self.write("flat.json", json.dumps(flat))
        policies = [f"policy={name}{self.WINDOW_POLICY}{file}"
                    for name in ("static,key-bits=3", "skvq,key-bits=3,value-bits=3")
                    for file in (path, flat_path)]
        records = self.results(*self.ppl("--chunks", 2, *policies, n_ctx=128))
        static, static_flat, skvq, skvq_flat = records[1:]
        for ours, alike in ((static, static_flat), (skvq, skvq_flat)):
            self.assertEqual(ours["bytes"], alike["bytes"])  # what is given takes no less
            self.assertLess(ours["kld_mean"], 0.9 * alike["kld_mean"])
            self.assertLess(ours["bits_per_element"], 6)
            self.assertLess(ours["kld_mean"], 0.5)

    def test_ratio_needs_no_file_and_counts_what_a_run_holds(self):
        path = self.calibrated()
        for policy in ("static", "skvq"):
            done = run(OPTIONS.zipcache, "run", "-m", OPTIONS.model, "-t", 1, "--raw", "--file",
                       self.text, "--max-prompt-tokens", 300, "-n", 1, "-b", 128, "-ub", 128,
                       "--json", self.folder / "run.json", ZIPCACHE_POLICY=policy,
                       ZIPCACHE_CALIBRATION=str(path))
            self.assertEqual(done.returncode, 0, done.stderr)
            held = json.loads((self.folder / "run.json").read_text())
            done = run(OPTIONS.zipcache, "ratio", "-m", OPTIONS.model, "--tokens",
                       held["n_prompt"], "-ub", 128, f"policy={policy}", "--json",
                       self.folder / "ratio.json")
            self.assertEqual(done.returncode, 0, done.stderr)
            counted = json.loads((self.folder / "ratio.json").read_text())["rows"][0]
            self.assertEqual(counted["bytes"], held["bytes"])

    def test_ratio_counts_what_generation_holds(self):
        done = run(OPTIONS.zipcache, "run", "-m", OPTIONS.model, "-t", 1, "--raw", "--file",
                   self.text, "--max-prompt-tokens", 200, "-n", 40,
                   "--json", self.folder / "run.json")
        self.assertEqual(done.returncode, 0, done.stderr)
        held = json.loads((self.folder / "run.json").read_text())
        # The last token that is answered is not in the cache.
        done = run(OPTIONS.zipcache, "ratio", "-m", OPTIONS.model, "--prompt", held["n_prompt"],
                   "--tokens", held["n_prompt"] + held["n_generated"] - 1, "--json",
                   self.folder / "ratio.json")
        self.assertEqual(done.returncode, 0, done.stderr)
        counted = json.loads((self.folder / "ratio.json").read_text())["rows"][0]
        self.assertEqual(counted["bytes"], held["bytes"])

    def test_another_file_is_another_run(self):
        path, out = self.calibrated(), self.folder / "run"
        command = self.ppl("--chunks", 1, f"policy=static,calibration={path}", "--out", out)
        self.assertEqual(self.evaluate(*command).returncode, 0)
        self.calibrated(tokens=512)
        self.assert_one_line(self.evaluate(*command), "files was", "calibration.json")

    def test_errors(self):
        path = self.calibrated()
        remedy = "zipcache calibrate -m MODEL -o FILE"
        self.assert_one_line(self.evaluate("policy=static"), "calibration: missing", remedy)
        self.assert_one_line(self.evaluate("policy=skvq,calibration=absent.json"), "absent.json",
                             remedy)
        self.assert_one_line(self.evaluate(f"key-bits=4,calibration={path}"), "does not apply")
        self.assert_one_line(self.evaluate("policy=static", ZIPCACHE_CALIBRATION=str(path)),
                             "ZIPCACHE_CALIBRATION is set")
        text = path.read_text()
        for changed, words in ((text[:1000], "no calibration of zipcache"),
                               (text.replace('"version":1', '"version":2'), "found version 2"),
                               (text.replace('"key_min":[', '"key_min":[0,'), "193 figures"),
                               (text.replace('"layer":7,', '"layer":77,'), "layer 8 after layer 77"),
                               (text.replace('"key_dim":64', '"key_dim":65', 1), "of 65 channels")):
            bad = self.write("bad.json", changed)
            self.assert_one_line(self.evaluate(f"policy=skvq,calibration={bad}"), bad, words, remedy)

    def test_a_file_of_another_model(self):
        path, model = self.calibrated(), self.folder / "other.gguf"
        tiny_gguf.llama(model, head_dim=32)
        for policy in ("static", "skvq"):
            done = run(OPTIONS.zipcache, "run", "-m", model, "-t", 1, "-p", "a", "-n", 1,
                       "--policy", policy, "--calibration", path)
            self.assertEqual(done.returncode, 1)
            self.assertRegex(done.stderr.splitlines()[-1],
                             "layer 0 has .* of 32 .*, but the calibration says 3 KV heads of 64 .*"
                             "another model's; make one of this with zipcache calibrate")

    def test_calibrate_errors(self):
        self.assert_one_line(self.calibrate("absent/c.json")[1], "absent/c.json")
        self.assert_one_line(self.calibrate(data="absent.txt")[1], "absent.txt")
        self.assert_one_line(self.calibrate(n_ctx=100000, tokens=100000)[1], self.text,
                             "tokens")
        self.assert_one_line(self.calibrate(tokens=1)[1], "--tokens", code=2)


class Errors(EvalTest):
    def test_one_clear_line(self):
        self.assert_one_line(self.evaluate("--task", "riddle"), "riddle", "known: ppl, lines")
        self.assert_one_line(self.evaluate("--task", "gsm8k"), "gsm8k_prompt", "ZIPCACHE_DATA")
        self.assert_one_line(self.evaluate("--data", "absent.txt"), "absent.txt")
        self.assert_one_line(self.evaluate("key-bits=5"), "key-bits=5", "2, 3, 4, 8")
        self.assert_one_line(self.evaluate("q4"), "'q4'", "name=value")
        self.assert_one_line(self.evaluate("default", "default"), "twice")
        self.assert_one_line(self.evaluate(*self.ppl(n_ctx=100000)), "tokens", "-c")
        self.assert_one_line(self.evaluate(*self.ppl(n_ctx=2)), "at least")
        self.assert_one_line(self.evaluate("--task", "lines", "--lines", 100, "-c", 64), "64")
        self.assert_one_line(self.evaluate("--task", "lines", "--style", "decode"), "--style")
        self.assert_one_line(self.evaluate("--task", "lines", "--skip-percent", 50), "--skip")
        self.assert_one_line(self.evaluate(*self.ppl(), ZIPCACHE_KEY_BITS="4"), "ZIPCACHE_KEY_BITS")
        self.assert_one_line(self.evaluate(*self.ppl("--out", self.text)), self.text)


class Ratio(EvalTest):
    def test_counts_what_a_run_holds(self):
        for policy, flags in (("default", []), ("mode=paper", ["--mode", "paper"])):
            done = run(OPTIONS.zipcache, "run", "-m", OPTIONS.model, "-t", 1, "--raw", "--file",
                       self.text, "--max-prompt-tokens", 300, "-n", 1, "-b", 128, "-ub", 128,
                       "--json", self.folder / "run.json", *flags)
            self.assertEqual(done.returncode, 0, done.stderr)
            held = json.loads((self.folder / "run.json").read_text())
            done = run(OPTIONS.zipcache, "ratio", "-m", OPTIONS.model, "--tokens",
                       held["n_prompt"], "-ub", 128, policy, "--json", self.folder / "ratio.json")
            self.assertEqual(done.returncode, 0, done.stderr)
            counted = json.loads((self.folder / "ratio.json").read_text())["rows"][0]
            self.assertEqual(counted["bytes"], held["bytes"])
            self.assertEqual(counted["ratio"], held["ratio"])

    def test_errors(self):
        self.assert_one_line(run(OPTIONS.zipcache, "ratio", "-m", self.text), "text.txt", "GGUF")
        self.assert_one_line(run(OPTIONS.zipcache, "ratio", "--head-dim", 24), "24", "multiples")
        self.assert_one_line(run(OPTIONS.zipcache, "ratio", "q4_0"), "q4_0")
        self.assert_one_line(run(OPTIONS.zipcache, "ratio", "--tokens", "0"), "--tokens", code=2)


def main():
    global OPTIONS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("zipcache", "plugin", "bin", "model"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    OPTIONS, rest = parser.parse_known_args()
    if not OPTIONS.model.exists():
        print(f"eval_test: skipped, {OPTIONS.model} is missing; run: make models")
        sys.exit(SKIPPED)
    unittest.main(argv=[sys.argv[0], *rest])


if __name__ == "__main__":
    main()
