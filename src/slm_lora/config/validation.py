"""Validation of a recipe: error messages with key, value, source line and a suggestion."""

from __future__ import annotations

import difflib
import reprlib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from slm_lora.config.aliases import NO_EQUIVALENT, key_for_alias
from slm_lora.config.schema import Recipe

Settings = dict[str, Any]
_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(slots=True)
class Sources:
    """Source of each dotted key, for messages: line of the file, or an override."""

    file: str
    lines: dict[str, int] = field(default_factory=dict)
    overrides: dict[str, None] = field(default_factory=dict)

    def origin(self, key: str) -> str:
        """`override` or the name of the file, the start of a message about the key."""
        return "override" if self._from_override(key) else self.file

    def line_suffix(self, key: str) -> str:
        """`` (line N)``, the end of a message about the key; empty without a known line."""
        if self._from_override(key):
            return ""
        parts = key.split(".")
        for end in range(len(parts), 0, -1):
            if (number := self.lines.get(".".join(parts[:end]))) is not None:
                return f" (line {number})"
        return ""

    def _from_override(self, key: str) -> bool:
        return any(
            key == override
            or key.startswith(f"{override}.")
            # a section that exists only through the override
            or (override.startswith(f"{key}.") and key not in self.lines)
            for override in self.overrides
        )


def section_of(info: FieldInfo) -> type[BaseModel] | None:
    """The section that a key holds, or may hold; None for a key with a value, or with sections
    under names of their own."""
    if typing.get_origin(info.annotation) is dict:
        return None
    for kind in (info.annotation, *typing.get_args(info.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, info in model.model_fields.items():
        yield prefix + name, info
        if (section := section_of(info)) is not None:
            yield from _fields(section, f"{prefix}{name}.")


def known_keys(model: type[BaseModel] = Recipe) -> Iterator[str]:
    """All dotted keys of the schema, each section before its keys."""
    for key, _ in _fields(model):
        yield key


def number_keys(model: type[BaseModel] = Recipe) -> Iterator[str]:
    """Dotted keys whose values are, or can be, numbers."""
    for key, info in _fields(model):
        if {int, float} & set(_union_members(info.annotation)):
            yield key


def _union_members(annotation: Any) -> Iterator[Any]:
    """The types of a union, or the one type, without validators."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        for member in inner:
            yield from _union_members(member)
    elif origin is typing.Annotated:
        yield from _union_members(inner[0])
    else:
        yield annotation


def unsettable_reason(key: str, model: type[BaseModel]) -> str:
    """The reason why a dotted key cannot be set on its own; empty if it can."""
    fields = dict(_fields(model))
    if key in fields:
        if section_of(fields[key]) is None:
            return ""
        inner = next(name for name in fields if name.startswith(f"{key}."))
        return f"'{format_value(key)}' is a section; set a key of it, such as '{inner}'"
    parent, _, last = key.rpartition(".")
    if last and parent in fields and typing.get_origin(fields[parent].annotation) is dict:
        return ""
    if last and _holds_sections(fields.get(parent.rpartition(".")[0])):  # also.german.margin
        return ""
    return f"unknown key '{format_value(key)}'{suggestion(key, list(fields))}"


def _holds_sections(info: FieldInfo | None) -> bool:
    """Whether a key holds sections under names of their own."""
    if info is None or typing.get_origin(info.annotation) is not dict:
        return False
    kind = typing.get_args(info.annotation)[1]
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def suggestion(key: str, keys: list[str]) -> str:
    """The end of a message about an unknown key: a similar known one, else empty."""
    # Spelling of other command lines: --per-device-train-batch-size.
    normalised = key.strip().lstrip("-").replace("-", "_").lower()
    last = normalised.rsplit(".", 1)[-1]
    by_last = {known.rsplit(".", 1)[-1]: known for known in reversed(keys)}
    # A known name in the wrong section, then names from other tools, then typing errors.
    if last in by_last:
        return f"; did you mean '{by_last[last]}'?"
    if (alias := key_for_alias(last)) and alias.split(" ", 1)[0].split("=", 1)[0] in keys:
        known, _, remark = alias.partition(" ")
        return f"; did you mean '{known}'?" + (f" {remark}" if remark else "")
    if last in NO_EQUIVALENT:
        return f"; not an option: {NO_EQUIVALENT[last]}"
    matches = difflib.get_close_matches(normalised, keys, n=1, cutoff=0.6)
    matches = matches or [
        by_last[name] for name in difflib.get_close_matches(last, by_last, n=1, cutoff=0.75)
    ]
    return f"; did you mean '{matches[0]}'?" if matches else ""


_MESSAGES = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be below 2^63",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be finite",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
    "model_attributes_type": "must be a mapping of keys to values",
    "string_pattern_mismatch": "must be of a-z, 0-9 and . _ -, a letter or digit first",
}
"""Messages by pydantic's error type."""


def validate(
    model: type[_Model], settings: Settings, sources: Sources, errors: list[str], location: str = ""
) -> _Model | None:
    """The settings as an instance of the schema; None if invalid, with messages in ``errors``.

    ``location`` replaces the file and line in messages.
    """
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        messages: dict[str, str] = {}
        for details in error.errors(include_url=False):
            key, literal = _dotted_key(details["loc"], model)
            message = _describe(dict(details), key, sources, location)
            # pydantic reports every branch of a union: keep the first, and of a list or a
            # literal the list.
            if not literal or not any(other.startswith(key) for other in messages):
                messages.setdefault(key, message)
        errors.extend(messages.values())
        return None


def _dotted_key(location: tuple[int | str, ...], model: type[BaseModel]) -> tuple[str, bool]:
    """The dotted key of a pydantic error location, and whether the error is of a literal branch.

    After a key with a union type, pydantic's location names the branch that failed.
    """
    fields = dict(_fields(model))
    parts: list[str] = []
    literal = False
    for part in location:
        info = fields.get(".".join(parts))
        if isinstance(part, str) and info is not None and _is_union(info.annotation):
            literal = part.startswith("literal[")
        elif part != "[key]":
            parts.append(str(part))
    return ".".join(parts), literal


def _is_union(annotation: object) -> bool:
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return False
    return len([kind for kind in typing.get_args(annotation) if kind is not type(None)]) > 1


def _describe(error: dict[str, Any], key: str, sources: Sources, location: str) -> str:
    source = location or sources.origin(key)
    line_suffix = "" if location else sources.line_suffix(key)
    if error["type"] == "invalid_key" or "[key]" in error["loc"][-1:]:
        return f"{source}: {format_value(key)}: a key must be text{line_suffix}"
    if error["type"] == "extra_forbidden":
        keys = list(known_keys())
        section, _, last = key.rpartition(".")
        if key in keys:
            return f"{source}: '{key}' must be written as '{last}' under '{section}'{line_suffix}"
        return f"{source}: unknown key '{format_value(key)}'{line_suffix}{suggestion(key, keys)}"
    if error["type"] == "missing":
        return f"{source}: '{key}' is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    message = _MESSAGES.get(error["type"], message.replace("Input should be", "must be"))
    value = error["input"]
    not_a_section = error["type"] in ("model_type", "model_attributes_type")
    if not_a_section and isinstance(value, str) and f"{key}.name" in known_keys():
        message += f" (did you mean '{key}: {{name: {format_value(value)}}}'?)"
    if not key or isinstance(value, BaseModel | dict):
        return f"{source}: {f'{format_value(key)}: ' if key else ''}{message}{line_suffix}"
    hint = ""
    if error["type"] == "literal_error" and isinstance(value, str):
        choices = [
            c.strip(" '") for c in str(error["ctx"]["expected"]).replace(" or ", ",").split(",")
        ]
        close = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"{source}: {format_value(key)} = {format_value(value)}: {message}{line_suffix}{hint}"


_SHORT_REPR = reprlib.Repr()
_SHORT_REPR.maxlevel = 2


def format_value(value: object, max_length: int = 60) -> str:
    """A value as in YAML, cut to ``max_length`` characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    try:
        text = value if isinstance(value, str) else _SHORT_REPR.repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return "a number of more than 4,300 digits"
    return text if len(text) <= max_length else f"{text[: max_length - 1]}…"


def escape_unprintable(text: str) -> str:
    """Text on one line: unprintable characters, which could steer a terminal, become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
