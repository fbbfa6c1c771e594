"""Records of running cells, which `slm-lora watch` shows.

``<results>/progress/<cell>-<hash8>.json`` exists while a cell is trained and scored;
``<results>/progress/experiment.json`` exists until the experiment is finished. Nothing that is
computed depends on them. A killed process leaves its records; `is_running` recognises these.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slm_lora.records import Step

PROGRESS_FOLDER, PLAN_FILE = "progress", "experiment.json"
WRITE_INTERVAL_S = 2.0
"""Shortest interval of two records of a cell."""
CURVE_POINTS = 120
"""Largest number of points of a curve."""
SILENCE_S = 90.0
"""Age at which a record of another machine counts as left by a dead process."""

Phase = Literal["training", "scoring"]
_Number = Annotated[float, Field(ge=-1e15, le=1e15)]
_Point = tuple[_Number, _Number]


class _Record(BaseModel):
    """The process that wrote a record.

    Attributes:
        host: name of its machine.
        pid: its process id there.
        process_started: its start in clock ticks since the machine's boot; None if unknown.
        updated: seconds since 1970.
    """

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)
    host: str
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    process_started: int | None = None
    updated: _Number


class PlanRecord(_Record):
    """An experiment that is not finished.

    Attributes:
        description: of its recipe.
        cells: their number, without the base.
        runs: names of their run folders; None before the tuning phase has chosen values.
    """

    description: str = ""
    cells: Annotated[int, Field(ge=0, le=10**9)]
    runs: Annotated[tuple[str, ...], Field(strict=False)] | None = None


class ProgressRecord(_Record):
    """A cell at work.

    Attributes:
        cell, hash: name and identity.
        phase: training of the cell, or scoring of its held-out rows.
        step, total_steps: of the training; 0 for the base.
        loss: of the last step, nats per label token.
        tokens_per_s: over the last steps.
        seconds_left: of the training.
        curve: pairs of step and training loss; means over groups of steps if there are many.
    """

    cell: str
    hash: str
    phase: Phase
    step: Annotated[int, Field(ge=0, le=2**53)] = 0
    total_steps: Annotated[int, Field(ge=0, le=2**53)] = 0
    loss: _Number | None = None
    tokens_per_s: _Number | None = None
    seconds_left: _Number | None = None
    # JSON has no tuples; the types inside remain strict.
    curve: Annotated[tuple[_Point, ...], Field(strict=False)] = ()


def thin(points: Sequence[tuple[float, float]], limit: int = CURVE_POINTS) -> list[_Point]:
    """At most ``limit`` points of a curve: the last step and the mean loss of equal groups."""
    finite = [point for point in points if abs(point[1]) < 1e15]
    size = max(1, math.ceil(len(finite) / limit))
    groups = [finite[start : start + size] for start in range(0, len(finite), size)]
    return [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups]


class CellProgress:
    """Writes the record of one cell; a failure is one note and ends the writing.

    Args:
        results: folder of the experiment, or of its tuning phase.
        cell, identity: of the cell.
        note: shows a line to the user.
        writes: False in all processes but the first.
    """

    def __init__(
        self,
        results: Path,
        cell: str,
        identity: str,
        note: Callable[[str], None],
        writes: bool = True,
    ) -> None:
        self._cell, self._identity, self._note, self._writes = cell, identity, note, writes
        self._path = results / PROGRESS_FOLDER / f"{cell}-{identity[:8]}.json"
        self._next_write = -math.inf
        self._steps: Sequence[Step] = ()

    def recording(
        self, then: Callable[[Sequence[Step]], None] | None
    ) -> Callable[[Sequence[Step]], None]:
        """`training`, followed by another function of the steps if there is one."""

        def record(steps: Sequence[Step]) -> None:
            self.training(steps)
            if then is not None:
                then(steps)

        return record

    def training(self, steps: Sequence[Step]) -> None:
        """Record the steps so far, at most every `WRITE_INTERVAL_S` seconds."""
        self._steps = steps
        if time.monotonic() >= self._next_write:
            self._write("training")

    def scoring(self) -> None:
        """Record that the training is over and the held-out rows are scored."""
        self._write("scoring")

    def _write(self, phase: Phase) -> None:
        if not self._writes:
            return
        with self._harmless():
            _write(self._path, self._record(phase))
        self._next_write = time.monotonic() + WRITE_INTERVAL_S

    def _record(self, phase: Phase) -> ProgressRecord:
        process = _own_process()
        if not self._steps:
            return ProgressRecord(cell=self._cell, hash=self._identity, phase=phase, **process)
        recent, last = self._steps[-21:], self._steps[-1]
        # The first step of all may compile, so it counts only where it is the only one.
        timed = recent[1:] or recent
        seconds = last.seconds - (recent[0].seconds if len(recent) > 1 else 0.0)
        per_step = max(1e-9, seconds) / len(timed)
        return ProgressRecord(
            cell=self._cell,
            hash=self._identity,
            phase=phase,
            step=last.step,
            total_steps=last.total_steps,
            loss=last.loss if math.isfinite(last.loss) else None,
            tokens_per_s=sum(step.tokens for step in timed) / max(1e-9, seconds),
            seconds_left=(last.total_steps - last.step) * per_step,
            curve=tuple(thin([(step.step, step.loss) for step in self._steps])),
            **process,
        )

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind: the run matters more
            self._writes = False
            self._note(f"  note: slm-lora watch will not show this run ({_first_line(error)})")

    def remove(self) -> None:
        """Remove the record: the cell is finished, or was stopped."""
        if self._writes:
            _remove(self._path)


@contextmanager
def cell_progress(
    results: Path, cell: str, identity: str, note: Callable[[str], None], writes: bool = True
) -> Iterator[CellProgress]:
    """A cell's record within the block; arguments as for `CellProgress`."""
    progress = CellProgress(results, cell, identity, note, writes)
    try:
        yield progress
    finally:
        progress.remove()


@contextmanager
def planned_experiment(
    results: Path, description: str, cells: int, note: Callable[[str], None], writes: bool = True
) -> Iterator[Callable[[Sequence[str]], None]]:
    """Record an experiment's cells within the block; a stop by the user leaves the record, so that
    `slm-lora watch` knows how many are open.

    Args:
        results: folder of the experiment.
        description: of the recipe.
        cells: number of cells, without the base.
        note: shows a line to the user.
        writes: False in all processes but the first.

    Yields:
        A function that adds the names of the cells' run folders, once these are known.
    """
    path = results / PROGRESS_FOLDER / PLAN_FILE
    other = read_plan(results)
    if other is not None and other.pid != os.getpid() and is_running(other, time.time()):
        writes = False  # this command waits for that one, or is refused

    def write(runs: Sequence[str] | None) -> None:
        if not writes:
            return
        process = _own_process()
        names = None if runs is None else tuple(runs)
        try:
            _write(path, PlanRecord(description=description, cells=cells, runs=names, **process))
        except Exception as error:  # of any kind: the run matters more
            note(f"  note: slm-lora watch will not show this run ({_first_line(error)})")

    write(None)
    try:
        yield write
    except Exception:
        if writes:
            _remove(path)
            with contextlib.suppress(OSError):
                results.rmdir()  # raises unless nothing was done there
        raise
    if writes:
        _remove(path)


def read_plan(results: Path) -> PlanRecord | None:
    """The record of an unfinished experiment; None if there is none, or a broken one."""
    try:
        return PlanRecord.model_validate_json((results / PROGRESS_FOLDER / PLAN_FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def read_progress(results: Path) -> list[ProgressRecord]:
    """The records of cells in a folder, by name of file; broken ones are left out."""
    records = []
    for path in sorted((results / PROGRESS_FOLDER).glob("*.json")):
        if path.name != PLAN_FILE:
            with contextlib.suppress(OSError, ValidationError):
                records.append(ProgressRecord.model_validate_json(path.read_bytes()))
    return records


def is_running(record: _Record, now: float) -> bool:
    """Whether the process of a record is alive.

    On its own machine the process is looked up. Elsewhere, a cell's record counts until it is
    `SILENCE_S` old, or five steps if these take longer.
    """
    if record.host == socket.gethostname() and os.name != "nt":
        return _is_alive(record.pid, record.process_started)
    step_s = 0.0
    if isinstance(record, ProgressRecord) and record.seconds_left and record.step:
        step_s = record.seconds_left / max(1, record.total_steps - record.step)
    return now - record.updated < max(SILENCE_S, 5 * step_s)


def _is_alive(pid: int, started: int | None) -> bool:
    if started is not None:
        return _process_start(pid) == started
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _process_start(pid: int) -> int | None:
    """Start of a process in clock ticks since boot; None if it is dead, or without /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        # The name, in parentheses, may contain spaces.
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def _own_process() -> dict[str, Any]:
    """Fields of `_Record` for this process."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "process_started": _process_start(pid),
        "updated": time.time(),
    }


def _write(path: Path, record: _Record) -> None:
    """Write atomically but not durably: after a power failure nothing runs anyway."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(record.model_dump_json(), encoding="utf-8")
    temporary.replace(path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.with_name(f".{path.name}.new").unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        path.parent.rmdir()  # raises if other records are there


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
