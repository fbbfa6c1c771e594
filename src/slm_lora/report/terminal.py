"""The result on a terminal: the card and the table of settings, at most 100 columns wide."""

from __future__ import annotations

from typing import Literal

from rich.table import Table
from rich.text import Text

from slm_lora.report.analysis import Analysis
from slm_lora.report.summary import AGAINST, setting_columns, setting_rows

WIDTH = 100
LEAST_NAME = 24
"""Columns that the names of settings take at least."""


def card_table(analysis: Analysis) -> Table:
    """The lines of the card, their labels to the left."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0), width=None)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(max_width=WIDTH - 20, overflow="fold")
    for fact in analysis.card.facts:
        table.add_row(Text(fact.label), Text(fact.text))
    return table


def settings_table(analysis: Analysis, width: int) -> Table:
    """The settings over their seeds; columns that do not fit into ``width`` are left out, the
    least important first."""
    phase = analysis.tuned
    rows = setting_rows(
        analysis.card, analysis.settings, analysis.bases, analysis.names, phase, analysis.between
    )
    columns = setting_columns(phase, analysis.between)
    widths = [
        max(len(columns[index]), *(len(row[index]) for row in rows))
        for index in range(len(columns))
    ]
    kept = list(range(len(columns)))
    for name in ("Memory", "Seeds", "Time", "Trainable", AGAINST):
        if name == AGAINST:
            widths[0] = min(widths[0], LEAST_NAME)  # names fold before this one is left out
        if sum(widths[index] + 2 for index in kept) <= min(width, WIDTH):
            break
        kept.remove(columns.index(name))
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index in kept:
        justify: Literal["left", "right"] = "left" if index == 0 else "right"
        table.add_column(columns[index], justify=justify, no_wrap=index > 0, overflow="fold")
    for row in rows:
        recommended = "(recommended" in row[0]
        table.add_row(*(Text(row[index]) for index in kept), style="bold" if recommended else "")
    return table
