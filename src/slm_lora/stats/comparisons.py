"""The comparisons of an experiment: which arms, paired how, and what may be said of each.

An arm is a cell over its seeds. Arms are compared if they differ in one thing: every adapter
with its base, and neighbours along each key that the grid varies. This family is settled by the
recipe, before any result is seen, and its p-values are corrected together (Holm).
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from slm_lora.config.schema import METHOD_LABELS, EvaluationSection
from slm_lora.runs.folder import Run
from slm_lora.runs.metrics import Metric
from slm_lora.runs.scored_run import ScoredRun, read_scored_run
from slm_lora.stats.estimates import Estimate, Paired, estimate, paired
from slm_lora.stats.inference import LEAST_GROUPS, Difference, difference, holm
from slm_lora.stats.power import Needed, needed_for_difference, needed_for_equivalence

Verdict = Literal["different", "equivalent", "inconclusive"]


@dataclass(frozen=True)
class Setting:
    """One setting of the grid over its seeds; the base model is an arm of one line."""

    lines: tuple[ScoredRun, ...]

    @property
    def is_full(self) -> bool:
        """Whether all weights were trained: keys of an adapter have no effect then."""
        return bool(self.setting("adapter.kind") == "full")

    @property
    def line(self) -> ScoredRun:
        """The first seed's line: settings are those of all."""
        return self.lines[0]

    @property
    def name(self) -> str:
        """Name of the cell, without the seed where there are several."""
        name = self.line.run.cell
        if len(self.lines) == 1:
            return name
        return re.sub(r"-?\b(seed|data)\d+", "", name).strip("-") or f"r{self.setting('adapter.r')}"

    def setting(self, key: str) -> Any:
        """A dotted key of the resolved recipe."""
        return self.line.setting(key)

    @property
    def metric(self) -> Metric:
        """The headline of its runs."""
        return self.line.metric

    def estimate(self, metric: Metric | None = None) -> Estimate:
        """A metric (the headline), mean over seeds; its interval covers the choice of test rows."""
        return estimate([run.scores for run in self.lines], metric or self.metric)

    def within(self, category: str) -> Estimate:
        """As `estimate`, among the rows of a category."""
        runs = [[s for s in line.scores if s.category == category] for line in self.lines]
        return estimate(runs, self.metric)

    @property
    def training_rows(self) -> int:
        """Rows that it was trained on."""
        return int(self.line.run.record["data"]["sets"]["train"]["rows"])


@dataclass(frozen=True)
class Comparison:
    """Two arms that differ in one thing.

    Attributes:
        key: what they differ in: ``base``, or a dotted key of the recipe.
        tied: other keys, whose values go one to one with those of ``key`` in all arms.
        first: what is compared against.
        second: the other; differences are second minus first.
        pairs: of lines, one a seed.
        sample: differences by seed and group.
        difference: with interval, p and equivalence.
        p_corrected: by Holm over all contrasts of the experiment.
        family: how many these are.
    """

    key: str
    tied: tuple[str, ...]
    first: Setting
    second: Setting
    pairs: tuple[tuple[ScoredRun, ScoredRun], ...]
    sample: Paired
    difference: Difference
    p_corrected: float
    family: int = 1

    @property
    def verdict(self) -> Verdict:
        """What interval, corrected p and equivalence test say together."""
        if self.difference.excludes_zero and self.p_corrected < 0.05:
            return "different"
        return "equivalent" if self.difference.equivalent else "inconclusive"

    @property
    def metric(self) -> Metric:
        """What is compared."""
        return self.first.metric

    @property
    def covers_seeds(self) -> bool:
        """Whether it may be said of the settings, not only of these very trainings."""
        return self.difference.seeds > 1

    @property
    def p_is_least(self) -> bool:
        """Whether more sign flips might have shown a smaller p."""
        return 0 < self.difference.p <= self.difference.p_least

    def needed(self) -> Needed | None:
        """Rows and seeds for 80 % power: to show the observed difference or, where even its
        interval is not far from zero, equivalence."""
        rows = len(self.first.line.scores)
        if abs(self.difference.value) < self.difference.margin:
            return needed_for_equivalence(self.sample, rows, self.difference.margin)
        return needed_for_difference(self.sample, rows, self.family)

    def record(self) -> dict[str, Any]:
        """For metrics.json, which has no infinity: what is not known is null."""
        d = self.difference
        known = self.sample.groups > 1
        return {
            "key": self.key,
            "tied": list(self.tied),
            "pairs": [[a.run.folder.name, b.run.folder.name] for a, b in self.pairs],
            "tokens": self.first.line.headline,
            "value": d.value,
            "low": d.low if known else None,
            "high": d.high if known else None,
            "covers": d.covers,
            "p": d.p,
            "p_least": d.p_least,
            "p_corrected": self.p_corrected,
            "equivalent": d.equivalent,
            "margin": d.margin,
            "seeds": d.seeds,
            "groups": d.groups,
            "verdict": self.verdict,
        }


def arms(lines: Sequence[ScoredRun]) -> list[Setting]:
    """Adapters' lines grouped by everything but the seeds, in the order of the lines."""
    found: dict[str, list[ScoredRun]] = {}
    for line in lines:
        if not line.is_base:
            found.setdefault(repr((_base_key(line), _settings(line))), []).append(line)
    return [Setting(tuple(each)) for each in found.values()]


def all_comparisons(lines: Sequence[ScoredRun]) -> list[Comparison]:
    """Every arm against its base, then neighbours along every key that varies."""
    bases = {_base_key(line): line for line in lines if line.is_base}
    tuned = arms(lines)
    found: list[
        tuple[str, tuple[str, ...], Setting, Setting, tuple[tuple[ScoredRun, ScoredRun], ...]]
    ] = []
    for arm in tuned:
        if base := bases.get(_base_key(arm.line)):
            pairs = tuple((base, line) for line in arm.lines)
            found.append(("base", (), Setting((base,)), arm, pairs))
    kinds = [arm for arm in tuned if not arm.is_full], [arm for arm in tuned if arm.is_full]
    differing = [
        (key, tied, one, other)
        for some in kinds
        for key, tied in varied(some).items()
        for alike in _alike(some, (key, *tied))
        for one, other in _neighbours(alike, key)
    ]
    for key, tied, one, other in [*differing, *_against_full(*kinds)]:
        if pairs := _by_seed(one, other):  # of arms of other seeds, those that both have
            first, second = (Setting(tuple(pair[side] for pair in pairs)) for side in (0, 1))
            found.append((key, tied, first, second, pairs))
    samples = [
        paired([(a.scores, b.scores) for a, b in pairs], first.metric)
        for _, _, first, _, pairs in found
    ]
    differences = [
        difference(sample, equivalence_margin(first.line))
        for (_, _, first, *_), sample in zip(found, samples, strict=True)
    ]
    corrected = holm([each.p for each in differences])
    return [
        Comparison(*each, sample, d, p, len(found))
        for each, sample, d, p in zip(found, samples, differences, corrected, strict=True)
    ]


def compare(first: Run, second: Run) -> Comparison:
    """Two runs, whatever they differ in, on the first's headline tokens.

    Raises:
        IntegrityError: they were not scored on the same tokens of the same rows.
    """
    one, other = read_scored_run(first), read_scored_run(second)
    sample = paired([(one.scores, other.scores)], one.metric)
    found = difference(sample, equivalence_margin(one))
    return Comparison(
        "compare", (), Setting((one,)), Setting((other,)), ((one, other),), sample, found, found.p
    )


def by_category(each: Comparison) -> list[tuple[str, int, Difference]]:
    """The difference among the rows of every category: its name, its rows, the difference.

    Categories of fewer than `LEAST_GROUPS` groups are left out, as a bootstrap says nothing of so
    few; so are all beyond the twenty largest.
    """
    found = []
    scores = each.pairs[0][0].scores
    many = Counter(score.category for score in scores if score.category).most_common(20)
    for name in sorted(name for name, rows in many if rows >= LEAST_GROUPS):
        pairs = [
            tuple([s for s in line.scores if s.category == name] for line in pair)
            for pair in each.pairs
        ]
        sample = paired([(a, b) for a, b in pairs], each.first.metric)
        if sample.groups >= LEAST_GROUPS:
            found.append((name, len(pairs[0][0]), difference(sample, each.difference.margin)))
    return found


def series_along(key: str, tuned: Sequence[Setting]) -> list[list[Setting]]:
    """Arms that differ in ``key`` alone, a number, in its order; at least two of them each."""
    return [
        sorted(alike, key=lambda arm: amount(arm, key) or 0)
        for alike in _alike([arm for arm in tuned if not arm.is_full], (key,))
    ]


def equivalence_margin(line: ScoredRun) -> float:
    """Margin of equivalence of a run's recipe, nats per token."""
    # Runs of before there was the key have the default.
    default = EvaluationSection().equivalence_margin
    return float(line.resolved["evaluation"].get("equivalence_margin", default))


def _base_key(line: ScoredRun) -> tuple[object, ...]:
    record = line.run.record
    model, device = record["model"], record["machine"]["device"]
    return (
        model["sha256"], model["precision"], line.setting("model.quantization"), device,
        record["data"]["held_out_sha256"],
    )  # fmt: skip


def _settings(line: ScoredRun, without: Sequence[str] = ()) -> list[tuple[str, str]]:
    """The recipe flat, without seeds, and without some keys (the rank takes alpha/r along)."""
    recipe = {
        section: dict(value) if isinstance(value, dict) else value
        for section, value in line.resolved.items()
        if section not in ("seed", "data_seed", "seeds", "grid", "name", "description")
    }
    recipe["adapter"]["lora_alpha"] /= line.setting("adapter.r")
    flat = {
        f"{section}.{name}": repr(each)
        for section, value in recipe.items()
        for name, each in value.items()
    }
    return sorted((key, value) for key, value in flat.items() if key not in without)


def varied(tuned: Sequence[Setting]) -> dict[str, tuple[str, ...]]:
    """Keys that differ between arms, and to each the keys that are tied to it.

    Rank and data size come first, then the rest by name. Keys are tied if every value of one
    goes with one value of the other: a learning rate for each method, say. They differ as one.
    """
    values: dict[str, list[str]] = {}
    for arm in tuned:
        for key, value in _settings(arm.line):
            values.setdefault(key, []).append(value)
    shared = [key for key, each in values.items() if len(each) == len(tuned) and "." in key]
    order = {key: place for place, key in enumerate(_FIRST)}
    found: dict[str, tuple[str, ...]] = {}
    for key in sorted(shared, key=lambda key: (order.get(key, len(order)), key)):
        if len(set(values[key])) < 2:
            continue
        for other in found:
            pairs = set(zip(values[other], values[key], strict=True))
            if len(pairs) == len(set(values[other])) == len(set(values[key])):
                found[other] += (key,)
                break
        else:
            found[key] = ()
    return found


def _against_full(
    adapters: Sequence[Setting], full: Sequence[Setting]
) -> list[tuple[str, tuple[str, ...], Setting, Setting]]:
    """Every adapter with the full training that differs from it in nothing else, but for keys,
    such as a learning rate, that have one value for all adapters and another for all weights."""

    def rest(arm: Setting) -> dict[str, str]:
        return {k: v for k, v in _settings(arm.line) if not k.startswith("adapter.")}

    def values(some: Sequence[Setting], key: str) -> set[str | None]:
        return {rest(arm).get(key) for arm in some}

    tied = tuple(
        key
        for key in sorted({key for arm in [*adapters, *full] for key in rest(arm)})
        if len(values(adapters, key)) == len(values(full, key)) == 1
        and values(adapters, key) != values(full, key)
    )

    def same(arm: Setting) -> object:
        return _base_key(arm.line), [pair for pair in rest(arm).items() if pair[0] not in tied]

    return [
        ("adapter.kind", tied, one, other)
        for one in adapters
        for other in full
        if same(one) == same(other)
    ]


_FIRST = ("adapter.r", "data.size", "adapter.kind", "adapter.target_modules")


def _alike(tuned: Sequence[Setting], keys: Sequence[str]) -> list[list[Setting]]:
    """Arms that differ in nothing but the keys."""
    groups: dict[str, list[Setting]] = {}
    for arm in tuned:
        rest = repr((_base_key(arm.line), _settings(arm.line, without=keys)))
        groups.setdefault(rest, []).append(arm)
    return [group for group in groups.values() if len(group) > 1]


def _neighbours(alike: Sequence[Setting], key: str) -> list[tuple[Setting, Setting]]:
    """What has an order, each with the next; anything else, each with the first."""
    if all(amount(arm, key) is not None for arm in alike):
        return list(itertools.pairwise(sorted(alike, key=lambda arm: amount(arm, key) or 0)))
    first, *others = sorted(alike, key=lambda arm: _usual(arm.setting(key)))
    return [(first, other) for other in others]


def _usual(value: Any) -> tuple[int, str]:
    """Order of what has no size: LoRA comes before its variations."""
    order = list(METHOD_LABELS)
    return (order.index(value) if value in order else len(order)), str(value)


def amount(arm: Setting, key: str) -> float | None:
    """The setting as a number, where it has an order: data size in training rows (unset, it is
    all of them), target modules in weights that train."""
    if key == "data.size":
        return arm.training_rows
    if key == "adapter.target_modules":
        return int(arm.line.run.record["adapter"]["trainable_parameters"])
    value = arm.setting(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _by_seed(one: Setting, other: Setting) -> tuple[tuple[ScoredRun, ScoredRun], ...]:
    def seeds(line: ScoredRun) -> tuple[int, int]:
        return line.resolved["seed"], line.resolved["data_seed"]

    others = {seeds(line): line for line in other.lines}
    return tuple((line, others[seeds(line)]) for line in one.lines if seeds(line) in others)
