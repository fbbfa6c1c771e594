"""Rows of Parquet files and of other Arrow tables."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, BinaryIO

from slm_lora.config.schema import DataSection
from slm_lora.data import column_kinds, formats
from slm_lora.data.table import InvalidUtf8Error, Place, Record, Table
from slm_lora.data.text import RowError
from slm_lora.errors import DataError


def read_parquet(handle: BinaryIO, label: str, section: DataSection, strings: bool) -> Table:
    """The rows of a Parquet file, numbered from 1.

    Raises:
        DataError: it is none, or broken.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(handle) as file:
            read = formats.wanted(file.schema_arrow.names, section)
            batches = file.iter_batches(batch_size=1024, columns=read)
            return arrow_table(file.schema_arrow, batches, section, label, first=1)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the disk's, not Arrow's
        raise DataError(f"{label}: broken, or not a Parquet file; write it again") from error


def arrow_table(
    schema: Any, batches: Iterable[Any], section: DataSection, label: str, first: int
) -> Table:
    """Rows of record batches, numbered from ``first``; only columns that are looked at."""
    lists = frozenset(field.name for field in schema if _is_list(field.type))
    rows = itertools.chain.from_iterable(_batch_rows(_light(batch)) for batch in batches)
    records = [(Place(label, "row", number), row) for number, row in enumerate(rows, start=first)]
    return Table(records, frozenset(schema.names), lists)


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )


def _light(batch: Any) -> Any:
    """The batch, with true in place of pictures and sounds: it matters only that there are any."""
    import pyarrow
    import pyarrow.compute as compute

    columns = []
    for field, column in zip(batch.schema, batch.columns, strict=True):
        text = pyarrow.types.is_string(field.type) or pyarrow.types.is_large_string(field.type)
        if column_kinds.heavy(field.name) and not text:
            there = column.is_valid()
            if pyarrow.types.is_list(field.type) or pyarrow.types.is_large_list(field.type):
                filled = compute.greater(compute.list_value_length(column), 0)
                there = compute.and_kleene(there, filled)
            column = compute.if_else(there, True, pyarrow.scalar(None, pyarrow.bool_()))
        columns.append(column)
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _batch_rows(batch: Any) -> list[Record | RowError]:
    try:
        rows: list[Record | RowError] = batch.to_pylist()
        return rows
    except (ValueError, OverflowError) as error:
        if len(batch) > 1:
            return [row for i in range(len(batch)) for row in _batch_rows(batch.slice(i, 1))]
        if isinstance(error, UnicodeDecodeError):
            return [InvalidUtf8Error()]
        return [RowError("a value cannot be read")]
