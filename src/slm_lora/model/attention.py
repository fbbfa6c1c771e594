"""Causal attention over packed documents: each sees itself only, and padding is never computed
outside of it.

Queries, keys and values are gathered to [documents × kv heads, …, head dim] (see `packing`)
and attended to by batched matrix products; the backward pass computes the probabilities again
from the logarithms of their sums, as FlashAttention-2 does (Dao 2023, arXiv 2307.08691). The
operator is a `torch.library` custom one, so it sits inside compiled layers without breaking
their graph.

transformers finds it under the name ``PACKED`` through its `AttentionInterface`; the model is
called with ``document_lengths`` (int64 [documents], on the CPU) besides its usual arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slm_lora.model import native
from slm_lora.model.fusion import fused
from slm_lora.model.packing import layout

PACKED = "slm_lora_packed"


def _wide(x: Tensor) -> Tensor:
    """At least fp32: softmax in bf16 or fp16 would lose what the products kept."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _positions(rows: int, keys: int, device: torch.device) -> Tensor:
    """Positions of a block's queries, [rows, 1]: its last one is that of the last key."""
    return torch.arange(rows, device=device).unsqueeze(1) + (keys - rows)


@fused
def _probabilities(scores: Tensor, rows: int, scale: float) -> tuple[Tensor, Tensor]:
    """Causal softmax of raw scores [b, n × rows, keys]; logarithms of its sums [b × n × rows]."""
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
        scores: raw, [b, n × rows, keys].
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


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@torch.library.custom_op("slm_lora::packed_attention", mutates_args=())
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention within each document.

    Args:
        q: queries [T, heads, head_dim].
        k: keys [T, kv_heads, head_dim]; heads is a multiple of kv_heads.
        v: values, as the keys.
        lengths: tokens of each document, int64 on the CPU; they sum to T.
        scale: factor of the scores.

    Returns:
        Outputs [T, heads, head_dim], and the logarithm of the softmax's sum [T × heads], in fp32
        or wider, for the backward pass.
    """
    if native.usable(q):
        return native.forward(q, k, v, lengths, scale)
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
            p, log_total = _probabilities(scores, block.stop - block.start, scale)
            outputs.append(_rows(p @ values[:, : block.stop]))
            log_totals.append(log_total)
    return (
        torch.cat(outputs).index_select(0, where.queries_back).view(q.shape),
        torch.cat(log_totals).index_select(0, where.queries_back),
    )


@packed_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[0] * q.shape[1], dtype=wide)


@torch.library.custom_op("slm_lora::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    out_gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_total: Tensor,
    lengths: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `packed_attention` with respect to q, k and v."""
    if native.usable(q):
        return native.backward((out_gradient, q, k, v, out, log_total), lengths, scale)
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
            p, ds = _score_gradient(
                queries @ keys[:, seen].transpose(1, 2),
                upstream @ values[:, seen].transpose(1, 2),
                log_total.index_select(0, block.queries),
                dot.index_select(0, block.queries),
                bucket.lengths,
                block.stop - block.start,
                scale,
            )
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


@packed_attention_backward.register_fake
def _(
    out_gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lengths, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, lengths)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, out_gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = packed_attention_backward(out_gradient, *ctx.saved_tensors, ctx.scale)
    return (*gradients, None, None)


packed_attention.register_autograd(_backward, setup_context=_save)


def _for_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    document_lengths: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The signature of transformers: [1, heads, T, head_dim] in, [1, T, heads, head_dim] out.

    Raises:
        ValueError: the model asks for more than causal softmax attention.
    """
    if document_lengths is None:
        raise ValueError("packed attention needs document_lengths")
    if sliding_window is not None or softcap is not None or s_aux is not None:
        raise ValueError("its attention has a sliding window, a cap or a sink")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    # Under autocast only products are in half precision; rotations leave q and k in fp32.
    q, k, v = (x.squeeze(0).transpose(0, 1).to(value.dtype) for x in (query, key, value))
    out, _log_total = packed_attention(q, k, v, document_lengths, scale)
    return out.unsqueeze(0), None


def register() -> None:
    """Make the attention known to transformers (again and again is fine)."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, _for_transformers)
