"""Detect template placeholders left unfilled in rows: ``{{name}}``, ``{input}``, ``[NAME]``.

Brackets also occur in code, formulas, links and special tokens. Code and formulas are therefore
left out, and all but double braces count only around words that forms ask for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from slm_lora.records import Row

_FORM_WORDS = (
    r"(?:[a-z]+[ _-])?(?:name|username|surname|customer|client|patient|student|recipient|sender|"
    "company|organisation|organization|city|country|address|street|e-?mail|phone|phone number|"
    "phone_number|date|time|year|age|title|topic|subject|amount|price|product|url|link|number|id|"
    "input|inputs|output|instruction|instructions|context|question|answer|prompt|response|query|"
    "text|sentence|paragraph|passage|document|article|message|content|transcript|review|source|"
    "target|language|summary|keyword|keywords|category|label|description|premise|hypothesis|"
    "choices|options|persona|history|job|role|location|details)"
)
"""Words that forms and prompt templates ask for."""

_BEFORE_FORMULA = r"(?<![\w\\^_}$#%{/])"
_KINDS = (
    # {{name}}, {{ user.name }}
    re.compile(rf"{_BEFORE_FORMULA}\{{\{{\s*[A-Za-z][\w.]{{1,40}}\s*\}}\}}(?!\}})"),
    # {input}, {NAME}
    re.compile(rf"{_BEFORE_FORMULA}\{{\s?(?:{_FORM_WORDS})\s?\}}(?!\}})", re.IGNORECASE),
    # [NAME], [Company Name], [insert date here], [your name]; no link, no index
    re.compile(
        rf"(?<![\w\\\]!\[])\[(?:(?=[A-Z])(?i:{_FORM_WORDS})|"
        r"(?i:insert|enter|your) [\w' -]{2,40})\](?![(\[]|: ?(?:http|[<#/]))"
    ),
    # <insert name here>, <your name>
    re.compile(r"<(?i:insert|enter|your|put) [\w' -]{2,40}>"),
)
_CODE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$(?=\S)[^$\n]{1,200}(?<=\S)\$(?!\d)|\\\[.*?\\\]|\\\(.*?\\\)",
    re.DOTALL,
)
_FORM = re.compile(r"\b(?:form|format|list)\b", re.IGNORECASE)
_LOOKS_LIKE_CODE = re.compile(
    r"\{\s*$|=.*;\s*$|[)\]}\"'];\s*$|^\s*(?:def|func|fn|function) \w+\s*[(<]|"
    r"^\s*class \w+\s*[:({]|^\s*from [\w.]+ import |^\s*import [\w{*\"']|"
    r"^\s*return [\w{(\[].*[;)\]}]\s*$|"
    r"^\s*(?:let|const|var|public|private|static) [\w<>\[\] ]+ ?[=(]|^\s*#include\b|"
    r"\bSELECT\b.+\bFROM\b|\b[fr]['\"]|\.format\(|\{%|=>|</\w+>|"
    r"\\(?:begin|frac|sum|int|text|mathbb?)\b",
    re.MULTILINE,
)
"""Lines that occur in programs, web pages and formulas, but not in prose."""


@dataclass(frozen=True, slots=True)
class Placeholders:
    """Rows that hold placeholders.

    Attributes:
        rows: number of rows with placeholders.
        first: source of the first such row.
        placeholders: the placeholders, most frequent first.
    """

    rows: int
    first: str
    placeholders: tuple[str, ...]


def placeholders_in(text: str) -> set[str]:
    """Return the placeholders in a text; none if the text is code."""
    prose = _CODE.sub(" ", text)
    if _LOOKS_LIKE_CODE.search(prose):
        return set()
    return {
        match[0]
        for kind in _KINDS
        for match in kind.finditer(prose)
        # "List them in the format {Name}": the placeholder is intended.
        if not _FORM.search(prose, max(0, match.start() - 80), match.start())
    }


def find_placeholders(rows: Sequence[Row]) -> Placeholders | None:
    """Find placeholders in all turns and contexts; None if there are none."""
    counts: Counter[str] = Counter()
    sources = []
    for row in rows:
        texts = (row.context, *(turn.content for turn in row.turns))
        placeholders = set().union(*map(placeholders_in, texts))
        if placeholders:
            sources.append(row.source)
            counts.update(placeholders)
    if not sources:
        return None
    return Placeholders(len(sources), sources[0], tuple(text for text, _ in counts.most_common()))
