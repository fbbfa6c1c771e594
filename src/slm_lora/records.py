"""Immutable records passed between the stages: rows, examples, scores, steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

Role = Literal["system", "user", "assistant"]
LossOn = Literal["all", "response"]
Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message; special tokens spelt in ``content`` are plain text."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set, in a form common to all formats.

    Attributes:
        turns: user and assistant turn of an instruction with response; all turns of a chat; a
            single assistant turn of plain text (all of it is response).
        context: document that the instruction refers to.
        category: for breakdowns in the report.
        group_hint: rows with the same value stay on one side of the split (such as questions
            about one object).
        source: ``file:line`` or ``hub id:index``, for messages.
        row_id: SHA-256 of the canonical content, independent of the source.
    """

    turns: tuple[Turn, ...]
    context: str = ""
    category: str = ""
    group_hint: str = ""
    source: str = ""
    row_id: str = field(init=False)

    def __post_init__(self) -> None:
        content = [self.context, [[turn.role, turn.content] for turn in self.turns]]
        canonical = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        digest = hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
        object.__setattr__(self, "row_id", digest)


PIECE = "."
"""Separator of a row's id and the number of its piece, in ids of pieces (``….2of3``)."""


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenised row, or a piece of a longer one.

    Attributes:
        ids: int32 [length]: BOS first if the tokenizer adds it, EOS last unless truncated.
        response: bool [length]: response tokens. Position 0 has no prediction, and no score.
        bytes_all, bytes_response: UTF-8 bytes of the scored text, without special tokens.
    """

    row_id: str
    group_id: str
    category: str
    ids: Ids
    response: Mask
    bytes_all: int
    bytes_response: int

    @property
    def length(self) -> int:
        """Number of tokens, including the first, which is not scored."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class RowScore:
    """Scores of one row under one model.

    Attributes:
        nll_all, nll_response: sum of the negative log-likelihood, nats (float64).
        tokens_all, tokens_response: number of tokens in the sum.
        bytes_all, bytes_response: UTF-8 bytes of the scored text.
        values: numerator and denominator of further metrics, by name.
    """

    row_id: str
    group_id: str
    category: str
    split: str
    nll_all: float
    tokens_all: int
    bytes_all: int
    nll_response: float
    tokens_response: int
    bytes_response: int
    values: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Step:
    """Measurements of one optimizer step.

    Attributes:
        loss: nats per label token over the step's examples, before the update.
        grad_norm: L2 norm before clipping; None if ``skipped``.
        tokens: tokens computed, without padding (there is none).
        seconds: since the start of training, without validation.
        validation_loss: nats per label token, if the validation set was scored at this step.
        skipped: whether an fp16 gradient overflowed, so that nothing was updated.
        peak_memory_bytes: largest peak of any process since the start of training.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float | None
    examples: int
    tokens: int
    label_tokens: int
    seconds: float
    validation_loss: float | None = None
    skipped: bool = False
    peak_memory_bytes: int = 0
