"""Progress of long work: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

LOG_INTERVAL_S = 15.0
"""Interval of a task's lines if the output is no terminal."""
MIN_SHARE_FOR_ESTIMATE = 0.005
"""Share of the experiment's cost to complete before the time left is estimated."""


class Overall:
    """Cost of an experiment, in any unit, and the part of it that is done."""

    def __init__(self, cost: float) -> None:
        self._total, self._done, self._began = cost, 0.0, time.monotonic()

    def add(self, cost: float) -> None:
        """Count cost as done by this process."""
        self._done += cost

    def skip(self, cost: float) -> None:
        """Remove cost that an earlier process completed."""
        self._total -= cost

    def left(self) -> float | None:
        """Estimated seconds left; None while too little is done, or if nothing is to be done."""
        if not self._done or self._done < MIN_SHARE_FOR_ESTIMATE * self._total:
            return None
        elapsed = time.monotonic() - self._began
        return max(0.0, self._total - self._done) * elapsed / self._done


class Task:
    """Progress of work with a known number of units.

    Args:
        console: output.
        label: name of the cell.
        total: number of units.
        unit: plural name of the units.
        overall: progress of the experiment, if known.
        cost: cost of all units, in the unit of ``overall``.
    """

    def __init__(
        self,
        console: Console,
        label: str,
        total: int,
        unit: str,
        overall: Overall | None = None,
        cost: float = 0.0,
    ) -> None:
        self._console, self._label, self._total, self._unit = console, label, total, unit
        self._overall, self._unit_cost = overall, cost / max(1, total)
        self._done, self._earlier, self._first, self._tokens = 0, 0, 0, 0
        self._began = self._logged = self._last = self._first_at = time.monotonic()
        self._note = ""
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(
                get_renderable=self.table, console=console, transient=True, refresh_per_second=2
            )
            self._live.start()

    def advance(self, units: int, tokens: int = 0, note: str = "", earlier: int = 0) -> None:
        """Count work as done.

        Args:
            units: done since the last call.
            tokens: processed since the last call, for the rate.
            note: short text, such as a loss.
            earlier: units done by an earlier process: they count as done, but not for the rate.
        """
        self._done += units + earlier
        self._earlier += earlier
        self._tokens += tokens
        self._note = note
        now = self._last = time.monotonic()
        if not self._first:
            self._first, self._first_at = units, now
        if self._overall is not None:
            self._overall.add(units * self._unit_cost)
            self._overall.skip(earlier * self._unit_cost)
        if self._live is None and now - self._logged >= LOG_INTERVAL_S:
            self._logged = now
            self._console.print(self._line(), soft_wrap=True)

    def _seconds_per_unit(self) -> float:
        """Mean over this process's units, without the first, which may compile, if possible."""
        here = self._done - self._earlier
        if here > self._first:
            return (self._last - self._first_at) / (here - self._first)
        return (self._last - self._began) / max(1, here)

    def _left(self) -> float:
        return (self._total - self._done) * self._seconds_per_unit()

    def _rate(self) -> str:
        elapsed = max(1e-9, self._last - self._began)
        return f"{self._tokens / elapsed:.0f}" if self._tokens else ""

    def _line(self) -> str:
        parts = [self._label, f"{self._done}/{self._total} {self._unit}", self._note]
        parts += [f"{rate} tok/s" if (rate := self._rate()) else "", f"{clock(self._left())} left"]
        if self._overall is not None and (left := self._overall.left()) is not None:
            parts.append(f"{clock(left)} for the experiment")
        return "  " + "  ".join(part for part in parts if part)

    def table(self) -> Table:
        """The live table of one row; the time left counts down between units."""
        now = time.monotonic()
        left = clock(max(0.0, self._left() - (now - self._last))) if self._first else "—"
        overall = self._overall.left() if self._overall is not None else None
        table = Table(
            box=None, pad_edge=False, padding=(0, 2, 0, 2), header_style="dim", expand=False
        )
        columns = {
            "cell": self._label,
            self._unit: f"{self._done}/{self._total}",
            "loss": self._note.removeprefix("loss "),
            "tokens/s": self._rate(),
            "elapsed": clock(now - self._began),
            "left": left,
            "experiment": "—" if overall is None else f"{clock(overall)} left",
        }
        if self._overall is None:
            del columns["experiment"]
        if not self._note:
            del columns["loss"]
        for name in columns:
            table.add_column(
                name,
                no_wrap=True,
                overflow="ellipsis",
                justify="left" if name in ("cell", "loss") else "right",
                ratio=1 if name == "loss" else None,
            )
        table.add_row(*(Text(value) for value in columns.values()))
        return table

    def stop(self) -> None:
        """Remove the table."""
        if self._live is not None:
            self._live.stop()

    def close(self, summary: str) -> None:
        """Replace the table by a summary line."""
        self.stop()
        elapsed = clock(time.monotonic() - self._began)
        self._console.print(f"  {self._label}  {summary}  {elapsed}", soft_wrap=True)


class Reporter:
    """Prints progress and notes; ``quiet`` prints nothing."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        # Highlighting would colour the numbers inside names.
        self.console = console or Console(highlight=False, quiet=quiet, stderr=True)
        self._shown: set[str] = set()
        self.overall: Overall | None = None

    def info(self, line: str) -> None:
        """One line for the user."""
        self.console.print(line, soft_wrap=True, markup=False)

    def info_once(self, line: str) -> None:
        """`info`, at most once per process for the same line."""
        if line not in self._shown:
            self._shown.add(line)
            self.info(line)

    @contextmanager
    def task(self, label: str, total: int, unit: str, cost: float = 0.0) -> Iterator[Task]:
        """Show a task within the block; ``cost`` in the unit of `overall`."""
        task = Task(self.console, label, total, unit, self.overall, cost)
        try:
            yield task
        finally:
            task.stop()


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
