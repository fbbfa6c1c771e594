"""Causal attention over packed documents: each sees itself only, and padding is never computed
outside of it.

Three ways compute it: C++ on CPUs with AVX512-BF16 (`native`), FlashAttention on GPUs that have
it (`flash`), and batched matrix products everywhere (`products`). The operator is a
`torch.library` custom one, so it sits inside compiled layers without breaking their graph.

transformers finds it under the name ``PACKED`` through its `AttentionInterface`; the model is
called with ``document_lengths`` (int64 [documents], on the CPU) besides its usual arguments.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slm_lora.ops import attention_bmm, attention_cpu, attention_flash

PACKED = "slm_lora_packed"

_calls = 0
"""How often a model of transformers asked for it in this process; see `calls`."""


class AttentionBackend(Protocol):
    """Attention over packed documents: one module of this package each."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of the scores."""
        ...

    def backward(
        self,
        out_gradient: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        log_total: Tensor,
        lengths: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        ...


def choose_backend(q: Tensor) -> AttentionBackend:
    """The fastest way that computes for such queries here."""
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
        lengths: tokens of each document, or none; int64 on the CPU; they sum to T.
        scale: factor of the scores.

    Returns:
        Outputs [T, heads, head_dim], and the logarithm of the softmax's sum [T × heads], in fp32
        or wider, in the order that its own backward pass wants.
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
    log_total: Tensor,
    lengths: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `packed_attention` with respect to q, k and v."""
    return choose_backend(q).backward(out_gradient, q, k, v, out, log_total, lengths, scale)


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
    global _calls
    if document_lengths is None:
        raise ValueError("packed attention needs document_lengths")
    if not torch.compiler.is_compiling():
        _calls += 1
    if sliding_window is not None or softcap is not None or s_aux is not None:
        raise ValueError("its attention has a sliding window, a cap or a sink")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    # Under autocast only products are in half precision; rotations leave q and k in fp32.
    q, k, v = (x.squeeze(0).transpose(0, 1).to(value.dtype) for x in (query, key, value))
    out, _log_total = packed_attention(q, k, v, document_lengths, scale)
    return out.unsqueeze(0), None


def calls() -> int:
    """How often it was computed, outside of compiled code: whether a model really uses it shows."""
    return _calls


def register() -> None:
    """Make the attention known to transformers (again and again is fine)."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, _for_transformers)
