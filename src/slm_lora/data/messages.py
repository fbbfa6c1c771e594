"""Parse the messages of a chat to turns, and refuse keys that affect text or loss.

A turn has a role and a text only. Keys of a message that change its text or its loss mask are
refused by name; other keys are reported (`unread_keys`).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping

from slm_lora.data.text import (
    PART_METADATA,
    RowError,
    is_empty,
    message_text,
    printable_name,
    type_name,
)
from slm_lora.records import Role, Turn

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}

_CHANGES_TEXT = re.compile(
    r"tool|function|^reason|reasoning|thinking|thought|image|audio|video|^refusal$|^documents?$"
    r"|^prefix$|^partial$|^train(ing)?_detail$|mask"
)
"""Keys of content that templates write into the text, and of loss masks."""

_TOOL_ROLES = ("tool", "function", "function_call", "function_response", "tool_call",
               "tool_response", "observation", "ipython")  # fmt: skip
_WEIGHTS = ("weight", "train", "trainable", "training", "learn", "loss")
_SPELLINGS = (("role", "content"), ("from", "value"))


def parse_messages(messages: object, field: str, trained: bool = True) -> tuple[Turn, ...]:
    """Parse a list of messages.

    Args:
        messages: the list, or its JSON text.
        field: name of the list in error messages.
        trained: whether the turns are trained on, so that loss weights are checked.

    Raises:
        RowError: not a list of messages, or a message with content that would be lost.
    """
    messages = _from_json(messages)
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        raise RowError(f"{field} is text, but not JSON (perhaps Python syntax)")
    if not isinstance(messages, list):
        raise RowError(f"{field} must be a list of messages, is {type_name(messages)}")
    if not messages:
        raise RowError(f"{field} is empty")
    return tuple(_turn(message, field, trained) for message in messages)


def _from_json(messages: object) -> object:
    """Decode messages that are written as JSON text, as in a CSV cell."""
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        try:
            return json.loads(messages)
        except (ValueError, RecursionError):
            return messages
    return messages


def unread_keys(messages: object) -> Iterator[str]:
    """Yield non-empty keys of messages that are not read, such as metadata."""
    messages = _from_json(messages)
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            read = _spelling(message)
            for key, value in message.items():
                if key in read or is_empty(value) or (_CHANGES_TEXT.search(key) and _is_off(value)):
                    continue
                if key not in _WEIGHTS or (key == "loss" and not isinstance(value, bool)):
                    yield key
                elif _role(message) != "assistant" and not _is_off(value):
                    yield key  # (the loss on prompts is set by training.loss_on)
            parts = message.get(read[1])
            for part in parts if isinstance(parts, list) else ():
                if isinstance(part, dict):
                    yield from (k for k in PART_METADATA if not is_empty(part.get(k)))


def _spelling(message: Mapping[str, object]) -> tuple[str, str]:
    return _SPELLINGS[0] if message.get("role") is not None else _SPELLINGS[1]


def _role(message: Mapping[str, object]) -> Role | None:
    role = message.get(_spelling(message)[0])
    return ROLES.get(role) if isinstance(role, str) else None


def _turn(message: object, field: str, trained: bool) -> Turn:
    if not isinstance(message, dict):
        raise RowError(f"a message in {field} must be an object, is {type_name(message)}")
    role_key, content_key = _spelling(message)
    for key, value in message.items():
        has_value = key not in (role_key, content_key) and not (is_empty(value) or _is_off(value))
        if has_value and _CHANGES_TEXT.search(key):
            raise RowError(
                f"a message in {field} has {printable_name(key)}, which would be left out"
            )
    if role_key not in message or content_key not in message:
        raise RowError(f"a message in {field} lacks role and content, or from and value")
    role = _known_role(message[role_key], field)
    if role == "assistant" and trained:
        _check_weights(message, field)
    if message[content_key] is None:
        raise RowError(f"{content_key} of a message in {field} is null")
    return Turn(role, message_text(message[content_key], f"{content_key} of a message in {field}"))


def _known_role(role: object, field: str) -> Role:
    if isinstance(role, str) and role in ROLES:
        return ROLES[role]
    if role in _TOOL_ROLES:
        raise RowError(f"a message in {field} has the role {role}: tools are not trained on")
    shown = isinstance(role, str) and re.fullmatch(r"[A-Za-z_-]{1,20}", role)
    named = f"the unknown role {role}" if shown else "an unknown role"
    raise RowError(f"a message in {field} has {named} (known: {', '.join(ROLES)})")


def _is_off(value: object) -> bool:
    normalised = value.strip().lower() if isinstance(value, str) else value
    return normalised in (0, "0", "0.0", "false", "no")


def _check_weights(message: Mapping[str, object], field: str) -> None:
    for key in _WEIGHTS:
        value = message.get(key)
        if is_empty(value) or (key == "loss" and not isinstance(value, bool)):
            continue  # (a numeric "loss" is a measurement, not a mask)
        if _is_off(value):
            raise RowError(
                f"an assistant message in {field} is excluded from training by {key}, "
                "which is not supported"
            )
        normalised = value.strip().lower() if isinstance(value, str) else value
        if normalised not in (1, "1", "1.0", "true", "yes"):
            raise RowError(f"an assistant message in {field} has a {key} other than 0 and 1")


def check_turn_order(turns: tuple[Turn, ...]) -> None:
    """Check that roles alternate and that the conversation ends with a non-empty answer.

    Raises:
        RowError: the turns are out of order, or one is missing or empty.
    """
    if any(turn.role == "system" for turn in turns[1:]):
        raise RowError("a system turn after another turn")
    for earlier, later in itertools.pairwise(turns):
        if earlier.role == later.role:
            raise RowError(f"two {later.role} turns in a row")
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers:
        raise RowError("no assistant turn")
    if turns[-1].role != "assistant":
        # A question without its answer has nothing to train on.
        raise RowError("the last turn is not the assistant's")
    if not answers[-1].content.strip():
        raise RowError("the last assistant turn is empty")
    if any(turn.role == "user" and not turn.content.strip() for turn in turns):
        raise RowError("a user turn is empty")
