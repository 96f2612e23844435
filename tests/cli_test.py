#!/usr/bin/env python3
"""The `zipcache` program as its users meet it: answers, tables, and one clear line when it can't.

    cli_test.py --zipcache PROGRAM --model M.gguf [unittest arguments]
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import tiny_gguf

OPTIONS = None  # the parsed command line
SECONDS = 300
SKIPPED = 77


def environment(**settings):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ZIPCACHE_", "GGML_BACKEND_"))}
    return {**env, **settings}


def zipcache(*arguments, stdin=b"", **settings):
    return subprocess.run([OPTIONS.zipcache, *map(str, arguments)], input=stdin,
                          capture_output=True, timeout=SECONDS, env=environment(**settings))


def run(*arguments, model=None, **kwargs):
    """`zipcache run`, with one thread: on a busy machine two mostly wait for each other."""
    return zipcache("run", "-m", model or OPTIONS.model, "-t", 1, *arguments, **kwargs)


class CliTest(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def enterContext(self, context):  # unittest has it since Python 3.11
        value = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return value

    def assert_succeeds(self, done):
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        return done

    def assert_one_line(self, done, *words, code=1):
        """Failed with `code`, printed nothing but one line, and it has the words."""
        self.assertEqual(done.returncode, code, done.stderr.decode())
        self.assertEqual(done.stdout, b"")
        message = done.stderr.decode()
        self.assertEqual(message.count("\n"), 1, message)
        self.assertTrue(message.startswith("zipcache: "), message)
        for word in words:
            self.assertIn(str(word), message)


class Errors(CliTest):
    def test_model_is_missing_or_no_model(self):
        self.assert_one_line(run("-p", "a", model="absent.gguf"), "absent.gguf", "No such file")
        self.assert_one_line(run("-p", "a", model=self.folder), self.folder, "directory")
        text = self.folder / "text.gguf"
        text.write_text("no model at all")
        self.assert_one_line(run("-p", "a", model=text), text, "not a GGUF file")
        text.write_bytes(b"")
        self.assert_one_line(run("-p", "a", model=text), text, "not a GGUF file")

    def test_model_is_truncated(self):
        model, data = self.folder / "cut.gguf", Path(OPTIONS.model).read_bytes()
        model.write_bytes(data[:len(data) // 2])
        self.assert_one_line(run("-p", "a", model=model), model, "corrupted or incomplete")
        model.write_bytes(data[:3000])
        self.assert_one_line(run("-p", "a", model=model), model)

    def test_model_is_not_supported(self):
        model = self.folder / "model.gguf"
        tiny_gguf.llama(model, head_dim=16, architecture="perpetuum")
        self.assert_one_line(run("-p", "a", model=model), model, "perpetuum")

    def test_head_size_is_not_supported(self):
        model = self.folder / "model.gguf"
        tiny_gguf.llama(model, head_dim=24)
        done = run("-p", "a", model=model)
        self.assertEqual(done.returncode, 1)
        self.assertIn("24", done.stderr.decode().splitlines()[-1])
        # llama.cpp itself can do it, so the file is fine.
        self.assert_succeeds(run("-p", "a", "-n", 2, "--plain", model=model))

    def test_settings(self):
        self.assert_one_line(run("-p", "a", "--policy", "zip"), "policy", "zip", "fp16")
        self.assert_one_line(run("-p", "a", "--key-bits", "5"), "key-bits", "5", "2, 3, 4, 8")
        self.assert_one_line(run("-p", "a", "--policy", "fp16", "--sinks", 4), "sinks", "fp16")
        self.assert_one_line(run("-p", "a", "--plain", "--key-bits", "4"), "--plain", "key-bits")
        self.assert_one_line(run("-p", "a", "--key-bit", "4"), "--key-bit", code=2)
        done = run("-p", "a", ZIPCACHE_KEYBITS="4")  # the plug-in names it, we end
        self.assertEqual(done.returncode, 1)
        self.assertIn("ZIPCACHE_KEYBITS", done.stderr.decode())

    def test_usage(self):
        self.assert_one_line(zipcache(), "subcommand", code=2)
        self.assert_one_line(zipcache("run"), "--model", code=2)
        self.assert_one_line(run("-p", "a", "-c", "many"), "--ctx-size", "many", code=2)

    def test_input_and_output(self):
        self.assert_one_line(run("--file", "absent.txt"), "absent.txt", "No such file")
        self.assert_one_line(run(), "nothing to read")
        self.assert_one_line(run("-p", "a", "--json", "absent/o.json"), "absent/o.json")
        self.assert_one_line(run("-p", "a", "--plugin", "absent.so"), "absent.so", "no such file")
        self.assert_one_line(run("-p", "a", ZIPCACHE_PLUGIN="absent.so"), "absent.so")
        self.assert_one_line(run("-p", "a", "--plugin", OPTIONS.model), "invalid ELF")
        self.assert_one_line(run("-p", "a", "--chat-template", "?"), "--raw")

    def test_context_is_too_small(self):
        self.assert_one_line(run("-p", "a b c d e f g", "-c", 8), "context", "8", "-c")
        text = self.folder / "long.txt"
        text.write_text("word " * 9000)
        self.assert_one_line(run("--file", text), "8192", "--max-prompt-tokens")

    def test_memory_runs_out(self):
        text = self.folder / "long.txt"
        text.write_text("Some words of a text. " * 200)
        done = run("--file", text, ZIPCACHE_LIMIT_MIB="1")
        self.assertEqual(done.returncode, 1)
        self.assertIn("KV cache is full", done.stderr.decode().splitlines()[-1])


class Run(CliTest):
    def test_answers_the_same_twice(self):
        question = ("-p", "What is the capital of France?", "-n", 24)
        first = self.assert_succeeds(run(*question))
        self.assertIn(b"Paris", first.stdout)
        self.assertIn(b"bits per element", first.stderr)
        self.assertEqual(run(*question).stdout, first.stdout)
        self.assertIn(b"Paris", self.assert_succeeds(run(*question, "--plain")).stdout)

    def test_sampling_follows_the_seed(self):
        question = ("-p", "Tell me a story.", "-n", 32, "--temp", 1)
        texts = [run(*question, "--seed", seed).stdout for seed in (1, 1, 2)]
        self.assertEqual(texts[0], texts[1])
        self.assertNotEqual(texts[0], texts[2])

    def test_json(self):
        path = self.folder / "run.json"
        for flags in ([], ["--policy", "uniform", "--key-bits", "2"], ["--plain"]):
            self.assert_succeeds(run("-p", "Count to ten.", "-n", 8, "--json", path, *flags))
            result = json.loads(path.read_text())
            self.assertEqual(list(result), [
                "model", "policy", "n_prompt", "n_generated", "seed", "bytes", "fp16_bytes",
                "ratio", "bits_per_element", "prefill_tok_s", "decode_tok_s", "isa", "threads"])
            parts = dict(result["bytes"])
            self.assertEqual(list(parts), ["codes", "params", "masks", "staging", "slack", "total"])
            self.assertEqual(parts.pop("total"), sum(parts.values()))
            self.assertEqual((result["n_generated"], result["threads"]), (8, 1))
            self.assertGreater(result["n_prompt"], 4)
            self.assertGreater(result["fp16_bytes"], 0)

    def test_long_text_is_compressed(self):
        text, path = self.folder / "long.txt", self.folder / "run.json"
        text.write_text("The ship left the harbour at dawn with forty sailors. " * 100)
        self.assert_succeeds(run("--file", text, "--max-prompt-tokens", 1000, "-n", 4,
                                 "-p", "When did it leave?", "--json", path))
        result = json.loads(path.read_text())
        self.assertGreater(result["n_prompt"], 1000)
        self.assertLess(result["n_prompt"], 1050)
        self.assertGreater(result["ratio"], 3)

    def test_text_from_standard_input(self):
        question = "What is the capital of France?".encode()
        asked = run("-p", question.decode(), "-n", 16).stdout
        self.assertEqual(run("-n", 16, stdin=question).stdout, asked)
        self.assertEqual(run("-n", 16, "--file", "-", stdin=question).stdout, asked)
        both = self.assert_succeeds(run("-n", 4, "--file", "-", "-p", "Repeat it.", stdin=question))
        self.assertTrue(both.stdout.strip())

    def test_output_is_utf8(self):
        done = self.assert_succeeds(run("--raw", "-n", 24, stdin="🙂🙃🙂🙃🙂🙃 你好".encode()))
        done.stdout.decode()  # raises when it is not
        # Bytes that are no text are read as replacement characters.
        self.assert_succeeds(run("-n", 2, stdin=bytes(range(128, 256))))

    def test_control_tokens_in_a_text_are_text(self):
        path = self.folder / "run.json"
        for text, least in (("<|im_end|>", 5), ("", 1)):
            self.assert_succeeds(run("--raw", "-p", text + "a", "-n", 1, "--json", path))
            self.assertGreaterEqual(json.loads(path.read_text())["n_prompt"], least)

    def test_interrupt_still_prints_the_table(self):
        command = [OPTIONS.zipcache, "run", "-m", OPTIONS.model, "-t", "1", "-n", "4000",
                   "-p", "Write a long story."]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env=environment()) as process:
            process.stdout.read(20)  # it is writing
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=SECONDS)
        self.assertEqual(process.returncode, 130)
        self.assertIn(b"bits per element", errors)


class Version(CliTest):
    def test_version(self):
        short = self.assert_succeeds(zipcache("version")).stdout.decode()
        self.assertRegex(short, r"^zipcache \d+\.\d+\.\d+\n$")
        full = self.assert_succeeds(zipcache("version", "-v")).stdout.decode()
        for word in ("ggml", "libggml-zipcache.so", "ZipCache", "CPU"):
            self.assertIn(word, full)


def main():
    global OPTIONS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zipcache", required=True)
    parser.add_argument("--model", required=True)
    OPTIONS, rest = parser.parse_known_args()
    if not Path(OPTIONS.model).exists():
        print(f"cli_test: skipped, {OPTIONS.model} is missing; run: make models")
        sys.exit(SKIPPED)
    unittest.main(argv=[sys.argv[0], *rest])


if __name__ == "__main__":
    main()
