"""OpenAI-compatible API: models, chat completions and completions, streamed or not."""

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
    BadRequestError,
    ChatBody,
    CompletionBody,
    TextBody,
    UnknownModelError,
    check_text,
    parse_turn,
    read_body,
)


def make_app(engine: Engine) -> FastAPI:
    """Create the API application. Request text is never evaluated as a template."""
    app = FastAPI(title="slm-lora", docs_url=None, redoc_url=None, openapi_url=None)
    variants = engine.variants
    raw_tokenizer = RowTokenizer(variants.tokenizer, Template("plain"))
    created = int(time.time())
    _handle_errors(app)

    def check_model(name: str) -> str:
        if name not in variants.names:
            raise UnknownModelError(name)
        return name

    def check_ids(ids: list[int]) -> None:
        if unknown := [token for token in ids if token >= len(variants.tokenizer)]:
            raise BadRequestError("stop_token_ids", f"{unknown[0]}: not a token id of this model")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_entry(name, created) for name in variants.names]}

    @app.get("/v1/models/{name}")
    async def model_info(name: str) -> dict[str, Any]:
        return _model_entry(check_model(name), created)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, ChatBody)
        turns = [parse_turn(message, f"messages.{i}") for i, message in enumerate(body.messages)]
        check_ids(body.stop_token_ids)
        ids = variants.row_tokenizers[check_model(body.model)].prompt(turns)
        sampling = body.sampling(engine.max_tokens, body.max_completion_tokens or body.max_tokens)
        generation = engine.submit(body.model, ids, sampling)
        return await _respond(generation, body, request, _ChatFormat())

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await read_body(request, TextBody)
        check_text(body.prompt, "prompt")
        check_ids(body.stop_token_ids)
        ids = raw_tokenizer.prompt([Turn("user", body.prompt)])
        sampling = body.sampling(engine.max_tokens, body.max_tokens)
        generation = engine.submit(check_model(body.model), ids, sampling)
        return await _respond(generation, body, request, _TextFormat())

    return app


def _model_entry(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "slm-lora"}


class _ChatFormat:
    """Response format of chat completions."""

    id_prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, text: str, finish_reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": 0, "message": message, "finish_reason": finish_reason}

    def piece(self, text: str | None, finish_reason: str | None) -> dict[str, Any]:
        delta = {} if text is None else {"content": text}
        return {"index": 0, "delta": delta, "finish_reason": finish_reason}

    def first(self) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": 0, "delta": delta, "finish_reason": None}


class _TextFormat:
    """Response format of text completions."""

    id_prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def choice(self, text: str, finish_reason: str) -> dict[str, Any]:
        return {"index": 0, "text": text, "finish_reason": finish_reason, "logprobs": None}

    def piece(self, text: str | None, finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text or "", "finish_reason": finish_reason, "logprobs": None}

    def first(self) -> dict[str, Any] | None:
        return None


_Format = _ChatFormat | _TextFormat


async def _respond(
    generation: GenerationRequest, body: CompletionBody, request: Request, fmt: _Format
) -> Response:
    header = {
        "id": f"{fmt.id_prefix}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": body.model,
    }
    if body.stream:
        options = body.stream_options
        include_usage = options is not None and bool(options.include_usage)
        events = _stream(generation, fmt, header, include_usage)
        return StreamingResponse(events, media_type="text/event-stream")
    text = await _collect(generation, request)
    return JSONResponse(
        {
            **header,
            "object": fmt.object_name,
            "choices": [fmt.choice(text, generation.finished)],
            "usage": _usage(generation),
        }
    )


async def _collect(generation: GenerationRequest, request: Request) -> str:
    """Collect the whole text; cancel the computation if the client disconnects."""

    async def collect() -> str:
        return "".join([piece async for piece in generation.pieces()])

    async def wait_for_disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    collected = asyncio.create_task(collect())
    disconnected = asyncio.create_task(wait_for_disconnect())
    try:
        await asyncio.wait({collected, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not collected.done():
            generation.cancel()
            raise HTTPException(499, "client disconnected")
        return collected.result()
    finally:
        collected.cancel()
        disconnected.cancel()


async def _stream(
    generation: GenerationRequest, fmt: _Format, header: dict[str, Any], include_usage: bool
) -> AsyncIterator[str]:
    def event(choice: dict[str, Any] | None, **fields: Any) -> str:
        choices = [] if choice is None else [choice]
        payload = {**header, "object": fmt.chunk_name, "choices": choices, **fields}
        return f"data: {json.dumps(payload)}\n\n"

    if first := fmt.first():
        yield event(first)
    try:
        async for piece in generation.pieces():
            yield event(fmt.piece(piece, None))
    except SlmLoraError as error:  # the HTTP status is already sent
        yield f"data: {json.dumps(error_body(str(error), 'invalid_request_error', None))}\n\n"
        return
    yield event(fmt.piece(None, generation.finished or "stop"))
    if include_usage:
        yield event(None, usage=_usage(generation))
    yield "data: [DONE]\n\n"


def _usage(generation: GenerationRequest) -> dict[str, int]:
    return {
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": generation.reply_tokens,
        "total_tokens": generation.prompt_tokens + generation.reply_tokens,
    }


def _handle_errors(app: FastAPI) -> None:
    """Return every error in the format of OpenAI's API."""

    def respond(status: int, message: str, code: str | None, param: str | None = None) -> Response:
        types = {429: "rate_limit_error", 500: "server_error"}
        type_ = types.get(status, "invalid_request_error")
        headers = {"Retry-After": "2"} if status == 429 else None
        return JSONResponse(error_body(message, type_, code, param), status, headers=headers)

    def handler(
        type_: type[Exception],
    ) -> Callable[[Callable[[Any], Response]], None]:
        def register(make_response: Callable[[Any], Response]) -> None:
            async def handle(_: Request, error: Exception) -> Response:
                return make_response(error)

            app.add_exception_handler(type_, handle)

        return register

    @handler(BadRequestError)
    def _(error: BadRequestError) -> Response:
        return respond(400, str(error), "invalid_value", error.field)

    @handler(UnknownModelError)
    def _(error: UnknownModelError) -> Response:
        message = f"model {str(error)[:100]!r}: not served here; see /v1/models"
        return respond(404, message, "model_not_found", "model")

    @handler(BusyError)
    def _(error: BusyError) -> Response:
        return respond(429, str(error), "queue_full")

    @handler(SlmLoraError)
    def _(error: SlmLoraError) -> Response:
        return respond(400, str(error), "invalid_value")

    @handler(HTTPException)
    def _(error: HTTPException) -> Response:
        return respond(error.status_code, str(error.detail), None)
