"""Records as they were read, each under its place in the file, before they are rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, NamedTuple

from slm_lora.data.text import RowError

ROW_BYTES = 10_000_000
"""Longest row that is read, in bytes of UTF-8; anything longer is a file gone wrong."""

Record = dict[str, Any]


class Place(NamedTuple):
    """Where a record stands: in a line of a text file, or as an item or a row of another."""

    file: str
    unit: Literal["line", "item", "row"]
    number: int

    def __str__(self) -> str:
        if self.unit == "line":
            return f"{self.file}:{self.number}"
        return f"{self.file} {self.unit} {self.number}"


Numbered = tuple[Place, Record | RowError]
"""A record, or why there is none, under the place that a message shows."""


class InvalidUtf8Error(RowError):
    """A row's bytes are no UTF-8."""

    def __init__(self) -> None:
        super().__init__("invalid UTF-8")


@dataclass(frozen=True, slots=True)
class Table:
    """What a reader found.

    Attributes:
        records: in their order.
        columns: names of all columns; None where only the records tell.
        lists: columns that hold lists, where ``columns`` is given.
        notes: what there is to say of the reading, one line each.
        encoding: what a text file that is no UTF-8 looks like, for messages.
    """

    records: list[Numbered]
    columns: frozenset[str] | None = None
    lists: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    encoding: str = ""


def check_size(size: int) -> None:
    """Refuse a row of ``size`` bytes that is over `ROW_BYTES`.

    Raises:
        RowError: it is.
    """
    if size > ROW_BYTES:
        raise RowError(f"row of {size / 1e6:.1f} MB (at most {ROW_BYTES / 1e6:.0f} MB)")


def lines(handle: BinaryIO, first: bytes = b"") -> Iterator[tuple[bytes, int]]:
    """Lines with their sizes in bytes, without the line end; of a line too long only its
    beginning, so that a file without line ends does not fill the memory. Only ``\\n`` ends one.
    A byte order mark at the beginning of the file is no part of its first line, of which
    ``first`` may have been read."""
    mark = b"\xef\xbb\xbf"
    line = first or handle.readline(ROW_BYTES + 2)
    while line:
        size, end = len(line), line
        while not end.endswith(b"\n") and (end := handle.readline(1 << 20)):
            size += len(end)
        text = line.removeprefix(mark)
        yield text, size - (len(line) - len(text)) - end.endswith(b"\n")
        mark, line = b"", handle.readline(ROW_BYTES + 2)


def decoded(line: bytes) -> str:
    """The text of a line, or of several.

    Raises:
        RowError: it is no UTF-8, or begins with a mark, which `lines` leaves inside a file only.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidUtf8Error from None
    if text.startswith("\ufeff"):
        raise RowError("byte order mark inside the file")
    return text
