"""Packed attention by the C++ kernels, for bf16 on CPUs with AVX512-BF16.

Without these kernels `attention` uses `attention_bmm`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slm_lora.ops.kernels import build

_HEAD_DIM_MULTIPLE = 16
"""The head dimension is a multiple of it, to fill vectors."""


def usable(q: Tensor) -> bool:
    """Whether it supports queries ``q`` [T, heads, head_dim] on this machine."""
    return (
        q.dtype == torch.bfloat16
        and q.device.type == "cpu"
        and q.shape[-1] % _HEAD_DIM_MULTIPLE == 0
        and build.available()
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """As `attention.packed_attention`; log-sum-exp in the order [T, heads]."""
    q, k, v, lengths = (x.contiguous() for x in (q, k, v, lengths))
    out = torch.empty_like(q)
    logsumexp = torch.empty(q.shape[0] * q.shape[1], dtype=torch.float32)
    build.call("attention_forward", q, k, v, out, logsumexp, *_shapes(q, k, lengths), scale)
    return out, logsumexp


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
    inputs = [x.contiguous() for x in (out_gradient, q, k, v, out, logsumexp)]
    q, k, v = inputs[1:4]
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    shapes = _shapes(q, k, lengths.contiguous())
    build.call("attention_backward", *inputs, *gradients, *shapes, scale)
    return gradients


def _shapes(q: Tensor, k: Tensor, lengths: Tensor) -> tuple[Tensor, int, int, int, int]:
    return lengths, len(lengths), q.shape[1], k.shape[1], q.shape[2]
