"""A tokenizer as GGUF describes it, so that llama.cpp makes the same tokens of a text.

llama.cpp knows two kinds that matter here: byte-level BPE, whose way of cutting text before
merging is known by a name (``tokenizer.ggml.pre``), and SentencePiece's, which merges by score.
Which it is, and which name, follows from the tokenizer's own description, nothing else: a wrong
name gives wrong tokens of numbers and spaces, and no error anywhere.
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

_GPT2 = "the pattern of GPT-2"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE = {
    ((_GPT2,), False): "gpt-2",
    (("digit by digit", _GPT2), False): "smollm",
    ((LLAMA3_PATTERN,), True): "llama-bpe",
}
"""llama.cpp's name by the cuts and by whether whole words skip the merges."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What goes under ``tokenizer.ggml``.

    Attributes:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece).
        pre: name of the cuts before merging.
        tokens: text of every id.
        types: type of every id.
        merges: of byte-level BPE, in order.
        scores: of SentencePiece, one an id; the highest is merged first.
        adds_bos: whether every text begins with BOS.
        adds_space: whether a space is added before every text (SentencePiece).
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    adds_bos: bool
    adds_space: bool


def vocabulary(
    tokenizer: PreTrainedTokenizerBase, size: int, adds_bos: bool, name: str
) -> Vocabulary:
    """Describe a tokenizer.

    Args:
        tokenizer: a fast one.
        size: rows of the embedding; ids that the tokenizer does not use are filled.
        adds_bos: whether it puts BOS before every text.
        name: of the model, for messages.

    Raises:
        UsageError: llama.cpp would make other tokens, or it is not known whether it would.
    """
    described: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    refused = f"{name}: its tokenizer cannot be described in GGUF: "
    if described["model"]["type"] != "BPE":
        raise UsageError(f"{refused}{described['model']['type']} is not BPE; {WAY_OUT}")
    if len(tokenizer) > size:
        raise UsageError(
            f"{refused}{len(tokenizer)} tokens, and an embedding of {size} rows; {WAY_OUT}"
        )
    spacing = [each["content"] for each in described["added_tokens"] if _swallows(each)]
    if spacing:
        raise UsageError(
            f"{refused}the token {spacing[0]} takes in spaces or whole words; {WAY_OUT}"
        )
    merges = [tuple(pair) for pair in described["model"]["merges"]]
    tokens, types = _tokens(described, size)
    if described["model"]["byte_fallback"]:
        adds_space = _sentencepiece_space(described, refused)
        scores = _scores(described["model"]["vocab"], merges, types, refused)
        return Vocabulary("llama", "default", tokens, types, (), scores, adds_bos, adds_space)
    pre = _pre_tokenizer(described, refused)
    joined = tuple(f"{left} {right}" for left, right in merges)
    return Vocabulary("gpt2", pre, tokens, types, joined, (), adds_bos, adds_space=False)


WAY_OUT = "merge it (`slm-lora merge`) and convert the merged model with llama.cpp's own script"


def _swallows(added: Mapping[str, Any]) -> bool:
    return bool(added["lstrip"] or added["rstrip"] or added["single_word"])


def _tokens(described: Mapping[str, Any], size: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [UNUSED] * size
    model = described["model"]
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, NORMAL
        if model["byte_fallback"] and _is_byte(token):
            types[number] = BYTE
    for added in described["added_tokens"]:
        number = added["id"]
        tokens[number] = added["content"]
        types[number] = CONTROL if added["special"] else USER_DEFINED
    unknown = model.get("unk_token") or ("<unk>" if model["byte_fallback"] else None)
    if unknown in model["vocab"]:
        types[model["vocab"][unknown]] = UNKNOWN
    return tuple(tokens), tuple(types)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _pre_tokenizer(described: Mapping[str, Any], refused: str) -> str:
    """llama.cpp's name for how text is cut, by the exact description of the cuts."""
    if described["normalizer"] is not None:
        raise UsageError(
            f"{refused}it normalizes text ({described['normalizer']['type']}); {WAY_OUT}"
        )
    whole = described["pre_tokenizer"] or {"type": "none"}
    steps = whole["pretokenizers"] if whole["type"] == "Sequence" else [whole]
    cuts = tuple(cut for step in steps if (cut := _cut(step)))
    pre = _PRE.get((cuts, bool(described["model"].get("ignore_merges"))))
    # Cuts work on text; on the bytes' stand-ins, after ByteLevel, they would cut elsewhere.
    if pre is None or steps[-1]["type"] != "ByteLevel":
        raise UsageError(
            f"{refused}its pre-tokenizer is none that is known here "
            f"({', '.join(cuts) or whole['type']}); {WAY_OUT}"
        )
    return pre


def _cut(step: Mapping[str, Any]) -> str:
    """One step of cutting; an empty string where it cuts nothing."""
    rest = {key: value for key, value in step.items() if key not in ("type", "trim_offsets")}
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return _GPT2 if step["use_regex"] else ""
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digit by digit"
    if step["type"] == "Split" and (step["behavior"], step["invert"]) == ("Isolated", False):
        return str(step["pattern"].get("Regex", step["pattern"]))
    return json.dumps({"type": step["type"], **rest}, ensure_ascii=False)


def _sentencepiece_space(described: Mapping[str, Any], refused: str) -> bool:
    """Whether every text begins with a space: said by a normalizer, or by a pre-tokenizer."""
    normalizer, cuts = described["normalizer"], described["pre_tokenizer"]
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepends = {"type": "Prepend", "prepend": "▁"}
    if cuts is None and normalizer == {"type": "Sequence", "normalizers": [prepends, replaces]}:
        return True
    if cuts is None and normalizer == replaces:
        return False
    if normalizer is None and cuts is not None and cuts["type"] == "Metaspace":
        scheme = cuts.get("prepend_scheme")
        if cuts["replacement"] == "▁" and not cuts.get("split", True):
            return bool(scheme != "never")
    raise UsageError(
        f"{refused}its normalizer and pre-tokenizer are none that are known here; {WAY_OUT}"
    )


def _scores(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, ...]],
    types: Sequence[int],
    refused: str,
) -> tuple[float, ...]:
    """SentencePiece's scores from the merges: the earlier a token is made, the higher.

    llama.cpp joins any two neighbours whose text is a token, the highest score first. That is
    what the merges do, if all ways to make one token stand together, and every token of more
    than one character has one.
    """
    first: dict[str, int] = {}
    previous = ""
    for rank, pair in enumerate(merges):
        token = "".join(pair)
        if token != previous and token in first:
            raise UsageError(f"{refused}its merges are not in SentencePiece's order; {WAY_OUT}")
        previous = token
        first.setdefault(token, rank)
    scores = [0.0] * len(types)
    for token, number in vocab.items():
        if token in first:
            scores[number] = -float(first[token])
        elif types[number] == NORMAL and len(token) > 1:
            raise UsageError(f"{refused}no merge makes its token {token!r}; {WAY_OUT}")
    return tuple(scores)
