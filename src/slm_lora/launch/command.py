"""One command of this program as a piece of work for an engine, wherever that puts it.

It is a process of its own, as if typed on that machine: it has its own memory and exit code, and it
stops, as if asked to, when the worker that started it is gone.
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
"""Environment: the process ends when its standard input does, see `launch.local.watch_starter`."""

SAVING = 300.0
"""Seconds that a command has to save and end after it was asked to stop."""

LOST = -1
"""In place of an exit code: the worker, its node, or its job are gone."""


@dataclass(frozen=True, slots=True)
class Command:
    """Words after ``slm-lora``, and where to run them.

    Attributes:
        name: for people.
        words: arguments of the command line.
        folder: to start in, the same on every machine.
        log: file that what it says is added to.
        environment: added to the worker's.
    """

    name: str
    words: tuple[str, ...]
    folder: Path
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: its exit code, or `LOST`; and its last line."""

    name: str
    code: int
    last_line: str = ""


class Engine(Protocol):
    """Runs commands somewhere, and tells how they ended."""

    def submit(self, command: Command) -> None:
        """Hand over a command; it begins when there is room.

        Raises:
            StorageError: the cluster does not take it.
        """

    def wait(self, seconds: float) -> list[Ended]:
        """Commands that have ended since; waits at most so long for one."""

    def stop(self) -> None:
        """Ask all to stop; `wait` tells when they have."""

    def close(self) -> None:
        """Leave the cluster; what still runs there is ended."""


def run(
    command: Command, on_start: Callable[[subprocess.Popen[bytes]], None] = lambda process: None
) -> tuple[int, str]:
    """Run a command on this machine, and wait for it.

    Args:
        command: to run.
        on_start: told of its process.

    Returns:
        Its exit code (75 if this process is asked to stop meanwhile), and its last line.
    """
    if not command.folder.is_dir() or not command.log.parent.is_dir():
        seen = command.folder if not command.folder.is_dir() else command.log.parent
        return StorageError.exit_code, (
            f"{seen}: not there on the worker; all machines must see the same folders"
        )
    with command.log.open("ab") as log:
        began = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "slm_lora", *command.words],
            cwd=command.folder,
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
        code = STOPPED_RESUMABLE if process.returncode else 0  # it may just have ended
    return code if code >= 0 else LOST, _last_line(command.log, began)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(SAVING)
    except BaseException:
        process.kill()
        raise


def _last_line(log: Path, since: int) -> str:
    with log.open("rb") as said:
        said.seek(since)
        lines = said.read().decode("utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "exited without output"
