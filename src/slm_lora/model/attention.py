"""Causal attention over packed documents: each sees itself only, and padding is never computed
outside of it.

Documents are sorted by length and put into buckets; a bucket takes lengths down to
``BUCKET_SHARE`` of its longest, so little is padded inside. Queries, keys and values are
gathered to [documents × kv heads, group × length, head dim] and attended to by batched matrix
products; the backward pass recomputes the probabilities. The operator is a `torch.library`
custom one, so it sits inside compiled layers without breaking their graph.

transformers finds it under the name ``PACKED`` through its `AttentionInterface`; the model is
called with ``document_lengths`` (int64 [documents], on the CPU) besides its usual arguments.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PACKED = "slm_lora_packed"

BUCKET_SHARE = 0.85
"""A bucket's shortest document is at least this share of its longest."""


@dataclass(frozen=True)
class _Bucket:
    """Rows of the packed queries ([tokens × heads]) and keys ([tokens × kv heads]) to gather.

    Padding gathers its document's last token; what it computes is dropped, and its gradient
    is set to zero through ``padding``.
    """

    documents: int
    longest: int
    query_rows: Tensor
    key_rows: Tensor
    padding: Tensor


@dataclass(frozen=True)
class _Layout:
    buckets: tuple[_Bucket, ...]
    query_back: Tensor
    key_back: Tensor


def _buckets(lengths: tuple[int, ...]) -> list[list[int]]:
    order = sorted(range(len(lengths)), key=lambda d: -lengths[d])
    buckets: list[list[int]] = []
    for document in order:
        if not buckets or lengths[document] < BUCKET_SHARE * lengths[buckets[-1][0]]:
            buckets.append([])
        buckets[-1].append(document)
    return buckets


@functools.lru_cache(maxsize=8)
def _layout(lengths: tuple[int, ...], heads: int, kv_heads: int, device: torch.device) -> _Layout:
    """Index tensors for one packing; cached, as every layer of a pass asks for the same."""
    starts = torch.tensor((0, *lengths)).cumsum(0)
    group = heads // kv_heads
    head = torch.arange(heads).view(1, kv_heads, group, 1)
    kv_head = torch.arange(kv_heads).view(1, kv_heads, 1)
    buckets = []
    for documents in _buckets(lengths):
        longest = lengths[documents[0]]
        own = torch.tensor([lengths[d] for d in documents]).view(-1, 1)
        position = torch.arange(longest).view(1, -1)
        tokens = starts[documents].view(-1, 1) + position.minimum(own - 1)
        padding = (position >= own).view(len(documents), 1, 1, longest)
        buckets.append(
            _Bucket(
                documents=len(documents),
                longest=longest,
                query_rows=(tokens.view(len(documents), 1, 1, longest) * heads + head).flatten(),
                key_rows=(tokens.view(len(documents), 1, longest) * kv_heads + kv_head).flatten(),
                padding=padding.expand(-1, kv_heads, group, -1).reshape(-1, group * longest, 1),
            )
        )
    total = int(starts[-1])

    def back(gathered: list[Tensor], padding: list[Tensor], rows: int) -> Tensor:
        # Where each packed row stands among all gathered rows, padding left out.
        where = torch.empty(rows, dtype=torch.long)
        index, real = torch.cat(gathered), ~torch.cat(padding)
        where[index[real]] = torch.arange(len(index))[real]
        return where.to(device)

    query_padding = [b.padding.flatten() for b in buckets]
    key_padding = [
        b.padding.view(b.documents, kv_heads, group, b.longest)[:, :, 0].flatten() for b in buckets
    ]
    return _Layout(
        buckets=tuple(
            _Bucket(
                b.documents,
                b.longest,
                b.query_rows.to(device),
                b.key_rows.to(device),
                b.padding.to(device),
            )
            for b in buckets
        ),
        query_back=back([b.query_rows for b in buckets], query_padding, total * heads),
        key_back=back([b.key_rows for b in buckets], key_padding, total * kv_heads),
    )


def _wide(x: Tensor) -> Tensor:
    """At least fp32: softmax in bf16 or fp16 would lose what the products kept."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _probabilities(scores: Tensor, longest: int, scale: float) -> Tensor:
    """Causal softmax of raw scores [b, group × longest, longest], in fp32 or wider, cast back."""
    b = scores.shape[0]
    future = torch.ones(longest, longest, dtype=torch.bool, device=scores.device).triu(1)
    wide = _wide(scores).view(b, -1, longest, longest) * scale
    wide = wide.masked_fill(future, float("-inf"))
    return torch.softmax(wide, dim=-1).to(scores.dtype).view_as(scores)


def _score_gradient(probabilities: Tensor, upstream: Tensor, scale: float) -> Tensor:
    """Gradient of the raw scores from that of the probabilities (both [b, rows, keys])."""
    p, dp = _wide(probabilities), _wide(upstream)
    return (p * (dp - (p * dp).sum(-1, keepdim=True)) * scale).to(probabilities.dtype)


def _gathered(rows: Tensor, index: Tensor, documents: int, kv_heads: int, head_dim: int) -> Tensor:
    return rows.index_select(0, index).view(documents * kv_heads, -1, head_dim)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@torch.library.custom_op("slm_lora::packed_attention", mutates_args=())
def packed_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Causal attention within each document.

    Args:
        q: queries [T, heads, head_dim].
        k: keys [T, kv_heads, head_dim]; heads is a multiple of kv_heads.
        v: values, as the keys.
        lengths: tokens of each document, int64 on the CPU; they sum to T.
        scale: factor of the scores.

    Returns:
        [T, heads, head_dim], contiguous.
    """
    kv_heads, head_dim = k.shape[1], k.shape[2]
    layout = _layout(tuple(lengths.tolist()), q.shape[1], kv_heads, q.device)
    outputs = []
    for b in layout.buckets:
        qg = _gathered(_rows(q), b.query_rows, b.documents, kv_heads, head_dim)
        kg = _gathered(_rows(k), b.key_rows, b.documents, kv_heads, head_dim)
        vg = _gathered(_rows(v), b.key_rows, b.documents, kv_heads, head_dim)
        p = _probabilities(qg @ kg.transpose(1, 2), b.longest, scale)
        outputs.append(_rows(p @ vg))
    return torch.cat(outputs).index_select(0, layout.query_back).view(q.shape)


@packed_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("slm_lora::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    out_gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `packed_attention` with respect to q, k and v."""
    kv_heads, head_dim = k.shape[1], k.shape[2]
    layout = _layout(tuple(lengths.tolist()), q.shape[1], kv_heads, q.device)
    dqs, dks, dvs = [], [], []
    for b in layout.buckets:
        qg = _gathered(_rows(q), b.query_rows, b.documents, kv_heads, head_dim)
        kg = _gathered(_rows(k), b.key_rows, b.documents, kv_heads, head_dim)
        vg = _gathered(_rows(v), b.key_rows, b.documents, kv_heads, head_dim)
        og = _gathered(_rows(out_gradient), b.query_rows, b.documents, kv_heads, head_dim)
        og = og.masked_fill(b.padding, 0)
        p = _probabilities(qg @ kg.transpose(1, 2), b.longest, scale)
        ds = _score_gradient(p, og @ vg.transpose(1, 2), scale)
        dqs.append(_rows(ds @ kg))
        dks.append(_rows(ds.transpose(1, 2) @ qg))
        dvs.append(_rows(p.transpose(1, 2) @ og))
    return (
        torch.cat(dqs).index_select(0, layout.query_back).view(q.shape),
        torch.cat(dks).index_select(0, layout.key_back).view(k.shape),
        torch.cat(dvs).index_select(0, layout.key_back).view(v.shape),
    )


@packed_attention_backward.register_fake
def _(
    out_gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, lengths, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, lengths)


def _backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, lengths = ctx.saved_tensors
    gradients = packed_attention_backward(out_gradient, q, k, v, lengths, ctx.scale)
    return (*gradients, None, None)


packed_attention.register_autograd(_backward, setup_context=_save_inputs)


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
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return packed_attention(q, k, v, document_lengths, scale).unsqueeze(0), None


def register() -> None:
    """Make the attention known to transformers (again and again is fine)."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, _for_transformers)
