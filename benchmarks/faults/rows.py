"""Fifteen kinds of malformed rows: each must be refused with its line, and counted if skipped."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from slm_lora.config.schema import DataSection
from slm_lora.data.sources import BadRow, MalformedRowsError, read_rows

GOOD = {"instruction": "Count.", "response": "One."}

LINES: dict[str, bytes] = {
    "bad JSON": b'{"instruction": "a',
    "byte order mark": b'\xef\xbb\xbf{"instruction": "a", "response": "b"}',
    "not an object": b'["a", "b"]',
    "missing field": b'{"instruction": "a"}',
    "null": b'{"instruction": "a", "response": null}',
    "wrong type": b'{"instruction": "a", "response": 1}',
    "empty response": b'{"instruction": "a", "response": " "}',
    "invalid UTF-8": b'{"instruction": "a", "response": "\xff"}',
    "NUL": b'{"instruction": "a", "response": "\\u0000"}',
    "lone surrogate": b'{"instruction": "a", "response": "\\ud83d"}',
    "NaN literal": b'{"instruction": "a", "response": NaN}',
    "duplicate key": b'{"instruction": "a", "response": "b", "response": "c"}',
    "row over 10 MB": b'{"instruction": "a", "response": "' + b"x" * 10_000_001 + b'"}',
}
KINDS = (*LINES, "CSV type drift", "Parquet type drift")
AT = 12
"""Line or item of the malformed row."""


def detected(kind: str, folder: Path) -> bool:
    """Whether a file with such a row is refused with the line, and the row skipped on request."""
    path = _WRITERS.get(kind, _jsonl)(kind, folder)
    section = DataSection(name=str(path))
    try:
        read_rows(section)
        return False
    except MalformedRowsError as error:
        reason = error.bad_rows[0].reason
        place = f"{path.name} row {AT}" if path.suffix == ".parquet" else f"{path.name}:{AT}"
        expected = (BadRow(place, reason),)
        if error.bad_rows != expected or f"{place}: {reason}" not in str(error):
            return False
    skipped = read_rows(section.model_copy(update={"on_bad_row": "skip"}))
    return skipped.bad_rows == expected


def _jsonl(kind: str, folder: Path) -> Path:
    lines = [json.dumps({**GOOD, "instruction": f"Count {n}."}).encode() for n in range(20)]
    lines[AT - 1] = LINES[kind]
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


def _csv(kind: str, folder: Path) -> Path:
    """A row with an additional field, from an unquoted comma."""
    path = folder / "rows.csv"
    rows: list[list[Any]] = [["instruction", "response"]]
    rows += [[f"Count {n}.", "One."] for n in range(20)]
    rows[AT - 1] = ["Count.", "One", " two."]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def _parquet(kind: str, folder: Path) -> Path:
    """Messages in a typed column, one with null content."""
    path = folder / "rows.parquet"
    chats = [
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "One."}]
        for n in range(20)
    ]
    chats[AT - 1][1]["content"] = None  # type: ignore[assignment]
    pq.write_table(pa.table({"messages": chats}), path)
    return path


_WRITERS: dict[str, Callable[[str, Path], Path]] = {
    "CSV type drift": _csv,
    "Parquet type drift": _parquet,
}
