"""Trackers that a recipe's ``report_to`` names: the steps of a run, and what its test rows gave.

`steps.jsonl` and `run.json` hold all of it anyway. A tracker that fails is left out from then on
and never stops a run; what it does on the network is what its own settings say.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from slm_lora.config.types import TrackerName
from slm_lora.errors import UsageError
from slm_lora.records import Step

Numbers = Mapping[str, float]


class Tracker(Protocol):
    """One run in one tracker."""

    def log(self, numbers: Numbers, step: int) -> None:
        """Numbers by name, after an optimizer step."""

    def finish(self) -> None:
        """The run is over, well or not."""


@dataclass(frozen=True, slots=True)
class Tracked:
    """What a tracker is told of a run before it begins.

    Attributes:
        project: the experiment.
        name: of the run: its cell and the beginning of its identity, so that a run that goes on
            is the same run there.
        config: the resolved recipe.
        folder: of the experiment's results; local files go below it.
    """

    project: str
    name: str
    config: Mapping[str, Any]
    folder: Path


class _TensorBoard:
    def __init__(self, run: Tracked) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        folder = run.folder / "tensorboard" / run.name
        self._writer = SummaryWriter(str(folder))

    def log(self, numbers: Numbers, step: int) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def finish(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run: Tracked) -> None:
        import wandb

        self._run = wandb.init(
            project=run.project, name=run.name, id=run.name, resume="allow",
            config=dict(run.config), dir=str(run.folder),
        )  # fmt: skip

    def log(self, numbers: Numbers, step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def finish(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, run: Tracked) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(
            project=run.project, name=run.name, resume="allow", config=dict(run.config),
            embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def log(self, numbers: Numbers, step: int) -> None:
        self._trackio.log(dict(numbers), step=step)

    def finish(self) -> None:
        self._trackio.finish()


_KINDS: dict[TrackerName, Callable[[Tracked], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}


def check_installed(names: Sequence[TrackerName]) -> None:
    """Before any work.

    Raises:
        UsageError: a tracker is not installed.
    """
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise UsageError(
            f"report_to: {', '.join(missing)} is not installed; "
            "pip install '.[trackers]' in a checkout, or leave it out"
        )


class Trackers:
    """All trackers of one run; each until it fails."""

    def __init__(
        self, names: Sequence[TrackerName], run: Tracked, say: Callable[[str], None]
    ) -> None:
        """
        Args:
            names: of the trackers.
            run: what they are told of it.
            say: told one line when one fails.
        """
        self._say = say
        self._open: dict[TrackerName, Tracker] = {}
        for name in names:
            with self._harmless(name):
                self._open[name] = _KINDS[name](run)

    def step(self, step: Step) -> None:
        """Tell of a training step."""
        numbers = {
            "train/loss": step.loss,
            "train/learning_rate": step.learning_rate,
            "train/epoch": step.epoch,
            "train/tokens": float(step.tokens),
        }
        if step.grad_norm is not None:
            numbers["train/grad_norm"] = step.grad_norm
        if step.validation_loss is not None:
            numbers["validation/loss"] = step.validation_loss
        self._each(lambda tracker: tracker.log(numbers, step.step))

    def scored(self, loss: float, perplexity: float, step: int) -> None:
        """Tell of the test rows, after the last step."""
        numbers = {"test/loss": loss, "test/perplexity": perplexity}
        self._each(lambda tracker: tracker.log(numbers, step))

    def finish(self) -> None:
        """The run is over."""
        self._each(lambda tracker: tracker.finish())
        self._open.clear()

    def _each(self, work: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            with self._harmless(name):
                work(tracker)

    @contextmanager
    def _harmless(self, name: TrackerName) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of whatever kind: the run is worth more
            self._open.pop(name, None)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._say(f"  note: {name} failed and is left out ({reason})")


@contextmanager
def open_trackers(
    names: Sequence[TrackerName], run: Tracked, say: Callable[[str], None]
) -> Iterator[Trackers]:
    """Trackers that are finished whatever happens."""
    # wandb would ask for an account on a terminal.
    if "wandb" in names:
        os.environ.setdefault("WANDB_SILENT", "true")
    trackers = Trackers(names, run, say)
    try:
        yield trackers
    finally:
        trackers.finish()
