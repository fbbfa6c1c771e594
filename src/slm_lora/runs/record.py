"""The record of a run, run.json, as typed values.

Keys that later versions write are kept and ignored here; keys that earlier versions lacked have
defaults. Types are strict, and numbers have limits within which sums and quotients of them are
finite: a report that shows them cannot fail on them.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from slm_lora.config.grid import setting_of
from slm_lora.config.schema import LATER_KEYS
from slm_lora.config.types import METHOD_LABELS
from slm_lora.runs.metrics import METRICS

_LARGEST_COUNT = 2**63 - 1
Count = Annotated[int, Field(ge=0, le=_LARGEST_COUNT)]
Positive = Annotated[int, Field(ge=1, le=_LARGEST_COUNT)]
Seed = Annotated[int, Field(ge=-_LARGEST_COUNT, le=_LARGEST_COUNT)]
Measured = Annotated[float, Field(ge=0, le=1e15)]
"""Seconds, gigabytes, tokens per second, per cent."""
Name = Annotated[str, Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)


class ModelRecord(_Part):
    """The base: its name, the SHA-256 of its weights, how it was computed."""

    name: str
    revision: str | None = None
    sha256: str
    precision: str
    packed: bool = True
    quantization: str | None = None


class TemplateRecord(_Part):
    """The prompt template."""

    kind: str
    source: str = ""
    include_context: bool = False


class SetRecord(_Part):
    """Rows and tokens of one set."""

    rows: Count
    tokens: Count = 0


class SetsRecord(_Part):
    """The three sets."""

    test: SetRecord
    validation: SetRecord
    train: SetRecord


class LongRowsRecord(_Part):
    """Rows beyond ``max_length``: how many, what was done, tokens lost, the longest in tokens."""

    rows: Count
    policy: str
    tokens_cut: Count
    longest: Count


class DataRecord(_Part):
    """The rows: origin, counts, hashes of the tokenised sets."""

    origin: str
    format: str
    template: TemplateRecord
    rows_available: Count
    groups: Count
    duplicates_dropped: Count = 0
    bad_rows_skipped: Count = 0
    split_version: Count
    held_out_sha256: str
    train_sha256: str
    sets: SetsRecord
    long_rows: dict[str, LongRowsRecord] = {}


class MachineRecord(_Part):
    """Hardware that a run was computed on."""

    processor: str
    cores: Count
    threads: Count = 1
    memory_gb: Measured
    system: str = ""
    device: str
    gpu: str | None = None
    processes: Count = 1


class LossRecord(_Part):
    """A held-out loss in nats per token, over ``tokens`` of ``rows`` rows."""

    loss: float
    perplexity: float
    tokens: Count
    rows: Count
    bits_per_byte: float


class EvaluationRecord(_Part):
    """Scores of the test rows."""

    headline: str
    split: str = "test"

    @field_validator("headline")
    @classmethod
    def _known_metric(cls, value: str) -> str:
        if value not in METRICS:
            raise ValueError(f"must be one of {', '.join(METRICS)}")
        return value

    all: LossRecord
    response: LossRecord | None = None
    seconds: Measured = 0.0
    tokens_per_s: Measured = 0.0
    compiled: bool = False

    def loss(self, name: str) -> LossRecord | None:
        """The loss over ``all`` tokens or the ``response``, where it was recorded."""
        losses = {"all": self.all, "response": self.response}
        return losses.get(name)


class AdapterRecord(_Part):
    """What was trained, and the file that it was saved to."""

    folder: str
    sha256: str
    bytes: Count
    trainable_parameters: Positive
    all_parameters: Positive
    percent: Measured


class TrainingRecord(_Part):
    """A finished training: steps, tokens, seconds, peak memory in bytes."""

    steps: Positive
    epochs: Measured
    tokens: Count
    label_tokens: Count
    seconds: Measured
    first_step_seconds: Measured
    tokens_per_s: Measured
    peak_memory_bytes: Count
    compiled: bool
    last_step_loss: float
    rows_without_labels: Count
    kept_step: Count
    stopped_early: bool
    skipped_steps: Count


class _ModelKeys(_Part):
    quantization: str | None = None


class _DataKeys(_Part):
    size: Positive | None
    max_length: Positive
    group_by: list[str] | None = None


class _AdapterKeys(_Part):
    kind: str
    r: Positive
    lora_alpha: Annotated[float, Field(gt=0)]
    target_modules: list[str] | str

    @field_validator("kind")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in METHOD_LABELS:
            raise ValueError(f"must be one of {', '.join(METHOD_LABELS)}")
        return value


class _TrainingKeys(_Part):
    learning_rate: Annotated[float, Field(gt=0)]


class _EvaluationKeys(_Part):
    equivalence_margin: Annotated[float, Field(gt=0)] | None = None


class RecipeRecord(_Part):
    """The resolved recipe: its sections, with the keys that reports read."""

    model: _ModelKeys
    data: _DataKeys
    adapter: _AdapterKeys
    training: _TrainingKeys
    evaluation: _EvaluationKeys
    seed: Seed
    data_seed: Seed

    @model_validator(mode="after")
    def _sections(self) -> Self:
        for name, section in (self.model_extra or {}).items():
            if not isinstance(section, dict):
                raise ValueError(f"{name} is no section of keys")
        return self


class StepRecord(_Part):
    """A line of steps.jsonl: the keys that reports read."""

    step: Count
    loss: Annotated[float, Field(ge=-1e15, le=1e15)]


class RunRecord(_Part):
    """run.json; ``adapter`` and ``training`` are None for a base model."""

    format: int
    cell: Name
    hash: Name
    experiment: Name
    recipe: RecipeRecord
    settings: dict[str, Any] = {}
    model: ModelRecord
    data: DataRecord
    machine: MachineRecord
    versions: dict[str, str]
    evaluation: EvaluationRecord
    adapter: AdapterRecord | None = None
    training: TrainingRecord | None = None

    @model_validator(mode="after")
    def _known_settings(self) -> Self:
        """Settings are keys of the recipe, and keys have no dots."""
        recipe = self.recipe.model_dump()
        sections = [keys for keys in recipe.values() if isinstance(keys, dict)]
        if dotted := [key for keys in (recipe, *sections) for key in keys if "." in key]:
            raise ValueError(f"recipe: {dotted[0]!r:.60} is no key of a recipe")
        for name, keys in LATER_KEYS.items():
            recipe[name] = {**keys, **recipe[name]}
        for key in self.settings:
            try:
                setting_of(recipe, key)
            except (KeyError, TypeError) as error:
                raise ValueError(f"settings: {key!r:.60} is no key of the recipe") from error
        return self

    @model_validator(mode="after")
    def _trained_on_rows(self) -> Self:
        if (self.adapter is None) != (self.training is None):
            raise ValueError("adapter and training: one without the other")
        if self.training is not None and not (self.training.tokens and self.data.sets.train.rows):
            raise ValueError("training.tokens, data.sets.train.rows: trained on nothing")
        return self

    @property
    def trained(self) -> TrainingRecord:
        """The training of a run that has one."""
        assert self.training is not None, f"{self.cell} is a base model"
        return self.training

    @property
    def saved(self) -> AdapterRecord:
        """The adapter, or the whole model, of a run that was trained."""
        assert self.adapter is not None, f"{self.cell} is a base model"
        return self.adapter
