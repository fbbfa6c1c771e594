"""Commands that run experiments, evaluate and report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from slm_lora.cli.experiment_run import (
    Where,
    experiment_paths,
    kept_adapters,
    report_data,
    run_experiment,
    warn_if_too_large,
)
from slm_lora.cli.launchers import (
    Address,
    Executor,
    ExecutorName,
    ExecutorOptions,
    check_executor,
)
from slm_lora.cli.options import (
    AdaptersDir,
    CellName,
    DiscardCheckpoints,
    JsonOutput,
    OnValidation,
    Overrides,
    Processes,
    RecipeFile,
    ResultsDir,
    TunedValues,
    chosen_cell,
    console,
    quiet_libraries,
    tuned_values,
)
from slm_lora.cli.result import print_result
from slm_lora.errors import UsageError
from slm_lora.records import LossOn
from slm_lora.runtime import distributed


def experiment(
    recipe: RecipeFile,
    overrides: Overrides = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Estimate tokens, time and memory of each cell; train nothing."
        ),
    ] = False,
    results: ResultsDir = Path("results"),
    adapters: AdaptersDir = Path("adapter"),
    discard: DiscardCheckpoints = False,
    with_rows: Annotated[
        bool,
        typer.Option(
            "--with-rows",
            help="Also write report-with-rows.html, which quotes test rows; for private use.",
        ),
    ] = False,
    executor: ExecutorName = Executor.local,
    address: Address = "",
    executor_option: ExecutorOptions = None,
    _processes: Processes = 1,
) -> None:
    """Run an experiment and write its report.

    Scores the base, then trains and scores each cell of the grid. Finished cells are skipped, so
    after an interruption the same command continues.
    """
    check_executor(executor, address, executor_option or [])
    where = Where(executor, address, tuple(executor_option or ()))
    result = run_experiment(
        recipe, overrides or (), results, adapters, discard, with_rows, plan, where
    )
    if result is not None:
        print_result(result.analysis, result.results, result.adapters, with_rows)


def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    cell: CellName = "",
    at: TunedValues = None,
    validation: OnValidation = False,
    results: ResultsDir = Path("results"),
    adapters: AdaptersDir = Path("adapter"),
    discard: DiscardCheckpoints = False,
    _processes: Processes = 1,
) -> None:
    """Train and score one cell of a recipe.

    --cell base scores the base without training. Cells of one experiment may be trained at the same
    time, also on several machines with shared folders. With tuning in the recipe, a cell is trained
    at the values that slm-lora experiment chose; --at makes a single tuning run.
    """
    from slm_lora.config.load import load_recipe
    from slm_lora.experiment.candidates import CandidateRunner, outcome_folder
    from slm_lora.experiment.paths import BASE
    from slm_lora.experiment.resolve_jobs import JobResolver
    from slm_lora.experiment.runner import run_bases, run_cells
    from slm_lora.experiment.tuning import TuningPhase
    from slm_lora.runtime.progress import Reporter

    parsed_recipe, cells = load_recipe(recipe, overrides or [])
    values = tuned_values(at or [], cell, validation, parsed_recipe)
    selected = cells if cell == BASE or values else [chosen_cell(cells, cell)]
    if not cell and len(cells) > 1:
        raise UsageError(
            f"--cell: the recipe has {len(cells)} cells; choose one, e.g. --cell {cells[0].name}"
        )
    quiet_libraries()
    paths = experiment_paths(parsed_recipe, results, adapters)
    with distributed.process_group():
        reporter = Reporter(quiet=not distributed.is_main())
        resolver = JobResolver()
        if parsed_recipe.tuning is not None:
            phase = TuningPhase(parsed_recipe, cells, resolver, paths)
            if values or validation:
                paths = phase.paths
            elif cell != BASE:
                distributed.main_process_first(phase.first_job)  # reads what sealed() needs
                selected = [chosen_cell(phase.chosen_cells(recipe, reporter), cell)]

        def make_jobs() -> list[Any]:
            if values:
                return [phase.job_at(cell, values)]
            return [phase.first_job()] if validation else resolver.jobs(selected)

        jobs = distributed.main_process_first(make_jobs)
        report_data(jobs[0], reporter)
        warn_if_too_large(jobs, paths, reporter)
        if values:
            CandidateRunner(reporter, phase.race_of, discard).run_one(jobs[0], paths)
            folders = [outcome_folder(jobs[0], paths)] if distributed.is_main() else []
        else:
            if cell == BASE:
                runs = run_bases(jobs, paths, reporter)
            else:
                runs = run_cells(jobs, paths, reporter, discard)
            folders = [run.folder for run in runs]
            if distributed.is_main():
                folders += kept_adapters(runs, paths)
        if not distributed.is_main():
            return
    out = console()
    out.print()
    for folder in folders:
        out.print(f"{folder}", soft_wrap=True)


def evaluate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", help="Adapter folder. Default: score the base alone."),
    ] = None,
    cell: CellName = "",
    scores: Annotated[
        Path | None, typer.Option("--scores", help="Write per-row scores to this Parquet file.")
    ] = None,
    no_base: Annotated[
        bool, typer.Option("--no-base", help="Score the adapter without the base.")
    ] = False,
    gguf: Annotated[
        list[Path] | None,
        typer.Option(
            "--gguf",
            metavar="FILE",
            help="Score this GGUF file through llama.cpp, paired with the adapter in PyTorch; "
            "repeatable.",
        ),
    ] = None,
    as_json: JsonOutput = False,
) -> None:
    """Score an adapter and its base on test rows.

    The rows are those of the recipe. Without --adapter, only the base is scored. With --gguf, the
    base is scored only if there is no adapter.
    """
    from slm_lora.cli.gguf_files import check_llama_cpp, print_files, score_files
    from slm_lora.config.load import load_recipe
    from slm_lora.experiment.resolve_jobs import make_jobs
    from slm_lora.experiment.runner import evaluate_adapter
    from slm_lora.runs.scores import write_scores
    from slm_lora.runtime.progress import Reporter

    if as_json and not gguf:
        raise UsageError("--json: needs --gguf FILE")
    _, cells = load_recipe(recipe, overrides or [])
    quiet_libraries()
    reporter = Reporter()
    if gguf:
        check_llama_cpp()
    job = make_jobs([chosen_cell(cells, cell)])[0]
    report_data(job, reporter)
    result = evaluate_adapter(job, adapter, reporter, with_base=not (no_base or gguf))
    if gguf:
        name = adapter.resolve().name if adapter else job.source.name
        print_files(score_files(gguf, job, result, name, reporter), as_json)
        if scores is not None:  # those of PyTorch
            write_scores(result.scores, scores)
            if not as_json:
                console().print(f"{scores}", soft_wrap=True)
        return
    out = console()
    scopes: list[tuple[LossOn, str]] = [("all", "whole text"), ("response", "response only")]
    for loss_on, label in scopes:
        if loss_on not in result.record:
            continue
        _print_loss(out, label, result.record[loss_on])
        if result.base_record is not None:
            _print_loss(out, "  base", result.base_record[loss_on])
            value, low, high = result.difference(loss_on)
            interval = f", 95 % {low:+.5f} to {high:+.5f}" if math.isfinite(low + high) else ""
            out.print(
                f"{'  difference':13}  {value:+.5f} nats per token{interval}"
                "; negative: the adapter is better than the base",
                soft_wrap=True,
            )
    if scores is not None:
        write_scores(result.scores, scores)
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
            help="With --with-rows: overrides of its recipe, e.g. data.name=rows.jsonl.",
        ),
    ] = None,
    with_rows: Annotated[
        Path | None,
        typer.Option(
            "--with-rows",
            metavar="RECIPE",
            help="Also write report-with-rows.html, which quotes test rows of this recipe; for "
            "private use.",
        ),
    ] = None,
    answers: Annotated[
        bool,
        typer.Option(
            "--answers", help="With --with-rows: also generate answers of base and best adapter."
        ),
    ] = False,
    adapters: AdaptersDir = Path("adapter"),
) -> None:
    """Rebuild the report of an experiment.

    Writes table, metrics and report from the run folders.
    """
    from slm_lora.report.examples import Quoted
    from slm_lora.report.write import write_report
    from slm_lora.runs.folder import list_runs

    quoted_rows = None
    if with_rows is not None:
        from slm_lora.config.load import load_recipe
        from slm_lora.data.sources import read_rows
        from slm_lora.experiment.paths import ExperimentPaths

        parsed_recipe, cells = load_recipe(with_rows, overrides or [])
        rows = read_rows(cells[0].config.data).rows
        paths = ExperimentPaths(parsed_recipe.name, experiment_folder, adapters)
        answer = _answer_prompts(cells[0].config, paths) if answers else None
        quoted_rows = Quoted({row.row_id: row for row in rows}, answer)
    elif overrides or answers:
        argument = overrides[0] if overrides else "--answers"
        raise UsageError(f"{argument}: needs --with-rows RECIPE")
    runs = list_runs(experiment_folder)
    analysis = write_report(runs, experiment_folder, quoted=quoted_rows)
    print_result(analysis, experiment_folder, with_rows=quoted_rows is not None)


def _answer_prompts(recipe: Any, paths: Any) -> Any:
    """A function that generates answers of a run's base and adapter to prompts."""
    from slm_lora.cli.outputs import load_models
    from slm_lora.evaluation.compare_outputs import compare_outputs
    from slm_lora.evaluation.generation import Sampling
    from slm_lora.runtime.progress import Reporter

    def answer(run: Any, prompts: Any) -> Any:
        folder = paths.adapter_of(run)
        if folder is None:
            raise UsageError(
                f"--answers: the adapter of {run.folder.name} is not in {paths.adapters}, or "
                "changed after it was scored; give the folder of the adapters (--adapters)"
            )
        training = recipe.training
        variants = load_models(recipe.model.name, [folder], training.device, training.precision)
        n_answers = 2 * len(prompts)
        with Reporter().task("answers", n_answers, "answers") as task:
            answers = compare_outputs(
                variants, prompts, Sampling(96), None, lambda tokens: task.advance(1, tokens)
            )
            task.close(f"{n_answers} answers")
        return answers

    return answer
