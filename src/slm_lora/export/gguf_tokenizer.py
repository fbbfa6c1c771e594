"""Describe a tokenizer in GGUF so that llama.cpp produces the same tokens.

Two kinds are supported: byte-level BPE, whose pre-tokenizer llama.cpp knows by name
(``tokenizer.ggml.pre``), and SentencePiece, which merges by score. Kind and name are derived from
the tokenizer's specification only: a wrong name changes the tokens of numbers and spaces without
any error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slm_lora.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Token types of GGUF."""

_GPT2_PATTERN = "the pattern of GPT-2"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZER_NAMES = {
    ((_GPT2_PATTERN,), False): "gpt-2",
    (("digit by digit", _GPT2_PATTERN), False): "smollm",
    ((LLAMA3_PATTERN,), True): "llama-bpe",
}
"""llama.cpp's name, by the patterns and by ``ignore_merges``."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Content of the keys ``tokenizer.ggml.*``.

    Attributes:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece).
        pre: name of the pre-tokenizer.
        tokens: text of each id.
        types: type of each id.
        merges: merges in order (byte-level BPE).
        scores: score of each id; the highest is merged first (SentencePiece).
        adds_bos: whether each text begins with BOS.
        adds_space: whether a space is prepended to each text (SentencePiece).
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    adds_bos: bool
    adds_space: bool


def describe_tokenizer(
    tokenizer: PreTrainedTokenizerBase, size: int, adds_bos: bool, name: str
) -> Vocabulary:
    """Describe a tokenizer.

    Args:
        tokenizer: a fast tokenizer.
        size: rows of the embedding; ids without a token get a placeholder.
        adds_bos: whether each text begins with BOS.
        name: name of the model, for messages.

    Raises:
        UsageError: llama.cpp's tokens would differ, or might differ.
    """
    spec: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    prefix = f"{name}: tokenizer not supported in GGUF export: "
    if spec["model"]["type"] != "BPE":
        raise UsageError(f"{prefix}{spec['model']['type']} instead of BPE; {CONVERT_INSTEAD}")
    if len(tokenizer) > size:
        raise UsageError(
            f"{prefix}{len(tokenizer)} tokens for an embedding of {size} rows; {CONVERT_INSTEAD}"
        )
    absorbing = [added["content"] for added in spec["added_tokens"] if _absorbs_context(added)]
    if absorbing:
        raise UsageError(
            f"{prefix}token {absorbing[0]} strips spaces or matches single words; {CONVERT_INSTEAD}"
        )
    merges = [tuple(pair) for pair in spec["model"]["merges"]]
    tokens, types = _tokens_and_types(spec, size)
    if spec["model"]["byte_fallback"]:
        adds_space = _adds_space(spec, prefix)
        scores = _scores(spec["model"]["vocab"], merges, types, prefix)
        return Vocabulary("llama", "default", tokens, types, (), scores, adds_bos, adds_space)
    pre = _pre_tokenizer_name(spec, prefix)
    joined = tuple(f"{left} {right}" for left, right in merges)
    return Vocabulary("gpt2", pre, tokens, types, joined, (), adds_bos, adds_space=False)


CONVERT_INSTEAD = "merge it (`slm-lora merge`) and convert the merged model with llama.cpp's script"


def _absorbs_context(added: Mapping[str, Any]) -> bool:
    return bool(added["lstrip"] or added["rstrip"] or added["single_word"])


def _tokens_and_types(
    spec: Mapping[str, Any], size: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    tokens = [f"[PAD{token_id}]" for token_id in range(size)]
    types = [UNUSED] * size
    model = spec["model"]
    for token, token_id in model["vocab"].items():
        tokens[token_id], types[token_id] = token, NORMAL
        if model["byte_fallback"] and _is_byte(token):
            types[token_id] = BYTE
    for added in spec["added_tokens"]:
        token_id = added["id"]
        tokens[token_id] = added["content"]
        types[token_id] = CONTROL if added["special"] else USER_DEFINED
    unknown = model.get("unk_token") or ("<unk>" if model["byte_fallback"] else None)
    if unknown in model["vocab"]:
        types[model["vocab"][unknown]] = UNKNOWN
    return tuple(tokens), tuple(types)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _pre_tokenizer_name(spec: Mapping[str, Any], prefix: str) -> str:
    """llama.cpp's name of the pre-tokenizer, by its exact specification."""
    if spec["normalizer"] is not None:
        raise UsageError(
            f"{prefix}it has a normalizer ({spec['normalizer']['type']}); {CONVERT_INSTEAD}"
        )
    pre_tokenizer = spec["pre_tokenizer"] or {"type": "none"}
    steps = (
        pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    )
    patterns = tuple(pattern for step in steps if (pattern := _step_pattern(step)))
    name = _PRE_TOKENIZER_NAMES.get((patterns, bool(spec["model"].get("ignore_merges"))))
    # ByteLevel must be last: after it, patterns would apply to byte symbols instead of text.
    if name is None or steps[-1]["type"] != "ByteLevel":
        raise UsageError(
            f"{prefix}unknown pre-tokenizer "
            f"({', '.join(patterns) or pre_tokenizer['type']}); {CONVERT_INSTEAD}"
        )
    return name


def _step_pattern(step: Mapping[str, Any]) -> str:
    """Pattern of one pre-tokenizer step; empty if the step does not split."""
    options = {key: value for key, value in step.items() if key not in ("type", "trim_offsets")}
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return _GPT2_PATTERN if step["use_regex"] else ""
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digit by digit"
    if step["type"] == "Split" and (step["behavior"], step["invert"]) == ("Isolated", False):
        return str(step["pattern"].get("Regex", step["pattern"]))
    return json.dumps({"type": step["type"], **options}, ensure_ascii=False)


def _adds_space(spec: Mapping[str, Any], prefix: str) -> bool:
    """Whether a space is prepended to each text, by the normalizer or the pre-tokenizer."""
    normalizer, pre_tokenizer = spec["normalizer"], spec["pre_tokenizer"]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    if pre_tokenizer is None and normalizer == {
        "type": "Sequence",
        "normalizers": [prepend, replace],
    }:
        return True
    if pre_tokenizer is None and normalizer == replace:
        return False
    if normalizer is None and pre_tokenizer is not None and pre_tokenizer["type"] == "Metaspace":
        scheme = pre_tokenizer.get("prepend_scheme")
        if pre_tokenizer["replacement"] == "▁" and not pre_tokenizer.get("split", True):
            return bool(scheme != "never")
    raise UsageError(f"{prefix}unknown normalizer and pre-tokenizer; {CONVERT_INSTEAD}")


def _scores(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, ...]],
    types: Sequence[int],
    prefix: str,
) -> tuple[float, ...]:
    """SentencePiece scores from BPE merges: the earlier the merge, the higher the score.

    llama.cpp joins the two neighbours whose concatenation is the token with the highest score. This
    equals BPE if all merges of a token are consecutive and each token of more than one character
    has a merge.
    """
    first_rank: dict[str, int] = {}
    previous = ""
    for rank, pair in enumerate(merges):
        token = "".join(pair)
        if token != previous and token in first_rank:
            raise UsageError(f"{prefix}merges not in SentencePiece's order; {CONVERT_INSTEAD}")
        previous = token
        first_rank.setdefault(token, rank)
    scores = [0.0] * len(types)
    for token, token_id in vocab.items():
        if token in first_rank:
            scores[token_id] = -float(first_rank[token])
        elif types[token_id] == NORMAL and len(token) > 1:
            raise UsageError(f"{prefix}no merge for token {token!r}; {CONVERT_INSTEAD}")
    return tuple(scores)
