"""What a user sees while something takes long: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.progress import Task as Row
from rich.table import Column
from rich.text import Text

LOG_EVERY = 15.0
"""Seconds between plain lines of one task, off a terminal."""


_WIDE = 100
"""Characters of a terminal that has room for a bar."""


class _StateColumn(ProgressColumn):
    """How far it is, with the time left from the first unit on. (rich's own tells none while units
    take longer than the half minute that it looks back.) Cut at the right, never wrapped."""

    def __init__(self, task: Task) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis", ratio=1))
        self._task = task

    def render(self, task: Row) -> Text:
        return Text(self._task.state(), no_wrap=True, overflow="ellipsis")


class Task:
    """One stretch of work with a known number of units; advanced by whoever does it."""

    def __init__(self, console: Console, label: str, total: int, unit: str) -> None:
        self._console, self._label, self._total, self._unit = console, label, total, unit
        self._done, self._earlier, self._first, self._tokens = 0, 0, 0, 0
        self._began = self._said = self._last = self._first_at = time.monotonic()
        self._note = ""
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("  {task.description}", markup=False),
                *([BarColumn(bar_width=24)] if console.width >= _WIDE else []),
                _StateColumn(self),
                console=console,
                transient=True,
                expand=True,
            )
            self._row = self._bar.add_task(label, total=total)
            self._bar.start()

    def advance(self, units: int, tokens: int = 0, note: str = "", earlier: int = 0) -> None:
        """Count work as done; ``tokens`` make the rate, ``note`` (a loss, say) is shown.

        ``earlier`` units were done in another sitting: they count, and say nothing of the speed.
        """
        self._done += units + earlier
        self._earlier += earlier
        self._tokens += tokens
        now = self._last = time.monotonic()
        if not self._first:
            self._first, self._first_at = units, now
        self._note = f"  {note}" if note else ""
        if self._bar is not None:
            self._bar.update(self._row, advance=units + earlier)
        elif now - self._said >= LOG_EVERY:
            self._said = now
            self._console.print(
                f"  {self._label}  {self._done}/{self._total} {self._unit}{self._note}"
                f"{self._rate()}  {clock(self._left())} left",
                soft_wrap=True,
            )

    def _seconds_each(self) -> float:
        """Of this sitting's units; the first, which may compile, only while it is alone."""
        here = self._done - self._earlier
        if here > self._first:
            return (self._last - self._first_at) / (here - self._first)
        return (self._last - self._began) / max(1, here)

    def _left(self) -> float:
        return (self._total - self._done) * self._seconds_each()

    def _rate(self) -> str:
        elapsed = max(1e-9, self._last - self._began)
        return f"  {self._tokens / elapsed:.0f} tok/s" if self._tokens else ""

    def state(self) -> str:
        """``2/10 steps  1:20 · 5:20 left  40 s each  loss 2.345  67 tok/s``, counted down between
        units."""
        now = time.monotonic()
        shown = f"{self._done}/{self._total} {self._unit}  {clock(now - self._began)}"
        if not self._first:
            return shown
        shown += f" · {clock(max(0.0, self._left() - (now - self._last)))} left"
        if (each := self._seconds_each()) >= 1:
            shown += f"  {each:.{0 if each >= 10 else 1}f} s each"
        return f"{shown}{self._note}{self._rate()}"

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

    def info(self, line: str) -> None:
        """One line for the user."""
        self.console.print(line, soft_wrap=True, markup=False)

    def info_once(self, line: str) -> None:
        """As `say`, unless it was said before."""
        if line not in self._said:
            self._said.add(line)
            self.info(line)

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
