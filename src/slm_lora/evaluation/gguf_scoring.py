"""Held-out loss of a GGUF file, computed by llama.cpp on the token ids of PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slm_lora.errors import DataError, NumericError, UsageError
from slm_lora.evaluation.llama_library import load, open_model
from slm_lora.records import Example, RowScore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENS = "tokenizer.ggml.tokens"


@dataclass(frozen=True, slots=True)
class FileScores:
    """Scores of a file's rows, sorted by row id, and the speed of scoring."""

    scores: list[RowScore]
    tokens_per_s: float


def score_file(
    path: Path,
    examples: Sequence[Example],
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    threads: int,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> FileScores:
    """Score rows through llama.cpp. Its tokenizer is not used.

    Args:
        path: a GGUF file with a whole model.
        examples: tokenised rows.
        split: name of the set, recorded in every score.
        tokenizer: that made the ids.
        threads: number of threads.
        on_tokens: called with the number of tokens of each row.

    Raises:
        DataError: no rows.
        UsageError: no llama.cpp, no model file, or another vocabulary.
        NumericError: a row's loss is not finite.
    """
    if not examples:
        raise DataError(f"{path}: no rows to score")
    load()  # before the slow reading of the vocabulary
    check_vocabulary(path, tokenizer)
    longest = max(example.length for example in examples)
    scores = []
    with open_model(path, longest, threads) as model:
        began = time.perf_counter()
        for example in examples:
            nll = model.token_nll(example.ids)
            if not np.isfinite(nll).all():
                raise NumericError(f"row {example.row_id[:8]}: loss is not finite in {path}")
            scored = example.response[1:]  # position 0 has no prediction
            scores.append(
                RowScore(
                    row_id=example.row_id,
                    group_id=example.group_id,
                    category=example.category,
                    split=split,
                    nll_all=float(nll.sum()),
                    tokens_all=len(nll),
                    bytes_all=example.bytes_all,
                    nll_response=float(nll[scored].sum()),
                    tokens_response=int(scored.sum()),
                    bytes_response=example.bytes_response,
                )
            )
            on_tokens(example.length)
        seconds = time.perf_counter() - began
    tokens = sum(example.length for example in examples)
    return FileScores(sorted(scores, key=lambda score: score.row_id), tokens / seconds)


def check_vocabulary(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a file whose ids are not those of the tokenizer.

    Raises:
        UsageError: no GGUF file, no model in it, or another vocabulary; the first differing token
            is named.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, ValueError, IndexError) as error:
        raise UsageError(f"{path}: not a GGUF file ({error})") from error
    field = reader.get_field(_TOKENS)
    if field is None:
        raise UsageError(f"{path}: has no vocabulary; give the file of a whole model")
    tokens = field.contents()
    expected = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    if len(tokens) < len(expected):
        raise UsageError(
            f"{path}: another vocabulary: {len(tokens)} tokens, {len(expected)} in the base's"
        )
    for token_id, (token, own) in enumerate(zip(tokens, expected, strict=False)):
        if own is not None and token != own:
            raise UsageError(
                f"{path}: another vocabulary: token {token_id} is {token!r}, {own!r} in the base's"
            )
