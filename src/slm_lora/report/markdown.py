"""A report as Markdown; its figures are files beside it."""

from __future__ import annotations

from collections.abc import Sequence

from slm_lora.report.blocks import Picture, Section, plain
from slm_lora.report.card import Card


def as_markdown(
    title: str,
    question: str,
    card: Card | None,
    answer: Picture | None,
    sections: Sequence[Section],
    figures: str = "",
) -> str:
    """The report for a code host.

    Args:
        title: of the page, literal text.
        question: Markdown.
        card: the result; None: there is none.
        answer: the figure below the card.
        sections: the rest.
        figures: folder of the figures, relative to the file; empty: leave them out.
    """
    parts = [f"# {plain(title)}", question]
    if card is not None and card.facts:
        parts.append(
            "\n".join(
                f"- **[{plain(fact.label)}](#{fact.anchor}):** {plain(fact.text)}"
                for fact in card.facts
            )
        )
    if answer is not None and figures:
        parts += _picture(answer, figures)
    for section in sections:
        parts += _section(section, figures)
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _section(section: Section, figures: str) -> list[str]:
    anchor = [f'<a id="{section.anchor}"></a>'] if section.anchor else []
    heading = (
        f"<details><summary><b>{_html(section.title)}</b></summary>"
        if section.folded
        else f"{'#' * section.level} {plain(section.title)}"
    )
    parts = [*anchor, heading, section.text]
    if figures:
        for picture in section.pictures:
            parts += _picture(picture, figures)
    for column in section.columns:
        quoted = "\n".join(f"> {plain(line)}" for line in column.text.splitlines() or [""])
        parts += [f"**{plain(column.title)}**", quoted]
    for child in section.children:
        parts += _section(child, figures)
    return [*parts, "</details>"] if section.folded else parts


def _picture(picture: Picture, figures: str) -> list[str]:
    return [
        f"![{plain(picture.caption)}]({figures}/{picture.name}.svg)",
        f"*{plain(picture.caption)}*",
    ]


def _html(text: str) -> str:
    from html import escape

    return escape(" ".join(text.split()))
