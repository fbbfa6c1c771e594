"""The training loop.

A step's loss is the total NLL of its examples over their label tokens, whatever the division
into micro-batches. Order and dropout depend on the seed and the step alone.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from slm_lora.config.schema import TrainingSection
from slm_lora.data.collate import label_count, steps_per_epoch
from slm_lora.errors import DataError
from slm_lora.model.base import Base
from slm_lora.ops import compilation
from slm_lora.records import Example, Step
from slm_lora.runtime import distributed, hardware
from slm_lora.runtime.signals import Stop, StopRequested
from slm_lora.training.checkpoint import Checkpointer
from slm_lora.training.optimizer import adamw
from slm_lora.training.schedule import (
    epoch_steps,
    learning_rate,
    micro_batch_limits,
    total_steps,
    training_tokens,
    usable_examples,
)
from slm_lora.training.state import TrainState
from slm_lora.training.step import PendingStep, StepRunner


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """A finished training.

    Attributes:
        history: all steps, those of earlier processes included.
        stopped_early: whether validation stopped improving.
        kept_step: that the weights are of.
        rows_without_labels: training rows that had no label token.
        compiled: whether its steps were compiled.
    """

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
    def peak_memory_bytes(self) -> int:
        """Largest peak of any process of the training; see `hardware.reset_peak_memory`."""
        return self.history[-1].peak_memory_bytes

    @property
    def first_step_seconds(self) -> float:
        """Time of the first step."""
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


TRIM_INTERVAL = 8
"""Steps between two calls of malloc_trim; also after the first step, which runs eagerly, and the
second, which compiles."""


def train(
    base: Base,
    peft_model: torch.nn.Module,
    examples: Sequence[Example],
    section: TrainingSection,
    seed: int,
    *,
    validate: Callable[[], float] | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
    on_resume: Callable[[Sequence[Step]], None] = lambda steps: None,
    checkpointer: Checkpointer | None = None,
    stop: Stop | None = None,
    steps_ahead: int | None = None,
) -> TrainingResult:
    """Train in place: an adapter, or the whole base.

    Args:
        base: the base, with its adapter on it.
        peft_model: the same as PEFT has it, from `attach.attach`.
        examples: training rows.
        section: how to train.
        seed: of order and dropout.
        validate: loss on the validation set, in nats per label token.
        on_step: called with every step that this process computes; may raise to end the training.
        on_resume: called with the steps of earlier processes, if there are any.
        checkpointer: saves from time to time and at the end; resumes what an earlier process saved.
        stop: checked after every step, and by ``validate`` as it likes.
        steps_ahead: steps enqueued before the numbers of one are read; None: one on a CUDA GPU,
            else none.

    Raises:
        DataError: no example has a label.
        NumericError: loss, gradient or weights are not finite; names the step and its rows.
        IntegrityError: several processes resume from different steps.
        StopRequested: ``stop`` was requested; the step was finished, and a checkpoint saved.
    """
    usable = usable_examples(examples, section)
    if not usable:
        raise DataError(
            f"no label tokens left: none of the {len(examples)} training rows has a token to "
            f"train on (training.loss_on = {section.loss_on}); raise data.max_length, or check "
            "the template"
        )
    total, batch = total_steps(len(usable), section), section.effective_batch_size
    steps_in_epoch = steps_per_epoch(len(usable), batch)
    tokens = training_tokens(usable, section)
    device, single = base.device.type, distributed.is_single()
    compiled = compilation.should_compile(
        section.compile, tokens, base.device, base.low_precision, base.sharded
    )
    frozen = any(not parameter.requires_grad for parameter in peft_model.parameters())
    limits = micro_batch_limits(section, compiled, frozen, device, base.low_precision)

    parameters = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    optimizer = adamw(parameters, section, peft_model)
    scaler = torch.amp.GradScaler(device, enabled=base.precision == "fp16")
    runner = StepRunner(
        base,
        list(parameters.values()),
        optimizer,
        scaler,
        section.loss_on,
        section.max_grad_norm,
        section.activation_checkpointing,
        list(parameters),
    )
    state = TrainState(
        peft_model, parameters, optimizer, scaler, section, checkpointer, stop or Stop()
    )
    if steps_ahead is None:
        # An fp16 scaler waits for the GPU anyway, and so do several processes that agree.
        steps_ahead = int(device == "cuda" and single and not scaler.is_enabled())

    peft_model.train()
    with hardware.return_large_blocks(compiled and frozen and device == "cpu"):
        if state.history and validate is not None and state.should_validate(state.history[-1]):
            on_step(state.validate_last(validate))
        seconds, start = state.seconds, len(state.history)
        if state.history:
            on_resume(state.history)
        pending: deque[tuple[Step, PendingStep]] = deque()
        batches = enumerate(epoch_steps(usable, batch, seed, total))
        for number, step_examples in itertools.islice(batches, start, None):
            if state.should_stop_early():
                break
            began = time.perf_counter()

            rate = learning_rate(section, number, total)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
            # Dropout depends on seed, step and row alone, so a step can be repeated exactly.
            # (The generator serves models with dropout of their own.)
            dropout_seed = f"dropout:{seed}:{number}"
            torch.manual_seed(_generator_seed(dropout_seed))
            # The first step runs eagerly and shows at once that the run works.
            compiles = compiled and number > 0 and not compilation.failure()
            launched = runner.step(
                step_examples,
                limits[compiles],
                dropout_seed,
                compiles,
                state.skipped_in_a_row,
                f"step {number + 1} of {total}",
                state.control(),
            )
            if number == start:
                runner.check_gradients()
            if number < 2 or number % TRIM_INTERVAL == 0:
                hardware.release_freed_memory()
            step = Step(
                step=number + 1,
                total_steps=total,
                epoch=(number + 1) / steps_in_epoch,
                loss=math.nan,
                learning_rate=rate,
                grad_norm=None,
                skipped=False,
                examples=len(step_examples),
                tokens=sum(example.length for example in step_examples),
                label_tokens=sum(
                    label_count(example, section.loss_on) for example in step_examples
                ),
                seconds=seconds,
            )
            pending.append((step, launched))
            # Several processes agreed before the update; a single one looks again.
            control = state.control() if single else launched.control
            validates = validate is not None and state.should_validate(step)
            seconds += time.perf_counter() - began

            # Numbers are read one step later on a GPU; all before a validation, save or end.
            settle = control.stop or control.save or validates or step.step == total
            while len(pending) > (0 if settle else steps_ahead):
                step, launched = pending.popleft()
                began = time.perf_counter()
                result = launched.result()
                seconds += time.perf_counter() - began
                step = replace(
                    step,
                    loss=result.loss,
                    grad_norm=result.grad_norm,
                    skipped=result.grad_norm is None,
                    seconds=seconds,
                )
                on_step(state.finish_step(step, validate))
            if not pending:
                stopping = control.stop or (single and state.stop.requested)
                if stopping or control.save:
                    state.save()
                if stopping:
                    raise StopRequested

    peft_model.eval()
    stopped_early = state.should_stop_early()
    state.save_final()
    kept_step = state.restore_best()
    optimizer.zero_grad(set_to_none=True)
    return TrainingResult(
        tuple(state.history),
        stopped_early,
        kept_step,
        len(examples) - len(usable),
        compiled and not compilation.failure(),
    )


def _generator_seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
