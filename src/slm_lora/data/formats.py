"""Row formats: recognition by columns, and conversion of records to rows.

``FORMATS`` has one entry per format. A new format is an entry there and its name in
``config.types.FormatName``; nothing else branches on a format's name.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Literal

from slm_lora.config.schema import DataSection
from slm_lora.data import column_kinds
from slm_lora.data.messages import check_order, turns_of, unread_keys
from slm_lora.data.text import RowError, checked, empty
from slm_lora.errors import DataError, UsageError
from slm_lora.records import Row, Turn

Fields = Mapping[str, object]
"""A record by canonical field names, after ``data.columns`` has been applied."""

LABELS = ("category", "group")
"""Fields that every format takes when they are there: text, or what is written as text."""

SYSTEM = ("system", "system_prompt")
"""Fields of a system turn, for every format that has turns."""


NamedTemplate = Literal["instruction_response", "chat", "plain"]


class RejectedRowError(RowError):
    """The row itself says that it is no example to learn from."""


@dataclass(frozen=True, slots=True)
class RowFormat:
    """Columns of a format, and how its turns are read.

    Attributes:
        required: alternatives, the preferred one first: a record needs all columns of one.
        read_turns: from canonical fields to turns; raises RowError for a malformed record.
        template: the template of ``data.template: auto``.
        context: the optional column of the context, if any.
        read_context: from the value and name of that column to the text of the context.
        holds: what the required columns hold: ``text``, or ``messages`` (lists of messages).
            It decides between two formats that share their column names.
        has_prompt: false for a document without turns: it takes no system turn, no mark of
            rejected answers, and is recognised only where no other format fits.
    """

    required: tuple[tuple[str, ...], ...]
    read_turns: Callable[[Fields], tuple[Turn, ...]]
    template: NamedTemplate = "instruction_response"
    context: str = ""
    read_context: Callable[[object, str], str] = checked
    holds: Literal["text", "messages"] = "text"
    has_prompt: bool = True


def recognise(columns: Set[str], section: DataSection, lists: Set[str] = frozenset()) -> str:
    """The name of the one format that the columns fit, or that ``section.format`` names.

    A format without prompts (``text``) is chosen only where no other fits.

    ``lists`` are the columns that hold lists; they distinguish a format of messages from one of
    text where both have columns ``prompt`` and ``completion``.

    Raises:
        UsageError: ``data.columns`` maps a field that no format has.
        DataError: no format fits, several do, or the one asked for lacks a column.
    """
    where = f"data.name={section.name}"
    seen = f"columns seen: {listed(columns)}"
    for field, column in section.columns.items():
        if column is None:
            if field not in columns:
                raise DataError(
                    f"{where}: data.columns leaves {shown(field)} out, "
                    f"a column that is not there; {seen}"
                )
            continue
        if field not in FIELDS:
            raise UsageError(
                f"data.columns: unknown field {field!r}; the fields are {listed(FIELDS)}"
            )
        if column not in columns:
            raise DataError(
                f"{where}: data.columns takes '{field}' from {shown(column)}, "
                f"a column that is not there; {seen}"
            )
    names = _canonical(columns, section.columns)
    if section.format != "auto":
        chosen = FORMATS[section.format]
        if not _fits(chosen, names):
            raise DataError(
                f"{where}: format {section.format} needs {_needs(chosen)}; {seen}. "
                "Name other columns in data.columns, or set data.format=auto."
            )
        return _checked(section.format, section)
    fitting = [name for name, entry in FORMATS.items() if _fits(entry, names)]
    if len(fitting) > 1:
        # Many published sets carry the rendered text beside the columns it was made of.
        fitting = [name for name in fitting if FORMATS[name].has_prompt]
    if len(fitting) > 1:
        fitting = [name for name in fitting if _holds(FORMATS[name], names, lists)] or fitting
    if len(fitting) > 1:
        raise DataError(
            f"{where}: the columns fit several formats, {' and '.join(fitting)}; {seen}. "
            "Name one with data.format."
        )
    if not fitting and (other := column_kinds.explain(columns, lists)):
        raise DataError(f"{where}: {other}; {seen}.")
    if not fitting:
        known = "; ".join(f"{name} ({_needs(entry)})" for name, entry in FORMATS.items())
        raise DataError(
            f"{where}: no format fits; {seen}. The formats: {known}. "
            f"Name other columns in data.columns{column_kinds.mapping(columns, lists)}."
        )
    return _checked(fitting[0], section)


def wanted(columns: Collection[str], section: DataSection) -> list[str]:
    """Those of the columns that are looked at, in their order; the rest need no decoding.

    They are those that some format reads, and those whose content must not be lost in silence.
    """
    names = _canonical(columns, section.columns)
    read = {
        column for field, column in names.items() if field in FIELDS or column_kinds.watched(field)
    }
    return [column for column in columns if column in read]


def to_row(
    record: Mapping[str, object], source: str, format_name: str, section: DataSection
) -> Row:
    """The record in canonical form.

    Text is kept as it is, except that ``\\r\\n`` becomes ``\\n``: tools on the way (CSV writers,
    version control) change line ends, and the same row must have the same id everywhere.

    Raises:
        RowError: the record is malformed; the message says how.
    """
    entry = FORMATS[format_name]
    names = _canonical(record, section.columns)
    fields = {field: record[column] for field, column in names.items() if field in FIELDS}
    if entry.has_prompt:
        _check_not_rejected(record, names, section)
    for field in names:
        if field not in fields and column_kinds.refused(field) and not empty(record[names[field]]):
            raise RowError(
                f"column {shown(field)} has content, which the text would be without; "
                f"data.columns={{{shown(field)}: null}} takes the row without it"
            )
    context = fields.get(entry.context)
    try:
        turns = entry.read_turns(fields)
    except RowError as error:
        if {"chosen", "rejected"} <= record.keys() and "chosen" not in section.columns.values():
            raise RowError(
                f"{error}; of preference data, put the answer in chosen at the end of the messages"
            ) from None
        raise
    return Row(
        turns=_with_system(turns, fields) if entry.has_prompt else turns,
        context="" if context is None else entry.read_context(context, entry.context),
        category=_label(fields, "category"),
        group_hint=_label(fields, "group"),
        source=source,
    )


def left_out(
    record: Mapping[str, object], format_name: str, section: DataSection
) -> Iterator[tuple[str, str]]:
    """What a well-formed record says and `to_row` does not read.

    Yields:
        ``("column", name)`` of columns that usually are part of a prompt, and
        ``("key", name)`` of keys of messages.
    """
    read = read_columns(record, format_name, section)
    for column, value in record.items():
        known = column in column_kinds.PROMPT_COLUMNS and column not in read
        if known and column not in dropped(section) and not empty(value):
            yield "column", column
    entry = FORMATS[format_name]
    if entry.holds == "messages":
        names = _canonical(record, section.columns)
        for field in itertools.chain(*entry.required):
            if field in names and names[field] in read:
                for key in unread_keys(record[names[field]]):
                    yield "key", key


def dropped(section: DataSection) -> set[str]:
    """Columns that the recipe leaves out."""
    return {column for column, name in section.columns.items() if name is None}


def context_of(format_name: str, columns: Collection[str], section: DataSection) -> str:
    """The field of the format's context, if it has one that no column answers to."""
    context = FORMATS[format_name].context
    return "" if context in _canonical(columns, section.columns) else context


def read_columns(columns: Collection[str], format_name: str, section: DataSection) -> set[str]:
    """Those of the columns that the format reads."""
    names = _canonical(columns, section.columns)
    entry = FORMATS[format_name]
    complete = (fields for fields in entry.required if all(field in names for field in fields))
    required = next(complete, entry.required[-1])
    fields = [*required, *_optional(entry), *LABELS]
    return {names[field] for field in fields if field in names}


def _check_not_rejected(
    record: Mapping[str, object], names: Mapping[str, str], section: DataSection
) -> None:
    for field in column_kinds.MARKS:
        # Under another name it is read, and means what the recipe says.
        if field in names and field not in section.columns.values():
            value = record[names[field]]
            spelt = value.strip().lower() if isinstance(value, str) else value
            # A label of 0 is a class more often than a verdict.
            if spelt is False or spelt == "false" or (field == "weight" and spelt in (0, "0")):
                off = "0" if field == "weight" else "false"
                raise RejectedRowError(
                    f"{field} is {off}: the row is marked not to be learnt, as in KTO data; "
                    f"data.columns={{{field}: null}} takes it all the same"
                )


def _with_system(turns: tuple[Turn, ...], fields: Fields) -> tuple[Turn, ...]:
    for name in SYSTEM:
        if empty(fields.get(name)):
            continue
        text = checked(fields[name], name)
        if turns[0].role != "system":
            turns = (Turn("system", text), *turns)
        elif turns[0].content != text:
            raise RowError(f"a system turn beside the column {name}, which says something else")
    return turns


def _canonical(columns: Collection[str], mapping: Mapping[str, str | None]) -> dict[str, str]:
    """Canonical field → column. A mapped column answers to its field alone, so that renaming
    cannot make two formats fit; labels do not use a column up, as one may group by an
    instruction."""
    if not mapping:
        return {column: column for column in columns}
    used = {column for field, column in mapping.items() if field not in LABELS}
    names = {column: column for column in columns if column not in used and column not in mapping}
    return names | {
        field: column
        for field, column in mapping.items()
        if column is not None and column in columns
    }


def _checked(name: str, section: DataSection) -> str:
    # A mapped field that the format does not read would be lost in silence.
    mapped = {field for field, column in section.columns.items() if column is not None}
    for field in sorted(mapped - set(_reads(FORMATS[name])) - set(LABELS)):
        raise UsageError(
            f"data.columns: format {name} has no field {field!r}; "
            f"it reads {listed(_reads(FORMATS[name]))}"
        )
    return name


def _reads(entry: RowFormat) -> list[str]:
    return [*itertools.chain(*entry.required), *_optional(entry)]


def _optional(entry: RowFormat) -> list[str]:
    return [*([entry.context] if entry.context else []), *(SYSTEM if entry.has_prompt else ())]


def _fits(entry: RowFormat, names: Collection[str]) -> bool:
    return any(all(field in names for field in fields) for fields in entry.required)


def _holds(entry: RowFormat, names: Mapping[str, str], lists: Set[str]) -> bool:
    return any(
        all(
            field in names and (names[field] in lists) == (entry.holds == "messages")
            for field in fields
        )
        for fields in entry.required
    )


def _needs(entry: RowFormat) -> str:
    kind = " as messages" if entry.holds == "messages" else ""
    return ", or ".join(" + ".join(fields) for fields in entry.required) + kind


def shown(name: str) -> str:
    """A name of a column or a key, for a message."""
    # A column's name comes from the file: it must not break the line or flood it.
    plain = name.isprintable() and 0 < len(name) <= 40 and name == name.strip()
    return name if plain else ascii(name[:40])


def listed(names: Collection[str], most: int = 20) -> str:
    """Some names, for a message."""
    some = [shown(name) for name in sorted(names)[:most]]
    return (", ".join(some) or "none") + (", …" if len(names) > most else "")


def _present(fields: Fields, field: str) -> object:
    if field not in fields:
        raise RowError(f"{field} is missing")
    if fields[field] is None:
        raise RowError(f"{field} is null")
    return fields[field]


def _filled(fields: Fields, field: str) -> str:
    text = checked(_present(fields, field), field)
    if not text.strip():
        raise RowError(f"{field} is empty")
    return text


def _label(fields: Fields, field: str) -> str:
    value = fields.get(field)
    if isinstance(value, str):
        return checked(value, field, rendered=False)
    if empty(value):
        return ""
    # A number in Parquet is the same digits in CSV.
    try:
        written = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        raise RowError(f"{field} cannot be written as text") from None
    return checked(written, field, rendered=False)


def _exchange(asked: str, answered: str) -> Callable[[Fields], tuple[Turn, ...]]:
    def turns(fields: Fields) -> tuple[Turn, ...]:
        return Turn("user", _filled(fields, asked)), Turn("assistant", _filled(fields, answered))

    return turns


def _document(fields: Fields) -> tuple[Turn, ...]:
    return (Turn("assistant", _filled(fields, "text")),)


def _chat(fields: Fields) -> tuple[Turn, ...]:
    for field in ("messages", "conversations"):
        if field in fields:
            turns = turns_of(_present(fields, field), field)
            break
    else:
        if "prompt" not in fields and "completion" not in fields:
            raise RowError("messages (or conversations) is missing")
        completion = turns_of(_present(fields, "completion"), "completion")
        if all(turn.role != "assistant" for turn in completion):
            raise RowError("completion has no assistant turn")
        turns = turns_of(_present(fields, "prompt"), "prompt") + completion
    check_order(turns)
    return turns


FORMATS: dict[str, RowFormat] = {
    "dolly": RowFormat(
        (("instruction", "response"),), _exchange("instruction", "response"), context="context"
    ),
    "alpaca": RowFormat(
        (("instruction", "output"),), _exchange("instruction", "output"), context="input"
    ),
    "prompt_completion": RowFormat(
        (("prompt", "completion"),), _exchange("prompt", "completion"), template="plain"
    ),
    "chat": RowFormat(
        (("messages",), ("conversations",), ("prompt", "completion")),
        _chat,
        template="chat",
        holds="messages",
    ),
    "text": RowFormat((("text",),), _document, template="plain", has_prompt=False),
}

FIELDS = frozenset(LABELS).union(*map(_reads, FORMATS.values()))
"""Names that ``data.columns`` may map."""
