"""Detect turns that a chat template drops.

A misspelt name is empty in Jinja, some templates ignore system turns, and some take only one
question and answer: rows would lose text silently.
"""

from __future__ import annotations

from collections.abc import Sequence

from slm_lora.data.chat_templates import ChatRenderer

_FIRST_MARK, _MAX_TURNS = 0xA000, 1164
"""Yi syllables, one for each turn: templates that shorten or trim keep one character, and no
template contains these itself."""


class DroppedTurns:
    """Finds dropped turns by rendering one-character turns; caches results by roles.

    Args:
        render: renders the chat template.
    """

    def __init__(self, render: ChatRenderer) -> None:
        self._render = render
        self._cache: dict[tuple[tuple[str, ...], bool], tuple[int, ...]] = {}

    def turns(self, roles: Sequence[str], prompt: bool) -> tuple[int, ...]:
        """Return the indices of dropped turns; none where the template refuses the roles.

        Args:
            roles: role of each turn.
            prompt: whether a generation prompt is added.
        """
        key = (tuple(roles), prompt)
        if key not in self._cache:
            self._cache[key] = self._find(*key)
        return self._cache[key]

    def _find(self, roles: tuple[str, ...], prompt: bool) -> tuple[int, ...]:
        marks = [chr(_FIRST_MARK + number) for number in range(min(len(roles), _MAX_TURNS))]
        messages = [
            {"role": role, "content": mark} for role, mark in zip(roles, marks, strict=False)
        ]
        try:
            text = self._render(messages, prompt)
        except Exception:  # foreign code, which may need other contents
            return ()
        return tuple(number for number, mark in enumerate(marks) if mark not in text)
