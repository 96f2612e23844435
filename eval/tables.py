"""Results as Markdown tables: what the scripts print and what update_docs.py puts into the docs."""

from harness import markdown

MIB = 1 << 20


def latest(records, *keys):
    """Of the records that agree in `keys` the last one, in the order of their first appearance."""
    found = {}
    for record in records:
        found[tuple(record.get(key) for key in keys)] = record
    return list(found.values())


def kld(records):
    rows = []
    for r in records:
        rows.append([
            f"`{r['policy']}`", r["data"], f"{r['bits_per_element']:.2f}", f"{r['ratio']:.2f}x",
            f"{r['kld_mean']:.4f} ± {r['kld_mean_error']:.4f}", f"{r['kld_median']:.4f}",
            f"{r['kld_p999']:.3f}", f"{r['ppl']:.3f}", f"{r['ln_ppl_ratio']:+.4f}",
            f"{100 * r['same_top']:.2f} %", f"{r['cpu_seconds']:.0f}"])
    return markdown(["cache", "text", "bits/element", "smaller", "mean KLD", "median", "99.9 %", "PPL",
                     "ln(PPL/PPL f16)", "same top token", "CPU s"], rows)


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
    rows = [[f"`{r['policy']}`", r["n_depth"], r["threads"],
             f"{r['prefill_tok_s']:.1f} ± {r['prefill_spread']:.1f}", f"{r['prefill_vs_f16']:.2f}x",
             f"{r['decode_tok_s']:.1f} ± {r['decode_spread']:.1f}", f"{r['decode_vs_f16']:.2f}x"]
            for r in sorted(records, key=lambda r: r["n_depth"])]
    return markdown(["cache", "depth", "threads", "prefill tok/s", "vs f16", "decode tok/s",
                     "vs f16"], rows)
