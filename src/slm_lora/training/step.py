"""One optimizer step: its exact loss and gradient, its update, and what may not happen in it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slm_lora.data.batches import by_token_budget, label_count, pack
from slm_lora.errors import NumericError
from slm_lora.model.base import Base
from slm_lora.model.forward import batch_nll
from slm_lora.model.fusion import attempt
from slm_lora.records import Example, LossOn

MOST_SKIPPED = 25
"""Steps in a row that fp16 may skip: a scale of 65,536 halved so often is far below 1."""


@dataclass(frozen=True)
class Updater:
    """What stays the same from step to step.

    Attributes:
        base: the base, with what trains.
        parameters: that train.
        optimizer: over them.
        scaler: of fp16 gradients; else it does nothing.
        loss_on: tokens trained on.
        max_grad_norm: the gradient is clipped to this norm.
    """

    base: Base
    parameters: Sequence[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loss_on: LossOn
    max_grad_norm: float

    def step(
        self,
        examples: Sequence[Example],
        budget: int,
        dropout_seed: str,
        compiled: bool,
        skipped_before: int,
        where: str,
    ) -> Launched:
        """Do one step, or, on a GPU, hand it all the work of one.

        Args:
            examples: of this step.
            budget: tokens computed at once.
            dropout_seed: decides the masks.
            compiled: whether to compile (see `model.fusion`).
            skipped_before: steps skipped in a row just before this one.
            where: names the step in messages.

        Raises:
            NumericError: fp16 overflowed too often.
        """
        work = functools.partial(self._backward, examples, budget, dropout_seed)
        loss = attempt(compiled, work)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        # With fp16 an overflow of the scaled gradient skips the step and lowers the scale; that
        # settles within a few steps, or the loss itself is the trouble. (The scaler waits for
        # the GPU anyway.)
        skipped = self.scaler.is_enabled() and not math.isfinite(norm.item())
        if skipped and skipped_before >= MOST_SKIPPED:
            raise _not_finite(f"{where}: loss {loss.item()}, gradient norm {norm.item()}", examples)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            largest = torch.nn.utils.get_total_norm(self.parameters, math.inf)
        return Launched((loss, norm, largest), skipped, examples, where)

    def _backward(self, examples: Sequence[Example], budget: int, dropout_seed: str) -> Tensor:
        """Loss of a step in nats per label token; its gradient is left on the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        labels = sum(label_count(example, self.loss_on) for example in examples)
        shares = []
        for micro in by_token_budget(examples, budget):
            share = batch_nll(self.base, pack(micro, self.loss_on), dropout_seed) / labels
            torch.autograd.backward(self.scaler.scale(share))
            shares.append(share.detach())
        return torch.stack(shares).sum()


class Launched:
    """A step whose numbers may still be on their way from the GPU, so that it need not be
    waited for before the next step is handed over."""

    def __init__(
        self,
        numbers: tuple[Tensor, Tensor, Tensor],
        skipped: bool,
        examples: Sequence[Example],
        where: str,
    ) -> None:
        """
        Args:
            numbers: loss, gradient norm, largest weight after the update; scalars.
            skipped: whether fp16 overflowed, and nothing was updated.
            examples: of the step.
            where: names the step in messages.
        """
        self._skipped, self._examples, self._where = skipped, examples, where
        wide = torch.float32 if numbers[0].device.type == "mps" else torch.float64
        found = torch.stack([number.detach().to(wide) for number in numbers])
        self._arrived: torch.cuda.Event | None = None
        if found.is_cuda:
            self._numbers = torch.empty(found.shape, dtype=wide, pin_memory=True)
            self._numbers.copy_(found, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()
        else:
            self._numbers = found

    def result(self) -> tuple[float, float | None]:
        """Wait for the numbers, and look at them.

        Returns:
            Loss in nats per label token before the update, and the norm of its gradient; None
            where an fp16 gradient overflowed, and nothing was updated.

        Raises:
            NumericError: loss, gradient or weights are not finite; names the step and its rows.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, norm, largest = self._numbers.tolist()
        if not math.isfinite(loss) or not (math.isfinite(norm) or self._skipped):
            raise _not_finite(f"{self._where}: loss {loss}, gradient norm {norm}", self._examples)
        if not math.isfinite(largest):
            raise _not_finite(
                f"{self._where}: largest weight {largest} after the update", self._examples
            )
        return loss, None if self._skipped else norm


def _not_finite(what: str, examples: Sequence[Example]) -> NumericError:
    rows = ", ".join(example.row_id[:8] for example in examples)
    return NumericError(
        f"{what}; rows {rows}; lower training.learning_rate, or use training.precision=fp32"
    )
