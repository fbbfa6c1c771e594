"""Commands as Slurm jobs, through submitit."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slm_lora.errors import STOPPED_RESUMABLE, StorageError, UsageError
from slm_lora.launch.command import LOST, Command, CommandResult, run

_POLL = 1.0
_SAVE_TIMEOUT_S = 60.0
"""Below the 90 s between submitit's signal and the job's time limit."""


class Requeued:
    """A command that saves and is requeued when its job is preempted or at its time limit."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> tuple[int, str]:
        """Run the command; see `run`."""

        def remember(process: subprocess.Popen[bytes]) -> None:
            self._process = process

        return run(self._command, remember)

    def checkpoint(self) -> Any:
        """Submitit's hook before it requeues a job: called in a signal handler, within `run`."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_SAVE_TIMEOUT_S)
        return DelayedSubmission(Requeued(self._command))


class SlurmEngine:
    """One Slurm job per command."""

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        """
        Args:
            folder: for submitit's own files, shared by all machines.
            options: submitit's options (``timeout_min``, 240 by default, ``slurm_partition``,
                ``gpus_per_node``, ``cpus_per_task``, …), and ``cluster``: ``slurm`` (default), or
                ``local`` for jobs on this machine.

        Raises:
            UsageError: submitit or Slurm is not installed, or an option is invalid.
        """
        try:
            import submitit
        except ImportError as error:
            raise UsageError(
                "--executor slurm: needs submitit: pip install '.[slurm]' in a checkout"
            ) from error
        slurm_options = dict(options)
        cluster = slurm_options.pop("cluster", "slurm")
        try:
            self._executor = submitit.AutoExecutor(folder, cluster=cluster)
            self._executor.update_parameters(
                **{"name": "slm-lora", "timeout_min": 240, **slurm_options}
            )
        except RuntimeError as error:  # no sbatch on this machine
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
            raise StorageError(f"{command.name}: Slurm refused the job: {error}") from error

    def wait(self, seconds: float) -> list[CommandResult]:
        """See `Engine`."""
        deadline = time.monotonic() + seconds
        while True:
            ended = [name for name, job in self._running.items() if job.done()]
            if ended or time.monotonic() >= deadline:
                return [self._ended(name) for name in ended]
            time.sleep(min(_POLL, seconds))

    def _ended(self, name: str) -> CommandResult:
        job = self._running.pop(name)
        try:
            code, last_line = job.result()
        except self._lost as error:
            if self._stopping:
                return CommandResult(name, STOPPED_RESUMABLE)
            return CommandResult(
                name, LOST, (str(error).strip().splitlines() or ["no reason given"])[0]
            )
        return CommandResult(name, code, last_line)

    def stop(self) -> None:
        """See `Engine`."""
        self._stopping = True
        for job in self._running.values():
            job.cancel(check=False)

    def close(self) -> None:
        """See `Engine`."""
        for job in self._running.values():
            job.cancel(check=False)
