"""Columns outside the row formats: unsupported data, media, marks, and likely prompt columns."""

from __future__ import annotations

import functools
import re
from collections.abc import Set

from slm_lora.errors import DataError

PROMPT_COLUMNS = frozenset(
    [
        "input", "inputs", "context", "contexts", "document", "documents",
        "passage", "passages", "history", "system", "system_prompt", "tools",
        "functions", "prompt", "instruction", "question", "query", "examples",
        "knowledge", "evidence", "reasoning", "reasoning_content", "thinking", "rationale",
    ]
)  # fmt: skip
"""Columns that usually are part of a prompt or an answer: reported if they are not read."""

CONTEXT_COLUMNS = ("input", "inputs", "context", "passage", "document", "knowledge", "evidence")
"""Prompt columns that may be the context of an instruction."""

REJECTION_MARKS = ("label", "kto_tag", "train", "trainable", "weight")
"""Columns whose value false (or 0 for ``weight``) excludes a row from training."""

_REFUSED = re.compile(r"tools|functions|(image|audio|video)s?(_(path|url|bytes)s?)?")


_QUESTION_COLUMNS = ("instruction", "question", "query", "prompt", "input", "problem")
_ANSWER_COLUMNS = ("response", "output", "answer", "completion", "reply", "target", "solution")
_CHAT_COLUMNS = ("conversation", "dialog", "dialogue", "chat", "message", "turns", "chosen")


@functools.cache
def is_refused(column: str) -> bool:
    """Whether rows with content in this column are refused, as the text would lack it."""
    return bool(_REFUSED.fullmatch(column))


def is_watched(column: str) -> bool:
    """Whether this column must be decoded and checked, though no format reads it."""
    return column in PROMPT_COLUMNS or column in REJECTION_MARKS or is_refused(column)


def is_media(column: str) -> bool:
    """Whether the column holds images, audio or video, of which only the presence is checked."""
    return is_refused(column) and column not in ("tools", "functions")


def explain_unsupported(columns: Set[str], lists: Set[str]) -> str:
    """Describe data that no format fits, and how to use it; empty if unknown."""
    if {"chosen", "rejected"} <= columns:
        return (
            "preference data (columns chosen and rejected): to train on the chosen answers set "
            f"data.columns={{{_chosen(columns, lists)}}}"
        )
    if "completions" in columns or "responses" in columns:
        return "several answers a row, as for rewards: supervised training takes one answer a row"
    if "input_ids" in columns:
        return "the rows are tokens already (input_ids): text is needed"
    if "prompt" in columns and not columns & {*_ANSWER_COLUMNS, *_CHAT_COLUMNS}:
        return "prompts without answers: supervised training takes an answer a row (completion)"
    return ""


class NoFormatError(DataError):
    """No format fits the columns; ``mapping`` is a likely value of ``data.columns``, or empty."""

    mapping: dict[str, str]


def no_format_fits(message: str, columns: Set[str], lists: Set[str]) -> NoFormatError:
    """The error with a likely value of ``data.columns``."""
    mapping = _guess_mapping(columns, lists)
    listed = ", ".join(f"{field}: {column}" for field, column in mapping.items())
    suggestion = f", perhaps {{{listed}}}" if mapping else " (field: column)"
    error = NoFormatError(f"{message} Name other columns in data.columns{suggestion}.")
    error.mapping = mapping
    return error


def _guess_mapping(columns: Set[str], lists: Set[str]) -> dict[str, str]:
    texts = columns - lists
    question = next((column for column in _QUESTION_COLUMNS if column in texts), "")
    answer = next((column for column in _ANSWER_COLUMNS if column in texts), "")
    if question and answer:
        names = {"instruction": question, "response": answer}
        return {field: column for field, column in names.items() if field != column}
    chat = next((column for column in _CHAT_COLUMNS if column in lists), "")
    return {"messages": chat} if chat else {}


def _chosen(columns: Set[str], lists: Set[str]) -> str:
    if "chosen" in lists and "prompt" not in lists:
        return "messages: chosen"  # the whole conversation
    if "prompt" in columns:
        return "completion: chosen"
    if "instruction" in columns:
        return "output: chosen"
    question = next((column for column in _QUESTION_COLUMNS if column in columns), "")
    return f"prompt: {question}, completion: chosen" if question else "text: chosen"
