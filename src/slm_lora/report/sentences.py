"""Computed sentences on comparisons: number, interval, p, verdict, scaling.

Every sentence follows from a comparison and claims no more than its verdict: with one seed nothing
about settings, only about these trainings.
"""

from __future__ import annotations

from slm_lora.report.card import interval_text
from slm_lora.report.names import SettingNames
from slm_lora.runs.metrics import Metric
from slm_lora.stats.comparisons import ALPHA, Comparison
from slm_lora.stats.inference import LEAST_GROUPS, Difference
from slm_lora.stats.learning_curve import LearningCurve


def difference_text(difference: Difference) -> str:
    """``-0.0584 nats (-0.0625 to -0.0544)``."""
    return interval_text(difference.value, difference.low, difference.high)


def p_text(comparison: Comparison) -> str:
    """The corrected p."""
    p = comparison.p_corrected
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.{4 if p < 0.01 else 3}f}"


def sentence(comparison: Comparison, names: SettingNames | None = None) -> str:
    """One comparison between two settings: number, interval, p, verdict."""
    first, second = (
        names.of(setting) if names else setting.name
        for setting in (comparison.first, comparison.second)
    )
    return (
        f"{second} vs {first}: {difference_text(comparison.difference)}, {p_text(comparison)}. "
        f"{verdict_text(comparison)}"
    )


def verdict_text(comparison: Comparison) -> str:
    """The verdict with its reason, one sentence or two."""
    difference = comparison.difference
    if comparison.verdict == "different":
        direction = "lower" if difference.value < 0 else "higher"
        small = (
            f" Below the equivalence margin of {difference.margin:g} nats."
            if comparison.negligible
            else ""
        )
        return f"Significantly {direction}{_scope(comparison)}.{small}{_added_text(comparison)}"
    if comparison.verdict == "equivalent":
        scope = (
            ""
            if comparison.covers_seeds
            else f" for {_trainings(comparison)}; other seeds are untested"
        )
        return f"Equivalent within ±{difference.margin:g} nats{scope}.{_added_text(comparison)}"
    return f"Inconclusive: {_reason(comparison)}{_needed_text(comparison)}{_added_text(comparison)}"


def short_verdict(comparison: Comparison) -> str:
    """The verdict for a table that shows interval and p beside it."""
    difference = comparison.difference
    count, unit = difference.units, difference.unit
    plural = f"{unit}s" if count > 1 else unit
    scope = f"{count} {plural}" if comparison.covers_seeds else "one seed"
    if comparison.verdict == "inconclusive":
        return verdict_text(comparison)
    if comparison.verdict == "equivalent":
        text = f"Equivalent within ±{difference.margin:g} ({scope})."
    else:
        direction = "Lower" if difference.value < 0 else "Higher"
        if comparison.covers_seeds:
            scope = f"in {difference.agreeing} of {count} {plural}"
        small = f", below the margin of {difference.margin:g}" if comparison.negligible else ""
        text = f"{direction} ({scope}){small}."
    return text + _added_text(comparison)


def _scope(comparison: Comparison) -> str:
    difference = comparison.difference
    if not comparison.covers_seeds:
        return f" across test rows for {_trainings(comparison)}; other seeds are untested"
    count, unit = difference.units, f"{difference.unit}s"
    if difference.agreeing == count:
        return f" across test rows and {count} {unit}, in each of them"
    opposite = count - difference.agreeing
    return f" across test rows and {count} {unit} on average, but not in {opposite} of them"


def _added_text(comparison: Comparison) -> str:
    if not comparison.added:
        return ""
    return (
        f" {comparison.added} of {comparison.difference.units} {comparison.difference.unit}s were "
        "added after the first report."
    )


def _reason(comparison: Comparison) -> str:
    difference = comparison.difference
    family = comparison.family
    correction = f" after correction for {family} comparisons" if family > 1 else ""
    if difference.excludes_zero:
        return f"p = {comparison.p_corrected:.2f}{correction}"
    if difference.groups < LEAST_GROUPS:
        return f"equivalence takes {LEAST_GROUPS} groups of test rows"
    if not difference.margin:
        return "the interval includes zero"
    if difference.p_equivalence < ALPHA:
        return f"equivalence has p = {comparison.p_equivalence_corrected:.2f}{correction}"
    return "the interval includes zero and extends beyond the equivalence margin"


def _trainings(comparison: Comparison) -> str:
    return "this training" if comparison.key == "base" else "this pair of trainings"


def _unit(metric: Metric) -> str:
    return "nats" if metric.has_perplexity else metric.unit


def _needed_text(comparison: Comparison) -> str:
    difference = comparison.difference
    if difference.groups < LEAST_GROUPS or not difference.margin or difference.unit != "seed":
        return "."
    margin = f"{comparison.difference.margin:g} {_unit(comparison.metric)}"
    needed = comparison.needed()
    if needed is None:
        return f"; no practical number of seeds would decide it at ±{margin}."
    if needed.seeds is None:
        return (
            f"; about {needed.rows:,} test rows would decide it at ±{margin} for "
            f"{_trainings(comparison)} (80 % power). A verdict on the settings needs several "
            "seeds."
        )
    return (
        f"; a new experiment with about {needed.rows:,} test rows and {needed.seeds} seeds would "
        f"decide it at ±{margin} (80 % power)."
    )


def curve_text(curve: LearningCurve) -> str:
    """The fit of a learning curve, or its rejection."""
    if not curve.falls:
        return f"{curve.name}: loss does not fall with dataset size ({len(curve.sizes)} sizes)."
    floor, exponent = curve.floor, curve.exponent
    covers = "test rows and seeds" if curve.seeds > 1 else "test rows, not seeds"
    if not curve.fits:
        residual, size = max(
            zip(curve.residuals, curve.sizes, strict=True), key=lambda point: abs(point[0])
        )
        return (
            f"{curve.name}: the curve E + A·N^(−β) (N training rows) is rejected for these "
            f"{len(curve.sizes)} sizes (p = {curve.p_fits:.3f}, covers {covers}): the largest "
            f"residual is {residual:+.4f} nats at N = {size:,}. No extrapolation."
        )
    return (
        f"{curve.name}: E + A·N^(−β) through {len(curve.sizes)} sizes has β = {exponent[0]:.2f} "
        f"({exponent[1]:.2f} to {exponent[2]:.2f}) and E = {floor[0]:.3f} ({floor[1]:.3f} to "
        f"{floor[2]:.3f}); extrapolated to {2 * curve.sizes[-1]:,} training rows: "
        f"{curve.middle[-1]:.4f} ({curve.low[-1]:.4f} to {curve.high[-1]:.4f}). The intervals "
        f"cover {covers}, not the choice of this functional form (lack-of-fit test: "
        f"p = {curve.p_fits:.2f})."
    )
