"""Output of ``--plan``."""

from __future__ import annotations

from typing import Any, Literal

from slm_lora.cli.options import console


def print_plan(jobs: Any, paths: Any, reporter: Any) -> None:
    """Print tokens, time and memory of each cell, and warnings about memory and device."""
    from rich.table import Table

    from slm_lora.planning.plan import plan
    from slm_lora.runtime.progress import clock

    mismatch = _device_mismatch(jobs)
    if mismatch:
        reporter.info(f"  warning: {mismatch}")
    reporter.info("  timing a slice of the model")
    estimate = plan(jobs, paths)
    table = Table(box=None, pad_edge=False, header_style="bold")
    headers = ("Cell", "Rows", "Steps", "Training tokens", "Test tokens", "Time", "Memory")
    alignments: list[Literal["left", "right"]] = ["left", *["right"] * 6]  # type: ignore[list-item]
    for header, alignment in zip(headers, alignments, strict=True):
        table.add_column(header, justify=alignment)
    for cell in estimate.cells:
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
    seconds = sum(cell.seconds for cell in estimate.cells if not cell.finished)
    out.print(
        f"about {clock(seconds)} in all on {jobs[0].device.type} in {jobs[0].precision}: "
        "estimated by timing a slice of the model; nothing was trained",
        soft_wrap=True,
    )
    for line in _rate_lines(jobs):
        out.print(line, soft_wrap=True)
    if warning := estimate.warning():
        out.print(f"warning: {warning}", soft_wrap=True)
    if mismatch:
        out.print(f"warning: {mismatch}", soft_wrap=True)


def _rate_lines(jobs: Any) -> list[str]:
    """One line per learning rate that follows from a rule."""
    rates = dict.fromkeys(job.suggested_rate for job in jobs if job.suggested_rate is not None)
    return [
        f"training.learning_rate = auto: {rate.value:g} = {rate.formula}; a starting point"
        for rate in rates
    ]


def _device_mismatch(jobs: Any) -> str:
    """Warning if device or precision of the recipe are unavailable here; else an empty string."""
    unavailable: dict[str, None] = {}
    for job in jobs:
        training = job.config.training
        for key, requested, actual in (
            ("device", training.device, job.device.type),
            ("precision", training.precision, job.precision),
        ):
            if requested not in ("auto", actual):
                unavailable[f"training.{key} = {requested}"] = None
    if not unavailable:
        return ""
    return (
        f"{' and '.join(unavailable)}: not on this machine, so the experiment would be refused; "
        f"time and memory are for its {jobs[0].device.type} in {jobs[0].precision}; runs finished "
        "elsewhere do not count as finished; plan on the machine that will run it"
    )
