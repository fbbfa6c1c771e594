"""The formats that rows are read from, and what makes a row of each well-formed.

``FORMATS`` has one entry a format: which columns it needs, which one holds its context, and how
a record becomes turns. A new format is a new entry there, and its name in ``recipe.Format``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass

from slm_lora.errors import DataError, UsageError
from slm_lora.recipe.schema import DataSection
from slm_lora.records import Role, Row, Turn

Fields = Mapping[str, object]
"""A record by canonical field names, after ``data.columns`` has been applied."""

LABELS = ("category", "group")
"""Fields that every format takes when they are there: text or whole numbers, or null."""

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


class RowError(Exception):
    """A row is malformed; the message is the reason and never quotes the row's text."""


@dataclass(frozen=True, slots=True)
class Format:
    """Columns of a format, and how its turns are read.

    ``required`` lists alternatives: a record needs all columns of one of them. ``holds`` is what
    they hold: ``text`` or ``messages`` (lists of messages); it tells apart two formats that
    share their column names. ``context`` is the optional column of the context, if any.
    """

    required: tuple[tuple[str, ...], ...]
    holds: str
    context: str
    turns: Callable[[Fields], tuple[Turn, ...]]


def recognise(columns: Set[str], section: DataSection, lists: Set[str] = frozenset()) -> str:
    """The name of the one format that the columns fit, or that ``section.format`` names.

    The format ``text`` is chosen only where no other fits.

    ``lists`` are those columns that hold lists; they part chat from text where both are called
    ``prompt`` and ``completion``.

    Raises:
        UsageError: ``data.columns`` maps a field that no format has.
        DataError: no format fits, several do, or the one asked for lacks a column.
    """
    where = f"data.name={section.name}"
    seen = f"columns seen: {_listed(columns)}"
    for field, column in section.columns.items():
        if field not in _FIELDS:
            raise UsageError(
                f"data.columns: unknown field {field!r}; the fields are {_listed(_FIELDS)}"
            )
        if column not in columns:
            raise DataError(
                f"{where}: data.columns takes '{field}' from {_shown(column)}, "
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
        fitting = [name for name in fitting if name != "text"]
    if len(fitting) > 1:
        fitting = [name for name in fitting if _holds(FORMATS[name], names, lists)] or fitting
    if len(fitting) > 1:
        raise DataError(
            f"{where}: the columns fit several formats, {' and '.join(fitting)}; {seen}. "
            "Name one with data.format."
        )
    if not fitting:
        known = "; ".join(f"{name} ({_needs(entry)})" for name, entry in FORMATS.items())
        raise DataError(
            f"{where}: no format fits; {seen}. The formats: {known}. "
            "Name other columns in data.columns (field: column)."
        )
    return _checked(fitting[0], section)


def wanted(columns: Collection[str], section: DataSection) -> list[str]:
    """Those of the columns that some format reads, in their order; the rest need no decoding."""
    names = _canonical(columns, section.columns)
    read = {column for field, column in names.items() if field in _FIELDS}
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
    fields = {field: record[column] for field, column in names.items() if field in _FIELDS}
    context = fields.get(entry.context)
    return Row(
        turns=entry.turns(fields),
        context="" if context is None else _text(context, entry.context),
        category=_label(fields, "category"),
        group_hint=_label(fields, "group"),
        source=source,
    )


def _canonical(columns: Collection[str], mapping: Mapping[str, str]) -> dict[str, str]:
    """Canonical field → column. A mapped column answers to its field alone, so that renaming
    cannot make two formats fit; labels do not use a column up, as one may group by an
    instruction."""
    if not mapping:
        return {column: column for column in columns}
    used = {column for field, column in mapping.items() if field not in LABELS}
    names = {column: column for column in columns if column not in used and column not in mapping}
    return names | {field: column for field, column in mapping.items() if column in columns}


def _checked(name: str, section: DataSection) -> str:
    # A mapped field that the format does not read would be lost in silence.
    for field in sorted(section.columns.keys() - set(_reads(FORMATS[name])) - set(LABELS)):
        raise UsageError(
            f"data.columns: format {name} has no field {field!r}; "
            f"it reads {_listed(_reads(FORMATS[name]))}"
        )
    return name


def _reads(entry: Format) -> list[str]:
    required = [field for fields in entry.required for field in fields]
    return [*required, entry.context] if entry.context else required


def _fits(entry: Format, names: Collection[str]) -> bool:
    return any(all(field in names for field in fields) for fields in entry.required)


def _holds(entry: Format, names: Mapping[str, str], lists: Set[str]) -> bool:
    return any(
        all(
            field in names and (names[field] in lists) == (entry.holds == "messages")
            for field in fields
        )
        for fields in entry.required
    )


def _needs(entry: Format) -> str:
    kind = " as messages" if entry.holds == "messages" else ""
    return ", or ".join(" + ".join(fields) for fields in entry.required) + kind


def _shown(name: str) -> str:
    # A column's name comes from the file: it must not break the line or flood it.
    return name if name.isprintable() and 0 < len(name) <= 40 else ascii(name[:40])


def _listed(names: Collection[str], most: int = 20) -> str:
    shown = [_shown(name) for name in sorted(names)[:most]]
    return (", ".join(shown) or "none") + (", …" if len(names) > most else "")


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    words = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return words.get(type(value), f"of type {type(value).__name__}")


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{field} must be text, is {_kind(value)}")
    if "\0" in value:
        raise RowError(f"{field} has a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(f"{field} has a lone surrogate (half a character)") from None
    return value.replace("\r\n", "\n")


def _present(fields: Fields, field: str) -> object:
    if field not in fields:
        raise RowError(f"{field} is missing")
    if fields[field] is None:
        raise RowError(f"{field} is null")
    return fields[field]


def _filled(fields: Fields, field: str) -> str:
    text = _text(_present(fields, field), field)
    if not text.strip():
        raise RowError(f"{field} is empty")
    return text


def _label(fields: Fields, field: str) -> str:
    value = fields.get(field)
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        # A number in Parquet is the same digits in CSV.
        return str(value)
    return _text(value, field)


def _exchange(asked: str, answered: str) -> Callable[[Fields], tuple[Turn, ...]]:
    def turns(fields: Fields) -> tuple[Turn, ...]:
        return Turn("user", _filled(fields, asked)), Turn("assistant", _filled(fields, answered))

    return turns


def _plain(fields: Fields) -> tuple[Turn, ...]:
    return (Turn("assistant", _filled(fields, "text")),)


def _chat(fields: Fields) -> tuple[Turn, ...]:
    for field in ("messages", "conversations"):
        if field in fields:
            turns = _messages(fields, field)
            break
    else:
        if "prompt" not in fields and "completion" not in fields:
            raise RowError("messages (or conversations) is missing")
        completion = _messages(fields, "completion")
        if all(turn.role != "assistant" for turn in completion):
            raise RowError("completion has no assistant turn")
        turns = _messages(fields, "prompt") + completion
    _check_order(turns)
    return turns


def _messages(fields: Fields, field: str) -> tuple[Turn, ...]:
    messages = _present(fields, field)
    if not isinstance(messages, list):
        raise RowError(f"{field} must be a list of messages, is {_kind(messages)}")
    if not messages:
        raise RowError(f"{field} is empty")
    return tuple(_turn(message, field) for message in messages)


def _turn(message: object, field: str) -> Turn:
    if not isinstance(message, dict):
        raise RowError(f"a message in {field} must be an object, is {_kind(message)}")
    role_key, content_key = ("role", "content") if "role" in message else ("from", "value")
    if role_key not in message or content_key not in message:
        raise RowError(f"a message in {field} lacks role and content, or from and value")
    role, content = message[role_key], message[content_key]
    if not isinstance(role, str) or role not in _ROLES:
        raise RowError(f"a message in {field} has an unknown role (known: {', '.join(_ROLES)})")
    if content is None:
        raise RowError(f"{content_key} of a message in {field} is null")
    return Turn(_ROLES[role], _text(content, f"{content_key} of a message in {field}"))


def _check_order(turns: tuple[Turn, ...]) -> None:
    if any(turn.role == "system" for turn in turns[1:]):
        raise RowError("a system turn stands after another turn")
    for earlier, later in itertools.pairwise(turns):
        if earlier.role == later.role:
            raise RowError(f"two {later.role} turns in a row")
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers:
        raise RowError("no assistant turn")
    if turns[-1].role != "assistant":
        # A question without its answer: what was to be learnt is missing.
        raise RowError("the last turn is not the assistant's")
    if not answers[-1].content.strip():
        raise RowError("the last assistant turn is empty")
    if any(turn.role == "user" and not turn.content.strip() for turn in turns):
        raise RowError("a user turn is empty")


FORMATS: dict[str, Format] = {
    "dolly": Format(
        (("instruction", "response"),), "text", "context", _exchange("instruction", "response")
    ),
    "alpaca": Format(
        (("instruction", "output"),), "text", "input", _exchange("instruction", "output")
    ),
    "prompt_completion": Format(
        (("prompt", "completion"),), "text", "", _exchange("prompt", "completion")
    ),
    "chat": Format(
        (("messages",), ("conversations",), ("prompt", "completion")), "messages", "", _chat
    ),
    "text": Format((("text",),), "text", "", _plain),
}

_FIELDS = frozenset(LABELS).union(*map(_reads, FORMATS.values()))
