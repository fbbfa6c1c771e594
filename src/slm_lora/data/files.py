"""Rows of a local file: JSONL, JSON, CSV or Parquet; what cannot be read is named by its line."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from slm_lora import storage
from slm_lora.data import formats
from slm_lora.data.formats import RowError
from slm_lora.errors import DataError, StorageError
from slm_lora.recipe.schema import DataSection

ROW_BYTES = 10_000_000
"""Longest row that is read, in bytes of UTF-8; anything longer is a file gone wrong."""

_SPACE = re.compile(r"[ \t\r\n]*")

Record = dict[str, Any]
Numbered = tuple[int, Record | RowError]
"""A record, or why there is none, under the number that a message shows."""


@dataclass(frozen=True, slots=True)
class Table:
    """What a reader found. ``columns`` and ``lists`` (those that hold lists) are None where only
    the records tell."""

    records: list[Numbered]
    columns: frozenset[str] | None = None
    lists: frozenset[str] = frozenset()


def check_size(size: int) -> None:
    """Refuse a row of ``size`` bytes that is over `ROW_BYTES`.

    Raises:
        RowError: it is.
    """
    if size > ROW_BYTES:
        raise RowError(f"row of {size / 1e6:.1f} MB (at most {ROW_BYTES / 1e6:.0f} MB)")


def read_file(path: Path, section: DataSection) -> tuple[Table, str]:
    """What is in the file, and ``sha256:…`` of its bytes.

    Raises:
        DataError: no reader for the suffix, or a file that is broken as a whole.
        StorageError: the file cannot be read.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path.name}: not one of the suffixes that are read: {_SUFFIXES}")
    try:
        return reader(path, section), f"sha256:{storage.sha256_file(path)}"
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error


def _json_decoder(faults: list[str]) -> json.JSONDecoder:
    """A decoder that notes in ``faults`` what Python accepts and JSON does not. It notes rather
    than raises, so that the end of the value is found and reading can go on behind it."""

    def unique_keys(pairs: list[tuple[str, Any]]) -> Record:
        value: Record = {}
        for key, item in pairs:
            if key in value:
                faults.append(f"duplicate key {key[:40]!a}")
            value[key] = item
        return value

    def no_constant(literal: str) -> None:
        faults.append(f"{literal} is not JSON")

    return json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=no_constant)


def _record(value: object, faults: list[str]) -> Record | RowError:
    if faults:
        return RowError(faults[0])
    return value if isinstance(value, dict) else RowError("not a JSON object")


def _jsonl(path: Path, section: DataSection) -> Table:
    faults: list[str] = []
    decoder = _json_decoder(faults)

    def parse(line: bytes, size: int, first: bool) -> Record | RowError:
        faults.clear()
        try:
            check_size(size)
            text = line.decode("utf-8-sig" if first else "utf-8")
            if text.startswith("\ufeff"):
                return RowError("byte order mark inside the file")
            return _record(decoder.decode(text), faults)
        except RowError as error:
            return error
        except UnicodeDecodeError:
            return RowError("invalid UTF-8")
        except (ValueError, RecursionError):  # a number of 5,000 digits is a plain ValueError
            return RowError("bad JSON")

    with path.open("rb") as handle:
        return Table(
            [
                (number, parse(line, size, number == 1))
                for number, (line, size) in enumerate(_lines(handle), start=1)
                if line.strip()
            ]
        )


def _lines(handle: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Lines with their sizes in bytes, without the line end; of a line too long only its
    beginning, so that a file without line ends does not fill the memory."""
    while line := handle.readline(ROW_BYTES + 2):
        size, end = len(line), line
        while not end.endswith(b"\n") and (end := handle.readline(1 << 20)):
            size += len(end)
        yield line, size - (end.endswith(b"\n"))


def _json(path: Path, section: DataSection) -> Table:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path.name}:{line}: invalid UTF-8; save the file as UTF-8") from None

    def after_space(position: int) -> int:
        space = _SPACE.match(text, position)
        return space.end() if space else position

    def broken(position: int) -> DataError:
        # Where the list is broken, nobody knows where the next item begins: nothing to skip.
        line = text.count("\n", 0, position) + 1
        return DataError(f"{path.name}:{line}: bad JSON; mend the file")

    position = after_space(0)
    if position == len(text):
        return Table([])
    if text[position] != "[":
        raise DataError(f"{path.name}: not a list of objects; one object a line is named .jsonl")
    faults: list[str] = []
    decoder = _json_decoder(faults)
    records: list[Numbered] = []
    position = after_space(position + 1)
    more = not text.startswith("]", position)
    while more:
        faults.clear()
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else position
            raise broken(at) from None
        records.append((len(records) + 1, _record(value, faults)))
        position = after_space(end)
        more = text.startswith(",", position)
        if more:
            position = after_space(position + 1)
    if not text.startswith("]", position) or after_space(position + 1) < len(text):
        raise broken(position)
    return Table(records)


def _csv(path: Path, section: DataSection) -> Table:
    records: list[Numbered] = []
    header: list[str] = []
    # Bytes that are no UTF-8 become surrogates, which valid UTF-8 cannot hold: they are found
    # in their row, where strict decoding would stop at a place unknown.
    with (
        path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as handle,
        _csv_fields_of_any_size(),
    ):
        reader = csv.reader(handle, strict=True)
        line = 1
        try:
            for fields in reader:
                if not header:
                    header = fields
                    if len(set(header)) < len(header):
                        raise DataError(f"{path.name}:{line}: two columns have the same name")
                elif fields:
                    records.append((line, _csv_record(header, fields)))
                line = reader.line_num + 1
        except csv.Error as error:
            # An unclosed quote changes the meaning of all that follows: nothing to skip.
            raise DataError(f"{path.name}:{line}: broken CSV ({error}); mend the file") from None
    return Table(records)


def _csv_record(header: list[str], fields: list[str]) -> Record | RowError:
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:
        return RowError("invalid UTF-8")
    if len(fields) != len(header):
        count = f"{len(fields)} field{'s' * (len(fields) > 1)}"
        return RowError(f"{count} where the header has {len(header)}")
    return dict(zip(header, fields, strict=True))


@contextmanager
def _csv_fields_of_any_size() -> Iterator[None]:
    # A field too long would end the reading (ours only ends the row). The limit belongs to the
    # whole process: it is put back as it was.
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path, section: DataSection) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            read = formats.wanted(file.schema_arrow.names, section)
            batches = list(file.iter_batches(batch_size=1024, columns=read))
            return arrow_table(file.schema_arrow, batches, section, first=1)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the disk's, not Arrow's
        raise DataError(f"{path.name}: broken, or not a Parquet file; write it again") from error


def arrow_table(schema: Any, batches: list[Any], section: DataSection, first: int) -> Table:
    """Rows of record batches, numbered from ``first``; only columns that a format reads."""
    import pyarrow

    lists = frozenset(
        field.name
        for field in schema
        if pyarrow.types.is_list(field.type) or pyarrow.types.is_large_list(field.type)
    )
    rows = itertools.chain.from_iterable(map(_batch_rows, batches))
    return Table(list(enumerate(rows, start=first)), frozenset(schema.names), lists)


def _batch_rows(batch: Any) -> list[Record | RowError]:
    try:
        rows: list[Record | RowError] = batch.to_pylist()
        return rows
    except (ValueError, OverflowError) as error:
        if len(batch) > 1:
            return [row for i in range(len(batch)) for row in _batch_rows(batch.slice(i, 1))]
        invalid = isinstance(error, UnicodeDecodeError)
        return [RowError("invalid UTF-8" if invalid else "a value cannot be read")]


READERS: dict[str, Callable[[Path, DataSection], Table]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
_SUFFIXES = ", ".join(READERS)
