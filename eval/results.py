#!/usr/bin/env python3
"""Measures everything that docs/results.md shows, from nothing.

Each run is one `zipcache eval` (or `zipcache ratio`) whose samples stay in build/results/NAME, so a
run that was stopped goes on where it was. Its results become eval/results/NAME.jsonl; then
eval/update_docs.py makes the page.

    eval/results.py                 all runs
    eval/results.py lines ratio     those whose names begin so
    eval/results.py --smoke         all runs, tiny: that everything works, not what it shows

Runs go side by side, each with one thread: two threads of one run wait for each other a good part of
the time. All runs took 166 minutes in one go, on two cores, with some builds beside them.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import harness

SMOLLM2 = harness.MODEL
GEMMA3 = harness.MODEL.with_name("gemma-3-270m-q4_k_m.gguf")
WIKI = "wikitext2/wiki.test.raw"
MOBY_DICK = "books/pg2701_moby_dick.txt"
WAR_AND_PEACE = "books/pg2600_war_and_peace.txt"

# Settings were chosen by the first halves of the texts; windows come from the second ones.
HELD_OUT = {"--skip-percent": 50}
KIVI_2 = "policy=kivi,key-bits=2,value-bits=2"
OURS = ["default", "kv-bits=3", "kv-bits=2.6", "kv-bits=2.25"]
FRONTIER = ["q8_0", "q4_0", "policy=fp16", *OURS, "mode=paper",
            "policy=kivi,key-bits=4,value-bits=4", KIVI_2, "policy=gear", "policy=mikv",
            "policy=h2o", "policy=static", "policy=skvq"]
CALIBRATED = ("policy=static", "policy=skvq")  # these get their model's calibration file
LONG = ["q4_0", *OURS, "mode=paper", KIVI_2]
UNIFORM = [f"policy=uniform,granularity={granularity},key-bits={bits},value-bits={bits}"
           for bits in (4, 2)
           for granularity in ("tokenwise", "channelwise+tokenwise", "groupwise",
                               "channelwise+cst")]
METRICS = ["mode=paper", *(f"mode=paper,metric={metric}"
                           for metric in ("accumulated", "last-token", "locality", "random"))]
PROBES = ["mode=paper,key-salient=40,value-salient=40",
          *(f"mode=paper,key-salient=40,value-salient=40,probes={probes}"
            for probes in ("all", "recent", "random"))]
METHODS = ["q4_0", "default", "policy=mikv", KIVI_2, "policy=h2o"]


@dataclass
class Run:
    name: str
    task: str
    policies: list
    model: object = SMOLLM2
    options: dict = field(default_factory=dict)
    smoke: dict = field(default_factory=dict)  # instead, in a smoke run


def ppl(name, policies, text, model=SMOLLM2, **options):
    return Run(name, "ppl", policies, model, {"--data": text} | HELD_OUT | options,
               {"--data": text, "-c": 128, "--chunks": 1} |
               ({"--style": "decode"} if "--style" in options else {}))


RUNS = [
    Run("ratio", "ratio", ["default", "mode=paper", "policy=kivi", "policy=kivi,residual=32",
                           "policy=mikv", "policy=fp16"]),
    Run("ratio-generation", "ratio", ["default", "append=0"], SMOLLM2,
        {"--prompt": 256, "--tokens": "256,271,287,303,319,335,351,383,415,447,511,543,609,675,741,"
                                      "807,1005,1265,1539,1978,2048,4096"}),
    # The longest ones first, so that both cores have work until the end.
    Run("lines-smollm2", "lines", ["default", "policy=h2o"], SMOLLM2, {"--lines": 5, "--items": 500},
        {"--lines": 2, "--items": 2}),
    Run("methods-lines-smollm2", "lines", METHODS + METRICS, SMOLLM2, {"--lines": 5, "--items": 100},
        {"--lines": 2, "--items": 2}),
    Run("agreement-smollm2", "agreement", ["q8_0", "q4_0", "default", "mode=paper"], SMOLLM2,
        {"--items": 24}, {"--items": 1, "--prompt-tokens": 32, "-n": 4}),
    *(ppl(f"ppl-{model_name}-{text_name}-2048", FRONTIER, text, model, **{"-c": 2048, "--chunks": 1})
      for model_name, model in (("smollm2", SMOLLM2), ("gemma3", GEMMA3))
      for text_name, text in (("wiki", WIKI), ("moby", MOBY_DICK), ("war", WAR_AND_PEACE))),
    *(ppl(f"ppl-{model_name}-{text_name}-8192", LONG, text, model, **{"-c": 8192, "--chunks": 1})
      for model_name, model in (("smollm2", SMOLLM2), ("gemma3", GEMMA3))
      for text_name, text in (("wiki", WIKI), ("moby", MOBY_DICK), ("war", WAR_AND_PEACE))),
    ppl("decode-smollm2-wiki-1024", ["q4_0", "default", "mode=paper", "mode=official"], WIKI,
        **{"-c": 1024, "--chunks": 2, "--style": "decode"}),
    ppl("granularity-smollm2-wiki-2048", UNIFORM, WIKI, **{"-c": 2048, "--chunks": 2}),
    ppl("metrics-smollm2-wiki-2048", METRICS, WIKI, **{"-c": 2048, "--chunks": 2}),
    ppl("probes-smollm2-wiki-2048", PROBES, WIKI, **{"-c": 2048, "--chunks": 2}),
]
SMOKE_POLICIES = 2


def policies_of(args, run):
    return [policy for number, policy in enumerate(run.policies)
            if not args.smoke or number < SMOKE_POLICIES or policy.startswith(CALIBRATED)]


def zipcache(args, *command):
    command = list(map(str, [args.build / "bin" / "zipcache", *command]))
    done = subprocess.run(command, stdout=subprocess.DEVNULL,
                          env=harness.environment() | {"ZIPCACHE_DATA": str(args.data_folder)})
    if done.returncode != 0:
        harness.fail(f"{' '.join(command)} failed ({done.returncode})")


def calibration(args, model):
    return args.work / f"{model.stem}.json"


def calibrate(args, models):
    """Makes the calibration files, from the half of a book that is not evaluated."""
    args.work.mkdir(parents=True, exist_ok=True)
    text = args.work / "moby_dick_first_half.txt"
    whole = harness.data_file(MOBY_DICK).read_text(encoding="utf-8")
    text.write_text(whole[:len(whole) // 2], encoding="utf-8")
    with ThreadPoolExecutor(max_workers=args.jobs) as pool:
        list(pool.map(
            lambda model: zipcache(args, "calibrate", "-m", model, "--data", text, "-t", args.threads,
                                   *(["--tokens", 256, "-c", 128] if args.smoke else []), "-o",
                                   calibration(args, model)),
            models))


def with_calibration(args, run, policy):
    return (f"{policy},calibration={calibration(args, run.model)}"
            if policy.startswith(CALIBRATED) else policy)


def flags_of(options):
    return [part for flag, value in options.items() for part in (flag, value)]


def measure_ratio(args, run, folder):
    folder.mkdir(parents=True, exist_ok=True)
    report_file = folder / "ratio.json"
    zipcache(args, "ratio", "-m", run.model, *flags_of(run.options), *policies_of(args, run),
             "--json", report_file)
    report = json.loads(report_file.read_text())
    shared = {"model": run.model.name, "layers": report["layers"]} | {
        key: report[key] for key in ("tokens_per_step", "prompt_tokens") if key in report}
    return ([{"task": "ratio", **shared, **row} for row in report["rows"]] +
            [{"task": "ratio-paper", **figure} for figure in report["paper"]
             if "prompt_tokens" not in shared])


def measure_accuracy(args, run, folder):
    flags = flags_of(run.smoke if args.smoke else run.options)
    zipcache(args, "eval", "-m", run.model, "--task", run.task, *flags, "-t", args.threads, "--out",
             folder, *(with_calibration(args, run, policy) for policy in policies_of(args, run)))
    # Policies are named by what they are given, files without their folders.
    return [json.loads(json.dumps(record).replace(f"calibration={args.work}{os.sep}",
                                                  "calibration="))
            for record in harness.read(folder, "results.jsonl")]


def measure(args, run):
    """The records of a run."""
    print(f"results: {run.name}", file=sys.stderr, flush=True)
    return (measure_ratio if run.task == "ratio" else measure_accuracy)(
        args, run, args.work / run.name)


def parse_arguments():
    parser = harness.parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="runs whose names begin so")
    parser.set_defaults(threads=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one model")
    parser.add_argument("--work", type=harness.Path, default=harness.ROOT / "build" / "results",
                        help="folder of the samples")
    args = parser.parse_args()
    harness.need(args.build / "bin" / "zipcache", "run: make")
    args.data_folder = harness.data_file("wikitext2").parent
    return args


def main():
    args = parse_arguments()
    runs = [run for run in RUNS
            if not args.names or any(run.name.startswith(name) for name in args.names)]
    if args.smoke:
        runs = [run for run in runs if run.model == SMOLLM2]
    if not runs:
        harness.fail(f"no run is named so; there are {', '.join(run.name for run in RUNS)}")
    for run in runs:
        if run.model == SMOLLM2:
            run.model = args.model
        harness.need(run.model, f"run: tools/fetch.py {run.model.stem}")
    calibrate(args, {run.model for run in runs if run.task != "ratio" and
                     any(p.startswith(CALIBRATED) for p in policies_of(args, run))})
    meta = harness.run_meta(args.build)
    start = time.monotonic()
    with ThreadPoolExecutor(max_workers=args.jobs) as pool:
        for number, (run, records) in enumerate(
                zip(runs, pool.map(lambda run: measure(args, run), runs)), 1):
            for record in records:
                record["run"] = meta | record.get("run", {})
            harness.write(args.results, f"{run.name}.jsonl", records)
            print(f"results: {run.name} is done, {number} of {len(runs)}, "
                  f"{(time.monotonic() - start) / 60:.0f} min", file=sys.stderr, flush=True)
    print("results: now run eval/update_docs.py", file=sys.stderr)


if __name__ == "__main__":
    main()
