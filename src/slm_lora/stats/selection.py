"""Choosing among settings without being fooled by the choice.

The lowest of several measured losses is lower than the true loss behind it. Two statements survive
that: the *best set* (multiple comparisons with the best, Hsu 1981) holds the truly best one with
95 % confidence; and an interval at a level divided by the number of settings holds for whichever is
chosen (Bonferroni). That a setting is not in the set is no verdict on it: of equal settings some
are left out by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slm_lora.stats.comparisons import ALPHA
from slm_lora.stats.inference import difference
from slm_lora.stats.selection_regret import at_own_best, own_best_interval, p_worse
from slm_lora.stats.settings import Setting, common_draws, draw_of, pair_runs, sample_of


def best_set(settings: Sequence[Setting]) -> list[Setting]:
    """Settings among which the truly best one is with 95 % confidence, in the given order."""

    def p_worse(index: int, other: int) -> float:
        return _p_worse(settings[index], settings[other])

    return [settings[index] for index in best_members(len(settings), p_worse)]


def best_members(count: int, p_worse: Callable[[int, int], float]) -> list[int]:
    """Members that no other beats at one-sided 5 % / (count - 1).

    The truly best one is left out with a chance of at most 5 %, as one of ``count - 1`` tests that
    it is beaten would have to err.

    Args:
        count: number of members.
        p_worse: one-sided p of the first member being at least as good as the second.
    """
    return [
        index
        for index in range(count)
        if not any(
            p_worse(index, other) < ALPHA / (count - 1) for other in range(count) if other != index
        )
    ]


def _p_worse(setting: Setting, other: Setting) -> float:
    """One-sided p of ``setting`` being as good as ``other``; 1 without enough common seeds."""
    pairs = pair_runs(other, setting)
    if not pairs:
        return 1.0
    sample = sample_of(pairs, setting.metric)
    if sample.units == 1 and max(len(setting.runs), len(other.runs)) > 1:
        return 1.0  # rows alone
    return p_worse(sample, other.regret, setting.regret)


def lowest_of(settings: Sequence[Setting]) -> Setting:
    """The setting of the lowest cost in the metric, by the seeds that all have, if there are any;
    the first of equal ones."""
    shared = common_draws(settings)

    def value(setting: Setting) -> float:
        runs = tuple(run for run in setting.runs if draw_of(run) in shared) or setting.runs
        return setting.metric.cost(Setting(runs).estimate().value)

    return min(settings, key=value)


def selected_confidence(candidates: int) -> float:
    """Confidence of an interval that holds with 95 % whichever candidate is chosen."""
    return 1 - ALPHA / max(1, candidates)


def equivalent_to(reference: Setting, other: Setting, margin: float, candidates: int) -> bool:
    """Whether a setting is within the margin of another, tested beside other candidates."""
    pairs = pair_runs(reference, other)
    if len(pairs) < len(reference.runs):
        return False
    sample = sample_of(pairs, reference.metric)
    tested = at_own_best(difference(sample, margin), sample, reference.regret, other.regret)
    return tested.p_equivalence < ALPHA / max(1, candidates)


def selected_interval(reference: Setting, chosen: Setting, candidates: int) -> tuple[float, float]:
    """95 % interval of chosen minus reference, whichever of the candidates was chosen."""
    sample = sample_of(pair_runs(reference, chosen), reference.metric)
    confidence = selected_confidence(candidates)
    return own_best_interval(sample, confidence, reference.regret, chosen.regret)


def cost(setting: Setting) -> tuple[float, float]:
    """Order of settings by cost: tokens computed in training, then weights trained.

    Seconds are measured, and depend on what else the machine did.
    """
    records = [run.run.record for run in setting.runs]
    tokens = sum(record.trained.tokens for record in records) / len(records)
    return tokens, records[0].saved.trainable_parameters


def pareto_set(settings: Sequence[Setting]) -> list[Setting]:
    """Settings that no other beats in loss, training tokens and trained weights at once, cheapest
    first; by the measured means."""

    def position(setting: Setting) -> tuple[float, ...]:
        return (setting.metric.cost(setting.estimate().value), *cost(setting))

    def beaten(setting: Setting) -> bool:
        own = position(setting)
        others = [position(other) for other in settings if other is not setting]
        return any(
            all(a <= b for a, b in zip(other, own, strict=True)) and other != own
            for other in others
        )

    return sorted((setting for setting in settings if not beaten(setting)), key=cost)
