"""The cells of an experiment as commands for an engine, on as many machines as it has.

The driver decides what is left to do, hands it over, and collects: it computes nothing. A worker
runs ``slm-lora train --cell NAME`` in the same folder, which locks the cell, goes on where another
left it, and leaves it alone if it is finished; so a lost worker, or a driver that died and is
started again, cost at most what was not saved.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slm_lora.config.grid import name_without
from slm_lora.errors import STOPPED_RESUMABLE, IntegrityError, SlmLoraError, StorageError
from slm_lora.experiment.candidates import is_done
from slm_lora.experiment.job import Job
from slm_lora.experiment.paths import BASE, ExperimentPaths
from slm_lora.experiment.resume import finished, lock_experiment
from slm_lora.experiment.reuse import reuse_runs
from slm_lora.launch.command import LOST, SAVE_TIMEOUT_S, Command, CommandResult, Engine
from slm_lora.runs.folder import Run, find_run
from slm_lora.runs.tuning import read_stopped
from slm_lora.runtime.progress import Reporter, Task
from slm_lora.runtime.signals import Stop, StopRequested, graceful_stop

MOST_LOSSES = 3
"""Times that a cell is handed over again after its worker was lost."""

_POLL = 1.0


@dataclass(frozen=True, slots=True)
class CommandLine:
    """How a worker is to be called.

    Attributes:
        recipe: file, as the user named it.
        overrides: as the user gave them.
        results: folder of all experiments' results.
        adapters: folder of adapters.
    """

    recipe: Path
    overrides: tuple[str, ...]
    results: Path
    adapters: Path

    def for_cell(self, cell: str, job: Job) -> tuple[str, ...]:
        """Words that run a cell as ``job`` has it: what this machine chose, a worker does not
        choose again."""
        training = job.config.training
        chosen = [
            f"training.{key}={value}"
            for key, wanted, value in (
                ("device", training.device, job.device.type),
                ("precision", training.precision, job.precision),
            )
            if wanted == "auto"
        ]
        folders = ("--results", str(self.results), "--adapters", str(self.adapters))
        return ("train", str(self.recipe), *self.overrides, *chosen, "--cell", cell, *folders)


class CellFailedError(SlmLoraError):
    """Cells could not be run; says which and why. Its exit code is that of the first."""

    def __init__(self, failed: Sequence[CommandResult]) -> None:
        super().__init__("\n".join(f"{each.name}: {each.last_line}" for each in failed))
        self.exit_code = failed[0].code if failed[0].code > 0 else StorageError.exit_code


def run_elsewhere(
    jobs: Sequence[Job],
    paths: ExperimentPaths,
    reporter: Reporter,
    engine: Engine,
    line: CommandLine,
    discard: bool = False,
) -> list[Run]:
    """Let an engine run what is not finished; return all runs, the bases first.

    Cells that fail do not keep others from being run.

    Args:
        jobs: the cells.
        paths: where everything goes; a folder that all machines see.
        reporter: told how it goes.
        engine: that runs commands.
        line: how a worker is called.
        discard: as for `runner.run_jobs`.

    Raises:
        CellFailedError: cells could not be run.
        IntegrityError: as `runner.run_jobs`; or a worker wrote its run elsewhere.
        StopRequested: a signal asked for it, and the workers have saved.
    """
    with lock_experiment(jobs, paths, discard):
        reuse_runs(jobs, paths, reporter)
        bases = {job.base_identity: job for job in jobs}
        commands = [
            _command(job.name, line.for_cell(job.name, job), paths)
            for job in jobs
            if finished(job, paths) is None
        ]
        missing = [i for i in bases if find_run(paths.results, BASE, i) is None]
        if missing:
            words = line.for_cell(BASE, bases[missing[0]])
            commands.insert(0, _command(BASE, words, paths))
        every = len(jobs) + 1
        reporter.info(f"  {every - len(commands)} of {every} runs are finished (the base is one)")
        _hand_out(commands, paths, reporter, engine)
        runs = [find_run(paths.results, BASE, identity) for identity in bases]
        runs += [finished(job, paths) for job in jobs]
        there = [run for run in runs if run is not None]
        _check_there(len(runs), len(there), paths)
        # A driver that was killed may have left those of runs that were finished by then.
        _remove_logs((BASE, *(job.name for job in jobs)), paths)
        return there


@dataclass(frozen=True)
class RemoteCandidates:
    """Runs tuning jobs by workers, in place of `candidates.CandidateRunner`.

    A candidate that diverged or was stopped is an outcome of the search, and no failure.

    Args:
        keys: the tuned keys.
        reporter: for progress.
        engine: runs commands.
        line: how a worker is called.
        discard: as for `runner.run_jobs`.
    """

    keys: tuple[str, ...]
    reporter: Reporter
    engine: Engine
    line: CommandLine
    discard: bool = False

    def __call__(self, jobs: Sequence[Job], paths: ExperimentPaths) -> None:
        """Run what is not finished, the base first: races compare candidates with it.

        Args:
            jobs: tuning runs; all are run at the same time.
            paths: of the tuning runs.

        Raises:
            CellFailedError, IntegrityError, StopRequested: as `run_elsewhere`.
        """
        with lock_experiment(jobs, paths, self.discard):
            reuse_runs(jobs, paths, self.reporter)
            bases = {job.base_identity: job for job in jobs}
            for identity, job in bases.items():
                if find_run(paths.results, BASE, identity) is None:
                    words = (*self.line.for_cell(BASE, job), "--validation")
                    self._hand_out([_command(BASE, words, paths)], paths)
            waiting = {job.name: job for job in jobs if not is_done(job, paths)}
            self._hand_out(
                [_command(job.name, self._words(job), paths) for job in waiting.values()], paths
            )
            for name, job in waiting.items():
                stopped = read_stopped(paths.results, name, job.identity)
                if stopped is not None:
                    self.reporter.info(f"  {name}  stopped: {stopped.reason}")
            n_done = sum(is_done(job, paths) for job in jobs)
            n_done += sum(find_run(paths.results, BASE, i) is not None for i in bases)
            _check_there(len(jobs) + len(bases), n_done, paths)
            _remove_logs((BASE, *(job.name for job in jobs)), paths)

    def _hand_out(self, commands: Sequence[Command], paths: ExperimentPaths) -> None:
        if commands:
            _hand_out(commands, paths, self.reporter, self.engine)

    def _words(self, job: Job) -> tuple[str, ...]:
        cell = name_without(job.config, job.settings, self.keys)
        values = [f"{key}={float(job.settings[key])!r}" for key in self.keys]
        at = tuple(word for value in values for word in ("--at", value))
        return (*self.line.for_cell(cell, job), *at)


def _hand_out(
    commands: Sequence[Command], paths: ExperimentPaths, reporter: Reporter, engine: Engine
) -> None:
    """Let workers run commands to their end.

    Raises:
        CellFailedError: some failed.
        StopRequested: a signal asked for it, and the workers have saved.
    """
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    with graceful_stop() as stop, reporter.task("runs", len(commands), "runs") as task:
        failed = _run_all(commands, engine, reporter, task, stop)
    if failed:
        raise CellFailedError(failed)


def _check_there(wanted: int, there: int, paths: ExperimentPaths) -> None:
    if there < wanted:
        raise IntegrityError(
            f"{wanted - there} of {wanted} runs are not in {paths.results}, though their workers "
            "ended well: all machines must see the same folder"
        )


def _command(name: str, words: tuple[str, ...], paths: ExperimentPaths) -> Command:
    return Command(name, words, Path.cwd(), _log(name, paths).absolute(), _offline())


def _log(cell: str, paths: ExperimentPaths) -> Path:
    return paths.checkpoints / f"{cell}.log"


def _remove_logs(names: Iterable[str], paths: ExperimentPaths) -> None:
    for name in names:
        _log(name, paths).unlink(missing_ok=True)


def _offline() -> dict[str, str]:
    """What of this process's environment decides whether and where libraries fetch."""
    kept = ("HF_HUB_OFFLINE", "HF_HOME", "SLM_LORA_CACHE")
    return {name: os.environ[name] for name in kept if name in os.environ}


def _run_all(
    commands: Sequence[Command],
    engine: Engine,
    reporter: Reporter,
    task: Task,
    stop: Stop,
) -> list[CommandResult]:
    """Until all have ended; those that failed."""
    by_name = {command.name: command for command in commands}
    losses = dict.fromkeys(by_name, 0)
    failed: list[CommandResult] = []
    waiting, running = deque(commands), set[str]()
    while waiting or running:
        if stop.requested:
            _stop_all(engine, running)
            raise StopRequested
        _hand_over(waiting, running, engine)
        for ended in engine.wait(_POLL):
            command = by_name[ended.name]
            running.remove(ended.name)
            if ended.code in (LOST, STOPPED_RESUMABLE) and losses[ended.name] < MOST_LOSSES:
                losses[ended.name] += 1
                why = ended.last_line or "its worker was stopped"
                reporter.info(f"  {ended.name}  lost ({why}); again from its last checkpoint")
                waiting.append(command)
                continue
            task.advance(1)
            if ended.code == 0:
                command.log.unlink(missing_ok=True)
                reporter.info(f"  {ended.name}  finished")
            else:
                failed.append(ended)
                reporter.info(f"  {ended.name}  failed: {ended.last_line}  ({command.log})")
    return failed


def _hand_over(waiting: deque[Command], running: set[str], engine: Engine) -> None:
    """As many as the engine takes; one that takes no more now may do so when others have ended."""
    while waiting:
        try:
            engine.submit(waiting[0])
        except StorageError:
            if not running:
                raise
            return
        running.add(waiting.popleft().name)


def _stop_all(engine: Engine, running: set[str]) -> None:
    """Ask the workers to stop, and wait until they have saved."""
    engine.stop()
    until = time.monotonic() + SAVE_TIMEOUT_S
    while running and time.monotonic() < until:
        running -= {ended.name for ended in engine.wait(_POLL)}
