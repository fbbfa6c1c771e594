"""The section `forgetting` of a recipe: drift from the base, and losses on further sets."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from slm_lora.config.types import Float, FormatName, Int, Section

GENERAL_PROMPTS = 200
"""Prompts in evaluation/general_prompts.txt."""
DRIFT = "drift"
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,30}")
_TAKEN = (DRIFT, "replies")


class AlsoSection(Section):
    """A further held-out set: where its rows are, and how much may be forgotten on it."""

    name: str = Field(description="Hub id or local file, as `data.name`.")
    revision: str | None = Field(None, description="Hub revision; hub ids only.")
    split: str = Field("train", description="Split of a hub data set to take rows from.")
    format: FormatName = Field("auto", description="Row format; `auto`: detected from the columns.")
    columns: dict[str, str | None] = Field(
        default_factory=dict, description="Column of each field, as `data.columns`."
    )
    text_rows: Literal["auto", "lines", "paragraphs"] = Field(
        "auto", description="Rows of a `.txt` file, as `data.text_rows`."
    )
    on_bad_row: Literal["fail", "skip"] = Field(
        "fail", description="Malformed rows: stop, or skip and count them."
    )
    template: str = Field(
        "auto",
        description="Prompt format, as `data.template`; `auto`: that of the training, and `plain` "
        "for rows without a prompt.",
    )
    rows: Int | None = Field(
        200, ge=1, description="Rows that are scored, drawn by a seeded hash; null: all."
    )
    margin: Float = Field(
        0.05, gt=0, description="Margin of non-inferiority: nats per token that may be forgotten."
    )


class ForgettingSection(Section):
    """Drift from the base, losses on further sets, see docs/forgetting.md; changes no training."""

    also: dict[str, AlsoSection] = Field(
        default_factory=dict,
        description="Further held-out sets: `{german: {name: german.jsonl, rows: 200, margin: "
        "0.05}}`; see below.",
    )
    drift: bool = Field(
        True,
        description="Measure KL(base ‖ tuned) per token on replies of the base to general prompts "
        "of this project; needs no data.",
    )
    prompts: Int = Field(
        GENERAL_PROMPTS, ge=1, le=GENERAL_PROMPTS, description="How many of the general prompts."
    )
    max_new_tokens: Int = Field(
        64, ge=1, description="Limit of a sampled reply of the base, in tokens."
    )

    @field_validator("also")
    @classmethod
    def _have_names(cls, value: dict[str, AlsoSection]) -> dict[str, AlsoSection]:
        for name in value:
            if not _NAME.fullmatch(name) or name in _TAKEN:
                raise ValueError(
                    f"{name!r:.40} must be a name of lower-case letters, digits, _ and -, and "
                    f"none of {', '.join(_TAKEN)}"
                )
        return value

    @model_validator(mode="after")
    def _measures_something(self) -> ForgettingSection:
        if not self.drift and not self.also:
            raise ValueError("nothing to measure: drift is false, and there is no set in also")
        return self
