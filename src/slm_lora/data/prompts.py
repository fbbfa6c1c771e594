"""Prompts from a file: a question a row, with an answer to compare with where there is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slm_lora.config.schema import DataSection
from slm_lora.data.column_kinds import PROMPT_COLUMNS, refused
from slm_lora.data.files import is_known, is_read, read_file, suffix_of
from slm_lora.data.formats import SYSTEM
from slm_lora.data.messages import turns_of
from slm_lora.data.splits import seeded_order
from slm_lora.data.table import Record, check_size
from slm_lora.data.text import RowError, checked, empty
from slm_lora.errors import DataError, StorageError, UsageError
from slm_lora.records import Row, Turn

_MESSAGES = ("messages", "conversations", "prompt")
_ASKED, _CONTEXT = ("instruction", "prompt", "question"), ("context", "input")
_ANSWERED = ("response", "output", "completion", "answer")
_NOT_READ = frozenset(PROMPT_COLUMNS) - {*_ASKED, *_CONTEXT, *SYSTEM} - {
    "query", "tools", "functions", "reasoning", "reasoning_content", "thinking", "rationale"
}  # fmt: skip
"""Columns that would be missing in a prompt; the rest of `PROMPT_COLUMNS` is of answers, or
refused anyway."""

_AS_ROWS = DataSection(text_rows="lines")


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
    """Read a text file (one prompt a line), or a file of records as `read_file` does.

    A record has ``instruction``, ``prompt`` or ``question`` (and ``context`` or ``input``, and
    ``system``), or ``messages``; an answer to compare with is ``response``, ``output``,
    ``completion`` or ``answer``, or a last assistant's message. In JSON a prompt may be a text.

    Raises:
        UsageError: the file cannot be read.
        DataError: a line is no prompt; or there is none.
    """
    suffix = suffix_of(path)
    # A list of questions may have any name; what is known to be no text is refused by the reader.
    as_text = not is_read(suffix) and (not is_known(suffix) or suffix == ".md")
    try:
        table, _ = read_file(
            path, _AS_ROWS, str(path), strings=True, suffix=".txt" if as_text else ""
        )
    except StorageError as error:
        raise UsageError(str(error)) from error
    if not table.records:
        raise DataError(f"{path}: no prompt in it")
    prompts, bad = [], []
    for place, record in table.records:
        try:
            if isinstance(record, RowError):
                raise record
            prompts.append(_prompt(record, str(place)))
        except RowError as error:
            bad.append((place, error))
    if bad:
        place, reason = bad[0]
        more = f" (and {len(bad) - 1} more that are no prompts)" if len(bad) > 1 else ""
        if table.encoding:
            more += f"; looks like {table.encoding}, save the file as UTF-8"
        raise DataError(f"{place}: {reason}{more}")
    return prompts


def from_rows(rows: Sequence[Row], many: int) -> list[Prompt]:
    """Some rows, drawn by a seeded hash, as prompts with their answers as references."""
    found = {row.row_id: row for row in rows if len(row.turns) > 1}
    return [
        Prompt(row.turns[:-1], row.context, row.turns[-1].content, row.source)
        for row in map(found.__getitem__, seeded_order(found, "examples", 0)[:many])
        if row.turns[-1].role == "assistant"
    ]


def _prompt(record: Record, source: str) -> Prompt:
    for column, value in record.items():
        if (refused(column) or column in _NOT_READ) and not empty(value):
            raise RowError(f"{column} has content, which would be left out of the prompt")
    context, system = _text(record, _CONTEXT), _text(record, SYSTEM)
    listed = next((name for name in _MESSAGES if isinstance(record.get(name), list)), "")
    if listed:
        turns = turns_of(record[listed], listed, learnt=False)
        reference = ""
        if turns[-1].role == "assistant":
            reference, turns = turns[-1].content, turns[:-1]
        if not turns or turns[-1].role != "user":
            raise RowError("the last message that asks must be the user's")
        if not reference:
            reference = _answer(record)
    else:
        asked, reference = _text(record, _ASKED) or _text(record, ("text",)), _answer(record)
        if not asked.strip():
            raise RowError(f"has none of {', '.join(_ASKED)}, messages, or it is empty")
        turns = (Turn("user", asked),)
    check_size(sum(len(turn.content.encode()) for turn in turns) + len(context.encode()))
    if system.strip() and turns[0].role != "system":
        turns = (Turn("system", system), *turns)
    return Prompt(turns, context, reference, source)


def _answer(record: Record) -> str:
    """The answer of a record: text, or messages, of which it is the last."""
    for name in _ANSWERED:
        if isinstance(messages := record.get(name), list) and messages:
            return turns_of(messages, name, learnt=False)[-1].content
    return _text(record, _ANSWERED)


def _text(record: Mapping[str, object], names: tuple[str, ...]) -> str:
    """The text of the one of these columns that has some."""
    found = [(name, checked(record[name], name)) for name in names if record.get(name) is not None]
    filled = [(name, text) for name, text in found if text.strip()]
    if len({text for _, text in filled}) > 1:
        raise RowError(f"has {' and '.join(name for name, _ in filled)}, of which one is read")
    return (filled or found or [("", "")])[0][1]
