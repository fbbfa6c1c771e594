"""Turns that a chat template writes nothing of.

A misspelt name is empty in Jinja, some templates know no system turn, and some are made for one
question and one answer: rows would lose text silently.
"""

from __future__ import annotations

from collections.abc import Sequence

from slm_lora.data.chat_templates import ChatRenderer

_FIRST, _MANY = 0xA000, 1164
"""Yi syllables: one a turn, as some templates shorten or trim, and no template has any itself."""


class LeftOut:
    """Finds them by conversations of one character a turn; remembers each sequence of roles.

    Args:
        render: renders a chat template.
    """

    def __init__(self, render: ChatRenderer) -> None:
        self._render = render
        self._known: dict[tuple[tuple[str, ...], bool], tuple[int, ...]] = {}

    def turns(self, roles: Sequence[str], prompt: bool) -> tuple[int, ...]:
        """Which turns of such a conversation, from 0, are left out; none where the template
        refuses the conversation.

        Args:
            roles: of the turns.
            prompt: whether an answer is asked for.
        """
        key = (tuple(roles), prompt)
        if key not in self._known:
            self._known[key] = self._find(*key)
        return self._known[key]

    def _find(self, roles: tuple[str, ...], prompt: bool) -> tuple[int, ...]:
        marks = [chr(_FIRST + number) for number in range(min(len(roles), _MANY))]
        messages = [
            {"role": role, "content": mark} for role, mark in zip(roles, marks, strict=False)
        ]
        try:
            text = self._render(messages, prompt)
        except Exception:  # a program of someone else's, which may want other contents
            return ()
        return tuple(number for number, mark in enumerate(marks) if mark not in text)
