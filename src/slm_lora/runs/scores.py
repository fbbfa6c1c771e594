"""Per-row scores of a run on disk, as Parquet."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from slm_lora.errors import IntegrityError
from slm_lora.records import RowScore
from slm_lora.runtime.storage import atomic_path


def write_scores(scores: Sequence[RowScore], path: Path) -> None:
    """Write scores as Parquet, sorted by row id; numbers are float64. Values of further metrics are
    two columns each, ``<name>.numerator`` and ``<name>.denominator``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[object]] = {}
    names = sorted({name for score in scores for name in score.values})
    for score in sorted(scores, key=lambda score: score.row_id):
        for key, value in asdict(score).items():
            if key != "values":
                columns.setdefault(key, []).append(value)
        for name in names:
            numerator, denominator = score.values.get(name, (0.0, 0.0))
            columns.setdefault(f"{name}{_NUMERATOR}", []).append(float(numerator))
            columns.setdefault(f"{name}{_DENOMINATOR}", []).append(float(denominator))
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")


def read_scores(path: Path) -> list[RowScore]:
    """Read what `write_scores` wrote.

    Raises:
        IntegrityError: the file is broken or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        _check_columns(table.column_names)
        scores = [_row_score(row) for row in table.to_pylist()]
    except (pa.ArrowException, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise IntegrityError(f"{path}: cannot be read as scores: {reason}") from error
    if not scores:
        raise IntegrityError(f"{path}: has no rows; {_RESTORE}")
    seen: set[str] = set()
    for score in scores:
        if reason := _fault(score, seen):
            raise IntegrityError(f"{path}: row {str(score.row_id)[:8]} {reason}; {_RESTORE}")
        seen.add(score.row_id)
    return scores


_RESTORE = "restore the file, or remove the run's folder and run the experiment again"


def _fault(score: RowScore, seen: set[str]) -> str:
    """Why a score cannot be right; empty if it can."""
    if score.row_id in seen:
        return "is there twice"
    counts = (score.tokens_all, score.tokens_response, score.bytes_all, score.bytes_response)
    if not all(type(count) is int and count >= 0 for count in counts):
        return "has no counts of tokens and bytes"
    if score.tokens_response > score.tokens_all:
        return "has more tokens in its response than in all"
    numbers: list[float] = [score.nll_all, score.nll_response]
    numbers += [number for pair in score.values.values() for number in pair]
    if not all(isinstance(number, float | int) and math.isfinite(number) for number in numbers):
        return "has a score that is no finite number"
    for nll, tokens in ((score.nll_all, counts[0]), (score.nll_response, counts[1])):
        if nll < -1e-3 * tokens or (nll and not tokens):  # below zero by rounding only
            return "has a loss below zero, or without tokens"
    if not all(
        isinstance(text, str)
        for text in (score.row_id, score.group_id, score.category, score.split)
    ):
        return "has an id, group, category or split that is no text"
    return ""


_NUMERATOR, _DENOMINATOR = ".numerator", ".denominator"


def _check_columns(columns: Sequence[str]) -> None:
    """Raise ValueError for columns other than those that `write_scores` writes."""
    known = {field.name for field in fields(RowScore)} - {"values"}
    if missing := sorted(known - set(columns)):
        raise ValueError(f"no column {', '.join(missing)}")
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise ValueError(f"column {twice[0]} twice")
    for name in set(columns) - known:
        stem = name.removesuffix(_NUMERATOR).removesuffix(_DENOMINATOR)
        if name == stem or not {f"{stem}{_NUMERATOR}", f"{stem}{_DENOMINATOR}"} <= set(columns):
            raise ValueError(f"column {name} belongs to no metric")


def _row_score(row: dict[str, Any]) -> RowScore:
    names = [key.removesuffix(_NUMERATOR) for key in row if key.endswith(_NUMERATOR)]
    values = {
        name: (row.pop(f"{name}{_NUMERATOR}"), row.pop(f"{name}{_DENOMINATOR}")) for name in names
    }
    return RowScore(**row, values=values)
