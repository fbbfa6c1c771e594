"""Read CSV and TSV files, as spreadsheets and data frames write them."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from slm_lora.config.schema import DataSection
from slm_lora.data.formats import FIELDS
from slm_lora.data.table import InvalidUtf8Error, LocatedRecord, Location, Record, Table
from slm_lora.data.text import RowError
from slm_lora.errors import DataError

_SEPARATORS = (",", ";", "\t", "|")


def read_csv(handle: BinaryIO, label: str, section: DataSection, strings: bool) -> Table:
    """Read a file whose first line names the columns.

    Raises:
        DataError: the CSV syntax is broken, or column names are empty or equal.
    """
    records: list[LocatedRecord] = []
    header: list[str] = []
    # Invalid bytes become surrogates, which are then detected in their row; strict decoding
    # would fail without its line number.
    text = io.TextIOWrapper(handle, encoding="utf-8-sig", errors="surrogateescape", newline="")
    with _unlimited_field_size():
        first = text.readline()
        skipped = 0
        if len(first.rstrip("\r\n")) == 5 and first.lower().startswith("sep="):  # by Excel
            separator, first, skipped = first[4], "", 1
        else:
            separator = _separator(first, section)
        reader = csv.reader(
            itertools.chain([first] if first else [], text), delimiter=separator, strict=True
        )
        line = 1 + skipped
        try:
            for fields in reader:
                if not header:
                    header = fields
                    if len(set(header)) < len(header):
                        fault = "no name" if header.count("") > 1 else "the same name"
                        raise DataError(f"{label}:{line}: two columns have {fault}")
                    if not _is_utf8(header):
                        return Table([(Location(label, "line", line), InvalidUtf8Error())])
                elif fields:
                    records.append((Location(label, "line", line), _record(header, fields)))
                line = skipped + reader.line_num + 1
        except csv.Error as error:
            # An unclosed quote changes the meaning of all later rows: none can be skipped.
            reason = str(error).replace("\t", "a tab")
            raise DataError(f"{label}:{line}: broken CSV ({reason}); fix the file") from None
    name = {";": "semicolons", "\t": "tabs", "|": "bars"}.get(separator)
    notes = (f"{label}: columns are separated by {name}",) if name and records else ()
    return Table(records, notes=notes)


def _separator(header: str, section: DataSection) -> str:
    """Return the separator under which the header names a field, or else the most columns."""
    known = FIELDS | {column for column in section.columns.values() if column}

    def names(separator: str) -> list[str]:
        return next(csv.reader([header], delimiter=separator), [])

    for separator in _SEPARATORS:
        if not known.isdisjoint(names(separator)):
            return separator
    return max(_SEPARATORS, key=lambda separator: len(names(separator)))


def _is_utf8(fields: list[str]) -> bool:
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:
        return False
    return True


def _record(header: list[str], fields: list[str]) -> Record | RowError:
    if not _is_utf8(fields):
        return InvalidUtf8Error()
    if len(fields) != len(header):
        count = f"{len(fields)} field{'s' * (len(fields) > 1)}"
        return RowError(f"{count} where the header has {len(header)}")
    return dict(zip(header, fields, strict=True))


@contextmanager
def _unlimited_field_size() -> Iterator[None]:
    # Above csv's limit reading would stop; `check_size` refuses only the row. The limit is
    # global to the process, hence restored.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)
