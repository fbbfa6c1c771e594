"""The Gradio page: the base and one or two adapters answer the same question side by side.

It sends no analytics and loads no fonts or scripts from other hosts.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI

from slm_lora.adapters.multi import BASE
from slm_lora.data.prompts import Prompt
from slm_lora.data.text import prompt_text
from slm_lora.errors import SlmLoraError
from slm_lora.evaluation.generation import Sampling, prompt_ids
from slm_lora.records import Turn
from slm_lora.serve.engine import Engine, GenerationRequest

NO_ADAPTER = "–"
"""Choice of the dropdown without an adapter."""

GENERAL_QUESTIONS = (
    "What is the difference between weather and climate?",
    "Explain in two sentences how a bicycle stays upright.",
    "Give three uses for an old newspaper.",
    "Write a short note to a neighbour whose parcel you have taken in.",
    "Which steps does it take to plant a tree?",
    "Put into one sentence: the room was taken, so the meeting moved from Monday to Thursday.",
)
"""Examples if the data set of the adapter is unknown or not on this machine."""

_CSS = """
.answer { min-height: 12rem; overflow-wrap: anywhere; }
.answer textarea { font-size: 1rem; line-height: 1.5; }
footer { display: none !important; }
"""


def mount_page(
    app: FastAPI,
    engine: Engine,
    examples: Sequence[Prompt] = (),
    default_adapter: str | None = None,
) -> FastAPI:
    """Mount the page at the root of the API application.

    Args:
        app: from `api.make_app`.
        engine: computes the answers.
        examples: example questions; their references fill the field for the reference. If empty,
            `GENERAL_QUESTIONS`.
        default_adapter: the adapter selected at first; None: the last.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    fonts = ["system-ui", "sans-serif"]
    theme = gradio.themes.Base(font=fonts, font_mono=["ui-monospace", "monospace"])
    mounted: FastAPI = gradio.mount_gradio_app(
        app,
        _page(gradio, engine, examples, default_adapter),
        path="",
        theme=theme,
        css=_CSS,
        footer_links=[],
        show_error=True,
        ssr_mode=False,
        pwa=False,
        max_file_size=1,
        enable_monitoring=False,
    )
    return mounted


def _page(
    gradio: Any, engine: Engine, examples: Sequence[Prompt], default_adapter: str | None
) -> Any:
    variants = engine.variants
    # The page has no field for earlier turns, so conversations cannot be examples.
    prompts = [prompt for prompt in examples if len(prompt.turns) == 1] or [
        Prompt((Turn("user", text),)) for text in GENERAL_QUESTIONS
    ]
    has_context = any(
        tokenizer.template.include_context for tokenizer in variants.row_tokenizers.values()
    )
    adapters = [name for name in variants.names if name != BASE]
    selected = default_adapter if default_adapter in adapters else (adapters or [NO_ADAPTER])[-1]
    title = f"{variants.base.source.name} and its adapters"
    with gradio.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        gradio.Markdown(
            f"## {title}\nAll, the base included, are prompted with the training template of the "
            "first adapter, so that answers differ by the adapter only."
        )
        with gradio.Row():
            first_adapter = gradio.Dropdown(
                adapters or [NO_ADAPTER],
                value=selected,
                label="Adapter",
            )
            second_adapter = gradio.Dropdown(
                [NO_ADAPTER, *adapters], value=NO_ADAPTER, label="Second adapter"
            )
        # With one line Enter submits; the box grows.
        hint = "(Enter asks, Shift+Enter: new line)"
        question = gradio.Textbox(
            label="Question",
            placeholder=f"{prompts[0].turns[-1].content[:200]}  {hint}",
            lines=1,
            max_lines=12,
            autofocus=True,
        )
        context = gradio.Textbox(
            label="Context (optional)", lines=1, max_lines=12, visible=has_context
        )
        with gradio.Row():
            send = gradio.Button("Ask", variant="primary")
            stop = gradio.Button("Stop", visible=False)
        with gradio.Row(equal_height=True):
            answers = [
                gradio.Textbox(
                    label=name, lines=8, interactive=False, elem_classes="answer", elem_id=elem_id
                )
                for name, elem_id in ((BASE, "base"), ("adapter", "first"), ("second", "second"))
            ]
        answers[2].visible = False
        with gradio.Accordion("Sampling and reference", open=False):
            with gradio.Row():
                temperature = gradio.Slider(0, 2, 0, step=0.05, label="Temperature (0: greedy)")
                top_p = gradio.Slider(0.05, 1, 1, step=0.05, label="Top p")
                max_tokens = gradio.Slider(
                    8, engine.max_tokens, min(160, engine.max_tokens), step=8, label="Max tokens"
                )
                seed = gradio.Number(0, precision=0, minimum=0, label="Seed")
            reference = gradio.Textbox(
                label="Reference answer (optional); its loss is shown in nats per token", lines=2
            )
        inputs = [question, *([context] if has_context else []), reference]
        gradio.Examples(
            [
                [
                    prompt.turns[-1].content,
                    *([prompt.context] if has_context else []),
                    prompt.reference,
                ]
                for prompt in prompts
            ],
            # Otherwise the columns of context and reference would be empty.
            inputs if any(prompt.reference or prompt.context for prompt in prompts) else [question],
            cache_examples=False,
            examples_per_page=6,
        )
        settings = [temperature, top_p, max_tokens, seed, reference]

        def hide_stop() -> Any:
            return gradio.update(visible=False)

        # Not `cancels`: a cancelled event may still send an update that shows the button again, and
        # what follows it is not called. So the replies are ended, and with them the event.
        replies = gradio.State(_Replies())
        gradio.on(
            [send.click, question.submit],
            _ask_handler(gradio, engine),
            [replies, question, context, first_adapter, second_adapter, *settings],
            [*answers, stop],
            concurrency_limit=8,
            api_name=False,
            trigger_mode="once",
        ).then(hide_stop, None, stop, api_name=False)
        stop.click(_Replies.stop, replies, None, queue=False, api_name=False)
    return page


class _Replies:
    """The replies that one visitor is waiting for."""

    def __init__(self) -> None:
        self.stopped = False
        self.requests: list[GenerationRequest] = []

    def start(self) -> None:
        self.stopped, self.requests = False, []

    def stop(self) -> None:
        self.stopped = True
        for request in self.requests:
            request.cancel()


def _ask_handler(gradio: Any, engine: Engine) -> Any:
    async def ask(
        replies: _Replies,
        question: str,
        context: str | None,
        first_adapter: str,
        second_adapter: str,
        temperature: float,
        top_p: float,
        max_tokens: int,
        seed: int | None,
        reference: str | None,
    ) -> AsyncIterator[list[Any]]:
        chosen = dict.fromkeys((BASE, first_adapter, second_adapter))
        names = [name for name in chosen if name in engine.variants.names]
        if not question.strip():
            gradio.Info("Write a question first.")
            # Keep the previous answers.
            yield [gradio.skip()] * 4
            return
        template_variant = names[1] if len(names) > 1 else BASE
        try:
            prompt = Prompt(
                (Turn("user", prompt_text(question, "question")),),
                prompt_text(context or "", "context"),
                prompt_text(reference or "", "reference").strip(),
            )
        except SlmLoraError as error:
            gradio.Warning(str(error))
            yield [gradio.skip()] * 4
            return
        sampling = Sampling(
            min(int(max_tokens), engine.max_tokens), temperature, top_p, seed=int(seed or 0)
        )
        texts = [""] * len(names)

        def updates(notes: Sequence[str]) -> list[Any]:
            boxes = [
                gradio.update(value=text, label=f"{name}{note}", visible=True)
                for name, text, note in zip(names, texts, notes, strict=True)
            ]
            hidden = gradio.update(value="", visible=False)
            return [*boxes, *[hidden] * (3 - len(boxes)), gradio.update(visible=True)]

        notes = [""] * len(names)
        replies.start()
        try:
            yield updates(notes)
            if prompt.reference:
                losses = [await engine.loss(name, template_variant, prompt) for name in names]
                notes = ["" if loss is None else f" · loss {loss:.3f}" for loss in losses]
                yield updates(notes)
            if replies.stopped:
                return
            ids = prompt_ids(engine.variants, template_variant, prompt)
            replies.requests = [engine.submit(name, ids, sampling) for name in names]
            async for index, piece in _interleave(replies.requests):
                texts[index] += piece
                yield updates(notes)
        except SlmLoraError as error:
            # Keep the question, to be corrected, and the answers so far.
            gradio.Warning(str(error))
            yield updates(notes)

    return ask


async def _interleave(requests: Sequence[GenerationRequest]) -> AsyncIterator[tuple[int, str]]:
    """Yield pieces of several replies with the index of the reply, as they arrive."""
    pieces: asyncio.Queue[tuple[int, str] | SlmLoraError | None] = asyncio.Queue()

    async def forward(index: int, request: GenerationRequest) -> None:
        try:
            async for piece in request.pieces():
                await pieces.put((index, piece))
            await pieces.put(None)
        except SlmLoraError as error:
            await pieces.put(error)

    tasks = [asyncio.create_task(forward(i, request)) for i, request in enumerate(requests)]
    try:
        n_unfinished = len(requests)
        while n_unfinished:
            piece = await pieces.get()
            if isinstance(piece, SlmLoraError):
                raise piece
            if piece is None:
                n_unfinished -= 1
            else:
                yield piece
    finally:
        for task in tasks:
            task.cancel()
        for request in requests:
            request.cancel()
