"""The command `compare`: runs, experiments, or score files of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slm_lora.cli.options import console
from slm_lora.errors import UsageError
from slm_lora.runs.folder import RUN_FILE

if TYPE_CHECKING:
    from slm_lora.runs.score_files import Columns
    from slm_lora.stats.settings import Setting


def compare(
    operands: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            help="Runs (results/<experiment>/runs/…), experiments (results/<experiment>, or "
            "results/<experiment>:<setting> for all seeds of one), or score files (.jsonl, .json, "
            ".csv, .parquet). Each is compared with the first.",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    row_id: Annotated[
        str, typer.Option("--id", metavar="COLUMN", help="Score files: column of row ids.")
    ] = "",
    value: Annotated[
        str, typer.Option("--value", metavar="COLUMN", help="Score files: column of the scores.")
    ] = "",
    group: Annotated[
        str,
        typer.Option(
            "--group", metavar="COLUMN", help="Score files: column of groups of dependent rows."
        ),
    ] = "",
    weight: Annotated[
        str,
        typer.Option(
            "--weight",
            metavar="COLUMN",
            help="Score files: denominator; the metric is sum(value) / sum(weight).",
        ),
    ] = "",
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            metavar="COLUMN=TEXT",
            help="Score files: use only matching rows; repeatable.",
        ),
    ] = None,
    common: Annotated[
        bool, typer.Option("--common", help="Score files: use only rows that are in all of them.")
    ] = False,
    margin: Annotated[
        float,
        typer.Option("--margin", help="Score files: equivalence margin."),
    ] = 0.0,
) -> None:
    """Compare runs, experiments or score files.

    Differences are paired by row and have confidence intervals. Operands scored on different rows
    are refused.
    """
    if len(operands) < 2:
        raise UsageError("compare needs at least two: runs, experiments or score files")
    paths = [Path(operand) for operand in operands]
    files = [path for path in paths if path.is_file() and path.name != RUN_FILE]
    if not files:
        file_options = {
            "--id": row_id, "--value": value, "--group": group, "--weight": weight,
            "--where": where, "--common": common, "--margin": margin,
        }  # fmt: skip
        if unused := [name for name, value_ in file_options.items() if value_]:
            raise UsageError(f"{', '.join(unused)}: for score files only")
        _compare_settings([_setting(operand) for operand in operands], as_json)
        return
    if len(files) < len(operands):
        raise UsageError("compare takes runs and experiments, or score files, not both at once")
    if not row_id or not value:
        raise UsageError("compare: score files need --id COLUMN and --value COLUMN")
    from slm_lora.runs.score_files import Columns

    columns = Columns(row_id, value, group, weight, _conditions(where or []))
    _compare_files(files, columns, common, margin, as_json)


def _conditions(where: list[str]) -> dict[str, str]:
    for condition in where:
        if "=" not in condition:
            raise UsageError(f"--where {condition}: must be COLUMN=TEXT")
    return dict(condition.split("=", 1) for condition in where)


def _setting(operand: str) -> Setting:
    """The runs of an operand.

    Raises:
        UsageError: no such setting, or several settings.
    """
    from slm_lora.runs.folder import list_runs, read_run
    from slm_lora.runs.scored_run import read_scored_run, read_scored_runs
    from slm_lora.stats.settings import Setting, group_settings

    path = Path(operand)
    name = ""
    if not path.exists() and ":" in operand:
        folder, name = operand.rsplit(":", 1)
        path = Path(folder)
    if (path / RUN_FILE).exists() or not (path / "runs").is_dir():
        return Setting((read_scored_run(read_run(path)),))
    runs = read_scored_runs(list_runs(path))
    settings = group_settings(runs)
    by_name = {setting.name: setting for setting in settings}
    for base in (run for run in runs if run.is_base):
        by_name["base"] = Setting((base,))
    if not name and len(settings) == 1:
        return settings[0]
    if name not in by_name:
        problem = f"has no setting {name}" if name else f"has {len(settings)} settings"
        raise UsageError(f"{path}: {problem}; name one: {path}:{', '.join(by_name)}")
    return by_name[name]


def _compare_settings(settings: list[Setting], as_json: bool) -> None:
    from slm_lora.report.sentences import sentence
    from slm_lora.runs.folder import to_json
    from slm_lora.stats import comparisons

    results = comparisons.compare(settings)
    if as_json:
        records = [result.record() for result in results]
        print(to_json(records[0] if len(records) == 1 else records), end="")
        return
    out = console()
    for setting in settings:
        loss = setting.estimate()
        out.print(f"{setting.name}  loss {loss.value:.4f} ({loss.low:.4f} to {loss.high:.4f})")
    for result in results:
        out.print(sentence(result))
    scopes = " or ".join(dict.fromkeys(result.difference.covers for result in results))
    out.print(f"Below zero the second has the lower loss; intervals cover the choice of {scopes}.")


def _compare_files(
    paths: list[Path], columns: Columns, common: bool, margin: float, as_json: bool
) -> None:
    from rich.table import Table

    from slm_lora.runs.folder import to_json
    from slm_lora.runs.score_files import read_score_file
    from slm_lora.stats.files import common_rows, compare_files

    files = {str(path): read_score_file(path, columns) for path in paths}
    if len(files) < len(paths):
        raise UsageError("compare: a score file is given twice")
    row_counts = {name: len(rows) for name, rows in files.items()}
    if common:
        files = common_rows(files)
        if not all(files.values()):
            raise UsageError("--common: no row is in all files")
    first, results = compare_files(files, margin)
    if as_json:
        print(to_json({"first": first.record(), "compared": [r.record() for r in results]}), end="")
        return
    out = console()
    for name, rows in files.items():
        if len(rows) < row_counts[name]:
            omitted = row_counts[name] - len(rows)
            out.print(f"{name}: {omitted} of {row_counts[name]} rows omitted (--common)")
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for header in ("File", columns.value, "Difference, 95 %", "p, corrected", "Verdict"):
        table.add_column(header, overflow="fold")
    table.add_row(
        str(paths[0]), f"{first.value:.4f} ({first.low:.4f}, {first.high:.4f})", "", "", ""
    )
    for result in results:
        estimate, difference = result.estimate, result.difference
        table.add_row(
            result.name,
            f"{estimate.value:.4f} ({estimate.low:.4f}, {estimate.high:.4f})",
            f"{difference.value:+.4f} ({difference.low:+.4f}, {difference.high:+.4f})",
            "< 0.001" if result.p_corrected < 0.001 else f"{result.p_corrected:.3f}",
            result.verdict,
        )
    out.print(table)
    groups = f"{first.groups} groups" if columns.group else "rows"
    out.print(
        f"{len(files[str(paths[0])])} rows, paired by {columns.id}; intervals cover the choice of "
        f"{groups}, not the training seed."
    )
