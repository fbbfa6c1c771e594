"""Score files of other programs: a number per row with an id, as JSONL, JSON, CSV or Parquet.

lm-evaluation-harness (`--log_samples`) writes JSONL with ``doc_id`` and one column per metric;
Inspect writes JSON with ``samples``, whose ``scores.<scorer>.value`` is a number or a letter.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_lora.errors import UsageError

_GRADES = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}
"""Inspect's letters: correct, partial, incorrect, no answer."""
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns to read; a dot goes into nested objects.

    Attributes:
        id: of the row.
        value: the number.
        group: related rows have one value here; empty: every row is a group of its own.
        weight: denominator; empty: 1 for each row.
        where: rows to take: column and the text of its value.
    """

    id: str
    value: str
    group: str = ""
    weight: str = ""
    where: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """A row's numerator, denominator and group."""

    value: float
    weight: float
    group: str


def read_score_file(path: Path, columns: Columns) -> dict[str, Scored]:
    """Rows by their id.

    Raises:
        UsageError: the file cannot be read, lacks a column, has no number where one is needed, or
            an id twice.
    """
    rows: dict[str, Scored] = {}
    origin: dict[str, Mapping[str, Any]] = {}
    for number, row in enumerate(_read(path), start=1):
        where = f"{path}, row {number}"
        if any(str(_get(row, key, where)) != value for key, value in (columns.where or {}).items()):
            continue
        name = str(_get(row, columns.id, where))
        if name in rows:
            raise UsageError(
                f"{where}: {columns.id} = {name} a second time{_unlike(origin[name], row)}"
            )
        weight = _number(row, columns.weight, where) if columns.weight else 1.0
        if weight <= 0:
            raise UsageError(f"{where}: {columns.weight} = {weight:g}, must be above zero")
        group = str(_get(row, columns.group, where)) if columns.group else name
        rows[name] = Scored(_number(row, columns.value, where), weight, group)
        origin[name] = row
    if not rows:
        raise UsageError(f"{path}: no row{' that --where takes' if columns.where else ''}")
    return rows


def _read(path: Path) -> Sequence[Mapping[str, Any]]:
    """Rows of a file, as mappings."""
    try:
        rows = _parsed(path)
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's errors are among these
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{path}: cannot be read: {reason}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UsageError(f"{path}, row {number}: not an object of names and values")
    return rows


def _parsed(path: Path) -> list[Any]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        rows: list[Any] = pq.read_table(path).to_pylist()
        return rows
    if suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    if suffix == ".jsonl":
        with path.open(encoding="utf-8-sig") as file:
            return [json.loads(line) for line in file if line.strip()]
    if suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        samples = content.get("samples") if isinstance(content, dict) else content
        if not isinstance(samples, list):
            raise ValueError("neither a list of rows nor an Inspect log with samples")
        return samples
    if suffix == ".eval":
        raise ValueError("a packed Inspect log; `inspect log convert --to json` unpacks it")
    raise ValueError(f"not one of {', '.join(SUFFIXES)}")


def _get(row: Mapping[str, Any], key: str, where: str) -> Any:
    if key in row:  # lm-eval has names with dots and commas
        return row[key]
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            known = ", ".join(map(str, row)) or "none"
            raise UsageError(f"{where}: no column {key} (columns: {known})")
        value = value[part]
    return value


def _number(row: Mapping[str, Any], key: str, where: str) -> float:
    value = _get(row, key, where)
    if isinstance(value, str) and value in _GRADES:
        return _GRADES[value]
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{where}: {key} = {value!r} is no number")
    return number


def _unlike(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Short texts that tell two rows of one id apart: lm-eval writes a row per filter."""
    for key in first:
        own, other = first[key], second.get(key)
        if own != other and all(isinstance(v, str) and len(v) < 40 for v in (own, other)):
            return f" ({key}: {own}, {other}); choose: --where {key}={own}"
    return ""
