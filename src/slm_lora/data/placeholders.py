"""Placeholders of a template that were never filled in: ``{{name}}``, ``{input}``, ``[NAME]``.

Braces, brackets and angles are also code, formulas, links and marks of tokenizers. So code and
formulas are left out, and all but double braces count only around words that forms ask for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from slm_lora.records import Row

_ASKED_FOR = (
    "name|first[ _-]?name|last[ _-]?name|full[ _-]?name|user[ _-]?name|surname|company|"
    "company[ _-]?name|organisation|organization|city|country|address|street|e-?mail|"
    "email[ _-]?address|"
    "phone|phone[ _-]?number|date|time|year|title|job[ _-]?title|topic|subject|amount|price|"
    "product|product[ _-]?name|url|link|number|"
    "input|inputs|output|instruction|instructions|context|question|answer|prompt|response|query|"
    "text|sentence|passage|document|article|message|content|source|target|language|summary|"
    "user[ _-]?input|input[ _-]?text|source[ _-]?text"
)
"""Words that forms and prompt templates ask for."""

_BEFORE_FORMULA = r"(?<![\w\\^_}$#%{])"
_KINDS = (
    # {{name}}, {{ user.name }}
    re.compile(rf"{_BEFORE_FORMULA}\{{\{{\s*[A-Za-z][\w.]{{1,40}}\s*\}}\}}(?!\}})"),
    # {input}, {NAME}
    re.compile(rf"{_BEFORE_FORMULA}\{{\s?(?:{_ASKED_FOR})\s?\}}(?!\}})", re.IGNORECASE),
    # [NAME], [Company Name], [insert date here], [your name]; no link, no index
    re.compile(
        rf"(?<![\w\\\]!\[])\[(?:{_ASKED_FOR.upper()}|{_ASKED_FOR.title()}|"
        r"(?i:insert|enter|your) [\w' -]{2,40})\](?![(\[:])"
    ),
    # <insert name here>, <your name>
    re.compile(r"<(?i:insert|enter|your|put) [\w' -]{2,40}>"),
)
_CODE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]{1,200}\$|\\\[.*?\\\]|\\\(.*?\\\)", re.DOTALL
)
_LOOKS_LIKE_CODE = re.compile(
    r"[;{]\s*$|^\s*(?:def|class|import|from|return|func|fn|public|private|var|let|const|#include|"
    r"SELECT)\b|\b[fr]['\"]|\.format\(|\{%|=>|</\w+>|\\(?:begin|frac|sum|int|text|mathbb?)\b",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Placeholders:
    """Rows that hold placeholders.

    Attributes:
        rows: how many.
        first: source of the first of them.
        spelt: the placeholders, those of most rows first.
    """

    rows: int
    first: str
    spelt: tuple[str, ...]


def placeholders_in(text: str) -> set[str]:
    """The placeholders left in a text; none where the text is code."""
    prose = _CODE.sub(" ", text)
    if _LOOKS_LIKE_CODE.search(prose):
        return set()
    return {
        match[0]
        for kind in _KINDS
        for match in kind.finditer(prose)
        # "List them in the format {Name}" asks for what it spells.
        if "format" not in prose[max(0, match.start() - 80) : match.start()].lower()
    }


def find_placeholders(rows: Sequence[Row]) -> Placeholders | None:
    """Those of all turns and contexts; None if there is none."""
    counted: Counter[str] = Counter()
    sources = []
    for row in rows:
        texts = (row.context, *(turn.content for turn in row.turns))
        found = set().union(*map(placeholders_in, texts))
        if found:
            sources.append(row.source)
            counted.update(found)
    if not sources:
        return None
    return Placeholders(len(sources), sources[0], tuple(text for text, _ in counted.most_common()))
