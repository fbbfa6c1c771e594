"""Packed attention by PyTorch's batched matrix products, for any device and precision.

Queries, keys and values are gathered to [documents × kv_heads, …, head_dim] (see
`attention_layout`); the backward pass recomputes the probabilities from the log-sum-exp of the
scores, as in FlashAttention-2 (Dao 2023, arXiv 2307.08691).
"""

from __future__ import annotations

import torch
from torch import Tensor

from slm_lora.ops.attention_layout import layout
from slm_lora.ops.compilation import compilable


def _at_least_fp32(x: Tensor) -> Tensor:
    """``x`` in fp32, or fp64: softmax in bf16 or fp16 would lose the precision of the scores."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _positions(rows: int, keys: int, device: torch.device) -> Tensor:
    """Positions of a block's queries, [rows, 1]; the last query and the last key have the same."""
    return torch.arange(rows, device=device).unsqueeze(1) + (keys - rows)


def _flat_rows(x: Tensor) -> Tensor:
    # Compiled functions take 2-D tensors: of three sizes two are often equal, and Dynamo would
    # specialise on their equality.
    return x.reshape(-1, x.shape[-1])


@compilable
def _probabilities(scores: Tensor, rows: int, scale: float) -> tuple[Tensor, Tensor]:
    """Causal softmax of raw scores [b × n × rows, keys], and their log-sum-exp [b × n × rows]."""
    scaled = _at_least_fp32(scores.view(-1, rows, scores.shape[-1])) * scale
    keys = scaled.shape[-1]
    visible = torch.arange(keys, device=scaled.device) <= _positions(rows, keys, scaled.device)
    scaled = torch.where(visible, scaled, float("-inf"))
    maximum = scaled.amax(-1, keepdim=True)
    exponentials = (scaled - maximum).exp()
    total = exponentials.sum(-1, keepdim=True)
    probabilities = (exponentials / total).to(scores.dtype).view(scores.shape)
    return probabilities, (maximum + total.log()).flatten()


@compilable
def _score_gradient(
    scores: Tensor,
    upstream: Tensor,
    logsumexp: Tensor,
    delta: Tensor,
    lengths: Tensor,
    rows: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Recomputed probabilities and the gradient of the raw scores; zero for padding queries.

    Args:
        scores: raw, [b × n × rows, keys].
        upstream: gradient of the probabilities, in the shape of the scores.
        logsumexp: from `_probabilities`.
        delta: dot product of each query's output and its gradient, [b × n × rows].
        lengths: length of the document without padding, [b × n].
        rows: number of queries in the block.
        scale: factor of the scores.
    """
    keys = scores.shape[-1]
    shape = (-1, rows, keys)
    scaled = _at_least_fp32(scores.view(shape)) * scale
    position = _positions(rows, keys, scores.device)
    visible = (torch.arange(keys, device=scores.device) <= position) & (
        position < lengths.view(-1, 1, 1)
    )
    probabilities = torch.where(visible, (scaled - logsumexp.view(-1, rows, 1)).exp(), 0)
    gradient = (
        probabilities * (_at_least_fp32(upstream.view(shape)) - delta.view(-1, rows, 1)) * scale
    )
    return probabilities.to(scores.dtype).view(scores.shape), gradient.to(scores.dtype).view(
        scores.shape
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """As `attention.packed_attention`."""
    kv_heads, head_dim = k.shape[1], k.shape[2]
    packed_layout = layout(tuple(lengths.tolist()), q.shape[1], kv_heads, q.device)
    outputs, logsumexps = [], []
    for bucket in packed_layout.buckets:
        batch = bucket.documents * kv_heads
        keys = _flat_rows(k).index_select(0, bucket.keys).view(batch, -1, head_dim)
        values = _flat_rows(v).index_select(0, bucket.keys).view(batch, -1, head_dim)
        for block in bucket.blocks:
            queries = _flat_rows(q).index_select(0, block.queries).view(batch, -1, head_dim)
            scores = queries @ keys[:, : block.stop].transpose(1, 2)
            probabilities, logsumexp = _probabilities(
                _flat_rows(scores), block.stop - block.start, scale
            )
            outputs.append(_flat_rows(probabilities.view(scores.shape) @ values[:, : block.stop]))
            logsumexps.append(logsumexp)
    return (
        torch.cat(outputs).index_select(0, packed_layout.restore_queries).view(q.shape),
        torch.cat(logsumexps).index_select(0, packed_layout.restore_queries),
    )


def backward(
    out_gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    lengths: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `attention.packed_attention_backward`."""
    kv_heads, head_dim = k.shape[1], k.shape[2]
    packed_layout = layout(tuple(lengths.tolist()), q.shape[1], kv_heads, q.device)
    delta = (_at_least_fp32(out_gradient) * _at_least_fp32(out)).sum(-1).flatten()
    dqs, dks, dvs = [], [], []
    for bucket in packed_layout.buckets:
        batch = bucket.documents * kv_heads
        keys = _flat_rows(k).index_select(0, bucket.keys).view(batch, -1, head_dim)
        values = _flat_rows(v).index_select(0, bucket.keys).view(batch, -1, head_dim)
        dk, dv = torch.zeros_like(_at_least_fp32(keys)), torch.zeros_like(_at_least_fp32(values))
        for block in bucket.blocks:
            queries = _flat_rows(q).index_select(0, block.queries).view(batch, -1, head_dim)
            upstream = _flat_rows(out_gradient).index_select(0, block.queries).view(queries.shape)
            visible = slice(block.stop)
            shape = batch, -1, block.stop
            p, ds = _score_gradient(
                _flat_rows(queries @ keys[:, visible].transpose(1, 2)),
                _flat_rows(upstream @ values[:, visible].transpose(1, 2)),
                logsumexp.index_select(0, block.queries),
                delta.index_select(0, block.queries),
                bucket.lengths,
                block.stop - block.start,
                scale,
            )
            p, ds = p.view(shape), ds.view(shape)
            dqs.append(_flat_rows(ds @ keys[:, visible]))
            dk[:, visible] += ds.transpose(1, 2) @ queries
            dv[:, visible] += p.transpose(1, 2) @ upstream
        dks.append(_flat_rows(dk))
        dvs.append(_flat_rows(dv))
    return (
        torch.cat(dqs).index_select(0, packed_layout.restore_queries).view(q.shape),
        torch.cat(dks).index_select(0, packed_layout.restore_keys).to(k.dtype).view(k.shape),
        torch.cat(dvs).index_select(0, packed_layout.restore_keys).to(v.dtype).view(v.shape),
    )
