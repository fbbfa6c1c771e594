"""The section `judge` of a recipe: a model that compares replies of adapters with the base's."""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from slm_lora.config.types import Float, Int, Section


class JudgeSection(Section):
    """Judge of `slm-lora judge`, see docs/judge.md; an experiment itself sends nothing."""

    url: str = Field(description="Address of an OpenAI-style API, e.g. `http://localhost:8000/v1`.")
    model: str = Field(min_length=1, description="Name of the model at this address.")
    api_key_env: str | None = Field(
        None, description="Environment variable that holds the key; null: no key is sent."
    )
    rows: Int = Field(100, ge=1, description="Test rows with replies that are compared, at most.")
    both_orders: Literal[True] = Field(
        True, description="Each pair is asked in both orders; cannot be switched off."
    )
    prompt: str | None = Field(
        None,
        description="File with a prompt of your own: `{{reply_a}}` and `{{reply_b}}`, and if "
        "wanted `{{prompt}}` and `{{reference}}`.",
    )
    max_answer_tokens: Int = Field(1024, ge=1, description="Limit of an answer, in tokens.")
    price: dict[Literal["input", "output"], Float] | None = Field(
        None,
        description="`{input: …, output: …}` per million tokens of requests and answers, for the "
        "estimate of costs.",
    )
    max_concurrent: Int = Field(4, ge=1, le=64, description="Requests at the same time.")

    @field_validator("url")
    @classmethod
    def _is_address(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an address such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("must have no user, password, query or fragment; see api_key_env")
        return value.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _is_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,60}", value):
            raise ValueError("must be the name of an environment variable, not a key")
        return value

    @field_validator("price")
    @classmethod
    def _is_price(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is not None and (len(value) < 2 or min(value.values()) < 0):
            raise ValueError("needs input and output, neither below 0")
        return value
