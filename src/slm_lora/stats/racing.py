"""The race of tuning runs: which can be stopped early, by the losses of their first epoch.

A run is compared with earlier ones of the same setting and seed, which trained on the same batches
in the same order. Within the first epoch no row was seen before, so the training loss is a held-out
loss. Later it is not: a rate that is too large learns the rows by heart.

A smaller rate that is behind a larger one is stopped by less than a larger rate that is behind a
smaller one: decaying schedules help larger rates, whose loss falls at the end. The margins were
set by results/learning-rates; `benchmarks/racing.py` measures them on searches run to their end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_EPOCHS = 4.0
"""Longer trainings are not raced by the loss of the first epoch: after it, large rates overfit."""
LEAST_STEPS = 4
"""A rung before so many optimizer steps says nothing."""
ABOVE_BASE = 0.3
"""Nats per token above the base's validation loss where a run is given up."""


@dataclass(frozen=True, slots=True)
class Margins:
    """Nats per token behind a rival at a rung where a run is stopped.

    Attributes:
        smaller: behind a rival with a larger value.
        larger: behind a rival with a smaller value.
    """

    smaller: float
    larger: float


MARGINS = (Margins(0.15, 0.30), Margins(0.06, 0.10))
"""At the middle and at the end of the first epoch."""


def rungs(steps_in_epoch: int, total_steps: int) -> tuple[int, ...]:
    """Optimizer steps after which a run is compared: the middle and the end of the first epoch, or
    of the first half of a shorter training."""
    end = min(steps_in_epoch, math.ceil(total_steps / 2))
    return tuple(step for step in (math.ceil(end / 2), end) if step >= LEAST_STEPS)


@dataclass(frozen=True)
class Race:
    """What a run is compared with.

    Attributes:
        value: of the tuned key.
        rivals: losses and label tokens by step of earlier runs, by their value.
        rungs: steps of comparison.
        base_loss: of the base model on the validation set.
        epochs: of the training.
    """

    value: float
    rivals: Mapping[float, Sequence[Mapping[str, Any]]]
    rungs: tuple[int, ...]
    base_loss: float
    epochs: float

    def stop_reason(self, steps: Sequence[Mapping[str, Any]]) -> str:
        """Why a run need not go on after its last step; empty where it does, and between rungs.

        Args:
            steps: of the run so far, each with ``loss`` and ``label_tokens``.
        """
        done = len(steps)
        if done not in self.rungs:
            return ""
        own = window_loss(steps, done)
        if own > self.base_loss + ABOVE_BASE:
            return f"above the base after {done} steps ({own:.2f})"
        if self.epochs > MOST_EPOCHS:
            return ""
        place = self.rungs.index(done) + len(MARGINS) - len(self.rungs)
        margins = MARGINS[place]
        for value, rival in self.rivals.items():
            if len(rival) < done or value == self.value:
                continue
            behind = own - window_loss(rival, done)
            if behind > (margins.smaller if self.value < value else margins.larger):
                return f"{behind:.2f} behind {value:g} after {done} steps"
        return ""


def window_loss(steps: Sequence[Mapping[str, Any]], end: int) -> float:
    """Training loss over the second half of the first ``end`` steps, nats per label token."""
    window = steps[end // 2 : end]
    tokens = sum(int(step["label_tokens"]) for step in window)
    return math.fsum(float(step["loss"]) * int(step["label_tokens"]) for step in window) / tokens
