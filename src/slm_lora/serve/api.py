"""An OpenAI-style API: models, chat completions and completions, streaming or whole."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from slm_lora.data.templates import Template
from slm_lora.data.tokenization import RowTokenizer
from slm_lora.errors import SlmLoraError
from slm_lora.records import Turn
from slm_lora.serve.engine import BusyError, Engine, GenerationRequest
from slm_lora.serve.guard import error_body
from slm_lora.serve.requests import (
    Asked,
    BadRequestError,
    ChatAsked,
    NoSuchModelError,
    TextAsked,
    checked_text,
    read_request,
    turn_of,
)


def make_app(engine: Engine) -> FastAPI:
    """The API over an engine; nothing of a request is ever run as a template."""
    app = FastAPI(title="slm-lora", docs_url=None, redoc_url=None, openapi_url=None)
    variants = engine.variants
    raw = RowTokenizer(variants.tokenizer, Template("plain"))
    started = int(time.time())
    _explain_errors(app)

    def model(name: str) -> str:
        if name not in variants.names:
            raise NoSuchModelError(name)
        return name

    def check_ids(ids: list[int]) -> None:
        if beyond := [each for each in ids if each >= len(variants.tokenizer)]:
            raise BadRequestError("stop_token_ids", f"{beyond[0]} is no token of this model")

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
        asked = await read_request(request, ChatAsked)
        turns = [turn_of(each, f"messages.{n}") for n, each in enumerate(asked.messages)]
        check_ids(asked.stop_token_ids)
        ids = variants.row_tokenizers[model(asked.model)].prompt(turns)
        sampling = asked.sampling(
            engine.most_tokens, asked.max_completion_tokens or asked.max_tokens
        )
        return await _answered(engine.submit(asked.model, ids, sampling), asked, request, _Chat())

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = await read_request(request, TextAsked)
        checked_text(asked.prompt, "prompt")
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
    generation: GenerationRequest, asked: Asked, request: Request, form: _Chat | _Text
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

    @handler(BadRequestError)
    def _(error: BadRequestError) -> Response:
        return answer(400, str(error), "invalid_value", error.field)

    @handler(NoSuchModelError)
    def _(error: NoSuchModelError) -> Response:
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
