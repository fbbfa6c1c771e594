"""Rows of Parquet files and of other Arrow tables."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, BinaryIO

from slm_lora.config.schema import DataSection
from slm_lora.data import column_kinds, formats
from slm_lora.data.table import InvalidUtf8Error, Location, Record, Table
from slm_lora.data.text import RowError
from slm_lora.errors import DataError


def read_parquet(handle: BinaryIO, label: str, section: DataSection, strings: bool) -> Table:
    """Read a Parquet file; rows are numbered from 1.

    Raises:
        DataError: the file is broken or not Parquet.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(handle) as file:
            columns = formats.columns_to_decode(file.schema_arrow.names, section)
            batches = file.iter_batches(batch_size=1024, columns=columns)
            return arrow_table(file.schema_arrow, batches, section, label, first=1)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # an error of the disk, not of Arrow
        raise DataError(f"{label}: broken, or not a Parquet file; write it again") from error


def arrow_table(
    schema: Any, batches: Iterable[Any], section: DataSection, label: str, first: int
) -> Table:
    """Convert record batches to rows, numbered from ``first``."""
    lists = frozenset(field.name for field in schema if _is_list(field.type))
    rows = itertools.chain.from_iterable(_batch_rows(_without_media(batch)) for batch in batches)
    records = [
        (Location(label, "row", number), row) for number, row in enumerate(rows, start=first)
    ]
    return Table(records, frozenset(schema.names), lists)


def _is_list(data_type: Any) -> bool:
    from pyarrow import types

    return bool(
        types.is_list(data_type)
        or types.is_large_list(data_type)
        or types.is_fixed_size_list(data_type)
        or types.is_list_view(data_type)
        or types.is_large_list_view(data_type)
    )


def _without_media(batch: Any) -> Any:
    """Replace images, audio and video by true: only their presence is checked."""
    import pyarrow
    import pyarrow.compute as compute

    columns = []
    for field, column in zip(batch.schema, batch.columns, strict=True):
        is_text = pyarrow.types.is_string(field.type) or pyarrow.types.is_large_string(field.type)
        if column_kinds.is_media(field.name) and not is_text:
            present = column.is_valid()
            if pyarrow.types.is_list(field.type) or pyarrow.types.is_large_list(field.type):
                non_empty = compute.greater(compute.list_value_length(column), 0)
                present = compute.and_kleene(present, non_empty)
            column = compute.if_else(present, True, pyarrow.scalar(None, pyarrow.bool_()))
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
