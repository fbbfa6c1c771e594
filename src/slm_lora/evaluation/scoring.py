"""Held-out loss and perplexity from per-row scores.

Loss is the total negative log-likelihood over the total number of label tokens, perplexity is
exp(loss); neither depends on the batch size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass

from slm_lora.data.collate import collate, make_micro_batches
from slm_lora.errors import DataError, IntegrityError, NumericError
from slm_lora.model.base import Base
from slm_lora.model.forward import DocumentScores, score_documents
from slm_lora.ops.compilation import run_with_compile_fallback
from slm_lora.records import Example, LossOn, RowScore
from slm_lora.runtime import distributed
from slm_lora.runtime.signals import StopRequested

_MAX_LOSS = 700.0
"""Nats per token; exp overflows beyond about 709. A uniform distribution has about 12 at most."""


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """Loss in nats per label token, over ``tokens`` label tokens of ``rows`` rows."""

    loss: float
    perplexity: float
    tokens: int
    rows: int
    bits_per_byte: float


def score(
    base: Base,
    examples: Sequence[Example],
    split: str,
    micro_batch_tokens: int,
    compiled: bool = False,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> list[RowScore]:
    """Score every example under the base with its active adapter.

    Every process scores its share, and returns all scores.

    Args:
        base: in evaluation mode (no dropout).
        examples: rows to score; the same in all processes.
        split: name of the set, recorded in every score.
        micro_batch_tokens: largest micro-batch, in tokens.
        compiled: whether to compile (see `ops.compilation`).
        on_tokens: called with the number of tokens scored since the last call; if it raises
            `StopRequested`, all processes do.

    Returns:
        One score per row, sorted by row id.

    Raises:
        NumericError: a row's loss is not finite.
        IntegrityError: the rows of the processes differ.
        StopRequested: a stop was requested in any process.
        PeerLostError: another process is gone.
    """
    scores, stopped = [], False
    batches = make_micro_batches(examples, micro_batch_tokens)
    batches_by_rank = distributed.partition(
        batches, lambda batch: sum(example.length for example in batch), distributed.world_size()
    )
    own_batches = batches_by_rank[distributed.rank()]
    for micro in own_batches:
        batch = collate(micro, "all")
        with distributed.peer_errors() if base.sharded else nullcontext():
            document_scores = run_with_compile_fallback(
                compiled, functools.partial(score_documents, base, batch)
            )
        for index, example in enumerate(micro):
            if not math.isfinite(document_scores.nll_all[index]):
                raise NumericError(
                    f"row {example.row_id[:8]}: loss {document_scores.nll_all[index]} under "
                    f"{base.source.name} in {base.precision}; use training.precision=fp32"
                )
            scores.append(
                RowScore(
                    row_id=example.row_id,
                    group_id=example.group_id,
                    category=example.category,
                    split=split,
                    nll_all=float(document_scores.nll_all[index]),
                    tokens_all=int(document_scores.tokens_all[index]),
                    bytes_all=example.bytes_all,
                    nll_response=float(document_scores.nll_response[index]),
                    tokens_response=int(document_scores.tokens_response[index]),
                    bytes_response=example.bytes_response,
                    values=_token_values(document_scores, index),
                )
            )
        try:
            on_tokens(len(batch.ids))
        except StopRequested:
            if distributed.is_single():
                raise
            stopped = True  # gathered below, so that all processes stop
            if not base.sharded:
                break
    if base.sharded:  # FSDP needs the same number of forward passes in all processes
        shortest = collate([min(examples, key=lambda example: example.length)], "all")
        with distributed.peer_errors():
            for _ in range(max(map(len, batches_by_rank)) - len(own_batches)):
                score_documents(base, shortest)
    return sorted(_gather_scores(scores, examples, stopped), key=lambda score: score.row_id)


def _token_values(scores: DocumentScores, index: int) -> dict[str, tuple[float, float]]:
    """Sums and numbers of labels of a document's further values, by name."""
    counts = int(scores.tokens_all[index]), int(scores.tokens_response[index])
    values = {
        name: (float(sums[index]), float(counts[0])) for name, sums in scores.values_all.items()
    }
    return values | {
        f"{name}_response": (float(sums[index]), float(counts[1]))
        for name, sums in scores.values_response.items()
    }


def _gather_scores(
    own_scores: list[RowScore], examples: Sequence[Example], stopped: bool
) -> list[RowScore]:
    """The scores of all processes, one per example."""
    if distributed.is_single():
        return own_scores
    results = distributed.all_gather(
        {"scores": [asdict(score) for score in own_scores], "stopped": stopped}
    )
    if any(result["stopped"] for result in results):
        raise StopRequested
    scores = [RowScore(**score) for result in results for score in result["scores"]]
    if sorted(s.row_id for s in scores) != sorted(e.row_id for e in examples):
        raise IntegrityError(
            "the processes did not score every row once: their rows differ; use the same data and "
            "recipe on all machines"
        )
    return scores


def held_out_loss(scores: Sequence[RowScore], tokens: LossOn) -> HeldOutLoss:
    """Loss over the whole text, or over the responses.

    Raises:
        DataError: the rows have no label tokens.
        NumericError: the perplexity overflows.
    """
    if tokens == "all":
        nll = math.fsum(s.nll_all for s in scores)
        n_tokens = sum(s.tokens_all for s in scores)
        n_bytes = sum(s.bytes_all for s in scores)
    else:
        nll = math.fsum(s.nll_response for s in scores)
        n_tokens = sum(s.tokens_response for s in scores)
        n_bytes = sum(s.bytes_response for s in scores)
    if n_tokens == 0:
        raise DataError(f"no label tokens left: {len(scores)} rows have no {tokens} token to score")
    loss = nll / n_tokens
    if loss > _MAX_LOSS:
        raise NumericError(
            f"loss {loss:.1f} nats per token: the training diverged; lower training.learning_rate"
        )
    return HeldOutLoss(
        loss=loss,
        perplexity=math.exp(loss),
        tokens=n_tokens,
        rows=len(scores),
        bits_per_byte=nll / math.log(2) / max(1, n_bytes),
    )
