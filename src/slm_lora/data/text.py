"""Text that is let in: one check for rows, prompt files, the command line and requests."""

from __future__ import annotations

import math
import re

from slm_lora.errors import DataError

_REFUSED = re.compile("[\0\ud800-\udfff\U000f0000-\U0010ffff]")
_PARTS = ("text", "input_text", "output_text")
PART_METADATA = ("cache_control", "annotations")
"""Keys of a text part that are no part of its text."""


class RowError(Exception):
    """A row is malformed; the message is the reason and never quotes the row's text."""


def kind(value: object) -> str:
    """What a value is, for people."""
    if isinstance(value, bool):
        return "true or false"
    words = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return words.get(type(value), f"of type {type(value).__name__}")


def empty(value: object) -> bool:
    """Whether a value says nothing: null, NaN, no characters, or a list or an object of such.

    Arrow pads the objects of a column to the keys of all of them; a CSV cell, and a column of
    JSON written as text, spell nothing as ``[]`` or ``null``.
    """
    left = [value]  # not by recursion: what was read may be nested as deep as it could be read
    while left:
        each = left.pop()
        if isinstance(each, dict):
            left.extend(each.values())
        elif isinstance(each, list | tuple):
            left.extend(each)
        elif isinstance(each, str):
            if each.strip() not in ("", "[]", "{}", "null", "None"):
                return False
        elif each is not None and not (isinstance(each, float) and math.isnan(each)):
            return False
    return True


def checked(value: object, what: str, rendered: bool = True) -> str:
    """The value, if it is text that can be trained on; ``\\r\\n`` becomes ``\\n``.

    ``rendered``: it becomes part of what is tokenised.

    Raises:
        RowError: it is no text, or holds what no text should; ``what`` names it.
    """
    if not isinstance(value, str):
        raise RowError(f"{what} must be text, is {kind(value)}")
    for found in _REFUSED.finditer(value):
        if found[0] == "\0":
            raise RowError(f"{what} has a NUL character")
        if found[0] < "\ue000":
            raise RowError(f"{what} has a lone surrogate (half a character)")
        if rendered:  # there they stand for special tokens (see `templates`)
            raise RowError(f"{what} has a private-use character above U+F0000")
    return value.replace("\r\n", "\n")


def content(value: object, what: str) -> str:
    """The text of a message: text, or a list of text parts (OpenAI's other form), joined.

    Raises:
        RowError: it is neither, or a part is no text.
    """
    if not isinstance(value, list | tuple):
        return checked(value, what)
    return "".join(_part(part, what) for part in value)


def _part(part: object, what: str) -> str:
    if not isinstance(part, dict):
        raise RowError(f"a part of {what} must be an object, is {kind(part)}")
    named = part.get("type")
    if named not in _PARTS:
        known = isinstance(named, str) and re.fullmatch(r"[a-z_]{1,30}", named)
        shown = f"of type {named}" if known else "without a type that is known"
        raise RowError(f"{what} has a part {shown}: only parts of type text are read")
    # In Arrow all parts have the keys of all: a filled one is another part's content.
    for key, other in part.items():
        if key not in ("type", "text", *PART_METADATA) and not empty(other):
            raise RowError(f"{what} has a text part with {key[:30]!a} beside its text")
    return checked(part.get("text"), f"a part of {what}")


def given(value: object, what: str) -> str:
    """`content` for text that is no row's: a prompt of the command line or of a request.

    Raises:
        DataError: as `content`; ``what`` names it.
    """
    try:
        return content(value, what)
    except RowError as error:
        raise DataError(f"{error}; write it otherwise") from None
