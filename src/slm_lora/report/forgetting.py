"""Drift and forgetting beside the gain: the section of the report, and its part of metrics.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slm_lora.report.blocks import Picture, Section, markdown_table, plain
from slm_lora.report.card import gap, interval_text
from slm_lora.report.figures import GainPoint, gain_against
from slm_lora.report.forgetting_facts import change_text, state_text
from slm_lora.report.names import SettingNames
from slm_lora.stats.forgetting import Change, changes
from slm_lora.stats.selection import cost
from slm_lora.stats.settings import Setting, base_of

MOST_PICTURES = 3
Measured = Sequence[tuple[Setting, list[Change]]]
"""Settings with what was measured of them, cheapest first."""


def forgetting_section(
    settings: Sequence[Setting], bases: Sequence[Setting], names: SettingNames
) -> list[Section]:
    """Drift and forgetting of every setting beside its gain; none where nothing was measured."""
    measured = [
        (setting, own) for setting in sorted(settings, key=cost) if (own := changes(setting))
    ]
    if not measured:
        return []
    # Settings of an interrupted measurement may lack some of these.
    columns = {change.metric.name: change for _, own in measured for change in own}
    tables = [_drift_table(measured, bases, names), _sets_table(measured, names)]
    text = "\n".join([*(table for table in tables if table), _note(columns)])
    pictures = [
        _picture(name, change, measured, bases, names)
        for name, change in list(columns.items())[:MOST_PICTURES]
    ]
    return [
        Section(
            "Drift and forgetting",
            text,
            tuple(picture for picture in pictures if picture is not None),
            anchor="forgetting",
            folded=True,
        )
    ]


def forgetting_records(settings: Sequence[Setting], names: SettingNames) -> list[dict[str, Any]]:
    """For metrics.json: one record per measured setting."""
    return [
        {
            "setting": names.of(setting),
            **{change.metric.name: change.record() for change in own},
        }
        for setting in settings
        if (own := changes(setting))
    ]


def _drift_table(measured: Measured, bases: Sequence[Setting], names: SettingNames) -> str:
    rows = [
        [plain(names.of(setting)), _gain_text(setting, bases), change_text(change)]
        for setting, own in measured
        for change in own
        if change.is_drift
    ]
    header = ["Setting", "Gain over the base (95 %)", "Drift from the base (95 %)"]
    return markdown_table(header, rows) if rows else ""


def _sets_table(measured: Measured, names: SettingNames) -> str:
    """One row per set and setting, so that any number of sets fits the page."""
    own_sets = [
        (change.name, names.of(setting), change)
        for setting, own in measured
        for change in own
        if not change.is_drift
    ]
    order = list(dict.fromkeys(name for name, _, _ in own_sets))
    rows = [
        [
            plain(name),
            plain(setting),
            f"{change.base_loss:.4f} → {change.loss:.4f}",
            change_text(change),
            state_text(change),
        ]
        for name, setting, change in sorted(own_sets, key=lambda own: order.index(own[0]))
    ]
    header = ["Set", "Setting", "Loss of base → tuned", "Forgetting (95 %)", "Verdict"]
    return markdown_table(header, rows, left=(0, 1, 4)) if rows else ""


def _gain_text(setting: Setting, bases: Sequence[Setting]) -> str:
    base = base_of(setting, bases)
    difference = gap(setting, base) if base else None
    if difference is None:
        return "–"
    return interval_text(difference.value, difference.low, difference.high, "")


def _note(columns: dict[str, Change]) -> str:
    parts = [
        "Nats per token, means over seeds. Gain: loss of the base minus loss, on the test rows."
    ]
    if any(change.is_drift for change in columns.values()):
        parts.append(
            "Drift: KL(base ‖ tuned) per token over the whole vocabulary, on replies sampled once "
            "from the base to general prompts in the training template; the base has 0."
        )
    if any(not change.is_drift for change in columns.values()):
        parts.append(
            "Forgetting: loss minus that of the base on the same rows of a further set. Less than "
            "the margin is shown if the whole interval lies below it, violated if it lies above."
        )
    parts.append("Intervals cover rows or prompts and seeds, for one setting and set at a time.")
    return " ".join(parts)


def _picture(
    name: str,
    column: Change,
    measured: Measured,
    bases: Sequence[Setting],
    names: SettingNames,
) -> Picture | None:
    points = []
    for setting, own in measured:
        change = next((change for change in own if change.metric.name == name), None)
        base = base_of(setting, bases)
        gain = gap(setting, base) if base else None
        if change is not None and gain is not None:
            points.append(
                GainPoint(
                    names.of(setting),
                    (change.value, change.low, change.high),
                    (gain.value, gain.low, gain.high),
                )
            )
    if not points:
        return None
    label = "drift from the base" if column.is_drift else f"forgetting of {column.name}"
    return gain_against(f"gain-{name.replace(':', '-')}", label, points, column.margin)
