"""The page: the base beside one or two adapters, all answering one question at the same time.

Gradio, without its analytics and without fonts or scripts from elsewhere.
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

NONE = "–"
"""Chosen in place of a second adapter."""

GENERAL = (
    "What is the difference between weather and climate?",
    "Explain in two sentences how a bicycle stays upright.",
    "Give three uses for an old newspaper.",
    "Write a short note to a neighbour whose parcel you have taken in.",
    "Which steps does it take to plant a tree?",
    "Put into one sentence: the room was taken, so the meeting moved from Monday to Thursday.",
)
"""Examples where the data that an adapter was trained on is not here, or not known."""

_CSS = """
.answer { min-height: 12rem; overflow-wrap: anywhere; }
.answer textarea { font-size: 1rem; line-height: 1.5; }
footer { display: none !important; }
"""


def mount_page(
    app: FastAPI, engine: Engine, examples: Sequence[Prompt] = (), chosen: str | None = None
) -> FastAPI:
    """The API's application with the page at its root.

    Args:
        app: from `api.make_app`.
        engine: computes the answers.
        examples: to try; an answer that comes along goes into the field for references. Where there
            are none: `GENERAL`.
        chosen: the adapter that answers unless another is chosen; None: the last.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    fonts = ["system-ui", "sans-serif"]
    theme = gradio.themes.Base(font=fonts, font_mono=["ui-monospace", "monospace"])
    mounted: FastAPI = gradio.mount_gradio_app(
        app,
        _page(gradio, engine, examples, chosen),
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


def _page(gradio: Any, engine: Engine, examples: Sequence[Prompt], chosen: str | None) -> Any:
    variants = engine.variants
    # The page asks one question; a conversation of the data is no example of one.
    shown = [each for each in examples if len(each.turns) == 1] or [
        Prompt((Turn("user", text),)) for text in GENERAL
    ]
    with_context = any(each.template.include_context for each in variants.row_tokenizers.values())
    adapters = [name for name in variants.names if name != BASE]
    title = f"{variants.base.source.name} and its adapters"
    with gradio.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        gradio.Markdown(
            f"## {title}\nEach is asked in the template that the first adapter was trained with; "
            "the base, too, so that what differs is the adapter alone."
        )
        with gradio.Row():
            first = gradio.Dropdown(
                adapters or [NONE],
                value=chosen if chosen in adapters else (adapters or [NONE])[-1],
                label="Adapter",
            )
            second = gradio.Dropdown([NONE, *adapters], value=NONE, label="Second adapter")
        # Of one line, so that Enter asks; it grows.
        question = gradio.Textbox(
            label="Question",
            placeholder=f"{shown[0].turns[-1].content[:200]}  (Enter asks, Shift+Enter: new line)",
            lines=1,
            max_lines=12,
            autofocus=True,
        )
        context = gradio.Textbox(
            label="Context, where the question has one", lines=1, max_lines=12, visible=with_context
        )
        with gradio.Row():
            send = gradio.Button("Ask", variant="primary")
            halt = gradio.Button("Stop", visible=False)
        with gradio.Row(equal_height=True):
            answers = [
                gradio.Textbox(
                    label=name, lines=8, interactive=False, elem_classes="answer", elem_id=place
                )
                for name, place in ((BASE, "base"), ("adapter", "first"), ("second", "second"))
            ]
        answers[2].visible = False
        with gradio.Accordion("Sampling and reference", open=False):
            with gradio.Row():
                temperature = gradio.Slider(0, 2, 0, step=0.05, label="Temperature (0: greedy)")
                top_p = gradio.Slider(0.05, 1, 1, step=0.05, label="Top p")
                longest = gradio.Slider(
                    8, engine.most_tokens, min(160, engine.most_tokens), step=8, label="Most tokens"
                )
                seed = gradio.Number(0, precision=0, minimum=0, label="Seed")
            reference = gradio.Textbox(
                label="Reference answer: its loss under each is shown, nats a token", lines=2
            )
        fields = [question, *([context] if with_context else []), reference]
        gradio.Examples(
            [
                [each.turns[-1].content, *([each.context] if with_context else []), each.reference]
                for each in shown
            ],
            # Columns without anything in them would stand empty.
            fields if any(each.reference or each.context for each in shown) else [question],
            cache_examples=False,
            examples_per_page=6,
        )
        settings = [temperature, top_p, longest, seed, reference]

        def at_rest() -> Any:
            return gradio.update(visible=False)

        asking = gradio.on(
            [send.click, question.submit],
            _asker(gradio, engine),
            [question, context, first, second, *settings],
            [*answers, halt],
            concurrency_limit=8,
            api_name=False,
            trigger_mode="once",
        )
        asking.then(at_rest, None, halt, api_name=False)
        halt.click(at_rest, None, halt, cancels=[asking], api_name=False)
    return page


def _asker(gradio: Any, engine: Engine) -> Any:
    async def ask(
        question: str,
        context: str | None,
        first: str,
        second: str,
        temperature: float,
        top_p: float,
        longest: int,
        seed: int | None,
        reference: str | None,
    ) -> AsyncIterator[list[Any]]:
        chosen = [BASE, *(n for n in dict.fromkeys((first, second)) if n and n != NONE)]
        names = [name for name in chosen if name in engine.variants.names]
        if not question.strip():
            gradio.Info("Write a question first.")
            # The answers that are there stay.
            yield [gradio.skip()] * 4
            return
        asked_as = names[1] if len(names) > 1 else BASE
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
            min(int(longest), engine.most_tokens), temperature, top_p, seed=int(seed or 0)
        )
        texts = [""] * len(names)

        def shown(notes: Sequence[str]) -> list[Any]:
            boxes = [
                gradio.update(value=text, label=f"{name}{note}", visible=True)
                for name, text, note in zip(names, texts, notes, strict=True)
            ]
            hidden = gradio.update(value="", visible=False)
            return [*boxes, *[hidden] * (3 - len(boxes)), gradio.update(visible=True)]

        notes = [""] * len(names)
        try:
            yield shown(notes)
            if prompt.reference:
                losses = [await engine.loss(name, asked_as, prompt) for name in names]
                notes = ["" if loss is None else f" · loss {loss:.3f}" for loss in losses]
                yield shown(notes)
            ids = prompt_ids(engine.variants, asked_as, prompt)
            tickets = [engine.submit(name, ids, sampling) for name in names]
            async for index, piece in _merged(tickets):
                texts[index] += piece
                yield shown(notes)
        except SlmLoraError as error:
            # What is written stays to be mended, and what was answered to be read.
            gradio.Warning(str(error))
            yield shown(notes)

    return ask


async def _merged(tickets: Sequence[GenerationRequest]) -> AsyncIterator[tuple[int, str]]:
    """Pieces of several replies as they come."""
    pieces: asyncio.Queue[tuple[int, str] | SlmLoraError | None] = asyncio.Queue()

    async def forward(index: int, generation: GenerationRequest) -> None:
        try:
            async for piece in generation.pieces():
                await pieces.put((index, piece))
            await pieces.put(None)
        except SlmLoraError as error:
            await pieces.put(error)

    tasks = [asyncio.create_task(forward(*each)) for each in enumerate(tickets)]
    try:
        left = len(tickets)
        while left:
            piece = await pieces.get()
            if isinstance(piece, SlmLoraError):
                raise piece
            if piece is None:
                left -= 1
            else:
                yield piece
    finally:
        for task in tasks:
            task.cancel()
        for generation in tickets:
            generation.cancel()
