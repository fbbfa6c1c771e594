"""Packed attention by PyTorch's batched matrix products: any device, any precision.

Queries, keys and values are gathered to [documents × kv heads, …, head dim] (see `packing`);
the backward pass computes the probabilities again from the logarithms of their sums, as
FlashAttention-2 does (Dao 2023, arXiv 2307.08691).
"""

from __future__ import annotations

import torch
from torch import Tensor

from slm_lora.ops.attention_layout import layout
from slm_lora.ops.compilation import fused


def _wide(x: Tensor) -> Tensor:
    """At least fp32: softmax in bf16 or fp16 would lose what the products kept."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _positions(rows: int, keys: int, device: torch.device) -> Tensor:
    """Positions of a block's queries, [rows, 1]: its last one is that of the last key."""
    return torch.arange(rows, device=device).unsqueeze(1) + (keys - rows)


def _rows(x: Tensor) -> Tensor:
    # (Compiled functions are given rows: of three sizes two are easily equal, and a compiler that
    # sees that makes code for equal ones only.)
    return x.reshape(-1, x.shape[-1])


@fused
def _probabilities(scores: Tensor, rows: int, scale: float) -> tuple[Tensor, Tensor]:
    """Causal softmax of raw scores [b × n × rows, keys]; logarithms of its sums [b × n × rows]."""
    wide = _wide(scores.view(-1, rows, scores.shape[-1])) * scale
    keys = wide.shape[-1]
    past = torch.arange(keys, device=wide.device) <= _positions(rows, keys, wide.device)
    wide = torch.where(past, wide, float("-inf"))
    largest = wide.amax(-1, keepdim=True)
    exponential = (wide - largest).exp()
    total = exponential.sum(-1, keepdim=True)
    probabilities = (exponential / total).to(scores.dtype).view(scores.shape)
    return probabilities, (largest + total.log()).flatten()


@fused
def _score_gradient(
    scores: Tensor,
    upstream: Tensor,
    log_total: Tensor,
    dot: Tensor,
    lengths: Tensor,
    rows: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Probabilities again, and the gradient of the raw scores, zero where queries are padding.

    Args:
        scores: raw, [b × n × rows, keys].
        upstream: gradient of the probabilities, as the scores.
        log_total: from `_probabilities`.
        dot: product of a query's output and its gradient, [b × n × rows].
        lengths: real length of the document, [b × n].
        rows: queries of the block.
        scale: factor of the scores.
    """
    keys = scores.shape[-1]
    shape = (-1, rows, keys)
    wide = _wide(scores.view(shape)) * scale
    position = _positions(rows, keys, scores.device)
    seen = (torch.arange(keys, device=scores.device) <= position) & (
        position < lengths.view(-1, 1, 1)
    )
    p = torch.where(seen, (wide - log_total.view(-1, rows, 1)).exp(), 0)
    gradient = p * (_wide(upstream.view(shape)) - dot.view(-1, rows, 1)) * scale
    return p.to(scores.dtype).view(scores.shape), gradient.to(scores.dtype).view(scores.shape)


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """As `attention.packed_attention`."""
    kv_heads, head_dim = k.shape[1], k.shape[2]
    where = layout(tuple(lengths.tolist()), q.shape[1], kv_heads, q.device)
    outputs, log_totals = [], []
    for bucket in where.buckets:
        batch = bucket.documents * kv_heads
        keys = _rows(k).index_select(0, bucket.keys).view(batch, -1, head_dim)
        values = _rows(v).index_select(0, bucket.keys).view(batch, -1, head_dim)
        for block in bucket.blocks:
            queries = _rows(q).index_select(0, block.queries).view(batch, -1, head_dim)
            scores = queries @ keys[:, : block.stop].transpose(1, 2)
            p, log_total = _probabilities(_rows(scores), block.stop - block.start, scale)
            outputs.append(_rows(p.view(scores.shape) @ values[:, : block.stop]))
            log_totals.append(log_total)
    return (
        torch.cat(outputs).index_select(0, where.queries_back).view(q.shape),
        torch.cat(log_totals).index_select(0, where.queries_back),
    )


def backward(
    out_gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_total: Tensor,
    lengths: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `attention.packed_attention_backward`."""
    kv_heads, head_dim = k.shape[1], k.shape[2]
    where = layout(tuple(lengths.tolist()), q.shape[1], kv_heads, q.device)
    dot = (_wide(out_gradient) * _wide(out)).sum(-1).flatten()
    dqs, dks, dvs = [], [], []
    for bucket in where.buckets:
        batch = bucket.documents * kv_heads
        keys = _rows(k).index_select(0, bucket.keys).view(batch, -1, head_dim)
        values = _rows(v).index_select(0, bucket.keys).view(batch, -1, head_dim)
        dk, dv = torch.zeros_like(_wide(keys)), torch.zeros_like(_wide(values))
        for block in bucket.blocks:
            queries = _rows(q).index_select(0, block.queries).view(batch, -1, head_dim)
            upstream = _rows(out_gradient).index_select(0, block.queries).view(queries.shape)
            seen = slice(block.stop)
            shape = batch, -1, block.stop
            p, ds = _score_gradient(
                _rows(queries @ keys[:, seen].transpose(1, 2)),
                _rows(upstream @ values[:, seen].transpose(1, 2)),
                log_total.index_select(0, block.queries),
                dot.index_select(0, block.queries),
                bucket.lengths,
                block.stop - block.start,
                scale,
            )
            p, ds = p.view(shape), ds.view(shape)
            dqs.append(_rows(ds @ keys[:, seen]))
            dk[:, seen] += ds.transpose(1, 2) @ queries
            dv[:, seen] += p.transpose(1, 2) @ upstream
        dks.append(_rows(dk))
        dvs.append(_rows(dv))
    return (
        torch.cat(dqs).index_select(0, where.queries_back).view(q.shape),
        torch.cat(dks).index_select(0, where.keys_back).to(k.dtype).view(k.shape),
        torch.cat(dvs).index_select(0, where.keys_back).to(v.dtype).view(v.shape),
    )
