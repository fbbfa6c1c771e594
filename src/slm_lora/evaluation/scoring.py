"""Held-out loss and perplexity, row by row.

Loss is total negative log-likelihood over total label tokens, perplexity is exp of that very
number; both from the same per-row scores, so neither depends on the batch size.
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
from slm_lora.model.forward import score_documents
from slm_lora.ops.compilation import run_with_compile_fallback
from slm_lora.records import Example, LossOn, RowScore
from slm_lora.runtime import distributed
from slm_lora.runtime.signals import StopRequested

_LARGEST_LOSS = 700.0
"""Beyond this exp is no number any more; a uniform guess is at most about 12."""


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """Loss in nats per label token, over ``tokens`` labels of ``rows`` rows."""

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
    """Score every example under the base with whatever adapter is on it.

    Of several processes each scores its share, and all get all scores.

    Args:
        base: in evaluation mode (no dropout).
        examples: rows to score.
        split: name of the set, kept with every score.
        micro_batch_tokens: tokens computed at once.
        compiled: whether to compile (see `ops.compilation`).
        on_tokens: told of the tokens done since the last call; may raise `StopRequested`, and
            then all processes do.

    Returns:
        One score a row, sorted by row id.

    Raises:
        NumericError: a row's loss is not finite.
        IntegrityError: several processes were given different rows.
    """
    scores, stopped = [], False
    batches = make_micro_batches(examples, micro_batch_tokens)
    shares = distributed.partition(
        batches, lambda batch: sum(example.length for example in batch), distributed.world_size()
    )
    mine = shares[distributed.rank()]
    for micro in mine:
        batch = collate(micro, "all")
        with distributed.peer_errors() if base.sharded else nullcontext():
            found = run_with_compile_fallback(
                compiled, functools.partial(score_documents, base, batch)
            )
        for index, example in enumerate(micro):
            if not math.isfinite(found.nll_all[index]):
                raise NumericError(
                    f"row {example.row_id[:8]}: loss {found.nll_all[index]} under "
                    f"{base.source.name} in {base.precision}; use training.precision=fp32"
                )
            scores.append(
                RowScore(
                    row_id=example.row_id,
                    group_id=example.group_id,
                    category=example.category,
                    split=split,
                    nll_all=float(found.nll_all[index]),
                    tokens_all=int(found.tokens_all[index]),
                    bytes_all=example.bytes_all,
                    nll_response=float(found.nll_response[index]),
                    tokens_response=int(found.tokens_response[index]),
                    bytes_response=example.bytes_response,
                )
            )
        try:
            on_tokens(len(batch.ids))
        except StopRequested:
            if distributed.is_single():
                raise
            stopped = True  # told to the others below, and all stop
            if not base.sharded:
                break
    if base.sharded:  # all compute equally often
        shortest = collate([min(examples, key=lambda example: example.length)], "all")
        with distributed.peer_errors():
            for _ in range(max(map(len, shares)) - len(mine)):
                score_documents(base, shortest)
    return sorted(_of_all(scores, examples, stopped), key=lambda each: each.row_id)


def _of_all(mine: list[RowScore], examples: Sequence[Example], stopped: bool) -> list[RowScore]:
    """The scores of all processes: of every example one."""
    if distributed.is_single():
        return mine
    told = distributed.all_gather({"scores": [asdict(each) for each in mine], "stopped": stopped})
    if any(each["stopped"] for each in told):
        raise StopRequested
    scores = [RowScore(**each) for some in told for each in some["scores"]]
    if sorted(s.row_id for s in scores) != sorted(e.row_id for e in examples):
        raise IntegrityError("the processes did not score every row once: their rows differ")
    return scores


def held_out_loss(scores: Sequence[RowScore], tokens: LossOn) -> HeldOutLoss:
    """Loss over the whole text or the responses.

    Raises:
        DataError: no label token among the rows.
        NumericError: a loss whose perplexity is beyond floating point.
    """
    if tokens == "all":
        nll = math.fsum(s.nll_all for s in scores)
        count, size = sum(s.tokens_all for s in scores), sum(s.bytes_all for s in scores)
    else:
        nll = math.fsum(s.nll_response for s in scores)
        count, size = sum(s.tokens_response for s in scores), sum(s.bytes_response for s in scores)
    if count == 0:
        raise DataError(f"no label tokens left: {len(scores)} rows have no {tokens} token to score")
    loss = nll / count
    if loss > _LARGEST_LOSS:
        raise NumericError(
            f"loss {loss:.1f} nats a token: the training has diverged; lower training.learning_rate"
        )
    return HeldOutLoss(
        loss=loss,
        perplexity=math.exp(loss),
        tokens=count,
        rows=len(scores),
        bits_per_byte=nll / math.log(2) / max(1, size),
    )
