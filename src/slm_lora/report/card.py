"""The result in a few lines: which setting to use, what it gains, and what is not known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slm_lora.report.blocks import Fact
from slm_lora.report.forgetting_facts import forgetting_facts
from slm_lora.report.limits import limits
from slm_lora.report.names import SettingNames
from slm_lora.report.reply_facts import reply_facts
from slm_lora.report.tuning import Tuned
from slm_lora.runs.metrics import Metric
from slm_lora.stats.comparisons import Comparison
from slm_lora.stats.estimates import perplexity
from slm_lora.stats.inference import interval
from slm_lora.stats.selection import best_set, cost, equivalent_to, lowest_of, selected_interval
from slm_lora.stats.selection_regret import own_best_interval
from slm_lora.stats.settings import (
    Setting,
    base_of,
    pair_runs,
    sample_of,
)


@dataclass(frozen=True)
class Gap:
    """Loss of a setting minus that of the recommended one, on the same rows and seeds.

    Attributes:
        setting: the other setting.
        value: mean over seeds, nats per token; above zero the recommended one is better.
        low, high: 95 % interval, paired; not corrected for the number of settings.
        seeds: seeds that both have.
    """

    setting: Setting
    value: float
    low: float
    high: float
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    def text(self, unit: str = " nats") -> str:
        """``+0.0235 nats (+0.0211 to +0.0259)``."""
        return interval_text(self.value, self.low, self.high, unit)


@dataclass(frozen=True)
class Card:
    """The result of an experiment with one base model.

    Attributes:
        recommended: the setting to use; None where no adapter was trained.
        lowest: the setting of the lowest loss.
        gaps: every other trained setting against the recommended one, cheapest first.
        best: settings not significantly worse than another, cheapest first.
        base: the base against the recommended one, with an interval that holds whichever setting
            was chosen; None without its scores.
        margin: of equivalence, nats per token.
        facts: the lines, in their order.
    """

    recommended: Setting | None
    lowest: Setting | None
    best: tuple[Setting, ...]
    gaps: tuple[Gap, ...]
    base: Gap | None
    margin: float
    facts: tuple[Fact, ...]

    def record(self, names: SettingNames) -> dict[str, Any] | None:
        """For metrics.json."""
        if self.recommended is None or self.lowest is None:
            return None
        return {
            "recommended": names.of(self.recommended),
            "cells": [run.run.cell for run in self.recommended.runs],
            "lowest": names.of(self.lowest),
            "best_set": [names.of(setting) for setting in self.best],
            "margin": self.margin,
            "facts": {fact.label: fact.text for fact in self.facts},
        }


def gap(reference: Setting, other: Setting, metric: Metric | None = None) -> Gap | None:
    """``other`` against ``reference`` in a metric (the headline), over the seeds that both have;
    None without any."""
    pairs = pair_runs(reference, other)
    if not pairs:
        return None
    sample = sample_of(pairs, metric or reference.metric)
    if metric is None:
        span = own_best_interval(sample, 0.95, reference.regret, other.regret)
    else:
        span = interval(sample, 0.95)
    return Gap(other, sample.value, *span, len(pairs))


def make_card(
    settings: Sequence[Setting],
    bases: Sequence[Setting],
    comparisons: Sequence[Comparison],
    margin: float,
    names: SettingNames,
    phase: Tuned | None = None,
) -> Card:
    """The recommended setting: the cheapest one that is equivalent to the one of the lowest loss.

    Args:
        settings: trained on one base.
        bases: base models; the recommended setting is compared with its own.
        comparisons: of the experiment.
        margin: of equivalence, nats per token.
        names: of the settings.
        phase: of tuning; None without one.
    """
    if not settings:
        return Card(None, None, (), (), None, margin, ())
    by_cost = sorted(settings, key=cost)
    lowest = lowest_of(by_cost)
    cheaper = by_cost[: by_cost.index(lowest)]
    recommended = next(
        (other for other in cheaper if equivalent_to(lowest, other, margin, len(settings) - 1)),
        lowest,
    )
    given_up = None if recommended is lowest else gap(lowest, recommended)
    gaps = [gap(recommended, setting) for setting in by_cost if setting is not recommended]
    to_base = None
    base = base_of(recommended, bases)
    if base:
        value = sample_of(pair_runs(recommended, base), recommended.metric).value
        span = selected_interval(recommended, base, len(settings))
        to_base = Gap(base, value, *span, len(recommended.runs))
    best = best_set(by_cost)
    facts = [
        Fact("Recommended", _why(recommended, lowest, given_up, settings, names), "settings"),
        *_best_fact(best, by_cost, names),
        *([_gain(recommended, to_base, comparisons)] if to_base else []),
        *(reply_facts(base, recommended) if base else []),
        *forgetting_facts(recommended),
        *limits(recommended, settings, comparisons, names, phase),
    ]
    shown = tuple(each for each in gaps if each is not None)
    return Card(recommended, lowest, tuple(best), shown, to_base, margin, tuple(facts))


def _best_fact(
    best: Sequence[Setting], by_cost: Sequence[Setting], names: SettingNames
) -> list[Fact]:
    """Settings among which the best one is with 95 % confidence."""
    if len(by_cost) < 2 or not best:
        return []
    one_seed = max(len(setting.runs) for setting in by_cost) == 1
    scope = ", for these trainings" if one_seed else ""
    if len(best) == len(by_cost):
        text = f"any of the {len(best)} settings (95 % confidence{scope})."
    else:
        listed = "; ".join(map(names.of, best)) if len(best) < 5 else f"{len(best)} settings"
        only = "only " if len(best) == 1 else ""
        text = f"{only}{listed} (95 % confidence{scope})."
    return [Fact("May be the best", text, "settings")]


def interval_text(value: float, low: float, high: float, unit: str = " nats") -> str:
    """``+0.0235 nats (+0.0211 to +0.0259)``."""
    if not math.isfinite(low + high):
        return f"{value:+.4f}{unit} (no interval: too few groups of rows)"
    return f"{value:+.4f}{unit} ({low:+.4f} to {high:+.4f})"


def _why(
    recommended: Setting,
    lowest: Setting,
    given_up: Gap | None,
    settings: Sequence[Setting],
    names: SettingNames,
) -> str:
    value, metric = recommended.estimate().value, recommended.metric
    numbers = f"{metric.title.lower()} {value:.4f}"
    if metric.has_perplexity:
        numbers += f", perplexity {perplexity(value):.2f}"
    best = "highest" if metric.higher_is_better else "lowest"
    name = names.of(recommended)
    if len(settings) == 1:
        return f"{name} ({numbers}): the only setting trained."
    if given_up is None:
        return f"{name} ({numbers}): the {best} {metric.title.lower()} of {len(settings)} settings."
    return (
        f"{name} ({numbers}): the cheapest of {len(settings)} settings that is equivalent to the "
        f"one with "
        f"the {best} {metric.title.lower()}, {names.of(lowest)} (difference {given_up.text()})."
    )


def _gain(recommended: Setting, to_base: Gap, comparisons: Sequence[Comparison]) -> Fact:
    before = to_base.setting.estimate().value
    after = before - to_base.value
    verdict = _verdict_on_base(recommended, comparisons)
    if not recommended.metric.has_perplexity:
        difference = interval_text(-to_base.value, -to_base.high, -to_base.low, "")
        text = f"{before:.4f} → {after:.4f}, {difference}{verdict}."
        return Fact("Against the base", text, "comparisons")
    change = 100 * (perplexity(after - before) - 1)
    ends = sorted(100 * (perplexity(-end) - 1) for end in (to_base.low, to_base.high))
    span = (
        f" ({ends[0]:+.1f} to {ends[1]:+.1f} %)"
        if math.isfinite(to_base.low + to_base.high)
        else ""
    )
    text = (
        f"perplexity {perplexity(before):.2f} → {perplexity(after):.2f}, {change:+.1f} %{span}"
        f"{verdict}."
    )
    return Fact("Against the base", text, "comparisons")


def _verdict_on_base(recommended: Setting, comparisons: Sequence[Comparison]) -> str:
    for comparison in comparisons:
        if comparison.key == "base" and comparison.second.first_run is recommended.first_run:
            seeds = comparison.difference.units
            if comparison.verdict != "different":
                return f"; {comparison.verdict} (corrected p = {comparison.p_corrected:.3f})"
            direction = "lower" if comparison.difference.value < 0 else "higher"
            if not comparison.metric.is_better(comparison.difference.value):
                direction = direction.upper()
            return (
                f"; significantly {direction} across test rows and {seeds} "
                f"{comparison.difference.unit}s"
                if seeds > 1
                else f"; significantly {direction} across test rows (one seed)"
            )
    return ""
