"""Run folders: one finished cell each, complete or absent, known by a hash of its inputs."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from slm_lora.config.conditions import Condition, parse_ship
from slm_lora.errors import IntegrityError, UsageError
from slm_lora.runs.record import RunRecord, StepRecord
from slm_lora.runtime.storage import atomic_folder

RUN_FORMAT = 1
"""Version of run.json; raised when results of the same inputs would no longer compare."""

RUN_FILE, SCORES_FILE, STEPS_FILE = "run.json", "scores.parquet", "steps.jsonl"
METRICS_FILE = "metrics.json"
"""Beside the run folders: what the last table was made of."""


@dataclass(frozen=True)
class Run:
    """A finished run on disk.

    Attributes:
        folder: of its files.
        raw: run.json as it was read.
    """

    folder: Path
    raw: Mapping[str, Any]

    @functools.cached_property
    def record(self) -> RunRecord:
        """run.json as typed values.

        Raises:
            IntegrityError: a value is missing or of another type.
        """
        try:
            return RunRecord.model_validate(self.raw)
        except ValidationError as error:
            raise IntegrityError(
                f"{self.folder / RUN_FILE}: broken ({_first_of(error)}); {AGAIN}"
            ) from error

    @property
    def cell(self) -> str:
        """Name of the cell, ``base`` for the base model."""
        return str(self.raw["cell"])

    def steps(self) -> list[dict[str, Any]]:
        """The optimizer steps of its training; none for the base.

        Raises:
            IntegrityError: the file is missing or broken.
        """
        path = self.folder / STEPS_FILE
        if self.record.training is None:
            return []
        try:
            # Not splitlines: strings may contain other line separators.
            lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except (OSError, ValueError) as error:
            raise IntegrityError(f"{path}: broken ({error}); {AGAIN}") from error
        steps = []
        for number, line in enumerate(lines, start=1):
            try:
                step = parse_json(line)
                StepRecord.model_validate(step)
            except ValueError as error:
                reason = _first_of(error) if isinstance(error, ValidationError) else str(error)
                raise IntegrityError(f"{path}: line {number} broken ({reason}); {AGAIN}") from error
            steps.append(step)
        return steps

    @property
    def scores_path(self) -> Path:
        """Per-row scores on the test set."""
        return self.folder / SCORES_FILE


def parse_json(text: str) -> Any:
    """JSON that can be written again: finite numbers, and text that is UTF-8.

    Raises:
        ValueError: it is not that.
    """

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number} is no finite number")
        return value

    try:
        value = json.loads(text, parse_float=finite, parse_constant=finite)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    json.dumps(value, ensure_ascii=False).encode()
    return value


def _first_of(error: ValidationError) -> str:
    """The first fault: its key and what is wrong."""
    fault = error.errors()[0]
    where = ".".join(map(str, fault["loc"]))
    reason = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "model_type":
        reason = "must be an object of names and values"
    return f"{where}: {reason}" if where else reason


def run_folder(results: Path, cell: str, identity: str) -> Path:
    """Where the run of a cell lies: ``<results>/runs/<cell>-<hash8>``."""
    return results / "runs" / f"{cell}-{identity[:8]}"


def find_run(results: Path, cell: str, identity: str) -> Run | None:
    """The finished run with this identity, if there is one.

    Raises:
        IntegrityError: a folder is there, but it is another run's, or broken.
    """
    folder = run_folder(results, cell, identity)
    if not folder.exists():
        return None
    if not (folder / RUN_FILE).is_file():
        raise IntegrityError(f"{folder}: should be a run, and has no {RUN_FILE}; {AGAIN}")
    run = read_run(folder)
    if run.raw["hash"] != identity:
        raise IntegrityError(f"{folder}: holds another run; {AGAIN}")
    return run


AGAIN = "move the run's folder away, and the same command makes the run again"


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UsageError: no such folder, or one of another kind; says what it is.
        IntegrityError: run.json or the scores are missing or broken.
    """
    if not (folder / RUN_FILE).is_file():
        raise _no_run(folder)
    try:
        raw = parse_json((folder / RUN_FILE).read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("no object of names and values")
        if "format" not in raw:
            raise ValueError("format: Field required")
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{folder / RUN_FILE}: broken ({error}); {AGAIN}") from error
    if raw["format"] != RUN_FORMAT:
        raise IntegrityError(
            f"{folder}: of another version of slm-lora (format {raw['format']!r:.20}, not "
            f"{RUN_FORMAT}); {AGAIN}"
        )
    if not (folder / SCORES_FILE).is_file():
        raise IntegrityError(f"{folder}: its {SCORES_FILE} is missing; {AGAIN}")
    run = Run(folder, raw)
    _ = run.record  # raises where a value is broken
    return run


MOST_NAMED = 12
"""Runs that a message names one by one."""


def named(names: Sequence[str]) -> str:
    """Names in a line: the first `MOST_NAMED`, and how many more."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _no_run(folder: Path) -> UsageError | IntegrityError:
    """Why a folder is no run, with the way to one where it is near."""
    if not folder.is_dir():
        what = "a file" if folder.exists() else "no such folder"
        return UsageError(f"{folder}: {what}; a run is a folder results/<experiment>/runs/…")
    for kind, runs in (("an experiment", folder / "runs"), ("all runs of an experiment", folder)):
        if there := [path.name for path in run_folders(runs)]:
            return UsageError(f"{folder}: {kind}, not one run; name one in {runs}: {named(there)}")
    if any(folder.glob(f"*/runs/*/{RUN_FILE}")):
        there = sorted(path.name for path in folder.iterdir() if run_folders(path / "runs"))
        return UsageError(
            f"{folder}: the experiments {named(there)}, not one run; a run is a folder "
            f"{folder / there[0] / 'runs'}/…"
        )
    if (folder / "adapter_config.json").is_file() or (folder / "slm_lora.json").is_file():
        return UsageError(
            f"{folder}: an adapter or a model, not a run; its run lies in results/<experiment>/runs"
        )
    return IntegrityError(f"{folder}: no run in it (no {RUN_FILE}); see what it holds")


def run_folders(runs: Path) -> list[Path]:
    """The folders of finished runs in ``<results>/runs``."""
    return sorted(path.parent for path in runs.glob(f"*/{RUN_FILE}"))


def list_runs(results: Path) -> list[Run]:
    """The runs of an experiment's last table; all that are there, before there is a table.

    Raises:
        UsageError: no finished run, runs of a tuning phase, or the folder of something else.
        IntegrityError: a run is broken, or one of the last table is gone.
    """
    folders = {folder.name: folder for folder in run_folders(results / "runs")}
    if not folders:
        if not results.is_dir():
            raise UsageError(f"{results}: no such folder; an experiment's is results/<experiment>")
        if (results / RUN_FILE).is_file():
            raise UsageError(f"{results}: one run, not an experiment (results/<experiment>)")
        raise UsageError(f"{results}: no finished run in it")
    table = read_table(results)
    last = list(folders) if table is None else list(table.runs)
    if gone := [name for name in last if name not in folders]:
        raise IntegrityError(
            f"{results / 'runs'}: without {named(gone)}, which the last table ({METRICS_FILE}) is "
            "made of; put it back, or run the experiment again, or move the table away for one of "
            "all runs that are there"
        )
    runs = [read_run(folders[name]) for name in sorted(last)]
    for run in runs:
        own = run_folder(results, run.cell, run.record.hash).name
        if run.folder.name != own:
            raise IntegrityError(
                f"{run.folder / RUN_FILE}: cell and hash are those of {own}, not of this folder; "
                f"{AGAIN}"
            )
    if any(run.record.evaluation.split == "validation" for run in runs):
        raise UsageError(
            f"{results}: runs that chose values of an experiment, scored on the validation set; "
            f"no report is made of them, but of {results.parent}"
        )
    return runs


@dataclass(frozen=True)
class Table:
    """Run folders that an experiment's metrics.json names.

    Attributes:
        runs: of the last table.
        first_report: of the first report.
        ship: conditions of `slm-lora verdict`.
    """

    runs: tuple[str, ...]
    first_report: tuple[str, ...]
    ship: tuple[Condition, ...] = ()


def read_table(results: Path) -> Table | None:
    """What the last table of an experiment was made of; None before there is one.

    Raises:
        IntegrityError: metrics.json is broken.
    """
    path = results / METRICS_FILE
    try:
        metrics = parse_json(path.read_text(encoding="utf-8"))
        runs = tuple(_folder_names([run["folder"] for run in metrics["runs"]]))
        # Files of before there was the record name their own runs.
        first_report = tuple(_folder_names(metrics.get("first_report") or [])) or runs
        return Table(runs, first_report, parse_ship(metrics.get("ship") or {}))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise IntegrityError(
            f"{path}: broken ({reason}), and it lists the runs of the first report; restore it, "
            "or remove it to start over"
        ) from error


def _folder_names(names: Any) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("run folders are not a list of names")
    return names


@contextmanager
def new_run(results: Path, cell: str, identity: str, record: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to put a run's files in; it appears under its name, with run.json, at the end."""
    with atomic_folder(run_folder(results, cell, identity)) as folder:
        yield folder
        whole = {"format": RUN_FORMAT, "cell": cell, "hash": identity, **record}
        (folder / RUN_FILE).write_text(to_json(whole), encoding="utf-8")


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    lines = (json.dumps(record, separators=(",", ":"), allow_nan=False) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def to_json(value: Any) -> str:
    """Indented JSON for people and programs; NaN is not JSON and is refused."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
