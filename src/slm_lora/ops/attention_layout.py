"""How packed documents are laid out for batched matrix products: buckets and blocks.

Documents are sorted by length and put into buckets; a bucket takes lengths down to
``BUCKET_SHARE`` of its longest, so little is padded inside. Queries are divided into blocks of
about ``BLOCK`` positions, and a block is multiplied only with the keys up to its last position:
for long documents this leaves out nearly half of what causal attention masks anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BUCKET_SHARE = 0.85
"""A bucket's shortest document is at least this share of its longest."""

BLOCK = 128
"""Positions of a block of queries, about."""

MULTIPLE = 16
"""Padded lengths are a multiple of this: vectors are full, and few shapes occur."""


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
    """Documents of about one length. Padding gathers its document's last token, again.

    Attributes:
        documents: how many.
        keys: rows of the packed keys ([tokens × kv heads]) in the order
            [document, kv head, position].
        lengths: real length of every document, once a query head, int64 [documents × heads].
    """

    documents: int
    keys: Tensor
    lengths: Tensor
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Layout:
    """Buckets, and where each packed row stands among all gathered ones."""

    buckets: tuple[Bucket, ...]
    queries_back: Tensor
    keys_back: Tensor


def _buckets(lengths: tuple[int, ...]) -> list[list[int]]:
    order = sorted((d for d, length in enumerate(lengths) if length), key=lambda d: -lengths[d])
    buckets: list[list[int]] = []
    for document in order:
        if not buckets or lengths[document] < BUCKET_SHARE * lengths[buckets[-1][0]]:
            buckets.append([])
        buckets[-1].append(document)
    return buckets


def _rounded_up(n: int) -> int:
    return -(-n // MULTIPLE) * MULTIPLE


def _blocks(longest: int) -> Iterator[tuple[int, int]]:
    size = _rounded_up(-(-longest // max(1, round(longest / BLOCK))))
    # The last one first: it has more keys than queries, and a compiler that sees two sizes
    # equal would make code for equal ones only.
    for start in reversed(range(0, longest, size)):
        yield start, min(start + size, longest)


@functools.lru_cache(maxsize=8)
def layout(lengths: tuple[int, ...], heads: int, kv_heads: int, device: torch.device) -> Layout:
    """The layout of one packing; cached, as every layer of a pass asks for the same."""
    starts = torch.tensor((0, *lengths)).cumsum(0)
    group = heads // kv_heads
    head = torch.arange(heads).view(1, kv_heads, group, 1)
    kv_head = torch.arange(kv_heads).view(1, kv_heads, 1)
    buckets, query_rows, query_real, key_rows, key_real = [], [], [], [], []
    for documents in _buckets(lengths):
        many = len(documents)
        longest = _rounded_up(lengths[documents[0]])
        own = torch.tensor([lengths[d] for d in documents]).view(-1, 1)
        position = torch.arange(longest).view(1, -1)
        tokens = starts[documents].view(-1, 1) + position.minimum(own - 1)
        real = position < own
        keys = (tokens.view(many, 1, longest) * kv_heads + kv_head).flatten()
        key_rows.append(keys)
        key_real.append(real.view(many, 1, longest).expand(-1, kv_heads, -1).flatten())
        blocks = []
        for start, stop in _blocks(longest):
            rows = tokens[:, start:stop].reshape(many, 1, 1, -1) * heads + head
            query_rows.append(rows.flatten())
            query_real.append(real[:, start:stop].reshape(many, 1, 1, -1).expand_as(rows).flatten())
            blocks.append(Block(start, stop, query_rows[-1].to(device)))
        buckets.append(
            Bucket(
                many,
                keys.to(device),
                # (No view, whose base a compiler would make cases of.)
                torch.tensor([lengths[d] for d in documents for _ in range(heads)]).to(device),
                tuple(blocks),
            )
        )
    total = int(starts[-1])

    def back(rows: list[Tensor], real: list[Tensor], many: int) -> Tensor:
        where = torch.empty(many, dtype=torch.long)
        index, is_real = torch.cat(rows), torch.cat(real)
        where[index[is_real]] = torch.arange(len(index))[is_real]
        return where.to(device)

    return Layout(
        tuple(buckets),
        back(query_rows, query_real, total * heads),
        back(key_rows, key_real, total * kv_heads),
    )
