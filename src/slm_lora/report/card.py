"""The result in a few lines: which setting to use, what it gains, and what is not known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slm_lora.report.names import SettingNames, key_name, rate_name
from slm_lora.runs.metrics import Metric
from slm_lora.stats.comparisons import Comparison
from slm_lora.stats.estimates import perplexity
from slm_lora.stats.inference import interval
from slm_lora.stats.selection import best_set, cost, equivalent_to, selected_interval
from slm_lora.stats.settings import (
    Setting,
    amount,
    pair_runs,
    sample_of,
    series_along,
    varied,
)

FEW_STEPS = 100
"""Fewer optimizer steps are pointed out."""
STILL_FALLING = 0.02
"""Relative fall of the training loss from the fourth to the last fifth of the steps that is
pointed out."""

RATE = "training.learning_rate"


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
class Fact:
    """One line of the card.

    Attributes:
        label: what it is about.
        text: literal text.
        anchor: of the section that holds the evidence.
    """

    label: str
    text: str
    anchor: str


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
    return Gap(other, sample.value, *interval(sample, 0.95), len(pairs))


def make_card(
    settings: Sequence[Setting],
    base: Setting | None,
    comparisons: Sequence[Comparison],
    margin: float,
    names: SettingNames,
) -> Card:
    """The recommended setting: the cheapest one that is equivalent to the one of the lowest loss.

    Args:
        settings: trained on one base.
        base: that base.
        comparisons: of the experiment.
        margin: of equivalence, nats per token.
        names: of the settings.
    """
    if not settings:
        return Card(None, None, (), (), None, margin, ())
    by_cost = sorted(settings, key=cost)
    lowest = min(by_cost, key=lambda setting: setting.metric.cost(setting.estimate().value))
    cheaper = by_cost[: by_cost.index(lowest)]
    recommended = next(
        (other for other in cheaper if equivalent_to(lowest, other, margin, len(settings) - 1)),
        lowest,
    )
    given_up = None if recommended is lowest else gap(lowest, recommended)
    gaps = [gap(recommended, setting) for setting in by_cost if setting is not recommended]
    to_base = None
    if base:
        value = sample_of(pair_runs(recommended, base), recommended.metric).value
        span = selected_interval(recommended, base, len(settings))
        to_base = Gap(base, value, *span, len(recommended.runs))
    best = best_set(by_cost)
    facts = [
        Fact("Recommended", _why(recommended, lowest, given_up, settings, names), "settings"),
        *_best_fact(best, by_cost, names),
        *([_gain(recommended, to_base, comparisons)] if to_base else []),
        *_unknown(recommended, settings, comparisons, names),
    ]
    shown = tuple(each for each in gaps if each is not None)
    return Card(recommended, lowest, tuple(best), shown, to_base, margin, tuple(facts))


def _best_fact(
    best: Sequence[Setting], by_cost: Sequence[Setting], names: SettingNames
) -> list[Fact]:
    """Settings that may be the best one, and the Pareto set of loss and cost."""
    if len(by_cost) < 2:
        return []
    one_seed = max(len(setting.runs) for setting in by_cost) == 1
    scope = " (for these trainings)" if one_seed else ""
    if len(best) == 1:
        text = f"only {names.of(best[0])}: all others are significantly worse{scope}."
    elif len(best) == len(by_cost):
        text = f"all {len(best)} settings: none is significantly worse than another{scope}."
    else:
        listed = "; ".join(map(names.of, best)) if len(best) < 5 else f"{len(best)} settings"
        text = f"{listed}. The {len(by_cost) - len(best)} others are significantly worse{scope}."
    return [Fact("May be the best", text, "settings")]


def interval_text(value: float, low: float, high: float, unit: str = " nats") -> str:
    """``+0.0235 nats (+0.0211 to +0.0259)``."""
    if not math.isfinite(low):
        return f"{value:+.4f}{unit} (no interval from one group)"
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
    before, after = recommended.estimate().value + to_base.value, recommended.estimate().value
    verdict = _verdict_on_base(recommended, comparisons)
    if not recommended.metric.has_perplexity:
        difference = interval_text(-to_base.value, -to_base.high, -to_base.low, "")
        text = f"{before:.4f} → {after:.4f}, {difference}{verdict}."
        return Fact("Against the base", text, "comparisons")
    change = 100 * (perplexity(after - before) - 1)
    ends = sorted(100 * (perplexity(-end) - 1) for end in (to_base.low, to_base.high))
    span = f" ({ends[0]:+.1f} to {ends[1]:+.1f} %)" if math.isfinite(to_base.low) else ""
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


def _unknown(
    recommended: Setting,
    settings: Sequence[Setting],
    comparisons: Sequence[Comparison],
    names: SettingNames,
) -> list[Fact]:
    facts = [_seed_fact(settings), *_look_fact(comparisons), _rate_fact(recommended, settings)]
    facts += _edge_fact(recommended, settings)
    facts += _training_fact(settings, names)
    facts.append(_test_set_fact(recommended))
    return facts


def _seed_fact(settings: Sequence[Setting]) -> Fact:
    counts = sorted({len(setting.runs) for setting in settings})
    if counts[-1] == 1:
        text = (
            "one: differences are between these trainings and may not repeat with other seeds "
            "(to test: `seeds: [0, 1, 2]` in the recipe)."
        )
    else:
        number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        text = (
            f"{number}; up to {unseen_failures(counts[0])} of all seeds may still go the other way "
            "(95 % confidence)."
        )
    return Fact("Seeds", text, "method")


def unseen_failures(seeds: int) -> str:
    """Largest share of failing seeds that so many seeds without a failure leave possible, at 95 %
    confidence: 1 - 0.05^(1/n)."""
    return f"{100 * (1 - 0.05 ** (1 / seeds)):.0f} %"


def _look_fact(comparisons: Sequence[Comparison]) -> list[Fact]:
    added = [comparison for comparison in comparisons if comparison.added]
    if not added:
        return []
    text = (
        f"in {len(added)} of {len(comparisons)} comparisons seeds were added after the first "
        "report: false differences are more likely than 5 %."
    )
    return [Fact("Added seeds", text, "comparisons")]


def _rate_fact(recommended: Setting, settings: Sequence[Setting]) -> Fact:
    rates = sorted({float(setting.setting(RATE)) for setting in settings})
    tried = ", ".join(map(rate_name, rates))
    if len(settings) == 1:
        text = f"{tried}, not tuned."
    elif len(rates) == 1:
        text = (
            f"{tried} for all settings, not tuned: at other rates the order of the settings may "
            "change."
        )
    elif not series_along(RATE, settings):
        text = f"one per setting ({tried}), not tuned: the order may change at other rates."
    else:
        text = (
            f"{rate_name(float(recommended.setting(RATE)))}, selected from {tried} on the test "
            "rows, so its loss is optimistic."
        )
    return Fact("Learning rate", text, "method")


def _edge_fact(recommended: Setting, settings: Sequence[Setting]) -> list[Fact]:
    """Numbers of the recommended setting that are the largest or smallest tried."""
    adapters = [setting for setting in settings if not setting.is_full]
    if recommended.is_full or len(adapters) < 2:
        return []
    edges = []
    for key in varied(adapters):
        amounts = [amount(setting, key) for setting in adapters]
        own = amount(recommended, key)
        if own is None or None in amounts or key == "adapter.target_modules":
            continue
        for extreme, word in ((max, "largest"), (min, "smallest")):
            if own == extreme(number for number in amounts if number is not None):
                value = rate_name(own) if key == RATE else f"{own:g}"
                shown = f"{recommended.setting(key) or 'all'} rows" if key == "data.size" else value
                edges.append(f"{shown} is the {word} {key_name(key)} tried")
    if not edges:
        return []
    return [
        Fact("Edge of the grid", f"{'; '.join(edges)}: values beyond may be better.", "settings")
    ]


def _training_fact(settings: Sequence[Setting], names: SettingNames) -> list[Fact]:
    steps = {names.of(setting): setting.first_run.run.record.trained.steps for setting in settings}
    few = [name for name, count in steps.items() if count < FEW_STEPS]
    falling = [names.of(setting) for setting in settings if _still_falling(setting)]
    parts = []
    if few:
        counts = sorted({steps[name] for name in few})
        span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        parts.append(f"only {span} optimizer steps in {_listed(few, len(settings))}")
    if falling:
        parts.append(f"training loss still falling at the end in {_listed(falling, len(settings))}")
    if not parts:
        return []
    return [Fact("Training length", f"{'; '.join(parts)}: longer training may help.", "training")]


def _listed(names: Sequence[str], total: int) -> str:
    if len(names) == total:
        return "all settings" if total > 1 else "this setting"
    if len(names) > 2:
        return f"{len(names)} of {total} settings"
    return " and ".join(f"({name})" for name in names)


def _still_falling(setting: Setting) -> bool:
    losses = [step["loss"] for step in setting.first_run.run.steps()]
    fifth = len(losses) // 5
    if fifth < 4:
        return False
    before, last = losses[-2 * fifth : -fifth], losses[-fifth:]
    return bool(sum(last) < (1 - STILL_FALLING) * sum(before))


def _test_set_fact(recommended: Setting) -> Fact:
    run = recommended.first_run
    groups = recommended.estimate().groups
    few = (
        "; with fewer than 300 rows small differences are often inconclusive"
        if len(run.scores) < 300
        else ""
    )
    return Fact("Test set", f"{len(run.scores)} rows in {groups} groups{few}.", "setup")


def terminal_card(card: Card) -> list[tuple[str, str]]:
    """Label and text of every line, for a terminal."""
    return [(fact.label, fact.text) for fact in card.facts]
