"""Output of ``--plan``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from slm_lora.cli.options import console


def print_plan(jobs: Any, paths: Any, reporter: Any) -> None:
    """Print tokens, time and memory of each cell, and warnings about memory and device."""
    from slm_lora.planning.plan import plan
    from slm_lora.runtime.progress import clock

    with _device_warnings(jobs, reporter):
        estimate = plan(jobs, paths)
        _print_cells(estimate.cells)
        seconds = sum(cell.seconds for cell in estimate.cells if not cell.finished)
        _print_total(f"about {clock(seconds)}", jobs[0], estimate)
        _print_rates(jobs)


def print_tuned_plan(jobs: Any, phase: Any, cells: Any, resolver: Any, reporter: Any) -> None:
    """As `print_plan`, for an experiment with tuning: the searches, then the final runs."""
    from slm_lora.planning.tuning_plan import plan_tuned

    with _device_warnings(jobs, reporter):
        estimate = plan_tuned(phase, cells, resolver, reporter)
        out = console()
        if estimate.searches:
            _print_searches(estimate, phase.section)
            if "auto" in phase.section.values:
                _print_rates(jobs)
            out.print()
            out.print("Final runs, at the values that will be chosen:")
        _print_cells(estimate.final.cells)
        _print_total(_times(estimate.seconds), jobs[0], estimate.memory())


def _print_searches(estimate: Any, section: Any) -> None:
    table = _table(("Setting", "Tried first", "Runs left", "Tokens of a run", "Time", "Memory"))
    for search in estimate.searches:
        values = [" × ".join(f"{value:g}" for value in point) for point in search.values]
        table.add_row(
            search.name,
            ", ".join(values),
            _numbers(search.runs) + (f" ({search.finished} finished)" if search.finished else ""),
            f"{search.run.training_tokens}",
            _times(search.seconds),
            f"{search.run.peak_bytes / 1e9:.1f} GB",
        )
    runs = sum((search.runs for search in estimate.searches[1:]), estimate.searches[0].runs)
    keys = " × ".join(section.key)
    seeds = len(section.seeds)
    out = console()
    out.print(
        f"Tuning of {keys}, on the validation set, {seeds} seed{'s' if seeds > 1 else ''} a value:"
    )
    out.print(table)
    out.print(
        f"{_numbers(runs)} tuning runs are left: the fewest where no end is extended and it is "
        f"flat around the lowest, the most with all {section.extend} extensions and "
        f"{section.refine} refinements of every setting"
        + "; what the race saves depends on the losses, and is not counted"
        * section.race,
        soft_wrap=True,
    )


def _print_cells(cells: Any) -> None:
    from slm_lora.runtime.progress import clock

    headers = ("Cell", "Rows", "Steps", "Training tokens", "Test tokens", "Time", "Memory")
    table = _table(headers)
    for cell in cells:
        table.add_row(
            cell.name,
            f"{cell.training_rows}",
            f"{cell.steps}",
            f"{cell.training_tokens}",
            f"{cell.test_tokens}",
            "finished" if cell.finished else f"about {clock(cell.seconds)}",
            f"{cell.peak_bytes / 1e9:.1f} GB",
        )
    console().print(table)


def _print_total(time: str, job: Any, estimate: Any) -> None:
    out = console()
    out.print(
        f"{time} in all on {job.device.type} in {job.precision}: "
        "estimated by timing a slice of the model; nothing was trained",
        soft_wrap=True,
    )
    if warning := estimate.warning():
        out.print(f"warning: {warning}", soft_wrap=True)


def _table(headers: Sequence[str]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        table.add_column(header, justify="left" if header == headers[0] else "right")
    return table


def _numbers(count: Any) -> str:
    if count.least == count.most:
        return f"{count.least:.0f}"
    return f"{count.least:.0f} to {count.most:.0f}"


def _times(seconds: Any) -> str:
    from slm_lora.runtime.progress import clock

    least, most = clock(seconds.least), clock(seconds.most)
    return f"about {least}" if least == most else f"about {least} to {most}"


@contextmanager
def _device_warnings(jobs: Any, reporter: Any) -> Iterator[None]:
    """Before and after a plan: device or precision of the recipe are not on this machine."""
    mismatch = _device_mismatch(jobs)
    if mismatch:
        reporter.info(f"  warning: {mismatch}")
    reporter.info("  timing a slice of the model")
    yield
    if mismatch:
        console().print(f"warning: {mismatch}", soft_wrap=True)


def _print_rates(jobs: Any) -> None:
    """One line per learning rate that follows from a rule."""
    rates = dict.fromkeys(job.suggested_rate for job in jobs if job.suggested_rate is not None)
    for rate in rates:
        console().print(
            f"training.learning_rate = auto: {rate.value:g} = {rate.formula}; a starting point",
            soft_wrap=True,
        )


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
