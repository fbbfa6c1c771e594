"""The section `replies` of a recipe: replies to test rows, and their metrics."""

from __future__ import annotations

import re
from typing import Literal, get_args

from pydantic import Field, field_validator, model_validator

from slm_lora.config.types import Int, Section

ReplyMetricName = Literal["exact_match", "token_f1", "rouge_l", "chrf", "number", "valid_json"]

TAKEN = (
    *("all", "response", "bits_per_byte", "response_bits_per_byte", "gain", "forgetting", "drift"),
    *("label", "pattern", "json_schema", "ended", "reply_tokens", "win_rate"),
)
"""Names that a function cannot have, beside those of ``metrics``."""


class RepliesSection(Section):
    """Replies of base and adapters to test rows, see docs/replies.md; changes no training."""

    rows: Int | None = Field(
        200, ge=1, description="Test rows that are replied to, drawn by a seeded hash; null: all."
    )
    max_new_tokens: Int = Field(128, ge=1, description="Limit of a reply, in tokens; greedy.")
    metrics: tuple[ReplyMetricName, ...] = Field(
        ("exact_match", "token_f1"),
        description="Compared with the row's response. `exact_match`, `token_f1`: without case, "
        "punctuation and spacing. `rouge_l`, `chrf`: by rouge-score and sacrebleu (extra "
        "`replies`). `number`: the last number of both. `valid_json`: without reference. Length "
        "and share of replies that end by themselves are always measured.",
    )
    labels: tuple[str, ...] = Field(
        (), description="Metric `label`: accuracy among these; other responses are left out."
    )
    pattern: str | None = Field(
        None, description="Metric `pattern`: whether this regular expression occurs in the reply."
    )
    json_schema: str | None = Field(
        None,
        description="Metric `json_schema`: whether the reply is JSON of the schema in this file "
        "(extra `replies`).",
    )
    functions: dict[str, str] = Field(
        default_factory=dict,
        description="Metrics of your own: `{name: module:function}`, a function of prompt, reply "
        "and reference that returns a number; modules are also looked up in the working folder.",
    )
    on_bad_row: Literal["fail", "skip"] = Field(
        "fail", description="A function of your own that raises: stop, or leave the row out."
    )

    @field_validator("pattern")
    @classmethod
    def _is_pattern(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return value

    @field_validator("labels")
    @classmethod
    def _are_different(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value and len({label.strip().casefold() for label in value}) < max(2, len(value)):
            raise ValueError("needs at least two labels, all different")
        return value

    @model_validator(mode="after")
    def _functions_have_names(self) -> RepliesSection:
        taken = {*get_args(ReplyMetricName), *TAKEN}
        for name, target in self.functions.items():
            if not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", name) or name in taken:
                raise ValueError(
                    f"functions: {name!r:.40} must be a new name of lower-case letters and _"
                )
            if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", target):
                raise ValueError(f"functions: {target!r:.60} must be module:function")
        return self
