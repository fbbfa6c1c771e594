"""Columns of rows that are not for supervised training, or that hold more than is trained on."""

from __future__ import annotations

import functools
import re
from collections.abc import Set

PROMPT_COLUMNS = frozenset(
    [
        "input", "inputs", "context", "contexts", "document", "documents",
        "passage", "passages", "history", "system", "system_prompt", "tools",
        "functions", "prompt", "instruction", "question", "query", "examples",
        "knowledge", "evidence", "reasoning", "reasoning_content", "thinking", "rationale",
    ]
)  # fmt: skip
"""Columns that usually are part of a prompt or of an answer: told if they are not read."""

CONTEXTS = ("input", "inputs", "context", "passage", "document", "knowledge", "evidence")
"""Those of them that may be the context of an instruction."""

MARKS = ("label", "kto_tag", "train", "trainable", "weight")
"""Columns in which a row says by false or 0 that it is not to be learnt."""

_REFUSED = re.compile(r"tools|functions|(image|audio|video)s?(_(path|url|bytes)s?)?")


_ASKED = ("instruction", "question", "query", "prompt", "input", "problem")
_ANSWERED = ("response", "output", "answer", "completion", "reply", "target", "solution")
_CHATS = ("conversation", "dialog", "dialogue", "chat", "message", "turns", "chosen")


@functools.cache
def refused(column: str) -> bool:
    """Whether content of this column would be missing in the text, so that its rows are refused."""
    return bool(_REFUSED.fullmatch(column))


def watched(column: str) -> bool:
    """Whether the content of this column matters though no format reads it."""
    return column in PROMPT_COLUMNS or column in MARKS or refused(column)


def heavy(column: str) -> bool:
    """Whether it is enough to know that the column has content: it holds no text."""
    return refused(column) and column not in ("tools", "functions")


def explain(columns: Set[str], lists: Set[str]) -> str:
    """What rows are that no format fits, and how they can be used; empty if unknown."""
    if {"chosen", "rejected"} <= columns:
        return (
            "preference data (columns chosen and rejected): to train on the chosen answers set "
            f"data.columns={{{_chosen(columns, lists)}}}"
        )
    if "completions" in columns or "responses" in columns:
        return "several answers a row, as for rewards: supervised training takes one answer a row"
    if "input_ids" in columns:
        return "the rows are tokens already (input_ids): text is needed"
    if "prompt" in columns and not columns & {*_ANSWERED, *_CHATS}:
        return "prompts without answers: supervised training takes an answer a row (completion)"
    return ""


def mapping(columns: Set[str], lists: Set[str]) -> str:
    """How columns may be named to a format, as an example of ``data.columns``."""
    texts = columns - lists
    asked = next((column for column in _ASKED if column in texts), "")
    answered = next((column for column in _ANSWERED if column in texts), "")
    if asked and answered:
        names = {"instruction": asked, "response": answered}
        other = ", ".join(f"{field}: {name}" for field, name in names.items() if field != name)
        return f", perhaps {{{other}}}"
    chat = next((column for column in _CHATS if column in lists), "")
    return f", perhaps {{messages: {chat}}}" if chat else " (field: column)"


def _chosen(columns: Set[str], lists: Set[str]) -> str:
    if "chosen" in lists and "prompt" not in lists:
        return "messages: chosen"  # the whole conversation
    if "prompt" in columns:
        return "completion: chosen"
    if "instruction" in columns:
        return "output: chosen"
    asked = next((column for column in _ASKED if column in columns), "")
    return f"prompt: {asked}, completion: chosen" if asked else "text: chosen"
