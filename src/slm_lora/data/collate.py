"""Order examples by epoch, and collate them to micro-batches without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slm_lora.data.splits import seeded_order
from slm_lora.records import Example, LossOn


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Whole documents, concatenated without padding: T tokens in all.

    Attributes:
        ids: token ids, int64 [T].
        positions: position of every token in its own document, int64 [T].
        lengths: length of each document in tokens, in order.
        labels: id of the next token, or `IGNORE_INDEX` where nothing is scored; int64 [T].
        document: index of the document of every token, int64 [T].
        response: whether the label is a response token, bool [T].
        row_ids: row id of each document, in order.
    """

    ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    lengths: tuple[int, ...]
    labels: npt.NDArray[np.int64]
    document: npt.NDArray[np.int64]
    response: npt.NDArray[np.bool_]
    row_ids: tuple[str, ...]


IGNORE_INDEX = -100
"""Label of a position that is not scored (the value that PyTorch ignores by default)."""


def label_count(example: Example, loss_on: LossOn) -> int:
    """Count the labels of an example that enter the loss."""
    scored = example.response[1:] if loss_on == "response" else example.ids[1:]
    return int(np.count_nonzero(scored)) if loss_on == "response" else len(scored)


def collate(examples: Sequence[Example], loss_on: LossOn) -> MicroBatch:
    """Concatenate examples. The last token of a document has no label."""
    ids = np.concatenate([example.ids for example in examples]).astype(np.int64)
    response = np.concatenate([np.append(example.response[1:], False) for example in examples])
    labels = np.concatenate([np.append(example.ids[1:], IGNORE_INDEX) for example in examples])
    labels = labels.astype(np.int64)
    if loss_on == "response":
        labels[~response] = IGNORE_INDEX
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


def make_micro_batches(examples: Sequence[Example], budget: int) -> list[list[Example]]:
    """Divide examples into the fewest micro-batches of at most ``budget`` tokens, longest first.

    Sorting by length puts similar lengths together, which suits attention over documents, and
    makes the largest micro-batch, which sets the memory peak, as small as this order allows. A
    document longer than the budget gets a micro-batch of its own.
    """
    ordered = sorted(examples, key=lambda e: (-e.length, e.row_id))
    batches = _fill_greedily(ordered, budget)
    # Search for the smallest budget that needs no more micro-batches.
    sufficient, too_small = budget, 0
    while sufficient - too_small > 1:
        middle = (sufficient + too_small) // 2
        candidate = _fill_greedily(ordered, middle)
        if len(candidate) > len(batches):
            too_small = middle
        else:
            sufficient, batches = middle, candidate
    return batches


def _fill_greedily(ordered: Sequence[Example], budget: int) -> list[list[Example]]:
    """Fill micro-batches in this order, each as full as the budget allows."""
    batches: list[list[Example]] = []
    tokens = 0
    for example in ordered:
        if not batches or tokens + example.length > budget:
            batches.append([])
            tokens = 0
        batches[-1].append(example)
        tokens += example.length
    return batches


def epoch_order(examples: Sequence[Example], seed: int, epoch: int) -> list[Example]:
    """Return the examples in the order of one epoch, a hash of seed, epoch and row id."""
    by_id = {example.row_id: example for example in examples}
    return [by_id[row_id] for row_id in seeded_order(by_id, f"epoch {epoch}", seed)]


def steps_per_epoch(rows: int, effective_batch_size: int) -> int:
    """Number of optimizer steps of one epoch, a last partial step included."""
    return -(-rows // effective_batch_size)
