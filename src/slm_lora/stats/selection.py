"""Choosing among settings without being fooled by the choice.

The lowest of several measured losses is lower than the true loss behind it. Two statements survive
that: the *best set* (multiple comparisons with the best, Hsu 1981) holds every setting that is not
significantly worse than another, and so the truly best one with 95 % confidence; and an interval at
a level divided by the number of settings holds for whichever is chosen (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Sequence

from slm_lora.stats.comparisons import ALPHA
from slm_lora.stats.inference import interval, p_below, p_equivalence
from slm_lora.stats.settings import Setting, pair_runs, sample_of


def best_set(settings: Sequence[Setting]) -> list[Setting]:
    """Settings that are not significantly worse than any other, in the given order.

    A setting is out if another is better at one-sided 5 % / (settings - 1): the truly best one is
    out with a chance of at most 5 %.
    """
    return [
        setting
        for setting in settings
        if not any(
            _p_worse(setting, other) < ALPHA / (len(settings) - 1)
            for other in settings
            if other is not setting
        )
    ]


def _p_worse(setting: Setting, other: Setting) -> float:
    """One-sided p of ``setting`` being as good as ``other``; 1 without a common seed."""
    pairs = pair_runs(other, setting)
    if not pairs:
        return 1.0
    sample = sample_of(pairs, setting.metric)
    return p_below(sample, setting.metric.cost(sample.value))


def equivalent_to(reference: Setting, other: Setting, margin: float, candidates: int) -> bool:
    """Whether a setting is within the margin of another, tested beside other candidates."""
    pairs = pair_runs(reference, other)
    if len(pairs) < len(reference.runs):
        return False
    sample = sample_of(pairs, reference.metric)
    return p_equivalence(sample, margin) < ALPHA / max(1, candidates)


def selected_interval(reference: Setting, chosen: Setting, candidates: int) -> tuple[float, float]:
    """95 % interval of chosen minus reference, whichever of the candidates was chosen."""
    sample = sample_of(pair_runs(reference, chosen), reference.metric)
    return interval(sample, 1 - ALPHA / max(1, candidates))


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
