"""Tables over seeds: settings, comparisons, categories."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from slm_lora.report.blocks import markdown_table, plain
from slm_lora.report.card import Card, Gap, gap, interval_text
from slm_lora.report.names import SettingNames, key_name
from slm_lora.report.sentences import p_text, short_verdict
from slm_lora.report.tables import loss_shown
from slm_lora.report.tuning import Tuned, value_text
from slm_lora.runs.metrics import METRICS, Metric, mean_over_rows
from slm_lora.runs.scored_run import has_metric
from slm_lora.runtime.progress import clock
from slm_lora.stats.bases import BaseComparisons, base_model
from slm_lora.stats.comparisons import Comparison
from slm_lora.stats.estimates import perplexity
from slm_lora.stats.factorial import Contrast
from slm_lora.stats.selection import cost
from slm_lora.stats.settings import Setting, base_of

AGAINST = "Against the recommended, 95 %"


def setting_columns(
    phase: Tuned | None = None, between: BaseComparisons | None = None
) -> list[str]:
    """Titles of the table of settings; each tuned key has a column, bits per byte have one where
    there are several bases."""
    own = [key_name(key).capitalize() for key in phase.record.keys] if phase else []
    losses = ["Loss", "Perplexity", *([between.metric.title] if between else [])]
    return ["Setting", *own, "Seeds", *losses, AGAINST, "Trainable", "Time", "Memory"]


def setting_rows(
    card: Card,
    settings: Sequence[Setting],
    bases: Sequence[Setting],
    names: SettingNames,
    phase: Tuned | None = None,
    between: BaseComparisons | None = None,
) -> list[list[str]]:
    """Literal cells under `setting_columns`: each base, then its settings, cheapest first."""
    differences = (*card.gaps, *([card.base] if card.base else []))
    gaps = {id(difference.setting): difference for difference in differences}
    keys = phase.record.keys if phase else ()
    per_byte = _per_byte(between) if between else None
    models = list(dict.fromkeys(base_model(each.first_run) for each in (*bases, *settings)))
    rows = []
    for setting in sorted(
        (*bases, *settings),
        key=lambda each: (
            models.index(base_model(each.first_run)),
            not each.first_run.is_base,
            () if each.first_run.is_base else cost(each),
        ),
    ):
        marks = [
            word
            for word, marked in (("recommended", card.recommended), ("lowest", card.lowest))
            if setting is marked
        ]
        mark = f" ({', '.join(marks)})" if marks and len(settings) > 1 else ""
        bits = per_byte.get(setting.first_run.run.folder.name) if per_byte is not None else None
        shown = [] if per_byte is None else ["–" if bits is None else f"{bits:.4f}"]
        rows.append(_setting_row(setting, gaps.get(id(setting)), names, mark, keys, shown))
    return rows


def _per_byte(between: BaseComparisons) -> dict[str, float]:
    """Bits per byte of settings, by the folder of their first run."""
    return {
        setting.first_run.run.folder.name: setting.estimate().value
        for setting in (*between.bases, *between.settings)
    }


def _setting_row(
    setting: Setting,
    difference: Gap | None,
    names: SettingNames,
    mark: str,
    tuned: Sequence[str],
    per_byte: Sequence[str],
) -> list[str]:
    value = setting.estimate().value
    exponential = f"{perplexity(value):.2f}" if setting.metric.has_perplexity else "–"
    own = [value_text(key, float(setting.setting(key))) for key in tuned]
    start = [names.of(setting) + mark, *own, f"{len(setting.runs)}"]
    numbers = [f"{value:.4f}", exponential, *per_byte, _gap_cell(difference)]
    if setting.first_run.is_base:
        return [start[0], *["–"] * len(own), "–", *numbers, "–", "–", "–"]
    records = [run.run.record for run in setting.runs]
    seconds = sum(record.trained.seconds for record in records) / len(records)
    peak = max(record.trained.peak_memory_bytes for record in records)
    trainable = records[0].saved.trainable_parameters
    return [*start, *numbers, count_text(trainable), clock(seconds), f"{peak / 1e9:.1f} GB"]


def _gap_cell(difference: Gap | None) -> str:
    if difference is None:
        return "–"
    if not math.isfinite(difference.low + difference.high):
        return f"{difference.value:+.4f}"
    if difference.low == difference.high:  # no spread to estimate an error from
        return f"{difference.value:+.4f} (the same in all rows)"
    return f"{difference.value:+.4f} ({difference.low:+.4f}, {difference.high:+.4f})"


def count_text(count: int) -> str:
    """``921,600`` as ``0.92 M``."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} B"
    return f"{count / 1e6:.2f} M" if count >= 1e4 else f"{count}"


def settings_table(
    card: Card,
    settings: Sequence[Setting],
    bases: Sequence[Setting],
    names: SettingNames,
    phase: Tuned | None = None,
    between: BaseComparisons | None = None,
) -> str:
    """One row per setting, over its seeds, as Markdown; the recommended one in bold."""
    rows = []
    for row in setting_rows(card, settings, bases, names, phase, between):
        cells = [plain(row[0]), *row[1:]]
        recommended = card.recommended is not None and row[0].startswith(
            names.of(card.recommended) + " ("
        )
        rows.append([f"**{cell}**" if recommended else cell for cell in cells])
    return markdown_table(setting_columns(phase, between), rows)


def comparisons_table(
    comparisons: Sequence[Comparison], names: SettingNames, level: int = 3
) -> str:
    """One row per comparison, as Markdown; a table for the base and for each key."""
    parts = []
    for key in dict.fromkeys(pair.key for pair in comparisons):
        pairs = [pair for pair in comparisons if pair.key == key]
        heading = (
            "Against the base" if key == "base" else f"Effect of {key_name(key, pairs[0].tied)}"
        )
        metric = pairs[0].metric
        shows_perplexity = key == "base" and metric.has_perplexity
        rows = [
            [
                plain(f"{names.of(pair.second)} vs {names.of(pair.first)}"),
                _gap_text(pair),
                *([_perplexity_change(pair)] if shows_perplexity else []),
                _by_unit(pair),
                _next_unit(pair),
                p_text(pair).removeprefix("p = ").removeprefix("p "),
                short_verdict(pair),
            ]
            for pair in pairs
        ]
        header = [
            "First minus second", f"{metric.title} difference, {metric.unit} (95 %)",
            *(["Perplexity"] if shows_perplexity else []), "By seed",
            "Next seed (95 %)", "p, corrected", "Verdict",
        ]  # fmt: skip
        table = markdown_table(header, rows, left=(0, len(header) - 1))
        parts.append(f"{'#' * level} {heading}\n\n{table}")
    return "\n".join(parts) or "No comparisons: one setting, and no base."


def _gap_text(pair: Comparison) -> str:
    difference = pair.difference
    if not math.isfinite(difference.low + difference.high):
        return f"{difference.value:+.4f}"
    if difference.low == difference.high:  # no spread to estimate an error from
        return f"{difference.value:+.4f} (the same in all rows)"
    return f"{difference.value:+.4f} ({difference.low:+.4f}, {difference.high:+.4f})"


def _by_unit(pair: Comparison) -> str:
    difference = pair.difference
    if difference.units == 1:
        return "one seed"
    draws = "" if difference.unit == "seed" else " (by draw)"
    return f"{difference.smallest:+.3f} to {difference.largest:+.3f}{draws}"


def _next_unit(pair: Comparison) -> str:
    difference = pair.difference
    if difference.next_low is None or difference.next_high is None:
        return "–"
    return f"{difference.next_low:+.3f} to {difference.next_high:+.3f}"


def contrasts_table(contrasts: Sequence[Contrast], names: SettingNames) -> str:
    """Ends of axes, main effects and interactions, one row each, as Markdown."""
    rows = []
    for contrast in contrasts:
        difference = contrast.difference
        span = interval_text(difference.value, difference.low, difference.high, "")
        verdict = "significant" if contrast.significant else "not significant"
        p = contrast.p_corrected
        shown = "< 0.001" if p < 0.001 else f"{p:.3f}"
        rows.append([plain(contrast_text(contrast, names)), span, shown, verdict])
    return markdown_table(
        ["Contrast", "Loss difference, nats (95 %)", "p, corrected", "Verdict"], rows, left=(0, 3)
    )


def contrast_text(contrast: Contrast, names: SettingNames) -> str:
    """``r=16 vs r=4``, over what it is averaged or along what it changes."""

    def part(setting: Setting, key: str) -> str:
        return names.part(key, setting)

    effect = f"{part(contrast.high, contrast.key)} vs {part(contrast.low, contrast.key)}"
    if contrast.kind == "ends":
        rest = names.series(contrast.key, contrast.low)
        return f"{effect} ({rest})" if rest != "all settings" else effect
    if contrast.kind == "main effect":
        return f"{effect}, mean over {len(contrast.over)} settings of the others"
    assert contrast.by_low is not None
    assert contrast.by_high is not None
    return (
        f"{effect}: at {part(contrast.by_high, contrast.by)} minus at "
        f"{part(contrast.by_low, contrast.by)}"
    )


def doubling_tables(comparisons: Sequence[Comparison], names: SettingNames) -> str:
    """Differences per doubling of training rows and of trainable weights, as Markdown; empty where
    no two settings differ in one of these alone."""
    parts = []
    for title, keys in (
        ("Training rows", ("data.size",)),
        ("Trainable weights", ("adapter.r", "adapter.target_modules")),
    ):
        rows = []
        for pair in comparisons:
            compared = (pair.first, pair.second)
            amounts = [setting.training_rows for setting in compared]
            if title == "Trainable weights" and pair.key in keys:
                amounts = [setting.trainable_weights for setting in compared]
            # Sizes may round to the same rows.
            if pair.tied or pair.key not in keys or amounts[0] == amounts[1]:
                continue
            doublings = math.log2(amounts[1] / amounts[0])
            difference = pair.difference
            low, high = sorted((difference.low / doublings, difference.high / doublings))
            rows.append(
                [
                    plain(f"{names.of(pair.first)} → {names.of(pair.second)}"),
                    f"{amounts[0]:,} → {amounts[1]:,}",
                    _gap_text(pair),
                    interval_text(difference.value / doublings, low, high, ""),
                    _is_significant(pair),
                ]
            )
        if rows:
            unit = comparisons[0].metric.unit
            header = ["Settings", title, f"Difference, {unit} (95 %)", "Per doubling"]
            table = markdown_table([*header, "Significant"], rows, left=(0, 4))
            parts.append(f"### {title}\n\n{table}")
    return "\n".join(parts)


def _is_significant(pair: Comparison) -> str:
    if pair.verdict != "different":
        return "no"
    return "yes" if pair.covers_seeds else "yes (one seed)"


def _perplexity_change(pair: Comparison) -> str:
    # exp of a difference of losses is the ratio of perplexities.
    return f"{100 * (perplexity(pair.difference.value) - 1):+.1f} %"


def metrics_table(
    card: Card, settings: Sequence[Setting], bases: Sequence[Setting], names: SettingNames
) -> str:
    """Every metric of every setting, as Markdown, and the paired difference of the recommended
    setting to the base; metrics that some run lacks are left out. Empty where the headline is the
    only one."""
    columns = [*bases, *sorted(settings, key=cost)]
    metrics = [
        metric for metric in METRICS.values() if all(_has(metric, setting) for setting in columns)
    ]
    metrics += [mean_over_rows(metric) for metric in metrics if metric.has_perplexity]
    if len(metrics) < 2:
        return ""
    rows = [
        [
            plain(names.of(setting)),
            *(f"{setting.estimate(metric).value:.4f}" for metric in metrics),
        ]
        for setting in columns
    ]
    base = base_of(card.recommended, bases) if card.recommended else None
    if base and card.recommended:
        gaps = [gap(base, card.recommended, metric) for metric in metrics]
        label = plain(f"{names.of(card.recommended)} vs {names.of(base)}")
        rows.append([label, *map(_gap_cell, gaps)])
    titles = [
        f"{metric.title}, {metric.unit} {'↑' if metric.higher_is_better else '↓'}"
        for metric in metrics
    ]
    return markdown_table(["Setting", *titles], rows)


def _has(metric: Metric, setting: Setting) -> bool:
    """Whether the rows of a setting's runs have a metric."""
    return all(has_metric(run, metric) for run in setting.runs)


MOST_INTERVALS = 6
"""Columns of numbers with intervals that fit on a page."""


def category_table(
    settings: Sequence[Setting], bases: Sequence[Setting], names: SettingNames
) -> str:
    """Losses by category of rows, as Markdown, with intervals where the table stays narrow; empty
    where rows have no categories."""
    columns = [*bases, *settings]
    categories = category_names(columns[0])
    if not categories:
        return ""
    scores = columns[0].first_run.scores
    narrow = len(columns) <= MOST_INTERVALS
    rows = []
    for category in categories:
        count = sum(score.category == category for score in scores)
        within = [setting.within(category) for setting in columns]
        losses = [loss_shown(loss, 3) if narrow else f"{loss.value:.3f}" for loss in within]
        rows.append([plain(category), f"{count}", *losses])
    return markdown_table(["Category", "Rows", *map(names.of, columns)], rows)


def category_names(setting: Setting) -> list[str]:
    """The thirty largest categories of the scored rows by name; none if there is but one."""
    counts = Counter(score.category for score in setting.first_run.scores if score.tokens_response)
    del counts[""]
    return sorted(name for name, _ in counts.most_common(30)) if len(counts) > 1 else []
