"""Blocks that a report is made of, before they are Markdown or HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure.

    Attributes:
        name: of its file, without the suffix.
        svg: the drawing, transparent, without an XML prologue.
        caption: what it shows, in words.
    """

    name: str
    svg: str
    caption: str


@dataclass(frozen=True, slots=True)
class Column:
    """Literal text beside other columns: neither Markdown nor HTML in it is interpreted."""

    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a report.

    Attributes:
        title: its heading, literal text.
        text: Markdown.
        pictures: figures after the text.
        columns: literal text after the figures.
        across: columns beside each other where there is room.
        level: of the heading.
        anchor: target of links to it; none if empty.
        folded: shown as its title until a reader opens it.
        children: sections inside it.
    """

    title: str
    text: str
    pictures: tuple[Picture, ...] = ()
    columns: tuple[Column, ...] = ()
    across: int = 1
    level: int = 2
    anchor: str = ""
    folded: bool = False
    children: tuple[Section, ...] = ()


def plain(text: str) -> str:
    """Text from data, escaped so that Markdown takes it literally."""
    # An underscore inside a word has no meaning in Markdown.
    return re.sub(r"[\\`*\[\]<>|#!~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.split()))


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)
) -> str:
    """A Markdown table.

    Args:
        header: column titles.
        rows: cells, Markdown.
        left: columns that are aligned to the left; the others, numbers, to the right.
    """
    marks = [":--" if index in left else "--:" for index in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, marks, *rows]) + "\n"


@dataclass(frozen=True)
class Fact:
    """One line of the card.

    Attributes:
        label: what it is about.
        text: literal text.
        anchor: of the section that holds the evidence.
    """

    label: str
    text: str
    anchor: str
