"""Arguments, options and console shared by several commands."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from slm_lora.errors import UsageError
from slm_lora.runtime import distributed

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file; see recipes/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. adapter.r=16 data.size=500."),
]
ResultsDir = Annotated[Path, typer.Option("--results", help="Folder of the results.")]
AdaptersDir = Annotated[Path, typer.Option("--adapters", help="Folder of the adapters.")]
DiscardCheckpoints = Annotated[
    bool,
    typer.Option(
        "--discard-checkpoints",
        help="Delete checkpoints of these cells that belong to another recipe, other rows or "
        "another base, instead of stopping with an error.",
    ),
]


def _relaunch(count: int) -> int:
    """Run the command in ``count`` processes instead, and exit with its exit code."""
    if count != 1:
        from slm_lora.launch.local import launch

        if distributed.is_launched():
            raise UsageError(
                f"--processes {count}: WORLD_SIZE is set, so a launcher has already started the "
                "processes; leave --processes out"
            )

        raise typer.Exit(launch(count, _without_processes(sys.argv[1:])))
    return count


def _without_processes(arguments: list[str]) -> list[str]:
    kept, is_value = [], False
    for argument in arguments:
        if not is_value and argument != "--processes" and not argument.startswith("--processes="):
            kept.append(argument)
        is_value = argument == "--processes"
    return kept


Processes = Annotated[
    int,
    typer.Option(
        "--processes",
        callback=_relaunch,
        help="Data-parallel processes on this machine; across machines use torchrun.",
    ),
]
CellName = Annotated[
    str,
    typer.Option(
        "--cell",
        help="Cell of the grid. Default: the first; train requires it if there are several.",
    ),
]


TunedValues = Annotated[
    list[str] | None,
    typer.Option(
        "--at",
        metavar="KEY=VALUE",
        help="Value of a tuned key: one tuning run of the setting that --cell names with a tuning "
        "seed, scored on the validation set. Once per key.",
    ),
]
JsonOutput = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
OnValidation = Annotated[
    bool,
    typer.Option(
        "--validation", help="With --cell base: score it on the validation set, for tuning."
    ),
]


def tuned_values(at: list[str], cell: str, validation: bool, recipe: Any) -> dict[str, float]:
    """The values of --at, after a check of the options that it is combined with."""
    from slm_lora.experiment.paths import BASE

    if recipe.tuning is None and (at or validation):
        option = f"--at {at[0]}" if at else "--validation"
        raise UsageError(f"{option}: the recipe has no tuning section")
    if validation and cell != BASE:
        raise UsageError("--validation: only with --cell base; tuning runs are named by --at")
    if at and (not cell or cell == BASE):
        raise UsageError("--at: needs --cell, a setting with a tuning seed, as r16-1500-seed1000")
    values = {}
    for pair in at:
        key, _, value = pair.partition("=")
        try:
            values[key] = float(value)
        except ValueError:
            values[key] = math.nan
        if not math.isfinite(values[key]):
            raise UsageError(f"--at {pair}: must be KEY=NUMBER")
    return values


def console() -> Any:
    """Console for standard output; without a terminal it writes plain text."""
    import sys

    from rich.console import Console

    # Tables in log files are not limited to 80 columns.
    width = None if sys.stdout.isatty() else 140
    return Console(highlight=False, markup=False, width=width)


def chosen_cell(cells: list[Any], name: str) -> Any:
    """The named cell; without a name, the first."""
    names = [cell.name for cell in cells]
    if name and name not in names:
        raise UsageError(f"--cell {name}: not in the recipe; its cells are {', '.join(names)}")
    return cells[names.index(name) if name else 0]


def quiet_libraries() -> None:
    """Silence warnings of libraries that do not concern the user."""
    import os
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers.*")
    warnings.filterwarnings("ignore", category=UserWarning, module="peft.*")
