"""Per-row scores of a run on disk, as Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from slm_lora.errors import IntegrityError
from slm_lora.records import RowScore
from slm_lora.runtime.storage import atomic_path


def write_scores(scores: Sequence[RowScore], path: Path) -> None:
    """Write scores as Parquet, sorted by row id; losses are float64."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[object]] = {}
    for each in sorted(scores, key=lambda s: s.row_id):
        for name, value in asdict(each).items():
            columns.setdefault(name, []).append(value)
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
        return [RowScore(**row) for row in pq.read_table(path).to_pylist()]
    except (pa.ArrowException, TypeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise IntegrityError(f"{path}: cannot be read as scores: {reason}") from error
