"""Special tokens of a tokenizer: BOS, and a copy that takes spelt special tokens as text."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from slm_lora.data.templates import Rendered, Specials

if TYPE_CHECKING:
    from tokenizers import Tokenizer
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
        input_ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return input_ids

    bos = str(tokenizer.bos_token)
    added: list[int] = tokenizer("a", add_special_tokens=True)["input_ids"]
    return ids(f"{bos}a") != added[: 1 + len(ids("a"))] == ids(f"{bos} a")


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the special tokens, the unknown token excepted: any text may become that one."""
    return {
        token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special and token_id != tokenizer.unk_token_id
    }


def literal_backend(
    tokenizer: PreTrainedTokenizerBase, specials: Specials
) -> tuple[Tokenizer, dict[int, int]]:
    """A copy of the tokenizer for which special tokens are the characters `Specials.owned`.

    Special tokens that a text spells are tokenised as text.

    Returns:
        The copy, and the id in the original tokenizer by the id of each such character.
    """
    from tokenizers import AddedToken, Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    original_ids: dict[int, int] = {}
    for index, token in enumerate(specials.tokens):
        character = specials.owned(index)
        strip = {"lstrip": added[token].lstrip, "rstrip": added[token].rstrip}
        backend.add_tokens([AddedToken(character, normalized=False, **strip)])
        original_id: Any = tokenizer.convert_tokens_to_ids(token)
        new_id: Any = backend.token_to_id(character)
        original_ids[new_id] = original_id
    return backend, original_ids
