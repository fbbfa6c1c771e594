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
TOLD_APART_BY = ("filter", "epoch")
"""Columns by which lm-eval and Inspect write several rows of one id."""
DOCUMENT_HASH = "doc_hash"
"""Column of lm-eval: the same id of another task has another one."""
LARGEST = 1e300
"""Sums of larger numbers could overflow."""
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
    """A row's numerator, denominator, group, and hash of its document where the file has one."""

    value: float
    weight: float
    group: str
    document: str = ""


def read_score_file(path: Path, columns: Columns) -> dict[str, Scored]:
    """Rows by their id.

    Raises:
        UsageError: the file cannot be read, lacks a column, has no number where one is needed, or
            an id twice.
    """
    rows: dict[str, Scored] = {}
    origin: dict[str, Mapping[str, Any]] = {}
    for number, row in enumerate(_read(path, columns), start=1):
        where = f"{path}, row {number}"
        if any(str(_get(row, key, where)) != value for key, value in (columns.where or {}).items()):
            continue
        name = _label(row, columns.id, where)
        if name in rows:
            raise UsageError(
                f"{where}: {columns.id} = {_short(name)} a second time{_unlike(origin[name], row)}"
            )
        weight = _number(row, columns.weight, where) if columns.weight else 1.0
        if weight <= 0:
            raise UsageError(f"{where}: {columns.weight} = {weight:g}, must be above zero")
        group = _label(row, columns.group, where) if columns.group else name
        document = str(row.get(DOCUMENT_HASH) or "")
        rows[name] = Scored(_number(row, columns.value, where), weight, group, document)
        origin[name] = row
    if not rows:
        raise UsageError(f"{path}: no row{' that --where takes' if columns.where else ''}")
    return rows


def _read(path: Path, columns: Columns) -> Sequence[Mapping[str, Any]]:
    """Rows of a file, as mappings."""
    try:
        rows = _parsed(path, columns)
    except (OSError, ValueError, RecursionError, csv.Error) as error:  # pyarrow's are ValueErrors
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{path}: cannot be read: {reason}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UsageError(f"{path}, row {number}: not an object of names and values")
    return rows


def _parsed(path: Path, columns: Columns) -> list[Any]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path, columns)
    if suffix == ".csv":
        return _csv_rows(path)
    if suffix == ".jsonl":
        return _json_lines(path)
    if suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        samples = content.get("samples") if isinstance(content, dict) else content
        if not isinstance(samples, list):
            raise ValueError("neither a list of rows nor an Inspect log with samples")
        return samples
    if suffix == ".eval":
        raise ValueError("a packed Inspect log; `inspect log convert --to json` unpacks it")
    raise ValueError(f"not one of {', '.join(SUFFIXES)}")


def _parquet_rows(path: Path, columns: Columns) -> list[Any]:
    """Of the columns that are needed, and those of short texts that tell rows apart."""
    import pyarrow.parquet as pq

    named = [columns.id, columns.value, columns.group, columns.weight, *(columns.where or {})]
    needed = {*named, *(name.split(".")[0] for name in named), *TOLD_APART_BY, DOCUMENT_HASH}
    there = pq.read_schema(path).names
    chosen = [name for name in there if name in needed]
    rows: list[Any] = pq.read_table(path, columns=chosen or there).to_pylist()
    return rows


def _csv_rows(path: Path) -> list[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        names = reader.fieldnames or []
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two columns are named {twice[0]!r}")
        rows = []
        for row in reader:
            if None in row:
                raise ValueError(f"line {reader.line_num} has more cells than the header has names")
            rows.append(row)
        return rows


def _json_lines(path: Path) -> list[Any]:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise ValueError(f"line {number} is no JSON: {error}") from error
    return rows


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


def _label(row: Mapping[str, Any], key: str, where: str) -> str:
    value = _get(row, key, where)
    if value is None or not str(value).strip():
        raise UsageError(f"{where}: {key} is empty")
    return str(value)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _number(row: Mapping[str, Any], key: str, where: str) -> float:
    value = _get(row, key, where)
    if isinstance(value, str) and value in _GRADES:
        return _GRADES[value]
    try:
        number = math.nan if isinstance(value, str) and "_" in value else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST:
        raise UsageError(f"{where}: {key} = {_short(repr(value))} is no number that can be summed")
    return number


def _unlike(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Short texts that tell two rows of one id apart: lm-eval writes a row per filter."""
    for key in (*TOLD_APART_BY, *first):
        if key not in first:
            continue
        own, other = first[key], second.get(key)
        if own != other and all(len(str(v)) < 40 for v in (own, other)):
            return f" ({key}: {own}, {other}); choose: --where {key}={own}"
    return ""
