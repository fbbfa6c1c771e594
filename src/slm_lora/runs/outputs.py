"""Replies of a base and its adapters to the same prompts, as outputs.json holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Answer:
    """What one variant says to one prompt.

    Attributes:
        variant: who.
        greedy: always its most likely token.
        sampled: drawn; empty where none was asked for.
        loss: nats a token of the reference answer, None without one.
    """

    variant: str
    greedy: str
    sampled: str
    loss: float | None


@dataclass(frozen=True, slots=True)
class Compared:
    """One prompt with the replies of all models."""

    prompt: str
    reference: str
    answers: tuple[Answer, ...]


def read(outputs: Any) -> list[Compared]:
    """The prompts and answers of what `record` made.

    Raises:
        KeyError, TypeError: it is something else.
    """
    return [
        Compared(
            entry["prompt"],
            entry["reference"],
            tuple(Answer(**answer) for answer in entry["answers"]),
        )
        for entry in outputs["prompts"]
    ]
