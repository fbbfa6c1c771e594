"""Computed sentences on the experiment: its question, how numbers were computed, confounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slm_lora.config.axes import LEARNING_RATE
from slm_lora.config.types import METHOD_LABELS
from slm_lora.report.blocks import plain
from slm_lora.report.names import SettingNames, key_name, rate_name, value_name
from slm_lora.runs.metrics import Metric
from slm_lora.runs.scored_run import ScoredRun
from slm_lora.stats.comparisons import Comparison
from slm_lora.stats.estimates import estimate
from slm_lora.stats.power import failure_bound
from slm_lora.stats.settings import Setting, amount, shared_rows, usual_order, varied

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
    methods = f" ({_methods(settings)})" if settings and "adapter.kind" not in keys else ""
    factors = []
    compared = {pair.key: pair.tied for pair in comparisons if pair.key != "base"}
    adapters = [setting for setting in settings if not setting.is_full]
    tied_keys = {other for tied in compared.values() for other in tied}
    # A key that varies only along with others has no comparison of its own.
    alone = {key: () for key in varied(adapters) if key not in compared.keys() | tied_keys}
    for key, tied in {**compared, **(alone if compared else {})}.items():
        having = settings if key == "adapter.kind" else adapters or settings
        ordered = sorted(
            having,
            key=lambda setting: (amount(setting, key) or 0, usual_order(setting.setting(key))),
        )
        values = dict.fromkeys(_value(key, setting) for setting in ordered)
        factors.append(f"the {key_name(key, tied)} ({', '.join(values)})")
    if not factors:
        return f"What is {outcome}{methods}?"
    listed = " and ".join(filter(None, [", ".join(factors[:-1]), factors[-1]]))
    return f"How does {outcome} depend on {listed}?{methods}"


def _value(key: str, setting: Setting) -> str:
    value = setting.setting(key)
    return rate_name(float(value)) if key == LEARNING_RATE else value_name(value)


def untuned(comparisons: Sequence[Comparison]) -> str:
    """Where trainings are compared: learning rates were not tuned per setting.

    With lora_alpha = 2r the first step of Adam in the weights grows with the rank, so a larger rank
    learns faster at the same rate; more rows are more steps.
    """
    compared = [
        setting
        for pair in comparisons
        if pair.key not in ("base", LEARNING_RATE)
        for setting in (pair.first, pair.second)
    ]
    if not compared:
        return ""
    if LEARNING_RATE in compared[0].first_run.tuned:
        return (
            "Each setting is compared at its own learning rate, the lowest on the validation set: "
            "see [the learning rate of each setting](#tuning)."
        )
    rates = sorted({float(setting.setting(LEARNING_RATE)) for setting in compared})
    shown = (
        f"{rate_name(rates[0])} for all" if len(rates) == 1 else ", ".join(map(rate_name, rates))
    )
    return (
        f"Settings are compared at equal learning rates ({shown}), not each at its best one: at "
        "other rates these differences can shrink, vanish or reverse."
    )


def description(runs: Sequence[ScoredRun], comparisons: Sequence[Comparison]) -> str:
    """How numbers and intervals were computed, and what they cover."""
    first = runs[0]
    loss = estimate([first.scores], first.metric)
    counts = sorted({(pair.difference.units, pair.difference.unit) for pair in comparisons})
    several = [f"{count} {unit}s" for count, unit in counts if count > 1]
    covered = "95 % intervals are Student's, clustered by groups of related rows (CR2)."
    if not several:
        covered += (
            " They cover the choice of test rows, not the variation between seeds: verdicts hold "
            "for these trainings, not for their settings."
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
            f" If {least} trainings agree, up to {100 * failure_bound(least):.0f} % of all "
            "trainings may still go the other way (95 % confidence)."
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
        f"{_definition(first.metric)} computed on the same {len(first.scores)} test rows in "
        f"{loss.groups} groups of related rows (effective number: {loss.effective_groups:.0f}) for "
        f"every run. Differences are paired by row. {covered}{family} "
        f"Base weights in {first.run.record.model.precision}."
    )


def _definition(metric: Metric) -> str:
    if not metric.has_perplexity:
        return f"{metric.title} ({metric.unit}) is"
    scope = "the text" if metric.scope == "the whole text" else metric.scope
    return (
        f"Held-out loss is the total negative log-likelihood divided by the number of tokens of "
        f"{scope}; perplexity is its exponential. Both are"
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
    return f" Two draws of training rows share {span} % of their rows on average{part}."


def confounds(comparisons: Sequence[Comparison]) -> str:
    """What changes along with the compared settings."""
    by_key: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        by_key.setdefault(comparison.key, []).append(comparison)
    items = []
    if sizes := by_key.get("data.size"):
        same = all(_steps(pair.first) == _steps(pair.second) for pair in sizes)
        items.append(
            "Dataset sizes are compared at the same number of optimizer steps "
            f"({_steps(sizes[0].first)}), so smaller sets are repeated more often."
            if same
            else "More rows also mean more optimizer steps; the two effects are not separated "
            f"(steps: {_per_setting(sizes, _steps)})."
        )
    if ranks := by_key.get("adapter.r"):
        first = ranks[0].first
        ratio = first.setting("adapter.lora_alpha") / first.setting("adapter.r")
        if not ranks[0].tied:
            equal = "" if LEARNING_RATE in first.first_run.tuned else " and learning rate"
            items.append(f"Ranks are compared at the same alpha/r ({ratio:g}){equal}.")
        items.append(f"A larger rank trains more weights ({_weights(ranks)}).")
    if modules := by_key.get("adapter.target_modules"):
        items.append(f"More target modules also mean more trainable weights ({_weights(modules)}).")
    if kinds := by_key.get("adapter.kind", []):
        rate = float(kinds[0].first.setting(LEARNING_RATE))
        if LEARNING_RATE not in kinds[0].first.first_run.tuned:
            items.append(
                f"Methods are compared at the same learning rate ({rate_name(rate)}); each may "
                "have a better one."
                if LEARNING_RATE not in kinds[0].tied
                else "Each method is trained at one learning rate; other rates may be better."
            )
        compared = [setting for pair in kinds for setting in (pair.first, pair.second)]
        if len({setting.trainable_weights for setting in compared}) > 1:
            items.append(f"Methods train different numbers of weights ({_weights(kinds)}).")
    if any(pair.second.is_full for pair in kinds):
        precision = kinds[0].second.first_run.run.record.model.precision
        items.append(
            f"Full fine-tuning is saved and scored in {precision}, adapters in fp32 on a base in "
            f"{precision}: rounding may remove small weight changes of full fine-tuning."
        )
    items += [
        f"{_capital(' and '.join(map(key_name, (key, *tied))))} change together; their effects "
        "are not separated."
        for key, tied in {key: pairs[0].tied for key, pairs in by_key.items()}.items()
        if tied
    ]
    return "\n".join(f"- {item}" for item in items)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _steps(setting: Setting) -> int:
    return setting.first_run.run.record.trained.steps


def _weights(comparisons: Sequence[Comparison]) -> str:
    return _per_setting(comparisons, lambda setting: setting.trainable_weights)


def _per_setting(comparisons: Sequence[Comparison], count: Callable[[Setting], int]) -> str:
    settings = [setting for pair in comparisons for setting in (pair.first, pair.second)]
    names = SettingNames(settings)
    counts = {names.of(setting): count(setting) for setting in settings}
    return "; ".join(f"{name}: {number:,}" for name, number in counts.items())


def _methods(settings: Sequence[Setting]) -> str:
    return " or ".join(
        dict.fromkeys(METHOD_LABELS[setting.setting("adapter.kind")] for setting in settings)
    )
