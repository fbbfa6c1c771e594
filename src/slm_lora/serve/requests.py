"""Bodies of API requests: read, checked, unsupported fields refused by name."""

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
"""Longest reply where a request names none."""

_Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class StreamOptions(BaseModel):
    """``stream_options`` of OpenAI's API."""

    include_usage: bool | None = None


class Asked(BaseModel):
    """Fields of both kinds of completion, with vLLM's meaning where OpenAI has none. Null is unset
    (`read_request`); unsupported fields that would change the reply are refused (`fields`), unknown
    ones ignored."""

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

    def sampling(self, most_tokens: int, asked: int | None) -> Sampling:
        """The sampling of a request; ``asked`` tokens are clamped to ``most_tokens``."""
        # Clamped, not refused: clients ask for more than they want.
        longest = min(asked or DEFAULT_TOKENS, most_tokens)
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.min_tokens > longest:
            raise BadRequestError(
                "min_tokens", f"{self.min_tokens} are more than the {longest} of max_tokens"
            )
        return Sampling(
            max_new_tokens=longest,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            repetition_penalty=self.repetition_penalty,
            seed=secrets.randbits(62) if self.seed is None else self.seed % 2**63,
            stop=tuple(checked_text(stop, "stop") for stop in stops),
            min_p=self.min_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=tuple(self.stop_token_ids),
        )


class ChatAsked(Asked):
    """The body of a chat completion."""

    messages: list[Any] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1)


class TextAsked(Asked):
    """The body of a text completion."""

    prompt: str

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: object) -> object:
        return value[0] if isinstance(value, list) and len(value) == 1 else value


class NoSuchModelError(Exception):
    """No model of that name is served."""


class BadRequestError(Exception):
    """A request that is not answered: which field of it, and why."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field = field


_Kind = TypeVar("_Kind", bound=Asked)


async def read_request(request: Request, kind: type[_Kind]) -> _Kind:
    """A request's body, checked.

    Raises:
        BadRequestError: something in it is wrong, or not done here.
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
            raise BadRequestError(
                field, "holds half a character (a lone surrogate), which is no text"
            )
    if found := unsupported(body):
        raise BadRequestError(found[0], f"not supported: {found[1]}; leave it out")
    try:
        return kind.model_validate({k: v for k, v in body.items() if v is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # Behind a field of several types pydantic names the type that it tried.
        place = [str(part) for part in first["loc"] if not str(part).startswith(("list[", "cons"))]
        raise BadRequestError(".".join(place), first["msg"]) from None


def _is_text(value: Any) -> bool:
    """Whether all text in a JSON value is what UTF-8 can hold."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            try:
                each.encode()
            except UnicodeEncodeError:
                return False
        elif isinstance(each, dict):
            waiting += [*each, *each.values()]
        elif isinstance(each, list):
            waiting += each
    return True


_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name
    "user": "user",
    "assistant": "assistant",
}


def turn_of(message: Any, place: str) -> Turn:
    """A message as a turn.

    Raises:
        BadRequestError: it is none, or holds more than text.
    """
    if not isinstance(message, dict):
        raise BadRequestError(place, "must be an object with role and content")
    if found := unsupported_in_message(message):
        raise BadRequestError(f"{place}.{found[0]}", f"not supported: {found[1]}")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRequestError(f"{place}.role", f"{role!r:.40}: must be one of {', '.join(_ROLES)}")
    return Turn(_ROLES[role], _content(message.get("content"), f"{place}.content"))


def _content(content: Any, place: str) -> str:
    """Text, or a list of parts of it, which are joined."""
    if isinstance(content, str):
        return checked_text(content, place)
    if not isinstance(content, list) or not content:
        raise BadRequestError(place, "must be text, or a list of parts of type text")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise BadRequestError(f"{place}.{number}", f"type {kind!r:.40}: only text is read")
        texts.append(checked_text(text, place))
    return "".join(texts)


def checked_text(value: str, place: str) -> str:
    """As rows and prompt files are checked."""
    try:
        return require_text(value, "text")
    except RowError as error:
        raise BadRequestError(place, str(error)) from None
