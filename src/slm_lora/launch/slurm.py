"""Commands as Slurm jobs, through submitit."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slm_lora.errors import STOPPED_RESUMABLE, StorageError, UsageError
from slm_lora.launch.command import LOST, Command, Ended, run

_POLL = 1.0
_SAVING = 60.0
"""Seconds: submitit has a job signalled 90 before its time limit."""


class Requeued:
    """A command that, when its job is preempted or at its time limit, saves and is queued again."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> tuple[int, str]:
        """Run it."""

        def started(process: subprocess.Popen[bytes]) -> None:
            self._process = process

        return run(self._command, started)

    def checkpoint(self) -> Any:
        """What submitit queues next; it calls this in a signal's handler, in the middle of `run`,
        and ends the job afterwards."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_SAVING)
        return DelayedSubmission(Requeued(self._command))


class SlurmEngine:
    """A job for each command."""

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        """
        Args:
            folder: of submitit's own files, that all machines see.
            options: as submitit names them (``timeout_min``, ``slurm_partition``,
                ``gpus_per_node``, ``cpus_per_task``, …; four hours unless given), and ``cluster``:
                ``slurm`` unless given, ``local`` for jobs of this machine.

        Raises:
            UsageError: submitit is not installed, there is no Slurm here, or no such option.
        """
        try:
            import submitit
        except ImportError as error:
            raise UsageError(
                "--executor slurm: needs submitit: pip install '.[slurm]' in a checkout"
            ) from error
        given = dict(options)
        cluster = given.pop("cluster", "slurm")
        try:
            self._executor = submitit.AutoExecutor(folder, cluster=cluster)
            self._executor.update_parameters(**{"name": "slm-lora", "timeout_min": 240, **given})
        except RuntimeError as error:  # no sbatch here
            raise UsageError(f"--executor slurm: {error}") from error
        except (NameError, TypeError, ValueError, AssertionError) as error:
            raise UsageError(f"--executor-option: {error}") from error
        self._lost = submitit.core.utils.UncompletedJobError
        self._failed = submitit.core.utils.FailedSubmissionError
        self._running: dict[str, Any] = {}
        self._stopping = False

    def submit(self, command: Command) -> None:
        """See `Engine`."""
        try:
            self._running[command.name] = self._executor.submit(Requeued(command))
        except self._failed as error:
            raise StorageError(f"{command.name}: Slurm does not take the job: {error}") from error

    def wait(self, seconds: float) -> list[Ended]:
        """See `Engine`."""
        until = time.monotonic() + seconds
        while True:
            ended = [name for name, job in self._running.items() if job.done()]
            if ended or time.monotonic() >= until:
                return [self._ended(name) for name in ended]
            time.sleep(min(_POLL, seconds))

    def _ended(self, name: str) -> Ended:
        job = self._running.pop(name)
        try:
            code, last_line = job.result()
        except self._lost as error:
            if self._stopping:
                return Ended(name, STOPPED_RESUMABLE)
            return Ended(name, LOST, (str(error).strip().splitlines() or ["no reason given"])[0])
        return Ended(name, code, last_line)

    def stop(self) -> None:
        """See `Engine`."""
        self._stopping = True
        for job in self._running.values():
            job.cancel(check=False)

    def close(self) -> None:
        """See `Engine`."""
        for job in self._running.values():
            job.cancel(check=False)
