"""Run tuning jobs on this machine; in a race, stop those that can hardly become the lowest."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from dataclasses import asdict

from slm_lora.errors import NumericError
from slm_lora.experiment.base_cache import LoadedBase
from slm_lora.experiment.cell import Watch
from slm_lora.experiment.job import Job
from slm_lora.experiment.paths import ExperimentPaths
from slm_lora.experiment.resume import finished, lock_cell, lock_experiment
from slm_lora.experiment.runner import first_only, run_bases, run_cell, together, try_adapters
from slm_lora.records import Step
from slm_lora.runs.tuning import read_stopped, write_stopped
from slm_lora.runtime import distributed
from slm_lora.runtime.progress import Reporter


class CandidateStopped(Exception):
    """Ends the training of a candidate; the message is the reason."""


class CandidateRunner:
    """Runs tuning jobs one after the other, with one base in memory.

    Args:
        reporter: for progress.
        discard: as for `runner.run_jobs`.
    """

    def __init__(self, reporter: Reporter, discard: bool = False) -> None:
        self._reporter, self._discard = reporter, discard
        self._loaded = LoadedBase(reporter)
        self._tried = False

    def __call__(self, jobs: Sequence[Job], paths: ExperimentPaths) -> None:
        """Run what is not finished, the base first."""
        with (
            together(jobs),
            first_only(lambda: lock_experiment(jobs, paths, self._discard)),
        ):
            if not self._tried:
                try_adapters(jobs, paths, self._reporter, self._loaded)
                self._tried = True
                run_bases(jobs, paths, self._reporter, self._loaded)
            for job in jobs:
                self._run(job, paths)

    def _run(self, job: Job, paths: ExperimentPaths) -> None:
        reporter = self._reporter
        with first_only(functools.partial(lock_cell, job.name, job.identity, paths, reporter)):
            if distributed.run_on_main(lambda: is_done(job, paths)):
                return
            history: list[Step] = []

            def watch(steps: Sequence[Step]) -> None:
                history[:] = steps

            reason = self._reason(job, paths, watch)
            if not reason:
                return
            reporter.info(f"  {job.name}  stopped: {reason}")

            def record() -> None:
                steps = [asdict(step) for step in history]
                write_stopped(paths.results, job.name, job.identity, reason, steps)
                shutil.rmtree(paths.checkpoint(job.name, job.identity), ignore_errors=True)

            distributed.run_on_main(record)

    def _reason(self, job: Job, paths: ExperimentPaths, watch: Watch) -> str:
        """Train and score a candidate; why it was stopped, or empty."""
        try:
            run_cell(job, self._loaded, paths, self._reporter, watch)
        except CandidateStopped as stopped:
            return str(stopped)
        except NumericError as error:
            # A rate that is too large for a setting is an outcome of the search, no failure.
            return f"diverged ({str(error).split(';')[0]})"
        return ""


def is_done(job: Job, paths: ExperimentPaths) -> bool:
    """Whether a tuning job was finished or stopped."""
    return (
        finished(job, paths) is not None
        or read_stopped(paths.results, job.name, job.identity) is not None
    )
