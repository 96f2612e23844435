"""Results as Markdown tables: what the scripts print and what update_docs.py puts into the docs."""

import claims
from harness import RESULTS, markdown, read

MIB = 1 << 20


def latest(records, *keys):
    """Of the records that agree in `keys` the last one, in the order of their first appearance."""
    found = {}
    for record in records:
        found[tuple(str(record.get(key)) for key in keys)] = record
    return list(found.values())


def kld(records):
    """One row per cache and text; the reference itself is left out."""
    rows = []
    for r in records:
        if r["policy"] == "fp16":
            continue
        rows.append([
            f"`{r['policy']}`", r["data"], f"{r['bits_per_element']:.2f}", f"{r['ratio']:.2f}x",
            f"{r['kld_mean']:.4f} ± {r['kld_mean_error']:.4f}", f"{r['kld_median']:.4f}",
            f"{r['kld_p999']:.3f}", f"{r['ppl']:.3f}", f"{r['ln_ppl_ratio']:+.4f}",
            f"{100 * r['same_top']:.2f} %", f"{r['cpu_seconds']:.0f}"])
    return markdown(["cache", "text", "bits/element", "smaller", "mean KLD", "median", "99.9 %", "PPL",
                     "ln(PPL/PPL f16)", "same top token", "CPU s"], rows)


def scores(records):
    """One row per cache; the difference to FP16 is paired, item by item."""
    rows = []
    for r in records:
        paired = r.get("versus", {}).get("fp16")
        rows.append([
            f"`{r['policy']}`", f"{r['bits_per_element']:.2f}", f"{r['ratio']:.2f}x", r["n_items"],
            f"{100 * r['score']:.1f} %" if "score" in r else "-",
            "-" if paired is None else
            f"{100 * paired['score_difference']:+.1f} ({100 * paired['ci95'][0]:+.1f} to "
            f"{100 * paired['ci95'][1]:+.1f})",
            "-" if paired is None else f"{paired['better']} / {paired['worse']}",
            f"{paired['mcnemar_p']:.3g}" if paired and "mcnemar_p" in paired else "-",
            f"{r['cpu_seconds']:.0f}"])
    return markdown(["cache", "bits/element", "smaller", "items", "score", "points to fp16 (95 %)",
                     "better / worse", "McNemar p", "CPU s"], rows)


def agreement(records):
    rows = [[f"`{r['policy']}`", f"{r['bits_per_element']:.2f}", r["n_items"],
             f"{100 * r['score']:.0f} %", f"{r['first_difference']:.0f}",
             f"{100 * r['same_prefix']:.0f} %"] for r in records]
    return markdown(["cache", "bits/element", "texts", "all tokens the same",
                     "tokens before the first difference", "share of the answer before it"], rows)


def ratio(records):
    rows = [[f"`{r['policy']}`", r["n_tokens"], f"{r['ratio_paper']:.2f}", f"{r['ratio_formula']:.2f}",
             f"{r['ratio']:.2f}", f"{r['bits_per_element']:.2f}", r["bytes"]["total"]]
            for r in records if r["task"] == "ratio"]
    return markdown(["policy", "tokens", "paper's convention", "its formula, true dimensions",
                     "counted", "bits/element", "bytes"], rows)


def generation_ratios(records):
    policies = list(dict.fromkeys(r["policy"] for r in records))
    found = {(r["policy"], r["n_tokens"]): r for r in records}
    rows = [[n] + [text for policy in policies for text in (
                f"{found[policy, n]['ratio']:.2f}", f"{found[policy, n]['bits_per_element']:.2f}")]
            for n in sorted({r["n_tokens"] for r in records})]
    return markdown(["tokens"] + [text for policy in policies
                                  for text in (f"`{policy}`", "bits/element")], rows)


def paper_ratios(records):
    return markdown(["the paper's case", "ratio"],
                    [[r["what"], f"{r['ratio']:.3f}"] for r in records if r["task"] == "ratio-paper"])


CLAIM_COLUMNS = ["", "claim", "verdict", "found"]


def paper_claims(records):
    return markdown(CLAIM_COLUMNS, claims.judge(claims.PAPER, lambda name: read(RESULTS, name)))


def aims(records):
    return markdown(CLAIM_COLUMNS, claims.judge(claims.AIMS, lambda name: read(RESULTS, name),
                                                "reached", "not reached"))


def memory(records):
    rows = []
    for r in records:
        reported, measured = r["reported_growth"], r["measured_growth"]
        rows.append([f"`{r['policy']}`", f"{r['from_tokens']} to {r['n_tokens']}",
                     f"{r['fp16_bytes'] / MIB:.1f}", f"{r['total_bytes'] / MIB:.1f}",
                     f"{reported / MIB:.2f}", f"{measured / MIB:.2f}",
                     f"{100 * (measured / reported - 1):+.1f} %"])
    return markdown(["policy", "tokens", "FP16 MiB", "cache MiB", "reported growth MiB",
                     "measured growth MiB", "difference"], rows)


def demo(records):
    rows = [[r["label"], f"{r['bytes']['total'] / MIB:.1f}", f"{r['ratio']:.2f}x",
             f"{r['bits_per_element']:.2f}", f"{r['prefill_tok_s']:.1f}",
             f"{r['decode_tok_s']:.1f}", r["answer"].replace("\n", " ")] for r in records]
    return markdown(["cache", "MiB", "smaller", "bits/element", "prefill tok/s", "decode tok/s",
                     "answer"], rows)


def transcript(records):
    """What the first of the runs printed."""
    return f"```text\n{records[0]['answer']}\n\n{records[0]['table'].rstrip()}\n```"


def speed(records):
    """`zipcache bench model`: a whole model by depth."""
    order = sorted(records, key=lambda r: (r["model"], r["threads"], r["n_depth"]))
    rows = [[model_name(r["model"]), r["threads"], r["n_depth"], f"`{r['policy']}`",
             f"{r['prefill_tok_s']:.1f} ± {r['prefill_spread']:.1f}", f"{r['prefill_vs_f16']:.2f}x",
             f"{r['decode_tok_s']:.1f} ± {r['decode_spread']:.1f}", f"{r['decode_vs_f16']:.2f}x"]
            for r in order]
    return markdown(["model", "threads", "depth", "cache", "prefill tok/s", "vs f16",
                     "decode tok/s", "vs f16"], rows)


def speed_in_short(records):
    """The small model with all threads, beside the cache that people use now."""
    most = max(r["threads"] for r in records)
    return speed([r for r in records if r["threads"] == most and "smollm2" in r["model"].lower()
                  and r["policy"] in ("default", "f16")])


def model_name(file):
    return file.removesuffix(".gguf")


def op(records):
    """`zipcache bench op`: attention alone."""
    rows = []
    for r in sorted(records, key=op_order):
        row = [f"{r['shape']['n_heads']}/{r['shape']['n_kv_heads']} x {r['shape']['head_dim']}",
               r["device"], r["threads"], r["n_query"], r["n_kv"], milliseconds(r["seconds"], r["spread"])]
        for peer in ("f16", "q8_0", "q4_0"):
            seconds = r["peers"].get(peer)
            row.append("" if seconds is None else f"{seconds / r['seconds']:.1f}x")
        row += [f"{r['bytes_per_s'] / 1e9:.1f}", f"{100 * r['bytes_per_s'] / r['peak_bytes_per_s']:.0f} %",
                f"{r['flops_per_s'] / 1e9:.0f}",
                f"{100 * r['flops_per_s'] / r['peak_flops_per_s']:.0f} %",
                f"{100 * r['flops_per_s'] / r['peak_dot_flops_per_s']:.0f} %", r["binds"]]
        rows.append(row)
    return markdown(["heads x size", "ISA", "threads", "queries", "cells", "ms", "vs f16", "vs q8_0",
                     "vs q4_0", "GB/s", "of read", "GFLOP/s", "of FMA", "of dot", "binds"], rows)


def op_order(r):
    shape = r["shape"]
    return (r["n_query"], -shape["n_heads"], shape["head_dim"], r["device"], r["threads"], r["n_kv"])


def milliseconds(seconds, spread):
    digits = 3 if seconds < 0.01 else 1
    return f"{seconds * 1e3:.{digits}f} ± {spread * 1e3:.{digits}f}"


def kernels(records):
    """`zipcache bench kernels`: GB/s and GFLOP/s per instruction set, side by side."""
    isas = list(dict.fromkeys(r["device"] for r in records))
    shapes = {}
    for r in records:
        shapes.setdefault((r["half"], r["lanes"], r["inner"], r["bits"], r["rows"]), {})[r["device"]] = r
    rows = []
    for (half, lanes, inner, bits, n_rows), found in shapes.items():
        row = [half, f"{lanes} x {inner}", "fp16" if bits == 16 else bits, n_rows]
        for isa in isas:
            r = found.get(isa)
            row.append("" if r is None else f"{r['bytes_per_s'] / 1e9:.1f}, {r['flops_per_s'] / 1e9:.0f}")
        rows.append(row)
    return markdown(["product", "lanes x inner", "bits", "rows",
                     *(f"{isa}: GB/s, GFLOP/s" for isa in isas)], rows)


def by_length(records):
    """Decode attention from 1k to 64k cells: is it linear?"""
    rows = []
    for r in sorted((r for r in records if r["n_query"] == 1), key=op_order):
        rows.append([f"{r['shape']['n_heads']}/{r['shape']['n_kv_heads']} x {r['shape']['head_dim']}",
                     r["n_kv"], f"{r['bytes'] / MIB:.2f}", f"{r['scratch_bytes'] / 1024:.0f}",
                     milliseconds(r["seconds"], r["spread"]),
                     f"{r['seconds'] / r['bytes'] * 1e9 * MIB / 1e6:.3f}"])
    return markdown(["heads x size", "cells", "MiB packed", "scratch KiB", "ms", "ms per MiB"], rows)


def policy_cost(records):
    """The policy's work beside the attention of the same chunk."""
    rows = [[f"{r['shape']['n_heads']}/{r['shape']['n_kv_heads']} x {r['shape']['head_dim']}",
             r["threads"], r["n_query"], r["n_kv"], f"{r['seconds'] * 1e3:.1f}",
             f"{r['commit_seconds'] * 1e3:.2f}",
             f"{100 * r['commit_seconds'] / r['seconds']:.1f} %"]
            for r in sorted(records, key=op_order) if r["n_query"] > 1]
    return markdown(["heads x size", "threads", "queries", "cells", "attention ms", "policy ms",
                     "share of attention"], rows)


def policy_share(records):
    """What saliency and sealing take of reading a prompt, whole model."""
    rows = [[model_name(r["model"]), r["threads"], r["n_depth"], f"`{r['policy']}`",
             f"{r['prefill_tok_s']:.1f}", f"{100 * r['prefill_policy_share']:.2f} %"]
            for r in sorted(records, key=lambda r: (r["model"], r["threads"], r["n_depth"]))
            if "prefill_policy_share" in r]
    return markdown(["model", "threads", "depth", "cache", "prefill tok/s", "saliency and sealing"],
                    rows)
