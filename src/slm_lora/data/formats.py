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
from slm_lora.data.messages import check_turn_order, parse_messages, unread_keys
from slm_lora.data.text import RowError, is_empty, list_names, printable_name, require_text
from slm_lora.errors import DataError, UsageError
from slm_lora.records import Row, Turn

Fields = Mapping[str, object]
"""A record by canonical field names, with ``data.columns`` applied."""

LABEL_FIELDS = ("category", "group")
"""Optional fields of every format; values other than text are written as JSON."""

SYSTEM_FIELDS = ("system", "system_prompt")
"""Fields of a system turn, for every format with prompts."""

NamedTemplate = Literal["instruction_response", "chat", "plain"]


class RejectedRowError(RowError):
    """The row is marked as excluded from training, as a rejected answer is."""


@dataclass(frozen=True, slots=True)
class RowFormat:
    """Columns of a format, and the conversion of its records.

    Attributes:
        required: alternative sets of columns, the preferred one first; a record needs all
            columns of one set.
        read_turns: converts canonical fields to turns; raises RowError for a malformed record.
        template: the template that ``data.template: auto`` selects.
        context: the optional column of the context, if any.
        read_context: converts value and name of that column to the text of the context.
        content_type: type of the required columns: ``text``, or ``messages`` (lists of
            messages). It distinguishes formats that share their column names.
        has_prompt: false for a document without turns: it has no system turn and no mark of
            rejected answers, and is detected only where no other format fits.
    """

    required: tuple[tuple[str, ...], ...]
    read_turns: Callable[[Fields], tuple[Turn, ...]]
    template: NamedTemplate = "instruction_response"
    context: str = ""
    read_context: Callable[[object, str], str] = require_text
    content_type: Literal["text", "messages"] = "text"
    has_prompt: bool = True


def detect_format(columns: Set[str], section: DataSection, lists: Set[str] = frozenset()) -> str:
    """Return the name of the format that the columns fit, or of ``section.format``.

    Args:
        columns: names of the columns of the data set.
        section: the data section, which may name a format and map columns.
        lists: columns of lists; they distinguish a format of messages from one of text where
            both have columns ``prompt`` and ``completion``.

    Raises:
        UsageError: ``data.columns`` maps a field that no format has.
        DataError: no format fits, several do, or the requested one lacks a column.
    """
    where = f"data.name={section.name}"
    seen = f"columns seen: {list_names(columns)}"
    for field, column in section.columns.items():
        if column is None:
            if field not in columns:
                raise DataError(
                    f"{where}: data.columns leaves {printable_name(field)} out, "
                    f"which is not a column; {seen}"
                )
            continue
        if field not in FIELDS:
            raise UsageError(
                f"data.columns: unknown field {field!r}; the fields are {list_names(FIELDS)}"
            )
        if column not in columns:
            raise DataError(
                f"{where}: data.columns takes '{field}' from {printable_name(column)}, "
                f"which is not a column; {seen}"
            )
    names = _canonical(columns, section.columns)
    if section.format != "auto":
        entry = FORMATS[section.format]
        if not _fits(entry, names):
            raise DataError(
                f"{where}: format {section.format} needs {_needs(entry)}; {seen}. "
                "Name other columns in data.columns, or set data.format=auto."
            )
        return _check_mapping(section.format, section)
    fitting = [name for name, entry in FORMATS.items() if _fits(entry, names)]
    if len(fitting) > 1:
        # Many published data sets also have a column of the rendered text.
        fitting = [name for name in fitting if FORMATS[name].has_prompt]
    if len(fitting) > 1:
        typed = [name for name in fitting if _has_content_type(FORMATS[name], names, lists)]
        fitting = typed or fitting
    if len(fitting) > 1:
        raise DataError(
            f"{where}: the columns fit several formats, {' and '.join(fitting)}; {seen}. "
            "Name one with data.format."
        )
    if not fitting and (explanation := column_kinds.explain_unsupported(columns, lists)):
        raise DataError(f"{where}: {explanation}; {seen}.")
    if not fitting:
        known = "; ".join(f"{name} ({_needs(entry)})" for name, entry in FORMATS.items())
        raise column_kinds.no_format_fits(
            f"{where}: no format fits; {seen}. The formats: {known}.", columns, lists
        )
    return _check_mapping(fitting[0], section)


def columns_to_decode(columns: Collection[str], section: DataSection) -> list[str]:
    """Return the columns that must be decoded, in their order.

    They are those that a format reads, that `unread_content` reports, or that `to_row` refuses.
    """
    names = _canonical(columns, section.columns)
    decoded = {
        column
        for field, column in names.items()
        if field in FIELDS or column_kinds.is_watched(field)
    }
    return [column for column in columns if column in decoded]


def to_row(
    record: Mapping[str, object], source: str, format_name: str, section: DataSection
) -> Row:
    """Convert a record to a row.

    Text is unchanged, but ``\\r\\n`` becomes ``\\n``, as tools change line ends and a row must
    keep its id.

    Raises:
        RowError: the record is malformed; the message gives the reason.
    """
    entry = FORMATS[format_name]
    names = _canonical(record, section.columns)
    fields = {field: record[column] for field, column in names.items() if field in FIELDS}
    if entry.has_prompt:
        _check_not_rejected(record, names, section)
    for field in names:
        if (
            field not in fields
            and column_kinds.is_refused(field)
            and not is_empty(record[names[field]])
        ):
            raise RowError(
                f"column {printable_name(field)} has content, which the training text would lack; "
                f"data.columns={{{printable_name(field)}: null}} ignores the column"
            )
    context = fields.get(entry.context)
    try:
        turns = entry.read_turns(fields)
    except RowError as error:
        if {"chosen", "rejected"} <= record.keys() and "chosen" not in section.columns.values():
            raise RowError(
                f"{error}; in preference data, put the answer in chosen at the end of the messages"
            ) from None
        raise
    return Row(
        turns=_with_system(turns, fields) if entry.has_prompt else turns,
        context="" if context is None else entry.read_context(context, entry.context),
        category=_label(fields, "category"),
        group_hint=_label(fields, "group"),
        source=source,
    )


def unread_content(
    record: Mapping[str, object], format_name: str, section: DataSection
) -> Iterator[tuple[str, str]]:
    """Yield non-empty content of a well-formed record that `to_row` does not read.

    Yields:
        ``("column", name)`` of columns that usually are part of a prompt, and
        ``("key", name)`` of keys of messages.
    """
    read = read_columns(record, format_name, section)
    for column, value in record.items():
        unread = column in column_kinds.PROMPT_COLUMNS and column not in read
        if unread and column not in excluded_columns(section) and not is_empty(value):
            yield "column", column
    entry = FORMATS[format_name]
    if entry.content_type == "messages":
        names = _canonical(record, section.columns)
        for field in itertools.chain(*entry.required):
            if field in names and names[field] in read:
                for key in unread_keys(record[names[field]]):
                    yield "key", key


def excluded_columns(section: DataSection) -> set[str]:
    """Return the columns that ``data.columns`` maps to null."""
    return {column for column, name in section.columns.items() if name is None}


def unmapped_context(format_name: str, columns: Collection[str], section: DataSection) -> str:
    """Return the context field of the format if no column is mapped to it; else empty."""
    context = FORMATS[format_name].context
    return "" if context in _canonical(columns, section.columns) else context


def read_columns(columns: Collection[str], format_name: str, section: DataSection) -> set[str]:
    """Return the columns that the format reads."""
    names = _canonical(columns, section.columns)
    entry = FORMATS[format_name]
    complete = (fields for fields in entry.required if all(field in names for field in fields))
    required = next(complete, entry.required[-1])
    fields = [*required, *_optional(entry), *LABEL_FIELDS]
    return {names[field] for field in fields if field in names}


def _check_not_rejected(
    record: Mapping[str, object], names: Mapping[str, str], section: DataSection
) -> None:
    for field in column_kinds.REJECTION_MARKS:
        # A column that the recipe maps to a field is read as that field.
        if field in names and field not in section.columns.values():
            value = record[names[field]]
            normalised = value.strip().lower() if isinstance(value, str) else value
            # A label of 0 is more often a class than a rejection.
            if (
                normalised is False
                or normalised == "false"
                or (field == "weight" and normalised in (0, "0"))
            ):
                off = "0" if field == "weight" else "false"
                raise RejectedRowError(
                    f"{field} is {off}: the row is excluded from training, as in KTO data; "
                    f"data.columns={{{field}: null}} ignores the mark"
                )


def _with_system(turns: tuple[Turn, ...], fields: Fields) -> tuple[Turn, ...]:
    for name in SYSTEM_FIELDS:
        if is_empty(fields.get(name)):
            continue
        text = require_text(fields[name], name)
        if turns[0].role != "system":
            turns = (Turn("system", text), *turns)
        elif turns[0].content != text:
            raise RowError(f"the system turn differs from the column {name}")
    return turns


def _canonical(columns: Collection[str], mapping: Mapping[str, str | None]) -> dict[str, str]:
    """Map canonical fields to columns.

    A column mapped to a field loses its own name, so that a mapping cannot make two formats
    fit; not so for label fields, as rows may be grouped by a column that is also read.
    """
    if not mapping:
        return {column: column for column in columns}
    used = {column for field, column in mapping.items() if field not in LABEL_FIELDS}
    names = {column: column for column in columns if column not in used and column not in mapping}
    return names | {
        field: column
        for field, column in mapping.items()
        if column is not None and column in columns
    }


def _check_mapping(name: str, section: DataSection) -> str:
    # A mapped field that the format does not read would be lost silently.
    mapped = {field for field, column in section.columns.items() if column is not None}
    for field in sorted(mapped - set(_reads(FORMATS[name])) - set(LABEL_FIELDS)):
        raise UsageError(
            f"data.columns: format {name} has no field {field!r}; "
            f"it reads {list_names(_reads(FORMATS[name]))}"
        )
    return name


def _reads(entry: RowFormat) -> list[str]:
    return [*itertools.chain(*entry.required), *_optional(entry)]


def _optional(entry: RowFormat) -> list[str]:
    return [
        *([entry.context] if entry.context else []),
        *(SYSTEM_FIELDS if entry.has_prompt else ()),
    ]


def _fits(entry: RowFormat, names: Collection[str]) -> bool:
    return any(all(field in names for field in fields) for fields in entry.required)


def _has_content_type(entry: RowFormat, names: Mapping[str, str], lists: Set[str]) -> bool:
    return any(
        all(
            field in names and (names[field] in lists) == (entry.content_type == "messages")
            for field in fields
        )
        for fields in entry.required
    )


def _needs(entry: RowFormat) -> str:
    suffix = " as messages" if entry.content_type == "messages" else ""
    return ", or ".join(" + ".join(fields) for fields in entry.required) + suffix


def _non_null(fields: Fields, field: str) -> object:
    if field not in fields:
        raise RowError(f"{field} is missing")
    if fields[field] is None:
        raise RowError(f"{field} is null")
    return fields[field]


def _non_empty(fields: Fields, field: str) -> str:
    text = require_text(_non_null(fields, field), field)
    if not text.strip():
        raise RowError(f"{field} is empty")
    return text


def _label(fields: Fields, field: str) -> str:
    value = fields.get(field)
    if isinstance(value, str):
        return require_text(value, field, rendered=False)
    if is_empty(value):
        return ""
    # JSON gives a number from Parquet the same digits as in CSV.
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        raise RowError(f"{field} cannot be written as text") from None
    return require_text(text, field, rendered=False)


def _exchange(prompt: str, response: str) -> Callable[[Fields], tuple[Turn, ...]]:
    def read_turns(fields: Fields) -> tuple[Turn, ...]:
        return (
            Turn("user", _non_empty(fields, prompt)),
            Turn("assistant", _non_empty(fields, response)),
        )

    return read_turns


def _document(fields: Fields) -> tuple[Turn, ...]:
    return (Turn("assistant", _non_empty(fields, "text")),)


def _chat(fields: Fields) -> tuple[Turn, ...]:
    for field in ("messages", "conversations"):
        if field in fields:
            turns = parse_messages(_non_null(fields, field), field)
            break
    else:
        if "prompt" not in fields and "completion" not in fields:
            raise RowError("messages (or conversations) is missing")
        completion = parse_messages(_non_null(fields, "completion"), "completion")
        if all(turn.role != "assistant" for turn in completion):
            raise RowError("completion has no assistant turn")
        turns = parse_messages(_non_null(fields, "prompt"), "prompt") + completion
    check_turn_order(turns)
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
        content_type="messages",
    ),
    "text": RowFormat((("text",),), _document, template="plain", has_prompt=False),
}

FIELDS = frozenset(LABEL_FIELDS).union(*map(_reads, FORMATS.values()))
"""Names that ``data.columns`` may map."""
