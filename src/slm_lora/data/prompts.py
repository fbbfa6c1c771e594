"""Read prompts from a file: one question a row, with an optional reference answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slm_lora.config.schema import DataSection
from slm_lora.data.column_kinds import PROMPT_COLUMNS, is_refused
from slm_lora.data.files import is_known_suffix, is_supported, read_file, suffix_of
from slm_lora.data.formats import SYSTEM_FIELDS
from slm_lora.data.messages import parse_messages
from slm_lora.data.splits import seeded_order
from slm_lora.data.table import Record, check_size
from slm_lora.data.text import RowError, is_empty, require_text
from slm_lora.errors import DataError, StorageError, UsageError
from slm_lora.records import Row, Turn

_MESSAGES = ("messages", "conversations", "prompt")
_QUESTION, _CONTEXT = ("instruction", "prompt", "question"), ("context", "input")
_ANSWER = ("response", "output", "completion", "answer")
_NOT_READ = frozenset(PROMPT_COLUMNS) - {*_QUESTION, *_CONTEXT, *SYSTEM_FIELDS} - {
    "query", "tools", "functions", "reasoning", "reasoning_content", "thinking", "rationale"
}  # fmt: skip
"""Columns refused because the prompt would lack their content; other `PROMPT_COLUMNS` belong to
answers or are refused anyway."""

_AS_ROWS = DataSection(text_rows="lines")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that ends with a user's turn.

    Attributes:
        turns: the turns of the conversation.
        context: the context, for templates trained with contexts.
        reference: an answer whose loss can be computed; empty if there is none.
        source: ``file:line``, for messages.
    """

    turns: tuple[Turn, ...]
    context: str = ""
    reference: str = ""
    source: str = ""

    @property
    def as_row(self) -> Row:
        """Return the row of prompt and reference."""
        return Row((*self.turns, Turn("assistant", self.reference)), self.context)


def read_prompts(path: Path) -> list[Prompt]:
    """Read a text file with one prompt a line, or a file of records.

    A record has ``instruction``, ``prompt`` or ``question`` (and ``context`` or ``input``, and
    ``system``), or ``messages``; the reference answer is ``response``, ``output``,
    ``completion`` or ``answer``, or a final message of the assistant. In JSON a prompt may also
    be a string.

    Raises:
        UsageError: the file cannot be read.
        DataError: a line is not a prompt, or there are no prompts.
    """
    suffix = suffix_of(path)
    # A text file of questions may have any suffix; known other types are refused by the reader.
    as_text = not is_supported(suffix) and (not is_known_suffix(suffix) or suffix == ".md")
    try:
        table, _ = read_file(
            path, _AS_ROWS, str(path), strings=True, suffix=".txt" if as_text else ""
        )
    except StorageError as error:
        raise UsageError(str(error)) from error
    if not table.records:
        raise DataError(f"{path}: no prompt in it")
    prompts, bad = [], []
    for location, record in table.records:
        try:
            if isinstance(record, RowError):
                raise record
            prompts.append(_prompt(record, str(location)))
        except RowError as error:
            bad.append((location, error))
    if bad:
        location, reason = bad[0]
        details = f" (and {len(bad) - 1} more that are not prompts)" if len(bad) > 1 else ""
        if table.encoding:
            details += f"; looks like {table.encoding}, save the file as UTF-8"
        raise DataError(f"{location}: {reason}{details}")
    return prompts


def prompts_from_rows(rows: Sequence[Row], count: int) -> list[Prompt]:
    """Draw up to ``count`` rows by a seeded hash, with their answers as references."""
    by_id = {row.row_id: row for row in rows if len(row.turns) > 1}
    return [
        Prompt(row.turns[:-1], row.context, row.turns[-1].content, row.source)
        for row in map(by_id.__getitem__, seeded_order(by_id, "examples", 0)[:count])
        if row.turns[-1].role == "assistant"
    ]


def _prompt(record: Record, source: str) -> Prompt:
    for column, value in record.items():
        if (is_refused(column) or column in _NOT_READ) and not is_empty(value):
            raise RowError(f"{column} has content, which would be left out of the prompt")
    context, system = _text(record, _CONTEXT), _text(record, SYSTEM_FIELDS)
    field = next((name for name in _MESSAGES if isinstance(record.get(name), list)), "")
    if field:
        turns = parse_messages(record[field], field, trained=False)
        reference = ""
        if turns[-1].role == "assistant":
            reference, turns = turns[-1].content, turns[:-1]
        if not turns or turns[-1].role != "user":
            raise RowError("the last message of the prompt must be the user's")
        if not reference:
            reference = _answer(record)
    else:
        question, reference = _text(record, _QUESTION) or _text(record, ("text",)), _answer(record)
        if not question.strip():
            raise RowError(f"has none of {', '.join(_QUESTION)}, messages, or it is empty")
        turns = (Turn("user", question),)
    check_size(sum(len(turn.content.encode()) for turn in turns) + len(context.encode()))
    if system.strip() and turns[0].role != "system":
        turns = (Turn("system", system), *turns)
    return Prompt(turns, context, reference, source)


def _answer(record: Record) -> str:
    """Return the answer of a record: a text, or the last of its messages."""
    for name in _ANSWER:
        if isinstance(messages := record.get(name), list) and messages:
            return parse_messages(messages, name, trained=False)[-1].content
    return _text(record, _ANSWER)


def _text(record: Mapping[str, object], names: tuple[str, ...]) -> str:
    """Return the text of the first non-empty column of these."""
    texts = [
        (name, require_text(record[name], name)) for name in names if record.get(name) is not None
    ]
    non_empty = [(name, text) for name, text in texts if text.strip()]
    if len({text for _, text in non_empty}) > 1:
        raise RowError(f"has {' and '.join(name for name, _ in non_empty)}, of which one is read")
    return (non_empty or texts or [("", "")])[0][1]
