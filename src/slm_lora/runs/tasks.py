"""Results of a run in standard tasks, per document: ``tasks/<task>/<run folder>.jsonl`` beside
``runs/``.

The first line holds the settings that they were computed with, the metrics, and the SHA-256 of the
other lines, one per document. Texts of the documents are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from slm_lora.errors import IntegrityError
from slm_lora.records import RowScore
from slm_lora.runs.checked_lines import read_lines, write_lines
from slm_lora.runs.metrics import add_task_metric, task_metric_name

TASKS_FORMAT = 1


@dataclass(frozen=True, slots=True)
class DocumentResult:
    """A run's responses to one document of a task, and its values.

    Attributes:
        task: of lm-eval; a group has several.
        document: its number there.
        hash: SHA-256 of the document, by lm-eval.
        responses: one per request: log-likelihood (nats) and whether it is the greedy text, or a
            generated text.
        values: numerator and denominator of each metric; one without a value is missing.
    """

    task: str
    document: int
    hash: str
    responses: list[Any]
    values: Mapping[str, tuple[float, float]]

    @property
    def row_id(self) -> str:
        """Equal for all runs."""
        return f"{self.task}/{self.document}/{self.hash[:16]}"


class TaskMetricRecord(BaseModel):
    """A metric of a task, as lm-eval defines it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    higher_is_better: bool
    unit: str


class TaskHeader(BaseModel):
    """The first line: run, task, settings, and metrics by name."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: int
    run: str
    task: str
    settings: dict[str, Any]
    metrics: dict[str, TaskMetricRecord]
    sha256: str = ""


def task_file(run_folder: Path, task: str) -> Path:
    """The file of a run's results in a task; the run is ``<results>/runs/<name>``."""
    return run_folder.parent.parent / "tasks" / task / f"{run_folder.name}.jsonl"


def write_task(
    path: Path,
    run: str,
    task: str,
    settings: Mapping[str, Any],
    metrics: Mapping[str, TaskMetricRecord],
    results: Sequence[DocumentResult],
) -> None:
    """Write results; ``run`` is the run's hash."""
    header = TaskHeader(
        format=TASKS_FORMAT, run=run, task=task, settings=dict(settings), metrics=dict(metrics)
    )
    write_lines(path, header, results)


def read_task(path: Path) -> tuple[TaskHeader, list[DocumentResult]] | None:
    """What `write_task` wrote; None without a file.

    Raises:
        IntegrityError: the file is broken.
    """
    return read_lines(path, TaskHeader, TASKS_FORMAT, _results)


def _results(values: list[Any]) -> list[DocumentResult]:
    results = [_result(value) for value in values]
    if len({result.row_id for result in results}) < len(results):
        raise ValueError("a document twice")
    return results


def _result(line: Any) -> DocumentResult:
    if not isinstance(line, dict) or set(line) != {field.name for field in fields(DocumentResult)}:
        raise ValueError("a line has other keys")
    values = {
        name: (float(first), float(second)) for name, (first, second) in line["values"].items()
    }
    if not all(map(math.isfinite, (number for pair in values.values() for number in pair))):
        raise ValueError("a value is no finite number")
    return DocumentResult(**{**line, "values": values})


def read_documents(run_folder: Path, run: str) -> dict[str, tuple[RowScore, ...]]:
    """Documents of all tasks that a run has results of, by task, as rows with the values of its
    metrics. Equal documents are one group.

    Raises:
        IntegrityError: a file is broken, or of another run.
    """
    documents = {}
    for path in sorted((run_folder.parent.parent / "tasks").glob(f"*/{run_folder.name}.jsonl")):
        there = read_task(path)
        assert there is not None, "found above"
        header, results = there
        if header.run != run or header.task != path.parent.name:
            raise IntegrityError(f"{path}: of another run or task; remove it")
        for name, metric in header.metrics.items():
            add_task_metric(header.task, name, metric.higher_is_better, metric.unit)
        documents[header.task] = tuple(_row(header.task, result) for result in results)
    return documents


def _row(task: str, result: DocumentResult) -> RowScore:
    values = {task_metric_name(task, name): value for name, value in result.values.items()}
    return RowScore(
        result.row_id, result.hash, result.task, f"task {task}", 0.0, 0, 0, 0.0, 0, 0, values
    )
