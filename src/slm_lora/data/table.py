"""Records of a source with their locations, before conversion to rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, NamedTuple

from slm_lora.data.text import RowError

ROW_BYTES = 10_000_000
"""Maximum size of a row, in bytes of UTF-8; a longer one is a broken file."""

Record = dict[str, Any]


class Location(NamedTuple):
    """The location of a record: a line of a text file, or an item or row of another source."""

    file: str
    unit: Literal["line", "item", "row"]
    number: int

    def __str__(self) -> str:
        if self.unit == "line":
            return f"{self.file}:{self.number}"
        return f"{self.file} {self.unit} {self.number}"


LocatedRecord = tuple[Location, Record | RowError]
"""A record, or the reason why it cannot be read, with its location."""


class InvalidUtf8Error(RowError):
    """A row is not valid UTF-8."""

    def __init__(self) -> None:
        super().__init__("invalid UTF-8")


@dataclass(frozen=True, slots=True)
class Table:
    """The records of a source.

    Attributes:
        records: records or errors, in order.
        columns: names of all columns; None if the source has no schema.
        lists: columns of lists, if the source has a schema.
        notes: messages on how the source was read, one line each.
        encoding: probable encoding of a text file that is not UTF-8, for messages.
    """

    records: list[LocatedRecord]
    columns: frozenset[str] | None = None
    lists: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    encoding: str = ""


def check_size(size: int) -> None:
    """Check the size of a row in bytes.

    Raises:
        RowError: the size is over `ROW_BYTES`.
    """
    if size > ROW_BYTES:
        raise RowError(f"row of {size / 1e6:.1f} MB (at most {ROW_BYTES / 1e6:.0f} MB)")


def iter_lines(handle: BinaryIO, first: bytes = b"") -> Iterator[tuple[bytes, int]]:
    """Yield lines with their sizes in bytes, line end excluded. Only ``\\n`` ends a line.

    A line over `ROW_BYTES` is truncated, so that a file without line ends does not fill the
    memory. A byte order mark at the beginning of the file is removed.

    Args:
        handle: the file.
        first: its first line, if already read.
    """
    mark = b"\xef\xbb\xbf"
    line = first or handle.readline(ROW_BYTES + 2)
    while line:
        size, end = len(line), line
        while not end.endswith(b"\n") and (end := handle.readline(1 << 20)):
            size += len(end)
        text = line.removeprefix(mark)
        yield text, size - (len(line) - len(text)) - end.endswith(b"\n")
        mark, line = b"", handle.readline(ROW_BYTES + 2)


def decode_utf8(line: bytes) -> str:
    """Decode one or several lines.

    Raises:
        RowError: not UTF-8, or a byte order mark inside the file.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidUtf8Error from None
    if text.startswith("\ufeff"):
        raise RowError("byte order mark inside the file")
    return text
