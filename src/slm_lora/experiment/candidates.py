"""Run tuning jobs on this machine; in a race, stop those that can hardly become the lowest."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slm_lora.errors import NumericError
from slm_lora.experiment.base_cache import LoadedBase
from slm_lora.experiment.cell import Watch
from slm_lora.experiment.job import Job
from slm_lora.experiment.paths import ExperimentPaths
from slm_lora.experiment.resume import check_unfinished, finished, lock_cell, lock_experiment
from slm_lora.experiment.reuse import reuse_runs
from slm_lora.experiment.runner import first_only, run_bases, run_cell, together, try_adapters
from slm_lora.records import Step
from slm_lora.runs.tuning import read_stopped, stopped_folder, write_stopped
from slm_lora.runtime import distributed
from slm_lora.runtime.progress import Reporter
from slm_lora.stats.racing import Race


class CandidateStopped(Exception):
    """Ends the training of a candidate; the message is the reason."""


class CandidateRunner:
    """Runs tuning jobs one after the other, with one base in memory.

    Args:
        reporter: for progress.
        race_of: what a job is compared with while it trains; None: it runs to its end.
        discard: as for `runner.run_jobs`.
    """

    def __init__(
        self,
        reporter: Reporter,
        race_of: Callable[[Job], Race | None] = lambda job: None,
        discard: bool = False,
    ) -> None:
        self._reporter, self._race_of, self._discard = reporter, race_of, discard
        self._loaded = LoadedBase(reporter)
        self._tried = False

    def __call__(self, jobs: Sequence[Job], paths: ExperimentPaths) -> None:
        """Run what is not finished, the base first."""
        with (
            together(jobs),
            first_only(lambda: lock_experiment(jobs, paths, self._discard)),
        ):
            distributed.run_on_main(lambda: reuse_runs(jobs, paths, self._reporter))
            if not self._tried:
                try_adapters(jobs, paths, self._reporter, self._loaded)
                self._tried = True
                run_bases(jobs, paths, self._reporter, self._loaded)
            for job in jobs:
                self._run(job, paths)

    def run_one(self, job: Job, paths: ExperimentPaths) -> None:
        """Run one candidate while others may run others; the base is scored by its own command."""
        with together([job]):
            distributed.run_on_main(lambda: check_unfinished([job], paths, self._discard))
            try_adapters([job], paths, self._reporter, self._loaded)
            self._run(job, paths)

    def _run(self, job: Job, paths: ExperimentPaths) -> None:
        reporter = self._reporter
        with first_only(functools.partial(lock_cell, job.name, job.identity, paths, reporter)):
            if distributed.run_on_main(lambda: is_done(job, paths)):
                return
            history: list[Step] = []
            # Read by the first of several processes: another may see the files late.
            known = distributed.run_on_main(lambda: _as_json(self._race_of(job)))
            race = _from_json(known)

            def watch(steps: Sequence[Step]) -> None:
                history[:] = steps
                if race is None or len(steps) not in race.rungs:
                    return
                if reason := race.stop_reason([asdict(step) for step in steps]):
                    raise CandidateStopped(reason)

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


def _as_json(race: Race | None) -> Any:
    if race is None:
        return None
    return {**asdict(race), "rivals": list(race.rivals.items())}


def _from_json(known: Any) -> Race | None:
    if known is None:
        return None
    rivals = {float(value): steps for value, steps in known["rivals"]}
    return Race(**{**known, "rivals": rivals, "rungs": tuple(known["rungs"])})


def is_done(job: Job, paths: ExperimentPaths) -> bool:
    """Whether a tuning job was finished or stopped."""
    return (
        finished(job, paths) is not None
        or read_stopped(paths.results, job.name, job.identity) is not None
    )


def outcome_folder(job: Job, paths: ExperimentPaths) -> Path:
    """Folder of the run of a tuning job that is done, or of the record that it was stopped."""
    run = finished(job, paths)
    return run.folder if run else stopped_folder(paths.results, job.name, job.identity)
