"""The state of a training: weights, optimizer, history, best validation, checkpoints."""

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
from slm_lora.training.step import Control


class TrainState:
    """Everything of a training that a checkpoint keeps, and when to validate, save and stop.

    Attributes:
        parameters: that train, by name.
        optimizer: of these.
        scaler: of fp16 gradients.
        history: finished steps.
        best: loss, step and weights of the best validation.
        stop: set when a stop was requested.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        section: TrainingSection,
        checkpointer: Checkpointer | None,
        stop: Stop,
    ) -> None:
        """Resumes from the last checkpoint, if there is one.

        Raises:
            IntegrityError: several processes resume from different steps.
        """
        self._model, self.parameters = model, parameters
        self.optimizer, self.scaler = optimizer, scaler
        self._section, self._checkpointer, self.stop = section, checkpointer, stop
        self._device = next(iter(parameters.values())).device.type
        self.history: list[Step] = []
        self.best: Best | None = None
        if checkpointer is not None and (resumed := checkpointer.load(parameters, optimizer)):
            self.history, self.best = resumed.history, resumed.best
            scaler.load_state_dict(resumed.scaler)
        _check_same_step(len(self.history))
        self._saved_at, self._min_interval, self._saved_step = (
            time.monotonic(), 0.0, len(self.history)
        )  # fmt: skip

    @property
    def seconds(self) -> float:
        """Time spent in optimizer steps."""
        return self.history[-1].seconds if self.history else 0.0

    @property
    def skipped_in_a_row(self) -> int:
        """Last steps that fp16 skipped."""
        last = itertools.takewhile(lambda step: step.skipped, reversed(self.history))
        return sum(1 for _ in last)

    def should_stop_early(self) -> bool:
        """Whether validation has not improved for ``early_stopping_patience`` validations."""
        patience = self._section.early_stopping_patience
        if patience is None:
            return False
        best_step = 0 if self.best is None else self.best[1]
        validations = [
            step
            for step in self.history
            if step.step > best_step and step.validation_loss is not None
        ]
        return len(validations) >= patience

    def should_validate(self, step: Step) -> bool:
        """Whether ``eval_steps`` falls on a step that was not validated yet."""
        interval = self._section.eval_steps
        return bool(interval and step.step % interval == 0 and step.validation_loss is None)

    def control(self) -> Control:
        """Whether a stop was requested here, and whether a checkpoint is due (rank 0 decides)."""
        interval = self._checkpointer.every_seconds if self._checkpointer else math.inf
        elapsed = time.monotonic() - self._saved_at
        due = not interval or elapsed >= max(interval, self._min_interval)
        return Control(self.stop.requested, distributed.is_main() and due)

    def finish_step(self, step: Step, validate: Callable[[], float] | None) -> Step:
        """Add a step to the history, validated if it is time to.

        Raises:
            NumericError: the validation's loss is not finite.
            StopRequested: a stop was requested while validating; the step was saved.
        """
        self.history.append(step)
        return self.validate_last(validate)

    def validate_last(self, validate: Callable[[], float] | None) -> Step:
        """Validate the last step if it is time to; a resumed run may still have to."""
        self._record_peak_memory()
        step = self.history[-1]
        if validate is not None and self.should_validate(step):
            self._model.eval()
            try:
                loss = validate()
            except NumericError as error:
                raise NumericError(f"validation after step {step.step}: {error}") from error
            except StopRequested:
                self.save()  # the step is done; a resumed run begins with its validation
                raise
            self._model.train()
            if self.best is None or loss < self.best[0]:
                self.best = (loss, step.step, trainable_state(self._model))
            self.history[-1] = replace(step, validation_loss=loss)
            self._record_peak_memory()
        return self.history[-1]

    def _record_peak_memory(self) -> None:
        # The operating system knows this process's peak alone; earlier ones are in the history.
        earlier = max(step.peak_memory_bytes for step in self.history[-2:])
        peak = max(earlier, hardware.peak_memory_bytes(self._device))
        self.history[-1] = replace(self.history[-1], peak_memory_bytes=peak)

    def save(self, final: bool = False) -> None:
        """Write a checkpoint; the final one without the optimizer's moments."""
        if self._checkpointer is None:
            return
        began = time.monotonic()
        optimizer = None if final else self.optimizer
        scaler = self.scaler.state_dict()
        self._checkpointer.save(self.parameters, optimizer, self.history, self.best, scaler)
        self._saved_at, self._saved_step = time.monotonic(), len(self.history)
        # Saving all weights of a model is slow: at most a twentieth of the time goes into it.
        self._min_interval = 20 * (self._saved_at - began)

    def save_final(self) -> None:
        """Keep the finished training until its run is recorded."""
        if self._saved_step < len(self.history):
            self.save(final=True)

    def restore_best(self) -> int:
        """Put back the weights of the best validation, if the recipe keeps them.

        Returns:
            The step that the weights are of.
        """
        if not self._section.keep_best or self.best is None:
            return len(self.history)
        restore_state(self._model, self.best[2])
        return self.best[1]


def _check_same_step(done: int) -> None:
    """All processes resume after the same step.

    Raises:
        IntegrityError: they do not.
    """
    if len(set(steps := distributed.all_gather(done))) > 1:
        raise IntegrityError(
            f"the processes took up different checkpoints (of steps {steps}): all must see the "
            "same results folder"
        )
