"""Read plain text files: one row for each paragraph or line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from slm_lora.config.schema import DataSection
from slm_lora.data import table
from slm_lora.data.table import LocatedRecord, Location, Table
from slm_lora.data.text import RowError


def read_text(handle: BinaryIO, label: str, section: DataSection, strings: bool) -> Table:
    """Read the paragraphs or lines of a text; a row's location is its first line."""
    lines = [(line, size, not line.strip()) for line, size in table.iter_lines(handle)]
    unit = section.text_rows
    if unit == "auto":
        unit = "paragraphs" if _has_blank_lines(lines) else "lines"
    records: list[LocatedRecord] = [
        (Location(label, "line", number), _record(piece))
        for number, piece in _pieces(lines, unit == "lines")
    ]
    other = "lines" if unit == "paragraphs" else "paragraphs"
    note = f"{label}: a row is one of its {unit} (data.text_rows={other} reads {other})"
    return Table(records, notes=(note,) if records and section.text_rows == "auto" else ())


def has_paragraphs(handle: BinaryIO) -> bool:
    """Whether blank lines divide the text."""
    return _has_blank_lines(
        [(line, size, not line.strip()) for line, size in table.iter_lines(handle)]
    )


def _has_blank_lines(lines: list[tuple[bytes, int, bool]]) -> bool:
    text = [number for number, (*_, blank) in enumerate(lines) if not blank]
    return bool(text) and text[-1] - text[0] >= len(text)


def _pieces(
    lines: list[tuple[bytes, int, bool]], single: bool
) -> Iterator[tuple[int, list[tuple[bytes, int]]]]:
    """Yield the number of the first line and the lines of every paragraph, or of every line."""
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
        text = table.decode_utf8(b"".join(line for line, _ in piece))
    except RowError as error:
        return error
    return {"text": text.replace("\r\n", "\n").removesuffix("\n")}
