"""The training loop: exact, plain PyTorch.

A step's loss is the total NLL of its examples over their label tokens, whatever the division
into micro-batches. Order and dropout depend on the seed and the step alone.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
from slm_lora.training.state import Journal
from slm_lora.training.step import PendingStep, StepRunner


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
    def peak_memory_bytes(self) -> int:
        """Most memory that any sitting used; see `machine.reset_peak_memory`."""
        return self.history[-1].peak_memory_bytes

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


TRIM_EVERY = 8
"""Steps after which a heap in pieces is given back; at once after the first step, which is
plain, and the second, which compiles."""


def _taken(
    under_way: deque[tuple[Step, PendingStep]], leave: int
) -> Iterator[tuple[Step, PendingStep]]:
    """Take out the oldest steps until ``leave`` are left."""
    while len(under_way) > leave:
        yield under_way.popleft()


def train(
    base: Base,
    peft_model: torch.nn.Module,
    examples: Sequence[Example],
    section: TrainingSection,
    seed: int,
    *,
    validate: Callable[[], float] | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
    checkpointer: Checkpointer | None = None,
    stop: Stop | None = None,
    steps_ahead: int | None = None,
) -> TrainingResult:
    """Train in place: an adapter, or the whole base.

    Args:
        base: the base, that carries the adapter.
        peft_model: the base with its adapter, from `adapter.attach`.
        examples: training rows.
        section: how to train.
        seed: order and dropout.
        validate: loss on the validation set, in nats per label token.
        on_step: told of every step of this sitting.
        checkpointer: saves now and then and at the end, and takes up what an earlier sitting
            saved.
        stop: looked at after every step, and by ``validate`` as it likes.
        steps_ahead: steps handed over before the numbers of one are looked at; None: one on a
            CUDA GPU, which then need not be waited for, else none.

    Raises:
        DataError: no example has a label.
        NumericError: loss, gradient or weights are not finite; names the step and its rows.
        IntegrityError: several processes do not begin at the same step.
        StopRequested: ``stop`` was; the step was finished, and a checkpoint saved.
    """
    usable = usable_examples(examples, section)
    if not usable:
        raise DataError(
            f"no label tokens left: none of the {len(examples)} training rows has a token to "
            f"train on (training.loss_on = {section.loss_on}); raise data.max_length, or check "
            "the template"
        )
    compiled = compilation.wanted(
        section.compile,
        training_tokens(usable, section),
        base.device,
        base.low_precision,
        base.sharded,
    )
    named = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    optimizer = adamw(named, section, peft_model)
    scaler = torch.amp.GradScaler(base.device.type, enabled=base.precision == "fp16")
    updater = StepRunner(
        base,
        list(named.values()),
        optimizer,
        scaler,
        section.loss_on,
        section.max_grad_norm,
        section.activation_checkpointing,
        list(named),
    )
    several = not distributed.is_single()
    if steps_ahead is None:
        # An fp16 scaler waits for the GPU anyway, and so do several processes that agree.
        waits = scaler.is_enabled() or several
        steps_ahead = int(base.device.type == "cuda" and not waits)
    journal = Journal(
        peft_model,
        named,
        optimizer,
        scaler,
        section,
        validate=validate,
        on_step=on_step,
        checkpointer=checkpointer,
        stop=stop or Stop(),
    )
    frozen = any(not parameter.requires_grad for parameter in peft_model.parameters())
    at_once = micro_batch_limits(section, compiled, frozen, base.device.type, base.low_precision)
    peft_model.train()
    with hardware.returning_large_blocks(compiled and frozen and base.device.type == "cpu"):
        journal.resume()
        _take_steps(updater, journal, usable, section, seed, compiled, at_once, steps_ahead)
    peft_model.eval()
    journal.save_the_end()
    kept = journal.keep_best()
    optimizer.zero_grad(set_to_none=True)
    return TrainingResult(
        tuple(journal.history),
        journal.enough,
        kept,
        len(examples) - len(usable),
        compiled and not compilation.failure(),
    )


def _take_steps(
    updater: StepRunner,
    journal: Journal,
    examples: Sequence[Example],
    section: TrainingSection,
    seed: int,
    compiled: bool,
    at_once: tuple[int, int],
    steps_ahead: int,
) -> None:
    """From the journal's last step to the end of the training, or until it is stopped; ``at_once``
    from `micro_batch_limits`."""
    total = total_steps(len(examples), section)
    an_epoch = steps_per_epoch(len(examples), section.effective_batch_size)
    under_way: deque[tuple[Step, PendingStep]] = deque()
    seconds, first = journal.seconds, True
    steps = enumerate(epoch_steps(examples, section.effective_batch_size, seed, total))
    for number, step_examples in itertools.islice(steps, len(journal.history), None):
        if journal.enough:
            break
        began = time.perf_counter()
        rate = learning_rate(section, number, total)
        for group in updater.optimizer.param_groups:
            group["lr"] = rate * group["times"]
        # Dropout depends on seed, step and row alone, so that a step can be done again exactly.
        # (The generator serves models that drop out values of their own.)
        dropout_seed = f"dropout:{seed}:{number}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(dropout_seed.encode()).digest()[:7], "big"))
        # The first step shows at once that the run works; compiling begins with the second.
        fused = compiled and number > 0 and not compilation.failure()
        launched = updater.step(
            step_examples,
            at_once[fused],
            dropout_seed,
            fused,
            journal.skipped_at_the_end,
            f"step {number + 1} of {total}",
            journal.wishes(),
        )
        if first:
            updater.check_gradients()
            first = False
        if number < 2 or number % TRIM_EVERY == 0:
            hardware.release_freed_memory()
        step = Step(
            step=number + 1,
            total_steps=total,
            epoch=(number + 1) / an_epoch,
            loss=math.nan,
            learning_rate=rate,
            grad_norm=None,
            skipped=False,
            examples=len(step_examples),
            tokens=sum(example.length for example in step_examples),
            label_tokens=sum(label_count(each, section.loss_on) for each in step_examples),
            seconds=seconds,
        )
        under_way.append((step, launched))
        # What several processes agreed on before the update; alone, what is wished by now.
        alone = distributed.is_single()
        stopping, saving = journal.wishes() if alone else launched.wishes
        # Nothing is validated, saved or ended before every number was looked at.
        settled = stopping or saving or journal.due(step) or step.step == total
        seconds += time.perf_counter() - began
        for each, numbers in _taken(under_way, leave=0 if settled else steps_ahead):
            began = time.perf_counter()
            loss, norm = numbers.result()
            seconds += time.perf_counter() - began
            journal.add(
                replace(each, loss=loss, grad_norm=norm, skipped=norm is None, seconds=seconds)
            )
        if not under_way:
            stopping |= journal.stop.requested and alone
            if stopping or saving:
                journal.save()
            if stopping:
                raise StopRequested
