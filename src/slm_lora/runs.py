"""Run folders: one finished cell each, complete or absent, known by a hash of its inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_lora.errors import IntegrityError
from slm_lora.storage import atomic_folder

RUN_FORMAT = 1
"""Version of run.json; raised when results of the same inputs would no longer compare."""

RUN_FILE, SCORES_FILE, STEPS_FILE = "run.json", "scores.parquet", "steps.jsonl"
METRICS_FILE = "metrics.json"
"""Beside the run folders: what the last table was made of."""


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run as it lies on the disk."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def cell(self) -> str:
        """Name of the cell, ``base`` for the base model."""
        return str(self.record["cell"])

    def steps(self) -> list[dict[str, Any]]:
        """The optimizer steps of its training; none for the base.

        Raises:
            IntegrityError: the file is missing or broken.
        """
        path = self.folder / STEPS_FILE
        if "training" not in self.record:
            return []
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            return [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise IntegrityError(f"{path}: broken ({error}); delete the run's folder") from error

    @property
    def scores_path(self) -> Path:
        """Per-row scores on the test set."""
        return self.folder / SCORES_FILE


def content_hash(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


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
    run = read_run(folder)
    if run.record["hash"] != identity:
        raise IntegrityError(f"{folder}: holds another run; move it away")
    return run


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        IntegrityError: run.json or the scores are missing or broken.
    """
    try:
        record = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        complete = record["format"] == RUN_FORMAT and isinstance(record["hash"], str)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{folder}: no whole run in it ({error}); delete the folder"
        ) from error
    if not complete or not (folder / SCORES_FILE).is_file():
        raise IntegrityError(f"{folder}: incomplete, or of another version; delete the folder")
    return Run(folder, record)


def list_runs(results: Path) -> list[Run]:
    """The runs of an experiment's last table; all that are there, before there is a table."""
    folders = sorted(path.parent for path in (results / "runs").glob(f"*/{RUN_FILE}"))
    try:
        metrics = json.loads((results / METRICS_FILE).read_text(encoding="utf-8"))
        last = {str(run["folder"]) for run in metrics["runs"]}
    except (OSError, ValueError, KeyError, TypeError):
        last = {folder.name for folder in folders}
    return [read_run(folder) for folder in folders if folder.name in last]


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
