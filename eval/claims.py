"""What the paper claims and what this cache aims at, each judged by the results at hand.

A claim is a function of the records: it returns (verdict, what was found). Without the records that
it needs it is not measured yet.
"""

REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
NOT_TESTABLE, NOT_MEASURED = "not testable here", "not measured yet"
SO_FAR = "reached so far"  # in the runs at hand, others are missing


class Missing(Exception):
    """A result that a claim needs is not there."""


class Results:
    """Records by the run that made them."""

    def __init__(self, read):
        self.read = read  # pattern of file names -> records

    def has(self, run):
        return bool(self.read(f"{run}.jsonl"))

    def of(self, run):
        records = self.read(f"{run}.jsonl")
        if not records:
            raise Missing(f"`eval/results.py {run}`")
        return records

    def value(self, run, policy, key):
        for record in self.of(run):
            if record.get("policy") == policy and key in record:
                return record[key]
        raise Missing(f"`{policy}` in {run}")


def verdict(holds):
    return REPRODUCED if holds else NOT_REPRODUCED


def ordering(results, run, policies, key="kld_mean"):
    """Whether key rises from policy to policy; `policies` are (label, policy)."""
    values = [(label, results.value(run, policy, key)) for label, policy in policies]
    holds = all(a[1] <= b[1] for a, b in zip(values, values[1:]))
    name = "mean KLD" if key == "kld_mean" else key
    return holds, f"{name}: " + ", ".join(f"{label} {value:.4f}" for label, value in values)


def c1(results):
    expected = [3.200, 3.992, 3.996, 3.995, 4.98, 4.94, 4.39, 4.43]
    found = [r["ratio"] for r in results.of("ratio") if r["task"] == "ratio-paper"]
    holds = len(found) == len(expected) and all(
        abs(a - b) <= (0.0005 if b in expected[:4] else 0.005) for a, b in zip(found, expected))
    counted = [r for r in results.of("ratio") if r.get("policy") == "mode=paper"]
    by_length = ", ".join(f"{r['ratio']:.2f} at {r['n_tokens']}" for r in counted
                          if r["n_tokens"] in (128, 840, 4096))
    return verdict(holds), (", ".join(f"{ratio:.3f}" for ratio in found) +
                            f"; counted in bytes, `mode=paper`: {by_length} tokens")


def uniform(granularity, bits):
    return f"policy=uniform,granularity={granularity},key-bits={bits},value-bits={bits}"


def c2(results):
    run, parts, holds = "granularity-smollm2-wiki-2048", [], True
    for bits in (4, 2):
        kld = {name: results.value(run, uniform(name, bits), "kld_mean")
               for name in ("tokenwise", "channelwise+tokenwise", "groupwise", "channelwise+cst")}
        holds &= (kld["tokenwise"] > kld["channelwise+tokenwise"] >
                  max(kld["groupwise"], kld["channelwise+cst"]))
        parts.append(f"{bits} bits: " + ", ".join(f"{n} {k:.4f}" for n, k in kld.items()))
    return verdict(holds), "mean KLD at " + "; ".join(parts)


def c3(results):
    run, parts, holds = "granularity-smollm2-wiki-2048", [], True
    for bits in (4, 2):
        cst = results.value(run, uniform("channelwise+cst", bits), "kld_mean")
        mixed = results.value(run, uniform("channelwise+tokenwise", bits), "kld_mean")
        tokenwise = results.value(run, uniform("tokenwise", bits), "kld_mean")
        holds &= cst < mixed < tokenwise
        parts.append(f"{bits} bits: V {cst:.4f} < {mixed:.4f}, K {mixed:.4f} < {tokenwise:.4f}")
    return verdict(holds), ("by KLD, one tensor changed at a time, instead of MSE per layer; " +
                            "; ".join(parts))


def line_scores(results, policies):
    """{name: score} of (name, policy) in the run over all methods, and the same in words."""
    scores = {name: results.value("methods-lines-smollm2", policy, "score")
              for name, policy in policies}
    return scores, ", ".join(f"{name} {100 * score:.1f} %" for name, score in scores.items())


def c5(results):
    metrics = [("normalized", "mode=paper"), ("accumulated", "mode=paper,metric=accumulated"),
               ("last-token", "mode=paper,metric=last-token"),
               ("random", "mode=paper,metric=random")]
    holds, found = ordering(results, "metrics-smollm2-wiki-2048", metrics)
    scores, of_lines = line_scores(results, metrics)
    holds &= scores["normalized"] >= max(scores.values())
    return verdict(holds), f"{found}; lines: {of_lines}"


def c6(results):
    base = "mode=paper,key-salient=40,value-salient=40"
    holds, found = ordering(results, "probes-smollm2-wiki-2048",
                            [("random+recent", base), ("recent", f"{base},probes=recent"),
                             ("random", f"{base},probes=random")])
    every = results.value("probes-smollm2-wiki-2048", f"{base},probes=all", "kld_mean")
    return verdict(holds), (f"{found}; all tokens as probes {every:.4f}; special tokens were not "
                            "compared: a plain text has none")


def c8(results):
    ours, kivi = ({r["n_tokens"]: r["ratio"] for r in results.of("ratio")
                   if r.get("policy") == policy} for policy in ("default", "policy=kivi,residual=32"))
    if not kivi:
        raise Missing("`policy=kivi,residual=32` in ratio")
    return verdict(ours[128] > 4.3 and kivi[128] < 2.7), (
        f"counted at 128 tokens: `default` {ours[128]:.2f}, KIVI-2 with a residual of 32 "
        f"{kivi[128]:.2f}; accuracy on HumanEval is beyond these models")


def c9(results):
    scores, found = line_scores(results, [
        ("default", "default"), ("KIVI-2", "policy=kivi,key-bits=2,value-bits=2"),
        ("MiKV", "policy=mikv"), ("H2O", "policy=h2o")])
    quantized = (scores["KIVI-2"], scores["MiKV"])
    holds = scores["default"] >= max(quantized) and min(quantized) > scores["H2O"]
    n_items = results.value("methods-lines-smollm2", "default", "n_items")
    return verdict(holds), f"{found} ({n_items} prompts)"


def c11(results):
    shares = [r["prefill_policy_share"] for r in results.of("policy_share")
              if "prefill_policy_share" in r]
    if not shares:
        raise Missing("`prefill_policy_share` in policy_share")
    return verdict(max(shares) <= 0.032), (
        f"saliency and sealing take {100 * min(shares):.2f} to {100 * max(shares):.2f} % of reading "
        "a prompt (random weights, CPU); the probes' own rows, 0 to 1 % of attention, come on top")


def c12(results):
    held = {r["policy"]: r["bytes"]["total"] for r in results.of("ratio")
            if r.get("n_tokens") == 4096 and "policy" in r}
    if "policy=mikv" not in held:
        raise Missing("`policy=mikv` in ratio")
    below = {policy: 1 - held[policy] / held["policy=mikv"] for policy in ("mode=paper", "default")}
    return verdict(below["mode=paper"] >= 0.198), (
        "bytes of the cache alone, without the attention matrices that MiKV needs in the paper: " +
        ", ".join(f"`{policy}` {100 * share:.1f} % below" for policy, share in below.items()))


def unavailable(reason):
    return lambda results: (NOT_TESTABLE, reason)


PAPER = [
    ("C1", "compression ratios of the paper, by its own reckoning", c1),
    ("C2", "tokenwise < channelwise K + tokenwise V < groupwise, channelwise K + channel-separable "
           "V, at 4 and 2 bits", c2),
    ("C3", "channel-separable V beats tokenwise V, channelwise K beats tokenwise K", c3),
    ("C4", "normalizing moves salience from the first tokens to the final question",
     unavailable("no sum of attention is shown here; that the accumulated score of the first token "
                 "is at least 1 and that of the last at most 1 follows from the formula "
                 "(`saliency_ref_test`)")),
    ("C5", "normalized > accumulated > last-token at equal bits", c5),
    ("C6", "random + recent probes ~ all > recent > random > special", c6),
    ("C7", "GSM8K within 0.4 to 2 points of FP16, above MiKV, KIVI-2 and H2O",
     unavailable("models of 7B parameters and more; those used here solve next to none of the "
                 "problems under FP16 either")),
    ("C8", "ratio above 4.3 at 120 tokens, where KIVI falls to 2.5", c8),
    ("C9", "line retrieval: quantizing > evicting, ZipCache > KIVI-2 and MiKV", c9),
    ("C10", "LongBench: at least KIVI-2 on code, near tie elsewhere",
     unavailable("its texts are not part of the data here, and these models can't read them; "
                 "`zipcache eval --task longbench --data FILE` runs them")),
    ("C11", "saliency adds 3.2 % to prefill and next to no memory", c11),
    ("C12", "memory 19.8 % below MiKV's at 4096 tokens", c12),
]


RUNS = [f"ppl-{model}-{text}-{n_ctx}" for model in ("smollm2", "gemma3")
        for n_ctx in (2048, 8192) for text in ("wiki", "moby", "war")]


def is_ours(policy):
    return policy == "default" or policy.startswith("kv-bits=")


def aim(results, bits, judge):
    """Of this cache at `bits` or fewer the best setting, in every run, against the other caches."""
    parts, n_held = [], 0
    measured = [run for run in RUNS if results.has(run)]
    if not measured:
        raise Missing("`eval/results.py ppl`")
    for run in measured:
        records = [r for r in results.of(run) if r["policy"] not in ("fp16", "policy=fp16")]
        fitting = [r for r in records
                   if is_ours(r["policy"]) and r["bits_per_element"] <= bits]
        name = run.removeprefix("ppl-")
        if not fitting:
            parts.append(f"{name}: nothing of so few bits")
            continue
        best = min(fitting, key=lambda r: r["kld_mean"])
        holds, against = judge(best, [r for r in records if not is_ours(r["policy"])])
        n_held += holds
        parts.append(f"{name}: {'' if holds else '**no**, '}`{best['policy']}` "
                     f"{best['bits_per_element']:.2f} bits, {best['kld_mean']:.4f} and "
                     f"{best['kld_p999']:.2f}, {against}")
    missing = [run.removeprefix("ppl-") for run in RUNS if run not in measured]
    if missing:
        parts.append("not measured yet: " + ", ".join(missing))
    found = f"mean and 99.9 % KLD, {n_held} of {len(measured)}: " + "; ".join(parts)
    if missing and n_held == len(measured):
        return SO_FAR, found
    return verdict(n_held == len(measured)), found


def against_q4_0(judge):
    def compare(best, others):
        q4_0 = next(r for r in others if r["policy"] == "q4_0")
        return judge(best, q4_0), f"q4_0 {q4_0['kld_mean']:.4f} and {q4_0['kld_p999']:.2f}"
    return compare


def half_of_q4_0(results):
    return aim(results, 3.2, against_q4_0(
        lambda best, q4_0: (best["kld_mean"] <= q4_0["kld_mean"] / 2 and
                            best["kld_p999"] < q4_0["kld_p999"])))


def below_q4_0(results):
    return aim(results, 2.8, against_q4_0(
        lambda best, q4_0: best["kld_mean"] < q4_0["kld_mean"]))


def below_all(results):
    """Methods of the literature; llama.cpp's own types start at 4.5 bits."""
    def compare(best, others):
        rivals = [r for r in others if r["policy"] not in ("q4_0", "q8_0") and
                  r["bits_per_element"] >= best["bits_per_element"]]
        better = [f"`{r['policy']}` {r['kld_mean']:.4f} at {r['bits_per_element']:.2f}"
                  for r in rivals if r["kld_mean"] <= best["kld_mean"]]
        return not better, "better is " + ", ".join(better) if better else f"{len(rivals)} others above"
    return aim(results, 2.4, compare)


def short_prompts(results):
    rows = {r["n_tokens"]: r["ratio"] for r in results.of("ratio") if r.get("policy") == "default"}
    longest = rows[max(rows)]
    short = {n: ratio for n, ratio in rows.items() if n >= 256}
    return verdict(all(ratio >= 0.9 * longest for ratio in short.values())), \
        ", ".join(f"{n} tokens {ratio:.2f}" for n, ratio in short.items())


def generation(results):
    rows = {r["n_tokens"]: r["ratio"] for r in results.of("ratio-generation")
            if r.get("policy") == "default"}
    before = {r["n_tokens"]: r["ratio"] for r in results.of("ratio-generation")
              if r.get("policy") == "append=0"}
    longest = max(r["ratio"] for r in results.of("ratio") if r.get("policy") == "default")
    worst = min(rows, key=rows.get)
    below = [n for n in rows if rows[n] < 0.9 * longest]
    found = f"worst {rows[worst]:.2f} at {worst} tokens, long contexts {longest:.2f}"
    if below:
        found += f"; within 10 % beyond {max(below)} tokens"
    return verdict(not below), found + f"; without joining blocks {min(before.values()):.2f}"


def lines_loss(results):
    run = "lines-smollm2"
    exact, ours, evicted = (results.value(run, policy, "score") for policy in
                            ("fp16", "default", "policy=h2o"))
    loss, of_h2o = 100 * (exact - ours), 100 * (exact - evicted)
    n_items = results.value(run, "default", "n_items")
    return verdict(loss <= 1 and of_h2o > 10), (
        f"{loss:.1f} points lost over {n_items} prompts, H2O {of_h2o:.1f}")


AIMS = [
    ("A1", "at most 3.2 bits: mean KLD at most half of q4_0's (4.5 bits), 99.9 % KLD below it",
     half_of_q4_0),
    ("A2", "at most 2.8 bits: mean KLD below q4_0's", below_q4_0),
    ("A3", "at most 2.4 bits: mean KLD below every other published method at as many bits or more",
     below_all),
    ("A4", "prompts: from 256 tokens on the counted ratio is within 10 % of that of long contexts",
     short_prompts),
    ("A5", "line retrieval: at most 1 point lost against FP16, H2O more than 10", lines_loss),
    ("A6", "generation: the same, behind a prompt of 256 tokens", generation),
]


def judge(claims, read, yes=REPRODUCED, no=NOT_REPRODUCED):
    """Rows (name, claim, verdict, found)."""
    results, rows = Results(read), []
    for name, words, function in claims:
        try:
            found_verdict, found = function(results)
        except Missing as missing:
            found_verdict, found = NOT_MEASURED, f"needs {missing}"
        found_verdict = {REPRODUCED: yes, NOT_REPRODUCED: no}.get(found_verdict, found_verdict)
        rows.append([name, words, f"**{found_verdict}**", found])
    return rows
