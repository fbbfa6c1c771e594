"""Commands that write a recipe for rows that fits a time budget, and run it."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slm_lora.cli.options import AdaptersDir, DiscardCheckpoints, ResultsDir, quiet_libraries
from slm_lora.errors import NOT_SHOWN_BETTER, UsageError

if TYPE_CHECKING:
    from slm_lora.cli.experiment_run import ExperimentResult
    from slm_lora.experiment.job import Job
    from slm_lora.planning.tuning_recipe import Request
    from slm_lora.runtime.progress import Reporter

Rows = Annotated[
    str,
    typer.Argument(
        metavar="ROWS",
        help="A file (JSON lines, JSON, CSV, TSV, text, Parquet), a folder of such files, a hub "
        "id, or ml-qa, the embedded data set.",
    ),
]
Model = Annotated[
    str, typer.Option("--model", help="Hub id or local folder. Default: the embedded model.")
]
Budget = Annotated[
    str, typer.Option("--budget", help="Time for everything, e.g. 90s, 30m, 2h.", metavar="TIME")
]
Name = Annotated[
    str, typer.Option("--name", help="Name of experiment and recipe. Default: after the rows.")
]

LEAST_BUDGET, MOST_BUDGET = 10, 30 * 86_400
"""Seconds."""


def init(rows: Rows = "ml-qa", model: Model = "", budget: Budget = "30m", name: Name = "") -> None:
    """Write the recipe that `tune` would run; train nothing.

    Reads the rows, times the model on this machine, and chooses sizes that fit the budget. An
    existing recipe is never overwritten.
    """
    from slm_lora.runtime.progress import Reporter

    request = _request(rows, model, budget, name)
    path = Path(f"{request.experiment}.yaml")
    if path.exists():
        raise UsageError(f"{path}: exists, and is not overwritten; remove it, or choose --name")
    quiet_libraries()
    _write_recipe(request, path, Reporter())
    typer.echo(f"{path}\nRun it: slm-lora experiment {shlex.quote(str(path))}")


def tune(
    rows: Rows = "ml-qa",
    model: Model = "",
    budget: Budget = "30m",
    name: Name = "",
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON object on standard output, and nothing else there."
        ),
    ] = False,
    results: ResultsDir = Path("results"),
    adapters: AdaptersDir = Path("adapter"),
    discard: DiscardCheckpoints = False,
) -> None:
    """Train a tuned adapter for rows in limited time.

    Checks the rows, writes a recipe that fits the budget (NAME.yaml), chooses a learning rate for
    a small and a large rank, and compares the trained adapters with the base on test rows. After
    an interruption the same command continues.

    Exit code: 0 if the adapter is better than the base, 10 if this is not shown.
    """
    from slm_lora.cli.experiment_run import run_experiment
    from slm_lora.runtime import distributed
    from slm_lora.runtime.progress import Reporter

    if distributed.is_launched():
        raise UsageError(
            "tune: runs in one process; write the recipe with slm-lora init, and run it with "
            "slm-lora experiment --processes"
        )
    request = _request(rows, model, budget, name)
    path = Path(f"{request.experiment}.yaml")
    quiet_libraries()
    reporter = Reporter()
    known = path.exists()
    if known:
        _check_own(request, path)
        reporter.info(f"{path}: written by this command earlier; going on with it")
    else:
        _write_recipe(request, path, reporter)
    result = run_experiment(path, (), results, adapters, discard, announce=known)
    assert result is not None
    raise typer.Exit(_show(result, path, as_json))


def _request(rows: str, model: str, budget: str, name: str) -> Request:
    from slm_lora.planning.tuning_recipe import Request

    if name and not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,99}", name):
        raise UsageError(
            f"--name {name}: must consist of small letters, digits, '.', '_' and '-', and begin "
            "with a letter or digit"
        )
    request = Request(rows=rows, budget=parse_budget(budget), name=name)
    return request if not model else Request(rows, model, request.budget, name)


def parse_budget(text: str) -> int:
    """Seconds of ``90s``, ``30m``, ``2h`` or ``1h30m``.

    Raises:
        UsageError: it is none of these, or out of range.
    """
    match = re.fullmatch(r"(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,8})s)?", text.strip().lower())
    parts = [int(part or 0) for part in match.groups()] if match and match[0] else []
    if not parts:
        raise UsageError(f"--budget {text}: must be a time such as 90s, 30m or 2h")
    seconds = 3600 * parts[0] + 60 * parts[1] + parts[2]
    if not LEAST_BUDGET <= seconds <= MOST_BUDGET:
        raise UsageError(f"--budget {text}: must be from {LEAST_BUDGET}s to {MOST_BUDGET // 3600}h")
    return seconds


def _check_own(request: Request, path: Path) -> None:
    from slm_lora.config.validation import escape_unprintable

    try:
        first = path.read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error
    if first == f"# {request.command}":
        return
    earlier = escape_unprintable(first[2:200])
    origin = f"written by '{earlier}'" if first.startswith("# slm-lora tune") else "written by hand"
    raise UsageError(
        f"{path}: exists, {origin}, not by '{request.command}'; remove it, choose --name, or run "
        f"it as it is: slm-lora experiment {path}"
    )


MAX_REMARKS = 3


def _write_recipe(request: Request, path: Path, reporter: Reporter) -> None:
    from slm_lora.experiment.resolve_jobs import JobResolver
    from slm_lora.planning.rows_to_recipe import plan_tuning
    from slm_lora.planning.tuning_recipe import duration
    from slm_lora.runtime.storage import atomic_write_text

    reporter.info(f"{request.rows}: reading rows, and timing {request.model} on this machine")
    plan = plan_tuning(request, JobResolver())
    job, sizes = plan.job, plan.sizes
    epochs = f"{sizes.epochs:g} epoch{'s' * (sizes.epochs != 1)}"
    reporter.info(
        f"  {job.data.rows_available:,} rows ({job.rows.format}): {len(job.data.test)} test, "
        f"{len(job.data.validation)} validation, {len(job.data.train)} training, {epochs}"
    )
    seeds = sizes.search.seeds
    reporter.info(
        f"  at most {sizes.search.tuning_runs} tuning runs, {sizes.search.final_runs} final runs"
        f"{' (one seed)' if seeds == 1 else ''}, {minutes(sizes.seconds)} of "
        f"{duration(request.budget)}"
    )
    remarks = [*_column_remarks(plan.data.columns), *_remarks(job)]
    for remark in remarks[:MAX_REMARKS]:
        reporter.info(f"  note: {remark}")
    if (more := len(remarks) - MAX_REMARKS) > 0:
        reporter.info(f"  {more} more: slm-lora data check {path}")
    atomic_write_text(path, plan.text)
    reporter.info(f"  recipe: {path}")


def _column_remarks(columns: Mapping[str, str]) -> list[str]:
    if not columns:
        return []
    pairs = ", ".join(f"{column!r} as {field}" for field, column in columns.items())
    return [f"no format has these columns; {pairs} is a guess (data.columns)"]


def minutes(seconds: float) -> str:
    """``about 22 min``."""
    return f"about {max(1, round(seconds / 60))} min"


def _remarks(job: Job) -> list[str]:
    """Likely mistakes in the rows, one line each, the most serious first."""
    from slm_lora.cli.data import data_warnings
    from slm_lora.data.checks import conflicting_prompts

    remarks = []
    if bad := job.rows.bad_rows:
        rows = f"{len(bad)} malformed row{'s' * (len(bad) > 1)}"
        remarks.append(f"{rows} skipped, first {bad[0].source}: {bad[0].reason}")
    remarks += data_warnings([job])
    prompts, rows_in_conflict = conflicting_prompts(job.rows.rows)
    if prompts:
        remarks.append(
            f"{prompts} prompt{'s' * (prompts > 1)} with several different answers "
            f"({rows_in_conflict} rows)"
        )
    return [*remarks, *job.rows.notes, *job.data.notes]


def _show(result: ExperimentResult, recipe: Path, as_json: bool) -> int:
    """Print the result; the exit code."""
    from slm_lora.cli.result import adapter_of
    from slm_lora.report.outcome import outcome_of, record

    outcome = outcome_of(result.analysis)
    if outcome is None:
        raise UsageError(
            f"{recipe}: no longer tunes the learning rate; run it with slm-lora experiment {recipe}"
        )
    adapter = adapter_of(outcome.recommended.first_run.run, result.adapters)
    files = {
        "adapter": str(adapter) if adapter else None,
        "report": str(result.results / "report.html"),
        "recipe": str(recipe),
    }
    if as_json:
        from slm_lora.runs.folder import to_json

        sys.stdout.write(to_json({"experiment": result.results.name, **record(outcome), **files}))
    else:
        _print_screen(outcome, files)
    return 0 if outcome.is_better else NOT_SHOWN_BETTER


def _print_screen(outcome: Any, files: dict[str, str | None]) -> None:
    from slm_lora.cli.options import console
    from slm_lora.report.outcome import not_known, sentences

    out = console()
    lines = screen(sentences(outcome), not_known(outcome), files, min(out.width, 100))
    out.print()
    for line in lines:
        out.print(line, soft_wrap=True)


def screen(
    statements: list[str], phrases: list[str], files: dict[str, str | None], width: int
) -> list[str]:
    """The lines of the result, none longer than the width but for paths and commands."""
    import textwrap

    lines = textwrap.wrap(statements[0], width)
    for sentence in statements[1:]:
        lines += textwrap.wrap(sentence, width, initial_indent="  ", subsequent_indent="    ")
    unknown = "; ".join(phrases)
    lines += textwrap.wrap(f"Not known: {unknown}.", width, subsequent_indent="  ")
    lines.append("")
    adapter = files["adapter"]
    for label in ("adapter", "report", "recipe"):
        if files[label]:
            lines.append(f"{label:8} {files[label]}")
    if adapter:
        lines.append(f"{'try it':8} slm-lora chat --adapter {shlex.quote(adapter)}")
    lines.append(f"{'repeat':8} slm-lora experiment {shlex.quote(str(files['recipe']))}")
    return lines
