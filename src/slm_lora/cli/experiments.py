"""Commands that run experiments, score, report and compare."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from slm_lora.cli.launchers import (
    Address,
    Executor,
    ExecutorName,
    ExecutorOptions,
    check_executor,
    engine,
)
from slm_lora.cli.options import (
    AdaptersDir,
    CellName,
    DiscardCheckpoints,
    Overrides,
    Processes,
    RecipeFile,
    ResultsDir,
    chosen_cell,
    console,
    quiet_libraries,
)
from slm_lora.cli.plan import print_plan
from slm_lora.cli.result import print_result
from slm_lora.errors import UsageError
from slm_lora.records import LossOn
from slm_lora.runtime import distributed


def experiment(
    recipe: RecipeFile,
    overrides: Overrides = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show cells, tokens, time and memory; train nothing.")
    ] = False,
    results: ResultsDir = Path("results"),
    adapters: AdaptersDir = Path("adapter"),
    discard: DiscardCheckpoints = False,
    with_rows: Annotated[
        bool,
        typer.Option(
            "--with-rows",
            help="Also write report-with-rows.html, which quotes some test rows: for yourself.",
        ),
    ] = False,
    executor: ExecutorName = Executor.local,
    address: Address = "",
    executor_option: ExecutorOptions = None,
    _processes: Processes = 1,
) -> None:
    """Run a whole experiment: base, every cell of the grid, table, metrics and report.

    Finished cells are kept: the same command continues after an interruption.
    """
    from slm_lora.config.load import load_recipe
    from slm_lora.experiment.job import ComputedName
    from slm_lora.experiment.remote import CommandLine, run_elsewhere
    from slm_lora.experiment.resolve_jobs import make_jobs
    from slm_lora.experiment.runner import run_jobs
    from slm_lora.report.examples import Quoted
    from slm_lora.report.write import write_report
    from slm_lora.runtime.progress import Reporter

    check_executor(executor, address, executor_option or [])
    read, cells = load_recipe(recipe, overrides or [])
    paths = _places(read, results, adapters)
    quiet_libraries()
    with distributed.process_group():
        reporter = Reporter(quiet=not distributed.is_main())
        reporter.info(f"{read.name}: {read.description or recipe.name}")
        reporter.info("  reading rows and model; a first time fetches or builds what is not there")
        here = executor is Executor.local
        computed: ComputedName = "nowhere" if plan else "here" if here else "elsewhere"
        jobs = distributed.first_then_all(lambda: make_jobs(cells, computed))
        _say_data(jobs[0], reporter)
        if plan:
            if distributed.is_main():
                print_plan(jobs, paths, reporter)
            return
        if here:
            _warn_if_too_large(jobs, paths, reporter)
            runs = run_jobs(jobs, paths, reporter, discard)
        else:
            line = CommandLine(recipe, tuple(overrides or ()), results, adapters)
            gpus = int(jobs[0].device.type == "cuda")
            with engine(executor, address, executor_option or [], paths, gpus) as chosen:
                runs = run_elsewhere(jobs, paths, reporter, chosen, line, discard)
        if not distributed.is_main():
            return
    headline = jobs[0].config.evaluation.headline
    quoted = Quoted({row.row_id: row for row in jobs[0].rows.rows}) if with_rows else None
    analysis = write_report(runs, paths.results, headline, quoted)
    print_result(analysis, paths.results, _adapters(runs, paths), with_rows)


def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    cell: CellName = "",
    results: ResultsDir = Path("results"),
    adapters: AdaptersDir = Path("adapter"),
    discard: DiscardCheckpoints = False,
    _processes: Processes = 1,
) -> None:
    """Train and score one cell of a recipe; the cell ``base`` is the base, scored.

    Several may be at work on the cells of one experiment, on machines that see the same folders.
    """
    from slm_lora.config.load import load_recipe
    from slm_lora.experiment.paths import BASE
    from slm_lora.experiment.resolve_jobs import make_jobs
    from slm_lora.experiment.runner import run_bases, run_cells
    from slm_lora.runtime.progress import Reporter

    read, cells = load_recipe(recipe, overrides or [])
    chosen = cells if cell == BASE else [chosen_cell(cells, cell)]
    if not cell and len(cells) > 1:
        raise UsageError(f"the recipe has {len(cells)} cells; choose one: --cell {cells[0].name} …")
    quiet_libraries()
    paths = _places(read, results, adapters)
    with distributed.process_group():
        reporter = Reporter(quiet=not distributed.is_main())
        jobs = distributed.first_then_all(lambda: make_jobs(chosen))
        _say_data(jobs[0], reporter)
        _warn_if_too_large(jobs, paths, reporter)
        if cell == BASE:
            runs = run_bases(jobs, paths, reporter)
        else:
            runs = run_cells(jobs, paths, reporter, discard)
        if not distributed.is_main():
            return
    out = console()
    out.print()
    for run in runs:
        out.print(f"{run.folder}", soft_wrap=True)
    for folder in _adapters(runs, paths):
        out.print(f"{folder}", soft_wrap=True)


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
    no_base: Annotated[
        bool, typer.Option("--no-base", help="Do not score the base beside the adapter.")
    ] = False,
) -> None:
    """Score the base, or an adapter and the base beside it, on a recipe's test rows."""
    from slm_lora.config.load import load_recipe
    from slm_lora.experiment.resolve_jobs import make_jobs
    from slm_lora.experiment.runner import evaluate_adapter
    from slm_lora.runs.scores import write_scores
    from slm_lora.runtime.progress import Reporter

    _, cells = load_recipe(recipe, overrides or [])
    quiet_libraries()
    reporter = Reporter()
    job = make_jobs([chosen_cell(cells, cell)])[0]
    _say_data(job, reporter)
    found = evaluate_adapter(job, adapter, reporter, with_base=not no_base)
    out = console()
    kinds: list[tuple[LossOn, str]] = [("all", "whole text"), ("response", "response only")]
    for tokens, label in kinds:
        if tokens not in found.record:
            continue
        _print_loss(out, label, found.record[tokens])
        if found.base_record is not None:
            _print_loss(out, "  base", found.base_record[tokens])
            value, low, high = found.difference(tokens)
            sure = f", 95 % {low:+.5f} to {high:+.5f}" if math.isfinite(low + high) else ""
            out.print(
                f"{'  difference':13}  {value:+.5f} nats per token{sure}"
                "; below zero the adapter is better than the base",
                soft_wrap=True,
            )
    if scores is not None:
        write_scores(found.scores, scores)
        out.print(f"{scores}", soft_wrap=True)


def _print_loss(out: Any, label: str, loss: dict[str, Any]) -> None:
    out.print(
        f"{label:13}  loss {loss['loss']:.5f}  perplexity {loss['perplexity']:.4f}  "
        f"{loss['tokens']} tokens  {loss['rows']} rows"
    )


def report(
    experiment_folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="results/<experiment>")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="With --with-rows: overrides of that recipe, e.g. data.name=rows.jsonl.",
        ),
    ] = None,
    with_rows: Annotated[
        Path | None,
        typer.Option(
            "--with-rows",
            metavar="RECIPE",
            help="Also write report-with-rows.html, which quotes some of this recipe's test rows: "
            "for yourself.",
        ),
    ] = None,
    answers: Annotated[
        bool,
        typer.Option(
            "--answers", help="With --with-rows: the base and the best adapter answer these rows."
        ),
    ] = False,
    adapters: AdaptersDir = Path("adapter"),
) -> None:
    """Make table, metrics and report again from the run folders of an experiment."""
    from slm_lora.report.examples import Quoted
    from slm_lora.report.write import write_report
    from slm_lora.runs.folder import list_runs

    quoted = None
    if with_rows is not None:
        from slm_lora.config.load import load_recipe
        from slm_lora.data.sources import read_rows
        from slm_lora.experiment.paths import ExperimentPaths

        read, cells = load_recipe(with_rows, overrides or [])
        rows = read_rows(cells[0].config.data).rows
        paths = ExperimentPaths(read.name, experiment_folder, adapters)
        answer = _answering(cells[0].config, paths) if answers else None
        quoted = Quoted({row.row_id: row for row in rows}, answer)
    elif overrides or answers:
        given = overrides[0] if overrides else "--answers"
        raise UsageError(f"{given}: needs --with-rows RECIPE")
    runs = list_runs(experiment_folder)
    analysis = write_report(runs, experiment_folder, quoted=quoted)
    print_result(analysis, experiment_folder, with_rows=quoted is not None)


def _adapters(runs: Any, paths: Any) -> list[Path]:
    """Folders of the finished runs' adapters that were kept."""
    tuned = [run for run in runs if "adapter" in run.raw]
    return [folder for run in tuned if (folder := paths.adapter_of(run)) is not None]


def _answering(recipe: Any, paths: Any) -> Any:
    """Lets the base of a run and its adapter answer prompts."""
    from slm_lora.cli.outputs import opened
    from slm_lora.evaluation.compare_outputs import compare_outputs
    from slm_lora.evaluation.generation import Sampling
    from slm_lora.runtime.progress import Reporter

    def answer(run: Any, prompts: Any) -> Any:
        folder = paths.adapter_of(run)
        if folder is None:
            raise UsageError(
                f"--answers: the adapter of {run.folder.name} is not in {paths.adapters}, or is "
                "not as it was scored; name its folder's parent (--adapters), or leave it out"
            )
        training = recipe.training
        variants = opened(recipe.model.name, [folder], training.device, training.precision)
        many = 2 * len(prompts)
        with Reporter().task("answers", many, "answers") as task:
            found = compare_outputs(
                variants, prompts, Sampling(96), None, lambda tokens: task.advance(1, tokens)
            )
            task.close(f"{many} answers")
        return found

    return answer


def _places(recipe: Any, results: Path, adapters: Path) -> Any:
    from slm_lora.experiment.paths import ExperimentPaths
    from slm_lora.experiment.tracking import check_installed

    check_installed(recipe.report_to)
    return ExperimentPaths(recipe.name, results / recipe.name, adapters)


def _say_data(job: Any, reporter: Any) -> None:
    sets = job.data
    reporter.info(
        f"{job.source.name} · {job.rows.origin.split(' ')[0]} · {sets.rows_available} rows in "
        f"{sets.groups} groups: {len(sets.test)} test, "
        f"{len(sets.validation)} validation"
    )
    for note in (*job.rows.notes, *sets.notes):
        reporter.info(f"  note: {note}")


def _warn_if_too_large(jobs: Any, paths: Any, reporter: Any) -> None:
    from slm_lora.planning.plan import will_not_fit

    if line := will_not_fit(jobs, paths):
        reporter.info(f"  warning: {line}")
