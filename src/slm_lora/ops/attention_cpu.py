"""Packed attention by the C++ of `kernels`, for bf16 on CPUs that have the instructions.

Where it cannot be had `attention` computes the same with PyTorch's batched `products`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slm_lora.ops.kernels import build

_WIDTHS = 16
"""Widths of a head are a multiple of this: whole vectors."""


def usable(q: Tensor) -> bool:
    """Whether it computes for such queries, [T, heads, head_dim], on this machine."""
    return (
        q.dtype == torch.bfloat16
        and q.device.type == "cpu"
        and q.shape[-1] % _WIDTHS == 0
        and build.available()
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """As `attention.packed_attention`."""
    q, k, v, lengths = (x.contiguous() for x in (q, k, v, lengths))
    out = torch.empty_like(q)
    log_total = torch.empty(q.shape[0] * q.shape[1], dtype=torch.float32)
    build.call("attention_forward", q, k, v, out, log_total, *_shapes(q, k, lengths), scale)
    return out, log_total


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
    given = [x.contiguous() for x in (out_gradient, q, k, v, out, log_total)]
    q, k, v = given[1:4]
    found = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    shapes = _shapes(q, k, lengths.contiguous())
    build.call("attention_backward", *given, *found, *shapes, scale)
    return found


def _shapes(q: Tensor, k: Tensor, lengths: Tensor) -> tuple[Tensor, int, int, int, int]:
    return lengths, len(lengths), q.shape[1], k.shape[1], q.shape[2]
