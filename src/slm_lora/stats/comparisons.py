"""Comparisons of an experiment: which settings, how they are paired, and the verdict on each.

Every adapter is compared with its base, and settings that differ in one key with their neighbour
along it. This family follows from the recipe, before any result is seen. Its p-values of no
difference are corrected together (Holm), and so are its p-values of equivalence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from slm_lora.errors import UsageError
from slm_lora.runs.metrics import Metric
from slm_lora.runs.scored_run import ScoredRun
from slm_lora.stats.estimates import Paired
from slm_lora.stats.inference import Difference, difference, holm
from slm_lora.stats.power import Needed, needed
from slm_lora.stats.selection_regret import at_own_best
from slm_lora.stats.settings import (
    Pairs,
    Setting,
    alike_settings,
    base_key,
    equivalence_margin,
    flat_settings,
    group_settings,
    neighbours,
    pair_runs,
    sample_of,
    varied,
)

Verdict = Literal["different", "equivalent", "inconclusive"]
ALPHA = 0.05


@dataclass(frozen=True)
class Comparison:
    """Two settings that differ in one key.

    Attributes:
        key: that they differ in: ``base``, or a dotted key of the recipe.
        tied: other keys, whose values go one to one with those of ``key`` in all settings.
        first: the reference.
        second: the other; differences are second minus first.
        pairs: of runs, one per training.
        sample: differences by unit and group.
        difference: with interval, p and equivalence, none of them corrected.
        p_corrected: of no difference, by Holm over all comparisons of the experiment.
        p_equivalence_corrected: of a difference of the margin or more, likewise.
        family: number of comparisons corrected together.
        added: units that were finished after a report had shown the others.
    """

    key: str
    tied: tuple[str, ...]
    first: Setting
    second: Setting
    pairs: Pairs
    sample: Paired
    difference: Difference
    p_corrected: float
    p_equivalence_corrected: float
    family: int = 1
    added: int = 0

    @property
    def verdict(self) -> Verdict:
        """From the corrected p-values."""
        if self.p_corrected < ALPHA:
            return "different"
        return "equivalent" if self.negligible else "inconclusive"

    @property
    def negligible(self) -> bool:
        """Whether the difference is shown to lie within the margin."""
        return self.p_equivalence_corrected < ALPHA

    @property
    def metric(self) -> Metric:
        """What is compared."""
        return self.first.metric

    @property
    def covers_seeds(self) -> bool:
        """Whether the verdict is on the settings, not only on these very trainings."""
        return self.difference.units > 1

    def needed(self) -> Needed | None:
        """Rows and seeds of a new experiment that shows a difference of the margin, or
        equivalence, with 80 % power."""
        rows = len(self.first.first_run.scores_of(self.metric))
        return needed(self.sample, rows, self.difference.margin, self.family)

    def record(self) -> dict[str, Any]:
        """For metrics.json, which has no infinity: what is not known is null."""
        d = self.difference
        known = math.isfinite(d.low + d.high)
        return {
            "key": self.key,
            "tied": list(self.tied),
            "pairs": [[a.run.folder.name, b.run.folder.name] for a, b in self.pairs],
            "tokens": self.first.first_run.headline,
            "value": d.value,
            "low": d.low if known else None,
            "high": d.high if known else None,
            "covers": d.covers,
            "p": d.p,
            "p_corrected": self.p_corrected,
            "p_equivalence": d.p_equivalence,
            "p_equivalence_corrected": self.p_equivalence_corrected,
            "equivalent": self.negligible,
            "margin": d.margin,
            "seeds": d.units,
            "unit": d.unit,
            "agreeing": d.agreeing,
            "smallest": d.smallest,
            "largest": d.largest,
            "next_low": d.next_low,
            "next_high": d.next_high,
            "added_after_a_report": self.added,
            "groups": d.groups,
            "effective_groups": d.effective_groups,
            "verdict": self.verdict,
        }


class _Pair(NamedTuple):
    """Two settings to compare, before any statistics."""

    key: str
    tied: tuple[str, ...]
    first: Setting
    second: Setting
    runs: Pairs


def all_comparisons(
    runs: Sequence[ScoredRun],
    seen: frozenset[str] | None = None,
    settings: Sequence[Setting] | None = None,
) -> list[Comparison]:
    """Every setting against its base, then neighbours along every key that varies.

    Args:
        runs: of one experiment, scored on the same rows.
        seen: run folders that the first report showed; None: nothing was shown before.
        settings: of these runs, with the regrets of their tuned values; None: without any.
    """
    settings = group_settings(runs) if settings is None else settings
    return _corrected([*_with_bases(runs, settings), *_between(settings)], seen)


def compare(arms: Sequence[Setting]) -> list[Comparison]:
    """Each of several settings against the first, whatever they differ in, by its headline.

    Raises:
        IntegrityError: they were not scored on the same tokens of the same rows.
        UsageError: two have no seed in common.
    """
    first = arms[0]
    pairs = []
    for other in arms[1:]:
        if len(first.runs) == len(other.runs) == 1:  # two trainings, whatever their seeds
            runs: Pairs = ((first.first_run, other.first_run),)
        elif not (runs := pair_runs(first, other)):
            raise UsageError(f"{first.name} and {other.name} have no seed in common")
        pairs.append(_Pair("compare", (), first, other, runs))
    return _corrected(pairs, None)


def _corrected(pairs: Sequence[_Pair], seen: frozenset[str] | None) -> list[Comparison]:
    samples = [sample_of(pair.runs, pair.first.metric) for pair in pairs]
    differences = [
        at_own_best(
            difference(sample, equivalence_margin(pair.first.first_run)),
            sample,
            pair.first.regret,
            pair.second.regret,
        )
        for pair, sample in zip(pairs, samples, strict=True)
    ]
    of_difference = holm([result.p for result in differences])
    of_equivalence = holm([result.p_equivalence for result in differences])
    return [
        Comparison(
            *pair,
            sample,
            result,
            p,
            p_equivalent,
            len(pairs),
            min(_added(pair.runs, seen), result.units),
        )
        for pair, sample, result, p, p_equivalent in zip(
            pairs, samples, differences, of_difference, of_equivalence, strict=True
        )
    ]


def _added(pairs: Pairs, seen: frozenset[str] | None) -> int:
    """Pairs with a run that no report had shown, where one had shown others."""
    if seen is None:
        return 0
    new = [
        any(run.run.folder.name not in seen for run in pair if not run.is_base) for pair in pairs
    ]
    return 0 if all(new) else sum(new)


def _with_bases(runs: Sequence[ScoredRun], settings: Sequence[Setting]) -> list[_Pair]:
    bases = {base_key(run): run for run in runs if run.is_base}
    return [
        _Pair("base", (), Setting((base,)), setting, pair_runs(Setting((base,)), setting))
        for setting in settings
        if (base := bases.get(base_key(setting.first_run)))
    ]


def _between(settings: Sequence[Setting]) -> list[_Pair]:
    adapters = [setting for setting in settings if not setting.is_full]
    full = [setting for setting in settings if setting.is_full]
    differing = [
        (key, tied, first, second)
        for kind in (adapters, full)
        for key, tied in varied(kind).items()
        for alike in alike_settings(kind, (key, *tied))
        for first, second in neighbours(alike, key)
    ]
    pairs = []
    for key, tied, first, second in [*differing, *_against_full(adapters, full)]:
        if by_seed := pair_runs(first, second):  # the seeds that both have
            one, other = (
                replace(setting, runs=tuple(pair[side] for pair in by_seed))
                for side, setting in enumerate((first, second))
            )
            pairs.append(_Pair(key, tied, one, other, by_seed))
    return pairs


def _against_full(
    adapters: Sequence[Setting], full: Sequence[Setting]
) -> list[tuple[str, tuple[str, ...], Setting, Setting]]:
    """Every adapter with the full training that differs from it in nothing else, but for keys,
    such as a learning rate, that have one value for all adapters and another for all weights."""

    def rest(setting: Setting) -> dict[str, str]:
        return {k: v for k, v in flat_settings(setting.first_run) if not k.startswith("adapter.")}

    def values(some: Sequence[Setting], key: str) -> set[str | None]:
        return {rest(setting).get(key) for setting in some}

    tied = tuple(
        key
        for key in sorted({key for setting in [*adapters, *full] for key in rest(setting)})
        if len(values(adapters, key)) == len(values(full, key)) == 1
        and values(adapters, key) != values(full, key)
    )

    def same(setting: Setting) -> object:
        return base_key(setting.first_run), [
            pair for pair in rest(setting).items() if pair[0] not in tied
        ]

    return [
        ("adapter.kind", tied, one, other)
        for one in adapters
        for other in full
        if same(one) == same(other)
    ]
