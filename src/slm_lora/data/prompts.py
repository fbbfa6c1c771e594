"""Prompts from a file: a question a row, with an answer to compare with where there is one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_lora.data.splits import seeded_order
from slm_lora.errors import DataError, UsageError
from slm_lora.records import Row, Turn

_ASKED, _CONTEXT = ("instruction", "prompt", "question"), ("context", "input")
_ANSWERED = ("response", "output", "completion", "answer")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that ends with a user's turn.

    Attributes:
        turns: of the conversation.
        context: for templates that were trained with contexts.
        reference: an answer whose loss can be compared; empty where none is known.
        source: ``file:line``, for messages.
    """

    turns: tuple[Turn, ...]
    context: str = ""
    reference: str = ""
    source: str = ""

    @property
    def answered(self) -> Row:
        """The row that prompt and reference make together."""
        return Row((*self.turns, Turn("assistant", self.reference)), self.context)


def read_prompts(path: Path) -> list[Prompt]:
    """Read a text file (one prompt a line) or JSON lines.

    A JSON line has ``instruction``, ``prompt`` or ``question`` (and ``context`` or ``input``), or
    ``messages``; an answer to compare with is ``response``, ``output``, ``completion`` or
    ``answer``, or a last assistant's message.

    Raises:
        UsageError: the file cannot be read.
        DataError: a line is no prompt; or there is none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error
    written = [(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not written:
        raise DataError(f"{path}: no prompt in it")
    if path.suffix not in (".jsonl", ".json"):
        return [Prompt((Turn("user", line),), source=source) for source, line in written]
    return [_from_json(line, source) for source, line in written]


def from_rows(rows: Sequence[Row], many: int) -> list[Prompt]:
    """Some rows, drawn by a seeded hash, as prompts with their answers as references."""
    found = {row.row_id: row for row in rows if len(row.turns) > 1}
    return [
        Prompt(row.turns[:-1], row.context, row.turns[-1].content, row.source)
        for row in map(found.__getitem__, seeded_order(found, "examples", 0)[:many])
        if row.turns[-1].role == "assistant"
    ]


def _from_json(line: str, source: str) -> Prompt:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise DataError(f"{source}: not JSON ({error}); one object a line") from error
    if not isinstance(found, dict):
        raise DataError(f"{source}: not a JSON object; one object a line")
    if "messages" in found:
        return _from_messages(found["messages"], source)
    asked = _text(found, _ASKED, source)
    if not asked.strip():
        raise DataError(f"{source}: has none of {', '.join(_ASKED)}, messages, or it is empty")
    context, answer = _text(found, _CONTEXT, source), _text(found, _ANSWERED, source)
    return Prompt((Turn("user", asked),), context, answer, source)


def _text(found: Mapping[str, Any], names: tuple[str, ...], source: str) -> str:
    for name in names:
        if (value := found.get(name)) is not None:
            if not isinstance(value, str):
                raise DataError(f"{source}: {name} is not text")
            return value
    return ""


def _from_messages(messages: Any, source: str) -> Prompt:
    try:
        turns = tuple(Turn(each["role"], each["content"]) for each in messages)
    except (TypeError, KeyError) as error:
        raise DataError(
            f"{source}: messages must be a list of objects with role and content"
        ) from error
    if any(
        turn.role not in ("system", "user", "assistant") or not isinstance(turn.content, str)
        for turn in turns
    ):
        raise DataError(f"{source}: messages have roles system, user, assistant, and text content")
    reference = ""
    if turns and turns[-1].role == "assistant":
        reference, turns = turns[-1].content, turns[:-1]
    if not turns or turns[-1].role != "user":
        raise DataError(f"{source}: the last message that asks must be the user's")
    return Prompt(turns, reference=reference, source=source)
