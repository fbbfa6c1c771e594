"""What is known of a training so far: its steps, its best validation, and what of it is saved."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from slm_lora.adapters.attach import restore_state, trainable_state
from slm_lora.config.schema import TrainingSection
from slm_lora.errors import IntegrityError, NumericError
from slm_lora.records import Step
from slm_lora.runtime import distributed, hardware
from slm_lora.runtime.signals import Stop, StopRequested
from slm_lora.training.checkpoint import Best, Checkpointer


class Journal:
    """Takes up what an earlier sitting saved, and keeps the steps of this one.

    Attributes:
        history: finished steps, their numbers looked at.
        best: of the validations.
        stop: whether the user wishes to stop.
    """

    def __init__(
        self,
        peft_model: torch.nn.Module,
        named: Mapping[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        section: TrainingSection,
        *,
        validate: Callable[[], float] | None,
        on_step: Callable[[Step], None],
        checkpointer: Checkpointer | None,
        stop: Stop,
    ) -> None:
        """
        Args:
            peft_model: the base with its adapter.
            named: its parameters that train.
            optimizer: of these.
            scaler: of their gradients.
            section: when to validate, and when that is enough.
            validate: loss on the validation set, in nats per label token.
            on_step: told of every step of this sitting.
            checkpointer: saves, and has what an earlier sitting saved.
            stop: looked at after every step.

        Raises:
            IntegrityError: several processes do not begin at the same step.
        """
        self._adapted, self._named = peft_model, named
        self._optimizer, self._scaler = optimizer, scaler
        self._section, self._validate, self._on_step = section, validate, on_step
        self._checkpointer, self.stop = checkpointer, stop
        self._device = next(iter(named.values())).device.type
        self.history: list[Step] = []
        self.best: Best | None = None
        if checkpointer is not None and (resumed := checkpointer.load(named, optimizer)):
            self.history, self.best = resumed.history, resumed.best
            scaler.load_state_dict(resumed.scaler)
        _check_same_place(len(self.history))
        self._saved_at, self._wait, self._saved_step = time.monotonic(), 0.0, len(self.history)

    @property
    def seconds(self) -> float:
        """Time spent in optimizer steps."""
        return self.history[-1].seconds if self.history else 0.0

    @property
    def skipped_at_the_end(self) -> int:
        """Steps in a row, up to the last one, that fp16 skipped."""
        last = itertools.takewhile(lambda step: step.skipped, reversed(self.history))
        return sum(1 for _ in last)

    @property
    def enough(self) -> bool:
        """Whether validations have not become better for as long as the recipe waits."""
        patience = self._section.early_stopping_patience
        if patience is None:
            return False
        after = 0 if self.best is None else self.best[1]
        since = (s for s in self.history if s.step > after and s.validation_loss is not None)
        return sum(1 for _ in since) >= patience

    def due(self, step: Step) -> bool:
        """Whether a validation comes after this step."""
        times = self._validate is not None and self._section.eval_steps
        return bool(times and step.step % times == 0 and step.validation_loss is None)

    def resume(self) -> None:
        """Do what the last sitting did not come to: the validation of its last step."""
        if self.history and self.due(self.history[-1]):
            self._end_step()

    def add(self, step: Step) -> None:
        """A finished step; validates if it is time to, and tells of it.

        Raises:
            NumericError: the validation's loss is not finite.
            StopRequested: a wish to stop came while validating; the step was saved.
        """
        self.history.append(step)
        self._end_step()

    def _end_step(self) -> None:
        self._mark_peak()
        step = self.history[-1]
        if self._validate and self.due(step):
            self._adapted.eval()
            try:
                loss = self._validate()
            except NumericError as error:
                raise NumericError(f"validation after step {step.step}: {error}") from error
            except StopRequested:
                self.save()  # the step is done; a resumed run begins with its validation
                raise
            self._adapted.train()
            if self.best is None or loss < self.best[0]:
                self.best = (loss, step.step, trainable_state(self._adapted))
            self.history[-1] = replace(step, validation_loss=loss)
            self._mark_peak()
        self._on_step(self.history[-1])

    def _mark_peak(self) -> None:
        # The operating system knows of this sitting alone.
        earlier = max(each.peak_memory_bytes for each in self.history[-2:])
        peak = max(earlier, hardware.peak_memory_bytes(self._device))
        self.history[-1] = replace(self.history[-1], peak_memory_bytes=peak)

    def save(self, last: bool = False) -> None:
        """Save where the training stands, if anything does; after the ``last`` step the moments
        have no use any more."""
        if self._checkpointer is None:
            return
        began = time.monotonic()
        optimizer = None if last else self._optimizer
        scaler = self._scaler.state_dict()
        self._checkpointer.save(self._named, optimizer, self.history, self.best, scaler)
        self._saved_at, self._saved_step = time.monotonic(), len(self.history)
        # All weights of a model take their time: at most a twentieth of it goes into saving.
        self._wait = 20 * (self._saved_at - began)

    def save_the_end(self) -> None:
        """Until the run is recorded: what is trained is not trained again."""
        if self._saved_step < len(self.history):
            self.save(last=True)

    def wishes(self) -> tuple[bool, bool]:
        """To stop, and to save, which the first process decides for all."""
        every = self._checkpointer.every_seconds if self._checkpointer else math.inf
        since = time.monotonic() - self._saved_at
        due = not every or since >= max(every, self._wait)
        return self.stop.requested, distributed.is_main() and due

    def keep_best(self) -> int:
        """Put the weights of the best validation back, if there was one.

        Returns:
            The step that the weights are of.
        """
        if not self._section.keep_best or self.best is None:
            return len(self.history)
        restore_state(self._adapted, self.best[2])
        return self.best[1]


def _check_same_place(done: int) -> None:
    """All processes begin after the same step.

    Raises:
        IntegrityError: they do not.
    """
    if len(set(places := distributed.all_gather(done))) > 1:
        raise IntegrityError(
            f"the processes took up different checkpoints (of steps {places}): all must see the "
            "same results folder"
        )
