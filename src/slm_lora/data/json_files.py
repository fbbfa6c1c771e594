"""Rows of JSON lines and of JSON files, in whatever shape tools write them.

A JSON file may be a list of objects, objects one after the other, an object that holds one such
list below a key, or columns: an object of lists, or of objects by row number (pandas).
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
from slm_lora.data.table import InvalidUtf8Error, Numbered, Place, Record, Table
from slm_lora.data.text import RowError
from slm_lora.errors import DataError

_SPACE = re.compile(r"[ \t\r\n]*")


def read_json_lines(handle: BinaryIO, label: str, section: DataSection, strings: bool) -> Table:
    """One object a line; or what is JSON of another shape, under the name of JSON lines."""
    first = handle.readline(table.ROW_BYTES + 2)
    begins = first.removeprefix(b"\xef\xbb\xbf").strip()
    if begins == b"{" or begins.startswith(b"["):
        # A list, or objects that are written over several lines; unless it is one broken line.
        content = first + handle.read()
        rest = content[len(first) :].strip()
        lone = begins == b"{" and (not rest or _is_whole(rest.partition(b"\n")[0]))
        if not lone and not (rest and begins != b"{" and _is_whole(begins)):
            return read_json(BytesIO(content), label, section, strings)
        return _lines(table.lines(BytesIO(content)), label, strings)
    return _lines(table.lines(handle, first), label, strings)


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _decoder(faults: list[str]) -> json.JSONDecoder:
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
            return _record(decoder.decode(table.decoded(line)), faults, strings)
        except RowError as error:
            return error
        except (ValueError, RecursionError):  # a number of 5,000 digits is a plain ValueError
            return RowError("bad JSON")

    return Table(
        [
            (Place(label, "line", number), parse(line, size))
            for number, (line, size) in enumerate(lines, start=1)
            if line.strip()
        ]
    )


def read_json(handle: BinaryIO, label: str, section: DataSection, strings: bool) -> Table:
    """The rows of a JSON file.

    Raises:
        DataError: it is broken, or in no shape that is known.
    """
    content = handle.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Its rows cannot be told apart: one stands for the file.
        line = content.count(b"\n", 0, error.start) + 1
        return Table([(Place(label, "line", line), InvalidUtf8Error())])
    found = _Json(text, label, section, strings)
    begin = found.after_space(0)
    if begin == len(text):
        return Table([])
    if text[begin] == "[":
        return Table(found.items(begin, whole=True))
    if text[begin] != "{":
        raise DataError(f"{label}: not a list of objects")
    first, _, rest = content.removeprefix(b"\xef\xbb\xbf").strip().partition(b"\n")
    if rest and _is_whole(first):
        return _lines(table.lines(BytesIO(content)), label, strings)
    return found.rows_of_object(begin)


class _Json:
    """A JSON text that is read piece by piece."""

    def __init__(self, text: str, label: str, section: DataSection, strings: bool) -> None:
        self._text, self._label, self._strings = text, label, strings
        self._faults: list[str] = []
        self._decoder = _decoder(self._faults)
        self._known = FIELDS | {column for column in section.columns.values() if column}

    def after_space(self, position: int) -> int:
        space = _SPACE.match(self._text, position)
        return space.end() if space else position

    def _broken(self, position: int) -> DataError:
        # Where the list is broken, the start of the next item is unknown: nothing to skip.
        line = self._text.count("\n", 0, position) + 1
        return DataError(f"{self._label}:{line}: bad JSON; mend the file")

    def _value(self, position: int) -> tuple[Any, int]:
        self._faults.clear()
        try:
            value, end = self._decoder.raw_decode(self._text, position)
        except (ValueError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else position
            raise self._broken(at) from None
        return value, self.after_space(end)

    def _at(self, position: int, character: str) -> int:
        """Behind the character, which must stand here."""
        if not self._text.startswith(character, position):
            raise self._broken(position)
        return self.after_space(position + 1)

    def _place(self, number: int) -> Place:
        return Place(self._label, "item", number)

    def items(self, position: int, whole: bool) -> list[Numbered]:
        """The records of the list that begins here; ``whole``: the file ends with it."""
        records: list[Numbered] = []
        position = self._at(position, "[")
        more = not self._text.startswith("]", position)
        while more:
            value, position = self._value(position)
            record = _record(value, self._faults, self._strings)
            records.append((self._place(len(records) + 1), record))
            more = self._text.startswith(",", position)
            if more:
                position = self._at(position, ",")
        end = self._at(position, "]")
        if whole and end < len(self._text):
            raise self._broken(position)
        return records

    def rows_of_object(self, begin: int) -> Table:
        """The rows that an object is, holds, or begins."""
        value, end = self._value(begin)
        if end < len(self._text):
            return Table(self._one_after_the_other(begin))
        if self._is_record(value):
            return Table([(self._place(1), _record(value, self._faults, self._strings))])
        if rows := self._columns(value):
            if self._faults:
                raise DataError(f"{self._label}: {self._faults[0]}; mend the file")
            return Table([(self._place(i), row) for i, row in enumerate(rows, start=1)])
        lists = [key for key, held in value.items() if self._is_list_of_rows(held)]
        if len(lists) == 1:
            rest = f"; {len(value) - 1} keys beside it are not" if len(value) > 1 else ""
            note = f"{self._label}: its list {_shown(lists[0])} is read{rest}"
            records = self.items(self._begin_of(begin, lists[0]), whole=False)
            return Table(records, notes=(note,))
        if lists:
            named = ", ".join(map(_shown, lists[:5]))
            raise DataError(f"{self._label}: holds several lists of rows ({named}); keep one")
        keys = ", ".join(map(_shown, list(value)[:5])) or "none"
        raise DataError(
            f"{self._label}: one object, neither a row nor a list of rows (its keys: {keys}); "
            "write a list of objects"
        )

    def _one_after_the_other(self, position: int) -> list[Numbered]:
        records: list[Numbered] = []
        while position < len(self._text):
            if not self._text.startswith("{", position):
                raise self._broken(position)
            value, position = self._value(position)
            record = _record(value, self._faults, self._strings)
            records.append((self._place(len(records) + 1), record))
        return records

    def _begin_of(self, position: int, wanted: str) -> int:
        """Where the value of a key of the object begins (of the last such, as it is read)."""
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
        return all(isinstance(each, dict) or (self._strings and isinstance(each, str))
                   for each in value)  # fmt: skip

    def _is_record(self, value: Record) -> bool:
        """Whether the object is a row itself: a field holds text, or messages."""
        held = [value[key] for key in self._known if key in value]
        return any(
            isinstance(each, str)
            or (
                isinstance(each, list)
                and each
                and isinstance(each[0], dict)
                and not {"role", "from"}.isdisjoint(each[0])
            )
            for each in held
        )

    def _columns(self, value: Record) -> list[Record]:
        """The rows of an object of columns; none, if it is no such."""
        if {"columns", "data"} <= value.keys():  # pandas, orient="split"
            names, data = value["columns"], value["data"]
            if (
                isinstance(names, list)
                and isinstance(data, list)
                and all(isinstance(row, list) and len(row) == len(names) for row in data)
            ):
                return [dict(zip(map(str, names), row, strict=True)) for row in data]
        known = not self._known.isdisjoint(value)
        columns = list(value.values())
        lists = all(isinstance(each, list) for each in columns)
        if known and lists and any(not isinstance(i, dict) for each in columns for i in each):
            if len({len(each) for each in columns}) > 1:
                sizes = ", ".join(f"{_shown(k)} {len(v)}" for k, v in list(value.items())[:5])
                raise DataError(f"{self._label}: columns of different lengths ({sizes})")
            return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
        if columns and all(isinstance(each, dict) for each in columns):
            if known and all(each.keys() == columns[0].keys() for each in columns):
                return [{name: value[name][key] for name in value} for key in columns[0]]
            if not known and all(not self._known.isdisjoint(each) for each in columns):
                return columns  # pandas, orient="index"
        return []


def _shown(key: str) -> str:
    return key if key.isprintable() and 0 < len(key) <= 40 else ascii(key[:40])
