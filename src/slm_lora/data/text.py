"""Validation of text from rows, prompt files, the command line and requests."""

from __future__ import annotations

import math
import re
from collections.abc import Collection

from slm_lora.errors import DataError

_REFUSED = re.compile("[\0\ud800-\udfff\U000f0000-\U0010ffff]")
_PART_TYPES = ("text", "input_text", "output_text")
PART_METADATA = ("cache_control", "annotations")
"""Keys of a text part that do not affect its text."""


class RowError(Exception):
    """A row is malformed; the message gives the reason and never quotes the row's text."""


def type_name(value: object) -> str:
    """Return the type of a value, for messages."""
    if isinstance(value, bool):
        return "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")


def printable_name(name: str) -> str:
    """Return the name of a column or key for a message, escaped and shortened if necessary."""
    # A column's name comes from the file: it may be long or contain line ends.
    is_short = name.isprintable() and 0 < len(name) <= 40 and name == name.strip()
    return name if is_short else ascii(name[:40])


def list_names(names: Collection[str], limit: int = 20) -> str:
    """Return up to ``limit`` sorted names for a message."""
    shown = [printable_name(name) for name in sorted(names)[:limit]]
    return (", ".join(shown) or "none") + (", …" if len(names) > limit else "")


def is_empty(value: object) -> bool:
    """Whether a value is null, NaN, empty text, or a list or object of such values.

    Arrow pads the objects of a column with null keys; CSV cells and JSON written as text spell
    empty values as ``[]`` or ``null``.
    """
    pending = [value]  # no recursion: values may be nested deeply
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, list | tuple):
            pending.extend(item)
        elif isinstance(item, str):
            if item.strip() not in ("", "[]", "{}", "null", "None"):
                return False
        elif item is not None and not (isinstance(item, float) and math.isnan(item)):
            return False
    return True


def require_text(value: object, name: str, rendered: bool = True) -> str:
    """Check that a value is text without forbidden characters; ``\\r\\n`` becomes ``\\n``.

    Args:
        value: the value.
        name: name of the value in messages.
        rendered: whether the text is tokenised, so that private-use characters are refused.

    Raises:
        RowError: not text, or text with a forbidden character.
    """
    if not isinstance(value, str):
        raise RowError(f"{name} must be text, is {type_name(value)}")
    for match in _REFUSED.finditer(value):
        if match[0] == "\0":
            raise RowError(f"{name} has a NUL character")
        if match[0] < "\ue000":
            raise RowError(f"{name} has a lone surrogate (half a character)")
        if rendered:  # they represent special tokens there (see `templates`)
            raise RowError(f"{name} has a private-use character above U+F0000")
    return value.replace("\r\n", "\n")


def message_text(value: object, name: str) -> str:
    """Return the text of a message: a text, or OpenAI's list of text parts, joined.

    Raises:
        RowError: neither of them, or a part that is not text.
    """
    if not isinstance(value, list | tuple):
        return require_text(value, name)
    return "".join(_part_text(part, name) for part in value)


def _part_text(part: object, name: str) -> str:
    if not isinstance(part, dict):
        raise RowError(f"a part of {name} must be an object, is {type_name(part)}")
    part_type = part.get("type")
    if part_type not in _PART_TYPES:
        printable = isinstance(part_type, str) and re.fullmatch(r"[a-z_]{1,30}", part_type)
        shown = f"of type {part_type}" if printable else "without a type that is known"
        raise RowError(f"{name} has a part {shown}: only parts of type text are read")
    # Arrow gives every part the keys of all parts: a non-empty other key is content.
    for key, value in part.items():
        if key not in ("type", "text", *PART_METADATA) and not is_empty(value):
            raise RowError(f"{name} has a text part with {key[:30]!a} beside its text")
    return require_text(part.get("text"), f"a part of {name}")


def prompt_text(value: object, name: str) -> str:
    """Apply `message_text` to a prompt of the command line or of a request.

    Raises:
        DataError: as the RowError of `message_text`.
    """
    try:
        return message_text(value, name)
    except RowError as error:
        raise DataError(f"{error}; change the text") from None
