"""Proof, before anything is trained, that others who apply the chat template that is handed on
get the tokens of the training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slm_lora.data.chat_templates import TEMPLATE_DATE, default_template, freeze, is_frozen
from slm_lora.data.templates import chat_messages
from slm_lora.data.tokenization import RowTokenizer
from slm_lora.errors import SlmLoraError
from slm_lora.records import Example, Row, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ASKED, _ANSWERED = Turn("user", "How far is it?"), Turn("assistant", "Two days, on foot.")
SAMPLES = (
    (_ASKED, _ANSWERED),
    (Turn("system", "Be brief."), _ASKED, _ANSWERED),
    (_ASKED, _ANSWERED, Turn("user", "And by river?"), Turn("assistant", "One.")),
)
_ROWS, _LONGEST = 8, 4000
"""How many rows are compared, and how long they may be in characters: each is rendered again."""


def notes_on_template(
    tokenizer: PreTrainedTokenizerBase, tokenize: RowTokenizer, rows: Sequence[Row]
) -> tuple[str, ...]:
    """What a user should know of the chat template that is handed on, one line each.

    Where it does not give others the tokens of the training, it is taken off ``tokenize``: none
    is handed on.

    Args:
        tokenizer: of the base, as transformers has it.
        tokenize: of the training.
        rows: of the training; some are compared, beside sample conversations.
    """
    source = tokenize.chat_template
    if source is None:
        return ()
    notes = []
    if is_frozen(source):
        notes.append(
            f"the chat template asks for today's date: {TEMPLATE_DATE:%d %b %Y} stands in its "
            "place, in training and in the chat_template.jinja that is handed on"
        )
    if why := difference(tokenizer, tokenize, rows):
        tokenize.chat_template = None
        notes.append(
            f"no chat_template.jinja is handed on: with it, transformers makes other tokens {why}; "
            "slm-lora itself prompts as it trains"
        )
    elif told := _other_marks(tokenizer, tokenize):
        notes.append(told)
    return tuple(notes)


def difference(
    tokenizer: PreTrainedTokenizerBase, tokenize: RowTokenizer, rows: Sequence[Row]
) -> str:
    """Where tokens of transformers, through the template handed on, differ from the training's.

    Compared are sample conversations and some of the rows, whole and as prompts. What the
    training refuses (a system turn, several questions), or spells special tokens, is left out.

    Returns:
        In a few words; empty where there is no difference.
    """
    for row in (*(Row(turns, source="prompt") for turns in SAMPLES), *_usable(tokenize, rows)):
        for turns in (row.turns, row.turns[:-1]):
            prompt = len(turns) < len(row.turns)
            told = _differs(tokenizer, tokenize, Row(turns, row.context), prompt)
            if told:
                return f"{told} of {'a prompt' if prompt else 'a text'} of {len(turns)} turns"
    return ""


def _usable(tokenize: RowTokenizer, rows: Sequence[Row]) -> list[Row]:
    found: list[Row] = []
    in_place = tokenize.holds_conversations or not tokenize.template.include_context
    for row in rows:
        texts = [row.context, *(turn.content for turn in row.turns)]
        if (
            len(found) < _ROWS
            and sum(map(len, texts)) <= _LONGEST
            and (in_place or not row.context)
            and not any(token in text for token in tokenize.specials.tokens for text in texts)
        ):
            found.append(row)
    return found


def _differs(
    tokenizer: PreTrainedTokenizerBase, tokenize: RowTokenizer, row: Row, prompt: bool
) -> str:
    """The place of the first token that differs; empty where none does."""
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
        found: list[int] = _applied(
            tokenizer,
            row,
            tokenize.chat_template,
            tokenize.template.include_context and tokenize.holds_conversations,
            add_generation_prompt=prompt,
        )["input_ids"]
    except Exception as error:  # a program of someone else's
        return f"(it fails: {type(error).__name__})"
    own_end = not prompt and tokenize.holds_conversations and trained[-1:] == [tokenize.eos_id]
    if own_end and found[: len(trained)] != trained:
        trained = trained[:-1]  # training's, where the template writes none
    if found[: len(trained)] == trained:
        rest = "" if prompt else str(tokenizer.decode(found[len(trained) :]))
        exact = len(found) == len(trained)
        return "" if exact or not (prompt or rest.strip()) else f"from token {len(trained) + 1}"
    same = zip(found, trained, strict=False)
    return f"from token {next((n for n, (a, b) in enumerate(same) if a != b), len(found)) + 1}"


def _encoded(tokenize: RowTokenizer, row: Row) -> Example:
    (example,), _ = tokenize.encode([row], {row.row_id: ""})
    return example


def _applied(
    tokenizer: PreTrainedTokenizerBase,
    row: Row,
    source: str | None,
    include_context: bool = False,
    **options: Any,
) -> Any:
    """As others do it, by transformers alone."""
    return tokenizer.apply_chat_template(
        chat_messages(row, include_context),
        chat_template=source,
        tokenize=True,
        return_dict=True,
        **options,
    )


def _other_marks(tokenizer: PreTrainedTokenizerBase, tokenize: RowTokenizer) -> str:
    """Says it where the template marks other text as the assistant's than is trained on."""
    kind, source = tokenize.template.kind, tokenize.template.source
    own = default_template(tokenizer) if kind == "chat" else source
    if not own or not re.search(r"\{%-?\s*generation\s*-?%\}", own):
        return ""
    row = Row(SAMPLES[0])
    try:
        example = _encoded(tokenize, row)
        found = _applied(tokenizer, row, freeze(own), return_assistant_tokens_mask=True)
    except Exception:  # what it refuses is told where a row is refused
        return ""
    trained = str(tokenizer.decode(example.ids[example.response].tolist()))
    if not str(tokenizer.decode(found["input_ids"])).rstrip().endswith(str(tokenizer.eos_token)):
        trained = trained.removesuffix(str(tokenizer.eos_token))  # put there by training
    ids = zip(found["input_ids"], found["assistant_masks"], strict=True)
    marked = str(tokenizer.decode([token for token, is_marked in ids if is_marked]))
    if trained.rstrip() == marked.rstrip():
        return ""
    return (
        "the {% generation %} tags of the chat template mark other text than is trained on here "
        "under training.loss_on=response: whole answers, from behind the header to their end mark"
    )
