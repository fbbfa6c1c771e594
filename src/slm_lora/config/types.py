"""Types of recipe values, and the names of formats, methods and trackers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def no_bool(value: object) -> object:
    """Refuse booleans where numbers are meant."""
    # In YAML ``yes`` is a boolean, and Python's True equals 1.
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def within_64_bits(value: int) -> int:
    """Refuse integers beyond 64 bits, the limit of the libraries that receive them."""
    if abs(value) >= 2**63:
        raise ValueError("must be below 2^63")
    return value


Int = Annotated[int, BeforeValidator(no_bool), AfterValidator(within_64_bits)]


Float = Annotated[float, BeforeValidator(no_bool)]


TrackerName = Literal["tensorboard", "wandb", "trackio"]


Precision = Literal["auto", "fp32", "bf16", "fp16"]


FormatName = Literal["auto", "dolly", "alpaca", "prompt_completion", "chat", "text"]


Relation = Literal["group", "prompt", "instruction", "context", "near"]


RELATED_BY: tuple[Relation, ...] = ("group", "prompt", "context", "near")
"""Default of ``data.group_by``."""


MethodName = Literal["lora", "rslora", "dora", "pissa", "full"]


METHOD_LABELS: dict[MethodName, str] = {
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "pissa": "PiSSA",
    "full": "Full fine-tuning",
}
"""Names of methods in reports; definitions: `adapters.methods`."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Recipe keys that affect no result, and so are not part of a run's identity."""

    keep_adapters: bool
    report_to: tuple[TrackerName, ...]
    checkpoint_seconds: float
