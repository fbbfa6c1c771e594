"""Which base: comparisons between base models, for the card and a section of their own."""

from __future__ import annotations

from collections.abc import Sequence

from slm_lora.report.blocks import Fact, Section
from slm_lora.report.card import interval_text
from slm_lora.report.names import SettingNames
from slm_lora.report.summary import comparisons_table
from slm_lora.stats.bases import BaseComparisons
from slm_lora.stats.comparisons import Comparison
from slm_lora.stats.settings import Setting


def base_facts(between: BaseComparisons, names: SettingNames) -> list[Fact]:
    """The setting of the lowest bits per byte, against the same setting on the other bases."""
    if between.best is None:
        text = f"not compared: {_unequal(between)}."
        return [Fact("Base model", text, "bases")]
    best = between.best
    title = between.metric.title.lower()
    text = f"{names.of(best)} has the lowest {title}, {best.estimate().value:.4f}"
    same = [
        _against(best, pair, names)
        for pair in between.comparisons
        if best.first_run in (pair.first.first_run, pair.second.first_run)
    ]
    same_text = "; ".join(same) or "no other base was trained with this setting"
    tokens = " Losses per token of different tokenizers do not compare."
    return [Fact("Base model", f"{text}; {same_text}.{tokens * _tokens_differ(between)}", "bases")]


def _against(best: Setting, pair: Comparison, names: SettingNames) -> str:
    is_second = pair.second.first_run is best.first_run
    other = pair.first if is_second else pair.second
    difference = pair.difference
    value, low, high = difference.value, difference.low, difference.high
    if is_second:  # shown as the other minus the best
        value, low, high = -value, -high, -low
    verdict = "significantly higher" if pair.verdict == "different" else "not significant"
    seeds = f", {difference.units} {difference.unit}s" if difference.units > 1 else ", one seed"
    return f"{names.of(other)}: {interval_text(value, low, high, '')}, {verdict}{seeds}"


def _tokens_differ(between: BaseComparisons) -> bool:
    runs = [run for setting in (*between.bases, *between.settings) for run in setting.runs]
    return len({run.run.record.data.held_out_sha256 for run in runs}) > 1


def _unequal(between: BaseComparisons) -> str:
    return f"the bases scored other bytes of each of the {between.left_out} test rows"


def base_section(between: BaseComparisons, names: SettingNames) -> Section:
    """Comparisons between bases in bits per byte, and in metrics of replies."""
    if not between.rows:
        return Section("Base models", f"{_unequal(between).capitalize()}.", anchor="bases")
    metric = between.metric
    parts = [
        f"{metric.title} over {metric.scope}, on the {between.rows} test rows of which all bases "
        f"scored the same bytes{_left_out(between)}; lower is better. p-values are corrected for "
        f"these {len(between.comparisons)} comparisons.",
        comparisons_table(between.comparisons, names),
        *(_in_metric(pairs, names) for pairs in between.other_metrics),
    ]
    return Section("Base models", "\n\n".join(parts), anchor="bases")


def _left_out(between: BaseComparisons) -> str:
    return f" ({between.left_out} left out)" if between.left_out else ""


def _in_metric(pairs: Sequence[Comparison], names: SettingNames) -> str:
    metric = pairs[0].metric
    better = "higher" if metric.higher_is_better else "lower"
    return (
        f"### {metric.title}\n\nOver {metric.scope}; {better} is better. p-values are corrected "
        f"for the {len(pairs)} comparisons in this metric.\n\n"
        f"{comparisons_table(pairs, names, level=4)}"
    )
