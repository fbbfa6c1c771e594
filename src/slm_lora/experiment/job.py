"""A cell ready to be computed: its configuration, base model, data and identities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from slm_lora.adapters.methods import trains_all
from slm_lora.config.learning_rate import SuggestedRate
from slm_lora.config.schema import (
    CellConfig,
    TrainingSection,
)
from slm_lora.config.types import RunOptions
from slm_lora.data.dataset import PreparedData
from slm_lora.data.sources import RowSet
from slm_lora.model.resolve import ModelSource
from slm_lora.ops import compilation
from slm_lora.records import Example
from slm_lora.runtime import distributed
from slm_lora.training.schedule import micro_batch_limits, training_tokens, usable_examples

if TYPE_CHECKING:
    import torch

    from slm_lora.model.base import PrecisionName


ScoredSet = Literal["test", "validation"]


@dataclass(frozen=True)
class Job:
    """A cell with its base model, its rows, and the identities of its runs.

    Attributes:
        name: of the cell.
        settings: keys that set the cell apart from others of the grid.
        config: of the cell.
        options: of the recipe, that change no result.
        resolved: the same as JSON, every choice made and nothing of this machine in it.
        source: the base model.
        data: tokenised sets.
        rows: that these were made of.
        device: that computes it.
        precision: of the base's weights.
        identity: of the adapter's run; SHA-256 over resolved configuration, rows and base.
        base_identity: of the base's run on the same held-out rows.
        scored_set: the rows that it is scored on: validation for runs that choose a tuned value,
            which never see the test set.
        suggested_rate: the origin of the learning rate; None where the recipe names it.
    """

    name: str
    settings: Mapping[str, Any]
    config: CellConfig
    options: RunOptions
    resolved: dict[str, Any]
    source: ModelSource
    data: PreparedData
    rows: RowSet
    device: torch.device
    precision: PrecisionName
    identity: str
    base_identity: str
    scored_set: ScoredSet = "test"
    suggested_rate: SuggestedRate | None = None

    @property
    def scored_rows(self) -> tuple[Example, ...]:
        """The rows of the scored set."""
        return self.data.test if self.scored_set == "test" else self.data.validation

    @property
    def low_precision(self) -> bool:
        """Whether it computes in half precision."""
        return self.precision != "fp32"

    @property
    def sharded(self) -> bool:
        """Whether the base's layers are shared out over the processes."""
        return self.config.training.fsdp and not distributed.is_single()


ComputedName = Literal["here", "elsewhere", "nowhere"]
"""Where a job is computed: on this machine, on others, or not at all (plans, looks at data)."""


def tokens_per_micro_batch(
    config: CellConfig,
    prepared: PreparedData,
    device: torch.device,
    precision: PrecisionName,
    budget: int,
) -> tuple[int, ...]:
    """Most tokens of a micro-batch, of every kind of code that this training runs."""
    section = config.training.model_copy(update={"micro_batch_tokens": budget})
    usable, low_precision = usable_examples(prepared.train, section), precision != "fp32"
    tokens = training_tokens(usable, section) if usable else 0
    # (A compiler that is missing here does not make another run of it.)
    compiled = compilation.is_worthwhile(
        section.compile, tokens, device, low_precision, sharded=False
    )
    frozen = not trains_all(config.adapter)
    plain, fused = micro_batch_limits(section, compiled, frozen, device.type, low_precision)
    return (plain, fused) if compiled else (plain,)


def capped(job: Job) -> str:
    """One line where ``training.micro_batch_tokens`` was chosen and is more than is computed at
    once; else empty."""
    budget = job.config.training.micro_batch_tokens
    default = TrainingSection.model_fields["micro_batch_tokens"].default
    most = max(tokens_per_micro_batch(job.config, job.data, job.device, job.precision, budget))
    if budget == default or most >= budget:
        return ""
    return (
        f"training.micro_batch_tokens = {budget}: on a {job.device.type.upper()} {most} tokens are "
        "computed at once, which is as fast; more would only take memory"
    )
