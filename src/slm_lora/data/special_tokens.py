"""What a tokenizer adds to a text: BOS, and a space after it; texts cut at their responses."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from slm_lora.data.templates import (
    Rendered,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def cut_at_responses(rendered: Rendered) -> list[str]:
    """The text cut at the response spans: outside, response, outside, response, …, outside."""
    edges = [0, *(edge for span in rendered.responses for edge in span), len(rendered.text)]
    return [rendered.text[a:b] for a, b in itertools.pairwise(edges)]


def added_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS that the tokenizer puts before every text by itself, or None."""
    ids: list[int] = tokenizer("a", add_special_tokens=True)["input_ids"]
    first: int | None = tokenizer.bos_token_id
    return first if first is not None and ids[:1] == [first] else None


def needs_space_after_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text after BOS is tokenised as if a space came before it."""

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    bos = str(tokenizer.bos_token)
    added: list[int] = tokenizer("a", add_special_tokens=True)["input_ids"]
    return ids(f"{bos}a") != added[: 1 + len(ids("a"))] == ids(f"{bos} a")
