"""What several commands share: their arguments, and how they speak."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from slm_lora.errors import UsageError
from slm_lora.runtime import distributed

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, as in recipes/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. adapter.r=16 data.size=500."),
]
ResultsDir = Annotated[Path, typer.Option("--results", help="Folder for tables and scores.")]
AdaptersDir = Annotated[Path, typer.Option("--adapters", help="Folder for adapters.")]
DiscardCheckpoints = Annotated[
    bool,
    typer.Option(
        "--discard-checkpoints",
        help="Remove unfinished trainings of these cells that were made of another recipe, other "
        "rows or another base, instead of refusing.",
    ),
]


def _in_processes(many: int) -> int:
    """Run this very command in so many processes instead, and end with its exit code."""
    if many != 1:
        from slm_lora.launch.local import launch

        if distributed.is_launched():
            raise UsageError(
                f"--processes {many}: this process is already one of several (WORLD_SIZE is set)"
            )

        raise typer.Exit(launch(many, _without_processes(sys.argv[1:])))
    return many


def _without_processes(words: list[str]) -> list[str]:
    kept, skip = [], False
    for word in words:
        if not skip and word != "--processes" and not word.startswith("--processes="):
            kept.append(word)
        skip = word == "--processes"
    return kept


Processes = Annotated[
    int,
    typer.Option(
        "--processes",
        callback=_in_processes,
        help="Processes that share the examples of a step, on this machine (elsewhere: torchrun).",
    ),
]
CellName = Annotated[
    str,
    typer.Option(
        "--cell", help="Cell of the grid; unset, its first (train: where there is but one)."
    ),
]


def console() -> Any:
    """The terminal, or plain text off one."""
    import sys

    from rich.console import Console

    # A table in a log file need not fit 80 columns.
    width = None if sys.stdout.isatty() else 140
    return Console(highlight=False, markup=False, width=width)


def chosen_cell(cells: list[Any], name: str) -> Any:
    """The named cell; without a name, the first (cells share what looks at data need)."""
    names = [each.name for each in cells]
    if name and name not in names:
        raise UsageError(f"--cell {name}: the recipe has the cells {', '.join(names)}")
    return cells[names.index(name) if name else 0]


def quiet_libraries() -> None:
    """Libraries warn about each other; what concerns the user we say ourselves."""
    import os
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers.*")
    warnings.filterwarnings("ignore", category=UserWarning, module="peft.*")
