"""The training loop: exact, plain PyTorch.

A step's loss is the total NLL of its examples over their label tokens, whatever the division
into micro-batches. Order and dropout depend on the seed and the step alone.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from slm_lora import machine
from slm_lora.data.batches import by_token_budget, epoch_order, label_count, pack, steps_per_epoch
from slm_lora.errors import DataError, NumericError
from slm_lora.model import fusion
from slm_lora.model.adapter import restore_state, trainable_state
from slm_lora.model.base import Base
from slm_lora.model.forward import batch_nll
from slm_lora.model.fusion import attempt
from slm_lora.recipe.schema import TrainingSection
from slm_lora.records import Example, LossOn, Step
from slm_lora.training.checkpoint import Checkpointer
from slm_lora.training.optimizer import adamw, learning_rate


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """A finished training: its steps, and where its weights come from."""

    history: tuple[Step, ...]
    stopped_early: bool
    kept_step: int
    rows_without_labels: int
    compiled: bool

    @property
    def tokens(self) -> int:
        """Real tokens computed over the whole training."""
        return sum(step.tokens for step in self.history)

    @property
    def seconds(self) -> float:
        """Time spent in optimizer steps, validation left out."""
        return self.history[-1].seconds

    @property
    def first_step_seconds(self) -> float:
        """Time of the first step, which warms everything up."""
        return self.history[0].seconds

    @property
    def tokens_per_s(self) -> float:
        """Real tokens per second after the warm-up: the first step, and the second, which
        compiles, where there are more."""
        warm_up = self.history[: min(2, len(self.history) - 1)]
        if not warm_up:
            return self.tokens / self.seconds
        return (self.tokens - sum(step.tokens for step in warm_up)) / (
            self.seconds - warm_up[-1].seconds
        )


def total_steps(rows: int, section: TrainingSection) -> int:
    """Optimizer steps of a training on ``rows`` examples."""
    steps = math.ceil(
        section.num_train_epochs * steps_per_epoch(rows, section.effective_batch_size)
    )
    return steps if section.max_steps is None else min(steps, section.max_steps)


def _steps(
    examples: Sequence[Example], batch: int, seed: int, total: int
) -> Iterator[list[Example]]:
    """The examples of each optimizer step; an epoch's last, partial step is one too."""
    done = 0
    for epoch in range(total):
        order = epoch_order(examples, seed, epoch)
        for start in range(0, len(order), batch):
            if done == total:
                return
            yield order[start : start + batch]
            done += 1


MOST_SKIPPED = 25
"""Steps in a row that fp16 may skip: a scale of 65,536 halved so often is far below 1."""


PLAIN_TOKENS = 512
"""Tokens at once in the first, plain step of a training that compiles."""

TRIM_EVERY = 8
"""Steps after which a heap in pieces is given back; at once after the first step, which is
plain, and the second, which compiles."""

_Best = tuple[float, int, dict[str, torch.Tensor]]


def _validations_since(history: Sequence[Step], best: _Best | None) -> int:
    """Validations after the best one."""
    after = 0 if best is None else best[1]
    return sum(s.validation_loss is not None for s in history if s.step > after)


def _backward(
    base: Base,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    examples: Sequence[Example],
    loss_on: LossOn,
    budget: int,
    dropout_seed: str,
) -> float:
    """Loss of a step in nats per label token; its gradient is left on the parameters."""
    optimizer.zero_grad(set_to_none=True)
    labels = sum(label_count(example, loss_on) for example in examples)
    loss = 0.0
    for micro in by_token_budget(examples, budget):
        share = batch_nll(base, pack(micro, loss_on), dropout_seed) / labels
        torch.autograd.backward(scaler.scale(share))
        loss += share.item()
    return loss


def train(
    base: Base,
    adapted: torch.nn.Module,
    examples: Sequence[Example],
    section: TrainingSection,
    seed: int,
    *,
    validate: Callable[[], float] | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
    checkpointer: Checkpointer | None = None,
) -> TrainingResult:
    """Train in place: an adapter, or the whole base.

    Args:
        base: the base, that carries the adapter.
        adapted: the base with its adapter, from `adapter.attach`.
        examples: training rows.
        section: how to train.
        seed: order and dropout.
        validate: loss on the validation set, in nats per label token.
        on_step: told of every step of this sitting.
        checkpointer: saves now and then, and takes up what an earlier sitting saved.

    Raises:
        DataError: no example has a label.
        NumericError: loss or gradient is not finite; names the step and its rows.
    """
    usable = [example for example in examples if label_count(example, section.loss_on)]
    if not usable:
        raise DataError(
            f"no label tokens left: none of the {len(examples)} training rows has a token to "
            f"train on (training.loss_on = {section.loss_on}); raise data.max_length, or check "
            "the template"
        )
    total = total_steps(len(usable), section)
    epochs = total / steps_per_epoch(len(usable), section.effective_batch_size)
    tokens = round(epochs * sum(example.length for example in usable))
    compiled = fusion.wanted(section.compile, tokens, base.device, base.half)
    named = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    optimizer = adamw(named, section)
    scaler = torch.amp.GradScaler(base.device.type, enabled=base.precision == "fp16")
    best: _Best | None = None
    patience = section.early_stopping_patience
    history: list[Step] = []
    if checkpointer is not None and (resumed := checkpointer.load(named, optimizer)):
        history, best = resumed.history, resumed.best
        scaler.load_state_dict(resumed.scaler)
    resumed_at = len(history)
    seconds = history[-1].seconds if history else 0.0
    saved_at, wait = time.monotonic(), 0.0
    stopped_early = False

    adapted.train()
    for number, step_examples in enumerate(
        _steps(usable, section.effective_batch_size, seed, total)
    ):
        if number < resumed_at:
            continue
        began = time.perf_counter()
        rate = learning_rate(section, number, total)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["times"]
        # Dropout depends on seed, step and row alone, so that a step can be done again exactly.
        # (The generator serves models that drop out values of their own.)
        dropout_seed = f"dropout:{seed}:{number}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(dropout_seed.encode()).digest()[:7], "big"))
        # The first step shows at once that the run works; compiling begins with the second.
        # Plain code holds more at once, so it takes smaller bites.
        plain_first = compiled and number == 0
        budget = section.micro_batch_tokens
        loss = attempt(
            compiled and not plain_first,
            functools.partial(
                _backward, base, optimizer, scaler, step_examples, section.loss_on,
                min(budget, PLAIN_TOKENS) if plain_first else budget, dropout_seed,
            ),
        )  # fmt: skip
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, section.max_grad_norm).item()
        # With fp16 an overflow of the scaled gradient skips the step and lowers the scale; that
        # settles within a few steps, or the loss itself is the trouble.
        skipped = scaler.is_enabled() and not math.isfinite(norm)
        recent = [step.skipped for step in history[-MOST_SKIPPED:]]
        hopeless = skipped and len(recent) == MOST_SKIPPED and all(recent)
        if not math.isfinite(loss) or hopeless or not (math.isfinite(norm) or skipped):
            rows = ", ".join(example.row_id[:8] for example in step_examples)
            raise NumericError(
                f"step {number + 1} of {total}: loss {loss}, gradient norm {norm}; "
                f"rows {rows}; lower training.learning_rate, or use training.precision=fp32"
            )
        scaler.step(optimizer)
        scaler.update()
        if number < 2 or number % TRIM_EVERY == 0:
            machine.release_freed_memory()
        seconds += time.perf_counter() - began

        validation_loss = None
        if validate and section.eval_steps and (number + 1) % section.eval_steps == 0:
            adapted.eval()
            validation_loss = validate()
            adapted.train()
            if best is None or validation_loss < best[0]:
                best = (validation_loss, number + 1, trainable_state(adapted))
        step = Step(
            step=number + 1,
            total_steps=total,
            epoch=(number + 1) / steps_per_epoch(len(usable), section.effective_batch_size),
            loss=loss,
            learning_rate=rate,
            grad_norm=0.0 if skipped else norm,
            skipped=skipped,
            examples=len(step_examples),
            tokens=sum(example.length for example in step_examples),
            label_tokens=sum(label_count(each, section.loss_on) for each in step_examples),
            seconds=seconds,
            validation_loss=validation_loss,
        )
        history.append(step)
        on_step(step)
        if patience is not None and _validations_since(history, best) >= patience:
            stopped_early = True
            break
        if checkpointer and time.monotonic() - saved_at >= max(checkpointer.every_seconds, wait):
            began = time.monotonic()
            checkpointer.save(named, optimizer, history, best, scaler.state_dict())
            saved_at = time.monotonic()
            wait = 20 * (saved_at - began)  # all weights of a model take their time
    adapted.eval()
    kept = len(history)
    if section.keep_best and best is not None:
        restore_state(adapted, best[2])
        kept = best[1]
    optimizer.zero_grad(set_to_none=True)
    return TrainingResult(
        tuple(history),
        stopped_early,
        kept,
        len(examples) - len(usable),
        compiled and not fusion.failure(),
    )
