#!/usr/bin/env python3
"""Everything that makes docs/results.md, at tiny sizes: the runs, the judged claims, the page.

    results_test.py --build FOLDER --model M.gguf [unittest arguments]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "eval"))
import claims  # noqa: E402
import harness  # noqa: E402
import plot  # noqa: E402
import results  # noqa: E402
import update_docs  # noqa: E402

OPTIONS = None  # the parsed command line
SKIPPED = 77


class Smoke(unittest.TestCase):
    def test_everything_runs_and_the_page_is_made_of_it(self):
        folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, folder)
        done = subprocess.run(
            [ROOT / "eval" / "results.py", "--smoke", "--build", OPTIONS.build, "--model",
             OPTIONS.model, "--threads", "1", "--results", folder / "results", "--work",
             folder / "work"], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        for run in results.RUNS:
            if run.model == results.SMOLLM2:
                records = harness.read(folder / "results", f"{run.name}.jsonl")
                self.assertGreater(len(records), 1, run.name)
        # The page, with these results in place of the committed ones.
        committed, harness.RESULTS = harness.RESULTS, folder / "results"
        self.addCleanup(setattr, harness, "RESULTS", committed)
        made = dict(update_docs.outputs())
        page = made[ROOT / "docs" / "results.md"]
        self.assertNotIn("`eval/results.py ppl-smollm2` makes", page)
        self.assertIn("| `q4_0` |", page)
        self.assertIn("| C1 |", page)
        self.assertIn("**reproduced** | 3.200, 3.992", page)
        self.assertIn("<svg", made[ROOT / "docs" / "images" / "kld_over_bits_2048.svg"])


class Claims(unittest.TestCase):
    def judge(self, listed, **files):
        rows = claims.judge(listed, lambda name: files.get(name.removesuffix(".jsonl"), []))
        return {row[0]: row[2] for row in rows}

    def test_without_results_nothing_is_claimed(self):
        verdicts = self.judge(claims.PAPER + claims.AIMS)
        self.assertEqual(set(verdicts.values()), {"**not measured yet**", "**not testable here**"})

    def test_lines(self):
        for ours, h2o, verdict in ((0.895, 0.1, "**reproduced**"), (0.88, 0.1, "**not reproduced**"),
                                   (0.895, 0.85, "**not reproduced**")):
            records = [{"policy": policy, "score": score, "n_items": 500} for policy, score in
                       (("fp16", 0.9), ("default", ours), ("policy=h2o", h2o))]
            verdicts = self.judge(claims.AIMS, **{"lines-smollm2": records})
            self.assertEqual(verdicts["A5"], verdict)

    def test_quantizing_beside_evicting(self):
        policies = ("default", "policy=kivi,key-bits=2,value-bits=2", "policy=mikv", "policy=h2o")
        for kivi, mikv, h2o, expected in ((.2, .1, 0, "**reproduced**"),
                                          (.4, .1, 0, "**not reproduced**"),
                                          (.2, .4, 0, "**not reproduced**"),
                                          (.2, .1, .2, "**not reproduced**"),
                                          (.2, .1, .1, "**not reproduced**")):
            records = [{"policy": policy, "score": score, "n_items": 100}
                       for policy, score in zip(policies, (.3, kivi, mikv, h2o))]
            verdicts = self.judge(claims.PAPER, **{"methods-lines-smollm2": records})
            self.assertEqual(verdicts["C9"], expected)

    def test_orderings(self):
        def records(*klds):
            names = ("mode=paper,key-salient=40,value-salient=40",)
            names += tuple(f"{names[0]},probes={p}" for p in ("recent", "random", "special", "all"))
            return [{"policy": name, "kld_mean": kld} for name, kld in zip(names, klds)]

        run = "probes-smollm2-wiki-2048"
        self.assertEqual(self.judge(claims.PAPER, **{run: records(.1, .2, .3, .4, .1)})["C6"],
                         "**reproduced**")
        self.assertEqual(self.judge(claims.PAPER, **{run: records(.1, .3, .2, .4, .1)})["C6"],
                         "**not reproduced**")


    def test_cost_of_saliency(self):
        for shares, expected in (((0.004, 0.02), "**reproduced**"),
                                 ((0.004, 0.04), "**not reproduced**")):
            records = [{"prefill_policy_share": share} for share in shares]
            verdicts = self.judge(claims.PAPER, policy_share=[{"bench": "model"}, *records])
            self.assertEqual(verdicts["C11"], expected)
        self.assertEqual(self.judge(claims.PAPER, policy_share=[{"bench": "model"}])["C11"],
                         "**not measured yet**")

    def test_memory_beside_mikv(self):
        def records(paper, length=4096):
            return [{"task": "ratio", "policy": policy, "n_tokens": length,
                     "bytes": {"total": total}}
                    for policy, total in (("mode=paper", paper), ("default", 50),
                                          ("policy=mikv", 100))]

        for ratio, expected in ((records(80), "**reproduced**"),
                                (records(81), "**not reproduced**"),
                                (records(80, 2048), "**not measured yet**")):
            rows = claims.judge([c for c in claims.PAPER if c[0] == "C12"], lambda _: ratio)
            self.assertEqual(rows[0][2], expected)


class Page(unittest.TestCase):
    def test_docs_are_current(self):
        done = subprocess.run([ROOT / "eval" / "update_docs.py", "--check"], capture_output=True,
                              text=True)
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_plot_is_an_svg_of_all_points(self):
        records = [{"policy": name, "series": "a & b", "bits_per_element": bits, "kld_mean": kld}
                   for name, bits, kld in (("fp16", 16, 0), ("q4_0", 4.5, .05), ("x", 3.2, .02))]
        svg = plot.divergence_over_bits(records, "<title>")
        self.assertEqual(svg.count("<circle"), 2)
        self.assertIn("&lt;title&gt;", svg)
        self.assertIn("a &amp; b", svg)


def has_data():
    folder = Path(os.environ.get("ZIPCACHE_DATA") or ROOT.parent / "shared" / "data")
    return (folder / "wikitext2").exists()


def main():
    global OPTIONS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    OPTIONS, rest = parser.parse_known_args()
    if not OPTIONS.model.exists():
        print(f"results_test: skipped, {OPTIONS.model} is missing; run: make models")
        sys.exit(SKIPPED)
    if not has_data():
        print("results_test: skipped, no evaluation data; set ZIPCACHE_DATA")
        sys.exit(SKIPPED)
    unittest.main(argv=[sys.argv[0], *rest])


if __name__ == "__main__":
    main()
