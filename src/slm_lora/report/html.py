"""The report as one file of HTML: no script, nothing fetched, readable on a phone and on paper."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from slm_lora.report.figures import Picture


@dataclass(frozen=True, slots=True)
class Column:
    """Text as it is, beside other columns: nothing in it is taken for Markdown or HTML."""

    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a report: Markdown, and the pictures and columns that follow it; ``level`` is
    that of its heading, ``across`` how many columns stand beside each other where there is room."""

    title: str
    text: str
    pictures: tuple[Picture, ...] = ()
    columns: tuple[Column, ...] = ()
    across: int = 1
    level: int = 2


def plain(text: str) -> str:
    """Text that comes from data or from elsewhere, so that Markdown takes it for nothing else."""
    # An underscore inside a word is just that to Markdown.
    return re.sub(r"[\\`*\[\]<>|#!~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.split()))


def as_markdown(title: str, sections: Sequence[Section]) -> str:
    """The report without its pictures; columns stand one below the other."""
    parts = [f"# {title}"]
    for each in sections:
        parts += [f"{'#' * each.level} {plain(each.title)}", each.text]
        for column in each.columns:
            quoted = "\n".join(f"> {plain(line)}" for line in column.text.splitlines() or [""])
            parts += [f"**{plain(column.title)}**", quoted]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def as_html(title: str, sections: Sequence[Section]) -> str:
    """The report in one file. What comes from data is text: nothing in it is taken for HTML."""
    import jinja2
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.disable(["image", "link", "autolink"])
    page = files("slm_lora.report").joinpath("page.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return template.from_string(page).render(
        title=title,
        sections=[
            {
                "title": each.title,
                "level": each.level,
                "html": markdown.render(each.text),
                "pictures": each.pictures,
                "columns": each.columns,
                "across": each.across,
            }
            for each in sections
        ],
    )
