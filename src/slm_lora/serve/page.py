"""The page: the base beside one or two adapters, all answering one question at the same time.

Gradio, without its analytics and without fonts or scripts from elsewhere.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI

from slm_lora.data.prompts import Prompt
from slm_lora.data.text import given
from slm_lora.errors import SlmLoraError
from slm_lora.evaluation.generate import Sampling, prompt_ids
from slm_lora.model.variants import BASE
from slm_lora.records import Turn
from slm_lora.serve.engine import Engine, Ticket

NONE = "–"
"""Chosen in place of a second adapter."""

_CSS = """
.answer { min-height: 12rem; overflow-wrap: anywhere; }
.answer textarea { font-size: 1rem; line-height: 1.5; }
footer { display: none !important; }
"""


def mount_page(app: FastAPI, engine: Engine, examples: Sequence[Prompt]) -> FastAPI:
    """The API's application with the page at its root.

    Args:
        app: from `api.make_app`.
        engine: computes the answers.
        examples: to try; an answer that comes along goes into the field for references.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    fonts = ["system-ui", "sans-serif"]
    theme = gradio.themes.Base(font=fonts, font_mono=["ui-monospace", "monospace"])
    mounted: FastAPI = gradio.mount_gradio_app(
        app,
        _page(gradio, engine, examples),
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


def _page(gradio: Any, engine: Engine, examples: Sequence[Prompt]) -> Any:
    variants = engine.variants
    adapters = [name for name in variants.names if name != BASE]
    title = f"{variants.base.source.name} and its adapters"
    with gradio.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        gradio.Markdown(
            f"## {title}\nEach is asked in the template that the first adapter was trained with; "
            "the base, too, so that what differs is the adapter alone."
        )
        with gradio.Row():
            first = gradio.Dropdown(
                adapters or [NONE], value=(adapters or [NONE])[-1], label="Adapter"
            )
            second = gradio.Dropdown([NONE, *adapters], value=NONE, label="Second adapter")
        question = gradio.Textbox(label="Question", lines=2, autofocus=True)
        with gradio.Row():
            send = gradio.Button("Ask", variant="primary")
            halt = gradio.Button("Stop")
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
        if examples:
            gradio.Examples(
                [[each.turns[-1].content, each.reference] for each in examples],
                [question, reference],
                cache_examples=False,
                examples_per_page=6,
            )
        settings = [temperature, top_p, longest, seed, reference]
        asking = [
            action(
                _asker(gradio, engine),
                [question, first, second, *settings],
                answers,
                concurrency_limit=8,
                api_name=False,
            )
            for action in (send.click, question.submit)
        ]
        halt.click(None, cancels=asking, api_name=False)
    return page


def _asker(gradio: Any, engine: Engine) -> Any:
    async def ask(
        question: str,
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
            raise gradio.Error("Write a question first.", print_exception=False)
        asked_as = names[1] if len(names) > 1 else BASE
        try:
            wanted = given(reference or "", "reference").strip()
            prompt = Prompt((Turn("user", given(question, "question")),), reference=wanted)
        except SlmLoraError as error:
            raise gradio.Error(str(error), print_exception=False) from error
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
            return [*boxes, *[hidden] * (3 - len(boxes))]

        notes = [""] * len(names)
        try:
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
            raise gradio.Error(str(error), print_exception=False) from error

    return ask


async def _merged(tickets: Sequence[Ticket]) -> AsyncIterator[tuple[int, str]]:
    """Pieces of several replies as they come."""
    pieces: asyncio.Queue[tuple[int, str] | SlmLoraError | None] = asyncio.Queue()

    async def forward(index: int, ticket: Ticket) -> None:
        try:
            async for piece in ticket.pieces():
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
        for ticket in tickets:
            ticket.cancel()
