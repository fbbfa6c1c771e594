"""Final output of the commands `experiment` and `report`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slm_lora.cli.options import console

if TYPE_CHECKING:
    from slm_lora.report.analysis import Analysis
    from slm_lora.runs.folder import Run


def print_result(
    analysis: Analysis, results: Path, adapters: Sequence[Path] = (), with_rows: bool = False
) -> None:
    """Print the card, the table of settings, the files and the next commands.

    Args:
        analysis: result of `write_report`.
        results: results folder of the experiment.
        adapters: folders of the kept adapters.
        with_rows: whether the page with rows was written.
    """
    from slm_lora.report.setup import not_shown
    from slm_lora.report.terminal import card_table, settings_table
    from slm_lora.report.write import PAGE_FILE, TABLE_FILE, WITH_ROWS_FILE

    out = console()
    out.print()
    if analysis.card.facts:
        out.print(card_table(analysis))
        out.print()
    out.print(settings_table(analysis, out.width))
    out.print()
    if omitted := not_shown([run.run for run in analysis.runs], results):
        out.print(f"{omitted}\n", soft_wrap=True)
    pages = [PAGE_FILE, *([WITH_ROWS_FILE] if with_rows else [])]
    for label, path in (
        *(("report", results / page) for page in pages),
        ("every run", results / TABLE_FILE),
    ):
        out.print(f"{label:10} {path}", soft_wrap=True)
    for label, command in _next_commands(analysis, adapters):
        out.print(f"{label:10} {command}", soft_wrap=True)


def _next_commands(analysis: Analysis, adapters: Sequence[Path]) -> list[tuple[str, str]]:
    """Labels and commands for the recommended setting's first adapter; empty if it was not kept."""
    recommended = analysis.card.recommended
    if recommended is None:
        return []
    folder = adapter_of(recommended.first_run.run, adapters)
    if folder is None:
        return []
    path = shlex.quote(str(folder))
    is_full_model = recommended.is_full
    return [
        ("adapter", path),
        ("try it", f"slm-lora chat --adapter {path}"),
        ("serve it", f"slm-lora serve --adapter {path}"),
        *([] if is_full_model else [("merge it", f"slm-lora merge {path} merged/{folder.name}")]),
    ]


def adapter_of(run: Run, adapters: Sequence[Path]) -> Path | None:
    """The folder of a run's adapter among some."""
    suffixes = (f"-{run.cell}", f"-{run.cell}-{str(run.raw['hash'])[:8]}")
    return next((folder for folder in adapters if folder.name.endswith(suffixes)), None)
