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

from slm_lora import machine, processes
from slm_lora.data.batches import epoch_order, label_count, steps_per_epoch
from slm_lora.errors import DataError, IntegrityError, NumericError
from slm_lora.model import fusion
from slm_lora.model.adapter import restore_state, trainable_state
from slm_lora.model.base import Base
from slm_lora.recipe.schema import TrainingSection
from slm_lora.records import Example, Step
from slm_lora.stopping import Stop, StopRequested
from slm_lora.training.checkpoint import Best, Checkpointer
from slm_lora.training.optimizer import adamw, learning_rate
from slm_lora.training.step import Launched, Updater


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


PLAIN_TOKENS = 512
"""Tokens at once in the first, plain step of a training that compiles."""

TRIM_EVERY = 8
"""Steps after which a heap in pieces is given back; at once after the first step, which is
plain, and the second, which compiles."""


def _validations_since(history: Sequence[Step], best: Best | None) -> int:
    """Validations after the best one."""
    after = 0 if best is None else best[1]
    return sum(s.validation_loss is not None for s in history if s.step > after)


def _skipped_at_the_end(history: Sequence[Step]) -> int:
    """Steps in a row, up to the last one, that fp16 skipped."""
    return sum(1 for _ in itertools.takewhile(lambda step: step.skipped, reversed(history)))


def _taken(under_way: deque[tuple[Step, Launched]], leave: int) -> Iterator[tuple[Step, Launched]]:
    """Take out the oldest steps until ``leave`` are left."""
    while len(under_way) > leave:
        yield under_way.popleft()


def _check_same_place(done: int) -> None:
    """All processes begin after the same step.

    Raises:
        IntegrityError: they do not.
    """
    if len(set(places := processes.gather(done))) > 1:
        raise IntegrityError(
            f"the processes took up different checkpoints (of steps {places}): all must see the "
            "same results folder"
        )


def _time_to_save(checkpointer: Checkpointer | None, since: float, wait: float) -> bool:
    """Whether the last save is long enough ago; all weights of a model take their time."""
    every = checkpointer.every_seconds if checkpointer else math.inf
    return not every or since >= max(every, wait)


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
    stop: Stop | None = None,
    steps_ahead: int | None = None,
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
    compiled = not base.sharded and fusion.wanted(section.compile, tokens, base.device, base.half)
    named = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    optimizer = adamw(named, section)
    scaler = torch.amp.GradScaler(base.device.type, enabled=base.precision == "fp16")
    updater = Updater(
        base,
        list(named.values()),
        optimizer,
        scaler,
        section.loss_on,
        section.max_grad_norm,
        section.activation_checkpointing,
    )
    stop = stop or Stop()
    several = not processes.alone()
    if steps_ahead is None:
        # An fp16 scaler waits for the GPU anyway, and so do several processes that agree.
        waits = scaler.is_enabled() or several
        steps_ahead = int(base.device.type == "cuda" and not waits)
    best: Best | None = None
    history: list[Step] = []
    if checkpointer is not None and (resumed := checkpointer.load(named, optimizer)):
        history, best = resumed.history, resumed.best
        scaler.load_state_dict(resumed.scaler)
    _check_same_place(len(history))
    resumed_at = len(history)
    seconds = history[-1].seconds if history else 0.0
    saved_at, wait, saved_step = time.monotonic(), 0.0, resumed_at

    def save(last: bool = False) -> None:
        nonlocal saved_at, wait, saved_step
        if checkpointer is None:
            return
        began = time.monotonic()
        checkpointer.save(named, None if last else optimizer, history, best, scaler.state_dict())
        saved_at, saved_step = time.monotonic(), len(history)
        wait = 20 * (saved_at - began)

    def wishes() -> tuple[bool, bool]:
        """To stop, and to save, which the first process decides for all."""
        waited = time.monotonic() - saved_at
        save = processes.is_first() and _time_to_save(checkpointer, waited, wait)
        return stop.requested, save

    def due(step: Step) -> bool:
        times = validate is not None and section.eval_steps
        return bool(times and step.step % times == 0 and step.validation_loss is None)

    def end_step() -> None:
        """Validate if it is time to, and tell of the step."""
        nonlocal best
        step = history[-1]
        if validate and due(step):
            adapted.eval()
            try:
                loss = validate()
            except NumericError as error:
                raise NumericError(f"validation after step {step.step}: {error}") from error
            except StopRequested:
                save()  # the step is done; a resumed run begins with its validation
                raise
            adapted.train()
            if best is None or loss < best[0]:
                best = (loss, step.step, trainable_state(adapted))
            history[-1] = replace(step, validation_loss=loss)
        on_step(history[-1])

    def enough() -> bool:
        patience = section.early_stopping_patience
        return patience is not None and _validations_since(history, best) >= patience

    under_way: deque[tuple[Step, Launched]] = deque()
    adapted.train()
    if history and due(history[-1]):
        end_step()
    stopped_early = enough()
    steps = enumerate(_steps(usable, section.effective_batch_size, seed, total))
    for number, step_examples in itertools.islice(steps, resumed_at, None):
        if stopped_early:
            break
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
        launched = updater.step(
            step_examples,
            min(budget, PLAIN_TOKENS) if plain_first else budget,
            dropout_seed,
            compiled and not plain_first,
            _skipped_at_the_end(history),
            f"step {number + 1} of {total}",
            wishes(),
        )
        if number < 2 or number % TRIM_EVERY == 0:
            machine.release_freed_memory()
        step = Step(
            step=number + 1,
            total_steps=total,
            epoch=(number + 1) / steps_per_epoch(len(usable), section.effective_batch_size),
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
        stopping, saving = launched.wishes if several else wishes()
        # Nothing is validated, saved or ended before every number was looked at.
        settled = stopping or saving or due(step) or step.step == total
        seconds += time.perf_counter() - began
        for each, numbers in _taken(under_way, leave=0 if settled else steps_ahead):
            began = time.perf_counter()
            loss, norm = numbers.result()
            seconds += time.perf_counter() - began
            history.append(
                replace(each, loss=loss, grad_norm=norm, skipped=norm is None, seconds=seconds)
            )
            end_step()
        stopped_early = enough()
        if not under_way:
            stopping |= stop.requested and not several
            if stopping or saving:
                save()
            if stopping:
                raise StopRequested
    adapted.eval()
    if saved_step < len(history):
        save(last=True)  # until the run is recorded: what is trained is not trained again
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
