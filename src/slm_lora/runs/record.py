"""The record of a run, run.json, as typed values.

Keys that later versions write are kept and ignored here; keys that earlier versions lacked have
defaults.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


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

    rows: int
    tokens: int = 0


class SetsRecord(_Part):
    """The three sets."""

    test: SetRecord
    validation: SetRecord
    train: SetRecord


class LongRowsRecord(_Part):
    """Rows beyond ``max_length``: how many, what was done, tokens lost, the longest in tokens."""

    rows: int
    policy: str
    tokens_cut: int
    longest: int


class DataRecord(_Part):
    """The rows: origin, counts, hashes of the tokenised sets."""

    origin: str
    format: str
    template: TemplateRecord
    rows_available: int
    groups: int
    duplicates_dropped: int = 0
    bad_rows_skipped: int = 0
    split_version: int
    held_out_sha256: str
    train_sha256: str
    sets: SetsRecord
    long_rows: dict[str, LongRowsRecord] = {}


class MachineRecord(_Part):
    """Hardware that a run was computed on."""

    processor: str
    cores: int
    threads: int = 1
    memory_gb: float
    system: str = ""
    device: str
    gpu: str | None = None
    processes: int = 1


class LossRecord(_Part):
    """A held-out loss in nats per token, over ``tokens`` of ``rows`` rows."""

    loss: float
    perplexity: float
    tokens: int
    rows: int
    bits_per_byte: float


class EvaluationRecord(_Part):
    """Scores of the test rows."""

    headline: str
    split: str = "test"
    all: LossRecord
    response: LossRecord | None = None
    seconds: float = 0.0
    tokens_per_s: float = 0.0
    compiled: bool = False

    def loss(self, name: str) -> LossRecord | None:
        """The loss over ``all`` tokens or the ``response``, where it was recorded."""
        losses = {"all": self.all, "response": self.response}
        return losses.get(name)


class AdapterRecord(_Part):
    """What was trained, and the file that it was saved to."""

    folder: str
    sha256: str
    bytes: int
    trainable_parameters: int
    all_parameters: int
    percent: float


class TrainingRecord(_Part):
    """A finished training: steps, tokens, seconds, peak memory in bytes."""

    steps: int
    epochs: float
    tokens: int
    label_tokens: int
    seconds: float
    first_step_seconds: float
    tokens_per_s: float
    peak_memory_bytes: int
    compiled: bool
    last_step_loss: float
    rows_without_labels: int
    kept_step: int
    stopped_early: bool
    skipped_steps: int


class RunRecord(_Part):
    """run.json; ``adapter`` and ``training`` are None for a base model."""

    format: int
    cell: str
    hash: str
    experiment: str
    recipe: dict[str, Any]
    settings: dict[str, Any] = {}
    model: ModelRecord
    data: DataRecord
    machine: MachineRecord
    versions: dict[str, str]
    evaluation: EvaluationRecord
    adapter: AdapterRecord | None = None
    training: TrainingRecord | None = None

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
