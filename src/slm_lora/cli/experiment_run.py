"""Run an experiment from its recipe file: both phases, here or elsewhere, and the report."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_lora.cli.launchers import Executor, engine
from slm_lora.cli.options import quiet_libraries
from slm_lora.cli.plan import print_plan, print_tuned_plan
from slm_lora.runtime import distributed

if TYPE_CHECKING:
    from slm_lora.report.analysis import Analysis


@dataclass(frozen=True)
class Where:
    """Where an experiment is computed: an executor, its address and its options."""

    executor: Executor = Executor.local
    address: str = ""
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExperimentResult:
    """What an experiment left.

    Attributes:
        analysis: that its report shows.
        results: its folder.
        adapters: folders of the kept adapters.
    """

    analysis: Analysis
    results: Path
    adapters: list[Path]


def run_experiment(
    recipe: Path,
    overrides: Sequence[str],
    results: Path,
    adapters: Path,
    discard: bool = False,
    with_rows: bool = False,
    plan: bool = False,
    where: Where | None = None,
    announce: bool = True,
) -> ExperimentResult | None:
    """Run what is not finished of a recipe, and write its report.

    Args:
        recipe: its file.
        overrides: of its keys.
        results: folder of all experiments.
        adapters: folder of all adapters.
        discard: as ``--discard-checkpoints``.
        with_rows: as ``--with-rows``.
        plan: as ``--plan``.
        where: it is computed; None: here.
        announce: describe experiment and rows first.

    Returns:
        The result; None with ``plan``, and in all processes but the first.
    """
    from slm_lora.config.load import load_recipe
    from slm_lora.experiment.candidates import CandidateRunner
    from slm_lora.experiment.choice import log_choice, note_replaced
    from slm_lora.experiment.forgetting import forgetting_scorer
    from slm_lora.experiment.job import ComputedName
    from slm_lora.experiment.remote import CommandLine, RemoteCandidates, run_elsewhere
    from slm_lora.experiment.replies import reply_scorer
    from slm_lora.experiment.resolve_jobs import JobResolver
    from slm_lora.experiment.runner import run_jobs
    from slm_lora.experiment.tasks import task_scorer
    from slm_lora.experiment.tuning import TuningPhase
    from slm_lora.report.examples import Quoted
    from slm_lora.report.write import write_report
    from slm_lora.runs.progress import planned_experiment
    from slm_lora.runtime.progress import Reporter
    from slm_lora.stats.ship_names import check_ship

    where = where or Where()
    parsed_recipe, cells = load_recipe(recipe, overrides)
    notes_on_ship = check_ship(parsed_recipe)
    paths = experiment_paths(parsed_recipe, results, adapters)
    quiet_libraries()
    with distributed.process_group():
        reporter = Reporter(quiet=not distributed.is_main())
        if announce:
            reporter.info(f"{parsed_recipe.name}: {parsed_recipe.description or recipe.name}")
            reporter.info("  reading rows and model; what is missing is downloaded or built")
        runs_here = where.executor is Executor.local
        where_computed: ComputedName = "nowhere" if plan else "here" if runs_here else "elsewhere"
        resolver = JobResolver(where_computed)
        jobs = distributed.main_process_first(lambda: resolver.jobs(cells))
        if announce:
            report_data(jobs[0], reporter)
        for note in notes_on_ship:
            reporter.info(f"  note: {note}")
        phase = None
        if parsed_recipe.tuning is not None:
            note_replaced(parsed_recipe, reporter)
            phase = TuningPhase(parsed_recipe, cells, resolver, paths)
        if plan:
            if distributed.is_main():
                if phase is not None:
                    print_tuned_plan(jobs, phase, cells, resolver, reporter)
                else:
                    print_plan(jobs, paths, reporter)
            return None
        scorers: list[Any] = []
        if parsed_recipe.replies:
            scorers.append(reply_scorer(parsed_recipe.replies, jobs))
        if parsed_recipe.forgetting:
            scorers.append(forgetting_scorer(parsed_recipe.forgetting, jobs))
            for note in scorers[-1].notes():
                reporter.info(f"  note: {note}")
        if parsed_recipe.tasks:
            section = parsed_recipe.tasks
            scorers.append(distributed.main_process_first(lambda: task_scorer(section, jobs)))
            for note in scorers[-1].notes():
                reporter.info(f"  tasks: {note}")
        with (
            planned_experiment(
                paths.results,
                parsed_recipe.description,
                len(jobs),
                reporter.info_once,
                writes=distributed.is_main(),
            ) as set_planned_runs,
            contextlib.ExitStack() as stack,
        ):
            remote = None
            if not runs_here:
                gpus = int(jobs[0].device.type == "cuda")
                started_engine = stack.enter_context(
                    engine(where.executor, where.address, where.options, paths, gpus)
                )
                command_line = CommandLine(recipe, tuple(overrides), results, adapters)
                remote = (started_engine, command_line)
            if phase is not None:
                if runs_here and (pending := phase.next_jobs()):
                    warn_if_too_large(pending, phase.paths, reporter)
                candidates = (
                    RemoteCandidates(phase.section.key, reporter, *remote, discard)
                    if remote
                    else CandidateRunner(reporter, phase.race_of, discard)
                )
                record = phase.run(candidates, reporter)
                log_choice(record, reporter)
                jobs = resolver.jobs(phase.final_cells(record))
            set_planned_runs([f"{job.name}-{job.identity[:8]}" for job in jobs])
            if remote:
                runs = run_elsewhere(jobs, paths, reporter, *remote, discard)
            else:
                warn_if_too_large(jobs, paths, reporter)
                runs = run_jobs(jobs, paths, reporter, discard)
        if not distributed.is_main():
            return None
        for scorer in scorers:
            scorer.run(jobs, runs, paths, reporter)
    headline = jobs[0].config.evaluation.headline
    quoted_rows = Quoted({row.row_id: row for row in jobs[0].rows.rows}) if with_rows else None
    if parsed_recipe.judge is not None:
        words = [str(paths.results), *overrides, "--recipe", str(recipe)]
        reporter.info(f"  replies to be judged: {shlex.join(['slm-lora', 'judge', *words])}")
    analysis = write_report(runs, paths.results, headline, quoted_rows, parsed_recipe.ship)
    return ExperimentResult(analysis, paths.results, kept_adapters(runs, paths))


def kept_adapters(runs: Any, paths: Any) -> list[Path]:
    """Folders of the adapters that were kept."""
    tuned = [run for run in runs if run.record.adapter is not None]
    return [folder for run in tuned if (folder := paths.adapter_of(run)) is not None]


def experiment_paths(recipe: Any, results: Path, adapters: Path) -> Any:
    """Folders of an experiment; trackers that are not installed are refused."""
    from slm_lora.experiment.paths import ExperimentPaths
    from slm_lora.experiment.tracking import check_installed

    check_installed(recipe.report_to)
    return ExperimentPaths(recipe.name, results / recipe.name, adapters)


def report_data(job: Any, reporter: Any) -> None:
    """Log model, source and sets of the rows, and notes on them."""
    data = job.data
    reporter.info(
        f"{job.source.name} · {job.rows.origin.split(' ')[0]} · {data.rows_available} rows in "
        f"{data.groups} groups: {len(data.test)} test, "
        f"{len(data.validation)} validation"
    )
    for note in (*job.rows.notes, *data.notes):
        reporter.info(f"  note: {note}")


def warn_if_too_large(jobs: Any, paths: Any, reporter: Any) -> None:
    """Warn where weights and optimizer state alone do not fit into memory."""
    from slm_lora.planning.plan import weights_warning

    if warning := weights_warning(jobs, paths):
        reporter.info(f"  warning: {warning}")
