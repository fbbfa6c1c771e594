"""What `--plan` prints."""

from __future__ import annotations

from typing import Any, Literal

from slm_lora.cli.options import (
    console,
)


def print_plan(jobs: Any, paths: Any, reporter: Any) -> None:
    """Cells, tokens, time and memory, and warnings of what will not fit."""
    from rich.table import Table

    from slm_lora.planning.plan import plan
    from slm_lora.runtime.progress import clock

    elsewhere = _not_here(jobs)
    if elsewhere:
        reporter.info(f"  warning: {elsewhere}")
    reporter.info("  timing slices of the model")
    found = plan(jobs, paths)
    table = Table(box=None, pad_edge=False, header_style="bold")
    titles = ("Cell", "Rows", "Steps", "Training tokens", "Test tokens", "Time", "Memory")
    sides: list[Literal["left", "right"]] = ["left", *["right"] * 6]  # type: ignore[list-item]
    for title, side in zip(titles, sides, strict=True):
        table.add_column(title, justify=side)
    for cell in found.cells:
        table.add_row(
            cell.name,
            f"{cell.training_rows}",
            f"{cell.steps}",
            f"{cell.training_tokens}",
            f"{cell.test_tokens}",
            "finished" if cell.finished else f"about {clock(cell.seconds)}",
            f"{cell.peak_bytes / 1e9:.1f} GB",
        )
    out = console()
    out.print(table)
    left = sum(cell.seconds for cell in found.cells if not cell.finished)
    out.print(
        f"about {clock(left)} in all on {jobs[0].device.type} in {jobs[0].precision}: an estimate "
        "from a slice of the model, timed now; nothing was trained",
        soft_wrap=True,
    )
    if warning := found.warning():
        out.print(f"warning: {warning}", soft_wrap=True)
    if elsewhere:
        out.print(f"warning: {elsewhere}", soft_wrap=True)


def _not_here(jobs: Any) -> str:
    """One line where a plan is not for the device or the precision that the recipe names."""
    wanted: dict[str, None] = {}
    for job in jobs:
        training = job.config.training
        for key, asked, has in (
            ("device", training.device, job.device.type),
            ("precision", training.precision, job.precision),
        ):
            if asked not in ("auto", has):
                wanted[f"training.{key} = {asked}"] = None
    if not wanted:
        return ""
    return (
        f"{' and '.join(wanted)}: not on this machine, where the experiment would be refused; time "
        f"and memory are those of its {jobs[0].device.type} in {jobs[0].precision}, and runs "
        "finished elsewhere are not told as finished; plan where it will run"
    )
