"""The comparisons of an experiment: which arms, paired how, and what may be said of each.

An arm is a cell over its seeds. Arms are compared if they differ in one thing: every adapter
with its base, and neighbours along each key that the grid varies. This family is settled by the
recipe, before any result is seen, and its p-values are corrected together (Holm).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from slm_lora.experiment.statistics import (
    Difference,
    Needed,
    Paired,
    difference,
    holm,
    needed_for_difference,
    needed_for_equivalence,
    paired,
)
from slm_lora.experiment.table import Line, read_line
from slm_lora.recipe.schema import EvaluationSection
from slm_lora.runs import Run

Verdict = Literal["different", "equivalent", "inconclusive"]


@dataclass(frozen=True)
class Arm:
    """One setting of the grid over its seeds; the base model is an arm of one line."""

    lines: tuple[Line, ...]

    @property
    def line(self) -> Line:
        """The first seed's line: settings are those of all."""
        return self.lines[0]

    @property
    def name(self) -> str:
        """Name of the cell, without the seed where there are several."""
        name = self.line.run.cell
        return name if len(self.lines) == 1 else re.sub(r"-?(seed|data)\d+", "", name)

    def setting(self, key: str) -> Any:
        """A dotted key of the resolved recipe."""
        return self.line.setting(key)


@dataclass(frozen=True)
class Contrast:
    """Two arms that differ in one thing.

    Attributes:
        key: what they differ in: ``base``, or a dotted key of the recipe.
        first: what is compared against.
        second: the other; differences are second minus first.
        pairs: of lines, one a seed.
        sample: differences by seed and group.
        difference: with interval, p and equivalence.
        p_corrected: by Holm over all contrasts of the experiment.
    """

    key: str
    first: Arm
    second: Arm
    pairs: tuple[tuple[Line, Line], ...]
    sample: Paired
    difference: Difference
    p_corrected: float

    @property
    def verdict(self) -> Verdict:
        """What interval, corrected p and equivalence test say together."""
        if self.difference.excludes_zero and self.p_corrected < 0.05:
            return "different"
        return "equivalent" if self.difference.equivalent else "inconclusive"

    @property
    def covers_seeds(self) -> bool:
        """Whether it may be said of the settings, not only of these very trainings."""
        return self.difference.seeds > 1

    def needed(self) -> Needed | None:
        """Rows and seeds for 80 % power: to show the observed difference or, where even its
        interval is not far from zero, equivalence."""
        rows = len(self.first.line.scores)
        if abs(self.difference.value) < self.difference.margin:
            return needed_for_equivalence(self.sample, rows, self.difference.margin)
        return needed_for_difference(self.sample, rows)

    def record(self) -> dict[str, Any]:
        """For metrics.json, which has no infinity: what is not known is null."""
        d = self.difference
        known = self.sample.groups > 1
        return {
            "key": self.key,
            "pairs": [[a.run.folder.name, b.run.folder.name] for a, b in self.pairs],
            "tokens": self.first.line.headline,
            "value": d.value,
            "low": d.low if known else None,
            "high": d.high if known else None,
            "covers": d.covers,
            "p": d.p,
            "p_corrected": self.p_corrected,
            "equivalent": d.equivalent,
            "margin": d.margin,
            "seeds": d.seeds,
            "groups": d.groups,
            "verdict": self.verdict,
        }


def arms(lines: Sequence[Line]) -> list[Arm]:
    """Adapters' lines grouped by everything but the seeds, in the order of the lines."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        if not line.is_base:
            found.setdefault(repr((_base_key(line), _settings(line))), []).append(line)
    return [Arm(tuple(each)) for each in found.values()]


def all_contrasts(lines: Sequence[Line]) -> list[Contrast]:
    """Every arm against its base, then neighbours along every key that varies."""
    bases = {_base_key(line): line for line in lines if line.is_base}
    tuned = arms(lines)
    found: list[tuple[str, Arm, Arm, tuple[tuple[Line, Line], ...]]] = []
    for arm in tuned:
        if base := bases.get(_base_key(arm.line)):
            found.append(("base", Arm((base,)), arm, tuple((base, line) for line in arm.lines)))
    for key in _varied(tuned):
        for alike in _alike(tuned, key):
            found += [
                (key, one, other, pairs)
                for one, other in _neighbours(alike, key)
                if (pairs := _by_seed(one, other))
            ]
    samples = [
        paired([(a.scores, b.scores) for a, b in pairs], first.line.headline)
        for _, first, _, pairs in found
    ]
    differences = [
        difference(sample, _margin(first.line))
        for (_, first, *_), sample in zip(found, samples, strict=True)
    ]
    corrected = holm([each.p for each in differences])
    return [
        Contrast(*each, sample, d, p)
        for each, sample, d, p in zip(found, samples, differences, corrected, strict=True)
    ]


def compare(first: Run, second: Run) -> Contrast:
    """Two runs, whatever they differ in, on the first's headline tokens.

    Raises:
        IntegrityError: they were not scored on the same tokens of the same rows.
    """
    one, other = read_line(first), read_line(second)
    sample = paired([(one.scores, other.scores)], one.headline)
    found = difference(sample, _margin(one))
    return Contrast("compare", Arm((one,)), Arm((other,)), ((one, other),), sample, found, found.p)


def _margin(line: Line) -> float:
    # Runs of before there was the key have the default.
    default = EvaluationSection().equivalence_margin
    return float(line.recipe["evaluation"].get("equivalence_margin", default))


def _base_key(line: Line) -> tuple[str, str, str, str]:
    record = line.run.record
    model, device = record["model"], record["machine"]["device"]
    return model["sha256"], model["precision"], device, record["data"]["held_out_sha256"]


def _settings(line: Line, without: str = "") -> list[tuple[str, str]]:
    """The recipe flat, without seeds, and without a key (the rank takes alpha/r along)."""
    recipe = {
        section: dict(value) if isinstance(value, dict) else value
        for section, value in line.recipe.items()
        if section not in ("seed", "data_seed", "seeds", "grid", "name", "description")
    }
    recipe["adapter"]["lora_alpha"] /= line.setting("adapter.r")
    flat = {
        f"{section}.{name}": repr(each)
        for section, value in recipe.items()
        for name, each in value.items()
    }
    flat.pop(without, None)
    return sorted(flat.items())


def _varied(tuned: Sequence[Arm]) -> list[str]:
    """Keys that differ between arms: rank and data size first, then by name."""
    values: dict[str, set[str]] = {}
    for arm in tuned:
        for key, value in _settings(arm.line):
            values.setdefault(key, set()).add(value)
    order = {"adapter.r": 0, "data.size": 1}
    varied = [key for key, seen in values.items() if len(seen) > 1 and "." in key]
    return sorted(varied, key=lambda key: (order.get(key, 2), key))


def _alike(tuned: Sequence[Arm], key: str) -> list[list[Arm]]:
    groups: dict[str, list[Arm]] = {}
    for arm in tuned:
        rest = repr((_base_key(arm.line), _settings(arm.line, without=key)))
        groups.setdefault(rest, []).append(arm)
    return [group for group in groups.values() if len(group) > 1]


def _neighbours(alike: Sequence[Arm], key: str) -> list[tuple[Arm, Arm]]:
    """Numbers in order, each with the next; anything else, each with the first."""
    values = [arm.setting(key) for arm in alike]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return list(itertools.pairwise(sorted(alike, key=lambda arm: arm.setting(key))))
    return [(alike[0], other) for other in alike[1:]]


def _by_seed(one: Arm, other: Arm) -> tuple[tuple[Line, Line], ...]:
    def seeds(line: Line) -> tuple[int, int]:
        return line.recipe["seed"], line.recipe["data_seed"]

    others = {seeds(line): line for line in other.lines}
    return tuple((line, others[seeds(line)]) for line in one.lines if seeds(line) in others)
