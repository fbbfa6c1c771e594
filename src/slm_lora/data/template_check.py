"""Check, before training, that the saved chat template gives other programs the training tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slm_lora.data.chat_templates import (
    TEMPLATE_DATE,
    default_template,
    freeze_date,
    has_frozen_date,
)
from slm_lora.data.templates import chat_messages
from slm_lora.data.tokenization import RowTokenizer
from slm_lora.errors import SlmLoraError
from slm_lora.records import Example, Row, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUESTION, _ANSWER = Turn("user", "How far is it?"), Turn("assistant", "Two days, on foot.")
SAMPLES = (
    (_QUESTION, _ANSWER),
    (Turn("system", "Be brief."), _QUESTION, _ANSWER),
    (_QUESTION, _ANSWER, Turn("user", "And by river?"), Turn("assistant", "One.")),
)
_MAX_ROWS, _MAX_CHARACTERS = 8, 4000
"""Number of compared rows and their maximum length in characters, to bound the time."""


def template_notes(
    tokenizer: PreTrainedTokenizerBase, tokenize: RowTokenizer, rows: Sequence[Row]
) -> tuple[str, ...]:
    """Check the chat template that is saved with adapters, and return notes, one line each.

    If transformers makes other tokens with it, ``tokenize.chat_template`` is set to None: no
    template is saved.

    Args:
        tokenizer: the base model's tokenizer.
        tokenize: the tokenizer of the training.
        rows: training rows, of which some are compared besides sample conversations.
    """
    source = tokenize.chat_template
    if source is None:
        return ()
    notes = []
    if has_frozen_date(source):
        notes.append(
            f"the chat template asks for today's date: {TEMPLATE_DATE:%d %b %Y} is used instead, "
            "in training and in the saved chat_template.jinja"
        )
    if difference := first_difference(tokenizer, tokenize, rows):
        tokenize.chat_template = None
        notes.append(
            "no chat_template.jinja is saved: with it, transformers makes other tokens "
            f"{difference}; slm-lora itself prompts as it trains"
        )
    elif mask_note := _mask_note(tokenizer, tokenize):
        notes.append(mask_note)
    return tuple(notes)


def first_difference(
    tokenizer: PreTrainedTokenizerBase, tokenize: RowTokenizer, rows: Sequence[Row]
) -> str:
    """Find where transformers, with the saved template, makes other tokens than training.

    Sample conversations and some of the rows are compared, whole and as prompts. Conversations
    that the template refuses, and rows that contain special tokens, are left out.

    Returns:
        The position of the first difference, as a phrase; empty if there is none.
    """
    for row in (*(Row(turns, source="prompt") for turns in SAMPLES), *_usable(tokenize, rows)):
        for turns in (row.turns, row.turns[:-1]):
            prompt = len(turns) < len(row.turns)
            position = _first_differing_token(tokenizer, tokenize, Row(turns, row.context), prompt)
            if position:
                return f"{position} of {'a prompt' if prompt else 'a text'} of {len(turns)} turns"
    return ""


def _usable(tokenize: RowTokenizer, rows: Sequence[Row]) -> list[Row]:
    usable: list[Row] = []
    # Only chat templates write contexts into the saved template, too.
    contexts_agree = tokenize.is_multi_turn or not tokenize.template.include_context
    for row in rows:
        texts = [row.context, *(turn.content for turn in row.turns)]
        if (
            len(usable) < _MAX_ROWS
            and sum(map(len, texts)) <= _MAX_CHARACTERS
            and (contexts_agree or not row.context)
            and not any(token in text for token in tokenize.specials.tokens for text in texts)
        ):
            usable.append(row)
    return usable


def _first_differing_token(
    tokenizer: PreTrainedTokenizerBase, tokenize: RowTokenizer, row: Row, prompt: bool
) -> str:
    """Return the position of the first token that differs, as a phrase; empty if none does."""
    try:
        if prompt and row.turns[-1:] and row.turns[-1].role == "user":
            trained = tokenize.prompt(row.turns, row.context)
        elif not prompt:
            trained = _encoded(tokenize, row).ids.tolist()
        else:
            return ""
    except SlmLoraError:
        return ""
    try:
        ids: list[int] = _apply_template(
            tokenizer,
            row,
            tokenize.chat_template,
            tokenize.template.include_context and tokenize.is_multi_turn,
            add_generation_prompt=prompt,
        )["input_ids"]
    except Exception as error:  # the template is foreign code
        return f"(it fails: {type(error).__name__})"
    ends_with_eos = not prompt and tokenize.is_multi_turn and trained[-1:] == [tokenize.eos_id]
    if ends_with_eos and ids[: len(trained)] != trained:
        trained = trained[:-1]  # the EOS that training adds where the template writes none
    if ids[: len(trained)] == trained:
        rest = "" if prompt else str(tokenizer.decode(ids[len(trained) :]))
        exact = len(ids) == len(trained)
        return "" if exact or not (prompt or rest.strip()) else f"from token {len(trained) + 1}"
    pairs = zip(ids, trained, strict=False)
    return f"from token {next((n for n, (a, b) in enumerate(pairs) if a != b), len(ids)) + 1}"


def _encoded(tokenize: RowTokenizer, row: Row) -> Example:
    (example,), _ = tokenize.encode([row], {row.row_id: ""})
    return example


def _apply_template(
    tokenizer: PreTrainedTokenizerBase,
    row: Row,
    source: str | None,
    include_context: bool = False,
    **options: Any,
) -> Any:
    """Apply a chat template with transformers alone, as other programs do."""
    return tokenizer.apply_chat_template(
        chat_messages(row, include_context),
        chat_template=source,
        tokenize=True,
        return_dict=True,
        **options,
    )


def _mask_note(tokenizer: PreTrainedTokenizerBase, tokenize: RowTokenizer) -> str:
    """Report a template whose ``generation`` tags mark other text than the responses here."""
    kind, source = tokenize.template.kind, tokenize.template.source
    template = default_template(tokenizer) if kind == "chat" else source
    if not template or not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        return ""
    row = Row(SAMPLES[0])
    try:
        example = _encoded(tokenize, row)
        encoding = _apply_template(
            tokenizer, row, freeze_date(template), return_assistant_tokens_mask=True
        )
    except Exception:  # reported where a row is refused
        return ""
    trained = str(tokenizer.decode(example.ids[example.response].tolist()))
    if not str(tokenizer.decode(encoding["input_ids"])).rstrip().endswith(str(tokenizer.eos_token)):
        trained = trained.removesuffix(str(tokenizer.eos_token))  # added by training
    ids = zip(encoding["input_ids"], encoding["assistant_masks"], strict=True)
    marked = str(tokenizer.decode([token for token, is_marked in ids if is_marked]))
    if trained.rstrip() == marked.rstrip():
        return ""
    return (
        "the {% generation %} tags of the chat template mark other text than is trained on here "
        "under training.loss_on=response: whole answers, from after the header to their end mark"
    )
