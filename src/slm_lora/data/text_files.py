"""Rows of plain text: a paragraph each, or a line each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from slm_lora.config.schema import DataSection
from slm_lora.data import table
from slm_lora.data.table import Numbered, Place, Table
from slm_lora.data.text import RowError


def read_text(handle: BinaryIO, label: str, section: DataSection, strings: bool) -> Table:
    """The pieces of a text, one a row, under the line that they begin on."""
    found = [(line, size, not line.strip()) for line, size in table.lines(handle)]
    by = section.text_rows
    if by == "auto":
        by = "paragraphs" if _parted(found) else "lines"
    records: list[Numbered] = [
        (Place(label, "line", number), _record(piece))
        for number, piece in _pieces(found, by == "lines")
    ]
    other = "lines" if by == "paragraphs" else "paragraphs"
    note = f"{label}: a row is one of its {by} (data.text_rows={other} reads {other})"
    return Table(records, notes=(note,) if records and section.text_rows == "auto" else ())


def has_paragraphs(handle: BinaryIO) -> bool:
    """Whether blank lines part the text."""
    return _parted([(line, size, not line.strip()) for line, size in table.lines(handle)])


def _parted(lines: list[tuple[bytes, int, bool]]) -> bool:
    text = [number for number, (*_, blank) in enumerate(lines) if not blank]
    return bool(text) and text[-1] - text[0] >= len(text)


def _pieces(
    lines: list[tuple[bytes, int, bool]], single: bool
) -> Iterator[tuple[int, list[tuple[bytes, int]]]]:
    """The number of its first line, and its lines, of every piece."""
    piece: list[tuple[bytes, int]] = []
    for number, (line, size, blank) in enumerate(lines, start=1):
        if not blank:
            piece.append((line, size))
        if piece and (blank or single or number == len(lines)):
            yield number - len(piece) + (not blank), piece
            piece = []


def _record(piece: list[tuple[bytes, int]]) -> dict[str, str] | RowError:
    try:
        table.check_size(sum(size for _, size in piece))
        text = table.decoded(b"".join(line for line, _ in piece))
    except RowError as error:
        return error
    return {"text": text.replace("\r\n", "\n").removesuffix("\n")}
