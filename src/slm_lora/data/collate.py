"""From examples to optimizer steps, and from a step to micro-batches without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slm_lora.data.splits import seeded_order
from slm_lora.records import Example, LossOn


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Whole documents laid end to end: T tokens in all, no padding.

    Attributes:
        ids: token ids, int64 [T].
        positions: position of every token in its own document, int64 [T].
        lengths: tokens of each document, in order.
        labels: the token that follows, or -100 where nothing is scored; int64 [T].
        document: index of the document of every token, int64 [T].
        response: whether the label is a response token, bool [T].
        row_ids: of the documents, in order.
    """

    ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    lengths: tuple[int, ...]
    labels: npt.NDArray[np.int64]
    document: npt.NDArray[np.int64]
    response: npt.NDArray[np.bool_]
    row_ids: tuple[str, ...]


IGNORED = -100
"""Label of a position that is not scored (the value that PyTorch ignores by default)."""


def label_count(example: Example, loss_on: LossOn) -> int:
    """Tokens of the example that are predicted and counted."""
    scored = example.response[1:] if loss_on == "response" else example.ids[1:]
    return int(np.count_nonzero(scored)) if loss_on == "response" else len(scored)


def collate(examples: Sequence[Example], loss_on: LossOn) -> MicroBatch:
    """Lay the examples end to end. A document's last token predicts nothing."""
    ids = np.concatenate([example.ids for example in examples]).astype(np.int64)
    response = np.concatenate([np.append(example.response[1:], False) for example in examples])
    labels = np.concatenate([np.append(example.ids[1:], IGNORED) for example in examples])
    labels = labels.astype(np.int64)
    if loss_on == "response":
        labels[~response] = IGNORED
    lengths = tuple(example.length for example in examples)
    return MicroBatch(
        ids=ids,
        positions=np.concatenate([np.arange(length) for length in lengths]),
        lengths=lengths,
        labels=labels,
        document=np.repeat(np.arange(len(lengths)), lengths),
        response=response,
        row_ids=tuple(example.row_id for example in examples),
    )


def by_token_budget(examples: Sequence[Example], budget: int) -> list[list[Example]]:
    """Divide examples into the fewest micro-batches of at most ``budget`` tokens, longest first.

    Neighbours in length share a micro-batch, which is what attention over documents of many
    lengths wants, and the largest micro-batch, which sets the peak of memory, is as small as this
    order allows. A document longer than the budget gets a micro-batch of its own.
    """
    ordered = sorted(examples, key=lambda e: (-e.length, e.row_id))
    batches = _filled(ordered, budget)
    # The smallest budget that needs no more of them.
    enough, too_small = budget, 0
    while enough - too_small > 1:
        tried = (enough + too_small) // 2
        divided = _filled(ordered, tried)
        if len(divided) > len(batches):
            too_small = tried
        else:
            enough, batches = tried, divided
    return batches


def _filled(ordered: Sequence[Example], budget: int) -> list[list[Example]]:
    """Micro-batches in this order, each as full as the budget allows."""
    batches: list[list[Example]] = []
    filled = 0
    for example in ordered:
        if not batches or filled + example.length > budget:
            batches.append([])
            filled = 0
        batches[-1].append(example)
        filled += example.length
    return batches


def epoch_order(examples: Sequence[Example], seed: int, epoch: int) -> list[Example]:
    """The examples in the seeded order of one epoch (a hash, so it can be entered anywhere)."""
    by_id = {example.row_id: example for example in examples}
    return [by_id[row_id] for row_id in seeded_order(by_id, f"epoch {epoch}", seed)]


def steps_per_epoch(rows: int, effective_batch_size: int) -> int:
    """Optimizer steps of one epoch; the last, partial one counts."""
    return -(-rows // effective_batch_size)
