"""A command of this program as a unit of work for an engine (Ray, Slurm).

Each command is a process with its own memory and exit code. It stops gracefully when the worker
that started it is gone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from slm_lora.errors import STOPPED_RESUMABLE, StorageError

WATCHED = "SLM_LORA_WATCHED"
"""Environment variable: stop when standard input is closed, see `launch.local.watch_parent`."""

SAVE_TIMEOUT_S = 300.0
"""Time for a command to save its state and exit after a stop request."""

LOST = -1
"""Instead of an exit code: the worker, its node or its job is gone."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command line, and the conditions to run it in.

    Attributes:
        name: for messages.
        args: arguments after ``slm-lora``.
        cwd: working directory, the same on every machine.
        log: file to append standard output and error to.
        environment: variables to add to the worker's.
    """

    name: str
    args: tuple[str, ...]
    cwd: Path
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CommandResult:
    """Exit code of a command, or `LOST`, and its last line of output."""

    name: str
    code: int
    last_line: str = ""


class Engine(Protocol):
    """Runs commands, possibly on other machines, and returns their results."""

    def submit(self, command: Command) -> None:
        """Queue a command.

        Raises:
            StorageError: the cluster refuses it.
        """

    def wait(self, seconds: float) -> list[CommandResult]:
        """Results of commands that ended since the last call; waits up to ``seconds`` for one."""

    def stop(self) -> None:
        """Request a stop of all commands; their results come from `wait`."""

    def close(self) -> None:
        """Leave the cluster; commands that still run there are ended."""


def run(
    command: Command, on_start: Callable[[subprocess.Popen[bytes]], None] = lambda process: None
) -> tuple[int, str]:
    """Run a command on this machine, and wait for it.

    Args:
        command: the command.
        on_start: called with its process.

    Returns:
        Its exit code (75 if this process was asked to stop meanwhile), and its last line of output.
    """
    if not command.cwd.is_dir() or not command.log.parent.is_dir():
        missing = command.cwd if not command.cwd.is_dir() else command.log.parent
        return StorageError.exit_code, (
            f"{missing}: missing on the worker; all machines must share the same folders"
        )
    with command.log.open("ab") as log:
        start = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "slm_lora", *command.args],
            cwd=command.cwd,
            env={**os.environ, **command.environment, WATCHED: "1"},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
    on_start(process)
    try:
        code = process.wait()
    except BaseException as error:
        _end(process)
        if not isinstance(error, KeyboardInterrupt):
            raise
        code = STOPPED_RESUMABLE if process.returncode else 0  # it may have just finished
    return code if code >= 0 else LOST, _last_line(command.log, start)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(SAVE_TIMEOUT_S)
    except BaseException:
        process.kill()
        raise


def _last_line(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode("utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "exited without output"
