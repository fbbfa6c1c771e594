"""Special tokens of a tokenizer: BOS, and a copy that encodes their spelling as plain text."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from slm_lora.data.templates import Rendered, SpecialTokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


def split_at_responses(rendered: Rendered) -> list[str]:
    """Split the text at response spans: outside, response, outside, response, …, outside."""
    edges = [0, *(edge for span in rendered.responses for edge in span), len(rendered.text)]
    return [rendered.text[a:b] for a, b in itertools.pairwise(edges)]


def added_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the BOS that the tokenizer adds to every text, or None."""
    ids: list[int] = tokenizer("a", add_special_tokens=True)["input_ids"]
    first: int | None = tokenizer.bos_token_id
    return first if first is not None and ids[:1] == [first] else None


def needs_space_after_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether text after a BOS token is tokenised as if preceded by a space."""

    def ids(text: str) -> list[int]:
        input_ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return input_ids

    bos = str(tokenizer.bos_token)
    added: list[int] = tokenizer("a", add_special_tokens=True)["input_ids"]
    return ids(f"{bos}a") != added[: 1 + len(ids("a"))] == ids(f"{bos} a")


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of special tokens, except the unknown token, which any text may yield."""
    return {
        token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special and token_id != tokenizer.unk_token_id
    }


def literal_backend(
    tokenizer: PreTrainedTokenizerBase, specials: SpecialTokens
) -> tuple[Tokenizer, dict[int, int]]:
    """Copy a tokenizer so that special tokens are written as `SpecialTokens.marker` characters.

    The spelling of a special token is tokenised as text.

    Returns:
        The copy, and a map from the id of each marker to the id of its special token.
    """
    from tokenizers import AddedToken, Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    original_ids: dict[int, int] = {}
    for index, token in enumerate(specials.tokens):
        character = specials.marker(index)
        strip = {"lstrip": added[token].lstrip, "rstrip": added[token].rstrip}
        backend.add_tokens([AddedToken(character, normalized=False, **strip)])
        original_id: Any = tokenizer.convert_tokens_to_ids(token)
        new_id: Any = backend.token_to_id(character)
        original_ids[new_id] = original_id
    return backend, original_ids
