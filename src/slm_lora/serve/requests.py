"""Request bodies of the API: parsing and validation; unsupported fields are rejected by name."""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, TypeVar

from fastapi import Request
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
)

from slm_lora.data.text import RowError, require_text
from slm_lora.evaluation.generation import Sampling
from slm_lora.records import Role, Turn
from slm_lora.serve.fields import unsupported, unsupported_in_message

DEFAULT_TOKENS = 256
"""Token limit of requests without ``max_tokens``."""

_Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class StreamOptions(BaseModel):
    """``stream_options`` of OpenAI's API."""

    include_usage: bool | None = None


class CompletionBody(BaseModel):
    """Fields common to chat and text completions, with vLLM's semantics where OpenAI has no such
    field. Null means unset (`read_body`); unsupported fields that would change the reply are
    rejected (module `fields`), unknown ones ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] = []
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field([], max_length=1000)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    max_tokens: int | None = Field(None, ge=1)

    def sampling(self, limit: int, requested: int | None) -> Sampling:
        """Sampling parameters; ``requested`` tokens are clamped to ``limit``."""
        # Clamped, not rejected: many clients send a limit larger than they need.
        max_tokens = min(requested or DEFAULT_TOKENS, limit)
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.min_tokens > max_tokens:
            raise BadRequestError(
                "min_tokens", f"{self.min_tokens} exceeds max_tokens = {max_tokens}"
            )
        return Sampling(
            max_new_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            repetition_penalty=self.repetition_penalty,
            seed=secrets.randbits(62) if self.seed is None else self.seed % 2**63,
            stop=tuple(check_text(stop, "stop") for stop in stops),
            min_p=self.min_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=tuple(self.stop_token_ids),
        )


class ChatBody(CompletionBody):
    """Body of a chat completion."""

    messages: list[Any] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1)


class TextBody(CompletionBody):
    """Body of a text completion."""

    prompt: str

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: object) -> object:
        return value[0] if isinstance(value, list) and len(value) == 1 else value


class UnknownModelError(Exception):
    """No model of this name is served."""


class BadRequestError(Exception):
    """An invalid request: the field and the reason."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field


_Body = TypeVar("_Body", bound=CompletionBody)


async def read_body(request: Request, model: type[_Body]) -> _Body:
    """Parse and validate a request body.

    Raises:
        BadRequestError: a field is invalid or unsupported.
    """
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise BadRequestError("body", f"not JSON ({error})") from None
    if not isinstance(body, dict):
        raise BadRequestError("body", "must be a JSON object")
    for key, value in body.items():
        if not _is_text([key, value]):
            field = key if _is_text(key) else "body"
            raise BadRequestError(field, "has a lone surrogate, which is not valid Unicode text")
    if refusal := unsupported(body):
        raise BadRequestError(refusal[0], f"not supported: {refusal[1]}; remove the field")
    try:
        return model.model_validate(
            {key: value for key, value in body.items() if value is not None}
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # For a field of several types pydantic appends the type that it tried.
        path = [str(part) for part in first["loc"] if not str(part).startswith(("list[", "cons"))]
        raise BadRequestError(".".join(path), first["msg"]) from None


def _is_text(value: Any) -> bool:
    """Whether UTF-8 can encode every string in a JSON value."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError:
                return False
        elif isinstance(item, dict):
            stack += [*item, *item.values()]
        elif isinstance(item, list):
            stack += item
    return True


_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name
    "user": "user",
    "assistant": "assistant",
}


def parse_turn(message: Any, path: str) -> Turn:
    """Parse a message.

    Raises:
        BadRequestError: not a message, or it has content other than text.
    """
    if not isinstance(message, dict):
        raise BadRequestError(path, "must be an object with role and content")
    if refusal := unsupported_in_message(message):
        raise BadRequestError(f"{path}.{refusal[0]}", f"not supported: {refusal[1]}")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRequestError(f"{path}.role", f"{role!r:.40}: must be one of {', '.join(_ROLES)}")
    return Turn(_ROLES[role], _content(message.get("content"), f"{path}.content"))


def _content(content: Any, path: str) -> str:
    """Text, or a list of text parts, which are concatenated."""
    if isinstance(content, str):
        return check_text(content, path)
    if not isinstance(content, list) or not content:
        raise BadRequestError(path, "must be text or a list of text parts")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise BadRequestError(f"{path}.{number}", f"type {kind!r:.40}: only text is supported")
        texts.append(check_text(text, path))
    return "".join(texts)


def check_text(value: str, path: str) -> str:
    """Apply the checks of data rows and prompt files to a field.

    Raises:
        BadRequestError: the text is invalid.
    """
    try:
        return require_text(value, "text")
    except RowError as error:
        raise BadRequestError(path, str(error)) from None
