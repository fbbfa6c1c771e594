"""An OpenAI-style API: models, chat completions and completions, streaming or whole."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
)
from starlette.exceptions import HTTPException

from slm_lora.data.templates import Template
from slm_lora.data.text import RowError, checked
from slm_lora.data.tokenization import RowTokenizer
from slm_lora.errors import SlmLoraError
from slm_lora.evaluation.generation import Sampling
from slm_lora.records import Role, Turn
from slm_lora.serve.engine import BusyError, Engine, GenerationRequest
from slm_lora.serve.fields import unsupported, unsupported_in_message
from slm_lora.serve.guard import error_body

DEFAULT_TOKENS = 256
"""Longest reply where a request does not say."""

_Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class _StreamOptions(BaseModel):
    include_usage: bool | None = None


class _Asked(BaseModel):
    """What both kinds of completion take, with vLLM's meaning where OpenAI's has none. Null is
    unset (`_read`); what would change the answer and is not done here is refused (`fields`), and
    fields that are not known are ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str
    stream: bool = False
    stream_options: _StreamOptions | None = None
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
        # Clamped, not refused: clients ask for more than they want.
        longest = min(asked or DEFAULT_TOKENS, most_tokens)
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.min_tokens > longest:
            raise _BadRequest(
                "min_tokens", f"{self.min_tokens} are more than the {longest} of max_tokens"
            )
        return Sampling(
            max_new_tokens=longest,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            repetition_penalty=self.repetition_penalty,
            seed=secrets.randbits(62) if self.seed is None else self.seed % 2**63,
            stop=tuple(_text(stop, "stop") for stop in stops),
            min_p=self.min_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=tuple(self.stop_token_ids),
        )


class _ChatAsked(_Asked):
    messages: list[Any] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1)


class _TextAsked(_Asked):
    prompt: str

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: object) -> object:
        return value[0] if isinstance(value, list) and len(value) == 1 else value


class _NoSuchModel(Exception):
    pass


class _BadRequest(Exception):
    """A request that is not answered: which field of it, and why."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field = field


_Kind = TypeVar("_Kind", bound=_Asked)


async def _read(request: Request, kind: type[_Kind]) -> _Kind:
    """A request's body, checked.

    Raises:
        _BadRequest: something in it is wrong, or not done here.
    """
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise _BadRequest("body", f"not JSON ({error})") from None
    if not isinstance(body, dict):
        raise _BadRequest("body", "must be a JSON object")
    for key, value in body.items():
        if not _is_text([key, value]):
            field = key if _is_text(key) else "body"
            raise _BadRequest(field, "holds half a character (a lone surrogate), which is no text")
    if found := unsupported(body):
        raise _BadRequest(found[0], f"not supported: {found[1]}; leave it out")
    try:
        return kind.model_validate({k: v for k, v in body.items() if v is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # Behind a field of several types pydantic names the type that it tried.
        place = [str(part) for part in first["loc"] if not str(part).startswith(("list[", "cons"))]
        raise _BadRequest(".".join(place), first["msg"]) from None


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


def _turn(message: Any, place: str) -> Turn:
    """A message as a turn.

    Raises:
        _BadRequest: it is none, or holds more than text.
    """
    if not isinstance(message, dict):
        raise _BadRequest(place, "must be an object with role and content")
    if found := unsupported_in_message(message):
        raise _BadRequest(f"{place}.{found[0]}", f"not supported: {found[1]}")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise _BadRequest(f"{place}.role", f"{role!r:.40}: must be one of {', '.join(_ROLES)}")
    return Turn(_ROLES[role], _content(message.get("content"), f"{place}.content"))


def _content(content: Any, place: str) -> str:
    """Text, or a list of parts of it, which are joined."""
    if isinstance(content, str):
        return _text(content, place)
    if not isinstance(content, list) or not content:
        raise _BadRequest(place, "must be text, or a list of parts of type text")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise _BadRequest(f"{place}.{number}", f"type {kind!r:.40}: only text is read")
        texts.append(_text(text, place))
    return "".join(texts)


def _text(value: str, place: str) -> str:
    """As rows and prompt files are checked."""
    try:
        return checked(value, "text")
    except RowError as error:
        raise _BadRequest(place, str(error)) from None


def make_app(engine: Engine) -> FastAPI:
    """The API over an engine; nothing of a request is ever run as a template."""
    app = FastAPI(title="slm-lora", docs_url=None, redoc_url=None, openapi_url=None)
    variants = engine.variants
    raw = RowTokenizer(variants.tokenizer, Template("plain"))
    started = int(time.time())
    _explain_errors(app)

    def model(name: str) -> str:
        if name not in variants.names:
            raise _NoSuchModel(name)
        return name

    def check_ids(ids: list[int]) -> None:
        if beyond := [each for each in ids if each >= len(variants.tokenizer)]:
            raise _BadRequest("stop_token_ids", f"{beyond[0]} is no token of this model")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name, started) for name in variants.names]}

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        return _model(model(name), started)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        asked = await _read(request, _ChatAsked)
        turns = [_turn(each, f"messages.{n}") for n, each in enumerate(asked.messages)]
        check_ids(asked.stop_token_ids)
        ids = variants.prompters[model(asked.model)].prompt(turns)
        sampling = asked.sampling(
            engine.most_tokens, asked.max_completion_tokens or asked.max_tokens
        )
        return await _answered(engine.submit(asked.model, ids, sampling), asked, request, _Chat())

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = await _read(request, _TextAsked)
        _text(asked.prompt, "prompt")
        check_ids(asked.stop_token_ids)
        ids = raw.prompt([Turn("user", asked.prompt)])
        sampling = asked.sampling(engine.most_tokens, asked.max_tokens)
        generation = engine.submit(model(asked.model), ids, sampling)
        return await _answered(generation, asked, request, _Text())

    return app


def _model(name: str, started: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": started, "owned_by": "slm-lora"}


class _Chat:
    """How chat completions are written."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, text: str, finished: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": 0, "message": message, "finish_reason": finished}

    def piece(self, text: str | None, finished: str | None) -> dict[str, Any]:
        delta = {} if text is None else {"content": text}
        return {"index": 0, "delta": delta, "finish_reason": finished}

    def first(self) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": 0, "delta": delta, "finish_reason": None}


class _Text:
    """How completions are written."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def choice(self, text: str, finished: str) -> dict[str, Any]:
        return {"index": 0, "text": text, "finish_reason": finished, "logprobs": None}

    def piece(self, text: str | None, finished: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text or "", "finish_reason": finished, "logprobs": None}

    def first(self) -> dict[str, Any] | None:
        return None


async def _answered(
    generation: GenerationRequest, asked: _Asked, request: Request, form: _Chat | _Text
) -> Response:
    about = {
        "id": f"{form.prefix}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": asked.model,
    }
    if asked.stream:
        options = asked.stream_options
        usage = options is not None and bool(options.include_usage)
        events = _events(generation, form, about, usage)
        return StreamingResponse(events, media_type="text/event-stream")
    text = await _whole(generation, request)
    return JSONResponse(
        {
            **about,
            "object": form.whole,
            "choices": [form.choice(text, generation.finished)],
            "usage": _usage(generation),
        }
    )


async def _whole(generation: GenerationRequest, request: Request) -> str:
    """The whole text; computing stops if the client goes away."""

    async def collect() -> str:
        return "".join([piece async for piece in generation.pieces()])

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    text, left = asyncio.create_task(collect()), asyncio.create_task(gone())
    try:
        await asyncio.wait({text, left}, return_when=asyncio.FIRST_COMPLETED)
        if not text.done():
            generation.cancel()
            raise HTTPException(499, "the client went away")
        return text.result()
    finally:
        text.cancel()
        left.cancel()


async def _events(
    generation: GenerationRequest, form: _Chat | _Text, about: dict[str, Any], usage: bool
) -> AsyncIterator[str]:
    def event(choice: dict[str, Any] | None, **more: Any) -> str:
        choices = [] if choice is None else [choice]
        return f"data: {json.dumps({**about, 'object': form.part, 'choices': choices, **more})}\n\n"

    if first := form.first():
        yield event(first)
    try:
        async for piece in generation.pieces():
            yield event(form.piece(piece, None))
    except SlmLoraError as error:  # the status is sent already
        yield f"data: {json.dumps(error_body(str(error), 'invalid_request_error', None))}\n\n"
        return
    yield event(form.piece(None, generation.finished or "stop"))
    if usage:
        yield event(None, usage=_usage(generation))
    yield "data: [DONE]\n\n"


def _usage(generation: GenerationRequest) -> dict[str, int]:
    return {
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": generation.reply_tokens,
        "total_tokens": generation.prompt_tokens + generation.reply_tokens,
    }


def _explain_errors(app: FastAPI) -> None:
    """Every error as a body that OpenAI's clients read."""

    def answer(status: int, message: str, code: str | None, param: str | None = None) -> Response:
        kinds = {429: "rate_limit_error", 500: "server_error"}
        kind = kinds.get(status, "invalid_request_error")
        more = {"Retry-After": "2"} if status == 429 else None
        return JSONResponse(error_body(message, kind, code, param), status, headers=more)

    def handler(
        kind: type[Exception],
    ) -> Callable[[Callable[[Any], Response]], None]:
        def register(explain: Callable[[Any], Response]) -> None:
            async def handle(_: Request, error: Exception) -> Response:
                return explain(error)

            app.add_exception_handler(kind, handle)

        return register

    @handler(_BadRequest)
    def _(error: _BadRequest) -> Response:
        return answer(400, str(error), "invalid_value", error.field)

    @handler(_NoSuchModel)
    def _(error: _NoSuchModel) -> Response:
        return answer(
            404, f"no model {str(error)[:100]!r}; see /v1/models", "model_not_found", "model"
        )

    @handler(BusyError)
    def _(error: BusyError) -> Response:
        return answer(429, str(error), "queue_full")

    @handler(SlmLoraError)
    def _(error: SlmLoraError) -> Response:
        return answer(400, str(error), "invalid_value")

    @handler(HTTPException)
    def _(error: HTTPException) -> Response:
        return answer(error.status_code, str(error.detail), None)
