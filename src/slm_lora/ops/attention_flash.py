"""Packed attention on CUDA GPUs by PyTorch's variable-length FlashAttention (Dao 2023, arXiv
2307.08691).

Once per process its outputs and gradients are compared with those of `attention_bmm` on a few short
documents; if they differ, `attention` uses `attention_bmm`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from slm_lora.ops import attention_bmm

_MAX_HEAD_DIM = 256
"""Largest supported head dimension; it must be a multiple of 8."""
_MIN_CAPABILITY = (8, 0)
"""Lowest compute capability: Ampere."""
_CHECK_LENGTHS = (70, 9, 33)
"""Document lengths of the check, above and below the size of a kernel's block."""
_failure = ""


def usable(q: Tensor) -> bool:
    """Whether it supports queries ``q`` [T, heads, head_dim] on this machine."""
    head_dim = q.shape[-1]
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and head_dim <= _MAX_HEAD_DIM
        and head_dim % 8 == 0
        and torch.cuda.get_device_capability(q.device) >= _MIN_CAPABILITY
        and is_verified(q.device, q.dtype, head_dim)
    )


def failure() -> str:
    """Why it is not used on a GPU that should support it; empty if it is, or was not checked."""
    return _failure


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """As `attention.packed_attention`; log-sum-exp in the order [heads, T]."""
    cumulative, longest = _cumulative_lengths(tuple(lengths.tolist()), q.device)
    out, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cumulative, cumulative, longest, longest, 0.0, True, False, scale=scale
    )
    return out, logsumexp.flatten()


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
    cumulative, longest = _cumulative_lengths(tuple(lengths.tolist()), q.device)
    # The generator's state is unused without dropout.
    state, unused = (torch.zeros(n, dtype=torch.uint64, device=q.device) for n in (2, 0))
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        out_gradient.contiguous(), q, k, v, out, logsumexp.view(q.shape[1], -1),
        cumulative, cumulative, longest, longest, 0.0, True, state, unused, scale=scale,
    )  # fmt: skip
    return dq, dk, dv


@functools.lru_cache(maxsize=8)
def _cumulative_lengths(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
    """Cumulative lengths (int32 [documents + 1], on the device) and the largest length; cached,
    as all layers of a forward pass need the same."""
    cumulative = torch.tensor((0, *lengths)).cumsum(0).to(device, torch.int32)
    return cumulative, max(lengths)


@functools.cache
def is_verified(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether outputs and gradients on this device equal those of `attention_bmm`, to rounding."""
    global _failure
    try:
        relative_error = _relative_error(device, dtype, head_dim)
    except RuntimeError as error:  # a PyTorch without it, or without kernels for this GPU
        _failure = str(error).strip().splitlines()[0]
        return False
    # Twenty roundings of bf16.
    if not relative_error <= 0.05:
        _failure = f"FlashAttention differs from batched products by {relative_error:.1e}"
        return False
    return True


def _relative_error(device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """Largest relative error of outputs and gradients, with `attention_bmm` as reference."""
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, lengths = 4, 2, torch.tensor(_CHECK_LENGTHS)
    q, k, v, upstream = (
        torch.randn(sum(_CHECK_LENGTHS), n_heads, head_dim, generator=generator).to(device, dtype)
        for n_heads in (heads, kv_heads, kv_heads, heads)
    )
    backends = ((forward, backward), (attention_bmm.forward, attention_bmm.backward))
    actual, expected = (
        _outputs_and_gradients(*backend, (q, k, v, upstream), lengths, head_dim**-0.5)
        for backend in backends
    )
    return max(
        float((a.float() - b.float()).norm() / b.float().norm())
        for a, b in zip(actual, expected, strict=True)
    )


def _outputs_and_gradients(
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    inputs: tuple[Tensor, ...],
    lengths: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    q, k, v, upstream = inputs
    out, logsumexp = forward(q, k, v, lengths, scale)
    return out, *backward(upstream, q, k, v, out, logsumexp, lengths, scale)
