"""Layout of packed documents for batched matrix products: buckets and blocks.

Documents are sorted by length into buckets; a bucket holds lengths from ``BUCKET_SHARE`` of its
longest, which limits padding. Queries are divided into blocks of about ``BLOCK`` positions, and
a block is multiplied only by the keys up to its last position: for long documents this skips nearly
half of the products that the causal mask would discard.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BUCKET_SHARE = 0.85
"""Least ratio of the shortest to the longest document of a bucket."""

BLOCK = 128
"""Approximate number of positions in a block of queries."""

MULTIPLE = 16
"""Padded lengths are multiples of it, for full vectors and few distinct shapes."""


@dataclass(frozen=True)
class Block:
    """Queries at positions [start, stop) of every document of a bucket.

    Attributes:
        queries: rows of the packed queries ([tokens × heads]) in the order
            [document, kv head, query head of it, position].
    """

    start: int
    stop: int
    queries: Tensor


@dataclass(frozen=True)
class Bucket:
    """Documents of similar length; padding repeats a document's last token.

    Attributes:
        documents: number of documents.
        keys: rows of the packed keys ([tokens × kv heads]) in the order
            [document, kv head, position].
        lengths: unpadded length of each document, repeated for each query head, int64
            [documents × heads].
        blocks: of its queries, the last one first.
    """

    documents: int
    keys: Tensor
    lengths: Tensor
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Layout:
    """Buckets, and indices that restore the packed order from the gathered rows."""

    buckets: tuple[Bucket, ...]
    restore_queries: Tensor
    restore_keys: Tensor


def _buckets(lengths: tuple[int, ...]) -> list[list[int]]:
    order = sorted((d for d, length in enumerate(lengths) if length), key=lambda d: -lengths[d])
    buckets: list[list[int]] = []
    for document in order:
        if not buckets or lengths[document] < BUCKET_SHARE * lengths[buckets[-1][0]]:
            buckets.append([])
        buckets[-1].append(document)
    return buckets


def _round_up(n: int) -> int:
    return -(-n // MULTIPLE) * MULTIPLE


def _blocks(longest: int) -> Iterator[tuple[int, int]]:
    size = _round_up(-(-longest // max(1, round(longest / BLOCK))))
    # The last block first: it has more keys than queries, and Dynamo would specialise on equal
    # sizes.
    for start in reversed(range(0, longest, size)):
        yield start, min(start + size, longest)


@functools.lru_cache(maxsize=8)
def layout(lengths: tuple[int, ...], heads: int, kv_heads: int, device: torch.device) -> Layout:
    """The layout of a micro-batch; cached, as all layers of a forward pass need the same."""
    starts = torch.tensor((0, *lengths)).cumsum(0)
    group = heads // kv_heads
    head = torch.arange(heads).view(1, kv_heads, group, 1)
    kv_head = torch.arange(kv_heads).view(1, kv_heads, 1)
    buckets, query_rows, query_real, key_rows, key_real = [], [], [], [], []
    for documents in _buckets(lengths):
        n_documents = len(documents)
        longest = _round_up(lengths[documents[0]])
        own_lengths = torch.tensor([lengths[d] for d in documents]).view(-1, 1)
        position = torch.arange(longest).view(1, -1)
        tokens = starts[documents].view(-1, 1) + position.minimum(own_lengths - 1)
        is_real = position < own_lengths
        keys = (tokens.view(n_documents, 1, longest) * kv_heads + kv_head).flatten()
        key_rows.append(keys)
        key_real.append(is_real.view(n_documents, 1, longest).expand(-1, kv_heads, -1).flatten())
        blocks = []
        for start, stop in _blocks(longest):
            rows = tokens[:, start:stop].reshape(n_documents, 1, 1, -1) * heads + head
            query_rows.append(rows.flatten())
            query_real.append(
                is_real[:, start:stop].reshape(n_documents, 1, 1, -1).expand_as(rows).flatten()
            )
            blocks.append(Block(start, stop, query_rows[-1].to(device)))
        buckets.append(
            Bucket(
                n_documents,
                keys.to(device),
                # Not a view: Dynamo would guard on its base.
                torch.tensor([lengths[d] for d in documents for _ in range(heads)]).to(device),
                tuple(blocks),
            )
        )
    total = int(starts[-1])

    def restore_index(rows: list[Tensor], is_real: list[Tensor], n_rows: int) -> Tensor:
        restored = torch.empty(n_rows, dtype=torch.long)
        index, real_rows = torch.cat(rows), torch.cat(is_real)
        restored[index[real_rows]] = torch.arange(len(index))[real_rows]
        return restored.to(device)

    return Layout(
        tuple(buckets),
        restore_index(query_rows, query_real, total * heads),
        restore_index(key_rows, key_real, total * kv_heads),
    )
