"""Computed paragraphs: perplexity reduction, effect of rank, of data size, diminishing returns.

Every sentence comes from a paired difference on the test rows, and none says more than one
seed can carry: an interval here covers the choice of rows, never the seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from slm_lora.experiment.statistics import Estimate, paired_difference
from slm_lora.experiment.table import Line


@dataclass(frozen=True)
class Contrast:
    """Two runs that differ in one thing; ``difference`` is second minus first."""

    first: Line
    second: Line
    difference: Estimate

    def record(self) -> dict[str, Any]:
        """For metrics.json."""
        return {
            "first": self.first.run.folder.name,
            "second": self.second.run.folder.name,
            "tokens": self.first.headline,
            **self.difference.record(),
        }


def contrast(first: Line, second: Line) -> Contrast:
    """Second against first, on the headline's tokens, row by row."""
    return Contrast(first, second, paired_difference(first.scores, second.scores, first.headline))


def against_base(lines: Sequence[Line]) -> list[Contrast]:
    """Every adapter against its base."""
    bases = {_base_key(line): line for line in lines if line.is_base}
    return [
        contrast(bases[_base_key(line)], line)
        for line in lines
        if not line.is_base and _base_key(line) in bases
    ]


def _base_key(line: Line) -> tuple[str, str, str, str]:
    record = line.run.record
    model, device = record["model"], record["machine"]["device"]
    return model["sha256"], model["precision"], device, record["data"]["held_out_sha256"]


def by_key(lines: Sequence[Line], key: str) -> list[Contrast]:
    """Neighbours along one key (rank, data size) with everything else equal."""
    tuned = [line for line in lines if not line.is_base and line.setting(key) is not None]
    found = []
    for group in _alike(tuned, key):
        group.sort(key=lambda line: line.setting(key))
        found += [contrast(a, b) for a, b in itertools.pairwise(group)]
    return found


def _alike(lines: Sequence[Line], key: str) -> Iterator[list[Line]]:
    """Lines in groups that differ in ``key`` (and, for the rank, in alpha) only."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        rest = {section: dict(value) if isinstance(value, dict) else value
                for section, value in line.recipe.items()}  # fmt: skip
        section, name = key.split(".")
        rest[section].pop(name)
        if key == "adapter.r":
            rest["adapter"]["lora_alpha"] /= line.setting(key)
        groups.setdefault(repr(sorted(rest.items())), []).append(line)
    return (group for group in groups.values() if len(group) > 1)


@dataclass(frozen=True)
class Contrasts:
    """All comparisons of an experiment, made once for the metrics and the analysis."""

    base: list[Contrast]
    rank: list[Contrast]
    data_size: list[Contrast]


def all_contrasts(lines: Sequence[Line]) -> Contrasts:
    """Every adapter against its base, and neighbours in rank and in data size."""
    return Contrasts(against_base(lines), by_key(lines, "adapter.r"), by_key(lines, "data.size"))


def analysis(lines: Sequence[Line], found: Contrasts) -> str:
    """The analysis as Markdown."""
    tuned = [line for line in lines if not line.is_base]
    seeds = {line.recipe["seed"] for line in tuned}
    return (
        "\n\n".join(
            [
                "# Analysis",
                _basis(lines, len(seeds)),
                "## Perplexity reduction\n\n" + _reduction(found.base),
                "## Effect of the rank\n\n" + _neighbours(found.rank, "rank"),
                "## Effect of the dataset size\n\n" + _sizes(found.data_size),
                "## Diminishing returns\n\n" + _returns(found),
            ]
        )
        + "\n"
    )


def _basis(lines: Sequence[Line], seeds: int) -> str:
    first = lines[0]
    loss = first.loss()
    tokens = {"all": "every token of the text", "response": "the tokens of the response"}
    record = first.run.record
    one = (
        "one seed a cell, so what another seed would give is not covered, and no adapter is "
        "called better than another"
        if seeds < 2
        else f"{seeds} seeds, each compared within itself"
    )
    return (
        f"Held-out loss is the total negative log-likelihood of {tokens[first.headline]} over "
        f"their number, perplexity is exp of that number; both on the same "
        f"{len(first.scores)} test rows in {loss.groups} groups for every cell. Differences are "
        f"paired row by row; 95 % intervals are clustered by group of related rows. They cover "
        f"the choice of test rows: {one}. Base weights in {record['model']['precision']}."
    )


def _nats(estimate: Estimate) -> str:
    return f"{estimate.value:+.4f} nats ({estimate.low:+.4f} to {estimate.high:+.4f})"


def _reduction(contrasts: Sequence[Contrast]) -> str:
    if not contrasts:
        return "No adapter to compare with the base."
    said = []
    for each in contrasts:
        before = each.first.run.record["evaluation"][each.first.headline]["perplexity"]
        after = each.second.run.record["evaluation"][each.first.headline]["perplexity"]
        d = each.difference
        # exp of a difference of losses is the ratio of perplexities.
        change = [100 * (math.exp(x) - 1) for x in (d.value, d.low, d.high)]
        verdict = (
            f"perplexity {'falls' if d.value < 0 else 'rises'} from {before:.3f} to {after:.3f}: "
            f"{change[0]:+.1f} % ({change[1]:+.1f} to {change[2]:+.1f} %)"
            if d.excludes_zero
            else f"perplexity {before:.3f} and {after:.3f}: no difference shown ({_nats(d)})"
        )
        said.append(f"- {each.second.run.cell}: {verdict}.")
    return "\n".join(said)


def _neighbours(contrasts: Sequence[Contrast], what: str) -> str:
    if not contrasts:
        return f"No two cells differ in {what} alone."
    return "\n".join(_neighbour(each) for each in contrasts)


def _neighbour(each: Contrast) -> str:
    d = each.difference
    names = f"{each.second.run.cell} against {each.first.run.cell}"
    if not d.excludes_zero:
        return f"- {names}: {_nats(d)}. The interval holds zero: inconclusive."
    lower = "lower" if d.value < 0 else "higher"
    return (
        f"- {names}: {_nats(d)}. The loss of this pair of adapters is {lower} beyond the choice "
        "of test rows; whether it would be with other seeds is not known."
    )


def _sizes(contrasts: Sequence[Contrast]) -> str:
    said = _neighbours(contrasts, "dataset size")
    if contrasts:
        said += (
            "\n\nMore rows at the same number of epochs are also more optimizer steps; the two "
            "are not told apart here ("
            + "; ".join(
                f"{c.first.run.cell}: {c.first.run.record['training']['steps']} steps, "
                f"{c.second.run.cell}: {c.second.run.record['training']['steps']}"
                for c in contrasts
            )
            + ")."
        )
    return said


def _returns(found: Contrasts) -> str:
    said = []
    for each in found.data_size:
        to_first = next((c for c in found.base if c.second is each.first), None)
        if to_first is None:
            continue
        rows = [
            line.run.record["data"]["sets"]["train"]["rows"] for line in (each.first, each.second)
        ]
        if rows[0] == rows[1]:  # sizes that round to the same number of training rows
            continue
        doublings = math.log2(rows[1] / rows[0])
        d = each.difference
        share = d.value / to_first.difference.value if to_first.difference.value else math.nan
        said.append(
            f"- Rank {each.first.setting('adapter.r')}: the first {rows[0]} training rows change "
            f"the loss by {_nats(to_first.difference)}; going on to {rows[1]} changes it by "
            f"{_nats(d)}, {d.value / doublings:+.4f} a doubling, which is {100 * share:.1f} % of "
            "the first change. "
            + ("The further gain is not shown to be more than nothing." if not d.excludes_zero
               else "Where it ends cannot be said from two sizes.")
        )  # fmt: skip
    for each in found.rank:
        parameters = [
            line.run.record["adapter"]["trainable_parameters"] for line in (each.first, each.second)
        ]
        said.append(
            f"- {each.second.run.cell} trains {parameters[1] / parameters[0]:.1f} times the "
            f"parameters of {each.first.run.cell}, for {_nats(each.difference)}."
        )
    return "\n".join(said) or "No two cells differ in rank or dataset size alone."
