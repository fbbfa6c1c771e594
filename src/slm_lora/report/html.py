"""A report as one HTML file: no script, nothing fetched, for screens and for paper."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from slm_lora.report.blocks import Picture, Section
from slm_lora.report.card import Card


def as_html(
    title: str,
    question: str,
    card: Card | None,
    answer: Picture | None,
    sections: Sequence[Section],
) -> str:
    """The report in one file; text from data is never interpreted as HTML. Arguments as those of
    `as_markdown`."""
    import jinja2
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.disable(["image", "link", "autolink"])
    page = files("slm_lora.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["markdown"] = markdown.render
    return environment.from_string(page).render(
        title=title,
        question=question,
        facts=card.facts if card else (),
        answer=answer,
        sections=sections,
    )
