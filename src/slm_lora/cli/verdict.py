"""The command `verdict`: whether an experiment's setting meets its conditions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from slm_lora.config.conditions import Condition, parse_condition
from slm_lora.errors import UsageError


def verdict(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="results/<experiment>")],
    require: Annotated[
        list[str] | None,
        typer.Option(
            "--require",
            metavar="CONDITION",
            help="A condition, e.g. 'gain > 0.02'; repeatable. Replaces those of the recipe.",
        ),
    ] = None,
    setting: Annotated[
        str,
        typer.Option(
            "--setting", metavar="NAME", help="Setting to judge. Default: the recommended one."
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Judge whether a setting meets the conditions to be shipped.

    Conditions are those of `ship` in the recipe, or --require: `gain` (loss of the base minus that
    of the setting), `gain:METRIC`, or a metric. Exit code 0: all are met; 10: one is violated; 11:
    not enough evidence.
    """
    from slm_lora.report.verdict import make_verdict
    from slm_lora.report.write import read_analysis
    from slm_lora.runs.folder import list_runs, read_table, to_json

    conditions = _conditions(require or [])
    runs = list_runs(results)
    if not conditions:
        table = read_table(results)
        conditions = table.ship if table else ()
    if not conditions:
        raise UsageError(
            f"{results}: no conditions; give --require 'gain > 0.02', or `ship` in the recipe and "
            "run the experiment again (finished runs are kept)"
        )
    result = make_verdict(read_analysis(runs, results), conditions, setting)
    if as_json:
        sys.stdout.write(to_json(result.record()))
    else:
        for line in result.lines():
            typer.echo(line)
    return result.exit_code


def _conditions(texts: list[str]) -> tuple[Condition, ...]:
    try:
        return tuple(dict.fromkeys(map(parse_condition, texts)))
    except ValueError as error:
        raise UsageError(f"--require {error}") from None
