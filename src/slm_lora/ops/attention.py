"""Causal attention over packed documents: each attends only to itself, and there is no padding
outside of attention.

It has three backends: C++ on CPUs with AVX512-BF16 (`attention_cpu`), FlashAttention on GPUs that
support it (`attention_flash`), and batched matrix products on any device (`attention_bmm`). It is a
`torch.library` custom operator, so compiled layers contain it without a graph break.

transformers finds it under the name ``PACKED`` through its `AttentionInterface`; the model is
called with ``document_lengths`` (int64 [documents], on the CPU) in addition to its usual arguments.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slm_lora.ops import attention_bmm, attention_cpu, attention_flash

PACKED = "slm_lora_packed"

_calls = 0
"""Number of calls by transformers models in this process; see `calls`."""


class AttentionBackend(Protocol):
    """Attention over packed documents; each backend is a module of this package."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """As `packed_attention`."""
        ...

    def backward(
        self,
        out_gradient: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        lengths: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `packed_attention_backward`."""
        ...


def choose_backend(q: Tensor) -> AttentionBackend:
    """The fastest backend that supports queries ``q`` on this machine."""
    if attention_cpu.usable(q):
        return attention_cpu
    return attention_flash if attention_flash.usable(q) else attention_bmm


@torch.library.custom_op("slm_lora::packed_attention", mutates_args=())
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention within each document.

    Args:
        q: queries [T, heads, head_dim].
        k: keys [T, kv_heads, head_dim]; heads is a multiple of kv_heads.
        v: values, as the keys.
        lengths: tokens of each document, which may be 0; int64 on the CPU; their sum is T.
        scale: factor of the scores.

    Returns:
        Outputs [T, heads, head_dim], and the log-sum-exp of the scores [T × heads], in fp32 or
        fp64, in the order of the backend's backward pass.
    """
    return choose_backend(q).forward(q, k, v, lengths, scale)


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
    logsumexp: Tensor,
    lengths: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `packed_attention` with respect to q, k and v."""
    return choose_backend(q).backward(out_gradient, q, k, v, out, logsumexp, lengths, scale)


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


def _transformers_attention(
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
    """An attention function of transformers: [1, heads, T, head_dim] → [1, T, heads, head_dim].

    Raises:
        ValueError: no ``document_lengths``, or not plain causal softmax attention.
    """
    global _calls
    if document_lengths is None:
        raise ValueError("packed attention needs document_lengths")
    if not torch.compiler.is_compiling():
        _calls += 1
    if sliding_window is not None or softcap is not None or s_aux is not None:
        raise ValueError("its attention has a sliding window, a cap or a sink")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    # Under autocast only matrix products are in bf16 or fp16; rotary embeddings return q and k in
    # fp32.
    q, k, v = (x.squeeze(0).transpose(0, 1).to(value.dtype) for x in (query, key, value))
    out, _logsumexp = packed_attention(q, k, v, document_lengths, scale)
    return out.unsqueeze(0), None


def calls() -> int:
    """Number of calls outside of compiled code, which shows whether a model uses this attention."""
    return _calls


def register() -> None:
    """Register the attention in transformers; may be called repeatedly."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, _transformers_attention)
