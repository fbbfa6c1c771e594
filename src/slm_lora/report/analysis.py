"""Computed sentences: the question, what the contrasts answer, and what they cannot tell apart.

Every sentence comes from a contrast and says no more than its verdict: with one seed nothing
about the settings, only about these very adapters.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import get_args

from slm_lora.report.html import plain
from slm_lora.report.tables import KINDS, loss_shown
from slm_lora.runs.scored_run import ScoredRun
from slm_lora.stats.comparisons import Comparison, Setting, Verdict, amount
from slm_lora.stats.estimates import loss_estimate, perplexity
from slm_lora.stats.inference import Difference
from slm_lora.stats.learning_curve import LearningCurve

_NAMES = {
    "adapter.r": "rank",
    "data.size": "dataset size",
    "adapter.target_modules": "target modules",
    "adapter.kind": "method",
    "adapter.lora_alpha": "alpha/r",
}


def question(
    lines: Sequence[ScoredRun], tuned: Sequence[Setting], found: Sequence[Comparison]
) -> str:
    """What the experiment asks, from what its contrasts vary."""
    model = plain(lines[0].run.record["model"]["name"])
    data = plain(lines[0].run.record["data"]["origin"].split(" ")[0])
    varied = {each.key for each in found}
    asked = [_kinds(tuned)] if tuned and "adapter.kind" not in varied else []
    for key, tied in {c.key: c.tied for c in found if c.key != "base"}.items():
        of_key = [arm for c in found if c.key == key for arm in (c.first, c.second)]
        values = sorted(of_key, key=lambda arm: amount(arm, key) or 0)
        listed = ", ".join(dict.fromkeys(shown(arm.setting(key)) for arm in values))
        asked.append(f"the {name_of(key, tied)} ({listed})")
    what = f"the held-out loss of {model} on {data}"
    if not asked:
        return f"What is {what}?"
    if len(asked) == 1:
        return f"What does {asked[0]} do to {what}?"
    return f"What do {', '.join(asked[:-1])} and {asked[-1]} do to {what}?"


def _kinds(tuned: Sequence[Setting]) -> str:
    return " or ".join(dict.fromkeys(KINDS[arm.setting("adapter.kind")] for arm in tuned))


def answer(found: Sequence[Comparison]) -> str:
    """In short, then one sentence a contrast, those with the base first."""
    to_base = [each for each in found if each.key == "base"]
    parts = [_in_short(found)] if found else []
    parts.append("### Perplexity reduction\n\n" + _reduction(to_base))
    for key in dict.fromkeys(each.key for each in found if each.key != "base"):
        of_key = [each for each in found if each.key == key]
        name = name_of(key, of_key[0].tied)
        parts.append(f"### Effect of the {name}\n\n" + _effect(of_key))
    return "\n\n".join(parts)


def _in_short(found: Sequence[Comparison]) -> str:
    loss, lowest = min(
        (arm.loss().value, arm.name) for each in found for arm in (each.first, each.second)
    )
    said = [f"Lowest perplexity: {perplexity(loss):.3f}, of {lowest}."]
    for what, some in (
        ("with the base", [each for each in found if each.key == "base"]),
        ("between trainings", [each for each in found if each.key != "base"]),
    ):
        counts = Counter(each.verdict for each in some)
        if counts:
            comparisons = "comparison" if len(some) == 1 else "comparisons"
            verdicts = ", ".join(f"{counts[v]} {v}" for v in get_args(Verdict) if counts[v])
            said.append(f"{len(some)} {comparisons} {what}: {verdicts}.")
    if not all(each.covers_seeds for each in found):
        said.append("A verdict from one seed is on these runs, not on their settings.")
    if note := _untuned(found):
        said.append(note)
    return " ".join(said)


def _untuned(found: Sequence[Comparison]) -> str:
    """Where trainings are compared: that each may be far from its own best learning rate.

    With lora_alpha = 2r the first step of Adam in the weights grows with the rank, so a larger rank
    learns faster at the same rate; more rows are more steps.
    """
    rate = "training.learning_rate"
    compared = [
        arm for each in found if each.key not in ("base", rate) for arm in (each.first, each.second)
    ]
    if not compared:
        return ""
    rates = sorted({float(arm.setting(rate)) for arm in compared})
    shared = f"{rates[0]:g} for all" if len(rates) == 1 else ", ".join(f"{r:g}" for r in rates)
    return (
        f"Learning rates were not tuned per setting ({shared}): at other rates these differences "
        "can shrink, vanish or reverse."
    )


def name_of(key: str, tied: Sequence[str] = ()) -> str:
    """A key in words, with those that are tied to it."""
    name = _NAMES.get(key, key.rsplit(".", 1)[-1].replace("_", " "))
    return f"{name} with its {' and '.join(map(name_of, tied))}" if tied else name


def shown(value: object) -> str:
    """A setting as people write it."""
    if value is None:
        return "all"
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def basis(lines: Sequence[ScoredRun], found: Sequence[Comparison]) -> str:
    """What the numbers are, and what their intervals cover."""
    first = lines[0]
    loss = loss_estimate([first.scores], first.headline)
    tokens = {"all": "every token of the text", "response": "the tokens of the response"}
    counts = sorted({each.difference.seeds for each in found} or {1})
    seeds = counts[0]
    covered = (
        "95 % intervals are bootstrapped (BCa) over groups of related rows. They cover the choice "
        "of test rows: with one seed, what another seed would give is not covered, and no adapter "
        "is called better than another."
        if seeds < 2
        else "95 % intervals cover the choice of test rows and of the seed "
        f"({' or '.join(map(str, counts))} seeds): the widest of Student's over seeds, of "
        "Satterthwaite's for rows and seeds, and of a two-way bootstrap over groups of related "
        "rows and seeds."
    )
    if seeds < 2 <= counts[-1]:
        covered += (
            f" Comparisons of several seeds ({' or '.join(str(n) for n in counts if n > 1)}) "
            "cover the seed as well, and say so."
        )
    if len({line.recipe["data_seed"] for line in lines if not line.is_base}) > 1:
        covered += " Each seed also draws its own training rows."
    elif counts[-1] > 1:
        covered += " All seeds train on the same rows: which rows these are is not covered."
    family = (
        f" p-values are corrected for all {len(found)} comparisons (Holm); equivalence tests, "
        "categories and curves are not."
        if found
        else ""
    )
    return (
        f"Held-out loss is the total negative log-likelihood of {tokens[first.headline]} over "
        f"their number, perplexity is exp of that number; both on the same "
        f"{len(first.scores)} test rows in {loss.groups} groups for every cell. Differences are "
        f"paired row by row; {covered}{family} Base weights in "
        f"{first.run.record['model']['precision']}."
    )


def _nats(d: Difference) -> str:
    if d.groups < 2:
        return f"{d.value:+.4f} nats (no interval from one group)"
    return f"{d.value:+.4f} nats ({d.low:+.4f} to {d.high:+.4f})"


def _p(each: Comparison) -> str:
    p = each.p_corrected
    if p < 0.001:
        return "p < 0.001"
    # (Rounded up where it is a bound.)
    return f"p ≤ {math.ceil(1000 * p - 1e-9) / 1000:.3f}" if each.p_is_least else f"p = {p:.3f}"


def _reduction(contrasts: Sequence[Comparison]) -> str:
    if not contrasts:
        return "No adapter to compare with the base."
    said = []
    for each in contrasts:
        d = each.difference
        before, after = (perplexity(arm.loss().value) for arm in (each.first, each.second))
        # exp of a difference of losses is the ratio of perplexities.
        change = [100 * (perplexity(x) - 1) for x in (d.value, d.low, d.high)]
        what = (
            f"perplexity {'falls' if d.value < 0 else 'rises'} from {before:.3f} to {after:.3f}: "
            f"{change[0]:+.1f} % ({change[1]:+.1f} to {change[2]:+.1f} %)"
            if each.verdict == "different"
            else f"perplexity {before:.3f} and {after:.3f}: {_nats(d)}"
        )
        said.append(f"- {each.second.name}: {what}, {_p(each)}. {_follows(each)}")
    return "\n".join(said)


def _effect(contrasts: Sequence[Comparison]) -> str:
    return "\n".join(f"- {sentence(each)}" for each in contrasts)


def sentence(each: Comparison) -> str:
    """One contrast between two arms, with number, interval and what follows from them."""
    said = f"{each.second.name} against {each.first.name}: {_nats(each.difference)}, {_p(each)}."
    return f"{said} {_follows(each)}"


def _follows(each: Comparison) -> str:
    d = each.difference
    lower = "lower" if d.value < 0 else "higher"
    if each.verdict == "different":
        small = f" It is within ±{d.margin:g} nats, which counts as none." if d.equivalent else ""
        if each.covers_seeds:
            return f"The loss is {lower}: beyond the choice of test rows and of the seed.{small}"
        return (
            f"The loss of {_these(each)} is {lower} beyond the choice of test rows; whether it "
            f"would be with other seeds is not known.{small}"
        )
    if each.verdict == "equivalent":
        return f"Equivalent within ±{d.margin:g} nats" + (
            "." if each.covers_seeds else f", for {_these(each)}; other seeds may differ."
        )
    return "Inconclusive" + _what_would_decide(each)


def _these(each: Comparison) -> str:
    return "this training" if each.key == "base" else "this pair of runs"


def _what_would_decide(each: Comparison) -> str:
    needed = each.needed()
    if needed is None:
        return "."
    if needed.seeds is None:
        return (
            f"; about {needed.rows:,} test rows would decide for {_these(each)} (80 % power), "
            "and for the settings several seeds besides."
        )
    return (
        f"; a new experiment of about {needed.rows:,} test rows and {needed.seeds} seeds would "
        "decide (80 % power)."
    )


def confounds(found: Sequence[Comparison]) -> str:
    """What changes along with the settings that are compared."""
    of_key: dict[str, list[Comparison]] = {}
    for each in found:
        of_key.setdefault(each.key, []).append(each)
    said = []
    if sizes := of_key.get("data.size"):
        steps = _per_arm(sizes, "training", "steps")
        same = all(_steps(each.first) == _steps(each.second) for each in sizes)
        said.append(
            f"Sizes are compared at the same number of optimizer steps ({_steps(sizes[0].first)}): "
            "a smaller set is passed over more often."
            if same
            else "More rows are also more optimizer steps; the two are not told apart here "
            f"(steps: {steps})."
        )
    if ranks := of_key.get("adapter.r"):
        first = ranks[0].first
        ratio = first.setting("adapter.lora_alpha") / first.setting("adapter.r")
        if not ranks[0].tied:
            said.append(f"Ranks are compared at the same alpha/r ({ratio:g}) and learning rate.")
        said.append(f"A larger rank trains more weights ({_weights(ranks)}).")
    if modules := of_key.get("adapter.target_modules"):
        said.append(f"More target modules are also more trainable weights ({_weights(modules)}).")
    if kinds := of_key.get("adapter.kind", []):
        rate = kinds[0].first.setting("training.learning_rate")
        said.append(
            f"Methods are compared at the same learning rate ({rate:g}); each may have a better "
            "one."
            if "training.learning_rate" not in kinds[0].tied
            else "Methods are compared at one learning rate each; either may have a better one."
        )
        if len({_trainable(arm) for each in kinds for arm in (each.first, each.second)}) > 1:
            said.append(f"Methods train different numbers of weights ({_weights(kinds)}).")
    if any(each.second.is_full for each in kinds):
        precision = kinds[0].second.line.run.record["model"]["precision"]
        said.append(
            f"What full fine-tuning trained is saved and scored in {precision}, adapters in fp32 "
            f"on a base in {precision}: small changes of a weight may be lost to rounding."
        )
    said += [
        f"Cells of another {name_of(key)} also have another {' and '.join(map(name_of, tied))}; "
        "what is said of the one is said of all."
        for key, tied in {key: each[0].tied for key, each in of_key.items()}.items()
        if tied
    ]
    return "\n".join(f"- {each}" for each in said)


def _steps(arm: Setting) -> int:
    return int(arm.line.run.record["training"]["steps"])


def _trainable(arm: Setting) -> int:
    return int(arm.line.run.record["adapter"]["trainable_parameters"])


def _weights(contrasts: Sequence[Comparison]) -> str:
    return _per_arm(contrasts, "adapter", "trainable_parameters")


def _per_arm(contrasts: Sequence[Comparison], section: str, key: str) -> str:
    arms = {arm.name: arm for each in contrasts for arm in (each.first, each.second)}
    return "; ".join(f"{name}: {arm.line.run.record[section][key]:,}" for name, arm in arms.items())


def returns(found: Sequence[Comparison], curves: Sequence[LearningCurve]) -> str:
    """Gains a doubling of rank, of rows and of trainable weights, and the learning curve."""
    said = []
    to_base = {each.second.name: each.difference for each in found if each.key == "base"}
    for each in found:
        d = each.difference
        if each.tied:
            continue
        if each.key == "data.size":
            rows = [arm.training_rows for arm in (each.first, each.second)]
            first = to_base.get(each.first.name)
            if first is None or rows[0] == rows[1]:  # sizes may round to the same rows
                continue
            said.append(
                f"- {each.second.name}: the first {rows[0]} training rows change the loss by "
                f"{_nats(first)}; going on to {rows[1]} changes it by {_nats(d)}"
                f"{_per_doubling(d, rows)}." + _not_shown(each)
            )
        elif each.key in ("adapter.r", "adapter.target_modules"):
            many = [_trainable(arm) for arm in (each.first, each.second)]
            if many[0] != many[1]:
                said.append(
                    f"- {each.second.name} trains {many[1] / many[0]:.1f} times the weights of "
                    f"{each.first.name}, for {_nats(d)}{_per_doubling(d, many)}." + _not_shown(each)
                )
    said += [f"- {_curve(each)}" for each in curves]
    return "\n".join(said) or "No two cells differ in rank or dataset size alone."


def _per_doubling(d: Difference, amounts: Sequence[float]) -> str:
    doublings = math.log2(amounts[1] / amounts[0])
    if abs(doublings - 1) < 0.005:  # 338 to 675 rows are one, too
        return ", one doubling"
    ends = sorted((d.low / doublings, d.high / doublings))
    span = f" ({ends[0]:+.4f} to {ends[1]:+.4f})" if math.isfinite(ends[0]) else ""
    return f", {d.value / doublings:+.4f}{span} a doubling"


def _not_shown(each: Comparison) -> str:
    if each.verdict == "different":
        return "" if each.covers_seeds else " Of this pair of runs; other seeds may differ."
    return " The further gain is not shown to be more than nothing."


def _curve(curve: LearningCurve) -> str:
    if not curve.falls:
        return f"{curve.name}: over {len(curve.sizes)} sizes, loss does not fall with rows."
    floor, exponent = curve.floor, curve.exponent
    covers = "test rows and seeds" if curve.seeds > 1 else "test rows, not seeds"
    if not curve.fits:
        worst = max(zip(curve.residuals, curve.sizes, strict=True), key=lambda each: abs(each[0]))
        return (
            f"{curve.name}: E + A·N^(−β) does not describe these {len(curve.sizes)} sizes: the "
            f"loss at {worst[1]:,} training rows is {worst[0]:+.4f} nats from the best such curve, "
            f"more than chance in {covers} accounts for (p = {curve.p_fits:.3f}). So nothing is "
            "read from it."
        )
    return (
        f"{curve.name}: E + A·N^(−β) through {len(curve.sizes)} sizes has β = {exponent[0]:.2f} "
        f"({exponent[1]:.2f} to {exponent[2]:.2f}) and E = {floor[0]:.3f} ({floor[1]:.3f} to "
        f"{floor[2]:.3f}); at {2 * curve.sizes[-1]:,} training rows it expects "
        f"{curve.middle[-1]:.4f} ({curve.low[-1]:.4f} to {curve.high[-1]:.4f}). The intervals "
        f"cover {covers}, not that another form might fit as well. (Departure from the form: p = "
        f"{curve.p_fits:.2f}.)"
    )


def category_table(tuned: Sequence[Setting], base: ScoredRun | None) -> str:
    """Losses by category of rows as Markdown; empty where rows have no categories."""
    arms = [*([Setting((base,))] if base else []), *tuned]
    names = category_names(arms[0])
    if not names:
        return ""
    scores = arms[0].line.scores
    rows = [
        "| Category | Rows | " + " | ".join(arm.name for arm in arms) + " |",
        "| :-- | --: |" + " --: |" * len(arms),
    ]
    for name in names:
        many = sum(score.category == name for score in scores)
        losses = " | ".join(loss_shown(arm.within(name), 3) for arm in arms)
        rows.append(f"| {plain(name)} | {many} | {losses} |")
    return "\n".join(rows)


def category_names(arm: Setting) -> list[str]:
    """The thirty largest categories of the scored rows by name; none if there is but one."""
    scored = Counter(score.category for score in arm.line.scores if score.tokens_response)
    del scored[""]
    return sorted(name for name, _ in scored.most_common(30)) if len(scored) > 1 else []
