"""Read JSON Lines and JSON files in the layouts that common tools write.

A JSON file may be a list of objects, concatenated objects, an object with one list of objects
below a key, or columns: an object of lists, or of objects by row number (pandas).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from io import BytesIO
from typing import Any, BinaryIO

from slm_lora.config.schema import DataSection
from slm_lora.data import table
from slm_lora.data.formats import FIELDS
from slm_lora.data.table import InvalidUtf8Error, LocatedRecord, Location, Record, Table
from slm_lora.data.text import RowError, printable_name
from slm_lora.errors import DataError

_SPACE = re.compile(r"[ \t\r\n]*")


def read_json_lines(handle: BinaryIO, label: str, section: DataSection, strings: bool) -> Table:
    """Read one object a line; a file with JSON of another layout is read by `read_json`."""
    first = handle.readline(table.ROW_BYTES + 2)
    start = first.removeprefix(b"\xef\xbb\xbf").strip()
    if start == b"{" or start.startswith(b"["):
        # A list, or objects over several lines, unless only the first line is broken.
        content = first + handle.read()
        rest = content[len(first) :].strip()
        broken_line = start == b"{" and (not rest or _is_json(rest.partition(b"\n")[0]))
        if not broken_line and not (rest and start != b"{" and _is_json(start)):
            return read_json(BytesIO(content), label, section, strings)
        return _lines(table.iter_lines(BytesIO(content)), label, strings)
    return _lines(table.iter_lines(handle, first), label, strings)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _decoder(faults: list[str]) -> json.JSONDecoder:
    """Make a decoder that collects in ``faults`` input that Python accepts and JSON forbids.

    It does not raise, so that the end of the value is known and reading can continue.
    """

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


def _record(value: object, faults: list[str], strings: bool) -> Record | RowError:
    if faults:
        return RowError(faults[0])
    if strings and isinstance(value, str):
        return {"text": value}
    return value if isinstance(value, dict) else RowError("not a JSON object")


def _lines(lines: Iterable[tuple[bytes, int]], label: str, strings: bool) -> Table:
    faults: list[str] = []
    decoder = _decoder(faults)

    def parse(line: bytes, size: int) -> Record | RowError:
        faults.clear()
        try:
            table.check_size(size)
            return _record(decoder.decode(table.decode_utf8(line)), faults, strings)
        except RowError as error:
            return error
        except (ValueError, RecursionError):  # a number of 5,000 digits is a plain ValueError
            return RowError("bad JSON")

    return Table(
        [
            (Location(label, "line", number), parse(line, size))
            for number, (line, size) in enumerate(lines, start=1)
            if line.strip()
        ]
    )


def read_json(handle: BinaryIO, label: str, section: DataSection, strings: bool) -> Table:
    """Read a JSON file.

    Raises:
        DataError: the file is broken, or its layout is unknown.
    """
    content = handle.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The rows cannot be separated: one error stands for the file.
        line = content.count(b"\n", 0, error.start) + 1
        return Table([(Location(label, "line", line), InvalidUtf8Error())])
    parser = _JsonParser(text, label, section, strings)
    begin = parser.skip_space(0)
    if begin == len(text):
        return Table([])
    if text[begin] == "[":
        return Table(parser.items(begin, to_end=True))
    if text[begin] != "{":
        raise DataError(f"{label}: not a list of objects")
    first, _, rest = content.removeprefix(b"\xef\xbb\xbf").strip().partition(b"\n")
    if rest and _is_json(first):
        return _lines(table.iter_lines(BytesIO(content)), label, strings)
    return parser.rows_of_object(begin)


class _JsonParser:
    """Parses a JSON text value by value."""

    def __init__(self, text: str, label: str, section: DataSection, strings: bool) -> None:
        self._text, self._label, self._strings = text, label, strings
        self._faults: list[str] = []
        self._decoder = _decoder(self._faults)
        self._fields = FIELDS | {column for column in section.columns.values() if column}

    def skip_space(self, position: int) -> int:
        space = _SPACE.match(self._text, position)
        return space.end() if space else position

    def _broken(self, position: int) -> DataError:
        # The start of the next item is unknown: no item can be skipped.
        line = self._text.count("\n", 0, position) + 1
        return DataError(f"{self._label}:{line}: bad JSON; fix the file")

    def _value(self, position: int) -> tuple[Any, int]:
        self._faults.clear()
        try:
            value, end = self._decoder.raw_decode(self._text, position)
        except (ValueError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else position
            raise self._broken(at) from None
        return value, self.skip_space(end)

    def _at(self, position: int, character: str) -> int:
        """Consume this character and the white space after it."""
        if not self._text.startswith(character, position):
            raise self._broken(position)
        return self.skip_space(position + 1)

    def _place(self, number: int) -> Location:
        return Location(self._label, "item", number)

    def items(self, position: int, to_end: bool) -> list[LocatedRecord]:
        """Parse the list at this position; ``to_end``: the text must end after it."""
        records: list[LocatedRecord] = []
        position = self._at(position, "[")
        has_next = not self._text.startswith("]", position)
        while has_next:
            value, position = self._value(position)
            record = _record(value, self._faults, self._strings)
            records.append((self._place(len(records) + 1), record))
            has_next = self._text.startswith(",", position)
            if has_next:
                position = self._at(position, ",")
        end = self._at(position, "]")
        if to_end and end < len(self._text):
            raise self._broken(position)
        return records

    def rows_of_object(self, begin: int) -> Table:
        """Read the object at this position: a row, a container of rows, or the first of several."""
        value, end = self._value(begin)
        if end < len(self._text):
            return Table(self._concatenated_objects(begin))
        if self._is_record(value):
            return Table([(self._place(1), _record(value, self._faults, self._strings))])
        if rows := self._columns(value):
            if self._faults:
                raise DataError(f"{self._label}: {self._faults[0]}; fix the file")
            return Table([(self._place(i), row) for i, row in enumerate(rows, start=1)])
        lists = [key for key, held in value.items() if self._is_list_of_rows(held)]
        if len(lists) == 1:
            rest = f"; {len(value) - 1} keys beside it are not" if len(value) > 1 else ""
            note = f"{self._label}: its list {printable_name(lists[0])} is read{rest}"
            records = self.items(self._begin_of(begin, lists[0]), to_end=False)
            return Table(records, notes=(note,))
        if lists:
            named = ", ".join(map(printable_name, lists[:5]))
            raise DataError(f"{self._label}: holds several lists of rows ({named}); keep one")
        keys = ", ".join(map(printable_name, list(value)[:5])) or "none"
        raise DataError(
            f"{self._label}: one object, neither a row nor a list of rows (its keys: {keys}); "
            "write a list of objects"
        )

    def _concatenated_objects(self, position: int) -> list[LocatedRecord]:
        records: list[LocatedRecord] = []
        while position < len(self._text):
            if not self._text.startswith("{", position):
                raise self._broken(position)
            value, position = self._value(position)
            record = _record(value, self._faults, self._strings)
            records.append((self._place(len(records) + 1), record))
        return records

    def _begin_of(self, position: int, wanted: str) -> int:
        """Return the position of the value of a key (of the last, if the key is repeated)."""
        begin = position
        position = self._at(position, "{")
        while True:
            key, position = self._value(position)
            position = self._at(position, ":")
            if key == wanted:
                begin = position
            _, position = self._value(position)
            if not self._text.startswith(",", position):
                return begin
            position = self._at(position, ",")

    def _is_list_of_rows(self, value: object) -> bool:
        if not isinstance(value, list) or not value:
            return False
        return all(isinstance(item, dict) or (self._strings and isinstance(item, str))
                   for item in value)  # fmt: skip

    def _is_record(self, value: Record) -> bool:
        """Whether the object is a row: a field holds text or messages."""
        fields = [value[key] for key in self._fields if key in value]
        return any(
            isinstance(field, str)
            or (
                isinstance(field, list)
                and field
                and isinstance(field[0], dict)
                and not {"role", "from"}.isdisjoint(field[0])
            )
            for field in fields
        )

    def _columns(self, value: Record) -> list[Record]:
        """Convert an object of columns to rows; empty if it is none."""
        if {"columns", "data"} <= value.keys():  # pandas, orient="split"
            names, data = value["columns"], value["data"]
            if (
                isinstance(names, list)
                and isinstance(data, list)
                and all(isinstance(row, list) and len(row) == len(names) for row in data)
            ):
                return [dict(zip(map(str, names), row, strict=True)) for row in data]
        has_fields = not self._fields.isdisjoint(value)
        columns = list(value.values())
        lists = all(isinstance(column, list) for column in columns)
        if (
            has_fields
            and lists
            and any(not isinstance(i, dict) for column in columns for i in column)
        ):
            if len({len(column) for column in columns}) > 1:
                sizes = ", ".join(
                    f"{printable_name(k)} {len(v)}" for k, v in list(value.items())[:5]
                )
                raise DataError(f"{self._label}: columns of different lengths ({sizes})")
            return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
        if columns and all(isinstance(column, dict) for column in columns):
            if has_fields and all(column.keys() == columns[0].keys() for column in columns):
                return [{name: value[name][key] for name in value} for key in columns[0]]
            if not has_fields and all(not self._fields.isdisjoint(column) for column in columns):
                return columns  # pandas, orient="index"
        return []
