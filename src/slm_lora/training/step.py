"""One optimizer step: exact loss and gradient, clipping, update, checks for non-finite numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slm_lora.data.collate import collate, label_count, make_micro_batches
from slm_lora.errors import NumericError
from slm_lora.model.activation_checkpointing import checkpointed_layers
from slm_lora.model.base import Base
from slm_lora.model.forward import batch_nll
from slm_lora.ops.compilation import run_with_compile_fallback
from slm_lora.ops.cross_entropy import total_dtype
from slm_lora.records import Example, LossOn
from slm_lora.runtime import distributed

MAX_SKIPPED = 25
"""Steps in a row that fp16 may skip: a scale of 65,536 halved so often is far below 1."""


class Control(NamedTuple):
    """What happens after a step: of any process, where there are several, so that all do alike."""

    stop: bool = False
    save: bool = False


@dataclass(frozen=True, slots=True)
class StepResult:
    """Numbers of a finished step.

    Attributes:
        loss: nats per label token, before the update.
        grad_norm: before clipping; None where an fp16 gradient overflowed and the update was
            skipped.
    """

    loss: float
    grad_norm: float | None


@dataclass(frozen=True)
class StepRunner:
    """Runs optimizer steps.

    Attributes:
        base: the model with its adapter.
        parameters: that train.
        optimizer: over them.
        scaler: of fp16 gradients; disabled in other precisions.
        loss_on: tokens trained on.
        max_grad_norm: the gradient is clipped to this norm.
        recompute: whether layers keep their inputs only (activation checkpointing).
        names: of the parameters, for messages.
    """

    base: Base
    parameters: Sequence[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loss_on: LossOn
    max_grad_norm: float
    recompute: bool = False
    names: Sequence[str] = ()

    def step(
        self,
        examples: Sequence[Example],
        budget: int,
        dropout_seed: str,
        compiled: bool,
        skipped_before: int,
        where: str,
        control: Control = Control(),  # noqa: B008 - a frozen tuple
    ) -> PendingStep:
        """Run one step; on a GPU, enqueue it.

        Of several processes each computes its share of the examples; gradients are summed before
        the update.

        Args:
            examples: of this step; the same in every process.
            budget: tokens per micro-batch.
            dropout_seed: of the masks.
            compiled: whether to compile (see `ops.compilation`).
            skipped_before: steps skipped in a row just before this one.
            where: names the step in messages.
            control: of this process.

        Raises:
            NumericError: fp16 overflowed too often.
            PeerLostError: another process is gone.
        """
        work = functools.partial(self._backward, examples, budget, dropout_seed)
        with distributed.peer_errors() if self.base.sharded else nullcontext():
            loss = run_with_compile_fallback(compiled, work)
        if not distributed.is_single():
            loss, control = self._all_reduce(loss, control)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        # With fp16 an overflow of the scaled gradient skips the step and lowers the scale; that
        # settles within a few steps, or the loss itself is the trouble. (The scaler waits for
        # the GPU anyway.)
        skipped = self.scaler.is_enabled() and not math.isfinite(norm.item())
        if skipped and skipped_before >= MAX_SKIPPED:
            raise _not_finite(f"{where}: loss {loss.item()}, gradient norm {norm.item()}", examples)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            largest = _largest(self.parameters)
        return PendingStep((loss, norm, largest), skipped, examples, where, control)

    def check_gradients(self) -> None:
        """After a step: every parameter that trains has a gradient.

        Raises:
            NumericError: the loss does not depend on one.
        """
        pairs = zip(self.names, self.parameters, strict=False)
        if unreached := [name for name, parameter in pairs if parameter.grad is None]:
            raise NumericError(
                f"{len(unreached)} of {len(self.parameters)} parameters that train get no "
                f"gradient, first {unreached[0]}: they would stay as they are; choose other "
                "adapter.target_modules"
            )

    def _backward(self, examples: Sequence[Example], budget: int, dropout_seed: str) -> Tensor:
        """Loss of a step in nats per label token; its gradient is left on the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        labels = sum(label_count(example, self.loss_on) for example in examples)
        # (A process without any example of a small step has a loss and a gradient of zero.)
        shares = [torch.zeros((), dtype=total_dtype(self.base.device), device=self.base.device)]
        with checkpointed_layers(self.base.model, self.recompute):
            for micro, weight in _micro_batches(examples, budget, self.base.sharded):
                nll = batch_nll(self.base, collate(micro, self.loss_on), dropout_seed)
                share = nll * (weight / labels)
                torch.autograd.backward(self.scaler.scale(share))
                shares.append(share.detach())
        return torch.stack(shares).sum()

    def _all_reduce(self, loss: Tensor, control: Control) -> tuple[Tensor, Control]:
        """Sum gradients, loss and control flags over the processes, in one collective."""
        narrow = loss.to(self.parameters[0].dtype)
        scalars = torch.stack([narrow, *map(narrow.new_tensor, control)])
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        buffer = torch.cat([*(gradient.flatten() for gradient in gradients), scalars])
        distributed.all_reduce_sum(buffer)
        sizes = [gradient.numel() for gradient in gradients]
        for parameter, summed in zip(self.parameters, torch.split(buffer[:-3], sizes), strict=True):
            parameter.grad = summed.view_as(parameter)
        stop, save = (flag > 0 for flag in buffer[-2:].tolist())
        return buffer[-3].to(loss.dtype), Control(stop, save)


def _largest(parameters: Sequence[Tensor]) -> Tensor:
    """The largest absolute value of any; NaN if there is one."""
    if parameters[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(parameters, math.inf)
    # (Its norm is not vectorised on CPUs: 0.2 s a step where all of SmolLM2 trains.)
    ends = [end for each in parameters for end in torch.aminmax(each)]
    return torch.stack(ends).abs().amax()


def _micro_batches(
    examples: Sequence[Example], budget: int, equally_many: bool
) -> list[tuple[list[Example], float]]:
    """This process's micro-batches of a step, with their weight: 1, or 0 for what is computed only
    because another process has more."""
    divided = [
        make_micro_batches(share, budget)
        for share in distributed.partition(examples, lambda e: e.length, distributed.world_size())
    ]
    own = [(micro, 1.0) for micro in divided[distributed.rank()]]
    most = max(map(len, divided)) if equally_many else 0
    shortest = min(examples, key=lambda example: example.length)
    return own + [([shortest], 0.0)] * (most - len(own))


class PendingStep:
    """A step whose numbers may still be computed by the GPU while the next one is enqueued.

    Attributes:
        control: agreed on by all processes.
    """

    def __init__(
        self,
        numbers: tuple[Tensor, Tensor, Tensor],
        skipped: bool,
        examples: Sequence[Example],
        where: str,
        control: Control,
    ) -> None:
        """
        Args:
            numbers: loss, gradient norm, largest weight after the update; scalars.
            skipped: whether fp16 overflowed, and nothing was updated.
            examples: of the step.
            where: names the step in messages.
            control: agreed on by all processes.
        """
        self.control = control
        self._skipped, self._examples, self._where = skipped, examples, where
        wide = total_dtype(numbers[0].device)
        found = torch.stack([number.detach().to(wide) for number in numbers])
        self._arrived: torch.cuda.Event | None = None
        if found.is_cuda:
            self._numbers = torch.empty(found.shape, dtype=wide, pin_memory=True)
            self._numbers.copy_(found, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()
        else:
            self._numbers = found

    def result(self) -> StepResult:
        """Wait for the numbers and check them.

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
        return StepResult(loss, None if self._skipped else norm)


def _not_finite(subject: str, examples: Sequence[Example]) -> NumericError:
    rows = ", ".join(example.row_id[:8] for example in examples)
    return NumericError(
        f"{subject}; rows {rows}; lower training.learning_rate, or use training.precision=fp32"
    )
