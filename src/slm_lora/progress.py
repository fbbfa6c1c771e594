"""What a user sees while something takes long: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LOG_EVERY = 15.0
"""Seconds between plain lines of one task, off a terminal."""


class Task:
    """One stretch of work with a known number of units; advanced by whoever does it."""

    def __init__(self, console: Console, label: str, total: int, unit: str) -> None:
        self._console, self._label, self._total, self._unit = console, label, total, unit
        self._done, self._earlier, self._tokens = 0, 0, 0
        self._began = self._said = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("  {task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn(unit + "{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("·"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=console,
                transient=True,
            )
            self._row = self._bar.add_task(label, total=total, note="")
            self._bar.start()

    def advance(self, units: int, tokens: int = 0, note: str = "", earlier: int = 0) -> None:
        """Count work as done; ``tokens`` make the rate, ``note`` (a loss, say) is shown.

        ``earlier`` units were done in another sitting: they count, and say nothing of the speed.
        """
        self._done += units + earlier
        self._earlier += earlier
        self._tokens += tokens
        now = time.monotonic()
        elapsed = max(1e-9, now - self._began)
        shown = f"  {note}" if note else ""
        if self._tokens:
            shown += f"  {self._tokens / elapsed:.0f} tok/s"
        if self._bar is not None:
            # In one call: rich leaves the first out of its speed.
            self._bar.update(self._row, advance=units + earlier, note=shown)
        elif now - self._said >= LOG_EVERY:
            left = (self._total - self._done) * elapsed / max(1, self._done - self._earlier)
            self._said = now
            self._console.print(
                f"  {self._label}  {self._done}/{self._total} {self._unit}{shown}  "
                f"{clock(left)} left",
                soft_wrap=True,
            )

    def close(self, summary: str) -> None:
        """Take the bar away and leave one line."""
        if self._bar is not None:
            self._bar.stop()
        elapsed = clock(time.monotonic() - self._began)
        self._console.print(f"  {self._label}  {summary}  {elapsed}", soft_wrap=True)


class Reporter:
    """Where progress is told; ``quiet`` tells nothing."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        # Highlighting would colour the numbers inside names.
        self.console = console or Console(highlight=False, quiet=quiet, stderr=True)
        self._said: set[str] = set()

    def say(self, line: str) -> None:
        """One line for the user."""
        self.console.print(line, soft_wrap=True, markup=False)

    def say_once(self, line: str) -> None:
        """As `say`, unless it was said before."""
        if line not in self._said:
            self._said.add(line)
            self.say(line)

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Task]:
        """A task whose bar goes away even when the work fails."""
        task = Task(self.console, label, total, unit)
        try:
            yield task
        finally:
            if task._bar is not None:
                task._bar.stop()


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
