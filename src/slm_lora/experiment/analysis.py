"""Computed paragraphs: perplexity reduction, effects of what the grid varies, diminishing returns.

Every sentence comes from a contrast and says no more than its verdict: with one seed nothing
about the settings, only about these very adapters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from slm_lora.experiment.contrasts import Contrast
from slm_lora.experiment.statistics import Difference
from slm_lora.experiment.table import Line

_NAMES = {
    "adapter.r": "rank",
    "data.size": "dataset size",
    "adapter.target_modules": "target modules",
    "adapter.kind": "kind of adapter",
}


def analysis(lines: Sequence[Line], found: Sequence[Contrast]) -> str:
    """The analysis as Markdown."""
    to_base = [each for each in found if each.key == "base"]
    keys = ["adapter.r", "data.size"]
    keys += [k for k in dict.fromkeys(c.key for c in found) if k not in (*keys, "base")]
    parts = [
        "# Analysis",
        _basis(lines, found),
        "## Perplexity reduction\n\n" + _reduction(to_base),
    ]
    for key in keys:
        of_key = [each for each in found if each.key == key]
        parts.append(f"## Effect of the {_name(key)}\n\n" + _effect(of_key, key))
    parts.append("## Diminishing returns\n\n" + _returns(found))
    return "\n\n".join(parts) + "\n"


def _name(key: str) -> str:
    return _NAMES.get(key, key.rsplit(".", 1)[-1].replace("_", " "))


def _basis(lines: Sequence[Line], found: Sequence[Contrast]) -> str:
    first = lines[0]
    loss = first.loss()
    tokens = {"all": "every token of the text", "response": "the tokens of the response"}
    seeds = max((each.difference.seeds for each in found), default=1)
    covered = (
        "They cover the choice of test rows: with one seed a cell, what another seed would give "
        "is not covered, and no adapter is called better than another."
        if seeds < 2
        else f"They cover the choice of test rows and of the seed ({seeds} seeds): of Student's "
        "interval over seeds and a two-way bootstrap over groups and seeds, the wider."
    )
    family = f" p-values are corrected for all {len(found)} comparisons (Holm)." if found else ""
    return (
        f"Held-out loss is the total negative log-likelihood of {tokens[first.headline]} over "
        f"their number, perplexity is exp of that number; both on the same "
        f"{len(first.scores)} test rows in {loss.groups} groups for every cell. Differences are "
        f"paired row by row; 95 % intervals are bootstrapped (BCa) over groups of related rows. "
        f"{covered}{family} Base weights in {first.run.record['model']['precision']}."
    )


def _nats(d: Difference) -> str:
    if d.groups < 2:
        return f"{d.value:+.4f} nats (no interval from one group)"
    return f"{d.value:+.4f} nats ({d.low:+.4f} to {d.high:+.4f})"


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _reduction(contrasts: Sequence[Contrast]) -> str:
    if not contrasts:
        return "No adapter to compare with the base."
    said = []
    for each in contrasts:
        d = each.difference
        losses = [
            [line.run.record["evaluation"][line.headline]["loss"] for line in arm.lines]
            for arm in (each.first, each.second)
        ]
        before, after = (math.exp(sum(arm) / len(arm)) for arm in losses)
        # exp of a difference of losses is the ratio of perplexities.
        change = [100 * (math.exp(x) - 1) for x in (d.value, d.low, d.high)]
        said.append(
            f"- {each.second.name}: perplexity {'falls' if d.value < 0 else 'rises'} from "
            f"{before:.3f} to {after:.3f}: {change[0]:+.1f} % ({change[1]:+.1f} to "
            f"{change[2]:+.1f} %), {_p(each.p_corrected)}."
            if each.verdict == "different"
            else f"- {each.second.name}: perplexity {before:.3f} and {after:.3f}: no difference "
            f"shown ({_nats(d)}, {_p(each.p_corrected)})."
        )
    return "\n".join(said)


def _effect(contrasts: Sequence[Contrast], key: str) -> str:
    if not contrasts:
        return f"No two cells differ in {_name(key)} alone."
    said = "\n".join(f"- {sentence(each)}" for each in contrasts)
    if key == "data.size":
        steps = "; ".join(
            dict.fromkeys(
                f"{arm.name}: {arm.line.run.record['training']['steps']}"
                for each in contrasts
                for arm in (each.first, each.second)
            )
        )
        said += (
            "\n\nMore rows at the same number of epochs are also more optimizer steps; the two "
            f"are not told apart here (steps: {steps})."
        )
    return said


def sentence(each: Contrast) -> str:
    """One contrast between two arms, with number, interval and what follows from them."""
    d = each.difference
    said = f"{each.second.name} against {each.first.name}: {_nats(d)}, {_p(each.p_corrected)}. "
    lower = "lower" if d.value < 0 else "higher"
    if each.verdict == "different":
        return said + (
            f"The loss is {lower}: beyond the choice of test rows and of the seed."
            if each.covers_seeds
            else f"The loss of this pair of runs is {lower} beyond the choice of test rows; "
            "whether it would be with other seeds is not known."
        )
    if each.verdict == "equivalent":
        return said + (
            f"Equivalent within ±{d.margin:g} nats"
            + ("." if each.covers_seeds else ", for this pair of runs; other seeds may differ.")
        )
    return said + "Inconclusive" + _what_would_decide(each)


def _what_would_decide(each: Contrast) -> str:
    needed = each.needed()
    if needed is None:
        return "."
    seeds = "several seeds" if needed.seeds is None else f"{needed.seeds} seeds"
    return f"; about {needed.rows:,} test rows and {seeds} would decide (80 % power)."


def _returns(found: Sequence[Contrast]) -> str:
    said = []
    to_base = {id(each.second): each.difference for each in found if each.key == "base"}
    for each in found:
        d = each.difference
        if each.key == "data.size":
            rows = [
                arm.line.run.record["data"]["sets"]["train"]["rows"]
                for arm in (each.first, each.second)
            ]
            first = to_base.get(id(each.first))
            if first is None or rows[0] == rows[1]:  # sizes may round to the same rows
                continue
            share = f", which is {100 * d.value / first.value:.1f} % of the first change" * bool(
                first.value
            )
            said.append(
                f"- {each.second.name}: the first {rows[0]} training rows change the loss by "
                f"{_nats(first)}; going on to {rows[1]} changes it by {_nats(d)}, "
                f"{d.value / math.log2(rows[1] / rows[0]):+.4f} a doubling{share}."
                + ("" if each.verdict == "different"
                   else " The further gain is not shown to be more than nothing.")
            )  # fmt: skip
        elif each.key == "adapter.r":
            parameters = [
                arm.line.run.record["adapter"]["trainable_parameters"]
                for arm in (each.first, each.second)
            ]
            doublings = math.log2(parameters[1] / parameters[0])
            said.append(
                f"- {each.second.name} trains {parameters[1] / parameters[0]:.1f} times the "
                f"parameters of {each.first.name}, for {_nats(d)}, {d.value / doublings:+.4f} a "
                "doubling."
            )
    return "\n".join(said) or "No two cells differ in rank or dataset size alone."
