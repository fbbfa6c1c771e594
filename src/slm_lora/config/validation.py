"""Mistakes in a recipe, explained: key, value, where it was written, and what was meant."""

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

from slm_lora.config.aliases import NO_KEY, elsewhere_called
from slm_lora.config.schema import Recipe

Settings = dict[str, Any]
_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(slots=True)
class Sources:
    """Where each dotted key was written, for messages."""

    file: str
    lines: dict[str, int] = field(default_factory=dict)
    overrides: dict[str, None] = field(default_factory=dict)

    def explain(self, key: str) -> str:
        """`override` or the file's name: what a message on the key begins with."""
        return "override" if self._from_override(key) else self.file

    def line(self, key: str) -> str:
        """The line to end the message with, if there is one."""
        if self._from_override(key):
            return ""
        parts = key.split(".")
        for end in range(len(parts), 0, -1):
            if (number := self.lines.get(".".join(parts[:end]))) is not None:
                return f" (line {number})"
        return ""

    def _from_override(self, key: str) -> bool:
        return any(
            key == o
            or key.startswith(f"{o}.")
            # a section that only an override brought into being
            or (o.startswith(f"{key}.") and key not in self.lines)
            for o in self.overrides
        )


def _is_section(info: FieldInfo) -> bool:
    return isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, info in model.model_fields.items():
        yield prefix + name, info
        if _is_section(info):
            yield from _fields(typing.cast(type[BaseModel], info.annotation), f"{prefix}{name}.")


def known_keys(model: type[BaseModel] = Recipe) -> Iterator[str]:
    """All dotted keys of the schema, sections before what is in them."""
    for key, _ in _fields(model):
        yield key


def why_not_settable(key: str, model: type[BaseModel]) -> str:
    """Why a dotted key cannot be set on its own, or nothing if it can."""
    fields = dict(_fields(model))
    if key in fields:
        if not _is_section(fields[key]):
            return ""
        inner = next(each for each in fields if each.startswith(f"{key}."))
        return f"'{shown(key)}' is a section; set what is in it, such as '{inner}'"
    parent, _, last = key.rpartition(".")
    if last and parent in fields and typing.get_origin(fields[parent].annotation) is dict:
        return ""
    return f"unknown key '{shown(key)}'{did_you_mean(key, list(fields))}"


def did_you_mean(key: str, keys: list[str]) -> str:
    """The end of a message on an unknown key: a known one that is like it, if there is one."""
    # As on other command lines: --per-device-train-batch-size.
    plain = key.strip().lstrip("-").replace("-", "_").lower()
    last = plain.rsplit(".", 1)[-1]
    by_last = {known.rsplit(".", 1)[-1]: known for known in reversed(keys)}
    # The right name in no section or the wrong one, then other tools' names, then slips.
    if last in by_last:
        return f"; did you mean '{by_last[last]}'?"
    if (meant := elsewhere_called(last)) and meant.split(" ", 1)[0].split("=", 1)[0] in keys:
        known, _, remark = meant.partition(" ")
        return f"; did you mean '{known}'?" + (f" {remark}" if remark else "")
    if last in NO_KEY:
        return f"; there is none: {NO_KEY[last]}"
    close = difflib.get_close_matches(plain, keys, n=1, cutoff=0.6)
    close = close or [
        by_last[name] for name in difflib.get_close_matches(last, by_last, n=1, cutoff=0.75)
    ]
    return f"; did you mean '{close[0]}'?" if close else ""


_SAID = {
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
"""Mistakes in plain words, by pydantic's name for them."""


def validated(
    model: type[_Model], settings: Settings, sources: Sources, mistakes: list[str], place: str = ""
) -> _Model | None:
    """The settings as a value of the schema; or None, and ``mistakes`` say why."""
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        found: dict[str, str] = {}
        for each in error.errors(include_url=False):
            key, literal = _key_of(each["loc"], model)
            explained = _explained(dict(each), key, sources, place)
            # Of a union every branch has an error to tell: the first is enough, and of a list
            # or one certain word the list.
            if not literal or not any(other.startswith(key) for other in found):
                found.setdefault(key, explained)
        mistakes.extend(found.values())
        return None


def _key_of(location: tuple[int | str, ...], model: type[BaseModel]) -> tuple[str, bool]:
    """The dotted key at a place that pydantic tells, and whether it is that of a single word.

    Behind a key of several types pydantic names the type that it tried.
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
    return len([each for each in typing.get_args(annotation) if each is not type(None)]) > 1


def _explained(error: dict[str, Any], key: str, sources: Sources, place: str) -> str:
    source = place or sources.explain(key)
    line = "" if place else sources.line(key)
    if error["type"] == "invalid_key" or "[key]" in error["loc"][-1:]:
        return f"{source}: {shown(key)}: a key must be text{line}"
    if error["type"] == "extra_forbidden":
        keys = list(known_keys())
        section, _, last = key.rpartition(".")
        if key in keys:
            return f"{source}: '{key}' must be written as '{last}' under '{section}'{line}"
        return f"{source}: unknown key '{shown(key)}'{line}{did_you_mean(key, keys)}"
    if error["type"] == "missing":
        return f"{source}: '{key}' is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    message = _SAID.get(error["type"], message.replace("Input should be", "must be"))
    value = error["input"]
    sectionless = error["type"] in ("model_type", "model_attributes_type")
    if sectionless and isinstance(value, str) and f"{key}.name" in known_keys():
        message += f" (did you mean '{key}: {{name: {shown(value)}}}'?)"
    if not key or isinstance(value, BaseModel | dict):
        return f"{source}: {f'{shown(key)}: ' if key else ''}{message}{line}"
    hint = ""
    if error["type"] == "literal_error" and isinstance(value, str):
        choices = [
            c.strip(" '") for c in str(error["ctx"]["expected"]).replace(" or ", ",").split(",")
        ]
        close = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"{source}: {shown(key)} = {shown(value)}: {message}{line}{hint}"


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 2


def shown(value: object, most: int = 60) -> str:
    """A value as YAML would have it, short enough for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    try:
        text = value if isinstance(value, str) else _BRIEF.repr(value)
    except ValueError:  # Python prints no number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= most else f"{text[: most - 1]}…"


def one_line(text: str) -> str:
    """Text with what would break a line or a terminal written out."""
    # What is shown may come from a file: it must not break the line, nor the terminal.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
