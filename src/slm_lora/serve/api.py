"""An OpenAI-style API: models, chat completions and completions, streaming or whole."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)
from starlette.exceptions import HTTPException

from slm_lora.data.messages import turns_of
from slm_lora.data.templates import Template
from slm_lora.data.text import RowError, checked
from slm_lora.data.tokens import RowTokenizer
from slm_lora.errors import SlmLoraError
from slm_lora.evaluation.generate import Sampling
from slm_lora.records import Role, Turn
from slm_lora.serve.engine import BusyError, Engine, Ticket
from slm_lora.serve.guard import error_body

DEFAULT_TOKENS = 256
"""Longest reply where a request does not say."""


def _read(value: str) -> str:
    try:
        return checked(value, "text")
    except RowError as error:
        raise ValueError(str(error)) from None


_Words = Annotated[str, AfterValidator(_read)]
_Stop = Annotated[_Words, StringConstraints(min_length=1, max_length=200)]


class _Message(BaseModel):
    """Read as the messages of rows are; other keys are kept, to be refused if they matter."""

    model_config = ConfigDict(extra="allow")

    role: Role
    content: str | list[Any]

    @model_validator(mode="after")
    def _is_a_turn(self) -> _Message:
        try:
            self.turn()
        except RowError as error:
            raise ValueError(str(error)) from None
        return self

    def turn(self) -> Turn:
        return turns_of([self.model_dump()], "messages", learnt=False)[0]


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Asked(BaseModel):
    """What both kinds of completion take. Fields that only describe the client are ignored; ones
    that would change the answer and are not known here are refused."""

    model_config = ConfigDict(extra="ignore")

    model: str
    stream: bool = False
    stream_options: _StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=8)] | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: Literal[1] = 1
    logprobs: Literal[False, None] = None
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    logit_bias: Literal[None] = None

    def sampling(self, most_tokens: int, asked: int | None) -> Sampling:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            # Clamped, not refused: clients ask for more than they want.
            max_new_tokens=min(asked or DEFAULT_TOKENS, most_tokens),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            seed=secrets.randbits(62) if self.seed is None else self.seed % 2**63,
            stop=stop,
        )


class _ChatAsked(_Asked):
    messages: list[_Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: Annotated[list[Any], Field(max_length=0)] | None = None


class _TextAsked(_Asked):
    prompt: _Words
    echo: Literal[False] = False
    suffix: Literal[None] = None


class _NoSuchModel(Exception):
    pass


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
    async def chat_completions(asked: _ChatAsked, request: Request) -> Response:
        ids = variants.prompters[model(asked.model)].prompt([m.turn() for m in asked.messages])
        sampling = asked.sampling(
            engine.most_tokens, asked.max_completion_tokens or asked.max_tokens
        )
        return await _answered(engine.submit(asked.model, ids, sampling), asked, request, _Chat())

    @app.post("/v1/completions")
    async def completions(asked: _TextAsked, request: Request) -> Response:
        ids = raw.prompt([Turn("user", asked.prompt)])
        sampling = asked.sampling(engine.most_tokens, asked.max_tokens)
        ticket = engine.submit(model(asked.model), ids, sampling)
        return await _answered(ticket, asked, request, _Text())

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
    ticket: Ticket, asked: _Asked, request: Request, form: _Chat | _Text
) -> Response:
    about = {
        "id": f"{form.prefix}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": asked.model,
    }
    if asked.stream:
        usage = bool(asked.stream_options and asked.stream_options.include_usage)
        events = _events(ticket, form, about, usage)
        return StreamingResponse(events, media_type="text/event-stream")
    text = await _whole(ticket, request)
    return JSONResponse(
        {
            **about,
            "object": form.whole,
            "choices": [form.choice(text, ticket.finished)],
            "usage": _usage(ticket),
        }
    )


async def _whole(ticket: Ticket, request: Request) -> str:
    """The whole text; computing stops if the client goes away."""

    async def collect() -> str:
        return "".join([piece async for piece in ticket.pieces()])

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    text, left = asyncio.create_task(collect()), asyncio.create_task(gone())
    try:
        await asyncio.wait({text, left}, return_when=asyncio.FIRST_COMPLETED)
        if not text.done():
            ticket.cancel()
            raise HTTPException(499, "the client went away")
        return text.result()
    finally:
        text.cancel()
        left.cancel()


async def _events(
    ticket: Ticket, form: _Chat | _Text, about: dict[str, Any], usage: bool
) -> AsyncIterator[str]:
    def event(choice: dict[str, Any] | None, **more: Any) -> str:
        choices = [] if choice is None else [choice]
        return f"data: {json.dumps({**about, 'object': form.part, 'choices': choices, **more})}\n\n"

    if first := form.first():
        yield event(first)
    try:
        async for piece in ticket.pieces():
            yield event(form.piece(piece, None))
    except SlmLoraError as error:  # the status is sent already
        yield f"data: {json.dumps(error_body(str(error), 'invalid_request_error', None))}\n\n"
        return
    yield event(form.piece(None, ticket.finished or "stop"))
    if usage:
        yield event(None, usage=_usage(ticket))
    yield "data: [DONE]\n\n"


def _usage(ticket: Ticket) -> dict[str, int]:
    return {
        "prompt_tokens": ticket.prompt_tokens,
        "completion_tokens": ticket.reply_tokens,
        "total_tokens": ticket.prompt_tokens + ticket.reply_tokens,
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

    @handler(RequestValidationError)
    def _(error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][1:])) or "body"
        return answer(400, f"{where}: {first['msg']}", "invalid_value", where)

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
