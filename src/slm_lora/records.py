"""Small frozen values that pass between the stages."""

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
    """One message; ``content`` is plain text, whatever special tokens it may spell."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One example in the canonical form that every format is read into.

    An instruction with a response is a user turn and an assistant turn; a chat has as many as
    it has; plain text is a single assistant turn (all of it is response).

    ``group_hint`` ties rows that must not be parted by a split (say, questions on one object);
    ``source`` is ``file:line`` or ``hub id:index``, for messages only. ``row_id`` is the
    SHA-256 of the canonical content: the same wherever the row was read from.
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
"""Between the id of a row and the number of its piece, in the id of a piece (``….2of3``)."""


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenised row, or a piece of one that was too long.

    ``ids`` is the whole sequence, BOS first where the tokenizer adds one, EOS last unless cut.
    ``response`` marks the response tokens; position 0 is never scored (nothing predicts it).
    ``bytes_all`` and ``bytes_response`` are UTF-8 bytes of the scored text; special tokens
    count none.
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
        """Tokens in the sequence, the unscored first one included."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class RowScore:
    """Scores of one row under one model.

    Attributes:
        nll_all, nll_response: negative log-likelihood, nats (float64).
        tokens_all, tokens_response: that it is summed over.
        bytes_all, bytes_response: of the scored text, UTF-8.
        values: numerators and denominators of further metrics, by name.
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
    """What is known after one optimizer step.

    ``loss`` is nats per label token, of this step's examples, before its update; ``tokens``
    are all real tokens computed (no padding is), ``seconds`` since the loop began, validation
    left out. ``validation_loss`` is set on steps where the validation set was scored; ``skipped``
    means that an fp16 gradient overflowed and nothing was updated (``grad_norm`` is None then).
    ``peak_memory_bytes`` is the largest peak of any process of the training up to this step.
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
