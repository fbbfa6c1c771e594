"""Computed sentences: the question, the verdict on each comparison, and its limits.

Every sentence follows from a comparison and claims no more than its verdict: with one seed nothing
about settings, only about these trainings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from slm_lora.config.types import METHOD_LABELS
from slm_lora.report.blocks import plain
from slm_lora.report.card import RATE, interval_text, unseen_failures
from slm_lora.report.names import SettingNames, key_name, rate_name, value_name
from slm_lora.runs.scored_run import ScoredRun
from slm_lora.stats.comparisons import ALPHA, Comparison
from slm_lora.stats.estimates import estimate
from slm_lora.stats.inference import Difference
from slm_lora.stats.learning_curve import LearningCurve
from slm_lora.stats.settings import Setting, amount, shared_rows

MOST_SHARED = 0.2
"""Share of training rows that two draws may have in common without a remark."""


def question(
    runs: Sequence[ScoredRun], settings: Sequence[Setting], comparisons: Sequence[Comparison]
) -> str:
    """The question of the experiment, from what its comparisons vary."""
    model = plain(runs[0].run.record.model.name)
    data = plain(runs[0].run.record.data.origin.split(" ")[0])
    outcome = f"the held-out loss of {model} on {data}"
    keys = {pair.key for pair in comparisons}
    factors = [_methods(settings)] if settings and "adapter.kind" not in keys else []
    for key, tied in {pair.key: pair.tied for pair in comparisons if pair.key != "base"}.items():
        compared = [
            setting
            for pair in comparisons
            if pair.key == key
            for setting in (pair.first, pair.second)
        ]
        ordered = sorted(compared, key=lambda setting: amount(setting, key) or 0)
        values = dict.fromkeys(value_name(setting.setting(key)) for setting in ordered)
        factors.append(f"the {key_name(key, tied)} ({', '.join(values)})")
    if not factors:
        return f"What is {outcome}?"
    if len(factors) == 1:
        return f"How does {factors[0]} change {outcome}?"
    return f"How do {', '.join(factors[:-1])} and {factors[-1]} change {outcome}?"


def _methods(settings: Sequence[Setting]) -> str:
    return " or ".join(
        dict.fromkeys(METHOD_LABELS[setting.setting("adapter.kind")] for setting in settings)
    )


def untuned(comparisons: Sequence[Comparison]) -> str:
    """Where trainings are compared: learning rates were not tuned per setting.

    With lora_alpha = 2r the first step of Adam in the weights grows with the rank, so a larger rank
    learns faster at the same rate; more rows are more steps.
    """
    compared = [
        setting
        for pair in comparisons
        if pair.key not in ("base", RATE)
        for setting in (pair.first, pair.second)
    ]
    if not compared:
        return ""
    rates = sorted({float(setting.setting(RATE)) for setting in compared})
    shown = (
        f"{rate_name(rates[0])} for all" if len(rates) == 1 else ", ".join(map(rate_name, rates))
    )
    return (
        f"Learning rates were not tuned per setting ({shown}): at other rates these differences "
        "can shrink, vanish or reverse."
    )


def method(runs: Sequence[ScoredRun], comparisons: Sequence[Comparison]) -> str:
    """How numbers and intervals were computed, and what they cover."""
    first = runs[0]
    loss = estimate([first.scores], first.metric)
    tokens = {"all": "all tokens of the text", "response": "the tokens of the response"}
    counts = sorted({(pair.difference.units, pair.difference.unit) for pair in comparisons})
    several = [f"{count} {unit}s" for count, unit in counts if count > 1]
    covered = "95 % intervals are Student's, clustered by groups of related rows (CR2)."
    if not several:
        covered += (
            " They cover the choice of test rows; the variation between seeds is unknown with one "
            "seed, so no setting is called better than another."
        )
    else:
        if counts[0][0] < 2:
            covered += " With one seed they cover the choice of test rows only."
        covered += (
            f" With several trainings ({' or '.join(several)}) they cover rows and trainings: the "
            "wider of the interval over trainings and that over rows and trainings."
        )
        least = min(count for count, _ in counts if count > 1)
        covered += (
            f" {least} trainings that agree leave a failure in up to {unseen_failures(least)} of "
            "trainings possible (95 % confidence)."
        )
    if several:
        covered += _rows_text(runs)
    family = (
        f" p-values of no difference, and p-values of equivalence, are each corrected for all "
        f"{len(comparisons)} comparisons (Holm). Intervals are for one comparison at a time."
        if comparisons
        else ""
    )
    return (
        "Held-out loss is the total negative log-likelihood divided by the number of "
        f"{tokens[first.headline].removeprefix('all ').removeprefix('the ')}; perplexity is its "
        f"exponential. Both are computed on the same {len(first.scores)} test rows in "
        f"{loss.groups} groups (as sure as {loss.effective_groups:.0f} groups of equal size) for "
        f"every run. Differences are paired by row. {covered}{family} "
        f"Base weights in {first.run.record.model.precision}."
    )


def _rows_text(runs: Sequence[ScoredRun]) -> str:
    """Whether the draw of training rows is covered, and how much of it seeds have in common."""
    trained = [run for run in runs if not run.is_base]
    if len({run.resolved["data_seed"] for run in trained}) < 2:
        return " All seeds train on the same rows, so the choice of training rows is not covered."
    shares = sorted({round(shared_rows(run), 2) for run in trained})
    span = f"{100 * shares[0]:.0f}"
    if len(shares) > 1:
        span += f" to {100 * shares[-1]:.0f}"
    part = "" if shares[-1] <= MOST_SHARED else ", so their choice is covered only in part"
    return (
        " Each draw of training rows is random; two draws have "
        f"{span} % of their rows in common on average{part}."
    )


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
    many = f"{unit}s" if count > 1 else unit
    scope = f"{count} {many}" if comparison.covers_seeds else "one seed"
    if comparison.verdict == "inconclusive":
        return verdict_text(comparison)
    if comparison.verdict == "equivalent":
        text = f"Equivalent within ±{difference.margin:g} ({scope})."
    else:
        direction = "Lower" if difference.value < 0 else "Higher"
        if comparison.covers_seeds:
            scope = f"in {difference.agreeing} of {count} {many}"
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
        "added after a report had shown the others."
    )


def _reason(comparison: Comparison) -> str:
    difference = comparison.difference
    family = comparison.family
    correction = f" after correction for {family} comparisons" if family > 1 else ""
    if difference.excludes_zero:
        return f"p = {comparison.p_corrected:.2f}{correction}"
    if difference.p_equivalence < ALPHA:
        return f"equivalence has p = {comparison.p_equivalence_corrected:.2f}{correction}"
    return "the interval includes zero and exceeds the equivalence margin"


def _trainings(comparison: Comparison) -> str:
    return "this training" if comparison.key == "base" else "this pair of trainings"


def _needed_text(comparison: Comparison) -> str:
    if comparison.sample.groups < 2:
        return "."
    margin = f"{comparison.difference.margin:g} nats"
    needed = comparison.needed()
    if needed is None:
        return f"; no practical number of seeds would decide it at ±{margin}."
    if needed.seeds is None:
        return (
            f"; about {needed.rows:,} test rows would decide it at ±{margin} for "
            f"{_trainings(comparison)} (80 % power), several seeds for the settings."
        )
    return (
        f"; a new experiment with about {needed.rows:,} test rows and {needed.seeds} seeds would "
        f"decide it at ±{margin} (80 % power)."
    )


def confounds(comparisons: Sequence[Comparison]) -> str:
    """What changes along with the compared settings."""
    by_key: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        by_key.setdefault(comparison.key, []).append(comparison)
    items = []
    if sizes := by_key.get("data.size"):
        same = all(_steps(pair.first) == _steps(pair.second) for pair in sizes)
        items.append(
            f"Sizes are compared at the same number of optimizer steps ({_steps(sizes[0].first)}), "
            "so a smaller set is repeated more often."
            if same
            else "More rows also mean more optimizer steps; the two effects are not separated "
            f"(steps: {_per_setting(sizes, _steps)})."
        )
    if ranks := by_key.get("adapter.r"):
        first = ranks[0].first
        ratio = first.setting("adapter.lora_alpha") / first.setting("adapter.r")
        if not ranks[0].tied:
            items.append(f"Ranks are compared at the same alpha/r ({ratio:g}) and learning rate.")
        items.append(f"A larger rank trains more weights ({_weights(ranks)}).")
    if modules := by_key.get("adapter.target_modules"):
        items.append(f"More target modules are also more trainable weights ({_weights(modules)}).")
    if kinds := by_key.get("adapter.kind", []):
        rate = float(kinds[0].first.setting(RATE))
        items.append(
            f"Methods are compared at the same learning rate ({rate_name(rate)}); each may have a "
            "better one."
            if RATE not in kinds[0].tied
            else "Each method is compared at one learning rate; each may have a better one."
        )
        compared = [setting for pair in kinds for setting in (pair.first, pair.second)]
        if len({_trainable(setting) for setting in compared}) > 1:
            items.append(f"Methods train different numbers of weights ({_weights(kinds)}).")
    if any(pair.second.is_full for pair in kinds):
        precision = kinds[0].second.first_run.run.record.model.precision
        items.append(
            f"Full fine-tuning is saved and scored in {precision}, adapters in fp32 on a base in "
            f"{precision}: small changes of a weight may be lost to rounding."
        )
    items += [
        f"Settings with another {key_name(key)} also have another "
        f"{' and '.join(map(key_name, tied))}; the two effects are not separated."
        for key, tied in {key: pairs[0].tied for key, pairs in by_key.items()}.items()
        if tied
    ]
    return "\n".join(f"- {item}" for item in items)


def _steps(setting: Setting) -> int:
    return setting.first_run.run.record.trained.steps


def _trainable(setting: Setting) -> int:
    return setting.first_run.run.record.saved.trainable_parameters


def _weights(comparisons: Sequence[Comparison]) -> str:
    return _per_setting(comparisons, _trainable)


def _per_setting(comparisons: Sequence[Comparison], count: Callable[[Setting], int]) -> str:
    settings = [setting for pair in comparisons for setting in (pair.first, pair.second)]
    names = SettingNames(settings)
    counts = {names.of(setting): count(setting) for setting in settings}
    return "; ".join(f"{name}: {number:,}" for name, number in counts.items())


def scaling(
    comparisons: Sequence[Comparison], curves: Sequence[LearningCurve], names: SettingNames
) -> str:
    """Effect of doubling rank, rows and trainable weights, and the learning curves; empty where no
    two settings differ in one of these alone."""
    items = []
    to_base = {pair.second.name: pair.difference for pair in comparisons if pair.key == "base"}
    for pair in comparisons:
        difference = pair.difference
        if pair.tied:
            continue
        if pair.key == "data.size":
            rows = [setting.training_rows for setting in (pair.first, pair.second)]
            first = to_base.get(pair.first.name)
            if first is None or rows[0] == rows[1]:  # sizes may round to the same rows
                continue
            items.append(
                f"- {names.of(pair.second)}: the first {rows[0]} training rows change the loss by "
                f"{difference_text(first)}; {rows[1]} instead of {rows[0]} change it by "
                f"{difference_text(difference)}{_per_doubling(difference, rows)}."
                + _open_gain(pair)
            )
        elif pair.key in ("adapter.r", "adapter.target_modules"):
            weights = [_trainable(setting) for setting in (pair.first, pair.second)]
            if weights[0] != weights[1]:
                items.append(
                    f"- {names.of(pair.second)}: {weights[1] / weights[0]:.1f} times the trainable "
                    f"weights of {names.of(pair.first)}, for {difference_text(difference)}"
                    f"{_per_doubling(difference, weights)}." + _open_gain(pair)
                )
    items += [f"- {curve_text(curve)}" for curve in curves]
    return "\n".join(items)


def _per_doubling(difference: Difference, amounts: Sequence[float]) -> str:
    doublings = math.log2(amounts[1] / amounts[0])
    if abs(doublings - 1) < 0.005:  # 338 to 675 rows count as one
        return ", one doubling"
    ends = sorted((difference.low / doublings, difference.high / doublings))
    span = f" ({ends[0]:+.4f} to {ends[1]:+.4f})" if math.isfinite(ends[0]) else ""
    return f", {difference.value / doublings:+.4f}{span} per doubling"


def _open_gain(comparison: Comparison) -> str:
    if comparison.verdict == "different":
        return (
            "" if comparison.covers_seeds else " One pair of trainings; other seeds are untested."
        )
    return " Not significantly different from no gain."


def curve_text(curve: LearningCurve) -> str:
    """The fit of a learning curve, or its rejection."""
    if not curve.falls:
        return f"{curve.name}: over {len(curve.sizes)} sizes, loss does not fall with rows."
    floor, exponent = curve.floor, curve.exponent
    covers = "test rows and seeds" if curve.seeds > 1 else "test rows, not seeds"
    if not curve.fits:
        residual, size = max(
            zip(curve.residuals, curve.sizes, strict=True), key=lambda point: abs(point[0])
        )
        return (
            f"{curve.name}: E + A·N^(−β) does not fit these {len(curve.sizes)} sizes: the loss at "
            f"{size:,} training rows is {residual:+.4f} nats from the best such curve, more than "
            f"variation of {covers} explains (p = {curve.p_fits:.3f}). The fit is rejected, so "
            "nothing is extrapolated."
        )
    return (
        f"{curve.name}: E + A·N^(−β) through {len(curve.sizes)} sizes has β = {exponent[0]:.2f} "
        f"({exponent[1]:.2f} to {exponent[2]:.2f}) and E = {floor[0]:.3f} ({floor[1]:.3f} to "
        f"{floor[2]:.3f}); extrapolated to {2 * curve.sizes[-1]:,} training rows: "
        f"{curve.middle[-1]:.4f} ({curve.low[-1]:.4f} to {curve.high[-1]:.4f}). The intervals "
        f"cover {covers}, not the choice of this form. (Lack of fit: p = {curve.p_fits:.2f}.)"
    )
