"""Standard tasks of finished runs: evaluated once, kept beside the runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slm_lora.config.tasks import TasksSection
from slm_lora.errors import UsageError
from slm_lora.evaluation.harness_tasks import (
    HarnessTask,
    evaluate_task,
    harness_version,
    load_tasks,
)
from slm_lora.experiment.finished import load_finished, with_jobs
from slm_lora.experiment.job import Job
from slm_lora.experiment.paths import ExperimentPaths
from slm_lora.runs.folder import Run
from slm_lora.runs.tasks import DocumentResult, read_task, task_file, write_task
from slm_lora.runtime.progress import Reporter
from slm_lora.runtime.signals import graceful_stop


@dataclass(frozen=True)
class TaskScorer:
    """Evaluates the runs of an experiment in standard tasks.

    Attributes:
        section: of the recipe.
        tasks: with their documents.
    """

    section: TasksSection
    tasks: Sequence[HarnessTask]

    def notes(self) -> list[str]:
        """On the tasks, one line each."""
        lines = []
        for task in self.tasks:
            names = ", ".join(task.metrics)
            lines.append(f"{task.name}: {task.documents} documents, {names}")
            if task.left_out:
                lines[-1] += f" (not compared, no mean over documents: {', '.join(task.left_out)})"
        return lines

    def run(
        self, jobs: Sequence[Job], runs: Sequence[Run], paths: ExperimentPaths, reporter: Reporter
    ) -> None:
        """Evaluate every run in each task that it has no results of with these settings.

        Args:
            jobs: the cells.
            runs: their finished runs and those of their bases.
            paths: of the experiment.
            reporter: for progress.

        Raises:
            StopRequested: a signal asked for it; results of finished tasks are kept.
            IntegrityError: a file of earlier results is broken.
        """
        reporter.overall = None  # counts trainings and scorings
        for run, job in with_jobs(jobs, runs):
            missing = [task for task in self.tasks if not self._is_done(run, task)]
            if not missing:
                reporter.info(f"  {run.cell}  tasks evaluated earlier")
                continue
            variants, name = load_finished(job, run, paths)
            for task in missing:
                results = self._results(task, variants, name, job, run, reporter)
                records = {key: metric.record for key, metric in task.metrics.items()}
                write_task(
                    task_file(run.folder, task.name),
                    run.record.hash,
                    task.name,
                    self._settings(task),
                    records,
                    results,
                )

    def _settings(self, task: HarnessTask) -> dict[str, Any]:
        own = self.section.model_dump(mode="json", exclude={"names"})
        return {**own, "lm_eval": harness_version(), "questions": task.digest}

    def _is_done(self, run: Run, task: HarnessTask) -> bool:
        there = read_task(task_file(run.folder, task.name))
        return there is not None and (there[0].run, there[0].settings) == (
            run.record.hash,
            self._settings(task),
        )

    def _results(
        self, task: HarnessTask, variants: Any, name: str, job: Job, run: Run, reporter: Reporter
    ) -> list[DocumentResult]:
        from slm_lora.evaluation.harness_model import HarnessModel

        with (
            graceful_stop() as stop,
            reporter.task(run.cell, task.requests, "requests") as progress,
        ):

            def on_request(requests: int, tokens: int) -> None:
                progress.advance(requests, tokens)
                stop.check()

            budget = job.config.evaluation.micro_batch_tokens
            model = HarnessModel(variants, name, budget, on_request)
            results = evaluate_task(task, model, self.section)
            progress.close(f"{task.name}  {_summary(task, results)}")
        return results


def task_scorer(section: TasksSection, jobs: Sequence[Job]) -> TaskScorer:
    """What evaluates the runs of an experiment; call it before anything is trained.

    Raises:
        UsageError: adapters are not kept, lm-eval is not installed, or a task does not exist,
            cannot be read or is not supported.
        DataError: documents cannot be loaded.
    """
    if not jobs[0].options.keep_adapters:
        raise UsageError("tasks: needs the adapters: leave out keep_adapters: false")
    harness_version()
    return TaskScorer(section, load_tasks(section))


def _summary(task: HarnessTask, results: Sequence[DocumentResult]) -> str:
    """Each metric over the documents that have it."""
    parts = []
    for name in task.metrics:
        pairs = [result.values[name] for result in results if name in result.values]
        if pairs:
            numerator, denominator = map(sum, zip(*pairs, strict=True))
            parts.append(f"{name} {numerator / denominator:.3f}")
    return "  ".join(parts)
